"""Weight change against models loaded whole, for every architecture, and what is refused."""

from __future__ import annotations

import json
import os
import random
import struct
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import ARCHITECTURES, read_tensors, save_run, save_tiny, tiny_model
from safetensors.torch import save_file

from cpt_utils.architectures import archs
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.measures import compare

# Of the tiny models: query and key/value heads, features per head, FFN neurons.
HEADS, KV, DIM, FFN = 4, 2, 8, 48


def reference(model, model_type: str, layer: int) -> dict[str, torch.Tensor]:
    """The projections of a loaded model, float64 [out, in], written down by hand for each architecture."""
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
    return {f"{name}_proj": weight.detach().double() for name, weight in found.items()}


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def close(a: float, b: float) -> bool:
    """Equal up to the float32 of differences and of sums over a row."""
    return a == pytest.approx(b, rel=1e-6, abs=1e-30)


def check_sums(sums, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """`sums` against the same from weights [groups, n]."""
    difference = theirs - ours
    assert (sums.n, sums.values.shape[1]) == (ours.shape[1], len(ours))
    found = [difference.abs(), difference**2, ours**2, theirs**2]
    # As every row, but neurons are kept in float32.
    torch.testing.assert_close(sums.values.double(), torch.stack(found).sum(2), rtol=2e-6, atol=1e-30)
    torch.testing.assert_close(sums.mean_abs.double(), difference.abs().mean(1), rtol=2e-6, atol=0)
    torch.testing.assert_close(sums.relative.double(), difference.norm(dim=1) / ours.norm(dim=1), rtol=2e-6, atol=0)
    cosine = torch.nn.functional.cosine_similarity(ours, theirs)
    torch.testing.assert_close(1 - sums.cosine_distance, cosine, rtol=0, atol=2e-6)


def check_change(change, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """A projection's numbers against those of weights [out, in] in float64."""
    difference = theirs - ours
    assert change.n == difference.numel()
    assert close(change.sum_abs, difference.abs().sum().item())
    assert close(change.mean_abs, difference.abs().mean().item())
    assert close(change.sum_sq, difference.pow(2).sum().item())
    assert close(change.base_sq, ours.pow(2).sum().item())
    assert close(change.ckpt_sq, theirs.pow(2).sum().item())
    assert close(change.max_abs, difference.abs().max().item())
    assert close(change.relative, (difference.norm() / ours.norm()).item())
    cosine = torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0).item()
    assert change.cosine == pytest.approx(cosine, abs=1e-6)
    assert change.dot == pytest.approx((ours * theirs).sum().item(), abs=1e-6 * (ours.norm() * theirs.norm()).item())
    if change.rows is not None:
        torch.testing.assert_close(change.rows, difference.abs().sum(1), rtol=1e-6, atol=1e-30)
        torch.testing.assert_close(change.row_means, difference.abs().mean(1), rtol=1e-6, atol=1e-30)


def check_details(name: str, change, ours: torch.Tensor, theirs: torch.Tensor, kv_heads: int) -> None:
    """Heads and neurons of a projection: output features, but inputs of o and down."""
    if name in ("o_proj", "down_proj"):
        ours, theirs = ours.T, theirs.T
    if name in archs.FFN:
        assert change.heads is None
        check_sums(change.neurons, ours, theirs)
    else:
        heads = kv_heads if name in ("k_proj", "v_proj") else HEADS
        assert change.neurons is None
        check_sums(change.heads, *(side.reshape(heads, -1) for side in (ours, theirs)))


def kv_heads(model_type: str) -> int:
    return HEADS if model_type in ("gpt2", "gpt_neox") else KV


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_equals_loading_both_models_whole(model_type, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "CHUNK", 32 * 5)  # five rows of width 32 at a time: parts end inside blocks
    base = save_tiny(model_type, tmp_path / "base", seed=0)
    run = [save_tiny(model_type, tmp_path / "run" / f"checkpoint-{step}", seed=step, shards=step) for step in (1, 2)]
    found = compare.changes(refs.model(base), refs.run(tmp_path / "run"), rows=archs.PROJECTIONS, details=True)
    assert list(found) == [1, 2]
    whole = load(base)
    for step, folder in zip(found, run, strict=True):
        trained = load(folder)
        assert sorted(found[step]) == [0, 1, 2]
        for layer, changes in found[step].items():
            ours, theirs = (reference(model, model_type, layer) for model in (whole, trained))
            assert sorted(changes) == sorted(ours)
            for name, change in changes.items():
                check_change(change, ours[name], theirs[name])
                assert len(change.rows) == len(ours[name])
                check_details(name, change, ours[name], theirs[name], kv_heads(model_type))
    plain = compare.changes(refs.model(base), refs.run(tmp_path / "run"))
    for step, layer, name in ((1, 0, "q_proj"), (2, 2, "down_proj")):
        kept = {"rows": None, "heads": None, "neurons": None}
        assert asdict(plain[step][layer][name]) == asdict(found[step][layer][name]) | kept


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "bfloat16"), ("float16", "bfloat16"), ("float32", "float32"), ("float64", "float32")]
)
def test_dtypes_and_small_changes(model_type, dtypes, tmp_path):
    model = tiny_model(model_type, dtype="float64")
    base = save_tiny(model_type, tmp_path / "base", model=model.to(getattr(torch, dtypes[0])))
    model = tiny_model(model_type, dtype="float64")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    other = save_tiny(model_type, tmp_path / "checkpoint-1", model=model.to(getattr(torch, dtypes[1])))
    found = compare.changes(refs.model(base), refs.run(other), details=True)[1]
    whole, trained = load(base), load(other)
    assert next(whole.parameters()).dtype == getattr(torch, dtypes[0])
    for layer, changes in found.items():
        ours, theirs = (reference(side, model_type, layer) for side in (whole, trained))
        for name, change in changes.items():
            check_change(change, ours[name], theirs[name])
            check_details(name, change, ours[name], theirs[name], kv_heads(model_type))
            # Where the cosine is nearly 1 its distance from 1 still has three digits.
            a, b = ours[name].flatten(), theirs[name].flatten()
            apart = ((a / a.norm() - b / b.norm()) ** 2).sum().item() / 2
            assert change.cosine_distance == pytest.approx(apart, rel=1e-3) and apart < 1e-3


