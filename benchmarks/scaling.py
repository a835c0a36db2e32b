"""From measured slopes to what a large study costs: the tables of docs/scaling.md.

Time is fitted as a + b x, by least squares over the sizes measured on one machine: x is gigabytes of a model in
bfloat16 for what reads and writes weights, and parameters times tokens for forward passes. What it predicts for other
sizes holds while files come from memory; from a disk, reading them takes bytes over its rate, whichever is longer.

In:   --input, the JSON of benchmarks/bench.py.
Out:  the tables between the markers of --doc, and on stdout.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --disk 0.5
"""

from __future__ import annotations

import statistics
from pathlib import Path

from cpt_utils.base import cli, results
from cpt_utils.base.errors import InputError

measure = cli.sibling("benchmarks/measure.py")

SLOPES = ("comparison, whole process", "layer swap", "component swap")
PASSES = ("retrieval", "counts", "activations", "deactivation")
MODELS = {"7B": 7e9, "70B": 70e9}
CHECKPOINTS = 20
# What a study of two languages makes them read: in words, and tokens for one checkpoint.
WORK = {
    "retrieval": ("997 pairs of FLORES+ dev", 2 * 997 * 35),
    "counts": ("100 M tokens of each of 2 languages", 2 * 99_999_744),
    "activations": ("100,000 tokens of each of 2 languages", 2 * 100_000),
    "deactivation": (
        "500 documents of 100 tokens in 2 languages, unmasked, 2 masks, 19 random ones of each",
        41 * 2 * 500 * 100,
    ),
}


def fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """(a, b) of y = a + b x by least squares, neither below zero; through the origin where there is one point."""
    x, y = zip(*points, strict=True)
    if len(set(x)) == 1:
        return 0.0, statistics.mean(y) / x[0]
    slope, intercept = statistics.linear_regression(x, y)
    if slope < 0:  # noise: time does not fall with size
        return statistics.mean(y), 0.0
    if intercept < 0:
        return 0.0, sum(a * b for a, b in points) / sum(a * a for a in x)
    return intercept, slope


def rows_of(payload: dict, machine: str, area: str, device: str) -> list[dict]:
    rows = payload["rows"].values()
    return [row for row in rows if (row["machine"], row["area"], row["device"]) == (machine, area, device)]


def weights_table(payload: dict, machine: str, disk: float) -> list[str]:
    """Fits of what handles weights, and the predictions."""
    head = " | ".join(f"{name} x {CHECKPOINTS}, read from {place}" for name in MODELS for place in ("memory", "disk"))
    lines = [f"| what | sizes measured | seconds = a + b GB | {head} |", "|---|---|---|" + "---|" * 2 * len(MODELS)]
    for area in SLOPES:
        rows = rows_of(payload, machine, area, "cpu")
        if not rows:
            continue
        size = {id(row): row["bytes"] / (2e9 if "comparison" in area else 1e9) for row in rows}
        a, b = fit([(size[id(row)], measure.median(row["ways"]["ours"])) for row in rows])
        cells = [area, _range(row["gigabytes"] for row in rows), f"{a:.2g} + {b:.2g} GB"]
        for parameters in MODELS.values():
            gigabytes = 2e-9 * parameters
            if "comparison" in area:  # one process, the base read once; the slope is of a pair
                compute, moved = a + b * gigabytes * (1 + CHECKPOINTS) / 2, (1 + CHECKPOINTS) * gigabytes
            else:  # each reads the target and writes as much
                compute, moved = CHECKPOINTS * (a + b * gigabytes), CHECKPOINTS * 2 * gigabytes
            cells += [_duration(compute), _duration(max(compute, moved / disk))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def passes_table(payload: dict, machine: str, device: str) -> list[str]:
    """Parameters times tokens a second of each forward-pass script, and what its work takes for a checkpoint."""
    lines = [
        "| what | parameters x tokens a second | work | " + " | ".join(f"{n}, one checkpoint" for n in MODELS) + " |"
    ]
    lines.append("|---|---|---|" + "---|" * len(MODELS))
    for area in PASSES:
        rows = rows_of(payload, machine, area, device)
        if not rows:
            continue
        a, b = fit([(row["parameters"] * row["tokens"], measure.median(row["ways"]["ours"])) for row in rows])
        if b == 0:
            continue
        words, tokens = WORK[area]
        cells = [area, f"{1 / b:.2g}", f"{words}: {tokens / 1e6:.3g} M tokens"]
        cells += [_duration(a + b * parameters * tokens) for parameters in MODELS.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def memory_table(payload: dict, machine: str) -> list[str]:
    """Peak anonymous memory by size: what must not grow."""
    ways = {"comparison, whole process": "ours", "layer swap": "whole process", "component swap": "whole process"}
    found = {area: {row["gigabytes"]: row for row in rows_of(payload, machine, area, "cpu")} for area in ways}
    sizes = sorted({size for rows in found.values() for size in rows})
    lines = ["| peak anonymous memory | " + " | ".join(f"{size:g} GB" for size in sizes) + " |"]
    lines.append("|---|" + "---|" * len(sizes))
    for area, way in ways.items():
        peaks = [found[area].get(size, {}).get("ways", {}).get(way) for size in sizes]
        cells = [f"{peak['peak_anonymous_bytes'] / 1e6:,.0f} MB" if peak else "" for peak in peaks]
        lines.append(f"| {area} | {' | '.join(cells)} |")
    return lines


def _range(values) -> str:
    found = sorted(set(values))
    return " to ".join(f"{value:g}" for value in sorted({found[0], found[-1]})) + " GB"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds:.2g} s"


def text(payload: dict, disk: float) -> str:
    lines: list[str] = []
    for machine, facts in payload["machines"].items():
        where = f"{facts['cpu']}, {facts['cores']} cores" + (f", {facts['gpu']}" if "gpu" in facts else "")
        devices = dict.fromkeys(row["device"] for row in payload["rows"].values() if row["machine"] == machine)
        lines += [f"**{where}**; disk: {disk:g} GB/s assumed", ""]
        weights, memory = weights_table(payload, machine, disk), memory_table(payload, machine)
        lines += [*weights, "", *memory, ""] if len(weights) > 2 else []
        for device in devices:
            passes = passes_table(payload, machine, device)
            lines += [f"Forward passes on {device}:", "", *passes, ""] if len(passes) > 2 else []
    return "\n".join(lines)


def build_parser():
    p = cli.parser(__doc__, study=False)
    p.add_argument("--input", default="benchmarks/benchmark.json", metavar="FILE", help="default %(default)s")
    p.add_argument("--doc", default="docs/scaling.md", metavar="FILE", help="default %(default)s")
    p.add_argument("--disk", type=float, default=1.0, metavar="R", help="rate of a disk in GB/s; default %(default)s")
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    payload, head = results.read_json(args.input, measure.SCHEMA)
    if not head or args.disk <= 0:
        raise InputError(f"{args.input} is no file of benchmarks/bench.py, or --disk is not above zero")
    found = text(payload, args.disk)
    measure.between_markers(Path(args.doc), "scaling", found)
    cli.say(found)


if __name__ == "__main__":
    cli.run(main)
