"""cpt/documents.py: the lexicon against a slow obvious EM, disjoint splits, seeds, the three kinds, bad input."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import load_script

from cpt_utils.base.errors import InputError


@pytest.fixture(scope="module")
def documents():
    return load_script("cpt/documents.py")


WORDS = {"a": "el", "dog": "perro", "cat": "gato", "runs": "corre", "sleeps": "duerme", "red": "rojo", "house": "casa"}


def toy_lines(n: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Aligned lines over a seven-word vocabulary; the second language reverses the order and ends in a full stop."""
    rng = np.random.default_rng(seed)
    a = [[str(w) for w in rng.choice(list(WORDS), size=int(rng.integers(2, 6)), replace=False)] for _ in range(n)]
    return [" ".join(line).capitalize() + "." for line in a], [
        " ".join(WORDS[w] for w in reversed(line)).capitalize() + "." for line in a
    ]


def write(path: Path, lines: list[str]) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
    return path


def slow_ibm1(source, target, iterations):
    """The EM of Brown et al. (1993), one pair of words at a time, in dictionaries."""
    source = [["", *line] for line in source]
    t = {}
    for s_line, t_line in zip(source, target, strict=True):
        for s in s_line:
            for w in t_line:
                t.setdefault(s, {})[w] = 1.0
    for s in t:
        t[s] = {w: 1.0 / len(t[s]) for w in t[s]}
    for _ in range(iterations):
        count = {s: dict.fromkeys(t[s], 0.0) for s in t}
        for s_line, t_line in zip(source, target, strict=True):
            for w in t_line:
                total = sum(t[s][w] for s in s_line)
                for s in s_line:
                    count[s][w] += t[s][w] / total
        t = {s: {w: c / sum(count[s].values()) for w, c in count[s].items()} for s in count}
    return t


def test_ibm1_equals_the_obvious_em(documents):
    a, b = toy_lines(40)
    # A repeated word in a line and an empty line must not upset the bookkeeping.
    source = [documents.words(line) for line in [*a, "dog dog red", ""]]
    target = [documents.words(line) for line in [*b, "rojo perro perro", "casa"]]
    fast, slow = documents.ibm1(source, target, 6), slow_ibm1(source, target, 6)
    assert set(fast) == set(slow)
    for s in slow:
        assert set(fast[s]) == set(slow[s])
        np.testing.assert_allclose([fast[s][w] for w in slow[s]], list(slow[s].values()), rtol=1e-9, atol=1e-12)
        assert sum(fast[s].values()) == pytest.approx(1.0)
    assert documents.ibm1([], [], 3) == {}


def test_lexicon_finds_the_words_and_is_its_own_inverse(documents):
    a, b = toy_lines(120)
    lexicon = documents.learn_lexicon(a, b)
    assert lexicon == WORDS
    assert documents.learn_lexicon(b, a) == {w: v for v, w in WORDS.items()}
    assert documents.learn_lexicon(a, b, min_count=10_000) == {}
    assert documents.learn_lexicon(a, a) == {}  # equal words are no translation


def test_words_keep_marks_and_drop_punctuation(documents):
    assert documents.words("L'homme, 2 T-Shirts!") == ["l", "homme", "2", "t", "shirts"]
    assert documents.words("हिन्दी भाषा।") == ["हिन्दी", "भाषा"]


def test_mix_keeps_capitals_and_punctuation_and_hits_the_rate(documents):
    rng = np.random.default_rng(0)
    assert documents.mix("Dog, RED (house) x.", WORDS, 1.0, rng) == ("Perro, ROJO (casa) x.", 4, 3)
    line = " ".join(["dog"] * 5000)
    text, total, replaced = documents.mix(line, WORDS, 0.4, rng)
    assert total == 5000
    assert text.split().count("perro") == replaced
    assert abs(replaced / total - 0.4) < 4 * (0.24 / 5000) ** 0.5


def test_every_line_once_a_pass(documents):
    lines = [f"line{i}" for i in range(10)]
    made = documents.monolingual_documents(lines, 4, 2, np.random.default_rng(0))
    assert [len(text.split()) for text in made] == [4, 4, 2, 4, 4, 2]
    for half in (made[:3], made[3:]):
        assert sorted(" ".join(half).split()) == sorted(lines)
    assert made[:3] != made[3:]
    pairs = documents.pair_documents(lines, [line.upper() for line in lines], 2, 1, np.random.default_rng(0))
    assert len(pairs) == 5
    for text in pairs:
        first, second, third, fourth = text.split()
        assert first.lower() == second.lower() and third.lower() == fourth.lower()
        assert first.isupper() == third.isupper() != second.isupper()


@pytest.fixture
def files(tmp_path):
    a, b = toy_lines(200)
    a[7] = ""  # dropped from both
    return {"en": str(write(tmp_path / "en.txt", a)), "es": str(write(tmp_path / "es.txt.gz", b))}


