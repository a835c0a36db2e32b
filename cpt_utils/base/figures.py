"""One style for all figures: two-column paper widths, readable at printed size, colours that the colour-blind can tell.

Colours are Okabe and Ito's palette; a series over training steps runs through one light-to-dark scale instead, and
series that are compared also differ in marker or line style, so that a grey print keeps them apart.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

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


def colour(meaning: str) -> str:
    """The colour that `meaning` (interface, hub, attention, ffn, base, random, chance, target) has in every figure."""
    return _MEANING[meaning]


def colours(n: int, ordered: bool = False) -> list:
    """`n` colours: of the palette, or for an `ordered` series (training steps) along one scale, light to dark."""
    if not ordered:
        return [PALETTE[i % len(PALETTE)] for i in range(n)]
    import matplotlib

    # The lightest fifth of the scale is left out: it vanishes on white paper.
    scale = matplotlib.colormaps["viridis_r"]
    return [scale(0.2 + 0.8 * (i / (n - 1) if n > 1 else 1.0)) for i in range(n)]


@contextlib.contextmanager
def style():
    """Matplotlib settings of all our figures; no display is needed."""
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
        "pdf.fonttype": 42,  # TrueType: text in the PDF can be searched, and journals accept it
    }
    with plt.rc_context(settings):
        yield plt
        plt.close("all")


def save(fig, path: str | Path) -> None:
    """Write `path`.pdf and `path`.png, whole or not at all, without dates, so that a rerun gives the same bytes."""
    path = Path(path)
    for suffix, facts in ((".pdf", {"CreationDate": None, "Producer": None}), (".png", {"Software": None})):
        # Through memory: the PDF writer stumbles over its own clean-up where the disk is full, and hides the reason.
        drawn = io.BytesIO()
        fig.savefig(drawn, format=suffix[1:], metadata=facts)
        with replacing(path.with_name(path.name + suffix)) as temporary:
            temporary.write_bytes(drawn.getbuffer())


def changes_over_steps(path: str | Path, steps: list[int], lines: list[dict], ylabel: str) -> None:
    """Changes from the base over training steps; the base stands at step 0, where nothing has changed yet.

    Args:
        lines: `values` [steps], and how each looks: `label, color, marker, linestyle`.
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


def layer_axis(axis, n_layers: int, hidden_states: bool = False) -> None:
    """Integer ticks over layers, at most a dozen of them."""
    last = n_layers if hidden_states else n_layers - 1
    axis.set_xticks(range(0, last + 1, max(1, -(-last // 12))))
    axis.set_xlabel("hidden state (0 = embedding output)" if hidden_states else "layer")
