"""The whole of Part I on the tiny demo: from a study file to figures and report, by the commands that a user types."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

pytestmark = pytest.mark.end_to_end

SNAKEMAKE = [str(Path(sys.executable).with_name("snakemake")), "--snakefile", "workflow/Snakefile"]
PAIR = "eng_Latn-qaa_Latn"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the tracked files, as a clone has them, in which nothing was run yet."""
    place = tmp_path_factory.mktemp("clone") / "project"
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)
    return place


def run(command, where, **environment):
    """Run a command in the clone; its output, or a failure that shows it."""
    binaries = str(Path(sys.executable).parent)
    environment = (
        os.environ | {"HF_HUB_OFFLINE": "1", "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"} | environment
    )
    done = subprocess.run(
        command, cwd=where, env=environment, shell=isinstance(command, str), capture_output=True, text=True
    )
    if done.returncode:
        logs = "".join(f"\n--- {p}\n{p.read_text()[-2000:]}" for p in Path(where).glob("results/*/logs/**/*.log"))
        pytest.fail(
            f"{command} failed ({done.returncode}):\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}\n{logs[-6000:]}"
        )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished(clone):
    """The workflow stopped after the base, then gone on with to its end, two jobs at a time."""
    config = ["--config", "study=demo/tiny.yaml"]
    plan = run([*SNAKEMAKE, *config, "--dry-run"], clone)
    assert "train_base" in plan and "layer_swap_controls" in plan
    run([*SNAKEMAKE, *config, "--cores", "2", "--until", "train_base"], clone)
    weights = clone / "build/tiny/base/model.safetensors"
    before = weights.stat().st_mtime_ns
    run([*SNAKEMAKE, *config, "--cores", "2", "--report-after-run", "--report", "results/tiny.html"], clone)
    assert weights.stat().st_mtime_ns == before  # what was finished is not made again
    return clone


def test_every_result_and_figure_is_there(finished):
    results = finished / "results/tiny"
    for name in (
        f"sentence-retrieval/{PAIR}/accuracy",
        f"sentence-retrieval/{PAIR}/layer-swap__semantic_hub+layer-swap__random",
        "layer-specialize/layers",
        "weight-diff/int_and_sem",
        "downstream-correlation/correlation",
        "layer-swap/controls",
    ):
        for suffix in (".pdf", ".png"):
            assert (results / f"{name}{suffix}").stat().st_size > 2000, name + suffix
    report = (finished / "results/tiny.html").read_text()
    for section in ("1. Sentence retrieval", "2. Layer specialization", "3. Downstream task", "4. Layer swaps"):
        assert section in report
    ours = [path for path in results.rglob("*.json") if path.parent.name not in ("semantic_hub", "random")]
    assert len(ours) > 10
    for path in ours:
        content = json.loads(path.read_text())
        assert "_header" in content, path
        assert content["_header"]["schema"] and content["_header"]["libraries"]["torch"], path


def test_each_step_read_what_the_step_before_wrote(finished):
    results = finished / "results/tiny"
    last = json.loads((results / f"sentence-retrieval/{PAIR}/cpt__checkpoint-40.json").read_text())
    layers = json.loads((results / "layer-specialize/layers.json").read_text())
    accuracy = [a for _, a in last["layer_accuracy"]][1:]
    assert min(accuracy[i] for i in layers["semantic_layers"]) > max(accuracy[i] for i in layers["interface_layers"])
    swap = json.loads((results / "layer-swap/metadata.json").read_text())
    assert swap["interface_layers"] == layers["interface_layers"]
    assert swap["semantic_hub_layers"] == layers["semantic_layers"]
    controls = json.loads((results / "layer-swap/controls.json").read_text())
    named = {record["name"]: record for record in controls["sets"] if record["name"] != "random"}
    folder = json.loads((results / f"sentence-retrieval/{PAIR}/layer-swap__semantic_hub.json").read_text())
    # The swap in memory and the written folder are one model.
    assert named["semantic_hub"]["layer_accuracy"] == [a for _, a in folder["layer_accuracy"]]
    assert named["target"]["layer_accuracy"] == [a for _, a in last["layer_accuracy"]]
    change = json.loads((results / "weight-diff/int_and_sem.json").read_text())["checkpoints"]
    assert list(change) == ["10", "20", "40"] and all(row["interface_avg"] > 0 for row in change.values())


def test_nothing_is_left_to_do(finished):
    assert "Nothing to be done" in run([*SNAKEMAKE, "--config", "study=demo/tiny.yaml", "--cores", "1"], finished)


def readme_commands():
    """The commands of Part I in the root README, as printed, for the tiny study in the place of the demo."""
    text = (ROOT / "README.md").read_text()
    part = text[text.index("## Part I") : text.index("## Make your own")]
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", part, re.S | re.M)).replace("\\\n", " ")
    return [line for line in blocks.splitlines() if line.startswith(("python", "lm_eval"))]


def test_the_commands_of_the_readme_run_as_printed(finished):
    (finished / "study.yaml").write_text((finished / "demo/tiny.yaml").read_text())
    lines = readme_commands()
    assert len(lines) >= 7
    for line in lines:
        if line.startswith("lm_eval"):
            continue  # its half minute is spent in test_lm_eval_sib200.py
        for demo, tiny in (("build/demo", "build/tiny"), ("results/demo", "results/tiny")):
            line = line.replace(demo, tiny)
        run(line, finished)
