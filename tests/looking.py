"""Where everything is in one layer of a loaded model, found by running it: the table of architectures is never asked.

    found = found_in(model, block)
    found.weights["q_proj"]      # [(matrix [out, in], rows)]: views of the model's own parameters

One token goes through the model. Inside the layer every matrix's output is cut off from what made it, so that what
arrives somewhere (at the attention as queries, at a nonlinearity, at the next matrix) depends on those outputs alone
that went straight there, feature by feature: the gradient says which.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.pytorch_utils import Conv1D

View = tuple[torch.Tensor, torch.Tensor | slice]  # a matrix [out, in] or bias [out], and the rows that belong to it
# Mixers that are no attention, by the names of their classes, and what else in a layer looks like an FFN.
MIXERS = re.compile("Mamba|BambaMixer|FalconH1Mixer|DeltaNet|DeltaAttention|Lightning|ShortConv|RecurrentBlock")
NO_FFN = re.compile(r"per_layer|norm|indexer")
NONLINEAR = re.compile(r"transformers\.activations|torch\.nn\.modules\.activation|BloomGelu")
TOKEN = 7


@dataclass
class Found:
    """Of every projection the weights and biases (experts in order, then others), and the layer's nonlinearities.

    Attributes:
        activation, width: the nonlinearity of a dense FFN (None where no module of the layer computes it) and its
            neurons; in a MoE layer those of the FFN beside the experts, if there is one.
        function: what that nonlinearity does to a tensor, whoever computes it.
        heads: (query heads, heads of keys), where a function of transformers' attends.
        experts, expert_activation, expert_function: the module that holds the experts, and the same of theirs.
    """

    weights: dict[str, list[View]] = field(default_factory=dict)
    biases: dict[str, list[View]] = field(default_factory=dict)
    activation: nn.Module | None = None
    function: Callable | None = None
    width: int = 0
    heads: tuple[int, int] | None = None
    experts: nn.Module | None = None
    expert_activation: nn.Module | None = None
    expert_function: Callable | None = None


def matrix(module) -> torch.Tensor:
    """The weight as [out, in], a view."""
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


class Recording:
    """What went into and came out of the matrices and nonlinearities of a layer, and what its attention got.

    Attributes:
        linears, plain: path below the layer -> matrix, or nonlinearity, that was called.
        inputs, outputs: of both; outputs are leaves.
        caught: (query, key, value) as the attention got them; None in a layer without attention.
        attended: what stands for the attention's result, a leaf.
    """

    def __init__(self, model, block):
        mixers = [name for name, module in block.named_modules() if name and MIXERS.search(type(module).__name__)]
        modules = {
            name: module
            for name, module in block.named_modules()
            if not any(f"{name}.".startswith(f"{mixer}.") for mixer in mixers)
        }
        self.linears = {n: m for n, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}
        self.plain = {n: m for n, m in modules.items() if NONLINEAR.search(f"{type(m).__module__}.{type(m).__name__}")}
        for catch in (attention_functions, matrix_products):
            self.inputs, self.outputs, self.caught, self.attended = {}, {}, [], None
            self.functions: list[str] = []
            self.heads: tuple[int, int] | None = None
            self._run(model, block, catch)
            if self.caught or mixers:  # a mixer's products are no attention's
                break
        self.linears = {name: m for name, m in self.linears.items() if name in self.outputs}

    def _run(self, model, block, catch) -> None:
        self.inside = False
        with contextlib.ExitStack() as stack:
            for name, module in [*self.linears.items(), *self.plain.items()]:
                stack.callback(module.register_forward_hook(self._cut(name)).remove)
            stack.callback(block.register_forward_pre_hook(lambda *_: setattr(self, "inside", True)).remove)
            stack.callback(block.register_forward_hook(lambda *_: setattr(self, "inside", False)).remove)
            stack.enter_context(catch(model, self))
            patch, silu = stack.enter_context(pytest.MonkeyPatch.context()), functional.silu
            patch.setattr(functional, "silu", lambda x, *_, **__: self._function(x, silu(x)))
            stack.enter_context(torch.enable_grad())
            model(torch.tensor([[TOKEN]]))

    def _cut(self, name):
        def hook(_module, args, output):
            if not self.inside or not args or not isinstance(output, torch.Tensor):
                return None
            self.inputs[name], self.outputs[name] = args[0], passed_on(output)
            return self.outputs[name].clone()  # some layers add to it in place

        return hook

    def _function(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """A nonlinearity that no module computes; what a module calls is cut off again by its own hook."""
        if not self.inside:
            return output
        name = f"function {len(self.functions)}"
        self.functions.append(name)
        self.inputs[name], self.outputs[name] = x, passed_on(output)
        return self.outputs[name]

    def result(self, shape, like: torch.Tensor) -> torch.Tensor:
        """What stands for an attention's result."""
        made = torch.randn(shape, dtype=like.dtype).requires_grad_()
        if self.inside:
            self.attended = made
        return made

    def features(self, arrived: torch.Tensor) -> dict[str, torch.Tensor]:
        """Matrix -> which of its output features `arrived` depends on directly: bool [out]; those with any."""
        outputs = {name: out for name, out in self.outputs.items() if name in self.linears}
        found = dict(zip(outputs, gradients(arrived, list(outputs.values())), strict=True))
        found = {
            name: grad.reshape(-1, grad.shape[-1]).ne(0).any(0) for name, grad in found.items() if grad is not None
        }
        return {name: rows for name, rows in found.items() if rows.any()}

    def depends(self, arrived: torch.Tensor, on: torch.Tensor) -> bool:
        (grad,) = gradients(arrived, [on])
        return grad is not None and bool(grad.ne(0).any())


