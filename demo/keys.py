"""The keys of a world file, explained in demo/world.yaml. Imported only when a world file is read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from cpt_utils.base import cli
from cpt_utils.base.keys import Keys, group

grammar = cli.sibling("demo/grammar.py")

Share = Annotated[float, Field(ge=0, le=1, description="it must be between 0 and 1")]
Size = Annotated[float, Field(gt=0, description="it must be above 0")]
Count = Annotated[int, Field(ge=0, description="it must be a whole number, 0 or more")]
Some = Annotated[int, Field(ge=1, description="it must be a whole number above 0")]
Kind = Literal["text", "pairs", "mixed", "prompts", "facts"]
CHANCES = "two_clauses name general distractor quality number negation place time borrowed fact_pairs"


class Language(Keys):
    """Keys that a language leaves out are taken from `grammar.DEFAULTS`."""

    order: Literal[grammar.ORDERS] = None
    adjective: Any = None
    mutation: Any = None
    time: Any = None
    shared: Share = None
    contact: Share = None


class Cpt(Keys):
    words: Size
    replay: Share
    replay_prompts: Share
    facts: Share
    others: Annotated[list[str], Field(default_factory=list, description="it must be a list of language codes")]


class World(Keys):
    out: Annotated[str, Field(description="it must be a folder")]
    seed: Any
    languages: dict[str, Language | None]
    base: dict[Kind, dict[str, float]]
    cpt: Cpt
    scale: Size
    test_sentences: Some
    heldout_documents: Some
    lsn_documents: Size
    task: group("train dev test", Count, ...)
    persons: Some
    texts: group(CHANCES, Share, ...)
