"""The figure of sr_experiment.py: one panel per curve over hidden states, one line per model."""

from __future__ import annotations

from pathlib import Path

from cpt_utils.base import figures
from cpt_utils.checkpoints import refs
from cpt_utils.measures import curves

PANELS = {curve.key: curve.label for curve in curves.MEASURES.values()} | curves.DIAGNOSTICS
ACCURACIES = {curve.key for name, curve in curves.MEASURES.items() if not name.startswith("mexa")}
MEXA = {curve.key for curve in curves.MEASURES.values()} - ACCURACIES
COLUMNS = 4
MEANING = {"semantic_hub": "hub", "random": "random"}  # of swapped models, by the names of their folders
WORDS = {
    "semantic_hub": "hub of the base", "random": "random layers of the base", "attn_int_swap": "interface attention of "
    "the base", "ffn_lsn_swap": "LSN-rich FFN of the base",
}  # fmt: skip
Lines = list[tuple[refs.ModelRef, dict]]


def draw(path: Path, lines: Lines, untrained: dict | None, n: int, title: str) -> None:
    """The curves in the results (older ones have two): the base black, checkpoints light to dark in step order.

    Bands: 95 % intervals of the first and the last model. Grey: where the last model's published curve measures length.
    """
    panels = [key for key in PANELS if any(key in result for _, result in lines)]
    steps = sorted({ref.step for ref, _ in lines if ref.step is not None})
    drawn = [(result, look) for (_, result), look in zip(lines, looks(lines, steps), strict=True)]
    twin = {"linestyle": (0, (3, 1)), "color": figures.colour("random"), "label": "untrained"}
    with figures.style() as plt:
        rows = -(-len(panels) // COLUMNS)
        size = (figures.PAGE, 0.6 + 1.45 * rows + 0.12 * len({look["label"] for _, look in drawn}) / 3)
        figure, axes = plt.subplots(rows, min(COLUMNS, len(panels)), figsize=size, squeeze=False)
        cells = dict(zip(panels, axes.flat, strict=False))
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for key, axis in cells.items():
            for result, look in [*drawn, *([(untrained, twin)] if untrained else [])]:
                if key in result:
                    plot(axis, key, result, look, band=result in (drawn[0][0], drawn[-1][0]))
            axis.set_title(PANELS[key])
            figures.layer_axis(axis, len(lines[0][1]["layer_accuracy"]) - 1, hidden_states=True, most=5)
            axis.set_xlabel("")
        for keys in (ACCURACIES, MEXA):
            alike(cells, keys)
        for key in ACCURACIES & cells.keys():
            figures.chance_line(cells[key], n)
        for state in curves.measuring_length(lines[-1][1]):
            axes[0, 0].axvspan(state - 0.5, state + 0.5, color="0.9", linewidth=0, label="measures length", zorder=0)
        finish(path, figure, axes, f"{title}, n = {n} sentences", steps)


def finish(path: Path, figure, axes, title: str, steps: list[int]) -> None:
    """Add one title and legend for all panels and, for several steps, a bar of the steps next to `axes`; save."""
    figure.suptitle(f"{title}; bands: 95 % intervals", fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    named = {label: handle for handle, label in zip(handles, labels, strict=True) if label[:1] != "_"}
    look = {"ncols": min(5, len(named)), "title": figures.HIDDEN_STATE}
    figure.legend(named.values(), named, loc="outside lower center", **look)
    if len(steps) > 1:
        figures.steps_bar(figure, axes, steps)
    figures.save(figure, path)


def looks(lines: Lines, steps: list[int]) -> list[dict]:
    """The look of each model's line; several steps get a colour from the bar, not a label; runs differ in dash."""
    shades = dict(zip(steps, figures.colours(len(steps), ordered=True), strict=True))
    runs = list(dict.fromkeys(Path(ref.spec).parent.name for ref, _ in lines if ref.step is not None))
    spare_colours, styles = iter(figures.colours(len(lines))), []
    for number, (ref, _) in enumerate(lines):
        run = Path(ref.spec).parent.name
        if ref.step is None:
            base = number == 0 and bool(steps)
            label = Path(ref.spec).name
            meaning = "base" if base else MEANING.get(label)
            shade = figures.colour(meaning) if meaning else next(spare_colours)
            styles.append({"linestyle": "-" if base else "--", "color": shade, "label": WORDS.get(label, label)})
            continue
        name = WORDS.get(run, run)
        alone = len(runs) > 1 and len(steps) == 1  # coloured by run, not by step
        label = f"{name}, step {ref.step}" if len(runs) > 1 else f"step {ref.step}"
        if len(steps) > 1:
            label = name if len(runs) > 1 and ref.step == steps[-1] else None
        style = ("-", "--", ":", "-.")[runs.index(run) % 4]
        styles.append({"linestyle": style, "color": next(spare_colours) if alone else shades[ref.step], "label": label})
    return styles


def alike(cells: dict, keys: set[str]) -> None:
    """One scale for the panels of `keys`; only the leftmost shows tick labels."""
    axes = [axis for key, axis in cells.items() if key in keys]
    for column, axis in enumerate(axes):
        axis.set_ylim(0, max(each.get_ylim()[1] for each in axes))
        axis.tick_params(labelleft=column == 0)
    if axes:
        axes[0].set_ylabel("accuracy" if keys == ACCURACIES else "share of pairs")


def plot(axis, key: str, result: dict, look: dict, band: bool) -> None:
    """One curve of one model, with its interval if `band`. Undefined values leave gaps."""
    states, values = zip(*sorted(result[key]), strict=True)
    axis.plot(states, [float("nan") if value is None else value for value in values], linewidth=0.9, **look)
    ends = [(state, *ends) for state, ends in result.get(f"{key}_ci", []) if None not in ends]
    if band and ends:
        axis.fill_between(*zip(*ends, strict=True), color=look["color"], alpha=0.15, linewidth=0)
