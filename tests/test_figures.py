"""What all figures share: languages by name, layers and hidden states, marks of zeros; and what a fault is."""

import numpy as np
import pytest
from figure_faults import faults
from helpers import load_script

from cpt_utils.base import figures


@pytest.fixture
def plt():
    with figures.style() as plt:
        yield plt


def panel(plt):
    figure, axis = plt.subplots(figsize=(figures.COLUMN, 2))
    axis.plot(range(5), range(5), label="a line")
    return figure, axis


def test_a_plain_figure_has_no_faults(plt):
    figure, axis = panel(plt)
    axis.set_xlabel("training step")
    axis.legend()
    assert faults(figure) == []


def test_text_that_is_cut_off_or_lies_on_other_text_and_a_long_legend_are_faults(plt):
    figure, axis = panel(plt)
    axis.set_title(60 * "x")
    assert [fault.endswith("pixels") and "cut off" in fault for fault in faults(figure)] == [True]
    figure, axis = panel(plt)
    figure.supxlabel("the hidden state", fontsize=8)
    figure.legend(loc="outside lower center")  # the layout does not keep these apart
    assert any("lies on" in fault for fault in faults(figure))
    figure, axis = panel(plt)
    axis.set_xticks(range(5), 5 * ["a label longer than its place"])
    assert any("lies on" in fault for fault in faults(figure))
    figure, axis = panel(plt)
    for number in range(9):
        axis.plot([0, number], label=f"step {number}")
    axis.legend(fontsize=1)
    assert "a legend has 10 entries" in faults(figure)


@pytest.mark.parametrize(
    ("code", "shown"),
    [("eus_Latn", "Basque (eus_Latn)"), ("ga", "Irish (ga)"), ("cmn_Hans", "Mandarin Chinese (cmn_Hans)"),
     ("qaa_Latn", "invented (qaa_Latn)"), ("some_tag", "some_tag")],
)  # fmt: skip
def test_a_language_is_its_name_and_its_code(code, shown):
    assert figures.language(code) == shown


def test_the_loss_of_a_language_names_it():
    label = "NLL of held-out text (nats per byte)"
    named = figures.measure("nll_per_byte:eus_Latn", f"{label}, eus_Latn", 24)
    assert named == "NLL of held-out text\n(nats per byte),\nBasque (eus_Latn)"
    assert figures.measure("nll_per_byte", label, 40) == label


@pytest.mark.parametrize(("hidden_states", "below", "above", "shift"), [(False, range(4), range(1, 5), 1),
                                                                        (True, range(5), range(4), -1)])  # fmt: skip
def test_layers_and_hidden_states_stand_on_either_side(plt, hidden_states, below, above, shift):
    figure, axis = panel(plt)
    figures.layer_axis(axis, 4, hidden_states, both=True)
    other = axis.child_axes[0]
    figure.draw_without_rendering()
    assert list(axis.get_xticks()) == list(below) and list(other.get_xticks()) == list(above)
    assert axis.get_xlabel().startswith("hidden state" if hidden_states else "layer")
    assert other.get_xlim() == tuple(end + shift for end in axis.get_xlim())


def test_a_bar_of_no_height_has_a_ring(plt):
    _, axis = panel(plt)
    figures.zeros(axis, range(4), [1, 0, 2, 0])
    assert list(axis.lines[-1].get_xdata()) == [1, 3]
    figures.zeros(axis, range(2), [1, 2])
    assert len(axis.lines) == 2


def test_numbers_in_cells_have_a_sign_unless_they_are_none():
    assert [figures.signed_text(value) for value in (0.0194, -0.0676, -0.0001)] == ["+.019", "−.068", ".000"]


CODES = [
    "eng_Latn", "eus_Latn", "cmn_Hans", "gle_Latn", "swh_Latn", "tam_Taml", "nob_Latn", "rus_Cyrl", "zgh_Tfng",
    "arb_Arab", "quy_Latn", "jpn_Jpan", "fra_Latn", "deu_Latn",
]  # fmt: skip


