"""Gates of a language's neurons: the maths against tensors read from disk, the files, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_drawn_again, load_script, read_tensors, save_run, save_tiny
from test_attn_vs_ffn import on_disk

from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.measures import masks

script = load_script("weight-diff/gate_lsn.py")

MASK = {"gle_Latn": {0: [0, 7, 47], 1: [], 2: [3]}, "eng_Latn": {0: [], 1: [], 2: []}}
CONTROL = {"gle_Latn": {0: [1, 8, 30], 1: [], 2: [4]}, "eng_Latn": {0: [], 1: [], 2: []}}
FACTS = {"n_layers": 3, "ffn_width": 48}


def write_masks(folder, mask=MASK, control=CONTROL, **facts):
    masks.write(folder / "mask.json", mask, **(FACTS | facts))
    masks.write(folder / "control.json", control, control=True, **(FACTS | facts))


def command(folder, *more, lang="gle_Latn", mask="mask.json"):
    places = {"--base-model": "base", "--target-model": "run", "--mask-file": mask, "--output": "out.json"}
    script.main(
        [part for flag, name in places.items() for part in (flag, str(folder / name))]
        + ["--lang", lang, *map(str, more)]
    )


@pytest.fixture
def no_figure(monkeypatch):
    """Figures take longer than the tiny models; the tests without this fixture look at them."""
    monkeypatch.setattr(script, "draw", lambda *_: None)


@pytest.mark.parametrize("model_type", ["qwen2", "phi3", "gpt_neox", "gpt2"])
def test_equals_a_slow_loop_over_the_tensors(model_type, tmp_path, no_figure):
    base = save_tiny(model_type, tmp_path / "base")
    save_run(model_type, tmp_path / "run", (5, 10), shards=2)
    write_masks(tmp_path)
    command(tmp_path, "--control-mask", tmp_path / "control.json")
    found, header = results.read_json(tmp_path / "out.json", "gate_lsn", n_layers=3)
    projection = "gate_proj" if model_type in ("qwen2", "phi3") else "up_proj"
    assert header["projection"] == found["projection"] == projection and header["language"] == "gle_Latn"
    assert list(found["checkpoints"]) == ["5", "10"] and found["neurons"] == {"0": 3, "2": 1}
    for step, row in found["checkpoints"].items():
        for group, mask in (("layers", MASK), ("control", CONTROL)):
            assert list(row[group]) == ["layer_0", "layer_2"]  # layer 1 has no neuron
            expected = []
            for layer in (0, 2):
                ours = on_disk(base, model_type, layer)[projection]
                theirs = on_disk(tmp_path / "run" / f"checkpoint-{step}", model_type, layer)[projection]
                entries = [abs(theirs[n, i] - ours[n, i]) for n in mask["gle_Latn"][layer] for i in range(32)]
                expected.append(np.mean(entries))
                assert list(row[group][f"layer_{layer}"]) == ["gate_proj"]
                # The script subtracts in float32, the loop in float64.
                assert row[group][f"layer_{layer}"]["gate_proj"] == pytest.approx(expected[-1], rel=1e-6)
            key = {"layers": "lsn", "control": "control"}[group]
            assert row["summary"][key] == pytest.approx(np.mean(expected), rel=1e-6)


def test_rows_of_experts_are_those_of_their_neurons(tmp_path, no_figure):
    """Layers 0 and 2 have four experts of 24 neurons, layer 1 is dense."""
    folders = [save_tiny("qwen3_moe", tmp_path / name, seed=i) for i, name in enumerate(("base", "run/checkpoint-5"))]
    mask = {"gle_Latn": {0: [0, 23, 24, 95], 1: [47], 2: [50]}}
    write_masks(tmp_path, mask, {"gle_Latn": {0: [1, 2, 3, 4], 1: [0], 2: [51]}}, ffn_width=96)
    command(tmp_path, "--control-mask", tmp_path / "control.json")
    found, header = results.read_json(tmp_path / "out.json", "gate_lsn")
    ours, theirs = map(read_tensors, folders)
    assert header["ffn_width"] == 96
    for layer, chosen in mask["gle_Latn"].items():
        rows = []
        for neuron in chosen:
            name, row = (f"experts.{neuron // 24}.", neuron % 24) if layer != 1 else ("", neuron)
            name = f"model.layers.{layer}.mlp.{name}gate_proj.weight"
            rows += (theirs[name][row].double() - ours[name][row].double()).abs().tolist()
        expected = found["checkpoints"]["5"]["layers"][f"layer_{layer}"]["gate_proj"]
        assert expected == pytest.approx(sum(rows) / len(rows), rel=1e-6)


def test_without_a_control_and_in_another_spelling(tmp_path, capsys, no_figure):
    save_tiny("llama", tmp_path / "base")
    save_run("llama", tmp_path / "run", (1, 2))
    write_masks(tmp_path)
    command(tmp_path, "--limit", "1", lang="ga")
    assert "no control mask" in capsys.readouterr().out
    found, header = results.read_json(tmp_path / "out.json", "gate_lsn", allow_limited=True)
    assert not found["has_control"] and "control" not in found["checkpoints"]["1"]
    assert found["checkpoints"]["1"]["summary"].keys() == {"lsn"}
    assert (header["language"], header["limit"], header["n_available"]) == ("gle_Latn", 1, 2)
    command(tmp_path, "--limit", "1", lang="ga")
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"\(steps: \[1, 2\] asked for, \[1\] in the file; "):
        command(tmp_path)
    with pytest.raises(InputError, match=r"\(control: \w+ asked for, none in the file\)"):
        command(tmp_path, "--limit", "1", "--control-mask", tmp_path / "control.json")
    write_masks(tmp_path, mask=MASK | {"gle_Latn": {0: [5], 1: [], 2: []}})
    with pytest.raises(InputError, match=r"\(mask: \w+ asked for, \w+ in the file\); give --overwrite"):
        command(tmp_path, "--limit", "1")
    command(tmp_path, "--overwrite", "--steps", "2")
    assert list(results.read_json(tmp_path / "out.json")[0]["checkpoints"]) == ["2"]


def test_masks_that_are_refused(tmp_path, no_figure):
    base = save_tiny("llama", tmp_path / "base")
    save_tiny("llama", tmp_path / "run" / "checkpoint-1", seed=1)
    stranger = save_tiny("llama", tmp_path / "stranger", seed=2)

    def fails(message, *more, lang="gle_Latn", file="mask.json", **written):
        write_masks(tmp_path, **written)
        with pytest.raises(InputError, match=message) as error:
            command(tmp_path, *more, lang=lang, mask=file)
        assert "\n" not in str(error.value) and not (tmp_path / "out.json").exists()

    fails("mask.json has no neuron of eng_Latn, so there is nothing to follow; .*the key lsn.rate", lang="eng_Latn")
    fails("nothing for eus_Latn; there is eng_Latn, gle_Latn", lang="eus_Latn")
    fails("stranger, which is none of the models", models={"model": refs.model(stranger).describe()})
    fails("made for n_layers 2, but 3 is needed", n_layers=2)
    with_control = ("--control-mask", tmp_path / "control.json")
    fails("control.json is a random control mask, but", file="control.json")
    fails("names neuron 48, but the model has 0 to 47", mask={"gle_Latn": {0: [48], 1: [], 2: []}})
    fails("mask.json is a mask of language-specific", "--control-mask", tmp_path / "mask.json")
    other = {"gle_Latn": {0: [1], 1: [], 2: [4]}}
    fails(
        "control.json has 1 neurons in layer 0, where .* has 3: it is the control of another",
        *with_control,
        control=other,
    )
    other = {"gle_Latn": {0: [1, 2, 7], 1: [], 2: [4]}}
    fails("control.json has neurons of the mask in layer 0", *with_control, control=other)
    fails("nowhere.json does not exist; run lsn/identify.py first", file="nowhere.json")
    # The mask of a checkpoint of the run, or of the base, is the run's.
    write_masks(tmp_path, models={"model": refs.model(base).describe()})
    command(tmp_path)


@pytest.mark.figures
def test_without_arguments_in_a_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny("qwen3", tmp_path / "build" / "base")
    save_run("qwen3", tmp_path / "build" / "run", (2, 10))
    (tmp_path / "study.yaml").write_text(
        "name: trial\nbase: build/base\nrun: build/run\nlanguages: {target: gle_Latn}\nresults: results\n"
    )
    with pytest.raises(InputError, match=r"lsn/result/trial.json does not exist; run lsn/identify.py first"):
        script.main([])
    last = refs.model("build/run/checkpoint-10").describe()
    masks.write("results/lsn/result/trial.json", MASK, models={"model": last}, **FACTS)
    masks.write("results/lsn/result/trial.control.json", CONTROL, control=True, models={"model": last}, **FACTS)
    script.main([])
    found, header = results.read_json("results/weight-diff/gate_lsn.json", "gate_lsn")
    assert list(found["checkpoints"]) == ["2", "10"] and found["has_control"]
    assert header["control_file"].endswith("trial.control.json")
    figure = tmp_path / "results/weight-diff/gate_lsn"
    assert_drawn_again(figure, lambda: script.draw(figure, found))  # from the file alone
