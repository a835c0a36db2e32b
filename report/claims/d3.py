"""D3. How much more of the update least changed heads take back without harm than random ones do."""

from __future__ import annotations

from cpt_utils.base import cli
from cpt_utils.measures.verdicts import Panel, above

evidence, rewound = cli.sibling("report/evidence.py"), cli.sibling("report/rewound.py")

TEXT = "the heads that changed least can be put back (Diffract)"
ON_LAYERS = False
PANEL = Panel("least changed heads can be put back", "p* beyond random heads")


def measure(found: evidence.Results) -> tuple[list[dict], list[dict]]:
    file = rewound.Rewound(found)
    share = "p* of least changed heads minus random ones, by share of the update"
    numbers = [file.beyond(share, "importance:energy", "random:energy", "nll_per_byte", "energy", says=above())]
    kept = "share that keeps 95 % of the gain, least changed minus random, by share of the update"
    beside = []
    for measure in file.measures:
        by_energy = ("importance:energy", "random:energy", measure, "energy")
        if measure != "nll_per_byte":
            beside.append(file.beyond(share, *by_energy))
        beside.append(file.beyond(kept, *by_energy, "kept"))
        beside.append(file.at_equal_energy("better than random heads at equal shares of the update", measure))
        # By the share of heads it is so by construction: heads that hardly changed are harmless to put back.
        beside.append(
            file.beyond("p*, least changed minus random, by share of heads", "importance", "random", measure, "at")
        )
    return numbers, beside
