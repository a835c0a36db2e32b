"""The report: from made-up results alone, sentences in the place of what is missing, and what a browser shows of it."""

from __future__ import annotations

import copy
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import load_script
from test_claims import STEPS, MadeUp

from cpt_utils.base import cli, experiments
from cpt_utils.base.errors import InputError
from cpt_utils.measures import verdicts
from cpt_utils.measures.verdicts import above, number, within

script = load_script("report/page.py")
parts, headlines = script.parts, script.headlines
claims = load_script("report/claims.py")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Made-up results of a seed with their claims, and a white picture wherever a figure would lie."""
    from PIL import Image

    made = MadeUp(tmp_path_factory.mktemp("page")).all()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(claims.shown, "draw", lambda *_: None)
        claims.main(["--study", str(made.study)])
    run = parts.Run(claims.Study.find(made.study))
    for figure in (figure for step in parts.steps() for figure in step.figures):
        place = run.study.result(figure.step)
        folder = place.parent if place.suffix else place
        pair = "eng_Latn-gle_Latn" if "/" in figure.file else ""
        path = folder / pair / figure.file.rpartition("/")[2].replace("*", "x").replace("{name}", run.study.name)
        if folder.is_dir():
            Image.new("RGB", (1350, 2400), "white").save(path)
    return made


@pytest.fixture
def page(study, tmp_path):
    """The page of that study in a folder of its own, as a function that spoils results before."""

    def make(spoil=lambda results: None, *more):
        shutil.copytree(study.results, tmp_path / "results", dirs_exist_ok=True)
        spoil(tmp_path / "results")
        file = tmp_path / "study.yaml"
        file.write_text(study.study.read_text().replace(f"{study.folder}/results/{{seed}}", str(tmp_path / "results")))
        script.main(["--study", str(file), *more])
        return (tmp_path / "results/report.html").read_text()

    return make


def text_of(page: str) -> str:
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


# ---------------------------------------------------------------- what the scripts say


def test_every_figure_of_an_experiment_has_its_place_and_every_one_asks():
    steps = parts.steps()
    texts = [text for name, (part, _, text) in experiments.captions().items() if part not in parts.OTHERS]
    shown = {figure.caption for step in steps for figure in step.figures}
    assert shown == {*texts} and all(step.figures for step in steps)
    assert {step.name for step in steps} == {*experiments.said("ASKED")} <= {*experiments.said("RESULTS")}
    assert all(step.question.endswith("?") and len(step.question) < 120 for step in steps)
    asked_by = {script for _, script in experiments.said("ASKED").values()}
    drawing = {by for name, (_, by) in experiments.said("CAPTIONS").items() if not by.startswith("report/")}
    assert drawing - asked_by == {"component-swap/component_swap.py"}  # its two scripts ask
    order = [step.name for step in steps]
    assert (
        order.index("retrieval") < order.index("int_and_sem") < order.index("downstream") < order.index("attn_vs_ffn")
    )
    assert {*headlines.HEADLINES} == {*order} and {name for name, *_ in ((s.part,) for s in steps)} == {*script.PARTS}


def test_a_figure_of_another_section_stands_in_its_own():
    files = {step.name: [figure.file for figure in step.figures] for step in parts.steps()}
    assert files["attn_vs_ffn"] == ["attn_vs_ffn.png"]  # beside the result, where nothing else is said
    assert files["layer_swap"][0] == "controls.png" and "semantic_hub" in files["layer_swap"][1]
    assert files["attn_int_swap"] == ["controls.png"] and "ffn_lsn_swap" in files["ffn_lsn_swap"][1]


# ---------------------------------------------------------------- numbers in words


@pytest.mark.parametrize("numbers, told", [
    ((0.058333, 0.036667, 0.08), "0.058 [0.037, 0.080]"),
    ((-0.0026722, -0.0048849, -0.0005642), "−0.0027 [−0.0049, −0.0006]"),
    ((-0.00001, -0.02, 0.02), "0.000 [−0.020, 0.020]"),
    ((2048.0, None, None), "2,048"), ((0.10462, None, None), "0.105"), ((None, None, None), "none"),
    ((0.0, None, None), "0.000"), ((0.5, 0.5, 0.5), "0.500 [0.500, 0.500]"),
    ((0.00408817, 0.00408817 - 1e-15, 0.00408817), "0.00409 [0.00409, 0.00409]"),
    ((0.0, 0.0, 0.0), "0.000 [0.000, 0.000]"),
])  # fmt: skip
def test_numbers_have_the_digits_that_their_interval_bears(numbers, told):
    assert headlines.in_digits(*numbers) == told


def claim(*numbers, verdict=verdicts.ONE, reason="why", p=None, needed=None):
    return {"numbers": list(numbers), "beside": [], "verdict": verdict, "reason": reason, "p_value": p,
            "seeds_needed": needed, "text": "x", "files": []}  # fmt: skip


FOR, AGAINST, OPEN = (number(name, value, (value - 1, value + 1), says=above())
                      for name, value in (("for", 3.0), ("against", -2.0), ("open", 0.5)))  # fmt: skip
BARE, NONE = (number("bare", -1.0, says=above()),
              number("none", None, says=above(), note="x.json is not there (it is made by a/x.py)"))  # fmt: skip
FAR = number("far", -2.0, says={"side": "below", "bound": -0.2})
NEAR, VAGUE = FAR | {"name": "near", "value": -0.3}, NONE | {"note": "CPT made perception worse"}


@pytest.mark.parametrize("numbers, word, first, why", [
    ([FOR, OPEN, AGAINST], "contrary", "against",
     "1 of 3 numbers is contrary to the claim, 1 as claimed, 1 not clear."),
    ([FOR, OPEN], "not clear", "open", "1 of 2 numbers is as claimed, 1 not clear."),
    ([FOR, FOR], "as claimed", "for", "Both numbers are as claimed."),
    ([FOR, NONE], "not clear", "for", "1 of 2 numbers is as claimed, 1 not measured."),
    ([OPEN], "not clear", "open", "Its interval includes 0."),
    ([BARE], "no interval", "bare", "One number over all weights: only several seeds give it an interval."),
    ([FAR, NEAR], "no interval", "near", "Both numbers are without an interval."),
    ([NONE], "not measured", None, "x.json is not there (it is made by a/x.py)."),
    ([VAGUE], "cannot be judged", None, "CPT made perception worse."),
    ([FOR, VAGUE], "not clear", "for", "1 of 2 numbers is as claimed, 1 not defined."),
    ([NONE, VAGUE], "cannot be judged", None, "1 of 2 numbers is not defined, 1 not measured."),
    ([], "cannot be judged", None, "Why."),
    ([number("in", 0.0, (-0.1, 0.01), says=within(0.03))], "not clear", "in", "Its interval includes 0.03."),
])  # fmt: skip
def test_a_claim_is_told_by_the_number_that_speaks_most_against_it(numbers, word, first, why):
    shown = script.entry("", claim(*numbers), False)
    assert (shown["word"], shown.get("about"), shown["why"]) == (word, first, why)


def test_an_end_that_is_not_the_bound_does_not_look_like_it():
    row = number("x", 0.1364, (0.0137, 0.2519), says={"side": "below", "bound": 0.25})
    assert script.entry("", claim(row), False)["number"] == "0.136 [0.014, 0.252]"
    assert headlines.in_digits(0.1, 0.01, 0.25, 0.25) == "0.10 [0.01, 0.25]"


def test_what_decides_nothing_has_no_word_of_the_claims():
    found = script.entry("", claim(FOR) | {"beside": [AGAINST]}, False)
    assert found["numbers"][0]["note"] == "as claimed" and not found["beside"][0]["note"] + found["beside"][0]["says"]


def test_a_bound_has_the_digits_and_the_minus_of_the_numbers_beside_it():
    row = number("x", -0.3, says={"side": "below", "bound": -0.22314355})
    found = script.entry("", claim(row), False)
    assert found["says"] == "claimed below \u22120.223" and found["numbers"][0]["says"] == "below \u22120.223"


def test_over_seeds_the_verdict_and_what_would_decide_it():
    one = claim(OPEN, verdict=verdicts.OPEN, p=0.4, needed=12)
    shown = script.entry("", one, True)
    assert shown["word"] == "undecided"
    assert shown["why"] == "Its interval includes 0 (p = 0.400 after Holm; 12 seeds would decide it)."
    void = claim(FOR, verdict=verdicts.VOID, reason="the twin is as good")
    assert script.entry("", void, False)["word"] == verdicts.VOID
    assert headlines.why(void) == "The twin is as good."


# ---------------------------------------------------------------- three numbers


def three(schema, step, payload, **header):
    """The numbers that matter of a result of the study, as text by their words."""
    header = {"schema": schema, "models": {"target": {"step": 40}}} | header
    rows = [dict.fromkeys(parts.numbers.COLUMNS) | {"run": "plain", "result": step} | row
            for row in parts.numbers.of_file(payload, header)]  # fmt: skip
    for row in rows:  # as rows.rows says it
        row["language"] = row["language"] or "gle_Latn"
    made = claims.Study({"name": "x", "languages": {"base": "eng_Latn", "target": "gle_Latn"}})
    return [(row and (row["value"], row.get("where"))) for _, row in headlines.three(step, rows, made)]


def test_sweeps_and_lines_between_runs_are_told_by_their_numbers():
    area = {"value": 0.2, "ci_low": 0.1, "ci_high": 0.3}
    payload = {"summary": {"perception": {"gain": 1.0, "A": area}, "production": {"A": area | {"value": -0.1}}},
               "specialisation": {"value": None, "why": "not clear"}}  # fmt: skip
    assert three("ablation-sweep", "layer_ablation", payload) == [(0.2, None), (-0.1, None), None]
    measures = {
        f"nll_per_byte{code}": {"barrier": area | {"value": value}} for code, value in ((":fra_Latn", 5), ("", 6))
    }
    losses = {"base": 5, "other": 7, "target": 4}
    sets = [{"name": name, "values": {"nll_per_byte": value}} for name, value in losses.items()]
    payload = {"worst": {"measure": "nll_per_byte:fra_Latn", **area}, "measures": measures, "sets": sets}
    ends = [(7, None), (4, None), (5, None)]  # of the line, and the base
    assert three("connect", "connect", payload) == [(0.2, "language fra_Latn"), *ends]
    assert three("connect", "connect", payload | {"worst": None})[0] is None


def test_gradients_and_bigrams_are_told_by_the_last_checkpoint():
    def row(value, name):
        return {"cosine": value, "shuffled": 0.1, "beyond": {name: value / 2, "ci_low": 0.0, "ci_high": 1.0}}

    one = {"layers": {"layer_0": {"q_proj": row(0.9, "mean"), "ffn": row(0.8, "mean")}}, "all": row(0.4, "mean")}
    one["attention_minus_ffn"] = {"beyond": {"mean": 0.3, "ci_low": 0.2, "ci_high": 0.4}}
    payload = {"base": one | {"all": row(0.7, "mean")}, "40": one}
    assert three("gradients", "gradients", payload, target_lang="gle_Latn") == [(0.4, None), (0.2, None), (0.3, None)]
    last = {"bigram": row(1.0, "value")["beyond"], "beyond": row(0.2, "value")["beyond"], "documents": 9}
    table = {"base": {"bigram": row(0.6, "value")["beyond"]}, "40": last}
    assert three("bigram", "bigram", {"gle_Latn": table, "eng_Latn": table}) == [(0.5, None), (0.3, None), (0.1, None)]


def test_what_can_go_of_an_update_is_that_of_the_target_language():
    def kept(value):
        return {"at": {"value": 0.0, "kept": value and {"value": value, "ci_low": 0.0, "ci_high": 1.0}}}

    def of_both(french):
        return {"nll_per_byte": kept(None), "nll_per_byte:fra_Latn": kept(french)}

    payload = {"largest": {"svd": of_both(0.5)}, "beyond": {"svd": {"as_random": of_both(0.1)}}}
    assert three("truncate", "truncate", payload) == [None, None, None]
    payload["largest"]["svd"]["nll_per_byte"] = kept(0.75)
    payload["beyond"]["svd"]["as_random"]["nll_per_byte"] = kept(0.25)
    assert three("truncate", "truncate", payload) == [(0.75, None), None, (0.25, None)]


def test_several_runs_are_told_by_what_another_has_more_than_the_first():
    names = ("retrieval: published, mean over h_1 .. h_L", "task: accuracy")
    gaps = {run: [{"name": name, "value": value, "ci_low": None, "ci_high": None} for name in names]
            for run, value in (("half", 0.1), ("twice", 0.3))}  # fmt: skip
    found = three("comparison", "compare", {"differences": gaps, "values": {}, "agreement": {}})
    assert found == [(0.3, "run twice"), None, (0.3, "run twice")]


# ---------------------------------------------------------------- what came out, in a sentence


def row(value, low=None, high=None, **columns):
    empty = dict.fromkeys(parts.numbers.COLUMNS) | {"run": "plain", "step": 9}
    return empty | {"value": value, "ci_low": low, "ci_high": high} | columns


def answer(step, numbers=(), rows=None, claims=None, rich=()):
    study = script.Study({"name": "x", "languages": {"base": "eng_Latn", "target": "gle_Latn"}})
    return parts.answers.answer(step, list(numbers), rows or [row(0)], study, claims or {}, list(rich))


UP, DOWN, BOTH, FLAT = row(1, 0.5, 1.5), row(-1, -1.5, -0.5), row(0.1, -0.5, 0.7), row(0.1)


@pytest.mark.parametrize("step, numbers, said", [
    ("retrieval", [UP | {"where": "hidden state 4"}, DOWN, BOTH],
     "highest at hidden state 4: higher than in the base and not clearly higher than in an untrained model, each at"),
    ("layer_swap", [UP, DOWN, None], "raises the loss more than swapping others; the hub swap raises the loss less"),
    ("layer_swap", [None, BOTH, None], "The hub swap raises the loss neither clearly more nor clearly less than swaps"),
    ("int_and_sem", [row(1), row(2), row(0.5)], "Hub layers change more than interface layers (numbers without in"),
    ("downstream", [None, UP, BOTH], "Not clear: the intervals of the two correlations overlap."),
    ("downstream", [None, UP, DOWN], "It follows interface layers more closely than hub layers."),
    ("activation_correlation", [BOTH, BOTH, None], "overlap, and both include 0."),
    ("deactivation", [UP, BOTH, row(2)], "harms the new language; the harm does not clearly exceed that to other "
     "languages; with random neurons this difference is as large or larger on average."),
    ("spectrum", [None, row(0.7, 0.6, 0.8), None], "Less of the change lies in the singular values than for a random"),
    ("spectrum", [None, row(0.7), None], "Neither clearly more nor clearly less of the change"),
    ("rewind", [None, None, BOTH, DOWN], "Not clearly more of the update can be put back with least changed heads first"
     " than in random order. Putting back the best share, chosen on half of the items, worsens the loss"),
    ("layer_ablation", [UP, UP, DOWN], "What serves production comes earlier"),
    ("alignment", [row(3, 2.9, 3.1), UP, BOTH], "more alike than in the base and more alike than in an untr"),
    ("gradients", [UP, BOTH, DOWN], "not clearly more alike than those of a sentence and another's translation, more "
     "so in the FFN."),
    ("bigram", [UP, DOWN, UP], "its bigrams more closely than in the base, and more closely than unigrams"),
    ("router_steering", [UP, row(2), None], "Without its experts the new language is predicted worse, no more than "),
    ("alignment", [UP, None, None], ""), ("gradients", [UP, None, None], ""), ("bigram", [UP, None, UP], ""),
    ("layer_ablation", [UP, UP, None], ""), ("deactivation", [None, UP, UP], ""), ("spectrum", [None] * 3, ""),
])  # fmt: skip
def test_a_sentence_says_what_the_intervals_bear_and_no_more(step, numbers, said):
    found = answer(step, numbers)
    assert said in found if said else found == ""


def test_a_line_whose_ends_are_bad_is_told_with_them():
    ends = {"base": 2, "other": 5, "target": 1}
    rows = [row(value, measure="nll_per_byte", condition=name, language="gle_Latn") for name, value in ends.items()]
    found = answer("connect", [DOWN, None, None, None], rows)
    assert found.startswith("The line is below the chord") and "the other run is worse than the base in Irish" in found
    rows[1]["value"] = 1.5
    assert "worse than the base" not in answer("connect", [DOWN, None, None, None], rows)


def test_of_arms_and_languages_those_are_named_that_their_intervals_tell():
    rows = [row(0.5, 0.4, high, run=run, measure="share/nll_per_byte") for run, high in (("hub", 0.6), ("other", 1.1))]
    rows += [row(1, 0.9, 1.1, run="hub", measure="share/task_accuracy"), row(1, measure="share/nll_per_byte")]
    assert (
        answer("arms", rows=rows)
        == "Clearly short of the plain run in loss: hub. No arm clearly falls short in the task."
    )
    changes = {"fra_Latn": UP, "gle_Latn": DOWN}
    rows = [change | {"measure": "change", "language": code} for code, change in changes.items()]
    found = answer("language_loss", rows=[*rows, BOTH | {"measure": "change", "language": "eng_Latn"}])
    assert "falls in Irish (gle_Latn), rises in French (fra_Latn) and does not clearly change in English" in found
    rows = [row(n, layer=layer, measure="neurons", language="gle_Latn") for layer, n in ((0, 1), (1, 5), (2, 6))]
    found = answer("lsn_mask", rows=rows, rich=[1, 2])
    assert found == "At least half of the new language's neurons are in layer 2. LSN-rich: layers 1 and 2."
    split = [row(value, layer=layer, measure="in_hub") for layer, value in enumerate((0, 1, 0))]
    found = answer("layers", [None, None, row(0.6, where="layer 2")], split)
    assert (
        found == "The hub is layer 1; the interface is layers 0 and 2. The assignment of layer 2 is the least stable."
    )


def test_of_methods_directions_and_layers_those_are_named_that_their_intervals_tell():
    of = {"lape": DOWN, "ap": UP}
    rows = [of[name] | {"measure": measure, "language": "gle_Latn", "condition": name} for name, measure in (
        ("ap", "reported/selectivity"), *((name, "reports/selectivity/selectivity") for name in of))]  # fmt: skip
    said = "the neurons of average precision are the most selective on half of the text, and on the other half "
    said = f"For the new language {said}"
    assert answer("lsn_methods", rows=rows) == f"{said}clearly ahead of all others."
    rows[1] |= {"ci_high": 0.9}
    assert answer("lsn_methods", rows=rows) == f"{said}not clearly ahead of all others."
    assert "no method finds neurons whose silencing harms the new language" in answer("lsn_methods", rows=rows[1:])
    assert answer("lsn_methods", rows=[row | {"measure": "selectivity/selectivity"} for row in rows[1:]]) == ""
    least = row(0.1, measure="agreement/jaccard", language="gle_Latn", condition="ap and gradient")
    shown = headlines.three(
        "lsn_methods", [least | {"result": "lsn_methods"}], claims.Study({"languages": {"target": "gle_Latn"}})
    )[2][1]
    assert shown["where"] == "average precision and gradient × activation"
    rows = [
        UP | {"measure": "beyond", "condition": "random", "step": 0},
        BOTH | {"measure": "beyond", "condition": "random"},
        DOWN | {"measure": "beyond", "condition": "prompt"},
    ]
    said = "The best direction beats random ones in the base and does not clearly beat random ones after CPT."
    assert answer("steering", rows=rows) == said
    rows[1] = UP | {"measure": "beyond", "condition": "random"}
    assert answer("steering", rows=rows) == "The best direction beats random ones in the base and after CPT."
    rows = [row(p, measure="divergence/p_value", layer=i) for i, p in enumerate((0.01, 0.3))]
    said = answer("routing", [UP, DOWN, None], rows)
    assert (
        said == "The languages are routed further apart than by chance in 1 of 2 layers, and on the whole less far "
        "apart than in the base."
    )


def test_what_a_claim_decides_is_told_by_its_number():
    def told(step, name, *numbers):
        return answer(step, [None] * 3, claims={name: {"numbers": list(numbers)}})

    assert told("heads", "D2", AGAINST).startswith("No: ") and told("heads", "D2", FOR).startswith("Yes: ")
    assert "not clear" in told("heads", "D2", OPEN) and told("heads", "D2", NONE) == "" == told("heads", "D1", FOR)
    assert told("layer_ablation", "C8", VAGUE) == "Cannot be judged: CPT made perception worse."
    row = AGAINST | {"name": "attention minus FFN, interface, loss"}
    assert "raises the loss less than its FFN" in told("attn_int_swap", "C5a", row)
    assert told("ffn_lsn_swap", "C5a", row) == ""


def test_answers_are_those_of_steps_that_ask():
    assert {*parts.answers.ANSWERS} <= {step.name for step in parts.steps()} and "steering" in parts.answers.ANSWERS


# ---------------------------------------------------------------- the page


def test_a_step_that_is_not_the_last_is_said_and_the_base_is_none(page):
    def spoil(results):
        (results / f"sentence-retrieval/eng_Latn-gle_Latn/run__checkpoint-{STEPS[-1]}.json").unlink()

    def best(text):
        return text[text.index("accuracy (published measure) at the best") : text.index("the same for an untrained")]

    assert "the run has" not in best(text_of(page()))
    assert f"step {STEPS[-2]}, but the run has {STEPS[-1]}" in best(text_of(page(spoil)))

    def keep_the_base(results):
        for step in STEPS:
            (results / f"sentence-retrieval/eng_Latn-gle_Latn/run__checkpoint-{step}.json").unlink(missing_ok=True)

    found = best(text_of(page(keep_the_base)))
    assert "at the best hidden state, last checkpoint none the same for the base 0." in found


def test_retrieval_between_other_languages_is_not_the_studys(page):
    def spoil(results):
        folder = results / "sentence-retrieval/eng_Latn-gle_Latn"
        other = shutil.copytree(folder, folder.with_name("eng_Latn-fra_Latn"))
        for file in other.glob("*.json"):
            whole = json.loads(file.read_text())
            whole["layer_accuracy"] = [[state, 0.98765] for state, _ in whole["layer_accuracy"]]
            whole["_header"] |= {"target_lang": "fra_Latn"}
            file.write_text(json.dumps(whole))

    assert "0.98" not in text_of(page(spoil))


def test_results_of_another_study_are_said(page, tmp_path):
    assert "Its base was" not in text_of(page())
    study = tmp_path / "study.yaml"
    study.write_text(re.sub(r"base: (?!eng)\S+", "base: elsewhere/base", study.read_text()))
    script.main(["--study", str(study)])
    text = text_of((tmp_path / "results/report.html").read_text())
    assert re.search(r"Its base was \S+/base, but the study's is elsewhere/base\.", text)


def test_results_of_another_seed_are_said(page):
    text = text_of(page(lambda results: None, "--seed", "8", "--overwrite"))
    assert "It was made with seed 3, but the study's is 8." in text
    assert "It was made with seed" not in text_of(page())


def test_the_gate_names_the_model_that_it_is_of(page):
    def spoil(results):
        for name in ("report/claims.json", "layer-specialize/layers.json"):
            whole = json.loads((results / name).read_text())
            whole["_header"]["gate"]["model"] = "run/checkpoint-30"
            (results / name).write_text(json.dumps(whole))

    assert "Passed: at its best layer run/checkpoint-30 finds more translations" in text_of(page(spoil))


def test_of_undecided_claims_those_without_numbers_are_counted():
    rows = [{"entries": [script.entry("", claim(*one, verdict=verdicts.OPEN), True)]} for one in ([OPEN], [], [NONE])]
    assert script.counted(rows) == "3 undecided, 2 of them for want of numbers"
    assert script.counted(rows[:1]) == "1 undecided"


def test_of_an_arm_the_numbers_are_its_own_and_do_not_repeat_its_name():
    row = dict.fromkeys(parts.numbers.COLUMNS) | {"measure": "layer_accuracy", "step": 9}
    rows = [row | {"run": run, "hidden_state": 2, "value": value} for run, value in (("half", 0.3), ("plain", 0.9))]
    made = claims.Study({"name": "x"})
    made.arm = "half"
    (_, best), *_ = headlines.three("retrieval", rows, made)
    assert (best["value"], best["where"]) == (0.3, "hidden state 2")


def test_only_seeds_of_one_study_have_a_mean(study):
    run = parts.Run(claims.Study.find(study.study))
    other = [copy.copy(run) for _ in range(2)]
    for seed, one in enumerate(other):
        one.study = claims.Study.find(study.study, seed)
    assert parts.of_seeds(other) and not parts.of_seeds([run])
    other[1].study.path = Path("another.yaml")
    assert not parts.of_seeds(other)


def test_a_result_of_no_model_says_when_it_was_made():
    assert (
        parts.rests({"time": "2026-11-30T07:46:50", "git_commit": "cb1ba921"}) == "Made 30 November 2026, code cb1ba92"
    )
    assert parts.rests({"seed": 1, "dtype": "float32"}) == "Rests on seed 1; dtype float32"


def test_the_page_says_what_was_asked_what_came_out_how_sure_and_where(page, study):
    made = page()
    text = text_of(made)
    for said in (
        "What changed inside it, and where?", "One run: no verdict on any claim.", "Gate. Passed: at its best layer",
        "English (eng_Latn), continued on Irish (gle_Latn)", "Where the numbers are",
    ):  # fmt: skip
        assert said in text, said
    for name, section, step in (("C2a", "I.4", "layer_swap"), ("D4", "IV.3", "rewind")):  # at the top, and by number
        assert made.count(f'Evidence: <a href="#{step}">{section}</a>') >= 2 and f'id="{name}"' in made
    assert text.count("In this run: ") > 8 and "These decide:" in text and "These decide nothing:" in text
    payload = json.loads((study.results / "report/claims.json").read_text())["claims"]
    for name, row in payload.items():
        assert headlines.capital(row["text"]) in text
        deciding = headlines.deciding(row["numbers"])
        assert headlines.in_digits(deciding["value"], deciding["ci_low"], deciding["ci_high"]) in text, name
    assert text.index("One run: no verdict") < text.index("Part I. ") < text.index("Part IV. ")
    for step in parts.steps():
        assert step.question in text
    assert "weight-diff/attn_vs_ffn.json" in text and 'href="weight-diff/attn_vs_ffn.json"' in made
    images = re.findall(r"<img [^>]*>", made)
    assert len(images) > 8 and all(re.search(r'alt="[^"]{20,}"', image) for image in images)
    links = re.findall(r'(?:src|href)="([^"]*)"', made)
    assert len(links) > 30 and all(link.startswith(("data:", "#")) or ":" not in link for link in links)
    assert "<script" not in made


def test_what_is_missing_leaves_a_sentence(page):
    def spoil(results):
        shutil.rmtree(results / "layer-swap")
        (results / "weight-diff/attn_vs_ffn.png").unlink()
        for image in results.glob("sentence-retrieval/*/*ffn_lsn_swap*.png"):
            image.unlink()

    text = text_of(page(spoil))
    swap = text[text.index("What is lost when hub layers") :]
    assert swap.index("Not measured in this study. This measures it: python layer-swap/layer-swap.py") < 150
    assert "--controls" in swap[:300]
    assert re.search(
        r"A figure is missing \(The mean absolute weight change of attention[^.]*[^.:]\); the command below", text
    )
    assert re.search(r"after its two component swaps\); sentence-retrieval/sr_experiment.py draws it\.", text)
    assert (
        "or those that change most? Not measured in this study. This measures it: python layer-ablation/cogsym.py"
        in text
    )


def test_where_no_command_could_measure_it_the_page_says_what_the_study_lacks(study, page):
    def lacking(step, **changes):
        run.study.values = values | changes
        return run.lacking(next(one for one in parts.steps() if one.name == step))

    run = parts.Run(claims.Study.find(study.study))
    values, trained = run.study.values, {"cpt": "cpt.yaml"}
    frozen, outer = {"hub": {"freeze": "hub"}}, {"outer": {"train_only": "outer:0.25"}}
    assert lacking("arms", arms=None) == (
        "Not measured in this study, whose file lacks arms and train.cpt (docs/study.md).", ""
    )  # fmt: skip
    assert lacking("arms", arms=frozen)[0].endswith("lacks train.cpt (docs/study.md).")  # a run that nobody trains here
    assert lacking("arms", arms=frozen, train=trained)[1].startswith("python cpt/compare_arms.py")
    assert "none of whose arms trains only a part" in lacking("runs", arms=frozen, train=trained)[0]
    assert lacking("runs", arms=outer, train=trained)[1].startswith("python layer-ablation/compare_runs.py")
    assert lacking("routing") == ("Not measured in this study, whose file lacks routing (docs/study.md).", "")
    assert lacking("routing", routing={})[1].startswith("python moe-routing/routing.py")
    first, second = lacking("compare", runs={"second": "runs/second"})[1].splitlines()
    assert first.startswith("make reproduce STUDY=") and first.endswith(" ARM=second") and "report/compare.py" in second
    run.study.arm = "second"
    assert lacking("arms", arms=frozen, train=trained)[0].endswith("the study's own run, not on second.")


def test_the_page_of_a_workflow_that_failed_says_so_first(page):
    def spoil(state):
        said = {"state": state, "failed": [{"step": "cogsym", "log": "logs/cogsym.log"}], "updated": "2026-11-30T10:00"}
        head = {"_header": {"schema": "status", "version": 1}}
        return lambda results: (results / "status.json").write_text(json.dumps(head | said))

    text = text_of(page(spoil("failed")))
    said = "Not all of it ran: on 30 November 2026 the workflow failed at cogsym ( logs/cogsym.log says why)."
    assert text.index("Gate.") < text.index(said) < text.index("One run: no verdict")
    assert "Not all of it ran" not in text_of(page(spoil("running")))


def test_samples_and_the_table_are_linked_where_they_are(page):
    def write(results):
        (results / "samples.html").write_text("texts")
        (results / "report/numbers.csv").write_text("numbers")

    assert 'href="samples.html"' not in page() and 'href="report/numbers.csv"' not in page()
    made = page(write)
    assert made.count('href="samples.html"') == 2 and 'href="report/numbers.csv"' in made


def test_losses_and_task_are_told_from_base_to_last_checkpoint(page):
    def spoil(results):
        head = {"schema": "language-loss", "version": 1, "heldout": {}}
        losses = {"base": {"nll_per_byte": 0.5}, str(STEPS[-1]): {"nll_per_byte": 0.25}}
        (results / "language-loss").mkdir(exist_ok=True)
        (results / "language-loss/language_loss.json").write_text(
            json.dumps({"_header": head, "eng_Latn": losses, "qaa_Latn": losses})
        )

    text = text_of(page(lambda results: shutil.rmtree(results / "downstream-correlation", True)))
    said = r"In short\. Base \u2192 last checkpoint: share of translations found, [a-z ]*, 0\.\d+ \u2192 0\.\d+\. Gate"
    assert re.search(said, text)  # of a study without losses and task
    text = text_of(page(spoil))
    assert (
        "loss (nats per byte) 0.500 \u2192 0.250 in English (eng_Latn), 0.500 \u2192 0.250 in invented (qaa_Latn)"
        in text
    )


def test_a_swap_that_was_made_and_not_measured_is_no_result(page):
    def spoil(results):
        file = results / "component-swap/attn_int_swap/controls.json"
        facts = {"_header": {"schema": "component-swap"}, "share": 0.1}
        file.with_name("metadata.json").write_text(json.dumps(facts))
        file.unlink()

    text = text_of(page(spoil))
    assert "more than with the FFN? Not measured in this study. This measures it: python component-swap/attn" in text


def test_results_that_are_newer_than_the_claims_or_of_another_model_are_said(page):
    def spoil(results):
        file = results / "weight-diff/attn_vs_ffn.json"
        whole = json.loads(file.read_text())
        whole["_header"] |= {"time": "2999-01-01T00:00:00+00:00"}
        whole["_header"]["models"]["base"]["weights_sample"] = "0" * 16
        file.write_text(json.dumps(whole))

    text = text_of(page())
    assert "results are newer" not in text and "About another model" not in text
    text = text_of(page(spoil))
    assert "some results are newer than the claims; run report/claims.py again." in text
    assert "About another model than the claims: " in text and "made 1 January 2999" in text


def test_without_claims_the_page_is_still_made(page):
    text = text_of(page(lambda results: shutil.rmtree(results / "report")))
    assert "The claims have not been judged yet. This does it: python report/claims.py" in text


def test_a_rerun_gives_the_same_bytes_and_another_page_is_kept(page, tmp_path):
    assert page() == page()
    (tmp_path / "results/report.html").write_text("mine")
    with pytest.raises(InputError, match=r"report.html was not made by this script; give --overwrite"):
        page()
    assert (tmp_path / "results/report.html").read_text() == "mine"
    page(lambda results: None, "--overwrite")


@pytest.mark.parametrize("name, content, match", [
    ("weight-diff/int_and_sem.json", b'{"_header": ', r"int_and_sem.json is not valid JSON"),
    ("weight-diff/int_and_sem.png", b"\x89PNG\r\n\x1a\n", r"int_and_sem.png is not a complete PNG image .*; run the"),
])  # fmt: skip
def test_a_damaged_result_is_one_error(page, tmp_path, name, content, match):
    with pytest.raises(InputError, match=match):
        page(lambda results: (results / name).write_bytes(content))
    assert not (tmp_path / "results/report.html").exists()


@pytest.mark.parametrize("name, change, match", [
    ("report/claims.json", lambda whole: whole["claims"]["C1"].pop("numbers"), r"claims.json .*KeyError: 'numbers'"),
    ("report/claims.json", lambda whole: whole["claims"]["C3"].pop("p_value"), r"claims.json .*KeyError: 'p_value'"),
    ("weight-diff/int_and_sem.json", lambda whole: whole["_header"].update(time=5), r"int_and_sem.json is not as"),
    ("weight-diff/int_and_sem.json", lambda whole: whole["_header"]["models"].update(checkpoints={"x": 1}),
     r"int_and_sem.json is not as its step writes it .*; run that step again"),
])  # fmt: skip
def test_a_result_that_lacks_something_is_one_error(page, tmp_path, name, change, match):
    def spoil(results):
        whole = json.loads((results / name).read_text())
        change(whole)
        (results / name).write_text(json.dumps(whole))

    with pytest.raises(InputError, match=match):
        page(spoil)
    assert not (tmp_path / "results/report.html").exists()


def test_the_gate_that_was_not_passed_is_told_once(page):
    reason = "run/checkpoint-9 does not retrieve clearly better than its untrained twin"

    def spoil(results):
        file = results / "report/claims.json"
        whole = json.loads(file.read_text())
        for claim in whole["claims"].values():
            claim |= {"verdict": script.verdicts.VOID, "reason": reason}
        file.write_text(json.dumps(whole))

    text = text_of(page(spoil))
    assert reason not in text and "The gate, at the top of the page, was not passed." in text


def test_claims_that_say_nothing_are_not_judged_yet(page):
    def spoil(results):
        file = results / "report/claims.json"
        file.write_text(
            json.dumps({key: said for key, said in json.loads(file.read_text()).items() if key != "claims"})
        )

    assert "The claims have not been judged yet." in text_of(page(spoil))


def test_results_that_are_not_there_are_one_error(tmp_path):
    (tmp_path / "study.yaml").write_text("name: x\nresults: nowhere\n")
    with pytest.raises(InputError, match=r"nowhere does not exist: run the steps of the README on .*study.yaml first"):
        script.main(["--study", str(tmp_path / "study.yaml")])


def test_several_seeds_stand_side_by_side(tmp_path):
    for seed in (1, 2, 3):
        made = MadeUp(tmp_path, seed=seed)
        made.retrieval()
        made.layers()
        made.weights()
    command = ["--study", str(made.study), "--seeds", "1,2,3", "--output", str(tmp_path / "out")]
    script.main(command)
    text = text_of((tmp_path / "out/report.html").read_text())
    assert "No verdict on any claim." in text and "Seeds 1, 2, 3" in text and "Passed in" in text
    assert "mean over seeds [95 %] seed 1 seed 2 seed 3" in text
    for seed in (1, 2, 3):  # judged one by one long ago, and together since
        claims.main([*command[:2], "--seed", str(seed)])
        for step, year in (("claims", 2000), ("attn_vs_ffn", 2001)):
            file = claims.Study.find(made.study, seed).result(step)
            whole = json.loads(file.read_text())
            whole["_header"]["time"] = f"{year}-01-01T00:00:00+00:00"
            file.write_text(json.dumps(whole))
    claims.main(command)
    script.main(command)
    text = text_of((tmp_path / "out/report.html").read_text())
    assert "3 seeds: no verdict on any claim. A verdict takes 5" in text and "newer than the claims" not in text
    with pytest.raises(InputError, match=r"claims_seeds.json is over seeds \[1, 2, 3\]; run report/claims.py --seeds"):
        script.main([*command[:3], "1,2", *command[4:]])
    with pytest.raises(InputError, match="give --output FOLDER"):
        script.main(command[:4])


# ---------------------------------------------------------------- in a browser

browser = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here (Debian: apt install chromium)")
# Frames of these widths and heights; of each what is on its first screen, and what sticks out.
LOOK = """<script>
function look(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, style = e => view.getComputedStyle(e);
  const box = e => e.getBoundingClientRect(), body = style(page.body);
  const seen = e => box(e).top >= 0 && box(e).bottom <= view.innerHeight && box(e).height > 0;
  return {
    claims: [...page.querySelectorAll(".claims tbody tr")].filter(seen).map(e => e.innerText),
    sure: seen([...page.querySelectorAll("strong")].find(e => e.innerText.includes("verdict"))),
    scrolls: page.documentElement.scrollWidth > view.innerWidth, back: body.backgroundColor, ink: body.color,
    nav: style(page.querySelector("nav")).position, whole: [...page.images].every(e => e.complete && e.naturalWidth),
    heights: [...page.images].map(e => box(e).height),
    kept: [...page.querySelectorAll("figure")].every(e => style(e).breakInside === "avoid") };
}
addEventListener("load", () => {
  const found = JSON.stringify([...document.querySelectorAll("iframe")].map(look));
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = found;
});
</script>"""


def chromium(tmp_path, *arguments):
    command = [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def looked_at(tmp_path, pages, *flags):
    """What a browser shows of (page, width, height) each."""
    frame = '<iframe srcdoc="{}" style="width:{}px;height:{}px;border:0"></iframe>'
    file = tmp_path / "look.html"
    frames = "".join(frame.format(html.escape(page), width, height) for page, width, height in pages)
    file.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{frames}{LOOK}")
    done = chromium(tmp_path, *flags, "--enable-logging=stderr", "--dump-dom", f"file://{file}")
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)[1]))


def lightness(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


@browser
def test_a_browser_shows_the_claims_first_on_a_screen_and_on_a_phone(page, tmp_path):
    made = page()
    printed = made.replace("@media print", "@media all")
    screen, phone, paper = looked_at(tmp_path, [(made, 1280, 800), (made, 390, 844), (printed, 680, 1000)])
    assert len(screen["claims"]) >= 4 and screen["claims"][0].startswith("C1") and screen["nav"] == "sticky"
    assert phone["claims"][0].startswith("C1") and phone["nav"] == "sticky"
    for view in (screen, phone):
        assert view["sure"] and not view["scrolls"] and lightness(view["back"]) > 240 and lightness(view["ink"]) < 60
        assert view["heights"] and view["whole"]
    # On A4 within its margins, 297 - 32 mm at 96 to the inch, no figure is higher than a page, or cut in two.
    assert max(paper["heights"]) <= 265 / 25.4 * 96 and paper["kept"]
    (dark,) = looked_at(tmp_path, [(made, 1280, 800)], "--blink-settings=preferredColorScheme=0")
    assert lightness(dark["back"]) < 60 and lightness(dark["ink"]) > 190 and len(dark["claims"]) >= 4


@browser
def test_it_prints_on_a4(page, tmp_path):
    page()
    chromium(
        tmp_path,
        "--no-pdf-header-footer",
        f"--print-to-pdf={tmp_path / 'page.pdf'}",
        f"file://{tmp_path}/results/report.html",
    )
    boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", (tmp_path / "page.pdf").read_bytes())
    assert boxes and all((round(float(w)), round(float(h))) == (595, 842) for w, h in boxes)


def test_the_workflow_and_make_end_with_it():
    workflow = (cli.REPOSITORY / "workflow/Snakefile").read_text()
    assert workflow.rindex("\nrule ") == workflow.index("\nrule page:")
    assert "$(REPORT)" in (cli.REPOSITORY / "Makefile").read_text().split("== done; the report:")[1].splitlines()[0]
