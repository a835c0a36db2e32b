"""What the claims of report/claims/ have in common: numbers, what a claim says of them, and the verdict over seeds."""

from __future__ import annotations

from dataclasses import dataclass, field

from cpt_utils.base import stats
from cpt_utils.base.lazy import np

ALPHA = 0.05
SEEDS = 5  # runs that differ in their seed; with fewer there is no verdict
YES, NO, OPEN = "supported", "not supported", "undecided"
ONE = "one run: no verdict"
VOID = "no verdict: gate"  # retrieval is not above an untrained model's, so that the layers mean nothing


@dataclass
class Verdict:
    """What is said of a claim: `numbers` decide (see `number`), those `beside` them do not; `files` were read."""

    verdict: str
    reason: str
    numbers: list[dict] = field(default_factory=list)
    beside: list[dict] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    p_value: float | None = None  # over seeds, after Holm
    seeds_needed: int | None = None  # of an undecided one, see `seeds_needed`


@dataclass(frozen=True)
class Panel:
    """A claim's panel in the figure: its short words, and what the axis shows."""

    words: str
    axis: str


# ---------------------------------------------------------------- numbers


def above(bound: float = 0.0, against: bool = True) -> dict:
    """The claim says that a number is above `bound`; `against`: an interval below it excludes the claim."""
    return {"side": "above", "bound": bound, "against": against}


def below(bound: float) -> dict:
    return {"side": "below", "bound": bound, "against": True}


def within(bound: float) -> dict:
    """The claim says that a number lies between -`bound` and `bound`; only one above `bound` excludes it."""
    return {"side": "within", "bound": bound, "against": True}


def number(name: str, value: float | None, ci=(None, None), n: int | None = None, of: str = "", **more) -> dict:
    """A number with its 95 % interval over `n` units (`of` says what they are).

    `more` are `says` (see `above`), p values, the `place` among controls, and of a number that is None a `note`.
    """
    row = {"name": name, "value": value, "ci_low": ci[0], "ci_high": ci[1], "p_value": None, "n": n, "n_of": of}
    return row | {"place": None, "says": None} | more


def of_row(name: str, row: dict, **more) -> dict:
    """A number that a result has with its interval: `value`, `ci_low`, `ci_high`."""
    return number(name, row["value"], (row["ci_low"], row["ci_high"]), **more)


def over_units(name: str, values, seed: int, of: str, draws: int = 2000, **more) -> dict:
    """A mean over units with its bootstrap interval; `draws` 0: without one.

    Values are rounded, or an average of equal hits could be above 0 by its last bit.
    """
    values = np.asarray(values, dtype=np.float64).round(9)
    interval = stats.bootstrap_mean(values, seed, draws) if draws else (None, None)
    return number(name, float(values.mean()), interval, len(values), of, **more)


STANDINGS = {"for": "as the claim says", "against": "contrary to it", "open": "not clear"}


def standing(row: dict) -> str:
    """What the interval of a number says of the claim: "for", "against" or "open"; one that touches is not beyond."""
    low, high, says = row["ci_low"], row["ci_high"], row["says"]
    if low is None or high is None:
        return "open"
    bound = says["bound"]
    if says["side"] == "above":
        holds, broken = low > bound, high < bound
    else:
        holds, broken = high < bound and (says["side"] == "below" or low > -bound), low > bound
    return "for" if holds else "against" if broken and says["against"] else "open"


def in_words(says: dict) -> str:
    """ "above 0", "below 0.25", "within 0.03"."""
    return f"{says['side']} {says['bound']:.3g}"


def shown_p(p: float) -> str:
    return f"p = {p:.3f}" if p >= 0.0005 else "p < 0.001"


def listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


# ---------------------------------------------------------------- one run


def in_this_run(numbers: list[dict], beside: list[dict]) -> Verdict:
    """What one run says: numbers in words, and no verdict."""
    return Verdict(ONE, "in this run " + _standings(numbers), numbers, beside)


def _standings(rows: list[dict]) -> str:
    found: dict[str, list[str]] = {}
    for row in rows:
        words = STANDINGS[standing(row)] if row["ci_low"] is not None else "without an interval"
        words = f"not known, {row['note']}" if row["value"] is None else words
        found.setdefault(words, []).append(f"{row['name']} ({in_words(row['says'])})")
    if len(found) == 1 and len(rows) > 1:
        return f"all numbers {words}"
    return "; ".join(f"{words}: {listed(names)}" for words, names in found.items())


