"""The SIB-200 tasks: what the generator writes, what lm_eval makes of it, and its accuracy against a direct loop."""

from __future__ import annotations

import csv
import functools
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, load_script, save_tiny, shared_dir
from launch import launch, run

from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.base.sources import sib200

generate = load_script("lm_eval_sib200/generate.py")
evaluate = load_script("lm_eval_sib200/evaluate.py")
FOLDER = ROOT / "lm_eval_sib200"
WORDS = ("goal", "ball", '"doctor"', "#river", "law", "bank", "virus", "2,5", "naïve", "中文", '"')


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Converted data goes to a folder of the test, not to the user's cache; half a second with every model is saved."""
    import datasets
    from torch.utils import collect_env

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_env, "get_pretty_env_info", functools.cache(collect_env.get_pretty_env_info))
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        yield folder


def rows(n: int, seed: int) -> list[tuple[str, str, str]]:
    """(index_id, category, text) with quotes, hashes, and values that a reader may take for missing ones."""
    rng = random.Random(seed)
    odd = ['"', "NA", "null", '# "half', "a  b ", '"all of it"', 'says ""twice""', "None"]
    texts = odd + [" ".join(rng.choices(WORDS, k=rng.randint(2, 7))) for _ in range(n - len(odd))]
    return [(str(i), rng.choice(generate.CHOICES), text) for i, text in enumerate(texts)]


def tsv(path: Path, content: list[tuple[str, str, str]]) -> Path:
    """A file as SIB-200's own: written by pandas, with its quotes."""
    import pandas

    path.parent.mkdir(parents=True, exist_ok=True)
    pandas.DataFrame(content, columns=["index_id", "category", "text"]).to_csv(path, sep="\t", index=False)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Local files of two languages, one a private-use code, with different numbers of test rows."""
    folder = tmp_path_factory.mktemp("sib200")
    for seed, (language, n) in enumerate((("gle_Latn", 24), ("qaa_Latn", 12))):
        for split, size in (("train", 30), ("dev", 8), ("test", n)):
            tsv(folder / language / f"{split}.tsv", rows(size, seed * 10 + size))
    (folder / "LANGUAGES.txt").write_text("gle_Latn\nqaa_Latn\n")
    return folder


@pytest.fixture(scope="module")
def tasks(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "tasks"
    generate.main(["--tsv-dir", str(data), "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and a run of three checkpoints with a BPE tokenizer that merges across words, so that the last token of a
    prompt changes with the choice after it; and `even`, which finds every token equally likely, with one of bytes."""
    import torch
    from helpers import tiny_model
    from tokenizers import Tokenizer, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models")
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    texts = [f'is: {choice} "{word}' for word in WORDS for choice in generate.CHOICES]
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    for seed, name in enumerate(("base", "run/checkpoint-5", "run/checkpoint-10", "run/checkpoint-200")):
        save_tiny("llama", folder / name, seed=seed, layers=2, vocab_size=320, tokenizer=False, dtype="bfloat16")
    for name in ("base", "run"):
        tokenizer.save_pretrained(folder / name)
    model = tiny_model("llama", layers=2)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    save_tiny("llama", folder / "even", model=model)
    return folder


def read(language_file: Path) -> list[list[str]]:
    """The rows as the authors of SIB-200 read them."""
    with open(language_file, encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter="\t"))[1:]


def result(folder: Path, model: Path) -> dict:
    files = list((folder / str(model).replace("/", "__")).glob("results_*.json"))
    assert len(files) == 1
    return json.loads(files[0].read_text(encoding="utf-8"))


