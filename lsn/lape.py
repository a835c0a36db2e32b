"""LAPE, language activation probability entropy (Tang et al., 2024): `identify.py --method lape`.

A neuron of one language fires often on that language's tokens and rarely on the others'. Its firing rates, normalised
over languages, are a distribution of low entropy. The bar is the rate that 95 % of all rates (neurons times languages)
do not exceed. Of the neurons above it in some language, those of lowest entropy are selected, 1 % of all neurons; each
belongs to the languages in which it is above the bar.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np
from cpt_utils.measures.counts import Counts
from cpt_utils.measures.masks import Layers

reporting = cli.sibling("lsn/identify_report.py")

# Entropies closer than this are ties: the same rates in another order or at another scale differ in the last bits.
TIE = 12  # decimals


@dataclass
class Selection:
    """The mask of a method, and the numbers that decided.

    Attributes:
        selected: (layer, neuron) of every selected neuron, [selected, 2], in order.
        numbers: bars, cuts and whatever else decided, as the report has them.
    """

    mask: dict[str, Layers]
    n_candidates: int
    n_wanted: int
    selected: np.ndarray
    numbers: dict = field(default_factory=dict)


def share(rate: float, size: int) -> int:
    """floor(rate * size) of the decimal number that was written: 0.29 of 100 is 29, though 0.29 * 100 is 28.99.."""
    return math.floor(Fraction(str(rate)) * size)


def wanted(rate: float, size: int, sets: int = 1) -> int:
    """The neurons that are selected of `size` in each of `sets`: `share` of them, divided by the sets.

    Raises:
        InputError: not one.
    """
    found = share(rate, size) // sets
    if not found:
        least = math.ceil(Fraction(sets * 10 ** (digits := len(str(size)) + 1), size)) / 10**digits
        raise InputError(
            f"--rate {rate} of {size} neurons is less than {'one' if sets == 1 else f'the {sets} that are needed'}; "
            f"give --rate {least} or more (study key lsn.rate)"
        )
    return found


def entropy(rates: np.ndarray) -> np.ndarray:
    """The entropy [L, I] (nats) of each neuron's rates [L, I, G] normalised over languages; NaN where all are zero.

    Rates are added up in order of size, so that the order of languages does not matter to the last bit.
    """
    ordered = np.sort(rates, axis=-1)
    total = np.zeros(rates.shape[:-1])
    for g in range(rates.shape[-1]):
        total += ordered[..., g]
    found = np.zeros_like(total)
    with np.errstate(divide="ignore", invalid="ignore"):
        for g in range(rates.shape[-1]):
            part = ordered[..., g] / total
            found -= np.where(part == 0, 0.0, part * np.log(part))  # 0 ln 0 = 0; the NaN of 0 / 0 stays
    return found


def kth_smallest(values: np.ndarray, rate: float, flag: str) -> float:
    """The value of rank floor(rate * size), ascending and counted from 1, of all `values`."""
    rank = share(rate, values.size)
    if not 1 <= rank <= values.size:
        raise InputError(f"{flag} {rate} of {values.size} rates is rank {rank}; give a rate above 0, at most 1")
    return float(np.partition(values.ravel(), rank - 1)[rank - 1])


def firing_rates(over_zero: list[np.ndarray], n: list[int | np.ndarray]) -> np.ndarray:
    """The share of each language's tokens on which each neuron is active: float64 [L, I, G]; 0 where there are none."""
    pairs = zip(over_zero, n, strict=True)
    return np.stack([counts.astype(np.float64) / np.maximum(tokens, 1) for counts, tokens in pairs], axis=-1)


