"""Where in the stack CPT acts: blocks of the checkpoint are reverted to the base's, from either side.

Block l is the checkpoint's if it is in a set K, else the base's; sweeps let K grow from the input, from the output or
from both, or leave out a window. For each model: how well it understands the target language (perception: the loss of a
sentence's translation after it) and produces it (production: the loss of the sentence after its translation), as well
as loss, retrieval and task. How much of the gain each K keeps shows whether perception is early and production late.

In:   BASE and TARGET (model folders or hub names; default: the study's base and the last checkpoint of its run), and
      parallel sentences.
Out:  OUT.json (default: the study's layer-ablation/sweep.json): models, sweeps, retention, areas, specialisation; .pt
      (every sentence) and a figure.

A killed run resumes with the next model. On several GPUs: accelerate launch layer-ablation/ablation_sweep.py ...; each
process measures whole models, and the numbers are the same.

Full: python layer-ablation/ablation_sweep.py HuggingFaceTB/SmolLM2-135M runs/swh/checkpoint-600 --base-lang eng_Latn --target-lang swh_Latn --source flores -o sweep.json
Tiny: python layer-ablation/ablation_sweep.py --study demo/tiny.yaml --stride 2
"""  # noqa: E501

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import cli, languages, sources, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study, dotted
from cpt_utils.checkpoints import beside, tokenizer_id
from cpt_utils.interventions import components, in_memory, surgery
from cpt_utils.interventions.condition import Condition
from cpt_utils.measures import controls, evaluation, layer_sets
from cpt_utils.measures.trial import Trial

sets, in_context = cli.sibling("layer-ablation/ablation_sets.py"), cli.sibling("layer-ablation/in_context.py")
retention, figure = cli.sibling("layer-ablation/retention.py"), cli.sibling("layer-ablation/ablation_figure.py")
retrieval = cli.sibling("sentence-retrieval/sr_experiment.py")

SCHEMA = "ablation-sweep"
RESULTS = {"layer_ablation": "layer-ablation/sweep.json"}
ASKED = {
    "layer_ablation": (
        "How early in the stack is reading the new language learnt (perception), and how late writing it (production)?"
    ),
}
CAPTIONS = {
    "layer_ablation": """Part III: 1. Layer ablation
        The share of CPT's change that is kept if only some blocks are the checkpoint's and the others the base's
        (revert): blocks inserted from the input side (left) and from the output side (right), for perception (the loss
        of the translation after a sentence of the target language) and production (the reverse); below, for the
        reduction of the loss by the correct source compared with another sentence's; at the bottom the loss of the
        first two when a window of blocks is reverted. Lines: the base (0) and the checkpoint (1); with no block
        inserted, embeddings and head are still the checkpoint's (unless --io says otherwise), so curves need not start
        at 0. Bands: 95 % bootstrap intervals over sentences. Claim C8, perception early and production late, is decided
        by the difference of the areas, if CPT improved both.""",
}
KINDS = ("translation", *evaluation.KINDS)
COMPONENTS = ("all", *components.COMPONENTS)


# ---------------------------------------------------------------- the method


def recipe(pair: surgery.Pair, made: components.Recipes, kept: sets.Kept, component: str, io: str) -> surgery.Recipe:
    """The checkpoint with the blocks outside `kept`, or one component of these, taken from the base."""
    reverted = [block for block in range(pair.n_layers) if block not in kept]
    parts = [surgery.outside_layers(pair)] if io == "base" else []
    if reverted and component == "all":
        parts.append(surgery.layers_from_base(pair, reverted))
    elif reverted:
        parts.append(made.component(component, reverted))
    return components.combined(parts)


