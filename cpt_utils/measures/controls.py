"""The rank of one swap among random swaps of the same size: the sets to compare, and the statistics of their records.

`trial` measures them; the scripts that swap layers or components choose the sets.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from itertools import combinations

from cpt_utils.base import cli, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np, torch
from cpt_utils.measures.evaluation import named

SMALL = 300  # up to this number, all sets are evaluated
DISTINCT = 20  # fewer other sets than this say little: there is a warning
UNNAMED = ("base", "target", "random", "matched")  # records that are not treatments


# --- which sets ---


def add_flag(p, treatment: str) -> None:
    """Add the flag --controls; `wanted` reads it. `treatment` says in the help what the random sets are compared to."""
    text = f"compare {treatment} with random sets of the same size: all of them if there are 300 or fewer (else 300), "
    text += "or N seeded draws, plus the sets of its shape; without a value the study's `controls`, else all"
    p.add_argument("--controls", nargs="?", const="study", type=_number_of_sets, metavar="all|N", help=text)


def _number_of_sets(text: str) -> str:
    if text not in ("all", "study") and not (text.isdecimal() and int(text) > 0):
        raise ValueError
    return text


_number_of_sets.__name__ = "all, or a positive number"  # shown in the error of argparse


def wanted(given: str, study) -> str | int:
    """How many random sets: the value of --controls, if it has none the study's `controls`, else "all"."""
    return (study.get("controls") or "all") if given == "study" else given


def layer_sets(
    layers: int | Sequence[int], treatment: Iterable[int], wanted: str | int, seed: int
) -> tuple[list[list[int]], int]:
    """The sets of layers to compare `treatment` with, and how many sets of its size exist (including itself).

    All other sets of that size if there are no more than wanted, else distinct seeded draws; never `treatment` itself.

    Args:
        layers: the layers to draw from; an integer n means layers 0 to n - 1.
        wanted: the number of sets, or "all", which means SMALL sets at most.

    Raises:
        InputError: `treatment` is empty or all layers, so there is nothing to compare it with.
    """
    treatment, layers = sorted(set(treatment)), range(layers) if isinstance(layers, int) else sorted(layers)
    possible = math.comb(len(layers), len(treatment))
    if possible < 2:
        raise InputError(f"{len(treatment)} of {len(layers)} layers are swapped: there is no other set of that size")
    if possible - 1 < DISTINCT:
        others = f"only {possible - 1} other sets of {len(treatment)} layers exist"
        cli.warn(f"{others}: p cannot be below {1 / possible:.2f}")
    limit = SMALL if wanted == "all" else int(wanted)
    if possible - 1 <= limit:
        return [list(s) for s in combinations(layers, len(treatment)) if list(s) != treatment], possible
    rng, sets = random.Random(seed), []
    while len(sets) < limit:
        drawn = sorted(rng.sample(layers, len(treatment)))
        if drawn != treatment and drawn not in sets:
            sets.append(drawn)
    return sets, possible


# --- statistics ---


def find(sets: list[dict], name: str) -> int | None:
    """The index of condition `name` in the `sets` of a controls.json and in the rows of its .pt; None if absent."""
    return next((i for i, row in enumerate(sets) if name in (row["name"], *row.get("also", ()))), None)


def randoms(rows: list[dict], mine: dict) -> list[dict]:
    """The random sets of the same component as `mine`."""
    return [row for row in rows if row["name"] == "random" and row.get("component") == mine.get("component")]


def gain_lost(
    value: float, base: float, target: float, higher_is_better: bool, interval: dict | None = None
) -> float | None:
    """The share of the gain of CPT that a swap takes back: 0 = as good as the target, 1 = as bad as the base.

    None if CPT gained nothing, or if the `interval` of the gain includes 0 (see `gains`): the share of a gain that may
    be zero can be anything, even 140 %.
    """
    gain = target - base if higher_is_better else base - target
    if gain <= 0 or (interval is not None and not interval["ci_low"] > 0):
        return None
    return (target - value if higher_is_better else value - target) / gain


