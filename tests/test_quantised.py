"""Quantised weights: refused by their name where weights are compared or swapped, run where transformers can."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from helpers import read_tensors, save_tiny
from safetensors.torch import load_file, save_file
from test_formats import CPU, LAYER, changes, edit, everywhere, load, pair, refused, rewrite

from cpt_utils.checkpoints import formats, refs, tensors
from cpt_utils.models import loading

F8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("quantised") / "plain", dtype="bfloat16", layers=2)


def packed(weight, dtype, share):
    rows, columns = weight.shape
    return torch.arange(rows * columns // share).view(rows, -1).to(dtype)


def scale(weight):
    return weight.abs().amax(1, keepdim=True) / 448


def bnb4(weight):
    return {
        "weight": packed(weight, torch.uint8, 2).view(-1, 1), "weight.absmax": torch.ones(4), "weight.quant_map":
        torch.ones(16), "weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
    }  # fmt: skip


def gptq(weight):
    held, order = packed(weight, torch.int32, 8), torch.arange(weight.shape[1], dtype=torch.int32)
    return {"qweight": held, "qzeros": held[:4].clone(), "scales": torch.ones(4, 8).half(), "g_idx": order}


# What published checkpoints hold: their tensors, what config.json says, and what the message must say with and without.
KINDS = {
    "fp8 blocks": (
        lambda w: {"weight": (w / 0.01).to(F8), "weight_scale_inv": torch.full([-(-n // 128) for n in w.shape], 0.01)},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        ("fp8", "FP8 in blocks", "FineGrainedFP8Config"),
    ),
    "fp8 channels": (
        lambda w: {"weight": (w / scale(w)).to(F8), "weight_scale": scale(w).bfloat16()},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        ("compressed-tensors", "with scales", "CompressedTensorsConfig"),
    ),
    "fbgemm": (
        lambda w: {"weight": w.to(F8), "weight_scale": scale(w), "input_scale_ub": torch.ones(1)},
        {"quant_method": "fbgemm_fp8"},
        ("fbgemm_fp8", "with scales", ""),
    ),
    "no scales": (
        lambda w: {"weight": w.to(torch.float8_e5m2)},
        {},
        ("its config.json does not say how", "its config.json does not say how", ""),
    ),
    "nvfp4": (
        lambda w: {
            "weight": packed(w, torch.uint8, 2),
            "weight_scale": w[:, :2].to(F8),
            "weight_scale_2": torch.ones(1),
        },
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        ("modelopt", "NVFP4 of ModelOpt", ""),
    ),
    "bnb int8": (
        lambda w: {"weight": w.to(torch.int8), "SCB": scale(w)[:, 0], "weight_format": torch.tensor(0).byte()},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        ("bitsandbytes 8-bit", "int8 of bitsandbytes", "model.dequantize"),
    ),
    "bnb int8, old": (
        lambda w: {"weight": w.to(torch.int8), "SCB": scale(w)[:, 0]},
        {"load_in_8bit": True},
        ("bitsandbytes 8-bit", "int8 of bitsandbytes", "model.dequantize"),
    ),
    "bnb 4-bit": (
        bnb4,
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        ("bitsandbytes 4-bit", "4-bit of bitsandbytes", "model.dequantize"),
    ),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4}, ("gptq 4-bit", "GPTQ", "")),
    "awq": (
        lambda w: {k: v for k, v in gptq(w).items() if k != "g_idx"},
        {"quant_method": "awq", "bits": 4},
        ("awq 4-bit", "GPTQ or AWQ", ""),
    ),
    "packed": (
        lambda w: {"weight_packed": packed(w, torch.int32, 8), "weight_scale": scale(w), "weight_shape": torch.ones(2)},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        ("compressed-tensors", "compressed-tensors", ""),
    ),
    "hqq": (
        lambda w: {"W_q": packed(w, torch.uint8, 2), "scale": scale(w), "zero": scale(w), "nbits": torch.tensor(4)},
        {"quant_method": "hqq"},
        ("hqq", "HQQ", ""),
    ),
    "torchao": (
        lambda w: {"weight:qdata": w.to(torch.int8), "weight:scale": scale(w)},
        {"quant_method": "torchao"},
        ("torchao", "torchao", ""),
    ),
    "quanto": (
        lambda w: {"weight._data": w.to(torch.int8), "weight._scale": scale(w)},
        {"quant_method": "quanto"},
        ("quanto", "quanto", ""),
    ),
    "bitnet": (
        lambda w: {"weight": packed(w, torch.uint8, 4), "weight_scale": torch.ones(1)},
        {"quant_method": "bitnet"},
        ("bitnet", "with scales", ""),
    ),
    "eetq": (
        lambda w: {"weight": w.to(torch.int8), "weight_scales": scale(w)},
        {"quant_method": "eetq"},
        ("eetq", "its config.json does not say how", ""),
    ),
    "quark": (
        lambda w: {"weight": w.to(torch.int8), "weight_scale": scale(w)},
        {"quant_method": "quark"},
        ("quark", "with scales", ""),
    ),
    "aqlm": (
        lambda w: {"codes": packed(w, torch.int16, 8), "codebooks": torch.ones(2, 4), "scales": scale(w)},
        {"quant_method": "aqlm"},
        ("aqlm", "AQLM|MLX", ""),
    ),
    "plain beside scales": (
        lambda w: {"weight": w, "weight_scale_inv": torch.ones(1, 1)},
        {"quant_method": "fp8"},
        ("fp8", "FP8 in blocks", ""),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_by_name(plain, tmp_path, kind):
    change, stated, (with_config, without, remedy) = KINDS[kind]
    for config, words in ((stated, with_config), ({}, without)):
        folder = rewrite(plain, change, tmp_path / f"x{len(config)}", quantization_config=config or "drop")
        with pytest.raises(formats.Quantised, match=rf"x\d+ is quantised \(({words}).*codes.*16-bit") as caught:
            changes(plain, folder)
        assert not config or remedy in str(caught.value)
        assert refused(changes, folder, plain) == str(caught.value)
        assert refused(pair, plain, folder) == refused(pair, folder, plain) == str(caught.value)
        if kind not in ("fp8 blocks", "plain beside scales") or not config:
            refused(load, folder, match=rf"x\d+ is quantised \(({words}).*does not run here: .*16-bit")


def raw(folder, dtype, bits):
    """Every projection of a model as zeros of a dtype that torch may not have, with MLX's companions."""
    entries, data = {}, b""
    for name, tensor in read_tensors(folder).items():
        body, kind, shape = tensor.contiguous().view(torch.uint8).numpy().tobytes(), "BF16", list(tensor.shape)
        if name.endswith("_proj.weight"):
            body, kind = bytes(bits * tensor.numel() // 8), dtype
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(body)]}
        data += body
    head = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)


