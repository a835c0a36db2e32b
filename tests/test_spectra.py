"""Matrices of both models whatever their layout, random updates, and the functions of spectra against slow ones."""

from __future__ import annotations

import pytest
import torch
from helpers import load_script, save_tiny, tiny_model
from test_compare import reference

from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.interventions import surgery
from cpt_utils.measures import compare

updates = load_script("spectral/updates.py")


def two(model_type: str, tmp_path, dtype="float32") -> surgery.Pair:
    folders = [save_tiny(model_type, tmp_path / f"{model_type}{seed}", seed, dtype) for seed in (0, 1)]
    return surgery.Pair(*map(str, folders))


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox", "gpt2"])
def test_matrices_are_the_modules_own_whatever_the_layout(tmp_path, model_type):
    with two(model_type, tmp_path, "bfloat16") as pair:
        found = list(updates.matrices(pair, layers=[1]))
    assert all(one.layer == 1 and one.expert is None for one in found)
    for seed, held in ((0, "base"), (1, "target")):
        wanted = reference(tiny_model(model_type, seed, "bfloat16"), model_type, 1)
        assert [one.projection for one in found] == list(wanted)
        for one in found:
            matrix = getattr(one, held)
            assert matrix.dtype == torch.float32 and matrix.double().equal(wanted[one.projection])


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_matrices_of_experts_and_of_latent_attention_add_up_to_the_projections_change(tmp_path, model_type):
    with two(model_type, tmp_path) as pair:
        changes = compare.changes(pair.base_ref, [pair.target_ref])
        with updates.plans.opened(pair.base_ref, [pair.target_ref]) as sides:
            names = [place.name for place in updates.places(sides)]
        sums: dict = {}
        for layer, projection, _, base, target in updates.matrices(pair):
            squares = (target.double() - base.double()).square().sum().item()
            sums[layer, projection] = sums.get((layer, projection), 0) + squares
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
    with pytest.raises(InputError, match="no null is called 'shuffled'; there are gaussian, permuted, signs"):
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
        list(updates.matrices(pair))
