"""What a swap costs apart from its depth and its seams: its rank among sets of the same shape, and an additive fit.

The output of an early layer passes through all later ones, and a set in many pieces has many seams. So sets are ranked
among sets of one shape, and a fit gives each layer its own cost. `trial` measures the sets; scripts choose them.
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

SAME = ("size", "first", "last", "blocks")  # equal in the shapes of matched sets
NEAR = 0.5 + 1e-9  # largest difference of their mean depths, in layers
TRIES = 100_000  # if there are more candidate sets than this, so many are drawn
TOO_FEW = "{} sets are too few for a fit of {} layers"
COLUMNS = 7  # of the design matrix in `beside_shape`
ENOUGH = 2 * COLUMNS  # smallest number of sets for that fit


# --- which sets ---


def shape(layers: Iterable[int]) -> dict:
    """`size, first, last, mean_depth, blocks` of a set; blocks are runs of consecutive layers."""
    layers = sorted(layers)
    if not layers:
        return {"size": 0, "first": None, "last": None, "mean_depth": None, "blocks": 0}
    mean, blocks = sum(layers) / len(layers), len(curves.blocks(layers))
    return {"size": len(layers), "first": layers[0], "last": layers[-1], "mean_depth": mean, "blocks": blocks}


def alike(one: Iterable[int], other: Iterable[int]) -> bool:
    """Whether two different sets match: same size, first and last layer and number of blocks, nearly the same depth."""
    if sorted(one) == sorted(other):
        return False
    a, b = shape(one), shape(other)
    return all(a[key] == b[key] for key in SAME) and abs(a["mean_depth"] - b["mean_depth"]) <= NEAR


def matched_sets(layers: Iterable[int], treatment: Iterable[int], limit: int, seed: int) -> list[list[int]]:
    """The sets of `layers` that match `treatment`, in order; if there are more than `limit`, a draw of `limit` of them.

    Given first and last layer, a set is determined by how its layers are cut into blocks and the others into gaps. If
    there are more than TRIES such cuts, up to TRIES are drawn, until `limit` sets are found.
    """
    available, given = set(layers), shape(treatment)
    size, blocks, gaps = given["size"], given["blocks"], given["last"] - given["first"] + 1 - given["size"]
    if blocks < 2:
        return []  # without gaps, first layer and size determine the set
    parts = (range(1, size), blocks - 1), (range(1, gaps), blocks - 2)
    rng, sets = random.Random(seed), set()
    few = math.prod(math.comb(len(places), n) for places, n in parts) <= TRIES
    drawn = ([sorted(rng.sample(*part)) for part in parts] for _ in range(TRIES))
    for cuts in product(*(combinations(*part) for part in parts)) if few else drawn:
        ends = [0, *cuts[0], size]
        shifts = [given["first"] + gap for gap in (0, *cuts[1], gaps)]
        chosen = [i + shift for (a, b), shift in zip(pairwise(ends), shifts, strict=True) for i in range(a, b)]
        if available.issuperset(chosen) and alike(chosen, treatment):
            sets.add(tuple(chosen))
        if not few and len(sets) == limit:
            break
    kept = sorted(sets) if len(sets) <= limit else sorted(rng.sample(sorted(sets), limit))
    return [list(one) for one in kept]


def nearest(layers: Sequence[int], treatment: Iterable[int], seed: int) -> list[int]:
    """Another set of the size of `treatment` with the most similar shape; ties are drawn with `seed`.

    It shares as many of first layer, last layer and number of blocks as possible; among such sets, it is the nearest in
    mean depth.

    Raises:
        InputError: there is no other set of that size.
    """
    treatment, wanted = sorted(set(treatment)), shape(treatment)
    if len(treatment) in (0, len(layers)):
        raise InputError(f"there is no other set of {len(treatment)} of {len(layers)} layers")
    rng = random.Random(seed)
    few = math.comb(len(layers), len(treatment)) <= TRIES
    drawn = (sorted(rng.sample(layers, len(treatment))) for _ in range(TRIES))
    others = [one for one in (combinations(layers, len(treatment)) if few else drawn) if list(one) != treatment]

    def distance(one: Sequence[int]) -> tuple[int, float]:
        candidate = shape(one)
        return sum(candidate[key] != wanted[key] for key in SAME), abs(candidate["mean_depth"] - wanted["mean_depth"])

    least = min(map(distance, others))
    return list(rng.choice([one for one in others if distance(one) == least]))


def to_add(
    treatments: Sequence[tuple[str | None, Sequence[int]]], having: dict[str | None, Iterable[int]],
    measured: Iterable[tuple[str | None, Sequence[int]]], seed: int,
) -> list[tuple[str | None, list[int]]]:  # fmt: skip
    """Matched sets of the treatments that are not `measured` yet, all as (component, layers); prints how many.

    There are at most `controls.SMALL` of them.

    Args:
        having: the layers that have each component.
    """
    known = {(component, tuple(sorted(layers))) for component, layers in measured}
    unique: dict[tuple, None] = {}
    for component, layers in treatments:
        sets = matched_sets(having[component], layers, controls.SMALL // len(treatments), seed)
        unique |= dict.fromkeys((component, tuple(one)) for one in sets)
    added = [(component, list(layers)) for component, layers in unique if (component, layers) not in known]
    if added:
        cli.say(
            f"{len(added)} of {len(unique)} sets of the treatments' shape (size, first and last layer, blocks, depth) "
            "are not among the random ones: they are measured in addition"
        )
    return added


# --- statistics ---


@dataclass(frozen=True)
class Costs:
    """The costs of some sets in one measure: `values` [sets], `units` [sets, units] or None; more is worse."""

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
        """The weighted sum of the costs, with a bootstrap interval over units: `value, ci_low, ci_high`."""
        low = high = None
        if self.units is not None:
            low, high = stats.bootstrap_mean(weights @ self.units, self.seed)
        return {"value": float(weights @ self.values), "ci_low": low, "ci_high": high}


class Additive:
    """Least-squares fit to the costs of sets of one size: cost of a set = sum of the costs of its layers.

    There is no intercept, because the checkpoint itself costs nothing; sets of one size could not separate it from the
    layers anyway, and it would not change the differences between layers.

    Attributes:
        rows: the sets; layers: those that any of them holds.
        effect [layers, sets]: maps the costs of sets to those of layers.
        why: why there is no fit; None if there is one.
    """

    def __init__(self, rows: list[dict]):
        self.rows, self.layers = rows, sorted({layer for row in rows for layer in row["layers"]})
        self.holds = np.array([[layer in row["layers"] for layer in self.layers] for row in rows], dtype=np.float64)
        self.effect = _solved(self.holds)
        self.why = None if self.effect is not None else TOO_FEW.format(len(rows), len(self.layers))

    def contrast(self, treatment: Iterable[int]) -> np.ndarray | None:
        """Weights of the sets for the mean cost per layer of the treatment's layers minus that of the others."""
        inside = np.array([[1, layer in treatment] for layer in self.layers], dtype=np.float64)
        effects = None if self.effect is None else _solved(inside, exact=True)
        return None if effects is None else effects[-1] @ self.effect

    def facts(self, costs: Costs, treatments: dict[str, Iterable[int]], n_layers: int) -> dict:
        """The entry of a result for one measure."""
        result = {"intercept": 0.0, "per_layer": [None] * n_layers, "r2": None, "n_sets": len(self.rows)}
        keys = ("contrast", "contrast_ci", "contrast_adjusted", "contrast_adjusted_ci")
        result |= {key: {} for key in keys} | ({"why": self.why} if self.why else {})
        if not self.why:
            per_layer = self.effect @ costs.values
            for layer, cost in zip(self.layers, per_layer, strict=True):
                result["per_layer"][layer] = float(cost)
            spread = float(((costs.values - costs.values.mean()) ** 2).sum())
            unexplained = float(((costs.values - self.holds @ per_layer) ** 2).sum())
            result["r2"] = 1 - unexplained / spread if spread > 1e-18 else None
        sets = [row["layers"] for row in self.rows]
        for name, layers in treatments.items():
            adjusted = beside_shape(sets, layers, n_layers)
            for key, weights in (("contrast", self.contrast(layers)), ("contrast_adjusted", adjusted)):
                known = isinstance(weights, np.ndarray)
                row = costs.sum(weights) if known else {"value": None, "ci_low": None, "ci_high": None}
                result[key][name], result[f"{key}_ci"][name] = row["value"], [row["ci_low"], row["ci_high"]]
        return result


