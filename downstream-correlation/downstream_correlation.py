"""Does a downstream task follow the weight change of the interface layers, or that of the semantic hub?

In:   BENCHMARK, the metric at each checkpoint: {"<step>": {"<task>": {"acc": x}}}, or a folder of result files of any
      release of lm_eval (--output_path); one task or several
      WEIGHT_DIFF, the file of weight-diff/int_and_sem.py: {"checkpoints": {"<step>": {"interface_avg", ..}}}
Out:  OUT (JSON): per layer type Pearson's correlation over checkpoints, with intervals, Spearman's, and both on first
      differences, for the first task, and under `tasks` for each if there are several; OUT with .pdf and .png: the
      metric over steps, and against the change of both layer types (for the other tasks: OUT.<task>.pdf)

    python downstream-correlation/downstream_correlation.py results/lm_eval int_and_sem.json -o results/correlation.json
    python downstream-correlation/downstream_correlation.py bench.json diff.json -o build/try.json --checkpoint-stride 2
"""

from __future__ import annotations

import math
from pathlib import Path

from cpt_utils.base import cli, figures, results, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np
from cpt_utils.base.study import Study
from cpt_utils.measures import benchmark, gate, sib200
from cpt_utils.measures.benchmark import Point, Series

SCHEMA = "downstream_correlation"
RESULTS = {"downstream": "downstream-correlation/correlation.json"}
ASKED = {
    "downstream": "Does accuracy on a task follow the change of interface layers more closely than that of hub layers?",
}
CAPTIONS = {
    "downstream": """Part I: 3. Downstream task and weight change
        Downstream accuracy of the checkpoints against the weight change of interface and hub layers, with the
        correlation of their steps (first differences) and of the curves themselves. Curves that both grow over training
        correlate for that reason alone, with few checkpoints even on first differences: claim C6 is decided by training
        with a part frozen. Error bars are the binomial standard error of the accuracy.""",
}
LAYER_TYPES = {"interface": "interface_avg", "semantic_hub": "semantic_hub_avg"}
DRAWS = 4000  # of the accuracies, for the measurement error


# ---------------------------------------------------------------- the method


def relate(metric: list[float], change: list[float], redrawn: np.ndarray | None, seed: int) -> dict:
    """Everything reported for one layer type: Pearson and Spearman on levels and on first differences.

    Args:
        metric, change: one value per checkpoint, in step order.
        redrawn: what `metric` might have been on other test rows [draws, checkpoints], or None if that is unknown.
    """

    def correlations(metric, change, redrawn) -> dict:
        pearson = stats.correlation(change, metric)
        rank = {"spearman": stats.correlation(change, metric, "spearman")}
        return pearson | rank | measurement_error(pearson["correlation"], change, redrawn, seed)

    steps = None if redrawn is None else np.diff(redrawn, axis=1)
    differences = stats.first_differences(metric), stats.first_differences(change)
    return correlations(metric, change, redrawn) | {"first_differences": correlations(*differences, steps)}


def redraw(points: list[Point], seed: int) -> np.ndarray | None:
    """Accuracies as other test rows might have given them, Binomial(n, accuracy) / n: float64 [draws, checkpoints].

    Checkpoints are redrawn independently, although they share their test rows. Rows that are hard for every checkpoint
    move all accuracies together and do not affect r, so the spread of these draws is, if anything, too wide.
    """
    if not all(point.n for point in points):
        return None
    rows = np.array([point.n for point in points])
    values = np.array([point.value for point in points])
    return np.random.default_rng(seed).binomial(rows, values, size=(DRAWS, len(points))) / rows


def measurement_error(r: float | None, change, redrawn: np.ndarray | None, seed: int) -> dict:
    """How much of the uncertainty of Pearson's r comes from measuring the metric on a few hundred rows.

    `ci_measurement_only`: the middle 95 % of r over the redrawn metrics. `ci_with_measurement_error`: the same after
    adding to each, on Fisher's scale z = artanh r, the error 1/sqrt(n - 3) of a correlation over n checkpoints.
    `measurement_share`: the variance of z over the redrawn metrics over the sum of both. None where not defined.
    """
    row = {"ci_measurement_only": None, "ci_with_measurement_error": None, "measurement_share": None}
    if r is None or redrawn is None:
        return row
    x = np.asarray(change) - np.mean(change)
    y = redrawn - redrawn.mean(axis=1, keepdims=True)
    spread = np.sqrt((x**2).sum() * (y**2).sum(axis=1))
    drawn = (y[spread > 0] @ x) / spread[spread > 0]  # no r where all checkpoints draw the same accuracy
    if len(drawn) < DRAWS / 2:
        return row | {"measurement_note": "most redrawn metrics do not vary over checkpoints"}
    row["ci_measurement_only"] = np.quantile(drawn, [0.025, 0.975]).tolist()
    if len(x) > 3:
        z, variance = np.arctanh(np.clip(drawn, -1 + 1e-9, 1 - 1e-9)), 1 / (len(x) - 3)
        error = np.random.default_rng(seed + 1).normal(0, variance**0.5, len(z))
        row["ci_with_measurement_error"] = np.quantile(np.tanh(z + error), [0.025, 0.975]).tolist()
        row["measurement_share"] = float(z.var() / (z.var() + variance))
    return row


