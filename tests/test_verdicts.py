"""The rules of the verdicts, edge by edge: intervals, p values, Holm, equivalence, and swaps beside depth and seams."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from helpers import load_script
from scipy import stats as scipy_stats
from test_claims import (
    ATTENTION,
    CLAIMS,
    HUB,
    INTERFACE,
    LAYER_SWAP,
    NO,
    OPEN,
    RICH,
    SEED,
    YES,
    L,
    World,
    calibrate,
    evidence,
    run,
)
from test_claims import finished as finished
from test_claims import made as made
from test_claims import no_figure as no_figure

from cpt_utils.base import results, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.measures import controls, matched, verdicts

# ---------------------------------------------------------------- the rules, edge by edge


def row(low, high, says):
    return verdicts.number("x", (low + high) / 2, (low, high), says=says)


def test_an_interval_that_touches_the_bound_is_not_beyond_it():
    above, below, within = verdicts.above(), verdicts.below(0.25), verdicts.within(0.03)
    for low, high, says, expected in (
        (1e-12, 1, above, "for"), (0.0, 1, above, "open"), (-1, -1e-12, above, "against"), (-1, 0.0, above, "open"),
        (-1, -0.5, verdicts.above(against=False), "open"),
        (0.0, 0.2499, below, "for"), (0.0, 0.25, below, "open"), (0.2501, 1, below, "against"),
        (0.25, 1, below, "open"),
        (-9.0, -8.0, below, "for"),
        (-0.029, 0.029, within, "for"), (-0.03, 0.029, within, "open"), (-0.01, 0.03, within, "open"),
        (0.031, 0.04, within, "against"), (-0.05, -0.04, within, "open"),  # better by more excludes nothing
    ):  # fmt: skip
        assert verdicts.standing(row(low, high, says)) == expected, (low, high, says)
    assert verdicts.standing(verdicts.number("x", 1.0, says=above)) == "open"


def of_seeds(values, says, name="x"):
    runs = {seed: [verdicts.number(name, value, says=says)] for seed, value in enumerate(values)}
    return verdicts.over_seeds(runs)


def test_p_values_are_those_of_t_and_of_all_sign_flips():
    values = np.array([0.4, 0.1, 0.3, -0.1, 0.2, 0.5])
    (found,) = of_seeds(values, verdicts.above())
    assert found["p_value"] == pytest.approx(scipy_stats.ttest_1samp(values, 0).pvalue)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1)
    assert found["p_sign_flip"] == (np.abs(signs.T @ values) >= values.sum() - 1e-12).mean()
    assert stats.sign_flip([1.0, 2.0, 3.0, 4.0, 5.0]) == 2 / 2**5  # five seeds cannot get below
    assert of_seeds([0.2] * 6, verdicts.above())[0]["p_value"] == 1.0  # does not vary: no t


def test_holm_is_that_of_the_textbook():
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    assert stats.holm(p) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(stats.holm(p)) == list(p) and stats.holm({}) == {}


def test_a_claim_needs_all_its_conditions_and_one_broken_excludes_it():
    good, weak, bad = [1.0, 1.1, 0.9, 1.0, 1.2, 0.8], [1.0, -1.0, 0.5, -0.5, 0.2, -0.1], [-1.0, -1.1, -0.9, -1.0, -1.2]

    def rows(*lists, says=None):
        return [one for i, values in enumerate(lists) for one in of_seeds(values, says or verdicts.above(), f"x{i}")]

    p = scipy_stats.ttest_1samp(good, 0).pvalue
    assert verdicts.weigh(rows(good, good)) == pytest.approx((p, 1.0))
    assert verdicts.weigh(rows(good, weak))[0] > 0.5  # the weakest counts
    p = scipy_stats.ttest_1samp(bad, 0).pvalue
    assert verdicts.weigh(rows(good, bad)) == pytest.approx((1.0, 2 * p))  # one of two, so twice its p
    assert verdicts.weigh(rows(bad, says=verdicts.above(against=False))) == (1.0, 1.0)
    said = verdicts.decide({"A": rows(good), "B": rows(weak), "C": rows(bad)})
    assert [said[name].verdict for name in "ABC"] == [YES, OPEN, NO]


def test_equivalence_is_two_tests():
    values = np.array([0.01, 0.012, 0.008, 0.011, 0.009])
    (found,) = of_seeds(values, verdicts.within(0.03))
    sides = [scipy_stats.ttest_1samp(values, bound).pvalue for bound in (-0.03, 0.03)]
    assert found["p_value"] == pytest.approx(max(sides)) and verdicts.weigh([found])[0] == found["p_value"]
    (found,) = of_seeds(values - 0.06, verdicts.within(0.03))  # far better than the margin
    assert verdicts.weigh([found]) == (1.0, 1.0)
    (found,) = of_seeds(values + 0.06, verdicts.within(0.03))
    assert verdicts.weigh([found])[1] < 0.001


def test_holm_may_leave_open_what_would_be_decided_alone():
    values = [0.5, 0.1, 0.4, -0.1, 0.3, 0.45, 0.2, 0.05]
    rows = of_seeds(values, verdicts.above())
    assert verdicts.decide({"A": rows})["A"].verdict == YES
    many = {name: of_seeds([1.0, -1.0, 0.5, -0.5, 0.2, -0.1, 0, 0.1], verdicts.above()) for name in "BCDEFGHI"}
    assert verdicts.decide({"A": rows} | many)["A"].verdict == OPEN


def test_how_many_seeds_would_decide():
    """The smallest number with a power of 80 %, by simulation; for the claim every number, against it one is enough."""
    rng, values = np.random.default_rng(0), np.array([0.1, 0.9, -0.4, 1.3, 0.6, 0.7, -0.2, 1.4])
    needed, size = stats.n_needed(values, 0.05), float(values.mean() / values.std(ddof=1))
    for n, enough in ((needed - 1, False), (needed, True)):
        drawn = rng.normal(size, 1, (100_000, n))
        t, p = scipy_stats.ttest_1samp(drawn, 0, axis=1)
        assert (((p < 0.05) & (t > 0)).mean() >= 0.8) == enough
    assert stats.n_needed(-values, 0.05) is None and stats.n_needed([1.0, 1.0], 0.05) is None
    assert stats.n_needed(values + 1e4, 0.05) == 2 and stats.n_needed(values - values.mean() + 1e-4, 0.05) is None
    strong, weak = (of_seeds(values + more, verdicts.above())[0] for more in (1, -0.2))
    wrong = of_seeds(-values, verdicts.above())[0]
    assert verdicts.seeds_needed([strong, weak], 0.05) == stats.n_needed(values - 0.2, 0.05)
    assert verdicts.seeds_needed([strong, wrong], 0.05) == stats.n_needed(values, 0.05 / 2)
    found = verdicts.decide({"A": [weak], "B": [strong]})
    assert [found[name].seeds_needed for name in "AB"] == [stats.n_needed(values - 0.2, 0.05 / 2), None]
    assert f"; {found['A'].seeds_needed} seeds would decide it" in found["A"].reason
    assert "would" not in found["B"].reason


def test_the_peak_is_chosen_on_other_sentences():
    """Where all hidden states are alike the best of many is above any other on its own sentences, not on others."""
    rng, peak, own, biased = np.random.default_rng(0), calibrate.C1.peak, [], []
    for seed in range(300):
        hits = (rng.random((13, 80)) < 0.4).astype(float)
        own.append((peak(hits, seed) - hits[0]).mean())
        biased.append(hits[1:-1].mean(1).max() - hits[0].mean())
    assert abs(np.mean(own)) < 3 * np.std(own) / 300**0.5 and np.mean(biased) > 0.05
    hits = np.zeros((5, 40))
    hits[2] = 1
    assert peak(hits, 0).tolist() == [1.0] * 40


# ---------------------------------------------------------------- swaps beside depth and seams


@pytest.fixture
def swaps(made):
    def of(cost, own, component=None):
        """The layer or component swaps of costs that a function of (component, layers) gives."""
        made.world = World("w", **calibrate.DEMO)
        if component is None:
            sets = [("semantic_hub", None, HUB)] + [("random", None, s) for s in made.sets() if list(s) != HUB]
            made.swap("layer-swap", own, sets, lambda _, kind, layers: cost(kind, layers), ["nll_per_byte"], {})
        else:
            places = {"interface": INTERFACE, "lsn_rich": RICH}.items()
            named = [(f"{kind}_{place}", kind, layers) for place, layers in places for kind in ("attention", "ffn")]
            known = [(kind, tuple(layers)) for _, kind, layers in named]
            sets = named + [("random", kind, s) for kind in ("attention", "ffn") for s in made.sets()
                            if (kind, s) not in known]  # fmt: skip
            made.swap("component-swap/attn_int_swap", own, sets, lambda _, kind, layers: cost(kind, layers),
                      ["nll_per_byte"], {"own": own, "n_layers": L})  # fmt: skip
        return evidence.Results(Study.find(made.study, SEED), draws=0)

    made.rng = type("Still", (), {"normal": lambda self, size: np.zeros(size)})()  # no noise
    return of


def seams(layers):
    return sum((at in layers) != (at + 1 in layers) for at in range(L - 1))


def nuisance(kind, layers):
    """What depth costs falls, and bows; of attention more than of the FFN."""
    slope, bow = (0.02, 0.004) if kind == "attention" else (0.005, 0.001)
    return 0.03 * seams(layers) + sum(slope * (L - at) + bow * (at - 3) ** 2 for at in layers)


def test_the_hub_beside_depth_and_seams(swaps):
    """What depth and seams cost is no cost of the hub; what its layers cost is found whole."""
    for extra in (0.0, -0.05):
        found = swaps(
            lambda kind, layers, e=extra: nuisance(kind, layers) + e * len({*layers} & {*HUB}), "semantic_hub"
        )
        numbers = CLAIMS["C2b"].measure(found)[0]
        assert numbers[0]["value"] == pytest.approx(4 * extra * 0.1, abs=1e-9)  # of a gain of .1 nats
        assert numbers[1]["value"] is None


def test_the_hubs_number_is_that_of_the_swaps_own_file(made, no_figure):
    payload, _ = results.read_json(made.results / LAYER_SWAP)
    units = results.read_tensors((made.results / LAYER_SWAP).with_suffix(".pt"))["nll_per_byte"].tolist()
    rows = [
        row | {"values": {"nll_per_byte": row["values"]["nll_per_byte"]}, "units": {"nll_per_byte": one}}
        for row, one in zip(payload["sets"], units, strict=True)
    ]
    there = matched.statistics(rows, "semantic_hub", L, 0)["additive"]["nll_per_byte"]["contrast_adjusted"]
    assert run(made)["C2b"]["numbers"][0]["value"] == pytest.approx(there["semantic_hub"], abs=1e-12) != 0


def test_component_and_place_beside_depth_and_seams(swaps):
    """Attention may cost more the earlier it lies: that is no matter of the interface."""
    for extra in (0.0, 0.04):

        def cost(kind, layers, extra=extra):
            own = extra if kind == "attention" and sorted(layers) == INTERFACE else 0
            return nuisance(kind, layers) + own

        found = swaps(cost, "attention_interface", "attention")
        (loss, _), (plain, _) = CLAIMS["C5b"].measure(found)
        assert loss["value"] == pytest.approx(extra * 0.1, abs=1e-9)
        assert abs(plain["value"] - loss["value"]) > 1e-3  # the bare interaction takes depth for place


def test_matched_sets_are_those_that_the_file_names(made, no_figure):
    path = made.results / LAYER_SWAP
    payload, head = results.read_json(path)
    rows = [row["layers"] for row in payload["sets"] if row["name"] == "random"]
    mates = [rows[3], rows[8]]
    payload["matched"] = {"semantic_hub": {"layers": mates}}
    results.write_json(path, payload, head)
    values = {tuple(row["layers"]): row["values"]["nll_per_byte"] for row in payload["sets"] if row["layers"]}
    (found, *_) = [one for one in run(made)["C2b"]["beside"] if "its shape, loss" in one["name"]]
    expected = values[tuple(HUB)] - np.mean([values[tuple(one)] for one in mates])
    assert found["value"] == pytest.approx(expected) and found["place"]["n_random"] == 2
    payload["matched"]["semantic_hub"]["layers"] = [[0, 1, 2, 3], [9, 9, 9, 9]]
    results.write_json(path, payload, head)
    with pytest.raises(InputError, match="names a matched set that it does not hold"):
        run(made)


def test_layers_chosen_on_half_of_the_sentences_are_tested_on_the_others(made, no_figure):
    path = made.results / LAYER_SWAP
    payload, _ = results.read_json(path)
    units = results.read_tensors(path.with_suffix(".pt"))["retrieval_readout"].double().numpy()
    target, hub = (controls.find(payload["sets"], name) for name in ("target", "semantic_hub"))
    found = {}
    for half, columns in ((False, slice(None)), (True, slice(1, None, 2))):
        if half:
            with open(made.study, "a") as file:
                file.write("sentences: half\n")
            layers, head = results.read_json(made.results / "layer-specialize/layers.json")
            results.write_json(made.results / "layer-specialize/layers.json", layers, head | {"sentences": "half"})
        swaps = load_script("report/interventions.py").swaps(
            evidence.Results(Study.find(made.study)), "layer_swap", "semantic_hub"
        )
        found[half] = swaps.cost("x", "retrieval_readout", {hub: 1.0})
        assert found[half]["value"] == pytest.approx((units[target] - units[hub])[columns].mean())
        loss = results.read_tensors(path.with_suffix(".pt"))["nll_per_byte"]
        assert swaps.cost("x", "nll_per_byte", {hub: 1.0})["n"] == loss.shape[1]
    assert found[True]["n"] == found[False]["n"] // 2


def test_a_control_may_be_the_set_of_another_treatment(made, no_figure):
    path = made.results / ATTENTION
    payload, head = results.read_json(path)
    at = controls.find(payload["sets"], "ffn_lsn_rich")
    payload["sets"].append(payload["sets"][at] | {"name": "random"})
    results.write_json(path, payload, head)
    tensors = results.read_tensors(path.with_suffix(".pt"))
    both = {name: torch.cat([values, values[at : at + 1]]) for name, values in tensors.items()}
    results.write_tensors(path.with_suffix(".pt"), both)
    assert run(made)["C5b"]["numbers"][0]["value"] is not None


def test_a_fit_needs_sets_enough(made, no_figure):
    path = made.results / LAYER_SWAP
    payload, head = results.read_json(path)
    keep = list(range(10))
    payload["sets"] = [payload["sets"][i] for i in keep]
    results.write_json(path, payload, head)
    tensors = results.read_tensors(path.with_suffix(".pt"))
    results.write_tensors(path.with_suffix(".pt"), {name: values[keep] for name, values in tensors.items()})
    assert "8 sets are too few for the fit: 14" in run(made)["C2b"]["reason"]


# ---------------------------------------------------------------- calibration


def test_the_rules_are_calibrated(monkeypatch, tmp_path):
    """A small version of the table of report/README.md."""
    monkeypatch.setattr(stats, "resample_weights", functools.cache(stats.resample_weights.__wrapped__))
    said = calibrate.rates([World("depth", depth=0.02), World("true", 4.0, **calibrate.DEMO)], 6, (8,))
    null, true = said
    assert null[1:3] == ["6", "8"] and max(map(float, null[3:5])) <= 34  # C and D, each with a Holm of its own
    assert true[1] == "3" and true[3:5] == ["0.0", "0.0"]
    assert sum(map(float, true[5:])) / len(CLAIMS) >= 80
    text = calibrate.table(said)
    assert text.splitlines()[2].count("|") == 6 + len(CLAIMS)


def test_the_table_of_the_readme_is_the_scripts(monkeypatch, tmp_path):
    monkeypatch.setattr(calibrate, "rates", lambda worlds, studies: [["w", str(studies)]])
    page = tmp_path / "page.md"
    page.write_text("\n".join(["before", calibrate.MARKS[0], "old", calibrate.MARKS[1], "after", ""]))
    calibrate.main(["--studies", "3", "--output", str(page)])
    text = page.read_text()
    assert "| w | 3 |" in text and "old" not in text and text.startswith("before\n") and text.endswith("\nafter\n")
    readme = calibrate.README.read_text()
    assert all(readme.count(mark) == 1 for mark in calibrate.MARKS)
    assert all(readme.count(f"| {world.name} | ") == len(calibrate.SEEDS) for world in calibrate.WORLDS)
