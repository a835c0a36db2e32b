"""Compares methods of finding language neurons: number, layers, agreement, stability, and which neurons matter.

No model is run. Compared are masks of lsn/identify.py --method M and the results of lsn/deactivate.py --method M, the
same causal test for each method, with random controls of equal size per layer and of equal activity. The winner is the
method whose neurons hurt their own language most and the others least (selectivity), among those that hurt it at all.
It is chosen on one half of the documents, and its result is reported on the other.

In:   for every method the mask, its report, and the result of lsn/deactivate.py (default: the study's, for LAPE and
      lsn.methods, else for the methods that were measured); masks of the base by the same methods, if there are any.
Out:  OUT (default: the study's lsn/methods.json), a table (.md) and a figure.

Full: python lsn/compare_methods.py --masks lape=result/llama.json ternary=result/llama.ternary.json --deactivations lape=deactivate.json ternary=deactivate.ternary.json -o methods.json
Tiny: python lsn/compare_methods.py --study demo/tiny.yaml
"""  # noqa: E501

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import cli, languages, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import refs, relatives
from cpt_utils.measures import masks
from cpt_utils.measures.masks import Layers

identify, reporting = cli.sibling("lsn/identify.py"), cli.sibling("lsn/identify_report.py")
shown = cli.sibling("lsn/methods_shown.py")

SCHEMA = "lsn-methods"
RESULTS = {"lsn_methods": "lsn/methods.json"}
ASKED = {"lsn_methods": "Do other methods find the same neurons, and which method's neurons does a language need?"}
CAPTIONS = {
    "lsn_methods": """Part II: 2. Language-specific neurons
        Language-specific neurons by method, a row for each language. Left: their number in each layer. Right: the
        change of the loss per token when they are silenced, on the language's own text (95 % intervals) and on that of
        the others (mean); and, on its own text, when as many random neurons that fire as often are silenced instead. A
        method has found neurons that matter if the first is above 0 and above the other two. The axis is linear between
        the dotted lines and logarithmic beyond.""",
}
LEVEL = 0.05  # neurons are more selective than equally active ones if p among these is at most this


# ---------------------------------------------------------------- the method


@dataclass(frozen=True)
class Method:
    """A method's mask by language, its report and its result of lsn/deactivate.py; and the base's mask and report."""

    mask: dict[str, Layers]
    report: dict
    silenced: dict
    base: dict[str, Layers] | None = None
    base_report: dict | None = None


def agreement(a: Layers, b: Layers, widths: list[int] | None) -> dict:
    """Jaccard of two sets of neurons, and `chance`, that of random sets with as many neurons in each layer.

    `chance` uses the expected overlap, sum over layers of |a| |b| / width; None without any neuron or the `widths`.
    """
    of_a, of_b = reporting.pairs(a), reporting.pairs(b)
    expected = math.fsum(len(a[layer]) * len(b[layer]) / width for layer, width in enumerate(widths or []))
    total = len(of_a) + len(of_b)
    chance = expected / (total - expected) if total and widths else None
    return {"jaccard": reporting.jaccard(of_a, of_b), "chance": chance, "shared": len(of_a & of_b)}


def others(row: dict[str, float], lang: str) -> float:
    """The mean change for the other languages, from the row of changes of `lang`."""
    return math.fsum(change for e, change in row.items() if e != lang) / (len(row) - 1)


def controls_of(silenced: dict) -> dict[str, float]:
    """By language the mean change of its own loss when as many, equally active neurons are silenced."""
    rows = silenced.get("active") or {}
    return {lang: math.fsum(row[lang] for row in sets) / len(sets) for lang, sets in rows.items()}


