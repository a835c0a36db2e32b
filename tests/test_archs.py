"""The table of architectures: names with their variants, sizes, and what is refused. Every type runs in
test_architectures.py."""

from __future__ import annotations

import pytest
import torch
from helpers import read_tensors, save_tiny, tiny_config, tiny_model

from cpt_utils import archs
from cpt_utils.errors import InputError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def make(model_type):
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type)
            model = tiny_model(model_type, seed=3)
            save_tiny(model_type, folder, model=model, tokenizer=False)
            made[model_type] = model, read_tensors(folder)
        return made[model_type]

    return make


def test_gpt2_without_prefix_and_with_masks(saved):
    """The hub's gpt2: names start at `h.`, and every layer carries its causal mask."""
    model, disk = saved("gpt2")
    arch = archs.for_config(model.config)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in disk.items()}
    bare["h.1.attn.bias"] = torch.ones(1, 1, 4, 4)
    assert [part.tensor for part in arch.parts(model.config, 1, "k_proj", bare)] == [
        "h.1.attn.c_attn.weight",
        "h.1.attn.c_attn.bias",
    ]
    assert "h.1.attn.bias" not in arch.layer_tensors(bare, 1)
    names = arch.module_names(bare, model)
    assert "h.1.attn.bias" not in names
    assert names["h.1.attn.c_attn.bias"] == "transformer.h.1.attn.c_attn.bias"
    assert arch.canonical("h.1.ln_1.weight") == arch.canonical("transformer.h.1.ln_1.weight")


def test_gpt_neox_head_in_both_spellings():
    arch = archs.ARCHS["gpt_neox"]
    assert arch.canonical("embed_out.weight") == arch.canonical("lm_head.weight")
    assert arch.disk_name("lm_head.weight", ["embed_out.weight"]) == "embed_out.weight"


def test_a_llama_like_type_is_one_entry(monkeypatch):
    monkeypatch.setitem(archs.ARCHS, "brand_new", archs.Arch(model_type="brand_new"))
    config = {"model_type": "brand_new", "num_hidden_layers": 2}
    arch = archs.for_config(config)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    assert [part.tensor for part in arch.parts(config, 1, "q_proj", names)] == [names[1]]


def test_unknown_type_names_near_ones():
    with pytest.raises(InputError, match=r"qwen2_5.*nearest: qwen2.*ARCHS in cpt_utils/arch_table.py"):
        archs.for_config({"model_type": "qwen2_5"})
    with pytest.raises(InputError, match="no model_type"):
        archs.for_config({})


def test_unknown_type_that_transformers_knows_says_what_to_write(monkeypatch):
    """Llama's names are recognised, from the config alone; otherwise the message lists the modules of a layer."""
    monkeypatch.delitem(archs.ARCHS, "qwen2")
    with pytest.raises(InputError, match=r"modules are named as Llama's: add 'qwen2': Arch\(\) to ARCHS in cpt_utils"):
        archs.for_config(tiny_config("qwen2").to_dict())
    monkeypatch.delitem(archs.ARCHS, "opt")
    with pytest.raises(InputError, match=r"layers 0, 1, 2 of model\.decoder\.layers have activation_fn, fc1, fc2"):
        archs.for_config(tiny_config("opt").to_dict())


def test_a_rule_that_matches_nothing_names_near_misses():
    config = {"model_type": "llama", "num_hidden_layers": 2}
    arch = archs.for_config(config)
    names = ["model.layers.0.self_attn.q_project.weight", "model.norm.weight"]
    with pytest.raises(InputError, match=r"q_proj\.weight .*nearest: model\.layers\.0\.self_attn\.q_project\.weight"):
        arch.parts(config, 0, "q_proj", names)
    with pytest.raises(InputError, match=r"no tensor model\.layers\.7\."):
        arch.layer_tensors(names, 7)
    with pytest.raises(InputError, match="gpt2 has no gate_proj"):
        archs.ARCHS["gpt2"].parts(tiny_config("gpt2"), 0, "gate_proj", names)
    with pytest.raises(InputError, match="num_hidden_layers"):
        arch.n_layers({"model_type": "llama"})


def test_tensor_without_a_module(saved):
    model, disk = saved("llama")
    arch = archs.for_config(model.config)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.extra\.weight has no place"):
        arch.module_names([*disk, "model.layers.0.mlp.extra.weight"], model)


def test_sizes_of_sparse_configs():
    arch = archs.ARCHS["gpt2"]
    assert arch.heads({"model_type": "gpt2", "n_embd": 64, "n_head": 4}) == (4, 4, 16)
    assert arch.ffn_width({"model_type": "gpt2", "n_embd": 64, "n_inner": None}) == 256
    gemma = {"text_config": {"num_hidden_layers": 34, "hidden_size": 2560}, "vision_config": {}}
    assert archs.ARCHS["gemma3"].n_layers(gemma) == 34
    assert archs.ARCHS["gemma3"].heads(gemma) == (8, 4, 256)  # what google/gemma-3-4b-pt leaves out
    bloom = {"n_embed": 64, "n_layer": 2, "num_attention_heads": 4}
    assert (archs.ARCHS["bloom"].heads(bloom), archs.ARCHS["bloom"].ffn_width(bloom)) == ((4, 4, 16), 256)


def test_dense_and_sparse_layers():
    arch = archs.ARCHS["qwen3_moe"]
    config = {"num_hidden_layers": 4, "hidden_size": 8, "intermediate_size": 48, "moe_intermediate_size": 5}
    config |= {"num_experts": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert [arch.experts(config, layer) for layer in range(4)] == [0, 6, 0, 0]
    assert [arch.ffn_width(config, layer) for layer in range(4)] == [48, 30, 48, 48] and arch.ffn_width(config) == 48
    names = {f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in range(6)} | {"model.layers.1.mlp.gate.weight"}
    assert [p.tensor.split(".")[5] for p in arch.parts(config, 1, "up_proj", names)] == list("012345")
    assert [part.tensor for part in arch.parts(config, 1, archs.ROUTER, names)] == ["model.layers.1.mlp.gate.weight"]
    with pytest.raises(InputError, match="no router in layer 0"):
        arch.parts(config, 0, archs.ROUTER, names)
    with pytest.raises(InputError, match=r"no tensor model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight"):
        arch.parts(config, 1, "up_proj", names - {"model.layers.1.mlp.experts.5.up_proj.weight"})
