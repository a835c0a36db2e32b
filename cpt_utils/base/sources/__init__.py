"""Parallel sentences as lists of aligned pairs, from the sources in this folder: one file each, found by its name.

A source is a module with a function `read(codes, ...)` that returns `(sides, facts)`:

- `codes` is `{"base": code, "target": code}` as the user spells them;
- `sides` is `{"base": {id: sentence}, "target": {id: sentence}}`; ids on both sides are paired;
- `facts` go into the header of results. `aligned_by` says what an id is ("id", "line", "verse"); facts about one side
  are below its name: `facts["base"] = {"spelling": .., "files": {path: SHA-256}}`.

The further parameters of `read` are the options (of `OPTIONS`) that the source takes; it refuses the others. The first
line of the module's docstring is its help. All input is checked here, before any model is loaded.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import pkgutil
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cpt_utils.base import languages, textfiles
from cpt_utils.base.errors import InputError

SOURCES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
# Each option with its flag, and the end of the message for a source without that parameter.
OPTIONS = {
    "dir": ("--data-dir", "reads no folder"),
    "base_file": ("--base-file", "takes no files; for files use --source text or tsv"),
    "target_file": ("--target-file", "takes no files; for files use --source text or tsv"),
    "split": ("--split", "has no splits; give the file of that split instead"),
}


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
        """How many sentences of each side occur more than once; a side without repetitions is left out."""
        counts = {side: Counter(texts) for side, texts in (("base", self.base), ("target", self.target))}
        several = {side: sum(n for n in count.values() if n > 1) for side, count in counts.items()}
        return {side: n for side, n in several.items() if n}

    @property
    def alone(self) -> list[int]:
        """The pairs with no sentence that occurred earlier on its side: a copy is not an independent draw."""
        sides = self.base, self.target
        first = [{text: i for i, text in reversed([*enumerate(texts)])} for texts in sides]
        return [i for i in range(len(self)) if all(at[texts[i]] == i for at, texts in zip(first, sides, strict=True))]

    def describe(self) -> dict:
        """The data's entry in a result's header; `pairs_sha256` is over the sentences used, in order.

        `repeated` is included only if sentences repeat, so headers of other data are as before it was introduced.
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
            f"{f'; {copies} occur more than once, and finding any copy counts' if copies else ''}"
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
    drop_empty: bool = False,
) -> ParallelText:
    """The sentence pairs of `base` and `target`, in the order of their ids.

    Args:
        source: one of SOURCES.
        base, target: language codes in any spelling that `languages` knows; any tag for `text` and `tsv`.
        dir, base_file, target_file, split: see the docstring of the source; `dir` is a local copy of a source on the
            hub, or the folder of relative file names.
        limit: keep only the first `limit` pairs.
        drop_empty: leave out and count pairs with an empty or null side, instead of refusing them.

    Raises:
        InputError: unknown language or source, an option that the source does not take, missing or gated data, an empty
            sentence, a duplicated id, different numbers of lines, or no id in common.
    """
    if source not in SOURCES:
        raise InputError(f"unknown data source {source!r}; it is one of {', '.join(SOURCES)}")
    read, codes = _module(source).read, {"base": base, "target": target}
    options = {"dir": dir, "base_file": base_file, "target_file": target_file, "split": split}
    taken = inspect.signature(read).parameters
    for option, value in options.items():
        if value and option not in taken:
            flag, reason = OPTIONS[option]
            raise InputError(f"{flag} {value}: the source {source} {reason}")
    sides, facts = read(codes, **{option: value for option, value in options.items() if option in taken})

    ids = [i for i in sides["base"] if i in sides["target"]]
    if not ids:
        examples = " and ".join(f"{code} has {_examples(sides[side])}" for side, code in codes.items())
        raise InputError(f"{source}: {base} and {target} have no sentence in common: {examples}")
    ids.sort(key=_natural)
    kept = _with_both_sides(ids, sides, codes, f"{source}: the {{}} sentence of {facts['aligned_by']} {{}}", drop_empty)
    if drop_empty:
        facts["dropped_empty"] = len(ids) - len(kept)
    ids = kept
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


def _module(source: str):
    return importlib.import_module(f"{__name__}.{source}")