def _solved(design: np.ndarray, exact: bool = False) -> np.ndarray | None:
    """[columns, rows]: maps values of the rows to least-squares coefficients; None if these are not determined or,
    unless `exact`, if no degree of freedom is left to judge the fit.
    """
    rows, columns = design.shape
    few = rows < columns + (not exact) or np.linalg.matrix_rank(design) < columns
    return None if few else np.linalg.pinv(design)


def depth_and_seams(layers: Iterable[int], n_layers: int) -> list[float]:
    """Covariates of a set of layers: 1, the number of blocks, whether it holds the first layer and the last (these
    three determine the number of seams between base and checkpoint), and the means of depth and squared depth, since
    the cost may depend on depth in a curve.
    """
    layers, set_shape = sorted(layers), shape(layers)
    depths = [layer / max(n_layers - 1, 1) - 0.5 for layer in layers]
    means = [sum(depth**power for depth in depths) / len(layers) for power in (1, 2)]
    return [1, set_shape["blocks"], 0 in layers, n_layers - 1 in layers, *means]


def beside_shape(sets: Sequence[Iterable[int]], treatment: Iterable[int], n_layers: int) -> np.ndarray | str:
    """Weights [sets] for the cost of the layers of `treatment` beyond depth and seams, from sets of one size: a set of
    only these layers minus a set without them, by least squares. A text, the reason, if it cannot be estimated.
    """
    if len(sets) < ENOUGH:
        return f"{len(sets)} sets are too few for the fit: {ENOUGH}"
    design = [[*depth_and_seams(layers, n_layers), len({*layers} & {*treatment}) / len(layers)] for layers in sets]
    if np.linalg.matrix_rank(design) < COLUMNS:
        return "depth and seams alone determine which layers a set holds"
    return np.linalg.pinv(design)[-1]


