"""The causal test of language-specific neurons: silence those of one language, and see which languages are hurt.

The neurons of language d are set to zero, and the mean NLL per token is measured on held-out text of every language e.
The matrix of changes has d in its rows and e in its columns. Selective neurons hurt their own language (the diagonal)
more than the others; without a harm on the diagonal, selectivity means nothing. Controls are random sets of as many
neurons per layer, drawn outside all masks, and, as a language's neurons fire more than most, sets that fire as often.

In:   MODEL (default: the last checkpoint of the study's run), --mask_file of lsn/identify.py, held-out text by language
      (--heldout LANG=FILE; default: the study's data.heldout), and the token ids the neurons were found on (--id_path;
      default: the study's): held-out documents in them are left out, so the two are disjoint. Firing rates are read
      from the counts of lsn/activation.py (--activation; default: the study's).
Out:  OUT (default: the study's lsn/deactivate.json): `unmasked`, `matrix`, `diagonal`, `selectivity` with interval and
      p, `random`, `active`, `halves` of the documents; and a heat map.

A killed run resumes with the next set. On several GPUs: accelerate launch lsn/deactivate.py ...; each process measures
whole sets, and the numbers are the same.

Full: python lsn/deactivate.py runs/eus/checkpoint-5000 --mask_file result/llama.json --heldout en=heldout/en.txt eu=heldout/eu.txt --id_path oscar_ids/oscar.en.train.llama oscar_ids/oscar.eu.train.llama -o deactivate.json
Tiny: python lsn/deactivate.py --study demo/tiny.yaml --random 5
"""  # noqa: E501

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, languages, processes, results, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import beside, identity, refs, relatives, tokenization, tokenizer_id
from cpt_utils.interventions import activations
from cpt_utils.interventions.condition import Condition
from cpt_utils.measures import conditions, controls, counts, evaluation, masks, tokenids
from cpt_utils.models import ffn, loading, scoring

overlap = cli.sibling("lsn/heldout_overlap.py")
report = cli.sibling("lsn/deactivate_report.py")

SCHEMA = "deactivation"
RESULTS = {"deactivation": "lsn/deactivate.json"}
ASKED = {"deactivation": "Does silencing a language's neurons harm that language, and more than silencing others does?"}
CAPTIONS = {
    "deactivation": """Part II: 2. Language-specific neurons
        The change of the loss per token when the neurons of one language (row) are silenced, on text of each language
        (column); the same for random neurons, as many in each layer; and for random neurons that also fire as often.
        The label of a row says what silencing does to the language itself. Neurons are specific to a language if the
        diagonal is a harm and exceeds the rest of its row by more than that of random neurons does.""",
}
RANDOM = 19  # random sets per language, and as many of equal activity: with these p can be .05
COUNTS = "activation_count"  # the folder that activation.py writes to in the published README


# ---------------------------------------------------------------- the method


@dataclass(frozen=True)
class Masks:
    """The neurons of all languages of a mask (`everyone`) and of those asked for (`own`), and each layer's width."""

    everyone: dict[str, masks.Layers]
    own: dict[str, masks.Layers]
    widths: list[int]


def deactivations(
    own: Masks, arch: archs.Arch, n_random: int, seed: int, rates: dict[str, np.ndarray] | None = None
) -> list[Condition]:
    """What is silenced: nothing; the neurons of each language that has any; `n_random` random sets for each of these.

    A random set has as many neurons per layer as the language, drawn outside all masks. With `rates` (see
    `firing_rates`) as many sets "active" follow, whose neurons also fire as often. The facts of a condition are its
    `lang` (None: nothing is silenced) and, for a control, its `number`.
    """

    def silencing(name: str, neurons: masks.Layers, lang: str | None, number: int | None = None) -> Condition:
        facts = {"lang": lang, "number": number}
        apply = functools.partial(activations.silenced, arch=arch, mask=neurons)
        return Condition(name, facts | {"neurons": neurons}, apply, facts)

    by_language = {lang: neurons for lang, neurons in own.own.items() if any(neurons.values())}
    made = [silencing("none", {}, None), *(silencing(lang, neurons, lang) for lang, neurons in by_language.items())]
    for number in range(n_random):
        drawn = masks.random_control(own.everyone, len(own.widths), own.widths, seed=f"{seed}/{number}")
        made += [silencing("random", drawn[languages.find(drawn, lang)], lang, number) for lang in by_language]
    for number, lang in itertools.product(range(n_random), by_language if rates else ()):
        spelling = languages.find(own.everyone, lang)
        drawn = masks.active_control(own.everyone, spelling, rates[lang], own.widths, seed=f"{seed}/{number}")
        made.append(silencing("active", drawn, lang, number))
    return made


