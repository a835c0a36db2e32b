"""Weight change of interface and hub: the maths against whole models, the files, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import ARCHITECTURES, assert_drawn_again, failed_gate, load_script, read_tensors, save_run, save_tiny
from test_compare import load, reference

from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs, relatives

script = load_script("weight-diff/int_and_sem.py")

WS = ("w1", "w2", "w3")  # what Mixtral calls an expert's gate, down and up


def layers_file(path, interface=(0,), hub=(1, 2), **facts):
    results.write_json(
        path,
        {"interface_layers": list(interface), "semantic_layers": list(hub)},
        results.header("layer-specialize", **({"n_layers": 3} | facts)),
    )
    return path


def command(base, run, layers, output, *more):
    flags = {"--base-model": base, "--interface-json": layers, "--hub-json": layers, "--output": output}
    flags = [str(part) for flag in flags.items() for part in flag]
    script.main([*flags, "--target-dir", *map(str, run if isinstance(run, list) else [run]), *more])


def by_hand(base, checkpoint, model_type) -> list[float]:
    """The mean over projections of mean |dW|, by layer, from both models loaded whole."""
    whole, trained = load(base), load(checkpoint)
    found = []
    for layer in range(3):
        ours, theirs = (reference(model, model_type, layer) for model in (whole, trained))
        found.append(np.mean([(theirs[name] - ours[name]).double().abs().mean().item() for name in ours]))
    return found


@pytest.fixture
def no_figure(monkeypatch):
    """Figures take longer than the tiny models; the tests without this fixture look at them."""
    monkeypatch.setattr(script, "draw", lambda *_: None)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_equals_whole_models_in_a_loop(model_type, tmp_path, no_figure):
    base = save_tiny(model_type, tmp_path / "base")
    save_run(model_type, tmp_path / "run", (5, 10, 100), dtype="bfloat16")
    command(base, tmp_path / "run", layers_file(tmp_path / "layers.json"), tmp_path / "out" / "diff.json")
    found, header = results.read_json(tmp_path / "out" / "diff.json", "int_and_sem", n_layers=3)
    assert list(found["checkpoints"]) == ["5", "10", "100"]
    for step, averages in found["checkpoints"].items():
        change = by_hand(base, tmp_path / "run" / f"checkpoint-{step}", model_type)
        assert set(averages) == {"interface_avg", "semantic_hub_avg"}
        assert averages["interface_avg"] == pytest.approx(change[0], rel=1e-6)
        assert averages["semantic_hub_avg"] == pytest.approx((change[1] + change[2]) / 2, rel=1e-6)
        assert list(found["layers"][step].values()) == pytest.approx(change, rel=1e-6)
    assert (found["base_model"], found["target_model"]) == (str(base), str(tmp_path / "run"))
    assert header["models"]["checkpoints"]["10"]["step"] == 10 and header["n_used"] == header["n_available"] == 3


def test_all_experts_are_one_projection_and_the_router_is_none(tmp_path, no_figure):
    base = save_tiny("mixtral", tmp_path / "base")
    other = save_tiny("mixtral", tmp_path / "checkpoint-7", seed=1)
    command(base, other, layers_file(tmp_path / "layers.json"), tmp_path / "diff.json")
    found = results.read_json(tmp_path / "diff.json")[0]["layers"]["7"]
    ours, theirs = read_tensors(base), read_tensors(other)
    for layer in range(3):
        of_projection = [
            [name for name in ours if f"layers.{layer}.self_attn.{part}_proj.w" in name] for part in "qkvo"
        ]
        of_projection += [[name for name in ours if f"layers.{layer}." in name and f".{w}.w" in name] for w in WS]
        assert [len(names) for names in of_projection] == [1, 1, 1, 1, 4, 4, 4]
        means = [np.mean([(theirs[n] - ours[n]).abs().mean().item() for n in names]) for names in of_projection]
        assert found[str(layer)] == pytest.approx(np.mean(means), rel=1e-5)


def test_a_failed_gate_goes_on_and_is_said(tmp_path, no_figure, capsys):
    base = save_tiny("llama", tmp_path / "base")
    save_tiny("llama", tmp_path / "run/checkpoint-5", seed=1)
    layers = layers_file(tmp_path / "layers.json", gate=failed_gate())
    for _ in range(2):  # also where the result is kept
        command(base, tmp_path / "run", layers, tmp_path / "diff.json")
        assert capsys.readouterr().err.count("everything built on them mean nothing") == 1
    assert results.read_json(tmp_path / "diff.json")[1]["gate"] == failed_gate()
    # A file of before the gate: nothing is known, and the result is still kept.
    command(base, tmp_path / "run", layers_file(tmp_path / "layers.json"), tmp_path / "diff.json")
    assert "is finished" in capsys.readouterr().out


def test_base_against_itself_is_exactly_zero(tmp_path, no_figure):
    base = save_tiny("gpt_neox", tmp_path / "base", dtype="float16")
    command(base, base, layers_file(tmp_path / "layers.json"), tmp_path / "diff.json")
    found, _ = results.read_json(tmp_path / "diff.json")
    assert found["checkpoints"] == {"0": {"interface_avg": 0, "semantic_hub_avg": 0}}


def test_layers_in_two_files_with_the_published_key(tmp_path, capsys, monkeypatch, no_figure):
    base = save_tiny("llama", tmp_path / "base")
    other = save_tiny("llama", tmp_path / "checkpoint-7", seed=1, vocab_size=300)
    (tmp_path / "i.json").write_text('{"layers": [2]}')
    (tmp_path / "h.json").write_text("[0]")
    monkeypatch.chdir(tmp_path)
    arguments = "--base-model base --target-dir checkpoint-7 --interface-json i.json --hub-json h.json --output a.json"
    script.main(arguments.split())
    found, header = results.read_json(tmp_path / "a.json")
    change = by_hand(base, other, "llama")
    assert found["checkpoints"]["7"]["interface_avg"] == pytest.approx(change[2], rel=1e-6)
    assert found["checkpoints"]["7"]["semantic_hub_avg"] == pytest.approx(change[0], rel=1e-6)
    assert header["layers"]["interface"]["layers"] == [2]
    captured = capsys.readouterr()
    assert "layers [1] are in neither group" in captured.out
    assert "not compared: lm_head.weight ([272, 32] in the base, [300, 32] in the checkpoint)" in captured.out
    assert "i.json has no header" in captured.err


def test_steps_lists_and_finished_results(tmp_path, capsys, no_figure):
    base = save_tiny("llama", tmp_path / "base")
    run = save_run("llama", tmp_path / "run", (9, 80))
    layers = layers_file(tmp_path / "layers.json")
    command(base, tmp_path / "run", layers, tmp_path / "one.json", "--steps", "80")
    found, header = results.read_json(tmp_path / "one.json")
    assert list(found["checkpoints"]) == ["80"] and (header["n_used"], header["n_available"]) == (1, 2)
    command(base, run[::-1], layers, tmp_path / "list.json")
    found, _ = results.read_json(tmp_path / "list.json")
    assert list(found["checkpoints"]) == ["9", "80"] and found["target_model"] == [str(ref) for ref in run[::-1]]

    before = (tmp_path / "list.json").read_bytes()
    capsys.readouterr()
    command(base, tmp_path / "run", layers, tmp_path / "list.json")
    assert "is finished" in capsys.readouterr().out and (tmp_path / "list.json").read_bytes() == before
    with pytest.raises(InputError, match=r"\(steps: \[9, 80\] asked for, \[80\] in the file\); give --overwrite"):
        command(base, tmp_path / "run", layers, tmp_path / "one.json")
    other = layers_file(tmp_path / "other.json", interface=(0, 1), hub=(2,))
    with pytest.raises(InputError, match=r"\(interface layers: \[0, 1\] asked for, \[.*\] in the file"):
        command(base, tmp_path / "run", other, tmp_path / "list.json")
    command(base, tmp_path / "run", other, tmp_path / "list.json", "--overwrite")
    again = {key: value for key, value in json.loads((tmp_path / "list.json").read_text()).items() if key != "_header"}
    command(base, tmp_path / "run", other, tmp_path / "list.json", "--overwrite")
    assert again == {k: v for k, v in json.loads((tmp_path / "list.json").read_text()).items() if k != "_header"}
    with pytest.raises(InputError, match="no checkpoint of step 5; the run has 9, 80"):
        command(base, tmp_path / "run", layers, tmp_path / "x.json", "--steps", "5")


def test_a_limited_run_is_marked(tmp_path, no_figure):
    base = save_tiny("llama", tmp_path / "base", tokenizer=False)
    save_run("llama", tmp_path / "run", (1, 2), tokenizer=False)
    layers = layers_file(tmp_path / "layers.json")
    command(base, tmp_path / "run", layers, tmp_path / "out.json", "--limit", "1", "--device", "auto")
    with pytest.raises(InputError, match="--limit 1"):
        results.read_json(tmp_path / "out.json", "int_and_sem")
    assert list(results.read_json(tmp_path / "out.json", allow_limited=True)[0]["checkpoints"]) == ["1"]


def test_layer_files_that_are_refused(tmp_path, no_figure):
    base = save_tiny("llama", tmp_path / "base")
    other = save_tiny("llama", tmp_path / "run" / "checkpoint-1", seed=1)
    stranger = save_tiny("llama", tmp_path / "stranger", seed=2)
    output = tmp_path / "diff.json"

    def fails(message, payload=None, **facts):
        path = tmp_path / "layers.json"
        if payload is None:
            layers_file(path, **facts)
        else:
            path.write_text(json.dumps(payload))
        with pytest.raises(InputError, match=message) as error:
            command(base, tmp_path / "run", path, output)
        assert "\n" not in str(error.value)

    fails("made for n_layers 12, but 3 is needed", n_layers=12)
    fails("stranger, neither the base nor", models={"model": refs.model(stranger).describe()})
    trained_again = refs.model(other).describe() | {"weights_sample": "0" * 16}
    fails("checkpoint-1, neither .* trained again since", models={"model": trained_again})
    fails("names layer 3; the model has layers 0 to 2", interface=[0, 3])
    fails("names layer -1; the model has layers 0 to 2", interface=[-1, 0])
    fails("names a layer twice", interface=[0, 0])
    fails(r"layers \[1\] are in both groups", interface=[0, 1])
    fails("the list of interface layers is empty", interface=[])
    fails("no list interface_layers; give the file of layer-specialize/", payload={"semantic_layers": [1]})
    fails("no list layers", payload={"layers": ["0"]})
    fails("no list layers", payload={"layers": 3})
    (tmp_path / "layers.json").write_text("{")
    with pytest.raises(InputError, match="is not valid JSON"):
        command(base, tmp_path / "run", tmp_path / "layers.json", output)
    with pytest.raises(InputError, match=r"nowhere.json does not exist; run layer-specialize/"):
        command(base, tmp_path / "run", tmp_path / "nowhere.json", output)
    assert not output.exists() and not list(tmp_path.glob("*.pdf"))
    # Another checkpoint of the run will do, too, where only one is compared.
    save_tiny("llama", tmp_path / "run" / "checkpoint-2", seed=3)
    layers = layers_file(tmp_path / "l.json", models={"model": refs.model(other).describe()})
    command(base, tmp_path / "run" / "checkpoint-2", layers, tmp_path / "single.json")
    hub = {"spec": "org/name@step5", "model_id": "org__name@step5", "revision": "a" * 40, "step": 5}
    assert relatives.belongs(hub, [hub | {"spec": "org/name@step9", "model_id": "org__name@step9"}])
    assert not relatives.belongs(hub, [hub | {"spec": "org/other@step5", "model_id": "org__other@step5"}])
    # The same weights at another path are the same model, and the base's own layers are fine too.
    for ref in (refs.model(other).describe() | {"spec": "elsewhere", "model_id": "x"}, refs.model(base).describe()):
        path = layers_file(tmp_path / "layers.json", models={"model": ref})
        command(base, tmp_path / "run", path, output, "--overwrite")


def test_models_that_are_refused_leave_nothing(tmp_path):
    base = save_tiny("llama", tmp_path / "base")
    layers = layers_file(tmp_path / "layers.json")
    other = save_tiny("llama", tmp_path / "checkpoint-1", seed=1, intermediate_size=64)
    with pytest.raises(InputError, match="compared tensors must agree in shape"):
        command(base, other, layers, tmp_path / "out" / "diff.json")
    with pytest.raises(InputError, match="no such folder"):
        command(tmp_path / "nowhere", other, layers, tmp_path / "out" / "diff.json")
    broken = tmp_path / "broken" / "checkpoint-4"
    (broken / "global_step4").mkdir(parents=True)
    (broken / "config.json").write_text((other / "config.json").read_text())
    with pytest.raises(InputError, match=r"DeepSpeed shards; convert them: python .*zero_to_fp32\.py"):
        command(base, tmp_path / "broken", layers, tmp_path / "out" / "diff.json")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="nothing says base: give --base-model, or the key base in a study file"):
        script.main(["--target-dir", str(other)])


@pytest.mark.figures
def test_without_arguments_in_a_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny("qwen3", tmp_path / "build" / "base")
    save_run("qwen3", tmp_path / "build" / "run", (2, 10))
    (tmp_path / "study.yaml").write_text("base: build/base\nrun: build/run\nresults: results\n")
    with pytest.raises(InputError, match=r"layers.json does not exist; run layer-specialize/layer_specialize.py first"):
        script.main([])
    last = refs.model("build/run/checkpoint-10").describe()
    layers_file(tmp_path / "results" / "layer-specialize" / "layers.json", models={"model": last})
    script.main([])
    found, _ = results.read_json("results/weight-diff/int_and_sem.json", "int_and_sem")
    assert list(found["checkpoints"]) == ["2", "10"]
    assert (found["base_model"], found["target_model"]) == ("build/base", "build/run")
    assert_drawn_again(tmp_path / "results/weight-diff/int_and_sem", lambda: script.main(["--overwrite"]))
