"""Curves over what is done to a checkpoint: put back, cut off or mixed by a share, each point beside the checkpoint.

A `Point` is a condition at a place of a curve. All points are measured by one `Trial`, on the same sentences, documents
and rows, so that each is compared with the checkpoint pair by pair. The largest share that costs nothing (p*, q*) is
the largest whose score is not worse than the checkpoint's by more than one standard error of the paired difference:
fewer sentences make a larger error and so a larger share, and of a loss, whose paired differences hardly vary, many
sentences leave none. So beside it stands the largest share that keeps 95 % of what CPT gained [ours], which does not
depend on their number, and every curve is read beside its controls, on the same sentences. Random curves have several
draws; each draw has its own p*, and theirs is the mean.
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
# The ends of curves, which every trial measures first.
BASE, TARGET = Condition("base", {}, of="base"), Condition("target", {})
DRAWS = 2000
KEPT = 0.95  # of the gain of CPT [ours]
COARSE = 0.01  # rounding to the checkpoint's dtype that is more than this share of the update's energy is said


@dataclass(frozen=True)
class Point:
    """A condition of the checkpoint at a place of a curve.

    Attributes:
        curve: the curve's name.
        at: the share, or the coefficient.
        condition: what is done; `TARGET` where it is nothing, `BASE` for the base itself.
        draw: its number, of a curve with several random ones.
        facts: what else is known of it; a number in it can be an axis of its own (`summary`, along).
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
    """Measure every point once, and write `path` with `facts` and `summarise(records)` in it, `.pt` and figure beside
    it.

    The records are those of `numbered`, as are the `sets` of the result; `.pt` holds float32 [sets, units] of each
    measure, in their order. `facts` are a part of the request; `show` draws the payload, `say` prints what it says.
    """

    def payload(records: list[dict]) -> tuple[dict, dict]:
        found = {"sets": controls.summary(records, trial.seed), **(facts or {}), **summarise(records)}
        return found, controls.units_of(records)

    def said(found: dict) -> None:
        if say:
            say(found)
        cli.say(f"wrote {path}" + (f" and the figure {path.with_suffix('.pdf')}" if show else ""))

    trial.measure(
        path, [BASE, TARGET, *numbered(points)[0]], schema, {"measures": trial.bench.measures(), **(facts or {})},
        payload, {"n_layers": trial.n_layers}, show, said, estimate=True,
        instead="another --output",
    )  # fmt: skip


def numbered(points: Sequence[Point]) -> tuple[list[Condition], list[int]]:
    """The distinct conditions beside base and target, and of each point which record is its: 0 is the base's, 1 the
    target's, then those of the conditions."""
    found = {BASE.id: BASE, TARGET.id: TARGET} | {point.condition.id: point.condition for point in points}
    ordered = sorted(found.values(), key=lambda one: one.of not in ("base", "target"))  # no model is loaded twice
    place = {one.id: i for i, one in enumerate(ordered)}
    return ordered[2:], [place[point.condition.id] for point in points]


def units(records: list[dict]) -> dict[str, np.ndarray]:
    """measure -> its values by sentence, document or row [records, units], with a sign by which more is better."""
    signs = {name: 1 if evaluation.named(name).higher_is_better else -1 for name in records[0]["units"]}
    return {name: sign * np.asarray([row["units"][name] for row in records]) for name, sign in signs.items()}


# ---------------------------------------------------------------- what it says


