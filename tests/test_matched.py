"""Sets of one shape and the additive fit: against slow obvious versions, and in worlds where it is known what costs."""

from __future__ import annotations

import functools
import random
from itertools import combinations

import numpy as np
import pytest

from cpt_utils.base import stats
from cpt_utils.base.errors import InputError
from cpt_utils.measures import controls, matched
from cpt_utils.measures.evaluation import DECIDING, MEASURES

UNITS = 60


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch):
    """Worlds are measured hundreds of times: the draws of one seed are made once."""
    monkeypatch.setattr(stats, "resample_weights", functools.cache(stats.resample_weights))


def blocks(layers):
    return sum(layer - 1 not in layers for layer in layers)


def slowly(layers, treatment):
    """The sets that match, by trying all of that size."""
    treatment = sorted(treatment)
    return [
        list(one)
        for one in combinations(sorted(layers), len(treatment))
        if (one[0], one[-1], blocks(one)) == (treatment[0], treatment[-1], blocks(treatment))
        and abs(np.mean(one) - np.mean(treatment)) <= 0.5 + 1e-9
        and list(one) != treatment
    ]


def measured(cost, treatments, sets, noise=0.0, seed=0, component=None):
    """Records in which a set costs `cost(layers)` of readout and of loss, with noise over units."""
    rng = np.random.default_rng(seed)
    base_units = rng.normal(0, 0.1, UNITS)

    def record(name, layers, worse):
        worse = worse + base_units + (rng.normal(0, noise, UNITS) if noise else 0.0)
        units = {"retrieval_readout": (0.8 - worse).tolist(), "nll_per_byte": (1 + worse).tolist()}
        row = {"name": name, "layers": list(layers), "units": units}
        if component and layers:
            row["component"] = component
        return row | {"values": {key: float(np.mean(value)) for key, value in units.items()}}

    records = [record("base", [], 9.0), record("target", [], 0.0)]
    records += [record(name, layers, cost(layers)) for name, layers in treatments.items()]
    return records + [record(name, layers, cost(layers)) for name, layers in sets]


def all_but(n, treatment):
    return [("random", list(one)) for one in combinations(range(n), len(treatment)) if list(one) != list(treatment)]


# ---------------------------------------------------------------- sets


def test_shape():
    assert matched.shape([6, 2, 4, 5]) == {"size": 4, "first": 2, "last": 6, "mean_depth": 4.25, "blocks": 2}
    assert matched.shape([]) == {"size": 0, "first": None, "last": None, "mean_depth": None, "blocks": 0}
    assert matched.alike([2, 4, 5, 6], [2, 3, 4, 6]) and not matched.alike([2, 4, 5, 6], [6, 5, 4, 2])
    assert not matched.alike([0, 1, 2, 6, 7], [0, 4, 5, 6, 7])  # one and a half layers deeper


@pytest.mark.parametrize("n", [5, 8])
def test_matched_sets_are_those_of_the_slow_way(n):
    for size in range(1, n):
        for treatment in combinations(range(n), size):
            assert matched.matched_sets(range(n), treatment, 300, 0) == slowly(range(n), treatment)


def test_only_layers_that_have_the_component():
    there, treatment = [0, 1, 3, 4, 6, 7, 9, 10], [1, 4, 6, 9]
    found = matched.matched_sets(there, treatment, 300, 0)
    assert found == slowly(there, treatment) and [1, 3, 6, 9] in found and [1, 3, 7, 9] in found


@pytest.mark.parametrize("tries", [matched.TRIES, 3000])
def test_of_many_matched_sets_some_are_drawn(monkeypatch, tries):
    """Whether all of them are made and some kept, or sets are drawn until there are enough."""
    monkeypatch.setattr(matched, "TRIES", tries)
    treatment = [1, 2, 5, 8, 9, 12, 14]
    every = slowly(range(16), treatment)
    found = matched.matched_sets(range(16), treatment, 40, 1)
    assert len(every) > 40 == len(found) == len({tuple(one) for one in found}) and all(one in every for one in found)
    assert (
        found == matched.matched_sets(range(16), treatment, 40, 1) != matched.matched_sets(range(16), treatment, 40, 2)
    )
    assert np.std([sum(one) for one in found]) > 0  # not the first of them, which lie shallow


