"""LoRA adapters as checkpoints: every number equals that of the merged model saved as a folder."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from helpers import load_script, read_tensors, save_tiny
from safetensors.torch import load_file, save_file

from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import identity, opening, refs, relatives, tokenization
from cpt_utils.checkpoints import merged as merging

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GPT2 = ("c_attn", "c_proj", "c_fc")
EMBEDDINGS = {"gpt2": "transformer.wte", "gpt_neox": "gpt_neox.embed_in"}


def save_adapter(base: Path, folder: Path, targets=ALL, rank=4, seed=0, memory=None, whole=(), **settings) -> Path:
    """An adapter with random A and B for every module of `base` whose name ends in one of `targets`, in PEFT's files.

    `memory`: names in the base's state dict, where those on disk differ. `whole`: tensors that are replaced.
    """
    draw = torch.Generator().manual_seed(seed)
    held = read_tensors(base)
    ranks = settings.get("rank_pattern", {})
    own = {}
    for disk, weight in held.items():
        name = (memory or {}).get(disk, disk)
        module = name.removesuffix(".weight")
        if weight.dim() != 2 or not module.endswith(tuple(targets)):
            continue
        r = next((value for key, value in ranks.items() if module.endswith(key)), rank)
        outputs, inputs = weight.shape[::-1] if settings.get("fan_in_fan_out") else weight.shape
        own[f"base_model.model.{module}.lora_A.weight"] = torch.randn(r, inputs, generator=draw)
        own[f"base_model.model.{module}.lora_B.weight"] = torch.randn(outputs, r, generator=draw) * 0.05
    for name, shape in dict(whole).items():
        own[f"base_model.model.{name}"] = torch.randn(shape, generator=draw)
    folder.mkdir(parents=True)
    save_file(own, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "base_model_name_or_path": str(base), "r": rank, "lora_alpha": 16, "bias": "none",
        "target_modules": list(targets), "inference_mode": True, "task_type": "CAUSAL_LM", "lora_dropout": 0.1,
        "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
        "fan_in_fan_out": False, "init_lora_weights": True, "revision": None, "loftq_config": {},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return folder


def merged(base: Path, adapter: Path, memory=None) -> dict[str, torch.Tensor]:
    """The slow obvious way: the whole model, one product after the other; by the base's names on disk."""
    held, own = read_tensors(base), load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    disk = {(memory or {}).get(name, name): name for name in held}
    for name, tensor in own.items():
        module = name.removeprefix("base_model.model.")
        if module.endswith(".lora_A.weight"):
            module = module.removesuffix(".lora_A.weight")
            r = len(tensor)
            alpha = next((v for k, v in config["alpha_pattern"].items() if module.endswith(k)), config["lora_alpha"])
            scale = alpha / (math.sqrt(r) if config["use_rslora"] else r)
            change = (own[name.replace("lora_A", "lora_B")].float() @ tensor.float()) * scale
            weight = held[disk[f"{module}.weight"]]
            change = change.T if config["fan_in_fan_out"] else change
            held[disk[f"{module}.weight"]] = (weight.float() + change).to(weight.dtype)
        elif ".lora_" not in module:
            place = disk[module.replace(".base_layer", "")]
            held[place] = tensor.to(held[place].dtype)
    return held


def save_merged(base: Path, adapter: Path, folder: Path) -> Path:
    """The merged model as a complete folder."""
    held = merged(base, adapter)
    folder.mkdir(parents=True)
    for path in base.iterdir():
        if path.suffix not in (".safetensors", ".bin"):
            (folder / path.name).write_bytes(path.read_bytes())
    embeddings = held["model.embed_tokens.weight"]
    config = json.loads((base / "config.json").read_text()) | {"vocab_size": len(embeddings)}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_equal(adapter, truth: dict[str, torch.Tensor]) -> None:
    with opening.open_folder(adapter) as stored:
        assert stored.kind == "adapter" and sorted(stored.names()) == sorted(truth)
        for name, tensor in truth.items():
            assert stored.shape(name) == tuple(tensor.shape) and stored.dtype(name) == tensor.dtype and name in stored
            found = stored.get(name)
            tight = {"rtol": 0, "atol": 0} if found.shape[0] <= merging.ROWS else {}
            torch.testing.assert_close(found, tensor, **tight)
            for start, stop in ((0, 1), (3, 7), (0, found.shape[0])):
                assert torch.equal(stored.rows(name, start, stop), found[start:stop])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"mlp.up_proj": 2, "q_proj": 6}, "alpha_pattern": {"mlp.up_proj": 3.5}},
        {"targets": ("v_proj",), "init_lora_weights": "gaussian"},
    ],
)
def test_every_tensor_is_that_of_the_merged_model(tmp_path, settings, dtype):
    base = save_tiny("llama", tmp_path / "base", dtype=dtype, shards=2)
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    truth = merged(base, adapter)
    changed = sum(not torch.equal(truth[name], tensor) for name, tensor in read_tensors(base).items())
    assert changed == 3 * len(settings.get("targets", ALL))
    assert_equal(adapter, truth)


