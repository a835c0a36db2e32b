"""spectral/connect.py: ends bit for bit, halves that commute, planted barriers, random directions, the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers import load_script, put_tensors, save_tiny, tiny_model

from cpt_utils.base import cli, results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.interventions import in_memory, surgery
from cpt_utils.interventions.condition import Condition
from cpt_utils.measures import verdicts
from cpt_utils.models import loading

evidence = cli.sibling("report/evidence.py")
CONNECT = load_script("spectral/connect.py")
CURVES = CONNECT.curves


def weights(ref) -> dict[str, torch.Tensor]:
    return loading.load_model(refs.model(ref), torch.float32, torch.device("cpu")).state_dict()


def made(pair: surgery.Pair, recipe: surgery.Recipe) -> dict[str, torch.Tensor]:
    model = loading.load_model(pair.target_ref, torch.float32, torch.device("cpu"))
    with in_memory.apply(model, recipe, pair):
        return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_ends_are_copies_and_between_them_everything_is_mixed(tmp_path, kind):
    for seed, name in enumerate("AC"):
        save_tiny(kind, tmp_path / name, seed=seed)
    a, c = weights(tmp_path / "A"), weights(tmp_path / "C")
    with surgery.Pair(tmp_path / "A", tmp_path / "C") as pair, surgery.Pair(tmp_path / "C", tmp_path / "A") as back:
        edits, other = CONNECT.everything(pair, None), CONNECT.everything(back, None)
        at = {x: made(pair, CONNECT.between(pair, edits, x)) for x in (0.0, 0.3, 0.5, 1.0, 1.25)}
        turned = {x: made(back, CONNECT.between(back, other, x)) for x in (0.5, 0.7)}
    for name in a:
        assert at[0.0][name].equal(a[name]) and at[1.0][name].equal(c[name]), name
        assert torch.allclose(at[0.3][name], 0.7 * a[name] + 0.3 * c[name], atol=1e-6)
        assert torch.allclose(at[1.25][name], 1.25 * c[name] - 0.25 * a[name], atol=1e-6)
        assert at[0.5][name].equal(turned[0.5][name]) and at[0.3][name].equal(turned[0.7][name]), name
    assert any(not at[0.5][name].equal(c[name]) for name in a if "embed" in name or "wte" in name)
    assert any(not at[0.5][name].equal(c[name]) for name in a if "norm" in name or "ln_f" in name)


def test_random_directions_are_as_long_as_the_line_and_others_in_every_draw(tmp_path):
    for seed, name in enumerate("AC"):
        save_tiny("llama", tmp_path / name, seed=seed)
    a, c = weights(tmp_path / "A"), weights(tmp_path / "C")
    with surgery.Pair(tmp_path / "A", tmp_path / "C") as pair:
        edits = CONNECT.everything(pair, None)
        found = {
            (side, x, draw): made(pair, CONNECT.aside(pair, edits, side, x, 1, draw))
            for side in "AC" for x in (0.2, 0.7) for draw in (0, 1)
        }  # fmt: skip
    for name in a:
        length = float((c[name] - a[name]).norm())
        for (side, x, draw), moved in found.items():
            end, share = (a, x) if side == "A" else (c, 1 - x)
            assert float((moved[name] - end[name]).norm()) == pytest.approx(share * length, rel=1e-3), name
            assert draw == 0 or not moved[name].equal(found[side, x, 0][name])
        steps = [(found["A", x, 0][name] - a[name]) / x for x in (0.2, 0.7)]
        assert torch.allclose(*steps, atol=1e-3 * length)  # one direction, gone less and further


def test_a_tied_head_that_is_on_disk_goes_where_its_embeddings_go(tmp_path):
    for seed, name in enumerate("AC"):
        folder = save_tiny("llama", tmp_path / name, seed=seed, tie_word_embeddings=True)
        put_tensors(folder, **{"lm_head.weight": "model.embed_tokens.weight"})
    with surgery.Pair(tmp_path / "A", tmp_path / "C") as pair:
        edits = CONNECT.everything(pair, None)
        assert {"lm_head.weight", "model.embed_tokens.weight"} <= {edit.tensor for edit in edits}
        moved = made(pair, CONNECT.aside(pair, edits, "A", 0.5, 1, 0))
    assert moved["lm_head.weight"].equal(moved["model.embed_tokens.weight"])
    assert not moved["lm_head.weight"].equal(weights(tmp_path / "A")["lm_head.weight"])


def test_what_no_model_of_the_type_uses_has_no_distance(tmp_path):
    for seed, name in enumerate(("base", "A", "C")):
        save_tiny("qwen3_next", tmp_path / name, seed=seed)
    with surgery.Pair(tmp_path / "A", tmp_path / "C") as pair, surgery.Pair(tmp_path / "base", tmp_path / "C") as of:
        wanted = CONNECT.distances(pair, of)
    put_tensors(tmp_path / "C", **{"mtp.layers.0.x.weight": torch.ones(4, 4)})
    with surgery.Pair(tmp_path / "A", tmp_path / "C") as pair, surgery.Pair(tmp_path / "base", tmp_path / "C") as of:
        assert CONNECT.distances(pair, of) == wanted


def records_of(at: list[float], height: float, random: float) -> tuple[list, list[dict]]:
    """Losses with A at 3, C at 2 and B at 4, a bump of `height` on the chord in the middle, and ends that random
    directions make worse by `random` (in the middle)."""
    noise = np.random.default_rng(0).normal(0, 0.01, 40)
    points = [
        CURVES.Point("line", a, {0.0: CONNECT.OTHER, 1.0: CURVES.TARGET}.get(a, Condition("x", {"a": a}))) for a in at
    ]
    losses = {CURVES.BASE.id: 4.0, CURVES.TARGET.id: 2.0, CONNECT.OTHER.id: 3.0}
    for point in points[1:-1]:
        losses[point.condition.id] = 3 - point.at + height * 4 * point.at * (1 - point.at)
    for side, end in (("A", 3.0), ("C", 2.0)):
        for a in at[1:-1]:
            one = Condition("r", {"a": a, "side": side})
            points.append(CURVES.Point(f"random_{side}", a, one))
            losses[one.id] = end + random * 4 * a * (1 - a)
    order = [CURVES.BASE, CURVES.TARGET, *CURVES.numbered(points)[0]]
    scored = [(losses[one.id] + noise).tolist() for one in order]
    values = [{"values": {"nll_per_byte": sum(row) / 40}, "units": {"nll_per_byte": row}} for row in scored]
    return points, values


@pytest.mark.parametrize(("height", "random"), [(0.4, 0.1), (0.0, 0.0), (-0.3, 0.2)])
def test_a_planted_barrier_is_found_with_its_share_of_the_gain(height, random):
    points, records = records_of([0.0, 0.25, 0.5, 0.75, 1.0], height, random)
    found = CONNECT.summarise(records, points, seed=1)
    row = found["measures"]["nll_per_byte"]
    top = height if height >= 0 else 0.75 * height  # of a line below its chord the point next to an end
    assert row["barrier"]["value"] == pytest.approx(top, abs=1e-9)
    assert row["gain"]["value"] == pytest.approx(2.0)  # of C, the better end
    assert row["barrier"]["share"]["value"] == pytest.approx(top / 2, abs=1e-9)
    assert row["random"]["value"] == pytest.approx(random, abs=1e-9)
    assert row["apart"]["value"] == pytest.approx(random - top, abs=1e-9)
    assert [gap[1] for gap in row["gap"]] == pytest.approx([0, 0.75 * height, height, 0.75 * height, 0], abs=1e-9)
    assert found["worst"]["measure"] == "nll_per_byte"
    if height > 0:
        assert row["barrier"]["at"] == 0.5


@pytest.mark.parametrize(("gain", "name"), [(0.1, "nll_per_byte"), (0.3, "nll_per_byte:eng_Latn")])
def test_a_gain_that_is_small_beside_another_decides_nothing(gain, name):
    """A gap of .1 is the whole of a gain of .1, which is nothing beside a gain of 2."""
    points, records = records_of([0.0, 0.5, 1.0], 0.1, 0.0)
    for record, loss in zip(records, [2.0 + gain, 2.0, 2.1, 2.1, 2.1, 2.0], strict=True):  # base, C, .., A
        record["units"]["nll_per_byte:eng_Latn"], record["values"]["nll_per_byte:eng_Latn"] = [loss] * 40, loss
    found = CONNECT.summarise(records, points, seed=1)
    assert found["measures"]["nll_per_byte:eng_Latn"]["barrier"]["share"]["value"] == pytest.approx(0.1 / gain)
    assert found["worst"]["measure"] == name


def test_no_share_of_a_gain_that_is_not_clear():
    points, records = records_of([0.0, 0.5, 1.0], 0.4, 0.1)
    records[0]["units"]["nll_per_byte"] = [1.0] * 40  # a base that is better than both
    found = CONNECT.summarise(records, points, seed=1)
    assert found["measures"]["nll_per_byte"]["barrier"]["share"] is None and found["worst"] is None


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two runs, of which the second goes in the direction of the first and as far beside it."""
    root = tmp_path_factory.mktemp("connect")
    save_tiny("llama", root / "base", seed=0)
    for run, seeds in (("one", [5]), ("two", [5, 6])):
        model = tiny_model("llama", seed=0)
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for value in model.parameters():
                    value += 0.02 * torch.randn(value.shape, generator=generator)
        save_tiny("llama", root / run / "checkpoint-20", model=model)
    save_tiny("llama", root / "wider", seed=0, vocab_size=300)
    for name in ("a", "b"):
        (root / f"{name}.txt").write_text("".join(f"ba do {name} ki lu {i}\n" for i in range(6)))
    return root


