"""Which FFN neurons belong to which language: LAPE, language activation probability entropy (step 8).

A neuron of one language fires often on that language's tokens and rarely on the others'. Its firing rates, normalised
over languages, are a distribution of low entropy. The bar is the rate that 95 % of all rates (neurons times languages) do
not exceed. Of the neurons above it in some language, those of lowest entropy are selected, 1 % of all neurons; each
belongs to the languages in which it is above the bar.

In:   FOLDER/TAG.<lang>.pt for two or more languages, the counts of lsn/activation.py (or of the published scripts, or
      LAPE's own activation.<lang>.train.TAG).
Out:  OUT/TAG.json, the mask {lang: {layer: [neurons]}}, every language and layer present; OUT/TAG.report.json with counts
      per layer, overlap between languages and how stable the mask is over tokens, and its figures (PDF, PNG);
      a random control mask of the same size, and the layers richest in one language's neurons (a bare list, with its
      facts beside it in <the same name>.facts.json).

Full: python lsn/identify.py -t llama-2-7b-eus -l en,eu -a activation_count -o result --control-mask-out result/control.json
Tiny: python lsn/identify.py --study demo/tiny.yaml
"""  # noqa: E501

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from cpt_utils.base import cli, languages, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np
from cpt_utils.base.study import Study, dotted
from cpt_utils.checkpoints import refs, relatives
from cpt_utils.measures import counts as activations
from cpt_utils.measures import gate, masks
from cpt_utils.measures.counts import Counts
from cpt_utils.measures.masks import Layers

reporting = cli.sibling("lsn/identify_report.py")

RESULTS = {
    "lsn_mask": "lsn/result/{name}.json",
    "lsn_control": "lsn/result/{name}.control.json",
    "lsn_layers": "lsn/result/{name}.layers.json",
}
ASKED = {"lsn_mask": "Which neurons fire for one language and hardly for the others, and in which layers do they lie?"}
CAPTIONS = {
    "lsn_counts": """Part II: 2. Language-specific neurons
        How many neurons of each language there are in each layer (LAPE). What decides is little here: compare the
        layers richest in the new language's neurons with the interface layers, and read the report beside it for how
        stable the mask is when half the tokens are taken.""",
    "lsn_convergence": """Part II: 2. Language-specific neurons
        How much of the mask a part of the tokens already gives (Jaccard with the full mask), and the agreement of two
        parts without a common token. Where the curve is flat near one, fewer tokens would have been enough.""",
}
IMAGES = {"lsn_counts": "{name}.report-counts.png", "lsn_convergence": "{name}.report-convergence.png"}

# Entropies closer than this are ties: the same rates in another order or at another scale differ in the last bits.
TIE = 12  # decimals
LAYERS, REPORT = "lsn-layers", "lsn-report"
BY_HAND = "activation_count"  # where the published README has activation.py write, and identify.py read


# ---------------------------------------------------------------- the method (Tang et al. 2024)


@dataclass
class Selection:
    """The mask, and the numbers that decided."""

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
    rank = share(rate, values.size)
    if not 1 <= rank <= values.size:
        raise InputError(f"{flag} {rate} of {values.size} rates is rank {rank}; give a rate above 0, at most 1")
    return float(np.partition(values.ravel(), rank - 1)[rank - 1])


def select(
    over_zero: list[np.ndarray],
    n: list[int | np.ndarray],
    langs: list[str],
    rate: float = 0.01,
    filter_rate: float = 0.95,
    bar_rate: float | None = None,
    exists: np.ndarray | None = None,
) -> Selection:
    """The mask of all languages, from firing rates in float64.

    Args:
        over_zero: for each language the tokens [L, I] that each neuron is active on.
        n: for each language its tokens; they may differ, also from neuron to neuron ([L, I], of experts). Where there
            are none, the rate is zero.
        rate: the share of all neurons that is selected.
        filter_rate: a neuron must be above this quantile of all rates in some language to be a candidate.
        bar_rate: a selected neuron belongs to the languages above this quantile; None: the same.
        exists: bool [L, I], the neurons that there are; default: all. What is not there has no rate and no share.
    """
    p = np.stack(
        [counts.astype(np.float64) / np.maximum(tokens, 1) for counts, tokens in zip(over_zero, n, strict=True)],
        axis=-1,
    )
    known = p if exists is None else p[exists]
    filter_bar = kth_smallest(known, filter_rate, "--filter-rate")
    bar = filter_bar if bar_rate is None else kth_smallest(known, bar_rate, "--bar-rate")
    highest = p.max(-1)
    # A neuron that never fires has no distribution; it is out even where the bar is below zero's rank.
    candidates = np.flatnonzero((highest > filter_bar) & (highest > 0))
    size = known.size // len(langs)
    wanted = share(rate, size)
    if not wanted:
        least = math.ceil(Fraction(10 ** (digits := len(str(size)) + 1), size)) / 10**digits
        raise InputError(
            f"--rate {rate} of {size} neurons is less than one; give --rate {least} or more (study key lsn.rate)"
        )
    entropies = entropy(p).ravel()
    # A stable sort of positions in order of (layer, neuron): ties go to the lower.
    order = np.argsort(np.round(entropies[candidates], TIE), kind="stable")[:wanted]
    chosen = np.sort(candidates[order])
    selected = np.stack(np.unravel_index(chosen, highest.shape), axis=-1)
    above = p.reshape(-1, len(langs))[chosen] > bar
    return Selection(
        mask={lang: by_layer(selected[above[:, g]], len(highest)) for g, lang in enumerate(langs)},
        filter_bar=filter_bar,
        bar=bar,
        n_candidates=len(candidates),
        n_wanted=wanted,
        selected=selected,
        entropy_cut=float(entropies[candidates[order[-1]]]) if len(order) else None,
    )


