"""What the claims of report/claims/ share: numbers, the condition a claim puts on them, and the verdict over seeds."""

from __future__ import annotations

from dataclasses import dataclass, field

from cpt_utils.base import stats
from cpt_utils.base.lazy import np

ALPHA = 0.05
SEEDS = 5  # runs that differ in their seed; with fewer there is no verdict
YES, NO, OPEN = "supported", "not supported", "undecided"
ONE = "one run: no verdict"
VOID = "no verdict: gate"  # retrieval is no better than an untrained model's, so the layers mean nothing


@dataclass
class Verdict:
    """The verdict on a claim: `numbers` (see `number`) decide, those in `beside` do not; `files` are what was read."""

    verdict: str
    reason: str
    numbers: list[dict] = field(default_factory=list)
    beside: list[dict] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    p_value: float | None = None  # over seeds, after Holm
    seeds_needed: int | None = None  # for an undecided claim, see `seeds_needed`


@dataclass(frozen=True)
class Panel:
    """A claim's panel in the figure: its short title, and the label of the axis."""

    words: str
    axis: str


# ---------------------------------------------------------------- numbers


def above(bound: float = 0.0, against: bool = True) -> dict:
    """The claim says that a number is above `bound`; `against`: an interval below it excludes the claim."""
    return {"side": "above", "bound": bound, "against": against}


def below(bound: float) -> dict:
    return {"side": "below", "bound": bound, "against": True}


def within(bound: float) -> dict:
    """The claim says that a number is between -`bound` and `bound`; only an interval above `bound` excludes it."""
    return {"side": "within", "bound": bound, "against": True}


def number(name: str, value: float | None, ci=(None, None), n: int | None = None, of: str = "", **more) -> dict:
    """A number with its 95 % interval over `n` units (`of` says what they are).

    `more` are `says` (see `above`), p values, the `place` among controls, and a `note` if the value is None.
    """
    row = {"name": name, "value": value, "ci_low": ci[0], "ci_high": ci[1], "p_value": None, "n": n, "n_of": of}
    return row | {"place": None, "says": None} | more


def of_row(name: str, row: dict, **more) -> dict:
    """A number from a row of a result that holds it with its interval: `value`, `ci_low`, `ci_high`."""
    return number(name, row["value"], (row["ci_low"], row["ci_high"]), **more)


def over_units(name: str, values, seed: int, of: str, draws: int = 2000, **more) -> dict:
    """A mean over units with its bootstrap interval (none if `draws` is 0).

    Values are rounded; otherwise the mean difference of equal hits could exceed 0 in its last bit.
    """
    values = np.asarray(values, dtype=np.float64).round(9)
    interval = stats.bootstrap_mean(values, seed, draws) if draws else (None, None)
    return number(name, float(values.mean()), interval, len(values), of, **more)


STANDINGS = {"for": "as the claim says", "against": "contrary to it", "open": "not clear"}


def standing(row: dict) -> str:
    """What the interval of a number says of the claim: "for", "against" or "open", also if it touches the bound."""
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
    """What one run says: its numbers in words, without a verdict."""
    return Verdict(ONE, "in this run " + _standings(numbers), numbers, beside)


def _standings(rows: list[dict]) -> str:
    names_by_words: dict[str, list[str]] = {}
    for row in rows:
        words = STANDINGS[standing(row)] if row["ci_low"] is not None else "without an interval"
        words = f"not known, {row['note']}" if row["value"] is None else words
        names_by_words.setdefault(words, []).append(f"{row['name']} ({in_words(row['says'])})")
    if len(names_by_words) == 1 and len(rows) > 1:
        return f"all numbers {words}"
    return "; ".join(f"{words}: {listed(names)}" for words, names in names_by_words.items())


# ---------------------------------------------------------------- over seeds


