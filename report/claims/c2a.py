"""C2a. The share of CPT's gain that the hub swap loses."""

from __future__ import annotations

from cpt_utils.base import cli
from cpt_utils.measures.verdicts import Panel, below

evidence, interventions = cli.sibling("report/evidence.py"), cli.sibling("report/interventions.py")

TEXT = "swapping the hub hardly hurts"
ON_LAYERS = True
PANEL = Panel("hub swap hardly hurts", "share of the gain lost")
MARGIN = 0.25  # of the gain


def measure(found: evidence.Results) -> tuple[list[dict], list[dict]]:
    swaps = interventions.swaps(found, "layer_swap", "semantic_hub")
    found.refuse_other_layers(swaps.file.path, swaps.sets[swaps.own]["layers"], "layers", "semantic_layers")
    numbers = [
        swaps.gain_lost("share of the gain that the hub swap loses", swaps.own, measure, says=below(MARGIN))
        for measure in ("nll_per_byte", "task_accuracy")
    ]
    return numbers, [swaps.gain_lost("share of the gain that the hub swap loses", swaps.own, "retrieval_readout")]
