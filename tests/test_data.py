"""Parallel sources on made-up files, on a stand-in for the hub, and on SIB-200 where a local copy is named."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from pathlib import Path

import pytest
from helpers import shared_dir

from cpt_utils.base import sources
from cpt_utils.base.errors import InputError
from cpt_utils.base.sources import flores as flores_plus
from cpt_utils.base.sources import sib200
from cpt_utils.base.study import Study
from cpt_utils.measures import tasks

PAIRS = {"3": ("three", "trí"), "1": ("one", "aon"), "10": ("ten", "deich"), "2": ("two", "dó")}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_bytes(text.encode())
    return path


def jsonl(path: Path, rows) -> Path:
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def flores(folder: Path, split: str = "dev") -> Path:
    """A FLORES+-like folder: ids as numbers in one language and as text in the other, in another order."""
    jsonl(folder / split / "eng_Latn.jsonl", [{"id": int(i), "text": a} for i, (a, _) in PAIRS.items()])
    jsonl(folder / split / "gle_Latn.jsonl", [{"id": i, "text": b} for i, (_, b) in sorted(PAIRS.items())])
    return folder


def sib(folder: Path, code: str, texts: dict[str, list[tuple]]) -> None:
    for split in ("train", "dev", "test"):
        file = io.StringIO()  # as pandas writes
        rows = texts.get(split, [(f"9{split}", "travel", "x")])
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([("index_id", "category", "text"), *rows])
        write(folder / code / f"{split}.tsv", file.getvalue())


# --- flores ---


def test_flores_folder_is_aligned_by_id_in_natural_order(tmp_path):
    pairs = sources.parallel("flores", "en", "gle_Latn", dir=flores(tmp_path))
    assert pairs.ids == ["1", "2", "3", "10"]
    assert pairs.base == ["one", "two", "three", "ten"]
    assert pairs.target == ["aon", "dó", "trí", "deich"]
    facts = pairs.describe()
    assert facts["source"] == "flores" and facts["split"] == "dev" and facts["aligned_by"] == "id"
    assert facts["base"]["lang"] == "en" and facts["base"]["canonical"] == "eng_Latn"
    file = tmp_path / "dev" / "gle_Latn.jsonl"
    assert facts["target"]["files"] == {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}
    assert (facts["n_used"], facts["n_available"], facts["limit"]) == (4, 4, None)
    assert json.loads(json.dumps(facts)) == facts
    assert "4 sentence pairs en-gle_Latn from flores dev, aligned by id" in pairs.summary()


def test_a_limit_that_leaves_nothing_out_is_none(tmp_path):
    whole = sources.parallel("flores", "eng_Latn", "gle_Latn", dir=flores(tmp_path))
    assert sources.parallel("flores", "eng_Latn", "gle_Latn", dir=tmp_path, limit=4).describe() == whole.describe()


def test_repeated_sentences_are_counted(tmp_path):
    lines = {"a": ["one", "two", "one", "one ", "four", "two", "One"], "b": ["1", "2", "3", "4", "5", "6", "7"]}
    for name, own in lines.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"{line}\n" for line in own))
    pairs = sources.parallel("text", "eng_Latn", "gle_Latn", tmp_path, "a.txt", "b.txt")
    assert pairs.repeated == pairs.describe()["repeated"] == {"base": 4}  # another case or a space is another sentence
    assert pairs.alone == [0, 1, 3, 4, 6]
    assert pairs.summary().endswith("; 4 sentences of eng_Latn occur more than once, and finding any copy counts")
    few = sources.parallel("text", "eng_Latn", "gle_Latn", tmp_path, "a.txt", "b.txt", limit=2)
    assert "repeated" not in few.describe() and few.summary().endswith("aligned by line")


def test_limit_takes_the_first_ids_and_is_recorded(tmp_path):
    pairs = sources.parallel("flores", "eng_Latn", "gle_Latn", dir=flores(tmp_path), limit=2)
    assert pairs.ids == ["1", "2"] and len(pairs) == 2
    facts = pairs.describe()
    assert (facts["n_used"], facts["n_available"], facts["limit"]) == (2, 4, 2)
    assert "2 of 4" in pairs.summary()
    whole = sources.parallel("flores", "eng_Latn", "gle_Latn", dir=tmp_path).describe()
    assert facts["pairs_sha256"] != whole["pairs_sha256"]


def test_both_directions_and_one_language_with_itself(tmp_path):
    flores(tmp_path)
    there = sources.parallel("flores", "en", "ga", dir=tmp_path)
    back = sources.parallel("flores", "ga", "en", dir=tmp_path)
    assert (there.ids, there.base, there.target) == (back.ids, back.target, back.base)
    itself = sources.parallel("flores", "ga", "ga", dir=tmp_path)
    assert itself.base == itself.target


def test_ids_of_one_side_only_are_left_out_and_counted(tmp_path):
    flores(tmp_path)
    jsonl(tmp_path / "dev" / "gle_Latn.jsonl", [{"id": 10, "text": "deich"}, {"id": 77, "text": "x"}])
    pairs = sources.parallel("flores", "en", "ga", dir=tmp_path)
    assert (pairs.ids, pairs.n_available) == (["10"], 1)
    assert pairs.facts["only_in_base"] == 3 and pairs.facts["only_in_target"] == 1
    assert "3 only in en, 1 only in ga: left out" in pairs.summary()


def test_parquet_and_tsv_and_other_spellings(tmp_path):
    import pandas

    pandas.DataFrame({"id": [1, 2], "text": ["one", "two"], "url": ["", ""]}).to_parquet(tmp_path / "eng_Latn.parquet")
    write(tmp_path / "zho_Hans.tsv", 'id\ttext\n2\t"二" says "x"\n1\t一\n')
    pairs = sources.parallel("flores", "eng_Latn", "cmn_Hans", dir=tmp_path)
    assert pairs.base == ["one", "two"] and pairs.target == ["一", '"二" says "x"']
    assert pairs.facts["target"]["spelling"] == "zho_Hans"
    write(tmp_path / "cmn_Hans.jsonl", '{"id": 1, "text": "一"}\n')
    assert sources.parallel("flores", "eng_Latn", "cmn_Hans", dir=tmp_path).ids == ["1"]
    with pytest.raises(InputError, match="cmn_Hans and zho_Hans both mean zh"):
        sources.parallel("flores", "eng_Latn", "zh", dir=tmp_path)
    write(tmp_path / "cmn_Hans.tsv", "id\ttext\n1\t一\n")
    with pytest.raises(InputError, match=r"cmn_Hans.jsonl and cmn_Hans.tsv are both cmn_Hans"):
        sources.parallel("flores", "eng_Latn", "cmn_Hans", dir=tmp_path)


def test_rows_that_name_their_split_are_held_to_it(tmp_path):
    for code in ("eng_Latn", "gle_Latn"):
        jsonl(tmp_path / f"{code}.jsonl", [{"id": 1, "text": "x", "split": "devtest"}])
    assert sources.parallel("flores", "en", "ga", dir=tmp_path, split="devtest").ids == ["1"]
    with pytest.raises(InputError, match="holds the split devtest, not dev; give --split devtest"):
        sources.parallel("flores", "en", "ga", dir=tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 1, "text": "a"}, {"id": "1", "text": "b"}], "id 1 appears twice"),
        ([{"id": 1, "text": "  "}], "gle_Latn sentence of id 1 is empty; .* leave out such pairs with --drop-empty"),
        ([{"id": i, "text": ""} for i in (10, 2, 1)], "of id 1 is empty, and 2 more pairs have an empty side; fill it"),
        ([{"id": 1, "text": None}], "gle_Latn sentence of id 1 is empty"),
        ([{"id": 901, "text": "a"}], "no sentence in common: eng_Latn has 1 .. 10 and gle_Latn has 901 .. 901"),
        ([{"id": None, "text": "a"}], "a row has no id"),
        ([{"id": 1, "sentence": "a"}], "no column text; it has id, sentence"),
        ([], "holds no rows"),
        ([[1]], "line 1 is not a JSON object"),
    ],
)
def test_bad_rows(tmp_path, rows, message):
    flores(tmp_path)
    jsonl(tmp_path / "dev" / "gle_Latn.jsonl", rows)
    with pytest.raises(InputError, match=message) as error:
        sources.parallel("flores", "eng_Latn", "gle_Latn", dir=tmp_path)
    assert "\n" not in str(error.value)


def test_ids_with_digits_that_are_not_decimal(tmp_path):
    """Verses and footnotes: `²` is a digit that int() does not read; Arabic-Indic digits are decimal."""
    ids = ["Ps1:10", "Ps1:2²", "²", "Ps1:2", "٣", "١٢", "½", "①", "v1", ""]
    for code in ("eng_Latn", "gle_Latn"):
        jsonl(tmp_path / f"{code}.jsonl", [{"id": i, "text": f"{code} {i}"} for i in ids[:-1]])
    pairs = sources.parallel("flores", "en", "ga", dir=tmp_path)
    assert sorted(pairs.ids) == sorted(ids[:-1])
    assert [i for i in pairs.ids if i[0] in "Pv"] == ["Ps1:2", "Ps1:2²", "Ps1:10", "v1"]
    assert pairs.ids[:2] == ["٣", "١٢"]
    assert pairs.base == [f"eng_Latn {i}" for i in pairs.ids]


def test_pairs_with_an_empty_side_are_dropped_where_asked(tmp_path):
    flores(tmp_path)
    rows = [{"id": 1, "text": None}, {"id": 2, "text": "dó"}, {"id": 3, "text": " "}, {"id": 10, "text": "deich"}]
    jsonl(tmp_path / "dev" / "gle_Latn.jsonl", rows)
    pairs = sources.parallel("flores", "en", "ga", dir=tmp_path, drop_empty=True)
    assert (pairs.ids, pairs.target, pairs.n_available) == (["2", "10"], ["dó", "deich"], 2)
    assert pairs.describe()["dropped_empty"] == 2 and "(2 with an empty side: left out)" in pairs.summary()
    whole = sources.parallel("flores", "en", "en", dir=tmp_path)
    assert "dropped_empty" not in whole.describe()  # headers of results without the flag stay as they were
    write(tmp_path / "a", "In the beginning\n\nlight\n")
    write(tmp_path / "b", "I dtús\nbhí\n\n")
    text = sources.parallel("text", "en", "ga", base_file=tmp_path / "a", target_file=tmp_path / "b", drop_empty=True)
    assert (text.base, text.target, text.ids) == (["In the beginning"], ["I dtús"], ["1"])
    jsonl(tmp_path / "dev" / "gle_Latn.jsonl", [{"id": 1, "text": ""}])
    with pytest.raises(InputError, match="each of the 1 pairs of en and ga has an empty side"):
        sources.parallel("flores", "en", "ga", dir=tmp_path, drop_empty=True)


def test_drop_empty_from_the_command_line_and_the_study(tmp_path):
    import argparse

    from cpt_utils.base.study import Study

    write(tmp_path / "a", "one\n\n")
    write(tmp_path / "b", "aon\ndó\n")
    parser = argparse.ArgumentParser()
    sources.add_flags(parser)
    parser.add_argument("--limit")
    flags = ["--source", "text", "--base-file", str(tmp_path / "a"), "--target-file", str(tmp_path / "b")]
    source = {"source": "text", "base_file": str(tmp_path / "a"), "target_file": str(tmp_path / "b")}
    for given, values in (([*flags, "--drop-empty"], {}), ([], {"data": source | {"drop_empty": True}})):
        assert sources.from_arguments(parser.parse_args(given), Study(values), "en", "ga").ids == ["1"]
    for given, values in ((flags, {}), ([], {"data": source}), ([], {"data": source | {"drop_empty": False}})):
        with pytest.raises(InputError, match="en sentence of line 2 is empty"):
            sources.from_arguments(parser.parse_args(given), Study(values), "en", "ga")


@pytest.mark.parametrize(
    ("place", "name", "codes"),
    [
        ("flores200_dataset", "{code}.{split}", ("eng_Latn", "zho_Hans")),
        ("flores101_dataset", "{code}.{split}", ("eng", "zho_simpl")),
        ("", "{code}.{split}", ("eng_Latn", "cmn_Hans")),
        ("floresp-v2.0", "{split}.{code}", ("eng_Latn", "cmn_Hans")),
    ],
)
def test_release_archives_of_flores(tmp_path, place, name, codes):
    """Lines aligned by number, in the layout of each release, given as extracted or one folder above."""
    for split in ("dev", "devtest"):
        for code, words in zip(codes, (("one", '"two', "three"), ("一", "二\u2028", "三")), strict=True):
            lines = "".join(f"{word} {split}\n" for word in words)
            write(tmp_path / place / split / name.format(code=code, split=split), lines)
        write(tmp_path / place / f"metadata_{split}.tsv", "URL\tdomain\nx\ty\n")
    folders = [tmp_path / place, *([tmp_path] if place.endswith("_dataset") else [])]
    for folder in folders:
        for split in ("dev", "devtest"):
            pairs = sources.parallel("flores", "en", "zh", dir=folder, split=split)
            assert pairs.base == [f"one {split}", f'"two {split}', f"three {split}"]
            assert pairs.target == [f"一 {split}", f"二\u2028 {split}", f"三 {split}"]
            assert pairs.ids == ["1", "2", "3"] and pairs.facts["aligned_by"] == "line"
            assert pairs.facts["target"]["spelling"] == codes[1]
    file = tmp_path / place / "dev" / name.format(code=codes[1], split="dev")
    file.write_text("一\n")
    with pytest.raises(InputError, match=r"has 3 lines and .* has 1; files without ids are aligned by line"):
        sources.parallel("flores", "en", "zh", dir=tmp_path / place)
    file.unlink()
    jsonl(file.parent / "cmn_Hans.jsonl", [{"id": 1, "text": "一"}])
    with pytest.raises(InputError, match=r"cmn_Hans.jsonl has ids, the other language's file has lines"):
        sources.parallel("flores", "en", "zh", dir=tmp_path / place)


def test_an_archive_that_is_not_extracted(tmp_path):
    write(tmp_path / "flores200_dataset.tar.gz", "")
    for source in ("flores", "sib200"):
        with pytest.raises(InputError, match=r"flores200_dataset.tar.gz is a file; extract it if it is an archive"):
            sources.parallel(source, "en", "zh", dir=tmp_path / "flores200_dataset.tar.gz")


def test_missing_and_damaged_local_files(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        sources.parallel("flores", "en", "ga", dir=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no language files"):
        sources.parallel("flores", "en", "ga", dir=tmp_path / "empty")
    flores(tmp_path)
    with pytest.raises(InputError, match=r"nothing for fr \(fra_Latn\); there is eng_Latn, gle_Latn"):
        sources.parallel("flores", "en", "fr", dir=tmp_path)
    write(tmp_path / "dev" / "fra_Latn.parquet", "no parquet")
    with pytest.raises(InputError, match="not a readable parquet file"):
        sources.parallel("flores", "en", "fr", dir=tmp_path)
    with pytest.raises(InputError, match="unknown language 'eng_Latin'; the nearest are eng_Latn"):
        sources.parallel("flores", "eng_Latin", "gle_Latn", dir=tmp_path)
    with pytest.raises(InputError, match="unknown data source 'flors'"):
        sources.parallel("flors", "en", "ga", dir=tmp_path)
    with pytest.raises(InputError, match="--split train: FLORES"):
        sources.parallel("flores", "en", "ga", dir=tmp_path, split="train")


# --- sib200 ---


def test_sib200_folder(tmp_path):
    sib(
        tmp_path,
        "eng_Latn",
        {"train": [("7", "travel", 'a "quoted'), ("2", "sports", "b")], "test": [("5", "health", '"c", he said')]},
    )
    sib(tmp_path, "zho_Hans", {"train": [("2", "sports", "B"), ("7", "travel", "A")], "test": [("5", "health", "C")]})
    pairs = sources.parallel("sib200", "eng_Latn", "cmn_Hans", dir=tmp_path)
    assert pairs.ids == ["2", "5", "7", "9dev"]
    assert pairs.base == ["b", '"c", he said', 'a "quoted', "x"] and pairs.target == ["B", "C", "A", "x"]
    assert pairs.facts["target"]["spelling"] == "zho_Hans" and len(pairs.facts["base"]["files"]) == 3
    assert sources.parallel("sib200", "en", "zh", dir=tmp_path, split="test").ids == ["5"]
    assert sources.parallel("sib200", "en", "zh", dir=tmp_path, split="validation").ids == ["9dev"]
    assert sib200.rows(tmp_path / "eng_Latn", "test") == [
        {"index_id": "5", "category": "health", "text": '"c", he said'}
    ]
    with pytest.raises(InputError, match="--split devtest: SIB-200 has"):
        sources.parallel("sib200", "en", "zh", dir=tmp_path, split="devtest")
    (tmp_path / "zho_Hans" / "dev.tsv").unlink()
    with pytest.raises(InputError, match=r"dev.tsv does not exist"):
        sources.parallel("sib200", "en", "zh", dir=tmp_path)


def test_sib200_line_with_another_number_of_columns(tmp_path):
    sib(tmp_path, "eng_Latn", {})
    write(tmp_path / "eng_Latn" / "test.tsv", "index_id\tcategory\ttext\n1\ttravel\ta\n2\tb\n")
    with pytest.raises(InputError, match=r"test.tsv, line 3: 2 fields instead of 3"):
        sources.parallel("sib200", "en", "en", dir=tmp_path)


def test_real_sib200():
    shared = shared_dir()
    if not shared:
        pytest.skip("no SIB-200 files: SHARED_DIR is not set, and there is no folder shared beside the repository")
    folder = Path(shared) / "sib200"
    for target in ("ga", "zho_Hans", "arb_Arab"):
        pairs = sources.parallel("sib200", "eng_Latn", target, dir=folder)
        assert len(pairs) == pairs.n_available == 1004
        assert pairs.facts["only_in_base"] == pairs.facts["only_in_target"] == 0
        assert pairs.ids == sorted(pairs.ids, key=int)
    assert [len(sources.parallel("sib200", "en", "eu", dir=folder, split=s)) for s in ("train", "dev", "test")] == [
        701,
        99,
        204,
    ]


# --- text and tsv ---


def test_text_files_plain_and_gzipped(tmp_path):
    # U+2028 and a carriage return inside a sentence do not end a line; a byte order mark is no part of it.
    base = write(tmp_path / "a.en", "\ufeffone\u2028still one\r\ntwo\n")
    target = write(tmp_path / "a.de.gz", "eins\nzw\rei")
    pairs = sources.parallel("text", "en", "some-dialect", base_file=base, target_file=target)
    assert pairs.base == ["one\u2028still one", "two"] and pairs.target == ["eins", "zw\rei"]
    assert pairs.ids == ["1", "2"]
    assert pairs.facts["target"]["canonical"] == "some-dialect"
    assert pairs.facts["target"]["files"] == {str(target): hashlib.sha256(target.read_bytes()).hexdigest()}
    inside = sources.parallel("text", "qaa_Latn", "qab_Latn", dir=tmp_path, base_file="a.en", target_file="a.de.gz")
    assert inside.base == pairs.base


def test_text_errors(tmp_path):
    base, target = write(tmp_path / "a", "1\n2\n3\n"), write(tmp_path / "b", "1\n2\n")
    with pytest.raises(InputError, match=r"a has 3 lines and .*b has 2"):
        sources.parallel("text", "en", "de", base_file=base, target_file=target)
    write(target, "1\n\n3\n")
    with pytest.raises(InputError, match="de sentence of line 2 is empty"):
        sources.parallel("text", "en", "de", base_file=base, target_file=target)
    with pytest.raises(InputError, match=r"no file for de: give --target-file, or the study key data\.target_file"):
        sources.parallel("text", "en", "de", base_file=base)
    with pytest.raises(InputError, match="does not exist"):
        sources.parallel("text", "en", "de", base_file=base, target_file=tmp_path / "c")
    with pytest.raises(InputError, match="has no splits"):
        sources.parallel("text", "en", "de", base_file=base, target_file=base, split="dev")
    with pytest.raises(InputError, match="sib200 takes no files; for files use --source text or tsv"):
        sources.parallel("sib200", "en", "de", base_file=base, target_file=target)
    target.write_bytes(b"\xff\xfe1\n")
    with pytest.raises(InputError, match="cannot be read as UTF-8"):
        sources.parallel("text", "en", "de", base_file=base, target_file=target)
    broken = tmp_path / "c.gz"
    broken.write_bytes(gzip.compress(b"1\n2\n3\n" * 99)[:-12])
    with pytest.raises(InputError, match=r"c\.gz cannot be read"):
        sources.parallel("text", "en", "de", base_file=base, target_file=broken)
    with pytest.raises(InputError, match="no sentence in common"):
        sources.parallel("text", "en", "de", base_file=write(tmp_path / "e", ""), target_file=write(tmp_path / "f", ""))
    for name, message in (("a.tsv", "is a table, and nothing says which .* --source tsv"), ("a.zip", "unpack it")):
        with pytest.raises(InputError, match=message):
            sources.parallel("text", "en", "de", base_file=base, target_file=write(tmp_path / name, "1\n2\n3\n"))


def test_text_from_json_lines_and_parquet(tmp_path):
    import pandas

    jsonl(tmp_path / "a.jsonl", [{"text": "\ufeffone"}, {"text": None}, {"text": "two"}])
    pandas.DataFrame({"text": ["eins", "zwei", "drei"]}).to_parquet(tmp_path / "b.parquet")
    files = {"base_file": tmp_path / "a.jsonl", "target_file": tmp_path / "b.parquet"}
    with pytest.raises(InputError, match="en sentence of line 2 is empty"):
        sources.parallel("text", "en", "de", **files)
    pairs = sources.parallel("text", "en", "de", **files, drop_empty=True)
    assert (pairs.base, pairs.target) == (["one", "two"], ["eins", "drei"])


def test_tsv_columns_by_name_number_and_default(tmp_path):
    named = write(tmp_path / "n.tsv", 'id\teng_Latn\tgle_Latn\n1\t"one\taon\n2\ttwo\tdó\n')
    for base, target in ((named, None), (f"{named}:eng_Latn", f"{named}:gle_Latn")):
        pairs = sources.parallel("tsv", "en", "ga", base_file=base, target_file=target)
        assert pairs.base == ['"one', "two"] and pairs.target == ["aon", "dó"]
        assert pairs.ids == ["2", "3"] and pairs.facts["base"]["column"] == "eng_Latn"
    plain = write(tmp_path / "p.tsv.gz", "one\taon\ntwo\tdó\n")
    assert sources.parallel("tsv", "en", "ga", base_file=plain).target == ["aon", "dó"]
    swapped = sources.parallel("tsv", "ga", "en", base_file=f"{plain}:2", target_file=f"{plain}:1")
    assert swapped.base == ["aon", "dó"] and swapped.ids == ["1", "2"]
    assert sources.parallel("tsv", "xx", "yy", base_file="p.tsv.gz", dir=tmp_path).base == ["one", "two"]


TATOEBA = [
    ("2", "我该去睡觉了。", "1277", "I have to go to sleep."),
    ("4", "今天是星期一。", "1279", 'He said: "Today is Monday.'),
    ("5", "小猫在睡。", "1280", "The kitten sleeps\u2028here."),
    ("6", "你好", "1281", "Hello"),
]


@pytest.mark.parametrize("ids", [("2", "4"), ("1277", "2"), ("4", "2"), ("5", "6")])
def test_tsv_of_four_columns_with_ids_that_look_like_column_numbers(tmp_path, ids):
    """As Tatoeba exports pairs: a mark of byte order, Windows line ends, a quote that nobody closes."""
    rows = [(ids[0], *TATOEBA[0][1:2], ids[1], TATOEBA[0][3]), *TATOEBA[1:]]
    file = write(tmp_path / "t.tsv", "\ufeff" + "".join("\t".join(row) + "\r\n" for row in rows))
    pairs = sources.parallel("tsv", "zh", "en", base_file=f"{file}:2", target_file=f"{file}:4")
    assert pairs.base == [row[1] for row in rows] and pairs.target == [row[3] for row in rows]
    assert (pairs.facts["base"]["column"], pairs.facts["target"]["column"]) == (2, 4)
    assert "4 sentence pairs zh-en from tsv, columns 2 and 4, aligned by line" in pairs.summary()
    with pytest.raises(InputError, match=r"give --base-file t.tsv:COLUMN and .*\(a name, or a number from 1\)"):
        sources.parallel("tsv", "zh", "en", base_file=file)
    with pytest.raises(InputError, match="columns 1 to 4, no column 7"):
        sources.parallel("tsv", "zh", "en", base_file=f"{file}:2", target_file=f"{file}:7")


def test_tsv_of_pandas_without_names(tmp_path):
    """`to_csv(sep="\t")` numbers the columns, and writes the numbers of the rows in front unless told not to."""
    import pandas

    table = pandas.DataFrame([(row[1], row[3]) for row in TATOEBA if '"' not in row[3]])
    table.to_csv(tmp_path / "v.tsv", sep="\t", index=False)
    table.to_csv(tmp_path / "w.tsv", sep="\t")
    table.to_csv(tmp_path / "x.tsv", sep="\t", index=False, header=["2021", "2022"])
    given = [("v.tsv", None), ("v.tsv:1", "v.tsv:2"), ("w.tsv:2", "w.tsv:3"), ("x.tsv:2021", "x.tsv:2022")]
    for base, target in given:
        pairs = sources.parallel("tsv", "zh", "en", dir=tmp_path, base_file=base, target_file=target)
        assert pairs.base == table[0].tolist() and pairs.target == table[1].tolist(), base
        assert pairs.ids == ["2", "3", "4"]
    with pytest.raises(InputError, match=r"w\.tsv has 3 columns"):
        sources.parallel("tsv", "zh", "en", dir=tmp_path, base_file="w.tsv")
    by_name = sources.parallel("tsv", "zh", "en", dir=tmp_path, base_file="w.tsv:0", target_file="w.tsv:1")
    assert by_name.base == table[0].tolist() and by_name.facts["target"]["column"] == "1"


def test_tsv_errors(tmp_path):
    file = write(tmp_path / "p.tsv", "a\tb\tc\nd\te\tf\n")
    with pytest.raises(InputError, match="has 3 columns, and line 1 does not name en and ga"):
        sources.parallel("tsv", "en", "ga", base_file=file)
    with pytest.raises(InputError, match="columns 1 to 3, no column 4"):
        sources.parallel("tsv", "en", "ga", base_file=f"{file}:1", target_file=f"{file}:4")
    with pytest.raises(InputError, match="no single column is named 'x'"):
        sources.parallel("tsv", "en", "ga", base_file=f"{file}:a", target_file=f"{file}:x")
    with pytest.raises(InputError, match="for one language only"):
        sources.parallel("tsv", "en", "ga", base_file=f"{file}:a", target_file=file)
    with pytest.raises(InputError, match="both columns from one file"):
        sources.parallel("tsv", "en", "ga", base_file=f"{file}:1", target_file=f"{file}2:2")
    with pytest.raises(InputError, match="no file for en"):
        sources.parallel("tsv", "en", "ga")
    write(file, "a\tb\nc\n")
    with pytest.raises(InputError, match="line 2 has 1 columns, line 1 has 2"):
        sources.parallel("tsv", "en", "ga", base_file=file)


# --- the hub, as a stand-in: these tests have no network ---


@pytest.fixture
def hub(monkeypatch):
    """Rows by (repository, config, split) that `load_dataset` serves as real data sets, and a log of the calls."""
    import datasets
    import huggingface_hub

    served, calls = {}, []

    def load_dataset(repository, name, split, revision):
        calls.append((repository, name, split, revision))
        if (repository, name, split) not in served:
            raise ValueError(f"BuilderConfig '{name}' not found.\nAvailable: lots")
        return datasets.Dataset.from_list(served[repository, name, split])

    class Api:
        error = None

        def auth_check(self, repository, repo_type):
            assert repo_type == "dataset"
            if self.error:
                raise self.error

        def dataset_info(self, repository, revision, timeout):
            return type("Info", (), {"sha": "c" * 40})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return type("Hub", (), {"served": served, "calls": calls, "api": Api})


def test_flores_from_the_hub(hub):
    for name, texts in (("eng_Latn", {2: "two", 1: "one"}), ("cmn_Hans", {1: "一", 2: "二"})):
        hub.served[flores_plus.DATASET, name, "dev"] = [{"id": i, "text": text, "url": ""} for i, text in texts.items()]
    pairs = sources.parallel("flores", "en", "zho_Hans")
    assert pairs.base == ["one", "two"] and pairs.target == ["一", "二"]
    # Asked for in FLORES+'s own spelling, both languages at the same pinned commit.
    assert hub.calls == [(flores_plus.DATASET, name, "dev", "c" * 40) for name in ("eng_Latn", "cmn_Hans")]
    facts = pairs.describe()
    assert facts["dataset"] == flores_plus.DATASET and facts["revision"] == "c" * 40
    assert facts["target"] == {"lang": "zho_Hans", "canonical": "cmn_Hans", "spelling": "cmn_Hans"}


def test_sib200_from_the_hub_joins_its_splits(hub):
    for name in ("eng_Latn", "zho_Hans"):
        for i, split in enumerate(("train", "validation", "test")):
            row = {"index_id": i, "category": "travel", "text": f"{name} {split}"}
            hub.served[sib200.DATASET, name, split] = [row]
    pairs = sources.parallel("sib200", "eng_Latn", "cmn_Hans")
    assert pairs.target == ["zho_Hans train", "zho_Hans validation", "zho_Hans test"]
    with pytest.raises(InputError, match="SIB-200 has no chv_Cyrl"):
        sources.parallel("sib200", "eng_Latn", "chv_Cyrl")


def test_a_task_of_sib200_without_a_folder_is_that_of_the_hub(hub):
    rows = [{"index_id": i, "category": c, "text": f"t{i}"} for i, c in enumerate(("travel", "sports"))]
    hub.served[sib200.DATASET, "zho_Hans", "test"] = rows
    found = tasks.of_study(Study({"data": {"task": {"name": ["sib200_cmn_Hans", "other"]}}}))
    assert [(item.prompt, item.choices[item.right]) for item in found.items] == [
        ('The category of "t0" is:', "travel"), ('The category of "t1" is:', "sports"),
    ]  # fmt: skip
    assert found.facts["revision"] == "c" * 40 and len(found.facts["sha256"]) == 64
    assert hub.calls == [(sib200.DATASET, "zho_Hans", "test", "c" * 40)]
    with pytest.raises(
        InputError, match=r"the task sib200_deu_Latn: .*cannot be loaded .*give data.task.dir, or --task"
    ):
        tasks.of_study(Study({"data": {"task": {"name": "sib200_deu_Latn"}}}))


def test_a_task_that_changed_models_are_not_measured_on_is_said(tmp_path, capsys):
    write(tmp_path / "quiz_eus.jsonl", '{"context": "a", "choices": ["b", "c"], "label": 0}\n')  # of its own prompt
    for task in ({"name": "quiz_eus", "dir": str(tmp_path)}, {"name": "belebele_deu_Latn"}):
        assert tasks.of_study(Study({"data": {"task": task}})) is None
        assert f"the task {task['name']} is for lm_eval only" in capsys.readouterr().out
    assert tasks.of_study(Study({"data": {"task": None}})) is None and capsys.readouterr().out == ""
    for name, why in (("sib200_deu_Latn", "has no folder of deu_Latn"), ("continuation_eus", "does not exist")):
        with pytest.raises(InputError, match=why):
            tasks.of_study(Study({"data": {"task": {"name": name, "dir": "nowhere"}}}))


def test_gated_data_say_what_to_do_and_load_nothing(hub):
    from huggingface_hub.errors import GatedRepoError

    hub.api.error = GatedRepoError.__new__(GatedRepoError)
    with pytest.raises(InputError, match=r"flores_plus is gated: accept its terms at https.*hf auth login.*--data-dir"):
        sources.parallel("flores", "eng_Latn", "gle_Latn")
    assert hub.calls == []


def test_hub_that_cannot_be_reached(hub, monkeypatch):
    hub.api.error = ConnectionError("no route")
    with pytest.raises(InputError, match=r"config eng_Latn, split dev cannot be loaded \(BuilderConfig"):
        sources.parallel("flores", "eng_Latn", "gle_Latn")
    # Served from the cache: the commit is read from where the cached files came from.
    import datasets

    cached = datasets.Dataset.from_list([{"id": 1, "text": "x"}])
    cached.info.download_checksums = {f"hf://datasets/{flores_plus.DATASET}@{'d' * 40}/dev/eng_Latn.jsonl": {}}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: cached)
    assert sources.parallel("flores", "eng_Latn", "gle_Latn").describe()["revision"] == "d" * 40


def test_without_a_network_the_message_is_one_line(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(InputError, match="flores_plus, config eng_Latn, split dev cannot be loaded") as error:
        sources.parallel("flores", "eng_Latn", "gle_Latn")
    assert "\n" not in str(error.value) and "--data-dir" in str(error.value)
