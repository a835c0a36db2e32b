"""How well a model translates in context: log-likelihoods after a fixed few-shot prompt, and greedy translations.

x is a sentence of the target language, y its translation in the base language. Perception is the NLL of y given x,
production that of x given y, each in nats per byte of the scored sentence. The same with another sentence's source in
place of the correct one gives the loss of the text without its translation.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import cli, languages, sources, textfiles
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch, transformers
from cpt_utils.base.study import Study
from cpt_utils.models import encoding, loading, scoring
from cpt_utils.models.batching import for_each, padded, positions

foreign = cli.sibling("lsn/foreign_text.py")

# Separators within a pair and after a pair. "pairs": as in the documents of pairs of cpt/ and demo/, which a base that
# was trained on them knows. "lines": a pair is two lines.
FORMS = {"pairs": (" ", " "), "lines": ("\n", "\n\n")}
FUNCTIONS = {"perception": ("target", "base"), "production": ("base", "target")}  # given, scored
SHOTS = 4
LONGER = 1.5  # a translation may have this many times the tokens of the longest reference,
SPARE = 8  # plus this many
SENTENCE_END = re.compile(r"(?<=[.!?。！？।።])(\s|$)")


@dataclass(frozen=True)
class Translation:
    """Pairs to translate in context.

    Attributes:
        base, target: [n] scored sentences each.
        shots: (base, target) of the pairs in the prompt, which are not scored.
        other: [n] index of the pair whose source replaces that of sentence i; it has other sentences.
        form: of the prompt, one of FORMS.
        facts: what the header records about these.
    """

    base: list[str]
    target: list[str]
    shots: list[tuple[str, str]]
    other: list[int]
    form: str
    facts: dict

    def contexts(self, given: str, own: bool = True) -> list[str]:
        """[n] texts before the scored sentences: all shots, then the source in the language `given`."""
        inside, after = FORMS[self.form]
        pairs = [(b, t) if given == "base" else (t, b) for b, t in self.shots]
        shots = "".join(first + inside + second + after for first, second in pairs)
        sentences = getattr(self, given)
        return [shots + sentences[i if own else self.other[i]] for i in range(len(sentences))]

    def nlls(
        self, model, tokenizer, batch_size: int | None, functions: Iterable[str] = FUNCTIONS
    ) -> dict[str, list[float]]:
        """Perception and production (of `functions`) with the correct source and, as `_shuffled`, with another: the NLL
        of each sentence over the mean bytes of a sentence, so that their mean is total nats over total bytes."""
        by_measure = {}
        for name in functions:
            given, scored = FUNCTIONS[name]
            texts = getattr(self, scored)
            mean_bytes = sum(len(text.encode()) for text in texts) / len(texts)
            for suffix, own in (("", True), ("_shuffled", False)):
                contexts = self.contexts(given, own)
                scores = scoring.text_nlls(model, tokenizer, texts, batch_size, contexts, FORMS[self.form][0])
                by_measure[name + suffix] = [score.nll / mean_bytes for score in scores]
        return by_measure

    def refuse_long(self, model, tokenizer) -> None:
        """InputError if a prompt exceeds the model's positions: truncation would give some sentences another prompt."""
        limit = positions(model)
        for given, scored in FUNCTIONS.values() if limit else ():
            for own in (True, False):
                whole = [
                    context + FORMS[self.form][0] + text
                    for context, text in zip(self.contexts(given, own), getattr(self, scored), strict=True)
                ]
                longest = max(map(len, encoding.of_texts(tokenizer, whole).ids))
                if longest > limit:
                    raise InputError(
                        f"{len(self.shots)} shots and a pair make up to {longest} tokens, and the model has {limit} "
                        "positions; give fewer --shots"
                    )

    def translate(
        self, model, tokenizer, batch_size: int | None, functions: Iterable[str] = FUNCTIONS,
        at_least: int | None = None,
    ) -> dict[str, list[str]]:  # fmt: skip
        """Greedy translations of every sentence, by function: up to the end of the line and, in the form "pairs", as
        many sentences as the reference has; no text ends before `at_least` tokens."""
        by_function = {}
        for name in functions:
            given, scored = FUNCTIONS[name]
            inside, references = FORMS[self.form][0], getattr(self, scored)
            prompts = [context + inside.rstrip(" ") for context in self.contexts(given)]
            longest = max(map(len, encoding.of_texts(tokenizer, references).ids))
            texts = _greedy(model, tokenizer, prompts, int(LONGER * longest) + SPARE, batch_size, at_least)
            by_function[name] = [self._cut(text, reference) for text, reference in zip(texts, references, strict=True)]
        return by_function

    def _cut(self, text: str, reference: str) -> str:
        text = text.strip().partition("\n")[0]
        ends = [match.start() for match in SENTENCE_END.finditer(text)] if self.form == "pairs" else []
        wanted = max(1, len(SENTENCE_END.findall(reference)))
        return text[: ends[wanted - 1]] if len(ends) >= wanted else text


def asked_for(args, study: Study, codes: dict[str, str]) -> tuple[sources.ParallelText, str, int]:
    """All pairs (whatever --limit, so that it does not change the shots), the prompt's form, and the number of shots.

    Raises:
        InputError: the languages are unknown, or there are no such pairs.
    """
    if not all(codes.values()):
        raise InputError("nothing says which languages: give --base-lang and --target-lang, or a study file")
    pairs = sources.from_arguments(argparse.Namespace(**vars(args) | {"limit": None}), study, *codes.values())
    form = study.value(args.prompt, "--prompt", "ablation.prompt", "pairs" if study.get("train.base") else "lines")
    return pairs, form, int(study.value(args.shots, "--shots", "ablation.shots", SHOTS))


