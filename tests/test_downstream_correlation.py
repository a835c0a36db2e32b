"""Correlation with a downstream task: the statistics against scipy, and the choice among lm_eval's result files."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from helpers import failed_gate, load_script
from scipy import stats as scipy_stats

from cpt_utils.base.errors import InputError

script = load_script("downstream-correlation/downstream_correlation.py")
TASK = "sib200_gle_Latn"
STEPS = [15, 40, 80, 150, 225, 300]
ACC = [0.30, 0.42, 0.41, 0.55, 0.58, 0.66]
INTERFACE = [0.001, 0.003, 0.0035, 0.005, 0.006, 0.0061]
HUB = [0.002, 0.002, 0.0022, 0.0019, 0.003, 0.0024]


def weight_diff(path, steps=STEPS, interface=INTERFACE, hub=HUB, run="build/run", base="build/base", header=None):
    rows = {str(s): {"interface_avg": i, "semantic_hub_avg": h} for s, i, h in zip(steps, interface, hub, strict=True)}
    content = {"base_model": base, "target_model": run, "checkpoints": rows}
    path.write_text(json.dumps(({"_header": header} if header else {}) | content))
    return path


def bench(path, values=None, task=TASK, **row):
    values = dict(zip(STEPS, ACC, strict=True)) if values is None else values
    path.write_text(json.dumps({str(s): {task: {"acc": v} | row} for s, v in values.items()}))
    return path


def lm_eval_file(folder, model, acc, time="2026-11-20T10-00-00", date=1.0, n=(204, 204), group=False, **change):
    """A result file as lm_eval 0.4.13 writes it, reduced to the keys that are read."""
    content = {
        "results": {TASK: {"alias": TASK, "acc,none": acc, "acc_stderr,none": 0.03, "acc_norm,none": acc / 2}},
        "configs": {TASK: {"doc_to_text": "prompt"}},
        "versions": {TASK: 1.0},
        "n-shot": {TASK: 0},
        "n-samples": {TASK: {"original": n[0], "effective": n[1]}},
        "config": {"model_args": {"pretrained": model}, "model_dtype": "torch.float32"},
        "date": date,
    }
    if group:
        content["results"]["sib200"] = {"acc,none": 0.5, "acc_stderr,none": "N/A"}
    for key, value in change.items():
        content[key.replace("_", "-") if key == "n_shot" else key] = value
    file = folder / model.replace("/", "__").replace("@", "__") / f"results_{time}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def test_a_failed_gate_goes_on_and_is_said(tmp_path, capsys):
    for gate, times in ((failed_gate(), 1), (None, 0)):
        head = {"schema": "int_and_sem", "gate": gate}
        diff = weight_diff(tmp_path / "diff.json", header=head)
        script.main([str(bench(tmp_path / "bench.json")), str(diff), "-o", str(tmp_path / "out.json")])
        assert capsys.readouterr().err.count("everything built on them mean nothing") == times
        assert json.loads((tmp_path / "out.json").read_text())["_header"]["gate"] == gate


def run_folder(folder, values=None, run="build/run"):
    for step, acc in (values or dict(zip(STEPS, ACC, strict=True))).items():
        lm_eval_file(folder, f"{run}/checkpoint-{step}", acc)
    return folder


def correlate(tmp_path, source, diff, *flags, figure=False):
    """Run the script; most tests are about numbers and do without the figure, which takes most of the time."""
    out = tmp_path / "out" / "correlation.json"
    with pytest.MonkeyPatch.context() as patch:
        if not figure:
            patch.setattr(script, "draw", lambda *arguments: None)
        script.main([str(source), str(diff), "-o", str(out), *flags])
    return json.loads(out.read_text())


def test_both_layer_types_equal_scipy(tmp_path):
    found = correlate(tmp_path, bench(tmp_path / "b.json"), weight_diff(tmp_path / "d.json"), figure=True)
    for kind, change in (("interface", INTERFACE), ("semantic_hub", HUB)):
        row = found[kind]
        for part, x, y in ((row, change, ACC), (row["first_differences"], np.diff(change), np.diff(ACC))):
            pearson, spearman = scipy_stats.pearsonr(x, y), scipy_stats.spearmanr(x, y)
            interval = pearson.confidence_interval(0.95)
            assert part["n_points"] == len(x)
            assert part["correlation"] == pytest.approx(pearson.statistic, abs=1e-12)
            assert part["p_value"] == pytest.approx(pearson.pvalue, abs=1e-12)
            assert (part["ci_low"], part["ci_high"]) == pytest.approx((interval.low, interval.high), abs=1e-12)
            assert part["spearman"]["correlation"] == pytest.approx(spearman.statistic, abs=1e-12)
            assert part["spearman"]["p_value"] == pytest.approx(spearman.pvalue, abs=1e-12)
    assert found["values"]["15"] == pytest.approx(
        {"acc": 0.3, "stderr": math.sqrt(0.3 * 0.7 / 204), "n": 204, "interface_avg": 0.001, "semantic_hub_avg": 0.002}
    )
    assert found["_header"]["n_used"] == 6
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "correlation.json",
        "correlation.pdf",
        "correlation.png",
    ]


@pytest.mark.figures
def test_a_rerun_gives_the_same_bytes(tmp_path):
    source, diff = bench(tmp_path / "b.json"), weight_diff(tmp_path / "d.json")
    correlate(tmp_path, source, diff, figure=True)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    correlate(tmp_path, source, diff, figure=True)
    for path in (tmp_path / "out").iterdir():
        if path.suffix == ".json":
            old, new = json.loads(before[path.name]), json.loads(path.read_text())
            for content in (old, new):
                content["_header"].pop("time")
            assert old == new
        else:
            assert path.read_bytes() == before[path.name]


def test_the_base_never_enters(tmp_path):
    source = bench(tmp_path / "b.json", {0: 0.99} | dict(zip(STEPS, ACC, strict=True)))
    diff = weight_diff(tmp_path / "d.json", [0, *STEPS], [0.0, *INTERFACE], [0.0, *HUB])
    found = correlate(tmp_path, source, diff)
    assert found["interface"]["n_points"] == 6 and found["interface"]["first_differences"]["n_points"] == 5
    assert found["interface"]["correlation"] == pytest.approx(scipy_stats.pearsonr(INTERFACE, ACC).statistic)
    assert found["values"]["0"]["acc"] == 0.99


def test_steps_takes_a_part_of_the_run(tmp_path):
    source = bench(tmp_path / "b.json", dict(zip(STEPS, ACC, strict=True)))
    found = correlate(tmp_path, source, weight_diff(tmp_path / "d.json"), "--steps", "15,80,300")
    assert list(found["values"]) == ["15", "80", "300"]
    with pytest.raises(InputError, match="no common step 16"):
        correlate(tmp_path, source, weight_diff(tmp_path / "d.json"), "--steps", "15,16", "--overwrite")


def test_stride_takes_every_nth_common_step(tmp_path, capsys):
    values = dict(zip(STEPS, ACC, strict=True)) | {999: 0.1}
    del values[40]
    found = correlate(
        tmp_path, bench(tmp_path / "b.json", values), weight_diff(tmp_path / "d.json"), "--checkpoint-stride", "2"
    )
    assert list(found["values"]) == ["15", "150", "300"]
    assert found["unmatched_steps"] == {"benchmark_only": [999], "weight_diff_only": [40]}
    warned = capsys.readouterr().err
    assert "999" in warned and "40" in warned


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_points_give_null_instead_of_one(tmp_path, capsys, n):
    source = bench(tmp_path / "b.json", dict(zip(STEPS[:n], ACC, strict=False)))
    found = correlate(tmp_path, source, weight_diff(tmp_path / "d.json"), figure=True)
    for row in (found["interface"], found["semantic_hub"], found["interface"]["first_differences"]):
        assert row["correlation"] is None and row["p_value"] is None and row["spearman"]["correlation"] is None
        assert "too few" in row["note"]
    printed = capsys.readouterr()
    assert "too few" in printed.err and "no correlation" in printed.out


def test_a_constant_series_gives_null_with_the_reason(tmp_path):
    found = correlate(tmp_path, bench(tmp_path / "b.json"), weight_diff(tmp_path / "d.json", hub=[0.002] * 6))
    assert found["semantic_hub"]["correlation"] is None
    assert "does not vary" in found["semantic_hub"]["note"]
    assert found["interface"]["correlation"] is not None


def test_no_common_step_is_an_error_that_names_both(tmp_path):
    source = bench(tmp_path / "b.json", {7: 0.2, 8: 0.3})
    with pytest.raises(InputError, match=r"7, 8.*15, 40") as error:
        correlate(tmp_path, source, weight_diff(tmp_path / "d.json"))
    assert "step 0" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_error_of_measurement_shrinks_with_the_rows(tmp_path):
    diff = weight_diff(tmp_path / "d.json")
    few, many = (correlate(tmp_path, bench(tmp_path / "b.json", n=n), diff)["interface"] for n in (204, 10**9))
    assert 0.1 < few["measurement_share"] < 0.9
    assert many["measurement_share"] < 1e-6
    # With the metric known exactly, what is left is Fisher's interval (4000 draws: within a few hundredths).
    assert many["ci_with_measurement_error"] == pytest.approx([many["ci_low"], many["ci_high"]], abs=0.05)
    assert many["ci_measurement_only"] == pytest.approx([many["correlation"]] * 2, abs=1e-3)
    assert few["ci_with_measurement_error"][0] < many["ci_with_measurement_error"][0]
    assert few["ci_measurement_only"][0] < few["correlation"]


def test_measurement_only_interval_is_the_spread_of_a_slow_simulation():
    rng = np.random.default_rng(7)
    drawn = [scipy_stats.pearsonr(INTERFACE, rng.binomial(204, ACC) / 204).statistic for _ in range(3000)]
    points = [script.benchmark.Point(value, 204, "") for value in ACC]
    row = script.relate(ACC, INTERFACE, script.redraw(points, seed=1), seed=1)
    assert row["ci_measurement_only"] == pytest.approx(list(np.quantile(drawn, [0.025, 0.975])), abs=0.02)


def test_reliability():
    points = [script.benchmark.Point(value, 204, "") for value in ACC]
    noise = np.mean([p.value * (1 - p.value) / 204 for p in points])
    assert script.reliability(points) == pytest.approx(1 - noise / np.var(ACC, ddof=1))
    flat = [script.benchmark.Point(value, 20, "") for value in (0.5, 0.51, 0.5)]
    assert script.reliability(flat) == 0.0
    assert script.reliability([script.benchmark.Point(0.5, None, ""), script.benchmark.Point(0.6, 9, "")]) is None


def test_unknown_rows_leave_the_error_of_measurement_out(tmp_path):
    found = correlate(tmp_path, bench(tmp_path / "b.json", task="other"), weight_diff(tmp_path / "d.json"))
    assert found["interface"]["correlation"] is not None
    assert found["interface"]["ci_with_measurement_error"] is None and found["reliability"] is None
    assert found["values"]["15"]["stderr"] is None


def test_folder_of_results(tmp_path, capsys):
    folder = run_folder(tmp_path / "lm_eval")
    lm_eval_file(folder, "build/base", 0.25)
    lm_eval_file(folder, "results/layer-swap/semantic_hub", 0.9)
    lm_eval_file(folder, "results/swapped/checkpoint-40", 0.9)
    lm_eval_file(folder, "build/run/checkpoint-15", 0.77, time="2026-11-19T10-00-00", date=0.5)
    (folder / "notes.json").write_text("[1, 2]")
    left_behind = folder / ".evaluate-x1" / "build__run__checkpoint-15" / "results_2026-11-30.json"
    left_behind.parent.mkdir(parents=True)
    left_behind.write_text('{"results": {')
    found = correlate(tmp_path, folder, weight_diff(tmp_path / "d.json"))
    same = correlate(tmp_path, bench(tmp_path / "b.json"), weight_diff(tmp_path / "d.json"))
    assert found["interface"] == same["interface"] and found["semantic_hub"] == same["semantic_hub"]
    assert found["values"]["0"]["acc"] == 0.25
    assert len(found["left_out"]) == 3
    assert any("newer" in note and "2026-11-19" in note for note in found["left_out"])
    assert "semantic_hub" in capsys.readouterr().out
    half = correlate(tmp_path, folder, weight_diff(tmp_path / "d.json"), "--metric", "acc_norm")
    assert half["values"]["300"]["acc_norm"] == ACC[-1] / 2


@pytest.mark.parametrize("place", ["../my-models", "./my-models", "../../models"])
def test_models_beside_the_folder_of_commands_are_found(tmp_path, place):
    folder = run_folder(tmp_path / "lm_eval", run=f"{place}/cpt")
    lm_eval_file(folder, f"{place}/base", 0.25)
    diff = weight_diff(tmp_path / "d.json", run=f"{place}/cpt", base=f"{place}/base")
    assert [row["acc"] for row in correlate(tmp_path, folder, diff)["values"].values()] == [0.25, *ACC]


def test_the_run_is_found_by_absolute_path_and_by_hub_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = run_folder(tmp_path / "a", run=str(tmp_path / "build" / "run"))
    lm_eval_file(folder, "elsewhere/checkpoint-15", 0.1)
    assert correlate(tmp_path, folder, weight_diff(tmp_path / "d.json"))["values"]["15"]["acc"] == 0.30

    folder = tmp_path / "b"
    for step, acc in zip(STEPS, ACC, strict=True):
        arguments = f"pretrained=org/model,revision=stage2-ingredient1-step{step}-tokens5B,dtype=float32"
        file = lm_eval_file(folder, "org/model", acc, time=str(step), config={"model_args": arguments})
        assert file.is_file()
    diff = weight_diff(tmp_path / "d.json", run="org/model@stage2-ingredient1-step15-tokens5B", base="org/model")
    assert list(correlate(tmp_path, folder, diff)["values"]) == [str(s) for s in STEPS]


def test_moved_folders_are_taken_by_their_step(tmp_path, capsys):
    folder = run_folder(tmp_path / "lm_eval", run="moved/run")
    found = correlate(tmp_path, folder, weight_diff(tmp_path / "d.json"))
    assert found["interface"]["n_points"] == 6
    assert "build/run" in capsys.readouterr().err
    lm_eval_file(folder, "third/checkpoint-40", 0.5)
    with pytest.raises(InputError, match="step 40 appears twice"):
        correlate(tmp_path, folder, weight_diff(tmp_path / "d.json"))


def test_limited_runs_are_refused_unless_there_is_a_full_one(tmp_path):
    folder = run_folder(tmp_path / "lm_eval")
    file = lm_eval_file(folder, "build/run/checkpoint-40", 0.9, time="2026-11-21T10-00-00", date=9.0, n=(204, 20))
    found = correlate(tmp_path, folder, weight_diff(tmp_path / "d.json"))
    assert found["values"]["40"]["acc"] == 0.42
    assert any("--limit" in note for note in found["left_out"])
    next(p for p in file.parent.iterdir() if p != file).unlink()
    with pytest.raises(InputError, match=r"checkpoint-40.*--limit \(20 of 204 rows\)"):
        correlate(tmp_path, folder, weight_diff(tmp_path / "d.json"))


def test_group_rows_are_refused(tmp_path):
    folder = tmp_path / "lm_eval"
    for step, acc in zip(STEPS, ACC, strict=True):
        lm_eval_file(folder, f"build/run/checkpoint-{step}", acc, group=True)
    with pytest.raises(InputError, match="sib200 is a group"):
        correlate(tmp_path, folder, weight_diff(tmp_path / "d.json"), "--task", "sib200")
    # The group row is no second task either: the only task is found without naming it.
    assert correlate(tmp_path, folder, weight_diff(tmp_path / "d.json"))["task"] == TASK


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_shot": {TASK: 5}}, "few-shot"),
        ({"versions": {TASK: 2.0}}, "task version"),
        ({"configs": {TASK: {"doc_to_text": "another"}}}, "prompt template"),
        ({"n": (99, 99)}, "number of rows"),
        ({"task_hashes": {TASK: "b"}}, "task hash"),
        ({"_header": {"data": {"prompts": {TASK: "b"}}}}, "prompts"),
    ],
)
def test_checkpoints_evaluated_differently_are_refused(tmp_path, change, words):
    folder = run_folder(tmp_path / "lm_eval")
    same = {"task_hashes": {TASK: "a"}, "_header": {"data": {"prompts": {TASK: "a"}}}}
    lm_eval_file(folder, "build/run/checkpoint-15", 0.3, **same)
    lm_eval_file(folder, "build/run/checkpoint-225", 0.5, **change)
    with pytest.raises(InputError, match=words) as error:
        correlate(tmp_path, folder, weight_diff(tmp_path / "d.json"))
    assert "step 225" in str(error.value)


def test_a_checkpoint_trained_again_is_refused(tmp_path):
    folder = run_folder(tmp_path / "lm_eval")
    head = {"models": {"model": {"spec": "build/run/checkpoint-80", "weights_sample": "new"}}}
    lm_eval_file(folder, "build/run/checkpoint-80", 0.41, _header=head)
    described = {"checkpoints": {"80": {"spec": "build/run/checkpoint-80", "weights_sample": "old"}}}
    diff = weight_diff(tmp_path / "d.json", header={"schema": "int_and_sem", "models": described})
    with pytest.raises(InputError, match="checkpoint-80 changed"):
        correlate(tmp_path, folder, diff)
    described["checkpoints"]["80"]["weights_sample"] = "new"
    weight_diff(diff, header={"schema": "int_and_sem", "models": described})
    assert correlate(tmp_path, folder, diff)["interface"]["n_points"] == 6


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p.joinpath("empty").mkdir() or p / "empty", r"no result files .*--output_path \S+empty"),
        (
            lambda p: p / "absent",
            r"absent does not exist; run .*lm_eval --output_path \S+absent; without that flag",
        ),
        (lambda p: bench(p / "b.json", {15: 151.2}), "not a number from 0 to 1"),
        (lambda p: bench(p / "b.json", {15: -0.1}), "not a number from 0 to 1"),
        (lambda p: bench(p / "b.json", {15: True}), "not a number from 0 to 1"),
        (
            lambda p: bench(p / "b.json", {15: 0.61, 40: 63.0}),
            r"0\.61 for sib200_gle_Latn at step 15 and 63\.0 .* at step 40; write all of them as shares",
        ),
        (lambda p: bench(p / "b.json", {"last": 0.5}), "not a step"),
        (lambda p: lm_eval_file(p / "one", "build/run/checkpoint-15", 0.5), "give the folder"),
        (lambda p: bench(p / "b.json", task="other"), "holds no task sib200_gle_Latn; it holds other"),
    ],
)
def test_bad_benchmarks_are_named(tmp_path, make, words):
    with pytest.raises(InputError, match=words):
        correlate(tmp_path, make(tmp_path), weight_diff(tmp_path / "d.json"), "--task", TASK)


def test_percent_is_a_hundred_times_the_share(tmp_path, capsys):
    diff = weight_diff(tmp_path / "d.json")
    values = {0: 0.0} | dict(zip(STEPS, ACC, strict=True))  # nothing right is 0 either way
    shares = correlate(tmp_path, bench(tmp_path / "b.json", values), diff)
    percent = correlate(tmp_path, bench(tmp_path / "b.json", {s: round(100 * v, 6) for s, v in values.items()}), diff)
    assert "taken as percent" in capsys.readouterr().out
    assert percent["values"]["300"] == pytest.approx(shares["values"]["300"])
    for kind in ("interface", "semantic_hub"):
        assert percent[kind]["correlation"] == pytest.approx(shares[kind]["correlation"])
        assert percent[kind]["measurement_share"] == pytest.approx(shares[kind]["measurement_share"], abs=0.02)


def test_rows_come_from_the_standard_errors_where_nothing_else_says_them(tmp_path, capsys):
    rows = {}
    for step, acc in zip(STEPS, ACC, strict=True):
        rows[str(step)] = {"other": {"acc": 100 * acc, "acc_stderr": 100 * (acc * (1 - acc) / 99) ** 0.5}}
    (tmp_path / "b.json").write_text(json.dumps(rows))
    found = correlate(tmp_path, tmp_path / "b.json", weight_diff(tmp_path / "d.json"))
    assert {row["n"] for row in found["values"].values()} == {100}
    assert "taken as 100, by the standard errors" in capsys.readouterr().out


def several(path, folder: bool):
    """Two tasks with the metric and one without, as a JSON file or as result files of lm_eval."""
    for step, acc in zip(STEPS, ACC, strict=True):
        rows = {TASK: {"acc": acc}, "other": {"acc": 1 - acc}, "generation": {"bleu": 3.0}}
        if folder:
            keyed = {task: {f"{key},none": value for key, value in row.items()} for task, row in rows.items()}
            lm_eval_file(
                path, f"build/run/checkpoint-{step}", acc, results=keyed, n_shot=dict.fromkeys(rows, 0),
                **{"n-samples": {task: {"original": 50, "effective": 50} for task in rows}},
            )  # fmt: skip
        else:
            whole = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(whole | {str(step): rows}))
    return path


@pytest.mark.parametrize("folder", [False, True])
def test_every_task_is_correlated_where_none_is_named(tmp_path, capsys, folder):
    source, diff = several(tmp_path / "b", folder), weight_diff(tmp_path / "d.json")
    found = correlate(tmp_path, source, diff, figure=True)
    printed = capsys.readouterr().out
    assert "tasks: sib200_gle_Latn, other, all in" in printed and "have no acc: generation" in printed
    assert list(found["tasks"]) == [TASK, "other"] and found["task"] == TASK
    single = {task: correlate(tmp_path, source, diff, "--task", task) for task in (TASK, "other")}
    for task, alone in single.items():
        assert "tasks" not in alone
        assert {key: alone[key] for key in found["tasks"][task]} == found["tasks"][task]
    # At the top stands the first task, with the keys that a single one has.
    assert {key: found[key] for key in single[TASK] if key != "_header"} == {
        key: value for key, value in single[TASK].items() if key != "_header"
    }
    assert found["tasks"]["other"]["interface"]["correlation"] == pytest.approx(-found["interface"]["correlation"])
    figures = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"correlation.png", "correlation.other.png", "correlation.other.pdf"} <= figures
    both = correlate(tmp_path, source, diff, "--task", f"other,{TASK}")
    assert both["task"] == "other" and list(both["tasks"]) == ["other", TASK]
    with pytest.raises(InputError, match=r"generation .*is None|generation has no metric acc; it has bleu"):
        correlate(tmp_path, source, diff, "--task", "generation")
    with pytest.raises(InputError, match=f"holds no task more; it holds generation, other, {TASK}"):
        correlate(tmp_path, source, diff, "--task", "other,more")


def test_tasks_of_the_base_alone_are_none_of_the_run(tmp_path):
    folder = run_folder(tmp_path / "lm_eval")
    rows = {TASK: {"acc,none": 0.25}, "other": {"acc,none": 0.3}}
    lm_eval_file(
        folder,
        "build/base",
        0.25,
        results=rows,
        **{"n-samples": {task: {"original": 204, "effective": 204} for task in rows}},
    )
    assert correlate(tmp_path, folder, weight_diff(tmp_path / "d.json"))["values"]["0"]["acc"] == 0.25


def test_a_truncated_result_file_is_named(tmp_path):
    folder = run_folder(tmp_path / "lm_eval")
    file = lm_eval_file(folder, "build/run/checkpoint-15", 0.5, time="2026-11-22")
    file.write_text(file.read_text()[:100])
    with pytest.raises(InputError, match=r"results_2026-11-22.json is not valid JSON"):
        correlate(tmp_path, folder, weight_diff(tmp_path / "d.json"))


def test_weight_file_of_another_step_is_named(tmp_path):
    diff = tmp_path / "d.json"
    diff.write_text(json.dumps({"checkpoints": {"15": {"summary": {"attn": 1, "ffn": 2}}}}))
    with pytest.raises(InputError, match="lacks a step, interface_avg or semantic_hub_avg"):
        correlate(tmp_path, bench(tmp_path / "b.json"), diff)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('"15": {"interface_avg": NaN, "semantic_hub_avg": 1}', "lacks a step, interface_avg or semantic_hub_avg"),
        ('"step15": {"interface_avg": 1, "semantic_hub_avg": 1}', "step 15 appears twice"),
    ],
)
def test_a_change_that_is_no_number_or_comes_twice(tmp_path, row, said):
    diff = tmp_path / "d.json"
    diff.write_text('{"checkpoints": {"15": {"interface_avg": 1, "semantic_hub_avg": 2}, ' + row + "}}")
    with pytest.raises(InputError, match=said):
        correlate(tmp_path, bench(tmp_path / "b.json"), diff)


@pytest.mark.parametrize("n", ["204", -3, 0, 2.5])
def test_a_number_of_rows_that_is_none(tmp_path, n):
    with pytest.raises(InputError, match=f"n of {TASK} at step 15 is {n!r}, not a number of rows"):
        correlate(tmp_path, bench(tmp_path / "b.json", n=n), weight_diff(tmp_path / "d.json"))


def test_no_arguments_inside_a_study(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(f"name: s\nresults: results\ndata:\n  task:\n    name: {TASK}\n")
    run_folder(tmp_path / "results" / "lm_eval")
    (tmp_path / "results" / "weight-diff").mkdir()
    weight_diff(tmp_path / "results" / "weight-diff" / "int_and_sem.json")
    script.main([])
    found = json.loads((tmp_path / "results" / "downstream-correlation" / "correlation.json").read_text())
    assert found["task"] == TASK and found["interface"]["n_points"] == 6
    assert "r +0.9" in capsys.readouterr().out
