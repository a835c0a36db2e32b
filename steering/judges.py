"""What a text that a model wrote is worth: is it in the language that was wanted, and does it say what its source says?

In a study that makes its own world both are exact, by the words of the world's grammar. Elsewhere py3langid tells the
language, and what a text says is not judged. Used by steering/steer.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import cli, languages, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study

in_context, world = cli.sibling("layer-ablation/in_context.py"), cli.sibling("demo/world.py")
foreign = cli.sibling("lsn/foreign_text.py")


@dataclass(frozen=True)
class Judge:
    """How written texts are judged.

    Attributes:
        name: "world" or "py3langid".
        language: (texts) -> of each 1 where it is in the language that is wanted, else 0.
        meaning: (texts, sources) -> of each how much it has in common with what its source says, 0 to 1; None: unknown.
    """

    name: str
    language: Callable[[list[str]], list[float]]
    meaning: Callable[[list[str], list[str]], list[float]] | None = None


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
        return Judge("world", made.language_judge(languages.find(made.languages, code, what=str(file))), made.meaning)
    labels = foreign.langid_labels(code, "steering/steer.py", "give --no-generate")
    other = foreign.language_judge(labels)
    return Judge("py3langid", lambda texts: [float(bool(text.strip()) and not label)
                                             for text, label in zip(texts, other(texts), strict=True)])  # fmt: skip


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
