"""Finds pieces of a corpus that are in another script or language than the corpus is said to be.

Used by lsn/load_oscar.py. Scripts are judged by Unicode's script property, languages by py3langid (optional).
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable

from cpt_utils.base import languages
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np

# Codes of ISO 15924 that mean several scripts of Unicode; Unicode knows the others under the same code.
SCRIPTS = {
    "Hans": ("Han",),
    "Hant": ("Han", "Bopomofo"),
    "Jpan": ("Han", "Hiragana", "Katakana"),
    "Kore": ("Hangul", "Han"),
}
NO_LANGUAGE = "zxx"  # py3langid's label for text in no language


def scripts_of(code: str) -> tuple[str, ...]:
    """The Unicode scripts that a language code such as `jpn_Jpan` names; () if it names no known script."""
    import regex

    part = re.match(r"[a-z]{2,3}_([A-Z][a-z]{3})(?:_|$)", code)
    scripts = SCRIPTS.get(part[1], (part[1],)) if part else ()
    try:
        for script in scripts:
            regex.compile(rf"\p{{Script={script}}}")
    except regex.error:
        return ()
    return scripts


def letter_table(scripts: tuple[str, ...]) -> np.ndarray:
    """For each code point 0 (no letter), 1 (a letter of no script of `scripts`) or 2 (of one): uint8 [code points]."""
    import regex

    table = np.zeros(sys.maxunicode + 1, np.uint8)
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    classes = "".join(rf"\p{{Script={script}}}" for script in scripts)
    for value, letters in ((1, r"\p{L}+"), (2, rf"(?:(?=\p{{L}})[{classes}])+")):
        for run in regex.finditer(letters, every):
            table[run.start() : run.end()] = value
    return table


def script_judge(scripts: tuple[str, ...]) -> Callable[[list[str]], list[str]]:
    """A function that labels each piece "other" if half or more of its letters are not of `scripts`, else "".

    A piece without letters gets "".
    """
    table = letter_table(scripts)

    def judge(pieces: list[str]) -> list[str]:
        codes = np.frombuffer("".join(pieces).encode("utf-32-le", "surrogatepass"), "<u4")
        kinds = table[codes]
        ends = np.cumsum([len(piece) for piece in pieces])
        # Differences of running sums, because pieces may be empty.
        letters, of_scripts = (
            np.diff(np.concatenate([[0], np.cumsum(kinds >= kind)])[np.concatenate([[0], ends])]) for kind in (1, 2)
        )
        return ["other" if wrong else "" for wrong in ((letters > 0) & (2 * of_scripts <= letters)).tolist()]

    return judge


def langid_labels(code: str, flag: str = "--filter language", instead: str = "use --filter script") -> list[str]:
    """The labels of py3langid that mean the language `code`.

    Raises:
        InputError: py3langid is not installed, or does not know the language.
    """
    if importlib.util.find_spec("py3langid") is None:
        raise InputError(f"{flag} needs py3langid: pip install py3langid, or {instead}")
    import py3langid

    known = {label for label, _ in py3langid.rank("")}
    language = languages.table().get(code)
    labels = sorted(known & set(language.spellings if language else (code,)))
    if not labels:
        raise InputError(f"{flag}: py3langid does not know {code}; {instead}, or leave it out")
    return labels


def language_judge(labels: list[str]) -> Callable[[list[str]], list[str]]:
    """A function that labels each piece with the language it is identified as, or "" for one of `labels` or none."""
    import py3langid

    fine = {*labels, NO_LANGUAGE}

    def judge(pieces: list[str]) -> list[str]:
        # Digits and punctuation are identified as whatever language comes first.
        named = (py3langid.classify(piece)[0] if any(map(str.isalpha, piece)) else NO_LANGUAGE for piece in pieces)
        return ["" if label in fine else label for label in named]

    return judge


def judge_of(code: str, kind: str) -> tuple[str | None, Callable[[list[str]], list[str]] | None]:
    """What pieces are judged by, and the function; without a filter by script, or (None, None) if the code names none.

    Raises:
        InputError: the filter cannot judge this language.
    """
    if kind == "language":
        return "language", language_judge(langid_labels(code))
    scripts = scripts_of(code)
    if scripts:
        return "script", script_judge(scripts)
    if kind == "script":
        raise InputError(f"--filter script: {code} names no script; write it with its script, as in gle_Latn")
    return None, None
