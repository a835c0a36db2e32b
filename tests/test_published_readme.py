"""The README of the published code, command by command: inside a study and outside, in its order and in another.

Its placeholders are filled with tiny models. What a command needs and does not print is said in one line that names the
flag and the study file; and what is made by hand, of one checkpoint, never stands where the study's result belongs.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from helpers import load_script, save_tiny, shared_dir
from test_downstream_correlation import lm_eval_file
from test_tokenizer_id import hub_form

from cpt_utils.base import figures, results
from cpt_utils.base.errors import InputError

# In the README's order; `lm_eval` is another project's command, whose results the fixture holds.
README = """
sentence-retrieval/sr_experiment.py --model_path <model_path> --base <base_language> --target <target_language>
layer-specialize/layer_specialize.py
weight-diff/int_and_sem.py
downstream-correlation/downstream_correlation.py
layer-swap/layer-swap.py
sentence-retrieval/sr_experiment.py --model_path <swapped_model_path> --base <base_language> --target <target_language>
weight-diff/attn_vs_ffn.py --base-model <base-model> --ckpt-model <ckpt-model>
lsn/load_oscar.py --languages en,zh,ga --model-id model_name --tokenizer path/to/tokenizer --output-dir oscar_ids/
lsn/activation.py -m <model> -i <id_path> -t <type> -s <save_folder> -n <name>
lsn/identify.py -t <tag> -l <lang>
lsn/lsn_activation_cpt.py --model <model> --id_path <id_path> --type <type> --save_folder <save> --name <name> --mask_file <mask> --lang <lang>
weight-diff/gate_lsn.py --base-model path/to/base --target-model path/to/cpt --mask-file masks.json --lang target_lang --output results/output.json
activation-correlation/activation-correlation.py
component-swap/attn_int_swap.py
component-swap/ffn_lsn_swap.py
""".strip().splitlines()  # noqa: E501
BARE = [line for line in README if " " not in line]  # the commands that are printed without an argument
STEPS = (2, 4, 6)
LANGS = ("en", "zh", "ga")
WORDS = (
    "the a cat dog sees runs old red house tree",
    "sa mi kato hundo vidas kuras domo",
    "ba do ki lu me no pa ri su",
)
TEXT = ["--source", "text", "--base-file", "en.txt", "--target-file", "ga.txt"]
SCRIPTS = {line.split()[0]: load_script(line.split()[0]) for line in README}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and a run of three checkpoints, text in three languages, and sentences in two that share numbers."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), *((f"cpt/checkpoint-{step}", step) for step in STEPS)):
        save_tiny("llama", root / name, seed=seed, layers=4, intermediate_size=256)
    write_texts(root)
    return root


@pytest.fixture
def place(models, tmp_path, monkeypatch):
    """A folder to work in, without figures: the commands are what is tested."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "save", lambda *_: None)
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def write_texts(folder: Path) -> None:
    draw = random.Random(0)
    for lang, words in zip(LANGS, WORDS, strict=True):
        lines = [" ".join([str(i), *(draw.choice(words.split()) for _ in range(6)), str(i * 7)]) for i in range(60)]
        (folder / f"{lang}.txt").write_text("".join(line + "\n" for line in lines))


