"""How much the weights of interface layers and of the semantic hub change over continued pre-training (step 3).

For each checkpoint and layer: the mean over projections (q, k, v, o, gate, up, down; six without a gate) of the mean
|W_C - W_B| over a weight matrix; then the mean of this over the interface layers, and over the hub layers.

In:   a base model B, a run of checkpoints C (or a single one), and the layers of step 2.
Out:  OUT with `checkpoints`: {step: {interface_avg, semantic_hub_avg}} and `layers`: {step: {layer: mean |dW|}};
      next to it a figure over steps (PDF, PNG), the base as step 0.

Full: python weight-diff/int_and_sem.py --base-model meta-llama/Llama-2-7b-hf --target-dir cpt-eus --interface-json layers.json --hub-json layers.json --output int_and_sem.json
Tiny: python weight-diff/int_and_sem.py --study demo/tiny.yaml
"""  # noqa: E501

from __future__ import annotations

from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, figures, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import beside
from cpt_utils.measures import gate, layer_lists
from cpt_utils.measures.compare import Change

compared = cli.sibling("weight-diff/compared.py")

SCHEMA = "int_and_sem"
RESULTS = {"int_and_sem": "weight-diff/int_and_sem.json"}
ASKED = {"int_and_sem": "Do the weights of interface layers change more than those of hub layers?"}
CAPTIONS = {
    "weight_change": """Part I: 3. Downstream task and weight change
        Mean absolute weight change against the base over training steps, averaged over the projections of a layer and
        then over interface layers and over hub layers. Step 0 is the base itself.""",
}
GROUPS = ("interface", "semantic_hub")


# ---------------------------------------------------------------- the method


def layer_changes(layers: dict[int, dict[str, Change]]) -> list[float | None]:
    """The change of each layer [L]: the mean over its projections of the mean |dW|, each projection weighted equally.

    The router of a mixture of experts is not a projection, and all experts together are one. A layer without attention
    has only its FFN's projections, and vice versa; None for a layer with neither.
    """
    by_layer = [[change for name, change in layers[i].items() if name in archs.PROJECTIONS] for i in sorted(layers)]
    return [sum(change.mean_abs for change in layer) / len(layer) if layer else None for layer in by_layer]


def group_mean(change: list[float | None], layers: list[int]) -> float:
    """The mean change of a group of layers, over those that have projections.

    Raises:
        InputError: none of them has any.
    """
    values = [change[layer] for layer in layers if change[layer] is not None]
    if not values:
        raise InputError(f"none of the layers {layers} has attention or an FFN: there is no change to average")
    return sum(values) / len(values)


# ---------------------------------------------------------------- files


def read_groups(files: dict[str, Path], n_layers: int, models: list[dict]) -> dict[str, list[int]]:
    """The layers of both groups; layers in neither are reported.

    Raises:
        InputError: see `layer_lists.read_layers`, or a layer in both groups.
    """
    groups = {
        group: layer_lists.read_layers(path, group, n_layers, models, averaged=True)[0] for group, path in files.items()
    }
    both = sorted(set(groups["interface"]) & set(groups["semantic_hub"]))
    if both:
        raise InputError(f"layers {both} are in both groups; give the interface and the hub of one split")
    neither = sorted(set(range(n_layers)) - set(groups["interface"]) - set(groups["semantic_hub"]))
    if neither:
        cli.say(f"layers {neither} are in neither group and are left out")
    return groups


def draw(path: Path, steps: list[int], averages: dict[str, list[float]], counts: dict[str, int]) -> None:
    """Both groups over training steps, with the base."""
    looks = {"interface": ("interface", "s", "-"), "semantic_hub": ("hub", "o", "--")}
    lines = [
        {
            "values": averages[group], "color": figures.colour(meaning), "marker": marker, "linestyle": line,
            "label": figures.group(meaning, counts[group]),
        }
        for group, (meaning, marker, line) in looks.items()
    ]  # fmt: skip
    figures.changes_over_steps(path, steps, lines, "mean |ΔW| from the base")


# ---------------------------------------------------------------- the command


def build_parser():
    p = compared.parser(__doc__, "--target-dir", "the study's weight-diff/int_and_sem.json")
    for flag, what in (("--interface-json", "interface"), ("--hub-json", "semantic hub")):
        p.add_argument(flag, metavar="F", help=f"JSON with the {what} layers; default: step 2's file of the study")
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    models = compared.Compared.from_arguments(args, study, "--target-dir")
    device = cli.device(args.device)
    other = beside.name(study, args.base_model, args.run, args.steps, args.limit)
    output = study.output(args.output, "--output", "int_and_sem", other)
    facts = models.facts()
    files = {
        group: study.input(given, flag, "layers")
        for group, given, flag in (
            ("interface", args.interface_json, "--interface-json"),
            ("semantic_hub", args.hub_json, "--hub-json"),
        )
    }
    groups = read_groups(files, facts["n_layers"], models.known())
    passed = gate.carried(*files.values())
    chosen = {group: {"layers": groups[group], "file": str(path)} for group, path in files.items()}
    facts = {"models": facts["models"], "n_layers": facts["n_layers"], "layers": chosen} | facts
    facts["seed"] = study.seed
    if compared.made_already(output, SCHEMA, facts, args.overwrite, groups_of):
        cli.say(f"{output} is finished (--overwrite redoes it)")
        return
    changes = models.changes(args.drop_revisions, device=device)
    by_layer = {ref.step: layer_changes(changes[ref.step]) for ref in models.run}
    averages = {group: [group_mean(change, layers) for change in by_layer.values()] for group, layers in groups.items()}
    payload = {
        "base_model": models.base.spec,
        "target_model": models.target,
        "checkpoints": {
            str(step): {f"{group}_avg": averages[group][i] for group in GROUPS} for i, step in enumerate(by_layer)
        },
        "layers": {str(step): {str(layer): value for layer, value in enumerate(by_layer[step])} for step in by_layer},
    }
    draw(output.with_suffix(""), list(by_layer), averages, {group: len(groups[group]) for group in GROUPS})
    # Differences are float32 and sums float64, whatever the models' dtypes.
    more = {"gate": passed, "dtype": "float32", "device": device.type}
    results.write_json(output, payload, results.header(SCHEMA, **facts, **more))
    for i, step in enumerate(by_layer):
        cli.say(f"step {step}: " + ", ".join(f"{group} {averages[group][i]:.3e}" for group in GROUPS))
    cli.say(f"wrote {output} and the figure {output.with_suffix('.pdf')}")


def groups_of(head: dict) -> dict:
    """The layers of both groups as a header records them, whichever file they came from."""
    return {f"{group} layers": chosen.get("layers") for group, chosen in head.get("layers", {}).items()}


if __name__ == "__main__":
    cli.run(main)
