"""One architecture: the projections of its layers, on disk and in memory, and the sizes that its config states.

A *projection* is q, k, v, o, gate, up or down of one layer. On disk it is one tensor, a slice of a fused tensor (Phi-3,
GPT-NeoX, GPT-2), several tensors (latent attention), or one matrix per expert of a mixture of experts (MoE), possibly
all in one tensor; `Arch.parts` lists them. In memory it is a module; `Arch.module` returns it. Names on disk and in
memory differ (prefixes, `embed_out` and `lm_head`, experts stacked in memory); `Arch.locations` maps disk to memory.
Layers may differ: a layer without attention or without an FFN has none of its projections.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from cpt_utils.architectures.arch_layers import Layers
from cpt_utils.architectures.arch_parts import (
    ATTENTION,
    BESIDE,
    FFN,
    ROUTER,
    Location,
    Slot,
    WeightSlice,
    as_slots,
    below,
    pieces,
)
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch

# Constants in old checkpoints (causal masks, rotary frequencies, sinusoidal positions): not parameters, never compared
# or swapped.
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attention|attn)\.(bias|masked_bias)|embed_positions\.weights)$")


@dataclass(frozen=True)
class Arch(Layers):
    """One model type: where the parameters of its layers are, on disk and in memory. `Layers` documents the fields."""

    # --- on disk ---

    def parts(
        self,
        config,
        layer: int,
        projection: str,
        disk_names: Collection[str],
        shape: Callable[[str], tuple[int, ...]] | None = None,
    ) -> list[WeightSlice]:
        """The weights and any biases of `projection` in `layer`, among the tensors `disk_names`.

        A MoE layer's gate, up or down has one weight per expert, in order, then that of the shared FFN; a latent
        attention has one per step. `projection` may also be ROUTER.

        Args:
            shape: returns the shape of a tensor on disk, for types whose files store experts in one of two layouts;
                without it, the layout in memory is assumed.

        Raises:
            InputError: the type or the layer has no such projection, or the tensor is not on disk (the nearest names
                are given).
        """
        sparse = projection in (*FFN, ROUTER) and self.has_router(config, layer)
        slots = () if projection == ROUTER else self.slots(config, layer, projection, beside_experts=sparse)
        if sparse and slots and not self._dense_width(config, layer, beside_experts=True):
            slots = ()
        if not slots and not (sparse and projection in (*self.experts_at.names, ROUTER)):
            raise InputError(
                f"model type {self.model_type} has no {projection} in layer {layer}; it has "
                f"{', '.join(self.projections(config, layer)) or 'neither attention nor an FFN there'}"
            )
        parts = self._expert_parts(config, layer, projection, disk_names, shape) if sparse else []
        for slot in slots:
            parts += self._slot_parts(config, layer, projection, slot, disk_names, beside_experts=sparse)
        return parts

    def head_parts(
        self,
        config,
        layer: int,
        projection: str,
        chosen: Iterable[int],
        disk_names: Collection[str],
        shape: Callable[[str], tuple[int, ...]],
        by_query: bool = False,
    ) -> list[WeightSlice]:
        """The parts of an attention projection that belong to the `chosen` units of `layer` only: rows of q, k, v and
        of their biases, columns of o; and, with the role BESIDE, the heads' share of other parameters: segments of a
        norm over all heads, sinks, rows of an output gate. Empty for a projection that the layer lacks.

        Args:
            chosen: units, as counted by `head_counts`.
            shape: returns the shape of a tensor on disk.
            by_query: `chosen` are query heads instead; a single query head has no part of k and v.

        Raises:
            InputError: a tensor is missing, or does not divide into the number of heads in config.json.
        """
        chosen, (heads, units) = sorted({*chosen}), self.head_counts(config, layer)
        of_queries = projection in ("q_proj", "o_proj")
        if not units or not chosen or (by_query and not of_queries):
            return []
        n, parts, whole = heads if by_query else units, [], []
        size = heads // n if of_queries else 1  # heads per chosen unit
        for slot in self.slots(config, layer, projection):
            whole += [] if slot.shared else self._slot_parts(config, layer, projection, slot, disk_names)
        if projection == "o_proj":
            whole = [replace(part, dim=1 - part.dim) for part in whole if part.role == "weight"]
        for name in self.with_heads.get(projection, ()):
            indices = [h for unit in chosen for h in range(unit * size, (unit + 1) * size)] if "{}" in name else [0]
            tensors = [self._find(f"{self.layers_name}.{layer}.{name.format(h)}", disk_names) for h in indices]
            (parts if "{}" in name else whole).extend(WeightSlice(tensor, BESIDE) for tensor in tensors if tensor)
        for part in whole:
            halves = 2 if self.differential and projection != "o_proj" else 1
            positions = torch.arange(shape(part.tensor)[part.dim])[slice(None) if part.index is None else part.index]
            if len(positions) % (n * halves):
                raise InputError(
                    f"{part.tensor} has shape {list(shape(part.tensor))}, which does not divide into the {n * halves} "
                    "heads that config.json states"
                )
            parts.append(replace(part, index=pieces(positions, n, chosen, halves)))
        return parts

    def shared_parts(
        self, config, layer: int, disk_names: Collection[str], shape: Callable[[str], tuple[int, ...]]
    ) -> list[WeightSlice]:
        """The parts of a layer's attention that belong to no single head: the output bias and the narrow layers of a
        latent attention; and, with the role BESIDE, norms shared by all heads and everything else below the attention
        module. Together with `head_parts` of all units, this covers every entry of the attention exactly once."""
        units = range(self.head_counts(config, layer)[1])
        if not units:
            return []
        shared, taken = [], set()
        for projection in ATTENTION:
            for slot in self.slots(config, layer, projection):
                parts = self._slot_parts(config, layer, projection, slot, disk_names)
                shared += [part for part in parts if slot.shared or (projection == "o_proj" and part.role == "bias")]
            taken |= {part.tensor for part in self.head_parts(config, layer, projection, units, disk_names, shape)}
        taken |= {part.tensor for part in shared}
        module = self.slots(config, layer, "o_proj")[0].module.rpartition(".")[0]
        start, unused = f"{self.layers_name}.{layer}.{module}.", not self.has(config, layer, ["k_proj"])
        for name in sorted({*disk_names} - taken):
            if self.canonical(name).startswith(start) and not is_buffer(name) and not (unused and self.may_lack(name)):
                shared.append(WeightSlice(name, BESIDE))
        return shared

    def layer_tensors(self, disk_names: Iterable[str], layer: int) -> list[str]:
        """Every parameter of `layer` on disk: projections, biases, norms.

        Raises:
            InputError: there is none; the message gives the nearest names on disk.
        """
        disk_names = list(disk_names)
        tensors = [name for name in disk_names if self.layer_of(name) == layer and not is_buffer(name)]
        if not tensors:
            raise InputError(_no_match(f"{self.prefixes[0]}{self.layers_name}.{layer}.", disk_names, self.model_type))
        return tensors

    def layer_of(self, disk_name: str) -> int | None:
        """The layer that a tensor on disk belongs to; None for embeddings, final norm and head."""
        match = self._layer_pattern.match(self.canonical(disk_name))
        return int(match[1]) if match else None

    def may_lack(self, disk_name: str) -> bool:
        """Whether some files of the type hold this tensor although the model does not use it."""
        return bool(self.beyond) and re.match(self.beyond, self.canonical(disk_name)) is not None

    def canonical(self, disk_name: str) -> str:
        """The name without the parts that vary between files of the same model; base and target are matched by it."""
        for start, new in self.renames:
            if disk_name.startswith(start):
                disk_name = new + disk_name.removeprefix(start)
                break
        for prefix in self._prefixes:
            if disk_name.startswith(prefix):
                disk_name = disk_name.removeprefix(prefix)
                break
        for piece, new in self.inner:
            if new not in disk_name:
                disk_name = disk_name.replace(piece, new, 1)
        return disk_name

    def disk_name(self, canonical: str, disk_names: Collection[str]) -> str:
        """The name on disk for a canonical name.

        Raises:
            InputError: there is none; the message gives the nearest names.
        """
        name = self._find(canonical, disk_names)
        if name is None:
            raise InputError(_no_match(f"{self.prefixes[0]}{canonical}", disk_names, self.model_type))
        return name

    def embedding_tensors(self, disk_names: Collection[str]) -> list[str]:
        """Input embeddings with learned positions and their norm, and, if it is on disk (not tied), the output matrix;
        all with their biases."""
        tensors = [self.disk_name(f"{name}.weight", disk_names) for name in self.embeddings]
        others = [f"{name}.bias" for name in self.embeddings] + [f"{self.head}.weight", f"{self.head}.bias"]
        return tensors + [name for name in (self._find(other, disk_names) for other in others) if name]

    def outer_tensors(self, disk_names: Iterable[str]) -> list[str]:
        """Every parameter of the language model outside the layers: embeddings, final norm, head."""
        inner = (name for name in disk_names if self.layer_of(name) is None and not self._of_other_tower(name))
        return [name for name in inner if not is_buffer(name) and not self.may_lack(name)]

    # --- in memory ---

    def decoder(self, model: torch.nn.Module) -> torch.nn.Module:
        """The module that holds embeddings, layers and final norm; running it skips the head."""
        return self._submodule(model, self.decoder_path)

    def layers(self, model: torch.nn.Module) -> torch.nn.ModuleList:
        return self._submodule(model, f"{self.decoder_path}.{self.layers_name}")

    def last(self, model: torch.nn.Module) -> torch.nn.Module:
        """The module whose output is the last hidden state: the final norm, or the last layer if there is no norm."""
        return self._submodule(model, f"{self.decoder_path}.{self.norm}") if self.norm else self.layers(model)[-1]

    def layer_path(self, layer: int) -> str:
        """Dotted path from the causal LM to a layer."""
        return f"{self.decoder_path}.{self.layers_name}.{layer}"

    def module_path(self, layer: int, projection: str) -> str:
        """Dotted path from the causal LM to the module that computes `projection`, alone or fused with others."""
        return f"{self.layer_path(layer)}.{as_slots(self.projections_at[projection])[0].module}"

    def module(self, model: torch.nn.Module, layer: int, projection: str) -> torch.nn.Module:
        return self._submodule(model, self.module_path(layer, projection))

    def in_layer(self, model: torch.nn.Module, layer: int, path: str) -> torch.nn.Module:
        """The module at a path below a layer."""
        return self._submodule(model, f"{self.layer_path(layer)}.{path}")

    def down_module(self, model: torch.nn.Module, layer: int) -> torch.nn.Module:
        """The down projection of a dense FFN, or of the shared FFN beside a layer's experts."""
        slots = self.slots(model.config, layer, "down_proj", beside_experts=self.has_router(model.config, layer))
        return self.in_layer(model, layer, slots[0].module)

    def experts_module(self, model: torch.nn.Module, layer: int) -> torch.nn.Module:
        """The module of a MoE layer's experts; its arguments are (tokens [n, hidden], experts [n, top k], weights)."""
        return self.in_layer(model, layer, below(self.experts_at.block, "experts"))

    def locations(
        self, disk_names: Iterable[str], model: torch.nn.Module, shape: Callable[[str], tuple[int, ...]] | None = None
    ) -> dict[str, Location]:
        """Tensor on disk -> where it is in `model.state_dict()`. Leaves out buffers that only files have, and tensors
        that the model does not use (`beyond`).

        Args:
            shape: returns the shape of a tensor on disk; needed to place tensors that are stacked in memory, since
                files of the same model may divide them differently.

        Raises:
            InputError: a tensor has no counterpart in the model; the message gives the nearest names.
        """
        known = model.state_dict()
        locations = {}
        for disk in disk_names:
            canonical = self.canonical(disk)
            names = (disk, f"{self.decoder_path}.{canonical}", canonical)
            name = next((name for name in names if name in known), None)
            if name is None:
                location = self._location_within(disk, known, shape)
            else:
                location = Location(name, flipped=self._is_flipped(disk, known[name], shape))
            if location is not None:
                locations[disk] = location
            elif not is_buffer(disk) and not self._is_beyond(canonical, known) and not self._of_other_tower(disk):
                near = _near(f"{self.decoder_path}.{canonical}", known)
                raise InputError(
                    f"tensor {disk} has no counterpart in the loaded {type(model).__name__}; nearest: {near}"
                )
        return locations

    # --- inside ---

    @cached_property
    def _prefixes(self) -> list[str]:
        """The possible prefixes of the decoder's names, longest first, since one may be the start of another."""
        return sorted({f"{self.decoder_path}.", *self.prefixes}, key=len, reverse=True)

    @cached_property
    def _layer_pattern(self) -> re.Pattern:
        return re.compile(rf"{re.escape(self.layers_name)}\.(\d+)\.")

    def _slot_parts(
        self, config, layer: int, projection: str, slot: Slot, disk_names: Collection[str], beside_experts: bool = False
    ) -> list[WeightSlice]:
        """Weight and bias of a slot."""
        width = self._dense_width(config, layer, beside_experts) if projection in FFN else 0
        index = self._features(config, layer, projection, slot, width)
        stem = f"{self.layers_name}.{layer}.{slot.module}"
        weight, bias = self.disk_name(f"{stem}.weight", disk_names), self._find(f"{stem}.bias", disk_names)
        parts = [WeightSlice(weight, "weight", int(self.transposed), index)]
        return parts + ([WeightSlice(bias, "bias", 0, index)] if bias else [])

    def _find(self, canonical: str, disk_names: Collection[str]) -> str | None:
        spelled = canonical
        for piece, new in reversed(self.inner):
            spelled = spelled.replace(new, piece, 1)
        candidates = [prefix + name for name in dict.fromkeys((canonical, spelled)) for prefix in (*self.prefixes, "")]
        for start, new in self.renames:
            if canonical.startswith(new):
                candidates.append(start + canonical.removeprefix(new))
        return next((name for name in candidates if name in disk_names), None)

    def _expert_parts(
        self, config, layer: int, projection: str, disk_names: Collection[str], shape: Callable | None
    ) -> list[WeightSlice]:
        spec, numbers = self.experts_at, range(self.experts(config, layer))
        block = below(f"{self.layers_name}.{layer}", spec.block) if spec.block else f"{self.layers_name}.{layer}"
        if projection == ROUTER:
            parts = [WeightSlice(self.disk_name(f"{block}.{spec.router}.weight", disk_names), "weight")]
            bias = self._find(f"{block}.{spec.router}.bias", disk_names)
            return parts + ([WeightSlice(bias, "bias")] if bias else [])
        width, stacked = self.expert_width(config, layer), f"{block}.experts.{spec.in_memory(projection)}"
        index, name = spec.features(projection, width), self._find(stacked, disk_names)
        if name:
            inputs = width if projection == "down_proj" else self._number(config, "hidden")
            dim = int(spec.transposed != (spec.flipped and shape is not None and shape(name)[-1] != inputs))
            parts = [WeightSlice(name, "weight", dim, index, number) for number in numbers]
            bias = self._find(f"{stacked}_bias", disk_names)
            return parts + ([WeightSlice(bias, "bias", 0, index, number) for number in numbers] if bias else [])
        name = f"{block}.experts.{{}}.{spec.names[projection]}.weight"
        return [WeightSlice(self.disk_name(name.format(number), disk_names), "weight") for number in numbers]

    def _is_flipped(self, disk: str, held: torch.Tensor, shape: Callable | None) -> bool:
        """Whether the file swaps the last two dimensions of a tensor of experts relative to memory."""
        flips = self.experts_at is not None and self.experts_at.flipped and held.dim() == 3 and shape is not None
        return flips and tuple(shape(disk)) != tuple(held.shape)

    def _of_other_tower(self, disk: str) -> bool:
        """Whether a tensor belongs to another tower (for types that have some), not to the language model."""
        decoder_names = (self.layers_name, self.norm, *self.embeddings, self.head)
        return bool(self.text_type) and not self.canonical(disk).startswith(tuple(f"{name}." for name in decoder_names))

    def _is_beyond(self, canonical: str, known: Mapping[str, torch.Tensor]) -> bool:
        """Whether a tensor is one that files of the type may hold although the model does not use it."""
        layer = self._layer_pattern.match(canonical)
        if not self.beyond or re.match(self.beyond, canonical) or layer is None:
            return self.may_lack(canonical)
        return not any(name.startswith(f"{self.decoder_path}.{self.layers_name}.{layer[1]}.") for name in known)

    def _location_within(self, disk: str, known: Mapping[str, torch.Tensor], shape: Callable | None) -> Location | None:
        """The location of a tensor that is part of a tensor in memory: an expert's, or one of several stacked ones."""
        match = re.fullmatch(rf"({re.escape(self.layers_name)}\.\d+)\.(.*)", self.canonical(disk))
        if match is None:
            return None
        layer, name = f"{self.decoder_path}.{match[1]}", match[2]
        for memory, stack in self.stacked.items() if shape else ():
            if name in stack and f"{layer}.{memory}" in known:
                stem = disk.rpartition(".")[0].rpartition(".")[0]
                before = [f"{stem}.{'.'.join(other.split('.')[-2:])}" for other in stack[: stack.index(name)]]
                first = sum(shape(other)[0] for other in before)
                return Location(f"{layer}.{memory}", (slice(first, first + shape(disk)[0]),))
        spec = self.experts_at
        stem = re.escape(below(spec.block, "experts")) if spec else None
        expert = re.fullmatch(rf"{stem}\.(\d+)\.(\w+)\.weight", name) if spec else None
        projection = {on_disk: meaning for meaning, on_disk in spec.names.items()}.get(expert[2]) if expert else None
        if projection is None:
            return None
        stacked, number = f"{layer}.{below(spec.block, 'experts')}.{spec.in_memory(projection)}", int(expert[1])
        if stacked not in known or number >= len(known[stacked]):
            return None
        rows = spec.features(projection, known[stacked].shape[1] // 2)
        return Location(stacked, (number,) if rows is None else (number, rows))

    def _submodule(self, model: torch.nn.Module, path: str) -> torch.nn.Module:
        try:
            return model.get_submodule(path)
        except AttributeError:
            near = _near(path, {name for name, _ in model.named_modules()})
            raise InputError(f"{type(model).__name__} has no module {path}; nearest: {near}") from None


def is_buffer(disk_name: str) -> bool:
    """Whether a tensor on disk is a constant from an old checkpoint, not a parameter."""
    return BUFFERS.search(disk_name) is not None


def _near(wanted: str, names: Iterable[str]) -> str:
    return ", ".join(difflib.get_close_matches(wanted, list(names), n=3, cutoff=0.3)) or "none"


def _no_match(wanted: str, disk_names: Iterable[str], model_type: str) -> str:
    return (
        f"no tensor {wanted} on disk, although models of type {model_type} have one (nearest: "
        f"{_near(wanted, disk_names)}); check the folder, or the entry {model_type!r} of ARCHS in "
        "cpt_utils/architectures/arch_table.py"
    )
