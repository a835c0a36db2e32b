"""Adapters as PEFT itself writes them: every bit is that of `merge_and_unload().save_pretrained()`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import read_tensors, save_tiny, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import identity, opening, refs
from cpt_utils.interventions import in_memory, on_disk, surgery
from cpt_utils.models import loading

pytestmark = pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers|checkpointing|tied)")
BOTH = ["embed_tokens", "lm_head"]
CPU = torch.device("cpu")


def trained(
    base: Path, rows: int | None = None, save=None, seed=1, dtype=torch.bfloat16, **settings
) -> tuple[Path, Path]:
    """(an adapter, the merged model) of `base`, its vocabulary resized to `rows`, both as PEFT saves them."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if rows:
        model.resize_token_embeddings(rows)
    given = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"} | settings
    model = peft.get_peft_model(model, peft.LoraConfig(**given))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    adapter, merged = base.with_name("adapter"), base.with_name("merged")
    for folder in (adapter, merged):
        shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(adapter, **(save or {}))
    model.merge_and_unload().save_pretrained(merged)
    return adapter, merged


def assert_same(adapter: Path, merged: Path) -> None:
    """Names, bits, dtypes and configuration of every tensor, however they are read, and the loaded models."""
    truth = read_tensors(merged)
    with opening.open_folder(adapter) as stored:
        assert sorted(stored.names()) == sorted(truth)
        for name, tensor in truth.items():
            found = stored.get(name)
            assert found.dtype == stored.dtype(name) == tensor.dtype and stored.shape(name) == tuple(tensor.shape), name
            assert torch.equal(found, tensor), name
            assert name in stored and stored.shard_of(name) in stored.files
            rows = len(tensor)
            for start, stop in ((0, 1), (rows // 2, rows), (rows - 1, rows + 5)):
                assert torch.equal(stored.rows(name, start, stop), tensor[start:stop])
    config = json.loads((merged / "config.json").read_text())
    own = refs.model(adapter).config()
    assert identity.vocabulary_size(own) == identity.vocabulary_size(config)
    assert own["tie_word_embeddings"] == config["tie_word_embeddings"]
    ours, wanted = (loading.load_model(refs.model(f), torch.float32, CPU) for f in (adapter, merged))
    ids = torch.tensor([[1, 5, 7, 263]])
    assert torch.equal(ours(ids).logits, wanted(ids).logits)
    assert ours.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [None, 300])
@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "rank_pattern": {"layers.1.mlp.up_proj": 2}, "alpha_pattern": {"q_proj": 5}},
        {"modules_to_save": BOTH},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["model.embed_tokens", "input_layernorm"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", *BOTH]},
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", *BOTH], "ensure_weight_tying": True, "use_rslora": True},
        {"trainable_token_indices": [263, 5]},
        {"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [7]}},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_a_vocabulary_as_it_was_and_extended(tmp_path, settings, rows, tied):
    base = save_tiny("llama", tmp_path / "base", dtype="bfloat16", tie_word_embeddings=tied, tokenizer=False)
    adapter, merged = trained(base, rows, **json.loads(json.dumps(settings)))  # PEFT writes into lists it is given
    assert_same(adapter, merged)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("rows", "save", "names"),
    [
        (None, "auto", {"lm_head.weight", "model.embed_tokens.weight"}),
        (300, False, {"lm_head.weight", "model.embed_tokens.weight"}),
        (264, False, {"lm_head.weight", "model.embed_tokens.weight"}),
        (
            300,
            "auto",
            {f"{module}.{kind}weight" for module in ("lm_head", "model.embed_tokens") for kind in
             ("", "modules_to_save.", "original_module.")},
        ),
    ],
)  # fmt: skip
def test_the_three_ways_of_writing_modules_trained_whole(tmp_path, rows, save, names, tied):
    base = save_tiny("llama", tmp_path / "base", dtype="bfloat16", tie_word_embeddings=tied, tokenizer=False)
    adapter, merged = trained(base, rows, {"save_embedding_layers": save}, modules_to_save=list(BOTH))
    own = {name.removeprefix("base_model.model.") for name in load_file(adapter / "adapter_model.safetensors")}
    assert {name for name in own if ".layers." not in name} == names
    assert_same(adapter, merged)


@pytest.mark.parametrize(
    ("model_type", "embeddings", "linear", "more"),
    [
        ("gpt2", "wte", ["c_attn", "c_proj"], {"fan_in_fan_out": True}),
        ("gpt_neox", "embed_in", ["query_key_value", "dense_4h_to_h"], {}),
        ("opt", "embed_tokens", ["q_proj", "fc1"], {"bias": "lora_only"}),
        ("gemma3", "embed_tokens", r".*\.(q_proj|v_proj|out_proj|fc1|gate_proj)", {}),
    ],
)
def test_other_architectures(tmp_path, model_type, embeddings, linear, more):
    """Fused and transposed weights, other names, a tied head of another name, products on a vision tower."""
    base = save_tiny(model_type, tmp_path / "base", dtype="bfloat16", tokenizer=False)
    assert_same(*trained(base, target_modules=linear, **more))
    assert_same(*trained(base, 300, target_modules=linear, modules_to_save=[embeddings, "lm_head"], **more))
    if model_type != "gemma3":
        assert_same(*trained(base, 300, target_modules=linear, trainable_token_indices={embeddings: [299, 3]}, **more))
    held = read_tensors(base)
    assert any(name.startswith("vision_tower") for name in held) == (model_type == "gemma3")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(tmp_path, dtype):
    """The base's dtype is that of the merged model; half-precision adapters are read as PEFT loads them."""
    base = save_tiny("llama", tmp_path / "base", dtype=dtype, tokenizer=False)
    assert_same(*trained(base, target_modules=["down_proj", *BOTH], dtype=getattr(torch, dtype)))


def test_a_swap_into_an_adapter_equals_a_swap_into_the_merged_model(tmp_path, capsys):
    for tied in (True, False):
        base = save_tiny("llama", tmp_path / f"{tied}/base", dtype="bfloat16", tie_word_embeddings=tied)
        adapter, merged = trained(base, 300, modules_to_save=list(BOTH))
        written = []
        for folder in (adapter, merged):
            tiny_tokenizer().save_pretrained(folder)
            out = tmp_path / f"{tied}/swap-{folder.name}"
            with surgery.Pair(refs.model(base), refs.model(folder)) as pair:
                on_disk.write_model(pair, surgery.layers_from_base(pair, [1]), out)
            written.append(read_tensors(out))
            assert not any(path.name.startswith("adapter") for path in out.iterdir())
            loading.load_model(refs.model(out), torch.float32, CPU)  # strictly
        assert written[0].keys() == written[1].keys()
        assert all(torch.equal(tensor, written[1][name]) for name, tensor in written[0].items())
        assert "lm_head.weight" in written[0]


def test_the_untrained_twin_is_tied_as_the_merged_model_is(tmp_path):
    base = save_tiny("llama", tmp_path / "base", tie_word_embeddings=True, tokenizer=False)
    adapter, merged = trained(base, 300, modules_to_save=list(BOTH), dtype=torch.float32)
    ours, wanted = (loading.load_untrained(refs.model(f), torch.float32, CPU, seed=3) for f in (adapter, merged))
    ids = torch.tensor([[1, 5, 299]])
    assert torch.equal(ours(ids).logits, wanted(ids).logits)


def test_what_is_added_to_one_of_two_tied_matrices_is_in_both_and_said(tmp_path, capsys):
    base = save_tiny("llama", tmp_path / "base", tie_word_embeddings=True, tokenizer=False)
    adapter, _ = trained(base, target_modules=["lm_head"], dtype=torch.float32)
    with opening.open_folder(adapter) as stored:
        assert list(stored.changes) == ["model.embed_tokens.weight"]
    assert "ties its output matrix to its embeddings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target_modules": ["embed_tokens"]}, "save it again with save_embedding_layers=True"),
        ({"target_modules": ["lm_head"]}, "save it again with save_embedding_layers=True"),
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens.weight of 300 rows and lm_head.weight of 272 rows"),
        ({"modules_to_save": ["lm_head"]}, "embed_tokens.weight of 272 rows and lm_head.weight of 300 rows"),
        ({"trainable_token_indices": [280]}, "save it again with save_embedding_layers=True"),
    ],
)
def test_new_rows_that_peft_left_out_are_refused(tmp_path, settings, match):
    base = save_tiny("llama", tmp_path / "base", tokenizer=False, tie_word_embeddings=False)
    adapter, _ = trained(base, 300, {"save_embedding_layers": False}, dtype=torch.float32, **settings)
    with pytest.raises(InputError, match=match):
        opening.open_folder(adapter)


