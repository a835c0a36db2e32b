"""Reading tensors from model folders: what is there, and one clear line for what is damaged."""

from __future__ import annotations

import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import read_tensors, save_tiny
from safetensors.torch import load_file, save_file

from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import formats, headers, opening, refs, tensors
from cpt_utils.checkpoints.tensors import TensorFolder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_reads_what_is_there(tmp_path, shards, format):
    truth = read_tensors(save_tiny("qwen2", tmp_path / "truth", dtype="bfloat16"))
    folder = save_tiny("qwen2", tmp_path / "model", dtype="bfloat16", shards=shards, format=format)
    for where in (folder, str(folder), refs.model(str(folder))):
        with TensorFolder(where) as stored:
            assert sorted(stored.names()) == sorted(truth)
            for name, tensor in truth.items():
                assert name in stored and stored.shape(name) == tuple(tensor.shape)
                assert stored.dtype(name) == torch.bfloat16
                assert torch.equal(stored.get(name), tensor)
                assert torch.equal(stored.rows(name, 2, 5), tensor[2:5])
            with pytest.raises(InputError, match="no tensor nothing"):
                stored.get("nothing")


def test_one_shard_open_and_tensors_outlive_it(tmp_path):
    folder = save_tiny("llama", tmp_path / "model", shards=3)
    with TensorFolder(folder) as stored:
        first = stored.get(stored.names()[0])
        copy = first.clone()
        for name in stored.names():
            stored.get(name)
        assert stored._open[0] == stored.shard_of(stored.names()[-1])
    assert torch.equal(first, copy)


def test_every_dtype_and_odd_alignment(tmp_path):
    """Shapes () and (0, 3), bytes that are not aligned to their dtype, and every dtype of the format."""
    held = {name: torch.arange(6).view(2, 3).to(headers.torch_dtype(name)) for name in headers.DTYPES}
    held |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    (tmp_path / "m").mkdir()
    save_file(held, tmp_path / "m" / "model.safetensors")
    raw = (tmp_path / "m" / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    odd = raw[8 : 8 + length] + b" "
    (tmp_path / "m" / "model.safetensors").write_bytes(struct.pack("<Q", length + 1) + odd + raw[8 + length :])
    with TensorFolder(tmp_path / "m") as stored:
        for name, tensor in held.items():
            assert stored.get(name).dtype == tensor.dtype and stored.shape(name) == tuple(tensor.shape)
            assert torch.equal(stored.get(name).double(), tensor.double())


def test_writing_into_a_tensor_leaves_the_file_alone(tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    with TensorFolder(folder) as stored:
        stored.get("model.norm.weight").fill_(7)
    assert (folder / "model.safetensors").read_bytes() == before


def refused(folder, match):
    with pytest.raises(InputError, match=match) as caught, TensorFolder(folder) as stored:
        for name in stored.names():
            stored.get(name)
    assert "\n" not in str(caught.value)


def test_missing_and_empty_folders(tmp_path):
    refused(tmp_path / "nowhere", "no such folder")
    refused(tmp_path, "holds no weights")
    (tmp_path / "checkpoint-5").mkdir()
    refused(tmp_path, "only checkpoints; name one of them")


@pytest.mark.parametrize("keep", [0, 7, 8, 200, -1000, -1])
def test_truncated(tmp_path, keep):
    file = save_tiny("llama", tmp_path / "m") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(tmp_path / "m", "cut short")


def test_bytes_too_many(tmp_path):
    file = save_tiny("llama", tmp_path / "m") / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"more")
    refused(tmp_path / "m", "longer than its header says")


def header_of(file):
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda h: h["model.norm.weight"].update(shape=[64]), "128 bytes for a tensor of 256"),
        (lambda h: h["model.norm.weight"].update(shape=[-32]), "negative or broken"),
        (lambda h: h["model.norm.weight"].update(dtype="F128"), "dtype F128, which is not one of"),
        (lambda h: h["model.norm.weight"].update(data_offsets=[0, 128]), "the header places"),
        (
            lambda h: h["model.norm.weight"].update(data_offsets=[1 << 60, (1 << 60) + 128]),
            "the header places",
        ),
        (lambda h: h["model.norm.weight"].pop("shape"), "does not describe tensors"),
        (lambda h: h.update({"x": "y"}), "does not describe tensors"),
        (lambda h: h["model.norm.weight"].update(shape=[True, 32]), "negative or broken"),
        (lambda h: h["model.norm.weight"].update(shape=[1] * 70 + [32]), "negative or broken"),
        (lambda h: h["model.norm.weight"].update(shape="32"), "negative or broken"),
        (lambda h: h["model.norm.weight"].update(shape=[1 << 62, 1 << 62]), "bytes for a tensor of"),
        (lambda h: h["model.norm.weight"].update(data_offsets=[0, 128, 256]), "does not describe tensors"),
        (lambda h: h.update({"__metadata__": [1]}), "does not describe tensors"),
        (lambda h: h.update({"twin": h["model.norm.weight"]}), "the header places"),
    ],
)
def test_headers_that_lie(tmp_path, change, match):
    file = save_tiny("llama", tmp_path / "m") / "model.safetensors"
    header, data = header_of(file)
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    refused(tmp_path / "m", match)


