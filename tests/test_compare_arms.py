"""Arms: a study read as one, trained on the plain run's batches, and what share of its gain they reach."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml
from helpers import bits, load_script, read_tensors, save_tiny
from transformers import AutoModelForCausalLM

from cpt_utils.base import cli, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study

STEPS = 30


@pytest.fixture(scope="module")
def script():
    return load_script("cpt/compare_arms.py")


# --- the method


def test_a_share_is_of_the_plain_runs_gain(script):
    rng = np.random.default_rng(0)
    base = rng.normal(2.0, 0.1, 200)
    plain = base - 1 + rng.normal(0, 0.1, 200)  # a loss: less is better
    found = script.compare(base + 0.4 * (plain - base), base, plain, -1, 42)
    assert found["share"]["value"] == pytest.approx(0.4)
    assert found["share"]["ci_low"] == pytest.approx(0.4) == found["share"]["ci_high"]  # of every sentence the same
    assert found["minus_plain"]["value"] == pytest.approx(0.6, abs=0.03)
    assert found["minus_plain"]["ci_low"] < found["minus_plain"]["value"] < found["minus_plain"]["ci_high"]
    better = script.compare(plain - 0.5 + rng.normal(0, 0.5, 200), base, plain, -1, 42)["share"]
    assert 1.2 < better["ci_low"] < better["value"] < better["ci_high"] < 1.8


def test_no_share_of_a_gain_that_may_be_nothing(script):
    rng = np.random.default_rng(1)
    base, arm = rng.random(50), rng.random(50)
    unclear = base + rng.normal(0.01, 1, 50)
    for plain, sign in ((unclear, 1), (base, 1), (base - 0.5, 1), (base + 0.5, -1)):
        found = script.compare(arm, base, plain, sign, 42)
        assert found["share"] is None and found["minus_plain"]["value"] == pytest.approx((arm - plain).mean())


def test_activation_is_counted_from_the_base(script):
    records = [
        {"name": "base", "values": {}, "units": {}, "lsn": {"value": 0.2, "blocks": [0.1, 0.3]}},
        {"name": "plain", "values": {}, "units": {}, "lsn": {"value": -0.4, "blocks": [-0.5, -0.3]}},
        {"name": "arm", "values": {}, "units": {}, "lsn": {"value": 0.8, "blocks": [0.6, 1.0]}},  # the other way
    ]
    script.with_activation(records)
    assert [record["values"]["lsn_activation"] for record in records] == pytest.approx([0, 0.6, -0.6])
    assert records[1]["units"]["lsn_activation"] == pytest.approx([0.6, 0.6])
    assert all("lsn" not in record for record in records)


# --- a study with arms


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A study whose plain run and one arm are trained: a base, text, and the blocks that each training got."""
    place = tmp_path_factory.mktemp("arms")
    words = "red dog blue cat night sun moon tree".split()  # noqa: SIM905
    lines = [f"the {a} {b} runs home at {c}" for a in words for b in words for c in words[:2]]
    (place / "text.txt").write_text("\n".join(lines) + "\n")
    (place / "en.txt").write_text("\n".join(lines[:24]) + "\n")
    (place / "ga.txt").write_text("\n".join(line.replace("the", "an") for line in lines[:24]) + "\n")
    save_tiny("llama", place / "base", seed=3)
    training = {
        "output": "unused", "from": "unused", "block_size": 16, "batch_size": 4, "steps": STEPS,
        "save_steps": [10, STEPS], "learning_rate": 3e-3, "state_every": 100, "dtype_on_disk": "float32",
        "sources": [{"name": "a", "weight": 1, "files": str(place / "text.txt")}],
    }  # fmt: skip
    (place / "cpt.yaml").write_text(yaml.safe_dump(training))
    study = {
        "name": "s", "base": str(place / "base"), "run": str(place / "seed-{seed}" / "cpt"),
        "results": str(place / "results-{seed}"), "languages": {"base": "eng_Latn", "target": "gle_Latn"},
        "data": {"source": "text", "base_file": str(place / "en.txt"), "target_file": str(place / "ga.txt"),
                 "heldout": {"gle_Latn": str(place / "en.txt"), "eng_Latn": str(place / "ga.txt")}},
        "arms": {"middle": {"train_only": [1]}}, "train": {"cpt": str(place / "cpt.yaml")},
    }  # fmt: skip
    (place / "s.yaml").write_text(yaml.safe_dump(study))
    return place


