"""The files of mean activations: named by step 9, found by step 10 and the figures.

Their names are those that the published step 10 looks for: of a run `checkpoint-<step>.<lang>.<tokens>.json` and, of
the random control, `checkpoint-<step>-r...`; of a base `<lang>.<tokens>.json` and `r.<lang>...`. Ours called a control
`r.checkpoint-<step>...` before, which is read as well. What a file is stands in its header; in its name only where it
has none.
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
    """Where the mean of a model goes; `stem` is `checkpoint-<step>`, the model's name, or empty for a base."""
    marked = (f"{stem}-r" if stem else "r") if control else stem
    return folder / ".".join(filter(None, (marked, lang, str(tokens), "json")))


def earlier_path_of(folder: Path, stem: str, lang: str, tokens: int, control: bool) -> Path:
    """Where an earlier version of step 9 put the same."""
    return folder / ".".join(filter(None, ("r" if control else "", stem, lang, str(tokens), "json")))


def is_control_name(stem: str) -> bool:
    """Whether a name says control: `r`, `checkpoint-100-r`; that of a model called `qwen-rl` does not."""
    return bool(_CONTROL.fullmatch(stem))


def step_in(name: str) -> int | None:
    """The step that the published step 10 takes from a name."""
    match = _STEP.search(name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class _File:
    path: Path
    stem: str
    lang: str
    tokens: str
    content: dict  # of a file that cannot be read nothing: its reader says so, where it is needed

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
        found = self.content.get(results.HEADER)
        return found if isinstance(found, dict) else {}

    @property
    def control(self) -> bool:
        return bool(self.header.get("control", is_control_name(self.stem)))

    @property
    def step(self) -> int:
        """That of the name, else that of the header; 0 where there is none."""
        return step_in(self.stem) or self.header.get("step") or 0

    def refuse_other(self, other: _File) -> None:
        """Refuse two files of one step and kind, unless they answer one request or say the same."""
        requests = self.header.get("request"), other.header.get("request")
        if (requests[0] is None or requests[0] != requests[1]) and self.content != other.content:
            what = "the random control" if self.control else "the neurons"
            raise InputError(
                f"{other.path} and {self.path} are both of {what} at step {self.step}, over as many tokens, and of "
                "different requests; remove the one that does not belong here"
            )


def find(folder: Path, lang: str, of_run: bool) -> dict[str, dict[tuple[bool, int], Path]]:
    """`{tokens: {(is control, step): file}}` of a language in the folder of a run, or of a base, whose step is 0.

    Files of tries with --limit are left aside, so that a try does not stop the next step.

    Raises:
        InputError: no such folder, the language is not there or there in two spellings, or two files of one step.
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
    found: dict[str, dict[tuple[bool, int], _File]] = {}
    for file in files:
        if file.lang != spelling or file.header.get("limit") is not None:
            continue
        key = file.control, file.step if of_run else 0
        file.refuse_other(found.setdefault(file.tokens, {}).setdefault(key, file))
    return {tokens: {key: file.path for key, file in here.items()} for tokens, here in found.items()}
