"""LAPE, language activation probability entropy (Tang et al. 2024; step 8 of the paper), on arrays of counts.

A neuron of one language fires often on that language's tokens and rarely on the others', so its rates have low entropy.
lsn/identify.py is the command.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from cpt_utils.base.errors import InputError
from cpt_utils.measures.masks import Layers

if TYPE_CHECKING:
    import numpy as np

    from cpt_utils.measures.counts import Counts

ENOUGH = 0.9  # Jaccard with the mask of all tokens from which a person would have got the same neurons
# Entropies closer than this are ties: the same rates in another order or at another scale differ in the last bits.
TIE = 12  # decimals


@dataclass
class Selection:
    """The mask, and the numbers that decided."""

    mask: dict[str, Layers]
    filter_bar: float
    bar: float
    n_candidates: int
    n_wanted: int
    selected: np.ndarray  # [selected, 2] of (layer, neuron)
    entropy_cut: float | None


def share(rate: float, size: int) -> int:
    """floor(rate * size) of the decimal number that was written: 0.29 of 100 is 29, though 0.29 * 100 is 28.99.."""
    return math.floor(Fraction(str(rate)) * size)


def entropy(rates: np.ndarray) -> np.ndarray:
    """The entropy [L, I] (nats) of each neuron's rates [L, I, G] normalised over languages; NaN where all are zero.

    Rates are added up in order of size, so that the order of languages does not matter to the last bit.
    """
    import numpy as np

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
    import numpy as np

    rank = share(rate, values.size)
    if not 1 <= rank <= values.size:
        raise InputError(f"{flag} {rate} of {values.size} rates is rank {rank}; give a rate above 0, at most 1")
    return float(np.partition(values.ravel(), rank - 1)[rank - 1])


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
    import numpy as np

    p = np.stack(
        [counts.astype(np.float64) / np.maximum(tokens, 1) for counts, tokens in zip(over_zero, n, strict=True)],
        axis=-1,
    )
    known = p if exists is None else p[exists]
    filter_bar = kth_smallest(known, filter_rate, "--filter-rate")
    bar = filter_bar if bar_rate is None else kth_smallest(known, bar_rate, "--bar-rate")
    highest = p.max(-1)
    # A neuron that never fires has no distribution; it is out even where the bar is below zero's rank.
    candidates = np.flatnonzero((highest > filter_bar) & (highest > 0))
    size = known.size // len(langs)
    wanted = share(rate, size)
    if not wanted:
        least = math.ceil(Fraction(10 ** (digits := len(str(size)) + 1), size)) / 10**digits
        raise InputError(
            f"--rate {rate} of {size} neurons is less than one; give --rate {least} or more (study key lsn.rate)"
        )
    entropies = entropy(p).ravel()
    # A stable sort of positions in order of (layer, neuron): ties go to the lower.
    order = np.argsort(np.round(entropies[candidates], TIE), kind="stable")[:wanted]
    chosen = np.sort(candidates[order])
    selected = np.stack(np.unravel_index(chosen, highest.shape), axis=-1)
    above = p.reshape(-1, len(langs))[chosen] > bar
    return Selection(
        mask={lang: by_layer(selected[above[:, g]], len(highest)) for g, lang in enumerate(langs)},
        filter_bar=filter_bar,
        bar=bar,
        n_candidates=len(candidates),
        n_wanted=wanted,
        selected=selected,
        entropy_cut=float(entropies[candidates[order[-1]]]) if len(order) else None,
    )


def by_layer(places: np.ndarray, n_layers: int) -> Layers:
    """Sorted (layer, neuron) pairs [n, 2] as {layer: [neurons]} with every layer."""
    return {layer: places[places[:, 0] == layer, 1].tolist() for layer in range(n_layers)}


def richest(layers: Layers, n: int) -> list[int]:
    """The `n` layers with most neurons, in layer order; of equals the lower layers."""
    return sorted(sorted(layers, key=lambda layer: (-len(layers[layer]), layer))[:n])


def pairs(layers: Layers) -> set[tuple[int, int]]:
    return {(layer, neuron) for layer, neurons in layers.items() for neuron in neurons}


def jaccard(a: set, b: set) -> float | None:
    """Shared over all members; None where both are empty."""
    return len(a & b) / len(a | b) if a or b else None


def agreement(a: dict[str, Layers], b: dict[str, Layers]) -> dict:
    """Jaccard of two masks: of all (language, layer, neuron) triples, and for each language."""
    ours, theirs = ({lang: pairs(layers) for lang, layers in mask.items()} for mask in (a, b))
    together = ({(lang, *pair) for lang in mask for pair in mask[lang]} for mask in (ours, theirs))
    return {"jaccard": jaccard(*together), "languages": {lang: jaccard(ours[lang], theirs[lang]) for lang in a}}


def of_counts(counts: list[Counts], **rates) -> Selection:
    """`select` on the whole counts."""
    over_zero, tokens = [one.over_zero for one in counts], [one.tokens() for one in counts]
    return select(over_zero, tokens, [one.lang for one in counts], exists=counts[0].exists, **rates)


def convergence(counts: list[Counts], full: Selection, **rates) -> dict | None:
    """How stable the mask is over tokens; None where the counts hold no snapshots, or not the same in every language.

    A mask from part of the tokens shares these with the full one, so their agreement flatters; the two halves share
    no position, and tell how well the mask of half the tokens repeats, unless the text itself repeats (`repeated`, the
    share of its runs of 10 tokens that stand before, too; None where the counts do not say).
    """
    n_snapshots = {len(one.snapshots_n) for one in counts}
    if len(n_snapshots) != 1 or n_snapshots == {0}:
        return None
    langs, points, exists = [one.lang for one in counts], [], counts[0].exists
    for k in range(n_snapshots.pop()):
        tokens = [one.snapshots_n[k] for one in counts]
        possible = [one.tokens(k) for one in counts]
        first = select([one.snapshots[k] for one in counts], possible, langs, exists=exists, **rates)
        parts = {one.lang: one.snapshots_n[k] / one.n for one in counts}
        points.append(
            {
                "share": sum(parts.values()) / len(parts),
                "tokens": dict(zip(langs, tokens, strict=True)),
                **agreement(first.mask, full.mask),
            }
        )
    rest = [one.n - one.snapshots_n[-1] for one in counts]
    possible = [one.tokens() - before for one, before in zip(counts, possible, strict=True)]
    second = select([one.over_zero - one.snapshots[-1] for one in counts], possible, langs, exists=exists, **rates)
    halves = {"tokens_first": points[-1]["tokens"], "tokens_second": dict(zip(langs, rest, strict=True))}
    halves |= agreement(first.mask, second.mask)
    # Enough are the fewest tokens from which on the mask stays: one part that happens to agree is no convergence, and
    # where the halves disagree the full mask itself is not settled.
    settled = (halves["jaccard"] or 0) >= ENOUGH
    unsettled = [k for k, point in enumerate(points) if (point["jaccard"] or 0) < ENOUGH]
    rest_of = points[unsettled[-1] + 1 :] if unsettled else points
    enough = rest_of[0] if settled and rest_of else None
    return {
        "against_full": points,
        "halves": halves,
        "repeated": {one.lang: (one.header.get("tokens") or {}).get("repeated") for one in counts},
        "enough_at": ENOUGH,
        "enough": enough and {"share": enough["share"], "tokens": enough["tokens"]},
    }


def overlap(mask: dict[str, Layers]) -> dict:
    """Between every two languages, in the mask's order: neurons shared, and Jaccard."""
    sets = [pairs(layers) for layers in mask.values()]
    return {
        "languages": list(mask),
        "shared": [[len(a & b) for b in sets] for a in sets],
        "jaccard": [[jaccard(a, b) for b in sets] for a in sets],
    }


