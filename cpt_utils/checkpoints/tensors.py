"""Tensors of a model folder, read by name, one memory-mapped shard at a time; never a whole model in memory.

    with opening.open_folder("build/model") as stored:
        weight = stored.get("model.layers.0.mlp.up_proj.weight")     # pages are read from the file when accessed

For a hub model, with `lazy`, a shard is fetched when one of its tensors is first read; a LoRA adapter opens merged into
its base. Every file is checked before its first tensor is used: wrong sizes in a header, a missing shard and an index
that points outside its folder are errors in one line. Only plain tensors are unpickled.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Container, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import formats, headers
from cpt_utils.checkpoints.formats import INDEX, SINGLE

if TYPE_CHECKING:
    from cpt_utils.checkpoints.refs import ModelRef


FIRST_BYTES = 1 << 17  # of the first request for a remote file: most headers are shorter


class Closing:
    """Holds files open until `close`, or the end of a `with` block."""

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


class TensorFolder(Closing):
    """The tensors of one model folder, by their names on disk.

    At most one shard is open (memory-mapped) at a time; tensors taken from it keep it mapped. A tensor is a view of
    the file: do not write into it. `lazy`: see `opening.open_folder`, which also refuses contents that this class does
    not check: quantised weights, and files that do not match config.json. Pickles are fetched at once.

    Attributes:
        quantised: the kind of codes in the files, in words, once `refuse_unfit` has seen some.

    Raises:
        InputError: on opening, if there is no such folder or no complete set of weights in it.
    """

    def __init__(self, where: ModelRef | str | os.PathLike, lazy: bool = False):
        self._remote: ModelRef | None = None
        self._names = None  # names of all files of a hub model
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
        self._watch: bool | None = None  # whether codes in opened files are refused; None: files are not checked
        self._headers: dict[str, headers.Header] = {}
        self._open: tuple[str, object] | None = None
        try:
            self.kind, self.files, self._shard_of = self._look()
            self._refuse_unfit()
        except OSError as error:  # a folder without permission, a name that is too long
            raise InputError(f"{self.path} cannot be read: {error.strerror or error}") from None
        if self._shard_of is None:
            self._shard_of = dict.fromkeys(self._names_in(self.files[0]), self.files[0])

    def _refuse_unfit(self) -> None:
        """Refuse files that are neither in the folder nor in the hub's repository.

        Links are followed, since weights are often kept on other disks.
        """
        remote_names = self._remote.names if self._remote else ()
        for file in self.files:
            if not (self.path / file).is_file() and file not in remote_names:
                raise InputError(
                    f"{self.path}: the index names the shard {file}, which is not there; copy or download it again"
                    f"{formats.cut_off(self.path)}"
                )

    def _look(self) -> tuple[str, list[str], dict[str, str] | None]:
        """(kind, files in order, tensor -> file); the last is None for a single file, which lists its own tensors."""
        if self._remote and SINGLE in self._remote.names:
            return "safetensors", [SINGLE], None
        return headers.inventory(self.path, self.spec, self._names)

    def refuse_unfit(self, codes: bool = False) -> TensorFolder:
        """Refuse contents other than plain weights of the model in config.json (see `formats`); returns itself.

        If a model is not fetched yet, its headers are checked when they are requested, or now if config.json mentions
        codes. With `codes` they are not refused, only noted in `quantised`.
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
        """The contents of config.json; {} if it cannot be read, which is reported elsewhere."""
        try:
            values = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return values if isinstance(values, dict) else {}

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
        """The folder whose files hold a tensor's bytes (at `entry`); None if they are in no safetensors file."""
        return self if self.kind == "safetensors" else None

    def fetch(self, names: Iterable[str] | None = None) -> None:
        """Fetch the missing shards of the tensors `names` (default: all), several at a time."""
        files = self.files if names is None else {self.shard_of(name) for name in names}
        absent = sorted(file for file in files if not (self.path / file).is_file())
        if absent and self._remote:
            self._remote.fetch(absent)
            for file in absent:
                self._headers.pop(file, None)  # read it again, from the file
                if not (self.path / file).is_file():
                    raise InputError(f"{self.spec}: the shard {file} could not be fetched; run the same command again")

    def _read_header(self, file: str) -> headers.Header:
        if self._remote is None or (self.path / file).is_file():
            return headers.read_header(self.path / file)
        data, size = self._remote.first_bytes(file, FIRST_BYTES)
        length = 8 + headers.header_length(data, size, f"{self.spec}/{file}")
        if length > len(data):
            data, size = self._remote.first_bytes(file, length)
        return headers.parse_header(data, size, f"{self.spec}/{file}")

    def header(self, file: str) -> headers.Header:
        """The checked header of a safetensors shard; for a shard that is not fetched yet, only the header is read."""
        if file not in self._headers:
            header = self._read_header(file)
            self._refuse_lost(file, header.entries)
            self._headers[file] = header
            if self._watch is not None:
                self._look_at(file, self._watch)
        return self._headers[file]

    def entry(self, name: str) -> headers.Entry:
        """The position of a tensor's bytes; for safetensors folders only."""
        return self.header(self.shard_of(name)).entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape if self.kind == "safetensors" else tuple(self.get(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return headers.torch_dtype(self.entry(name).dtype) if self.kind == "safetensors" else self.get(name).dtype

    def get(self, name: str) -> torch.Tensor:
        """The tensor, mapped from the file: its pages are read when accessed."""
        file = self.shard_of(name)
        with self._lock:  # several threads may read
            if self._open is None or self._open[0] != file:
                self._open = None  # close the old shard before opening the new one
                self._open = (file, self._map(file))
                if self.kind == "bin" and self._watch is not None:
                    self._look_at(file, self._watch)
            held = self._open[1]
        if self.kind == "bin":
            return held[name]
        entry = self.header(file).entries[name]
        data = held[entry.start : entry.stop]
        dtype = headers.torch_dtype(entry.dtype)
        if data.storage_offset() % dtype.itemsize:  # the format does not require alignment
            data = data.clone()
        return data.view(dtype).view(entry.shape) if data.numel() else torch.empty(entry.shape, dtype=dtype)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (first dimension) of a tensor, without reading the others."""
        return self.get(name)[start:stop]

    def _names_in(self, file: str) -> list[str]:
        """The tensors of one file; for a shard only those that the index places there."""
        if self._shard_of is not None:
            known = self.kind == "safetensors" and (self._remote is None or file in self._headers)
            held = self.header(file).entries if known else self._shard_of  # the index is enough for names
            return [name for name in held if self._shard_of.get(name) == file]
        if self.kind == "safetensors":
            return list(self.header(file).entries)
        self._open = (file, self._map(file))
        return list(self._open[1])

    def _map(self, file: str):
        path = self.path / file
        if self._remote:
            self.fetch([next(name for name, shard in self._shard_of.items() if shard == file)])
        if self.kind == "safetensors":
            self.header(file)
            # Private mapping: an accidental write would stay in memory and never reach the model's file.
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
    formats.refuse_pointer(path)
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files older than torch 1.6 are not zip archives and cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types, for damage and for code in the pickle
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        if formats.stated(config):  # objects of torchao and the like, not plain tensors
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
    """Whether an entry of a .bin is a dense tensor whose data fit into the file (of `size` bytes)."""
    dense = isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
    return dense and tensor.device.type == "cpu" and not tensor.is_quantized and tensor.nbytes <= size


def chunks(rows: int, row_bytes: int, limit: int = 32 << 20) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most `limit` bytes (one row at least)."""
    step = max(1, limit // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity, without a temporary of its size."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:  # float8 has no reductions
        return all(bool(torch.isfinite(part.float()).all()) for part in tensor.flatten().split(1 << 20))
    low, high = torch.aminmax(tensor)  # both are NaN if any entry is
    return bool(torch.isfinite(low) & torch.isfinite(high))
