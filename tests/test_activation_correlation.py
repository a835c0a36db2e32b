"""The two correlation strengths: against scipy on the same numbers, the files they come from, and what is refused."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from helpers import assert_drawn_again, failed_gate, load_script
from scipy import stats as scipy_stats

from cpt_utils.base import results
from cpt_utils.base.errors import InputError

script = load_script("activation-correlation/activation-correlation.py")

STEPS = (5, 10, 40, 80, 100, 200)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def model(step: int | None, letter: str = "a") -> dict:
    """What a header says of a checkpoint (or the base) that was trained as `letter`."""
    spec = f"build/run/checkpoint-{step}" if step else "build/base"
    facts = {"spec": spec, "model_id": spec.replace("/", "__"), "step": step, "revision": None}
    return facts | {"weights_sample": f"{letter}{step or 0:015d}"}


def activation(path, mean, control, step=None, letter="a", lang="gle_Latn", neurons=(1, 2), text="t" * 16):
    facts = {"control": control, "step": step, "language": lang, "tokens": {"sha256": text}, "n_layers": 3}
    facts["request"] = {"mask": {"0": list(neurons), "1": [], "2": []}}
    head = results.header("lsn-activation", models={"model": model(step, letter)}, **facts)
    results.write_json(path, {"all_layers": mean, "layers": {"0": mean}}, head)


def write_all(folder, steps=STEPS, seed=0, control=True, random="checkpoint-{}-r"):
    """Made-up results of every step before, in the places of a study called `trial`; returns the numbers in them.

    `random`: what the control of a step is called.
    """
    rng = np.random.default_rng(seed)
    weights = np.cumsum(rng.random((len(steps), 3, 7)), axis=0)
    gates, others = (np.cumsum(rng.random((len(steps), 2)), axis=0) for _ in range(2))
    means = rng.normal(size=(len(steps) + 1, 2))
    models = {"base": model(None), "checkpoints": {str(step): model(step) for step in steps}}
    attention = {
        str(step): {"layers": {f"layer_{i}": dict(zip(PROJECTIONS, weights[s, i], strict=True)) for i in range(3)}}
        for s, step in enumerate(steps)
    }
    facts = {"models": models, "n_layers": 3}
    results.write_json(
        folder / "weight-diff" / "attn_vs_ffn.json", {"checkpoints": attention}, results.header("attn_vs_ffn", **facts)
    )
    rows = {}
    for s, step in enumerate(steps):
        of = {"layers": gates[s]} | ({"control": others[s]} if control else {})
        rows[str(step)] = {
            group: {"layer_0": {"gate_proj": values[0]}, "layer_2": {"gate_proj": values[1]}}
            for group, values in of.items()
        }
    fingerprint = load_script("weight-diff/gate_lsn.py").fingerprint
    facts |= {"language": "gle_Latn", "mask": fingerprint({0: [1, 2], 1: [], 2: []}), "control": None}
    results.write_json(
        folder / "weight-diff" / "gate_lsn.json", {"checkpoints": rows}, results.header("gate_lsn", **facts)
    )
    layers = {"interface_layers": [0, 2], "semantic_layers": [1]}
    head = results.header("layer-specialize", n_layers=3, models={"model": model(steps[-1])})
    results.write_json(folder / "layer-specialize" / "layers.json", layers, head)
    place = folder / "lsn" / "lsn_activation"
    for s, step in enumerate((None, *steps)):
        for c, (prefix, called) in enumerate((("", "checkpoint-{}"), ("r.", random))):
            name = f"trial/{called.format(step)}.ga.98304.json" if step else f"base/{prefix}ga.98304.json"
            activation(place / name, means[s, c], bool(c), step, neurons=(3, 4) if c else (1, 2))
    return weights, gates, others, means


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "name: trial\nbase: build/base\nrun: build/run\nlanguages: {target: gle_Latn}\nresults: results\n"
    (tmp_path / "study.yaml").write_text(text)
    return tmp_path / "results"


@pytest.fixture
def no_figure(monkeypatch):
    monkeypatch.setattr(script, "draw", lambda *_: None)


def result(folder):
    return results.read_json(folder / "activation-correlation" / "trial_correlation_strength.json", script.SCHEMA)


def edit(path, change):
    """Rewrite a JSON file as `change(contents)` leaves it."""
    contents = json.loads(path.read_text())
    change(contents)
    path.write_text(json.dumps(contents))


def same_as_scipy(found, x, y):
    for method, function in (("pearson", scipy_stats.pearsonr), ("spearman", scipy_stats.spearmanr)):
        for part, xs, ys in ((found, x, y), (found["first_differences"], np.diff(x), np.diff(y))):
            expected = function(xs, ys)
            assert part[method]["correlation"] == pytest.approx(expected.statistic, abs=1e-12)
            assert part[method]["p_value"] == pytest.approx(expected.pvalue, abs=1e-12)
            assert part[method]["n_points"] == len(xs)
            assert part[method]["ci_low"] < part[method]["correlation"] < part[method]["ci_high"]


def test_a_failed_gate_goes_on_and_is_said(study, no_figure, capsys):
    write_all(study)
    edit(study / "layer-specialize/layers.json", lambda contents: contents["_header"].update(gate=failed_gate()))
    script.main([])
    assert result(study)[1]["gate"] == failed_gate()
    assert capsys.readouterr().err.count("everything built on them mean nothing") == 1


@pytest.mark.figures
def test_equals_scipy_on_the_same_numbers(study, capsys):
    weights, gates, others, means = write_all(study)
    script.main([])
    found, header = result(study)
    d = (means[1:, 0] - means[1:, 1]) - (means[0, 0] - means[0, 1])
    attention = weights[:, [0, 2], :4].max(2).mean(1)
    gate, more = gates.mean(1), gates.mean(1) - others.mean(1)
    series = found["series"]
    assert series["steps"] == list(STEPS)  # the base is no point of a correlation
    for key, values in (("d", d), ("attention", attention), ("gate", gate), ("gate_minus_control", more)):
        assert series[key] == pytest.approx(values, abs=1e-12)
    assert series["abs_d"] == pytest.approx(np.abs(d))
    for kind, x in (("interface_attention", attention), ("lsn_ffn", gate), ("lsn_ffn_minus_control", more)):
        same_as_scipy(found[kind], x, np.abs(d))
        same_as_scipy(found["signed"][kind], x, d)
    for kind in ("interface_attention", "lsn_ffn"):
        assert found[f"{kind}_correlation_strength"] == found[kind]["pearson"]["correlation"]
    for part in ("raw", "first_differences"):
        one, two = (found[kind] for kind in ("interface_attention", "lsn_ffn"))
        if part != "raw":
            one, two = one[part], two[part]
        difference = found["comparison"][part]
        expected = one["pearson"]["correlation"] - two["pearson"]["correlation"]
        assert difference["difference"] == pytest.approx(expected)
        assert difference["ci_low"] < expected < difference["ci_high"]
    assert header["interface_layers"] == [0, 2] and header["n_used"] == header["n_available"] == 6
    assert (header["language"], header["tokens"], found["note"]) == ("gle_Latn", "98304", None)
    assert "interface attention minus lsn ffn" in capsys.readouterr().out

    figure = study / "activation-correlation/trial_correlation_strength"
    assert_drawn_again(figure, lambda: script.main(["--lang", "ga"]))  # the same language, made anew
    assert_drawn_again(figure, lambda: script.draw(figure, found))  # from the file alone
    assert result(study)[0] == found


def test_all_flags_without_a_study_and_without_a_control_of_the_gates(tmp_path, no_figure):
    write_all(tmp_path, control=False)
    flags = {
        "--model-name": "trial",
        "--lang": "gle_Latn",
        "--base-tag": "base",
        "--lsn-activation-path": tmp_path / "lsn" / "lsn_activation",
        "--all-weight-diff-path": tmp_path / "weight-diff" / "attn_vs_ffn.json",
        "--lsn-weight-diff-path": tmp_path / "weight-diff" / "gate_lsn.json",
        "--layer-selection-path": tmp_path / "layer-specialize" / "layers.json",
        "--output-dir": tmp_path / "activation-correlation",
    }
    script.main([str(part) for flag in flags.items() for part in flag])
    found, _ = result(tmp_path)
    assert found["lsn_ffn_minus_control"] is None and found["series"]["gate_control"] is None
    assert set(found["signed"]) == {"interface_attention", "lsn_ffn"}
    del flags["--model-name"]
    with pytest.raises(InputError, match="nothing says name: give --model-name"):
        script.main([str(part) for flag in flags.items() for part in flag])


@pytest.mark.parametrize("steps", [(5,), (5, 10)])
def test_a_run_of_two_checkpoints_is_too_short(study, capsys, steps):
    write_all(study, steps=steps)
    script.main([])
    found, _ = result(study)
    assert "too few for a correlation" in found["note"] and len(found["series"]["d"]) == len(steps)
    assert found["interface_attention_correlation_strength"] is None and found["lsn_ffn_correlation_strength"] is None
    assert found["interface_attention"]["pearson"]["p_value"] is None
    assert found["comparison"]["raw"]["difference"] is None
    captured = capsys.readouterr()
    assert "the run is too short" in captured.err and "r +1" not in captured.out
    assert (study / "activation-correlation" / "trial_correlation_strength.pdf").exists()


def test_three_checkpoints_have_no_first_differences(study, no_figure, capsys):
    write_all(study, steps=(5, 10, 40))
    script.main([])
    found, _ = result(study)
    assert found["note"] is None and found["interface_attention"]["pearson"]["correlation"] is not None
    assert "2 points are too few" in found["interface_attention"]["first_differences"]["pearson"]["note"]
    assert "first differences: none, 2 points are too few" in capsys.readouterr().out


def test_steps_that_do_not_match(study, no_figure):
    write_all(study)
    place = study / "lsn" / "lsn_activation" / "trial"
    (place / "checkpoint-80-r.ga.98304.json").unlink()
    edit(study / "weight-diff" / "gate_lsn.json", lambda found: found["checkpoints"].pop("5"))
    message = r"steps do not match: .*gate_lsn.json has no step 5, and activation of the control .*trial has no step 80"
    with pytest.raises(InputError, match=message):
        script.main([])
    with pytest.raises(InputError, match=r"of the control in .*trial has no step 80; give --steps that all have"):
        script.main(["--steps", "10,80,100"])
    script.main(["--steps", "10,40,100,200"])
    found, header = result(study)
    assert found["series"]["steps"] == [10, 40, 100, 200] and (header["n_used"], header["n_available"]) == (4, 4)


def test_what_is_missing_is_named(study, no_figure):
    def fails(message, argv=()):
        with pytest.raises(InputError, match=message) as error:
            script.main(list(argv))
        assert "\n" not in str(error.value) and not (study / "activation-correlation").exists()

    fails("lsn_activation does not exist; run lsn/lsn_activation_cpt.py first")
    write_all(study)
    place = study / "lsn" / "lsn_activation"
    fails("nothing for eus_Latn; there is ga", ["--lang", "eus_Latn"])
    fails("no activations of the base: .*other does not exist; .*give --base-tag", ["--base-tag", "other"])
    fails("no activations of the run: .*other does not exist; .*give --model-name", ["--model-name", "other"])
    kept = (place / "base" / "ga.98304.json").read_text()
    (place / "base" / "ga.98304.json").unlink()
    fails("lsn_activation lacks the base's activation over 98304 tokens; run lsn/lsn_activation_cpt.py")
    (place / "base" / "ga.98304.json").write_text(kept)
    for file in (place / "trial").glob("*-r.*"):
        file.rename(file.with_name(file.name + ".aside"))
    fails("lsn_activation lacks the control of the checkpoints over 98304 tokens")
    for file in (place / "trial").glob("*-r.*"):
        file.rename(file.with_name(file.name.removesuffix(".aside")))
    shutil.rmtree(place / "base")
    (place / "base").mkdir()
    fails("base: nothing for gle_Latn; there is nothing")
    shutil.rmtree(place)
    write_all(study)
    (study / "weight-diff" / "gate_lsn.json").unlink()
    fails("gate_lsn.json does not exist; run weight-diff/gate_lsn.py first, or give --lsn-weight-diff-path")


def test_several_numbers_of_tokens(study, no_figure):
    write_all(study)
    place = study / "lsn" / "lsn_activation"
    shutil.copy(place / "trial" / "checkpoint-5.ga.98304.json", place / "trial" / "checkpoint-5.ga.4096.json")
    script.main([])  # only one of them has a control and a base
    assert result(study)[1]["tokens"] == "98304"
    for file in [*place.glob("*/*.ga.98304.json"), place / "base" / "ga.98304.json"]:
        shutil.copy(file, file.with_name(file.name.replace("98304", "4096")))
    with pytest.raises(InputError, match="activations over 4096 and over 98304 tokens; keep one kind"):
        script.main([])


def test_files_of_other_models_neurons_or_languages(study, no_figure):
    def fails(message, file, change):
        write_all(study)
        edit(study / file, change)
        with pytest.raises(InputError, match=message) as error:
            script.main([])
        assert "\n" not in str(error.value) and not (study / "activation-correlation").exists()

    def models(found, role, step, letter="b"):
        here = found["_header"]["models"]
        (here["checkpoints"] if role == "checkpoints" else here)[str(step) if step else role] = model(step, letter)

    run, base = "lsn/lsn_activation/trial/checkpoint-40.ga.98304.json", "lsn/lsn_activation/base/ga.98304.json"
    gates, weights, layers = "weight-diff/gate_lsn.json", "weight-diff/attn_vs_ffn.json", "layer-specialize/layers.json"
    different = r"gate_lsn.json and .*attn_vs_ffn.json are about different models \({}: .*trained again in between"
    fails(different.format("step 40"), gates, lambda found: models(found, "checkpoints", 40))
    fails(different.format("base"), gates, lambda found: models(found, "base", None))

    def trained_again(step):
        return lambda found: found["_header"]["models"].update(model=model(step, "b"))

    fails(r"checkpoint-40.ga.98304.json and .* different models \(step 40", run, trained_again(40))
    fails(r"base/ga.98304.json and .* different models \(base", base, trained_again(None))
    fails("layers.json was made from .* neither the base nor a checkpoint", layers, trained_again(200))
    fails("names layer 5; the model", layers, lambda found: found["interface_layers"].append(5))

    def says(**facts):
        return lambda found: found["_header"].update(facts)

    fails("gate_lsn.json is about eus_Latn, not gle_Latn", gates, says(language="eus_Latn"))
    fails("checkpoint-40.* is about eus_Latn, not gle_Latn", run, says(language="eus_Latn"))
    fails(
        r"checkpoint-40-r.* and .*checkpoint-40.ga.* are both of the random control at step 40", run, says(control=True)
    )
    fails("activation in .* has no step 40", run, says(limit=1))
    fails("gate_lsn.json were made with different masks", gates, says(mask="0" * 16))
    fails("were made with different control masks", gates, says(control="0" * 16))
    fails("were made with different texts", run, says(tokens={"sha256": "u" * 16}))
    fails("holds 'gate_lsn', but 'attn_vs_ffn' is needed", weights, says(schema="gate_lsn"))

    def without(*keys):
        def change(found):
            for key in keys[:-1]:
                found = found[key]
            del found[keys[-1]]

        return change

    here = ("checkpoints", "40", "layers", "layer_2")
    fails("lacks q, k, v or o of an interface layer", weights, without(*here, "k_proj"))
    fails("lacks gate_proj", gates, without(*here, "gate_proj"))
    fails("gate_lsn.json has no checkpoints with layers", gates, without("checkpoints", "40", "layers"))
    fails("has no mean activation all_layers", run, without("all_layers"))


def test_an_output_of_something_else_is_kept(study, no_figure):
    write_all(study)
    output = study / "activation-correlation" / "trial_correlation_strength.json"
    output.parent.mkdir()
    output.write_text('{"interface_attention_correlation_strength": 0.9}')
    with pytest.raises(
        InputError, match=r"of another request \(how the file was made is not known\); give --overwrite"
    ):
        script.main([])
    script.main(["--overwrite"])
    edit(output, lambda found: found["_header"].update(language="eus_Latn"))
    with pytest.raises(InputError, match=r"\(language: gle_Latn asked for, eus_Latn in the file\)"):
        script.main([])


def test_files_without_headers_are_taken_on_trust(study, no_figure, capsys):
    write_all(study)
    script.main([])
    before, _ = result(study)
    for file in [*study.glob("weight-diff/*.json"), *study.glob("lsn/*/*/*.json")]:
        edit(file, lambda found: found.pop("_header"))
    script.main([])
    assert result(study)[0] == before and "has no header" in capsys.readouterr().err


def test_names_of_the_published_scripts_and_of_earlier_versions(study, no_figure, capsys):
    """The published step 10 takes every file without `-r` in its name for one of the neurons, so these are named so."""
    write_all(study)
    script.main([])
    before, _ = result(study)
    place = study / "lsn" / "lsn_activation" / "trial"
    means = {False: {}, True: {}}  # as published: any JSON file, `-r` anywhere in its name
    for file in place.glob("*.json"):
        step = int(re.search(r"checkpoint-(\d+)", file.stem)[1])
        means["-r" in file.stem][step] = json.loads(file.read_text())["all_layers"]
    assert means[False] == dict(zip(STEPS, before["series"]["activation"], strict=True))
    assert means[True] == dict(zip(STEPS, before["series"]["activation_control"], strict=True))

    for names in ("r.checkpoint-{}", "checkpoint-{}-random", "qwen-rl.checkpoint-{}-r"):
        shutil.rmtree(place)
        write_all(study, random=names)
        for header in (True, False):
            for file in [] if header else place.glob("*.json"):
                edit(file, lambda found: found.pop("_header"))
            script.main([])
            assert result(study)[0] == before, names
    # By its header a file may be called anything; a model whose name has -r in it is no control.
    shutil.rmtree(place)
    write_all(study)
    for file in list(place.glob("*.json")):
        step = re.search(r"checkpoint-(\d+)", file.stem)[1]
        file.rename(place / f"qwen-rl_{'random' if '-r' in file.stem else 'own'}{step}.ga.98304.json")
    for file in list((place.parent / "base").glob("*.json")):
        file.rename(file.with_name("control.ga.98304.json" if file.name.startswith("r.") else "qwen-rl.ga.98304.json"))
    script.main([])
    assert result(study)[0] == before


def test_both_names_of_one_step(study, no_figure):
    """The same request under both names is one result; another one is refused, and both are named."""
    write_all(study)
    place = study / "lsn" / "lsn_activation" / "trial"
    shutil.copy(place / "checkpoint-40-r.ga.98304.json", place / "r.checkpoint-40.ga.98304.json")
    script.main([])
    before, _ = result(study)
    edit(place / "r.checkpoint-40.ga.98304.json", lambda found: found.update(all_layers=9.0))  # the last digits, say
    script.main([])
    assert result(study)[0] == before
    edit(place / "r.checkpoint-40.ga.98304.json", lambda found: found["_header"]["request"].update(mask={"0": [5, 6]}))
    message = r"checkpoint-40-r.ga.98304.json and .*r.checkpoint-40.ga.98304.json are both of the random control"
    with pytest.raises(InputError, match=message):
        script.main([])
    for name in ("checkpoint-40-r", "r.checkpoint-40"):
        edit(place / f"{name}.ga.98304.json", lambda found: found.pop("_header"))
    with pytest.raises(InputError, match=message):
        script.main([])


def test_a_part_of_the_run_leaves_the_study_s_place_free(study, no_figure):
    write_all(study)
    script.main(["--steps", "10,40,200"])
    assert [path.name for path in (study / "activation-correlation").iterdir()] == [
        "trial.steps-10-to-200.3_correlation_strength.json"
    ]
    script.main(["--steps", ",".join(map(str, STEPS))])
    assert result(study)[0]["series"]["steps"] == list(STEPS)
