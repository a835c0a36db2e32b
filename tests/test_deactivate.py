"""lsn/deactivate.py: the matrix against a slow loop, disjoint texts, random sets, selectivity, going on, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers import killed, load_script, same_results, save_tiny, tiny_tokenizer
from launch import launch

from cpt_utils.architectures import archs
from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.measures import masks, tokenids
from cpt_utils.models import loading

SCRIPT = load_script("lsn/deactivate.py")
OVERLAP = load_script("lsn/heldout_overlap.py")
OWN = {"en": {0: [3, 4], 1: [], 2: [9]}, "ga": {0: [1, 7], 1: [2], 2: []}, "sw": {0: [], 1: [], 2: []}}
TEXTS = {
    "en": [f"the {a} number {n} walks over the hill" for n, a in enumerate(("red", "old", "sad", "big", "shy"))],
    "ga": [f"siúlann an {a} uimhir {n} thar an gcnoc" for n, a in enumerate(("dearg", "sean", "mór", "beag"))],
    "sw": [f"nambari {n} ya {a} inatembea juu ya kilima" for n, a in enumerate(("zamani", "kubwa", "ndogo"))],
}


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny("llama", "run/checkpoint-30", seed=1)
    heldout = "".join(f"    {lang}: heldout/{lang}.txt\n" for lang in TEXTS)
    (tmp_path / "study.yaml").write_text(
        "name: demo\nbase: run/checkpoint-30\nrun: run\ntokens: tokens\nresults: results\n"
        f"languages: {{base: en, target: ga, lsn: [en, ga, sw]}}\ndata:\n  heldout:\n{heldout}"
    )
    facts = {"models": {"model": refs.model("run/checkpoint-30").describe()}, "n_layers": 3, "ffn_width": 48}
    masks.write("results/lsn/result/demo.json", OWN, **facts)
    tokenizer = tiny_tokenizer()
    (tmp_path / "heldout").mkdir()
    for lang, lines in TEXTS.items():
        (tmp_path / f"heldout/{lang}.txt").write_text("\n".join(lines) + "\n")
        ids = tokenizer(f"other text in {lang}, of which nothing is held out. " * 9, add_special_tokens=False)
        tokens = torch.tensor(ids["input_ids"], dtype=torch.int32)
        tokenids.write(f"tokens/{tokenids.file_name(lang, 'demo')}", tokens, {}, results.header("token-ids"))
    return tmp_path


def slow_nll(lang: str, mask: dict) -> float:
    """Mean NLL per token with the neurons' columns of the down projections set to zero."""
    model = loading.load_model(refs.model("run/checkpoint-30"), torch.float64, torch.device("cpu"))
    arch, tokenizer = archs.for_config(model.config), tiny_tokenizer()
    for layer, neurons in mask.items():
        arch.module(model, layer, "down_proj").weight.data[:, neurons] = 0
    total, tokens = 0.0, 0
    for line in TEXTS[lang]:
        ids = torch.tensor([tokenizer(line)["input_ids"]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total -= logprobs.gather(1, ids[0, 1:, None]).sum().item()
        tokens += ids.shape[1] - 1
    return total / tokens


def test_matrix_selectivity_and_random_sets(study, capsys):
    SCRIPT.main(["--random", "5", "--dtype", "float64", "--batch-size", "2"])
    found, head = results.read_json("results/lsn/deactivate.json", "deactivation")
    assert "no neuron of sw" in capsys.readouterr().err
    assert list(found["matrix"]) == ["en", "ga"] and found["n_neurons"] == {"en": 3, "ga": 3, "sw": 0}
    plain = {lang: slow_nll(lang, {}) for lang in TEXTS}
    for lang in TEXTS:
        assert found["unmasked"][lang] == pytest.approx(plain[lang], rel=1e-10)
        for d in ("en", "ga"):
            change = slow_nll(lang, OWN[d]) - plain[lang]
            assert found["matrix"][d][lang] == pytest.approx(change, abs=1e-10)
    row = found["matrix"]["ga"]
    own = found["selectivity"]["ga"]
    assert own["selectivity"] == pytest.approx(row["ga"] - (row["en"] + row["sw"]) / 2)
    assert own["ci_low"] <= own["selectivity"] <= own["ci_high"] and own["n_random"] == 5
    for number, random_row in enumerate(found["random"]["en"]):
        control = masks.random_control(OWN, 3, 48, seed=f"42/{number}")["en"]
        assert random_row["ga"] == pytest.approx(slow_nll("ga", control) - plain["ga"], abs=1e-10)
        assert {layer: len(chosen) for layer, chosen in control.items()} == {0: 2, 1: 0, 2: 1}
    chance = [r["en"] - (r["ga"] + r["sw"]) / 2 for r in found["random"]["en"]]
    mine = found["selectivity"]["en"]["selectivity"]
    assert found["selectivity"]["en"]["p_value"] == (1 + sum(c >= mine for c in chance)) / 6
    assert head["seed"] == 42 and (study / "results/lsn/deactivate.png").is_file()
    SCRIPT.main(["--random", "5", "--dtype", "float64", "--batch-size", "2"])
    assert "is finished" in capsys.readouterr().out
    SCRIPT.main(
        ["--run", "run", "--base", "run/checkpoint-30", "--random", "5", "--dtype", "float64", "--batch-size", "2"]
    )
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(InputError, match="another request"):
        SCRIPT.main(["--random", "6", "--dtype", "float64"])


def write_counts(folder, lang: str, over_zero: torch.Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    results.write_tensors(folder / f"demo.{lang}.pt", {"n": 1000, "over_zero": over_zero})


def test_sets_of_equal_activity_stand_beside_the_random_ones(study, capsys):
    """The masked neurons fire on 90 % of the tokens, eight others in each layer, too, the rest hardly ever."""
    SCRIPT.main(["--random", "5", "--dtype", "float64", "--batch-size", "2", "-o", "without.json"])
    without, _ = results.read_json("without.json")
    assert without["active"] is None and without["activity"] is None
    assert without["selectivity"]["en"]["p_value_active"] is None
    assert "no random sets of equal activity; run lsn/activation.py" in capsys.readouterr().err
    over_zero = torch.full((3, 48), 10)
    for neurons in OWN.values():
        for layer, chosen in neurons.items():
            over_zero[layer, chosen] = 900
    over_zero[:, 30:38] = torch.arange(890, 898)
    for lang in ("en", "ga"):
        write_counts(study / "results/lsn/activation_count", lang, over_zero)
    for payload in (without, {key: value for key, value in without.items() if key != "active"}):
        results.write_json("without.json", payload, results.header("deactivation"))
        with pytest.raises(InputError, match=r"without.json has no random sets of equal activity: .* --overwrite"):
            SCRIPT.main(["--random", "5", "--dtype", "float64", "-o", "without.json"])
    SCRIPT.main(["--random", "5", "--dtype", "float64", "--batch-size", "2"])
    found, _ = results.read_json("results/lsn/deactivate.json")
    new = ("active", "activity", "diagonal", "selectivity", "overall", "halves")
    assert {key: value for key, value in found.items() if key not in new} == {
        key: value for key, value in without.items() if key not in new
    }
    plain = slow_nll("ga", {})
    for number, row in enumerate(found["active"]["en"]):
        control = masks.active_control(OWN, "en", over_zero.numpy() / 1000, 48, seed=f"42/{number}")
        assert {layer: len(chosen) for layer, chosen in control.items()} == {0: 2, 1: 0, 2: 1}
        assert {neuron for chosen in control.values() for neuron in chosen} <= set(range(30, 38))
        assert row["ga"] == pytest.approx(slow_nll("ga", control) - plain, abs=1e-10)
    chance = [r["en"] - (r["ga"] + r["sw"]) / 2 for r in found["active"]["en"]]
    mine = found["selectivity"]["en"]
    assert mine["p_value_active"] == (1 + sum(c >= mine["selectivity"] for c in chance)) / 6 and mine["n_active"] == 5
    assert found["activity"]["en"]["own"] == pytest.approx(0.9) and found["activity"]["en"]["active"] > 0.88
    assert found["activity"]["en"]["random"] < 0.5
    assert "equally active ones on 89%" in capsys.readouterr().out
    write_counts(study / "results/lsn/activation_count", "en", over_zero[:, :40])
    with pytest.raises(InputError, match=r"demo.en.pt counts neurons of another model"):
        SCRIPT.main(["--random", "5", "-o", "other.json"])
    with pytest.raises(InputError, match=r"nowhere lacks the counts demo.en.pt; give -a the folder"):
        SCRIPT.main(["--random", "5", "-a", "nowhere"])


def test_counts_that_a_mask_was_not_made_from_are_refused(study):
    path = study / "results/lsn/result/demo.json"
    content = json.loads(path.read_text())
    content["_header"]["tokens"] = {lang: {"counts": f"demo.{lang}.pt", "counts_sha256": "0" * 16} for lang in OWN}
    path.write_text(json.dumps(content))
    for lang in OWN:
        write_counts(study / "results/lsn/activation_count", lang, torch.ones(3, 48, dtype=torch.long))
    with pytest.raises(InputError, match=r"demo.en.pt is not what .*demo.json was made from; run lsn/identify.py"):
        SCRIPT.main(["--random", "5"])


def records_of(changes: dict[str, dict[str, float]]) -> list[dict]:
    """Records in which silencing d changes the loss of 20 documents of e by changes[d][e], give or take .01."""
    spread = [0.01 * (-1) ** i for i in range(20)]

    def losses(row: dict[str, float]) -> dict:
        return {e: {"nll": [2 + row.get(e, 0.0) + s for s in spread], "tokens": [1] * 20} for e in changes}

    noisy = {d: losses(row) for d, row in changes.items()}
    for row in noisy.values():
        for one in row.values():
            one["nll"] = [nll + 0.02 * (i % 4 - 1.5) for i, nll in enumerate(one["nll"])]
    found = [{"name": "none", "lang": None, "number": None, "losses": losses({})}]
    found += [{"name": d, "lang": d, "number": None, "losses": row} for d, row in noisy.items()]
    for kind in ("random", "active"):
        found += [{"name": kind, "lang": d, "number": n, "losses": losses({})} for n in range(5) for d in changes]
    return found


def test_selectivity_means_nothing_where_the_language_itself_is_not_hurt(tmp_path, capsys):
    """A language that stays as it was while the others improve is selective by the number, and so is one that improves
    less than they do."""
    changes = {
        "aa": {"aa": 0.2, "bb": 0.0, "cc": 0.0},
        "bb": {"aa": -0.2, "bb": 0.0, "cc": -0.2},
        "cc": {"aa": -0.3, "bb": -0.3, "cc": -0.1},
    }
    found = SCRIPT.summarize(records_of(changes), list(changes), 0)
    assert [row["verdict"] for row in found["diagonal"].values()] == ["harm", "none", "reverse"]
    assert all(row["selectivity"] > 0.15 and row["p_value"] < 0.2 for row in found["selectivity"].values())
    assert [row["meaningful"] for row in found["selectivity"].values()] == [True, False, False]
    assert not found["overall"]["meaningful"]
    for d, row in found["diagonal"].items():
        assert (row["harm"], row["ci_low"]) == (found["matrix"][d][d], found["intervals"][d][d][0])
    found |= {"n_neurons": dict.fromkeys(changes, 3), "activity": None}
    SCRIPT.report.say(found)
    said = capsys.readouterr().out
    assert "on aa a harm [" in said and "on bb no harm, so its selectivity means nothing" in said
    assert "on cc harm in reverse (better without them)" in said
    drawn = []
    own = SCRIPT.report.figures.save
    try:
        SCRIPT.report.figures.save = lambda fig, path: drawn.append(fig) or own(fig, path)
        SCRIPT.report.draw(tmp_path / "new", found)
        old = {key: value for key, value in found.items() if key not in ("diagonal", "active", "activity")}
        SCRIPT.report.draw(tmp_path / "old", old)  # as results of before are
    finally:
        SCRIPT.report.figures.save = own
    assert [len(fig.axes) for fig in drawn] == [4, 3]  # the last is the colour bar
    labels = [[text.get_text() for text in fig.axes[0].get_yticklabels()] for fig in drawn]
    assert labels == [
        ["aa\nto itself: harm", "bb\nto itself: no harm", "cc\nto itself: harm in reverse"],
        ["aa", "bb", "cc"],
    ]


def test_a_killed_run_goes_on(study, capsys):
    SCRIPT.main(["--random", "5", "-o", "one.json"])
    killed(lambda: SCRIPT.main(["--random", "5", "-o", "two.json"]), SCRIPT, "losses", 4)
    capsys.readouterr()
    SCRIPT.main(["--random", "5", "-o", "two.json"])
    assert "4 of 13 sets were measured before" in capsys.readouterr().out
    same_results(study / "one.json", study / "two.json")
    assert not list(study.glob("*.partial*"))


@pytest.mark.slow
def test_two_processes_find_what_one_does_and_go_on(study):
    flags = ["--random", "5", "-o"]
    SCRIPT.main(["--device", "cpu", *flags, "one.json"])
    # Begun by one process, ended by two.
    killed(lambda: SCRIPT.main(["--device", "cpu", *flags, "two.json"]), SCRIPT, "losses", 3)
    assert len((study / "two.partial.jsonl").read_text().splitlines()) == 1 + 3
    launch("lsn/deactivate.py", *flags, "two.json")
    (one, _), (two, _) = (results.read_json(study / name) for name in ("one.json", "two.json"))
    assert one == two and not list(study.glob("*.partial*"))


def test_texts_are_disjoint(study, capsys):
    tokenizer = tiny_tokenizer()
    path = f"tokens/{tokenids.file_name('ga', 'demo')}"

    def put(lines):
        text = "before. " + " ".join(lines) + " and after"
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int32)
        tokenids.write(path, ids, {}, results.header("token-ids"))

    put([TEXTS["ga"][2]])
    with pytest.raises(InputError, match=r"1 of 4 held-out documents of ga are in the text"):
        SCRIPT.main(["--random", "5"])
    lines = TEXTS["ga"] + [f"líne nua {n} gan aon rud den chéad téacs inti {n * n}" for n in range(8)]
    (study / "heldout/ga.txt").write_text("\n".join(lines) + "\n")
    SCRIPT.main(["--random", "5"])
    assert "1 held-out documents of ga are in the text" in capsys.readouterr().out
    found, _ = results.read_json("results/lsn/deactivate.json")
    assert found["documents"]["ga"] == 11 and found["left_out"] == {"en": 0, "ga": 1, "sw": 0}


def test_seen_is_what_a_slow_search_says():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 5, 5000).astype(np.int32)
    documents = [ids[s : s + n].tolist() for s, n in ((0, 40), (4990, 10), (1020, 30), (7, 5))]
    documents += [rng.integers(5, 9, 40).tolist(), rng.integers(5, 9, 3).tolist()]
    half = [*ids[100:140].tolist(), *rng.integers(5, 9, 40).tolist()]
    documents += [half, half[20:]]
    text = " " + " ".join(map(str, ids)) + " "

    def slow(document):
        document = document[1:]
        length = min(16, len(document))
        if length < 8:
            return False
        runs = [document[i : i + length] for i in range(len(document) - length + 1)]
        return sum(f" {' '.join(map(str, run))} " in text for run in runs) / len(runs) >= 0.5

    expected = [slow(document) for document in documents]
    assert expected[:4] == [True] * 3 + [False] and expected[4:6] == [False, False]
    for chunk in (64, 1000, 1 << 20):
        assert OVERLAP.seen(documents, ids, chunk) == expected


def test_bad_input_is_one_line(study):
    with pytest.raises(InputError, match="fewer than 5 random sets"):
        SCRIPT.main(["--random", "4"])
    with pytest.raises(InputError, match="no other to be compared"):
        SCRIPT.main(["--lang", "ga"])
    with pytest.raises(InputError, match="xx"):
        SCRIPT.main(["--lang", "ga,xx"])
    with pytest.raises(InputError, match="LANGUAGE=FILE"):
        SCRIPT.main(["--heldout", "ga"])
    with pytest.raises(InputError, match="no held-out text of sw"):
        SCRIPT.main(["--heldout", "en=heldout/en.txt", "ga=heldout/ga.txt"])


def test_a_sentence_inside_a_text_is_seen():
    """Its first token differs there (a space goes before it); and a phrase of a few tokens says nothing."""
    ids = np.arange(100, 200)
    inside = [7, *range(121, 140)]
    assert OVERLAP.seen([inside, [7, *range(121, 130)], [7, *range(121, 125)]], ids) == [True, True, False]


def test_a_mask_of_before_a_training_is_refused_whatever_is_asked(study):
    save_tiny("llama", "run/checkpoint-10", seed=8)
    SCRIPT.main(["run/checkpoint-10", "--random", "5"])  # the mask is of the same run
    SCRIPT.main(["--steps", "10", "--random", "5"])
    # The study's own place is for its last checkpoint.
    assert [path.name for path in (study / "results/lsn").glob("*.json")] == ["deactivate.run__checkpoint-10.json"]
    save_tiny("llama", "run/checkpoint-30", seed=9)  # trained again
    with pytest.raises(InputError, match="trained"):
        SCRIPT.main(["run/checkpoint-10", "--random", "5", "-o", "again.json"])
