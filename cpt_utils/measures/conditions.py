"""Conditions measured one after another: the one runner of swaps, silenced neurons and their random controls.

It goes on after a kill, keeps a finished result, refuses that of another request, and shares the work among processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cpt_utils.base import cli, journal, results
from cpt_utils.base.processes import Process
from cpt_utils.interventions.condition import Condition, digest


def measure(
    path: Path, schema: str, request: dict, conditions: Sequence[Condition], load: Callable[[str], Any],
    measured: Callable[[Any, Condition], dict], write: Callable[[list[dict], dict], None], process: Process,
    overwrite: bool = False, instead: str = "another -o", estimate: bool = False,
) -> None:  # fmt: skip
    """Measure every condition, and hand the records, in their order, to `write`, which writes `path`.

    A record is a condition's `name` and `facts`, and what `measured` found. A `path` that answers the same request is
    kept. Of several processes each measures its share; the first alone writes. Every record is on the disk as soon as
    its round is over, and a run that was killed goes on from there, with any number of processes.

    Args:
        request: what the numbers depend on beside the conditions; these are added to it.
        load: Condition.of -> the loaded model; a model is dropped before the next one is loaded.
        measured: (model, condition) -> what is found while the condition holds.
        write: (records, whole request) -> None.
        instead: where else one may write, for the message of a refusal.
        estimate: say after the first measurement how long all of them take, if they are alike.

    Raises:
        InputError: `path` is the result of another request.
        ValueError: two conditions of one name and one key.
    """
    by_id = {condition.id: condition for condition in conditions}
    if len(by_id) < len(conditions):
        raise ValueError("two conditions have one name and one key: what tells them apart must be in the key")
    request = request | {"conditions": digest(list(by_id))}
    partial = path.with_name(path.stem + ".partial.jsonl")
    kept = results.finished(path, schema, request, instead, overwrite, newer=("conditions",))
    process.wait()  # no process may see a result that another is about to write
    if kept:
        if process.is_main:
            journal.remove(partial)  # of a run that was killed between its result and this
        cli.say(f"{path} is finished, from the same request: kept (--overwrite redoes it)")
        return
    held: dict[str, Any] = {}
    timed: list[float] = []  # seconds of the first

    def record(key: str) -> dict:
        condition = by_id[key]
        if condition.of not in held:
            held.clear()
            held[condition.of] = load(condition.of)
        start = time.perf_counter()
        with condition.apply(held[condition.of]):
            found = {"name": condition.name, **condition.facts} | measured(held[condition.of], condition)
        if estimate and notes and not timed:
            timed.append(time.perf_counter() - start)
            left = len(by_id) - len(notes.done)
            whole = timed[0] * -(-left // process.world)
            cli.say(
                f"{left} models to measure, {timed[0]:.2f} s each: about {whole:,.1f} s ({whole / 60:.0f} min) in all"
            )
        return found

    notes = journal.Journal(partial, request) if process.is_main else None
    journal.complete(notes, process, by_id, record, "conditions")
    if notes:
        write([notes.done[key] for key in by_id], request)
        journal.remove(partial)
