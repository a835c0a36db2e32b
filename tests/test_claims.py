"""The verdicts: made-up results where each claim is plainly true, plainly false or at its bound; what is refused."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from helpers import failed_gate, load_script
from scipy import stats as scipy_stats

from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.measures import compare, controls, verdicts

calibrate = load_script("report/calibrate.py")
script, World = calibrate.claims, calibrate.World
shown, evidence, CLAIMS = script.shown, script.evidence, script.claims()
interventions = script.cli.sibling("report/interventions.py")
YES, NO, OPEN, ONE = verdicts.YES, verdicts.NO, verdicts.OPEN, verdicts.ONE
L, STEPS, LANGS, SEED = calibrate.L, list(calibrate.STEPS), calibrate.LANGS, 3
HUB, INTERFACE, RICH = (list(calibrate.DEMO[name]) for name in ("hub", "interface", "rich"))
LAST = f"sentence-retrieval/eng_Latn-gle_Latn/run__checkpoint-{STEPS[-1]}.json"
LAYER_SWAP, ATTENTION, FFN = (
    f"{place}/controls.json" for place in ("layer-swap", "component-swap/attn_int_swap", "component-swap/ffn_lsn_swap")
)
STRENGTH, TASK = "activation-correlation/made_correlation_strength.json", "downstream-correlation/correlation.json"
CHANGE, PARTS = "weight-diff/int_and_sem.json", "weight-diff/attn_vs_ffn.json"
UNTRAINED = "sentence-retrieval/eng_Latn-gle_Latn/untrained.json"

# ---------------------------------------------------------------- a study of made-up results


class MadeUp(calibrate.Made):
    """One seed with what figures read beside claims: every checkpoint's retrieval, layers of the change, places."""

    def __init__(self, folder, effect=4.0, seed=SEED):
        super().__init__(folder, World("made", effect, **calibrate.DEMO), seed)
        self.rng = np.random.default_rng(seed)

    def all(self):
        return super().all(self.rng)

    def retrieval(self):
        super().retrieval()
        for name, models in [
            *((ref["model_id"], {"model": ref}) for ref in (self.base, *self.run[:-1])),
            ("untrained", {"untrained_like": {"model_type": "llama", "num_hidden_layers": L}}),
        ]:
            hits = self.rng.random((L + 1, calibrate.SENTENCES)) < 0.05
            self.one_retrieval(name, models, dict.fromkeys(("hits", "hits_unit_centred"), hits))

    def swap(self, place, own, sets, cost, measures, facts):
        super().swap(place, own, sets, cost, measures, facts)
        path = self.results / place / "controls.json"
        payload, header = results.read_json(path)
        units = results.read_tensors(path.with_suffix(".pt"))
        records = [
            row | {"values": row["values"] | {"retrieval_best": row["values"][measures[0]]}, "share": 0.1}
            | {"units": {name: units[name][i].tolist() for name in measures}}
            for i, row in enumerate(payload["sets"])
        ]  # fmt: skip
        if any(row["name"] == "random" for row in records):
            payload["comparison"] = controls.compare(records, own, 3)
        payload["sets"] = controls.summary(records)
        controls.intervals(payload["sets"], records, 3)
        results.write_json(path, payload, header)

    def weights(self):
        super().weights()
        step_5 = load_script("weight-diff/attn_vs_ffn.py")
        payload, header = results.read_json(self.results / PARTS)
        for number, step in enumerate(STEPS):
            layers = {}
            for layer in range(L):
                size = 1e-3 * (1 + number) * (1 + 0.1 * layer)
                values = {f"{name}_proj": 1.2 * size for name in "qkvo"}
                values |= {f"{name}_proj": size for name in ("gate", "up", "down")}
                layers[layer] = {n: compare.Change(1, v, (10 * v) ** 2, 1.0, v, None, 1.0) for n, v in values.items()}
            payload["checkpoints"][str(step)] = step_5.checkpoint_row(layers)
        results.write_json(self.results / PARTS, payload, header)

    def curves(self):
        super().curves()
        payload, header = results.read_json(self.results / STRENGTH)
        series, flat = payload["series"], [0.1] * len(STEPS)
        series |= {"d": series["abs_d"], "activation": flat, "activation_control": flat}
        series |= {"gate_control": None, "gate_minus_control": None}
        strengths = load_script("activation-correlation/activation-correlation.py").strengths(series)
        results.write_json(self.results / STRENGTH, strengths | {"series": series, "note": None}, header)
        payload, header = results.read_json(self.results / TASK)
        for row in payload["values"].values():
            row |= {"stderr": 0.02, "n": 200, "semantic_hub_avg": row["interface_avg"]}
        payload["values"]["0"] = {"acc": 0.2, "stderr": 0.02, "n": 200}
        results.write_json(self.results / TASK, payload, header)


