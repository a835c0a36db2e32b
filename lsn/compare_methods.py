"""Language neurons by method: how many, in which layers, do methods agree, is a method stable, and which neurons matter.

No model is run: masks of lsn/identify.py --method M, and what lsn/deactivate.py --method M measured on each, one and the
same causal test with random controls of equal size per layer and of equal activity, are set side by side. The method wins
whose neurons hurt their own language most and the others least (selectivity), among those that hurt it at all: on one
half of the documents, and how it does is told on the other.

In:   of every method the mask, its report beside it, and the result of lsn/deactivate.py (default: the study's, of LAPE
      and of lsn.methods, else of those that were measured); masks of the base by the same methods, where there are some.
Out:  OUT (default: the study's lsn/methods.json), beside it a table (.md) and a figure.

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
ASKED = {"lsn_methods": "Do other methods find the same neurons, and whose neurons does a language need?"}
CAPTIONS = {
    "lsn_methods": """Part II: 2. Language-specific neurons
        Language-specific neurons by method, a row for each language. Left: how many there are in each layer. Right:
        what silencing them does to the loss per token on the language's own text, with 95 % intervals, and on that of
        the others (mean), beside as many random neurons that fire as often. A method found neurons that matter where
        the first is above 0, and above both others.""",
}
LEVEL = 0.05  # p among the controls of equal activity from which neurons are more than such neurons are


# ---------------------------------------------------------------- the method


@dataclass(frozen=True)
class Method:
    """What one method found: a mask by language, what its report says, what silencing does; of the base, too."""

    mask: dict[str, Layers]
    report: dict
    silenced: dict
    base: dict[str, Layers] | None = None
    base_report: dict | None = None


def agreement(a: Layers, b: Layers, widths: list[int] | None) -> dict:
    """Jaccard of two sets of neurons, beside that of random sets with as many neurons in each layer.

    `chance` takes for the overlap the expected one: the sum over layers of |a| |b| / neurons. None without `widths`
    (neurons of each layer), and where there is no neuron.
    """
    ours, theirs = reporting.pairs(a), reporting.pairs(b)
    expected = math.fsum(len(a[layer]) * len(b[layer]) / width for layer, width in enumerate(widths or []))
    either = len(ours) + len(theirs)
    chance = expected / (either - expected) if either and widths else None
    return {"jaccard": reporting.jaccard(ours, theirs), "chance": chance, "shared": len(ours & theirs)}


def others(row: dict[str, float], lang: str) -> float:
    """The mean change for the other languages, from the row of changes of `lang`."""
    return math.fsum(change for e, change in row.items() if e != lang) / (len(row) - 1)


def controls_of(silenced: dict) -> dict[str, float]:
    """The mean change of a language's own loss without as many neurons that are as active, by language."""
    rows = silenced.get("active") or {}
    return {lang: math.fsum(row[lang] for row in sets) / len(sets) for lang, sets in rows.items()}


def best(chooses: dict[str, dict], reports: dict[str, dict]) -> dict:
    """The method whose neurons hurt their language most and the others least.

    Args:
        chooses: method -> its selectivity on the text that decides, as lsn/deactivate.py has it: `selectivity`,
            `ci_low`, `ci_high`, `meaningful` (the language itself is hurt), `n_active`, `p_value_active`.
        reports: the same on the text that all the rest is told on.

    Returns:
        `method` (None where no method's neurons hurt their language), `reported` (its row of `reports`, by its name),
        `clear` (by it they do so there, too, and its interval is above those of all other methods) and `beyond_active`
        (there they are more selective than neurons that fire as often; None where too few such sets were drawn to say).
    """
    harmful = {name: row for name, row in chooses.items() if row["meaningful"]}
    if not harmful:
        return {"method": None, "clear": False, "beyond_active": None, "reported": {}}
    name = max(harmful, key=lambda one: harmful[one]["selectivity"])
    own, rest = reports[name], [row["ci_high"] for other, row in reports.items() if other != name]
    n, p = (own[key] for key in ("n_active", "p_value_active"))
    return {
        "method": name,
        "clear": own["meaningful"] and all(high < own["ci_low"] for high in rest),
        "beyond_active": p <= LEVEL if n and 1 / (1 + n) <= LEVEL else None,
        "reported": {name: own},
    }


def chosen(silenced: dict[str, dict], halves: dict[str, dict | None], langs: list[str]) -> dict[str, dict]:
    """The `best` of each language and `overall`, from the two halves of the documents, or twice from all of them where
    the result of a method has no halves."""
    parts = []
    for half in ("chooses", "reports"):
        rows = {name: own[half] for name, own in halves.items()} if all(halves.values()) else silenced
        parts.append({name: row["selectivity"] | {"overall": row["overall"]} for name, row in rows.items()})
    return {
        lang: best(*({name: row[lang] for name, row in part.items() if lang in row} for part in parts))
        for lang in (*langs, "overall")
    }


