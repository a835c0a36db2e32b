"""Accuracies on a benchmark task at the checkpoints of a run: from lm_eval's result files, or from a plain JSON file.

lm_eval writes `<folder>/<model>/results_<time>.json`, one more file each run, with rows for groups among those for
tasks, and with nothing in the name that tells a run made with `--limit`. Reading the folder means choosing:
see `read_folder`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from cpt_utils import cli, refs, results
from cpt_utils.errors import InputError

SIB200_ROWS = 204


@dataclass
class Point:
    """The metric of one model: `value` in 0..1 and the number of rows `n` behind it (None where unknown)."""

    value: float
    n: int | None
    source: str
    settings: dict = field(default_factory=dict)

    @property
    def stderr(self) -> float | None:
        """The binomial standard error sqrt(p (1 - p) / n) of an accuracy over n rows."""
        return (self.value * (1 - self.value) / self.n) ** 0.5 if self.n else None


def read(path: Path, task: str | None, metric: str, run=None, base: str | None = None, described: dict | None = None):
    """(task, {step: Point} in step order, notes on what was left out) from a JSON file or a folder of lm_eval results.

    Args:
        path: `{"<step>": {"<task>": {"acc": x, "n": rows}}}` (`n` may be absent), or a folder of result files.
        task: the task; None takes the only one there is.
        metric: `acc` or `acc_norm`.
        run: the run whose checkpoints count (folder, hub repository, or a list of models).
        base: the model that counts as step 0.
        described: the header entry `models` of what the points will be compared with; other weights are refused.
    """
    if path.is_dir():
        return read_folder(path, task, metric, run, base, described or {})
    return read_file(path, task, metric)


def read_file(path: Path, task: str | None, metric: str):
    """`read` for a JSON file."""
    content, _ = results.read_json(path)
    if not isinstance(content, dict) or not content:
        raise InputError(f'{path} holds no steps; the form is {{"<step>": {{"<task>": {{"acc": x}}}}}}')
    if "n-samples" in content:
        raise InputError(f"{path} is one result file of lm_eval; give the folder that holds those of all checkpoints")
    rows = {}
    for name, tasks in content.items():
        step = step_key(name)
        if step is None or not isinstance(tasks, dict):
            raise InputError(f'{path}: {name!r} is no step; the form is {{"<step>": {{"<task>": {{"acc": x}}}}}}')
        if step in rows:
            raise InputError(f"{path}: step {step} comes twice; keep one of its entries")
        rows[step] = tasks
    task = _the_task(task, {name for tasks in rows.values() for name in tasks}, path)
    points = {}
    for step in sorted(step for step, tasks in rows.items() if task in tasks):
        row = rows[step][task] if isinstance(rows[step][task], dict) else {}
        value, n = row.get(metric), row.get("n", SIB200_ROWS if task.startswith("sib200_") else None)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            raise InputError(f"{path}: {metric} of {task} at step {step} is {value!r}, not a number from 0 to 1")
        points[step] = Point(float(value), n, str(path))
    if task.startswith("sib200_") and not all("n" in rows[step][task] for step in points):
        cli.say(f"{path} does not say the number of rows: taken as {SIB200_ROWS}, the size of SIB-200's test split")
    return task, points, []


def step_key(name: str) -> int | None:
    """The step that a key of a JSON file names: `15`, `checkpoint-15` or `step15`; None for any other text."""
    return refs.step_of(f"step{name}" if name.isdecimal() else name)


def read_folder(folder: Path, task: str | None, metric: str, run, base: str | None, described: dict):
    """`read` for a folder of lm_eval result files, at any depth.

    Only the checkpoints of `run` count, and `base` as step 0; where no result is of that run (folders were moved),
    every model with a step in its name does. Of several files for one model the newest counts, limited ones never.

    Raises:
        InputError: no results; a group in place of a task; a model with limited runs only; two models of one step;
            checkpoints evaluated with other settings, prompts or weights than the rest.
    """
    files = [file.relative_to(folder) for file in sorted(folder.rglob("*.json"))]
    # Hidden folders are what an interrupted evaluate.py left behind.
    files = [folder / file for file in files if not any(part.startswith(".") for part in file.parts)]
    found = [result for file in files if (result := read_result(file)) is not None]
    if not found:
        raise InputError(f"{folder} holds no result files of lm_eval (results_<time>.json); evaluate the models first")
    tasks = {name for result in found for name in result["n-samples"]}  # `results` holds rows of groups as well
    if task not in tasks and any(task in result["results"] for result in found):
        raise InputError(f"{task} is a group, whose row is a mean over tasks; name one of its tasks")
    task = _the_task(task, tasks, folder)
    newest, notes = _newest(found, task)
    chosen = _of_run(newest, run, base)
    if chosen:
        notes += [f"{r['_path']}: another model" for r in newest if all(r is not kept for _, kept in chosen)]
    else:
        chosen = [(step, result) for result in newest if (step := _step(result["_model"])) is not None]
        if not chosen:
            raise InputError(f"no model evaluated in {folder} has a step in its name (checkpoint-<step>, step<N>)")
        if run is not None:
            cli.warn(f"no result in {folder} is of {run}: taking every model with a step in its name")
    points: dict[int, Point] = {}
    for step, result in sorted(chosen, key=lambda pair: pair[0]):
        if step in points:
            raise InputError(f"step {step} comes twice: {points[step].source} and {result['_path']}; keep one of them")
        _check_weights(result, _weights_samples(described))
        points[step] = _point(result, task, metric)
    _check_settings(points, task)
    return task, points, notes


def read_result(path: Path) -> dict | None:
    """An lm_eval result file, its model added as `_model` (name or name@revision); None for any other JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        if path.name.startswith("results_"):
            raise InputError(f"{path} is not valid JSON (an interrupted run?); delete it or evaluate again") from None
        return None
    if not isinstance(content, dict) or "results" not in content or "n-samples" not in content:
        return None
    arguments = content.get("config", {}).get("model_args") or {}
    if isinstance(arguments, str):  # older releases of lm_eval keep the text of the command line
        arguments = dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
    name = str(arguments.get("pretrained") or content.get("model_name") or path.parent.name)
    revision = arguments.get("revision")
    model = name if revision in (None, "main") else f"{name}@{revision}"
    return content | {"_model": model.rstrip("/"), "_path": str(path)}


