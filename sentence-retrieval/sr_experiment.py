"""Cross-lingual sentence retrieval at every layer of a model, or of every checkpoint of a run (step 1).

A sentence's vector at a hidden state is the mean over its tokens. Each base-language sentence looks for its translation
among all target-language sentences by margin-scored cosine similarity; the accuracy at a hidden state is the share of
sentences that find it. Low accuracy in outer layers and high accuracy in middle ones shows where languages meet.

In:   one or more models or runs; parallel sentences (FLORES+ dev by default, or SIB-200, two text files, a TSV).
Out:  <artifact-out>/<base>-<target>/<model id>.json with `layer_accuracy` [[0, acc], ..., [L, acc]] and more,
      beside it <model id>.pt with `hits` [L+1, sentences], and a figure with a line per model in step order.

Full: python sentence-retrieval/sr_experiment.py --model_path meta-llama/Llama-2-7b-hf runs/eus \
          --base eng_Latn --target eus_Latn
Tiny: python sentence-retrieval/sr_experiment.py --study demo/tiny.yaml
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_utils.base import cli, figures, languages, processes, results, sources, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import beside, identity, opening, refs, tokenization, tokenizer_id
from cpt_utils.measures import gate

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cpt_utils.architectures.archs import Arch
    from cpt_utils.models.batching import Encoded

SCHEMA = "sentence-retrieval"
RESULTS = {"retrieval": "sentence-retrieval"}
CAPTIONS = {
    "retrieval": """Part I: 1. Sentence retrieval
        Sentence retrieval accuracy at every hidden state (0 is the embedding output, the last one is taken after the
        final norm): the base in black, checkpoints light to dark in step order, with 95 % bootstrap intervals over
        sentences for the first and the last model. The dotted grey line is an untrained model of the same
        configuration, the lower one chance. Claim C1, low accuracy in outer layers and high accuracy in middle ones,
        is decided by the profile above the untrained line.""",
    "retrieval_swapped": """Part I: 4. Layer swaps
        Sentence retrieval accuracy of the two swapped models at every hidden state: the last checkpoint with the
        semantic hub's layers of the base, and with as many layers drawn at random. One random draw decides nothing;
        the figure of the controls does.""",
    "retrieval_components": """Part II: 4. Component swaps
        Retrieval over hidden states of the last checkpoint and after its two component swaps.""",
}
MARGINS = ("ratio", "distance", "absolute")
SHUFFLES = 100


# ---------------------------------------------------------------- the method


def sentence_vectors(
    model: PreTrainedModel, arch: Arch, sentences: Encoded, pad: int, batch_size: int | None = None,
    special_tokens: bool = True, padding_side: str = "right", desc: str = "",
) -> torch.Tensor:  # fmt: skip
    """Mean over the non-padding tokens of each hidden state: [L+1, sentences, hidden] on the CPU, in float32 (float64
    for a float64 model).

    Entry 0 is the embedding output; the last entry is taken after the final norm. With `special_tokens` False the
    tokens that the tokenizer adds (BOS, EOS) are read by the model but left out of the mean.
    """
    import torch

    from cpt_utils.models import loading
    from cpt_utils.models.batching import for_each, padded
    from cpt_utils.models.states import pooled_states

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
        pooled = pooled_states(model, arch, ids, mask, keep).cpu()
        if vectors is None:
            vectors = torch.empty(len(pooled), len(sentences.ids), pooled.shape[-1], dtype=pooled.dtype)
        vectors[:, rows] = pooled
        bar.update(len(rows))

    with cli.progress(desc=desc, total=len(sentences.ids), unit="sentence") as bar:
        for_each(model, "states", [len(ids) for ids in sentences.ids], pool, batch_size)
    if not torch.isfinite(vectors).all():
        raise InputError("the hidden states are not finite: NaN weights, or an overflow (try --dtype float32)")
    return vectors


def cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of every row of `x` [n, hidden] with every row of `y` [m, hidden]: [n, m]."""
    import torch

    return torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(y, dim=1).T