def train(kind: str, folder: Path) -> None:
    """A base from the hub in `base`, and in `cpt` what Hugging Face's Trainer leaves of its CPT: checkpoints with the
    states of optimizer, scheduler and random numbers, and the final model beside them.

    Qwen 2's tokenizer is saved again with every checkpoint, Gemma 2's once, with the final model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

    if kind == "qwen2":
        hub_form(kind, folder / "base", [(folder / f"{lang}.txt").read_text() for lang in LANGS])
    save_tiny(kind, folder / "base", layers=4, intermediate_size=256, vocab_size=900, tokenizer=kind != "qwen2")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    ids = tokenizer((folder / "ga.txt").read_text())["input_ids"]
    rows = [{"input_ids": ids[i : i + 32], "labels": ids[i : i + 32]} for i in range(0, 8 * 32, 32)]
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "base"),
        args=TrainingArguments(
            output_dir=str(folder / "cpt"), max_steps=STEPS[-1], save_steps=STEPS[0], learning_rate=1e-2,
            per_device_train_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=default_data_collator,
        processing_class=tokenizer if kind == "qwen2" else None,
    )  # fmt: skip
    with torch.enable_grad():  # a process of many tests may have them off
        trainer.train()
    trainer.save_model()
    if kind != "qwen2":
        tokenizer.save_pretrained(folder / "cpt")


def write_study(place: Path) -> Path:
    texts = "{" + ", ".join(f"{lang}: {lang}.txt" for lang in LANGS) + "}"
    (place / "study.yaml").write_text(
        "name: trial\nbase: base\nrun: cpt\ntokens: oscar_ids\nresults: results\n"
        "languages: {base: en, target: ga, lsn: [en, zh, ga]}\nlsn: {layers: 2}\n"
        f"data: {{source: text, base_file: en.txt, target_file: ga.txt, lsn_text: {texts}}}\n"
    )
    for model, accuracy in (("base", 0.2), *((f"cpt/checkpoint-{step}", step / 10) for step in STEPS)):
        lm_eval_file(place / "results/lm_eval", model, accuracy)
    return place / "results"


def run(line: str, *more: str) -> int | None:
    script, *argv = line.split()
    return SCRIPTS[script].main([*argv, *more])


def refused(line: str, message: str, *more: str) -> None:
    """The command ends in one line."""
    with pytest.raises(InputError, match=message) as error:
        run(line, *more)
    assert "\n" not in str(error.value)


def filled(line: str, **values: str) -> str:
    """A line of the README with its placeholders filled; the last checkpoint's and the study's are the default."""
    last = f"cpt/checkpoint-{STEPS[-1]}"
    values = {
        "<model_path>": "base cpt", "<swapped_model_path>": "results/layer-swap/semantic_hub",
        "<base_language>": "en", "<target_language>": "ga", "<base-model>": "base", "<ckpt-model>": "cpt",
        "model_name": "trial", "path/to/tokenizer": "base", "path/to/base": "base", "path/to/cpt": "cpt",
        "masks.json": "<mask>", "target_lang": "ga", "results/output.json": "results/weight-diff/gate_lsn.json",
        "<id_path>": "oscar_ids/oscar.ga.train.trial" if "cpt.py" in line else " ".join(
            f"oscar_ids/oscar.{lang}.train.trial" for lang in LANGS
        ),
        "<model>": "cpt" if "cpt.py" in line else last, "<type>": "llama", "<save_folder>": "activation_count",
        "<name>": "trial", "<tag>": "trial", "<lang>": "ga" if "cpt.py" in line else ",".join(LANGS),
        "<save>": "results/lsn/lsn_activation", "<mask>": "results/lsn/result/trial.json",
    } | {f"<{key}>": value for key, value in values.items()}  # fmt: skip
    line = line.replace("load_oscar.py", "load_oscar.py --max-concurrent 1")  # in this process
    for _ in range(2):
        for placeholder, value in values.items():
            line = line.replace(placeholder, value)
    return line


def payloads(folder: Path) -> dict:
    """Every JSON result of a study below its folder, without headers and times."""
    found = {}
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and results.HEADER in content:
            found[str(path.relative_to(folder))] = {
                key: value for key, value in content.items() if key not in (results.HEADER, "timestamp")
            }
    return found


def test_these_are_the_commands_of_the_readme():
    if shared_dir() is None or not (Path(shared_dir()) / "seeds").is_dir():
        pytest.skip("no seeds/ with the published README in the shared folder beside the repository")
    text = (Path(shared_dir()) / "seeds/disentangling_cpt_readme.txt").read_text().replace("\\\n", " ")
    printed = [" ".join(line.split()[1:]) for line in text.splitlines() if re.match(r"python3? \S+\.py", line)]
    assert list(dict.fromkeys(printed)) == README


def test_inside_a_study_in_the_order_of_the_readme_and_in_another(place, capsys):
    """Whatever was made by hand before, and in whatever order, the study's own results are the same."""
    own = write_study(place)
    for line in README:
        run(filled(line))
    first = payloads(own)
    whole = {
        "weight-diff/attn_vs_ffn.json", "weight-diff/int_and_sem.json", "weight-diff/gate_lsn.json",
        "downstream-correlation/correlation.json", "layer-swap/metadata.json", "lsn/result/trial.json",
        "activation-correlation/trial_correlation_strength.json", "component-swap/attn_int_swap/metadata.json",
        "component-swap/ffn_lsn_swap/metadata.json", "lsn/lsn_activation/trial/checkpoint-2-r.ga.1024.json",
    }  # fmt: skip
    assert whole <= first.keys()
    for name in ("weight-diff/attn_vs_ffn", "weight-diff/int_and_sem", "weight-diff/gate_lsn"):
        assert list(first[f"{name}.json"]["checkpoints"]) == [str(step) for step in STEPS]
    assert first["activation-correlation/trial_correlation_strength.json"]["series"]["steps"] == list(STEPS)

    (place / "results").rename(place / "before")
    own = write_study(place)
    one = {"model": "cpt/checkpoint-2", "ckpt-model": "cpt/checkpoint-2", "name": "hand", "tag": "hand", "save": "hand"}
    one |= {"model_path": "cpt/checkpoint-2", "mask": "before/lsn/result/trial.json"}
    layers = "before/layer-specialize/layers.json"
    more = (
        f"layer-swap/layer-swap.py base cpt/checkpoint-2 {layers}",
        f"component-swap/attn_int_swap.py --checkpoint-dir cpt/checkpoint-2 --layer-selection {layers}",
        f"weight-diff/int_and_sem.py --target-dir cpt/checkpoint-2 --interface-json {layers} --hub-json {layers}",
        "weight-diff/attn_vs_ffn.py --steps 2,4",
        "weight-diff/attn_vs_ffn.py --limit 1",
        "weight-diff/attn_vs_ffn.py --base-model cpt/checkpoint-2",
        "lsn/lsn_activation_cpt.py --model cpt/checkpoint-2 --mask_file before/lsn/result/trial.json",
        "lsn/activation.py -m cpt/checkpoint-2",
        "lsn/identify.py -t trial.cpt__checkpoint-2",
    )
    for line in [*reversed(README), *more]:
        line = filled(line, **one).replace("--target-model cpt", "--target-model cpt/checkpoint-2")
        try:
            run(line.replace("--output results/weight-diff/gate_lsn.json", ""))
        except InputError as error:  # what it needs is not there yet
            assert line not in more and "\n" not in str(error)
            assert re.search(r"run \S+\.py|give -|no such folder", str(error))
    made = {str(path.relative_to(own)) for path in own.rglob("*.json")}
    assert not whole & made and {
        *(f"weight-diff/{name}.cpt__checkpoint-2.json" for name in ("attn_vs_ffn", "int_and_sem", "gate_lsn")),
        "weight-diff/attn_vs_ffn.cpt__checkpoint-2-to-cpt__checkpoint-4.2.json", "weight-diff/attn_vs_ffn.limit-1.json",
        "layer-swap.cpt__checkpoint-2/metadata.json",
        "component-swap/attn_int_swap.cpt__checkpoint-2/metadata.json",
        "lsn/lsn_activation/cpt__checkpoint-2-r.ga.1024.json", "lsn/result/trial.cpt__checkpoint-2.json",
    } <= made  # fmt: skip
    for line in README:
        run(filled(line))
    second = payloads(own)
    assert whole <= second.keys() and {name: second[name] for name in whole} == {name: first[name] for name in whole}


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_what_a_trainer_leaves_goes_through_both_parts(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "save", lambda *_: None)
    write_texts(tmp_path)
    train(kind, tmp_path)
    last = tmp_path / f"cpt/checkpoint-{STEPS[-1]}"
    assert all(
        (last / name).is_file() for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    )
    assert (tmp_path / "cpt/model.safetensors").is_file()
    assert (last / "tokenizer.json").is_file() == (kind == "qwen2")
    own = write_study(tmp_path)
    for line in README:
        # In models like these more than the paper's 5 % of the neurons fire on every token, so none is above that bar.
        more = ["--rate", "0.2", "--filter-rate", "0.5", "--bar-rate", "0.5"] if "identify" in line else ()
        run(filled(line, type={"qwen2": "qwen", "gemma2": "llama"}[kind]), *more)
    for lang in LANGS:
        (tmp_path / f"{lang}-heldout.txt").write_text("".join(f"{i} {i * i} {lang}\n" for i in range(100, 120)))
    load_script("lsn/deactivate.py").main(["--heldout", *(f"{lang}={lang}-heldout.txt" for lang in LANGS)])
    load_script("report/claims.py").main([])
    made = payloads(own)
    steps = [str(step) for step in STEPS]
    assert list(made["weight-diff/attn_vs_ffn.json"]["checkpoints"]) == steps
    assert list(made["weight-diff/gate_lsn.json"]["checkpoints"]) == steps
    assert {f"sentence-retrieval/en-ga/cpt__checkpoint-{step}.json" for step in steps} <= made.keys()
    assert "sentence-retrieval/en-ga/cpt.json" not in made  # the final model is the last checkpoint's
    assert [path.name for path in (own / "sentence-retrieval/en-ga").glob("untrained*.json")] == ["untrained.json"]
    assert made["activation-correlation/trial_correlation_strength.json"]["series"]["steps"] == list(STEPS)
    said = {row["verdict"] for row in made["report/claims.json"]["claims"].values()}
    assert said <= {"one run: no verdict", "no verdict: gate"}
    said = "".join(capsys.readouterr())
    assert "another tokenizer" not in said and "its final model is the same as checkpoint-6" in said


