"""C7. How far a run that trains the outer quarter of the layers falls short of the plain run."""

from __future__ import annotations

from cpt_utils.base import cli
from cpt_utils.measures.verdicts import Panel, within

evidence, interventions = cli.sibling("report/evidence.py"), cli.sibling("report/interventions.py")

TEXT = "training only the outer 25 % of the layers comes within 3 % of training all (CogSym)"
ON_LAYERS = False
PANEL = Panel("outer 25 % within 3 % of all", "short of the plain run, share of its score")
MARGIN, WIDER = 0.03, 0.05  # of the plain run's score
OTHERS = ("first:", "last:", "middle:", "inner:", "spaced:", "random:")


def short(base, plain, arm):
    """Of values of which more is better, so that a loss is negative."""
    return (plain - arm) / abs(plain)


def measure(found: evidence.Results) -> tuple[list[dict], list[dict]]:
    arms, measures, name = interventions.arms(found), ("nll_per_byte", "task_accuracy"), "short of the plain run"
    outer = {"arm": arms.named("train_only outer:0.25")}
    numbers = [arms.number(name, one, outer, short, gained=False, says=within(MARGIN)) for one in measures]
    beside = [
        arms.number(f"{name} (margin 5 %)", one, outer, short, gained=False, says=within(WIDER)) for one in measures
    ]
    for arm, row in arms.models.items():
        if str((row.get("what") or {}).get("train_only", "")).startswith(OTHERS):
            beside += [arms.number(f"{name}, {arm}", one, {"arm": arm}, short, gained=False) for one in measures]
    return numbers, beside
