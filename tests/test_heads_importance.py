"""spectral/heads.py: sums of heads against swaps of them, importance and unevenness of planted updates, agreement."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from helpers import load_script, save_tiny

from cpt_utils.architectures import archs
from cpt_utils.base import cli, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import refs
from cpt_utils.interventions import in_memory, surgery
from cpt_utils.measures import verdicts
from cpt_utils.models import loading

HEADS = load_script("spectral/heads.py")
CPU = torch.device("cpu")
OUT = "heads.json"


def model_of(folder):
    return loading.load_model(refs.model(folder), torch.float64, CPU)


def one_step(base, target):
    found, cosines = HEADS.measured(refs.model(base), refs.run(target))
    ((step, heads),) = found.items()
    return heads, cosines[step]


# Grouped queries, matrices [in, out], fused by rows, norms over all heads, interleaved, a latent attention, halves, and
# layers without attention.
@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "olmo2", "gpt_neox", "deepseek_v3", "diffllama", "bamba"])
@pytest.mark.parametrize("by_query", [False, True])
def test_sums_are_those_of_what_a_swap_of_the_head_moves(kind, by_query, tmp_path):
    """Over all matrices ||C - B||^2 falls by a head's sum where the head is B's, in float64."""
    base = save_tiny(kind, tmp_path / "base", seed=0)
    target = save_tiny(kind, tmp_path / "target", seed=1, shards=2)
    heads, _ = one_step(base, target)
    places, sums = HEADS.places(heads, by_query), HEADS.sums(heads, by_query)
    ours, model = model_of(base), model_of(target)

    def flat(model) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters() if parameter.ndim == 2])

    of_base, before = flat(ours), flat(model)
    with surgery.Pair(base, target) as pair:
        assert {layer for layer, _ in places} == {*range(3)} - {*pair.arch.lacking(pair.config, archs.ATTENTION)}
        for (layer, head), (update, size, entries) in zip(places, sums.T, strict=True):
            recipe = surgery.heads_from_base(pair, {layer: [head]}, by_query, beside=False)
            with in_memory.apply(model, recipe, pair):
                moved = (flat(model) != before).nonzero()[:, 0]
            assert len(moved) == entries
            assert update == pytest.approx((before - of_base)[moved].square().sum().item(), rel=1e-6)
            assert size == pytest.approx(of_base[moved].square().sum().item(), rel=1e-6)


def test_units_hold_their_query_heads_and_keys_once(tmp_path):
    heads, cosines = one_step(save_tiny("llama", tmp_path / "b"), save_tiny("llama", tmp_path / "t", seed=1))
    units, queries = HEADS.sums(heads), HEADS.sums(heads, by_query=True)
    layer = heads[0]
    keys = sum(layer.of[name].sums for name in ("k_proj", "v_proj"))
    assert np.allclose(queries[:, :4].reshape(3, 2, 2).sum(2) + keys, units[:, :2])
    assert len(cosines) == 12 and max(map(abs, cosines)) < 0.6
    found = HEADS.importance(heads)
    assert found["relative"] == pytest.approx(np.sqrt(units[0] / units[1]))
    assert found["rms"] == pytest.approx(np.sqrt(units[0] / units[2]))
    assert found["per_layer"].reshape(3, 2).mean(1) == pytest.approx(1)


# ---------------------------------------------------------------- planted updates


def planted(update: np.ndarray, base: np.ndarray | None = None):
    """Layers of one head a unit, from sums of squares [layers, heads, features] that are those of q alone."""
    base = np.ones_like(update) if base is None else base
    return {
        i: HEADS.Layer(len(one), len(one), {"q_proj": HEADS.Squares(one, size, 8 * one.shape[1])})
        for i, (one, size) in enumerate(zip(update, base, strict=True))
    }


def concentration(update, base=None):
    found = planted(update, base)
    return HEADS.concentration(found, HEADS.permuted(found, 0, 500))


def test_what_uneven_means():
    assert HEADS.gini(np.ones(8)) == pytest.approx(0) and HEADS.gini(np.eye(8)[0]) == pytest.approx(1 - 1 / 8)
    assert HEADS.gini(np.array([1.0, 3.0])) == pytest.approx(0.25)
    assert HEADS.top_share(np.array([1.0, 5.0, 2.0, 2.0]), 2) == pytest.approx(0.7)
    rng = np.random.default_rng(0)
    # Every feature for itself: whose head it is makes no difference, so no more lies in the top than by chance.
    places = [concentration(rng.chisquare(3, (4, 8, 16)))["permuted"]["p_value"] for _ in range(40)]
    assert np.mean(np.array(places) < 0.1) < 0.3 and 0.3 < np.mean(places) < 0.7
    # One head of each layer changes: more. Heads alike, their features not: less, which the claim can fail by.
    uneven = rng.chisquare(3, (4, 8, 16))
    uneven[:, 0] *= 5
    row = concentration(uneven)
    assert row["top_share"] > row["permuted"]["high"] and row["permuted"]["p_value"] == pytest.approx(1 / 501)
    alike = rng.chisquare(1, (4, 8, 16))
    alike /= alike.sum(2, keepdims=True)
    row = concentration(alike)
    assert row["top_share"] < row["permuted"]["low"] and row["gini"] == pytest.approx(0, abs=1e-12)
    assert row["k"] == 4 and row["n_units"] == 32 and row["top_share"] == pytest.approx(row["even"])


def test_permuted_updates_keep_what_they_say_and_proportion_is_exact():
    rng = np.random.default_rng(1)
    update, base = rng.chisquare(2, (3, 4, 6)), rng.chisquare(2, (3, 4, 6))
    drawn = HEADS.permuted(planted(update), 0, 50).reshape(50, 3, 4)
    assert np.allclose(drawn.sum(2), update.sum((1, 2)))  # every layer keeps its total
    frequency = np.broadcast_to(np.arange(1.0, 7), (3, 4, 6))  # what depends on the place in a head alone stays
    assert np.allclose(HEADS.permuted(planted(frequency), 0, 5), 21)
    row = concentration(base * np.array([1.0, 2, 3])[:, None, None], base)
    assert row["in_proportion"] == pytest.approx(row["top_share"])
    assert concentration(0 * update) is None


def test_contrast_ranks_and_agreement_of_planted_runs():
    rng = np.random.default_rng(2)
    update = rng.chisquare(4, (5, 4, 6))
    same, other = planted(update), planted(update[::-1, ::-1].copy())
    found = HEADS.agreement({"target": same, "again": planted(4 * update), "other": other}, 0.1)
    pairs = {tuple(row["runs"]): row for row in found["pairs"]}
    row = pairs["target", "again"]
    assert row["spearman_relative"]["correlation"] == pytest.approx(1) and row["top"]["jaccard"] == 1
    assert row["top"]["share"] == 0.1 and row["top"]["chance"] == pytest.approx(0.1 / 1.9)
    assert pairs["target", "other"]["spearman_relative"]["correlation"] < 0.9
    kinds = [HEADS.importance(one)["relative"] for one in (same, other)]
    ranks = [np.argsort(np.argsort(each)) / 20 + 1 / 20 for each in kinds]
    assert found["agnostic"] == pytest.approx(np.minimum(*ranks))
    assert found["specificity"]["other"] == pytest.approx(ranks[1] - ranks[0])
    assert HEADS.contrast(kinds[0], 3 * kinds[0]) == pytest.approx(0)
    assert HEADS.contrast(np.array([1.0, 3]), np.array([2.0, 2])) == pytest.approx([-0.5, 0.5])
    with pytest.raises(InputError, match="no head changed"):
        HEADS.contrast(kinds[0], np.zeros(20))


@pytest.mark.filterwarnings("error")
def test_a_head_whose_base_is_zeros_is_infinitely_important_and_leaves_the_others_as_they_are():
    update, base = np.ones((2, 3, 4)), np.ones((2, 3, 4))
    update[0, 1], base[0, 2] = 9, 0
    found = planted(update, base)
    kinds = HEADS.importance(found)
    assert kinds["relative"].tolist() == [1, 3, np.inf, 1, 1, 1]
    assert kinds["per_layer"].tolist() == [0.5, 1.5, np.inf, 1, 1, 1]
    assert HEADS.contrast(kinds["relative"], np.full(6, 7.0)) == pytest.approx(
        [1 / 1.4 - 1, 3 / 1.4 - 1, np.inf, *3 * [1 / 1.4 - 1]]
    )
    assert HEADS.contrast(kinds["relative"], kinds["relative"]) == pytest.approx(0)
    row = HEADS.concentration(found, HEADS.permuted(found, 0, 5))
    assert np.isnan(row["gini_relative"]) and row["gini"] > 0


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("heads")
    base = save_tiny("llama", root / "base", seed=0)
    for step, scale in ((10, 0.01), (20, 0.03)):
        model = loading.load_model(refs.model(base), torch.float32, CPU)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=scale)
        save_tiny("llama", root / "run" / f"checkpoint-{step}", model=model)
    return root


def test_the_command_writes_all_steps_and_goes_on(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["--base", f"{run}/base", "--run", f"{run}/run", "--output", OUT]
    command += ["--other", f"mid={run}/run/checkpoint-10"]
    HEADS.main(command)
    payload, head = results.read_json(OUT, "heads")
    assert list(payload["steps"]) == ["10", "20"] and payload["steps"]["20"]["spearman_with_last"] == pytest.approx(1)
    assert payload["steps"]["10"]["median_cosine"] > 0.99 and head["models"]["others"]["mid"]["step"] == 10
    rows = payload["heads"]
    assert [(row["layer"], row["unit"]) for row in rows] == [(i, j) for i in range(3) for j in range(2)]
    assert set(rows[0]["importance"]) == {"relative", "rms", "per_layer", "contrast"}
    assert [one["head"] for row in rows[:2] for one in row["query_heads"]] == [0, 1, 2, 3]
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    tensors = results.read_tensors("heads.pt")
    update, base, _ = tensors["20.units"]
    assert (update / base).sqrt().tolist() == pytest.approx([row["importance"]["relative"] for row in rows])
    assert tensors["units"].tolist() == [[row["layer"], row["unit"]] for row in rows]
    assert len(payload["curves"]["update"]) == 6 and (tmp_path / "heads.png").is_file()
    said = capsys.readouterr()
    assert "the top 1 of 6 units hold" in said.out and "target and mid: Spearman" in said.out and not said.err
    before = (tmp_path / OUT).stat().st_mtime_ns
    HEADS.main(command)
    assert (tmp_path / OUT).stat().st_mtime_ns == before and "is finished" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"is of another request .*others"):
        HEADS.main(command[:6])
    HEADS.main([*command[:4], "--steps", "20", "--output", "one.json"])
    assert json.loads((tmp_path / "one.json").read_text())["heads"][0]["importance"].keys() == {*HEADS.KINDS}


def test_what_is_refused_or_warned_of(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ["--base", f"{run}/base", "--run", f"{run}/run", "--output", OUT]
    for more, message in (
        (["--top", "2"], "--top 2: a share"),
        (["--other", f"a={run}/run", f"a={run}/run"], "a names more than one run"),
        (["--other", f"target={run}/run"], "target names more than one run"),
        (["--other", f"20={run}/run"], "20 names more than one run"),
    ):
        with pytest.raises(InputError, match=message):
            HEADS.main([*asked, *more])
    bare = save_tiny("mamba", tmp_path / "mamba") if "mamba" in archs.ARCHS else None
    if bare:
        with pytest.raises(InputError, match="has no attention"):
            HEADS.main(["--base", str(bare), "--run", str(bare), "--output", OUT])
    narrow = save_tiny("llama", tmp_path / "narrow", num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    with pytest.raises(InputError, match=r"layer 0: 4 query heads in 2 units in .*, 2 in 1 in .*narrow"):
        HEADS.main(["--base", f"{run}/base", "--run", str(narrow), "--output", OUT])
    assert not (tmp_path / OUT).exists()
    HEADS.main(
        ["--base", f"{run}/base", "--run", str(save_tiny("llama", tmp_path / "stranger", seed=5)), "--output", OUT]
    )
    assert "hardly trained from" in capsys.readouterr().err
    HEADS.main(["--base", f"{run}/base", "--run", f"{run}/base", "--output", "same.json"])
    assert "no head differs from the base" in capsys.readouterr().out


# ---------------------------------------------------------------- the claim


def test_the_claim_reads_the_whole_run_at_its_last_step(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = f"base: {run}/base\nrun: {run}/run\nresults: results\nruns: {{mid: {run}/run/checkpoint-10}}\n"
    (tmp_path / "study.yaml").write_text(text)
    claim, evidence = cli.sibling("report/claims/d2.py"), cli.sibling("report/evidence.py")

    def measure():
        return claim.measure(evidence.Results(Study.find()))

    with pytest.raises(evidence.Missing, match=r"spectral/heads.json is not there"):
        measure()
    HEADS.main([])
    path = tmp_path / "results/spectral/heads.json"
    payload = json.loads(path.read_text())
    row = payload["steps"]["20"]["concentration"]
    assert [pair["runs"] for pair in payload["runs"]["pairs"]] == [["target", "mid"]]
    (one,), beside = measure()
    assert one["value"] == pytest.approx(math.log(row["top_share"] / row["permuted"]["mean"]))
    assert one["says"] == verdicts.above(math.log(1.2))
    ends = [math.log(row["top_share"] / row["permuted"][end]) for end in ("high", "low")]
    assert [one["ci_low"], one["ci_high"]] == pytest.approx(ends) and ends[0] < one["value"] < ends[1]
    values = {each["name"]: each["value"] for each in beside}
    assert min(value for name, value in values.items() if "never below 0" in name) >= 0
    HEADS.main(["--steps", "20"])
    (part,) = path.parent.glob("heads.*checkpoint-20*.json")
    part.replace(path)
    with pytest.raises(InputError, match=r"is about only a part of the run|is about steps \[20\]"):
        measure()
    payload["steps"]["20"]["concentration"] = None
    path.write_text(json.dumps(payload))
    with pytest.raises(evidence.Missing, match="no head differs"):
        measure()