def losses(model, tokenizer, texts: dict[str, list[tuple[str, str]]], batch_size: int | None) -> dict[str, dict]:
    """`nll` in nats and scored `tokens` of every document (context, text), by language."""
    by_language = {}
    for lang, documents in texts.items():
        contexts, scored = zip(*documents, strict=True)
        scores = scoring.text_nlls(model, tokenizer, list(scored), batch_size, list(contexts))
        by_language[lang] = {"nll": [s.nll for s in scores], "tokens": [s.tokens for s in scores]}
    return by_language


def selectivity(changes: dict[str, dict[str, float]]) -> dict[str, float]:
    """For each row the diagonal minus the mean of the rest; `changes`: deactivated -> evaluated -> change."""
    return {d: row[d] - math.fsum(v for e, v in row.items() if e != d) / (len(row) - 1) for d, row in changes.items()}


def resampled(changes: dict, tokens: dict, seed: int, draws: int = 2000) -> dict[str, dict[str, np.ndarray]]:
    """The matrix of changes in `draws` bootstrap samples of documents: deactivated -> evaluated -> float64 [draws].

    One sample of a language's documents serves the whole column, which keeps the pairing between rows.

    Args:
        changes: deactivated -> evaluated -> change of each document's NLL; tokens: evaluated -> tokens of each.
    """
    matrix: dict[str, dict] = {d: {} for d in changes}
    for number, (e, scored) in enumerate(tokens.items()):
        weights = stats.resample_weights(len(scored), seed + number, draws)
        total = weights @ np.asarray(scored, dtype=np.float64)
        for d, row in changes.items():
            matrix[d][e] = weights @ np.asarray(row[e], dtype=np.float64) / total
    return matrix


def summarize(records: list[dict], languages_: list[str], seed: int) -> dict:
    """The result except `halves`, from the records of all `deactivations`.

    Each has `losses`: evaluated -> {"nll": [documents], "tokens": [documents]}.
    """
    silenced = [record for record in records if record.get("name") != "active"]
    by_set = {(record["lang"], record["number"]): record["losses"] for record in silenced}
    unmasked = by_set[None, None]
    tokens = {e: sum(unmasked[e]["tokens"]) for e in languages_}

    def per_document(losses: dict) -> dict[str, list[float]]:
        return {e: [a - b for a, b in zip(losses[e]["nll"], unmasked[e]["nll"], strict=True)] for e in languages_}

    def means(changes: dict[str, list[float]]) -> dict[str, float]:
        return {e: math.fsum(changes[e]) / tokens[e] for e in languages_}

    def sets(drawn: list[dict]) -> dict[str, list[dict]]:
        ordered = sorted((r for r in drawn if r["number"] is not None), key=lambda r: r["number"])
        return {d: [means(per_document(r["losses"])) for r in ordered if r["lang"] == d] for d in matrix}

    changes = {d: per_document(by_set[d, None]) for d in languages_ if (d, None) in by_set}
    matrix = {d: means(row) for d, row in changes.items()}
    draws = resampled(changes, {e: unmasked[e]["tokens"] for e in languages_}, seed)
    random, active = sets(silenced), sets([record for record in records if record.get("name") == "active"])
    intervals = {
        d: {e: [float(q) for q in np.quantile(draws[d][e], (0.025, 0.975))] for e in languages_} for d in matrix
    }
    own_text = {d: diagonal(matrix[d][d], *intervals[d][d]) for d in matrix}
    rows, overall = places(matrix, draws, random, active, own_text)
    return {
        "languages": languages_,
        "unmasked": {e: math.fsum(unmasked[e]["nll"]) / tokens[e] for e in languages_},
        "tokens": tokens,
        "documents": {e: len(unmasked[e]["tokens"]) for e in languages_},
        "matrix": matrix,
        "intervals": intervals,
        "diagonal": own_text,
        "selectivity": rows,
        "overall": overall,
        "random": random,
        "active": active if any(active.values()) else None,
    }


def halves(records: list[dict], languages_: list[str], seed: int) -> dict | None:
    """`selectivity` and `overall` on the documents 0, 2, .. (`chooses`) and 1, 3, .. (`reports`) of each language, so
    that the best method is not reported on the text that chose it. None if a half of a language has no tokens."""
    by_half = {}
    for part, name in enumerate(("chooses", "reports")):
        half = [
            record | {"losses": {e: {key: row[key][part::2] for key in row} for e, row in record["losses"].items()}}
            for record in records
        ]
        if not all(sum(row["tokens"]) for row in half[0]["losses"].values()):
            return None
        summary = summarize(half, languages_, seed)
        by_half[name] = {key: summary[key] for key in ("selectivity", "overall")}
    return by_half


