"""Ternary language neurons (Zhang et al., AAAI 2026): `identify.py --method ternary`.

p[l, n, k] is the share of language k's tokens on which neuron n of layer l is active. With K languages its score is

    H(p normalised over languages) / ln K  -  lambda max_k p / norm,     norm = (1/K) (1/1 + 1/2 + .. + 1/K)

Those of lowest score are selected, 1 % of all neurons, without LAPE's bar. tau is the 95th percentile of all p. A
neuron with p > tau in N languages belongs to these and is specific (N = 1), related (2 .. K - 1) or general (N = K).
lambda is the largest, by bisection of 0 .. 0.2 to 0.001, for which no selected neuron is general.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np
from cpt_utils.measures.counts import Counts

lape = cli.sibling("lsn/lape.py")
reporting = cli.sibling("lsn/identify_report.py")

LARGEST, CLOSE = 0.2, 1e-3  # the largest lambda tried, and the width at which bisection stops


def select(
    over_zero: list[np.ndarray],
    n: list[int | np.ndarray],
    langs: list[str],
    rate: float = 0.01,
    bar_rate: float = 0.95,
    exists: np.ndarray | None = None,
) -> lape.Selection:
    """The mask of all languages; arguments as for LAPE's `select`.

    A neuron that never fires has no distribution and is never selected.

    Raises:
        InputError: fewer than three languages.
    """
    if len(langs) < 3:
        raise InputError(
            f"--method ternary needs three languages or more, but got {' and '.join(langs)}: of two, no neuron is "
            "related (active in 2 .. K - 1 of K), so there are no three classes; add a language, or use --method lape"
        )
    p, k = lape.firing_rates(over_zero, n), len(langs)
    existing = p if exists is None else p[exists]
    bar = lape.kth_smallest(existing, bar_rate, "--bar-rate")
    highest, norm = p.max(-1), math.fsum(1 / i for i in range(1, k + 1)) / k
    candidates = np.flatnonzero(highest > 0)
    size = lape.wanted(rate, existing.size // k)
    spread, strength = lape.entropy(p).ravel()[candidates] / math.log(k), highest.ravel()[candidates] / norm
    n_above = (p > bar).sum(-1).ravel()

    def order(factor: float) -> np.ndarray:
        return lape.lowest(spread - factor * strength, size)

    def n_general(factor: float) -> int:
        return int((n_above[candidates[order(factor)]] == k).sum())

    factor, n_left = largest(n_general)
    if n_left:
        cli.warn(
            f"lambda {LARGEST} selects general neurons, and even with lambda 0 {n_left} of {size} belong to every "
            "language; a lower --rate leaves them out"
        )
    best = order(factor)
    selected = np.sort(candidates[best])
    score_cut = float((spread - factor * strength)[best[-1]]) if len(best) else None
    numbers = {"lambda": factor, "norm": norm, "bar": bar, "score_cut": score_cut}
    numbers |= classes(n_above.reshape(highest.shape), selected, k)
    return lape.Selection(*lape.belonging(p, selected, bar, langs, len(candidates), size), numbers)


def largest(n_general: Callable[[float], int]) -> tuple[float, int]:
    """The largest lambda for which no selected neuron is general, else 0; and how many general ones are selected then.

    Args:
        n_general: lambda -> number of selected neurons that are general.
    """
    low, high = 0.0, LARGEST
    if not n_general(high):
        return high, 0
    if n_left := n_general(low):
        return low, n_left
    while high - low > CLOSE:
        middle = (low + high) / 2
        low, high = (low, middle) if n_general(middle) else (middle, high)
    return low, 0


def classes(n_above: np.ndarray, selected: np.ndarray, k: int) -> dict:
    """How many neurons of each class there are, in all and by layer.

    Args:
        n_above: in how many of the `k` languages each neuron is above tau, [L, I].
        selected: flat indices of the selected neurons.

    Returns:
        `classes` and `classes_by_layer`: of the selected neurons the specific, the related, and those without language
        (N = 0: they fill the budget); of all neurons the general. `by_n`: selected ones by layer and N, [L, K + 1].
    """
    n_layers, width = n_above.shape
    by_n = np.zeros((n_layers, k + 1), dtype=np.int64)
    np.add.at(by_n, (selected // width, n_above.ravel()[selected]), 1)
    rows = {
        "specific": by_n[:, 1], "related": by_n[:, 2:k].sum(1), "without": by_n[:, 0], "general": (n_above == k).sum(1),
    }  # fmt: skip
    return {
        "classes": {name: int(row.sum()) for name, row in rows.items()},
        "classes_by_layer": {name: row.tolist() for name, row in rows.items()},
        "by_n": by_n.tolist(),
    }


def find(counts: list[Counts], **rates) -> tuple[lape.Selection, dict | None]:
    """The mask from all tokens, and how well parts of the tokens reproduce it."""
    selection = lape.of_counts(counts, select, **rates)
    return selection, reporting.convergence(counts, selection, select, **rates)


def words(numbers: dict) -> str:
    """Lambda, tau and the classes, in words."""
    n = numbers["classes"]
    return (
        f"lambda {numbers['lambda']:.4f}, tau {numbers['bar']:.4f}; {n['specific']:,} specific, {n['related']:,} "
        f"related, {n['without']:,} above tau in no language; {n['general']:,} general among all neurons"
    )
