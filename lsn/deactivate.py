"""The causal check of a set of neurons: silence those of one language, and see which language loses by it.

The neurons of language d are set to zero and the mean NLL per token is measured on held-out text of every language e. The
matrix of changes has d in its rows and e in its columns. Selective neurons hurt their own language (the diagonal) more
than the others; random sets of as many neurons per layer, drawn outside all masks, say what chance gives.

In:   MODEL (default: the last checkpoint of the study's run), --mask_file of lsn/identify.py, held-out text by language
      (--heldout LANG=FILE; default data.heldout of the study), and the token ids the neurons were found on (--id_path;
      default the study's): text that stands in both is left out, so that the two are disjoint.
Out:  OUT (default: the study's lsn/deactivate.json): `unmasked`, `matrix`, `selectivity` with interval and p, `random`;
      a heat map beside it.

A killed run goes on with the next set. On several GPUs: accelerate launch lsn/deactivate.py ...; each process measures
whole sets, and the numbers are the same.

Full: python lsn/deactivate.py runs/eus/checkpoint-5000 --mask_file result/llama.json --heldout en=heldout/en.txt eu=heldout/eu.txt --id_path oscar_ids/oscar.en.train.llama oscar_ids/oscar.eu.train.llama -o deactivate.json
Tiny: python lsn/deactivate.py --study demo/tiny.yaml --random 5
"""  # noqa: E501

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, figures, languages, processes, results, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np, torch
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import beside, identity, refs, relatives, tokenization, tokenizer_id
from cpt_utils.interventions import activations
from cpt_utils.interventions.condition import Condition
from cpt_utils.measures import conditions, controls, evaluation, masks, tokenids
from cpt_utils.measures.tokenids import RUN, run_hashes
from cpt_utils.models import encoding, ffn, loading, scoring

SCHEMA = "deactivation"
RESULTS = {"deactivation": "lsn/deactivate.json"}
CAPTIONS = {
    "deactivation": """Part II: 2. Language-specific neurons
        The change of the loss per token when the neurons of one language (row) are silenced, on text of each language
        (column), beside the same for random neurons, as many in each layer. Neurons are a language's own where the
        diagonal stands out, and more than it does at random.""",
}
RANDOM = 19  # random sets a language: with them p can be .05
SHORTEST = 8  # tokens: a shorter document may be anywhere by chance
MOST_SEEN = 0.1  # of the held-out documents


# ---------------------------------------------------------------- text to find, text to test


def seen(documents: list[list[int]], ids: np.ndarray, chunk: int = 1 << 20) -> list[bool]:
    """Which documents (lists of token ids) are in `ids` [n]: half or more of their runs of tokens are.

    Runs are of tokenids.RUN tokens, in a shorter document of all it has. The first token is left out: the same words
    inside a text begin with a space, and with another token. What is then shorter than SHORTEST says nothing.
    """
    by_length: dict[int, list[int]] = {}
    for number, document in enumerate(documents):
        by_length.setdefault(min(RUN, len(document) - 1), []).append(number)
    found = [False] * len(documents)
    for length, numbers in by_length.items():
        if length < SHORTEST:
            continue
        runs = [run_hashes(np.asarray(documents[number][1:]), length) for number in numbers]
        wanted = np.unique(np.concatenate(runs))
        there = np.zeros(len(wanted), dtype=bool)
        for start in range(0, len(ids), chunk):
            there |= np.isin(wanted, run_hashes(np.asarray(ids[start : start + chunk + length - 1]), length))
        present = wanted[there]
        for number, own in zip(numbers, runs, strict=True):
            found[number] = bool(np.isin(own, present).mean() >= 0.5)
    return found


def disjoint(
    texts: dict[str, list[tuple[str, str]]], ids: list[tuple[Path, torch.Tensor]], tokenizer
) -> tuple[dict[str, list[tuple[str, str]]], dict[str, int]]:
    """The held-out documents, (context, text) by language, that no id file holds, and how many were left out.

    Raises:
        InputError: more than a tenth of a language's documents are in the text of the neurons.
    """
    kept, left_out = {}, {}
    for lang, documents in texts.items():
        encoded = encoding.of_texts(tokenizer, [text for _, text in documents], add_special_tokens=False).ids
        known = [False] * len(documents)
        for _, tokens in ids:
            known = [a or b for a, b in zip(known, seen(encoded, tokens.numpy()), strict=True)]
        left_out[lang] = sum(known)
        if left_out[lang] > MOST_SEEN * len(documents):
            raise InputError(
                f"{left_out[lang]} of {len(documents)} held-out documents of {lang} are in the text the neurons were "
                f"found on ({', '.join(str(path) for path, _ in ids)}); give other held-out text"
            )
        kept[lang] = [document for document, is_known in zip(documents, known, strict=True) if not is_known]
    return kept, left_out


