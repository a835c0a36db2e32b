"""The table of architectures: parts on disk against the modules of the loaded model, in plain slow code."""

from __future__ import annotations

import pytest
import torch
from helpers import ARCHITECTURES, read_tensors, save_tiny, tiny_config, tiny_model

from cpt_utils import archs
from cpt_utils.errors import InputError

HEADS, KV_HEADS, HEAD_DIM, FFN = 4, 2, 8, 48


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


def by_hand(model, model_type, layer):
    """Weight [out, in] and bias of every projection, read from the modules as the forward pass uses them."""
    if model_type == "gpt2":
        block = model.transformer.h[layer]
        w, b = block.attn.c_attn.weight.T, block.attn.c_attn.bias
        found = {
            name: (w[i * 32 : (i + 1) * 32], b[i * 32 : (i + 1) * 32]) for i, name in enumerate(archs.ATTENTION[:3])
        }
        found["o_proj"] = (block.attn.c_proj.weight.T, block.attn.c_proj.bias)
        found["up_proj"] = (block.mlp.c_fc.weight.T, block.mlp.c_fc.bias)
        found["down_proj"] = (block.mlp.c_proj.weight.T, block.mlp.c_proj.bias)
        return found
    if model_type == "gpt_neox":
        block = model.gpt_neox.layers[layer]
        fused = block.attention.query_key_value
        rows = {name: [] for name in archs.ATTENTION[:3]}
        for head in range(HEADS):
            for which, name in enumerate(archs.ATTENTION[:3]):
                start = head * 3 * HEAD_DIM + which * HEAD_DIM
                rows[name] += range(start, start + HEAD_DIM)
        found = {name: (fused.weight[r], fused.bias[r]) for name, r in rows.items()}
        for name, module in (
            ("o_proj", block.attention.dense),
            ("up_proj", block.mlp.dense_h_to_4h),
            ("down_proj", block.mlp.dense_4h_to_h),
        ):
            found[name] = (module.weight, module.bias)
        return found
    layers = model.model.language_model.layers if model_type == "gemma3" else model.model.layers
    block = layers[layer]
    if model_type == "phi3":
        w, g = block.self_attn.qkv_proj.weight, block.mlp.gate_up_proj.weight
        q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        return {
            "q_proj": (w[:q], None),
            "k_proj": (w[q : q + kv], None),
            "v_proj": (w[q + kv :], None),
            "o_proj": (block.self_attn.o_proj.weight, None),
            "gate_proj": (g[:FFN], None),
            "up_proj": (g[FFN:], None),
            "down_proj": (block.mlp.down_proj.weight, None),
        }
    found = {name: getattr(block.self_attn, name) for name in archs.ATTENTION}
    found |= {name: getattr(block.mlp, name) for name in archs.FFN}
    return {name: (module.weight, module.bias) for name, module in found.items()}


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, "gemma3"])
def test_parts_are_what_the_modules_hold(saved, model_type):
    model, disk = saved(model_type)
    arch = archs.for_config(model.config)
    assert arch is archs.for_config(model.config.to_dict())
    assert arch.n_layers(model.config) == 3
    for layer in range(3):
        truth = by_hand(model, model_type, layer)
        assert set(truth) == set(arch.projections(model.config))
        for projection in arch.projections(model.config):
            parts = {part.role: part for part in arch.parts(model.config, layer, projection, disk)}
            weight, bias = truth[projection]
            taken = parts["weight"].take(disk[parts["weight"].tensor])
            taken = taken.T if arch.transposed else taken
            assert torch.equal(taken, weight), (projection, layer)
            assert ("bias" in parts) == (bias is not None)
            if bias is not None:
                assert torch.equal(parts["bias"].take(disk[parts["bias"].tensor]), bias)


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, "gemma3"])
def test_every_tensor_has_its_place_in_memory(saved, model_type):
    model, disk = saved(model_type)
    arch = archs.for_config(model.config)
    names = arch.module_names(disk, model)
    assert set(names) == set(disk)
    state = model.state_dict()
    for name, place in names.items():
        assert torch.equal(state[place], disk[name])
    covered = [name for layer in range(3) for name in arch.layer_tensors(disk, layer)]
    assert len(covered) == len(set(covered))
    rest = set(disk) - set(covered)
    assert not any(f"{arch.layers_name}." in arch.canonical(name) and arch.layer_of(name) is not None for name in rest)
    assert set(arch.embedding_tensors(disk)) <= rest
    assert ("lm_head.weight" in disk or "embed_out.weight" in disk) == (
        len(arch.embedding_tensors(disk)) > len(arch.embeddings)
    )


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, "gemma3"])
def test_modules_in_memory(saved, model_type):
    """The named modules compute what they are named for: layers, final norm, activation, gate, down projection."""
    model, _ = saved(model_type)
    arch = archs.for_config(model.config)
    assert len(arch.layers(model)) == 3
    seen = {}

    def keep(name, what):
        def hook(_module, args, output):
            value = {"in": args[0] if args else None, "out": output}[what]
            seen[name] = value[0] if isinstance(value, tuple) else value

        return hook

    unit = arch.unit(model.config)
    handles = [
        arch.final_norm(model).register_forward_hook(keep("norm", "out")),
        arch.layers(model)[1].get_submodule(unit.module).register_forward_hook(keep("unit", "out")),
        arch.activation_module(model, 1).register_forward_hook(keep("act", "out")),
        arch.module(model, 1, "down_proj").register_forward_hook(keep("down", "in")),
    ]
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    assert torch.equal(seen["norm"], out.hidden_states[-1])
    pre = seen["unit"][..., unit.start : unit.stop]
    assert pre.shape[-1] == FFN == arch.ffn_width(model.config)
    assert torch.equal(seen["act"] > 0, pre > 0)
    if unit.projection == "up_proj":
        assert torch.equal(seen["act"], seen["down"])
    else:
        assert seen["act"].shape == seen["down"].shape


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
    with pytest.raises(InputError, match=r"qwen2_5.*nearest: qwen2.*ARCHS in cpt_utils/archs.py"):
        archs.for_config({"model_type": "qwen2_5"})
    with pytest.raises(InputError, match="no model_type"):
        archs.for_config({})


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
    assert archs.ARCHS["gemma3"].n_layers({"text_config": {"num_hidden_layers": 34}, "vision_config": {}}) == 34
