"""The words for a part of a model: counts and rounding, files of earlier steps, what is refused."""

from __future__ import annotations

import json

import pytest
import yaml
from tiny import tiny_config

from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.measures import layer_sets, masks, matched

N = 12


def place(study: Study | None = None, models=None, layers: int = N) -> layer_sets.Place:
    return layer_sets.Place(tiny_config("llama", layers=layers).to_dict(), study or Study(), models)


def layers(words, layers: int = N) -> list[int]:
    return list(layer_sets.read(words, place(layers=layers)).layers)


def test_a_share_of_the_layers_is_rounded_on_each_side():
    assert [layer_sets.per_side(0.25, n) for n in (2, 4, 8, 12, 28, 30, 32)] == [1, 1, 1, 2, 4, 4, 4]
    assert layer_sets.per_side(0.01, 30) == 1 and layer_sets.per_side(1.0, 30) == 15
    # Halves go up, also where floats fall short of them.
    assert [layer_sets.per_side(p, n) for p, n in ((0.58, 50), (0.7, 90), (0.29, 100))] == [15, 32, 15]
    assert layers("outer:0.25", 30) == [0, 1, 2, 3, 26, 27, 28, 29]
    assert layers("inner:0.25", 30) == list(range(4, 26))
    assert layers("outer:1", 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("first:2", [0, 1]), ("last:3", [9, 10, 11]), ("middle:4", [4, 5, 6, 7]), ("middle:3", [4, 5, 6]),
        ("spaced:2", [0, 11]), ("spaced:3", [0, 6, 11]), ("spaced:1", [5]), ("spaced:12", list(range(12))),
        ("all", list(range(12))), ("0,2, 5-7", [0, 2, 5, 6, 7]), ([4, 1], [1, 4]), (3, [3]), ("last:1/ffn", [11]),
    ],
)  # fmt: skip
def test_counts_and_lists(words, wanted):
    assert layers(words) == wanted


def test_components_and_draws():
    part = layer_sets.read("0,2/attention", place())
    assert (part.layers, part.component, part.facts()) == (
        (0, 2), "attention", {"layers": [0, 2], "component": "attention"},
    )  # fmt: skip
    drawn = [tuple(layers(f"random:4:{seed}")) for seed in range(20)]
    assert {len(set(one)) for one in drawn} == {4} and len(set(drawn)) > 10 and drawn[3] == tuple(layers("random:4:3"))


