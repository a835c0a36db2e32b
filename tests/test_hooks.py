"""Hooks are removed, outputs untupled, and pooled states equal a mean over `output_hidden_states`."""

import pytest
import torch
from helpers import ARCHITECTURES, tiny_model

from cpt_utils.archs import for_config
from cpt_utils.batching import batches, padded
from cpt_utils.errors import InputError
from cpt_utils.hooks import hooked, pooled_states, submodule, untuple

SEQUENCES = [[5, 9, 17, 40, 3], [7, 8], [30, 31, 32, 33, 34, 35, 36, 37], [250]]


def slow_pooled(model, sequences):
    """One sequence at a time, no padding, hidden states as transformers returns them: [L+1, sequences, hidden]."""
    columns = []
    for ids in sequences:
        with torch.inference_mode():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        columns.append(torch.stack([state[0].mean(0) for state in states]))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_pooled_states_equal_the_loop_over_sentences(model_type, side):
    # Gemma 2 has eager attention only, which in float64 makes NaN of a row that sees padding alone (left padding).
    exact = (model_type, side) != ("gemma2", "left")
    model = tiny_model(model_type, dtype="float64" if exact else "float32")
    ids, mask = padded(SEQUENCES, pad=0, side=side)
    pooled = pooled_states(model, for_config(model.config), ids, mask)
    slow = slow_pooled(model, SEQUENCES)
    assert pooled.shape == slow.shape == (model.config.num_hidden_layers + 1, len(SEQUENCES), 32)
    tolerance = 1e-10 if exact else 1e-5
    torch.testing.assert_close(pooled, slow, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_layers_that_return_tuples_are_pooled_like_those_that_return_tensors(model_type):
    """Layers of earlier transformers releases, and of Bloom, return tuples; here every layer of a model is made to."""
    model = tiny_model(model_type, dtype="float64")
    arch = for_config(model.config)
    ids, mask = padded(SEQUENCES, pad=0)
    plain = pooled_states(model, arch, ids, mask)

    def unpack(_module, args, kwargs):
        return tuple(untuple(a) for a in args[:1]) + args[1:], kwargs

    modules = [*arch.layers(model), arch.final_norm(model)]
    for module in modules[1:]:
        module.register_forward_pre_hook(unpack, with_kwargs=True)
    for module in modules[:-1]:
        module.register_forward_hook(lambda _module, _args, output: (output, None))
    assert torch.equal(pooled_states(model, arch, ids, mask), plain)
    assert untuple((1, 2)) == 1 and untuple([3]) == 3


def test_only_the_kept_tokens_enter_the_mean():
    model = tiny_model("qwen2", dtype="float64")
    arch = for_config(model.config)
    ids, mask = padded(SEQUENCES[:1], pad=0)
    keep = mask.clone()
    keep[:, 0] = 0
    with torch.inference_mode():
        states = model(ids, output_hidden_states=True).hidden_states
    expected = torch.stack([state[:, 1:].mean(1) for state in states])
    torch.testing.assert_close(pooled_states(model, arch, ids, mask, keep), expected)


def test_hooks_are_removed_also_when_the_forward_fails():
    model = tiny_model("llama")

    def broken(_):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), hooked((model.model.norm, "output", broken)):
        model(torch.tensor([[1, 2]]))
    assert not model.model.norm._forward_hooks
    model(torch.tensor([[1, 2]]))


def test_a_module_that_is_not_there_is_named_with_its_neighbours():
    with pytest.raises(InputError, match=r"no module model\.layers\.0\.mlp\.gate_pro;.*gate_proj"):
        submodule(tiny_model("llama"), "model.layers.0.mlp.gate_pro")


def test_batches_cover_every_sequence_once_longest_first():
    lengths = [3, 9, 1, 9, 4]
    assert batches(lengths, 2) == [[1, 3], [4, 0], [2]]
    assert batches(lengths, 100) == [[1, 3, 4, 0, 2]]
