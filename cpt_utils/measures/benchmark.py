"""Accuracies on benchmark tasks at the checkpoints of a run: from lm_eval's result files, or from a plain JSON file.

lm_eval writes `<folder>/<model>/results_<time>.json`, one more file each run, with rows for groups among those for
tasks, and with names that do not reveal a run with `--limit`. So reading the folder means choosing: see `read_folder`.
`lm_eval_results` interprets a single file.
"""

from __future__ import annotations

import fnmatch
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from cpt_utils.base import cli, experiments, results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs, step_names
from cpt_utils.measures.lm_eval_results import ResultFile, is_number, is_result, metric_of, metrics_in, rows_behind

SIB200_ROWS = 204
FORM = '{"<step>": {"<task>": {"acc": x}}}'


@dataclass
class Point:
    """The metric of one model: `value` in 0..1 and the number of rows `n` behind it (None if unknown).

    `rows_by` says how `n` was determined if the source does not state it.
    """

    value: float
    n: int | None
    source: str
    settings: dict = field(default_factory=dict)
    rows_by: str = ""

    @property
    def stderr(self) -> float | None:
        """The binomial standard error sqrt(p (1 - p) / n) of an accuracy over n rows."""
        return (self.value * (1 - self.value) / self.n) ** 0.5 if self.n else None


@dataclass
class Series:
    """A task over the steps of a run: the points in step order, and the files left out, with the reason."""

    points: dict[int, Point]
    left_out: list[str] = field(default_factory=list)


def or_by_hand(folder: str | os.PathLike | None) -> str:
    """The other way to make the results that are read here. By default, lm_eval prints a table and saves nothing."""
    return f" (or lm_eval --output_path {folder or 'FOLDER'}; without that flag it saves nothing)"


def read(
    path: Path, tasks: list[str] | None, metric: str, run=None, base: str | None = None, described: dict | None = None
) -> dict[str, Series]:
    """{task: Series} from a JSON file or a folder of lm_eval results.

    Args:
        path: `{"<step>": {"<task>": {"acc": x, "n": rows}}}` (`n` may be absent), or a folder of result files.
        tasks: the tasks; None means all that have the metric.
        metric: `acc` or `acc_norm`.
        run: the run whose checkpoints count (folder, hub repository, or a list of models).
        base: the model that counts as step 0.
        described: the header entry `models` of the result to compare the points with; other weights are refused.
    """
    if path.is_dir():
        return read_folder(path, tasks, metric, run, base, described or {})
    return read_file(path, tasks, metric)


# --- a plain JSON file ---


def read_file(path: Path, tasks: list[str] | None, metric: str) -> dict[str, Series]:
    """`read` for a JSON file. If any value is above 1, all of them are percentages."""
    content, _ = results.read_json(path)
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} holds no steps; the form is {FORM}")
    if is_result(content):
        raise InputError(f"{path} is one result file of lm_eval; give the folder that holds those of all checkpoints")
    rows: dict[int, dict] = {}
    for name, row in content.items():
        step = step_key(name)
        if step is None or not isinstance(row, dict):
            raise InputError(f"{path}: {name!r} is not a step; the form is {FORM}")
        if step in rows:
            raise InputError(f"{path}: step {step} appears twice; keep one of its entries")
        rows[step] = {task: value if isinstance(value, dict) else {} for task, value in row.items()}
    tasks = _the_tasks(tasks, [row for _, row in sorted(rows.items())], metric, path)
    by_task = {task: {step: rows[step][task] for step in sorted(rows) if task in rows[step]} for task in tasks}
    values = {(task, step): metric_of(row, metric)[0] for task in by_task for step, row in by_task[task].items()}
    scale = _scale(values, metric, path)
    series = {}
    for task, task_rows in by_task.items():
        _check_rows(task_rows, task, path)
        errors = {step: metric_of(row, metric)[1] for step, row in task_rows.items()}
        errors = {step: error * scale for step, error in errors.items() if is_number(error)}
        points = {step: Point(values[task, step] * scale, row.get("n"), str(path)) for step, row in task_rows.items()}
        _fill_rows(points, errors, task)
        series[task] = Series(points)
    _say_rows(series, path)
    return series


