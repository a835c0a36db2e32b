"""The routers of a mixture of experts: their logits for every token, read or replaced during a forward pass.

A *logit* is a router's number for an expert, the product with the router's weights: before softmax or sigmoid, balance
biases, groups and top-k, which differ between model types.
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
    """Routing of sentences in the layers with experts, summed over tokens.

    share: [sentences, layers, experts], softmax over the experts' logits, float64.
    chosen: [sentences, layers, experts], number of tokens routed to the expert.
    entropy: [sentences, layers], entropy of each token's softmax, in nats.
    tokens: [sentences], number of tokens.
    """

    share: torch.Tensor
    chosen: torch.Tensor
    entropy: torch.Tensor
    tokens: torch.Tensor


def layers_with(arch: Arch, config) -> list[int]:
    """The layers that route their tokens to experts."""
    return [layer for layer in range(arch.n_layers(config)) if arch.has_router(config, layer)]


@contextlib.contextmanager
def at_logits(model: torch.nn.Module, arch: Arch, functions: Mapping[int, Callable]) -> Iterator[None]:
    """Call one function per layer on the routers' logits within a `with` block; they are always removed. In nested
    blocks, the inner functions see the logits as the outer ones left them.

    A function gets the logits of all tokens, padding included, [tokens, experts] or [batch, tokens, experts]. If it
    returns None, they stay unchanged; any other result replaces them, and the choice and weights of experts follow.

    Raises:
        InputError: in the forward pass, if a router is not a single product with a matrix (8-bit weights).
    """
    with contextlib.ExitStack() as stack:
        for layer, function in functions.items():
            stack.enter_context(_watched(_router(model, arch, layer), layer, function))
        yield


def read(model: torch.nn.Module, arch: Arch, input_ids, attention_mask, keep) -> Routed:
    """The routing of the tokens marked in `keep`, from one pass that ends at the last layer's experts.

    Args:
        input_ids, attention_mask, keep: [batch, tokens]; tokens outside `keep` are context but not counted.
    """
    layers, keep = layers_with(arch, model.config), keep.bool()
    spec, n_experts = arch.experts_at, arch.experts(model.config, layers[0])
    sums: dict[str, dict[int, torch.Tensor]] = {"share": {}, "chosen": {}, "entropy": {}}

    def total(values: torch.Tensor) -> torch.Tensor:
        """[tokens.., x] -> [batch, x], without the values at padding, which may be NaN."""
        values = values.reshape(*keep.shape, -1)
        return values.masked_fill(~keep.to(values.device)[:, :, None], 0).sum(1, dtype=torch.float64).cpu()

    def of_logits(layer: int, logits: torch.Tensor) -> None:
        shares = logits.double().softmax(-1)  # for nearly uniform routers, a divergence's denominator is close to 0
        sums["share"][layer] = total(shares)
        sums["entropy"][layer] = total(torch.special.entr(shares).sum(-1))[:, 0]

    def of_experts(layer: int, chosen: torch.Tensor) -> None:
        sums["chosen"][layer] = total(chosen)
        if layer == layers[-1]:
            raise StopForward

    def called(layer: int, args: tuple) -> None:
        tokens, experts = args[0], args[1].reshape(keep.numel(), -1)
        of_experts(layer, tokens.new_zeros(len(experts), n_experts).scatter_(1, experts, 1))

    points = []
    for layer in layers:
        if spec.routed_by == "score":  # experts that were not chosen have score 0
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
    stacked = {name: torch.stack([parts[layer] for layer in layers], 1) for name, parts in sums.items()}
    return Routed(**stacked, tokens=keep.sum(1).double().cpu())


# --- inside ---


def _router(model: torch.nn.Module, arch: Arch, layer: int) -> torch.nn.Module:
    spec = arch.experts_at
    return arch.in_layer(model, layer, below(spec.block, spec.router))


@contextlib.contextmanager
def _watched(router: torch.nn.Module, layer: int, function: Callable) -> Iterator[None]:
    """Most routers compute logits and choose experts in one call, with no place for a hook, so this intercepts the
    product with the router's matrix."""
    original, overridden = router.forward, "forward" in vars(router)
    if watching := getattr(original, "functions", None):  # nested block: this function comes after the outer ones
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
            result = original(*args, **kwargs)
        if mode.seen != 1:
            raise InputError(
                f"the router of layer {layer} cannot be read: it computes {mode.seen} products with a plain matrix "
                "instead of one; load a model whose routers are not quantised"
            )
        return result

    forward.functions, router.forward = mode.functions, forward
    try:
        yield
    finally:
        if overridden:  # by a hook of accelerate
            router.forward = original
        else:
            del router.forward


@functools.cache
def _products() -> type:
    """A torch function mode that passes the result of every matrix product to functions, which may replace it."""

    class Products(torch.overrides.TorchFunctionMode):
        def __init__(self, functions: list[Callable]):
            super().__init__()
            self.functions, self.seen = functions, 0

        def __torch_function__(self, called, types, args=(), kwargs=None):
            result = called(*args, **(kwargs or {}))
            if called not in (torch.nn.functional.linear, torch.mm):
                return result
            self.seen += 1
            for function in self.functions:
                edited = function(result)
                result = result if edited is None else edited
            return result

    return Products
