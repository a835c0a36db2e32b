"""How far checkpoints have moved from their base: sums over the weights of every projection, in one pass.

    by_step = changes(refs.model("build/base"), refs.run("build/run"))
    by_step[90][3]["gate_proj"].mean_abs        # mean |dW| of layer 3's gate projection at step 90

Matrices are read half a million entries at a time, the base's once for all checkpoints, and as many matrices in
parallel as torch uses threads: memory depends neither on the size of the models nor on their number. Stretches of a row
are summed in float32 and added up in float64: sums are within 1e-6 of the exact ones, and the number of threads changes
no bit. Differences are taken in float32 whatever the dtypes on disk, in float64 if one of them is float64.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import groupby

from cpt_utils.architectures import archs
from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import refs, tensors
from cpt_utils.measures import matrices
from cpt_utils.measures.matrices import Matrix, MatrixSlice, Side

# Entries of a matrix processed at a time: many more overflow the CPU's caches, many fewer cost more in calls than in
# arithmetic. A GPU needs larger pieces.
CHUNK, DEVICE_CHUNK = 1 << 19, 1 << 23
# Limits for all threads together: bytes of row sums of the matrices being read, and open files.
SUMS, FILES = 1 << 30, 512
THREADS = 16

# The statistics of each row of a matrix; the first four are additive.
ABS, SQ, BASE, CKPT, MAX = range(5)


@dataclass
class Sums:
    """Sums over groups of `n` entries of a projection: its heads or its neurons.

    `values` [4, groups] are the sums of |dW|, dW^2, W_B^2 and W_C^2: float64 for heads, float32 for neurons.
    """

    n: int
    values: torch.Tensor

    @property
    def mean_abs(self) -> torch.Tensor:
        """Mean |dW| of each group: [groups]."""
        return self.values[ABS] / self.n

    @property
    def relative(self) -> torch.Tensor:
        """||dW|| / ||W_B|| of each group: [groups]; infinite or NaN where the base is all zeros."""
        return (self.values[SQ] / self.values[BASE]).sqrt()

    @property
    def cosine_distance(self) -> torch.Tensor:
        """1 - cosine of W_B and W_C of each group, float64 [groups]; NaN where one of them is all zeros."""
        return _cosine_distance(*self.values[SQ : CKPT + 1].double()).clamp(0, 2)


@dataclass
class Change:
    """Sums over the `n` entries of one projection's weight: of |dW|, dW^2, W_B^2, W_C^2, and the largest |dW|.

    `rows` holds the sum of |dW| of each output feature (a gate's neuron) over its `n / features` entries, float64
    [features], if requested. `heads` (of q, k, v and o; KV heads for k and v) and `neurons` (of gate, up and down) are
    present if details were requested.
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
        """||dW||_F / ||W_B||_F; None if the base is all zeros."""
        return (self.sum_sq / self.base_sq) ** 0.5 if self.base_sq else None

    @property
    def dot(self) -> float:
        """The inner product of W_B and W_C."""
        return (self.base_sq + self.ckpt_sq - self.sum_sq) / 2

    @property
    def cosine_distance(self) -> float | None:
        """1 - cosine of W_B and W_C, precise even if the cosine is nearly 1; None if one of them is all zeros.

        The error is at most 1e-6 as long as neither norm is ten times the other.
        """
        if not self.base_sq or not self.ckpt_sq:
            return None
        return min(2.0, max(0.0, _cosine_distance(self.sum_sq, self.base_sq, self.ckpt_sq)))

    @property
    def cosine(self) -> float | None:
        """Cosine of W_B and W_C as vectors; None if one of them is all zeros."""
        distance = self.cosine_distance
        return None if distance is None else 1 - distance

    @property
    def row_means(self) -> torch.Tensor:
        """Mean |dW| of each output feature: float64 [features]."""
        return self.rows / (self.n / len(self.rows))


def _cosine_distance(sum_sq, base_sq, ckpt_sq):
    """(||dW||^2 - (||W_B|| - ||W_C||)^2) / (2 ||W_B|| ||W_C||), for numbers or tensors.

    Exactly 0 if dW is; if W_C is a multiple of W_B, rounding may make it slightly negative.
    """
    a, b = base_sq**0.5, ckpt_sq**0.5
    return (sum_sq - (a - b) ** 2) / (2 * a * b)


Changes = dict[int, dict[int, dict[str, Change]]]


def changes(
    base: refs.ModelRef,
    checkpoints: list[refs.ModelRef],
    projections: Collection[str] | None = None,
    rows: Collection[str] = (),
    device: torch.device | str = "cpu",
    details: bool = False,
) -> Changes:
    """`{step: {layer: {projection: Change}}}` of every checkpoint of a run against `base`. Weight matrices only.

    If a projection consists of several matrices, its sums are over all of them: all experts of a mixture (rows and
    neurons expert by expert, then those of the FFN beside them), both steps of a latent attention. Layers with a router
    have an additional entry `archs.ROUTER`; layers without attention or without an FFN lack those projections.

    Args:
        projections: only these (and the router, if named); default: all that the architecture has.
        rows: projections whose sums are also kept by output feature.
        device: where the differences are taken; tensors go there block by block.
        details: also keep the sums by head (of projections that are one matrix) and by neuron: 16 bytes per neuron,
            projection, layer and checkpoint.

    Raises:
        InputError: models that differ in architecture, layer count or shapes, missing or damaged weights, NaN.
    """
    with matrices.opened(base, checkpoints) as sides:
        plan = matrices.plan(sides, projections, rows, details)
        for number, side in enumerate(sides):  # all shapes have been checked before any weights are fetched or read
            side.stored.fetch({matrix.names[number] for matrix in plan})
        by_step: Changes = {ref.step: {layer: {} for layer in range(sides[0].n_layers)} for ref in checkpoints}
        if not by_step or not plan:
            return by_step
        bar = cli.progress(total=len(plan), desc="weights", unit="tensor")
        with bar, closing(_pass(plan, sides, device)) as matrix_changes:
            for layer, group in groupby(matrix_changes, key=lambda pair: pair[0].layer):
                collected: dict[tuple[int, str], list[Change]] = {}
                for matrix, by_slice in group:
                    for piece, by_checkpoint in zip(matrix.slices, by_slice, strict=True):
                        for ref, change in zip(checkpoints, by_checkpoint, strict=True):
                            collected.setdefault((ref.step, piece.projection), []).append(change)
                    bar.update()
                for step, layers in by_step.items():
                    names = sides[0].projections(layer, projections)
                    layers[layer] = {name: _together(collected[step, name]) for name in names}
    return by_step


def diff_tensors(base: refs.ModelRef, checkpoint: refs.ModelRef) -> dict[str, str]:
    """Tensors outside the layers that are not compared, as they differ in shape or one side lacks them: name -> why."""
    with matrices.Side(base) as b, matrices.Side(checkpoint, base) as c:
        base_names = {archs.meaning(b.arch, name): name for name in b.names if b.arch.layer_of(name) is None}
        ckpt_names = {archs.meaning(c.arch, name): name for name in c.names if c.arch.layer_of(name) is None}
        reasons = {base_names[key]: "not in the checkpoint" for key in base_names.keys() - ckpt_names.keys()}
        reasons |= {ckpt_names[key]: "not in the base" for key in ckpt_names.keys() - base_names.keys()}
        for key in base_names.keys() & ckpt_names.keys():
            shapes = b.stored.shape(base_names[key]), c.stored.shape(ckpt_names[key])
            if shapes[0] != shapes[1]:
                reasons[base_names[key]] = f"{list(shapes[0])} in the base, {list(shapes[1])} in the checkpoint"
        return _gathered({name: why for name, why in sorted(reasons.items()) if not archs.is_buffer(name)})


def _gathered(reasons: dict[str, str], most: int = 3) -> dict[str, str]:
    """The same, with one entry for all tensors of a larger part that the other side lacks, such as a vision tower."""
    parts: dict[tuple[str, str], list[str]] = {}
    for name, why in reasons.items():
        parts.setdefault((name.partition(".")[0], why), []).append(name)
    gathered = {}
    for (part, why), names in parts.items():
        if len(names) > most:
            gathered[f"{part}.*"] = f"{len(names)} tensors, {why}"
        else:
            gathered |= dict.fromkeys(names, why)
    return gathered


# ---------------------------------------------------------------- the pass


def _pass(
    plan: list[Matrix], sides: list[Side], device: torch.device | str
) -> Iterator[tuple[Matrix, list[list[Change]]]]:
    """Every matrix of a plan, in order, with the changes [slices][checkpoints].

    A thread works on one matrix at a time. When the caller is done, or on an error, all stop before their next block.
    """
    sums = max((m.span[1] - m.span[0]) * m.shape[1] // m.stretch for m in plan) * 20 * (len(sides) - 1)
    threads = max(1, min(torch.get_num_threads(), THREADS, FILES // len(sides), SUMS // sums))
    buffers, ended = _Buffers(torch.device(device)), threading.Event()
    with _one_thread_each(), ThreadPoolExecutor(threads) as pool:
        try:
            mapped = pool.map if threads > 1 else map  # a single worker thread would gain nothing
            yield from zip(plan, mapped(lambda matrix: _changes_of(matrix, sides, buffers, ended), plan), strict=True)
        finally:
            ended.set()
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Inside, torch computes in the calling thread alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Buffers(threading.local):
    """Memory that a thread reuses: allocating it anew for every matrix takes as long as the arithmetic."""

    def __init__(self, device: torch.device):
        self.device, self.held = device, {}

    def get(self, name: str, dtype: torch.dtype, *shape: int, **options) -> torch.Tensor:
        """The buffer with this name, as a tensor of this shape."""
        size = math.prod(shape)
        if (name, dtype) not in self.held or self.held[name, dtype].numel() < size:
            self.held[name, dtype] = torch.empty(size, dtype=dtype, **options)
        return self.held[name, dtype][:size].view(shape)


def _changes_of(matrix: Matrix, sides: list[Side], buffers: _Buffers, ended: threading.Event) -> list[list[Change]]:
    """The changes [slices][checkpoints] of a matrix.

    Raises:
        InputError: weights that are not finite, or differences beyond the range of float64.
    """
    wide = any(side.stored.dtype(name) == torch.float64 for side, name in zip(sides, matrix.names, strict=True))
    for dtype in (torch.float64,) if wide else (torch.float32, torch.float64):  # if squares overflow float32
        rows, columns = _sums_of(matrix, sides, dtype, buffers, ended)
        damaged = next((number for number, sums in enumerate(rows, 1) if not sums.isfinite().all()), None)
        if damaged is None:
            break
        for number in (0, damaged):
            _refuse_not_finite(sides[number], matrix.names[number], *matrix.span)
    else:
        raise InputError(
            f"{sides[damaged].spec}: tensor {matrix.names[damaged]} differs from the base beyond the range of float64"
        )
    by_slice: list[list[Change]] = [[] for _ in matrix.slices]
    for number, sums in enumerate(rows):
        sums = sums.double()
        sums[SQ : CKPT + 1].square_()
        for piece, changes in zip(matrix.slices, by_slice, strict=True):
            changes.append(_change_of(matrix, piece, sums, None if columns is None else columns[number]))
    return by_slice


def _sums_of(
    matrix: Matrix, sides: list[Side], dtype: torch.dtype, buffers: _Buffers, ended: threading.Event
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sums of differences taken in `dtype`, by row and, if a slice needs them, by column.

    Returns:
        By row and stretch of columns [checkpoints, 5, rows, stretches] (for squares, the square roots of the sums), and
        by column float64 [checkpoints, 4, columns] or None.
    """
    (first, last), width, device = matrix.span, matrix.shape[1], buffers.device
    checkpoints, norm = len(sides) - 1, torch.linalg.vector_norm
    rows = torch.empty(checkpoints, 5, last - first, width // matrix.stretch, dtype=dtype, device=device)
    columns = torch.zeros(checkpoints, 4, width, dtype=torch.float64, device=device) if matrix.by_column else None
    blocks = list(tensors.chunks(last - first, width, CHUNK if device.type == "cpu" else DEVICE_CHUNK))
    names = ("base", "difference", "squares")[: 3 if matrix.by_column else 2]
    work = [buffers.get(name, dtype, blocks[0][1], width, device=device) for name in names]

    def squares(values: torch.Tensor) -> torch.Tensor | None:
        return None if columns is None else torch.mul(values, values, out=work[2][: len(values)]).sum(0)

    with ExitStack() as stack:
        pairs = zip(sides, matrix.names, strict=True)
        readers = [stack.enter_context(closing(_Reader(side, name, matrix))) for side, name in pairs]
        size = blocks[0][1] * max(reader.row_bytes for reader in readers)
        file = buffers.get("file", torch.uint8, size, pin_memory=device.type == "cuda")
        for start, stop in blocks:
            if ended.is_set():
                raise CancelledError
            base_rows, difference = (buffer[: stop - start] for buffer in work[:2])
            stretches = difference.view(stop - start, -1, matrix.stretch)
            readers[0].read(first + start, first + stop, file, base_rows)
            base_norms, base_columns = norm(base_rows.view(stretches.shape), dim=2), squares(base_rows)
            for k, reader in enumerate(readers[1:]):
                sums = rows[k, :, start:stop].unbind()
                sums[BASE].copy_(base_norms)
                reader.read(first + start, first + stop, file, difference)
                norm(stretches, dim=2, out=sums[CKPT])
                ckpt_columns = squares(difference)
                difference.sub_(base_rows)
                norm(stretches, dim=2, out=sums[SQ])
                sq_columns = squares(difference)
                difference.abs_()
                torch.sum(stretches, 2, out=sums[ABS])
                torch.amax(stretches, 2, out=sums[MAX])
                if columns is not None:
                    columns[k] += torch.stack([difference.sum(0), sq_columns, base_columns, ckpt_columns])
    return rows.cpu(), None if columns is None else columns.cpu()


class _Reader:
    """Reads rows of one model's tensor.

    Memory-mapped files would save a copy, but network file systems serve them page by page, and a file that is cut
    short while it is being read kills the process.
    """

    def __init__(self, side: Side, name: str, matrix: Matrix):
        self.side, self.name, self.every, self.file = side, name, matrix.every, None
        self.dtype = side.stored.dtype(name)
        self.row_bytes = matrix.shape[1] * self.dtype.itemsize
        folder = side.stored.folder_of(name)
        if folder is not None:  # else the tensor is computed, or in a pickle
            self.path, self.first = os.path.join(folder.path, folder.shard_of(name)), folder.entry(name).start
            with self._told():
                self.file = os.open(self.path, os.O_RDONLY)

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror or error}") from None

    def read(self, start: int, stop: int, buffer: torch.Tensor, out: torch.Tensor) -> None:
        """Read rows `start` to `stop` into `out`, converted to its dtype; `buffer` takes the bytes of the file."""
        if self.file is None:
            values = _rows(self.side.stored, self.name, start, stop)
        else:
            buffer = buffer[: (stop - start) * self.row_bytes]
            self.fill(memoryview(buffer.numpy()), self.first + start * self.row_bytes)
            values = buffer.view(self.dtype).view(out.shape)
        values = values.to(out.device)  # copy first, convert on the device
        if self.every > 1:  # sort columns 0, 2, 4, .. before 1, 3, 5, ..
            out = out.view(stop - start, self.every, -1)
            values = values.view(stop - start, -1, self.every).transpose(1, 2)
        out.copy_(values)

    def fill(self, left: memoryview, position: int) -> None:
        """Fill the buffer `left` with bytes of the file from `position` on."""
        with self._told():
            while left:
                n = os.preadv(self.file, [left], position)
                if not n:
                    raise InputError(f"{self.path} was cut short while it was read; copy the model again")
                left, position = left[n:], position + n


def _rows(stored, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows of a tensor as a matrix; if it holds all experts, their rows follow one another."""
    shape = stored.shape(name)
    if len(shape) == 2:
        return stored.rows(name, start, stop)
    first, per_expert = start // shape[1], shape[1]
    experts = stored.rows(name, first, -(-stop // per_expert))
    return experts.reshape(-1, shape[2])[start - first * per_expert : stop - first * per_expert]


def _refuse_not_finite(side: Side, name: str, first_row: int, last_row: int) -> None:
    for start, stop in tensors.chunks(last_row - first_row, 8 * side.stored.shape(name)[-1]):
        if not tensors.is_finite(_rows(side.stored, name, first_row + start, first_row + stop)):
            raise InputError(f"{side.spec}: tensor {name} holds NaN or infinite values; the weights are damaged")


def _change_of(matrix: Matrix, piece: MatrixSlice, sums: torch.Tensor, columns: torch.Tensor | None) -> Change:
    """The change of one slice, from the sums of its matrix by row [5, rows, stretches] and by column [4, columns]."""
    first, cut = matrix.span[0], slice(piece.columns.start // matrix.stretch, piece.columns.stop // matrix.stretch)
    rows = piece.rows
    rows = slice(rows.start - first, rows.stop - first) if isinstance(rows, slice) else rows - first
    selected = sums[:, rows, cut]
    totals = selected[:MAX].sum((1, 2)).tolist()
    change = Change(math.prod(piece.size), *totals[: BASE + 1], selected[MAX].amax().item(), ckpt_sq=totals[CKPT])
    by_axis = [selected[:MAX].sum(2), None if columns is None else columns[:, piece.columns]]
    if piece.features:
        change.rows = by_axis[piece.dim][ABS].clone()
    if piece.heads:
        change.heads = Sums(change.n // piece.heads, by_axis[piece.axis].view(4, piece.heads, -1).sum(2))
    if piece.neurons:
        change.neurons = Sums(piece.size[1 - piece.axis], by_axis[piece.axis].float())
    return change


def _together(changes: list[Change]) -> Change:
    """The sums over several matrices of one projection, with the neurons in order."""
    if len(changes) == 1:
        return changes[0]
    whole = Change()
    for change in changes:
        for key in ("n", "sum_abs", "sum_sq", "base_sq", "ckpt_sq"):
            setattr(whole, key, getattr(whole, key) + getattr(change, key))
        whole.max_abs = max(whole.max_abs, change.max_abs)
    if changes[-1].rows is not None:
        whole.rows = torch.cat([change.rows for change in changes])
    if changes[-1].neurons is not None:
        whole.neurons = Sums(changes[-1].neurons.n, torch.cat([change.neurons.values for change in changes], 1))
    return whole
