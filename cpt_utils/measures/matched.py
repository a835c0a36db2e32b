"""What a swap costs beside its depth and its seams: among sets of its shape, and in an additive fit over layers.

What an early layer does goes through all layers behind it, and a set in many pieces has many seams. So a set has a
place among sets of one shape, and a layer a cost of its own. `trial` measures the sets; scripts choose them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product

from cpt_utils.base import cli, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np
from cpt_utils.measures import controls, curves
from cpt_utils.measures.evaluation import DECIDING, named

SAME = ("size", "first", "last", "blocks")  # of the shapes of matched sets
NEAR = 0.5 + 1e-9  # layers between their mean depths, at most
TRIES = 100_000  # shapes with more sets than this are drawn from
TOO_FEW = "{} sets are too few for a fit of {} layers"
COLUMNS = 7  # of the fit of `beside_shape`
ENOUGH = 2 * COLUMNS  # sets, so that it says something


# --- which sets ---


def shape(layers: Iterable[int]) -> dict:
    """`size, first, last, mean_depth, blocks` of a set; blocks are runs of neighbouring layers."""
    layers = sorted(layers)
    if not layers:
        return {"size": 0, "first": None, "last": None, "mean_depth": None, "blocks": 0}
    mean, blocks = sum(layers) / len(layers), len(curves.blocks(layers))
    return {"size": len(layers), "first": layers[0], "last": layers[-1], "mean_depth": mean, "blocks": blocks}


def alike(one: Iterable[int], other: Iterable[int]) -> bool:
    """Whether two sets match: another set of the same size, first and last layer, blocks, and nearly the same depth."""
    if sorted(one) == sorted(other):
        return False
    a, b = shape(one), shape(other)
    return all(a[key] == b[key] for key in SAME) and abs(a["mean_depth"] - b["mean_depth"]) <= NEAR


def matched_sets(layers: Iterable[int], treatment: Iterable[int], limit: int, seed: int) -> list[list[int]]:
    """The sets of `layers` that match `treatment`, in order; of more than `limit` as many, drawn with `seed`.

    First and last layer fixed, a set is how its layers are cut into blocks, and those between into gaps. Where there
    are more than TRIES of these cuts, so many are drawn, until `limit` sets are found.
    """
    there, mine = set(layers), shape(treatment)
    size, blocks, gaps = mine["size"], mine["blocks"], mine["last"] - mine["first"] + 1 - mine["size"]
    if blocks < 2:
        return []  # without gaps first layer and size say all
    parts = (range(1, size), blocks - 1), (range(1, gaps), blocks - 2)
    draw, found = random.Random(seed), set()
    few = math.prod(math.comb(len(places), n) for places, n in parts) <= TRIES
    drawn = ([sorted(draw.sample(*part)) for part in parts] for _ in range(TRIES))
    for cuts in product(*(combinations(*part) for part in parts)) if few else drawn:
        ends = [0, *cuts[0], size]
        shifts = [mine["first"] + gap for gap in (0, *cuts[1], gaps)]
        chosen = [at + shift for (a, b), shift in zip(pairwise(ends), shifts, strict=True) for at in range(a, b)]
        if there.issuperset(chosen) and alike(chosen, treatment):
            found.add(tuple(chosen))
        if not few and len(found) == limit:
            break
    kept = sorted(found) if len(found) <= limit else sorted(draw.sample(sorted(found), limit))
    return [list(one) for one in kept]


def nearest(layers: Sequence[int], treatment: Iterable[int], seed: int) -> list[int]:
    """Another set of the size of `treatment` and as near to its shape as any; of several one drawn with `seed`.

    Of those that share most of first layer, last layer and number of blocks with it, the nearest in mean depth.

    Raises:
        InputError: there is no other set of that size.
    """
    treatment, wanted = sorted(set(treatment)), shape(treatment)
    if len(treatment) in (0, len(layers)):
        raise InputError(f"there is no other set of {len(treatment)} of {len(layers)} layers")
    draw = random.Random(seed)
    few = math.comb(len(layers), len(treatment)) <= TRIES
    drawn = (sorted(draw.sample(layers, len(treatment))) for _ in range(TRIES))
    others = [one for one in (combinations(layers, len(treatment)) if few else drawn) if list(one) != treatment]

    def distance(one: Sequence[int]) -> tuple[int, float]:
        found = shape(one)
        return sum(found[key] != wanted[key] for key in SAME), abs(found["mean_depth"] - wanted["mean_depth"])

    least = min(map(distance, others))
    return list(draw.choice([one for one in others if distance(one) == least]))


def to_add(
    treatments: Sequence[tuple[str | None, Sequence[int]]], having: dict[str | None, Iterable[int]],
    measured: Iterable[tuple[str | None, Sequence[int]]], seed: int,
) -> list[tuple[str | None, list[int]]]:  # fmt: skip
    """Matched sets of the treatments that are not among those `measured`, all as (component, layers); says how many.

    They are `controls.SMALL` at most.

    Args:
        having: the layers that have each component.
    """
    known = {(component, tuple(sorted(layers))) for component, layers in measured}
    found: dict[tuple, None] = {}
    for component, layers in treatments:
        sets = matched_sets(having[component], layers, controls.SMALL // len(treatments), seed)
        found |= dict.fromkeys((component, tuple(one)) for one in sets)
    added = [(component, list(layers)) for component, layers in found if (component, layers) not in known]
    if added:
        cli.say(
            f"{len(added)} of {len(found)} sets of the treatments' shape (size, first and last layer, blocks, depth) "
            "are not among the random ones: they are measured beside them"
        )
    return added


# --- what they say ---


@dataclass(frozen=True)
class Costs:
    """What each of some sets costs in one measure: `values` [sets], `units` [sets, units] or None; more is worse."""

    values: np.ndarray
    units: np.ndarray | None
    seed: int

    @classmethod
    def of(cls, rows: list[dict], target: dict, name: str, seed: int) -> Costs:
        sign = 1 if named(name).higher_is_better else -1
        units = None
        if name in target["units"]:
            units = sign * (np.asarray(target["units"][name]) - np.asarray([row["units"][name] for row in rows]))
        return cls(sign * (target["values"][name] - np.asarray([row["values"][name] for row in rows])), units, seed)

    def sum(self, weights: np.ndarray) -> dict:
        """Their weighted sum, with a bootstrap interval over units: `value, ci_low, ci_high`."""
        low = high = None
        if self.units is not None:
            low, high = stats.bootstrap_mean(weights @ self.units, self.seed)
        return {"value": float(weights @ self.values), "ci_low": low, "ci_high": high}


class Additive:
    """Least squares of the cost of sets of one size on which layers they hold: cost = sum of its layers' costs.

    Without an intercept, because the checkpoint itself costs nothing; sets of one size do not tell it from the layers
    anyway, and what is said of differences between layers is the same with any.

    Attributes:
        rows: the sets; layers: those that any of them holds.
        effect [layers, sets]: from the costs of sets to those of layers.
        why: why there is no fit; None where there is.
    """

    def __init__(self, rows: list[dict]):
        self.rows, self.layers = rows, sorted({layer for row in rows for layer in row["layers"]})
        self.holds = np.array([[layer in row["layers"] for layer in self.layers] for row in rows], dtype=np.float64)
        self.effect = _solved(self.holds)
        self.why = None if self.effect is not None else TOO_FEW.format(len(rows), len(self.layers))

    def contrast(self, treatment: Iterable[int]) -> np.ndarray | None:
        """Weights of the sets: mean cost of the treatment's layers minus that of the others, a layer."""
        inside = np.array([[1, layer in treatment] for layer in self.layers], dtype=np.float64)
        found = None if self.effect is None else _solved(inside, exact=True)
        return None if found is None else found[-1] @ self.effect

    def facts(self, costs: Costs, treatments: dict[str, Iterable[int]], n_layers: int) -> dict:
        """What a result says of one measure."""
        found = {"intercept": 0.0, "per_layer": [None] * n_layers, "r2": None, "n_sets": len(self.rows)}
        keys = ("contrast", "contrast_ci", "contrast_adjusted", "contrast_adjusted_ci")
        found |= {key: {} for key in keys} | ({"why": self.why} if self.why else {})
        if not self.why:
            per_layer = self.effect @ costs.values
            for layer, cost in zip(self.layers, per_layer, strict=True):
                found["per_layer"][layer] = float(cost)
            spread = float(((costs.values - costs.values.mean()) ** 2).sum())
            left = float(((costs.values - self.holds @ per_layer) ** 2).sum())
            found["r2"] = 1 - left / spread if spread > 1e-18 else None
        sets = [row["layers"] for row in self.rows]
        for name, layers in treatments.items():
            adjusted = beside_shape(sets, layers, n_layers)
            for key, weights in (("contrast", self.contrast(layers)), ("contrast_adjusted", adjusted)):
                known = isinstance(weights, np.ndarray)
                row = costs.sum(weights) if known else {"value": None, "ci_low": None, "ci_high": None}
                found[key][name], found[f"{key}_ci"][name] = row["value"], [row["ci_low"], row["ci_high"]]
        return found


