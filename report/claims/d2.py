"""D2. How much more of the update the most changed tenth of the heads holds than if features lay in heads by chance."""

from __future__ import annotations

import math

from cpt_utils.base import cli
from cpt_utils.measures.verdicts import Panel, above, number

evidence = cli.sibling("report/evidence.py")

TEXT = "a few heads carry the change (Diffract)"
ON_LAYERS = False
# Permutations hardly vary, so any structure exceeds them; within a fifth, the heads share the update evenly.
BOUND = math.log(1.2)
PANEL = Panel("a few heads carry the change", "log of the share in the top 10 % over chance")


def measure(found: evidence.Results) -> tuple[list[dict], list[dict]]:
    file, step = found.file("heads", "heads"), str(found.last["step"])
    found.refuse_part_of_run(file, file.payload["steps"])
    if file.payload["steps"][step]["concentration"] is None:
        raise evidence.Missing(f"{file.path.name}: no head differs from the base")

    def at(*keys) -> float:
        return file.at("steps", step, "concentration", *keys)

    share, low, high, mean = at("top_share"), *(at("permuted", key) for key in ("low", "high", "mean"))
    name, draws = "share of the update in the top 10 % of heads", int(at("permuted", "draws"))
    ends = math.log(share / high), math.log(share / low)
    numbers = [number(f"log of the {name} over features permuted", math.log(share / mean), ends, draws,
                      "permutations", says=above(BOUND), p_value=at("permuted", "p_value"))]  # fmt: skip
    # Above 0 for any update that grows with the heads' sizes, for any update at all, and descriptive numbers.
    beside = [number(f"{name}, beyond heads changed in proportion to their size", share - at("in_proportion"))]
    even = f"{name}, beyond as much in every head of a layer (never below 0)"
    beside += [number(even, share - at("even")), number(name, share)]
    beside += [number("Gini coefficient of the update over heads", at("gini"))]
    return numbers, [*beside, number("Gini coefficient with features permuted", at("gini_permuted"))]
