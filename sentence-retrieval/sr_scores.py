"""Scores of sentence pairs and the resulting hits: the curves of sr_experiment.py."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from cpt_utils.base import stats
from cpt_utils.base.lazy import torch
from cpt_utils.measures import curves
from cpt_utils.models import states

MARGINS = ("ratio", "distance", "absolute")
SHUFFLES = 100
EVERY = slice(None)


def cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of every row of `x` [n, hidden] with every row of `y` [m, hidden]: [n, m]."""
    return torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(y, dim=1).T


def margin_scores(a: torch.Tensor, variant: str = "ratio", k: int = 4) -> torch.Tensor:
    """Score of every pair from the cosines `a` [n, m] (Artetxe and Schwenk, 2019).

    With m_i the mean of the k largest entries of row i, m_j of column j, and b_ij = (m_i + m_j) / 2 + 1e-6:
    `ratio` a / b, `distance` a - b, `absolute` a. With fewer than k sentences, all of them are neighbours.
    """
    if variant == "absolute":
        return a
    rows = a.topk(min(k, a.shape[1]), dim=1).values.mean(1, keepdim=True)
    columns = a.topk(min(k, a.shape[0]), dim=0).values.mean(0, keepdim=True)
    b = (rows + columns) / 2 + 1e-6
    return a / b if variant == "ratio" else a - b


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Retrieval at every hidden state, from the pooled sentences of two languages, paired by row; computed on demand.

    A hit is a sentence whose highest score is its translation, or another copy of that: copies count as one sentence,
    as which of them scores highest is float rounding, which varies with the batch. Hits are boolean [L+1, sentences].

    Args:
        first: for base and target, the first index of each sentence in its list (`Encoded.first`); None: none repeats.
        lengths: for base and target, the number of pooled tokens of each sentence.
    """

    base: states.Pooled
    target: states.Pooled
    variant: str = "ratio"
    k: int = 4
    seed: int = 42
    first: tuple[list[int], list[int]] | None = None
    lengths: tuple[list[int], list[int]] | None = None

    @functools.cached_property
    def copies(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first index of each base and each target sentence: [sentences] each."""
        position = torch.arange(self.base.mean.shape[1])
        return (position, position) if self.first is None else tuple(map(torch.tensor, self.first))

    def scores(self, pooled: str, centred: bool = False, at: slice = EVERY) -> Iterator[torch.Tensor]:
        """The scores [sentences, sentences] at the hidden states `at`; `centred`: each language's mean vector is
        subtracted, which removes an offset between languages and whatever all sentences have in common.

        Cosines of centred vectors average to about 0 over all sentences, and a ratio to that may have any sign, so with
        `centred` no more than half of the sentences are neighbours.
        """
        half = max(1, self.base.mean.shape[1] // 2)
        for x, y in zip(getattr(self.base, pooled)[at], getattr(self.target, pooled)[at], strict=True):
            x, y = (x - x.mean(0), y - y.mean(0)) if centred else (x, y)
            yield margin_scores(cosine(x, y), self.variant, min(self.k, half) if centred else self.k)

    def found(self, pooled: str, centred: bool, at: slice = EVERY) -> torch.Tensor:
        answers = self.copies[1]
        return torch.stack([answers[scores.argmax(1)] == answers for scores in self.scores(pooled, centred, at)])

    @functools.cached_property
    def published(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`hits`, `hits_reverse` and `chance`, from the same scores."""
        asks, answers = self.copies
        generator = torch.Generator().manual_seed(self.seed)
        shuffles = torch.stack([torch.randperm(len(asks), generator=generator) for _ in range(SHUFFLES)])
        forward, backward, chance = [], [], []
        for scores in self.scores("mean"):
            best = answers[scores.argmax(1)]
            forward.append(best == answers)
            backward.append(asks[scores.argmax(0)] == asks)
            chance.append((best == answers[shuffles]).double().mean())
        return torch.stack(forward), torch.stack(backward), torch.stack(chance)

    hits = property(lambda self: self.published[0])
    hits_reverse = property(lambda self: self.published[1])
    chance = property(lambda self: self.published[2], doc="The accuracy of shuffled pairings: [L+1].")
    hits_unit = functools.cached_property(lambda self: self.found("unit", False))
    hits_centred = functools.cached_property(lambda self: self.found("mean", True))
    hits_unit_centred = functools.cached_property(lambda self: self.found("unit", True))
    readout = property(lambda self: self.found("unit", True, slice(-1, None))[0], doc="`hits_unit_centred[-1]` alone.")
    hits_mexa_weighted = functools.cached_property(lambda self: self.above_all("weighted"))
    hits_mexa_last = functools.cached_property(lambda self: self.above_all("last"))

    def above_all(self, pooled: str) -> torch.Tensor:
        """MEXA's strict hits: a pair's cosine is above every other in its row and column (copies do not count).

        Equal vectors, such as the embedding of a full stop, have equal cosines up to rounding: none of them is a hit.
        """
        asks, answers = (each[:, None] == each for each in self.copies)
        hits = []
        for x, y in zip(getattr(self.base, pooled), getattr(self.target, pooled), strict=True):
            a = cosine(x, y)
            others = torch.maximum(a.masked_fill(answers, -2).amax(1), a.masked_fill(asks, -2).amax(0))
            hits.append(a.diagonal() > others + 4 * torch.finfo(a.dtype).eps)
        return torch.stack(hits)

    @property
    def accuracy(self) -> list[float]:
        """Base -> target accuracy at every hidden state: the paper's measure."""
        return self.hits.double().mean(1).tolist()

    @property
    def mean_accuracy(self) -> list[float]:
        """The mean of both directions at every hidden state."""
        both = (self.hits.double().mean(1).tolist(), self.hits_reverse.double().mean(1).tolist())
        return [(f + b) / 2 for f, b in zip(*both, strict=True)]

    @property
    def largest_norm_share(self) -> torch.Tensor:
        """The largest token's share of the sum of the tokens' norms, mean of both languages: [L+1, sentences]."""
        return (self.base.largest + self.target.largest).double() / 2

    @functools.cached_property
    def length_spearman(self) -> torch.Tensor:
        """Spearman's correlation of cosine and -|log ratio of the two lengths| over all pairs except translations.

        [L+1, sentences], whose mean over sentences is the correlation: see `stats.pair_spearman`.
        """
        asks, answers = (each[:, None] != each for each in self.copies)
        base, target = (torch.tensor(each).double() for each in self.lengths)
        # shorter / longer orders like -|log ratio| and ties 5:10 with 10:20; a difference of logarithms would round
        likeness = (torch.minimum(base[:, None], target) / torch.maximum(base[:, None], target)).numpy()
        count = (asks & answers).numpy()
        cosines = (cosine(x, y).numpy() for x, y in zip(self.base.mean, self.target.mean, strict=True))
        with_length = stats.pair_spearman(likeness, count)  # its ranks are the same at every hidden state
        return torch.stack([torch.from_numpy(with_length(a)) for a in cosines])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The hits as uint8, for the `.pt` next to the JSON: step 2 resamples their sentences."""
        names = ["hits", "hits_reverse", *(curve.hits for curve in curves.MEASURES.values())]
        return {name: getattr(self, name).byte() for name in dict.fromkeys(names)}
