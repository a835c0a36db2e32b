"""Writing model folders: laid out like an existing one, copied by the kernel where bytes stay, read back, renamed last.

Where the file system shares blocks between files (btrfs, xfs), the kernel's copy is such a share and moves no bytes.

The engine in `surgery` says what every tensor holds; this module gets those bytes to disk. A folder that has its final
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

RECORD = "swap.json"  # what was written and from what; in every finished folder
MARKER = ".unfinished"  # in a folder that is being written: it is ours, and not complete
COMPARED = 1 << 20  # bytes compared at a time: two such buffers stay in the processor's cache
# Where the kernel cannot copy between two files: other file systems, old kernels, sandboxes.
NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)

# Tensor name -> its bytes in order, for tensors that are not copied from a file.
Contents = Callable[[str], Iterator[memoryview]]


@dataclass(frozen=True)
class WeightFile:
    """One weight file to write. `like` is an existing file with the same layout; None where that is not safetensors."""

    name: str
    head: bytes
    entries: dict[str, headers.Entry]
    like: Path | None

    @property
    def size(self) -> int:
        return max((entry.stop for entry in self.entries.values()), default=len(self.head))


@dataclass(frozen=True)
class Span:
    """Consecutive bytes of a file and where they come from: bytes of another file, or the contents of `tensor`."""

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
    """The file as spans in order; neighbours that come from the same bytes of the same file become one.

    `elsewhere(tensor, entry)` says where a tensor's bytes are: (file, position), True for "as in `like`", or None when
    its contents are computed.
    """
    found: list[Span] = []

    def add(span: Span) -> None:
        last = found[-1] if found else None
        joins = last and span.source and last.source == span.source and last.stop == span.start
        if joins and span.source_start - span.start == last.source_start - last.start:
            found[-1] = Span(last.start, span.stop, last.source, last.source_start)
        else:
            found.append(span)

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
    return found


# --- bytes ---


def write_files(
    files: Iterator[WeightFile], parts: dict[str, list[Span]], contents: Contents, folder: Path, bar
) -> None:
    """Write weight files into `folder`; each goes to the disk and is read back by threads while the next is written.

    Raises:
        InputError, OSError: from writing, reading back or flushing; all threads have ended then.
    """
    with ThreadPoolExecutor(2) as threads:
        jobs = []
        try:
            for file in files:
                path = folder / file.name
                digests = write_file(file, parts[file.name], contents, path, bar)
                jobs.append(threads.submit(_sync, path))
                jobs.append(threads.submit(verify_file, file, parts[file.name], digests, path, bar))
            for job in jobs:
                job.result()
        finally:
            threads.shutdown(cancel_futures=True)


def write_file(file: WeightFile, parts: list[Span], contents: Contents, path: Path, bar) -> dict[str, bytes]:
    """Write one weight file; `bar` counts the bytes. Returns the hash of each tensor whose contents were computed."""
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
    """Read a written file back: its header, and every byte of every tensor against that tensor's source.

    What was computed is compared by the hash that it had when it was handed to the disk.

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
    """Copy bytes from file to file inside the kernel; where that is not possible, through a small buffer."""
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


def _same_bytes(one: int, at: int, other: int, start: int, length: int, bar) -> bool:
    first, second = bytearray(min(length, COMPARED)), bytearray(min(length, COMPARED))
    while length:
        step = min(length, COMPARED)
        if step < len(first):
            first, second = bytearray(step), bytearray(step)
        if os.preadv(one, [first], at) != step or os.preadv(other, [second], start) != step or first != second:
            return False
        at, start, length = at + step, start + step, length - step
        bar.update(step)
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
    """A fresh `<out>.partial` to write into, locked and marked as ours; renamed to `out` when the block ends well.

    The block must write `RECORD` last. A failed block leaves nothing behind. A killed process leaves the .partial,
    which the next call recognises by its marker and removes. A finished `out` is replaced only by a complete folder.

    Raises:
        InputError: another process is writing `out`, or something foreign has the name of the .partial.
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
        _lock(marker, partial)  # only who holds the lock may remove the folder
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
    """Remove what a killed write of `out` left behind.

    Raises:
        InputError: another process is writing it, or it is not ours.
    """
    partial = partial_of(out)
    if partial.is_symlink() or partial.exists():
        names = os.listdir(partial) if partial.is_dir() and not partial.is_symlink() else None
        # A record without a marker is a complete folder whose writer was killed just before the last rename.
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
    """Raise InputError unless the file system of `out` has `needed` bytes left."""
    there = next(path for path in (out, *out.parents) if path.is_dir())
    free = free_bytes(there)
    if free < needed:
        raise InputError(
            f"not enough disk space for {out}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; free some and "
            "run the same command again"
        )


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user may still write."""
    return shutil.disk_usage(folder).free


def _lock(marker: int, partial: Path) -> None:
    # Without locks on the file system the rename at the end is still all or nothing.
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
    """Remove a folder of ours, what identifies it as ours last: a kill in between leaves it recognisable."""
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
