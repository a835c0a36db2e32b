"""workflow/check.py: what it finds before a study runs, and what the workflow makes of it."""

from __future__ import annotations

import gzip
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, load_script, save_run, save_tiny
from launch import SNAKEMAKE, shim

from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study

check = load_script("workflow/check.py")
planning = check.planning


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_tiny("llama", root / "base")
    save_run("llama", root / "run", (5, 10, 20, 40))
    return root


@pytest.fixture
def study(models, tmp_path):
    """A study in which nothing is missing, as a function of what is changed in it."""
    for name in ("a.txt", "b.txt", "held.txt", "c.txt"):
        (tmp_path / name).write_text("".join(f"{name} sentence {i}\n" for i in range(30)))
    task = tmp_path / "task"
    (task / "deu_Latn").mkdir(parents=True)
    whole = {
        "name": "whole", "base": str(models / "base"), "run": str(models / "run"),
        "languages": {"base": "eng_Latn", "target": "deu_Latn", "lsn": ["eng_Latn", "deu_Latn"]},
        "data": {
            "source": "text", "base_file": str(tmp_path / "a.txt"), "target_file": str(tmp_path / "b.txt"),
            "heldout": {code: str(tmp_path / "held.txt") for code in ("eng_Latn", "deu_Latn")},
            "task": {"name": "sib200_deu_Latn", "dir": str(task)},
            "lsn_text": {code: str(tmp_path / "c.txt") for code in ("eng_Latn", "deu_Latn")},
        },
        "tokens": str(tmp_path / "ids"), "lsn": {"tokens": 2000}, "results": str(tmp_path / "results"),
        "steering": {},
    }  # fmt: skip

    def write(**changes) -> Path:
        values = {**whole, **changes}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return path

    write.whole = whole
    return write


def test_a_whole_study_is_ready(study, capsys):
    run = study.whole["run"]
    assert check.main([str(study(ablation={}, spectral={}, alignment={}, runs={"again": run}))]) == 0
    out = capsys.readouterr().out
    assert f"runs.again {run}: checkpoints of step 5, 10, 20, 40 (4)" in out
    assert "the start of about 46 steps: 3 min" in out
    assert "llama, 3 layers" in out and "checkpoints of step 5, 10, 20, 40 (4)" in out
    assert "tokenizers: all alike" in out and "30 sentence pairs eng_Latn-deu_Latn" in out
    assert "nothing is left out" in out and "on the CPU (" in out and "GB free" in out and "ready to run" in out
    assert "PROBLEM" not in out


def test_short_texts_are_no_hundred_million_tokens(study, tmp_path):
    packed = tmp_path / "c.txt.gz"
    packed.write_bytes(gzip.compress(random.Random(0).randbytes(700).hex().encode(), mtime=0))
    texts = {"eng_Latn": str(tmp_path / "c.txt"), "deu_Latn": str(packed), "fra_Latn": None}  # the third is of mOSCAR
    path = study(lsn={}, languages=study.whole["languages"] | {"lsn": list(texts)}, data={"lsn_text": texts})
    here = Study.find(path)
    found = check.files(here, planning.plan(here), check.Report())
    text = (tmp_path / "c.txt").stat().st_size + check.PACKED * packed.stat().st_size
    assert found["neurons"] == pytest.approx(text / check.BYTES_PER_TOKEN + 99_999_744)


def test_every_problem_is_said_and_the_code_is_two(study, models, tmp_path, capsys):
    broken = shutil.copytree(models / "run", tmp_path / "run")
    file = broken / "checkpoint-10/model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    shutil.copytree(save_tiny("qwen2", tmp_path / "q", seed=1), broken / "checkpoint-60")
    data = study.whole["data"] | {"base_file": str(tmp_path / "none.txt"), "heldout": {"deu_Latn": "none.txt"}}
    with pytest.raises(InputError, match="5 problems, listed above"):
        check.main([str(study(run=str(broken), data=data, base=str(tmp_path / "nobase")))])
    said = [line for line in capsys.readouterr().out.splitlines() if "PROBLEM" in line]
    assert len(said) == 5
    parts = ("nobase", "checkpoint-10/model.safetensors is cut short", "checkpoint-60 a qwen2", "base-file", "none.txt")
    assert all(any(part in line for line in said) for part in parts)


def test_two_types_are_no_pair(study, tmp_path):
    other = save_tiny("qwen2", tmp_path / "q")
    with pytest.raises(InputError, match="4 problems"):
        check.main([str(study(base=str(other)))])


def test_another_number_of_layers_is_no_pair(study, tmp_path):
    other = save_tiny("llama", tmp_path / "deep", layers=4)
    with pytest.raises(InputError, match="4 problems"):
        check.main([str(study(base=str(other)))])


