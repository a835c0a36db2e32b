"""Where in the stack is what CPT taught: blocks of the checkpoint put back to the base's, from either side (revert).

Block l is the checkpoint's where it is in a set K, else the base's; sweeps let K grow from the input, from the output,
from both, or leave out a window. For each model: how well it understands the target language (perception: the loss of a
sentence's translation after it) and produces it (production: the loss of the sentence after its translation), beside
loss, retrieval and task. What of the gain each K keeps says whether perception comes early and production late.

In:   BASE and TARGET (model folders or hub names; default: the study's base and the last checkpoint of its run), and
      parallel sentences.
Out:  OUT.json (default: the study's layer-ablation/sweep.json): models, sweeps, retention, areas, specialisation; beside
      it .pt (every sentence) and a figure.

A killed run goes on with the next model. On several GPUs: accelerate launch layer-ablation/ablation_sweep.py ...; each
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
        What is kept of what CPT changed when only some blocks are the checkpoint's and the others the base's (revert):
        blocks put in from the input side (left) and from the output side (right), for perception (the loss of the
        translation after a sentence of the target language) and production (the other way round); below, for what the
        own source saves against another sentence's; at the bottom what is lost of the first two when a window of blocks
        is put back. Lines: the base (0) and the checkpoint (1); with no block put in embeddings and head are still the
        checkpoint's (unless --io says otherwise), so that curves need not begin at 0. Bands: 95 % bootstrap intervals
        over sentences. Claim C8, perception early and production late, is decided by the difference of the areas, where
        CPT made both better.""",
}
KINDS = ("translation", *evaluation.KINDS)
COMPONENTS = ("all", *components.COMPONENTS)


# ---------------------------------------------------------------- the method