def best(chooses: dict[str, dict], reports: dict[str, dict]) -> dict:
    """The method whose neurons hurt their language most and the others least.

    Args:
        chooses: method -> its selectivity on the text that decides, as in the result of lsn/deactivate.py:
            `selectivity`, `ci_low`, `ci_high`, `meaningful` (the language is hurt), `n_active`, `p_value_active`.
        reports: the same on the text that the result is reported on.

    Returns:
        `method` (None if no method's neurons hurt their language); `reported` (method -> its row of `reports`); and on
        the text of `reports` `clear` (they hurt it there, too, and the interval is above those of all other methods)
        and `beyond_active` (they are more selective than neurons that fire as often; None if too few sets were drawn).
    """
    harmful = {name: row for name, row in chooses.items() if row["meaningful"]}
    if not harmful:
        return {"method": None, "clear": False, "beyond_active": None, "reported": {}}
    name = max(harmful, key=lambda method: harmful[method]["selectivity"])
    winner, rest = reports[name], [row["ci_high"] for other, row in reports.items() if other != name]
    n, p = (winner[key] for key in ("n_active", "p_value_active"))
    return {
        "method": name,
        "clear": winner["meaningful"] and all(high < winner["ci_low"] for high in rest),
        "beyond_active": p <= LEVEL if n and 1 / (1 + n) <= LEVEL else None,
        "reported": {name: winner},
    }


def chosen(silenced: dict[str, dict], halves: dict[str, dict | None], langs: list[str]) -> dict[str, dict]:
    """The `best` for each language and `overall`, from the two halves of the documents, or twice from all of them if a
    method's result has no halves."""
    parts = []
    for half in ("chooses", "reports"):
        rows = {name: both[half] for name, both in halves.items()} if all(halves.values()) else silenced
        parts.append({name: row["selectivity"] | {"overall": row["overall"]} for name, row in rows.items()})
    return {
        lang: best(*({name: row[lang] for name, row in part.items() if lang in row} for part in parts))
        for lang in (*langs, "overall")
    }


def against_base(found: Method) -> dict:
    """How the checkpoint's mask differs from the base's, by language: sizes, overlap, change by layer; for a ternary
    mask also the change in the number of selected neurons by layer and N, and of general ones by layer."""
    rows: dict[str, dict] = {}
    for lang, layers in found.mask.items():
        base_layers = found.base[languages.find(found.base, lang)]
        now, before = reporting.pairs(layers), reporting.pairs(base_layers)
        rows[lang] = {
            "base": len(before), "checkpoint": len(now), "shared": len(now & before),
            "jaccard": reporting.jaccard(now, before),
            "change": [len(layers[layer]) - len(base_layers[layer]) for layer in layers],
        }  # fmt: skip
    ternary = {}
    if {"by_n", "classes"} <= found.report.keys() and found.base_report:
        after, base = ([np.array(report["by_n"]), np.array(report["classes_by_layer"]["general"])]
                       for report in (found.report, found.base_report))  # fmt: skip
        ternary = {"change_by_n": (after[0] - base[0]).tolist(), "change_of_general": (after[1] - base[1]).tolist()}
        ternary |= {"classes_base": found.base_report["classes"]}
    return {"languages": rows, **ternary}


