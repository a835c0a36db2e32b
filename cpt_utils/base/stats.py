"""Intervals and correlations that more than one script reports."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable

from cpt_utils.base.lazy import np

LEVEL = 0.95
EXACT = "a correlation of exactly 1 or -1 has no interval"


def bootstrap_mean(values: np.ndarray, seed: int = 42, draws: int = 2000, level: float = LEVEL) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of `values` [n], resampling its entries (sentences, rows)."""
    low, high = bootstrap_means(values, seed, draws, level)
    return float(low), float(high)


def bootstrap_means(values: np.ndarray, seed: int = 42, draws: int = 2000, level: float = LEVEL):
    """The same for several series over the same units: `values` [..., n] -> (low [...], high [...]).

    One resample of units serves all series, so that differences between them keep their pairing.
    """
    values = np.asarray(values, dtype=np.float64)
    weights = resample_weights(values.shape[-1], seed, draws)
    means = values @ weights.T / values.shape[-1]
    tail = (1 - level) / 2
    return np.quantile(means, tail, axis=-1), np.quantile(means, 1 - tail, axis=-1)


@functools.lru_cache(maxsize=3)
def resample_weights(n: int, seed: int, draws: int) -> np.ndarray:
    """How often each of `n` units occurs in each of `draws` resamples of size n: float64 [draws, n], read-only."""
    rng = np.random.default_rng(seed)
    return np.stack([np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(draws)]).astype(np.float64)


def shares(part, whole):
    """`part` / `whole` in every resample, NaN where `whole` (a gain) is 0, which happens with few units."""
    whole = np.where(whole == 0, np.nan, whole)
    return part / whole


def interval(drawn, axis: int | None = None):
    """The ends of the percentile interval of resampled values; NaN (resamples without a gain) is left out."""
    return np.nanquantile(drawn, (0.025, 0.975), axis=axis)


def with_interval(value, drawn) -> dict:
    """A value with the percentile interval of its resamples, in the form of result files."""
    low, high = interval(drawn)
    return {"value": float(value), "ci_low": float(low), "ci_high": float(high)}


def told(row: dict, form: str, key: str = "value") -> str:
    """ "0.65 [0.41, 0.80]": a number of a result and its interval, each formatted as `form` (".2f")."""
    return f"{row[key]:{form}} [{row['ci_low']:{form}}, {row['ci_high']:{form}}]"


def t_mean(values) -> tuple[float, float, float, float]:
    """Mean of `values` [n >= 2], its interval, and the two-sided p against a mean of 0, all by Student's t.

    Values that do not vary have no t: the interval is the mean alone, and p is 1.
    """
    from scipy import special

    values = np.asarray(values, dtype=np.float64)
    mean, error, free = float(values.mean()), float(values.std(ddof=1)) / len(values) ** 0.5, len(values) - 1
    if error <= 1e-12 * abs(mean):
        return mean, mean, mean, 1.0
    half = float(special.stdtrit(free, 0.5 + LEVEL / 2)) * error
    return mean, mean - half, mean + half, 2 * float(special.stdtr(free, -abs(mean) / error))


def n_needed(values, alpha: float, power: float = 0.8, most: int = 1000) -> int | None:
    """How many units a two-sided t test at `alpha` needs to find the mean of `values` [n >= 2] above 0 with this power,
    if their mean and spread are the true ones; None if the mean is not above 0, they do not vary, or `most` is too few.
    """
    from scipy import special

    values = np.asarray(values, dtype=np.float64)
    mean, sd = float(values.mean()), float(values.std(ddof=1))
    if mean <= 0 or sd <= 1e-12 * mean:
        return None
    n = np.arange(2, most + 1)
    beyond = special.stdtrit(n - 1, 1 - alpha / 2)
    shift = np.minimum(mean / sd * n**0.5, 30)  # above that the power is 1, and the distribution overflows
    enough = np.flatnonzero(special.nctdtr(n - 1, shift, beyond) <= 1 - power)
    return int(n[enough[0]]) if len(enough) else None


def sign_flip(values) -> float:
    """The exact two-sided p of the mean of paired differences [n]: the share of all 2^n assignments of signs (of 2^16
    random ones if n > 16) whose mean is at least as far from 0. It cannot be below 2^(1-n).
    """
    values = np.asarray(values, dtype=np.float64)
    n, rng = len(values), np.random.default_rng(0)
    flips = (np.arange(2**n)[:, None] >> np.arange(n)) & 1 if n <= 16 else rng.integers(0, 2, (2**16, n))
    sums = np.abs((2 * flips - 1) @ values)
    return float((sums >= abs(values.sum()) * (1 - 1e-9)).mean())


