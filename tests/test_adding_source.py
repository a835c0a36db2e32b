"""The recipe for a data source in docs/adding.md, followed word for word in a copy of the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

NAMED, PLACE = "`verses.py`", "cpt_utils/base/sources/verses.py"
LOAD = """
import json
from cpt_utils.base import cli, sources
from cpt_utils.base.study import Study
args = cli.sibling("sentence-retrieval/sr_experiment.py").build_parser().parse_args()
pairs = sources.from_arguments(args, Study(), args.base, args.target)
print(json.dumps([pairs.base, pairs.target, pairs.describe()]))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the package and the script with the file of the recipe in it, and of nothing else."""
    recipe = next(text for file in (ROOT / "docs").glob("adding*.md") if NAMED in (text := file.read_text("utf-8")))
    (code,) = re.findall(r"```python\n(.*?)```", recipe[recipe.index(NAMED) :], re.DOTALL)[:1]
    folder = tmp_path_factory.mktemp("repository")
    for name in ("cpt_utils", "sentence-retrieval"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / PLACE).write_text(code, encoding="utf-8")
    return folder


def run(copy, *command):
    environment = os.environ | {"PYTHONPATH": str(copy)}
    return subprocess.run([sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True)


def test_a_new_source_is_offered_with_its_help(copy):
    shown = run(copy, "sentence-retrieval/sr_experiment.py", "--help")
    assert "--source {flores,sib200,text,tsv,verses}" in shown.stdout, shown.stderr
    assert "verses: Verse-aligned text, a folder with <language>.tsv" in " ".join(shown.stdout.split())


def test_a_new_source_is_read_with_the_script_s_flags(copy):
    (copy / "verses").mkdir()
    (copy / "verses" / "en.tsv").write_text("GEN 1:2\ttwo\nGEN 1:10\tten\nGEN 1:1\tone\n")
    (copy / "verses" / "gle_Latn.tsv").write_text("GEN 1:1\taon\nGEN 1:2\tdó\nGEN 1:10\tdeich\nGEN 2:1\ttrí\n")
    flags = ["--base", "eng_Latn", "--target", "ga", "--source", "verses", "--limit", "2"]
    found = run(copy, "-c", LOAD, *flags, "--data-dir", "verses")
    base, target, facts = json.loads(found.stdout or found.stderr)
    assert (base, target) == (["one", "two"], ["aon", "dó"])
    assert facts["source"] == "verses" and facts["aligned_by"] == "verse" and facts["only_in_target"] == 1
    assert facts["base"]["spelling"] == "en" and len(facts["pairs_sha256"]) == 64 and facts["n_available"] == 3
    refused = run(copy, "-c", LOAD, *flags, "--data-dir", "verses", "--split", "dev")
    assert "--split dev: the source verses has no splits" in refused.stderr
