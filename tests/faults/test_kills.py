"""SIGKILL at random moments, just before a change of the file system, and in the middle of a write."""

from __future__ import annotations

import random

import folders
import harness
import pytest

KINDS = ("boundary", "boundary", "time", "write")
QUICK = ("train", "tasks", "layer_swap", "token_ids", "counts", "attn_int_swap", "ffn_lsn_swap")
KILLS = {name: 9 if harness.LONG else 3 if name in QUICK else 1 for name in harness.NAMES}
if harness.LONG:
    KILLS["figures"] = 5  # ten seconds a time
NAMES_OF_KINDS = {
    "time": "kill, at a random moment",
    "boundary": "kill, just before a change of the file system",
    "write": "kill, in the middle of a write",
}


def fault(kind: str, known: harness.Known, draw: random.Random) -> dict:
    if kind == "time":
        return {"kind": kind, "delay": draw.uniform(0.03, 0.9 * known.seconds)}
    if kind == "write":
        return {"kind": kind, "limit": draw.randrange(1, max(2, known.largest))}
    return {"kind": kind, "n": draw.randint(1, known.changes)}


@pytest.mark.parametrize("name", harness.NAMES)
def test_a_killed_command_leaves_nothing_half_finished_and_goes_on(bench, tally, name):
    draw, known = random.Random(f"{harness.SEED} {name}"), bench.known[name]
    killed = attempts = 0
    while killed < KILLS[name]:
        attempts += 1
        assert attempts <= 4 * KILLS[name], "it cannot be killed"
        kind = draw.choice(KINDS)
        what = fault(kind, known, draw)
        bench.put(name)
        outcome = bench.run(name, what)
        assert not outcome.timed_out, what
        assert outcome.killed or not outcome.code, (what, outcome.output[-2000:])
        harm = bench.harm(name, bench.tree())
        assert not harm, (what, harm)
        if outcome.killed:
            # A second kill, of the run that goes on, from time to time.
            if draw.random() < 0.25:
                again = fault("boundary", known, draw)
                if bench.run(name, again).killed:
                    killed += 1
                    tally[NAMES_OF_KINDS["boundary"]] += 1
                harm = bench.harm(name, bench.tree())
                assert not harm, (what, again, harm)
            rerun = bench.run(name)
            assert rerun.code == 0 and "Traceback" not in rerun.output, (what, rerun.output[-2000:])
            differs = folders.differences(bench.tree(), known.after)
            assert not differs, (what, differs)
            killed += 1
            tally[NAMES_OF_KINDS[kind]] += 1
