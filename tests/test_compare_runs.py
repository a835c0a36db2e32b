"""Runs that train a part beside the full one: gaps and TOST known beforehand, the numbers of claim C7, runs by name."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from helpers import load_script, save_tiny
from scipy import stats as scipy_stats

from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import refs

MEASURES = {"nll_per_byte": False, "task_accuracy": True, "nll_per_byte:eng_Latn": False}
LABELS = {name: {"label": name, "higher_is_better": up} for name, up in MEASURES.items()}
VALUES = {  # loss, task, loss in English
    "base": (1.0, 0.2, 0.5), "plain": (0.5, 0.8, 0.6), "outer": (0.51, 0.76, 0.55), "first": (0.7, 0.5, 0.6),
    "near": (0.505, 0.796, 0.6),
}  # fmt: skip
WHAT = {"outer": {"train_only": "outer:0.25"}, "first": {"train_only": "first:2"}, "near": {"train_only": "change:2"}}


@pytest.fixture(scope="module")
def script():
    return load_script("layer-ablation/compare_runs.py")


def made_up(script, seed: int = 0, shift: float = 0.0):
    """An arms.json of 40 units a measure; `shift` is added to loss and task of the arms."""
    models, tensors, rng = {}, {}, np.random.default_rng(seed)
    noise = rng.normal(0, 0.01, 40)
    for name, values in VALUES.items():
        loss, task, english = values
        more = shift * (name in WHAT)
        values = dict(zip(MEASURES, (loss + more, task + more, english), strict=True))
        models[name] = {"values": values}
        if name in WHAT:
            share = {m: {"value": 0.5, "ci_low": 0.4, "ci_high": 0.6} if ":" not in m else None for m in MEASURES}
            models[name] |= {"what": WHAT[name], "layers": [0], "trainable_parameters": 300, "share_of_parameters": 0.3}
            models[name] |= {"share": share}
    for m in MEASURES:
        rows = [model["values"][m] + noise - noise.mean() for model in models.values()]
        tensors[m] = torch.tensor(np.array(rows))
    payload = {"measures": LABELS, "models": models}
    return script.interventions.Arms(script.evidence.File("arms.json", "it", payload, {}), tensors, seed, 200)


def payload_of(script, shifts: list[float]) -> dict:
    found = {seed: made_up(script, seed, shift) for seed, shift in enumerate(shifts)}
    costs = {seed: script.costs_of(arms, {}) for seed, arms in found.items()}
    return results.plain(script.payload_of(found, list(WHAT), costs))


def test_gaps_are_in_points_and_shares_of_the_full_score(script):
    """Above 0 is worse than the full run, of a loss and of an accuracy."""
    runs = payload_of(script, [0.0])["runs"]
    own = runs["outer"]["short_of_full"]
    assert own["nll_per_byte"]["gap"]["value"] == pytest.approx(0.01)
    assert own["nll_per_byte"]["short"]["value"] == pytest.approx(0.02)
    assert own["task_accuracy"]["gap"]["value"] == pytest.approx(0.04)
    assert own["task_accuracy"]["short"]["value"] == pytest.approx(0.05)
    assert own["nll_per_byte:eng_Latn"]["gap"]["value"] == pytest.approx(-0.05)  # forgets less than the full run
    assert own["nll_per_byte"]["short"]["ci_low"] <= 0.02 <= own["nll_per_byte"]["short"]["ci_high"]
    assert runs["base"]["short_of_full"]["nll_per_byte"]["short"]["value"] == pytest.approx(1.0)
    assert runs["plain"]["cost"]["share_of_parameters"] == 1 and runs["outer"]["cost"]["trainable_parameters"] == 300
    assert own["nll_per_byte"]["p"] == {"0.03": None, "0.05": None}
    assert {one["verdict"] for one in runs["outer"]["within"].values()} == {"no verdict"}  # of one run


def test_a_resample_without_a_score_takes_no_interval_away(script):
    """Ten rows, four right by the full run: some resamples hold none of these, and nothing is a share of it."""
    arms, task = made_up(script), "task_accuracy"
    hits = {name: [1.0] * {"base": 0, "plain": 4}.get(name, 2) for name in VALUES}
    arms.tensors[task] = torch.tensor([right + [0.0] * (10 - len(right)) for right in hits.values()])
    for name, model in arms.models.items():
        model["values"][task] = len(hits[name]) / 10
    arms.draws = 2000
    row = arms.number("short", task, {"arm": "outer"}, script.c7.short, gained=False)
    assert row["value"] == 0.5 and (row["ci_low"], row["ci_high"]) == (0, 1)


def test_p_over_seeds_is_the_larger_of_both_bounds(script):
    shifts = [0.0, 0.002, -0.001, 0.003, 0.001]
    payload = payload_of(script, shifts)
    own = payload["runs"]["outer"]["short_of_full"]["nll_per_byte"]
    short = np.array([(0.01 + shift) / 0.5 for shift in shifts])
    assert list(own["short"]["values"].values()) == pytest.approx(list(short))
    for margin in (0.03, 0.05):
        bounds = (margin - short, short + margin)
        expected = max(scipy_stats.ttest_1samp(one, 0).pvalue for one in bounds)
        assert own["p"][f"{margin:g}"] == pytest.approx(expected, rel=1e-6)
    interval = scipy_stats.ttest_1samp(short, 0).confidence_interval(0.95)
    assert (own["short"]["ci_low"], own["short"]["ci_high"]) == pytest.approx(tuple(interval))
    # The outer quarter is 2 % short in loss and about 5 in the task, the first layers 40 in both, the last arm 1.
    verdicts = {name: [one["verdict"] for one in payload["runs"][name]["within"].values()] for name in WHAT}
    assert verdicts == {
        "outer": ["not supported", "undecided"], "first": ["not supported"] * 2, "near": ["supported"] * 2,
    }  # fmt: skip


def test_fewer_than_five_seeds_have_no_verdict(script):
    payload = payload_of(script, [0.0, 0.001, 0.002, 0.001])
    one = payload["runs"]["outer"]["within"]["0.03"]
    assert one["verdict"] == "no verdict" and one["reason"] == "4 seeds; a verdict needs 5 or more"
    assert "4 seeds: no verdict, which needs 5" in script.runs_shown.markdown(payload)


def test_tables_say_what_the_json_says(script):
    payload = payload_of(script, [0.0])
    table = script.runs_shown.markdown(payload)
    assert "| outer | train_only outer:0.25 | 300 | 30.0 | - | - | 0.5100 | 0.7600 | 0.5500 |" in table
    assert "+0.0100; 2.0 %" in table and "no clear gain" in table and "One run: no verdict" in table
    tex = script.runs_shown.latex(payload)
    assert tex.count("\\hline") == 3 and "outer & 30 & 0.510 (2.0) & 0.760 (5.0) & no verdict" in tex
    assert all(len(line) < 100 for line in tex.splitlines() if "&" in line)
    rows = list(csv.DictReader(script.runs_shown.table(payload).splitlines()))
    assert [row["run"] for row in rows] == ["full", "base", "outer", "first", "near"]
    assert float(rows[2]["task_accuracy.short"]) == pytest.approx(0.05) and rows[0]["task_accuracy.short"] == ""
    gap = payload["runs"]["outer"]["short_of_full"]["task_accuracy"]["gap"]
    assert float(rows[2]["task_accuracy.gap_high"]) == gap["ci_high"] and rows[2]["task_accuracy.gain_n"] == "1"
    payload = payload_of(script, [0.0, 0.001, 0.002, 0.0, 0.001])
    row = list(csv.DictReader(script.runs_shown.table(payload).splitlines()))[2]
    own = payload["runs"]["outer"]
    assert float(row["within_0.03_p"]) == own["within"]["0.03"]["p_value"]
    assert float(row["nll_per_byte.gain_sd"]) == own["share_of_gain"]["nll_per_byte"]["sd"]


def test_a_score_of_nothing_is_no_share(script):
    arms = made_up(script)
    arms.models["plain"]["values"]["task_accuracy"] = 0.0
    arms.tensors["task_accuracy"][1] = 0.0
    payload = results.plain(script.payload_of({0: arms}, ["outer"], {0: script.costs_of(arms, {})}))
    own = payload["runs"]["outer"]["short_of_full"]["task_accuracy"]
    assert own["short"]["value"] is None and own["short"]["note"] == "the plain run's task is 0"
    assert "the plain run's task is 0" in script.runs_shown.markdown(payload)


# --- a study


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Five seeds of a made-up study, as calibrate.py makes them."""
    calibrate = load_script("report/calibrate.py")
    folder, world = tmp_path_factory.mktemp("seeds"), calibrate.World("w", 4.0, **calibrate.DEMO)
    for seed in range(5):
        made = calibrate.Made(folder, world, seed)
        made.rng = np.random.default_rng([seed, 7])
        made.arms()
        path = made.results / "arms.json"
        text = json.loads(path.read_text())
        text["measures"] = {
            m: {"label": m, "higher_is_better": "nll" not in m} for m in text["models"]["plain"]["values"]
        }
        path.write_text(json.dumps(text))
    return folder / "study.yaml"


