"""Parallel sentences: FLORES+, SIB-200, two text files, or two columns of a TSV, as lists aligned pair by pair.

- `flores`: `openlanguagedata/flores_plus` on the hub, or a folder with `<code>.jsonl`, `.parquet` or `.tsv` (id, text),
  aligned by `id`; or the release archives of FLORES-200 and FLORES-101 extracted (`dev/<code>.dev`), aligned by line.
- `sib200`: `Davlan/sib200` on the hub, or a folder with `<code>/{train,dev,test}.tsv`; aligned by `index_id`. The files
  were written by pandas and are read so: quotes around a cell are none of its text.
- `text`: two text files (.gz allowed), one sentence a line; aligned by line.
- `tsv`: two columns, named or by number, of one file (.gz allowed); aligned by line. Quotes are text here, and so in a
  `.tsv` of `flores`.

Everything a user can get wrong is found here, before any model is loaded.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cpt_utils.base import languages, textfiles
from cpt_utils.base.errors import InputError
from cpt_utils.base.textfiles import lines

SOURCES = ("flores", "sib200", "text", "tsv")
FLORES = "openlanguagedata/flores_plus"
SIB200 = "Davlan/sib200"
# SIB-200 on the hub calls its middle split `validation`, its files `dev.tsv`.
SIB200_SPLITS = ("train", "dev", "test")
SIB200_COLUMNS = ("index_id", "category", "text")
TABLE_SUFFIXES = (".jsonl", ".parquet", ".tsv")


@dataclass(frozen=True)
class ParallelText:
    """Sentence pairs: `base[i]` and `target[i]` mean the same, and `ids[i]` names the pair in its source."""

    base: list[str]
    target: list[str]
    ids: list[str]
    n_available: int
    facts: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def repeated(self) -> dict[str, int]:
        """How many sentences of each side stand more than once; a side without any is left out."""
        counts = {side: Counter(texts) for side, texts in (("base", self.base), ("target", self.target))}
        several = {side: sum(n for n in count.values() if n > 1) for side, count in counts.items()}
        return {side: n for side, n in several.items() if n}

    def describe(self) -> dict:
        """What a result's header says of the data; `pairs_sha256` is over the sentences used, in order.

        `repeated` is there only where sentences repeat: results over others are the same with and without it.
        """
        digest = hashlib.sha256()
        for row in zip(self.ids, self.base, self.target, strict=True):
            digest.update(("\t".join(row) + "\n").encode())
        counts = {"n_used": len(self), "n_available": self.n_available, "pairs_sha256": digest.hexdigest()}
        return {**self.facts, **counts, **({"repeated": self.repeated} if self.repeated else {})}

    def summary(self) -> str:
        """One line for the user: how many pairs, from where, and what was left out."""
        facts = self.facts
        left = {side: facts.get(f"only_in_{side}", 0) for side in ("base", "target")}
        unpaired = ", ".join(f"{n} only in {facts[side]['lang']}" for side, n in left.items() if n)
        split = f" {facts['split']}" if facts.get("split") else ""
        used = f"{len(self)} of {self.n_available}" if len(self) != self.n_available else f"{len(self)}"
        pair = f"{facts['base']['lang']}-{facts['target']['lang']}"
        columns = [facts[side].get("column") for side in ("base", "target")]
        which = "" if None in columns else f", columns {columns[0]} and {columns[1]}"
        empty = facts.get("dropped_empty", 0)
        copies = " and ".join(f"{n} sentences of {facts[side]['lang']}" for side, n in self.repeated.items())
        return (
            f"{used} sentence pairs {pair} from {facts['source']}{split}{which}, aligned by {facts['aligned_by']}"
            f"{f' ({unpaired}: left out)' if unpaired else ''}"
            f"{f' ({empty} with an empty side: left out)' if empty else ''}"
            f"{f'; {copies} stand more than once, and finding any copy counts' if copies else ''}"
        )


def parallel(
    source: str,
    base: str,
    target: str,
    dir: str | os.PathLike | None = None,
    base_file: str | os.PathLike | None = None,
    target_file: str | os.PathLike | None = None,
    split: str | None = None,
    limit: int | None = None,
    revision: str | None = None,
    drop_empty: bool = False,
) -> ParallelText:
    """The sentence pairs of `base` and `target`, in the order of their ids.

    Args:
        source: one of SOURCES.
        base, target: language codes in any spelling that `languages` knows; any tag for `text` and `tsv`.
        dir: local folder of `flores` or `sib200` instead of the hub; for `text` and `tsv` the folder of relative files.
        base_file, target_file: of `text`. For `tsv`, one FILE whose header names the two languages (without such a
            header: columns 1 and 2), or `FILE:COLUMN` for each side with a column's name or its number from 1.
        split: `flores`: dev (default) or devtest; `sib200`: train, dev, test or all (default).
        limit: keep the first so many pairs.
        revision: of the hub data set; default: its newest. The commit used is in `describe()`.
        drop_empty: leave out pairs of which a side is empty or null, and count them, instead of refusing them.

    Raises:
        InputError: unknown language or source, missing or gated data, an empty sentence, a duplicated id, different
            numbers of lines, or no id in common.
    """
    if source not in SOURCES:
        raise InputError(f"unknown data source {source!r}; it is one of {', '.join(SOURCES)}")
    codes = {"base": base, "target": target}
    if source in ("text", "tsv"):
        if split:
            raise InputError(f"--split {split}: the source {source} has no splits; give the file of that split instead")
        read = _text if source == "text" else _tsv
        sides, facts = read(codes, dir, {"base": base_file, "target": target_file})
    else:
        if base_file or target_file:
            raise InputError(f"the source {source} takes --data-dir, not files; for files use --source text or tsv")
        for code in codes.values():
            languages.canonical(code)
        read = _flores if source == "flores" else _sib200
        sides, facts = read(codes, dir, split, revision)

    ids = [i for i in sides["base"] if i in sides["target"]]
    if not ids:
        examples = " and ".join(f"{code} has {_examples(sides[side])}" for side, code in codes.items())
        raise InputError(f"{source}: {base} and {target} have no sentence in common: {examples}")
    ids.sort(key=_natural)
    full = _with_both_sides(ids, sides, codes, f"{source}: the {{}} sentence of {facts['aligned_by']} {{}}", drop_empty)
    if drop_empty:
        facts["dropped_empty"] = len(ids) - len(full)
    ids = full
    for side, code in codes.items():
        other = sides["target" if side == "base" else "base"]
        facts[f"only_in_{side}"] = sum(i not in other for i in sides[side])
        facts[side] = {"lang": code, "canonical": languages.canonical(code, any_tag=True), **facts.get(side, {})}
    used = ids[:limit]
    return ParallelText(
        [sides["base"][i] for i in used],
        [sides["target"][i] for i in used],
        used,
        len(ids),
        {"source": source, **facts, "limit": limit if len(used) < len(ids) else None},
    )


def _with_both_sides(ids: list[str], sides: dict, codes: dict, what: str, drop: bool) -> list[str]:
    """The ids of pairs without an empty or null side; `what` says which sentence is meant, of a language and an id.

    Raises:
        InputError: a pair with an empty side that is not to be dropped, or no pair without.
    """
    empty = {
        i: code for side, code in codes.items() for i in ids
        if not isinstance(sides[side][i], str) or not sides[side][i].strip()
    }  # fmt: skip
    if empty and not drop:
        i, code = next(iter(empty.items()))
        more = f", and {len(empty) - 1} more pairs have an empty side" if len(empty) > 1 else ""
        raise InputError(
            f"{what.format(code, i)} is empty{more}; fill it, remove the pair from both languages, or leave out such "
            "pairs with --drop-empty"
        )
    if len(empty) == len(ids):
        raise InputError(f"each of the {len(ids)} pairs of {' and '.join(codes.values())} has an empty side")
    return [i for i in ids if i not in empty]


def _examples(rows: dict) -> str:
    ids = sorted(rows, key=_natural)
    return f"{ids[0]} .. {ids[-1]}" if ids else "none"


def _natural(text: str) -> tuple:
    """Sort key that puts `2` before `10`; digits that are not decimal (`²`) are letters like others."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part)


