"""Which rows and columns of which tensors are compared: the projections of base and checkpoints, matrix by matrix.

A tensor may hold several projections (fused q, k and v; gate and up), and a projection may lie in several tensors (the
experts of a mixture, the steps of a latent attention). Everything is checked here, before the first weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from cpt_utils.architectures import archs
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import opening, refs, settings, stacking, tensors

# Entries summed in float32 before float64 takes over: norms of much longer rows are off by more than 1e-6.
STRETCH = 1024


class Side(tensors.Closing):
    """One model: its configuration, its architecture and its open files. `base`: see `opening.open_folder`."""

    def __init__(self, ref: refs.ModelRef, base: refs.ModelRef | None = None):
        self.ref, self.spec = ref, ref.spec
        self.config = ref.config()
        self.arch = archs.for_config(self.config)
        self.n_layers = self.arch.n_layers(self.config)
        self.stored = opening.open_folder(ref, base, lazy=True)
        self.names = set(self.stored.names())

    def close(self) -> None:
        self.stored.close()

    @property
    def is_stacked(self) -> bool:
        """Whether a tensor holds all experts of a layer."""
        sparse = next((layer for layer in range(self.n_layers) if self.arch.experts(self.config, layer)), None)
        return sparse is not None and self.weights(sparse, "down_proj")[0].expert is not None

    def lay_like(self, other: Side) -> None:
        """Let the experts be read as if they were laid out as on another side."""
        whose = (other.stored, other.arch, other.config)
        self.stored = stacking.like(self.stored, self.arch, self.config, *whose)
        self.names = set(self.stored.names())

    def projections(self, layer: int, wanted: Collection[str] | None) -> list[str]:
        """The projections that a layer has, and its router; of these only the `wanted` ones."""
        names = [*self.arch.projections(self.config, layer)]
        names += [archs.ROUTER] * self.arch.has_router(self.config, layer)
        return [name for name in names if wanted is None or name in wanted]

    def weights(self, layer: int, projection: str) -> list[archs.WeightSlice]:
        """Where the weight of `projection` in `layer` is on disk: one part, or one for each expert or step."""
        parts = self.arch.parts(self.config, layer, projection, self.names, self.stored.shape)
        return [part for part in parts if part.role == "weight"]

    def heads(self, layer: int, projection: str) -> int:
        """The heads of a projection of attention; 0 of others."""
        q_heads, kv_heads, _ = self.arch.heads(self.config, layer)
        return dict(zip(archs.ATTENTION, (q_heads, kv_heads, kv_heads, q_heads), strict=True)).get(projection, 0)


@contextmanager
def opened(base: refs.ModelRef, checkpoints: list[refs.ModelRef]) -> Iterator[list[Side]]:
    """Base and checkpoints side by side, experts laid out alike: where one has each in a tensor of its
    own, all have.

    Raises:
        InputError: they differ in architecture or in the number of layers or experts.
    """
    with ExitStack() as stack:
        one = stack.enter_context(Side(base))
        sides = [one, *(stack.enter_context(Side(ref, base)) for ref in checkpoints)]
        for other in sides[1:]:
            _check_same_matrix(one, other)
        for side in sides:  # its code might use the weights in another way than their names say
            settings.say_custom_code(side.spec, side.config)
        apart = next((side for side in sides if not side.is_stacked), None)
        for side in sides if apart else ():
            side.lay_like(apart)
        yield sides


def _check_same_matrix(one: Side, other: Side) -> None:
    if archs.text_type(one.config) != archs.text_type(other.config):
        raise InputError(
            f"{one.spec} is a {one.arch.model_type} and {other.spec} a {other.arch.model_type}; "
            "base and checkpoints must have one architecture"
        )
    same = "base and checkpoints must have the same number"
    if one.n_layers != other.n_layers:
        raise InputError(f"{one.spec} has {one.n_layers} layers and {other.spec} {other.n_layers}; {same}")
    for layer in range(one.n_layers):
        ours, theirs = (side.arch.experts(side.config, layer) for side in (one, other))
        if ours != theirs:
            raise InputError(f"layer {layer} has {ours} experts in {one.spec} and {theirs} in {other.spec}; {same}")


@dataclass
class MatrixSlice:
    """A projection's weight, or one expert's share of it, within a matrix.

    Attributes:
        dim: whether output features are the rows (0) or the columns (1) of the matrix.
        rows, columns: those that belong to it, in the order of the projection's features and inputs.
        features: whether sums by output feature are asked for.
        heads: how many heads sums are asked for, 0 for none.
        neurons: whether sums by neuron are asked for.
    """

    projection: str
    dim: int
    rows: slice | torch.Tensor
    columns: slice
    features: bool = False
    heads: int = 0
    neurons: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns)."""
        rows = self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)
        return rows, self.columns.stop - self.columns.start

    @property
    def axis(self) -> int:
        """The dimension of the matrix along which its heads or neurons are: inputs of o and down, else features."""
        return int(self.projection in ("o_proj", "down_proj")) ^ self.dim

    @property
    def by_column(self) -> bool:
        """Whether the sums asked for need those of every column; those of every row are there anyway."""
        return (self.features and self.dim == 1) or (bool(self.heads or self.neurons) and self.axis == 1)