@pytest.mark.parametrize(("dtype", "bits"), [*formats.ONLY_NAMED.items()])
def test_dtypes_that_nothing_computes_with_are_no_damage(plain, tmp_path, dtype, bits):
    folder = shutil.copytree(plain, tmp_path / "m")
    raw(folder, dtype, bits)
    with tensors.TensorFolder(folder) as stored:
        assert stored.shape(f"{LAYER}.weight") == (32, 32)
        refused(stored.get, f"{LAYER}.weight", match=f"dtype {dtype} are not read here")
    if dtype not in ("U64", "C64"):
        refused(changes, plain, folder, match=f"quantised .* is stored as {dtype}")


def test_mlx(plain, tmp_path):
    folder = rewrite(
        plain,
        lambda w: {"weight": packed(w, torch.uint32, 8), "scales": scale(w).half(), "biases": scale(w).half()},
        tmp_path / "mlx",
        quantization={"group_size": 64, "bits": 4},
        quantization_config={"group_size": 64, "bits": 4},
    )
    everywhere(plain, folder, "quantised \\(mlx\\).*U32.*mlx_lm.convert --hf-path .*mlx --dequantize", False)
    refused(pair, folder, plain, match="quantised \\(mlx\\)")
    refused(load, folder, match="does not run here: .*mlx_lm.convert")
    edit(folder, quantization="drop", quantization_config="drop")
    refused(changes, plain, folder, match="quantised \\(MLX\\)")


