"""Which value wins, what a missing one says, and how strings are filled in."""

import pytest

from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import beside


def write(folder, text):
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def test_command_line_wins_over_study_wins_over_default(tmp_path):
    study = Study.find(write(tmp_path, "base: from-study\n"))
    assert study.value("given", "--base-model", "base", "default") == "given"
    assert study.value(None, "--base-model", "base", "default") == "from-study"
    assert study.value(None, "--run", "run", "default") == "default"


def test_a_missing_value_names_flag_and_key(tmp_path):
    with pytest.raises(InputError, match=r"give --base, or the key languages\.base in a study file"):
        Study().value(None, "--base", "languages.base")


def test_study_yaml_in_the_current_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not Study.find()
    write(tmp_path, "name: here\n")
    assert Study.find().name == "here"


def test_places_and_environment_are_filled_in(tmp_path, monkeypatch):
    path = write(
        tmp_path, "name: m\nseed: 3\nrun: build/{name}/seed-{seed}/cpt\nresults: r/{seed}\ndata: {dir: '${TEXTS}/x'}\n"
    )
    study = Study.find(path, seed=7)
    assert study.get("run") == "build/m/seed-7/cpt"
    assert study.result("layers").as_posix() == "r/7/layer-specialize/layers.json"
    monkeypatch.delenv("TEXTS", raising=False)
    with pytest.raises(InputError, match="environment variable TEXTS is not set"):
        study.get("data.dir")
    monkeypatch.setenv("TEXTS", "/t")
    assert study.get("data.dir") == "/t/x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("languges: {base: x}\n", "did you mean languages"),
        ("languages: {bse: x}\n", r"did you mean languages\.base"),
        ("languages: eng\n", "must hold the keys base, target, lsn"),
        ("- a\n", "holds no keys"),
        ("seed: abc\n", "seed is 'abc'; it must be a whole number"),
        ("controls: many\n", "controls is 'many'"),
        ("controls: -5\n", "controls is -5"),
        ("languages: {base: no}\n", r"languages\.base is False"),
        ("seed: '3'\n", "seed is '3'; it must be a whole number"),
        ("seed: true\n", "seed is True"),
        ("controls: true\n", "controls is True"),
        ("languages: {lsn: [en, no]}\n", r"languages\.lsn\[1\] is False; put the code in quotes"),
        ("data: {heldout: {no: a.txt}}\n", r"a key of data\.heldout is False; it must map language codes"),
        ("data: {task: {nam: x}}\n", r"unknown key data\.task\.nam; did you mean data\.task\.name"),
        ("no: x\n", "unknown key False"),
        ("null: x\n", "unknown key None"),
        ("spectral: {measures: [nll, los]}\n", r"spectral\.measures\[1\] is 'los'"),
        ("data: {2024-01-01: x}\n", r"unknown key data\.2024-01-01"),
        ("data: {heldout: {null: x}}\n", r"a key of data\.heldout is None"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_a_wrong_study_file_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        Study.find(write(tmp_path, text))


def test_a_study_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"none.yaml does not exist; .* make study STUDY=.*none.yaml"):
        Study.find(tmp_path / "none.yaml")


def test_what_is_not_the_study_s_own_has_another_place(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "run/checkpoint-5", "run/checkpoint-20", "run/checkpoint-100", "one/checkpoint-5"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("run")
    study = Study.find(write(tmp_path, "name: s\nbase: base\nrun: run\nlanguages: {target: ga}\nresults: r\n"))
    assert beside.name(study) == beside.name(study, "base/", ["./run"], [5, 20, 100], None, "gle_Latn") == ""
    assert beside.name(study, run="link") == beside.name(study, run="run/checkpoint-100", last=True) == ""
    assert (
        beside.name(study, steps=[100], last=True)
        == beside.name(study, run=["run/checkpoint-5", "run/checkpoint-100"], last=True)
        == ""
    )
    assert beside.name(study, run="run/checkpoint-5") == beside.name(study, steps=[5]) == "run__checkpoint-5"
    assert beside.name(study, run="one", last=True) == beside.name(study, run="one") == "one__checkpoint-5"
    assert beside.name(study, steps=[5, 100]) == "run__checkpoint-5-to-run__checkpoint-100.2"
    other = f"base-run__checkpoint-5.{tmp_path.name}__base.eu.limit-3"
    assert beside.name(study, "run/checkpoint-5", "base", limit=3, lang="eu") == other
    assert beside.name(Study(), "base", "run", [5], 3, "eu") == ""  # outside a study there is nothing to compare with

    assert study.output("given.json", "--output", "layers", "x").as_posix() == "given.json"
    assert study.output(None, "--output", "layers").as_posix() == "r/layer-specialize/layers.json"
    assert study.output(None, "--output", "layers", "x.y").as_posix() == "r/layer-specialize/layers.x.y.json"
    assert study.output(None, "--output", "layer_swap", "x").as_posix() == "r/layer-swap.x"
    assert (
        "r/layer-swap is kept for the study's own base, whole run and language; this goes to r/layer-swap.x"
        in capsys.readouterr().out
    )