@dataclass
class Matrix:
    """A tensor of one layer on disk, as rows and columns, and what it holds.

    Of one that holds all experts, [E, .., ..], a matrix is one expert's, and its rows are counted over all of them.
    Columns that alternate between two projections are read sorted: those of the first, then those of the second.

    Attributes:
        names: of the tensor in the base and in each checkpoint.
        every: 2 where two projections' columns alternate, else 1.
    """

    layer: int
    names: list[str]
    shape: tuple[int, int]
    slices: list[MatrixSlice] = field(default_factory=list)
    every: int = 1

    @cached_property
    def stretch(self) -> int:
        """Columns that are summed together in float32: as many as keep the slices apart, and at most STRETCH of them.

        A matrix whose width has no divisor worth using (a prime, say) keeps its rows whole.
        """
        apart = math.gcd(self.shape[1], *(end for s in self.slices for end in (s.columns.start, s.columns.stop)))
        found = next(n for n in range(min(apart, STRETCH), 0, -1) if apart % n == 0)
        return found if found >= STRETCH // 16 else apart

    @property
    def by_column(self) -> bool:
        """Whether sums of every column are needed: then its slices have all the rows, since tensors fused by rows hold
        only projections whose heads and neurons are rows."""
        return any(each.by_column for each in self.slices)

    @cached_property
    def span(self) -> tuple[int, int]:
        """The rows that have to be read."""
        ends = [
            (s.rows.start, s.rows.stop) if isinstance(s.rows, slice) else (int(s.rows.min()), int(s.rows.max()) + 1)
            for s in self.slices
        ]
        return min(start for start, _ in ends), max(stop for _, stop in ends)


def plan(
    sides: list[Side], projections: Collection[str] | None, features: Collection[str], details: bool
) -> list[Matrix]:
    """The matrices to be read, layer by layer; a fused one comes once, with all its slices.

    Raises:
        InputError: the models differ in the shape of a tensor, or in how it is cut.
    """
    one = sides[0]
    found: dict[tuple[int, str, int | None], Matrix] = {}
    for layer in range(one.n_layers):
        for name in one.projections(layer, projections):
            several = list(zip(*(side.weights(layer, name) for side in sides), strict=True))
            heads = one.heads(layer, name) if details and len(several) == 1 else 0
            for parts in several:
                part, shape = parts[0], one.stored.shape(parts[0].tensor)
                for side, other in zip(sides, parts, strict=True):
                    _refuse_shapes(one, part, side, other)
                flat = (math.prod(shape[:-1]), shape[-1])
                key = layer, part.tensor, part.expert
                matrix = found.setdefault(key, Matrix(layer, [each.tensor for each in parts], flat))
                region = _region(part, shape, matrix)
                piece = MatrixSlice(name, part.dim, *region, name in features, heads, details and name in archs.FFN)
                if heads and piece.size[piece.axis] % heads:
                    raise InputError(
                        f"{part.tensor} of {one.spec} has shape {list(shape)}, which does not divide into the {heads} "
                        "heads that config.json states"
                    )
                matrix.slices.append(piece)
    return list(found.values())


def _region(part: archs.WeightSlice, shape: tuple[int, ...], matrix: Matrix) -> list[slice | torch.Tensor]:
    """The rows and columns of a part within its tensor as a matrix."""
    first = 0 if part.expert is None else part.expert * shape[-2]
    region = [slice(first, first + shape[-2]), slice(0, shape[-1])]
    index = part.index
    if isinstance(index, slice) and index.step not in (None, 1):  # columns that alternate; they are read sorted
        matrix.every = index.step
        half = shape[-1] // index.step
        index = slice(index.start * half, (index.start + 1) * half)
    if index is not None and part.dim == 0:
        region[0] = slice(first + index.start, first + index.stop) if isinstance(index, slice) else first + index
    elif index is not None:
        region[1] = index
    return region


def _refuse_shapes(one: Side, ours: archs.WeightSlice, other: Side, theirs: archs.WeightSlice) -> None:
    shapes = one.stored.shape(ours.tensor), other.stored.shape(theirs.tensor)
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{ours.tensor} has shape {list(shapes[0])} in {one.spec} and {list(shapes[1])} in {other.spec}; "
            "what is compared must agree in shape"
        )
    index, shape = theirs.index, shapes[1]
    needed = 0 if index is None else index.stop if isinstance(index, slice) else int(index.max()) + 1
    experts = 0 if theirs.expert is None else theirs.expert + 1
    matrix = shape if theirs.expert is None else shape[1:]
    if len(matrix) != 2 or not math.prod(shape) or needed > matrix[theirs.dim] or experts > shape[0]:
        raise InputError(
            f"{theirs.tensor} of {other.spec} has shape {list(shape)}, which does not fit the sizes in config.json"
        )
    if not _same_index(ours.index, index):  # one fused tensor, cut differently
        raise InputError(f"{one.spec} and {other.spec} differ in attention heads; they cannot be compared")


def _same_index(a: slice | torch.Tensor | None, b: slice | torch.Tensor | None) -> bool:
    if a is None or b is None or isinstance(a, slice) or isinstance(b, slice):
        return type(a) is type(b) and a == b
    return a.equal(b)
