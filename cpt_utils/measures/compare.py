"""How far checkpoints have moved from their base: sums over the weights of every projection, in one pass.

    found = changes(refs.model("build/base"), refs.run("build/run"))
    found[90][3]["gate_proj"].mean_abs        # mean |dW| of layer 3's gate projection at step 90

A matrix is read half a million entries at a time, B's once for all checkpoints, by as many threads as torch uses. Each
thread has buffers of its own that it uses again and again, so memory depends neither on the size of the models nor on
their number. Stretches of a row are summed by themselves in float32, and added up in float64: sums are
within 1e-6 of exact ones, and the number of threads changes no bit. Differences are taken in float32 whatever the
dtypes on disk, in float64 where one of them is float64.
"""

from __future__ import annotations

import math
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from cpt_utils.architectures import archs
from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import opening, refs, settings, stacking, tensors

if TYPE_CHECKING:
    import torch

# Entries of a matrix worked on at a time: many more fall out of the CPU's caches, many fewer cost more in calls than in
# arithmetic. A GPU wants larger pieces.
CHUNK, DEVICE_CHUNK = 1 << 19, 1 << 23
# Entries summed in float32 before float64 takes over: norms of much longer rows are off by more than 1e-6.
STRETCH = 1024
# Threads at most, and files that all of them may hold open: each holds one of every model.
THREADS, FILES = 16, 512

# What is kept of each row of a matrix; the first four add up.
ABS, SQ, BASE, CKPT, MAX = range(5)


@dataclass
class Sums:
    """Sums over groups of a projection's entries, its heads or its neurons; `n` entries each.

    `values` [4, groups] are the sums of |dW|, dW^2, W_B^2 and W_C^2: float64 for heads, float32 for neurons.
    """

    n: int
    values: torch.Tensor

    @property
    def mean_abs(self) -> torch.Tensor:
        """Mean |dW| of each: [groups]."""
        return self.values[ABS] / self.n

    @property
    def relative(self) -> torch.Tensor:
        """||dW|| / ||W_B|| of each: [groups]; infinite or NaN where the base is all zeros."""
        return (self.values[SQ] / self.values[BASE]).sqrt()

    @property
    def cosine_distance(self) -> torch.Tensor:
        """1 - cosine of W_B and W_C of each, float64 [groups]; NaN where one of them is all zeros."""
        return _cosine_distance(*self.values[SQ : CKPT + 1].double()).clamp(0, 2)


@dataclass
class Change:
    """Sums over the `n` entries of one projection's weight: of |dW|, dW^2, W_B^2, W_C^2, and the largest |dW|.

    `rows` holds the sum of |dW| of each output feature (a gate's neuron), float64 [features], where it was asked for;
    each is over `n / features` entries. `heads` (of q, k, v and o; KV heads for k and v) and `neurons` (of gate, up and
    down) are there where details were asked for.
    """

    n: int = 0
    sum_abs: float = 0.0
    sum_sq: float = 0.0
    base_sq: float = 0.0
    max_abs: float = 0.0
    rows: torch.Tensor | None = None
    ckpt_sq: float = 0.0
    heads: Sums | None = None
    neurons: Sums | None = None

    @property
    def mean_abs(self) -> float:
        """Mean |dW|."""
        return self.sum_abs / self.n

    @property
    def relative(self) -> float | None:
        """||dW||_F / ||W_B||_F; None where the base is all zeros."""
        return (self.sum_sq / self.base_sq) ** 0.5 if self.base_sq else None

    @property
    def dot(self) -> float:
        """The inner product of W_B and W_C."""
        return (self.base_sq + self.ckpt_sq - self.sum_sq) / 2

    @property
    def cosine_distance(self) -> float | None:
        """1 - cosine of W_B and W_C, which keeps its digits where the cosine is nearly 1; None where one is all zeros.

        Off by 1e-6 or less while neither norm is ten times the other.
        """
        if not self.base_sq or not self.ckpt_sq:
            return None
        return min(2.0, max(0.0, _cosine_distance(self.sum_sq, self.base_sq, self.ckpt_sq)))

    @property
    def cosine(self) -> float | None:
        """Cosine of W_B and W_C as vectors; None where one of them is all zeros."""
        distance = self.cosine_distance
        return None if distance is None else 1 - distance

    @property
    def row_means(self) -> torch.Tensor:
        """Mean |dW| of each output feature: float64 [features]."""
        return self.rows / (self.n / len(self.rows))


