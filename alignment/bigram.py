"""How much of what CPT learns is local? The correlation of a model's surprisal with that of a bigram table, by language.

For every token of held-out text: the model's NLL given all previous tokens, and that of a bigram table of the same
language, given the previous token. Pearson's correlation over tokens, at the base and at every checkpoint, compared
with the same for a unigram table, which uses no context: the excess is local.

In:   B and RUN (default: the study's), held-out text and other text by language (--heldout, --text LANG=FILE; default:
      data.heldout, and alignment.bigram.text, else data.lsn_text).
Out:  OUT (default: the study's alignment/bigram.json): {language: {"base" or step: {`bigram`, `unigram`, `beyond`, ..}}};
      a figure with a line for each language.

It takes one forward pass per model over the held-out text, like language-loss/. A killed run resumes with the next
model. Several GPUs: accelerate launch alignment/bigram.py ...; each process measures whole models, with equal numbers.

Full: python alignment/bigram.py --base meta-llama/Llama-2-7b-hf --run runs/eus --heldout eu=eu.held.txt --text eu=eu.txt --output bigram.json
Tiny: python alignment/bigram.py --study demo/tiny.yaml
"""  # noqa: E501

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import cli, figures, languages, results, stats, textfiles
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import refs
from cpt_utils.measures import over_run
from cpt_utils.models import encoding, scoring
from cpt_utils.models.batching import encode, positions

losses = cli.sibling("language-loss/language_loss.py")

SCHEMA = "bigram"
RESULTS = {"bigram": "alignment/bigram.json"}
ASKED = {"bigram": "How much of what is learnt about a language is which token follows which?"}
CAPTIONS = {
    "bigram": """Part I: 5. Loss by language
        How closely a model's surprisal at the tokens of held-out text follows that of a bigram table of the language
        (Pearson's correlation over tokens), over training. Dashed: the same with a unigram table, which uses no
        context; right: the difference of the two, with 95 % bootstrap intervals over documents.""",
}
BASE = over_run.BASE
TOKENS = 1_000_000
BATCH = 1000  # texts tokenized at a time
SUMS = ("n", "model", "bigram", "unigram", "model_sq", "bigram_sq", "unigram_sq", "model_bigram", "model_unigram")


# ---------------------------------------------------------------- the method


