"""How far the gate rows of a language's neurons move over continued pre-training (step 9).

For each checkpoint and layer: the mean |W_C - W_B| over the rows of the gate projection that belong to the neurons of
the mask (rows of the up projection in models without a gate; in a mixture of experts those of the neurons' experts).
With a control mask, the same for its random neurons.

In:   a base model B, a run of checkpoints C or a single one, a mask of lsn/identify.py and one of its languages.
Out:  OUT with `checkpoints`: {step: {layers: {layer_<l>: {gate_proj}}, control: {layer_<l>: {gate_proj}}}}, layers
      without neurons being absent; next to it a figure over steps (PDF, PNG), the base as step 0.

Full: python weight-diff/gate_lsn.py --base-model meta-llama/Llama-2-7b-hf --target-model cpt-eus --mask-file cpt.json --lang eus_Latn --output gate_lsn.json
Tiny: python weight-diff/gate_lsn.py --study demo/tiny.yaml
"""  # noqa: E501

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, figures, languages, results
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import beside
from cpt_utils.measures import masks
from cpt_utils.measures.compare import Change

compared = cli.sibling("weight-diff/compared.py")

SCHEMA = "gate_lsn"
RESULTS = {"gate_lsn": "weight-diff/gate_lsn.json"}
ASKED = {"gate_lsn": "Do the weights that these neurons read with change more than those of random neurons?"}
CAPTIONS = {
    "gate_lsn": """Part II: 3. Activation over CPT
        The mean absolute change, over training, of the weights with which the new language's neurons read their input,
        and the same for the random control.""",
}
# The key in the file, even if there is no gate and the rows are those of the up projection: step 10 reads this key.
KEY = "gate_proj"
SUMMARY = {"layers": "lsn", "control": "control"}  # mask -> key of its mean over layers


# ---------------------------------------------------------------- the method


def mask_change(layers: dict[int, Change], mask: masks.Layers) -> dict[str, dict[str, float]]:
    """`{"layer_<l>": {"gate_proj": mean |dW| over its neurons' rows}}`, for the layers in which the mask has any."""
    return {f"layer_{i}": {KEY: float(layers[i].row_means[neurons].mean())} for i, neurons in mask.items() if neurons}


def mean_over_layers(layers: dict[str, dict[str, float]]) -> float:
    """The mean over the layers present, weighted equally however many neurons they have."""
    return sum(row[KEY] for row in layers.values()) / len(layers)


def measure(models, projection: str, chosen: dict[str, masks.Layers], lang: str, drop: bool, device) -> dict:
    """The payload: the change of the rows of each mask in `chosen`, "layers" and perhaps "control", by step."""
    changes = models.changes(drop, projections=[projection], rows=[projection], device=device)
    checkpoints = {}
    for ref in models.run:
        by_layer = {layer: each[projection] for layer, each in changes[ref.step].items() if projection in each}
        row: dict = {group: mask_change(by_layer, mask) for group, mask in chosen.items()}
        row["summary"] = {name: mean_over_layers(row[group]) for group, name in SUMMARY.items() if group in chosen}
        checkpoints[str(ref.step)] = row
    return {
        "base_model": models.base.spec,
        "target_model": models.target,
        "language": lang,
        "projection": projection,
        "has_control": "control" in chosen,
        "neurons": {str(layer): len(neurons) for layer, neurons in chosen["layers"].items() if neurons},
        "checkpoints": checkpoints,
    }


# ---------------------------------------------------------------- files


def fingerprint(mask: masks.Layers) -> str:
    """A short hash of a language's neurons: it differs between masks, and not when the same file is rewritten."""
    return hashlib.sha256(json.dumps(list(mask.items())).encode()).hexdigest()[:16]


def draw(path: Path, payload: dict) -> None:
    """The language's neurons and the control over training steps, with the base."""
    n, layers = sum(payload["neurons"].values()), len(payload["neurons"])
    looks = {"lsn": (f"{figures.language(payload['language'])}: {n} neurons in {layers} layers", "target", "o", "-")}
    if payload["has_control"]:
        looks["control"] = ("random control (as many)", "random", "s", "--")
    lines = [
        {
            "values": [row["summary"][key] for row in payload["checkpoints"].values()],
            "label": label, "color": figures.colour(meaning), "marker": marker, "linestyle": line,
        }
        for key, (label, meaning, marker, line) in looks.items()
    ]  # fmt: skip
    rows = payload["projection"].removesuffix("_proj")
    figures.changes_over_steps(path, [int(step) for step in payload["checkpoints"]], lines, f"mean |ΔW| of {rows} rows")


# ---------------------------------------------------------------- the command


def build_parser():
    p = compared.parser(__doc__, "--target-model", "the study's weight-diff/gate_lsn.json")
    p.add_argument("--mask-file", metavar="MASK", help="mask of lsn/identify.py; default: the study's")
    text = "its random control; default: MASK with .control.json, if it exists"
    p.add_argument("--control-mask", metavar="MASK", help=text)
    p.add_argument("--lang", metavar="g", help="language of the mask; default: the study's languages.target")
    return p


def what_of(head: dict) -> dict:
    """The facts of a header that identify its neurons."""
    return {fact: head.get(fact) for fact in ("language", "mask", "control")}


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    models = compared.Compared.from_arguments(args, study, "--target-model")
    lang = study.value(args.lang, "--lang", "languages.target")
    device = cli.device(args.device)
    mask_file = study.input(args.mask_file, "--mask-file", "lsn_mask")
    if args.control_mask is not None:
        how = " --control-mask-out"
        control_file = study.input(args.control_mask, "--control-mask", "lsn_control", how)
    else:
        control_file = masks.control_beside(mask_file)
    if control_file is None:
        cli.say("no control mask: there is nothing to compare the language's neurons with")
    other = beside.name(study, args.base_model, args.run, args.steps, args.limit, args.lang)
    output = study.output(args.output, "--output", "gate_lsn", other)

    config = models.base.config()
    arch = archs.for_config(config)
    facts = models.facts()
    widths = [arch.ffn_width(config, layer) for layer in range(facts["n_layers"])]
    specific, control = masks.read_both(mask_file, control_file, lang, len(widths), widths, models.known())
    chosen = {"layers": specific} | ({"control": control} if control else {})
    facts |= {
        "ffn_width": max(widths),
        "language": languages.canonical(lang, any_tag=True),
        "projection": arch.neuron_projection,
        "mask": fingerprint(specific),
        "control": fingerprint(control) if control_file else None,
        "mask_file": mask_file,
        "control_file": control_file,
        "seed": study.seed,
    }
    if compared.made_already(output, SCHEMA, facts, args.overwrite, what_of):
        cli.say(f"{output} is finished (--overwrite redoes it)")
        return
    payload = measure(models, arch.neuron_projection, chosen, lang, args.drop_revisions, device)
    draw(output.with_suffix(""), payload)
    results.write_json(output, payload, results.header(SCHEMA, **facts, dtype="float32", device=device.type))
    n, layers = sum(payload["neurons"].values()), len(payload["neurons"])
    cli.say(f"{n} neurons of {lang} in {layers} of {facts['n_layers']} layers, rows of {payload['projection']}")
    for step, row in payload["checkpoints"].items():
        control = f", random control {row['summary']['control']:.3e}" if control_file else ""
        cli.say(f"step {step}: mean |dW| {row['summary']['lsn']:.3e}{control}")
    cli.say(f"wrote {output} and the figure {output.with_suffix('.pdf')}")


if __name__ == "__main__":
    cli.run(main)
