"""How much of what CPT learns is local? The correlation of a model's surprisal with that of a bigram table, by language.

On every token of held-out text: the model's NLL given all that stands before it, and that of a table of bigrams of the
same language, given the token before. Pearson's correlation over tokens, at the base and at every checkpoint, beside
the same with a unigram table, which knows no neighbour: what is beyond that is local.

In:   B and RUN (default: the study's), held-out text and other text by language (--heldout, --text LANG=FILE; default:
      data.heldout, and alignment.bigram.text, else data.lsn_text).
Out:  OUT (default: the study's alignment/bigram.json): {language: {"base" or step: {`bigram`, `unigram`, `beyond`, ..}}};
      a figure with a line for each language.

It takes one forward pass over the held-out text a model, as language-loss/. A killed run goes on with the next model. On
several GPUs: accelerate launch alignment/bigram.py ...; each process measures whole models, the numbers are the same.

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
ASKED = {"bigram": "How much of what is learnt of a language is which token follows which?"}
CAPTIONS = {
    "bigram": """Part I: 5. Loss by language
        How closely a model's surprisal at the tokens of held-out text goes with that of a table of bigrams of the
        language (Pearson's correlation over tokens), over training. Dashed: the same with a table of unigrams, which
        knows no neighbour; at the right, what is beyond that, with 95 % bootstrap intervals over documents.""",
}
BASE = over_run.BASE
TOKENS = 1_000_000
BATCH = 1000  # texts that are tokenized at a time
SUMS = ("n", "model", "bigram", "unigram", "model_sq", "bigram_sq", "unigram_sq", "model_bigram", "model_unigram")


# ---------------------------------------------------------------- the method


@dataclass(frozen=True)
class Table:
    """How often each token follows each other one in some text.

    Smoothed without a parameter (Witten and Bell 1991): p(y | x) = (c(xy) + k(x) p(y)) / (c(x) + k(x)), where k(x) is
    how many different tokens follow x, and p(y) = (c(y) + 1) / (N + V) of all N tokens.

    Attributes:
        pairs: int64, sorted: x V + y of every bigram that there is; counts: c(xy) of each.
        followed, kinds: c(x), how often a token is followed by any, and k(x): [V].
        unigram: p(y), [V].
    """

    pairs: np.ndarray
    counts: np.ndarray
    followed: np.ndarray
    kinds: np.ndarray
    unigram: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[list[int]], size: int) -> Table:
        """From the token ids of texts, all below `size` (V); no bigram goes over the end of a text."""
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
        there = (
            self.pairs[np.minimum(at, len(self.pairs) - 1)] == wanted if len(self.pairs) else np.zeros(len(at), bool)
        )
        count = np.zeros(len(at))
        count[there] = self.counts[at[there]]
        kinds, followed, alone = self.kinds[before], self.followed[before], self.unigram[now]
        # Of a token that nothing follows there, the unigram: 0 / 0.
        found = np.where(followed > 0, (count + kinds * alone) / np.maximum(followed + kinds, 1), alone)
        return -np.log(found), -np.log(alone)


def table_of(file: Path, tokenizer, most: int, held: set[str]) -> Table:
    """The table of the first `most` tokens of a file, without the lines of the text that is scored.

    Raises:
        InputError: no text, or none but what is scored.
    """
    lines = (line for text in textfiles.texts(file) if (line := text.strip()) and line not in held)
    texts, n = [], 0
    while n < most and (batch := list(itertools.islice(lines, BATCH))):
        for ids in encoding.of_texts(tokenizer, batch, add_special_tokens=False).ids:
            texts.append(ids[: max(0, most - n)])
            n += len(texts[-1])
    if n == 0:
        raise InputError(f"{file} has no text but what is scored; give --text another file of the language")
    return Table.of(texts, 1 + max(tokenizer.get_vocab().values()))  # ids may have gaps


def document_sums(model, tokenizer, documents: list[tuple[str, str]], table: Table, batch_size: int | None) -> list:
    """SUMS over the tokens of each document (context, text), [documents][9]: surprisals in nats, squares and products.

    The tokens are those that the loss of language-loss/ is of, but for special ones and what follows one.
    """
    contexts, texts = zip(*documents, strict=True)
    scores = scoring.text_nlls(model, tokenizer, list(texts), batch_size, list(contexts))
    whole = encode(tokenizer, [f"{c} {t}" if c else t for c, t in documents], positions(model))
    found = []
    for score, ids, special in zip(scores, whole.ids, whole.special, strict=True):
        ids, special = np.asarray(ids), np.asarray(special, dtype=bool)
        at = np.arange(len(ids) - score.tokens, len(ids))
        text = ~(special[at] | special[at - 1])
        own = score.each.double().numpy()[text]
        bigram, unigram = table.surprisal(ids[at - 1][text], ids[at][text])
        columns = (np.ones_like(own), own, bigram, unigram, own**2, bigram**2, unigram**2, own * bigram, own * unigram)
        found.append([float(column.sum()) for column in columns])
    return found


def correlations(sums: np.ndarray) -> np.ndarray:
    """SUMS [.., 9] -> [.., 3]: Pearson's correlation with bigrams, that with unigrams, and their difference; NaN where
    one does not vary."""
    of = dict(zip(SUMS, np.moveaxis(np.asarray(sums), -1, 0), strict=True))

    def spread(one: str) -> np.ndarray:
        found = of[f"{one}_sq"] - of[one] ** 2 / of["n"]
        return np.where(found > 1e-10 * of[f"{one}_sq"], found, np.nan)  # below is rounding

    with np.errstate(invalid="ignore", divide="ignore"):
        both = [
            (of[f"model_{name}"] - of["model"] * of[name] / of["n"]) / np.sqrt(spread("model") * spread(name))
            for name in ("bigram", "unigram")
        ]
    return np.stack([*both, both[0] - both[1]], -1)


def summarize(units: dict[str, dict[str, list]], seed: int) -> dict[str, dict[str, dict]]:
    """What the result says, from `units`: language -> model -> SUMS of every document.

    Intervals: bootstrap over documents, the same draws for all models of a language.
    """
    found: dict[str, dict[str, dict]] = {}
    for lang, models in units.items():
        found[lang], at_base = {}, None
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
            found[lang][name] = row | {"tokens": int(n), "documents": len(documents)}
    return found


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
    add("--heldout", nargs="+", metavar="LANG=FILE", help="text to test on, a document a line; default: the study's")
    text = "text that bigrams are counted in, as that of training; default: alignment.bigram.text, else data.lsn_text"
    add("--text", nargs="+", metavar="LANG=FILE", help=text)
    text = f"tokens of a language that are counted, at most; default: alignment.bigram.tokens, else {TOKENS:,}"
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
        own = tables[used]
        return {lang: document_sums(model, tokenizer, texts[lang], own[lang], args.batch_size) for lang in texts}

    def write_all(found: dict[str, dict], request: dict) -> None:
        write(run.output, {lang: {name: one[lang] for name, one in found.items()} for lang in texts}, request)

    run.measure(SCHEMA, facts | {"batch_size": args.batch_size}, measured, write_all)


def counted_files(args, study: Study, held: list[str]) -> dict[str, Path]:
    """The file that the bigrams of each language in `held` are counted in; a language without one is left out.

    Raises:
        InputError: no language has one, or it is not there.
    """
    files = cli.sibling("cpt/documents.py").language_files(args.text, "--text")
    files = files or study.get("alignment.bigram.text") or study.get("data.lsn_text", {})
    found = {}
    for lang in held:
        key = languages.find(files, lang, default=None)
        if key is None or files[key] is None:
            cli.warn(f"{lang} is left out: nothing says in which text its bigrams are counted (--text {lang}=FILE)")
            continue
        found[lang] = Path(files[key])
        textfiles.check(found[lang])
    if not found:
        raise InputError(
            "no text to count bigrams in: give --text LANG=FILE .., or alignment.bigram.text in the study, of "
            f"languages with held-out text ({', '.join(held)})"
        )
    return found


def write(output: Path, units: dict[str, dict[str, list]], request: dict) -> None:
    """The figure, and last the JSON, from the sums of each document by language and model."""
    found = summarize(units, request["seed"])
    draw(output.with_suffix(""), found)
    names = {lang: languages.canonical(lang, any_tag=True) for lang in units}
    facts = over_run.header_facts(request, "heldout", "lines", "limit", "text", "tokens")
    results.write_json(output, found, results.header(SCHEMA, languages=names, **facts))
    for lang, rows in found.items():
        name, last = list(rows.items())[-1]
        own, beyond = (last[key]["value"] for key in ("bigram", "beyond"))
        cli.say(
            f"{lang}: correlation with bigrams {rows[BASE]['bigram']['value']:.3f} at the base, {own:.3f} at step "
            f"{name} ({beyond:+.3f} beyond unigrams); nats a token {last['nll_per_token']:.3f}, of bigrams "
            f"{last['nll_bigram']:.3f}"
        )
    cli.say(f"wrote {output} and the figure {output.with_suffix('.pdf')}")


if __name__ == "__main__":
    cli.run(main)
