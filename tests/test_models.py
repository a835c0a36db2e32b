"""Strict loading on ten architectures, and scores against loops over tokens."""

import contextlib
import json
import math
import sys

import pytest
import torch
from helpers import ARCHITECTURES, save_tiny, tiny_model, tiny_tokenizer

from cpt_utils.architectures import archs
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs, tokenization
from cpt_utils.models import loading, scoring, states
from cpt_utils.models.batching import padded

CPU = torch.device("cpu")
TEXTS = ["a cat sat", "dearg", "seven birds sing loud today", "b c"]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_folder_loads_as_the_model_that_wrote_it(model_type, tmp_path):
    folder = save_tiny(model_type, tmp_path / "m", seed=3)
    loaded = loading.load_model(refs.model(folder), torch.float32, CPU)
    ids = torch.tensor([[5, 9, 17]])
    assert torch.equal(loaded(ids).logits, tiny_model(model_type, seed=3)(ids).logits)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_a_wrong_shape_is_refused(tmp_path):
    folder = save_tiny("llama", tmp_path / "m")
    config = (folder / "config.json").read_text().replace('"intermediate_size": 48', '"intermediate_size": 64')
    (folder / "config.json").write_text(config)
    with pytest.raises(InputError, match="m"):
        loading.load_model(refs.model(folder), torch.float32, CPU)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rms_norm_eps": "x"}, r"config.json cannot be loaded: Validation error for field 'rms_norm_eps'.*'x'"),
        ({"layer_types": ["full_attention"]}, "config.json cannot be loaded: .*layer_types"),
        ({"num_hidden_layers": [3]}, r"num_hidden_layers is \[3\], where one number is needed"),
        ({"max_position_embeddings": "4k"}, "max_position_embeddings is 4k, which cannot be a size of a model"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\], which no model has"),
        ({"text_config": 5}, "text_config is 5, which no model has"),
    ],
)
def test_a_damaged_configuration_is_what_is_named(tmp_path, change, said):
    """And not the tokenizer, whose class transformers finds through it."""
    folder = save_tiny("llama", tmp_path / "m")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=said):
        archs.for_config(refs.model(folder).config()).n_layers(refs.model(folder).config())
        tokenization.open_tokenizer(folder)


SPREAD = {
    "cpu": {"": "cpu"},
    "disk": {
        "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu",
        "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk",
    },
    "embeddings on disk": {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu",
                           "model.rotary_emb": "cpu", "lm_head": "cpu"},
}  # fmt: skip


@pytest.mark.parametrize("place", SPREAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_is_spread_computes_the_same(place, dtype, tmp_path, capsys):
    """The disk stands for what a second GPU is: layers that are elsewhere, and brought together by accelerate."""
    ref = refs.model(save_tiny("llama", tmp_path / "m", seed=3))
    whole, spread = (loading.load_model(ref, dtype, CPU, device_map) for device_map in (None, SPREAD[place]))
    assert any(p.is_meta for p in spread.parameters()) == ("disk" in place)
    assert loading.input_device(spread) == CPU
    ids, mask = padded([[5, 9, 17, 40, 3], [7, 8]], 0)
    arch = archs.for_config(whole.config)
    one, other = (states.pooled_states(model, arch, ids, mask).mean for model in (whole, spread))
    assert torch.equal(one, other)
    assert scoring.text_nlls(whole, tiny_tokenizer(), TEXTS) == scoring.text_nlls(spread, tiny_tokenizer(), TEXTS)
    loading.announce(spread, ref)
    assert ("read from disk" in capsys.readouterr().err) == ("disk" in place)


def test_a_missing_tensor_is_refused_when_spread_too(tmp_path):
    from safetensors.torch import load_file, save_file

    path = save_tiny("llama", tmp_path / "m") / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"the checkpoint lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        loading.load_model(refs.model(tmp_path / "m"), torch.float32, CPU, "auto")


@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_model_folder_is_never_run(tmp_path, known):
    """A folder whose configuration and tokenizer point to Python files: ignored for a known type, else refused."""
    folder, trace = save_tiny("llama", tmp_path / "m"), tmp_path / "was-run"
    (folder / "custom.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Custom: pass\n")
    classes = {"AutoConfig": "custom.Custom", "AutoModelForCausalLM": "custom.Custom"}
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": classes}
    config |= {} if known else {"model_type": "custom"}
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["custom.Custom", "custom.Custom"]}, "tokenizer_class": "Custom"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ref = refs.model(folder)
    with contextlib.suppress(InputError):
        tokenization.load_tokenizer(ref)
    if known:
        loading.load_model(ref, torch.float32, CPU)
        loading.load_untrained(ref, torch.float32, CPU, seed=0)
    else:
        with pytest.raises(InputError, match="cannot be loaded"):
            loading.load_model(ref, torch.float32, CPU)
    assert not trace.exists() and "custom" not in sys.modules