@pytest.mark.parametrize("chunk", [1, 100, 1 << 19])
@pytest.mark.parametrize("sizes", [{"hidden_size": 36, "intermediate_size": 37}, {"intermediate_size": 1}])
def test_odd_shapes(chunk, sizes, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "CHUNK", chunk)
    base = save_tiny("llama", tmp_path / "base", dtype="bfloat16", layers=1, tokenizer=False, **sizes)
    other = save_tiny("llama", tmp_path / "checkpoint-1", 1, "bfloat16", layers=1, tokenizer=False, **sizes)
    ours, theirs = (reference(load(folder), "llama", 0) for folder in (base, other))
    found = compare.changes(refs.model(base), refs.run(other), rows=archs.PROJECTIONS, details=True)[1][0]
    for name, change in found.items():
        check_change(change, ours[name], theirs[name])
        check_details(name, change, ours[name], theirs[name], KV)


def plain(found) -> dict:
    """The numbers of a comparison, for tests of equal bits."""
    numbers = {}
    for step, layers in found.items():
        for layer, changes in layers.items():
            for name, change in changes.items():
                for key, value in asdict(change).items():
                    value = value["values"] if isinstance(value, dict) else value
                    numbers[step, layer, name, key] = value.tolist() if torch.is_tensor(value) else value
    return numbers


def test_threads_and_their_timing_change_no_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "CHUNK", 32 * 7)
    base = save_tiny("phi3", tmp_path / "base", dtype="bfloat16")
    save_run("phi3", tmp_path / "run", (1, 2), dtype="float16")
    fill, at_work, read = compare._Reader.fill, set(), []

    def uneven(reader, buffer, position):
        at_work.add(threading.get_ident())
        read.append(buffer.nbytes)
        assert torch.get_num_threads() == 1
        time.sleep(random.random() / 500)
        fill(reader, buffer, position)

    monkeypatch.setattr(compare._Reader, "fill", uneven)
    run = refs.run(tmp_path / "run")
    stored = sum(
        tensor.nbytes
        for folder in (base, *(tmp_path / "run").iterdir())
        for name, tensor in read_tensors(folder).items()
        if "_proj" in name
    )
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            at_work.clear()
            read.clear()
            found.append(plain(compare.changes(refs.model(base), run, rows=("gate_proj", "o_proj"), details=True)))
            assert len(at_work) == threads == torch.get_num_threads()
            assert sum(read) == stored  # the base's once for all checkpoints
    finally:
        torch.set_num_threads(before)
    assert all(other == found[0] for other in found[1:])


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


