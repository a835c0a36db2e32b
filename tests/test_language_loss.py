"""language-loss/language_loss.py: against a slow loop and the loss of swaps, going on, refusals, table and figure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import killed, load_script, same_results, save_tiny, tiny_tokenizer
from launch import launch

from cpt_utils.architectures import archs
from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.measures import evaluation
from cpt_utils.models import loading

SCRIPT = load_script("language-loss/language_loss.py")
TEXTS = {
    "en": [f"the {a} number {n} walks over the hill" for n, a in enumerate(("red", "old", "sad", "big", "shy", "new"))],
    "ga": [f"siúlann an {a} uimhir {n} thar an gcnoc" for n, a in enumerate(("dearg", "sean", "mór", "beag"))],
}
OUT = "results/language-loss/language_loss"
MODELS = {"base": "base", "10": "run/checkpoint-10", "20": "run/checkpoint-20"}


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, spec in enumerate(MODELS.values()):
        save_tiny("llama", spec, seed=seed)
    (tmp_path / "heldout").mkdir()
    for lang, lines in TEXTS.items():
        (tmp_path / f"heldout/{lang}.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "study.yaml").write_text(
        "name: demo\nbase: base\nrun: run\nresults: results\nlanguages: {base: en, target: ga}\n"
        "data: {heldout: {en: heldout/en.txt, ga: heldout/ga.txt, sw: null}}\n"
    )
    return tmp_path


def slow_nlls(spec: str, lines: list[str]) -> tuple[list[float], int]:
    """NLL of each line by itself in float64, and the bytes of all."""
    model = loading.load_model(refs.model(spec), torch.float64, torch.device("cpu"))
    found = []
    for line in lines:
        ids = torch.tensor([tiny_tokenizer()(line)["input_ids"]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        found.append(-logprobs.gather(1, ids[0, 1:, None]).sum().item())
    return found, sum(len(line.encode()) for line in lines)


def test_every_language_and_model_against_a_slow_loop_and_the_loss_of_swaps(study, capsys):
    SCRIPT.main(["--dtype", "float64", "--batch-size", "2"])
    found, head = results.read_json(f"{OUT}.json", "language-loss")
    units = results.read_tensors(f"{OUT}.pt")
    assert list(found) == ["en", "ga"] and list(head["models"]["checkpoints"]) == ["10", "20"]
    for lang, lines in TEXTS.items():
        base, _ = slow_nlls("base", lines)
        assert list(found[lang]) == list(MODELS) and units[lang].shape == (3, len(lines))
        for at, (name, spec) in enumerate(MODELS.items()):
            nlls, n_bytes = slow_nlls(spec, lines)
            row = found[lang][name]
            assert row["nll_per_byte"] == pytest.approx(sum(nlls) / n_bytes, rel=1e-10)
            assert row["perplexity_per_byte"] == math.exp(row["nll_per_byte"]) and row["documents"] == len(lines)
            assert row["ci_low"] < row["nll_per_byte"] < row["ci_high"]
            expected = np.array(nlls) / (n_bytes / len(lines))
            assert units[lang][at].tolist() == pytest.approx(expected.tolist(), rel=1e-10)
            if name == "base":
                assert "change" not in row
                continue
            change = row["change"]
            assert change["mean"] == pytest.approx((sum(nlls) - sum(base)) / n_bytes, abs=1e-10)
            assert change["ci_low"] <= change["mean"] <= change["ci_high"]
    ref = refs.model(MODELS["20"])
    model = loading.load_model(ref, torch.float64, torch.device("cpu"))
    test = evaluation.Test(heldout=evaluation.documents(study / "heldout/ga.txt", 1), batch_size=2)
    swapped = test.on(model, archs.for_config(ref.config()), tiny_tokenizer(), "20")["values"]["nll_per_byte"]
    assert found["ga"]["20"]["nll_per_byte"] == swapped  # to the last bit
    lines = (study / f"{OUT}.md").read_text().splitlines()
    assert len(lines) == 2 + 6 and lines[2].startswith("| en | base | 6 | ") and f"{swapped:.4f} [" in lines[-1]
    assert (study / f"{OUT}.png").is_file() and "ga: " in capsys.readouterr().out


def test_a_change_is_paired_and_its_interval_is_of_the_documents():
    """A language that loses .1 on every document, however unlike these are, has forgotten for certain."""
    documents = [0.5, 1.0, 2.0, 4.0, 0.25, 3.0]
    lost, noise = [value + 0.1 for value in documents], [value + (-1) ** i for i, value in enumerate(documents)]
    rows = SCRIPT.summarize({"xx": {"base": documents, "5": lost, "10": noise}}, seed=3)["xx"]
    for key in ("mean", "ci_low", "ci_high"):
        assert rows["5"]["change"][key] == pytest.approx(0.1)
    assert rows["base"]["ci_high"] - rows["base"]["ci_low"] > 1
    assert rows["10"]["change"]["ci_low"] < 0 < rows["10"]["change"]["ci_high"]


def test_a_killed_run_goes_on_with_the_next_model(study, capsys):
    SCRIPT.main(["--output", "one.json"])
    killed(lambda: SCRIPT.main(["--output", "two.json"]), SCRIPT, "losses", 2)
    assert not (study / "two.json").exists()
    capsys.readouterr()
    SCRIPT.main(["--output", "two.json"])
    assert "2 of 3 sets were measured before" in capsys.readouterr().out
    same_results(study / "one.json", study / "two.json")
    assert not list(study.glob("*.partial*"))


@pytest.mark.slow
def test_two_processes_find_what_one_does(study):
    SCRIPT.main(["--device", "cpu", "--output", "one.json"])
    launch("language-loss/language_loss.py", "--output", "two.json")
    assert results.read_json("one.json")[0] == results.read_json("two.json")[0]


def test_finished_results_are_kept_and_others_refused(study, capsys):
    SCRIPT.main([])
    SCRIPT.main(["--base", "base", "--run", "run"])
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(InputError, match="another request"):
        SCRIPT.main(["--dtype", "float64"])
    SCRIPT.main(["--steps", "10", "--limit", "2"])  # a part goes beside the study's own
    (part,) = (study / "results/language-loss").glob("language_loss.*.json")
    assert part.name == "language_loss.run__checkpoint-10.limit-2.json"
    found, _ = results.read_json(part, allow_limited=True)
    assert list(found["en"]) == ["base", "10"] and found["en"]["10"]["documents"] == 2
    with pytest.raises(InputError, match="made with --limit"):
        results.read_json(part)


def test_lines_that_make_a_document_are_those_of_the_study(study, capsys):
    text = (study / "study.yaml").read_text()
    (study / "study.yaml").write_text(text.replace("data: {", "data: {heldout_lines: 2, "))
    SCRIPT.main([])
    found, head = results.read_json(f"{OUT}.json")
    assert (found["en"]["10"]["documents"], found["ga"]["10"]["documents"], head["lines"]) == (3, 2, 2)
    assert "is one document" not in capsys.readouterr().err
    assert len(evaluation.documents(study / "heldout/ga.txt", 3)) == 1
    assert "heldout/ga.txt is one document, so intervals have no width" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"ga.txt has 4 lines, fewer than data.heldout_lines \(6\)"):
        evaluation.documents(study / "heldout/ga.txt", 6)


def test_bad_input_is_one_line(study):
    with pytest.raises(InputError, match="LANGUAGE=FILE"):
        SCRIPT.main(["--heldout", "ga"])
    with pytest.raises(InputError, match=r"nowhere.txt does not exist: the held-out text of ga"):
        SCRIPT.main(["--heldout", "ga=nowhere.txt"])
    for other in ("ga", "gle_Latn"):
        with pytest.raises(InputError, match=f"ga and {other} are one language; give --heldout each once"):
            SCRIPT.main(["--heldout", "ga=heldout/ga.txt", f"{other}=heldout/en.txt"])
    text = (study / "study.yaml").read_text()
    (study / "study.yaml").write_text(text.partition("data:")[0])
    with pytest.raises(InputError, match="no held-out text: give --heldout"):
        SCRIPT.main([])
    with pytest.raises(InputError, match="no checkpoint of step 30"):
        SCRIPT.main(["--steps", "30"])
