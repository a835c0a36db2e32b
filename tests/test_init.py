"""python -m cpt_utils.base.study --init: what it finds, asks and refuses; workflow/check.py accepts what it writes."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import yaml
from helpers import load_script, save_tiny

from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study

init, check = load_script("workflow/init.py"), load_script("workflow/check.py")
PAGE = load_script("docs/study.py")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """What somebody has who trained with a Trainer: a base, a run with a final model and states, texts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    save_tiny("llama", "my-models/base")
    save_tiny("llama", "my-models/cpt", seed=20)
    for step in (5, 10, 20):
        save_tiny("llama", f"my-models/cpt/checkpoint-{step}", seed=step)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"):
            Path(f"my-models/cpt/checkpoint-{step}/{name}").write_bytes(b"state")
    texts = Path("my-texts")
    texts.mkdir()
    rows = [(f"the dog {i} runs", f"txakurra {i} doa") for i in range(20)]
    for name in ("eng_Latn", "eus_Latn", "held.eng_Latn", "held.eus_Latn"):
        side = name.endswith("eus_Latn")
        (texts / f"{name}.txt").write_text("".join(row[side] + "\n" for row in rows))
    table = "".join(f"{i}\t{a}\t{b}\n" for i, (a, b) in enumerate(rows))
    (texts / "pairs.tsv").write_text("id\teng_Latn\teus_Latn\n" + table)
    for side, code in enumerate(("eng_Latn", "eus_Latn")):
        (texts / "sib200" / code).mkdir(parents=True)
        (texts / "flores").mkdir(exist_ok=True)
        head = "index_id\tcategory\ttext\n"
        for split, at in (("train", 0), ("dev", 100), ("test", 200)):
            lines = "".join(f"{at + i}\ttravel\t{row[side]}\n" for i, row in enumerate(rows))
            (texts / "sib200" / code / f"{split}.tsv").write_text(head + lines)
        lines = "".join(f"{i}\t{row[side]}\n" for i, row in enumerate(rows))
        (texts / "flores" / f"{code}.tsv").write_text("id\ttext\n" + lines)
    return tmp_path


def written(*flags: str) -> dict:
    assert init.main(["--init", "basque.yaml", *flags]) == 0
    return yaml.safe_load(Path("basque.yaml").read_text())


