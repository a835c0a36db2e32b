"""Language neurons by gradient times activation (after CULNIG, ICLR 2026): `identify.py --method gradient`.

How far a neuron n pushes the next token y of a text is max over positions of n dP(y)/dn. Its score for a language is
the mean of that over texts of the language, minus the same for a control language: the base language, or for the base
language the target. The k of highest score belong to the language; K k, for K languages, are --rate of all neurons.
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
        controls: for each language the one whose score is subtracted.
        exists: bool [L, I], which neurons exist; default: all.
    """
    shape = scores[0].shape
    existing = np.flatnonzero(np.ones(shape, dtype=bool) if exists is None else exists)
    k = lape.wanted(rate, len(existing), len(langs))
    mask, cuts = {}, {}
    for lang, score in zip(langs, scores, strict=True):
        difference = (score - scores[langs.index(controls[lang])]).ravel()[existing]
        # Not rounded as in `lape.lowest`: most of these differences of probabilities are far below 1.
        best = np.argsort(-difference, kind="stable")[:k]
        mask[lang] = lape.by_layer(np.stack(np.unravel_index(existing[np.sort(best)], shape), -1), shape[0])
        cuts[lang] = float(difference[best[-1]])
    return lape.of_masks(mask, len(existing), {"k": k, "controls": controls, "cuts": cuts})


def find(
    counts: list[Counts], scores: list[dict], rate: float, controls: dict[str, str]
) -> tuple[lape.Selection, dict | None]:
    """The mask from all texts, and how well those from the two halves agree."""
    langs, exists = [c.lang for c in counts], counts[0].exists
    pairs = [(row["sums"].numpy(), row["texts"].numpy()) for row in scores]
    means = [sums.sum(0) / texts.sum() for sums, texts in pairs]
    parts = means, *([sums[half] / texts[half] for sums, texts in pairs] for half in (0, 1))
    selections = [select(part, langs, controls, rate, exists) for part in parts]
    first = [int(texts[0]) for _, texts in pairs]
    return selections[0], reporting.of_halves(counts, scores, first, *(s.mask for s in selections))


def words(numbers: dict) -> str:
    """The score of the last neuron of each language, in words."""
    cuts = ", ".join(f"{lang} {cut:.2e} (minus {numbers['controls'][lang]})" for lang, cut in numbers["cuts"].items())
    return f"{numbers['k']:,} of highest score, down to {cuts}"