@pytest.mark.parametrize("n_checkpoints", [1, 3])
def test_memory_depends_on_neither_size_nor_number(n_checkpoints, tmp_path):
    """68 MB of weights a model, and buffers of 5 MB for each thread."""
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "layers": 1, "vocab_size": 8}
    model = tiny_model("llama", dtype="bfloat16", **sizes)
    for name in ("base", *(f"run/checkpoint-{step}" for step in range(n_checkpoints))):
        save_tiny("llama", tmp_path / name, model=model, tokenizer=False)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 5e7
    compare.changes(refs.model(tmp_path / "base"), refs.run(tmp_path / "base"))  # imports and thread pools
    before, most, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    compare.changes(refs.model(tmp_path / "base"), refs.run(tmp_path / "run"))
    done.set()
    watcher.join()
    assert most[0] > 0 and most[0] - before < 8e6 * torch.get_num_threads() + 1e7


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_base_against_itself_is_exactly_zero(model_type, tmp_path):
    base = save_tiny(model_type, tmp_path / "base", dtype="bfloat16")
    found = compare.changes(refs.model(base), refs.run(base))
    assert list(found) == [0]
    for changes in found[0].values():
        for change in changes.values():
            assert change.n > 0 and change.base_sq > 0
            assert (change.sum_abs, change.sum_sq, change.max_abs, change.relative) == (0, 0, 0, 0)
            assert (change.cosine, change.dot) == (1, change.base_sq)


def test_only_some_projections(tmp_path):
    base = save_tiny("phi3", tmp_path / "base")
    other = save_tiny("phi3", tmp_path / "checkpoint-3", seed=1)
    whole = compare.changes(refs.model(base), refs.run(other))
    some = compare.changes(refs.model(base), refs.run(other), projections=("gate_proj", "k_proj"), rows=("gate_proj",))
    for layer, changes in some[3].items():
        assert sorted(changes) == ["gate_proj", "k_proj"]
        assert len(changes["gate_proj"].rows) == FFN and changes["k_proj"].rows is None
        for name, change in changes.items():
            same = whole[3][layer][name]
            assert (change.n, change.sum_abs, change.max_abs) == (same.n, same.sum_abs, same.max_abs)
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
    expected = (theirs[name].double() - ours[name].double()).abs().mean().item()
    assert close(found[1][1]["down_proj"].mean_abs, expected)
    rounded = (theirs[name] - ours[name].bfloat16()).double().abs().mean().item()
    assert abs(rounded - expected) > 2e-6 * expected  # the trap: a difference taken in bfloat16 is another number


def test_extended_vocabulary_is_named_and_left_out(tmp_path):
    base = save_tiny("llama", tmp_path / "base", vocab_size=272)
    other = save_tiny("llama", tmp_path / "checkpoint-1", seed=1, vocab_size=300)
    assert compare.diff_tensors(refs.model(base), refs.model(other)) == {
        "lm_head.weight": "[272, 32] in the base, [300, 32] in the checkpoint",
        "model.embed_tokens.weight": "[272, 32] in the base, [300, 32] in the checkpoint",
    }
    assert compare.changes(refs.model(base), refs.run(other))[1][2]["q_proj"].mean_abs > 0
    same = save_tiny("llama", tmp_path / "checkpoint-2", seed=1)
    assert compare.diff_tensors(refs.model(base), refs.model(same)) == {}


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


def test_files_that_are_not_aligned(tmp_path):
    """The format asks for no padding of its header, so tensors may start at odd bytes."""
    base = save_tiny("llama", tmp_path / "base", dtype="bfloat16")
    other = save_tiny("llama", tmp_path / "checkpoint-1", seed=1, dtype="bfloat16")
    before = compare.changes(refs.model(base), refs.run(other))
    for folder, more in ((base, 1), (other, 3)):
        file = folder / "model.safetensors"
        data = file.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        file.write_bytes(struct.pack("<Q", length + more) + data[8 : 8 + length] + b" " * more + data[8 + length :])
    assert compare.changes(refs.model(base), refs.run(other)) == before


