"""Result files of lm_eval as its releases write them: which model each is of, its rows, and how it was asked.

The forms of 0.3.0, 0.4.0, 0.4.2 and 0.4.13 are those of files that these releases wrote, cut to the keys that are read.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics

import pytest
from helpers import load_script, save_tiny, tiny_tokenizer

from cpt_utils.base.errors import InputError
from cpt_utils.measures import benchmark
from cpt_utils.measures import lm_eval_results as lm

TASK = "sib200_gle_Latn"
RUN, BASE = "runs/gle", "org/base"
ACC = {0: 0.25, 100: 0.30, 200: 0.45, 300: 0.60}


def result(folder, args, acc, release="0.4.13", n=204, date=1.0, task=TASK, name=None, **change):
    """A result file for `model_args`; `change` overwrites top-level keys, `config` only its own."""
    error = math.sqrt(acc * (1 - acc) / (n - 1)) if 0 < acc < 1 else 0.0
    config = {"model": "hf", "model_args": args, "batch_size": 1, "limit": None} | change.pop("config", {})
    if release == "0.3.0":
        content = {"results": {task: {"acc": acc, "acc_stderr": error, "acc_norm": acc / 2, "acc_norm_stderr": 0.01}}}
        content |= {"versions": {task: 0}, "config": config | {"num_fewshot": 0, "description_dict": None}}
    else:
        row = {"alias": task, "acc,none": acc, "acc_stderr,none": error, "acc_norm,none": acc / 2}
        definition = {"task": task, "doc_to_text": "{{text}} is:", "description": "", "target_delimiter": " "}
        content = {"results": {task: row}, "configs": {task: definition}, "versions": {task: 1.0}, "n-shot": {task: 0}}
        content |= {"config": config}
        if release == "0.4.0":
            group = {"sib200": {"alias": "sib200", "acc,none": 0.9, "acc_stderr,none": 0.1}}
            content |= {"results": group | content["results"], "groups": group, "n-shot": {"sib200": 0, task: 0}}
        elif release == "0.4.2":
            content |= {"date": date}
        else:
            content |= {"date": date, "n-samples": {task: {"original": n, "effective": n}}, "lm_eval_version": release}
            content |= {"chat_template": None, "system_instruction": None, "fewshot_as_multiturn": None}
    for key, value in change.items():
        content[key.replace("n_", "n-")] = value
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"results_{name or len(list(folder.iterdir()))}.json"
    file.write_text(json.dumps(content))
    return file


def run_of(folder, args=None, **more):
    """The base and three checkpoints; `args(step)` gives the model's arguments."""
    args = args or (lambda step: {"pretrained": f"{RUN}/checkpoint-{step}" if step else BASE})
    for step, acc in ACC.items():
        result(folder, args(step), acc, **more)
    return folder


def values(folder, run=RUN, base=BASE, tasks=None):
    series = benchmark.read(folder, tasks, "acc", run, base)[TASK]
    return {step: point.value for step, point in series.points.items()}, series.left_out


# --- the arguments of the model, and what they name ---


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pretrained=org/m,revision=step1000,dtype=float32", {"revision": "step1000", "dtype": "float32"}),
        ("pretrained=org/m,trust_remote_code=True,", {"trust_remote_code": "True"}),
        ("pretrained=org/m, dtype = float16", {"dtype": "float16"}),
        ("pretrained=runs/lr=1e-4,wd/checkpoint-5,dtype=x", {"pretrained": "runs/lr=1e-4,wd/checkpoint-5"}),
        ('pretrained=org/m,quantization_config={"a": 1, "b": [2, 3]},x=1', {"x": "1"}),
        (
            'pretrained=org/m,quantization_config={"a": 1, "b": [2, 3]}',
            {"quantization_config": '{"a": 1, "b": [2, 3]}'},
        ),
        ('{"pretrained": "org/m", "load_in_4bit": true, "peft": null}', {"load_in_4bit": True, "peft": None}),
        ('pretrained="org/m"', {"pretrained": "org/m"}),
    ],
)
def test_arguments_of_the_command_line(text, found):
    read = lm.model_arguments(text)
    assert read | found == read
    assert read["pretrained"].startswith(("org/m", "runs/"))


