"""Weight change against models loaded whole, for every architecture, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import ARCHITECTURES, read_tensors, save_tiny, tiny_model

from cpt_utils import archs, compare, refs
from cpt_utils.errors import InputError

# Of the tiny models: query and key/value heads, features per head, FFN neurons.
HEADS, KV, DIM, FFN = 4, 2, 8, 48


def reference(model, model_type: str, layer: int) -> dict[str, torch.Tensor]:
    """The projections of a loaded model, float32 [out, in], written down by hand for each architecture."""
    block = archs.ARCHS[model_type].layers(model)[layer]
    if model_type == "phi3":
        qkv, gate_up = block.self_attn.qkv_proj.weight, block.mlp.gate_up_proj.weight
        q, k, v = qkv.split([HEADS * DIM, KV * DIM, KV * DIM])
        gate, up = gate_up.split(FFN)
        found = {"q": q, "k": k, "v": v, "o": block.self_attn.o_proj.weight, "gate": gate, "up": up}
        found["down"] = block.mlp.down_proj.weight
    elif model_type == "gpt_neox":
        qkv = block.attention.query_key_value.weight.view(HEADS, 3, DIM, -1)
        found = {name: qkv[:, i].reshape(HEADS * DIM, -1) for i, name in enumerate("qkv")}
        found |= {"o": block.attention.dense.weight, "up": block.mlp.dense_h_to_4h.weight}
        found["down"] = block.mlp.dense_4h_to_h.weight
    elif model_type == "gpt2":
        q, k, v = block.attn.c_attn.weight.T.split(HEADS * DIM)
        found = {"q": q, "k": k, "v": v, "o": block.attn.c_proj.weight.T, "up": block.mlp.c_fc.weight.T}
        found["down"] = block.mlp.c_proj.weight.T
    else:
        found = {name: getattr(block.self_attn, f"{name}_proj").weight for name in "qkvo"}
        found |= {name: getattr(block.mlp, f"{name}_proj").weight for name in ("gate", "up", "down")}
    return {f"{name}_proj": weight.detach().float() for name, weight in found.items()}


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def close(a: float, b: float) -> bool:
    return a == pytest.approx(b, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_equals_loading_both_models_whole(model_type, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "CHUNK", 4 * 32 * 5)  # five rows of width 32 at a time: parts end inside blocks
    base = save_tiny(model_type, tmp_path / "base", seed=0)
    run = [save_tiny(model_type, tmp_path / "run" / f"checkpoint-{step}", seed=step, shards=step) for step in (1, 2)]
    found = compare.changes(refs.model(base), refs.run(tmp_path / "run"), rows=archs.PROJECTIONS)
    assert list(found) == [1, 2]
    whole = load(base)
    for step, folder in zip(found, run, strict=True):
        trained = load(folder)
        assert sorted(found[step]) == [0, 1, 2]
        for layer, changes in found[step].items():
            ours, theirs = (reference(model, model_type, layer) for model in (whole, trained))
            assert sorted(changes) == sorted(ours)
            for name, change in changes.items():
                difference = (theirs[name] - ours[name]).double()
                assert change.n == difference.numel()
                assert close(change.sum_abs, difference.abs().sum().item())
                assert close(change.mean_abs, difference.abs().mean().item())
                assert close(change.sum_sq, difference.pow(2).sum().item())
                assert close(change.base_sq, ours[name].double().pow(2).sum().item())
                assert change.max_abs == difference.abs().max().item()
                assert close(change.relative, (difference.norm() / ours[name].double().norm()).item())
                torch.testing.assert_close(change.rows, difference.abs().sum(1), rtol=1e-12, atol=1e-15)
                torch.testing.assert_close(change.row_means, difference.abs().mean(1), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_base_against_itself_is_exactly_zero(model_type, tmp_path):
    base = save_tiny(model_type, tmp_path / "base", dtype="bfloat16")
    found = compare.changes(refs.model(base), refs.run(base))
    assert list(found) == [0]
    for changes in found[0].values():
        for change in changes.values():
            assert change.n > 0 and change.base_sq > 0
            assert (change.sum_abs, change.sum_sq, change.max_abs, change.relative) == (0, 0, 0, 0)


def test_only_some_projections(tmp_path):
    base = save_tiny("phi3", tmp_path / "base")
    other = save_tiny("phi3", tmp_path / "checkpoint-3", seed=1)
    whole = compare.changes(refs.model(base), refs.run(other))
    some = compare.changes(refs.model(base), refs.run(other), projections=("gate_proj", "k_proj"), rows=("gate_proj",))
    for layer, changes in some[3].items():
        assert sorted(changes) == ["gate_proj", "k_proj"]
        assert len(changes["gate_proj"].rows) == FFN and changes["k_proj"].rows is None
        for name, change in changes.items():
            assert (change.n, change.sum_abs) == (whole[3][layer][name].n, whole[3][layer][name].sum_abs)
    # Rows of a gate that the architecture does not have are no error: there is nothing to sum.
    neox = save_tiny("gpt_neox", tmp_path / "neox")
    found = compare.changes(refs.model(neox), refs.run(neox), projections=("gate_proj", "up_proj"), rows=("gate_proj",))
    assert list(found[0][0]) == ["up_proj"]


def test_mixed_dtypes_are_subtracted_in_float32(tmp_path):
    base = save_tiny("llama", tmp_path / "base", seed=0, dtype="float16")
    other = save_tiny("llama", tmp_path / "checkpoint-1", seed=1, dtype="bfloat16")
    found = compare.changes(refs.model(base), refs.run(other))
    ours, theirs = read_tensors(base), read_tensors(other)
    name = "model.layers.1.mlp.down_proj.weight"
    assert (ours[name].dtype, theirs[name].dtype) == (torch.float16, torch.bfloat16)
    expected = (theirs[name].float() - ours[name].float()).double().abs().mean().item()
    assert close(found[1][1]["down_proj"].mean_abs, expected)
    rounded = (theirs[name] - ours[name].bfloat16()).double().abs().mean().item()
    assert abs(rounded - expected) > 1e-9  # the trap: a difference taken in bfloat16 is another number


def test_extended_vocabulary_is_named_and_left_out(tmp_path):
    base = save_tiny("llama", tmp_path / "base", vocab_size=272)
    other = save_tiny("llama", tmp_path / "checkpoint-1", seed=1, vocab_size=300)
    assert compare.unlike(refs.model(base), refs.model(other)) == {
        "lm_head.weight": "[272, 32] in the base, [300, 32] in the checkpoint",
        "model.embed_tokens.weight": "[272, 32] in the base, [300, 32] in the checkpoint",
    }
    assert compare.changes(refs.model(base), refs.run(other))[1][2]["q_proj"].mean_abs > 0
    same = save_tiny("llama", tmp_path / "checkpoint-2", seed=1)
    assert compare.unlike(refs.model(base), refs.model(same)) == {}


def test_bin_files_and_shards_equal_one_safetensors_file(tmp_path):
    base = save_tiny("qwen2", tmp_path / "base", shards=3)
    one = save_tiny("qwen2", tmp_path / "a" / "checkpoint-1", seed=1)
    many = save_tiny("qwen2", tmp_path / "b" / "checkpoint-1", seed=1, shards=2, format="bin")
    found = [compare.changes(refs.model(base), refs.run(run)) for run in (one, many)]
    assert found[0] == found[1]


def test_other_shapes_layers_and_architectures_are_refused(tmp_path):
    base = save_tiny("llama", tmp_path / "base")

    def fails(message, model_type="llama", **config):
        other = save_tiny(model_type, tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}", seed=1, **config)
        with pytest.raises(InputError, match=message) as error:
            compare.changes(refs.model(base), refs.run(other))
        assert "\n" not in str(error.value)

    fails("has 3 layers and .* 2; base and checkpoints", layers=2)
    fails(r"layers.0.mlp.gate_proj.weight has shape \[48, 32\] in .* and \[64, 32\] in", intermediate_size=64)
    fails("is a llama and .* a mistral", model_type="mistral")


def test_one_fused_tensor_cut_differently_is_refused(tmp_path):
    base = save_tiny("phi3", tmp_path / "base")
    other = save_tiny("phi3", tmp_path / "checkpoint-1", seed=1)
    config = json.loads((other / "config.json").read_text())
    # 4 query and 2 key/value heads of 8, or 2 and 3: both are 64 rows.
    config |= {"num_attention_heads": 2, "num_key_value_heads": 3, "head_dim": 8}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="differ in attention heads"):
        compare.changes(refs.model(base), refs.run(other))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["base", "checkpoint-1"])
def test_damaged_numbers_name_the_model_and_the_tensor(tmp_path, side, value):
    for name, seed in (("base", 0), ("checkpoint-1", 1)):
        model = tiny_model("qwen3", seed=seed)
        if name == side:
            with torch.no_grad():
                model.model.layers[1].self_attn.v_proj.weight[3, 5] = value
        save_tiny("qwen3", tmp_path / name, model=model)
    with pytest.raises(InputError, match=rf"{side}: tensor model.layers.1.self_attn.v_proj.weight holds NaN or inf"):
        compare.changes(refs.model(tmp_path / "base"), refs.run(tmp_path / "checkpoint-1"))


def test_missing_and_truncated_weights(tmp_path):
    base = save_tiny("llama", tmp_path / "base")
    other = save_tiny("llama", tmp_path / "checkpoint-1", seed=1, shards=2)
    shard = other / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(InputError, match="cut short"):
        compare.changes(refs.model(base), refs.run(other))
    shard.unlink()
    with pytest.raises(InputError, match=r"the index names the shard .* which is not there"):
        compare.changes(refs.model(base), refs.run(other))
    with pytest.raises(InputError, match="no such folder"):
        compare.changes(refs.model(tmp_path / "nowhere"), refs.run(other))
