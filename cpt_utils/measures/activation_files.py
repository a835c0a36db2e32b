"""The files of mean activations: written by step 9, read by step 10 and the figures.

Their names are those that the published step 10 expects: for a run `checkpoint-<step>.<lang>.<tokens>.json` and, for
the random control, `checkpoint-<step>-r...`; for a base `<lang>.<tokens>.json` and `r.<lang>...`. An earlier version
called a control `r.checkpoint-<step>...`, which is read as well. The header says what a file holds; only without one
does the name count.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import experiments, languages, results
from cpt_utils.base.errors import InputError

_NAME = re.compile(r"(?:(?P<stem>[^.].*)\.)?(?P<lang>[^.]+)\.(?P<tokens>\d+)\.json")
_STEP = re.compile(r"checkpoint-(\d+)")
_CONTROL = re.compile(r"r|r\..*|.*checkpoint-\d+-r.*|.*-r")


def path_of(folder: Path, stem: str, lang: str, tokens: int, control: bool) -> Path:
    """The path for the means of a model; `stem` is `checkpoint-<step>`, the model's name, or empty for a base."""
    marked = (f"{stem}-r" if stem else "r") if control else stem
    return folder / ".".join(filter(None, (marked, lang, str(tokens), "json")))


def earlier_path_of(folder: Path, stem: str, lang: str, tokens: int, control: bool) -> Path:
    """The path that an earlier version of step 9 used for the same file."""
    return folder / ".".join(filter(None, ("r" if control else "", stem, lang, str(tokens), "json")))


def is_control_name(stem: str) -> bool:
    """Whether a name denotes a control: `r`, `checkpoint-100-r`, but not that of a model called `qwen-rl`."""
    return bool(_CONTROL.fullmatch(stem))


def step_in(name: str) -> int | None:
    """The step that the published step 10 reads from a name."""
    match = _STEP.search(name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class _File:
    path: Path
    stem: str
    lang: str
    tokens: str
    content: dict  # empty if the file cannot be read: its reader reports that, if it is needed

    @classmethod
    def read(cls, path: Path) -> _File | None:
        """None for a file of another name."""
        match = _NAME.fullmatch(path.name)
        if match is None:
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = {}
        return cls(path, match["stem"] or "", match["lang"], match["tokens"], content if type(content) is dict else {})

    @property
    def header(self) -> dict:
        header = self.content.get(results.HEADER)
        return header if isinstance(header, dict) else {}

    @property
    def control(self) -> bool:
        return bool(self.header.get("control", is_control_name(self.stem)))

    @property
    def step(self) -> int:
        """The step in the name, else that in the header; 0 if there is none."""
        return step_in(self.stem) or self.header.get("step") or 0

    def refuse_other(self, other: _File) -> None:
        """Refuse two files of one step and kind, unless they have the same request or content."""
        requests = self.header.get("request"), other.header.get("request")
        if (requests[0] is None or requests[0] != requests[1]) and self.content != other.content:
            what = "the random control" if self.control else "the neurons"
            raise InputError(
                f"{other.path} and {self.path} are both of {what} at step {self.step}, over equally many tokens, but "
                "from different requests; remove the one that does not belong here"
            )


def find(folder: Path, lang: str, of_run: bool) -> dict[str, dict[tuple[bool, int], Path]]:
    """`{tokens: {(is control, step): file}}` of a language in the folder of a run, or of a base, whose step is 0.

    Files of trial runs with --limit are ignored, so they do not stop the next step.

    Raises:
        InputError: no such folder, the language is missing or has two spellings, or two files of one step.
    """
    if not folder.is_dir():
        whose, flag = ("run", "--model-name") if of_run else ("base", "--base-tag")
        made_by = experiments.made_by("lsn_activation")
        raise InputError(f"no activations of the {whose}: {folder} does not exist; run {made_by}, or give {flag}")
    files = [file for path in sorted(folder.iterdir()) if (file := _File.read(path))]
    if of_run:
        files = [file for file in files if file.step]
    else:
        files = [file for file in files if step_in(file.stem) is None]
        files = [file for file in files if file.stem in ("", "r")] or files
    spelling = languages.find({file.lang for file in files}, lang, what=f"activations in {folder}")
    by_tokens: dict[str, dict[tuple[bool, int], _File]] = {}
    for file in files:
        if file.lang != spelling or file.header.get("limit") is not None:
            continue
        key = file.control, file.step if of_run else 0
        file.refuse_other(by_tokens.setdefault(file.tokens, {}).setdefault(key, file))
    return {tokens: {key: file.path for key, file in by_key.items()} for tokens, by_key in by_tokens.items()}