def test_an_untrained_model_is_seeded_and_leaves_the_random_state_alone(tmp_path):
    ref = refs.model(save_tiny("llama", tmp_path / "m"))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two = (loading.load_untrained(ref, torch.float32, CPU, seed=1) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    weight = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one.state_dict()[weight], two.state_dict()[weight])
    assert not torch.equal(
        one.state_dict()[weight], loading.load_untrained(ref, torch.float32, CPU, seed=2).state_dict()[weight]
    )


def test_a_tokenizer_without_pad_token_pads_with_eos_else_unk(tmp_path):
    folder = save_tiny("llama", tmp_path / "m")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert tokenization.load_tokenizer(refs.model(folder)).pad_token == "</s>"
    tokenizer.eos_token = None
    tokenizer.unk_token = "a"
    tokenizer.save_pretrained(folder)
    assert tokenization.load_tokenizer(refs.model(folder)).pad_token == "a"


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "cohere", "granite"])
def test_nll_equals_the_loop_over_tokens(model_type):
    model, tokenizer = tiny_model(model_type, dtype="float64"), tiny_tokenizer()
    expected = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0]
        expected.append(-sum(float(logits[i].log_softmax(-1)[ids[i + 1]]) for i in range(len(ids) - 1)))
    for batch_size in (1, 3, None):
        scores = scoring.text_nlls(model, tokenizer, TEXTS, batch_size)
        # Gemma 2 takes its softmax in float32, whatever the dtype.
        assert [s.nll for s in scores] == pytest.approx(expected, rel=1e-7 if model_type == "gemma2" else 1e-12)
    assert [s.tokens for s in scores] == [len(tokenizer(t)["input_ids"]) - 1 for t in TEXTS]
    assert [s.bytes for s in scores] == [len(text.encode()) for text in TEXTS]


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


def test_what_all_contexts_begin_with_is_read_once(monkeypatch):
    model, tokenizer = tiny_model("llama", dtype="float64"), tiny_tokenizer()
    contexts = [f"{'shots that all have in common ' * 3}{own}" for own in ("cat", "a dog", "x")]
    read = []
    model.register_forward_pre_hook(lambda _, args, given: read.append(given["input_ids"].numel()), with_kwargs=True)
    scores = scoring.text_nlls(model, tokenizer, TEXTS[:3], None, contexts)
    kept = sum(read)
    monkeypatch.setattr(scoring, "_read_once", lambda *_: None)
    read.clear()
    whole = scoring.text_nlls(model, tokenizer, TEXTS[:3], None, contexts)
    assert kept < sum(read) / 2
    for ours, theirs in zip(scores, whole, strict=True):
        assert math.isclose(ours.nll, theirs.nll, rel_tol=1e-12) and ours.tokens == theirs.tokens


def test_a_beginning_whose_keys_depend_on_what_follows_is_not_read_alone():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 5.0, 9.0]}
    sequences = [list(range(3, 40)) + end for end in ([9, 17, 40, 3], [30, 31, 32])]
    for more, alone in (({"rope_parameters": rope, "original_max_position_embeddings": 38}, False), ({}, True)):
        model = tiny_model("phi3", **more)
        assert (scoring._read_once(model, sequences, 30) is not None) == alone


def test_what_is_cut_off_counts_nowhere(capsys):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    short, long = scoring.text_nlls(model, tokenizer, ["ab " * 170, "ab " * 1000])
    assert long.tokens == 511 and long.bytes == 511
    assert abs(long.nll / long.bytes - short.nll / short.bytes) < 0.1
    assert "longer than the model's 512 positions" in capsys.readouterr().err


def test_choices_equal_the_loop_over_tokens():
    model, tokenizer = tiny_model("llama", dtype="float64"), tiny_tokenizer()
    prompts, choices = ["The category is:", "x"], ["sports", "sport", "science/technology", "s", "science"]
    read = []
    model.model.register_forward_pre_hook(lambda _, _args, given: read.append(given["input_ids"]), with_kwargs=True)
    found = scoring.choice_logliks(model, tokenizer, prompts, [choices] * 2, batch_size=3)
    assert sum(map(len, read)) == 4  # those of sports and science/technology hold all others
    for row, prompt in zip(found, prompts, strict=True):
        for value, choice in zip(row, choices, strict=True):
            start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(f"{prompt} {choice}")["input_ids"]
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0]
            slow = sum(float(logits[i - 1].log_softmax(-1)[ids[i]]) for i in range(start, len(ids)))
            assert math.isclose(value, slow, rel_tol=1e-12)


def test_too_long_a_prompt_loses_its_beginning_for_each_choice_by_itself():
    model, tokenizer = tiny_model("llama", dtype="float64"), tiny_tokenizer()
    prompt, choices = "ab cd " * 90, ["sports", "science/technology", "s"]
    (found,) = scoring.choice_logliks(model, tokenizer, [prompt], [choices])
    for value, choice in zip(found, choices, strict=True):
        start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(f"{prompt} {choice}")["input_ids"]
        assert len(ids) > 513
        with torch.inference_mode():
            logits = model(torch.tensor([ids[:-1][-512:]])).logits[0]
        ends = [(start - len(ids) + i, id) for i, id in enumerate(ids[start:])]
        assert math.isclose(value, sum(float(logits[at].log_softmax(-1)[id]) for at, id in ends), rel_tol=1e-12)
    with pytest.raises(InputError, match="no token is read before the choice 'ab ab"):
        scoring.choice_logliks(model, tokenizer, ["x"], [["ab " * 600]])


