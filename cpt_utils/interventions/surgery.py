"""How a checkpoint is assembled from two, base B and target C: the source of each tensor or region of a tensor.

    pair = Pair(refs.model("build/base"), refs.model("build/run/checkpoint-90"))
    recipe = layers_from_base(pair, [2, 3])
    on_disk.write_model(pair, recipe, "build/swapped")             # a complete model folder, verified
    with in_memory.apply(model_of_C, recipe, pair): ...            # the same values, nothing written

A `Recipe` is a list of `Edit`s on C. An edit takes B's values, or a function of both (interpolation, low-rank deltas).
B's values are converted to the dtype that C has on disk. Everything not edited is C's, bit for bit.
`values` computes the values of an edited tensor for both engines.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import opening, refs, settings, stacking, tensors, tokenization, tokenizer_id
from cpt_utils.interventions.condition import digest, function_facts

Function = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Edit:
    """One tensor of the result, or a region of it, that differs from C's.

    Attributes:
        tensor, base_tensor: its name on disk in C and in B.
        dim, index: the region, entries `index` along `dim`: None (everything), a slice, or a LongTensor of positions.
        expert: in a tensor that holds all experts, the expert whose matrix contains the region; else None.
        function: (B's region, C's region) -> the new values; None takes B's values.
        by_rows: whether the function may be applied to blocks of rows (elementwise functions), which bounds the memory.
    """

    tensor: str
    base_tensor: str
    dim: int = 0
    index: slice | torch.Tensor | None = None
    function: Function | None = None
    by_rows: bool = False
    expert: int | None = None

    @property
    def whole(self) -> bool:
        """Whether the region is the whole tensor."""
        return self.index is None and self.expert is None

    def describe(self) -> dict:
        """The edit as JSON: tensor, region as ranges of positions, function with its parameters."""
        facts: dict = {"tensor": self.tensor}
        if self.base_tensor != self.tensor:
            facts["base_tensor"] = self.base_tensor
        if self.expert is not None:
            facts["expert"] = self.expert
        if self.index is not None:
            facts |= {"dim": self.dim, "ranges": _ranges(self.index)}
        if self.function is not None:
            facts |= function_facts(self.function)
        return facts


@dataclass(frozen=True)
class Recipe:
    """A model to be assembled: `words` for people, `facts` for comparing requests, `edits` for the engines."""

    words: str
    facts: dict
    edits: tuple[Edit, ...]

    @property
    def edits_digest(self) -> str:
        return digest([edit.describe() for edit in self.edits])

    @property
    def key(self) -> dict:
        """The key of its `condition.Condition`: the facts, and a digest of every edit with its function."""
        return self.facts | {"edits": self.edits_digest}

    def by_tensor(self) -> dict[str, list[Edit]]:
        grouped: dict[str, list[Edit]] = {}
        for edit in self.edits:
            grouped.setdefault(edit.tensor, []).append(edit)
        return grouped


class Pair(tensors.Closing):
    """Base and target, both opened: the same architecture (either may have an additional vision tower) and number of
    layers.

    Raises:
        InputError: unknown architecture, different architectures or layer counts, missing or damaged weights.
    """

    def __init__(self, base: refs.ModelRef | str | os.PathLike, target: refs.ModelRef | str | os.PathLike):
        self.base_ref = base if isinstance(base, refs.ModelRef) else refs.model(base)
        self.target_ref = target if isinstance(target, refs.ModelRef) else refs.model(target)
        self.config = self.target_ref.config()
        base_config = self.base_ref.config()
        self.arch, self.base_arch = archs.for_config(self.config), archs.for_config(base_config)
        if archs.text_type(base_config) != archs.text_type(self.config):
            raise InputError(
                f"{self.base_ref.spec} is a {self.base_arch.model_type} and {self.target_ref.spec} a "
                f"{self.arch.model_type}; base and target must have the same architecture"
            )
        self.n_layers = self.arch.n_layers(self.config)
        if self.base_arch.n_layers(base_config) != self.n_layers:
            raise InputError(
                f"{self.base_ref.spec} has {self.base_arch.n_layers(base_config)} layers and {self.target_ref.spec} "
                f"{self.n_layers}; base and target must have the same number"
            )
        self.target = opening.open_folder(self.target_ref, self.base_ref)
        self.base = opening.open_folder(self.base_ref, lazy=True)  # a hub model fetches only the shards swapped
        like_target = (self.target, self.arch, self.config)
        self.base = stacking.like(self.base, self.base_arch, base_config, *like_target)
        self._layer_edits: dict[int, list[Edit]] = {}
        self._base_names = {archs.meaning(self.base_arch, name): name for name in self.base.names()}
        settings.say_head(self.target, self.config)
        settings.say_custom_code(self.target_ref.spec, self.config)
        differ = settings.diff_settings(self.base_ref, self.target_ref)
        if differ:
            each = [f"{key} is {b} in the base and {c} in the target" for key, (b, c) in differ.items()]
            cli.once(f"{'; '.join(each)}; swapped weights run with the target's", cli.warn)

    @property
    def models(self) -> dict[str, refs.ModelRef]:
        return {"base": self.base_ref, "target": self.target_ref}

    def close(self) -> None:
        self.base.close()
        self.target.close()

    def base_name(self, target_name: str) -> str:
        """The base's name of a tensor of the target; the head of a base that ties it is its embeddings."""
        meaning = archs.meaning(self.arch, target_name)
        base_name = self._base_names.get(meaning)
        if base_name is None and meaning == "lm_head.weight" and settings.tied(self.base_ref.config()):
            base_name = self._base_names.get(f"{self.arch.embeddings[0]}.weight")
        if base_name is None:
            raise InputError(f"{self.base_ref.spec} has no tensor {target_name}, which {self.target_ref.spec} has")
        return base_name

    def edit(
        self, tensor: str, dim: int = 0, index=None, function: Function | None = None, by_rows=False, expert=None
    ) -> Edit:
        """An edit of the target's `tensor` by the base's tensor of the same meaning; the shapes are checked."""
        edit = Edit(tensor, self.base_name(tensor), dim, index, function, by_rows, expert)
        shape, base_shape = self.target.shape(tensor), self.base.shape(edit.base_tensor)
        fits = shape == base_shape
        if not fits and isinstance(index, slice) and len(shape) == len(base_shape):  # e.g. the tokens that both embed
            sizes = enumerate(zip(shape, base_shape, strict=True))
            fits = all(a == b or (d == dim and index.stop <= min(a, b)) for d, (a, b) in sizes)
        if not fits:
            raise InputError(
                f"{tensor} has shape {list(base_shape)} in {self.base_ref.spec} and {list(shape)} in "
                f"{self.target_ref.spec}; swapped tensors must agree in shape"
            )
        return edit

    def layer_edits(self, layer: int) -> list[Edit]:
        """Edits that replace the whole layer by the base's; cached, because controls ask for hundreds of sets."""
        if layer not in self._layer_edits:
            names = self.arch.layer_tensors(self.target.names(), layer)
            meanings = {archs.meaning(self.arch, name) for name in names}
            for name in self.base_arch.layer_tensors(self.base.names(), layer):
                if archs.meaning(self.base_arch, name) not in meanings and not self.base_arch.may_lack(name):
                    raise InputError(f"{self.target_ref.spec} has no tensor {name}, which {self.base_ref.spec} has")
            shared = [n for n in names if archs.meaning(self.arch, n) in self._base_names or not self.arch.may_lack(n)]
            self._layer_edits[layer] = [self.edit(name) for name in shared]
        return self._layer_edits[layer]

    def diff_tensors(self, recipe: Recipe) -> dict[str, str]:
        """Tensors outside the recipe that differ in shape, or that only one model has: name -> reason."""
        edited, reasons = {edit.tensor for edit in recipe.edits}, {}
        target_names = {archs.meaning(self.arch, name): name for name in self.target.names()}
        for meaning, name in target_names.items():
            base_name = self._base_names.get(meaning)
            if name in edited or archs.is_buffer(name):
                continue
            if base_name is None:
                reasons[name] = "not in the base"
            elif self.base.shape(base_name) != self.target.shape(name):
                reasons[name] = (
                    f"{list(self.base.shape(base_name))} in the base, {list(self.target.shape(name))} in the target"
                )
        for meaning, name in self._base_names.items():
            if meaning not in target_names and not archs.is_buffer(name):
                reasons[name] = "not in the target"
        return reasons

    def share(self, recipe: Recipe) -> tuple[int, int]:
        """(number of parameters that the recipe replaces, number of parameters of the target on disk)."""
        total = sum(math.prod(self.target.shape(name)) for name in self.target.names() if not archs.is_buffer(name))
        moved = 0
        for edit in recipe.edits:
            shape = list(self.target.shape(edit.tensor))[0 if edit.expert is None else 1 :]
            if isinstance(edit.index, slice):
                shape[edit.dim] = len(range(*edit.index.indices(shape[edit.dim])))
            elif edit.index is not None:
                shape[edit.dim] = len(edit.index)
            moved += math.prod(shape)
        return moved, total