def test_outside_a_study(place, capsys):
    """A command without arguments says which flag and which study file would give them; with flags all of it runs."""
    for line in BARE:
        refused(line, r"(give|name) .*(study file|study \(--study FILE)")
    refused(filled(README[0]), "flores_plus.*--data-dir")  # said before any model is loaded
    run(filled(README[0]), *TEXT)
    run("layer-specialize/layer_specialize.py artifacts/en-ga/cpt__checkpoint-6.json -o layers.json")
    pair = "--base-model base --checkpoint-dir cpt"
    run("weight-diff/int_and_sem.py --base-model base --target-dir cpt --interface-json layers.json "
        "--hub-json layers.json --output int_and_sem.json")  # fmt: skip
    for step in STEPS:
        lm_eval_file(place / "lm_eval", f"cpt/checkpoint-{step}", step / 10)
    run("downstream-correlation/downstream_correlation.py lm_eval int_and_sem.json -o downstream.json")
    run("layer-swap/layer-swap.py base cpt/checkpoint-6 layers.json -o swapped")
    run(filled(README[5], swapped_model_path="swapped/semantic_hub swapped/random"), *TEXT)
    run(filled(README[6]))
    assert run(filled(README[7])) == 1  # mOSCAR, without a network: each language says so
    assert "needs a network (and `hf auth login` if it is gated), or give local files with --text" in str(
        capsys.readouterr()
    )
    run(filled(README[7]), "--text", *(f"{lang}={lang}.txt" for lang in LANGS))
    run(filled(README[8]))
    refused(filled(README[9], lang="ga"), "give all that were counted: python lsn/identify.py -t trial -l ga,en,zh")
    run(filled(README[9]))
    refused(filled(README[9]), "languages target: give --layers-lang, or the key", "--layers-out", "rich.json")
    more = "--control-mask-out result/trial.control.json --layers-out rich.json --layers-lang ga --n-layers 2"
    run(filled(README[9]), *more.split())
    run(f"component-swap/attn_int_swap.py {pair} --layer-selection layers.json --output-dir attention")
    run(f"component-swap/ffn_lsn_swap.py {pair} --layer-list rich.json --output-dir ffn")
    run(filled(README[0], model_path="attention ffn"), *TEXT, "--artifact-out", "components")
    assert isinstance(json.loads(Path("rich.json").read_text()), list)