def _cosine_distance(sum_sq, base_sq, ckpt_sq):
    """(||dW||^2 - (||W_B|| - ||W_C||)^2) / (2 ||W_B|| ||W_C||), for numbers or tensors.

    Exactly 0 where dW is; where W_C is W_B times a number it may be below 0 by a rounding error.
    """
    a, b = base_sq**0.5, ckpt_sq**0.5
    return (sum_sq - (a - b) ** 2) / (2 * a * b)


@dataclass
class Timing:
    """Where a pass spends its time, in seconds; `read` (from the files into buffers) and `compute` add up all threads.

    `bytes` are those read, of B once and of every checkpoint.
    """

    plan: float = 0.0
    read: float = 0.0
    compute: float = 0.0
    wall: float = 0.0
    bytes: int = 0
    threads: int = 0


Changes = dict[int, dict[int, dict[str, Change]]]


def changes(
    base: refs.ModelRef,
    checkpoints: list[refs.ModelRef],
    projections: Collection[str] | None = None,
    rows: Collection[str] = (),
    device: torch.device | str = "cpu",
    details: bool = False,
    timing: Timing | None = None,
) -> Changes:
    """`{step: {layer: {projection: Change}}}` of every checkpoint of a run against `base`. Weight matrices only.

    A projection that is several matrices has the sums over all of them: all experts of a mixture (rows and neurons
    expert by expert, then those of the FFN beside them), both steps of a latent attention. Layers that have a router
    have an entry `archs.ROUTER` more, and a layer without attention or without an FFN has none of its projections.

    Args:
        projections: only these (and the router, if named); default: all that the architecture has.
        rows: projections whose sums are also kept by output feature.
        device: where the differences are taken; tensors go there block by block.
        details: keep the sums by head (of projections that are one matrix) and by neuron, too: 16 bytes a neuron,
            projection, layer and checkpoint.
        timing: filled with what the pass cost.

    Raises:
        InputError: another architecture, layer count or shape of what is compared, missing or damaged weights, NaN.
    """
    timing = timing or Timing()
    started = time.perf_counter()
    with ExitStack() as stack:
        one = stack.enter_context(_Side(base))
        others = [stack.enter_context(_Side(ref, base)) for ref in checkpoints]
        for other in others:
            _refuse_unlike(one, other)
        for ref in (base, *checkpoints):  # it might use the weights in another way than their names say
            settings.say_own_code(ref.spec, ref.config())
        sides = [one, *others]
        _lay_alike(sides)
        plan = [
            matrix
            for layer in range(one.n_layers)
            for matrix in _matrices(sides, layer, one.names_of(layer, projections), rows, details)
        ]
        for number, side in enumerate(sides):  # every shape was checked before the first weights are fetched or read
            side.stored.fetch({matrix.names[number] for matrix in plan})
        pieces: dict[tuple[int, str], list[_Piece]] = {}
        for matrix in plan:
            for piece in matrix.pieces:
                pieces.setdefault((matrix.layer, piece.projection), []).append(piece)
        found: Changes = {
            other.step: {
                layer: {name: _empty(pieces[layer, name]) for name in one.names_of(layer, projections)}
                for layer in range(one.n_layers)
            }
            for other in others
        }
        timing.plan += time.perf_counter() - started
        if others and plan:
            _Pass(sides, plan, device, timing).run(found)
    timing.wall += time.perf_counter() - started
    return found


def unlike(base: refs.ModelRef, checkpoint: refs.ModelRef) -> dict[str, str]:
    """Tensors outside the layers that differ in shape, or that one side has not: they are not compared. Name -> why."""
    with _Side(base) as one, _Side(checkpoint, base) as other:
        ours = {archs.meaning(one.arch, name): name for name in one.names if one.arch.layer_of(name) is None}
        theirs = {archs.meaning(other.arch, name): name for name in other.names if other.arch.layer_of(name) is None}
        found = {ours[key]: "not in the checkpoint" for key in ours.keys() - theirs.keys()}
        found |= {theirs[key]: "not in the base" for key in theirs.keys() - ours.keys()}
        for key in ours.keys() & theirs.keys():
            shapes = one.stored.shape(ours[key]), other.stored.shape(theirs[key])
            if shapes[0] != shapes[1]:
                found[ours[key]] = f"{list(shapes[0])} in the base, {list(shapes[1])} in the checkpoint"
        return _gathered({name: why for name, why in sorted(found.items()) if not archs.is_buffer(name)})


