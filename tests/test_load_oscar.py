"""Token ids: equal to a slow loop over documents and pieces, whatever the batch, the process count and the source."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import signal

import pytest
import torch
from helpers import load_script, save_tiny, tiny_tokenizer

from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import tokenizer_id
from cpt_utils.measures import tokenids

script = load_script("lsn/load_oscar.py")
corpus, foreign = script.corpus, script.foreign

WORDS = ["an", "bhean", "агус", "l'homme", "学校", "über", "12", "الكتاب", "."]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def make_documents(n: int, seed: int = 0) -> list[list[str]]:
    """Documents of 1 to 4 pieces of 1 to 12 words, in several scripts."""
    draw = random.Random(seed)
    return [[" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(draw.randint(1, 4))] for _ in range(n)]


def text_file(path, documents):
    text = "\n".join(" ".join(document) for document in documents) + "\n\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def parquet_file(path, documents, column="text"):
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "images": [{"img_idx": "image_0", "sha512": "0", "url": "u"}],
            "metadata": [{"node_order": "image_0|text_0", "url": "u"}],
            column: [{"text": piece, "text_idx": f"text_{i}"} for i, piece in enumerate(document)],
        }
        for document in documents
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    return path


def slow(documents, tokenizer_folder, target=None) -> list[int]:
    """Every piece by itself through transformers, one after the other."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = []
    for document in documents:
        for piece in document:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids[:target]


def command(tokenizer, out, *more, languages="ga", tokens=10**6):
    flags = {"--languages": languages, "--model-id": "org/m", "--tokenizer": tokenizer, "--output-dir": out}
    return script.main([*(str(part) for flag in flags.items() for part in flag), "--tokens", str(tokens), *more])


def ids_of(out, lang="ga"):
    return tokenids.read(out / f"oscar.{lang}.train.org_m")


def fails(message, *args, **kwargs):
    with pytest.raises(InputError, match=message) as error:
        command(*args, **kwargs)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the ids


def test_equals_a_slow_loop_whatever_the_batch(tmp_path, tokenizer, capsys, monkeypatch):
    documents = make_documents(120)
    file = parquet_file(tmp_path / "ga.parquet", documents)
    everything = slow(documents, tokenizer)
    target = len(everything) - 101  # in the middle of a piece
    written = {}
    for batch in (1, 7, 1000):
        out = tmp_path / str(batch)
        more = ("--parquet", f"ga={file}", "--batch-documents", str(batch))
        assert command(tokenizer, out, *more, tokens=target) == 0
        ids, facts = ids_of(out)
        assert ids.dtype == torch.int32 and ids.tolist() == everything[:target]
        assert facts["complete"] and facts["n_tokens"] == target and facts["language"] == "gle_Latn"
        payload = {k: v for k, v in json.loads((out / "oscar.ga.train.org_m.json").read_text()).items() if k[0] != "_"}
        written[batch] = (out / "oscar.ga.train.org_m").read_bytes(), payload
    assert written[1] == written[7] == written[1000]
    assert facts["vocabulary_sha256"] == tokenizer_id.of_plain_text(tokenizer) and facts["tokenizer"] == str(tokenizer)
    # Which documents were needed, counted slowly.
    lengths = [len(slow([document], tokenizer)) for document in documents]
    needed = next(n for n in range(1, 121) if sum(lengths[:n]) >= target)
    assert facts["n_documents"] == needed
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr(corpus, "BATCH_CHARACTERS", 50)
    command(tokenizer, tmp_path / "small", "--parquet", f"ga={file}", tokens=target)
    assert (tmp_path / "small" / "oscar.ga.train.org_m").read_bytes() == written[1][0]


