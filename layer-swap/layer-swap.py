"""Puts whole layers of the base model back into a checkpoint of continued pre-training; measures the cost (step 4).

`semantic_hub` takes every layer that is not an interface layer from the base; `random` as many layers, drawn with
`random.Random(seed).sample(range(L), n)`. If the hub keeps its meaning over CPT, the former should cost little.

In:   BASE and TARGET (model folders or hub names; default: the study's base and the last checkpoint of its run), and
      LAYERS.json with `interface_layers` (default: the study's, from layer-specialize).
Out:  OUT/semantic_hub/ and OUT/random/, complete model folders with a swap.json each, and OUT/metadata.json.
      With --controls, instead: OUT/controls.json, .pt and figure: retrieval, loss and task accuracy of base, target,
      the hub set and many random sets of its size, each swapped in memory. With --in-memory alone: OUT/in_memory.json,
      with the same measures for the sets of --methods.

Full: python layer-swap/layer-swap.py meta-llama/Llama-2-7b-hf runs/eus/checkpoint-5000 layers.json -o swapped
Tiny: python layer-swap/layer-swap.py --study demo/tiny.yaml --controls 10
"""

from __future__ import annotations

import functools
import random
import re
from pathlib import Path

from cpt_utils.base import cli, processes, results, sources
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import beside
from cpt_utils.interventions import in_memory, on_disk, surgery
from cpt_utils.measures import controls, evaluation, gate, layer_lists, matched, swap_figure
from cpt_utils.measures.trial import Trial

retrieval = cli.sibling("sentence-retrieval/sr_experiment.py")

SCHEMA = "layer-swap"
RESULTS = {"layer_swap": "layer-swap"}
ASKED = {"layer_swap": "What is lost when hub layers are reset to the base, and is it less than with other layers?"}
CAPTIONS = {
    "controls": """Part I: 4. Layer swaps
        The cost of putting layers of the base back into the last checkpoint: the hub swap among swaps of other sets of
        as many layers, for each measure, with the base and the unchanged checkpoint; squares are sets of the hub's
        shape. Claim C2b, the hub swap costs less than others, is decided by all these sets together: by how much hub
        layers add to the cost of a set, adjusted for its depth and its seams (points where layers of base and
        checkpoint meet). They may add cost even if the hub swap costs less than random sets do on average.""",
}
IMAGES = {"controls": "controls.png"}
METHODS = ("semantic_hub", "random")
# Files that this script writes to OUT, finished or not.
OURS = re.compile(r"(semantic_hub|random)(\.partial|\.replaced)?|metadata\.json|(controls|in_memory)\..+|\..+")


# ---------------------------------------------------------------- the method


def semantic_hub(interface: list[int], n_layers: int) -> list[int]:
    """Every layer that is not an interface layer, in order."""
    return [layer for layer in range(n_layers) if layer not in set(interface)]


def random_layers(n: int, n_layers: int, seed: int) -> list[int]:
    """`n` of the layers in the order drawn, as in the published metadata.json."""
    return random.Random(seed).sample(range(n_layers), n)


def read_layers(path: Path, pair: surgery.Pair) -> tuple[list[int], dict]:
    """The interface layers of step 2's file (or one made by hand), and its header.

    Raises:
        InputError: no interface_layers, layers the model does not have, or a file made from a model of another run.
    """
    models = [ref.describe() for ref in pair.models.values()]
    layers, payload, head = layer_lists.read_layers(path, "interface", pair.n_layers, models)
    hub = payload.get("semantic_layers")
    if hub is not None and sorted(hub) != semantic_hub(layers, pair.n_layers):
        cli.warn(f"{path}: semantic_layers are not all the other layers; every non-interface layer is swapped")
    return layers, head


# ---------------------------------------------------------------- folders


def write_folders(
    pair: surgery.Pair, chosen: dict[str, list[int]], out: Path, run: str | None, overwrite: bool
) -> None:
    """One complete model folder for each method."""
    for method, layers in chosen.items():
        cli.say(f"{method}: layers {sorted(layers)} of the base ({len(layers)} of {pair.n_layers})")
        record = on_disk.write_model(pair, surgery.layers_from_base(pair, layers), out / method, run, overwrite)
        share = record["parameters_from_base"] / record["parameters"]
        cli.say(f"{out / method}: {share:.0%} of the parameters are the base's; read back and equal to the sources")


def metadata(pair: surgery.Pair, interface: list[int], chosen: dict[str, list[int]], seed: int) -> dict:
    """The content of OUT/metadata.json, with the keys of the published script."""
    return {
        "base_model": pair.base_ref.spec,
        "target_model": pair.target_ref.spec,
        "interface_layers": interface,
        "semantic_hub_layers": chosen["semantic_hub"],
        "random_layers": chosen["random"],
        "seed": seed,
    }


def same(existing, wanted) -> bool:
    """Whether two values of metadata.json mean the same swap; an earlier version sorted the random layers."""
    both_lists = isinstance(existing, list) and isinstance(wanted, list)
    return sorted(existing) == sorted(wanted) if both_lists else existing == wanted


def refuse_other(path: Path, wanted: dict) -> None:
    """Refuse an OUT whose metadata.json describes other swaps, so that it stays true of its folders."""
    if path.is_file():
        record, _ = results.read_json(path, schema=SCHEMA)
        changed = [key for key in wanted if not same(record.get(key), wanted[key])]
        if changed:
            raise InputError(
                f"{path} describes other swaps ({changed[0]} {record.get(changed[0])}, now {wanted[changed[0]]}); give "
                "another -o, or --overwrite"
            )


