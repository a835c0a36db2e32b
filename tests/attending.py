"""One layer's attention run again, by itself, on what it got in the model: what its output matrix gets and gives.

attention = Attention(model, block, found)     # `found` is looking.found_in(model, block)
inputs, outputs = attention()
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from cpt_utils.architectures import archs

IDS = torch.tensor([[5, 9, 17, 40, 3, 88, 21]])


class Attention:
    """The module of an attention, with the arguments of one forward pass. Keep it within `with`, which undoes it.

    What is computed from all heads together (the root mean square of a norm over all of them) would hide whose rows
    reach whom, so such norms only scale here.
    """

    def __init__(self, model, block, found):
        self.matrix = found.weights["o_proj"][0][0]  # [out, in]
        linears = {name: m for name, m in block.named_modules() if getattr(m, "weight", None) is not None}
        (path,) = [name for name, m in linears.items() if m.weight.data_ptr() == self.matrix.data_ptr()]
        self.output, self.module = block.get_submodule(path), block.get_submodule(path.rpartition(".")[0])
        own = {parameter.data_ptr() for parameter in self.module.parameters()}
        self.names = [name for name, tensor in model.state_dict().items() if tensor.data_ptr() in own]
        self.stack, got = contextlib.ExitStack(), []

        def keep(_module, args, kwargs):
            got.append((args, kwargs))

        handle = self.module.register_forward_pre_hook(keep, with_kwargs=True)
        with torch.no_grad():
            model(IDS, use_cache=False)
        handle.remove()
        (self.arguments,) = got

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stack.close()

    def uncouple(self, head_dim: int) -> None:
        """Let norms over several heads scale alone, and Doge's mask of a KV head come from its own values."""
        for name, module in self.module.named_modules():
            weight = getattr(module, "weight", None)
            if "Norm" in type(module).__name__ and weight is not None and weight.dim() == 1 and len(weight) > head_dim:
                self.stack.callback(module.register_forward_hook(lambda m, args, _: args[0] * m.weight).remove)
            if name == "dt_proj":
                own = torch.eye(len(weight)).repeat_interleave(head_dim, dim=1)
                saved, weight.data = weight.data, weight.data * own
                self.stack.callback(setattr, weight, "data", saved)

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(input [1, tokens, in], output [1, tokens, out]) of the output matrix."""
        got = []
        handle = self.output.register_forward_hook(lambda _module, args, output: got.extend((args[0], output)))
        with torch.no_grad():
            self.module(*self.arguments[0], **self.arguments[1])
        handle.remove()
        return got[0].clone(), got[1].clone()


def positions(part: archs.WeightSlice, shape) -> torch.Tensor:
    """The entries of a part along its dimension."""
    return torch.arange(shape[part.dim])[slice(None) if part.index is None else part.index]


@contextlib.contextmanager
def changed(model: nn.Module, place: archs.Location, part: archs.WeightSlice, by: float | None = None):
    """The model with a part set to `by`, or with noise on it, until the block ends."""
    held = place.view(model.state_dict()[place.name])
    saved, index = held.clone(), positions(part, held.shape)
    values = held.index_select(part.dim, index)
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    held.index_copy_(part.dim, index, values + noise if by is None else torch.full_like(values, by))
    try:
        yield
    finally:
        held.copy_(saved)


def marked(parts: list[archs.WeightSlice], disk: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensor on disk -> how often each of its entries is in the parts."""
    found: dict[str, torch.Tensor] = {}
    for part in parts:
        marks = found.setdefault(part.tensor, torch.zeros(disk[part.tensor].shape, dtype=torch.int32))
        index = positions(part, marks.shape)
        marks.index_add_(part.dim, index, torch.ones_like(marks.index_select(part.dim, index)))
    return found
