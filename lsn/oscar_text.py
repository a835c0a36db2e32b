"""The text behind token ids: documents as lists of pieces, of mOSCAR on the hub, of parquet files like it, or of text.

Used by lsn/load_oscar.py. Everything is streamed: memory does not grow with the size of a corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from cpt_utils import cli, data, languages
from cpt_utils.errors import InputError

MOSCAR = "oscar-corpus/mOSCAR"
BATCH_CHARACTERS = 1 << 20  # a batch ends here whatever its number of documents, so that memory stays bounded


# ---------------------------------------------------------------- documents


def pieces_of(value, where: str) -> list[str]:
    """The pieces of mOSCAR's `text` in stored order: a list of {text, text_idx}; a plain text is one piece.

    Raises:
        InputError: anything else.
    """
    if isinstance(value, dict):  # how some releases of the datasets library hand a list of dicts over
        value = value.get("text")
    if value is not None and not isinstance(value, list):
        value = [value]
    found = [piece.get("text") if isinstance(piece, dict) else piece for piece in value or []]
    if any(piece is not None and not isinstance(piece, str) for piece in found):
        raise InputError(f"{where}: the column text holds neither texts nor lists of {{text, text_idx}}")
    return [piece for piece in found if piece]


def text_documents(files: list[str]) -> Iterator[list[str]]:
    """The lines of text files, gzipped or not: a line is a document of one piece, an empty line none."""
    for file in files:
        for line in data.lines(Path(file)):
            yield [line] if line else []


def parquet_documents(files: list[str]) -> Iterator[list[str]]:
    """The documents of parquet files in mOSCAR's schema, a few hundred rows in memory at a time."""
    import pyarrow
    from pyarrow import parquet

    for file in files:
        try:
            with parquet.ParquetFile(file, buffer_size=1 << 20) as table:
                names = table.schema_arrow.names
                if "text" not in names:
                    raise InputError(f"{file} has no column text; it has {', '.join(names)}")
                for batch in table.iter_batches(batch_size=256, columns=["text"]):
                    for value in batch.column("text").to_pylist():
                        yield pieces_of(value, file)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{file} is not a readable parquet file ({str(error).splitlines()[0]})") from None


def hub_documents(config: str, revision: str | None) -> Iterator[list[str]]:
    """The documents of one language of mOSCAR, streamed in stored order.

    Raises:
        InputError: offline, gated, no such config or revision, or no column text.
    """
    import datasets

    where = f"{MOSCAR}, config {config}"
    try:
        stream = datasets.load_dataset(
            MOSCAR, config, split="train", streaming=True, revision=revision, columns=["text"]
        )
        for row in stream:
            yield pieces_of(row["text"], where)
    except InputError:
        raise
    except Exception as error:  # the library wraps missing access, network, config and column in a dozen types
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"{where} cannot be read ({reason[:200]}); it needs a network (and `hf auth login` where it is gated), "
            "or give local files with --text or --parquet"
        ) from None


def documents_of(source: dict) -> Iterator[list[str]]:
    """The documents of a `text` entry of a request, without those that have no piece."""
    if source["source"] == "moscar":
        found = hub_documents(source["config"], source["revision"])
    else:
        read = text_documents if source["source"] == "text" else parquet_documents
        found = read([file["path"] for file in source["files"]])
    return (document for document in found if document)


def batches(documents: Iterable[list[str]], size: int) -> Iterator[tuple[list[str], list[int]]]:
    """Pieces of up to `size` documents (fewer where they are long), and the number of each piece's document."""
    pieces, numbers, first, characters = [], [], 1, 0
    for number, document in enumerate(documents, 1):
        pieces += document
        numbers += [number] * len(document)
        characters += sum(map(len, document))
        if number - first + 1 == size or characters >= BATCH_CHARACTERS:
            yield pieces, numbers
            pieces, numbers, first, characters = [], [], number + 1, 0
    if pieces:
        yield pieces, numbers


# ---------------------------------------------------------------- where text comes from


def local_source(kind: str, place: str, given: str) -> tuple[dict, dict]:
    """What a header says of local files (`documents_of` reads from it), and what identifies them wherever they lie.

    Args:
        kind: `text` (one file) or `parquet` (a file, a folder or a pattern).
        given: how the user gave `place`, for the message.

    Raises:
        InputError: no such file.
    """
    import glob

    fingerprint = cli.sibling("cpt/packing.py").fingerprint
    path = Path(place)
    if kind == "parquet":
        paths = sorted(path.rglob("*.parquet")) if path.is_dir() else sorted(map(Path, glob.glob(place)))
    else:
        paths = [path]
    if path.is_file():  # a name may hold the signs of a pattern
        paths = [path]
    if not paths or not all(file.is_file() for file in paths):
        what = "no parquet files there" if path.is_dir() and kind == "parquet" else "no such file"
        raise InputError(f"{given}: {what}")
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
        commit = data.hub_revision(MOSCAR, revision)
    except InputError as error:
        # The same advice, with the flag that this script has for local copies.
        raise InputError(str(error).replace("--data-dir", "--parquet LANGUAGE=FOLDER")) from None
    cli.say(f"{', '.join(codes)}: streamed from {MOSCAR}, revision {commit or 'unknown (the hub was not asked)'}")
    found = {}
    for code, config in configs.items():
        identity = {
            "source": "moscar",
            "dataset": MOSCAR,
            "config": config,
            "split": "train",
            "revision": revision,
        }
        found[code] = (identity | {"revision": commit}, identity)
    return found
