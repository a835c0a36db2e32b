"""Can a direction in the residual stream make a model write the new language, and does it then say what it should?

The model continues a sentence of the source language, the base's; it should write the translation into the target
language, although nothing in the prompt says so. DiffMean: v is the mean residual of the target's tokens minus that of
the source's at one layer's output, over sentences other than the scored ones; alpha v is added to that output at every
position, one layer at a time. Controls: random directions of equal norm; the source's neurons off and the target's held
at their mean (LAPE); and a prompt that shows translations, without steering.

In:   B and RUN (default: the study's base and the last checkpoint of its run; --steps: these checkpoints), parallel
      sentences, and for the neurons MASK (default: the study's).
Out:  OUT (default: the study's steering/steering.json): `sweep`, `whole`, `best`, `beyond`, `residual`, `samples`;
      next to it .pt (every sentence) and a figure.

A killed run resumes with the next condition. On several GPUs: accelerate launch steering/steer.py ...

Full: python steering/steer.py --base meta-llama/Llama-2-7b-hf --run runs/eus --base-lang eng_Latn --target-lang eus_Latn --source flores --output steering.json
Tiny: python steering/steer.py --study demo/tiny.yaml
"""  # noqa: E501

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, languages, results, sources
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np, torch
from cpt_utils.base.study import Study
from cpt_utils.interventions import activations
from cpt_utils.interventions.condition import Condition
from cpt_utils.measures import evaluation, masks, over_run
from cpt_utils.models import batching, loading
from cpt_utils.models.trace import trace

in_context, judges = cli.sibling("layer-ablation/in_context.py"), cli.sibling("steering/judges.py")
deactivate, shown = cli.sibling("lsn/deactivate.py"), cli.sibling("steering/steer_report.py")

SCHEMA = "steering"
RESULTS = {"steering": "steering/steering.json"}
ASKED = {"steering": "Does a direction make the model write the new language, and what it should, before/after CPT?"}
CAPTIONS = {
    "steering": """Part V: 1. Steering
        The model continues sentences of the base's language while a multiple of the difference between the languages'
        mean residuals (DiffMean) is added to one layer's output: the share of continuations in the new language, how
        far they say what they should (relevance), and the harmonic mean of both (score), by layer, at the base and at
        the checkpoint. Grey: random directions of equal norm, mean and range over multiples. Horizontal lines: nothing
        done, a prompt with translations and no steering, and neurons of the base's language off with those of the new
        language at their mean.""",
}
WRITTEN = "production"  # in_context's name for the target sentence after the base's
ALPHAS, DRAWS, SENTENCES = (0.5, 1.0, 1.5, 2.0), 3, 100
ESTIMATED = 500  # most pairs to take means over


# ---------------------------------------------------------------- the method


@dataclass(frozen=True)
class Means:
    """Means over the tokens of a language's text at each layer, in float64.

    Attributes:
        residual: [layers, hidden], the mean output of a layer; norm: [layers], the mean norm of that output.
        neurons: layer -> [neurons], the mean input of the down projection, for the layers asked for.
    """

    residual: torch.Tensor
    norm: torch.Tensor
    neurons: dict[int, torch.Tensor]


