"""Does the activation of a language's neurons change with interface attention, or with their own weights (step 10)?

d_s = (mean activation of the language's neurons - that of their random control) at checkpoint C_s, minus the same at
the base. Over checkpoints, |d_s| is correlated with (a) the mean over interface layers of the largest mean |dW| among
q, k, v, o, and (b) the mean over layers of the mean |dW| of the neurons' gates.

In:   the activation files of lsn/lsn_activation_cpt.py (run and base, mask and control), the files of
      weight-diff/attn_vs_ffn.py and weight-diff/gate_lsn.py, and the layers of layer-specialize/layer_specialize.py.
Out:  <output-dir>/<model-name>_correlation_strength.json with `interface_attention_correlation_strength` and
      `lsn_ffn_correlation_strength`, their intervals, first differences and comparison; and a figure (PDF, PNG).

Full: python activation-correlation/activation-correlation.py --model-name cpt --lang eus_Latn --base-tag base --lsn-activation-path lsn_activation --all-weight-diff-path attn_vs_ffn.json --lsn-weight-diff-path gate_lsn.json --layer-selection-path layers.json --output-dir results
Tiny: python activation-correlation/activation-correlation.py --study demo/tiny.yaml
"""  # noqa: E501

from __future__ import annotations

import textwrap
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, figures, languages, results, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study, dotted
from cpt_utils.checkpoints import beside

earlier = cli.sibling("activation-correlation/earlier_steps.py")

SCHEMA = "activation_correlation"
RESULTS = {"activation_correlation": "activation-correlation"}
ASKED = {
    "activation_correlation": (
        "Does the change of these activations follow attention in the interface, or the neurons' own weights?"
    ),
}
CAPTIONS = {
    "activation_correlation": """Part II: 3. Activation over CPT
        How closely the change of LSN activation correlates with the change of attention in interface layers, and with
        that of the neurons' own weights. Curves that grow correlate anyway, even on first differences; claim C4 is
        decided by training with a part frozen.""",
}
IMAGES = {"activation_correlation": "{name}_correlation_strength.png"}
# What |d| is correlated with, and its label, colour and hatch in the figure.
KINDS = {"interface_attention": ("interface attention", "attention", ""), "lsn_ffn": ("gates of neurons", "ffn", "///")}


# ---------------------------------------------------------------- the method


def deviation(lsn: list[float], control: list[float], base: tuple[float, float]) -> list[float]:
    """d_s of every step: the change, from the base, of the neurons' activation minus their control's."""
    return [(neurons - random) - (base[0] - base[1]) for neurons, random in zip(lsn, control, strict=True)]


def attention_change(layers: dict[str, dict], interface: list[int]) -> float:
    """The mean over interface layers of the largest mean |dW| among the attention's projections.

    A hybrid's layer without attention (`attention_max` is null) is left out; a layer that uses another layer's keys and
    values has q and o only.

    Raises:
        InputError: no interface layer has attention.
    """
    rows = [layers[f"layer_{i}"] for i in interface]
    rows = [row for row in rows if row.get("attention_max", 0) is not None]
    if not rows:
        raise InputError(f"none of the interface layers {interface} has attention: there is no change to correlate")
    largest = [max(row[name] for name in archs.ATTENTION if name in row or "attention_max" not in row) for row in rows]
    return sum(largest) / len(largest)


def gate_change(layers: dict[str, dict]) -> float:
    """The mean over the layers present (those with neurons) of the gates' mean |dW|."""
    return sum(row["gate_proj"] for row in layers.values()) / len(layers)


def relate(change: list[float], d: list[float]) -> dict:
    """Pearson's and Spearman's correlation over checkpoints, and both on first differences."""
    raw, differences = (
        {method: stats.correlation(x, y, method) for method in ("pearson", "spearman")}
        for x, y in ((change, d), (stats.first_differences(change), stats.first_differences(d)))
    )
    return raw | {"first_differences": differences}


def compare(attention: list[float], gate: list[float], d: list[float]) -> dict:
    """r(attention, d) - r(gate, d), raw and on first differences, with intervals for correlations that share d."""
    differences = (stats.first_differences(series) for series in (attention, gate, d))
    return {
        "raw": stats.correlation_difference(attention, gate, d),
        "first_differences": stats.correlation_difference(*differences),
    }


