"""Does a straight line connect two runs of one base, or a base and its checkpoint, without loss on the way?

Every parameter is (1 - a) A + a C. The chord gap at a is by how much the score there is worse than the straight line
between the scores of A and C; the barrier is the largest gap between the ends (below 0 where all of the line is better
than the chord), also as a share of what the better end gained on the base. Close models connect whatever they learnt,
so it stands beside random directions [ours]: one from A and one from C, each tensor's as long as C - A, gone as far as
the point of the line is from that end.

In:   B, RUN and perhaps another run of B as A (--other); without it A is B.
Out:  OUT (default: the study's spectral/connect.json, without --other connect.base.json): points, gaps, barriers, gains,
      distance of A and C and cosine of their updates by layer; .pt (every sentence) and figure beside it.

A killed run goes on with the next model. On several GPUs: accelerate launch spectral/connect.py ...

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
        ends moved in random directions as far as the point of the line is from them: where that costs nothing, either,
        any two models so close are connected. Claim D6 is decided by the largest gap (barrier) between line and chord
        in a loss, as a share of what the better end gained on the base. Where the other run was trained on another
        language, an end may be worse than the base (dotted): then the chord is high, and a line below it says little.
        Bands are often narrower than the line.""",
}
LEAST = 0.1  # of the largest gain in a loss: less is no gain that a barrier is a share of
AT = tuple(i / 10 for i in range(11))
OTHER = Condition("other", {}, of="other")
SIDES = ("A", "C")  # the ends from which random directions go


# ---------------------------------------------------------------- the method


def mixed(base: torch.Tensor, target: torch.Tensor, a: float) -> torch.Tensor:
    """(1 - a) A + a C in float32; with A and C the other way round it is the same at 1 - a, bit for bit."""
    ends = updates.wide(base, target)
    return (round(1 - a, 12) * ends[0] + a * ends[1]).to(target.dtype)


@dataclass(frozen=True)
class Moved:
    """The end `side` ("A" or "C") of a tensor, moved in a random direction by `share` of the length of C - A."""

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
    """Edits of every tensor of the pair, embeddings, norms and head among them.

    Raises:
        InputError: different vocabularies, or a tensor that only one of the models has.
    """
    ends = pair.base_ref, pair.target_ref
    differ = tokenizer_id.diff_vocabularies(*ends, home)
    if differ:
        raise InputError(
            f"{ends[0].spec} and {ends[1].spec} have different vocabularies ({differ}): there is nothing between them"
        )
    names = [name for name in pair.target.names() if not (archs.is_buffer(name) or pair.arch.may_lack(name))]
    edits = [pair.edit(name, by_rows=True) for name in names]
    for name, why in pair.diff_tensors(surgery.Recipe("", {}, tuple(edits))).items():
        if pair.arch.may_lack(name):  # no model of the type uses it
            continue
        raise InputError(f"{ends[0].spec} and {ends[1].spec} are not of one form: {name} is {why}")
    return edits


def between(pair: surgery.Pair, edits: Sequence[surgery.Edit], a: float) -> surgery.Recipe:
    """(1 - a) A + a C of every tensor; at 0 A's values and at 1 C's as they are."""
    function = None if a == 0 else functools.partial(mixed, a=a)
    made = [] if a == 1 else [replace(edit, function=function) for edit in edits]
    return surgery.Recipe(f"{1 - a:g} of {pair.base_ref.spec}, {a:g} of itself", {"a": a}, tuple(made))


def aside(pair: surgery.Pair, edits, side: str, a: float, seed: int, draw: int) -> surgery.Recipe:
    """The end `side` moved in a random direction as far as the point `a` of the line is from it."""
    share = a if side == "A" else round(1 - a, 12)
    made = []
    for edit in edits:
        moved = Moved(side, share, updates.drawn_as(pair, edit.tensor), seed, draw)
        made.append(replace(edit, by_rows=False, function=moved))
    facts = {"side": side, "share": share, "seed": seed, "draw": draw}
    return surgery.Recipe(f"{side}, moved in a random direction", facts, tuple(made))


