"""Traces read, edit, stop and are removed; pooled states equal a mean over `output_hidden_states`."""

import pytest
import torch
from helpers import ARCHITECTURES, tiny_model

from cpt_utils.architectures.archs import for_config
from cpt_utils.base.errors import InputError
from cpt_utils.models import batching
from cpt_utils.models.batching import batches, for_each, padded
from cpt_utils.models.states import pooled_states
from cpt_utils.models.trace import StopForward, trace, untuple

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
    # Gemma 2 has eager attention only: its softmax is in float32 whatever the model's dtype, and in float64 it makes
    # NaN of a row that sees padding alone (left padding).
    exact = model_type != "gemma2"
    model = tiny_model(model_type, dtype="float64" if exact else "float32")
    ids, mask = padded(SEQUENCES, pad=0, side=side)
    pooled = pooled_states(model, for_config(model.config), ids, mask).mean
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
    plain = pooled_states(model, arch, ids, mask).mean

    def unpack(_module, args, kwargs):
        return tuple(untuple(a) for a in args[:1]) + args[1:], kwargs

    modules = [*arch.layers(model), arch.last(model)]
    for module in modules[1:]:
        module.register_forward_pre_hook(unpack, with_kwargs=True)
    for module in modules[:-1]:
        module.register_forward_hook(lambda _module, _args, output: (output, None))
    assert torch.equal(pooled_states(model, arch, ids, mask).mean, plain)
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
    torch.testing.assert_close(pooled_states(model, arch, ids, mask, keep).mean, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_padding_positions_hold_does_not_matter(bad):
    model = tiny_model("llama")
    arch = for_config(model.config)
    ids, mask = padded(SEQUENCES, pad=0)
    expected = pooled_states(model, arch, ids, mask).mean

    def spoil(_module, _args, output):
        return output.masked_fill(mask[:, :, None] == 0, bad)

    handle = model.model.norm.register_forward_hook(spoil)
    torch.testing.assert_close(pooled_states(model, arch, ids, mask).mean, expected, rtol=1e-6, atol=1e-7)
    handle.remove()
    with torch.no_grad():
        model.model.embed_tokens.weight[17] = bad  # of a token that counts
    assert not torch.isfinite(pooled_states(model, arch, ids, mask).mean[0, 0]).all()


def test_hooks_are_removed_also_when_the_forward_fails():
    model = tiny_model("llama")

    def broken(_):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), trace((model.model.norm, "output", broken)):
        model(torch.tensor([[1, 2]]))
    assert not model.model.norm._forward_hooks
    model(torch.tensor([[1, 2]]))


def test_what_goes_in_or_comes_out_is_read_edited_or_the_end():
    """Against the same done by hand: the model's own modules, one after the other."""
    model, ids = tiny_model("llama", dtype="float64"), torch.tensor([[1, 2, 3]])
    layer, seen, whole = model.model.layers[1], [], model(ids).logits

    def halved(hidden):
        return hidden / 2

    with trace((layer, "input", lambda hidden: seen.append(hidden.clone())), (layer, "inputs", seen.append)):
        assert torch.equal(model(ids).logits, whole)
    assert torch.equal(seen[0], seen[1][0])
    with trace((layer.mlp, "output", halved), (layer.mlp, "input", halved)):
        edited = model(ids).logits
    mlp = layer.mlp.forward
    layer.mlp.forward = lambda hidden: mlp(hidden / 2) / 2
    assert torch.equal(model(ids).logits, edited) and not torch.equal(edited, whole)
    del layer.mlp.forward
    # Attention gives a tuple, and gets its hidden states as a keyword.
    with trace((layer.self_attn, "output", halved), (layer.self_attn, "input", halved)):
        edited = model(ids).logits
    attention = layer.self_attn.forward

    def by_hand(hidden_states, **kwargs):
        found, weights = attention(hidden_states / 2, **kwargs)
        return found / 2, weights

    layer.self_attn.forward = by_hand
    assert torch.equal(model(ids).logits, edited) and not torch.equal(edited, whole)
    del layer.self_attn.forward

    def enough(_hidden):
        raise StopForward

    ran = []
    with trace((layer, "output", enough), (model.model.layers[2], "input", ran.append)):
        model(ids)
        ran.append("after the pass")
    assert not ran and torch.equal(model(ids).logits, whole)