def direct(model_folder: Path, tokenizer_folder: Path, test: Path) -> tuple[list[int], list[int], list[int]]:
    """(choice by log-likelihood, choice by log-likelihood a character, target) of every row: one forward a choice."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    plain, by_length, targets = [], [], []
    for _, category, text in read(test):
        prompt = f'The category of "{text}" is:'
        sums = []
        for choice in generate.CHOICES:
            whole = tokenizer(f"{prompt} {choice}")["input_ids"]
            start = len(tokenizer(prompt)["input_ids"])
            with torch.no_grad():
                logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(float(logs[i - 1, whole[i]]) for i in range(start, len(whole))))
        plain.append(int(np.argmax(sums)))  # ties go to the first, as in lm_eval
        by_length.append(int(np.argmax([s / len(c) for s, c in zip(sums, generate.CHOICES, strict=True)])))
        targets.append(generate.CHOICES.index(category))
    return plain, by_length, targets


def accuracies(model_folder, tokenizer_folder, test) -> dict[str, float]:
    plain, by_length, targets = map(np.array, direct(model_folder, tokenizer_folder, test))
    return {"acc,none": (plain == targets).mean(), "acc_norm,none": (by_length == targets).mean()}


# The committed folder


def test_committed_files_are_what_the_generator_writes(tmp_path):
    languages = generate.committed_languages()
    assert len(languages) == 205 and languages == sorted(set(languages))
    files = generate.hub_files(languages)
    for name, text in files.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, name
    assert {p.name for p in FOLDER.iterdir() if p.suffix == ".yaml" or generate.is_ours(p)} == set(files)
    generate.main(["--out", str(tmp_path / "again")])
    assert {p.name: p.read_text(encoding="utf-8") for p in (tmp_path / "again").iterdir()} == files


def test_lm_eval_finds_exactly_the_205_tasks_and_the_group():
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    languages = generate.committed_languages()
    assert manager.all_subtasks == sorted(f"sib200_{code}" for code in languages)
    assert manager.all_groups == ["sib200"]
    assert len(manager.all_tasks) == 206
    assert {"sib200_gle_Latn", "sib200_zho_Hans", "sib200_eng_Latn"} <= set(manager.all_subtasks)
    for code in languages:
        config = manager.task_index[f"sib200_{code}"].cfg
        assert config["dataset_path"] == "Davlan/sib200" and config["dataset_name"] == code
        assert config["doc_to_text"] == 'The category of "{{text}}" is:'
        assert config["doc_to_target"] == "category" and config["fewshot_delimiter"] == "\n"
        assert (config["fewshot_split"], config["test_split"]) == ("train", "test")
        assert [m["metric"] for m in config["metric_list"]] == ["acc", "acc_norm"]
        assert config["doc_to_choice"] == [
            "science/technology",
            "travel",
            "politics",
            "sports",
            "health",
            "entertainment",
            "geography",
        ]
    group = manager.task_index["sib200"].cfg
    assert group["task"] == manager.all_subtasks
    assert [m["weight_by_size"] for m in group["aggregate_metric_list"]] == [False, False]


def test_no_task_name_hides_one_of_lm_eval():
    import lm_eval.tasks

    built_in = Path(lm_eval.tasks.__file__).parent
    names = {p.stem for p in built_in.glob("**/*.yaml")}
    assert not any(name.startswith("sib200") for name in names)


# Local TSV files


def test_lm_eval_reads_local_files_with_quotes_and_hashes_intact(data, tasks):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    assert manager.all_tasks == ["sib200", "sib200_gle_Latn", "sib200_qaa_Latn"]
    task = manager.load("sib200_gle_Latn")["tasks"]["sib200_gle_Latn"]
    for split, name in (("train", "train"), ("validation", "dev"), ("test", "test")):
        wanted = read(data / "gle_Latn" / f"{name}.tsv")
        found = [[str(doc["index_id"]), doc["category"], doc["text"]] for doc in task.dataset[split]]
        assert found == wanted
    doc = task.test_docs()[0]
    assert task.doc_to_text(doc) == 'The category of """ is:'  # one quote, which pandas writes as four
    assert task.doc_to_target(doc) == doc["category"]
    shots = task.fewshot_context(doc, num_fewshot=2)
    assert shots.count("The category of") == 3 and shots.count("\n") == 2 and "\n\n" not in shots


