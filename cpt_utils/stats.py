"""Intervals and correlations that more than one script reports."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.95


def bootstrap_mean(values: np.ndarray, seed: int = 42, draws: int = 2000, level: float = LEVEL) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of `values` [n], resampling its entries (sentences, rows)."""
    low, high = bootstrap_means(values, seed, draws, level)
    return float(low), float(high)


def bootstrap_means(values: np.ndarray, seed: int = 42, draws: int = 2000, level: float = LEVEL):
    """The same for several series over the same units: `values` [..., n] -> (low [...], high [...]).

    One resample of units serves all series, so that differences between them keep their pairing.
    """
    import numpy as np

    values = np.asarray(values, dtype=np.float64)
    weights = resample_weights(values.shape[-1], seed, draws)
    means = values @ weights.T / values.shape[-1]
    tail = (1 - level) / 2
    return np.quantile(means, tail, axis=-1), np.quantile(means, 1 - tail, axis=-1)


def resample_weights(n: int, seed: int, draws: int) -> np.ndarray:
    """How often each of `n` units is in each of `draws` resamples of size n: float64 [draws, n]."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return np.stack([np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(draws)]).astype(np.float64)


def correlation(x, y, method: str = "pearson", level: float = LEVEL) -> dict:
    """Correlation of two series with p value and interval.

    Pearson's interval is Fisher's z with standard error 1/sqrt(n-3), Spearman's the same with Fieller's factor 1.06.
    Fewer than 4 points give no interval, fewer than 3 no correlation: two points always lie on a line.

    Returns:
        `correlation, p_value, n_points, ci_low, ci_high`, None where not defined, and then `note` with the reason.
    """
    import numpy as np
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


def first_differences(values) -> list[float]:
    """The steps from each value to the next: n values give n - 1."""
    return [float(b) - float(a) for a, b in itertools.pairwise(values)]
