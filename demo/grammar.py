"""The languages of the demo world: English, and invented languages with seeded words and a configurable grammar.

Used by demo/world.py. Every language expresses a clause as a list of words. For code-mixed text, `borrow` may supply a
concept's word from another language, which then takes the endings of the language being spoken.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from cpt_utils.base import cli

meanings = cli.sibling("demo/meanings.py")

Borrow = Callable[[str], "str | None"]

ORDERS = ("SVO", "SOV", "VSO", "VOS", "OVS", "OSV")
DEFAULTS = {"order": "SVO", "adjective": "before", "mutation": False, "time": "last", "shared": 0.0, "contact": 1.0}
# Onsets, nuclei and codas of syllables. Languages take turns, so that adjacent ones sound different.
SOUNDS = (
    ("b c d f g l m n r s t bh ch sc", "a i o u ao ea io ui", "n l r s ch m"),
    ("k p v z h j y kr pl zv", "a e i o u ai ei", "k t sh p v"),
    ("w x q tl nd mb ph sk y", "e a o oo ie ay", "x g d th b"),
)
NAME_SOUNDS = ("b d f g k l m n p r s t v z", "a e i o u", "n r s l k m")
FUNCTION_WORDS = ("the", "in", "of", "is", "did", "does", "not", "will")  # of English
# Initial mutation of object nouns, modelled on Irish eclipsis; other consonants do not change.
MUTATION = {"b": "mb", "c": "gc", "d": "nd", "f": "bhf", "g": "ng", "k": "gk", "p": "bp", "t": "dt", "v": "fv"}


def coin(
    draw: random.Random, sounds: tuple[str, str, str], syllables: int, taken: set[str], closed: bool = True
) -> str:
    """A new word that is not yet in `taken`, and is added to it. Closed words end in a consonant."""
    onsets, nuclei, codas = (s.split() for s in sounds)
    while True:
        word = "".join(draw.choice(onsets) + draw.choice(nuclei) for _ in range(syllables))
        word += draw.choice(codas) if closed else ""
        if word not in taken:
            taken.add(word)
            return word


def mutate(noun: str) -> str:
    """The mutated form of a noun: bal -> mbal."""
    return MUTATION.get(noun[0], noun[0]) + noun[1:]


def with_s(word: str) -> str:
    """English -s: the plural of a noun, the third person of a verb."""
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s")


def past(word: str) -> str:
    return word + ("d" if word.endswith("e") else "ed")


class Language:
    """Shared code of English and the invented languages, which add `clause` (words) and `question` (text)."""

    order: str
    lexicon: dict[str, str]  # concept -> word
    function_words: set[str]
    negation = "not"

    def forms(self) -> dict[str, str]:
        """Every form of a concept's word, inflected or not -> the concept; "not" is a concept, too.

        A word in the lexicon never counts as an inflected form of another word.
        """
        concepts = {word: concept for concept, word in self.lexicon.items()}
        for concept, word in self.lexicon.items():
            for form in self.inflected(word):
                concepts.setdefault(form, concept)
        return concepts | {self.negation: "not"}

    def word(self, concept: str, borrow: Borrow | None = None) -> str:
        return (borrow(concept) if borrow else None) or self.lexicon.get(concept, concept)

    def words(self, concept: str | None, borrow: Borrow | None) -> list[str]:
        return [self.word(concept, borrow)] if concept else []

    def say(self, sentence: meanings.Sentence, borrow: Borrow | None = None) -> str:
        """The sentence; in lower case except for names, so that a small vocabulary needs each word only once."""
        words = self.clause(sentence.clauses[0], borrow)
        if sentence.conjunction:
            words += [self.word(sentence.conjunction, borrow), *self.clause(sentence.clauses[1], borrow)]
        return " ".join(words) + "."

    def say_all(self, sentences: list[meanings.Sentence], borrow: Borrow | None = None) -> str:
        return " ".join(self.say(sentence, borrow) for sentence in sentences)

    def tell(self, fact: meanings.Fact) -> str:
        """The fact as a sentence. In every language the answer is its last word, and the question all words before."""
        return f"{self.question(fact)} {self.word(fact.answer)}."


class English(Language):
    """Readable English with regular inflection only."""

    order = "SVO"

    def __init__(self, concepts: list[str]):
        self.lexicon = {concept: concept for concept in concepts}
        self.contact, self.function_words = set(concepts), {*FUNCTION_WORDS}

    def inflected(self, word: str) -> list[str]:
        return [with_s(word), past(word)]

    def clause(self, c: meanings.Clause, borrow: Borrow | None = None) -> list[str]:
        verb, thing = self.word(c.action, borrow), self.word(c.thing, borrow)
        plain, negated = {
            "past": ([past(verb)], ["did", "not", verb]),
            "present": ([with_s(verb)], ["does", "not", verb]),
            "future": (["will", verb], ["will", "not", verb]),
        }[c.tense]
        words = [] if c.named else ["the", *self.words(c.person_quality, borrow)]
        words += [self.word(c.person, borrow), *(negated if c.negated else plain)]
        words += self.words(c.number, borrow) or ["the"]
        words += [*self.words(c.thing_quality, borrow), with_s(thing) if c.number else thing]
        words += ["in", "the", self.word(c.place, borrow)] if c.place else []
        return words + self.words(c.time, borrow)

    def question(self, fact: meanings.Fact) -> str:
        return f"the {fact.relation} of {fact.person} is"


class Invented(Language):
    """An invented language.

    Args:
        code: its language code.
        grammar: all keys of DEFAULTS.
        sounds: an entry of SOUNDS.
        taken: words of this world's other languages; the new words are added, so no word has two meanings.
    """

    def __init__(self, code: str, grammar: dict, concepts: list[str], sounds: tuple, seed: int, taken: set[str]):
        self.code, self.order = code, grammar["order"]
        self.adjective, self.mutation, self.time = grammar["adjective"], grammar["mutation"], grammar["time"]
        draw = random.Random(f"{seed}/{code}/lexicon")
        self.particles = {name: coin(draw, sounds, 1, taken, closed=False) for name in ("the", "not", "in", "of")}
        self.negation, self.function_words = self.particles["not"], {*self.particles.values()}
        endings = draw.sample([n + c for n in sounds[1].split() for c in sounds[2].split()], 4)
        self.endings = dict(zip(("past", "present", "future", "plural"), endings, strict=True))
        self.lexicon = {concept: coin(draw, sounds, 1 if draw.random() < 0.4 else 2, taken) for concept in concepts}
        # A share is the beginning of one fixed random order, so a larger share includes every word of a smaller one.
        self.loans = _front(concepts, grammar["shared"], f"{seed}/{code}/loans")
        self.lexicon |= {concept: concept for concept in concepts if concept in self.loans}
        self.contact = _front(concepts, grammar["contact"], f"{seed}/{code}/contact")

    def clause(self, c: meanings.Clause, borrow: Borrow | None = None) -> list[str]:
        the = self.particles["the"]
        subject = [c.person] if c.named else [the, *self._noun(self.word(c.person, borrow), c.person_quality, borrow)]
        thing = self.word(c.thing, borrow)
        if self.mutation and thing == self.lexicon[c.thing] and c.thing not in self.loans:  # no foreign words
            thing = mutate(thing)
        thing += self.endings["plural"] if c.number else ""
        parts = {
            "S": subject,
            "V": [self.particles["not"]] * c.negated + [self.word(c.action, borrow) + self.endings[c.tense]],
            "O": [*(self.words(c.number, borrow) or [the]), *self._noun(thing, c.thing_quality, borrow)],
        }
        place = [self.particles["in"], self.word(c.place, borrow)] if c.place else []
        if self.order.endswith("V"):  # as in verb-final languages: a postposition, and the place before the verb
            parts["V"] = place[::-1] + parts["V"]
            place = []
        words = [word for role in self.order for word in parts[role]] + place
        time = self.words(c.time, borrow)
        return time + words if self.time == "first" else words + time

    def inflected(self, word: str) -> list[str]:
        plural, *tenses = self.endings["plural"], *(self.endings[tense] for tense in ("past", "present", "future"))
        nouns = [mutate(word), word + plural, mutate(word) + plural]
        return [*(nouns if self.mutation else nouns[1:2]), *(word + ending for ending in tenses)]

    def _noun(self, noun: str, quality: str | None, borrow: Borrow | None) -> list[str]:
        qualities = self.words(quality, borrow)
        return [noun, *qualities] if self.adjective == "after" else [*qualities, noun]

    def question(self, fact: meanings.Fact) -> str:
        return " ".join((self.particles["the"], self.word(fact.relation), self.particles["of"], fact.person))


def _front(concepts: list[str], share: float, seed: str) -> set[str]:
    order = random.Random(seed).sample(concepts, len(concepts))
    return set(order[: round(share * len(concepts))])


def make_languages(grammars: dict[str, dict], concepts: list[str], seed: int) -> dict[str, Language]:
    """English under the first code, an invented language under each of the others."""
    taken = {*concepts, *FUNCTION_WORDS}
    languages: dict[str, Language] = {}
    for number, (code, grammar) in enumerate(grammars.items()):
        sounds = SOUNDS[(len(grammars) - 1 - number) % len(SOUNDS)]  # the last (new) language gets the first sounds
        languages[code] = Invented(code, grammar, concepts, sounds, seed, taken) if number else English(concepts)
    return languages


def coin_names(languages: dict[str, Language]) -> Callable[[random.Random], str]:
    """A function that coins names, which are spelled the same in all languages."""
    taken = {word for language in languages.values() for word in language.lexicon.values()}
    return lambda draw: coin(draw, NAME_SOUNDS, 2, taken).capitalize()
