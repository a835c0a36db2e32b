"""The report's figures: all are drawn from made-up results alone, and those left out are named."""

from __future__ import annotations

import pytest
from helpers import load_script
from test_claims import HUB, INTERFACE, STEPS, L, MadeUp

from cpt_utils.base import results
from cpt_utils.base.errors import InputError

pytestmark = pytest.mark.figures
script = load_script("report/figures.py")
LANGUAGES = ["eng_Latn", "fra_Latn", "gle_Latn"]


class Illustrated(MadeUp):
    """The made-up study with the results that only figures read."""

    def all(self):
        super().all()
        for make in (self.lsn_counts, self.lsn_activation, self.deactivation):
            make()
        return self

    def lsn_counts(self):
        counts = {lang: [(3 * layer + n) % 7 for layer in range(L)] for n, lang in enumerate(LANGUAGES)}
        rows = {
            lang: {"counts": own, "own": [max(0, c - 1) for c in own], "n_neurons": sum(own)}
            for lang, own in counts.items()
        }
        payload = {"n_layers": L, "languages": rows}
        self.write("lsn/result/made.report.json", payload, "lsn-report", models={"model": self.run[-1]})

    def lsn_activation(self):
        for number, (step, ref) in enumerate([(None, self.base), *zip(STEPS, self.run, strict=True)]):
            for prefix, size in (("", 0.02), ("r.", 0.002)):
                folder, stem = ("base", "") if step is None else ("made", f"checkpoint-{step}.")
                payload = {"all_layers": 0.03 + size * number, "layers": {}, "n_neurons": 40, "n_tokens": 2000}
                facts = {"models": {"model": ref}, "control": bool(prefix), "language": "gle_Latn", "step": step}
                place = f"lsn/lsn_activation/{folder}/{prefix}{stem}gle_Latn.2000.json"
                self.write(place, payload, "lsn-activation", **facts)

    def deactivation(self):
        silenced = [(None, None), *((d, i) for i in (None, *range(5)) for d in LANGUAGES)]
        records = [
            {
                "lang": d,
                "number": number,
                "losses": {
                    e: {
                        "nll": [2.0 + (0.5 + 0.1 * i) * (d == e and number is None) for i in range(5)],
                        "tokens": [1] * 5,
                    }
                    for e in LANGUAGES
                },
            }
            for d, number in silenced
        ]
        payload = load_script("lsn/deactivate.py").summarize(records, LANGUAGES, 0)
        self.write("lsn/deactivate.json", payload, "deactivation", models={"model": self.run[-1]})


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return Illustrated(tmp_path_factory.mktemp("study")).all()


def sizes(folder):
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def test_every_figure_is_drawn_from_the_results_alone(study, capsys):
    script.main(["--study", str(study.study)])
    found = sizes(study.results / "report" / "figures")
    assert set(found) == {f"{name}.{kind}" for name in script.FIGURES for kind in ("pdf", "png")}
    assert all(size > 2000 for size in found.values())
    assert "left out" not in capsys.readouterr().out


def test_a_missing_result_leaves_its_figure_out_and_names_the_script(tmp_path, capsys):
    made = MadeUp(tmp_path)
    made.weights()
    (made.results / "weight-diff/int_and_sem.json").unlink()
    script.main(["--study", str(made.study), "--output", str(tmp_path / "out")])
    assert set(sizes(tmp_path / "out")) == {"fig4_attention_ffn.pdf", "fig4_attention_ffn.png"}
    said = capsys.readouterr().out
    left_out = [line for line in said.splitlines() if "left out" in line]
    assert len(left_out) == len(script.FIGURES) - 1
    for name, made_by in {
        "fig1_retrieval": "layer-specialize/layer_specialize.py",
        "fig2_change": "weight-diff/int_and_sem.py",
        "fig3_layer_swap": "layer-swap/layer-swap.py --controls",
        "fig5_lsn_counts": "lsn/identify.py",
        "fig6_lsn_activation": "lsn/lsn_activation_cpt.py",
        "fig7_strengths": "activation-correlation/activation-correlation.py",
        "fig8a_attention_swap": "component-swap/attn_int_swap.py --controls",
        "fig8b_ffn_swap": "component-swap/ffn_lsn_swap.py --controls",
        "fig9_deactivation": "lsn/deactivate.py",
    }.items():
        assert any(line.startswith(f"{name} is left out") and made_by in line for line in left_out), name


def test_no_result_at_all_is_one_error(tmp_path):
    made = MadeUp(tmp_path)
    with pytest.raises(InputError, match="no result to draw"):
        script.main(["--study", str(made.study)])
    assert not (made.results / "report").exists()


def test_results_of_another_model_are_refused(tmp_path):
    made = Illustrated(tmp_path)
    made.deactivation()
    path = made.results / "lsn/deactivate.json"
    payload, header = results.read_json(path)
    header["models"]["model"]["weights_sample"] = "0" * 16
    results.write_json(path, payload, header)
    with pytest.raises(InputError, match=r"deactivate.json is about .*checkpoint-600, another model"):
        script.main(["--study", str(made.study)])


def test_a_rerun_gives_the_same_bytes(tmp_path):
    made = MadeUp(tmp_path)
    made.layers()
    made.retrieval()
    for name in ("one", "two"):
        script.main(["--study", str(made.study), "--output", str(tmp_path / name)])
    names = sizes(tmp_path / "one")
    assert set(names) == {"fig1_retrieval.pdf", "fig1_retrieval.png"}
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


def test_a_study_is_needed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--study FILE"):
        script.main([])


def test_the_layers_of_the_figure_are_those_of_the_split(study, monkeypatch):
    drawn = {}
    monkeypatch.setattr(script, "draw_retrieval", lambda path, steps, split, *rest: drawn.update(split) or 1)
    script.retrieval(script.Results(script.Study.find(study.study)), study.folder)
    assert drawn["semantic_layers"] == HUB and drawn["interface_layers"] == INTERFACE
