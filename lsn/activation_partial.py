"""Counts of lsn/activation.py that are not finished: what a killed run goes on from."""

from __future__ import annotations

import json
from pathlib import Path

from cpt_utils.base import code, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch


class Partial:
    """Counts so far, of this process and of earlier ones: `done` marks blocks, `counts` is int64 [segments, L, I], and
    `routed` int64 [segments, L, E], with E = 0 for a model without experts.

    Every process keeps a file of its own; the sum over the files is the state. So a run may go on with another number
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
            found = self._read(path)
            if found is None:
                continue
            if path == self.path:
                self.done, self.counts, self.routed = (found[key] for key in ("done", *self.SUMS))
            else:
                self.others |= found["done"]

    def _read(self, path: Path) -> dict | None:
        """A file's content; None for one of another request or of other code, which is started over."""
        found = results.read_tensors(path)
        mine = found.get("request") == self.request and not code.is_other(found.get("code"))
        return found if mine and "routed" in found else None

    def save(self) -> None:
        sums = {key: getattr(self, key) for key in self.SUMS}
        facts = {"request": self.request, "code": code.running() or ""}
        results.write_tensors(self.path, {**facts, "done": self.done, **sums})

    def total(self) -> list[torch.Tensor]:
        """The sums over all processes' files: `counts` and `routed`.

        Raises:
            InputError: a block is missing or was counted twice, as when a process was lost.
        """
        found = [content for content in map(self._read, partial_files(self.stem)) if content is not None]
        if not found:
            raise InputError(f"the partial counts {self.stem}.*.pt are gone: was the same command running twice?")
        times = sum(content["done"].long() for content in found)
        if not bool((times == 1).all()):
            raise InputError(
                f"{int((times != 1).sum())} blocks were not counted exactly once; run the same command again"
            )
        return [sum(content[key] for content in found) for key in self.SUMS]


def partial_stem(out: Path) -> Path:
    """What the files of a result's partial counts are called, up to the number of the process."""
    return out.with_name(f".{out.stem}.partial")


def partial_files(stem: Path) -> list[Path]:
    return sorted(stem.parent.glob(f"{stem.name}.*.pt")) if stem.parent.is_dir() else []


def remove_partial(out: Path) -> None:
    for path in partial_files(partial_stem(out)):
        path.unlink(missing_ok=True)