def test_local_and_hub_tasks_ask_the_same(tasks):
    local = (tasks / "_default_yaml").read_text().replace('"csv"', '"Davlan/sib200"')
    assert local == (FOLDER / "_default_yaml").read_text()


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    from lm_eval.tasks import TaskManager

    content = rows(9, 3)
    for split in ("train", "test"):  # and no dev.tsv: lm_eval does not need one
        file = tsv(tmp_path / "data" / "eng_Latn" / f"{split}.tsv", content)
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    generate.main(["--tsv-dir", str(tmp_path / "data"), "--out", str(tmp_path / "tasks")])
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    task = manager.load("sib200_eng_Latn")["tasks"]["sib200_eng_Latn"]
    assert [(str(d["index_id"]), d["category"], d["text"]) for d in task.test_docs()] == content


@pytest.fixture()
def real_data():
    folder = shared_dir()
    if not folder:
        pytest.skip("no SIB-200 files: SHARED_DIR is not set, and there is no folder shared beside the repository")
    return Path(folder) / "sib200"


def test_lm_eval_reads_real_sib200(real_data, tmp_path):
    from lm_eval.tasks import TaskManager

    generate.main(["--tsv-dir", str(real_data), "--out", str(tmp_path / "tasks")])
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    quoted: Counter = Counter()  # sentences that a reader without quoting would read otherwise
    for name, task in manager.load(manager.all_subtasks)["tasks"].items():
        sizes = {split: task.dataset[split].num_rows for split in task.dataset}
        assert sizes == {"train": 701, "validation": 99, "test": 204}, name
        for split, file in (("train", "train"), ("validation", "dev"), ("test", "test")):
            path = real_data / name.removeprefix("sib200_") / f"{file}.tsv"
            wanted = read(path)
            assert [[str(d["index_id"]), d["category"], d["text"]] for d in task.dataset[split]] == wanted
            assert [[*row.values()] for row in generate.read_tsv(path)] == wanted
            found = sib200.rows(path.parent, file)
            assert [[row[column] for column in ("index_id", "category", "text")] for row in found] == wanted
            plain = [line.split("\t")[2] for line in path.read_text(encoding="utf-8").splitlines()[1:]]
            quoted[name.removeprefix("sib200_")] += sum(a != b[2] for a, b in zip(plain, wanted, strict=True))
    assert (quoted["eng_Latn"], quoted["arb_Arab"], quoted["eus_Latn"], quoted["hin_Deva"]) == (53, 108, 1, 0)


