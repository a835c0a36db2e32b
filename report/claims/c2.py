"""C2. The hub swap's place in retrieval among random swaps of as many layers."""

from __future__ import annotations

import math

import numpy as np

from cpt_utils.base import cli
from cpt_utils.measures import controls
from cpt_utils.measures.verdicts import (
    ALPHA,
    ENOUGH,
    OPEN,
    Panel,
    Verdict,
    above,
    beside_zero,
    decide,
    nothing_to_lose,
    number,
    over_sentences,
    shown_p,
)

evidence = cli.sibling("report/evidence.py")

TEXT = "a hub swap costs less than random swaps of the same size"
ON_LAYERS = True
PANEL = Panel("hub swap costs less than random", "retrieval, minus mean of random sets")


def rule(
    own: float, others: list[float], own_units: np.ndarray, other_units: np.ndarray, base: float, target: float,
    seed: int = 42,
) -> Verdict:  # fmt: skip
    """The hub swap costs less than random swaps.

    Args:
        own, others: retrieval after the hub swap, and after each random swap.
        own_units, other_units: the same by sentence, [sentences] and [sets, sentences].
        base, target: retrieval of the models that are swapped.
    """
    reason = nothing_to_lose(base, target)
    if not others:
        return Verdict(OPEN, reason or f"no random sets; {ENOUGH} or more are needed")
    # Rounded, because equal numbers of hits may differ in the last bit of their mean.
    place = controls.rank_among_random(round(own, 9), [round(value, 9) for value in others], higher_is_better=True)
    units = np.asarray(own_units, dtype=np.float64) - np.mean(np.asarray(other_units, dtype=np.float64), axis=0)
    mean = math.fsum(others) / len(others)
    row = over_sentences("hub minus random", units, seed) | {"value": own - mean}
    row |= {"p_value": place["p_value"], "p_opposite": place["p_worse"]}
    row["place"] = {"rank": place["rank"], "n_random": len(others), "draws": [value - mean for value in others]}
    yes = place["p_value"] <= ALPHA and above(row)
    no = place["p_worse"] <= ALPHA
    if not reason and len(others) < ENOUGH:
        reason = f"{len(others)} random sets are too few: {ENOUGH} or more are needed"
    found = OPEN if reason else decide(yes, no)
    if not reason:
        what = f"rank {place['rank']} of {len(others) + 1}"
        told = f"{shown_p(place['p_value'])} for costing less, {shown_p(place['p_worse'])} for costing more"
        reason = f"the hub has {what} ({told}), and over sentences hub minus random is {beside_zero(row)}"
    return Verdict(found, reason, [row])


def judge(found: evidence.Results) -> Verdict:
    swap, _ = found.swap("layer_swap", "semantic_hub")
    hub = swap["sets"][swap["own"]]["layers"]
    found.refuse_other_layers(swap["path"], hub, "layers", "semantic_layers")
    others = [swap["values"][i] for i in swap["random"]]
    made = rule(
        swap["values"][swap["own"]], others, swap["units"][swap["own"]], swap["units"][swap["random"]],
        swap["base"], swap["target"], found.study.seed,
    )  # fmt: skip
    compared = swap["payload"].get("comparison") or {}
    made.beside = [_place_beside(name, row) for name, row in compared.items() if name != "retrieval_mean"]
    return made


def _place_beside(name: str, row: dict) -> dict:
    interval = row.get("ci_low"), row.get("ci_high")
    label = f"hub minus random, {evidence.label(name)}"
    place = {"rank": row["rank"], "n_random": row["n_random"]}
    return number(label, row["own_minus_random"], interval, p_value=row["p_value"], place=place)
