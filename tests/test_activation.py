"""lsn/activation.py: exact counts, snapshots, going on after a kill, several processes, and what it refuses."""

from __future__ import annotations

import json
import os

import pytest
import torch
from helpers import killed, load_script, save_run, save_tiny, tiny_tokenizer
from launch import launch

from cpt_utils.architectures import archs
from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs, tokenizer_id
from cpt_utils.measures import tokenids
from cpt_utils.models import loading

ACTIVATION = load_script("lsn/activation.py")


def write_ids(folder, lang="ga", n=700, seed=0, vocabulary=259, **facts):
    """An id file with its description, as lsn/load_oscar.py writes them."""
    path = folder / tokenids.file_name(lang, "tiny")
    ids = torch.randint(3, vocabulary, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    tokenids.write(path, ids, {"n_documents": 1, "complete": True}, results.header("token-ids", language=lang, **facts))
    return path, ids


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny("llama", "model", seed=1)
    return tmp_path


def count(*more) -> dict:
    ACTIVATION.main(["-m", "model", "-n", "tiny", "-s", "counts", "--block-size", "32", "--dtype", "float64", *more])
    return results.read_tensors("counts/tiny.ga.pt")


def test_of_a_run_the_last_checkpoint_is_counted(place):
    path, _ = write_ids(place)
    save_run("llama", "run", (10, 20))
    with pytest.raises(InputError, match="-m and --run are the same argument"):
        count("-i", str(path), "--run", "run")
    ACTIVATION.main(["--run", "run", "-n", "tiny", "-s", "counts", "--block-size", "32", "-i", str(path)])
    counted = json.loads(results.read_tensors("counts/tiny.ga.pt")["header"])["request"]["model"]
    assert counted["spec"] == "run/checkpoint-20"


def test_counts_snapshots_and_header(place):
    path, ids = write_ids(place)
    found = count("-i", str(path))
    model = loading.load_model(refs.model("model"), torch.float64, torch.device("cpu"))
    arch = archs.for_config(model.config)
    blocks = ids[: 700 // 32 * 32].view(-1, 32)

    def slow(rows) -> torch.Tensor:
        counter = ACTIVATION.Counter(model, arch)
        for row in rows:
            counter.add(row[None])
        return counter.counts

    assert found["n"] == 672 and torch.equal(found["over_zero"], slow(blocks))
    assert found["snapshots_n"].tolist() == [32 * n for n in (3, 5, 10)]  # of 21: about 1/8, 1/4, 1/2
    for n, counts in zip((3, 5, 10), found["snapshots"], strict=True):
        assert torch.equal(counts, slow(blocks[:n]))
    head = json.loads(found["header"])
    assert (head["n_layers"], head["ffn_width"], head["language"]) == (3, 48, "ga")
    assert head["tokens"]["used"] == 672 and head["models"]["model"]["spec"] == "model"
    assert not list((place / "counts").glob(".*"))
    # Any batch size gives the same, and fewer tokens are the first ones.
    os.remove("counts/tiny.ga.pt")
    assert torch.equal(count("-i", str(path), "--batch-size", "1")["over_zero"], found["over_zero"])
    os.remove("counts/tiny.ga.pt")
    assert torch.equal(count("-i", str(path), "--tokens", "170")["over_zero"], slow(blocks[:5]))


def test_finished_files_are_kept_and_others_refused(place, capsys):
    path, _ = write_ids(place)
    count("-i", str(path))
    before = (place / "counts/tiny.ga.pt").read_bytes()
    count("-i", str(path))
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(InputError, match="another request"):
        count("-i", str(path), "--tokens", "320")
    count("-i", str(path), "--overwrite")
    one, other = torch.load("counts/tiny.ga.pt"), results.read_tensors("counts/tiny.ga.pt")
    assert torch.equal(one["over_zero"], other["over_zero"]) and len(before) > 0
    torch.save(one | {"header": one["header"][:-9]}, "counts/tiny.ga.pt")
    with pytest.raises(InputError, match="header is not JSON"):
        count("-i", str(path))


def killed_in_pass(argv: list[str], after: int) -> None:
    """Run the command in a child that is killed in the forward pass number `after`, each pass having been saved."""
    killed(lambda: ACTIVATION.main([*argv, "--save-every", "0"]), ACTIVATION.Counter, "add", after)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_killed_twice_gives_the_same_counts(place, capsys, dtype):
    path, _ = write_ids(place, n=1500)
    flags = ["-m", "model", "-n", "tiny", "--block-size", "32", "--dtype", dtype, "--batch-size", "2", "-i", str(path)]
    ACTIVATION.main([*flags, "-s", "unbroken"])
    killed_in_pass([*flags, "-s", "broken"], after=5)
    assert not os.path.exists("broken/tiny.ga.pt")
    killed_in_pass([*flags, "-s", "broken"], after=7)
    capsys.readouterr()
    ACTIVATION.main([*flags, "-s", "broken"])
    assert "blocks were counted before" in capsys.readouterr().out
    one, other = (results.read_tensors(f"{folder}/tiny.ga.pt") for folder in ("unbroken", "broken"))
    for key in ("over_zero", "snapshots", "snapshots_n"):
        assert torch.equal(one[key], other[key])
    assert os.listdir("broken") == ["tiny.ga.pt"]


def test_experts_routed_tokens_and_widths(place):
    """A mixture of experts with a dense layer: what the file holds beside the counts, and that a killed run has it."""
    save_tiny("qwen3_moe", "model", seed=1)
    path, ids = write_ids(place, n=700)
    flags = ["-m", "model", "-n", "tiny", "--block-size", "32", "--batch-size", "2", "-i", str(path)]
    killed_in_pass([*flags, "-s", "counts"], after=6)
    ACTIVATION.main([*flags, "-s", "counts"])
    found = results.read_tensors("counts/tiny.ga.pt")
    assert found["width"].tolist() == [96, 48, 96] and found["over_zero"].shape == (3, 96)
    assert found["routed"].shape == (3, 4) and found["routed"].sum(1).tolist() == [2 * 672, 0, 2 * 672]
    model = loading.load_model(refs.model("model"), torch.float32, torch.device("cpu"))
    counter = ACTIVATION.Counter(model, archs.for_config(model.config))
    blocks, done = ids[:672].view(-1, 32), 0
    for n, routed, counts in zip((3, 5, 10), found["snapshots_routed"], found["snapshots"], strict=True):
        for block in blocks[done:n]:
            counter.add(block[None])
        done = n
        assert torch.equal(counter.routed, routed) and torch.equal(counter.counts, counts)
    head = json.loads(found["header"])
    assert (head["n_layers"], head["ffn_width"]) == (3, 96)


@pytest.mark.slow
def test_two_processes_count_what_one_does(place):
    path, _ = write_ids(place, n=1500)
    flags = ["-m", "model", "-n", "tiny", "--block-size", "32", "--batch-size", "2", "-i", str(path)]
    ACTIVATION.main([*flags, "-s", "one", "--device", "cpu"])
    # A run that one process began goes on with two.
    killed_in_pass([*flags, "-s", "two", "--device", "cpu"], after=4)
    launch("lsn/activation.py", *flags, "-s", "two")
    one, two = (results.read_tensors(f"{folder}/tiny.ga.pt") for folder in ("one", "two"))
    for key in ("over_zero", "snapshots", "snapshots_n"):
        assert torch.equal(one[key], two[key])
    assert os.listdir("two") == ["tiny.ga.pt"]


def test_bad_input_is_one_line(place):
    save_tiny("llama", "small", seed=2, vocab_size=260)
    path, _ = write_ids(place, vocabulary=272)
    with pytest.raises(InputError, match="vocabulary has 260 tokens"):
        ACTIVATION.main(["-m", "small", "-n", "tiny", "-s", "counts", "-i", str(path), "--block-size", "32"])
    path, _ = write_ids(place, n=20)
    with pytest.raises(InputError, match="fewer than one block of 32"):
        count("-i", str(path))
    path, _ = write_ids(place, vocabulary_sha256="ids:of another", tokenizer="other")
    with pytest.raises(InputError, match="not the model's"):
        count("-i", str(path))
    with pytest.raises(InputError, match="no language in its name"):
        count("-i", "ids.pt")
    with pytest.raises(InputError, match="does not exist"):
        count("-i", "oscar.ga.train.none")
    with pytest.raises(InputError, match="exceeds the model's 512"):
        ACTIVATION.main(["-m", "model", "-n", "tiny", "-s", "counts", "-i", str(path), "--block-size", "4096"])
    assert not (place / "counts").exists() or not os.listdir("counts")


def test_a_tokenizer_of_the_model_is_accepted(place):
    tiny_tokenizer().save_pretrained("model")
    path, _ = write_ids(place, vocabulary_sha256=tokenizer_id.of_plain_text(place / "model"))
    assert count("-i", str(path))["n"] == 672


def test_a_limit_that_cuts_nothing_is_none(place):
    path, _ = write_ids(place)
    found = count("-i", str(path), "--limit", "1000")
    assert json.loads(found["header"])["limit"] is None
    os.remove("counts/tiny.ga.pt")
    assert json.loads(count("-i", str(path), "--limit", "3")["header"])["limit"] == 3
    with pytest.raises(InputError, match="another request"):
        count("-i", str(path))


def test_two_files_of_one_language_are_refused(place):
    one, _ = write_ids(place, "ga")
    other, _ = write_ids(place, "gle_Latn")
    with pytest.raises(InputError, match="ga and gle_Latn are one language; take one of their id files"):
        count("-i", str(one), str(other))


def test_text_that_repeats_is_said(place):
    path, ids = write_ids(place, n=640)
    assert json.loads(count("-i", str(path))["header"])["tokens"]["repeated"] == 0
    twice = torch.cat([ids[:320], ids[:320]])
    slow = [tuple(twice[i : i + 10].tolist()) for i in range(len(twice) - 9)]
    assert tokenids.repeated(twice) == pytest.approx(1 - len(set(slow)) / len(slow))
    assert tokenids.repeated(twice) > 0.45
