"""Matrices of both models whatever their layout, random updates, and the functions of spectra against slow ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import load_script, save_tiny, tiny_model
from test_compare import reference

from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.interventions import surgery
from cpt_utils.measures import compare

updates, spectra = load_script("spectral/updates.py"), load_script("spectral/spectra.py")


def two(model_type: str, tmp_path, dtype="float32") -> surgery.Pair:
    folders = [save_tiny(model_type, tmp_path / f"{model_type}{seed}", seed, dtype) for seed in (0, 1)]
    return surgery.Pair(*map(str, folders))


def matrices(pair: surgery.Pair, layers=None):
    """Every place of the layers, with B's and C's matrix there."""
    with updates.plans.opened(pair.base_ref, [pair.target_ref]) as sides:
        for place in updates.places(sides, layers):
            yield place, *(updates.read(side, part) for side, part in zip(sides, place.parts, strict=True))


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox", "gpt2"])
def test_matrices_are_the_modules_own_whatever_the_layout(tmp_path, model_type):
    with two(model_type, tmp_path, "bfloat16") as pair:
        found = list(matrices(pair, layers=[1]))
    assert all(one.layer == 1 and one.expert is None for one, *_ in found)
    for seed in (0, 1):
        wanted = reference(tiny_model(model_type, seed, "bfloat16"), model_type, 1)
        assert [one.projection for one, *_ in found] == list(wanted)
        for one, *held in found:
            assert held[seed].dtype == torch.float32 and held[seed].double().equal(wanted[one.projection])


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_matrices_of_experts_and_of_latent_attention_add_up_to_the_projections_change(tmp_path, model_type):
    with two(model_type, tmp_path) as pair:
        changes = compare.changes(pair.base_ref, [pair.target_ref])
        names, sums = [], {}
        for place, base, target in matrices(pair):
            squares = (target.double() - base.double()).square().sum().item()
            names.append(place.name)
            sums[place.layer, place.projection] = sums.get((place.layer, place.projection), 0) + squares
    assert len(set(names)) == len(names) and any(".expert_3" in name for name in names)
    [layers] = changes.values()
    wanted = {(layer, name): change.sum_sq for layer, row in layers.items() for name, change in row.items()}
    assert sums == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", updates.NULLS)
def test_nulls_keep_the_norm_and_nothing_of_the_order(kind):
    update = torch.randn(30, 40, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 41) ** 2
    drawn = updates.nulls(update, kind, 1)
    assert (drawn.shape, drawn.dtype) == (update.shape, update.dtype)
    assert updates.norm(drawn).item() == pytest.approx(updates.norm(update).item(), rel=1e-6)
    assert drawn.equal(updates.nulls(update, kind, 1)) and not drawn.equal(updates.nulls(update, kind, 2))
    assert abs(torch.nn.functional.cosine_similarity(drawn.flatten(), update.flatten(), dim=0)) < 0.2
    assert drawn.abs().equal(update.abs()) == (kind == "signs")
    assert drawn.flatten().sort()[0].equal(update.flatten().sort()[0]) == (kind == "permuted")


def test_a_null_that_is_none_and_seeds():
    with pytest.raises(InputError, match="no null is called 'shuffled'; the nulls are gaussian, permuted, signs"):
        updates.nulls(torch.ones(2, 2), "shuffled", 0)
    seeds = {updates.draw_seed(seed, layer, "q_proj", draw) for seed in (1, 2) for layer in (0, 1) for draw in (0, 1)}
    assert len(seeds) == 8 and updates.draw_seed(1, 0, "q_proj", 0) in seeds


def test_models_that_are_not_one_run_are_warned_about(tmp_path, capsys):
    base, other = (refs.model(save_tiny("llama", tmp_path / str(seed), seed)) for seed in (0, 1))
    assert updates.warn_if_not_one_run(base, other) < 0.5
    assert "the median cosine of the weights" in capsys.readouterr().err
    assert updates.warn_if_not_one_run(base, base) == pytest.approx(1)
    assert updates.warn_if_not_one_run(base, other, [0.4, 0.9, 0.6]) == 0.6
    assert not capsys.readouterr().err


def test_damaged_weights_are_refused(tmp_path):
    model = tiny_model("llama", 1)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    save_tiny("llama", tmp_path / "bad", model=model)
    with (
        surgery.Pair(str(save_tiny("llama", tmp_path / "base")), str(tmp_path / "bad")) as pair,
        pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"),
    ):
        list(matrices(pair))


# ---------------------------------------------------------------- functions of one matrix


def randn(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(n: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(randn(n, n, seed=seed))[0]


def planted(values, m: int, n: int, seed: int = 0) -> torch.Tensor:
    """A matrix [m, n] with these singular values and random vectors."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return rotation(m, seed)[:, : len(values)] * values @ rotation(n, seed + 1)[: len(values)]


