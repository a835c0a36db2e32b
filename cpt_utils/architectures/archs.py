"""Parameters by meaning: `for_config` finds a model type's entry in the table of architectures (`arch_table.ARCHS`).

    arch = archs.for_config(ref.config())
    arch.parts(config, 3, "q_proj", names)      # where it is on disk
    arch.module(model, 3, "q_proj")             # and in memory

`arch_layers.Layers` documents the fields of an entry; `arch_left_out` lists the types without one.
"""

from __future__ import annotations

import difflib
import re

from cpt_utils.architectures.arch import Arch, is_buffer
from cpt_utils.architectures.arch_layers import FIELDS
from cpt_utils.architectures.arch_left_out import LEFT_OUT
from cpt_utils.architectures.arch_parts import (
    ATTENTION,
    BESIDE,
    FFN,
    PROJECTIONS,
    ROUTER,
    Location,
    Neurons,
    WeightSlice,
    as_slots,
    take,
)
from cpt_utils.architectures.arch_table import ARCHS, TOWERS
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch

__all__ = [
    "ARCHS",
    "ATTENTION",
    "BESIDE",
    "FFN",
    "FIELDS",
    "PROJECTIONS",
    "ROUTER",
    "Arch",
    "Location",
    "Neurons",
    "WeightSlice",
    "as_slots",
    "for_config",
    "is_buffer",
    "kin",
    "meaning",
    "take",
    "text_type",
]


def for_config(config) -> Arch:
    """The table's entry for a config (a `PretrainedConfig`, or the dict of a config.json).

    Raises:
        InputError: the config has no `model_type`, or one that is not in the table; the message says why it is left
            out, or gives the nearest types and the entry to add.
    """
    values = config if isinstance(config, dict) else config.to_dict()
    model_type = values.get("model_type")
    if not model_type:
        raise InputError("config.json has no model_type; is this the folder of a Hugging Face causal language model?")
    if model_type in LEFT_OUT:
        raise InputError(f"model type {model_type!r} is not in the table of architectures: {LEFT_OUT[model_type]}")
    if model_type not in ARCHS:
        near = difflib.get_close_matches(model_type, ARCHS, n=3, cutoff=0.4) or sorted(ARCHS)
        raise InputError(
            f"model type {model_type!r} is not in the table of architectures (nearest: {', '.join(near)}); "
            + _entry_to_add(values)
        )
    arch = _with_text_model(values)
    for key, why in arch.unless.items():
        if values.get(key):
            raise InputError(f"config.json of a {model_type} sets {key}, which is not supported: {why}")
    return arch


def text_type(config) -> str:
    """The model type of the language model alone: for a model with a vision tower, the type of its text model.

    Two models can be compared and swapped if these types are equal: their layers then have the same tensors, by
    canonical names.
    """
    arch = for_config(config)
    tower = TOWERS.get(arch.model_type)
    if tower is not None and arch.text_type == tower.config_type:  # the same model under a name that only configs have
        return tower.text
    return arch.text_type or arch.model_type


def meaning(arch: Arch, disk_name: str) -> str:
    """The name that matches a tensor across models with the same language model: the canonical name, with `lm_head` for
    the output matrix, which has another name in some types."""
    canonical = arch.canonical(disk_name)
    return f"lm_head{canonical.removeprefix(arch.head)}" if canonical.startswith(f"{arch.head}.") else canonical


def _with_text_model(values: dict) -> Arch:
    """The entry of a type; for a type with other towers, built around the language model that the config names."""
    name = values["model_type"]
    text = values.get("text_config")
    stated = text.get("model_type") if isinstance(text, dict) else None
    tower = TOWERS.get(name)
    if tower is None or stated in (None, tower.text, tower.config_type):
        return ARCHS[name]
    if stated not in ARCHS:
        why = f": {LEFT_OUT[stated]}" if stated in LEFT_OUT else f"; {_entry_to_add(text)}"
        raise InputError(
            f"the language model of this {name} is of type {stated!r}, which is not in the table of architectures{why}"
        )
    return tower.around(ARCHS[stated], name)


def kin(config) -> tuple[Arch, ...]:
    """The architectures under which this language model may be stored: its own first, then those of the same language
    model alone or with other towers."""
    named, text = for_config(config), text_type(config)
    related = {text: ARCHS.get(text)} | {name: ARCHS[name] for name, tower in TOWERS.items() if tower.text == text}
    return (named, *(arch for name, arch in related.items() if arch is not None and name != named.model_type))


def _entry_to_add(config: dict) -> str:
    """What the table's entry for an unknown type must state, judged by the modules that transformers builds for it.

    They are built on the meta device, which takes hardly any memory or time. All layers are inspected: in many mixtures
    of experts the first layers are dense, and hybrids have attention in only some layers.
    """
    model_type, where = config["model_type"], "ARCHS in cpt_utils/architectures/arch_table.py"
    try:
        from transformers import AutoConfig, AutoModelForCausalLM

        stated = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **stated))
        modules = {name for name, module in model.named_modules() if not list(module.children())}
    except Exception:  # transformers raises various types for a type or config that it cannot build
        return f"add an entry {model_type!r}: Arch(...) to {where}, plain Arch() if the module names are Llama's"
    llama = ARCHS["llama"]
    wanted = {slot.module for slots in llama.projections_at.values() for slot in as_slots(slots)} | {llama.activation}
    kinds = _kinds_of_layers(modules)
    plain = [inside for (stem, inside) in kinds if stem == "model.layers" and wanted <= inside]
    if kinds and len(plain) == len(kinds) and {"model.embed_tokens", "model.norm"} <= modules:
        others = sorted(set().union(*plain) - wanted - {name for inside in plain for name in inside if "norm" in name})
        more = f" (a layer also has {', '.join(others[:8])})" if others else ""
        return f"its modules are named like Llama's{more}: add {model_type!r}: Arch() to {where}, then run its tests"
    listed = "; ".join(
        f"{_listed(layers)} of {stem} {'has' if len(layers) == 1 else 'have'} {', '.join(sorted(inside)[:16])}"
        for (stem, inside), layers in list(kinds.items())[:4]
    )
    return f"add an entry {model_type!r}: Arch(...) to {where} that states what differs from Llama: {listed}"


def _kinds_of_layers(modules: set[str]) -> dict[tuple[str, frozenset[str]], list[int]]:
    """(path of a list of layers, module names inside a layer) -> the layers with these modules, in order of layers."""
    layers: dict[tuple[str, int], set[str]] = {}
    for name in modules:
        match = re.match(r"(.*?)\.(\d+)\.(.*)", name)
        if match:
            layers.setdefault((match[1], int(match[2])), set()).add(re.sub(r"\.\d+\.", ".N.", match[3]))
    kinds: dict[tuple[str, frozenset[str]], list[int]] = {}
    for (stem, number), inside in sorted(layers.items()):
        kinds.setdefault((stem, frozenset(inside)), []).append(number)
    return kinds


def _listed(layers: list[int]) -> str:
    more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers[:3]))}{more}"