# --- recipes ---


def layers_from_base(pair: Pair, layers: Iterable[int]) -> Recipe:
    """Whole layers of B: projections, biases and norms.

    Raises:
        InputError: a layer that the models do not have, different shapes, or a tensor that only one of them has.
    """
    layers = checked_layers(layers, pair.n_layers)
    edits = [edit for layer in layers for edit in pair.layer_edits(layer)]
    return Recipe(f"layers {_listed(layers)} of the base", {"layers": layers}, tuple(edits))


def parts_from_base(pair: Pair, projections: Iterable[str], layers: Iterable[int]) -> Recipe:
    """The given projections of B, weights and biases, in `layers`; only their slices of fused tensors.

    They may include the router of a mixture of experts (archs.ROUTER). Projections that a layer lacks (no router, no
    attention, no FFN) are skipped there.
    """
    layers = checked_layers(layers, pair.n_layers)
    chosen = [name for name in (*pair.arch.projections(pair.config), archs.ROUTER) if name in set(projections)]
    names = set(pair.target.names())
    edits = [
        pair.edit(part.tensor, part.dim, part.index, expert=part.expert)
        for layer in layers
        for projection in _those_of(pair, layer, chosen)
        for part in pair.arch.parts(pair.config, layer, projection, names, pair.target.shape)
    ]
    words = f"{', '.join(chosen)} of the base in layers {_listed(layers)}"
    return Recipe(words, {"projections": chosen, "layers": layers}, tuple(edits))


