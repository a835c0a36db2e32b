"""The figure of a sweep: what of the gain is kept, blocks put in from either side, and what a window costs."""

from __future__ import annotations

from pathlib import Path

from cpt_utils.base import figures

LOOKS = {
    "perception": {"color": figures.PALETTE[0], "marker": "o"},
    "production": {"color": figures.PALETTE[1], "marker": "s", "linestyle": "--"},
}
SIDES = {"insert_in": "from the input side", "insert_out": "from the output side"}


def draw(path: Path, payload: dict, n: int) -> None:
    """Two panels above, insertion from the input and from the output; below them the windows, as long as the stack.

    Of functions that CPT did not clearly change there is no curve; without any of both the other measures are drawn.
    """
    windows = [name for name in payload["sweeps"] if name.startswith("window:")]
    looks = _looks(payload)
    rows = 1 + bool(windows)
    with figures.style() as plt:
        fig = plt.figure(figsize=(figures.PAGE, 0.4 + 2.1 * rows))
        grid = fig.add_gridspec(rows, 2)
        first = None
        for column, (sweep, words) in enumerate(SIDES.items()):
            first = axis = fig.add_subplot(grid[0, column], sharey=first)
            _ends(axis)
            for name, look in looks.items():
                _curve(axis, payload, sweep, name, look)
            axis.set_xlim(0, n)
            axis.set_xlabel(f"blocks of the checkpoint, {words}")
            axis.set_ylabel("share of the gain kept" if column == 0 else "")
        if windows:
            axis = fig.add_subplot(grid[1, :])
            _windows(axis, payload, windows[0], looks, n)
        handles, labels = first.get_legend_handles_labels()
        if handles:
            fig.legend(handles, labels, loc="outside upper center", ncols=len(handles))
        missing = [name for name in LOOKS if name not in looks and name in payload["summary"]]
        if missing:
            first.set_title(f"CPT changed {' and '.join(missing)} not clearly", fontsize=7, color="0.4")
        figures.save(fig, path)


def _looks(payload: dict) -> dict[str, dict]:
    """The measures that are drawn: both functions where R is defined, else what there is."""
    known = [name for name, row in payload["summary"].items() if row["A"] is not None]
    if not known:  # a sweep from one side alone
        rows = next(iter(payload["retention"].values()))
        known = [name for name, points in rows.items() if points and points[0][1] is not None]
    if any(name in known for name in LOOKS):
        return {name: look for name, look in LOOKS.items() if name in known}
    colours = figures.colours(len(known))
    return {
        name: {"color": colours[i], "marker": figures.MARKERS[i % len(figures.MARKERS)]} for i, name in enumerate(known)
    }


def _ends(axis) -> None:
    """The base at 0 and the checkpoint at 1, as lines with their names."""
    for height, name, colour in ((0, "base", "base"), (1, "checkpoint", "target")):
        axis.axhline(height, color=figures.colour(colour), linewidth=0.7, linestyle=":")
        at = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom", "fontsize": 6}
        axis.annotate(name, (1, height), color=figures.colour(colour), **at)


def _curve(axis, payload: dict, sweep: str, name: str, look: dict, lost: bool = False, width: int = 0) -> None:
    """R of a sweep with its band; `lost`: 1 - R, at the middle of a window of `width` blocks."""
    points, bands = payload["retention"].get(sweep, {}).get(name), payload["intervals"].get(sweep, {}).get(name)
    if not points or points[0][1] is None:
        return
    xs = [k + (width - 1) / 2 if lost else k for k, _ in points]
    kept = [[r for _, r in points], *([band[i] for band in bands] for i in (1, 2))]
    value, low, high = ([1 - r for r in each] if lost else each for each in kept)
    axis.plot(xs, value, label=name, **look)
    axis.fill_between(xs, low, high, color=look["color"], alpha=0.15, linewidth=0)


def _windows(axis, payload: dict, sweep: str, looks: dict, n: int) -> None:
    width = int(sweep.partition(":")[2])
    axis.axhline(0, color=figures.colour("target"), linewidth=0.7, linestyle=":")
    for name, look in looks.items():
        _curve(axis, payload, sweep, name, look, lost=True, width=width)
    figures.layer_axis(axis, n)
    axis.set_xlim(-0.5, n - 0.5)
    axis.set_xlabel(f"middle of a window of {width} blocks that are the base's")
    axis.set_ylabel("share of the gain lost")
