"""The figures of the paper, drawn from the result files of a study alone.

A figure whose result is missing is left out, and one line names the script that makes the result. Files about other
models than the study's are refused, as in report/claims.py.

In:   the results of a study, as many as there are.
Out:  fig1_retrieval .. fig9_deactivation as PDF and PNG in the folder --output (default: the study's report/figures).

Full: python report/figures.py --study studies/multi30k.yaml --seed 0
Tiny: python report/figures.py --study demo/tiny.yaml
"""

from __future__ import annotations

import functools
from pathlib import Path

from cpt_utils.base import cli, figures
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.measures import activation_files, sib200, trial

evidence = cli.sibling("report/evidence.py")
component_controls = cli.sibling("component-swap/component_controls.py")
Results, Missing = evidence.Results, evidence.Missing

RESULTS = {"figures": "report/figures"}
CAPTIONS = {
    "fig1_retrieval": """Figures of the paper
        Retrieval over hidden states, a line for each step, the hub shaded; and the mean of hub and interface layers
        over steps. Claim C1 is decided over seeds, by the peak and the mean of the inner hidden states against the
        first and the last, not by the shape of one line.""",
    "fig2_change": """Figures of the paper
        Mean absolute weight change of interface and hub layers over training, and the accuracy of the downstream task
        with standard errors. Both grow, which decides nothing; claim C6 is decided by training with a part frozen.""",
    "fig3_layer_swap": """Figures of the paper
        What the hub swap and the random swaps lose relative to the checkpoint, with intervals over sentences; dots
        are the random sets. Claim C2 is decided over seeds, adjusted for depth and seams.""",
    "fig4_attention_ffn": "Figures of the paper\nattn_vs_ffn",
    "fig5_lsn_counts": "Figures of the paper\nlsn_counts",
    "fig6_lsn_activation": "Figures of the paper\nlsn_activation",
    "fig7_strengths": "Figures of the paper\nactivation_correlation",
    "fig8a_attention_swap": "Figures of the paper\ncomponent_swap",
    "fig8b_ffn_swap": "Figures of the paper\ncomponent_swap",
    "fig9_deactivation": "Figures of the paper\ndeactivation",
}


# ---------------------------------------------------------------- drawn here


def draw_retrieval(
    path: Path, steps: dict[int, dict], split: dict, untrained: dict | None, lang: tuple[str, str], n: int | None
) -> None:
    """Left: accuracy over hidden states, a line a step, the hub shaded. Right: over steps, hub and interface layers.

    Args:
        steps: step (0 = base) -> payload of sentence retrieval.
        split: payload of step 2; layer l is drawn at hidden state l + 1.
        n: the number of sentences, of which chance finds one.
    """
    accuracy = {step: [value for _, value in sorted(steps[step]["layer_accuracy"])] for step in sorted(steps)}
    trained = [step for step in accuracy if step]
    shades = {0: figures.colour("base")} | dict(zip(trained, figures.colours(len(trained), ordered=True), strict=True))
    with figures.style() as plt:
        fig, (left, right) = plt.subplots(1, 2, figsize=(figures.PAGE, 2.7), width_ratios=[1.6, 1], sharey=True)
        lines = []
        bar = len(trained) + 4 > figures.MOST  # besides hub, base, untrained model and chance
        for step in accuracy:
            look = {"linestyle": "-" if step else "--", "color": shades[step], "label": _step(step)}
            look |= {"label": None, "marker": ""} if bar and step else {}
            lines.append((steps[step]["layer_accuracy"], look))
        twin = untrained and untrained["layer_accuracy"]
        figures.retrieval_axis(left, lines, split["semantic_layers"], twin, n, both=True)
        left.set_ylabel("retrieval accuracy")
        fig.suptitle(" to ".join(map(figures.language, lang)), fontsize=8)
        for group, meaning, marker, line in (
            ("semantic_layers", "hub", "o", "-"),
            ("interface_layers", "interface", "s", "--"),
        ):
            means = [sum(values[at + 1] for at in split[group]) / len(split[group]) for values in accuracy.values()]
            words = figures.group(meaning, len(split[group]))
            right.plot(list(accuracy), means, line, marker=marker, color=figures.colour(meaning), label=words)
        right.set_xlabel(_steps_label(accuracy))
        right.locator_params(axis="x", nbins=5)
        right.set_ylabel("mean over the layers")
        right.legend(loc="best")
        fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
        if bar:
            figures.steps_bar(fig, left, trained)
        figures.save(fig, path)


