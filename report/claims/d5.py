"""D5. How much more of the update can be cut off than if the same update were a random one."""

from __future__ import annotations

from cpt_utils.base import cli
from cpt_utils.measures.verdicts import Panel, above, number, of_row

evidence, interventions = cli.sibling("report/evidence.py"), cli.sibling("report/interventions.py")

TEXT = "the update is low-rank: more of its singular values can be cut off than of a random update's (Diffract)"
ON_LAYERS = False
PANEL = Panel("the update is low-rank", "share cut off, beyond a random update's")
LOSS = "nll_per_byte"


def measure(found: evidence.Results) -> tuple[list[dict], list[dict]]:
    file = found.file("truncate", "truncate")
    payload = file.payload
    if (payload.get("by"), payload.get("embeddings")) != ("matrix", False):
        raise file.refused("cuts matrices head by head, or embeddings with them")
    largest, beyond = payload["largest"].get("svd"), (payload["beyond"].get("svd") or {}).get("as_random")
    if not largest or beyond is None or LOSS not in largest:
        raise evidence.Missing(
            f"{file.path.name} lacks the curves svd and as_random, or the loss (made by {file.made_by})"
        )

    def numbered(name: str, row: dict | None, measure: str, **more) -> dict:
        of = interventions.words(measure)
        if row is None:
            return number(f"{name}, {of}", None, note=f"CPT's gain in {of} is not clear", **more)
        return of_row(f"{name}, {of}", row, **more)

    kept = "share cut off that keeps 95 % of the gain, minus that of the update as if random"
    beside = []
    for measure, row in largest.items():
        if measure == "retrieval_mean":  # also says how deep the layers lie
            continue
        if measure != LOSS:
            beside.append(numbered(kept, beyond[measure]["at"]["kept"], measure))
        # By one standard error: with many documents, near 0 in loss for both updates.
        beside.append(numbered("q* minus that of the update as if random", beyond[measure]["at"], measure))
        beside.append(numbered("q*", row["at"], measure))
        beside.append(numbered("share cut off that keeps 95 % of the gain", row["at"]["kept"], measure))
        more = row["at"]["value"] - file.at("at_equal_energy", measure)
        of = interventions.words(measure)
        beside.append(number(f"q* minus the share at which a random update has its energy, {of}", more))
    beside.append(number("parameters of the matrices in millions", file.at("parameters") / 1e6))
    return [numbered(kept, beyond[LOSS]["at"]["kept"], LOSS, says=above())], beside
