"""The download, on local stand-ins for the hub: files as the study wants them, and a source that changed is refused."""

import gzip
import json

import pytest
from helpers import load_script

from cpt_utils.base.errors import InputError


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A hub of three captions: a JSON with columns en and de, and a text file of French."""
    script = load_script("studies/multi30k/download.py")
    rows = [{"en": f"a dog {i}", "de": f"ein  Hund {i}"} for i in range(3)]
    (tmp_path / "hub.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "val.fr.gz").write_bytes(gzip.compress(b"un chien 0\nun chien 1\nun chien 2\n"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def local(stem, split):
        hub = {"id": "json", "data_files": str(tmp_path / "hub.jsonl")}
        french = {"hub": {"id": "text", "data_files": str(tmp_path / f"{stem}.fr.gz")}}
        return {"en": {"hub": hub, "column": "en"}, "de": {"hub": hub, "column": "de"}, "fr": french}

    monkeypatch.setattr(script, "sources", local)
    return script


def test_files_of_a_part(stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(stand_in.PARTS, "val", ("validation", 3))
    args = ["--out", str(tmp_path / "m"), "--only", "val"]
    stand_in.main(args)
    german, french = (gzip.decompress((tmp_path / f"m/val.{code}.gz").read_bytes()) for code in ("de", "fr"))
    assert german == b"ein Hund 0\nein Hund 1\nein Hund 2\n" and french.startswith(b"un chien 0\n")
    capsys.readouterr()
    stand_in.main(args)
    assert capsys.readouterr().out.count(" exists") == 3


def test_a_source_that_changed_is_refused(stand_in, tmp_path):
    with pytest.raises(InputError, match=r"val\.en\.gz: downloaded 3 captions, expected 1014"):
        stand_in.main(["--out", str(tmp_path / "m"), "--only", "val"])
    assert not list(tmp_path.glob("m/*"))


def test_the_parts_are_the_studys():
    script = load_script("studies/multi30k/download.py")
    assert script.sources("val", "validation")["fr"]["hub"]["data_files"].endswith("/raw/val.fr.gz")
    assert {n for _, n in script.PARTS.values()} == {29000, 1014, 1000}
