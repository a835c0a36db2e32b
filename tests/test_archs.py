"""The table of architectures: names with their variants, sizes, and what is refused. Every type runs in
test_architectures.py."""

from __future__ import annotations

import pytest
import torch
from helpers import read_tensors, save_tiny, tiny_config, tiny_model
from safetensors.torch import save_file

from cpt_utils.architectures import archs
from cpt_utils.architectures.arch_left_out import LEFT_OUT, REASONS, TRIED
from cpt_utils.base.errors import InputError
from cpt_utils.interventions import surgery


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
    names = {disk: place.name for disk, place in arch.locations(bare, model).items()}
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
    with pytest.raises(InputError, match=r"qwen2_5.*nearest: .*qwen2.*ARCHS in cpt_utils/architectures/arch_table.py"):
        archs.for_config({"model_type": "qwen2_5"})
    with pytest.raises(InputError, match="no model_type"):
        archs.for_config({})


def test_unknown_type_that_transformers_knows_says_what_to_write(monkeypatch):
    """Llama's names are recognised, from the config alone; otherwise the message lists the modules of a layer."""
    monkeypatch.delitem(archs.ARCHS, "qwen2")
    with pytest.raises(
        InputError, match=r"modules are named like Llama's: add 'qwen2': Arch\(\) to ARCHS in cpt_utils"
    ):
        archs.for_config(tiny_config("qwen2").to_dict())
    monkeypatch.delitem(archs.ARCHS, "opt")
    with pytest.raises(InputError, match=r"layers 0, 1, 2 of model\.decoder\.layers have activation_fn, fc1, fc2"):
        archs.for_config(tiny_config("opt").to_dict())


def test_unknown_type_is_looked_at_in_all_layers(monkeypatch):
    """The first layers of a mixture of experts are dense, a hybrid has attention in some: neither is a Llama."""
    monkeypatch.delitem(archs.ARCHS, "glm4_moe")
    message = (
        r"layer 0 of model\.layers has .*mlp\.gate_proj.*; layers 1, 2 of model\.layers have .*mlp\.experts\.act_fn"
    )
    with pytest.raises(InputError, match=message) as raised:
        archs.for_config(tiny_config("glm4_moe").to_dict())
    assert "named like Llama's" not in str(raised.value)
    monkeypatch.delitem(archs.ARCHS, "qwen3_5_text")
    with pytest.raises(
        InputError, match=r"layers 0, 2 of .* have .*self_attn\.q_proj.*; layer 1 of .* has .*linear_attn"
    ):
        archs.for_config(tiny_config("qwen3_5_text").to_dict())
    monkeypatch.delitem(archs.ARCHS, "diffllama")
    with pytest.raises(InputError, match=r"Llama's: add 'diffllama': Arch\(\)"):
        archs.for_config(tiny_config("diffllama").to_dict())
    monkeypatch.delitem(archs.ARCHS, "beam")
    with pytest.raises(InputError, match=r"Llama's \(a layer also has self_attn\.gate_proj\): add 'beam'"):
        archs.for_config(tiny_config("beam", mlp_layer_types=["dense"] * 3).to_dict())


def test_types_that_are_left_out_say_why():
    with pytest.raises(InputError, match="'bart' is not in the table of architectures: an encoder-decoder"):
        archs.for_config({"model_type": "bart"})
    with pytest.raises(InputError, match="doge sets is_moe, which is not supported"):
        archs.for_config({"model_type": "doge", "is_moe": True})


def test_every_type_of_transformers_is_in_the_table_or_left_out():
    from transformers import __version__
    from transformers.models.auto import modeling_auto as auto

    known = {
        *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        *auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    }
    assert not set(LEFT_OUT) & set(archs.ARCHS)
    assert sum(map(len, REASONS.values())) == len(LEFT_OUT)
    if not __version__.startswith(f"{TRIED}."):
        pytest.skip(f"the lists are of transformers {TRIED}, and {__version__} is installed")
    assert known == set(archs.ARCHS) | set(LEFT_OUT)


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
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.extra\.weight has no counterpart"):
        arch.locations([*disk, "model.layers.0.mlp.extra.weight"], model)


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


