"""Folders as values: every file with a hash of what it says, without the moment and the command that wrote it."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
from pathlib import Path

VOLATILE = ("time", "command", "git_commit", "code")
# What lm_eval writes of the moment and the machine.
LM_EVAL = ("date", "start_time", "end_time", "total_evaluation_time_seconds", "git_hash", "pretty_env_info")
TEMPORARY = re.compile(r"(^|/)\.[^/]|\.(partial|replaced|tmp)($|[./])|\.tmp")
RESULT_NAME = re.compile(r"results_\d{4}-[^/]*\.json$")


def content(path: Path) -> bytes:
    """What a file says, without the moment and the command that wrote it."""
    return _content(path.name, path.read_bytes())


@functools.lru_cache(4096)  # most files are as they were a command ago
def _content(name: str, data: bytes) -> bytes:
    if name.endswith(".json"):
        try:
            value = json.loads(data)
        except ValueError:
            return b"damaged: " + data
        if isinstance(value, dict):
            if isinstance(value.get("_header"), dict):
                value["_header"] = {key: told for key, told in value["_header"].items() if key not in VOLATILE}
            for key in ("timestamp", *(LM_EVAL if RESULT_NAME.search(name) else ())):
                value.pop(key, None)
            for task in value.get("configs", {}).values() if RESULT_NAME.search(name) else ():
                task.get("metadata", {}).pop("config_source", None)  # a scratch folder's name
        if name == "timing.json":
            value = {key: told for key, told in value.items() if not key.startswith("seconds")}
        return json.dumps(value).encode()
    return _tensors(data) if name.endswith(".pt") else data


def _tensors(data: bytes) -> bytes:
    import torch

    def plain(value):
        if isinstance(value, torch.Tensor):
            raw = bytes(value.contiguous().flatten().view(torch.uint8).tolist()) if value.numel() else b""
            return [str(value.dtype), list(value.shape), hashlib.sha256(raw).hexdigest()]
        if isinstance(value, dict):
            return {str(key): plain(below) for key, below in value.items() if key not in VOLATILE}
        return [plain(below) for below in value] if isinstance(value, list | tuple) else value

    try:
        value = torch.load(io.BytesIO(data), weights_only=True)
    except Exception:
        return b"damaged: " + data
    if isinstance(value, torch.Tensor):
        return data
    if isinstance(value, dict) and isinstance(value.get("header"), str):
        try:
            value["header"] = json.loads(value["header"])
        except ValueError:
            return b"damaged: " + data
    return json.dumps(plain(value)).encode()


def header(path: Path) -> dict:
    """What a result says of its inputs; {} for other files."""
    if path.suffix != ".json":
        return {}
    value = json.loads(content(path))
    return value.get("_header", {}) if isinstance(value, dict) else {}


def tree(folder: Path) -> dict[str, str]:
    """Every file and empty folder below `folder` with a hash of its content; names of moments are made one."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = RESULT_NAME.sub("results_<time>.json", path.relative_to(folder).as_posix())
        if path.is_file() or path.is_symlink():
            found[name] = hashlib.sha256(content(path)).hexdigest() if path.is_file() else "link"
        elif not any(path.iterdir()):
            found[name + "/"] = ""
    return found


def temporary(name: str) -> bool:
    """Whether a name says that a file is not finished."""
    return bool(TEMPORARY.search(name))


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """In words, how the tree `one` differs from the expected tree `other`."""
    lines = [f"left over: {name}" for name in one.keys() - other.keys()]
    lines += [f"missing: {name}" for name in other.keys() - one.keys()]
    return sorted(lines + [f"differs: {name}" for name in one.keys() & other.keys() if one[name] != other[name]])


def disk(folder: Path) -> int:
    """Bytes of all files in blocks of 4096, and one for each folder."""
    return sum(-(-path.stat().st_size // 4096) * 4096 if path.is_file() else 4096 for path in folder.rglob("*"))
