"""The meanings of the demo world, independent of any language. Used by demo/world.py."""

from __future__ import annotations

import random
from dataclasses import dataclass

GENERAL = "general"  # the key of words and clauses without a topic


@dataclass(frozen=True)
class Clause:
    """Who does what to what, in concepts (English words). Clauses with equal fields have the same meaning."""

    person: str  # a concept, or a name (capitalised)
    person_quality: str | None
    action: str
    tense: str  # past, present, future
    negated: bool
    thing: str
    thing_quality: str | None
    number: str | None
    place: str | None
    time: str | None

    @property
    def named(self) -> bool:
        return self.person[0].isupper()


@dataclass(frozen=True)
class Sentence:
    clauses: tuple[Clause, ...]
    conjunction: str | None = None


@dataclass(frozen=True)
class Fact:
    """A person's home, job or pet. `told_in`: the languages whose training text contains it."""

    person: str
    relation: str
    answer: str
    told_in: tuple[str, ...]


class World:
    """Seeded, sharp selectional preferences (who does what to what) in each topic, and random sentences that obey them.

    Each person in a topic has two actions, each action two things and one place, each thing two qualities. Otherwise
    the words of a topic would be interchangeable, a model could not distinguish them, and retrieval would align topics,
    not sentences.

    Args:
        vocabulary: the contents of demo/vocabulary.yaml.
        texts: the probabilities under `texts` in a world file.
    """

    def __init__(self, vocabulary: dict, texts: dict, seed: int):
        self.vocabulary, self.texts = vocabulary, texts
        self.labels = list(vocabulary["topics"])
        self.reserved: set[Clause] = set()
        draw = random.Random(f"{seed}/selection")
        self.topics: dict[str, dict] = {}
        for topic, words in [*vocabulary["topics"].items(), (GENERAL, vocabulary[GENERAL])]:
            self.topics[topic] = {
                "people": {w: _two(draw, words["actions"], i) for i, w in enumerate(words["people"])},
                "actions": {w: _two(draw, words["things"], i) for i, w in enumerate(words["actions"])},
                "places": {w: draw.choice(words["places"]) for w in words["actions"]},
                "things": {w: draw.sample(vocabulary["of_things"], 2) for w in words["things"]},
            }

    def reserve(self, sentences: list[Sentence]) -> None:
        """Keep the clauses of these test sentences out of everything drawn from now on."""
        self.reserved.update(clause for sentence in sentences for clause in sentence.clauses)

    def label(self, draw: random.Random) -> str:
        return draw.choice(self.labels)

    def clause(self, draw: random.Random, topic: str) -> Clause:
        """A clause on `topic`, with some words replaced by names and general words, which keeps topic cues sparse."""
        chance, words, general = self.texts, self.topics[topic], self.topics[GENERAL]
        person = draw.choice(list(words["people"]))
        action = draw.choice(words["people"][person])
        thing = draw.choice(words["actions"][action])
        place = words["places"][action] if draw.random() < chance["place"] else None
        quality = draw.choice(words["things"][thing]) if draw.random() < chance["quality"] else None
        if draw.random() < chance["name"]:
            person = draw.choice(self.vocabulary["names"])
        elif draw.random() < chance["general"]:
            person = draw.choice(list(general["people"]))
        if draw.random() < chance["general"]:
            action = draw.choice(list(general["actions"]))
        if draw.random() < chance["general"]:
            thing = draw.choice(list(general["things"]))
            quality = draw.choice(general["things"][thing]) if quality else None
        return Clause(
            person,
            _maybe(draw, self.vocabulary["of_people"], 0 if person[0].isupper() else chance["quality"] / 2),
            action,
            draw.choice(("past", "present", "future")),
            draw.random() < chance["negation"],
            thing,
            quality,
            _maybe(draw, self.vocabulary["numbers"], chance["number"]),
            place,
            _maybe(draw, self.vocabulary["times"], chance["time"]),
        )

    def sentence(self, draw: random.Random, topic: str) -> Sentence:
        """A sentence of one or two clauses, none of which is reserved."""
        while True:
            if draw.random() < self.texts["two_clauses"]:
                conjunction = draw.choice(self.vocabulary["conjunctions"])
                sentence = Sentence((self.clause(draw, topic), self.clause(draw, topic)), conjunction)
            else:
                sentence = Sentence((self.clause(draw, topic),))
            if self.reserved.isdisjoint(sentence.clauses):
                return sentence

    def passage(self, draw: random.Random, label: str) -> list[Sentence]:
        """3 to 5 sentences on `label`, fewer than half of them distractors (on another topic or none)."""
        n = draw.randint(3, 5)
        off = sum(draw.random() < self.texts["distractor"] for _ in range((n - 1) // 2))
        others = [topic for topic in self.topics if topic != label]
        topics = [label] * (n - off) + [draw.choice(others) for _ in range(off)]
        draw.shuffle(topics)
        return [self.sentence(draw, topic) for topic in topics]

    def concepts(self) -> list[str]:
        """Every concept that needs a word, each once, in the order of the vocabulary."""
        v = self.vocabulary
        concepts = [w for words in [*v["topics"].values(), v[GENERAL]] for group in words.values() for w in group]
        for key in ("of_people", "of_things", "times", "numbers", "conjunctions"):
            concepts += v[key]
        for relation, answers in v["facts"].items():
            concepts += [relation, *(answers if isinstance(answers, list) else [])]
        return list(dict.fromkeys(concepts))


def _two(draw: random.Random, words: list[str], i: int) -> list[str]:
    """Two of `words`: the i-th (cyclically, so that each is used), and another at random."""
    first = words[i % len(words)]
    return [first, draw.choice([w for w in words if w != first])]


def _maybe(draw: random.Random, words: list[str], chance: float) -> str | None:
    return draw.choice(words) if draw.random() < chance else None


def make_facts(world: World, codes: list[str], persons: int, coin, seed: int) -> list[Fact]:
    """A home, a job and a pet for each of `persons`; each person is known in one language or in all, in rotation.

    Args:
        coin: makes a person's or town's name from a random.Random.
    """
    draw = random.Random(f"{seed}/facts")
    towns = [coin(draw) for _ in range(8)]
    answers = {relation: towns if words == "names" else words for relation, words in world.vocabulary["facts"].items()}
    turns = [*((code,) for code in codes), tuple(codes)]
    facts = []
    for number in range(persons):
        person = coin(draw)
        facts += [
            Fact(person, relation, draw.choice(answers[relation]), turns[number % len(turns)]) for relation in answers
        ]
    return facts