def means(model, arch, tokenizer, texts: Sequence[str], layers: Iterable[int] = (), batch_size=None) -> Means:
    """`Means` over all tokens of `texts` pooled, except the first of each, where pre-trained models put massive
    activations, and those that the tokenizer adds. Padding is excluded.

    Args:
        layers: layers with a dense FFN for which the inputs of the down projection are wanted.
    """
    encoded, device = batching.encode(tokenizer, list(texts), batching.positions(model)), loading.input_device(model)
    parts: list[dict] = []

    def step(rows: list[int]) -> None:
        ids, mask = batching.padded([encoded.ids[i] for i in rows], tokenizer.pad_token_id)
        text = [[int(at > 0 and not flag) for at, flag in enumerate(encoded.special[i])] for i in rows]
        keep, sums = batching.padded(text, 0)[0].bool().flatten(), {}

        def see(name: str, layer: int, value: torch.Tensor) -> None:
            value = value[0] if arch.streams and value.dim() == 4 else value
            tokens = value.reshape(-1, value.shape[-1])[keep.to(value.device)].double()
            sums[name, layer] = tokens.sum(0).cpu()
            sums[f"{name} norm", layer] = torch.linalg.vector_norm(tokens, dim=1).sum().cpu()

        points = [(m, "output", functools.partial(see, "residual", i)) for i, m in enumerate(arch.layers(model))]
        points += [(arch.down_module(model, i), "input", functools.partial(see, "neurons", i)) for i in layers]
        with trace(*points), torch.inference_mode():
            arch.decoder(model)(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        parts.append(sums)  # whole batches only: if memory runs out, a batch is split and run again

    batching.for_each(model, "means", [len(row) for row in encoded.ids], step, batch_size)
    total = sum(not flag for row in encoded.special for flag in row[1:])
    if not total:
        raise InputError("the sentences to estimate the direction on have one token each; give others")

    def mean(name: str, layer: int) -> torch.Tensor:
        return sum(part[name, layer] for part in parts) / total

    every = range(len(arch.layers(model)))
    stacked = (torch.stack([mean(name, i) for i in every]) for name in ("residual", "residual norm"))
    return Means(*stacked, {i: mean("neurons", i) for i in layers})


def random_like(vector: torch.Tensor, seed: Sequence[int]) -> torch.Tensor:
    """A random direction with the norm of `vector` [hidden]."""
    drawn = torch.from_numpy(np.random.default_rng(seed).standard_normal(len(vector)))
    return drawn * (vector.norm() / drawn.norm())


def steered(model, arch, layer: int, vector: torch.Tensor) -> contextlib.AbstractContextManager:
    """The model with `vector` [hidden] added to a layer's output at every position; unchanged for a zero vector."""
    if not vector.any():
        return contextlib.nullcontext()

    def add(hidden: torch.Tensor) -> torch.Tensor:
        moved = hidden + vector.to(hidden)
        return torch.cat([moved[:1], hidden[1:]]) if arch.streams and hidden.dim() == 4 else moved

    return trace((arch.layers(model)[layer], "output", add))


@dataclass(frozen=True)
class Neurons:
    """The neurons of the source and the target language by layer, or as many random ones (if `draw` is not None)."""

    source: masks.Layers
    target: masks.Layers
    draw: int | None = None

    @property
    def layers(self) -> list[int]:
        return [layer for layer, neurons in self.target.items() if neurons]

    @contextlib.contextmanager
    def switched(self, model, arch, mean: dict[int, torch.Tensor]):
        """The source's neurons off and the target's at their `mean`; a neuron of both is at its mean."""
        values = {i: {neuron: float(mean[i][neuron]) for neuron in self.target[i]} for i in self.layers}
        with activations.silenced(model, arch, self.source), activations.held(model, arch, values):
            yield


@dataclass
class Bench:
    """Everything that conditions need for a loaded model: the means of both languages, and the measurement.

    Attributes:
        bare, shots: source sentences to continue, alone and after translated pairs.
        estimate: (source, target) sentences to take means over, none of them scored.
        judge: judge of the generated texts; None: nothing is generated.
        known: model -> (means of the source, of the target) of the loaded model; tokenizer: its tokenizer.
    """

    bare: in_context.Translation
    shots: in_context.Translation
    estimate: tuple[list[str], list[str]]
    judge: judges.Judge | None
    seed: int
    batch_size: int | None = None
    known: dict[str, tuple[Means, Means]] = field(default_factory=dict)
    tokenizer: object = None

    def learn(self, name: str, model, arch, tokenizer, layers: Sequence[int] = ()) -> None:
        """Prepare for the conditions of a model just loaded; `layers`: those with neurons of the target."""
        self.shots.refuse_long(model, tokenizer)
        self.tokenizer, (source, target) = tokenizer, self.estimate
        self.known = {name: (means(model, arch, tokenizer, source, (), self.batch_size),
                             means(model, arch, tokenizer, target, layers, self.batch_size))}  # fmt: skip

    def direction(self, name: str, layer: int, draw: int | None = None) -> torch.Tensor:
        """DiffMean at a layer's output [hidden], or a random direction of equal norm."""
        source, target = self.known[name]
        difference = target.residual[layer] - source.residual[layer]
        return difference if draw is None else random_like(difference, [self.seed, layer, draw])

    def along(self, name: str, layer: int, alpha: float, draw: int | None, arch, model):
        return steered(model, arch, layer, alpha * self.direction(name, layer, draw))

    def switch(self, name: str, neurons: Neurons, arch, model):
        return neurons.switched(model, arch, self.known[name][1].neurons)

    def on(self, model, one: Condition) -> dict:
        """Units of every sentence: `nll_reference` (nats over the mean bytes of a reference), `likelier` (1 if the
        reference is likelier after its own source than after another's, -1 if not), and for the generated text
        `language`, `relevance` and, in a made-up world, `exact`; the texts."""
        translation = self.shots if one.name == "prompt" else self.bare
        how = model, self.tokenizer, self.batch_size, [WRITTEN]
        losses = translation.nlls(*how)
        paired, shuffled = losses[WRITTEN], losses[f"{WRITTEN}_shuffled"]
        units = {
            "nll_reference": paired,
            "likelier": [float(np.sign(round(b - a, 6))) for a, b in zip(paired, shuffled, strict=True)],
        }
        texts = None
        if self.judge:
            texts = translation.translate(*how, at_least=1)[WRITTEN]  # an empty text has no language
            units |= {"language": self.judge.language(texts), "relevance": self.judge.relevance(texts, translation)}
        if self.judge and self.judge.name == "world":
            units["exact"] = [float(a == b) for a, b in zip(texts, translation.target, strict=True)]
        return {**evaluation.record(units, f"{one.facts['model']}, {one.name}"), "texts": texts}


def conditions_of(
    names: Sequence[str], bench: Bench, arch, layers: Sequence[int], alphas: Sequence[float], draws: int,
    neurons: Sequence[Neurons] = (),
) -> list[Condition]:  # fmt: skip
    """For every model: nothing done, prompt, neurons; at each layer and alpha DiffMean and random directions."""
    conditions = []
    for name in names:

        def add(kind: str, apply=contextlib.nullcontext, more: dict | None = None, name=name, **facts) -> None:
            facts = {"model": name, "layer": None, "alpha": None, "draw": None} | facts
            conditions.append(Condition(kind, facts | (more or {}), apply, facts, of=name))

        add("none")
        add("prompt")
        for each in neurons:
            kind = "lape" if each.draw is None else "lape_random"
            more = {"off": each.source, "at_mean": each.target}
            add(kind, functools.partial(bench.switch, name, each, arch), more, draw=each.draw)
        for layer in layers:
            for alpha in alphas:
                for draw in (None, *range(draws)):
                    apply = functools.partial(bench.along, name, layer, alpha, draw, arch)
                    kind = "diffmean" if draw is None else "random"
                    add(kind, apply, layer=layer, alpha=alpha, draw=draw)
    return conditions


# ---------------------------------------------------------------- the request


def sentences(pairs: sources.ParallelText, n_shots: int, n_scored: int, form: str, seed: int):
    """The sentences to continue (alone, and after shots), and the sentences of both sides to take means over.

    Raises:
        InputError: too few pairs.
    """
    shots = in_context.draw(pairs, n_shots, n_scored, form, seed)
    used = {*shots.base, *shots.target, *(text for pair in shots.shots for text in pair)}
    rest = [i for i in range(len(pairs)) if not {pairs.base[i], pairs.target[i]} & used][:ESTIMATED]
    if len(rest) < 2:
        raise InputError(
            f"{len(pairs)} sentence pairs leave {len(rest)} that are not scored or shown, too few to estimate the "
            "direction on; give fewer --sentences or --shots, or more pairs"
        )
    return replace(shots, shots=[]), shots, ([pairs.base[i] for i in rest], [pairs.target[i] for i in rest])


def bench_from_arguments(args, study: Study, codes: dict[str, str]) -> tuple[Bench, dict]:
    """The measurement and its facts for the header; before any model is loaded."""
    pairs, form, n_shots = in_context.asked_for(args, study, codes)
    most = min(SENTENCES, len(pairs) // 2)
    n = min(int(study.value(args.sentences, "--sentences", "steering.sentences", most)), args.limit or len(pairs))
    bare, shots, estimate = sentences(pairs, n_shots, n, form, study.seed)
    judge = None if args.no_generate else judges.judge_of(study, codes["target"])
    facts = {"in_context": shots.facts, "estimated_on": len(estimate[0]), "limit": args.limit, "seed": study.seed}
    facts |= {f"{side}_lang": languages.canonical(code, any_tag=True) for side, code in codes.items()}
    facts["judge"] = judge.name if judge else None
    cli.say(f"{len(bare.base)} sentences to continue, directions from {len(estimate[0])} other pairs (prompt: {form})")
    return Bench(bare, shots, estimate, judge, study.seed, args.batch_size), facts


def neurons_from_arguments(args, run: over_run.OverRun, codes: dict[str, str], draws: int):
    """The neurons of both languages and random ones, and the mask file; none, with a message, if the study has none.

    Raises:
        InputError: --mask_file lacks the languages or their neurons, or has neurons of experts; the study's mask is of
            another model than the study's.
    """
    study, ref = run.study, run.last
    file = Path(args.mask_file) if args.mask_file else study.result("lsn_mask")
    why = None if file and file.is_file() else f"{file} does not exist" if file else "no mask is given"
    known = [] if why else masks.languages_in(file)
    why = why or next((f"{file} lacks {code}" for code in codes.values()
                       if languages.find(known, code, default=None) is None), None)  # fmt: skip
    if not why:
        try:
            masked = deactivate.masks_of(ref, file, [*codes.values()], run.models[over_run.BASE].spec, run.homes[0])
        except InputError as error:
            if args.mask_file or not (args.base or args.run):
                raise
            why = str(error)  # the study's mask belongs to its own models, not to those asked for
    if not why:
        arch, config = archs.for_config(ref.config()), ref.config()
        expert = [i for i in range(len(masked.widths)) if any(group.experts for group in arch.neurons(config, i))]
        empty = [code for code, layers in masked.own.items() if not any(layers.values())]
        why = f"neurons of experts (layer {expert[0]}) cannot be held at their mean" if expert else None
        if len(empty) == len(masked.own):
            why = f"{file} has no neurons of {' and '.join(empty)}"
        elif empty and not why:
            cli.warn(f"{file} has no neurons of {empty[0]}: only those of the other language are switched")
    if why and args.mask_file:
        raise InputError(f"--mask_file: {why}; leave it out")
    if why:
        cli.say(f"no neurons are switched: {why}")
        return [], None
    drawn = [masks.random_control(masked.everyone, len(masked.widths), masked.widths, f"{study.seed}/{k}")
             for k in range(draws)]  # fmt: skip
    named = [languages.find(masked.everyone, code) for code in codes.values()]
    treatment = Neurons(*(masked.own[code] for code in codes.values()))
    return [treatment, *(Neurons(*(control[name] for name in named), k) for k, control in enumerate(drawn))], file


def sweep_from_arguments(args, study: Study, n_layers: int) -> tuple[list[int], list[float]]:
    """The layers to steer, and the alphas."""
    layers = sorted({*study.value(args.layers, "--layers", "steering.layers", range(n_layers))})
    wrong = [layer for layer in layers if not 0 <= layer < n_layers]
    if wrong:
        raise InputError(f"--layers {wrong[0]}: the model has layers 0 to {n_layers - 1}")
    alphas = sorted({*map(float, study.value(args.alphas, "--alphas", "steering.alphas", ALPHAS))} - {0.0})
    if not alphas or not all(map(math.isfinite, alphas)):
        raise InputError("--alphas: give finite numbers other than 0, which leaves the model unchanged")
    return layers, alphas


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("--base-lang", metavar="LANG", help="source language; default: the study's languages.base")
    add("--target-lang", metavar="LANG", help="language to write; default: the study's languages.target")
    add("--mask_file", metavar="MASK", help="neurons by language (lsn/identify.py); default: the study's, if any")
    text = "multiples of the difference between the means; default: the study's steering.alphas, else "
    add("--alphas", nargs="+", type=float, metavar="A", help=text + " ".join(f"{a:g}" for a in ALPHAS))
    add("--layers", nargs="+", type=int, metavar="L", help="steered one at a time; default: the study's, else all")
    text = f"draws of random directions and random neurons; default: the study's steering.draws, else {DRAWS}"
    add("--draws", type=cli.positive, metavar="N", help=text)
    text = f"pairs to score; default: the study's steering.sentences, else {SENTENCES}, at most half of all pairs"
    add("--sentences", type=cli.positive, metavar="N", help=text)
    text = f"pairs in the prompt without steering; default: the study's ablation.shots, else {in_context.SHOTS}"
    add("--shots", type=cli.positive, metavar="N", help=text)
    text = "sentences one after the other, or one per line; default: as in layer-ablation/"
    add("--prompt", choices=tuple(in_context.FORMS), help=text)
    add("--no-generate", action="store_true", help="generate nothing: only the loss of references, no score")
    over_run.add_flags(p, RESULTS["steering"], part=" (by default only the last is measured)", drop=False)
    sources.add_flags(p)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    run = over_run.OverRun.of(args, study, "steering", last=not args.steps)
    codes = evaluation.languages_from_arguments(args, study, {})
    bench, facts = bench_from_arguments(args, study, codes)
    draws = int(study.value(args.draws, "--draws", "steering.draws", DRAWS))
    neurons, file = neurons_from_arguments(args, run, codes, draws)
    arch = archs.for_config(run.last.config())
    facts["n_layers"] = arch.n_layers(run.last.config())
    sweep = sweep_from_arguments(args, study, facts["n_layers"])
    measure(run, bench, conditions_of([*run.models], bench, arch, *sweep, draws, neurons), facts, neurons, file)


def measure(run: over_run.OverRun, bench: Bench, wanted: list[Condition], facts: dict, neurons, file) -> None:
    """Every condition measured once, and the result written."""
    neuron_layers = sorted({layer for each in neurons for layer in each.layers})  # means of neurons are needed here

    def ready(name: str, model, tokenizer) -> None:
        bench.learn(name, model, archs.for_config(run.models[name].config()), tokenizer, neuron_layers)

    def measured(model, condition: Condition, _tokenizer) -> dict:
        record = bench.on(model, condition)
        if condition.name == "none":
            norms = [float(bench.direction(condition.of, i).norm()) for i in range(facts["n_layers"])]
            record["residual"] = {"difference": norms, "norm": bench.known[condition.of][0].norm.tolist()}
        return record

    def write(records: list[dict], request: dict) -> None:
        payload, tensors = shown.summarize(records, bench.bare, bench.seed)
        payload["n_neurons"] = {side: sum(map(len, getattr(neurons[0], side).values())) for side in ("source", "target")
                                } if neurons else None  # fmt: skip
        output = run.output
        results.write_tensors(output.with_suffix(".pt"), tensors)
        shown.draw(output.with_suffix(""), payload)
        head = over_run.header_facts(request, *facts) | {"mask": file}
        results.write_json(output, payload, results.header(SCHEMA, **head))
        shown.say(payload)
        cli.say(f"wrote {output} and the figure {output.with_suffix('.pdf')}")

    asked = facts | {"batch_size": bench.batch_size}
    run.changed(SCHEMA, asked, wanted, measured, write, ready)


if __name__ == "__main__":
    cli.run(main)
