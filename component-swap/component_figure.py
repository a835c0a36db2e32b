"""The figure of a controls.json of the component swaps."""

from __future__ import annotations

import textwrap
from itertools import pairwise
from pathlib import Path

from cpt_utils.base import figures
from cpt_utils.interventions.components import EMBEDDINGS
from cpt_utils.measures import evaluation


def draw(path: Path, payload: dict) -> None:
    """A bar for each condition, from the target's value to its own, and the random sets as dots; a panel per measure.

    Bars carry the bootstrap interval of the difference from the target. Everything comes from `payload`, the content
    of a controls.json.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    named = _in_order([row for row in payload["sets"] if row["name"] not in ("base", "target", "random")])
    drawn = [row for row in payload["sets"] if row["name"] == "random"]
    heights = _heights(named, payload["own"])
    grey = figures.colour("random")
    with figures.style() as plt:
        names = list(payload["comparison"])
        width = figures.COLUMN if len(names) == 1 else figures.PAGE
        size = (width, 1.15 + 0.2 * (heights[-1] + 2))
        fig, axes = plt.subplots(1, len(names), sharey=True, figsize=size, squeeze=False)
        for axis, name in zip(axes[0], names, strict=True):
            end = payload["comparison"][name]
            for row, y in zip(named, heights, strict=True):
                own = row["name"] == payload["own"]
                if own:
                    around = [y + 1.1 * ((i + 0.5) / len(drawn) - 0.5) for i in range(len(drawn))]
                    dots = sorted(random_set["values"][name] for random_set in drawn)
                    axis.scatter(dots, _scattered(around), s=5, color=grey, linewidths=0, zorder=1)
                _bar(axis, row, name, y, end["target"], 0.3 if own else 0.62)
            axis.axvline(end["base"], color=figures.colour("base"), linestyle=":", zorder=0)
            axis.axvline(end["target"], color=figures.colour("target"), linestyle="--", zorder=3)
            axis.set_xlabel(textwrap.fill(evaluation.MEASURES[name].label, 19 if len(names) > 2 else 30))
            axis.use_sticky_edges = False  # a bar starts at the target, which may be the end of the axis
            axis.margins(x=0.08)
            axis.locator_params(axis="x", nbins=4)
        axes[0, 0].set_yticks(heights, [_label(row) for row in named])
        axes[0, 0].set_ylim(max(heights) + 0.7, min(heights) - 0.7)
        layers = next(row for row in payload["sets"] if row["name"] == payload["own"])["layers"]
        random_label = (
            f"{len(drawn)} random sets of {len(layers)} of {payload.get('n_layers_having', payload['n_layers'])} layers"
        )
        legend = [
            Line2D([], [], color=figures.colour("base"), linestyle=":", label="base"),
            Line2D([], [], color=figures.colour("target"), linestyle="--", label="checkpoint"),
            Line2D([], [], color=grey, marker="o", linestyle="", markersize=3, label=random_label),
        ]
        if any("+" in row["component"] for row in named):
            legend.append(Patch(facecolor="white", edgecolor="black", hatch="/////", label="with embeddings, lm_head"))
        fig.legend(handles=legend, loc="outside lower center", ncols=2 if len(names) == 1 else 4)
        figures.save(fig, path)


def _in_order(named: list[dict]) -> list[dict]:
    """Attention, FFN, embeddings; each condition followed by itself with embeddings, whichever was measured first."""
    return sorted(named, key=lambda row: (list("afe").index(row["component"][0]), row["name"]))


def _heights(named: list[dict], own: str) -> list[float]:
    """Where the bars stand: one apart, more between components, and around `own`, which has the dots behind it."""
    heights = [0.0]
    for above, below in pairwise(named):
        apart = 1.0 if above["component"][0] == below["component"][0] else 1.4
        heights.append(heights[-1] + apart + (0.3 if own in (above["name"], below["name"]) else 0))
    return heights


def _scattered(values: list[float]) -> list[float]:
    """The values in another fixed order, so that dots sorted by value do not form a line."""
    import random

    return random.Random(0).sample(values, len(values))


def _bar(axis, row: dict, name: str, y: float, target: float, height: float) -> None:
    component, _, extra = row["component"].partition("+")
    colour = figures.colour("random" if component == EMBEDDINGS else component)
    face = {"facecolor": "white", "hatch": "/////"} if extra else {"facecolor": colour}
    value, change = row["values"][name], (row.get("change") or {}).get(name)
    axis.barh(y, value - target, height, target, edgecolor=colour, linewidth=0.6, zorder=2, **face)
    if change:
        error = [[change["mean"] - change["ci_low"]], [change["ci_high"] - change["mean"]]]
        axis.errorbar(value, y, xerr=error, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5, zorder=4)


def _label(row: dict) -> str:
    """ "attention, interface (8 %)": component, place, share of the parameters."""
    names = [name.removesuffix(f"_{EMBEDDINGS}") for name in (row["name"], *row.get("also", ()))]
    component, _, place = names[0].partition("_")
    words = {"interface": "interface", "lsn_rich": "LSN-rich"}
    where = " = ".join(words[name.partition("_")[2]] for name in names) if place else ""
    shown = {"attention": "attention", "ffn": "FFN", EMBEDDINGS: "embeddings, lm_head"}[component]
    more = " + emb." if "+" in row["component"] else ""
    return f"{shown}{', ' + where if where else ''}{more} ({100 * row['share']:.0f} %)"