def compare(found: dict[str, Method], langs: list[str], widths: list[int] | None) -> dict:
    """The whole result. `widths`: the neurons of each layer; None: not known, and no chance level."""
    silenced = {name: method.silenced for name, method in found.items()}
    pairs = list(itertools.combinations(found, 2))
    agreed = {
        lang: {f"{a} and {b}": agreement(found[a].mask[lang], found[b].mask[lang], widths) for a, b in pairs}
        for lang in langs
    }
    counts = {
        name: {lang: [len(row) for row in method.mask[lang].values()] for lang in langs}
        for name, method in found.items()
    }
    halves = {name: result.get("halves") for name, result in silenced.items()}
    stable = {name: (method.report.get("convergence") or {}).get("halves") for name, method in found.items()}
    return {
        "languages": langs,
        "methods": list(found),
        "neurons": {name: {lang: sum(row) for lang, row in rows.items()} for name, rows in counts.items()},
        "by_layer": counts,
        "classes": {name: method.report["classes"] for name, method in found.items() if "classes" in method.report},
        "agreement": agreed,
        "stability": {name: halves and halves["languages"] for name, halves in stable.items()},
        "diagonal": {name: result["diagonal"] for name, result in silenced.items()},
        "others": {
            name: {e: others(row, e) for e, row in result["matrix"].items()} for name, result in silenced.items()
        },
        "controls": {name: controls_of(result) for name, result in silenced.items()},
        "selectivity": {name: result["selectivity"] for name, result in silenced.items()},
        "overall": {name: result["overall"] for name, result in silenced.items()},
        "activity": {name: result.get("activity") for name, result in silenced.items()},
        "halves": halves if all(halves.values()) else None,
        "best": chosen(silenced, halves, langs),
        "base": {name: against_base(method) for name, method in found.items() if method.base},
    }


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    text = "masks by method (lsn/identify.py); default: the study's, for lape and lsn.methods, else for those measured"
    add("--masks", nargs="+", metavar="METHOD=FILE", help=text)
    text = "the result of lsn/deactivate.py on each of them; default: the study's"
    add("--deactivations", nargs="+", metavar="METHOD=FILE", help=text)
    text = "masks of the base by the same methods; default: those of the study's base, if there are any"
    add("--base-masks", nargs="+", metavar="METHOD=FILE", help=text)
    add("-o", "--output", metavar="OUT", help="JSON to write; default: the study's lsn/methods.json")
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    output = study.output(args.output, "-o", "lsn_methods")
    files = wanted_files(args, study)
    methods, heads = {}, {}
    for name, (mask, silenced, base) in files.items():
        methods[name], heads[name] = read(mask, silenced, base)
    langs = same_languages(files, methods, heads)
    head = next(iter(heads.values()))
    request = {
        name: {str(path): results.file_sha256(path) for path in paths if path is not None}
        for name, paths in files.items()
    }
    if results.finished(output, SCHEMA, request, "another -o", args.overwrite):
        cli.say(f"{output} is finished (--overwrite redoes it)")
        return
    n_layers, width = head["n_layers"], head["ffn_width"]
    same_width = next(iter(methods.values())).report["n_neurons"] == n_layers * width
    payload = compare(methods, langs, [width] * n_layers if same_width else None)
    if whole_text := [str(files[name][1]) for name, method in methods.items() if not method.silenced.get("halves")]:
        cli.warn(
            f"{' and '.join(whole_text)}: no halves of the documents (a single one, or an earlier result: run "
            "lsn/deactivate.py --overwrite); the winner is chosen on the text that it is reported on, which flatters it"
        )
    shown.draw(output.with_suffix(""), payload)
    results.write_text(output.with_suffix(".md"), shown.table(payload))
    facts = {"models": head["models"], "n_layers": n_layers, "ffn_width": width, "languages": head["languages"]}
    results.write_json(output, payload, results.header(SCHEMA, **facts, request=request))
    shown.say(payload)
    cli.say(f"wrote {output}, the table {output.with_suffix('.md')} and the figure {output.with_suffix('.pdf')}")


def wanted_files(args, study: Study) -> dict[str, tuple[Path, Path, Path | None]]:
    """method -> its mask, its result of lsn/deactivate.py, and the base's mask or None; for two methods or more."""
    given = {flag: named(getattr(args, flag), flag) for flag in ("masks", "deactivations", "base_masks")}
    names = list(given["masks"]) or ([masks.LAPE, *(study.get("lsn.methods") or measured(study))] if study else [])
    if len(names) < 2:
        raise InputError(
            "one method has no other to be compared with: give --masks, or run lsn/identify.py and lsn/deactivate.py "
            "with --method ternary, too"
        )
    found = {}
    for name in names:
        mask, silenced = (
            study.input(
                given[flag].get(name) or masks.of_method(study.result(step), name), f"--{flag}", step, masks.how(name)
            )
            for flag, step in (("masks", "lsn_mask"), ("deactivations", "deactivation"))
        )
        base = given["base_masks"].get(name)
        if base is None and study and not args.masks:
            base = mask.with_name(
                f"{study.name}.{refs.model(study.value(None, '--base', 'base')).model_id}.{name}.json"
            )
            base = base if base.is_file() else None
            if base:
                refuse_old(base, study)
        found[name] = mask, silenced, base and Path(base)
    return found


def measured(study: Study) -> list[str]:
    """The methods other than LAPE with a result of lsn/deactivate.py in the study."""
    methods = [method for method in identify.METHODS if method != masks.LAPE]
    return [method for method in methods if masks.of_method(study.result("deactivation"), method).is_file()]