@pytest.mark.figures
def test_a_study_gives_the_numbers_of_c7(script, seeds, tmp_path):
    claims, c7 = script.claims, script.c7
    made = {"C7": c7}
    said = claims.over_seeds(made, claims.read_seeds(seeds, list(range(5)), made, draws=0))["C7"]
    out = tmp_path / "runs.json"
    script.main(["--study", str(seeds), "--seeds", "0,1,2,3,4", "-o", str(out)])
    payload = results.read_json(out, "runs")[0]
    assert list(payload["runs"]) == ["plain", "base", "outer"]  # those that train a part alone
    own = payload["runs"]["outer"]
    for row, m in zip(said.numbers, c7.MEASURES, strict=True):
        short = own["short_of_full"][m]
        assert (short["short"]["value"], short["p"]["0.03"]) == pytest.approx((row["value"], row["p_value"]))
    assert own["within"]["0.03"]["verdict"] == said.verdict
    assert own["within"]["0.03"]["p_value"] == pytest.approx(said.p_value)  # one run: Holm over one
    beside = {row["name"] for row in said.beside}
    assert "short of the plain run, base, loss" in beside and "short of the plain run, outer, loss" not in beside
    for suffix in (".md", ".tex", ".csv", ".png", ".pdf"):
        assert out.with_suffix(suffix).stat().st_size > 200