def test_pickled_codes(plain, tmp_path):
    """int8 of bitsandbytes before safetensors, and a shard of it behind an index."""
    change = KINDS["bnb int8"][0]
    folder = rewrite(plain, change, tmp_path / "m", quantization_config=KINDS["bnb int8"][1])
    held = read_tensors(folder)
    (folder / "model.safetensors").unlink()
    torch.save(held, folder / "pytorch_model.bin")
    refused(changes, plain, folder, match="bitsandbytes 8-bit.*int8")
    half = {name: tensor for name, tensor in held.items() if not name.endswith(("SCB", "weight_format"))}
    torch.save(half, folder / "pytorch_model-1.bin")
    (folder / "pytorch_model.bin").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(half, "pytorch_model-1.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    edit(folder, quantization_config="drop")
    refused(changes, plain, folder, match="quantised .*int8")  # only the tensors themselves say it


def test_objects_of_a_quantiser(plain, tmp_path):
    """torchao pickles tensors of a class of its own, which nothing here unpickles."""
    folder = shutil.copytree(plain, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Opaque()}, folder / "pytorch_model.bin")
    refused(changes, plain, folder, match="cannot be read as plain tensors")
    edit(folder, quantization_config={"quant_method": "torchao"})
    everywhere(plain, folder, r"m is quantised \(torchao\): its file holds codes.*16-bit")


class Opaque:
    pass


def test_shards_and_text_config(plain, tmp_path):
    folder = save_tiny("llama", tmp_path / "m", dtype="bfloat16", layers=2, shards=3)
    for file in folder.glob("*.safetensors"):
        held = {k: v.to(F8) if k.endswith("q_proj.weight") else v for k, v in load_file(file).items()}
        save_file(held, file, metadata={"format": "pt"})
    refused(changes, plain, folder, match="q_proj.weight is stored as F8_E4M3")
    assert formats.stated({"text_config": {"quantization_config": {"quant_method": "awq"}}}) == "awq"
    assert formats.stated({"compression_config": {"format": "x"}}) == "compression_config"
    assert formats.stated({"quantization_config": None}) is None and formats.stated({"quantization_config": {}}) is None


def test_what_is_no_code(plain, tmp_path):
    """Mixed 16 and 32 bits, masks of old GPT files, integer tables and counters."""
    extra = {
        "model.layers.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "model.position_ids": torch.ones(1, 4, dtype=torch.int32),
        "vision.num_batches_tracked": torch.tensor(3),
        "model.layers.0.mlp.tid2eid": torch.ones(4, 2, dtype=torch.int32),
    }
    held = {name: tensor.float() if "norm" in name else tensor for name, tensor in read_tensors(plain).items()}
    held |= {name: tensor.half() for name, tensor in held.items() if "k_proj" in name}
    folder = shutil.copytree(plain, tmp_path / "m")
    save_file(held | extra, folder / "model.safetensors")
    assert (
        formats.codes({name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in extra.items()})
        is None
    )
    assert changes(plain, folder)[0][0]["q_proj"].sum_abs == 0


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("unsloth/llama-3-8b-bnb-4bit", "unsloth/llama-3-8b"),
        ("unsloth/Qwen3-8B-unsloth-bnb-4bit", "unsloth/Qwen3-8B"),
        ("Qwen/Qwen3-8B-FP8@main", "Qwen/Qwen3-8B"),
        ("org/Llama-3.1-8B-Instruct-FP8-dynamic", "org/Llama-3.1-8B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
        ("org/m-quantized.w4a16", "org/m"),
        ("mlx-community/Qwen3-8B-4bit", "mlx-community/Qwen3-8B"),
        ("meta-llama/Llama-3.1-8B", None),
        ("org/dynamics", None),
    ],
)
def test_the_original_by_its_name(name, original):
    assert formats.original_of(name) == original