def awkward() -> dict[str, torch.Tensor]:
    """Float32 matrices of the shapes and spectra that occur, and those that are hard on a Gram matrix."""
    found = {"square": randn(120, 120), "wide": randn(40, 160), "tall": randn(160, 40), "head": randn(16, 160)}
    found["spike"] = randn(100, 100) + 400 * planted([1.0], 100, 100)
    found["dead rows"] = randn(100, 120) * (torch.arange(100) >= 10)[:, None]
    found["decay"] = planted([0.9**i for i in range(100)], 100, 130)
    found["row"], found["zeros"] = randn(1, 30), torch.zeros(20, 30)
    return {name: matrix.float() for name, matrix in found.items()}


@pytest.mark.parametrize("name", awkward())
def test_singular_values_and_their_stated_error(name):
    spectrum = spectra.Spectrum(awkward()[name])
    slow = torch.linalg.svdvals(spectrum.matrix.double())
    off = (spectrum.values - slow).abs()
    assert (off <= spectrum.error / 2 + 1e-16 * slow[0]).all()
    assert off.max() <= 3e-8 * slow[0]  # where values are 0; an SVD in float32 is off by ten times as much
    large = off[slow > 1e-3 * slow[0]]
    assert not len(large) or large.max() <= 1e-12 * slow[0]
    assert spectrum.exact.allclose(slow, rtol=1e-12, atol=1e-14)


def test_stacks_are_their_matrices():
    stack = torch.stack([randn(8, 30, seed=seed) for seed in range(3)]).float()
    other = stack + 0.01 * torch.stack([randn(8, 30, seed=seed) for seed in range(3, 6)]).float()
    share = spectra.value_share(spectra.Spectrum(stack), spectra.Spectrum(other))
    for number in range(3):
        one = spectra.value_share(spectra.Spectrum(stack[number]), spectra.Spectrum(other[number]))
        assert share.value[number].item() == pytest.approx(one.value.item(), rel=1e-9)
        assert share.total[number].item() == pytest.approx(one.total.item(), rel=1e-12)


def test_norms_and_ranks_against_slow_ones():
    matrix = awkward()["decay"]
    found, values = (
        spectra.described(spectra.Spectrum(matrix)),
        np.linalg.svd(matrix.double().numpy(), compute_uv=False),
    )
    p = values / values.sum()
    wanted = {"frobenius": np.linalg.norm(matrix.double().numpy()), "nuclear": values.sum(), "spectral": values[0]}
    wanted |= {"stable_rank": (values**2).sum() / values[0] ** 2, "effective_rank": math.exp(-(p * np.log(p)).sum())}
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)
    low = spectra.Spectrum(planted([2.0, 2.0, 2.0], 200, 300).float())
    assert float(spectra.effective_rank(low.values)) == pytest.approx(3, rel=1e-5)  # float32's noise is no rank
    flat = spectra.described(spectra.Spectrum(planted([1.0] * 50, 50, 80)))
    assert flat["stable_rank"] == pytest.approx(50) and flat["effective_rank"] == pytest.approx(50)
    zeros = spectra.described(spectra.Spectrum(awkward()["zeros"]))
    assert (zeros["frobenius"], zeros["power_law"], zeros["marchenko_pastur"]["above"]) == (0, None, 0)


def test_marchenko_pastur_of_a_wishart_matrix_and_of_spikes():
    noise, s = 0.3 * randn(300, 900), 0.3
    found = spectra.described(spectra.Spectrum(noise))["marchenko_pastur"]
    assert found["upper"] == pytest.approx(s**2 * (1 + 3**-0.5) ** 2, rel=0.01)
    assert found["lower"] == pytest.approx(s**2 * (1 - 3**-0.5) ** 2, rel=0.01)
    eigenvalues = torch.linalg.svdvals(noise) ** 2 / 900
    assert found["above"] <= 3 and 0.95 * found["upper"] < eigenvalues[0] < 1.05 * found["upper"]  # the edge
    assert 0.9 * found["lower"] < eigenvalues[-1] < 1.1 * found["lower"]
    # The bulk: the density sqrt((upper - x)(x - lower)) / (2 pi s^2 c x), c = M / N.
    x = torch.linspace(found["lower"], found["upper"], 4000, dtype=torch.float64)
    density = ((found["upper"] - x) * (x - found["lower"])).clamp_min(0).sqrt() / (2 * math.pi * s**2 / 3 * x)
    share = torch.cumulative_trapezoid(density, x)
    for level in (0.1, 0.5, 0.9):
        edge = x[int((share < level).sum())]
        assert float((eigenvalues < edge).double().mean()) == pytest.approx(level, abs=0.02)
    spiked = noise + planted([40.0, 45.0, 50.0, 60.0], 300, 900, seed=5)
    assert spectra.described(spectra.Spectrum(spiked.T))["marchenko_pastur"]["above"] - found["above"] in (3, 4)


