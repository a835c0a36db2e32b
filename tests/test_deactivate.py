"""lsn/deactivate.py: the matrix against a slow loop, disjoint texts, random sets, selectivity, going on, refusals."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
import torch
from helpers import load_script, save_tiny, tiny_tokenizer
from launch import launch

from cpt_utils.architectures import archs
from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.measures import masks, tokenids
from cpt_utils.models import loading

SCRIPT = load_script("lsn/deactivate.py")
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


def test_a_killed_run_goes_on(study, capsys):
    SCRIPT.main(["--random", "5", "-o", "one.json"])
    child = os.fork()
    if child == 0:
        own, calls = SCRIPT.losses, iter(range(99))

        def deadly(*args):
            if next(calls) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return own(*args)

        SCRIPT.losses = deadly
        SCRIPT.main(["--random", "5", "-o", "two.json"])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    capsys.readouterr()
    SCRIPT.main(["--random", "5", "-o", "two.json"])
    assert "4 of 13 sets were measured before" in capsys.readouterr().out
    one, two = (json.loads((study / f"{name}.json").read_text()) for name in ("one", "two"))
    for result in (one, two):
        del result["_header"]["time"], result["_header"]["command"], result["_header"]["code"]
    assert one == two and not list(study.glob("*.partial*"))


@pytest.mark.slow
def test_two_processes_find_what_one_does_and_go_on(study):
    flags = ["--random", "5", "-o"]
    SCRIPT.main(["--device", "cpu", *flags, "one.json"])
    child = os.fork()
    if child == 0:  # begun by one process, ended by two
        own, calls = SCRIPT.losses, iter(range(99))
        SCRIPT.losses = lambda *args: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == 3 else own(*args)
        SCRIPT.main(["--device", "cpu", *flags, "two.json"])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
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
        assert SCRIPT.seen(documents, ids, chunk) == expected


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
    assert SCRIPT.seen([inside, [7, *range(121, 130)], [7, *range(121, 125)]], ids) == [True, True, False]


def test_a_mask_of_before_a_training_is_refused_whatever_is_asked(study):
    save_tiny("llama", "run/checkpoint-10", seed=8)
    SCRIPT.main(["run/checkpoint-10", "--random", "5"])  # the mask is of the same run
    SCRIPT.main(["--steps", "10", "--random", "5"])
    # The study's own place is for its last checkpoint.
    assert [path.name for path in (study / "results/lsn").glob("*.json")] == ["deactivate.run__checkpoint-10.json"]
    save_tiny("llama", "run/checkpoint-30", seed=9)  # trained again
    with pytest.raises(InputError, match="trained"):
        SCRIPT.main(["run/checkpoint-10", "--random", "5", "-o", "again.json"])