@pytest.fixture(scope="module")
def blocks(place):
    """What was trained on: plain run first, then the arm."""
    train, got = load_script("cpt/train.py"), []
    trainer = cli.sibling("cpt/trainer.py")
    make = trainer.make

    def spy(config, run, model, files, given, *rest):
        got.append(np.asarray(given).copy())
        return make(config, run, model, files, given, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "make", spy)
        for arm in ([], ["--arm", "middle"]):
            train.main(["--study", str(place / "s.yaml"), "--stage", "cpt", *arm])
    return got


def with_arms(place, name: str, **arms) -> str:
    values = yaml.safe_load((place / "s.yaml").read_text()) | {"arms": arms}
    (place / name).write_text(yaml.safe_dump(values, sort_keys=False))
    return str(place / name)


def test_a_study_read_as_an_arm_has_places_of_its_own(place):
    plain = Study.find(place / "s.yaml", 7)
    arm = Study.find(place / "s.yaml", 7, "middle")
    assert arm.get("run") == str(place / "seed-7/arms/middle/cpt") and arm.arm == "middle" and not plain.arm
    assert arm.result("layers") == place / "results-7/arms/middle/layer-specialize/layers.json"
    assert arm.get("base") == plain.get("base") and arm.plain.get("run") == plain.get("run") != arm.get("run")
    with pytest.raises(InputError, match="has no arm 'hub'; it has middle"):
        Study.find(place / "s.yaml", 7, "hub")
    with pytest.raises(InputError, match="--arm hub needs a study that has it"):
        Study.find(None, None, "hub")


def test_a_study_read_as_another_run_has_that_run_and_results_of_its_own(place, tmp_path):
    values = yaml.safe_load((place / "s.yaml").read_text()) | {"runs": {"second": "runs/second"}}
    study = tmp_path / "s.yaml"
    study.write_text(yaml.safe_dump(values))
    run, plain = Study.find(study, 7, "second"), Study.find(study, 7)
    assert (run.get("run"), run.arm, run.plain.get("run")) == ("runs/second", "second", plain.get("run"))
    assert run.result("layers") == place / "results-7/runs/second/layer-specialize/layers.json"
    with pytest.raises(InputError, match="--arm second is another run of the study, with its own training file"):
        load_script("cpt/train.py").main(["--study", str(study), "--stage", "cpt", "--arm", "second"])
    study.write_text(yaml.safe_dump(values | {"runs": {"middle": "runs/middle"}}))
    with pytest.raises(InputError, match="middle is an arm and one of the runs; give one of them another name"):
        Study.find(study, 7)


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"plain": {"freeze": "hub"}}, "plain is the name of another model"),
        ({"a/b": {"freeze": "hub"}}, "a key of arms is 'a/b'"),
        ({"a": {"freeze": "hub", "train_only": "hub"}}, r"arms\.a: give one of freeze, train_only and lora"),
        ({"a": {"lora": {"r": 0}}}, r"arms\.a\.lora\.r is 0; it must be a rank, a whole number above 0"),
        ({"a": {"lora": {"r": 2}, "io": "frozen"}}, r"arms\.a: io goes with freeze or train_only"),
        ({"a": {"frozen": "hub"}}, r"unknown key arms\.a\.frozen"),
    ],
)
def test_arms_that_say_nothing_are_refused(place, arms, message):
    with pytest.raises(InputError, match=message):
        Study.find(with_arms(place, "bad.yaml", **arms))


def test_an_arm_gets_the_plain_runs_batches(place, blocks):
    assert np.array_equal(*blocks) and blocks[0].shape == (STEPS * 4, 16)
    plain, arm = (
        json.loads((place / "seed-42" / name / "train.json").read_text()) for name in ("cpt", "arms/middle/cpt")
    )
    assert plain["losses"][0] == arm["losses"][0] and plain["losses"][-1] < arm["losses"][-1] < plain["losses"][0]
    own = {"freeze", "train_only", "io", "save_steps"}
    assert {k: v for k, v in arm["settings"].items() if k not in own} == {
        k: v for k, v in plain["settings"].items() if k not in own
    }
    assert arm["checkpoints"] == [STEPS]
    before, after = read_tensors(place / "base"), read_tensors(place / f"seed-42/arms/middle/cpt/checkpoint-{STEPS}")
    assert {name for name in before if not bits(before[name]).equal(bits(after[name]))} == {
        name for name in before if ".layers.1." in name
    }


