"""Multiple-choice tasks for changed models in memory: SIB-200, and those of cpt/continuations.py.

lm_eval evaluates any task, on checkpoints and written models; swaps in memory are measured on these tasks only.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import cli, hub_data, languages, results, textfiles
from cpt_utils.base.errors import InputError
from cpt_utils.base.sources import sib200 as source
from cpt_utils.measures import sib200

SIB200, CONTINUATION = "sib200_", "continuation_"  # what the names of tasks begin with


@dataclass(frozen=True)
class Item:
    """A row of a task: the choice number `right` is the correct continuation of the prompt."""

    prompt: str
    choices: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Task:
    """The rows of a task; `facts` state their origin for a header."""

    items: list[Item]
    facts: dict


def of_study(study) -> Task | None:
    """The first task of `data.task`; None, with a message, if it is neither SIB-200 nor made by cpt/continuations.py.

    Raises:
        InputError: a file that `from_file` refuses, or SIB-200 cannot be loaded from the hub.
    """
    names, folder = study.get("data.task.name") or [], study.get("data.task.dir")
    name = (names.split(",") if isinstance(names, str) else [*names, ""])[0].strip()
    if not name:
        return None
    if name.startswith(CONTINUATION) and folder:
        return from_file(Path(folder) / f"{name}.jsonl")
    if not folder and name.startswith(SIB200):
        return _from_hub(name.removeprefix(SIB200))
    local = [path.name for path in Path(folder).iterdir() if path.is_dir()] if folder and Path(folder).is_dir() else []
    language = languages.find(local, name.removeprefix(SIB200), default=None)
    if language is None:
        if name.startswith(SIB200):
            raise InputError(f"{folder} has no folder of {name.removeprefix(SIB200)}: correct data.task.dir")
        cli.say(f"the task {name} is for lm_eval only: changed models are measured on SIB-200 and continuations")
        return None
    return from_file(Path(folder) / language / "test.tsv")


def from_file(file: Path) -> Task:
    """The rows of SIB-200 (`test.tsv`, or another table of this form), or of cpt/continuations.py (`.jsonl`).

    Raises:
        InputError: no such file, or a row that has neither form.
    """
    if not file.is_file():
        raise InputError(f"{file} does not exist; --task needs SIB-200's test.tsv, or a .jsonl of cpt/continuations.py")
    items = _continuations(file) if file.suffix == ".jsonl" else [_of_sib200(row) for row in sib200.read_tsv(file)]
    return Task(items, {"file": str(file), "sha256": results.file_sha256(file)})


def _of_sib200(row: dict[str, str]) -> Item:
    prompt = sib200.PROMPT.replace("{{text}}", row["text"])
    return Item(prompt, sib200.CHOICES, sib200.CHOICES.index(row["category"]))


def _from_hub(language: str) -> Task:
    try:
        name, revision = languages.spelling(language, "sib200"), hub_data.revision(source.DATASET)
        rows, revision = hub_data.rows(source.DATASET, name, "test", revision, source.COLUMNS)
    except InputError as error:
        raise InputError(f"the task {SIB200}{language}: {error}; or give data.task.dir, or --task FILE") from None
    content = json.dumps(rows, ensure_ascii=False).encode()
    facts = {"dataset": source.DATASET, "config": name, "revision": revision}
    return Task([_of_sib200(row) for row in rows], facts | {"sha256": hashlib.sha256(content).hexdigest()})


def _continuations(file: Path) -> list[Item]:
    items = []
    for number, line in enumerate(textfiles.lines(file), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            item = Item(row["context"], tuple(row["choices"]), row["label"])
            fits = isinstance(row["choices"], list) and all(text.strip() for text in (item.prompt, *item.choices))
            fits = fits and item.prompt == item.prompt.rstrip()  # lm_eval moves such spaces to the choice
            fits = fits and type(item.right) is int and 0 <= item.right < len(item.choices) > 1
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            fits = False
        if not fits:
            raise InputError(
                f'{file}, line {number}: not {{"context": text, "choices": [text, text, ..], "label": number of the '
                "right one, from 0}; correct it or make the file again (cpt/continuations.py)"
            )
        items.append(item)
    if not items:
        raise InputError(f"{file} holds no rows")
    return items
