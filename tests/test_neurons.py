"""Counts, mean activations and silencing, each against a slow loop over tokens through the modules."""

from __future__ import annotations

import pytest
import torch
from helpers import ARCHITECTURES, bits, load_script, nonlinearity, save_tiny, tiny_model

from cpt_utils.architectures import archs
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.interventions import activations
from cpt_utils.models import ffn, loading

counting = load_script("lsn/activation.py")
following = load_script("lsn/lsn_activation_cpt.py")
MOE = ("mixtral", "qwen3_moe", "olmoe")  # qwen3_moe: layer 1 is dense


def model_of(model_type: str, dtype=torch.float64):
    model = tiny_model(model_type, seed=3).to(dtype).eval()
    if model_type in MOE:
        model.set_experts_implementation("eager")  # the default has no float64
    return model, archs.for_config(model.config)


def slow_activations(model, arch, ids: torch.Tensor) -> list[torch.Tensor]:
    """act(gate) of every token by ordinary forward passes, a block at a time: a list over layers of [tokens, I]."""
    layers = range(arch.n_layers(model.config))
    kept: list[list[torch.Tensor]] = [[] for _ in layers]
    handles = [
        nonlinearity(arch, model, i).register_forward_hook(lambda _m, _a, out, i=i: kept[i].append(out.detach()))
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
    counter = counting.Counter(model, arch)
    for part in ids.split(2):
        counter.add(part)
    assert counter.counts.dtype == torch.int64
    for layer, activation in enumerate(slow):
        expected = [sum(1 for token in activation if token[n] > 0) for n in range(activation.shape[1])]
        assert counter.counts[layer].tolist() == expected
    masks = {"own": {0: [1, 5, 40], 2: [7]}, "control": {0: [0, 2, 3], 2: [8]}, "none": {}}
    found = following.Activations(model, arch, masks)
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
    with activations.silenced(model, arch, {0: [], 1: []}):
        assert torch.equal(model(input_ids=ids).logits, whole)
    mask = {0: [3, 4], 2: [0, 47]}
    with activations.silenced(model, arch, mask):
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


class SlowExperts:
    """The FFN of a MoE layer as its definition says: token by token, expert by expert.

    Attributes:
        seen: (expert, activations [I]) of every token at every expert it is routed to.
    """

    def __init__(self, block, top_k: int, normalized: bool, silent: list[int]):
        self.block, self.top_k, self.normalized, self.seen = block, top_k, normalized, []
        self.width = block.experts.down_proj.shape[-1]
        self.silent = [divmod(neuron, self.width) for neuron in silent]

    def __call__(self, hidden_states):
        out = torch.zeros_like(hidden_states)
        gates_ups, down = self.block.experts.gate_up_proj, self.block.experts.down_proj
        for place in [(i, j) for i in range(hidden_states.shape[0]) for j in range(hidden_states.shape[1])]:
            x = hidden_states[place]
            shares = (self.block.gate.weight @ x).float().softmax(-1)  # float32 in every model, as here
            best = sorted(range(len(shares)), key=lambda e: -shares[e])[: self.top_k]
            total = sum(shares[e] for e in best) if self.normalized else 1
            for e in best:
                activation = torch.nn.functional.silu(gates_ups[e, : self.width] @ x)
                self.seen.append((e, activation.detach()))
                given = activation * (gates_ups[e, self.width :] @ x)
                for expert, i in self.silent:
                    if expert == e:
                        given[i] = 0
                out[place] += shares[e] / total * (down[e] @ given)
        return out


def slow_model(model_type: str, mask=None, dtype=torch.float64):
    """A model whose experts are run slowly, and its layers with experts."""
    model, arch = model_of(model_type, dtype)
    slow = {}
    for layer, module in enumerate(arch.layers(model)):
        if arch.experts(model.config, layer):
            normalized = getattr(model.config, "norm_topk_prob", True)
            slow[layer] = SlowExperts(module.mlp, 2, normalized, (mask or {}).get(layer, []))
            module.mlp.forward = slow[layer]
    return model, slow


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("model_type", MOE)
def test_experts_are_counted_over_the_tokens_routed_to_them(model_type, experts):
    dtype, near = (torch.float32, 1e-7) if experts == "grouped_mm" else (torch.float64, 1e-12)
    model, arch = model_of(model_type, dtype)
    model.set_experts_implementation(experts)
    ids = torch.randint(3, 250, (3, 16), generator=torch.Generator().manual_seed(1))
    reference, slow = slow_model(model_type, dtype=dtype)
    dense = [layer for layer in range(3) if layer not in slow]
    assert dense == ([1] if model_type == "qwen3_moe" else [])
    seen: dict[int, list[torch.Tensor]] = {layer: [] for layer in dense}
    for layer in dense:
        nonlinearity(arch, reference, layer).register_forward_hook(lambda _m, _a, out, i=layer: seen[i].extend(out))
    with torch.no_grad():
        for block in ids:
            reference(input_ids=block[None])
    counter = counting.Counter(model, arch)
    for part in ids.split(2):
        counter.add(part)
    for layer, expert in slow.items():
        routed, over_zero = [0] * 4, [[0] * expert.width for _ in range(4)]
        for e, activation in expert.seen:
            routed[e] += 1
            over_zero[e] = [n + int(a > 0) for n, a in zip(over_zero[e], activation, strict=True)]
        assert counter.routed[layer].tolist() == routed and sum(routed) == 2 * ids.numel()
        flat = [n for row in over_zero for n in row]
        assert counter.counts[layer].tolist() == flat + [0] * (counter.counts.shape[1] - len(flat))
    for layer in dense:
        expected = (torch.cat(seen[layer]) > 0).sum(0).tolist()
        assert counter.counts[layer, :48].tolist() == expected and not counter.counts[layer, 48:].any()
        assert not counter.routed[layer].any()

    mask = {0: [0, 5, slow[0].width + 3, 3 * slow[0].width], 1: [2, 47], 2: [1]}
    found = following.Activations(model, arch, {"own": mask, "other": {2: [1, 2]}})
    for part in ids.split(2):
        found.add(part)
    means = {}
    for layer, chosen in mask.items():
        for neuron in chosen:
            if layer in dense:
                values = [float(a[neuron]) for a in torch.cat(seen[layer])]
            else:
                expert, i = divmod(neuron, slow[layer].width)
                values = [float(activation[i]) for e, activation in slow[layer].seen if e == expert]
            means[layer, neuron] = sum(values) / max(1, len(values))
    assert found.mean("own") == pytest.approx(sum(means.values()) / len(means), abs=near)
    for layer, mean in found.layer_means("own").items():
        assert mean == pytest.approx(sum(means[layer, n] for n in mask[layer]) / len(mask[layer]), abs=near)


@pytest.mark.parametrize("model_type", MOE)
def test_silenced_neurons_of_experts_give_nothing_and_come_back(model_type):
    mask = {0: [3, 30, 70], 1: [0, 47], 2: [5]}
    model, arch = model_of(model_type)
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        with activations.silenced(model, arch, mask):
            found = model(input_ids=ids).logits
        reference, slow = slow_model(model_type, mask)
        for layer in [layer for layer in mask if layer not in slow]:
            arch.module(reference, layer, "down_proj").weight.data[:, mask[layer]] = 0
        assert torch.allclose(found, reference(input_ids=ids).logits, rtol=0, atol=1e-12)
        assert not torch.allclose(found, whole)
        assert torch.equal(model(input_ids=ids).logits, whole)
        with pytest.raises(ZeroDivisionError), activations.silenced(model, arch, mask):
            raise ZeroDivisionError
    assert all(torch.equal(bits(tensor), bits(before[name])) for name, tensor in model.state_dict().items())


def test_experts_that_no_token_reaches_and_kernels_that_show_nothing():
    model, arch = model_of("mixtral")
    with torch.no_grad():
        arch.layers(model)[0].mlp.gate.weight.zero_()
    ids = torch.randint(3, 250, (1, 16), generator=torch.Generator().manual_seed(2))
    counter = counting.Counter(model, arch)
    counter.add(ids)
    assert sorted(counter.routed[0].tolist()) == [0, 0, 16, 16]  # all alike: every token goes to the same two
    unreached = int(counter.routed[0].argmin())
    found = following.Activations(model, arch, {"own": {0: [48 * unreached], 1: [1]}})
    found.add(ids)
    assert found.layer_means("own")[0] == 0 and found.mean("own") == found.layer_means("own")[1] / 2
    experts = arch.experts_module(model, 1)
    experts.forward = lambda hidden, *_: hidden
    with pytest.raises(InputError, match="cannot be read with experts_implementation"):
        counter.add(ids)


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_model_that_is_spread_over_places(model_type, tmp_path):
    """Layer 1 is on the disk between passes, as with --device-map where memory ends."""
    ref = refs.model(save_tiny(model_type, tmp_path / "model", seed=3))
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    whole, spread = (loading.load_model(ref, torch.float32, torch.device("cpu"), where) for where in (None, places))
    arch, mask = archs.for_config(whole.config), {0: [1, 2], 1: [3], 2: [4]}
    assert next(arch.layers(spread)[1].parameters()).is_meta
    ids = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(2))
    counters = [counting.Counter(model, arch) for model in (whole, spread)]
    sums = [following.Activations(model, arch, {"own": mask}) for model in (whole, spread)]
    for measured in (*counters, *sums):
        measured.add(ids)
    assert torch.equal(counters[0].counts, counters[1].counts) and sums[0].mean("own") == sums[1].mean("own")
    with torch.no_grad():
        if model_type == "mixtral":
            with pytest.raises(InputError, match="cannot be silenced"), activations.silenced(spread, arch, mask):
                pass
        else:
            with activations.silenced(whole, arch, mask), activations.silenced(spread, arch, mask):
                assert torch.equal(whole(input_ids=ids).logits, spread(input_ids=ids).logits)
        assert torch.equal(whole(input_ids=ids).logits, spread(input_ids=ids).logits)