def diagonal(harm: float, low: float, high: float) -> dict:
    """What silencing does to the language's own text: `verdict` is harm (worse), reverse (better), or none."""
    return {
        "harm": harm,
        "ci_low": low,
        "ci_high": high,
        "verdict": "harm" if low > 0 else "reverse" if high < 0 else "none",
    }


def places(matrix: dict, draws: dict, random: dict, active: dict, own_text: dict) -> tuple[dict, dict]:
    """The selectivity of each language, and their mean: interval, rank among both kinds of control, `meaningful`."""
    measured = selectivity(matrix)
    drawn = {d: row[d] - sum(row[e] for e in row if e != d) / (len(row) - 1) for d, row in draws.items()}
    of_random, of_active = (
        {d: [selectivity({d: row})[d] for row in rows] for d, rows in sets.items()} for sets in (random, active)
    )

    def ranked(value: float, samples: np.ndarray, others: list[float], alike: list[float], own: list[dict]) -> dict:
        low, high = np.quantile(samples, (0.025, 0.975))
        row = among_random(value, others) | {"ci_low": float(low), "ci_high": float(high)}
        matched = among_random(value, alike) if alike else {"n_random": 0}
        row |= {f"active_{key}": matched.get(f"random_{key}") for key in ("mean", "max")}
        row |= {"n_active": matched["n_random"], "p_value_active": matched.get("p_value")}
        return row | {"meaningful": all(text["verdict"] == "harm" for text in own)}

    def means(sets: dict[str, list[float]]) -> list[float]:
        return [math.fsum(values) / len(values) for values in zip(*sets.values(), strict=True)]

    rows = {d: ranked(measured[d], drawn[d], of_random[d], of_active[d], [own_text[d]]) for d in matrix}
    mean, mean_drawn = math.fsum(measured.values()) / len(measured), sum(drawn.values()) / len(drawn)
    return rows, ranked(mean, mean_drawn, means(of_random), means(of_active), list(own_text.values()))


