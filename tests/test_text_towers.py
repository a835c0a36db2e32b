"""A model with a vision tower against its language model alone: what is compared and swapped is the language model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import EVERY_ARCHITECTURE, load_script, read_tensors, save_tiny, tiny_config, tiny_tokenizer
from safetensors.torch import save_file

from cpt_utils.architectures import arch_table, archs
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import opening, refs
from cpt_utils.interventions import in_memory, on_disk, surgery
from cpt_utils.measures import compare
from cpt_utils.models import loading

CPU = torch.device("cpu")


def text_only(wrapper: Path, folder: Path) -> Path:
    """The language model of `wrapper` as a folder of its own, under the names that its type has."""
    config = json.loads((wrapper / "config.json").read_text())
    arch = archs.for_config(config)
    text = config["text_config"] | {"tie_word_embeddings": config["tie_word_embeddings"]}
    if archs.text_type(config) != text["model_type"]:  # whose default may be another
        text |= {"model_type": archs.text_type(config), "head_dim": arch.heads(config)[2]}
    of_text = archs.for_config(text)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(text))
    known = {
        of_text.canonical(name)
        for name in loading.load_untrained(refs.model(folder), torch.float32, CPU, 0).state_dict()
    }
    held = {}
    for name, tensor in read_tensors(wrapper).items():
        canonical = arch.canonical(name)
        if canonical == f"{arch.head}.weight":
            held[f"{of_text.head}.weight"] = tensor
        elif canonical in known or arch.layer_of(name) is not None:
            held[of_text.prefixes[0] + canonical] = tensor
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
    return folder


# Each way of naming the parts, and of making the language model: for tests that load models.
KINDS = ["gemma3", "qwen2_vl", "qwen3_vl_moe", "llama4", "mistral3", "idefics3", "qwen3_5", "kimi_k25"]


def test_these_are_all_that_have_a_tower():
    configs = {name: tiny_config(name).to_dict() for name in EVERY_ARCHITECTURE}
    assert {name for name, config in configs.items() if "text_config" in config} == set(arch_table.TOWERS)


@pytest.fixture(params=list(arch_table.TOWERS), scope="module")
def pair(tmp_path_factory, request) -> dict[str, Path]:
    """Base and checkpoint of a type, with the vision tower and without."""
    found, tmp_path = {}, tmp_path_factory.mktemp(request.param)
    for seed, name in enumerate(("base", "checkpoint-5")):
        found[f"whole-{name}"] = save_tiny(request.param, tmp_path / "whole" / name, seed=seed, dtype="bfloat16")
        found[f"text-{name}"] = text_only(found[f"whole-{name}"], tmp_path / "text" / name)
    return found


def numbers(base: Path, checkpoint: Path):
    found = compare.changes(refs.model(base), [refs.model(checkpoint)], details=True)[5]
    return {
        (layer, name): (change.mean_abs, change.relative, change.max_abs, change.cosine_distance)
        for layer, here in found.items()
        for name, change in here.items()
    }


def test_changes(pair):
    whole = numbers(pair["whole-base"], pair["whole-checkpoint-5"])
    assert len(whole) >= 12 and all(mean > 0.01 for mean, *_ in whole.values())
    assert numbers(pair["whole-base"], pair["text-checkpoint-5"]) == whole
    assert numbers(pair["text-base"], pair["whole-checkpoint-5"]) == whole
    assert numbers(pair["text-base"], pair["text-checkpoint-5"]) == whole
    left = compare.diff_tensors(refs.model(pair["whole-base"]), refs.model(pair["text-checkpoint-5"]))
    assert 0 < len(left) < 8 and all(why.endswith("not in the checkpoint") for why in left.values())


@pytest.mark.parametrize("pair", KINDS, indirect=True, scope="module")
@pytest.mark.parametrize("sides", [("whole", "text"), ("text", "whole")])
def test_swaps(pair, tmp_path, sides):
    """What is written is what a swap with the base in the target's own layout writes; in memory the same."""
    target = pair[f"{sides[1]}-checkpoint-5"]
    own, config = read_tensors(target), refs.model(target).config()
    arch = archs.for_config(config)
    attention = next(layer for layer in range(3) if arch.has(config, layer, archs.ATTENTION[:1]))
    for kind in ("layers", "attention"):
        found = []
        for base in (pair[f"{side}-base"] for side in sides):
            with surgery.Pair(refs.model(base), refs.model(target)) as both:
                if kind == "layers":
                    recipe = surgery.layers_from_base(both, [0, 2])
                else:
                    recipe = surgery.parts_from_base(both, archs.ATTENTION, [attention])
                out = tmp_path / f"{kind}-{base.parent.name}"
                on_disk.write_model(both, recipe, out)
                found.append(read_tensors(out))
                model = loading.load_model(refs.model(target), torch.float32, CPU)
                with in_memory.apply(model, recipe, both) as swapped:
                    held = {key: tensor.clone() for key, tensor in swapped.state_dict().items()}
            written = loading.load_model(refs.model(out), torch.float32, CPU).state_dict()
            assert all(torch.equal(tensor, written[key]) for key, tensor in held.items())
        assert list(found[0]) == list(found[1]) == list(own)
        assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
        moved = {name for name, tensor in own.items() if not torch.equal(found[0][name], tensor)}
        assert len(moved) >= (12 if kind == "layers" else 1)
        assert {arch.layer_of(name) for name in moved} == ({0, 2} if kind == "layers" else {attention})
        assert (out / "config.json").read_bytes() == (target / "config.json").read_bytes()


