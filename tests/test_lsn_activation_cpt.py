"""lsn/lsn_activation_cpt.py: means of a run and its base against a slow loop, files, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import load_script, nonlinearity, save_tiny
from launch import launch

from cpt_utils.architectures import archs
from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.measures import activation_files, masks, tokenids
from cpt_utils.models import loading

SCRIPT = load_script("lsn/lsn_activation_cpt.py")
OWN = {"en": {0: [], 1: [], 2: []}, "ga": {0: [1, 7], 1: [], 2: [5]}}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A base, a run of two checkpoints, masks and token ids, and a study that names them."""
    monkeypatch.chdir(tmp_path)
    save_tiny("qwen2", "base", seed=0)
    for number, step in enumerate((30, 5)):
        save_tiny("qwen2", f"run/checkpoint-{step}", seed=number + 1)
    (tmp_path / "study.yaml").write_text(
        "name: demo\nbase: base\nrun: run\ntokens: tokens\nresults: results\nlanguages: {base: en, target: ga}\n"
        "lsn: {block_size: 16}\n"
    )
    facts = {"models": {"model": refs.model("run/checkpoint-30").describe()}, "n_layers": 3, "ffn_width": 48}
    masks.write("results/lsn/result/demo.json", OWN, **facts)
    masks.write("results/lsn/result/demo.control.json", masks.random_control(OWN, 3, 48, 1), control=True, **facts)
    ids = torch.randint(3, 250, (300,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    tokenids.write(f"tokens/{tokenids.file_name('ga', 'demo')}", ids, {}, results.header("token-ids", language="ga"))
    return tmp_path, ids


def slow_mean(folder, ids, mask) -> float:
    model = loading.load_model(refs.model(folder), torch.float64, torch.device("cpu"))
    arch, values = archs.for_config(model.config), []
    for layer, chosen in mask.items():
        handle = nonlinearity(arch, model, layer).register_forward_hook(
            lambda _m, _a, out, chosen=chosen: values.extend(out[..., chosen].flatten().tolist())
        )
        with torch.no_grad():
            for block in ids[:288].view(-1, 16):
                model(input_ids=block[None].long())
        handle.remove()
    return sum(values) / len(values)


def test_a_run_and_its_base(study, monkeypatch):
    folder, ids = study
    passes = []
    own = SCRIPT.Activations.add
    monkeypatch.setattr(SCRIPT.Activations, "add", lambda self, part: (passes.append(1), own(self, part))[1])
    SCRIPT.main(["--dtype", "float64", "--batch-size", "9"])
    assert len(passes) == 3 * 2  # three models, 18 blocks in batches of 9: both masks in the same passes
    place = folder / "results/lsn/lsn_activation"
    assert sorted(p.name for p in (place / "base").iterdir()) == ["ga.288.json", "r.ga.288.json"]
    assert sorted(p.name for p in (place / "demo").iterdir()) == [
        "checkpoint-30-r.ga.288.json", "checkpoint-30.ga.288.json",
        "checkpoint-5-r.ga.288.json", "checkpoint-5.ga.288.json",
    ]  # fmt: skip
    control = masks.read("results/lsn/result/demo.control.json", "ga", 3, 48)
    for file, model, mask in (
        ("base/ga.288.json", "base", OWN["ga"]),
        ("demo/checkpoint-30.ga.288.json", "run/checkpoint-30", OWN["ga"]),
        ("demo/checkpoint-5-r.ga.288.json", "run/checkpoint-5", control),
    ):
        found, head = results.read_json(place / file, "lsn-activation")
        assert found["all_layers"] == pytest.approx(slow_mean(model, ids, mask), rel=1e-10)
        assert (found["n_neurons"], found["n_tokens"]) == (3, 288)
        assert sorted(found["layers"]) == ["0", "2"]
        assert head["control"] is ("-r." in file) and head["models"]["model"]["spec"] == model
    assert (place / "demo.png").is_file() and (place / "demo.pdf").is_file()


@pytest.mark.slow
def test_two_processes_find_the_means_of_one(study):
    flags = ["--batch-size", "4", "--save_folder"]  # 18 blocks in 5 batches
    SCRIPT.main(["--device", "cpu", *flags, "one"])
    place = study[0] / "two"
    launch("lsn/lsn_activation_cpt.py", *flags, "two")
    files = [path.relative_to(place) for path in place.rglob("*.json")]
    assert len(files) == 6
    for file in files:
        (one, _), (two, _) = (results.read_json(study[0] / folder / file) for folder in ("one", "two"))
        assert two["all_layers"] == pytest.approx(one["all_layers"], rel=1e-6)
        assert two["layers"] == pytest.approx(one["layers"], rel=1e-6)
        assert (one["n_neurons"], one["n_tokens"]) == (two["n_neurons"], two["n_tokens"])


def test_neurons_of_experts(study):
    """A mixture of experts with a dense layer, whose numbers of neurons differ."""
    _, ids = study
    save_tiny("qwen3_moe", "moe", seed=4)
    mask = {"ga": {0: [1, 95], 1: [47], 2: [25, 60]}}
    facts = {"models": {"model": refs.model("moe").describe()}, "n_layers": 3, "ffn_width": 96}
    masks.write("moe.json", mask, **facts)
    masks.write("moe.control.json", masks.random_control(mask, 3, [96, 48, 96], 1), control=True, **facts)
    flags = ["--model", "moe", "--run", "moe", "--name", "moe", "--mask_file", "moe.json", "--save_folder", "out"]
    SCRIPT.main(flags)
    found, head = results.read_json("out/moe.ga.288.json", SCRIPT.SCHEMA)
    model = loading.load_model(refs.model("moe"), torch.float32, torch.device("cpu"))
    slow = SCRIPT.Activations(model, archs.for_config(model.config), {"own": mask["ga"]})
    for block in ids[:288].view(-1, 16):
        slow.add(block[None])
    assert found["all_layers"] == pytest.approx(slow.mean("own"), rel=1e-6) and head["ffn_width"] == 96
    masks.write("moe.json", {"ga": {0: [1], 1: [48], 2: []}}, **facts)  # there are 48 in layer 1
    with pytest.raises(InputError, match="names neuron 48, but the model has 0 to 47"):
        SCRIPT.main(flags)


def test_rerun_keeps_and_single_models(study, capsys):
    folder, _ = study
    SCRIPT.main([])
    before = {p: p.read_bytes() for p in folder.rglob("lsn_activation/**/*.json")}
    assert len(before) == 6
    SCRIPT.main([])
    assert "finished before" in capsys.readouterr().out
    assert before == {p: p.read_bytes() for p in before}
    SCRIPT.main(["--model", "run/checkpoint-30", "--name", "one", "--save_folder", "out"])
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["one-r.ga.288.json", "one.ga.288.json"]
    with pytest.raises(InputError, match="another request"):
        SCRIPT.main(["--dtype", "float64"])


def test_bad_input_is_one_line(study):
    folder, _ = study
    with pytest.raises(InputError, match="no neuron of en"):
        tokenids.write(
            f"tokens/{tokenids.file_name('en', 'demo')}", torch.arange(3, 100), {}, results.header("token-ids")
        )
        SCRIPT.main(["--lang", "en"])
    control = "results/lsn/result/demo.control.json"
    with pytest.raises(InputError, match="are both controls; give the language's mask"):
        SCRIPT.main(["--mask_file", control, "--control-mask", control])
    other = json.loads((folder / "results/lsn/result/demo.json").read_text())
    other["_header"]["n_layers"] = 4
    (folder / "other.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="n_layers 4"):
        SCRIPT.main(["--mask_file", "other.json"])
    with pytest.raises(InputError, match="sw"):
        SCRIPT.main(["--lang", "sw"])


def test_a_base_with_a_step_of_its_own_is_step_zero(study, monkeypatch):
    folder, _ = study
    save_tiny("qwen2", "other/checkpoint-30", seed=5)
    drawn = {}
    monkeypatch.setattr(SCRIPT, "draw", lambda path, means, *more: drawn.update(means))
    SCRIPT.main(["--base-model", "other/checkpoint-30"])
    assert sorted(drawn["language"]) == [0, 5, 30]
    place = folder / "results/lsn/lsn_activation"
    _, head = results.read_json(place / "base-other__checkpoint-30/ga.288.json")
    assert head["step"] == 0 and not (place / "base").exists()  # which is for the study's base


def test_the_base_alone_takes_the_mask_of_its_run(study):
    SCRIPT.main(["--model", "base", "--name", "alone"])
    (study[0] / "study.yaml").unlink()
    flags = ["--id_path", f"tokens/{tokenids.file_name('ga', 'demo')}", "--mask_file", "results/lsn/result/demo.json"]
    flags += ["--model", "base", "--name", "b", "--lang", "ga", "--save_folder", "out", "--block-size", "16"]
    with pytest.raises(InputError, match="none of the models asked for"):
        SCRIPT.main(flags)
    SCRIPT.main([*flags, "--run", "run"])


def test_a_try_with_limit_does_not_pass_for_the_whole(study):
    SCRIPT.main(["--limit", "2"])
    SCRIPT.main(["--limit", "1000"])  # cuts nothing
    folder = study[0] / "results/lsn/lsn_activation/base"
    heads = {p.name: results.read_json(p, allow_limited=True)[1]["limit"] for p in folder.glob("ga.*")}
    assert heads == {"ga.32.json": 2, "ga.288.json": None}


PUBLISHED = ["-i", "tokens/oscar.ga.train.demo", "-t", "llama", "-l", "ga", "--block-size", "16"]


def bare(path, out):
    """A mask as the published scripts write it: no header."""
    found = json.loads(path.read_text())
    del found["_header"]
    out.write_text(json.dumps(found))
    return str(out)


@pytest.mark.parametrize("with_header", [True, False])
def test_called_as_published_a_checkpoint_and_a_mask_at_a_time(study, with_header, capsys):
    """The same files, under the same names, as one command for the whole run."""
    folder, _ = study
    SCRIPT.main(["--device", "cpu"])
    whole = folder / "results/lsn/lsn_activation"
    own, random = (folder / f"results/lsn/result/demo{end}" for end in (".json", ".control.json"))
    if not with_header:
        own, random = bare(own, folder / "own.json"), bare(random, folder / "random.json")
    (folder / "study.yaml").unlink()

    def call(model, place, name, mask):
        SCRIPT.main(["-m", model, "-s", f"out/{place}", "-n", name, "-f", str(mask), *PUBLISHED, "--run", "run"])

    for step in (5, 30):
        call(f"run/checkpoint-{step}", "demo", f"checkpoint-{step}", own)
        call(f"run/checkpoint-{step}", "demo", f"checkpoint-{step}-r", random)
    call("base", "base", "", own)
    call("base", "base", "r", random)
    made = sorted(path.relative_to(folder / "out") for path in (folder / "out").rglob("*.json"))
    assert made == sorted(path.relative_to(whole) for path in whole.rglob("*.json"))
    for file in made:
        (one, head), (other, before) = (results.read_json(place / file) for place in (folder / "out", whole))
        assert one == other and head["control"] is before["control"] and head["request"] == before["request"]
    for of_run, name in ((True, "demo"), (False, "base")):
        found = activation_files.find(folder / "out" / name, "ga", of_run)["288"]
        assert sorted(found) == [(c, s) for c in (False, True) for s in ((5, 30) if of_run else (0,))]
    if with_header:  # the mask says it all, the name need not
        before = {file: (folder / "out" / file).read_bytes() for file in made}
        call("run/checkpoint-5", "demo", "checkpoint-5", random)
        call("run/checkpoint-5", "demo", "checkpoint-5-r", random)
        assert before == {file: (folder / "out" / file).read_bytes() for file in made}


def test_names_that_mean_something_else(study):
    def fails(message, *argv):
        with pytest.raises(InputError, match=message):
            SCRIPT.main(["--model", "run/checkpoint-30", *argv])

    fails("name checkpoint-5 means step 5, but run/checkpoint-30 is of step 30", "--name", "checkpoint-5")
    fails("--name checkpoint-30-r is that of a random control, but .*demo.json is a mask", "--name", "checkpoint-30-r")
    fails("--name r is that of a random control", "--name", "r")
    (study[0] / "study.yaml").unlink()
    fails("nothing says languages target: give --lang", "--name", "x")


def test_results_under_the_earlier_name_are_finished(study, capsys):
    folder, _ = study
    SCRIPT.main([])
    place = folder / "results/lsn/lsn_activation/demo"
    for step in (5, 30):
        (place / f"checkpoint-{step}-r.ga.288.json").rename(place / f"r.checkpoint-{step}.ga.288.json")
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    capsys.readouterr()
    SCRIPT.main([])
    assert capsys.readouterr().out.count("finished before") == 3
    assert before == {path.name: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(InputError, match=r"r\.checkpoint-30.ga.288.json is of another request \(dtype: torch"):
        (place / "checkpoint-5.ga.288.json").unlink()
        (place / "checkpoint-30.ga.288.json").unlink()
        (place / "r.checkpoint-5.ga.288.json").unlink()
        (folder / "results/lsn/lsn_activation/base/ga.288.json").unlink()
        (folder / "results/lsn/lsn_activation/base/r.ga.288.json").unlink()
        SCRIPT.main(["--dtype", "float64"])
    SCRIPT.main(["--dtype", "float64", "--overwrite"])
    assert sorted(path.name for path in place.iterdir()) == [
        f"checkpoint-{step}{r}.ga.288.json" for step in (30, 5) for r in ("-r", "")
    ]


def test_what_is_made_by_hand_leaves_the_study_s_place_free(study):
    folder, _ = study
    place = folder / "results/lsn/lsn_activation"
    save_tiny("qwen2", "others/checkpoint-5", seed=1)
    SCRIPT.main(["--model", "run/checkpoint-5"])
    SCRIPT.main(
        [
            "--model",
            "others",
            "--run",
            "run",
            "--mask_file",
            bare(folder / "results/lsn/result/demo.json", folder / "m.json"),
        ]
    )
    SCRIPT.main(["--steps", "5"])
    assert sorted(path.name for path in place.iterdir()) == [
        "base", "demo", "demo.others__checkpoint-5", "demo.others__checkpoint-5.pdf", "demo.others__checkpoint-5.png",
        "demo.run__checkpoint-5.pdf", "demo.run__checkpoint-5.png",
        "run__checkpoint-5-r.ga.288.json", "run__checkpoint-5.ga.288.json",
    ]  # fmt: skip
    SCRIPT.main([])  # what --steps measured is of the run, and is kept; the figure is the whole run's
    assert (place / "demo.png").is_file()