def with_header(file, text, data=b""):
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_headers_that_are_read_in_two_ways(tmp_path):
    """A key that comes twice: readers differ in which one counts, also where both fit the bytes."""
    one = b'{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
    with_header(tmp_path / "model.safetensors", b'{"w":' + one + b',"w":' + one + b"}", b"ab")
    refused(tmp_path, "damaged safetensors header")
    with_header(tmp_path / "model.safetensors", b'{"w":' + one + b"}", b"ab")
    with TensorFolder(tmp_path) as stored:
        assert stored.get("w").tolist() == [97, 98]


def test_headers_that_are_huge_or_deep(tmp_path):
    file = tmp_path / "model.safetensors"
    for length in (1 << 63, (1 << 64) - 1, 1 << 40, 100_000_001):
        file.write_bytes(struct.pack("<Q", length) + b"{}")
        refused(tmp_path, "less than its header")
    with open(file, "wb") as sparse:  # long enough for its header, which is longer than the format allows
        sparse.write(struct.pack("<Q", 100_000_001))
        sparse.truncate(200_000_000)
    refused(tmp_path, "less than its header")
    with_header(file, b"[" * 100_000)
    refused(tmp_path, "damaged safetensors header")
    with_header(file, b'{"w":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,2]}}')
    refused(tmp_path, "damaged safetensors header")


def test_header_that_is_no_json(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"{{{{" + b"data")
    refused(tmp_path, "damaged safetensors header")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")
    refused(tmp_path, "does not describe tensors")


def test_index_and_shards(tmp_path):
    folder = save_tiny("llama", tmp_path / "m", shards=3)
    index = folder / formats.INDEX
    good = json.loads(index.read_text())

    def write(**changes):
        index.write_text(json.dumps(good | {"weight_map": good["weight_map"] | changes}))

    write(extra="model-00004-of-00003.safetensors")
    refused(folder, "names the shard model-00004-of-00003.safetensors, which is not there")
    for outside in (
        "../m/model-00001-of-00003.safetensors", "/etc/passwd", "/x.safetensors", "sub/model.safetensors", "evil.bin",
        "a\\b.safetensors", "a\0.safetensors", "a\n.safetensors", "..", "", ".safetensors/", 7, None, ["x"], {"x": 1},
    ):  # fmt: skip
        write(extra=outside)
        refused(folder, "not a .safetensors file of its own folder|not an index of shards")
    write(extra="model-00002-of-00003.safetensors")
    refused(folder, "places extra in model-00002-of-00003.safetensors, which does not hold it")
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}'):
        index.write_text(text)
        refused(folder, "not an index of shards|not a .safetensors file|names no shards")
    index.write_text(
        '{"weight_map": {"w": "model-00001-of-00003.safetensors", "w": "model-00002-of-00003.safetensors"}}'
    )
    refused(folder, "not an index of shards")
    index.write_text('{"weight_map": ' + "[" * 100_000)
    refused(folder, "not an index of shards")
    write(extra="a" * 5000 + ".safetensors")
    refused(folder, "cannot be read: File name too long")
    write()
    held = load_file(folder / "model-00002-of-00003.safetensors")
    save_file(held | {"left.over": torch.zeros(2)}, folder / "model-00002-of-00003.safetensors")
    with TensorFolder(folder) as stored:  # a tensor the index does not name is not part of the model
        assert sorted(stored.names()) == sorted(good["weight_map"])


def test_single_file_beside_an_index(tmp_path, capsys):
    folder = save_tiny("llama", tmp_path / "m", shards=2)
    whole = read_tensors(folder)
    save_file(whole, folder / "model.safetensors")
    with TensorFolder(folder) as stored:  # the same twice: no question
        assert stored.files == ["model.safetensors"]
    name = "model.norm.weight"
    save_file(whole | {name: whole[name] + 1}, folder / "model.safetensors")
    refused(folder, "differ .model.norm.weight.: remove model.safetensors")
    save_file({n: t for n, t in whole.items() if n != name}, folder / "model.safetensors")
    refused(folder, "loaders take the first")
    save_file(whole, folder / "model.safetensors")
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    with TensorFolder(folder) as stored:
        assert stored.files == ["model.safetensors"]
    assert "shards that do not exist" in capsys.readouterr().err