def test_a_matched_set_has_the_shape_where_there_is_one():
    """One is drawn of the nearest that match in first and last layer, blocks and depth; a lone block has no match."""
    drawn, found = {tuple(layers(f"matched:0,1,3,7:{seed}", 8)) for seed in range(30)}, [(0, 1, 4, 7), (0, 2, 3, 7)]
    assert drawn == set(found)
    assert all(list(one) in matched.matched_sets(range(8), [0, 1, 3, 7], 9, 0) for one in found)
    assert layers("matched:0,1,3,7:5", 8) == layers("matched:0,1,3,7:5", 8)
    assert {tuple(layers(f"matched:first:3:{seed}", 6)) for seed in range(9)} == {(0, 1, 3)}
    part = layer_sets.read("matched:first:3:0/ffn", place(layers=6))
    assert (part.layers, part.component) == ((0, 1, 3), "ffn")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("matched:all:0", "no other set of 12 of 12 layers"), ("matched:hub", "no layers; valid"),
        ("outer:0", "a share above 0"), ("outer:1.5", "a share above 0"), ("first:13", "from 1 to 12"),
        ("first", "from 1 to 12"), ("random:3", "a seed, as in random:4:0"), ("first:2:3", "write first:2"),
        ("0,12", "layer 12 does not exist: the model has layers 0 to 11"), ("1,5-3", "5-3 runs backwards; write 3-5"),
        ("0-999999999999", "layer 999999999999 does not exist"), ([], "no layers"),
        ("inner:1", "no layer"), ("hubs", "these words mean no layers; valid are outer"), ("hub/mlp", "mean no layer"),
        ("hub", "write hub:FILE, or run inside a study"), ("change:2", "write change:FILE, or"),
        ("lsn/ffn", "leave out the slash"), ("none.json", "none.json does not exist"), (12, "layer 12"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused(words, message):
    with pytest.raises(InputError, match=message):
        layer_sets.read(words, place())


@pytest.fixture
def study(tmp_path) -> Study:
    """A study with layers.json, attn_vs_ffn.json and a mask, of a model that the test makes up."""
    values = {"name": "s", "results": str(tmp_path / "r"), "languages": {"target": "ga"}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(values))
    found = Study.find(tmp_path / "s.yaml")
    model = {"spec": "run/checkpoint-9", "model_id": "run__checkpoint-9", "step": 9, "weights_sample": "a"}
    header = {"models": {"model": model, "base": model}, "n_layers": N}
    split = {"interface_layers": [0, 11], "semantic_layers": [3, 4]}
    results.write_json(found.result("layers"), split, results.header("layer-specialize", **header))
    rows = {
        step: {"layers": {f"layer_{i}": {"attention_mean": sign * i, "ffn_mean": -i * (i < 6)} for i in range(N)}}
        for step, sign in (("5", -1), ("40", 1))
    }
    results.write_json(found.result("attn_vs_ffn"), {"checkpoints": rows}, results.header("attn_vs_ffn", **header))
    neurons = {"ga": {i: [i, 40] if i % 2 else [] for i in range(N)}, "en": {i: [] for i in range(N)}}
    masks.write(found.result("lsn_mask"), neurons, models={"model": model}, n_layers=N, ffn_width=48)
    return found


def test_the_study_says_what_hub_interface_change_and_lsn_are(study):
    here = place(study)
    assert layer_sets.read("hub", here).layers == (3, 4) and layer_sets.read("interface/ffn", here).layers == (0, 11)
    assert layer_sets.read("change:2", here).layers == (10, 11)  # at the last step, not the largest text
    assert layer_sets.read("change:1/ffn", here).layers == (0,)
    found = layer_sets.read("lsn", here)
    assert found.layers == (1, 3, 5, 7, 9, 11) and found.neurons[3] == [3, 40]
    assert found.facts()["neurons"] == 12


def test_a_named_file_is_as_good_as_the_study(study):
    here = place()
    hub, mask = study.result("layers"), study.result("lsn_mask")
    assert layer_sets.read(f"hub:{hub}/attention", here).layers == (3, 4)
    assert layer_sets.read(f"change:3:{study.result('attn_vs_ffn')}", here).layers == (9, 10, 11)
    assert layer_sets.read(f"{mask}:ga", here).facts() == layer_sets.read("lsn", place(study)).facts()
    with pytest.raises(InputError, match=r"has ga, en; say whose neurons"):
        layer_sets.read(str(mask), here)
    with pytest.raises(InputError, match="has no neuron of en"):
        layer_sets.read(f"{mask}:en", here)


def test_files_of_another_run_or_model_are_refused(study):
    other = [{"spec": "other/checkpoint-9", "model_id": "other__checkpoint-9", "step": 9, "weights_sample": "b"}]
    for words in ("hub", "change:2", "lsn"):
        with pytest.raises(InputError, match=r"made (from|for) run/checkpoint-9|another base, run/checkpoint-9"):
            layer_sets.read(words, place(study, other))
        with pytest.raises(InputError, match="n_layers 12"):
            layer_sets.read(words, place(study, layers=6))
    path = study.result("attn_vs_ffn")
    payload = json.loads(path.read_text())
    del payload["checkpoints"]["40"]["layers"]["layer_3"]
    path.write_text(json.dumps(payload))
    with pytest.raises(InputError, match="lacks a change for every layer"):
        layer_sets.read("change:2", place(study))
