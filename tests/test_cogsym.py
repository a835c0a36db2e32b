"""The layers that CogSym chooses, how much of a model they are, and what an overlap with others would be by chance."""

from __future__ import annotations

import itertools
import json

import pytest
import yaml
from helpers import load_script, save_tiny

from cpt_utils.base import results, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import refs
from cpt_utils.measures import layer_sets


@pytest.fixture(scope="module")
def script():
    return load_script("layer-ablation/cogsym.py")


@pytest.mark.parametrize(
    ("a", "b", "n"), [({0, 7}, {0, 1, 7}, 8), ({0, 5}, {1, 2, 3}, 6), ({1, 2, 3}, {2, 3, 4, 5}, 6)]
)
def test_chance_is_that_of_all_sets_of_these_sizes(a, b, n):
    found = stats.overlap(a, b, n)
    every = [len(a & {*other}) for other in itertools.combinations(range(n), len(b))]
    jaccards = [shared / (len(a) + len(b) - shared) for shared in every]
    assert found["shared"] == len(a & b) and found["jaccard"] == len(a & b) / len(a | b)
    assert found["expected"] == pytest.approx(sum(jaccards) / len(jaccards), abs=1e-12)
    assert found["p_value"] == pytest.approx(sum(shared >= len(a & b) for shared in every) / len(every), abs=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # the second ties its head and keeps matrices transposed
def test_fractions_are_those_that_a_training_reports(script, kind, tmp_path):
    """Without weights the same parameters are counted as by what freezes them."""
    from cpt_utils.base.lazy import torch
    from cpt_utils.models import loading

    freezing = load_script("cpt/freezing.py")
    save_tiny(kind, tmp_path / "base", layers=6)
    base = refs.model(tmp_path / "base")
    layers = script.chosen(0.25, layer_sets.Place(base.config()))
    assert layers == [0, 5]
    part = layer_sets.read(layers, layer_sets.Place(base.config()))
    model = loading.load_model(base, torch.float32, torch.device("cpu")).requires_grad_(True)
    trained = freezing.Frozen(model, freezing.Choice("train_only", part, False), base)
    for path in (tmp_path / "base").glob("*.safetensors"):
        path.unlink()  # the configuration alone is read
    found = script.fractions(base, layers)
    assert found["parameters"]["chosen"] == trained.n_trained and found["parameters"]["model"] == trained.n_parameters
    assert found["share_of_parameters"] == trained.facts()["share_of_parameters"]
    assert found["share_of_layers"] == pytest.approx(1 / 3) == pytest.approx(found["share_of_layer_parameters"])


@pytest.fixture
def study(tmp_path):
    """A study of eight layers with a base, a split of the layers by two measures, and their change."""
    save_tiny("llama", tmp_path / "base", layers=8)
    values = {"name": "s", "base": str(tmp_path / "base"), "run": str(tmp_path / "run"), "results": str(tmp_path / "r"),
              "languages": {"base": "eng_Latn", "target": "gle_Latn"}}  # fmt: skip
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(values))
    found, facts = Study.find(tmp_path / "s.yaml"), refs.model(tmp_path / "base").describe()
    head = {"models": {"model": facts, "base": facts}, "n_layers": 8}
    split = {"interface_layers": [0, 1, 7], "splits": {"published": {"interface_layers": [0, 1, 7]},
             "unit": {"interface_layers": [0, 2]}, "mexa_last": {"interface_layers": None}}}  # fmt: skip
    results.write_json(found.result("layers"), split, results.header("layer-specialize", **head))
    rows = {f"layer_{i}": {"attention_mean": 1.0 + (i in (3, 7)), "ffn_mean": 0.5} for i in range(8)}
    results.write_json(
        found.result("attn_vs_ffn"), {"checkpoints": {"5": {"layers": rows}}}, results.header("attn_vs_ffn", **head)
    )
    return found


