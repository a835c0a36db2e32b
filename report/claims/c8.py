"""C8. How much more of the gain in perception than of that in production comes with the blocks near the input."""

from __future__ import annotations

from cpt_utils.base import cli
from cpt_utils.measures.verdicts import Panel, above, of_row

evidence = cli.sibling("report/evidence.py")

TEXT = "what is learnt early in the stack serves perception, what is learnt late production"
ON_LAYERS = False
PANEL = Panel("perception early, production late", "specialisation")


def measure(found: evidence.Results) -> tuple[list[dict], list[dict]]:
    file = found.file("layer_ablation", "ablation-sweep")
    if (file.header.get("component"), file.header.get("io")) != ("all", "cpt"):
        raise file.refused("reverts a component of the blocks, or embeddings and head with them")
    payload, scored = file.payload, (file.header.get("in_context") or {}).get("scored")

    def numbered(name: str, row: dict, **more) -> dict:
        return of_row(name, row, n=scored, of="sentences", **more, note=row.get("why"))

    beside = [numbered("specialisation of what the source saves", payload["specialisation_saved"])]
    for name in ("perception", "production"):
        row = payload["summary"].get(name) or {}
        none = {"value": None, "ci_low": None, "ci_high": None, "why": "the gain of CPT is not clear"}
        beside.append(numbered(f"A({name})", row.get("A") or none))
    return [numbered("specialisation", payload["specialisation"], says=above())], beside