def recipe(pair: surgery.Pair, made: components.Recipes, kept: sets.Kept, component: str, io: str) -> surgery.Recipe:
    """The checkpoint with the base's blocks, or one component of them, where `kept` does not hold them."""
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

    With C's embeddings, norm and head all blocks of C are C itself; with B's no block of C is B. A block that has
    nothing of the component is the same in both.
    """
    everything, own = tuple(range(pair.n_layers)), {"kept": list(range(pair.n_layers))}
    found = [Condition("base", {}, facts={"kept": []}, of="base"), Condition("target", {}, facts=own)]
    alike = {*everything} - {*(everything if component == "all" else components.layers_having(pair.config)[component])}
    same = {everything: 1} if io == "cpt" else {(): 0} if component == "all" else {}
    swapper, made = in_memory.Swapper(pair), components.Recipes(pair)
    numbered: dict[str, list[list[int]]] = {}
    for name, rows in sweeps.items():
        for k, kept in rows:
            whole = tuple(sorted({*kept} | alike))
            if whole not in same:
                same[whole] = len(found)
                edits = recipe(pair, made, kept, component, io)
                found.append(swapper.condition(f"{name}({k})", edits, kept=list(kept)))
            numbered.setdefault(name, []).append([k, same[whole]])
    return found, numbered


@dataclass(frozen=True)
class Bench:
    """What is measured on every model.

    Attributes:
        test: what `evaluation` measures, with the loss on text of the base language.
        translation: pairs to be translated in context, None without.
        facts: what a header says of all that.
        judge, chrf: of greedy translations, None without.
    """

    test: evaluation.Test
    translation: in_context.Translation | None
    facts: dict
    judge: Callable | None = None
    chrf: Callable | None = None

    def on(self, model, arch, tokenizer, name: str) -> dict:
        """`units`: measure -> a value for each sentence, document or row; `values`: their means."""
        own = self.test.on(model, arch, tokenizer, name)["units"]
        found = self.translation.nlls(model, tokenizer, self.test.batch_size) if self.translation else {}
        for each in retention.FUNCTIONS if self.translation else ():
            pairs = zip(found[f"{each}_shuffled"], found[each], strict=True)
            found[f"{each}_saved"] = [shuffled - true for shuffled, true in pairs]
        if self.chrf:
            made = self.translation.translate(model, tokenizer, self.test.batch_size)
            for each, texts in made.items():
                side = in_context.FUNCTIONS[each][1]
                pairs = zip(texts, getattr(self.translation, side), strict=True)
                found[f"chrf_{each}"] = [self.chrf(text, reference) for text, reference in pairs]
                found[f"language_{each}"] = self.judge(texts, side)
        found |= {"nll_target": own.pop("nll_per_byte", None)} | own
        found["nll_base"] = next((units for key, units in own.items() if key.startswith("nll_per_byte:")), None)
        return evaluation.record({key: found[key] for key in retention.MEASURES if found.get(key) is not None}, name)


def payload_of(records: list[dict], sweeps: dict[str, list[list[int]]], n: int, seed: int) -> dict:
    """What the result says, from the records of `models_of`, B and C first."""
    found = {
        name: retention.Retention([row["units"][name] for row in records], 0, 1, retention.MEASURES[name], seed)
        for name in records[0]["units"]
    }
    sides = tuple(sweeps.get(name, []) for name in ("insert_in", "insert_out"))
    if min(map(len, sides)) < 3:  # between the ends, which both sides share, nothing was measured
        sides = None
    floor = retention.floor(records[1]["units"], seed)
    return {
        "conditions": [{key: value for key, value in row.items() if key != "units"} for row in records],
        "sweeps": sweeps,
        "retention": {name: {key: one.at(rows) for key, one in found.items()} for name, rows in sweeps.items()},
        "intervals": {name: {key: one.intervals(rows) for key, one in found.items()} for name, rows in sweeps.items()},
        "summary": {key: retention.summary(one, sides, n) for key, one in found.items()},
        "translates": floor,
        "specialisation": retention.specialisation(found, sides, floor),
        "specialisation_saved": retention.specialisation(found, sides, floor, "_saved"),
    }


# ---------------------------------------------------------------- what is asked for


def bench_from_arguments(args, study: Study) -> Bench:
    """What is measured; before any model is loaded.

    Raises:
        InputError: no parallel sentences, too few of them, or a measure without its data or package.
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
        raise InputError("--generate is of translations, which --measures leaves out")
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
    """Refuse --io base where embeddings and head of the base are of other tokens than those of the checkpoint."""
    differ = tokenizer_id.diff_vocabularies(pair.base_ref, pair.target_ref, run)
    if differ:
        raise InputError(
            f"--io base: {pair.base_ref.spec} and {pair.target_ref.spec} have different vocabularies ({differ}); use "
            "--io cpt"
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
    g.add_argument("--component", choices=COMPONENTS, default="all", help="of the blocks; default all")
    text = "whose embeddings, final norm and head; default cpt (the checkpoint's)"
    g.add_argument("--io", choices=("cpt", "base"), default="cpt", help=text)
    g = p.add_argument_group("translation in context")
    text = f"pairs in the prompt; default: the study's ablation.shots, else {in_context.SHOTS}"
    g.add_argument("--shots", type=cli.positive, metavar="N", help=text)
    text = "pairs: sentences one after the other; lines: a line each; default: the study's ablation.prompt, else pairs "
    text += "where the study trains its base (cpt/ and demo/ show it pairs), lines elsewhere"
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
    other = [beside.name(study, base, run, args.steps, args.limit, last=True)]
    other += ["" if args.component == "all" else args.component, "" if args.io == "cpt" else "io-base"]
    output = study.output(args.output, "-o", "layer_ablation", dotted(*other))
    bench = bench_from_arguments(args, study)
    with surgery.Pair(base_ref, target) as pair:
        if args.io == "base":
            refuse_other_vocabulary(pair, study.get("run"))
        wanted, sweeps = models_of(pair, sweeps_from_arguments(args, study, pair), args.component, args.io)
        measure(pair, bench, wanted, sweeps, output, args, study)


def measure(pair, bench: Bench, wanted: list[Condition], sweeps, output: Path, args, study) -> None:
    """Every model measured once, and the result written."""

    def payload(records: list[dict]) -> tuple[dict, dict]:
        return payload_of(records, sweeps, pair.n_layers, study.seed), controls.units_of(records)

    def said(found: dict) -> None:
        say(found)
        cli.say(f"wrote {output} and the figure {output.with_suffix('.pdf')}")

    trial = Trial.from_arguments(args, study, pair.models, bench, study.get("run"))
    how = {"component": args.component, "io": args.io}
    cli.say(f"{len(wanted)} different models in {', '.join(f'{k} ({len(v)})' for k, v in sweeps.items())}")
    trial.measure(
        output, wanted, SCHEMA, {"sweeps": sweeps} | how, payload, {"n_layers": pair.n_layers} | how,
        functools.partial(figure.draw, n=pair.n_layers), said, bench.translation and bench.translation.refuse_long,
        estimate=True,
    )  # fmt: skip


def say(payload: dict) -> None:
    """Print what CPT gained in each measure, how early it comes, and the specialisation."""
    base, target = payload["conditions"][:2]
    for name, row in payload["summary"].items():
        said, gain = f"{name}: {base['values'][name]:.4f} base, {target['values'][name]:.4f} checkpoint", row["gain"]
        if row["A"]:
            areas = f"area from the input {row['auc_in']:.2f}, from the output {row['auc_out']:.2f}"
            said += f"; {areas}, A {stats.told(row['A'], '+.3f')}"
        elif gain["ci_low"] <= 0 <= gain["ci_high"]:
            said += "; that CPT changed it is not clear, so no share of the gain is given"
        cli.say(said)
    for key, words in (
        ("specialisation", "specialisation"),
        ("specialisation_saved", "the same of what the source saves"),
    ):
        row = payload[key]
        cli.say(
            f"{words}: none, {row['why']}"
            if row["value"] is None
            else f"{words}: {stats.told(row, '+.3f')} (above 0: perception early, production late)"
        )


if __name__ == "__main__":
    cli.run(main)
