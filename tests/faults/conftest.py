"""One bench for all tests of faults, and the tally of what was survived."""

from __future__ import annotations

import collections
import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import harness
import summary


@pytest.fixture(scope="session")
def bench():
    folder = harness.new_folder()
    try:
        made = harness.Bench(folder)
        yield made
        made.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tally(request):
    """Counts by kind of fault; `tally["kill, at random"] += 1` where one was survived."""
    counts = collections.Counter()
    request.config.stash[summary.COUNTS] = counts
    return counts


def pytest_terminal_summary(terminalreporter, config):
    counts = config.stash.get(summary.COUNTS, {})
    if counts:
        terminalreporter.section("faults survived")
        for kind, count in sorted(counts.items()):
            terminalreporter.write_line(f"{count:5}  {kind}")
        terminalreporter.write_line(
            f"{sum(n for kind, n in counts.items() if kind.startswith('kill')):5}  kills in all"
        )


def pytest_sessionfinish(session, exitstatus):
    """The table in docs/reliability.md is written by a full run in which every test passed.

    Counts of other kinds, from runs of other test files, stay.
    """
    counts = session.config.stash.get(summary.COUNTS, {})
    if harness.LONG and counts and exitstatus == 0:
        place = harness.helpers.ROOT / "build" / "faults.json"
        before = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
        counts = {**before, **counts}
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(counts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        summary.write(counts, harness.helpers.ROOT / "docs" / "reliability.md")