def _solved(design: np.ndarray, exact: bool = False) -> np.ndarray | None:
    """[columns, rows]: from values of the rows to least-squares coefficients; None where they are not determined, or,
    if not `exact`, where nothing is left to tell how well they fit.
    """
    rows, columns = design.shape
    few = rows < columns + (not exact) or np.linalg.matrix_rank(design) < columns
    return None if few else np.linalg.pinv(design)


def depth_and_seams(layers: Iterable[int], n_layers: int) -> list[float]:
    """What of a set of layers is not which layers they are: blocks, whether it holds the first layer and the last (all
    three together: how many seams there are between base and checkpoint), and the means of depth and of its square,
    since the cost of depth may well be a bow; before them 1.
    """
    layers, found = sorted(layers), shape(layers)
    depths = [layer / max(n_layers - 1, 1) - 0.5 for layer in layers]
    means = [sum(depth**power for depth in depths) / len(layers) for power in (1, 2)]
    return [1, found["blocks"], 0 in layers, n_layers - 1 in layers, *means]


def beside_shape(sets: Sequence[Iterable[int]], treatment: Iterable[int], n_layers: int) -> np.ndarray | str:
    """Weights [sets] by which sets of one size say what the layers of `treatment` cost beside depth and seams: a set of
    nothing else minus a set without them, by least squares; or why they cannot say it.
    """
    if len(sets) < ENOUGH:
        return f"{len(sets)} sets are too few for the fit: {ENOUGH}"
    design = [[*depth_and_seams(layers, n_layers), len({*layers} & {*treatment}) / len(layers)] for layers in sets]
    if np.linalg.matrix_rank(design) < COLUMNS:
        return "depth and seams alone say which layers a set holds"
    return np.linalg.pinv(design)[-1]


