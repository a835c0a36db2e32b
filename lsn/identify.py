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
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_utils.base import cli, languages, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study, dotted
from cpt_utils.checkpoints import refs
from cpt_utils.measures import counts as activations
from cpt_utils.measures import gate, lape, masks

if TYPE_CHECKING:
    from cpt_utils.measures.counts import Counts

drawn = cli.sibling("lsn/identify_figures.py")
draw = drawn.draw

REPEATED = 0.2  # of the text: from here on its parts tell little about each other
LAYERS, REPORT = "lsn-layers", "lsn-report"
FEW_TOKENS = 10_000
BY_HAND = "activation_count"  # where the published README has activation.py write, and identify.py read
UNEVEN = 3  # times more tokens in one language than in another


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
    before = {fact: header.get(fact) for fact in facts} if header else {}
    if not results.same(before, facts):
        raise InputError(
            f"{path} is of another request ({results.unlike(before, facts)}); give --overwrite to replace it, or "
            "another -o"
        )
    return True


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)

    def add(*names, **how):
        p.add_argument(*names, **how)

    add("-t", "--tag", metavar="TAG", help="counts TAG.<lang>.pt are read; default: the study's name")
    langs = "two languages or more; default: the study's languages.lsn"
    add("-l", "--lang", "--langs", metavar="en,ga,..", help=langs)
    out = "folder to write to; default: the study's lsn/result, else result"
    add("-o", "--output", "--outdir", metavar="OUT", help=out)
    add(
        "-a",
        "--activation",
        metavar="FOLDER",
        help=f"folder of the counts; default: the study's lsn/activation_count, else {BY_HAND}",
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
    langs = wanted_languages(study.value(args.lang, "-l", "languages.lsn"))
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
    mask_path, control_path, layers_path = places(study, called, args)
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
    outputs = {mask_path: (masks.SCHEMA, facts | {"control": False})}
    outputs[mask_path.with_suffix(".report.json")] = REPORT, facts
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
    identify(counts, outputs, mask_path, control_path, layers_path, passed)


def identify(
    counts: list[Counts], outputs: dict, mask_path: Path, control_path: Path | None, layers_path: Path | None,
    passed: dict | None,
) -> None:  # fmt: skip
    """Find the mask, and write it and what goes with it.

    Args:
        outputs: schema and facts of each file.
        passed: the gate of the interface layers, for the file of as many layers.
    """
    warn_about_tokens(counts)
    facts, report_path = outputs[mask_path][1], mask_path.with_suffix(".report.json")
    found = lape.of_counts(counts, **facts["rates"])
    if control_path:
        widths = facts["ffn_width"] if counts[0].width is None else counts[0].width.tolist()
        control = masks.random_control(found.mask, facts["n_layers"], widths, facts["seed"])
    report = lape.describe(found, counts)
    report |= {"rates": facts["rates"], "convergence": lape.convergence(counts, found, **facts["rates"])}
    draw(report_path.with_suffix(""), report)
    results.write_json(report_path, report, results.header(REPORT, **outputs[report_path][1]))
    if layers_path:
        lang, n = (outputs[layers_path][1][fact] for fact in ("language", "n_layers_listed"))
        layers = {"layers": lape.richest(found.mask[lang], n), "language": lang}
        layers["counts"] = report["languages"][lang]["counts"]
        head = results.header(LAYERS, **outputs[layers_path][1], gate=passed)
        results.write_list(layers_path, "layers", layers, head)
    if control_path:
        masks.write(control_path, control, **outputs[control_path][1])
    masks.write(mask_path, found.mask, **facts)  # last: where it is, all is
    say_found(report)
    say_convergence(report["convergence"])
    if layers_path:
        cli.say(f"the {n} layers richest in neurons of {lang}: {layers['layers']}")
        bare = [layer for layer in layers["layers"] if not layers["counts"][layer]]
        if bare:
            cli.warn(f"{lang} has no neurons in layers {bare}: only {n - len(bare)} layers have any")
    cli.say(f"wrote {', '.join(map(str, outputs))} and the figures {report_path.with_suffix('')}-*.pdf")


def counts_folder(args, study: Study, tag: str) -> Path:
    """Where the counts are: -a, else the study's place, else where the published README has them written."""
    by_hand, own = Path(BY_HAND), study.result("lsn_counts")
    if study and not args.activation and has_counts(by_hand, tag) and not has_counts(own, tag):
        cli.say(f"{own} has no counts {tag}.<lang>.pt; using those in {by_hand}")
        return by_hand
    return study.input(args.activation or (None if study else by_hand), "-a", "lsn_counts", "lsn/activation.py")


def has_counts(folder: Path, tag: str) -> bool:
    return folder.is_dir() and bool(activations.tags(folder).get(tag))


def refuse_one(langs: list[str], counted: list[str], folder: Path, tag: str, flags: str) -> None:
    """Refuse a single language, with the command that works; `flags` are its others."""
    if len(langs) > 1:
        return
    known = languages.find(counted, langs[0], default=langs[0])
    every = [known, *(lang for lang in counted if lang != known)]
    if len(every) > 1:
        do = f"give all that were counted: python lsn/identify.py -t {tag} -l {','.join(every)}{flags}"
    else:
        do = f"{folder} has counts of {counted[0]} only: run lsn/activation.py on token ids of another language first"
    raise InputError(f"-l {langs[0]}: neurons of one language stand out against other languages only; {do}")


def other_than(study: Study, counts: list[Counts]) -> str:
    """What tells counts from the study's own, of its last checkpoint and all its languages; mostly nothing."""
    words, made_for = [], model_of(counts)
    with contextlib.suppress(InputError):  # results may outlive their models
        last = refs.run(study.value(None, "-t", "run"))[-1]
        if made_for and not refs.same_model(made_for, last.describe()):
            words.append(made_for["model_id"])
    wanted, have = (
        {languages.canonical(str(lang), any_tag=True) for lang in every}
        for every in (study.get("languages.lsn", []), [one.lang for one in counts])
    )
    if wanted and wanted != have:
        words.append("-".join(one.lang for one in counts))
    return dotted(*words)


def wanted_languages(given: str | list[str]) -> list[str]:
    """The languages of -l or of the study, as they were written.

    Raises:
        InputError: none, or one in two spellings.
    """
    parts = given.replace(" ", ",").split(",") if isinstance(given, str) else given
    langs = [str(part).strip() for part in parts if str(part).strip()]
    for i, lang in enumerate(langs):
        twice = next((other for other in langs[:i] if languages.same(other, lang)), None)
        if twice is not None:
            raise InputError(f"languages: {twice} and {lang} are one language; name each once")
    if not langs:
        raise InputError("-l (study key languages.lsn) names no language; name two or more")
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
        if one.routed is not None:
            got = one.routed[one.routed.any(-1)]
            few = int((got < FEW_TOKENS).sum())
            if few:
                cli.warn(
                    f"{few} of {got.size} experts got fewer than {FEW_TOKENS:,} tokens of {one.lang} (the least "
                    f"{got.min():,}): of their neurons chance decides part of the mask"
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
        cli.say(f"{drawn.shown_share(point['share'])} of the tokens: Jaccard with the full mask {_lowest(point)}")
    cli.say(f"first part of the tokens against the rest: Jaccard {_lowest(found['halves'])}")
    twice = {lang: share for lang, share in found["repeated"].items() if share is not None and share > REPEATED}
    if twice:
        shares = ", ".join(f"{share:.0%} of {lang}" for lang, share in twice.items())
        cli.warn(
            f"text stands in the tokens more than once ({shares} by runs of 10 tokens): its parts agree because they "
            "are the same text, and the number of tokens says more than there is"
        )
        return
    enough = found["enough"]
    if enough:
        share, most = drawn.shown_share(enough["share"]), max(enough["tokens"].values())
        cli.say(
            f"fewer tokens would have been enough: {share} of them (up to {most:,} a language) give this mask to a "
            f"Jaccard of {found['enough_at']} or better"
        )
    else:
        cli.say(
            f"parts of the tokens do not give this mask to a Jaccard of {found['enough_at']}: more would still move it"
        )


def _lowest(found: dict) -> str:
    by_language = {lang: value for lang, value in found["languages"].items() if value is not None}
    if not by_language:
        return "undefined (no neurons)"
    lang = min(by_language, key=by_language.get)
    return f"{found['jaccard']:.3f} (lowest: {lang} {by_language[lang]:.3f})"


if __name__ == "__main__":
    cli.run(main)
