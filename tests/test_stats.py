"""Intervals and correlations against scipy and a plain loop."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from cpt_utils import stats


def test_correlations_equal_scipy():
    rng = np.random.default_rng(0)
    x = rng.normal(size=12)
    y = x + rng.normal(size=12)
    for method, function in (("pearson", scipy_stats.pearsonr), ("spearman", scipy_stats.spearmanr)):
        found, expected = stats.correlation(x, y, method), function(x, y)
        assert (found["correlation"], found["p_value"]) == (expected.statistic, expected.pvalue)
        assert found["n_points"] == 12 and found["ci_low"] < found["correlation"] < found["ci_high"]
    interval = scipy_stats.pearsonr(x, y).confidence_interval(0.95)
    found = stats.correlation(x, y)
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize(
    ("x", "y", "note"),
    [
        ([1, 2], [3, 4], "too few"),
        ([1, 1, 1], [1, 2, 3], "does not vary"),
        ([1, 2, float("nan")], [1, 2, 3], "missing"),
    ],
)
def test_no_correlation_where_there_is_none(x, y, note):
    found = stats.correlation(x, y)
    assert found["correlation"] is None and found["p_value"] is None and note in found["note"]


def test_the_bootstrap_of_a_mean_covers_and_is_seeded():
    rng = np.random.default_rng(1)
    inside = 0
    for seed in range(200):
        low, high = stats.bootstrap_mean(rng.random(100) < 0.3, seed, draws=400)
        inside += low <= 0.3 <= high
    assert 180 <= inside <= 199  # 95 % of 200, with room for the percentile method's small deficit
    values = rng.random(50)
    assert stats.bootstrap_mean(values, 3) == stats.bootstrap_mean(values, 3) != stats.bootstrap_mean(values, 4)
    rows = np.stack([values, 1 - values])
    low, high = stats.bootstrap_means(rows, 3)
    assert (low[0], high[0]) == pytest.approx(stats.bootstrap_mean(values, 3))
    assert low[1] == pytest.approx(1 - high[0])  # one resample serves both series


def test_first_differences():
    assert stats.first_differences([1, 4, 2]) == [3.0, -2.0]
