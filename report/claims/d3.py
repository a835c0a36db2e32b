"""D3. How much more of the update can be put back without harm with least changed heads than with random ones."""

from __future__ import annotations

from cpt_utils.base import cli
from cpt_utils.measures.verdicts import Panel, above

evidence, rewound = cli.sibling("report/evidence.py"), cli.sibling("report/rewound.py")

TEXT = "the heads that changed least can be put back (Diffract)"
ON_LAYERS = False
PANEL = Panel("least changed heads can be put back", "share put back, beyond random heads")


def measure(found: evidence.Results) -> tuple[list[dict], list[dict]]:
    file, loss = rewound.Rewound(found), "nll_per_byte"
    kept = "share of the update put back that keeps 95 % of the gain, least changed heads minus random ones"

    def by_energy(measure: str, *key: str) -> tuple:
        return ("importance:energy", "random:energy", measure, "energy", *key)

    beside = []
    for measure in file.measures:
        if measure != loss:
            beside.append(file.beyond(kept, *by_energy(measure, "kept")))
        # By one standard error: with many documents, near 0 in loss for both orders.
        beside.append(
            file.beyond("p*, least changed heads minus random ones, by share of the update", *by_energy(measure))
        )
        beside.append(file.at_equal_energy("better than random heads at equal shares of the update", measure))
        # By share of heads this holds by construction: heads that hardly changed are harmless to put back.
        of_heads = ("importance", "random", measure, "at")
        beside.append(file.beyond("p*, least changed heads minus random ones, by share of heads", *of_heads))
    return [file.beyond(kept, *by_energy(loss, "kept"), says=above())], beside
