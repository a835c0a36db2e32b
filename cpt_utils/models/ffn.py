"""The FFN neurons of a decoder: their number, and their activations, read during forward passes.

A *neuron* is one of the I units of a layer's FFN; its *activation* is act(W_gate x), or act(W_up x) without a gate. In
a mixture of E experts, every expert has I neurons, and neuron e I + i is the i-th of expert e. Forward passes here
never run the lm_head, and end as soon as the last requested neuron has been read.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

from cpt_utils.architectures import archs
from cpt_utils.architectures.arch_parts import Neurons, below
from cpt_utils.architectures.archs import Arch
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.models import loading
from cpt_utils.models.trace import StopForward, trace

BLOCK = {"llama": 4096, "qwen": 2048}  # tokens, by the published scripts' --type
TOKENS_A_BATCH = 4096


# --- text in blocks ---


def block_size(config: Mapping, kind: str | None = None, given: int | None = None) -> int:
    """Tokens per block: `given`, else the default of `kind` (llama or qwen), else that of the model type; defaults are
    capped at the model's positions, and a larger `given` is refused."""
    values = config.get("text_config") or config
    limit = next((int(values[key]) for key in ("max_position_embeddings", "n_positions") if values.get(key)), None)
    if given is not None:
        if limit is not None and given > limit:
            raise InputError(f"--block-size {given} exceeds the model's {limit} positions; give {limit} or less")
        return given
    size = BLOCK[kind] if kind else archs.for_config(config).block
    return min(size, limit or size)


