"""The figures of lsn/identify.py, drawn from its report alone."""

from __future__ import annotations

import math
from pathlib import Path

from cpt_utils.base import figures


def draw(path: Path, report: dict) -> list[Path]:
    """Every figure that the report has numbers for; returns the paths without suffix.

    `<path>-counts` and `<path>-convergence` always, `<path>-overlap` for three languages or more.
    """
    drawn = [path.with_name(f"{path.name}-counts")]
    draw_counts(drawn[0], report["languages"], report["n_layers"])
    if len(report["languages"]) > 2:
        drawn.append(path.with_name(f"{path.name}-overlap"))
        draw_overlap(drawn[-1], report["overlap"])
    drawn.append(path.with_name(f"{path.name}-convergence"))
    if report.get("convergence"):
        draw_convergence(drawn[-1], report["convergence"])
    else:
        draw_no_convergence(drawn[-1])
    return drawn


def draw_counts(path: Path, by_language: dict[str, dict], n_layers: int) -> None:
    """Neurons per layer, a panel for each language: dark where the neuron is this language's alone."""
    n = len(by_language)
    columns = 1 if n <= 4 else min(5, -(-n // 2))
    rows = -(-n // columns)
    width = figures.COLUMN if columns == 1 else figures.PAGE
    with figures.style() as plt:
        from matplotlib.patches import Patch

        figure, axes = plt.subplots(
            rows, columns, sharex=True, sharey=True, squeeze=False, figsize=(width, 0.45 + 0.95 * rows)
        )
        for (lang, facts), colour, axis in zip(by_language.items(), figures.colours(n), axes.ravel(), strict=False):
            shared = [a - b for a, b in zip(facts["counts"], facts["own"], strict=True)]
            axis.bar(range(n_layers), facts["own"], color=colour, width=0.9)
            axis.bar(range(n_layers), shared, bottom=facts["own"], color=colour, alpha=0.4, width=0.9)
            axis.set_title(f"{lang} (n = {facts['n_neurons']:,})", pad=2)
            axis.set_xticks(range(0, n_layers, -(-n_layers // (12 if columns == 1 else 5))))
        for axis in axes.ravel()[n:]:
            axis.set_visible(False)
        looks = [Patch(color="0.3", label="this language only"), Patch(color="0.75", label="shared with others")]
        figure.legend(handles=looks, loc="outside upper center", ncols=2)
        figure.supxlabel("layer", fontsize=8)
        figure.supylabel("language-specific neurons" if rows > 1 else "neurons", fontsize=8)
        figures.save(figure, path)


def draw_overlap(path: Path, shared: dict) -> None:
    """Jaccard of the neurons of every two languages; the diagonal holds the number of neurons."""
    import numpy as np

    names, n = shared["languages"], len(shared["languages"])
    values = np.array([[np.nan if value is None else value for value in row] for row in shared["jaccard"]], float)
    np.fill_diagonal(values, np.nan)
    size = figures.COLUMN if n <= 8 else figures.PAGE * 0.65
    # Not below 0.1, or next to no overlap would look like much.
    top = max([0.1, *values[np.isfinite(values)]])
    with figures.style() as plt:
        figure, axis = plt.subplots(figsize=(size, size * 0.85))
        axis.set_facecolor("0.92")
        image = axis.imshow(values, cmap="Blues", vmin=0, vmax=top)
        for i in range(n):
            for j in range(n):
                value = values[i, j]
                text = f"{shared['shared'][i][i]:,}" if i == j else "–" if np.isnan(value) else f"{value:.2f}"
                colour = "w" if value > 0.6 * top else "k"
                axis.text(j, i, text, ha="center", va="center", fontsize=6.5, color=colour)
        axis.set_xticks(range(n), names, rotation=45 if n > 4 and max(map(len, names)) > 3 else 0)
        axis.set_yticks(range(n), names)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        figure.colorbar(image, label="Jaccard (diagonal: number of neurons)", shrink=0.8)
        figures.save(figure, path)


def draw_convergence(path: Path, found: dict) -> None:
    """Jaccard of the mask from part of the tokens with the full one, over the share of tokens; the halves beside."""
    points, halves = found["against_full"], found["halves"]
    langs = list(halves["languages"])
    full = [halves["tokens_first"][lang] + halves["tokens_second"][lang] for lang in langs]
    shares = [point["share"] for point in points] + [1.0]
    lines = {lang: [point["languages"][lang] for point in points] for lang in langs}
    lines["all"] = [point["jaccard"] for point in points]
    known = [value for line in lines.values() for value in line if value is not None]
    with figures.style() as plt:
        figure, axis = plt.subplots(figsize=(figures.COLUMN, 2.4 + 0.13 * (len(langs) // 4)))
        for i, (lang, colour) in enumerate(zip(lines, [*figures.colours(len(langs)), "0.2"], strict=True)):
            values = [float("nan") if value is None else value for value in lines[lang]] + [1.0]
            # The palette repeats after eight: another dash tells the ninth from the first.
            dash, marker = ("-", "--", ":")[i // len(figures.PALETTE) % 3], figures.MARKERS[i % len(figures.MARKERS)]
            look = {"linewidth": 2, "zorder": 3} if lang == "all" else {"marker": marker, "linestyle": dash}
            axis.plot(shares, values, **({"linewidth": 0.8} | look), color=colour, label=lang)
        if halves["jaccard"] is not None:
            known.append(halves["jaccard"])
            look = {"color": "0.2", "marker": "X", "markersize": 7, "linestyle": "", "zorder": 4}
            axis.plot(points[-1]["share"], halves["jaccard"], **look, label="all, halves")
        axis.set_xscale("log", base=2)
        axis.set_xticks(shares, [*map(shown_share, shares[:-1]), "1"])
        axis.minorticks_off()
        amount = f"{min(full):,}" if min(full) == max(full) else f"{min(full):,}–{max(full):,}"
        axis.set_xlabel(f"share of the tokens ({amount} a language)")
        axis.set_ylabel("Jaccard with the full mask")
        axis.set_ylim(max(0, math.floor(10 * min(known, default=0) - 0.5) / 10), 1.01)
        figure.legend(loc="outside upper center", ncols=4 if len(langs) > 4 else 3, columnspacing=1.2, handlelength=1.8)
        figures.save(figure, path)


def draw_no_convergence(path: Path) -> None:
    """In the place of the curve, where there are no parts of the tokens to compare."""
    with figures.style() as plt:
        figure, axis = plt.subplots(figsize=(figures.COLUMN, 0.8))
        axis.set_axis_off()
        axis.text(
            0.5, 0.5, "too few tokens, or counts without snapshots:\nno parts to compare", ha="center", va="center"
        )
        figures.save(figure, path)


def shown_share(value: float) -> str:
    whole = round(1 / value)
    return f"1/{whole}" if abs(value * whole - 1) < 0.05 else f"{value:.2f}"
