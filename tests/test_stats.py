"""Intervals and correlations against scipy and a plain loop."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from cpt_utils.base import stats


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


def with_correlations(first, second, between, n, seed=0):
    """Three series (first, second, y) of n points whose sample correlations are exactly these."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, 3))
    values -= values.mean(0)
    orthonormal = np.linalg.qr(values)[0]
    wanted = np.array([[1, between, first], [between, 1, second], [first, second, 1]])
    return (orthonormal @ np.linalg.cholesky(wanted).T).T


def test_the_difference_of_overlapping_correlations_equals_the_published_example():
    # Zou (2007), overlapping correlations: .396 and .179 with .088 between them, n = 66.
    found = stats.correlation_difference(*with_correlations(0.396, 0.179, 0.088, 66))
    assert (found["r_first"], found["r_second"], found["r_between"]) == pytest.approx((0.396, 0.179, 0.088))
    assert found["difference"] == pytest.approx(0.217) and found["n_points"] == 66
    # By hand: Fisher's intervals [.1703, .5823] and [-.0659, .4036]; correlation of the coefficients .0526.
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((-0.093, 0.517), abs=5e-4)
    swapped = stats.correlation_difference(*with_correlations(0.179, 0.396, 0.088, 66))
    assert (swapped["ci_low"], swapped["ci_high"]) == pytest.approx((-found["ci_high"], -found["ci_low"]))
    # Nearly the same series twice: the coefficients move together, and the interval closes.
    near = stats.correlation_difference(*with_correlations(0, 0, 0.999, 30))
    assert near["ci_high"] - near["ci_low"] < 0.05


@pytest.mark.parametrize(("n", "a", "b", "ab"), [(12, 0.6, 0.2, 0.5), (8, 0.8, 0.8, 0.6), (30, 0.3, -0.3, 0.2)])
def test_the_interval_of_the_difference_covers(n, a, b, ab):
    rng = np.random.default_rng(n)
    mix = np.linalg.cholesky([[1, ab, a], [ab, 1, b], [a, b, 1]])
    inside = 0
    for _ in range(400):
        found = stats.correlation_difference(*(mix @ rng.normal(size=(3, n))))
        inside += found["ci_low"] <= a - b <= found["ci_high"]
    assert 0.925 <= inside / 400 <= 0.985  # 95 %, two standard errors of 400 draws on either side, a little more above


@pytest.mark.parametrize(
    ("first", "second", "y", "note"),
    [
        ([1, 2], [2, 1], [1, 3], "2 points are too few for a correlation"),
        ([1, 2, 4], [2, 1, 5], [1, 3, 2], "3 points are too few for an interval"),
        ([1, 2, 3, 4], [1, 1, 1, 1], [1, 3, 2, 5], "does not vary"),
        ([1, 2, 3, 4], [1, 3, 2, 5], [2, 4, 6, 8], "exactly 1"),
    ],
)
def test_no_interval_of_a_difference_where_there_is_none(first, second, y, note):
    found = stats.correlation_difference(first, second, y)
    assert found["ci_low"] is None and found["ci_high"] is None and note in found["note"]
    assert (found["difference"] is None) == ("correlation" in note or "vary" in note or note.startswith("2"))
