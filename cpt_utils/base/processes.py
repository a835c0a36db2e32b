"""Several processes, one result: the processes of `accelerate launch`, for scripts that also run alone.

process, dtype = from_arguments(args, study)
items = process.share(all_items)                 # every world-th item, from `rank` on
rows = process.gather([(i, value), ...])         # on every process: the lists of all processes, joined
if process.is_main: write(...)
process.wait()

Long work is done in rounds, so that a killed run can continue with any number of processes:

for measured in process.rounds(items, measure):   # [(item, measure(item)), ...] of this round, from all processes
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
    """This process among those of `accelerate launch`, or the only one.

    Attributes:
        rank, world: its number, and the number of processes.
        device: the device of its model: the GPU that `accelerate` assigned, or the value of `--device`.
        device_map: the value of `--device-map`, for `loading.load_model`.

    Raises:
        InputError: a device map with several processes or with a single device, or no such device.
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
            # Without this, a thread of the group sometimes aborts a finished process at the interpreter's exit.
            atexit.register(self.state.destroy_process_group)
            self.rank, self.device = self.state.process_index, self.state.device
            if self.device.type == "cpu":  # not "cpu:0": headers must not depend on the number of processes
                self.device = cli.device("cpu")
            cli.say(f"{self.world} processes share the work")
        else:
            self.device = cli.device(device)

    @staticmethod
    def refuse_several(what: str) -> None:
        """InputError if `accelerate launch` started several processes for the work of one."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(f"{what} is the work of one process: start the script without accelerate launch")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process has reached this call."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's items: every world-th, so that items sorted by length are about equal work everywhere."""
        return list(items[self.rank :: self.world])

    def gather(self, items: list[Item]) -> list[Item]:
        """The items of all processes, by rank; every process must call it with a list, and gets all items.

        For small objects (scores, paths): they are pickled and sent to every process.
        """
        if self.state is None:
            return list(items)
        from accelerate.utils import gather_object

        return gather_object(list(items))

    def rounds(self, items: Sequence[Item], work: Callable[[Item], Result]) -> Iterator[list[tuple[Item, Result]]]:
        """In each round every process works on one item; every process gets all items of the round with their results.

        All processes need the same items in the same order. For items of similar cost: all wait for the slowest.
        """
        for start in range(0, len(items), self.world):
            group = items[start : start + self.world]
            results = [work(item) for item in group[self.rank : self.rank + 1]]
            yield list(zip(group, self.gather(results), strict=True))


def from_arguments(args, study) -> tuple[Process, torch.dtype]:
    """This process and the dtype of its models, from --device, --device-map, --dtype and the study."""
    process = Process(args.device, args.device_map)
    return process, cli.dtype(study.value(args.dtype, "--dtype", "dtype", None), process.device)
