"""FFN neurons of a decoder: text in blocks, how often each is active, how strongly, and what a model is without it.

A *neuron* is one of the I units of a layer's FFN, its *activation* act(W_gate x), or act(W_up x) without a gate. In a
mixture of E experts every expert has I neurons, and neuron number e I + i is the i-th of expert e.
Forward passes here never run the lm_head and end as soon as the last neuron that matters has been read.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from cpt_utils.architectures.arch_parts import Neurons, below
from cpt_utils.base.errors import InputError
from cpt_utils.models import loading

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cpt_utils.architectures.archs import Arch

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


class _Reader:
    """Forward passes of the decoder that hand over the activations of `layers` (ascending) and end behind the last one.

    With `before`, what is handed over is what goes into the nonlinearity, not what comes out. Layers without an FFN
    have nothing to hand over.
    """

    def __init__(self, model: nn.Module, arch: Arch, layers: Sequence[int], before: bool = False):
        config = _config(model)
        self.model, self.arch, self.before = model, arch, before and arch.before
        self.groups = {layer: arch.neurons(config, layer) for layer in layers}
        self.groups = {layer: groups for layer, groups in self.groups.items() if groups}

    @property
    def experts(self) -> int:
        """Experts of the layer that has most."""
        return max((group.experts for groups in self.groups.values() for group in groups), default=0)

    def run(self, ids: torch.Tensor, read: Callable) -> None:
        """One pass over the blocks `ids` [batch, size].

        `read(layer, group, value, experts)` gets the activations [.., I] of every token and None; or, of experts,
        those [rows, I] of tokens that were routed, and the expert of each row [rows], perhaps in several calls a layer.
        """
        import torch

        if not self.groups:
            return
        with contextlib.ExitStack() as stack:
            self._left = {group.first for group in self.groups[max(self.groups)]}  # to be read in the last layer
            for layer, groups in self.groups.items():
                for group in groups:
                    hook = self._routed if group.experts else self._dense
                    for handle in hook(layer, group, functools.partial(read, layer, group)):
                        stack.callback(handle.remove)
            stack.enter_context(contextlib.suppress(_Enough))
            stack.enter_context(torch.inference_mode())
            ids = ids.to(loading.input_device(self.model), torch.long)
            self.arch.decoder(self.model)(input_ids=ids, use_cache=False)

    def _end(self, layer: int, group: Neurons) -> None:
        if layer == max(self.groups):
            self._left.discard(group.first)
            if not self._left:
                raise _Enough

    def _dense(self, layer: int, group: Neurons, read: Callable) -> list:
        module, start, stop = group.unit
        act = None if self.before or group.activation else _function(self.arch.function)

        def hook(_module, _args, output) -> None:
            if self.before or act is not None:
                output = output[..., start:stop]
            read(output if act is None else act(output), None)
            self._end(layer, group)

        read_at = module if self.before or act is not None else group.activation
        return [self.arch.in_layer(self.model, layer, read_at).register_forward_hook(hook)]

    def _routed(self, layer: int, group: Neurons, read: Callable) -> list:
        """Hooks around the experts of a layer, for those ways to run them that call their nonlinearity."""
        import torch

        at, experts = self.arch.experts_at, self.arch.experts_module(self.model, layer)
        if at.routed_by == "score":
            return self._scored(layer, group, read)
        left = torch.empty(0)  # the expert of each row that the nonlinearity has not seen yet

        def begin(_module, args) -> None:
            nonlocal left
            left = args[1].reshape(-1)
            if experts.config._experts_implementation != "batched_mm":  # all others go expert by expert
                left = left.sort().values

        def take(value) -> None:
            nonlocal left
            rows, left = left[: len(value)], left[len(value) :]
            read(value, rows)
            if not len(left):
                self._end(layer, group)

        def end(_module, _args, _output) -> None:
            if len(left):
                raise InputError(
                    f"the experts' activations cannot be read under experts_implementation "
                    f"{experts.config._experts_implementation!r}; load the model with grouped_mm or eager"
                )

        around = [experts.register_forward_pre_hook(begin), experts.register_forward_hook(end)]
        if not group.activation:
            return [
                *around,
                _Intercepted(experts, lambda gate: take(gate if self.before else at.function(experts, gate))),
            ]
        activation = self.arch.in_layer(self.model, layer, group.activation)
        if self.before:
            return [*around, activation.register_forward_pre_hook(lambda _module, args: take(args[0]))]
        return [*around, activation.register_forward_hook(lambda _module, _args, output: take(output))]

    def _scored(self, layer: int, group: Neurons, read: Callable) -> list:
        """Hooks where every expert computes every token, and the router's score of those not chosen is 0."""
        at, scores = self.arch.experts_at, None

        def score(_module, _args, output) -> None:
            nonlocal scores
            scores = output[0]  # [tokens, experts]

        def hook(_module, args, output) -> None:
            value = (args[0] if self.before else output).view(group.experts, -1, group.width)
            for expert, tokens in enumerate(value):
                rows = scores[:, expert].nonzero()[:, 0]
                read(tokens[rows], rows.new_full((len(rows),), expert))
            self._end(layer, group)

        router = self.arch.in_layer(self.model, layer, below(at.block, at.router))
        activation = self.arch.in_layer(self.model, layer, group.activation)
        return [router.register_forward_hook(score), activation.register_forward_hook(hook)]