def holm(p: dict[str, float]) -> dict[str, float]:
    """The p values adjusted for their number (Holm 1979): the probability of any false rejection is at most alpha."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p}


def overlap(first: Iterable[int], second: Iterable[int], n: int) -> dict:
    """The overlap of two sets among `n` units (layers, heads), and that of two random sets of their sizes.

    Returns:
        `shared` units, `jaccard` (shared / units in either), `expected` (mean `jaccard` over all sets of these sizes)
        and `p_value` (the share of these sets with as many shared units or more: hypergeometric). Both are exact.
    """
    one, other = {*first}, {*second}
    a, b, shared = len(one), len(other), len(one & other)
    ways = {k: math.comb(a, k) * math.comb(n - a, b - k) for k in range(max(0, a + b - n), min(a, b) + 1)}
    every = math.comb(n, b)
    return {
        "shared": shared,
        "jaccard": shared / (a + b - shared),
        "expected": math.fsum(count / every * k / (a + b - k) for k, count in ways.items()),
        "p_value": sum(count for k, count in ways.items() if k >= shared) / every,
    }


def correlation(x, y, method: str = "pearson", level: float = LEVEL) -> dict:
    """Correlation of two series with p value and interval.

    Pearson's interval is Fisher's z with standard error 1/sqrt(n-3), as in scipy; Spearman's is the same with Fieller's
    factor 1.06 in the variance, which scipy lacks.
    Fewer than 4 points give no interval, fewer than 3 no correlation: two points always lie on a line.

    Returns:
        `correlation, p_value, n_points, ci_low, ci_high`, None where not defined; `note`: why there is no correlation.
    """
    from scipy import stats

    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"two series of one length are needed, not {x.shape} and {y.shape}")
    result = {"correlation": None, "p_value": None, "n_points": len(x), "ci_low": None, "ci_high": None}
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return result | {"note": "a value is missing or not finite"}
    if len(x) < 3:
        return result | {"note": f"{len(x)} points are too few for a correlation (3 or more)"}
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return result | {"note": "one of the series does not vary"}
    function = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[method]
    r, p = function(x, y)
    result |= {"correlation": float(r), "p_value": float(p)}
    if len(x) > 3 and abs(r) < 1:
        error = (1.06 if method == "spearman" else 1.0) ** 0.5 / np.sqrt(len(x) - 3)
        half = stats.norm.ppf(0.5 + level / 2) * error
        result |= {"ci_low": float(np.tanh(np.arctanh(r) - half)), "ci_high": float(np.tanh(np.arctanh(r) + half))}
    return result


def pair_spearman(y, counts) -> Callable:
    """Spearman's correlation with `y` over pairs of units, as one number per unit, whose mean is the correlation.

    Each number is the correlation plus the unit's influence on it (the influence function, in which ranks move with the
    pairs). So the bootstrap of their mean is, to first order, that of the correlation over units with row and column.

    Args:
        y, counts: [units, units], a value for each pair, and whether the pair counts.

    Returns:
        a function of `x` [units, units] -> [units]; all NaN if the correlation is not defined.
    """
    n, pairs, y = len(counts), int(counts.sum()), y[counts]

    def ranked(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each value's group of equal values, numbered from the lowest, and the ranks as shares from -.5 to .5."""
        group = np.unique(values, return_inverse=True)[1]
        return group, 0.5 - above(group, np.ones(pairs))

    def above(group: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """For each pair, the sum of the weights of pairs with a higher value (equal ones count half) / `pairs`."""
        sums = np.bincount(group, weights)
        return (sums[::-1].cumsum()[::-1] - sums / 2)[group] / pairs

    def influence_on_mean(first_group, second_group, first, second) -> tuple[float, np.ndarray]:
        """The mean of the product of the ranks `first` and `second`, and each pair's influence on it."""
        mean = (first * second).mean()
        return mean, first * second + above(first_group, second) + above(second_group, first) - 3 * mean

    if pairs == 0 or np.ptp(y) == 0:
        return lambda x: np.full(n, np.nan)
    y_group, g = ranked(y)
    gg, dg = influence_on_mean(y_group, y_group, g, g)

    def correlated(x) -> np.ndarray:
        x = x[counts]
        if np.ptp(x) == 0:
            return np.full(n, np.nan)
        x_group, f = ranked(x)
        (ff, df), (fg, dfg) = influence_on_mean(x_group, x_group, f, f), influence_on_mean(x_group, y_group, f, g)
        spearman = fg / (ff * gg) ** 0.5
        influence = np.zeros((n, n))
        influence[counts] = dfg / (ff * gg) ** 0.5 - spearman / 2 * (df / ff + dg / gg)
        return spearman + n / pairs * (influence.sum(0) + influence.sum(1))

    return correlated


def first_differences(values) -> list[float]:
    """The differences from each value to the next: n values give n - 1."""
    return [float(b) - float(a) for a, b in itertools.pairwise(values)]


def correlation_difference(first, second, y, level: float = LEVEL) -> dict:
    """How much more closely `first` correlates with `y` than `second` does: r(first, y) - r(second, y), Pearson's.

    Both correlations share `y` and the same points, so they are not independent. The interval is Zou's (2007,
    Psychological Methods 12:399-413) for overlapping correlations: it combines Fisher's intervals of both, allowing for
    the correlation between the two coefficients.

    Returns:
        `difference, r_first, r_second, r_between, n_points, ci_low, ci_high`, None where not defined (fewer than 4
        points give no interval, fewer than 3 no difference), and then `note` with the reason.
    """
    one, two = correlation(first, y, level=level), correlation(second, y, level=level)
    between = correlation(first, second, level=level)
    a, b, ab = one["correlation"], two["correlation"], between["correlation"]
    result = {"difference": None, "r_first": a, "r_second": b, "r_between": ab, "n_points": one["n_points"]}
    result |= {"ci_low": None, "ci_high": None}
    if None in (a, b, ab):
        return result | {"note": next(part["note"] for part in (one, two, between) if "note" in part)}
    result["difference"] = a - b
    if one["ci_low"] is None or two["ci_low"] is None:
        few = result["n_points"] < 4
        return result | {
            "note": f"{result['n_points']} points are too few for an interval (4 or more)" if few else EXACT
        }
    shared = ((ab - a * b / 2) * (1 - a**2 - b**2 - ab**2) + ab**3) / ((1 - a**2) * (1 - b**2))
    below, above = a - one["ci_low"], two["ci_high"] - b
    result["ci_low"] = a - b - max(0.0, below**2 + above**2 - 2 * shared * below * above) ** 0.5
    above, below = one["ci_high"] - a, b - two["ci_low"]
    result["ci_high"] = a - b + max(0.0, above**2 + below**2 - 2 * shared * above * below) ** 0.5
    return result
