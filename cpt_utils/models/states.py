"""Sums over the hidden states of a forward pass, taken layer by layer; the states themselves are never kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cpt_utils.base.lazy import torch
from cpt_utils.models.trace import trace


class Pooled(NamedTuple):
    """Sentence vectors at every hidden state, [L+1, sentences, hidden] each, pooled over the tokens that enter.

    mean: mean of the tokens' hidden states, as published.
    unit: mean of the hidden states scaled to length 1 each, so no token outweighs the others.
    weighted: weighted mean, in which the t-th token has weight t (Muennighoff 2022; MEXA: Kargaran et al. 2024).
    last: the hidden state of the last token.
    largest: [L+1, sentences], the largest token norm as a share of the sum of the tokens' norms.
    """

    mean: torch.Tensor
    unit: torch.Tensor
    weighted: torch.Tensor
    last: torch.Tensor
    largest: torch.Tensor


def pooled_states(model: torch.nn.Module, arch, input_ids, attention_mask, pool_mask=None) -> Pooled:
    """The non-padding tokens at every hidden state, pooled in every way: float32 (float64 for float64), one pass.

    Entry 0 is the embedding output, entry l+1 the output of layer l, and the last entry is taken after the final norm,
    like `output_hidden_states=True`. The sums are taken on the device inside the hooks, so at most one layer's state is
    alive at a time. The lm_head is never run.

    Args:
        input_ids, attention_mask: [batch, tokens]; padding on either side.
        pool_mask: [batch, tokens], the tokens that enter; default `attention_mask`.
    """
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    keep = (attention_mask if pool_mask is None else pool_mask).bool()
    ranks = keep.cumsum(1) * keep  # 1, 2, .. for the tokens that enter, else 0
    ends = keep & (ranks == ranks.amax(1, keepdim=True))
    ones, fixed = keep[:, None].to(wide), torch.stack([ranks, ends], 1).to(wide)

    def product(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:  # takes a tenth of the time of masking and summing
        hidden = hidden.to(wide)
        return torch.bmm(ones.to(hidden.device), hidden)[:, 0], *others(hidden)

    def masked(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = hidden.to(wide).masked_fill(~keep.to(hidden.device)[:, :, None], 0)
        return hidden.sum(1), *others(hidden)

    def others(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        norms = torch.linalg.vector_norm(hidden, dim=2).masked_fill(~keep.to(hidden.device), 0)
        scale = norms.reciprocal().masked_fill(norms == 0, 0)
        sums = torch.bmm(torch.cat([scale[:, None], fixed.to(hidden.device)], 1), hidden)
        return *sums.unbind(1), norms.amax(1) / norms.sum(1).clamp(min=torch.finfo(wide).tiny)

    sums = _states(model, arch, input_ids, attention_mask, product)
    if not torch.isfinite(sums[0]).all():  # perhaps inf or NaN at a padding position: 0 * NaN is NaN
        sums = _states(model, arch, input_ids, attention_mask, masked)
    mean, unit, weighted, last, largest = sums
    count = keep.sum(1, keepdim=True).to(wide)
    return Pooled(mean / count, unit / count, weighted / ranks.sum(1, keepdim=True).to(wide), last, largest)


def _states(model: torch.nn.Module, arch, input_ids, attention_mask, pool: Callable) -> list[torch.Tensor]:
    """Apply `pool` to every hidden state [batch, tokens, hidden] of one forward pass; each tensor that it returns is
    stacked over the hidden states, on the device of the input."""
    layers = arch.layers(model)
    pooled: list[tuple[torch.Tensor, ...]] = [()] * (len(layers) + 1)

    def into(index: int) -> Callable:
        def put(hidden: torch.Tensor) -> None:
            hidden = hidden[0] if arch.streams and hidden.dim() == 4 else hidden
            pooled[index] = tuple(part.to(input_ids.device) for part in pool(hidden))

        return put

    points = [(layers[0], "input", into(0)), (arch.last(model), "output", into(len(layers)))]
    points += [(layer, "output", into(i + 1)) for i, layer in enumerate(layers[:-1])]
    with trace(*points), torch.inference_mode():
        arch.decoder(model)(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        )
    return [torch.stack(parts) for parts in zip(*pooled, strict=True)]
