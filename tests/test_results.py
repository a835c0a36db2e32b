"""Result files: whole or absent, identified by their header, strangers refused by name and reason."""

import errno
import json
import re

import numpy as np
import pytest
import torch

from cpt_utils.base import results
from cpt_utils.base.errors import InputError


def test_round_trip_and_header(tmp_path):
    path = tmp_path / "deep" / "r.json"
    head = results.header("retrieval", n_layers=4, base_lang="eng_Latn", limit=None, mean=np.float32(0.5))
    results.write_json(path, {"a": [1, float("nan"), torch.tensor([2.0])], "b": np.int64(3)}, head)
    payload, found = results.read_json(path, "retrieval", n_layers=4)
    assert payload == {"a": [1, None, [2.0]], "b": 3}
    assert found["mean"] == 0.5
    assert {"schema", "version", "command", "git_commit", "libraries", "time"} <= set(found)
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("facts", "expect", "message"),
    [
        ({"n_layers": 4}, {"n_layers": 5}, "n_layers 4, but 5 is needed"),
        ({"base_lang": "eng_Latn"}, {"base_lang": "gle_Latn"}, "base_lang eng_Latn"),
        ({"limit": 10}, {}, "--limit 10"),
    ],
)
def test_a_stranger_is_refused(tmp_path, facts, expect, message):
    path = tmp_path / "r.json"
    results.write_json(path, {}, results.header("s", **facts))
    with pytest.raises(InputError, match=message):
        results.read_json(path, "s", **expect)


def test_equivalent_language_codes_agree(tmp_path):
    path = tmp_path / "r.json"
    results.write_json(path, {}, results.header("s", target_lang="gle_Latn"))
    results.read_json(path, "s", target_lang="ga")


def test_another_schema_is_refused(tmp_path):
    results.write_json(tmp_path / "r.json", {}, results.header("weight-diff"))
    with pytest.raises(InputError, match="holds 'weight-diff', but 'retrieval' is needed"):
        results.read_json(tmp_path / "r.json", "retrieval")


def test_a_file_without_header_is_taken_with_one_warning(tmp_path, capsys):
    (tmp_path / "r.json").write_text(json.dumps({"layers": [1]}))
    assert results.read_json(tmp_path / "r.json", "s", n_layers=4) == ({"layers": [1]}, {})
    assert capsys.readouterr().err.count("has no header") == 1
    (tmp_path / "l.json").write_text("[1, 2]")
    assert results.read_json(tmp_path / "l.json") == ([1, 2], {})


@pytest.mark.parametrize("text", ["{", "\xff"])
def test_damaged_json(tmp_path, text):
    (tmp_path / "r.json").write_bytes(text.encode("latin1"))
    with pytest.raises(InputError, match="not valid JSON"):
        results.read_json(tmp_path / "r.json")


SET = {"name": "random", "layers": [1], "values": {"nll_per_byte": 1.5}, "units": "any other key is free"}


@pytest.mark.parametrize(
    ("schema", "payload", "facts", "told"),
    [
        ("anything", {}, {"models": ["a"]}, "_header.models is ['a'], not a mapping"),
        ("anything", {}, {"models": {"base": "a"}}, "_header.models.base is 'a', not a mapping"),
        ("anything", {}, {"n_layers": "12"}, "_header.n_layers is '12', not a whole number"),
        ("swap-controls", {"sets": {"hub": SET}}, {}, "sets is {'hub': "),
        ("swap-controls", {"sets": [SET, SET | {"layers": "1 2"}]}, {}, "sets.1.layers is '1 2', not a list"),
        ("swap-controls", {"sets": [SET | {"values": {"nll": "1"}}]}, {}, "sets.0.values.nll is '1', not a number"),
        ("layer-specialize", {"interface_layers": [True]}, {}, "interface_layers.0 is True, not a whole number"),
        ("arms", {"models": {"base": {"values": [1]}}}, {}, "models.base.values is [1], not a mapping"),
        ("deactivation", {"matrix": {"en": ["x"]}}, {}, "matrix.en is ['x'], not a mapping"),
        ("language-loss", {"en": ["x"]}, {}, "en is ['x'], not a mapping"),
        ("claims", {"claims": [1]}, {}, "claims is [1], not a mapping"),
    ],
)
def test_what_somebody_made_something_else_is_one_line(tmp_path, schema, payload, facts, told):
    results.write_json(tmp_path / "r.json", payload, results.header(schema, **facts))
    with pytest.raises(InputError, match=re.escape(f"r.json: {told}") + ".*; run again the step that wrote the file$"):
        results.read_json(tmp_path / "r.json")


def test_what_later_steps_do_not_read_may_be_anything(tmp_path):
    payload = {"sets": [SET | {"values": {"nll": None}}, {}], "note": 3, "comparison": None}
    results.write_json(tmp_path / "r.json", payload, results.header("swap-controls", models=None, more=1))
    assert results.read_json(tmp_path / "r.json", "swap-controls")[0] == payload


def test_an_error_while_writing_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("old")
    with pytest.raises(InputError, match=r"the disk is full"), results.replacing(path) as temporary:
        temporary.write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


MODEL = {"spec": "build/run/checkpoint-5", "model_id": "run__checkpoint-5", "step": 5, "weights_sample": "w5"}
REQUEST = {
    "model": MODEL | {"config_sha256": "c"},
    "data": {"pairs_sha256": "p" * 64, "base": {"files": {"a.txt": "1"}}},
    "heldout": {"file": "h.txt", "sha256": "h", "documents": 3},
    "hub": {"spec": "org/m@main", "model_id": "org__m@main", "step": None, "revision": "abc"},
    "sets": [["random", [1, 2]]], "tokenizer": "ids:1", "limit": None, "dtype": "float32",
}  # fmt: skip