def _gathered(found: dict[str, str], most: int = 3) -> dict[str, str]:
    """The same with one entry for what one side has of a whole part that the other has not, such as a vision tower."""
    parts: dict[tuple[str, str], list[str]] = {}
    for name, why in found.items():
        parts.setdefault((name.partition(".")[0], why), []).append(name)
    gathered = {}
    for (part, why), names in parts.items():
        if len(names) > most:
            gathered[f"{part}.*"] = f"{len(names)} tensors, {why}"
        else:
            gathered |= dict.fromkeys(names, why)
    return gathered


# ---------------------------------------------------------------- what is compared


class _Side:
    """One model: its configuration, its architecture and its open files. `base`: see `opening.open_folder`."""

    def __init__(self, ref: refs.ModelRef, base: refs.ModelRef | None = None):
        self.ref, self.step = ref, ref.step
        self.config = ref.config()
        self.arch = archs.for_config(self.config)
        self.n_layers = self.arch.n_layers(self.config)
        self.stored = opening.open_folder(ref, base, lazy=True)
        self.names = set(self.stored.names())

    def __enter__(self) -> _Side:
        return self

    def __exit__(self, *_) -> None:
        self.stored.close()

    @property
    def is_stacked(self) -> bool:
        """Whether a tensor holds all experts of a layer."""
        arch, config = self.arch, self.config
        sparse = next((layer for layer in range(self.n_layers) if arch.experts(config, layer)), None)
        return (
            sparse is not None
            and arch.parts(config, sparse, "down_proj", self.names, self.stored.shape)[0].expert is not None
        )

    def lay_like(self, other: _Side) -> None:
        """Let the experts be read as if they were laid out as on another side."""
        whose = (other.stored, other.arch, other.config)
        self.stored = stacking.like(self.stored, self.arch, self.config, *whose)
        self.names = set(self.stored.names())

    def names_of(self, layer: int, wanted: Collection[str] | None) -> list[str]:
        """The projections that a layer has, and its router; of these only the `wanted` ones."""
        names = list(self.arch.projections(self.config, layer))
        names += [archs.ROUTER] * self.arch.has_router(self.config, layer)
        return [name for name in names if wanted is None or name in wanted]

    def weights(self, layer: int, projection: str) -> list[archs.Part]:
        """Where the weight of `projection` in `layer` is on disk: one part, or one for each expert or step."""
        parts = self.arch.parts(self.config, layer, projection, self.names, self.stored.shape)
        return [part for part in parts if part.role == "weight"]


