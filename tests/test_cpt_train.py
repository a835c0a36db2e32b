"""cpt/train.py: packing and shares, equality with a plain loop, resume to the same bits after SIGKILL, bad input."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import launch
import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, bits, load_script, read_tensors

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs, tokenization

STEPS, BLOCK, BATCH = 12, 16, 4


@pytest.fixture(scope="module")
def initial():
    return cli.sibling("cpt/initial.py")


@pytest.fixture(scope="module")
def packing():
    return cli.sibling("cpt/packing.py")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Three sources of unequal document lengths, in the three file formats."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)

    def documents(words: str, n: int, longest: int) -> list[str]:
        return [" ".join(rng.choice(words.split(), size=int(rng.integers(1, longest)))) for _ in range(n)]

    (folder / "a.txt").write_text("\n".join([*documents("the red dog runs home at night", 60, 20), "", "  "]) + "\n")
    with gzip.open(folder / "b.txt.gz", "wt", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in documents("le chien rouge rentre la nuit", 40, 9))
    with open(folder / "c.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"body": line}) + "\n" for line in documents("der rote hund läuft", 30, 30))
    return folder


def settings(texts: Path, **changes) -> dict:
    """A base training that takes a second."""
    return {
        "model": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
        },
        "tokenizer": {"vocab_size": 290},
        "sources": [
            {"name": "a", "weight": 0.5, "files": str(texts / "a.txt")},
            {"name": "b", "weight": 0.3, "files": [str(texts / "b.txt.gz")]},
            {"name": "c", "weight": 0.2, "files": str(texts / "c.jsonl"), "column": "body"},
        ],
        "block_size": BLOCK,
        "batch_size": BATCH,
        "steps": STEPS,
        "learning_rate": 5.0e-3,
        "warmup_steps": 2,
        "state_every": 3,
        "dtype_on_disk": "float32",
    } | changes


def write(path: Path, values: dict) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.fixture(scope="module")
def base(train, texts, tmp_path_factory) -> Path:
    """A finished base model."""
    folder = tmp_path_factory.mktemp("base")
    train.main(["--config", write(folder / "base.yaml", settings(texts)), "--output-dir", str(folder / "model")])
    return folder / "model"


def same_files(one: Path, other: Path) -> None:
    """Every file of two runs is equal to the byte, records up to their headers."""
    names = sorted(str(p.relative_to(one)) for p in one.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(other)) for p in other.rglob("*") if p.is_file())
    for name in set(names) - {"timing.json", "train.json"}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    records = [json.loads((run / "train.json").read_text()) for run in (one, other)]
    for record in records:
        record.pop("_header")
    assert records[0] == records[1]


# --- packing


def test_shares_hold_in_every_stretch(packing):
    rng = np.random.default_rng(0)
    lengths = [rng.integers(2, 30, size=n) for n in (500, 80, 40)]
    weights = [0.44, 0.36, 0.20]
    total = 20_000
    source, document = packing.plan(lengths, weights, total, seed=1)
    size = np.array([lengths[s][d] for s, d in zip(source, document, strict=True)])
    assert size.sum() >= total
    for number, weight in enumerate(weights):
        running = np.cumsum(np.where(source == number, size, 0))
        wanted = weight * np.cumsum(size)
        assert np.abs(running - wanted).max() < 4 * 30  # a few documents' length, whatever the stretch
    again = packing.plan(lengths, weights, total, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(again, (source, document), strict=True))
    assert not np.array_equal(packing.plan(lengths, weights, total, seed=2)[1][:50], document[:50])


def test_a_pass_ends_before_the_next_begins(packing):
    lengths = [np.full(10, 5), np.full(100, 5)]
    source, document = packing.plan(lengths, [1, 1], 300, seed=0)
    small = document[source == 0]
    # The place of a document moves by less than its length, so that only neighbours change places.
    for start in (0, 10):
        assert len(set(small[start : start + 10])) >= 9
    assert len(set(small[:10])) + len(set(small[10:20])) >= 18
    assert len(document[source == 1]) == len(set(document[source == 1]))


def test_blocks_are_documents_with_eos_between_them(packing, base, texts, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    sources = [packing.Source.parse(values, "here") for values in settings(texts)["sources"]]
    blocks, facts = packing.pack(sources, tokenizer, BLOCK, 48, 42, tmp_path)
    assert blocks.shape == (48, BLOCK) and blocks.dtype == np.int32
    known = {text for source in sources for text in source.documents()}
    pieces = tokenizer.decode(blocks.reshape(-1).tolist()).split(tokenizer.eos_token)
    assert len(pieces) > 40
    assert all(piece in known for piece in pieces[:-1])  # the last one may be cut
    assert sum(f["tokens_used"] for f in facts.values()) == 48 * BLOCK
    for source in sources:
        assert abs(facts[source.name]["tokens_used"] / (48 * BLOCK) - source.weight) < 0.05
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blocks.i32", "blocks.json"]
    again, _ = packing.pack([], tokenizer, BLOCK, 48, 42, tmp_path)  # found, not made again
    assert np.array_equal(blocks, again)


def test_hub_data_give_the_same_documents_and_stop_early(packing, base, texts, tmp_path):
    """load_dataset itself, with its builder for local JSON instead of a repository."""
    from transformers import AutoTokenizer

    def hub(**keys):
        return packing.Source.parse({"name": "c", "weight": 1, "hub": keys, "column": "body"}, "here")

    source = hub(id="json", data_files=str(texts / "c.jsonl"))
    from_file = packing.Source("c", 1.0, [texts / "c.jsonl"], column="body")
    assert list(source.documents()) == list(from_file.documents()) != []
    packing_batch, packing.BATCH = packing.BATCH, 4
    try:
        ids, bounds, _ = packing.tokenize(source, AutoTokenizer.from_pretrained(base), 50, tmp_path / "tokens")
    finally:
        packing.BATCH = packing_batch
    assert 50 <= len(ids) == bounds[-1] and len(bounds) - 1 in (4, 8, 12)
    with pytest.raises(InputError, match="hub data nobody/nothing cannot be read"):
        list(hub(id="nobody/nothing").documents())
    with pytest.raises(InputError, match=r"unknown key hub.splits; did you mean hub\.split\?"):
        hub(id="json", splits="train")


def test_nulls_marks_and_special_tokens_are_no_tokens(packing, train, texts, base, tmp_path, capsys):
    """Against the documents written by hand: a null is none, a mark of byte order is none, a tag is its letters."""
    import pyarrow
    from pyarrow import parquet
    from transformers import AutoTokenizer

    rows = [
        {"text": "\ufeffthe red dog"},
        {"text": None},
        {"text": [{"text": "runs"}, {"text": None}, {"text": "home"}]},
        {"text": "<|endoftext|>at night<|pad|>"},
        {"text": "  "},
        {"text": "None"},
    ]
    wanted = ["the red dog", "runs\nhome", "<|endoftext|>at night<|pad|>", "None"]
    jsonl = "".join("\ufeff" + json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(jsonl, encoding="utf-8")
    pieces = [row | {"text": row["text"] if isinstance(row["text"], list) else [{"text": row["text"]}]} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(pieces), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_bytes("".join("\ufeff" + text.replace("\n", " ") + "\r\n" for text in wanted).encode())
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = {token: i for token, i in tokenizer.get_vocab().items() if i not in tokenizer.all_special_ids}
    for name, nulls in (("a.jsonl", 2), ("a.parquet", 2), ("a.txt", 0)):
        source = packing.Source.parse({"name": "a", "weight": 1, "files": str(tmp_path / name)}, "here")
        documents = [text.replace("\n", " ") for text in source.documents()]
        assert documents == [text.replace("\n", " ") for text in wanted], name
        ids, bounds, counts = packing.tokenize(source, tokenizer, 0, tmp_path / "tokens")
        assert counts == {"null_texts": nulls, "special_documents": 1}
        for (start, end), text in zip(itertools.pairwise(bounds), wanted, strict=True):
            *own, eos = ids[start:end].tolist()
            assert eos == tokenizer.eos_token_id and set(own) <= set(plain.values())
            assert tokenizer.decode(own).replace("\n", " ") == text.replace("\n", " ")
    values = settings(texts, steps=2, sources=[{"name": "a", "weight": 1, "files": str(tmp_path / "a.jsonl")}])
    train.main(["--config", write(tmp_path / "c.yaml", values), "--output-dir", str(tmp_path / "out")])
    facts = json.loads((tmp_path / "out" / "train.json").read_text())["tokens"]["a"]
    assert (facts["documents"], facts["null_texts"], facts["special_documents"]) == (4, 2, 1)
    said = capsys.readouterr()
    assert "source a: 2 texts are null" in said.err
    assert "a: 1 documents hold the text of a special token (such as </s>), tokenized as ordinary text" in said.out


def test_tokenizer_has_the_asked_tokens(packing):
    whole = [" travel", " science/technology"]
    text = ["the tourist likes travel and science/technology more"] * 5
    tokenizer = packing.train_tokenizer(iter(text), 300, {"eos": "</s>", "pad": "<pad>"}, whole)
    assert len(tokenizer) <= 300
    for word in whole:
        assert len(tokenizer("is:" + word)["input_ids"]) == len(tokenizer("is:")["input_ids"]) + 1
    for sentence in (text[0], "läuft  zweimal\n– ja! 汉字"):
        assert tokenizer.decode(tokenizer(sentence)["input_ids"]) == sentence
    assert tokenizer.eos_token == tokenizer.bos_token == "</s>"
    with pytest.raises(InputError, match="need at least 260"):
        packing.train_tokenizer(iter(text), 259, {"eos": "</s>", "pad": "<pad>"}, whole)


# --- training


def test_losses_and_weights_equal_a_plain_loop(train, packing, base, texts, tmp_path):
    """AdamW with decay on matrices only, clipping at norm 1, linear warm-up, cosine: thirty lines without a Trainer."""
    import math

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = settings(texts)
    sources = [packing.Source.parse(values, "here") for values in config["sources"]]
    blocks, _ = packing.pack(sources, AutoTokenizer.from_pretrained(base), BLOCK, STEPS * BATCH, 42, tmp_path)
    torch.manual_seed(42)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=torch.float32)
    model.train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=5e-3)
    losses = []
    for step in range(STEPS):
        rate = step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / (STEPS - 2)))
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * rate
        ids = torch.from_numpy(blocks[step * BATCH : (step + 1) * BATCH].astype(np.int64))
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    record = json.loads((base / "train.json").read_text())
    np.testing.assert_allclose(record["losses"], losses, atol=2e-5)
    assert losses[-1] < losses[0] - 0.5
    stored = read_tensors(base)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(stored[name], tensor, atol=2e-4, rtol=0)


def test_a_base_is_a_model_folder(base):
    ref = refs.model(base)
    assert ref.config()["dtype"] == "float32" and ref.config()["use_cache"] is True
    assert not refs.is_run(base) and tokenization.has_tokenizer(base)
    assert not (base / ".state").exists()
    record = json.loads((base / "train.json").read_text())
    assert len(record["losses"]) == record["steps"] == STEPS
    assert sum(facts["tokens_used"] for facts in record["tokens"].values()) == STEPS * BATCH * BLOCK
    assert "seconds" not in record and json.loads((base / "timing.json").read_text())["seconds"] > 0


def test_a_run_holds_whole_bfloat16_checkpoints(train, base, texts, tmp_path, capsys):
    """Continued pre-training: strictly loadable folders, lower loss, a seed in the path, nothing done twice."""
    import torch

    from cpt_utils.models import loading

    values = settings(texts, save_steps=[2, 7, 12], dtype_on_disk="bfloat16", output=str(tmp_path / "cpt-{seed}"))
    values = values | {"from": str(base), "sources": values["sources"][2:]}
    values.pop("model"), values.pop("tokenizer")
    args = ["--config", write(tmp_path / "cpt.yaml", values), "--seed", "5"]
    train.main(args)
    run = tmp_path / "cpt-5"
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoint-12",
        "checkpoint-2",
        "checkpoint-7",
        "timing.json",
        "train.json",
    ]
    assert [ref.step for ref in refs.run(run)] == [2, 7, 12]
    for ref in refs.run(run):
        model = loading.load_model(ref, torch.float32, torch.device("cpu"))
        assert {t.dtype for t in read_tensors(ref.spec).values()} == {torch.bfloat16}
        assert ref.config()["dtype"] == "bfloat16" and model.generation_config.eos_token_id == 0
        assert (Path(ref.spec) / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    losses = json.loads((run / "train.json").read_text())["losses"]
    assert losses[-1] < losses[0]
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    capsys.readouterr()
    train.main(args)
    assert "nothing to do" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}

    with pytest.raises(InputError, match=r"another request \(learning_rate: [0-9.]+ asked for, [0-9.]+ in the file\)"):
        train.main([*args, "--learning-rate", "1e-3"])
    train.main([*args, "--learning-rate", "1e-3", "--steps", "3", "--overwrite"])
    assert [ref.step for ref in refs.run(run)] == [2]
    assert len(json.loads((run / "train.json").read_text())["losses"]) == 3


def test_accumulation_changes_no_more_than_rounding(train, base, texts, tmp_path):
    values = settings(texts, gradient_accumulation=2, gradient_checkpointing=True)
    train.main(["--config", write(tmp_path / "c.yaml", values), "--output-dir", str(tmp_path / "out")])
    one, two = (json.loads((run / "train.json").read_text())["losses"] for run in (base, tmp_path / "out"))
    np.testing.assert_allclose(one, two, atol=2e-5)


def test_tied_heads_and_longer_tokenizers(train, packing, texts, tmp_path):
    """A tied head is not on disk; a longer tokenizer needs `resize`."""
    values = settings(texts, steps=2, dtype_on_disk="bfloat16")
    values["model"]["tie_word_embeddings"] = True
    train.main(["--config", write(tmp_path / "b.yaml", values), "--output-dir", str(tmp_path / "base")])
    assert "lm_head.weight" not in read_tensors(tmp_path / "base")
    longer = packing.train_tokenizer(iter(["one two three"]), 310, {"eos": "</s>"}, [f" word{i}" for i in range(40)])
    longer.save_pretrained(tmp_path / "longer")
    further = values | {"from": str(tmp_path / "base"), "tokenizer": {"from": str(tmp_path / "longer")}}
    further.pop("model")
    args = ["--config", write(tmp_path / "c.yaml", further), "--output-dir", str(tmp_path / "cpt")]
    with pytest.raises(InputError, match=r"tokenizer.resize: true"):
        train.main(args)
    assert not (tmp_path / "cpt").exists()
    further["tokenizer"]["resize"] = True
    write(tmp_path / "c.yaml", further)
    train.main(args)
    assert read_tensors(tmp_path / "cpt")["model.embed_tokens.weight"].shape[0] == len(longer)
    assert refs.model(tmp_path / "cpt").config()["vocab_size"] == len(longer)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_in_rows_that_were_never_trained(initial, base, texts, tmp_path, capsys, tied):
    """They begin as transformers begins rows that it adds: at the mean of the old tokens' rows, a hair off."""
    import torch
    from tokenizers import AddedToken
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    n, padded = len(tokenizer), 320
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, tie_word_embeddings=tied)
    model.resize_token_embeddings(padded)
    weights = [model.get_input_embeddings().weight, *([] if tied else [model.get_output_embeddings().weight])]
    with torch.no_grad():
        for weight in weights:
            weight[n:] = 0
    model.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    tokenizer.add_tokens([AddedToken(f" word{i}", normalized=False) for i in range(5)])
    tokenizer.save_pretrained(tmp_path / "longer")
    config = {"from": str(tmp_path / "padded"), "tokenizer": {"from": str(tmp_path / "longer"), "resize": True}}
    made = initial.prepare_model({"seed": 3, "block_size": 8, **config}, tokenizer, tmp_path / "c.yaml")
    said = capsys.readouterr().out
    assert f"embeddings: 5 of {padded} rows belong to new tokens; initialised from {n} old ones" in said
    found = [made.get_input_embeddings().weight, *([] if tied else [made.get_output_embeddings().weight])]
    for weight, old in zip(found, weights, strict=True):
        mean, deviation = old[:n].mean(0), old[:n].std(0)
        assert torch.equal(weight[:n], old[:n]) and torch.equal(weight[n + 5 :], old[n + 5 :])
        off = (weight[n : n + 5] - mean) / deviation
        assert 1e-6 < off.abs().max() < 2e-4  # a standard deviation of sqrt(1e-9) of the old rows'
        assert len(weight[n : n + 5].unique(dim=0)) == 5
    again = initial.prepare_model({"seed": 3, "block_size": 8, **config}, tokenizer, tmp_path / "c.yaml")
    assert torch.equal(again.get_input_embeddings().weight, made.get_input_embeddings().weight)

    # More of them than rows: those in the padding, and the rows that are added.
    tokenizer.add_tokens([AddedToken(f" more{i}", normalized=False) for i in range(padded)])
    many = initial.prepare_model({"seed": 3, "block_size": 8, **config}, tokenizer, tmp_path / "c.yaml")
    weight = many.get_input_embeddings().weight
    assert weight.shape[0] == len(tokenizer) == n + 5 + padded
    assert ((weight[n:] - weights[0][:n].mean(0)).abs() < 1e-3).all()

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "longer")
    del config["tokenizer"]["resize"]
    message = "5 tokens of .*longer, such as ' word0', are not in the base's tokenizer, .*resize: true to .*, or false"
    with pytest.raises(InputError, match=message):
        initial.prepare_model({"seed": 3, "block_size": 8, **config}, tokenizer, tmp_path / "c.yaml")
    config["tokenizer"]["resize"] = False
    kept = initial.prepare_model({"seed": 3, "block_size": 8, **config}, tokenizer, tmp_path / "c.yaml")
    assert torch.equal(kept.get_input_embeddings().weight, weights[0])


