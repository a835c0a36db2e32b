"""Language neurons by gradient times activation (after CULNIG, ICLR 2026): `identify.py --method gradient`.

How far a neuron n pushes the next token y of a text is max over positions of n dP(y)/dn. Its score for a language is
the mean of that over texts of the language, minus the same for the control language: the base language, and for that
one the target. The k of highest score belong to the language; k for each language together are --rate of all neurons.
"""

from __future__ import annotations

from cpt_utils.base import cli
from cpt_utils.base.lazy import np
from cpt_utils.measures.counts import Counts

lape = cli.sibling("lsn/lape.py")
reporting = cli.sibling("lsn/identify_report.py")


def select(
    scores: list[np.ndarray], langs: list[str], controls: dict[str, str], rate: float = 0.01,
    exists: np.ndarray | None = None,
) -> lape.Selection:  # fmt: skip
    """The mask of all languages.

    Args:
        scores: for each language the mean over texts of max over positions of n dP(y)/dn, [L, I].
        controls: of each language the one whose score is subtracted.
        exists: bool [L, I], the neurons that there are; default: all.
    """
    shape = scores[0].shape
    there = np.flatnonzero(np.ones(shape, dtype=bool) if exists is None else exists)
    k = lape.wanted(rate, len(there), len(langs))
    mask, cuts = {}, {}
    for lang, own in zip(langs, scores, strict=True):
        beyond = (own - scores[langs.index(controls[lang])]).ravel()[there]
        # Ties by their size: these are differences of probabilities, and most are far below 1.
        best = np.argsort(-beyond, kind="stable")[:k]
        mask[lang] = lape.by_layer(np.stack(np.unravel_index(there[np.sort(best)], shape), -1), shape[0])
        cuts[lang] = float(beyond[best[-1]])
    return lape.of_masks(mask, len(there), {"k": k, "controls": controls, "cuts": cuts})


def find(
    counts: list[Counts], scores: list[dict], rate: float, controls: dict[str, str]
) -> tuple[lape.Selection, dict | None]:
    """The mask of all texts, and how far those of its halves agree."""
    langs, exists = [one.lang for one in counts], counts[0].exists
    pairs = [(one["sums"].numpy(), one["texts"].numpy()) for one in scores]
    means = [sums.sum(0) / texts.sum() for sums, texts in pairs]
    parts = means, *([sums[half] / texts[half] for sums, texts in pairs] for half in (0, 1))
    masks = [select(part, langs, controls, rate, exists) for part in parts]
    first = [int(texts[0]) for _, texts in pairs]
    return masks[0], reporting.of_halves(counts, scores, first, *(one.mask for one in masks))


def words(numbers: dict) -> str:
    """The score of the last neuron of each language, for people."""
    cuts = ", ".join(f"{lang} {cut:.2e} (minus {numbers['controls'][lang]})" for lang, cut in numbers["cuts"].items())
    return f"{numbers['k']:,} of highest score, down to {cuts}"