def of_counts(counts: list[Counts], **rates) -> Selection:
    """`select` on the whole counts."""
    over_zero, tokens = [one.over_zero for one in counts], [one.tokens() for one in counts]
    return select(over_zero, tokens, [one.lang for one in counts], exists=counts[0].exists, **rates)


def by_layer(pairs: np.ndarray, n_layers: int) -> Layers:
    """Sorted (layer, neuron) pairs [n, 2] as {layer: [neurons]} with every layer."""
    return {layer: pairs[pairs[:, 0] == layer, 1].tolist() for layer in range(n_layers)}


def richest(layers: Layers, n: int) -> list[int]:
    """The `n` layers with most neurons, in layer order; of equals the lower layers."""
    return sorted(sorted(layers, key=lambda layer: (-len(layers[layer]), layer))[:n])


# ---------------------------------------------------------------- the mask and what goes with it


def identify(counts: list[Counts], outputs: dict[str, tuple], passed: dict | None) -> None:
    """Find the mask, and write it and what goes with it.

    Args:
        outputs: path, schema and facts of "mask" and "report", and of "control" and "layers" where they are wanted.
        passed: the gate of the interface layers, for the file of as many layers.
    """
    reporting.warn_about_tokens(counts)
    paths = {what: path for what, (path, _, _) in outputs.items()}
    facts = outputs["report"][2]
    found = of_counts(counts, **facts["rates"])
    report = reporting.describe(found, counts, richest)
    report |= {"rates": facts["rates"], "convergence": reporting.convergence(counts, found, select, **facts["rates"])}
    if "control" in outputs:
        widths = facts["ffn_width"] if counts[0].width is None else counts[0].width.tolist()
        control = masks.random_control(found.mask, facts["n_layers"], widths, facts["seed"])
    reporting.draw(paths["report"].with_suffix(""), report)
    results.write_json(paths["report"], report, results.header(REPORT, **facts))
    if "layers" in outputs:
        wanted = outputs["layers"][2]
        lang, n = wanted["language"], wanted["n_layers_listed"]
        rich, sizes = richest(found.mask[lang], n), report["languages"][lang]["counts"]
        content = {"layers": rich, "language": lang, "counts": sizes}
        results.write_list(paths["layers"], "layers", content, results.header(LAYERS, **wanted, gate=passed))
    if "control" in outputs:
        masks.write(paths["control"], control, **outputs["control"][2])
    masks.write(paths["mask"], found.mask, **facts)  # last: where it is, all is
    reporting.say_found(report)
    reporting.say_convergence(report["convergence"])
    if "layers" in outputs:
        cli.say(f"the {n} layers richest in neurons of {lang}: {rich}")
        bare = [layer for layer in rich if not sizes[layer]]
        if bare:
            cli.warn(f"{lang} has no neurons in layers {bare}: only {n - len(bare)} layers have any")
    figures = f"{paths['report'].with_suffix('')}-*.pdf"
    cli.say(f"wrote {', '.join(map(str, paths.values()))} and the figures {figures}")


# ---------------------------------------------------------------- files


