"""FLORES+, dev (997 sentences; the default) or devtest (1012), from the hub or a local copy.

`openlanguagedata/flores_plus` on the hub, or a folder with `<code>.jsonl`, `.parquet` or `.tsv` (id, text), aligned by
`id`; or the release archives of FLORES-200 and FLORES-101 extracted (`dev/<code>.dev`), aligned by line. Quotes in a
`.tsv` are text.
"""

from __future__ import annotations

from pathlib import Path

from cpt_utils.base import hub_data, languages, results, textfiles
from cpt_utils.base.errors import InputError
from cpt_utils.base.sources import by_id, local_folder, same_number

DATASET = "openlanguagedata/flores_plus"
TABLES = (".jsonl", ".parquet", ".tsv")


def read(codes: dict[str, str], dir, split: str | None) -> tuple[dict, dict]:
    for code in codes.values():
        languages.canonical(code)
    split = split or "dev"
    if split not in ("dev", "devtest"):
        raise InputError(f"--split {split}: FLORES+ has dev (997 sentences) and devtest (1012)")
    facts = {"split": split, "aligned_by": "id"}
    sides = {}
    if dir is None:
        revision = hub_data.revision(DATASET)
        facts["dataset"] = DATASET
        for side, code in codes.items():
            name = languages.spelling(code, "flores_plus")
            rows, facts["revision"] = hub_data.rows(DATASET, name, split, revision, ("id", "text"))
            sides[side] = by_id(rows, "id", f"FLORES+ {name} {split}")
            facts[side] = {"spelling": name}
        return sides, facts
    folder = _split_folder(local_folder(dir), split)
    for side, code in codes.items():
        file = _language_file(folder, code, split)
        facts[side] = {"spelling": _language_of(file, split), "files": {str(file): results.file_sha256(file)}}
        if file.suffix not in TABLES:  # from a release archive: a sentence per line, the same line in every file
            sides[side] = {str(number): line for number, line in enumerate(textfiles.lines(file), 1)}
            facts["aligned_by"] = "line"
            continue
        rows = textfiles.table(file, ("id", "text"))
        if any("split" in row for row in rows):  # newer releases name the split in each row
            stored = sorted({str(row.get("split")) for row in rows})
            rows = [row for row in rows if row.get("split") == split]
            if not rows:
                raise InputError(f"{file} holds the split {', '.join(stored)}, not {split}; give --split {stored[0]}")
        sides[side] = by_id(rows, "id", str(file))
    if facts["aligned_by"] == "line":
        files = {side: next(iter(facts[side]["files"])) for side in codes}
        if with_ids := [file for file in files.values() if Path(file).suffix in TABLES]:
            raise InputError(f"{with_ids[0]} has ids, the other language's file has lines; give both in the same form")
        same_number(sides, files)
    return sides, facts


def _split_folder(folder: Path, split: str) -> Path:
    """The folder of the language files of `split`: its sub-folder here or in a release archive, else `folder`."""
    for parent in (folder, folder / "flores200_dataset", folder / "flores101_dataset"):
        if (parent / split).is_dir():
            return parent / split
    return folder


def _language_of(file: Path, split: str) -> str | None:
    """The language in a file's name: `<code>.jsonl`, or `<code>.dev` and `dev.<code>` of release archives."""
    if file.suffix in TABLES:
        return file.stem
    parts = file.name.split(".")
    return next((part for part in parts if part != split), None) if split in parts and len(parts) == 2 else None


def _language_file(folder: Path, code: str, split: str) -> Path:
    """The one file of `code` in `folder`, whatever the spelling of its name."""
    files = {path: name for path in sorted(folder.iterdir()) if (name := _language_of(path, split)) and path.is_file()}
    if not files:
        raise InputError(
            f"{folder} holds no language files; expected names like {code}.jsonl (.parquet, .tsv), or {code}.{split}"
        )
    stem = languages.find(set(files.values()), code, what=str(folder))
    matches = [path for path, name in files.items() if name == stem]
    if len(matches) > 1:
        raise InputError(f"{folder}: {' and '.join(p.name for p in matches)} are both {code}; keep one of them")
    return matches[0]