def test_weights_whose_squares_are_beyond_float32(tmp_path):
    for name, seed in (("base", 0), ("checkpoint-1", 1)):
        model = tiny_model("llama", seed=seed, layers=1, dtype="bfloat16")
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1e30)
        save_tiny("llama", tmp_path / name, model=model)
    found = compare.changes(refs.model(tmp_path / "base"), refs.run(tmp_path / "checkpoint-1"), details=True)[1][0]
    ours, theirs = (reference(load(tmp_path / name), "llama", 0) for name in ("base", "checkpoint-1"))
    for name, change in found.items():
        check_change(change, ours[name], theirs[name])
    assert found["up_proj"].sum_sq > 1e50


def test_all_zeros_have_no_cosine(tmp_path):
    for name, seed in (("base", 0), ("checkpoint-1", 1)):
        model = tiny_model("llama", seed=seed, layers=1)
        with torch.no_grad():
            zeros = model.model.layers[0].mlp.up_proj if seed else model.model.layers[0].mlp.down_proj
            zeros.weight.zero_()
        save_tiny("llama", tmp_path / name, model=model)
    found = compare.changes(refs.model(tmp_path / "base"), refs.run(tmp_path / "checkpoint-1"))[1][0]
    assert (found["up_proj"].cosine, found["up_proj"].relative) == (None, 1)
    assert (found["down_proj"].cosine, found["down_proj"].relative) == (None, None)


def test_a_model_that_is_only_scaled_has_a_cosine_of_one(tmp_path):
    for name, factor in (("base", 1), ("checkpoint-1", 1.1)):
        model = tiny_model("llama", layers=1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        save_tiny("llama", tmp_path / name, model=model)
    found = compare.changes(refs.model(tmp_path / "base"), refs.run(tmp_path / "checkpoint-1"), details=True)[1][0]
    for change in found.values():
        assert 1 - 1e-6 < change.cosine <= 1
        assert ((change.heads or change.neurons).cosine_distance >= 0).all()


def test_damage_is_found_while_other_threads_are_reading(tmp_path, monkeypatch):
    """An error in one tensor ends the others' work, too: nobody reads the thousands of rows behind it."""
    monkeypatch.setattr(compare, "CHUNK", 32)  # a row at a time
    sizes = {"layers": 1, "intermediate_size": 2000}
    base = save_tiny("llama", tmp_path / "base", **sizes)
    model = tiny_model("llama", seed=1, **sizes)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0, 0] = float("nan")
    other = save_tiny("llama", tmp_path / "checkpoint-1", model=model)
    fill, read = compare._Reader.fill, []

    def slow(reader, buffer, position):
        read.append(position)
        time.sleep(0.0005)
        fill(reader, buffer, position)

    monkeypatch.setattr(compare._Reader, "fill", slow)
    before, n_threads = torch.get_num_threads(), threading.active_count()
    torch.set_num_threads(4)
    try:
        with pytest.raises(InputError, match=r"checkpoint-1: tensor model.layers.0.self_attn.k_proj.weight holds NaN"):
            compare.changes(refs.model(base), refs.run(other))
        assert torch.get_num_threads() == 4 and threading.active_count() == n_threads
        assert len(read) < 2000
    finally:
        torch.set_num_threads(before)


def test_a_file_that_is_cut_while_it_is_read(tmp_path, monkeypatch):
    base = save_tiny("llama", tmp_path / "base")
    other = save_tiny("llama", tmp_path / "checkpoint-1", seed=1)
    fill = compare._Reader.fill

    def late(reader, buffer, position):
        file = other / "model.safetensors"
        os.truncate(file, min(file.stat().st_size, whole - 50_000))
        fill(reader, buffer, position)

    whole = (other / "model.safetensors").stat().st_size
    monkeypatch.setattr(compare._Reader, "fill", late)
    before = torch.get_num_threads()
    with pytest.raises(InputError, match=r"checkpoint-1/model.safetensors was cut short while it was read"):
        compare.changes(refs.model(base), refs.run(other))
    assert torch.get_num_threads() == before