def draw(pairs: sources.ParallelText, n_shots: int, n_scored: int | None, form: str, seed: int) -> Translation:
    """`n_shots` pairs drawn at random, and the first `n_scored` of the others; the shots do not depend on `n_scored`.

    Raises:
        InputError: fewer than two pairs are left besides the shots, or one shares a sentence with all others.
    """
    drawn = random.Random(f"{seed}/shots").sample(range(len(pairs)), min(n_shots, len(pairs)))
    shown = {text for i in drawn for text in (pairs.base[i], pairs.target[i])}
    left = [i for i in range(len(pairs)) if not {pairs.base[i], pairs.target[i]} & shown][:n_scored]
    if len(left) < 2:
        raise InputError(
            f"{len(pairs)} sentence pairs are too few for {n_shots} shots and two other pairs to score; give fewer "
            "--shots, or more pairs"
        )
    order = random.Random(f"{seed}/shuffled").sample(range(len(left)), len(left))
    following = dict(zip(order, [*order[1:], order[0]], strict=True))  # one cycle: none keeps its own
    other = [_other(i, following, [(pairs.base[at], pairs.target[at]) for at in left]) for i in range(len(left))]
    described = {key: pairs.describe()[key] for key in ("pairs_sha256", "n_available")}
    facts = {"prompt": form, "shots": [pairs.ids[i] for i in drawn], "scored": len(left), "data": described}
    return Translation(
        base=[pairs.base[i] for i in left],
        target=[pairs.target[i] for i in left],
        shots=[(pairs.base[i], pairs.target[i]) for i in drawn],
        other=other,
        form=form,
        facts=facts,
    )


def _other(i: int, following: dict[int, int], pairs: list[tuple[str, str]]) -> int:
    """The next in the cycle that shares no sentence with pair `i`: a copy of its source would be the correct source."""
    candidate = following[i]
    while candidate != i and any(a == b for a, b in zip(pairs[i], pairs[candidate], strict=True)):
        candidate = following[candidate]
    if candidate == i:
        raise InputError(
            f"every pair to score has a sentence in common with {' / '.join(pairs[i])!r}, so none can serve as the "
            "source of another; give more pairs"
        )
    return candidate


def _greedy(
    model: transformers.PreTrainedModel, tokenizer, prompts: list[str], tokens: int, batch_size: int | None,
    at_least: int | None = None,
) -> list[str]:  # fmt: skip
    """Greedy decoding of `tokens` tokens after each prompt, or up to the end of the text."""
    sequences = scoring.beginnings(tokenizer, prompts)
    limit, texts = positions(model), [""] * len(prompts)
    if limit and max(map(len, sequences)) + tokens > limit:
        tokens = max(1, limit - max(map(len, sequences)))
    how = scoring.greedily(model, tokenizer, tokens, at_least)

    def step(rows: list[int]) -> None:
        given, mask = (t.to(loading.input_device(model)) for t in
                       padded([sequences[i] for i in rows], tokenizer.pad_token_id, "left"))  # fmt: skip
        with torch.inference_mode():
            generated = model.generate(input_ids=given, attention_mask=mask, generation_config=how)
        for i, row in zip(rows, generated[:, given.shape[1] :].tolist(), strict=True):
            texts[i] = tokenizer.decode(row, skip_special_tokens=True)

    for_each(model, "generation", [len(s) + tokens for s in sequences], step, batch_size)
    return texts


# --- scores of translations ---


def chrf() -> Callable[[str, str], float]:
    """chrF (Popović 2015) of a translation against its reference, 0 to 100, as sacrebleu counts it.

    Raises:
        InputError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import CHRF
    except ImportError:
        raise InputError("--generate needs sacrebleu: pip install sacrebleu==2.6.0, or leave it out") from None
    metric = CHRF()
    return lambda text, reference: metric.sentence_score(text, [reference]).score


def language_judge(study, codes: dict[str, str]) -> Callable[[list[str], str], list[float]]:
    """A function (texts, side) that returns for each text whether it is in the language of the side, 1 or 0.

    In a study with a generated world it goes by words: a text is in the language to which most of its words belong that
    only one language has. Otherwise it uses py3langid.

    Raises:
        InputError: py3langid is not installed, or does not know one of the languages.
    """
    if study.get("train.world"):
        files = [study.get("data.lsn_text", {}), study.get("data.heldout", {})]
        texts = [(lang, file) for by in files for lang, file in by.items() if file]
        return by_vocabulary(vocabularies(texts), codes)
    how = {"flag": "--generate", "instead": "measure without it"}
    judges = {side: foreign.language_judge(foreign.langid_labels(code, **how)) for side, code in codes.items()}
    return lambda texts, side: [float(bool(text.strip()) and not judged)
                                for text, judged in zip(texts, judges[side](texts), strict=True)]  # fmt: skip


def vocabularies(files: list[tuple[str, str]]) -> dict[str, set[str]]:
    """The words of each language that occur in no other language's texts."""
    words: dict[str, set[str]] = {}
    for lang, file in files:
        for line in textfiles.texts(Path(file)):
            words.setdefault(lang, set()).update(_words(line))
    others = {lang: set().union(*(words[name] for name in words if name != lang)) for lang in words}
    return {lang: words[lang] - others[lang] for lang in words}


def by_vocabulary(own: dict[str, set[str]], codes: dict[str, str]) -> Callable[[list[str], str], list[float]]:
    def judge(texts: list[str], side: str) -> list[float]:
        verdicts = []
        for text in texts:
            votes = {lang: sum(word in words for word in _words(text)) for lang, words in own.items()}
            best = max(votes.values())
            winners = [lang for lang, n in votes.items() if n == best]
            verdicts.append(float(best > 0 and len(winners) == 1 and languages.same(winners[0], codes[side])))
        return verdicts

    return judge


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
