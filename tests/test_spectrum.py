"""spectral/spectrum.py: against slow float64 loops, every layout by head, going on, what is kept, claim D1."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from helpers import load_script, save_tiny, tiny_model
from launch import launch
from test_compare import reference

from cpt_utils.base import cli, results
from cpt_utils.base.errors import InputError
from cpt_utils.measures import verdicts

SCRIPT = load_script("spectral/spectrum.py")
spectra = cli.sibling("spectral/spectra.py")
OUT = "results/spectral/spectrum"
HEADS = {"q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": 4}  # of a tiny llama


def moved(model_type: str, size: float, seed: int, dtype="float32", factor: float = 1.0, only: str = "", **config):
    """The tiny model of seed 0 with every weight (of names with `only`) multiplied and changed by about `size`."""
    model, draw = tiny_model(model_type, **config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if only in name:
                weight.mul_(factor).add_(size * torch.randn(weight.shape, generator=draw))
    return model.to(getattr(torch, dtype))


def save_run(model_type: str, dtype="float32", layers: int = 3, steps=(10, 20)) -> None:
    save_tiny(model_type, "base", dtype=dtype, layers=layers)
    for number, step in enumerate(steps, 1):
        model = moved(model_type, 0.02 * number, number, dtype, layers=layers)
        save_tiny(model_type, f"run/checkpoint-{step}", model=model)


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text("name: demo\nbase: base\nrun: run\nresults: results\n")
    return tmp_path


def found() -> tuple[dict, dict, dict]:
    payload, head = results.read_json(f"{OUT}.json", "spectrum", allow_limited=True)
    return payload, head, results.read_tensors(f"{OUT}.pt")


def slow_share(base: np.ndarray, target: np.ndarray) -> float:
    ours, theirs = (np.linalg.svd(each, compute_uv=False) for each in (base, target))
    return float(((theirs - ours) ** 2).sum() / ((target - base) ** 2).sum())


def cut(matrix: torch.Tensor, projection: str, head: int) -> np.ndarray:
    """A head's slice of a tiny model's projection [out, in]: rows of q, k, v, columns of o; 8 features a head."""
    part = slice(8 * head, 8 * head + 8)
    return (matrix[:, part] if projection == "o_proj" else matrix[part]).numpy()


def test_a_run_against_slow_numbers(study, capsys):
    save_run("llama", "bfloat16")
    SCRIPT.main(["--draws", "2", "--overlaps", "1"])
    payload, head, values = found()
    assert (head["n_layers"], head["n_used"], head["limit"]) == (3, 2, None) and head["request"]["overlaps"] == [1]
    assert [row["name"] for row in payload["matrices"][:2]] == ["layer_0.q_proj", "layer_0.k_proj"]
    assert len(payload["matrices"]) == 3 * 7
    models = {"base": tiny_model("llama", dtype="bfloat16")}
    models |= {str(10 * k): moved("llama", 0.02 * k, k, "bfloat16") for k in (1, 2)}
    for row in payload["matrices"]:
        base, *targets = (reference(each, "llama", row["layer"])[row["projection"]] for each in models.values())
        assert row["shape"] == list(base.shape)
        slow = np.linalg.svd(base.numpy(), compute_uv=False)
        assert values[f"{row['name']}.base"].tolist() == pytest.approx(slow.tolist(), rel=1e-5, abs=1e-6)
        assert row["base"]["spectral"] == pytest.approx(slow[0], rel=1e-9)
        for (step, pair), target in zip(row["steps"].items(), targets, strict=True):
            difference = target - base
            total = difference.square().sum().item()
            assert pair["update_sq"] == pytest.approx(total, rel=1e-9)
            assert pair["value_share"] == pytest.approx(slow_share(base.numpy(), target.numpy()), abs=1e-6)
            assert pair["value_sq"] + pair["turned_sq"] == pytest.approx(total, rel=1e-12)
            assert pair["identity_gap"] < 1e-6
            theirs = np.linalg.svd(target.numpy(), compute_uv=False)
            assert pair["shift"] == pytest.approx(np.linalg.norm(theirs - slow) / np.linalg.norm(slow), rel=1e-6)
            assert pair["relative"] == pytest.approx((total / base.square().sum().item()) ** 0.5, rel=1e-9)
            cosine = torch.nn.functional.cosine_similarity(base.flatten(), target.flatten(), dim=0).item()
            assert pair["cosine"] == pytest.approx(cosine, rel=1e-9)
            scale = ((difference * base).sum() / base.square().sum()).item()
            assert pair["scale"] == pytest.approx(scale, rel=1e-9)
            rest = (target - (1 + scale) * base).square().sum().item()
            assert pair["scale_sq"] == pytest.approx(total - rest, rel=1e-6)
            unscaled = slow_share(((1 + scale) * base).numpy(), target.numpy()) * rest
            assert pair["unscaled_value_sq"] == pytest.approx(unscaled, rel=1e-5)
            own = np.linalg.svd(difference.numpy(), compute_uv=False)
            assert pair["update"]["nuclear"] == pytest.approx(own.sum(), rel=1e-5)  # dW is taken in float32
            assert pair["target"]["nuclear"] == pytest.approx(theirs.sum(), rel=1e-9)
            assert values[f"{row['name']}.{step}.update"].tolist() == pytest.approx(own.tolist(), rel=1e-4, abs=1e-6)
            check_heads(row["projection"], base, target, pair)
            last = step == "20"
            assert {kind: len(null["value_share"]) for kind, null in pair["nulls"].items()} == (
                {"gaussian": 2, "permuted": 2, "signs": 2} if last else {"gaussian": 1}
            )
            assert ("overlaps" in pair) == (last and row["layer"] == 1)
    check_pooled(payload)
    names = {row["projection"]: set(row["steps"]["20"]["overlaps"]) for row in payload["matrices"][7:14]}
    assert names["q_proj"] == names["o_proj"] == {"vectors", "head", "residual"}
    assert names["up_proj"] == names["down_proj"] == {"vectors", "neuron", "residual"}
    o = payload["matrices"][10]["steps"]["20"]["overlaps"]
    base, target = (reference(each, "llama", 1)["o_proj"].float() for each in (models["base"], models["20"]))
    assert o["head"] == spectra.overlaps(base, target)["in"]
    assert "step 20: ||dW|| / ||B|| = " in capsys.readouterr().out
    assert (study / f"{OUT}.png").is_file() and (study / f"{OUT}.pdf").is_file()


def check_heads(projection: str, base: torch.Tensor, target: torch.Tensor, pair: dict) -> None:
    """The numbers by head of a tiny llama against slow ones."""
    assert ("heads" in pair) == (projection in HEADS)
    if projection not in HEADS:
        return
    total, heads = (target - base).square().sum().item(), pair["heads"]
    assert len(heads["value_share"]) == HEADS[projection]
    for head in range(HEADS[projection]):
        ours, theirs = cut(base, projection, head), cut(target, projection, head)
        assert heads["value_share"][head] == pytest.approx(slow_share(ours, theirs), abs=1e-6)
        changed = np.linalg.norm(theirs - ours)
        assert heads["share_of_update"][head] == pytest.approx(changed**2 / total, rel=1e-6)
        assert heads["relative"][head] == pytest.approx(changed / np.linalg.norm(ours), rel=1e-6)
        own = np.linalg.svd(theirs - ours, compute_uv=False)
        p = own / own.sum()
        assert heads["effective_rank"][head] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-4)
    assert all(len(null) == HEADS[projection] for null in heads["nulls"].values())


def check_pooled(payload: dict) -> None:
    """Sums over all matrices, their nulls with draws, and ratios."""
    for step, row in payload["pooled"].items():
        pairs = [one["steps"][step] for one in payload["matrices"]]
        total = sum(pair["update_sq"] for pair in pairs)
        assert row["value_share"] == pytest.approx(sum(pair["value_sq"] for pair in pairs) / total)
        scaled, unscaled = (sum(pair[key] for pair in pairs) for key in ("scale_sq", "unscaled_value_sq"))
        assert row["scale_share"] == pytest.approx(scaled / total)
        assert row["unscaled_value_share"] == pytest.approx(unscaled / (total - scaled))
        for kind, null in row["nulls"].items():
            for draw, share in enumerate(null["value_share"]):
                drawn = sum(pair["update_sq"] * pair["nulls"][kind]["value_share"][draw] for pair in pairs)
                assert share == pytest.approx(drawn / total)
            assert null["ratio"] == pytest.approx(row["value_share"] / np.mean(null["value_share"]))
            below = sum(pair["value_share"] < min(pair["nulls"][kind]["value_share"]) for pair in pairs)
            assert null["matrices_below"] == below
    null = payload["pooled"]["20"]["nulls"]["gaussian"]
    assert null["ci_low"] < null["ratio"] and (null["ci_high"] is None or null["ratio"] < null["ci_high"])
    # What was added is Gaussian, and its effective rank as well.
    assert null["effective_rank_ratio"] == pytest.approx(1, abs=0.1) and 0.5 < null["ratio"] < 2


def test_matrices_alike_that_are_cut_into_other_heads_are_refused(study):
    save_tiny("llama", "base")
    save_tiny("llama", "run/checkpoint-5", num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    with pytest.raises(InputError, match=r"layer 0: 4 heads in q_proj of base, 2 in run/checkpoint-5; heads can"):
        SCRIPT.main(["--draws", "1"])


@pytest.mark.parametrize("model_type", ["phi3", "gpt_neox", "gpt2"])
def test_heads_of_fused_interleaved_and_transposed_layouts(study, model_type):
    save_run(model_type, layers=1, steps=(20,))
    SCRIPT.main(["--draws", "1", "--overlaps", "none"])
    base = reference(tiny_model(model_type, layers=1), model_type, 0)
    target = reference(moved(model_type, 0.02, 1, layers=1), model_type, 0)
    for row in found()[0]["matrices"]:
        pair, projection = row["steps"]["20"], row["projection"]
        assert pair["value_share"] == pytest.approx(
            slow_share(base[projection].numpy(), target[projection].numpy()), abs=1e-6
        )
        for head, share in enumerate(pair.get("heads", {"value_share": []})["value_share"]):
            both = (cut(each[projection], projection, head) for each in (base, target))
            assert share == pytest.approx(slow_share(*both), abs=1e-6), (projection, head)
        assert ("heads" in pair) == (projection in HEADS)


def test_a_head_of_differential_attention_has_rows_in_both_halves(study):
    save_run("diffllama", layers=1, steps=(20,))
    SCRIPT.main(["--draws", "1", "--overlaps", "none"])
    base = reference(tiny_model("diffllama", layers=1), "diffllama", 0)
    target = reference(moved("diffllama", 0.02, 1, layers=1), "diffllama", 0)
    for row in found()[0]["matrices"][:4]:
        projection, shares = row["projection"], row["steps"]["20"]["heads"]["value_share"]
        assert len(shares) == HEADS[projection] / 2
        ours, theirs = (each[projection].numpy() for each in (base, target))
        for head, share in enumerate(shares):
            half = len(ours) // 2
            part = [*range(8 * head, 8 * head + 8), *range(half + 8 * head, half + 8 * head + 8)]
            cut = np.s_[:, 16 * head : 16 * head + 16] if projection == "o_proj" else np.s_[part]
            assert share == pytest.approx(slow_share(ours[cut], theirs[cut]), abs=1e-6), (projection, head)


def test_experts_latent_attention_and_an_unchanged_part(study):
    save_tiny("deepseek_v3", "base")
    save_tiny("deepseek_v3", "run/checkpoint-5", model=moved("deepseek_v3", 0.01, 1, only="mlp"))
    SCRIPT.main(["--draws", "1"])
    payload, _, _ = found()
    rows = {row["name"]: row["steps"]["5"] for row in payload["matrices"]}
    assert {"layer_1.up_proj.expert_3", "layer_1.up_proj", "layer_1.q_proj.piece_1", "layer_1.router"} <= set(rows)
    assert rows["layer_1.up_proj.expert_3"]["value_share"] > 0
    assert "heads" in rows["layer_1.q_proj.piece_1"] and "heads" not in rows["layer_1.q_proj.piece_0"]
    still = rows["layer_1.o_proj"]
    assert (still["value_share"], still["relative"], "nulls" in still) == (None, 0, False)
    assert not still["by_svd"]  # there is nothing to be exact about
    for piece, sides in enumerate(({"latent", "residual"}, {"head", "latent"})):
        assert set(rows[f"layer_1.q_proj.piece_{piece}"]["overlaps"]) == {"vectors"} | sides
    pooled = payload["pooled"]["5"]
    assert pooled["unchanged"] == sum(row["update_sq"] == 0 for row in rows.values()) > 0
    assert pooled["nulls"]["signs"]["ci_low"] is None  # of one draw


def test_a_planted_scaling_and_another_model(study, capsys):
    save_tiny("llama", "base")
    save_tiny("llama", "run/checkpoint-5", model=moved("llama", 0.0, 1, factor=1.01))
    SCRIPT.main(["--draws", "1", "--limit", "1"])
    out = capsys.readouterr()
    payload, head = results.read_json(f"{OUT}.limit-1.json", "spectrum", allow_limited=True)
    assert head["limit"] == 1 and len(payload["matrices"]) == 7
    pooled = payload["pooled"]["5"]
    assert pooled["value_share"] == pytest.approx(1, abs=1e-4) and "warning" not in out.err
    assert pooled["scale_share"] == pytest.approx(1) and pooled["unscaled_value_share"] is None
    SCRIPT.main(["--run", str(save_tiny("llama", "other/checkpoint-5", 1)), "--draws", "1", "--output", "other.json"])
    assert "was hardly trained from the first" in capsys.readouterr().err
    with warnings.catch_warnings(action="error"):  # a figure without an artist
        SCRIPT.main(["--run", "base", "--draws", "1", "--limit", "1", "--output", "same.json"])
    assert "nothing changed" in capsys.readouterr().out


def test_a_killed_run_goes_on_and_the_base_is_measured_once(study, monkeypatch):
    save_run("llama", layers=2)
    words, calls, gram = ["--draws", "1", "--overlaps", "none"], [], spectra.gram
    monkeypatch.setattr(spectra, "gram", lambda matrix: calls.append(tuple(matrix.shape)) or gram(matrix))
    SCRIPT.main(words)
    whole, whole_calls = found(), len(calls)
    # Of each matrix: B; C, dW and a Gaussian (B + drawn, drawn) at step 10; C, dW and three of them at step 20.
    assert sum(len(shape) == 2 for shape in calls) == 2 * 7 * (1 + 4 + 8)
    SCRIPT.main([*words, "--overwrite", "--drop-revisions"])
    again = found()
    assert len(calls) == 2 * whole_calls and again[0] == whole[0]

    place, seen = SCRIPT.Measured.place, []

    def killed(self, sides, where):
        if len(seen) == 9:
            raise KeyboardInterrupt
        seen.append(where.name)
        return place(self, sides, where)

    monkeypatch.setattr(SCRIPT.Measured, "place", killed)
    with pytest.raises(KeyboardInterrupt):
        SCRIPT.main([*words, "--overwrite"])
    assert (study / f"{OUT}.partial.jsonl").is_file()
    rest: list = []
    monkeypatch.setattr(SCRIPT.Measured, "place", lambda *args: rest.append(args[2].name) or place(*args))
    SCRIPT.main([*words, "--overwrite"])
    assert len(rest) == 14 - 9 and not {*rest} & {*seen} and not (study / f"{OUT}.partial.jsonl").exists()
    gone_on = found()
    assert gone_on[0] == whole[0] and gone_on[2].keys() == whole[2].keys()
    assert all(gone_on[2][name].equal(whole[2][name]) for name in whole[2])

    rest.clear()
    SCRIPT.main(words)
    assert not rest  # kept
    with pytest.raises(InputError, match=r"of another request .*draws"):
        SCRIPT.main(["--draws", "2", "--overlaps", "none"])
    with pytest.raises(InputError, match=r"of another request .*overlaps"):
        SCRIPT.main(["--draws", "1"])


@pytest.mark.slow
def test_two_processes_give_the_same(study):
    save_run("llama", layers=1)
    SCRIPT.main(["--draws", "1", "--device", "cpu"])
    alone = found()[0]
    launch("spectral/spectrum.py", "--draws", "1", "--device", "cpu", "--overwrite")
    assert found()[0] == alone


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--overlaps", "3"], "--overlaps 3: give layers from 0 to 2, or all, or none"),
        (["--overlaps", "x"], "--overlaps x: give layers"),
    ],
)
def test_bad_layers_are_refused(study, words, message):
    save_run("llama", steps=(10,))
    with pytest.raises(InputError, match=message):
        SCRIPT.main(words)
    assert SCRIPT.chosen(None, [0, 1, 2, 3]) == [0, 2, 3] and SCRIPT.chosen(["all"], [0, 1]) == [0, 1]
    assert SCRIPT.chosen(["2", "0", "2"], [0, 1, 2]) == [0, 2] and SCRIPT.chosen(None, [0]) == [0]


# ---------------------------------------------------------------- claim D1


def test_the_claim_reads_the_ratio_and_can_fail(study):
    claim = cli.sibling("report/claims/d1.py")
    save_run("llama", steps=(10, 20), layers=1)
    SCRIPT.main(["--draws", "2"])
    evidence = cli.sibling("report/evidence.py")
    read = evidence.Results(SCRIPT.Study.find("study.yaml"))
    with read.reading("D1"):
        numbers, beside = claim.measure(read)
    nulls = found()[0]["pooled"]["20"]["nulls"]
    assert [row["value"] for row in numbers] == [pytest.approx(math.log(nulls[kind]["ratio"])) for kind in nulls]
    assert any("value share" in row["name"] for row in beside)

    def decided(shift: float) -> str:
        """The verdict over five seeds whose ratios are about exp(shift)."""
        seeds = {
            seed: [row | {"value": shift + 0.01 * seed, "ci_low": None, "ci_high": None} for row in numbers]
            for seed in range(5)
        }
        return verdicts.decide({"D1": verdicts.over_seeds(seeds)})["D1"].verdict

    assert decided(math.log(0.5)) == verdicts.YES
    assert decided(0.0) == verdicts.NO  # as any update would
    assert decided(math.log(0.8) - 0.02) == verdicts.OPEN
