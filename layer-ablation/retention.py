"""What of the gain of CPT a model with some blocks of the base keeps, and where in the stack the gain lies.

R(K) = (s(K) - s(B)) / (s(C) - s(B)): 0 is as good as the base, 1 as the checkpoint, not clipped. It is undefined where
the interval of s(C) - s(B) includes 0. Intervals: bootstrap over sentences, one resample for all models and for both
functions, so that differences keep their pairing.
"""

from __future__ import annotations

import itertools

from cpt_utils.base import stats
from cpt_utils.base.lazy import np

DRAWS = 2000
# Measure -> more is better. "saved": what the own source saves against another sentence's.
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
        gain: `value, ci_low, ci_high` of s(C) - s(B), more being better.
        r, drawn: R [models], and in every resample [draws, models], NaN in one without a gain; None where R is
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
        """[[k, R or None], ..] of the points [[k, model], ..] of a sweep."""
        return [[k, None if self.r is None else float(self.r[model])] for k, model in rows]

    def intervals(self, rows: list[list[int]]) -> list[list]:
        """[[k, low, high], ..] of the same points; [] where R is undefined."""
        if self.drawn is None:
            return []
        ends = stats.interval(self.drawn[:, [model for _, model in rows]], axis=0).T
        return [[k, *map(float, pair)] for (k, _), pair in zip(rows, ends, strict=True)]


def floor(units: dict[str, list[float]], seed: int) -> dict[str, dict]:
    """What the own source saves against another sentence's, by function, from the units of one model; {} without."""
    found = {}
    for name in FUNCTIONS if "perception_saved" in units else ():
        saved = np.asarray(units[f"{name}_saved"])
        weights = stats.resample_weights(len(saved), seed, DRAWS)
        found[name] = stats.with_interval(saved.mean(), weights @ saved / len(saved))
    return found


def area(rows: list[list[int]], r):
    """The mean of R over k / N by the trapezoid, of `r` [.., models] along the points [[k, model], ..]."""
    ks = [k for k, _ in rows]
    return np.trapezoid(r[..., [model for _, model in rows]], ks) / (ks[-1] - ks[0])


def asymmetry(found: Retention, sides: tuple[list, list], draws: bool = False):
    """A = AUC_in - AUC_out, or in every resample; above 0 the gain comes with the blocks at the input."""
    r = found.drawn if draws else found.r
    return area(sides[0], r) - area(sides[1], r)


def summary(found: Retention, sides: tuple[list, list] | None, n: int) -> dict:
    """Gain, depth at half, areas, A, the gain of each block from both sides, and what cuts cost.

    `cuts` [[k, x], ..]: R of the first k blocks alone and R of the others alone, minus R of all and R of none. Where
    blocks add up it is 0; below 0 the two parts need each other, which is damage at the interface and no place of a
    function.

    Args:
        sides: points of insert_in and insert_out; None where they, or any between their ends, were not measured.
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
    behind, none, whole = dict(map(tuple, found.at(sides[1]))), found.r[sides[0][0][1]], found.r[sides[0][-1][1]]
    out["cuts"] = [[k, r + behind[n - k] - float(whole + none)] for k, r in found.at(sides[0])]
    return out


def specialisation(
    kept: dict[str, Retention], sides: tuple[list, list] | None, floor: dict[str, dict], suffix: str = ""
) -> dict:
    """A(perception) - A(production) with its interval; above 0 perception comes early and production late.

    None, and in `why` the reason, where the checkpoint does not translate in context (`floor`: what the own source
    saves it, by function), where CPT did not clearly better both, or where a sweep is missing.
    """
    silent = [name for name in FUNCTIONS if name in floor and not floor[name]["ci_low"] > 0]
    worse = [name for name in FUNCTIONS if name in floor and not kept[name + suffix].gain["ci_low"] > 0]
    if not floor:
        why = "translation in context was not measured"
    elif silent:
        better = "with the own source is not clearly better than with another sentence's"
        why = f"the checkpoint does not translate in context: its {silent[0]} {better}"
    elif worse:
        lost = kept[worse[0] + suffix].gain["ci_high"] < 0
        why = f"CPT made {worse[0]} worse" if lost else f"that CPT gained anything in {worse[0]} is not clear"
    elif sides is None:
        why = "it needs the sweeps insert_in and insert_out, with points between their ends"
    else:
        both = [kept[name + suffix] for name in FUNCTIONS]
        one, other = (asymmetry(found, sides) for found in both)
        drawn = [asymmetry(found, sides, draws=True) for found in both]
        return stats.with_interval(one - other, drawn[0] - drawn[1]) | {"why": None}
    return {"value": None, "ci_low": None, "ci_high": None, "why": why}