def test_text_of_one_piece_a_line_equals_parquet_and_the_hub(tmp_path, tokenizer, monkeypatch, capsys):
    documents = [[" ".join(document)] for document in make_documents(40)]
    parts = tmp_path / "hub" / "data" / "gle_Latn"
    parquet_file(parts / "00000.parquet", documents[:25])
    parquet_file(parts / "00001.parquet", documents[25:])
    (tmp_path / "hub" / "README.md").write_text(
        "---\nconfigs:\n- config_name: gle_Latn\n  data_files: data/gle_Latn/*.parquet\n---\n"
    )
    monkeypatch.setattr(corpus, "MOSCAR", str(tmp_path / "hub"))
    files = {
        "text": ["--text", f"ga={text_file(tmp_path / 'ga.txt', documents)}"],
        "gz": ["--text", f"gle_Latn={text_file(tmp_path / 'ga.gz', documents)}"],
        "folder": ["--parquet", f"ga={parts}"],
        "glob": ["--parquet", f"ga={parts}/*.parquet"],
        "hub": [],
    }
    everything = slow(documents, tokenizer)
    for name, flags in files.items():
        assert command(tokenizer, tmp_path / name, *flags) == 0
        ids, facts = ids_of(tmp_path / name)
        assert ids.tolist() == everything, name
        assert not facts["complete"] and facts["n_documents"] == 40
        assert f"the text ends at {len(everything):,} of 1,000,000 tokens" in capsys.readouterr().err
    assert facts["text"] == {
        "source": "moscar", "dataset": str(tmp_path / "hub"), "config": "gle_Latn", "split": "train", "revision": None,
    }  # fmt: skip
    text = ids_of(tmp_path / "text")[1]["text"]
    assert text["source"] == "text" and text["files"][0]["path"] == str(tmp_path / "ga.txt")


def test_int64_and_limit(tmp_path, tokenizer):
    documents = [[" ".join(document)] for document in make_documents(9)]
    file = text_file(tmp_path / "t", documents)
    command(tokenizer, tmp_path, "--text", f"ga={file}", "--int64", "--limit", "3", "--batch-documents", "2")
    with pytest.raises(InputError, match="--limit 3"):
        ids_of(tmp_path)
    ids, facts = tokenids.read(tmp_path / "oscar.ga.train.org_m", allow_limited=True)
    assert ids.dtype == torch.int64 and ids.tolist() == slow(documents[:3], tokenizer)
    assert facts["n_documents"] == 3 and facts["limit"] == 3


def test_a_tokenizer_in_python_and_its_odd_ids(tmp_path):
    def rows(pieces):
        return [[ord(letter) for letter in piece] for piece in pieces]

    def run(target, dtype="<i4", encode=rows):
        with open(tmp_path / "ids", "wb") as sink:
            return script.tokenize(
                corpus.batches([["ab", "", "cd"], ["ef"]], 1), encode, None, False, target, sink, dtype
            )

    found = run(5)
    assert (tmp_path / "ids").read_bytes() == b"".join(ord(c).to_bytes(4, "little") for c in "abcde")
    assert (found["tokens"], found["documents"], found["pieces"]) == (5, 2, 3)
    assert run(3)["documents"] == 1
    with pytest.raises(InputError, match="ids beyond int32; give --int64"):
        run(5, encode=lambda pieces: [[2**31] for _ in pieces])
    assert run(5, "<i8", lambda pieces: [[2**31] for _ in pieces])["tokens"] == 3
    with pytest.raises(InputError, match="the tokenizer yields no tokens for the 3 pieces of ga"):
        script.refuse_nothing("ga", run(5, encode=lambda pieces: [[] for _ in pieces]))


def test_special_tokens_in_the_text_are_text_and_nulls_are_none(tmp_path, tokenizer, capsys):
    """Against the bytes themselves: a tag of HTML is its letters. Counts end at the cut, whatever the batches."""
    from transformers import AutoTokenizer

    documents = [["Bhí <s>5 euro</s> air"], [None], ["agus", None, "<pad>"], [None, "a"], ["slán"], [None]]
    file = parquet_file(tmp_path / "ga.parquet", documents)
    vocabulary = AutoTokenizer.from_pretrained(tokenizer).get_vocab()
    byte_ids = {byte: vocabulary[symbol] for byte, symbol in bytes_to_symbols().items()}
    wanted = [byte_ids[byte] for document in documents for piece in document if piece for byte in piece.encode()]
    special = [vocabulary[token] for token in ("<s>", "</s>", "<pad>")]
    for batch in ("1", "2", "1000"):
        more = ("--parquet", f"ga={file}", "--batch-documents", batch)
        assert command(tokenizer, tmp_path / batch, *more) == 0
        ids, facts = ids_of(tmp_path / batch)
        assert ids.tolist() == wanted and not set(special) & set(wanted)
        assert (facts["n_documents"], facts["n_pieces"]) == (4, 5)
        assert (facts["n_special_pieces"], facts["n_null_pieces"]) == (2, 4)
        said = capsys.readouterr()
        assert "ga: 2 pieces hold the text of a special token (such as <s>), tokenized as the text" in said.out
        assert "ga: 4 texts are null" in said.err
        # Cut within the second document's last piece: one null piece and one null document stood before it.
        target = sum(len(piece.encode()) for piece in ("Bhí <s>5 euro</s> air", "agus")) + 2
        command(tokenizer, tmp_path / f"cut{batch}", *more, tokens=target)
        ids, facts = ids_of(tmp_path / f"cut{batch}")
        assert ids.tolist() == wanted[:target]
        assert (facts["n_special_pieces"], facts["n_null_pieces"], facts["n_documents"]) == (2, 2, 2)


