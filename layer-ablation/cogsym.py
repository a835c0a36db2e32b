"""CogSym: the layers that it trains, a share of the stack, half of them at the input and half at the output.

In:   a model (only its configuration) and a share; if the study has them, the interface layers of step 2 (layers.json)
      and the change of every layer (attn_vs_ffn.json).
Out:  OUT (default: the study's layer-ablation/cogsym.json): `layers`, their fraction of all layers and parameters, and
      `overlaps` with the interface layers, by each measure of retrieval, and with equally many of the most changed
      layers, compared with chance; a figure if there are overlaps. `cpt/train.py --train-only OUT` trains them.

Full: python layer-ablation/cogsym.py --study demo/demo.yaml
Any:  python layer-ablation/cogsym.py --base HuggingFaceTB/SmolLM2-135M --share 0.25 -o build/try/cogsym.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, figures, results, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import beside, refs, relatives
from cpt_utils.measures import curves, gate, layer_lists, layer_sets
from cpt_utils.models import loading

SCHEMA = "cogsym"
RESULTS = {"cogsym": "layer-ablation/cogsym.json"}
ASKED = {"cogsym": "Which layers does CogSym train, and are they the interface, or those that change most?"}
CAPTIONS = {
    "cogsym": """Part III: 2. CogSym
        The layers that the rule chooses, which depends on their number alone, the interface layers by each measure of
        retrieval, and the most changed layers. Interface layers are at the ends whenever retrieval rises and falls over
        the stack, so an overlap with them beyond chance says no more than that.""",
}


# ---------------------------------------------------------------- the method


def chosen(share: float, place: layer_sets.Place) -> list[int]:
    """The first and the last k layers, k = max(1, floor(share N / 2 + 1/2)).

    Raises:
        InputError: the share is not above 0 and at most 1, or the two ends overlap.
    """
    outer, k, n = layer_sets.read(f"outer:{share}", place), layer_sets.per_side(share, place.n_layers), place.n_layers
    if 2 * k > n:
        raise InputError(
            f"--share {share:g} of {n} layers is {k} on each side, which overlap; give a smaller share, or train the "
            "whole model"
        )
    return list(outer.layers)


def fractions(base: refs.ModelRef, layers: list[int]) -> dict:
    """The layers' share of the model, counted on a model without weights; tied matrices count once.

    Returns:
        `share_of_layers`, `parameters` {"chosen", "layers", "model"}, `share_of_parameters` (of the model; trained with
        io frozen) and `share_of_layer_parameters` (without embeddings, final norm and head).
    """
    arch = archs.for_config(base.config())
    sizes = {"chosen": 0, "layers": 0, "model": 0}
    for name, parameter in loading.load_untrained(base, torch.float32, torch.device("meta"), 0).named_parameters():
        layer = arch.layer_of(name)
        inside = {"chosen": layer in layers, "layers": layer is not None, "model": True}
        sizes = {part: size + parameter.numel() * inside[part] for part, size in sizes.items()}
    return {
        "share_of_layers": len(layers) / arch.n_layers(base.config()),
        "parameters": sizes,
        "share_of_parameters": sizes["chosen"] / sizes["model"],
        "share_of_layer_parameters": sizes["chosen"] / sizes["layers"],
    }


def compared(layers: list[int], others: dict[str, list[int]], n_layers: int) -> dict[str, dict]:
    """Every other list, with its `stats.overlap` with `layers`."""
    return {name: {"layers": other} | stats.overlap(layers, other, n_layers) for name, other in others.items()}


# ---------------------------------------------------------------- the command


def others_of(study: Study, args, place: layer_sets.Place, k: int) -> tuple[dict[str, list[int]], dict[str, Path]]:
    """The lists to compare with, from the files that exist, and these files.

    Raises:
        InputError: a named file does not exist, or a file is about another model.
    """
    lists, files = {}, {}
    for step, given in (("layers", args.layer_selection), ("attn_vs_ffn", args.change)):
        path = Path(given) if given else study.result(step)
        if path is not None and (given or path.is_file()):
            files[step] = path
    if "layers" in files:
        path = study.input(args.layer_selection, "--layer-selection", "layers")
        models = None if args.layer_selection else place.models
        lists["interface"], payload, head = layer_lists.read_layers(path, "interface", place.n_layers, models)
        for measure, split in (payload.get("splits") or {}).items():
            # The split by the study's own curve is the list above; a flat curve has none.
            if measure != head.get("measure", "published") and split["interface_layers"]:
                lists[f"interface:{measure}"] = sorted(split["interface_layers"])
    if "attn_vs_ffn" in files:
        words = f"change:{k}:{args.change}" if args.change else f"change:{k}"
        lists["change"] = list(layer_sets.read(words, place).layers)
    return lists, files


def draw(path: Path, layers: list[int], others: dict[str, dict], n_layers: int) -> None:
    """One row per list, with its layers filled."""
    rows = {"CogSym": layers}
    for name, other in others.items():
        kind, _, measure = name.partition(":")
        by = f" ({curves.MEASURES[measure].label})" if measure else ""
        rows["most changed" if kind == "change" else f"{kind}{by}"] = other["layers"]
    with figures.style() as plt:
        fig, axis = plt.subplots(figsize=(figures.COLUMN, 0.6 + 0.17 * len(rows)))
        for y, (name, listed) in enumerate(rows.items()):
            shade = figures.colour({"CogSym": "target", "most changed": "ffn"}.get(name, "interface"))
            axis.barh([y] * len(listed), 0.9, left=[layer - 0.45 for layer in listed], height=0.7, color=shade)
            if not listed:
                axis.text(n_layers / 2 - 0.5, y, "none", ha="center", va="center", fontsize=6.5)
        axis.set_yticks(range(len(rows)), rows)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlim(-0.5, n_layers - 0.5)
        figures.layer_axis(axis, n_layers)
        figures.save(fig, path)


def say(layers: list[int], facts: dict, others: dict[str, dict], n_layers: int) -> None:
    cli.say(
        f"layers {', '.join(map(str, layers))} of {n_layers}: {facts['share_of_layers']:.0%} of the layers, "
        f"{facts['share_of_parameters']:.1%} of the parameters ({facts['share_of_layer_parameters']:.1%} without "
        "embeddings, final norm and head)"
    )
    for name, other in others.items():
        cli.say(
            f"{name}: {len(other['layers'])} layers, {other['shared']} of them shared, Jaccard {other['jaccard']:.2f} "
            f"(by chance {other['expected']:.2f}, p {other['p_value']:.3f})"
        )


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    add = p.add_argument
    add("--base", metavar="B", help="the model whose layers are chosen; default: the study's base")
    add("--share", type=float, default=0.25, metavar="P", help="share of layers, above 0 and at most 1; default 0.25")
    add("--layer-selection", metavar="F", help="file of step 2; default: the study's, if it exists")
    add("--change", metavar="F", help="file of weight-diff/attn_vs_ffn.py; default: the study's, if it exists")
    add("-o", "--output", metavar="OUT", help="JSON to write; default: the study's layer-ablation/cogsym.json")
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    base = refs.model(study.value(args.base, "--base", "base"))
    known = relatives.of([base], study.get("base"), study.plain.get("run")) if study else None
    place = layer_sets.Place(base.config(), study.plain, known)
    layers = chosen(args.share, place)
    variant = beside.name(study, args.base)
    source = Study() if variant else study.plain  # the study's files are about its own base
    output = study.output(args.output, "--output", "cogsym", variant or f"share-{args.share:g}" * (args.share != 0.25))
    others, files = others_of(source, args, place, len(layers))
    request = {"model": base.describe(), "share": args.share, "others": others}
    if results.finished(output, SCHEMA, request, "another -o", args.overwrite):
        cli.say(f"{output} is finished, from the same request: kept (--overwrite redoes it)")
        return
    facts, overlaps = fractions(base, layers), compared(layers, others, place.n_layers)
    if overlaps:
        draw(output.with_suffix(""), layers, overlaps, place.n_layers)
    payload = {"layers": layers, "share": args.share, "per_side": len(layers) // 2, **facts, "overlaps": overlaps}
    passed = gate.carried(files["layers"]) if "layers" in files else None
    head = results.header(SCHEMA, models={"model": base.describe()}, n_layers=place.n_layers, gate=passed)
    results.write_json(output, {**payload, "request": request}, head)
    say(layers, facts, overlaps, place.n_layers)
    cli.say(f"wrote {output}; cpt/train.py --train-only {output} trains only these layers")


if __name__ == "__main__":
    cli.run(main)
