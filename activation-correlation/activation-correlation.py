"""What goes with the change of a language's neurons: interface attention, or the neurons' own weights (step 10)?

d_s = (mean activation of the language's neurons - that of their random control) at checkpoint C_s, minus the same at
the base. Over checkpoints, |d_s| is correlated with (a) the mean over interface layers of the largest of q, k, v, o's
mean |dW|, and (b) the mean over layers of the change of the neurons' gates.

In:   the activation files of lsn/lsn_activation_cpt.py (run and base, mask and control), the files of
      weight-diff/attn_vs_ffn.py and weight-diff/gate_lsn.py, and the layers of layer-specialize/layer_specialize.py.
Out:  <output-dir>/<model-name>_correlation_strength.json with `interface_attention_correlation_strength` and
      `lsn_ffn_correlation_strength`, their intervals, first differences and comparison; beside it a figure (PDF, PNG).

Full: python activation-correlation/activation-correlation.py --model-name cpt --lang eus_Latn --base-tag base --lsn-activation-path lsn_activation --all-weight-diff-path attn_vs_ffn.json --lsn-weight-diff-path gate_lsn.json --layer-selection-path layers.json --output-dir results
Tiny: python activation-correlation/activation-correlation.py --study demo/tiny.yaml
"""  # noqa: E501

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, experiments, figures, languages, results, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study, dotted
from cpt_utils.checkpoints import beside, relatives
from cpt_utils.measures import activation_files
from cpt_utils.measures import gate as retrieval_gate

SCHEMA = "activation_correlation"
RESULTS = {"activation_correlation": "activation-correlation"}
CAPTIONS = {
    "activation_correlation": """Part II: 3. Activation over CPT
        How closely the change of LSN activation is followed by the change of attention in interface layers, and by
        that of the neurons' own weights. Raw curves all grow and correlate; claim C4 is decided by the difference of
        the two correlations on first differences.""",
}
AGAIN = "run the step that is behind again"
NAMES = {"mask": "masks", "control": "control masks", "text": "texts"}

Series = dict[int, float]


# ---------------------------------------------------------------- the method


def deviation(lsn: Series, control: Series, base: tuple[float, float]) -> list[float]:
    """d_s of every step: how far the neurons' activation above their control has moved from the base's."""
    return [(lsn[step] - control[step]) - (base[0] - base[1]) for step in sorted(lsn)]