def test_a_language_model_is_a_pair_with_or_without_its_image_tower(study, tmp_path):
    base = save_tiny("gemma3", tmp_path / "with")
    save_tiny("gemma3_text", tmp_path / "run/checkpoint-5", seed=5)
    assert check.main([str(study(base=str(base), run=str(tmp_path / "run")))]) == 0


def test_other_tokenizers_are_said(study, models, tmp_path, capsys):
    from test_tokenizer_id import hub_form

    run = shutil.copytree(models / "run", tmp_path / "run")
    for step in (20, 40):
        place = hub_form("qwen2", tmp_path / f"t{step}", ["a text of some words"] * 3)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(place / name, run / f"checkpoint-{step}")
    assert check.main([str(study(run=str(run)))]) == 0
    assert "tokenizers: 2 kinds (base, 5, 10; 20, 40)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": None}, ["neurons of Part II", "no tokens"]),
        ({"languages": {"base": "eng_Latn", "target": "deu_Latn"}}, ["no languages.lsn"]),
        ({"controls": 10}, ["10 random sets (controls) are too few"]),
        (
            {"steering": None},
            [
                "Part III, layer ablation: the study has no ablation (`ablation: {}` is enough)",
                "Part IV",
                "no spectral",
                "Part V, steering: the study has no steering",
            ],
        ),
    ],
)
def test_what_is_left_out_is_said(study, changes, said, capsys):
    check.main([str(study(**changes))])
    out = capsys.readouterr().out.partition("left out")[2]
    assert all(words in out for words in said)


def test_the_plan_of_data_that_are_missing(study):
    data, asked = study.whole["data"], {"ablation": {}, "spectral": {}, "alignment": {}}
    asked["runs"] = {"again": study.whole["run"]}
    without = {key: value for key, value in data.items() if key not in ("heldout", "task")}
    made = planning.plan(Study.find(study(data=without, **asked)))
    assert (made.task, made.loss, made.losses, made.deactivation) == (False,) * 4
    assert made.lsn == ["eng_Latn", "deu_Latn"]
    assert [text.partition(":")[0] for text in made.left_out] == [
        "the downstream task and what needs it (C6, half of Figure 2)", "the loss of each language over CPT",
        "the loss after a swap",
        "deactivation (Figure 9)", "correlations with bigrams",
    ]  # fmt: skip
    assert made.alignment and not made.bigram
    made = planning.plan(Study.find(study(data=data | {"heldout": {"de": "x.txt"}}, **asked)))
    assert made.loss and made.losses and made.bigram and not made.deactivation
    assert made.left_out == ["deactivation (Figure 9): data.heldout has no text of eng_Latn"]
    made = planning.plan(Study.find(study(data=without, lsn={"methods": ["ap"]})))
    assert any(text.startswith("deactivation (Figure 9), the comparison of methods (lsn.") for text in made.left_out)


def test_methods_that_the_study_cannot_have_are_said_before_anything_is_counted(study, tmp_path, capsys):
    with pytest.raises(
        InputError, match=r"ternary, .* three languages or more, but languages.lsn has only eng_Latn and deu"
    ):
        check.main([str(study(lsn={"methods": ["ternary"]}))])
    for name in ("base", "run/checkpoint-5"):
        save_tiny("mixtral", tmp_path / "moe" / name)
    moe = {"base": str(tmp_path / "moe/base"), "run": str(tmp_path / "moe/run")}
    with pytest.raises(InputError, match="gradients of the neurons of experts cannot be read"):
        check.main([str(study(**moe, lsn={"methods": ["gradient"]}))])


def test_what_is_trained_first_is_no_problem(study, tmp_path, capsys):
    train = {"base": "demo/base.yaml", "cpt": "demo/cpt.yaml", "world": "demo/world.yaml"}
    data = study.whole["data"] | {"base_file": str(tmp_path / "later.txt")}
    assert check.main([str(study(base="build/x/base", run="build/x/run", train=train, data=data))]) == 0
    out = capsys.readouterr().out
    assert "trained first, by demo/cpt.yaml" in out and "made first" in out and "not known before" in out


@pytest.mark.parametrize(
    ("spectral", "runs", "expected"),
    [
        # Heads: orders x points, those of BY_ENERGY twice; cuts: ways x shares.
        ({"rewind": {"orders": ["importance", "random"], "stride": 50, "draws": 1},
          "truncate": {"shares": [0.5, 0.9], "curves": ["svd"]}}, None, (2 + 2) * 2 + 2),
        ({"rewind": {"orders": ["most", "random_layer"], "stride": 10, "draws": 3},
          "truncate": {"shares": [0.5], "curves": ["svd", "dare"], "draws": 4}}, {"b": "runs/b"},
         4 * 10 + 5 + 3 * (9 + 1)),
        ({}, None, (2 + 1 + 1 + 10 + 5) * 20 + 4 * 6 + (1 + 2 + 1 + 2) * 10),
    ],
)  # fmt: skip
def test_models_of_part_four_are_counted_by_what_is_asked_for(study, spectral, runs, expected):
    """It was one number whatever the orders: a try of ten models was announced as one of a hundred."""
    found = Study.find(study(spectral=spectral, runs=runs))
    assert planning.changed_models(found, n_heads=24) == expected


