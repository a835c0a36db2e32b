"""Files of a hub repository: fetched one by one or by pattern, pinned to a commit, and removed again on request.

Within a process a revision stays at one commit, so files that are fetched at different times belong together.
The client itself resumes if a connection stops in the middle of a file; after other connection errors, the request is
repeated here. A file gets its name in the cache only when it is complete.
"""

from __future__ import annotations

import contextlib
import fnmatch
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError

ATTEMPTS = 3  # if a connection is reset, which the client does not retry
PAUSE = 2  # seconds between them
BY_CLIENT = ("ConnectError", "RemoteProtocolError", "ConnectTimeout", "ReadTimeout", "PoolTimeout")  # it retries
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")

Result = TypeVar("Result")


@dataclass
class _Revision:
    """What this process knows of one revision: its commit, its folder in the cache, and the patterns requested."""

    commit: str | None = None
    folder: Path | None = None
    asked: set[tuple[str, ...]] = field(default_factory=set)
    files: dict[str, str] | None = None


_revisions: dict[tuple[str, str | None], _Revision] = {}
_before: dict[str, frozenset[Path]] = {}  # repository -> files of its snapshots when this process first touched it


def fetch(repository: str, revision: str | None, patterns: Iterable[str]) -> Path:
    """The snapshot folder in the cache, after fetching the files that match any of `patterns`.

    A pattern without a slash matches files at the top of the repository, except `*`, which matches all.

    Raises:
        InputError: no such repository or revision, no access, or the hub cannot be reached and the cache lacks files.
    """
    from huggingface_hub import snapshot_download

    known, wanted = _known(repository, revision), tuple(sorted(patterns)) or ("config.json",)
    # The client's `*.json` also matches `checkpoint-5/trainer_state.json`.
    nested = None if any("/" in pattern or pattern == "*" for pattern in wanted) else "*/*"
    if wanted not in known.asked:

        def download() -> str:
            with _quiet_client():  # it logs two lines per error; `_tried` reports them
                return snapshot_download(
                    repository, revision=known.commit or revision, allow_patterns=list(wanted), ignore_patterns=nested,
                    tqdm_class=_bar(),
                )  # fmt: skip

        known.folder = Path(_tried(download, repository, revision))
        known.commit = known.folder.name
        known.asked.add(wanted)
    return known.folder


def names(repository: str, revision: str | None) -> frozenset[str]:
    """The paths of a revision's files in the repository, or, if they are unknown (offline), in the cache."""
    return frozenset(contents(repository, revision))


def contents(repository: str, revision: str | None) -> dict[str, str]:
    """Path -> an identifier of the contents, the same for the same bytes, for the files of `names`."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    folder, known = fetch(repository, revision, ["config.json", "adapter_config.json"]), _known(repository, revision)
    if known.files is None:
        try:
            tree = get_cached_repo_tree(repository, revision=known.commit)
            known.files = {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in tree}
        except CachedRepoTreeNotFoundError:  # the cache links to files named by their contents
            paths = [path for path in folder.rglob("*") if path.is_file()]
            known.files = {path.relative_to(folder).as_posix(): path.resolve().name for path in paths}
    return known.files


def commit(repository: str, revision: str | None) -> str | None:
    """The commit of a revision in this process."""
    folder = fetch(repository, revision, ["config.json", "adapter_config.json"])
    return folder.name if folder.parent.name == "snapshots" else None


def first_bytes(repository: str, revision: str | None, name: str, stop: int) -> tuple[bytes, int]:
    """(the first `stop` bytes of a file, its size), without fetching the rest.

    The client's `parse_safetensors_file_metadata` returns neither a file's size nor the end of its header, which
    `tensors` checks, and reads the whole file into memory if a server does not support ranges.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(repository, name, revision=commit(repository, revision))

    def ask() -> tuple[bytes, int]:
        headers = build_hf_headers() | {"range": f"bytes=0-{stop - 1}", "accept-encoding": "identity"}
        with get_session().stream("GET", url, headers=headers) as response:
            hf_raise_for_status(response)
            data = b""
            for block in response.iter_bytes(1 << 16):  # a server without ranges sends the whole file
                data += block
                if len(data) >= stop:
                    break
            total = response.headers.get("content-range", "").rpartition("/")[2]
            size = total or response.headers.get("content-length", "")
        return data[:stop], int(size) if size.isdecimal() else len(data)

    return _tried(ask, repository, revision)


