"""The figure of spectrum.py: spectra of three projections, and the share of the change in the singular values."""

from __future__ import annotations

import math
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import figures

SHOWN = ("q_proj", "o_proj", "down_proj")
LOOKS = {
    "base": {"color": figures.colour("base"), "label": "base"},
    "target": {"color": figures.colour("target"), "label": "checkpoint", "linestyle": "--"},
    "update": {"color": figures.PALETTE[0], "label": "their difference", "linestyle": "-."},
}


def draw(path: Path, payload: dict, values: dict) -> None:
    """The last checkpoint in detail, and the course over training if there are several checkpoints.

    Args:
        payload: the result; `values`: singular values [M] by `<matrix>.base`, `<matrix>.<step>.target` and `.update`.
    """
    steps, rows = list(payload["pooled"]), payload["matrices"]
    with figures.style() as plt:
        fig = plt.figure(figsize=(figures.PAGE, 4.2 + 1.9 * (len(steps) > 1)))
        grid = fig.add_gridspec(2 + (len(steps) > 1), 6)
        shown, named = _shown(rows), None
        for number, row in enumerate(shown):
            axis = fig.add_subplot(grid[0, 2 * number : 2 * number + 2])
            _spectra(axis, row, values, steps[-1])
            axis.set_ylabel("" if number else "eigenvalue σ² / max(out, in)")
            named = named or axis.get_legend_handles_labels()
        _shares(fig.add_subplot(grid[1, :]), rows, steps[-1])
        if len(steps) > 1:
            _over_steps(fig.add_subplot(grid[2, :3]), fig.add_subplot(grid[2, 3:]), payload["pooled"])
        if named:
            fig.legend(*named, loc="outside upper center", ncols=4)
        figures.save(fig, path)


def _shown(rows: list[dict]) -> list[dict]:
    """The rows of SHOWN, each in the middle one of the layers that have the projection (of a mixture: first expert)."""
    chosen = []
    for projection in SHOWN:
        matches = [row for row in rows if row["projection"] == projection]
        layers = sorted({row["layer"] for row in matches})
        chosen += [row for row in matches if row["layer"] == layers[len(layers) // 2]][:1]
    return chosen


def _spectra(axis, row: dict, values: dict, step: str) -> None:
    """Eigenvalues of B, C and dW by rank, with the upper Marchenko-Pastur edge of each."""
    pair = row["steps"][step]
    edges = {"base": row["base"], "target": pair["target"], "update": pair["update"]}
    keys = {"base": "base", "target": f"{step}.target", "update": f"{step}.update"}
    lowest = math.inf
    for name, look in LOOKS.items():
        eigenvalues = (values[f"{row['name']}.{keys[name]}"].double() ** 2 / max(row["shape"])).tolist()
        edge, largest = edges[name]["marchenko_pastur"]["upper"], eigenvalues[0]
        if not largest:
            continue
        ranks = [(i + 0.5) / len(eigenvalues) for i in range(len(eigenvalues))]
        axis.plot(ranks, [max(value, 1e-300) for value in eigenvalues], **look)
        # The edges of B and C cannot be told apart by eye.
        label = "Marchenko-Pastur edge" if name == "base" else None
        axis.axhline(edge, color=look["color"], linewidth=0.7, linestyle=":", label=label)
        lowest = min(lowest, max(eigenvalues[int(0.98 * len(eigenvalues))], largest * 1e-6))
    axis.set_yscale("log")
    axis.set_ylim(bottom=lowest / 2 if math.isfinite(lowest) else None)
    axis.set_xlabel("rank / number")
    axis.set_title(f"layer {row['layer']}, {row['projection']}")


def _shares(axis, rows: list[dict], step: str) -> None:
    """The value share of each projection and layer (experts pooled), and the range over all its random updates."""
    from matplotlib import ticker

    order = [*archs.PROJECTIONS, archs.ROUTER]
    groups = sorted({(order.index(row["projection"]), row["layer"]) for row in rows})
    starts, x, ticks = {}, 0, {}
    for kind, layer in groups:
        x += 1 + 1.5 * (kind not in starts)
        starts.setdefault(kind, x)
        ticks.setdefault(order[kind], []).append(x)
        matches = [row["steps"][step] for row in rows if (row["projection"], row["layer"]) == (order[kind], layer)]
        matches = [pair for pair in matches if pair["update_sq"]]
        if not matches:
            continue
        total = math.fsum(pair["update_sq"] for pair in matches)
        drawn = [
            math.fsum(pair["update_sq"] * pair["nulls"][null]["value_share"][draw] for pair in matches) / total
            for null in matches[0]["nulls"]
            for draw in range(len(matches[0]["nulls"][null]["value_share"]))
        ]
        labels = ("random updates", "the change") if not axis.lines else (None, None)
        look = {"solid_capstyle": "butt", "color": figures.colour("random"), "linewidth": min(2.4, 300 / len(groups))}
        middle, half = (min(drawn) + max(drawn)) / 2, max(max(drawn) - min(drawn), 0.02 * max(drawn)) / 2
        axis.plot([x, x], [middle - half, middle + half], label=labels[0], **look)
        share = math.fsum(pair["value_sq"] for pair in matches) / total
        axis.plot(x, share, "o", markersize=2.8, color=LOOKS["update"]["color"], label=labels[1])
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda share, _: f"{share:g}"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    axis.set_xticks([sum(xs) / len(xs) for xs in ticks.values()], list(ticks))
    axis.tick_params(axis="x", length=0)
    axis.set_xlabel("layers from first to last, by projection")
    axis.set_ylabel("share of ‖ΔW‖² in\nthe singular values")
    if axis.lines:  # else nothing changed
        axis.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, borderaxespad=0)


def _over_steps(left, right, pooled: dict) -> None:
    """The value share of all matrices and the effective rank of their change over training."""
    steps = [int(step) for step, row in pooled.items() if row["value_share"] is not None]
    rows = [row for row in pooled.values() if row["value_share"] is not None]
    null = [row["nulls"]["gaussian"]["value_share"] for row in rows]
    mean = [sum(shares) / len(shares) for shares in null]
    left.plot(steps, mean, color=figures.colour("random"), marker="s", linestyle="--", label="Gaussian updates")
    change = {"marker": "o", "color": LOOKS["update"]["color"], "label": "the change"}
    left.plot(steps, [row["value_share"] for row in rows], **change)
    left.set_ylim(bottom=0)
    left.set_ylabel("share of ‖ΔW‖² in\nthe singular values")
    left.legend(loc="best")
    ranks = [row["effective_rank"] for row in rows]
    look = {"color": figures.colour("random"), "marker": "s", "linestyle": "--", "label": "Gaussian updates"}
    drawn = [rank / row["nulls"]["gaussian"]["effective_rank_ratio"] for rank, row in zip(ranks, rows, strict=True)]
    right.plot(steps, drawn, **look)
    right.plot(steps, ranks, **change)
    right.set_ylabel("effective rank of ΔW\n/ min(out, in), median")
    right.set_ylim(0, 1)
    for axis in (left, right):
        axis.set_xlabel("training step")