def strengths(series: dict) -> dict:
    """All correlations of `series`, which holds `d`, `attention`, `gate` and `gate_minus_control` (may be None)."""
    abs_d = [abs(value) for value in series["d"]]
    changes = {"interface_attention": series["attention"], "lsn_ffn": series["gate"]}
    if series["gate_minus_control"] is not None:
        changes["lsn_ffn_minus_control"] = series["gate_minus_control"]
    related = {kind: relate(change, abs_d) for kind, change in changes.items()}
    return {
        **{f"{kind}_correlation_strength": related[kind]["pearson"]["correlation"] for kind in KINDS},
        **{kind: related.get(kind) for kind in (*KINDS, "lsn_ffn_minus_control")},
        "signed": {kind: relate(change, series["d"]) for kind, change in changes.items()},
        "comparison": compare(series["attention"], series["gate"], abs_d),
    }


def series_of(found: earlier.Found, sources: earlier.Sources) -> dict:
    """d over steps, the activations it is computed from, and the weight changes it is correlated with; those of the
    control's gates are None if there is no control.

    Raises:
        InputError: a projection of an interface layer or a gate is missing.
    """
    means, steps = found.means, found.steps
    lsn, control = ([means[kind, step] for step in steps] for kind in (False, True))
    d = deviation(lsn, control, (means[False, 0], means[True, 0]))
    try:
        attention = [attention_change(found.attention[step]["layers"], found.interface) for step in steps]
    except (KeyError, TypeError):
        raise InputError(
            f"{sources.weights} lacks q, k, v or o of an interface layer; run weight-diff/attn_vs_ffn.py again"
        ) from None
    try:
        gate = [gate_change(found.gates[step]["layers"]) for step in steps]
        has_control = all(found.gates[step].get("control") for step in steps)
        gate_control = [gate_change(found.gates[step]["control"]) for step in steps] if has_control else None
    except (KeyError, TypeError):
        raise InputError(f"{sources.gates} lacks gate_proj of a layer; run weight-diff/gate_lsn.py again") from None
    return {
        "steps": steps,
        "d": d,
        "abs_d": [abs(value) for value in d],
        "activation": lsn,
        "activation_control": control,
        "base_activation": means[False, 0],
        "base_activation_control": means[True, 0],
        "attention": attention,
        "gate": gate,
        "gate_control": gate_control,
        "gate_minus_control": [a - b for a, b in zip(gate, gate_control, strict=True)] if gate_control else None,
    }


# ---------------------------------------------------------------- the figure


def draw(path: Path, payload: dict) -> None:
    """The two correlations with their intervals, raw and on first differences, and the curves they come from."""
    with figures.style() as plt:
        figure, (bars, curves) = plt.subplots(1, 2, figsize=(figures.PAGE, 2.5), width_ratios=[1, 1.3])
        _bars(bars, payload)
        _curves(curves, payload["series"])
        figures.save(figure, path)


def _bars(axis, payload: dict) -> None:
    shown = False
    for i, (kind, (label, meaning, hatch)) in enumerate(KINDS.items()):
        for j, part in enumerate((payload[kind], payload[kind]["first_differences"])):
            pearson = part["pearson"]
            if pearson["correlation"] is None:
                continue
            r, x = pearson["correlation"], j + (i - 0.5) * 0.36
            look = {"color": figures.colour(meaning), "hatch": hatch, "edgecolor": "white", "linewidth": 0}
            axis.bar(x, r, width=0.34, label=label if j == 0 else None, **look)
            shown = True
            if pearson["ci_low"] is not None:
                error = [[r - pearson["ci_low"]], [pearson["ci_high"] - r]]
                axis.errorbar(x, r, yerr=error, color="black", capsize=2, linewidth=0.8)
    n = len(payload["series"]["steps"])
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xticks([0, 1], [f"raw\n(n = {n} checkpoints)", f"first differences\n(n = {max(0, n - 1)})"])
    axis.set_xlim(-0.6, 1.6)
    axis.set_ylim(-1.05, 1.05)
    axis.set_ylabel("Pearson's r with |d|, 95 % interval")
    if shown:
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    else:
        axis.text(0.5, 0.2, textwrap.fill(payload["note"] or "no correlation", 30), ha="center")


