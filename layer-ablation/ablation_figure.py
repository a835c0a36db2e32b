"""The figure of a sweep: the share of the change kept with blocks inserted from either side, and lost by a window."""

from __future__ import annotations

from collections.abc import Container, Iterable
from pathlib import Path

from cpt_utils.base import figures

LOOKS = {
    "perception": {"color": figures.PALETTE[0], "marker": "o"},
    "production": {"color": figures.PALETTE[1], "marker": "s", "linestyle": "--"},
}
SIDES = {"insert_in": "from the input side", "insert_out": "from the output side"}


def draw(path: Path, payload: dict, n: int) -> None:
    """Blocks inserted from the input and from the output, for the losses and below for their reduction by the source;
    at the bottom windows over the whole stack, for the losses.

    Functions that CPT did not clearly change have no curve; a result without them shows its other measures. If the
    reduction by the source changed in neither function, a line says so in place of the panels.
    """
    windows = [name for name in payload["sweeps"] if name.startswith("window:")]
    saved = {f"{name}_saved": look for name, look in LOOKS.items()}
    rows, translates = [("", _looks(payload, LOOKS))], "perception_saved" in payload["summary"]
    if translates and (looks := _looks(payload, saved)):
        rows.append(("\n(saved by the source)", looks))
    with figures.style() as plt:
        fig = plt.figure(figsize=(figures.PAGE, 0.4 + 1.9 * (len(rows) + bool(windows))))
        grid, named = fig.add_gridspec(len(rows) + bool(windows), 2), []
        for row, (suffix, looks) in enumerate(rows):
            left = None
            for column, (sweep, side) in enumerate(SIDES.items()):
                left = axis = fig.add_subplot(grid[row, column], sharey=left)
                _ends(axis, named=column == 1)
                for name, look in looks.items():
                    _curve(axis, payload, sweep, name, look)
                axis.set_xlim(-0.02 * n, 1.02 * n)
                axis.set_xlabel(f"blocks of the checkpoint, {side}")
                axis.set_ylabel(f"share of the change kept{suffix}" if column == 0 else "")
                axis.locator_params(axis="x", integer=True)
            named.append(axis.get_legend_handles_labels())
            if missing := _missing(payload, (LOOKS, saved)[row], looks):
                axis.set_title(missing, fontsize=6.5, color="0.4")
        if windows:
            _windows(fig.add_subplot(grid[-1, :]), payload, windows[0], rows[0][1], n)
        if translates and len(rows) == 1:
            fig.supxlabel(f"{_missing(payload, saved, {})} (saved by the source)", fontsize=6.5, color="0.4")
        handles, labels = max(named, key=lambda both: len(both[0]))  # those of the losses, if both are drawn
        if handles:
            title = "bands: 95 % intervals over sentences"
            fig.legend(handles, labels, loc="outside upper center", ncols=min(4, len(handles)), title=title)
        figures.save(fig, path)


def _words(payload: dict, name: str) -> str:
    """The name of a measure, saying so if CPT made it worse: then what is kept is a share of the deterioration."""
    worse = payload["summary"][name]["gain"]["ci_high"] < 0
    return name.replace("_saved", "").replace("_", " ") + " (made worse by CPT)" * worse


def _missing(payload: dict, wanted: Iterable[str], drawn: Container[str]) -> str:
    """A note on the wanted measures that are not drawn as CPT did not clearly change them; "" if there are none."""
    names = [_words(payload, name) for name in wanted if name not in drawn and name in payload["summary"]]
    return f"not clearly changed by CPT: {' and '.join(names)}" if names else ""


def _looks(payload: dict, wanted: dict[str, dict]) -> dict[str, dict]:
    """The `wanted` measures whose R is defined; if none was measured (no translation), all measures with R."""
    points = next(iter(payload["retention"].values()))
    known = [name for name, rows in points.items() if rows[0][1] is not None]
    if any(name in points for name in wanted):
        return {name: look for name, look in wanted.items() if name in known}
    colours = figures.colours(len(known))
    return {
        name: {"color": colours[i], "marker": figures.MARKERS[i % len(figures.MARKERS)]} for i, name in enumerate(known)
    }


def _ends(axis, named: bool) -> None:
    """The base at 0 and the checkpoint at 1, as lines; `named`: with their names on the right."""
    for height, name, colour in ((0, "base", "base"), (1, "checkpoint", "target")):
        axis.axhline(height, color=figures.colour(colour), linewidth=0.8, linestyle=":")
        at = {"xycoords": ("axes fraction", "data"), "ha": "left", "va": "center", "fontsize": 6.5}
        if named:
            axis.annotate(name, (1.01, height), color=figures.colour(colour), annotation_clip=False, **at)


def _curve(axis, payload: dict, sweep: str, name: str, look: dict, lost: bool = False, width: int = 0) -> None:
    """R along a sweep with its band; `lost`: 1 - R, at the middle of a window of `width` blocks."""
    points, bands = payload["retention"].get(sweep, {}).get(name), payload["intervals"].get(sweep, {}).get(name)
    if not points or points[0][1] is None:
        return
    xs = [k + (width - 1) / 2 if lost else k for k, _ in points]
    kept = [[r for _, r in points], *([band[i] for band in bands] for i in (1, 2))]
    value, low, high = ([1 - r for r in line] if lost else line for line in kept)
    axis.plot(xs, value, label=_words(payload, name), **look)
    axis.fill_between(xs, low, high, color=look["color"], alpha=0.15, linewidth=0)


def _windows(axis, payload: dict, sweep: str, looks: dict, n: int) -> None:
    width = int(sweep.partition(":")[2])
    axis.axhline(0, color=figures.colour("target"), linewidth=0.7, linestyle=":")
    for name, look in looks.items():
        _curve(axis, payload, sweep, name, look, lost=True, width=width)
    figures.layer_axis(axis, n)
    axis.set_xlim(-0.5, n - 0.5)
    axis.set_xlabel(f"middle of a window of {width} layers (blocks) that are the base's")
    axis.set_ylabel("share of the change lost")
