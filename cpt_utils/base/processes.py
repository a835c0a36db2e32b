"""Several processes, one result: what `accelerate launch` starts, seen by a script that must also run alone.

process, dtype = from_arguments(args, study)
mine = process.share(list_of_items)              # every world-th item, from `rank` on
rows = process.gather([(i, value), ...])         # on every process: the lists of all, one after the other
if process.is_main: write(...)
process.wait()

Long work goes in rounds, so that a killed run goes on whatever the number of processes then is:

for found in process.rounds(items, measure):      # [(item, measure(item)), ...] of this round, from all processes
    if process.is_main: journal.add(...)
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Process:
    """This process among those of `accelerate launch`; alone without it.

    Attributes:
        rank, world: its number, and how many there are.
        device: where its model belongs: the GPU that `accelerate` gave it, or what `--device` says.
        device_map: what `--device-map` says, for `loading.load_model`.

    Raises:
        InputError: a device map for several processes or with one device, or no such device.
    """

    def __init__(self, device: str = "auto", device_map: str | None = None):
        self.device_map = device_map
        if device_map is not None and device not in ("auto", "cuda"):
            raise InputError(f"--device {device} and --device-map {device_map} contradict each other: leave one out")
        self.rank, self.world, self.state = 0, int(os.environ.get("WORLD_SIZE", "1")), None
        if self.world > 1:
            if device_map is not None:
                raise InputError(
                    f"--device-map {device_map} gives one model all GPUs, and each of the {self.world} processes of "
                    "accelerate launch has one of its own: start the script without accelerate launch"
                )
            from accelerate import PartialState

            self.state = PartialState(cpu=cli.device(device).type == "cpu")
            # Left to the interpreter's end, a thread of the group now and then aborts a process that did all its work.
            atexit.register(self.state.destroy_process_group)
            self.rank, self.device = self.state.process_index, self.state.device
            if self.device.type == "cpu":  # not "cpu:0": a result is the same whoever made it
                self.device = cli.device("cpu")
            cli.say(f"{self.world} processes share the work")
        else:
            self.device = cli.device(device)

    @staticmethod
    def refuse_several(what: str) -> None:
        """InputError where `accelerate launch` started several processes for work that one does."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(f"{what} is the work of one process: start the script without accelerate launch")

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

    def rounds(self, items: Sequence[Item], work: Callable[[Item], Result]) -> Iterator[list[tuple[Item, Result]]]:
        """In each round every process works on one item; every process gets all items of the round with their results.

        Items and order must be the same everywhere. For items of about the same cost: all wait for the slowest.
        """
        for start in range(0, len(items), self.world):
            group = items[start : start + self.world]
            done = [work(item) for item in group[self.rank : self.rank + 1]]
            yield list(zip(group, self.gather(done), strict=True))


def from_arguments(args, study) -> tuple[Process, torch.dtype]:
    """This process, and the dtype of its models, as --device, --device-map, --dtype and the study say."""
    process = Process(args.device, args.device_map)
    return process, cli.dtype(study.value(args.dtype, "--dtype", "dtype", None), process.device)
