"""Language neurons by average precision (Kojima et al., NAACL 2024): `identify.py --method ap`.

The mean activation of a neuron on a text is taken as a classifier of the text's language, one against all others. How
good it is, is its average precision (AP): the mean, over the texts of the language, of the share of texts of the
language among those with at least as high an activation. The k neurons of highest AP fire for the language; the k of
lowest AP switch off for it. Both belong to it. 2 k for each language together are --rate of all neurons [ours:
published is k = 1000, whatever the model], so that methods are compared at one size.
"""

from __future__ import annotations

from cpt_utils.base import cli
from cpt_utils.base.lazy import np
from cpt_utils.measures.counts import Counts

lape = cli.sibling("lsn/lape.py")
reporting = cli.sibling("lsn/identify_report.py")

CHUNK = 1 << 22  # activations that are sorted at a time


def average_precision(means: np.ndarray, labels: np.ndarray, n_languages: int) -> np.ndarray:
    """AP of each neuron for each language: float64 [n_languages, neurons].

    Args:
        means: mean activation on each text, [texts, neurons]; texts that have the same are taken together.
        labels: the language of each text, [texts], from 0.
    """
    n_texts = len(means)
    rank = np.arange(1, n_texts + 1)[:, None]
    order = np.argsort(-means, axis=0, kind="stable")
    ordered, languages = np.take_along_axis(means, order, 0), labels[order]
    ends = np.ones(means.shape, dtype=bool)  # the last of equal activations: precision is taken there
    ends[:-1] = ordered[:-1] != ordered[1:]
    last = np.minimum.accumulate(np.where(ends, rank, n_texts)[::-1], axis=0)[::-1] - 1
    found = []
    for g in range(n_languages):
        own = languages == g
        found.append((np.take_along_axis(own.cumsum(0) / rank, last, 0) * own).sum(0) / own.sum(0))
    return np.stack(found)


def select(
    means: list[np.ndarray], langs: list[str], rate: float = 0.01, exists: np.ndarray | None = None
) -> lape.Selection:
    """The mask of all languages.

    Args:
        means: for each language the mean activation of each neuron on each of its texts, [texts, L, I].
        exists: bool [L, I], the neurons that there are; default: all.
    """
    shape = means[0].shape[1:]
    there = np.flatnonzero(np.ones(shape, dtype=bool) if exists is None else exists)
    labels = np.repeat(np.arange(len(langs)), [len(one) for one in means])
    k = lape.wanted(rate, len(there), 2 * len(langs))
    every, step = [one.reshape(len(one), -1) for one in means], max(1, CHUNK // len(labels))
    # A part of the neurons at a time: of all texts together there is no copy.
    parts = (np.concatenate([one[:, there[at : at + step]] for one in every]) for at in range(0, len(there), step))
    found = np.concatenate([average_precision(part, labels, len(langs)) for part in parts], axis=1)
    mask, numbers = {}, {}
    for lang, ap in zip(langs, found, strict=True):
        top, bottom = lape.lowest(-ap, k), lape.lowest(ap, k)
        chosen = np.union1d(top, bottom)
        mask[lang] = lape.by_layer(np.stack(np.unravel_index(there[chosen], shape), -1), shape[0])
        cuts = {"top_cut": float(ap[top[-1]]), "bottom_cut": float(ap[bottom[-1]])}
        tied = [int((np.round(ap - cut, lape.TIE) == 0).sum()) for cut in cuts.values()]
        numbers[lang] = {"best": float(ap.max()), **cuts, "top_tied": tied[0], "bottom_tied": tied[1]}
    return lape.of_masks(mask, len(there), {"k": k, "average_precision": numbers})


def find(counts: list[Counts], scores: list[dict], rate: float) -> tuple[lape.Selection, dict | None]:
    """The mask of all texts, and how far those of its halves agree."""
    langs, means = [one.lang for one in counts], [one["means"].numpy() for one in scores]
    if len(langs) == 2:
        cli.warn(
            f"of two languages, what fires for {langs[0]} switches off for {langs[1]}: by average precision both get "
            "nearly the same neurons, which silencing cannot tell apart; add a language, or use another --method"
        )
    middles = [len(one) // 2 for one in means]
    pairs = list(zip(means, middles, strict=True))
    parts = means, [one[:at] for one, at in pairs], [one[at:] for one, at in pairs]
    masks = [select(part, langs, rate, counts[0].exists) for part in parts]
    return masks[0], reporting.of_halves(counts, scores, middles, *(one.mask for one in masks))


def words(numbers: dict) -> str:
    """The precision of the last neuron of each kind, for people."""
    of = numbers["average_precision"]
    cuts = ", ".join(f"{lang} {row['top_cut']:.4f} and {row['bottom_cut']:.4f}" for lang, row in of.items())
    tied = ", ".join(f"{lang} {row['top_tied']:,}" for lang, row in of.items() if row["top_tied"] > numbers["k"] / 2)
    return f"{numbers['k']:,} of highest and of lowest average precision, down to {cuts}" + (
        f"; as good as the last are, at the top, {tied} neurons: of these the first are taken" if tied else ""
    )
