"""Text of another script or language: which pieces of a corpus are not of the language that it is said to be of.

Used by lsn/load_oscar.py. Unicode's script property tells scripts apart; py3langid (optional) tells languages apart.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable

from cpt_utils.base import languages
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np

# Codes of ISO 15924 that stand for several scripts of Unicode; the others are known to Unicode under the same code.
SCRIPTS = {
    "Hans": ("Han",),
    "Hant": ("Han", "Bopomofo"),
    "Jpan": ("Han", "Hiragana", "Katakana"),
    "Kore": ("Hangul", "Han"),
}
NO_LANGUAGE = "zxx"  # the label that py3langid gives to what is no language


def scripts_of(code: str) -> tuple[str, ...]:
    """The Unicode scripts that a language code such as `jpn_Jpan` names; none for a tag that names no known script."""
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
    """For each code point 0 (no letter), 1 (a letter) or 2 (a letter of `scripts`), uint8 [code points]."""
    import regex

    table = np.zeros(sys.maxunicode + 1, np.uint8)
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    classes = "".join(rf"\p{{Script={script}}}" for script in scripts)
    for value, letters in ((1, r"\p{L}+"), (2, rf"(?:(?=\p{{L}})[{classes}])+")):
        for run in regex.finditer(letters, every):
            table[run.start() : run.end()] = value
    return table


def script_judge(scripts: tuple[str, ...]) -> Callable[[list[str]], list[str]]:
    """A function that says of each piece `other` where half of its letters or more are not of `scripts`, else ``.

    A piece without letters is of any script.
    """
    table = letter_table(scripts)

    def judge(pieces: list[str]) -> list[str]:
        codes = np.frombuffer("".join(pieces).encode("utf-32-le", "surrogatepass"), "<u4")
        kinds = table[codes]
        ends = np.cumsum([len(piece) for piece in pieces])
        # Differences of running sums, because a piece may be empty.
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
    """A function that says which other language each piece is identified as, `` for that of `labels` or for none."""
    import py3langid

    fine = {*labels, NO_LANGUAGE}

    def judge(pieces: list[str]) -> list[str]:
        # Digits and punctuation are identified as whatever language comes first.
        found = (py3langid.classify(piece)[0] if any(map(str.isalpha, piece)) else NO_LANGUAGE for piece in pieces)
        return ["" if label in fine else label for label in found]

    return judge


def judge_of(code: str, kind: str) -> tuple[str | None, Callable[[list[str]], list[str]] | None]:
    """What pieces are judged by, and the function; without a filter by script, where the code names one.

    Raises:
        InputError: a filter that cannot judge this language.
    """
    if kind == "language":
        return "language", language_judge(langid_labels(code))
    scripts = scripts_of(code)
    if scripts:
        return "script", script_judge(scripts)
    if kind == "script":
        raise InputError(f"--filter script: {code} names no script; write it with its script, as in gle_Latn")
    return None, None