def bytes_to_symbols() -> dict[int, str]:
    """How a byte-level tokenizer writes each byte."""
    from tokenizers import pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    symbols = {}
    for code in range(0x800):  # every byte but those that only begin longer characters, and those that begin none
        found = "".join(part for part, _ in level.pre_tokenize_str(chr(code)))
        symbols |= dict(zip(chr(code).encode(), found, strict=True))
    return symbols


def test_marks_of_byte_order_and_files_that_are_no_text(tmp_path, tokenizer, capsys):
    (tmp_path / "a.txt").write_bytes("\ufeffdia duit\r\n\ufeffslán\n".encode())
    command(tokenizer, tmp_path / "a", "--text", f"ga={tmp_path / 'a.txt'}")
    assert ids_of(tmp_path / "a")[0].tolist() == slow([["dia duit"], ["slán"]], tokenizer)
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "dia duit"}\n{"text": [{"text": "slán"}]}\n', encoding="utf-8")
    command(tokenizer, tmp_path / "b", "--text", f"ga={tmp_path / 'a.jsonl'}")
    assert ids_of(tmp_path / "b")[0].tolist() == slow([["dia duit"], ["slán"]], tokenizer)
    for name, message in (("a.csv", "is a table"), ("a.zst", "is compressed or an archive"), ("a.docx", "a document")):
        (tmp_path / name).write_text("id,text\n")
        fails(message, tokenizer, tmp_path / "c", "--text", f"ga={tmp_path / name}")


def test_an_older_file_is_kept_and_said_to_be_older(tmp_path, tokenizer, capsys):
    file = text_file(tmp_path / "t", [["dia duit"]])
    command(tokenizer, tmp_path, "--text", f"ga={file}")
    side = tokenids.sidecar(tmp_path / "oscar.ga.train.org_m")
    side.write_text(json.dumps({k: v for k, v in json.loads(side.read_text()).items() if k != "n_special_pieces"}))
    capsys.readouterr()
    command(tokenizer, tmp_path, "--text", f"ga={file}")
    said = capsys.readouterr()
    assert "is finished" in said.out and "in which a special token's text (such as <s>) became" in said.err


# ---------------------------------------------------------------- several languages


def test_processes_write_what_one_process_writes_and_one_that_fails_stops_no_other(tmp_path, tokenizer, capfd):
    file = text_file(tmp_path / "ga", [[" ".join(document)] for document in make_documents(50)])
    (tmp_path / "fr").write_bytes(b"bon\n\xff\xfe jour\n")
    flags = ("--text", f"ga={file}", "--text", f"fr={tmp_path / 'fr'}")
    for jobs in ("1", "2"):
        more = ("--max-concurrent", jobs)
        assert command(tokenizer, tmp_path / jobs, *flags, *more, languages="fr,ga", tokens=900) == 1
        captured = capfd.readouterr()
        last = captured.err.strip().splitlines()[-1]
        assert last.startswith("error: failed: fr (") and "cannot be read as UTF-8 text" in last
        assert "900 tokens of" in captured.out and "fr:" not in captured.out
        names = sorted(file.name for file in (tmp_path / jobs).iterdir())
        assert names == ["oscar.ga.train.org_m", "oscar.ga.train.org_m.json"]
    found = [(tmp_path / jobs / "oscar.ga.train.org_m").read_bytes() for jobs in ("1", "2")]
    assert found[0] == found[1]
    facts = [ids_of(tmp_path / jobs)[1] for jobs in ("1", "2")]
    for entry in facts:
        del entry["time"], entry["git_commit"]  # somebody may commit meanwhile
    assert facts[0] == facts[1]


