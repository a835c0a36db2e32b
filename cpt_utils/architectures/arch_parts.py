"""What an entry of the table of architectures is made of, and what `Arch` says of a model with it.

A *slot* is where a projection is in memory, a *part* where it is on disk, a *location* where a tensor on disk is in
memory, and *neurons* are those of an FFN that can be read in one module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cpt_utils.base.lazy import torch

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ATTENTION + FFN
BESIDE = "beside"  # what an attention has that is of none of its projections
ROUTER = "router"  # of a mixture of experts: a component of its own, neither attention nor FFN

# Reads a number, or a yes or no, of one layer off a configuration as transformers completes it (`Arch.settled`).
OfLayer = Callable[[Any, int], Any]


@dataclass(frozen=True)
class Slot:
    """A projection's module below its layer.

    `order` names the projections fused in that module, in order of their output features. They are stacked block by
    block, or, with `by_group`, group by group: of q, k, v for one KV head after the other its query heads, its key head
    and its value head; of k, v (the second step of a latent attention) for every head its key rows, then its value
    rows; with `groups` so many groups of equal shares. `when` says which layers have the slot; None: all. All
    heads have a `shared` slot in common: the narrow layers of a latent attention.
    """

    module: str
    order: tuple[str, ...] = ()
    by_group: bool = False
    groups: int | None = None
    when: OfLayer | None = None
    shared: bool = False


Slots = Slot | tuple[Slot, ...]


def fused(module: str, *order: str, by_group: bool = False, groups: int | None = None) -> dict[str, Slot]:
    """One slot for each of `order`, all in the same module."""
    return {name: Slot(module, order, by_group or groups is not None, groups) for name in order}


def named(stem: str, *modules: str) -> dict[str, Slot]:
    """Slots for the last projections of PROJECTIONS' halves: q, k, v, o below an attention, or [gate,] up, down."""
    names = ATTENTION if len(modules) == 4 else FFN[-len(modules) :]
    return {name: Slot(below(stem, module)) for name, module in zip(names, modules, strict=True)}


def below(stem: str, name: str) -> str:
    """The dotted name of `name` below `stem`, which may be empty."""
    return f"{stem}.{name}" if stem else name


def as_slots(slots: Slots) -> tuple[Slot, ...]:
    """The slots of a projection that is one matrix or several."""
    return (slots,) if isinstance(slots, Slot) else slots


def experts_in_all_but(config, layer: int) -> bool:
    """Experts in every layer but those that a Qwen MoE's configuration takes out."""
    step = getattr(config, "decoder_sparse_step", None) or 1
    return layer not in (getattr(config, "mlp_only_layers", None) or ()) and (layer + 1) % step == 0


@dataclass(frozen=True)
class Experts:
    """The FFN of a MoE layer: a router, E experts with projections of their own, and perhaps an FFN beside them.

    In memory all gates and ups are one parameter `<block>.experts.gate_up_proj` [E, 2 I, hidden], gate first, and all
    downs `<block>.experts.down_proj` [E, hidden, I]; without a gate the ups are `<block>.experts.up_proj`. On disk they
    are the same, or tensors `<block>.experts.<number>.<name>.weight`.

    Attributes:
        block: what holds experts and router, below a layer; may be empty.
        names: an expert's matrices on disk, where every expert has its own; no gate_proj where experts have no gate.
        router: module of the router below the block.
        sparse: which layers have experts; the others are dense, and `Arch.projections_at` says where.
        transposed: both parameters are [E, in, out], in memory and on disk.
        flipped: files may hold the last two dimensions of both the other way round than memory; their shape says so.
        interleaved: gate and up alternate, feature by feature, instead of one half each.
        activation: the nonlinearity below `<block>.experts`; empty where it is no module and `function` is used.
        function: (the experts' module, gate's output) -> the activation, where no module computes it.
        width: I of a layer; None: what FIELDS["expert_ffn"] finds.
        shared: projections of the FFN beside the experts, which sees every token: its neurons come behind theirs.
        shared_width: the neurons of that FFN; 0 for none.
        shared_activation: its nonlinearity below a layer.
        routed_by: what tells which expert a row of the nonlinearity's input is of: "call", the arguments of the
            experts' module (tokens, experts of each, weights), or "score", where every expert computes every token and
            the router's first output is 0 for experts that were not chosen (Llama 4).
    """

    block: str = "mlp"
    names: dict[str, str] = field(default_factory=lambda: dict(zip(FFN, FFN, strict=True)))
    router: str = "gate"
    sparse: OfLayer = experts_in_all_but
    transposed: bool = False
    flipped: bool = False
    interleaved: bool = False
    activation: str = "act_fn"
    function: Callable | None = None
    width: OfLayer | None = None
    shared: dict[str, Slots] = field(default_factory=dict)
    shared_width: OfLayer | None = None
    shared_activation: str = ""
    routed_by: str = "call"

    def in_memory(self, projection: str) -> str:
        """The parameter below `experts` that holds `projection` of all experts."""
        return "gate_up_proj" if projection != "down_proj" and "gate_proj" in self.names else projection

    def features(self, projection: str, width: int) -> slice | None:
        """Which output features of that parameter are the projection's, for experts of `width` neurons; None: all."""
        if self.in_memory(projection) == projection:
            return None
        first = 0 if projection == "gate_proj" else 1
        return slice(first, 2 * width, 2) if self.interleaved else slice(first * width, (first + 1) * width)