@pytest.mark.parametrize("rows", [1, 254, 255, 256, 1100])
@pytest.mark.parametrize("width", [44, 48])
def test_active_tokens_are_counted_exactly(rows, width):
    value = torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(rows))
    value[:, 0] = 1.0  # active everywhere: the fullest byte
    value[:, 7] = 1.0
    value[0, 3] = float("nan")
    for part in (value[:, :width], value[:, width:], value[:, :width].contiguous()[None]):
        expected = (part > 0).reshape(rows, width).long().sum(0)
        assert torch.equal(counting.active_tokens(part).long(), expected)
    experts = torch.arange(rows) % 3
    chosen = experts == torch.arange(4)[:, None]
    expected = torch.stack([(value[experts == e] > 0).sum(0) for e in range(4)])
    assert torch.equal(counting.active_by_expert(value, chosen), expected)


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
    counter = counting.Counter(model, arch)
    counter.add(ids)
    slow = slow_activations(model, arch, ids)
    assert torch.equal(counter.counts, torch.stack([(x > 0).sum(0) for x in slow]))


def test_not_finite_activations_are_refused():
    model, arch = model_of("llama")
    arch.module(model, 1, "down_proj").weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        counting.Counter(model, arch).add(torch.full((1, 4), 5))
    with pytest.raises(InputError, match="not finite"):
        following.Activations(model, arch, {"own": {2: [1]}}).add(torch.full((1, 4), 5))


def test_blocks():
    ids = torch.arange(100, dtype=torch.int32)
    assert ffn.blocks(ids, 16, 10**9).shape == (6, 16)
    assert ffn.blocks(ids, 16, 40).flatten().tolist() == list(range(32))
    with pytest.raises(InputError, match="fewer than one block of 128"):
        ffn.blocks(ids, 128, 10**9)
    config = {"model_type": "qwen2", "max_position_embeddings": 32768}
    assert ffn.block_size(config) == 2048
    assert ffn.block_size(config, "llama") == 4096
    assert ffn.block_size({"model_type": "llama", "max_position_embeddings": 2048}) == 2048
    assert ffn.block_size({"model_type": "gpt2", "n_positions": 1024}, "qwen") == 1024
    assert ffn.block_size(config, given=64) == 64
    with pytest.raises(InputError, match="exceeds the model's 2048"):
        ffn.block_size({"model_type": "llama", "max_position_embeddings": 2048}, given=4096)