# --- FLORES+ ---------------------------------------------------------------------------------------------------------


def _flores(codes: dict, folder, split: str | None, revision: str | None) -> tuple[dict, dict]:
    split = split or "dev"
    if split not in ("dev", "devtest"):
        raise InputError(f"--split {split}: FLORES+ has dev (997 sentences) and devtest (1012)")
    facts = {"split": split, "aligned_by": "id"}
    sides = {}
    if folder is None:
        revision = hub_revision(FLORES, revision)
        facts["dataset"] = FLORES
        for side, code in codes.items():
            name = languages.spelling(code, "flores_plus")
            rows, facts["revision"] = _hub_rows(FLORES, name, split, revision, ("id", "text"))
            sides[side] = _by_id(rows, "id", f"FLORES+ {name} {split}")
            facts[side] = {"spelling": name}
        return sides, facts
    place = _flores_folder(_folder(folder), split)
    for side, code in codes.items():
        file = _language_file(place, code, split)
        facts[side] = {"spelling": _language_of(file, split), "files": {str(file): file_sha256(file)}}
        if file.suffix not in TABLE_SUFFIXES:  # of a release archive: a sentence a line, the same in every file
            sides[side] = {str(number): line for number, line in enumerate(lines(file), 1)}
            facts["aligned_by"] = "line"
            continue
        rows = _table(file, ("id", "text"))
        if any("split" in row for row in rows):  # newer releases say in each row which split it is of
            found = sorted({str(row.get("split")) for row in rows})
            rows = [row for row in rows if row.get("split") == split]
            if not rows:
                raise InputError(f"{file} holds the split {', '.join(found)}, not {split}; give --split {found[0]}")
        sides[side] = _by_id(rows, "id", str(file))
    if facts["aligned_by"] == "line":
        files = {side: next(iter(facts[side]["files"])) for side in codes}
        if other := [file for file in files.values() if Path(file).suffix in TABLE_SUFFIXES]:
            raise InputError(f"{other[0]} has ids, the other language's file has lines; give both in the same form")
        _same_number(sides, files)
    return sides, facts


