"""Result files: JSON with a header that identifies them, and plain tensors; never partial files.

A file is written under a temporary name in its own folder and renamed, so a file that exists is finished. The header
is the value of the key `_header`; a reader refuses a file whose header contradicts what it expects, and says why.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from cpt_utils.base import cli, code, forms, languages, locks
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch

HEADER = "_header"
TEMPORARY = re.compile(r"\..+\.\d+\.tmp(\.[^.]*)?")  # the temporary names of `replacing`
SHOWN = 4  # differences of two requests that a message names
LIBRARIES = ("torch", "transformers", "datasets", "lm_eval", "numpy", "scipy")


def now() -> str:
    """This moment in UTC, to the second, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def header(schema: str, version: int = 1, **facts) -> dict:
    """The header of a result: `schema`, everything in `facts`, and the facts that every result records.

    Usual facts: `models` ({role: ModelRef.describe()}), `n_layers`, `base_lang`, `target_lang`, `data` (describe() of a
    source), `n_used`, `n_available`, `limit`, `seed`, `dtype`, `device`.
    """
    return {
        "schema": schema,
        "version": version,
        **{key: plain(value) for key, value in facts.items()},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git_commit": git_commit(),
        "code": code.running(),
        "libraries": libraries(),
        "time": now(),
    }