def _check_rows(by_step: dict[int, dict], task: str, path: Path) -> None:
    for step, row in by_step.items():
        if (n := row.get("n")) is not None and (type(n) is not int or n < 1):
            raise InputError(f"{path}: n of {task} at step {step} is {n!r}, not a number of rows; correct it")


def _scale(values: dict[tuple[str, int], object], metric: str, path: Path) -> float:
    """The factor that converts the values to shares: 1, or 1/100 if they are percentages.

    Raises:
        InputError: a value that is neither, or shares and percentages in one file.
    """
    for (task, step), value in values.items():
        if not is_number(value) or not 0 <= value <= 100:
            raise InputError(
                f"{path}: {metric} of {task} at step {step} is {value!r}, not a number from 0 to 1 (or 100)"
            )
    if max(values.values()) <= 1:
        return 1.0
    # Nobody reports an accuracy of half a percent among others of 60 %: such a file mixes shares and percentages.
    shares = {task_and_step: value for task_and_step, value in values.items() if 0 < value <= 1}
    if shares:
        (low, value), (high, other) = next(iter(shares.items())), max(values.items(), key=lambda item: item[1])
        raise InputError(
            f"{path}: {metric} is {value} for {low[0]} at step {low[1]} and {other} for {high[0]} at step {high[1]}; "
            "write all of them as shares (0.61) or all as percent (61)"
        )
    cli.say(f"{path}: {metric} goes above 1 and is taken as percent")
    return 0.01


def step_key(name: str) -> int | None:
    """The step that a key of a JSON file names: `15`, `checkpoint-15` or `step15`; None for any other text."""
    return step_names.step_of(f"step{name}" if name.isdecimal() else name)


# --- a folder of result files ---


def read_folder(
    folder: Path, tasks: list[str] | None, metric: str, run, base: str | None, described: dict
) -> dict[str, Series]:
    """`read` for a folder of lm_eval result files, at any depth.

    Only the checkpoints of `run` count, and `base` as step 0; if no result is of that run (folders were moved), all
    models with a step in their names count. An adapter counts as the checkpoint that it is, not as the model under it.
    Of several files for one model the newest counts, limited ones never, and quantised ones only if all are.

    Raises:
        InputError: no results; a group in place of a task; a model with limited runs only; two models of one step;
            checkpoints evaluated with other settings, prompts or weights than the rest.
    """
    files = [file.relative_to(folder) for file in sorted(folder.rglob("*.json"))]
    # Hidden folders are left over from an interrupted evaluate.py; ..__my__cpt and .__cpt are ../my/cpt and ./cpt.
    files = [folder / file for file in files if not any(re.match(r"\.(?!\.|__)", part) for part in file.parts)]
    loaded = [result for file in files if (result := ResultFile.read(file)) is not None]
    if not loaded:
        made_by = experiments.made_by("lm_eval") + or_by_hand(folder)
        raise InputError(f"{folder} holds no result files of lm_eval (results_<time>.json); run {made_by}")
    for task in tasks or ():
        if all(task not in result.tasks for result in loaded) and any(task in r.content["results"] for r in loaded):
            raise InputError(f"{task} is a group, whose row is a mean over tasks; name one of its tasks")
    chosen = _of_run(loaded, run, base)
    if not any(step for step, _ in chosen):
        chosen = _by_name(loaded, base)
        if not any(step for step, _ in chosen):
            raise InputError(f"no model evaluated in {folder} has a step in its name (checkpoint-<step>, step<N>)")
        if run is not None:
            cli.warn(f"no result in {folder} is of {run}: taking every model with a step in its name")
    _say_base(chosen, base)
    _say_releases(chosen)
    rows = [{task: r.content["results"].get(task, {}) for task in r.tasks} for step, r in chosen if step]
    series = {}
    for task in _the_tasks(tasks, rows, metric, folder):
        taken, left_out = _newest([(step, result) for step, result in chosen if task in result.tasks], task)
        used = {result.path for _, result in chosen}
        left_out += [f"{r.path}: another model, {_words(r)}" for r in loaded if task in r.tasks and r.path not in used]
        series[task] = Series(_points(taken, task, metric, _weights_samples(described)), left_out)
    _say_rows(series, folder)
    return series