def test_flags_and_the_only_models_make_a_study_that_is_ready(place, capsys):
    found = written(
        "--languages", "eng_Latn,eus_Latn", "--pairs", "my-texts/pairs.tsv",
        "--heldout", "eus_Latn=my-texts/held.eus_Latn.txt",
        "--neurons", "eng_Latn=my-texts/eng_Latn.txt", "eus_Latn=my-texts/eus_Latn.txt",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "--base my-models/base: the only one here" in said and "3 checkpoints, of step 5, 10, 20" in said
    assert "20 sentence pairs eng_Latn-eus_Latn from tsv" in said and said.index("ready to run") < said.index("wrote")
    assert found["base"] == "my-models/base" and found["run"] == "my-models/cpt" and found["name"] == "basque"
    assert found["data"]["source"] == "tsv" and found["languages"]["lsn"] == ["eng_Latn", "eus_Latn"]
    assert found["tokens"] == "results/basque/tokens" and found["results"] == "results/basque"
    assert check.main(["basque.yaml"]) == 0


@pytest.mark.parametrize(
    ("pairs", "data"),
    [
        (["my-texts/eng_Latn.txt", "my-texts/eus_Latn.txt"],
         {"source": "text", "base_file": "my-texts/eng_Latn.txt", "target_file": "my-texts/eus_Latn.txt"}),
        (["my-texts/pairs.tsv:2", "my-texts/pairs.tsv:3"],
         {"source": "tsv", "base_file": "my-texts/pairs.tsv:2", "target_file": "my-texts/pairs.tsv:3"}),
        (["my-texts/sib200"], {"source": "sib200", "dir": "my-texts/sib200",
                               "task": {"name": "sib200_eus_Latn", "dir": "my-texts/sib200"}}),
        (["my-texts/flores"], {"source": "flores", "dir": "my-texts/flores"}),
    ],
)  # fmt: skip
def test_every_form_of_parallel_sentences_is_seen(place, pairs, data):
    assert written("--languages", "eng_Latn,eus_Latn", "--pairs", *pairs)["data"] == data
    assert check.main(["basque.yaml"]) == 0


def test_questions_are_asked_until_the_answers_hold(place, monkeypatch, capsys):
    answers = iter([
        "nowhere", "my-models/base", "'odd", "", "", "eng_Latn", "eng_Latn,eus_Latn", "my-texts/eng_Latn.txt", "2",
        "eus_Latn=my-texts/none.txt", "eus_Latn=my-texts/held.eus_Latn.txt", "eus_Latn=my-texts/eus_Latn.txt", "",
    ])  # fmt: skip
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    found = written()
    assert not list(answers)
    assert found["data"] == {
        "source": "text", "base_file": "my-texts/held.eng_Latn.txt", "target_file": "my-texts/held.eus_Latn.txt",
        "heldout": {"eus_Latn": "my-texts/held.eus_Latn.txt"},
    }  # fmt: skip
    assert "tokens" not in found
    said = capsys.readouterr().out
    assert "  1  my-texts/eng_Latn.txt my-texts/eus_Latn.txt\n" in said and "two are needed, base and target" in said
    assert said.count("an answer is needed here") == 1
    assert "my-texts/none.txt does not exist" in said and "name eus_Latn and at least one other language" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], r"missing the languages of base and CPT: give --languages"),
        (
            ["--languages", "eng_Latn,eus_Latn"],
            r"give --pairs \(two files .*here are my-texts/eng_Latn.txt my-texts/eus",
        ),
        (["--run", "my-models/base"], "my-models/base is the base itself"),
        (["--run", "other"], "other: no such folder"),
        (
            ["--languages", "eng_Latn,eus_Latn", "--pairs", "my-texts"],
            "my-texts: nothing for eng_Latn; .*for a folder of your own texts, name the two files",
        ),
        (["--run", "odd/checkpoint-5"], "3 layers, odd/checkpoint-5 4: they are not a pair"),
        (
            ["--languages", "eng_Latn,eus_Latn", "--pairs", "my-texts/eng_Latn.txt"],
            "--pairs my-texts/eng_Latn.txt: give",
        ),
        (
            ["--languages", "eng_Latn,eus_Latn", "--pairs", "my-texts/pairs.tsv", "--heldout", "eus"],
            "write LANGUAGE=FILE",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_one_line_and_nothing_is_written(place, flags, message):
    if "odd" in str(flags):
        save_tiny("llama", "odd/checkpoint-5", layers=4)
    with pytest.raises(InputError, match=message) as error:
        init.main(["--init", "basque.yaml", *flags])
    assert "\n" not in str(error.value) and not Path("basque.yaml").exists()


def test_a_file_that_is_there_is_kept(place):
    Path("basque.yaml").write_text("name: mine\n")
    with pytest.raises(InputError, match="exists already; give another name"):
        init.main(["--init", "basque.yaml"])
    assert Path("basque.yaml").read_text() == "name: mine\n"


def test_the_module_is_the_command(place, monkeypatch, capsys):
    flags = ["--init", "--languages", "eng_Latn,eus_Latn", "--pairs", "my-texts/pairs.tsv"]
    monkeypatch.setattr(sys, "argv", ["study.py", *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("cpt_utils.base.study", run_name="__main__")
    assert ended.value.code == 0 and Study.find("study.yaml").get("run") == "my-models/cpt"


@pytest.mark.parametrize("title", [title for title in PAGE.PAIRS if title != "FLORES+"])
def test_templates_of_the_page_are_ready_once_the_files_are_there(place, title):
    Path("basque.yaml").write_text(PAGE.template(PAGE.PAIRS[title][1]))
    assert check.main(["basque.yaml"]) == 0


def test_guesses(place):
    found = init.look()
    assert found.models == ["my-models/base"] and found.runs == ["my-models/cpt"]
    texts = ["a/train.en.txt", "a/train.eu.txt", "en/x.txt", "eu/x.txt", "t.tsv", "pen.txt", "peu.txt"]
    assert init.pairs_among(texts, "en", "eu") == ["a/train.en.txt a/train.eu.txt", "en/x.txt eu/x.txt", "t.tsv"]