def reliability(points: list[Point]) -> float | None:
    """The share of the metric's variance over checkpoints that is not sampling noise: 1 - mean(stderr^2) / variance.

    0 if the noise alone would explain the variance; None if the number of rows is unknown or nothing varies.
    """
    values, errors = [p.value for p in points], [p.stderr for p in points]
    if len(points) < 2 or None in errors or np.ptp(values) == 0:
        return None
    return max(0.0, 1 - float(np.mean(np.square(errors)) / np.var(values, ddof=1)))


def correlate(task: str, series: Series, changes: dict, args, seed: int) -> tuple[dict, list[int], list[str]]:
    """(content written for one task, steps used, warnings)."""
    points, metric = series.points, args.metric
    steps, alone = common_steps(points, changes, args.checkpoint_stride, args.steps, task)
    warnings = [
        f"steps only in the {side.removesuffix('_only').replace('_', ' ')}, left out: {_list(only_there)}"
        for side, only_there in alone.items()
        if only_there
    ]
    if len(steps) < 3:
        warnings.append(
            f"{len(steps)} checkpoints are too few: two points always lie on a line, so no correlation is given"
        )
    chosen = [points[step] for step in steps]
    redrawn = redraw(chosen, seed)
    content = {}
    for kind in LAYER_TYPES:
        content[kind] = relate([p.value for p in chosen], [changes[s][kind] for s in steps], redrawn, seed)
    values = {}
    for step in ([0] if 0 in points else []) + steps:
        values[str(step)] = {metric: points[step].value, "stderr": points[step].stderr, "n": points[step].n}
        values[str(step)] |= {LAYER_TYPES[kind]: change for kind, change in changes.get(step, {}).items()}
    content |= {"reliability": reliability(chosen), "values": values}
    return content | {"unmatched_steps": alone, "left_out": series.left_out}, steps, warnings


# ---------------------------------------------------------------- files


def read_changes(path: Path) -> tuple[dict, dict, dict[int, dict[str, float]]]:
    """(payload, header, {step: {layer type: change}}) of a weight-difference file.

    Raises:
        InputError: no `checkpoints`, or one without both averages.
    """
    payload, header = results.read_json(path, schema="int_and_sem")
    if not isinstance(payload, dict) or not isinstance(payload.get("checkpoints"), dict) or not payload["checkpoints"]:
        raise InputError(f"{path} has no `checkpoints`; give the file of weight-diff/int_and_sem.py")
    changes = {}
    for name, row in payload["checkpoints"].items():
        step = benchmark.step_key(name)
        row = {kind: row.get(key) for kind, key in LAYER_TYPES.items()} if isinstance(row, dict) else {}
        if step is None or not row or not all(isinstance(v, int | float) and math.isfinite(v) for v in row.values()):
            raise InputError(f"{path}: checkpoint {name!r} lacks a step, interface_avg or semantic_hub_avg")
        if step in changes:
            raise InputError(f"{path}: step {step} appears twice; keep one of its entries")
        changes[step] = {kind: float(value) for kind, value in row.items()}
    return payload, header, dict(sorted(changes.items()))


def common_steps(
    points: dict[int, Point], changes: dict, stride: int, wanted: list[int] | None, task: str
) -> tuple[list[int], dict[str, list[int]]]:
    """Every `stride`-th common step (among those `wanted`) without the base, and the steps that only one side has."""
    alone = {
        "benchmark_only": sorted(set(points) - set(changes) - {0}),
        "weight_diff_only": sorted(set(changes) - set(points) - {0}),
    }
    common = sorted((set(points) & set(changes)) - {0})
    if not common:
        raise InputError(
            f"no step in common: the benchmark has {_list(points)} for {task}, the weight differences have "
            f"{_list(changes)} (the base, step 0, does not count)"
        )
    if wanted is not None:
        if missing := sorted(set(wanted) - set(common)):
            raise InputError(f"--steps: no common step {_list(missing)}; there are {_list(common)}")
        common = [step for step in common if step in wanted]
    return common[::stride], alone


def _list(steps) -> str:
    return ", ".join(map(str, sorted(steps))) or "none"


# ---------------------------------------------------------------- the figure