def _flores_folder(folder: Path, split: str) -> Path:
    """Where the language files of `split` lie: in its folder, here or in a release archive's; else in `folder`."""
    for place in (folder, folder / "flores200_dataset", folder / "flores101_dataset"):
        if (place / split).is_dir():
            return place / split
    return folder


def _language_of(file: Path, split: str) -> str | None:
    """The language in a file's name: `<code>.jsonl`, or `<code>.dev` and `dev.<code>` of the release archives."""
    if file.suffix in TABLE_SUFFIXES:
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
    found = [path for path, name in files.items() if name == stem]
    if len(found) > 1:
        raise InputError(f"{folder}: {' and '.join(p.name for p in found)} are both {code}; keep one of them")
    return found[0]


# --- SIB-200 ---------------------------------------------------------------------------------------------------------


def _sib200(codes: dict, folder, split: str | None, revision: str | None) -> tuple[dict, dict]:
    splits = sib200_splits(split)
    facts = {"split": split or "all", "aligned_by": "index_id"}
    sides = {}
    if folder is None:
        revision = hub_revision(SIB200, revision)
        facts["dataset"] = SIB200
    else:
        folder = _folder(folder)
    for side, code in codes.items():
        if folder is None:
            name = languages.spelling(code, "sib200")
            rows = []
            for part in splits:
                hub_split = "validation" if part == "dev" else part
                more, facts["revision"] = _hub_rows(SIB200, name, hub_split, revision, SIB200_COLUMNS)
                rows += more
            facts[side] = {"spelling": name}
        else:
            place = sib200_folder(folder, code)
            rows = sib200_rows(place, split or "all")
            files = [place / f"{part}.tsv" for part in splits]
            facts[side] = {"spelling": place.name, "files": {str(file): file_sha256(file) for file in files}}
        sides[side] = _by_id(rows, "index_id", f"SIB-200 {code}")
    return sides, facts


