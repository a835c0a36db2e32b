"""studies/swahili/texts.py: what is held out is in nothing that is trained on, and every text has one place."""

from __future__ import annotations

import gzip
import itertools
import json
import random

import pytest
from helpers import load_script

from cpt_utils.base.errors import InputError

WORDS = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=3)]


@pytest.fixture(scope="module")
def script():
    return load_script("studies/swahili/texts.py")


def sentence(number: int) -> str:
    """No two of them share thirteen words in a row."""
    return " ".join(random.Random(number).choices(WORDS, k=20))


@pytest.fixture
def sources(tmp_path):
    """A news folder and a SIB-200 of which some texts are trained on and held out."""
    texts = {
        f"masakhanews.{lang}.txt": [sentence(1000 * i + j) for j in range(24)]
        for i, lang in enumerate(("swh", "eng", "fra"))
    }
    for i, part in enumerate(("train", "dev", "test")):
        for j, lang in enumerate(("swh", "eng")):
            texts[f"lafand.{part}.{lang}"] = [sentence(5000 + 1000 * i + 100 * j + k) for k in range(20)]
    sib = {"swh_Latn": [sentence(9000 + k) for k in range(3)], "eng_Latn": [sentence(9100 + k) for k in range(3)]}
    texts["lafand.train.swh"][3] = "Before it: " + texts["lafand.test.swh"][0].upper()  # shared, in capitals
    texts["lafand.train.swh"][4] = texts["lafand.train.swh"][5]
    texts["lafand.train.swh"][6] = ""
    texts["masakhanews.swh.txt"][0] += " " + sib["swh_Latn"][1]
    texts["masakhanews.eng.txt"][1] += ". " + texts["masakhanews.eng.txt"][2]  # the second is held out
    texts["lafand.dev.swh"][0] = "Short line"
    texts["lafand.train.swh"][9] = "short: LINE!"
    news = tmp_path / "news"
    news.mkdir()
    for name, lines in texts.items():
        with gzip.open(news / f"{name}.gz", "wt") as file:
            file.write("".join(f"{line}\n" for line in lines))
    for code, lines in sib.items():
        (tmp_path / "sib" / code).mkdir(parents=True)
        for part, line in zip(("train", "dev", "test"), lines, strict=True):
            (tmp_path / "sib" / code / f"{part}.tsv").write_text(f"index_id\tcategory\ttext\n1\tnews\t{line}\n")
    return news, tmp_path / "sib", texts


def test_nothing_held_out_is_trained_on(script, sources, tmp_path):
    news, sib, texts = sources
    out = tmp_path / "out"
    script.main(["--news", str(news), "--sib200", str(sib), "--output-dir", str(out)])
    said = json.loads((out / "texts.json").read_text())
    lines = {file.stem: file.read_text().splitlines() for file in out.glob("*.txt")}
    assert {name: size["documents"] for name, size in said["texts"].items()} == {k: len(v) for k, v in lines.items()}

    assert said["left_out"]["lafand.train.swh"] == {"shared": 2, "repeated": 1, "empty": 1}
    assert said["left_out"]["cpt.swh"] == said["left_out"]["cpt.eng"] == {"shared": 1, "repeated": 0, "empty": 0}
    trained = " ".join(lines["cpt.swh"] + lines["cpt.eng"])
    held_out = [line for name in texts if "dev" in name or "test" in name for line in texts[name]]
    held_out += [line for name in lines if not name.startswith("cpt") for line in lines[name]]
    assert not [line for line in held_out if line.lower() in trained.lower()]
    kept = [line for i, line in enumerate(texts["lafand.train.swh"]) if i not in (3, 5, 6, 9)]
    assert sum(line in trained for line in kept) == len(kept) == 16

    articles = texts["masakhanews.fra.txt"]
    assert lines["heldout.fra"] == [articles[2], articles[14]]
    assert lines["lsn.fra"] == [articles[i] for i in (5, 11, 17, 23)]
    assert "cpt.fra" not in lines


def test_openings(script, monkeypatch):
    monkeypatch.setattr(script, "LENGTH", 12)
    said = {
        "One. Two. Three. Four.": "One. Two.",
        "A long sentence. B.": "A long sentence.",
        "No end of it": "No end of it",
    }
    assert {article: script.opening(article) for article in said} == said


def test_runs_of_words(script):
    text = " ".join(WORDS[:15])
    assert script.runs(text) == {tuple(WORDS[i : i + 13]) for i in range(3)}
    assert script.runs("Two, words") == {("two", "words")}
    assert script.runs(" . ") == set()


def test_no_such_folder(script, sources, tmp_path):
    news, sib, _ = sources
    for folders, word in (((tmp_path / "none", sib), "--news"), ((news, tmp_path / "none"), "none")):
        with pytest.raises(InputError, match=word):
            script.main([*map(str, ("--news", folders[0], "--sib200", folders[1], "--output-dir", tmp_path / "o"))])
    assert not (tmp_path / "o").exists()