def _the_task(task: str | None, known: set[str], source: Path) -> str:
    if task is None and len(known) == 1:
        (task,) = known
        cli.say(f"task: {task}, the only one in {source}")
    names = ", ".join(sorted(known)) or "none"
    if task is None:
        raise InputError(f"{source} holds several tasks; name one with --task: {names}")
    if task not in known:
        raise InputError(f"{source} holds no task {task}; it holds {names}")
    return task


def _newest(found: list[dict], task: str) -> tuple[list[dict], list[str]]:
    """The newest unlimited result of every model for `task`, and a note on each file passed over."""
    newest: dict[str, dict] = {}
    limited: dict[str, str] = {}
    notes = []
    # `date` is the start of the run in seconds; the file name holds the local time of its end.
    for result in sorted((r for r in found if task in r["n-samples"]), key=lambda r: (r.get("date") or 0, r["_path"])):
        model, count = _place(result["_model"]), result["n-samples"][task]
        if count["original"] != count["effective"]:
            limited[model] = f"{result['_path']}: made with --limit ({count['effective']} of {count['original']} rows)"
            continue
        if model in newest:
            notes.append(f"{newest[model]['_path']}: there is a newer result of this model")
        newest[model] = result
    for model, text in limited.items():
        if model not in newest:
            raise InputError(f"{text}; evaluate that model without --limit, or delete the file")
        notes.append(text)
    return list(newest.values()), notes


