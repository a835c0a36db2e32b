"""D6. The barrier on the straight line between two runs of one base, as a share of what the better one gained."""

from __future__ import annotations

from cpt_utils.base import cli
from cpt_utils.measures.verdicts import Panel, above, below, number, of_row

evidence, interventions = cli.sibling("report/evidence.py"), cli.sibling("report/interventions.py")

TEXT = "two runs of one base are connected by a straight line (Diffract)"
ON_LAYERS = False
PANEL = Panel("two runs are connected", "barrier, share of the gain")
BOUND = 0.1  # of the gain


def measure(found: evidence.Results) -> tuple[list[dict], list[dict]]:
    file = found.file("connect", "connect")
    if not file.payload.get("two_runs"):
        raise file.refused("connects a base and its checkpoint, not two runs")
    worst, beside = file.payload["worst"], []

    for measure, row in file.payload["measures"].items():
        if measure == "retrieval_mean":
            continue
        words = interventions.words(measure)
        for key, name in (("barrier", "barrier"), ("random", "the same along random directions")):
            # The null: if it is below the bound, too, any two models this close are connected.
            if (row.get(key) or {}).get("share"):
                beside.append(of_row(f"{name}, share of the gain, {words}", row[key]["share"], says=below(BOUND)))
        if "apart" in row:
            beside.append(of_row(f"random directions minus the line, {words}", row["apart"], says=above()))
    whole = file.payload["distance"]["all"]
    beside += [number("||A - C|| / ||B||", whole["distance"]), number("cosine of the two updates", whole["cosine"])]
    name = "barrier between the study's run and another run, share of the gain"
    if worst is None:
        return [number(name, None, note="CPT's gain is not clear in any loss", says=below(BOUND))], beside
    return [of_row(name, worst, says=below(BOUND))], beside
