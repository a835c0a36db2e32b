"""SIB-200 as a classification task: its categories, our prompt, and a reader of local files."""

from __future__ import annotations

from pathlib import Path

from cpt_utils.base import textfiles
from cpt_utils.base.errors import InputError

CHOICES = ("science/technology", "travel", "politics", "sports", "health", "entertainment", "geography")
PROMPT = 'The category of "{{text}}" is:'


def read_tsv(path: Path) -> list[dict[str, str]]:
    """The rows of a TSV file in the form of SIB-200, as `datasets` reads them for lm_eval.

    Raises:
        InputError: a file not as pandas writes it (`textfiles.quoted_rows`), an empty text, an unknown category, or
            characters that the reader of `datasets` takes for the end of a line.
    """
    rows = textfiles.quoted_rows(path, ("category", "text"))
    for number, row in enumerate(rows, start=2):
        if any("\r" in cell or "\0" in cell for cell in row.values()):
            reason = "a carriage return or NUL inside the row"
        elif row["category"] not in CHOICES:
            reason = f"category {row['category']!r} is not one of {', '.join(CHOICES)}"
        elif not row["text"].strip():
            reason = "the text is empty"
        else:
            continue
        raise InputError(f"{path}, line {number}: {reason}; correct the row or leave it out")
    return rows