def stand_in(place, arm: str, model, words: str, *layers: int, **trained) -> None:
    """A run in the place of an arm's that holds `model` as its last checkpoint; `trained`: what its record says."""
    plain, run = place / "seed-42/cpt", place / f"seed-42/arms/{arm}/cpt"
    shutil.copytree(model, run / f"checkpoint-{STEPS}")
    record = json.loads((plain / "train.json").read_text())
    record["_header"]["trained"] = {
        "freeze": {"layers": [*layers]}, "words": words, "io": "trained",
        "trainable_parameters": 1, "share_of_parameters": 0.5,
    } | trained  # fmt: skip
    (run / "train.json").write_text(json.dumps(record))


def test_shares_from_models_to_files(script, place, blocks, capsys):
    """Of an arm that is the plain run 1, of one that is the base 0, of a true one what its units say."""
    arms = {"whole": {"freeze": "first:1"}, "nothing": {"freeze": "0-1"}, "middle": {"train_only": [1]}}
    study = with_arms(place, "three.yaml", **arms)
    stand_in(place, "whole", place / f"seed-42/cpt/checkpoint-{STEPS}", "first:1", 0)
    stand_in(place, "nothing", place / "base", "0-1", 0, 1)
    script.main(["--study", study])
    payload, header = results.read_json(place / "results-42/arms.json", "arms")
    units = results.read_tensors(place / "results-42/arms.pt")
    models, names = payload["models"], ["base", "plain", *arms]
    assert list(models) == names and payload["measures"]["nll_per_byte"]["higher_is_better"] is False
    assert {"nll_per_byte", "retrieval_mean"} <= {*payload["measures"]} == {*units} and header["n_used"] == 24
    share, change = ({name: models[name][key]["nll_per_byte"] for name in arms} for key in ("share", "minus_plain"))
    assert share["whole"] == {"value": 1, "ci_low": 1, "ci_high": 1} and change["whole"]["value"] == 0
    assert share["nothing"] == {"value": 0, "ci_low": 0, "ci_high": 0} and change["nothing"]["ci_low"] > 0
    means = units["nll_per_byte"].mean(1).tolist()
    assert means == pytest.approx([models[name]["values"]["nll_per_byte"] for name in names])
    assert share["middle"]["value"] == pytest.approx((means[4] - means[0]) / (means[1] - means[0]))
    assert 0 < share["middle"]["ci_low"] < share["middle"]["value"] < share["middle"]["ci_high"] < 1
    assert models["middle"]["what"] == {"train_only": [1]} and models["middle"]["layers"] == [1]
    assert 0 < models["middle"]["share_of_parameters"] < 0.5
    # The loss in the other language is that of its text, and has nothing to do with the target's.
    other = place / "other.json"
    script.main(["--study", study, "--measures", "nll", "--heldout", str(place / "ga.txt"), "-o", str(other)])
    losses = {name: model["values"] for name, model in results.read_json(other)[0]["models"].items()}
    assert all(losses[n]["nll_per_byte"] == models[n]["values"]["nll_per_byte:eng_Latn"] for n in names)
    assert payload["measures"]["nll_per_byte:eng_Latn"]["label"].endswith("(nats per byte), eng_Latn")
    assert header["heldout_others"]["eng_Latn"]["documents"] == 24 == units["nll_per_byte:eng_Latn"].shape[1]
    table = (place / "results-42/arms.md").read_text()
    assert "| middle | train_only 1 |" in table and "(1.00 [1.00, 1.00])" in table
    assert (place / "results-42/arms.png").is_file()
    capsys.readouterr()
    script.main(["--study", study])
    assert "kept" in capsys.readouterr().out
    with pytest.raises(InputError, match="of another request"):
        script.main(["--study", str(place / "s.yaml")])