def gains(records: list[dict], seed: int) -> dict[str, dict]:
    """The gain of CPT by each measure, above 0 if the target is better: `gain, ci_low, ci_high`.

    The interval is a bootstrap over units (sentences, documents, rows) of target minus base. A measure without units
    (the best layer's retrieval) uses the first measure of its kind.
    """
    base, target = (next(r for r in records if r["name"] == name) for name in ("base", "target"))
    by_measure: dict[str, dict] = {}
    for name in target["units"]:
        sign = 1 if named(name).higher_is_better else -1
        units = sign * (np.asarray(target["units"][name]) - np.asarray(base["units"][name]))
        low, high = stats.bootstrap_mean(units, seed)
        by_measure[name] = {"gain": float(units.mean()), "ci_low": low, "ci_high": high}
        by_measure.setdefault(named(name).kind, by_measure[name])
    kinds = {name: named(name).kind for name in target["values"]}
    return {name: by_measure.get(name, by_measure[kind]) for name, kind in kinds.items() if kind in by_measure}


def rank_among_random(treatment: float, others: list[float], higher_is_better: bool) -> dict:
    """The rank of `treatment` among the random sets.

    `rank` 1 is the best; `n_equal` random sets share it. `quantile` is the share of random sets that are better (ties
    count half), 0 if none is.
    The p values are one-sided: `p_value` for costing less than random sets, (1 + random sets at least as good) /
    (1 + random sets); `p_worse` for costing more, the same with "at least as bad".

    Raises:
        InputError: a value that is missing or not finite, which has no rank.
    """
    _refuse_gaps([treatment, *others])
    sign = 1 if higher_is_better else -1
    n_better = sum(sign * other > sign * treatment for other in others)
    n_equal = sum(other == treatment for other in others)
    n, mean = len(others), math.fsum(others) / len(others)
    sd = math.sqrt(math.fsum((other - mean) ** 2 for other in others) / (n - 1)) if n > 1 else None
    return {
        "own": treatment,
        "random_mean": mean,
        "random_sd": sd,
        "random_min": min(others),
        "random_max": max(others),
        "own_minus_random": treatment - mean,
        "rank": 1 + n_better,
        "n_equal": n_equal,
        "n_random": n,
        "quantile": (n_better + n_equal / 2) / n,
        "share_at_least_as_good": (n_better + n_equal) / n,
        "p_value": (1 + n_better + n_equal) / (1 + n),
        "p_worse": (1 + n - n_better) / (1 + n),
    }


def place_in_grid(first: float, firsts: list[float], second: float, seconds: list[float]) -> dict:
    """The rank of `first` - `second` among the differences of all pairs of a set from each side.

    All (n + 1)(m + 1) pairs count, including those with only one treatment: if both treatments were drawn like the
    other sets, each pair would be equally likely to be that of the treatments. `p_value` is one-sided for a difference
    at least as large, `p_opposite` for one at least as small.

    Args:
        firsts, seconds: values of the n and m other sets.
    """
    values = [first, *firsts], [second, *seconds]
    _refuse_gaps([*values[0], *values[1]])
    grid = np.subtract.outer(*map(np.asarray, values)).round(9)  # equal numbers of hits may differ in the last bit
    difference, n = grid[0, 0], grid.size
    result = {"own": float(difference), "rank": 1 + int((grid > difference).sum()), "n_pairs": n}
    return result | {"p_value": int((grid >= difference).sum()) / n, "p_opposite": int((grid <= difference).sum()) / n}


def _refuse_gaps(values: list) -> None:
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise InputError("a swap without a finite value has no rank among others; measure them again (--overwrite)")


def compare(records: list[dict], treatment: str, seed: int) -> dict[str, dict]:
    """Per measure: the gain lost by `treatment` and by the random sets, its rank, and the interval of the difference.

    The interval is a bootstrap over sentences (documents, rows) of `treatment` minus the mean of the random sets; the
    sets are held fixed.
    """
    base, target, treated = (next(r for r in records if r["name"] == name) for name in ("base", "target", treatment))
    others = randoms(records, treated)
    rows, gains_by_measure = {}, gains(records, seed)
    for name, value in treated["values"].items():
        measure = named(name)
        ends = base["values"][name], target["values"][name], measure.higher_is_better
        row = {"base": ends[0], "target": ends[1], "higher_is_better": measure.higher_is_better}
        row["gain"] = gains_by_measure.get(name)
        row |= rank_among_random(value, [r["values"][name] for r in others], measure.higher_is_better)
        row["own_gain_lost"] = gain_lost(value, *ends, row["gain"])
        row["random_gain_lost"] = gain_lost(row["random_mean"], *ends, row["gain"])
        if name in treated["units"]:
            units = np.asarray(treated["units"][name]) - np.mean([r["units"][name] for r in others], axis=0)
            row["ci_low"], row["ci_high"] = stats.bootstrap_mean(units, seed)
            row["n_units"] = len(units)
        rows[name] = row
    return rows


