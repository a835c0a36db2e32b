"""One style for all figures: widths of a two-column paper, readable at printed size, safe for colour-blind readers.

Colours are Okabe and Ito's palette; series over training steps use one light-to-dark scale instead. Series that are
compared also differ in marker or line style, so they can be distinguished in a grey print.
"""

from __future__ import annotations

import contextlib
import io
import re
import textwrap
from pathlib import Path

from cpt_utils.base import languages
from cpt_utils.base.results import replacing

COLUMN, PAGE = 3.25, 6.75  # inches: one column, both columns

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_MEANING = {
    "interface": "#D55E00",
    "hub": "#0072B2",
    "attention": "#CC79A7",
    "ffn": "#009E73",
    "base": "#000000",
    "random": "#999999",
    "chance": "#999999",
    "target": "#E69F00",
}
# For axes too small for both numberings (`layer_axis` with `both`).
HIDDEN_STATE = "hidden state (0 = embeddings; layer l puts out hidden state l + 1)"
MOST = 8  # entries of a legend; with more training steps, a colour bar replaces it


def colour(meaning: str) -> str:
    """The colour of `meaning` (interface, hub, attention, ffn, base, random, chance, target) in every figure."""
    return _MEANING[meaning]


def colours(n: int, ordered: bool = False) -> list:
    """`n` colours from the palette, or for an `ordered` series (training steps) along one scale, light to dark."""
    if not ordered:
        return [PALETTE[i % len(PALETTE)] for i in range(n)]
    import matplotlib

    # The lightest fifth of the scale is left out: it vanishes on white paper.
    scale = matplotlib.colormaps["viridis_r"]
    return [scale(0.2 + 0.8 * (i / (n - 1) if n > 1 else 1.0)) for i in range(n)]


def language(code: str, join: str = " ") -> str:
    """ "Basque (eus_Latn)": the name, and the code as it is spelled; for private-use codes "invented (qaa_Latn)"."""
    name = re.sub(r" \(.*", "", languages.name(code))  # "Mandarin Chinese (simplified)": the code gives the script
    if languages.is_private(code):
        name = "invented"
    return code if name == code else f"{name}{join}({code})"


def measure(name: str, label: str, width: int) -> str:
    """The label of a measure in lines of `width` characters; for `nll_per_byte:LANG` it names the language."""
    lang = name.partition(":")[2]
    if not lang:
        return textwrap.fill(label, width)
    parts = label.removesuffix(f", {lang}") + ",", language(lang)
    together, apart = textwrap.fill(" ".join(parts), width), "\n".join(textwrap.fill(part, width) for part in parts)
    return apart if apart.count("\n") == together.count("\n") else together


def group(meaning: str, n: int) -> str:
    """ "semantic hub (5 layers)", from `meaning` hub or interface and a number of layers."""
    return f"{'semantic hub' if meaning == 'hub' else meaning} ({n} layer{'s' * (n > 1)})"


def accuracy(metric: str, task: str) -> str:
    """The metric of a downstream task, in words."""
    return f"{'accuracy' if metric == 'acc' else metric}, {task}"


