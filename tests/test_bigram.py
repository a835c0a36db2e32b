"""alignment/bigram.py: the table against dictionaries, correlations against numpy, a document at a time; refusals."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import load_script, save_tiny, tiny_tokenizer
from launch import launch

from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.models import loading, scoring

SCRIPT = load_script("alignment/bigram.py")
HELD = {
    "en": [f"the {a} number {n} walks over the hill" for n, a in enumerate(("red", "old", "sad", "big", "shy"))],
    "ga": [f"siúlann an {a} uimhir {n} thar an gcnoc" for n, a in enumerate(("dearg", "sean", "mór"))],
}
TEXT = {
    "en": ["the red fox walks", "the old house on the hill", HELD["en"][0], "a number of shy hens", "it is sad"],
    "ga": ["tá an sionnach dearg", "an seanteach ar an gcnoc", "uimhir a trí"],
}
OUT = "results/alignment/bigram.json"
MODELS = {"base": "base", "10": "run/checkpoint-10"}


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, spec in enumerate(MODELS.values()):
        save_tiny("llama", spec, seed=seed)
    for name, texts in (("held", HELD), ("text", TEXT)):
        for lang, lines in texts.items():
            (tmp_path / f"{lang}.{name}.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "study.yaml").write_text(
        "name: demo\nbase: base\nrun: run\nresults: results\nlanguages: {base: en, target: ga}\n"
        "data:\n  heldout: {en: en.held.txt, ga: ga.held.txt}\n  lsn_text: {eng_Latn: en.text.txt, ga: ga.text.txt}\n"
    )
    return tmp_path


def slow_table(texts: list[list[int]], size: int):
    """p(y | x) and p(y) by dictionaries, as the README has them."""
    pairs = Counter((x, y) for ids in texts for x, y in itertools.pairwise(ids))
    alone = Counter(y for ids in texts for y in ids)
    total = sum(alone.values())

    def unigram(y: int) -> float:
        return (alone[y] + 1) / (total + size)

    def bigram(x: int, y: int) -> float:
        after = [pair for pair in pairs if pair[0] == x]
        followed = sum(pairs[pair] for pair in after)
        return (pairs[x, y] + len(after) * unigram(y)) / (followed + len(after)) if after else unigram(y)

    return bigram, unigram


def test_the_table_is_that_of_the_definition_and_sums_to_one():
    texts = [[0, 1, 1, 2, 1], [1, 1], [3], [2, 1, 1, 1]]
    table, (bigram, unigram) = SCRIPT.Table.of(texts, 6), slow_table(texts, 6)
    before, now = (part.flatten() for part in np.meshgrid(range(6), range(6), indexing="ij"))
    found = [np.exp(-part).reshape(6, 6) for part in table.surprisal(before, now)]
    assert found[0].tolist() == [pytest.approx([bigram(x, y) for y in range(6)]) for x in range(6)]
    assert found[1].tolist() == [pytest.approx([unigram(y) for y in range(6)])] * 6
    assert found[0].sum(1) == pytest.approx(np.ones(6)) and found[0][3].tolist() == found[1][3].tolist()
    without = SCRIPT.Table.of([[2], [3]], 4).surprisal(np.array([2]), np.array([3]))
    assert [float(part[0]) for part in without] == pytest.approx([math.log(3)] * 2)


def slow(spec: str, lang: str, contexts: list[str] | None = None) -> tuple[list, list, list]:
    """Surprisal of model, bigrams and unigrams at every token that follows one of text, a document at a time."""
    model = loading.load_model(refs.model(spec), torch.float64, torch.device("cpu"))
    tokenizer, texts = tiny_tokenizer(), [text for text in TEXT[lang] if text not in HELD[lang]]
    bigram, unigram = slow_table([tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts], len(tokenizer))
    found: tuple[list, list, list] = ([], [], [])
    for number, text in enumerate(HELD[lang]):
        context = f"{contexts[number]} " if contexts else ""
        ids = tokenizer(context + text)["input_ids"]
        first = len(tokenizer(context.rstrip())["input_ids"]) if contexts else 2
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for at in range(first, len(ids)):
            found[0].append(-float(logprobs[at - 1, ids[at]]))
            found[1].append(-math.log(bigram(ids[at - 1], ids[at])))
            found[2].append(-math.log(unigram(ids[at])))
    return found


def test_every_language_and_model_against_a_slow_loop(study, capsys):
    SCRIPT.main(["--dtype", "float64"])
    found, head = results.read_json(OUT, "bigram")
    assert list(found) == ["en", "ga"] and head["text"]["en"]["file"] == "en.text.txt"
    for lang in HELD:
        at_base = {}
        for name, spec in MODELS.items():
            model, bigram, unigram = slow(spec, lang)
            row = found[lang][name]
            wanted = {"bigram": np.corrcoef(model, bigram)[0, 1], "unigram": np.corrcoef(model, unigram)[0, 1]}
            wanted["beyond"] = wanted["bigram"] - wanted["unigram"]
            at_base = at_base or wanted
            if name != "base":
                wanted["change"] = wanted["bigram"] - at_base["bigram"]
            assert {*row} - {*wanted} == {"nll_per_token", "nll_bigram", "nll_unigram", "tokens", "documents"}
            for key, value in wanted.items():
                assert row[key]["value"] == pytest.approx(value, abs=1e-9), (lang, name, key)
                assert row[key]["ci_low"] < row[key]["value"] < row[key]["ci_high"]
            assert row["nll_per_token"] == pytest.approx(np.mean(model), rel=1e-9)
            assert row["nll_bigram"] == pytest.approx(np.mean(bigram)) and row["tokens"] == len(model)
            assert row["nll_unigram"] == pytest.approx(np.mean(unigram)) and row["documents"] == len(HELD[lang])
    assert (study / OUT).with_suffix(".png").is_file() and "ga: correlation with bigrams" in capsys.readouterr().out


def test_a_model_that_is_the_table_goes_with_it_and_one_that_is_not_does_not(monkeypatch):
    tokenizer, draw = tiny_tokenizer(), np.random.default_rng(0)
    ids = {text: tokenizer(text)["input_ids"] for text in HELD["en"]}
    table = SCRIPT.Table.of([one[1:] for one in ids.values()][:3], len(tokenizer))

    def correlated(each) -> np.ndarray:
        def nlls(model, tokenizer, texts, *rest):
            made = [torch.tensor(each(np.asarray(ids[text]))) for text in texts]
            return [scoring.TextScore(float(one.sum()), len(one), 1, one) for one in made]

        monkeypatch.setattr(SCRIPT.scoring, "text_nlls", nlls)
        model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace()))
        documents = [("", text) for text in ids]
        sums = np.asarray(SCRIPT.document_sums(model, tokenizer, documents, table, None))
        assert sums[:, 0].tolist() == [len(one) - 2 for one in ids.values()]  # without <s>, and what follows it
        return SCRIPT.correlations(sums.sum(0))

    assert correlated(lambda own: table.surprisal(own[:-1], own[1:])[0])[0] == pytest.approx(1)
    local, alone, _ = correlated(lambda own: table.surprisal(own[:-1], own[1:])[1])
    assert alone == pytest.approx(1) and local < 0.9
    assert abs(correlated(lambda own: draw.random(len(own) - 1))[0]) < 0.3
    assert np.isnan(SCRIPT.correlations(np.asarray([4.0, 8, 4, 4, 16, 5, 5, 8, 8]))[0])  # it does not vary
    logs = -np.log(np.full(1000, 1 / 301))
    sums = [1000, *[(logs**power).sum() for power in (1, 1, 1, 2, 2, 2, 2, 2)]]
    assert np.isnan(SCRIPT.correlations(np.asarray(sums))).all()  # nor here, but for rounding


def test_context_is_read_and_not_scored(study):
    """As in the losses by language: of two lines that make a document the first."""
    lines = [line for text in HELD["ga"] for line in ("cloch", text)]
    (study / "ga.held.txt").write_text("\n".join(lines) + "\n")
    text = (study / "study.yaml").read_text()
    (study / "study.yaml").write_text(text.replace("data:\n", "data:\n  heldout_lines: 2\n"))
    SCRIPT.main(["--dtype", "float64", "--heldout", "ga=ga.held.txt"])
    found, _ = results.read_json(OUT)
    model, bigram, _ = slow("base", "ga", ["cloch"] * len(HELD["ga"]))
    row = found["ga"]["base"]
    assert row["tokens"] == len(model) and row["bigram"]["value"] == pytest.approx(np.corrcoef(model, bigram)[0, 1])


def test_text_is_counted_up_to_a_number_of_tokens(study):
    def table(most: int):
        return SCRIPT.table_of(study / "en.text.txt", tiny_tokenizer(), most, {*HELD["en"]})

    assert table(10).counts.sum() == 9 and table(17).counts.sum() == 16 and table(18).counts.sum() == 16
    assert table(9999).counts.sum() == sum(len(text) - 1 for text in TEXT["en"] if text not in HELD["en"])


@pytest.mark.slow
def test_two_processes_find_what_one_does(study):
    SCRIPT.main(["--device", "cpu", "--output", "one.json"])
    launch("alignment/bigram.py", "--output", "two.json")
    assert results.read_json("one.json")[0] == results.read_json("two.json")[0]


def test_bad_input_is_one_line(study, capsys):
    SCRIPT.main(["--text", "en=en.text.txt", "--limit", "4"])
    assert "ga is left out: it has no text to count bigrams in" in capsys.readouterr().err
    (part,) = (study / "results/alignment").glob("bigram.*.json")
    found, _ = results.read_json(part, allow_limited=True)
    assert part.name == "bigram.limit-4.json" and list(found) == ["en"] and found["en"]["10"]["documents"] == 4
    with pytest.raises(InputError, match=r"no text to count bigrams in: give --text .* \(en, ga\)"):
        SCRIPT.main(["--text", "sw=en.text.txt"])
    with pytest.raises(InputError, match=r"nowhere.txt does not exist"):
        SCRIPT.main(["--text", "en=nowhere.txt"])
    with pytest.raises(InputError, match=r"en.held.txt has no text except the scored lines"):
        SCRIPT.main(["--text", "en=en.held.txt", "--heldout", "en=en.held.txt"])
