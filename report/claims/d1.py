"""D1. The share of the change that lies in the singular values, against that of random changes of the same norm."""

from __future__ import annotations

import math

from cpt_utils.base import cli
from cpt_utils.measures.verdicts import Panel, below, number

evidence = cli.sibling("report/evidence.py")

TEXT = "the change avoids the singular values, more than a random one of its size does"
ON_LAYERS = False
PANEL = Panel("vectors turn, values stay", "log of the share over a random change's")
# Random changes hardly touch the values either. A share within a fifth of theirs is what any change has.
BOUND = math.log(0.8)


def measure(found: evidence.Results) -> tuple[list[dict], list[dict]]:
    file, step = found.file("spectrum", "spectrum"), str(found.last["step"])
    found.refuse_part_of_run(file, file.payload["pooled"])
    row = file.payload["pooled"][step]
    if row["value_share"] is None:
        raise evidence.Missing(f"{file.path.name}: nothing changed")
    numbers, beside = [], [number("value share", row["value_share"])]
    for kind, null in row["nulls"].items():
        if not (row["value_share"] > 0 and file.at("pooled", step, "nulls", kind, "ratio") > 0):
            raise evidence.Missing(f"{file.path.name}: the change of the singular values is not distinguishable from 0")
        numbers.append(
            number(f"log of the share over that of {kind} changes", math.log(null["ratio"]), says=below(BOUND))
        )
        beside.append(
            number(f"value share of {kind} changes", math.fsum(null["value_share"]) / len(null["value_share"]))
        )
    if row.get("unscaled_value_share") is not None:
        beside.append(number("value share beyond what scales the base, as decay does", row["unscaled_value_share"]))
    beside.append(number("effective rank of the change / its size, median", row["effective_rank"]))
    return numbers, beside
