"""Language codes: one scheme everywhere (FLORES+), and one table, `languages.tsv`, for the other spellings.

The table has a row for each of the 230 language varieties of FLORES+:

- `flores_plus`: the canonical code: ISO 639-3, script, and a variety where FLORES+ has several (`twi_Latn_akua1239`);
- `sib200`: the code in SIB-200, empty if it is the same, `-` if SIB-200 lacks the variety. FLORES-200, Belebele and
  mOSCAR use the same spelling (all 163 languages of mOSCAR 1 are covered);
- `short`: two- and three-letter codes, and two longer ones of FLORES-101 (`zho_simpl`, `zho_trad`). A code that is in
  several rows (`no`: Bokmål and Nynorsk) is refused as ambiguous; if one script is the usual one, the short code is
  only in that row (`zh`: simplified Mandarin);
- `name`: in English.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

from cpt_utils.base.errors import InputError

SOURCES = ("flores_plus", "flores200", "sib200", "belebele", "moscar")
# ISO 639-2 leaves qaa to qtz to private use: languages that exist only in a user's own texts.
_PRIVATE = re.compile(r"q[a-t][a-z]_[A-Z][a-z]{3}(_\w+)?")
_RAISE = object()


@dataclass(frozen=True)
class Language:
    code: str
    sib200: str | None
    short: tuple[str, ...]
    name: str

    @property
    def spellings(self) -> tuple[str, ...]:
        """Every code of this language, the canonical one first."""
        older = (self.sib200,) if self.sib200 and self.sib200 != self.code else ()
        return (self.code, *older, *self.short)


@lru_cache(maxsize=1)
def table() -> dict[str, Language]:
    """The languages of `languages.tsv` by canonical code."""
    text = resources.files("cpt_utils.base").joinpath("languages.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines()[1:])
    return {
        code: Language(code, None if older == "-" else older or code, tuple(short.split()), name)
        for code, older, short, name in rows
    }


def known() -> list[str]:
    """All canonical codes, sorted."""
    return sorted(table())


@lru_cache(maxsize=1)
def _meanings() -> dict[str, list[str]]:
    """Every spelling with the canonical codes that it may mean."""
    meanings: dict[str, list[str]] = {}
    for language in table().values():
        for spelling in language.spellings:
            meanings.setdefault(spelling, []).append(language.code)
    return meanings


def canonical(code: str, any_tag: bool = False) -> str:
    """The FLORES+ code of `code`: `zho_Hans` -> `cmn_Hans`, `ga` -> `gle_Latn`. Private-use codes (`qaa_Latn`) stay.

    Args:
        any_tag: return a tag that is not in the table unchanged (for text files).

    Raises:
        InputError: the code is unknown (the nearest ones are named), or means several languages.
    """
    meanings = _meanings().get(code, [])
    if len(meanings) == 1:
        return meanings[0]
    if any_tag or _PRIVATE.fullmatch(code):
        return code
    if meanings:
        raise InputError(f"language {code!r} is ambiguous; write {' or '.join(map(_named, meanings))}")
    raise InputError(f"unknown language {code!r}; {_nearest(code)}")


def _nearest(code: str) -> str:
    # Near misses: another case, a hyphen, the English name; the same language with another script; then similar codes.
    lower = code.lower().replace("-", "_")
    lowered = {spelling.lower(): codes for spelling, codes in _meanings().items()}
    first = lower.partition("_")[0]
    similar = difflib.get_close_matches(lower, list(lowered), n=3, cutoff=0.6)
    near = [
        *(lowered.get(lower) or []),
        *(language.code for language in table().values() if lower == language.name.lower()),
        *(c for spelling, codes in lowered.items() if first == spelling.partition("_")[0] for c in codes),
        *(c for spelling in similar for c in lowered[spelling]),
    ]
    nearest = list(dict.fromkeys(near))[:4]
    if nearest:
        return f"the nearest are {', '.join(map(_named, nearest))}"
    return "codes are FLORES+ ones such as eng_Latn or gle_Latn; private ones are qaa_Latn to qtz_Latn"


def _named(code: str) -> str:
    return f"{code} ({table()[code].name})"


def name(code: str) -> str:
    """The English name, or the code itself if it is not in the table."""
    language = table().get(canonical(code, any_tag=True))
    return language.name if language else code


def named(code: str) -> str:
    """ "Basque (eus_Latn)"; the code alone if it is not in the table."""
    english = name(code)
    return f"{english} ({code})" if english != code else code


def is_private(code: str) -> bool:
    """Whether a code is reserved for private use (`qaa_Latn`)."""
    return bool(_PRIVATE.fullmatch(code))


def spelling(code: str, source: str = "flores_plus") -> str:
    """How `source` (one of SOURCES) spells the language: `spelling("cmn_Hans", "sib200")` -> `zho_Hans`.

    Raises:
        InputError: unknown code, or a language that SIB-200 does not have.
    """
    if source not in SOURCES:
        raise ValueError(f"source {source!r} is not one of {', '.join(SOURCES)}")
    language = table().get(canonical(code))
    if language is None or source == "flores_plus":
        return canonical(code)
    if language.sib200 is None:
        if source == "sib200":
            raise InputError(f"SIB-200 has no {_named(language.code)}; choose another source or language")
        return language.code
    return language.sib200


def same(a: str, b: str) -> bool:
    """Whether two codes mean the same language, whatever their spelling; tags not in the table are compared as text."""
    return canonical(a, any_tag=True) == canonical(b, any_tag=True)


def several(given: str | Iterable, flag: str) -> list[str]:
    """The languages of `flag` (separated by commas) or of a study's languages.lsn, in the spelling used there.

    Raises:
        InputError: no language, a code that is not text, or one language twice.
    """
    codes = re.split(r"[,\s]+", given.strip(", \n")) if isinstance(given, str) else list(given)
    if codes in ([], [""]):
        raise InputError(f"{flag} (study key languages.lsn) names no language; give codes like en,ga")
    for code in codes:
        if not isinstance(code, str):
            raise InputError(f"languages.lsn holds {code!r}; put the code in quotes (no is false in YAML)")
    refuse_twice(codes)
    return codes


def refuse_twice(codes: list[str], do: str = "name each once") -> None:
    """Refuse a language that is listed twice, also in two spellings; `do` says how to correct it."""
    for i, code in enumerate(codes):
        for other in codes[:i]:
            if same(other, code):
                raise InputError(f"{other} and {code} are one language; {do}")


def find(names: Iterable[str], code: str, what: str = "languages", default=_RAISE) -> str:
    """The entry of `names` (file stems, keys of a mapping) that means the language `code`.

    The given spelling is tried first, then equivalent ones.

    Raises:
        InputError: no entry (unless there is a `default`), or two entries in equivalent spellings.
    """
    names = list(names)
    if code in names:
        return code
    matches = sorted({entry for entry in names if same(entry, code)})
    if len(matches) > 1:
        raise InputError(f"{what}: {' and '.join(matches)} both mean {code}; write the one that is meant")
    if matches:
        return matches[0]
    if default is not _RAISE:
        return default
    other = canonical(code, any_tag=True)
    meaning = f" ({other})" if other != code else ""
    listed = ", ".join(sorted(names)[:12]) + (", .." if len(names) > 12 else "") or "nothing"
    raise InputError(f"{what}: nothing for {code}{meaning}; there is {listed}")


def find_pair(names: Iterable[str], base: str, target: str, what: str = "language pairs") -> str:
    """The entry `<base>-<target>` of `names` (folders of retrieval results), in the given or an equivalent spelling.

    Raises:
        InputError: no entry, or two in equivalent spellings.
    """
    names = list(names)
    if f"{base}-{target}" in names:
        return f"{base}-{target}"
    pairs = [name for name in names if name.count("-") == 1]
    matches = sorted(
        name for name in pairs if all(same(a, b) for a, b in zip(name.split("-"), (base, target), strict=True))
    )
    if len(matches) > 1:
        raise InputError(f"{what}: {' and '.join(matches)} both mean {base}-{target}; write the one that is meant")
    if not matches:
        raise InputError(f"{what}: nothing for {base}-{target}; there is {', '.join(sorted(names)) or 'nothing'}")
    return matches[0]
