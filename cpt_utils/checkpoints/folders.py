"""Writing model folders: laid out like an existing one, unchanged bytes copied by the kernel, read back, renamed last.

If the file system shares blocks between files (btrfs, xfs), the kernel's copy shares them and moves no bytes.

The engine in `surgery` provides the contents of every tensor; this module writes them to disk. A folder with its final
name is complete and was compared with its sources; a killed or failed write leaves nothing that looks finished.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import cli, locks
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import formats, headers, tensors

RECORD = "swap.json"  # what was written, and its sources; in every finished folder
MARKER = ".unfinished"  # in a folder that these scripts are writing and that is not complete
COMPARED = 1 << 20  # bytes compared at a time: two such buffers fit into the processor's cache
# Errors if the kernel cannot copy between two files: other file systems, old kernels, sandboxes.
NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)

# Tensor name -> its bytes in order, for tensors that are computed rather than copied from a file.
Contents = Callable[[str], Iterator[memoryview]]


@dataclass(frozen=True)
class WeightFile:
    """One weight file to write. `like` is an existing safetensors file with the same layout, if any."""

    name: str
    head: bytes
    entries: dict[str, headers.Entry]
    like: Path | None

    @property
    def size(self) -> int:
        return max((entry.stop for entry in self.entries.values()), default=len(self.head))


@dataclass(frozen=True)
class Span:
    """Consecutive bytes of a file and their origin: bytes of another file, or the contents of `tensor`."""

    start: int
    stop: int
    source: Path | None = None
    source_start: int = 0
    tensor: str = ""


# --- layout ---


def layout_of(folder: tensors.TensorFolder) -> tuple[list[WeightFile], dict | None]:
    """The weight files of `folder`, as safetensors, and the index (None for a single file)."""
    if folder.kind == "safetensors":
        files = []
        for name in folder.files:
            path = folder.path / name
            entries = folder.header(name).entries
            with open(path, "rb") as file:
                head = file.read(min((entry.start for entry in entries.values()), default=path.stat().st_size))
            files.append(WeightFile(name, head, entries, path))
        if folder.files == [formats.SINGLE]:
            return files, None
        return files, json.loads((folder.path / formats.INDEX).read_text(encoding="utf-8"))
    files, weight_map = [], {}
    for name in folder.files:
        new = name.replace("pytorch_model", "model").removesuffix(".bin").removesuffix(".safetensors") + ".safetensors"
        held = [tensor for tensor in folder.names() if folder.shard_of(tensor) == name]
        head, entries = new_layout({tensor: (folder.dtype(tensor), folder.shape(tensor)) for tensor in held})
        files.append(WeightFile(new, head, entries, None))
        weight_map |= dict.fromkeys(held, new)
    if len(files) == 1:
        return files, None
    total = sum(entry.stop - entry.start for file in files for entry in file.entries.values())
    return files, {"metadata": {"total_size": total}, "weight_map": weight_map}


def new_layout(held: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, headers.Entry]]:
    """Header bytes and entries of a new safetensors file: wide dtypes first, so that every tensor is aligned."""
    header: dict = {"__metadata__": {"format": "pt"}}
    position, layout = 0, {}
    for name, (dtype, shape) in sorted(held.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        size = math.prod(shape) * dtype.itemsize
        spelled = headers.dtype_name(dtype)
        header[name] = {"dtype": spelled, "shape": list(shape), "data_offsets": [position, position + size]}
        layout[name] = (spelled, shape, position, position + size)
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    entries = {
        name: headers.Entry(spelled, shape, first + start, first + stop)
        for name, (spelled, shape, start, stop) in layout.items()
    }
    return struct.pack("<Q", len(text)) + text, entries


def spans(file: WeightFile, elsewhere: Callable[[str, headers.Entry], tuple[Path, int] | bool | None]) -> list[Span]:
    """The file as spans in order; adjacent spans that are adjacent in the same source file are joined.

    `elsewhere(tensor, entry)` returns the source of a tensor's bytes: (file, position), True for the same place in
    `like`, or None if its contents are computed.
    """
    joined: list[Span] = []

    def add(span: Span) -> None:
        last = joined[-1] if joined else None
        joins = last and span.source and last.source == span.source and last.stop == span.start
        if joins and span.source_start - span.start == last.source_start - last.start:
            joined[-1] = Span(last.start, span.stop, last.source, last.source_start)
        else:
            joined.append(span)

    if file.like is not None:
        add(Span(0, len(file.head), file.like, 0))
    for name, entry in file.entries.items():
        if entry.start == entry.stop:
            continue
        origin = elsewhere(name, entry)
        if origin is True and file.like is not None:
            add(Span(entry.start, entry.stop, file.like, entry.start))
        elif isinstance(origin, tuple):
            add(Span(entry.start, entry.stop, *origin))
        else:
            add(Span(entry.start, entry.stop, tensor=name))
    return joined


# --- bytes ---


def write_files(
    files: Iterator[WeightFile], parts: dict[str, list[Span]], contents: Contents, folder: Path, bar
) -> None:
    """Write weight files into `folder`; threads flush each to disk and read it back while the next is written.

    Raises:
        InputError, OSError: from writing, reading back or flushing, after all threads have ended.
    """
    with ThreadPoolExecutor(2) as threads:
        pending = []
        try:
            for file in files:
                path = folder / file.name
                digests = write_file(file, parts[file.name], contents, path, bar)
                pending.append(threads.submit(_sync, path))
                pending.append(threads.submit(verify_file, file, parts[file.name], digests, path, bar))
            for job in pending:
                job.result()
        finally:
            threads.shutdown(cancel_futures=True)


def write_file(file: WeightFile, parts: list[Span], contents: Contents, path: Path, bar) -> dict[str, bytes]:
    """Write one weight file; `bar` counts the bytes. Returns the hash of each tensor with computed contents."""
    digests: dict[str, bytes] = {}
    with open(path, "wb") as sink:
        handle = sink.fileno()
        if file.like is None:
            _write_all(handle, file.head, 0)
        for span in parts:
            if span.source is not None:
                with open(span.source, "rb") as source:
                    _copy_range(source.fileno(), span.source_start, handle, span.start, span.stop - span.start, bar)
                continue
            position, digest = span.start, hashlib.sha256()
            for data in contents(span.tensor):
                digest.update(data)
                _write_all(handle, data, position)
                position += len(data)
                bar.update(len(data))
            digests[span.tensor] = digest.digest()
    return digests


def verify_file(file: WeightFile, parts: list[Span], digests: dict[str, bytes], path: Path, bar) -> None:
    """Read a written file back, and compare its header with the plan and every byte of every tensor with its source.

    Computed contents are compared with the hash that they had when they were written.

    Raises:
        InputError: anything differs.
    """
    if headers.read_header(path).entries != file.entries:
        raise InputError(f"{path} was not written as planned; check the disk")
    with open(path, "rb") as copy:
        for span in parts:
            if span.source is None:
                same = _digest(copy.fileno(), span.start, span.stop, bar) == digests[span.tensor]
            else:
                with open(span.source, "rb") as source:
                    starts = source.fileno(), span.source_start, copy.fileno(), span.start
                    same = _same_bytes(*starts, span.stop - span.start, bar)
            if not same:
                raise InputError(f"{path}: what was written differs from its source when read back; check the disk")


def _copy_range(source: int, source_start: int, sink: int, start: int, length: int, bar) -> None:
    """Copy bytes from file to file inside the kernel; if that is not possible, through a small buffer."""
    by_kernel = True
    while length:
        if by_kernel:
            try:
                done = os.copy_file_range(source, sink, min(length, 64 << 20), source_start, start)
            except OSError as error:
                if error.errno not in NO_KERNEL_COPY:
                    raise
                by_kernel = False
                continue
        else:
            data = os.pread(source, min(length, 4 << 20), source_start)
            _write_all(sink, data, start)
            done = len(data)
        if not done:
            raise InputError("a weight file became shorter while it was being copied; is another process writing it?")
        source_start, start, length = source_start + done, start + done, length - done
        bar.update(done)


def _write_all(sink: int, data, position: int) -> None:
    view = memoryview(data)
    while len(view):
        done = os.pwrite(sink, view, position)
        view, position = view[done:], position + done


def _same_bytes(a: int, a_start: int, b: int, b_start: int, length: int, bar) -> bool:
    a_block, b_block = bytearray(min(length, COMPARED)), bytearray(min(length, COMPARED))
    while length:
        n = min(length, COMPARED)
        if n < len(a_block):
            a_block, b_block = bytearray(n), bytearray(n)
        if os.preadv(a, [a_block], a_start) != n or os.preadv(b, [b_block], b_start) != n or a_block != b_block:
            return False
        a_start, b_start, length = a_start + n, b_start + n, length - n
        bar.update(n)
    return True


def _digest(copy: int, start: int, stop: int, bar) -> bytes:
    digest, buffer = hashlib.sha256(), bytearray(min(stop - start, COMPARED))
    while start < stop:
        done = os.preadv(copy, [memoryview(buffer)[: stop - start]], start)
        if not done:
            break  # too short: the hash cannot agree
        digest.update(memoryview(buffer)[:done])
        start += done
        bar.update(done)
    return digest.digest()


# --- folders ---


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A new `<out>.partial` to write into, locked and with `MARKER`; renamed to `out` if the block succeeds.

    The block must write `RECORD` last. A failed block leaves nothing behind. A killed process leaves the .partial,
    which the next call recognises by its marker and removes. A finished `out` is replaced only by a complete folder.

    Raises:
        InputError: another process is writing `out`, or the .partial was not made by this function.
    """
    partial = partial_of(out)
    remove_unfinished(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
        marker = os.open(partial / MARKER, os.O_CREAT | os.O_RDWR, 0o644)
    except (FileExistsError, FileNotFoundError):
        raise InputError(f"{partial}: another process has just begun to write it; wait for it to end") from None
    try:
        _lock(marker, partial)  # only the holder of the lock may remove the folder
        try:
            yield partial
            for name in os.listdir(partial):
                _sync(partial / name)
            _finish(partial, out)
        except BaseException:
            _discard(partial)
            raise
    finally:
        os.close(marker)


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def remove_unfinished(out: Path) -> None:
    """Remove the remains of a killed write of `out`.

    Raises:
        InputError: another process is writing them, or these scripts did not make them.
    """
    partial = partial_of(out)
    if partial.is_symlink() or partial.exists():
        names = os.listdir(partial) if partial.is_dir() and not partial.is_symlink() else None
        # With a record and no marker the folder is complete; its writer was killed just before the last rename.
        if names is None or (names and MARKER not in names and RECORD not in names):
            raise InputError(f"{partial} is in the way and was not written by these scripts; move it elsewhere")
        if MARKER in names:
            marker = os.open(partial / MARKER, os.O_RDWR)
            try:
                _lock(marker, partial)
            finally:
                os.close(marker)
        cli.say(f"removing the unfinished {partial.name}/ of an earlier run")
        _discard(partial)
    if (_replaced(out) / RECORD).is_file():
        _discard(_replaced(out))


def refuse_full_disk(out: Path, needed: int) -> None:
    """Raise InputError unless the file system of `out` has `needed` free bytes."""
    existing = next(path for path in (out, *out.parents) if path.is_dir())
    free = free_bytes(existing)
    if free < needed:
        raise InputError(
            f"not enough disk space for {out}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; free some and "
            "run the same command again"
        )


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user may still write."""
    return shutil.disk_usage(folder).free


def _lock(marker: int, partial: Path) -> None:
    # On a file system without locks, the rename at the end is still all or nothing.
    if not locks.take(marker):
        raise InputError(f"{partial}: another process is writing it; wait for it to end")


def _finish(partial: Path, out: Path) -> None:
    (partial / MARKER).unlink()
    _sync(partial)
    old = _replaced(out)
    if out.is_dir() and any(out.iterdir()):
        if not (out / RECORD).is_file():
            raise InputError(f"{out} was filled by something else in the meantime; choose another folder")
        os.rename(out, old)
    os.rename(partial, out)
    _sync(out.parent)
    if old.is_dir():
        _discard(old)


def _replaced(out: Path) -> Path:
    return out.with_name(out.name + ".replaced")


def _discard(folder: Path) -> None:
    """Remove a folder that these scripts made, marker and record last: after a kill it is still recognisable."""
    if not folder.is_dir():
        return
    for name in sorted(os.listdir(folder), key=lambda name: name in (MARKER, RECORD)):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    folder.rmdir()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
