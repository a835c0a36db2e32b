"""How far the gates of a language's own neurons move over continued pre-training (step 9).

For each checkpoint and layer: the mean |W_C - W_B| over the rows of the gate projection that belong to the neurons of
the mask (rows of the up projection in models without a gate; in a mixture of experts those of the neurons' experts).
With a control mask, the same of its random neurons.

In:   a base model B, a run of checkpoints C or a single one, a mask of lsn/identify.py and one of its languages.
Out:  OUT with `checkpoints`: {step: {layers: {layer_<l>: {gate_proj}}, control: {layer_<l>: {gate_proj}}}}, layers
      without neurons being absent; beside it a figure over steps (PDF, PNG), the base as step 0.

Full: python weight-diff/gate_lsn.py --base-model meta-llama/Llama-2-7b-hf --target-model cpt-eus --mask-file cpt.json --lang eus_Latn --output gate_lsn.json
Tiny: python weight-diff/gate_lsn.py --study demo/tiny.yaml
"""  # noqa: E501

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_utils.architectures import archs
from cpt_utils.base import cli, figures, languages, results
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import beside, refs
from cpt_utils.measures import masks

if TYPE_CHECKING:
    from cpt_utils.measures.compare import Change

SCHEMA = "gate_lsn"
RESULTS = {"gate_lsn": "weight-diff/gate_lsn.json"}
CAPTIONS = {
    "gate_lsn": """Part II: 3. Activation over CPT
        The mean absolute change of the weights that read the input of the new language's neurons, over training, and
        of the random control.""",
}
# The key in the file, also where there is no gate and the rows are those of the up projection: step 10 reads this one.
KEY = "gate_proj"


# ---------------------------------------------------------------- the method


def rows_change(change: Change, neurons: list[int]) -> float:
    """The mean |dW| over the rows `neurons` of a projection."""
    return float(change.row_means[neurons].mean())


def mask_change(layers: dict[int, Change], mask: masks.Layers) -> dict[str, dict[str, float]]:
    """`{"layer_<l>": {"gate_proj": mean |dW|}}` over the layers in which the mask has neurons."""
    return {f"layer_{i}": {KEY: rows_change(layers[i], neurons)} for i, neurons in mask.items() if neurons}


def mean_over_layers(layers: dict[str, dict[str, float]]) -> float:
    """The mean over the layers present; each counts alike, however many neurons it has."""
    return sum(row[KEY] for row in layers.values()) / len(layers)


# ---------------------------------------------------------------- files


def fingerprint(mask: masks.Layers) -> str:
    """A short hash of a language's neurons: it tells masks apart, and stays when a file is written again."""
    return hashlib.sha256(json.dumps(list(mask.items())).encode()).hexdigest()[:16]


def draw(path: Path, payload: dict) -> None:
    """The language's neurons and the control over training steps, with the base."""
    n, layers = sum(payload["neurons"].values()), len(payload["neurons"])
    looks = {"lsn": (f"neurons of {payload['language']} (n = {n} in {layers} layers)", "target", "o", "-")}
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
    p = cli.parser(__doc__)
    p.add_argument("--base-model", "--base", metavar="B", help="base model; default: the study's base")
    p.add_argument(
        "--target-model",
        "--run",
        nargs="+",
        metavar="RUN",
        help="run of checkpoints, one, or a list; default: the study's run",
    )
    p.add_argument("--mask-file", metavar="MASK", help="mask of lsn/identify.py; default: the study's")
    p.add_argument(
        "--control-mask", metavar="MASK", help="its random control; default: MASK with .control.json, if it is there"
    )
    p.add_argument("--lang", metavar="g", help="language of the mask; default: the study's languages.target")
    p.add_argument("--output", metavar="OUT", help="JSON to write; default: the study's weight-diff/gate_lsn.json")
    p.add_argument("--device", default="cpu", help="where differences are taken: cpu, auto, cuda, cuda:1; default cpu")
    p.add_argument("--limit", type=cli.positive, metavar="N", help="only the first N checkpoints (for a try; marked)")
    cli.add_run_flags(p, drop=True)
    return p


