"""Model references: steps are numbers, runs are ordered by them, and every miss says what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import save_run, save_tiny

from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import identity, opening, refs, step_names, tokenization


@pytest.fixture
def a_run(tmp_path):
    for step in (100, 15, 9):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 10}))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-15", 15),
        ("step1000", 1000),
        ("stage2-ingredient1-step1000-tokens5B", 1000),
        ("stage1-step337000", 337000),
        ("step1200000-tokens5033B", 1200000),
        ("main", None),
        ("checkpoint-15.partial", None),
        ("step_500", 500),
        ("ckpt_100", 100),
        ("iter_0001000", 1000),
        ("global_step100", 100),
        ("epoch=1-step=100", 100),  # as Lightning names them
        ("step-50K", 50_000),
        ("step2M-tokens5B", 2_000_000),
        ("epoch-2-step-500", 500),
        ("Checkpoint-3-step700", 700),
        ("run-a/step100", 100),
        ("stage1-step10000-tokens21B", 10_000),
        ("eus-500", None),
        ("checkpoint-best", None),
        ("step50B", None),
        ("footstep12", None),
    ],
)
def test_steps_are_read_from_names(name, step):
    assert step_names.step_of(name) == step


def test_a_run_is_ordered_by_number_not_by_text(a_run):
    (a_run / "checkpoint-7.partial").mkdir()
    (a_run / "checkpoint-8").write_text("a file, no folder")
    assert [ref.step for ref in refs.run(str(a_run))] == [9, 15, 100]
    assert [ref.step for ref in refs.run(str(a_run), steps=[100, 9])] == [9, 100]
    with pytest.raises(InputError, match=r"no checkpoint of step 16; the run has 9, 15, 100"):
        refs.run(str(a_run), steps=[16])


def test_the_number_that_grows_is_the_step():
    assert step_names.steps_of(["part2-1000", "final", "part2-500"]) == {"part2-500": 500, "part2-1000": 1000}
    assert step_names.steps_of(["part2-1000", "part2-500", "llama-7"]) == {}  # one is a stranger: nothing is guessed
    # The number behind the word stays the same in all: it is no step.
    assert step_names.steps_of(["step1-it200", "step1-it90"]) == {"step1-it90": 90, "step1-it200": 200}
    assert step_names.steps_of(["1-10", "2-20"]) == {}  # two numbers grow
    assert step_names.steps_of(["x-1"]) == {}
    assert step_names.steps_of(["step10", "step9", "main"]) == {"step9": 9, "step10": 10}


@pytest.mark.parametrize("name", ["step_{}", "ckpt-{}", "iter_{:07d}", "global_step{}", "step{}-tokens1B", "eus-{}"])
def test_runs_of_other_names(tmp_path, name, capsys):
    for step in (5, 10):
        save_tiny("llama", tmp_path / "run" / name.format(step), seed=step, tokenizer=False)
    (tmp_path / "run" / name.format(7)).mkdir()  # no model, and no checkpoint
    assert [ref.step for ref in refs.run(str(tmp_path / "run"))] == [5, 10]
    assert [ref.step for ref in refs.models([str(tmp_path / "run")] * 2)] == [5, 10] * 2
    assert capsys.readouterr().out.count(f"({name.format(5)} is step 5)") == 1
    assert refs.is_run(tmp_path / "run") and not refs.is_run(tmp_path / "run" / name.format(5))


def test_what_a_trainer_leaves_is_a_run(tmp_path, capsys):
    run = tmp_path / "run"
    save_run("llama", run, (5, 10), tokenizer=False)
    save_tiny("llama", run, seed=10)
    for name in ("tmp-checkpoint-15", "checkpoint-best", "runs/May01", "checkpoint-10/global_step10"):
        (run / name).mkdir(parents=True)
    for read in (refs.run, refs.models):
        assert [Path(ref.spec).name for ref in read(str(run))] == ["checkpoint-5", "checkpoint-10"]
    out = capsys.readouterr().out
    assert out.count("its final model is the same as checkpoint-10; the run is its checkpoints") == 1
    assert refs.model(run).step is None  # where one model is meant, it is the final one
    save_tiny("llama", run, seed=3)
    refs.run(str(run))
    assert "its final model is none of its checkpoints" in capsys.readouterr().out


def test_one_line_says_whose_tokenizer_a_run_uses(tmp_path, capsys):
    base = save_tiny("llama", tmp_path / "base")
    for step in (5, 10, 15):
        bare = save_tiny("llama", tmp_path / "run" / f"checkpoint-{step}", tokenizer=False)
        tokenization.tokenizer_folder(refs.model(bare), None, refs.model(base))
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and f"no tokenizer files in the checkpoints in {tmp_path / 'run'}; using those" in out


def test_revisions_of_one_repository_are_a_run():
    names = [f"org/olmo@stage2-ingredient1-step{n}-tokens5B" for n in (3000, 512, 10000)]
    found = refs.run(names)
    assert [ref.step for ref in found] == [512, 3000, 10000]
    assert found[0].repository == "org/olmo" and found[0].revision == "stage2-ingredient1-step512-tokens5B"
    assert found[0].model_id == "org__olmo@stage2-ingredient1-step512-tokens5B"
    with pytest.raises(InputError, match="step 512 appears twice"):
        refs.run([*names, "org/olmo@step512"])
    with pytest.raises(InputError, match="no step in its name"):
        refs.run([*names, "org/olmo@main"])


def test_a_single_model_is_a_run_of_one(tmp_path):
    folder = tmp_path / "final"
    folder.mkdir()
    assert [ref.step for ref in refs.run(str(folder))] == [0]


def test_model_ids_tell_folders_apart(a_run):
    assert refs.model(a_run / "checkpoint-15").model_id == "run__checkpoint-15"
    assert refs.model(str(a_run / "checkpoint-15") + "/").model_id == "run__checkpoint-15"


@pytest.mark.parametrize("text", ["./none", "/none/at/all", "none", "~/x", "org/name:checkpoint-5", "a//b"])
def test_a_missing_folder_is_refused_at_once(text):
    with pytest.raises(InputError, match="no such folder"):
        refs.model(text)


def test_a_colon_is_no_way_to_name_a_folder():
    with pytest.raises(InputError, match="is org/cpt/checkpoint-500 meant"):
        refs.model("org/cpt:checkpoint-500")


def test_a_mistyped_path_is_not_taken_for_a_repository(a_run, monkeypatch):
    monkeypatch.chdir(a_run.parent)
    with pytest.raises(InputError, match="run exists, but checkpoint-16 is not in it"):
        refs.model("run/checkpoint-16")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[1, 2]", "does not hold a configuration"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "is not valid JSON"),
        ('{"num_hidden_layers": 1e400}', "num_hidden_layers is inf, which cannot be a size"),
        ('{"num_hidden_layers": NaN}', "num_hidden_layers is nan, which cannot be a size"),
        ('{"num_hidden_layers": -3}', "is -3, which cannot be a size"),
        ('{"hidden_size": 4503599627370496}', "hidden_size is 4503599627370496"),
        ('{"text_config": {"vocab_size": "many"}}', "vocab_size is many"),
        ('{"intermediate_size": true}', "intermediate_size is True"),
    ],
)
def test_crafted_configurations(tmp_path, text, match):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=match) as caught:
        refs.model(tmp_path).config()
    assert len(str(caught.value)) < 600


def test_configurations_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    assert refs.model(tmp_path).describe()["weights_sample"] is None
    os.mkfifo(tmp_path / "config.json")  # would block whoever opens it
    with pytest.raises(InputError, match="does not exist, or is not a file"):
        refs.model(tmp_path).config()
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_bytes(b'{"hidden_size": 64.0, "num_key_value_heads": null, "n_inner": [1]}')
    assert refs.model(tmp_path).config()["hidden_size"] == 64


def test_the_sample_of_weights_tells_two_trainings_apart(tmp_path):
    one = save_tiny("llama", tmp_path / "a", seed=0, tokenizer=False)
    same = save_tiny("llama", tmp_path / "b", seed=0, tokenizer=False)
    other = save_tiny("llama", tmp_path / "c", seed=1, tokenizer=False)
    assert identity.weights_sample(one) == identity.weights_sample(same) != identity.weights_sample(other)
    assert refs.model(one).describe()["weights_sample"] == identity.weights_sample(one)
    assert identity.weights_sample(tmp_path) is None


def test_a_change_to_one_tensor_changes_the_sample(tmp_path):
    from helpers import read_tensors
    from safetensors.torch import save_file

    folder = save_tiny("llama", tmp_path / "a", tokenizer=False, hidden_size=256, intermediate_size=768)
    before = identity.weights_sample(folder)
    tensors = read_tensors(folder)
    assert sum(t.nbytes for t in tensors.values()) > 4 * 64 * 16384  # far more than the evenly spaced blocks cover
    for name in tensors:
        changed = tensors | {name: tensors[name] + 1}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        assert identity.weights_sample(folder) != before, name


def test_a_model_of_another_run_gets_the_tokenizer_of_its_own(tmp_path):
    save_tiny("llama", tmp_path / "study-run" / "checkpoint-1")
    save_tiny("llama", tmp_path / "study-run")
    save_tiny("llama", tmp_path / "other")
    bare = save_tiny("llama", tmp_path / "other" / "checkpoint-1", tokenizer=False)
    assert tokenization.tokenizer_folder(refs.model(bare), str(tmp_path / "study-run")) == tmp_path / "other"


def test_a_checkpoint_without_tokenizer_uses_the_runs_then_the_bases(tmp_path, capsys):
    base = save_tiny("llama", tmp_path / "base")
    bare = save_tiny("llama", tmp_path / "run" / "checkpoint-1", tokenizer=False)
    ref = refs.model(bare)
    assert tokenization.tokenizer_folder(ref, None, refs.model(base)) == base
    assert "using those of the base" in capsys.readouterr().out
    wider = save_tiny("llama", tmp_path / "other" / "checkpoint-1", tokenizer=False, vocab_size=300)
    with pytest.raises(InputError, match=r"do not fit \(272 tokens, 300 needed\)"):
        tokenization.tokenizer_folder(refs.model(wider), None, refs.model(base))
    with pytest.raises(InputError, match="has no tokenizer files"):
        tokenization.tokenizer_folder(ref)
    (tmp_path / "run" / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    assert tokenization.tokenizer_folder(ref, None, refs.model(base)) == tmp_path / "run"


def fabricated_cache(folder, repository, revision, files):
    """A hub cache as the hub client leaves it, with one snapshot; returns the commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = folder / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name, data in files.items():
        (snapshot / name).write_bytes(data)
    (root / "refs").mkdir()
    (root / "refs" / revision).write_text(commit)
    return commit