def run(models, out, *more) -> dict:
    where = ["--base", models / "base", "--run", models / "one", "--heldout", models / "a.txt", "--output", out]
    where += ["--heldout-others", f"fra_Latn={models / 'b.txt'}"]
    CONNECT.main([*map(str, where), "--measures", "nll", "--at", "0.5", *more])
    return json.loads(out.read_text()) if out.exists() else {}


def test_two_runs_of_one_base(models, tmp_path, capsys):
    found = run(models, tmp_path / "out.json", "--other", str(models / "two"), "--at", "0.5", "-0.25", "1.25")
    assert [row["at"] for row in found["points"]] == [-0.25, 0.0, 0.5, 1.0, 1.25]
    assert [row["set"] for row in found["points"]].count(1) == 1 and len(found["sets"]) == 3 + 3 + 2
    assert {*found["measures"]} == {"nll_per_byte", "nll_per_byte:fra_Latn"}
    assert found["distance"]["all"]["cosine"] == pytest.approx(0.5**0.5, abs=0.02)
    assert {*found["distance"]} == {"all", "outside", "0", "1", "2"}
    a, b, c = (weights(models / name) for name in ("two/checkpoint-20", "base", "one/checkpoint-20"))
    apart = [sum(float(one.double().square().sum()) for one in each) for each in ([c[n] - a[n] for n in a], b.values())]
    assert found["distance"]["all"]["distance"] == pytest.approx((apart[0] / apart[1]) ** 0.5, rel=1e-6)
    assert {*found["_header"]["models"]} == {"base", "target", "other"}
    assert {path.name for path in tmp_path.iterdir()} == {"out.json", "out.pt", "out.png", "out.pdf"}
    run(models, tmp_path / "out.json", "--other", str(models / "two"), "--at", "0.5", "-0.25", "1.25")
    assert "kept (--overwrite redoes it)" in capsys.readouterr().out
    with pytest.raises(InputError, match="another request"):
        run(models, tmp_path / "out.json")