def _curves(axis, series: dict) -> None:
    """Each curve as a share of its largest value, because units differ; the control's on the scale of the gates."""
    lines = {
        "abs_d": ("|d|, neurons' activation", figures.colour("target"), "D", "-", "abs_d"),
        "attention": ("interface attention", figures.colour("attention"), "s", "-", "attention"),
        "gate": ("gates of neurons", figures.colour("ffn"), "o", "--", "gate"),
        "gate_control": ("gates of the control", figures.colour("random"), "^", ":", "gate"),
    }
    for key, (label, colour, marker, line, scale) in lines.items():
        if series[key] is None:
            continue
        largest = max(series[scale]) or 1.0
        values = [value / largest for value in series[key]]
        axis.plot([0, *series["steps"]], [0, *values], line, marker=marker, color=colour, label=label)
    axis.set_xlabel("training step (0 = base, not in r)")
    axis.set_ylabel("share of the largest value")
    axis.set_ylim(bottom=0)
    axis.legend(loc="best")


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("--model-name", metavar="NAME", help="folder of the run's activations; default: the study's name")
    p.add_argument("--lang", metavar="g", help="the language; default: the study's languages.target")
    p.add_argument("--base-tag", default="base", metavar="TAG", help="folder of the base's activations; default base")
    p.add_argument("--lsn-activation-path", metavar="DIR", help="holds both folders; default: the study's")
    p.add_argument("--all-weight-diff-path", metavar="F", help="file of attn_vs_ffn.py; default: the study's")
    p.add_argument("--lsn-weight-diff-path", metavar="F", help="file of gate_lsn.py; default: the study's")
    p.add_argument("--layer-selection-path", metavar="F", help="file of layer_specialize.py; default: the study's")
    p.add_argument("--output-dir", "--output", metavar="DIR", help="default: the study's activation-correlation")
    cli.add_run_flags(p)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    name = args.model_name or (study.name if study else study.value(None, "--model-name", "name"))
    lang = str(study.value(args.lang, "--lang", "languages.target"))
    folder = study.input(args.lsn_activation_path, "--lsn-activation-path", "lsn_activation")
    files = (
        study.input(given, flag, step)
        for given, flag, step in (
            (args.all_weight_diff_path, "--all-weight-diff-path", "attn_vs_ffn"),
            (args.lsn_weight_diff_path, "--lsn-weight-diff-path", "gate_lsn"),
            (args.layer_selection_path, "--layer-selection-path", "layers"),
        )
    )
    sources = earlier.Sources(folder, name, args.base_tag, *files)
    output_folder = study.output(args.output_dir, "--output-dir", "activation_correlation")
    inputs = earlier.read(sources, lang, args.steps)
    series, n = series_of(inputs, sources), len(inputs.steps)
    if not args.output_dir:  # variants get a name of their own beside the study's result
        part = f"steps-{inputs.steps[0]}-to-{inputs.steps[-1]}.{n}" if n < inputs.facts["n_available"] else ""
        name = dotted(name, beside.name(study, lang=args.lang), part)
    output = output_folder / f"{name}_correlation_strength.json"
    refuse_other_output(output, lang, args.steps, args.overwrite)
    payload = strengths(series) | {"series": series, "note": None}
    if n < 3:
        payload["note"] = f"{n} checkpoint{'s are' if n > 1 else ' is'} too few for a correlation (3 or more)"
        cli.warn(f"the run is too short: {payload['note']}; two points always lie on a line, so none is given")
    draw(output.with_suffix(""), payload)
    results.write_json(output, payload, results.header(SCHEMA, **inputs.facts, seed=study.seed))
    cli.say("\n".join(summary(payload)))
    cli.say(f"wrote {output} and the figure {output.with_suffix('.pdf')}")


def refuse_other_output(output: Path, lang: str, wanted: list[int] | None, overwrite: bool) -> None:
    """Refuse to replace a result of another request, unless `overwrite`; an older one of the same is made again."""
    request = {"language": languages.canonical(lang, any_tag=True), "steps": wanted and sorted(wanted)}

    def asked(result: dict) -> dict:
        steps = (result.get("series") or {}).get("steps") or request["steps"]
        return {"language": languages.canonical(result["language"], any_tag=True), "steps": wanted and steps}

    results.finished(output, SCHEMA, request, "another --output-dir", overwrite, asked)


def summary(payload: dict) -> list[str]:
    """The lines for the terminal."""
    lines = []
    for kind in (*KINDS, "lsn_ffn_minus_control"):
        if payload[kind] is not None:
            parts = [part["pearson"] for part in (payload[kind], payload[kind]["first_differences"])]
            lines += [kind.replace("_", " "), *_told(parts, "correlation", "r")]
    parts = payload["comparison"].values()
    return [*lines, "interface attention minus lsn ffn", *_told(parts, "difference", "difference of r")]


def _told(parts, key: str, label: str):
    for name, part in zip(("raw", "first differences"), parts, strict=True):
        if part[key] is None:
            yield f"  {name}: none, {part['note']}"
            continue
        interval = "" if part["ci_low"] is None else f", 95 % [{part['ci_low']:+.2f}, {part['ci_high']:+.2f}]"
        p = f", p {part['p_value']:.3f}" if "p_value" in part else ""
        yield f"  {name}: {label} {part[key]:+.3f}{p}, {part['n_points']} points{interval}"


if __name__ == "__main__":
    cli.run(main)
