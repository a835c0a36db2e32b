"""What lies in model folders and is no plain weight: refused by its name, alike in comparisons, swaps and loads."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import read_tensors, save_tiny, tiny_tokenizer
from safetensors.torch import save_file

from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import opening, refs, tokenization
from cpt_utils.interventions import on_disk, surgery
from cpt_utils.measures import compare
from cpt_utils.models import loading

CPU = torch.device("cpu")
F8 = torch.float8_e4m3fn
LAYER = "model.layers.0.self_attn.q_proj"


def changes(base, ckpt):
    return compare.changes(refs.model(base), refs.run(ckpt))


def pair(base, ckpt):
    surgery.Pair(base, ckpt).close()


def load(folder):
    return loading.load_model(refs.model(folder), torch.float32, CPU)


def refused(call, *args, match=None):
    with pytest.raises(InputError, match=match) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def everywhere(plain, folder, match, swaps_and_loads=True):
    """The same refusal by comparing (on either side), swapping (on either side) and loading."""
    said = {refused(changes, plain, folder, match=match), refused(changes, folder, plain, match=match)}
    if swaps_and_loads:
        said |= {refused(pair, plain, folder, match=match), refused(pair, folder, plain, match=match)}
        said |= {refused(load, folder, match=match)}
    assert len(said) == 1
    return said.pop()


def rewrite(folder, change, to=None, **config):
    """The model in `folder` with each projection's tensor replaced by those that `change(weight)` names."""
    if to is not None:
        shutil.copytree(folder, to, dirs_exist_ok=True)
        folder = to
    found = {}
    for name, tensor in read_tensors(folder).items():
        if name.endswith("_proj.weight"):
            stem = name.removesuffix(".weight")
            found |= {f"{stem}.{end}": value.contiguous() for end, value in change(tensor.float()).items()}
        else:
            found[name] = tensor
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, **config)
    return folder


def edit(folder, **config):
    file = folder / "config.json"
    values = json.loads(file.read_text()) | config
    file.write_text(json.dumps({key: value for key, value in values.items() if value != "drop"}))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("formats") / "plain", dtype="bfloat16", layers=2)


# ---------------------------------------------------------------- Git LFS

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 5368709120\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model-00002-of-00003.safetensors"])
def test_pointers(plain, tmp_path, name):
    folder = save_tiny("llama", tmp_path / "m", layers=2, dtype="bfloat16", shards=3 if "-of-" in name else 1)
    (folder / name).write_text(POINTER)
    everywhere(plain, folder, f"m/{name} is a Git LFS pointer.*git lfs pull")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json"])
