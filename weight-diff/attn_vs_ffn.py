"""Does continued pre-training move attention or the FFN more, layer by layer (step 5)?

For each checkpoint, layer and projection: the mean |W_C - W_B| over a weight matrix. Attention's change is the largest
of q, k, v, o, the FFN's the largest of gate, up, down; the means over projections are given as well, and both again for
the relative change ||dW|| / ||W_B||, which does not depend on the scale of a matrix. The router of a mixture of experts
is neither attention nor FFN; its change is listed separately.

In:   a base model B, and a run of checkpoints C or a single one.
Out:  OUT with `checkpoints`: {step: {layers: {layer_<l>: {attention_max, ffn_max, delta_attn_ffn, q_proj, ..}},
      summary: {attn, ffn}, ..}} and `pooled`: {step: {attention, ffn}}, ||dW|| / ||W_B|| over all weights of a
      component; next to it a figure of the last checkpoint (PDF, PNG), and with --details the change of every head and
      neuron (.pt).

Full: python weight-diff/attn_vs_ffn.py --base-model meta-llama/Llama-2-7b-hf --ckpt-model cpt-eus --output attn_vs_ffn.json
Tiny: python weight-diff/attn_vs_ffn.py --study demo/tiny.yaml
"""  # noqa: E501

from __future__ import annotations

import math
import os
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, figures, results
from cpt_utils.base.lazy import torch
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import beside, refs
from cpt_utils.measures.compare import Change, Changes, Sums

compared = cli.sibling("weight-diff/compared.py")

SCHEMA = "attn_vs_ffn"
RESULTS = {"attn_vs_ffn": "weight-diff/attn_vs_ffn.json"}
ASKED = {"attn_vs_ffn": "Which changes more, attention or the FFN?"}
CAPTIONS = {
    "attn_vs_ffn": """Part II: 1. Attention against FFN
        The mean absolute weight change of attention and of the FFN in every layer at the last checkpoint, by the
        maximum over projections (the paper's number) and by their mean: the maximum over four matrices tends to exceed
        that over three even if all change alike. Claim C3, attention changes more, is decided by neither, but by the
        relative change of all weights of each component.
        """,
}
SIDES = {"attention": archs.ATTENTION, "ffn": archs.FFN}
# Summary -> (whether of the relative change, how a layer's projections are reduced to one number).
SUMMARIES = {
    "summary": (False, "max"),
    "summary_mean": (False, "mean"),
    "summary_relative": (True, "max"),
    "summary_relative_mean": (True, "mean"),
}
# Further values written for each projection: key -> how it is read from a Change.
REST = {
    "max_abs": lambda change: change.max_abs,
    "frobenius": lambda change: change.sum_sq**0.5,
    "base_frobenius": lambda change: change.base_sq**0.5,
    "cosine": lambda change: change.cosine,
}
# The four values of every head and neuron, in the order of the file.
DETAILS = "mean_abs norm base_norm cosine_distance"


# ---------------------------------------------------------------- the method


def mean(values: list[float | None]) -> float | None:
    """The mean; None for no values, or if one is missing (a base matrix of zeros has no relative change)."""
    return None if None in values or not values else sum(values) / len(values)


def has(values: dict, side: str) -> bool:
    """Whether a layer with these values by projection has attention, or an FFN (`side`)."""
    return any(name in values for name in SIDES[side])


def sides(values: dict[str, float | None]) -> dict[str, float | None]:
    """`attention_max, ffn_max, attention_mean, ffn_mean` of a layer's values by projection; None for what it lacks."""
    row = {}
    for side, projections in SIDES.items():
        present = [values[name] for name in projections if name in values]
        row |= {f"{side}_max": None if None in present else max(present, default=None), f"{side}_mean": mean(present)}
    return row


def layer_row(changes: dict[str, Change]) -> dict:
    """Everything written for one layer: mean |dW|, under `relative` ||dW||_F / ||W_B||_F, and the values of REST."""
    absolute = {name: change.mean_abs for name, change in changes.items()}
    relative = {name: change.relative for name, change in changes.items()}
    row = sides(absolute)
    both = has(absolute, "attention") and has(absolute, "ffn")
    row["delta_attn_ffn"] = row["attention_max"] - row["ffn_max"] if both else None
    rest = {key: {name: read(change) for name, change in changes.items()} for key, read in REST.items()}
    return row | absolute | {"relative": sides(relative) | relative} | rest


