"""Training steps, read from the names of checkpoints: `checkpoint-500`, `step-50K`, `stage2-step1000-tokens5B`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints.formats import ADAPTER_CONFIG

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Words before a step in a name, the most reliable first: in `epoch-2-step-500` the step is 500.
_STEP_WORDS = ("step", "checkpoint|ckpt|chkpt", "iteration|iter")
_UNITS = {"": 1, "k": 1_000, "m": 1_000_000}
_PASSING = ("tmp", ".")  # prefixes of folders that a Trainer or a swap has not finished


def step_of(name: str) -> int | None:
    """The training step in the name of a checkpoint folder or a hub revision, or None.

    `checkpoint-15` -> 15; `stage2-ingredient1-step1000-tokens5B` -> 1000; `iter_0001000` -> 1000; `step-50K` -> 50000;
    `run-a/step100` -> 100. Always an integer: as text, `step1000` would sort before `step512`.
    """
    for word in _STEP_WORDS:
        matches = re.findall(rf"(?:^|[-_/]|global)(?:{word})[-_=]?(\d+)([km]?)(?=$|[-_/])", name, re.IGNORECASE)
        if matches:
            number, unit = matches[-1]
            return int(number) * _UNITS[unit.lower()]
    return None


def steps_of(names: Iterable[str]) -> dict[str, int]:
    """The steps of the checkpoints of one run, by name, in step order; names without a step are left out.

    If no name has a word for the step, or several names have the same step, the step is the one number that differs in
    every name, if the names otherwise have the same text (`part2-500`, `part2-1000`).
    """
    names = list(names)
    steps = {name: step for name in names if (step := step_of(name)) is not None}
    if not steps or len(set(steps.values())) < len(steps):
        names = list(steps) or [name for name in names if re.search(r"\d$", name)]
        numbers = [[int(number) for number in re.findall(r"\d+", name)] for name in names]
        alike = len(names) > 1 and len({re.sub(r"\d+", "#", name) for name in names}) == 1
        growing = [column for column in zip(*numbers, strict=False) if len(set(column)) == len(names)] if alike else []
        if len(growing) == 1:
            steps = dict(zip(names, growing[0], strict=True))
    return dict(sorted(steps.items(), key=lambda item: item[1]))


def told(where: str, names: Iterable[str]) -> dict[str, int]:
    """`steps_of` the names; a notice is printed once if the choice of the step is not obvious."""
    steps = steps_of(names)
    shown = next((name for name, step in steps.items() if name not in (f"checkpoint-{step}", f"step{step}")), None)
    if shown is not None:
        cli.once(f"{where}: steps are read from the names ({shown} is step {steps[shown]})")
    return steps


def in_folder(folder: str | os.PathLike) -> dict[str, int]:
    """The steps of the checkpoints in a local folder, in step order: sub-folders called `checkpoint-<step>`, and others
    with a step in their name that hold a model or an adapter. Unfinished folders of a Trainer or a swap do not count.
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