def refuse_stale(counts: list[Counts], study: Study) -> None:
    """Refuse the study's counts where its models have been trained again since.

    Raises:
        InputError: the counts are of none of the study's models.
    """
    made_for, here = model_of(counts), [study.get("base"), study.get("run")]
    if made_for is None or not all(isinstance(spec, str) and Path(spec).is_dir() for spec in here):
        return
    if not relatives.belongs(made_for, [ref.describe() for ref in [refs.model(here[0]), *refs.run(here[1])]]):
        raise InputError(
            f"{counts[0].path.parent} holds counts of {made_for['spec']}, which is neither the base nor a checkpoint "
            "of the study's run, or was trained again since; run lsn/activation.py again with --overwrite"
        )


def model_of(counts: list[Counts]) -> dict | None:
    """The model that was counted, where a file says so."""
    return next((one.header["models"]["model"] for one in counts if one.header.get("models")), None)


def n_interface(study: Study, n_layers: int, model: dict | None) -> int:
    """How many interface layers the study's split has; it must be about the model that was counted."""
    path = study.input(None, "--n-layers", "layers")
    payload, header = results.read_json(path, "layer-specialize", n_layers=n_layers)
    made_for = (header.get("models") or {}).get("model")
    if model and made_for and not relatives.belongs(made_for, [model]):
        raise InputError(
            f"{path} was made for {made_for.get('spec')}, but the counts are of {model.get('spec')}; run "
            "layer-specialize/layer_specialize.py on this run, or give --n-layers"
        )
    layers = payload.get("interface_layers") if isinstance(payload, dict) else None
    if not isinstance(layers, list) or not layers:
        raise InputError(f"{path} has no interface layers; give --n-layers, or the study key lsn.layers")
    return len(layers)


def finished(path: Path, schema: str, facts: dict, overwrite: bool) -> bool:
    """Whether `path` is a finished result whose header says `facts`; see `results.finished`."""

    def asked(head: dict) -> dict:
        return {fact: head.get(fact) for fact in facts}

    return results.finished(path, schema, facts, "another -o", overwrite, asked)


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("-t", "--tag", metavar="TAG", help="counts TAG.<lang>.pt are read; default: the study's name")
    text = "two languages or more; default: the study's languages.lsn"
    add("-l", "--lang", "--langs", metavar="en,ga,..", help=text)
    add(
        "-o",
        "--output",
        "--outdir",
        metavar="OUT",
        help="folder to write to; default: the study's lsn/result, else result",
    )
    text = f"folder of the counts; default: the study's lsn/activation_count, else {BY_HAND}"
    add("-a", "--activation", metavar="FOLDER", help=text)
    text = "share of all neurons to select; default: the study's lsn.rate, else 0.01"
    add("--rate", type=float, metavar="R", help=text)
    text = "quantile of all rates that a neuron must exceed in some language to be a candidate; default 0.95"
    add("--filter-rate", type=float, default=0.95, metavar="R", help=text)
    text = "quantile that its rate in a language must exceed to belong to it; default: that of --filter-rate"
    add("--bar-rate", type=float, metavar="R", help=text)
    add("--control-mask-out", metavar="F", help="random control mask; default in a study: TAG.control.json")
    add("--layers-out", metavar="F", help="layers richest in neurons; default in a study: TAG.layers.json")
    add("--layers-lang", metavar="LANG", help="language of --layers-out; default: the study's languages.target")
    text = "layers of --layers-out; default: the study's lsn.layers, else as many as it has interface layers"
    add("--n-layers", type=cli.positive, metavar="N", help=text)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    langs = languages.several(study.value(args.lang, "-l", "languages.lsn"), "-l")
    tag = args.tag or (study.name if study else study.value(None, "-t", "name"))
    rates = wanted_rates(study.value(args.rate, "--rate", "lsn.rate", 0.01), args.filter_rate, args.bar_rate)
    folder = counts_folder(args, study, tag)
    files = activations.files(folder, tag)
    refuse_one(langs, list(files), folder, tag, f" -a {folder}" if args.activation else "")
    named = [languages.find(files, lang, what=f"{folder}/{tag}.<lang>.pt") for lang in langs]
    counts = [activations.read(files[name], lang) for name, lang in zip(named, langs, strict=True)]
    activations.refuse_mixed(counts)
    if study and not args.activation:
        refuse_stale(counts, study)
    called = dotted(tag, other_than(study, counts) if study and tag == study.name and not args.output else "")
    mask_path, control_path, layers_path = output_paths(study, called, args)
    n_layers, ffn_width = counts[0].over_zero.shape
    layers_lang, n_rich = wanted_layers(study, args, langs, layers_path, n_layers, model_of(counts))
    as_interface = layers_path and study.value(args.n_layers, "--n-layers", "lsn.layers", None) is None
    passed = gate.carried(study.result("layers")) if as_interface else None

    facts = {
        "models": {"model": model_of(counts)},
        "n_layers": n_layers,
        "ffn_width": ffn_width,
        "languages": {lang: languages.canonical(lang, any_tag=True) for lang in langs},
        "tokens": {one.lang: token_facts(one) for one in counts},
        "rates": rates,
        "seed": study.seed,
    }
    outputs = {
        "mask": (mask_path, masks.SCHEMA, facts | {"control": False}),
        "report": (mask_path.with_suffix(".report.json"), REPORT, facts),
    }
    if control_path:
        outputs["control"] = control_path, masks.SCHEMA, facts | {"control": True}
    if layers_path:
        outputs["layers"] = layers_path, LAYERS, facts | {"language": layers_lang, "n_layers_listed": n_rich}
    if len({path for path, _, _ in outputs.values()}) < len(outputs):
        raise InputError("two results would go to the same file; give --control-mask-out and --layers-out other names")
    # All are looked at, so that a stranger is refused even where another one is missing.
    states = [finished(*wanted, args.overwrite) for wanted in outputs.values()]
    if all(states):
        cli.say(f"{', '.join(str(path) for path, _, _ in outputs.values())}: finished (--overwrite redoes them)")
        return
    identify(counts, outputs, passed)