def test_arguments_that_are_a_dict_or_absent():
    assert lm.model_arguments({"pretrained": "x"}) == {"pretrained": "x"}
    assert lm.model_arguments(None) == lm.model_arguments("") == {}


@pytest.mark.parametrize(
    ("args", "name", "model", "quantised"),
    [
        ({"pretrained": "./runs/a/checkpoint-5/"}, "./runs/a/checkpoint-5", "./runs/a/checkpoint-5", ""),
        ({"pretrained": "org/m", "revision": "main", "subfolder": "", "peft": None}, "org/m", "org/m", ""),
        ({"pretrained": "org/m", "revision": "step1000"}, "org/m@step1000", "org/m@step1000", ""),
        ({"pretrained": "org/m", "revision": 500}, "org/m@500", "org/m@500", ""),
        ({"pretrained": "org/m", "subfolder": "checkpoint-10"}, "org/m/checkpoint-10", "org/m/checkpoint-10", ""),
        ("pretrained=org/m,subfolder=a/step5,revision=v2", "org/m/a/step5@v2", "org/m/a/step5@v2", ""),
        ({"pretrained": "b", "peft": "l/checkpoint-3"}, "l/checkpoint-3", "b", ""),
        # A pinned revision of the base is not the adapter's; that of an adapter on the hub is asked of both.
        ("pretrained=o/b,revision=abc,peft=l/checkpoint-3", "l/checkpoint-3", "o/b@abc", ""),
        ("pretrained=o/b,revision=step3,peft=o/lora", "o/lora@step3", "o/b", ""),
        ({"pretrained": "b", "delta": "d/step-3"}, "d/step-3", "b", ""),
        ({"pretrained": "b", "lora_local_path": "l/step-3", "enable_lora": True}, "l/step-3", "b", ""),
        ("pretrained=m,load_in_4bit=True,load_in_8bit=False", "m", "m", "load_in_4bit=True"),
        (
            {"pretrained": "m", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "m",
            "m",
            "load_in_4bit=True, bnb_4bit_quant_type=nf4",
        ),
        ({"pretrained": "m", "quantization": "awq", "tensor_parallel_size": 2}, "m", "m", "quantization=awq"),
        ({"pretrained": "m", "quantization": None, "bnb_4bit_quant_type": "nf4"}, "m", "m", ""),
        ("pretrained=m,gptqmodel=True", "m", "m", "gptqmodel=True"),
        ("pretrained=m,autogptq=model.safetensors", "m", "m", "autogptq=model.safetensors"),
        ("pretrained=m,gguf_file=q4.gguf", "m", "m", "gguf_file=q4.gguf"),
        ({"model": "runs/a/checkpoint-5", "base_url": "http://x"}, "runs/a/checkpoint-5", "runs/a/checkpoint-5", ""),
    ],
)
def test_which_model_a_result_is_of(tmp_path, args, name, model, quantised):
    read = lm.ResultFile.read(result(tmp_path, args, 0.5, model_name="elsewhere"))
    assert (read.name, read.model, read.quantised) == (name, model, quantised)


def test_other_json_files_are_no_results(tmp_path):
    other = {"results": {TASK: 0.5}, "versions": {}, "config": {"model_args": ["x"]}}
    for content in ([1], {"results": 3}, {"results": {}, "config": {}}, {"15": {TASK: {"acc": 0.5}}}, other):
        (tmp_path / "x.json").write_text(json.dumps(content))
        assert lm.ResultFile.read(tmp_path / "x.json") is None


# --- the releases ---


@pytest.mark.parametrize("release", ["0.3.0", "0.4.0", "0.4.2", "0.4.13"])
@pytest.mark.parametrize("text", [True, False])
def test_results_of_every_release_are_read(tmp_path, capsys, release, text):
    def args(step):
        named = {"pretrained": "org/m", "revision": f"step{step}"} if step else {"pretrained": BASE}
        return ",".join(f"{key}={value}" for key, value in named.items()) if text else named

    folder = run_of(tmp_path, args, release=release, n=200)
    series = benchmark.read(folder, None, "acc", "org/m", BASE)
    assert list(series) == [TASK]  # groups are no tasks
    assert {step: point.value for step, point in series[TASK].points.items()} == ACC
    assert all(point.n == 200 for point in series[TASK].points.values())
    assert ("taken as 200, by the standard errors" in capsys.readouterr().out) == (release != "0.4.13")
    assert benchmark.read(folder, [TASK], "acc_norm", "org/m", BASE)[TASK].points[300].value == ACC[300] / 2


@pytest.mark.parametrize("release", ["0.3.0", "0.4.0", "0.4.2"])
def test_a_limited_run_of_an_early_release_is_known_by_its_config(tmp_path, release):
    folder = run_of(tmp_path, release=release)
    limited = result(folder, {"pretrained": f"{RUN}/checkpoint-400"}, 0.9, release=release, config={"limit": 20})
    with pytest.raises(InputError, match="made with --limit 20; evaluate that model without"):
        values(folder)
    limited.unlink()
    limited = result(folder, {"pretrained": f"{RUN}/checkpoint-100"}, 0.9, release=release, config={"limit": 0.1})
    found, left_out = values(folder)
    assert found == ACC and left_out == [f"{limited}: made with --limit 0.1"]


def test_rows_are_those_of_the_sample_standard_error():
    for n in (2, 7, 99, 204, 14042):
        for k in {1, n // 3 or 1, n // 2 or 1, n - 1}:
            hits = [1] * k + [0] * (n - k)
            assert lm.rows_behind(k / n, statistics.stdev(hits) / math.sqrt(n)) == n
    assert lm.rows_behind(0.24, 0.042923469599092816) == 100  # a published file of 0.3 (MMLU, Pythia 160m)
    for value, error in ((0.0, 0.0), (1.0, 0.0), (0.5, "N/A"), (0.5, None), (0.5, 0.04), (0.6, 0.0343)):
        assert lm.rows_behind(value, error) is None


def test_rows_that_no_error_gives_are_those_of_the_others_or_sib200s(tmp_path, capsys):
    # A model that is never right has the error 0.
    for step, acc in {100: 0.0, 200: 0.5, 300: 0.6}.items():
        result(tmp_path / "a", {"pretrained": f"{RUN}/checkpoint-{step}"}, acc, release="0.3.0", n=100)
        result(tmp_path / "b", {"pretrained": f"{RUN}/checkpoint-{step}"}, 0.0, release="0.3.0")
    assert [p.n for p in benchmark.read(tmp_path / "a", None, "acc", RUN)[TASK].points.values()] == [100] * 3
    assert [p.n for p in benchmark.read(tmp_path / "b", None, "acc", RUN)[TASK].points.values()] == [204] * 3
    assert "204, the size of SIB-200's test split" in capsys.readouterr().out


def test_two_results_without_a_date_are_refused(tmp_path):
    folder = run_of(tmp_path, release="0.4.0")
    result(folder, {"pretrained": f"{RUN}/checkpoint-100"}, 0.9, release="0.4.0")
    with pytest.raises(InputError, match=r"two results of runs/gle/checkpoint-100.*keep one"):
        values(folder)


def test_releases_are_not_mixed_unseen(tmp_path, capsys):
    folder = run_of(tmp_path / "a", lm_eval_version="0.4.9.1")
    values(folder)
    assert "lm_eval 0" not in capsys.readouterr().err
    result(folder, {"pretrained": f"{RUN}/checkpoint-400"}, 0.7)
    values(folder)
    assert "with lm_eval 0.4.13 and 0.4.9.1, which may ask differently" in capsys.readouterr().err
    result(folder, {"pretrained": f"{RUN}/checkpoint-500"}, 0.7, release="0.3.0")
    with pytest.raises(InputError, match=r"release of lm_eval: 0\.4 or later at step 0, 0\.3 or older at step 500"):
        values(folder)


# --- the checkpoints of a run ---


@pytest.mark.parametrize("key", ["peft", "delta", "lora_local_path"])
@pytest.mark.parametrize("text", [True, False])
def test_an_adapter_is_the_checkpoint_that_it_is(tmp_path, key, text):
    def args(step):
        named = {"pretrained": BASE} | ({key: f"{RUN}/checkpoint-{step}"} if step else {})
        return ",".join(f"{name}={value}" for name, value in named.items()) if text else named

    # lm_eval names these results after the adapter or after the base; neither may matter.
    assert values(run_of(tmp_path / "a", args, model_name=BASE)) == (ACC, [])
    # Two of them merged and evaluated again, as folders: one model, the newer result counts.
    for step in (100, 300):
        result(tmp_path / "a", {"pretrained": f"{RUN}/checkpoint-{step}"}, 0.7, date=2.0)
    found, left_out = values(tmp_path / "a")
    assert found == ACC | {100: 0.7, 300: 0.7} and len(left_out) == 2 and "newer" in left_out[0]


def test_an_adapter_of_another_run_is_neither_the_bases_nor_a_checkpoints_result(tmp_path):
    folder = run_of(tmp_path)
    result(folder, {"pretrained": BASE, "peft": "runs/other/checkpoint-300"}, 0.91, date=2.0)
    result(folder, {"pretrained": f"{RUN}/checkpoint-300", "peft": "sft/adapter"}, 0.92, date=3.0)
    result(folder, {"pretrained": f"{RUN}/checkpoint-200", "peft": f"{RUN}/checkpoint-300"}, 0.93, date=4.0)
    result(folder, {"pretrained": BASE, "steer_path": "vector.pt"}, 0.94, date=5.0)
    found, left_out = values(folder)
    assert found == ACC
    assert len(left_out) == 4 and all("another model" in note for note in left_out)
    assert any("sft/adapter on runs/gle/checkpoint-300" in note for note in left_out)
    # Where the folders were moved, two models have the name of one step, and nothing says which is meant.
    with pytest.raises(InputError, match="step 300 appears twice"):
        values(folder, run="moved/away")


def test_adapters_on_another_base_than_that_of_the_comparison_are_said(tmp_path, capsys):
    folder = run_of(
        tmp_path / "a",
        lambda step: {"pretrained": "/data/base", **({"peft": f"{RUN}/checkpoint-{step}"} if step else {})},
    )
    found, _ = values(folder)
    assert found == {step: acc for step, acc in ACC.items() if step}
    assert "evaluated on /data/base, the weights compared with org/base" in capsys.readouterr().err
    result(folder, {"pretrained": "/data/other", "peft": f"{RUN}/checkpoint-400"}, 0.7)
    with pytest.raises(InputError, match="different model under the adapter: /data/base at step 100, /data/other"):
        values(folder)


def test_a_quantised_checkpoint_never_takes_the_place_of_the_checkpoint(tmp_path):
    folder = run_of(tmp_path / "a")
    result(folder, {"pretrained": f"{RUN}/checkpoint-300", "load_in_4bit": True}, 0.11, date=2.0)
    result(folder, {"pretrained": BASE, "quantization": "fp8"}, 0.12, date=2.0)
    found, left_out = values(folder)
    assert found == ACC and len(left_out) == 2
    assert "runs/gle/checkpoint-300 (load_in_4bit=True), quantised unlike the checkpoints" in left_out[1]


def test_checkpoints_that_are_all_quantised_alike_are_taken_and_it_is_said(tmp_path, capsys):
    def args(step):
        return f"pretrained={RUN}/checkpoint-{step},load_in_8bit=True" if step else f"pretrained={BASE}"

    folder = run_of(tmp_path, args)
    found, left_out = values(folder)
    assert found == {step: acc for step, acc in ACC.items() if step}  # the base as it is is another measurement
    assert left_out == [f"{folder}/results_0.json: org/base, not quantised unlike the checkpoints"]
    assert "all checkpoints were quantised when they were evaluated (load_in_8bit=True)" in capsys.readouterr().out
    result(folder, f"pretrained={RUN}/checkpoint-400,load_in_4bit=True", 0.5)
    with pytest.raises(InputError, match=r"quantised in different ways.*load_in_4bit=True; load_in_8bit=True"):
        values(folder)


@pytest.mark.parametrize(
    ("args", "run"),
    [
        (lambda step: {"pretrained": "org/cpt", "subfolder": f"checkpoint-{step}"}, "org/cpt"),
        (lambda step: {"pretrained": "org/cpt", "subfolder": f"step_{step}"}, "org/cpt/step_*"),
        (lambda step: {"pretrained": "org/cpt", "subfolder": f"iter_{step:07d}", "revision": "v2"}, "org/cpt@v2"),
        (lambda step: {"pretrained": "runs/gle", "subfolder": f"checkpoint-{step}"}, "./runs/gle/"),
        (lambda step: {"pretrained": "org/cpt", "revision": f"run-a/step{step}"}, "org/cpt@run-a/step*"),
        (lambda step: {"pretrained": "org/cpt", "revision": f"run-a/step{step}"}, "org/cpt@run-a/step100"),
        (lambda step: {"pretrained": "org/cpt", "revision": f"stage2-step{step}-tokens5B"}, "org/cpt"),
        (lambda step: {"pretrained": f"/scratch/x/ckpt_{step}"}, [f"/scratch/x/ckpt_{step}" for step in ACC]),
        (lambda step: {"pretrained": f"/scratch/x/part2-{step}"}, "/scratch/x"),
    ],
)
def test_runs_as_people_have_them(tmp_path, capsys, args, run):
    folder = run_of(tmp_path, lambda step: args(step) if step else {"pretrained": BASE})
    others = [{"pretrained": "org/cpt", "revision": "run-b/step100"}] if "run-a" in run else []
    others += [{"pretrained": "org/other", "subfolder": "checkpoint-100"}, {"pretrained": "elsewhere/checkpoint-100"}]
    for other in others:
        result(folder, other, 0.9)
    found, left_out = values(folder, run)
    assert found == ACC and len(left_out) == len(others)
    assert "no result in" not in capsys.readouterr().err


def test_a_swapped_checkpoint_is_none(tmp_path):
    folder = run_of(tmp_path, lambda step: {"pretrained": "org/cpt", "revision": f"step{step}"})
    swapped = {"swap": {"kind": "attention"}, "models": {}}
    for model in ("org/cpt+attention", "org/cpt"):
        result(folder, {"pretrained": model, "revision": "step300"}, 0.9, date=2.0, _header=swapped)
    result(folder, {"pretrained": "runs/gle/checkpoint-300+attention"}, 0.9, date=2.0)
    found, left_out = values(folder, "org/cpt", "org/cpt@step0")
    assert found == ACC and len(left_out) == 3
    # Also where the run is not found by its name, and every model with a step counts.
    assert values(folder, "moved/away", "org/cpt@step0")[0] == ACC


# --- settings that must agree ---

CHAT = {"chat_template": "{{ messages }}", "chat_template_sha": "ab12"}
SHOTS = {"n_shot": {TASK: 5}}


@pytest.mark.parametrize(
    ("common", "change", "words"),
    [
        ({}, CHAT, "chat template: none at step 0, {{ messages }} at step 400"),
        (CHAT, {"chat_template": None}, "chat template"),
        (CHAT, {"chat_template": "{{ other }}"}, "chat template"),
        ({}, {"chat_template_sha": "ab12"}, "chat template"),
        ({}, {"system_instruction": "Be terse."}, "system instruction: none at step 0, Be terse. at step 400"),
        ({}, SHOTS, "number of few-shot examples: 0 at step 0, 5"),
        (CHAT | SHOTS, {"fewshot_as_multiturn": True}, "fewshot_as_multiturn"),
        (SHOTS, {"config": {"fewshot_seed": 7}}, ""),
        (SHOTS | {"config": {"fewshot_seed": 1}}, {"config": {"fewshot_seed": 7}}, "seed of the few-shot examples"),
        ({}, {"configs": {TASK: {"doc_to_text": "{{text}} is:", "description": "Classify."}}}, "description: none at"),
        ({}, {"configs": {TASK: {"doc_to_text": "another"}}}, "prompt template: {{text}} is: at step 0, another at"),
        ({}, {"configs": {TASK: {"target_delimiter": ""}}}, "target delimiter"),
        ({}, {"versions": {TASK: 2.0}}, "task version"),
        ({}, {"config": {"model_args": f"pretrained={RUN}/checkpoint-400,add_bos_token=True"}}, "add_bos_token"),
        ({}, {"config": {"model_args": f"pretrained={RUN}/checkpoint-400,enable_thinking=False"}}, "enable_thinking"),
        (
            {"config": {"model_dtype": "torch.bfloat16"}},
            {"config": {"model_dtype": "torch.float32"}},
            "dtype: bfloat16",
        ),
        (
            {"config": {"model_dtype": "torch.bfloat16"}},
            {"config": {"model_args": f"pretrained={RUN}/checkpoint-400,dtype=float16"}},
            "dtype",
        ),
    ],
)
def test_settings_that_differ_are_refused(tmp_path, common, change, words):
    folder = run_of(tmp_path, **common)
    args = {"pretrained": f"{RUN}/checkpoint-400"}
    config = common.get("config", {}) | change.get("config", {})
    if "model_args" in config:  # what the command line says, where the loader's word is missing
        config.pop("model_dtype", None)
    result(folder, config.pop("model_args", args), 0.7, **(common | change | {"config": config}))
    if not words:  # only one of them says it
        assert values(folder)[0] == ACC | {400: 0.7}
        return
    with pytest.raises(InputError) as error:
        values(folder)
    assert f"different {words}" in str(error.value) or words in str(error.value)
    assert "at step 400; evaluate all of them alike" in str(error.value)


@pytest.mark.parametrize(
    ("common", "change"),
    [
        ({}, {"fewshot_as_multiturn": True}),  # without a template it changes nothing, and its default has changed
        (CHAT, {"fewshot_as_multiturn": True}),  # nor without examples
        ({}, {"chat_template": "", "system_instruction": ""}),
        ({"config": {"fewshot_seed": 1}}, {"config": {"fewshot_seed": 7}}),
        (
            {"configs": {TASK: {"doc_to_text": "<function text at 0x7f01>"}}},
            {"configs": {TASK: {"doc_to_text": "<function text at 0x7f02>"}}},
        ),
        ({"config": {"model_dtype": "torch.float32"}}, {"config": {"model_dtype": "float32"}}),
        ({"versions": {}}, {}),
    ],
)
def test_settings_that_change_nothing_may_differ(tmp_path, common, change):
    folder = run_of(tmp_path, **common)
    result(folder, {"pretrained": f"{RUN}/checkpoint-400"}, 0.7, **(common | change))
    assert values(folder)[0] == ACC | {400: 0.7}


def test_a_file_without_the_keys_has_no_template(tmp_path):
    """0.4.2 knew none; a file with one beside it was asked differently."""
    folder = run_of(tmp_path, release="0.4.2")
    assert values(folder)[0] == ACC
    result(folder, {"pretrained": f"{RUN}/checkpoint-400"}, 0.7, **CHAT)
    with pytest.raises(InputError, match="different chat template: none at step 0"):
        values(folder)


# --- what lm_eval itself writes ---


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder in which lm_eval left the results of a base, of a LoRA on it, of a checkpoint with a chat template and a
    system instruction, and of one in a sub-folder with examples; and the folder of the models."""
    import datasets
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    peft = pytest.importorskip("peft", reason="LoRA results need peft")
    place = tmp_path_factory.mktemp("written")
    languages = place / "sib200" / "gle_Latn"
    languages.mkdir(parents=True)
    generate = load_script("lm_eval_sib200/generate.py")
    for split, n in (("train", 8), ("dev", 2), ("test", 12)):
        rows = [f"{i}\t{generate.CHOICES[i % 7]}\tword {i}" for i in range(n)]
        (languages / f"{split}.tsv").write_text("\n".join(["index_id\tcategory\ttext", *rows]) + "\n")
    generate.write_folder(generate.tsv_files(place / "sib200"), place / "tasks")
    base = save_tiny("llama", place / "base", seed=0, layers=2)
    checkpoint = save_tiny("llama", place / "run" / "checkpoint-20", seed=1, layers=2)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(checkpoint)
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    lora = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    lora.save_pretrained(place / "run" / "checkpoint-10")
    runs = [
        ({"pretrained": str(base)}, {}),
        ({"pretrained": str(base), "peft": str(place / "run" / "checkpoint-10")}, {}),
        ({"pretrained": str(checkpoint)}, {"apply_chat_template": True, "system_instruction": "Be terse."}),
        (f"pretrained={place}/run,subfolder=checkpoint-20", {"num_fewshot": 2, "limit": 5}),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
        manager = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
        for number, (args, more) in enumerate(runs):
            tracker = EvaluationTracker(output_path=str(place / "out" / f"{number}.json"))
            found = simple_evaluate(
                model="hf", model_args=args, tasks=[TASK], batch_size=4, device="cpu", log_samples=False,
                evaluation_tracker=tracker, task_manager=manager, **more,
            )  # fmt: skip
            tracker.save_results_aggregated(results=found)
    return place


def test_what_lm_eval_writes_is_read(written):
    files = [lm.ResultFile.read(path) for path in sorted((written / "out").glob("*.json"))]
    assert [file.name.removeprefix(f"{written}/") for file in files] == [
        "base",
        "run/checkpoint-10",
        "run/checkpoint-20",
        "run/checkpoint-20",
    ]
    assert files[1].model == str(written / "base") and [bool(file.adapter) for file in files] == [
        False,
        True,
        False,
        False,
    ]
    assert [file.rows(TASK) for file in files] == [12, 12, 12, 5]
    assert files[3].limit(TASK) == "made with --limit (5 of 12 rows)"
    settings = [file.settings(TASK) for file in files]
    assert [s["chat template"][:10] for s in settings] == ["none", "none", "{% for m i", "none"]
    assert [s["system instruction"] for s in settings] == ["none", "none", "Be terse.", "none"]
    assert [s["number of few-shot examples"] for s in settings] == [0, 0, 0, 2]
    assert all(s["few-shot examples as turns (fewshot_as_multiturn)"] is None for s in settings)
    assert {s["dtype"] for s in settings} == {"float32"}
    for file in files:
        value, error = lm.metric_of(file.content["results"][TASK], "acc")
        assert lm.rows_behind(value, error) in (file.rows(TASK), None if value in (0, 1) else -1)


def test_a_lora_does_not_become_the_base(written, tmp_path):
    names = sorted(path.name for path in (written / "out").glob("[01]_*.json"))
    for name in names:
        shutil.copy(written / "out" / name, tmp_path)
    points = benchmark.read(tmp_path, None, "acc", str(written / "run"), str(written / "base"))[TASK].points
    assert {step: point.source.rsplit("/", 1)[1] for step, point in points.items()} == {0: names[0], 10: names[1]}


def test_metrics_with_several_filters_are_named_with_them():
    row = {"acc,strict": 0.1, "acc_stderr,strict": 0.1, "acc,flex": 0.2, "f1,none": 0.3, "f1,x": 0.4, "n": 5}
    assert lm.metrics_in(row) == ["acc,flex", "acc,strict", "f1"]
