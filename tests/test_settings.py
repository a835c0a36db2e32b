"""Settings of config.json: compared as transformers reads them, and what it says of head, code and RoPE."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import EVERY_ARCHITECTURE, read_tensors, save_tiny, tiny_config
from safetensors.torch import save_file

from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs, settings
from cpt_utils.interventions import on_disk, surgery
from cpt_utils.measures import compare
from cpt_utils.models import loading

CPU = torch.device("cpu")
V4 = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "vocab_size": 272, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip


def written(folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return refs.model(folder)


def unlike(tmp_path, base, target):
    return settings.diff_settings(written(tmp_path / "base", base), written(tmp_path / "target", target))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"type": "linear", "factor": 2.0}
LLAMA3 |= {"original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("base", "target", "expected"),
    [
        ({}, {}, {}),
        # a missing value is the type's default: Llama 2's files have no rope_theta
        ({}, {"rope_theta": 10000.0}, {}),
        ({}, {"rope_theta": 1000000.0}, {"rope_theta": (10000.0, 1000000.0)}),
        # two spellings of one setting
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {}),
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 8e6}}, {"rope_theta": (5e5, 8e6)}),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
            {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
            {},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
            {"rope_parameters": LLAMA3 | {"rope_theta": 5e5, "factor": 32.0}},
            {"factor": (8.0, 32.0)},
        ),
        ({"rope_scaling": LINEAR}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, {}),
        ({"rope_scaling": LINEAR}, {}, {"rope_type": ("linear", "default"), "factor": (2.0, "unset")}),
        # the length counts only where RoPE is scaled
        ({"max_position_embeddings": 512}, {"max_position_embeddings": 1024}, {}),
        (
            {"max_position_embeddings": 512, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            {"max_position_embeddings": 1024, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            {"max_position_embeddings": (512, 1024)},
        ),
        # other settings, stated or by default, and derived ones
        ({}, {"hidden_act": "gelu"}, {"hidden_act": ("silu", "gelu")}),
        ({"rms_norm_eps": 1e-5}, {}, {"rms_norm_eps": (1e-5, 1e-6)}),
        ({}, {"head_dim": 8, "num_key_value_heads": 4}, {}),
        ({}, {"head_dim": 16}, {"head size": (8, 16)}),
        ({}, {"num_key_value_heads": 2}, {"KV heads": (4, 2)}),
        ({}, {"attention_bias": True}, {"attention_bias": (False, True)}),
        # what counts for nothing here
        ({}, {"vocab_size": 300, "torch_dtype": "float16", "use_cache": False, "attention_dropout": 0.1}, {}),
        ({}, {"unsloth_version": "1", "log_scale": True, "transformers_version": "4.31.0", "eos_token_id": [1, 2]}, {}),
    ],
)  # fmt: skip
def test_settings_of_llamas(tmp_path, base, target, expected):
    assert unlike(tmp_path, V4 | base, V4 | target) == expected
    turned = {name: (theirs, mine) for name, (mine, theirs) in expected.items()}
    assert unlike(tmp_path, V4 | target, V4 | base) == turned


def test_settings_by_kind_of_layer(tmp_path):
    """Gemma 3 has one RoPE base for its full layers and one for the sliding ones; Qwen2 derives its layers' kinds."""
    gemma = tiny_config("gemma3_text").to_dict() | {"architectures": ["Gemma3ForCausalLM"]}
    old = {key: value for key, value in gemma.items() if key not in ("rope_parameters", "layer_types")}
    old |= {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6}
    assert unlike(tmp_path, old, gemma) == {}
    found = unlike(tmp_path, old, old | {"rope_theta": 5e6})
    assert found == {"full_attention.rope_theta": (1e6, 5e6)}
    found = unlike(tmp_path, old, old | {"sliding_window": 64})
    assert list(found) == ["sliding_window"]
    qwen = V4 | {"model_type": "qwen2", "sliding_window": 16, "max_window_layers": 1}
    assert unlike(tmp_path, qwen | {"use_sliding_window": False}, qwen | {"sliding_window": 64}) == {}
    assert "layer_types" in unlike(tmp_path, qwen, qwen | {"use_sliding_window": True})


@pytest.mark.parametrize("model_type", EVERY_ARCHITECTURE)
def test_saving_again_changes_no_setting(tmp_path, model_type):
    """What transformers 5 writes of a file that states the sizes alone, as files of release 4 did."""
    config = tiny_config(model_type)
    whole = config.to_dict()
    short = {key: value for key, value in whole.items() if value != type(config)().to_dict().get(key)}
    ref = written(tmp_path / "base", short | {"model_type": model_type})
    settings.read_configuration(tmp_path / "base").save_pretrained(tmp_path / "target")
    target = refs.model(tmp_path / "target")
    assert settings.diff_settings(ref, target) == settings.diff_settings(target, ref) == {}
    assert target.config() != ref.config()


def test_alike_files_need_no_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "read_configuration", None)
    assert (
        unlike(tmp_path, V4 | {"rope_theta": 5.0}, V4 | {"rope_theta": 5.0, "vocab_size": 9, "use_cache": False}) == {}
    )


