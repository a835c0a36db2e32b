"""Readers of local text files: their kind, texts and rows.

A file's name determines its kind. `.parquet`, and `.jsonl`, `.ndjson` or `.json` (an object per line) hold their text
in a column; `.tsv` and `.csv` are tables, whose columns the user has to name; archives, documents and binary formats
are refused with a remedy; everything else is plain text, a text per line. All but parquet may end in `.gz`.

There are two readers of TSV, because both conventions are in use and a file does not say which one it follows:

- `tsv_cells`: quotes are ordinary characters. For parallel sentences, which are mostly exported without quoting: a
  sentence that opens with a quote must not swallow the lines up to the next quote.
- `quoted_rows`: as pandas and Excel write (SIB-200): enclosing quotes are removed, and a doubled quote is one quote.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError

BOM = "\ufeff"  # byte order mark: an editor leaves it at the start of a text, so joined files have it inside, too
JSON_LINES = (".jsonl", ".ndjson", ".json")
TABLES = (".tsv", ".csv")
# Not .pt: train.pt is more often Portuguese than a tensor, which is not UTF-8 anyway.
NO_TEXT = {
    "is compressed or an archive; unpack it (of the compressed ones only .gz is read)": (
        ".zip", ".zst", ".xz", ".bz2", ".lz4", ".7z", ".rar", ".tar", ".tgz",
    ),
    "is a table in a binary format; write it as .parquet": (
        ".arrow", ".feather", ".orc", ".avro", ".h5", ".hdf5", ".db", ".sqlite", ".tfrecord", ".xls", ".xlsx", ".ods",
    ),
    "is a document with a layout; write its text as .txt, one document or sentence per line": (
        ".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".ppt", ".pptx",
    ),
    "is binary and holds no text; give the text as .txt, .jsonl or .parquet": (
        ".bin", ".idx", ".pth", ".ckpt", ".safetensors", ".gguf", ".npy", ".npz", ".pkl", ".pickle", ".model",
    ),
}  # fmt: skip


def kind(file: Path) -> str:
    """`text`, `json`, `parquet` or `table`, from the name of a file.

    Raises:
        InputError: the name belongs to a format that is not read; the message says what to do.
    """
    suffixes = [suffix.lower() for suffix in file.suffixes]
    packed = bool(suffixes) and suffixes[-1] == ".gz"
    suffix = next(reversed(suffixes[: len(suffixes) - packed]), "")
    for reason, refused in NO_TEXT.items():
        if suffix in refused:
            raise InputError(f"{file} {reason}")
    if suffix == ".parquet":
        if packed:
            raise InputError(f"{file}: a parquet file is compressed inside; unpack it (gunzip)")
        return "parquet"
    return "json" if suffix in JSON_LINES else "table" if suffix in TABLES else "text"


def check(file: Path) -> None:
    """Refuse a file whose texts `documents` cannot read; nothing is opened."""
    if not file.is_file():
        raise InputError(f"{file} {'is a folder' if file.is_dir() else 'does not exist'}; a file of text is needed")
    if kind(file) == "table":
        raise InputError(
            f"{file} is a table, and nothing says which column is text; write the texts as .jsonl, "
            'one object {"text": ..} per line, or as .txt, one text per line (sentence pairs: --source tsv)'
        )


# ---------------------------------------------------------------- texts


def documents(file: Path, column: str = "text", which: str | None = None) -> Iterator[list[str | None]]:
    """The texts of a file in stored order, each as its pieces (`pieces`): a line, or the `column` of a row.

    Args:
        which: `text`, `json` or `parquet`, if the user has given it; default: by the file's name.

    Raises:
        InputError: `check` refuses the file, it cannot be read, or a row has no `column`.
    """
    if which is None:
        check(file)
        which = kind(file)
    if which == "text":
        for line in lines(file):
            yield [line]
        return
    rows = json_rows(file) if which == "json" else parquet_rows(file, (column,))
    for number, row in enumerate(rows, 1):
        yield pieces(row, column, f"{file}, row {number}")


def pieces(row: dict, column: str, where: str) -> list[str | None]:
    """The pieces of a row's text in stored order: a null piece is None, a byte order mark is removed.

    A text is one piece; mOSCAR stores a list of {text, text_idx}; a null is one null piece.

    Raises:
        InputError: no such column, or it holds neither a text nor a list of texts.
    """
    if column not in row:
        have = ", ".join(map(str, row)) or "nothing"
        raise InputError(f"{where} has no column {column!r} (it has: {have}); name the column that holds the text")
    value = row[column]
    if isinstance(value, dict) and "text" in value:  # some releases of datasets return a list of dicts so
        value = value["text"]
    if not isinstance(value, list):
        value = [value]
    parts = [piece["text"] if isinstance(piece, dict) and "text" in piece else piece for piece in value]
    for i, piece in enumerate(parts):
        if isinstance(piece, float) and piece != piece:  # pandas writes a missing text as NaN
            parts[i] = None
        elif isinstance(piece, str):
            parts[i] = piece.lstrip(BOM)
        elif piece is not None:
            raise InputError(f"{where}: the column {column} holds {piece!r:.60}, neither a text nor a list of texts")
    return parts


def joined(document: list[str | None]) -> str:
    """The pieces of a document, joined by newlines; null pieces are left out, so a document of them is empty."""
    return "\n".join(piece for piece in document if piece is not None)


def texts(file: Path, column: str = "text") -> Iterator[str]:
    """The texts of a file in stored order; null texts become empty, and a warning at the end counts them."""
    nulls = 0
    for document in documents(file, column):
        nulls += document.count(None)
        yield joined(document)
    say_nulls(nulls, str(file))


def say_nulls(n: int, where: str) -> None:
    if n:
        cli.warn(f"{where}: {n:,} {'text is' if n == 1 else 'texts are'} null; a null is not text and is left out")


# ---------------------------------------------------------------- lines and rows


def lines(file: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, gzipped or not, without line ends and leading byte order marks.

    Only line feeds end a line: U+2028 or a lone carriage return inside a sentence must not shift the alignment.

    Raises:
        InputError: no such file, or not UTF-8 text.
    """
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8", newline="\n") as stream:
            for line in stream:
                yield line.removesuffix("\n").removesuffix("\r").lstrip(BOM)
    except FileNotFoundError:
        raise InputError(
            f"{file} does not exist; a text file with one sentence or document per line is needed"
        ) from None
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{file} cannot be read as UTF-8 text ({error}); if it is text, save it as UTF-8") from None