def test_a_process_that_dies_is_a_language_that_failed(monkeypatch):
    monkeypatch.setattr(script.sys, "executable", "/bin/false")
    assert script.processes.in_process({}, print, 1, []) == {"error": "its process ended with 1"}


def test_killed_half_way_leaves_nothing_and_a_rerun_writes_the_same(tmp_path, tokenizer):
    file = text_file(tmp_path / "t", [[" ".join(document)] for document in make_documents(50)])
    arguments = ["--languages", "ga", "--model-id", "m", "--tokenizer", str(tokenizer), "--text", f"ga={file}"]
    arguments += ["--tokens", "2000", "--batch-documents", "5", "--output-dir"]
    out, read = tmp_path / "out", script.corpus.batches

    def dies(*args):
        yield from itertools.islice(read(*args), 4)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        script.corpus.batches = dies
        script.main([*arguments, str(out)])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert list(out.iterdir()) == []
    for folder in ("out", "unbroken"):
        assert script.main([*arguments, str(tmp_path / folder)]) == 0
    assert (out / "oscar.ga.train.m").read_bytes() == (tmp_path / "unbroken" / "oscar.ga.train.m").read_bytes()


def test_finished_files_are_kept_and_others_refused(tmp_path, tokenizer, capsys):
    file = text_file(tmp_path / "t", [[" ".join(document)] for document in make_documents(30)])
    more = ("--text", f"ga={file}")
    command(tokenizer, tmp_path, *more, tokens=300)
    path = tmp_path / "oscar.ga.train.org_m"
    before = path.stat().st_mtime_ns
    capsys.readouterr()
    moved = text_file(tmp_path / "sub.txt", [])
    moved.write_bytes(file.read_bytes())
    moved = moved.rename(tmp_path / "t2")
    assert command(tokenizer, tmp_path, *more, "--batch-documents", "3", tokens=300) == 0
    assert "is finished: 300 tokens (--overwrite" in capsys.readouterr().out and path.stat().st_mtime_ns == before
    told = r"is of another request \(tokens: 301 asked for, 300 in the file\); give --overwrite"
    fails(told, tokenizer, tmp_path, *more, tokens=301)
    told = "filter: script asked for, none in the file; report_only: true asked for, false in the file"
    fails(told, tokenizer, tmp_path, *more, "--filter=script", "--filter-report", tokens=300)
    other = text_file(tmp_path / "other", [["x" * 500]])
    fails(r"another request \(text", tokenizer, tmp_path, "--text", f"ga={other}", tokens=300)
    command(tokenizer, tmp_path, "--text", f"ga={other}", "--overwrite", tokens=300)
    assert len(set(ids_of(tmp_path)[0].tolist())) == 1
    tokenids.sidecar(path).unlink()
    fails("how the file was made is not known", tokenizer, tmp_path, *more, tokens=300)


# ---------------------------------------------------------------- filters


def test_scripts_by_letters_against_a_slow_loop():
    import unicodedata

    pieces = [piece for document in make_documents(200) for piece in document] + [
        "",
        "12 .",
        "aб",
        "abб",
        "日本のテスト",
    ]
    judged = foreign.script_judge(foreign.scripts_of("gle_Latn"))(pieces)
    for piece, found in zip(pieces, judged, strict=True):
        letters = [c for c in piece if unicodedata.category(c)[0] == "L"]
        latin = [c for c in letters if unicodedata.name(c).startswith("LATIN")]
        assert (found == "") == (not letters or len(latin) > len(letters) / 2), piece
    assert foreign.script_judge(foreign.scripts_of("jpn_Jpan"))(["日本のテスト", "Tokyo", ""]) == ["", "other", ""]
    assert foreign.script_judge(foreign.scripts_of("cmn_Hans"))(["学校", "テスト"]) == ["", "other"]


