"""The hash of what a script is made of: words and formatting leave it, a method, a helper or a table changes it."""

from __future__ import annotations

import ast
import os

import pytest
from helpers import ROOT, load_script

from cpt_utils.base import cli, code, journal
from cpt_utils.base.errors import InputError
from cpt_utils.base.journal import Journal

SCRIPT = '''"""A script."""
from cpt_utils.base import cli
from cpt_utils.base.inner import half

CAPTIONS = {"toy": "Toys\\nWhat one sees."}


def method(x):
    """Half of it."""
    others = [cli.sibling(f"toy/parts/{name}") for name in ("a",)]
    return half(x) + 1  # and one


def later():
    from cpt_utils.base import late, sources

    return late, sources, cli.sibling("toy/helper.py")
'''
PLUMBING = "cpt_utils/base/cli.py"
FILES = {
    "toy/toy.py": SCRIPT,
    "toy/helper.py": "def helper(x):\n    return x\n",
    "toy/unused.py": "x = 1\n",
    "toy/parts/a.py": "x = 1\n",
    "cpt_utils/base/cli.py": "x = 1\n",
    "cpt_utils/base/inner.py": "def half(x):\n    return x / 2, 'table.tsv'\n",
    "cpt_utils/base/late.py": "x = 1\n",
    "cpt_utils/base/sources/__init__.py": "x = 1\n",
    "cpt_utils/base/sources/one.py": "x = 1\n",
    "cpt_utils/base/table.tsv": "a\tb\n",
    "cpt_utils/base/unused.tsv": "a\tb\n",
    "cpt_utils/measures/unused.py": "x = 1\n",
}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of a toy script; the digest of the script after a file has been written anew."""
    monkeypatch.setattr(cli, "REPOSITORY", tmp_path)

    def forget():
        for kept in (code._tree, code._uses, code._digest):
            kept.cache_clear()

    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        forget()
        return code.digest("toy/toy.py")

    for name, text in FILES.items():
        write(name, text)
    yield write
    forget()


def test_a_script_is_made_of_what_it_uses_anywhere(repository, tmp_path):
    names = {path.relative_to(tmp_path).as_posix() for path in code.files("toy/toy.py")}
    assert names == {name for name in FILES if "unused" not in name}


def test_words_and_formatting_leave_the_hash(repository):
    before = repository("toy/toy.py", SCRIPT)
    for old, new in (
        ("  # and one", "  # and one, which is a lot"),
        ('"""Half of it."""', '"""A half of it, and one."""'),
        ('"""Half of it."""\n    ', ""),
        ("half(x) + 1", "(\n        half( x ) + 1\n    )"),
        ("What one sees.", "What a reader sees."),
        ('"""A script."""', "'''Another.'''\n\n"),
    ):
        assert old in SCRIPT and repository("toy/toy.py", SCRIPT.replace(old, new)) == before, new
    assert repository("toy/unused.py", "x = 2\n") == repository("cpt_utils/measures/unused.py", "x = 2\n") == before
    assert repository(PLUMBING, "x = 2\n") == before


@pytest.mark.parametrize("name", [name for name in FILES if "unused" not in name and name != PLUMBING])
def test_another_method_helper_or_table_is_another_hash(repository, name):
    before = code.digest("toy/toy.py")
    changed = FILES[name].replace("return x", "return 3 * x").replace("x = 1", "x = 2").replace("a\t", "c\t")
    changed = changed.replace("half(x) + 1", "half(x) + 2")
    assert changed != FILES[name] and repository(name, changed) != before


def test_a_file_that_is_no_python_is_said(repository):
    with pytest.raises(InputError, match=r"helper.py, line 1: "):
        repository("toy/helper.py", "def helper(:\n")


def test_a_stamp_moves_with_the_hash_alone(repository, tmp_path):
    for name in FILES:
        os.utime(tmp_path / name, (1_000, 1_000))
    os.utime(tmp_path / "toy/helper.py", (2_000, 2_000))
    stamp = code.stamp("toy/toy.py", tmp_path / "stamps")
    assert stamp.stat().st_mtime == 2_000  # as old as the newest file
    repository("toy/toy.py", SCRIPT.replace("and one", "and one more"))
    assert code.stamp("toy/toy.py", tmp_path / "stamps").stat().st_mtime == 2_000
    before, was = stamp.with_name("toy__toy.py.before"), stamp.read_text()
    assert not before.exists()
    repository("toy/helper.py", "def helper(x):\n    return -x\n")
    os.utime(tmp_path / "toy/helper.py", (1_500, 1_500))  # copied with an old time: it is another all the same
    assert code.stamp("toy/toy.py", tmp_path / "stamps").stat().st_mtime > 1_000_000
    assert before.read_text() == was


def test_what_other_code_measured_is_kept_and_not_gone_on_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(code, "running", lambda: "one")
    Journal(tmp_path / "j", {"a": 1}).add("set", 5)
    assert Journal(tmp_path / "j", {"a": 1}).done == {"set": 5}
    partial = load_script("lsn/activation_partial.py").Partial
    begun = partial(tmp_path / ".c.partial", 0, {"a": 1}, 4, (1, 1, 2, 0))
    begun.done[0] = True
    begun.save()
    assert partial(tmp_path / ".c.partial", 0, {"a": 1}, 4, (1, 1, 2, 0)).done.any()
    monkeypatch.setattr(code, "running", lambda: "another")
    assert Journal(tmp_path / "j", {"a": 1}).done == {}
    assert "its record is kept in j.before" in capsys.readouterr().out
    monkeypatch.setattr(code, "running", lambda: "one")
    journal.before(tmp_path / "j").replace(tmp_path / "j")
    assert Journal(tmp_path / "j", {"a": 1}).done == {"set": 5}
    journal.remove(tmp_path / "j")
    assert not list(tmp_path.glob("j*"))
    monkeypatch.setattr(code, "running", lambda: "another")
    assert not partial(tmp_path / ".c.partial", 0, {"a": 1}, 4, (1, 1, 2, 0)).done.any()


def test_the_script_that_runs_is_known(monkeypatch):
    import __main__

    assert code.running() is None  # pytest is none of ours
    monkeypatch.setattr(__main__, "__file__", str(ROOT / "lsn/deactivate.py"), raising=False)
    assert code.running() == code.digest("lsn/deactivate.py")


def test_every_script_of_the_repository_names_its_siblings_so_that_they_are_found():
    """`sibling(variable)` would be code that the workflow does not see."""
    for path in ROOT.glob("*/*.py"):
        if path.parent.name in ("tests", "build"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("sibling"):
                assert code._named(node.args[0]), f"{path}: {ast.unparse(node)}"
