"""SIB-200, train (701 sentences), dev (99), test (204) or all (the default), from the hub or a local copy.

`Davlan/sib200` on the hub, or a folder with `<code>/{train,dev,test}.tsv`; aligned by `index_id`. The files are read
as pandas wrote them: quotes around a cell are not part of its text.
"""

from __future__ import annotations

import os
from pathlib import Path

from cpt_utils.base import hub_data, languages, results, textfiles
from cpt_utils.base.errors import InputError
from cpt_utils.base.sources import by_id, local_folder

DATASET = "Davlan/sib200"
SPLITS = ("train", "dev", "test")  # the second is `validation` on the hub, but its files are `dev.tsv`
COLUMNS = ("index_id", "category", "text")


def read(codes: dict[str, str], dir, split: str | None) -> tuple[dict, dict]:
    for code in codes.values():
        languages.canonical(code)
    parts = splits(split)
    facts = {"split": split or "all", "aligned_by": "index_id"}
    sides = {}
    if dir is None:
        revision = hub_data.revision(DATASET)
        facts["dataset"] = DATASET
    for side, code in codes.items():
        if dir is None:
            name = languages.spelling(code, "sib200")
            language_rows = []
            for part in parts:
                hub_split = "validation" if part == "dev" else part
                more, facts["revision"] = hub_data.rows(DATASET, name, hub_split, revision, COLUMNS)
                language_rows += more
            facts[side] = {"spelling": name}
        else:
            folder = language_folder(dir, code)
            language_rows = rows(folder, split or "all")
            files = [folder / f"{part}.tsv" for part in parts]
            facts[side] = {"spelling": folder.name, "files": {str(file): results.file_sha256(file) for file in files}}
        sides[side] = by_id(language_rows, "index_id", f"SIB-200 {code}")
    return sides, facts


def splits(split: str | None) -> tuple[str, ...]:
    """The parts that `split` (train, dev or validation, test, all or None) means."""
    split = "dev" if split == "validation" else split
    if split in (None, "all"):
        return SPLITS
    if split not in SPLITS:
        raise InputError(f"--split {split}: SIB-200 has train (701 sentences), dev (99), test (204), or all (1004)")
    return (split,)


def language_folder(folder: str | os.PathLike, code: str) -> Path:
    """The folder of language `code` in a local copy of SIB-200, in any spelling."""
    folder = local_folder(folder)
    return folder / languages.find([p.name for p in folder.iterdir() if p.is_dir()], code, what=str(folder))


def rows(folder: str | os.PathLike, split: str = "all") -> list[dict[str, str]]:
    """The rows (`index_id`, `category`, `text`) of one language's local folder; `all` joins train, dev and test.

    Raises:
        InputError: a file is missing, or not as pandas writes it (`textfiles.quoted_rows`).
    """
    files = [Path(folder) / f"{part}.tsv" for part in splits(split)]
    return [row for file in files for row in textfiles.quoted_rows(file, COLUMNS)]
