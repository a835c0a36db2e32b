"""Measures conditions one after another: the one runner for swaps, silenced neurons and their random controls.

It resumes after a kill, keeps a finished result, refuses one of another request, and shares the work among processes.
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
    """Measure every condition, and pass the records, in the order of the conditions, to `write`, which writes `path`.

    A record holds a condition's `name` and `facts`, and the result of `measured`. If `path` already answers the same
    request, it is kept. Each of several processes measures its share; only the first one writes. Every record is on
    disk at the end of its round, and a run that was killed resumes from there, with any number of processes.

    Args:
        request: what the numbers depend on besides the conditions, which are added to it.
        load: Condition.of -> the loaded model; a model is dropped before the next one is loaded.
        measured: (model, condition) -> the measurements under the condition.
        write: (records, whole request) -> None.
        instead: where else to write, for the message of a refusal.
        estimate: print after the first measurement how long all of them will take if they take equally long.

    Raises:
        InputError: `path` is the result of another request.
        ValueError: two conditions have the same name and key.
    """
    by_id = {condition.id: condition for condition in conditions}
    if len(by_id) < len(conditions):
        raise ValueError("two conditions have the same name and key: the key must hold what distinguishes them")
    request = request | {"conditions": digest(list(by_id))}
    partial = path.with_name(path.stem + ".partial.jsonl")
    finished = results.finished(path, schema, request, instead, overwrite, newer=("conditions",))
    process.wait()  # no process may see a result that another one is about to write
    if finished:
        if process.is_main:
            journal.remove(partial)  # left by a run that was killed after writing its result
        cli.say(f"{path} is finished, from the same request: kept (--overwrite redoes it)")
        return
    loaded: dict[str, Any] = {}
    seconds: list[float] = []  # duration of the first measurement

    def record(key: str) -> dict:
        condition = by_id[key]
        if condition.of not in loaded:
            loaded.clear()
            loaded[condition.of] = load(condition.of)
        start = time.perf_counter()
        with condition.apply(loaded[condition.of]):
            result = {"name": condition.name, **condition.facts} | measured(loaded[condition.of], condition)
        if estimate and notes and not seconds:
            seconds.append(time.perf_counter() - start)
            left = len(by_id) - len(notes.done)
            total = seconds[0] * -(-left // process.world)
            cli.say(
                f"{left} models to measure, {seconds[0]:.2f} s each: about {total:,.1f} s ({total / 60:.0f} min) in all"
            )
        return result

    notes = journal.Journal(partial, request) if process.is_main else None
    journal.complete(notes, process, by_id, record, "conditions")
    if notes:
        write([notes.done[key] for key in by_id], request)
        journal.remove(partial)