def test_a_deep_model_takes_no_time():
    """40 of 80 layers: 10^23 sets of that size."""
    treatment = sorted(random.Random(0).sample(range(80), 40))
    found = matched.matched_sets(range(80), treatment, 20, 0)
    assert len(found) == 20 and all(matched.alike(one, treatment) for one in found)


def test_what_is_added_to_drawn_sets(capsys):
    hub = [2, 4, 5, 6]
    assert slowly(range(8), hub) == [[2, 3, 4, 6], [2, 3, 5, 6]]
    assert matched.to_add([(None, hub)], {None: range(8)}, [(None, hub), (None, [6, 3, 2, 5])], 0) == [
        (None, [2, 3, 4, 6])
    ]
    assert "1 of 2 sets of the treatments' shape" in capsys.readouterr().out
    known = [(None, one) for one in combinations(range(8), 4)]
    assert matched.to_add([(None, hub)], {None: range(8)}, known, 0) == [] and not capsys.readouterr().out
    # A set of attention is none of the FFN's; two treatments share the limit.
    places = [("attention", hub), ("ffn", hub)]
    added = matched.to_add(places, {"attention": range(8), "ffn": [2, 3, 4, 5, 6]}, [("ffn", [2, 3, 4, 6])], 0)
    assert added == [("attention", [2, 3, 4, 6]), ("attention", [2, 3, 5, 6]), ("ffn", [2, 3, 5, 6])]
    wide = [(kind, [1, 2, 5, 8, 9, 12, 16]) for kind in ("attention", "ffn")]
    assert len(matched.to_add(wide, dict.fromkeys(("attention", "ffn"), range(18)), [], 0)) == controls.SMALL


# ---------------------------------------------------------------- statistics, slowly


def test_places_and_the_fit_are_those_of_the_slow_way():
    hub, rng = [1, 3, 4, 6], np.random.default_rng(3)
    effects = rng.normal(0.1, 0.05, 8)
    records = measured(lambda s: effects[list(s)].sum(), {"semantic_hub": hub}, all_but(8, hub), noise=0.05)
    found = matched.statistics(records, "semantic_hub", 8, seed=5)
    mates = slowly(range(8), hub)
    assert len(mates) == 2 and sorted(found["matched"]["semantic_hub"]["layers"]) == mates
    by_layers = {tuple(row["layers"]): row for row in records}
    depth = found["matched"]["semantic_hub"]["depth_difference"]
    assert depth == pytest.approx(np.mean(hub) - np.mean([np.mean(one) for one in mates]))
    for name in ("retrieval_readout", "nll_per_byte"):
        sign = 1 if MEASURES[name].higher_is_better else -1
        own, others = by_layers[tuple(hub)], [by_layers[tuple(one)] for one in mates]
        row, values = found["matched"]["semantic_hub"][name], [one["values"][name] for one in others]
        assert row["own"] == own["values"][name] and row["n_matched"] == len(mates)
        assert row["own_minus_matched"] == pytest.approx(row["own"] - np.mean(values))
        assert row["rank"] == 1 + sum(sign * value > sign * row["own"] for value in values)
        assert row["p_value"] == (1 + sum(sign * value >= sign * row["own"] for value in values)) / (1 + len(mates))
        assert row["p_worse"] == (1 + sum(sign * value <= sign * row["own"] for value in values)) / (1 + len(mates))
        units = np.array(own["units"][name]) - np.mean([one["units"][name] for one in others], axis=0)
        assert (row["ci_low"], row["ci_high"]) == pytest.approx(stats.bootstrap_mean(units, 5))

        fit, rows = found["additive"][name], [row for row in records if row["layers"]]
        target = records[1]["values"][name]
        holds = np.array([[layer in row["layers"] for layer in range(8)] for row in rows], float)
        costs = np.array([sign * (target - row["values"][name]) for row in rows])
        per_layer = np.linalg.solve(holds.T @ holds, holds.T @ costs)
        assert fit["per_layer"] == pytest.approx(per_layer) and fit["intercept"] == 0 and fit["n_sets"] == 70
        left = costs - holds @ per_layer
        assert fit["r2"] == pytest.approx(1 - left @ left / ((costs - costs.mean()) ** 2).sum())
        inside = np.isin(range(8), hub)
        contrast = per_layer[inside].mean() - per_layer[~inside].mean()
        assert fit["contrast"]["semantic_hub"] == pytest.approx(contrast)
        assert per_layer == pytest.approx(effects, abs=0.05)
        low, high = fit["contrast_ci"]["semantic_hub"]
        assert low < contrast < high
        # A constant that is no layer's changes no difference between layers.
        shifted = np.linalg.solve(holds.T @ holds, holds.T @ (costs + 7))
        assert shifted[inside].mean() - shifted[~inside].mean() == pytest.approx(contrast)
        depth = np.arange(8) / 7 - 0.5
        like = [[1, blocks(one), 0 in one, 7 in one, depth[one].mean(), (depth[one] ** 2).mean(),
                 inside[one].mean()] for one in (row["layers"] for row in rows)]  # fmt: skip
        beside = np.linalg.lstsq(np.array(like, float), costs, rcond=None)[0][-1]
        assert fit["contrast_adjusted"]["semantic_hub"] == pytest.approx(beside)
        low, high = fit["contrast_adjusted_ci"]["semantic_hub"]
        assert low < beside < high