def heads_from_base(
    pair: Pair, chosen: Mapping[int, Iterable[int]], by_query: bool = False, shared: bool = False, beside: bool = True
) -> Recipe:
    """The chosen units of B in each layer: their q, k and v rows with biases, and their o columns. A unit is a KV head
    with the query heads that share it.

    All units of a layer, with `shared` and without `beside`, give the same as `parts_from_base` for its attention.

    Args:
        chosen: layer -> units.
        by_query: `chosen` names query heads instead: their q and o are B's, k and v stay C's.
        shared: also the parts of the attention that belong to no single head.
        beside: also parts outside the four projections: the heads' segments of norms over all heads, sinks and output
            gates; with `shared`, the rest of the attention module.

    Raises:
        InputError: a layer without attention, a unit or head that it does not have, or different numbers of heads.
    """
    arch, names, edits, extra_modules = pair.arch, set(pair.target.names()), [], []
    base_config, kind = pair.base_ref.config(), "query head" if by_query else "unit"
    heads = {layer: sorted({*chosen[layer]}) for layer in checked_layers(chosen, pair.n_layers)}
    for layer, chosen_heads in heads.items():
        counts, base_counts = arch.head_counts(pair.config, layer), pair.base_arch.head_counts(base_config, layer)
        if counts != base_counts:
            raise InputError(
                f"layer {layer}: {base_counts[0]} query heads in {base_counts[1]} units in {pair.base_ref.spec}, "
                f"{counts[0]} in {counts[1]} in {pair.target_ref.spec}; swapping single heads needs equal numbers"
            )
        n = counts[0] if by_query else counts[1]
        wrong = [head for head in chosen_heads if not 0 <= head < n]
        if wrong:
            existing = f"{kind}s 0 to {n - 1}" if n else "no attention"
            raise InputError(f"{kind} {wrong[0]} of layer {layer} does not exist: the layer has {existing}")
        at = pair.config, layer
        parts = [
            part
            for name in archs.ATTENTION
            for part in arch.head_parts(*at, name, chosen_heads, names, pair.target.shape, by_query)
        ]
        parts += arch.shared_parts(*at, names, pair.target.shape) if shared else []
        parts = [part for part in parts if beside or part.role != archs.BESIDE]
        # Whole tensors must agree in shape: with a different shape, the same rows belong to other heads.
        edits += [replace(pair.edit(part.tensor), dim=part.dim, index=part.index) for part in parts]
        extra_modules += [arch.canonical(part.tensor).split(".", 2)[2] for part in parts if part.role == archs.BESIDE]
    words = "; ".join(
        f"{kind}{'s' * (len(chosen_heads) != 1)} {_listed(chosen_heads)} of the base in layer {layer}"
        for layer, chosen_heads in heads.items()
    )
    words += f", and their parts of {', '.join(dict.fromkeys(extra_modules))}" if extra_modules else ""
    facts = {"heads": {str(layer): chosen_heads for layer, chosen_heads in heads.items()}, "of": f"{kind}s"}
    return Recipe(words, facts | {"shared": shared, "beside": beside}, tuple(edits))


