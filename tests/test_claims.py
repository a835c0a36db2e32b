"""The verdicts: made-up results where each claim is plainly true, plainly false or noise; the edges of the verdicts."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import failed_gate, load_script

from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.measures import compare, controls, verdicts

script = load_script("report/claims.py")
shown, CLAIMS = script.shown, script.claims()
PAPER = [f"C{n}" for n in range(1, 7)]  # the claims of which `MadeUp` makes the results; others are undecided
c1, c2, c3, c4, c5, c6 = (CLAIMS[name] for name in PAPER)
YES, NO, OPEN = verdicts.YES, verdicts.NO, verdicts.OPEN

L, SENTENCES, SETS = 6, 150, 30
STEPS = [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
INTERFACE, HUB, RICH = [0, 1, 5], [2, 3, 4], [0, 4, 5]
LANGS = {"base_lang": "eng_Latn", "target_lang": "gle_Latn"}
WORDS = {"true": YES, "false": NO, "noise": OPEN}

# ---------------------------------------------------------------- a study of made-up results


def write_model(folder, content):
    """Not a model, but what tells models apart: a config and one file of weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": L}))
    save_file({"w": torch.full((4,), float(content))}, folder / "model.safetensors")
    return refs.model(folder).describe()


class MadeUp:
    """A study below `folder` whose results say of every claim that it is `truth`: true, false or noise."""

    def __init__(self, folder, truth="true", seed=0):
        self.folder, self.truth, self.rng = folder, truth, np.random.default_rng(seed)
        self.base = write_model(folder / "base", 0)
        self.run = [write_model(folder / "run" / f"checkpoint-{step}", step) for step in STEPS]
        self.results = folder / "results"
        self.study = folder / "study.yaml"
        self.study.write_text(
            f"name: made\nbase: {folder}/base\nrun: {folder}/run\nresults: {self.results}\nseed: 3\n"
            "languages: {base: eng_Latn, target: gle_Latn}\n"
        )

    def pick(self, true, false, noise):
        return {"true": true, "false": false, "noise": noise}[self.truth]

    def write(self, place, payload, schema, **facts):
        path = self.results / place
        path.parent.mkdir(parents=True, exist_ok=True)
        results.write_json(path, payload, results.header(schema, **({"n_layers": L} | facts)))
        return path

    def all(self):
        for make in (self.retrieval, self.layers, self.layer_swap, self.attn_vs_ffn, self.activation_correlation):
            make()
        self.component_swaps()
        self.downstream()
        return self

    # --- C1

    def retrieval(self):
        outer, middle = self.pick((0.2, 0.7), (0.7, 0.2), (0.5, 0.5))
        chances = [outer, outer, outer, middle, middle, outer, outer]
        for number, ref in enumerate([self.base, *self.run]):
            grown = [chance * (0.6 + 0.4 * number / len(self.run)) for chance in chances]
            self.one_retrieval(ref["model_id"], {"model": ref}, grown)
        self.one_retrieval("untrained", {"untrained_like": {}}, [0.05] * (L + 1))

    def one_retrieval(self, name, models, chances, **facts):
        hits = self.rng.random((L + 1, SENTENCES)) < np.array(chances)[:, None]
        accuracy = [[state, float(value)] for state, value in enumerate(hits.mean(1))]
        payload = {"layer_accuracy": accuracy, "centred_accuracy": accuracy, **LANGS}
        facts = {"models": models, "data": {"pairs_sha256": "same"}, **LANGS} | facts
        path = self.write(f"sentence-retrieval/eng_Latn-gle_Latn/{name}.json", payload, "sentence-retrieval", **facts)
        results.write_tensors(path.with_suffix(".pt"), {"hits": torch.tensor(hits)})
        return path

    def layers(self):
        payload = {"interface_layers": INTERFACE, "semantic_layers": HUB}
        self.write("layer-specialize/layers.json", payload, "layer-specialize", models={"model": self.run[-1]}, **LANGS)

    # --- C2 and C5

    def swap(self, place, own, chance, layers, facts=None, others=(), n_sets=SETS, ends=(0.2, 0.8)):
        """A controls.json with retrieval (and a loss that says the same) from shares of hits drawn by chance.

        Random swaps hit by chances around .5; the rows name components where there are `facts`.
        """
        component = own.partition("_")[0]

        def record(name, layers, mean):
            hits = self.rng.binomial(L, mean, SENTENCES) / L
            units = {"retrieval_mean": hits.tolist(), "nll_per_byte": (2 - hits).tolist()}
            values = {key: float(np.mean(value)) for key, value in units.items()}
            row = {"name": name, "layers": layers, "values": values, "units": units}
            if facts and name not in ("base", "target"):
                row |= {"component": component if name == "random" else name.partition("_")[0], "share": 0.1}
            return row

        records = [record("base", [], ends[0]), record("target", [], ends[1]), record(own, layers, chance)]
        records += [record(*other) for other in others]
        for i in range(n_sets):
            drawn = sorted((i + k) % L for k in range(len(layers)))
            records.append(record("random", drawn, 0.5 + 0.03 * (i / n_sets - 0.5)))
        payload = {"comparison": controls.compare(records, own, 3), "sets": controls.summary(records), **(facts or {})}
        controls.intervals(payload["sets"], records, 3)
        models = {"base": self.base, "target": self.run[-1]}
        header = {"models": models, "data": {"pairs_sha256": "same"}, **LANGS}
        path = self.write(f"{place}/controls.json", payload, "swap-controls", **header)
        units = {name: torch.tensor([row["units"][name] for row in records]) for name in records[0]["units"]}
        results.write_tensors(path.with_suffix(".pt"), units)
        return path

    def layer_swap(self, **more):
        facts = {"interface_layers": INTERFACE, "semantic_hub_layers": HUB}
        path = self.swap("layer-swap", "semantic_hub", self.pick(0.75, 0.25, 0.5), HUB, **more)
        payload, header = results.read_json(path)
        results.write_json(path, facts | payload, header)
        return path

    def component_swaps(self, rich=RICH, **more):
        attention, ffn = self.pick((0.25, 0.75), (0.75, 0.25), (0.5, 0.5))
        crossed = [("ffn_interface", INTERFACE, ffn), ("attention_lsn_rich", rich, attention)]
        for folder, own, chance, layers in (
            ("attn_int_swap", "attention_interface", attention, INTERFACE),
            ("ffn_lsn_swap", "ffn_lsn_rich", ffn, rich),
        ):
            facts = {"own": own, "n_layers": L}
            self.swap(f"component-swap/{folder}", own, chance, layers, facts, crossed, **more)

    # --- C3, C4 and C6

    def series_header(self):
        checkpoints = {str(ref["step"]): ref for ref in self.run}
        return {"models": {"base": self.base, "checkpoints": checkpoints}}

    def attn_vs_ffn(self):
        step_5 = load_script("weight-diff/attn_vs_ffn.py")
        more = self.pick([0.2] * L, [-0.2] * L, [0.2, -0.2] * (L // 2))
        checkpoints = {}
        for number, step in enumerate(STEPS):
            layers = {}
            for layer in range(L):
                size = 1e-3 * (1 + number) * (1 + 0.1 * layer)
                values = {f"{name}_proj": size * (1 + more[layer]) for name in "qkvo"}
                values |= {f"{name}_proj": size for name in ("gate", "up", "down")}
                layers[layer] = {n: compare.Change(1, v, (10 * v) ** 2, 1.0, v, None, 1.0) for n, v in values.items()}
            checkpoints[str(step)] = step_5.checkpoint_row(layers)
        self.write("weight-diff/attn_vs_ffn.json", {"checkpoints": checkpoints}, "attn_vs_ffn", **self.series_header())

    def curves(self):
        """Two series with opposite steps, and a third that follows the first (true), the second (false), or neither."""
        first, error, other = self.rng.normal(0, 0.3, (3, len(STEPS)))
        second = 0.1 * error - first
        # As noise: what is left of random steps when all that they share with both series is taken out.
        known = np.stack([np.ones(len(STEPS) - 1), first[1:], second[1:]], axis=1)
        other[1:] -= known @ np.linalg.lstsq(known, other[1:], rcond=None)[0]
        follows = self.pick(first + 0.1 * other, second + 0.1 * other, other)
        series = [1 + steps for steps in (first, second, follows)]
        return [list(map(float, np.cumsum(steps))) for steps in series]

    def activation_correlation(self):
        step_10 = load_script("activation-correlation/activation-correlation.py")
        attention, gate, d = self.curves()
        flat = {"activation": [0.1] * len(d), "activation_control": [0.0] * len(d)}
        series = {"steps": STEPS, "d": d, "abs_d": d, "attention": attention, "gate": gate, **flat}
        series |= {"gate_control": None, "gate_minus_control": None}
        payload = step_10.strengths(series) | {"series": series, "note": None}
        facts = self.series_header() | {"language": "gle_Latn", "interface_layers": INTERFACE}
        place = "activation-correlation/made_correlation_strength.json"
        return self.write(place, payload, "activation_correlation", **facts)

    def downstream(self, steps=None):
        change, _, accuracy = self.curves()
        change, accuracy = [1e-3 * value for value in change], [0.2 + 0.04 * value for value in accuracy]
        rows = zip(steps or STEPS, accuracy, change, strict=False)
        values = {
            str(step): {"acc": a, "stderr": 0.02, "n": 200, "interface_avg": c, "semantic_hub_avg": 0.8 * c}
            for step, a, c in rows
        }
        values["0"] = {"acc": 0.2, "stderr": 0.02, "n": 200}
        payload = {"task": "sib200_gle_Latn", "metric": "acc", "values": values}
        self.write("downstream-correlation/correlation.json", payload, "downstream_correlation", **self.series_header())


def run(made, *more):
    script.main(["--study", str(made.study), *map(str, more)])
    return json.loads((made.results / "report" / "claims.json").read_text())["claims"]


@pytest.fixture
def no_figure(monkeypatch):
    monkeypatch.setattr(shown, "draw", lambda *_: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Studies with all results, by what is true in them."""
    return {truth: MadeUp(tmp_path_factory.mktemp(truth), truth).all() for truth in WORDS}


@pytest.fixture
def made(finished, tmp_path):
    """A study where every claim is true, to be spoilt by a test."""
    shutil.copytree(finished["true"].results, tmp_path / "results")
    copy = MadeUp.__new__(MadeUp)
    copy.__dict__ |= finished["true"].__dict__
    copy.rng = np.random.default_rng(5)
    copy.folder, copy.results, copy.study = tmp_path, tmp_path / "results", tmp_path / "study.yaml"
    copy.study.write_text(finished["true"].study.read_text().replace(str(finished["true"].results), str(copy.results)))
    return copy


# ---------------------------------------------------------------- whole studies


@pytest.mark.parametrize("truth", list(WORDS))
def test_plain_results_give_plain_verdicts(truth, finished, no_figure):
    claims = run(finished[truth])
    assert {name: claims[name]["verdict"] for name in PAPER} == dict.fromkeys(PAPER, WORDS[truth])
    for row in map(claims.get, PAPER):
        assert row["numbers"] and row["files"] and row["reason"] and row["beside"]
        for one in row["numbers"]:
            assert one["ci_low"] <= one["value"] <= one["ci_high"] and one["n"] > 0
    assert claims["C2"]["numbers"][0]["place"]["n_random"] == SETS
    place = claims["C5"]["numbers"][0]["place"]
    assert (place["n_random"], place["n_ffn_sets"], place["n_attention_sets"]) == (SETS**2, SETS, SETS)
    assert "not independent" in claims["C5"]["reason"]


def test_the_numbers_are_those_of_the_files(finished, no_figure):
    made, claims = finished["true"], run(finished["true"])
    swap = json.loads((made.results / "layer-swap" / "controls.json").read_text())["comparison"]["retrieval_mean"]
    found = claims["C2"]["numbers"][0]
    assert found["value"] == pytest.approx(swap["own_minus_random"])
    # The units are float32 in the file.
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((swap["ci_low"], swap["ci_high"]), abs=1e-6)
    assert found["p_value"] == swap["p_value"] and found["p_opposite"] == swap["p_worse"]
    strength = json.loads((made.results / "activation-correlation/made_correlation_strength.json").read_text())
    expected = strength["comparison"]["first_differences"]
    assert claims["C4"]["numbers"][0]["value"] == pytest.approx(expected["difference"])
    assert claims["C4"]["numbers"][0]["ci_low"] == pytest.approx(expected["ci_low"])
    rows = json.loads((made.results / "weight-diff/attn_vs_ffn.json").read_text())["checkpoints"]["100"]
    gap = rows["summary"]["attn"] - rows["summary"]["ffn"]
    assert claims["C3"]["numbers"][0]["value"] == pytest.approx(gap)


@pytest.mark.figures
def test_a_failed_gate_leaves_no_verdict_on_layers(made, capsys):
    """Every claim would be supported; those that rest on layers are none of this model."""
    made.write(
        "layer-specialize/layers.json", {"interface_layers": INTERFACE, "semantic_layers": HUB}, "layer-specialize",
        models={"model": made.run[-1]}, gate=failed_gate(), **LANGS,
    )  # fmt: skip
    claims = run(made)
    assert {name: claims[name]["verdict"] for name in PAPER} == dict.fromkeys(PAPER, verdicts.VOID) | {"C3": YES}
    assert claims["C2"]["numbers"] and claims["C2"]["reason"].endswith("everything built on them mean nothing")
    captured = capsys.readouterr()
    assert captured.err.count("its layers, its hub and everything built on them mean nothing") == 1
    assert "C5 no verdict: gate: run/checkpoint-20 does not retrieve clearly better" in captured.out
    assert results.read_json(made.results / "report/claims.json")[1]["gate"] == failed_gate()
    table = (made.results / "report/claims.md").read_text()
    assert table.count("**no verdict: gate**") >= 5 and table.count("**supported**") == 1
    assert (made.results / "report/claims.png").stat().st_size > 1000


def test_tables_say_what_the_json_says(finished, no_figure):
    made = finished["false"]
    claims = run(made)
    table = (made.results / "report/claims.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if " | **" in line}
    assert list(rows) == list(CLAIMS)
    tex = (made.results / "report/claims.tex").read_text()
    lines = {line.split(" & ")[0]: line for line in tex.splitlines() if re.match(r"[A-Z]\d+ &", line)}
    assert tex.count("\\hline") == 3 and "toprule" not in tex
    for name, row in claims.items():
        assert f"**{row['verdict']}**" in rows[name] and f"& {row['verdict']} &" in lines[name]
        for one in row["numbers"]:
            for value in (one["value"], one["ci_low"], one["ci_high"]):
                assert shown.digits(value) in rows[name]
                assert shown.escaped(shown.digits(value)) in lines[name]
    assert all(one["name"].replace("|", "\\|") in table for row in claims.values() for one in row["beside"])


@pytest.mark.figures
def test_a_rerun_gives_the_same_bytes_but_for_time_and_command(made):
    (made.results / "weight-diff/attn_vs_ffn.json").unlink()  # the figure has a panel without numbers, too

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


def test_what_is_missing_leaves_its_claim_undecided(made, no_figure):
    retrieval = made.results / "sentence-retrieval/eng_Latn-gle_Latn"
    for place, name, words in (
        (retrieval / "untrained.json", "C1", "there is no untrained model"),
        (made.results / "layer-swap/controls.pt", "C2", "made by layer-swap/layer-swap.py --controls"),
        (made.results / "weight-diff/attn_vs_ffn.json", "C3", "made by weight-diff/attn_vs_ffn.py"),
        (made.results / "component-swap/ffn_lsn_swap/controls.json", "C5", "made by component-swap/ffn_lsn_swap.py"),
        (made.results / "downstream-correlation/correlation.json", "C6", "made by downstream-correlation"),
    ):
        place.unlink()
        row = run(made)[name]
        assert row["verdict"] == OPEN and words in row["reason"]
    (retrieval / f"{made.run[-1]['model_id']}.json").unlink()
    assert "sr_experiment.py" in run(made)["C1"]["reason"]
    for folder in made.results.iterdir():
        shutil.rmtree(folder)
    with pytest.raises(InputError, match="holds no result that a claim needs"):
        run(made)


def test_a_run_of_two_checkpoints_is_too_short(made, no_figure):
    made.downstream(STEPS[-2:])
    row = run(made)["C6"]
    assert row["verdict"] == OPEN and "the run is too short: 2 checkpoints" in row["reason"]
    assert row["numbers"][0]["value"] is None and "C6" in (made.results / "report/claims.md").read_text()


def test_results_of_other_models_layers_and_sentences_are_refused(made, no_figure):
    def spoil(place, change):
        path = made.results / place
        before = path.read_text()
        payload, header = results.read_json(path)
        change(payload, header)
        results.write_json(path, payload, header)
        with pytest.raises(InputError) as error:
            run(made)
        path.write_text(before)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        return str(error.value)

    attention, ffn = (f"component-swap/{name}_swap/controls.json" for name in ("attn_int", "ffn_lsn"))
    other = {"weights_sample": "0" * 16}
    last = f"sentence-retrieval/eng_Latn-gle_Latn/{made.run[-1]['model_id']}.json"
    assert "another model" in spoil(last, lambda _, h: h["models"]["model"].update(other))
    assert "another model" in spoil(attention, lambda _, h: h["models"]["target"].update(other))
    assert "another model" in spoil(ffn, lambda _, h: h["models"]["base"].update(other))
    change = "weight-diff/attn_vs_ffn.json"
    assert "another model" in spoil(change, lambda _, h: h["models"]["checkpoints"]["30"].update(other))
    downstream = "downstream-correlation/correlation.json"
    assert "this study's" in spoil(downstream, lambda _, h: h["models"]["checkpoints"].update({"999": made.base}))
    assert "target_lang eus_Latn" in spoil(attention, lambda _, h: h.update(target_lang="eus_Latn"))
    assert "different sentences" in spoil(ffn, lambda _, h: h["data"].update(pairs_sha256="others"))
    assert "--limit 5" in spoil(ffn, lambda _, h: h.update(limit=5))
    hub = spoil("layer-swap/controls.json", lambda p, _: p["sets"][2].update(layers=[0, 1, 2]))
    assert "about layers [0, 1, 2], but" in hub and "layers.json says [2, 3, 4]" in hub
    assert "has no set" in spoil(attention, lambda p, _: p["sets"].pop(2))
    strength = "activation-correlation/made_correlation_strength.json"
    assert "eus_Latn, not gle_Latn" in spoil(strength, lambda _, h: h.update(language="eus_Latn"))
    assert "holds 'else'" in spoil(change, lambda _, h: h.update(schema="else"))


def test_sentences_of_another_file_are_refused(made, no_figure):
    shutil.copy(made.results / "layer-swap/controls.pt", made.results / "component-swap/ffn_lsn_swap/controls.pt")
    with pytest.raises(InputError, match="does not belong to controls"):
        run(made)


def test_an_older_list_of_layers_is_refused(made, no_figure):
    made.write("lsn/result/made.layers.json", {"layers": [1, 2, 3]}, "lsn-layers")
    with pytest.raises(InputError, match=r"ffn_lsn_swap.controls.json is about layers \[0, 4, 5\]"):
        run(made)


def test_sets_of_unequal_sizes_and_too_few_leave_c5_undecided(made, no_figure):
    made.component_swaps(rich=[0, 5])
    row = run(made)["C5"]
    assert row["verdict"] == OPEN and "in 3 layers, the FFN in 2" in row["reason"]
    made.component_swaps(n_sets=18)
    row = run(made)["C5"]
    assert row["verdict"] == OPEN and "18 random FFN sets and 18 of attention are too few: 19" in row["reason"]
    made.component_swaps(ends=(0.8, 0.3))
    assert "nothing to lose" in run(made)["C5"]["reason"]
    made.layer_swap(ends=(0.8, 0.3))
    assert "nothing to lose" in run(made)["C2"]["reason"]


def test_models_that_are_gone_are_known_from_the_results(made, no_figure, tmp_path, capsys):
    made.study.write_text(made.study.read_text().replace("base: ", "base: gone", 1))
    results.write_json(tmp_path / "results/weight-diff/int_and_sem.json", {}, results.header(
        "int_and_sem", **made.series_header()
    ))  # fmt: skip
    assert run(made)["C3"]["verdict"] == YES
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


def test_seeds_stand_side_by_side(finished, tmp_path, no_figure):
    for seed, truth in enumerate(WORDS):
        run(finished[truth])
        place = tmp_path / f"seed-{seed}" / "report"
        place.mkdir(parents=True)
        shutil.copy(finished[truth].results / "report/claims.json", place)
    study = tmp_path / "study.yaml"
    study.write_text(f"name: made\nresults: {tmp_path}/seed-{{seed}}\n")
    script.main(["--study", str(study), "--seeds", "0,1,2", "--output", str(tmp_path / "out")])
    table = (tmp_path / "out" / "claims_seeds.md").read_text()
    assert "| seed 0 | seed 1 | seed 2 |" in table and table.count("**not supported**") == len(PAPER)
    value = json.loads((tmp_path / "seed-1/report/claims.json").read_text())["claims"]["C2"]["numbers"][0]["value"]
    row = next(line for line in table.splitlines() if line.startswith("| C2"))
    assert shown.digits(value) in row.split(" | ")[3]
    tex = (tmp_path / "out" / "claims_seeds.tex").read_text()
    assert tex.count(" & ") == 4 * (1 + len(CLAIMS)) and shown.escaped(shown.digits(value)) in tex
    with pytest.raises(InputError, match=r"seed-7.*report/claims.py --seed 7"):
        script.main(["--study", str(study), "--seeds", "0,7", "--output", str(tmp_path / "out")])
    with pytest.raises(InputError, match="--output FOLDER"):
        script.main(["--study", str(study), "--seeds", "0"])
    study.write_text(f"name: made\nresults: {tmp_path}/seed-0\n")
    with pytest.raises(InputError, match="results must hold"):
        script.main(["--study", str(study), "--seeds", "0,1", "--output", str(tmp_path / "out")])


def test_a_seed_judged_before_there_was_a_claim_says_so(finished, no_figure):
    claims = run(finished["true"])
    older = {"study": "made", "claims": {name: row for name, row in claims.items() if name != "C2"}}
    later = {"study": "made", "claims": {**claims, "D1": claims["C3"], "C10": claims["C3"]}}
    table, tex = shown.seeds_tables({0: older, 1: later})
    rows = [line for line in table.splitlines() if re.match(r"\| [CD]\d", line)]
    assert [row.split(" | ")[0] for row in rows] == ["| C1", "| C2", "| C3", "| C4", "| C5", "| C6", "| C10", "| D1"]
    assert "| **not judged**<br>run report/claims.py --seed 0 again | **supported**" in rows[1]
    assert tex.count("not judged") == 3


def test_a_file_that_is_no_claim_is_said(tmp_path, monkeypatch):
    folder = tmp_path / "report/claims"
    folder.mkdir(parents=True)
    monkeypatch.setattr(script.cli, "REPOSITORY", tmp_path)
    (folder / "d9.py").write_text("TEXT = ''\nON_LAYERS = False\n")
    with pytest.raises(InputError, match=r"report/claims/d9.py lacks PANEL, rule, judge"):
        script.claims()
    (folder / "d9.py").rename(folder / "ninth.py")
    with pytest.raises(InputError, match=r"report/claims/ninth.py is not named like a claim \(c7.py\)"):
        script.claims()


# ---------------------------------------------------------------- the rules, edge by edge


def row(low, high):
    return verdicts.number("x", (low + high) / 2, (low, high))


def test_an_interval_that_touches_the_bound_is_not_beyond_it():
    assert verdicts.above(row(1e-12, 1)) and not verdicts.above(row(0.0, 1))
    assert verdicts.below(row(-1, -1e-12)) and not verdicts.below(row(-1, 0.0))
    assert verdicts.below(row(0, 0.29), verdicts.WORTH) and not verdicts.below(row(0, 0.3), verdicts.WORTH)
    assert not verdicts.above(verdicts.number("x", 1.0)) and not verdicts.below(verdicts.number("x", -1.0))


@pytest.mark.parametrize(
    "layers, early, middle, late",
    [
        (3, [1], [2], [3]),
        (6, [1, 2], [3, 4], [5, 6]),
        (8, [1, 2], [3, 4, 5, 6], [7, 8]),
        (10, [1, 2, 3], [4, 5, 6, 7], [8, 9, 10]),
    ],
)
def test_thirds_cover_every_layer_once(layers, early, middle, late):
    states = list(range(layers + 1))
    assert [states[where] for where in c1.thirds(layers).values()] == [early, middle, late]


def constant(values, n=40):
    return np.tile(np.array(values, dtype=float)[:, None], n)


def test_c1_touching_zero_is_undecided_and_one_side_below_decides():
    flat = constant([0, 0, 0, 0])
    assert c1.rule(constant([0, 0, 1, 0]), flat).verdict == YES
    assert c1.rule(constant([0, 0, 1, 1]), flat).verdict == OPEN  # middle minus late is exactly 0
    assert c1.rule(constant([1, 0, 1, 1]), flat).verdict == OPEN  # h_0 is left out
    assert c1.rule(constant([0, 1, 0, 0]), flat).verdict == NO
    assert c1.rule(constant([0, 0, 1, 0]), constant([0, 0, 1, 0])).verdict == OPEN  # an untrained model does it too
    assert c1.rule(constant([0, 0, 1, 0]), None, why_not="why").reason.endswith("why")
    assert c1.rule(constant([0, 1, 0]), flat[:3]).verdict == OPEN  # two layers have no thirds


def swap_c2(rank, n, units=0.1, base=0.0, target=0.9):
    """The hub at `rank` (1 is the best) among n random sets; its sentences are all `units` above their mean."""
    others = [0.1 + 0.01 * i for i in range(n)]
    own = [*sorted(others, reverse=True), 0.0][rank - 1] + 0.005
    return c2.rule(own, others, np.full(30, 0.5 + units), np.full((max(n, 1), 30), 0.5), base, target)


def test_c2_at_the_edges_of_p_and_of_the_number_of_sets():
    found = swap_c2(1, 19)
    assert found.numbers[0]["p_value"] == 0.05 and found.verdict == YES  # p is exactly .05
    assert swap_c2(2, 19).verdict == OPEN and swap_c2(1, 18).verdict == OPEN
    assert "18 random sets are too few" in swap_c2(1, 18).reason
    assert swap_c2(1, 19, units=0.0).verdict == OPEN  # the interval touches 0
    assert swap_c2(20, 19, units=-0.1).verdict == NO and swap_c2(19, 19, units=-0.1).verdict == OPEN
    assert swap_c2(1, 0).verdict == OPEN and swap_c2(1, 0).numbers == []
    assert swap_c2(1, 19, base=0.9).verdict == OPEN  # equal to the base: nothing was gained


def test_c2_counts_sets_that_tie_in_all_but_the_last_bit_against_the_hub():
    others = [0.3] * 20
    found = c2.rule(0.1 + 0.2, others, np.full(30, 0.6), np.full((20, 30), 0.5), 0.0, 0.9)
    assert 0.1 + 0.2 > 0.3 and found.numbers[0]["p_value"] == 1.0


def test_c3_asks_for_both_definitions():
    more, less, both = [(2.0, 1.0)] * 5, [(1.0, 2.0)] * 5, [(2.0, 1.0), (1.0, 2.0)] * 3
    assert c3.rule(more, more).verdict == YES and c3.rule(less, less).verdict == NO
    disagree = c3.rule(more, less)
    assert disagree.verdict == OPEN and "depends on the definition" in disagree.reason
    assert c3.rule(more, both).verdict == OPEN and c3.rule([(1.0, 1.0)] * 5, more).verdict == OPEN
    assert c3.rule(more[:1], more[:1]).verdict == OPEN  # one layer is one point


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_short_run_says_so(n):
    curve = [0.0, 1.0, 3.0, 3.5][:n]
    for found in (c4.rule(curve, curve[::-1], curve), c6.rule(curve, curve)):
        assert found.verdict == OPEN and f"the run is too short: {n} checkpoint" in found.reason
        assert all(one["ci_low"] is None for one in found.numbers)


def series_of(steps):
    return list(np.cumsum([0.0, *steps]))


def test_c4_and_c6_exclude_below_the_least_correlation():
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(2, 400))
    weak = series_of(z - z @ x / (x @ x) * x + 0.16 * x)  # r of about .16: above 0, and below .3
    found = c6.rule(weak, series_of(x))
    low, high = found.numbers[0]["ci_low"], found.numbers[0]["ci_high"]
    assert low > 0 and high < 0.3 and found.verdict == NO
    assert c6.rule(series_of(-x), series_of(x + 0.1 * z)).verdict == NO
    assert c6.rule(series_of(x), series_of(x + z)).verdict == YES
    no_change = c6.rule(series_of(x), [0.0] * 401)
    assert no_change.verdict == OPEN and "does not vary" in no_change.reason
    # Attention does not go with the activation: decided, although the gates do not vary and leave no difference.
    found = c4.rule(series_of(-x), [0.0] * 401, series_of(x + 0.1 * z))
    assert found.verdict == NO and found.numbers[0]["value"] is None


def swapped(own, others, units=None, n_layers=3):
    return c5.Swapped(own, others, np.full(20, own) if units is None else units, n_layers)


def test_c5_needs_both_the_interval_and_the_place_among_pairs():
    spread = [0.5 + 0.01 * i for i in range(20)]
    assert c5.rule(swapped(0.2, spread), swapped(0.8, spread), 0.0, 0.9).verdict == YES
    assert c5.rule(swapped(0.8, spread), swapped(0.2, spread), 0.0, 0.9).verdict == NO
    # Attention hurts more, but so it does in random layers.
    low, high = [0.2 + 0.01 * i for i in range(20)], [0.7 + 0.01 * i for i in range(20)]
    found = c5.rule(swapped(0.3, low), swapped(0.8, high), 0.0, 0.9)
    assert found.verdict == OPEN and verdicts.above(found.numbers[0]) and found.numbers[0]["p_value"] > 0.05
    # It hurts more, yet less than in any pair of random sets.
    found = c5.rule(swapped(0.3, [0.0] * 20), swapped(0.4, high), 0.0, 0.9)
    assert found.verdict == NO and verdicts.above(found.numbers[0])
    assert c5.rule(swapped(0.2, spread[:18]), swapped(0.8, spread), 0.0, 0.9).verdict == OPEN
    assert c5.rule(swapped(0.2, spread), swapped(0.8, spread, n_layers=4), 0.0, 0.9).verdict == OPEN
    assert c5.rule(swapped(0.2, []), swapped(0.8, spread), 0.0, 0.9).verdict == OPEN
    assert c5.rule(swapped(0.2, spread), swapped(0.8, spread), 0.9, 0.9).verdict == OPEN


def test_c5_counts_pairs_as_a_slow_loop_does():
    rng = np.random.default_rng(1)
    ffn, attention = rng.normal(0.6, 0.1, 21), rng.normal(0.5, 0.1, 19)
    found = c5.rule(swapped(0.4, list(attention)), swapped(0.62, list(ffn)), 0.0, 0.9).numbers[0]
    larger = sum(f - a >= 0.62 - 0.4 for f in ffn for a in attention)
    assert found["p_value"] == (1 + larger) / (1 + 21 * 19)
    assert found["p_opposite"] == (1 + 21 * 19 - larger) / (1 + 21 * 19)


def test_p_of_exactly_one_twentieth_is_enough_for_c5():
    """399 pairs, 19 of them as large: (1 + 19) / (1 + 399) is exactly .05; one more is too many."""
    attention = [0.0] * 19
    for large, expected in ((1, YES), (2, OPEN)):
        ffn = [0.9] * large + [0.1] * (21 - large)
        found = c5.rule(swapped(0.0, attention), swapped(0.9, ffn), 0.0, 0.95)
        assert found.verdict == expected and found.numbers[0]["p_value"] == (1 + 19 * large) / 400


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


def test_a_series_that_ends_before_the_run_is_refused(made, no_figure):
    made.downstream(STEPS[:-1])
    with pytest.raises(InputError, match=f"ends at step {STEPS[-2]}, the run at {STEPS[-1]}"):
        run(made)
