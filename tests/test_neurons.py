"""Counts, mean activations and silencing, each against a slow loop over tokens through the modules."""

from __future__ import annotations

import pytest
import torch
from helpers import ARCHITECTURES, tiny_model

from cpt_utils import archs, neurons
from cpt_utils.errors import InputError


def model_of(model_type: str, dtype=torch.float64):
    model = tiny_model(model_type, seed=3).to(dtype).eval()
    return model, archs.for_config(model.config)


def slow_activations(model, arch, ids: torch.Tensor) -> list[torch.Tensor]:
    """act(gate) of every token by ordinary forward passes, a block at a time: a list over layers of [tokens, I]."""
    layers = range(arch.n_layers(model.config))
    kept: list[list[torch.Tensor]] = [[] for _ in layers]
    handles = [
        arch.activation_module(model, i).register_forward_hook(lambda _m, _a, out, i=i: kept[i].append(out.detach()))
        for i in layers
    ]
    with torch.no_grad():
        for block in ids:
            model(input_ids=block[None])
    for handle in handles:
        handle.remove()
    return [torch.cat([x.reshape(-1, x.shape[-1]) for x in rows]) for rows in kept]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_counts_and_means_are_those_of_a_slow_loop(model_type):
    model, arch = model_of(model_type)
    ids = torch.randint(3, 250, (5, 16), generator=torch.Generator().manual_seed(1))
    slow = slow_activations(model, arch, ids)
    counter = neurons.Counter(model, arch)
    for part in ids.split(2):
        counter.add(part)
    assert counter.counts.dtype == torch.int64
    for layer, activation in enumerate(slow):
        expected = [sum(1 for token in activation if token[n] > 0) for n in range(activation.shape[1])]
        assert counter.counts[layer].tolist() == expected
    masks = {"own": {0: [1, 5, 40], 2: [7]}, "control": {0: [0, 2, 3], 2: [8]}, "none": {}}
    found = neurons.Activations(model, arch, masks)
    for part in ids.split(3):
        found.add(part)
    assert found.tokens == ids.numel()
    for name, mask in masks.items():
        values = [slow[layer][token, n].item() for layer, ns in mask.items() for n in ns for token in range(80)]
        if not values:
            assert found.mean(name) is None
            continue
        assert found.mean(name) == pytest.approx(sum(values) / len(values), rel=1e-12)
        for layer, ns in mask.items():
            assert found.layer_means(name)[layer] == pytest.approx(slow[layer][:, list(ns)].mean().item(), rel=1e-12)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_silenced_neurons_give_nothing_and_an_empty_mask_changes_no_logit(model_type):
    model, arch = model_of(model_type)
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(2))
    whole = model(input_ids=ids).logits
    with neurons.silenced(model, arch, {0: [], 1: []}):
        assert torch.equal(model(input_ids=ids).logits, whole)
    mask = {0: [3, 4], 2: [0, 47]}
    with neurons.silenced(model, arch, mask):
        silenced = model(input_ids=ids).logits
    assert not torch.equal(silenced, whole)
    # The same by weights: a neuron whose column in the down projection is zero gives nothing.
    saved = {}
    for layer, ns in mask.items():
        weight = arch.module(model, layer, "down_proj").weight
        saved[layer] = weight.data.clone()
        if arch.transposed:
            weight.data[ns] = 0
        else:
            weight.data[:, ns] = 0
    assert torch.allclose(model(input_ids=ids).logits, silenced, rtol=0, atol=1e-12)
    for layer, weight in saved.items():
        arch.module(model, layer, "down_proj").weight.data = weight
    assert torch.equal(model(input_ids=ids).logits, whole)


def test_an_unknown_activation_is_counted_behind_itself():
    """Where the sign of the pre-activation does not say enough, the activation itself is read."""
    model, arch = model_of("llama")
    model.config.hidden_act = "shifted"

    class Shifted(torch.nn.Module):
        def forward(self, x):
            return torch.relu(x - 0.01)

    for layer in arch.layers(model):
        layer.mlp.act_fn = Shifted()
    ids = torch.randint(3, 250, (2, 8), generator=torch.Generator().manual_seed(2))
    counter = neurons.Counter(model, arch)
    counter.add(ids)
    slow = slow_activations(model, arch, ids)
    assert torch.equal(counter.counts, torch.stack([(x > 0).sum(0) for x in slow]))


def test_not_finite_activations_are_refused():
    model, arch = model_of("llama")
    arch.module(model, 1, "down_proj").weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        neurons.Counter(model, arch).add(torch.full((1, 4), 5))
    with pytest.raises(InputError, match="not finite"):
        neurons.Activations(model, arch, {"own": {2: [1]}}).add(torch.full((1, 4), 5))


def test_blocks():
    ids = torch.arange(100, dtype=torch.int32)
    assert neurons.blocks(ids, 16, 10**9).shape == (6, 16)
    assert neurons.blocks(ids, 16, 40).flatten().tolist() == list(range(32))
    with pytest.raises(InputError, match="fewer than one block of 128"):
        neurons.blocks(ids, 128, 10**9)
    config = {"model_type": "qwen2", "max_position_embeddings": 32768}
    assert neurons.block_size(config) == 2048
    assert neurons.block_size(config, "llama") == 4096
    assert neurons.block_size({"model_type": "llama", "max_position_embeddings": 2048}) == 2048
    assert neurons.block_size({"model_type": "gpt2", "n_positions": 1024}, "qwen") == 1024
    assert neurons.block_size(config, given=64) == 64
    with pytest.raises(InputError, match="more than the model's 2048"):
        neurons.block_size({"model_type": "llama", "max_position_embeddings": 2048}, given=4096)
