"""The readers of local text: what a file is, marks of byte order, nulls, quotes; each against the plain content."""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path

import pytest

from cpt_utils.base import textfiles
from cpt_utils.base.errors import InputError

TEXTS = ["one", "", "  two ", "thr\u2028ee", "fo\rur", 'quo"ted"', "fünf\tfive"]


def parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    from pyarrow import parquet as format

    format.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    return path


def json_lines(path: Path, rows: list) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())
    return path


# --- which kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", "text"), ("a", "text"), ("train.en.gz", "text"), ("corpus.v1.2", "text"), ("eng_Latn.dev", "text"),
        ("train.pt", "text"), ("train.pt.gz", "text"), ("a.bin.txt", "text"), ("a.jsonl", "json"), ("a.JSON", "json"),
        ("a.ndjson", "json"), ("a.json", "json"), ("a.parquet", "parquet"), ("a.csv", "table"), ("a.TSV.gz", "table"),
    ],
)  # fmt: skip
def test_a_file_is_what_its_name_says(name, kind):
    assert textfiles.kind(Path("folder.zip") / name) == kind


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ("a.zip a.txt.zst a.xz a.bz2 a.tar.gz a.tgz a.7z A.ZIP", "is compressed or an archive; unpack it"),
        ("a.arrow a.feather a.xlsx a.sqlite", "is a table in a binary format; write it as .parquet"),
        ("a.pdf a.docx a.odt", "is a document with a layout; write its text as .txt"),
        ("a.bin a.safetensors a.npy a.pkl tokenizer.model", "is binary and holds no text"),
        ("a.parquet.gz", "a parquet file is compressed inside"),
    ],
)
def test_what_holds_no_text_is_refused_by_name(tmp_path, names, what):
    for name in names.split():
        (tmp_path / name).write_bytes(b"text that could be read\n")
        for read in (textfiles.check, lambda file: next(textfiles.documents(file))):
            with pytest.raises(InputError, match=what) as error:
                read(tmp_path / name)
            assert name in str(error.value) and "\n" not in str(error.value)