def summary(records: list[dict], seed: int = 42) -> list[dict]:
    """The records in the form of a result: values, accuracies by hidden state, gain lost."""
    base, target = (next(r for r in records if r["name"] == name)["values"] for name in ("base", "target"))
    rows, gains_by_measure = [], gains(records, seed)
    for record in records:
        row = {key: value for key, value in record.items() if key != "units"}
        row["gain_lost"] = {
            name: gain_lost(value, base[name], target[name], named(name).higher_is_better, gains_by_measure.get(name))
            for name, value in record["values"].items()
        }
        rows.append(row)
    return rows


def units_of(records: list[dict]) -> dict:
    """measure -> per-unit values, float32 [records, units]."""
    return {name: torch.tensor([r["units"][name] for r in records]) for name in records[0]["units"]}


def intervals(rows: list[dict], records: list[dict], seed: int) -> None:
    """Add bootstrap intervals over units to the rows of all sets that are not controls, for each measure with units.

    `ci_low` and `ci_high` are the interval of the value; `change` is the value minus the target's, with a paired
    interval: the same sentences (documents, rows) are drawn for both.
    """
    target = next(record for record in records if record["name"] == "target")
    pairs = [(row, record) for row, record in zip(rows, records, strict=True) if row["name"] not in UNNAMED[2:]]
    for row, _ in pairs:
        row |= {"ci_low": {}, "ci_high": {}, "change": {}}
    for name in target["units"]:
        units = np.asarray([record["units"][name] for _, record in pairs])
        change = units - np.asarray(target["units"][name])
        low, high = stats.bootstrap_means(np.stack([units, change]), seed)
        for i, (row, _) in enumerate(pairs):
            row["ci_low"][name], row["ci_high"][name] = float(low[0, i]), float(high[0, i])
            mean = float(change[i].mean())
            row["change"][name] = {"mean": mean, "ci_low": float(low[1, i]), "ci_high": float(high[1, i])}


def rank_all(rows: list[dict], treatment: str) -> None:
    """Add `place`, see `rank_among_random`, to named sets with the component and the number of layers of `treatment`.

    Sets other than `treatment` are compared with the random ones and with `treatment`, never with themselves.
    """
    treated = next(row for row in rows if row["name"] == treatment)

    def alike(row: dict) -> bool:
        return row.get("component") == treated.get("component") and len(row["layers"]) == len(treated["layers"])

    random_rows = randoms(rows, treated)
    for row in rows:
        if row["name"] in UNNAMED or not alike(row):
            continue
        others = [other for other in [*random_rows, treated] if other["layers"] != row["layers"]]
        row["place"] = {
            name: rank_among_random(value, [other["values"][name] for other in others], named(name).higher_is_better)
            for name, value in row["values"].items()
        }


def say(sets: list[dict], compared: dict[str, dict] | None = None, passed: dict | None = None) -> None:
    """Print the outcome, one line per measure: `sets` are those of the result, `passed` the gate of the layers."""
    for row in [row for row in sets if row["name"] not in UNNAMED[2:] or compared is None]:
        shares = {name: share for name, share in row["gain_lost"].items() if share is not None}
        swapped = row["name"] not in ("base", "target")
        parts = [
            f"{name} {value:.4f}" + (f" ({shares[name]:.0%} of the gain lost)" if name in shares and swapped else "")
            for name, value in row["values"].items()
        ]
        cli.say(f"{row['name']} {row['layers'] or ''}: {', '.join(parts)}")
    for name, row in (compared or {}).items():
        label, gain = named(name).label, row["gain"]
        if gain and not gain["ci_low"] > 0:
            text = "CPT lost, and gained nothing" if gain["ci_high"] < 0 else "it is not clear that CPT gained anything"
            cli.say(f"{label}: {text} ({stats.told(gain, '+.4f', 'gain')}), so no share of the gain is given")
        interval = f" [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]" if "ci_low" in row else ""
        ties = f" (with {row['n_equal']} others)" if row["n_equal"] else ""
        cli.say(
            f"{label}: treatment {row['own']:.4f}, {row['n_random']} random sets {row['random_mean']:.4f}, "
            f"difference {row['own_minus_random']:+.4f}{interval}; "
            f"rank {row['rank']} of {row['n_random'] + 1}{ties}, "
            f"p = {row['p_value']:.3f} for costing less, {row['p_worse']:.3f} for costing more"
        )
    if compared and passed and not passed["passed"]:
        cli.say("none of these ranks means anything: the layers did not pass the gate")
