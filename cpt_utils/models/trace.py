"""The one instrument on a running model: reads or edits what goes through a module, or stops the pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from cpt_utils.base.lazy import torch


class StopForward(Exception):
    """Raised by a function of `trace` that has seen enough: the forward pass ends there, and with it the block."""


def untuple(output):
    """The hidden state in a layer's output: the tensor itself, or the first entry of a tuple.

    Layers of transformers 5 return a tensor, of older releases and some families a tuple. `output[0]` of a tensor would
    silently take the first sequence of the batch, so nothing but this function looks inside an output.
    """
    return output[0] if isinstance(output, tuple | list) else output


@contextlib.contextmanager
def trace(*points: tuple[torch.nn.Module, str, Callable]) -> Iterator[None]:
    """Functions at modules for the length of a block; they are always removed.

    Args:
        points: (module, side, function). The function gets, at the side "input", the module's first input; at "inputs",
            all positional ones; at "output", its output, of a tuple the first entry. None leaves everything as it is;
            anything else that it returns replaces that tensor (not at "inputs").
    """
    handles = []
    try:
        for module, side, function in points:
            if side == "output":
                handles.append(module.register_forward_hook(_after(function)))
            elif side not in ("input", "inputs"):
                raise ValueError(f"a module has no side {side!r}: it is input, inputs or output")
            else:
                handles.append(module.register_forward_pre_hook(_before(function, side), with_kwargs=True))
        with contextlib.suppress(StopForward):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _before(function: Callable, side: str) -> Callable:
    def hook(_module, args, kwargs):
        if side == "inputs":
            function(args)
        elif args:
            found = function(args[0])
            return None if found is None else ((found, *args[1:]), kwargs)
        else:
            found = function(kwargs["hidden_states"])
            return None if found is None else (args, kwargs | {"hidden_states": found})
        return None

    return hook


def _after(function: Callable) -> Callable:
    def hook(_module, _args, output):
        found = function(untuple(output))
        if found is None or not isinstance(output, tuple | list):
            return found
        return type(output)((found, *output[1:]))

    return hook