# ---------------------------------------------------------------- the method


@dataclass(frozen=True)
class Masks:
    """Neurons by language, and of the languages asked for; `widths` are the neurons that each layer has."""

    everyone: dict[str, masks.Layers]
    own: dict[str, masks.Layers]
    widths: list[int]


def deactivations(own: Masks, arch: archs.Arch, n_random: int, seed: int) -> list[Condition]:
    """Nothing silenced; the neurons of each language that has some; for each of these `n_random` random sets.

    A random set has as many neurons per layer as the language's, drawn outside all masks. The facts of a condition are
    its `lang` (None: nothing is silenced) and, of a random set, its `number`.
    """

    def silencing(name: str, neurons: masks.Layers, lang: str | None, number: int | None = None) -> Condition:
        facts = {"lang": lang, "number": number}
        apply = functools.partial(activations.silenced, arch=arch, mask=neurons)
        return Condition(name, facts | {"neurons": neurons}, apply, facts)

    there = {lang: neurons for lang, neurons in own.own.items() if any(neurons.values())}
    found = [silencing("none", {}, None), *(silencing(lang, neurons, lang) for lang, neurons in there.items())]
    for number in range(n_random):
        drawn = masks.random_control(own.everyone, len(own.widths), own.widths, seed=f"{seed}/{number}")
        found += [silencing("random", drawn[languages.find(drawn, lang)], lang, number) for lang in there]
    return found


@dataclass(frozen=True)
class Loss:
    """NLL in nats and scored tokens of every document of a language."""

    nll: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """Mean NLL per token."""
        return math.fsum(self.nll) / sum(self.tokens)


def losses(model, tokenizer, texts: dict[str, list[tuple[str, str]]], batch_size: int | None) -> dict[str, list]:
    """The `scoring.TextScore` of every document, by language."""
    found = {}
    for lang, documents in texts.items():
        contexts, own = zip(*documents, strict=True)
        found[lang] = scoring.text_nlls(model, tokenizer, list(own), batch_size, list(contexts))
    return found


def selectivity(changes: dict[str, dict[str, float]]) -> dict[str, float]:
    """Row by row the diagonal minus the mean of the rest, from `changes`: deactivated -> evaluated -> change."""
    return {d: row[d] - math.fsum(v for e, v in row.items() if e != d) / (len(row) - 1) for d, row in changes.items()}


def resampled(changes: dict, tokens: dict, seed: int, draws: int = 2000) -> dict[str, dict[str, np.ndarray]]:
    """The matrix of changes in `draws` bootstrap samples of documents: deactivated -> evaluated -> float64 [draws].

    One sample of a language's documents serves the whole column, which keeps the pairing between rows.

    Args:
        changes: deactivated -> evaluated -> change of each document's NLL; tokens: evaluated -> tokens of each.
    """
    found: dict[str, dict] = {d: {} for d in changes}
    for number, (e, counts) in enumerate(tokens.items()):
        weights = stats.resample_weights(len(counts), seed + number, draws)
        total = weights @ np.asarray(counts, dtype=np.float64)
        for d, row in changes.items():
            found[d][e] = weights @ np.asarray(row[e], dtype=np.float64) / total
    return found