def sib200_splits(split: str | None) -> tuple[str, ...]:
    """The files that `split` (train, dev or validation, test, all or None) stands for."""
    split = "dev" if split == "validation" else split
    if split in (None, "all"):
        return SIB200_SPLITS
    if split not in SIB200_SPLITS:
        raise InputError(f"--split {split}: SIB-200 has train (701 sentences), dev (99), test (204), or all (1004)")
    return (split,)


def sib200_folder(folder: str | os.PathLike, code: str) -> Path:
    """The folder of language `code` in a local copy of SIB-200, in whatever spelling it is there."""
    folder = _folder(folder)
    return folder / languages.find([p.name for p in folder.iterdir() if p.is_dir()], code, what=str(folder))


def sib200_rows(folder: str | os.PathLike, split: str = "all") -> list[dict[str, str]]:
    """The rows (`index_id`, `category`, `text`) of one language's local folder; `all` joins train, dev and test.

    Raises:
        InputError: a file is missing, or not as pandas writes it (`textfiles.quoted_rows`).
    """
    files = [Path(folder) / f"{part}.tsv" for part in sib200_splits(split)]
    return [row for file in files for row in textfiles.quoted_rows(file, SIB200_COLUMNS)]


# --- local files -----------------------------------------------------------------------------------------------------


def _text(codes: dict, folder, files: dict) -> tuple[dict, dict]:
    sides, facts, names = {}, {"aligned_by": "line"}, {}
    for side, code in codes.items():
        file = _given(files[side], folder, f"--{side}-file", code)
        sides[side] = {str(number): text for number, text in enumerate(textfiles.texts(file), 1)}
        facts[side] = {"files": {str(file): file_sha256(file)}}
        names[side] = str(file)
    _same_number(sides, names)
    return sides, facts


def _same_number(sides: dict, files: dict) -> None:
    base, target = (len(sides[side]) for side in files)
    if base != target:
        raise InputError(
            f"{files['base']} has {base} lines and {files['target']} has {target}; "
            "files without ids are aligned by line and must have the same number"
        )


def _tsv(codes: dict, folder, files: dict) -> tuple[dict, dict]:
    first = files["base"] or files["target"]
    given = {side: _file_and_column(files[side] or first, folder, code) for side, code in codes.items()}
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
    digest = file_sha256(file)
    sides, facts = {}, {"aligned_by": "line"}
    for side, index in column.items():
        numbered = enumerate(rows[start:], start + 1)
        sides[side] = {str(number): row[index] for number, row in numbered}
        name = rows[0][index] if header == "names" else index + 1
        facts[side] = {"files": {str(file): digest}, "column": name}
    return sides, facts


def _file_and_column(given, folder, code: str) -> tuple[Path, str | None]:
    file = _given(given, folder, "--base-file", code, must_exist=False)
    name, colon, column = file.name.rpartition(":")
    if colon and not file.exists():
        return file.with_name(name), column
    return file, None