def points_of(pair: surgery.Pair, edits, at: Sequence[float], first: Condition, seed: int, draws: int) -> list:
    """The line from `first` (A as it is) to C, and of every draw both ends moved at all points between them."""
    swapper, found = in_memory.Swapper(pair, cache_bytes=0), []
    ends = {0: first, 1: curves.TARGET}
    for a in sorted({*at, 0, 1}):
        made = ends.get(a) or swapper.condition(f"line {a:g}", between(pair, edits, a))
        found.append(curves.Point("line", float(a), made))
    for draw in range(draws):
        for side in SIDES:
            for a in sorted(a for a in at if 0 < a < 1):
                made = swapper.condition(f"random from {side} {a:g} ({draw})", aside(pair, edits, side, a, seed, draw))
                found.append(curves.Point(f"random_{side}", a, made, draw))
    return found


# ---------------------------------------------------------------- what it says


def summarise(records: list[dict], points: Sequence, seed: int) -> dict:
    """Of every measure with units: `gap` of each point of the line and of the random ends, `barrier` and `random` with
    their shares of the `gain`, and `apart`: by how much the random barrier is higher.

    All are positive where the score is worse than the chord. Intervals: bootstrap over units, that of a barrier with
    its maximum in every resample, which noise makes larger: against the claim that there is none.
    """
    _, sets = curves.numbered(points)
    where = {(p.curve, p.at, p.draw): i for p, i in zip(points, sets, strict=True)}
    line = [a for curve, a, _ in where if curve == "line"]
    draws = sorted({draw for curve, _, draw in where if curve != "line"})
    inner = sorted({a for curve, a, _ in where if curve != "line"})
    rows = [{"at": a, "set": where["line", a, 0], "values": records[where["line", a, 0]]["values"]} for a in line]
    found: dict = {"points": rows, "measures": {}}
    for measure, score in curves.units(records).items():
        ends = [score[where["line", a, 0]] for a in (0.0, 1.0)]
        gaps = np.stack([(1 - a) * ends[0] + a * ends[1] - score[where["line", a, 0]] for a in line])
        moved = [
            np.mean([
                (1 - a) * (ends[0] - score[where["random_A", a, d]]) + a * (ends[1] - score[where["random_C", a, d]])
                for d in draws
            ], axis=0) for a in inner
        ]  # fmt: skip
        weights = stats.resample_weights(score.shape[1], seed, curves.DRAWS)
        better = max(ends, key=lambda end: end.mean())
        gain = _Drawn(better - score[0], weights)
        barrier = _barrier(line, gaps, weights)
        found["measures"][measure] = {
            "gap": [
                [a, *gap.ends()] for a, gap in ((a, _Drawn(row, weights)) for a, row in zip(line, gaps, strict=True))
            ],
            "gap_random": [[a, *_Drawn(row, weights).ends()] for a, row in zip(inner, moved, strict=True)],
            "gain": gain.row(),
            "barrier": barrier.row() | {"at": barrier.at, "share": barrier.share(gain)},
        }
        if moved:
            random = _barrier(inner, np.stack(moved), weights)
            own = {"random": random.row() | {"at": random.at, "share": random.share(gain)}}
            apart = random.value - barrier.value, random.drawn - barrier.drawn
            found["measures"][measure] |= own | {"apart": stats.with_interval(*apart)}
    losses = {name: row for name, row in found["measures"].items()
              if name.startswith("nll_per_byte") and row["barrier"]["share"]}  # fmt: skip
    # Of a gain that is next to nothing beside another's, a language's that both runs knew, any gap is a large share.
    most = max((row["gain"]["value"] for row in losses.values()), default=0)
    shares = {name: row["barrier"]["share"] for name, row in losses.items() if row["gain"]["value"] >= LEAST * most}
    worst = max(shares, key=lambda name: shares[name]["value"], default=None)
    return found | {"worst": {"measure": worst, **shares[worst]} if worst else None}


class _Drawn:
    """A mean over units, and in every resample."""

    at: float | None = None

    def __init__(self, units, weights):
        self.value, self.drawn = float(units.mean()), weights @ units / len(units)

    def row(self) -> dict:
        return stats.with_interval(self.value, self.drawn)

    def ends(self) -> tuple[float, float, float]:
        row = self.row()
        return row["value"], row["ci_low"], row["ci_high"]

    def share(self, gain: _Drawn) -> dict | None:
        """As a share of a gain, where that there is one is clear."""
        if gain.row()["ci_low"] <= 0:
            return None
        return stats.with_interval(self.value / gain.value, stats.shares(self.drawn, gain.drawn))


