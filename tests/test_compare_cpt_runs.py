"""Several CPT runs of one base side by side: differences over the same sentences, over seeds, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import load_script
from test_claims import STEPS, L
from test_report_figures import LANGUAGES, Illustrated

from cpt_utils.base import cli, results, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study

script = load_script("report/compare.py")
rows = cli.sibling("report/rows.py")
calibrate = cli.sibling("report/calibrate.py")
LAST, WIDTH, DOCUMENTS = STEPS[-1], 16, 40


class Compared(Illustrated):
    """A made-up run with the results that only a comparison reads; `another` is another run of the same base."""

    def all(self):
        super().all()
        models = {"base": self.base, "checkpoints": {str(ref["step"]): ref for ref in self.run}}
        self.units = {code: self.rng.random((1 + len(STEPS), DOCUMENTS)) for code in LANGUAGES}
        names = ["base", *map(str, STEPS)]
        payload = {
            code: {
                name: {"nll_per_byte": own.mean(), "documents": DOCUMENTS}
                for name, own in zip(names, units, strict=True)
            }
            for code, units in self.units.items()
        }
        heldout = {code: {"sha256": f"text of {code}", "documents": DOCUMENTS} for code in LANGUAGES}
        tensors = {code: torch.tensor(units) for code, units in self.units.items()}
        facts = {"models": models, "heldout": heldout, "dtype": "float32"}
        self.write("language-loss/language_loss.json", payload, "language-loss", tensors, **facts)
        self.mask = {
            code: {str(layer): sorted(self.rng.choice(WIDTH, 5, replace=False).tolist()) for layer in range(L)}
            for code in LANGUAGES
        }
        self.write("lsn/result/made.json", self.mask, "lsn-mask", models={"model": self.run[-1]}, ffn_width=WIDTH)
        split = json.loads((self.results / "layer-specialize/layers.json").read_text())
        split["layer_accuracy"] = [[layer, 0.1] for layer in range(L)]
        (self.results / "layer-specialize/layers.json").write_text(json.dumps(split))
        return self

    def another(self, name: str):
        found = Compared.__new__(Compared)
        found.__dict__ |= self.__dict__
        found.rng = np.random.default_rng([self.seed, len(name)])
        place = self.folder / f"models/{self.seed}" / name
        found.run = [calibrate.write_model(place / f"checkpoint-{s}", s + self.seed / 100 + len(name)) for s in STEPS]
        found.results = self.results / "runs" / name
        return found.all()


def made(folder, seed=3, names=("second",)):
    first = Compared(folder, seed=seed).all()
    runs = ", ".join(f"{name}: '{folder}/models/{{seed}}/{name}'" for name in names)
    first.study.write_text(f"{first.study.read_text()}runs: {{{runs}}}\n")
    return first, [first.another(name) for name in names]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return made(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def copied(finished, tmp_path):
    """The two runs, to be spoilt by a test: the study file, and the folder of its results."""
    first, _ = finished
    shutil.copytree(first.folder / "results", tmp_path / "results")
    study = tmp_path / "study.yaml"
    study.write_text(first.study.read_text().replace(f"{first.folder}/results", f"{tmp_path}/results"))
    return study, tmp_path / "results" / str(first.seed)


@pytest.fixture(scope="module")
def payload(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "compare.json"
    script.main(["--study", str(finished[0].study), "--output", str(out)])
    return json.loads(out.read_text())


def named(numbers, name):
    return next(row for row in numbers if row["name"] == name)


def by_loops(first, other, seed):
    """Mean and interval of the difference, sentence by sentence and resample by resample."""
    differences = [float(b) - float(a) for a, b in zip(first, other, strict=True)]
    means = []
    for times in stats.resample_weights(len(differences), seed, 2000):
        drawn = [d for d, n in zip(differences, times.astype(int), strict=True) for _ in range(n)]
        means.append(sum(drawn) / len(drawn))
    return sum(differences) / len(differences), np.quantile(means, 0.025), np.quantile(means, 0.975)


def hits_of(run):
    name = run.run[-1]["model_id"]
    return results.read_tensors(run.results / f"sentence-retrieval/eng_Latn-gle_Latn/{name}.pt")


def test_differences_are_over_the_same_sentences_as_a_loop_gives_them(finished, payload):
    first, (second,) = finished
    assert payload["first"] == "plain" and list(payload["values"]) == ["plain", "second"]
    numbers = payload["differences"]["second"]
    for words, tensor in (("published", "hits"), ("unit, centred", "hits_unit_centred")):
        one, two = hits_of(first)[tensor].double(), hits_of(second)[tensor].double()
        for name, state in (("h_2", 2), ("last hidden state", L)):
            row = named(numbers, f"retrieval: {words}, {name}")
            expected = by_loops(one[state], two[state], first.seed)
            assert [row["value"], row["ci_low"], row["ci_high"]] == pytest.approx(expected, abs=1e-9)
            assert (row["n"], row["n_of"]) == (one.shape[1], "sentences")
        row = named(numbers, f"retrieval: {words}, mean over h_1 .. h_L")
        assert row["value"] == pytest.approx(float(two[1:].mean() - one[1:].mean()), abs=1e-9)
    row = named(numbers, "losses: fra_Latn")
    expected = by_loops(first.units["fra_Latn"][-1], second.units["fra_Latn"][-1], first.seed)
    assert [row["value"], row["ci_low"], row["ci_high"]] == pytest.approx(expected, abs=1e-8)
    # Pairs of sentences, not two means: the interval is that of neither run's own.
    widths = [row["ci_high"] - row["ci_low"] for row in (named(payload["values"][n], row["name"]) for n in ("plain",))]
    assert widths[0] != pytest.approx(row["ci_high"] - row["ci_low"])


def test_swaps_weights_and_neurons_are_the_runs_own(finished, payload):
    first, (second,) = finished
    values = []
    for run in (first, second):
        units = results.read_tensors(run.results / "layer-swap/controls.pt")["nll_per_byte"].double()
        sets = json.loads((run.results / "layer-swap/controls.json").read_text())["sets"]
        at = [row["name"] for row in sets].index
        random = [i for i, row in enumerate(sets) if row["name"] == "random"]
        values.append(
            (units[at("semantic_hub")] - units[at("target")], units[at("semantic_hub")] - units[random].mean(0))
        )
    numbers = payload["differences"]["second"]
    for i, name in enumerate(("swaps: hub, loss", "swaps: hub minus random swaps, loss")):
        row = named(numbers, name)
        assert row["value"] == pytest.approx(float((values[1][i] - values[0][i]).mean()), abs=1e-8)
        assert row["ci_low"] < row["value"] < row["ci_high"]
        own = named(payload["values"]["second"], name)
        assert own["value"] == pytest.approx(float(values[1][i].mean()), abs=1e-8)
    pooled = [
        json.loads((run.results / "weight-diff/attn_vs_ffn.json").read_text())["pooled"] for run in (first, second)
    ]
    row = named(numbers, "change: relative, FFN")
    assert row["value"] == pytest.approx(pooled[1][str(LAST)]["ffn"] - pooled[0][str(LAST)]["ffn"])
    assert row["ci_low"] is None
    both = payload["agreement"]["second"]
    shared = len({(a, i) for a, own in first.mask["gle_Latn"].items() for i in own}
                 & {(a, i) for a, own in second.mask["gle_Latn"].items() for i in own})  # fmt: skip
    assert named(both, "neurons of gle_Latn in both")["value"] == pytest.approx(shared / (2 * 5 * L - shared))
    assert named(both, "layers of the hub in both")["value"] == 1.0


def test_over_seeds_each_difference_has_the_interval_of_t(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "DRAWS", 20)
    for seed in (1, 2, 3):
        first, _ = made(tmp_path, seed)
    out = tmp_path / "out.json"
    script.main(["--study", str(first.study), "--seeds", "1,2,3", "--output", str(out)])
    payload = json.loads(out.read_text())
    row = named(payload["differences"]["second"], "losses: gle_Latn")
    values = []
    for seed in (1, 2, 3):
        folder = tmp_path / f"results/{seed}"
        ends = [
            json.loads((place / "language-loss/language_loss.json").read_text())["gle_Latn"][str(LAST)]["nll_per_byte"]
            for place in (folder, folder / "runs/second")
        ]
        values.append(ends[1] - ends[0])
    assert list(row["values"].values()) == pytest.approx(values)
    assert [row["value"], row["ci_low"], row["ci_high"]] == pytest.approx(list(stats.t_mean(values)[:3]))
    assert (row["n"], row["n_of"]) == (3, "seeds")
    assert "over 3 seeds" in out.with_suffix(".md").read_text()
    with pytest.raises(InputError, match=r"need --output FILE.json"):
        script.main(["--study", str(first.study), "--seeds", "1,2,3"])


def test_what_a_run_lacks_is_said_and_not_compared(copied, capsys, monkeypatch):
    monkeypatch.setattr(script, "DRAWS", 20)
    study, folder = copied
    shutil.rmtree(folder / "runs/second/language-loss")
    (folder / "runs/second/lsn/result/made.report.json").unlink()
    (folder / "runs/second/component-swap/ffn_lsn_swap/controls.json").unlink()
    split = folder / "runs/second/layer-specialize/layers.json"
    spoil(split, lambda whole: whole["_header"]["gate"].update(passed=False, difference=0.001, ci_low=-0.1))
    script.main(["--study", str(study)])
    out = folder / "report/compare.json"
    payload = json.loads(out.read_text())
    assert set(payload["missing"]["second"]) == {"losses", "neurons", "swaps"} and not payload["missing"]["plain"]
    assert "second, losses: language-loss/language_loss.json is not there" in capsys.readouterr().out
    assert "component-swap/ffn_lsn_swap/controls.json is not there" in payload["missing"]["second"]["swaps"]
    names = [row["name"] for row in payload["differences"]["second"]]
    assert "swaps: attention of the interface, loss" in names and "swaps: FFN of LSN-rich layers, loss" not in names
    assert names and not any(name.startswith(("losses", "neurons")) for name in names)
    assert any(row["name"].startswith("losses") for row in payload["values"]["plain"])
    text = out.with_suffix(".md").read_text()
    assert "Lower losses are better." in text
    assert "- second, losses: " in text and "| losses: Irish (gle_Latn) |" in text and r"mean \|dW\|, hub" in text
    assert list(payload["gate"]) == ["second"] and payload["gate"]["second"] in text
    # The numbers of the comparison are in the table of all numbers, too.
    compared = [row for row in rows.rows(Study.find(study)) if row["result"] == "compare"]
    row = named(payload["differences"]["second"], "swaps: hub, loss")
    mine = [r for r in compared if r["run"] == "second" and r["measure"] == "differences/swaps: hub, loss"]
    assert [(r["value"], r["ci_low"]) for r in mine] == [(row["value"], row["ci_low"])]


def test_two_studies_of_one_base_are_compared_by_their_files(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "DRAWS", 20)
    first, (second,) = finished
    text = first.study.read_text().replace("name: made", "name: other")
    text = text.replace(f"run: {first.folder}/models/{{seed}}/run", f"run: {first.folder}/models/{{seed}}/second")
    shutil.copytree(second.results, tmp_path / "results")
    for path in (tmp_path / "results/lsn/result").glob("made.*"):
        path.rename(path.with_name(path.name.replace("made", "other")))
    (tmp_path / "results/lsn/lsn_activation/made").rename(tmp_path / "results/lsn/lsn_activation/other")
    other = tmp_path / "other.yaml"
    other.write_text("\n".join(line for line in text.splitlines() if not line.startswith(("results", "runs")))
                     + f"\nresults: {tmp_path}/results\n")  # fmt: skip
    out = tmp_path / "out.json"
    script.main([str(first.study), str(other), "--output", str(out)])
    payload = json.loads(out.read_text())
    assert list(payload["values"]) == ["made", "other"]
    row = named(payload["differences"]["other"], "losses: gle_Latn")
    assert row["value"] == pytest.approx(second.units["gle_Latn"][-1].mean() - first.units["gle_Latn"][-1].mean())
    with pytest.raises(InputError, match="several seeds or study files need --output"):
        script.main([str(first.study), str(other)])
    with pytest.raises(InputError, match="have the same name; give each its own"):
        script.main([str(other), str(other), "--output", str(out)])


def spoil(path, change):
    whole = json.loads(path.read_text())
    change(whole)
    path.write_text(json.dumps(whole))


def other_sentences(second):
    for path in second.rglob("*.json"):
        if "pairs_sha256" in path.read_text():
            spoil(path, lambda whole: whole["_header"]["data"].update(pairs_sha256="others"))


def other_text(second):
    path = second / "language-loss/language_loss.json"
    spoil(path, lambda whole: whole["_header"]["heldout"]["fra_Latn"].update(sha256="others"))


def other_losses(second):
    path = second / "language-loss/language_loss.json"
    spoil(path, lambda whole: whole["fra_Latn"][str(LAST)].update(nll_per_byte=9.0))


def of_the_first(second):
    """Results of the plain run where those of the second should lie."""
    shutil.rmtree(second / "weight-diff")
    shutil.copytree(second.parents[1] / "weight-diff", second / "weight-diff")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_sentences, "were made with different sentences; measure both alike"),
        (other_text, "losses of plain and second are on different texts in fra_Latn; measure both alike"),
        (other_losses, r"language_loss.json and language_loss.pt beside it do not belong together \(fra_Latn\)"),
        (of_the_first, r"second/weight-diff/attn_vs_ffn.json is about .*run.checkpoint-.*another model"),
        (
            shutil.rmtree,
            r"runs/second holds no result to compare; .* with --arm second, or make reproduce STUDY=\S+ ARM=second",
        ),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_leaves_nothing(copied, change, message, monkeypatch):
    monkeypatch.setattr(script, "DRAWS", 20)
    study, folder = copied
    change(folder / "runs/second")
    with pytest.raises(InputError, match=message):
        script.main(["--study", str(study)])
    assert not (folder / "report/compare.json").exists()


def test_runs_must_be_two_and_named(copied, tmp_path, monkeypatch):
    study, _ = copied
    for names, message in (
        (["plain"], "comparing takes two runs or more"),
        (["plain", "plain"], "comparing takes two runs or more"),
        (["plain", "third"], r"has no arm 'third'; it has second \(keys arms and runs\)"),
    ):
        with pytest.raises(InputError, match=message):
            script.main(["--study", str(study), *names])
    monkeypatch.chdir(tmp_path / "results")
    with pytest.raises(InputError, match="give study files of several runs, or --study FILE with other runs in it"):
        script.main([])
    with pytest.raises(InputError, match="leave out --arm"):
        script.main(["--study", str(study), "--arm", "second"])
    study.write_text(study.read_text().replace("second:", "plain:"))
    with pytest.raises(InputError, match="runs: plain is the name of another model; give the run another name"):
        script.main(["--study", str(study)])


@pytest.mark.figures
def test_the_figure_has_a_line_for_each_run_and_the_table_fits_a_column(finished, payload, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: (drawn.append(figure), file.write(b"drawn")))
    script.shown.draw(tmp_path / "compare", payload)
    axes = drawn[0].axes
    empty = [axis.get_title() for axis in axes if any(text.get_text() == "no results" for text in axis.texts)]
    assert len(axes) == 9 and empty == ["change of the weights"]  # the made-up runs have it of no layer
    assert [len(axis.get_lines()) for axis in axes[:2]] == [4, 4]  # two runs, base, untrained
    text = script.shown.latex(payload)
    assert "hub swap, loss & " in text and "change of FFN & " in text
    assert text.count(r"\begin{tabular}") == 1 and all(len(line) < 130 for line in text.splitlines()[1:])