def margin_scores(a: torch.Tensor, variant: str = "ratio", k: int = 4) -> torch.Tensor:
    """Score of every pair from the cosines `a` [n, m] (Artetxe and Schwenk, 2019).

    With m_i the mean of the k largest entries of row i, m_j of column j, and b_ij = (m_i + m_j) / 2 + 1e-6:
    `ratio` a / b, `distance` a - b, `absolute` a. With fewer than k sentences, all of them are neighbours.
    """
    if variant == "absolute":
        return a
    rows = a.topk(min(k, a.shape[1]), dim=1).values.mean(1, keepdim=True)
    columns = a.topk(min(k, a.shape[0]), dim=0).values.mean(0, keepdim=True)
    b = (rows + columns) / 2 + 1e-6
    return a / b if variant == "ratio" else a - b


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Hits at each hidden state, boolean [L+1, sentences]; `chance` [L+1] is the accuracy of shuffled pairings."""

    hits: torch.Tensor
    hits_reverse: torch.Tensor
    hits_centred: torch.Tensor
    chance: torch.Tensor

    @property
    def accuracy(self) -> list[float]:
        """Base -> target accuracy at every hidden state: the paper's measure."""
        return _mean(self.hits)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The hits as uint8, for the `.pt` beside the JSON: step 2 resamples their sentences."""
        return {name: getattr(self, name).byte() for name in ("hits", "hits_reverse", "hits_centred")}

    @property
    def mean_accuracy(self) -> list[float]:
        """The mean of both directions at every hidden state."""
        return [(f + b) / 2 for f, b in zip(_mean(self.hits), _mean(self.hits_reverse), strict=True)]


def retrieve(
    base: torch.Tensor, target: torch.Tensor, variant: str = "ratio", k: int = 4, seed: int = 42,
    first: tuple[list[int], list[int]] | None = None,
) -> Retrieval:  # fmt: skip
    """Retrieve at every hidden state, from sentence vectors [L+1, sentences, hidden] of two languages, paired by row.

    A hit is a sentence whose highest score is its translation, or another copy of that: copies are one sentence, and
    which of them scores highest is float rounding, so that it moves with the batch. `hits_centred` is base -> target
    after each language's mean vector is taken off: what is left of a fall in accuracy that a mere offset between
    languages causes.

    Args:
        first: of base and target, where each sentence stands first in its list (`Encoded.first`); None: none repeats.
    """
    import torch

    own = torch.arange(base.shape[1])
    asks, answers = (own, own) if first is None else map(torch.tensor, first)
    generator = torch.Generator().manual_seed(seed)
    shuffles = torch.stack([torch.randperm(len(own), generator=generator) for _ in range(SHUFFLES)])
    forward, backward, centred, chance = [], [], [], []
    for x, y in zip(base, target, strict=True):
        scores = margin_scores(cosine(x, y), variant, k)
        found = answers[scores.argmax(1)]
        forward.append(found == answers)
        backward.append(asks[scores.argmax(0)] == asks)
        chance.append((found == answers[shuffles]).double().mean())
        level = margin_scores(cosine(x - x.mean(0), y - y.mean(0)), variant, k)
        centred.append(answers[level.argmax(1)] == answers)
    return Retrieval(torch.stack(forward), torch.stack(backward), torch.stack(centred), torch.stack(chance))


def measure(
    model: PreTrainedModel, arch: Arch, tokenizer: PreTrainedTokenizerBase, base: Encoded, target: Encoded,
    variant: str = "ratio", k: int = 4, seed: int = 42, batch_size: int | None = None, special_tokens: bool = True,
    desc: str = "",
) -> Retrieval:  # fmt: skip
    """Vectors of both languages, then `retrieve`."""
    pad = tokenizer.pad_token_id
    sides = [
        sentence_vectors(model, arch, side, pad, batch_size, special_tokens, desc=f"{desc}{name}")
        for side, name in ((base, "base language"), (target, "target language"))
    ]
    return retrieve(*sides, variant, k, seed, (base.first, target.first))


def _mean(hits: torch.Tensor) -> list[float]:
    return hits.double().mean(1).tolist()


# ---------------------------------------------------------------- files


def payload(found: Retrieval, model_path: str, base: str, target: str, seed: int) -> dict:
    """The JSON of one model, without its header. Accuracies are shares in [0, 1], one entry per hidden state 0..L."""

    def by_layer(values) -> list:
        return [[layer, value] for layer, value in enumerate(values)]

    low, high = stats.bootstrap_means(found.hits.numpy(), seed)
    both = (found.hits.double() + found.hits_reverse.double()) / 2
    low_both, high_both = stats.bootstrap_means(both.numpy(), seed)
    return {
        "model_path": model_path,
        "base_lang": base,
        "target_lang": target,
        "timestamp": results.now(),
        "layer_accuracy": by_layer(found.accuracy),
        "layer_accuracy_ci": by_layer(zip(low.tolist(), high.tolist(), strict=True)),
        "reverse_accuracy": by_layer(_mean(found.hits_reverse)),
        "mean_accuracy": by_layer(found.mean_accuracy),
        "mean_accuracy_ci": by_layer(zip(low_both.tolist(), high_both.tolist(), strict=True)),
        "centred_accuracy": by_layer(_mean(found.hits_centred)),
        "shuffled_accuracy": by_layer(found.chance.tolist()),
    }


def finished(path: Path, wanted: dict, overwrite: bool) -> dict | None:
    """The payload of a finished result at `path` that was made as `wanted` says; None where it is to be made.

    Raises:
        InputError: the file was made from another model, other data or other settings.
    """
    if overwrite or not (path.is_file() and path.with_suffix(".pt").is_file()):
        return None
    found, header = results.read_json(path, SCHEMA, allow_limited=True)
    # Results from before say of no tokenizer, or by another kind of hash, which it was.
    known = tokenizer_id.comparable(header.get("tokenizer"), wanted["tokenizer"])
    wanted = {key: value for key, value in wanted.items() if known or key != "tokenizer"}
    before = {key: header.get(key) for key in wanted} if header else {}
    if twin := (before.get("models") or {}).get("untrained_like"):  # files from before hold ids of special tokens
        before["models"] = {"untrained_like": identity.untrained_like(twin)}
    results.refuse_other(path, before, wanted, "another --artifact-out")
    return found


def draw(path: Path, lines: list[tuple[refs.ModelRef, dict]], untrained: dict | None, n: int, title: str) -> None:
    """Accuracy over hidden states, a line per model: the base black, checkpoints light to dark in step order."""
    steps = sorted({ref.step for ref, _ in lines if ref.step is not None})
    shades = dict(zip(steps, figures.colours(len(steps), ordered=True), strict=True))
    # Runs side by side (swapped ones) differ in dash, and their lines carry the run's name.
    runs = list(dict.fromkeys(Path(ref.spec).parent.name for ref, _ in lines if ref.step is not None))
    others = iter(figures.colours(len(lines)))
    with figures.style() as plt:
        figure, axis = plt.subplots(figsize=(figures.COLUMN, 2.9 + 0.1 * max(0, len(lines) - 9)))
        drawn = []
        for number, (ref, result) in enumerate(lines):
            name, run = Path(ref.spec).name, Path(ref.spec).parent.name
            if ref.step is not None:
                name = f"{run}, step {ref.step}" if len(runs) > 1 else f"step {ref.step}"
            is_base = number == 0 and ref.step is None and bool(steps)
            alone = ref.step is None or (len(runs) > 1 and len(steps) == 1)  # a colour of its own, not of its step
            shade = shades[ref.step] if not alone else figures.colour("base") if is_base else next(others)
            style = ("-", "--", ":", "-.")[runs.index(run) % 4] if ref.step is not None else "-" if is_base else "--"
            drawn.append((result["layer_accuracy"], {"linestyle": style, "color": shade, "label": name}))
            if number in (0, len(lines) - 1):
                low, high = zip(*(ci for _, ci in result["layer_accuracy_ci"]), strict=True)
                axis.fill_between(range(len(low)), low, high, color=shade, alpha=0.15, linewidth=0)
        figures.retrieval_axis(axis, drawn, untrained=untrained and untrained["layer_accuracy"])
        axis.axhline(1 / n, color=figures.colour("chance"), linewidth=0.8, linestyle=(0, (1, 3)), label=f"chance 1/{n}")
        axis.set_ylabel("retrieval accuracy")
        axis.set_title(f"{title}, n = {n} sentences")
        figure.legend(loc="outside lower center", ncols=3 if len(runs) < 2 else 2 if len(lines) > 4 else 1)
        figures.save(figure, path)


@dataclasses.dataclass(frozen=True)
class Job:
    """A model to measure, or its untrained twin, and the file of the result."""

    ref: refs.ModelRef
    path: Path
    untrained: bool = False


@dataclasses.dataclass(frozen=True)
class Bench:
    """Everything a measurement depends on but the model. `drop`: see --drop-revisions."""

    pairs: sources.ParallelText
    process: processes.Process
    dtype: torch.dtype
    margin: str
    k: int
    special_tokens: bool
    batch_size: int | None
    seed: int
    homes: tuple[str | None, refs.ModelRef | None]
    overwrite: bool
    languages: tuple[str, str]
    limit: int | None
    drop: bool = False

    def results(self, jobs: list[Job]) -> Iterator[tuple[Job, dict]]:
        """The payload of every job, finished ones first, then each as it is measured; nothing but the first process
        gets them, and writes. Every process measures whole models, one a round.
        """
        left, facts = [], {}
        for i, job in enumerate(jobs if self.process.is_main else []):
            facts[job] = self.facts(job.ref, job.untrained)
            found = finished(job.path, facts[job], self.overwrite)
            if found is not None:
                cli.say(f"{job.path} is finished")
                yield job, found
            else:
                left.append(i)
        left = [jobs[i] for i in self.process.gather(left)]
        own = iter(self.process.share(left)[1:])  # while one is measured, the next is fetched

        def measured(job: Job) -> tuple[dict, dict]:
            following = next(own, None)
            if following is not None and not following.untrained and not self.drop:
                from cpt_utils.models import loading

                loading.prefetch(following.ref)
            return self.measured(job)

        for found in self.process.rounds(left, measured):
            for job, (content, tensors) in found if self.process.is_main else []:
                results.write_tensors(job.path.with_suffix(".pt"), tensors)
                results.write_json(job.path, content, results.header(SCHEMA, **facts[job]))
                yield job, content

    def measured(self, job: Job) -> tuple[dict, dict[str, torch.Tensor]]:
        """A new measurement: payload, and the tensors of its .pt."""
        found = self.retrieval(job.ref, job.untrained)
        if self.drop and job.ref.step is not None:
            job.ref.drop()
        name = "untrained" if job.untrained else job.ref.spec
        return payload(found, name, *self.languages, self.seed), found.tensors()

    def facts(self, ref: refs.ModelRef, untrained: bool) -> dict:
        """What the header says, and what a finished file must agree with."""
        from cpt_utils.architectures.archs import for_config

        base, target = (languages.canonical(code, any_tag=True) for code in self.languages)
        return {
            "models": {"untrained_like": identity.untrained_like(ref.config())}
            if untrained
            else {"model": ref.describe()},
            "n_layers": for_config(ref.config()).n_layers(ref.config()),
            "base_lang": base,
            "target_lang": target,
            "data": self.pairs.describe(),
            "n_used": len(self.pairs),
            "n_available": self.pairs.n_available,
            "limit": self.limit,
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.process.device.type,
            "margin_variant": self.margin,
            "k": self.k,
            "special_tokens": self.special_tokens,
            "tokenizer": tokenizer_id.tokenizer_used(ref, *self.homes),
        }

    def retrieval(self, ref: refs.ModelRef, untrained: bool) -> Retrieval:
        """Load the model, measure, and let go of it."""
        from cpt_utils.architectures.archs import for_config
        from cpt_utils.models import loading

        if untrained:
            model = loading.load_untrained(ref, self.dtype, self.process.device, self.seed, self.process.device_map)
        else:
            model = loading.load_model(ref, self.dtype, self.process.device, self.process.device_map)
            loading.announce(model, ref)
        tokenizer = tokenization.load_tokenizer(ref, *self.homes)
        name = "untrained" if untrained else ref.model_id
        return of_pairs(
            model, for_config(ref.config()), tokenizer, self.pairs, ref.spec, variant=self.margin, k=self.k,
            seed=self.seed, batch_size=self.batch_size, special_tokens=self.special_tokens, desc=f"{name}, ",
        )  # fmt: skip


def of_pairs(model, arch, tokenizer, pairs: sources.ParallelText, name: str, **how) -> Retrieval:
    """`measure` of `pairs`, tokenized for the model `name`; `how` are its other arguments.

    Also what the swap controls run on a model that is swapped in memory.
    """
    return measure(model, arch, tokenizer, *encode_pairs(model, tokenizer, pairs, name), **how)


def encode_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: sources.ParallelText, name: str
) -> tuple[Encoded, Encoded]:
    """Both languages tokenized for `model`: (base, target).

    Raises:
        InputError: a token id that the model has no embedding for.
    """
    from cpt_utils.models.batching import encode, positions

    sides = tuple(encode(tokenizer, texts, positions(model)) for texts in (pairs.base, pairs.target))
    largest = max(max(ids) for side in sides for ids in side.ids)
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise InputError(
            f"{name}: token id {largest} is beyond its {rows} embeddings; the tokenizer is another model's"
        )
    return sides


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    add(
        "--model_path",
        "--model-path",
        "--run",
        nargs="+",
        metavar="M",
        help="models or runs; default: the study's base and run",
    )
    add("--base", metavar="LANG", help="language that asks, e.g. eng_Latn; default: the study's languages.base")
    add("--target", metavar="LANG", help="language that is searched; default: the study's languages.target")
    add(
        "--artifact-out",
        "--output",
        metavar="DIR",
        help="default: artifacts; inside a study <results>/sentence-retrieval",
    )
    add("--margin-variant", choices=MARGINS, default="ratio", help="score of a pair; default ratio")
    add("--k", type=cli.positive, default=4, metavar="N", help="nearest neighbours of the margin; default 4")
    add("--no-special-tokens", action="store_true", help="leave BOS and EOS out of the mean; default: in")
    add(
        "--no-untrained",
        action="store_true",
        help="only what was asked for: no untrained twin, nor the study's base beside the models of --model_path",
    )
    sources.add_flags(p)
    cli.add_run_flags(p, drop=True)
    cli.add_forward_flags(p, batch_size=None, device_map=True)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed)
    models = targets(args, study)
    base, target = sides(args, study)
    pairs = sources.from_arguments(args, study, base, target)  # before any model: missing or gated data end here
    cli.say(pairs.summary())
    opening.look_over(models)

    process = processes.Process(args.device, args.device_map)
    given = args.artifact_out or (None if study else "artifacts")
    place = study.output(given, "--artifact-out", "retrieval", beside.name(study, limit=pairs.facts["limit"]))
    folder = place / f"{base}-{target}"
    bench = Bench(
        pairs=pairs,
        process=process,
        dtype=cli.dtype(study.value(args.dtype, "--dtype", "dtype", None), process.device),
        margin=args.margin_variant,
        k=args.k,
        special_tokens=not args.no_special_tokens,
        batch_size=args.batch_size,
        seed=study.seed,
        homes=study_homes(study),
        overwrite=args.overwrite,
        languages=(base, target),
        limit=pairs.facts["limit"],
        drop=args.drop_revisions,
    )
    double = [ref for ref in models if sum(other.model_id == ref.model_id for other in models) > 1]
    if double:
        raise InputError(
            f"{double[0].spec} and {double[1].spec} would write the same file {double[0].model_id}.json; "
            "measure them into different --artifact-out folders"
        )
    jobs = [Job(ref, folder / f"{ref.model_id}.json") for ref in models]
    twins = {} if args.no_untrained else untrained_twins(models, folder)
    jobs += dict.fromkeys(twins.values())
    found = {}
    for job, result in bench.results(jobs):
        found[job.path] = result
        if not job.untrained:
            best, at = max((accuracy, -layer) for layer, accuracy in result["layer_accuracy"])
            profile = " ".join(f"{accuracy:.2f}" for _, accuracy in result["layer_accuracy"])
            cli.say(f"{job.ref.spec}: best {best:.3f} at hidden state {-at}; by hidden state {profile}")
    if not process.is_main:
        return
    lines = [(job.ref, found[job.path]) for job in jobs if not job.untrained]
    if twins:
        measured = jobs[: len(models)]
        gate.tell(*(gate.of_results(job.path, twins[job.ref].path, job.ref.spec, study.seed) for job in measured))
    untrained = found[twins[models[0]].path] if twins else None
    name = "accuracy" if is_whole(study, args, models) else figure_name(args.model_path, models)
    draw(folder / name, lines, untrained, len(pairs), f"{base} to {target}")
    cli.say(f"wrote {len(lines)} result{'s' * (len(lines) > 1)} and the figure {folder / name}.pdf")


def figure_name(asked: list[str] | None, models: list[refs.ModelRef]) -> str:
    """What was asked for, runs by their own name: so that two runs of many checkpoints do not make a name of pages."""
    if not asked:
        return "+".join(ref.model_id for ref in models)[:150]
    names = [refs.local_id(text) if Path(text).is_dir() else refs.ModelRef(text).model_id for text in asked]
    return "+".join(names)[:150]


def untrained_twins(models: list[refs.ModelRef], folder: Path) -> dict[refs.ModelRef, Job]:
    """The untrained twin of every model: one for each configuration among them.

    Its file is the one that is there of this configuration; else untrained.json, and where that is of another one,
    untrained.<model id>.json.
    """
    there = {path: shape_in(path) for path in sorted(folder.glob("untrained*.json"))}
    shapes = {ref: identity.shape_hash(identity.untrained_like(ref.config())) for ref in models}
    made: dict[str, Job] = {}
    for ref, shape in shapes.items():
        if shape not in made:
            usual = folder / "untrained.json"
            own = usual if there.get(usual) is None else folder / f"untrained.{ref.model_id}.json"
            path = next((path for path, found in there.items() if found == shape), own)
            there[path], made[shape] = shape, Job(ref, path, untrained=True)
    return {ref: made[shape] for ref, shape in shapes.items()}


def shape_in(path: Path) -> str | None:
    """The hash of the configuration that the untrained model at `path` has; None where nothing says it."""
    try:
        models = results.read_json(path, SCHEMA, allow_limited=True)[1]["models"]
        return identity.shape_hash(identity.untrained_like(models["untrained_like"]))
    except (InputError, KeyError):  # said where the file is looked at as a result
        return None


def targets(args, study: Study) -> list[refs.ModelRef]:
    """The models to measure: those given, else the checkpoints of the study's run; in a study its base as well."""
    named = refs.models(args.model_path, args.steps) if args.model_path else None
    spec = study.get("base") if args.model_path else study.value(None, "--model_path", "base")
    if spec is None:
        return named
    # The base is step 0, whatever its name says: it may itself be a checkpoint of a longer training.
    base = dataclasses.replace(refs.model(spec), step=None)
    if named is None:
        return [base, *refs.run(study.value(None, "--model_path", "run"), args.steps)]
    own = [ref for ref in named if ref.model_id == base.model_id]
    if own and not any(is_at(ref, base) for ref in own):  # another model of the base's name: their files are one
        return named
    others = [ref for ref in named if ref not in own]
    return [base, *others] if own or not args.no_untrained else others