def _barrier(at: Sequence[float], gaps, weights) -> _Drawn:
    """The largest gap between 0 and 1, and where it is; below 0 where the whole line is better than the chord."""
    inside = [i for i, a in enumerate(at) if 0 < a < 1]
    drawn = weights @ gaps[inside].T / gaps.shape[1]
    highest = max(inside, key=lambda i: gaps[i].mean())
    found = _Drawn(gaps[highest], weights)
    found.at, found.drawn = at[highest], drawn.max(1)
    return found


def distances(pair: surgery.Pair, of_base: surgery.Pair) -> dict:
    """How far A and C are apart, and whether they went the same way: `distance` ||A - C|| / ||B|| and `cosine` of A - B
    and C - B (None where A is B), of each layer, of what is in none, and of all; `rounding`: the squared norm of what
    rounding to C's dtype does half-way, as a share of that of (A - C) / 2. What B has in another shape, or no
    model of the type uses, is left out. Read in blocks of rows, summed in float64.
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
        held = [values.rows_of(one) for one in held]
        for start, stop in tensors.chunks(len(held[0]), held[0][:1].numel() * 8, values.BLOCK):
            b, a, c = (one[start:stop].double().flatten() for one in held)
            half = (a + c) / 2
            off = half.to(held[2].dtype).double() - half
            each = (
                (c - a).dot(c - a),
                b.dot(b),
                (a - b).dot(c - b),
                (a - b).dot(a - b),
                (c - b).dot(c - b),
                off.dot(off),
            )
            for key in ("all", "outside" if layer is None else str(layer)):
                row = sums.setdefault(key, [0.0] * 6)
                sums[key] = [one + float(more) for one, more in zip(row, each, strict=True)]
    found = {}
    for key, (apart, base, product, one, other, off) in sums.items():
        cosine = product / math.sqrt(one * other) if one and other else None
        found[key] = {"distance": math.sqrt(apart / base) if base else None, "cosine": cosine}
        found[key]["rounding"] = 4 * off / apart if apart else None
    return found


def say(payload: dict) -> None:
    whole = payload["distance"]["all"]
    cosine = "" if whole["cosine"] is None else f", cosine of the updates {whole['cosine']:.3f}"
    cli.say(f"||A - C|| / ||B|| {whole['distance']:.4f}{cosine}")
    for name, row in payload["measures"].items():
        said = f"{evaluation.named(name).label}: barrier {stats.told(row['barrier'], '.4f')}"
        said += f" at a = {row['barrier']['at']:g}"
        if row["barrier"]["share"]:
            said += f", {row['barrier']['share']['value']:.1%} of the gain"
        if "random" in row:
            random = row["random"]
            said += f"; random directions {stats.told(random, '.4f')}"
            said += f", {random['share']['value']:.1%} of the gain" if random["share"] else ""
        cli.say(said)


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


coefficient.__name__ = "a number from -1 to 2"  # what argparse calls it in its error


def draws(text: str) -> int:
    return cli.positive(text) if int(text) else 0


def build_parser():
    p = curves.parser(__doc__, "spectral/connect.json")
    g = p.add_argument_group("what is connected")
    text = "another run of the base, or a checkpoint of one, as A, whose last is taken; base for the base itself; "
    text += "default: the first of the study's runs, else base"
    g.add_argument("--other", nargs="+", metavar="RUN", help=text)
    text = "coefficients a beside 0 and 1, outside of them too (-0.25 1.25); default: the study's spectral.connect.at, "
    text += "else 0, .1, .. 1"
    g.add_argument("--at", nargs="+", type=coefficient, metavar="A", help=text)
    g.add_argument("--draws", type=draws, default=1, metavar="N", help="of the random directions, 0: none; default 1")
    text = "write the model of that coefficient as a folder, and measure nothing (0.5 half/)"
    g.add_argument("--write", nargs=2, metavar=("A", "FOLDER"), help=text)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    runs = [[place] for place in study.get("runs", {}).values()]
    named = args.other or next(iter(runs), ["base"])
    other = refs.run(named)[-1] if named != ["base"] else None
    how = "base" if other is None else "" if named in runs or not runs else "other"
    with curves.opened(args, "connect", how) as (study, output, of_base):
        for role, end in of_base.models.items():
            if other and surgery.identity(other) == surgery.identity(end):
                raise InputError(f"{other.spec} is the {role} itself: it is no other run of the base")
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
                raise InputError("--at names no coefficient between 0 and 1, where a barrier could be")
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
