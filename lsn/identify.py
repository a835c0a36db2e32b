"""Which FFN neurons belong to which language: LAPE, language activation probability entropy (step 8).

A neuron of one language fires often on that language's tokens and rarely on the others'. Its firing rates, normalised
over languages, are a distribution of low entropy. The bar is the rate that 95 % of all rates (neurons times languages) do
not exceed. Of the neurons above it in some language, those of lowest entropy are selected, 1 % of all neurons; each
belongs to the languages in which it is above the bar.

In:   FOLDER/TAG.<lang>.pt for two or more languages, the counts of lsn/activation.py (or of the published scripts).
Out:  OUT/TAG.json, the mask {lang: {layer: [neurons]}}, every language and layer present; OUT/TAG.report.json with counts
      per layer, overlap between languages and how stable the mask is over tokens, and its figures (PDF, PNG);
      a random control mask of the same size, and the layers richest in one language's neurons.

Full: python lsn/identify.py -t llama-2-7b-eus -l en,eu -a activation_count -o result --control-mask-out result/control.json
Tiny: python lsn/identify.py --study demo/tiny.yaml
"""  # noqa: E501

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_utils import cli, figures, languages, masks, refs, results
from cpt_utils import counts as activations
from cpt_utils.errors import InputError
from cpt_utils.masks import Layers
from cpt_utils.study import Study

if TYPE_CHECKING:
    import numpy as np

    from cpt_utils.counts import Counts

LAYERS, REPORT = "lsn-layers", "lsn-report"
FEW_TOKENS = 10_000
UNEVEN = 3  # times more tokens in one language than in another
ENOUGH = 0.9  # Jaccard with the mask of all tokens from which a person would have got the same neurons
# Entropies closer than this are ties: the same rates in another order or at another scale differ in the last bits.
TIE = 12  # decimals


# ---------------------------------------------------------------- the method


@dataclass
class Lape:
    """What LAPE found: the mask, and the numbers that decided."""

    mask: dict[str, Layers]
    filter_bar: float
    bar: float
    n_candidates: int
    n_wanted: int
    selected: np.ndarray  # [selected, 2] of (layer, neuron)
    entropy_cut: float | None


def share(rate: float, size: int) -> int:
    """floor(rate * size) of the decimal number that was written: 0.29 of 100 is 29, though 0.29 * 100 is 28.99.."""
    return math.floor(Fraction(str(rate)) * size)


def entropy(rates: np.ndarray) -> np.ndarray:
    """The entropy [L, I] (nats) of each neuron's rates [L, I, G] normalised over languages; NaN where all are zero.

    Rates are added up in order of size, so that the order of languages does not matter to the last bit.
    """
    import numpy as np

    ordered = np.sort(rates, axis=-1)
    total = np.zeros(rates.shape[:-1])
    for g in range(rates.shape[-1]):
        total += ordered[..., g]
    found = np.zeros_like(total)
    with np.errstate(divide="ignore", invalid="ignore"):
        for g in range(rates.shape[-1]):
            part = ordered[..., g] / total
            found -= np.where(part == 0, 0.0, part * np.log(part))  # 0 ln 0 = 0; the NaN of 0 / 0 stays
    return found


def kth_smallest(values: np.ndarray, rate: float, flag: str) -> float:
    """The value of rank floor(rate * size), ascending and counted from 1, of all `values`."""
    import numpy as np

    rank = share(rate, values.size)
    if not 1 <= rank <= values.size:
        raise InputError(f"{flag} {rate} of {values.size} rates is rank {rank}; give a rate above 0, at most 1")
    return float(np.partition(values.ravel(), rank - 1)[rank - 1])


