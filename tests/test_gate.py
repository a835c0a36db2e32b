"""The gate: what it computes, how often it passes what is no better than untrained, and what later steps make of it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from helpers import failed_gate

from cpt_utils.base import results, stats
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import identity
from cpt_utils.measures import gate

LAYERS, SENTENCES = 12, 200


def drawn(rng, chances, n=SENTENCES, ease=None):
    """Hits [states, n] by chance; `ease` [n] makes sentences easy or hard alike for several models."""
    ease = np.ones(n) if ease is None else ease
    return (rng.random((len(chances), n)) < np.asarray(chances)[:, None] * ease).astype(np.uint8)


def test_it_is_what_the_words_say():
    rng = np.random.default_rng(0)
    hits, twin = drawn(rng, np.linspace(0.2, 0.6, 5), 31), drawn(rng, np.linspace(0.1, 0.3, 5), 31)
    order = np.random.default_rng(7).permutation(31).tolist()
    differences = {}
    best_of_twin = max(range(5), key=lambda h: (sum(twin[h]), -h))
    for choose, read in ((order[:15], order[15:]), (order[15:], order[:15])):
        best = max(range(1, 5), key=lambda h: (sum(int(hits[h][i]) for i in choose), -h))
        differences |= {i: int(hits[best][i]) - int(twin[best_of_twin][i]) for i in read}
    found = gate.compare(hits, twin, 7)
    assert found["difference"] == pytest.approx(sum(differences.values()) / 31)
    assert found["difference"] == pytest.approx(found["accuracy"] - found["untrained_accuracy"])
    assert found["untrained_accuracy"] == pytest.approx(max(map(sum, twin.tolist())) / 31)
    low, high = stats.bootstrap_mean(np.array([differences[i] for i in range(31)]), 7, level=0.99)
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((low, high))
    assert found["passed"] is (low > 0) and found["n"] == 31


def test_h0_counts_for_the_twin_alone():
    one, none = np.ones((1, 50), dtype=np.uint8), np.zeros((1, 50), dtype=np.uint8)
    only_h0, only_h1 = np.vstack([one, none]), np.vstack([none, one])
    assert gate.compare(only_h1, np.vstack([none, none]))["passed"]
    assert not gate.compare(only_h0, np.vstack([none, none]))["passed"]
    assert not gate.compare(only_h1, only_h0)["passed"]
    assert not gate.compare(only_h1[:, :1], only_h0[:, :1])["passed"]  # a single sentence


@pytest.fixture
def few_draws(monkeypatch):
    """500 resamples instead of 2,000: hundreds of gates in seconds."""
    own = stats.bootstrap_mean
    monkeypatch.setattr(stats, "bootstrap_mean", lambda values, seed, level: own(values, seed, 500, level))


@pytest.mark.parametrize("accuracy", [0.005, 0.06, 0.3])
@pytest.mark.parametrize("between", [0.0, 0.15])
def test_a_model_that_is_another_untrained_one_passes_in_5_percent_at_most(few_draws, accuracy, between):
    """`between`: how far accuracies of random initialisations differ, as a share; .12 was measured."""
    rng, passed, times = np.random.default_rng(1), 0, 150
    for seed in range(times):
        ease = np.clip(rng.gamma(1.0, 1.0, SENTENCES), 0, 3)  # a few sentences, with names and digits, are easy for all
        sides = [accuracy * np.clip(1 + between * rng.normal(size=LAYERS + 1), 0.2, 3) for _ in range(2)]
        passed += gate.compare(*(drawn(rng, chances, ease=ease) for chances in sides), seed)["passed"]
    assert passed <= 0.05 * times


def test_a_model_that_retrieves_in_a_few_layers_passes(few_draws):
    """.18 in two of twelve layers beside an untrained .06, less in the others: a mean over layers does not show it."""
    rng, passed, by_mean, times = np.random.default_rng(2), 0, 0, 60
    for seed in range(times):
        hits = drawn(rng, [0.06] * 5 + [0.18] * 2 + [0.03] * 6, 500)
        twin = drawn(rng, [0.06] * (LAYERS + 1), 500)
        passed += gate.compare(hits, twin, seed)["passed"]
        by_mean += stats.bootstrap_mean(hits[1:].mean(0) - twin[1:].mean(0), seed, level=0.99)[0] > 0
    assert passed >= 0.9 * times and by_mean <= 0.2 * times


def test_the_best_of_many_layers_uncorrected_would_pass_noise(few_draws):
    """Why the best layer is read on other sentences than it was chosen on."""
    rng, corrected, naive, times = np.random.default_rng(3), 0, 0, 100
    for seed in range(times):
        hits, twin = drawn(rng, [0.06] * 49), drawn(rng, [0.06] * 2)
        corrected += gate.compare(hits, twin, seed)["passed"]
        naive += stats.bootstrap_mean(hits[hits.mean(1).argmax()] - twin[0].astype(float), seed, level=0.95)[0] > 0
    assert corrected <= 0.05 * times < 0.2 * times < naive


# --- files ---

CONFIG = {"model_type": "llama", "num_hidden_layers": 3}


def measured(path, model=None, shape=None, hits=None, sentences="same", **facts):
    models = {"model": model} if model else {"untrained_like": shape or CONFIG}
    facts = {"n_layers": 3, "k": 4, "data": {"pairs_sha256": sentences}} | facts
    results.write_json(path, {}, results.header(gate.RETRIEVAL, models=models, **facts))
    hits = np.zeros((4, 20), dtype=np.uint8) if hits is None else hits
    results.write_tensors(path.with_suffix(".pt"), {"hits": torch.tensor(hits)})
    return path


def test_the_twin_is_found_by_what_it_is(tmp_path):
    model = {"spec": "run/checkpoint-5", "config_sha256": identity.shape_hash(CONFIG)}
    path = measured(tmp_path / "run__checkpoint-5.json", model)
    header = results.read_json(path)[1]
    other = CONFIG | {"vocab_size": 7}
    for name, wrong in (("", {"shape": other}), (".a", {"sentences": "x"}), (".b", {"k": 5})):
        measured(tmp_path / f"untrained{name}.json", **wrong)
        assert gate.twin_beside(path, header) is None
    twin = measured(tmp_path / "untrained.base.json")
    assert gate.twin_beside(path, header) == twin
    twin.with_suffix(".pt").unlink()
    assert gate.twin_beside(path, header) is None
    on_the_hub = {"spec": "org/m", "revision": "abc"}  # its configuration is not in the header
    path = measured(tmp_path / "org__m.json", on_the_hub)
    assert gate.twin_beside(path, results.read_json(path)[1]) == tmp_path / "untrained.json"
    assert gate.twin_beside(path, {}) is None


def test_later_steps_hand_it_on_and_say_that_it_failed(tmp_path, capsys):
    def file(name, **facts):
        results.write_json(tmp_path / name, {}, results.header("layer-specialize", **facts))
        return tmp_path / name

    passed = failed_gate() | {"passed": True}
    assert gate.carried(file("a.json", gate=passed)) == passed
    assert gate.carried(file("null.json", gate=None)) is gate.carried(file("before.json")) is None
    (tmp_path / "bare.json").write_text("[1, 2]")
    assert gate.carried(tmp_path / "bare.json") is gate.carried(tmp_path / "none.json") is None
    results.write_list(tmp_path / "list.json", "layers", {"layers": [1]}, results.header("lsn-layers", gate=passed))
    assert gate.carried(tmp_path / "list.json") == passed  # its header stands beside it
    assert capsys.readouterr() == ("", "")
    for number, (gates, told) in enumerate(
        [([1], "gate is [1], not a mapping"), ("yes", "gate is 'yes', not a mapping"),
         (passed | {"ci_low": "x"}, "gate.ci_low is 'x', not a number"), ({"passed": False}, "gate.model is missing")]
    ):  # fmt: skip
        with pytest.raises(InputError, match=re.escape(f"{number}.json: _header.{told}") + "; run again the step"):
            gate.carried(file(f"{number}.json", gate=gates))
    bad = file("bad.json", gate=failed_gate("run/checkpoint-5"))
    assert gate.carried(tmp_path / "bare.json", bad, bad) == json.loads(bad.read_text())["_header"]["gate"]
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "warning: run/checkpoint-5 does not retrieve clearly better than its untrained twin (+0.000 [+0.000, +0.000] "
        "at 99%, 20 sentences): its layers, its hub and everything built on them mean nothing"
    ]


def test_many_models_are_told_in_one_line_for_each_outcome(capsys):
    def found(model, low):
        return failed_gate(model) | {"passed": low > 0, "ci_low": low}

    gate.tell(found("a", 0.3), found("b", -0.5), found("c", 0.1), found("d", -0.2), found("e", -0.4))
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "c retrieves better than its untrained twin (+0.000 [+0.100, +0.000] at 99%, 20 sentences); likewise a"
    ]
    (warning,) = said.err.splitlines()
    assert warning.startswith("warning: d does not retrieve clearly better") and warning.endswith("; likewise b, e")
    gate.tell(*(found(f"checkpoint-{step}", -step / 100) for step in range(1, 22)))
    assert capsys.readouterr().err.endswith("; likewise checkpoint-2, checkpoint-3, 18 more\n")


def test_it_says_how_many_sentences_would_tell():
    """Of planted hits: so many sentences show the difference in about four tries of five; none is named without one."""
    rng = np.random.default_rng(0)
    twin, own = rng.random((1, 60_000)) < 0.30, np.repeat(rng.random((1, 60_000)) < 0.38, 2, axis=0)
    first = gate.compare(own[:, :200], twin[:, :200])
    half = first["difference"] - first["ci_low"]
    needed = gate.sentences_needed(first | {"difference": 0.08, "ci_low": 0.08 - half})
    parts = [slice(start, start + needed) for start in range(0, 60_000 - needed, needed)]
    passed = np.mean([gate.compare(own[:, part], twin[:, part])["passed"] for part in parts])
    assert len(parts) > 50 and 0.65 < passed < 0.92
    assert gate.sentences_needed(failed_gate("m")) is None
    assert gate.sentences_needed(failed_gate("m") | {"difference": -0.1, "ci_low": -0.2}) is None
    for wrong in (
        {"level": 1.0},
        {"level": float("nan")},
        {"ci_low": float("-inf")},
        {"n": -5},
        {"difference": 1e-200},
    ):
        assert gate.sentences_needed(failed_gate("m") | {"difference": 0.08, "ci_low": -0.01} | wrong) is None
    text = gate.words(failed_gate("m") | {"difference": 0.08, "ci_low": -0.01, "n": 200})
    assert text.endswith("mean nothing; a difference of this size would be clear with some 450 sentences")