def test_a_hub_revision_is_read_from_the_cache_and_its_commit_recorded(tmp_path, monkeypatch):
    import torch
    from huggingface_hub import constants

    from cpt_utils.models import loading

    model = save_tiny("llama", tmp_path / "m")
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    commit = fabricated_cache(tmp_path / "cache", "org/tiny", "step1000", files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    ref = refs.model("org/tiny@step1000")
    assert (ref.step, ref.describe()["revision"], ref.config()["model_type"]) == (1000, commit, "llama")
    assert loading.load_model(ref, torch.float32, torch.device("cpu")).num_parameters() > 0
    assert len(tokenization.load_tokenizer(ref)) == 259


def test_a_repository_that_is_not_cached_says_so_offline(tmp_path):
    """In a process of its own: the client reads these variables when it is imported."""
    code = "from cpt_utils.base import cli\nfrom cpt_utils.checkpoints import refs\n"
    code += "cli.run(lambda: refs.model('org/none').folder())"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: org/none: no such folder here, not in the hub cache")
    assert len(done.stderr.strip().splitlines()) == 1


def test_checkpoints_with_the_same_weights_are_said(tmp_path, capsys):
    import shutil

    run = tmp_path / "run"
    save_run("llama", run, (1, 20, 300))
    opening.look_over(refs.run(run))
    assert capsys.readouterr().out == ""
    shutil.copytree(run / "checkpoint-20", run / "checkpoint-1000")
    shutil.copytree(run / "checkpoint-1", run / "checkpoint-2")
    for _ in range(2):  # said once
        opening.look_over(refs.run(run))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all("hold the same weights" in line for line in said)
    assert "steps 1, 2 hold" in said[0] and "steps 20, 1000 hold" in said[1]
    opening.look_over(refs.run(run, [2, 20, 300]))
    base = save_tiny("llama", tmp_path / "base", seed=20)  # a base is no checkpoint
    opening.look_over([refs.model(base), *refs.run(run, [20])])
    assert capsys.readouterr().out == ""
