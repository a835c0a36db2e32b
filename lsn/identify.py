"""Which FFN neurons belong to which language (step 8): LAPE, or what another method finds.

    --method lape       low entropy of the firing rates over languages (Tang et al., 2024), in lape.py
    --method ternary    entropy, less a share of the highest rate; specific, related, general (Zhang et al., 2026), in
                        ternary.py; three languages or more
    --method ap         how well its mean activation tells texts of the language from others (Kojima et al., 2024), in
                        average_precision.py
    --method gradient   how far it pushes the next token of the language's text (CULNIG, 2026), in gradient_score.py

In:   FOLDER/TAG.<lang>.pt for two or more languages, the counts of lsn/activation.py (or of the published scripts, or
      LAPE's own activation.<lang>.train.TAG). For ap and gradient also what lsn/text_scores.py measured (--scores).
Out:  OUT/TAG.json, the mask {lang: {layer: [neurons]}}, every language and layer present; OUT/TAG.report.json with counts
      per layer, overlap between languages and how stable the mask is over tokens, and its figures (PDF, PNG);
      a random control mask of the same size, and the layers richest in one language's neurons (a bare list, with its
      facts beside it in <the same name>.facts.json). Of other methods than LAPE TAG.<method>.json and so on.

Full: python lsn/identify.py -t llama-2-7b-eus -l en,eu -a activation_count -o result --control-mask-out result/control.json
Tiny: python lsn/identify.py --study demo/tiny.yaml
"""  # noqa: E501

from __future__ import annotations

from cpt_utils.base import cli, languages, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study, dotted
from cpt_utils.measures import gate, masks
from cpt_utils.measures.counts import Counts
from cpt_utils.measures.masks import Layers

lape = cli.sibling("lsn/lape.py")
ternary = cli.sibling("lsn/ternary.py")
average_precision = cli.sibling("lsn/average_precision.py")
gradient_score = cli.sibling("lsn/gradient_score.py")
files = cli.sibling("lsn/identify_files.py")
reporting = cli.sibling("lsn/identify_report.py")

RESULTS = {
    "lsn_mask": "lsn/result/{name}.json",
    "lsn_control": "lsn/result/{name}.control.json",
    "lsn_layers": "lsn/result/{name}.layers.json",
}
ASKED = {"lsn_mask": "Which neurons fire for one language and hardly for the others, and in which layers do they lie?"}
CAPTIONS = {
    "lsn_counts": """Part II: 2. Language-specific neurons
        How many neurons of each language there are in each layer (LAPE). Counts decide no claim: compare the layers
        that have most of the new language's neurons with the interface layers. How stable they are with fewer tokens
        stands in the next figure.""",
    "lsn_convergence": """Part II: 2. Language-specific neurons
        How much of the mask a part of the tokens already gives (Jaccard with the full mask), and the agreement of two
        parts without a common token. Where the curve is flat near one, fewer tokens would have been enough.""",
}
IMAGES = {"lsn_counts": "{name}.report-counts.png", "lsn_convergence": "{name}.report-convergence.png"}

LAYERS, REPORT = "lsn-layers", "lsn-report"
# Page, the rates it takes beside --rate with their defaults (None: that of the one before), what it needs of texts.
METHODS = {
    masks.LAPE: (lape, {"filter_rate": 0.95, "bar_rate": None}, ""),
    "ternary": (ternary, {"bar_rate": 0.95}, ""),
    "ap": (average_precision, {}, "means"),
    "gradient": (gradient_score, {}, "gradients"),
}


# ---------------------------------------------------------------- the mask and what goes with it


def richest(layers: Layers, n: int) -> list[int]:
    """The `n` layers with most neurons, in layer order; of equals the lower layers."""
    return sorted(sorted(layers, key=lambda layer: (-len(layers[layer]), layer))[:n])


