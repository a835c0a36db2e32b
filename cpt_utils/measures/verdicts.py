"""What the claims of report/claims/ have in common: the bounds, numbers with their intervals, verdicts, panels."""

from __future__ import annotations

from dataclasses import dataclass, field

from cpt_utils.base import stats
from cpt_utils.base.lazy import np

ALPHA = 0.05
WORTH = 0.3  # the least correlation worth the name
ENOUGH = 19  # random sets: with fewer no p can reach .05
YES, NO, OPEN = "supported", "not supported", "undecided"
VOID = "no verdict: gate"  # retrieval is not above an untrained model's, so that the layers mean nothing


@dataclass
class Verdict:
    """What is said of a claim: `numbers` decide (see `number`), those `beside` them do not; `files` were read."""

    verdict: str
    reason: str
    numbers: list[dict] = field(default_factory=list)
    beside: list[dict] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Panel:
    """A claim's panel in the figure: its short words, what the axis shows, and a dotted line beside that at 0."""

    words: str
    axis: str
    line: float | None = None
    scientific: bool = False  # small numbers: their power of ten at the axis's end


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


def decide(yes: bool, no: bool) -> str:
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


def nothing_to_lose(base: float, target: float) -> str:
    if target > base:
        return ""
    return f"nothing to lose: the checkpoint's retrieval ({target:.4f}) is not better than the base's ({base:.4f})"


def over_sentences(name: str, values: np.ndarray, seed: int) -> dict:
    """A mean over sentences; values are rounded, or an average of equal hits could be above 0 by its last bit."""
    return over_units(name, values.round(9), seed, "sentences")


def over_units(name: str, values, seed: int, of: str) -> dict:
    values = np.asarray(values, dtype=np.float64)
    return number(name, float(values.mean()), stats.bootstrap_mean(values, seed), len(values), of)