def describe(found: Selection, counts: list[Counts]) -> dict:
    """The report without convergence: counts per language and layer, overlap, and the numbers that decided."""
    sets = {lang: pairs(layers) for lang, layers in found.mask.items()}
    owners = Counter(pair for members in sets.values() for pair in members)
    n_owners = Counter(owners.values())
    n_owners[0] = len(found.selected) - len(owners)
    report = {
        "n_layers": len(counts[0].over_zero),
        "n_neurons": counts[0].n_neurons,
        "n_candidates": found.n_candidates,
        "n_wanted": found.n_wanted,
        "n_selected": len(found.selected),
        "selected_by_n_languages": {str(k): n_owners[k] for k in range(len(sets) + 1)},
        "filter_bar": found.filter_bar,
        "bar": found.bar,
        "entropy_cut": found.entropy_cut,
        "entropy_max": math.log(len(sets)),
        "languages": {},
        "overlap": overlap(found.mask),
    }
    for one in counts:
        layers = found.mask[one.lang]
        report["languages"][one.lang] = {
            "n_tokens": one.n,
            "n_neurons": len(sets[one.lang]),
            "counts": [len(layers[layer]) for layer in layers],
            "own": [sum(owners[layer, neuron] == 1 for neuron in layers[layer]) for layer in layers],
            "richest_layers": richest(layers, max(1, len(layers) // 4)) if sets[one.lang] else [],
        }
    return report