def draw_change(path: Path, changes: dict[int, dict], accuracy: dict[int, dict], label: str) -> None:
    """Left: mean |dW| of interface and hub layers over steps, the base as step 0. Right: accuracy of the task, if any.

    Args:
        changes: step -> {"interface_avg", "semantic_hub_avg"}.
        accuracy: step -> {"value", "stderr", "n"}.
    """
    steps = sorted(set(changes) - {0})
    with figures.style() as plt:
        size = (figures.PAGE if accuracy else figures.COLUMN, 2.2)
        fig, axes = plt.subplots(1, 2 if accuracy else 1, figsize=size, squeeze=False)
        left = axes[0, 0]
        for key, meaning, words, marker, line in (
            ("interface_avg", "interface", "interface layers", "s", "-"),
            ("semantic_hub_avg", "hub", "semantic hub", "o", "--"),
        ):
            values = [0.0, *(changes[step][key] for step in steps)]
            left.plot([0, *steps], values, line, marker=marker, color=figures.colour(meaning), label=words)
        left.set_ylabel("mean |ΔW| from the base")
        left.set_ylim(bottom=0)
        left.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        left.legend(loc="best")
        if accuracy:
            at = sorted(accuracy)
            errors = [accuracy[step]["stderr"] or 0 for step in at]
            values = [accuracy[step]["value"] for step in at]
            n = accuracy[at[-1]]["n"]
            axes[0, 1].errorbar(at, values, yerr=errors, color=figures.colour("target"), marker="D", capsize=2)
            axes[0, 1].set_ylabel(f"{label}\n({f'{n} rows, ' if n else ''}± standard error)")
            if "sib200" in label:
                figures.chance_line(axes[0, 1], len(sib200.CHOICES))
                axes[0, 1].legend()
        for axis in axes.flat:
            axis.set_xlabel(_steps_label([0, *steps]))
            axis.locator_params(axis="x", nbins=6)
        figures.save(fig, path)


def _step(step: int) -> str:
    return f"step {step}" if step else "base"


def _steps_label(steps) -> str:
    return "training step (0 = base)" if 0 in steps else "training step"


# ---------------------------------------------------------------- figure by figure, from the files


def retrieval(found: Results, path: Path) -> None:
    split, steps, missing, n = found.layers(), {}, [], None
    for ref in [{**found.base, "step": 0}, *found.run]:
        try:
            steps[ref["step"]], header, _ = found.retrieval(ref)
            n = header.get("n_used")
        except Missing as reason:
            missing.append(str(reason))
    if not any(steps):
        raise Missing(missing[-1])
    for reason in missing:
        cli.say(f"{path.name}: {reason}")
    try:
        untrained = found.untrained()[0]
    except Missing:
        untrained = None
    draw_retrieval(path, steps, split, untrained, tuple(found.sides().values()), n)


def change(found: Results, path: Path) -> None:
    payload, _ = found.json(found.path("int_and_sem"), "int_and_sem")
    changes = {int(step): row for step, row in payload["checkpoints"].items()}
    accuracy, label = {}, ""
    try:
        task, _ = found.json(found.path("downstream"), "downstream_correlation")
    except Missing as reason:
        cli.say(f"{path.name} is drawn without the task: {reason}")
    else:
        metric = task["metric"]
        accuracy = {int(step): {"value": row[metric], **row} for step, row in task["values"].items()}
        label = figures.accuracy(metric, task["task"])
    draw_change(path, changes, accuracy, label)


def layer_swap(found: Results, path: Path) -> None:
    payload, header = _swap(found, "layer_swap")
    n_layers = header.get("n_layers") or len(payload["sets"][0]["layer_accuracy"]) - 1
    cli.sibling("layer-swap/layer-swap.py").draw(path, payload, n_layers)