def test_the_interval_of_a_contrast_is_that_of_fits_to_redrawn_units():
    hub = [1, 3, 4, 6]
    records = measured(lambda s: 0.1 * len(s), {"semantic_hub": hub}, all_but(8, hub), noise=0.2)
    fit = matched.statistics(records, "semantic_hub", 8, 5)["additive"]["nll_per_byte"]
    rows, target = [row for row in records if row["layers"]], np.array(records[1]["units"]["nll_per_byte"])
    holds = np.array([[layer in row["layers"] for layer in range(8)] for row in rows], float)
    drawn = []
    for weights in stats.resample_weights(UNITS, 5, 2000):
        costs = [(np.array(row["units"]["nll_per_byte"]) - target) @ weights / UNITS for row in rows]
        per_layer = np.linalg.lstsq(holds, np.array(costs), rcond=None)[0]
        drawn.append(per_layer[hub].mean() - np.delete(per_layer, hub).mean())
    assert fit["contrast_ci"]["semantic_hub"] == pytest.approx(list(np.quantile(drawn, [0.025, 0.975])))


def test_what_cannot_be_said_is_null_and_why():
    hub = [2, 3, 4]
    records = measured(lambda s: sum(s), {"semantic_hub": hub}, all_but(6, hub)[:4])
    found = matched.statistics(records, "semantic_hub", 6, 1)
    row = found["matched"]["semantic_hub"]["nll_per_byte"]
    assert row["n_matched"] == 0 and row["why"].startswith("no other set of this size") and row["own"] is not None
    assert all(row[key] is None for key in ("matched_mean", "own_minus_matched", "ci_low", "rank", "p_value"))
    fit = found["additive"]["nll_per_byte"]
    assert fit["why"] == "5 sets are too few for a fit of 6 layers" and fit["contrast"] == {"semantic_hub": None}
    assert fit["per_layer"] == [None] * 6 and fit["r2"] is None
    matched.say(found, "semantic_hub", None)


