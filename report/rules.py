"""The rules of report/README.md: each of the paper's six claims as a function c1 .. c6 of plain numbers.

What is missing or too short leaves its claim undecided, with the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cpt_utils.base import stats
from cpt_utils.measures import controls

if TYPE_CHECKING:
    import numpy as np

ALPHA = 0.05
WORTH = 0.3  # the least correlation worth the name
ENOUGH = 19  # random sets: with fewer no p can reach .05
TIE = 1e-9  # means of hits that differ by less are equal
YES, NO, OPEN = "supported", "not supported", "undecided"
VOID = "no verdict: gate"  # retrieval is not above an untrained model's, so that the layers mean nothing
ON_LAYERS = ("C1", "C2", "C4", "C5", "C6")  # the claims about what retrieval shows of layers
CLAIMS = {
    "C1": "accuracy is low in outer layers and high in middle ones",
    "C2": "a hub swap costs less than random swaps of the same size",
    "C3": "attention changes more than the FFN",
    "C4": "the change of attention in interface layers tracks the change of LSN activation more closely than the "
    "change of LSN weights does",
    "C5": "swapping attention in interface layers hurts more than swapping the FFN in LSN-rich layers",
    "C6": "downstream accuracy follows the change of interface layers",
}


# ---------------------------------------------------------------- numbers and verdicts


@dataclass
class Verdict:
    """What is said of a claim: `numbers` decide (see `number`), those `beside` them do not; `files` were read."""

    claim: str
    verdict: str
    reason: str
    numbers: list[dict] = field(default_factory=list)
    beside: list[dict] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def number(name: str, value: float | None, ci=(None, None), n: int | None = None, of: str = "", **more) -> dict:
    """A number with its 95 % interval over `n` units (`of` says what they are); `more` are p values and the place."""
    row = {"name": name, "value": value, "ci_low": ci[0], "ci_high": ci[1], "p_value": None, "n": n, "n_of": of}
    return row | {"place": None} | more


def correlated(name: str, found: dict, key: str = "correlation") -> dict:
    """A result of `stats.correlation` or `stats.correlation_difference` as a number."""
    more = {"note": found["note"]} if "note" in found else {}
    interval = found["ci_low"], found["ci_high"]
    return number(name, found[key], interval, found["n_points"], "points", p_value=found.get("p_value"), **more)


def above(row: dict, bound: float = 0.0) -> bool:
    """Whether the whole interval is above `bound`; one that touches it is not."""
    return row["ci_low"] is not None and row["ci_low"] > bound


def below(row: dict, bound: float = 0.0) -> bool:
    return row["ci_high"] is not None and row["ci_high"] < bound


def beside_zero(row: dict) -> str:
    return "above 0" if above(row) else "below 0" if below(row) else "not clear of 0"


def verdict(yes: bool, no: bool) -> str:
    """What excludes a claim goes before what speaks for it: an r within 0 and .3 is above 0, but not worth the name."""
    return NO if no else YES if yes else OPEN


def listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def whole_or_not(rows: list[dict], test, words: str) -> str:
    """ "middle minus early and middle minus late are above 0", of the rows that pass `test`."""
    names = [row["name"] for row in rows if test(row)]
    return f"{listed(names)} {'is' if len(names) == 1 else 'are'} {words}"


def too_short(rows: list[dict], n_checkpoints: int) -> str:
    """Why a correlation has no interval, where that leaves a claim undecided; "" where all have one."""
    without = [row for row in rows if row["ci_low"] is None]
    if not without:
        return ""
    if n_checkpoints < 5:
        return f"the run is too short: {n_checkpoints} checkpoints, and an interval on first differences needs 5"
    return f"{without[0]['name']} has no interval: {without[0].get('note', 'not defined')}"


def shown_p(p: float) -> str:
    return f"p = {p:.3f}" if p >= 0.0005 else "p < 0.001"


# ---------------------------------------------------------------- the claims


def thirds(n_layers: int) -> dict[str, slice]:
    """Hidden states h_1 .. h_L in three parts: the first and the last floor(L/3), and the middle."""
    third = n_layers // 3
    last = n_layers - third + 1
    return {"early": slice(1, third + 1), "middle": slice(third + 1, last), "late": slice(last, n_layers + 1)}


def c1(hits: np.ndarray, untrained: np.ndarray | None, seed: int = 42, why_not: str = "") -> Verdict:
    """Low in outer layers, high in middle ones.

    Args:
        hits: 0/1 [L+1, sentences] of the last checkpoint.
        untrained: the same, over the same sentences, of an untrained model; None: `why_not` says why.
    """
    import numpy as np

    hits = np.asarray(hits, dtype=np.float64)
    n_layers, n = len(hits) - 1, hits.shape[1]
    if n_layers < 3 or n < 2:
        return Verdict("C1", OPEN, f"{n_layers} layers and {n} sentences are too few: 3 layers and 2 sentences or more")
    cut = thirds(n_layers)
    part = {name: hits[where].mean(0) for name, where in cut.items()}
    rows = [_over_sentences(f"middle minus {name}", part["middle"] - part[name], seed) for name in ("early", "late")]
    beside = [number(f"accuracy, {name}", float(values.mean()), n=n, of="sentences") for name, values in part.items()]
    beside.append(number("accuracy, best hidden state", float(hits[1:].mean(1).max()), n=n, of="sentences"))
    if untrained is not None:
        chance = np.asarray(untrained, dtype=np.float64)[cut["middle"]].mean(0)
        rows.append(_over_sentences("middle minus untrained", part["middle"] - chance, seed))
        beside.append(number("accuracy, middle, untrained", float(chance.mean()), n=n, of="sentences"))
    no = any(below(row) for row in rows[:2])
    yes = all(above(row) for row in rows) and untrained is not None
    if no:
        reason = whole_or_not(rows[:2], below, "below 0")
    elif yes:
        reason = "the middle is above the outer layers on both sides, and above an untrained model"
    elif all(above(row) for row in rows):
        reason = f"the middle is above both sides, but there is no untrained model to compare it with: {why_not}"
    else:
        reason = whole_or_not(rows, lambda row: not above(row), "not above 0")
    return Verdict("C1", verdict(yes, no), reason, rows, beside)


def c2(
    own: float, others: list[float], own_units: np.ndarray, other_units: np.ndarray, base: float, target: float,
    seed: int = 42,
) -> Verdict:  # fmt: skip
    """The hub swap costs less than random swaps.

    Args:
        own, others: retrieval after the hub swap, and after each random swap.
        own_units, other_units: the same by sentence, [sentences] and [sets, sentences].
        base, target: retrieval of the models that are swapped.
    """
    import numpy as np

    reason = nothing_to_lose(base, target)
    if not others:
        return Verdict("C2", OPEN, reason or f"no random sets; {ENOUGH} or more are needed")
    # Rounded, because equal numbers of hits may differ in the last bit of their mean.
    place = controls.place(round(own, 9), [round(value, 9) for value in others], higher_is_better=True)
    units = np.asarray(own_units, dtype=np.float64) - np.mean(np.asarray(other_units, dtype=np.float64), axis=0)
    mean = math.fsum(others) / len(others)
    row = _over_sentences("hub minus random", units, seed) | {"value": own - mean}
    row |= {"p_value": place["p_value"], "p_opposite": place["p_worse"]}
    row["place"] = {"rank": place["rank"], "n_random": len(others), "draws": [value - mean for value in others]}
    yes = place["p_value"] <= ALPHA and above(row)
    no = place["p_worse"] <= ALPHA
    if not reason and len(others) < ENOUGH:
        reason = f"{len(others)} random sets are too few: {ENOUGH} or more are needed"
    found = OPEN if reason else verdict(yes, no)
    if not reason:
        what = f"rank {place['rank']} of {len(others) + 1}"
        told = f"{shown_p(place['p_value'])} for costing less, {shown_p(place['p_worse'])} for costing more"
        reason = f"the hub has {what} ({told}), and over sentences hub minus random is {beside_zero(row)}"
    return Verdict("C2", found, reason, [row])


def c3(by_max: list[tuple[float, float]], by_mean: list[tuple[float, float]], seed: int = 42) -> Verdict:
    """Attention changes more than the FFN.

    Args:
        by_max, by_mean: (attention, FFN) of each layer at the last checkpoint, mean |dW|: the largest of their
            projections, and the mean over them.
    """
    if len(by_max) < 2:
        return Verdict("C3", OPEN, f"{len(by_max)} layer is too few: an interval over layers needs 2 or more")
    rows = [
        _over_units(f"attention minus FFN, {name}", [a - f for a, f in pairs], seed, "layers")
        for name, pairs in (("largest projection", by_max), ("mean of projections", by_mean))
    ]
    yes, no = all(map(above, rows)), all(map(below, rows))
    if yes or no:
        reason = f"by the largest projection and by their mean, attention changes {'more' if yes else 'less'}"
    else:
        said = [beside_zero(row) for row in rows]
        reason = f"the largest projection is {said[0]}, the mean of projections {said[1]}"
        reason += ": it depends on the definition" if {*said} == {"above 0", "below 0"} else ""
    return Verdict("C3", verdict(yes, no), reason, rows)


def c4(attention: list[float], gate: list[float], activation: list[float]) -> Verdict:
    """Attention tracks the change of activation more closely than the neurons' weights do.

    Args:
        attention, gate: change of interface attention and of the neurons' gates at each checkpoint, in step order.
        activation: the change of the neurons' activation above their control.
    """
    steps = [stats.first_differences(series) for series in (attention, gate, activation)]
    both, alone = stats.correlation_difference(*steps), stats.correlation(steps[0], steps[2])
    rows = [correlated("r(attention) minus r(LSN weights)", both, "difference"), correlated("r(attention)", alone)]
    beside = [correlated("r(LSN weights)", stats.correlation(steps[1], steps[2]))]
    raw = stats.correlation_difference(attention, gate, activation)
    beside.append(correlated("r(attention) minus r(LSN weights), raw curves", raw, "difference"))
    for name, series in (("attention", attention), ("LSN weights", gate)):
        beside.append(correlated(f"r({name}), raw curves", stats.correlation(series, activation)))
    yes = above(rows[0]) and above(rows[1])
    no = below(rows[0]) or below(rows[1], WORTH)
    if yes and not no:
        reason = "attention goes with the activation, and more closely than the neurons' weights"
    elif no:
        said = ["the difference is below 0"] * below(rows[0])
        said += [f"r(attention) is below {WORTH}"] * below(rows[1], WORTH)
        reason = listed(said)
    else:
        reason = too_short(rows, len(attention)) or whole_or_not(rows, lambda row: not above(row), "not above 0")
    return Verdict("C4", verdict(yes, no), reason, rows, beside)


@dataclass(frozen=True)
class Swapped:
    """Retrieval after one component swap, and after swaps of the same component in random layers."""

    own: float
    others: list[float]  # [sets]
    units: np.ndarray  # of the own set, [sentences]
    n_layers: int


def c5(attention: Swapped, ffn: Swapped, base: float, target: float, seed: int = 42) -> Verdict:
    """The attention swap in interface layers hurts more than the FFN swap in LSN-rich layers."""
    import numpy as np

    units = np.asarray(ffn.units, dtype=np.float64) - np.asarray(attention.units, dtype=np.float64)
    difference = ffn.own - attention.own
    row = _over_sentences("FFN swap minus attention swap", units, seed) | {"value": difference}
    counts = {"FFN": len(ffn.others), "attention": len(attention.others)}
    reason = nothing_to_lose(base, target)
    if not reason and attention.n_layers != ffn.n_layers:
        reason = f"the sizes differ: attention is swapped in {attention.n_layers} layers, the FFN in {ffn.n_layers}"
    if not reason and min(counts.values()) < ENOUGH:
        reason = f"{counts['FFN']} random FFN sets and {counts['attention']} of attention are too few: {ENOUGH} of each"
    if min(counts.values()):
        pairs = np.subtract.outer(np.asarray(ffn.others), np.asarray(attention.others))
        n = pairs.size
        row["p_value"] = (1 + int((pairs >= difference - TIE).sum())) / (1 + n)
        row["p_opposite"] = (1 + int((pairs <= difference + TIE).sum())) / (1 + n)
        rank = 1 + int((pairs > difference + TIE).sum())
        draws = {"ffn": list(ffn.others), "attention": list(attention.others)}
        row["place"] = {"rank": rank, "n_random": n, "n_ffn_sets": counts["FFN"], "draws": draws}
        row["place"]["n_attention_sets"] = counts["attention"]
    if reason:
        return Verdict("C5", OPEN, reason, [row])
    yes = above(row) and row["p_value"] <= ALPHA
    no = below(row) or row["p_opposite"] <= ALPHA
    over = beside_zero(row)
    told = f"{shown_p(row['p_value'])}, {shown_p(row['p_opposite'])} for the other direction"
    reason = (
        f"over sentences the difference is {over}; it has rank {rank} of {n + 1} among pairs of random sets ({told}; "
        f"the pairs are not independent: they come from {counts['FFN']} FFN and {counts['attention']} attention sets)"
    )
    return Verdict("C5", verdict(yes, no), reason, [row])


def c6(accuracy: list[float], change: list[float]) -> Verdict:
    """Downstream accuracy follows the change of interface layers: one value each a checkpoint, in step order."""
    steps = stats.first_differences(change), stats.first_differences(accuracy)
    row = correlated("r(accuracy, interface change)", stats.correlation(*steps))
    beside = [
        correlated("r, raw curves", stats.correlation(change, accuracy)),
        correlated("Spearman's r, first differences", stats.correlation(*steps, method="spearman")),
    ]
    yes, no = above(row), below(row, WORTH)
    if no:
        reason = f"r on first differences is below {WORTH}"
    elif yes:
        reason = "r on first differences is above 0"
    else:
        reason = too_short([row], len(change)) or f"r on first differences is neither above 0 nor below {WORTH}"
    return Verdict("C6", verdict(yes, no), reason, [row], beside)


def nothing_to_lose(base: float, target: float) -> str:
    if target > base:
        return ""
    return f"nothing to lose: the checkpoint's retrieval ({target:.4f}) is not better than the base's ({base:.4f})"


def _over_sentences(name: str, values: np.ndarray, seed: int) -> dict:
    """A mean over sentences; values are rounded, or an average of equal hits could be above 0 by its last bit."""
    return _over_units(name, values.round(9), seed, "sentences")


def _over_units(name: str, values, seed: int, of: str) -> dict:
    import numpy as np

    values = np.asarray(values, dtype=np.float64)
    return number(name, float(values.mean()), stats.bootstrap_mean(values, seed), len(values), of)