def test_a_side_that_no_module_has_is_refused_and_leaves_no_hook():
    module = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no side 'ouput'"), trace((module, "input", print), (module, "ouput", print)):
        pass
    assert not module._forward_pre_hooks and not module._forward_hooks


def test_batches_cover_every_sequence_once_longest_first():
    lengths = [3, 9, 1, 9, 4]
    assert batches(lengths, 2) == [[1, 3], [4, 0], [2]]
    assert batches(lengths, 100) == [[1, 3, 4, 0, 2]]


def test_batches_by_tokens_hold_as_many_as_fit():
    lengths = [3, 9, 1, 9, 4, 30]
    assert batches(lengths, tokens=18) == [[5], [1, 3], [4, 0, 2]]  # a longer sequence alone
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (300,), generator=generator).tolist()
    plan = batches(lengths, tokens=512)
    assert sorted(i for rows in plan for i in rows) == list(range(300))
    sizes = [len(rows) * max(lengths[i] for i in rows) for rows in plan]
    assert max(sizes) <= 512
    assert sum(sizes) < 1.1 * sum(lengths)


class Card:
    """A device with memory for `room` tokens a batch, as `for_each` sees it; notes what went through."""

    def __init__(self, lengths, room, error=None):
        self.lengths, self.room, self.went, self.failed = lengths, room, [], 0
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def step(self, rows):
        if len(rows) * max(self.lengths[i] for i in rows) > self.room:
            self.failed += 1
            raise self.error
        self.went.append(rows)


@pytest.mark.parametrize("batch_size", [None, 64])
@pytest.mark.parametrize("room", [60, 100, 700, 5000])
def test_where_memory_ends_batches_are_halved_and_that_is_remembered(room, batch_size, capsys):
    model = torch.nn.Linear(1, 1)
    lengths = torch.randint(1, 60, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    card = Card(lengths, room)
    for_each(model, "states", lengths, card.step, batch_size)
    assert sorted(i for rows in card.went for i in rows) == list(range(200))
    assert bool(card.failed) == (room < (2048 if batch_size is None else 64 * 59))
    again = Card(lengths, room)
    for_each(model, "states", lengths, again.step, batch_size)
    assert not again.failed
    assert ("do not fit into memory" in capsys.readouterr().err) == (bool(card.failed) and batch_size is not None)


def test_one_sequence_too_long_for_the_memory_is_one_line():
    model = tiny_model("llama")
    with pytest.raises(InputError, match="a sequence of 50 tokens does not fit into the memory of cpu"):
        for_each(model, "states", [50, 3], Card([50, 3], 40).step)
    with pytest.raises(RuntimeError, match="shapes"):
        for_each(model, "states", [50, 3], Card([50, 3], 40, RuntimeError("shapes differ")).step)


def test_a_gpu_is_measured_in_the_first_batch(monkeypatch):
    """A GPU of 8000 bytes of free memory whose steps take 2 bytes a token: SHARE of it is 2400 tokens."""

    class Memory(batching._Memory):
        def __init__(self, model):
            self.gpus, self.before = ["gpu"], [500]

        def taken(self, gpu, start=False):
            return 500 + 2 * len(card.went[-1]) * max(card.lengths[i] for i in card.went[-1])

        def free(self, gpu):
            return 8000

    monkeypatch.setattr(batching, "_Memory", Memory)
    model, card = torch.nn.Linear(1, 1), Card([10] * 1000, 10**9)
    for _ in range(2):
        for_each(model, "states", card.lengths, card.step)
    assert [len(rows) for rows in card.went] == [204, 240, 240, 240, 76, 240, 240, 240, 240, 40]
    assert sorted(i for rows in card.went[:5] for i in rows) == list(range(1000))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_states_do_not_depend_on_the_budget(model_type, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    sequences = [torch.randint(3, 259, (n,), generator=generator).tolist() for n in range(1, 60)]
    found = []
    for tokens in (16, 100, 2048):
        monkeypatch.setattr(batching, "TOKENS", tokens)
        model, states = tiny_model(model_type), torch.empty(4, len(sequences), 32)

        def step(rows, model=model, states=states):
            ids, mask = padded([sequences[i] for i in rows], 0)
            states[:, rows] = pooled_states(model, for_config(model.config), ids, mask).mean

        for_each(model, "states", [len(s) for s in sequences], step)
        found.append(states)
    for other in found[1:]:
        assert float((other - found[0]).abs().max() / found[0].abs().max()) < 1e-6