@dataclass(frozen=True)
class Table:
    """How often each token follows each other token in some text.

    Smoothed without parameters (Witten and Bell 1991): p(y | x) = (c(xy) + k(x) p(y)) / (c(x) + k(x)), where k(x) is
    the number of different tokens that follow x, and p(y) = (c(y) + 1) / (N + V) for N tokens in total.

    Attributes:
        pairs: int64, sorted: x V + y of every bigram that occurs; counts: c(xy) of each.
        followed, kinds: c(x), how often a token is followed by any other, and k(x): [V].
        unigram: p(y), [V].
    """

    pairs: np.ndarray
    counts: np.ndarray
    followed: np.ndarray
    kinds: np.ndarray
    unigram: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[list[int]], size: int) -> Table:
        """From the token ids of texts, all below `size` (V); no bigram crosses the end of a text."""
        texts = [np.asarray(ids, dtype=np.int64) for ids in texts]
        flat = np.concatenate(texts)
        pairs, counts = np.unique(np.concatenate([ids[:-1] * size + ids[1:] for ids in texts]), return_counts=True)
        followed = np.bincount(pairs // size, counts, minlength=size)
        unigram = (np.bincount(flat, minlength=size) + 1) / (len(flat) + size)
        return cls(pairs, counts, followed, np.bincount(pairs // size, minlength=size), unigram)

    def surprisal(self, before: np.ndarray, now: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """-ln p(now | before) and -ln p(now), float64 [n] each."""
        wanted = before * len(self.unigram) + now
        at = np.searchsorted(self.pairs, wanted)
        known = (
            self.pairs[np.minimum(at, len(self.pairs) - 1)] == wanted if len(self.pairs) else np.zeros(len(at), bool)
        )
        count = np.zeros(len(at))
        count[known] = self.counts[at[known]]
        kinds, followed, alone = self.kinds[before], self.followed[before], self.unigram[now]
        # For a token that nothing follows in the text (0 / 0), the unigram.
        p = np.where(followed > 0, (count + kinds * alone) / np.maximum(followed + kinds, 1), alone)
        return -np.log(p), -np.log(alone)


def table_of(file: Path, tokenizer, most: int, held: set[str]) -> Table:
    """The table of the first `most` tokens of a file, without the scored lines `held`.

    Raises:
        InputError: no text, or only scored text.
    """
    lines = (line for text in textfiles.texts(file) if (line := text.strip()) and line not in held)
    texts, n = [], 0
    while n < most and (batch := list(itertools.islice(lines, BATCH))):
        for ids in encoding.of_texts(tokenizer, batch, add_special_tokens=False).ids:
            texts.append(ids[: max(0, most - n)])
            n += len(texts[-1])
    if n == 0:
        raise InputError(f"{file} has no text except the scored lines; give --text another file of the language")
    return Table.of(texts, 1 + max(tokenizer.get_vocab().values()))  # ids may have gaps


def document_sums(model, tokenizer, documents: list[tuple[str, str]], table: Table, batch_size: int | None) -> list:
    """SUMS over the tokens of each document (context, text), [documents][9]: surprisals in nats, squares and products.

    The tokens are those of the loss in language-loss/, except special tokens and any token right after one.
    """
    contexts, texts = zip(*documents, strict=True)
    scores = scoring.text_nlls(model, tokenizer, list(texts), batch_size, list(contexts))
    whole = encode(tokenizer, [f"{c} {t}" if c else t for c, t in documents], positions(model))
    sums = []
    for score, ids, special in zip(scores, whole.ids, whole.special, strict=True):
        ids, special = np.asarray(ids), np.asarray(special, dtype=bool)
        at = np.arange(len(ids) - score.tokens, len(ids))
        text = ~(special[at] | special[at - 1])
        nll = score.each.double().numpy()[text]
        bigram, unigram = table.surprisal(ids[at - 1][text], ids[at][text])
        columns = (np.ones_like(nll), nll, bigram, unigram, nll**2, bigram**2, unigram**2, nll * bigram, nll * unigram)
        sums.append([float(column.sum()) for column in columns])
    return sums


def correlations(sums: np.ndarray) -> np.ndarray:
    """SUMS [.., 9] -> [.., 3]: Pearson's correlation with bigrams, with unigrams, and their difference; NaN where
    either surprisal does not vary."""
    of = dict(zip(SUMS, np.moveaxis(np.asarray(sums), -1, 0), strict=True))

    def spread(name: str) -> np.ndarray:
        squares = of[f"{name}_sq"] - of[name] ** 2 / of["n"]
        return np.where(squares > 1e-10 * of[f"{name}_sq"], squares, np.nan)  # anything smaller is rounding

    with np.errstate(invalid="ignore", divide="ignore"):
        both = [
            (of[f"model_{name}"] - of["model"] * of[name] / of["n"]) / np.sqrt(spread("model") * spread(name))
            for name in ("bigram", "unigram")
        ]
    return np.stack([*both, both[0] - both[1]], -1)


def summarize(units: dict[str, dict[str, list]], seed: int) -> dict[str, dict[str, dict]]:
    """The payload, from `units`: language -> model -> SUMS of every document.

    Intervals: bootstrap over documents, with the same draws for all models of a language.
    """
    by_language: dict[str, dict[str, dict]] = {}
    for lang, models in units.items():
        by_language[lang], at_base = {}, None
        for name, documents in models.items():
            documents = np.asarray(documents)
            weights = stats.resample_weights(len(documents), seed, 2000)
            value, drawn = correlations(documents.sum(0)), correlations(weights @ documents)
            if not np.isfinite(value).all():
                raise InputError(
                    f"{lang}, {name}: surprisals that do not vary, or are not finite; give more text, or try --dtype "
                    "float32"
                )
            kinds = ("bigram", "unigram", "beyond")
            row: dict = {key: stats.with_interval(value[i], drawn[:, i]) for i, key in enumerate(kinds)}
            if at_base is None:
                at_base = value, drawn
            else:
                row["change"] = stats.with_interval(value[0] - at_base[0][0], drawn[:, 0] - at_base[1][:, 0])
            n = math.fsum(documents[:, 0])
            for column, key in enumerate(("nll_per_token", "nll_bigram", "nll_unigram"), 1):
                row[key] = math.fsum(documents[:, column]) / n
            by_language[lang][name] = row | {"tokens": int(n), "documents": len(documents)}
    return by_language


def draw(path: Path, found: dict[str, dict[str, dict]]) -> None:
    """A line for each language over training steps, the base at 0: both correlations, and their difference."""
    with figures.style() as plt:
        fig, axes = plt.subplots(1, 2, figsize=(figures.PAGE, 2.5 + 0.15 * (len(found) // 3)))
        axes[1].axhline(0, color=figures.colour("chance"), linewidth=0.6)
        for i, (lang, models) in enumerate(found.items()):
            steps = [0 if name == BASE else int(name) for name in models]
            look = {"color": "0.75", "zorder": 1}
            if i < figures.MOST:
                look = {"color": figures.PALETTE[i], "marker": figures.MARKERS[i], "label": figures.language(lang)}
            for axis, key in ((axes[0], "bigram"), (axes[1], "beyond")):
                rows = [row[key] for row in models.values()]
                axis.plot(steps, [row["value"] for row in rows], **look)
                ends = [[row[end] for row in rows] for end in ("ci_low", "ci_high")]
                axis.fill_between(steps, *ends, color=look["color"], alpha=0.2, linewidth=0)
            axes[0].plot(steps, [row["unigram"]["value"] for row in models.values()], "--", color=look["color"])
        for axis, words in zip(axes, ("correlation with bigrams\n(dashed: unigrams)", "beyond unigrams"), strict=True):
            axis.set_xlabel("training step (0 = base)")
            axis.set_ylabel(words)
        title = "bands: 95 % intervals over documents" + "; grey: further languages" * (len(found) > figures.MOST)
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, title=title)
        figures.save(fig, path)


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("--heldout", nargs="+", metavar="LANG=FILE", help="held-out text, a document per line; default: the study's")
    text = "text to count bigrams in, such as training text; default: alignment.bigram.text, else data.lsn_text"
    add("--text", nargs="+", metavar="LANG=FILE", help=text)
    text = f"most tokens to count per language; default: alignment.bigram.tokens, else {TOKENS:,}"
    add("--tokens", type=cli.positive, metavar="N", help=text)
    over_run.add_flags(p, RESULTS["bigram"])
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    run = over_run.OverRun.of(args, study, "bigram")
    texts, facts = losses.heldout(args, study)
    counted = counted_files(args, study, list(texts))
    texts = {lang: texts[lang] for lang in counted}
    facts["heldout"] = {lang: facts["heldout"][lang] for lang in counted}
    facts["text"] = {lang: {"file": str(file), "sha256": results.file_sha256(file)} for lang, file in counted.items()}
    facts["tokens"] = int(study.value(args.tokens, "--tokens", "alignment.bigram.tokens", TOKENS))
    files = {lang: Path(facts["heldout"][lang]["file"]) for lang in texts}
    held = {lang: {line.strip() for line in textfiles.texts(file)} for lang, file in files.items()}
    tables: dict[str, dict[str, Table]] = {}  # by tokenizer

    def measured(model, ref: refs.ModelRef, tokenizer) -> dict:
        used = run.tokenizer_of(ref)
        if used not in tables:
            tables[used] = {lang: table_of(counted[lang], tokenizer, facts["tokens"], held[lang]) for lang in texts}
        table = tables[used]
        return {lang: document_sums(model, tokenizer, texts[lang], table[lang], args.batch_size) for lang in texts}

    def write_all(by_model: dict[str, dict], request: dict) -> None:
        write(run.output, {lang: {name: units[lang] for name, units in by_model.items()} for lang in texts}, request)

    run.measure(SCHEMA, facts | {"batch_size": args.batch_size}, measured, write_all)


def counted_files(args, study: Study, held: list[str]) -> dict[str, Path]:
    """The file in which to count the bigrams of each language in `held`; a language without one is left out.

    Raises:
        InputError: no language has one, or a file does not exist.
    """
    files = cli.sibling("cpt/documents.py").language_files(args.text, "--text")
    files = files or study.get("alignment.bigram.text") or study.get("data.lsn_text", {})
    by_language = {}
    for lang in held:
        key = languages.find(files, lang, default=None)
        if key is None or files[key] is None:
            cli.warn(f"{lang} is left out: it has no text to count bigrams in (--text {lang}=FILE)")
            continue
        by_language[lang] = Path(files[key])
        textfiles.check(by_language[lang])
    if not by_language:
        raise InputError(
            "no text to count bigrams in: give --text LANG=FILE .., or alignment.bigram.text in the study, of "
            f"languages with held-out text ({', '.join(held)})"
        )
    return by_language


def write(output: Path, units: dict[str, dict[str, list]], request: dict) -> None:
    """Write the figure and then the JSON, from the sums of each document by language and model."""
    payload = summarize(units, request["seed"])
    draw(output.with_suffix(""), payload)
    names = {lang: languages.canonical(lang, any_tag=True) for lang in units}
    facts = over_run.header_facts(request, "heldout", "lines", "limit", "text", "tokens")
    results.write_json(output, payload, results.header(SCHEMA, languages=names, **facts))
    for lang, rows in payload.items():
        name, last = list(rows.items())[-1]
        bigram, beyond = (last[key]["value"] for key in ("bigram", "beyond"))
        cli.say(
            f"{lang}: correlation with bigrams {rows[BASE]['bigram']['value']:.3f} at the base, {bigram:.3f} at step "
            f"{name} ({beyond:+.3f} beyond unigrams); nats per token {last['nll_per_token']:.3f}, of bigrams "
            f"{last['nll_bigram']:.3f}"
        )
    cli.say(f"wrote {output} and the figure {output.with_suffix('.pdf')}")


if __name__ == "__main__":
    cli.run(main)
