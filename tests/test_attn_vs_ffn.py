"""Attention against FFN: the maths against tensors read from disk, the files, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_drawn_again, load_script, read_tensors, save_run, save_tiny

from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.measures.compare import Change

script = load_script("weight-diff/attn_vs_ffn.py")

# Of the tiny models: query and key/value heads, features per head, FFN neurons.
HEADS, KV, DIM, FFN = 4, 2, 8, 48
TYPES = ("qwen2", "phi3", "gpt_neox", "gpt2")
PARTS = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "ffn": ("gate_proj", "up_proj", "down_proj")}


def on_disk(folder, model_type: str, layer: int) -> dict[str, np.ndarray]:
    """The projections of a layer as they are on disk, float64 [out, in], written down by hand for each architecture."""
    stored = {name: tensor.double().numpy() for name, tensor in read_tensors(folder).items()}
    if model_type == "phi3":
        at = f"model.layers.{layer}."
        qkv, gate_up = stored[f"{at}self_attn.qkv_proj.weight"], stored[f"{at}mlp.gate_up_proj.weight"]
        q, k, v = np.split(qkv, [HEADS * DIM, (HEADS + KV) * DIM])
        found = {"q": q, "k": k, "v": v, "o": stored[f"{at}self_attn.o_proj.weight"]}
        found |= {"gate": gate_up[:FFN], "up": gate_up[FFN:], "down": stored[f"{at}mlp.down_proj.weight"]}
    elif model_type == "gpt_neox":
        at = f"gpt_neox.layers.{layer}."
        qkv = stored[f"{at}attention.query_key_value.weight"].reshape(HEADS, 3, DIM, -1)
        found = {name: qkv[:, i].reshape(HEADS * DIM, -1) for i, name in enumerate("qkv")}
        found |= {"o": stored[f"{at}attention.dense.weight"], "up": stored[f"{at}mlp.dense_h_to_4h.weight"]}
        found["down"] = stored[f"{at}mlp.dense_4h_to_h.weight"]
    elif model_type == "gpt2":
        stored = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
        at = f"h.{layer}."
        q, k, v = np.split(stored[f"{at}attn.c_attn.weight"].T, 3)
        found = {"q": q, "k": k, "v": v, "o": stored[f"{at}attn.c_proj.weight"].T}
        found |= {"up": stored[f"{at}mlp.c_fc.weight"].T, "down": stored[f"{at}mlp.c_proj.weight"].T}
    else:
        at = f"model.layers.{layer}."
        found = {name: stored[f"{at}self_attn.{name}_proj.weight"] for name in "qkvo"}
        found |= {name: stored[f"{at}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}
    return {f"{name}_proj": weight for name, weight in found.items()}


def command(base, run, output, *more):
    script.main(["--base-model", str(base), "--ckpt-model", str(run), "--output", str(output), *more])


@pytest.fixture
def no_figure(monkeypatch):
    """Figures take longer than the tiny models; the tests without this fixture look at them."""
    monkeypatch.setattr(script, "draw", lambda *_: None)


@pytest.mark.parametrize("model_type", TYPES)
def test_equals_a_slow_loop_over_the_tensors(model_type, tmp_path, no_figure):
    base = save_tiny(model_type, tmp_path / "base")
    save_run(model_type, tmp_path / "run", (5, 10, 100), shards=2)
    command(base, tmp_path / "run", tmp_path / "out.json")
    found, header = results.read_json(tmp_path / "out.json", "attn_vs_ffn", n_layers=3)
    assert list(found["checkpoints"]) == ["5", "10", "100"] and header["n_used"] == header["n_available"] == 3
    for step, row in found["checkpoints"].items():
        sums = {"summary": [], "summary_mean": [], "summary_relative": [], "summary_relative_mean": []}
        whole = {side: [0.0, 0.0] for side in PARTS}  # squares of the difference and of the base
        assert list(row["layers"]) == ["layer_0", "layer_1", "layer_2"]
        for layer in range(3):
            ours = on_disk(base, model_type, layer)
            theirs = on_disk(tmp_path / "run" / f"checkpoint-{step}", model_type, layer)
            here = row["layers"][f"layer_{layer}"]
            absolute = {name: np.abs(theirs[name] - ours[name]).mean() for name in ours}
            relative = {name: np.linalg.norm(theirs[name] - ours[name]) / np.linalg.norm(ours[name]) for name in ours}
            assert {name for name in here if name.endswith("_proj")} == set(absolute)
            for side, name in ((side, name) for side, names in PARTS.items() for name in names if name in ours):
                whole[side][0] += np.square(theirs[name] - ours[name]).sum()
                whole[side][1] += np.square(ours[name]).sum()
            # The script subtracts in float32, the loop in float64.
            assert {name: here[name] for name in absolute} == pytest.approx(absolute, rel=1e-6)
            assert {name: here["relative"][name] for name in relative} == pytest.approx(relative, rel=1e-6)
            for name in ours:
                own, difference = ours[name].ravel(), (theirs[name] - ours[name]).ravel()
                norms = np.linalg.norm(own), np.linalg.norm(own + difference)
                assert here["max_abs"][name] == pytest.approx(abs(difference).max(), rel=1e-6)
                assert here["frobenius"][name] == pytest.approx(np.linalg.norm(difference), rel=1e-6)
                assert here["base_frobenius"][name] == pytest.approx(norms[0], rel=1e-6)
                assert here["cosine"][name] == pytest.approx(own @ (own + difference) / np.prod(norms), abs=1e-6)
            for side, names in PARTS.items():
                for values, place in ((absolute, here), (relative, here["relative"])):
                    own = [values[name] for name in names if name in values]
                    assert place[f"{side}_max"] == pytest.approx(max(own), rel=1e-6)
                    assert place[f"{side}_mean"] == pytest.approx(np.mean(own), rel=1e-6)
            assert here["delta_attn_ffn"] == here["attention_max"] - here["ffn_max"]
            for key, place, how in (
                ("summary", here, "max"),
                ("summary_mean", here, "mean"),
                ("summary_relative", here["relative"], "max"),
                ("summary_relative_mean", here["relative"], "mean"),
            ):
                sums[key].append([place[f"attention_{how}"], place[f"ffn_{how}"]])
        for key, values in sums.items():
            assert [row[key]["attn"], row[key]["ffn"]] == pytest.approx(np.mean(values, 0), rel=1e-12)
            assert row["attention_above_ffn"][key] == sum(a > b for a, b in values)
        pooled = {side: (moved / base) ** 0.5 for side, (moved, base) in whole.items()}
        assert found["pooled"][step] == pytest.approx(pooled, rel=1e-6)


@pytest.mark.parametrize("model_type", TYPES)
def test_details_of_heads_and_neurons(model_type, tmp_path, capsys, no_figure):
    base = save_tiny(model_type, tmp_path / "base", layers=1)
    other = save_tiny(model_type, tmp_path / "run" / "checkpoint-5", seed=5, layers=1)
    command(base, tmp_path / "run", tmp_path / "out.json", "--details")
    assert f"wrote {tmp_path / 'out.json'}, {tmp_path / 'out.pt'} and the figure" in capsys.readouterr().out
    found = results.read_tensors(tmp_path / "out.pt")
    assert found.pop("values") == "mean_abs norm base_norm cosine_distance"
    ours, theirs = (on_disk(folder, model_type, 0) for folder in (base, other))
    kinds = {name: "heads" if name in PARTS["attention"] else "neurons" for name in ours}
    assert set(found) == {f"5.layer_0.{name}.{kind}" for name, kind in kinds.items()}
    for name, kind in kinds.items():
        a, b = (side[name].T if name in ("o_proj", "down_proj") else side[name] for side in (ours, theirs))
        kv_heads = KV if model_type in ("qwen2", "phi3") else HEADS
        groups = FFN if kind == "neurons" else kv_heads if name in ("k_proj", "v_proj") else HEADS
        values = found[f"5.layer_0.{name}.{kind}"].numpy()
        assert values.shape == (4, groups)
        for i, (own, now) in enumerate(zip(np.split(a, groups), np.split(b, groups), strict=True)):
            norms = np.linalg.norm(own), np.linalg.norm(now)
            expected = (
                abs(now - own).mean(),
                np.linalg.norm(now - own),
                norms[0],
                1 - (own * now).sum() / np.prod(norms),
            )
            assert values[:3, i] == pytest.approx(expected[:3], rel=2e-6)
            assert values[3, i] == pytest.approx(expected[3], abs=2e-6)


def test_details_are_made_afterwards_and_never_of_other_models(tmp_path, capsys, no_figure):
    base = save_tiny("llama", tmp_path / "base", layers=1)
    save_run("llama", tmp_path / "run", (1, 2), layers=1)
    command(base, tmp_path / "run", tmp_path / "out.json")
    without, _ = results.read_json(tmp_path / "out.json")
    assert not (tmp_path / "out.pt").exists()
    command(base, tmp_path / "run", tmp_path / "out.json", "--details")  # finished, but without them
    with_details, _ = results.read_json(tmp_path / "out.json")
    assert with_details == without and (tmp_path / "out.pt").exists()
    before = (tmp_path / "out.pt").read_bytes()
    for more in ((), ("--details",)):
        command(base, tmp_path / "run", tmp_path / "out.json", *more)
        assert "is finished" in capsys.readouterr().out and (tmp_path / "out.pt").read_bytes() == before
    with pytest.raises(InputError, match=r"steps: \[1\] asked for, "):
        command(base, tmp_path / "run", tmp_path / "out.json", "--details", "--steps", "1")
    command(base, tmp_path / "run", tmp_path / "out.json", "--overwrite", "--steps", "1")
    assert not (tmp_path / "out.pt").exists()  # those of both steps do not stay beside the file of one


def test_a_router_stands_beside_the_projections(tmp_path, no_figure):
    base = save_tiny("qwen3_moe", tmp_path / "base")
    other = save_tiny("qwen3_moe", tmp_path / "checkpoint-5", seed=5)
    command(base, other, tmp_path / "out.json")
    layers = results.read_json(tmp_path / "out.json")[0]["checkpoints"]["5"]["layers"]
    ours, theirs = read_tensors(base), read_tensors(other)
    assert "router" not in layers["layer_1"]  # a dense layer
    for layer in (0, 2):
        here, mlp = layers[f"layer_{layer}"], f"model.layers.{layer}.mlp"
        name = f"{mlp}.gate.weight"
        difference = (theirs[name].double() - ours[name].double()).abs()
        assert here["router"] == pytest.approx(difference.mean().item(), rel=1e-6)
        assert here["max_abs"]["router"] == pytest.approx(difference.max().item(), rel=1e-6)
        names = [key for key in ours if key.startswith(f"{mlp}.experts.") and key.endswith("gate_proj.weight")]
        assert len(names) == 4
        mean = np.mean([(theirs[key].double() - ours[key].double()).abs().mean().item() for key in names])
        assert here["gate_proj"] == pytest.approx(mean, rel=1e-6)
        for side, own in PARTS.items():
            assert here[f"{side}_max"] == max(here[part] for part in own)
            assert here["relative"][f"{side}_mean"] == pytest.approx(np.mean([here["relative"][part] for part in own]))


def test_base_against_itself_is_exactly_zero(tmp_path, no_figure):
    base = save_tiny("gpt_neox", tmp_path / "base", dtype="float16")
    command(base, base, tmp_path / "out.json")
    row = results.read_json(tmp_path / "out.json")[0]["checkpoints"]["0"]  # a single model without a step in its name
    assert row["summary"] == row["summary_relative_mean"] == {"attn": 0, "ffn": 0}
    assert set(row["attention_above_ffn"].values()) == {0}


def test_a_base_of_zeros_has_no_relative_change():
    still = Change(n=2, sum_abs=1.0, sum_sq=1.0, base_sq=4.0)
    row = script.checkpoint_row({0: dict.fromkeys(sum(PARTS.values(), ()), still) | {"v_proj": Change(2, 2.0, 1.0)}})
    assert row["layers"]["layer_0"]["relative"]["q_proj"] == 0.5
    assert row["layers"]["layer_0"]["relative"]["v_proj"] is None
    assert row["summary"] == {"attn": 1.0, "ffn": 0.5} and row["summary_relative"] == {"attn": None, "ffn": 0.5}
    assert row["attention_above_ffn"]["summary"] == 1 and row["attention_above_ffn"]["summary_relative"] is None
    assert "1 (max), 1 (mean), None (relative max)" in script.describe(row)


def test_steps_limits_and_finished_results(tmp_path, capsys, no_figure):
    base = save_tiny("llama", tmp_path / "base")
    save_run("llama", tmp_path / "run", (9, 80), vocab_size=300)
    command(base, tmp_path / "run", tmp_path / "one.json", "--steps", "80")
    said = capsys.readouterr().out
    assert "step 80: attention" in said and "of 3 layers" in said and "(relative mean)" in said
    assert "not compared: lm_head.weight" in said
    found, header = results.read_json(tmp_path / "one.json")
    assert list(found["checkpoints"]) == ["80"] and (header["n_used"], header["n_available"]) == (1, 2)
    before = (tmp_path / "one.json").read_bytes()
    command(base, tmp_path / "run", tmp_path / "one.json", "--steps", "80")
    assert "is finished" in capsys.readouterr().out and (tmp_path / "one.json").read_bytes() == before
    both = r"one.json is of another request \(steps: \[9, 80\] asked for, \[80\] in the file\); give --overwrite"
    with pytest.raises(InputError, match=both):
        command(base, tmp_path / "run", tmp_path / "one.json")
    with pytest.raises(InputError, match=r"request \(limit: 1 asked for, none in the file\)"):
        command(base, tmp_path / "run" / "checkpoint-80", tmp_path / "one.json", "--limit", "1")
    with pytest.raises(InputError, match=r"request \(base: \S+run/checkpoint-9 asked for, \S+base in the file\)"):
        command(tmp_path / "run" / "checkpoint-9", tmp_path / "run", tmp_path / "one.json", "--steps", "80")
    command(base, tmp_path / "run", tmp_path / "one.json", "--overwrite", "--limit", "1")
    with pytest.raises(InputError, match="--limit 1"):
        results.read_json(tmp_path / "one.json", "attn_vs_ffn")
    with pytest.raises(InputError, match=r"limit: none asked for, 1 in the file"):  # limited to what would be the whole
        command(base, tmp_path / "run", tmp_path / "one.json", "--steps", "9")
    with pytest.raises(InputError, match="no checkpoint of step 5; the run has 9, 80"):
        command(base, tmp_path / "run", tmp_path / "x.json", "--steps", "5")


def test_what_is_refused_leaves_nothing(tmp_path):
    base = save_tiny("llama", tmp_path / "base")
    other = save_tiny("llama", tmp_path / "checkpoint-1", seed=1, intermediate_size=64)
    with pytest.raises(InputError, match="compared tensors must agree in shape"):
        command(base, other, tmp_path / "out" / "diff.json")
    with pytest.raises(InputError, match="no such folder"):
        command(base, tmp_path / "nowhere", tmp_path / "out" / "diff.json")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="nothing says base: give --base-model, or the key base in a study file"):
        script.main(["--ckpt-model", str(other)])


@pytest.mark.figures
def test_one_checkpoint_outside_a_study_and_a_run_inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny("gpt2", tmp_path / "build" / "base")
    save_run("gpt2", tmp_path / "build" / "run", (2, 10))
    script.main(["--base-model", "build/base", "--ckpt-model", "build/run/checkpoint-10"])
    found, _ = results.read_json("weight_diff/checkpoint-10.json", "attn_vs_ffn")
    assert list(found["checkpoints"]) == ["10"] and found["target_model"] == "build/run/checkpoint-10"
    assert script.default_output(["org/name@step5", "org/name@step10"]).name == "org__name@step5.json"
    (tmp_path / "study.yaml").write_text("base: build/base\nrun: build/run\nresults: results\n")
    script.main([])
    found, _ = results.read_json("results/weight-diff/attn_vs_ffn.json", "attn_vs_ffn")
    assert list(found["checkpoints"]) == ["2", "10"]
    figure = tmp_path / "results/weight-diff/attn_vs_ffn"
    assert_drawn_again(figure, lambda: script.draw(figure, found))  # from the file alone


def test_base_and_checkpoint_the_wrong_way_round(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny("llama", "base", seed=0, layers=2)
    save_tiny("llama", "run/checkpoint-5", seed=1, layers=2)
    load_script("weight-diff/attn_vs_ffn.py").main(["--base-model", "run/checkpoint-5", "--ckpt-model", "base"])
    assert "were the two mixed up?" in capsys.readouterr().err