def sets_of(records: list[dict], component: str | None, size: int) -> list[dict]:
    """The records of sets of a component and size, each set once; a named one goes before a random one."""
    kept: dict[tuple, dict] = {}
    for record in records:
        if len(record["layers"]) == size and record.get("component") == component:
            kept.setdefault(tuple(sorted(record["layers"])), record)
    return list(kept.values())


def statistics(records: list[dict], treatment: str, n_layers: int, seed: int) -> dict:
    """`matched` and `additive` of a result.

    `matched`: of each named set of a component that has random ones, its place among sets of its shape. `additive`: of
    each measure the fit over all sets of the component and size of `treatment`, see `Additive`.
    """
    target = next(record for record in records if record["name"] == "target")
    mine = next(record for record in records if record["name"] == treatment)
    drawn = {record.get("component") for record in records if record["name"] == "random"}
    named = [
        record for record in records
        if record["layers"] and record["name"] not in controls.UNNAMED and record.get("component") in drawn
    ]  # fmt: skip
    found: dict = {"matched": {}, "additive": {}}
    for record in named:
        rows = sets_of(records, record.get("component"), len(record["layers"]))
        made = _among_matched(record, rows, target, seed)
        found["matched"] |= dict.fromkeys((record["name"], *record.get("also", ())), made)
    fit = Additive(sets_of(records, mine.get("component"), len(mine["layers"])))
    treatments = {
        name: record["layers"] for record in named if record.get("component") == mine.get("component")
        for name in (record["name"], *record.get("also", ()))
    }  # fmt: skip
    for name in mine["values"]:
        found["additive"][name] = fit.facts(Costs.of(fit.rows, target, name, seed), treatments, n_layers)
    return found