def refuse_leftover(out: Path, payload: dict, wanted: dict) -> None:
    """Refuse to redo one method if the other's folder would stay without metadata.json describing it."""
    for method in METHODS:
        if method in wanted or not (out / method).exists():
            continue
        record = results.read_json(out / "metadata.json", schema=SCHEMA)[0] if (out / "metadata.json").is_file() else {}
        keys = ("base_model", "target_model", f"{method}_layers")
        if any(not same(record.get(key), payload[key]) for key in keys):
            raise InputError(f"{out / method} would remain from other swaps; redo both methods or remove it first")


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("base", nargs="?", metavar="BASE", help="base model; default: the study's base")
    text = "checkpoint of CPT; default: the last of the study's run, or of --steps"
    add("target", nargs="?", metavar="TARGET", help=text)
    add("layers", nargs="?", metavar="LAYERS.json", help="file of step 2; default: the study's")
    add("-o", "--output", metavar="OUT", help="folder for all results; default: the study's layer-swap folder")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help="default: semantic_hub random")
    cli.add_named_models(p, "BASE", "TARGET; its last checkpoint, or the last of --steps, is the target")
    controls.add_flag(p, "the hub")
    add("--in-memory", action="store_true", help="measure the sets of --methods without writing model folders")
    cli.add_run_flags(p)
    evaluation.add_flags(p)
    sources.add_flags(p)
    cli.add_forward_flags(p, batch_size=None, device_map=True)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    base, run, base_ref, target = beside.pair_asked_for(study, args)
    limit = args.limit if args.controls or args.in_memory else None
    out = study.output(args.output, "-o", "layer_swap", beside.name(study, base, run, args.steps, limit, last=True))
    on_disk.refuse_foreign(out, OURS, "a layer swap", "-o")
    path = study.input(args.layers, "LAYERS.json", "layers")
    with surgery.Pair(base_ref, target) as pair:
        interface, head = read_layers(path, pair)
        head["gate"] = gate.carried(path)
        hub = semantic_hub(interface, pair.n_layers)
        if not hub:
            raise InputError(f"{path}: every layer is an interface layer, so no layer is left to swap")
        chosen = {"semantic_hub": hub, "random": random_layers(len(hub), pair.n_layers, study.seed)}
        wanted = {method: chosen[method] for method in METHODS if method in args.methods}
        if args.controls or args.in_memory:
            measure(pair, interface, wanted, head, out, args, study)
            return
        processes.Process.refuse_several("writing model folders")
        payload = metadata(pair, interface, chosen, study.seed)
        if not args.overwrite:
            refuse_other(out / "metadata.json", payload)
        else:
            refuse_leftover(out, payload, wanted)
        write_folders(pair, wanted, out, study.get("run"), args.overwrite)
        models = {role: ref.describe() for role, ref in pair.models.items()}
        header = results.header(SCHEMA, models=models, n_layers=pair.n_layers, seed=study.seed, gate=head["gate"])
        results.write_json(out / "metadata.json", payload, header)


def measure(pair: surgery.Pair, interface: list[int], wanted: dict, head: dict, out: Path, args, study: Study) -> None:
    """OUT/controls.json with --controls, else OUT/in_memory.json for the sets of --methods."""
    test = evaluation.test_from_arguments(args, study, head, retrieval.of_pairs)
    trial = Trial.from_arguments(args, study, pair.models, test, study.get("run"))
    hub = semantic_hub(interface, pair.n_layers)
    facts = {"interface_layers": interface, "semantic_hub_layers": hub}
    sets, path = [(name, sorted(layers)) for name, layers in wanted.items()], out / "in_memory.json"
    if args.controls:
        others, n_possible = controls.layer_sets(pair.n_layers, hub, controls.wanted(args.controls, study), study.seed)
        cli.say(
            f"the hub is {len(hub)} of {pair.n_layers} layers; of the {n_possible - 1} other sets of that size "
            f"{len(others)} are measured"
        )
        facts |= {"n_possible_sets": n_possible, "enumerated": len(others) == n_possible - 1}
        sets, path = [("semantic_hub", hub), *(("random", layers) for layers in others)], out / "controls.json"
        measured = [(None, layers) for _, layers in sets]
        added = matched.to_add([(None, hub)], {None: range(pair.n_layers)}, measured, study.seed)
        sets += [("matched", layers) for _, layers in added]
    swapper = in_memory.Swapper(pair)
    swaps = [swapper.condition(name, surgery.layers_from_base(pair, layers), layers=layers) for name, layers in sets]
    compared = (
        ("semantic_hub", facts, functools.partial(draw, n_layers=pair.n_layers)) if args.controls else (None, facts)
    )
    trial.compare(path, swaps, *compared, gate=head["gate"])


def draw(path: Path, payload: dict, n_layers: int) -> None:
    """The hub swap among random swaps of its size, from the content of a controls.json."""
    hub = payload["sets"][controls.find(payload["sets"], "semantic_hub")]
    n_random = sum(row["name"] == "random" for row in payload["sets"])
    title = f"{len(hub['layers'])} of {n_layers} layers from the base, {n_random} random sets of as many"
    swap_figure.draw(path, [swap_figure.row_of(payload, hub, "hub swap", "hub")], title, n_layers)


if __name__ == "__main__":
    cli.run(main)
