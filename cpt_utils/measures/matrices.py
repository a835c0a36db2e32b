"""Which rows and columns of which tensors are compared: the projections of base and checkpoints, matrix by matrix.

A tensor may hold several projections (fused q, k and v; gate and up), and a projection may consist of several tensors
(the experts of a mixture, the steps of a latent attention). Everything is checked here, before any weight is read.
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

# Entries summed in float32 before adding up in float64: norms of much longer rows are off by more than 1e-6.
STRETCH = 1024


class Side(tensors.Closing):
    """One model: its configuration, its architecture and its open files. For `base` see `opening.open_folder`."""

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
        moe_layer = next((layer for layer in range(self.n_layers) if self.arch.experts(self.config, layer)), None)
        return moe_layer is not None and self.weights(moe_layer, "down_proj")[0].expert is not None

    def lay_like(self, other: Side) -> None:
        """Read the experts as if their layout on disk were that of another side."""
        layout = (other.stored, other.arch, other.config)
        self.stored = stacking.like(self.stored, self.arch, self.config, *layout)
        self.names = set(self.stored.names())

    def projections(self, layer: int, wanted: Collection[str] | None) -> list[str]:
        """The projections that a layer has, and its router; only the `wanted` ones if given."""
        names = [*self.arch.projections(self.config, layer)]
        names += [archs.ROUTER] * self.arch.has_router(self.config, layer)
        return [name for name in names if wanted is None or name in wanted]

    def weights(self, layer: int, projection: str) -> list[archs.WeightSlice]:
        """Where the weight of `projection` in `layer` is on disk: one part, or one for each expert or step."""
        parts = self.arch.parts(self.config, layer, projection, self.names, self.stored.shape)
        return [part for part in parts if part.role == "weight"]

    def heads(self, layer: int, projection: str) -> int:
        """The number of heads of an attention projection; 0 for others."""
        q_heads, kv_heads, _ = self.arch.heads(self.config, layer)
        return dict(zip(archs.ATTENTION, (q_heads, kv_heads, kv_heads, q_heads), strict=True)).get(projection, 0)


@contextmanager
def opened(base: refs.ModelRef, checkpoints: list[refs.ModelRef]) -> Iterator[list[Side]]:
    """Base and checkpoints, opened, with the same layout of experts: if one has a tensor per expert, all are read so.

    Raises:
        InputError: they differ in architecture or in the number of layers or experts.
    """
    with ExitStack() as stack:
        base_side = stack.enter_context(Side(base))
        sides = [base_side, *(stack.enter_context(Side(ref, base)) for ref in checkpoints)]
        for other in sides[1:]:
            _check_same_matrix(base_side, other)
        for side in sides:  # custom code might not use the weights as their names suggest
            settings.say_custom_code(side.spec, side.config)
        unstacked = next((side for side in sides if not side.is_stacked), None)
        for side in sides if unstacked else ():
            side.lay_like(unstacked)
        yield sides


def _check_same_matrix(one: Side, other: Side) -> None:
    if archs.text_type(one.config) != archs.text_type(other.config):
        raise InputError(
            f"{one.spec} is a {one.arch.model_type} and {other.spec} a {other.arch.model_type}; "
            "base and checkpoints must have the same architecture"
        )
    same = "base and checkpoints must have the same number"
    if one.n_layers != other.n_layers:
        raise InputError(f"{one.spec} has {one.n_layers} layers and {other.spec} {other.n_layers}; {same}")
    for layer in range(one.n_layers):
        n, m = (side.arch.experts(side.config, layer) for side in (one, other))
        if n != m:
            raise InputError(f"layer {layer} has {n} experts in {one.spec} and {m} in {other.spec}; {same}")


@dataclass
class MatrixSlice:
    """A projection's weight, or one expert's share of it, within a matrix.

    Attributes:
        dim: whether output features are the rows (0) or the columns (1) of the matrix.
        rows, columns: the region, in the order of the projection's features and inputs.
        features: whether sums by output feature are requested.
        heads: number of heads for sums by head; 0: none requested.
        neurons: whether sums by neuron are requested.
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
        """The dimension of the matrix that heads or neurons divide: inputs for o and down, else output features."""
        return int(self.projection in ("o_proj", "down_proj")) ^ self.dim

    @property
    def by_column(self) -> bool:
        """Whether the requested sums need sums by column; sums by row are always computed."""
        return (self.features and self.dim == 1) or (bool(self.heads or self.neurons) and self.axis == 1)


