"""Data sets on the hub: the commit of a revision, and the rows of a config and split."""

from __future__ import annotations

import re

from cpt_utils.base.errors import InputError


def revision(repository: str, wanted: str | None = None) -> str | None:
    """The commit of revision `wanted` of a hub data set, after checking that this account may read it.

    `wanted` itself if the hub cannot be reached: a copy in the local cache may still serve.

    Raises:
        InputError: gated and not accepted, no such data set, or no such revision.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    try:
        api.auth_check(repository, repo_type="dataset")
        return api.dataset_info(repository, revision=wanted, timeout=30).sha
    except GatedRepoError:
        raise InputError(
            f"{repository} is gated: accept its terms at https://huggingface.co/datasets/{repository}, "
            "then run `hf auth login` or set HF_TOKEN; a local copy works too: --data-dir"
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"{repository} has no revision {wanted}") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{repository} is not on the hub, or this account may not see it; run `hf auth login`, or give --data-dir"
        ) from None
    except Exception:  # offline mode, no network, a proxy: half a dozen types of two libraries
        return wanted


def rows(repository: str, name: str, split: str, revision: str | None, columns: tuple[str, ...]):
    """The rows of one config and split of a hub data set (from the cache if it is there), and their commit."""
    import datasets

    quiet = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        loaded = datasets.load_dataset(repository, name, split=split, revision=revision)
    except Exception as error:  # the library wraps missing access, network, config and split in many types
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"{repository}, config {name}, split {split} cannot be loaded ({reason[:200]}); "
            "load it once with a network (and `hf auth login` if it is gated), or give a local copy with --data-dir"
        ) from None
    finally:
        datasets.utils.logging.set_verbosity(quiet)
    missing = [column for column in columns if column not in loaded.column_names]
    if missing:
        raise InputError(
            f"{repository}, config {name}, has no column {', '.join(missing)}, only {', '.join(loaded.column_names)}"
        )
    # Since datasets 4 `loaded["text"]` is a lazy Column; a slice of it is a list.
    values = [loaded[column][:] for column in columns]
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*values, strict=True)]
    # Offline, the commit is known only from the sources of the cached files: hf://datasets/<name>@<commit>/...
    sources = " ".join(loaded.info.download_checksums or {})
    commit = re.search(rf"{re.escape(repository)}@([0-9a-f]{{40}})", sources)
    return rows, revision or (commit[1] if commit else None)
