"""Reads text for token ids: documents as lists of pieces, from mOSCAR on the hub, parquet files like it, or text files.

Used by lsn/load_oscar.py. Everything is streamed, so memory does not grow with the size of a corpus.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path

from cpt_utils.base import cli, hub_data, languages, textfiles
from cpt_utils.base.errors import InputError

MOSCAR = "oscar-corpus/mOSCAR"
BATCH_CHARACTERS = 1 << 20  # a batch ends here, whatever its number of documents, so memory stays bounded


# ---------------------------------------------------------------- documents


def file_documents(files: list[str], which: str | None = None) -> Iterator[list[str | None]]:
    """The documents of text files (one of one piece per line), or of parquet or JSON Lines files in mOSCAR's schema."""
    for file in files:
        yield from textfiles.documents(Path(file), which=which)


def hub_documents(config: str, revision: str | None) -> Iterator[list[str | None]]:
    """The documents of one language of mOSCAR, streamed in stored order.

    Raises:
        InputError: offline, gated, no such config or revision, or no column `text`.
    """
    import datasets

    where = f"{MOSCAR}, config {config}"
    try:
        options = {"split": "train", "streaming": True, "revision": revision}
        for row in datasets.load_dataset(MOSCAR, config, **options, columns=["text"]):
            yield textfiles.pieces(row, "text", where)
    except InputError:
        raise
    except Exception as error:  # the library wraps missing access, network, config and column in a dozen types
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"{where} cannot be read ({reason[:200]}); it needs a network (and `hf auth login` if it is gated), "
            "or give local files with --text or --parquet"
        ) from None


def documents_of(source: dict) -> Iterator[list[str | None]]:
    """The documents of the `text` entry of a task, with null pieces as None; some documents have no piece at all."""
    if source["source"] == "moscar":
        return hub_documents(source["config"], source["revision"])
    # --parquet says what the files are; --text leaves it to their names.
    which = "parquet" if source["source"] == "parquet" else None
    return file_documents([file["path"] for file in source["files"]], which)


def batches(
    documents: Iterable[list[str | None]], size: int, limit: int | None = None
) -> Iterator[tuple[list[str], list[int], list[int]]]:
    """Pieces of up to `size` documents at a time (fewer if they are long), of the first `limit` documents.

    Empty and null pieces are left out, and documents with no other pieces do not count.

    Returns:
        pieces [n], the number of each piece's document [n], and the number of null pieces before each piece and before
        the end of the batch [n + 1], counted from the beginning of the text.
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
    """What a header records of local files (`documents_of` reads it), and what identifies them whatever their path.

    Args:
        kind: `text` (one file) or `parquet` (a file, a folder or a pattern).
        given: how the user gave `pattern`, for error messages.

    Raises:
        InputError: a file does not exist or holds no text.
    """
    fingerprint = cli.sibling("cpt/packing.py").fingerprint
    path = Path(pattern)
    if kind == "parquet":
        paths = sorted(path.rglob("*.parquet")) if path.is_dir() else sorted(map(Path, glob.glob(pattern)))
    else:
        paths = [path]
    if path.is_file():  # its name may contain pattern characters
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
    """The same for languages of mOSCAR; the revision is resolved to a commit if the hub can be asked.

    Raises:
        InputError: an unknown language, gated data, or no such revision.
    """
    configs = {code: languages.spelling(code, "moscar") for code in codes}
    if not configs:
        return {}
    try:
        commit = hub_data.revision(MOSCAR, revision)
    except InputError as error:
        # The same advice, with this script's flag for local copies.
        raise InputError(str(error).replace("--data-dir", "--parquet LANGUAGE=FOLDER")) from None
    cli.say(f"{', '.join(codes)}: streamed from {MOSCAR}, revision {commit or 'unknown (the hub was not asked)'}")
    sources = {}
    for code, config in configs.items():
        identity = {"source": "moscar", "dataset": MOSCAR, "config": config, "split": "train", "revision": revision}
        sources[code] = (identity | {"revision": commit}, identity)
    return sources
