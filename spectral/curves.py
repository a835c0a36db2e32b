"""Curves over how much of an update is rewound, cut off or mixed, with each point compared with the checkpoint.

A `Point` is a condition at a position on a curve. All points are measured by one `Trial`, on the same sentences,
documents and rows, so each is compared with the checkpoint in pairs. The largest harmless share (p*, q*) is the largest
whose score is not worse than the checkpoint's by more than one standard error of the paired difference. Fewer sentences
give a larger error and so a larger share; with many sentences a loss, whose paired differences hardly vary, leaves a
share of 0. Therefore the largest share that keeps 95 % of what CPT gained [ours] is reported as well, which does not
depend on the number of sentences, and every curve has controls on the same sentences. Random curves have several draws;
each draw has its own p*, and the curve has their mean.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cpt_utils.base import cli, figures, sources, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np
from cpt_utils.base.processes import Process
from cpt_utils.base.study import Study, dotted
from cpt_utils.checkpoints import beside, refs
from cpt_utils.interventions import on_disk, surgery
from cpt_utils.interventions.condition import Condition
from cpt_utils.measures import controls, evaluation, over_run
from cpt_utils.measures.trial import Trial

retrieval, documents = cli.sibling("sentence-retrieval/sr_experiment.py"), cli.sibling("cpt/documents.py")

SCHEMA = "curves"
# The end points of curves, which every trial measures first.
BASE, TARGET = Condition("base", {}, of="base"), Condition("target", {})
DRAWS = 2000
KEPT = 0.95  # share of CPT's gain [ours]
COARSE = 0.01  # warn if rounding to the checkpoint's dtype is more than this share of the update's energy


@dataclass(frozen=True)
class Point:
    """A condition of the checkpoint at a position on a curve.

    Attributes:
        curve: the curve's name.
        at: the share, or the coefficient.
        condition: the intervention; `TARGET` for the unchanged checkpoint, `BASE` for the base itself.
        draw: number of the draw, for a random curve with several.
        facts: other properties; a number among them can be an axis as well (`along` of `summary`).
    """

    curve: str
    at: float
    condition: Condition
    draw: int = 0
    facts: dict = field(default_factory=dict)


# ---------------------------------------------------------------- what is measured


def measure(
    trial: Trial, path: Path, points: Sequence[Point], summarise: Callable[[list[dict]], dict],
    show: Callable[[Path, dict], None] | None, facts: dict | None = None, schema: str = SCHEMA,
    say: Callable[[dict], None] | None = None,
) -> None:  # fmt: skip
    """Measure every point once and write `path` with `facts` and `summarise(records)`, a `.pt` and a figure.

    The records are ordered as in `numbered`, like the `sets` of the result; `.pt` holds float32 [sets, units] of each
    measure in the same order. `facts` are part of the request; `show` draws the payload, `say` prints it.
    """

    def payload(records: list[dict]) -> tuple[dict, dict]:
        result = {"sets": controls.summary(records, trial.seed), **(facts or {}), **summarise(records)}
        return result, controls.units_of(records)

    def report(result: dict) -> None:
        if say:
            say(result)
        cli.say(f"wrote {path}" + (f" and the figure {path.with_suffix('.pdf')}" if show else ""))

    trial.measure(
        path, [BASE, TARGET, *numbered(points)[0]], schema, {"measures": trial.bench.measures(), **(facts or {})},
        payload, {"n_layers": trial.n_layers}, show, report, estimate=True,
        instead="another --output",
    )  # fmt: skip


def numbered(points: Sequence[Point]) -> tuple[list[Condition], list[int]]:
    """The distinct conditions besides base and target, and the index of each point's record: 0 is the base, 1 the
    target, then the conditions."""
    distinct = {BASE.id: BASE, TARGET.id: TARGET} | {point.condition.id: point.condition for point in points}
    ordered = sorted(distinct.values(), key=lambda each: each.of not in ("base", "target"))  # no model is loaded twice
    index = {condition.id: i for i, condition in enumerate(ordered)}
    return ordered[2:], [index[point.condition.id] for point in points]


def units(records: list[dict]) -> dict[str, np.ndarray]:
    """measure -> its values by sentence, document or row [records, units], negated if less is better."""
    signs = {name: 1 if evaluation.named(name).higher_is_better else -1 for name in records[0]["units"]}
    return {name: sign * np.asarray([row["units"][name] for row in records]) for name, sign in signs.items()}


# ---------------------------------------------------------------- the summary


def summary(
    points: Sequence[Point], records: list[dict], seed: int, nulls: dict[str, Sequence[str]] | None = None,
    along: Sequence[str] = ("at",),
) -> dict:  # fmt: skip
    """The results of all curves.

    Args:
        nulls: curve -> curves that its largest harmless share is compared with.
        along: axes on which that share is read: "at", or a number in the facts of all points.

    Returns:
        points: each with its values and, for every measure with units, `better`: by how much it is better than the
            checkpoint (mean, error: one standard error of the paired difference, ci_low, ci_high).
        largest: curve -> measure -> axis -> value, ci_low, ci_high; `draws`: the value of each draw; `unbroken`: the
            largest harmless share with no harmful one below it; `kept`: the same for the share that keeps KEPT of the
            gain, interpolated between points; None if CPT's gain is not clearly above 0.
        beyond: curve -> null -> measure -> axis -> value, ci_low, ci_high of the difference, in the same resamples, and
            the same for `kept`.
    """
    _, sets = numbered(points)
    rows = [
        {"curve": p.curve, "at": p.at, "draw": p.draw, "set": i, **p.facts} for p, i in zip(points, sets, strict=True)
    ]
    for row in rows:
        row |= {"values": records[row["set"]]["values"], "better": {}}
    harmless: dict = {name: {} for name in dict.fromkeys(p.curve for p in points)}
    beyond: dict = {name: {null: {} for null in compared} for name, compared in (nulls or {}).items()}
    for measure, values in units(records).items():
        change, weights = values[sets] - values[1], stats.resample_weights(values.shape[1], seed, DRAWS)
        means, errors, drawn = change.mean(1), standard_errors(change), weights @ change.T / change.shape[1]
        for row, mean, error, ends in zip(rows, means, errors, stats.interval(drawn, axis=0).T, strict=True):
            low, high = map(float, ends)
            row["better"][measure] = {"mean": float(mean), "error": float(error), "ci_low": low, "ci_high": high}
        gain = values[1] - values[0]
        gains = weights @ gain / len(gain)
        margins = {"": (means + errors, drawn + errors)}  # harmless if not below 0; likewise in every resample
        if stats.interval(gains)[0] > 0:
            tolerated = (1 - KEPT) * gain.mean(), (1 - KEPT) * gains[:, None]
            margins["kept"] = means + tolerated[0], drawn + tolerated[1]
        for axis, (key, margin) in itertools.product(along, margins.items()):
            stars = {name: _stars(rows, name, axis, *margin, between=key == "kept") for name in harmless}
            for name, (shares, unbroken, resampled) in stars.items():
                star = stats.with_interval(shares.mean(), resampled.mean(0))
                star |= {"draws": shares.tolist(), "unbroken": unbroken}
                _put(harmless[name].setdefault(measure, {}), axis, key, star)
            for name, null in ((name, null) for name, compared in beyond.items() for null in compared):
                (shares, _, resampled), (null_shares, _, null_resampled) = stars[name], stars[null]
                drawn_difference = resampled.mean(0) - null_resampled.mean(0)
                difference = stats.with_interval(shares.mean() - null_shares.mean(), drawn_difference)
                _put(beyond[name][null].setdefault(measure, {}), axis, key, difference)
    return {"points": rows, "largest": harmless, "beyond": beyond}


def _put(rows: dict, axis: str, key: str, row: dict) -> None:
    """Store a harmless share at `axis`, and a share that keeps the gain as `kept` within it."""
    if key:
        rows[axis][key] = row
    else:
        rows[axis] = row | {"kept": None}


def standard_errors(change: np.ndarray) -> np.ndarray:
    """The standard error of the mean of each row [points, units]; 0 for a single unit, which has none."""
    n = change.shape[1]
    return change.std(1, ddof=1) / n**0.5 if n > 1 else np.zeros(len(change))


def _stars(rows: list[dict], curve: str, axis: str, margins, drawn, between: bool):
    """The largest harmless share of each draw [draws], the mean of the unbroken ones, and the largest in every resample
    [draws, resamples]. The checkpoint itself is at 0.

    Args:
        margins, drawn: by how much each point is better than required [points], and in every resample
            [resamples, points].
        between: see `largest`.
    """
    shares, unbroken, resampled = [], [], []
    for number in sorted({row["draw"] for row in rows if row["curve"] == curve}):
        indices = [i for i, row in enumerate(rows) if (row["curve"], row["draw"]) == (curve, number)]
        indices = sorted(indices, key=lambda i: rows[i][axis])
        x, margin = np.array([rows[i][axis] for i in indices], dtype=np.float64), margins[indices]
        stop = next((i + 1 for i, value in enumerate(margin) if value < 0), len(indices))  # after the first harmful one
        shares.append(float(largest(x, margin, between)))
        unbroken.append(float(largest(x[:stop], margin[:stop], between)))
        resampled.append(largest(x, drawn[:, indices], between))
    return np.array(shares), float(np.mean(unbroken)), np.array(resampled)


def largest(x, margin, between: bool) -> np.ndarray:
    """The largest of the ordered positions x [points] whose margin [.., points] is not below 0; 0 if there is none.

    With `between` the result is interpolated: the zero of the straight line from the last such point to the next one.
    If it were always one of the measured points, all seeds could agree on it and it would have no interval.
    """
    last = len(x) - 1 - np.argmax((margin >= 0)[..., ::-1], axis=-1)
    position = x[last]
    if between:
        after = np.minimum(last + 1, len(x) - 1)
        here, there = (np.take_along_axis(margin, i[..., None], axis=-1)[..., 0] for i in (last, after))
        crosses = (here >= 0) & (there < 0)
        part = np.where(crosses, here / np.where(crosses, here - there, 1.0), 0.0)
        position = position + part * (x[after] - position)
    return np.where((margin >= 0).any(-1), position, 0.0)


def say(found: dict, words: dict[str, str], symbol: str) -> None:
    """Print the largest harmless share of every curve (`words`: curve -> display name; `symbol`: p* or q*)."""
    for curve, name in words.items():
        for measure, axes in found["largest"].get(curve, {}).items():
            row = axes["at"]
            star = f"{name}, {evaluation.named(measure).label}: {symbol} {stats.told(row, '.2f')}"
            kept = f"; {KEPT:.0%} of the gain is kept up to {stats.told(row['kept'], '.2f')}" if row["kept"] else ""
            cli.say(star + kept)


# ---------------------------------------------------------------- the figure


def shown(there: Collection[str]) -> list[str]:
    """The measures that get a panel, if they are `there`: losses by language, retrieval at the readout, task."""
    losses = [name for name in there if name.startswith("nll_per_byte")]
    return losses + [name for name in ("retrieval_readout", "task_accuracy") if name in there]


def draw(
    path: Path, payload: dict, looks: dict[str, dict], xlabel: str, axis: str = "at",
    more: Sequence[Callable] = (),
) -> None:  # fmt: skip
    """One panel per measure: every curve over its share, random ones as the mean and range of their draws.

    Base and checkpoint are lines; a ring marks the largest harmless share of a curve. The most extreme 3 % of the
    points may lie outside the panel, marked by arrows at its edge.

    Args:
        looks: curve -> label, color, marker, linestyle.
        axis: "at", or a number in the facts of all points.
        more: functions that draw further panels over the same axis.
    """
    drawn = [
        functools.partial(_panel, payload=payload, measure=name, looks=looks, axis=axis)
        for name in shown(payload["points"][0]["better"])
    ]
    panels(path, [*drawn, *more], xlabel)


def panels(path: Path, drawn: Sequence[Callable], xlabel: str) -> None:
    """A figure with one panel drawn by each of the functions, and the legend of the first one."""
    with figures.style() as plt:
        width = figures.PAGE if len(drawn) > 1 else figures.COLUMN
        rows = -(-len(drawn) // 2)
        fig, axes = plt.subplots(rows, min(2, len(drawn)), figsize=(width, 0.5 + 2.1 * rows), squeeze=False)
        for axis, fill in zip(axes.flat, drawn, strict=False):
            axis.set_xlabel(xlabel)
            fill(axis)
        for axis in axes.flat[len(drawn) :]:
            axis.set_visible(False)
        named = axes.flat[0].get_legend_handles_labels()
        if len(drawn) == 1:  # too narrow for two entries in a row
            fig.set_figheight(fig.get_figheight() + 0.18 * len(named[1]))
        fig.legend(*named, loc="outside upper center", ncols=4 if len(drawn) > 1 else 1)
        figures.save(fig, path)


def label(measure: str) -> str:
    """The axis label of a measure, in lines that fit a panel."""
    language = ", the new language" * (measure == "nll_per_byte")
    return figures.measure(measure, evaluation.named(measure).label + language, 24)


def _panel(panel, payload: dict, measure: str, looks: dict[str, dict], axis: str) -> None:
    sign = 1 if evaluation.named(measure).higher_is_better else -1
    panel.set_ylabel(label(measure))
    sets = {row["name"]: row["values"][measure] for row in payload["sets"][:2]}
    for role, name in (("base", "base"), ("target", "checkpoint")):
        panel.axhline(sets[role], color=figures.colour(role), linewidth=0.8, linestyle=":", label=name)
    shown: list[float] = []
    means: list[tuple] = []
    for curve, look in looks.items():
        rows = [row for row in payload["points"] if row["curve"] == curve]
        if not rows:
            continue
        xs = sorted({row[axis] for row in rows})
        ys = [[sets["target"] + sign * row["better"][measure]["mean"] for row in rows if row[axis] == x] for x in xs]
        shown += itertools.chain(*ys)
        means += [(x, sum(y) / len(y), look["color"]) for x, y in zip(xs, ys, strict=True)]
        panel.plot(xs, [sum(y) / len(y) for y in ys], **look)
        if any(len(y) > 1 for y in ys):
            panel.fill_between(xs, [min(y) for y in ys], [max(y) for y in ys], color=look["color"], alpha=0.15, lw=0)
        star = payload.get("largest", {}).get(curve, {}).get(measure, {}).get(axis, {})
        if len(star.get("draws", [])) == 1:
            y = [sum(y) / len(y) for x, y in zip(xs, ys, strict=True) if x == star["value"]]
            panel.plot([star["value"]] * len(y), y, "o", ms=7, mfc="none", mec=look["color"], mew=1.1)
    # One extreme point (DARE at .95 scales by 20) would flatten all others, so it may leave the panel.
    ends = [*np.quantile([*shown, *sets.values()], (0.03, 0.97)), *sets.values()]
    room = 0.08 * (max(ends) - min(ends)) or 1e-3
    low, high = min(ends) - room, max(ends) + room
    panel.set_ylim(low, high)
    for x, y, shade in means:
        if not low <= y <= high:
            panel.plot(
                x, high if y > high else low, "^" if y > high else "v", color=shade, ms=5, clip_on=False, zorder=5
            )


# ---------------------------------------------------------------- the command


def parser(doc: str, output: str):
    """A parser with the flags that the scripts of curves share; `output`: where results go without --output."""
    p = cli.parser(doc)
    over_run.add_flags(p, output, part=", or one checkpoint: the last, or that of --steps, is measured", drop=False)
    evaluation.add_flags(p)
    text = "held-out text in other languages, for the loss in each; default: the study's"
    p.add_argument("--heldout-others", nargs="+", metavar="LANG=FILE", help=text)
    sources.add_flags(p)
    return p


@contextlib.contextmanager
def opened(args, step: str, *other: str) -> Iterator[tuple[Study, Path, surgery.Pair]]:
    """Study, output and model pair from the arguments of `parser`; `other`: more parts of the file's name, for results
    that differ from the study's in other ways."""
    study = Study.find(args.study, args.seed, args.arm)
    base = refs.model(study.value(args.base, "--base", "base"))
    target = refs.run(study.value(args.run, "--run", "run"), args.steps)[-1]
    differs = beside.name(study, args.base, args.run, args.steps, args.limit, last=True)
    output = study.output(args.output, "--output", step, dotted(differs, *other))
    if surgery.identity(base) == surgery.identity(target):
        raise InputError(f"{target.spec} is the base itself: there is nothing to rewind, cut off or mix")
    with surgery.Pair(base, target) as pair:
        yield study, output, pair