# ---------------------------------------------------------------- over seeds


def over_seeds(runs: dict[int, list[dict]]) -> list[dict]:
    """The numbers of several runs, one by one: mean over seeds with the interval of t, p of t and of all sign flips.

    Args:
        runs: seed -> the numbers of its run; those that not all runs have are left out.

    Returns:
        numbers over seeds, each with `values` {seed: value} and `p_sign_flip`; p is that of the claim's condition, of
        one with two bounds the larger. None where a run has none, with the `note` of that run.
    """
    first, *others = ({row["name"]: row for row in rows} for rows in runs.values())
    found = []
    for name, row in first.items():
        same = [row, *(other[name] for other in others if name in other)]
        if len(same) < len(runs):
            continue
        values = dict(zip(runs, (one["value"] for one in same), strict=True))
        lacking = next((seed for seed, value in values.items() if value is None), None)
        more = {"says": row["says"], "values": values}
        if lacking is not None:
            note = next(one.get("note", "no value") for one in same if one["value"] is None)
            found.append(number(name, None, n=len(values), of="seeds", note=f"seed {lacking}: {note}", **more))
            continue
        mean, low, high, _ = stats.t_mean(list(values.values()))
        tested = [signed for signed, _ in conditions(more)] if row["says"] else []
        more["p_value"] = max((stats.t_mean(signed)[3] for signed in tested), default=None)
        more["p_sign_flip"] = max(map(stats.sign_flip, tested), default=None)
        found.append(number(name, mean, (low, high), len(values), "seeds", **more))
    return found


def conditions(row: dict) -> list[tuple[np.ndarray, bool]]:
    """What must be above 0 for the claim, of every seed, and whether values below 0 speak against the claim."""
    values, says = np.asarray(list(row["values"].values()), dtype=np.float64), row["says"]
    if says["side"] == "above":
        return [(values - says["bound"], says["against"])]
    upper = (says["bound"] - values, says["against"])
    return [upper] if says["side"] == "below" else [upper, (values + says["bound"], False)]


def weigh(rows: list[dict]) -> tuple[float, float]:
    """p for a claim and p against it.

    For: all conditions hold, so the largest p counts (an intersection-union test; of two bounds it is TOST). Against:
    one of those that speak against it is broken, so the smallest counts, times their number.
    """
    holds, broken = [], []
    for values, against in (one for row in rows for one in conditions(row)):
        mean, *_, p = stats.t_mean(values)
        holds.append(p if mean > 0 else 1.0)
        broken += [p if mean < 0 else 1.0] if against else []
    return max(holds), min([1.0, *(len(broken) * p for p in broken)])


def seeds_needed(rows: list[dict], alpha: float) -> int | None:
    """How many seeds a decision either way would take, with a power of 80 % at `alpha` for each number, if mean and
    spread over seeds stay what they are; None where more than a thousand.

    For the claim as many as its hardest number needs, against it as its easiest one (see `weigh`).
    """
    tested = [one for row in rows for one in conditions(row)]
    against = [-values for values, speaks in tested if speaks]
    holds = [stats.n_needed(values, alpha) for values, _ in tested]
    broken = [stats.n_needed(values, alpha / len(against)) for values in against]
    found = [n for n in (*broken, None if None in holds else max(holds)) if n is not None]
    return min(found, default=None)


def decide(claims: dict[str, list[dict]], alpha: float = ALPHA) -> dict[str, Verdict]:
    """The verdicts of a study on the claims that it can decide, each by its numbers over seeds, Holm over all of them.

    At p of exactly `alpha` a claim is decided.
    """
    weighed = {name: weigh(rows) for name, rows in claims.items()}
    adjusted = stats.holm({name: min(both) for name, both in weighed.items()})
    found = {}
    for name, rows in claims.items():
        yes, no = weighed[name]
        decided = adjusted[name] <= alpha
        verdict = OPEN if not decided else YES if yes < no else NO
        told = f"{shown_p(yes)} for it and {shown_p(no)} against it, {shown_p(adjusted[name])} after Holm"
        needed = None if decided else seeds_needed(rows, alpha / len(claims))
        told += f"; {needed} seeds would decide it, if their mean and spread stay" if needed else ""
        reason = f"{_standings(rows)} ({told})"
        found[name] = Verdict(verdict, reason, rows, p_value=adjusted[name], seeds_needed=needed)
    return found