def _columns(file: Path, first: list[str], codes: dict, given: dict) -> tuple[dict[str, int], str | None]:
    """Which column each side is, and what the first line holds: "names", "numbers" (as pandas counts), None: data.

    Columns asked for by number from 1 mean that every line is data, whatever ids line 1 holds; by name, that the first
    line holds the names. Where nothing is asked for, the languages themselves are looked up in the first line, else
    columns 1 and 2 of two are taken.
    """
    counted = [str(number) for number in range(len(first))]
    numbers = "numbers" if first in (counted, ["", *counted[:-1]]) else None
    asked = f"give --base-file {file.name}:COLUMN and --target-file {file.name}:COLUMN (a name, or a number from 1)"
    if all(name is None for name in given.values()):
        found = {side: languages.find(first, code, what=str(file), default=None) for side, code in codes.items()}
        if None not in found.values():
            return {side: first.index(name) for side, name in found.items()}, "names"
        if len(first) != 2 or first[0] == "":
            raise InputError(
                f"{file} has {len(first)} columns, and line 1 does not name {' and '.join(codes.values())}; {asked}"
            )
        return {"base": 0, "target": 1}, numbers
    if None in given.values():
        raise InputError(f"{file}: a column is given for one language only; give FILE:COLUMN for both")
    places = [int(name) if name.isdecimal() else 0 for name in given.values()]
    if all(1 <= place <= len(first) for place in places):
        return {side: place - 1 for side, place in zip(given, places, strict=True)}, numbers
    wrong = [name for name in given.values() if first.count(name) != 1]
    if wrong and all(name.isdecimal() for name in given.values()):
        outside = next(place for place in places if not 1 <= place <= len(first))
        raise InputError(f"{file} has columns 1 to {len(first)}, no column {outside}")
    if wrong:
        raise InputError(f"{file}: no single column is named {wrong[0]!r}; line 1 has {', '.join(first)[:200]}")
    return {side: first.index(name) for side, name in given.items()}, "names"


def _given(file, folder, flag: str, code: str, must_exist: bool = True) -> Path:
    if file is None:
        raise InputError(f"no file for {code}: give {flag}, or the study key data.{flag[2:].replace('-', '_')}")
    path = Path(folder) / file if folder is not None else Path(file)
    if must_exist and not path.is_file():
        raise InputError(f"{path} does not exist; give {flag} the sentences of {code}, one a line")
    return path


def _folder(folder) -> Path:
    folder = Path(folder)
    if folder.is_file():
        raise InputError(f"--data-dir {folder} is a file; extract it if it is an archive, and give the folder")
    if not folder.is_dir():
        raise InputError(f"--data-dir {folder} is not a folder; leave it out to read from the hub")
    return folder


def _table(file: Path, columns: tuple[str, ...]) -> list[dict]:
    """The rows of a .jsonl, .parquet or .tsv file that has at least `columns`."""
    if not file.is_file():
        raise InputError(f"{file} does not exist; a local copy needs every file of every language used")
    if file.suffix == ".parquet":
        rows = list(textfiles.parquet_rows(file))
    elif file.suffix == ".jsonl":
        rows = list(textfiles.json_rows(file))
    else:
        cells = textfiles.tsv_cells(file)
        rows = [dict(zip(cells[0], line, strict=True)) for line in cells[1:]]
    if not rows:
        raise InputError(f"{file} holds no rows")
    for column in columns:
        if column not in rows[0]:
            raise InputError(f"{file} has no column {column}; it has {', '.join(map(str, rows[0]))}")
    return rows


def _by_id(rows: Iterable[dict], key: str, what: str) -> dict[str, str | None]:
    """`{id: text}`, with ids as text so that `431` from a TSV and 431 from parquet are one."""
    texts: dict[str, str | None] = {}
    for row in rows:
        i = row.get(key)
        if i is None or i == "":
            raise InputError(f"{what}: a row has no {key}")
        if str(i) in texts:
            raise InputError(f"{what}: {key} {i} comes twice; sentences are aligned by {key}, which must be unique")
        text = row.get("text")
        texts[str(i)] = text.lstrip(textfiles.BOM) if isinstance(text, str) else text
    return texts