def _swap(found: Results, step: str) -> tuple[dict, dict]:
    return found.json(found.path(step, "controls.json", how=" --controls"), trial.SCHEMA, **found.sides())


def attention_ffn(found: Results, path: Path) -> None:
    payload, _ = found.json(found.path("attn_vs_ffn"), "attn_vs_ffn")
    cli.sibling("weight-diff/attn_vs_ffn.py").draw(path, payload)


def lsn_counts(found: Results, path: Path) -> None:
    script = cli.sibling("lsn/identify.py")
    file = found.there(found.study.result("lsn_mask").with_suffix(".report.json"), "lsn_mask")
    payload, _ = found.json(file, script.REPORT)
    script.reporting.draw_counts(path, payload["languages"], payload["n_layers"])


def lsn_activation(found: Results, path: Path) -> None:
    """Means over steps, of neurons and control, from the files of run and base that step 10 reads."""
    script = cli.sibling("lsn/lsn_activation_cpt.py")
    step_10 = cli.sibling("activation-correlation/activation-correlation.py")
    folder, lang = found.path("lsn_activation"), str(found.study.get("languages.target"))
    try:
        run, base = (
            activation_files.find(folder / name, lang, of_run)
            for name, of_run in ((found.study.name, True), ("base", False))
        )
        tokens = step_10.earlier.choose_tokens(run, base, folder)
    except InputError as reason:
        raise Missing(str(reason)) from None
    refs_by_step = {ref["step"]: ref for ref in found.run}
    means: dict[str, dict[int, float]] = {"language": {}, "control": {}}
    for (control, step), file in sorted((base[tokens] | run[tokens]).items()):
        if step and step not in refs_by_step:
            raise InputError(f"{file} is of step {step}, which the run does not have; remove it or measure again")
        payload, _ = found.json(file, script.SCHEMA, refs_by_step.get(step, found.base), control=control)
        means["control" if control else "language"][step] = payload["all_layers"]
        if not control:
            n = payload["n_neurons"]
    script.draw(path, means, lang, n, int(tokens))


def strengths(found: Results, path: Path) -> None:
    file = found.path("activation_correlation", f"{found.study.name}_correlation_strength.json")
    payload, _ = found.json(file, "activation_correlation")
    cli.sibling("activation-correlation/activation-correlation.py").draw(path, payload)


def component_swap(found: Results, path: Path, step: str = "ffn_lsn_swap") -> None:
    component_controls.draw(path, _swap(found, step)[0])


def deactivation(found: Results, path: Path) -> None:
    script = cli.sibling("lsn/deactivate.py")
    payload, _ = found.json(found.path("deactivation"), script.SCHEMA)
    script.report.draw(path, payload)


FIGURES = {
    "fig1_retrieval": retrieval,
    "fig2_change": change,
    "fig3_layer_swap": layer_swap,
    "fig4_attention_ffn": attention_ffn,
    "fig5_lsn_counts": lsn_counts,
    "fig6_lsn_activation": lsn_activation,
    "fig7_strengths": strengths,
    "fig8a_attention_swap": functools.partial(component_swap, step="attn_int_swap"),
    "fig8b_ffn_swap": component_swap,
    "fig9_deactivation": deactivation,
}


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("--output", metavar="FOLDER", help="folder for the figures; default: the study's report/figures")
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    if not study:
        raise InputError("figures are drawn from a study: give --study FILE, or run where study.yaml is")
    output = study.output(args.output, "--output", "figures")
    results, drawn = Results(study), []
    for name, function in FIGURES.items():
        try:
            with results.reading(name):
                function(results, output / name)
            drawn.append(name)
        except Missing as reason:
            cli.say(f"{name} is left out: {reason}")
    if not drawn:
        raise InputError(f"there is no result to draw in {results.folder}; run the steps first")
    cli.say(f"wrote {', '.join(drawn)} to {output}, each as PDF and PNG")


if __name__ == "__main__":
    cli.run(main)
