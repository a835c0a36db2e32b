"""The report of lsn/identify.py on a mask: numbers, words and figures."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from cpt_utils.base import cli, figures
from cpt_utils.base.lazy import np
from cpt_utils.measures.counts import Counts
from cpt_utils.measures.masks import Layers

ENOUGH = 0.9  # Jaccard with the mask from all tokens: from here on fewer tokens would have given the same neurons
REPEATED = 0.2  # share of the text: from here on agreement of its parts says little
FEW_TOKENS = 10_000
UNEVEN = 3  # ratio of the tokens of two languages


# ---------------------------------------------------------------- figures


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
    """Neurons per layer, a panel for each language; dark: neurons of this language only."""
    n = len(by_language)
    columns = 1 if n <= 4 else min(5, -(-n // 2))
    rows = -(-n // columns)
    size = (figures.COLUMN, 0.6 + 0.95 * rows) if columns == 1 else (figures.PAGE, 0.6 + 1.2 * rows)
    with figures.style() as plt:
        from matplotlib.patches import Patch

        figure, axes = plt.subplots(rows, columns, sharex=True, sharey=True, squeeze=False, figsize=size)
        for (lang, facts), colour, axis in zip(by_language.items(), figures.colours(n), axes.ravel(), strict=False):
            shared = [a - b for a, b in zip(facts["counts"], facts["own"], strict=True)]
            axis.bar(range(n_layers), facts["own"], color=colour, width=0.9)
            axis.bar(range(n_layers), shared, bottom=facts["own"], color=colour, alpha=0.4, width=0.9)
            figures.zeros(axis, range(n_layers), facts["counts"], label="none in this layer")
            title = f"{figures.language(lang)}: {facts['n_neurons']:,}"
            axis.set_title(textwrap.fill(title, 100 // columns), pad=2)
            axis.margins(y=0.12)  # bars end below the title
            axis.set_xticks(range(0, n_layers, -(-n_layers // (12 if columns == 1 else 5))))
        for axis in axes.ravel()[n:]:
            axis.set_visible(False)
        looks = [Patch(color="0.3", label="this language only"), Patch(color="0.75", label="shared with others")]
        looks += axes[0, 0].get_legend_handles_labels()[0]
        figure.legend(handles=looks, loc="outside upper center", ncols=2)
        figure.supxlabel("layer", fontsize=8)
        figure.supylabel("language-specific neurons" if rows > 1 else "neurons", fontsize=8)
        figures.save(figure, path)


def draw_overlap(path: Path, shared: dict) -> None:
    """Jaccard of the neurons of every two languages; the diagonal holds the number of neurons."""
    names, n = shared["languages"], len(shared["languages"])
    values = np.array([[np.nan if value is None else value for value in row] for row in shared["jaccard"]], float)
    np.fill_diagonal(values, np.nan)
    size = figures.COLUMN if n <= 4 else figures.PAGE * (0.7 if n <= 8 else 1)
    # At least 0.1, or a negligible overlap would look large.
    top = max([0.1, *values[np.isfinite(values)]])
    with figures.style() as plt:
        figure, axis = plt.subplots(figsize=(size, size * 0.85))
        texts = [["–" if np.isnan(value) else f"{value:.2f}" for value in row] for row in values]
        for i in range(n):
            texts[i][i] = f"{shared['shared'][i][i]:,}"
        rotation = 45 if n > 4 and max(map(len, names)) > 3 else 0
        rows, columns = ([figures.language(name, join) for name in names] for join in (" " if n > 4 else "\n", "\n"))
        image = figures.heat_map(axis, values, rows, names if rotation else columns, top, rotation, texts, signed=False)
        figure.colorbar(image, label="Jaccard (diagonal: neurons)", shrink=0.8)
        figures.save(figure, path)


def draw_convergence(path: Path, found: dict) -> None:
    """Jaccard with the full mask of masks from part of the tokens, over the share of tokens; and that of the halves."""
    points, halves = found["against_full"], found["halves"]
    langs = list(halves["languages"])
    full = [halves["tokens_first"][lang] + halves["tokens_second"][lang] for lang in langs]
    shares = [point["share"] for point in points] + [1.0]
    lines = {lang: [point["languages"][lang] for point in points] for lang in langs}
    lines["all"] = [point["jaccard"] for point in points]
    known = [value for line in lines.values() for value in line if value is not None]
    with figures.style() as plt:
        narrow = len(langs) <= 6 and max(len(figures.language(lang)) for lang in langs) <= 24
        figure, axis = plt.subplots(figsize=(figures.COLUMN, 2.7 if narrow else 3.0))
        for i, (lang, colour) in enumerate(zip(lines, [*figures.colours(len(langs)), "0.2"], strict=True)):
            values = [float("nan") if value is None else value for value in lines[lang]] + [1.0]
            look = {"color": colour, "linewidth": 0.8, "marker": figures.MARKERS[i % len(figures.MARKERS)]}
            look["label"] = "all languages" if lang == "all" else figures.language(lang)
            if lang == "all":
                look |= {"linewidth": 2, "zorder": 3, "marker": ""}
            elif len(langs) > 6:  # too many to tell apart
                look |= {"color": "0.65", "marker": "", "label": None if i else f"each of {len(langs)} languages"}
            axis.plot(shares, values, **look)
        if halves["jaccard"] is not None:
            known.append(halves["jaccard"])
            look = {"color": "0.2", "marker": "X", "markersize": 7, "linestyle": "", "zorder": 4}
            axis.plot(points[-1]["share"], halves["jaccard"], **look, label="one half with the other")
        axis.set_xscale("log", base=2)
        axis.set_xticks(shares, [*map(shown_share, shares[:-1]), "1"])
        axis.minorticks_off()
        amount = f"{min(full):,}" if min(full) == max(full) else f"{min(full):,}–{max(full):,}"
        axis.set_xlabel(f"share of the tokens ({amount} a language)")
        axis.set_ylabel("Jaccard with the full mask")
        axis.set_ylim(max(0, math.floor(10 * min(known, default=0) - 0.5) / 10), 1.01)
        figure.legend(loc="outside upper center", ncols=2 if narrow else 1, columnspacing=1.2, handlelength=1.8)
        figures.save(figure, path)


def draw_no_convergence(path: Path) -> None:
    """A sentence instead of the curve, if there are no parts of the tokens to compare."""
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


# ---------------------------------------------------------------- numbers


def pairs(layers: Layers) -> set[tuple[int, int]]:
    return {(layer, neuron) for layer, neurons in layers.items() for neuron in neurons}


def jaccard(a: set, b: set) -> float | None:
    """Intersection over union; None if both are empty."""
    return len(a & b) / len(a | b) if a or b else None


def agreement(a: dict[str, Layers], b: dict[str, Layers]) -> dict:
    """Jaccard of two masks: of all (language, layer, neuron) triples, and for each language."""
    of_a, of_b = ({lang: pairs(layers) for lang, layers in mask.items()} for mask in (a, b))
    triples = ({(lang, *pair) for lang in mask for pair in mask[lang]} for mask in (of_a, of_b))
    return {"jaccard": jaccard(*triples), "languages": {lang: jaccard(of_a[lang], of_b[lang]) for lang in a}}


def convergence(counts: list[Counts], full, select: Callable, **rates) -> dict | None:
    """How stable the mask is over tokens; None if the counts hold no snapshots, or not as many in every language.

    `full` is the `Selection` from all tokens, made by `select` with `rates` (see lape.py).

    A mask from part of the tokens shares these with the full mask, which makes their agreement too good. The two halves
    share no position: they show how well the mask from half of the tokens replicates, unless the text itself repeats
    (`repeated`, the share of its runs of 10 tokens that occurred before; None if the counts do not say).
    """
    n_snapshots = {len(c.snapshots_n) for c in counts}
    if len(n_snapshots) != 1 or n_snapshots == {0}:
        return None
    langs, points, exists = [c.lang for c in counts], [], counts[0].exists
    for k in range(n_snapshots.pop()):
        tokens = [c.snapshots_n[k] for c in counts]
        seen = [c.tokens(k) for c in counts]
        first = select([c.snapshots[k] for c in counts], seen, langs, exists=exists, **rates)
        shares = [c.snapshots_n[k] / c.n for c in counts]
        points.append(
            {
                "share": sum(shares) / len(shares),
                "tokens": dict(zip(langs, tokens, strict=True)),
                **agreement(first.mask, full.mask),
            }
        )
    rest = [c.n - c.snapshots_n[-1] for c in counts]
    seen = [c.tokens() - before for c, before in zip(counts, seen, strict=True)]
    second = select([c.over_zero - c.snapshots[-1] for c in counts], seen, langs, exists=exists, **rates)
    halves = {"tokens_first": points[-1]["tokens"], "tokens_second": dict(zip(langs, rest, strict=True))}
    return _stability(counts, points, halves | agreement(first.mask, second.mask))


def of_halves(counts: list[Counts], scores: list[dict], first: list[int], *masks: dict[str, Layers]) -> dict:
    """The same for a method that reads texts.

    Args:
        scores: what lsn/text_scores.py measured, by language.
        first: how many texts of each language are its first half.
        masks: from all texts, from the first half and from the second.
    """
    sizes = [(row["header"]["n_used"], row["header"]["text_tokens"]) for row in scores]
    shares = [n_first / n for (n, _), n_first in zip(sizes, first, strict=True)]
    tokens = {c.lang: size * n_first for c, (_, size), n_first in zip(counts, sizes, first, strict=True)}
    rest = {c.lang: size * (n - n_first) for c, (n, size), n_first in zip(counts, sizes, first, strict=True)}
    point = {"share": sum(shares) / len(shares), "tokens": tokens, **agreement(masks[1], masks[0])}
    halves = {"tokens_first": tokens, "tokens_second": rest, **agreement(masks[1], masks[2])}
    return _stability(counts, [point], halves)


def _stability(counts: list[Counts], points: list[dict], halves: dict) -> dict:
    """The result of `convergence`, with the smallest part from which on the mask stays the same as `enough`.

    A single part that happens to agree is not enough; if the halves disagree, the full mask itself is not settled.
    """
    settled = (halves["jaccard"] or 0) >= ENOUGH
    unsettled = [k for k, point in enumerate(points) if (point["jaccard"] or 0) < ENOUGH]
    stable = points[unsettled[-1] + 1 :] if unsettled else points
    enough = stable[0] if settled and stable else None
    return {
        "against_full": points,
        "halves": halves,
        "repeated": {c.lang: (c.header.get("tokens") or {}).get("repeated") for c in counts},
        "enough_at": ENOUGH,
        "enough": enough and {"share": enough["share"], "tokens": enough["tokens"]},
    }


def overlap(mask: dict[str, Layers]) -> dict:
    """Neurons shared by every two languages, in the mask's order, and their Jaccard."""
    sets = [pairs(layers) for layers in mask.values()]
    return {
        "languages": list(mask),
        "shared": [[len(a & b) for b in sets] for a in sets],
        "jaccard": [[jaccard(a, b) for b in sets] for a in sets],
    }