def attention_change(layers: dict[str, dict], interface: list[int]) -> float:
    """The mean over interface layers of the largest mean |dW| among the attention's projections.

    A layer without attention (of a hybrid, whose `attention_max` is null) enters no mean; one that uses another's keys
    and values has q and o.

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
    steps = stats.first_differences(change), stats.first_differences(d)
    return _both(change, d) | {"first_differences": _both(*steps)}


def _both(x: list[float], y: list[float]) -> dict:
    return {"pearson": stats.correlation(x, y), "spearman": stats.correlation(x, y, method="spearman")}


def compare(attention: list[float], gate: list[float], d: list[float]) -> dict:
    """r(attention, d) - r(gate, d), raw and on first differences, with intervals: both share d."""
    steps = (stats.first_differences(series) for series in (attention, gate, d))
    return {
        "raw": stats.correlation_difference(attention, gate, d),
        "first_differences": stats.correlation_difference(*steps),
    }


def strengths(series: dict) -> dict:
    """Everything that is correlated: `series` holds `d, attention, gate` and perhaps `gate_minus_control`."""
    size = [abs(value) for value in series["d"]]
    kinds = {"interface_attention": "attention", "lsn_ffn": "gate"}
    if series["gate_minus_control"] is not None:
        kinds["lsn_ffn_minus_control"] = "gate_minus_control"
    found = {kind: relate(series[key], size) for kind, key in kinds.items()}
    return {
        **{f"{kind}_correlation_strength": found[kind]["pearson"]["correlation"] for kind in list(kinds)[:2]},
        "interface_attention": found["interface_attention"],
        "lsn_ffn": found["lsn_ffn"],
        "lsn_ffn_minus_control": found.get("lsn_ffn_minus_control"),
        "signed": {kind: relate(series[key], series["d"]) for kind, key in kinds.items()},
        "comparison": compare(series["attention"], series["gate"], size),
    }


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class Sources:
    """The files of the steps before: activations in `folder` below `name` and `base_tag`, and the three others."""

    folder: Path
    name: str
    base_tag: str
    weights: Path
    gates: Path
    layers: Path


def choose_tokens(run: dict[str, dict], base: dict[str, dict], place: Path) -> str:
    """The number of tokens for which mask and control of the base and of checkpoints are there.

    Raises:
        InputError: there is none, or there are several; names them.
    """
    both = {(True, 0), (False, 0)}
    full = [n for n in run if both <= base.get(n, {}).keys() and {kind for kind, _ in run[n]} == {True, False}]
    if len(full) == 1:
        return full[0]
    if full:
        raise InputError(
            f"{place} has activations over {' and over '.join(sorted(full))} tokens; keep one kind, and move the other"
        )
    missing = [] if run else ["everything of the run but tries with --limit"]
    for n in run:
        missing += [
            f"the base's {'control' if kind else 'activation'} over {n} tokens"
            for kind in (False, True)
            if (kind, 0) not in base.get(n, {})
        ]
        if not any(kind for kind, _ in run[n]):
            missing.append(f"the control of the checkpoints over {n} tokens")
        if all(kind for kind, _ in run[n]):
            missing.append(f"the activation of the checkpoints over {n} tokens")
    made_by = experiments.made_by("lsn_activation")
    raise InputError(f"{place}: missing is {', '.join(missing)}; run {made_by} with the mask and its control")


def read_activation(path: Path, lang: str) -> tuple[float, dict]:
    """The mean activation of a file, and its header.

    Raises:
        InputError: no mean in it, or another language.
    """
    payload, header = results.read_json(path, "lsn-activation")
    again = f"run {experiments.made_by('lsn_activation')} again"
    value = payload.get("all_layers") if isinstance(payload, dict) else None
    if not isinstance(value, int | float):
        raise InputError(f"{path} has no mean activation all_layers; {again}")
    if not languages.same(header.get("language", lang), lang):
        raise InputError(f"{path} is about {header['language']}, not {lang}; {again}")
    return float(value), header


def read_changes(path: Path, schema: str, script: str) -> tuple[dict[int, dict], dict]:
    """`{step: row}` of a weight-difference file, without step 0, and its header.

    Raises:
        InputError: it has no checkpoints with layers.
    """
    payload, header = results.read_json(path, schema)
    rows = payload.get("checkpoints") if isinstance(payload, dict) else None
    try:
        found = {int(step): row for step, row in rows.items() if int(step)}
        if not found or not all(row["layers"] for row in found.values()):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path} has no checkpoints with layers; give the file of {script}") from None
    return dict(sorted(found.items())), header


def read_interface(path: Path, n_layers: int, models: list[dict]) -> list[int]:
    """The interface layers of step 2's file; it must be about one of `models`, where they are known."""
    if not models:  # files of the published scripts say of no model what it is
        models = [ref for ref in (results.read_json(path)[1].get("models") or {}).values() if isinstance(ref, dict)]
    return cli.sibling("weight-diff/int_and_sem.py").read_layers(path, "interface", n_layers, models)


def common_steps(steps: dict[str, set[int]], wanted: list[int] | None) -> list[int]:
    """The steps that all files share; `wanted` of them where given.

    Raises:
        InputError: a file has a step that another has not, or lacks a wanted one; names the file and its steps.
    """
    if wanted is not None:
        missing = {name: sorted(set(wanted) - have) for name, have in steps.items() if set(wanted) - have}
        hint = "; give --steps that all have"
    else:
        every = set().union(*steps.values())
        missing = {name: sorted(every - have) for name, have in steps.items() if every - have}
        hint = "; measure them, or choose with --steps"
    if missing:
        what = ", and ".join(f"{name} has no step {', '.join(map(str, lacks))}" for name, lacks in missing.items())
        raise InputError(f"the steps do not match: {what}{hint}")
    return sorted(set(wanted) if wanted is not None else every)


