"""Compares the results of one study over several seeds: tables in Markdown and small figures.

In:   the results of a study whose paths contain {seed}, for every seed; those beyond Part I if all seeds have them.
Out:  OUT/tables.md, and figures (PNG and PDF): retrieval, weight_change, swaps, component_swaps, deactivation, sweeps.

Full: python studies/across_seeds.py --study studies/multi30k.yaml --seeds 0,1,2 --out docs/multi30k
Tiny: python studies/across_seeds.py --study demo/tiny.yaml --seeds 42 --out build/try/across-seeds
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cpt_utils.base import cli, figures, languages, results
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import refs
from cpt_utils.measures import controls, swap_figure

part_two, part_three = cli.sibling("studies/part_two.py"), cli.sibling("studies/part_three.py")
part_five = cli.sibling("studies/part_five.py")
shown = cli.sibling("report/shown.py")
STEPS = 6  # a longer run is reduced to this many evenly spaced steps


def read_seed(study: Study) -> dict:
    """All Part I results of one seed: {"retrieval": {step: payload}, "layers", "change", "downstream", ..}."""
    base, target = study.get("languages.base"), study.get("languages.target")
    folder = study.result("retrieval")
    pair = folder / languages.find_pair([p.name for p in folder.iterdir()], base, target, str(folder))
    models = {0: refs.model(study.get("base")), **{ref.step: ref for ref in refs.run(study.get("run"))}}
    read = {step: results.read_json(pair / f"{ref.model_id}.json") for step, ref in models.items()}
    untrained = pair / "untrained.json"
    swap = study.result("layer_swap")
    downstream = study.result("downstream")
    return {
        "retrieval": {step: payload for step, (payload, _) in read.items()},
        "n": read[0][1].get("n_used"),
        "untrained": results.read_json(untrained)[0] if untrained.is_file() else None,
        "layers": results.read_json(study.result("layers"))[0],
        "change": results.read_json(study.result("int_and_sem"))[0],
        "downstream": results.read_json(downstream)[0] if downstream.is_file() else None,
        "controls": results.read_json(swap / "controls.json")[0],
    }


def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table; the caller formats the numbers."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def retrieval_rows(seeds: dict[int, dict]) -> part_two.Rows:
    """Accuracy (base to target) by hidden state: untrained, base, first and last checkpoint of each seed."""
    rows = []
    for seed, of_seed in seeds.items():
        of_step, steps = of_seed["retrieval"], sorted(of_seed["retrieval"])
        curves = [("untrained", of_seed["untrained"]["layer_accuracy"])] if of_seed["untrained"] else []
        for step in (steps[0], steps[1], steps[-1]):
            curves.append((f"step {step}" if step else "base", of_step[step]["layer_accuracy"]))
        curves.append((f"step {steps[-1]}, centred", of_step[steps[-1]]["centred_accuracy"]))
        rows += [[seed, name, *(f"{a:.3f}" for _, a in curve)] for name, curve in curves]
    return ["seed", "model", *(f"h{i}" for i in range(len(rows[0]) - 2))], rows


def layers_rows(seeds: dict[int, dict]) -> part_two.Rows:
    rows = []
    for seed, of_seed in seeds.items():
        split = of_seed["layers"]
        stable = split.get("label_stability") or []
        rows.append([
            seed, *(", ".join(map(str, split[f"{group}_layers"])) for group in ("interface", "semantic")),
            " / ".join(f"{c:.3f}" for c in split["centres"].values()), f"{split['silhouette']:.2f}",
            "yes" if split.get("hub_contiguous") else "no", f"{min(stable):.2f}" if stable else "-",
        ])  # fmt: skip
    return ["seed", "interface", "hub", "centres", "silhouette", "hub in one block", "least stable label"], rows


def steps_of(change: dict) -> list[tuple[int, dict]]:
    """(step, row) of a weight-change result, in order of steps, without the base."""
    return sorted((int(step), row) for step, row in change["checkpoints"].items() if int(step))


def change_rows(seeds: dict[int, dict]) -> part_two.Rows:
    rows = [
        [seed, step, f"{row['interface_avg']:.2e}", f"{row['semantic_hub_avg']:.2e}",
         f"{row['interface_avg'] / row['semantic_hub_avg']:.2f}" if row["semantic_hub_avg"] else "-"]
        for seed, of_seed in seeds.items()
        for step, row in shown.evenly(steps_of(of_seed["change"]), STEPS)
    ]  # fmt: skip
    return ["seed", "step", "interface", "hub", "interface / hub"], rows


def downstream_rows(seeds: dict[int, dict]) -> part_two.Rows:
    rows = []
    for seed, of_seed in seeds.items():
        for kind in ("interface", "semantic_hub") if of_seed["downstream"] else ():
            parts = of_seed["downstream"][kind], of_seed["downstream"][kind]["first_differences"]
            cells = [part_two.interval(part) for part in parts]
            cells = [
                f"{text}, p {part['p_value']:.3f}" if text != "-" else text
                for text, part in zip(cells, parts, strict=True)
            ]
            rows.append([seed, kind, *cells, *(part["n_points"] for part in parts)])
    return ["seed", "layers", "r", "r of first differences", "n", "n of differences"], rows


def swap_rows(seeds: dict[int, dict]) -> part_two.Rows:
    rows = []
    for seed, of_seed in seeds.items():
        for name, row in of_seed["controls"]["comparison"].items():
            interval = f" [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]" if row.get("ci_low") is not None else ""
            lost = [f"{row[k]:.0%}" if row[k] is not None else "-" for k in ("own_gain_lost", "random_gain_lost")]
            rows.append([
                seed, name, f"{row['base']:.3f}", f"{row['target']:.3f}", f"{row['own']:.3f}",
                f"{row['random_mean']:.3f} ± {row['random_sd'] or 0:.3f}", f"{row['own_minus_random']:+.3f}{interval}",
                *lost, f"{row['rank']} of {row['n_random'] + 1}", f"{row['p_value']:.3f}",
            ])  # fmt: skip
    head = ["seed", "measure", "base", "checkpoint", "hub swap", "random swaps (mean ± sd)", "hub minus random"]
    return [*head, "gain lost, hub", "gain lost, random", "rank of the hub", "p"], rows


TABLES = {
    "Retrieval by hidden state": retrieval_rows,
    "Layers": layers_rows,
    "Weight change, mean |dW|": change_rows,
    "Downstream accuracy against weight change": downstream_rows,
    "Layer swaps": swap_rows,
}


# ---------------------------------------------------------------- figures


def draw_retrieval(seeds: dict[int, dict], path: Path) -> None:
    """Retrieval by hidden state, one panel per seed: base and some steps, with the hub shaded."""
    with figures.style() as plt:
        fig, axes = part_two.panels(plt, len(seeds), 1.8)
        for axis, (seed, of_seed) in zip(axes, seeds.items(), strict=True):
            first, *trained = sorted(of_seed["retrieval"])
            steps = [first, *shown.evenly(trained, STEPS)]
            colours = [figures.colour("base"), *figures.colours(len(steps) - 1, ordered=True)]
            styles = [{"color": shade, "label": None if s else "base"} for s, shade in zip(steps, colours, strict=True)]
            lines = [(of_seed["retrieval"][s]["layer_accuracy"], style) for s, style in zip(steps, styles, strict=True)]
            untrained = of_seed["untrained"] and of_seed["untrained"]["layer_accuracy"]
            figures.retrieval_axis(axis, lines, of_seed["layers"]["semantic_layers"], untrained, of_seed["n"])
            axis.set_title(f"seed {seed}")
            axis.set_xlabel("")
        fig.supxlabel(figures.HIDDEN_STATE, fontsize=8)
        fig.supylabel("retrieval accuracy", fontsize=8)
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
        figures.steps_bar(fig, axes, steps[1:])
        figures.save(fig, path)


def draw_change(seeds: dict[int, dict], path: Path) -> None:
    """Mean absolute weight change of interface and hub layers over steps; one line per seed."""
    with figures.style() as plt:
        fig, axis = plt.subplots(figsize=(figures.COLUMN, 2.1))
        for number, of_seed in enumerate(seeds.values()):
            rows = [(0, {"interface_avg": 0.0, "semantic_hub_avg": 0.0}), *steps_of(of_seed["change"])]
            for key, meaning, line, label in (
                ("interface_avg", "interface", "-", "interface layers"),
                ("semantic_hub_avg", "hub", "--", "hub layers"),
            ):
                y = [row[key] for _, row in rows]
                style = {"color": figures.colour(meaning), "linewidth": 0.8, "label": label if number == 0 else None}
                axis.plot([s for s, _ in rows], y, line, **style)
        axis.set_xlabel("training step (0 = base)")
        axis.set_ylabel("mean |ΔW| from the base")
        axis.set_ylim(bottom=0)
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        axis.set_title(f"{len(seeds)} seeds, a line each", loc="right")
        axis.legend()
        figures.save(fig, path)


def draw_swaps(seeds: dict[int, dict], path: Path) -> None:
    """The hub swap of each seed among random swaps of the same size."""
    rows = []
    for seed, of_seed in seeds.items():
        payload = of_seed["controls"]
        hub = payload["sets"][controls.find(payload["sets"], "semantic_hub")]
        rows.append(swap_figure.row_of(payload, hub, f"seed {seed}", "hub"))
    swap_figure.draw(path, rows, f"hub swap, {len(seeds)} seeds")


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    text = "seeds with results; no default"
    p.add_argument("--seeds", required=True, type=cli.seeds, metavar="S,S,..", help=text)
    p.add_argument("--out", "--output", required=True, metavar="FOLDER", help="folder of all output; no default")
    return p


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    studies = {seed: Study.find(args.study, seed, args.arm) for seed in args.seeds}
    seeds = {seed: read_seed(study) for seed, study in studies.items()}
    second = {seed: part_two.read_seed(study) for seed, study in studies.items()}
    missing = [seed for seed, of_seed in second.items() if of_seed is None]
    if missing:
        cli.say(f"Part II is left out: it was not run for seed {', '.join(map(str, missing))}")
        second = {}
    sweeps = {seed: part_three.read_seed(study) for seed, study in studies.items()}
    sweeps = sweeps if all(sweeps.values()) else {}
    out = Path(args.out)
    parts = {title: rows(seeds) for title, rows in TABLES.items()}
    if second:
        parts |= {title: rows(second) for title, rows in part_two.TABLES.items()}
    if sweeps:
        parts["Layer ablation: gain; area of what blocks keep from the input side minus from the output side"] = (
            part_three.sweep_rows(sweeps)
        )
    parts |= part_five.tables(studies)
    text = "\n\n".join(f"## {title}\n\n{table(*part)}" for title, part in parts.items() if part[1])
    results.write_text(out / "tables.md", text + "\n")
    draw_retrieval(seeds, out / "retrieval")
    draw_change(seeds, out / "weight_change")
    draw_swaps(seeds, out / "swaps")
    if second:
        part_two.draw_swaps(second, out / "component_swaps")
        part_two.draw_deactivation(second, out / "deactivation")
    if sweeps:
        part_three.draw_sweeps(sweeps, out / "sweeps")
    cli.say(f"wrote {out}/tables.md and the figures for the seeds {', '.join(map(str, seeds))}")


if __name__ == "__main__":
    cli.run(main)