def test_what_a_study_lacks_is_said(script, seeds, tmp_path):
    study = ["--study", str(seeds), "-o", str(tmp_path / "o.json")]
    for more, message in (
        (["--seed", "9"], r"arms.json does not exist; run cpt/compare_arms.py --seed 9 first"),
        (["--seed", "0", "--arms", "inner"], r"has no arm inner; name some with --arms: hub_frozen"),
        (["--arm", "outer"], "leave out --arm"), (["--limit", "3"], "--limit goes with RUN"),
        (["full", "other", "--arms", "outer"], "--arms are those of a study's arms.json"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            script.main([*study, *more])
    with pytest.raises(InputError, match="need --output"):
        script.main(["--study", str(seeds), "--seeds", "0,1"])
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(InputError, match="was not made by this script"):
        script.main(["--study", str(seeds), "--seed", "0", "-o", str(tmp_path / "mine.json")])


# --- runs by name


def a_run(place, name: str, seed: int, trained: dict | None = None, cost: dict | None = None, **other) -> str:
    """A finished training of three steps, of which nothing is true but its files."""
    start = refs.model(place / "base").describe()["weights_sample"]
    save_tiny("llama", place / name / "checkpoint-3", seed=seed)
    settings = {"from": {"weights_sample": start}, "steps": 3, "seed": 1, "block_size": 8, "batch_size": 2,
                "sources": [{"name": "a"}], "learning_rate": 1e-3} | other  # fmt: skip
    facts = ({"trained": trained} if trained else {}) | ({"cost": cost} if cost else {})
    results.write_json(place / name / "train.json", {"settings": settings}, results.header("cpt-training", **facts))
    if cost:
        timing = {"seconds": 2.0, "seconds_per_step": 0.5}
        results.write_json(place / name / "timing.json", timing, results.header("cpt-training-time"))
    return str(place / name)


OUTER = {"train_only": {"layers": [0, 2]}, "words": "outer:0.25", "io": "frozen", "layers_trained": [0, 2],
         "trainable_parameters": 30, "share_of_parameters": 0.3}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    save_tiny("llama", place / "base", seed=0)
    (place / "held.txt").write_text("".join(f"the {word} runs home\n" for word in ("dog", "cat", "red", "tree")))
    paid = {"trainable_parameters": 100, "parameters": 100, "optimizer_bytes": 2**21}
    a_run(place, "full", 1, cost=paid)
    a_run(place, "outer", 2, OUTER, paid | {"trainable_parameters": 30, "optimizer_bytes": 2**20}, learning_rate=2e-3)
    return place


def arguments(place, *runs: str) -> list[str]:
    more = ["--base", str(place / "base"), "--heldout", str(place / "held.txt"), "--measures", "nll"]
    return [*(str(place / run) for run in runs), *more, "-o", str(place / "out.json")]


def test_runs_are_measured_as_arms_are(script, place, capsys):
    script.main(arguments(place, "full", "outer"))
    payload = results.read_json(place / "out.json", "runs")[0]
    arms = results.read_json(place / "out.arms.json", "arms")[0]
    assert list(arms["models"]) == ["base", "plain", "outer"]
    values = {name: model["values"]["nll_per_byte"] for name, model in arms["models"].items()}
    own = payload["runs"]["outer"]
    assert own["what"] == {"train_only": "outer:0.25"} and own["layers"] == [0, 2]
    short = own["short_of_full"]["nll_per_byte"]["short"]["value"]
    assert short == pytest.approx((values["outer"] - values["plain"]) / values["plain"])
    assert own["cost"] == {"trainable_parameters": 30, "share_of_parameters": 0.3, "optimizer_bytes": 2**20,
                           "seconds_per_step": 0.5}  # fmt: skip
    assert payload["runs"]["plain"]["cost"]["optimizer_bytes"] == 2**21 and payload["decided_by"] == ["nll_per_byte"]
    captured = capsys.readouterr()
    assert "outer also differs from the full run in how it was trained: learning_rate" in captured.err
    assert "| full |  | 100 | 100.0 | 2.0 | 0.500 |" in captured.out
    script.main(arguments(place, "full", "outer"))
    assert "kept" in capsys.readouterr().out  # what was measured is not measured again
    (place / "bare/checkpoint-3").mkdir(parents=True)
    for file in (place / "outer/checkpoint-3").iterdir():
        (place / "bare/checkpoint-3" / file.name).write_bytes(file.read_bytes())
    script.main([*arguments(place, "full", "bare"), "--overwrite"])
    assert "bare has no train.json" in capsys.readouterr().err
    assert results.read_json(place / "out.json")[0]["runs"]["bare"]["cost"]["share_of_parameters"] is None


def test_what_cannot_be_compared_is_refused(script, place):
    a_run(place, "longer", 3, OUTER, steps=5)
    a_run(place, "stranger", 4, OUTER, **{"from": {"weights_sample": "0" * 16}})
    (place / "late/checkpoint-7").mkdir(parents=True)
    for file in (place / "outer/checkpoint-3").iterdir():
        (place / "late/checkpoint-7" / file.name).write_bytes(file.read_bytes())
    for runs, message in (
        (["full", "longer"], r"longer saw other batches than .*full \(steps: 3 asked for, 5 in the file\)"),
        (["full", "stranger"], "stranger was trained from another base than .*base is now; give --base"),
        (["outer", "full"], "outer has a frozen part itself, so it is not a plain run"),
        (["full", "late"], "ends at step 7, the full run at 3"), (["full"], "alone has nothing to be compared with"),
        (["full", "outer", "outer"], "another model is called outer; give the run a name"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            script.main(arguments(place, *runs))
    a_run(place, "same", 5)
    with pytest.raises(InputError, match="full is not the first run, which is called full in every table"):
        script.main(arguments(place, "same", "full"))
    with pytest.raises(InputError, match="=outer: give the run a name"):
        script.main(["full", "=outer", *arguments(place)])
    with pytest.raises(InputError, match=r"every RUN needs \{seed\} in its path"):
        script.main([*arguments(place, "full", "outer"), "--seeds", "1,2"])
