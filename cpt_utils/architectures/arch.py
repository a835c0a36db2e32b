"""One architecture: the projections of its layers, on disk and in memory, and the sizes that its config states.

A *projection* is q, k, v, o, gate, up or down of one layer. On disk it is a tensor, or a slice of a fused one (Phi-3,
GPT-NeoX, GPT-2), several (latent attention), or one for each expert of a mixture of experts (MoE), perhaps all in one
tensor; `Arch.parts` says which. In memory it is a module; `Arch.module` returns it. Names on disk and in memory differ
(prefixes, `embed_out` against `lm_head`, experts that are one parameter in memory); `Arch.locations` maps one to the
other. Layers may differ: a layer without attention or without an FFN has none of its projections.
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

# Constants that old checkpoints carry (causal masks, rotary frequencies, sinusoidal positions): no parameters, never
# compared or swapped.
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attention|attn)\.(bias|masked_bias)|embed_positions\.weights)$")


@dataclass(frozen=True)
class Arch(Layers):
    """One model type: where everything of its layers is, on disk and in memory. The fields are those of `Layers`."""

    # --- on disk ---

    def parts(
        self,
        config,
        layer: int,
        projection: str,
        disk_names: Collection[str],
        shape: Callable[[str], tuple[int, ...]] | None = None,
    ) -> list[WeightSlice]:
        """The weights and, where there are some, the biases of `projection` in `layer`, among the tensors `disk_names`.

        Of a MoE layer's gate, up or down one weight for each expert, in order, then that of the FFN beside them;
        of a latent attention one for each step. `projection` may be ROUTER, too.

        Args:
            shape: the shape of a tensor on disk, for types whose files hold experts in one of two ways; without it
                they are taken to lie as in memory.

        Raises:
            InputError: the type or the layer has no such projection, or no tensor of that name is on disk (near misses
                are named).
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
        """What of an attention's projection belongs to the `chosen` units of `layer` and to no other: rows of q, k, v
        and of their biases, columns of o; and with the role BESIDE what else goes with these heads: segments of a norm
        over all heads, sinks, rows of an output gate. Nothing of a projection that the layer lacks.

        Args:
            chosen: units, as `head_counts` has them.
            shape: the shape of a tensor on disk.
            by_query: they are query heads instead, of which single ones have nothing of k and v.

        Raises:
            InputError: a tensor does not divide into the heads that config.json states, or is not there.
        """
        chosen, (heads, units) = sorted({*chosen}), self.head_counts(config, layer)
        of_queries = projection in ("q_proj", "o_proj")
        if not units or not chosen or (by_query and not of_queries):
            return []
        n, found, whole = heads if by_query else units, [], []
        size = heads // n if of_queries else 1  # heads of the chosen ones each
        for slot in self.slots(config, layer, projection):
            whole += [] if slot.shared else self._slot_parts(config, layer, projection, slot, disk_names)
        if projection == "o_proj":
            whole = [replace(part, dim=1 - part.dim) for part in whole if part.role == "weight"]
        for name in self.with_heads.get(projection, ()):
            each = [h for one in chosen for h in range(one * size, (one + 1) * size)] if "{}" in name else [0]
            tensors = [self._find(f"{self.layers_name}.{layer}.{name.format(h)}", disk_names) for h in each]
            (found if "{}" in name else whole).extend(WeightSlice(tensor, BESIDE) for tensor in tensors if tensor)
        for part in whole:
            halves = 2 if self.differential and projection != "o_proj" else 1
            every = torch.arange(shape(part.tensor)[part.dim])[slice(None) if part.index is None else part.index]
            if len(every) % (n * halves):
                raise InputError(
                    f"{part.tensor} has shape {list(shape(part.tensor))}, which does not divide into the {n * halves} "
                    "heads that config.json states"
                )
            found.append(replace(part, index=pieces(every, n, chosen, halves)))
        return found

    def shared_parts(
        self, config, layer: int, disk_names: Collection[str], shape: Callable[[str], tuple[int, ...]]
    ) -> list[WeightSlice]:
        """What of a layer's attention belongs to no single head: the output bias and the narrow layers of a latent
        attention; and with the role BESIDE norms that are the same for every head, and whatever else is below its
        module. With `head_parts` of all units that is each entry of the attention, once."""
        units = range(self.head_counts(config, layer)[1])
        if not units:
            return []
        found, taken = [], set()
        for projection in ATTENTION:
            for slot in self.slots(config, layer, projection):
                parts = self._slot_parts(config, layer, projection, slot, disk_names)
                found += [part for part in parts if slot.shared or (projection == "o_proj" and part.role == "bias")]
            taken |= {part.tensor for part in self.head_parts(config, layer, projection, units, disk_names, shape)}
        taken |= {part.tensor for part in found}
        module = self.slots(config, layer, "o_proj")[0].module.rpartition(".")[0]
        start, unused = f"{self.layers_name}.{layer}.{module}.", not self.has(config, layer, ["k_proj"])
        for name in sorted({*disk_names} - taken):
            if self.canonical(name).startswith(start) and not is_buffer(name) and not (unused and self.may_lack(name)):
                found.append(WeightSlice(name, BESIDE))
        return found

    def layer_tensors(self, disk_names: Iterable[str], layer: int) -> list[str]:
        """Every parameter of `layer` on disk: projections, biases, norms.

        Raises:
            InputError: there is none; names the layers and the nearest names that are there.
        """
        disk_names = list(disk_names)
        found = [name for name in disk_names if self.layer_of(name) == layer and not is_buffer(name)]
        if not found:
            raise InputError(_no_match(f"{self.prefixes[0]}{self.layers_name}.{layer}.", disk_names, self.model_type))
        return found

    def layer_of(self, disk_name: str) -> int | None:
        """The layer a tensor on disk belongs to; None for embeddings, final norm and head."""
        match = self._layer_pattern.match(self.canonical(disk_name))
        return int(match[1]) if match else None

    def may_lack(self, disk_name: str) -> bool:
        """Whether a tensor is one that a model of the type does not use, though some files hold it."""
        return bool(self.beyond) and re.match(self.beyond, self.canonical(disk_name)) is not None

    def canonical(self, disk_name: str) -> str:
        """The name without what varies between files of one model: base and target are matched by it."""
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
        """The name on disk of a canonical one.

        Raises:
            InputError: there is none; near misses are named.
        """
        name = self._find(canonical, disk_names)
        if name is None:
            raise InputError(_no_match(f"{self.prefixes[0]}{canonical}", disk_names, self.model_type))
        return name

    def embedding_tensors(self, disk_names: Collection[str]) -> list[str]:
        """Input embeddings with what belongs to them (learned positions, their norm) and, where it is on disk (not
        tied), the output matrix; biases too."""
        found = [self.disk_name(f"{name}.weight", disk_names) for name in self.embeddings]
        others = [f"{name}.bias" for name in self.embeddings] + [f"{self.head}.weight", f"{self.head}.bias"]
        return found + [name for name in (self._find(other, disk_names) for other in others) if name]

    def outer_tensors(self, disk_names: Iterable[str]) -> list[str]:
        """Every parameter of the language model that is in no layer: embeddings, final norm, head."""
        inner = (name for name in disk_names if self.layer_of(name) is None and not self._of_other_tower(name))
        return [name for name in inner if not is_buffer(name) and not self.may_lack(name)]

    # --- in memory ---

    def decoder(self, model: torch.nn.Module) -> torch.nn.Module:
        """The module that holds embeddings, layers and final norm; running it alone leaves the head out."""
        return self._submodule(model, self.decoder_path)

    def layers(self, model: torch.nn.Module) -> torch.nn.ModuleList:
        return self._submodule(model, f"{self.decoder_path}.{self.layers_name}")

    def last(self, model: torch.nn.Module) -> torch.nn.Module:
        """The module whose output is the last hidden state: the final norm, or the last layer where there is none."""
        return self._submodule(model, f"{self.decoder_path}.{self.norm}") if self.norm else self.layers(model)[-1]

    def layer_path(self, layer: int) -> str:
        """Dotted name of a layer from the causal LM."""
        return f"{self.decoder_path}.{self.layers_name}.{layer}"

    def module_path(self, layer: int, projection: str) -> str:
        """Dotted name of the module that computes `projection` (perhaps with others) from the causal LM."""
        return f"{self.layer_path(layer)}.{as_slots(self.projections_at[projection])[0].module}"

    def module(self, model: torch.nn.Module, layer: int, projection: str) -> torch.nn.Module:
        return self._submodule(model, self.module_path(layer, projection))

    def in_layer(self, model: torch.nn.Module, layer: int, path: str) -> torch.nn.Module:
        """The module at a path below a layer."""
        return self._submodule(model, f"{self.layer_path(layer)}.{path}")

    def down_module(self, model: torch.nn.Module, layer: int) -> torch.nn.Module:
        """The last module of a dense FFN, or of the FFN beside a layer's experts."""
        slots = self.slots(model.config, layer, "down_proj", beside_experts=self.has_router(model.config, layer))
        return self.in_layer(model, layer, slots[0].module)

    def experts_module(self, model: torch.nn.Module, layer: int) -> torch.nn.Module:
        """The module of a MoE layer's experts; called with (tokens [n, hidden], experts [n, top k], weights)."""
        return self.in_layer(model, layer, below(self.experts_at.block, "experts"))

    def locations(
        self, disk_names: Iterable[str], model: torch.nn.Module, shape: Callable[[str], tuple[int, ...]] | None = None
    ) -> dict[str, Location]:
        """Tensor on disk -> where it is in `model.state_dict()`. Buffers that only files have are left out, and what
        they hold beside the model (`beyond`).

        Args:
            shape: the shape of a tensor on disk, which says where those that are stacked in memory go: files of one
                model may cut them differently.

        Raises:
            InputError: a tensor has no counterpart in the model; near misses are named.
        """
        known = model.state_dict()
        found = {}
        for disk in disk_names:
            canonical = self.canonical(disk)
            names = (disk, f"{self.decoder_path}.{canonical}", canonical)
            name = next((name for name in names if name in known), None)
            if name is None:
                location = self._location_within(disk, known, shape)
            else:
                location = Location(name, flipped=self._is_flipped(disk, known[name], shape))
            if location is not None:
                found[disk] = location
            elif not is_buffer(disk) and not self._is_beyond(canonical, known) and not self._of_other_tower(disk):
                near = _near(f"{self.decoder_path}.{canonical}", known)
                raise InputError(
                    f"tensor {disk} has no counterpart in the loaded {type(model).__name__}; nearest: {near}"
                )
        return found

    # --- inside ---

    @cached_property
    def _prefixes(self) -> list[str]:
        """What may stand in front of the decoder's names, the longest first: one may begin another."""
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
        found = [WeightSlice(weight, "weight", int(self.transposed), index)]
        return found + ([WeightSlice(bias, "bias", 0, index)] if bias else [])

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
        at, numbers = self.experts_at, range(self.experts(config, layer))
        block = below(f"{self.layers_name}.{layer}", at.block) if at.block else f"{self.layers_name}.{layer}"
        if projection == ROUTER:
            parts = [WeightSlice(self.disk_name(f"{block}.{at.router}.weight", disk_names), "weight")]
            bias = self._find(f"{block}.{at.router}.bias", disk_names)
            return parts + ([WeightSlice(bias, "bias")] if bias else [])
        width, together = self.expert_width(config, layer), f"{block}.experts.{at.in_memory(projection)}"
        index, name = at.features(projection, width), self._find(together, disk_names)
        if name:
            inputs = width if projection == "down_proj" else self._number(config, "hidden")
            dim = int(at.transposed != (at.flipped and shape is not None and shape(name)[-1] != inputs))
            parts = [WeightSlice(name, "weight", dim, index, number) for number in numbers]
            bias = self._find(f"{together}_bias", disk_names)
            return parts + ([WeightSlice(bias, "bias", 0, index, number) for number in numbers] if bias else [])
        name = f"{block}.experts.{{}}.{at.names[projection]}.weight"
        return [WeightSlice(self.disk_name(name.format(number), disk_names), "weight") for number in numbers]

    def _is_flipped(self, disk: str, held: torch.Tensor, shape: Callable | None) -> bool:
        """Whether a file holds a tensor of experts the other way round than memory."""
        flips = self.experts_at is not None and self.experts_at.flipped and held.dim() == 3 and shape is not None
        return flips and tuple(shape(disk)) != tuple(held.shape)

    def _of_other_tower(self, disk: str) -> bool:
        """Whether a tensor is not the language model's, of a type with other towers."""
        decoder_names = (self.layers_name, self.norm, *self.embeddings, self.head)
        return bool(self.text_type) and not self.canonical(disk).startswith(tuple(f"{name}." for name in decoder_names))

    def _is_beyond(self, canonical: str, known: Mapping[str, torch.Tensor]) -> bool:
        """Whether a tensor is one that files of the type hold beside what the model has."""
        layer = self._layer_pattern.match(canonical)
        if not self.beyond or re.match(self.beyond, canonical) or layer is None:
            return self.may_lack(canonical)
        return not any(name.startswith(f"{self.decoder_path}.{self.layers_name}.{layer[1]}.") for name in known)

    def _location_within(self, disk: str, known: Mapping[str, torch.Tensor], shape: Callable | None) -> Location | None:
        """Where a tensor is that is a part of one in memory: an expert's, or one of several that are stacked."""
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
        at = self.experts_at
        stem = re.escape(below(at.block, "experts")) if at else None
        expert = re.fullmatch(rf"{stem}\.(\d+)\.(\w+)\.weight", name) if at else None
        projection = {on_disk: meaning for meaning, on_disk in at.names.items()}.get(expert[2]) if expert else None
        if projection is None:
            return None
        together, number = f"{layer}.{below(at.block, 'experts')}.{at.in_memory(projection)}", int(expert[1])
        if together not in known or number >= len(known[together]):
            return None
        rows = at.features(projection, known[together].shape[1] // 2)
        return Location(together, (number,) if rows is None else (number, rows))

    def _submodule(self, model: torch.nn.Module, path: str) -> torch.nn.Module:
        try:
            return model.get_submodule(path)
        except AttributeError:
            near = _near(path, {name for name, _ in model.named_modules()})
            raise InputError(f"{type(model).__name__} has no module {path}; nearest: {near}") from None


def is_buffer(disk_name: str) -> bool:
    """Whether a tensor on disk is a constant of an old checkpoint and not a parameter."""
    return BUFFERS.search(disk_name) is not None


def _near(wanted: str, names: Iterable[str]) -> str:
    return ", ".join(difflib.get_close_matches(wanted, list(names), n=3, cutoff=0.3)) or "none"


def _no_match(wanted: str, disk_names: Iterable[str], model_type: str) -> str:
    return (
        f"no tensor {wanted} on disk, where a model of type {model_type} has one (nearest: "
        f"{_near(wanted, disk_names)}); check the folder, or the entry {model_type!r} of ARCHS in "
        "cpt_utils/architectures/arch_table.py"
    )