def refuse_old(base: Path, study: Study) -> None:
    """Refuse a mask of the study's base that is not of the base as it is now."""
    made_for = (_mask(base)[1]["models"] or {}).get("model")
    if made_for and not relatives.same_model(made_for, refs.model(study.get("base")).describe()):
        raise InputError(
            f"{base} is of {made_for['spec']}, which was trained again since or is not the study's base; run "
            "lsn/activation.py and lsn/identify.py on the base again, with --overwrite"
        )


def named(given: list[str] | None, flag: str) -> dict[str, str]:
    """The files of --masks and similar flags, by method."""
    pairs = [item.partition("=") for item in given or []]
    for name, _, file in pairs:
        if not name or not file:
            raise InputError(
                f"--{flag.replace('_', '-')} {name}: give METHOD=FILE, as in ternary=result/llama.ternary.json"
            )
    return {name: file for name, _, file in pairs}


def read(mask: Path, silenced: Path, base: Path | None) -> tuple[Method, dict]:
    """A method's results, and the header of its mask.

    Raises:
        InputError: a file is missing, of another kind or of an earlier version; neurons other than the mask's were
            silenced; or the base's mask does not fit the model.
    """
    neurons, head = _mask(mask)
    report, _ = results.read_json(mask.with_suffix(".report.json"), "lsn-report")
    result, result_head = results.read_json(silenced, "deactivation")
    if not {"meaningful", "n_active"} <= result.get("overall", {}).keys():
        raise InputError(
            f"{silenced} does not say whether a language itself is hurt, or has no sets of equal activity: it was made "
            "by an earlier version; run lsn/deactivate.py again with --overwrite"
        )
    tested = (result_head.get("request") or {}).get("masks") or {}
    for lang, layers in tested.items():
        if {int(layer): row for layer, row in layers.items()} != neurons[languages.find(neurons, lang, what=str(mask))]:
            raise InputError(
                f"{silenced} is about other neurons of {lang} than {mask} has now; run lsn/deactivate.py with "
                f"--mask_file {mask} and --overwrite"
            )
    head |= {"file": mask, "tested": (result_head.get("models") or {}).get("model")}
    if base is None:
        return Method(neurons, report, result), head
    base_mask, base_head = _mask(base)
    base_report, _ = results.read_json(base.with_suffix(".report.json"), "lsn-report")
    if any(head[key] != base_head[key] for key in ("n_layers", "ffn_width")):
        raise InputError(f"{base} has other layers or widths than {mask}: it is of no base of that model")
    of_base, of_mask = ({languages.canonical(lang, any_tag=True) for lang in by} for by in (base_mask, neurons))
    if of_base != of_mask:
        raise InputError(f"{base} and {mask} are of different languages; identify both with the same -l")
    return Method(neurons, report, result, base_mask, base_report), head


def _mask(path: Path) -> tuple[dict[str, Layers], dict]:
    payload, head = results.read_json(path, masks.SCHEMA)
    if not {"n_layers", "ffn_width", "models", "languages"} <= head.keys():
        raise InputError(f"{path} does not say which model it is of; make it with lsn/identify.py")
    widths = head["n_layers"], head["ffn_width"]
    return {lang: masks.read(path, lang, *widths, control=False) for lang in payload}, head


def same_languages(files: dict, found: dict[str, Method], heads: dict[str, dict]) -> list[str]:
    """The languages that every method was tested on.

    Raises:
        InputError: methods are of different models or languages, or tested on different text.
    """
    (first, first_head), *rest = heads.items()
    langs = found[first].silenced["languages"]
    for name, head in rest:
        for tested, paths in ((False, (first_head["file"], head["file"])), (True, (files[first][1], files[name][1]))):
            a, b = (h["tested"] if tested else h["models"]["model"] for h in (first_head, head))
            if a and b and not relatives.same_model(a, b):
                raise InputError(f"{paths[0]} is of {a['spec']}, {paths[1]} of {b['spec']}: not one model")
        if found[name].silenced["languages"] != langs or not set(langs) <= set(found[name].mask):
            raise InputError(
                f"{files[first][1]} and {files[name][1]} are of different languages; test all methods on the same"
            )
        if any(found[name].silenced[key] != found[first].silenced[key] for key in ("documents", "tokens")):
            raise InputError(
                f"{files[first][1]} and {files[name][1]} were measured on different text; run lsn/deactivate.py again "
                "for both"
            )
    return langs


if __name__ == "__main__":
    cli.run(main)