def _of_run(files: list[ResultFile], run, base: str | None) -> list[tuple[int, ResultFile]]:
    """(step, result) of the results for checkpoints of `run`, and of those for `base` as step 0."""
    runs = [run] if isinstance(run, str) else list(run or [])
    models = [result for result in files if not _is_changed(result, runs, base)]
    # The base first: it may be a revision of the run's repository, and is step 0 whatever its name says.
    is_base = {r.path: base is not None and _path_and_revision(r.name) == _path_and_revision(base) for r in models}
    checkpoints = [r for r in models if not is_base[r.path] and any(_belongs(r.name, one) for one in runs)]
    return [(0, r) for r in models if is_base[r.path]] + _steps(checkpoints)


def _by_name(files: list[ResultFile], base: str | None) -> list[tuple[int, ResultFile]]:
    """(step, result) of all models with a step in their names, and of `base` as step 0."""
    bases = _of_run(files, None, base)
    base_paths = {result.path for _, result in bases}
    rest = [r for r in files if not _is_changed(r, [], base) and r.path not in base_paths]
    return bases + _steps([r for r in rest if step_names.step_of(_last(r.name)) is not None])


def _steps(files: list[ResultFile]) -> list[tuple[int, ResultFile]]:
    """(step, result) of the results of one run whose models are named after a step."""
    steps = step_names.steps_of({_last(result.name) for result in files})
    return [(steps[_last(result.name)], result) for result in files if _last(result.name) in steps]


def _is_changed(result: ResultFile, runs: list[str], base: str | None) -> bool:
    """Whether a checkpoint had an adapter or swapped parts when evaluated: then the result is not the checkpoint's."""
    if result.adapter is None or (base is not None and _path_and_revision(result.model) == _path_and_revision(base)):
        return result.is_swapped
    return any(_belongs(result.model, run) for run in runs) or step_names.step_of(_last(result.model)) is not None


def _belongs(name: str, run: str) -> bool:
    """Whether the model `name` is `run` itself, a folder directly below it, or a revision of the same repository."""
    if refs.is_pattern(run):
        return fnmatch.fnmatchcase(name, run)
    (path, revision), (run_path, run_revision) = _path_and_revision(name), _path_and_revision(run)
    if os.path.dirname(path) == run_path:
        return revision == run_revision
    # To `org/name` any revision belongs, to `org/name@run-a/step100` those that start with `run-a/`.
    same_branch = not run_revision or os.path.dirname(revision) == os.path.dirname(run_revision)
    return path == run_path and (revision == run_revision or (revision != "" and same_branch))


def _last(name: str) -> str:
    """The part of a model's name that contains its step: the folder, or the revision of a repository."""
    path, revision = _path_and_revision(name)
    folder = os.path.basename(refs.ModelRef(name).subfolder)
    return revision if revision and step_names.step_of(folder) is None else os.path.basename(path)


def _path_and_revision(name: str) -> tuple[str, str]:
    """(path in one spelling, whether relative or absolute; revision). Distinct names on the hub remain distinct."""
    path, _, revision = (name, "", "") if os.path.isdir(name) else name.partition("@")
    return os.path.abspath(path), "" if revision == "main" else revision


def _words(result: ResultFile) -> str:
    """The model of a result in words."""
    words = f"{result.adapter} on {result.model}" if result.adapter else result.model
    return f"{words} ({result.quantised})" if result.quantised else words


