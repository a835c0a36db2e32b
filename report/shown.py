"""The verdicts for readers: tables in Markdown and LaTeX, several seeds side by side, and the figure."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from cpt_utils.base import figures
from cpt_utils.measures.verdicts import NO, YES, Panel, in_words, shown_p

# ---------------------------------------------------------------- tables


def digits(value: float | None) -> str:
    """A number for readers: three decimals, or two with an exponent if it is small."""
    if value is None:
        return "none"
    return f"{value:.2e}" if 0 < abs(value) < 0.01 else f"{value:.3f}"


def told(row: dict) -> str:
    """ "peak minus first 0.120 [0.101, 0.139], n = 8 seeds, p = 0.006"; or why there is no value."""
    if row["value"] is None:
        return f"{row['name']}: {row.get('note') or 'none'}"
    text = f"{row['name']} {digits(row['value'])}"
    if row["ci_low"] is not None:
        text += f" [{digits(row['ci_low'])}, {digits(row['ci_high'])}]"
    if row["n"] is not None:
        text += f", n = {row['n']} {row['n_of']}".rstrip()
    if row["p_value"] is not None:
        text += f", {shown_p(row['p_value'])}"
    place = row["place"]
    if place:
        text += f" (rank {place['rank']} of {place['n_random'] + 1})"
    return text + (f"; claim: {in_words(row['says'])}" if row["says"] else "")


def markdown(payload: dict) -> str:
    """The table of verdicts, and below it the numbers that decide nothing."""
    seeds = payload["seeds"]
    lines = [
        f"# Claims on {payload['study']}, "
        + (f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}: one run"),
        "",
        "| | claim | verdict | what decides | why |",
        "|---|---|---|---|---|",
    ]
    for name, row in payload["claims"].items():
        numbers = "<br>".join(map(told, row["numbers"])) or "-"
        cells = (name, row["text"], f"**{row['verdict']}**", numbers, row["reason"])
        lines.append(_markdown_row(cells))
    lines += ["", "Intervals are 95 %, alpha is .05. The rules are in report/README.md.", ""]
    lines += ["## Other numbers, which decide nothing", "", "| | number |", "|---|---|"]
    lines += [_markdown_row((name, told(row))) for name, one in payload["claims"].items() for row in one["beside"]]
    if len(seeds) > 1:
        lines += [
            "",
            "## By seed",
            "",
            _markdown_row(("", "number", *map(str, seeds))),
            "|---" * (2 + len(seeds)) + "|",
        ]
        for name, one in payload["claims"].items():
            for row in one["numbers"] + one["beside"]:
                values = [digits(row["values"][str(seed)]) for seed in seeds]
                lines.append(_markdown_row((name, row["name"], *values)))
    return "\n".join(lines) + "\n"


def _markdown_row(cells) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def latex(payload: dict) -> str:
    """The table of verdicts as a plain tabular as wide as the text."""
    rows = [("", "claim", "verdict", "what decides", "why")]
    for name, row in payload["claims"].items():
        numbers = [escaped(told(number_row)) for number_row in row["numbers"]] or ["-"]
        text, verdict, reason = (escaped(row[key]) for key in ("text", "verdict", "reason"))
        rows.append((name, text, verdict, r" \newline ".join(numbers), reason))
    return tabular(rows, "".join(rf"p{{{share}\linewidth}}" for share in (0.04, 0.19, 0.12, 0.29, 0.24)))


def tabular(rows: list[tuple[str, ...]], columns: str) -> str:
    """A tabular of rows of escaped cells, the first of which is the head; `columns` is its LaTeX argument."""
    lines = [r"\begin{tabular}{" + columns + "}", r"\hline"]
    for i, row in enumerate(rows):
        lines.append(" & ".join(row) + r" \\")
        if i in (0, len(rows) - 1):
            lines.append(r"\hline")
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}",
}  # fmt: skip
NUMBER = re.compile(r"(?<![\w.-])(-\d+(?:\.\d+)?|\d+\.\d+(?=e))(?:e([+-])0*(\d+))?")


def escaped(text: str) -> str:
    """Plain text escaped for LaTeX; negative numbers and powers of ten are set in math."""
    text = "".join(SPECIAL.get(letter, letter) for letter in text)
    return NUMBER.sub(_in_math, text)


def _in_math(match: re.Match) -> str:
    power = rf"\cdot 10^{{{match[2].replace('+', '')}{match[3]}}}" if match[3] else ""
    return f"${match[1]}{power}$"


def order(name: str) -> tuple[str, int, str]:
    """The sort key of a claim: C2a before C10, all of C before D1."""
    letter, number, part = re.fullmatch(r"(\w)(\d+)(\w?)", name).groups()
    return letter, int(number), part


# ---------------------------------------------------------------- the figure

LOOKS = {YES: ("✔", "#009E73"), NO: ("✘", "#D55E00")}
OTHER = ("–", "#555555")  # no verdict
WIDTH = 70  # letters in a line of a name


def draw(path: Path, claims: dict[str, dict], panels: dict[str, Panel]) -> None:
    """A panel for each claim, in two columns: the deciding numbers, their intervals, and seeds or controls as dots."""
    inner = {name: 0.06 + 0.24 * max(1.0, sum(map(_lines, row["numbers"]))) for name, row in claims.items()}
    heights = {name: 0.72 + height for name, height in inner.items()}  # with title and axis
    columns = _columns(heights)
    with figures.style() as plt:
        tallest = max(sum(heights[name] for name in column) for column in columns)
        fig = plt.figure(figsize=(figures.PAGE, tallest + 0.2))
        fig.get_layout_engine().set(h_pad=0.04, hspace=0.03, wspace=0.04)
        grid = fig.add_gridspec(1, len(columns))
        for at, column in enumerate(columns):
            # The space below the shorter column stays free.
            free = tallest - sum(heights[name] for name in column)
            ratios = [inner[name] for name in column] + [free] * (free > 0.01)
            below = grid[at].subgridspec(len(ratios), 1, height_ratios=ratios)
            for i, name in enumerate(column):
                _panel(fig.add_subplot(below[i]), name, claims[name], panels[name])
        fig.legend(handles=_legend(plt, claims), loc="outside lower center", ncols=4)
        figures.save(fig, path)


def _lines(number: dict) -> float:
    """The height of a number relative to one whose name takes a single line."""
    return 1 + 0.4 * (len(textwrap.wrap(number["name"], WIDTH)) - 1)


def _columns(heights: dict[str, float]) -> list[list[str]]:
    """The names in two columns of nearly equal height, in reading order."""
    names = list(heights)

    def tallest(cut: int) -> float:
        return max(sum(heights[name] for name in part) for part in (names[:cut], names[cut:]))

    cut = min(range(1, len(names) + 1), key=tallest)
    return [part for part in (names[:cut], names[cut:]) if part]


def _legend(plt, claims: dict[str, dict]) -> list:
    numbers = [one for row in claims.values() for one in row["numbers"] if one["value"] is not None]
    grey = {"marker": "o", "linestyle": "", "markersize": 2.5, "color": figures.colour("random")}
    looks = [plt.Line2D([], [], color="black", marker="|", markersize=4, label="95 % interval")]
    if any((one["place"] or {}).get("draws") for one in numbers):
        looks.append(plt.Line2D([], [], **grey, label="controls"))
    if any(one.get("values") for one in numbers):
        looks.append(plt.Line2D([], [], **grey, label="seeds"))
    if any(one["says"]["bound"] for one in numbers):
        looks.append(plt.Line2D([], [], color="black", linestyle=":", linewidth=0.8, label="the claim's bound"))
    return looks


def _panel(axis, name: str, row: dict, panel: Panel) -> None:
    mark, shade = LOOKS.get(row["verdict"], OTHER)
    axis.set_title(f"{mark} {name} {row['verdict']}", loc="left", color=shade, fontweight="bold", pad=15)
    axis.text(0, 1.03, panel.words, transform=axis.transAxes, fontsize=7, va="bottom")
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    rows = [one for one in row["numbers"] if one["value"] is not None]
    if not rows:
        axis.set_xticks([])
        axis.spines["bottom"].set_visible(False)
        # File names without folders; the table has their paths.
        text = textwrap.fill(re.sub(r"(?:[\w.-]+/)+(?=[\w.-]+\.\w)", "", row["reason"]), 40, break_on_hyphens=False)
        axis.text(0, 0.9, text, transform=axis.transAxes, fontsize=6.5, va="top")
        return
    at = -1.0
    for one in rows:
        at += _lines(one)
        draws = _draws(one)
        if draws:
            low, high = -0.22, 0.1  # above the next name
            heights = [-at + low + (high - low) * (i * 0.618034 % 1) for i in range(len(draws))]
            axis.scatter(draws, heights, s=5, color=figures.colour("random"), linewidths=0, zorder=1)
        if one["ci_low"] is not None:
            # The mean of few units may lie a rounding error outside its own interval.
            ends = [[max(0.0, end)] for end in (one["value"] - one["ci_low"], one["ci_high"] - one["value"])]
            axis.errorbar(one["value"], -at, xerr=ends, fmt="none", ecolor="black", capsize=2, zorder=2)
        axis.plot(one["value"], -at, "D", color=shade, markeredgecolor="black", markeredgewidth=0.5, zorder=3)
        bounds = {one["says"]["bound"], -one["says"]["bound"] if one["says"]["side"] == "within" else 0.0}
        axis.vlines(sorted(bounds - {0.0}), -at - 0.3, -at + 0.3, color="black", linewidth=0.6, linestyle=":", zorder=0)
        box = {"facecolor": "white", "linewidth": 0, "pad": 0.5}  # of the zero line behind it
        style = {"xycoords": ("axes fraction", "data"), "va": "bottom", "fontsize": 6.5}
        name = textwrap.fill(one["name"], WIDTH)
        axis.annotate(name, (0, -at + 0.22), bbox=box, linespacing=1.0, **style).set_in_layout(False)
    axis.axvline(0, color="black", linewidth=0.6, zorder=0)
    axis.set_ylim(-at - 0.55, 0.75)
    axis.locator_params(axis="x", nbins=5)
    axis.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3), useMathText=True)
    axis.set_xlabel(panel.axis, fontsize=7)
    axis.margins(x=0.08)


def _draws(row: dict) -> list[float]:
    """What lies behind a number: its values by seed, or the controls that it is ranked among."""
    return list((row.get("values") or {}).values()) or (row["place"] or {}).get("draws") or []


def evenly(values: list, most: int) -> list:
    """At most `most` of the values, evenly spaced and including the first and the last."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