def test_the_head_runs_where_it_is_needed():
    """One row for two choices of one token after one prompt, whatever the length of the prompt."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    rows = []
    model.lm_head.register_forward_hook(lambda _module, args, _output: rows.append(args[0].shape[:-1].numel()))
    prompts, choices = ["long " * 20, "x"], ["sports", "travel"]
    scoring.choice_logliks(model, tokenizer, prompts, [choices] * 2)
    expected = sum(
        len(tokenizer(f"{p} {c}")["input_ids"]) - len(tokenizer(p)["input_ids"]) for p in prompts for c in choices
    )
    assert sum(rows) == expected < 40
    assert not model.lm_head._forward_pre_hooks


def test_texts_too_short_to_score_are_refused():
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    with pytest.raises(InputError, match="no text"):
        scoring.text_nlls(model, tokenizer, [])
    with pytest.raises(InputError, match="fewer than two tokens"):
        scoring.text_nlls(model, tokenizer, [""])


def test_a_mixture_of_experts_runs_in_float64(tmp_path):
    ref = refs.model(save_tiny("mixtral", tmp_path / "m"))
    ids = torch.tensor([[5, 9, 17]])
    wide = loading.load_model(ref, torch.float64, CPU)(ids).logits
    assert torch.allclose(wide.float(), loading.load_model(ref, torch.float32, CPU)(ids).logits, atol=1e-5)
    assert loading.load_untrained(ref, torch.float64, CPU, seed=1)(ids).logits.dtype == torch.float64


def test_a_sentencepiece_model_alone_names_what_reads_it(tmp_path, monkeypatch):
    """transformers asks for tiktoken there, which does not read it. The packages are absent, one by one."""
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 272}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    for name in tokenization.SENTENCEPIECE:
        piece = folder / name
        piece.write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
        for absent in ({"sentencepiece", "google.protobuf"}, {"google.protobuf"}, {"sentencepiece"}):
            monkeypatch.setattr(tokenization, "_installed", lambda module, absent=absent: module not in absent)
            named = " and ".join(package for package, module in tokenization.READERS.items() if module in absent)
            message = (
                rf"{name} is a SentencePiece model without tokenizer.json, which needs sentencepiece and protobuf "
                rf"\({named} not installed\); pip install sentencepiece protobuf, or put the tokenizer.json"
            )
            with pytest.raises(InputError, match=message) as error:
                tokenization.open_tokenizer(folder)
            assert "\n" not in str(error.value)
        piece.unlink()
    piece = folder / "tokenizer.model"
    for content, there in ((b"\n\x0e\n\x05<unk>\x15\x00", True), (b"IQ== 0\nIg== one\n", False)):
        # A stump of a model with both packages, a file as tiktoken writes without them: transformers has its say.
        piece.write_bytes(content)
        monkeypatch.setattr(tokenization, "_installed", lambda module, there=there: there)
        with pytest.raises(InputError, match="cannot be loaded"):
            tokenization.open_tokenizer(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(b"\x00")
    assert len(tokenization.open_tokenizer(folder)) == 259  # tokenizer.json is read first


def test_installed_packages_are_found_by_their_modules():
    assert tokenization._installed("json") and tokenization._installed("importlib.util")
    assert not tokenization._installed("no_such_package_of_ours") and not tokenization._installed(
        "no_such_package.of_ours"
    )


def test_special_tokens_in_a_text_are_scored_as_text():
    """By bytes: what stands in a text is its letters, in the text, its context and a prompt."""
    model, tokenizer = tiny_model("llama", seed=1), tiny_tokenizer()
    byte_ids = {letter: i for letter, i in tokenizer.get_vocab().items() if len(letter) == 1}
    ids = [tokenizer.bos_token_id, *(byte_ids[letter] for letter in "</s>Ġ<pad>x")]
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    own = [-float(logs[at - 1, ids[at]]) for at in range(1, len(ids))]
    (whole,) = scoring.text_nlls(model, tokenizer, ["</s> <pad>x"])
    assert whole.tokens == len(own) and whole.nll == pytest.approx(sum(own), abs=1e-4)
    (part,) = scoring.text_nlls(model, tokenizer, ["<pad>x"], contexts=["</s>"])
    assert part.tokens == 7 and part.nll == pytest.approx(sum(own[4:]), abs=1e-4)
    ((choice,),) = scoring.choice_logliks(model, tokenizer, ["</s>"], [["<pad>x"]])
    assert choice == pytest.approx(-sum(own[4:]), abs=1e-4)
