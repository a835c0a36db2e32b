"""Language neurons by average precision (Kojima et al., NAACL 2024): `identify.py --method ap`.

The mean activation of a neuron on a text is taken as a classifier of the text's language, one against all others. Its
average precision (AP) is the mean, over the texts of the language, of the share of texts of the language among those
with at least as high an activation. The k neurons of highest AP fire for the language, and the k of lowest AP switch
off for it. Both belong to it. The 2 k of all languages together are --rate of all neurons [ours; the paper has
k = 1000, whatever the model], so methods are compared at the same size.
"""

from __future__ import annotations

from cpt_utils.base import cli
from cpt_utils.base.lazy import np
from cpt_utils.measures.counts import Counts

lape = cli.sibling("lsn/lape.py")
reporting = cli.sibling("lsn/identify_report.py")

CHUNK = 1 << 22  # activations sorted at a time


def average_precision(means: np.ndarray, labels: np.ndarray, n_languages: int) -> np.ndarray:
    """AP of each neuron for each language: float64 [n_languages, neurons].

    Args:
        means: mean activation on each text, [texts, neurons]; texts of equal activation are taken together.
        labels: the language of each text, [texts], from 0.
    """
    n_texts = len(means)
    rank = np.arange(1, n_texts + 1)[:, None]
    order = np.argsort(-means, axis=0, kind="stable")
    ordered, languages = np.take_along_axis(means, order, 0), labels[order]
    ends = np.ones(means.shape, dtype=bool)  # the last of equal activations, where precision is taken
    ends[:-1] = ordered[:-1] != ordered[1:]
    last = np.minimum.accumulate(np.where(ends, rank, n_texts)[::-1], axis=0)[::-1] - 1
    by_language = []
    for g in range(n_languages):
        positive = languages == g
        by_language.append((np.take_along_axis(positive.cumsum(0) / rank, last, 0) * positive).sum(0) / positive.sum(0))
    return np.stack(by_language)


def select(
    means: list[np.ndarray], langs: list[str], rate: float = 0.01, exists: np.ndarray | None = None
) -> lape.Selection:
    """The mask of all languages.

    Args:
        means: for each language the mean activation of each neuron on each of its texts, [texts, L, I].
        exists: bool [L, I], which neurons exist; default: all.
    """
    shape = means[0].shape[1:]
    existing = np.flatnonzero(np.ones(shape, dtype=bool) if exists is None else exists)
    labels = np.repeat(np.arange(len(langs)), [len(texts) for texts in means])
    k = lape.wanted(rate, len(existing), 2 * len(langs))
    flat, step = [texts.reshape(len(texts), -1) for texts in means], max(1, CHUNK // len(labels))
    # Some neurons at a time, so that the texts of all languages are never copied as a whole.
    parts = (np.concatenate([m[:, existing[at : at + step]] for m in flat]) for at in range(0, len(existing), step))
    precision = np.concatenate([average_precision(part, labels, len(langs)) for part in parts], axis=1)
    mask, numbers = {}, {}
    for lang, ap in zip(langs, precision, strict=True):
        top, bottom = lape.lowest(-ap, k), lape.lowest(ap, k)
        chosen = np.union1d(top, bottom)
        mask[lang] = lape.by_layer(np.stack(np.unravel_index(existing[chosen], shape), -1), shape[0])
        cuts = {"top_cut": float(ap[top[-1]]), "bottom_cut": float(ap[bottom[-1]])}
        tied = [int((np.round(ap - cut, lape.TIE) == 0).sum()) for cut in cuts.values()]
        numbers[lang] = {"best": float(ap.max()), **cuts, "top_tied": tied[0], "bottom_tied": tied[1]}
    return lape.of_masks(mask, len(existing), {"k": k, "average_precision": numbers})


def find(counts: list[Counts], scores: list[dict], rate: float) -> tuple[lape.Selection, dict | None]:
    """The mask from all texts, and how well those from the two halves agree."""
    langs, means = [c.lang for c in counts], [row["means"].numpy() for row in scores]
    if len(langs) == 2:
        cli.warn(
            f"of two languages, what fires for {langs[0]} switches off for {langs[1]}: by average precision both get "
            "nearly the same neurons, which silencing cannot tell apart; add a language, or use another --method"
        )
    middles = [len(texts) // 2 for texts in means]
    pairs = list(zip(means, middles, strict=True))
    parts = means, [texts[:middle] for texts, middle in pairs], [texts[middle:] for texts, middle in pairs]
    selections = [select(part, langs, rate, counts[0].exists) for part in parts]
    return selections[0], reporting.of_halves(counts, scores, middles, *(s.mask for s in selections))


def words(numbers: dict) -> str:
    """The precision of the last neuron at the top and at the bottom, in words."""
    rows = numbers["average_precision"]
    cuts = ", ".join(f"{lang} {row['top_cut']:.4f} and {row['bottom_cut']:.4f}" for lang, row in rows.items())
    tied = ", ".join(f"{lang} {row['top_tied']:,}" for lang, row in rows.items() if row["top_tied"] > numbers["k"] / 2)
    return f"{numbers['k']:,} of highest and of lowest average precision, the last at {cuts}" + (
        f"; neurons as good as the last at the top: {tied}, of which the first are taken" if tied else ""
    )
