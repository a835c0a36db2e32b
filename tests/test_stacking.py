"""Experts that one model holds apart and the other in one tensor: the numbers and bits are those of like layouts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import EVERY_ARCHITECTURE, read_tensors, save_tiny, tiny_model
from safetensors.torch import save_file

from cpt_utils.architectures import archs
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import opening, refs, stacking
from cpt_utils.interventions import in_memory, on_disk, surgery
from cpt_utils.measures import compare
from cpt_utils.models import loading

CPU = torch.device("cpu")
EXPERT, STACK = re.compile(r"\.experts\.\d+\."), re.compile(r"\.experts\.(gate_up|up|down)_proj$")
LAYERS = [0, 1]
PLAIN = ("mixtral", "qwen3_moe", "olmoe", "flex_olmo")  # gates and ups in halves of one tensor, no other FFN


def save_both(model_type: str, place: Path, name: str, seed: int, **config) -> None:
    """A model as `save_pretrained` writes it (`apart/name`), and with its experts as a trainer leaves them that saves
    the model's state (`one/name`)."""
    model = tiny_model(model_type, seed=seed, dtype="bfloat16", **config)
    apart = save_tiny(model_type, place / "apart" / name, model=model)
    one = shutil.copytree(apart, place / "one" / name)
    state, held = model.state_dict(), read_tensors(apart)
    held = {key: tensor for key, tensor in held.items() if not EXPERT.search(key)}
    held |= {key: tensor.contiguous().clone() for key, tensor in state.items() if STACK.search(key)}
    save_file(held, one / "model.safetensors", metadata={"format": "pt"})


MIXTURES = [name for name in EVERY_ARCHITECTURE if archs.ARCHS[name].experts_at is not None]


# Each way of holding experts, the rest of the layer as various: for tests that load models.
KINDS = ["mixtral", "qwen3_moe", "olmoe", "flex_olmo", "deepseek_v3", "qwen3_next", "laguna", "nemotron_h"]


@pytest.fixture(params=MIXTURES, scope="module")
def place(tmp_path_factory, request) -> Path:
    """Base and checkpoint of a type, in both layouts."""
    tmp_path = tmp_path_factory.mktemp(request.param)
    for seed, name in enumerate(("base", "checkpoint-5")):
        save_both(request.param, tmp_path, name, seed)
    if not any(EXPERT.search(key) for key in read_tensors(tmp_path / "apart/base")):
        pytest.skip(f"transformers saves the experts of {request.param} in one tensor")
    return tmp_path


def numbers(base: Path, checkpoint: Path) -> dict:
    found = compare.changes(refs.model(base), [refs.model(checkpoint)], rows=archs.FFN, details=True)[5]
    facts = {}
    for layer, here in found.items():
        for name, change in here.items():
            facts[layer, name] = [change.n, change.sum_abs, change.sum_sq, change.base_sq, change.max_abs]
            facts[layer, name] += [change.cosine]
            facts[layer, name] += [change.rows.tolist()] if change.rows is not None else []
            facts[layer, name] += [change.neurons.values.tolist()] if change.neurons else []
    return facts


def test_changes(place):
    truth = numbers(place / "apart/base", place / "apart/checkpoint-5")
    assert any(name == "down_proj" and facts[4] > 0.1 for (_, name), facts in truth.items())
    for base, checkpoint in (("apart", "one"), ("one", "apart")):
        assert numbers(place / base / "base", place / checkpoint / "checkpoint-5") == truth
    together = numbers(place / "one/base", place / "one/checkpoint-5")
    assert together.keys() == truth.keys()
    for key, facts in truth.items():
        assert facts[0] == together[key][0] and facts[1:5] == pytest.approx(together[key][1:5], rel=1e-6)


def assert_gate(kind: str, written: dict, base: Path, target: Path) -> None:
    """Gates and ups as memory has them: the base's where they were swapped, by their definition."""
    ours, theirs = (loading.load_model(refs.model(f), torch.float32, CPU).state_dict() for f in (target, base))
    seen = 0
    for name, tensor in ours.items():
        if not name.endswith("experts.gate_up_proj"):
            continue
        wanted, width, seen = tensor.clone(), tensor.shape[1] // 2, seen + 1
        if int(name.split(".")[2]) in LAYERS and kind != "attention":
            stop = width if kind == "gate" else 2 * width
            wanted[:, :stop] = theirs[name][:, :stop]
        assert torch.equal(written[name], wanted), (kind, name)
    assert seen >= 2


