"""How far checkpoints have moved from their base: sums over the weights of every projection, in one pass.

    found = changes(refs.model("build/base"), refs.run("build/run"))
    found[90][3]["gate_proj"].mean_abs        # mean |dW| of layer 3's gate projection at step 90

A matrix is read half a million entries at a time, the base's once for all checkpoints, and as many matrices at a time
as torch uses threads: memory depends neither on the size of the models nor on their number. Stretches of a row are
summed by themselves in float32, and added up in float64: sums are within 1e-6 of exact ones, and the number of threads
changes no bit. Differences are taken in float32 whatever the dtypes on disk, in float64 where one of them is float64.
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

# Entries of a matrix worked on at a time: many more fall out of the CPU's caches, many fewer cost more in calls than in
# arithmetic. A GPU wants larger pieces.
CHUNK, DEVICE_CHUNK = 1 << 19, 1 << 23
# At most, of all threads together: bytes of sums of the rows of matrices being read, and open files.
SUMS, FILES = 1 << 30, 512
THREADS = 16

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

    A projection that is several matrices has the sums over all of them: all experts of a mixture (rows and neurons
    expert by expert, then those of the FFN beside them), both steps of a latent attention. Layers that have a router
    have an entry `archs.ROUTER` more, and a layer without attention or without an FFN has none of its projections.

    Args:
        projections: only these (and the router, if named); default: all that the architecture has.
        rows: projections whose sums are also kept by output feature.
        device: where the differences are taken; tensors go there block by block.
        details: keep the sums by head (of projections that are one matrix) and by neuron, too: 16 bytes a neuron,
            projection, layer and checkpoint.

    Raises:
        InputError: another architecture, layer count or shape of what is compared, missing or damaged weights, NaN.
    """
    with matrices.opened(base, checkpoints) as sides:
        plan = matrices.plan(sides, projections, rows, details)
        for number, side in enumerate(sides):  # every shape was checked before the first weights are fetched or read
            side.stored.fetch({matrix.names[number] for matrix in plan})
        found: Changes = {ref.step: {layer: {} for layer in range(sides[0].n_layers)} for ref in checkpoints}
        if not found or not plan:
            return found
        bar = cli.progress(total=len(plan), desc="weights", unit="tensor")
        with bar, closing(_pass(plan, sides, device)) as done:
            for layer, group in groupby(done, key=lambda pair: pair[0].layer):
                parts: dict[tuple[int, str], list[Change]] = {}
                for matrix, by_slice in group:
                    for each, by_checkpoint in zip(matrix.slices, by_slice, strict=True):
                        for ref, change in zip(checkpoints, by_checkpoint, strict=True):
                            parts.setdefault((ref.step, each.projection), []).append(change)
                    bar.update()
                for step, layers in found.items():
                    names = sides[0].projections(layer, projections)
                    layers[layer] = {name: _together(parts[step, name]) for name in names}
    return found


def diff_tensors(base: refs.ModelRef, checkpoint: refs.ModelRef) -> dict[str, str]:
    """Tensors outside the layers that differ in shape, or that one side lacks: they are not compared. Name -> why."""
    with matrices.Side(base) as one, matrices.Side(checkpoint, base) as other:
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
    """The same with one entry for what one side has of a whole part that the other lacks, such as a vision tower."""
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


# ---------------------------------------------------------------- the pass