def weight_models(header: dict) -> dict[str, dict]:
    """The models of a weight file's header by what they are: `base`, `step 10`, .."""
    models = header.get("models") or {}
    found = {f"step {step}": ref for step, ref in (models.get("checkpoints") or {}).items()}
    return found | ({"base": models["base"]} if models.get("base") else {})


def activation_model(header: dict, step: int) -> dict[str, dict]:
    model = (header.get("models") or {}).get("model")
    return {f"step {step}" if step else "base": model} if model else {}


def refuse_strangers(files: list[tuple[Path, dict[str, dict]]]) -> dict[str, dict]:
    """The models that the files are about, `{"base": .., "step 10": ..}`, as far as their headers say.

    Raises:
        InputError: two files mean different models by one of them, or one that was trained again in between.
    """
    known: dict[str, tuple[Path, dict]] = {}
    for path, models in files:
        for what, ref in models.items():
            first, other = known.setdefault(what, (path, ref))
            if not relatives.same_model(other, ref):
                raise InputError(
                    f"{path} and {first} are about different models ({what}: {ref.get('spec')} and "
                    f"{other.get('spec')}, or trained again in between); {AGAIN}"
                )
    return {what: ref for what, (_, ref) in known.items()}


def refuse_other_neurons(activations: list[tuple[Path, dict]], gate_file: Path, gate_header: dict) -> None:
    """Refuse activations over other texts or neurons than one another's, or over other neurons than the gates'.

    Raises:
        InputError: names both files. Headers that do not say are taken on trust.
    """
    fingerprint = cli.sibling("weight-diff/gate_lsn.py").fingerprint
    known = {kind: (gate_file, gate_header[kind]) for kind in ("mask", "control") if gate_header.get(kind)}
    for path, header in activations:
        said = {}
        neurons = (header.get("request") or {}).get("mask")
        if neurons:
            kind = "control" if header.get("control") else "mask"
            said[kind] = fingerprint({int(layer): neurons[layer] for layer in neurons})
        text = header.get("tokens")
        if isinstance(text, dict) and text.get("sha256"):
            said["text"] = text["sha256"]
        for what, value in said.items():
            first, other = known.setdefault(what, (path, value))
            if value != other:
                raise InputError(f"{path} and {first} were made with different {NAMES[what]}; {AGAIN}")


# ---------------------------------------------------------------- the figure


def draw(path: Path, payload: dict) -> None:
    """The two strengths with their intervals, raw and on first differences, and the curves they come from."""
    with figures.style() as plt:
        figure, (bars, curves) = plt.subplots(1, 2, figsize=(figures.PAGE, 2.5), width_ratios=[1, 1.3])
        _bars(bars, payload)
        _curves(curves, payload["series"])
        figures.save(figure, path)


KINDS = {"interface_attention": ("interface attention", "attention", ""), "lsn_ffn": ("gates of neurons", "ffn", "///")}