def among_random(own: float, others: list[float]) -> dict:
    """A selectivity among those of random sets: `p_value` = (1 + sets at least as selective) / (1 + sets)."""
    ranked = controls.rank_among_random(own, others, higher_is_better=True)
    return {"selectivity": own, **{key: ranked[key] for key in ("random_mean", "random_max", "n_random", "p_value")}}


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("model", nargs="?", metavar="MODEL", help="model; default: the last checkpoint of the study's run")
    cli.add_named_models(p, None, "MODEL: its last checkpoint, or that of --steps")
    add("--base", metavar="B", help="base of the model, for its mask and tokenizer; default: the study's")
    add("--mask_file", metavar="MASK", help="neurons by language (lsn/identify.py); default: the study's")
    add(
        "--method", default=masks.LAPE, metavar="M", help="the study's mask of lsn/identify.py --method M; default lape"
    )
    add("--lang", metavar="L,L,..", help="languages; default: the study's languages.lsn, else all of the mask")
    add("--heldout", nargs="+", metavar="LANG=FILE", help="test text, one document per line; default: the study's")
    add("--id_path", nargs="+", metavar="IDS", help="token ids the neurons were found on; default: the study's")
    text = f"folder of the counts that the mask was made from; default: the study's, else {COUNTS}"
    add("-a", "--activation", metavar="FOLDER", help=text)
    add(
        "--random",
        type=int,
        metavar="N",
        help=f"random sets per language, and as many of equal activity, 5 or more; default {RANDOM}, or the study's "
        "`controls` if that is smaller",
    )
    add("-o", "--output", metavar="OUT", help="JSON to write; default: the study's lsn/deactivate.json")
    cli.add_run_flags(p, drop=True)
    cli.add_forward_flags(p, batch_size=None, device_map=True)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    n_random = random_sets(args.random, study)
    run = cli.named(args.model, args.named_run, "MODEL and --run")
    ref = beside.model_or_last(study, args.model, args.named_run, "MODEL", args.steps)
    base, home = args.base or study.get("base"), beside.run_asked_for(study, args.named_run)
    mask_file = args.mask_file or masks.of_method(study.result("lsn_mask"), args.method)
    mask_file = study.input(mask_file, "--mask_file", "lsn_mask", masks.how(args.method))
    variant = beside.name(study, args.base, run, steps=args.steps, limit=args.limit, last=True)
    output = study.output(args.output, "-o", "deactivation", variant)
    output = output if args.output else masks.of_method(output, args.method)
    neurons = masks_of(ref, mask_file, wanted_languages(args.lang, study, mask_file), base, home)
    refuse_empty(neurons.own, mask_file)
    rates = firing_rates(args.activation, study, mask_file, neurons, relatives.of([ref], base, home))
    texts, facts = heldout_texts(args, study, list(neurons.own))
    id_files = id_paths(args, study)

    process, dtype = processes.from_arguments(args, study)
    tokenizer, used, texts, left_out = prepare(ref, base, home, texts, id_files)
    request = {
        "model": ref.describe(), "tokenizer": used, "masks": neurons.own, "texts": facts, "left_out": left_out,
        "limit": args.limit, "random": n_random, "seed": study.seed, "dtype": str(dtype), "device": process.device.type,
        "batch_size": args.batch_size,
    }  # fmt: skip

    def load(_role: str):
        return loading.load_for(process, ref, dtype)

    def measured(model, condition: Condition) -> dict:
        found = losses(model, tokenizer, texts, args.batch_size)
        if not all(math.isfinite(value) for row in found.values() for value in row["nll"]):
            raise InputError(f"{ref.spec}: loss with {condition.name} deactivated is not finite; try --dtype float32")
        return {"losses": found}

    def write(records: list[dict], request: dict) -> None:
        langs = list(neurons.own)
        payload = summarize(records, langs, study.seed) | {"halves": halves(records, langs, study.seed)}
        payload["n_neurons"] = {lang: sum(map(len, layers.values())) for lang, layers in neurons.own.items()}
        payload |= {"activity": activity(silenced, rates) if rates else None, "left_out": left_out}
        head = results.header(
            SCHEMA, models={"model": ref.describe()}, n_layers=len(neurons.widths), ffn_width=max(neurons.widths),
            mask=mask_file, languages={lang: languages.canonical(lang, any_tag=True) for lang in neurons.own},
            heldout=facts, token_ids=[str(path) for path in id_files], limit=args.limit, seed=study.seed,
            dtype=str(dtype).removeprefix("torch."), device=str(process.device), request=request,
        )  # fmt: skip
        report.draw(output.with_suffix(""), payload)
        results.write_json(output, payload, head)
        report.say(payload)
        cli.say(f"wrote {output} and the figure {output.with_suffix('.pdf')}")

    silenced = deactivations(neurons, archs.for_config(ref.config()), n_random, study.seed, rates)
    if rates and not args.overwrite:
        refuse_without_active(output)
    conditions.measure(output, SCHEMA, request, silenced, load, measured, write, process, args.overwrite)
    if args.drop_revisions:
        ref.drop()


def refuse_without_active(output: Path) -> None:
    """Refuse a result without sets of equal activity, which its request does not show."""
    if output.is_file() and not results.read_json(output, SCHEMA, allow_limited=True)[0].get("active"):
        raise InputError(
            f"{output} has no random sets of equal activity: it was made by an earlier version, or before "
            "lsn/activation.py; run lsn/deactivate.py --overwrite, or give another -o"
        )


def random_sets(given: int | None, study: Study) -> int:
    """The number of random sets for each language."""
    if given is None:
        limit = study.get("controls")
        return min(RANDOM, max(5, limit)) if isinstance(limit, int) else RANDOM
    if given < 5:
        raise InputError(f"--random {given}: fewer than 5 random sets say nothing; give 5 or more")
    return given


def wanted_languages(given: str | None, study: Study, mask_file: Path) -> list[str]:
    """The languages of --lang, else of the study, else of the mask, as spelled there."""
    chosen = languages.several(given or study.get("languages.lsn") or masks.languages_in(mask_file), "--lang")
    if len(chosen) < 2:
        raise InputError("one language has no other to be compared with; give two or more with --lang")
    return chosen


def masks_of(ref: refs.ModelRef, mask_file: Path, chosen: list[str], base, home) -> Masks:
    """The mask file's neurons, for this model.

    Raises:
        InputError: the mask is of another model, or lacks one of the languages.
    """
    widths = ffn.widths(archs.for_config(ref.config()), ref.config())
    described = relatives.of([ref], base, home)
    everyone = {
        lang: masks.read(mask_file, lang, len(widths), widths, described, control=False)
        for lang in masks.languages_in(mask_file)
    }
    own = {lang: everyone[languages.find(everyone, lang, what=str(mask_file))] for lang in chosen}
    return Masks(everyone, own, widths)