def test_tokens_in_place_of_others_and_tokens_that_moved(initial, base, tmp_path, capsys):
    """Reserved tokens that got a new name are new tokens; a tokenizer of other ids is said to be one."""
    import torch
    from transformers import AutoTokenizer

    def renamed(name: str, names: dict[str, str]) -> AutoTokenizer:
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / name)
        file = tmp_path / name / "tokenizer.json"
        whole = json.loads(file.read_text())
        whole["model"]["vocab"] = {names.get(token, token): i for token, i in whole["model"]["vocab"].items()}
        whole["model"]["merges"] = []
        file.write_text(json.dumps(whole))
        return AutoTokenizer.from_pretrained(tmp_path / name)

    old = AutoTokenizer.from_pretrained(base)
    tokenizer = renamed("renamed", {"Ā": "Ἀ"})
    config = {"seed": 3, "block_size": 8, "from": str(base), "tokenizer": {"from": str(tmp_path / "renamed")}}
    config["tokenizer"]["resize"] = True
    made = initial.prepare_model(config, tokenizer, tmp_path / "c.yaml").get_input_embeddings().weight
    before = read_tensors(base)["model.embed_tokens.weight"]
    place = old.convert_tokens_to_ids("Ā")
    changed = (made != before).any(1).nonzero().flatten().tolist()
    assert changed == [place] and "have other ids" not in capsys.readouterr().err
    tokenizer = renamed("moved", {"A": "B", "B": "A"})
    config["tokenizer"]["from"] = str(tmp_path / "moved")
    made = initial.prepare_model(config, tokenizer, tmp_path / "c.yaml").get_input_embeddings().weight
    assert torch.equal(made, before)
    assert "2 tokens of the base's tokenizer, such as" in capsys.readouterr().err