def summarize(records: list[dict], languages_: list[str], seed: int) -> dict:
    """Everything the result says, from the record of each of `deactivations`.

    Their `losses` are: evaluated -> {"nll": [documents], "tokens": [documents]}.
    """
    by = {(record["lang"], record["number"]): record["losses"] for record in records}
    plain = {e: Loss(**by[None, None][e]) for e in languages_}
    drawn = sorted({number for _, number in by if number is not None})

    def per_document(lang: str, number: int | None = None) -> dict[str, list[float]]:
        return {e: [a - b for a, b in zip(by[lang, number][e]["nll"], plain[e].nll, strict=True)] for e in languages_}

    def means(changes: dict[str, list[float]]) -> dict[str, float]:
        return {e: math.fsum(changes[e]) / sum(plain[e].tokens) for e in languages_}

    changes = {d: per_document(d) for d in languages_ if (d, None) in by}
    matrix = {d: means(row) for d, row in changes.items()}
    own = selectivity(matrix)
    draws = resampled(changes, {e: plain[e].tokens for e in languages_}, seed)
    resampled_own = selectivity_draws(draws)
    random = {d: [means(per_document(d, number)) for number in drawn] for d in matrix}
    chance = {d: [selectivity({d: row})[d] for row in rows] for d, rows in random.items()}
    rows = {}
    for d in matrix:
        low, high = np.quantile(resampled_own[d], (0.025, 0.975))
        rows[d] = among_random(own[d], chance[d]) | {"ci_low": float(low), "ci_high": float(high)}
    together = sum(resampled_own.values()) / len(resampled_own)
    low, high = np.quantile(together, (0.025, 0.975))
    chance_together = [math.fsum(values) / len(values) for values in zip(*chance.values(), strict=True)]
    overall = among_random(math.fsum(own.values()) / len(own), chance_together)
    intervals = {
        d: {e: [float(q) for q in np.quantile(draws[d][e], (0.025, 0.975))] for e in languages_} for d in matrix
    }
    return {
        "languages": languages_,
        "unmasked": {e: plain[e].mean for e in languages_},
        "tokens": {e: sum(plain[e].tokens) for e in languages_},
        "documents": {e: len(plain[e].tokens) for e in languages_},
        "matrix": matrix,
        "intervals": intervals,
        "selectivity": rows,
        "overall": overall | {"ci_low": float(low), "ci_high": float(high)},
        "random": random,
    }


def selectivity_draws(draws: dict) -> dict:
    """`selectivity` of every bootstrap sample: deactivated -> float64 [draws]."""
    return {d: row[d] - sum(v for e, v in row.items() if e != d) / (len(row) - 1) for d, row in draws.items()}


def among_random(own: float, others: list[float]) -> dict:
    """A selectivity among those of random sets: `p_value` = (1 + sets at least as selective) / (1 + sets)."""
    found = controls.rank_among_random(own, others, higher_is_better=True)
    kept = {key: found[key] for key in ("random_mean", "random_max", "n_random", "p_value")}
    return {"selectivity": own, **kept}