def test_more_tokens_than_rows(tmp_path):
    """Nothing in the adapter says that its embeddings had new rows, but its tokenizer does."""
    base = save_tiny("gemma3", tmp_path / "base", dtype="bfloat16")
    adapter, _ = trained(base, 300, target_modules=["q_proj"])
    longer = tiny_tokenizer()
    longer.add_tokens([f"new{n}" for n in range(30)])
    longer.save_pretrained(adapter)
    with pytest.raises(
        InputError, match=r"tokenizer has 289 tokens and the embeddings have 272 rows.*save_embedding_lay"
    ):
        loading.load_model(refs.model(adapter), torch.float32, CPU)


# --- an adapter beside the model that it was merged into ---


def test_an_adapter_beside_the_merged_model_is_left_alone(tmp_path, monkeypatch, capsys):
    """transformers would add it a second time, wherever PEFT is installed."""
    from cpt_utils.base import cli

    monkeypatch.setattr(cli, "_said", set())
    base = save_tiny("llama", tmp_path / "base", tie_word_embeddings=False)
    adapter, merged = trained(base, dtype=torch.float32, target_modules="all-linear")
    shutil.copytree(merged, tmp_path / "run/checkpoint-5")
    shutil.copytree(merged, tmp_path / "run/checkpoint-10")
    for step in (5, 10):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(adapter / name, tmp_path / f"run/checkpoint-{step}" / name)
        tiny_tokenizer().save_pretrained(tmp_path / f"run/checkpoint-{step}")
    both = refs.run(tmp_path / "run")
    truth = loading.load_model(refs.model(merged), torch.float32, CPU)
    twice = AutoModelForCausalLM.from_pretrained(both[0].spec, dtype=torch.float32)
    ids = torch.tensor([[1, 5, 7]])
    assert not torch.allclose(twice(ids).logits, truth(ids).logits, atol=0.01)
    capsys.readouterr()
    for ref in both:
        assert not ref.is_adapter
        ours = loading.load_model(ref, torch.float32, CPU)
        assert torch.equal(ours(ids).logits, truth(ids).logits)
        assert ours.state_dict().keys() == truth.state_dict().keys()
    with surgery.Pair(refs.model(base), both[1]) as pair:
        recipe = surgery.layers_from_base(pair, [1])
        on_disk.write_model(pair, recipe, tmp_path / "out")
        with in_memory.apply(ours, recipe, pair) as swapped:
            logits = swapped(ids).logits
    assert not any(path.name.startswith("adapter") for path in (tmp_path / "out").iterdir())
    assert torch.equal(loading.load_model(refs.model(tmp_path / "out"), torch.float32, CPU)(ids).logits, logits)
    said = capsys.readouterr().out
    assert said.count("beside the model there is an adapter (adapter_config.json)") == 1


