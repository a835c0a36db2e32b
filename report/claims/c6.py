"""C6. Is the interface needed more than the hub and than a set of its shape, and does it change more than the hub?"""

from __future__ import annotations

import math

from cpt_utils.base import cli, languages, stats
from cpt_utils.measures.verdicts import Panel, above, number

evidence, interventions = cli.sibling("report/evidence.py"), cli.sibling("report/interventions.py")

TEXT = "it is the interface that CPT retargets: it changes more than the hub, and the gain needs that change"
ON_LAYERS = True
PANEL = Panel("the interface retargets", "share of the gain a layer; log of the ratio")


def measure(found: evidence.Results) -> tuple[list[dict], list[dict]]:
    beside = correlation(found)
    change = found.file("int_and_sem", "int_and_sem")
    step, sizes = str(found.last["step"]), {}
    found.refuse_part_of_run(change, change.payload["checkpoints"])
    for group, key in (("interface", "interface_layers"), ("semantic_hub", "semantic_layers")):
        layers = change.header["layers"][group]["layers"]
        found.refuse_other_layers(change.path, layers, "layers", key)
        sizes[group] = len(layers)
    interface, hub = (change.at("checkpoints", step, f"{group}_avg") for group in sizes)
    if not (interface > 0 and hub > 0):
        raise evidence.Missing(f"{change.path.name}: nothing changed in the interface or in the hub")
    ratio = number("log of the interface's change over the hub's", math.log(interface / hub), says=above())
    arms, numbers = interventions.arms(found), []
    sizes["a set of its shape"] = sizes["interface"]
    for words, group, what in (
        ("hub", "semantic_hub", "freeze hub"),
        ("a set of its shape", "a set of its shape", "freeze matched:interface:"),
    ):

        def more(base, plain, interface, other, group=group):
            """Share of the gain that a frozen layer costs, interface minus other; by layer, as sizes may differ."""
            cost = (plain - interface) / sizes["interface"] - (plain - other) / sizes[group]
            return cost / (plain - base)

        name = f"gain lost by a frozen layer, interface minus {words}"
        try:
            both = {"interface": arms.named("freeze interface"), "other": arms.named(what)}
        except evidence.Missing as reason:
            numbers += [number(f"{name}, {words}", None, note=str(reason), says=above()) for words in ("loss", "task")]
            continue
        measures = ("nll_per_byte", "task_accuracy")
        numbers += [arms.number(name, measure, both, more, says=above()) for measure in measures]
        beside.append(arms.number(name, "retrieval_readout", both, more))
    for arm in (name for name in arms.models if name not in ("base", "plain")):
        for measure in ("nll_per_byte", "task_accuracy", "retrieval_readout"):
            value = lambda base, plain, arm: (arm - base) / (plain - base)  # noqa: E731
            beside.append(arms.number(f"share of the gain reached, {arm}", measure, {"arm": arm}, value))
    return [*numbers, ratio], beside


def correlation(found: evidence.Results) -> list[dict]:
    """Correlation of first differences of task accuracy and interface change; raw curves that grow correlate."""
    try:
        file = found.file("downstream", "downstream_correlation")
    except evidence.Missing:
        return []
    values, metric, task = file.payload["values"], file.payload["metric"], str(file.payload.get("task"))
    target, language = found.study.get("languages.target"), task.partition("_")[2]
    if target and languages.canonical(language, any_tag=True) and not languages.same(language, target):
        raise file.refused(f"is about {task}, not {target}")
    steps = sorted(int(step) for step in values if int(step))
    found.refuse_part_of_run(file, steps)
    accuracy, change = ([file.at("values", str(step), key) for step in steps] for key in (metric, "interface_avg"))
    row = stats.correlation(stats.first_differences(change), stats.first_differences(accuracy))
    name = "r of first differences, accuracy with interface change"
    return [number(name, row["correlation"], (row["ci_low"], row["ci_high"]), row["n_points"], "points")]