def test_the_claim_is_decided_by_the_barrier_as_a_share_of_the_gain(models, tmp_path):
    class Found:
        def file(self, step: str, schema: str):
            return evidence.File(path, "spectral/connect.py", *results.read_json(path, schema))

    d6, path = cli.sibling("report/claims/d6.py"), tmp_path / "out.json"
    made = run(models, path, "--other", str(models / "two"))
    numbers, beside = d6.measure(Found())
    worst = made["worst"] or {"value": None}
    assert [(row["value"], row["says"]) for row in numbers] == [(worst["value"], verdicts.below(0.1))]
    named = {row["name"]: row["value"] for row in beside}
    assert named["cosine of the two updates"] == made["distance"]["all"]["cosine"]
    apart = made["measures"]["nll_per_byte"]["apart"]["value"]
    assert named["random directions minus the line, loss"] == apart
    run(models, path, "--overwrite")
    with pytest.raises(InputError, match="connects a base and its checkpoint, not two runs"):
        d6.measure(Found())


def test_a_dtype_too_coarse_for_the_line_is_said(models, tmp_path, capsys):
    found = run(models, tmp_path / "out.json", "--other", str(models / "two"))
    assert found["distance"]["all"]["rounding"] < 1e-6 and "rounding" not in capsys.readouterr().err
    ends = [tiny_model("llama", seed=0) for _ in range(2)]
    with torch.no_grad():
        for value in ends[1].parameters():
            value += 1e-3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    for name, model in zip("AC", ends, strict=True):
        save_tiny("llama", tmp_path / name, model=model.to(torch.bfloat16))
    where = ["--run", str(tmp_path / "C"), "--other", str(tmp_path / "A")]
    found = run(models, tmp_path / "coarse.json", *where)
    a, c = weights(tmp_path / "A"), weights(tmp_path / "C")
    off = sum(float(((a[n] + c[n]) / 2 - ((a[n] + c[n]) / 2).bfloat16()).double().square().sum()) for n in a)
    half = sum(float(((a[n] - c[n]) / 2).double().square().sum()) for n in a)
    assert found["distance"]["all"]["rounding"] == pytest.approx(off / half, rel=1e-6)
    assert "of the energy of half of A - C" in capsys.readouterr().err


