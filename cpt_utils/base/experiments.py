"""What the experiments' scripts say of themselves: where their results lie in a study, and what their figures show.

A script beside a README.md says it in literals at its top level, which are read without importing it:

    RESULTS = {"deactivation": "lsn/deactivate.json"}
    ASKED = {"deactivation": "Does silencing a language's neurons harm that language?"}
    CAPTIONS = {"deactivation": "Part II: 2. Language-specific neurons\\nThe change of the loss per token when ..."}
    IMAGES = {"lsn_counts": "{name}.report-counts.png"}

A step's path is below the study's `results`; `{name}` in it is the study's name. What a step asks is a sentence.
A caption's first line is its section in the report; the rest is reStructuredText, or the name of another caption, whose
text is this one's, too. Its figure is beside the result of the step of that name, with the suffix .png; where it is
another file, IMAGES says which, in the folder of the result, with `*` for what is not known beforehand.
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
    """Where `step` leaves its result below a study's `results`."""
    return _find("RESULTS", step)[0]


def made_by(step: str) -> str:
    """The script that makes the result of `step`, by its path in the repository."""
    return _find("RESULTS", step)[1]


def captions(script: str = "") -> dict[str, tuple[str, str | None, str]]:
    """Section, subsection (None: none) and text of every caption by its name; of one `script` where it is given."""
    found = {}
    for name, (caption, by) in said("CAPTIONS").items():
        section, _, text = inspect.cleandoc(caption).partition("\n")
        found[name] = (*section.split(": ", 1), None)[:2], text, by
    texts = {name: text for name, (_, text, _) in found.items()}
    return {
        name: (*section, texts.get(text, text)) for name, (section, text, by) in found.items() if script in ("", by)
    }


@functools.cache
def said(constant: str) -> dict[str, tuple]:
    """{key: (value, script)} of such dicts (RESULTS, ASKED, CAPTIONS, IMAGES) of scripts, which lie beside a README.md.

    Raises:
        InputError: such a dict is not a literal, or two scripts have the same key in it.
    """
    found: dict[str, tuple] = {}
    folders = sorted(readme.parent for readme in cli.REPOSITORY.glob("*/README.md"))
    for path in (path for folder in folders for path in sorted(folder.glob("*.py"))):
        script = f"{path.parent.name}/{path.name}"
        for key, value in _literal(path, constant).items():
            if key in found:
                first = found[key][1]
                raise InputError(f"{first} and {script} both have {key!r} in {constant}; rename it in one of them")
            found[key] = value, script
    return found


def _find(constant: str, key: str) -> tuple:
    found = said(constant)
    if key not in found:
        bare = [path for path in cli.REPOSITORY.glob("*/*.py") if not path.with_name("README.md").is_file()]
        for path in bare:
            if key in _literal(path, constant):
                raise InputError(f"{path} has {key!r} in {constant}, but its folder has no README.md; write one")
        raise InputError(f"no script below {cli.REPOSITORY} has {key!r} in {constant}; it has {', '.join(found)}")
    return found[key]


def _literal(path: Path, constant: str) -> dict:
    """The dict that `path` assigns to `constant` at its top level; {} where it does not."""
    text = path.read_text(encoding="utf-8", errors="replace")
    start = re.search(rf"^{constant}\b[^=\n]*= *(?=\{{)", text, re.M)
    if not start:
        return {}
    for value in _prefixes(text[start.end() :]):
        with contextlib.suppress(SyntaxError):  # not yet whole
            try:
                found = ast.literal_eval(value)
            except ValueError:
                found = None
            if isinstance(found, dict):
                return found
            break
    raise InputError(f"{path}: {constant} must be a plain dict of texts, which is read without running the script")


def _prefixes(text: str) -> Iterator[str]:
    """`text` up to the end of its first line, of its second, ..."""
    for line_end in re.finditer(r"\n|\Z", text):
        yield text[: line_end.start()]
