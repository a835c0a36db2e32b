"""The types of what later steps read in each result; an edited result is refused with the key and its value."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic requires this one below Python 3.12

from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import pydantic


def _keys(**keys):
    """A mapping with these keys, each of which may be missing or null, and any other keys."""
    return TypedDict("Keys", {key: NotRequired[kind | None] for key, kind in keys.items()})


Facts = dict[str, Any]
Number = float | None
Numbers = dict[str, Number]
Layers = list[int]
Interval = _keys(value=Number, ci_low=Number, ci_high=Number)
Set = _keys(name=str, layers=Layers, component=str, values=Numbers, layer_accuracy=list[Number])
GATE = TypedDict("Gate", {
    "model": str, "passed": bool, "n": int, "measure": NotRequired[str],
    **dict.fromkeys(("difference", "ci_low", "ci_high", "level"), float),
})  # fmt: skip
HEADER = _keys(
    models=dict[str, Facts | None], n_layers=int, ffn_width=int, seed=int, gate=Facts, base_lang=str, target_lang=str,
    language=str, data=Facts, request=Facts, heldout=Facts, interface_layers=Layers,
)  # fmt: skip
PAYLOADS = {
    "activation_correlation": _keys(series=Facts),
    "arms": _keys(
        measures=dict[str, _keys(label=str, higher_is_better=bool)],
        models=dict[str, _keys(values=Numbers, what=Facts, layers=Layers, share=dict[str, Interval | None])],
    ),
    "attn_vs_ffn": _keys(checkpoints=dict[str, _keys(layers=dict[str, Facts])], pooled=dict[str, Numbers]),
    "claims": _keys(claims=dict[str, _keys(verdict=str, numbers=list[Facts])]),
    "connect": _keys(measures=dict[str, Facts], worst=Facts, distance=dict[str, Numbers]),
    "cpt-training": _keys(settings=Facts),
    "deactivation": _keys(
        languages=list[str], matrix=dict[str, Numbers], unmasked=Numbers, selectivity=dict[str, Facts],
        intervals=dict[str, dict[str, list[Number]]], diagonal=dict[str, Facts],
    ),
    "downstream_correlation": _keys(values=dict[str, Facts]),
    "gate_lsn": _keys(checkpoints=dict[str, _keys(layers=dict[str, Facts], summary=Numbers)]),
    "heads": _keys(heads=list[_keys(layer=int, unit=int, importance=Numbers)], steps=dict[str, Facts], curves=Facts),
    "int_and_sem": _keys(checkpoints=dict[str, Numbers], layers=dict[str, Numbers]),
    "language-loss": dict[str, dict[str, Facts]],
    "layer-specialize": _keys(interface_layers=Layers, semantic_layers=Layers),
    "lsn-activation": _keys(all_layers=Number, n_neurons=int),
    "lsn-layers": _keys(layers=Layers),
    "rewind": _keys(
        points=list[_keys(curve=str, values=Numbers)], largest=dict[str, dict[str, Facts]],
        beyond=dict[str, dict[str, Facts]], best=dict[str, dict[str, Facts]], at_equal_energy=dict[str, Facts],
    ),
    "swap-controls": _keys(sets=list[Set], comparison=dict[str, Facts], matched=Facts, additive=Facts),
    "truncate": _keys(
        largest=dict[str, Facts], beyond=dict[str, dict[str, Facts]], at_equal_energy=Numbers, parameters=Number,
    ),
}  # fmt: skip
MUST_BE = {
    "dict_type": "a mapping", "list_type": "a list", "int_type": "a whole number",
    "float_type": "a number", "string_type": "text", "bool_type": "true or false",
}  # fmt: skip


def check(path: Path, payload, header: dict) -> None:
    """InputError with the key and its value, if a result is not of the form that its step writes."""
    conform(path, header, HEADER, "_header")
    if header.get("schema") in PAYLOADS:
        conform(path, payload, PAYLOADS[header["schema"]])


def conform(path: Path, value, form, name: str = "") -> None:
    """InputError if `value`, which the file at `path` has under `name`, is not of this form."""
    try:
        _adapter(form).validate_python(value, strict=True)
    except pydantic.ValidationError as failed:
        error = failed.errors()[0]
        key = ".".join(str(part) for part in (name, *error["loc"]) if part != "")
        value_text, must = repr(error["input"]), MUST_BE.get(error["type"], error["msg"])
        what = f"{value_text if len(value_text) <= 60 else f'{value_text[:57]}...'}, not {must}"
        what = "missing" if error["type"] == "missing" else what
        raise InputError(f"{path}: {key} is {what}; run again the step that wrote the file") from None


@cache
def _adapter(form):
    return pydantic.TypeAdapter(form)
