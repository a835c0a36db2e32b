"""C3. Attention minus the FFN over the layers of the last checkpoint, by the largest projection and by their mean."""

from __future__ import annotations

from cpt_utils.base import cli, experiments
from cpt_utils.base.errors import InputError
from cpt_utils.measures.verdicts import OPEN, Panel, Verdict, above, below, beside_zero, decide, number, over_units

evidence = cli.sibling("report/evidence.py")

TEXT = "attention changes more than the FFN"
ON_LAYERS = False
PANEL = Panel("attention changes more than FFN", "difference in mean |ΔW|", scientific=True)


def rule(by_max: list[tuple[float, float]], by_mean: list[tuple[float, float]], seed: int = 42) -> Verdict:
    """Attention changes more than the FFN.

    Args:
        by_max, by_mean: (attention, FFN) of each layer at the last checkpoint, mean |dW|: the largest of their
            projections, and the mean over them.
    """
    if len(by_max) < 2:
        return Verdict(OPEN, f"{len(by_max)} layer is too few: an interval over layers needs 2 or more")
    rows = [
        over_units(f"attention minus FFN, {name}", [a - f for a, f in pairs], seed, "layers")
        for name, pairs in (("largest projection", by_max), ("mean of projections", by_mean))
    ]
    yes, no = all(map(above, rows)), all(map(below, rows))
    if yes or no:
        reason = f"by the largest projection and by their mean, attention changes {'more' if yes else 'less'}"
    else:
        said = [beside_zero(row) for row in rows]
        reason = f"the largest projection is {said[0]}, the mean of projections {said[1]}"
        reason += ": it depends on the definition" if {*said} == {"above 0", "below 0"} else ""
    return Verdict(decide(yes, no), reason, rows)


def judge(found: evidence.Results) -> Verdict:
    path = found.path("attn_vs_ffn")
    payload, _ = found.json(path, "attn_vs_ffn")
    step = str(found.last["step"])
    if step not in payload.get("checkpoints", {}):
        raise evidence.Missing(f"{path} has no step {step}, the last of the run")
    row, script = payload["checkpoints"][step], cli.sibling("weight-diff/attn_vs_ffn.py")
    layers = list(row["layers"].values())
    try:
        by_max, by_mean = (script.pairs(layers, summary) for summary in ("summary", "summary_mean"))
    except KeyError as error:
        raise InputError(f"{path} has no {error.args[0]}; run {experiments.made_by('attn_vs_ffn')} again") from None
    made = rule(by_max, by_mean, found.study.seed)
    for summary, words in (
        ("summary_relative", "relative change, largest projection"),
        ("summary_relative_mean", "relative change, mean of projections"),
    ):
        both = row.get(summary) or {}
        if None not in (both.get("attn"), both.get("ffn")):
            made.beside.append(number(f"attention minus FFN, {words}", both["attn"] - both["ffn"], n=len(by_max)))
    return made
