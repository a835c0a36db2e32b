"""The documents are true: every command parses, every path exists, every script answers --help at once."""

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, load_script

# Of every folder with a README: an experiment that is added is among them.
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.glob("*/*.py")
    if path.with_name("README.md").is_file() and path.parent.name not in ("benchmarks", "build", "results")
    if "def build_parser" in path.read_text()
)
READMES = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.glob("**/*.md")
    if not {"build", "results", ".venv"} & set(path.relative_to(ROOT).parts)
)
# Paths in documents that a command of the same document makes, or that stand for the reader's own files.
MADE = re.compile(
    r"^(build|results|artifacts|runs|study\.yaml|(tests/test_)?depth|damping|report/claims/t1|my-?\w*|path|RUN|OUT)\b|<|\*|\$|\{"
)
PATHS = re.compile(r"[\w.-]+(?:/[\w.-]+)+\.(?:py|yaml|yml|md|smk|rst|tsv|toml)\b")


def commands(name):
    """The `python ...` command lines in the code blocks of a document, continuation lines joined."""
    text = (ROOT / name).read_text()
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.S | re.M)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"^(\w+=\S+\s+)+", "", line.strip()).split("   #")[0] for line in lines]
    return [line for line in lines if re.match(r"(python3?|accelerate launch) \S+\.py", line)]


@pytest.mark.parametrize("name", READMES)
def test_every_path_in_a_document_exists(name):
    text = (ROOT / name).read_text()
    here = (ROOT / name).parent
    missing = [
        path
        for path in set(PATHS.findall(text))
        if not MADE.search(path) and not (ROOT / path).exists() and not (here / path).exists()
    ]
    assert not missing, f"{name} names {missing}, which are not in the repository"


@pytest.mark.parametrize("name", [name for name in READMES if commands(name)])
def test_every_command_in_a_document_parses(name):
    for line in commands(name):
        words = shlex.split(line, comments=True)
        script = next(word for word in words if word.endswith(".py"))
        if script.split("/")[0] in ("depth", "damping"):  # what the recipes of docs/adding.md make; their tests run it
            continue
        if script == "docs/architectures.py":  # takes no argument
            assert words[words.index(script) + 1 :] == []
            continue
        parser = load_script(script).build_parser()
        try:
            parser.parse_args(words[words.index(script) + 1 :])
        except SystemExit as error:
            pytest.fail(f"{name}: {line}: the arguments do not parse (exit {error.code})")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_without_heavy_imports(script):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as e:\n    assert not e.code, e.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "default" in done.stdout and any(flag in done.stdout for flag in ("--study", "--config", "--init"))
    assert time.monotonic() - started < 20  # a bound against hanging; the imports above are the real check


def test_no_machine_path_in_the_repository():
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True).stdout.split()
    places = ("/" + "work/", "/" + "root/", "/" + "home/")
    for name in tracked:
        path = Path(ROOT / name)
        if path.suffix in (".png", ".pdf") or not path.is_file():
            continue
        text = path.read_text(errors="replace")
        assert not any(place in text for place in places), name