def revisions(repository: str, pattern: str) -> list[str]:
    """Branches and tags that match a pattern like `step*`; offline, those in the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        folder = _storage(repository) / "refs"
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    else:
        refs = _tried(lambda: HfApi().list_repo_refs(repository), repository, None)
        names = {ref.name for ref in (*refs.branches, *refs.tags)}
    return sorted(name for name in names if fnmatch.fnmatchcase(name, pattern))


def drop(repository: str, revision: str | None, folder: str = "") -> int:
    """Remove the weight files of a revision, or of a folder of it, from the cache; returns the number of freed bytes.

    Only files that this process fetched are removed, not those that were in the cache before or that another revision
    also uses. Configuration and tokenizer stay. Only one of several processes may call this, when all are done.
    """
    known = _revisions.get((repository, revision))
    if known is None or known.folder is None:
        return 0
    before = _before[repository]
    fetched = {p for p in (known.folder / folder).iterdir() if p.suffix in WEIGHTS and p not in before}
    known.asked.clear()
    if not fetched:
        return 0
    from huggingface_hub import scan_cache_dir

    cache = scan_cache_dir(_storage(repository).parent)
    snapshots = [revision for repo in cache.repos for revision in repo.revisions]
    files = [file for snapshot in snapshots for file in snapshot.files if file.file_path in fetched]
    strategy = cache.delete_files(*files)
    strategy.execute()
    return strategy.expected_freed_size


def _known(repository: str, revision: str | None) -> _Revision:
    if repository not in _before:
        folder = _storage(repository) / "snapshots"
        _before[repository] = frozenset(folder.rglob("*"))
    return _revisions.setdefault((repository, revision), _Revision())


def _storage(repository: str) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE).expanduser().resolve() / f"models--{repository.replace('/', '--')}"


def _bar():
    """The client's progress bar; disabled if stderr is not a terminal."""
    from huggingface_hub.utils import tqdm

    class Quiet(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **(kwargs | {"disable": True}))

    return tqdm if sys.stderr.isatty() else Quiet


@contextlib.contextmanager
def _quiet_client() -> Iterator[None]:
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _tried(call: Callable[[], Result], repository: str, revision: str | None) -> Result:
    """`call()`, repeated after connection errors; the client's exceptions become one-line InputErrors."""
    from huggingface_hub import errors

    name = _name(repository, revision)
    # Connection errors are those of the client's HTTP library, which depends on its release, and of the system.
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except errors.GatedRepoError:
            raise InputError(
                f"{name} is gated: accept its terms at https://huggingface.co/{repository}, then run `hf auth login`"
            ) from None
        except errors.RevisionNotFoundError:
            raise InputError(
                f"{repository} has no revision {revision}; its branches and tags are listed on its page"
            ) from None
        except errors.RepositoryNotFoundError:
            raise InputError(_unknown(repository)) from None
        except errors.EntryNotFoundError as error:
            if isinstance(error, errors.LocalEntryNotFoundError):
                raise InputError(_not_here(repository, revision, error)) from None
            raise InputError(f"{name} lacks a file that it should have ({_first_line(error)})") from None
        except (errors.HfHubHTTPError, errors.HFValidationError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            refused = f"{name}: the hub refuses ({_first_line(error)})"
            raise InputError(_unknown(repository) if status == 401 else refused) from None
        except errors.OfflineModeIsEnabled as error:
            raise InputError(_not_here(repository, revision, error)) from None
        except (errors.HTTPError, OSError) as error:
            final = type(error).__name__ in BY_CLIENT or getattr(error, "errno", None) is not None
            if final or attempt + 1 == ATTEMPTS:
                raise InputError(
                    f"{name} could not be fetched ({_first_line(error)}); run the same command again: finished files "
                    "are kept"
                ) from None
            cli.warn(f"{name}: {_first_line(error)}; trying again in {PAUSE} s")
            time.sleep(PAUSE)
    raise AssertionError("unreachable")


def _name(repository: str, revision: str | None) -> str:
    return repository + (f"@{revision}" if revision else "")


def _unknown(repository: str) -> str:
    return f"{repository}: neither a folder here nor a repository on the hub (for a private one run `hf auth login`)"


def _not_here(repository: str, revision: str | None, error: Exception) -> str:
    """The message for a file that is not in the cache and could not be fetched."""
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, IncompleteSnapshotError

    name = _name(repository, revision)
    if isinstance(error.__cause__, HfHubHTTPError) and error.__cause__.response.status_code in (401, 403):
        return f"{name}: the hub refuses ({_first_line(error.__cause__)}); run `hf auth login` with a token that may"
    reason = "HF_HUB_OFFLINE is set" if is_offline_mode() else _first_line(error.__cause__ or error)
    part = isinstance(error, IncompleteSnapshotError) or _known(repository, revision).commit
    where = "only a part is in the hub cache" if part else "not in the hub cache"
    return f"{name}: no such folder here, {where}, and the hub cannot be reached ({reason})"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
