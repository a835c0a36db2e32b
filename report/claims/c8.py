"""C8. Perception is learnt in early layers, production in late ones: not measured yet."""

from __future__ import annotations

from cpt_utils.base import cli
from cpt_utils.measures.verdicts import Panel

evidence = cli.sibling("report/evidence.py")

TEXT = "what is learnt early in the stack serves perception, what is learnt late production"
ON_LAYERS = False
PANEL = Panel("perception early, production late", "specialisation")


def measure(found: evidence.Results) -> tuple[list[dict], list[dict]]:
    raise evidence.Missing(
        "not measured: it needs sweeps that revert the stack from the input and from the output side (layer-ablation), "
        "with their specialisation A(perception) - A(production)"
    )