def what_of(head: dict) -> dict:
    """Which neurons a header is about."""
    return {fact: head.get(fact) for fact in ("language", "mask", "control")}


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed)
    base = refs.model(study.value(args.base_model, "--base-model", "base"))
    target = study.value(args.target_model, "--target-model", "run")
    target = target[0] if isinstance(target, list) and len(target) == 1 else target
    everything = refs.run(target)
    run = refs.run(target, args.steps)[: args.limit]
    lang = study.value(args.lang, "--lang", "languages.target")
    device = cli.device(args.device)
    mask_file = study.input(args.mask_file, "--mask-file", "lsn_mask")
    if args.control_mask is not None:
        how = " --control-mask-out"
        control_file = study.input(args.control_mask, "--control-mask", "lsn_control", how)
    else:
        control_file = masks.control_beside(mask_file)
    if control_file is None:
        cli.say("no control mask: the language's neurons are compared with nothing")
    other = beside.name(study, args.base_model, args.target_model, args.steps, args.limit, args.lang)
    output = study.output(args.output, "--output", "gate_lsn", other)

    config = base.config()
    arch = archs.for_config(config)
    projection = arch.neuron_projection
    weights = cli.sibling("weight-diff/attn_vs_ffn.py")
    facts = weights.run_facts(base, run, len(everything), args.limit)
    known = [base.describe(), *(ref.describe() for ref in everything)]
    widths = [arch.ffn_width(config, layer) for layer in range(facts["n_layers"])]
    own, control = masks.read_both(mask_file, control_file, lang, len(widths), widths, known)
    chosen = {"layers": own} | ({"control": control} if control else {})
    facts |= {
        "ffn_width": max(widths),
        "language": languages.canonical(lang, any_tag=True),
        "projection": projection,
        "mask": fingerprint(chosen["layers"]),
        "control": fingerprint(chosen["control"]) if control_file else None,
        "mask_file": mask_file,
        "control_file": control_file,
        "seed": study.seed,
    }
    if weights.made_already(output, SCHEMA, facts, args.overwrite, what_of):
        cli.say(f"{output} is finished (--overwrite redoes it)")
        return

    from cpt_utils.measures import compare

    changes: compare.Changes = {}
    for group in refs.one_at_a_time(run, args.drop_revisions, base):
        changes |= compare.changes(base, group, projections=[projection], rows=[projection], device=device)
    checkpoints = {}
    for ref in run:
        here = {layer: found[projection] for layer, found in changes[ref.step].items() if projection in found}
        row: dict = {group: mask_change(here, mask) for group, mask in chosen.items()}
        row["summary"] = {"lsn": mean_over_layers(row["layers"])}
        if control_file:
            row["summary"]["control"] = mean_over_layers(row["control"])
        checkpoints[str(ref.step)] = row
    payload = {
        "base_model": base.spec,
        "target_model": target,
        "language": lang,
        "projection": projection,
        "has_control": control_file is not None,
        "neurons": {str(layer): len(neurons) for layer, neurons in chosen["layers"].items() if neurons},
        "checkpoints": checkpoints,
    }
    draw(output.with_suffix(""), payload)
    results.write_json(output, payload, results.header(SCHEMA, **facts, dtype="float32", device=device.type))
    n, layers = sum(payload["neurons"].values()), len(payload["neurons"])
    cli.say(f"{n} neurons of {lang} in {layers} of {facts['n_layers']} layers, rows of {projection}")
    for step, row in checkpoints.items():
        control = f", random control {row['summary']['control']:.3e}" if control_file else ""
        cli.say(f"step {step}: mean |dW| {row['summary']['lsn']:.3e}{control}")
    cli.say(f"wrote {output} and the figure {output.with_suffix('.pdf')}")


if __name__ == "__main__":
    cli.run(main)
