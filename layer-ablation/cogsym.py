"""CogSym: the outermost share of the layers, half of them at the input and half at the output, which alone is trained.

In:   a model (its configuration alone) and a share; of a study, where they are there, the interface layers of step 2
      (layers.json) and the change of every layer (attn_vs_ffn.json).
Out:  OUT (default: the study's layer-ablation/cogsym.json): `layers`, the fractions of layers and parameters that they
      are, and `overlaps` with the interface layers, by each measure of retrieval, and with as many of the most changed
      layers, each beside chance; a figure where there is an overlap. `cpt/train.py --train-only OUT` trains them.

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
        The layers that the rule chooses, which looks at nothing but their number, and those of the interface by each
        measure of retrieval and the most changed ones. Interface layers lie at the ends wherever retrieval rises and
        falls over the stack, so that an overlap with them beyond chance says no more than that.""",
}


# ---------------------------------------------------------------- the method


def chosen(share: float, place: layer_sets.Place) -> list[int]:
    """The first and the last k layers, k = max(1, floor(share N / 2 + 1/2)).

    Raises:
        InputError: no share above 0 and at most 1, or two ends that overlap.
    """
    found, k, n = layer_sets.read(f"outer:{share}", place), layer_sets.per_side(share, place.n_layers), place.n_layers
    if 2 * k > n:
        raise InputError(
            f"--share {share:g} of {n} layers is {k} on each side, which overlap; give a smaller share, or train the "
            "whole model"
        )
    return list(found.layers)


def fractions(base: refs.ModelRef, layers: list[int]) -> dict:
    """How much of the model the layers are, counted on a model without weights; tied matrices count once.

    Returns:
        `share_of_layers`, `parameters` {"chosen", "layers", "model"}, `share_of_parameters` (of the model: what is
        trained with io frozen) and `share_of_layer_parameters` (without embeddings, final norm and head).
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
    """`layers` beside each other list: that list, and what `stats.overlap` says of the two."""
    return {name: {"layers": own} | stats.overlap(layers, own, n_layers) for name, own in others.items()}


# ---------------------------------------------------------------- the command


def others_of(study: Study, args, place: layer_sets.Place, k: int) -> tuple[dict[str, list[int]], dict[str, Path]]:
    """The lists that are compared with, of the files that are there, and these files.

    Raises:
        InputError: a file that was named is not there, or one is about another model.
    """
    found, files = {}, {}
    for step, given in (("layers", args.layer_selection), ("attn_vs_ffn", args.change)):
        path = Path(given) if given else study.result(step)
        if path is not None and (given or path.is_file()):
            files[step] = path
    if "layers" in files:
        path = study.input(args.layer_selection, "--layer-selection", "layers")
        models = None if args.layer_selection else place.models
        found["interface"], payload, head = layer_lists.read_layers(path, "interface", place.n_layers, models)
        for measure, split in (payload.get("splits") or {}).items():
            # The split by the study's own curve is the list above; of a flat curve there is none.
            if measure != head.get("measure", "published") and split["interface_layers"]:
                found[f"interface:{measure}"] = sorted(split["interface_layers"])
    if "attn_vs_ffn" in files:
        words = f"change:{k}:{args.change}" if args.change else f"change:{k}"
        found["change"] = list(layer_sets.read(words, place).layers)
    return found, files


def draw(path: Path, layers: list[int], others: dict[str, dict], n_layers: int) -> None:
    """A row a list, its layers filled."""
    rows = {"CogSym": layers}
    for name, one in others.items():
        kind, _, measure = name.partition(":")
        by = f" ({curves.MEASURES[measure].label})" if measure else ""
        rows["most changed" if kind == "change" else f"{kind}{by}"] = one["layers"]
    with figures.style() as plt:
        fig, axis = plt.subplots(figsize=(figures.COLUMN, 0.6 + 0.17 * len(rows)))
        for at, (name, own) in enumerate(rows.items()):
            shade = figures.colour({"CogSym": "target", "most changed": "ffn"}.get(name, "interface"))
            axis.barh([at] * len(own), 0.9, left=[layer - 0.45 for layer in own], height=0.7, color=shade)
            if not own:
                axis.text(n_layers / 2 - 0.5, at, "none", ha="center", va="center", fontsize=6.5)
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
    for name, one in others.items():
        cli.say(
            f"{name}: {len(one['layers'])} layers, {one['shared']} of them shared, Jaccard {one['jaccard']:.2f} (by "
            f"chance {one['expected']:.2f}, p {one['p_value']:.3f})"
        )


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    add = p.add_argument
    add("--base", metavar="B", help="the model whose layers are chosen; default: the study's base")
    add("--share", type=float, default=0.25, metavar="P", help="of the layers, above 0 and at most 1; default 0.25")
    add("--layer-selection", metavar="F", help="file of step 2; default: the study's, where it is there")
    add("--change", metavar="F", help="file of weight-diff/attn_vs_ffn.py; default: the study's, where it is there")
    add("-o", "--output", metavar="OUT", help="JSON to write; default: the study's layer-ablation/cogsym.json")
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    base = refs.model(study.value(args.base, "--base", "base"))
    known = relatives.of([base], study.get("base"), study.plain.get("run")) if study else None
    place = layer_sets.Place(base.config(), study.plain, known)
    layers = chosen(args.share, place)
    other = beside.name(study, args.base)
    own = Study() if other else study.plain  # its files are about its own base
    output = study.output(args.output, "--output", "cogsym", other or f"share-{args.share:g}" * (args.share != 0.25))
    others, files = others_of(own, args, place, len(layers))
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
    cli.say(f"wrote {output}; cpt/train.py --train-only {output} trains these layers alone")


if __name__ == "__main__":
    cli.run(main)
