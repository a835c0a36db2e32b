"""C4. How far LSN activation still changes with the interface's attention, or the neurons' own weights, frozen."""

from __future__ import annotations

from cpt_utils.base import cli, languages, stats
from cpt_utils.measures.verdicts import Panel, above, number

evidence, interventions = cli.sibling("report/evidence.py"), cli.sibling("report/interventions.py")

TEXT = "attention in interface layers, more than the neurons' own weights, brings the change of LSN activation"
ON_LAYERS = True
PANEL = Panel("attention routes the LSNs", "share of the change reached")


def measure(found: evidence.Results) -> tuple[list[dict], list[dict]]:
    beside = correlations(found)  # first, so that they are checked whether or not there are arms
    arms = interventions.arms(found)
    both = {"attention": arms.named("freeze interface/attention"), "lsn": arms.named("freeze lsn")}
    name = "share reached, neurons frozen minus interface attention frozen"
    numbers = [
        arms.number(
            name, "lsn_activation", both, lambda base, plain, attention, lsn: (lsn - attention) / (plain - base),
            says=above(),
        )
    ]  # fmt: skip
    for words, role in (("interface attention", "attention"), ("neurons", "lsn")):
        name = f"share of the change reached, {words} frozen"
        value = lambda base, plain, arm: (arm - base) / (plain - base)  # noqa: E731
        beside.append(arms.number(name, "lsn_activation", {"arm": both[role]}, value))
    return numbers, beside


def correlations(found: evidence.Results) -> list[dict]:
    """Correlation over checkpoints of first differences: LSN activation with attention and with the neurons' weights.

    They decide nothing: curves that grow together correlate, and attention and neurons change together.
    """
    try:
        file = found.file(
            "activation_correlation", "activation_correlation", f"{found.study.name}_correlation_strength.json"
        )
    except evidence.Missing:
        return []
    target, language = found.study.get("languages.target"), file.header.get("language")
    if target and language and not languages.same(language, target):
        raise file.refused(f"is about {language}, not {target}")
    if not file.header.get("interface_layers"):
        raise file.refused("does not say which interface layers it is about")
    found.refuse_other_layers(file.path, file.header["interface_layers"], "layers", "interface_layers")
    series = file.payload["series"]
    found.refuse_part_of_run(file, series["steps"])
    numbers = []
    for words, key in (("attention", "attention"), ("LSN weights", "gate")):
        steps = []
        for name in (key, "abs_d"):
            points = evidence.File(file.path, file.made_by, dict(enumerate(series[name])), {})
            steps.append(stats.first_differences([points.at(i) for i in range(len(series["steps"]))]))
        row = stats.correlation(*steps)
        name = f"r of first differences, {words} with LSN activation"
        numbers.append(number(name, row["correlation"], (row["ci_low"], row["ci_high"]), row["n_points"], "points"))
    return numbers
