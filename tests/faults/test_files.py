"""The two ways in which results reach the disk: files that replace others, and journals that grow by lines."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os

import pytest

from cpt_utils.base import journal, results
from cpt_utils.base.errors import InputError

FORK = multiprocessing.get_context("fork")
REQUEST = {"sets": [1, 2], "dtype": "float32"}


def in_child(function) -> str:
    """What `function` returns, or its InputError, in another process."""
    ours, theirs = FORK.Pipe()

    def call():
        try:
            theirs.send(str(function()))
        except InputError as error:
            theirs.send(f"refused: {error}")

    child = FORK.Process(target=call)
    child.start()
    said = ours.recv()
    child.join()
    return said


def test_what_a_killed_process_left_is_removed_and_what_another_writes_stays(tmp_path):
    abandoned = [tmp_path / name for name in (".r.123.tmp.json", ".figure.77.tmp.pdf", ".ids.train.5.tmp.tiny")]
    mine = [tmp_path / name for name in ("r.tmp.json", ".hidden.json", ".r.12x.tmp.json")]
    for path in (*abandoned, *mine):
        path.write_text("half")
    alive = tmp_path / ".other.9.tmp.json"
    with alive.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        results.write_json(tmp_path / "r.json", {"a": 1}, {})
        assert alive.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in (*mine, alive, tmp_path / "r.json")
    )


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Results are written there all the same, and nothing is taken for abandoned."""
    import errno

    import filelock

    def refuse(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock, "lock_descriptor", refuse)
    (tmp_path / ".r.123.tmp.json").write_text("half")
    results.write_json(tmp_path / "r.json", {"a": 1}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".r.123.tmp.json", "r.json"]


def test_two_processes_may_write_the_same_file(tmp_path):
    path = tmp_path / "r.json"
    with results.replacing(path) as temporary:
        temporary.write_text("first")
        assert in_child(lambda: results.write_json(path, {"a": 2}, {})) == "None"
        assert temporary.read_text() == "first"
        assert json.loads(path.read_text())["a"] == 2
    assert path.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_folder_in_the_place_of_a_result_is_named(tmp_path):
    (tmp_path / "r.json").mkdir()
    with pytest.raises(InputError, match="it is a folder"):
        results.write_json(tmp_path / "r.json", {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_result_without_a_proper_header_is_refused(tmp_path):
    path = tmp_path / "r.json"
    path.write_text('{"_header": "s", "a": 1}')
    with pytest.raises(InputError, match="not a header"):
        results.read_json(path, "s")
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match="not valid JSON"):
        results.read_json(path, "s")


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_journal_goes_on_after_its_last_whole_line(tmp_path, cut):
    path = tmp_path / "x.partial.jsonl"
    first = journal.Journal(path, REQUEST)
    for key in ("a", "b"):
        first.add(key, {"value": key * 10})
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - cut)
    second = journal.Journal(path, REQUEST)
    assert second.done == {"a": {"value": "a" * 10}}
    second.add("b", 2)
    assert journal.Journal(path, REQUEST).done == {"a": {"value": "a" * 10}, "b": 2}


@pytest.mark.parametrize("damage", ['{"key": "b"}\n', "[1]\n", "nonsense\n", '{"kex": "b", "record": 1}\n', "\udcff\n"])
def test_a_damaged_line_ends_a_journal(tmp_path, damage):
    path = tmp_path / "x.partial.jsonl"
    journal.Journal(path, REQUEST).add("a", 1)
    whole = path.read_bytes()
    path.write_bytes(whole + damage.encode(errors="surrogateescape") + b'{"key": "c", "record": 3}\n')
    assert journal.Journal(path, REQUEST).done == {"a": 1}
    assert path.read_bytes() == whole


@pytest.mark.parametrize("before", ["", "{", '{"request": {"sets": [1]}}\n{"key": "a", "record": 1}\n', "\0\0\0"])
def test_a_journal_of_another_request_is_begun_anew(tmp_path, before):
    path = tmp_path / "deep" / "x.partial.jsonl"
    path.parent.mkdir()
    path.write_text(before)
    assert journal.Journal(path, REQUEST).done == {}
    assert path.read_text() == json.dumps({"request": REQUEST}) + "\n"


def test_a_second_process_is_refused_while_the_first_measures(tmp_path):
    path = tmp_path / "x.partial.jsonl"
    first = journal.Journal(path, REQUEST)
    first.add("a", 1)
    assert "another process is measuring" in in_child(lambda: journal.Journal(path, REQUEST).done)
    os.unlink(path)  # the first has finished; a new one may begin, though the first's file is still open
    assert in_child(lambda: journal.Journal(path, REQUEST).done) == "{}"