def test_a_base_and_its_checkpoint(models, tmp_path):
    found = run(models, tmp_path / "out.json", "--draws", "0")
    assert [row["set"] for row in found["points"]] == [0, 2, 1] and found["distance"]["all"]["cosine"] is None
    assert "random" not in found["measures"]["nll_per_byte"]
    gaps = found["measures"]["nll_per_byte"]["gap"]
    assert gaps[0][1:] == gaps[2][1:] == [0.0, 0.0, 0.0]
    losses = [found["sets"][i]["values"]["nll_per_byte"] for i in (0, 2, 1)]
    assert gaps[1][1] == pytest.approx(losses[1] - (losses[0] + losses[2]) / 2, abs=1e-6)


def test_a_killed_run_goes_on(models, tmp_path, monkeypatch):
    whole = run(models, tmp_path / "whole.json")
    monkeypatch.setattr(CONNECT, "Moved", None)
    with pytest.raises(TypeError):
        run(models, tmp_path / "out.json")
    monkeypatch.undo()
    found = run(models, tmp_path / "out.json")
    assert found["measures"] == whole["measures"] and not list(tmp_path.glob("*.partial*"))


def test_a_point_is_written_as_a_folder(models, tmp_path):
    run(models, tmp_path / "out.json", "--other", str(models / "two"), "--write", "0.25", str(tmp_path / "quarter"))
    run(models, tmp_path / "out.json", "--other", str(models / "two"), "--write", "0", str(tmp_path / "none"))
    a, c = weights(models / "two/checkpoint-20"), weights(models / "one/checkpoint-20")
    quarter, none = weights(tmp_path / "quarter"), weights(tmp_path / "none")
    for name in a:
        assert torch.allclose(quarter[name], 0.75 * a[name] + 0.25 * c[name], atol=1e-6) and none[name].equal(a[name])


def test_there_is_no_negative_number_of_draws(models, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(models, tmp_path / "out.json", "--draws", "-1")
    assert "--draws: -1 is not a positive number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--other", "{root}/wider"], r"different vocabularies \(300 and 272 tokens\)"),
        (["--at", "0", "1.5"], "--at needs a coefficient between 0 and 1"),
        (["--write", "5", "x"], "--write 5: not a number from -1 to 2"),
        (["--other", "{root}/nowhere"], "nowhere"),
        (["--other", "{root}/one"], "one/checkpoint-20 is the target itself, not another run"),
        (["--other", "{root}/base"], "base is the base itself, not another run"),
        (["--run", "{root}/base"], "is the base itself: there is nothing to rewind"),
    ],
)
def test_bad_input_is_one_line(models, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        run(models, tmp_path / "out.json", *(one.replace("{root}", str(models)) for one in more))