def pairs(rows: list[dict], summary: str) -> list[tuple[float | None, float | None]]:
    """(attention, FFN) of each layer that has both, by the reading `summary` (a key of SUMMARIES)."""
    attention, ffn = (by_layer(rows, summary, side) for side in SIDES)
    return [(attention[layer], ffn[layer]) for layer in attention if layer in ffn]


def by_layer(rows: list[dict], summary: str, side: str) -> dict[int, float | None]:
    """Layer -> the change of attention or the FFN by the reading `summary`, for the layers that have it."""
    relative, how = SUMMARIES[summary]
    rows = [row["relative"] if relative else row for row in rows]
    return {layer: row[f"{side}_{how}"] for layer, row in enumerate(rows) if has(row, side)}


def checkpoint_row(layers: dict[int, dict[str, Change]]) -> dict:
    """Everything written for one checkpoint: its layers, the four summaries, and in how many layers attention is ahead.

    A summary is the mean over layers, `{"attn", "ffn"}`; `attention_above_ffn` counts layers by summary. A layer
    without attention, or without an FFN, is left out of those means and counts; `without` names such layers.
    """
    rows = {f"layer_{layer}": layer_row(layers[layer]) for layer in sorted(layers)}
    content: dict = {"layers": rows}
    ahead = {}
    for summary in SUMMARIES:
        attention, ffn = (by_layer(list(rows.values()), summary, side) for side in SIDES)
        content[summary] = {"attn": mean(list(attention.values())), "ffn": mean(list(ffn.values()))}
        both = pairs(list(rows.values()), summary)
        missing = any(None in pair for pair in both)
        ahead[summary] = None if missing else sum(a > b for a, b in both)
    without = {side: [i for i, row in enumerate(rows.values()) if not has(row, side)] for side in SIDES}
    content |= {"without": without} if any(without.values()) else {}
    return content | {"attention_above_ffn": ahead}


def pooled(layers: dict[int, dict[str, Change]]) -> dict[str, float | None]:
    """||dW||_F / ||W_B||_F over all weights of attention, and of the FFN: one relative change each, whatever the number
    and sizes of their projections; None if there are none, or all of the base's weights are 0.
    """
    relative = {}
    for side, projections in SIDES.items():
        present = [changes[name] for changes in layers.values() for name in projections if name in changes]
        base = math.fsum(change.base_sq for change in present)
        relative[side] = (math.fsum(change.sum_sq for change in present) / base) ** 0.5 if base else None
    return relative


def detail_arrays(found: Changes) -> dict[str, torch.Tensor | str]:
    """The tensors of `--details`: `<step>.layer_<l>.<projection>.heads` or `.neurons`, [4, heads or neurons] each."""
    arrays: dict[str, torch.Tensor | str] = {"values": DETAILS}
    for step, layers in found.items():
        for layer, changes in layers.items():
            for name, change in changes.items():
                for kind, sums in (("heads", change.heads), ("neurons", change.neurons)):
                    if sums is not None:
                        arrays[f"{step}.layer_{layer}.{name}.{kind}"] = detail_values(sums)
    return arrays


def detail_values(sums: Sums) -> torch.Tensor:
    """The values of DETAILS of each head or neuron, [4, n], in the dtype of the sums."""
    values = sums.values.new_empty(4, sums.values.shape[1])
    values[0], values[1:3], values[3] = sums.mean_abs, sums.values[1:3].sqrt(), sums.cosine_distance
    return values


# ---------------------------------------------------------------- the figure