def test_an_adapter_is_merged_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "CHUNK", 32 * 5)
    base = save_tiny("llama", tmp_path / "base", dtype="bfloat16")
    adapter = tmp_path / "run" / "checkpoint-4"
    adapter.mkdir(parents=True)
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["up_proj"]}))
    name, generator = "model.layers.1.mlp.up_proj", torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 32, generator=generator), torch.randn(FFN, 2, generator=generator) * 0.05
    stem = f"base_model.model.{name}"
    save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    found = compare.changes(refs.model(base), refs.run(tmp_path / "run"), details=True)[4]
    ours = read_tensors(base)[f"{name}.weight"]
    theirs = (ours.float() + 2 * b @ a).bfloat16()
    check_change(found[1]["up_proj"], ours.double(), theirs.double())
    check_details("up_proj", found[1]["up_proj"], ours.double(), theirs.double(), KV)
    moved = [(layer, key) for layer, changes in found.items() for key, change in changes.items() if change.sum_abs]
    assert moved == [(1, "up_proj")]


def experts_of(model, layer: int) -> dict[str, torch.Tensor] | None:
    """A MoE layer's weights as loaded, all experts' rows under one another, float64; None for a dense layer."""
    mlp = model.model.layers[layer].mlp
    if not hasattr(mlp, "experts"):
        return None
    gate, up = mlp.experts.gate_up_proj.detach().double().chunk(2, dim=1)
    found = {"gate_proj": gate, "up_proj": up, "down_proj": mlp.experts.down_proj.detach().double()}
    return found | {"router": mlp.gate.weight.detach().double()}


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
def test_experts_and_their_router(model_type, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "CHUNK", 32 * 5)
    base = save_tiny(model_type, tmp_path / "base", dtype="bfloat16")
    other = save_tiny(model_type, tmp_path / "checkpoint-1", seed=1, shards=2, dtype="bfloat16")
    found = compare.changes(refs.model(base), refs.run(other), rows=archs.PROJECTIONS, details=True)[1]
    whole, trained = load(base), load(other)
    sparse = 0
    for layer, changes in found.items():
        ours, theirs = (experts_of(model, layer) for model in (whole, trained))
        assert ("router" in changes) == (ours is not None)
        if ours is None:
            ours, theirs = (reference(model, model_type, layer) for model in (whole, trained))
            for name in archs.FFN:
                check_change(changes[name], ours[name], theirs[name])
                check_details(name, changes[name], ours[name], theirs[name], KV)
            continue
        sparse += 1
        assert set(changes) == {*archs.PROJECTIONS, "router"}
        check_change(changes["router"], ours["router"], theirs["router"])
        for name in archs.FFN:
            check_change(changes[name], ours[name].flatten(0, 1), theirs[name].flatten(0, 1))
            # Neurons are the gate's and up's rows and down's columns, expert by expert.
            sides = [side[name].mT if name == "down_proj" else side[name] for side in (ours, theirs)]
            check_sums(changes[name].neurons, *(side.flatten(0, 1) for side in sides))
    assert sparse == (2 if model_type == "qwen3_moe" else 3)
    alone = compare.changes(refs.model(base), refs.run(other), projections=["router", "q_proj"])[1]
    assert set(alone[0]) == {"q_proj", "router"} and alone[0]["router"].sum_abs == found[0]["router"].sum_abs
    assert set(compare.changes(refs.model(base), refs.run(other), projections=["q_proj"])[1][0]) == {"q_proj"}


def test_long_rows(tmp_path):
    """The FFN of a 70B model: float32 norms of whole rows would be off by 2e-6."""
    folders = [save_tiny("llama", tmp_path / f"{i}", seed=i, layers=1, intermediate_size=28672) for i in (0, 1)]
    base, other = (read_tensors(folder)["model.layers.0.mlp.down_proj.weight"].double() for folder in folders)
    change = compare.changes(refs.model(folders[0]), refs.run(folders[1]))[0][0]["down_proj"]
    for value, truth in ((change.base_sq, base.square().sum()), (change.sum_sq, (other - base).square().sum())):
        assert value == pytest.approx(float(truth), rel=3e-7)
