"""Token-id files: what is written is read, memory-mapped, and a file of something else is refused in one line."""

from __future__ import annotations

import json

import pytest
import torch

from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.measures import tokenids


def write(path, ids, **facts):
    header = results.header(tokenids.SCHEMA, **({"language": "gle_Latn", "tokenizer": "t", "limit": None} | facts))
    tokenids.write(path, ids, {"complete": True}, header)
    return path


def refused(message, *args, **kwargs):
    with pytest.raises(InputError, match=message) as error:
        tokenids.read(*args, **kwargs)
    assert "\n" not in str(error.value)


def test_names():
    assert tokenids.file_name("ga", "meta-llama/Llama-2-7b-hf") == "oscar.ga.train.meta-llama_Llama-2-7b-hf"
    assert tokenids.sidecar("a/oscar.ga.train.v1.5").name == "oscar.ga.train.v1.5.json"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_what_is_written_is_read(tmp_path, dtype, capsys):
    ids = torch.randint(0, 300, (5000,), generator=torch.Generator().manual_seed(0), dtype=dtype)
    path = write(tmp_path / "out" / "oscar.ga.train.m", ids, vocabulary_sha256="ids:abc")
    found, facts = tokenids.read(path, vocab_size=300, vocabulary_sha256="ids:abc")
    assert found.dtype == dtype and torch.equal(found, ids)
    assert (facts["n_tokens"], facts["complete"], facts["language"]) == (5000, True, "gle_Latn")
    assert torch.equal(torch.load(path, weights_only=True), ids), "other readers get the bare tensor"
    assert capsys.readouterr().err == ""
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, path.name + ".json"]


def test_same_ids_same_bytes_whatever_the_name_and_storage(tmp_path):
    ids = torch.arange(100, dtype=torch.int32)
    first = write(tmp_path / "a" / "oscar.ga.train.m", ids).read_bytes()
    assert write(tmp_path / "oscar.en.train.n", torch.from_numpy(ids.numpy().copy())).read_bytes() == first


def test_a_bare_tensor_is_read_with_one_warning(tmp_path, capsys):
    for new in (True, False):  # torch's old format cannot be memory-mapped
        torch.save(torch.arange(10), tmp_path / "ids", _use_new_zipfile_serialization=new)
        found, facts = tokenids.read(tmp_path / "ids", vocab_size=10, vocabulary_sha256="ids:abc")
        assert found.tolist() == list(range(10)) and facts == {}
        assert capsys.readouterr().err.count("taken on trust") == 1


def test_what_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "ids"
    refused("ids does not exist", path)
    refused("is a folder", tmp_path)
    path.write_bytes(b"")
    refused("cannot be read as a tensor", path)
    path.write_bytes(b"no tensor" * 20)
    refused("cannot be read as a tensor", path)
    for value, message in (
        ({"ids": torch.arange(3)}, "holds a dict"),
        (torch.zeros(3), r"a float32 tensor of shape \[3\]"),
        (torch.zeros(3, dtype=torch.bool), "a bool tensor"),
        (torch.zeros(2, 3, dtype=torch.int32), r"int32 tensor of shape \[2, 3\]"),
        (torch.zeros(0, dtype=torch.int32), "holds no token ids"),
        (torch.tensor([3, -1]), "the negative id -1"),
    ):
        torch.save(value, path)
        refused(message, path)
    monkeypatch.setattr(tokenids, "_CHUNK", 4)
    ids = torch.arange(10, dtype=torch.int32)
    write(path, ids, vocabulary_sha256="ids:abc")
    refused("holds the id 7, but the model's vocabulary has 5 tokens", path, vocab_size=5)
    tokenids.read(path, vocab_size=10)
    other = r"a tokenizer that is not the model's \(t: ids:abc, the model's: ids:def\)"
    refused(other, path, vocabulary_sha256="ids:def")
    write(path, ids, limit=3)
    refused("made with --limit 3", path)
    assert len(tokenids.read(path, allow_limited=True)[0]) == 10
    description = json.loads(tokenids.sidecar(path).read_text())
    tokenids.sidecar(path).write_text(json.dumps(description | {"n_tokens": 11, "_header": {"schema": "token-ids"}}))
    refused("holds 10 ids, but ids.json states 11", path)
    results.write_json(tokenids.sidecar(path), {}, results.header("int_and_sem"))
    refused("'int_and_sem', but 'token-ids' is needed", path)


def test_a_write_that_breaks_leaves_no_ids_with_a_strange_description(tmp_path, monkeypatch):
    path = write(tmp_path / "ids", torch.arange(3))
    monkeypatch.setattr(results, "write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(path, torch.arange(5))
    assert not path.exists() and [file.name for file in tmp_path.iterdir()] == ["ids.json"]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write(blocked / "ids", torch.arange(5))
