"""The share of CPT's gain that a model with some blocks of the base keeps, and where in the stack the gain lies.

R(K) = (s(K) - s(B)) / (s(C) - s(B)): 0 is as good as the base, 1 as the checkpoint, not clipped. It is undefined if the
interval of s(C) - s(B) includes 0. Intervals: bootstrap over sentences, with the same resamples for all models and both
functions, so differences stay paired.
"""

from __future__ import annotations

import itertools

from cpt_utils.base import stats
from cpt_utils.base.lazy import np

DRAWS = 2000
# Measure -> whether more is better. "saved": the reduction of the loss by the correct source instead of another one.
MEASURES = {
    "perception": False, "production": False, "perception_shuffled": False, "production_shuffled": False,
    "perception_saved": True, "production_saved": True, "nll_target": False, "nll_base": False,
    "retrieval_readout": True, "task_accuracy": True, "chrf_perception": True, "chrf_production": True,
    "language_perception": True, "language_production": True,
}  # fmt: skip
FUNCTIONS = ("perception", "production")


class Retention:
    """R of every model for one measure.

    Args:
        units: [models, sentences]; `base` and `target` are the rows of B and C.

    Attributes:
        gain: `value, ci_low, ci_high` of s(C) - s(B), positive is better.
        r, drawn: R [models], and in every resample [draws, models] with NaN in resamples without a gain; None if R is
            undefined.
    """

    def __init__(self, units, base: int, target: int, higher_is_better: bool, seed: int):
        units = (1 if higher_is_better else -1) * np.asarray(units, dtype=np.float64)
        weights = stats.resample_weights(units.shape[1], seed, DRAWS)
        means, drawn = units.mean(1), weights @ units.T / units.shape[1]
        self.gain = stats.with_interval(means[target] - means[base], drawn[:, target] - drawn[:, base])
        self.r = self.drawn = None
        if self.gain["ci_low"] > 0 or self.gain["ci_high"] < 0:
            self.r = (means - means[base]) / (means[target] - means[base])
            self.drawn = stats.shares(drawn - drawn[:, [base]], drawn[:, [target]] - drawn[:, [base]])

    def at(self, rows: list[list[int]]) -> list[list]:
        """[[k, R or None], ..] for the points [[k, model], ..] of a sweep."""
        return [[k, None if self.r is None else float(self.r[model])] for k, model in rows]

    def intervals(self, rows: list[list[int]]) -> list[list]:
        """[[k, low, high], ..] for the same points; [] if R is undefined."""
        if self.drawn is None:
            return []
        ends = stats.interval(self.drawn[:, [model for _, model in rows]], axis=0).T
        return [[k, *map(float, pair)] for (k, _), pair in zip(rows, ends, strict=True)]


def floor(units: dict[str, list[float]], seed: int) -> dict[str, dict]:
    """The reduction of the loss by the correct source, by function, from the units of one model; {} if not measured."""
    by_function = {}
    for name in FUNCTIONS if "perception_saved" in units else ():
        saved = np.asarray(units[f"{name}_saved"])
        weights = stats.resample_weights(len(saved), seed, DRAWS)
        by_function[name] = stats.with_interval(saved.mean(), weights @ saved / len(saved))
    return by_function


def area(rows: list[list[int]], r):
    """The mean of R over k / N by the trapezoidal rule: `r` [.., models] along the points [[k, model], ..]."""
    ks = [k for k, _ in rows]
    return np.trapezoid(r[..., [model for _, model in rows]], ks) / (ks[-1] - ks[0])


def asymmetry(found: Retention, sides: tuple[list, list], draws: bool = False):
    """A = AUC_in - AUC_out, or its value in every resample; above 0 the gain comes with the blocks at the input."""
    r = found.drawn if draws else found.r
    return area(sides[0], r) - area(sides[1], r)


def summary(found: Retention, sides: tuple[list, list] | None, n: int) -> dict:
    """Gain, depth at half, areas, A, the gain of each block from both sides, and the cost of cuts.

    `cuts` [[k, x], ..]: R of the first k blocks alone plus R of the others alone, minus R of all and R of none. It is 0
    if blocks add up; below 0 the two parts need each other, which is damage at the cut and does not locate a function.

    Args:
        sides: points of insert_in and insert_out; None if they, or all points between their ends, were not measured.
    """
    keys = ("auc_in", "auc_out", "depth_at_half_in", "depth_at_half_out", "A", "marginal_in", "marginal_out", "cuts")
    out = {"gain": found.gain} | dict.fromkeys(keys)
    if found.r is None or sides is None:
        return out
    for side, rows in zip(("in", "out"), sides, strict=True):
        curve = found.at(rows)
        out[f"auc_{side}"] = float(area(rows, found.r))
        out[f"depth_at_half_{side}"] = next((k for k, r in curve if r >= 0.5), None)
        pairs = itertools.pairwise(curve)
        out[f"marginal_{side}"] = [[k, (after - r) / (later - k)] for (k, r), (later, after) in pairs]
    out["A"] = stats.with_interval(asymmetry(found, sides), asymmetry(found, sides, draws=True))
    rest, none, whole = dict(map(tuple, found.at(sides[1]))), found.r[sides[0][0][1]], found.r[sides[0][-1][1]]
    out["cuts"] = [[k, r + rest[n - k] - float(whole + none)] for k, r in found.at(sides[0])]
    return out


def specialisation(
    kept: dict[str, Retention], sides: tuple[list, list] | None, floor: dict[str, dict], suffix: str = ""
) -> dict:
    """A(perception) - A(production) with its interval; above 0 perception comes early and production late.

    `value` is None, with the reason in `why`, if the checkpoint does not translate in context (by `floor`), if CPT did
    not clearly improve both, or if a sweep is missing.
    """
    unaided = [name for name in FUNCTIONS if name in floor and not floor[name]["ci_low"] > 0]
    worse = [name for name in FUNCTIONS if name in floor and not kept[name + suffix].gain["ci_low"] > 0]
    if not floor:
        why = "translation in context was not measured"
    elif unaided:
        better = "with the correct source is not clearly better than with another sentence's"
        why = f"the checkpoint does not translate in context: its {unaided[0]} {better}"
    elif worse:
        lost = kept[worse[0] + suffix].gain["ci_high"] < 0
        why = f"CPT made {worse[0]} worse" if lost else f"it is not clear that CPT gained anything in {worse[0]}"
    elif sides is None:
        why = "it needs the sweeps insert_in and insert_out, with points between their ends"
    else:
        both = [kept[name + suffix] for name in FUNCTIONS]
        perception, production = (asymmetry(each, sides) for each in both)
        drawn = [asymmetry(each, sides, draws=True) for each in both]
        return stats.with_interval(perception - production, drawn[0] - drawn[1]) | {"why": None}
    return {"value": None, "ci_low": None, "ci_high": None, "why": why}
