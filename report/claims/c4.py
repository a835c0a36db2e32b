"""C4. First differences over checkpoints: does attention go with LSN activation more closely than LSN weights do?"""

from __future__ import annotations

from cpt_utils.base import cli, experiments, languages, stats
from cpt_utils.base.errors import InputError
from cpt_utils.measures.verdicts import (
    WORTH,
    Panel,
    Verdict,
    above,
    below,
    correlated,
    decide,
    listed,
    too_short,
    whole_or_not,
)

evidence = cli.sibling("report/evidence.py")

TEXT = (
    "the change of attention in interface layers tracks the change of LSN activation more closely than the change of "
    "LSN weights does"
)
ON_LAYERS = True
PANEL = Panel("attention tracks LSN activation", "r of first differences (dotted: .3)", line=WORTH)


def rule(attention: list[float], gate: list[float], activation: list[float]) -> Verdict:
    """Attention tracks the change of activation more closely than the neurons' weights do.

    Args:
        attention, gate: change of interface attention and of the neurons' gates at each checkpoint, in step order.
        activation: the change of the neurons' activation above their control.
    """
    steps = [stats.first_differences(series) for series in (attention, gate, activation)]
    both, alone = stats.correlation_difference(*steps), stats.correlation(steps[0], steps[2])
    rows = [
        correlated("r(attention) minus r(LSN weights)", both, "difference"),
        correlated("r(attention)", alone),
    ]
    beside = [correlated("r(LSN weights)", stats.correlation(steps[1], steps[2]))]
    raw = stats.correlation_difference(attention, gate, activation)
    beside.append(correlated("r(attention) minus r(LSN weights), raw curves", raw, "difference"))
    for name, series in (("attention", attention), ("LSN weights", gate)):
        beside.append(correlated(f"r({name}), raw curves", stats.correlation(series, activation)))
    yes = above(rows[0]) and above(rows[1])
    no = below(rows[0]) or below(rows[1], WORTH)
    if yes and not no:
        reason = "attention goes with the activation, and more closely than the neurons' weights"
    elif no:
        said = ["the difference is below 0"] * below(rows[0])
        said += [f"r(attention) is below {WORTH}"] * below(rows[1], WORTH)
        reason = listed(said)
    else:
        reason = too_short(rows, len(attention)) or whole_or_not(rows, lambda row: not above(row), "not above 0")
    return Verdict(decide(yes, no), reason, rows, beside)


def judge(found: evidence.Results) -> Verdict:
    path = found.path("activation_correlation", f"{found.study.name}_correlation_strength.json")
    payload, header = found.json(path, "activation_correlation")
    target = found.study.get("languages.target")
    if target and header.get("language") and not languages.same(header["language"], target):
        raise InputError(f"{path} is about {header['language']}, not {target}; run that step again")
    if header.get("interface_layers"):
        found.refuse_other_layers(path, header["interface_layers"], "layers", "interface_layers")
    series = payload.get("series")
    if not series:
        raise InputError(f"{path} has no series; run {experiments.made_by('activation_correlation')} again")
    found.refuse_part_of_run(path, series["steps"])
    return rule(series["attention"], series["gate"], series["abs_d"])
