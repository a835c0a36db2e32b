"""Strict loading on ten architectures, and scores against loops over tokens."""

import math

import pytest
import torch
from helpers import ARCHITECTURES, save_tiny, tiny_model, tiny_tokenizer

from cpt_utils import models, refs, scoring
from cpt_utils.errors import InputError

CPU = torch.device("cpu")
TEXTS = ["a cat sat", "dearg", "seven birds sing loud today", "b c"]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_folder_loads_as_the_model_that_wrote_it(model_type, tmp_path):
    folder = save_tiny(model_type, tmp_path / "m", seed=3)
    loaded = models.load_model(refs.model(folder), torch.float32, CPU)
    ids = torch.tensor([[5, 9, 17]])
    assert torch.equal(loaded(ids).logits, tiny_model(model_type, seed=3)(ids).logits)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_a_wrong_shape_is_refused(tmp_path):
    folder = save_tiny("llama", tmp_path / "m")
    config = (folder / "config.json").read_text().replace('"intermediate_size": 48', '"intermediate_size": 64')
    (folder / "config.json").write_text(config)
    with pytest.raises(InputError, match="m"):
        models.load_model(refs.model(folder), torch.float32, CPU)


def test_an_untrained_model_is_seeded_and_leaves_the_random_state_alone(tmp_path):
    ref = refs.model(save_tiny("llama", tmp_path / "m"))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two = (models.load_untrained(ref, torch.float32, CPU, seed=1) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    weight = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one.state_dict()[weight], two.state_dict()[weight])
    assert not torch.equal(
        one.state_dict()[weight], models.load_untrained(ref, torch.float32, CPU, seed=2).state_dict()[weight]
    )


def test_a_tokenizer_without_pad_token_pads_with_eos_else_unk(tmp_path):
    folder = save_tiny("llama", tmp_path / "m")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert models.load_tokenizer(refs.model(folder)).pad_token == "</s>"
    tokenizer.eos_token = None
    tokenizer.unk_token = "a"
    tokenizer.save_pretrained(folder)
    assert models.load_tokenizer(refs.model(folder)).pad_token == "a"


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_nll_equals_the_loop_over_tokens(model_type):
    model, tokenizer = tiny_model(model_type, dtype="float64"), tiny_tokenizer()
    expected = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0]
        expected.append(-sum(float(logits[i].log_softmax(-1)[ids[i + 1]]) for i in range(len(ids) - 1)))
    for batch_size in (1, 3):
        scores = scoring.text_nlls(model, tokenizer, TEXTS, batch_size)
        assert [s.nll for s in scores] == pytest.approx(expected, rel=1e-12)
    total = scoring.mean_nll(model, tokenizer, TEXTS)
    assert total.tokens == sum(len(tokenizer(t)["input_ids"]) - 1 for t in TEXTS)
    assert total.per_word == pytest.approx(sum(expected) / 11)
    assert total.per_byte == pytest.approx(sum(expected) / sum(map(len, TEXTS)))


def test_a_context_is_read_and_not_scored():
    model, tokenizer = tiny_model("llama", dtype="float64"), tiny_tokenizer()
    contexts = ["an cat", "", "x"]
    scores = scoring.text_nlls(model, tokenizer, TEXTS[:3], 2, contexts)
    for score, context, text in zip(scores, contexts, TEXTS, strict=False):
        start = len(tokenizer(context)["input_ids"]) if context else 1
        ids = tokenizer(f"{context} {text}" if context else text)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0]
        slow = -sum(float(logits[i - 1].log_softmax(-1)[ids[i]]) for i in range(start, len(ids)))
        assert math.isclose(score.nll, slow, rel_tol=1e-12) and score.tokens == len(ids) - start
        assert score.bytes == len(text)


def test_what_is_cut_off_counts_nowhere(capsys):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    short, long = scoring.text_nlls(model, tokenizer, ["ab " * 170, "ab " * 1000])
    assert long.tokens == 511 and long.bytes == 511 and long.words == 171
    assert abs(long.per_byte - short.per_byte) < 0.1
    assert "longer than the model's 512 positions" in capsys.readouterr().err


def test_choices_equal_the_loop_over_tokens():
    model, tokenizer = tiny_model("llama", dtype="float64"), tiny_tokenizer()
    prompts, choices = ["The category is:", "x"], ["sports", "science/technology"]
    found = scoring.choice_logliks(model, tokenizer, prompts, choices, batch_size=3)
    for row, prompt in zip(found, prompts, strict=True):
        for value, choice in zip(row, choices, strict=True):
            start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(f"{prompt} {choice}")["input_ids"]
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0]
            slow = sum(float(logits[i - 1].log_softmax(-1)[ids[i]]) for i in range(start, len(ids)))
            assert math.isclose(value, slow, rel_tol=1e-12)


def test_texts_too_short_to_score_are_refused():
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    with pytest.raises(InputError, match="no text"):
        scoring.text_nlls(model, tokenizer, [])
    with pytest.raises(InputError, match="fewer than two tokens"):
        scoring.text_nlls(model, tokenizer, [""])