def models_of(
    pair: surgery.Pair, sweeps: dict[str, list], component: str, io: str
) -> tuple[list[Condition], dict[str, list[list[int]]]]:
    """B, C and every other distinct set of blocks once, named by its first sweep; and the sweeps' points [k, model].

    With C's embeddings, norm and head, keeping all blocks of C is C itself; with B's, keeping none is B. Blocks without
    the component are the same in both.
    """
    everything, all_kept = tuple(range(pair.n_layers)), {"kept": list(range(pair.n_layers))}
    models = [Condition("base", {}, facts={"kept": []}, of="base"), Condition("target", {}, facts=all_kept)]
    alike = {*everything} - {*(everything if component == "all" else components.layers_having(pair.config)[component])}
    number = {everything: 1} if io == "cpt" else {(): 0} if component == "all" else {}
    swapper, made = in_memory.Swapper(pair), components.Recipes(pair)
    points: dict[str, list[list[int]]] = {}
    for name, rows in sweeps.items():
        for k, kept in rows:
            key = tuple(sorted({*kept} | alike))
            if key not in number:
                number[key] = len(models)
                edits = recipe(pair, made, kept, component, io)
                models.append(swapper.condition(f"{name}({k})", edits, kept=list(kept)))
            points.setdefault(name, []).append([k, number[key]])
    return models, points


@dataclass(frozen=True)
class Bench:
    """What is measured on every model.

    Attributes:
        test: the measures of `evaluation`, including the loss on text in the base language.
        translation: pairs to translate in context, or None.
        facts: what the header records about all of these.
        judge, chrf: scores of greedy translations, or None.
    """

    test: evaluation.Test
    translation: in_context.Translation | None
    facts: dict
    judge: Callable | None = None
    chrf: Callable | None = None

    def on(self, model, arch, tokenizer, name: str) -> dict:
        """`units`: measure -> a value for each sentence, document or row; `values`: their means."""
        tested = self.test.on(model, arch, tokenizer, name)["units"]
        units = self.translation.nlls(model, tokenizer, self.test.batch_size) if self.translation else {}
        for function in retention.FUNCTIONS if self.translation else ():
            pairs = zip(units[f"{function}_shuffled"], units[function], strict=True)
            units[f"{function}_saved"] = [shuffled - true for shuffled, true in pairs]
        if self.chrf:
            translations = self.translation.translate(model, tokenizer, self.test.batch_size)
            for function, texts in translations.items():
                side = in_context.FUNCTIONS[function][1]
                pairs = zip(texts, getattr(self.translation, side), strict=True)
                units[f"chrf_{function}"] = [self.chrf(text, reference) for text, reference in pairs]
                units[f"language_{function}"] = self.judge(texts, side)
        units |= {"nll_target": tested.pop("nll_per_byte", None)} | tested
        units["nll_base"] = next((values for key, values in tested.items() if key.startswith("nll_per_byte:")), None)
        return evaluation.record({key: units[key] for key in retention.MEASURES if units.get(key) is not None}, name)


def payload_of(records: list[dict], sweeps: dict[str, list[list[int]]], n: int, seed: int) -> dict:
    """The result, from the records of `models_of`, B and C first."""
    kept = {
        name: retention.Retention([row["units"][name] for row in records], 0, 1, retention.MEASURES[name], seed)
        for name in records[0]["units"]
    }
    sides = tuple(sweeps.get(name, []) for name in ("insert_in", "insert_out"))
    if min(map(len, sides)) < 3:  # nothing was measured between the ends, which both sides share
        sides = None
    floor = retention.floor(records[1]["units"], seed)
    return {
        "conditions": [{key: value for key, value in row.items() if key != "units"} for row in records],
        "sweeps": sweeps,
        "retention": {name: {key: each.at(rows) for key, each in kept.items()} for name, rows in sweeps.items()},
        "intervals": {name: {key: each.intervals(rows) for key, each in kept.items()} for name, rows in sweeps.items()},
        "summary": {key: retention.summary(each, sides, n) for key, each in kept.items()},
        "translates": floor,
        "specialisation": retention.specialisation(kept, sides, floor),
        "specialisation_saved": retention.specialisation(kept, sides, floor, "_saved"),
    }


# ---------------------------------------------------------------- the arguments