def identify(counts: list[Counts], scores: list[dict], outputs: dict[str, tuple], passed: dict | None) -> None:
    """Find the mask, and write it and what goes with it.

    Args:
        scores: what was measured on texts of each language, for the methods that need it; else empty.
        outputs: path, schema and facts of "mask" and "report", and of "control" and "layers" where they are wanted.
        passed: the gate of the interface layers, for the file of as many layers.
    """
    reporting.warn_about_tokens(counts)
    paths = {what: path for what, (path, _, _) in outputs.items()}
    facts = outputs["report"][2]
    page = METHODS[facts.get("method", masks.LAPE)][0]
    more = ({"scores": scores} if scores else {}) | {key: facts[key] for key in ("controls",) if key in facts}
    found, convergence = page.find(counts, **more, **facts["rates"])
    report = reporting.describe(found, counts, richest)
    report |= {"rates": facts["rates"], "convergence": convergence}
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
    reporting.say_found(report, page.words(found.numbers))
    reporting.say_convergence(report["convergence"])
    if "layers" in outputs:
        cli.say(f"the {n} layers richest in neurons of {lang}: {rich}")
        bare = [layer for layer in rich if not sizes[layer]]
        if bare:
            cli.warn(f"{lang} has no neurons in layers {bare}: only {n - len(bare)} layers have any")
    figures = f"{paths['report'].with_suffix('')}-*.pdf"
    cli.say(f"wrote {', '.join(map(str, paths.values()))} and the figures {figures}")


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    text = f"{', '.join(METHODS)}; default {masks.LAPE}"
    add("--method", choices=METHODS, default=masks.LAPE, metavar="M", help=text)
    add("-t", "--tag", metavar="TAG", help="counts TAG.<lang>.pt are read; default: the study's name")
    text = "two languages or more; default: the study's languages.lsn"
    add("-l", "--lang", "--langs", metavar="en,ga,..", help=text)
    text = "folder to write to; default: the study's lsn/result, else result"
    add("-o", "--output", "--outdir", metavar="OUT", help=text)
    text = f"folder of the counts; default: the study's lsn/activation_count, else {files.BY_HAND}"
    add("-a", "--activation", metavar="FOLDER", help=text)
    text = "what lsn/text_scores.py measured, for ap and gradient; default: the study's lsn/text_scores"
    add("--scores", metavar="FOLDER", help=text)
    text = "gradient: language whose score is subtracted, from its own the target's; default: the study's "
    text += "languages.base"
    add("--control-lang", metavar="LANG", help=text)
    text = "share of all neurons to select; default: the study's lsn.rate, else 0.01"
    add("--rate", type=float, metavar="R", help=text)
    text = "lape: quantile of all rates that a neuron must exceed in some language to be a candidate; default 0.95"
    add("--filter-rate", type=float, metavar="R", help=text)
    text = "quantile that its rate in a language must exceed to belong to it; default: that of --filter-rate, else 0.95"
    add("--bar-rate", type=float, metavar="R", help=text)
    add("--control-mask-out", metavar="F", help="random control mask; default in a study: TAG.control.json")
    add("--layers-out", metavar="F", help="layers richest in neurons; default in a study, of LAPE: TAG.layers.json")
    add("--layers-lang", metavar="LANG", help="language of --layers-out; default: the study's languages.target")
    text = "layers of --layers-out; default: the study's lsn.layers, else as many as it has interface layers"
    add("--n-layers", type=cli.positive, metavar="N", help=text)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    langs = languages.several(study.value(args.lang, "-l", "languages.lsn"), "-l")
    tag = args.tag or (study.name if study else study.value(None, "-t", "name"))
    rates = files.wanted_rates(args, study, METHODS[args.method][1])
    counts, what = files.read_counts(args, study, langs, tag), METHODS[args.method][2]
    scores = files.read_scores(args, study, counts, tag, what) if what else []
    outputs, passed = wanted_outputs(args, study, counts, scores, tag, rates)
    # All are looked at, so that a stranger is refused even where another one is missing.
    states = [files.finished(*wanted, args.overwrite) for wanted in outputs.values()]
    if all(states):
        cli.say(f"{', '.join(str(path) for path, _, _ in outputs.values())}: finished (--overwrite redoes them)")
        return
    identify(counts, scores, outputs, passed)


def wanted_outputs(
    args, study: Study, counts: list[Counts], scores: list[dict], tag: str, rates: dict
) -> tuple[dict, dict | None]:
    """What `identify` is to write: `outputs` and `passed`."""
    langs, (n_layers, ffn_width) = [one.lang for one in counts], counts[0].over_zero.shape
    model, is_lape = files.model_of(counts), args.method == masks.LAPE
    of_texts = {one.lang: files.score_facts(row) for one, row in zip(counts, scores, strict=bool(scores))}
    other = files.other_than(study, counts) if study and tag == study.name and not args.output else ""
    called = dotted(tag, other, "" if is_lape else args.method)
    mask_path, control_path, layers_path = files.output_paths(study, called, args, is_lape)
    layers_lang, n_rich = files.wanted_layers(study, args, langs, layers_path, n_layers, model)
    as_interface = layers_path and study.value(args.n_layers, "--n-layers", "lsn.layers", None) is None
    passed = gate.carried(study.result("layers")) if as_interface else None
    facts = {
        "models": {"model": model},
        "n_layers": n_layers,
        "ffn_width": ffn_width,
        "languages": {lang: languages.canonical(lang, any_tag=True) for lang in langs},
        "tokens": {one.lang: files.token_facts(one) for one in counts},
        **({} if is_lape else {"method": args.method}),
        **({"scores": of_texts} if scores else {}),
        **({"controls": files.wanted_controls(args, study, langs)} if args.method == "gradient" else {}),
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
    return outputs, passed


if __name__ == "__main__":
    cli.run(main)