def sets_of(records: list[dict], component: str | None, size: int) -> list[dict]:
    """The records of sets of a component and size, each set once: its first record (named ones precede random ones)."""
    kept: dict[tuple, dict] = {}
    for record in records:
        if len(record["layers"]) == size and record.get("component") == component:
            kept.setdefault(tuple(sorted(record["layers"])), record)
    return list(kept.values())


def statistics(records: list[dict], treatment: str, n_layers: int, seed: int) -> dict:
    """`matched` and `additive` of a result.

    `matched`: the rank of each named set among sets of its shape, for components that have random sets. `additive`: for
    each measure the fit over all sets of the component and size of `treatment`, see `Additive`.
    """
    target = next(record for record in records if record["name"] == "target")
    treated = next(record for record in records if record["name"] == treatment)
    random_components = {record.get("component") for record in records if record["name"] == "random"}
    named_records = [
        record for record in records
        if record["layers"] and record["name"] not in controls.UNNAMED and record.get("component") in random_components
    ]  # fmt: skip
    result: dict = {"matched": {}, "additive": {}}
    for record in named_records:
        rows = sets_of(records, record.get("component"), len(record["layers"]))
        among = _among_matched(record, rows, target, seed)
        result["matched"] |= dict.fromkeys((record["name"], *record.get("also", ())), among)
    fit = Additive(sets_of(records, treated.get("component"), len(treated["layers"])))
    treatments = {
        name: record["layers"] for record in named_records if record.get("component") == treated.get("component")
        for name in (record["name"], *record.get("also", ()))
    }  # fmt: skip
    for name in treated["values"]:
        result["additive"][name] = fit.facts(Costs.of(fit.rows, target, name, seed), treatments, n_layers)
    return result


def _among_matched(record: dict, rows: list[dict], target: dict, seed: int) -> dict:
    """For each measure the rank of a set among the `rows` that match it, and its difference from their mean."""
    layers = record["layers"]
    is_matched = np.array([alike(row["layers"], layers) for row in rows])
    others = [row for row, match in zip(rows, is_matched, strict=True) if match]
    depth = shape(layers)["mean_depth"]
    result: dict = {"layers": [row["layers"] for row in others], "depth_difference": None}
    if others:
        result["depth_difference"] = depth - sum(shape(row["layers"])["mean_depth"] for row in others) / len(others)
    is_own = np.array([sorted(row["layers"]) == sorted(layers) for row in rows], dtype=np.float64)
    for name, value in record["values"].items():
        row = {"own": value, "matched_mean": None, "own_minus_matched": None, "ci_low": None, "ci_high": None}
        row |= {"rank": None, "n_matched": len(others), "p_value": None, "p_worse": None}
        result[name] = row
        if not others:
            row["why"] = "no other set of this size with the same first and last layer, blocks and depth was measured"
            continue
        measure, costs = named(name), Costs.of(rows, target, name, seed)
        ranks = controls.rank_among_random(value, [other["values"][name] for other in others], measure.higher_is_better)
        row |= {key: ranks[key] for key in ("rank", "n_equal", "p_value", "p_worse")}
        row |= {"matched_mean": ranks["random_mean"], "own_minus_matched": ranks["own_minus_random"]}
        sign = -1 if measure.higher_is_better else 1  # from costs back to values
        difference = costs.sum(sign * (is_own - is_matched / len(others)))
        row |= {key: difference[key] for key in ("ci_low", "ci_high")}
    return result


def say(found: dict, treatment: str | None, passed: dict | None) -> None:
    """Print what matched sets and the additive fit say about `treatment`, one line for each deciding measure.

    Nothing is printed without a treatment, or if its layers did not pass the gate (`passed`).
    """
    if not treatment or (passed and not passed["passed"]):
        return
    among = found["matched"][treatment]
    for name in (name for name in DECIDING if name in among):
        row, fit, label = among[name], found["additive"][name], named(name).label
        if row["n_matched"]:
            text = f"difference {stats.told(row, '+.4f', 'own_minus_matched')}"
            text += f", rank {row['rank']} of {row['n_matched'] + 1} among sets of its shape"
        else:
            text = "no other set has its shape"
        if fit["contrast"].get(treatment) is not None:
            low, high = fit["contrast_ci"][treatment]
            text += f"; its layers cost {fit['contrast'][treatment]:+.4f} [{low:+.4f}, {high:+.4f}] more each than the "
            text += "others" + (f" (additive fit, R² {fit['r2']:.2f})" if fit["r2"] is not None else "")
        cli.say(f"{label}: {text}")
