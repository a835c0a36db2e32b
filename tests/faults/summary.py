"""The table of faults survived in docs/reliability.md, between two markers."""

from __future__ import annotations

from pathlib import Path

import pytest

COUNTS = pytest.StashKey[dict]()
START, END = "<!-- faults survived -->", "<!-- end -->"


def table(counts: dict[str, int]) -> str:
    kills = sum(count for kind, count in counts.items() if kind.startswith("kill"))
    rows = [f"| {kind} | {count} |" for kind, count in sorted(counts.items())]
    return "\n".join(["| fault | survived |", "|---|---|", *rows, f"| **kills in all** | **{kills}** |"])


def write(counts: dict[str, int], page: Path) -> None:
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{START}\n{table(counts)}\n{END}{after}", encoding="utf-8")