def draw(path: Path, label: str, steps: list[int], points: dict[int, Point], changes: dict, found: dict) -> None:
    """Three panels: the metric over steps, and against the change of the interface layers and of the hub."""
    with figures.style() as plt:
        fig, axes = plt.subplots(1, 3, figsize=(figures.PAGE, 2.2), sharey=True)
        values = [points[step].value for step in steps]
        errors = [points[step].stderr or 0 for step in steps]
        axes[0].errorbar(steps, values, yerr=errors, color=figures.colour("target"), marker="o", capsize=2)
        if 0 in points:
            axes[0].axhline(points[0].value, color=figures.colour("base"), linestyle="--", linewidth=0.8, label="base")
        if "sib200" in label:
            figures.chance_line(axes[0], len(sib200.CHOICES))
        if axes[0].get_legend_handles_labels()[1]:
            axes[0].legend()
        if steps[-1] > 50 * steps[0]:
            axes[0].set_xscale("log")
        axes[0].set(xlabel="training step", ylabel=f"{label}\n({points[steps[0]].n or '?'} rows, ± standard error)")
        for axis, kind, name in zip(axes[1:], LAYER_TYPES, ("interface", "hub"), strict=True):
            x = [changes[step][kind] for step in steps]
            axis.errorbar(x, values, yerr=errors, fmt="none", ecolor=figures.colour("random"), elinewidth=0.6, zorder=1)
            colours = figures.colours(len(steps), ordered=True)
            axis.scatter(x, values, c=colours, marker="s" if name == "interface" else "o", s=14, zorder=2)
            curves, diffs = found[kind], found[kind].get("first_differences") or {}
            r = ["none" if row.get("correlation") is None else f"{row['correlation']:.2f}" for row in (diffs, curves)]
            title = f"{kind.replace('_', ' ')}, {len(steps)} checkpoints\n"
            title += f"r of first differences {r[0]}\nr of the curves {r[1]}"
            axis.set_title(title, color=figures.colour(name))
            axis.locator_params(axis="x", nbins=4)
            axis.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3), useMathText=True)
            axis.set_xlabel("mean |ΔW|")
            axis.margins(x=0.15)
        figures.steps_bar(fig, axes, steps)
        figures.save(fig, path.with_suffix(""))


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("benchmark", nargs="?", metavar="BENCHMARK", help="default: the study's lm_eval folder")
    p.add_argument("weight_diff", nargs="?", metavar="WEIGHT_DIFF", help="default: the study's weight difference")
    p.add_argument("-o", "--output", metavar="OUT", help="JSON to write; default: the study's file for it")
    text = "every N-th common step; default 1, all"
    p.add_argument("--checkpoint-stride", type=cli.positive, default=1, metavar="N", help=text)
    cli.add_run_flags(p)
    p.add_argument("--task", metavar="T,T,..", help="default: the study's data.task.name, else all tasks found")
    p.add_argument("--metric", choices=("acc", "acc_norm"), default="acc", help="default acc")
    return p


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    by_hand = benchmark.or_by_hand(args.benchmark or study.result("lm_eval"))
    source = study.input(args.benchmark, "BENCHMARK", "lm_eval", by_hand)
    weight_diff = study.input(args.weight_diff, "WEIGHT_DIFF", "int_and_sem")
    output = study.output(args.output, "--output", "downstream")
    tasks = args.task or study.get("data.task.name")
    tasks = tasks.split(",") if isinstance(tasks, str) else tasks

    payload, header, changes = read_changes(weight_diff)
    run, base = payload.get("target_model"), payload.get("base_model")
    series = benchmark.read(source, tasks, args.metric, run, base, header.get("models"))
    by_task = {task: correlate(task, series[task], changes, args, study.seed) for task in series}
    for text in dict.fromkeys(text for _, _, warnings in by_task.values() for text in warnings):
        cli.warn(text)
    for note in dict.fromkeys(note for task in series for note in series[task].left_out):
        cli.say(f"left out: {note}")

    first = next(iter(series))
    written, steps, _ = by_task[first]
    content = {"task": first, "metric": args.metric, **written}
    if len(series) > 1:
        content["tasks"] = {task: written for task, (written, _, _) in by_task.items()}
    head = results.header(
        SCHEMA,
        models=header.get("models"),
        data={"benchmark": source, "weight_diff": weight_diff},
        n_used=len(steps),
        n_available=len((set(series[first].points) & set(changes)) - {0}),
        checkpoint_stride=args.checkpoint_stride,
        seed=study.seed,
        gate=gate.carried(weight_diff),
    )
    results.write_json(output, content, head)
    for task, (written, steps, _) in by_task.items():
        path = output if task == first else output.with_name(f"{output.stem}.{task.replace('/', '__')}.json")
        draw(path, figures.accuracy(args.metric, task), steps, series[task].points, changes, written)
        cli.say(f"{task}, {args.metric}, steps {', '.join(map(str, steps))}")
        cli.say("\n".join(summary(kind, written[kind]) for kind in LAYER_TYPES))
    cli.say(f"wrote {output}, and next to it .pdf and .png" + (" of every task" if len(series) > 1 else ""))


def summary(kind: str, row: dict) -> str:
    """The lines of one layer type for the terminal."""
    lines = [kind.replace("_", " ")]
    for name, part in (("levels", row), ("first differences", row["first_differences"])):
        if part["correlation"] is None:
            lines.append(f"  {name}: no correlation, {part['note']}")
            continue
        text = f"  {name}: r {part['correlation']:+.3f}, p {part['p_value']:.3f}, {part['n_points']} points"
        if part["ci_low"] is not None:
            text += f", 95 % [{part['ci_low']:+.2f}, {part['ci_high']:+.2f}]"
        if part["ci_with_measurement_error"]:
            low, high = part["ci_with_measurement_error"]
            text += f", with the metric's error [{low:+.2f}, {high:+.2f}]"
        lines.append(text + f"; Spearman {part['spearman']['correlation']:+.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