# --- layers that differ, as published configurations state them ---


def kinds(config: dict) -> str:
    """A letter a layer: `a` attention only, `f` FFN only, `d` both, capitals with experts, `-` neither."""
    arch, found = archs.for_config(config), ""
    for layer in range(arch.n_layers(config)):
        attention, ffn = (arch.has(config, layer, names) for names in (archs.ATTENTION, archs.FFN))
        letter = {(True, False): "a", (False, True): "f", (True, True): "d", (False, False): "-"}[attention, ffn]
        found += letter.upper() if arch.has_router(config, layer) else letter
    return found


def of(types: str) -> dict:
    """Layers of these kinds."""
    return {"num_hidden_layers": len(types.split()), "layer_types": types.split()}


EXPERTS = {"num_experts": 4, "top_k_experts": 1, "moe_intermediate_size": 8}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # Keys as in the config.json files of the hub, where newer releases write `layer_types`.
        ({"model_type": "qwen3_next", "num_hidden_layers": 8, "full_attention_interval": 4}, "FFFDFFFD"),
        ({"model_type": "qwen3_next", "num_hidden_layers": 4, "mlp_only_layers": [1, 3]}, "FfFd"),
        ({"model_type": "qwen3_5", "text_config": {"num_hidden_layers": 5, "full_attention_interval": 2}}, "fdfdf"),
        ({"model_type": "lfm2", "num_hidden_layers": 4, "full_attn_idxs": [2]}, "ffdf"),
        ({"model_type": "lfm2_moe", "num_dense_layers": 2, **of("conv conv full_attention conv")}, "ffDF"),
        ({"model_type": "jamba", "num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 1}, "fDfFfDfF"),
        ({"model_type": "bamba", "num_hidden_layers": 4, "attn_layer_indices": [2]}, "ffdf"),
        ({"model_type": "nemotron_h", "num_hidden_layers": 6, "hybrid_override_pattern": "M-M*E-"}, "-f-aFf"),
        ({"model_type": "granitemoehybrid", **of("mamba attention mamba")}, "FDF"),
        ({"model_type": "granitemoehybrid", "num_local_experts": 0, **of("mamba attention")}, "fd"),
        ({"model_type": "minimax", **of("linear_attention linear_attention full_attention")}, "FFD"),
        ({"model_type": "falcon_h1", "num_hidden_layers": 2, "intermediate_size": 8}, "dd"),
        ({"model_type": "deepseek_v3", "num_hidden_layers": 5, "first_k_dense_replace": 3}, "dddDD"),
        ({"model_type": "deepseek_v2", "num_hidden_layers": 3, "first_k_dense_replace": 1}, "dDD"),
        ({"model_type": "glm4_moe", "num_hidden_layers": 3}, "dDD"),
        ({"model_type": "llama4_text", "num_hidden_layers": 4, "interleave_moe_layer_step": 2}, "dDdD"),
        ({"model_type": "ernie4_5_moe", "num_hidden_layers": 4, "moe_layer_end_index": 2}, "dDDd"),
        ({"model_type": "gemma4_text", "num_hidden_layers": 2, "enable_moe_block": True, **EXPERTS}, "DD"),
        ({"model_type": "qwen2_moe", "num_hidden_layers": 4, "decoder_sparse_step": 2}, "dDdD"),
        ({"model_type": "gpt_oss", "num_hidden_layers": 2}, "DD"),
        ({"model_type": "llama", "num_hidden_layers": 2, "intermediate_size": 4}, "dd"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else value,
)  # fmt: skip
def test_what_layers_have(config, expected):
    assert kinds(config) == expected
    arch = archs.for_config(config)
    lacking = [i for i, letter in enumerate(expected) if letter in "fF-"]
    assert arch.lacking(config, archs.ATTENTION) == lacking
    assert bool(arch.instead(config, lacking)) == bool(lacking)
    widths = [arch.ffn_width(config, layer) for layer in range(len(expected))]
    assert [i for i, width in enumerate(widths) if not width] == [
        i for i, letter in enumerate(expected) if letter in "a-"
    ]
    assert arch.ffn_width(config) == max(widths)


def test_layers_of_their_own_width():
    """By hand, from the definitions of the types."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    wide = {"model_type": "gemma4_text", **sizes, "intermediate_size": 40, "use_double_wide_mlp": True}
    wide |= {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 2}
    arch = archs.for_config(wide)
    assert [arch.ffn_width(wide, layer) for layer in range(2)] == [40, 80]
    assert [arch.projections(wide, layer)[:4] for layer in range(2)] == [
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        ("q_proj", "o_proj", "gate_proj", "up_proj"),
    ]
    same = wide | {"num_kv_shared_layers": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
    assert arch.projections(same, 0) == ("q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert arch.heads(same | {"global_head_dim": 32}, 0) == (4, 1, 32)
    lfm2 = {"model_type": "lfm2", **sizes, "intermediate_size": 96, "block_multiple_of": 48}
    assert archs.for_config(lfm2).ffn_width(lfm2, 0) == 96  # two thirds of 96 are 64, rounded up to a multiple of 48
    shared = {"model_type": "qwen2_moe", **sizes, "num_experts": 3, "moe_intermediate_size": 10}
    shared |= {"shared_expert_intermediate_size": 7}
    arch = archs.for_config(shared)
    assert [(g.first, g.stop, g.experts) for g in arch.neurons(shared, 0)] == [(0, 30, 3), (30, 37, 0)]
    assert arch.expert_width(shared, 0) == 10 and arch.ffn_width(shared) == 37


def test_a_configuration_that_transformers_cannot_read():
    config = {"model_type": "deepseek_v3", "num_hidden_layers": "many"}
    with pytest.raises(InputError, match="the installed transformers cannot read this deepseek_v3 configuration: "):
        archs.for_config(config).experts(config, 0)


# --- parts ---


@pytest.mark.parametrize("lora", [None, 20])
def test_every_entry_of_a_latent_attention_is_in_one_projection(lora, tmp_path):
    model = tiny_model("deepseek_v3", q_lora_rank=lora)
    disk = read_tensors(save_tiny("deepseek_v3", tmp_path, model=model, tokenizer=False))
    config = model.config.to_dict()
    arch = archs.for_config(config)
    seen = {
        name: torch.zeros_like(t) for name, t in disk.items() if "layers.1.self_attn" in name and "norm" not in name
    }
    for projection in archs.ATTENTION:
        for part in arch.parts(config, 1, projection, disk):
            rows = torch.arange(len(disk[part.tensor])) if part.index is None else part.index
            seen[part.tensor][rows] += 1
    assert all(bool((count == 1).all()) for count in seen.values())
    queries = [part.tensor.split(".")[-2] for part in arch.parts(config, 1, "q_proj", disk)]
    assert queries == (["q_proj"] if lora is None else ["q_a_proj", "q_b_proj"])
    # By head: 6 rows of keys without positions, then 10 of values.
    value = next(part for part in arch.parts(config, 1, "v_proj", disk))
    assert value.index.tolist() == [16 * head + row for head in range(4) for row in range(6, 16)]


def test_layouts_of_experts():
    """One matrix [out, in] or [in, out] for each expert, whichever way a file holds them."""
    config = tiny_config("gpt_oss").to_dict()
    arch, names = archs.for_config(config), [f"model.layers.0.mlp.{n}" for n in ("router.weight", "router.bias")]
    names += [f"model.layers.0.mlp.experts.{n}{end}" for n in ("gate_up_proj", "down_proj") for end in ("", "_bias")]
    up = arch.parts(config, 0, "up_proj", names)
    assert [(p.role, p.dim, p.index, p.expert) for p in up[3:5]] == [
        ("weight", 1, slice(1, 96, 2), 3),
        ("bias", 0, slice(1, 96, 2), 0),
    ]
    assert [part.role for part in arch.parts(config, 0, archs.ROUTER, names)] == ["weight", "bias"]
    config = tiny_config("granitemoe").to_dict()
    names = [f"model.layers.0.block_sparse_moe.{n}.weight" for n in ("input_linear", "output_linear", "router.layer")]
    arch = archs.for_config(config)
    gate = arch.parts(config, 0, "gate_proj", names)
    assert [(p.tensor, p.dim, p.index, p.expert) for p in gate] == [(names[0], 0, slice(0, 48), e) for e in range(4)]
    assert arch.parts(config, 0, archs.ROUTER, names)[0].tensor == names[2]


# --- other towers, and what files hold beside a model ---


def test_the_language_model_is_the_one_that_the_config_names():
    config = {"model_type": "llava", "text_config": {"model_type": "mistral", "num_hidden_layers": 2}}
    arch = archs.for_config(config)
    assert (arch.model_type, arch.text_type, arch.layer_path(0)) == (
        "llava",
        "mistral",
        "model.language_model.layers.0",
    )
    assert archs.text_type(config) == archs.text_type(config["text_config"]) == "mistral"
    config["text_config"] = {"model_type": "qwen3_moe"}
    assert archs.for_config(config).experts_at == archs.ARCHS["qwen3_moe"].experts_at
    assert archs.for_config(config) == archs.for_config(dict(config))
    with pytest.raises(InputError, match=r"language model of this llava is of type 'rwkv'.*: its layers have neither"):
        archs.for_config({"model_type": "llava", "text_config": {"model_type": "rwkv"}})
    # A name that only configurations have: without its tower the model is saved, and loaded, as a Qwen 2.
    whole = {"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text"}}
    assert archs.text_type(whole) == archs.text_type({"model_type": "qwen2"}) == "qwen2"
    assert archs.text_type({"model_type": "llama"}) == "llama"


def test_output_matrices_of_other_names_are_found_in_each_other():
    llama4, text = archs.ARCHS["llama4"], archs.ARCHS["llama4_text"]
    assert archs.meaning(llama4, "language_model.lm_head.weight") == archs.meaning(text, "lm_head.weight")
    assert archs.meaning(text, "model.layers.0.mlp.x.weight") == text.canonical("model.layers.0.mlp.x.weight")
    for arch in archs.ARCHS.values():
        assert archs.meaning(arch, f"{arch.head}.weight") == "lm_head.weight"


def test_layers_that_predict_further_tokens_are_no_part_of_the_model(saved):
    """DeepSeek-V3's files hold a layer 61, Qwen3-Next's `mtp.*`; in a Llama's such a layer would be one too many."""
    model, disk = saved("deepseek_v3")
    arch, more = archs.for_config(model.config), "model.layers.3.eh_proj.weight"
    assert more not in arch.locations([*disk, more], model)
    model, disk = saved("qwen3_next")
    arch = archs.for_config(model.config)
    assert set(arch.locations([*disk, "mtp.layers.0.mlp.gate.weight"], model)) == set(disk)
    model, disk = saved("llama")
    with pytest.raises(InputError, match=r"layers\.3\.mlp\.up_proj\.weight has no counterpart"):
        archs.for_config(model.config).locations([*disk, "model.layers.3.mlp.up_proj.weight"], model)


def test_keys_and_values_that_no_layer_reads(tmp_path):
    """Gemma 3n's files hold them for layers that use another's; transformers saves none. Whole layers are swapped."""
    folders = [save_tiny("gemma3n_text", tmp_path / name, seed=seed) for seed, name in enumerate(("base", "target"))]
    held = read_tensors(folders[0])
    unused = {f"model.layers.2.self_attn.{name}.weight": torch.ones(16, 32) for name in ("k_proj", "v_proj")}
    assert not set(unused) & set(held)
    save_file(held | unused, folders[0] / "model.safetensors", metadata={"format": "pt"})
    for base, target in (folders, folders[::-1]):
        with surgery.Pair(base, target) as pair:
            edits = surgery.layers_from_base(pair, [2]).edits
            assert len(edits) == sum(name.startswith("model.layers.2.") for name in held)
            assert not {edit.tensor for edit in edits} & set(unused)