@pytest.mark.figures
def test_layers_and_overlaps_go_into_a_file_that_training_reads(script, study, capsys):
    script.main(["--study", str(study.path)])
    path = study.result("cogsym")
    payload, header = results.read_json(path, "cogsym")
    assert payload["layers"] == [0, 7] and payload["share_of_layers"] == 0.25 and header["n_layers"] == 8
    assert {name: one["layers"] for name, one in payload["overlaps"].items()} == {
        "interface": [0, 1, 7], "interface:unit": [0, 2], "change": [3, 7],
    }  # fmt: skip
    own = payload["overlaps"]["interface"]
    assert (own["shared"], own["jaccard"]) == (2, pytest.approx(2 / 3)) and own["p_value"] == pytest.approx(3 / 28)
    assert path.with_suffix(".png").stat().st_size > 1000
    config = refs.model(study.get("base")).config()
    for words, component in ((str(path), None), (f"{path}/attention", "attention")):
        part = layer_sets.read(words, layer_sets.Place(config))
        assert part.layers == (0, 7) and part.component == component
    # Whatever the file is called, a run is told by its layers.
    assert (
        layer_sets.read(str(path), layer_sets.Place(config)).facts()
        == layer_sets.read("outer:0.25", layer_sets.Place(config)).facts()
    )
    capsys.readouterr()
    script.main(["--study", str(study.path)])
    assert "kept" in capsys.readouterr().out
    split = study.result("layers")
    text = json.loads(split.read_text())
    split.write_text(json.dumps(text | {"interface_layers": [0, 7]}))
    with pytest.raises(InputError, match="of another request"):
        script.main(["--study", str(study.path)])
    script.main(["--study", str(study.path), "--share", "0.5", "-o", str(path.with_name("half.json"))])
    assert results.read_json(path.with_name("half.json"))[0]["layers"] == [0, 1, 6, 7]


def test_without_a_study_the_configuration_is_enough(script, study, tmp_path):
    out = tmp_path / "out.json"
    script.main(["--base", study.get("base"), "-o", str(out)])
    payload = results.read_json(out)[0]
    assert payload["layers"] == [0, 7] and payload["overlaps"] == {} and not out.with_suffix(".png").exists()


def test_another_base_is_not_compared_with_the_lists_of_the_study(script, study, tmp_path):
    save_tiny("llama", tmp_path / "other", layers=12)
    script.main(["--study", str(study.path), "--base", str(tmp_path / "other"), "-o", str(tmp_path / "out.json")])
    payload = results.read_json(tmp_path / "out.json")[0]
    assert payload["layers"] == [0, 1, 10, 11] and payload["overlaps"] == {}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--share", "0"], "a share above 0 and at most 1"), (["--share", "1.5"], "a share above 0 and at most 1"),
        (["--share", "nan"], "a share above 0"), (["--layer-selection", "none.json"], "none.json does not exist"),
        (["--change", "none.json"], "none.json does not exist"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(script, study, more, message):
    with pytest.raises(InputError, match=message):
        script.main(["--study", str(study.path), *more])
    assert not study.result("cogsym").exists()


@pytest.mark.parametrize(("n", "share"), [(5, "1"), (1, "0.25")])
def test_two_ends_that_overlap_are_refused(script, tmp_path, n, share):
    save_tiny("llama", tmp_path / "base", layers=n)
    with pytest.raises(InputError, match="on each side, which overlap; give a smaller share"):
        script.main(["--base", str(tmp_path / "base"), "--share", share, "-o", str(tmp_path / "o.json")])


def test_lists_of_another_model_are_refused(study, tmp_path):
    config = refs.model(study.get("base")).config()
    results.write_json(tmp_path / "six.json", {"layers": [0, 5]}, results.header("cogsym", n_layers=6))
    (tmp_path / "far.json").write_text('{"layers": [0, 9]}')
    (tmp_path / "none.json").write_text('{"layers": []}')
    (tmp_path / "bare.json").write_text("[1, 2]")
    for name, message in (("six", "made for n_layers 6, but 8"), ("far", "names layer 9"), ("none", "no layer")):
        with pytest.raises(InputError, match=message):
            layer_sets.read(str(tmp_path / f"{name}.json"), layer_sets.Place(config))
    assert layer_sets.read(str(tmp_path / "bare.json"), layer_sets.Place(config)).layers == (1, 2)
