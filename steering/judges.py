"""What a text that a model wrote is worth: is it in the language that was wanted, and does it say what its source says?

In a study that makes its own world both are exact, by the words of the world's grammar. Elsewhere py3langid tells the
language, and a text says what it should where it is more like its own reference than like another's. Used by
steering/steer.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import cli, languages, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np
from cpt_utils.base.study import Study

in_context, world = cli.sibling("layer-ablation/in_context.py"), cli.sibling("demo/world.py")
foreign = cli.sibling("lsn/foreign_text.py")


@dataclass(frozen=True)
class Judge:
    """How written texts are judged.

    Attributes:
        name: "world" or "py3langid".
        language: (texts) -> of each 1 where it is in the language that is wanted, else 0.
        relevance: (texts, translation) -> of each how far it says what its source says, 1 at most; a mean below 0 is
            none at all.
    """

    name: str
    language: Callable[[list[str]], list[float]]
    relevance: Callable[[list[str], in_context.Translation], list[float]]


def judge_of(study: Study, code: str) -> Judge:
    """The judge of texts that should be in the language `code`.

    Raises:
        InputError: the study's world is not there, or does not have the language; py3langid is not installed, or does
            not know it.
    """
    if study.get("train.world"):
        config = world.read_config(Path(study.get("train.world")))
        file = Path(config["out"].replace("{seed}", str(study.get("seed", config["seed"])))) / "world.json"
        made = World(results.read_json(file, world.SCHEMA)[0]["config"])
        language = made.language_judge(languages.find(made.languages, code, what=str(file)))
        return Judge("world", language, lambda texts, of: made.meaning(texts, of.base))
    other = foreign.language_judge(foreign.langid_labels(code, "steering/steer.py", "give --no-generate"))

    def in_language(texts: list[str]) -> list[float]:
        return [float(bool(text.strip()) and not label) for text, label in zip(texts, other(texts), strict=True)]

    return Judge("py3langid", in_language, like_own)


def like_own(texts: list[str], translation) -> list[float]:
    """Of each text the share of other references that it is less like than its own, minus the share that it is more
    like, by the cosine of character trigrams: over texts that say nothing of their sources the mean is 0, whatever they
    have in common with the references; of one text that is always the same it is 0 exactly. The others are those of
    its half, the sentences 0, 2, .. or 1, 3, ..: of which a layer is chosen on one and reported on the other."""
    grams = [Counter(t[i : i + 3] for i in range(len(t) - 2)) for t in map(str.lower, [*texts, *translation.target])]
    columns = {gram: i for i, gram in enumerate(dict.fromkeys(gram for one in grams for gram in one))}
    counts = np.zeros((len(grams), len(columns)))
    for row, one in enumerate(grams):
        counts[row, [columns[gram] for gram in one]] = [*one.values()]
    counts /= np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1)
    alike = (counts[: len(texts)] @ counts[len(texts) :].T).round(9)
    half = np.arange(len(texts)) % 2
    beside = half[:, None] == half
    return ((np.sign(alike.diagonal()[:, None] - alike) * beside).sum(1) / np.maximum(1, beside.sum(1) - 1)).tolist()


class World:
    """The words of a demo world: which language each is of, and what it means.

    Args:
        config: that of its world.json.
    """

    def __init__(self, config: dict):
        try:
            made = world.Maker(config, world.read_yaml(world.HERE / "vocabulary.yaml"))
        except (KeyError, TypeError) as error:
            raise InputError(f"world.json lacks {error}; make the world again with demo/world.py") from None
        self.languages, self.concepts = made.languages, {}
        self.function_words = {word for language in self.languages.values() for word in language.function_words}
        for language in self.languages.values():
            self.concepts |= language.forms()

    def language_judge(self, code: str) -> Callable[[list[str]], list[float]]:
        """A text is in the language to which alone most of its words belong."""
        words = {name: {*language.forms()} | language.function_words for name, language in self.languages.items()}
        own = {
            name: mine.difference(*(other for key, other in words.items() if key != name))
            for name, mine in words.items()
        }  # fmt: skip
        judge = in_context.by_vocabulary(own, {"target": code})
        return lambda texts: judge(texts, "target")

    def said(self, text: str) -> Counter:
        """What a text says, in whatever language: how often each concept and name, negation among them. A word that no
        language has counts as one that nobody else says."""
        words = re.findall(r"\w+", text.lower())
        return Counter(
            self.concepts.get(word, word) for word in words if word in self.concepts or word not in self.function_words
        )

    def meaning(self, texts: list[str], sources: list[str]) -> list[float]:
        """F1 of what each text says and what its source says: 1 where they say the same things as often."""
        found = []
        for text, source in zip(texts, sources, strict=True):
            said, wanted = self.said(text), self.said(source)
            found.append(2 * (said & wanted).total() / max(1, said.total() + wanted.total()))
        return found
