"""Tensors of a model folder, read by name, one memory-mapped shard at a time; never a whole model in memory.

    with opening.open_folder("build/model") as stored:
        weight = stored.get("model.layers.0.mlp.up_proj.weight")     # pages come from the file when they are touched

Of a hub model, `lazy`, a shard is fetched when a tensor of it is first read; a LoRA adapter opens as base and adapter
merged. Every file is checked before its first tensor is used: a header that lies about sizes, a shard that is not there
and an index or a link that points outside its folder are errors in one line. Nothing but plain tensors is unpickled.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Collection, Container, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import formats
from cpt_utils.checkpoints.formats import BIN_INDEX, BIN_SINGLE, INDEX, SINGLE

if TYPE_CHECKING:
    import torch

    from cpt_utils.checkpoints.refs import ModelRef

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
BITS = {name: 8 * size for name, (_, size) in DTYPES.items()} | formats.ONLY_NAMED  # of an entry
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
FIRST_BYTES = 1 << 17  # of a remote file asked for at first: most headers are shorter
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
    """What a safetensors file says it holds, checked against its size: entries in the order of their bytes."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file.

    Raises:
        InputError: no such file, or one that is cut short, damaged, or whose header does not describe its bytes.
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
    """Bytes of the JSON in a safetensors file of `size` bytes whose first eight are `start`."""
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
                f"{path}: the header places {name} at byte {entry.start}, where {position} is next; damaged"
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
    """A JSON object, refused where a key comes twice: readers differ in which one they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _entry(fields: dict, data_start: int) -> Entry:
    shape = tuple(fields["shape"])
    start, stop = fields["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)) or len(shape) > MOST_DIMENSIONS:
        raise ValueError("negative or broken sizes")
    bits = BITS.get(fields["dtype"])
    if bits is None:
        raise ValueError(f"dtype {fields['dtype']}, which is not one of {', '.join(BITS)}")
    size = bits * numel(shape) // 8
    if stop - start != size:
        raise ValueError(f"{stop - start} bytes for a tensor of {size}")
    return Entry(fields["dtype"], shape, data_start + start, data_start + stop)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name.

    Raises:
        InputError: one that nothing here computes with.
    """
    import torch

    if name not in DTYPES:
        raise InputError(f"tensors of dtype {name} are not read here; convert the model to {', '.join(DTYPES)}")
    return getattr(torch, DTYPES[name][0])


@lru_cache(maxsize=1)
def _names_of_dtypes() -> dict:
    return {torch_dtype(name): name for name in DTYPES}


def dtype_name(dtype: torch.dtype) -> str:
    """How safetensors spells a torch dtype."""
    try:
        return _names_of_dtypes()[dtype]
    except KeyError:
        raise InputError(f"tensors of {dtype} cannot be stored as safetensors; convert the model first") from None


