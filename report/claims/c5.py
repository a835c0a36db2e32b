"""C5. Retrieval after the FFN swap minus after the attention swap, among the same difference of random sets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.measures import controls
from cpt_utils.measures.verdicts import (
    ALPHA,
    ENOUGH,
    OPEN,
    Panel,
    Verdict,
    above,
    below,
    beside_zero,
    decide,
    nothing_to_lose,
    number,
    over_sentences,
    shown_p,
)

evidence = cli.sibling("report/evidence.py")

TEXT = "swapping attention in interface layers hurts more than swapping the FFN in LSN-rich layers"
ON_LAYERS = True
PANEL = Panel("attention swap hurts more than FFN's", "difference in retrieval accuracy")
TIE = 1e-9  # means of hits that differ by less are equal


@dataclass(frozen=True)
class Swapped:
    """Retrieval after one component swap, and after swaps of the same component in random layers."""

    own: float
    others: list[float]  # [sets]
    units: np.ndarray  # of the own set, [sentences]
    n_layers: int


def rule(attention: Swapped, ffn: Swapped, base: float, target: float, seed: int = 42) -> Verdict:
    """The attention swap in interface layers hurts more than the FFN swap in LSN-rich layers."""
    units = np.asarray(ffn.units, dtype=np.float64) - np.asarray(attention.units, dtype=np.float64)
    difference = ffn.own - attention.own
    row = over_sentences("FFN swap minus attention swap", units, seed) | {"value": difference}
    counts = {"FFN": len(ffn.others), "attention": len(attention.others)}
    reason = nothing_to_lose(base, target)
    if not reason and attention.n_layers != ffn.n_layers:
        reason = f"the sizes differ: attention is swapped in {attention.n_layers} layers, the FFN in {ffn.n_layers}"
    if not reason and min(counts.values()) < ENOUGH:
        reason = f"{counts['FFN']} random FFN sets and {counts['attention']} of attention are too few: {ENOUGH} of each"
    if min(counts.values()):
        pairs = np.subtract.outer(np.asarray(ffn.others), np.asarray(attention.others))
        n = pairs.size
        row["p_value"] = (1 + int((pairs >= difference - TIE).sum())) / (1 + n)
        row["p_opposite"] = (1 + int((pairs <= difference + TIE).sum())) / (1 + n)
        rank = 1 + int((pairs > difference + TIE).sum())
        draws = {"ffn": list(ffn.others), "attention": list(attention.others)}
        row["place"] = {"rank": rank, "n_random": n, "n_ffn_sets": counts["FFN"], "draws": draws}
        row["place"]["n_attention_sets"] = counts["attention"]
    if reason:
        return Verdict(OPEN, reason, [row])
    yes = above(row) and row["p_value"] <= ALPHA
    no = below(row) or row["p_opposite"] <= ALPHA
    over = beside_zero(row)
    told = f"{shown_p(row['p_value'])}, {shown_p(row['p_opposite'])} for the other direction"
    reason = (
        f"over sentences the difference is {over}; it has rank {rank} of {n + 1} among pairs of random sets ({told}; "
        f"the pairs are not independent: they come from {counts['FFN']} FFN and {counts['attention']} attention sets)"
    )
    return Verdict(decide(yes, no), reason, [row])


def judge(found: evidence.Results) -> Verdict:
    attention, attention_header = found.swap("attn_int_swap", "attention_interface")
    ffn, ffn_header = found.swap("ffn_lsn_swap", "ffn_lsn_rich")
    evidence.refuse_other_sentences([(attention["path"], attention_header), (ffn["path"], ffn_header)])
    if attention["units"].shape[1] != ffn["units"].shape[1]:
        raise InputError(f"{attention['path']} and {ffn['path']} have different numbers of sentences; run one again")
    own, rich = (swap["sets"][swap["own"]] for swap in (attention, ffn))
    # Of layers that were asked for, those are swapped that have the component.
    for swap, row, key, name in (
        (attention, own, "layers", "interface_layers"),
        (ffn, rich, "lsn_layers", "layers"),
    ):
        found.refuse_other_layers(swap["path"], row.get("asked", row["layers"]), key, name)
    sides = [
        Swapped(
            own=swap["values"][swap["own"]],
            others=[swap["values"][i] for i in swap["random"]],
            units=swap["units"][swap["own"]],
            n_layers=len(swap["sets"][swap["own"]]["layers"]),
        )
        for swap in (attention, ffn)
    ]
    made = rule(*sides, attention["base"], attention["target"], found.study.seed)
    for name in own["values"]:
        if name != "retrieval_mean" and name in rich["values"]:
            difference = rich["values"][name] - own["values"][name]
            made.beside.append(number(f"FFN swap minus attention swap, {evidence.label(name)}", difference))
    for words, name in (
        ("attention in interface layers", "attention_interface"),
        ("attention in LSN-rich layers", "attention_lsn_rich"),
        ("the FFN in interface layers", "ffn_interface"),
        ("the FFN in LSN-rich layers", "ffn_lsn_rich"),
    ):
        at = controls.find(attention["sets"], name)
        if at is not None:
            made.beside.append(number(f"retrieval after swapping {words}", attention["values"][at]))
    return made
