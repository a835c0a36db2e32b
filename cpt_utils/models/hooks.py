"""Forward hooks that are always removed, and what is summed in them; hidden states are never kept."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING

from cpt_utils.base.errors import InputError

if TYPE_CHECKING:
    import torch


def untuple(output):
    """The hidden state in a layer's output: the tensor itself, or the first entry of a tuple.

    Layers of transformers 5 return a tensor, of older releases and some families a tuple. `output[0]` of a tensor would
    silently take the first sequence of the batch, so nothing but this function looks inside an output.
    """
    return output[0] if isinstance(output, tuple | list) else output


def submodule(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The module at a dotted name; InputError with the nearest names where there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        near = difflib.get_close_matches(name, [n for n, _ in model.named_modules()], n=3, cutoff=0.3)
        raise InputError(f"{type(model).__name__} has no module {name}; the nearest are {', '.join(near)}") from None


@contextlib.contextmanager
def hooked(*hooks: tuple[torch.nn.Module, str, Callable]):
    """Register hooks for the length of a block.

    Args:
        hooks: (module, "input" or "output", function). The function gets the module's first positional input, or its
            untupled output: a tensor. What it returns is ignored: hooks here measure, they do not change.
    """
    handles = []
    try:
        for module, side, function in hooks:
            if side == "input":
                handles.append(module.register_forward_pre_hook(_on_input(function), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(_on_output(function)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_input(function):
    def hook(_module, args, kwargs):
        function(args[0] if args else kwargs["hidden_states"])

    return hook


def _on_output(function):
    def hook(_module, _args, output):
        function(untuple(output))

    return hook


def pooled_states(model: torch.nn.Module, arch, input_ids, attention_mask, pool_mask=None) -> torch.Tensor:
    """Mean over the non-padding tokens at every hidden state: [L+1, batch, hidden], float32 (float64 for float64).

    Entry 0 is the embedding output, entry l+1 the output of layer l, and the last entry is taken after the final norm,
    like `output_hidden_states=True`. The mean is taken on the device inside the hooks, so that no more than one
    layer's state is alive at a time. The lm_head is never run.

    Args:
        input_ids, attention_mask: [batch, tokens]; padding on either side.
        pool_mask: [batch, tokens], the tokens that enter the mean; default `attention_mask`.
    """
    import torch

    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    keep = (attention_mask if pool_mask is None else pool_mask).bool()
    weights = keep[:, None].to(wide)

    def product(hidden: torch.Tensor) -> torch.Tensor:  # a tenth of the time of masking, copying and summing
        return torch.bmm(weights.to(hidden.device), hidden.to(wide))[:, 0]

    def masked(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.to(wide).masked_fill(~keep.to(hidden.device)[:, :, None], 0).sum(1)

    sums = _states(model, arch, input_ids, attention_mask, product)
    if not torch.isfinite(sums).all():  # perhaps inf or NaN at a padding position: 0 * NaN is NaN
        sums = _states(model, arch, input_ids, attention_mask, masked)
    return sums / keep.sum(1, keepdim=True).to(wide)


def _states(model: torch.nn.Module, arch, input_ids, attention_mask, pool: Callable) -> torch.Tensor:
    """`pool` of every hidden state [batch, tokens, hidden] of one forward pass, stacked on the device of the input."""
    import torch

    layers = arch.layers(model)
    pooled: list[torch.Tensor | None] = [None] * (len(layers) + 1)

    def into(index: int):
        def put(hidden: torch.Tensor) -> None:
            hidden = hidden[0] if arch.streams and hidden.dim() == 4 else hidden
            pooled[index] = pool(hidden).to(input_ids.device)

        return put

    hooks = [(layers[0], "input", into(0)), (arch.last(model), "output", into(len(layers)))]
    hooks += [(layer, "output", into(i + 1)) for i, layer in enumerate(layers[:-1])]
    with hooked(*hooks), torch.inference_mode():
        arch.decoder(model)(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        )
    return torch.stack(pooled)


@contextlib.contextmanager
def head_on(head: torch.nn.Module, rows: torch.Tensor, columns: torch.Tensor):
    """For the length of a block `head` (lm_head) sees only the hidden states at (rows[i], columns[i]): [1, n, hidden].

    The model's own code goes on from there, so that what it does to logits (a scale, a soft cap) is done to these.
    """

    def choose(_module, args):
        return (args[0][rows.to(args[0].device), columns.to(args[0].device)][None], *args[1:])

    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()
