"""The result of lsn/compare_methods.py, as a table, as a figure and in words."""

from __future__ import annotations

import itertools
from pathlib import Path

from cpt_utils.base import cli, figures, results, stats

WORDS = {"lape": "LAPE", "ternary": "ternary", "ap": "average precision", "gradient": "gradient × activation"}
LINEAR = 0.01  # nats a token up to which the axis of harm is linear; beyond it is logarithmic


def table(found: dict) -> str:
    """A line for each language and method, then the agreement of every two methods, in Markdown."""
    head = ["language", "method", "neurons", "agreement of the halves", "own language", "others", "selectivity",
            "selectivity of equally active neurons", "p"]  # fmt: skip
    lines = []
    for lang, name in itertools.product(found["languages"], found["methods"]):
        diagonal, row = found["diagonal"][name].get(lang), found["selectivity"][name].get(lang)
        halves = (found["stability"][name] or {}).get(lang)
        cells = [lang, WORDS.get(name, name), f"{found['neurons'][name][lang]:,}", _number(halves, ".2f")]
        if diagonal:
            harm, selectivity = stats.told(diagonal, "+.4f", "harm"), stats.told(row, "+.4f", "selectivity")
            cells += [harm, f"{found['others'][name][lang]:+.4f}", selectivity, _number(row["active_mean"], "+.4f")]
            cells += [_number(row["p_value_active"], ".3f")]
        lines.append([*cells, *[""] * (len(head) - len(cells))])
    agreed = [
        [lang, pair, row["shared"], _number(row["jaccard"], ".3f"), _number(row["chance"], ".3f")]
        for lang, rows in found["agreement"].items() for pair, row in rows.items()
    ]  # fmt: skip
    both = results.markdown(["language", "methods", "shared", "Jaccard", "chance"], agreed)
    return results.markdown(head, lines) + "\n" + both


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def draw(path: Path, found: dict) -> None:
    """A row for each language: its neurons by layer, and what silencing them does, by method."""
    langs, methods = found["languages"], found["methods"]
    names = [WORDS.get(name, name) for name in methods]
    looks = [{"color": shade, "marker": figures.MARKERS[i]} for i, shade in enumerate(figures.colours(len(methods)))]
    with figures.style() as plt:
        from matplotlib.lines import Line2D

        size = figures.PAGE, 0.8 + 1.25 * len(langs)
        fig, axes = plt.subplots(len(langs), 2, figsize=size, sharex="col", squeeze=False)
        for lang, (by_layer, harm) in zip(langs, axes, strict=True):
            harm.set_yscale("symlog", linthresh=LINEAR)  # one method's harm may be a hundred times another's
            harm.margins(y=0.12)
            for i, name in enumerate(methods):
                counts = found["by_layer"][name][lang]
                by_layer.plot(range(len(counts)), counts, **looks[i], linewidth=0.9, label=names[i])
                _harm(harm, i, looks[i], found, name, lang)
            figures.layer_axis(by_layer, len(counts))
            by_layer.set_title(figures.language(lang), loc="left")
            harm.axhline(0, color="#bbbbbb", linewidth=0.6)
            for at in (-LINEAR, LINEAR):
                harm.axhline(at, color="#dddddd", linewidth=0.5, linestyle=":", zorder=0)
            harm.set_xticks(range(len(methods)), [name.replace(" ", "\n", 1) for name in names])
            harm.set_xlim(-0.5, len(methods) - 0.5)
        for axis in axes[:-1, 0]:
            axis.set_xlabel("")
        middle = (len(langs) - 1) // 2
        axes[middle, 0].set_ylabel("neurons")
        axes[middle, 1].set_ylabel("change in NLL (nats/token)")
        kinds = (
            ("on its own text", {"color": "0.3", "marker": "o"}),
            ("on the others', mean", {"color": "0.3", "marker": "o", "markerfacecolor": "white"}),
            ("on its own: random, equally active", {"color": figures.colour("random"), "marker": "x"}),
        )
        lines = [Line2D([], [], linestyle="", label=words, **look) for words, look in kinds]
        handles = axes[0, 0].get_legend_handles_labels()[0]
        fig.legend(handles=[*handles, *lines], loc="outside upper center", ncols=4)
        figures.save(fig, path)


def _harm(axis, at: int, look: dict, found: dict, name: str, lang: str) -> None:
    """The harm of silencing one method's neurons of a language, to it and to the others; nothing if it has none."""
    row = found["diagonal"][name].get(lang)
    if row is None:
        return
    error = [[max(0.0, row["harm"] - row["ci_low"])], [max(0.0, row["ci_high"] - row["harm"])]]
    axis.errorbar(at - 0.15, row["harm"], error, capsize=2, linewidth=0.8, linestyle="", **look)
    axis.plot(at + 0.15, found["others"][name][lang], linestyle="", markerfacecolor="white", **look)
    if lang in found["controls"][name]:
        axis.plot(at - 0.15, found["controls"][name][lang], "x", color=figures.colour("random"), zorder=1)


def say(found: dict) -> None:
    """Print which method's neurons matter, by language and overall, on the documents that did not choose it."""
    for lang, row in found["best"].items():
        where = "all languages together" if lang == "overall" else lang
        if row["method"] is None:
            hurt = "every language" if lang == "overall" else "it"
            cli.say(f"{where}: no method's neurons hurt {hurt} when they are silenced")
            continue
        text = f"selectivity {stats.told(row['reported'][row['method']], '+.4f', 'selectivity')}"
        sure = "clearly above all others" if row["clear"] else "not clearly above all others"
        active = {None: "", True: "; above equally active neurons", False: "; not above equally active neurons"}
        cli.say(f"{where}: {WORDS.get(row['method'], row['method'])}, {text}, {sure}{active[row['beyond_active']]}")
