"""lsn/compare_methods.py: numbers against plain loops, the winner's rule, base against checkpoint, refusals; and
lsn/deactivate.py on the masks of other methods."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from helpers import load_script
from test_deactivate import OWN, records_of, study  # noqa: F401

from cpt_utils.base import cli, results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.measures import masks

script = load_script("lsn/compare_methods.py")
deactivate = load_script("lsn/deactivate.py")
rows = cli.sibling("report/rows.py")
LANGS = ("en", "ga", "sw")
# What silencing a language's neurons does to each language, by method.
HARM = {
    "lape": {"en": {"en": 0.2, "ga": 0.1}, "ga": {"ga": 0.3}, "sw": {"sw": 0.1, "en": 0.1}},
    "ternary": {"en": {"en": 0.9}, "ga": {"ga": -0.2, "en": -0.9}, "sw": {"sw": 0.1, "en": 0.2}},
    "ap": {"en": {"en": 0.25}, "ga": {"ga": 0.2}, "sw": {}},
}


def write(method: str, seed: int, tag: str = "demo", langs=LANGS, **facts) -> dict:
    """A drawn mask of a method, its report, and the made-up result of silencing it; the mask."""
    draw = random.Random(seed)
    mask = {lang: {layer: sorted(draw.sample(range(48), 6)) for layer in range(3)} for lang in langs}
    path = masks.of_method(Path(f"results/lsn/result/{tag}.json"), method)
    head = {"models": {"model": refs.model("run/checkpoint-30").describe()}, "n_layers": 3, "ffn_width": 48}
    head |= {"languages": {lang: lang for lang in LANGS}} | facts
    masks.write(path, mask, **head)
    halves = {"jaccard": 0.5, "languages": dict.fromkeys(LANGS, 0.1 * seed)}
    report = {"n_neurons": 144, "convergence": {"halves": halves} if method != "lape" else None}
    if method == "ternary":
        report |= {"classes": {"specific": seed, "related": 1, "without": 2, "general": 3}}
        report |= {"by_n": [[seed, 1, 0, 0]] * 3, "classes_by_layer": {"general": [seed, 0, 1]}}
    results.write_json(path.with_suffix(".report.json"), report, results.header("lsn-report", **head))
    if tag == "demo":
        changes = {d: dict.fromkeys(LANGS, 0.0) | HARM[method][d] for d in LANGS}
        records = records_of(changes)
        payload = deactivate.summarize(records, list(LANGS), 0) | {"activity": None}
        payload["halves"] = deactivate.halves(records, list(LANGS), 0)
        about = {"request": {"masks": mask}, "models": head["models"]}
        place = masks.of_method(Path("results/lsn/deactivate.json"), method)
        results.write_json(place, payload, results.header("deactivation", **about))
    return mask


@pytest.fixture
def compared(study):  # noqa: F811
    text = (study / "study.yaml").read_text()
    (study / "study.yaml").write_text(text + "lsn: {methods: [ternary, ap]}\n")
    return {method: write(method, seed) for seed, method in enumerate(HARM, 3)}


@pytest.mark.figures
def test_numbers_are_those_of_plain_loops(compared, capsys):
    base = refs.model("run/checkpoint-30").model_id
    before = write("ternary", 9, tag=f"demo.{base}")
    script.main([])
    found, head = results.read_json("results/lsn/methods.json", "lsn-methods")
    assert found["methods"] == list(HARM) and found["languages"] == list(LANGS)
    for lang in LANGS:
        for pair, row in found["agreement"][lang].items():
            a, b = ({(i, n) for i, own in compared[name][lang].items() for n in own} for name in pair.split(" and "))
            assert (row["shared"], row["jaccard"]) == (len(a & b), len(a & b) / len(a | b))
            draw, drawn = random.Random(0), []
            for _ in range(400):
                c, d = ({(i, n) for i in range(3) for n in draw.sample(range(48), 6)} for _ in range(2))
                drawn.append(len(c & d) / len(c | d))
            assert row["chance"] == pytest.approx(sum(drawn) / len(drawn), abs=0.01)
        for name in HARM:
            assert found["neurons"][name][lang] == 18 and found["by_layer"][name][lang] == [6, 6, 6]
            changes = [HARM[name][lang].get(e, 0.0) for e in LANGS if e != lang]
            assert found["others"][name][lang] == pytest.approx(sum(changes) / 2)
            assert found["diagonal"][name][lang]["harm"] == pytest.approx(HARM[name][lang].get(lang, 0.0))
            assert found["controls"][name][lang] == pytest.approx(0)
    assert found["stability"] == {
        "lape": None,
        **{m: dict.fromkeys(LANGS, 0.1 * s) for m, s in (("ternary", 4), ("ap", 5))},
    }
    # ga is better without the ternary neurons, however selective they are; sw has harmful neurons of LAPE and ternary.
    winners = {lang: row["method"] for lang, row in found["best"].items()}
    assert winners == {"en": "ternary", "ga": "lape", "sw": "lape", "overall": "lape"}
    assert found["best"]["en"]["clear"] and found["selectivity"]["ternary"]["ga"]["selectivity"] > 0.2
    changed = found["base"]["ternary"]["languages"]["ga"]
    now, then = ({(i, n) for i, own in one["ga"].items() for n in own} for one in (compared["ternary"], before))
    assert changed["jaccard"] == len(now & then) / len(now | then) and changed["change"] == [0, 0, 0]
    assert found["base"]["ternary"]["change_by_n"] == [[4 - 9, 0, 0, 0]] * 3
    assert found["base"]["ternary"]["change_of_general"] == [4 - 9, 0, 0] and list(found["base"]) == ["ternary"]
    assert head["models"]["model"]["spec"] == "run/checkpoint-30"
    said = capsys.readouterr().out
    assert "en: ternary, selectivity +0.9000" in said and "clearly above all others" in said
    table = Path("results/lsn/methods.md").read_text()
    assert "| ga | average precision | 18 | 0.50 | +0.2000 [" in table and "| en | lape and ap |" in table
    assert Path("results/lsn/methods.png").stat().st_size > 2000
    script.main([])
    assert "methods.json is finished" in capsys.readouterr().out


def test_every_number_is_a_row_of_its_own(compared):
    write("ternary", 9, tag=f"demo.{refs.model('run/checkpoint-30').model_id}")
    script.main([])
    table = list(rows.of_file(*results.read_json("results/lsn/methods.json")))
    names = [tuple(str(row.get(key)) for key in ("measure", "condition", "language", "layer")) for row in table]
    assert len(set(names)) == len(names)
    of = {name: row["value"] for name, row in zip(names, table, strict=True)}
    assert of["selectivity/selectivity", "ternary", "en", "None"] == pytest.approx(0.9)
    assert of["neurons", "ap", "ga", "1"] == 6 and of["neurons", "ap", "ga", "None"] == 18
    assert of["others", "lape", "sw", "None"] == pytest.approx(0.05)
    assert 0 < of["agreement/jaccard", "lape and ap", "ga", "None"] < 1
    assert of["base/languages/ga/jaccard", "ternary", "None", "None"] >= 0


def test_all_languages_together_have_a_winner_where_each_is_hurt(compared, capsys, monkeypatch):
    for method in HARM:
        monkeypatch.setitem(HARM[method], "sw", {"sw": -0.1})
    for seed, method in enumerate(HARM, 3):
        write(method, seed)
    script.main([])
    said = capsys.readouterr().out
    assert "all languages together: no method's neurons hurt every language when they are silenced" in said
    assert "sw: no method's neurons hurt it" in said


KEYS = ("selectivity", "ci_low", "ci_high", "meaningful", "n_active", "p_value_active")


@pytest.mark.parametrize(
    "rows_of, expected",
    [
        ({"a": (0.1, 0.05, 0.15, True, 19, 0.05), "b": (0.3, 0.2, 0.4, True, 19, 0.3)}, ("b", True, False)),
        ({"a": (0.1, 0.05, 0.25, True, 19, 0.05), "b": (0.3, 0.2, 0.4, True, 19, 0.05)}, ("b", False, True)),
        ({"a": (0.1, 0.05, 0.15, True, 18, 0.05), "b": (0.3, 0.2, 0.4, False, 19, 0.05)}, ("a", False, None)),
        ({"a": (0.1, 0.05, 0.15, False, 19, 0.05)}, (None, False, None)),
    ],
)  # fmt: skip
def test_the_winner_hurts_its_own_language(rows_of, expected):
    rows = {name: dict(zip(KEYS, row, strict=True)) for name, row in rows_of.items()}
    found = script.best(rows, rows)
    assert (found["method"], found["clear"], found["beyond_active"]) == expected


def test_a_winner_that_harms_on_the_text_that_chose_it_alone_is_not_clear():
    rows = dict(zip(KEYS, (0.3, 0.2, 0.4, True, 19, 0.05), strict=True))
    found = script.best({"a": rows}, {"a": rows | {"meaningful": False, "p_value_active": 0.5}})
    assert (found["method"], found["clear"], found["beyond_active"]) == ("a", False, False)


def test_the_winner_is_told_on_documents_that_did_not_choose_it(compared, capsys):
    """ap is the best on the documents 0, 2, .. alone; whatever it does to 1, 3, .. chooses nothing."""
    changes = {d: dict.fromkeys(LANGS, 0.0) | HARM["ap"][d] for d in LANGS}
    file, every = Path("results/lsn/deactivate.ap.json"), []
    for odd in (0.0, 5.0):
        records = records_of(changes)
        own = next(one for one in records if one["name"] == "en")["losses"]["en"]["nll"]
        own[:] = [nll + (odd if i % 2 else 2.0) for i, nll in enumerate(own)]
        content = json.loads(file.read_text()) | deactivate.summarize(records, list(LANGS), 0)
        file.write_text(json.dumps(content | {"halves": deactivate.halves(records, list(LANGS), 0)}))
        script.main(["--overwrite"])
        every.append(results.read_json("results/lsn/methods.json")[0])
        means = [sum(one["losses"]["en"]["nll"][1::2]) / 10 for one in records if one["name"] in ("none", "en")]
        reported = every[-1]["best"]["en"]["reported"]["ap"]
        others = sum(sum(records[1]["losses"][e]["nll"][1::2]) - sum(records[0]["losses"][e]["nll"][1::2])
                     for e in ("ga", "sw")) / 20  # fmt: skip
        assert reported["selectivity"] == pytest.approx(means[1] - means[0] - others)
        assert every[-1]["halves"]["ap"]["reports"]["selectivity"]["en"] == reported
    assert [one["best"]["en"]["method"] for one in every] == ["ap", "ap"]
    assert [one["best"]["en"]["clear"] for one in every] == [False, True]  # ternary: .9 there, ap .25 and 5.25
    assert "en: average precision, selectivity +0.2500" in capsys.readouterr().out
    first, second = (one["halves"]["ap"]["chooses"] for one in every)
    assert first == second
    table = list(rows.of_file(*results.read_json("results/lsn/methods.json")))
    found = {(row["measure"], row.get("condition"), row.get("language")): row["value"] for row in table}
    assert found["reported/selectivity", "ap", "en"] == found["reports/selectivity/selectivity", "ap", "en"] > 5


def test_results_without_halves_choose_on_all_documents_and_say_so(compared, capsys):
    file = Path("results/lsn/deactivate.ap.json")
    content = json.loads(file.read_text())
    del content["halves"]  # of an earlier version
    file.write_text(json.dumps(content))
    script.main([])
    said = capsys.readouterr().err
    assert "deactivate.ap.json: no halves of the documents" in said and "reported on, which flatters it" in said
    found, _ = results.read_json("results/lsn/methods.json")
    assert found["best"]["en"]["reported"] == {"ternary": found["selectivity"]["ternary"]["en"]}
    assert found["halves"] is None
    single = [{"name": name, "lang": lang, "number": number,
               "losses": {e: {"nll": [1.0] * n, "tokens": [1] * n} for e, n in (("en", 2), ("ga", 1))}}
              for name, lang, number in (("none", None, None), ("en", "en", None), ("random", "en", 0))]  # fmt: skip
    assert deactivate.halves(single, ["en", "ga"], 0) is None


def test_without_the_key_those_that_were_measured_are_compared(compared, study):  # noqa: F811
    text = (study / "study.yaml").read_text()
    (study / "study.yaml").write_text(text.replace("lsn: {methods: [ternary, ap]}\n", ""))
    script.main(["-o", "out.json"])
    assert results.read_json("out.json", "lsn-methods")[0]["methods"] == list(HARM)


def test_what_does_not_go_together_is_refused(compared, study):  # noqa: F811
    def fails(message: str, *argv: str) -> None:
        with pytest.raises(InputError, match=message):
            script.main([*argv, "-o", "out.json"])
        assert not Path("out.json").exists()

    fails("one method has no other to be compared with", "--masks", "ap=results/lsn/result/demo.ap.json")
    fails("--masks ap: give METHOD=FILE", "--masks", "ap")
    path = Path("results/lsn/deactivate.ap.json")
    kept = path.read_text()

    def change(**facts):
        content = json.loads(kept)
        path.write_text(json.dumps(content | facts))

    change(documents=dict.fromkeys(LANGS, 3))
    fails("deactivate.json and .*deactivate.ap.json were measured on different text; run lsn/deactivate.py again")
    change(languages=["en", "ga"])
    fails("are of different languages; test all methods on the same")
    for key in ("meaningful", "n_active"):  # results of an earlier version
        change(overall={name: value for name, value in json.loads(kept)["overall"].items() if name != key})
        fails("deactivate.ap.json does not say whether a language itself is hurt.*run lsn/deactivate.py again")
    elsewhere = {"spec": "run/checkpoint-20", "model_id": "run__checkpoint-20", "revision": None}
    change(_header=json.loads(kept)["_header"] | {"models": {"model": elsewhere}})
    fails("deactivate.json is of run/checkpoint-30, .*deactivate.ap.json of run/checkpoint-20: not one model")
    path.write_text(kept)
    other = {"spec": "org/other", "model_id": "org__other", "revision": "c"}
    write("ap", 5, models={"model": other})
    fails("demo.json is of run/checkpoint-30, .*demo.ap.json of org/other: not one model")
    write("ap", 6)
    path.write_text(kept)
    fails(r"deactivate.ap.json is about other neurons of en than .*demo.ap.json has now; run lsn/deactivate.py with")
    path.unlink()
    fails(r"deactivate.ap.json does not exist; run lsn/deactivate.py --method ap first, or give --deactivations")


def test_a_mask_of_another_base_is_refused(compared, study):  # noqa: F811
    tag = f"demo.{refs.model('run/checkpoint-30').model_id}"

    def fails(message: str) -> None:
        with pytest.raises(InputError, match=message):
            script.main(["-o", "out.json"])
        assert not Path("out.json").exists()

    old = {"spec": "run/checkpoint-30", "model_id": "run__checkpoint-30", "revision": None, "weights_sample": "0"}
    write("ternary", 9, tag=tag, models={"model": old})
    fails(rf"{tag}.ternary.json is of run/checkpoint-30, which was trained again since or is not the study's base")
    write("ternary", 9, tag=tag, ffn_width=64)
    fails(rf"{tag}.ternary.json has other layers or widths than .*demo.ternary.json: it is of no base of that model")
    write("ternary", 9, tag=tag, langs=LANGS[:2])
    fails(rf"{tag}.ternary.json and .*demo.ternary.json are of different languages; identify both with the same -l")


def test_deactivation_of_another_methods_mask_lies_beside_that_of_lape(study, capsys):  # noqa: F811
    with pytest.raises(InputError, match=r"demo.ap.json does not exist; run lsn/identify.py --method ap first"):
        deactivate.main(["--random", "5", "--method", "ap"])
    facts = {"models": {"model": refs.model("run/checkpoint-30").describe()}, "n_layers": 3, "ffn_width": 48}
    masks.write("results/lsn/result/demo.ap.json", OWN | {"sw": {0: [20], 1: [], 2: []}}, **facts)
    deactivate.main(["--random", "5", "--method", "ap"])
    deactivate.main(["--random", "5"])
    made = {name: results.read_json(f"results/lsn/{name}.json")[0] for name in ("deactivate", "deactivate.ap")}
    assert [one["n_neurons"]["sw"] for one in made.values()] == [0, 1]
    assert made["deactivate"]["matrix"]["en"] == made["deactivate.ap"]["matrix"]["en"]