def _bars(axis, payload: dict) -> None:
    shown = False
    for i, (kind, (label, meaning, hatch)) in enumerate(KINDS.items()):
        for j, part in enumerate((payload[kind], payload[kind]["first_differences"])):
            found = part["pearson"]
            if found["correlation"] is None:
                continue
            r, place = found["correlation"], j + (i - 0.5) * 0.36
            look = {"color": figures.colour(meaning), "hatch": hatch, "edgecolor": "white", "linewidth": 0}
            axis.bar(place, r, width=0.34, label=label if j == 0 else None, **look)
            shown = True
            if found["ci_low"] is not None:
                error = [[r - found["ci_low"]], [found["ci_high"] - r]]
                axis.errorbar(place, r, yerr=error, color="black", capsize=2, linewidth=0.8)
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
    """Each curve as a share of its largest value, because their units differ; the control on the scale of the gates."""
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
    study = Study.find(args.study, args.seed)
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
    sources = Sources(folder, name, args.base_tag, *files)
    folder = study.output(args.output_dir, "--output-dir", "activation_correlation")
    series, facts = gather(sources, lang, args.steps)
    called = (
        name
        if args.output_dir
        else dotted(name, beside.name(study, lang=args.lang), part_of_run(facts, series["steps"]))
    )
    output = folder / f"{called}_correlation_strength.json"
    refuse_other_output(output, lang, args.steps, args.overwrite)
    payload = strengths(series) | {"series": series, "note": None}
    n = len(series["steps"])
    if n < 3:
        payload["note"] = f"{n} checkpoint{'s are' if n > 1 else ' is'} too few for a correlation (3 or more)"
        cli.warn(f"the run is too short: {payload['note']}; two points always lie on a line, so none is given")
    draw(output.with_suffix(""), payload)
    results.write_json(output, payload, results.header(SCHEMA, **facts, seed=study.seed))
    cli.say("\n".join(summary(payload)))
    cli.say(f"wrote {output} and the figure {output.with_suffix('.pdf')}")


def part_of_run(facts: dict, steps: list[int]) -> str:
    """What is added to the name of a result that is not of all checkpoints there are."""
    return f"steps-{steps[0]}-to-{steps[-1]}.{len(steps)}" if facts["n_used"] < facts["n_available"] else ""


def refuse_other_output(output: Path, lang: str, wanted: list[int] | None, overwrite: bool) -> None:
    """An older result is made anew, which takes a second; any other file is replaced on request only."""
    request = {"language": languages.canonical(lang, any_tag=True), "steps": wanted and sorted(wanted)}

    def asked(found: dict) -> dict:
        steps = (found.get("series") or {}).get("steps") or request["steps"]
        return {"language": languages.canonical(found["language"], any_tag=True), "steps": wanted and steps}

    results.finished(output, SCHEMA, request, "another --output-dir", overwrite, asked)


def gather(sources: Sources, lang: str, wanted: list[int] | None) -> tuple[dict, dict]:
    """The series over steps that are correlated, and what the header says of them.

    Raises:
        InputError: a file is missing, or is about other steps, models, neurons or languages than the others.
    """
    place = sources.folder / sources.name
    run = activation_files.find(place, lang, of_run=True)
    base = activation_files.find(sources.folder / sources.base_tag, lang, of_run=False)
    tokens = choose_tokens(run, base, sources.folder)
    attention, attention_header = read_changes(sources.weights, "attn_vs_ffn", "weight-diff/attn_vs_ffn.py")
    gates, gate_header = read_changes(sources.gates, "gate_lsn", "weight-diff/gate_lsn.py")
    if not languages.same(gate_header.get("language", lang), lang):
        raise InputError(f"{sources.gates} is about {gate_header['language']}, not {lang}; run weight-diff/gate_lsn.py")
    have = {str(sources.weights): set(attention), str(sources.gates): set(gates)}
    for control, what in ((False, "activation"), (True, "activation of the control")):
        have[f"{what} in {place}"] = {step for kind, step in run[tokens] if kind == control and step}
    steps = common_steps(have, wanted)

    measured = {(control, 0): base[tokens][control, 0] for control in (False, True)}
    measured |= {(control, step): run[tokens][control, step] for control in (False, True) for step in steps}
    read = {key: read_activation(path, lang) for key, path in measured.items()}
    models = refuse_strangers(
        [
            (sources.weights, weight_models(attention_header)),
            (sources.gates, weight_models(gate_header)),
            *((measured[key], activation_model(header, key[1])) for key, (_, header) in read.items()),
        ]
    )
    refuse_other_neurons([(measured[key], header) for key, (_, header) in read.items()], sources.gates, gate_header)
    n_layers = len(attention[steps[0]]["layers"])
    interface = read_interface(sources.layers, n_layers, list(models.values()))

    series = activation_series({key: value for key, (value, _) in read.items()}, steps)
    series |= weight_series(sources, attention, gates, steps, interface)
    return series, {
        "models": {
            "base": models.get("base"),
            "checkpoints": {str(step): models[f"step {step}"] for step in steps if f"step {step}" in models},
        },
        "n_layers": n_layers,
        "language": languages.canonical(lang, any_tag=True),
        "tokens": tokens,
        "interface_layers": interface,
        "gate": retrieval_gate.carried(sources.layers),
        "files": {
            "activation": sources.folder,
            "attn_vs_ffn": sources.weights,
            "gate_lsn": sources.gates,
            "layers": sources.layers,
        },
        "n_used": len(steps),
        "n_available": len(set.intersection(*have.values())),
    }