class TensorFolder:
    """The tensors of one model folder, by their names on disk.

    At most one shard is open (memory-mapped) at a time; tensors got from it keep their own hold on it. A tensor is a
    view of the file: do not write into it. `lazy`: see `opening.open_folder`, which also refuses what this class reads
    as it is: quantised weights, and files of another model than config.json says. Pickles are fetched at once.

    Attributes:
        quantised: what the codes in the files are, in words, once `refuse_unfit` has seen some.

    Raises:
        InputError: on opening, when there is no such folder or no complete set of weights in it.
    """

    def __init__(self, where: ModelRef | str | os.PathLike, lazy: bool = False):
        self._remote: ModelRef | None = None
        self._names = None  # of all files of a hub model
        if hasattr(where, "folder"):
            self.spec = where.spec
            if lazy and not where.is_local and {SINGLE, INDEX} & where.names:
                self._remote = where
                self.path = Path(where.fetch(["config.json", *([] if SINGLE in where.names else [INDEX])]))
            else:
                self.path = Path(where.folder((*formats.WEIGHT_PATTERNS, "config.json")))
            self._names = None if where.is_local else where.names
        else:
            self.spec = os.fspath(where)
            self.path = Path(where)
        if not self.path.is_dir():
            raise InputError(f"{self.spec}: no such folder")
        self._lock = threading.Lock()
        self.quantised: str | None = None
        self._watch: bool | None = None  # whether codes are refused in what is opened; None: nothing is looked for
        self._headers: dict[str, Header] = {}
        self._open: tuple[str, object] | None = None
        try:
            self.kind, self.files, self._shard_of = self._look()
            self._refuse_unfit()
        except OSError as error:  # a folder without permission, a name that is too long
            raise InputError(f"{self.path} cannot be read: {error.strerror or error}") from None
        if self._shard_of is None:
            self._shard_of = dict.fromkeys(self._names_in(self.files[0]), self.files[0])

    def _refuse_unfit(self) -> None:
        """Refuse files that are not there, nor in the hub's repository.

        Links are followed: people keep weights on other disks.
        """
        there = self._remote.names if self._remote else ()
        for file in self.files:
            if not (self.path / file).is_file() and file not in there:
                raise InputError(
                    f"{self.path}: the index names the shard {file}, which is not there; copy or download it again"
                    f"{formats.cut_off(self.path)}"
                )

    def _look(self) -> tuple[str, list[str], dict[str, str] | None]:
        """(kind, files in order, tensor -> file; None when there is a single file, which says it itself)."""
        if self._remote and SINGLE in self._remote.names:
            return "safetensors", [SINGLE], None
        return _inventory(self.path, self.spec, self._names)

    def refuse_unfit(self, codes: bool = False) -> TensorFolder:
        """Refuse what is no plain weight of the model in config.json (see `formats`); returns itself.

        Of a model that is not fetched yet the headers are looked at when they are asked for, or now where config.json
        speaks of codes. With `codes` those are no fault, only noted in `quantised`.
        """
        stated = formats.stated(self.config)
        formats.refuse_names(self.spec, self.config, self.names())
        for file in self.files if self.kind == "safetensors" else ():
            if stated or self._remote is None or (self.path / file).is_file():
                self._look_at(file, not codes)
        if self.kind == "bin" and self._open:
            self._look_at(self._open[0], not codes)
        self._watch = not codes
        if stated and not self.quantised and self.kind == "safetensors":
            cli.once(
                f"{formats.run_of(self.spec)}: quantised by config.json ({stated}), but the files hold plain weights, "
                "which are read as they are"
            )
        return self

    def _look_at(self, file: str, refuse: bool) -> None:
        if self.kind == "safetensors":
            held = {name: (entry.dtype, entry.shape) for name, entry in self.header(file).entries.items()}
        else:
            held = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in self._open[1].items()}
        if formats.codes(held):
            if refuse:
                raise formats.Quantised(formats.quantised(self.spec, self.config, held))
            self.quantised = formats.kind(self.config, held)
        formats.refuse_empty(self.spec, {name: shape for name, (_, shape) in held.items()})

    @cached_property
    def config(self) -> dict:
        """What config.json says; {} where there is none that can be read, which others will say."""
        try:
            found = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def __enter__(self) -> TensorFolder:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._open = None

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def names(self) -> list[str]:
        """Every tensor on disk, shard by shard, in the order of the bytes."""
        return [name for file in self.files for name in self._names_in(file)]

    def shard_of(self, name: str) -> str:
        """The file that holds tensor `name`."""
        if name not in self._shard_of:
            raise InputError(f"{self.path} has no tensor {name}")
        return self._shard_of[name]

    def folder_of(self, name: str) -> TensorFolder | None:
        """The folder in whose files a tensor's bytes are (`entry` says where); None where they are in no plain file."""
        return self if self.kind == "safetensors" else None

    def fetch(self, names: Iterable[str] | None = None) -> None:
        """Fetch the shards of the tensors `names` (default: all) that are not here yet, several at a time."""
        files = self.files if names is None else {self.shard_of(name) for name in names}
        absent = sorted(file for file in files if not (self.path / file).is_file())
        if absent and self._remote:
            self._remote.fetch(absent)
            for file in absent:
                self._headers.pop(file, None)  # from now on the file's own
                if not (self.path / file).is_file():
                    raise InputError(f"{self.spec}: the shard {file} could not be fetched; run the same command again")

    def _read_header(self, file: str) -> Header:
        if self._remote is None or (self.path / file).is_file():
            return read_header(self.path / file)
        data, size = self._remote.first_bytes(file, FIRST_BYTES)
        length = 8 + header_length(data, size, f"{self.spec}/{file}")
        if length > len(data):
            data, size = self._remote.first_bytes(file, length)
        return parse_header(data, size, f"{self.spec}/{file}")

    def header(self, file: str) -> Header:
        """The checked header of a safetensors shard; of a shard that is not fetched yet, only the header is read."""
        if file not in self._headers:
            header = self._read_header(file)
            lost = [
                name for name, shard in (self._shard_of or {}).items() if shard == file and name not in header.entries
            ]
            if lost:
                raise InputError(
                    f"{self.path}: the index places {lost[0]} in {file}, which does not hold it; copy the model again"
                )
            self._headers[file] = header
            if self._watch is not None:
                self._look_at(file, self._watch)
        return self._headers[file]

    def entry(self, name: str) -> Entry:
        """Where the bytes of a tensor are; for safetensors folders only."""
        return self.header(self.shard_of(name)).entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape if self.kind == "safetensors" else tuple(self.get(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return torch_dtype(self.entry(name).dtype) if self.kind == "safetensors" else self.get(name).dtype

    def get(self, name: str) -> torch.Tensor:
        """The tensor, mapped from the file: its pages are read when they are touched."""
        import torch

        file = self.shard_of(name)
        with self._lock:  # several threads may read
            if self._open is None or self._open[0] != file:
                self._open = None  # the old shard goes before the new one comes
                self._open = (file, self._map(file))
                if self.kind == "bin" and self._watch is not None:
                    self._look_at(file, self._watch)
            held = self._open[1]
        if self.kind == "bin":
            return held[name]
        entry = self.header(file).entries[name]
        data = held[entry.start : entry.stop]
        dtype = torch_dtype(entry.dtype)
        if data.storage_offset() % dtype.itemsize:  # the format asks for no alignment
            data = data.clone()
        return data.view(dtype).view(entry.shape) if data.numel() else torch.empty(entry.shape, dtype=dtype)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (first dimension) of a tensor, without touching the others."""
        return self.get(name)[start:stop]

    def _names_in(self, file: str) -> list[str]:
        """The tensors of one file; of a shard only those that the index places there."""
        if self._shard_of is not None:
            known = self.kind == "safetensors" and (self._remote is None or file in self._headers)
            held = self.header(file).entries if known else self._shard_of  # the index is enough for names
            return [name for name in held if self._shard_of.get(name) == file]
        if self.kind == "safetensors":
            return list(self.header(file).entries)
        self._open = (file, self._map(file))
        return list(self._open[1])

    def _map(self, file: str):
        import torch

        path = self.path / file
        if self._remote:
            self.fetch([next(name for name, shard in self._shard_of.items() if shard == file)])
        if self.kind == "safetensors":
            self.header(file)
            # Private: a stray write would stay in this process's memory and never reach the model's file.
            size = path.stat().st_size
            return torch.from_file(os.fspath(path), shared=False, size=size, dtype=torch.uint8)
        loaded = _load_bin(path, self.spec, self.config)
        self._refuse_lost(file, loaded)
        return loaded

    def _refuse_lost(self, file: str, held: Container[str]) -> None:
        for name, shard in (self._shard_of or {}).items():
            if shard == file and name not in held:
                raise InputError(
                    f"{self.path}: the index places {name} in {file}, which does not hold it; copy the model again"
                )


def _load_bin(path: Path, spec: str, config: dict) -> dict:
    import torch

    formats.refuse_pointer(path)
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 are no zip archives and cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types, for damage and for code in the pickle
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        if formats.stated(config):  # objects of torchao and the like, no plain tensors
            raise formats.Quantised(formats.quantised(spec, config, {})) from None
        raise InputError(
            f"{path} cannot be read as plain tensors ({reason}); copy it again or use safetensors"
            f"{formats.cut_off(path.parent)}"
        ) from None
    if isinstance(loaded, dict) and "state_dict" in loaded:
        loaded = loaded["state_dict"]
    size = path.stat().st_size
    plain = isinstance(loaded, dict) and all(_is_plain(name, tensor, size) for name, tensor in loaded.items())
    if not plain and formats.stated(config):
        raise formats.Quantised(formats.quantised(spec, config, {}))
    if not plain:
        raise InputError(f"{path} holds more than plain tensors; save the model with save_pretrained")
    return loaded


def _is_plain(name, tensor, size: int) -> bool:
    """Whether an entry of a .bin is a dense tensor that is really in the file (of `size` bytes)."""
    import torch

    dense = isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
    return dense and tensor.device.type == "cpu" and not tensor.is_quantized and tensor.nbytes <= size


def _inventory(folder: Path, spec: str, names: Collection[str] | None) -> tuple[str, list[str], dict[str, str] | None]:
    """(kind, files in order, tensor -> file; None when there is a single file, which says it itself).

    `names`: of all files of the hub model `spec`, of which few are in the folder.
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
        InputError: damaged, or it names anything but weight files of its own folder.
    """
    formats.refuse_pointer(index)
    suffix = f".{index.name.split('.')[1]}"
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_no_doubles)["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f"{index} is no index of shards (damaged JSON, or no weight_map); copy the model again"
        ) from None
    for file in files:
        own = isinstance(file, str) and file == os.path.basename(file) and file.isprintable() and "\\" not in file
        if not own or not file.endswith(suffix):
            raise InputError(f"{index} names {file!r}, which is not a {suffix} file of its own folder; refused")
    if not files:
        raise InputError(f"{index} names no shards; copy the model again")
    return files, weight_map


def _refuse_two_sets(folder: Path) -> None:
    """Two sets of weights in one folder: fine when they are the same, else nobody knows which one is meant.

    Loaders take `model.safetensors`, and shards saved into its folder later are silently shadowed.
    """
    files, weight_map = read_index(folder / INDEX)
    if files == [SINGLE]:
        return
    shards = [file for file in files if (folder / file).is_file()]
    if not shards:
        cli.warn(f"{folder}: {INDEX} names shards that are not there; {SINGLE} is used, as loaders do")
        return
    hint = f"remove {SINGLE}, or {INDEX} and its shards"
    whole = read_header(folder / SINGLE).entries
    if len(shards) < len(files) or set(whole) != set(weight_map):
        raise InputError(f"{folder} holds {SINGLE} and also an index of other shards; loaders take the first: {hint}")
    for file in files:
        for name, entry in read_header(folder / file).entries.items():
            if name not in whole or not _same_sample(folder / SINGLE, whole[name], folder / file, entry):
                raise InputError(f"{folder}: {SINGLE} and the shards of {INDEX} differ ({name}): {hint}")


def _same_sample(a: Path, at: Entry, b: Path, bt: Entry, block: int = 4096) -> bool:
    if (at.dtype, at.shape) != (bt.dtype, bt.shape):
        return False
    size = at.stop - at.start
    with open(a, "rb") as first, open(b, "rb") as second:
        for position in {0, size // 2, max(0, size - block)}:
            first.seek(at.start + position)
            second.seek(bt.start + position)
            length = min(block, size - position)
            if first.read(length) != second.read(length):
                return False
    return True


def chunks(rows: int, row_bytes: int, limit: int = 32 << 20) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most `limit` bytes (one row at least)."""
    step = max(1, limit // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def numel(shape: Iterable[int]) -> int:
    """Entries of a tensor of this shape."""
    return math.prod(shape)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity, without a temporary of its size."""
    import torch

    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:  # float8 has no reductions
        return all(bool(torch.isfinite(part.float()).all()) for part in tensor.flatten().split(1 << 20))
    low, high = torch.aminmax(tensor)  # both are NaN when any entry is
    return bool(torch.isfinite(low) & torch.isfinite(high))