def _of_run(found: list[dict], run, base: str | None) -> list[tuple[int, dict]]:
    """(step, result) of the results that are checkpoints of `run`, and of `base` as step 0."""
    runs = [run] if isinstance(run, str) else list(run or [])
    chosen = []
    for result in found:
        step = _step(result["_model"])
        # The base first: it may be a revision of the run's own repository, and is step 0 whatever its name says.
        if base is not None and _place(result["_model"]) == _place(base):
            chosen.append((0, result))
        elif step is not None and any(_belongs(result["_model"], one) for one in runs):
            chosen.append((step, result))
    return chosen if any(step for step, _ in chosen) else []


def _belongs(model: str, run: str) -> bool:
    """Whether `model` is `run` itself, a checkpoint folder directly below it, or a revision of the same repository."""
    if _is_revision(model):
        return model.partition("@")[0] == run.partition("@")[0]
    return _place(run) in (_place(model), os.path.dirname(_place(model)))


def _step(model: str) -> int | None:
    if _is_revision(model):
        return refs.step_of(model.partition("@")[2])
    return refs.step_of(os.path.basename(model))


def _is_revision(model: str) -> bool:
    return "@" in model and not os.path.isdir(model)


def _place(model: str) -> str:
    """One spelling for relative and absolute paths; a name on the hub stays as distinct as it was."""
    return os.path.abspath(model)


def _point(result: dict, task: str, metric: str) -> Point:
    row = result["results"][task]
    keys = [key for key in row if key.partition(",")[0] == metric]  # the keys are "metric,filter"
    key = f"{metric},none" if f"{metric},none" in keys else (keys[0] if len(keys) == 1 else None)
    if key is None or not isinstance(row[key], int | float):
        have = sorted({key.partition(",")[0] for key in row if "," in key and "_stderr" not in key})
        raise InputError(f"{result['_path']}: {task} has no metric {metric}; it has {', '.join(have) or 'none'}")
    head = result.get(results.HEADER) or {}
    settings = {
        "number of few-shot examples": result.get("n-shot", {}).get(task),
        "number of rows": result["n-samples"][task]["original"],
        "task version": result.get("versions", {}).get(task),
        "prompt template": result.get("configs", {}).get(task, {}).get("doc_to_text"),
        "prompts (hash)": head.get("data", {}).get("prompts", {}).get(task),
        "documents (task hash)": result.get("task_hashes", {}).get(task),
        "dtype": result.get("config", {}).get("model_dtype"),
    }
    return Point(float(row[key]), result["n-samples"][task]["effective"], result["_path"], settings)


def _check_settings(points: dict[int, Point], task: str) -> None:
    """Refuse points whose settings differ where both state them: such differences are no effect of training."""
    first: dict[str, tuple[int, object]] = {}
    for step, point in points.items():
        for setting, value in point.settings.items():
            if value is None:
                continue
            before, other = first.setdefault(setting, (step, value))
            if other != value:
                raise InputError(
                    f"{task} was evaluated with different {setting}: {other} at step {before}, {value} at step {step}; "
                    f"evaluate the latter again ({point.source})"
                )


def _check_weights(result: dict, compared: dict[str, str]) -> None:
    """Refuse a result whose header names other weights than `compared` ({model path: weights_sample}) does."""
    evaluated = (result.get(results.HEADER) or {}).get("models", {}).get("model", {}).get("weights_sample")
    expected = compared.get(_place(result["_model"]))
    if evaluated and expected and evaluated != expected:
        raise InputError(
            f"{result['_model']} changed between its evaluation and the comparison of its weights; run both again"
        )


def _weights_samples(described) -> dict[str, str]:
    """{model path: weights_sample} of every model described at any depth of a header's `models`."""
    if isinstance(described, list):
        described = dict(enumerate(described))
    if not isinstance(described, dict):
        return {}
    if described.get("spec") and described.get("weights_sample"):
        return {_place(described["spec"]): described["weights_sample"]}
    return {place: sample for below in described.values() for place, sample in _weights_samples(below).items()}
