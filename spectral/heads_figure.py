"""The figure of heads.py: how much each head changed, by layer, and the share of the update in those changed most."""

from __future__ import annotations

from pathlib import Path

from cpt_utils.base import figures
from cpt_utils.base.lazy import np


def draw(path: Path, payload: dict, n_layers: int) -> None:
    """A map of the units, one of single query heads if several share a unit's keys, and the share of the update over
    the number of units."""
    maps = {"unit (KV head)": units(payload["heads"], n_layers)}
    if any(len(row["query_heads"]) > 1 for row in payload["heads"]):
        maps["query head (its q and o)"] = queries(payload["heads"], n_layers)
    bound = max(float(np.nanmax(values)) for values in maps.values()) or 1.0
    widths = [*(max(1.2, 0.5 + values.shape[0] / 8) for values in maps.values()), 2.2]
    with figures.style() as plt:
        fig, axes = plt.subplots(1, len(widths), figsize=(figures.PAGE, 2.6), width_ratios=widths)
        for axis, (name, values) in zip(axes, maps.items(), strict=False):
            axis.set_facecolor("0.85")  # layers without attention
            image = axis.imshow(values.T, cmap="Blues", vmin=0, vmax=bound, aspect="auto", origin="lower")
            _numbers(axis.set_xticks, values.shape[0], 6)
            _numbers(axis.set_yticks, n_layers, 12)
            axis.set_xlabel(name)
            axis.spines[:].set_visible(False)
        axes[0].set_ylabel("layer")
        bar = fig.colorbar(image, ax=axes[len(maps) - 1], fraction=0.08, pad=0.04)
        bar.set_label("importance ‖ΔW‖ / ‖B‖")
        bar.outline.set_visible(False)
        _shares(axes[-1], payload)
        figures.save(fig, path)


def units(rows: list[dict], n_layers: int) -> np.ndarray:
    """The importance of every unit [units, layers]; NaN where a layer has no unit of that number."""
    grid = np.full((1 + max(row["unit"] for row in rows), n_layers), np.nan)
    for row in rows:
        grid[row["unit"], row["layer"]] = row["importance"]["relative"]
    return np.where(np.isinf(grid), np.nan, grid)


def queries(rows: list[dict], n_layers: int) -> np.ndarray:
    """The same for single query heads: [query heads, layers]."""
    heads = [
        {"layer": row["layer"], "unit": head["head"], "importance": head["importance"]}
        for row in rows for head in row["query_heads"]
    ]  # fmt: skip
    return units(heads, n_layers)


def _numbers(ticks, n: int, most: int) -> None:
    ticks(range(0, n, max(1, -(-n // most))))


def _shares(axis, payload: dict) -> None:
    """The share of the update in the k units that have most of it, over k as a share of all units."""
    curves, last = payload["curves"], payload["steps"][max(payload["steps"], key=int)]["concentration"]
    n = len(curves["update"])
    at = [i / n for i in range(n + 1)]

    def from_nothing(values):
        return [0.0, *values]

    low, high = map(from_nothing, curves["permuted"])
    axis.fill_between(at, low, high, color=figures.colour("random"), alpha=0.5, linewidth=0, label="features permuted")
    axis.plot(at, from_nothing(curves["in_proportion"]), ":", color=figures.colour("base"), label="in proportion")
    axis.plot(at, from_nothing(curves["update"]), color=figures.colour("target"), label="update")
    if last is not None:
        share = last["k"] / last["n_units"]
        axis.plot([share], [last["top_share"]], "o", color=figures.colour("target"))
        axis.set_title(f"{100 * last['top_share']:.0f} % in the {last['k']} most changed of {n} units")
    axis.set_xlabel("share of units, most changed first")
    axis.set_ylabel("share of ‖ΔW‖²")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.02)
    axis.legend(loc="lower right", borderaxespad=0.2)
