"""A file system that fills up, and one that begins to fail."""

from __future__ import annotations

import errno
import random

import folders
import harness
import pytest

ROUNDS = 2 if harness.LONG else 1
CHEAP = ("train", "retrieval", "tasks", "layer_swap", "token_ids", "counts", "attn_int_swap", "layer_swap_controls")
NAMES = harness.NAMES if harness.LONG else CHEAP
# What a run that failed may keep, since the next one goes on from it.
KEPT = (".partial.jsonl", ".state/", ".partial.")


@pytest.fixture(scope="module")
def small(bench):
    """A server with a tmpfs of 64 MB; None where this system lets nobody mount one."""
    try:
        disk = harness.SmallDisk(bench.forks, bench.case.parent, 64 << 20)
    except OSError:
        yield None
        return
    yield disk
    disk.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_one_line_and_leaves_nothing(bench, small, tally, name):
    draw, known = random.Random(f"{harness.SEED} disk {name}"), bench.known[name]
    for _ in range(ROUNDS):
        if small:
            small.empty()
        bench.put(name, small)
        if small:
            room = draw.randrange(0, max(4097, known.written * 3 // 4))
            small.leave(room)
            outcome, kind = bench.run(name, None, small), "full disk (a small tmpfs)"
        else:
            room = draw.randint(1, known.changes)
            fault = {"kind": "errno", "n": room, "errno": errno.ENOSPC}
            outcome, kind = bench.run(name, fault), "full disk (ENOSPC from a change of the file system on)"
        now = bench.tree(small)
        now.pop("filler", None)
        assert not bench.harm(name, now), (room, bench.harm(name, now), outcome.output[-1500:])
        if outcome.code:
            assert not outcome.refused(), (room, outcome.refused(), outcome.output[-1500:])
            left = [file for file in now if folders.temporary(file) and not any(part in file for part in KEPT)]
            assert not small or not left, (room, left)
            tally[kind] += 1
        if small:
            small.empty()
        rerun = bench.run(name, None, small)
        assert rerun.code == 0, (room, rerun.output[-1500:])
        differs = folders.differences(bench.tree(small), known.after)
        assert not differs, (room, differs)


@pytest.mark.parametrize("name", harness.NAMES if harness.LONG else ("layer_swap", "retrieval", "counts", "train"))
def test_a_failing_disk_is_one_line_and_harms_nothing(bench, tally, name):
    draw, known = random.Random(f"{harness.SEED} failing {name}"), bench.known[name]
    for _ in range(ROUNDS):
        bench.put(name)
        fault = {"kind": "errno", "n": draw.randint(1, known.changes), "errno": errno.EIO}
        outcome = bench.run(name, fault)
        harm = bench.harm(name, bench.tree())
        assert not harm, (fault, harm)
        if outcome.code:
            assert not outcome.refused(), (fault, outcome.refused(), outcome.output[-1500:])
            tally["failing disk (EIO from a change of the file system on)"] += 1
        rerun = bench.run(name)
        assert rerun.code == 0, (fault, rerun.output[-1500:])
        differs = folders.differences(bench.tree(), known.after)
        assert not differs, (fault, differs)