def against_base(found: Method) -> dict:
    """By language how the base's mask differs from the checkpoint's: sizes, overlap, change by layer; of a ternary mask
    also the change of the number of selected neurons by layer and N, and of general ones by layer."""
    rows: dict[str, dict] = {}
    for lang, layers in found.mask.items():
        before = found.base[languages.find(found.base, lang)]
        ours, theirs = reporting.pairs(layers), reporting.pairs(before)
        rows[lang] = {
            "base": len(theirs), "checkpoint": len(ours), "shared": len(ours & theirs),
            "jaccard": reporting.jaccard(ours, theirs),
            "change": [len(layers[layer]) - len(before[layer]) for layer in layers],
        }  # fmt: skip
    more = {}
    if {"by_n", "classes"} <= found.report.keys() and found.base_report:
        now, then = ([np.array(one["by_n"]), np.array(one["classes_by_layer"]["general"])]
                     for one in (found.report, found.base_report))  # fmt: skip
        more = {"change_by_n": (now[0] - then[0]).tolist(), "change_of_general": (now[1] - then[1]).tolist()}
        more |= {"classes_base": found.base_report["classes"]}
    return {"languages": rows, **more}


def compare(found: dict[str, Method], langs: list[str], widths: list[int] | None) -> dict:
    """Everything the result says. `widths`: the neurons of each layer; None: not known, and no chance level."""
    silenced = {name: one.silenced for name, one in found.items()}
    pairs = list(itertools.combinations(found, 2))
    agreed = {
        lang: {f"{a} and {b}": agreement(found[a].mask[lang], found[b].mask[lang], widths) for a, b in pairs}
        for lang in langs
    }
    counts = {
        name: {lang: [len(row) for row in one.mask[lang].values()] for lang in langs} for name, one in found.items()
    }
    halves = {name: one.get("halves") for name, one in silenced.items()}
    stable = {name: (one.report.get("convergence") or {}).get("halves") for name, one in found.items()}
    return {
        "languages": langs,
        "methods": list(found),
        "neurons": {name: {lang: sum(row) for lang, row in rows.items()} for name, rows in counts.items()},
        "by_layer": counts,
        "classes": {name: one.report["classes"] for name, one in found.items() if "classes" in one.report},
        "agreement": agreed,
        "stability": {name: halves and halves["languages"] for name, halves in stable.items()},
        "diagonal": {name: one["diagonal"] for name, one in silenced.items()},
        "others": {
            name: {lang: others(row, lang) for lang, row in one["matrix"].items()} for name, one in silenced.items()
        },
        "controls": {name: controls_of(one) for name, one in silenced.items()},
        "selectivity": {name: one["selectivity"] for name, one in silenced.items()},
        "overall": {name: one["overall"] for name, one in silenced.items()},
        "activity": {name: one.get("activity") for name, one in silenced.items()},
        "halves": halves if all(halves.values()) else None,
        "best": chosen(silenced, halves, langs),
        "base": {name: against_base(one) for name, one in found.items() if one.base},
    }


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    text = "masks by method (lsn/identify.py); default: the study's, of lape and of lsn.methods, or of those measured"
    add("--masks", nargs="+", metavar="METHOD=FILE", help=text)
    text = "what lsn/deactivate.py measured on each of them; default: the study's"
    add("--deactivations", nargs="+", metavar="METHOD=FILE", help=text)
    text = "masks of the base by the same methods; default: those that there are of the study's base"
    add("--base-masks", nargs="+", metavar="METHOD=FILE", help=text)
    add("-o", "--output", metavar="OUT", help="JSON to write; default: the study's lsn/methods.json")
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    output = study.output(args.output, "-o", "lsn_methods")
    files = wanted_files(args, study)
    found, heads = {}, {}
    for name, (mask, silenced, base) in files.items():
        found[name], heads[name] = read(mask, silenced, base)
    langs = same_languages(files, found, heads)
    head = next(iter(heads.values()))
    request = {
        name: {str(path): results.file_sha256(path) for path in paths if path is not None}
        for name, paths in files.items()
    }
    if results.finished(output, SCHEMA, request, "another -o", args.overwrite):
        cli.say(f"{output} is finished (--overwrite redoes it)")
        return
    n_layers, width = head["n_layers"], head["ffn_width"]
    whole = next(iter(found.values())).report["n_neurons"] == n_layers * width
    payload = compare(found, langs, [width] * n_layers if whole else None)
    if whole_text := [str(files[name][1]) for name, one in found.items() if not one.silenced.get("halves")]:
        cli.warn(
            f"{' and '.join(whole_text)}: no halves of the documents (a single one, or an earlier result: run "
            "lsn/deactivate.py --overwrite); the winner is chosen on the text that it is told on, which flatters it"
        )
    shown.draw(output.with_suffix(""), payload)
    results.write_text(output.with_suffix(".md"), shown.table(payload))
    facts = {"models": head["models"], "n_layers": n_layers, "ffn_width": width, "languages": head["languages"]}
    results.write_json(output, payload, results.header(SCHEMA, **facts, request=request))
    shown.say(payload)
    cli.say(f"wrote {output}, the table {output.with_suffix('.md')} and the figure {output.with_suffix('.pdf')}")


