"""The routers of a mixture of experts: what they say of every token, read or replaced inside a forward pass.

A *logit* is a router's number for an expert, the product with the router's weights: before softmax or sigmoid, biases
for balance, groups and top-k, which differ from type to type.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from cpt_utils.architectures.arch_parts import below
from cpt_utils.architectures.archs import Arch
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.models.trace import StopForward, trace


class Routed(NamedTuple):
    """Sentences in the layers with experts, summed over tokens; [sentences, layers, experts] but for the last two.

    share: of the softmax over the experts' logits, float64.
    chosen: tokens that the expert was called for.
    entropy: [sentences, layers], of each token's softmax, in nats.
    tokens: [sentences].
    """

    share: torch.Tensor
    chosen: torch.Tensor
    entropy: torch.Tensor
    tokens: torch.Tensor


def layers_with(arch: Arch, config) -> list[int]:
    """The layers that send their tokens to experts."""
    return [layer for layer in range(arch.n_layers(config)) if arch.has_router(config, layer)]


@contextlib.contextmanager
def at_logits(model: torch.nn.Module, arch: Arch, functions: Mapping[int, Callable]) -> Iterator[None]:
    """Functions at the routers' logits for the length of a block, of each layer one; they are always removed. Of nested
    blocks the inner one's see what the outer one's left.

    A function gets the logits of all tokens, [tokens, experts] or [batch, tokens, experts], padding among them. None
    leaves them as they are; anything else replaces them, and experts and their weights follow.

    Raises:
        InputError: in the forward pass, a router that is not one product with a matrix (of weights in 8 bits).
    """
    with contextlib.ExitStack() as stack:
        for layer, function in functions.items():
            stack.enter_context(_watched(_router(model, arch, layer), layer, function))
        yield


def read(model: torch.nn.Module, arch: Arch, input_ids, attention_mask, keep) -> Routed:
    """What the routers did with the tokens of `keep`, in one pass that ends at the last layer's experts.

    Args:
        input_ids, attention_mask, keep: [batch, tokens]; tokens that do not enter are read all the same.
    """
    layers, keep = layers_with(arch, model.config), keep.bool()
    at, n_experts = arch.experts_at, arch.experts(model.config, layers[0])
    found: dict[str, dict[int, torch.Tensor]] = {"share": {}, "chosen": {}, "entropy": {}}

    def total(values: torch.Tensor) -> torch.Tensor:
        """[tokens.., x] -> [batch, x]; what padding holds, perhaps NaN, is left out."""
        values = values.reshape(*keep.shape, -1)
        return values.masked_fill(~keep.to(values.device)[:, :, None], 0).sum(1, dtype=torch.float64).cpu()

    def of_logits(layer: int, logits: torch.Tensor) -> None:
        shares = logits.double().softmax(-1)  # what divides a divergence is all but 0 where routers are all but uniform
        found["share"][layer] = total(shares)
        found["entropy"][layer] = total(torch.special.entr(shares).sum(-1))[:, 0]

    def of_experts(layer: int, chosen: torch.Tensor) -> None:
        found["chosen"][layer] = total(chosen)
        if layer == layers[-1]:
            raise StopForward

    def called(layer: int, args: tuple) -> None:
        tokens, experts = args[0], args[1].reshape(keep.numel(), -1)
        of_experts(layer, tokens.new_zeros(len(experts), n_experts).scatter_(1, experts, 1))

    points = []
    for layer in layers:
        if at.routed_by == "score":  # the score of experts that were not chosen is 0
            see = functools.partial(lambda layer, scores: of_experts(layer, (scores > 0).float()), layer)
            points.append((_router(model, arch, layer), "output", see))
        else:
            points.append((arch.experts_module(model, layer), "inputs", functools.partial(called, layer)))
    seeing = {layer: functools.partial(of_logits, layer) for layer in layers}
    with at_logits(model, arch, seeing), trace(*points), torch.inference_mode():
        arch.decoder(model)(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        )
    stacked = {name: torch.stack([parts[layer] for layer in layers], 1) for name, parts in found.items()}
    return Routed(**stacked, tokens=keep.sum(1).double().cpu())


# --- inside ---


def _router(model: torch.nn.Module, arch: Arch, layer: int) -> torch.nn.Module:
    at = arch.experts_at
    return arch.in_layer(model, layer, below(at.block, at.router))


@contextlib.contextmanager
def _watched(router: torch.nn.Module, layer: int, function: Callable) -> Iterator[None]:
    """Most routers compute logits and choose experts in one call, so no hook comes between: their product is met."""
    original, own = router.forward, "forward" in vars(router)
    if watching := getattr(original, "functions", None):  # this one comes after those, as the blocks are nested
        watching.append(function)
        try:
            yield
        finally:
            watching.pop()
        return
    mode = _products()([function])

    def forward(*args, **kwargs):
        mode.seen = 0
        with mode:
            found = original(*args, **kwargs)
        if mode.seen != 1:
            raise InputError(
                f"the router of layer {layer} cannot be read: it computes {mode.seen} products with a plain matrix "
                "instead of one; load a model whose routers are not quantised"
            )
        return found

    forward.functions, router.forward = mode.functions, forward
    try:
        yield
    finally:
        if own:  # a hook of accelerate's
            router.forward = original
        else:
            del router.forward


@functools.cache
def _products() -> type:
    """A mode in which torch hands the result of every product with a matrix to functions, which may replace it."""

    class Products(torch.overrides.TorchFunctionMode):
        def __init__(self, functions: list[Callable]):
            super().__init__()
            self.functions, self.seen = functions, 0

        def __torch_function__(self, called, types, args=(), kwargs=None):
            found = called(*args, **(kwargs or {}))
            if called not in (torch.nn.functional.linear, torch.mm):
                return found
            self.seen += 1
            for function in self.functions:
                edited = function(found)
                found = found if edited is None else edited
            return found

    return Products
