"""cpt/generate.py: what is written against a loop without a cache, draws, text and page, going on, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, killed, load_script, save_tiny, tiny_tokenizer

from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.models import loading

SCRIPT = load_script("cpt/generate.py")
HOW = {"tokens": 6, "samples": 2, "seed": 3, "temperature": 0.9, "top_p": 0.8}


def test_a_draw_takes_each_token_as_often_as_its_probability_says():
    scores = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    grid = (np.arange(1000) + 0.5) / 1000

    def shares(**how):
        found = [SCRIPT.drawn(scores, u, **how) for u in grid]
        return [found.count(token) / 1000 for token in range(4)]

    assert shares(temperature=1, top_p=1) == [0.1, 0.4, 0.2, 0.3]
    assert shares(temperature=1, top_p=0.65) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=1e-3)
    assert shares(temperature=0.5, top_p=1) == pytest.approx([1 / 30, 16 / 30, 4 / 30, 9 / 30], abs=1e-3)
    assert SCRIPT.drawn(scores, 0.0, 1, 0.01) == SCRIPT.drawn(scores, 1 - 1e-16, 1e-3, 1.0) == 1


def slowly(model, tokenizer, prompt: str, number: int) -> list[str]:
    """Greedy and drawn, each token from a pass over all before it."""
    found = []
    for row in range(1 + HOW["samples"]):
        ids = tokenizer(prompt)["input_ids"]
        start = len(ids)
        uniform = np.random.default_rng([HOW["seed"], number, row - 1]).random(HOW["tokens"]) if row else []
        for at in range(HOW["tokens"]):
            scores = model(input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(
                SCRIPT.drawn(scores, uniform[at], HOW["temperature"], HOW["top_p"]) if row else int(scores.argmax())
            )
            if ids[-1] == tokenizer.eos_token_id:
                break
        found.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    return found


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "bamba", "qwen3_next", "olmoe"])
def test_texts_are_those_of_a_loop_without_a_cache(kind, tmp_path):
    """Whatever the model's own generation_config.json asks for."""
    save_tiny(kind, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 5.0, "do_sample": true, "top_k": 1}')
    model = loading.load_model(refs.model(tmp_path), torch.float32, torch.device("cpu"))
    tokenizer, prompts = tiny_tokenizer(), ["the red dog", "ba"]
    made = SCRIPT.continued(model, tokenizer, prompts, **HOW)
    with torch.no_grad():
        expected = [slowly(model, tokenizer, prompt, number) for number, prompt in enumerate(prompts)]
    assert [[one["text"] for one in texts] for texts in made] == expected
    assert len(set(expected[0])) == 3  # or nothing is shown


def test_a_text_that_ends_by_itself(tmp_path, monkeypatch):
    model = loading.load_model(refs.model(save_tiny("llama", tmp_path)), torch.float32, torch.device("cpu"))
    monkeypatch.setattr(SCRIPT, "drawn", lambda scores, u, *_: 2 if u > 0.5 else 70)  # </s> or a letter
    texts = SCRIPT.continued(model, tiny_tokenizer(), ["the", "a"], **HOW)
    for number, made in enumerate(texts):
        for k in range(2):
            numbers = np.random.default_rng([3, number, k]).random(6) > 0.5
            first = int(numbers.argmax()) if numbers.any() else 6
            letter = tiny_tokenizer().decode([70])
            assert made[1 + k] == {"text": letter * first, "ended": bool(numbers.any())}
    assert not texts[0][0]["ended"]


@pytest.mark.parametrize(
    ("line", "cut"),
    [("the red dog runs", ("the red dog", " runs")), ("猫猫狗狗", ("猫猫", "狗狗")), ("a bcdefgh", ("a bc", "defgh"))],
)
def test_lines_are_cut_between_words(line, cut):
    assert SCRIPT.halves(line) == cut


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, spec in enumerate(("base", "run/checkpoint-10", "run/checkpoint-20")):
        save_tiny("llama", spec, seed=seed)
    (tmp_path / "en.txt").write_text("the & <b>red</b> old dog\n\nhe walks over the hill\na third line\n")
    (tmp_path / "ga.txt").write_text("siúlann an fear\n")
    (tmp_path / "study.yaml").write_text(
        "base: base\nrun: run\nresults: results\nlanguages: {base: en, target: ga}\n"
        "data: {heldout: {en: en.txt, ga: ga.txt, sw: null}}\n"
    )
    return tmp_path


def test_samples_of_a_study_are_side_by_side_in_text_and_page(study, capsys):
    SCRIPT.main(["--tokens", "5", "--number", "2"])
    found, head = results.read_json("results/samples.json", "samples")
    assert list(found["models"]) == ["base", "10", "20"] and head["tokens"] == 5 and head["top_p"] == 0.95
    assert [prompt["language"] for prompt in found["prompts"]] == ["en", "en", "ga"]
    assert found["prompts"][1] == {"text": "he walks over", "language": "en", "own": " the hill"}
    assert all(len(texts) == 3 and len(texts[0]) == 3 for texts in found["models"].values())
    assert found["models"]["base"] != found["models"]["10"]
    text, page = ((study / f"results/samples.{kind}").read_text() for kind in ("txt", "html"))
    assert "1. English (eng_Latn)" not in text and "2. English (en): he walks over …" in text
    assert "  greedy\n  the text's own | the hill\n" in text and text.count("  draw 2\n            base | ") == 3
    assert "the &amp; &lt;b&gt;red&lt;/b&gt; …" in page and "<b>" not in page and page.count("<table>") == 3
    assert "http" not in page
    SCRIPT.main(["--tokens", "5", "--number", "2"])
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(InputError, match="tokens: 7 asked for, 5 in the file"):
        SCRIPT.main(["--tokens", "7", "--number", "2"])


def test_prompts_of_one_s_own_and_a_killed_run(study):
    (study / "p.txt").write_text("first\n\nsecond\n")
    more = ["--prompts", "p.txt", "--prompt", "zeroth", "--tokens", "4", "--samples", "0"]
    SCRIPT.main([*more, "--output", "one.json"])
    killed(lambda: SCRIPT.main([*more, "--output", "two.json"]), SCRIPT, "continued", 2)
    assert not (study / "two.json").exists() and (study / "two.partial.jsonl").exists()
    calls, own = [], SCRIPT.continued
    try:
        SCRIPT.continued = lambda *a, **k: calls.append(1) or own(*a, **k)
        SCRIPT.main([*more, "--output", "two.json"])
    finally:
        SCRIPT.continued = own
    one, two = (json.loads((study / f"{name}.json").read_text()) for name in ("one", "two"))
    assert len(calls) == 1 and one["models"] == two["models"] and not list(study.glob("*.partial*"))
    assert [prompt["text"] for prompt in one["prompts"]] == ["zeroth", "first", "second"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-p", "0"], "--top-p 0.0: it must be above 0 and at most 1"),
        (["--temperature", "0"], "--temperature 0.0: it must be above 0"),
        (["--samples", "-1"], "--samples -1: it must be 0 or more"),
        (["--prompts", "none.txt"], "none.txt"),
        (["--prompts", "empty.txt"], "empty.txt holds no prompt"),
        (["--prompt", "x" * 600], "longer than the model's 512 positions"),
        (["--heldout", "en"], "write LANGUAGE=FILE"),
        (["--steps", "30"], "no checkpoint of step 30"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(study, flags, message):
    (study / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match=message) as error:
        SCRIPT.main([*flags, "--tokens", "2"])
    assert "\n" not in str(error.value) and not list(study.glob("results/*.json"))