def slow_power_law(eigenvalues) -> dict | None:
    """Clauset's estimate, one xmin after the other."""
    x, best = sorted(eigenvalues), None
    for xmin in sorted({*x}):
        tail = [value for value in x if value >= xmin]
        logs = sum(math.log(value / xmin) for value in tail)
        if len(tail) < max(10, len(x) / 10) or logs <= 0:
            continue
        alpha = 1 + len(tail) / logs
        cdf = [1 - (value / xmin) ** (1 - alpha) for value in tail]
        ks = max(max(abs(f - i / len(tail)), abs(f - (i + 1) / len(tail))) for i, f in enumerate(cdf))
        if best is None or ks < best["ks"]:
            best = {"alpha": alpha, "xmin": xmin, "ks": ks, "n_tail": len(tail)}
    return best


@pytest.mark.parametrize("kind", ["pareto", "wishart", "ties", "few"])
def test_the_power_law_against_a_slow_one(kind):
    uniform = torch.rand(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = {
        "pareto": (1 - uniform) ** (-1 / 1.5), "wishart": torch.linalg.svdvals(randn(150, 200)) ** 2 / 200,
        "ties": (uniform * 20).ceil(), "few": torch.arange(1.0, 13.0, dtype=torch.float64),
    }[kind]  # fmt: skip
    found, wanted = spectra.power_law(x), slow_power_law(x.tolist())
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-9)
    assert found["alpha_weighted"] == pytest.approx(wanted["alpha"] * math.log10(x.max()), rel=1e-9)
    if kind == "pareto":
        assert found["alpha"] == pytest.approx(2.5, abs=0.2) and found["n_tail"] > 200
    assert kind != "few" or found["n_tail"] >= 10


def test_no_power_law_of_too_few_or_equal_values():
    assert spectra.power_law(torch.arange(1.0, 10.0, dtype=torch.float64)) is None
    assert spectra.power_law(torch.ones(50, dtype=torch.float64)) is None
    half_dead = torch.cat([torch.arange(1.0, 6.0), torch.zeros(195)]).double()
    assert spectra.power_law(half_dead) is None  # 5 values that are not 0 of 200


# ---------------------------------------------------------------- base and target


def shares(base, target) -> spectra.Share:
    return spectra.value_share(spectra.Spectrum(base), spectra.Spectrum(target))


def slow_share(base, target) -> tuple[float, float, float]:
    """||C - B||^2 and its two terms, each from its own formula, in float64 by SVD."""
    base, target = base.double().numpy(), target.double().numpy()
    ours, theirs = (np.linalg.svd(each, compute_uv=False) for each in (base, target))
    return (
        float(((target - base) ** 2).sum()),
        float(((theirs - ours) ** 2).sum()),
        2 * float((theirs * ours).sum() - (target * base).sum()),
    )


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("name", ["square", "wide", "tall", "spike", "dead rows", "decay"])
def test_the_value_share_is_an_exact_identity(name, size):
    base = awkward()[name]
    update = randn(*base.shape, seed=3) * base.double().norm() / base.numel() ** 0.5
    target = (base.double() + size * update).float()
    found, (total, value, turned) = shares(base, target), slow_share(base, target)
    assert found.total.item() == pytest.approx(total, rel=1e-12)
    assert abs(found.value.item() - value) <= 1e-6 * total and abs(found.turned.item() - turned) <= 1e-6 * total
    assert found.value >= 0 and found.turned >= 0 and found.gap < 1e-6
    assert (found.value + found.turned).item() == pytest.approx(total, rel=1e-15)


