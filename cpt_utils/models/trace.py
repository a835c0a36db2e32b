"""Hooks on a running model: read or replace a module's input or output, or stop the forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from cpt_utils.base.lazy import torch


class StopForward(Exception):
    """Raised by a function of `trace` to end the forward pass and the `with` block."""


def untuple(output):
    """The hidden state in a layer's output: the tensor itself, or the first entry of a tuple.

    Layers return a tensor in transformers 5, a tuple in older releases and some families. `output[0]` of a tensor would
    silently take the first sequence of the batch, so only this function looks inside an output.
    """
    return output[0] if isinstance(output, tuple | list) else output


@contextlib.contextmanager
def trace(*points: tuple[torch.nn.Module, str, Callable]) -> Iterator[None]:
    """Call functions at modules within a `with` block; they are always removed.

    Args:
        points: (module, side, function). At the side "input", the function gets the module's first input; at "inputs",
            all positional inputs; at "output", the output (the first entry of a tuple). If it returns None, nothing
            changes; any other result replaces that tensor (except at "inputs").
    """
    handles = []
    try:
        for module, side, function in points:
            if side == "output":
                handles.append(module.register_forward_hook(_after(function)))
            elif side not in ("input", "inputs"):
                raise ValueError(f"a module has no side {side!r}; it must be input, inputs or output")
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
            replacement = function(args[0])
            return None if replacement is None else ((replacement, *args[1:]), kwargs)
        else:
            replacement = function(kwargs["hidden_states"])
            return None if replacement is None else (args, kwargs | {"hidden_states": replacement})
        return None

    return hook


def _after(function: Callable) -> Callable:
    def hook(_module, _args, output):
        replacement = function(untuple(output))
        if replacement is None or not isinstance(output, tuple | list):
            return replacement
        return type(output)((replacement, *output[1:]))

    return hook