def _say_base(chosen: list[tuple[int, ResultFile]], base: str | None) -> None:
    """Warn if the model under the adapters has another name than the base of the comparison."""
    adapted_models = {result.model for _, result in chosen if result.adapter}
    for model in sorted(adapted_models) if base is not None else ():
        if _path_and_revision(model) != _path_and_revision(base):
            cli.warn(
                f"the adapters were evaluated on {model}, the weights compared with {base}: taken to be the same model"
            )


def _say_releases(chosen: list[tuple[int, ResultFile]]) -> None:
    releases = sorted({result.release for _, result in chosen})
    if len(releases) > 1:
        cli.warn(
            f"the models were evaluated with lm_eval {' and '.join(releases)}, which may ask differently: only since "
            "0.4.9.2 does a BOS token that the tokenizer adds precede the prompts"
        )


def _newest(results_by_step: list[tuple[int, ResultFile]], task: str) -> tuple[list[tuple[int, ResultFile]], list[str]]:
    """The newest unlimited result of every model for `task`, and a note on each file left out.

    A quantised model is not the model in the files. If all checkpoints are quantised alike, a message says so.
    """
    kinds = {result.quantised for step, result in results_by_step if step}
    if "" not in kinds and len(kinds) > 1:
        raise InputError(f"the checkpoints were quantised in different ways for {task}: {'; '.join(sorted(kinds))}")
    kind = "" if "" in kinds or not kinds else kinds.pop()
    if kind:
        cli.once(f"all checkpoints were quantised when they were evaluated ({kind})")
    notes = [
        f"{r.path}: {_words(r)}, {'' if r.quantised else 'not '}quantised unlike the checkpoints"
        for _, r in results_by_step
        if r.quantised != kind
    ]
    newest: dict[tuple, tuple[int, ResultFile]] = {}
    limited: dict[tuple, str] = {}
    # `date` is the start of the run in seconds; the file name holds the local time of its end.
    for step, result in sorted(results_by_step, key=lambda pair: (pair[1].date or 0, pair[1].path)):
        if result.quantised != kind:
            continue
        model = _path_and_revision(result.name)
        if limit := result.limit(task):
            limited[model] = f"{result.path}: {limit}"
            continue
        if model in newest:
            older = newest[model][1]
            if older.date is None or result.date is None:
                raise InputError(
                    f"two results of {result.name}, {older.path} and {result.path}, do not both say when they were "
                    "made; keep one of them"
                )
            notes.append(f"{older.path}: there is a newer result of this model")
        newest[model] = step, result
    for model, text in limited.items():
        if model not in newest:
            raise InputError(f"{text}; evaluate that model without --limit, or delete the file")
        notes.append(text)
    return list(newest.values()), notes


def _points(
    chosen: list[tuple[int, ResultFile]], task: str, metric: str, compared: dict[tuple, str]
) -> dict[int, Point]:
    """{step: Point} in step order, checked to have been evaluated with the same settings."""
    points: dict[int, Point] = {}
    errors = {}
    for step, result in sorted(chosen, key=lambda pair: pair[0]):
        if step in points:
            raise InputError(f"step {step} appears twice: {points[step].source} and {result.path}; keep one of them")
        _check_weights(result, compared)
        row = result.content["results"].get(task, {})
        value, error = metric_of(row, metric)
        if not is_number(value):
            raise InputError(
                f"{result.path}: {task} has no metric {metric}; it has {', '.join(metrics_in(row)) or 'none'}"
            )
        if not 0 <= value <= 1:
            raise InputError(f"{result.path}: {metric} of {task} is {value}, not a share of rows from 0 to 1")
        points[step] = Point(float(value), result.rows(task), result.path, result.settings(task))
        errors[step] = error
    _fill_rows(points, errors, task)
    _check_settings(points, task)
    return points


def _check_settings(points: dict[int, Point], task: str) -> None:
    """Refuse points that state different settings: their differences would not be an effect of training."""
    first: dict[str, tuple[int, object]] = {}
    for step, point in points.items():
        for setting, value in [*point.settings.items(), ("number of rows", point.n)]:
            if value is None:
                continue
            before, other = first.setdefault(setting, (step, value))
            if other != value:
                raise InputError(
                    f"{task} was evaluated with different {setting}: {_short(other)} at step {before}, {_short(value)} "
                    f"at step {step}; evaluate all of them alike ({points[before].source}, {point.source})"
                )


