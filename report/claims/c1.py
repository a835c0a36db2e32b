"""C1. The middle third of the last checkpoint's hidden states against the first and the last third."""

from __future__ import annotations

import numpy as np

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.measures.verdicts import OPEN, Panel, Verdict, above, below, decide, number, over_sentences, whole_or_not

evidence = cli.sibling("report/evidence.py")

TEXT = "accuracy is low in outer layers and high in middle ones"
ON_LAYERS = True
PANEL = Panel("outer layers low, middle high", "difference in retrieval accuracy")


def thirds(n_layers: int) -> dict[str, slice]:
    """Hidden states h_1 .. h_L in three parts: the first and the last floor(L/3), and the middle."""
    third = n_layers // 3
    last = n_layers - third + 1
    return {"early": slice(1, third + 1), "middle": slice(third + 1, last), "late": slice(last, n_layers + 1)}


def rule(hits: np.ndarray, untrained: np.ndarray | None, seed: int = 42, why_not: str = "") -> Verdict:
    """Low in outer layers, high in middle ones.

    Args:
        hits: 0/1 [L+1, sentences] of the last checkpoint.
        untrained: the same, over the same sentences, of an untrained model; None: `why_not` says why.
    """
    hits = np.asarray(hits, dtype=np.float64)
    n_layers, n = len(hits) - 1, hits.shape[1]
    if n_layers < 3 or n < 2:
        return Verdict(OPEN, f"{n_layers} layers and {n} sentences are too few: 3 layers and 2 sentences or more")
    cut = thirds(n_layers)
    part = {name: hits[where].mean(0) for name, where in cut.items()}
    rows = [over_sentences(f"middle minus {name}", part["middle"] - part[name], seed) for name in ("early", "late")]
    beside = [number(f"accuracy, {name}", float(values.mean()), n=n, of="sentences") for name, values in part.items()]
    beside.append(number("accuracy, best hidden state", float(hits[1:].mean(1).max()), n=n, of="sentences"))
    if untrained is not None:
        chance = np.asarray(untrained, dtype=np.float64)[cut["middle"]].mean(0)
        rows.append(over_sentences("middle minus untrained", part["middle"] - chance, seed))
        beside.append(number("accuracy, middle, untrained", float(chance.mean()), n=n, of="sentences"))
    no = any(below(row) for row in rows[:2])
    yes = all(above(row) for row in rows) and untrained is not None
    if no:
        reason = whole_or_not(rows[:2], below, "below 0")
    elif yes:
        reason = "the middle is above the outer layers on both sides, and above an untrained model"
    elif all(above(row) for row in rows):
        reason = f"the middle is above both sides, but there is no untrained model to compare it with: {why_not}"
    else:
        reason = whole_or_not(rows, lambda row: not above(row), "not above 0")
    return Verdict(decide(yes, no), reason, rows, beside)


def judge(found: evidence.Results) -> Verdict:
    payload, header, path = found.retrieval(found.last)
    hits = found.hits(path, payload)
    untrained, why_not = None, ""
    try:
        twin, twin_header, twin_path = found.untrained()
        evidence.refuse_other_sentences([(path, header), (twin_path, twin_header)])
        untrained = found.hits(twin_path, twin)
    except evidence.Missing as reason:
        why_not = str(reason)
    if untrained is not None and untrained.shape != hits.shape:
        raise InputError(f"{twin_path} is about another number of layers or sentences than {path}; run it again")
    return rule(hits, untrained, found.study.seed, why_not)