def describe(found, counts: list[Counts], richest: Callable) -> dict:
    """The report without convergence: counts per language and layer, overlap, and the numbers that determine the mask.

    `found` is a `Selection` (see lape.py), `richest` the function of identify.py.
    """
    sets = {lang: pairs(layers) for lang, layers in found.mask.items()}
    owners = Counter(pair for members in sets.values() for pair in members)
    n_owners = Counter(owners.values())
    n_owners[0] = len(found.selected) - len(owners)
    report = {
        "n_layers": len(counts[0].over_zero),
        "n_neurons": counts[0].n_neurons,
        "n_candidates": found.n_candidates,
        "n_wanted": found.n_wanted,
        "n_selected": len(found.selected),
        "selected_by_n_languages": {str(k): n_owners[k] for k in range(len(sets) + 1)},
        **found.numbers,
        "languages": {},
        "overlap": overlap(found.mask),
    }
    for c in counts:
        layers = found.mask[c.lang]
        report["languages"][c.lang] = {
            "n_tokens": c.n,
            "n_neurons": len(sets[c.lang]),
            "counts": [len(layers[layer]) for layer in layers],
            "own": [sum(owners[layer, neuron] == 1 for neuron in layers[layer]) for layer in layers],
            "richest_layers": richest(layers, max(1, len(layers) // 4)) if sets[c.lang] else [],
        }
    return report


# ---------------------------------------------------------------- words


def warn_about_tokens(counts: list[Counts]) -> None:
    """Warn of few or uneven tokens: a rate p from n independent ones has the standard error sqrt(p (1 - p) / n)."""
    for c in counts:
        if c.n < FEW_TOKENS:
            cli.warn(
                f"{c.lang} has {c.n:,} tokens: a firing rate from so few has a standard error of up to "
                f"{0.5 / math.sqrt(c.n):.3f}, so chance decides part of the mask"
            )
        if c.routed is not None:
            routed = c.routed[c.routed.any(-1)]
            few = int((routed < FEW_TOKENS).sum())
            if few:
                cli.warn(
                    f"{few} of {routed.size} experts got fewer than {FEW_TOKENS:,} tokens of {c.lang} (the fewest: "
                    f"{routed.min():,}), so chance decides part of the mask among their neurons"
                )
    least, most = (pick(counts, key=lambda c: c.n) for pick in (min, max))
    if most.n > UNEVEN * least.n:
        errors = " against ".join(f"{0.5 / math.sqrt(c.n):.4f}" for c in (least, most))
        cli.warn(
            f"{most.lang} has {most.n / least.n:.1f} times the tokens of {least.lang} ({most.n:,} and {least.n:,}), "
            f"whose rates are noisier: standard error up to {errors}"
        )


def say_found(report: dict, words: str) -> None:
    """Print how many neurons there are; `words`: the numbers that determine the mask."""
    n, wanted = report["n_selected"], report["n_wanted"]
    cli.say(f"{n:,} of {report['n_neurons']:,} neurons selected from {report['n_candidates']:,} candidates; {words}")
    if n < wanted:
        cli.warn(f"{wanted:,} neurons were to be selected, but only {n:,} are above the bar in any language")
    for lang, facts in report["languages"].items():
        if not facts["n_neurons"]:
            cli.warn(f"{lang} gets no neurons, only an empty entry in the mask; a higher --rate may give it some")
            continue
        cli.say(
            f"{lang}: {facts['n_neurons']:,} neurons, {sum(facts['own']):,} of them of no other language; most are in "
            f"layers {facts['richest_layers']}"
        )


def say_convergence(found: dict | None) -> None:
    if found is None:
        cli.say("the counts have no common snapshots: how stable the mask is over tokens is not known")
        return
    for point in found["against_full"]:
        cli.say(f"{shown_share(point['share'])} of the tokens: Jaccard with the full mask {_agreed(point)}")
    cli.say(f"first part of the tokens against the rest: Jaccard {_agreed(found['halves'])}")
    repeated = {lang: share for lang, share in found["repeated"].items() if share is not None and share > REPEATED}
    if repeated:
        shares = ", ".join(f"{share:.0%} of {lang}" for lang, share in repeated.items())
        cli.warn(
            f"some text occurs in the tokens more than once ({shares} by runs of 10 tokens): parts agree because they "
            "are the same text, and there is less text than the number of tokens suggests"
        )
        return
    enough = found["enough"]
    if enough:
        share, most = shown_share(enough["share"]), max(enough["tokens"].values())
        cli.say(
            f"fewer tokens would have been enough: {share} of them (up to {most:,} a language) give this mask with a "
            f"Jaccard of {found['enough_at']} or better"
        )
    else:
        least = found["enough_at"]
        cli.say(f"parts of the tokens do not give this mask with a Jaccard of {least}: more would still change it")


def _agreed(result: dict) -> str:
    by_language = {lang: value for lang, value in result["languages"].items() if value is not None}
    if not by_language:
        return "undefined (no neurons)"
    lang = min(by_language, key=by_language.get)
    return f"{result['jaccard']:.3f} (lowest: {lang} {by_language[lang]:.3f})"