def file_sha256(file: str | os.PathLike) -> str:
    """The SHA-256 of the file's bytes, as `sha256sum` prints it."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- the hub ---------------------------------------------------------------------------------------------------------


def hub_revision(repository: str, revision: str | None = None) -> str | None:
    """The commit of a hub data set that `revision` stands for, after asking whether this account may read it.

    None where the hub cannot be reached: a copy in the local cache may still serve.

    Raises:
        InputError: gated and not accepted, no such data set, or no such revision.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    try:
        api.auth_check(repository, repo_type="dataset")
        return api.dataset_info(repository, revision=revision, timeout=30).sha
    except GatedRepoError:
        raise InputError(
            f"{repository} is gated: accept its terms at https://huggingface.co/datasets/{repository}, "
            "then run `hf auth login` or set HF_TOKEN; a local copy works too: --data-dir"
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"{repository} has no revision {revision}") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{repository} is not on the hub, or this account may not see it; run `hf auth login`, or give --data-dir"
        ) from None
    except Exception:  # offline mode, no network, a proxy: half a dozen types of two libraries
        return revision


def _hub_rows(repository: str, name: str, split: str, revision: str | None, columns: tuple[str, ...]):
    """The rows of one config and split of a hub data set (from the cache where it is there), and their commit."""
    import datasets

    quiet = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        loaded = datasets.load_dataset(repository, name, split=split, revision=revision)
    except Exception as error:  # the library wraps missing access, network, config and split in many types
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"{repository}, config {name}, split {split} cannot be loaded ({reason[:200]}); "
            "load it once with a network (and `hf auth login` where it is gated), or give a local copy with --data-dir"
        ) from None
    finally:
        datasets.utils.logging.set_verbosity(quiet)
    missing = [column for column in columns if column not in loaded.column_names]
    if missing:
        raise InputError(f"{repository}, config {name}: no column {', '.join(missing)}, only {loaded.column_names}")
    # Since datasets 4 `loaded["text"]` is a lazy Column; a slice of it is a list.
    values = [loaded[column][:] for column in columns]
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*values, strict=True)]
    # Read offline, the commit is known only from where the cached files came from: hf://datasets/<name>@<commit>/...
    sources = " ".join(loaded.info.download_checksums or {})
    commit = re.search(rf"{re.escape(repository)}@([0-9a-f]{{40}})", sources)
    return rows, revision or (commit[1] if commit else None)


# --- command line ----------------------------------------------------------------------------------------------------


def add_flags(parser) -> None:
    """The flags that say where parallel sentences come from; `from_arguments` reads them."""
    p = parser.add_argument_group("parallel sentences")
    p.add_argument(
        "--source", choices=SOURCES, help="where sentence pairs come from; default: the study's, else flores"
    )
    p.add_argument(
        "--data-dir", metavar="D", help="local copy of the source (flores, sib200), or folder of the files below"
    )
    p.add_argument(
        "--base-file", metavar="F", help="sentences of the base language, one a line (text), or FILE:COLUMN (tsv)"
    )
    p.add_argument("--target-file", metavar="F", help="the same for the target language")
    p.add_argument("--split", metavar="S", help="part of the source; default dev for flores, all 1004 rows for sib200")
    p.add_argument(
        "--drop-empty",
        action="store_true",
        default=None,
        help="leave out pairs with an empty side, as verse-aligned text has; default: the study's, else refuse them",
    )


def from_arguments(args, study, base: str, target: str) -> ParallelText:
    """The sentence pairs that the command line and the study ask for.

    A source given on the command line takes no file, folder or split from the study: they belong to the study's source.
    """
    own = args.source in (None, study.get("data.source"))
    source = study.value(args.source, "--source", "data.source", "flores")

    def place(given, flag: str, key: str):
        return study.value(given, flag, f"data.{key}", None) if own else given

    return parallel(
        source,
        base,
        target,
        dir=place(args.data_dir, "--data-dir", "dir"),
        base_file=place(args.base_file, "--base-file", "base_file"),
        target_file=place(args.target_file, "--target-file", "target_file"),
        split=place(args.split, "--split", "split"),
        limit=args.limit,
        drop_empty=bool(place(args.drop_empty, "--drop-empty", "drop_empty")),
    )