def test_of_bfloat16_checkpoints_float32_would_not_do():
    """A short run saved in bfloat16: one entry in 2,000 moves, by one unit in the last place."""
    base = randn(256, 256).bfloat16().float() + 300 * planted([1.0], 256, 256, seed=7).bfloat16().float()
    base = base.bfloat16().float()
    moved = torch.rand(base.shape, generator=torch.Generator().manual_seed(2)) < 0.0005
    target = torch.where(moved, base * (1 + 2**-7), base).bfloat16().float()
    total, value, _ = slow_share(base, target)
    found = shares(base, target)
    assert 0 < value / total < 0.1 and (total / base.norm() ** 2) ** 0.5 < 1e-3
    assert found.share.item() == pytest.approx(value / total, abs=1e-6) and found.gap < 1e-6
    in_float32 = (torch.linalg.svdvals(target) - torch.linalg.svdvals(base)).double().square().sum().item()
    assert abs(in_float32 - value) > 1e-5 * total


def test_a_gram_matrix_that_is_not_good_enough_gives_way_to_an_svd():
    base = awkward()["dead rows"]
    target = base.clone()
    target[50, 60] += 2e-6
    found, (total, value, _) = shares(base, target), slow_share(base, target)
    assert found.by_svd and abs(found.value.item() - value) < 1e-3 * total
    alive = awkward()["square"]
    assert not shares(alive, alive + 0.001 * randn(*alive.shape, seed=1).float()).by_svd


def test_a_planted_rotation_has_value_share_0_and_a_planted_scaling_1():
    values = torch.linspace(3, 1, 40, dtype=torch.float64)
    u, v = rotation(40, 1), rotation(60, 2)[:40]
    angle = torch.linalg.matrix_exp(0.05 * (randn(40, 40, seed=3) - randn(40, 40, seed=3).T))
    base = u * values @ v
    turned = shares(base, u @ angle * values @ v)
    assert turned.share < 1e-12 and turned.turned.item() == pytest.approx(turned.total.item())
    scaled = shares(base, u * (values * torch.linspace(1.1, 1.02, 40)) @ v)
    assert scaled.share.item() == pytest.approx(1, abs=1e-9) and scaled.turned >= 0
    assert shares(base, base).total == 0 and shares(base, base).share.isnan()


def test_a_random_update_has_a_value_share_of_about_one_over_the_longer_side():
    base = randn(100, 300)
    for kind in updates.NULLS:
        drawn = updates.nulls(0.001 * randn(100, 300, seed=1), kind, 5)
        assert shares(base, base + drawn).share.item() == pytest.approx(1 / 300, rel=0.5)


def test_overlaps_against_slow_ones_and_their_noise_floors():
    base, target = randn(30, 50).float(), (randn(30, 50) + 0.3 * randn(30, 50, seed=9)).float()
    found = spectra.overlaps(base, target)
    ours, theirs = (np.linalg.svd(each.double().numpy(), full_matrices=False) for each in (base, target))
    for side, one, other in (("out", ours[0], theirs[0]), ("in", ours[2].T, theirs[2].T)):
        overlap = np.abs(one.T @ other)
        assert found[side]["diagonal"]["value"] == pytest.approx(np.diag(overlap).mean(), rel=1e-4)
        assert found[side]["row_max"]["value"] == pytest.approx(overlap.max(1).mean(), rel=1e-4)
        assert list(found[side]["subspace"]) == ["1", "4"] and found["vectors"] == 30
        wanted = (overlap[:4, :4] ** 2).sum() / 4
        assert found[side]["subspace"]["4"]["value"] == pytest.approx(wanted, rel=1e-4)
    same = spectra.overlaps(base, -base)  # signs are arbitrary
    assert all(same[side]["diagonal"]["value"] == pytest.approx(1, abs=1e-5) for side in ("out", "in"))


def test_unrelated_matrices_overlap_as_their_floors_say():
    found = [
        spectra.overlaps(randn(24, 80, seed=2 * i).float(), randn(24, 80, seed=2 * i + 1).float()) for i in range(40)
    ]
    for side in ("out", "in"):
        for key in ("diagonal", "row_max"):
            mean = sum(one[side][key]["value"] for one in found) / len(found)
            assert mean == pytest.approx(found[0][side][key]["floor"], rel=0.08), (side, key)
        mean = sum(one[side]["subspace"]["4"]["value"] for one in found) / len(found)
        assert mean == pytest.approx(found[0][side]["subspace"]["4"]["floor"], rel=0.25)
    assert (
        spectra.overlaps(randn(20, 30).float() * (torch.arange(20) > 4)[:, None], randn(20, 30).float())["vectors"]
        == 15
    )