def bench_from_arguments(args, study: Study) -> Bench:
    """The bench that the arguments ask for, checked before any model is loaded.

    Raises:
        InputError: no parallel sentences or too few of them, or a measure lacks its data or package.
    """
    codes, translation, judged = evaluation.languages_from_arguments(args, study, {}), None, {}
    base = codes["base"] or "the base language"
    files = {base: args.heldout_base} if args.heldout_base else study.get("data.heldout", {})
    key = languages.find(files, base, default=None)
    of_base = {} if key is None else {base: files[key]}
    test = evaluation.test_from_arguments(args, study, {}, retrieval.of_pairs, of_base)
    facts = test.facts | {"limit": args.limit}
    if test.others:
        facts["heldout_base"] = facts.pop("heldout_others")[base]
    if "translation" in (args.measures or KINDS):
        translation = translation_from_arguments(args, study, codes)
        facts["in_context"] = translation.facts | {"generate": args.generate}
        for side, code in codes.items():
            facts[f"{side}_lang"] = languages.canonical(code, any_tag=True)
    if args.generate and translation is None:
        raise InputError("--generate needs translation, which --measures leaves out")
    if args.generate:
        judged = {"judge": in_context.language_judge(study, codes), "chrf": in_context.chrf()}
    if translation is None and not test.measures():
        raise InputError("nothing to measure: there are no parallel sentences, no held-out text and no task")
    return Bench(test, translation, facts, **judged)


def translation_from_arguments(args, study: Study, codes: dict) -> in_context.Translation:
    pairs, form, n_shots = in_context.asked_for(args, study, codes)
    wanted = [n for n in (study.value(args.sentences, "--sentences", "ablation.sentences", None), args.limit) if n]
    drawn = in_context.draw(pairs, n_shots, min(wanted, default=None), form, study.seed)
    cli.say(f"translation of {len(drawn.base)} pairs after {len(drawn.shots)} others (prompt: {form})")
    return drawn


def sweeps_from_arguments(args, study: Study, pair: surgery.Pair) -> dict[str, list]:
    place = layer_sets.Place(pair.config, study.plain, [pair.base_ref.describe(), pair.target_ref.describe()])
    words = study.value(args.sweeps, "--sweeps", "ablation.sweeps", sets.DEFAULT)
    stride = int(study.value(args.stride, "--stride", "ablation.stride", 1))
    return sets.sweeps([layer_sets.words_of(word) for word in words], place, stride)


