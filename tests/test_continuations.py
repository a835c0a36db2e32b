"""The continuation task: the own half is the label, wrong halves are of like length, lm_eval runs it."""

import argparse
import dataclasses
import json

import pytest
from helpers import load_script, save_tiny

from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import tokenization
from cpt_utils.measures import evaluation, tasks

WORDS = "sun moon river stone tree bird cloud road house lamp door bread".split()  # noqa: SIM905


def lines(n):
    return [" ".join(WORDS[(i * 5 + j * (1 + i % 3)) % 12] + str(i) for j in range(4 + i % 9)) for i in range(n)]


@pytest.fixture(scope="module")
def script():
    return load_script("cpt/continuations.py")


def test_items_hold_the_own_half_once_at_the_label(script):
    sentences = [*lines(60), lines(60)[10], ""]
    made = script.items(sentences, 4, seed=0)
    whole = {s for s in sentences if len(s.split()) >= script.SHORTEST}
    assert len(made) == len(whole)
    for item in made:
        assert len(set(item["choices"])) == 4
        fits = [f"{item['context']} {choice}" in whole for choice in item["choices"]]
        assert fits.count(True) == 1 and fits[item["label"]]
    labels = [item["label"] for item in made]
    assert all(labels.count(k) >= 3 for k in range(4))
    assert made == script.items(sentences, 4, seed=0) != script.items(sentences, 4, seed=1)


def test_wrong_halves_are_of_like_length(script):
    made = script.items(lines(300), 4, seed=0)
    own = [len(item["choices"][item["label"]]) for item in made]
    others = [sum(map(len, item["choices"])) / 4 for item in made]
    assert all(abs(a - b) <= 12 for a, b in zip(own, others, strict=True))


def test_too_few_sentences(script):
    with pytest.raises(InputError, match="too few for 4 choices"):
        script.items(lines(4), 4, seed=0)


def test_lm_eval_runs_the_task(script, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = tmp_path / "heldout.txt"
    text.write_text("\n".join(lines(30)) + "\n")
    script.main(["--text", str(text), "--language", "qaa_Latn", "--out", str(tmp_path / "task"), "--seed", "3"])
    rows = [json.loads(line) for line in (tmp_path / "task/continuation_qaa_Latn.jsonl").read_text().splitlines()]
    model = save_tiny("llama", tmp_path / "m")
    load_script("lm_eval_sib200/evaluate.py").main(
        [
            str(model),
            "--tasks",
            "continuation_qaa_Latn",
            "--include-path",
            str(tmp_path / "task"),
            "-o",
            str(tmp_path / "o"),
        ]
    )
    found = json.loads(next((tmp_path / "o").rglob("results_*.json")).read_text())
    assert found["n-samples"]["continuation_qaa_Latn"] == {"original": len(rows), "effective": len(rows)}

    import torch

    from cpt_utils.architectures import archs
    from cpt_utils.checkpoints import refs
    from cpt_utils.models import loading

    loaded = loading.load_model(refs.model(model), torch.float32, torch.device("cpu"))
    tokenizer = tokenization.load_tokenizer(refs.model(model))
    values = {"data": {"task": {"name": "continuation_qaa_Latn", "dir": str(tmp_path / "task"), "rows": 20}}}
    args = argparse.Namespace(measures=["task"], base_lang=None, target_lang=None, task=None, limit=None, batch_size=3)
    test = evaluation.test_from_arguments(args, Study(values), {}, retrieve=None)
    assert len(test.task) == 20 == test.facts["task"]["rows"]
    args.task = str(tmp_path / "task/continuation_qaa_Latn.jsonl")  # a file that is asked for counts whole
    assert len(evaluation.test_from_arguments(args, Study(values), {}, retrieve=None).task) == len(rows)
    test = dataclasses.replace(test, task=tasks.from_file(tmp_path / "task/continuation_qaa_Latn.jsonl").items)
    own = test.on(loaded, archs.for_config(loaded.config), tokenizer, "m")["units"]["task_accuracy"]
    assert len(own) == len(rows) and sum(own) / len(own) == found["results"]["continuation_qaa_Latn"]["acc,none"]


@pytest.mark.parametrize(
    "row",
    [
        "no JSON", "[]", '{"context": "a", "choices": ["b", "c"]}',
        '{"context": "a", "choices": ["b", "c"], "label": 2}',
        '{"context": "a", "choices": ["b", "c"], "label": true}', '{"context": " ", "choices": ["b", "c"], "label": 0}',
        '{"context": "a", "choices": ["b"], "label": 0}', '{"context": "a", "choices": "bc", "label": 0}',
        '{"context": "a ", "choices": ["b", "c"], "label": 0}', "[" * 200_000,
        '{"context": "a", "choices": ["b", 1], "label": 0}', '{"context": 7, "choices": ["b", "c"], "label": 0}',
    ],
)  # fmt: skip
def test_a_row_that_is_none_is_named_with_its_line(tmp_path, row):
    file = tmp_path / "t.jsonl"
    file.write_text('{"context": "a", "choices": ["b", "c"], "label": 1}\n\n' + row + "\n")
    with pytest.raises(InputError, match=r't.jsonl, line 3: not \{"context": text, "choices"'):
        tasks.from_file(file)
    file.write_text("")
    with pytest.raises(InputError, match="holds no rows"):
        tasks.from_file(file)