# --- a run that is killed


def die_at_replacement(which: int | str, args: list[str]) -> None:
    """Train in this process, and kill it with SIGKILL right after its `which`-th rename, or the one to that name."""
    rename, seen = os.replace, 0

    def replace(source, target):
        nonlocal seen
        rename(source, target)
        seen += 1
        if which in (seen, Path(target).name):
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    load_script("cpt/train.py").main(args)
    os._exit(0)


@pytest.mark.slow
def test_compiled_it_rounds_otherwise_and_goes_on_to_the_same_bits(train, base, texts, tmp_path, monkeypatch):
    """Against the run that is not compiled, and killed after its first state; without a compiler one line says so."""
    config = write(tmp_path / "c.yaml", settings(texts, torch_compile=True, save_steps=[12], state_every=5))
    args = ["--config", config, "--output-dir", str(tmp_path / "killed")]
    train.main(["--config", config, "--output-dir", str(tmp_path / "whole")])
    whole, plain = (json.loads((run / "train.json").read_text())["losses"] for run in (tmp_path / "whole", base))
    np.testing.assert_allclose(whole, plain, atol=2e-5)
    assert read_tensors(tmp_path / "whole" / "checkpoint-12").keys() == read_tensors(base).keys()
    child = multiprocessing.get_context("spawn").Process(target=die_at_replacement, args=("state-5", args))
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL and (tmp_path / "killed" / ".state" / "state-5").is_dir()
    train.main(args)
    same_files(tmp_path / "whole", tmp_path / "killed")

    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/no/compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    with pytest.raises(InputError, match=r"torch_compile: the model cannot be compiled here \(.+\); leave it out"):
        train.main(["--config", config, "--output-dir", str(tmp_path / "refused")])
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_killed_at_every_rename_it_ends_with_the_same_bits(train, base, texts, tmp_path):
    """SIGKILL after the 1st, 2nd, 3rd, ... rename of successive processes: states, checkpoints, records, tokenizer."""
    values = settings(texts, save_steps=[2, 3, 7, 12])
    config = write(tmp_path / "c.yaml", values)
    train.main(["--config", config, "--output-dir", str(tmp_path / "whole")])
    args = ["--config", config, "--output-dir", str(tmp_path / "killed")]
    fork = multiprocessing.get_context("fork")  # a child that need not import torch again
    codes = []
    for count in range(1, 40):
        child = fork.Process(target=die_at_replacement, args=(count, args))
        child.start()
        child.join(120)
        codes.append(child.exitcode)
        if child.exitcode == 0:
            break
        for checkpoint in (tmp_path / "killed").glob("checkpoint-*"):  # whatever is visible is whole
            assert len(read_tensors(checkpoint)) == len(read_tensors(base))
            assert tokenization.has_tokenizer(checkpoint) and refs.model(checkpoint).config()
    assert codes[-1] == 0 and len(codes) > 6 and set(codes[:-1]) == {-signal.SIGKILL}
    same_files(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_killed_from_outside_a_base_ends_with_the_same_bits(base, texts, tmp_path):
    """Killed while it trains; the command line itself then ends where `base` ended."""
    import time

    args = ["--config", write(tmp_path / "base.yaml", settings(texts, state_every=2)), "--output-dir", tmp_path / "out"]
    args = [*map(str, args)]
    first = multiprocessing.get_context("fork").Process(target=die_at_replacement, args=(0, args))  # at none
    first.start()
    while first.is_alive() and not list((tmp_path / "out").glob(".state/state-*")):
        time.sleep(0.005)
    first.kill()
    first.join()
    finished = (tmp_path / "out" / "train.json").exists()
    second = launch.run("cpt/train.py", *args)
    assert second.returncode == 0, second.stderr
    assert finished or "resuming from step" in second.stdout
    stored, wanted = read_tensors(tmp_path / "out"), read_tensors(base)
    assert stored.keys() == wanted.keys()
    assert all(bits(stored[name]).equal(bits(wanted[name])) for name in wanted)


@pytest.mark.parametrize("kind", ["gpt_neox", "mixtral"])
def test_a_killed_run_goes_on_where_names_differ_on_disk(train, texts, tmp_path, kind, monkeypatch):
    """transformers writes these models under other names, or other tensors, than they have in memory."""
    values = settings(texts, steps=5, state_every=3)
    values["model"] |= {"model_type": kind, "num_local_experts": 2}
    values["model"] = {k: v for k, v in values["model"].items() if kind == "mixtral" or not k.startswith("num_") or (
        k in ("num_hidden_layers", "num_attention_heads"))}  # fmt: skip
    config, whole, killed = write(tmp_path / "c.yaml", values), tmp_path / "whole", tmp_path / "killed"
    train.main(["--config", config, "--output-dir", str(whole)])
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(train, "finish", lambda *_: sys.exit(1))
        train.main(["--config", config, "--output-dir", str(killed)])
    train.main(["--config", config, "--output-dir", str(killed)])
    same_files(whole, killed)


def test_one_process_at_a_time(train, texts, tmp_path):
    config = write(tmp_path / "c.yaml", settings(texts))
    with cli.sibling("cpt/runs.py").only_one(tmp_path / "out"), pytest.raises(InputError, match="another process"):
        train.main(["--config", config, "--output-dir", str(tmp_path / "out")])


# --- bad input: one line, and no folder left behind


def change_source(values: dict, **change) -> None:
    values["sources"][0] = values["sources"][0] | change


BAD = {
    "no text": (lambda v: v.pop("sources"), "sources is missing"),
    "a missing file": (lambda v: change_source(v, files="gone.txt"), r"gone.txt does not exist"),
    "an empty source": (lambda v: change_source(v, files="empty.txt"), "source a holds no text"),
    "a table": (lambda v: change_source(v, files="a.csv"), "source a: a.csv is a table, and nothing says which column"),
    "a compressed file": (lambda v: change_source(v, files="a.txt.zst"), "source a: a.txt.zst is compressed"),
    "a folder": (lambda v: change_source(v, files="."), "source a: . is a folder"),
    "a text that is a number": (lambda v: change_source(v, files="n.jsonl"), "row 1: the column text holds 5, neither"),
    "a damaged gzip": (lambda v: change_source(v, files="broken.txt.gz"), "cannot be read as UTF-8 text"),
    "a weight of 0": (lambda v: change_source(v, weight=0), r"sources\[a\]\.weight is 0; it must be"),
    "a weight of NaN": (lambda v: change_source(v, weight=float("nan")), "must be a number above 0"),
    "two sources of a name": (lambda v: change_source(v, name="b"), "two sources have the same name"),
    "a missing column": (
        lambda v: v["sources"][2].pop("column"),
        r"has no column 'text' \(it has: body\)",
    ),
    "a small vocabulary": (lambda v: v["tokenizer"].update(vocab_size=200), "vocab_size 200 is too small"),
    "a model without room": (lambda v: v["model"].update(vocab_size=100), "the model has 100 embeddings"),
    "a long block": (lambda v: v.update(block_size=65), "longer than the model's 64 positions"),
    "a step beyond the end": (lambda v: v.update(save_steps=[5, 13]), "save_steps holds 13"),
    "steps as text": (lambda v: v.update(save_steps="5,12"), "save_steps is '5,12'; it must be a list"),
    "a misspelt key": (lambda v: v.update(learning_rat=1), "did you mean learning_rate"),
    "a misspelt model key": (lambda v: v["model"].update(hidden_sizes=1), "did you mean model.hidden_size"),
    "an unknown model": (lambda v: v["model"].update(model_type="lama"), "cannot be configured"),
    "heads that do not fit": (lambda v: v["model"].update(num_attention_heads=5), "model"),
    "an unknown schedule": (lambda v: v.update(schedule="cosinus"), "training settings are refused"),
    "a batch that does not split": (lambda v: v.update(gradient_accumulation=3), "make it a multiple of 3"),
    "neither model nor from": (lambda v: v.pop("model"), "either model .* or from"),
    "no tokenizer": (lambda v: v.pop("tokenizer"), "give tokenizer"),
    "an unset variable": (lambda v: change_source(v, files="${NOT_SET_ANYWHERE}/a.txt"), "NOT_SET_ANYWHERE is not set"),
    "a rate of 0": (lambda v: v.update(learning_rate=0), "it must be a number above 0"),
    "a rate that is no number": (lambda v: v.update(learning_rate="fast"), "it must be a number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(train, texts, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "n.jsonl").write_text('{"text": 5}\n')
    for name in ("a.csv", "a.txt.zst"):
        (tmp_path / name).write_text("id,text\n1,one\n")
    (tmp_path / "broken.txt.gz").write_bytes((texts / "b.txt.gz").read_bytes()[:60])
    change, message = BAD[case]
    values = json.loads(json.dumps(settings(texts)))
    change(values)
    with pytest.raises(InputError, match=message):
        train.main(["--config", write(tmp_path / "c.yaml", values), "--output-dir", "out"])
    assert not (tmp_path / "out").exists()


def test_nan_stops_the_run(train, texts, tmp_path):
    config = write(tmp_path / "c.yaml", settings(texts, learning_rate=1e30, max_grad_norm=0, state_every=100))
    with pytest.raises(InputError, match=r"the loss is (nan|inf) at step [0-9]+; lower learning_rate"):
        train.main(["--config", config, "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_strangers_and_full_disks_are_refused(train, texts, tmp_path, monkeypatch):
    config = write(tmp_path / "c.yaml", settings(texts))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for extra in ([], ["--overwrite"]):
        with pytest.raises(InputError, match="no training wrote"):
            train.main(["--config", config, "--output-dir", str(tmp_path / "mine"), *extra])
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="GB are free"):
        train.main(["--config", config, "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_run_killed_while_it_is_removed_is_removed_by_the_same_command(tmp_path, monkeypatch):
    runs, run, budget = cli.sibling("cpt/runs.py"), tmp_path / "run", [0]
    files = {"config.json": "{}", "timing.json": "{}", "train.json": json.dumps({"settings": {}})}
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    def unlink(path):
        if not budget[0]:
            raise KeyboardInterrupt
        budget[0] -= 1
        os.unlink(path)

    for killed_after in range(len(files)):
        budget[0] = killed_after
        shutil.copytree(tmp_path, run, ignore=shutil.ignore_patterns("run"))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "unlink", unlink)
            runs.remove_run(run)
        assert (run / "train.json").is_file()
        runs.remove_run(run)
        assert not list(run.iterdir())
        run.rmdir()


def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on_later(train, base, texts, tmp_path, monkeypatch):
    runs = cli.sibling("cpt/runs.py")
    args = ["--config", write(tmp_path / "c.yaml", settings(texts)), "--output-dir", str(tmp_path / "out")]

    def full(folder, *rest):
        folder.mkdir(parents=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_model", full)
        with pytest.raises(InputError, match="the disk is full"):
            train.main(args)
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")) == []
    train.main(args)
    same_files(base, tmp_path / "out")


def test_command_line_errors_are_one_line():
    command = [sys.executable, str(ROOT / "cpt" / "train.py")]
    done = subprocess.run([*command, "--config", "gone.yaml"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "gone.yaml does not exist" in done.stderr
    assert "--output-dir" in subprocess.run([*command, "--help"], capture_output=True, text=True).stdout


def test_the_number_of_threads_changes_no_more_than_rounding(train, texts, tmp_path):
    """At the sizes of the demo, whose arms train on a core each and whose plain run trains on more. On some CPUs it
    changes no bit, on others the last ones."""
    values, before = settings(texts, block_size=128, batch_size=8, steps=2), torch.get_num_threads()
    values["model"] |= {"hidden_size": 96, "intermediate_size": 256, "max_position_embeddings": 128}
    config = write(tmp_path / "config.yaml", values)
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            train.main(["--config", config, "--output-dir", str(tmp_path / str(threads))])
    finally:
        torch.set_num_threads(before)
    one, *others = (json.loads((tmp_path / name / "train.json").read_text())["losses"] for name in ("1", "2", "4"))
    for losses in others:
        np.testing.assert_allclose(losses, one, atol=2e-5)
    weights = [read_tensors(tmp_path / name) for name in ("1", "2", "4")]
    for name, wanted in weights[0].items():  # AdamW turns a gradient that is nearly 0 into a step of its own
        far = [(found[name].float() - wanted.float()).abs() > 1e-5 for found in weights[1:]]
        assert max(each.float().mean() for each in far) < 0.01, name
