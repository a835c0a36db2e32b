"""The recipes for an experiment and a claim in docs/adding.md, followed in a copy of the repository word for word."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT, clone
from launch import SNAKEMAKE, shim
from test_claims import STEPS, L, MadeUp

BLOCK = re.compile(r"^(?:In )?`([\w./-]+)`(?:, above the verdicts)?:\n\n```\w*\n(.*?)^```", re.M | re.S)
SEED = 3  # of the made-up study; there is 4, too


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The tracked files, with what the recipes have one write; and beside them a study of made-up results."""
    place = tmp_path_factory.mktemp("adding")
    copy = clone(place / "repository")
    blocks = dict(BLOCK.findall((ROOT / "docs/adding.md").read_text()))
    assert list(blocks) == ["depth/depth.py", "workflow/Snakefile", "report/claims/t1.py"]
    workflow = copy / "workflow/Snakefile"
    rule, verdicts = blocks.pop("workflow/Snakefile"), re.search(r"^# -+ the verdicts$", workflow.read_text(), re.M)[0]
    workflow.write_text(workflow.read_text().replace(verdicts, f"{rule}\n\n{verdicts}"))
    (copy / "depth").mkdir()
    (copy / "depth/README.md").write_text("# At what depth the weights change\n")
    for name, text in blocks.items():
        (copy / name).write_text(text)
    for seed in (4, SEED):
        made = MadeUp(place, seed=seed)
        made.retrieval()
        made.layers()
        made.weights()
    return copy


def run(copy: Path, *command: str) -> str:
    """Run a command in the study's folder, which is not the repository's; what it says."""
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run(
        command, cwd=copy.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def workflow(copy):
    """The new experiment's result by its rule of the workflow, and a function that calls the workflow again."""
    pytest.importorskip("snakemake")
    result = copy.parent / f"results/{SEED}/depth/depth.json"
    call = [shim(), SNAKEMAKE, "--snakefile", str(copy / "workflow/Snakefile"), "--config", "study=study.yaml"]

    def again() -> None:
        run(copy, *call, "--cores", "1", "--allowed-rules", "depth", "--", str(result))

    again()
    return result, again


def test_an_experiment_is_a_folder_a_script_and_a_rule(copy, workflow):
    result, again = workflow
    # The toy results change more in upper layers: layer l by 1 + l / 10.
    expected = sum(at * (1 + at / 10) for at in range(L)) / sum(1 + at / 10 for at in range(L))
    found = json.loads(result.read_text())["depth"]
    assert list(map(int, found)) == STEPS and list(found.values()) == pytest.approx([expected] * len(STEPS))
    assert result.with_suffix(".png").stat().st_size > 2000
    caption = copy.parent / ".snakemake/captions/depth.rst"
    assert caption.read_text().startswith("The mean layer of the weight change")
    script = copy / "depth/depth.py"
    script.write_text(script.read_text().replace("/ sum(change)", "/ sum(change) + 1"))
    again()
    assert json.loads(result.read_text())["depth"]["10"] == pytest.approx(expected + 1)


def test_a_claim_is_a_file(copy, workflow):
    """Where the experiment was not run the claim says so; elsewhere it has its number, and is shown."""
    claims = [shim(), str(copy / "report/claims.py"), "--study", "study.yaml"]
    said = run(copy, *claims, "--seed", "4")
    assert "T1 one run: no verdict: depth/depth.json is not there (it is made by depth/depth.py)" in said
    run(copy, *claims, "--seed", str(SEED))
    report = copy.parent / f"results/{SEED}/report"
    claim = json.loads((report / "claims.json").read_text())["claims"]["T1"]
    assert claim["verdict"] == "one run: no verdict" and claim["numbers"][0]["value"] > 0
    assert [Path(file).name for file in claim["files"]] == ["depth.json", "attn_vs_ffn.json"]
    assert re.search(r"^\| T1 \| the weights change most .* \*\*one run", (report / "claims.md").read_text(), re.M)
    assert re.search(r"^T1 & the weights change most", (report / "claims.tex").read_text(), re.M)
    run(copy, *claims, "--seeds", f"{SEED},4", "--output", "seeds")
    table = (copy.parent / "seeds/claims_seeds.md").read_text()
    assert re.search(r"^\| T1 \|.*\| \*\*undecided\*\*.*seed 4: depth/depth.json is not there", table, re.M)

    from matplotlib import image

    height, width = image.imread(report / "claims.png").shape[:2]
    assert height / width > 0.7  # three rows of panels, not two