def summary(
    points: Sequence[Point], records: list[dict], seed: int, nulls: dict[str, Sequence[str]] | None = None,
    along: Sequence[str] = ("at",),
) -> dict:  # fmt: skip
    """What a result says of its curves.

    Args:
        nulls: curve -> curves that its largest harmless share is compared with.
        along: axes on which that share is read: "at", or a number in the facts of all points.

    Returns:
        points: each with its values and, of every measure with units, `better`: by how much it is better than the
            checkpoint (mean, error: one standard error of the paired difference, ci_low, ci_high).
        largest: curve -> measure -> axis -> value, ci_low, ci_high; `draws`: that of each; `unbroken`: up to which no
            smaller share is worse, either; `kept`: the same of the share that keeps KEPT of the gain, read between
            the points, None where that CPT gained anything is not clear.
        beyond: curve -> null -> measure -> axis -> value, ci_low, ci_high of the difference, in the same resamples, and
            that of `kept`.
    """
    _, at = numbered(points)
    rows = [
        {"curve": p.curve, "at": p.at, "draw": p.draw, "set": i, **p.facts} for p, i in zip(points, at, strict=True)
    ]
    for row in rows:
        row |= {"values": records[row["set"]]["values"], "better": {}}
    stood: dict = {name: {} for name in dict.fromkeys(p.curve for p in points)}
    beyond: dict = {name: {null: {} for null in found} for name, found in (nulls or {}).items()}
    for measure, values in units(records).items():
        change, weights = values[at] - values[1], stats.resample_weights(values.shape[1], seed, DRAWS)
        means, errors, drawn = change.mean(1), standard_errors(change), weights @ change.T / change.shape[1]
        for row, mean, error, ends in zip(rows, means, errors, stats.interval(drawn, axis=0).T, strict=True):
            low, high = map(float, ends)
            row["better"][measure] = {"mean": float(mean), "error": float(error), "ci_low": low, "ci_high": high}
        gain = values[1] - values[0]
        gains = weights @ gain / len(gain)
        margins = {"": (means + errors, drawn + errors)}  # not below 0: harmless; and in every resample
        if stats.interval(gains)[0] > 0:
            lost = (1 - KEPT) * gain.mean(), (1 - KEPT) * gains[:, None]
            margins["kept"] = means + lost[0], drawn + lost[1]
        for axis, (key, each) in itertools.product(along, margins.items()):
            stars = {name: _stars(rows, name, axis, *each, between=key == "kept") for name in stood}
            for name, (own, unbroken, resampled) in stars.items():
                found = stats.with_interval(own.mean(), resampled.mean(0))
                found |= {"draws": own.tolist(), "unbroken": unbroken}
                _put(stood[name].setdefault(measure, {}), axis, key, found)
            for name, null in ((name, null) for name, compared in beyond.items() for null in compared):
                (own, _, drawn_own), (other, _, drawn_other) = stars[name], stars[null]
                found = stats.with_interval(own.mean() - other.mean(), drawn_own.mean(0) - drawn_other.mean(0))
                _put(beyond[name][null].setdefault(measure, {}), axis, key, found)
    return {"points": rows, "largest": stood, "beyond": beyond}


def _put(rows: dict, axis: str, key: str, found: dict) -> None:
    """A share that is harmless under the axis, one that keeps the gain within it."""
    if key:
        rows[axis][key] = found
    else:
        rows[axis] = found | {"kept": None}


def standard_errors(change: np.ndarray) -> np.ndarray:
    """The standard error of the mean of each row [points, units]; 0 of a single unit, which has none."""
    n = change.shape[1]
    return change.std(1, ddof=1) / n**0.5 if n > 1 else np.zeros(len(change))


def _stars(rows: list[dict], curve: str, axis: str, margins, drawn, between: bool):
    """The largest harmless share of each draw [draws], the mean of the unbroken ones, and the largest in every resample
    [draws, resamples]. The checkpoint itself stands at 0.

    Args:
        margins, drawn: of each point [points] by how much it is better than it must be, and in every resample
            [resamples, points].
        between: see `largest`.
    """
    own, unbroken, resampled = [], [], []
    for number in sorted({row["draw"] for row in rows if row["curve"] == curve}):
        mine = [i for i, row in enumerate(rows) if (row["curve"], row["draw"]) == (curve, number)]
        mine = sorted(mine, key=lambda i: rows[i][axis])
        x, margin = np.array([rows[i][axis] for i in mine], dtype=np.float64), margins[mine]
        first = next((i + 1 for i, each in enumerate(margin) if each < 0), len(mine))  # past the first that is not
        own.append(float(largest(x, margin, between)))
        unbroken.append(float(largest(x[:first], margin[:first], between)))
        resampled.append(largest(x, drawn[:, mine], between))
    return np.array(own), float(np.mean(unbroken)), np.array(resampled)


def largest(x, margin, between: bool) -> np.ndarray:
    """The largest of the places x [points], in order, whose margin [.., points] is not below 0; 0 where none is.

    With `between` it may lie between two points: where the straight line between the last such point and the next one
    is 0. A place that is only one of the points measured would be the same in all seeds, and had no interval.
    """
    last = len(x) - 1 - np.argmax((margin >= 0)[..., ::-1], axis=-1)
    found = x[last]
    if between:
        after = np.minimum(last + 1, len(x) - 1)
        here, there = (np.take_along_axis(margin, at[..., None], axis=-1)[..., 0] for at in (last, after))
        crosses = (here >= 0) & (there < 0)
        part = np.where(crosses, here / np.where(crosses, here - there, 1.0), 0.0)
        found = found + part * (x[after] - found)
    return np.where((margin >= 0).any(-1), found, 0.0)


def say(found: dict, words: dict[str, str], symbol: str) -> None:
    """Print the largest harmless share of every curve (`words`: curve -> what it is called; `symbol`: p* or q*)."""
    for curve, name in words.items():
        for measure, axes in found["largest"].get(curve, {}).items():
            row = axes["at"]
            said = f"{name}, {evaluation.named(measure).label}: {symbol} {stats.told(row, '.2f')}"
            kept = f"; {KEPT:.0%} of the gain is kept up to {stats.told(row['kept'], '.2f')}" if row["kept"] else ""
            cli.say(said + kept)


# ---------------------------------------------------------------- the figure


def shown(there: Collection[str]) -> list[str]:
    """Of the measures that are there those that have a panel: losses by language, retrieval at the readout, task."""
    losses = [name for name in there if name.startswith("nll_per_byte")]
    return losses + [name for name in ("retrieval_readout", "task_accuracy") if name in there]


