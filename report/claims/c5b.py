"""C5b. The extra cost of attention over the FFN, interface minus LSN-rich layers, adjusted for depth and seams."""

from __future__ import annotations

from cpt_utils.base import cli
from cpt_utils.measures.verdicts import Panel, above

evidence, interventions = cli.sibling("report/evidence.py"), cli.sibling("report/interventions.py")
c5a = cli.sibling("report/claims/c5a.py")

TEXT = "attention hurts more than the FFN because of where it is: in the interface, not in LSN-rich layers"
ON_LAYERS = True
PANEL = Panel("because of where it is", "difference of differences in cost")


def measure(found: evidence.Results) -> tuple[list[dict], list[dict]]:
    swaps, rows = c5a.crossed(found)
    interface, rich = rows.values()
    plain = {interface[0]: 1.0, interface[1]: -1.0, rich[0]: -1.0, rich[1]: 1.0}
    weights = swaps.between_places(interface, rich)
    name = "component by place"
    numbers = [
        swaps.cost(f"{name}, beside depth and seams", measure, weights, says=above()) for measure in c5a.MEASURES
    ]
    return numbers, [swaps.cost(name, measure, plain) for measure in c5a.MEASURES]
