"""Mask files of language-specific neurons, what is refused, and random controls."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import save_run, save_tiny

from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.measures import masks

MASK = {"en": {0: [3, 1], 1: [], 2: [7]}, "ga": {0: [0], 1: [2, 4, 5], 2: []}, "eu": {0: [], 1: [], 2: []}}
FACTS = {"n_layers": 3, "ffn_width": 8}


def written(path: Path, mask=MASK, **facts) -> Path:
    masks.write(path, mask, **(FACTS | facts))
    return path


def test_written_and_read_in_any_spelling(tmp_path):
    path = written(tmp_path / "tag.json")
    raw = json.loads(path.read_text())
    assert raw.pop("_header")["schema"] == "lsn-mask"
    assert raw["eu"] == {"0": [], "1": [], "2": []} and raw["ga"]["1"] == [2, 4, 5]
    assert masks.languages_in(path) == ["en", "ga", "eu"]
    assert masks.read(path, "eng_Latn", 3, 8) == {0: [1, 3], 1: [], 2: [7]}
    assert list(masks.read(path, "ga", 3, 8)) == [0, 1, 2]
    assert masks.read(path, "eus_Latn", 3, 8) == {0: [], 1: [], 2: []}
    # What is read is the caller's own: changing it changes no later reading.
    masks.read(path, "en", 3, 8)[0].append(5)
    assert masks.read(path, "en", 3, 8)[0] == [1, 3]


def test_a_file_of_the_published_scripts_is_taken_with_one_warning(tmp_path, capsys):
    path = tmp_path / "bare.json"
    path.write_text(json.dumps({"en": {"0": [1], "1": []}, "ga": {"1": [], "0": []}}))
    models = [{"spec": "org/name", "model_id": "org__name", "revision": None}]
    assert masks.languages_in(path) == ["en", "ga"]
    assert masks.read(path, "en", 2, 8, models, control=False) == {0: [1], 1: []}
    assert masks.read(path, "ga", 2, 8, models, control=True) == {0: [], 1: []}
    assert capsys.readouterr().err.count("warning") == 1


def test_masks_that_are_refused_in_one_line(tmp_path):
    path = tmp_path / "mask.json"

    def fails(message, lang="en", n_layers=3, width=8, payload=None, models=None, control=None):
        if payload is not None:
            path.write_text(json.dumps(payload))
        with pytest.raises(InputError, match=message) as error:
            masks.read(path, lang, n_layers, width, models, control)
        assert "\n" not in str(error.value)

    fails("mask.json does not exist")
    written(path)
    fails("nothing for de .deu_Latn.; there is en, eu, ga", lang="de")
    fails("made for n_layers 3, but 4 is needed", n_layers=4)
    fails("made for ffn_width 8, but 9 is needed", width=9)
    fails("is a mask of language-specific neurons, but a random control mask is needed", control=True)
    written(path, control=True)
    fails("is a random control mask, but a mask of language-specific neurons is needed", control=False)
    masks.read(path, "en", 3, 8, control=True)
    fails("has 1 layers for en, but the model has 3", payload={"en": {"0": [1]}})
    fails("has 3 layers for en, but the model has 3", payload={"en": {"1": [], "2": [], "3": []}})
    fails("layer 1 of en names neuron 8, but the model has 0 to 7", payload={"en": {"0": [], "1": [8], "2": []}})
    fails("layer 0 of en names neuron -1", payload={"en": {"0": [-1], "1": [], "2": []}})
    fails("layer 2 of en names a neuron twice", payload={"en": {"0": [], "1": [], "2": [4, 4]}})
    fails("layer 2 of en is not a list of neuron numbers", payload={"en": {"0": [], "1": [], "2": [0.5]}})
    fails("layer 2 of en is not a list of neuron numbers", payload={"en": {"0": [], "1": [], "2": {"4": 1}}})
    fails("en and eng_Latn both mean eng", lang="eng", payload={"en": {}, "eng_Latn": {}})
    for payload in ([1], {}, {"layers": [1, 2]}):
        fails("holds no masks", payload=payload)
    fails("holds 'lsn-layers', but 'lsn-mask' is needed", payload={"_header": {"schema": "lsn-layers"}, "layers": [1]})
    path.write_text("{")
    fails("is not valid JSON")


def test_a_mask_of_another_model_is_refused(tmp_path):
    base, run = save_tiny("llama", tmp_path / "base", tokenizer=False), tmp_path / "run"
    steps = save_run("llama", run, (1, 2), tokenizer=False)
    stranger = refs.model(save_tiny("llama", tmp_path / "stranger", seed=9, tokenizer=False)).describe()
    models = [refs.model(folder).describe() for folder in (base, *steps)]
    path = written(tmp_path / "mask.json", models={"model": models[2]})
    assert masks.read(path, "en", 3, 8, models)[0] == [1, 3]
    assert masks.read(path, "en", 3, 8, [models[1]])[0] == [1, 3]  # another checkpoint of the same run
    with pytest.raises(InputError, match=r"made for .*checkpoint-2, which is none of the models asked for .*stranger"):
        masks.read(path, "en", 3, 8, [stranger])
    trained_again = models[2] | {"weights_sample": "0" * 16}
    with pytest.raises(InputError, match="or was trained again since"):
        masks.read(path, "en", 3, 8, [trained_again])
    # A file that was rewritten is read again.
    masks.write(path, {"en": {0: [5], 1: [], 2: []}}, **FACTS)
    assert masks.read(path, "en", 3, 8)[0] == [5]


def test_random_control_has_as_many_neurons_outside_every_mask():
    n_layers, width = 4, 200
    mask = {
        "a": {0: list(range(0, 90)), 1: [5], 2: [], 3: [199]},
        "b": {0: list(range(60, 100)), 1: list(range(100)), 2: [0, 1], 3: [198, 199]},
        "none": {layer: [] for layer in range(n_layers)},
    }
    control = masks.random_control(mask, n_layers, width, seed=7)
    assert list(control) == list(mask)
    for lang, layers in control.items():
        assert list(layers) == list(range(n_layers))
        for layer, neurons in layers.items():
            assert neurons == sorted(set(neurons)) and len(neurons) == len(mask[lang][layer])
            assert all(0 <= neuron < width for neuron in neurons)
            assert not any(set(neurons) & set(mask[other][layer]) for other in mask)
    assert masks.random_control(mask, n_layers, width, seed=7) == control
    again = masks.random_control(mask, n_layers, width, seed=8)
    assert again != control and again["b"][0] != control["b"][0]
    # The order of languages does not matter.
    assert masks.random_control(dict(reversed(mask.items())), n_layers, width, seed=7)["b"] == control["b"]
    # Over many seeds every neuron outside has its turn, and about equally often.
    times = [0] * width
    for seed in range(2000):
        for neuron in masks.random_control(mask, n_layers, width, seed)["b"][2]:
            times[neuron] += 1
    assert times[0] == times[1] == 0 and min(times[2:]) > 5 and max(times) < 50


def test_layers_of_different_widths(tmp_path):
    mask = {"a": {0: [7], 1: [15, 3], 2: []}}
    masks.write(tmp_path / "mask.json", mask, n_layers=3, ffn_width=16)
    assert masks.read(tmp_path / "mask.json", "a", 3, [8, 16, 8]) == {0: [7], 1: [3, 15], 2: []}
    with pytest.raises(InputError, match="layer 0 of a names neuron 7, but the model has 0 to 3"):
        masks.read(tmp_path / "mask.json", "a", 3, [4, 16, 8])
    with pytest.raises(InputError, match="made for ffn_width 16, but 8 is needed"):
        masks.read(tmp_path / "mask.json", "a", 3, [8, 8, 8])
    drawn = {n for seed in range(300) for n in masks.random_control(mask, 3, [8, 16, 8], seed)["a"][0]}
    assert drawn == set(range(7))
    drawn = {n for seed in range(300) for n in masks.random_control(mask, 3, [8, 16, 8], seed)["a"][1]}
    assert drawn == set(range(16)) - {3, 15}


def test_a_layer_without_room_for_a_control_is_named():
    mask = {"a": {0: [], 1: [0, 1, 2, 3, 4]}, "b": {0: [], 1: []}}
    with pytest.raises(InputError, match=r"layer 1 has 3 of 8 neurons outside the mask, but the control of a needs 5"):
        masks.random_control(mask, 2, 8, 0)
    exactly = masks.random_control({"a": {0: [0, 1, 2, 3]}}, 1, 8, 0)
    assert exactly == {"a": {0: [4, 5, 6, 7]}}


def test_a_control_of_equal_activity_is_near_in_rate_and_outside_all_masks():
    rng = np.random.default_rng(0)
    rates = rng.random((3, 200))
    mask = {"en": {0: [1, 5, 9], 1: [], 2: list(range(20))}, "ga": {0: [5, 7], 1: [0], 2: [50]}}
    drawn = [masks.active_control(mask, "en", rates, 200, seed=number) for number in range(20)]
    for control in drawn:
        for layer, own in mask["en"].items():
            chosen = control[layer]
            assert len(set(chosen)) == len(own) and not set(chosen) & {*own, *mask["ga"][layer]}
            # 200 neurons lie .005 apart: sorted by rate, partners are some places off.
            apart = np.sort(rates[layer, own]) - np.sort(rates[layer, chosen])
            assert not len(own) or np.abs(apart).max() < 0.08
    assert drawn[0] == masks.active_control(mask, "en", rates, 200, seed=0)
    assert len({str(control) for control in drawn}) == 20
    # Where no neuron is close the nearest are taken, and where there are too few the layer is named.
    rates[0, :10], rates[0, 10:] = 0.9, np.linspace(0, 0.3, 190)
    far = {"en": {0: [1], 1: [], 2: []}, "ga": {0: [*range(10)], 1: [], 2: []}}
    assert masks.active_control(far, "en", rates, 200)[0][0] >= 200 - masks.CLOSE
    with pytest.raises(InputError, match="layer 0 has 4 of 12 neurons outside the mask, but the control of en needs 8"):
        masks.active_control({"en": {0: list(range(8))}}, "en", rates[:1, :12], 12)


def test_controls_of_equal_activity_are_drawn_from_all_neurons_of_one_rate():
    rates = np.full((1, 400), 0.5)
    drawn = [masks.active_control({"en": {0: [0, 1, 2]}}, "en", rates, 400, seed=number)[0] for number in range(40)]
    assert max(neuron for control in drawn for neuron in control) > 300
    assert len({neuron for control in drawn for neuron in control}) > 60


def test_a_control_of_equal_activity_knows_only_the_neurons_that_a_layer_has():
    rates = np.zeros((2, 10))
    rates[0, 4:] = 0.5  # of padding
    control = masks.active_control({"en": {0: [0, 1], 1: [3]}}, "en", rates, [4, 10])
    assert control[0] == [2, 3]