def test_what_is_no_arm_of_the_plain_run_is_refused(script, place, blocks):
    def refused(match: str, name: str = "odd", **what):
        study = with_arms(place, "odd.yaml", **{name: what or {"freeze": "0"}})
        with pytest.raises(InputError, match=match):
            script.main(["--study", study, "--measures", "nll", "-o", str(place / "odd.json")])

    with pytest.raises(InputError, match="leave out --arm"):
        script.main(["--study", str(place / "s.yaml"), "--arm", "middle"])
    refused("holds no finished training; run cpt/train.py --stage cpt --arm odd first")
    stand_in(place, "odd", place / "base", "0", 0)
    refused("was trained as another arm than odd is in the study now", freeze="1")
    refused("was trained as another arm", freeze="0", io="frozen")
    run = place / "seed-42/arms/odd/cpt"
    record = json.loads((run / "train.json").read_text())
    record["settings"]["learning_rate"] = 1.0
    (run / "train.json").write_text(json.dumps(record))
    refused("is not an arm of .*learning_rate: 0.003 asked for, 1.0 in the file")
    record["settings"]["learning_rate"] = 3e-3
    (run / "train.json").write_text(json.dumps(record))
    plain = place / "seed-42/cpt/train.json"
    text = plain.read_text()
    plain.write_text(json.dumps({**json.loads(text), "settings": {**record["settings"], "freeze": {"layers": [0]}}}))
    refused("seed-42/cpt has a frozen part itself, so it is not a plain run")
    plain.write_text(text)
    # Of a plain run that was trained elsewhere there is no record to compare with.
    with pytest.MonkeyPatch.context() as patched:
        record["settings"]["from"]["weights_sample"] = "0" * 16
        (run / "train.json").write_text(json.dumps(record))
        patched.setattr(script.Path, "is_file", lambda path: path != plain and path.exists())
        refused("odd/cpt was trained from another base than .*/base is now; run cpt/train.py --stage cpt --arm odd")
    record["settings"] = json.loads(text)["settings"]
    (run / "train.json").write_text(json.dumps(record))
    (run / f"checkpoint-{STEPS}").rename(run / "checkpoint-10")
    refused("ends at step 10, the plain run at 30")


def test_words_that_mean_other_layers_since_are_refused(script, place, blocks):
    """Step 2 was run again after the arm was trained, and names another hub."""
    stand_in(place, "moved", place / "base", "hub", 0)
    file, head = place / "results-42/layer-specialize/layers.json", results.header("layer-specialize")
    study = with_arms(place, "moved.yaml", moved={"freeze": "hub"})
    more = ["--study", study, "--measures", "nll", "-o", str(place / "moved.json")]
    results.write_json(file, {"interface_layers": [1, 2], "semantic_layers": [0]}, head)
    script.main(more)
    results.write_json(file, {"interface_layers": [0, 2], "semantic_layers": [1]}, head)
    with pytest.raises(InputError, match=r"moved/cpt: freeze hub means something else now \(layers: \[1\] asked for"):
        script.main(more)


def test_an_arm_may_be_lora(script, place, blocks):
    """An adapter that stands for the base; the same keys in other words are the same arm, other layers another one."""
    import peft

    keys = {"r": 2, "alpha": 4, "dropout": 0.0, "targets": ["q_proj", "v_proj"], "layers": [0]}
    folder = place / "adapter"
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(folder)
    stand_in(place, "low", folder, "layers=0,r=2,targets=q_proj,v_proj", lora=keys, io=None)
    asked = {"targets": ["q_proj", "v_proj"], "r": 2, "layers": [0]}
    study = with_arms(place, "lora.yaml", low={"lora": asked})
    more = ["--measures", "nll", "-o", str(place / "lora.json")]
    script.main(["--study", study, *more])
    models = results.read_json(place / "lora.json", "arms")[0]["models"]
    assert models["low"]["what"] == {"lora": asked} and models["low"]["layers"] == [0]
    assert models["low"]["values"] == pytest.approx(models["base"]["values"])
    assert "| low | lora layers=0,r=2,targets=q_proj,v_proj | 50.0% |" in (place / "lora.md").read_text()
    for change, match in (({"r": 3}, "was trained as another arm"), ({"layers": "first:1"}, "was trained as another")):
        study = with_arms(place, "lora.yaml", low={"lora": asked | change})
        with pytest.raises(InputError, match=match):
            script.main(["--study", study, *more])
    assert script.drawn({"lora": {"r": 2, "layers": "random:1:7"}}, 7) == {
        "lora": {"r": 2, "layers": "random:1:{seed}"}
    }