def activation_series(means: dict[tuple[bool, int], float], steps: list[int]) -> dict:
    """d over steps and what it is made of; `means` is {(is control, step): mean activation}, the base at step 0."""
    lsn, control = ({step: means[kind, step] for step in steps} for kind in (False, True))
    d = deviation(lsn, control, (means[False, 0], means[True, 0]))
    return {
        "steps": steps,
        "d": d,
        "abs_d": [abs(value) for value in d],
        "activation": list(lsn.values()),
        "activation_control": list(control.values()),
        "base_activation": means[False, 0],
        "base_activation_control": means[True, 0],
    }


def weight_series(sources: Sources, attention: dict, gates: dict, steps: list[int], interface: list[int]) -> dict:
    """The changes over steps that d is correlated with; those of the control are None where there is none.

    Raises:
        InputError: a projection of an interface layer or a gate is missing.
    """
    try:
        found = {"attention": [attention_change(attention[step]["layers"], interface) for step in steps]}
    except (KeyError, TypeError):
        raise InputError(
            f"{sources.weights} lacks q, k, v or o of an interface layer; run weight-diff/attn_vs_ffn.py again"
        ) from None
    try:
        gate = [gate_change(gates[step]["layers"]) for step in steps]
        controlled = all(gates[step].get("control") for step in steps)
        control = [gate_change(gates[step]["control"]) for step in steps] if controlled else None
    except (KeyError, TypeError):
        raise InputError(f"{sources.gates} lacks gate_proj of a layer; run weight-diff/gate_lsn.py again") from None
    more = [a - b for a, b in zip(gate, control, strict=True)] if control else None
    return found | {"gate": gate, "gate_control": control, "gate_minus_control": more}


def summary(payload: dict) -> list[str]:
    """The lines for the terminal."""
    lines = []
    for kind in (*KINDS, "lsn_ffn_minus_control"):
        if payload[kind] is None:
            continue
        lines.append(kind.replace("_", " "))
        for label, part in (("raw", payload[kind]), ("first differences", payload[kind]["first_differences"])):
            lines.append(f"  {label}: {_told(part['pearson'], 'correlation', 'r')}")
    lines.append("interface attention minus lsn ffn")
    for label, key in (("raw", "raw"), ("first differences", "first_differences")):
        lines.append(f"  {label}: {_told(payload['comparison'][key], 'difference', 'difference of r')}")
    return lines


def _told(part: dict, key: str, label: str) -> str:
    if part[key] is None:
        return f"none, {part['note']}"
    interval = "" if part["ci_low"] is None else f", 95 % [{part['ci_low']:+.2f}, {part['ci_high']:+.2f}]"
    p = f", p {part['p_value']:.3f}" if "p_value" in part else ""
    return f"{label} {part[key]:+.3f}{p}, {part['n_points']} points{interval}"


if __name__ == "__main__":
    cli.run(main)
