"""Selects the FFN neurons that belong to each language, by LAPE or another method (step 8).

    --method lape       low entropy of the firing rates over languages (Tang et al., 2024), in lape.py
    --method ternary    entropy minus a share of the highest rate; neurons are specific, related or general (Zhang et
                        al., 2026), in ternary.py; three languages or more
    --method ap         how well a neuron's mean activation separates texts of the language from others (Kojima et al.,
                        2024), in average_precision.py
    --method gradient   how far it pushes the next token of the language's text (CULNIG, 2026), in gradient_score.py

In:   FOLDER/TAG.<lang>.pt for two or more languages, the counts of lsn/activation.py (or of the published scripts, or
      LAPE's own activation.<lang>.train.TAG). For ap and gradient also the scores of lsn/text_scores.py (--scores).
Out:  OUT/TAG.json, the mask {lang: {layer: [neurons]}} of all languages and layers; OUT/TAG.report.json, with counts
      per layer, overlap between languages and how stable the mask is over tokens, and its figures (PDF, PNG); a random
      control mask of the same size; and the layers richest in one language's neurons (a bare list, with its facts in
      <the same name>.facts.json). Methods other than LAPE write TAG.<method>.json and so on.

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
ASKED = {"lsn_mask": "Which neurons fire for one language and rarely for the others, and in which layers are they?"}
CAPTIONS = {
    "lsn_counts": """Part II: 2. Language-specific neurons
        The number of neurons of each language in each layer (LAPE). No claim rests on these counts: compare the layers
        that have most of the new language's neurons with the interface layers. The next figure shows how stable the
        neurons are with fewer tokens.""",
    "lsn_convergence": """Part II: 2. Language-specific neurons
        How much of the mask a part of the tokens already gives (Jaccard with the full mask), and how well the masks of
        two disjoint parts agree. If the curve is flat near one, fewer tokens would have been enough.""",
}
IMAGES = {"lsn_counts": "{name}.report-counts.png", "lsn_convergence": "{name}.report-convergence.png"}

LAYERS, REPORT = "lsn-layers", "lsn-report"
# Module, its rates besides --rate with their defaults (None: that of the rate before), the text scores that it needs.
METHODS = {
    masks.LAPE: (lape, {"filter_rate": 0.95, "bar_rate": None}, ""),
    "ternary": (ternary, {"bar_rate": 0.95}, ""),
    "ap": (average_precision, {}, "means"),
    "gradient": (gradient_score, {}, "gradients"),
}


# ---------------------------------------------------------------- the mask, its control, layers and report


def richest(layers: Layers, n: int) -> list[int]:
    """The `n` layers with most neurons, in layer order; ties go to the lower layer."""
    return sorted(sorted(layers, key=lambda layer: (-len(layers[layer]), layer))[:n])


def identify(counts: list[Counts], scores: list[dict], outputs: dict[str, tuple], passed: dict | None) -> None:
    """Find the mask, and write it with its report and, if wanted, its control and layers.

    Args:
        scores: the text scores of each language, for the methods that need them; else empty.
        outputs: path, schema and facts of "mask" and "report", and of "control" and "layers" if they are wanted.
        passed: the gate of the interface layers, if the layers file lists as many layers.
    """
    reporting.warn_about_tokens(counts)
    paths = {kind: path for kind, (path, _, _) in outputs.items()}
    facts = outputs["report"][2]
    method = METHODS[facts.get("method", masks.LAPE)][0]
    extra = ({"scores": scores} if scores else {}) | {key: facts[key] for key in ("controls",) if key in facts}
    selection, convergence = method.find(counts, **extra, **facts["rates"])
    report = reporting.describe(selection, counts, richest)
    report |= {"rates": facts["rates"], "convergence": convergence}
    if "control" in outputs:
        widths = facts["ffn_width"] if counts[0].width is None else counts[0].width.tolist()
        control = masks.random_control(selection.mask, facts["n_layers"], widths, facts["seed"])
    reporting.draw(paths["report"].with_suffix(""), report)
    results.write_json(paths["report"], report, results.header(REPORT, **facts))
    if "layers" in outputs:
        wanted = outputs["layers"][2]
        lang, n = wanted["language"], wanted["n_layers_listed"]
        layers, sizes = richest(selection.mask[lang], n), report["languages"][lang]["counts"]
        content = {"layers": layers, "language": lang, "counts": sizes}
        results.write_list(paths["layers"], "layers", content, results.header(LAYERS, **wanted, gate=passed))
    if "control" in outputs:
        masks.write(paths["control"], control, **outputs["control"][2])
    masks.write(paths["mask"], selection.mask, **facts)  # last: if it exists, all of them do
    reporting.say_found(report, method.words(selection.numbers))
    reporting.say_convergence(report["convergence"])
    if "layers" in outputs:
        cli.say(f"the {n} layers richest in neurons of {lang}: {layers}")
        empty = [layer for layer in layers if not sizes[layer]]
        if empty:
            cli.warn(f"{lang} has no neurons in layers {empty}: only {n - len(empty)} layers have any")
    figures = f"{paths['report'].with_suffix('')}-*.pdf"
    cli.say(f"wrote {', '.join(map(str, paths.values()))} and the figures {figures}")


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    text = f"{', '.join(METHODS)}; default {masks.LAPE}"
    add("--method", choices=METHODS, default=masks.LAPE, metavar="M", help=text)
    add("-t", "--tag", metavar="TAG", help="read the counts TAG.<lang>.pt; default: the study's name")
    text = "two languages or more; default: the study's languages.lsn"
    add("-l", "--lang", "--langs", metavar="en,ga,..", help=text)
    text = "folder to write to; default: the study's lsn/result, else result"
    add("-o", "--output", "--outdir", metavar="OUT", help=text)
    text = f"folder of the counts; default: the study's lsn/activation_count, else {files.BY_HAND}"
    add("-a", "--activation", metavar="FOLDER", help=text)
    text = "folder that lsn/text_scores.py wrote, for ap and gradient; default: the study's lsn/text_scores"
    add("--scores", metavar="FOLDER", help=text)
    text = "gradient: language whose score is subtracted (from its own score, the target's); default: the study's "
    text += "languages.base"
    add("--control-lang", metavar="LANG", help=text)
    text = "share of all neurons to select; default: the study's lsn.rate, else 0.01"
    add("--rate", type=float, metavar="R", help=text)
    text = "lape: quantile of all rates that a neuron must exceed in some language to be a candidate; default 0.95"
    add("--filter-rate", type=float, metavar="R", help=text)
    text = "quantile that a neuron's rate must exceed in the languages it belongs to; default: --filter-rate, else 0.95"
    add("--bar-rate", type=float, metavar="R", help=text)
    add("--control-mask-out", metavar="F", help="random control mask; default in a study: TAG.control.json")
    add("--layers-out", metavar="F", help="layers richest in neurons; default in a study, for LAPE: TAG.layers.json")
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
    counts, scores_needed = files.read_counts(args, study, langs, tag), METHODS[args.method][2]
    scores = files.read_scores(args, study, counts, tag, scores_needed) if scores_needed else []
    outputs, passed = wanted_outputs(args, study, counts, scores, tag, rates)
    # All are checked, so a file of another request is refused even if one is missing.
    states = [files.finished(*wanted, args.overwrite) for wanted in outputs.values()]
    if all(states):
        cli.say(f"{', '.join(str(path) for path, _, _ in outputs.values())}: finished (--overwrite redoes them)")
        return
    identify(counts, scores, outputs, passed)


def wanted_outputs(
    args, study: Study, counts: list[Counts], scores: list[dict], tag: str, rates: dict
) -> tuple[dict, dict | None]:
    """What `identify` is to write: `outputs` and `passed`."""
    langs, (n_layers, ffn_width) = [c.lang for c in counts], counts[0].over_zero.shape
    model, is_lape = files.model_of(counts), args.method == masks.LAPE
    score_facts = {c.lang: files.score_facts(row) for c, row in zip(counts, scores, strict=bool(scores))}
    variant = files.other_than(study, counts) if study and tag == study.name and not args.output else ""
    name = dotted(tag, variant, "" if is_lape else args.method)
    mask_path, control_path, layers_path = files.output_paths(study, name, args, is_lape)
    layers_lang, n_rich = files.wanted_layers(study, args, langs, layers_path, n_layers, model)
    as_interface = layers_path and study.value(args.n_layers, "--n-layers", "lsn.layers", None) is None
    passed = gate.carried(study.result("layers")) if as_interface else None
    facts = {
        "models": {"model": model},
        "n_layers": n_layers,
        "ffn_width": ffn_width,
        "languages": {lang: languages.canonical(lang, any_tag=True) for lang in langs},
        "tokens": {c.lang: files.token_facts(c) for c in counts},
        **({} if is_lape else {"method": args.method}),
        **({"scores": score_facts} if scores else {}),
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