@lru_cache(maxsize=1)
def git_commit() -> str | None:
    """The commit of this repository, with `+changes` if the working tree differs; None outside git."""
    git = ["git", "-C", str(cli.REPOSITORY)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")


@lru_cache(maxsize=1)
def libraries() -> dict[str, str]:
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@contextlib.contextmanager
def replacing(path: str | os.PathLike):
    """A temporary path beside `path`: renamed to it if the block succeeds, removed if it fails.

    Temporary files that killed processes left in the folder, which are no longer locked, are removed first.

    Raises:
        InputError: the folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    # The suffix stays last, for writers that take the format from it (matplotlib).
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    handle = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        handle = _locked(temporary)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if path.is_dir():  # os.replace would only say that it is a directory
            raise InputError(f"cannot write {path}: it is a folder; move it, or give another path")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {cli.os_reason(error)}") from error
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):  # if even this fails, the next writer in the folder removes it
                temporary.unlink(missing_ok=True)
            os.close(handle)


def _locked(temporary: Path) -> int:
    """Create a temporary file and lock it until the descriptor is closed or the process is killed."""
    while True:
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        locks.take(handle, wait=True)
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)  # another process removed it before it was locked


def _remove_abandoned(folder: Path) -> None:
    """Remove temporary files of `replacing` in `folder` that no living process has locked."""
    from filelock import lock_descriptor

    for name in filter(TEMPORARY.fullmatch, os.listdir(folder)):
        with contextlib.suppress(OSError):  # gone, or on a file system without locks
            handle = os.open(folder / name, os.O_RDWR)
            try:
                if lock_descriptor(handle, blocking=False):
                    os.unlink(folder / name)
            finally:
                os.close(handle)


def markdown(head: list[str], rows: list[list]) -> str:
    """A table in Markdown; the caller formats numbers."""
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in (head, ["---"] * len(head), *rows))


def write_text(path: str | os.PathLike, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, payload: dict, header: dict) -> None:
    """Write `{"_header": header, **payload}`; numbers that are not finite become null (JSON has no NaN)."""
    if HEADER in payload:
        raise ValueError(f"{HEADER} belongs to the header")
    text = json.dumps(plain({HEADER: header, **payload}), ensure_ascii=False, indent=1, allow_nan=False)
    write_text(path, text + "\n")


def write_list(path: str | os.PathLike, key: str, payload: dict, header: dict) -> None:
    """Write `payload[key]` as a bare list, as the published scripts read it, and the whole result beside it.

    `read_json` on the list returns the whole payload and its header.
    """
    write_json(facts_beside(path), payload, header | {"list": key})
    write_text(path, json.dumps(plain(payload[key])) + "\n")


def facts_beside(path: str | os.PathLike) -> Path:
    """The path of the whole result whose bare list is at `path`."""
    return Path(path).with_suffix(".facts.json")


def write_tensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor | str | int | float]) -> None:
    """Save a dict of plain tensors, numbers and strings that `torch.load(weights_only=True)` reads."""
    # Through memory: torch.save names the archive after the file (here a temporary one), but a rerun must give the same
    # bytes; and a full disk raises OSError only if Python writes.
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_tensors(path: str | os.PathLike) -> dict:
    """Read what `write_tensors` wrote, on the CPU, running no code from the file."""
    tensors = load(path)
    if not isinstance(tensors, dict):
        raise InputError(f"{path} holds no named tensors; give a file that these scripts wrote")
    return tensors


def load(path: str | os.PathLike):
    """The object that `torch.save` wrote to a file, on the CPU, running no code from it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # torch raises half a dozen types for a damaged file
        raise InputError(f"{path} cannot be read as tensors ({type(error).__name__}); write it again") from None


def read_json(
    path: str | os.PathLike, schema: str | None = None, allow_limited: bool = False, **expect
) -> tuple[dict, dict]:
    """Read a result file: its payload (without the header) and its header (`{}` if it has none).

    For a list that `write_list` wrote and nobody has changed, these are the payload and header beside it.

    `expect` names header facts that must agree if the file states them, e.g. `n_layers=32, base_lang="eng_Latn"`.
    Language facts (`*_lang`) agree if they mean the same language.

    Raises:
        InputError: no such file, not JSON, another schema, a fact that disagrees, a run made with `--limit`, or a value
            of a type that its step does not write (`forms`).
    """
    path = Path(path)
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; a JSON file is needed") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(payload, dict):
        why = "has no header"
        if facts_beside(path).is_file():
            facts, head = read_json(facts_beside(path), schema, allow_limited, **expect)
            if isinstance(facts, dict) and facts.get(head.get("list")) == payload:
                return facts, head
            why = f"is not the list of {facts_beside(path).name} beside it"
        cli.warn(f"{path} {why}: its model and settings are taken on trust")
        return payload, {}
    head = payload.pop(HEADER, None)
    if head is None:
        cli.warn(f"{path} has no header: its model and settings are taken on trust")
        return payload, {}
    if not isinstance(head, dict):
        raise InputError(f"{path} has a {HEADER} that is not a header; write the file again")
    if schema is not None and head.get("schema") != schema:
        raise InputError(f"{path} holds {head.get('schema')!r}, but {schema!r} is needed; give the file of that step")
    if head.get("limit") is not None and not allow_limited:
        raise InputError(f"{path} was made with --limit {head['limit']}; run that step again without --limit")
    for fact, wanted in expect.items():
        value = head.get(fact)
        if value is None or wanted is None or _agree(fact, value, wanted):
            continue
        raise InputError(
            f"{path} was made for {fact} {value}, but {wanted} is needed; give the file of the right model and data"
        )
    forms.check(path, payload, head)
    return payload, head


def _agree(fact: str, value, wanted) -> bool:
    if value == plain(wanted):
        return True
    if fact.endswith("_lang"):
        return languages.same(value, wanted)
    return False


def essential(request):
    """The parts of a request that determine its result: of a model its weights and configuration, of a text its hash.

    So a path that is spelled differently, or a file that was moved, makes no difference. None counts as absent.
    """
    if isinstance(request, list):
        return [essential(part) for part in request]
    if not isinstance(request, dict):
        return request
    kept = set(request)
    if request.get("weights_sample"):
        kept = {"weights_sample", "config_sha256", "adapter_of"}
    elif {"spec", "model_id"} <= kept:
        kept = {"model_id", "revision", "adapter_of"}
    elif "pairs_sha256" in kept:
        kept = {"pairs_sha256", "repeated"}
    elif request.get("sha256"):
        kept -= {"file", "dataset", "config", "revision"}
    return {key: essential(part) for key, part in request.items() if key in kept and part is not None}


def same(before, now) -> bool:
    """Whether two requests are the same, compared by `essential`."""
    return essential(plain(before)) == essential(plain(now))


def diff_request(before: dict | None, now: dict) -> str:
    """How a request differs from an earlier one, in words: "dtype: float32 asked for, bfloat16 in the file"."""
    if not before:
        return "how the file was made is not known"
    differences = list(_differences(plain(before), plain(now), ""))
    parts = [
        f"{name}: {shown(new)} asked for, {shown(old)} in the file" if shown(new) != shown(old) else f"another {name}"
        for name, old, new in differences
    ]
    return "; ".join(parts[:SHOWN] + ([f"and {len(parts) - SHOWN} more"] if len(parts) > SHOWN else []))


def _differences(before, now, name: str) -> Iterator[tuple]:
    """(dotted name, before, now) of the smallest parts in which two requests differ; for two models, their paths."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        yield name, before, now
        return
    specs = before.get("spec"), now.get("spec")
    if all(specs) and len({*map(os.path.abspath, specs)}) == 2:
        yield name, *specs
        return
    for key in {**essential(now), **essential(before)}:
        old, new = before.get(key), now.get(key)
        if essential(old) != essential(new):
            yield from _differences(old, new, f"{name}.{key}".removeprefix("."))


def shown(value) -> str:
    """A value of a request for messages; of a long one both ends, since paths may differ at either."""
    text = value if isinstance(value, str) else "none" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-29:]}"


def finished(
    path: str | os.PathLike, schema: str, request: dict, hint: str, overwrite: bool = False,
    asked: Callable[[dict], dict | None] = lambda result: result.get("request"), newer: tuple[str, ...] = (),
) -> bool:  # fmt: skip
    """Whether `path` holds a result of `request`, which need not be made again.

    Args:
        hint: the flag for writing elsewhere, for the message ("another -o").
        overwrite: make it again in any case.
        asked: returns the request recorded in a result, from its payload and header together.
        newer: keys that results of earlier versions lack; if they do, these keys are not compared.

    Raises:
        InputError: it is the result of another request; the message has the values of both.
    """
    if overwrite or not Path(path).exists():
        return False
    payload, head = read_json(path, schema, allow_limited=True)
    before = (asked({**payload, **head}) if head else None) or {}
    request = {key: value for key, value in request.items() if key in before or key not in newer}
    refuse_other(path, before, request, hint)
    if code.is_other(head.get("code")):
        cli.once(f"{path} was made by a different version of the code: --overwrite makes it again", cli.warn)
    return True


def refuse_stranger(path: Path, schema: str, overwrite: bool, hint: str) -> None:
    """InputError if `path` is a file without a header, which is replaced only on request; `hint`: see `finished`."""
    if path.exists() and not overwrite and not read_json(path, schema, allow_limited=True)[1]:
        raise InputError(f"{path} was not made by this script; give --overwrite to replace it, or {hint}")


def refuse_other(path: str | os.PathLike, before: dict | None, request: dict, hint: str) -> None:
    """InputError if the request `before`, which made `path`, differs from `request`; `hint`: see `finished`."""
    if not same(before, request):
        raise InputError(
            f"{path} is of another request ({diff_request(before, request)}); give --overwrite to redo it, or {hint}"
        )


def file_sha256(file: str | os.PathLike) -> str:
    """The SHA-256 of the file's bytes, as `sha256sum` prints it."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def plain(value):
    """`value` in JSON types: paths as text, array scalars as numbers, NaN and infinity as None."""
    if isinstance(value, dict):
        return {str(key): plain(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [plain(below) for below in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays
        return plain(value.tolist())
    return str(value)