def counts_folder(args, study: Study, tag: str) -> Path:
    """Where the counts are: -a, else the study's folder, else where the published README has them written."""
    by_hand, in_study = Path(BY_HAND), study.result("lsn_counts")
    if study and not args.activation and has_counts(by_hand, tag) and not has_counts(in_study, tag):
        cli.say(f"{in_study} has no counts {tag}.<lang>.pt; using those in {by_hand}")
        return by_hand
    return study.input(args.activation or (None if study else by_hand), "-a", "lsn_counts")


def has_counts(folder: Path, tag: str) -> bool:
    return folder.is_dir() and bool(activations.tags(folder).get(tag))


def refuse_one(langs: list[str], counted: list[str], folder: Path, tag: str, flags: str) -> None:
    """Refuse a single language, with the command that works; `flags` are its others."""
    if len(langs) > 1:
        return
    known = languages.find(counted, langs[0], default=langs[0])
    every = [known, *(lang for lang in counted if lang != known)]
    do = f"{folder} has counts of {counted[0]} only: run lsn/activation.py on token ids of another language first"
    if len(every) > 1:
        do = f"give all that were counted: python lsn/identify.py -t {tag} -l {','.join(every)}{flags}"
    raise InputError(f"-l {langs[0]}: neurons of one language stand out only against other languages; {do}")


def other_than(study: Study, counts: list[Counts]) -> str:
    """What tells counts from those of the study, of its last checkpoint and all its languages; mostly nothing."""
    words, made_for = [], model_of(counts)
    with contextlib.suppress(InputError):  # results may outlive their models
        last = refs.run(study.value(None, "-t", "run"))[-1]
        if made_for and not relatives.same_model(made_for, last.describe()):
            words.append(made_for["model_id"])
    wanted, have = (
        {languages.canonical(str(lang), any_tag=True) for lang in every}
        for every in (study.get("languages.lsn", []), [one.lang for one in counts])
    )
    if wanted and wanted != have:
        words.append("-".join(one.lang for one in counts))
    return dotted(*words)


def wanted_rates(rate, filter_rate: float, bar_rate: float | None) -> dict[str, float]:
    """The three rates as LAPE takes them; the first may come from a study, which can hold anything."""
    rates = {"rate": rate, "filter_rate": filter_rate, "bar_rate": filter_rate if bar_rate is None else bar_rate}
    for name, value in rates.items():
        if type(value) not in (int, float) or not 0 < value <= 1:
            where = "--rate (study key lsn.rate)" if name == "rate" else f"--{name.replace('_', '-')}"
            raise InputError(f"{where} is {value!r}; give a share above 0 and at most 1")
    return {name: float(value) for name, value in rates.items()}


def output_paths(study: Study, tag: str, args) -> tuple[Path, Path | None, Path | None]:
    """Where mask, control mask and layers go; outside a study the last two are written on request only."""
    out = Path(args.output or "result") if args.output or not study else study.result("lsn_mask").parent

    def path(given: str | None, name: str) -> Path | None:
        return Path(given) if given else out / f"{tag}.{name}.json" if study else None

    return out / f"{tag}.json", path(args.control_mask_out, "control"), path(args.layers_out, "layers")


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


if __name__ == "__main__":
    cli.run(main)