def test_shards_that_are_no_files(tmp_path):
    folder = save_tiny("llama", tmp_path / "m", shards=2)
    shard = folder / "model-00001-of-00002.safetensors"
    shard.unlink()
    os.mkfifo(shard)  # would block whoever opens it
    refused(folder, "which is not there")
    shard.unlink()
    shard.mkdir()
    refused(folder, "which is not there")
    os.mkfifo(tmp_path / "model.safetensors")
    refused(tmp_path, "holds no weights")


def test_links(tmp_path):
    """Weights on another disk, linked into a model folder, and a folder under another name, are the model; a link that
    leads nowhere is a missing file."""
    other = save_tiny("llama", tmp_path / "other")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to("../other/model.safetensors")
    (tmp_path / "alias").symlink_to(folder)
    for path in (folder, tmp_path / "alias"):
        with TensorFolder(path) as stored:
            assert "model.norm.weight" in stored
    (other / "model.safetensors").unlink()
    refused(folder, "holds no weights")


def test_several_threads_read_one_folder(tmp_path):
    folder = save_tiny("llama", tmp_path / "m", shards=3)
    truth = read_tensors(folder)
    with TensorFolder(folder) as stored, ThreadPoolExecutor(4) as threads:
        for name, tensor in zip(list(truth) * 20, threads.map(stored.get, list(truth) * 20), strict=True):
            assert torch.equal(tensor, truth[name])


def test_no_code_of_a_model_folder_is_run(tmp_path):
    """Files that name code of their own: the reader reads tensors, the loader refuses, nothing is executed."""
    from cpt_utils.models import loading

    folder = save_tiny("llama", tmp_path / "m")
    code = f"open({str(tmp_path / 'executed')!r}, 'w')\n"
    (folder / "modeling_evil.py").write_text(code + "class Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": names}))
    with opening.open_folder(folder) as stored:
        assert "model.norm.weight" in stored
    ref = refs.model(folder)
    with pytest.raises(InputError, match="cannot be loaded"):
        loading.load_model(ref, torch.float32, torch.device("cpu"))
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names}))  # a known type: its own code is used
    assert type(loading.load_model(ref, torch.float32, torch.device("cpu"))).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "executed").exists()


def test_safetensors_win_over_bin(tmp_path):
    folder = save_tiny("llama", tmp_path / "m")
    torch.save({"model.norm.weight": torch.zeros(32)}, folder / "pytorch_model.bin")
    with TensorFolder(folder) as stored:
        assert stored.kind == "safetensors" and not torch.equal(stored.get("model.norm.weight"), torch.zeros(32))


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("exit 1",)


def test_bin_runs_no_code(tmp_path):
    torch.save({"w": torch.zeros(2), "x": Evil()}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "cannot be read as plain tensors")
    torch.save({"w": torch.zeros(2), "step": 3}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "more than plain tensors")
    torch.save({"w": torch.ones(1).expand(1 << 40)}, tmp_path / "pytorch_model.bin")  # a terabyte in a kilobyte
    refused(tmp_path, "more than plain tensors")
    torch.save({"w": torch.ones(3, 3).to_sparse()}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "more than plain tensors|cannot be read as plain tensors")
    torch.save({3: torch.ones(2)}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "more than plain tensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04 broken")
    refused(tmp_path, "cannot be read as plain tensors")
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with TensorFolder(tmp_path) as stored:
        assert torch.equal(stored.get("w"), torch.ones(2))


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (["global_step15/mp_rank_00_model_states.pt", "zero_to_fp32.py"], "zero_to_fp32.py .* --safe_serialization"),
        (["pytorch_model_fsdp_0/__0_0.distcp"], "accelerate merge-weights .*pytorch_model_fsdp_0"),
        (["__0_0.distcp", ".metadata"], "accelerate merge-weights"),
        (["adapter_config.json", "adapter_model.safetensors"], "only a PEFT adapter"),
        (["model.gguf"], "the format of llama.cpp"),
    ],
)
def test_other_kinds_of_folders(tmp_path, files, match):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"x")
    refused(tmp_path, match)


def test_chunks_and_numbers():
    assert list(tensors.chunks(10, 100, 300)) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert list(tensors.chunks(2, 1000, 300)) == [(0, 1), (1, 2)]
    assert list(tensors.chunks(0, 1000)) == []


@pytest.mark.parametrize("name", [n for n in headers.DTYPES if n[0] in "FB" and n != "BOOL"])
def test_is_finite(name):
    dtype = headers.torch_dtype(name)
    fine = torch.linspace(-3, 3, 50).to(dtype)
    assert tensors.is_finite(fine) and tensors.is_finite(fine[:0]) and tensors.is_finite(torch.tensor(1).to(dtype))
    for bad in (float("nan"), float("inf"), float("-inf")):
        if (dtype == torch.float8_e4m3fn and bad != bad) or dtype != torch.float8_e4m3fn:
            spoiled = fine.clone()
            spoiled[17] = bad
            assert not tensors.is_finite(spoiled)
    assert tensors.is_finite(torch.arange(5))