def draw(path: Path, payload: dict) -> None:
    """Heat maps of the changes in NLL per token: the languages' neurons, and the mean over random sets of as many."""
    names, rows = payload["languages"], list(payload["matrix"])
    own = np.array([[payload["matrix"][d][e] for e in names] for d in rows])
    chance = np.array([[np.mean([r[e] for r in payload["random"][d]]) for e in names] for d in rows])
    bound = max(np.abs(own).max(), np.abs(chance).max()) or 1.0
    side = 0.45 * len(names) + 0.5
    with figures.style() as plt:
        width = min(figures.PAGE, 2 * side + 1.6)
        fig, axes = plt.subplots(1, 2, figsize=(width, 0.36 * len(rows) + 1.1), sharey=True)
        for axis, values, title in (
            (axes[0], own, "language's neurons"),
            (axes[1], chance, f"random, mean of {len(next(iter(payload['random'].values())))}"),
        ):
            image = figures.heat_map(axis, values, rows, names, bound, 35)
            axis.set_title(title)
            axis.set_xlabel("evaluated on")
        axes[0].set_ylabel("deactivated")
        fig.colorbar(image, ax=axes, label="change in NLL (nats/token)", shrink=0.9)
        figures.save(fig, path)


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("model", nargs="?", metavar="MODEL", help="model; default: the last checkpoint of the study's run")
    cli.add_named_models(p, None, "MODEL: its last checkpoint, or that of --steps")
    add("--base", metavar="B", help="base of the model, for its mask and tokenizer; default: the study's")
    add("--mask_file", metavar="MASK", help="neurons by language (lsn/identify.py); default: the study's")
    add("--lang", metavar="L,L,..", help="languages; default: the study's languages.lsn, else all of the mask")
    add("--heldout", nargs="+", metavar="LANG=FILE", help="text to test on, a document a line; default: the study's")
    add("--id_path", nargs="+", metavar="IDS", help="token ids the neurons were found on; default: the study's")
    add(
        "--random",
        type=int,
        metavar="N",
        help=f"random sets a language, 5 or more; default {RANDOM}, or the study's `controls` where that is smaller",
    )
    add("-o", "--output", metavar="OUT", help="JSON to write; default: the study's lsn/deactivate.json")
    cli.add_run_flags(p, drop=True)
    cli.add_forward_flags(p, batch_size=None, device_map=True)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed)
    n_random = random_sets(args.random, study)
    run = cli.named(args.model, args.named_run, "MODEL and --run")
    ref = beside.model_or_last(study, args.model, args.named_run, "MODEL", args.steps)
    base, home = args.base or study.get("base"), beside.run_asked_for(study, args.named_run)
    mask_file = study.input(args.mask_file, "--mask_file", "lsn_mask")
    other = beside.name(study, args.base, run, steps=args.steps, limit=args.limit, last=True)
    output = study.output(args.output, "-o", "deactivation", other)
    neurons = masks_of(ref, mask_file, wanted_languages(args.lang, study, mask_file), base, home)
    texts, facts = heldout_texts(args, study, list(neurons.own))
    id_files = id_paths(args, study)

    process = processes.Process(args.device, args.device_map)
    dtype = cli.dtype(study.value(args.dtype, "--dtype", "dtype", None), process.device)
    tokenizer, used, texts, left_out = prepare(ref, base, home, texts, id_files)
    request = {
        "model": ref.describe(), "tokenizer": used, "masks": neurons.own, "texts": facts, "left_out": left_out,
        "limit": args.limit, "random": n_random, "seed": study.seed, "dtype": str(dtype), "device": process.device.type,
        "batch_size": args.batch_size,
    }  # fmt: skip

    def load(_role: str):
        model = loading.load_model(ref, dtype, process.device, process.device_map)
        loading.announce(model, ref)
        return model

    def measured(model, what: Condition) -> dict:
        scores = losses(model, tokenizer, texts, args.batch_size)
        found = {e: {"nll": [s.nll for s in row], "tokens": [s.tokens for s in row]} for e, row in scores.items()}
        if not all(math.isfinite(value) for row in found.values() for value in row["nll"]):
            raise InputError(f"{ref.spec}: the loss with {what.name} deactivated is not finite; try --dtype float32")
        return {"losses": found}

    def write(records: list[dict], request: dict) -> None:
        payload = summarize(records, list(neurons.own), study.seed) | {"left_out": left_out}
        payload["n_neurons"] = {lang: sum(map(len, own.values())) for lang, own in neurons.own.items()}
        head = results.header(
            SCHEMA, models={"model": ref.describe()}, n_layers=len(neurons.widths), ffn_width=max(neurons.widths),
            mask=mask_file, languages={lang: languages.canonical(lang, any_tag=True) for lang in neurons.own},
            heldout=facts, token_ids=[str(path) for path in id_files], limit=args.limit, seed=study.seed,
            dtype=str(dtype).removeprefix("torch."), device=str(process.device), request=request,
        )  # fmt: skip
        draw(output.with_suffix(""), payload)
        results.write_json(output, payload, head)
        say(payload)
        cli.say(f"wrote {output} and the figure {output.with_suffix('.pdf')}")

    wanted = deactivations(neurons, archs.for_config(ref.config()), n_random, study.seed)
    conditions.measure(output, SCHEMA, request, wanted, load, measured, write, process, args.overwrite)
    if args.drop_revisions:
        ref.drop()


def random_sets(given: int | None, study: Study) -> int:
    """How many random sets each language gets."""
    if given is None:
        limit = study.get("controls")
        return min(RANDOM, max(5, limit)) if isinstance(limit, int) else RANDOM
    if given < 5:
        raise InputError(f"--random {given}: fewer than 5 random sets say nothing; give 5 or more")
    return given


def wanted_languages(given: str | None, study: Study, mask_file: Path) -> list[str]:
    """The languages of --lang, of the study or of the mask, as they are written there."""
    chosen = languages.several(given or study.get("languages.lsn") or masks.languages_in(mask_file), "--lang")
    if len(chosen) < 2:
        raise InputError("one language has no other to be compared with; give two or more with --lang")
    return chosen


