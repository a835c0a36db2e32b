"""The figure of swaps: what each of them does to every measure, compared with random sets of its size."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cpt_utils.base import figures
from cpt_utils.measures import controls
from cpt_utils.measures.evaluation import MEASURES

LANE = 0.6  # the height of the line of squares below a swap


@dataclass
class Row:
    """One swap: a line of the figure.

    Attributes:
        values, base, target: measure -> its value under the swap, of the base, of the checkpoint.
        meaning: determines the colour, see `figures.colour`.
        changes: measure -> the `change` of a row of controls.json, whose interval is drawn.
        others: the rows of the random sets that it is compared with.
        matched: the rows of the sets of the same shape.
        hollow: whether it is drawn as a white diamond.
    """

    label: str
    meaning: str
    values: dict[str, float]
    base: dict[str, float]
    target: dict[str, float]
    changes: dict[str, dict] = field(default_factory=dict)
    others: Sequence[dict] = ()
    matched: Sequence[dict] = ()
    hollow: bool = False


def row_of(payload: dict, found: dict, label: str, meaning: str, compared: bool = True, hollow: bool = False) -> Row:
    """The swap `found` of the `sets` of a controls.json, with the sets of its shape and, if `compared`, random ones."""
    ends = {end: next(row["values"] for row in payload["sets"] if row["name"] == end) for end in ("base", "target")}
    matched_layers = ((payload.get("matched") or {}).get(found["name"]) or {}).get("layers") or []
    by_layers = {tuple(row["layers"]): row for row in payload["sets"] if row.get("component") == found.get("component")}
    matched = [by_layers[tuple(layers)] for layers in matched_layers]
    others = [row for row in controls.randoms(payload["sets"], found) if row not in matched] if compared else []
    return Row(label, meaning, found["values"], **ends, changes=found.get("change") or {}, others=others,
               matched=matched, hollow=hollow)  # fmt: skip


def draw(path: Path, rows: list[Row], title: str, n_layers: int | None = None) -> None:
    """A panel for each measure, a line for each swap: a stem from the checkpoint's value to a diamond at the swap's.

    Whiskers are bootstrap intervals of the difference from the checkpoint, over the same sentences (documents, rows).
    Dots are random sets; if `n_layers` is given, open ones hold the first or the last layer, which often decides what a
    swap costs. Squares below are sets of the swap's shape. The best layer's retrieval, which has no interval, is
    omitted if there is the readout.
    """
    measures = [name for name in MEASURES if all(name in row.values for row in rows)]
    if "retrieval_readout" in measures:
        measures.remove("retrieval_best")
    shared = all(row.base == rows[0].base and row.target == rows[0].target for row in rows)
    heights, height = [], 0.0
    for row in rows:
        height += 0.5 if row.others else 0.0  # the dots need room above and below
        heights.append(height)
        height += (1.5 if row.others else 1.0) + (LANE if row.matched else 0.0)
    bottom = heights[-1] + 0.9 + (LANE if rows[-1].matched else 0.0)
    with figures.style() as plt:
        size = (figures.COLUMN if len(measures) == 1 else figures.PAGE, 1.25 + 0.2 * (height + 0.5))
        fig, axes = plt.subplots(1, len(measures), figsize=size, sharey=True, squeeze=False)
        for axis, name in zip(axes[0], measures, strict=True):
            for row, y in zip(rows, heights, strict=True):
                _dots(axis, row, name, y, n_layers)
                _squares(axis, row, name, y + (0.5 if row.others else 0.1) + LANE / 2)
                _diamond(axis, row, name, y)
                for end, line in (("base", ":"), ("target", "--")):
                    reach = (-1, bottom + 0.1) if shared else (y - 0.6, y + 0.6)
                    value = getattr(row, end)[name]
                    axis.plot([value] * 2, reach, line, color=figures.colour(end), linewidth=1, zorder=0)
            axis.set_xlabel(textwrap.fill(MEASURES[name].label, {3: 24, 4: 21}.get(len(measures), 30)))
            axis.locator_params(axis="x", nbins=4)
            axis.margins(x=0.08)
        axes[0, 0].set_yticks(heights, [row.label for row in rows])
        axes[0, 0].set_ylim(bottom, -0.9)
        fig.suptitle(title, fontsize=8)
        fig.legend(
            handles=_legend(plt, rows, n_layers), loc="outside lower center", ncols=2 if len(measures) == 1 else 4
        )
        figures.save(fig, path)


def _dots(axis, row: Row, name: str, y: float, n_layers: int | None) -> None:
    scatter = random.Random(0)
    heights = [y + scatter.uniform(-0.45, 0.45) for _ in row.others]
    grey = figures.colour("random")
    for is_outer in (False, True):
        chosen = [i for i, other in enumerate(row.others) if _outer(other, n_layers) == is_outer]
        values = [row.others[i]["values"][name] for i in chosen]
        style = {"facecolors": "none" if is_outer else grey, "edgecolors": grey, "linewidths": 0.5, "zorder": 1}
        axis.scatter(values, [heights[i] for i in chosen], s=7, **style)


def _squares(axis, row: Row, name: str, y: float) -> None:
    values = [other["values"][name] for other in row.matched]
    style = {"facecolors": "none", "edgecolors": figures.colour(row.meaning), "linewidths": 0.8, "zorder": 2}
    axis.scatter(values, [y] * len(values), s=10, marker="s", **style)


def _outer(other: dict, n_layers: int | None) -> bool:
    return n_layers is not None and (0 in other["layers"] or n_layers - 1 in other["layers"])


def _diamond(axis, row: Row, name: str, y: float) -> None:
    value, change, shade = row.values[name], row.changes.get(name), figures.colour(row.meaning)
    axis.plot([row.target[name], value], [y, y], color=shade, linewidth=1.2, zorder=2)
    if change:
        error = [[max(0.0, change["mean"] - change["ci_low"])], [max(0.0, change["ci_high"] - change["mean"])]]
        axis.errorbar(value, y, xerr=error, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5, zorder=3)
    face = "white" if row.hollow else shade
    axis.plot(value, y, "D", color=face, markeredgecolor=shade, markeredgewidth=0.8, markersize=4, zorder=4)


def _legend(plt, rows: list[Row], n_layers: int | None) -> list:
    grey = figures.colour("random")
    whisker = {"color": "black", "linewidth": 0.8, "marker": "|", "markersize": 4}
    handles = [
        plt.Line2D([], [], color=figures.colour("base"), linestyle=":", label="base"),
        plt.Line2D([], [], color=figures.colour("target"), linestyle="--", label="checkpoint"),
    ]
    others = [other for row in rows for other in row.others]
    kinds = {_outer(other, n_layers) for other in others}
    for is_outer in sorted(kinds):
        label = f"random set with layer 0 or {n_layers - 1}" if is_outer else "random set of layers"
        face = {"markerfacecolor": "none"} if is_outer else {}
        handles.append(plt.Line2D([], [], color=grey, marker="o", linestyle="", markersize=3, label=label, **face))
    if any(row.matched for row in rows):
        style = {"color": "none", "markeredgecolor": "black", "linestyle": "", "marker": "s"}
        handles.append(plt.Line2D([], [], **style, markersize=3, label="set of the swap's shape"))
    if any(row.hollow for row in rows):
        style = {"color": "white", "markeredgecolor": "black", "linestyle": "", "marker": "D"}
        handles.append(plt.Line2D([], [], **style, markersize=4, label="with embeddings, lm_head"))
    if any(row.changes for row in rows):
        handles.append(plt.Line2D([], [], **whisker, label="95 % interval of the change"))
    return handles