def test_a_tensor_of_many_rows_has_the_same_bits_however_it_is_read(tmp_path):
    base = save_tiny("llama", tmp_path / "base", dtype="bfloat16", intermediate_size=700, tokenizer=False)
    adapter = save_adapter(base, tmp_path / "adapter", rank=8)
    truth = merged(base, adapter)
    name = "model.layers.1.mlp.up_proj.weight"
    with opening.open_folder(adapter) as stored:
        whole = stored.get(name)
        torch.testing.assert_close(whole, truth[name])
        for start, stop in ((0, 700), (255, 257), (300, 690), (699, 700), (690, 900), (5, 5)):
            assert torch.equal(stored.rows(name, start, stop), whole[start:stop])


@pytest.mark.parametrize(
    ("model_type", "targets", "settings"),
    [
        ("phi3", ("qkv_proj", "o_proj", "gate_up_proj"), {}),
        ("gpt_neox", ("query_key_value", "dense_4h_to_h"), {}),
        ("gpt2", GPT2, {"fan_in_fan_out": True}),
        ("qwen2", ("q_proj", "down_proj"), {"bias": "lora_only"}),
    ],
)
def test_fused_and_transposed_modules(tmp_path, model_type, targets, settings):
    from transformers import AutoModelForCausalLM

    base = save_tiny(model_type, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    from cpt_utils.architectures import archs

    places = archs.for_config(refs.model(base).config()).locations(read_tensors(base), model)
    memory = {disk: place.name for disk, place in places.items()}
    whole = {}
    if settings.get("bias"):  # trained biases replace the base's; they are saved below `base_layer`
        whole = {"model.layers.0.self_attn.q_proj.base_layer.bias": (32,)}
    adapter = save_adapter(base, tmp_path / "adapter", targets, memory=memory, whole=whole, **settings)
    assert_equal(adapter, merged(base, adapter, memory))


@pytest.mark.parametrize("model_type", ["gemma3", "mixtral", "qwen3_moe", "bloom", "opt", "gptj", "phi3"])
def test_a_loaded_adapter_of_every_linear_module(tmp_path, model_type):
    """Names as PEFT takes them, from the modules in memory, where those on disk may differ."""
    from cpt_utils.architectures import archs
    from cpt_utils.models import loading

    base = save_tiny(model_type, tmp_path / "base", tokenizer=False)
    model = loading.load_model(refs.model(base), torch.float32, torch.device("cpu"))
    arch = archs.for_config(refs.model(base).config())
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    linear = [name for name in linear if arch.layer_of(f"{name}.weight") is not None]
    adapter = save_adapter(base, tmp_path / "adapter", ())
    own = {}
    for name in linear:
        outputs, inputs = model.get_submodule(name).weight.shape
        own[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, inputs)
        own[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, 4)
    save_file(own, adapter / "adapter_model.safetensors")
    ours = loading.load_model(refs.model(adapter), torch.float32, torch.device("cpu"))
    for name, weight in model.state_dict().items():
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{stem}A.weight" in own:
            weight = weight + own[f"{stem}B.weight"] @ own[f"{stem}A.weight"] * 4
        assert torch.equal(ours.state_dict()[name], weight)
    assert len(linear) >= 12


def test_an_adapter_of_experts_that_are_fused_in_memory(tmp_path):
    """As older releases trained it, a product for each expert: on disk a tensor, in memory a part of one."""
    from cpt_utils.models import loading

    base = save_tiny("mixtral", tmp_path / "base", tokenizer=False)
    adapter = save_adapter(base, tmp_path / "adapter", ("w1", "w2", "w3", "q_proj"))
    truth = merged(base, adapter)
    assert sum(not torch.equal(truth[name], tensor) for name, tensor in read_tensors(base).items()) > 3 * 4
    assert_equal(adapter, truth)
    saved = tmp_path / "merged"
    saved.mkdir()
    (saved / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(truth, saved / "model.safetensors", metadata={"format": "pt"})
    ours, wanted = (loading.load_model(refs.model(f), torch.float32, torch.device("cpu")) for f in (adapter, saved))
    for name, weight in wanted.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight)


def test_embeddings_and_head_trained_whole_with_new_tokens(tmp_path):
    base = save_tiny("llama", tmp_path / "base", dtype="bfloat16")
    whole = {"model.embed_tokens.weight": (280, 32), "lm_head.weight": (280, 32)}
    adapter = save_adapter(
        base, tmp_path / "adapter", ("q_proj",), whole=whole, modules_to_save=["embed_tokens", "lm_head"]
    )
    assert_equal(adapter, merged(base, adapter))
    ref = refs.model(adapter)
    assert ref.config() == refs.model(base).config() | {"vocab_size": 280}
    from cpt_utils.models import loading

    saved = save_merged(base, adapter, tmp_path / "merged")
    ids = torch.tensor([[1, 5, 279]])
    ours, truth = (loading.load_model(refs.model(f), torch.float32, torch.device("cpu")) for f in (adapter, saved))
    assert torch.equal(ours(ids).logits, truth(ids).logits)
    assert ours.config.vocab_size == 280 and not any(p.requires_grad for p in ours.parameters())


def test_low_rank_embeddings(tmp_path, capsys):
    base = save_tiny("llama", tmp_path / "base", tie_word_embeddings=True)
    weight = read_tensors(base)["model.embed_tokens.weight"]
    a, b = torch.randn(4, len(weight)), torch.randn(32, 4)
    adapter = save_adapter(base, tmp_path / "adapter", ())
    stem = "base_model.model.model.embed_tokens.lora_embedding_"
    save_file({f"{stem}A": a, f"{stem}B": b}, adapter / "adapter_model.safetensors")
    with opening.open_folder(adapter) as stored:
        torch.testing.assert_close(stored.get("model.embed_tokens.weight"), weight + (b @ a).T * 4)
    assert "ties its output matrix to its embeddings" in capsys.readouterr().err


def test_pickled_and_half_precision_adapters(tmp_path):
    base = save_tiny("llama", tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    own = {name: tensor.bfloat16() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(own, adapter / "adapter_model.safetensors")
    truth = merged(base, adapter)
    torch.save(own, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert_equal(adapter, truth)


def test_an_adapter_describes_itself_and_its_base(tmp_path):
    base = save_tiny("llama", tmp_path / "base")
    found = []
    for number, settings in enumerate([{}, {"seed": 1}, {"lora_alpha": 8}, {}]):
        ref = refs.model(save_adapter(base, tmp_path / f"run{number}" / "checkpoint-5", **settings))
        assert ref.is_adapter and ref.step == 5 and ref.config() == refs.model(base).config()
        facts = ref.describe()
        assert facts["adapter_of"]["weights_sample"] == identity.weights_sample(base) and facts["config_sha256"]
        found.append(facts["weights_sample"])
    assert found[0] == found[3] and len(set(found)) == 3
    save_tiny("llama", tmp_path / "base", seed=9)  # the same adapter of other weights is another model
    assert refs.model(tmp_path / "run0" / "checkpoint-5").describe()["weights_sample"] != found[0]
    assert tokenization.tokenizer_folder(refs.model(tmp_path / "run0" / "checkpoint-5")) == base


def test_a_run_of_adapters(tmp_path):
    base = save_tiny("llama", tmp_path / "base")
    for step in (10, 2):
        save_adapter(base, tmp_path / "run" / f"checkpoint-{step}")
    assert [ref.step for ref in refs.run(tmp_path / "run")] == [2, 10]
    assert [ref.step for ref in refs.models(tmp_path / "run")] == [2, 10]
    save_adapter(base, tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        path.rename(tmp_path / "run" / path.name)
    assert [ref.step for ref in refs.models(tmp_path / "run")] == [
        2,
        10,
    ]  # the last adapter beside them, as with models


def test_the_base_that_is_not_here(tmp_path, capsys):
    base = save_tiny("llama", tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", base_model_name_or_path="/where/it/was/trained")
    ref = refs.model(adapter)
    with pytest.raises(InputError, match="adapter of /where/it/was/trained, which is not here; write the path"):
        ref.config()
    given = ref.with_base(refs.model(base))
    assert given.config()["model_type"] == "llama" and given.describe()["adapter_of"]["spec"] == str(base)
    with opening.open_folder(ref, refs.model(base)) as stored:
        truth = merged(base, adapter)
        assert torch.equal(stored.get("model.layers.0.mlp.up_proj.weight"), truth["model.layers.0.mlp.up_proj.weight"])
    assert "is used instead" in capsys.readouterr().out
    # The base that the adapter names wins over the one a script compares with: merged elsewhere it means nothing.
    other = save_tiny("llama", tmp_path / "other", seed=5)
    own = save_adapter(base, tmp_path / "own")
    with opening.open_folder(own, refs.model(other)) as stored:
        assert stored.base_ref.spec == str(base)


def test_a_base_named_by_a_path_from_where_the_adapter_was_trained(tmp_path, monkeypatch):
    base = save_tiny("llama", tmp_path / "mine" / "models" / "base")
    named = save_adapter(base, tmp_path / "mine" / "run" / "checkpoint-5", base_model_name_or_path="models/base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for spec in (named, "../mine/run/checkpoint-5"):
        assert os.path.samefile(refs.model(spec).adapted.spec, base)
    here = save_tiny("llama", tmp_path / "elsewhere" / "models" / "base", seed=5)
    assert os.path.samefile(refs.model(named).adapted.spec, here)  # as PEFT reads it, where that is a folder


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("unsloth/llama-3-8b-bnb-4bit", "unsloth/llama-3-8b"),
        ("unsloth/gemma-3-4b-it-unsloth-bnb-4bit", "unsloth/gemma-3-4b-it"),
        ("TheBloke/Llama-2-7B-GPTQ", "TheBloke/Llama-2-7B"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen2.5-7B-AWQ", "Qwen/Qwen2.5-7B"),
        ("/trained/on/base-bnb-4bit", "/trained/on/base"),
    ],
)
def test_a_quantised_base_by_its_name(tmp_path, monkeypatch, name, original):
    """Not here, and the hub is not asked for more than its configuration: what to give instead is said at once."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = save_tiny("llama", tmp_path / "base", tokenizer=False)
    ref = refs.model(save_adapter(base, tmp_path / "adapter", base_model_name_or_path=name))
    said = f"is an adapter of {name}, which is quantised; write the 16-bit model that it was made from "
    said += rf"\(by its name {original}\) into base_model_name_or_path of its adapter_config.json"
    with pytest.raises(InputError, match=said):
        ref.config()
    assert ref.with_base(refs.model(base)).config() == refs.model(base).config()


@pytest.mark.parametrize(
    "stated",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization": {"group_size": 64, "bits": 4}},
    ],
)
def test_a_quantised_base_by_its_files(tmp_path, stated, capsys):
    """Its name says nothing. A configuration that has outlived the codes does not count."""
    base = save_tiny("llama", tmp_path / "base", tokenizer=False)
    adapter = save_adapter(base, tmp_path / "adapter")
    truth = merged(base, adapter)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | stated))
    assert_equal(adapter, truth)
    held = read_tensors(base)
    name = "model.layers.0.mlp.up_proj.weight"
    held[name] = torch.randint(0, 255, (held[name].numel() // 2, 1), dtype=torch.uint8)
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="which is quantised; write the 16-bit model that it was made from into base_"):
        opening.open_folder(adapter)
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"is an adapter of a quantised base.*base_model_name_or_path of its adapter"):
        opening.open_folder(adapter)


def test_adapters_in_sub_folders_are_named(tmp_path):
    base = save_tiny("llama", tmp_path / "base", tokenizer=False)
    for name in ("second", "first"):
        save_adapter(base, tmp_path / "run/checkpoint-10" / name)
    given = "its sub-folders first, second; give .*checkpoint-10/first, or, for a run, move the files of one adapter up"
    with pytest.raises(InputError, match=given):
        refs.run(tmp_path / "run")[0].config()
    assert refs.model(tmp_path / "run/checkpoint-10/first").config()["model_type"] == "llama"


def config_with(**changes):
    def change(folder, base):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def tensors_with(change):
    def apply(folder, base):
        own = load_file(folder / "adapter_model.safetensors")
        change(own)
        save_file(own, folder / "adapter_model.safetensors")

    return apply


STEM = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (config_with(peft_type="IA3"), "adapter of type IA3; only LORA is merged"),
        (config_with(use_dora=True), "sets use_dora, which is not merged here"),
        (config_with(target_parameters=["experts.gate_up_proj"]), "sets target_parameters"),
        (config_with(trainable_token_indices=[1, 1]), "must be lists of distinct row numbers"),
        (config_with(trainable_token_indices={"embed_tokens": -1}), "must be lists of distinct row numbers"),
        (config_with(modules_to_save=["embed_tokens"]), "embed_tokens whole, but its file holds no tensor of it"),
        (config_with(layer_replication=[[0, 2]]), "sets layer_replication"),
        (config_with(something_new={"a": 1}), "sets something_new"),
        (config_with(init_lora_weights="pissa"), "sets init_lora_weights 'pissa'"),
        (config_with(r=3), "has rank 4, and its configuration says 3"),
        (config_with(r=0), "must be positive numbers"),
        (config_with(lora_alpha="16"), "must be positive numbers"),
        (config_with(rank_pattern=[1]), "must be positive numbers"),
        (config_with(alpha_pattern={"(": 2}), "is not a regular expression"),
        (config_with(target_modules=["q_proj", "k_proj", "lm_head"]), "targets lm_head, but its file holds no tensor"),
        (config_with(base_model_name_or_path=None), "a base that it does not name; write the path of its base"),
        (config_with(base_model_name_or_path=7), "is not the name of a model"),
        (tensors_with(lambda own: own.pop(f"{STEM}.lora_A.weight")), "only one of A and B of model.layers.0"),
        (tensors_with(lambda own: own.update({f"{STEM}.lora_A.weight": torch.ones(4, 31)})), r"\[32, 31\], and .* has"),
        (tensors_with(lambda own: own.update({f"{STEM}.lora_B.weight": torch.ones(32, 3)})), "cannot be multiplied"),
        (tensors_with(lambda own: own.update({f"{STEM}.lora_magnitude_vector": torch.ones(32)})), "not merged here"),
        (tensors_with(lambda own: own.update({"base_model.model.x.weight": torch.ones(2)})), "does not have"),
        (tensors_with(lambda own: own.update({f"{STEM}.weight": torch.ones(32, 32)})), "changes .*q_proj.weight twice"),
        (tensors_with(lambda own: own.update({f"{STEM}.bias": torch.ones(32)})), "q_proj.bias, which .* does not have"),
        (lambda folder, base: (folder / "adapter_model.safetensors").unlink(), "but no adapter_model.safetensors"),
        (lambda folder, base: (folder / "adapter_config.json").write_text("["), "is not valid JSON"),
        (lambda folder, base: (folder / "adapter_config.json").write_text("[]"), "does not hold a configuration"),
    ],
)  # fmt: skip
def test_what_is_not_merged_is_refused(tmp_path, change, match):
    base = save_tiny("llama", tmp_path / "base", tokenizer=False)
    folder = save_adapter(base, tmp_path / "adapter")
    change(folder, base)
    with pytest.raises(InputError, match=match) as caught:
        opening.open_folder(folder)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_an_adapter_and_a_folder_with_both(tmp_path):
    base = save_tiny("llama", tmp_path / "base", tokenizer=False)
    first = save_adapter(base, tmp_path / "first")
    second = save_adapter(base, tmp_path / "second", base_model_name_or_path=str(first))
    with pytest.raises(InputError, match="which is an adapter itself; merge that one first"):
        opening.open_folder(second)
    both = save_tiny("llama", tmp_path / "both", tokenizer=False)
    (both / "adapter_config.json").write_bytes((first / "adapter_config.json").read_bytes())
    assert not refs.model(both).is_adapter and opening.open_folder(both).kind == "safetensors"


# --- whole scripts: adapters, and the same models merged by hand ---


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A run of two adapters and the run of the merged models, of one base; beside them two text files."""
    base = save_tiny("llama", tmp_path / "base", dtype="bfloat16")
    for step in (3, 12):
        name = f"checkpoint-{step}"
        adapter = save_adapter(base, tmp_path / "adapters" / name, seed=step)
        save_merged(base, adapter, tmp_path / "merged" / name)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("".join(f"sentence {n} in language {name}\n" for n in range(12)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_weight_change(runs):
    script = load_script("weight-diff/attn_vs_ffn.py")
    for kind in ("adapters", "merged"):
        script.main(["--base-model", "base", "--ckpt-model", kind, "--output", f"{kind}.json"])
    ours, truth = (json.loads((runs / f"{kind}.json").read_text())["checkpoints"] for kind in ("adapters", "merged"))
    assert ours == truth and truth["12"]["summary"]["attn"] > 0


def test_retrieval(runs):
    script = load_script("sentence-retrieval/sr_experiment.py")
    found = []
    for kind in ("adapters", "merged"):
        script.main(
            ["--model_path", kind, "--base", "eng_Latn", "--target", "gle_Latn", "--source", "text", "--base-file",
             "a.txt", "--target-file", "b.txt", "--artifact-out", kind + "-sr"]
        )  # fmt: skip
        folder = runs / f"{kind}-sr" / "eng_Latn-gle_Latn"
        found.append([json.loads((folder / f"{kind}__checkpoint-{step}.json").read_text()) for step in (3, 12)])
        found[-1].append(json.loads((folder / "untrained.json").read_text()))
    for ours, truth in zip(*found, strict=True):
        assert ours["layer_accuracy"] == truth["layer_accuracy"]
        assert ours["centred_accuracy"] == truth["centred_accuracy"]


def test_layer_swap(runs):
    (runs / "layers.json").write_text(json.dumps({"interface_layers": [0, 2]}))
    script = load_script("layer-swap/layer-swap.py")
    for kind in ("adapters", "merged"):
        script.main(["base", f"{kind}/checkpoint-12", "layers.json", "-o", f"{kind}-swap", "--methods", "semantic_hub"])
    ours, truth = (runs / f"{kind}-swap" / "semantic_hub" for kind in ("adapters", "merged"))
    found, wanted = read_tensors(ours), read_tensors(truth)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    base = read_tensors(runs / "base")
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], base["model.layers.1.mlp.up_proj.weight"])
    assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])
    assert refs.model(ours).config() == refs.model(truth).config() and tokenization.has_tokenizer(ours)


def test_a_swap_into_an_adapter_with_new_tokens(tmp_path):
    from helpers import tiny_tokenizer

    from cpt_utils.interventions import on_disk, surgery

    base = save_tiny("llama", tmp_path / "base")
    whole = {"model.embed_tokens.weight": (280, 32), "lm_head.weight": (280, 32)}
    adapter = save_adapter(base, tmp_path / "adapter", ("q_proj",), whole=whole)
    tiny_tokenizer().save_pretrained(adapter)
    with surgery.Pair(refs.model(base), refs.model(adapter)) as pair:
        on_disk.write_model(pair, surgery.layers_from_base(pair, [1]), tmp_path / "out")
    truth = merged(base, adapter) | {n: t for n, t in read_tensors(base).items() if "layers.1." in n}
    found = read_tensors(tmp_path / "out")
    assert found.keys() == truth.keys() and all(torch.equal(found[name], truth[name]) for name in truth)
    assert refs.model(tmp_path / "out").config()["vocab_size"] == 280


def test_new_embeddings_need_a_new_output_matrix(tmp_path):
    """Else its new rows would be random, and another number in every run."""
    base = save_tiny("llama", tmp_path / "base", tie_word_embeddings=False)
    one = save_adapter(base, tmp_path / "one", whole={"model.embed_tokens.weight": (280, 32)})
    with pytest.raises(InputError, match=r"embed_tokens.weight of 280 rows and lm_head.weight of 272 rows"):
        opening.open_folder(refs.model(one)).names()


def test_a_hub_adapter_of_a_base_that_was_trained_again_is_another_model():
    one = {"model_id": "a__b", "revision": "1", "adapter_of": {"model_id": "base", "weights_sample": "x"}}
    assert relatives.same_model(one, one)
    assert not relatives.same_model(one, one | {"adapter_of": {"model_id": "base", "weights_sample": "y"}})
    assert not relatives.same_model(one, one | {"adapter_of": None})
