"""The building blocks of an entry in the table of architectures, and the values that `Arch` returns.

A *slot* says where a projection is in memory, a *part* where it is on disk, a *location* where a tensor on disk is in
memory; *neurons* are a range of FFN neurons that can be read at one module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cpt_utils.base.lazy import torch

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ATTENTION + FFN
BESIDE = "beside"  # role of a parameter of the attention that belongs to no projection
ROUTER = "router"  # of a mixture of experts: a component of its own, neither attention nor FFN

# Reads a number or a yes/no for one layer from the configuration as completed by transformers (`Arch.settled`).
OfLayer = Callable[[Any, int], Any]


@dataclass(frozen=True)
class Slot:
    """A projection's module below its layer.

    `order` names the projections fused in that module, in order of their output features. They are stacked block by
    block or, with `by_group`, group by group: for q, k, v, each KV head in turn with its query heads, its key head and
    its value head; for k, v (the second step of a latent attention), each head's key rows, then its value rows; with
    `groups`, that many groups of equal shares. `when` says which layers have the slot (None: all). A `shared` slot
    belongs to all heads together: the narrow layers of a latent attention.
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
    """Slots for q, k, v, o (four modules) or for [gate,] up, down (two or three), all below `stem`."""
    names = ATTENTION if len(modules) == 4 else FFN[-len(modules) :]
    return {name: Slot(below(stem, module)) for name, module in zip(names, modules, strict=True)}


def below(stem: str, name: str) -> str:
    """The dotted name of `name` below `stem`, which may be empty."""
    return f"{stem}.{name}" if stem else name


def as_slots(slots: Slots) -> tuple[Slot, ...]:
    """The slots of a projection as a tuple, also if it is a single matrix."""
    return (slots,) if isinstance(slots, Slot) else slots


def experts_in_all_but(config, layer: int) -> bool:
    """True for every layer except those that a Qwen MoE's configuration makes dense."""
    step = getattr(config, "decoder_sparse_step", None) or 1
    return layer not in (getattr(config, "mlp_only_layers", None) or ()) and (layer + 1) % step == 0


@dataclass(frozen=True)
class Experts:
    """The FFN of a MoE layer: a router, E experts with their own projections, and perhaps a shared FFN beside them.

    In memory, all gates and ups are one parameter `<block>.experts.gate_up_proj` [E, 2 I, hidden], gate first, and all
    downs are `<block>.experts.down_proj` [E, hidden, I]; without a gate, the ups are `<block>.experts.up_proj`. On disk
    they are stored the same way, or as tensors `<block>.experts.<number>.<name>.weight`.

    Attributes:
        block: the module below a layer that holds experts and router; may be empty.
        names: an expert's matrices on disk if each expert has its own tensors; no gate_proj if experts have no gate.
        router: module of the router below the block.
        sparse: which layers have experts; the others are dense, with modules as in `Arch.projections_at`.
        transposed: both parameters are [E, in, out], in memory and on disk.
        flipped: files may swap the last two dimensions of both relative to memory; the tensors' shapes show it.
        interleaved: gate and up alternate feature by feature instead of filling one half each.
        activation: the nonlinearity below `<block>.experts`; empty if no module computes it and `function` is used.
        function: (the experts' module, gate's output) -> the activation, if no module computes it.
        width: I of a layer; None: the config's FIELDS["expert_ffn"].
        shared: projections of the shared FFN, which sees every token; its neurons follow those of the experts.
        shared_width: the number of neurons of the shared FFN; 0 for none.
        shared_activation: its nonlinearity below a layer.
        routed_by: how to assign rows of the nonlinearity's input to experts: "call", from the arguments of the experts'
            module (tokens, experts of each, weights), or "score", if every expert computes every token and the
            router's first output is 0 for experts that were not chosen (Llama 4).
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
        """The output features of that parameter that hold the projection, for experts of `width` neurons; None: all."""
        if self.in_memory(projection) == projection:
            return None
        first = 0 if projection == "gate_proj" else 1
        return slice(first, 2 * width, 2) if self.interleaved else slice(first * width, (first + 1) * width)


@dataclass(frozen=True)
class Location:
    """Where a tensor on disk is in memory: `index` (None: all) of the tensor `name` of the state dict.

    `flipped`: the last two dimensions are swapped.
    """

    name: str
    index: tuple[int | slice, ...] | None = None
    flipped: bool = False

    @property
    def whole(self) -> bool:
        """Whether this is the whole tensor, unflipped."""
        return self.index is None and not self.flipped

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of the part of a tensor in memory that corresponds to the tensor on disk, in the latter's shape."""
        part = tensor if self.index is None else tensor[self.index]
        return part.transpose(-1, -2) if self.flipped else part


@dataclass(frozen=True)
class WeightSlice:
    """A projection's matrix (or bias) on disk: entries `index` along `dim` (its output features) of `tensor`.

    For single heads (`Arch.head_parts`) it is the heads' piece of that matrix (for o, a piece of its inputs) or, with
    the role BESIDE, of a parameter that belongs to no projection.

    `index` is None (the whole tensor), a slice (perhaps with a step), or a LongTensor of positions. If the tensor holds
    all experts, [E, .., ..], the part is one expert's: `dim` and `index` refer to the matrix `tensor[expert]`. A
    projection thus has the same parts, one matrix per expert, however a file stores them.
    """

    tensor: str
    role: str  # "weight", "bias", BESIDE
    dim: int = 0
    index: slice | torch.Tensor | None = None
    expert: int | None = None

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part of the on-disk tensor `tensor`: a view if `index` is a slice, a copy if it lists positions."""
        return take(tensor if self.expert is None else tensor[self.expert], self.dim, self.index)


def take(tensor: torch.Tensor, dim: int, index: slice | torch.Tensor | None) -> torch.Tensor:
    """Entries `index` along `dim` of `tensor` (all of it for None)."""
    if index is None:
        return tensor
    if isinstance(index, slice):
        return tensor[(slice(None),) * dim + (index,)]
    return tensor.index_select(dim, index.to(tensor.device))


def pieces(positions: torch.Tensor, n: int, chosen: list[int], halves: int = 1) -> slice | torch.Tensor:
    """Cut sorted `positions` into `n` equal pieces and return those of the `chosen` (sorted) pieces.

    With `halves` = 2, each half is cut this way, and a piece has one stretch in each half.
    """
    kept = positions.view(halves, n, -1)[:, chosen].reshape(-1)
    first, stop = int(kept[0]), int(kept[-1]) + 1
    return slice(first, stop) if stop - first == len(kept) else kept


@dataclass(frozen=True)
class Neurons:
    """Neurons `first` to `stop` (exclusive) of a layer, read at one module: those of a dense FFN, or of all experts.

    Attributes:
        experts: the number of experts that share them out equally, in order; 0 if the neurons see every token.
        source: (module below the layer, first output feature, stop) of their pre-activations; None for experts.
        activation: path of the nonlinearity below the layer; empty if no module computes it.
    """

    first: int
    stop: int
    experts: int = 0
    source: tuple[str, int, int] | None = None
    activation: str = ""

    @property
    def width(self) -> int:
        """The number of neurons per expert, or of all of them without experts."""
        return (self.stop - self.first) // max(1, self.experts)
