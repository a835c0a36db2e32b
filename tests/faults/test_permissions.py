"""Inputs that may not be read, folders that may not be written, and files where folders should be."""

from __future__ import annotations

import random
import shutil

import folders
import harness
import pytest

SHORT = ("train", "retrieval", "layer_swap", "token_ids", "counts")
NAMES = harness.NAMES if harness.LONG else SHORT
DENIED = {"kind": "no_override"}


@pytest.mark.parametrize("name", NAMES)
def test_an_unreadable_input(bench, tally, name):
    draw = random.Random(f"{harness.SEED} unreadable {name}")
    for file in draw.sample(bench.known[name].read, 3 if harness.LONG else 1):
        bench.put(name)
        (bench.case / file).chmod(0)
        outcome = bench.run(name, DENIED)
        (bench.case / file).chmod(0o644)
        if outcome.code == 0:  # not needed after all: then the result is the usual one
            differs = folders.differences(bench.tree(), bench.known[name].after)
            differs = [line for line in differs if not line.endswith("generation_config.json")]  # taken as missing
            assert not differs, (file, differs)
        else:
            assert not outcome.refused(), (file, outcome.refused(), outcome.output[-1500:])
            assert not bench.harm(name, bench.tree()), (file, bench.harm(name, bench.tree()))
        tally["permission: unreadable input"] += 1


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_may_not_be_written(bench, tally, name):
    bench.put(name)
    before = bench.tree()
    folders = [bench.case, *(path for path in bench.case.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    outcome = bench.run(name, DENIED)
    for folder in folders:
        folder.chmod(0o755)
    assert not outcome.refused(), (outcome.refused(), outcome.output[-1500:])
    assert bench.tree() == before
    tally["permission: folders that may not be written"] += 1


@pytest.mark.parametrize("name", NAMES)
def test_a_file_where_a_folder_should_be_and_the_other_way_round(bench, tally, name):
    draw, known = random.Random(f"{harness.SEED} places {name}"), bench.known[name]
    written = sorted(file for file in known.after if file not in known.inputs and not file.endswith("/"))
    for wrong in ("a folder in the place of a result", "a file in the place of a folder"):
        bench.put(name)
        choice = bench.case / draw.choice(written).replace("<time>", "2026-01-01T00-00-00.000000")
        if wrong.startswith("a folder"):
            choice.mkdir(parents=True)
            (choice / "mine.txt").write_text("mine\n")
        else:
            choice = choice.parent
            shutil.rmtree(choice, ignore_errors=True)
            choice.parent.mkdir(parents=True, exist_ok=True)
            choice.write_text("mine\n")
        outcome = bench.run(name)
        if outcome.code:
            assert not outcome.refused(), (choice, outcome.refused(), outcome.output[-1500:])
        mine = choice / "mine.txt" if wrong.startswith("a folder") else choice
        assert mine.read_text() == "mine\n", choice
        assert "Traceback" not in outcome.output, (choice, outcome.output[-1500:])
        tally[wrong] += 1
