"""The text behind token ids: documents as lists of pieces, of mOSCAR on the hub, of parquet files like it, or of text.

Used by lsn/load_oscar.py. Everything is streamed: memory does not grow with the size of a corpus.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path

from cpt_utils.base import cli, hub_data, languages, textfiles
from cpt_utils.base.errors import InputError

MOSCAR = "oscar-corpus/mOSCAR"
BATCH_CHARACTERS = 1 << 20  # a batch ends here whatever its number of documents, so that memory stays bounded


# ---------------------------------------------------------------- documents


def file_documents(files: list[str], which: str | None = None) -> Iterator[list[str | None]]:
    """The documents of text files (a line is one, of one piece) or of parquet or JSON Lines in mOSCAR's schema."""
    for file in files:
        yield from textfiles.documents(Path(file), which=which)


def hub_documents(config: str, revision: str | None) -> Iterator[list[str | None]]:
    """The documents of one language of mOSCAR, streamed in stored order.

    Raises:
        InputError: offline, gated, no such config or revision, or no column text.
    """
    import datasets

    where = f"{MOSCAR}, config {config}"
    try:
        how = {"split": "train", "streaming": True, "revision": revision}
        for row in datasets.load_dataset(MOSCAR, config, **how, columns=["text"]):
            yield textfiles.pieces(row, "text", where)
    except InputError:
        raise
    except Exception as error:  # the library wraps missing access, network, config and column in a dozen types
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"{where} cannot be read ({reason[:200]}); it needs a network (and `hf auth login` where it is gated), "
            "or give local files with --text or --parquet"
        ) from None


def documents_of(source: dict) -> Iterator[list[str | None]]:
    """The documents of a `text` entry of a request, pieces that are null as None; some have no piece at all."""
    if source["source"] == "moscar":
        return hub_documents(source["config"], source["revision"])
    # --parquet says what the files are; --text leaves it to their names.
    which = "parquet" if source["source"] == "parquet" else None
    return file_documents([file["path"] for file in source["files"]], which)


def batches(
    documents: Iterable[list[str | None]], size: int, limit: int | None = None
) -> Iterator[tuple[list[str], list[int], list[int]]]:
    """Pieces of up to `size` documents (fewer where they are long), of the first `limit` in all.

    An empty or null piece does not count, and neither does a document without any other.

    Returns:
        pieces [n], the number of each piece's document [n], and how many null pieces stood before each piece and before
        the end [n + 1], counted from the beginning of the text.
    """
    pieces, numbers, nulls, first, number, characters = [], [], [0], 1, 0, 0
    for document in documents:
        if any(document):
            if number == limit:
                break
            if pieces and (number - first + 1 == size or characters >= BATCH_CHARACTERS):
                yield pieces, numbers, nulls
                pieces, numbers, nulls, first, characters = [], [], nulls[-1:], number + 1, 0
            number += 1
        for piece in document:
            if piece is None:
                nulls[-1] += 1
            elif piece:
                pieces.append(piece)
                numbers.append(number)
                nulls.append(nulls[-1])
                characters += len(piece)
    if pieces:
        yield pieces, numbers, nulls


# ---------------------------------------------------------------- where text comes from


def local_source(kind: str, pattern: str, given: str) -> tuple[dict, dict]:
    """What a header says of local files (`documents_of` reads from it), and what identifies them wherever they lie.

    Args:
        kind: `text` (one file) or `parquet` (a file, a folder or a pattern).
        given: how the user gave `pattern`, for the message.

    Raises:
        InputError: no such file, or one that holds no text.
    """
    fingerprint = cli.sibling("cpt/packing.py").fingerprint
    path = Path(pattern)
    if kind == "parquet":
        paths = sorted(path.rglob("*.parquet")) if path.is_dir() else sorted(map(Path, glob.glob(pattern)))
    else:
        paths = [path]
    if path.is_file():  # a name may hold the signs of a pattern
        paths = [path]
    if not paths or not all(file.is_file() for file in paths):
        what = "no parquet files there" if path.is_dir() and kind == "parquet" else "no such file"
        raise InputError(f"{given}: {what}")
    if kind == "text":
        textfiles.check(path)
    files = [fingerprint(file) for file in paths]
    described = [{"path": str(file), **facts} for file, facts in zip(paths, files, strict=True)]
    return {"source": kind, "files": described}, {"source": kind, "files": files}


def hub_sources(codes: list[str], revision: str | None) -> dict[str, tuple[dict, dict]]:
    """The same for languages of mOSCAR, the newest revision resolved to a commit where the hub can be asked.

    Raises:
        InputError: an unknown language, gated data, or no such revision.
    """
    configs = {code: languages.spelling(code, "moscar") for code in codes}
    if not configs:
        return {}
    try:
        commit = hub_data.revision(MOSCAR, revision)
    except InputError as error:
        # The same advice, with the flag that this script has for local copies.
        raise InputError(str(error).replace("--data-dir", "--parquet LANGUAGE=FOLDER")) from None
    cli.say(f"{', '.join(codes)}: streamed from {MOSCAR}, revision {commit or 'unknown (the hub was not asked)'}")
    found = {}
    for code, config in configs.items():
        identity = {"source": "moscar", "dataset": MOSCAR, "config": config, "split": "train", "revision": revision}
        found[code] = (identity | {"revision": commit}, identity)
    return found
