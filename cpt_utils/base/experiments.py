"""Declarations in the experiments' scripts: the paths of their results in a study, and captions of their figures.

They are literals at the top level of a script beside a README.md, and are read without importing it:

    RESULTS = {"deactivation": "lsn/deactivate.json"}
    ASKED = {"deactivation": "Does silencing a language's neurons harm that language?"}
    CAPTIONS = {"deactivation": "Part II: 2. Language-specific neurons\\nThe change of the loss per token when ..."}
    IMAGES = {"lsn_counts": "{name}.report-counts.png"}

RESULTS gives a step's path below the study's `results`, with `{name}` for the study's name; ASKED its question.
A caption's first line is its section in the report; the rest is reStructuredText, or the name of another caption whose
text it repeats. The caption's figure has the path of the result of the step of that name, with the suffix .png. IMAGES
names any other file, in the folder of the result, with `*` for unknown parts.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError


def result(step: str) -> str:
    """The path of `step`'s result below a study's `results`."""
    return _find("RESULTS", step)[0]


def made_by(step: str) -> str:
    """The script that makes the result of `step`, as a path in the repository."""
    return _find("RESULTS", step)[1]


def captions(script: str = "") -> dict[str, tuple[str, str | None, str]]:
    """Section, subsection (or None) and text of every caption by name; with `script`, only of its captions."""
    entries = {}
    for name, (caption, by) in said("CAPTIONS").items():
        section, _, text = inspect.cleandoc(caption).partition("\n")
        entries[name] = (*section.split(": ", 1), None)[:2], text, by
    texts = {name: text for name, (_, text, _) in entries.items()}
    return {
        name: (*section, texts.get(text, text)) for name, (section, text, by) in entries.items() if script in ("", by)
    }


@functools.cache
def said(constant: str) -> dict[str, tuple]:
    """{key: (value, script)} of one such dict (RESULTS, ASKED, CAPTIONS, IMAGES) over all scripts beside a README.md.

    Raises:
        InputError: the dict of a script is not a literal, or two scripts have the same key in it.
    """
    entries: dict[str, tuple] = {}
    folders = sorted(readme.parent for readme in cli.REPOSITORY.glob("*/README.md"))
    for path in (path for folder in folders for path in sorted(folder.glob("*.py"))):
        script = f"{path.parent.name}/{path.name}"
        for key, value in _literal(path, constant).items():
            if key in entries:
                first = entries[key][1]
                raise InputError(f"{first} and {script} both have {key!r} in {constant}; rename it in one of them")
            entries[key] = value, script
    return entries


def _find(constant: str, key: str) -> tuple:
    entries = said(constant)
    if key not in entries:
        bare = [path for path in cli.REPOSITORY.glob("*/*.py") if not path.with_name("README.md").is_file()]
        for path in bare:
            if key in _literal(path, constant):
                raise InputError(f"{path} has {key!r} in {constant}, but its folder has no README.md; write one")
        raise InputError(f"no script below {cli.REPOSITORY} has {key!r} in {constant}; it has {', '.join(entries)}")
    return entries[key]


def _literal(path: Path, constant: str) -> dict:
    """The dict that `path` assigns to `constant` at its top level; {} if it does not assign one."""
    text = path.read_text(encoding="utf-8", errors="replace")
    start = re.search(rf"^{constant}\b[^=\n]*= *(?=\{{)", text, re.M)
    if not start:
        return {}
    for value in _prefixes(text[start.end() :]):
        with contextlib.suppress(SyntaxError):  # not yet complete
            try:
                parsed = ast.literal_eval(value)
            except ValueError:
                parsed = None
            if isinstance(parsed, dict):
                return parsed
            break
    raise InputError(f"{path}: {constant} must be a plain dict of texts, which is read without running the script")


def _prefixes(text: str) -> Iterator[str]:
    """`text` up to the end of its first line, of its second, ..."""
    for line_end in re.finditer(r"\n|\Z", text):
        yield text[: line_end.start()]
