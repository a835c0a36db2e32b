"""LAPE, language activation probability entropy (Tang et al., 2024): `identify.py --method lape`.

A neuron of one language fires often on that language's tokens and rarely on the others'. Its firing rates, normalised
over languages, are a distribution of low entropy. The bar is the rate that 95 % of all rates (neurons times languages)
do not exceed. Of the neurons above it in some language, those of lowest entropy are selected, 1 % of all neurons. Each
belongs to the languages in which its rate is above the bar.
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
    """The mask that a method selects, and the numbers that determine it.

    Attributes:
        selected: sorted (layer, neuron) of every selected neuron, [selected, 2].
        numbers: bars, cuts and whatever else determines the mask, as written to the report.
    """

    mask: dict[str, Layers]
    n_candidates: int
    n_wanted: int
    selected: np.ndarray
    numbers: dict = field(default_factory=dict)


def share(rate: float, size: int) -> int:
    """floor(rate * size), exact for the decimal as written: 0.29 of 100 is 29, although 0.29 * 100 is 28.99.."""
    return math.floor(Fraction(str(rate)) * size)


def wanted(rate: float, size: int, sets: int = 1) -> int:
    """How many of `size` neurons are selected for each of `sets` equal sets: `share`, divided by the sets.

    Raises:
        InputError: that is less than one.
    """
    n_selected = share(rate, size) // sets
    if not n_selected:
        least = math.ceil(Fraction(sets * 10 ** (digits := len(str(size)) + 1), size)) / 10**digits
        raise InputError(
            f"--rate {rate} of {size} neurons is less than {'one' if sets == 1 else f'the {sets} that are needed'}; "
            f"give --rate {least} or more (study key lsn.rate)"
        )
    return n_selected


def entropy(rates: np.ndarray) -> np.ndarray:
    """The entropy [L, I] (nats) of each neuron's rates [L, I, G] normalised over languages; NaN where all are zero.

    Rates are summed in order of size, so the order of languages does not change even the last bit.
    """
    ordered = np.sort(rates, axis=-1)
    total = np.zeros(rates.shape[:-1])
    for g in range(rates.shape[-1]):
        total += ordered[..., g]
    result = np.zeros_like(total)
    with np.errstate(divide="ignore", invalid="ignore"):
        for g in range(rates.shape[-1]):
            p = ordered[..., g] / total
            result -= np.where(p == 0, 0.0, p * np.log(p))  # 0 ln 0 = 0; the NaN of 0 / 0 stays
    return result


def kth_smallest(values: np.ndarray, rate: float, flag: str) -> float:
    """The value of rank floor(rate * size) among `values`, in ascending order and counted from 1."""
    rank = share(rate, values.size)
    if not 1 <= rank <= values.size:
        raise InputError(f"{flag} {rate} of {values.size} rates is rank {rank}; give a rate above 0, at most 1")
    return float(np.partition(values.ravel(), rank - 1)[rank - 1])


def firing_rates(over_zero: list[np.ndarray], n: list[int | np.ndarray]) -> np.ndarray:
    """The share of each language's tokens on which each neuron is active: float64 [L, I, G]; 0 without any token."""
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
        over_zero: for each language the number of tokens [L, I] on which each neuron is active.
        n: for each language its number of tokens, or with experts that of each neuron, [L, I]. Without any token the
            rate is zero.
        rate: the share of all neurons to select.
        filter_rate: a candidate must exceed this quantile of all rates in some language.
        bar_rate: a selected neuron belongs to the languages in which it exceeds this quantile; None: `filter_rate`.
        exists: bool [L, I], which neurons exist; default: all. The others count neither for quantiles nor for `rate`.
    """
    p = firing_rates(over_zero, n)
    existing = p if exists is None else p[exists]
    filter_bar = kth_smallest(existing, filter_rate, "--filter-rate")
    bar = filter_bar if bar_rate is None else kth_smallest(existing, bar_rate, "--bar-rate")
    highest = p.max(-1)
    # A neuron that never fires has no distribution, so it is no candidate.
    candidates = np.flatnonzero((highest > filter_bar) & (highest > 0))
    size = wanted(rate, existing.size // len(langs))
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
    """Indices of the `size` lowest of `scores` [n], ascending; the sort is stable, so ties go to the lower index."""
    return np.argsort(np.round(scores, TIE), kind="stable")[:size]


def belonging(p: np.ndarray, chosen: np.ndarray, bar: float, langs: list[str], candidates: int, size: int) -> tuple:
    """The first fields of a `Selection`: each of the `chosen` neurons (sorted flat indices) belongs to the languages in
    which its rate in `p` [L, I, G] is above `bar`."""
    selected = np.stack(np.unravel_index(chosen, p.shape[:2]), axis=-1)
    above = p.reshape(-1, len(langs))[chosen] > bar
    mask = {lang: by_layer(selected[above[:, g]], len(p)) for g, lang in enumerate(langs)}
    return mask, candidates, size, selected


def by_layer(pairs: np.ndarray, n_layers: int) -> Layers:
    """Sorted (layer, neuron) pairs [n, 2] as {layer: [neurons]}, with every layer present."""
    return {layer: pairs[pairs[:, 0] == layer, 1].tolist() for layer in range(n_layers)}


def of_masks(mask: dict[str, Layers], n_candidates: int, numbers: dict) -> Selection:
    """The `Selection` of a method that selects neurons for each language separately."""
    pairs = sorted({(layer, i) for layers in mask.values() for layer, neurons in layers.items() for i in neurons})
    return Selection(mask, n_candidates, len(pairs), np.array(pairs, dtype=np.int64).reshape(-1, 2), numbers)


def of_counts(counts: list[Counts], select=select, **rates) -> Selection:
    """`select` on the counts of all tokens."""
    over_zero, tokens = [c.over_zero for c in counts], [c.tokens() for c in counts]
    return select(over_zero, tokens, [c.lang for c in counts], exists=counts[0].exists, **rates)


def find(counts: list[Counts], **rates) -> tuple[Selection, dict | None]:
    """The mask from all tokens, and how well parts of the tokens reproduce it."""
    selection = of_counts(counts, **rates)
    return selection, reporting.convergence(counts, selection, select, **rates)


def words(numbers: dict) -> str:
    """The bar, and the highest entropy selected, in words."""
    cut = numbers["entropy_cut"]
    text = f"bar {numbers['bar']:.4f}"
    return text if cut is None else f"{text}, entropy up to {cut:.4f} of {numbers['entropy_max']:.4f}"
