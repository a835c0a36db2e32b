"""Sums over the hidden states of a forward pass, taken as they go by; the states themselves are never kept."""

from __future__ import annotations

from collections.abc import Callable

from cpt_utils.base.lazy import torch
from cpt_utils.models.trace import trace


def pooled_states(model: torch.nn.Module, arch, input_ids, attention_mask, pool_mask=None) -> torch.Tensor:
    """Mean over the non-padding tokens at every hidden state: [L+1, batch, hidden], float32 (float64 for float64).

    Entry 0 is the embedding output, entry l+1 the output of layer l, and the last entry is taken after the final norm,
    like `output_hidden_states=True`. The mean is taken on the device inside the hooks, so that no more than one
    layer's state is alive at a time. The lm_head is never run.

    Args:
        input_ids, attention_mask: [batch, tokens]; padding on either side.
        pool_mask: [batch, tokens], the tokens that enter the mean; default `attention_mask`.
    """
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
    layers = arch.layers(model)
    pooled: list[torch.Tensor | None] = [None] * (len(layers) + 1)

    def into(index: int) -> Callable:
        def put(hidden: torch.Tensor) -> None:
            hidden = hidden[0] if arch.streams and hidden.dim() == 4 else hidden
            pooled[index] = pool(hidden).to(input_ids.device)

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
    return torch.stack(pooled)
