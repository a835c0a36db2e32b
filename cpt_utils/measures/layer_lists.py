"""Files that list layers: the interface, the hub, the layers richest in a language's neurons, or any list."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import experiments, results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import relatives


@dataclass(frozen=True)
class LayerFile:
    """A file of layers: the key of its list, its schema (None: any), the flag that takes it, and the step of a study
    that makes it."""

    key: str
    schema: str | None
    flag: str
    step: str


FILES = {
    "interface": LayerFile("interface_layers", "layer-specialize", "--layer-selection", "layers"),
    "semantic_hub": LayerFile("semantic_layers", "layer-specialize", "--hub-json", "layers"),
    "lsn_rich": LayerFile("layers", "lsn-layers", "--layer-list", "lsn_layers"),
    "listed": LayerFile("layers", None, "--train-only", "cogsym"),
}


def is_list(path: Path) -> bool:
    """Whether a file holds layers (a list, bare or under the key `layers`), not neurons; False if there is no file."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(content.get("layers") if isinstance(content, dict) else content, list)
    return False


def read_layers(
    path: Path, layer_set: str, n_layers: int, models: list[dict] | None, averaged: bool = False
) -> tuple[list[int], dict, dict]:
    """The sorted layers of `layer_set` (a key of FILES), and the file's payload and header; `{}` if it has none.

    The file is the one of the step, another one with the same key, or a bare list.

    Args:
        models: `ModelRef.describe()` of the base and the checkpoints; the file must be about this run. None: it
            is taken on trust.
        averaged: whether values are averaged over the layers: then an empty list is refused, and a list of any step
            under the key `layers` is accepted, because the published scripts write one file per group.

    Raises:
        InputError: no such list, a layer that the model lacks or that is listed twice, or a file about another run.
    """
    expected = FILES[layer_set]
    payload, header = results.read_json(path, None if averaged else expected.schema, n_layers=n_layers)
    if not isinstance(payload, dict):
        payload = {expected.key: payload}
    key = "layers" if averaged and "layers" in payload else expected.key
    layers = payload.get(key)
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise InputError(f"{path} has no list {key}; give the file of {experiments.made_by(expected.step)}")
    if averaged and not layers:
        raise InputError(f"{path}: the list of {layer_set} layers is empty; there is nothing to average")
    wrong = [layer for layer in layers if not 0 <= layer < n_layers]
    if wrong:
        raise InputError(f"{path} names layer {wrong[0]}; the model has layers 0 to {n_layers - 1}")
    if len(set(layers)) < len(layers):
        raise InputError(f"{path} names a layer twice; give each of the {layer_set} layers once")
    measured = (header.get("models") or {}).get("model")
    if measured and models is not None and not relatives.belongs(measured, models):
        raise InputError(
            f"{path} was made from {measured['spec']}, neither the base nor a checkpoint of this run, or trained again "
            f"since; run {experiments.made_by(expected.step)} again, or give the file of this pair"
        )
    return sorted(layers), payload, header