def _among_matched(record: dict, rows: list[dict], target: dict, seed: int) -> dict:
    """Of each measure the place of a set among those of `rows` that match it, and how they lie to it."""
    layers = record["layers"]
    is_matched = np.array([alike(row["layers"], layers) for row in rows])
    others = [row for row, match in zip(rows, is_matched, strict=True) if match]
    depth = shape(layers)["mean_depth"]
    found: dict = {"layers": [row["layers"] for row in others], "depth_difference": None}
    if others:
        found["depth_difference"] = depth - sum(shape(row["layers"])["mean_depth"] for row in others) / len(others)
    own = np.array([sorted(row["layers"]) == sorted(layers) for row in rows], dtype=np.float64)
    for name, value in record["values"].items():
        row = {"own": value, "matched_mean": None, "own_minus_matched": None, "ci_low": None, "ci_high": None}
        row |= {"rank": None, "n_matched": len(others), "p_value": None, "p_worse": None}
        found[name] = row
        if not others:
            row["why"] = "no other set of this size was measured that has first and last layer, blocks and depth alike"
            continue
        measure, costs = named(name), Costs.of(rows, target, name, seed)
        place = controls.rank_among_random(value, [other["values"][name] for other in others], measure.higher_is_better)
        row |= {key: place[key] for key in ("rank", "n_equal", "p_value", "p_worse")}
        row |= {"matched_mean": place["random_mean"], "own_minus_matched": place["own_minus_random"]}
        sign = -1 if measure.higher_is_better else 1  # from costs back to values
        difference = costs.sum(sign * (own - is_matched / len(others)))
        row |= {key: difference[key] for key in ("ci_low", "ci_high")}
    return found


def say(found: dict, treatment: str | None, passed: dict | None) -> None:
    """Print what matched sets and the additive fit say of `treatment`, a line each of the measures that decide.

    Nothing without a treatment, or where its layers did not pass the gate (`passed`).
    """
    if not treatment or (passed and not passed["passed"]):
        return
    among = found["matched"][treatment]
    for name in (name for name in DECIDING if name in among):
        row, fit, label = among[name], found["additive"][name], named(name).label
        if row["n_matched"]:
            told = f"difference {stats.told(row, '+.4f', 'own_minus_matched')}"
            told += f", rank {row['rank']} of {row['n_matched'] + 1} among sets of its shape"
        else:
            told = "no other set has its shape"
        if fit["contrast"].get(treatment) is not None:
            low, high = fit["contrast_ci"][treatment]
            told += f"; its layers cost {fit['contrast'][treatment]:+.4f} [{low:+.4f}, {high:+.4f}] more each than the "
            told += "others" + (f" (additive fit, R² {fit['r2']:.2f})" if fit["r2"] is not None else "")
        cli.say(f"{label}: {told}")