def is_at(ref: refs.ModelRef, other: refs.ModelRef) -> bool:
    """Whether both are one place, however it is spelled."""
    if ref.is_local and other.is_local:
        return os.path.samefile(ref.spec, other.spec)
    return ref.spec == other.spec


def is_whole(study: Study, args, models: list[refs.ModelRef]) -> bool:
    """Whether `models` make the figure of the folder: in a study its run with the base, not parts or swapped models."""
    if len(models) < 2 or not (study and (args.model_path or args.steps)):
        return len(models) > 1
    if not study.get("run") or not study.get("base"):
        return False
    try:
        run = refs.run(study.get("run"))
    except InputError:  # not there, or not yet
        return False
    return {ref.model_id for ref in models} == {ref.model_id for ref in (refs.model(study.get("base")), *run)}


def sides(args, study: Study) -> tuple[str, str]:
    """Base and target language as they were given; in a study's own folder a language has the study's spelling."""
    found = []
    for side, flag, given in (("base", "--base", args.base), ("target", "--target", args.target)):
        own = study.get(f"languages.{side}") if args.artifact_out is None else None
        asked = own if own and given and languages.same(own, given) else given
        found.append(study.value(asked, flag, f"languages.{side}"))
    return tuple(found)


def study_homes(study: Study) -> tuple[str | None, refs.ModelRef | None]:
    """Where a checkpoint without tokenizer files gets them: the study's run folder, then its base."""
    run, base = study.get("run"), study.get("base")
    return run if isinstance(run, str) else None, refs.model(base) if base else None


if __name__ == "__main__":
    cli.run(main)
