"""Part III of one study over several seeds: layer-ablation sweeps for studies/across_seeds.py."""

from __future__ import annotations

from pathlib import Path

from cpt_utils.base import cli, figures, results, stats
from cpt_utils.base.lazy import np
from cpt_utils.base.study import Study

retention = cli.sibling("layer-ablation/retention.py")
part_two = cli.sibling("studies/part_two.py")
# The measures with a panel; loss and task, too, because CPT improved them whenever the model learnt anything.
SHOWN = ("nll_target", "task_accuracy", "perception", "production")
SIDES = {"insert_in": "from the input side", "insert_out": "from the output side"}


def read_seed(study: Study) -> dict | None:
    """The sweep of one seed; None if it has not been run."""
    path = study.result("layer_ablation")
    return results.read_json(path)[0] if path.is_file() else None


def sweep_rows(seeds: dict[int, dict]) -> part_two.Rows:
    """A = AUC_in - AUC_out of every measure: positive if its change comes with the first blocks."""
    names = [name for name in retention.MEASURES if all(name in of_seed["summary"] for of_seed in seeds.values())]
    rows = []
    for seed, of_seed in seeds.items():
        areas = [of_seed["summary"][name]["A"] for name in names]
        cells = [stats.told(a, "+.2f") if a else "-" for a in areas]
        gains = [of_seed["summary"][name]["gain"]["value"] for name in names]
        rows.append([seed, *(f"{gain:+.3f}; {cell}" for gain, cell in zip(gains, cells, strict=True))])
    return ["seed", *names], rows


def draw_sweeps(seeds: dict[int, dict], path: Path) -> None:
    """The share of the change kept by the checkpoint's first or last blocks: one line per seed, and the mean."""
    shown = [name for name in SHOWN if all((of_seed["summary"].get(name) or {}).get("A") for of_seed in seeds.values())]
    if not shown:
        return
    with figures.style() as plt:
        fig, axes = part_two.panels(plt, len(shown), 1.9)
        for axis, name in zip(axes, shown, strict=True):
            for (sweep, words), shade in zip(SIDES.items(), figures.PALETTE, strict=False):
                curves = np.array([[v for _, v in of_seed["retention"][sweep][name]] for of_seed in seeds.values()])
                ks = [k for k, _ in next(iter(seeds.values()))["retention"][sweep][name]]
                axis.plot(ks, curves.T, color=shade, linewidth=0.6, alpha=0.35)
                axis.plot(ks, curves.mean(0), color=shade, marker="o", label=words)
            axis.axhline(0, color=figures.colour("base"), linewidth=0.6, linestyle=":", label="base")
            axis.axhline(1, color=figures.colour("target"), linewidth=0.6, linestyle="--", label="checkpoint")
            worse = all(of_seed["summary"][name]["gain"]["value"] < 0 for of_seed in seeds.values())
            words = {"nll_target": "loss of the new language"}.get(name, name.replace("_", " "))
            axis.set_title(words + "\n(made worse by CPT)" * worse)
            figures.layer_axis(axis, ks[-1], hidden_states=True)
            axis.set_xlabel("")
        fig.supxlabel("blocks of the checkpoint (thin: a seed, thick: the mean)", fontsize=8)
        fig.supylabel("share of the change kept", fontsize=8)
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
        figures.save(fig, path)