def over_seeds(runs: dict[int, list[dict]]) -> list[dict]:
    """Each number over several runs: its mean over seeds with Student's interval, and p by t and by all sign flips.

    Args:
        runs: seed -> the numbers of its run; numbers that some runs lack are left out.

    Returns:
        numbers over seeds, each with `values` {seed: value} and `p_sign_flip`; p tests the claim's condition, with two
        bounds it is the larger one. If the value of a run is None, so is the result, with the `note` of that run.
    """
    first, *others = ({row["name"]: row for row in rows} for rows in runs.values())
    summaries = []
    for name, row in first.items():
        per_run = [row, *(other[name] for other in others if name in other)]
        if len(per_run) < len(runs):
            continue
        values = dict(zip(runs, (run_row["value"] for run_row in per_run), strict=True))
        seed_without = next((seed for seed, value in values.items() if value is None), None)
        more = {"says": row["says"], "values": values}
        if seed_without is not None:
            note = next(run_row.get("note", "no value") for run_row in per_run if run_row["value"] is None)
            summaries.append(number(name, None, n=len(values), of="seeds", note=f"seed {seed_without}: {note}", **more))
            continue
        mean, low, high, _ = stats.t_mean(list(values.values()))
        tested = [signed for signed, _ in conditions(more)] if row["says"] else []
        more["p_value"] = max((stats.t_mean(signed)[3] for signed in tested), default=None)
        more["p_sign_flip"] = max(map(stats.sign_flip, tested), default=None)
        summaries.append(number(name, mean, (low, high), len(values), "seeds", **more))
    return summaries


def conditions(row: dict) -> list[tuple[np.ndarray, bool]]:
    """The conditions of a number: values [seeds] above 0 support the claim; whether values below 0 count against it."""
    values, says = np.asarray(list(row["values"].values()), dtype=np.float64), row["says"]
    if says["side"] == "above":
        return [(values - says["bound"], says["against"])]
    upper = (says["bound"] - values, says["against"])
    return [upper] if says["side"] == "below" else [upper, (values + says["bound"], False)]


def weigh(rows: list[dict]) -> tuple[float, float]:
    """p for a claim and p against it.

    For: all conditions must hold, so the largest p counts (an intersection-union test; TOST for two bounds). Against:
    one violated condition of those that count against it is enough, so the smallest p counts, times their number.
    """
    holds, broken = [], []
    for values, against in (condition for row in rows for condition in conditions(row)):
        mean, *_, p = stats.t_mean(values)
        holds.append(p if mean > 0 else 1.0)
        broken += [p if mean < 0 else 1.0] if against else []
    return max(holds), min([1.0, *(len(broken) * p for p in broken)])


def seeds_needed(rows: list[dict], alpha: float) -> int | None:
    """How many seeds a decision either way would take, with a power of 80 % at `alpha` for each number, if mean and
    spread over seeds stay the same; None if more than a thousand.

    A decision for the claim takes what its hardest condition needs, one against it its easiest (see `weigh`).
    """
    all_conditions = [condition for row in rows for condition in conditions(row)]
    against = [-values for values, excludes in all_conditions if excludes]
    holds = [stats.n_needed(values, alpha) for values, _ in all_conditions]
    broken = [stats.n_needed(values, alpha / len(against)) for values in against]
    counts = [n for n in (*broken, None if None in holds else max(holds)) if n is not None]
    return min(counts, default=None)


def decide(claims: dict[str, list[dict]], alpha: float = ALPHA) -> dict[str, Verdict]:
    """The verdicts of a study on the claims that it can decide, each from its numbers over seeds, by Holm over claims.

    A p of exactly `alpha` decides a claim.
    """
    weighed = {name: weigh(rows) for name, rows in claims.items()}
    adjusted = stats.holm({name: min(p_pair) for name, p_pair in weighed.items()})
    verdicts = {}
    for name, rows in claims.items():
        yes, no = weighed[name]
        decided = adjusted[name] <= alpha
        verdict = OPEN if not decided else YES if yes < no else NO
        p_values = f"{shown_p(yes)} for it and {shown_p(no)} against it, {shown_p(adjusted[name])} after Holm"
        needed = None if decided else seeds_needed(rows, alpha / len(claims))
        p_values += f"; {needed} seeds would decide it, if their mean and spread stay" if needed else ""
        reason = f"{_standings(rows)} ({p_values})"
        verdicts[name] = Verdict(verdict, reason, rows, p_value=adjusted[name], seeds_needed=needed)
    return verdicts