def refuse_other_vocabulary(pair: surgery.Pair, run) -> None:
    """Refuse --io base if embeddings and head of the base belong to another vocabulary than the checkpoint's."""
    difference = tokenizer_id.diff_vocabularies(pair.base_ref, pair.target_ref, run)
    if difference:
        raise InputError(
            f"--io base: {pair.base_ref.spec} and {pair.target_ref.spec} have different vocabularies ({difference}); "
            "use --io cpt"
        )


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("base", nargs="?", metavar="BASE", help="base model; default: the study's base")
    add("target", nargs="?", metavar="TARGET", help="checkpoint of CPT; default: the last of the study's run")
    cli.add_named_models(p, "BASE", "TARGET: the last, or that of --steps, is the target")
    add("-o", "--output", metavar="OUT", help="JSON to write; default: the study's layer-ablation/sweep.json")
    g = p.add_argument_group("which models")
    text = "insert_in insert_out ablate_in ablate_out outer inner window[:w], or layers (random:m:seed, outer:0.25, "
    text += "0,2,5-7, ..): see the README; default: the study's ablation.sweeps, else those with a name"
    g.add_argument("--sweeps", nargs="+", metavar="SWEEP", help=text)
    text = "every N-th block from either side; default: the study's ablation.stride, else 1"
    g.add_argument("--stride", type=cli.positive, metavar="N", help=text)
    g.add_argument("--component", choices=COMPONENTS, default="all", help="part of the blocks to revert; default all")
    text = "whose embeddings, final norm and head; default cpt (the checkpoint's)"
    g.add_argument("--io", choices=("cpt", "base"), default="cpt", help=text)
    g = p.add_argument_group("translation in context")
    text = f"pairs in the prompt; default: the study's ablation.shots, else {in_context.SHOTS}"
    g.add_argument("--shots", type=cli.positive, metavar="N", help=text)
    text = "pairs: sentences joined by spaces; lines: one per line; default: the study's ablation.prompt, else pairs "
    text += "if the study trains its base (cpt/ and demo/ train on pairs), lines otherwise"
    g.add_argument("--prompt", choices=tuple(in_context.FORMS), help=text)
    text = "pairs to score; default: the study's ablation.sentences, else all"
    g.add_argument("--sentences", type=cli.positive, metavar="N", help=text)
    text = "also translate: chrF, and the share of translations in the right language"
    g.add_argument("--generate", action="store_true", help=text)
    cli.add_run_flags(p)
    evaluation.add_flags(p, KINDS)
    p.add_argument("--heldout-base", metavar="FILE", help="text in the base language; default: the study's")
    sources.add_flags(p)
    cli.add_forward_flags(p, batch_size=None, device_map=True)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    base, run, base_ref, target = beside.pair_asked_for(study, args)
    variant = [beside.name(study, base, run, args.steps, args.limit, last=True)]
    variant += ["" if args.component == "all" else args.component, "" if args.io == "cpt" else "io-base"]
    output = study.output(args.output, "-o", "layer_ablation", dotted(*variant))
    bench = bench_from_arguments(args, study)
    with surgery.Pair(base_ref, target) as pair:
        if args.io == "base":
            refuse_other_vocabulary(pair, study.get("run"))
        models, sweeps = models_of(pair, sweeps_from_arguments(args, study, pair), args.component, args.io)
        measure(pair, bench, models, sweeps, output, args, study)


def measure(pair, bench: Bench, wanted: list[Condition], sweeps, output: Path, args, study) -> None:
    """Measure every model once and write the result."""

    def payload(records: list[dict]) -> tuple[dict, dict]:
        return payload_of(records, sweeps, pair.n_layers, study.seed), controls.units_of(records)

    def report(result: dict) -> None:
        say(result)
        cli.say(f"wrote {output} and the figure {output.with_suffix('.pdf')}")

    trial = Trial.from_arguments(args, study, pair.models, bench, study.get("run"))
    how = {"component": args.component, "io": args.io}
    cli.say(f"{len(wanted)} different models in {', '.join(f'{k} ({len(v)})' for k, v in sweeps.items())}")
    trial.measure(
        output, wanted, SCHEMA, {"sweeps": sweeps} | how, payload, {"n_layers": pair.n_layers} | how,
        functools.partial(figure.draw, n=pair.n_layers), report, bench.translation and bench.translation.refuse_long,
        estimate=True,
    )  # fmt: skip


def say(payload: dict) -> None:
    """Print the gain in each measure, how early in the stack it arises, and the specialisation."""
    base, target = payload["conditions"][:2]
    for name, row in payload["summary"].items():
        text, gain = f"{name}: {base['values'][name]:.4f} base, {target['values'][name]:.4f} checkpoint", row["gain"]
        if row["A"]:
            areas = f"area from the input {row['auc_in']:.2f}, from the output {row['auc_out']:.2f}"
            text += f"; {areas}, A {stats.told(row['A'], '+.3f')}"
        elif gain["ci_low"] <= 0 <= gain["ci_high"]:
            text += "; not clearly changed by CPT, so no share of the gain is given"
        cli.say(text)
    for key, label in (
        ("specialisation", "specialisation"),
        ("specialisation_saved", "the same for the reduction by the source"),
    ):
        row = payload[key]
        cli.say(
            f"{label}: none, {row['why']}"
            if row["value"] is None
            else f"{label}: {stats.told(row, '+.3f')} (above 0: perception early, production late)"
        )


if __name__ == "__main__":
    cli.run(main)