def batch_size(given: int | None, size: int) -> int:
    """Blocks per forward pass: `given`, else as many blocks of `size` tokens as fit into TOKENS_A_BATCH."""
    return given or max(1, TOKENS_A_BATCH // size)


def blocks(ids: torch.Tensor, size: int, tokens: int, name: str = "the id file") -> torch.Tensor:
    """The first `tokens` of `ids` [n] as whole blocks: a view [blocks, size]; an incomplete last block is dropped.

    Raises:
        InputError: there is not one whole block.
    """
    whole = min(len(ids), tokens) // size
    if whole == 0:
        raise InputError(
            f"{name} gives {min(len(ids), tokens)} tokens, fewer than one block of {size}; give more text, or a "
            "smaller --block-size"
        )
    return ids[: whole * size].view(whole, size)


# --- forward passes that end early ---


class Reader:
    """Forward passes of the decoder that read the activations of `layers` (ascending) and end after the last one.

    With `before`, the nonlinearity's input is read instead of its output. Layers without an FFN are skipped.
    """

    def __init__(self, model: torch.nn.Module, arch: Arch, layers: Sequence[int], before: bool = False):
        config = decoder_config(model)
        self.model, self.arch, self.before = model, arch, before and arch.before
        self.groups = {layer: arch.neurons(config, layer) for layer in layers}
        self.groups = {layer: groups for layer, groups in self.groups.items() if groups}
        self._side = "input" if self.before else "output"

    @property
    def experts(self) -> int:
        """The largest number of experts in a layer."""
        return max((group.experts for groups in self.groups.values() for group in groups), default=0)

    def run(self, ids: torch.Tensor, read: Callable) -> None:
        """One pass over the blocks `ids` [batch, size].

        `read(layer, group, value, experts)` gets, for a dense FFN, the activations [.., I] of every token and None; for
        experts, the activations [rows, I] of the routed tokens and the expert of each row [rows], possibly in several
        calls per layer.
        """
        if not self.groups:
            return
        self._left = {group.first for group in self.groups[max(self.groups)]}  # still to be read in the last layer
        with contextlib.ExitStack() as stack:
            points: list[tuple] = []
            for layer, groups in self.groups.items():
                for group in groups:
                    points_of = self._routed if group.experts else self._dense
                    points += points_of(layer, group, functools.partial(read, layer, group), stack)
            stack.enter_context(trace(*points))
            stack.enter_context(torch.inference_mode())
            ids = ids.to(loading.input_device(self.model), torch.long)
            self.arch.decoder(self.model)(input_ids=ids, use_cache=False)

    def _end(self, layer: int, group: Neurons) -> None:
        if layer == max(self.groups):
            self._left.discard(group.first)
            if not self._left:
                raise StopForward

    def _dense(self, layer: int, group: Neurons, read: Callable, _stack) -> list[tuple]:
        module, start, stop = group.source
        act = None if self.before or group.activation else _function(self.arch.function)

        def see(output: torch.Tensor) -> None:
            if self.before or act is not None:
                output = output[..., start:stop]
            read(output if act is None else act(output), None)
            self._end(layer, group)

        read_at = module if self.before or act is not None else group.activation
        return [(self.arch.in_layer(self.model, layer, read_at), "output", see)]

    def _routed(self, layer: int, group: Neurons, read: Callable, stack: contextlib.ExitStack) -> list[tuple]:
        """Trace points around a layer's experts, for implementations that call the experts' nonlinearity."""
        spec, experts = self.arch.experts_at, self.arch.experts_module(self.model, layer)
        if spec.routed_by == "score":
            return self._scored(layer, group, read)
        left = torch.empty(0)  # the expert of each row that has not passed the nonlinearity yet

        def begin(args: tuple) -> None:
            nonlocal left
            left = args[1].reshape(-1)
            if experts.config._experts_implementation != "batched_mm":  # all others process expert by expert
                left = left.sort().values

        def take(value) -> None:
            nonlocal left
            rows, left = left[: len(value)], left[len(value) :]
            read(value, rows)
            if not len(left):
                self._end(layer, group)

        def end(_output) -> None:
            if len(left):
                raise InputError(
                    f"the experts' activations cannot be read with experts_implementation "
                    f"{experts.config._experts_implementation!r}; load the model with grouped_mm or eager"
                )

        around = [(experts, "inputs", begin), (experts, "output", end)]
        if not group.activation:
            gates = _intercepted(experts, lambda gate: take(gate if self.before else spec.function(experts, gate)))
            stack.enter_context(gates)
            return around
        return [*around, (self.arch.in_layer(self.model, layer, group.activation), self._side, take)]

    def _scored(self, layer: int, group: Neurons, read: Callable) -> list[tuple]:
        """Trace points for types whose experts all compute every token, with score 0 for experts not chosen."""
        spec, scores = self.arch.experts_at, None

        def score(output: torch.Tensor) -> None:
            nonlocal scores
            scores = output  # [tokens, experts]

        def see(value: torch.Tensor) -> None:
            for expert, tokens in enumerate(value.view(group.experts, -1, group.width)):
                rows = scores[:, expert].nonzero()[:, 0]
                read(tokens[rows], rows.new_full((len(rows),), expert))
            self._end(layer, group)

        router = self.arch.in_layer(self.model, layer, below(spec.block, spec.router))
        activation = self.arch.in_layer(self.model, layer, group.activation)
        return [(router, "output", score), (activation, self._side, see)]


@contextlib.contextmanager
def _intercepted(experts: torch.nn.Module, see: Callable) -> Iterator[None]:
    """Pass the gates' outputs to `see`, for experts whose nonlinearity is a function instead of a module."""
    name = "act_fn" if callable(vars(experts).get("act_fn")) else "_apply_gate"
    original = getattr(experts, name)

    def apply(x):
        if name == "_apply_gate":  # gate and up together
            see(x[..., : x.shape[-1] // 2] if experts.is_concatenated else x[..., ::2])
        else:
            see(x)
        return original(x)

    setattr(experts, name, apply)
    try:
        yield
    finally:
        if name == "act_fn":
            experts.act_fn = original
        else:
            del experts._apply_gate  # restores the class's method


def _function(name: str) -> Callable:
    """The nonlinearity with this name in configurations."""
    from transformers.activations import ACT2FN

    return ACT2FN[name]


def decoder_config(model: torch.nn.Module) -> dict:
    return model.config.get_text_config().to_dict()


def widths(arch: Arch, config: Mapping) -> list[int]:
    """The number of neurons of each layer; unequal if a model mixes dense layers, mixtures of experts and no FFN."""
    return [arch.ffn_width(config, layer) for layer in range(arch.n_layers(config))]