def test_a_table_a_folder_and_nothing(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n1,one\n")
    with pytest.raises(
        InputError, match=r"a\.csv is a table, and nothing says which column is text; write the texts as"
    ):
        list(textfiles.texts(tmp_path / "a.csv"))
    with pytest.raises(InputError, match="is a folder"):
        list(textfiles.texts(tmp_path))
    with pytest.raises(InputError, match="does not exist"):
        list(textfiles.texts(tmp_path / "b.txt"))


# --- texts


def test_one_text_in_every_format(tmp_path):
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    files = [
        parquet(tmp_path / "a.parquet", rows),
        json_lines(tmp_path / "a.jsonl", rows),
        json_lines(tmp_path / "a.jsonl.gz", rows),
    ]
    (tmp_path / "a.txt").write_bytes("\n".join(TEXTS).encode())
    (tmp_path / "crlf.txt").write_bytes("".join(text + "\r\n" for text in TEXTS).encode())
    for file in [*files, tmp_path / "a.txt", tmp_path / "crlf.txt"]:
        assert list(textfiles.texts(file)) == TEXTS, file


def test_marks_of_byte_order_are_no_text(tmp_path):
    """In front, and in front of any line: `cat` of files that Windows editors saved."""
    parts = ["\ufeffone\r\ntwo\r\n", "\ufeffthree\r\n", "\ufeff\ufefffour"]
    (tmp_path / "a.txt").write_bytes("".join(parts).encode())
    assert list(textfiles.texts(tmp_path / "a.txt")) == ["one", "two", "three", "four"]
    rows = [{"text": "\ufeffone"}, {"text": ["\ufefftwo", "thr\ufeffee"]}]
    lines = "".join("\ufeff" + json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    assert list(textfiles.texts(tmp_path / "a.jsonl")) == ["one", "two\nthr\ufeffee"]
    assert list(textfiles.texts(parquet(tmp_path / "a.parquet", [{"text": "\ufeffone"}]))) == ["one"]
    (tmp_path / "a.tsv").write_text("\ufeffa\tb\n\ufeffc\td\n", encoding="utf-8")
    assert textfiles.tsv_cells(tmp_path / "a.tsv") == [["a", "b"], ["c", "d"]]


def test_a_null_is_no_text(tmp_path, capsys):
    rows = [
        {"text": "one"},
        {"text": None},
        {"text": [{"text": "two", "text_idx": 0}, {"text": None, "text_idx": 1}, {"text": "three", "text_idx": 2}]},
        {"text": [None]},
        {"text": []},
        {"text": "None"},
    ]
    file = json_lines(tmp_path / "a.jsonl", [*rows, {"text": float("nan")}])
    assert list(textfiles.documents(file)) == [
        ["one"], [None], ["two", None, "three"], [None], [], ["None"], [None],
    ]  # fmt: skip
    assert list(textfiles.texts(file)) == ["one", "", "two\nthree", "", "", "None", ""]
    assert "a.jsonl: 4 texts are null" in capsys.readouterr().err
    plain = parquet(tmp_path / "a.parquet", [row for row in rows if not isinstance(row["text"], list)])
    assert list(textfiles.texts(plain)) == ["one", "", "None"]
    assert "1 text is null" in capsys.readouterr().err


def test_pieces_of_other_shapes():
    def pieces(value):
        return textfiles.pieces({"text": value}, "text", "x")

    assert pieces([{"text": "a", "text_idx": "0"}, {"text": None}, {"text": "b"}]) == ["a", None, "b"]
    assert pieces({"text": ["a", "b"], "text_idx": ["0", "1"]}) == ["a", "b"]
    assert pieces("a b") == ["a b"] and pieces(None) == [None] and pieces(["a"]) == ["a"]
    for value in ([1, 2], 5, True, [["a"]], {"en": "a"}, [{"body": "a"}]):
        with pytest.raises(InputError, match=r"x: the column text holds .*, neither a text nor a list of texts"):
            pieces(value)
    with pytest.raises(InputError, match=r"x has no column 'text' \(it has: body\)"):
        textfiles.pieces({"body": "a"}, "text", "x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"{}\n{\n", "line 2 is not JSON"),
        ("a.json", b'[\n{"text": "a"}\n]\n', "line 1 is not JSON .*one object per line"),
        ("a.json", b'[{"text": "a"}]\n', "line 1 is not a JSON object; one object per line"),
        ("a.txt", "é".encode("latin-1"), "cannot be read as UTF-8 text .*save it as UTF-8"),
        ("a.txt", "é".encode("utf-16"), "cannot be read as UTF-8 text"),
        ("a.txt.gz", gzip.compress(b"text\n" * 99, mtime=0)[:-9], "cannot be read as UTF-8 text"),
        ("a.parquet", b"PAR1 no more", "not a readable parquet file"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.replace(b"{}\n", b'{"text": "a"}\n'))
    with pytest.raises(InputError, match=message) as error:
        list(textfiles.texts(tmp_path / name))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_parquet_with_a_missing_column(tmp_path):
    file = parquet(tmp_path / "a.parquet", [{"body": "a", "id": 1}])
    assert list(textfiles.texts(file, "body")) == ["a"]
    with pytest.raises(InputError, match=r"has no column 'text' \(it has: body, id\)"):
        list(textfiles.texts(file))


# --- tables


def test_cells_keep_their_quotes_and_no_quote_swallows_lines(tmp_path, capsys):
    rows = [['He said: "Today', "a"], ['"', "b"], ['"x"', "c"], ["y", 'd"']]
    (tmp_path / "a.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    assert textfiles.tsv_cells(tmp_path / "a.tsv") == rows
    assert not capsys.readouterr().err
    with open(tmp_path / "b.tsv", "w", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([["a", 'He said: "no" to me'], ["b", "c"]])
    assert textfiles.tsv_cells(tmp_path / "b.tsv")[0][1] == '"He said: ""no"" to me"'
    assert "1 cells look as pandas or a spreadsheet quotes them (line 1" in capsys.readouterr().err


def test_quoted_rows_are_those_of_pandas_and_csv(tmp_path):
    import pandas

    rng = random.Random(0)
    alphabet = ['"', '""', "'", ",", " ", "a", "é", "漢", "None", "NA", "\u2028", "#", "\\", "1"]
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 9))) for _ in range(500)]
    table = pandas.DataFrame({"index_id": range(500), "text": texts})
    table.to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    found = [row["text"] for row in textfiles.quoted_rows(tmp_path / "a.tsv", ("index_id", "text"))]
    assert found == texts
    with open(tmp_path / "a.tsv", encoding="utf-8", newline="") as file:
        assert [row["text"] for row in csv.DictReader(file, delimiter="\t")] == texts
    read = pandas.read_csv(tmp_path / "a.tsv", sep="\t", keep_default_na=False, na_filter=False)
    assert read["text"].tolist() == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('i\ttext\n1\t"open\n2\tb"\n3\tc\n', r"line 2: not as pandas writes a TSV \(unexpected end of data\)"),
        ('i\ttext\n1\ta\n2\t"a" b\n', r"line 3: not as pandas writes a TSV"),
        ("i\ttext\n1\n", "line 2: 1 fields instead of 2"),
        ('i\ttext\n1\ta\n2\t"b\tc\n', "line 3: not as pandas"),
        ("i\ttext\n", "holds no rows"),
        ("", "holds no rows"),
        ("i\tbody\n1\ta\n", "has no column text in its first line, only i, body"),
    ],
)
def test_quotes_that_no_writer_leaves_so_are_found_where_they_stand(tmp_path, content, message):
    (tmp_path / "a.tsv").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        textfiles.quoted_rows(tmp_path / "a.tsv", ("i", "text"))
    assert "a.tsv" in str(error.value) and "\n" not in str(error.value)
