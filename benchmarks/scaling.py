"""Predict the cost of a large study from measured slopes: the tables of docs/scaling.md.

Time is fitted as a + b x by least squares over the sizes measured on one machine. For scripts that read and write
weights, x is the gigabytes of a model in bfloat16; for forward passes, parameters times tokens. Predictions hold if
files come from memory; from a disk, the time is at least the bytes divided by the disk's rate.

In:   --input, the JSON of benchmarks/bench.py.
Out:  the tables, between the markers of --doc and on stdout.

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
MODELS = {"7B": 7e9, "70B": 70e9}
CHECKPOINTS = 20
# What a study of two languages makes each area read: a description, and the tokens for one checkpoint.
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
    """(a, b) of y = a + b x by least squares, neither below zero; through the origin if all x are equal."""
    x, y = zip(*points, strict=True)
    if len(set(x)) == 1:
        return 0.0, statistics.mean(y) / x[0]
    slope, intercept = statistics.linear_regression(x, y)
    if slope < 0:  # noise: time does not decrease with size
        return statistics.mean(y), 0.0
    if intercept < 0:
        return 0.0, sum(a * b for a, b in points) / sum(a * a for a in x)
    return intercept, slope


def table(*rows: list[str]) -> list[str]:
    """A Markdown table; the first row is its head. Empty if there are no other rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""] if len(rows) > 1 else []


def weights_table(rows: list[dict], disk: float) -> list[str]:
    """The fits for scripts that handle weights, and their predictions."""
    head = [f"{name} x {CHECKPOINTS}, read from {medium}" for name in MODELS for medium in ("memory", "disk")]
    lines = [["what", "sizes measured", "seconds = a + b GB", *head]]
    for area in SLOPES:
        of_area = [row for row in rows if row["area"] == area]
        if not of_area:
            continue
        pair = area.startswith("comparison")  # one process reads the base once; b is per pair
        a, b = fit([(row["bytes"] / (2e9 if pair else 1e9), measure.median(row["ways"]["ours"])) for row in of_area])
        sizes = sorted({row["gigabytes"] for row in of_area})
        measured = " to ".join(f"{size:g}" for size in dict.fromkeys((sizes[0], sizes[-1])))
        cells = [area, f"{measured} GB", f"{a:.2g} + {b:.2g} GB"]
        for parameters in MODELS.values():
            gigabytes = 2e-9 * parameters
            compute, moved = a + b * gigabytes * (1 + CHECKPOINTS) / 2, (1 + CHECKPOINTS) * gigabytes
            if not pair:  # each swap reads the target and writes as much
                compute, moved = CHECKPOINTS * (a + b * gigabytes), CHECKPOINTS * 2 * gigabytes
            cells += [_duration(compute), _duration(max(compute, moved / disk))]
        lines.append(cells)
    return table(*lines)


def memory_table(rows: list[dict]) -> list[str]:
    """Peak anonymous memory by size, which must not grow."""
    ways = dict(zip(SLOPES, ("ours", "whole process", "whole process"), strict=True))
    peaks = {
        (row["area"], row["gigabytes"]): f"{row['ways'][ways[row['area']]]['peak_anonymous_bytes'] / 1e6:,.0f} MB"
        for row in rows
        if row["area"] in ways
    }
    sizes = sorted({size for _, size in peaks})
    body = [[area, *(peaks.get((area, size), "") for size in sizes)] for area in ways]
    return table(["peak anonymous memory", *(f"{size:g} GB" for size in sizes)], *(body if sizes else []))


def passes_table(rows: list[dict]) -> list[str]:
    """Parameters times tokens per second of each forward-pass script, and the time for its work on a checkpoint."""
    lines = [["what", "parameters x tokens a second", "work", *(f"{name}, one checkpoint" for name in MODELS)]]
    for area, (words, tokens) in WORK.items():
        of_area = [row for row in rows if row["area"] == area]
        points = [(row["parameters"] * row["tokens"], measure.median(row["ways"]["ours"])) for row in of_area]
        a, b = fit(points) if points else (0, 0)
        if b:
            cells = [area, f"{1 / b:.2g}", f"{words}: {tokens / 1e6:.3g} M tokens"]
            lines.append(cells + [_duration(a + b * parameters * tokens) for parameters in MODELS.values()])
    return table(*lines)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds:.2g} s"


def text(payload: dict, disk: float) -> str:
    lines: list[str] = []
    for machine, facts in payload["machines"].items():
        where = f"{facts['cpu']}, {facts['cores']} cores" + (f", {facts['gpu']}" if "gpu" in facts else "")
        rows = [row for row in payload["rows"].values() if row["machine"] == machine]
        on = {
            device: [row for row in rows if row["device"] == device]
            for device in dict.fromkeys(r["device"] for r in rows)
        }
        lines += [f"**{where}**; disk: {disk:g} GB/s assumed", ""]
        lines += weights_table(on.get("cpu", []), disk) + memory_table(on.get("cpu", []))
        for device, of_device in on.items():
            passes = passes_table(of_device)
            lines += [f"Forward passes on {device}:", "", *passes] if passes else []
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
        raise InputError(f"{args.input} was not written by benchmarks/bench.py, or --disk is not above zero")
    tables = text(payload, args.disk)
    measure.between_markers(Path(args.doc), "scaling", tables)
    cli.say(tables)


if __name__ == "__main__":
    cli.run(main)
