"""Cross-lingual sentence retrieval at every layer of a model, or of every checkpoint of a run (step 1).

A sentence's vector at a hidden state is the mean over its tokens. Each base-language sentence looks for its translation
among all target-language sentences by margin-scored cosine similarity; the accuracy at a hidden state is the share of
sentences that find it. Low accuracy in outer layers and high accuracy in middle ones shows where languages meet. The
same pass also gives other vectors and scores, which a single token of huge norm does not reduce to sentence length, and
how similar the geometries of the two languages are (sr_alignment.py).

In:   one or more models or runs; parallel sentences (FLORES+ dev by default, or SIB-200, two text files, a TSV).
Out:  <artifact-out>/<base>-<target>/<model id>.json with `layer_accuracy` [[0, acc], ..., [L, acc]] and more,
      next to it <model id>.pt with `hits` [L+1, sentences], and a figure: a panel per curve, a line per model. The
      same for alignment in <artifact-out>/alignment (in a study in sentence-alignment).

Full: python sentence-retrieval/sr_experiment.py --model_path meta-llama/Llama-2-7b-hf runs/eus \
          --base eng_Latn --target eus_Latn
Tiny: python sentence-retrieval/sr_experiment.py --study demo/tiny.yaml
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, figures, languages, processes, results, sources, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np, torch, transformers
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import beside, identity, opening, refs, tokenization, tokenizer_id
from cpt_utils.measures import curves, gate
from cpt_utils.models import loading, states
from cpt_utils.models.batching import Encoded, encode, for_each, padded, positions

alignment = cli.sibling("sentence-retrieval/sr_alignment.py")
figure = cli.sibling("sentence-retrieval/sr_figure.py")
chosen = cli.sibling("sentence-retrieval/sr_models.py")
scoring = cli.sibling("sentence-retrieval/sr_scores.py")
Job = chosen.Job
DIGITS = 4  # of values that are not counts: further digits are float rounding, which varies with the batch

SCHEMA = "sentence-retrieval"
RESULTS = {"retrieval": "sentence-retrieval", "alignment": "sentence-alignment"}
ASKED = {
    "retrieval": (
        "At which layers is a sentence's translation found among all others, and how does this change in training?"
    ),
    "alignment": "At which layers do both languages share one geometry, whether or not translations are found?",
}
CAPTIONS = {
    "retrieval": """Part I: 1. Sentence retrieval
        Sentence retrieval at every hidden state (0 is the embedding output, the last one is taken after the final
        norm): the base in black, checkpoints light to dark in step order, with 95 % bootstrap intervals over sentences
        for the first and the last model. Published: mean of the tokens' hidden states. Unit: every token scaled to
        length 1 first. Centred: each language's mean vector subtracted. MEXA: share of pairs whose cosine is above all
        others of both sentences. The last two panels show what the published curve may depend on: the largest token's
        share of the norm, and how closely cosines follow sentence length. Grey shading, if any, marks the states at
        which it measures length. Dashed: an untrained model of the same configuration. Claim C1, low accuracy in outer
        layers and high accuracy in middle ones, is decided on the published and on the unit, centred curve, by the peak
        and the mean of the inner states against both ends; the peak is chosen on one half of the sentences and read on
        the other, so it may be below the top of the curve.""",
    "alignment": """Part I: 1. Sentence retrieval
        How similar the geometries of the two languages are, with the same sentences, models and colours; top row:
        published vectors, which one massive token may dominate (then sentences differ in about one dimension, and the
        row shows little else); second row: tokens of length 1. Linear CKA, debiased: 1 if the geometries agree up to
        rotation and scale, 0 on average if they have nothing in common. Cosine gap: the mean cosine of translations
        minus that of all other pairs. Dimensions: the participation ratio of the covariance of a language's sentences.
        Last row: cosine between the covariances of every two hidden states, each without its first direction, for the
        first and the last model; above the diagonal the base language, below it the target language. Squares along the
        diagonal are blocks of layers.""",
    "retrieval_swapped": """Part I: 4. Layer swaps
        Sentence retrieval of the two swapped models at every hidden state, by every measure: the last checkpoint with
        the base's weights in the semantic hub's layers, and in as many layers drawn at random. One random draw decides
        nothing; the figure of the controls does.""",
    "retrieval_components": """Part II: 4. Component swaps
        Retrieval by hidden state of the last checkpoint before and after its two component swaps.""",
}
IMAGES = {
    "retrieval": "*/accuracy.png",
    "alignment": "*/alignment.png",
    "retrieval_swapped": "*/layer-swap__semantic_hub+layer-swap__random.png",
    "retrieval_components": "*/*+attn_int_swap__*+ffn_lsn_swap__*.png",
}


# ---------------------------------------------------------------- the method


def sentence_vectors(
    model: transformers.PreTrainedModel, arch: archs.Arch, sentences: Encoded, pad: int, batch_size: int | None = None,
    special_tokens: bool = True, padding_side: str = "right", desc: str = "",
) -> states.Pooled:  # fmt: skip
    """The non-padding tokens of each hidden state, pooled in every way, in one pass: [L+1, sentences, hidden] each, on
    the CPU, in float32 (float64 for a float64 model).

    Entry 0 is the embedding output; the last entry is taken after the final norm. With `special_tokens` False the
    model still reads the tokens that the tokenizer adds (BOS, EOS), but they are not pooled.
    """
    vectors, device = None, loading.input_device(model)

    def pool(rows: list[int]) -> None:
        nonlocal vectors
        ids, mask = padded([sentences.ids[i] for i in rows], pad, padding_side)
        keep = mask
        if not special_tokens:
            special, _ = padded([sentences.special[i] for i in rows], 1, padding_side)
            keep = mask * (1 - special)
            if not keep.any(1).all():
                raise InputError("a sentence consists of special tokens only; keep them in the mean, or remove it")
        ids, mask, keep = (t.to(device) for t in (ids, mask, keep))
        pooled = [part.cpu() for part in states.pooled_states(model, arch, ids, mask, keep)]
        if vectors is None:
            n = len(sentences.ids)
            vectors = states.Pooled(*(part.new_empty(len(part), n, *part.shape[2:]) for part in pooled))
        for whole, part in zip(vectors, pooled, strict=True):
            whole[:, rows] = part
        bar.update(len(rows))

    with cli.progress(desc=desc, total=len(sentences.ids), unit="sentence") as bar:
        for_each(model, "states", [len(ids) for ids in sentences.ids], pool, batch_size)
    if not all(torch.isfinite(part).all() for part in vectors):
        raise InputError("the hidden states are not finite: NaN weights, or an overflow (try --dtype float32)")
    return vectors


def measure(
    model: transformers.PreTrainedModel, arch: archs.Arch, tokenizer: transformers.PreTrainedTokenizerBase,
    base: Encoded, target: Encoded, variant: str = "ratio", k: int = 4, seed: int = 42, batch_size: int | None = None,
    special_tokens: bool = True, desc: str = "",
) -> scoring.Retrieval:  # fmt: skip
    """Retrieval between `base` and `target`, each pooled in one pass."""
    pad = tokenizer.pad_token_id
    sides = [
        sentence_vectors(model, arch, side, pad, batch_size, special_tokens, desc=f"{desc}{name}")
        for side, name in ((base, "base language"), (target, "target language"))
    ]
    lengths = tuple(
        [len(ids) - (0 if special_tokens else sum(flags)) for ids, flags in zip(side.ids, side.special, strict=True)]
        for side in (base, target)
    )
    return scoring.Retrieval(*sides, variant, k, seed, (base.first, target.first), lengths)


def of_pairs(model, arch, tokenizer, pairs: sources.ParallelText, name: str, **how) -> scoring.Retrieval:
    """`measure` on `pairs`, tokenized for the model `name`; `how` holds its other arguments.

    The swap controls run this, too, on a model that is swapped in memory.

    Raises:
        InputError: a token id that the model has no embedding for.
    """
    sides = [encode(tokenizer, texts, positions(model)) for texts in (pairs.base, pairs.target)]
    largest = max(max(ids) for side in sides for ids in side.ids)
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise InputError(
            f"{name}: token id {largest} is beyond its {rows} embeddings; the tokenizer is another model's"
        )
    return measure(model, arch, tokenizer, *sides, **how)


# ---------------------------------------------------------------- the result


def payload(found: scoring.Retrieval, model_path: str, base: str, target: str, seed: int) -> dict:
    """The JSON of one model, without its header. Accuracies are shares in [0, 1], one entry per hidden state 0..L."""

    def by_layer(values, digits: int | None = None) -> list:
        rows = values.tolist() if digits is None else values.double().round(decimals=digits).tolist()
        return [[layer, value] for layer, value in enumerate(rows)]

    units = {curve.key: getattr(found, curve.hits).double() for curve in curves.MEASURES.values()}
    units["mean_accuracy"] = (found.hits.double() + found.hits_reverse.double()) / 2
    units |= {key: getattr(found, key) for key in curves.DIAGNOSTICS}
    ends = torch.from_numpy(np.stack(stats.bootstrap_means(torch.stack(list(units.values())).numpy(), seed), -1))
    content = {"model_path": model_path, "base_lang": base, "target_lang": target, "timestamp": results.now()}
    for (key, each), interval in zip(units.items(), ends, strict=True):
        digits = DIGITS if key in curves.DIAGNOSTICS else None
        content |= {key: by_layer(each.mean(1), digits), f"{key}_ci": by_layer(interval, digits)}
    content["mean_accuracy"] = [[layer, value] for layer, value in enumerate(found.mean_accuracy)]
    content["reverse_accuracy"] = by_layer(found.hits_reverse.double().mean(1))
    content["shuffled_accuracy"] = by_layer(found.chance)
    return results.plain(content)


def finished(path: Path, wanted: dict, overwrite: bool, schema: str = SCHEMA) -> dict | None:
    """The payload of a finished result at `path` that was made as `wanted` says; None if it has yet to be made.

    Raises:
        InputError: the file was made from another model, other data or other settings.
    """
    if overwrite or not (path.is_file() and path.with_suffix(".pt").is_file()):
        return None
    content, header = results.read_json(path, schema, allow_limited=True)
    # Results of earlier versions name no tokenizer, or identify it by another kind of hash.
    known = tokenizer_id.comparable(header.get("tokenizer"), wanted["tokenizer"])
    wanted = {key: value for key, value in wanted.items() if known or key != "tokenizer"}
    before = {key: header.get(key) for key in wanted} if header else {}
    if twin := (before.get("models") or {}).get("untrained_like"):  # earlier files hold ids of special tokens
        before["models"] = {"untrained_like": identity.untrained_like(twin)}
    results.refuse_other(path, before, wanted, "another --artifact-out")
    return content


# ---------------------------------------------------------------- every model


@dataclasses.dataclass(frozen=True)
class Bench:
    """Everything a measurement depends on except the model; `how`: arguments of `measure`; `drop`: --drop-revisions;
    `aligned`: the folder for the results of sr_alignment.py, which have the same file names as those of retrieval."""

    pairs: sources.ParallelText
    process: processes.Process
    dtype: torch.dtype
    how: dict
    homes: tuple[str | None, refs.ModelRef | None]
    aligned: Path
    overwrite: bool
    languages: tuple[str, str]
    drop: bool = False

    def results(self, jobs: list[Job]) -> Iterator[tuple[Job, dict]]:
        """The payload of every job, finished ones first, then each as it is measured; only the main process yields
        payloads and writes files. Every process measures whole models, one per round.
        """
        left, facts = [], {}
        for i, job in enumerate(jobs if self.process.is_main else []):
            facts[job] = self.facts(job)
            content = finished(job.path, facts[job], self.overwrite)
            if content is not None:
                finished(self.aligned / job.path.name, facts[job], False, alignment.SCHEMA)
                cli.say(f"{job.path} is finished")
                yield job, content
            else:
                left.append(i)
        left = [jobs[i] for i in self.process.gather(left)]
        upcoming = iter(self.process.share(left)[1:])  # while one is measured, the next is read

        def measured(job: Job) -> dict:
            following = next(upcoming, None)
            if following is not None and not following.untrained and not self.drop:
                loading.prefetch(following.ref)
            return self.measured(job)

        for done in self.process.rounds(left, measured):
            for job, made in done if self.process.is_main else []:
                for schema, (content, tensors) in made.items():
                    path = job.path if schema == SCHEMA else self.aligned / job.path.name
                    results.write_tensors(path.with_suffix(".pt"), tensors)
                    results.write_json(path, content, results.header(schema, **facts[job]))
                yield job, content

    def measured(self, job: Job) -> dict[str, tuple[dict, dict[str, torch.Tensor]]]:
        """A new measurement: payload and tensors of the .pt by schema; retrieval is last, as its file ends a step."""
        ref, process = job.ref, self.process
        if job.untrained:
            model = loading.load_untrained(ref, self.dtype, process.device, self.how["seed"], process.device_map)
        else:
            model = loading.load_for(process, ref, self.dtype)
        tokenizer = tokenization.load_tokenizer(ref, *self.homes)
        desc = f"{'untrained' if job.untrained else ref.model_id}, "
        arch = archs.for_config(ref.config())
        retrieval = of_pairs(model, arch, tokenizer, self.pairs, ref.spec, **self.how, desc=desc)
        del model
        if self.drop and ref.step is not None:
            ref.drop()
        name, seed = "untrained" if job.untrained else ref.spec, self.how["seed"]
        content = payload(retrieval, name, *self.languages, seed)
        about = {key: content[key] for key in ("model_path", "base_lang", "target_lang", "timestamp")}
        aligned, maps = alignment.measure(retrieval, seed)
        return {alignment.SCHEMA: (about | aligned, maps), SCHEMA: (content, retrieval.tensors())}

    def facts(self, job: Job) -> dict:
        """The facts of the header, with which a finished file must agree."""
        config = job.ref.config()
        like = {"untrained_like": identity.untrained_like(config)}
        base, target = (languages.canonical(code, any_tag=True) for code in self.languages)
        return {
            "models": like if job.untrained else {"model": job.ref.describe()},
            "n_layers": archs.for_config(config).n_layers(config),
            "base_lang": base,
            "target_lang": target,
            "data": self.pairs.describe(),
            "n_used": len(self.pairs),
            "n_available": self.pairs.n_available,
            "limit": self.pairs.facts["limit"],
            "seed": self.how["seed"],
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.process.device.type,
            "margin_variant": self.how["variant"],
            "k": self.how["k"],
            "special_tokens": self.how["special_tokens"],
            "tokenizer": tokenizer_id.tokenizer_used(job.ref, *self.homes),
        }


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    text = "models or runs; default: the study's base and run"
    add("--model_path", "--model-path", "--run", nargs="+", metavar="M", help=text)
    add("--base", metavar="LANG", help="language of the queries, e.g. eng_Latn; default: the study's languages.base")
    add("--target", metavar="LANG", help="language that is searched; default: the study's languages.target")
    text = "default: artifacts; inside a study <results>/sentence-retrieval"
    add("--artifact-out", "--output", metavar="DIR", help=text)
    add("--margin-variant", choices=scoring.MARGINS, default="ratio", help="score of a pair; default ratio")
    add("--k", type=cli.positive, default=4, metavar="N", help="nearest neighbours of the margin; default 4")
    add("--no-special-tokens", action="store_true", help="leave BOS and EOS out of the mean; default: included")
    text = "measure only the models asked for: no untrained twin, and with --model_path not the study's base either"
    add("--no-untrained", action="store_true", help=text)
    sources.add_flags(p)
    cli.add_run_flags(p, drop=True)
    cli.add_forward_flags(p, batch_size=None, device_map=True)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    models = chosen.targets(args, study)
    base, target = chosen.sides(args, study)
    pairs = sources.from_arguments(args, study, base, target)  # before any model: missing or gated data end here
    cli.say(pairs.summary())
    opening.look_over(models)

    process, dtype = processes.from_arguments(args, study)
    given = args.artifact_out or (None if study else "artifacts")
    pair, variant = f"{base}-{target}", beside.name(study, limit=pairs.facts["limit"])
    folder = study.output(given, "--artifact-out", "retrieval", variant) / pair
    aligned = (Path(given, "alignment") if given else study.output(None, "", "alignment", variant)) / pair
    how = {"variant": args.margin_variant, "k": args.k, "special_tokens": not args.no_special_tokens}
    how |= {"seed": study.seed, "batch_size": args.batch_size}
    homes = chosen.study_homes(study)
    bench = Bench(pairs, process, dtype, how, homes, aligned, args.overwrite, (base, target), args.drop_revisions)
    double = [ref for ref in models if sum(each.model_id == ref.model_id for each in models) > 1]
    if double:
        raise InputError(
            f"{double[0].spec} and {double[1].spec} would write the same file {double[0].model_id}.json; "
            "measure them into different --artifact-out folders"
        )
    jobs = [Job(ref, folder / f"{ref.model_id}.json") for ref in models]
    twins = {} if args.no_untrained else chosen.untrained_twins(models, folder)
    jobs += dict.fromkeys(twins.values())
    payloads = {}
    for job, result in bench.results(jobs):
        payloads[job.path] = result
        if not job.untrained:
            best, at = max((accuracy, -layer) for layer, accuracy in result["layer_accuracy"])
            profile = " ".join(f"{accuracy:.2f}" for _, accuracy in result["layer_accuracy"])
            cli.say(f"{job.ref.spec}: best {best:.3f} at hidden state {-at}; by hidden state {profile}")
    if not process.is_main:
        return
    lines = [(job.ref, payloads[job.path]) for job in jobs if not job.untrained]
    curves.tell(*((ref.spec, result) for ref, result in lines))
    before = [ref.spec for ref, result in lines if curves.MEASURES["unit"].key not in result]
    if before:
        cli.say(f"measured before all curves existed: {', '.join(before)}; --overwrite measures them again")
    if twins:
        measure = study.get("measure") or "published"  # the curve the layers are split by
        key, pairs_of = curves.MEASURES[measure].key, [(job, twins[job.ref].path) for job in jobs[: len(models)]]
        has = [(job, twin) for job, twin in pairs_of if key in payloads[job.path] and key in payloads[twin]]
        gate.tell(*(gate.of_results(job.path, twin, job.ref.spec, study.seed, measure) for job, twin in has))
    untrained = payloads[twins[models[0]].path] if twins else None
    name = "accuracy" if chosen.is_whole(study, args, models) else chosen.figure_name(args.model_path, models)
    named = figures.language(base), figures.language(target)
    figure.draw(folder / name, lines, untrained, len(pairs), " to ".join(named))
    if twins or len(models) > 1:  # the workflow's calls for single models draw no figure
        files = [(ref, aligned / job.path.name) for ref, job in zip(models, jobs, strict=False)]
        twin = aligned / twins[models[0]].path.name if twins else None
        alignment.draw_files(aligned / ("alignment" if name == "accuracy" else name), files, twin, named)
    cli.say(f"wrote {len(lines)} result{'s' * (len(lines) > 1)} and the figure {folder / name}.pdf")


if __name__ == "__main__":
    cli.run(main)