@dataclass
class _Piece:
    """A projection's weight, or one expert's share of it, within a matrix on disk.

    Attributes:
        dim: whether output features are the rows (0) or the columns (1) of the matrix.
        rows, columns: those that belong to it, in the order of the projection's features and inputs.
        first: how many features and inputs of the projection come before it: those of the experts before.
        features: whether sums by output feature are asked for.
        heads: how many heads sums are asked for, 0 for none.
        neurons: whether sums by neuron are asked for.
    """

    projection: str
    dim: int
    rows: slice | torch.Tensor
    columns: slice
    first: tuple[int, int] = (0, 0)
    features: bool = False
    heads: int = 0
    neurons: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns)."""
        rows = self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)
        return rows, self.columns.stop - self.columns.start

    @property
    def stop(self) -> tuple[int, int]:
        """How many features and inputs the projection has up to the end of this piece."""
        return self.first[0] + self.size[self.dim], self.first[1] + self.size[1 - self.dim]

    @property
    def grouped(self) -> int:
        """What heads or neurons are groups of: 1, inputs, for o and down, else 0, output features."""
        return int(self.projection in ("o_proj", "down_proj"))

    @property
    def by_column(self) -> bool:
        """Whether the sums asked for need those of every column; those of every row are there anyway."""
        return (self.features and self.dim == 1) or (bool(self.heads or self.neurons) and self.axis == 1)

    @property
    def axis(self) -> int:
        """Along which dimension of the matrix its heads or neurons are."""
        return int(self.grouped != self.dim)

    @property
    def n_grouped(self) -> int:
        """How many features, or inputs, make up its heads or neurons."""
        return self.size[self.axis]

    def add_to(self, change: Change, totals: list[float], largest: float, *sums: torch.Tensor | None) -> None:
        """Add the piece's sums to its projection's: `totals` of |dW|, dW^2, W_B^2, W_C^2; by row; by column [4, n]."""
        change.n += math.prod(self.size)
        change.sum_abs += totals[ABS]
        change.sum_sq += totals[SQ]
        change.base_sq += totals[BASE]
        change.ckpt_sq += totals[CKPT]
        change.max_abs = max(change.max_abs, largest)
        if self.features:
            change.rows[self.first[0] : self.stop[0]] = sums[self.dim][ABS]
        along = sums[self.axis]
        if self.heads:
            change.heads.values += along.view(4, self.heads, -1).sum(2)
        if self.neurons:
            change.neurons.values[:, self.first[self.grouped] : self.stop[self.grouped]] = along


@dataclass
class _Matrix:
    """A tensor of one layer on disk, what it holds, and the sums of it while it is being read.

    Of one that holds all experts, [E, .., ..], a matrix is one expert's, and its rows are counted over all of them.
    Columns that alternate between two projections come sorted: those of the first, then those of the second.

    Attributes:
        names: of the tensor in B and in each checkpoint.
        every: 2 where two projections' columns alternate, else 1.
        rows: sums of each row, in stretches of `stretch` columns: float [checkpoints, 5, rows, stretches]; of squares
            the roots of the sums.
        columns: sums of each column, where a piece needs them: float64 [checkpoints, 4, columns]. Such pieces have all
            the rows, since tensors fused by rows hold only projections whose heads and neurons are rows.
    """

    layer: int
    names: list[str]
    shape: tuple[int, int]
    pieces: list[_Piece] = field(default_factory=list)
    every: int = 1
    dtype: torch.dtype | None = None
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    @cached_property
    def stretch(self) -> int:
        """Columns that are summed together in float32: as many as keep the pieces apart, and at most STRETCH of them.

        A matrix whose width has no divisor worth using (a prime, say) keeps its rows whole.
        """
        apart = math.gcd(self.shape[1], *(end for p in self.pieces for end in (p.columns.start, p.columns.stop)))
        found = next(n for n in range(min(apart, STRETCH), 0, -1) if apart % n == 0)
        return found if found >= STRETCH // 16 else apart

    @cached_property
    def by_column(self) -> bool:
        return any(piece.by_column for piece in self.pieces)

    @cached_property
    def span(self) -> tuple[int, int]:
        """The rows that have to be read."""
        ends = [
            (p.rows.start, p.rows.stop) if isinstance(p.rows, slice) else (int(p.rows.min()), int(p.rows.max()) + 1)
            for p in self.pieces
        ]
        return min(start for start, _ in ends), max(stop for _, stop in ends)

    def clear(self, dtype: torch.dtype) -> None:
        """Make room for sums in which nothing is yet; differences and sums of a row will be taken in `dtype`."""
        import torch

        checkpoints, n_rows = len(self.names) - 1, self.span[1] - self.span[0]
        self.dtype = dtype
        self.rows = torch.empty(checkpoints, 5, n_rows, self.shape[1] // self.stretch, dtype=dtype)
        if self.by_column:
            self.columns = torch.zeros(checkpoints, 4, self.shape[1], dtype=torch.float64)

    def add_to(self, found: list[dict[str, Change]]) -> int | None:
        """Add the sums to the layer's changes of every checkpoint, or return a checkpoint whose sums are not finite."""
        sums = self.rows.double()
        sums[:, SQ : CKPT + 1].square_()
        for k, finite in enumerate(sums.isfinite().flatten(1).all(1).tolist()):
            if not finite:
                return k
        for piece in self.pieces:
            own = sums[..., piece.columns.start // self.stretch : piece.columns.stop // self.stretch]
            first = self.span[0]
            if isinstance(piece.rows, slice):
                own = own[:, :, piece.rows.start - first : piece.rows.stop - first]
            else:
                own = own[:, :, piece.rows - first]
            totals, largest = own[:, :MAX].sum((2, 3)).tolist(), own[:, MAX].amax((1, 2)).tolist()
            by_row = own[:, :MAX].sum(3)
            by_column = self.columns[..., piece.columns] if self.by_column else [None] * len(found)
            for k, here in enumerate(found):
                piece.add_to(here[piece.projection], totals[k], largest[k], by_row[k], by_column[k])
        return None


def _matrices(
    sides: list[_Side], layer: int, names: list[str], rows: Collection[str], details: bool
) -> Iterable[_Matrix]:
    """The tensors on disk that hold these projections of a layer; a fused one comes once, with all its pieces.

    Raises:
        InputError: the models differ in the shape of a tensor, or in how it is cut.
    """
    one = sides[0]
    found: dict[tuple[str, int | None], _Matrix] = {}
    for name in names:
        before = (0, 0)
        several = list(zip(*(side.weights(layer, name) for side in sides), strict=True))
        heads = _heads(one, layer, name) if details and len(several) == 1 else 0
        for parts in several:
            part, shape = parts[0], one.stored.shape(parts[0].tensor)
            for side, other in zip(sides, parts, strict=True):
                _refuse_shapes(one, part, side, other)
            flat = (math.prod(shape[:-1]), shape[-1])
            key = part.tensor, part.expert
            matrix = found.setdefault(key, _Matrix(layer, [each.tensor for each in parts], flat))
            place = _place(part, shape, matrix)
            piece = _Piece(name, part.dim, *place, before, name in rows, heads, details and name in archs.FFN)
            if piece.heads and piece.n_grouped % piece.heads:
                raise InputError(
                    f"{part.tensor} of {one.ref.spec} has shape {list(shape)}, which is no whole number of the "
                    f"{piece.heads} heads that config.json states"
                )
            before = piece.stop
            matrix.pieces.append(piece)
    return found.values()


def _heads(one: _Side, layer: int, name: str) -> int:
    """The heads of a projection of attention; 0 of others."""
    q_heads, kv_heads, _ = one.arch.heads(one.config, layer)
    return dict(zip(archs.ATTENTION, (q_heads, kv_heads, kv_heads, q_heads), strict=True)).get(name, 0)


def _place(part: archs.Part, shape: tuple[int, ...], matrix: _Matrix) -> list[slice | torch.Tensor]:
    """The rows and columns of a part within its tensor as a matrix."""
    first = 0 if part.expert is None else part.expert * shape[-2]
    place = [slice(first, first + shape[-2]), slice(0, shape[-1])]
    index = part.index
    if isinstance(index, slice) and index.step not in (None, 1):  # columns that alternate; they are read sorted
        matrix.every = index.step
        half = shape[-1] // index.step
        index = slice(index.start * half, (index.start + 1) * half)
    if index is not None and part.dim == 0:
        place[0] = slice(first + index.start, first + index.stop) if isinstance(index, slice) else first + index
    elif index is not None:
        place[1] = index
    return place


def _empty(pieces: list[_Piece]) -> Change:
    """A change to which the sums of these pieces, those of one projection, can be added."""
    import torch

    last = pieces[-1]
    change = Change(rows=torch.zeros(last.stop[0], dtype=torch.float64) if last.features else None)
    if last.heads:
        change.heads = Sums(math.prod(last.size) // last.heads, torch.zeros(4, last.heads, dtype=torch.float64))
    if last.neurons:
        change.neurons = Sums(math.prod(last.size) // last.n_grouped, torch.zeros(4, last.stop[last.grouped]))
    return change


def _refuse_unlike(one: _Side, other: _Side) -> None:
    if archs.text_type(one.config) != archs.text_type(other.config):
        raise InputError(
            f"{one.ref.spec} is a {one.arch.model_type} and {other.ref.spec} a {other.arch.model_type}; "
            "base and checkpoints must be one architecture"
        )
    if one.n_layers != other.n_layers:
        raise InputError(
            f"{one.ref.spec} has {one.n_layers} layers and {other.ref.spec} {other.n_layers}; "
            "base and checkpoints must have the same"
        )
    for layer in range(one.n_layers):
        experts = [side.arch.experts(side.config, layer) for side in (one, other)]
        if experts[0] != experts[1]:
            raise InputError(
                f"layer {layer} has {experts[0]} experts in {one.ref.spec} and {experts[1]} in {other.ref.spec}; "
                "base and checkpoints must have the same"
            )


def _lay_alike(sides: list[_Side]) -> None:
    """Let the experts be laid out alike on all sides: where one has each in tensors of its own, on all of them."""
    apart = next((side for side in sides if not side.is_stacked), None)
    for side in sides if apart else ():
        side.lay_like(apart)


def _refuse_shapes(one: _Side, ours: archs.Part, other: _Side, theirs: archs.Part) -> None:
    shapes = one.stored.shape(ours.tensor), other.stored.shape(theirs.tensor)
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{ours.tensor} has shape {list(shapes[0])} in {one.ref.spec} and {list(shapes[1])} in {other.ref.spec}; "
            "what is compared must agree in shape"
        )
    index, shape = theirs.index, shapes[1]
    needed = 0 if index is None else index.stop if isinstance(index, slice) else int(index.max()) + 1
    experts = 0 if theirs.expert is None else theirs.expert + 1
    matrix = shape if theirs.expert is None else shape[1:]
    if len(matrix) != 2 or not math.prod(shape) or needed > matrix[theirs.dim] or experts > shape[0]:
        raise InputError(
            f"{theirs.tensor} of {other.ref.spec} has shape {list(shape)}, which does not fit the sizes in config.json"
        )
    if not _same_index(ours.index, index):  # one fused tensor, cut differently
        raise InputError(f"{one.ref.spec} and {other.ref.spec} differ in attention heads; they cannot be compared")


def _same_index(a: slice | torch.Tensor | None, b: slice | torch.Tensor | None) -> bool:
    if a is None or b is None or isinstance(a, slice) or isinstance(b, slice):
        return type(a) is type(b) and a == b
    return a.equal(b)


# ---------------------------------------------------------------- the pass


class _Pass:
    """Reads every matrix of a plan once and adds its sums up.

    A job is a range of rows of one matrix, in B and all checkpoints; any thread does it. The sums of its rows go where
    no other job's go, and those of its columns are added in the order of the jobs: timing changes no bit.
    """

    def __init__(self, sides: list[_Side], plan: list[_Matrix], device: torch.device | str, timing: Timing):
        import torch

        self.sides, self.plan, self.timing = sides, plan, timing
        device = torch.device(device)
        self.chunk = CHUNK if device.type == "cpu" else DEVICE_CHUNK
        timing.threads = min(torch.get_num_threads(), THREADS, max(1, FILES // len(sides)))
        self.desks: queue.SimpleQueue[_Desk] = queue.SimpleQueue()
        for _ in range(timing.threads):
            self.desks.put(_Desk(device))

    def run(self, found: Changes) -> None:
        """Add the sums of the plan's matrices to `found`."""
        layers = [found[side.step] for side in self.sides[1:]]
        bar = cli.progress(total=len(self.plan), desc="weights", unit="tensor")
        try:
            with _one_thread_each(), bar, closing(_in_order(self.sums, self.jobs(), self.timing.threads)) as done:
                for (matrix, _, stop), result in done:
                    self.receive(matrix, *result)
                    if stop == matrix.span[1]:
                        self.finish(matrix, [layer[matrix.layer] for layer in layers])
                        bar.update()
        finally:
            for _ in range(self.timing.threads):
                self.desks.get().close()

    def jobs(self) -> Iterator[tuple[_Matrix, int, int]]:
        """(matrix, first row, end) of every job, in order."""
        import torch

        for matrix in self.plan:
            dtypes = [side.stored.dtype(name) for side, name in zip(self.sides, matrix.names, strict=True)]
            entries = (matrix.span[1] - matrix.span[0]) * matrix.shape[1]
            self.timing.bytes += entries * sum(dtype.itemsize for dtype in dtypes)
            yield from self.jobs_of(matrix, torch.float64 if torch.float64 in dtypes else torch.float32)

    def jobs_of(self, matrix: _Matrix, dtype: torch.dtype) -> Iterator[tuple[_Matrix, int, int]]:
        matrix.clear(dtype)
        first, last = matrix.span
        for start, stop in tensors.chunks(last - first, matrix.shape[1], self.chunk):
            yield matrix, first + start, first + stop

    def sums(self, matrix: _Matrix, start: int, stop: int) -> tuple[float, float, torch.Tensor | None]:
        """Do one job: leave the sums of its rows in `matrix`.

        Returns seconds, seconds of these spent reading, and sums by column [checkpoints, 4, columns] or None.
        """
        started = time.perf_counter()
        desk = self.desks.get()
        try:
            with desk.at_work():
                reading, columns = self._sums(desk, matrix, start, stop)
        finally:
            self.desks.put(desk)
        return time.perf_counter() - started, reading, columns

    def _sums(self, desk: _Desk, matrix: _Matrix, start: int, stop: int) -> tuple[float, torch.Tensor | None]:
        import torch

        norm = torch.linalg.vector_norm
        at = desk.room_for(matrix, stop - start)
        columns = None
        if matrix.by_column:
            columns = torch.empty(len(matrix.names) - 1, *at.columns.shape, dtype=matrix.dtype)
        reading = desk.read(0, self.sides[0], matrix, start, stop, at.ours)
        norm(at.our_stretches, dim=2, out=at.sums[BASE])
        if matrix.by_column:
            torch.sum(torch.mul(at.ours, at.ours, out=at.squares), 0, out=at.columns[BASE])
        for k, side in enumerate(self.sides[1:]):
            reading += desk.read(k + 1, side, matrix, start, stop, at.moved)
            norm(at.moved_stretches, dim=2, out=at.sums[CKPT])
            if matrix.by_column:
                torch.sum(torch.mul(at.moved, at.moved, out=at.squares), 0, out=at.columns[CKPT])
            at.moved.sub_(at.ours)
            norm(at.moved_stretches, dim=2, out=at.sums[SQ])
            if matrix.by_column:
                torch.sum(torch.mul(at.moved, at.moved, out=at.squares), 0, out=at.columns[SQ])
            at.moved.abs_()
            torch.sum(at.moved_stretches, 2, out=at.sums[ABS])
            torch.amax(at.moved_stretches, 2, out=at.sums[MAX])
            matrix.rows[k, :, start - matrix.span[0] : stop - matrix.span[0]] = at.all_sums
            if matrix.by_column:
                torch.sum(at.moved, 0, out=at.columns[ABS])
                columns[k] = at.columns
        return reading, columns

    def receive(self, matrix: _Matrix, seconds: float, reading: float, columns: torch.Tensor | None) -> None:
        """Take over what a job returned."""
        self.timing.read += reading
        self.timing.compute += seconds - reading
        if columns is not None:
            matrix.columns += columns

    def finish(self, matrix: _Matrix, here: list[dict[str, Change]]) -> None:
        """Add the sums of a matrix that is read to the changes of its layer, of each checkpoint.

        Raises:
            InputError: they are not finite, and neither is what was read.
        """
        import torch

        damaged = matrix.add_to(here)
        if damaged is not None:
            for number in (0, damaged + 1):
                self.refuse_not_finite(self.sides[number], matrix.names[number], *matrix.span)
            if matrix.dtype == torch.float64:
                raise InputError(
                    f"{self.sides[damaged + 1].ref.spec}: tensor {matrix.names[damaged + 1]} differs from the base "
                    "beyond the range of float64"
                )
            for job in self.jobs_of(matrix, torch.float64):  # squares beyond the range of float32
                self.receive(matrix, *self.sums(*job))
            return self.finish(matrix, here)
        matrix.rows = matrix.columns = None
        return None

    @staticmethod
    def refuse_not_finite(side: _Side, name: str, first: int, last: int) -> None:
        row_bytes = 8 * side.stored.shape(name)[-1]
        for start, stop in tensors.chunks(last - first, row_bytes):
            if not tensors.is_finite(_rows(side.stored, name, first + start, first + stop)):
                raise InputError(
                    f"{side.ref.spec}: tensor {name} holds NaN or infinite values; the weights are damaged"
                )


@dataclass
class _Room:
    """Buffers of one shape: B's rows, a checkpoint's (then dW, then |dW|), both cut into stretches, and their sums."""

    ours: torch.Tensor
    moved: torch.Tensor
    our_stretches: torch.Tensor
    moved_stretches: torch.Tensor
    all_sums: torch.Tensor
    sums: tuple[torch.Tensor, ...]
    squares: torch.Tensor | None = None
    columns: torch.Tensor | None = None


class _Desk:
    """What one thread at a time works with: buffers, kept from job to job, and open files, one of each model."""

    def __init__(self, device: torch.device):
        import torch

        self.device = device
        self.cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        self.buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self.rooms: dict[tuple, _Room] = {}
        self.files: dict[int, tuple[str, int]] = {}

    def at_work(self):
        """The context to work in: on a GPU a stream of its own."""
        import torch

        return torch.cuda.stream(self.stream) if self.cuda else nullcontext()

    def room_for(self, matrix: _Matrix, n_rows: int) -> _Room:
        """Buffers for so many rows of a matrix. Making the views costs as much as a small sum, so they are kept."""
        key = matrix.dtype, n_rows, matrix.shape[1], matrix.stretch, matrix.by_column
        if key not in self.rooms:
            shape, stretches = (n_rows, matrix.shape[1]), (n_rows, matrix.shape[1] // matrix.stretch, matrix.stretch)
            ours, moved = (self.buffer(name, matrix.dtype, shape) for name in ("ours", "moved"))
            sums = self.buffer("sums", matrix.dtype, (5, *stretches[:2]))
            room = _Room(ours, moved, ours.view(stretches), moved.view(stretches), sums, sums.unbind())
            if matrix.by_column:
                room.squares = self.buffer("squares", matrix.dtype, shape)
                room.columns = self.buffer("columns", matrix.dtype, (4, shape[1]))
            self.rooms[key] = room
        return self.rooms[key]

    def buffer(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], host: bool = False) -> torch.Tensor:
        """The buffer of that name as a tensor of this shape; on the device, or in memory that the device can read."""
        import torch

        size = math.prod(shape)
        buffer = self.buffers.get((name, dtype))
        if buffer is None or len(buffer) < size:
            self.rooms.clear()  # they hold the smaller one
            place = {"pin_memory": self.cuda} if host else {"device": self.device}
            buffer = self.buffers[name, dtype] = torch.empty(size, dtype=dtype, **place)
        return buffer[:size].view(shape)

    def read(self, number: int, side: _Side, matrix: _Matrix, start: int, stop: int, into: torch.Tensor) -> float:
        """Rows `start` to `stop` of a matrix of the model `number`, converted to `into`; the seconds spent reading."""
        began, name = time.perf_counter(), matrix.names[number]
        folder = side.stored.folder_of(name)
        if folder is None:  # computed, or in a pickle
            found = _rows(side.stored, name, start, stop)
        else:
            entry = folder.entry(name)
            found = self.buffer("file", tensors.torch_dtype(entry.dtype), into.shape, host=True)
            row_bytes = entry.shape[-1] * found.itemsize
            self.fill(number, os.path.join(folder.path, folder.shard_of(name)), entry.start + start * row_bytes, found)
        seconds = time.perf_counter() - began
        found = found if self.device.type == "cpu" else found.to(self.device)  # copied first, converted there
        if matrix.every > 1:  # columns 0, 2, 4, .. before 1, 3, 5, ..
            into = into.view(stop - start, matrix.every, -1)
            found = found.view(stop - start, -1, matrix.every).transpose(1, 2)
        into.copy_(found)
        return seconds

    def fill(self, number: int, path: str, position: int, buffer: torch.Tensor) -> None:
        """Read as many bytes as `buffer` has, from `position` of a file.

        Mapped files would save a copy, but a network's file system serves them page by page, and a file that is cut
        while it is being read kills the process.
        """
        import torch

        try:
            if self.files.get(number, ("", -1))[0] != path:
                self.close(number)
                self.files[number] = path, os.open(path, os.O_RDONLY)
            left = memoryview(buffer.view(-1).view(torch.uint8).numpy())
            while len(left):
                n = os.preadv(self.files[number][1], [left], position)
                if not n:
                    raise InputError(f"{path} was cut short while it was read; copy the model again")
                left, position = left[n:], position + n
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from None

    def close(self, *numbers: int) -> None:
        """Close the files of these models, or all."""
        for number in numbers or list(self.files):
            if number in self.files:
                os.close(self.files.pop(number)[1])


def _rows(stored, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows of a tensor as a matrix: of one that holds all experts, those of one expert after the other."""
    shape = stored.shape(name)
    if len(shape) == 2:
        return stored.rows(name, start, stop)
    first, each = start // shape[1], shape[1]
    experts = stored.rows(name, first, -(-stop // each))
    return experts.reshape(-1, shape[2])[start - first * each : stop - first * each]


def _in_order(function: Callable, jobs: Iterable[tuple], threads: int) -> Iterator[tuple[tuple, tuple]]:
    """(job, `function(*job)`) in the order of the jobs, done by so many threads a few jobs ahead."""
    if threads == 1:
        yield from ((job, function(*job)) for job in jobs)
        return
    waiting: deque = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for job in jobs:
                waiting.append((job, pool.submit(function, *job)))
                if len(waiting) > 2 * threads:
                    job, done = waiting.popleft()
                    yield job, done.result()
            while waiting:
                job, done = waiting.popleft()
                yield job, done.result()
        finally:
            for _, unfinished in waiting:
                unfinished.cancel()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Inside, torch computes in the thread that calls it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