def test_a_swap_warns_once(tmp_path, capsys):
    base = save_tiny("llama", tmp_path / "base")
    target = save_tiny("llama", tmp_path / "target", seed=1)
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(values | {"rope_parameters": {"rope_theta": 77.0}}))
    for _ in range(2):
        surgery.Pair(base, target).close()
    said = "warning: rope_theta is 10000.0 in the base and 77.0 in the target; swapped weights run with the target's\n"
    assert capsys.readouterr().err == said


def test_settings_that_transformers_does_not_accept(tmp_path, capsys):
    found = unlike(tmp_path, V4, V4 | {"num_attention_heads": 5, "hidden_act": "none"})
    assert found == {} and "settings are not compared" in capsys.readouterr().err


# ---------------------------------------------------------------- the head


def with_head(folder, tensor, to=None, **config):
    if to is not None:
        folder = shutil.copytree(folder, to)
    held = read_tensors(folder)
    save_file(held | {"lm_head.weight": tensor(held["model.embed_tokens.weight"])}, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_heads_that_are_tied_or_not(tmp_path, capsys):
    tied = save_tiny("qwen2", tmp_path / "tied", tie_word_embeddings=True)
    with_head(tied, lambda e: e.clone(), tmp_path / "same")
    with_head(tied, lambda e: e.flip(0), tmp_path / "other")
    with_head(tied, lambda e: e.flip(0), tmp_path / "untied", tie_word_embeddings=False)
    for name, says in (("tied", False), ("same", False), ("other", True), ("untied", False)):
        model = loading.load_model(refs.model(tmp_path / name), torch.float32, CPU)
        surgery.Pair(tied, tmp_path / name).close()
        said = capsys.readouterr().out
        assert said.count("differs; it is used, as by transformers") == says, name
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name in ("tied", "same"))
        assert model.lm_head.weight.equal(read_tensors(tmp_path / name).get("lm_head.weight", model.lm_head.weight))


@pytest.mark.parametrize("config", [{"tie_word_embeddings": False}, {}])
def test_no_head_where_none_is_tied(tmp_path, config):
    """Llama's default ties none, so that a config.json which says nothing does not, either."""
    base = save_tiny("llama", tmp_path / "base")
    folder = shutil.copytree(base, tmp_path / "m")
    held = {name: tensor for name, tensor in read_tensors(folder).items() if name != "lm_head.weight"}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values.pop("tie_word_embeddings")
    (folder / "config.json").write_text(json.dumps(values | config))
    for call in (
        lambda: loading.load_model(refs.model(folder), torch.float32, CPU),
        lambda: surgery.Pair(base, folder),
    ):
        with pytest.raises(
            InputError, match=r"m: config.json does not tie .* hold none \(lm_head.weight\); set tie_word"
        ):
            call()
    surgery.Pair(folder, base).close()  # of the base only layers are taken
    (folder / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": True}))
    loading.load_model(refs.model(folder), torch.float32, CPU)


# ---------------------------------------------------------------- code of the model's own, unknown RoPE


def own_code(folder, name="modeling_own.OwnForCausalLM", **config):
    (folder / "modeling_own.py").write_text("raise SystemExit('this code was run')\n")
    values = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": name}} | config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_own_code_is_said_and_goes_along(tmp_path, capsys):
    base = save_tiny("mistral", tmp_path / "base")
    for step in (5, 6):
        own_code(save_tiny("mistral", tmp_path / "run" / f"checkpoint-{step}", seed=step))
    for ref in refs.run(tmp_path / "run"):
        loading.load_model(ref, torch.float32, CPU)
        with surgery.Pair(base, ref) as both:
            out = tmp_path / "out" / f"checkpoint-{ref.step}"
            on_disk.write_model(both, surgery.layers_from_base(both, [1]), out)
        assert (out / "modeling_own.py").read_text() == (tmp_path / "run" / out.name / "modeling_own.py").read_text()
    said = [line for line in capsys.readouterr().out.splitlines() if "which is not run" in line]
    assert len(said) == 1 and "run: config.json names code of its own (modeling_own.OwnForCausalLM)" in said[0]
    assert said[0].endswith("transformers' own mistral")
    loading.load_model(refs.model(out), torch.float32, CPU)  # and the swap is loaded without it
    assert capsys.readouterr().out == said[0].replace("/run:", "/out:") + "\n"
    other = own_code(save_tiny("mistral", tmp_path / "other"))  # and where weights are compared
    compare.changes(refs.model(other), refs.run(tmp_path / "out"))
    assert capsys.readouterr().out == said[0].replace("the checkpoints in ", "").replace("/run:", "/other:") + "\n"
    settings.say_custom_code("x", {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}})  # no model's
    settings.say_custom_code("x", {"auto_map": "broken"})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_that_transformers_does_not_know(tmp_path, key):
    folder = own_code(save_tiny("llama", tmp_path / "m"), "modeling_llama.LlamaForCausalLM")
    values = json.loads((folder / "config.json").read_text())
    values.pop("rope_parameters")
    scaling = {"max_factor": 16, "type": "clex", "factor": 1.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(values | {key: scaling}))
    for call in (loading.load_model, lambda *args: loading.load_untrained(*args, seed=0)):
        with pytest.raises(
            InputError, match=f"{key} in config.json is of type 'clex', which transformers .*own code"
        ) as e:
            call(refs.model(folder), torch.float32, CPU)
        assert "\n" not in str(e.value)
