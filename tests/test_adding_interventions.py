"""The recipes for an intervention and for a model type in docs/adding.md, followed word for word in a copy."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from helpers import ROOT, save_tiny
from launch import run

LAYERS = 3


def recipe(number: int) -> str:
    text = "\n".join(file.read_text("utf-8") for file in sorted((ROOT / "docs").glob("adding*.md")))
    return re.search(rf"^## {number}\. .*?(?=^## |\Z)", text, re.M | re.S)[0]


@pytest.fixture
def copy(tmp_path):
    """A copy of the package and of the scripts that are called, and of nothing else."""
    for name in ("cpt_utils", "sentence-retrieval", "weight-diff"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_an_intervention(copy):
    (code,) = re.findall(r"```python\n(.*?)```", recipe(1), re.S)
    (copy / "damping").mkdir()
    (copy / "damping/damping.py").write_text(code, "utf-8")
    save_tiny("llama", copy / "base", seed=0)
    save_tiny("llama", copy / "run/checkpoint-10", seed=1)
    (copy / "text.txt").write_text("".join(f"line {n} of some text that nobody has seen\n" for n in range(8)))
    flags = ["--layers", "1", "--output", "out.json", "--measures", "nll", "--heldout", "text.txt"]
    command = ["damping/damping.py", "--base", "base", "--run", "run", *flags]
    first = run(*command, root=copy)
    assert first.returncode == 0, first.stderr
    sets = json.loads((copy / "out.json").read_text())["sets"]
    assert [row["name"] for row in sets] == ["base", "target", "damped", *["random"] * (LAYERS - 1)]
    assert [row["layers"] for row in sets[2:]] == [[1], [0], [2]] and (copy / "out.png").is_file()
    place = json.loads((copy / "out.json").read_text())["comparison"]["nll_per_byte"]
    assert place["own"] == sets[2]["values"]["nll_per_byte"] and place["n_random"] == LAYERS - 1
    assert len({row["values"]["nll_per_byte"] for row in sets}) == len(sets)
    assert "kept" in run(*command, root=copy).stdout
    refused = run(*command, "--alpha", "0.25", root=copy)
    assert refused.returncode == 2 and "another request" in refused.stderr
    script = copy / "damping/damping.py"
    script.write_text(code.replace("alpha * value)", "alpha * value * value)"), "utf-8")
    assert "made by a different version of the code" in run(*command, root=copy).stderr
    refused = run(*command[:-8], "--layers", "3", *command[-6:], root=copy)
    assert refused.returncode == 2 and "layer 3 does not exist" in refused.stderr


def test_a_model_type(copy):
    """The entry is taken out of the table, and put back as the message and the recipe say."""
    table = copy / "cpt_utils/architectures/arch_table.py"
    whole = table.read_text("utf-8")
    table.write_text(re.sub(r'^    "helium": .*\n', "", whole, flags=re.M), "utf-8")
    save_tiny("helium", copy / "base", seed=0)
    save_tiny("helium", copy / "run/checkpoint-10", seed=1)
    command = ["weight-diff/attn_vs_ffn.py", "--base", "base", "--run", "run", "--output", "out.json"]
    refused = run(*command, root=copy)
    assert refused.returncode == 2
    entry = re.search(r"add (\'helium\': Arch\(\)) to (ARCHS) in (cpt_utils/\S+\.py)", refused.stderr)
    assert entry, refused.stderr
    assert f"`{entry[2]}`" in recipe(3) and f"`{entry[3]}`" in recipe(3)
    text = (copy / entry[3]).read_text("utf-8")
    start = re.search(rf"^{entry[2]}\b.*= {{\n", text, re.M).end()
    (copy / entry[3]).write_text(f"{text[:start]}    {entry[1]},\n{text[start:]}", "utf-8")
    done = run(*command, root=copy)
    assert done.returncode == 0, done.stderr
    assert json.loads((copy / "out.json").read_text())["checkpoints"]["10"]["summary"]["attn"] > 0
