"""The weight files in a folder and the headers of safetensors files, read and checked.

Wrong sizes in a header, an index that points outside its folder, and two different sets of weights in one folder are
errors in one line.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import formats
from cpt_utils.checkpoints.formats import BIN_INDEX, BIN_SINGLE, INDEX, SINGLE

# safetensors dtype -> (torch dtype, bytes per element)
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
BITS = {name: 8 * size for name, (_, size) in DTYPES.items()} | formats.ONLY_NAMED  # per entry
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
MOST_DIMENSIONS = 16


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: its dtype as the format spells it, its shape, and its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file, checked against its size: entries in the order of their bytes."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file.

    Raises:
        InputError: no such file, or it is truncated or damaged, or its header does not describe its bytes.
    """
    formats.refuse_pointer(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            return parse_header(start + file.read(header_length(start, size, path)), size, path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def header_length(start: bytes, size: int, path: Path | str) -> int:
    """The length of the JSON in a safetensors file of `size` bytes whose first eight bytes are `start`."""
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    if len(start) < 8 or length > min(size - 8, LARGEST_HEADER):
        raise InputError(
            f"{path} is cut short or damaged ({size} bytes, less than its header); copy it again{_cut_off(path)}"
        )
    return length


def parse_header(data: bytes, size: int, path: Path | str) -> Header:
    """The header in the first bytes `data` of a safetensors file of `size` bytes; `path` is for messages."""
    length = header_length(data, size, path)
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_no_doubles)
    except (ValueError, RecursionError):
        raise InputError(f"{path} has a damaged safetensors header; copy the file again") from None
    try:
        metadata = header.pop("__metadata__", None) or {}
        entries = {name: _entry(fields, 8 + length) for name, fields in header.items()}
        metadata = dict(metadata)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} has a safetensors header that does not describe tensors ({error})") from None
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    position = 8 + length
    for name, entry in entries.items():
        if entry.start != position:
            raise InputError(
                f"{path}: the header places {name} at byte {entry.start}, where {position} comes next; it is damaged, "
                "copy the file again"
            )
        position = entry.stop
    if position != size:
        what = "cut short" if size < position else "longer than its header says"
        again = f"copy or download the file again{_cut_off(path)}"
        raise InputError(f"{path} is {what}: {size} bytes, {position} expected; {again}")
    return Header(entries, metadata)


def _cut_off(path: Path | str) -> str:
    return formats.cut_off(Path(path).parent)


def _no_doubles(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object, refused if a key appears twice: readers differ in which value they take."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key appears twice")
    return values


def _entry(fields: dict, data_start: int) -> Entry:
    shape = tuple(fields["shape"])
    start, stop = fields["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)) or len(shape) > MOST_DIMENSIONS:
        raise ValueError("negative or broken sizes")
    bits = BITS.get(fields["dtype"])
    if bits is None:
        raise ValueError(f"dtype {fields['dtype']}, which is not one of {', '.join(BITS)}")
    size = bits * math.prod(shape) // 8
    if stop - start != size:
        raise ValueError(f"{stop - start} bytes for a tensor of {size}")
    return Entry(fields["dtype"], shape, data_start + start, data_start + stop)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name.

    Raises:
        InputError: a dtype that this package does not compute with.
    """
    if name not in DTYPES:
        raise InputError(f"tensors of dtype {name} are not read here; convert the model to {', '.join(DTYPES)}")
    return getattr(torch, DTYPES[name][0])


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    for name, (spelled, _) in DTYPES.items():
        if str(dtype) == f"torch.{spelled}":
            return name
    raise InputError(f"tensors of {dtype} cannot be stored as safetensors; convert the model first")


def inventory(folder: Path, spec: str, names: Collection[str] | None) -> tuple[str, list[str], dict[str, str] | None]:
    """(kind, files in order, tensor -> file); the last is None for a single file, which lists its tensors itself.

    `names`: all files of the hub model `spec`, of which only some are in the folder.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        _refuse_two_sets(folder)
    if single.is_file():
        return "safetensors", [SINGLE], None
    if index.is_file():
        return "safetensors", *read_index(index)
    if (folder / BIN_SINGLE).is_file():
        return "bin", [BIN_SINGLE], None
    if (folder / BIN_INDEX).is_file():
        return "bin", *read_index(folder / BIN_INDEX)
    if names is None:
        raise InputError(formats.no_weights(folder, formats.listing(folder)))
    raise InputError(formats.no_weights(spec, names))


def read_index(index: Path) -> tuple[list[str], dict[str, str]]:
    """(shards in order, tensor -> shard) of a `model.safetensors.index.json` or `pytorch_model.bin.index.json`.

    Raises:
        InputError: it is damaged, or names anything but weight files in its own folder.
    """
    formats.refuse_pointer(index)
    suffix = f".{index.name.split('.')[1]}"
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_no_doubles)["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f"{index} is not an index of shards (damaged JSON, or no weight_map); copy the model again"
        ) from None
    for file in files:
        plain = isinstance(file, str) and file == os.path.basename(file) and file.isprintable() and "\\" not in file
        if not plain or not file.endswith(suffix):
            raise InputError(f"{index} names {file!r}, which is not a {suffix} file of its own folder; refused")
    if not files:
        raise InputError(f"{index} names no shards; copy the model again")
    return files, weight_map


def _refuse_two_sets(folder: Path) -> None:
    """Refuse two sets of weights in one folder unless they are the same: it is unclear which one is meant.

    Loaders take `model.safetensors` and silently ignore shards that were saved into its folder later.
    """
    files, weight_map = read_index(folder / INDEX)
    if files == [SINGLE]:
        return
    shards = [file for file in files if (folder / file).is_file()]
    if not shards:
        cli.warn(f"{folder}: {INDEX} names shards that do not exist; {SINGLE} is used, as in loaders")
        return
    hint = f"remove {SINGLE}, or {INDEX} and its shards"
    whole = read_header(folder / SINGLE).entries
    if len(shards) < len(files) or set(whole) != set(weight_map):
        raise InputError(f"{folder} holds {SINGLE} and also an index of other shards; loaders take the first: {hint}")
    for file in files:
        for name, entry in read_header(folder / file).entries.items():
            if name not in whole or not _same_sample(folder / SINGLE, whole[name], folder / file, entry):
                raise InputError(f"{folder}: {SINGLE} and the shards of {INDEX} differ ({name}): {hint}")


def _same_sample(path_a: Path, a: Entry, path_b: Path, b: Entry) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    size, block = a.stop - a.start, 4096
    with open(path_a, "rb") as file_a, open(path_b, "rb") as file_b:
        for position in {0, size // 2, max(0, size - block)}:
            file_a.seek(a.start + position)
            file_b.seek(b.start + position)
            length = min(block, size - position)
            if file_a.read(length) != file_b.read(length):
                return False
    return True