def _pass(
    plan: list[Matrix], sides: list[Side], device: torch.device | str
) -> Iterator[tuple[Matrix, list[list[Change]]]]:
    """Every matrix of a plan, in order, with the changes of each of its slices, of each checkpoint.

    A thread works on one matrix at a time. Once the caller is done, or there is an error, all stop at their next block.
    """
    sums = max((m.span[1] - m.span[0]) * m.shape[1] // m.stretch for m in plan) * 20 * (len(sides) - 1)
    threads = max(1, min(torch.get_num_threads(), THREADS, FILES // len(sides), SUMS // sums))
    buffers, ended = _Buffers(torch.device(device)), threading.Event()
    with _one_thread_each(), ThreadPoolExecutor(threads) as pool:
        try:
            each = pool.map if threads > 1 else map  # one thread for itself would only be waited for
            yield from zip(plan, each(lambda matrix: _changes_of(matrix, sides, buffers, ended), plan), strict=True)
        finally:
            ended.set()
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Inside, torch computes in the thread that calls it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Buffers(threading.local):
    """Memory that a thread uses again and again: to get it anew for every matrix takes as long as the arithmetic."""

    def __init__(self, device: torch.device):
        self.device, self.held = device, {}

    def get(self, name: str, dtype: torch.dtype, *shape: int, **options) -> torch.Tensor:
        """The buffer of that name as a tensor of this shape."""
        size = math.prod(shape)
        if (name, dtype) not in self.held or self.held[name, dtype].numel() < size:
            self.held[name, dtype] = torch.empty(size, dtype=dtype, **options)
        return self.held[name, dtype][:size].view(shape)


def _changes_of(matrix: Matrix, sides: list[Side], buffers: _Buffers, ended: threading.Event) -> list[list[Change]]:
    """The changes of each slice of a matrix, of each checkpoint.

    Raises:
        InputError: sums are not finite, and neither is what was read.
    """
    wide = any(side.stored.dtype(name) == torch.float64 for side, name in zip(sides, matrix.names, strict=True))
    for dtype in (torch.float64,) if wide else (torch.float32, torch.float64):  # squares beyond the range of float32
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
    found: list[list[Change]] = [[] for _ in matrix.slices]
    for number, sums in enumerate(rows):
        sums = sums.double()
        sums[SQ : CKPT + 1].square_()
        for each, changes in zip(matrix.slices, found, strict=True):
            changes.append(_change_of(matrix, each, sums, None if columns is None else columns[number]))
    return found


def _sums_of(
    matrix: Matrix, sides: list[Side], dtype: torch.dtype, buffers: _Buffers, ended: threading.Event
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sums of differences taken in `dtype`, of each row and, where a slice needs them, of each column.

    Returns:
        Of each row, in stretches of columns: [checkpoints, 5, rows, stretches] (of squares the roots of the sums), and
        of each column float64 [checkpoints, 4, columns] or None.
    """
    (first, last), width, device = matrix.span, matrix.shape[1], buffers.device
    checkpoints, norm = len(sides) - 1, torch.linalg.vector_norm
    rows = torch.empty(checkpoints, 5, last - first, width // matrix.stretch, dtype=dtype, device=device)
    columns = torch.zeros(checkpoints, 4, width, dtype=torch.float64, device=device) if matrix.by_column else None
    blocks = list(tensors.chunks(last - first, width, CHUNK if device.type == "cpu" else DEVICE_CHUNK))
    names = ("ours", "moved", "squares")[: 3 if matrix.by_column else 2]
    held = [buffers.get(name, dtype, blocks[0][1], width, device=device) for name in names]

    def squares(values: torch.Tensor) -> torch.Tensor | None:
        return None if columns is None else torch.mul(values, values, out=held[2][: len(values)]).sum(0)

    with ExitStack() as stack:
        pairs = zip(sides, matrix.names, strict=True)
        readers = [stack.enter_context(closing(_Reader(side, name, matrix))) for side, name in pairs]
        size = blocks[0][1] * max(reader.row_bytes for reader in readers)
        file = buffers.get("file", torch.uint8, size, pin_memory=device.type == "cuda")
        for start, stop in blocks:
            if ended.is_set():
                raise CancelledError
            ours, moved = (buffer[: stop - start] for buffer in held[:2])
            stretches = moved.view(stop - start, -1, matrix.stretch)
            readers[0].read(first + start, first + stop, file, ours)
            base, base_columns = norm(ours.view(stretches.shape), dim=2), squares(ours)
            for k, reader in enumerate(readers[1:]):
                sums = rows[k, :, start:stop].unbind()
                sums[BASE].copy_(base)
                reader.read(first + start, first + stop, file, moved)
                norm(stretches, dim=2, out=sums[CKPT])
                ckpt_columns = squares(moved)
                moved.sub_(ours)
                norm(stretches, dim=2, out=sums[SQ])
                sq_columns = squares(moved)
                moved.abs_()
                torch.sum(stretches, 2, out=sums[ABS])
                torch.amax(stretches, 2, out=sums[MAX])
                if columns is not None:
                    columns[k] += torch.stack([moved.sum(0), sq_columns, base_columns, ckpt_columns])
    return rows.cpu(), None if columns is None else columns.cpu()


class _Reader:
    """Rows of one model's tensor.

    Mapped files would save a copy, but a network's file system serves them page by page, and a file that is cut while
    it is being read kills the process.
    """

    def __init__(self, side: Side, name: str, matrix: Matrix):
        self.side, self.name, self.every, self.file = side, name, matrix.every, None
        self.dtype = side.stored.dtype(name)
        self.row_bytes = matrix.shape[1] * self.dtype.itemsize
        folder = side.stored.folder_of(name)
        if folder is not None:  # else computed, or in a pickle
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
        """Rows `start` to `stop`, converted to `out`; `buffer` holds the bytes of a file meanwhile."""
        if self.file is None:
            found = _rows(self.side.stored, self.name, start, stop)
        else:
            buffer = buffer[: (stop - start) * self.row_bytes]
            self.fill(memoryview(buffer.numpy()), self.first + start * self.row_bytes)
            found = buffer.view(self.dtype).view(out.shape)
        found = found.to(out.device)  # copied first, converted there
        if self.every > 1:  # columns 0, 2, 4, .. before 1, 3, 5, ..
            out = out.view(stop - start, self.every, -1)
            found = found.view(stop - start, -1, self.every).transpose(1, 2)
        out.copy_(found)

    def fill(self, left: memoryview, position: int) -> None:
        """Read as many bytes as there is room for, from `position` of the file."""
        with self._told():
            while left:
                n = os.preadv(self.file, [left], position)
                if not n:
                    raise InputError(f"{self.path} was cut short while it was read; copy the model again")
                left, position = left[n:], position + n


def _rows(stored, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows of a tensor as a matrix: of one that holds all experts, those of one expert after the other."""
    shape = stored.shape(name)
    if len(shape) == 2:
        return stored.rows(name, start, stop)
    first, each = start // shape[1], shape[1]
    experts = stored.rows(name, first, -(-stop // each))
    return experts.reshape(-1, shape[2])[start - first * each : stop - first * each]


def _refuse_not_finite(side: Side, name: str, first: int, last: int) -> None:
    for start, stop in tensors.chunks(last - first, 8 * side.stored.shape(name)[-1]):
        if not tensors.is_finite(_rows(side.stored, name, first + start, first + stop)):
            raise InputError(f"{side.spec}: tensor {name} holds NaN or infinite values; the weights are damaged")


def _change_of(matrix: Matrix, each: MatrixSlice, sums: torch.Tensor, columns: torch.Tensor | None) -> Change:
    """One slice's change, from the sums of its matrix by row [5, rows, stretches] and by column [4, columns]."""
    first, cut = matrix.span[0], slice(each.columns.start // matrix.stretch, each.columns.stop // matrix.stretch)
    rows = slice(each.rows.start - first, each.rows.stop - first) if isinstance(each.rows, slice) else each.rows - first
    part = sums[:, rows, cut]
    totals = part[:MAX].sum((1, 2)).tolist()
    change = Change(math.prod(each.size), *totals[: BASE + 1], part[MAX].amax().item(), ckpt_sq=totals[CKPT])
    along = [part[:MAX].sum(2), None if columns is None else columns[:, each.columns]]
    if each.features:
        change.rows = along[each.dim][ABS].clone()
    if each.heads:
        change.heads = Sums(change.n // each.heads, along[each.axis].view(4, each.heads, -1).sum(2))
    if each.neurons:
        change.neurons = Sums(each.size[1 - each.axis], along[each.axis].float())
    return change


def _together(changes: list[Change]) -> Change:
    """The sums over several matrices of one projection, its neurons in their order."""
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