@pytest.mark.slow
def test_accuracy_on_real_irish_equals_a_direct_loop(real_data, tmp_path):
    save_tiny("qwen2", tmp_path / "model", seed=3, layers=2, max_position_embeddings=2048)
    data = tmp_path / "sib200"
    shutil.copytree(real_data / "gle_Latn", data / "gle_Latn")
    test = data / "gle_Latn" / "test.tsv"
    test.write_text("\n".join(test.read_text("utf-8").split("\n")[:49]) + "\n", "utf-8")
    common = ["--tsv-dir", str(data), "-o", str(tmp_path / "out"), "--dtype", "float32"]
    evaluate.main([str(tmp_path / "model"), "--tasks", "sib200_gle_Latn", *common])
    row = result(tmp_path / "out", tmp_path / "model")["results"]["sib200_gle_Latn"]
    wanted = accuracies(tmp_path / "model", tmp_path / "model", test)
    assert row["sample_len"] == 48
    assert {metric: row[metric] for metric in wanted} == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id\tlabel\ttext\n1\tsports\ta\n", "has no column category in its first line, only id, label, text"),
        ("index_id\tcategory\ttext\n1\tsports\n", "line 2: 2 fields instead of 3"),
        ("index_id\tcategory\ttext\n1\tsports\ta\tb\n", "line 2: 4 fields instead of 3"),
        ("index_id\tcategory\ttext\n1\tsports\ta\n\n2\tsports\tb\n", "line 3: 0 fields"),
        ('index_id\tcategory\ttext\n1\tsports\t"a\n2\tsports\tb"\n', "line 2: not as pandas writes a TSV"),
        ('index_id\tcategory\ttext\n1\tsports\t"a" b\n', "line 2: not as pandas writes a TSV"),
        ('index_id\tcategory\ttext\n1\tsports\t""\n', "line 2: the text is empty"),
        ("index_id\tcategory\ttext\n1\tSports\ta\n", "line 2: category 'Sports'"),
        ("index_id\tcategory\ttext\n1\tsports\t \n", "line 2: the text is empty"),
        ("index_id\tcategory\ttext\n1\tsports\ta\rb\n", "line 2: not as pandas writes a TSV .new-line character"),
        ('index_id\tcategory\ttext\n1\tsports\t"a\rb"\n', "line 2: a carriage return"),
        ("index_id\tcategory\ttext\n", "no rows"),
        (b"index_id\tcategory\ttext\n1\tsports\t\xff\n", "cannot be read as UTF-8"),
    ],
)
def test_malformed_tsv_is_named_by_file_line_and_reason(tmp_path, text, words):
    for split in ("train", "dev"):
        tsv(tmp_path / "data" / "gle_Latn" / f"{split}.tsv", rows(6, 1))
    file = tmp_path / "data" / "gle_Latn" / "test.tsv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=words) as error:
        generate.main(["--tsv-dir", str(tmp_path / "data"), "--out", str(tmp_path / "tasks")])
    assert "gle_Latn/test.tsv" in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def test_folders_that_are_no_data(tmp_path):
    out = ["--out", str(tmp_path / "tasks")]
    with pytest.raises(InputError, match="does not exist"):
        generate.main(["--tsv-dir", str(tmp_path / "absent"), *out])
    with pytest.raises(InputError, match=r"no <language>/test.tsv"):
        generate.main(["--tsv-dir", str(tmp_path), *out])
    tsv(tmp_path / "gle_Latn" / "train.tsv", rows(6, 1))
    with pytest.raises(InputError, match=r"lacks test.tsv"):
        generate.main(["--tsv-dir", str(tmp_path), *out])
    with pytest.raises(InputError, match="needs --out"):
        generate.main(["--tsv-dir", str(tmp_path)])
    tsv(tmp_path / "a[b]" / "gle_Latn" / "test.tsv", rows(6, 1))
    with pytest.raises(InputError, match="rename the folder"):
        generate.main(["--tsv-dir", str(tmp_path / "a[b]"), *out])


def test_own_folder_is_replaced_and_a_foreign_one_refused(data, tmp_path):
    out = tmp_path / "tasks"
    generate.main(["--tsv-dir", str(data), "--out", str(out)])
    first = {p.name: p.read_bytes() for p in out.iterdir()}
    generate.main(["--tsv-dir", str(data), "--out", str(out)])
    assert {p.name: p.read_bytes() for p in out.iterdir()} == first
    (out / "mine.yaml").write_text("task: mine\n")
    with pytest.raises(InputError, match=r"mine.yaml, which this script did not write"):
        generate.main(["--tsv-dir", str(data), "--out", str(out)])
    assert (out / "mine.yaml").read_text() == "task: mine\n"
    with pytest.raises(InputError, match="did not write"):
        generate.main(["--tsv-dir", str(data), "--out", str(data)])
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        generate.main(["--tsv-dir", str(data), "--out", str(tmp_path / "file")])


# Evaluation


@pytest.fixture(scope="module")
def evaluated(data, models, tmp_path_factory):
    """Every model on both languages and the group, as `evaluate.py` writes it."""
    out = tmp_path_factory.mktemp("lm_eval")
    chosen = [str(models / name) for name in ("base", "run/checkpoint-10", "even")]
    evaluate.main([*chosen, "--tasks", "sib200", "--tsv-dir", str(data), "-o", str(out), "--dtype", "float32"])
    return out