def masks_of(ref: refs.ModelRef, mask_file: Path, chosen: list[str], base, home) -> Masks:
    """The mask file's neurons, for this model.

    Raises:
        InputError: a mask of another model, or no neuron of any of the languages.
    """
    widths = ffn.widths(archs.for_config(ref.config()), ref.config())
    described = relatives.of([ref], base, home)
    everyone = {
        lang: masks.read(mask_file, lang, len(widths), widths, described, control=False)
        for lang in masks.languages_in(mask_file)
    }
    own = {lang: everyone[languages.find(everyone, lang, what=str(mask_file))] for lang in chosen}
    empty = [lang for lang in chosen if not any(own[lang].values())]
    if empty:
        cli.warn(f"{mask_file} has no neuron of {', '.join(empty)}: nothing to deactivate there, a column only")
    if len(empty) == len(chosen):
        raise InputError(f"{mask_file} has no neuron of any of these languages")
    return Masks(everyone, own, widths)


def heldout_texts(args, study: Study, chosen: list[str]) -> tuple[dict, dict]:
    """Held-out documents (context, text) of every language, and what the header says of them."""
    mapping = study.get("data.heldout") or {}
    if args.heldout:
        mapping = cli.sibling("cpt/documents.py").language_files(args.heldout, "--heldout")
    together = int(study.get("data.heldout_lines") or 1) if not args.heldout else 1
    texts, facts = {}, {}
    for lang in chosen:
        key = languages.find(mapping, lang, default=None)
        if key is None:
            raise InputError(f"no held-out text of {lang}: give --heldout {lang}=FILE, or data.heldout in the study")
        path = Path(mapping[key])
        if not path.is_file():
            raise InputError(f"{path} does not exist: the held-out text of {lang}")
        texts[lang] = evaluation.documents(path, together)[: args.limit]
        facts[lang] = {"file": str(path), "sha256": results.file_sha256(path), "documents": len(texts[lang])}
    return texts, facts


def id_paths(args, study: Study) -> list[Path]:
    if args.id_path:
        return [Path(path) for path in args.id_path]
    if not study.get("tokens"):
        raise InputError("nothing says which text the neurons were found on: give --id_path IDS ..")
    return cli.sibling("lsn/activation.py").id_files(None, study)


def prepare(ref, base, run, texts: dict, id_files: list[Path]) -> tuple:
    """The tokenizer and its hash, the held-out texts that the id files do not hold, and how many were left out."""
    base = refs.model(base) if base else None
    tokenizer = tokenization.load_tokenizer(ref, run, base)
    own = tokenizer_id.of_plain_text(tokenization.tokenizer_folder(ref, run, base))
    ids = [
        (path, tokenids.read(path, vocab_size=identity.vocabulary_size(ref.config()), vocabulary_sha256=own)[0])
        for path in id_files
    ]
    texts, left_out = disjoint(texts, ids, tokenizer)
    for lang, n in left_out.items():
        if n:
            cli.say(f"{n} held-out documents of {lang} are in the text the neurons were found on, and are left out")
    return tokenizer, tokenizer_id.tokenizer_used(ref, run, base), texts, left_out


def say(payload: dict) -> None:
    """Print the matrix and what it says."""
    names = payload["languages"]
    cli.say("NLL per token: " + ", ".join(f"{e} {payload['unmasked'][e]:.4f}" for e in names))
    for d, row in payload["matrix"].items():
        found = payload["selectivity"][d]
        cli.say(
            f"without the {payload['n_neurons'][d]} neurons of {d}: "
            + ", ".join(f"{e} {row[e]:+.4f}" for e in names)
            + f"; selectivity {found['selectivity']:+.4f} [{found['ci_low']:+.4f}, {found['ci_high']:+.4f}], "
            f"{found['n_random']} random sets {found['random_mean']:+.4f}, p = {found['p_value']:.3f}"
        )
    found = payload["overall"]
    cli.say(
        f"overall selectivity {found['selectivity']:+.4f} [{found['ci_low']:+.4f}, {found['ci_high']:+.4f}], random "
        f"{found['random_mean']:+.4f}, p = {found['p_value']:.3f}"
    )


if __name__ == "__main__":
    cli.run(main)
