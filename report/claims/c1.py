"""C1. Accuracy at the best inner hidden state, chosen on other sentences, and their mean, minus the first and last."""

from __future__ import annotations

from cpt_utils.base import cli
from cpt_utils.base.lazy import np
from cpt_utils.measures import curves, gate
from cpt_utils.measures.verdicts import Panel, above, number, over_units

evidence = cli.sibling("report/evidence.py")

TEXT = "accuracy is low at the first and the last hidden state and high between them"
ON_LAYERS = True
PANEL = Panel("ends low, middle high", "difference in retrieval accuracy")
CURVES = [curves.MEASURES[name] for name in ("published", "unit_centred")]


def peak(hits: np.ndarray, seed: int) -> np.ndarray:
    """Hits [sentences] at the best inner hidden state, chosen on the half that does not hold the sentence.

    Args:
        hits: 0/1 [L+1, sentences].
    """
    return gate.at_best(hits[:-1], seed)


def measure(found: evidence.Results) -> tuple[list[dict], list[dict]]:
    file = found.checked(found.retrieval_path(found.last), "retrieval", "sentence-retrieval")
    found.refuse_other_twin(file)
    numbers, beside = [], []
    for key, tensor, curve in CURVES:
        hits = found.hits(file, key, tensor)
        if len(hits) < 3 or hits.shape[1] < 4:
            raise evidence.Missing(f"{len(hits)} hidden states and {hits.shape[1]} sentences are too few")
        best, mean = peak(hits, found.study.seed), hits[1:-1].mean(0)
        for end, at in (("first", 0), ("last", -1)):
            # The peak of any noise is above the ends, so the mean must be, too; the mean alone excludes nothing.
            for what, units, against in (("peak", best, True), ("inner mean", mean, False)):
                name = f"{what} minus {end} hidden state, {curve}"
                says = above(against=against)
                numbers.append(
                    over_units(name, units - hits[at], found.study.seed, "sentences", found.draws, says=says)
                )
        peak_of = "peak (chosen on one half of the sentences, read on the other)"
        for name, value in (("first", hits[0]), ("last", hits[-1]), (peak_of, best)):
            beside.append(number(f"accuracy, {name}, {curve}", float(value.mean()), n=len(value), of="sentences"))
    return numbers, beside
