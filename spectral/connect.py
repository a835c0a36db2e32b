"""Are two runs of one base, or a base and its checkpoint, linearly connected: is nothing lost on the line between them?

Every parameter is (1 - a) A + a C. The chord gap at a is by how much the score there is worse than the straight line
between the scores of A and C; the barrier is the largest gap between the ends (below 0 if the whole line is better than
the chord), also given as a share of the better end's gain over the base. Close models connect whatever they learnt, so
the line is compared with random directions [ours]: one from A and one from C, with every tensor as long as in C - A,
each followed as far as the point on the line is from that end.

In:   B, RUN and optionally another run of B as A (--other); without it A is B.
Out:  OUT (default: the study's spectral/connect.json, without --other connect.base.json): points, gaps, barriers, gains,
      distance of A and C and cosine of their updates by layer; .pt (every sentence) and a figure.

A killed run resumes with the next model. On several GPUs: accelerate launch spectral/connect.py ...

Full: python spectral/connect.py --base B --run RUN1 --other RUN2 --heldout 1.txt --heldout-others eng_Latn=2.txt ces_Latn=3.txt --output connect.json
Tiny: python spectral/connect.py --study demo/tiny.yaml --at 0.5 --measures nll
"""  # noqa: E501

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, figures, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np, torch
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import refs, tensors, tokenizer_id
from cpt_utils.interventions import in_memory, surgery, values
from cpt_utils.interventions.condition import Condition
from cpt_utils.measures import evaluation

curves, updates = cli.sibling("spectral/curves.py"), cli.sibling("spectral/updates.py")

SCHEMA = "connect"
RESULTS = {"connect": "spectral/connect.json"}
ASKED = {"connect": "Are two runs of one base connected by a straight line along which nothing is lost?"}
CAPTIONS = {
    "connect": """Part IV: 5. Connectivity
        Scores along the straight line (1 - a) A + a C from another run A of continued pre-training of the same base to
        the study's C, and the chord, the straight line between the scores of the ends. Grey: the same chord with both
        ends moved in random directions as far as the point on the line is from them: if that costs nothing either, any
        two models this close are connected. Claim D6 is decided by the largest gap (barrier) between line and chord in
        a loss, as a share of the better end's gain over the base. If the other run was trained on another language, an
        end may be worse than the base (dotted): then the chord is high, and a line below it says little. Bands are
        often narrower than the line.""",
}
LEAST = 0.1  # of the largest gain in a loss; smaller gains are too small to divide a barrier by
AT = tuple(i / 10 for i in range(11))
OTHER = Condition("other", {}, of="other")
SIDES = ("A", "C")  # the ends where random directions start


# ---------------------------------------------------------------- the method


def mixed(base: torch.Tensor, target: torch.Tensor, a: float) -> torch.Tensor:
    """(1 - a) A + a C in float32; with A and C swapped the result at 1 - a is the same, bit for bit."""
    ends = updates.wide(base, target)
    return (round(1 - a, 12) * ends[0] + a * ends[1]).to(target.dtype)