def test_every_language_of_the_table_names_a_script():
    from cpt_utils.base import languages

    assert [code for code in languages.known() if not foreign.scripts_of(code)] == []
    assert foreign.scripts_of("qaa_Latn") == ("Latn",)
    assert foreign.scripts_of("xx") == foreign.scripts_of("my_Tagg") == ()


@pytest.mark.parametrize("batch", [1, 4, 1000])
def test_the_script_filter_drops_and_reports(tmp_path, tokenizer, capsys, batch):
    documents = [["Tá sé go maith"], ["это по-русски", "agus anseo"], ["12"], ["снова"], ["slán"], ["конец"]]
    file = parquet_file(tmp_path / "p.parquet", documents)
    more = ("--parquet", f"ga={file}", "--batch-documents", str(batch))
    kept = slow([["Tá sé go maith"], ["agus anseo"], ["12"], ["slán"]], tokenizer)
    everything = slow(documents, tokenizer)
    command(tokenizer, tmp_path / "f", *more, "--filter", "script")
    ids, facts = ids_of(tmp_path / "f")
    found = facts["contamination"]
    assert ids.tolist() == kept and found["dropped"]
    assert (found["other_pieces"], found["pieces"]) == (3, 7) and facts["n_documents"] == 6
    assert (found["other_tokens"], found["tokens"]) == (len(everything) - len(kept), len(everything))
    assert "42.86% of the pieces" in capsys.readouterr().out
    for name, flags in (("r", ("--filter", "script", "--filter-report")), ("n", ())):
        command(tokenizer, tmp_path / name, *more, *flags)
        ids, facts = ids_of(tmp_path / name)
        assert ids.tolist() == everything and facts["contamination"] == found | {"dropped": False}
    # Cut within the last kept piece: what comes after it is not counted.
    command(tokenizer, tmp_path / "c", *more, "--filter", "script", tokens=len(kept) - 1)
    ids, facts = ids_of(tmp_path / "c")
    assert ids.tolist() == kept[:-1] and (facts["contamination"]["pieces"], facts["n_documents"]) == (6, 5)


def test_the_language_filter(tmp_path, tokenizer, capsys):
    pytest.importorskip("py3langid", reason="py3langid is not installed (pip install py3langid)")
    irish = "Tá an aimsir go hálainn inniu agus beidh na páistí ag súgradh sa pháirc tar éis na scoile."
    english = "The weather is lovely today and the children will be playing in the park after school."
    french = "Il fait très beau aujourd'hui et les enfants joueront dans le parc après l'école."
    documents = [[irish, english], [english], [french], ["1234"], [irish]]
    file = parquet_file(tmp_path / "p.parquet", documents)
    command(tokenizer, tmp_path, "--parquet", f"ga={file}", "--filter", "language")
    ids, facts = ids_of(tmp_path)
    assert ids.tolist() == slow([[irish], ["1234"], [irish]], tokenizer)
    assert facts["contamination"]["most_frequent"] == {"en": 2, "fr": 1}
    assert "50.00% of the pieces" in capsys.readouterr().out
    fails("py3langid does not know qaa_Latn", tokenizer, tmp_path / "x", "--filter=language",
          "--text", f"qaa_Latn={text_file(tmp_path / 't', [['a']])}", languages="qaa_Latn")  # fmt: skip


