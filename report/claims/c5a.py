"""C5a. The extra cost of attention over the FFN of the same layers, in the interface and in the LSN-rich layers."""

from __future__ import annotations

from cpt_utils.base import cli
from cpt_utils.measures.verdicts import Panel, above

evidence, interventions = cli.sibling("report/evidence.py"), cli.sibling("report/interventions.py")

TEXT = "swapping attention hurts more than swapping the FFN of the same layers"
ON_LAYERS = True
PANEL = Panel("attention swap hurts more than FFN's", "difference in cost")
MEASURES = ("nll_per_byte", "retrieval_readout")
PLACES = {"interface": "interface", "LSN-rich layers": "lsn_rich"}


def crossed(found: evidence.Results) -> tuple[interventions.Swaps, dict[str, tuple[int, int]]]:
    """The component swaps, and for both places {place: (row of attention, row of the FFN)}."""
    swaps = interventions.swaps(found, "attn_int_swap", "attention_interface")
    rows = {words: (swaps.at(f"attention_{place}"), swaps.at(f"ffn_{place}")) for words, place in PLACES.items()}
    for (attention, ffn), step, key in zip(
        rows.values(), ("layers", "lsn_layers"), ("interface_layers", "layers"), strict=True
    ):
        pair = [swaps.sets[at] for at in (attention, ffn)]
        found.refuse_other_layers(swaps.file.path, pair[0].get("asked", pair[0]["layers"]), step, key)
        if sorted(pair[0]["layers"]) != sorted(pair[1]["layers"]):
            raise evidence.Missing("not every layer of a place has both attention and an FFN")
    return swaps, rows


def measure(found: evidence.Results) -> tuple[list[dict], list[dict]]:
    swaps, rows = crossed(found)
    numbers = [
        swaps.cost(f"attention minus FFN, {place}", measure, {attention: 1.0, ffn: -1.0}, says=above())
        for place, (attention, ffn) in rows.items()
        for measure in MEASURES
    ]
    beside = [
        swaps.cost(f"cost of {component}, {place}", measure, {at: 1.0})
        for place, both in rows.items()
        for component, at in zip(("attention", "the FFN"), both, strict=True)
        for measure in MEASURES
    ]
    beside += _paper(found)
    return numbers, beside


def _paper(found: evidence.Results) -> list[dict]:
    """The paper's FFN swap, from its own file."""
    try:
        ffn = interventions.swaps(found, "ffn_lsn_swap", "ffn_lsn_rich")
    except evidence.Missing:
        return []
    row = ffn.sets[ffn.own]
    found.refuse_other_layers(ffn.file.path, row.get("asked", row["layers"]), "lsn_layers", "layers")
    return [ffn.cost("cost of the FFN in LSN-rich layers, as the paper swaps it", measure, {ffn.own: 1.0})
            for measure in MEASURES]  # fmt: skip
