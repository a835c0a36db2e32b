"""Several processes, one result: what `accelerate launch` starts, seen by a script that must also run alone.

process = Process(args.device)
own = process.share(list_of_items)               # every world-th item, from `rank` on
rows = process.gather([(i, value), ...])         # on every process: the lists of all, one after the other
if process.is_main: write(...)
process.wait()
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

from cpt_utils import cli

Item = TypeVar("Item")


class Process:
    """This process among those of `accelerate launch`; alone without it.

    Attributes:
        rank, world: its number, and how many there are.
        device: where its model belongs: the GPU that `accelerate` gave it, or what `--device` says.
    """

    def __init__(self, device: str = "auto"):
        self.rank, self.world, self.state = 0, int(os.environ.get("WORLD_SIZE", "1")), None
        if self.world > 1:
            from accelerate import PartialState

            self.state = PartialState(cpu=cli.device(device).type == "cpu")
            self.rank, self.device = self.state.process_index, self.state.device
        else:
            self.device = cli.device(device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's items: every world-th, so that items ordered by length weigh about the same everywhere."""
        return list(items[self.rank :: self.world])

    def gather(self, items: list[Item]) -> list[Item]:
        """The items of all processes, by rank; every process must call it, with a list, and gets the whole.

        For small things (scores, paths): they are pickled through every process.
        """
        if self.state is None:
            return list(items)
        from accelerate.utils import gather_object

        return gather_object(list(items))
