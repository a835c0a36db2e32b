"""freeze and train_only: what is frozen keeps every bit in every checkpoint; of every type: test_architectures.py."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from helpers import bits, read_tensors, save_tiny
from short_training import record, run

from cpt_utils.architectures import archs
from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.measures import layer_sets, masks
from cpt_utils.models import loading

freezing = cli.sibling("cpt/freezing.py")


def loaded(ref):
    import torch

    return loading.load_model(ref, torch.float32, torch.device("cpu")).requires_grad_(True)


def frozen_in(model, ref, part, mode="freeze", io=True):
    return freezing.Frozen(model, freezing.Choice(mode, part, io), ref)


def entries(found, parameter):
    """The frozen entries of a parameter, as a bool mask of its shape."""
    import torch

    whole = torch.full(parameter.shape, not parameter.requires_grad)
    return found.parts.get(parameter, whole)


# --- in a training


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Models in bfloat16: untied with grouped-query attention, tied, fused projections, Conv1D with biases."""
    folder = tmp_path_factory.mktemp("bases")
    made = {"llama": {}, "qwen2": {"tie_word_embeddings": True}, "phi3": {}, "gpt2": {}, "gpt_neox": {}, "mixtral": {}}
    return {kind: save_tiny(kind, folder / kind, dtype="bfloat16", **more) for kind, more in made.items()}


def changed(base: Path, checkpoint: Path) -> dict[str, float]:
    """tensor -> the share of its entries that are not the base's bits."""
    before, after = read_tensors(base), read_tensors(checkpoint)
    assert before.keys() == after.keys()
    return {
        name: (bits(before[name].to(after[name].dtype)) != bits(after[name]))
        .view(-1, after[name].element_size()).any(1).double().mean().item()
        for name in before
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_frozen_layers_keep_every_bit_in_every_checkpoint(train, bases, text, tmp_path, kind, dtype, capsys):
    base, arch = bases[kind], archs.for_config(refs.model(bases[kind]).config())
    out = run(train, base, text, tmp_path / "run", "--freeze", "0,2", dtype_on_disk=dtype)
    for step in (2, 5):
        found = changed(base, out / f"checkpoint-{step}")
        frozen = {name for name in found if arch.layer_of(name) in (0, 2)}
        assert frozen and not any(found[name] for name in frozen)
        if dtype == "float32":
            assert all(found[name] > 0.5 for name in found if name not in frozen and "k_proj.bias" not in name)
    facts = record(out)["_header"]["trained"]
    assert facts["words"] == "0,2" and facts["layers_trained"] == [1] and facts["io"] == "trained"
    whole = {id(p): p.numel() for p in loaded(refs.model(base)).parameters()}  # a tied head counts once
    left = sum(read_tensors(base)[name].numel() for name in frozen)
    assert facts["trainable_parameters"] == sum(whole.values()) - left
    said = capsys.readouterr().out
    assert "1 of 3 layers (33%) and" in said and said.count("parameters (") == 2


def test_train_only_freezes_embeddings_norm_and_head_too(train, bases, text, tmp_path):
    base = bases["llama"]
    literal = changed(base, run(train, base, text, tmp_path / "a", train_only="last:1") / "checkpoint-5")
    assert {name.split(".")[2] for name in literal if literal[name]} == {"2"}
    with_io = changed(base, run(train, base, text, tmp_path / "b", train_only="last:1/ffn", io="trained")
                      / "checkpoint-5")  # fmt: skip
    moved = {name for name in with_io if with_io[name]}
    own = {f"model.layers.2.mlp.{name}.weight" for name in archs.FFN}
    assert moved == own | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "gpt_neox", "mixtral"])