def passed_on(output: torch.Tensor) -> torch.Tensor:
    """An output as a leaf; without zeros, which would hide what they are multiplied with."""
    output = output.detach()
    return torch.where(output == 0, 0.5, output).requires_grad_()


def gradients(arrived: torch.Tensor, leaves: list[torch.Tensor]) -> tuple:
    """Gradients of a random combination of what arrived, None where it does not depend on a leaf."""
    if not arrived.requires_grad or not leaves:
        return (None,) * len(leaves)
    weights = torch.rand(arrived.shape, generator=torch.Generator().manual_seed(0), dtype=arrived.dtype) + 0.5
    return torch.autograd.grad((arrived * weights).sum(), leaves, retain_graph=True, allow_unused=True)


@contextlib.contextmanager
def attention_functions(model, recording):
    """Catch what arrives at functions that attend, transformers' own or torch's."""

    def attention(_module, query, key, value, *_, **__):
        if recording.inside and not recording.caught:
            recording.caught = [query, key, value]
            recording.heads = query.shape[1], key.shape[1]
        batch, heads, tokens = query.shape[:3]
        return recording.result((batch, tokens, heads, value.shape[-1]), query), None

    def product(query, key, value, *_, **__):
        if recording.inside and not recording.caught:
            recording.caught = [query, key, value]
        return recording.result((*query.shape[:-1], value.shape[-1]), query)

    before = model.config._attn_implementation
    AttentionInterface.register("probe", attention)
    AttentionMaskInterface.register("probe", sdpa_mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", product)
        with contextlib.suppress(ValueError, ImportError):
            model.set_attn_implementation("probe")
        try:
            yield
        finally:
            model.set_attn_implementation(before)


@contextlib.contextmanager
def matrix_products(_model, recording):
    """Catch the factors of a layer's first two products: queries and keys, probabilities and values."""
    with pytest.MonkeyPatch.context() as patch:

        def watch(owner, name):
            own = getattr(owner, name)

            def product(*args, **kwargs):
                found = own(*args, **kwargs)
                if not recording.inside or len(recording.caught) == 3:
                    return found
                several = (*args, *kwargs.values())
                a, b = several[-2:]
                if name == "baddbmm":
                    a, b = kwargs.get("batch1", several[1]), kwargs.get("batch2", several[2])
                recording.caught += [b] if recording.caught else [a, b]
                return recording.result(found.shape, found) if len(recording.caught) == 3 else found

            patch.setattr(owner, name, product)

        watch(torch, "matmul")
        watch(torch, "bmm")
        watch(torch, "baddbmm")
        watch(torch.Tensor, "baddbmm")
        yield


# --- what is what ---


def found_in(model, block) -> Found:
    """The weights and biases of every projection of a layer, and of its router, and its nonlinearities."""
    seen, found, places = Recording(model, block), Found(), {}
    attention_of(seen, places)
    ffn_of(seen, places, found)
    if [m for _, m in model.named_modules(remove_duplicate=False)].count(found.activation) > 1:
        found.activation = None  # one module for all layers is none of this one's own
    found.heads, found.experts = seen.heads, experts_of(block)
    if found.experts is not None:
        experts_in(found)
        router_in(block, found)
    for projection, parts in places.items():
        modules = [(seen.linears[name], rows) for name, rows in parts]
        weights, biases = found.weights.setdefault(projection, []), found.biases.setdefault(projection, [])
        weights += [(matrix(module), rows) for module, rows in modules]
        biases += [(module.bias.data, rows) for module, rows in modules if module.bias is not None]
    return found


def at_the_same_place(found: Found, model: nn.Module, other: nn.Module) -> Found:
    """The views that `other`, of the same type, has where `model` has those of `found`; the modules stay `model`'s."""
    twins = list(zip(model.parameters(), other.parameters(), strict=True))

    def in_other(view: torch.Tensor) -> torch.Tensor:
        start = view.data_ptr()
        ((own, twin),) = [(p, q) for p, q in twins if p.data_ptr() <= start < p.data_ptr() + p.nbytes]
        assert own.shape == twin.shape and own.stride() == twin.stride()
        offset = (start - own.data_ptr()) // own.itemsize + twin.storage_offset()
        return twin.data.as_strided(view.shape, view.stride(), offset)

    def all_in_other(kind: dict[str, list[View]]) -> dict[str, list[View]]:
        return {name: [(in_other(view), rows) for view, rows in views] for name, views in kind.items()}

    return replace(found, weights=all_in_other(found.weights), biases=all_in_other(found.biases))


def attention_of(seen: Recording, places: dict) -> None:
    """q, k, v: what arrives at the attention, back to the layer's input; o: what its result goes into.

    Where k and v share a matrix, what they share is k's; a module's rows that arrive nowhere are those of its first
    projection (a gate that is fused with the queries).
    """
    if not seen.caught:
        return
    taken: dict[str, torch.Tensor] = {}
    for projection, arrived in zip(("q_proj", "k_proj", "v_proj"), seen.caught, strict=True):
        waiting, mine = [arrived], {}
        owners = {name.rpartition(".")[0] for name in seen.features(arrived)}
        while waiting:
            for name, rows in seen.features(waiting.pop()).items():
                if name.rpartition(".")[0] not in owners:
                    continue  # before the attention
                known = mine.get(name, torch.zeros_like(rows))
                if (rows & ~known).any():
                    waiting.append(seen.inputs[name])
                mine[name] = known | rows
        for name, rows in mine.items():
            rows &= ~taken.get(name, torch.zeros_like(rows))
            taken[name] = taken.get(name, torch.zeros_like(rows)) | rows
            if rows.any():
                places.setdefault(projection, []).append((name, rows))
    for projection, parts in places.items():
        for i, (name, rows) in enumerate(parts):
            if not taken[name].all():
                parts[i], taken[name] = (name, rows | ~taken[name]), torch.ones_like(rows)
        places[projection] = [(name, rows.nonzero()[:, 0]) for name, rows in parts]
    places["o_proj"] = [
        (name, slice(None))
        for name, x in seen.inputs.items()
        if name in seen.linears and name not in taken and seen.depends(x, seen.attended)
    ]


def ffn_of(seen: Recording, places: dict, found: Found) -> None:
    """Gate, up and down of an FFN: what feeds a nonlinearity, what else feeds the matrix behind it, and that matrix."""
    mine = {name for parts in places.values() for name, _ in parts}
    acts = [name for name in seen.plain if name in seen.outputs and not NO_FFN.search(name)]
    for act in [*acts, *seen.functions]:
        downs = [
            name
            for name in seen.linears
            if name not in mine and not NO_FFN.search(name) and seen.depends(seen.inputs[name], seen.outputs[act])
        ]
        feeding = {name: rows for name, rows in seen.features(seen.inputs[act]).items() if name not in mine}
        if len(downs) != 1 or not feeding or matrix(seen.linears[downs[0]]).shape[1] != seen.outputs[act].shape[-1]:
            continue
        assert "down_proj" not in places, "a second FFN"
        beside = seen.features(seen.inputs[downs[0]])
        assert len(feeding) == 1 and len(beside) <= 1
        kinds = {"gate_proj": feeding, "up_proj": beside} if beside else {"up_proj": feeding}
        for projection, parts in kinds.items():
            places[projection] = [(name, rows.nonzero()[:, 0]) for name, rows in parts.items()]
        places["down_proj"] = [(downs[0], slice(None))]
        found.activation, found.width = seen.plain.get(act), seen.outputs[act].shape[-1]
        found.function = found.activation or functional.silu  # the one function that is watched


def experts_of(block) -> nn.Module | None:
    """The module that holds a layer's experts as parameters with three dimensions; None of a dense layer."""
    kinds = [m for m in block.modules() if "Experts" in type(m).__name__]
    return next((m for m in kinds if any(p.dim() == 3 for p in m.parameters(recurse=False))), None)


def experts_in(found: Found) -> None:
    """Gate, up and down of every expert: the gate is what the nonlinearity's input depends on, up the rest of the same
    parameter, down the other parameter. Which dimension is features tells their number."""
    experts = found.experts
    tensors = {name: p for name, p in experts.named_parameters(recurse=False) if p.dim() == 3}
    biases = dict(experts.named_parameters(recurse=False))
    acts = [m for m in experts.children() if not list(m.parameters())]
    found.expert_activation = acts[0] if acts else None
    found.expert_function = acts[0] if acts else vars(experts).get("act_fn") or gpt_oss
    (arrived,) = fed(experts, acts)
    grads = dict(zip(tensors, gradients(arrived, list(tensors.values())), strict=True))
    ((first, grad),) = [(name, grad) for name, grad in grads.items() if grad is not None]
    (down,) = set(tensors) - {first}
    width, mask = arrived.shape[-1], grad[2].ne(0)
    axis = 0 if mask.shape[0] % width == 0 and mask.shape[1] % width else 1
    feeds = mask.any(1 - axis)
    assert torch.equal(mask, feeds[:, None].expand_as(mask) if axis == 0 else feeds[None].expand_as(mask))
    rows = {"gate_proj": feeds, "up_proj": ~feeds} if not feeds.all() else {"up_proj": feeds}
    parts = {name: (first, axis, mine.nonzero()[:, 0]) for name, mine in rows.items()}
    parts["down_proj"] = (down, int(tensors[down].shape[1] == width), slice(None))
    for projection, (name, dim, own) in parts.items():
        found.weights.setdefault(projection, [])
        found.weights[projection] += [(each if dim == 0 else each.T, own) for each in tensors[name].data]
        if f"{name}_bias" in biases:
            found.biases.setdefault(projection, [])
            found.biases[projection] += [(each, own) for each in biases[f"{name}_bias"].data]


def gpt_oss(x: torch.Tensor) -> torch.Tensor:
    """The activation of gpt-oss, as its model card says: x, at most 7, times a sigmoid of 1.702 x."""
    x = x.clamp(max=7.0)
    return x / (1 + torch.exp(-1.702 * x))


def fed(experts, acts: list[nn.Module]) -> list[torch.Tensor]:
    """What arrives at the experts' nonlinearity when one token goes to expert 2 (to all, where they take all)."""
    arrived, hidden = [], next(p for p in experts.parameters() if p.dim() == 3).shape
    width = 32
    assert width in hidden
    token = torch.linspace(-1, 1, width)[None]
    with contextlib.ExitStack() as stack:
        for act in acts:
            stack.callback(act.register_forward_pre_hook(lambda _module, args: arrived.append(args[0])).remove)
        if not acts:
            patch, own = stack.enter_context(pytest.MonkeyPatch.context()), torch.sigmoid
            patch.setattr(torch, "sigmoid", lambda x: arrived.append(x) or own(x))
            if callable(vars(experts).get("act_fn")):
                act = experts.act_fn
                patch.setattr(experts, "act_fn", lambda x: arrived.append(x) or act(x))
        stack.enter_context(torch.enable_grad())
        if "top_k_index" in experts.forward.__code__.co_varnames or hasattr(experts, "is_transposed"):
            experts(token, torch.tensor([[2]]), torch.ones(1, 1))
        else:
            experts(token.repeat(hidden[0], 1))
    return arrived


def router_in(block, found: Found) -> None:
    """The matrix that scores the experts, among those that are called so."""
    number = len(next(p for p in found.experts.parameters() if p.dim() == 3))
    named = [(name, m) for name, m in block.named_modules() if re.search("gate|router|classifier", name)]
    scoring = [
        m
        for name, m in named
        if not re.search("attn|shared|experts", name)
        and getattr(getattr(m, "weight", None), "dim", lambda: 0)() == 2
        and len(m.weight) == number
    ]
    (router,) = scoring
    found.weights["router"] = [(router.weight.data, slice(None))]
    found.biases["router"] = [(router.bias.data, slice(None))] if getattr(router, "bias", None) is not None else []