def dry_run(path: Path, *flags: str) -> subprocess.CompletedProcess:
    """The workflow's plan, asked for in the study's folder, which is none of the repository."""
    pytest.importorskip("snakemake")
    command = [shim(), SNAKEMAKE, "--snakefile", str(ROOT / "workflow/Snakefile"), "--config", f"study={path.name}"]
    command += flags or ("--dry-run", "--quiet", "rules")
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True, timeout=200)


def test_nothing_is_planned_for_a_run_that_is_nowhere(study):
    done = dry_run(study(run="runs/eus"))
    assert done.returncode != 0 and "runs/eus: no such folder here" in done.stdout + done.stderr


def test_other_runs_have_rules_of_their_own_and_must_be_somewhere(study, capsys):
    runs, file = {"fra": "runs/fra/cpt", "ces.2": "runs/ces/cpt"}, study().with_name("cpt.yaml")
    file.write_text("save_steps: [10]\n")
    done = dry_run(study(runs=runs, train={"runs": dict.fromkeys(runs, file.name)}, spectral={}))
    assert done.returncode == 0 and {"train_run_fra", "train_run_ces.2"} <= {*done.stdout.split()}, done.stderr
    done = dry_run(study(runs=runs | {"ces.2": "runs/ces"}, train={"runs": {"fra": file.name}}, spectral={}))
    assert done.returncode != 0 and "WorkflowError" in done.stdout and "runs/ces: no such folder here" in done.stdout
    with pytest.raises(InputError, match="runs/ces: no such folder here"):
        check.main([str(study(runs={"ces": "runs/ces"}))])
    capsys.readouterr()
    assert check.main([str(study(runs={"ces": study.whole["run"]}, ablation={}, spectral={}, alignment={}))]) == 0
    assert "nothing is left out" in capsys.readouterr().out
    left_out = planning.plan(Study.find(study(ablation={}, spectral={}, alignment={}))).left_out
    assert left_out == ["the line between two runs (D6) and the contrast of heads: the study has no other run (runs)"]


def test_parts_one_and_two_of_another_run_are_planned_beside_the_studys_and_then_compared(study, models, tmp_path):
    shutil.copytree(models / "run", tmp_path / "second")
    path = study(runs={"second": "second"}, ablation={}, spectral={}, alignment={})
    done = dry_run(path, "arm=second", "--dry-run", "--quiet", "rules")
    rules = {line.split()[0] for line in done.stdout.splitlines() if line.strip() and line.split()[-1].isdigit()}
    assert {"retrieval", "identify", "layer_swap_controls", "gradients", "bigram", "claims"} <= rules, done.stderr
    assert not {"compare", "layer_ablation", "spectrum"} & rules
    done = dry_run(path, "arm=second", "--dry-run")
    assert "results/runs/second/report/claims.json" in done.stdout and "--arm second" not in dry_run(path).stdout
    claims = tmp_path / "results/runs/second/report/claims.json"
    claims.parent.mkdir(parents=True)
    claims.write_text("{}")
    done = dry_run(path)
    assert done.returncode == 0 and {"compare", "spectrum"} <= {*done.stdout.split()}, done.stderr


def test_part_one_alone_gets_its_verdicts_and_figures(study):
    done = dry_run(study(tokens=None))
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "left out: the neurons of Part II" in said
    rules = {line.split()[0] for line in said.splitlines() if line.strip() and line.split()[-1].isdigit()}
    assert {"claims", "figures", "attn_vs_ffn", "layer_swap_controls"} <= rules
    assert not {"identify", "activation_counts", "component_swap"} & rules


def test_models_that_are_yet_to_be_swapped_have_the_names_that_step_1_gives_them(study):
    """In a study of one's own the swapped folders do not exist when the workflow is drawn up."""
    path = study()
    results_in = Path(study.whole["results"])
    done = dry_run(path, "--summary")
    assert done.returncode == 0, done.stderr
    planned = {Path(line.split("\t")[0]).name for line in done.stdout.splitlines()}
    assert not (ROOT / results_in / "layer-swap").exists()
    assert {f"layer-swap__{method}.json" for method in ("semantic_hub", "random")} <= planned
    assert {f"{swap}__checkpoint-40.json" for swap in ("attn_int_swap", "ffn_lsn_swap")} <= planned
