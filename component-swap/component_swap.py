"""One component of the base (attention or FFN) in some layers of a checkpoint: code shared by both component swaps.

A swap is a component in a place: attention or FFN, in the interface layers or in the LSN-rich layers, with or without
embeddings and lm_head. Each script has one as its treatment; the others are its crossed controls, which separate the
effect of the component from that of the place.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, languages, processes, results, sources
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import beside, folders, opening, refs
from cpt_utils.interventions import components, in_memory, on_disk, surgery
from cpt_utils.interventions.condition import Condition
from cpt_utils.measures import controls, evaluation, gate, layer_lists, matched
from cpt_utils.measures.trial import Trial

retrieval = cli.sibling("sentence-retrieval/sr_experiment.py")
shown = cli.sibling("component-swap/component_controls.py")

SCHEMA = "component-swap"
CAPTIONS = {
    "component_swap": """Part II: 4. Component swaps
        The cost of putting one component of the base back into the last checkpoint: attention or FFN, in interface
        layers or in those richest in the new language's neurons (LSN-rich), with and without embeddings. Grey dots are
        random sets of as many layers, for the one swap that this figure is about; squares are sets of a swap's shape.
        Claim C5 compares attention with the FFN of the same layers, in both places.""",
}
IMAGES = {"component_swap": "controls.png"}
# Files that these scripts write to OUT, finished or not.
OURS = re.compile(r"checkpoint-\d+(\.partial|\.replaced)?|metadata\.json|controls\..+|\..+")


# --- places ---


def say_places(lists: dict[str, list[int]], n_layers: int) -> dict:
    """Print, and return for the result, the facts needed to interpret the conditions."""
    facts: dict = {"layers": lists}
    if "lsn_rich" in lists:
        rich = lists["lsn_rich"]
        facts["lsn_rich_holds"] = {"first_layer": 0 in rich, "last_layer": n_layers - 1 in rich}
        ends = [f"the {name} layer ({at})" for name, at in (("first", 0), ("last", n_layers - 1)) if at in rich]
        cli.say(f"LSN-rich layers {rich}: {' and '.join(ends) or 'neither the first nor the last layer'} among them")
    if len(lists) == 2:
        facts["places_coincide"] = lists["interface"] == lists["lsn_rich"]
        if facts["places_coincide"]:
            cli.say("interface and LSN-rich layers are the same: each crossed pair is one swap, measured once")
    return facts


# --- swaps ---


@dataclass(frozen=True)
class ComponentSwap:
    """A component (None: none) in the layers of a place, perhaps with embeddings and lm_head.

    `also`: other names of the same swap, if both places have the same layers. `asked`: all layers of the place, if some
    of them lack the component and are therefore not among `layers`.
    """

    name: str
    component: str | None
    layers: tuple[int, ...] = ()
    embeddings: bool = False
    also: tuple[str, ...] = ()
    asked: tuple[int, ...] = ()

    @property
    def moved(self) -> str:
        """The parts moved, whatever the layers; random sets are compared with sets that move the same parts."""
        return "+".join(filter(None, (self.component, components.EMBEDDINGS if self.embeddings else None)))


def crossed(treatment: str, lists: dict[str, list[int]], having: dict[str, list[int]]) -> list[ComponentSwap]:
    """`treatment` ("attention_interface", "ffn_lsn_rich"), then the crossed conditions, then all with embeddings.

    With the layers of only one place there is nothing to cross: `treatment` alone. A crossed condition is left out if
    none of its layers has the component.

    Args:
        having: the layers that have each component; other layers of a place have nothing to swap.

    Raises:
        InputError: no layer of the treatment's place has its component.
    """
    component, _, place = treatment.partition("_")
    others = [name for name in components.COMPONENTS if name != component]
    places = [place, *(name for name in lists if name != place)]

    def layers_of(kind: str, where: str) -> tuple[int, ...]:
        return tuple(layer for layer in lists[where] if layer in having[kind])

    def asked(kind: str, where: str) -> tuple[int, ...]:
        return () if layers_of(kind, where) == tuple(lists[where]) else tuple(lists[where])

    if not layers_of(component, place):
        raise InputError(f"none of the layers {lists[place]} has {component}: there is nothing to swap")
    if len(places) == 1:
        return [ComponentSwap(treatment, component, layers_of(component, place), asked=asked(component, place))]
    swaps: dict[tuple, ComponentSwap] = {}
    for embeddings in (False, True):
        for kind in [component, *others]:
            for where in places:
                name = f"{kind}_{where}" + (f"_{components.EMBEDDINGS}" if embeddings else "")
                key = (kind, layers_of(kind, where), embeddings)
                if key in swaps:
                    swaps[key] = replace(swaps[key], also=(*swaps[key].also, name))
                elif key[1]:
                    swaps[key] = ComponentSwap(name, *key, asked=asked(kind, where))
    return [*swaps.values(), ComponentSwap(components.EMBEDDINGS, None, embeddings=True)]


def recipe_of(recipes: components.Recipes, condition: ComponentSwap) -> surgery.Recipe:
    """The edits of a condition.

    Raises:
        InputError: it includes embeddings, and those of base and target differ in shape.
    """
    parts = [recipes.component(condition.component, condition.layers)] if condition.component else []
    return components.combined(parts + ([recipes.embeddings()] if condition.embeddings else []))


# --- folders ---


@dataclass(frozen=True)
class Plan:
    """A swapped run to be written: the condition, the folder, and the content of its metadata.json."""

    condition: ComponentSwap
    out: Path
    payload: dict


def plan_run(
    base: refs.ModelRef, checkpoints: list[refs.ModelRef], condition: ComponentSwap, out: Path, spec, overwrite: bool
) -> Plan:
    """The plan for one swapped run, with every check that is possible before a byte is written.

    Args:
        spec: the run as the user gave it, for metadata.json.

    Raises:
        InputError: models that do not fit together, or an OUT that holds anything but this swap.
    """
    refuse_foreign(out, checkpoints)
    for ref in checkpoints:
        with surgery.Pair(base, ref) as pair:
            recipe = recipe_of(components.Recipes(pair), condition)
            moved, total = pair.share(recipe)
    stay = refuse_leftover(out, checkpoints, base, recipe)
    moves = components.COMPONENTS[condition.component]
    payload = {
        "base_model": base.spec,
        "run": spec[0] if isinstance(spec, list) and len(spec) == 1 else spec,
        "condition": condition.name,
        "component": condition.moved,
        "layers": list(condition.layers),
        "projections": [name for name in pair.arch.projections(pair.config) if name in moves],
        "steps": sorted({ref.step for ref in checkpoints} | stay),
        "parameters_from_base": moved,
        "parameters": total,
        "share": moved / total,
    }
    if not overwrite:
        refuse_other(out / "metadata.json", payload)
    return Plan(condition, out, payload)


def write_run(
    base: refs.ModelRef, checkpoints: list[refs.ModelRef], plan: Plan, overwrite: bool, passed: dict | None
) -> None:
    """OUT/checkpoint-<step>/ for every checkpoint, and OUT/metadata.json; finished ones of the same swap are kept.

    `passed`: the gate of the layers.
    """
    condition, payload = plan.condition, plan.payload
    share = f"{payload['share']:.1%} of all"
    cli.say(f"{condition.name}: {condition.moved} of the base in layers {payload['layers']}, {share}")
    for ref in checkpoints:
        with surgery.Pair(base, ref) as pair:
            recipe = recipe_of(components.Recipes(pair), condition)
            on_disk.write_model(pair, recipe, plan.out / f"checkpoint-{ref.step}", overwrite=overwrite)
    models = {"base": base.describe(), "checkpoints": {str(ref.step): ref.describe() for ref in checkpoints}}
    header = results.header(SCHEMA, models=models, n_layers=pair.n_layers, gate=passed)
    results.write_json(plan.out / "metadata.json", payload, header)
    cli.say(f"{plan.out}: {len(checkpoints)} checkpoints, each read back and equal to its sources")


def refuse_foreign(out: Path, checkpoints: list[refs.ModelRef]) -> None:
    """Refuse an OUT that is the run itself, or that contains anything these scripts do not write."""
    if any(ref.is_local and Path(ref.spec).resolve().parent == out.resolve() for ref in checkpoints):
        raise InputError(f"{out} is the run that is swapped; give another --output-dir")
    on_disk.refuse_foreign(out, OURS, "a component swap", "--output-dir")


def refuse_leftover(
    out: Path, checkpoints: list[refs.ModelRef], base: refs.ModelRef, recipe: surgery.Recipe
) -> set[int]:
    """The steps in OUT that are not requested now and were made by the same swap.

    Raises:
        InputError: one of them was made by another swap; OUT would mix two swaps and not be a run.
    """
    existing = {ref.step: Path(ref.spec) for ref in refs.checkpoints(out)} if out.is_dir() else {}
    stay = set(existing) - {ref.step for ref in checkpoints}
    wanted = results.plain({"base": surgery.identity(base), "recipe": recipe.facts})
    for step in sorted(stay):
        record = existing[step] / folders.RECORD
        request = results.read_json(record)[0].get("request", {}) if record.is_file() else {}
        if any(request.get(key) != wanted[key] for key in wanted):
            raise InputError(f"{existing[step]} would remain, but is not of this swap; remove it or give another OUT")
    return stay


def refuse_other(path: Path, payload: dict) -> None:
    """Refuse an OUT whose metadata.json describes another swap."""
    if not path.is_file():
        return
    existing, _ = results.read_json(path, schema=SCHEMA)
    for key in ("base_model", "run", "component", "layers", "projections"):
        if existing.get(key) != results.plain(payload[key]):
            raise InputError(
                f"{path} describes another swap ({key} {existing.get(key)}, now {payload[key]}); give another "
                "--output-dir, or --overwrite"
            )


# --- controls ---


def measure(
    pair: surgery.Pair, trial: Trial, wanted: list[ComponentSwap], out: Path, number: str | int, facts: dict,
    gate: dict | None, having: dict[str, list[int]],
) -> None:  # fmt: skip
    """OUT/controls.json, .pt and figure: base, target, the swaps (the first is compared), random and matched sets.

    Args:
        number: number of random sets, or "all".
        facts: further content of the payload.
        gate: the gate of the layers.
        having: the layers that have each component; random sets are drawn from those of the first swap's component.
    """
    recipes, swapper, treatment = components.Recipes(pair), in_memory.Swapper(pair), wanted[0]
    eligible = having[treatment.component]
    others, possible = controls.layer_sets(eligible, treatment.layers, number, trial.seed)
    cli.say(
        f"{treatment.name}: {len(treatment.layers)} of {len(eligible)} layers; of the {possible - 1} other sets of "
        f"that size {len(others)} are measured"
    )
    swaps, left_out = [], {}
    for condition in wanted:
        try:
            recipe = recipe_of(recipes, condition)
        except InputError as error:
            if not condition.embeddings:
                raise
            left_out[condition.name] = str(error)
            continue
        more = {"also": list(condition.also)} if condition.also else {}
        more |= {"asked": list(condition.asked)} if condition.asked else {}
        swaps.append(_condition(swapper, condition.name, condition.layers, condition.moved, recipe, more))
        cli.say(f"{condition.name}: {swaps[-1].facts['share']:.1%} of the parameters")
    if left_out:
        cli.say(f"left out: {', '.join(left_out)} ({next(iter(left_out.values()))})")
    for name, component, layers in _controls(wanted, others, having, trial.seed):
        recipe = recipes.component(component, layers)
        swaps.append(_condition(swapper, name, layers, component, recipe, {}))
    facts = {
        "own": treatment.name,
        "step": pair.target_ref.step,
        "n_layers": pair.n_layers,
        **({"n_layers_having": len(eligible)} if len(eligible) < pair.n_layers else {}),
        **facts,
        "n_possible_sets": possible,
        "enumerated": len(others) == possible - 1,
        "left_out": left_out,
    }
    pairs = functools.partial(shown.pairs, own=treatment.name, seed=trial.seed)
    trial.compare(out / "controls.json", swaps, treatment.name, facts, shown.draw, gate, pairs)


def _controls(
    wanted: list[ComponentSwap], others: list[list[int]], having: dict[str, list[int]], seed: int
) -> list[tuple[str, str, list[int]]]:
    """(name, component, layers) of the random sets, and of the matched sets that are not among them.

    If the FFN is a crossed control of attention, the same random layers are measured with it, too: only sets of the
    same layers separate the effect of the component from that of the layers.
    """
    treatment, plain = wanted[0], [swap for swap in wanted if swap.component and not swap.embeddings]
    drawn = [treatment.component]
    if treatment.component == "attention":
        drawn += list(dict.fromkeys(swap.component for swap in plain))[1:]
    random = [("random", kind, layers) for kind in drawn for layers in others if set(layers) <= set(having[kind])]
    compared = [(swap.component, swap.layers) for swap in plain if swap.component in drawn]
    added = matched.to_add(compared, having, [*compared, *((kind, layers) for _, kind, layers in random)], seed)
    return random + [("matched", kind, layers) for kind, layers in added]


def _condition(swapper, name: str, layers: Iterable[int], moved: str, recipe: surgery.Recipe, more: dict) -> Condition:
    parameters, total = swapper.pair.share(recipe)
    facts = {"layers": list(layers), "component": moved, "share": parameters / total, **more}
    return swapper.condition(name, recipe, **facts)


# --- the command ---


def add_flags(p, own_file: str) -> None:
    """The flags of both scripts; `own_file` ("interface", "lsn_rich"): the layers that the treatment itself needs."""
    add = p.add_argument
    add("--base-model", "--base", metavar="B", help="base model; default: the study's base")
    words = "run of checkpoints, or a single one; default: the study's run"
    add("--checkpoint-dir", "--run", nargs="+", metavar="RUN", help=words)
    for place, words in (
        ("interface", "file of step 2 with interface_layers"),
        ("lsn_rich", 'LSN-rich layers: a list, {"layers": [..]}, or the file of lsn/identify.py --layers-out'),
    ):
        when = "" if place == own_file else "; only for the crossed controls"
        add(layer_lists.FILES[place].flag, metavar="F", help=f"{words}; default: the study's{when}")
    words = "folder for the swapped run; default: the study's folder of this script"
    add("--output-dir", "--output", metavar="OUT", help=words)
    controls.add_flag(p, "this swap, in memory on the last checkpoint,")
    words = "also write OUT.<condition>/ for these crossed controls; without a value for all of them that leave the "
    words += "embeddings alone"
    add("--crossed-folders", nargs="*", metavar="CONDITION", help=words)
    cli.add_run_flags(p)
    evaluation.add_flags(p)
    sources.add_flags(p)
    cli.add_forward_flags(p, batch_size=None, device_map=True)


def run(args, treatment: str, step: str) -> None:
    """Run either script.

    Args:
        treatment: the script's condition.
        step: the script's key in a study's results.
    """
    if args.controls and args.crossed_folders is not None:
        raise InputError("--controls writes no folders: give --crossed-folders in a separate command")
    study = Study.find(args.study, args.seed, args.arm)
    base = refs.model(study.value(args.base_model, "--base-model", "base"))
    spec = study.value(args.checkpoint_dir, "--checkpoint-dir", "run")
    checkpoints = refs.run(spec, args.steps)
    opening.look_over(checkpoints)
    # There is a folder per checkpoint, so parts of a run share OUT; the controls are only of the last checkpoint.
    part = {"steps": args.steps, "limit": args.limit, "last": True} if args.controls else {}
    out = study.output(
        args.output_dir, "--output-dir", step, beside.name(study, args.base_model, args.checkpoint_dir, **part)
    )
    refuse_foreign(out, checkpoints)
    n_layers = archs.for_config(base.config()).n_layers(base.config())
    models = [base.describe(), *(ref.describe() for ref in refs.run(spec))]
    lists, known = read_lists(args, study, treatment, n_layers, models)
    facts, having = say_places(lists, n_layers), components.layers_having(base.config())
    if not args.controls:
        processes.Process.refuse_several("writing model folders")
        named = crossed(treatment, lists, having)
        written = {out: named[0]} | crossed_folders(args.crossed_folders, named, out)
        plans = [plan_run(base, checkpoints, swap, folder, spec, args.overwrite) for folder, swap in written.items()]
        for plan in plans:
            write_run(base, checkpoints, plan, args.overwrite, known["gate"])
        return
    with surgery.Pair(base, checkpoints[-1]) as pair:
        test = evaluation.test_from_arguments(args, study, known, retrieval.of_pairs)
        trial = Trial.from_arguments(args, study, pair.models, test)
        number = controls.wanted(args.controls, study)
        measure(pair, trial, crossed(treatment, lists, having), out, number, facts, known["gate"], having)


def read_lists(
    args, study: Study, treatment: str, n_layers: int, models: list[dict]
) -> tuple[dict[str, list[int]], dict]:
    """The layers of the places needed, the treatment's first; languages and gate from the headers of the files."""
    given = {"interface": args.layer_selection, "lsn_rich": args.layer_list}
    treatment_place = treatment.partition("_")[2]
    lists, known, paths = {}, {}, []
    for place in sorted(given, key=lambda name: name != treatment_place):
        file = layer_lists.FILES[place]
        if place != treatment_place and not args.controls and args.crossed_folders is None:
            continue
        if place != treatment_place and args.controls and given[place] is None and not study:
            cli.say(f"without {file.flag} the crossed controls are left out: only random layers are compared")
            continue
        path = study.input(given[place], file.flag, file.step)
        lists[place], payload, head = layer_lists.read_layers(path, place, n_layers, models)
        paths.append(path)
        if not lists[place]:
            raise InputError(f"{path} names no layer: there is nothing to swap")
        counts = payload.get("counts") or []
        bare = [layer for layer in lists[place] if layer < len(counts) and not counts[layer]]
        if bare:
            cli.warn(f"{path}: layers {bare} have no neurons of the language; they only make up the number of layers")
        target = study.value(args.target_lang, "--target-lang", "languages.target", None)
        if target and payload.get("language") and not languages.same(payload["language"], target):
            cli.warn(f"{path} is about the neurons of {payload['language']}, not of {target}")
        known |= {key: head[key] for key in ("base_lang", "target_lang") if key in head}
    return lists, known | {"gate": gate.carried(*paths)}


def crossed_folders(names: list[str] | None, known: list[ComponentSwap], out: Path) -> dict[Path, ComponentSwap]:
    """The crossed controls to write, by folder, out of the `known` conditions, whose first is the treatment.

    Raises:
        InputError: a name that is not a crossed condition.
    """
    if names is None:
        return {}
    treatment, by_name = known[0].name, {condition.name: condition for condition in known if condition.component}
    same = {other: condition.name for condition in by_name.values() for other in condition.also}
    crossed = {name: condition for name, condition in by_name.items() if name != treatment}
    for name in names:
        if name in same:
            raise InputError(f"--crossed-folders: {name} is the same swap as {same[name]}; leave it out")
        if name not in crossed:
            raise InputError(f"--crossed-folders: no condition {name}; there are {', '.join(crossed)}")
    chosen = names or [name for name, condition in crossed.items() if not condition.embeddings]
    return {out.with_name(f"{out.name}.{name}"): crossed[name] for name in chosen}
