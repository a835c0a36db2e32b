"""What scripts say of themselves is read without running them; a step that two of them claim is said."""

from __future__ import annotations

import pytest
from helpers import ROOT

from cpt_utils.base import cli, experiments
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study

TOY = '''"""A toy."""
raise RuntimeError("this script was run")
RESULTS = {"toy": "toy/{name}.json"}
CAPTIONS: dict = {
    "toy": """Part II: 9. Toys
        What a toy shows,
        in two lines.""",
    "again": "Figures\\ntoy",
}
'''


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of one toy experiment, as a function that writes another script."""
    monkeypatch.setattr(cli, "REPOSITORY", tmp_path)
    experiments.said.cache_clear()

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.with_name("README.md").touch()
        path.write_text(text)

    write("toy/toy.py", TOY)
    yield write
    experiments.said.cache_clear()


def test_a_script_says_its_place_and_captions_without_being_run(repository, tmp_path):
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "mine.py").write_text('RESULTS = {"toy": "x.json"}\n')  # no README: no experiment
    assert (experiments.result("toy"), experiments.made_by("toy")) == ("toy/{name}.json", "toy/toy.py")
    text = "What a toy shows,\nin two lines."
    assert experiments.captions() == {"toy": ("Part II", "9. Toys", text), "again": ("Figures", None, text)}
    assert experiments.captions("other.py") == {}
    study = Study({"name": "s", "results": "r"}, tmp_path / "s.yaml")
    assert study.result("toy").as_posix() == "r/toy/s.json"
    with pytest.raises(InputError, match=r"r/toy/s.json does not exist; run toy/toy.py --all first, or give --toy"):
        study.input(None, "--toy", "toy", " --all")


def test_two_scripts_of_one_step_are_one_error(repository):
    repository("other/copy.py", TOY)
    with pytest.raises(InputError, match=r"other/copy.py and toy/toy.py both have 'toy' in RESULTS; rename it in one"):
        experiments.result("toy")


@pytest.mark.parametrize("value", ['{"b": NAME}', '{"b", "c"}', '{"b": "c"', "{**more}"])
def test_what_is_no_plain_dict_is_said(repository, value):
    repository("other/other.py", f"RESULTS = {value}\n")
    with pytest.raises(InputError, match=r"other/other.py: RESULTS must be a plain dict of texts"):
        experiments.result("toy")


def test_a_step_that_nobody_makes_is_said(repository):
    with pytest.raises(InputError, match=r"no script below .* has 'layers' in RESULTS; it has toy"):
        experiments.result("layers")


def test_every_step_and_caption_of_the_repository_is_read():
    steps = experiments.said("RESULTS")
    assert len(steps) >= 19 and all((ROOT / script).is_file() for _, script in steps.values())
    assert len({place for place, _ in steps.values()}) == len(steps)
    for name, (section, _, text) in experiments.captions().items():
        parts = [f"Part {number}" for number in ("I", "II", "III", "IV", "V")]
        assert section in (*parts, "Claims", "Figures of the paper") and len(text) > 60, name