def draw(path: Path, payload: dict) -> None:
    """Attention and FFN by layer at the last checkpoint: the largest projection, and the mean over projections."""
    step = max(payload["checkpoints"], key=int)
    rows = list(payload["checkpoints"][step]["layers"].values())
    titles = {"summary": "largest projection (of 4 against {n})", "summary_mean": "mean of the projections"}
    count = max(sum(name in row for name in archs.FFN) for row in rows)
    looks = (("attention", "attention", "s", "-"), ("FFN", "ffn", "o", "--"))
    with figures.style() as plt:
        figure, axes = plt.subplots(1, 2, figsize=(figures.PAGE, 2.5), sharey=True)
        for axis, (summary, title) in zip(axes, titles.items(), strict=True):
            for side, (label, meaning, marker, line) in zip(SIDES, looks, strict=True):
                curve = by_layer(rows, summary, side)
                axis.plot([*curve], [*curve.values()], line, marker=marker, color=figures.colour(meaning), label=label)
            above = payload["checkpoints"][step]["attention_above_ffn"][summary]
            n = len(pairs(rows, summary))
            axis.set_title(f"{title.format(n=count)}\nattention above FFN in {above} of {n} layers")
            figures.layer_axis(axis, len(rows))
        # Matplotlib's margin is a share of the data's range, which may be small compared with the values themselves.
        axes[0].set_ylim(0, 1.06 * max(axis.dataLim.ymax for axis in axes))
        axes[0].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        axes[0].set_ylabel(f"mean |ΔW| from base, step {step}")
        axes[0].legend(loc="best")
        figures.save(figure, path)


# ---------------------------------------------------------------- the command


def build_parser():
    output = "the study's weight-diff/attn_vs_ffn.json (of other models or a part of the run "
    output += "attn_vs_ffn.<checkpoint>.json), else weight_diff/<checkpoint>.json"
    p = compared.parser(__doc__, "--ckpt-model", output)
    text = "also write OUT with .pt: the change of every attention head and FFN neuron"
    p.add_argument("--details", action="store_true", help=text)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    models = compared.Compared.from_arguments(args, study, "--ckpt-model")
    device = cli.device(args.device)
    other = beside.name(study, args.base_model, args.run, args.steps, args.limit)
    given = args.output or (None if study else default_output(models.target))
    output = study.output(given, "--output", "attn_vs_ffn", other)

    facts = models.facts() | {"seed": study.seed}
    details = output.with_suffix(".pt")
    made = compared.made_already(output, SCHEMA, facts, args.overwrite)
    if made and (details.is_file() or not args.details):
        cli.say(f"{output} is finished (--overwrite redoes it)")
        return
    changes = models.changes(args.drop_revisions, device=device, details=args.details)
    payload = {
        "base_model": models.base.spec,
        "target_model": models.target,
        "checkpoints": {str(ref.step): checkpoint_row(changes[ref.step]) for ref in models.run},
        "pooled": {str(ref.step): pooled(changes[ref.step]) for ref in models.run},
    }
    draw(output.with_suffix(""), payload)
    details.unlink(missing_ok=True)  # a file of an earlier run does not belong to this one
    if args.details:
        results.write_tensors(details, detail_arrays(changes))
    results.write_json(output, payload, results.header(SCHEMA, **facts, dtype="float32", device=device.type))
    for step, row in payload["checkpoints"].items():
        cli.say(f"step {step}: " + describe(row))
    more = f", {details}" if args.details else ""
    cli.say(f"wrote {output}{more} and the figure {output.with_suffix('.pdf')}")


def describe(row: dict) -> str:
    """One line on a checkpoint: the summary, and in how many layers attention changes more by each reading."""
    names = {"summary": "max", "summary_mean": "mean"}
    names |= {"summary_relative": "relative max", "summary_relative_mean": "relative mean"}
    above = ", ".join(f"{row['attention_above_ffn'][key]} ({name})" for key, name in names.items())
    attention, ffn = ("none" if value is None else f"{value:.3e}" for value in row["summary"].values())
    n = len(pairs(list(row["layers"].values()), "summary"))
    return f"attention {attention}, FFN {ffn}; attention above FFN in {above} of {n} layers"


def default_output(target: str | list[str]) -> Path:
    """`weight_diff/<name>.json`, named after the folder of the checkpoint or run, or its name on the hub."""
    first = target if isinstance(target, str) else target[0]
    name = Path(os.path.abspath(first)).name if os.path.isdir(first) else refs.model(first).model_id
    return Path("weight_diff") / f"{name}.json"


if __name__ == "__main__":
    cli.run(main)
