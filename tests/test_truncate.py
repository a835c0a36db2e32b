"""spectral/truncate.py: what is cut against slow float64 versions, exact ends, nulls, bases on disk, the command."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import load_script, put_tensors, save_tiny, tiny_model
from launch import launch

from cpt_utils.base import cli, processes, results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.interventions import in_memory, surgery
from cpt_utils.measures import verdicts
from cpt_utils.models import loading

evidence = cli.sibling("report/evidence.py")
TRUNCATE = load_script("spectral/truncate.py")
CURVES = TRUNCATE.curves


def pair_of(tmp_path, kind: str, **config) -> surgery.Pair:
    for seed, name in enumerate(("base", "target")):
        save_tiny(kind, tmp_path / name, seed=seed, **config)
    return surgery.Pair(tmp_path / "base", tmp_path / "target")


def bases_of(pair, tmp_path, pieces=None) -> TRUNCATE.Bases:
    pieces = TRUNCATE.pieces_of(pair) if pieces is None else pieces
    return TRUNCATE.Bases(pair, pieces, tmp_path / "out.bases", 1, processes.Process("cpu"))


def slow(base: torch.Tensor, target: torch.Tensor, k: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(target.double() - base.double(), full_matrices=False)
    return base.double() + (u[:, :k] * s[:k]) @ v[:k]


def weights(ref) -> dict[str, torch.Tensor]:
    return loading.load_model(ref, torch.float32, torch.device("cpu")).state_dict()


def cut(pair, recipe: surgery.Recipe) -> dict[str, torch.Tensor]:
    model = loading.load_model(pair.target_ref, torch.float32, torch.device("cpu"))
    with in_memory.apply(model, recipe, pair):
        return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("q", "n", "k"), [(0.7, 10, 3), (0.9, 10, 1), (0.95, 10, 1), (0.5, 3, 2), (0, 7, 7), (1, 7, 0)]
)
def test_so_many_are_kept(q, n, k):
    assert TRUNCATE.kept(q, n) == k


# Projection -> (tensor below its layer, its part): written down here, and not asked of the table.
PARTS = {
    "llama": {
        "q_proj": ("self_attn.q_proj", (slice(None),)),
        "down_proj": ("mlp.down_proj", (slice(None),)),
    },
    "phi3": {
        "k_proj": ("self_attn.qkv_proj", (slice(32, 48),)),
        "up_proj": ("mlp.gate_up_proj", (slice(48, 96),)),
    },
    "gpt2": {"v_proj": ("attn.c_attn", (slice(None), slice(64, 96))), "up_proj": ("mlp.c_fc", (slice(None),))},
    "mixtral": {"gate_proj.2": ("mlp.experts.gate_up_proj", (2, slice(0, 48)))},
}


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("q", [0.2, 0.8])
def test_every_matrix_is_cut_by_itself(tmp_path, kind, q):
    """A fused tensor piece by piece, Conv1D, an expert: against a whole SVD in float64."""
    with pair_of(tmp_path, kind) as pair:
        recipe = TRUNCATE.recipe(pair, TRUNCATE.pieces_of(pair), "svd", q, bases_of(pair, tmp_path), 1)
        found = cut(pair, recipe)
        base, target = weights(pair.base_ref), weights(pair.target_ref)
        layer = pair.arch.layer_path(1)
        for module, at in PARTS[kind].values():
            name = f"{layer}.{module}" if kind == "mixtral" else f"{layer}.{module}.weight"
            b, c = base[name][at], target[name][at]
            wanted = slow(b, c, TRUNCATE.kept(q, min(b.shape)))
            assert torch.allclose(found[name][at].double(), wanted, atol=2e-6), name
        for name in found:
            if "norm" in name or "ln_" in name or "embed" in name or "wte" in name or name.endswith("mlp.gate.weight"):
                assert found[name].equal(target[name]), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_with_nothing_cut_it_is_the_checkpoint_and_with_all_cut_the_base(tmp_path, kind):
    with pair_of(tmp_path, kind) as pair:
        pieces = TRUNCATE.pieces_of(pair)
        bases = bases_of(pair, tmp_path)
        base, target = weights(pair.base_ref), weights(pair.target_ref)
        none, whole = (cut(pair, TRUNCATE.recipe(pair, pieces, "svd", q, bases, 1)) for q in (0, 1))
        assert not bases.folder.exists()  # the ends need no directions
        model = loading.load_model(pair.target_ref, torch.float32, torch.device("cpu"))
        places = pair.arch.locations([piece.edit.tensor for piece in pieces], model, pair.target.shape)
        edited = {place.name for place in places.values()}
        biases = 0
        for name, value in whole.items():
            assert none[name].equal(target[name])
            assert value.equal((base if name in edited else target)[name]), name
            biases += name.endswith("bias")
        assert edited and (kind != "gpt2" or biases)
        # A q so small that no singular value goes: bit for bit too, though B + (C - B) is not C.
        least = cut(pair, TRUNCATE.recipe(pair, pieces, "svd", 0.01, bases, 1))
        assert all(least[name].equal(target[name]) for name in least)
        assert any(not (base[n] + (target[n] - base[n])).equal(target[n]) for n in edited)


def planted(tmp_path, rank: int, noise: float = 0.0) -> surgery.Pair:
    """A target whose update has `rank` equal singular values, and entries of `noise`."""
    save_tiny("llama", tmp_path / "base", seed=0)
    model = tiny_model("llama", seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 2 and "layers" in name:
                sides = [torch.linalg.qr(torch.randn(n, rank, generator=generator))[0] for n in value.shape]
                value += 0.3 * sides[0] @ sides[1].T + noise * torch.randn(value.shape, generator=generator)
    save_tiny("llama", tmp_path / "target", model=model)
    return surgery.Pair(tmp_path / "base", tmp_path / "target")


def test_a_planted_update_of_rank_3_is_kept_whole_by_3_and_not_by_2(tmp_path):
    with planted(tmp_path, 3) as pair:
        bases = bases_of(pair, tmp_path)
        for piece in bases.pieces:
            base, target = piece.read(pair)
            m, energy = min(base.shape), bases.of(piece.name)["energy"]
            three, two = (TRUNCATE.Svd(1 - k / m, piece.name, bases)(base, target) for k in (3, 2))
            assert torch.allclose(three, target, atol=1e-6)
            assert float((two - target).norm()) == pytest.approx(0.3, rel=1e-4)  # one singular value of three
            assert energy[:4].tolist() == pytest.approx([0.09, 0.09, 0.09, 0.0], abs=1e-6)
            # the random subspace that holds as much as a random update's three largest is larger, and loses more
            rank = TRUNCATE.as_random_rank(bases.of(piece.name), 3)
            assert 3 < rank < m


def test_energies_add_up_and_are_those_of_a_slow_svd(tmp_path):
    with pair_of(tmp_path, "llama") as pair:
        bases = bases_of(pair, tmp_path)
        shares = [0.0, 0.25, 0.5, 1.0]
        found = TRUNCATE.energies(bases, shares)
        kept = torch.zeros(4, dtype=torch.float64)
        total = 0.0
        for piece in bases.pieces:
            base, target = piece.read(pair)
            s2 = torch.linalg.svdvals(target.double() - base.double()).square()
            total += float(s2.sum())
            kept += torch.tensor([float(s2[: TRUNCATE.kept(q, len(s2))].sum()) for q in shares])
            cut = TRUNCATE.Svd(0.5, piece.name, bases)(base, target)
            parts = [float((one - other).double().square().sum()) for one, other in ((cut, base), (cut, target))]
            assert sum(parts) == pytest.approx(float(s2.sum()), rel=1e-5)
        assert found["update"] == pytest.approx((kept / total).tolist(), rel=1e-6)
        assert found["update"][0] == pytest.approx(1.0) and found["update"][-1] == 0.0
        # The models are drawn independently, so the update is a random one: it is cut no better than its nulls.
        assert found["strictest"][2] == pytest.approx(found["update"][2], abs=0.03)
        assert all(found["strictest"][i] >= max(found[kind][i] for kind in TRUNCATE.updates.NULLS) for i in range(4))
        grid = [i / 100 for i in range(101)]
        assert TRUNCATE.at_equal_energy(TRUNCATE.energies(bases, grid), 0.5, grid) == pytest.approx(0.5, abs=0.05)


def test_as_random_keeps_the_energy_of_a_random_update_in_directions_of_its_own(tmp_path):
    with planted(tmp_path, 3, noise=0.003) as pair:
        bases = bases_of(pair, tmp_path)
        piece = next(piece for piece in bases.pieces if piece.projection == "up_proj")
        base, target = piece.read(pair)
        held = bases.of(piece.name)
        for q in (0.25, 0.75):
            k = TRUNCATE.kept(q, 32)
            wanted = max(float(null[:k].sum() / null.sum()) for null in held["nulls"])
            one, again, other = (TRUNCATE.AsRandom(q, piece.name, bases, 1, draw)(base, target) for draw in (0, 0, 1))
            assert one.equal(again) and not one.equal(other)
            whole = float((target - base).square().sum())
            parts = [float((one - side).square().sum()) / whole for side in (base, target)]
            assert sum(parts) == pytest.approx(1.0, abs=1e-4)  # an orthogonal projection
            drawn = [TRUNCATE.AsRandom(q, piece.name, bases, 1, draw)(base, target) for draw in range(40)]
            mean = sum(float((each - base).square().sum()) / whole for each in drawn) / 40
            assert mean == pytest.approx(wanted, abs=0.05)


def test_dare_and_magnitude(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 50, generator=generator)
    target = base + torch.randn(40, 50, generator=generator)
    dropped = TRUNCATE.Dare(0.75, "layer_0.q_proj", 1, 0)(base, target)
    stays = dropped != base
    assert float(stays.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert dropped[stays].equal((base + (target - base) / 0.25)[stays])
    assert not dropped.equal(TRUNCATE.Dare(0.75, "layer_0.q_proj", 1, 1)(base, target))
    pruned = TRUNCATE.magnitude(base, target, 0.75)
    stays = pruned.eq(target)
    assert int(stays.sum()) == 500 and pruned[~stays].equal(base[~stays])
    change = (target - base).abs()
    assert change[stays].min() >= change[~stays].max()


def test_heads_are_cut_one_by_one(tmp_path):
    with pair_of(tmp_path, "llama") as pair:
        pieces = TRUNCATE.pieces_of(pair, by_head=True)
        assert sum(piece.projection == "q_proj" for piece in pieces) == 3 * 4
        assert sum(piece.projection == "k_proj" for piece in pieces) == 3 * 2  # two KV heads
        found = cut(pair, TRUNCATE.recipe(pair, pieces, "svd", 0.5, bases_of(pair, tmp_path, pieces), 1))
        base, target = weights(pair.base_ref), weights(pair.target_ref)
        for name, at in (("q_proj", (slice(8, 16),)), ("o_proj", (slice(None), slice(8, 16)))):
            name = f"model.layers.1.self_attn.{name}.weight"
            assert torch.allclose(found[name][at].double(), slow(base[name][at], target[name][at], 4), atol=2e-6)


def test_a_tied_head_that_is_on_disk_is_cut_as_its_embeddings_are(tmp_path):
    for seed, name in enumerate(("base", "target")):
        folder = save_tiny("llama", tmp_path / name, seed=seed, tie_word_embeddings=True)
        put_tensors(folder, **{"lm_head.weight": "model.embed_tokens.weight"})
    with surgery.Pair(tmp_path / "base", tmp_path / "target") as pair:
        pieces = TRUNCATE.pieces_of(pair, embeddings=True)
        bases = bases_of(pair, tmp_path, pieces)
        for curve in TRUNCATE.LOOKS:
            found = cut(pair, TRUNCATE.recipe(pair, pieces, curve, 0.5, bases, 1))
            assert found["lm_head.weight"].equal(found["model.embed_tokens.weight"]), curve
        target = weights(pair.target_ref)
        assert not found["lm_head.weight"].equal(target["lm_head.weight"])
        whole = sum(float(bases.of(piece.name)["energy"].sum()) for piece in pieces[:-1])
        assert TRUNCATE.energies(bases, [0.0])["rounding"] * whole == pytest.approx(
            sum(bases.of(piece.name)["rounding"] for piece in pieces[:-1])
        )  # counted once


def test_directions_are_computed_once_for_all_shares_and_kept_over_a_kill(tmp_path, monkeypatch):
    made, computed = [], TRUNCATE.Bases.computed
    monkeypatch.setattr(
        TRUNCATE.Bases, "computed", lambda self, piece: made.append(piece.name) or computed(self, piece)
    )
    with pair_of(tmp_path, "llama") as pair:
        bases = bases_of(pair, tmp_path)
        for q in (0.25, 0.5, 0.75):
            cut(pair, TRUNCATE.recipe(pair, bases.pieces, "svd", q, bases, 1))
        assert sorted(made) == sorted(piece.name for piece in bases.pieces) and len(made) == 3 * 7
        made.clear()
        (bases.folder / "layer_1.q_proj.pt").unlink()
        bases_of(pair, tmp_path).of("layer_0.q_proj")
        assert made == ["layer_1.q_proj"]
        made.clear()
        other = TRUNCATE.Bases(
            pair, bases.pieces, bases.folder, 2, processes.Process("cpu")
        )  # another seed of the nulls
        other.of("layer_0.q_proj")
        assert len(made) == 3 * 7


def test_two_shares_and_two_draws_are_two_requests(tmp_path):
    with pair_of(tmp_path, "llama") as pair:
        pieces = TRUNCATE.pieces_of(pair)
        bases = bases_of(pair, tmp_path)
        keys = [
            json.dumps(TRUNCATE.recipe(pair, pieces, curve, q, bases, 1, draw).key)
            for curve in TRUNCATE.LOOKS
            for q in (0.5, 0.6)
            for draw in (0, 1)
            if draw == 0 or curve in TRUNCATE.DRAWN
        ]
        assert len({*keys}) == len(keys) == 4 * 2 + 2 * 2


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("truncate")
    planted(root, 3, noise=0.003).close()
    (root / "run").mkdir()
    (root / "target").rename(root / "run/checkpoint-20")
    (root / "held.txt").write_text("".join(f"ba do ki lu {i}\n" for i in range(6)))
    return root


def run(models, out, *more) -> dict:
    where = ["--base", models / "base", "--run", models / "run", "--heldout", models / "held.txt", "--output", out]
    TRUNCATE.main([*map(str, where), "--measures", "nll", "--shares", "0.5", "0.9", "--draws", "2", *more])
    return json.loads(out.read_text()) if out.exists() else {}


def test_a_result_has_its_curves_energies_and_nulls(models, tmp_path, capsys):
    found = run(models, tmp_path / "out.json")
    rows = {(row["curve"], row["at"], row["draw"]): row for row in found["points"]}
    assert len(rows) == 2 * 4 + 2 * 2 * 4 and len(found["sets"]) == 2 + 2 * 2 + 2 * 2 * 2 + 1
    assert rows["svd", 0.0, 0]["set"] == 1 and rows["dare", 1.0, 1]["set"] == rows["svd", 1.0, 0]["set"]
    assert found["energy"]["update"][90] > found["energy"]["strictest"][90] + 0.1
    assert {*found["beyond"]["svd"]["as_random"]} == {"nll_per_byte"}
    assert found["at_equal_energy"]["nll_per_byte"] <= found["largest"]["svd"]["nll_per_byte"]["at"]["value"]
    assert found["matrices"] == 21 and 0 < found["parameters"] < found["of"]
    assert torch.load(tmp_path / "out.pt", weights_only=True)["nll_per_byte"].shape == (len(found["sets"]), 6)
    assert {path.name for path in tmp_path.iterdir()} == {"out.json", "out.pt", "out.png", "out.pdf"}
    run(models, tmp_path / "out.json")
    assert "kept (--overwrite redoes it)" in capsys.readouterr().out
    with pytest.raises(InputError, match="another request"):
        run(models, tmp_path / "out.json", "--by-head")


class Found:
    """A study whose only result is `path`."""

    def __init__(self, path):
        self.path = path

    def file(self, step: str, schema: str):
        return evidence.File(self.path, "spectral/truncate.py", *results.read_json(self.path, schema))


def test_the_claim_is_decided_by_the_share_that_keeps_the_gain(models, tmp_path):
    found = run(models, tmp_path / "out.json")
    d5 = cli.sibling("report/claims/d5.py")
    numbers, beside = d5.measure(Found(tmp_path / "out.json"))
    kept = found["beyond"]["svd"]["as_random"]["nll_per_byte"]["at"]["kept"]
    assert len(numbers) == 1 and numbers[0]["says"] == verdicts.above()
    assert kept is None or numbers[0]["value"] == kept["value"]
    assert numbers[0]["value"] is not None or "is not clear" in numbers[0]["note"]
    named = {row["name"]: row["value"] for row in beside}
    assert named["q*, loss"] == found["largest"]["svd"]["nll_per_byte"]["at"]["value"]
    assert named["parameters of the matrices in millions"] == found["parameters"] / 1e6
    run(models, tmp_path / "heads.json", "--by-head")
    with pytest.raises(InputError, match="head by head"):
        d5.measure(Found(tmp_path / "heads.json"))
    run(models, tmp_path / "alone.json", "--curves", "svd")
    with pytest.raises(evidence.Missing, match="lacks the curves svd and as_random"):
        d5.measure(Found(tmp_path / "alone.json"))


def test_a_killed_run_goes_on_with_the_directions_it_has(models, tmp_path, monkeypatch):
    whole = run(models, tmp_path / "whole.json")
    apply, count = TRUNCATE.Svd.__call__, []

    def killed(self, base, target):
        count.append(1)
        if len(count) > 25:
            raise KeyboardInterrupt
        return apply(self, base, target)

    monkeypatch.setattr(TRUNCATE.Svd, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        run(models, tmp_path / "out.json")
    monkeypatch.setattr(TRUNCATE.Svd, "__call__", apply)
    assert (tmp_path / "out.bases").is_dir()
    monkeypatch.setattr(TRUNCATE.Bases, "computed", None)  # all are there
    found = run(models, tmp_path / "out.json")
    assert {key: value for key, value in found.items() if key not in ("_header",)} == {
        key: value for key, value in whole.items() if key not in ("_header",)
    }


@pytest.mark.slow
def test_two_processes_measure_what_one_does(models, tmp_path):
    one = run(models, tmp_path / "one.json")
    where = ["--base", models / "base", "--run", models / "run", "--heldout", models / "held.txt"]
    flags = ["--measures", "nll", "--shares", "0.5", "0.9", "--draws", "2", "--output", tmp_path / "two.json"]
    launch("spectral/truncate.py", *where, *flags)
    two = json.loads((tmp_path / "two.json").read_text())
    assert {key: value for key, value in one.items() if key != "_header"} == {
        key: value for key, value in two.items() if key != "_header"
    }
    assert not (tmp_path / "two.bases").exists()


def test_a_point_is_written_as_a_folder_that_is_what_was_measured(models, tmp_path):
    results.write_text(tmp_path / "out.bases/kept", "of a measurement that is not finished")
    run(models, tmp_path / "out.json", "--write", "svd", "0.9", str(tmp_path / "cut"))
    run(models, tmp_path / "out.json", "--write", "svd", "0", str(tmp_path / "none"))
    with surgery.Pair(models / "base", models / "run/checkpoint-20") as pair:
        bases = bases_of(pair, tmp_path)
        wanted = cut(pair, TRUNCATE.recipe(pair, bases.pieces, "svd", 0.9, bases, 42))
    written, same = weights(refs.model(tmp_path / "cut")), weights(refs.model(tmp_path / "none"))
    assert all(written[name].equal(wanted[name]) for name in wanted)
    target = weights(refs.model(models / "run/checkpoint-20"))
    assert all(same[name].equal(target[name]) for name in target)
    assert not (tmp_path / "out.json").exists() and (tmp_path / "out.bases/kept").is_file()
    assert not (tmp_path / "cut.bases").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--write", "svd", "1.5", "x"], "--write 1.5: not a number from 0 to 1"),
        (["--write", "rank", "0.5", "x"], "--write rank: no such curve"),
        (["--base", "/nowhere"], "/nowhere"),
        (["--run", "{root}/base"], "is the base itself: there is nothing to rewind"),
        (["--run", "{root}/renamed"], "renamed are equal in all matrices to be cut"),
    ],
)
def test_bad_input_is_one_line(models, tmp_path, more, message):
    if not (models / "renamed").exists():  # the base's weights, and a config.json that says something else
        config = json.loads(shutil.copytree(models / "base", models / "renamed").joinpath("config.json").read_text())
        (models / "renamed/config.json").write_text(json.dumps(config | {"bos_token_id": 5}))
    with pytest.raises(InputError, match=message):
        run(models, tmp_path / "out.json", *(one.replace("{root}", str(models)) for one in more))


def test_a_dtype_too_coarse_for_the_update_is_said(models, tmp_path, capsys):
    model = tiny_model("llama", seed=0)
    with torch.no_grad():
        for value in model.parameters():
            value += 1e-3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    save_tiny("llama", tmp_path / "coarse", model=model.to(torch.bfloat16))
    run(models, tmp_path / "out.json", "--run", str(tmp_path / "coarse"), "--curves", "svd")
    assert "of the energy of the update, at every q below 1" in capsys.readouterr().err
