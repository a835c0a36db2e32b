"""Both parts on the tiny demo: from a study file to figures and report, by the commands that a user types."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
from helpers import ROOT
from launch import SNAKEMAKE, shim

from cpt_utils.base.study import Study

pytestmark = pytest.mark.end_to_end

STUDY = ["--snakefile", "workflow/Snakefile", "--config", "study=demo/tiny.yaml"]
PAIR = "eng_Latn-qaa_Latn"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return helpers.clone(tmp_path_factory.mktemp("clone") / "project")


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
def warm(clone):
    """A `python` whose scripts are forks of one process: forty that import torch and transformers take minutes."""
    return shim(clone)


@pytest.fixture(scope="module")
def finished(clone, warm):
    """The workflow stopped after the base, then gone on with to its end, two jobs at a time.

    Every job looks at the figures that it draws, for text that is cut off or lies on other text.
    """
    plan = run([SNAKEMAKE, *STUDY, "--dry-run"], clone)
    assert "train_base" in plan and "layer_swap_controls" in plan
    workflow = [warm, SNAKEMAKE, *STUDY, "--cores", "2"]
    run([*workflow, "--until", "train_base"], clone)
    weights = clone / "build/tiny/base/model.safetensors"
    before = weights.stat().st_mtime_ns
    run([*workflow, "--report-after-run", "--report", "results/tiny.html"], clone, CPT_FIGURES="look")
    assert weights.stat().st_mtime_ns == before  # what was finished is not made again
    steered = "results/moe-tiny/moe-routing/steering.json"  # a mixture of experts, on the same world
    run(
        [warm, SNAKEMAKE, *STUDY[:-1], "study=demo/moe-tiny.yaml", "--cores", "2", "--", steered],
        clone,
        CPT_FIGURES="look",
    )
    return clone


def test_every_result_and_figure_is_there(finished):
    results = finished / "results/tiny"
    for name in (
        f"sentence-retrieval/{PAIR}/accuracy",
        f"sentence-alignment/{PAIR}/alignment",
        f"sentence-retrieval/{PAIR}/layer-swap__semantic_hub+layer-swap__random",
        "layer-specialize/layers",
        "weight-diff/int_and_sem",
        "downstream-correlation/correlation",
        "layer-swap/controls",
        "language-loss/language_loss",
        "alignment/gradients",
        "alignment/bigram",
        "layer-ablation/sweep",
        "steering/steering",
        "arms",
        f"sentence-retrieval/{PAIR}/cpt__checkpoint-40+attn_int_swap__checkpoint-40+ffn_lsn_swap__checkpoint-40",
        "weight-diff/attn_vs_ffn",
        "weight-diff/gate_lsn",
        "lsn/result/tiny.report-counts",
        "lsn/result/tiny.report-convergence",
        "lsn/lsn_activation/tiny",
        "lsn/deactivate",
        "lsn/methods",
        "activation-correlation/tiny_correlation_strength",
        "component-swap/attn_int_swap/controls",
        "component-swap/ffn_lsn_swap/controls",
        "report/claims",
        *(f"report/figures/{path.stem}" for path in (results / "report/figures").glob("*.png")),
    ):
        for suffix in (".pdf", ".png"):
            assert (results / f"{name}{suffix}").stat().st_size > 2000, name + suffix
    assert len(list((results / "report/figures").glob("fig*.pdf"))) == 10
    page = (results / "report.html").read_text()
    # All but the two comparisons of runs and the routing of experts, of which this study has none.
    assert page.count("<img ") > 25 and page.count("Not measured") == 4 and "figure is missing" not in page
    assert "step 40" in (results / "samples.html").read_text() and 'href="samples.html"' in page
    report = (finished / "results/tiny.html").read_text()
    for section in (
        "1. Sentence retrieval", "2. Layer specialization", "3. Downstream task", "4. Layer swaps",
        "5. Loss by language", "6. Arms",
        "1. Attention against FFN", "2. Language-specific neurons", "3. Activation over CPT", "4. Component swaps",
        "1. Layer ablation", "1. Steering", "Claims", "Figures of the paper",
    ):  # fmt: skip
        assert section in report
    models = re.compile(r"semantic_hub|random|checkpoint-\d+")
    ours = [path for path in results.rglob("*.json") if not models.fullmatch(path.parent.name)]
    assert len(ours) > 30
    for path in ours:
        content = json.loads(path.read_text())
        if isinstance(content, list):  # with its facts beside it
            content = json.loads(path.with_suffix(".facts.json").read_text())
        assert "_header" in content, path
        assert content["_header"]["schema"] and content["_header"]["libraries"]["torch"], path


def test_every_figure_is_drawn_anew(finished, tmp_path, monkeypatch):
    """From the results alone."""
    gallery = helpers.load_script("docs/figures.py")
    monkeypatch.chdir(finished)
    said = gallery.draw([Study.find(f"demo/{name}.yaml", None) for name in ("tiny", "moe-tiny")], tmp_path)
    # It has no other run, no arm that trains outer layers, and no experts.
    of_others = {name: study for name, (study, _) in said.items() if study != "tiny"}
    assert of_others == {"compare": "", "runs": "", "routing": "moe-tiny", "router_steering": "moe-tiny"}
    assert {path.stem for path in tmp_path.glob("*.png")} >= set(gallery.DRAWN) - {"compare", "runs"}


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


def test_each_step_of_part_two_read_what_the_step_before_wrote(finished):
    results = finished / "results/tiny"

    def read(name):
        return json.loads((results / name).read_text())

    last = finished / "build/tiny/cpt/checkpoint-40"
    mask, control, rich = (read(f"lsn/result/tiny{kind}.json") for kind in ("", ".control", ".layers"))
    facts = read("lsn/result/tiny.layers.facts.json")
    assert mask["_header"]["models"]["model"]["spec"] == str(last.relative_to(finished))
    sizes = {lang: [len(mask[lang][layer]) for layer in mask[lang]] for lang in mask if lang != "_header"}
    assert list(sizes) == ["eng_Latn", "qab_Latn", "qaa_Latn"] and facts["counts"] == sizes["qaa_Latn"]
    assert sizes == {lang: [len(control[lang][layer]) for layer in control[lang]] for lang in sizes}
    layers = read("layer-specialize/layers.json")
    assert len(rich) == len(layers["interface_layers"])
    for swap, own in (("attn_int_swap", layers["interface_layers"]), ("ffn_lsn_swap", rich)):
        assert read(f"component-swap/{swap}/metadata.json")["layers"] == sorted(own)
        named = {row["name"]: row for row in read(f"component-swap/{swap}/controls.json")["sets"]}
        folder = read(f"sentence-retrieval/{PAIR}/{swap}__checkpoint-40.json")
        name = "attention_interface" if swap == "attn_int_swap" else "ffn_lsn_rich"
        assert named[name]["layer_accuracy"] == [a for _, a in folder["layer_accuracy"]]
    strength = read("activation-correlation/tiny_correlation_strength.json")
    assert strength["series"]["steps"] == [10, 20, 40]
    change = read("weight-diff/attn_vs_ffn.json")["checkpoints"]["40"]["layers"]
    own = [change[f"layer_{layer}"]["attention_max"] for layer in layers["interface_layers"]]
    assert strength["series"]["attention"][-1] == pytest.approx(sum(own) / len(own))
    if any(sizes["qaa_Latn"]):
        assert "qaa_Latn" in read("lsn/deactivate.json")["matrix"]
    claims = read("report/claims.json")["claims"]
    assert " ".join(claims).startswith("C1 C2a C2b C3 C4 C5a C5b C6 C7 C8")
    gate = read("layer-specialize/layers.json")["_header"]["gate"]
    assert gate["untrained"].endswith("untrained.json")
    assert read("layer-swap/controls.json")["_header"]["gate"] == read("report/claims.json")["_header"]["gate"] == gate
    # One run decides nothing, and that is said; nor do layers of noise.
    verdict = "one run: no verdict" if gate["passed"] else "no verdict: gate"
    assert {claims[c]["verdict"] for c in ("C1", "C2a", "C2b", "C5a", "C5b")} == {verdict}
    assert claims["C3"]["verdict"] == "one run: no verdict" and claims["C3"]["numbers"][0]["value"] is not None


def test_nothing_is_left_to_do_until_a_method_is_edited(finished, warm, tmp_path):
    """Not for a comment."""
    clone = shutil.copytree(finished, tmp_path / "clone", symlinks=True)
    script = clone / "cpt/train.py"
    text = script.read_text()
    workflow = [warm, SNAKEMAKE, *STUDY, "--cores", "1"]
    script.write_text(text + "\n# only words\n")
    assert "Nothing to be done" in run(workflow, clone)
    script.write_text(text.replace("def train(", "EDITED = True\n\n\ndef train("))
    run([*workflow, "--until", "train_base"], clone)
    log = (clone / "results/tiny/logs/train-base.log").read_text()
    assert "removing the run recorded there (--overwrite)" in log  # the finished training is not kept
    assert "train_base" not in run([*workflow, "--dry-run"], clone)
    # As after an update from a version without stamps: how the models were made is not known.
    shutil.rmtree(clone / ".snakemake/code")
    script.touch()
    run([*workflow, "--until", "train_base", "--forcerun", "train_base"], clone)
    assert "is finished" in (clone / "results/tiny/logs/train-base.log").read_text()


def test_a_step_that_fails_leaves_the_page_of_the_others(finished, warm, tmp_path):
    clone = shutil.copytree(finished, tmp_path / "clone", symlinks=True)
    made = ("report/claims.json", "report/numbers.csv", "report.html", "layer-ablation/cogsym.json")
    for name in (*made, "layer-ablation/cogsym.png"):
        (clone / "results/tiny" / name).unlink()
    script = clone / "layer-ablation/cogsym.py"
    begins = "def main(argv=None) -> None:\n"
    script.write_text(script.read_text().replace(begins, f"{begins}    raise SystemExit(3)\n"))
    done = subprocess.run([warm, SNAKEMAKE, *STUDY, "--cores", "1"], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 1 and "report of the results so far: results/tiny/report.html" in done.stderr
    page = (clone / "results/tiny/report.html").read_text()
    assert "the workflow failed at cogsym (<code>results/tiny/logs/cogsym.log</code> says why)" in page
    assert page.count("Not measured in this study") == 5 and page.count("<img ") > 24 and "One run: no verdict" in page
    assert (clone / "results/tiny/report/numbers.csv").stat().st_size > 100_000
    script.write_text((ROOT / "layer-ablation/cogsym.py").read_text())
    run([warm, SNAKEMAKE, *STUDY, "--cores", "1"], clone)
    page = (clone / "results/tiny/report.html").read_text()
    assert "the workflow failed" not in page and page.count("Not measured in this study") == 4


def test_an_arm_waits_for_the_layers_of_cogsym(clone, warm, tmp_path):
    text = re.sub(r"^arms:.*\n(  .*\n)*", "", (clone / "demo/tiny.yaml").read_text(), flags=re.M)
    arms = "arms:\n  outer: {train_only: results/tiny/layer-ablation/cogsym.json}\n"
    (tmp_path / "arms.yaml").write_text(f"{text}\n{arms}")
    plan = [*STUDY[:-1], f"study={tmp_path / 'arms.yaml'}", "--dry-run", "--until", "train_arm"]
    assert "cogsym" in run([warm, SNAKEMAKE, *plan], clone)


def test_seeds_side_by_side(finished, warm):
    run(
        f"{warm} studies/across_seeds.py --study demo/tiny.yaml --seeds 42 --out build/try/across-seeds",
        finished,
        CPT_FIGURES="look",
    )
    out = finished / "build/try/across-seeds"
    tables = (out / "tables.md").read_text()
    titles = "Layer swaps", "Attention against FFN", "Language-specific neurons", "Component swaps", "Layer ablation"
    for title in titles:
        assert f"## {title}" in tables
    assert {path.stem for path in out.glob("*.png")} == {
        "retrieval", "weight_change", "swaps", "component_swaps", "deactivation", "sweeps"
    }  # fmt: skip
    rows = [line for line in tables.splitlines() if line.startswith("| 42 | qaa_Latn |")]
    assert rows and all("[" not in cell for cell in rows[0].split("|"))


def readme_commands():
    """The commands of all parts in the root README, as printed."""
    text = (ROOT / "README.md").read_text()
    part = text[text.index("## Part I") : text.index("## Make your own")]
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", part, re.S | re.M)).replace("\\\n", " ")
    return [line for line in blocks.splitlines() if line.startswith(("python", "lm_eval"))]


def test_the_commands_of_the_readme_run_as_printed(finished, warm):
    """The first of three folders in a Python of its own, as a user's, the others as forks.

    Forks differ in what is imported before they start alone. The three read weights, call lm_eval, draw; one that runs
    a model is in test_hub.py.
    """
    (finished / "study.yaml").write_text((finished / "demo/tiny.yaml").read_text())
    lines, fresh = readme_commands(), {"weight-diff", "lm_eval_sib200", "report"}
    assert len(lines) >= 26
    for line in lines:
        if line.startswith("lm_eval"):
            continue  # test_lm_eval_sib200.py has it
        folder = line.split()[1].partition("/")[0]
        # The tiny study in the place of the demo, its last step in the place of the demo's.
        line = re.sub(r"\bdemo\b", "tiny", line).replace("checkpoint-600", "checkpoint-40")
        run(line if folder in fresh else re.sub("^python", warm, line), finished)
        fresh.discard(folder)
    assert not fresh