def draw(
    path: Path, payload: dict, looks: dict[str, dict], xlabel: str, axis: str = "at",
    more: Sequence[Callable] = (),
) -> None:  # fmt: skip
    """A panel a measure: every curve over its share, random ones as the mean and range of their draws.

    Base and checkpoint are lines; a ring is the largest harmless share of a curve. The farthest 3 % of the points may
    lie outside the panel: an arrow at its edge.

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
    """A figure with a panel for each of the functions, which draw on it, and the legend of the first one."""
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
        if len(drawn) == 1:  # too narrow for two in a row
            fig.set_figheight(fig.get_figheight() + 0.18 * len(named[1]))
        fig.legend(*named, loc="outside upper center", ncols=4 if len(drawn) > 1 else 1)
        figures.save(fig, path)


def label(measure: str) -> str:
    """What an axis says of a measure, in lines that fit a panel."""
    own = ", the new language" * (measure == "nll_per_byte")
    return figures.measure(measure, evaluation.named(measure).label + own, 24)


def _panel(panel, payload: dict, measure: str, looks: dict[str, dict], axis: str) -> None:
    sign = 1 if evaluation.named(measure).higher_is_better else -1
    panel.set_ylabel(label(measure))
    sets = {row["name"]: row["values"][measure] for row in payload["sets"][:2]}
    for role, words in (("base", "base"), ("target", "checkpoint")):
        panel.axhline(sets[role], color=figures.colour(role), linewidth=0.8, linestyle=":", label=words)
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
    # One far point (DARE at .95 scales by 20) would flatten all others: it leaves the panel.
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
    """A parser with the flags that scripts of curves share; `output`: where results go without --output."""
    p = cli.parser(doc)
    over_run.add_flags(p, output, part=", or one checkpoint: the last, or that of --steps, is measured", drop=False)
    evaluation.add_flags(p)
    text = "the same in other languages, for the loss in each; default: the study's"
    p.add_argument("--heldout-others", nargs="+", metavar="LANG=FILE", help=text)
    sources.add_flags(p)
    return p


@contextlib.contextmanager
def opened(args, step: str, *other: str) -> Iterator[tuple[Study, Path, surgery.Pair]]:
    """Study, output and the pair that the arguments of `parser` mean; `other`: parts of the file's name, where the
    result is not the study's own for further reasons."""
    study = Study.find(args.study, args.seed, args.arm)
    base = refs.model(study.value(args.base, "--base", "base"))
    target = refs.run(study.value(args.run, "--run", "run"), args.steps)[-1]
    differs = beside.name(study, args.base, args.run, args.steps, args.limit, last=True)
    output = study.output(args.output, "--output", step, dotted(differs, *other))
    if surgery.identity(base) == surgery.identity(target):
        raise InputError(f"{target.spec} is the base itself: there is nothing to put back, cut off or mix")
    with surgery.Pair(base, target) as pair:
        yield study, output, pair


def trial_of(args, study: Study, pair: surgery.Pair, others: dict[str, refs.ModelRef] | None = None) -> Trial:
    """What is measured, as the arguments of `parser` and the study say: beside the loss in the target language that in
    all others that there is held-out text of. `others`: models beside the pair, by their role."""
    args.measures = args.measures or study.get("spectral.measures")
    files = documents.language_files(args.heldout_others, "--heldout-others") or study.get("data.heldout")
    test = evaluation.test_from_arguments(args, study, {}, retrieval.of_pairs, files)
    if not test.measures():
        raise InputError("nothing to measure: there are no parallel sentences, no held-out text and no task")
    return Trial.from_arguments(args, study, pair.models | (others or {}), test, study.get("run"))


def warn_if_coarse(pair: surgery.Pair, rounding: float, of: str) -> None:
    """Say where `rounding`, a share of the energy (squared norm) of what is measured, is more than COARSE."""
    if rounding > COARSE:
        cli.warn(
            f"rounding to the dtype of {pair.target_ref.spec} alone is {rounding:.0%} of the energy of {of}; save the "
            "checkpoint in float32"
        )


# ---------------------------------------------------------------- one point as a folder


def number(flag: str, text: str, low: float, high: float) -> float:
    """The number that a flag was given, from `low` to `high`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise InputError(f"{flag} {text}: not a number from {low:g} to {high:g}")
    return value


def alone(what: str, args) -> Process:
    """This process, where it is the only one: `what` is the work of one."""
    Process.refuse_several(what)
    return Process(args.device)


def write(pair: surgery.Pair, recipe: surgery.Recipe, folder: str, args, study: Study) -> None:
    """The model of a recipe as a complete folder, read back and compared (`on_disk.write_model`)."""
    record = on_disk.write_model(pair, recipe, folder, study.get("run"), args.overwrite)
    cli.say(f"{folder}: {record['recipe']}; read back and equal to what was measured")