def test_the_language_filter_without_the_library(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(foreign.importlib.util, "find_spec", lambda name: None)
    file = text_file(tmp_path / "t", [["a"]])
    fails(
        "needs py3langid: pip install py3langid", tokenizer, tmp_path / "x", "--text", f"ga={file}", "--filter=language"
    )


# ---------------------------------------------------------------- what is refused, and studies


def test_what_is_refused_leaves_nothing(tmp_path, tokenizer, capsys, monkeypatch):
    out = tmp_path / "out"
    file = text_file(tmp_path / "t", [["a b"]])
    text = ("--text", f"ga={file}")
    fails("unknown language 'zq'", tokenizer, out, languages="zq")
    fails("languages asked for: nothing for en", tokenizer, out, "--text", f"en={file}")
    fails("ga=.*nowhere: no such file", tokenizer, out, "--text", f"ga={tmp_path / 'nowhere'}")
    fails("no parquet files there", tokenizer, out, "--parquet", f"ga={tmp_path}")
    fails("the text of ga is given twice", tokenizer, out, *text, "--parquet", f"gle_Latn={file}")
    fails("write LANGUAGE=FILE", tokenizer, out, "--text", "ga")
    fails("ga and gle_Latn are one language", tokenizer, out, languages="ga,gle_Latn")
    fails("cannot be part of a file name", tokenizer, out, languages="g.a")
    fails("--languages .study key languages.lsn. names no language", tokenizer, out, languages=",")
    fails("--revision applies to mOSCAR", tokenizer, out, *text, "--revision", "main")
    fails("give --filter script or", tokenizer, out, *text, "--filter-report")
    fails("no tokenizer files", save_tiny("llama", tmp_path / "bare", tokenizer=False), out, *text)
    fails("tag names no script", tokenizer, out, "--text", f"tag={file}", "--filter", "script", languages="tag")
    with pytest.raises(InputError, match=r"nothing says languages lsn: give --languages, or the key languages\.lsn"):
        script.main([])
    with pytest.raises(InputError, match="nothing says name: give --model-id"):
        script.main(["--languages", "ga", *text])
    assert not out.exists()

    def one_fails(message, *more, **kwargs):
        assert command(tokenizer, out, *more, **kwargs) == 1
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
        assert not out.exists() or list(out.iterdir()) == []

    one_fails("has no column 'text' (it has: images, metadata, words)", "--parquet",
              f"ga={parquet_file(tmp_path / 'w.parquet', [['a']], 'words')}")  # fmt: skip
    one_fails("is not a readable parquet file", "--parquet", f"ga={file}")
    one_fails("the text of ga is empty", "--text", f"ga={text_file(tmp_path / 'e', [])}")
    one_fails("the filter drops every piece", *("--text", f"ru={file}", "--filter=script"), languages="ru")
    # Offline, as all tests are: nothing of mOSCAR is in the cache.
    monkeypatch.setattr(corpus, "MOSCAR", "no-such-user-of-ours/mOSCAR")
    one_fails("it needs a network (and `hf auth login` if it is gated), or give local files")

    def gated(*_):
        raise InputError("it is gated: accept its terms; a local copy works too: --data-dir")

    monkeypatch.setattr(corpus.hub_data, "revision", gated)
    fails("is gated: .* works too: --parquet LANGUAGE=FOLDER", tokenizer, out)


def test_without_arguments_in_a_study(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny("llama", tmp_path / "base")
    documents = [[" ".join(document)] for document in make_documents(30)]
    text_file(tmp_path / "irish.txt", documents)
    study = "name: mine\nbase: base\nlanguages: {lsn: [ga]}\ntokens: ids\nlsn: {tokens: 500}\ndata: {lsn_text: {%s}}\n"
    (tmp_path / "study.yaml").write_text(study % "gle_Latn: irish.txt")
    assert script.main([]) == 0
    ids, facts = tokenids.read(
        "ids/oscar.ga.train.mine", vocabulary_sha256=tokenizer_id.of_plain_text(tmp_path / "base")
    )
    assert ids.tolist() == slow(documents, tmp_path / "base", 500) and facts["tokenizer"] == "base"
    assert script.main(["--tokens", "100", "--model-id", "other"]) == 0
    assert len(tokenids.read("ids/oscar.ga.train.other")[0]) == 100
    for text, message in (
        (study % "ga: nowhere.txt", "data.lsn_text ga: nowhere.txt: no such file"),
        ((study % "ga: irish.txt").replace("500", "many"), "lsn.tokens is 'many'"),
        ((study % "ga: irish.txt").replace("[ga]", "[no]"), "put the code in quotes"),
    ):
        (tmp_path / "study.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            script.main([])


def test_a_tag_without_a_script_is_read_from_text(tmp_path, tokenizer, capsys):
    file = text_file(tmp_path / "t", [["a b"]])
    assert command(tokenizer, tmp_path, "--text", f"tag={file}", languages="tag", tokens=2) == 0
    assert ids_of(tmp_path, "tag")[1]["contamination"] is None
    assert "no share of other scripts" in capsys.readouterr().out
    assert results.read_json(tmp_path / "oscar.tag.train.org_m.json", "token-ids")[1]["language"] == "tag"