def test_pointers_of_other_weights(plain, tmp_path, name):
    folder = shutil.copytree(plain, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    everywhere(plain, folder, f"m/{name} is a Git LFS pointer")


def test_pointers_of_the_tokenizer(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "m")
    (folder / "tokenizer.model").write_text(POINTER)  # not read where tokenizer.json is whole
    assert tokenization.load_tokenizer(refs.model(folder))("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]
    (folder / "tokenizer.json").write_text(POINTER)
    refused(tokenization.load_tokenizer, refs.model(folder), match="tokenizer.json is a Git LFS pointer")
    with surgery.Pair(plain, folder) as both:  # a swap copies it
        recipe = surgery.layers_from_base(both, [0])
        refused(on_disk.write_model, both, recipe, tmp_path / "out", match="tokenizer.json is a Git LFS pointer")
    assert not (tmp_path / "out").exists()
    (folder / "tokenizer.json").unlink()
    refused(tokenization.load_tokenizer, refs.model(folder), match="tokenizer.model is a Git LFS pointer")


# ---------------------------------------------------------------- other formats, shards, names


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["consolidated.safetensors", "params.json"], "consolidated.safetensors, the format of Mistral and Meta"),
        (["consolidated.00.pth", "consolidated.01.pth"], "consolidated.00.pth, the format of Mistral and Meta"),
        (["m-Q4_K_M.gguf"], r'llama.cpp; .*gguf_file="m-Q4_K_M.gguf"\).save_pretrained'),
        (["tf_model.h5"], "tf_model.h5, which is not read here"),
        (["pytorch_model_fsdp.bin"], r"mv \S+pytorch_model_fsdp.bin \S+pytorch_model.bin"),
        (["pytorch_model_fsdp_0/__0_0.distcp"], "only FSDP shards.*accelerate merge-weights"),
        (["__0_0.distcp", ".metadata"], "only FSDP shards"),
        (["global_step10/mp_rank_00_model_states.pt", "latest"], "only DeepSpeed shards.*zero_to_fp32.py"),
        (["zero_to_fp32.py"], "only DeepSpeed shards"),
        (["mp_rank_00/model_optim_rng.pt"], "only Megatron shards"),
        (["hf/model.safetensors"], r"in its folder hf: give \S+m/hf"),
        (["huggingface/model.safetensors.index.json", "optimizer.pt"], "in its folder huggingface"),
        (["a/model.safetensors", "b/pytorch_model.bin"], r"in its folder a \(also b\)"),
        (["model-00001-of-00001.safetensors"], "the only shard, rename it: model.safetensors"),
        (["pytorch_model-00001-of-00001.bin"], "the only shard, rename it: pytorch_model.bin"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "2 shards but no .*index.json"),
        (["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"], "of 00003 shards number 2 is m"),
        (["model.fp16.safetensors"], "model.fp16.safetensors, a name under which.*rename it: model.safetensors"),
        (["ckpt.pt"], "ckpt.pt, a name under which no loader looks"),
        (["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"], "holds no weights"),
    ],
)  # fmt: skip
def test_folders_of_other_things(plain, tmp_path, names, match):
    folder = tmp_path / "m"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    shutil.copyfile(plain / "config.json", folder / "config.json")
    everywhere(plain, folder, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda n: f"_orig_mod.{n}", "wrapper.*_orig_mod is from torch.compile"),
        (lambda n: n.replace("model.layers", "model._orig_mod.layers"), "_orig_mod is from torch.compile"),
        (lambda n: f"module.{n}", "module is from DataParallel"),
        (lambda n: f"base_model.model.{n}", "base_model is from PEFT"),
        (lambda n: n.replace("q_proj.", "q_proj.base_layer."), "base_layer is from PEFT"),
        (lambda n: f"_fsdp_wrapped_module.{n}", "_fsdp_wrapped_module is from FSDP"),
        (lambda n: n.replace(".mlp", "._checkpoint_wrapped_module.mlp"), "activation checkpointing"),
        (lambda n: f"_forward_module.{n}", "Lightning"),
        (lambda n: f"model.{n}", r"called model.model.embed_tokens.weight instead .*remove 'model.'"),
        (lambda n: f"actor.{n}", "remove 'actor.'"),
    ],
)  # fmt: skip
def test_names_of_wrappers(plain, tmp_path, change, match):
    folder = shutil.copytree(plain, tmp_path / "m")
    renamed = {change(name): tensor for name, tensor in read_tensors(folder).items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    everywhere(plain, folder, match)


def test_models_without_their_head_keep_their_names(plain, tmp_path):
    """AutoModel saves no prefix: those names are no wrapper's."""
    folder = shutil.copytree(plain, tmp_path / "m")
    held = {n.removeprefix("model."): t for n, t in read_tensors(folder).items() if not n.startswith("lm_head")}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    assert changes(plain, folder)[0][0]["q_proj"].sum_abs == 0


def test_the_page_says_how_to_take_a_prefix_off(plain, tmp_path, monkeypatch):
    from helpers import ROOT

    folder = shutil.copytree(plain, tmp_path / "m")
    held = {f"module.{name}": tensor for name, tensor in read_tensors(folder).items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    shards = shutil.copytree(save_tiny("llama", tmp_path / "s", layers=2, shards=3), tmp_path / "again")
    (shards / "model.safetensors.index.json").unlink()
    code = (ROOT / "docs" / "checkpoints.md").read_text().split("```python\n")
    for block, where in ((code[1], folder), (code[2], shards)):
        monkeypatch.chdir(where)
        exec(compile(block.split("```")[0], "page", "exec"), {})
    assert changes(plain, folder)[0][0]["q_proj"].sum_abs == 0
    assert load(shards).lm_head.weight.equal(load(tmp_path / "s").lm_head.weight)


def test_placeholders_of_zero_3(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "m")
    held = {n: t if "norm" in n else torch.empty(0, dtype=t.dtype) for n, t in read_tensors(folder).items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    everywhere(plain, folder, r"is empty \(shape \[0\]\), as ZeRO-3")


@pytest.mark.parametrize(
    ("layers", "match"), [(1, "says 1 layers, and its weight files hold 2"), (4, "says 4 layers, and .* hold 2")]
)
def test_another_number_of_layers(plain, tmp_path, layers, match):
    folder = edit(shutil.copytree(plain, tmp_path / "m"), num_hidden_layers=layers)
    other = edit(shutil.copytree(plain, tmp_path / "other"), num_hidden_layers=layers)
    refused(changes, other, folder, match=match)
    refused(pair, other, folder, match=match)
    refused(load, folder, match=match)
    refused(opening.look_over, [refs.model(folder)], match=match)


def test_lost_layers_and_layers_beyond(plain, tmp_path):
    folder = edit(save_tiny("llama", tmp_path / "m", layers=4), num_hidden_layers=3)
    held = {n: t for n, t in read_tensors(folder).items() if ".layers.1." not in n}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    refused(load, folder, match="its weight files lack layer 1")
    both = [edit(save_tiny("llama", tmp_path / n, layers=3), num_hidden_layers=2) for n in "ab"]
    refused(changes, *both, match="hold 3")
    for each in both:  # layers that predict further tokens, as DeepSeek V3 and GLM 4.5 store them
        edit(each, num_nextn_predict_layers=1)
    assert set(changes(*both)[0]) == {0, 1}


def test_a_checkpoint_that_was_cut_off(plain, tmp_path):
    run = tmp_path / "run"
    for step in (10, 20):
        shutil.copytree(plain, run / f"checkpoint-{step}")
    file = run / "checkpoint-20" / "model.safetensors"
    whole = file.read_bytes()
    hint = "if saving was interrupted, remove the folder, or name the other steps with --steps"
    for size in (5, 700, len(whole) - 3):
        file.write_bytes(whole[:size])
        assert refused(opening.look_over, refs.run(run), match="checkpoint-20/model.safetensors is cut short").endswith(
            hint
        )
    file.unlink()
    assert refused(opening.look_over, refs.run(run), match="checkpoint-20 holds no weights").endswith(hint)
    (file.parent / "config.json").unlink()
    assert refused(opening.look_over, refs.run(run), match="checkpoint-20 has no config.json").endswith(hint)
    opening.look_over(refs.run(run, [10]))
