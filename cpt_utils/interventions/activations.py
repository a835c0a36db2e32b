"""A model whose activations are edited while it runs: FFN neurons silenced, or held at a value."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

from cpt_utils.architectures.archs import Arch
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.models import ffn
from cpt_utils.models.trace import trace

Mask = Mapping[int, Sequence[int]]  # layer -> neurons


@contextlib.contextmanager
def silenced(model: torch.nn.Module, arch: Arch, mask: Mask) -> Iterator[torch.nn.Module]:
    """The model with the masked neurons' activations set to zero, until the block ends.

    A neuron contributes its activation (times `up`, if there is a gate) through the down projection, so its input to
    that projection is set to zero. Experts have no module to hook: their columns of the down projection are set to
    zero instead, and restored exactly afterwards. A layer without masked neurons is not touched.
    """
    config = ffn.decoder_config(model)
    with contextlib.ExitStack() as stack:
        for layer, neurons in mask.items():
            for group in arch.neurons(config, layer) if len(neurons) else ():
                index = torch.tensor([neuron - group.first for neuron in neurons if group.first <= neuron < group.stop])
                if not len(index):
                    continue
                if group.experts:
                    down = arch.experts_module(model, layer).down_proj
                    columns = _without_inputs(
                        down, index // group.width, index % group.width, arch.experts_at.transposed
                    )
                    stack.enter_context(columns)
                else:
                    stack.enter_context(trace((arch.down_module(model, layer), "input", _zeros(index))))
        yield model


@contextlib.contextmanager
def held(model: torch.nn.Module, arch: Arch, values: Mapping[int, Mapping[int, float]]) -> Iterator[torch.nn.Module]:
    """The model with the inputs of its down projections held at `values` for some neurons, until the block ends.

    Args:
        values: layer -> neuron of a dense FFN -> value.

    Raises:
        InputError: a neuron of an expert, which has no module to hook.
    """
    points, config = [], ffn.decoder_config(model)
    for layer, wanted in values.items():
        for group in arch.neurons(config, layer) if wanted else ():
            chosen = {
                neuron - group.first: value for neuron, value in wanted.items() if group.first <= neuron < group.stop
            }
            if chosen and group.experts:
                raise InputError(
                    f"layer {layer} has its neurons in experts: they can be silenced, but not held at a value"
                )
            if chosen:
                index, fixed = torch.tensor([*chosen]), torch.tensor([*chosen.values()], dtype=torch.float64)
                points.append((arch.down_module(model, layer), "input", functools.partial(_put, index, fixed)))
    with trace(*points):
        yield model


def _put(index: torch.Tensor, fixed: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` [.., neurons] with `fixed` at the entries `index` of the last dimension."""
    return value.index_copy(-1, index.to(value.device), fixed.to(value).expand(*value.shape[:-1], -1))


def _zeros(index: torch.Tensor) -> Callable:
    """A function that sets the entries `index` of the last dimension to zero."""
    on_device = functools.cache(index.to)  # copied to a device once, not in every pass

    def edit(value: torch.Tensor) -> torch.Tensor:
        # In place unless gradients are needed: nothing else uses the product that arrives here.
        fill = torch.Tensor.index_fill if torch.is_grad_enabled() else torch.Tensor.index_fill_
        return fill(value, -1, on_device(value.device), 0)

    return edit


@contextlib.contextmanager
def _without_inputs(
    down: torch.nn.Parameter, experts: torch.Tensor, inputs: torch.Tensor, transposed: bool
) -> Iterator[None]:
    """Some inputs of the experts' down projections [E, hidden, I] ([E, I, hidden] if `transposed`) set to zero, until
    the block ends."""
    if down.is_meta:
        raise InputError(
            "experts offloaded to disk or CPU memory cannot be silenced; use GPUs that hold the whole model"
        )
    data = down.data.transpose(1, 2) if transposed else down.data
    region = experts.to(down.device), slice(None), inputs.to(down.device)
    saved = data[region]  # a copy
    data[region] = 0
    try:
        yield
    finally:
        data[region] = saved
