"""Unfinished counts of lsn/activation.py, from which a killed run resumes."""

from __future__ import annotations

import json
from pathlib import Path

from cpt_utils.base import code, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch


class Partial:
    """This process's counts so far: `done` marks its blocks (`others` those of other processes), `counts` is int64
    [segments, L, I], and `routed` int64 [segments, L, E], with E = 0 for a model without experts.

    Every process keeps its own file, and the state is the sum over the files. So a run may resume with another number
    of processes, and no block is counted twice.
    """

    SUMS = ("counts", "routed")

    def __init__(self, out: Path, rank: int, request: dict, n_blocks: int, shape: tuple[int, int, int, int]):
        """`out`: where the result will be; `shape`: segments, L, I, E."""
        self.stem, self.request = partial_stem(out), json.dumps(request)
        self.path = self.stem.with_name(f"{self.stem.name}.{rank}.pt")
        self.done = torch.zeros(n_blocks, dtype=torch.bool)
        self.counts = torch.zeros(shape[:3], dtype=torch.long)
        self.routed = torch.zeros((*shape[:2], shape[3]), dtype=torch.long)
        self.others = torch.zeros(n_blocks, dtype=torch.bool)
        for path in partial_files(self.stem):
            content = self._read(path)
            if content is None:
                continue
            if path == self.path:
                self.done, self.counts, self.routed = (content[key] for key in ("done", *self.SUMS))
            else:
                self.others |= content["done"]

    def _read(self, path: Path) -> dict | None:
        """A file's content; None if it is of another request or other code, and counting starts over."""
        content = results.read_tensors(path)
        is_same = content.get("request") == self.request and not code.is_other(content.get("code"))
        return content if is_same and "routed" in content else None

    def save(self) -> None:
        sums = {key: getattr(self, key) for key in self.SUMS}
        facts = {"request": self.request, "code": code.running() or ""}
        results.write_tensors(self.path, {**facts, "done": self.done, **sums})

    def total(self) -> list[torch.Tensor]:
        """The sums over all processes' files: `counts` and `routed`.

        Raises:
            InputError: a block is missing or was counted twice, for example because a process was lost.
        """
        contents = [content for content in map(self._read, partial_files(self.stem)) if content is not None]
        if not contents:
            raise InputError(f"the partial counts {self.stem}.*.pt are gone: was the same command running twice?")
        times = sum(content["done"].long() for content in contents)
        if not bool((times == 1).all()):
            raise InputError(
                f"{int((times != 1).sum())} blocks were not counted exactly once; run the same command again"
            )
        return [sum(content[key] for content in contents) for key in self.SUMS]


def partial_stem(out: Path) -> Path:
    """The path of a result's partial counts, up to the number of the process."""
    return out.with_name(f".{out.stem}.partial")


def partial_files(stem: Path) -> list[Path]:
    return sorted(stem.parent.glob(f"{stem.name}.*.pt")) if stem.parent.is_dir() else []


def remove_partial(out: Path) -> None:
    for path in partial_files(partial_stem(out)):
        path.unlink(missing_ok=True)
