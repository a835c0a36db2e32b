"""Training steps, read from the names of checkpoints: `checkpoint-500`, `step-50K`, `stage2-step1000-tokens5B`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints.formats import ADAPTER_CONFIG

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# What stands before a step in a name, the surest first: in `epoch-2-step-500` the step is 500.
_STEP_WORDS = ("step", "checkpoint|ckpt|chkpt", "iteration|iter")
_UNITS = {"": 1, "k": 1_000, "m": 1_000_000}
_PASSING = ("tmp", ".")  # starts of folders that a Trainer or a swap has not finished


def step_of(name: str) -> int | None:
    """The training step that a checkpoint folder or a hub revision is named after, or None.

    `checkpoint-15` -> 15; `stage2-ingredient1-step1000-tokens5B` -> 1000; `iter_0001000` -> 1000; `step-50K` -> 50000;
    `run-a/step100` -> 100. Always an integer: as text, `step1000` would come before `step512`.
    """
    for word in _STEP_WORDS:
        found = re.findall(rf"(?:^|[-_/]|global)(?:{word})[-_=]?(\d+)([km]?)(?=$|[-_/])", name, re.IGNORECASE)
        if found:
            number, unit = found[-1]
            return int(number) * _UNITS[unit.lower()]
    return None


def steps_of(names: Iterable[str]) -> dict[str, int]:
    """The steps of the checkpoints of one run, by their names, in step order; names without a step are left out.

    Where the steps read from the words before them do not tell the names apart, or there are no such words, the names
    must differ in one number only: the one that grows. (`part2-500`, `part2-1000`.)
    """
    names = list(names)
    found = {name: step for name in names if (step := step_of(name)) is not None}
    if not found or len(set(found.values())) < len(found):
        names = list(found) or [name for name in names if re.search(r"\d$", name)]
        numbers = [[int(number) for number in re.findall(r"\d+", name)] for name in names]
        alike = len(names) > 1 and len({re.sub(r"\d+", "#", name) for name in names}) == 1
        growing = [column for column in zip(*numbers, strict=False) if len(set(column)) == len(names)] if alike else []
        if len(growing) == 1:
            found = dict(zip(names, growing[0], strict=True))
    return dict(sorted(found.items(), key=lambda item: item[1]))


def told(where: str, names: Iterable[str]) -> dict[str, int]:
    """`steps_of` the names, said once where what was taken as the step is not plain."""
    steps = steps_of(names)
    shown = next((name for name, step in steps.items() if name not in (f"checkpoint-{step}", f"step{step}")), None)
    if shown is not None:
        cli.once(f"{where}: steps are read from the names ({shown} is step {steps[shown]})")
    return steps


def in_folder(folder: str | os.PathLike) -> dict[str, int]:
    """The steps of the checkpoints in a local folder, in step order: its sub-folders `checkpoint-<step>`, and others
    that are named after a step and hold a model or an adapter. What a Trainer or a swap left unfinished does not count.
    """
    folder = os.fspath(folder)
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror or error}") from None
    names = [name for name in names if not name.startswith(_PASSING)]
    plain = [name for name in names if CHECKPOINT.fullmatch(name)]
    configs = ("config.json", ADAPTER_CONFIG)
    others = [n for n in names if n not in plain and any(os.path.isfile(os.path.join(folder, n, f)) for f in configs)]
    return told(folder, [*plain, *others])