@contextlib.contextmanager
def style():
    """Matplotlib settings of all figures; no display is needed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = {
        "font.size": 8,
        "axes.labelsize": 8,
        "axes.titlesize": 8,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7,
        "legend.title_fontsize": 8,
        "legend.frameon": False,
        "lines.linewidth": 1.2,
        "lines.markersize": 3.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "figure.constrained_layout.use": True,
        "figure.dpi": 150,
        "savefig.dpi": 200,
        "pdf.fonttype": 42,  # TrueType: searchable text, accepted by journals
    }
    with plt.rc_context(settings):
        yield plt
        plt.close("all")


def save(fig, path: str | Path) -> None:
    """Write `path`.pdf and `path`.png, each whole or not at all, without dates: a rerun gives the same bytes."""
    path = Path(path)
    for suffix, facts in ((".pdf", {"CreationDate": None, "Producer": None}), (".png", {"Software": None})):
        # Through memory: on a full disk the PDF writer fails in its clean-up, which hides the reason.
        drawn = io.BytesIO()
        fig.savefig(drawn, format=suffix[1:], metadata=facts)
        with replacing(path.with_name(path.name + suffix)) as temporary:
            temporary.write_bytes(drawn.getbuffer())


def changes_over_steps(path: str | Path, steps: list[int], lines: list[dict], ylabel: str) -> None:
    """Changes from the base over training steps; the base is step 0, where every change is 0.

    Args:
        lines: `values` [steps] of each line, and its look: `label, color, marker, linestyle`.
    """
    start = [] if 0 in steps else [0]
    with style() as plt:
        figure, axis = plt.subplots(figsize=(COLUMN, 2.2))
        for line in lines:
            look = {key: value for key, value in line.items() if key != "values"}
            axis.plot(start + steps, [0.0] * len(start) + line["values"], **look)
        axis.set_xlabel("training step (0 = base)" if start else "training step")
        axis.set_ylabel(ylabel)
        axis.set_ylim(bottom=0)
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        axis.legend(loc="best")
        save(figure, path)


def heat_map(
    axis,
    values,
    rows: list[str],
    columns: list[str],
    bound: float,
    rotation: float = 0,
    texts=None,
    signed: bool = True,
):
    """A matrix [rows, columns] in colour with numbers in the cells; returns the image, for a colour bar.

    Args:
        values: a numpy array; NaN stays grey.
        bound: the value of the darkest colour; `signed` values go from -bound (blue) to bound (red), others from 0.
        texts: [rows][columns], the text in each cell; None: the value, bold if row and column have the same name.
            With more than twelve columns only the colour is shown.
    """
    look = {"cmap": "RdBu_r", "vmin": -bound} if signed else {"cmap": "Blues", "vmin": 0}
    axis.set_facecolor("0.92")
    image = axis.imshow(values, vmax=bound, aspect="auto" if signed else "equal", **look)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            if len(columns) > 12:
                continue
            text = signed_text(values[i, j]) if texts is None else texts[i][j]
            weight = "bold" if texts is None and row == column else "normal"
            shade = "white" if abs(values[i, j]) > 0.6 * bound else "black"
            axis.text(j, i, text, ha="center", va="center", color=shade, fontsize=6.5, fontweight=weight)
    axis.set_xticks(range(len(columns)), columns, rotation=rotation, ha="right" if rotation else "center")
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return image


def signed_text(value: float) -> str:
    """ "+.019", "−.068"; ".000" has no sign."""
    text = f"{value:+.3f}".replace("0.", ".", 1).replace("-", "−")
    return ".000" if text[1:] == ".000" else text


def retrieval_axis(
    axis,
    lines: list[tuple[list, dict]],
    hub: list[int] = (),
    untrained: list | None = None,
    n: int | None = None,
    both: bool = False,
) -> None:
    """Retrieval accuracy over hidden states, with the layers of the hub shaded (layer l outputs hidden state l + 1).

    Args:
        lines: (`layer_accuracy` of a result, look of the line) for each model; `untrained`: that of the untrained twin.
        n: number of sentences, for the chance level 1 / n; `both`: also number the layers, on an axis at the top.
    """
    for layer in hub:
        label = "semantic hub" if layer == hub[0] else None
        axis.axvspan(layer + 0.5, layer + 1.5, color=colour("hub"), alpha=0.12, linewidth=0, label=label)
    twin = [(untrained, {"linestyle": "--", "marker": "x", "color": colour("random"), "label": "untrained"})]
    for accuracy, look in lines + (twin if untrained else []):
        x, y = zip(*sorted(accuracy), strict=True)
        axis.plot(x, y, **({"marker": "o"} | look))
    if n:
        chance_line(axis, n)
    layer_axis(axis, len(lines[0][0]) - 1, hidden_states=True, both=both)
    axis.set_ylim(bottom=0)


def chance_line(axis, n: int) -> None:
    """A line at 1 / `n`, the accuracy of guessing among `n`."""
    axis.axhline(1 / n, color=colour("chance"), linewidth=1, linestyle=(0, (1, 2)), label=f"chance 1/{n}", zorder=1)


def layer_axis(axis, n_layers: int, hidden_states: bool = False, most: int = 12, both: bool = False) -> None:
    """About `most` integer ticks over layers, or over hidden states; `both`: the other numbering on top."""
    numbers = [(range(n_layers), "layer"), (range(n_layers + 1), "hidden state (0 = embeddings)")]
    shown, on_top = numbers[::-1] if hidden_states else numbers
    every = max(1, -(-(n_layers if hidden_states else n_layers - 1) // most))
    axis.set_xticks(shown[0][::every])
    axis.set_xlabel(shown[1])
    if both:
        shift = 1 if hidden_states else -1
        above = axis.secondary_xaxis("top", functions=(lambda x: x - shift, lambda x: x + shift))
        above.set_xticks(on_top[0][max(0, -shift) :: every])
        above.set_xlabel(on_top[1].partition(" (")[0])


def steps_bar(figure, axes, steps: list[int]) -> None:
    """A colour bar of training steps, in order, beside `axes`; at most seven steps are labelled."""
    import matplotlib

    shades = matplotlib.colors.ListedColormap(colours(len(steps), ordered=True))
    scale = matplotlib.colors.BoundaryNorm(range(len(steps) + 1), len(steps))
    bar = figure.colorbar(matplotlib.cm.ScalarMappable(scale, shades), ax=axes, aspect=40, pad=0.01)
    every = -(-len(steps) // 7)
    labelled = range((len(steps) - 1) % every, len(steps), every)  # the last step is labelled
    bar.set_ticks([at + 0.5 for at in labelled], labels=[str(steps[at]) for at in labelled])
    bar.ax.tick_params(length=0, which="both")
    bar.set_label("training step")
    bar.outline.set_visible(False)


def zeros(axis, at, values, label: str | None = None) -> None:
    """A small ring at every bar of height 0, which distinguishes it from a missing bar."""
    at_zero = [x for x, value in zip(at, values, strict=True) if value == 0]
    look = {"markersize": 2.5, "markerfacecolor": "white", "markeredgewidth": 0.6, "clip_on": False, "zorder": 3}
    if at_zero:
        axis.plot(at_zero, [0] * len(at_zero), "o", color="0.4", label=label, **look)