@dataclass(frozen=True)
class Moved:
    """A tensor of the end `side` ("A" or "C"), moved in a random direction by `share` of the length of C - A."""

    side: str
    share: float
    name: str
    seed: int
    draw: int

    def __call__(self, base: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        a, c = updates.wide(base, target)
        step = updates.nulls(c - a, "gaussian", updates.draw_seed(self.seed, self.side, self.name, self.draw))
        return ((a if self.side == "A" else c) + self.share * step).to(target.dtype)


def everything(pair: surgery.Pair, home) -> list[surgery.Edit]:
    """Edits of every tensor of the pair, including embeddings, norms and head.

    Raises:
        InputError: different vocabularies, or a tensor that only one of the models has.
    """
    ends = pair.base_ref, pair.target_ref
    difference = tokenizer_id.diff_vocabularies(*ends, home)
    if difference:
        raise InputError(
            f"{ends[0].spec} and {ends[1].spec} have different vocabularies ({difference}) and cannot be mixed"
        )
    names = [name for name in pair.target.names() if not (archs.is_buffer(name) or pair.arch.may_lack(name))]
    edits = [pair.edit(name, by_rows=True) for name in names]
    for name, why in pair.diff_tensors(surgery.Recipe("", {}, tuple(edits))).items():
        if pair.arch.may_lack(name):  # no model of the type uses it
            continue
        raise InputError(f"{ends[0].spec} and {ends[1].spec} differ in form: {name} is {why}")
    return edits


def between(pair: surgery.Pair, edits: Sequence[surgery.Edit], a: float) -> surgery.Recipe:
    """(1 - a) A + a C for every tensor; at 0 A's own values and at 1 C's."""
    function = None if a == 0 else functools.partial(mixed, a=a)
    made = [] if a == 1 else [replace(edit, function=function) for edit in edits]
    return surgery.Recipe(f"{1 - a:g} of {pair.base_ref.spec}, {a:g} of itself", {"a": a}, tuple(made))


def aside(pair: surgery.Pair, edits, side: str, a: float, seed: int, draw: int) -> surgery.Recipe:
    """The end `side`, moved in a random direction as far as the point `a` on the line is from it."""
    share = a if side == "A" else round(1 - a, 12)
    made = []
    for edit in edits:
        moved = Moved(side, share, updates.drawn_as(pair, edit.tensor), seed, draw)
        made.append(replace(edit, by_rows=False, function=moved))
    facts = {"side": side, "share": share, "seed": seed, "draw": draw}
    return surgery.Recipe(f"{side}, moved in a random direction", facts, tuple(made))


def points_of(pair: surgery.Pair, edits, at: Sequence[float], first: Condition, seed: int, draws: int) -> list:
    """The line from `first` (A itself) to C, and for every draw both ends moved, at all points between them."""
    swapper, points = in_memory.Swapper(pair, cache_bytes=0), []
    ends = {0: first, 1: curves.TARGET}
    for a in sorted({*at, 0, 1}):
        made = ends.get(a) or swapper.condition(f"line {a:g}", between(pair, edits, a))
        points.append(curves.Point("line", float(a), made))
    for draw in range(draws):
        for side in SIDES:
            for a in sorted(a for a in at if 0 < a < 1):
                made = swapper.condition(f"random from {side} {a:g} ({draw})", aside(pair, edits, side, a, seed, draw))
                points.append(curves.Point(f"random_{side}", a, made, draw))
    return points


# ---------------------------------------------------------------- the result


def summarise(records: list[dict], points: Sequence, seed: int) -> dict:
    """For every measure with units: `gap` of each point on the line and of the random ends, `barrier` and `random` with
    their shares of the `gain`, and `apart`: by how much the random barrier is higher.

    All are positive if the score is worse than the chord. Intervals: bootstrap over units. For a barrier the maximum is
    taken in every resample, which noise makes larger: this works against the claim that there is none.
    """
    _, sets = curves.numbered(points)
    index = {(p.curve, p.at, p.draw): i for p, i in zip(points, sets, strict=True)}
    line = [a for curve, a, _ in index if curve == "line"]
    draws = sorted({draw for curve, _, draw in index if curve != "line"})
    inner = sorted({a for curve, a, _ in index if curve != "line"})
    rows = [{"at": a, "set": index["line", a, 0], "values": records[index["line", a, 0]]["values"]} for a in line]
    result: dict = {"points": rows, "measures": {}}
    for measure, score in curves.units(records).items():
        ends = [score[index["line", a, 0]] for a in (0.0, 1.0)]
        gaps = np.stack([(1 - a) * ends[0] + a * ends[1] - score[index["line", a, 0]] for a in line])
        moved = [
            np.mean([
                (1 - a) * (ends[0] - score[index["random_A", a, d]]) + a * (ends[1] - score[index["random_C", a, d]])
                for d in draws
            ], axis=0) for a in inner
        ]  # fmt: skip
        weights = stats.resample_weights(score.shape[1], seed, curves.DRAWS)
        better = max(ends, key=lambda end: end.mean())
        gain = _Drawn(better - score[0], weights)
        barrier = _barrier(line, gaps, weights)
        result["measures"][measure] = {
            "gap": [
                [a, *gap.ends()] for a, gap in ((a, _Drawn(row, weights)) for a, row in zip(line, gaps, strict=True))
            ],
            "gap_random": [[a, *_Drawn(row, weights).ends()] for a, row in zip(inner, moved, strict=True)],
            "gain": gain.row(),
            "barrier": barrier.row() | {"at": barrier.at, "share": barrier.share(gain)},
        }
        if moved:
            random = _barrier(inner, np.stack(moved), weights)
            random_row = random.row() | {"at": random.at, "share": random.share(gain)}
            apart = random.value - barrier.value, random.drawn - barrier.drawn
            result["measures"][measure] |= {"random": random_row, "apart": stats.with_interval(*apart)}
    losses = {name: row for name, row in result["measures"].items()
              if name.startswith("nll_per_byte") and row["barrier"]["share"]}  # fmt: skip
    # If a gain is next to nothing, as in a language that both runs knew, any gap is a large share of it.
    most = max((row["gain"]["value"] for row in losses.values()), default=0)
    shares = {name: row["barrier"]["share"] for name, row in losses.items() if row["gain"]["value"] >= LEAST * most}
    worst = max(shares, key=lambda name: shares[name]["value"], default=None)
    return result | {"worst": {"measure": worst, **shares[worst]} if worst else None}


class _Drawn:
    """A mean over units, and the same in every resample."""

    at: float | None = None

    def __init__(self, units, weights):
        self.value, self.drawn = float(units.mean()), weights @ units / len(units)

    def row(self) -> dict:
        return stats.with_interval(self.value, self.drawn)

    def ends(self) -> tuple[float, float, float]:
        row = self.row()
        return row["value"], row["ci_low"], row["ci_high"]

    def share(self, gain: _Drawn) -> dict | None:
        """As a share of the gain; None if the gain is not clearly above 0."""
        if gain.row()["ci_low"] <= 0:
            return None
        return stats.with_interval(self.value / gain.value, stats.shares(self.drawn, gain.drawn))


def _barrier(at: Sequence[float], gaps, weights) -> _Drawn:
    """The largest gap between 0 and 1, and its position; below 0 if the whole line is better than the chord."""
    inside = [i for i, a in enumerate(at) if 0 < a < 1]
    drawn = weights @ gaps[inside].T / gaps.shape[1]
    highest = max(inside, key=lambda i: gaps[i].mean())
    barrier = _Drawn(gaps[highest], weights)
    barrier.at, barrier.drawn = at[highest], drawn.max(1)
    return barrier


def distances(pair: surgery.Pair, of_base: surgery.Pair) -> dict:
    """How far apart A and C are, and whether they moved in the same direction: `distance` ||A - C|| / ||B|| and
    `cosine` of A - B and C - B (None if A is B), for each layer, outside the layers, and for all; `rounding`: the
    squared norm of the error from rounding to C's dtype half-way, as a share of that of (A - C) / 2. Leaves out tensors
    that differ in shape from B's or that no model of the type uses. Read in blocks of rows, summed in float64.
    """
    sums: dict[str, list[float]] = {}
    for name in pair.target.names():
        if archs.is_buffer(name) or pair.arch.may_lack(name):
            continue
        base_name = of_base.base_name(name)
        if of_base.base.shape(base_name) != pair.target.shape(name):
            continue
        layer = pair.arch.layer_of(name)
        held = of_base.base.get(base_name), pair.base.get(pair.base_name(name)), pair.target.get(name)
        held = [values.rows_of(tensor) for tensor in held]
        for start, stop in tensors.chunks(len(held[0]), held[0][:1].numel() * 8, values.BLOCK):
            b, a, c = (rows[start:stop].double().flatten() for rows in held)
            half = (a + c) / 2
            off = half.to(held[2].dtype).double() - half
            products = (
                (c - a).dot(c - a),
                b.dot(b),
                (a - b).dot(c - b),
                (a - b).dot(a - b),
                (c - b).dot(c - b),
                off.dot(off),
            )
            for key in ("all", "outside" if layer is None else str(layer)):
                totals = sums.setdefault(key, [0.0] * 6)
                sums[key] = [total + float(more) for total, more in zip(totals, products, strict=True)]
    result = {}
    for key, (apart, base, product, of_a, of_c, off) in sums.items():
        cosine = product / math.sqrt(of_a * of_c) if of_a and of_c else None
        result[key] = {"distance": math.sqrt(apart / base) if base else None, "cosine": cosine}
        result[key]["rounding"] = 4 * off / apart if apart else None
    return result


def say(payload: dict) -> None:
    whole = payload["distance"]["all"]
    cosine = "" if whole["cosine"] is None else f", cosine of the updates {whole['cosine']:.3f}"
    cli.say(f"||A - C|| / ||B|| {whole['distance']:.4f}{cosine}")
    for name, row in payload["measures"].items():
        text = f"{evaluation.named(name).label}: barrier {stats.told(row['barrier'], '.4f')}"
        text += f" at a = {row['barrier']['at']:g}"
        if row["barrier"]["share"]:
            text += f", {row['barrier']['share']['value']:.1%} of the gain"
        if "random" in row:
            random = row["random"]
            text += f"; random directions {stats.told(random, '.4f')}"
            text += f", {random['share']['value']:.1%} of the gain" if random["share"] else ""
        cli.say(text)


# ---------------------------------------------------------------- the figure


def draw(path: Path, payload: dict) -> None:
    """A panel for each loss, retrieval and task: the line, its chord, random directions and the base."""
    names = curves.shown(payload["measures"])
    drawn = [functools.partial(_panel, payload=payload, measure=name) for name in names]
    curves.panels(path, drawn, "a (0: the other run, 1: the study's)")


def _panel(axis, payload: dict, measure: str) -> None:
    sign, rows = 1 if evaluation.named(measure).higher_is_better else -1, payload["points"]
    row, ends = payload["measures"][measure], {point["at"]: point["values"][measure] for point in rows}
    at = [point["at"] for point in rows]

    def chord(a: float) -> float:
        return (1 - a) * ends[0] + a * ends[1]

    base, look = payload["sets"][0]["values"][measure], {"color": figures.PALETTE[0]}
    axis.axhline(base, color=figures.colour("base"), linewidth=0.8, linestyle=":", label="base")
    axis.plot(at, [chord(a) for a in at], color="0.3", linewidth=0.8, linestyle="--", label="chord")
    axis.plot(at, [point["values"][measure] for point in rows], marker="o", label="straight line", **look)
    low, high = ([chord(a) - sign * gap[i] for a, gap in zip(at, row["gap"], strict=True)] for i in (2, 3))
    axis.fill_between(at, low, high, alpha=0.15, linewidth=0, label="95 % interval of the gap", **look)
    if row["gap_random"]:
        xs = [0.0, *(a for a, *_ in row["gap_random"]), 1.0]
        ys = [
            chord(a) - sign * gap for a, gap in zip(xs, [0.0, *(g for _, g, *_ in row["gap_random"]), 0.0], strict=True)
        ]
        axis.plot(xs, ys, color=figures.colour("random"), marker="x", linestyle="-.", label="random directions")
    axis.set_ylabel(curves.label(measure))


# ---------------------------------------------------------------- the command


def coefficient(text: str) -> float:
    value = float(text)
    if not -1 <= value <= 2:
        raise ValueError
    return value


coefficient.__name__ = "a number from -1 to 2"  # its name in argparse errors


def draws(text: str) -> int:
    return cli.positive(text) if int(text) else 0


def build_parser():
    p = curves.parser(__doc__, "spectral/connect.json")
    g = p.add_argument_group("what is connected")
    text = "another run of the base (its last checkpoint) or a checkpoint, as A; base for the base itself; "
    text += "default: the first of the study's runs, else base"
    g.add_argument("--other", nargs="+", metavar="RUN", help=text)
    text = "coefficients a besides 0 and 1, also beyond them (-0.25 1.25); default: the study's spectral.connect.at, "
    text += "else 0, .1, .. 1"
    g.add_argument("--at", nargs="+", type=coefficient, metavar="A", help=text)
    g.add_argument("--draws", type=draws, default=1, metavar="N", help="random directions, 0 for none; default 1")
    text = "measure nothing: write the model of one coefficient as a folder (0.5 half/)"
    g.add_argument("--write", nargs=2, metavar=("A", "FOLDER"), help=text)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    runs = [[run] for run in study.get("runs", {}).values()]
    named = args.other or next(iter(runs), ["base"])
    other = refs.run(named)[-1] if named != ["base"] else None
    how = "base" if other is None else "" if named in runs or not runs else "other"
    with curves.opened(args, "connect", how) as (study, output, of_base):
        for role, end in of_base.models.items():
            if other and surgery.identity(other) == surgery.identity(end):
                raise InputError(f"{other.spec} is the {role} itself, not another run of the base")
        opened = surgery.Pair(other, of_base.target_ref) if other else contextlib.nullcontext(of_base)
        with opened as pair:
            edits = everything(pair, study.get("run"))
            if args.write:
                curves.alone("writing a model folder", args)
                made = between(pair, edits, curves.number("--write", args.write[0], -1, 2))
                curves.write(pair, made, args.write[1], args, study)
                return
            at = study.value(args.at, "--at", "spectral.connect.at", AT)
            if not any(0 < a < 1 for a in at):
                raise InputError("--at needs a coefficient between 0 and 1, where a barrier could be")
            trial = curves.trial_of(args, study, of_base, {"other": other} if other else None)
            points = points_of(pair, edits, at, OTHER if other else curves.BASE, study.seed, args.draws)

            def summarised(records: list[dict]) -> dict:
                for ref in {of_base.target_ref, pair.base_ref} - {of_base.base_ref}:
                    updates.warn_if_not_one_run(of_base.base_ref, ref)
                apart = distances(pair, of_base)
                curves.warn_if_coarse(pair, apart["all"]["rounding"] or 0.0, "half of A - C, at every a between them")
                return summarise(records, points, study.seed) | {"distance": apart}

            facts = {"two_runs": other is not None, "draws": args.draws}
            curves.measure(trial, output, points, summarised, draw, facts, SCHEMA, say)


if __name__ == "__main__":
    cli.run(main)