@pytest.mark.parametrize("place", KINDS, indirect=True, scope="module")
@pytest.mark.parametrize("sides", [("apart", "one"), ("one", "apart")])
def test_swaps(place, tmp_path, sides):
    base, target = place / sides[0] / "base", place / sides[1] / "checkpoint-5"
    like = place / sides[1] / "base"  # the same base in the target's layout
    names, config = list(read_tensors(target)), refs.model(target).config()
    arch = archs.for_config(config)
    ffn = {
        part.tensor
        for layer in range(arch.n_layers(config))
        for projection in archs.FFN
        if arch.has(config, layer, [projection])
        for part in arch.parts(config, layer, projection, names)
    }
    kinds = ("layers", "ffn", "gate", "attention") if "gate_proj" in arch.projections(config) else ("layers", "ffn")
    for kind in kinds:
        found = []
        for source in (base, like):
            with surgery.Pair(refs.model(source), refs.model(target)) as pair:
                if kind == "layers":
                    recipe = surgery.layers_from_base(pair, LAYERS)
                else:
                    taken = {"ffn": archs.FFN, "gate": ["gate_proj"], "attention": archs.ATTENTION}[kind]
                    recipe = surgery.parts_from_base(pair, taken, LAYERS)
                out = tmp_path / f"{kind}-{source.parent.name}"
                on_disk.write_model(pair, recipe, out)
                found.append(read_tensors(out))
                if source == base:
                    model = loading.load_model(refs.model(target), torch.float32, CPU)
                    with in_memory.apply(model, recipe, pair) as swapped:
                        held = {key: tensor.clone() for key, tensor in swapped.state_dict().items()}
                    written = loading.load_model(refs.model(out), torch.float32, CPU).state_dict()
                    assert all(torch.equal(tensor, written[key]) for key, tensor in held.items())
                    if pair.arch.model_type in PLAIN:
                        assert_gate(kind, written, base, target)
        own = read_tensors(target)
        assert list(found[0]) == list(found[1]) == names
        assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items()), kind
        assert sum(not torch.equal(tensor, own[name]) for name, tensor in found[0].items()) >= 2
        moved = [name for name in ffn if not torch.equal(found[0][name], own[name])]
        assert bool(moved) == (kind != "attention") and len(moved) < len(ffn)


def test_every_tensor_and_row(place):
    """The view has the other folder's names, shapes, dtypes and bits, also where a file's bytes are read."""
    for this, that in (("apart", "one"), ("one", "apart")):
        ref, other = refs.model(place / this / "base"), refs.model(place / that / "base")
        truth = read_tensors(place / that / "base")
        config, arch = ref.config(), archs.for_config(ref.config())
        folders = opening.open_folder(ref), opening.open_folder(other)
        view = stacking.like(folders[0], arch, config, folders[1], arch, config)
        assert {arch.canonical(name) for name in view.names()} == {arch.canonical(name) for name in truth}
        seen = 0
        for name in view.names():
            wanted = truth[next(own for own in truth if arch.canonical(own) == arch.canonical(name))]
            assert name in view and view.shape(name) == tuple(wanted.shape) and view.dtype(name) == wanted.dtype
            assert torch.equal(view.get(name), wanted)
            for start, stop in ((0, 1), (1, 3), (0, len(wanted))):
                assert torch.equal(view.rows(name, start, stop), wanted[start:stop])
            at = view.folder_of(name)
            if at is not None:
                entry = at.entry(name)
                data = (Path(at.path) / at.shard_of(name)).read_bytes()[entry.start : entry.stop]
                assert data == wanted.contiguous().view(torch.uint8).numpy().tobytes()
                seen += name in view.pairs
        assert seen > 6 or this == "apart"
        assert stacking.like(folders[0], arch, config, folders[0], arch, config) is folders[0]


def test_other_numbers_of_experts_are_refused(tmp_path):
    save_both("mixtral", tmp_path, "base", 0)
    save_both("mixtral", tmp_path, "checkpoint-5", 1, num_local_experts=3)
    base, target = refs.model(tmp_path / "apart/base"), refs.model(tmp_path / "one/checkpoint-5")
    with pytest.raises(InputError, match=r"layer 0 has 4 experts in .* and 3 in"):
        compare.changes(base, [target])
    with surgery.Pair(base, target) as pair, pytest.raises(InputError, match=r"which .* has"):
        surgery.layers_from_base(pair, [0])
