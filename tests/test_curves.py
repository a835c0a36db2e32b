"""spectral/curves.py: the paired comparison with the checkpoint, p* of a curve and of random draws, the figure."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import load_script

from cpt_utils.interventions.condition import Condition

CURVES = load_script("spectral/curves.py")
NOISE = np.array([1.0, -1.0, 2.0, -2.0, 0.5, -0.5, 0.0, 0.0])  # sums to 0: a mean is what it is shifted by
ERROR = NOISE.std(ddof=1) / 8**0.5


def planted(curves: dict[str, list[tuple]], axis: dict | None = None) -> tuple[list, list[dict]]:
    """Points and records; of curve -> [(at, draw, by how many standard errors the loss is worse)]."""
    points, records = [], [{"values": {"nll_per_byte": x}, "units": {"nll_per_byte": [x] * 8}} for x in (5.0, 3.0)]
    for curve, rows in curves.items():
        points.append(CURVES.Point(curve, 0.0, CURVES.TARGET, facts={"removed": 0.0}))
        for at, draw, worse in rows:
            facts = {"removed": (axis or {}).get((curve, at), at)}
            points.append(CURVES.Point(curve, at, Condition(f"{curve} {at}", {"draw": draw}), draw, facts))
            losses = 3.0 + NOISE + worse * ERROR
            records.append({"values": {"nll_per_byte": losses.mean()}, "units": {"nll_per_byte": losses.tolist()}})
    return points, records


def test_the_largest_share_that_is_not_worse_by_more_than_one_standard_error():
    rows = [(0.25, 0, -1.0), (0.5, 0, 2.0), (0.75, 0, 0.99), (1.0, 0, 1.01)]
    found = CURVES.summary(*planted({"own": rows}), seed=1)
    star = found["largest"]["own"]["nll_per_byte"]["at"]
    assert (star["value"], star["draws"], star["unbroken"]) == (0.75, [0.75], 0.25)
    assert star["ci_low"] <= 0.75 <= star["ci_high"]
    better = [row["better"]["nll_per_byte"] for row in found["points"]]
    assert better[0] == {"mean": 0.0, "error": 0.0, "ci_low": 0.0, "ci_high": 0.0}  # the checkpoint itself
    assert [row["mean"] / ERROR for row in better[1:]] == pytest.approx([1.0, -2.0, -0.99, -1.01])
    assert better[1]["error"] == pytest.approx(ERROR)
    assert [row["set"] for row in found["points"]] == [1, 2, 3, 4, 5]


def test_the_share_that_keeps_the_gain_does_not_go_by_the_error():
    """CPT gained 2 nats; a loss of .09 is within 5 % of that, of .11 is not, however small the errors are."""
    points, records = planted({"own": [(0.5, 0, 0.0), (0.75, 0, 0.0), (1.0, 0, 0.0)]})
    for record, worse in zip(records[2:], (0.0, 0.09, 0.11), strict=True):
        record["units"]["nll_per_byte"] = [3.0 + worse] * 7 + [3.0 + worse + 1e-6]
    star = CURVES.summary(points, records, seed=1)["largest"]["own"]["nll_per_byte"]["at"]
    assert star["value"] == 0.0
    # between .75, which could lose .01 more, and 1, which loses .01 too much
    assert star["kept"]["value"] == star["kept"]["unbroken"] == pytest.approx(0.875, abs=1e-4)
    records[0]["units"]["nll_per_byte"] = (3.0 + NOISE).tolist()  # a base that is as good: there is no gain to keep
    assert CURVES.summary(points, records, seed=1)["largest"]["own"]["nll_per_byte"]["at"]["kept"] is None


def test_where_everything_is_worse_only_the_checkpoint_is_left():
    found = CURVES.summary(*planted({"own": [(0.5, 0, 9.0), (1.0, 0, 9.0)]}), seed=1)
    star = found["largest"]["own"]["nll_per_byte"]["at"]
    assert [star[key] for key in ("value", "ci_low", "ci_high", "unbroken")] == [0.0] * 4


def test_random_draws_have_a_share_each_and_the_difference_shares_its_resamples():
    own = [(0.5, 0, 0.0), (1.0, 0, 30.0)]
    drawn = [(0.5, 0, 0.0), (1.0, 0, 30.0), (0.5, 1, 30.0), (1.0, 1, 30.0)]
    points, records = planted({"own": own, "random": drawn})
    found = CURVES.summary(points, records, seed=1, nulls={"own": ["random"]})
    assert found["largest"]["random"]["nll_per_byte"]["at"]["draws"] == [0.5, 0.0]
    assert found["largest"]["random"]["nll_per_byte"]["at"]["value"] == 0.25
    assert found["beyond"]["own"]["random"]["nll_per_byte"]["at"]["value"] == 0.25
    same = CURVES.summary(*planted({"own": own, "random": own}), seed=1, nulls={"own": ["random"]})
    beyond = same["beyond"]["own"]["random"]["nll_per_byte"]["at"]
    assert beyond["kept"] == {"value": 0.0, "ci_low": 0.0, "ci_high": 0.0}
    assert beyond == {
        "value": 0.0,
        "ci_low": 0.0,
        "ci_high": 0.0,
        "kept": beyond["kept"],
    }  # the same points: no resample sets them apart


def test_a_share_can_be_read_along_another_axis():
    rows = {"own": [(0.5, 0, 0.0), (1.0, 0, 30.0)]}
    points, records = planted(rows, {("own", 0.5): 0.1})
    found = CURVES.summary(points, records, seed=1, along=("at", "removed"))["largest"]["own"]["nll_per_byte"]
    assert (found["at"]["value"], found["removed"]["value"]) == (0.5, 0.1)


def test_a_condition_on_several_curves_is_measured_once():
    shared = Condition("all", {"layers": [0]})
    points = [CURVES.Point(name, at, one) for name in "ab" for at, one in ((0, CURVES.TARGET), (1, shared))]
    wanted, at = CURVES.numbered([*points, CURVES.Point("a", 2, CURVES.BASE)])
    assert wanted == [shared] and at == [1, 2, 1, 2, 0]


@pytest.mark.figures
def test_the_figure_has_base_checkpoint_and_every_curve(tmp_path, monkeypatch):
    points, records = planted({"own": [(0.5, 0, 0.0)], "random": [(0.5, 0, 1.0), (0.5, 1, 3.0)]})
    sets = [{"name": name} | records[i] for i, name in enumerate(("base", "target"))]
    payload = CURVES.summary(points, records, seed=1) | {"sets": sets}
    looks = {name: {"label": name, "color": "black"} for name in ("own", "random", "never drawn")}
    CURVES.draw(tmp_path / "figure", payload, looks, "share")
    assert (tmp_path / "figure.png").stat().st_size > 10_000 and (tmp_path / "figure.pdf").is_file()
    monkeypatch.setattr(CURVES.figures, "save", lambda figure, path: saved.append(figure))
    saved, looks = [], {name: look | {"label": 34 * "x"} for name, look in looks.items()}
    CURVES.draw(tmp_path / "figure", payload, looks, "share")
    saved[0].draw_without_rendering()
    legend, panel = saved[0].legends[0].get_window_extent(), saved[0].axes[0].get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= saved[0].bbox.x1 and legend.y0 >= panel.y1  # of one panel, too
    assert panel.height > 100