@pytest.mark.figures  # whose figures must have no faults
@pytest.mark.parametrize("n", [5, 14])
def test_figures_of_many_languages_are_legible(n, tmp_path):
    names, random = CODES[:n], np.random.default_rng(0)
    maps = [{d: {e: float(random.normal(0, 0.05)) for e in names} for d in names} for _ in range(2)]
    sets = {d: [one[d] for one in maps] for d in names}
    payload = {"languages": names, "matrix": maps[0], "random": sets, "active": sets}
    payload["diagonal"] = {d: {"verdict": "reverse"} for d in names}
    load_script("lsn/deactivate_report.py").draw(tmp_path / "deactivation", payload)
    report = load_script("lsn/identify_report.py")
    counts = random.integers(0, 3, (n, 32)).tolist()
    rows = {lang: {"counts": own, "own": [0] * 32, "n_neurons": 12345} for lang, own in zip(names, counts, strict=True)}
    report.draw_counts(tmp_path / "counts", rows, 32)
    shared = {"jaccard": (random.random((n, n)) / 3).tolist(), "shared": [[12345] * n] * n, "languages": names}
    report.draw_overlap(tmp_path / "overlap", shared)
    parts = [{"share": s, "jaccard": 0.8 + s / 5, "languages": dict.fromkeys(names, 0.7)} for s in (0.125, 0.25, 0.5)]
    halves = {part: dict.fromkeys(names, 12345678) for part in ("tokens_first", "tokens_second", "languages")}
    report.draw_convergence(tmp_path / "parts", {"against_full": parts, "halves": halves | {"jaccard": 0.8}})
    nothing = {"nll_per_byte": 0.5, "ci_low": 0.4, "ci_high": 0.6}
    losses = {lang: {"base": nothing, "5000": nothing | {"change": {"mean": 0.1, "ci_low": 0.0, "ci_high": 0.2}}}
              for lang in names}  # fmt: skip
    load_script("language-loss/language_loss.py").draw(tmp_path / "losses", losses)
    row = {key: {"value": 0.5, "ci_low": 0.4, "ci_high": 0.6} for key in ("bigram", "unigram", "beyond")}
    load_script("alignment/bigram.py").draw(tmp_path / "bigram", {lang: {"base": row, "5000": row} for lang in names})


@pytest.mark.figures
@pytest.mark.parametrize("n_layers", [4, 64])
def test_gradients_of_many_layers_are_legible(n_layers, tmp_path):
    script, random = load_script("alignment/gradients.py"), np.random.default_rng(0)
    names = [f"layer_{layer}.{row}" for layer in range(n_layers) for row in ("q_proj", "o_proj", "up_proj", "router")]
    units = {name: {kind: {region: random.normal(0, 0.1, 5).tolist() for region in (*names, *script.WHOLE)}
                    for kind in ("cosine", "shuffled")} for name in ("base", "12500", "125000")}  # fmt: skip
    script.draw(tmp_path / "gradients", script.summarize(units, 0))


@pytest.mark.figures
def test_the_split_of_many_layers_of_a_model_with_a_long_name_is_legible(tmp_path):
    script = load_script("layer-specialize/layer_specialize.py")
    groups = {"interface_layers": [*range(8), *range(25, 32)], "semantic_layers": [*range(8, 25)]}
    split = groups | {"layer_accuracy": [[i, i / 40] for i in range(32)], "label_stability": [1.0] * 31 + [0.0]}
    split |= {"n_sentences": 997, "threshold": 0.4, "splits": dict.fromkeys(script.curves.MEASURES, groups)}
    title = "HuggingFaceTB/SmolLM2-1.7B-intermediate-checkpoints@step-125000"
    script.draw(tmp_path / "layers", split, {"n_used": 997, "measure": "unit_centred"}, title)