def test_accuracy_equals_a_direct_loop(data, models, evaluated):
    for name, tokenizer in (("base", "base"), ("run/checkpoint-10", "run"), ("even", "even")):
        found = result(evaluated, models / name)
        wanted = {}
        for code in ("gle_Latn", "qaa_Latn"):
            wanted[code] = accuracies(models / name, models / tokenizer, data / code / "test.tsv")
            row = found["results"][f"sib200_{code}"]
            for metric, value in wanted[code].items():
                assert row[metric] == pytest.approx(value, abs=1e-12), (name, code, metric)
        for metric in ("acc,none", "acc_norm,none"):  # 24 and 12 rows: the macro mean counts both languages the same
            mean = (wanted["gle_Latn"][metric] + wanted["qaa_Latn"][metric]) / 2
            assert found["groups"]["sib200"][metric] == pytest.approx(mean, abs=1e-12)


def test_choices_scored_in_batches_equal_the_direct_loop(data, models):
    """The controls of the layer swap score choices by themselves: they have to be the choices of lm_eval."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cpt_utils.models import scoring

    test = data / "gle_Latn" / "test.tsv"
    model = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(models / "base", pad_token="</s>")
    prompts = [f'The category of "{text}" is:' for _, _, text in read(test)]
    scores = np.array(
        scoring.choice_logliks(model, tokenizer, prompts, [generate.CHOICES] * len(prompts), batch_size=5)
    )
    plain, by_length, _ = direct(models / "base", models / "base", test)
    assert scores.argmax(1).tolist() == plain
    assert (scores / [len(choice) for choice in generate.CHOICES]).argmax(1).tolist() == by_length


def test_the_direct_loop_meets_ties_and_merged_tokens(data, models):
    """Else the test above would say nothing about them."""
    from transformers import AutoTokenizer

    plain, _, _ = direct(models / "even", models / "even", data / "gle_Latn" / "test.tsv")
    # travel, sports and health have the fewest bytes, seven with the space: three equal sums, and the first one wins.
    assert set(plain) == {generate.CHOICES.index("travel")}
    tokenizer = AutoTokenizer.from_pretrained(models / "run")
    prompt = tokenizer("x is:")["input_ids"]
    assert any(tokenizer(f"x is: {choice}")["input_ids"][: len(prompt)] != prompt for choice in generate.CHOICES)


@pytest.mark.slow
def test_the_command_line_gives_the_numbers_of_the_driver(tasks, models, evaluated, tmp_path):
    name = models / "run" / "checkpoint-10"
    arguments = f"pretrained={name},tokenizer={models / 'run'},dtype=float32"
    command = ["--model", "hf", "--model_args", arguments, "--tasks", "sib200"]
    command += ["--include_path", str(tasks), "--output_path", str(tmp_path), "--batch_size", "4", "--device", "cpu"]
    # `python -m lm_eval`, but it does not read its own 14,000 task files.
    (tmp_path / "lm_eval_alone.py").write_text(
        "import functools, runpy\nimport lm_eval.tasks as t\n"
        "t.TaskManager = functools.partial(t.TaskManager, include_defaults=False)\n"
        "runpy.run_module('lm_eval', run_name='__main__', alter_sys=True)\n"
    )
    done = run("lm_eval_alone.py", *command, root=tmp_path)
    assert done.returncode == 0, done.stderr
    line, driver = result(tmp_path, name), result(evaluated, name)
    for key in ("results", "groups", "n-samples", "n-shot", "versions", "group_subtasks", "higher_is_better"):
        assert line[key] == driver[key], key
    for key in ("model", "model_dtype", "model_num_parameters", "model_revision", "model_sha", "limit"):
        assert line["config"][key] == driver["config"][key], key
    for key in ("model_source", "model_name", "model_name_sanitized", "eot_token_id"):
        assert line[key] == driver[key], key
    assert set(driver) - set(line) == {"_header"} and not set(line) - set(driver)


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(data, models, evaluated, tmp_path):
    """Each process evaluates whole models."""
    chosen = [models / "base", models / "run" / "checkpoint-10"]
    flags = ["--tasks", "sib200", "--tsv-dir", data, "-o", tmp_path, "--dtype", "float32"]
    said = launch("lm_eval_sib200/evaluate.py", *chosen, *flags).stdout
    for number, name in enumerate(chosen, start=1):
        assert said.count(f"[{number}/2] {name}") == 1
        assert result(tmp_path, name)["results"] == result(evaluated, name)["results"]


def count_evaluations(monkeypatch) -> list[str]:
    done = []
    real = evaluate.evaluate

    def counted(ref, *rest):
        done.append(Path(ref.spec).name)
        return real(ref, *rest)

    monkeypatch.setattr(evaluate, "evaluate", counted)
    return done


def test_finished_models_are_left_alone(data, models, tmp_path, monkeypatch):
    done = count_evaluations(monkeypatch)
    base = tmp_path / "model"
    save_tiny("llama", base, seed=1, layers=2)
    local = tmp_path / "data"
    for split in ("train", "test"):
        tsv(local / "gle_Latn" / f"{split}.tsv", rows(8, 5))
    common = [str(base), "--tasks", "sib200_gle_Latn", "--tsv-dir", str(local), "-o", str(tmp_path / "out")]

    evaluate.main([*common, "--limit", "3"])
    evaluate.main(common)  # a limited run is no result
    assert len(done) == 2
    evaluate.main(common)
    evaluate.main([*common, "--batch-size", "2"])
    assert len(done) == 2
    save_tiny("llama", base, seed=2, layers=2)  # trained again at the same place
    evaluate.main(common)
    assert len(done) == 3
    tsv(local / "gle_Latn" / "test.tsv", rows(9, 6))  # other data under the same name
    evaluate.main(common)
    assert len(done) == 4
    evaluate.main([*common, "--num-fewshot", "2"])
    evaluate.main([*common, "--dtype", "float64"])
    evaluate.main([*common, "--overwrite"])
    assert len(done) == 7
    monkeypatch.setattr(generate_of_evaluate(), "VERSION", 3.0)  # another reading of the same files, say
    evaluate.main(common)
    evaluate.main(common)
    assert len(done) == 8
    files = list((tmp_path / "out").rglob("results_*.json"))
    assert len(files) == 8 and not list((tmp_path / "out").glob(".*"))


def test_another_spelling_of_a_folder_is_the_same_model(data, tmp_path, monkeypatch):
    """And a copy of a checkpoint is another one: each step of a run has its own result."""
    monkeypatch.chdir(tmp_path)
    done = count_evaluations(monkeypatch)
    save_tiny("llama", tmp_path / "base", seed=1, layers=2)
    shutil.copytree("base", "run/checkpoint-5")
    shutil.copytree("base", "run/checkpoint-10")
    common = ["--tasks", "sib200_qaa_Latn", "--tsv-dir", str(data), "-o", "out"]
    evaluate.main(["base", "run", *common])
    assert done == ["base", "checkpoint-5", "checkpoint-10"]
    evaluate.main(["./base/", str(tmp_path / "base"), "run/../base", str(tmp_path / "run"), *common])
    assert len(done) == 3
    swap = ["--swap", "layers", "--base", "base", "--layers", "1"]
    evaluate.main(["run/checkpoint-5", *swap, *common])
    evaluate.main(["./run/checkpoint-5", *swap[:2], "--base", str(tmp_path / "base"), "--layers", "1", *common])
    assert (
        len(done) == 4
    )  # that of the model as it is does not stand for it, and the base may be spelled otherwise, too
    evaluate.main(["./run/checkpoint-5", *swap[:4], "--layers", "0", *common])
    assert len(done) == 5
    shutil.copytree("base", "run/checkpoint-20")
    evaluate.main(["run/checkpoint-20", *swap, *common])
    evaluate.main(["run/checkpoint-20", *common])  # nor does a swap's for the model as it is
    assert len(done) == 7 and len(list(Path("out").glob("*/results_*.json"))) == 7


@pytest.mark.parametrize("kind", ["semantic_hub", "random", "layers", "attention", "ffn"])
def test_a_swap_carries_the_gate_of_its_layers(data, models, tmp_path, capsys, kind):
    passed = {
        "passed": False, "model": "m", "difference": 0.01, "ci_low": -0.02, "ci_high": 0.04, "level": 0.99, "n": 50
    }  # fmt: skip
    payload, file = {"interface_layers": [0]}, tmp_path / "layers.json"
    if kind == "ffn":
        results.write_list(file, "layers", {"layers": [0]}, results.header("lsn-layers", gate=passed))
    else:
        results.write_json(file, payload, results.header("layer-specialize", gate=passed))
    common = ["--tasks", "sib200_qaa_Latn", "--tsv-dir", str(data), "-o", str(tmp_path / "out"), "--limit", "2"]
    common += [str(models / "run" / "checkpoint-5"), "--swap", kind, "--base", str(models / "base")]
    evaluate.main([*common, "--layers", str(file)])
    (found,) = (tmp_path / "out").glob("*/results_*.json")
    assert json.loads(found.read_text())["_header"]["gate"] == passed
    assert capsys.readouterr().err.count("does not retrieve clearly better than its untrained twin") == 1
    found.unlink()
    evaluate.main([*common, "--layers", "0"])  # of numbers nothing is known
    (found,) = (tmp_path / "out").glob("*/results_*.json")
    assert json.loads(found.read_text())["_header"]["gate"] is None


def generate_of_evaluate():
    from cpt_utils.base import cli

    return cli.sibling("lm_eval_sib200/generate.py")


def test_a_study_needs_no_arguments_and_its_results_are_correlated(data, models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    study = {
        "base": str(models / "base"),
        "run": str(models / "run"),
        "results": "results",
        "data": {"task": {"name": "sib200_qaa_Latn", "dir": str(data)}},
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    done = count_evaluations(monkeypatch)
    evaluate.main(["--steps", "5"])
    evaluate.main([])
    assert done == ["base", "checkpoint-5", "checkpoint-10", "checkpoint-200"]
    assert "using those of run" in capsys.readouterr().out

    changes = {str(s): {"interface_avg": s / 1e4, "semantic_hub_avg": s**0.5 / 1e4} for s in (5, 10, 200)}
    file = tmp_path / "results" / "weight-diff" / "int_and_sem.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"base_model": study["base"], "target_model": study["run"], "checkpoints": changes}))
    correlation = load_script("downstream-correlation/downstream_correlation.py")
    monkeypatch.setattr(correlation, "draw", lambda *arguments: None)
    correlation.main([])
    found = json.loads((tmp_path / "results" / "downstream-correlation" / "correlation.json").read_text())
    assert list(found["values"]) == ["0", "5", "10", "200"] and found["interface"]["n_points"] == 3
    assert found["values"]["5"]["n"] == 12


def test_bad_requests_are_one_line(data, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = count_evaluations(monkeypatch)
    base = str(models / "base")
    out = ["-o", str(tmp_path / "out")]
    with pytest.raises(InputError, match="no task 'sib200_xyz'"):
        monkeypatch.setattr("lm_eval.tasks.TaskManager", small_manager)
        evaluate.main([base, "--tasks", "sib200_xyz", "--tsv-dir", str(data), *out])
    with pytest.raises(InputError, match=r"the data of sib200_gle_Latn cannot be loaded.*--tsv-dir"):
        evaluate.main([base, "--tasks", "sib200_gle_Latn", *out])
    with pytest.raises(InputError, match="no such folder"):
        evaluate.main([str(tmp_path / "absent"), "--tasks", "sib200_gle_Latn", "--tsv-dir", str(data), *out])
    with pytest.raises(InputError, match="--tasks"):
        evaluate.main([base, "--tsv-dir", str(data), *out])
    with pytest.raises(InputError, match="are mutually exclusive"):
        evaluate.main([base, "--tasks", "x", "--tsv-dir", str(data), "--include-path", str(data), *out])
    assert not done and not (tmp_path / "out").exists()


def small_manager(include_path, include_defaults=True):
    """A task manager that never reads lm_eval's own 14,000 task files."""
    from lm_eval.tasks.manager import TaskManager

    return TaskManager(include_path=include_path, include_defaults=False)