def select(
    over_zero: list[np.ndarray],
    n: list[int | np.ndarray],
    langs: list[str],
    rate: float = 0.01,
    filter_rate: float = 0.95,
    bar_rate: float | None = None,
    exists: np.ndarray | None = None,
) -> Selection:
    """The mask of all languages, from firing rates in float64.

    Args:
        over_zero: for each language the tokens [L, I] that each neuron is active on.
        n: for each language its tokens; they may differ, also from neuron to neuron ([L, I], of experts). Where there
            are none, the rate is zero.
        rate: the share of all neurons that is selected.
        filter_rate: a neuron must be above this quantile of all rates in some language to be a candidate.
        bar_rate: a selected neuron belongs to the languages above this quantile; None: the same.
        exists: bool [L, I], the neurons that there are; default: all. What is not there has no rate and no share.
    """
    p = firing_rates(over_zero, n)
    known = p if exists is None else p[exists]
    filter_bar = kth_smallest(known, filter_rate, "--filter-rate")
    bar = filter_bar if bar_rate is None else kth_smallest(known, bar_rate, "--bar-rate")
    highest = p.max(-1)
    # A neuron that never fires has no distribution; it is out even where the bar is below zero's rank.
    candidates = np.flatnonzero((highest > filter_bar) & (highest > 0))
    size = wanted(rate, known.size // len(langs))
    entropies = entropy(p).ravel()
    order = lowest(entropies[candidates], size)
    chosen = np.sort(candidates[order])
    return Selection(
        *belonging(p, chosen, bar, langs, len(candidates), size),
        {
            "filter_bar": filter_bar,
            "bar": bar,
            "entropy_cut": float(entropies[candidates[order[-1]]]) if len(order) else None,
            "entropy_max": math.log(len(langs)),
        },
    )


def lowest(scores: np.ndarray, size: int) -> np.ndarray:
    """Where the `size` lowest of `scores` [n] are, ascending: a stable sort, so that ties go to those before."""
    return np.argsort(np.round(scores, TIE), kind="stable")[:size]


def belonging(p: np.ndarray, chosen: np.ndarray, bar: float, langs: list[str], candidates: int, size: int) -> tuple:
    """The first fields of a `Selection`: each of the `chosen` neurons (flat, in order) goes to the languages in which
    its rate in `p` [L, I, G] is above `bar`."""
    selected = np.stack(np.unravel_index(chosen, p.shape[:2]), axis=-1)
    above = p.reshape(-1, len(langs))[chosen] > bar
    mask = {lang: by_layer(selected[above[:, g]], len(p)) for g, lang in enumerate(langs)}
    return mask, candidates, size, selected


def by_layer(pairs: np.ndarray, n_layers: int) -> Layers:
    """Sorted (layer, neuron) pairs [n, 2] as {layer: [neurons]} with every layer."""
    return {layer: pairs[pairs[:, 0] == layer, 1].tolist() for layer in range(n_layers)}


def of_masks(mask: dict[str, Layers], n_candidates: int, numbers: dict) -> Selection:
    """The `Selection` of a method that selects for each language by itself."""
    pairs = sorted({(layer, i) for layers in mask.values() for layer, neurons in layers.items() for i in neurons})
    return Selection(mask, n_candidates, len(pairs), np.array(pairs, dtype=np.int64).reshape(-1, 2), numbers)


def of_counts(counts: list[Counts], select=select, **rates) -> Selection:
    """`select` on the whole counts."""
    over_zero, tokens = [one.over_zero for one in counts], [one.tokens() for one in counts]
    return select(over_zero, tokens, [one.lang for one in counts], exists=counts[0].exists, **rates)


def find(counts: list[Counts], **rates) -> tuple[Selection, dict | None]:
    """The mask, and how stable it is over tokens."""
    found = of_counts(counts, **rates)
    return found, reporting.convergence(counts, found, select, **rates)


def words(numbers: dict) -> str:
    """The bar, and the entropy of the last neuron, for people."""
    cut = numbers["entropy_cut"]
    told = f"bar {numbers['bar']:.4f}"
    return told if cut is None else f"{told}, entropy up to {cut:.4f} of {numbers['entropy_max']:.4f}"
