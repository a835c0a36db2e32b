"""studies/part_five.py: neighbouring measures over seeds."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import load_script

script = load_script("studies/part_five.py")


def row(result, measure, value, step, run="plain", **more):
    place = {"component": None, "language": None, "layer": None, "hidden_state": None, "condition": None}
    return {"result": result, "measure": measure, "value": value, "step": step, "run": run, **place, **more}


@pytest.fixture
def seed(monkeypatch, tmp_path):
    """A run whose losses fall as CKA grows, by leaps and bounds of their own, and an arm."""
    found = []
    for i, step in enumerate((0, 10, 20, 30, 40, 50)):
        for state in range(3):
            found.append(row("alignment", "unit_centred/cka", 0.1 * i + 0.01 * state, step, hidden_state=state))
            found.append(row("retrieval", "layer_accuracy", 0.3 - 0.1 * state, step, hidden_state=state))
            found.append(row("retrieval", "layer_accuracy", 0.9, step, hidden_state=state, condition="layer-swap"))
        found.append(row("language_loss", "nll_per_byte", 1.0 / (1 + i), step, language="qaa_Latn"))
        found.append(row("language_loss", "nll_per_byte", float(i), step, language="eng_Latn"))
        found.append(row("lm_eval", "acc,none", (0.2, 0.3, 0.25, 0.4, 0.35, 0.5)[i], step, language="qaa_Latn"))
        for component in ("all", "attention"):
            value = 0.01 * i if component == "all" else 9.0
            found.append(row("gradients", "beyond", value, step, component=component))
    found.append(row("arms", "nll_per_byte", 0.5, 50, run="frozen", language="qaa_Latn"))
    monkeypatch.setattr(script.export, "views", lambda study: [study])
    monkeypatch.setattr(script.rows, "rows", lambda view: found)

    class Study:
        def get(self, key):
            return {"languages.target": "qaa_Latn"}[key]

        def result(self, name):
            return tmp_path / "none.json"

    return script.Seed(Study())


def test_numbers_of_models(seed):
    assert seed.models["plain", 20]["CKA"] == pytest.approx(0.21)
    assert seed.models["plain", 20]["published"] == pytest.approx(0.2)  # not that of a swap
    assert seed.models["plain", 20]["loss"] == pytest.approx(-1 / 3) and seed.models["frozen", 50] == {"loss": -0.5}
    assert seed.models["plain", 30]["gradients"] == pytest.approx(0.03)
    assert [model["task"] for model in seed.over_steps()] == [0.2, 0.3, 0.25, 0.4, 0.35, 0.5]
    assert seed.over_arms() == [{"loss": -0.5}, seed.models["plain", 50]] and seed.methods is None
    assert seed.profiles["CKA"] == pytest.approx({0: 0.5, 1: 0.51, 2: 0.52})


def test_rank_correlations(seed):
    steps = seed.over_steps()
    assert script.spearman(steps, "CKA", "loss") == pytest.approx(1)
    ranks = np.argsort(np.argsort([model["task"] for model in steps]))
    assert script.spearman(steps, "CKA", "task") == pytest.approx(np.corrcoef(range(6), ranks)[0, 1])
    changes = np.diff([model["task"] for model in steps]), np.diff([model["loss"] for model in steps])
    ranks = [np.argsort(np.argsort(values)) for values in changes]
    assert script.spearman(steps, "task", "loss", differences=True) == pytest.approx(np.corrcoef(ranks)[0, 1], abs=0.1)
    assert script.spearman(steps, "published", "loss") is None and script.spearman(steps[:4], "CKA", "loss") is None
    head, body = script.aim_rows({1: seed, 2: seed, 3: seed})
    assert head[:3] == ["measure", "loss, over checkpoints", "loss, of changes"]
    assert dict(zip(script.MEASURES, [cells[1] for cells in body], strict=True))["CKA"] == "+1.00 [+1.00, +1.00]"


def test_a_method_without_neurons_of_a_language_has_no_harm_there():
    empty = {"lape": {}, "ap": {"ga": {"harm": 0.5, "selectivity": 0.25}}}
    one = {
        "languages": ["ga"], "methods": list(empty), "neurons": {"lape": {"ga": 0}, "ap": {"ga": 6}},
        "stability": {"lape": None, "ap": {"ga": 0.5}}, "diagonal": empty, "selectivity": empty,
        "controls": {"lape": {}, "ap": {"ga": 0.1}}, "others": {"lape": {}, "ap": {"ga": -0.2}},
        "agreement": {"ga": {"lape and ap": {"jaccard": 0.0, "chance": 0.1}}}, "best": {"ga": {"method": "ap"}},
    }  # fmt: skip
    seed = type("Seed", (), {"methods": one})
    head, (lape, ap) = script.neuron_rows({1: seed, 2: seed})
    assert head[2:] == [*script.of_neurons(one, "ap", "ga"), "best in"]
    assert lape == ["ga", "lape", "0, 0", *["-"] * 6, "0 of 2"]
    assert ap[2:] == ["6, 6", "0.50, 0.50", "0.0, 0.0", *(", ".join([x] * 2) for x in
                      ("+0.5000", "+0.1000", "-0.2000", "+0.2500")), "2 of 2"]  # fmt: skip


def test_a_cell_is_mean_and_interval_over_seeds():
    assert script.cell([0.1, 0.2]) == "+0.10, +0.20" and script.cell([0.1, None, 0.3]) == "-" and script.cell([]) == "-"
    assert script.cell([1.0, 2.0, 3.0]) == "+2.00 [-0.48, +4.48]"  # t of 2 degrees of freedom: 4.303 / sqrt(3)