def trial_of(args, study: Study, pair: surgery.Pair, others: dict[str, refs.ModelRef] | None = None) -> Trial:
    """The trial that the arguments of `parser` and the study ask for; the loss is taken in every language with held-out
    text. `others`: models besides the pair, by role."""
    args.measures = args.measures or study.get("spectral.measures")
    files = documents.language_files(args.heldout_others, "--heldout-others") or study.get("data.heldout")
    test = evaluation.test_from_arguments(args, study, {}, retrieval.of_pairs, files)
    if not test.measures():
        raise InputError("nothing to measure: there are no parallel sentences, no held-out text and no task")
    return Trial.from_arguments(args, study, pair.models | (others or {}), test, study.get("run"))


def warn_if_coarse(pair: surgery.Pair, rounding: float, of: str) -> None:
    """Warn if `rounding`, a share of the energy (squared norm) of what is measured, is more than COARSE."""
    if rounding > COARSE:
        cli.warn(
            f"rounding to the dtype of {pair.target_ref.spec} alone is {rounding:.0%} of the energy of {of}; save the "
            "checkpoint in float32"
        )


# ---------------------------------------------------------------- one point as a folder


def number(flag: str, text: str, low: float, high: float) -> float:
    """The number that a flag was given, which must be from `low` to `high`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise InputError(f"{flag} {text}: not a number from {low:g} to {high:g}")
    return value


def alone(what: str, args) -> Process:
    """This process, if it is the only one: `what` is work for one process."""
    Process.refuse_several(what)
    return Process(args.device)


def write(pair: surgery.Pair, recipe: surgery.Recipe, folder: str, args, study: Study) -> None:
    """The model of a recipe as a complete folder, read back and compared (`on_disk.write_model`)."""
    record = on_disk.write_model(pair, recipe, folder, study.get("run"), args.overwrite)
    cli.say(f"{folder}: {record['recipe']}; read back and equal to what was measured")