def lape(
    over_zero: list[np.ndarray],
    n: list[int],
    langs: list[str],
    rate: float = 0.01,
    filter_rate: float = 0.95,
    bar_rate: float | None = None,
) -> Lape:
    """Language activation probability entropy (Tang et al. 2024, as step 8 of the paper uses it), in float64.

    Args:
        over_zero: for each language the tokens [L, I] that each neuron is active on.
        n: for each language its tokens; they may differ.
        rate: the share of all neurons that is selected.
        filter_rate: a neuron must be above this quantile of all rates in some language to be a candidate.
        bar_rate: a selected neuron belongs to the languages above this quantile; None: the same.
    """
    import numpy as np

    p = np.stack([counts.astype(np.float64) / tokens for counts, tokens in zip(over_zero, n, strict=True)], axis=-1)
    filter_bar = kth_smallest(p, filter_rate, "--filter-rate")
    bar = filter_bar if bar_rate is None else kth_smallest(p, bar_rate, "--bar-rate")
    highest = p.max(-1)
    # A neuron that never fires has no distribution; it is out even where the bar is below zero's rank.
    candidates = np.flatnonzero((highest > filter_bar) & (highest > 0))
    wanted = share(rate, highest.size)
    if not wanted:
        raise InputError(f"--rate {rate} of {highest.size} neurons is less than one; give a higher --rate")
    entropies = entropy(p).ravel()
    # A stable sort of positions in order of (layer, neuron): ties go to the lower.
    order = np.argsort(np.round(entropies[candidates], TIE), kind="stable")[:wanted]
    chosen = np.sort(candidates[order])
    selected = np.stack(np.unravel_index(chosen, highest.shape), axis=-1)
    above = p.reshape(-1, len(langs))[chosen] > bar
    return Lape(
        mask={lang: by_layer(selected[above[:, g]], len(highest)) for g, lang in enumerate(langs)},
        filter_bar=filter_bar,
        bar=bar,
        n_candidates=len(candidates),
        n_wanted=wanted,
        selected=selected,
        entropy_cut=float(entropies[candidates[order[-1]]]) if len(order) else None,
    )


def by_layer(places: np.ndarray, n_layers: int) -> Layers:
    """Sorted (layer, neuron) pairs [n, 2] as {layer: [neurons]} with every layer."""
    return {layer: places[places[:, 0] == layer, 1].tolist() for layer in range(n_layers)}


def richest(layers: Layers, n: int) -> list[int]:
    """The `n` layers with most neurons, in layer order; of equals the lower layers."""
    return sorted(sorted(layers, key=lambda layer: (-len(layers[layer]), layer))[:n])


def pairs(layers: Layers) -> set[tuple[int, int]]:
    return {(layer, neuron) for layer, neurons in layers.items() for neuron in neurons}


def jaccard(a: set, b: set) -> float | None:
    """Shared over all members; None where both are empty."""
    return len(a & b) / len(a | b) if a or b else None


# ---------------------------------------------------------------- what the report says


def agreement(a: dict[str, Layers], b: dict[str, Layers]) -> dict:
    """Jaccard of two masks: of all (language, layer, neuron) triples, and for each language."""
    ours, theirs = ({lang: pairs(layers) for lang, layers in mask.items()} for mask in (a, b))
    together = ({(lang, *pair) for lang in mask for pair in mask[lang]} for mask in (ours, theirs))
    return {"jaccard": jaccard(*together), "languages": {lang: jaccard(ours[lang], theirs[lang]) for lang in a}}


def convergence(counts: list[Counts], full: Lape, **rates) -> dict | None:
    """How stable the mask is over tokens; None where the counts hold no snapshots, or not the same in every language.

    A mask from part of the tokens shares these with the full one, so their agreement flatters; the two halves are
    disjoint, and tell how well the mask of half the tokens repeats.
    """
    n_snapshots = {len(one.snapshots_n) for one in counts}
    if len(n_snapshots) != 1 or n_snapshots == {0}:
        return None
    langs, points = [one.lang for one in counts], []
    for k in range(n_snapshots.pop()):
        tokens = [one.snapshots_n[k] for one in counts]
        first = lape([one.snapshots[k] for one in counts], tokens, langs, **rates)
        parts = {one.lang: one.snapshots_n[k] / one.n for one in counts}
        points.append(
            {
                "share": sum(parts.values()) / len(parts),
                "tokens": dict(zip(langs, tokens, strict=True)),
                **agreement(first.mask, full.mask),
            }
        )
    rest = [one.n - one.snapshots_n[-1] for one in counts]
    second = lape([one.over_zero - one.snapshots[-1] for one in counts], rest, langs, **rates)
    halves = {"tokens_first": points[-1]["tokens"], "tokens_second": dict(zip(langs, rest, strict=True))}
    enough = next((point for point in points if (point["jaccard"] or 0) >= ENOUGH), None)
    return {
        "against_full": points,
        "halves": halves | agreement(first.mask, second.mask),
        "enough_at": ENOUGH,
        "enough": enough and {"share": enough["share"], "tokens": enough["tokens"]},
    }