def json_rows(file: Path) -> Iterator[dict]:
    """The objects of a JSON Lines file; empty lines are skipped."""
    for number, line in enumerate(lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{file}: line {number} is not JSON ({error.msg}); one object per line is needed"
            ) from None
        if not isinstance(row, dict):
            raise InputError(f"{file}: line {number} is not a JSON object; one object per line is needed")
        yield row


def parquet_rows(file: Path, columns: Iterable[str] = ()) -> Iterator[dict]:
    """The rows of a parquet file, with `columns` or all columns, a few hundred in memory at a time.

    Raises:
        InputError: not a parquet file, or one of `columns` is missing.
    """
    import pyarrow
    from pyarrow import parquet

    columns = list(columns)
    try:
        with parquet.ParquetFile(file, buffer_size=1 << 20) as table:
            names = table.schema_arrow.names
            for column in columns:
                if column not in names:
                    have = ", ".join(names)
                    raise InputError(f"{file} has no column {column!r} (it has: {have}); name the column of the text")
            for batch in table.iter_batches(batch_size=256, columns=columns or None):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file} is not a readable parquet file ({str(error).splitlines()[0]})") from None


def tsv_cells(file: Path) -> list[list[str]]:
    """The cells of a TSV in which quotes are ordinary characters; all lines must have the same number.

    Cells that look quoted get a warning: the file may have been meant for `quoted_rows`.
    """
    cells = [line.split("\t") for line in lines(file)]
    if not cells:
        raise InputError(f"{file} is empty")
    for number, line in enumerate(cells, 1):
        if len(line) != len(cells[0]):
            raise InputError(f"{file}: line {number} has {len(line)} columns, line 1 has {len(cells[0])}")
    quoted = [(number, cell) for number, line in enumerate(cells, 1) for cell in line if _looks_quoted(cell)]
    if quoted:
        cli.warn(
            f"{file}: {len(quoted)} cells look as pandas or a spreadsheet quotes them (line {quoted[0][0]}: "
            f"{quoted[0][1][:40]}); here quotes are read literally, so write the file without quoting "
            "(pandas: quoting=3), or as .jsonl"
        )
    return cells


def _looks_quoted(cell: str) -> bool:
    inner = cell[1:-1]
    return len(cell) > 3 and cell[0] == cell[-1] == '"' and '""' in inner and '"' not in inner.replace('""', "")


def quoted_rows(file: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a TSV as pandas writes it, read as the csv module and pandas read it; row i is on line i + 2.

    Every cell ends on its line, so an unclosed quote is reported with its line, and swallows nothing.

    Raises:
        InputError: no such file, not UTF-8, no rows, a column is missing, a line with more or fewer cells, or quotes
            that no CSV writer produces.
    """
    rows: list[list[str]] = []
    for number, line in enumerate(lines(file), 1):
        try:
            (cells,) = csv.reader([line], delimiter="\t", strict=True)
        except csv.Error as error:
            raise InputError(
                f"{file}, line {number}: not as pandas writes a TSV ({error}); a cell that contains a quote must be in "
                'quotes, with each quote inside doubled: "He said ""no"" to me"'
            ) from None
        if rows and len(cells) != len(rows[0]):
            raise InputError(
                f"{file}, line {number}: {len(cells)} fields instead of {len(rows[0])} (a tab or line break inside?); "
                "correct the row or leave it out"
            )
        rows.append(cells)
    if len(rows) < 2:
        raise InputError(f"{file} holds no rows")
    if missing := [column for column in columns if column not in rows[0]]:
        raise InputError(f"{file} has no column {missing[0]} in its first line, only {', '.join(rows[0])[:80]}")
    return [dict(zip(rows[0], cells, strict=True)) for cells in rows[1:]]


def table(file: Path, columns: tuple[str, ...]) -> list[dict]:
    """The rows of a .jsonl, .parquet or .tsv file that has at least `columns`."""
    if not file.is_file():
        raise InputError(f"{file} does not exist; a local copy needs every file of every language used")
    if file.suffix == ".parquet":
        rows = list(parquet_rows(file))
    elif file.suffix == ".jsonl":
        rows = list(json_rows(file))
    else:
        cells = tsv_cells(file)
        rows = [dict(zip(cells[0], line, strict=True)) for line in cells[1:]]
    if not rows:
        raise InputError(f"{file} holds no rows")
    for column in columns:
        if column not in rows[0]:
            raise InputError(f"{file} has no column {column}; it has {', '.join(map(str, rows[0]))}")
    return rows
