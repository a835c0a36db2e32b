"""FFN neurons of a decoder: text in blocks, how often each is active, how strongly, and what a model is without it.

A *neuron* is one of the I units of a layer's FFN, its *activation* act(W_gate x), or act(W_up x) without a gate.
Forward passes here never run the lm_head and end as soon as the last neuron that matters has been read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from cpt_utils import hooks
from cpt_utils.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cpt_utils.archs import Arch

# Tokens of a block by the published scripts' `type`.
BLOCK = {"llama": 4096, "qwen": 2048}
TOKENS_A_BATCH = 4096
# Activations with act(x) > 0 exactly where x > 0: the pre-activation says enough, and the activation need not be run.
KEEP_SIGN = {
    "silu", "swish", "relu", "gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh",
    "gelu_accurate", "quick_gelu",
}  # fmt: skip

Mask = Mapping[int, Sequence[int]]  # layer -> neurons


# --- text ---


def block_size(config: Mapping, kind: str | None = None, given: int | None = None) -> int:
    """Tokens of a block: `given`, else that of `kind` (llama or qwen), never more than the model's positions.

    `kind` None is worked out from the model type.
    """
    values = config.get("text_config") or config
    if kind is None:
        kind = "qwen" if str(values.get("model_type", "")).startswith("qwen") else "llama"
    limit = next((int(values[key]) for key in ("max_position_embeddings", "n_positions") if values.get(key)), None)
    if given is not None:
        if limit is not None and given > limit:
            raise InputError(f"--block-size {given} is more than the model's {limit} positions; give {limit} or less")
        return given
    return min(BLOCK[kind], limit) if limit else BLOCK[kind]


def batch_size(given: int | None, size: int) -> int:
    """Blocks of a forward pass: `given`, else as many of `size` tokens as TOKENS_A_BATCH holds."""
    return given or max(1, TOKENS_A_BATCH // size)


def blocks(ids: torch.Tensor, size: int, tokens: int, name: str = "the id file") -> torch.Tensor:
    """The first `tokens` of `ids` [n] in whole blocks: a view [blocks, size]; the tail that fills no block is dropped.

    Raises:
        InputError: not one whole block.
    """
    whole = min(len(ids), tokens) // size
    if whole == 0:
        raise InputError(
            f"{name} gives {min(len(ids), tokens)} tokens, fewer than one block of {size}; give more text, or a "
            "smaller --block-size"
        )
    return ids[: whole * size].view(whole, size)


# --- forward passes that end early ---


class _Enough(Exception):
    """Raised inside a hook when everything that was wanted has been read."""


def _run(model: nn.Module, arch: Arch, ids: torch.Tensor) -> None:
    """The decoder on blocks `ids` [batch, size], until a hook has enough."""
    import torch

    with contextlib.suppress(_Enough), torch.inference_mode():
        arch.decoder(model)(input_ids=ids.to(model.device, torch.long), use_cache=False)


class Counter:
    """Counts, for every neuron, the tokens whose activation is above zero.

    Attributes:
        counts: int64 [layers, neurons], on the CPU after `result`.
    """

    def __init__(self, model: nn.Module, arch: Arch):
        import torch

        self.model, self.arch = model, arch
        config = model.config.get_text_config().to_dict()
        self.n_layers, self.width = arch.n_layers(config), arch.ffn_width(config)
        self.unit = arch.unit(config)
        self.before = activation_name(config) in KEEP_SIGN
        self.counts = torch.zeros(self.n_layers, self.width, dtype=torch.long)

    def add(self, ids: torch.Tensor) -> None:
        """Count over the blocks `ids` [batch, size].

        Raises:
            InputError: activations that are NaN or infinite.
        """
        import torch

        found: list[torch.Tensor] = []

        def count(layer: int):
            def hook(value: torch.Tensor) -> None:
                if self.before:
                    value = value[..., self.unit.start : self.unit.stop]
                # Bytes summed into int32 are the fastest exact count that PyTorch has; a call has far fewer than 2^31.
                active = (value > 0).view(-1, self.width).view(torch.uint8)
                found.append(active.sum(0, dtype=torch.int32))
                if layer == self.n_layers - 1:
                    # What is not finite in one layer is not finite in all behind it: looking at the last one is enough.
                    if not bool(torch.isfinite(value).all()):
                        raise InputError("activations are not finite; try --dtype float32, or check the weights")
                    raise _Enough

            return hook

        with hooks.hooked(*((self._module(layer), "output", count(layer)) for layer in range(self.n_layers))):
            _run(self.model, self.arch, ids)
        self.counts += torch.stack([row.cpu() for row in found]).long()

    def _module(self, layer: int) -> nn.Module:
        if self.before:
            return self.model.get_submodule(f"{self.arch.layer_path(layer)}.{self.unit.module}")
        return self.arch.activation_module(self.model, layer)


def activation_name(config: Mapping) -> str | None:
    """What a configuration calls the nonlinearity of its FFN."""
    keys = ("hidden_activation", "hidden_act", "activation_function")
    return next((config[key] for key in keys if config.get(key)), None)


class Activations:
    """Sums of the activations of masked neurons over tokens, for several masks in the same forward passes.

    Attributes:
        sums: mask name -> layer -> float64 [its neurons], summed over `tokens` tokens.
    """

    def __init__(self, model: nn.Module, arch: Arch, masks: Mapping[str, Mask]):
        import torch

        self.model, self.arch, self.tokens = model, arch, 0
        self.index = {
            name: {layer: torch.tensor(list(neurons)) for layer, neurons in mask.items() if len(neurons)}
            for name, mask in masks.items()
        }
        self.sums = {
            name: {layer: torch.zeros(len(index), dtype=torch.float64) for layer, index in mask.items()}
            for name, mask in self.index.items()
        }
        self.layers = sorted({layer for mask in self.index.values() for layer in mask})

    def add(self, ids: torch.Tensor) -> None:
        """Add the blocks `ids` [batch, size].

        Raises:
            InputError: activations that are NaN or infinite.
        """
        import torch

        def sum_up(layer: int):
            def hook(value: torch.Tensor) -> None:
                flat = value.reshape(-1, value.shape[-1])
                for name, mask in self.index.items():
                    if layer in mask:
                        own = flat.index_select(1, mask[layer].to(flat.device)).to(torch.float64).sum(0).cpu()
                        if not bool(torch.isfinite(own).all()):
                            raise InputError("activations are not finite; try --dtype float32, or check the weights")
                        self.sums[name][layer] += own
                if layer == self.layers[-1]:
                    raise _Enough

            return hook

        if self.layers:
            modules = [(self.arch.activation_module(self.model, i), "output", sum_up(i)) for i in self.layers]
            with hooks.hooked(*modules):
                _run(self.model, self.arch, ids)
        self.tokens += ids.numel()

    def mean(self, name: str) -> float | None:
        """The mean over tokens and neurons of a mask; None for a mask without neurons."""
        sums = self.sums[name]
        neurons = sum(map(len, sums.values()))
        return float(sum(s.sum() for s in sums.values())) / (neurons * self.tokens) if neurons else None

    def layer_means(self, name: str) -> dict[int, float]:
        """The same by layer, of the layers that have neurons."""
        return {layer: float(s.mean()) / self.tokens for layer, s in self.sums[name].items()}


# --- a model without some of its neurons ---


@contextlib.contextmanager
def silenced(model: nn.Module, arch: Arch, mask: Mask) -> Iterator[nn.Module]:
    """The model with the masked neurons' activations set to zero, until the block ends.

    What a neuron gives to the layer is its activation (times `up`, where there is a gate) through the down projection,
    so its input there is set to zero. A layer without masked neurons is not touched.
    """
    import torch

    def silence(index: torch.Tensor):
        def hook(_module, args):
            return (args[0].index_fill(-1, index.to(args[0].device), 0), *args[1:])

        return hook

    handles = []
    try:
        for layer, neurons in mask.items():
            if len(neurons):
                module = arch.module(model, layer, "down_proj")
                handles.append(module.register_forward_pre_hook(silence(torch.tensor(list(neurons)))))
        yield model
    finally:
        for handle in handles:
            handle.remove()
