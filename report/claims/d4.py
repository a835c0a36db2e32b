"""D4. How much better a checkpoint is with its least changed heads put back, on items that did not choose how many."""

from __future__ import annotations

from cpt_utils.base import cli
from cpt_utils.measures.verdicts import Panel, above

evidence, rewound = cli.sibling("report/evidence.py"), cli.sibling("report/rewound.py")

TEXT = "putting heads back to the base helps (Diffract)"
ON_LAYERS = False
PANEL = Panel("putting heads back helps", "better than the checkpoint, held-out items")
MEASURES = ("nll_per_byte", "task_accuracy")
BETTER = "better by, with some of these put back:"


def measure(found: evidence.Results) -> tuple[list[dict], list[dict]]:
    file, beside = rewound.Rewound(found), []
    numbers = [file.best(f"{BETTER} least changed heads", "importance", one, says=above()) for one in MEASURES]
    for measure in file.measures:
        if measure not in MEASURES:
            beside.append(file.best(f"{BETTER} least changed heads", "importance", measure))
        # If random heads help as much, any smaller update would help, whichever heads are put back.
        others = {"greedy": f"{BETTER} cheapest heads", "random": f"{BETTER} random heads"}
        beside += [file.best(words, curve, measure) for curve, words in others.items() if curve in file.curves]
    return numbers, beside