def _short(value) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_weights(result: ResultFile, compared: dict[tuple, str]) -> None:
    """Refuse a result whose header names other weights than `compared`, {(path, revision): weights_sample}."""
    evaluated = result.header.get("models", {}).get("model", {}).get("weights_sample")
    expected = compared.get(_path_and_revision(result.name))
    if evaluated and expected and evaluated != expected:
        raise InputError(
            f"{result.name} changed between its evaluation and the comparison of its weights; run both again"
        )


def _weights_samples(described) -> dict[tuple, str]:
    """{(path, revision) of a model: weights_sample} of every model described at any depth of a header's `models`."""
    if isinstance(described, list):
        described = dict(enumerate(described))
    if not isinstance(described, dict):
        return {}
    if described.get("spec") and described.get("weights_sample"):
        return {_path_and_revision(described["spec"]): described["weights_sample"]}
    return {model: sample for entry in described.values() for model, sample in _weights_samples(entry).items()}


# --- both ---


def _the_tasks(tasks: list[str] | None, rows: list[dict[str, dict]], metric: str, source: Path) -> list[str]:
    """The requested tasks, or all in `rows` (one {task: row} per model) that have the metric."""
    known = list(dict.fromkeys(task for row in rows for task in row))
    for task in tasks or ():
        if task not in known:
            raise InputError(f"{source} holds no task {task}; it holds {', '.join(sorted(known)) or 'none'}")
    if tasks:
        return tasks
    with_metric = [task for task in known if any(metric_of(row.get(task, {}), metric)[0] is not None for row in rows)]
    if not with_metric:
        metrics = sorted({name for row in rows for values in row.values() for name in metrics_in(values)})
        raise InputError(f"{source} has no metric {metric} in any task; it has {', '.join(metrics) or 'none'}")
    if without := [task for task in known if task not in with_metric]:
        cli.say(f"left out, as they have no {metric}: {', '.join(without)}")
    if len(with_metric) == 1:
        cli.say(f"task: {with_metric[0]}, the only one in {source}")
    else:
        names = ", ".join(with_metric[:4]) + (f" and {len(with_metric) - 4} more" if len(with_metric) > 4 else "")
        cli.say(f"tasks: {names}, all in {source} (--task a,b chooses)")
    return with_metric


def _fill_rows(points: dict[int, Point], errors: dict[int, object], task: str) -> None:
    """Fill in unstated numbers of rows: from the standard error, else from the other steps, else that of SIB-200."""
    derived = {step: rows_behind(points[step].value, errors.get(step)) for step in points if points[step].n is None}
    stated = {point.n for point in points.values()} - {None}
    if from_errors := set(derived.values()) - {None}:
        candidates, how = from_errors, "by the standard errors"
    elif stated:
        candidates, how = stated, "as at other steps"
    else:
        candidates, how = {SIB200_ROWS} if task.startswith("sib200_") else set(), "the size of SIB-200's test split"
    rows = next(iter(candidates)) if len(candidates) == 1 else None
    for step, n in derived.items():
        points[step].n = n or rows
        points[step].rows_by = how if points[step].n else ""


def _say_rows(series: dict[str, Series], source: Path) -> None:
    """Print how numbers of rows were determined that the source does not state, one line for each way."""
    rows_by_source: dict[str, set[int]] = {}
    for point in (point for task_series in series.values() for point in task_series.points.values() if point.rows_by):
        rows_by_source.setdefault(point.rows_by, set()).add(point.n)
    for how, rows in rows_by_source.items():
        number = f"{min(rows)} to {max(rows)}" if len(rows) > 1 else f"{max(rows)}"
        cli.say(f"{source} does not say the number of rows: taken as {number}, {how}")