def test_a_resample_without_gain_takes_no_interval_away(script):
    """Ten sentences, of which CPT gained four: some of 2,000 resamples hold none of these."""
    base, plain = np.zeros(10), np.repeat([0.0, 1.0], (6, 4))
    share = script.compare(base, base, plain, 1, 42)["share"]
    assert share == {"value": 0.0, "ci_low": 0.0, "ci_high": 0.0}


def test_seeds_in_the_paths_of_files_are_no_difference(script):
    what = {"train_only": "results/0.5/seed-1/layer-ablation/cogsym.json/ffn"}
    assert script.drawn(what, 1) == {"train_only": "results/0.5/seed-{seed}/layer-ablation/cogsym.json/ffn"}
    assert script.drawn({"freeze": "hub:r10/1.json"}, 1) == {"freeze": "hub:r10/{seed}.json"}
    assert script.drawn({"train_only": "outer:0.25"}, 0) == {"train_only": "outer:0.25"}
    assert script.drawn({"train_only": "random:2:10"}, 0) == {"train_only": "random:2:1{seed}"}  # a second draw
    assert script.drawn({"train_only": "random:2:11/ffn"}, 11) == {"train_only": "random:2:{seed}/ffn"}


def test_seeds_side_by_side(script, place, tmp_path):
    """Made-up results of three seeds, one of which gained nothing."""
    study = with_arms(place, "seeds.yaml", middle={"train_only": [1]})

    def write(seed: int, share: float | None, sample: str, drawn: str = "random:1:{seed}") -> None:
        interval = None if share is None else {"value": share, "ci_low": share - 0.1, "ci_high": share + 0.1}
        arm = {"values": {"m": 1.0}, "what": {"train_only": [1]}, "share": {"m": interval}}
        others = {"any": drawn.format(seed=seed), "near": "matched:hub:1"}  # a seed of its own, and one for all seeds
        arms = {"middle": arm} | {name: arm | {"what": {"freeze": words}} for name, words in others.items()}
        payload = {
            "measures": {"m": {"label": "M", "higher_is_better": True}},
            "models": {"base": {"values": {"m": 0.0}}, "plain": {"values": {"m": 2.0}}, **arms},
        }
        header = results.header("arms", models={"plain": {"weights_sample": sample}})
        results.write_json(place / f"results-{seed}/arms.json", payload, header)

    for seed, share in ((1, 0.5), (2, 0.8), (3, None)):
        write(seed, share, str(seed))
    out = tmp_path / "seeds.json"
    script.main(["--study", study, "--seeds", "1,2,3", "--output", str(out)])
    arms = results.read_json(out, "arms-over-seeds")[0]["arms"]
    assert arms["any"]["what"] == {"freeze": "random:1:{seed}"} and arms["near"]["what"] == {"freeze": "matched:hub:1"}
    own = arms["middle"]["m"]
    assert own["shares"] == [0.5, 0.8, None] and own["n"] == 2
    assert own["mean"] == pytest.approx(0.65) and own["sd"] == pytest.approx(0.2121, abs=1e-4)
    assert "0.65 ± 0.21 (n 2)" in out.with_suffix(".md").read_text() and out.with_suffix(".png").is_file()
    write(3, 0.5, "3", "random:2:{seed}")
    with pytest.raises(InputError, match="seed 3 has other arms or measures than seed 1"):
        script.main(["--study", study, "--seeds", "1,2,3", "--output", str(out)])
    write(3, 0.5, "2")
    with pytest.raises(InputError, match="comes from the same run as seed 2"):
        script.main(["--study", study, "--seeds", "1,2,3", "--output", str(out)])
    with pytest.raises(InputError, match=r"run cpt/compare_arms.py --seed 9 first"):
        script.main(["--study", study, "--seeds", "1,9", "--output", str(out)])
    with pytest.raises(InputError, match="--seeds needs --output"):
        script.main(["--study", study, "--seeds", "1,2"])
