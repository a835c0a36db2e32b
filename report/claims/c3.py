"""C3. The relative change of all weights of attention against all weights of the FFN."""

from __future__ import annotations

import math

from cpt_utils.base import cli
from cpt_utils.measures.verdicts import Panel, above, number

evidence = cli.sibling("report/evidence.py")

TEXT = "attention changes more than the FFN"
ON_LAYERS = False
PANEL = Panel("attention changes more than FFN", "log of the ratio")


def measure(found: evidence.Results) -> tuple[list[dict], list[dict]]:
    file, step = found.file("attn_vs_ffn", "attn_vs_ffn"), str(found.last["step"])
    found.refuse_part_of_run(file, file.payload["checkpoints"])
    if "pooled" not in file.payload:
        raise evidence.Missing(f"{file.path.name} has no pooled: run {file.made_by} --overwrite again")
    attention, ffn = (file.at("pooled", step, side) for side in ("attention", "ffn"))
    if not (attention > 0 and ffn > 0):
        raise evidence.Missing(f"{file.path.name}: nothing changed in attention or in the FFN")
    numbers = [number("log of attention's relative change over the FFN's", math.log(attention / ffn), says=above())]
    beside = [number("relative change of attention", attention), number("relative change of the FFN", ffn)]
    for summary, words in (("summary", "largest projection"), ("summary_mean", "mean of projections")):
        sides = [file.at("checkpoints", step, summary, side) for side in ("attn", "ffn")]
        beside.append(number(f"attention minus FFN, mean change, {words}", sides[0] - sides[1]))
    return numbers, beside