class _Intercepted:
    """Hands the gates' outputs to `see` where experts have a function in the place of a module, until it is removed."""

    def __init__(self, experts: nn.Module, see: Callable):
        self.experts, self.name = experts, "act_fn" if callable(vars(experts).get("act_fn")) else "_apply_gate"
        self.own = own = getattr(experts, self.name)

        def apply(x):
            if self.name == "_apply_gate":  # gate and up together
                see(x[..., : x.shape[-1] // 2] if experts.is_concatenated else x[..., ::2])
            else:
                see(x)
            return own(x)

        setattr(experts, self.name, apply)

    def remove(self) -> None:
        if self.name == "act_fn":
            self.experts.act_fn = self.own
        else:
            del self.experts._apply_gate  # the class's own is seen again


def _function(name: str) -> Callable:
    """The nonlinearity of a name, as configurations spell it."""
    from transformers.activations import ACT2FN

    return ACT2FN[name]


def _config(model: nn.Module) -> dict:
    return model.config.get_text_config().to_dict()


def widths(arch: Arch, config: Mapping) -> list[int]:
    """The neurons of each layer; they differ where a model has dense layers and mixtures of experts, or no FFN."""
    return [arch.ffn_width(config, layer) for layer in range(arch.n_layers(config))]


def active_tokens(value: torch.Tensor) -> torch.Tensor:
    """The rows of `value` [.., I] above zero, for each column: integers [I], on its device."""
    import torch

    active = (value > 0).view(-1, value.shape[-1])
    rows, width = active.shape
    if width % 8:
        return active.view(torch.uint8).sum(0, dtype=torch.int32)
    # Eight neighbours as one number of 64 bits: so many bytes are added at once, and 255 rows carry nothing over.
    packed, whole = active.view(torch.int64), rows - rows % 255
    sums = [packed[:whole].view(-1, 255, width // 8).sum(1), packed[whole:].sum(0, keepdim=True)]
    return torch.cat(sums).view(torch.uint8).sum(0, dtype=torch.int32)


def active_by_expert(value: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The same for the rows of each expert: int64 [E, I], from `value` [rows, I] and bool `chosen` [E, rows]."""
    import torch

    # A product of zeros and ones: exact in half precision, too, for 2048 rows at a time, and a GPU need not be asked
    # where one expert's rows end.
    exact = torch.float16 if value.is_cuda else torch.float32
    parts = zip(chosen.split(2048, 1), value.split(2048), strict=True)
    return sum((mine.to(exact) @ (rows > 0).to(exact)).long() for mine, rows in parts)


class Counter:
    """Counts, for every neuron, the tokens whose activation is above zero; of an expert, those routed to it.

    Attributes:
        counts: int64 [layers, neurons of the widest], on the CPU.
        routed: int64 [layers, experts], the tokens routed to each expert; zeros in dense layers, and [layers, 0] in a
            model without experts.
    """

    def __init__(self, model: nn.Module, arch: Arch):
        import torch

        config = _config(model)
        self.reader = _Reader(model, arch, range(arch.n_layers(config)), activation_name(config) in KEEP_SIGN)
        self.n_layers = arch.n_layers(config)
        self.counts = torch.zeros(self.n_layers, arch.ffn_width(config), dtype=torch.long)
        self.routed = torch.zeros(self.n_layers, self.reader.experts, dtype=torch.long)

    def add(self, ids: torch.Tensor) -> None:
        """Count over the blocks `ids` [batch, size].

        Raises:
            InputError: activations that are NaN or infinite.
        """
        import torch

        found: dict[tuple[int, Neurons], torch.Tensor] = {}
        routed: dict[int, torch.Tensor] = {}
        last = max(self.reader.groups, default=-1)

        def read(layer: int, group: Neurons, value: torch.Tensor, experts: torch.Tensor | None) -> None:
            key = layer, group
            if experts is None:
                found[key] = active_tokens(value)
            else:
                chosen = experts == torch.arange(group.experts, device=experts.device)[:, None]
                found[key] = found.get(key, 0) + active_by_expert(value, chosen).flatten()
                routed[layer] = routed.get(layer, 0) + chosen.sum(1)
            # What is not finite in one layer is not finite in all behind it: looking at the last one is enough.
            if layer == last and not bool(torch.isfinite(value).all()):
                raise InputError("activations are not finite; try --dtype float32, or check the weights")

        self.reader.run(ids, read)
        for (layer, group), row in found.items():
            self.counts[layer, group.first : group.stop] += row.cpu()
        for layer, row in routed.items():
            self.routed[layer, : len(row)] += row.cpu()

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`counts` and `routed` since the last call; both begin anew."""
        import torch

        taken = self.counts, self.routed
        self.counts, self.routed = map(torch.zeros_like, taken)
        return taken


def activation_name(config: Mapping) -> str | None:
    """What a configuration calls the nonlinearity of its FFN."""
    keys = ("hidden_activation", "hidden_act", "activation_function")
    return next((config[key] for key in keys if config.get(key)), None)


class Activations:
    """Sums of the activations of masked neurons over tokens, for several masks in the same forward passes.

    The mean of a neuron is over all tokens, that of an expert's neuron over the tokens routed to this expert, and zero
    where there are none. The mean of a mask is the mean of its neurons' means.

    Attributes:
        sums: mask name -> layer -> float64 [its neurons], summed over `tokens` tokens.
        routed: layer -> int64 [experts], the tokens routed to each; layers with experts only.
    """

    def __init__(self, model: nn.Module, arch: Arch, masks: Mapping[str, Mask]):
        import torch

        self.tokens = 0
        self.index = {
            name: {layer: torch.tensor(list(neurons)) for layer, neurons in mask.items() if len(neurons)}
            for name, mask in masks.items()
        }
        self.sums = {
            name: {layer: torch.zeros(len(index), dtype=torch.float64) for layer, index in mask.items()}
            for name, mask in self.index.items()
        }
        self.layers = sorted({layer for mask in self.index.values() for layer in mask})
        self.reader = _Reader(model, arch, self.layers)
        # All masks' neurons of a layer, one mask after the other; copied to a device once, not in every pass.
        self.all_of = {
            layer: functools.cache(torch.cat([mask[layer] for mask in self.index.values() if layer in mask]).to)
            for layer in self.layers
        }
        self.of_experts = {
            layer: group for layer, groups in self.reader.groups.items() for group in groups if group.experts
        }
        self.routed = {layer: torch.zeros(g.experts, dtype=torch.long) for layer, g in self.of_experts.items()}

    def add(self, ids: torch.Tensor) -> None:
        """Add the blocks `ids` [batch, size].

        Raises:
            InputError: activations that are NaN or infinite.
        """
        import torch

        found: dict[int, torch.Tensor] = {}
        routed: dict[int, torch.Tensor] = {}

        def read(layer: int, group: Neurons, value: torch.Tensor, experts: torch.Tensor | None) -> None:
            index = self.all_of[layer](value.device)
            flat = value.reshape(-1, value.shape[-1])
            if experts is None:
                own = flat.index_select(1, (index - group.first).clamp(0, group.width - 1))
            else:
                own = flat.index_select(1, index % group.width)
                own = own.masked_fill_(experts[:, None] != index // group.width, 0)
                everyone = torch.arange(group.experts, device=experts.device)
                routed[layer] = routed.get(layer, 0) + (experts == everyone[:, None]).sum(1)
            own = own.sum(0, dtype=torch.float64)
            if len(self.reader.groups[layer]) > 1:  # the mask's neurons of the layer's other group are read elsewhere
                own = own.masked_fill((index < group.first) | (index >= group.stop), 0)
            found[layer] = found.get(layer, 0) + own

        if self.layers:
            self.reader.run(ids, read)
        for layer, sums in found.items():
            sums = sums.cpu()
            if not bool(torch.isfinite(sums).all()):
                raise InputError("activations are not finite; try --dtype float32, or check the weights")
            here = [mask for mask in self.sums.values() if layer in mask]
            for mask, part in zip(here, sums.split([len(mask[layer]) for mask in here]), strict=True):
                mask[layer] += part
        for layer, tokens in routed.items():
            self.routed[layer] += tokens.cpu()
        self.tokens += ids.numel()

    def include(self, others: Iterable[tuple]) -> None:
        """Add what other processes have summed up: their `state()`."""
        for sums, routed, tokens in others:
            for name, mask in sums.items():
                for layer, part in mask.items():
                    self.sums[name][layer] += part
            for layer, part in routed.items():
                self.routed[layer] += part
            self.tokens += tokens

    def state(self) -> tuple:
        """Everything that adds up: sums, tokens routed, tokens."""
        return self.sums, self.routed, self.tokens

    def _per_token(self, name: str) -> dict[int, torch.Tensor]:
        """By layer, what the neurons' means are times `tokens`: of those that see every token the sums themselves."""
        import torch

        scaled = {}
        for layer, sums in self.sums[name].items():
            if layer in self.routed:
                group, index = self.of_experts[layer], self.index[name][layer]
                tokens = self.routed[layer][(index // group.width).clamp(max=group.experts - 1)].clamp(min=1)
                sums = torch.where(index < group.stop, sums * self.tokens / tokens, sums)
            scaled[layer] = sums
        return scaled

    def mean(self, name: str) -> float | None:
        """The mean over tokens and neurons of a mask; None for a mask without neurons."""
        sums = self._per_token(name)
        neurons = sum(map(len, sums.values()))
        return float(sum(s.sum() for s in sums.values())) / (neurons * self.tokens) if neurons else None

    def layer_means(self, name: str) -> dict[int, float]:
        """The same by layer, of the layers that have neurons."""
        return {layer: float(s.mean()) / self.tokens for layer, s in self._per_token(name).items()}


# --- a model without some of its neurons ---


@contextlib.contextmanager
def silenced(model: nn.Module, arch: Arch, mask: Mask) -> Iterator[nn.Module]:
    """The model with the masked neurons' activations set to zero, until the block ends.

    What a neuron gives to the layer is its activation (times `up`, where there is a gate) through the down projection,
    so its input there is set to zero. Experts have no module for it: their columns of the down projection are zero for
    as long, and then what they were, bit by bit. A layer without masked neurons is not touched.
    """
    import torch

    config = _config(model)
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
                    stack.callback(arch.down_module(model, layer).register_forward_pre_hook(_silence(index)).remove)
        yield model


def _silence(index: torch.Tensor) -> Callable:
    import torch

    on = functools.cache(index.to)  # copied to a device once, not in every pass

    def hook(_module, args):
        # In place where nothing is differentiated: the product that comes in here is nobody else's.
        fill = torch.Tensor.index_fill if torch.is_grad_enabled() else torch.Tensor.index_fill_
        return (fill(args[0], -1, on(args[0].device), 0), *args[1:])

    return hook


@contextlib.contextmanager
def _without_inputs(
    down: nn.Parameter, experts: torch.Tensor, inputs: torch.Tensor, transposed: bool
) -> Iterator[None]:
    """Inputs of the experts' down projections [E, hidden, I] set to zero, until the block ends.

    `transposed`: they are [E, I, hidden].
    """
    if down.is_meta:
        raise InputError("experts that wait on the disk or in memory cannot be silenced; use GPUs that hold the model")
    data = down.data.transpose(1, 2) if transposed else down.data
    place = experts.to(down.device), slice(None), inputs.to(down.device)
    saved = data[place]  # a copy
    data[place] = 0
    try:
        yield
    finally:
        data[place] = saved