def test_steps_9_and_10_as_published(place):
    """A checkpoint and a mask at a time; step 10 on these files is what it is on those of one command for the run."""
    write_study(place)
    for line in README[:-3]:
        run(filled(line))
    run("activation-correlation/activation-correlation.py")
    expected = payloads(place / "results")["activation-correlation/trial_correlation_strength.json"]
    mask = "results/lsn/result/trial.json"
    (place / "study.yaml").unlink()
    line = README[10]
    refused(filled(line, model="base", save="hand/base", name="b"), "of a base, name the run .* --run .study key run.")
    for control in ("", "-r"):
        chosen = {"mask": mask.replace(".json", ".control.json") if control else mask}
        for step in STEPS:
            name = f"checkpoint-{step}{control}"
            run(filled(line, model=f"cpt/checkpoint-{step}", save="hand/llama", name=name, **chosen))
        line_of_base = filled(line, model="base", save="hand/base", name="NAME", **chosen).replace("--name NAME", "")
        run(line_of_base, "--run", "cpt", "--name", control.strip("-"))
    run(
        "activation-correlation/activation-correlation.py --model-name llama --lang ga --base-tag base "
        "--lsn-activation-path hand --all-weight-diff-path results/weight-diff/attn_vs_ffn.json "
        "--lsn-weight-diff-path results/weight-diff/gate_lsn.json "
        "--layer-selection-path results/layer-specialize/layers.json --output-dir by_hand"
    )
    assert payloads(place / "by_hand")["llama_correlation_strength.json"] == expected