def test_named_sets_of_another_component_or_size_are_apart():
    """Of two components in one file each set is compared with its own; both names of a swap are found."""
    hub = [1, 3, 4, 6]
    one = measured(sum, {"attention_interface": hub}, all_but(8, hub), component="attention")
    other = measured(lambda s: -sum(s), {"ffn_interface": hub}, all_but(8, hub), component="ffn")
    one[2]["also"] = ["attention_lsn_rich"]
    more = {**other[2], "name": "ffn_interface_embeddings", "component": "ffn+embeddings"}
    found = matched.statistics([*one, *other[2:], more], "attention_interface", 8, 1)
    assert set(found["matched"]) == {"attention_interface", "attention_lsn_rich", "ffn_interface"}
    alone = matched.statistics(one, "attention_interface", 8, 1)
    assert found["matched"]["attention_interface"] == alone["matched"]["attention_interface"]
    assert found["additive"] == alone["additive"]
    assert set(alone["additive"]["nll_per_byte"]["contrast"]) == {"attention_interface", "attention_lsn_rich"}
    assert (
        found["matched"]["ffn_interface"]
        == matched.statistics(other, "ffn_interface", 8, 1)["matched"]["ffn_interface"]
    )


# ---------------------------------------------------------------- worlds


def decided(cost, noise=0.0):
    """Every set of four of eight layers in turn as the treatment: its row among matched sets, the fit's facts."""
    found, name = [], "retrieval_readout"
    for seed, treatment in enumerate(combinations(range(8), 4)):
        records = measured(cost, {"semantic_hub": treatment}, all_but(8, treatment), noise, seed)
        for record in records:
            del record["units"]["nll_per_byte"], record["values"]["nll_per_byte"]
        made = matched.statistics(records, "semantic_hub", 8, 0)
        among = made["matched"]["semantic_hub"]
        found.append((treatment, among[name] | {"depth": among["depth_difference"]}, made["additive"][name]))
    return found


def test_where_only_depth_matters_no_treatment_is_preferred():
    """Early layers cost more, evenly. Random sets prefer the deep ones; what is adjusted for depth prefers none."""
    found = decided(lambda s: 0.02 * sum(8 - layer for layer in s), 0.02)
    raw = np.array([row["own_minus_matched"] for _, row, _ in found if row["n_matched"]])
    assert abs(raw.mean()) < 0.005
    ends = [fit["contrast_adjusted_ci"]["semantic_hub"] for _, _, fit in found]
    assert np.mean([not low <= 0 <= high for low, high in ends]) < 0.15
    for treatment, _, fit in found:
        deeper = np.mean(treatment) - np.mean([layer for layer in range(8) if layer not in treatment])
        assert fit["contrast"]["semantic_hub"] == pytest.approx(-0.02 * deeper, abs=0.006) and fit["r2"] > 0.98


@pytest.mark.parametrize(
    "cost",
    [
        lambda s: 0.02 * sum(8 - layer for layer in s),
        lambda s: 0.1 * blocks(s),
        lambda s: 0.02 * sum(8 - layer for layer in s) + 0.1 * blocks(s) + 0.3 * (0 in s) + 0.2 * (7 in s),
    ],
)
def test_depth_seams_and_ends_prefer_no_treatment(cost):
    """Whatever the treatment: among its like nothing is left of what they cost, where random sets are far off."""
    off = []
    for treatment, row, fit in decided(cost):
        records = measured(cost, {"semantic_hub": treatment}, all_but(8, treatment))
        off.append(abs(controls.compare(records, "semantic_hub", 1)["retrieval_readout"]["own_minus_random"]))
        if row["n_matched"]:
            assert row["own_minus_matched"] == pytest.approx(0.08 * row["depth"] * (0.02 in cost.__code__.co_consts))
        assert fit["contrast_adjusted"]["semantic_hub"] == pytest.approx(0, abs=1e-9), treatment
    assert max(off) > 0.1


def test_a_bow_of_depth_is_no_cost_of_the_treatment():
    found = decided(lambda s: 0.01 * sum((layer - 5) ** 2 for layer in s))
    left = [fit["contrast_adjusted"]["semantic_hub"] for _, _, fit in found]
    assert left == pytest.approx([0] * 70, abs=1e-9)
    assert max(abs(fit["contrast"]["semantic_hub"]) for _, _, fit in found) > 0.05


def test_a_fit_of_layers_says_little_where_seams_cost():
    for _, _, fit in decided(lambda s: 0.1 * blocks(s)):
        assert fit["r2"] < 0.3