def test_left_over_quantization_config(plain, tmp_path, capsys):
    """A merge of QLoRA saves 16-bit weights beside the base's bitsandbytes settings: the weights count."""
    folder = save_tiny("llama", tmp_path / "m", seed=1, dtype="bfloat16", layers=2)
    truth, model = changes(plain, folder), load(folder)
    for method in ("bitsandbytes", "fp8", "gptq", "compressed-tensors"):
        edit(folder, quantization_config={"quant_method": method, "load_in_4bit": True})
        assert changes(plain, folder)[0][1]["up_proj"].sum_abs == truth[0][1]["up_proj"].sum_abs
        assert "files hold plain weights" in capsys.readouterr().out
        pair(plain, folder)
        again = load(folder)
        assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        assert not getattr(again, "is_quantized", False)


def fp8_blocks(folder, to):
    return rewrite(folder, KINDS["fp8 blocks"][0], to, quantization_config=KINDS["fp8 blocks"][1])


def test_fp8_runs_where_transformers_dequantises_it(plain, tmp_path, capsys):
    """The numbers are those of scale x code, in float32."""
    folder = fp8_blocks(plain, tmp_path / "fp8")
    truth = rewrite(plain, lambda w: {"weight": (w / 0.01).to(F8).float() * 0.01}, tmp_path / "truth")
    ids = torch.randint(3, 200, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert load(folder)(ids).logits.equal(load(truth)(ids).logits)
        assert "quantised weights (fp8)" in capsys.readouterr().out
        loading.load_model(refs.model(folder), torch.bfloat16, CPU)(ids)
        loading.load_model(refs.model(folder), torch.float64, CPU)(ids)


def test_the_remedy_of_fp8(tmp_path):
    """As the message says; without its last argument transformers writes codes of which config.json says nothing."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}  # whole blocks
    plain = save_tiny("llama", tmp_path / "m", dtype="bfloat16", layers=2, **sizes)
    folder = fp8_blocks(plain, tmp_path / "fp8")
    assert "FineGrainedFP8Config(dequantize=True), then save_pretrained" in refused(changes, plain, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FineGrainedFP8Config(dequantize=True))
    model.save_pretrained(tmp_path / "plain", save_original_format=False)
    truth = rewrite(plain, lambda w: {"weight": ((w / 0.01).to(F8).float() * 0.01).bfloat16()}, tmp_path / "truth")
    assert changes(truth, tmp_path / "plain")[0][1]["down_proj"].sum_abs == 0
    model.save_pretrained(tmp_path / "codes")
    assert "quantization_config" not in json.loads((tmp_path / "codes" / "config.json").read_text())
    refused(changes, plain, tmp_path / "codes", match="quantised \\(FP8 in blocks\\)")


def test_adapter_of_a_quantised_base(plain, tmp_path):
    from test_adapters import save_adapter

    base = rewrite(plain, bnb4, tmp_path / "llama-bnb-4bit", quantization_config=KINDS["bnb 4-bit"][1])
    adapter = save_adapter(plain, tmp_path / "run" / "checkpoint-5")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
    said = everywhere(
        plain, adapter, "which is quantised; write the 16-bit model .*by its name .*llama\\).*adapter_config", False
    )
    assert refused(load, adapter) == refused(pair, plain, adapter) == said


def test_bitnet_keeps_its_plain_weights(plain, tmp_path):
    """They are what is trained, and made codes of each time the model runs: compared as they are, run as BitNet's."""
    folder = shutil.copytree(plain, tmp_path / "m")
    bitnet = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    edit(folder, quantization_config=bitnet)
    assert changes(plain, folder)[0][0]["q_proj"].sum_abs == 0
    assert type(load(folder).model.layers[0].mlp.up_proj).__name__ == "AutoBitLinear"
