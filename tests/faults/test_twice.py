"""The same command started twice at once."""

from __future__ import annotations

import folders
import harness
import pytest

SHORT = ("train", "retrieval", "tasks", "layer_swap", "token_ids", "counts", "deactivate", "layer_swap_controls")
NAMES = harness.NAMES if harness.LONG else SHORT


@pytest.mark.parametrize("name", NAMES)
def test_two_of_the_same_leave_one_whole_result(bench, tally, name):
    for _ in range(2 if harness.LONG else 1):
        bench.put(name)
        both = bench.forks.run([(harness.BY_NAME[name], None)] * 2, bench.case)
        harm = bench.harm(name, bench.tree())
        assert not harm, (harm, [outcome.output[-800:] for outcome in both])
        assert 0 in [outcome.code for outcome in both], [outcome.output[-1500:] for outcome in both]
        for outcome in both:
            assert outcome.code == 0 or not outcome.refused(), (outcome.refused(), outcome.output[-1500:])
            assert "Traceback" not in outcome.output, outcome.output[-1500:]
        differs = folders.differences(bench.tree(), bench.known[name].after)
        assert not differs, (differs, [outcome.output[-800:] for outcome in both])
        tally["the same command twice at once"] += 1