def _with_both_sides(ids: list[str], sides: dict, codes: dict, what: str, drop: bool) -> list[str]:
    """The ids of pairs without an empty or null side; `what` formats a language and an id for the message.

    Raises:
        InputError: a pair has an empty side and `drop` is false, or every pair has one.
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
    """Sort key that puts `2` before `10`; digits that are not decimal (`²`) count as letters."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part)


# --- shared by several sources ----------------------------------------------------------------------------------------


def same_number(sides: dict, files: dict) -> None:
    """Refuse sides of different lengths if sentences are aligned by line; `files` are named in the message."""
    base, target = (len(sides[side]) for side in files)
    if base != target:
        raise InputError(
            f"{files['base']} has {base} lines and {files['target']} has {target}; "
            "files without ids are aligned by line and must have the same number"
        )


def given_file(file, folder, flag: str, code: str, must_exist: bool = True) -> Path:
    """The path of the file that `flag` gives for the language `code`, relative to `folder` if it is given."""
    if file is None:
        raise InputError(f"no file for {code}: give {flag}, or the study key data.{flag[2:].replace('-', '_')}")
    path = Path(folder) / file if folder is not None else Path(file)
    if must_exist and not path.is_file():
        raise InputError(f"{path} does not exist; give {flag} the sentences of {code}, one per line")
    return path


def local_folder(folder) -> Path:
    """The folder that --data-dir names."""
    if folder is None:
        raise InputError("nothing says where the sentences are: give --data-dir, or the study key data.dir")
    folder = Path(folder)
    if folder.is_file():
        raise InputError(f"--data-dir {folder} is a file; extract it if it is an archive, and give the folder")
    if not folder.is_dir():
        raise InputError(f"--data-dir {folder} is not a folder; give one, or leave it out to read from the hub")
    return folder


def by_id(rows: Iterable[dict], key: str, what: str) -> dict[str, str | None]:
    """`{id: text}`, with ids as text so that `431` from a TSV and 431 from parquet are the same."""
    texts: dict[str, str | None] = {}
    for row in rows:
        i = row.get(key)
        if i is None or i == "":
            raise InputError(f"{what}: a row has no {key}")
        if str(i) in texts:
            raise InputError(f"{what}: {key} {i} appears twice; sentences are aligned by {key}, which must be unique")
        text = row.get("text")
        texts[str(i)] = text.lstrip(textfiles.BOM) if isinstance(text, str) else text
    return texts


# --- command line ----------------------------------------------------------------------------------------------------


def add_flags(parser) -> None:
    """The flags that say where parallel sentences come from; `from_arguments` reads them."""
    p = parser.add_argument_group("parallel sentences")
    what = "; ".join(f"{name}: {_module(name).__doc__.splitlines()[0].rstrip('.')}" for name in SOURCES)
    p.add_argument("--source", choices=SOURCES, help=f"default: the study's, else flores. {what}")
    p.add_argument("--data-dir", metavar="D", help="local copy of a source on the hub, or folder of the files below")
    p.add_argument("--base-file", metavar="F", help="sentences of the base language, for a source that takes files")
    p.add_argument("--target-file", metavar="F", help="the same for the target language")
    p.add_argument("--split", metavar="S", help="part of the source")
    text = "leave out pairs with an empty side, as in verse-aligned text; default: the study's, else refuse them"
    p.add_argument("--drop-empty", action="store_true", default=None, help=text)


def from_arguments(args, study, base: str, target: str) -> ParallelText:
    """The sentence pairs requested by the command line and the study.

    A source on the command line ignores the study's files, folder and split, which belong to the study's source.
    """
    from_study = args.source in (None, study.get("data.source"))
    source = study.value(args.source, "--source", "data.source", "flores")

    def option(given, flag: str, key: str):
        return study.value(given, flag, f"data.{key}", None) if from_study else given

    return parallel(
        source,
        base,
        target,
        dir=option(args.data_dir, "--data-dir", "dir"),
        base_file=option(args.base_file, "--base-file", "base_file"),
        target_file=option(args.target_file, "--target-file", "target_file"),
        split=option(args.split, "--split", "split"),
        limit=args.limit,
        drop_empty=bool(option(args.drop_empty, "--drop-empty", "drop_empty")),
    )