def refuse_empty(own: dict[str, masks.Layers], mask_file: Path) -> None:
    """Warn of languages without neurons, and refuse a mask in which none has any."""
    empty = [lang for lang, layers in own.items() if not any(layers.values())]
    if len(empty) == len(own):
        raise InputError(f"{mask_file} has no neuron of any of these languages")
    if empty:
        cli.warn(f"{mask_file} has no neuron of {', '.join(empty)}: nothing to deactivate, only a column in the matrix")


def firing_rates(
    given: str | None, study: Study, mask_file: Path, neurons: Masks, described: list[dict]
) -> dict[str, np.ndarray] | None:
    """The share of a language's tokens on which each neuron is active: language -> float64 [layers, neurons].

    For the languages that have neurons; None, with a warning, if counts are missing.

    Raises:
        InputError: the counts are of a model other than the mask's, or were made again since.
    """
    folders = [Path(given)] if given else [*filter(None, [study.result("lsn_counts")]), Path(COUNTS)]
    counted, rates = masks.counted(mask_file), {}
    for lang in (lang for lang, layers in neurons.own.items() if any(layers.values())):
        facts = counted.get(languages.find(counted, lang, default=None)) or {}
        name = facts.get("counts") or f"{mask_file.stem}.{languages.find(neurons.everyone, lang)}.pt"
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is None:
            lacking = f"{' and '.join(map(str, folders))} lack{'s' * (len(folders) == 1)} the counts {name}"
            if given:
                raise InputError(f"{lacking}; give -a the folder that lsn/activation.py wrote")
            cli.warn(f"{lacking}: no random sets of equal activity; run lsn/activation.py, or give its folder with -a")
            return None
        c = counts.read(path, lang)
        model = (c.header.get("models") or {}).get("model")
        if facts.get("counts_sha256", c.hash()) != c.hash() or (model and not relatives.belongs(model, described)):
            hint = "run lsn/identify.py again, or give the folder of its counts with -a"
            raise InputError(f"{path} is not what {mask_file} was made from; {hint}")
        if c.over_zero.shape != (len(neurons.widths), max(neurons.widths)):
            raise InputError(f"{path} counts neurons of another model than {mask_file}; give the folder of its counts")
        rates[lang] = c.over_zero / np.maximum(c.tokens(), 1)
    return rates


def activity(silenced: list[Condition], rates: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """The mean firing rate of each language's neurons on its text (`own`), and of its controls: `random`, `active`."""
    by_kind: dict[str, dict[str, list[float]]] = {}
    for condition in (condition for condition in silenced if condition.facts["lang"] is not None):
        lang, kind = condition.facts["lang"], condition.name if condition.facts["number"] is not None else "own"
        fired = [float(rates[lang][layer][neuron]) for layer, row in condition.key["neurons"].items() for neuron in row]
        by_kind.setdefault(lang, {}).setdefault(kind, []).extend(fired)
    return {lang: {kind: math.fsum(row) / len(row) for kind, row in rows.items()} for lang, rows in by_kind.items()}


def heldout_texts(args, study: Study, chosen: list[str]) -> tuple[dict, dict]:
    """Held-out documents (context, text) of every language, and what the header records of them."""
    mapping = study.get("data.heldout") or {}
    if args.heldout:
        mapping = cli.sibling("cpt/documents.py").language_files(args.heldout, "--heldout")
    n_lines = int(study.get("data.heldout_lines") or 1) if not args.heldout else 1
    return evaluation.heldout_by_language(mapping, chosen, n_lines, args.limit)


def id_paths(args, study: Study) -> list[Path]:
    if args.id_path:
        return [Path(path) for path in args.id_path]
    if not study.get("tokens"):
        raise InputError("nothing says which text the neurons were found on: give --id_path IDS ..")
    return cli.sibling("lsn/activation.py").id_files(None, study)


def prepare(ref, base, run, texts: dict, id_files: list[Path]) -> tuple:
    """The tokenizer and its hash, the held-out texts that are not in the id files, and how many were left out."""
    base = refs.model(base) if base else None
    tokenizer = tokenization.load_tokenizer(ref, run, base)
    vocabulary = tokenizer_id.of_plain_text(tokenization.tokenizer_folder(ref, run, base))
    ids = [
        (path, tokenids.read(path, vocab_size=identity.vocabulary_size(ref.config()), vocabulary_sha256=vocabulary)[0])
        for path in id_files
    ]
    texts, left_out = overlap.disjoint(texts, ids, tokenizer)
    for lang, n in left_out.items():
        if n:
            cli.say(f"{n} held-out documents of {lang} are in the text the neurons were found on, and are left out")
    return tokenizer, tokenizer_id.tokenizer_used(ref, run, base), texts, left_out


if __name__ == "__main__":
    cli.run(main)