# Swapped in memory


def samples(folder: Path, model: str, task: str) -> list[dict]:
    (file,) = (folder / model.replace("/", "__")).glob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", ["semantic_hub", "random", "layers", "attention", "ffn"])
def test_a_swap_in_memory_gives_the_numbers_of_the_written_folder(data, models, tmp_path, kind):
    """Accuracies and the log-likelihood of every choice of every row, to the bit, against steps 4 and 11 themselves."""
    base, target = models / "base", models / "run" / "checkpoint-200"
    (tmp_path / "interface.json").write_text(json.dumps({"interface_layers": [0]}))
    (tmp_path / "rich.json").write_text(json.dumps({"layers": [1]}))
    layers = {"layers": "1", "ffn": str(tmp_path / "rich.json")}.get(kind, str(tmp_path / "interface.json"))
    if kind in ("attention", "ffn"):
        step, flag = {"attention": ("attn_int", "--layer-selection"), "ffn": ("ffn_lsn", "--layer-list")}[kind]
        run = ["--base-model", str(base), "--checkpoint-dir", str(target), flag, layers]
        load_script(f"component-swap/{step}_swap.py").main([*run, "--output-dir", str(tmp_path / "written")])
        written = tmp_path / "written" / "checkpoint-200"
    else:
        method = "semantic_hub" if kind == "layers" else kind
        run = [str(base), str(target), str(tmp_path / "interface.json"), "-o", str(tmp_path / "written")]
        load_script("layer-swap/layer-swap.py").main([*run, "--methods", method])
        written = tmp_path / "written" / method
    common = ["--tasks", "sib200_qaa_Latn", "--tsv-dir", str(data), "--dtype", "float32", "--log-samples"]
    common += ["-o", str(tmp_path / "out")]
    evaluate.main([str(written), *common])
    swap = ["--swap", kind, "--base", str(base), "--layers", layers]
    evaluate.main([str(target), *common, *swap])
    name = f"{target}+{kind}"
    ours, disk = result(tmp_path / "out", Path(name)), result(tmp_path / "out", written)
    for key in ("results", "n-samples", "n-shot", "versions", "task_hashes"):
        assert ours[key] == disk[key], key
    one, two = (samples(tmp_path / "out", str(n), "sib200_qaa_Latn") for n in (name, written))
    assert len(one) == 12 and all(len(row["resps"]) == len(generate.CHOICES) for row in one)
    assert one == two
    assert set(ours) == set(disk) and set(ours["_header"]) - set(disk["_header"]) == {"swap", "gate"}
    facts = ours["_header"]["swap"]
    record = json.loads((written / "swap.json").read_text())
    for key in ("parameters_from_base", "parameters", "recipe"):
        assert facts[key] == record[key], key
    assert facts["base"]["spec"] == str(base) and ours["_header"]["models"]["model"]["spec"] == str(target)


def test_swaps_that_cannot_be(data, models, tmp_path):
    common = [str(models / "run" / "checkpoint-5"), "--tasks", "sib200_qaa_Latn", "--tsv-dir", str(data)]
    out, base = ["-o", str(tmp_path / "out")], ["--base", str(models / "base")]
    with pytest.raises(InputError, match="--swap needs -o"):
        evaluate.main([*common, "--swap", "layers", *base, "--layers", "1"])
    with pytest.raises(InputError, match="give --swap as well"):
        evaluate.main([*common, *out, "--layers", "1"])
    with pytest.raises(InputError, match="needs --layers"):
        evaluate.main([*common, *out, "--swap", "layers", *base])
    with pytest.raises(InputError, match="layer 7; the model has layers 0 to 1"):
        evaluate.main([*common, *out, "--swap", "layers", *base, "--layers", "0,7"])
    with pytest.raises(InputError, match="no layer is left to swap"):
        evaluate.main([*common, *out, "--swap", "semantic_hub", *base, "--layers", "0,1"])
    assert not (tmp_path / "out").exists()