def _those_of(pair: Pair, layer: int, wanted: Iterable[str]) -> list[str]:
    """The wanted projections that a layer has."""
    present = {*pair.arch.projections(pair.config, layer), *[archs.ROUTER] * pair.arch.has_router(pair.config, layer)}
    return [name for name in wanted if name in present]


def tensors_from_base(pair: Pair, names: Iterable[str]) -> Recipe:
    """Whole tensors of B, by their names on disk in the target."""
    names = list(names)
    return Recipe(f"{', '.join(names)} of the base", {"tensors": names}, tuple(pair.edit(name) for name in names))


def checked_layers(layers: Iterable[int], n_layers: int) -> list[int]:
    ordered = sorted(set(layers))
    wrong = [layer for layer in ordered if not 0 <= layer < n_layers]
    if wrong:
        raise InputError(f"layer {wrong[0]} does not exist: the model has layers 0 to {n_layers - 1}")
    return ordered


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def outside_layers(pair: Pair) -> Recipe:
    """Embeddings, final norm and head of B: everything outside the layers.

    Raises:
        InputError: different shapes (another vocabulary), or a tensor that only one of them has.
    """
    outer = pair.arch.outer_tensors(pair.target.names())
    meanings = {archs.meaning(pair.arch, name) for name in outer}
    for name in pair.base_arch.outer_tensors(pair.base.names()):
        if archs.meaning(pair.base_arch, name) not in meanings:
            raise InputError(f"{pair.target_ref.spec} has no tensor {name}, which {pair.base_ref.spec} has")
    return Recipe("embeddings, final norm and head of the base", {"io": "base"}, tuple(map(pair.edit, outer)))


def identity(ref: refs.ModelRef) -> str:
    """Identifies the model by weights, configuration and tokenizer, not by its path, which has several spellings."""
    facts = ref.describe()
    if facts.get("weights_sample"):
        folder = Path(ref.spec)
        tokenizer = tokenizer_id.of(folder) if tokenization.has_tokenizer(folder) else None
        return "-".join(str(fact) for fact in (facts["weights_sample"], facts.get("config_sha256"), tokenizer))
    on_hub = f"{ref.repository}@{facts.get('revision') or ref.revision or 'main'}/{ref.subfolder}".rstrip("/")
    return f"{on_hub}+{identity(ref.adapted)}" if ref.is_adapter else on_hub


# --- small things ---


def _ranges(index: slice | torch.Tensor) -> list[list[int]]:
    """Positions as a list of [start, stop] ranges in order, or one [start, stop, step]."""
    if isinstance(index, slice):
        return [[index.start, index.stop]] if index.step in (None, 1) else [[index.start, index.stop, index.step]]
    ranges: list[list[int]] = []
    for position in index.tolist():
        if ranges and ranges[-1][1] == position:
            ranges[-1][1] += 1
        else:
            ranges.append([position, position + 1])
    return ranges