def test_frozen_neurons_keep_every_bit_and_have_no_moments(train, bases, text, tmp_path, kind, monkeypatch):
    """Also after a kill: the run goes on from its state to the bits of an unbroken one."""
    import torch

    base = bases[kind]
    config = refs.model(base).config()
    arch, n = archs.for_config(config), 3
    neurons = {"ga": {layer: [1, 7] if layer else [] for layer in range(n)}}
    mask = tmp_path / "mask.json"
    masks.write(mask, neurons, n_layers=n, ffn_width=arch.ffn_width(config))
    whole = run(train, base, text, tmp_path / "whole", "--freeze", str(mask))
    model = loaded(refs.model(base))
    found = frozen_in(model, refs.model(base), layer_sets.read(str(mask), layer_sets.Place(config)))
    assert found.parts
    for step in (2, 5):
        after = loaded(refs.model(whole / f"checkpoint-{step}"))
        for (name, p), q in zip(model.named_parameters(), after.parameters(), strict=True):
            kept = entries(found, p)
            assert bits(p.detach()[kept]).equal(bits(q.detach()[kept])), name
            moved = (p != q)[~kept].double().mean()
            assert moved > 0.4 or "bias" in name or kind == "mixtral", (name, moved)
    # Killed at the end: the state of step 3 is there, and what the optimizer holds of frozen entries is zero.
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(train, "finish", lambda *_: sys.exit(1))
        run(train, base, text, tmp_path / "killed", "--freeze", str(mask))
    state = torch.load(tmp_path / "killed" / ".state" / "state-3" / "optimizer.pt", weights_only=True)
    decayed = [p for p in model.parameters() if p.requires_grad]
    assert len(state["state"]) == len(decayed)
    shapes = {tuple(p.shape): int(entries(found, p).sum()) for p in found.parts}
    zeros = [int((held["exp_avg_sq"] == 0).sum()) for held in state["state"].values()
             if tuple(held["exp_avg_sq"].shape) in shapes]  # fmt: skip
    assert sum(zero >= min(shapes.values()) for zero in zeros) >= len(found.parts)
    run(train, base, text, tmp_path / "killed", "--freeze", str(mask))
    for name, tensor in read_tensors(whole / "checkpoint-5").items():
        assert bits(tensor).equal(bits(read_tensors(tmp_path / "killed" / "checkpoint-5")[name])), name


def test_frozen_tensors_have_no_optimizer_state(train, bases, text, tmp_path, monkeypatch):
    import torch

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(train, "finish", lambda *_: sys.exit(1))
        run(train, bases["llama"], text, tmp_path / "run", "--train-only", "1/attention")
    state = torch.load(tmp_path / "run" / ".state" / "state-3" / "optimizer.pt", weights_only=True)
    assert len(state["state"]) == 4


def test_a_run_without_it_is_the_run_that_it_was(train, bases, text, tmp_path, capsys):
    """Its settings and header have no word of it, so that runs of an earlier version are kept."""
    out = run(train, bases["llama"], text, tmp_path / "run")
    made = record(out)
    assert not {"freeze", "train_only", "io"} & {*made["settings"]} and "trained" not in made["_header"]
    run(train, bases["llama"], text, out)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(InputError, match="is of another request"):
        run(train, bases["llama"], text, out, "--freeze", "0")
    shutil.rmtree(out)
    run(train, bases["llama"], text, out, "--freeze", "0-1")
    run(train, bases["llama"], text, out, "--freeze", "first:2")  # other words for the same layers
    assert "nothing to do" in capsys.readouterr().out


def test_recomputed_activations_change_nothing(train, bases, text, tmp_path):
    """With the embeddings and the first layer frozen nothing before the second one asks for a gradient."""
    runs = [
        run(train, bases["llama"], text, tmp_path / str(again), "--train-only", "1/ffn", gradient_checkpointing=again)
        for again in (False, True)
    ]
    before, after = (read_tensors(out / "checkpoint-5") for out in runs)
    assert all(bits(before[name]).equal(bits(after[name])) for name in before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": "0", "train_only": "1"}, "give one of freeze, train_only and lora"),
        ({"freeze": "7"}, r"freeze '7': layer 7 does not exist: the model has layers 0 to 2"),
        ({"freeze": 1.5}, r"freeze is 1.5; it must name a part of the model"),
        ({"io": "frozen"}, "io goes with freeze or train_only"),
        ({"freeze": "all", "io": "frozen"}, "nothing is left to train"),
        ({"train_only": "all", "io": "trained"}, "nothing is frozen"),
        ({"freeze": "hub"}, "nothing says where the hub are|write hub:FILE"),
    ],
)
def test_what_cannot_be_frozen_is_refused(train, bases, text, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(train, bases["llama"], text, tmp_path / "run", **changes)
    assert not (tmp_path / "run" / ".state").exists()


def test_weights_that_layers_share_are_frozen_together(bases):
    ref = refs.model(bases["llama"])

    def shared():
        model = loaded(ref)
        model.model.layers[2].mlp = model.model.layers[0].mlp
        return model

    with pytest.raises(InputError, match=r"layers\.0\.mlp.* and .*layers\.2\.mlp.* have in common; take all"):
        frozen_in(shared(), ref, layer_sets.Part("0", (0,)))
    found = frozen_in(shared(), ref, layer_sets.Part("0,2", (0, 2)))
    assert found.layers == [1]