@pytest.mark.parametrize("measure", ["retrieval_readout", "nll_per_byte"])
def test_a_hub_that_is_cheap_is_found(measure):
    """Beside depth and seams."""
    hub, n = [3, 4, 6, 7, 9, 10, 12, 13], 16

    def cost(layers):
        return sum(0.02 * (n - layer) + 0.1 * (layer not in hub) for layer in layers) + 0.05 * blocks(layers)

    drawn, _ = controls.layer_sets(n, hub, 40, 0)
    added = matched.to_add([(None, hub)], {None: range(n)}, [(None, hub), *((None, one) for one in drawn)], 0)
    sets = [*(("random", one) for one in drawn), *(("matched", one) for _, one in added)]
    found = matched.statistics(measured(cost, {"semantic_hub": hub}, sets, noise=0.02), "semantic_hub", n, 0)
    row, fit = found["matched"]["semantic_hub"][measure], found["additive"][measure]
    better = 1 if MEASURES[measure].higher_is_better else -1
    assert row["n_matched"] >= 19 and row["rank"] == 1 and row["p_value"] <= 0.05
    assert better * row["own_minus_matched"] > 0.1
    assert row["ci_low"] * row["ci_high"] > 0
    assert fit["contrast"]["semantic_hub"] < 0 and fit["contrast_ci"]["semantic_hub"][1] < 0
    assert fit["contrast_adjusted"]["semantic_hub"] == pytest.approx(-0.1 * len(hub), abs=0.2) and fit["r2"] > 0.8


def test_matched_sets_move_no_rank(capsys):
    """They stand beside the random ones: comparison, places and intervals are those without them."""
    hub = [2, 4, 5, 6]
    drawn = all_but(8, hub)[:30]
    plain = measured(sum, {"semantic_hub": hub}, drawn)
    more = [*plain, *measured(sum, {}, [("matched", one) for one in slowly(range(8), hub)])[2:]]
    assert controls.compare(plain, "semantic_hub", 1) == controls.compare(more, "semantic_hub", 1)
    sides = [controls.summary(records, 1) for records in (plain, more)]
    for rows, records in zip(sides, (plain, more), strict=True):
        controls.intervals(rows, records, 1)
        controls.rank_all(rows, "semantic_hub")
    assert sides[0] == sides[1][: len(sides[0])] and "change" not in sides[1][-1] and "place" not in sides[1][-1]
    controls.say(sides[1], controls.compare(more, "semantic_hub", 1))
    assert "\nmatched" not in capsys.readouterr().out
    assert set(DECIDING) <= set(MEASURES)


# ---------------------------------------------------------------- pairs, gaps


def test_the_grid_of_pairs_is_counted_with_its_own_row_and_column():
    rng = np.random.default_rng(0)
    firsts, seconds = rng.normal(0, 1, 7).tolist(), rng.normal(0, 1, 5).tolist()
    found = controls.place_in_grid(1.5, firsts, -0.5, seconds)
    grid = [a - b for a in [1.5, *firsts] for b in [-0.5, *seconds]]
    assert found == {
        "own": 2.0, "n_pairs": 48, "rank": 1 + sum(d > 2 for d in grid),
        "p_value": sum(d >= 2 for d in grid) / 48, "p_opposite": sum(d <= 2 for d in grid) / 48,
    }  # fmt: skip
    # Own sets drawn like the others: p at or below any bound no more often than that.
    draws = [
        controls.place_in_grid(x[0], x[1:5], x[5], x[6:])["p_value"] for x in rng.normal(0, 1, (4000, 10)).tolist()
    ]
    assert all(np.mean(np.array(draws) <= bound) <= bound + 0.012 for bound in (0.05, 0.1, 0.25, 0.5))


@pytest.mark.parametrize("value", [float("nan"), None, float("inf")])
def test_a_value_that_is_no_number_has_no_rank(value):
    for own, others in ((value, [0.1, 0.2]), (0.1, [0.2, value])):
        with pytest.raises(InputError, match="without a finite value has no rank") as caught:
            controls.rank_among_random(own, others, True)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="without a finite value has no rank"):
        controls.place_in_grid(0.1, [value], 0.2, [0.3])