def run(made, *more):
    script.main(["--study", str(made.study), *map(str, more)])
    return json.loads((made.results / "report" / "claims.json").read_text())["claims"]


@pytest.fixture
def no_figure(monkeypatch):
    monkeypatch.setattr(shown, "draw", lambda *_: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return MadeUp(tmp_path_factory.mktemp("finished")).all()


@pytest.fixture
def made(finished, tmp_path):
    """A study where every claim is true, to be spoilt by a test."""
    shutil.copytree(finished.results, tmp_path / f"results/{SEED}")
    copy = MadeUp.__new__(MadeUp)
    copy.__dict__ |= finished.__dict__
    copy.folder, copy.results, copy.study = tmp_path, tmp_path / f"results/{SEED}", tmp_path / "study.yaml"
    text = finished.study.read_text()
    copy.study.write_text(text.replace(f"{finished.folder}/results", f"{tmp_path}/results"))
    return copy


def edit(made, place, change):
    """Change a file as JSON, NaN and all."""
    path = made.results / place
    whole = json.loads(path.read_text())
    change(whole)
    path.write_text(json.dumps(whole))


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Eight seeds of studies by their effect, and what is said of them."""
    found = {}
    for effect in (4.0, 0.0, -5.0):
        folder, world = tmp_path_factory.mktemp("seeds"), World("w", effect, **calibrate.DEMO)
        for seed in range(8):
            calibrate.Made(folder, world, seed).all(np.random.default_rng([seed, 7]))
        found[effect] = folder / "study.yaml"
    return found


# ---------------------------------------------------------------- over seeds


@pytest.mark.parametrize("effect, expected", [(4.0, YES), (0.0, OPEN), (-5.0, NO)])
def test_plain_results_give_plain_verdicts(effect, expected, seeds, tmp_path, no_figure):
    script.main(["--study", str(seeds[effect]), "--seeds", "0,1,2,3,4,5,6,7", "--output", str(tmp_path)])
    payload = json.loads((tmp_path / "claims_seeds.json").read_text())
    claims = payload["claims"]
    assert {name: row["verdict"] for name, row in claims.items()} == dict.fromkeys(CLAIMS, expected)
    for row in claims.values():
        assert row["files"] and (row["p_value"] <= 0.05) is (expected != OPEN)
        for one in row["numbers"]:
            values = list(one["values"].values())
            assert one["n"] == len(values) == 8 and one["value"] == pytest.approx(np.mean(values))
            interval = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.95)
            assert (one["ci_low"], one["ci_high"]) == pytest.approx(tuple(interval))
    table = (tmp_path / "claims_seeds.md").read_text()
    assert table.count(f"**{expected}**") >= len(CLAIMS) and "8 seeds" in table
    assert "| number | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 |" in table


def test_fewer_than_five_seeds_have_numbers_and_no_verdict(seeds, tmp_path, no_figure):
    script.main(["--study", str(seeds[4.0]), "--seeds", "0,1,2,3", "--output", str(tmp_path)])
    for row in json.loads((tmp_path / "claims_seeds.json").read_text())["claims"].values():
        assert row["verdict"] == OPEN and "4 seeds; a verdict needs 5" in row["reason"]
        assert row["numbers"][0]["n"] == 4
    with pytest.raises(InputError, match="two seeds or more"):
        script.main(["--study", str(seeds[4.0]), "--seeds", "0", "--output", str(tmp_path)])
    with pytest.raises(InputError, match="--output FOLDER"):
        script.main(["--study", str(seeds[4.0]), "--seeds", "0,1"])


def test_seeds_of_an_arm_are_the_arms_not_the_plain_runs(seeds, tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text(seeds[4.0].read_text() + "arms: {hub_frozen: {freeze: hub}}\n")
    with pytest.raises(InputError, match="models/0/arms/hub_frozen/run"):
        script.main(["--study", str(study), "--arm", "hub_frozen", "--seeds", "0,1", "--output", str(tmp_path)])


def test_what_one_seed_lacks_leaves_a_claim_undecided(seeds, tmp_path, no_figure):
    folder = shutil.copytree(seeds[4.0].parent, tmp_path / "study")
    study = folder / "study.yaml"
    study.write_text(study.read_text().replace(str(seeds[4.0].parent), str(folder)))
    (folder / "results/4/weight-diff/attn_vs_ffn.json").unlink()
    one = type("One", (), {"results": folder / "results/2"})
    edit(one, "arms.json", lambda t: t["models"]["interface_frozen"]["share"].update(task_accuracy=None))
    edit(one, "layer-specialize/layers.json", lambda t: t["_header"].pop("gate"))
    made = script.claims()
    said = script.over_seeds(made, script.read_seeds(study, list(range(8)), made, draws=0))
    assert said["C3"].verdict == OPEN and said["C3"].reason.startswith("seed 4: weight-diff/attn_vs_ffn.json is not")
    assert "seed 2: the gate of step 2 was not checked" in said["C6"].reason
    assert said["C7"].verdict == YES  # rests on no layers of step 2
    edit(one, "layer-specialize/layers.json", lambda t: t["_header"].update(gate=failed_gate()))
    said = script.over_seeds(made, script.read_seeds(study, list(range(8)), made, draws=0))
    assert said["C1"].verdict == verdicts.VOID and said["C1"].reason.startswith("seed 2: run/checkpoint-20 does not")
    gate = results.read_json(folder / "results/3/layer-specialize/layers.json")[1]["gate"]
    edit(one, "layer-specialize/layers.json", lambda t: t["_header"].update(gate=gate))
    said = script.over_seeds(made, script.read_seeds(study, list(range(8)), made, draws=0))
    assert said["C6"].verdict == OPEN and "seed 2: the plain run's change in task is not clear" in said["C6"].reason


def test_one_seed_copied_as_several_is_refused(seeds, tmp_path):
    folder = tmp_path / "study"
    for place in ("results", "models"):
        for seed in (0, 1):  # the same weights, retrained by nobody
            shutil.copytree(seeds[4.0].parent / place / "0", folder / place / str(seed))
    text = seeds[4.0].read_text().replace(str(seeds[4.0].parent), str(folder))
    (folder / "study.yaml").write_text(text)
    for path in (folder / "results/1").rglob("*.json"):
        edit(type("One", (), {"results": path.parent}), path.name, lambda t: t["_header"].update(seed=1))
    with pytest.raises(InputError, match="have the same weights"):
        script.read_seeds(folder / "study.yaml", [0, 1], script.claims(), draws=0)
    (folder / "study.yaml").write_text(text.replace("results/{seed}", "results/0"))
    with pytest.raises(InputError, match=r"results must hold \{seed\}"):
        script.read_seeds(folder / "study.yaml", [0, 1], script.claims(), draws=0)


def test_seeds_measured_in_different_ways_are_refused(seeds, tmp_path):
    folder = shutil.copytree(seeds[4.0].parent, tmp_path / "study")
    study = folder / "study.yaml"
    study.write_text(study.read_text().replace(str(seeds[4.0].parent), str(folder)))
    one = type("One", (), {"results": folder / "results/1"})
    for place in (LAST, LAYER_SWAP, ATTENTION, FFN, "layer-specialize/layers.json", "arms.json"):
        edit(one, place, lambda t: t["_header"].update(dtype="bfloat16"))
    with pytest.raises(InputError, match="were made with different dtype"):
        script.read_seeds(study, [0, 1], script.claims(), draws=0)


# ---------------------------------------------------------------- one run


def test_one_run_has_numbers_and_no_verdict(made, no_figure, capsys):
    claims = run(made)
    assert {row["verdict"] for row in claims.values()} == {"one run: no verdict"}
    said = capsys.readouterr().out
    assert all(f"{name} one run: no verdict: in this run" in said for name in CLAIMS)
    for name, row in claims.items():
        for one in row["numbers"]:
            assert name == "C3" or one["name"].startswith("log of") or one["ci_low"] <= one["value"] <= one["ci_high"]
    table = (made.results / "report/claims.md").read_text()
    assert table.count("**one run: no verdict**") == len(CLAIMS) and "seed 3: one run" in table


def test_the_numbers_are_those_of_the_files(made, no_figure):
    claims = run(made)
    payload = json.loads((made.results / PARTS).read_text())["pooled"][str(STEPS[-1])]
    assert claims["C3"]["numbers"][0]["value"] == pytest.approx(np.log(payload["attention"] / payload["ffn"]))
    rows = {row["name"]: row["values"] for row in json.loads((made.results / LAYER_SWAP).read_text())["sets"]}
    lost = rows["semantic_hub"]["nll_per_byte"] - rows["target"]["nll_per_byte"]
    share = lost / (rows["base"]["nll_per_byte"] - rows["target"]["nll_per_byte"])
    assert claims["C2a"]["numbers"][0]["value"] == pytest.approx(share)
    rows = {row["name"]: row["values"] for row in json.loads((made.results / ATTENTION).read_text())["sets"]}
    for at, place in ((0, "interface"), (2, "lsn_rich")):
        loss = rows[f"attention_{place}"]["nll_per_byte"] - rows[f"ffn_{place}"]["nll_per_byte"]
        assert claims["C5a"]["numbers"][at]["value"] == pytest.approx(loss)
        hits = rows[f"ffn_{place}"]["retrieval_readout"] - rows[f"attention_{place}"]["retrieval_readout"]
        assert claims["C5a"]["numbers"][at + 1]["value"] == pytest.approx(hits)
    models = json.loads((made.results / "arms.json").read_text())["models"]
    shares = [models[name]["share"]["lsn_activation"]["value"] for name in ("lsn_frozen", "interface_attention_frozen")]
    assert claims["C4"]["numbers"][0]["value"] == pytest.approx(shares[0] - shares[1])
    frozen = [models[name]["share"]["task_accuracy"]["value"] for name in ("hub_frozen", "interface_frozen")]
    assert claims["C6"]["numbers"][1]["value"] == pytest.approx((frozen[0] - frozen[1]) / len(HUB))
    outer, plain = (models[name]["values"]["nll_per_byte"] for name in ("outer", "plain"))
    assert claims["C7"]["numbers"][0]["value"] == pytest.approx((outer - plain) / plain)


@pytest.mark.figures
def test_a_failed_gate_leaves_no_verdict_on_layers(made, capsys):
    made.layers(gate=failed_gate())
    claims = run(made)
    void = {name for name in CLAIMS if claims[name]["verdict"] == verdicts.VOID}
    assert void == {name for name, claim in CLAIMS.items() if claim.ON_LAYERS} >= {"C1", "C2a", "C4", "C5a", "C6"}
    assert claims["C2a"]["numbers"] and claims["C2a"]["reason"].endswith("everything built on them mean nothing")
    captured = capsys.readouterr()
    assert captured.err.count("its layers, its hub and everything built on them mean nothing") == 1
    assert results.read_json(made.results / "report/claims.json")[1]["gate"] == failed_gate()
    assert (made.results / "report/claims.png").stat().st_size > 1000


def test_tables_say_what_the_json_says(made, no_figure):
    claims = run(made)
    table = (made.results / "report/claims.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if " | **" in line}
    assert list(rows) == list(CLAIMS) == sorted(CLAIMS)
    tex = (made.results / "report/claims.tex").read_text()
    lines = {line.split(" & ")[0]: line for line in tex.splitlines() if re.match(r"[A-Z]\d+[a-z]? &", line)}
    assert tex.count("\\hline") == 3 and "toprule" not in tex
    for name, row in claims.items():
        assert f"**{row['verdict']}**" in rows[name] and f"& {row['verdict']} &" in lines[name]
        for one in row["numbers"]:
            for value in (one["value"], one["ci_low"], one["ci_high"]):
                assert value is None or shown.digits(value) in rows[name]
                assert value is None or shown.escaped(shown.digits(value)) in lines[name]
    assert all(one["name"].replace("|", "\\|") in table for row in claims.values() for one in row["beside"])


@pytest.mark.figures
def test_a_rerun_gives_the_same_bytes_but_for_time_and_command(made):
    (made.results / PARTS).unlink()  # the figure has a panel without numbers, too

    def files():
        run(made)
        found = {path.name: path.read_bytes() for path in (made.results / "report").iterdir()}
        whole = json.loads(found.pop("claims.json"))
        for fact in ("time", "command"):
            whole["_header"].pop(fact)
        return whole, found

    first = files()
    assert set(first[1]) == {f"claims.{kind}" for kind in ("md", "tex", "pdf", "png")}
    assert all(len(content) > 500 for content in first[1].values())
    assert files() == first


def test_what_is_missing_is_said(made, no_figure):
    for place, name, words in (
        ("layer-swap/controls.pt", "C2b", "made by layer-swap/layer-swap.py --controls"),
        (PARTS, "C3", "made by weight-diff/attn_vs_ffn.py"),
        (ATTENTION, "C5b", "made by component-swap/attn_int_swap.py"),
        (CHANGE, "C6", "made by weight-diff/int_and_sem.py"),
        ("arms.json", "C7", "the study trains no arms (keys arms and train.cpt"),
        (LAST, "C1", "sr_experiment.py"),
    ):
        (made.results / place).unlink()
        row = run(made)[name]
        assert row["verdict"] == ONE and words in row["reason"] and not row["numbers"]
    with made.study.open("a") as file:
        file.write("\narms: {outer: {train_only: outer:0.25}}\ntrain: {cpt: cpt.yaml}\n")
    assert "made by cpt/compare_arms.py" in run(made)["C7"]["reason"]
    shutil.rmtree(made.results)
    with pytest.raises(InputError, match="holds no result that a claim needs"):
        run(made)


def test_results_of_before_say_which_step_to_run_again(made, no_figure):
    edit(made, PARTS, lambda t: t.pop("pooled"))
    edit(made, LAST, lambda t: [t.pop(key) for key in ("unit_centred_accuracy", "unit_centred_accuracy_ci")])
    pt = made.results / LAST.replace(".json", ".pt")
    results.write_tensors(pt, {"hits": results.read_tensors(pt)["hits"]})
    for place in (LAYER_SWAP, ATTENTION, FFN):
        edit(made, place, lambda t: [row["values"].pop("retrieval_readout") for row in t["sets"]])
    edit(made, "arms.json", lambda t: t["models"].pop("outer"))
    pt = made.results / "arms.pt"
    keep = [0, 1, 2, 3, 4, 5, 6]
    results.write_tensors(pt, {name: values[keep] for name, values in results.read_tensors(pt).items()})
    claims = run(made)
    for name, words in (
        ("C1", "has no unit_centred_accuracy: run sentence-retrieval/sr_experiment.py --overwrite again"),
        ("C2b", "has no retrieval_readout: run layer-swap/layer-swap.py --controls --overwrite again"),
        ("C3", "has no pooled: run weight-diff/attn_vs_ffn.py --overwrite again"),
        ("C5a", "has no retrieval_readout: run component-swap/attn_int_swap.py --controls --overwrite again"),
        ("C7", "no arm of the study trains only outer:0.25"),
    ):
        assert words in claims[name]["reason"], name
    assert claims["C2b"]["numbers"][0]["value"] is not None  # the loss is there


def test_swaps_without_the_task_say_which_tasks_they_know(made, no_figure):
    edit(made, LAYER_SWAP, lambda t: [row["values"].pop("task_accuracy", None) for row in t["sets"]])
    notes = [row["note"] for row in run(made)["C2a"]["numbers"] if row["name"].endswith("task")]
    assert notes and all(note.endswith("swaps measure only SIB-200 and continuations") for note in notes)


def test_models_that_are_gone_are_known_from_the_results(made, no_figure, capsys):
    made.study.write_text(made.study.read_text().replace("base: ", "base: gone", 1))
    assert run(made)["C3"]["numbers"]
    assert "checked against the models of" in capsys.readouterr().out


def test_an_output_that_is_something_else_stays(made, no_figure, tmp_path):
    (tmp_path / "mine.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match="not made by this script"):
        run(made, "--output", tmp_path / "mine.json")
    with pytest.raises(InputError, match="JSON file"):
        run(made, "--output", tmp_path / "folder")
    assert json.loads((tmp_path / "mine.json").read_text()) == {"mine": 1}


def test_a_study_is_needed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--study FILE"):
        script.main([])


def test_a_file_that_is_no_claim_is_said(tmp_path, monkeypatch):
    folder = tmp_path / "report/claims"
    folder.mkdir(parents=True)
    monkeypatch.setattr(script.cli, "REPOSITORY", tmp_path)
    (folder / "d9.py").write_text("TEXT = ''\nON_LAYERS = False\n")
    with pytest.raises(InputError, match=r"report/claims/d9.py lacks PANEL, measure"):
        script.claims()
    (folder / "d9.py").rename(folder / "ninth.py")
    with pytest.raises(InputError, match=r"report/claims/ninth.py is not named like a claim \(c7.py\)"):
        script.claims()


# ---------------------------------------------------------------- words


def test_latex_escapes_what_it_must():
    found = shown.escaped("50 % of |dW| in a_b & {x} at -0.25, 1.20e-04 or -3.00e-10")
    assert found == (
        r"50 \% of \textbar{}dW\textbar{} in a\_b \& \{x\} at $-0.25$, $1.20\cdot 10^{-4}$ or $-3.00\cdot 10^{-10}$"
    )
    assert shown.escaped("gle_Latn checkpoint-100 <a>") == r"gle\_Latn checkpoint-100 \textless{}a\textgreater{}"


def test_numbers_for_people():
    assert [shown.digits(v) for v in (0.1234, -0.5, 0.0, 0.00123, None)] == [
        "0.123",
        "-0.500",
        "0.000",
        "1.23e-03",
        "none",
    ]
    assert [verdicts.shown_p(p) for p in (0.05, 0.0011, 0.0001)] == ["p = 0.050", "p = 0.001", "p < 0.001"]