def adapt(trained: Path, named: Path, folder: Path, vocabulary: int | None = None, **settings) -> dict:
    """An adapter as PEFT writes it for `trained`, which names `named` as its base; the merged model's tensors."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.bfloat16)
    if vocabulary:
        model.resize_token_embeddings(vocabulary)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    model = peft.get_peft_model(model, config)
    model.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(named)}))
    return model.merge_and_unload().state_dict()


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_the_language_model_whose_base_has_a_tower(tmp_path):
    """As PEFT writes it where the text class was loaded from the whole model: names without the tower's."""
    base = save_tiny("gemma3", tmp_path / "base", dtype="bfloat16", tokenizer=False)
    text, saved = text_only(base, tmp_path / "text"), ["embed_tokens", "lm_head"]
    merged = adapt(text, base, tmp_path / "adapter", 290, target_modules="all-linear", modules_to_save=saved)
    arch, of_text = archs.ARCHS["gemma3"], archs.ARCHS["gemma3_text"]
    truth = {of_text.canonical(name): tensor for name, tensor in merged.items()}
    held = read_tensors(base)
    with opening.open_folder(tmp_path / "adapter") as stored:
        assert set(stored.names()) == {*held, "lm_head.weight"} and len(stored.changes) == 3 * 7 + 2
        for name in stored.names():
            tensor = truth.get(arch.canonical(name), held.get(name))
            assert torch.equal(stored.get(name), tensor), name
    config = refs.model(tmp_path / "adapter").config()
    assert config["text_config"]["vocab_size"] == 290 and config["tie_word_embeddings"] is False
    loaded = loading.load_model(refs.model(tmp_path / "adapter"), torch.float32, CPU)
    assert torch.equal(loaded.lm_head.weight, truth["lm_head.weight"].float())


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_the_whole_model_on_its_language_model(tmp_path):
    """Its base is not here any more, but its language model is: the names of the adapter are the whole model's."""
    base = save_tiny("gemma3", tmp_path / "base", dtype="bfloat16", tokenizer=False)
    text = text_only(base, tmp_path / "text")
    merged = adapt(base, text, tmp_path / "adapter", target_modules=r".*language_model.*(q_proj|down_proj)")
    arch, of_text = archs.ARCHS["gemma3"], archs.ARCHS["gemma3_text"]
    truth = {arch.canonical(name): tensor for name, tensor in merged.items()}
    with opening.open_folder(tmp_path / "adapter") as stored:
        assert len(stored.changes) == 3 * 2
        for name in stored.names():
            assert torch.equal(stored.get(name), truth[of_text.canonical(name)]), name


def test_other_text_models_are_refused(tmp_path):
    wrapper = save_tiny("gemma3", tmp_path / "a", tokenizer=False)
    other = save_tiny("gemma2", tmp_path / "b", tokenizer=False)
    with pytest.raises(
        InputError, match=r"is a gemma3 and .* a gemma2; base and checkpoints must have the same architecture"
    ):
        compare.changes(refs.model(wrapper), [refs.model(other)])
    with pytest.raises(InputError, match=r"is a gemma2 and .* a gemma3; .* must have the same architecture"):
        surgery.Pair(refs.model(other), refs.model(wrapper))


def test_the_script_names_the_tower_in_one_line(tmp_path, capsys):
    base = save_tiny("gemma3", tmp_path / "base", tokenizer=False)
    text = text_only(save_tiny("gemma3", tmp_path / "w", seed=1, tokenizer=False), tmp_path / "run/checkpoint-5")
    script = load_script("weight-diff/attn_vs_ffn.py")
    script.main(["--base-model", str(base), "--ckpt-model", str(text.parent), "--output", str(tmp_path / "o.json")])
    said = capsys.readouterr().out.splitlines()
    assert sum("not compared: vision_tower.* (" in line and "not in the checkpoint)" in line for line in said) == 1
    assert sum("not compared" in line for line in said) <= 3
