"""docs/study.md says of every key what the model says, its examples are read, its defaults are the scripts'."""

from __future__ import annotations

import pytest
import yaml
from helpers import ROOT, load_script

from cpt_utils.base import keys, study_keys

PAGE = load_script("docs/study.py")
KEYS = list(PAGE.rows())


def test_the_page_is_the_one_that_the_script_writes():
    assert (ROOT / "docs/study.md").read_text() == PAGE.page(), "run python docs/study.py"


def groups(model=study_keys.Study, above=""):
    """Every model of keys by its dotted place."""
    yield above, model
    for name, field in model.fields().items():
        for below, named in PAGE._models(field.annotation):
            yield from groups(below, f"{above}{name}." + ("<name>." if named else ""))


def test_every_key_has_its_line():
    wanted = {f"{above}{name}" for above, model in groups() for name in model.fields()}
    assert {dotted for dotted, _ in KEYS} == wanted and len(KEYS) == len(wanted) > 60
    text = (ROOT / "docs/study.md").read_text()
    for dotted, field in KEYS:
        assert field.title and f"| `{dotted}` | {field.title} |" in text


@pytest.mark.parametrize(("above", "model"), list(groups()), ids=lambda value: value if isinstance(value, str) else "")
def test_examples_are_accepted_and_not_the_defaults(above, model):
    for name, field in model.fields().items():
        needed = {"r": 4} if model is study_keys.Lora else {"freeze": "hub"} if name == "io" else {}
        more = {"runs": {"second": "x"}} if above == "" else {}
        line = yaml.safe_load("{" + PAGE.example(f"{above}{name}", field) + "}")
        assert line == {name: field.examples[0]}
        keys.check(model, needed | more | line, "docs/study.md")
        assert field.examples[0] != field.default


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (study_keys.Part, "whole number or text or list of whole number"),
        (study_keys.Count, "whole number ≥ 1"),
        (list[study_keys.Share] | None, "list of number > 0, < 1"),
        (dict[study_keys.ArmName, study_keys.Arm] | None, "mapping to keys"),
    ],
)
def test_types_in_words(annotation, words):
    assert PAGE.kind(annotation) == words


def test_what_holds_without_a_key_is_what_the_scripts_take():
    usual = {dotted: PAGE.default(field) for dotted, field in KEYS}
    rewind, truncate = load_script("spectral/rewind.py"), load_script("spectral/truncate.py")
    assert int(usual["spectral.rewind.stride"]) == rewind.STRIDE and int(usual["spectral.rewind.draws"]) == rewind.DRAWS
    assert int(usual["spectral.truncate.draws"]) == truncate.DRAWS and usual["spectral.truncate.curves"] == "all"
    assert [*truncate.SHARES] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]  # "0.1 to 0.9, 0.95"
    assert [*load_script("spectral/connect.py").AT] == [i / 10 for i in range(11)]  # "0, 0.1, .., 1"
    steering = load_script("moe-routing/steering.py")
    assert float(usual["routing.strengths"]) == steering.STRENGTH and int(usual["routing.random"]) == steering.RANDOM
    assert int(usual["ablation.shots"]) == load_script("layer-ablation/in_context.py").SHOTS
    assert int(usual["lsn.tokens"].replace(",", "")) == load_script("lsn/load_oscar.py").TOKENS


@pytest.mark.parametrize("title", PAGE.PAIRS)
def test_templates_are_studies(title):
    values = yaml.safe_load(PAGE.template(PAGE.PAIRS[title][1]))
    keys.check(study_keys.Study, values, title)
    assert values["data"] == PAGE.PAIRS[title][1] and f"### {title}\n" in (ROOT / "docs/study.md").read_text()
