"""C6. First differences over checkpoints: the task's accuracy with the change of interface layers."""

from __future__ import annotations

from cpt_utils.base import cli, experiments, stats
from cpt_utils.base.errors import InputError
from cpt_utils.measures.verdicts import WORTH, Panel, Verdict, above, below, correlated, decide, too_short

evidence = cli.sibling("report/evidence.py")

TEXT = "downstream accuracy follows the change of interface layers"
ON_LAYERS = True
PANEL = Panel("accuracy follows interface change", "r of first differences (dotted: .3)", line=WORTH)


def rule(accuracy: list[float], change: list[float]) -> Verdict:
    """Downstream accuracy follows the change of interface layers: one value each a checkpoint, in step order."""
    steps = stats.first_differences(change), stats.first_differences(accuracy)
    row = correlated("r(accuracy, interface change)", stats.correlation(*steps))
    beside = [
        correlated("r, raw curves", stats.correlation(change, accuracy)),
        correlated("Spearman's r, first differences", stats.correlation(*steps, method="spearman")),
    ]
    yes, no = above(row), below(row, WORTH)
    if no:
        reason = f"r on first differences is below {WORTH}"
    elif yes:
        reason = "r on first differences is above 0"
    else:
        reason = too_short([row], len(change)) or f"r on first differences is neither above 0 nor below {WORTH}"
    return Verdict(decide(yes, no), reason, [row], beside)


def judge(found: evidence.Results) -> Verdict:
    path = found.path("downstream")
    payload, _ = found.json(path, "downstream_correlation")
    values, metric = payload.get("values") or {}, payload.get("metric")
    rows = [values[step] for step in sorted(values, key=int) if int(step)]
    if not rows or any(not isinstance(row.get(key), float | int) for row in rows for key in (metric, "interface_avg")):
        raise InputError(
            f"{path} lacks accuracy or interface change of a checkpoint; run {experiments.made_by('downstream')} again"
        )
    found.refuse_part_of_run(path, [int(step) for step in values])
    made = rule([row[metric] for row in rows], [row["interface_avg"] for row in rows])
    hub = payload.get("semantic_hub") or {}
    if hub.get("first_differences"):
        made.beside.append(correlated("r(accuracy, hub change), first differences", hub["first_differences"]))
    return made
