"""What is wrong with a figure that can be told without looking at it: text cut off, text on text, too long a legend.

Drawing takes half a second a figure, so most tests go through the first of a kind alone, and forks through none.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

from matplotlib.axis import Axis
from matplotlib.legend import Legend
from matplotlib.text import Text
from PIL import Image

LEGEND = 8  # entries; more nobody reads: training steps have a colour bar
gone_through = set()  # code of functions
SLACK = 2.0  # pixels by which boxes may touch: letters do not fill theirs


def _labels(tick) -> tuple[Text, Text]:
    return tick.label1, tick.label2


def faults(figure) -> list[str]:
    """In words; the figure is laid out first."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    found, boxes, axes = [], [], figure.findobj(Axis)
    ticks = {id(text) for axis in axes for tick in (*axis.majorTicks, *axis.minorTicks) for text in _labels(tick)}
    # Ticks outside the view are there, but not drawn.
    drawn = {id(text) for axis in axes for tick in axis._update_ticks() for text in _labels(tick)}
    hidden = {id(text) for panel in figure.axes if not panel.get_visible() for text in panel.findobj(Text)}
    for text in figure.findobj(Text):
        if not text.get_text().strip() or not text.get_visible() or id(text) in hidden | (ticks - drawn):
            continue
        box, name = text.get_window_extent(renderer), " ".join(text.get_text().split())
        out = max(figure.bbox.x0 - box.x0, box.x1 - figure.bbox.x1, figure.bbox.y0 - box.y0, box.y1 - figure.bbox.y1)
        if out > SLACK:
            found.append(f"{name!r} is cut off by {out:.0f} pixels")
        boxes.append((name, box, text.get_rotation() % 90 == 0))
    for (one, box, upright), (other, another, straight) in itertools.combinations(boxes, 2):
        if not (upright and straight):  # boxes of slanted text overlap where the text does not
            continue
        across = min(box.x1, another.x1) - max(box.x0, another.x0)
        down = min(box.y1, another.y1) - max(box.y0, another.y0)
        if min(across, down) > SLACK:
            found.append(f"{one!r} lies on {other!r}, {across:.0f} x {down:.0f} pixels")
    for legend in figure.findobj(Legend):
        if len(legend.get_texts()) > LEGEND:
            found.append(f"a legend has {len(legend.get_texts())} entries")
    return found


def saving(wish: str, own: Callable) -> Callable:
    """What stands in for `figures.save`, which is `own`.

    Args:
        wish: "look": drawn, and an AssertionError says what is wrong with it; "pass over": not drawn, but the files are
            there; "go through": the same, but the first that a function makes is gone through without a layout; "":
            drawn.
    """
    look = functools.partial(_look, own)
    return {"look": look, "go through": _go_through, "pass over": _pass_over, "": own}[wish]


def _look(own: Callable, figure, path) -> None:
    own(figure, path)
    assert not (found := faults(figure)), f"{Path(path).name}: {'; '.join(found)}"


def _go_through(figure, path) -> None:
    frame = sys._getframe()
    while Path(frame.f_code.co_filename).parent == Path(__file__).parent:
        frame = frame.f_back
    if frame.f_code not in gone_through:
        gone_through.add(frame.f_code)
        figure.set_layout_engine("none")
        figure.draw_without_rendering()
    _pass_over(figure, path)


def _pass_over(figure, path) -> None:
    from cpt_utils.base import results

    for suffix in (".pdf", ".png"):
        with results.replacing(Path(path).with_name(Path(path).name + suffix)) as temporary:
            Image.new("L", (1, 1)).save(temporary, "png")
