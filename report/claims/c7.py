"""C7. How far a run that trains the outer quarter of the layers falls short of the plain run."""

from __future__ import annotations

from cpt_utils.base import cli
from cpt_utils.measures.verdicts import Panel, within

evidence, interventions = cli.sibling("report/evidence.py"), cli.sibling("report/interventions.py")

TEXT = "training only the outer 25 % of the layers comes within 3 % of training all (CogSym)"
ON_LAYERS = False
PANEL = Panel("outer 25 % within 3 % of all", "short of the plain run, share of its score")
MARGIN, WIDER = 0.03, 0.05  # of the plain run's score
MEASURES = ("nll_per_byte", "task_accuracy")


def short(base, plain, arm):
    """The shortfall, from values of which more is better (losses come negated)."""
    return (plain - arm) / abs(plain)


def parts(row: dict) -> bool:
    """Whether an arm trains only a part of the layers, or adapters: these are compared with the outer quarter."""
    return bool({"train_only", "lora"} & {*(row.get("what") or {})})


def measure(found: evidence.Results) -> tuple[list[dict], list[dict]]:
    arms, name = interventions.arms(found), "short of the plain run"
    outer = arms.named("train_only outer:0.25")

    def numbers(name: str, arm: str, **more) -> list[dict]:
        return [arms.number(name, one, {"arm": arm}, short, gained=False, **more) for one in MEASURES]

    beside = numbers(f"{name} (margin 5 %)", outer, says=within(WIDER))
    for arm, row in arms.models.items():
        # The base is the null: if it is within the margin, too, so is anything that was trained.
        if arm == "base" or (parts(row) and arm != outer):
            beside += numbers(f"{name}, {arm}", arm)
    return numbers(name, outer, says=within(MARGIN)), beside
