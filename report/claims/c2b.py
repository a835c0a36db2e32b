"""C2b. The cost of hub layers adjusted for depth and seams, over all sets; also the hub against sets of its shape."""

from __future__ import annotations

from cpt_utils.base import cli
from cpt_utils.measures import controls
from cpt_utils.measures.verdicts import Panel, below

evidence, interventions = cli.sibling("report/evidence.py"), cli.sibling("report/interventions.py")

TEXT = "swapping the hub hurts less than swapping other layers"
ON_LAYERS = True
PANEL = Panel("hub swap costs less than others", "cost")
MEASURES = ("nll_per_byte", "retrieval_readout")


def measure(found: evidence.Results) -> tuple[list[dict], list[dict]]:
    swaps = interventions.swaps(found, "layer_swap", "semantic_hub")
    hub = swaps.sets[swaps.own]["layers"]
    found.refuse_other_layers(swaps.file.path, hub, "layers", "semantic_layers")
    weights = swaps.beside_shape(None, hub)
    name = "hub's layers minus others, beside depth and seams"
    numbers = [swaps.cost(name, measure, weights, says=below(0.0)) for measure in MEASURES]
    return numbers, [_among_matched(swaps, measure) for measure in (*MEASURES, "task_accuracy")]


def _among_matched(swaps: interventions.Swaps, measure: str) -> dict:
    """The hub minus sets alike in size, first and last layer, number of blocks and (to half a layer) mean depth."""
    listed = ((swaps.file.payload.get("matched") or {}).get("semantic_hub") or {}).get("layers") or []
    rows = [swaps.by_layers.get((None, tuple(sorted(layers)))) for layers in listed]
    if None in rows:
        raise swaps.file.refused("names a matched set that it does not hold")
    name = "hub minus sets of its shape"
    if not rows:
        return swaps.cost(name, measure, "no other set of its shape was measured")
    result = swaps.cost(name, measure, {swaps.own: 1.0, **dict.fromkeys(rows, -1 / len(rows))})
    if result["value"] is not None:
        costs = -swaps.measured(measure)[0].round(9)
        rank = controls.rank_among_random(costs[swaps.own], list(costs[rows]), higher_is_better=False)
        draws = [float(cost - costs[rows].mean()) for cost in costs[rows]]
        result |= {"place": {"rank": rank["rank"], "n_random": len(rows), "draws": draws}, "p_value": rank["p_value"]}
    return result