@dataclass(frozen=True)
class Location:
    """Where a tensor on disk is in memory: `index` (None: all) of the tensor `name` of the state dict.

    `flipped`: with the last two dimensions the other way round.
    """

    name: str
    index: tuple[int | slice, ...] | None = None
    flipped: bool = False

    @property
    def whole(self) -> bool:
        """Whether it is the whole tensor, as it is."""
        return self.index is None and not self.flipped

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """What of the tensor in memory is the tensor on disk, in its shape."""
        part = tensor if self.index is None else tensor[self.index]
        return part.transpose(-1, -2) if self.flipped else part


@dataclass(frozen=True)
class WeightSlice:
    """A matrix of a projection (or a bias) on disk: entries `index` along `dim` (its output features) of `tensor`.

    Of single heads (`Arch.head_parts`) it is their piece of that; of o, a piece of its inputs; with the role BESIDE,
    of a parameter that is of no projection.

    `index` is None (the whole tensor), a slice (perhaps with a step), or a LongTensor of positions. Of a tensor that
    holds all experts, [E, .., ..], the part is one expert's: `dim` and `index` are those of the matrix
    `tensor[expert]`. So the parts of a projection are the same matrices, one for each expert, whichever way a file
    holds them.
    """

    tensor: str
    role: str  # "weight", "bias", BESIDE
    dim: int = 0
    index: slice | torch.Tensor | None = None
    expert: int | None = None

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of the on-disk tensor `tensor`: a view where it is a slice, a copy where it is scattered."""
        return take(tensor if self.expert is None else tensor[self.expert], self.dim, self.index)


def take(tensor: torch.Tensor, dim: int, index: slice | torch.Tensor | None) -> torch.Tensor:
    """Entries `index` along `dim` of `tensor` (all of it for None)."""
    if index is None:
        return tensor
    if isinstance(index, slice):
        return tensor[(slice(None),) * dim + (index,)]
    return tensor.index_select(dim, index.to(tensor.device))


def pieces(positions: torch.Tensor, n: int, chosen: list[int], halves: int = 1) -> slice | torch.Tensor:
    """Of positions that are cut into `n` pieces of equal size those of the chosen pieces; all are sorted.

    With `halves` 2 each half is cut so, and a piece has one stretch of either.
    """
    found = positions.view(halves, n, -1)[:, chosen].reshape(-1)
    first, stop = int(found[0]), int(found[-1]) + 1
    return slice(first, stop) if stop - first == len(found) else found


@dataclass(frozen=True)
class Neurons:
    """Neurons `first` to `stop` of a layer, which are read in one module: a dense FFN's, or all experts'.

    Attributes:
        experts: how many experts they belong to, in turn, each as many; 0 where they see every token.
        source: (module below the layer, its output features from, to) that are their pre-activations; None of experts.
        activation: path of the nonlinearity below the layer; empty where no module computes it.
    """

    first: int
    stop: int
    experts: int = 0
    source: tuple[str, int, int] | None = None
    activation: str = ""

    @property
    def width(self) -> int:
        """The neurons of each expert, or all of them."""
        return (self.stop - self.first) // max(1, self.experts)