def test_main_splits_disjointly_and_repeats_itself(documents, files, tmp_path, capsys):
    outs = []
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        out = tmp_path / name
        args = ["--parallel", *(f"{k}={v}" for k, v in files.items()), "--parallel-lines", "120"]
        documents.main([*args, "--monolingual-lines", "60", "--output-dir", str(out), "--seed", str(seed)])
        outs.append(out)
    names = ["en.txt", "es.txt", "pairs.en-es.txt", "mixed.en-es.txt", "lexicon.en-es.tsv"]
    for name in names:
        texts = [(out / name).read_text(encoding="utf-8") for out in outs]
        assert texts[0] == texts[1]
        assert texts[0] != texts[2] or name.startswith("lexicon")
    facts = json.loads((outs[0] / "documents.json").read_text())
    used = {part: numbers(text) for part, text in facts["lines_used"].items()}
    assert len(used["parallel"]) == 120 and len(used["monolingual"]) == 60
    assert not used["parallel"] & used["monolingual"]
    assert 7 not in used["parallel"] | used["monolingual"] and facts["lines_available"] == 199
    assert facts["lexicon"] == {"en-es": len(WORDS)}
    # The numbers are those of the files: the monolingual documents hold just these lines.
    stored = Path(files["en"]).read_text().splitlines()
    held = (outs[0] / "en.txt").read_text().replace("\n", " ").split(".")
    assert sorted(t.strip() for t in held if t.strip()) == sorted(stored[i].rstrip(".") for i in used["monolingual"])
    mixed = facts["documents"]["mixed.en-es"]
    assert 0.3 < mixed["words_replaced"] / mixed["words"] < 0.5

    capsys.readouterr()
    same = ["--parallel", *(f"{k}={v}" for k, v in files.items()), "--monolingual-lines", "60", "--seed", "3"]
    documents.main([*same, "--parallel-lines", "120", "--output-dir", str(outs[0])])
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"another request \(parallel_lines: 110 asked for, 120 in the file\)"):
        documents.main([*same, "--parallel-lines", "110", "--output-dir", str(outs[0])])


def numbers(text: str) -> set[int]:
    found = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def test_other_text_and_kinds_from_a_file(documents, files, tmp_path, monkeypatch):
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({"text": f"Sola {i}."}) + "\n" for i in range(9)))
    monkeypatch.setenv("TEXTS", str(tmp_path))
    config = {
        "output": str(tmp_path / "seed-{seed}"),
        "parallel": {"en": "${TEXTS}/en.txt", "es": "${TEXTS}/es.txt.gz"},
        "monolingual": {"es": "${TEXTS}/more.jsonl"},
        "parallel_lines": 100,
        "documents": [
            {"kind": "monolingual", "language": "es", "lines": 3},
            {"name": "m", "kind": "mixed", "languages": ["es", "en"], "probability": 1.0, "passes": 2},
        ],
    }
    path = tmp_path / "documents.yaml"
    path.write_text(yaml.safe_dump(config))
    documents.main(["--config", str(path), "--seed", "5"])
    out = tmp_path / "seed-5"
    assert sorted(p.name for p in out.iterdir()) == [
        "documents.json",
        "lexicon.es-en.tsv",
        "m.txt",
        "monolingual.es.txt",
    ]
    assert len((out / "monolingual.es.txt").read_text().splitlines()) == 3
    assert len((out / "m.txt").read_text().splitlines()) == 2 * 2 * 25


BAD = {
    "a different number": ({"parallel": {"en": "en.txt", "es": "short.txt"}}, "aligned line by line"),
    "no file": ({"parallel": {"en": "en.txt", "es": "gone.txt"}}, "gone.txt does not exist"),
    "one language": ({"parallel": {"en": "en.txt"}}, "two or more languages"),
    "a misspelt key": ({"paralel_lines": 5}, "did you mean parallel_lines"),
    "too many lines": ({"parallel_lines": 150, "monolingual_lines": 150}, "150 parallel lines leave only 49 of 199"),
    "far too many lines": ({"parallel_lines": 1500}, "there are 199 lines"),
    "a strange kind": ({"documents": [{"kind": "code"}]}, "needs a kind"),
    "an unknown language": ({"documents": [{"kind": "pairs", "languages": ["en", "ga"]}]}, "two of the parallel"),
    "a probability of 2": (
        {"documents": [{"kind": "mixed", "languages": ["en", "es"], "probability": 2}]},
        "above 0 and at most 1",
    ),
    "no clear word": ({"lexicon": {"min_count": 10000}}, "no word pair"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(documents, files, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "short.txt", ["one"])
    change, message = BAD[case]
    config = {"output": "out", "parallel": {"en": "en.txt", "es": "es.txt.gz"}} | change
    (tmp_path / "documents.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=message):
        documents.main(["--config", "documents.yaml"])
    assert not (tmp_path / "out" / "documents.json").exists()