def overlap(mask: dict[str, Layers]) -> dict:
    """Between every two languages, in the mask's order: neurons shared, and Jaccard."""
    sets = [pairs(layers) for layers in mask.values()]
    return {
        "languages": list(mask),
        "shared": [[len(a & b) for b in sets] for a in sets],
        "jaccard": [[jaccard(a, b) for b in sets] for a in sets],
    }


def describe(found: Lape, counts: list[Counts]) -> dict:
    """The report without convergence: counts per language and layer, overlap, and the numbers that decided."""
    sets = {lang: pairs(layers) for lang, layers in found.mask.items()}
    owners = Counter(pair for members in sets.values() for pair in members)
    n_owners = Counter(owners.values())
    n_owners[0] = len(found.selected) - len(owners)
    report = {
        "n_layers": len(counts[0].over_zero),
        "n_neurons": counts[0].over_zero.size,
        "n_candidates": found.n_candidates,
        "n_wanted": found.n_wanted,
        "n_selected": len(found.selected),
        "selected_by_n_languages": {str(k): n_owners[k] for k in range(len(sets) + 1)},
        "filter_bar": found.filter_bar,
        "bar": found.bar,
        "entropy_cut": found.entropy_cut,
        "entropy_max": math.log(len(sets)),
        "languages": {},
        "overlap": overlap(found.mask),
    }
    for one in counts:
        layers = found.mask[one.lang]
        report["languages"][one.lang] = {
            "n_tokens": one.n,
            "n_neurons": len(sets[one.lang]),
            "counts": [len(layers[layer]) for layer in layers],
            "own": [sum(owners[layer, neuron] == 1 for neuron in layers[layer]) for layer in layers],
            "richest_layers": richest(layers, max(1, len(layers) // 4)) if sets[one.lang] else [],
        }
    return report


# ---------------------------------------------------------------- files


def refuse_stale(counts: list[Counts], study: Study) -> None:
    """Refuse the study's own counts where its models have been trained again since.

    Raises:
        InputError: the counts are of none of the study's models.
    """
    made_for, here = model_of(counts), [study.get("base"), study.get("run")]
    if made_for is None or not all(isinstance(place, str) and Path(place).is_dir() for place in here):
        return
    if not refs.belongs(made_for, [ref.describe() for ref in [refs.model(here[0]), *refs.run(here[1])]]):
        raise InputError(
            f"{counts[0].path.parent} holds counts of {made_for['spec']}, which is neither the base nor a checkpoint "
            "of the study's run, or was trained again since; run lsn/activation.py again with --overwrite"
        )


def model_of(counts: list[Counts]) -> dict | None:
    """The model that was counted, where a file says so."""
    return next((one.header["models"]["model"] for one in counts if one.header.get("models")), None)


def n_interface(study: Study, n_layers: int, model: dict | None) -> int:
    """How many interface layers the study's split of layers has; it must be about the model that was counted."""
    path = study.input(None, "--n-layers", "layers", "layer-specialize/layer_specialize.py")
    payload, header = results.read_json(path, "layer-specialize", n_layers=n_layers)
    made_for = (header.get("models") or {}).get("model")
    if model and made_for and not refs.belongs(made_for, [model]):
        raise InputError(
            f"{path} was made for {made_for.get('spec')}, but the counts are of {model.get('spec')}; run "
            "layer-specialize/layer_specialize.py on this run, or give --n-layers"
        )
    layers = payload.get("interface_layers") if isinstance(payload, dict) else None
    if not isinstance(layers, list) or not layers:
        raise InputError(f"{path} has no interface layers; give --n-layers, or the study key lsn.layers")
    return len(layers)


def finished(path: Path, schema: str, facts: dict, overwrite: bool) -> bool:
    """Whether `path` is a finished result of exactly this request.

    Raises:
        InputError: it is a result of something else.
    """
    if overwrite or not path.exists():
        return False
    _, header = results.read_json(path, schema)
    other = [fact for fact, value in results.plain(facts).items() if header.get(fact) != value]
    if other:
        why = f"is of another request (it differs in {', '.join(other)})" if header else "was not made by this script"
        raise InputError(f"{path} {why}; give --overwrite to replace it, or another -o")
    return True


# ---------------------------------------------------------------- figures, from the report alone


def draw(path: Path, report: dict) -> list[Path]:
    """Every figure that the report has numbers for; returns the paths without suffix.

    `<path>-counts` always, `<path>-overlap` for three languages or more, `<path>-convergence` with snapshots.
    """
    drawn = [path.with_name(f"{path.name}-counts")]
    draw_counts(drawn[0], report["languages"], report["n_layers"])
    if len(report["languages"]) > 2:
        drawn.append(path.with_name(f"{path.name}-overlap"))
        draw_overlap(drawn[-1], report["overlap"])
    if report.get("convergence"):
        drawn.append(path.with_name(f"{path.name}-convergence"))
        draw_convergence(drawn[-1], report["convergence"])
    return drawn


def draw_counts(path: Path, by_language: dict[str, dict], n_layers: int) -> None:
    """Neurons per layer, a panel for each language: dark where the neuron is this language's alone."""
    n = len(by_language)
    columns = 1 if n <= 4 else min(5, -(-n // 2))
    rows = -(-n // columns)
    width = figures.COLUMN if columns == 1 else figures.PAGE
    with figures.style() as plt:
        from matplotlib.patches import Patch

        figure, axes = plt.subplots(
            rows, columns, sharex=True, sharey=True, squeeze=False, figsize=(width, 0.45 + 0.95 * rows)
        )
        for (lang, facts), colour, axis in zip(by_language.items(), figures.colours(n), axes.ravel(), strict=False):
            shared = [a - b for a, b in zip(facts["counts"], facts["own"], strict=True)]
            axis.bar(range(n_layers), facts["own"], color=colour, width=0.9)
            axis.bar(range(n_layers), shared, bottom=facts["own"], color=colour, alpha=0.4, width=0.9)
            axis.set_title(f"{lang} (n = {facts['n_neurons']:,})", pad=2)
            axis.set_xticks(range(0, n_layers, -(-n_layers // (12 if columns == 1 else 5))))
        for axis in axes.ravel()[n:]:
            axis.set_visible(False)
        looks = [Patch(color="0.3", label="this language only"), Patch(color="0.75", label="shared with others")]
        figure.legend(handles=looks, loc="outside upper center", ncols=2)
        figure.supxlabel("layer", fontsize=8)
        figure.supylabel("language-specific neurons" if rows > 1 else "neurons", fontsize=8)
        figures.save(figure, path)


def draw_overlap(path: Path, shared: dict) -> None:
    """Jaccard of the neurons of every two languages; the diagonal holds the number of neurons."""
    import numpy as np

    names, n = shared["languages"], len(shared["languages"])
    values = np.array([[np.nan if value is None else value for value in row] for row in shared["jaccard"]], float)
    np.fill_diagonal(values, np.nan)
    size = figures.COLUMN if n <= 8 else figures.PAGE * 0.65
    # Not below 0.1, or next to no overlap would look like much.
    top = max(0.1, *values[np.isfinite(values)])
    with figures.style() as plt:
        figure, axis = plt.subplots(figsize=(size, size * 0.85))
        axis.set_facecolor("0.92")
        image = axis.imshow(values, cmap="Blues", vmin=0, vmax=top)
        for i in range(n):
            for j in range(n):
                value = values[i, j]
                text = f"{shared['shared'][i][i]:,}" if i == j else "–" if np.isnan(value) else f"{value:.2f}"
                colour = "w" if value > 0.6 * top else "k"
                axis.text(j, i, text, ha="center", va="center", fontsize=6.5, color=colour)
        axis.set_xticks(range(n), names, rotation=45 if n > 4 and max(map(len, names)) > 3 else 0)
        axis.set_yticks(range(n), names)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        figure.colorbar(image, label="Jaccard (diagonal: number of neurons)", shrink=0.8)
        figures.save(figure, path)


def draw_convergence(path: Path, found: dict) -> None:
    """Jaccard of the mask from part of the tokens with the full one, over the share of tokens; the halves beside."""
    points, halves = found["against_full"], found["halves"]
    langs = list(halves["languages"])
    full = [halves["tokens_first"][lang] + halves["tokens_second"][lang] for lang in langs]
    shares = [point["share"] for point in points] + [1.0]
    lines = {lang: [point["languages"][lang] for point in points] for lang in langs}
    lines["all"] = [point["jaccard"] for point in points]
    known = [value for line in lines.values() for value in line if value is not None]
    with figures.style() as plt:
        figure, axis = plt.subplots(figsize=(figures.COLUMN, 2.4 + 0.13 * (len(langs) // 4)))
        for i, (lang, colour) in enumerate(zip(lines, [*figures.colours(len(langs)), "0.2"], strict=True)):
            values = [float("nan") if value is None else value for value in lines[lang]] + [1.0]
            # The palette repeats after eight: another dash tells the ninth from the first.
            dash, marker = ("-", "--", ":")[i // len(figures.PALETTE) % 3], figures.MARKERS[i % len(figures.MARKERS)]
            look = {"linewidth": 2, "zorder": 3} if lang == "all" else {"marker": marker, "linestyle": dash}
            axis.plot(shares, values, **({"linewidth": 0.8} | look), color=colour, label=lang)
        if halves["jaccard"] is not None:
            known.append(halves["jaccard"])
            look = {"color": "0.2", "marker": "X", "markersize": 7, "linestyle": "", "zorder": 4}
            axis.plot(points[-1]["share"], halves["jaccard"], **look, label="all, halves")
        axis.set_xscale("log", base=2)
        axis.set_xticks(shares, [*map(_share, shares[:-1]), "1"])
        axis.minorticks_off()
        amount = f"{min(full):,}" if min(full) == max(full) else f"{min(full):,}–{max(full):,}"
        axis.set_xlabel(f"share of the tokens ({amount} a language)")
        axis.set_ylabel("Jaccard with the full mask")
        axis.set_ylim(max(0, math.floor(10 * min(known, default=0) - 0.5) / 10), 1.01)
        figure.legend(loc="outside upper center", ncols=4 if len(langs) > 4 else 3, columnspacing=1.2, handlelength=1.8)
        figures.save(figure, path)


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)

    def add(*names, **how):
        p.add_argument(*names, **how)

    add("-t", "--tag", metavar="TAG", help="counts TAG.<lang>.pt are read; default: the study's name")
    add("-l", "--lang", metavar="en,ga,..", help="two languages or more; default: the study's languages.lsn")
    add("-o", "--output", metavar="OUT", help="folder to write to; default: the study's lsn/result, else result")
    add(
        "-a",
        "--activation",
        metavar="FOLDER",
        help="folder of the counts; default: the study's lsn/activation_count, else activation_count",
    )
    add(
        "--rate",
        type=float,
        metavar="R",
        help="share of all neurons to select; default: the study's lsn.rate, else 0.01",
    )
    add(
        "--filter-rate",
        type=float,
        default=0.95,
        metavar="R",
        help="quantile of all rates that a neuron must exceed in some language to be a candidate; default 0.95",
    )
    add(
        "--bar-rate",
        type=float,
        metavar="R",
        help="quantile that its rate in a language must exceed to belong to it; default: that of --filter-rate",
    )
    add("--control-mask-out", metavar="F", help="random control mask; default in a study: TAG.control.json")
    add("--layers-out", metavar="F", help="layers richest in neurons; default in a study: TAG.layers.json")
    add("--layers-lang", metavar="LANG", help="language of --layers-out; default: the study's languages.target")
    add(
        "--n-layers",
        type=cli.positive,
        metavar="N",
        help="layers of --layers-out; default: the study's lsn.layers, else as many as it has interface layers",
    )
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed)
    tag = args.tag or (study.name if study else study.value(None, "-t", "name"))
    langs = wanted_languages(study.value(args.lang, "-l", "languages.lsn"))
    rates = wanted_rates(study.value(args.rate, "--rate", "lsn.rate", 0.01), args.filter_rate, args.bar_rate)
    mask_path, control_path, layers_path = places(study, tag, args)
    given = args.activation or (None if study else "activation_count")
    folder = study.input(given, "-a", "lsn_counts", "lsn/activation.py")
    files = activations.files(folder, tag)
    named = [languages.find(files, lang, what=f"{folder}/{tag}.<lang>.pt") for lang in langs]
    counts = [activations.read(files[name], lang) for name, lang in zip(named, langs, strict=True)]
    activations.refuse_mixed(counts)
    if study and not args.activation:
        refuse_stale(counts, study)
    n_layers, ffn_width = counts[0].over_zero.shape
    layers_lang, n_rich = wanted_layers(study, args, langs, layers_path, n_layers, model_of(counts))

    facts = {
        "models": {"model": model_of(counts)},
        "n_layers": n_layers,
        "ffn_width": ffn_width,
        "languages": {lang: languages.canonical(lang, any_tag=True) for lang in langs},
        "tokens": {one.lang: token_facts(one) for one in counts},
        "rates": rates,
        "seed": study.seed,
    }
    report_path = mask_path.with_suffix(".report.json")
    outputs = {mask_path: (masks.SCHEMA, facts | {"control": False}), report_path: (REPORT, facts)}
    if control_path:
        outputs[control_path] = masks.SCHEMA, facts | {"control": True}
    if layers_path:
        outputs[layers_path] = LAYERS, facts | {"language": layers_lang, "n_layers_listed": n_rich}
    if len(outputs) < 2 + bool(control_path) + bool(layers_path):
        raise InputError("two results would go to one file; give --control-mask-out and --layers-out other names")
    # All are looked at, so that a stranger is refused even where another one is missing.
    states = [finished(path, schema, wanted, args.overwrite) for path, (schema, wanted) in outputs.items()]
    if all(states):
        cli.say(f"{', '.join(map(str, outputs))}: finished (--overwrite redoes them)")
        return

    warn_about_tokens(counts)
    found = lape([one.over_zero for one in counts], [one.n for one in counts], langs, **rates)
    control = masks.random_control(found.mask, n_layers, ffn_width, study.seed) if control_path else None
    report = describe(found, counts)
    report |= {"rates": rates, "convergence": convergence(counts, found, **rates)}
    draw(report_path.with_suffix(""), report)
    results.write_json(report_path, report, results.header(REPORT, **facts))
    if layers_path:
        layers = {"layers": richest(found.mask[layers_lang], n_rich), "language": layers_lang}
        layers["counts"] = report["languages"][layers_lang]["counts"]
        results.write_json(layers_path, layers, results.header(LAYERS, **outputs[layers_path][1]))
    if control_path:
        masks.write(control_path, control, control=True, **facts)
    masks.write(mask_path, found.mask, **facts)  # last: where it is, all is
    say_found(report)
    say_convergence(report["convergence"])
    if layers_path:
        cli.say(f"the {n_rich} layers richest in neurons of {layers_lang}: {layers['layers']}")
        bare = [layer for layer in layers["layers"] if not layers["counts"][layer]]
        if bare:
            cli.warn(f"{layers_lang} has no neurons in layers {bare}: only {n_rich - len(bare)} layers have any")
    cli.say(f"wrote {', '.join(map(str, outputs))} and the figures {report_path.with_suffix('')}-*.pdf")


def wanted_languages(given: str | list[str]) -> list[str]:
    """The languages of -l or of the study, as they were written.

    Raises:
        InputError: fewer than two, or one in two spellings.
    """
    parts = given.split(",") if isinstance(given, str) else given
    langs = [str(part).strip() for part in parts if str(part).strip()]
    for i, lang in enumerate(langs):
        twice = next((other for other in langs[:i] if languages.same(other, lang)), None)
        if twice is not None:
            raise InputError(f"languages: {twice} and {lang} are one language; name each once")
    if len(langs) < 2:
        raise InputError(f"{len(langs)} language given; name two or more: neurons of one stand out against others")
    return langs


def wanted_rates(rate, filter_rate: float, bar_rate: float | None) -> dict[str, float]:
    """The three rates as LAPE takes them; the first may come from a study, which can hold anything."""
    rates = {"rate": rate, "filter_rate": filter_rate, "bar_rate": filter_rate if bar_rate is None else bar_rate}
    for name, value in rates.items():
        if type(value) not in (int, float) or not 0 < value <= 1:
            where = "--rate (study key lsn.rate)" if name == "rate" else f"--{name.replace('_', '-')}"
            raise InputError(f"{where} is {value!r}; give a share above 0 and at most 1")
    return {name: float(value) for name, value in rates.items()}


def places(study: Study, tag: str, args) -> tuple[Path, Path | None, Path | None]:
    """Where mask, control mask and layers go; outside a study the last two are written on request only."""
    out = Path(args.output or "result") if args.output or not study else study.result("lsn_mask").parent

    def place(given: str | None, name: str) -> Path | None:
        return Path(given) if given else out / f"{tag}.{name}.json" if study else None

    return out / f"{tag}.json", place(args.control_mask_out, "control"), place(args.layers_out, "layers")


def wanted_layers(study: Study, args, langs, path: Path | None, n_layers: int, model) -> tuple[str | None, int | None]:
    """The language and the number of layers for the layers file; (None, None) where none is written.

    Raises:
        InputError: nothing says them, a language without counts, or more layers than the model has.
    """
    if path is None:
        return None, None
    target = study.value(args.layers_lang, "--layers-lang", "languages.target")
    lang = languages.find(langs, target, what="languages of the mask (-l)")
    n = study.value(args.n_layers, "--n-layers", "lsn.layers", None)
    n = n_interface(study, n_layers, model) if n is None else n
    if type(n) is not int or not 1 <= n <= n_layers:
        raise InputError(f"{n} layers asked for, but the model has {n_layers}; give --n-layers from 1 to {n_layers}")
    return lang, n


def token_facts(one: Counts) -> dict:
    """What the headers say of the tokens of one language."""
    kept = {key: one.header[key] for key in ("tokens", "dtype", "block_size") if key in one.header}
    return {"n_tokens": one.n, "counts": one.path.name, "counts_sha256": one.hash(), **kept}


def warn_about_tokens(counts: list[Counts]) -> None:
    """A rate p from n independent tokens has the standard error sqrt(p (1 - p) / n), at most 0.5 / sqrt(n)."""

    def error(one: Counts) -> float:
        return 0.5 / math.sqrt(one.n)

    for one in counts:
        if one.n < FEW_TOKENS:
            cli.warn(
                f"{one.lang} has {one.n:,} tokens: a firing rate from so few has a standard error of up to "
                f"{error(one):.3f}, so chance decides part of the mask"
            )
    least, most = (pick(counts, key=lambda one: one.n) for pick in (min, max))
    if most.n > UNEVEN * least.n:
        cli.warn(
            f"{most.lang} has {most.n / least.n:.1f} times the tokens of {least.lang} ({most.n:,} and {least.n:,}), "
            f"whose rates are noisier: standard error up to {error(least):.4f} against {error(most):.4f}"
        )


def say_found(report: dict) -> None:
    n, wanted, cut = report["n_selected"], report["n_wanted"], report["entropy_cut"]
    cli.say(
        f"{n:,} of {report['n_neurons']:,} neurons selected from {report['n_candidates']:,} candidates; bar "
        f"{report['bar']:.4f}" + (f", entropy up to {cut:.4f} of {report['entropy_max']:.4f}" if n else "")
    )
    if n < wanted:
        cli.warn(f"{wanted:,} neurons were to be selected, but only {n:,} are above the bar in any language")
    for lang, facts in report["languages"].items():
        if not facts["n_neurons"]:
            cli.warn(f"{lang} gets no neuron: it is listed in the mask, empty; a higher --rate may give it some")
            continue
        cli.say(
            f"{lang}: {facts['n_neurons']:,} neurons, {sum(facts['own']):,} of them no other language's; most in "
            f"layers {facts['richest_layers']}"
        )


def say_convergence(found: dict | None) -> None:
    if found is None:
        cli.say("the counts hold no common snapshots: how stable the mask is over tokens is not known")
        return
    for point in found["against_full"]:
        cli.say(f"{_share(point['share'])} of the tokens: Jaccard with the full mask {_lowest(point)}")
    cli.say(f"first part of the tokens against the rest, none in common: Jaccard {_lowest(found['halves'])}")
    if found["enough"]:
        most = max(found["enough"]["tokens"].values())
        cli.say(
            f"fewer tokens would have been enough: {_share(found['enough']['share'])} of them (up to {most:,} a "
            f"language) give this mask to a Jaccard of {found['enough_at']} or better"
        )
    else:
        cli.say(f"no part of the tokens gives this mask to a Jaccard of {found['enough_at']}: more would still move it")


def _share(value: float) -> str:
    whole = round(1 / value)
    return f"1/{whole}" if abs(value * whole - 1) < 0.05 else f"{value:.2f}"


def _lowest(found: dict) -> str:
    by_language = {lang: value for lang, value in found["languages"].items() if value is not None}
    if not by_language:
        return "undefined (no neurons)"
    lang = min(by_language, key=by_language.get)
    return f"{found['jaccard']:.3f} (lowest: {lang} {by_language[lang]:.3f})"


if __name__ == "__main__":
    cli.run(main)
