"""The figure of sr_experiment.py: retrieval accuracy over hidden states, a line for each model."""

from __future__ import annotations

from pathlib import Path

from cpt_utils.base import figures
from cpt_utils.checkpoints import refs


def draw(path: Path, lines: list[tuple[refs.ModelRef, dict]], untrained: dict | None, n: int, title: str) -> None:
    """Accuracy over hidden states, a line per model: the base black, checkpoints light to dark in step order."""
    steps = sorted({ref.step for ref, _ in lines if ref.step is not None})
    shades = dict(zip(steps, figures.colours(len(steps), ordered=True), strict=True))
    # Runs side by side (swapped ones) differ in dash, and their lines carry the run's name.
    runs = list(dict.fromkeys(Path(ref.spec).parent.name for ref, _ in lines if ref.step is not None))
    others = iter(figures.colours(len(lines)))
    with figures.style() as plt:
        figure, axis = plt.subplots(figsize=(figures.COLUMN, 2.9 + 0.1 * max(0, len(lines) - 9)))
        drawn = []
        for number, (ref, result) in enumerate(lines):
            name, run = Path(ref.spec).name, Path(ref.spec).parent.name
            if ref.step is not None:
                name = f"{run}, step {ref.step}" if len(runs) > 1 else f"step {ref.step}"
            is_base = number == 0 and ref.step is None and bool(steps)
            alone = ref.step is None or (len(runs) > 1 and len(steps) == 1)  # a colour of its own, not of its step
            shade = shades[ref.step] if not alone else figures.colour("base") if is_base else next(others)
            style = ("-", "--", ":", "-.")[runs.index(run) % 4] if ref.step is not None else "-" if is_base else "--"
            drawn.append((result["layer_accuracy"], {"linestyle": style, "color": shade, "label": name}))
            if number in (0, len(lines) - 1):
                low, high = zip(*(ci for _, ci in result["layer_accuracy_ci"]), strict=True)
                axis.fill_between(range(len(low)), low, high, color=shade, alpha=0.15, linewidth=0)
        figures.retrieval_axis(axis, drawn, untrained=untrained and untrained["layer_accuracy"])
        axis.axhline(1 / n, color=figures.colour("chance"), linewidth=0.8, linestyle=(0, (1, 3)), label=f"chance 1/{n}")
        axis.set_ylabel("retrieval accuracy")
        axis.set_title(f"{title}, n = {n} sentences")
        figure.legend(loc="outside lower center", ncols=3 if len(runs) < 2 else 2 if len(lines) > 4 else 1)
        figures.save(figure, path)