@dataclass
class Matrix:
    """A tensor of one layer on disk, viewed as a matrix, and the slices that it holds.

    If a tensor holds all experts, [E, .., ..], each expert is a matrix, and rows are counted over all experts.
    If columns alternate between two projections, they are read sorted: all of the first, then all of the second.

    Attributes:
        names: the tensor's names in the base and in each checkpoint.
        every: 2 if the columns of two projections alternate, else 1.
    """

    layer: int
    names: list[str]
    shape: tuple[int, int]
    slices: list[MatrixSlice] = field(default_factory=list)
    every: int = 1

    @cached_property
    def stretch(self) -> int:
        """Number of columns summed together in float32: at most STRETCH, and such that no stretch crosses slices.

        If the width has no useful divisor (a prime, say), rows are not divided further.
        """
        width = math.gcd(self.shape[1], *(end for s in self.slices for end in (s.columns.start, s.columns.stop)))
        stretch = next(n for n in range(min(width, STRETCH), 0, -1) if width % n == 0)
        return stretch if stretch >= STRETCH // 16 else width

    @property
    def by_column(self) -> bool:
        """Whether sums by column are needed; then its slices span all rows, since tensors fused by rows hold only
        projections whose heads and neurons are rows."""
        return any(each.by_column for each in self.slices)

    @cached_property
    def span(self) -> tuple[int, int]:
        """The range of rows to read."""
        ends = [
            (s.rows.start, s.rows.stop) if isinstance(s.rows, slice) else (int(s.rows.min()), int(s.rows.max()) + 1)
            for s in self.slices
        ]
        return min(start for start, _ in ends), max(stop for _, stop in ends)


def plan(
    sides: list[Side], projections: Collection[str] | None, features: Collection[str], details: bool
) -> list[Matrix]:
    """The matrices to read, layer by layer; a fused one appears once, with all its slices.

    Raises:
        InputError: the models differ in the shape of a tensor, or in how it is divided.
    """
    base = sides[0]
    matrices: dict[tuple[int, str, int | None], Matrix] = {}
    for layer in range(base.n_layers):
        for name in base.projections(layer, projections):
            weight_parts = list(zip(*(side.weights(layer, name) for side in sides), strict=True))
            heads = base.heads(layer, name) if details and len(weight_parts) == 1 else 0
            for parts in weight_parts:
                part, shape = parts[0], base.stored.shape(parts[0].tensor)
                for side, other in zip(sides, parts, strict=True):
                    _refuse_shapes(base, part, side, other)
                matrix_shape = (math.prod(shape[:-1]), shape[-1])
                key = layer, part.tensor, part.expert
                matrix = matrices.setdefault(key, Matrix(layer, [each.tensor for each in parts], matrix_shape))
                region = _region(part, shape, matrix)
                piece = MatrixSlice(name, part.dim, *region, name in features, heads, details and name in archs.FFN)
                if heads and piece.size[piece.axis] % heads:
                    raise InputError(
                        f"{part.tensor} of {base.spec} has shape {list(shape)}, which does not divide into the {heads} "
                        "heads that config.json states"
                    )
                matrix.slices.append(piece)
    return list(matrices.values())


def _region(part: archs.WeightSlice, shape: tuple[int, ...], matrix: Matrix) -> list[slice | torch.Tensor]:
    """The rows and columns of a part within its tensor, viewed as a matrix."""
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
            "compared tensors must agree in shape"
        )
    index, shape = theirs.index, shapes[1]
    needed = 0 if index is None else index.stop if isinstance(index, slice) else int(index.max()) + 1
    experts = 0 if theirs.expert is None else theirs.expert + 1
    matrix = shape if theirs.expert is None else shape[1:]
    if len(matrix) != 2 or not math.prod(shape) or needed > matrix[theirs.dim] or experts > shape[0]:
        raise InputError(
            f"{theirs.tensor} of {other.spec} has shape {list(shape)}, which does not fit the sizes in config.json"
        )
    if not _same_index(ours.index, index):  # a fused tensor, divided differently
        raise InputError(f"{one.spec} and {other.spec} differ in attention heads; they cannot be compared")


def _same_index(a: slice | torch.Tensor | None, b: slice | torch.Tensor | None) -> bool:
    if a is None or b is None or isinstance(a, slice) or isinstance(b, slice):
        return type(a) is type(b) and a == b
    return a.equal(b)