def test_without_peft_the_numbers_are_the_same(tmp_path, monkeypatch):
    import transformers.integrations.peft as integration
    from transformers.models.auto import auto_factory

    base = save_tiny("llama", tmp_path / "base")
    adapter, merged = trained(base, dtype=torch.float32)
    shutil.copy(adapter / "adapter_config.json", merged)
    shutil.copy(adapter / "adapter_model.safetensors", merged)
    ids = torch.tensor([[1, 5, 7]])
    found = [loading.load_model(refs.model(merged), torch.float32, CPU)(ids).logits]
    monkeypatch.setattr(integration, "is_peft_available", lambda: False)
    monkeypatch.setattr(auto_factory, "is_peft_available", lambda: False)
    found.append(loading.load_model(refs.model(merged), torch.float32, CPU)(ids).logits)
    assert torch.equal(*found)


def test_transformers_that_would_not_listen_is_noticed(tmp_path, monkeypatch):
    base = save_tiny("llama", tmp_path / "base")
    adapter, merged = trained(base, dtype=torch.float32)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, merged)
    monkeypatch.setattr(loading, "NO_ADAPTER", {})
    with pytest.raises(InputError, match=r"applied the adapter beside it; move adapter_config\.json"):
        loading.load_model(refs.model(merged), torch.float32, CPU)