def changed(**changes):
    return {**REQUEST, **changes}


@pytest.mark.parametrize(
    "other",
    [
        changed(model=REQUEST["model"] | {"spec": "/abs/run/checkpoint-5", "step": None, "tokenizer_sha256": "old"}),
        changed(data={"pairs_sha256": "p" * 64, "base": {"files": {"/abs/a.txt": "1"}}}),
        changed(heldout=REQUEST["heldout"] | {"file": "./h.txt"}),
        changed(sets=[("random", (1, 2))]),
        {key: REQUEST[key] for key in REQUEST if key != "limit"},
    ],
)
def test_where_things_are_is_no_part_of_a_request(tmp_path, other):
    assert results.same(REQUEST, other)
    results.write_json(tmp_path / "r.json", {}, results.header("s", request=REQUEST))
    assert results.finished(tmp_path / "r.json", "s", other, "another -o")


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (changed(tokenizer="ids:2"), "tokenizer: ids:2 asked for, ids:1 in the file"),
        (changed(limit=7, dtype="float16"), "limit: 7 asked for, none in the file; dtype: float16 asked for, float32 "),
        (changed(model=MODEL | {"config_sha256": "d"}), "model.config_sha256: d asked for, c in the file"),
        (
            changed(model=MODEL | {"spec": "x/elsewhere", "weights_sample": "y"}),
            f"model: x/elsewhere asked for, {MODEL['spec']} in the file",
        ),
        (changed(hub=REQUEST["hub"] | {"revision": "abd"}), "hub.revision: abd asked for, abc in the file"),
        (changed(heldout=REQUEST["heldout"] | {"sha256": "i"}), "heldout.sha256: i asked for, h in the file"),
        (changed(sets=[["random", [1, 3]]]), 'sets: [["random", [1, 3]]] asked for, [["random", [1, 2]]] in the file'),
        (
            changed(data={"pairs_sha256": "p" * 63 + "q"}),
            "data.pairs_sha256: " + "p" * 28 + "..." + "p" * 28 + "q asked for",
        ),
        (changed(data={"pairs_sha256": "p" * 31 + "q" + "p" * 32}), "another data.pairs_sha256"),
        (changed(a=1, b=2, c=3, d=4, e=5, f=6), "a: 1 asked for, none in the file; b: 2 asked for, none in the file; "),
        (changed(tokenizer=None), "tokenizer: none asked for, ids:1 in the file"),
    ],
)
def test_a_refusal_says_both_values(tmp_path, other, told):
    assert not results.same(REQUEST, other)
    results.write_json(tmp_path / "r.json", {}, results.header("s", request=REQUEST))
    with pytest.raises(InputError) as caught:
        results.finished(tmp_path / "r.json", "s", other, "another -o")
    assert f"r.json is of another request ({told}" in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith("); give --overwrite to redo it, or another -o")
    assert ("and 2 more)" in str(caught.value)) is ("f" in other)


def test_a_file_that_does_not_say_how_it_was_made(tmp_path):
    results.write_json(tmp_path / "r.json", {}, results.header("s"))
    with pytest.raises(InputError, match=r"another request \(how the file was made is not known\)"):
        results.finished(tmp_path / "r.json", "s", REQUEST, "another -o")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write"):
        results.write_json(tmp_path / "file" / "r.json", {}, results.header("s"))


def test_tensors_are_the_same_bytes_whatever_the_process(tmp_path, monkeypatch):
    results.write_tensors(tmp_path / "a.pt", {"x": torch.ones(3)})
    monkeypatch.setattr(results.os, "getpid", lambda: 12345)
    results.write_tensors(tmp_path / "b.pt", {"x": torch.ones(3)})
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_tensors_round_trip_and_damage(tmp_path):
    results.write_tensors(tmp_path / "t.pt", {"hits": torch.tensor([[1, 0]], dtype=torch.uint8)})
    assert results.read_tensors(tmp_path / "t.pt")["hits"].tolist() == [[1, 0]]
    (tmp_path / "bad.pt").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(InputError, match="cannot be read as tensors"):
        results.read_tensors(tmp_path / "bad.pt")


def test_a_bare_list_with_its_facts_beside_it(tmp_path, capsys):
    path = tmp_path / "x.layers.json"
    results.write_list(path, "layers", {"layers": [3, 1], "language": "ga"}, results.header("lsn-layers", n_layers=4))
    assert path.read_text() == "[3, 1]\n"  # what json.load gives to the published scripts
    payload, head = results.read_json(path, "lsn-layers", n_layers=4)
    assert payload == {"layers": [3, 1], "language": "ga"} and head["schema"] == "lsn-layers"
    with pytest.raises(InputError, match=r"x.layers.facts.json was made for n_layers 4, but 5 is needed"):
        results.read_json(path, n_layers=5)
    assert not capsys.readouterr().err
    path.write_text("[3, 2]")  # by hand: the facts are another list's
    assert results.read_json(path, "lsn-layers", n_layers=4) == ([3, 2], {})
    assert "x.layers.json is not the list of x.layers.facts.json beside it" in capsys.readouterr().err
    (tmp_path / "x.layers.facts.json").unlink()
    assert results.read_json(path) == ([3, 2], {}) and "has no header" in capsys.readouterr().err
