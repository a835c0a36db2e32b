"""LoRA: what is written is the model that was trained, for every type; the base keeps every bit; numbers are equal."""

from __future__ import annotations

import functools
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import short_training
from helpers import EVERY_ARCHITECTURE, bits, read_tensors, save_tiny, skip_without
from short_training import record

from cpt_utils.architectures import archs
from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import opening, refs
from cpt_utils.measures import layer_sets
from cpt_utils.models import loading

skip_without("peft")
lora = cli.sibling("cpt/lora.py")


def loaded(folder: Path):
    import torch

    return loading.load_model(refs.model(folder), torch.float32, torch.device("cpu"))


def adapted(base: Path, model=None, **asked):
    """(what was put into the model, the model), which is `base`, loaded."""
    import torch

    torch.manual_seed(1)
    model = model or loaded(base).requires_grad_(True)
    choice = lora.read({"r": 2, **asked}, layer_sets.Place(refs.model(base).config()))
    return choice.on(model, refs.model(base)), model


@pytest.mark.parametrize("model_type", EVERY_ARCHITECTURE)
def test_the_adapter_on_disk_is_the_model_in_memory(model_type, tmp_path):
    """Read by the collection's own reader; experts, which are one tensor, are refused."""
    import torch

    base = save_tiny(model_type, tmp_path / "base", tokenizer=False)
    config = refs.model(base).config()
    arch = archs.for_config(config)
    model, targets, ids = loaded(base).requires_grad_(True), "all", torch.arange(3, 21).view(2, 9)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    if any(arch.has_router(config, layer) for layer in range(arch.n_layers(config))):
        with pytest.raises(InputError, match=r"lora: targets: the experts of layer . are one tensor"):
            adapted(base, model)
        targets = "attention"
    made, _ = adapted(base, model, targets=targets, alpha=3)
    products = [p for p in model.parameters() if p.requires_grad]
    assert len(products) == 2 * len(made.ranks) > 0 and made.n_trained == sum(p.numel() for p in products)
    with torch.no_grad():
        for parameter in products:
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
        made.write(tmp_path / "adapter", model, model.state_dict(), base, "float32")
        wanted = model(input_ids=ids).logits
        found = loaded(tmp_path / "adapter")(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    assert (before - wanted).abs().max() > 1e-3


# --- numbers of parameters


def test_equal_numbers_of_parameters_are_equal(tmp_path):
    """In layers that are alike every layer has one rank; in others single modules have one more."""
    base = save_tiny("llama", tmp_path / "llama", layers=5)
    whole, _ = adapted(base, r=2)
    for layers in ("0", "0,4", "0-2", "1-4"):
        made, model = adapted(base, r=2, layers=layers, parameters_of="all", targets="all")
        assert made.n_trained == whole.n_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
        of_layer = {layer: {rank for name, rank in made.ranks.items() if f".{layer}." in name} for layer in made.layers}
        assert all(len(own) == 1 for own in of_layer.values())
        assert max(made.ranks.values()) - min(made.ranks.values()) <= 1
        assert "than asked for" not in made.summary()
    assert set(made.ranks.values()) == {2, 3}
    uneven = save_tiny("laguna", tmp_path / "laguna")  # fewer heads in the last layer
    whole, _ = adapted(uneven, r=3, targets="attention")
    made, _ = adapted(uneven, r=3, layers="1-2", parameters_of="all", targets="attention")
    assert made.n_trained == whole.n_trained == made.facts()["parameters_wanted"]
    assert max(made.ranks.values()) - min(made.ranks.values()) == 1


def test_the_nearest_sum_is_the_nearest():
    rng = np.random.default_rng(0)
    for _ in range(50):
        costs = {str(i): int(cost) for i, cost in enumerate(rng.integers(1, 30, size=7) * 3)}
        wanted = int(rng.integers(1, sum(costs.values())))
        found = sum(costs[name] for name in lora.nearest_sum(costs, wanted))
        every = [sum(own) for n in range(8) for own in itertools.combinations(costs.values(), n)]
        assert abs(found - wanted) == min(abs(each - wanted) for each in every)


# --- in a training


run = functools.partial(short_training.run, weight_decay=0.1)
DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
TARGETS = {"llama": "all", "gemma3_text": "ffn", "gpt2": "all", "mixtral": "attention"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Grouped-query attention, norms on both sides with tied embeddings, Conv1D and tied, a mixture of experts."""
    folder = tmp_path_factory.mktemp("bases")
    more = {"gpt2": DROPOUT, "gemma3_text": {"tie_word_embeddings": True}}
    return {kind: save_tiny(kind, folder / kind, **more.get(kind, {})) for kind in TARGETS}


@pytest.mark.parametrize("kind", list(TARGETS))
def test_adapters_are_what_was_trained(train, bases, text, tmp_path, kind, monkeypatch):
    """The base keeps every bit, the losses are those that were logged, and PEFT reads and merges the same."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base, got, trainer = bases[kind], [], cli.sibling("cpt/trainer.py")
    make = trainer.make

    def spy(config, run, model, files, blocks, *rest):
        got.extend([np.asarray(blocks).copy(), model])
        return make(config, run, model, files, blocks, *rest)

    monkeypatch.setattr(trainer, "make", spy)
    given = {"r": 3, "alpha": 5, "layers": "0,2", "targets": TARGETS[kind]}
    out = run(train, base, text, tmp_path / "run", lora=given)
    blocks, model = got
    ids = torch.from_numpy(blocks[4:6].astype(np.int64))
    model(input_ids=ids, labels=ids).loss.backward()
    before, products = loaded(base).state_dict(), 0
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            products += 1
            assert parameter.grad.abs().sum() > 0
        else:
            assert parameter.grad is None and not parameter.requires_grad
            assert bits(parameter.detach()).equal(bits(before[name.replace(".base_layer.", ".")])), name

    found = [ref.spec for ref in refs.run(str(out))]
    assert [Path(spec).name for spec in found] == ["checkpoint-2", "checkpoint-5"]
    logged = record(out)["losses"]
    with torch.no_grad():
        assert loaded(found[0])(input_ids=ids, labels=ids).loss.item() == pytest.approx(logged[2], abs=5e-6)

    own = json.loads((Path(found[1]) / "adapter_config.json").read_text())
    assert own["base_model_name_or_path"] == str(base) and own["fan_in_fan_out"] == (kind == "gpt2")
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(whole, found[1]).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    truth, old = read_tensors(tmp_path / "merged"), read_tensors(base)
    moved = set()
    with opening.open_folder(found[1]) as stored:
        assert sorted(stored.names()) == sorted(truth)
        for name, tensor in truth.items():
            assert bits(stored.get(name)).equal(bits(tensor)), name
            moved |= set() if bits(tensor).equal(bits(old[name])) else {name}
    assert len(moved) == products // 2 and {archs.ARCHS[kind].layer_of(name) for name in moved} == {0, 2}

    facts = record(out)["_header"]
    assert facts["trained"]["layers_trained"] == [0, 2] and facts["trained"]["ranks"] == [3]
    held = {id(p): p.numel() for p in loaded(base).parameters()}
    assert facts["cost"]["parameters"] == sum(held.values())
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert facts["cost"]["trainable_parameters"] == facts["trained"]["trainable_parameters"] == n
    assert facts["trained"]["share_of_parameters"] == n / sum(held.values())
    assert facts["cost"]["optimizer_bytes"] == 2 * 4 * n + 4 * products and facts["cost"]["n_steps"] == 5


def test_a_killed_run_goes_on_to_the_same_bits(train, bases, text, tmp_path, monkeypatch):
    """With dropout, whose random numbers go on, too. The state holds the products alone."""
    import torch

    flags = ("--lora", "r=2,dropout=0.3,layers=first:2,targets=q_proj,down_proj")
    whole = run(train, bases["llama"], text, tmp_path / "whole", *flags)
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(train, "finish", lambda *_: sys.exit(1))
        run(train, bases["llama"], text, tmp_path / "killed", *flags)
    state = tmp_path / "killed" / ".state" / "state-3"
    held = torch.load(state / "pytorch_model.bin", weights_only=True)
    assert len(held) == 2 * 4 and all(".lora_" in name for name in held)
    assert len(torch.load(state / "optimizer.pt", weights_only=True)["state"]) == 2 * 4
    run(train, bases["llama"], text, tmp_path / "killed", *flags)
    for step in (2, 5):
        names = sorted(path.name for path in (whole / f"checkpoint-{step}").iterdir())
        assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= {*names}
        for name in names:
            files = [out / f"checkpoint-{step}" / name for out in (whole, tmp_path / "killed")]
            assert files[0].read_bytes() == files[1].read_bytes(), name
    one, two = record(whole), record(tmp_path / "killed")
    costs = [each.pop("_header")["cost"] for each in (one, two)]
    assert one == two and len(one["losses"]) == 5 and costs[0] == costs[1]
    timings = [json.loads((out / "timing.json").read_text()) for out in (whole, tmp_path / "killed")]
    assert all(timing["seconds_per_step"] > 0 for timing in timings)
    plain = run(train, bases["llama"], text, tmp_path / "plain", lora={"r": 2, "layers": "first:2",
                "targets": ["q_proj", "down_proj"]})  # fmt: skip
    assert record(plain)["losses"][1:] != one["losses"][1:]


def test_merged_models_on_request(train, bases, text, tmp_path):
    """Whole folders, of the bits that the adapters of the same run give; also as the one final model."""
    given = {"r": 2, "layers": [1], "parameters_of": "all"}
    for kind in ("llama", "gpt2"):
        adapters = run(train, bases[kind], text, tmp_path / f"{kind}-adapters", lora=given)
        merged = run(train, bases[kind], text, tmp_path / f"{kind}-merged", lora={**given, "merge": True})
        for step in (2, 5):
            found = read_tensors(merged / f"checkpoint-{step}")
            assert not (merged / f"checkpoint-{step}" / "adapter_config.json").exists()
            with opening.open_folder(adapters / f"checkpoint-{step}") as stored:
                assert sorted(stored.names()) == sorted(found)
                assert all(bits(stored.get(name)).equal(bits(tensor)) for name, tensor in found.items())
        assert record(merged)["losses"] == record(adapters)["losses"]
    final = run(train, bases["llama"], text, tmp_path / "final", lora=given, save_steps=None, dtype_on_disk="bfloat16")
    assert refs.model(final).is_adapter and not refs.is_run(final)
    with pytest.raises(InputError, match="is an adapter, and adapters cannot be stacked; set merge: true"):
        run(train, final, text, tmp_path / "on-top", lora=given)
    on_top = run(train, final, text, tmp_path / "on-top", lora={**given, "merge": True}, steps=2, save_steps=[2])
    assert not refs.model(on_top / "checkpoint-2").is_adapter
    run(train, bases["llama"], text, final, "--overwrite", steps=2, save_steps=[2])
    assert not (final / "adapter_config.json").exists() and not refs.model(final / "checkpoint-2").is_adapter


def test_runs_are_kept_by_what_decides_them(train, bases, text, tmp_path, capsys):
    out = run(train, bases["llama"], text, tmp_path / "run", "--lora", "r=2,layers=0-1", steps=2, save_steps=[2])
    capsys.readouterr()
    more = {"steps": 2, "save_steps": [2]}
    run(train, bases["llama"], text, out, "--lora", "r=2,alpha=4,layers=first:2,targets=all", **more)
    assert "nothing to do" in capsys.readouterr().out
    for other in ("r=3,layers=0-1", "r=2,layers=0-1,dropout=0.1", "r=2,layers=0-1,merge=true", "r=2"):
        with pytest.raises(InputError, match=r"of another request \(lora"):
            run(train, bases["llama"], text, out, "--lora", other, **more)
    with pytest.raises(InputError, match="of another request"):
        run(train, bases["llama"], text, out, **more)
    run(train, bases["llama"], text, out, "--overwrite", "--freeze", "0", **more)
    assert "lora" not in record(out)["settings"]


def test_the_command_line_has_its_lora_in_the_place_of_what_the_file_trains(train, bases, text, tmp_path, capsys):
    """The file's io belongs to the file's part; a key that is said twice, or without a value, is refused."""
    base, out = bases["llama"], tmp_path / "run"
    run(train, base, text, out, "--lora", "r=2", steps=1, save_steps=[1], train_only="0", io="trained")
    assert {"lora"} == {*record(out)["settings"]} & {"lora", "train_only", "io"}
    for words in ("8", "r=2,r=3", "r=2,layers=0,layers=1", ""):
        with pytest.raises(SystemExit) as stopped:
            run(train, base, text, tmp_path / "bad", "--lora", words)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == 2 and f"--lora: {words!r}: write each key once, with a value, like r=8" in error
    assert not [*(tmp_path / "bad").iterdir()]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"lora": {"layers": "0"}}, r"lora\.r is missing; it must be a rank"),
        ("llama", {"lora": {"r": 2, "rank": 3}}, r"unknown key lora\.rank"),
        ("llama", {"lora": {"r": 2, "alpha": True}}, r"lora\.alpha is True; it must be a number above 0"),
        ("llama", {"lora": {"r": 2, "dropout": 1.0}}, r"lora\.dropout is 1\.0; it must be 0 or more, and below 1"),
        ("llama", {"lora": {"r": 2}, "freeze": "0"}, "give one of freeze, train_only and lora"),
        ("llama", {"lora": {"r": 2}, "io": "frozen"}, "io goes with freeze or train_only"),
        ("llama", {"lora": {"r": 2}, "tokenizer": {"from": "x", "resize": True}}, "lora trains no embeddings"),
        ("llama", {"lora": {"r": 2, "layers": "7"}}, r"c\.yaml: lora layers '7': layer 7 does not exist"),
        ("llama", {"lora": {"r": 2, "layers": "0/ffn"}}, "lora layers '0/ffn' is less than whole layers"),
        ("llama", {"lora": {"r": 2, "targets": "qproj"}}, "targets: model type llama has no 'qproj'; choose from all,"),
        ("gpt2", {"lora": {"r": 2, "targets": ["gate_proj"]}}, "model type gpt2 has no 'gate_proj'"),
        ("gpt2", {"lora": {"r": 2, "targets": "q_proj"}}, "q_proj is computed together with k_proj and v_proj, in"),
        ("mixtral", {"lora": {"r": 2}}, "lora: targets: the experts of layer 0 are one tensor .* targets: attention"),
        ("llama", {"lora": {"r": 1, "parameters_of": "0"}}, "lora: parameters_of: rank 1 has .* asked for; raise r"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused(train, bases, text, tmp_path, kind, changes, message):
    with pytest.raises(InputError, match=message):
        run(train, bases[kind], text, tmp_path / "c", **changes)
    assert not (tmp_path / "c" / ".state").exists()


def test_without_peft_it_says_what_to_install(bases, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="lora needs peft: pip install peft"):
        adapted(bases["llama"])
