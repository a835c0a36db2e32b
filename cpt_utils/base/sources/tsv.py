"""Two columns of one file, FILE:COLUMN by name or by number from 1 for each side, aligned by line.

Without columns: those named after the two languages in the header, else 1 and 2 of two. Quotes are text here, because
a sentence that opens with one must not swallow the next lines. The file may be gzipped.
"""

from __future__ import annotations

from pathlib import Path

from cpt_utils.base import languages, results, textfiles
from cpt_utils.base.errors import InputError
from cpt_utils.base.sources import given_file


def read(codes: dict[str, str], dir, base_file, target_file) -> tuple[dict, dict]:
    files = {"base": base_file, "target": target_file}
    first = files["base"] or files["target"]
    given = {side: _file_and_column(files[side] or first, dir, code) for side, code in codes.items()}
    if given["base"][0] != given["target"][0]:
        raise InputError(
            f"--source tsv reads both columns from one file, not {given['base'][0]} and {given['target'][0]}; "
            "for two files use --source text"
        )
    file = given["base"][0]
    if not file.is_file():
        raise InputError(f"{file} does not exist; give --base-file FILE or FILE:COLUMN")
    rows = textfiles.tsv_cells(file)
    column, header = _columns(file, rows[0], codes, {side: name for side, (_, name) in given.items()})
    start = 1 if header else 0
    digest = results.file_sha256(file)
    sides, facts = {}, {"aligned_by": "line"}
    for side, index in column.items():
        numbered = enumerate(rows[start:], start + 1)
        sides[side] = {str(number): row[index] for number, row in numbered}
        name = rows[0][index] if header == "names" else index + 1
        facts[side] = {"files": {str(file): digest}, "column": name}
    return sides, facts


def _file_and_column(given, folder, code: str) -> tuple[Path, str | None]:
    file = given_file(given, folder, "--base-file", code, must_exist=False)
    name, colon, column = file.name.rpartition(":")
    if colon and not file.exists():
        return file.with_name(name), column
    return file, None


def _columns(file: Path, first: list[str], codes: dict, given: dict) -> tuple[dict[str, int], str | None]:
    """The column of each side, and the content of line 1: "names", "numbers" (as pandas counts), or None (data).

    Columns given by number from 1 mean that line 1 is data, whatever it holds, unless it is pandas' numbers; columns
    given by name are looked up in line 1. Without columns, the languages are looked up in line 1, else columns 1 and 2
    of two are taken.
    """
    counted = [str(number) for number in range(len(first))]
    numbers = "numbers" if first in (counted, ["", *counted[:-1]]) else None
    asked = f"give --base-file {file.name}:COLUMN and --target-file {file.name}:COLUMN (a name, or a number from 1)"
    if all(name is None for name in given.values()):
        by_language = {side: languages.find(first, code, what=str(file), default=None) for side, code in codes.items()}
        if None not in by_language.values():
            return {side: first.index(name) for side, name in by_language.items()}, "names"
        if len(first) != 2 or first[0] == "":
            raise InputError(
                f"{file} has {len(first)} columns, and line 1 does not name {' and '.join(codes.values())}; {asked}"
            )
        return {"base": 0, "target": 1}, numbers
    if None in given.values():
        raise InputError(f"{file}: a column is given for one language only; give FILE:COLUMN for both")
    columns = [int(name) if name.isdecimal() else 0 for name in given.values()]
    if all(1 <= column <= len(first) for column in columns):
        return {side: column - 1 for side, column in zip(given, columns, strict=True)}, numbers
    wrong = [name for name in given.values() if first.count(name) != 1]
    if wrong and all(name.isdecimal() for name in given.values()):
        outside = next(column for column in columns if not 1 <= column <= len(first))
        raise InputError(f"{file} has columns 1 to {len(first)}, no column {outside}")
    if wrong:
        raise InputError(f"{file}: no single column is named {wrong[0]!r}; line 1 has {', '.join(first)[:200]}")
    return {side: first.index(name) for side, name in given.items()}, "names"