def wanted_files(args, study: Study) -> dict[str, tuple[Path, Path, Path | None]]:
    """method -> its mask, the result of deactivation, and the base's mask or None; of two methods or more."""
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
    """The methods beside LAPE of whose neurons there is a result of lsn/deactivate.py in the study's results."""
    others = [method for method in identify.METHODS if method != masks.LAPE]
    return [method for method in others if masks.of_method(study.result("deactivation"), method).is_file()]


def refuse_old(base: Path, study: Study) -> None:
    """InputError where a mask of the study's base is not of the base as it is now."""
    made_for = (_mask(base)[1]["models"] or {}).get("model")
    if made_for and not relatives.same_model(made_for, refs.model(study.get("base")).describe()):
        raise InputError(
            f"{base} is of {made_for['spec']}, which was trained again since or is not the study's base; run "
            "lsn/activation.py and lsn/identify.py on the base again, with --overwrite"
        )


def named(given: list[str] | None, flag: str) -> dict[str, str]:
    """The files of --masks and so on by method."""
    pairs = [one.partition("=") for one in given or []]
    for name, _, file in pairs:
        if not name or not file:
            raise InputError(
                f"--{flag.replace('_', '-')} {name}: give METHOD=FILE, as in ternary=result/llama.ternary.json"
            )
    return {name: file for name, _, file in pairs}


def read(mask: Path, silenced: Path, base: Path | None) -> tuple[Method, dict]:
    """What a method found, and the header of its mask.

    Raises:
        InputError: a file that is missing, of another kind or without what newer ones have, a deactivation of other
            neurons than the mask's, or a mask of a base that is not like the model.
    """
    neurons, head = _mask(mask)
    report, _ = results.read_json(mask.with_suffix(".report.json"), "lsn-report")
    found, about = results.read_json(silenced, "deactivation")
    if not {"meaningful", "n_active"} <= found.get("overall", {}).keys():
        raise InputError(
            f"{silenced} does not say whether a language itself is hurt, or has no sets of equal activity: it was made "
            "before these were measured; run lsn/deactivate.py again with --overwrite"
        )
    tested = (about.get("request") or {}).get("masks") or {}
    for lang, layers in tested.items():
        if {int(layer): row for layer, row in layers.items()} != neurons[languages.find(neurons, lang, what=str(mask))]:
            raise InputError(
                f"{silenced} is about other neurons of {lang} than {mask} has now; run lsn/deactivate.py with "
                f"--mask_file {mask} and --overwrite"
            )
    head |= {"file": mask, "tested": (about.get("models") or {}).get("model")}
    if base is None:
        return Method(neurons, report, found), head
    (before, other), (of_base, _) = _mask(base), results.read_json(base.with_suffix(".report.json"), "lsn-report")
    if any(head[key] != other[key] for key in ("n_layers", "ffn_width")):
        raise InputError(f"{base} has other layers or widths than {mask}: it is of no base of that model")
    if {languages.canonical(x, any_tag=True) for x in before} != {
        languages.canonical(x, any_tag=True) for x in neurons
    }:
        raise InputError(f"{base} and {mask} are of different languages; identify both with the same -l")
    return Method(neurons, report, found, before, of_base), head


def _mask(path: Path) -> tuple[dict[str, Layers], dict]:
    payload, head = results.read_json(path, masks.SCHEMA)
    if not {"n_layers", "ffn_width", "models", "languages"} <= head.keys():
        raise InputError(f"{path} does not say which model it is of; make it with lsn/identify.py")
    widths = head["n_layers"], head["ffn_width"]
    return {lang: masks.read(path, lang, *widths, control=False) for lang in payload}, head


def same_languages(files: dict, found: dict[str, Method], heads: dict[str, dict]) -> list[str]:
    """The languages that every method was tested on.

    Raises:
        InputError: methods of different models, languages, or tested on different text.
    """
    (first, head), *rest = heads.items()
    langs = found[first].silenced["languages"]
    for name, other in rest:
        for about, places in (("", (head["file"], other["file"])), ("tested", (files[first][1], files[name][1]))):
            ours, theirs = (one["tested"] if about else one["models"]["model"] for one in (head, other))
            if ours and theirs and not relatives.same_model(ours, theirs):
                raise InputError(f"{places[0]} is of {ours['spec']}, {places[1]} of {theirs['spec']}: not one model")
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
