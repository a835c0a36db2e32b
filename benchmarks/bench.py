"""Measure every hot path against the obvious way and against the machine's limit, and write the README's table.

The limit is measured in the same run: reading the same files once (`cat`), copying the target's folder (`cp -r`), or
the bare forward pass of the decoder on the same batches. Ways take turns, so a busy machine slows all of them.

In:   nothing: models with random weights are made in --folder and removed again.
Out:  --output, a JSON whose rows are written one by one (an interrupted run keeps them; --go-on measures the rest),
      and the table between the markers of --readme: targets, medians, ratios, memory, and the machine.

Full: python benchmarks/bench.py --full
Tiny: python benchmarks/bench.py --sizes 0.01 --forward 0.01 --repeats 1 -o build/try/benchmark.json --readme build/try/README.md
"""  # noqa: E501

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import folders

measure = cli.sibling("benchmarks/measure.py")

JUDGED = 0.05  # GB; smaller models only test the code
QUICK, FULL = (1.0,), (0.1, 0.5, 1.0, 2.0)  # GB of each model of a pair, in bfloat16
FORWARD, FORWARD_FULL = (0.1,), (0.1, 0.25)  # the same for forward passes, which a CPU runs in float32
SHAPES = {"1B": (2048, 8192, 16, 16, 32000), "7B": (4096, 11008, 32, 32, 32000)}  # on a GPU, in bfloat16
TABLE, OUTPUT, README = "benchmarks", "benchmarks/benchmark.json", "benchmarks/README.md"


# ---------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """A figure of one area's rows and its bound: `at` selects the rows, `why` explains a miss.

    `why` may contain values of the row's ways: {name} is the median seconds of that way.
    """

    area: str
    words: str
    figure: Callable[[dict], float]
    bound: float
    least: bool  # the bound is a minimum
    unit: str
    at: str  # "1 GB" (the row nearest to it) or "all"
    why: str = ""

    def worst(self, rows: list[dict]) -> tuple[float, dict] | None:
        """The worst figure with its row; None if nothing was measured."""
        near = sorted((row for row in rows if row["area"] == self.area), key=lambda row: abs(row["gigabytes"] - 1))
        figures = [(self.figure(row["ways"]), row) for row in (near if self.at == "all" else near[:1])]
        return (min if self.least else max)(figures, key=lambda pair: pair[0], default=None)

    def met(self, value: float) -> bool:
        return value >= self.bound if self.least else value <= self.bound


def over(one: str, other: str, key: str = "seconds") -> Callable[[dict], float]:
    return lambda ways: measure.ratio(ways[one], ways[other], key)


def peak(way: str) -> Callable[[dict], float]:
    return lambda ways: ways[way]["peak_anonymous_bytes"] / 1e6


WHOLE = "comparison, whole process"
AREAS = ("retrieval", "all curves", "counts", "activations", "deactivation")  # of forward passes
WRITING = "the result is flushed to disk and read back, which `cp -r` does not do"
HOOKS = "the bare decoder takes {floor} s, ours {ours} s"
LOSS = "also runs the lm_head and its softmax on every token; with hooks alone {decoder only} s"
TARGETS = (
    Target(WHOLE, "times faster than the obvious way", over("obvious", "ours"), 10, True, "x", "1 GB",
           "`import torch` takes {imports} of the {ours} s; the obvious way takes {obvious} s"),
    Target("comparison itself", "share of the rate of `cat`", over("floor", "ours"), 0.35, True, "", "1 GB",
           "arithmetic on every weight takes {ours} s, reading {floor} s"),
    Target(WHOLE, "peak anonymous memory", peak("ours"), 600, False, "MB", "all"),
    Target("spectra", "times faster than the obvious way", over("obvious", "ours"), 3, True, "x", "1 GB",
           "for one layer, ours takes {ours} s, with nulls and heads {everything} s, the obvious way {obvious} s"),
    Target("spectra", "time over the flops of the SVD, as products", over("ours", "floor"), 3, False, "x", "1 GB",
           "half of a tridiagonalisation is memory-bound; for one layer the floor takes {floor} s, ours {ours} s"),
    Target("layer swap", "time over `cp -r`", over("ours", "floor"), 1.3, False, "x", "1 GB", WRITING),
    Target("component swap", "time over `cp -r`", over("ours", "floor"), 1.3, False, "x", "1 GB", WRITING),
    Target("layer swap", "peak anonymous memory", peak("whole process"), 400, False, "MB", "all"),
    Target("component swap", "peak anonymous memory", peak("whole process"), 400, False, "MB", "all"),
    *(Target(area, "time over the bare decoder", over("ours", "floor"), 1.1, False, "x", "all", why)
      for area, why in (("retrieval", HOOKS), ("counts", HOOKS), ("activations", HOOKS), ("deactivation", LOSS))),
    Target("all curves", "user CPU time over the bare decoder", over("ours", "floor", "user_seconds"), 1.1, False, "x",
           "all", HOOKS),
)  # fmt: skip


# ---------------------------------------------------------------- the table


def table(store) -> str:
    """The README's tables: for each machine, the targets and the rows that decide them."""
    lines: list[str] = []
    for key, facts in store.machines.items():
        rows = sorted((row for row in store.rows.values() if row["machine"] == key), key=lambda row: row["gigabytes"])
        what = f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gb']} GB, {facts['system']}"
        what += f", {facts['gpu']}" if "gpu" in facts else ""
        days = sorted({row["date"] for row in rows})
        when = " to ".join(dict.fromkeys((days[0], days[-1]))) if days else ""
        lines += [f"**{what}; Python {facts['python']}, PyTorch {facts['torch']}; {when}**", ""] if rows else []
        for device in dict.fromkeys(row["device"] for row in rows):
            here = [row for row in rows if row["device"] == device]
            lines += [f"Targets on {device}:", "", *_targets(here), "", f"Measured on {device}:", "", *_rows(here), ""]
    return "\n".join(lines)


def _targets(rows: list[dict]) -> list[str]:
    lines = ["| what | target | measured | met | remark |", "|---|---|---|---|---|"]
    for target in TARGETS:
        worst = target.worst(rows)
        if worst is None:
            continue
        value, row = worst
        small, met = row["gigabytes"] < JUDGED, target.met(value)
        why = target.why.format_map({name: f"{measure.median(way):.3g}" for name, way in row["ways"].items()})
        lines.append(
            f"| {target.area}: {target.words} | {'≥' if target.least else '≤'} {target.bound:g} {target.unit} | "
            f"{value:.3g} {target.unit} ({row['gigabytes']:g} GB) | "
            f"{'too small' if small else 'yes' if met else 'no'} | {'' if met or small else why} |"
        )
    return lines


def _rows(rows: list[dict]) -> list[str]:
    lines = [
        "| area, size | way | seconds, median (fastest to slowest) | over the floor | of the obvious way's time "
        "| peak anonymous | peak RSS |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name, way in row["ways"].items():
            seconds = f"{measure.median(way):.3g} ({min(way['seconds']):.3g} to {max(way['seconds']):.3g})"
            others = [row["ways"].get(other) for other in ("floor", "obvious")]
            shares = [f"{measure.ratio(way, other):.2f}" if other else "" for other in others]
            memory = [f"{way[key] / 1e6:,.0f} MB" for key in measure.PEAKS]
            cells = [f"{row['area']}, {row['gigabytes']:g} GB", name, seconds, *shares, *memory]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


# ---------------------------------------------------------------- the command


def weights(store, args, sizes: tuple[float, ...], device: str) -> None:
    """Comparison and spectra on CPU and GPU, and surgery; one pair of models on disk at a time."""
    script = cli.sibling("benchmarks/weights.py")
    folder = Path(args.folder) / "pair"
    for size in sizes:
        todo = ["comparison itself", WHOLE, "spectra", "layer swap", "component swap"]
        if args.go_on and all(store.has(area, size, "cpu") for area in todo):
            continue
        shutil.rmtree(folder, ignore_errors=True)
        folders.refuse_full_disk(folder.absolute(), round(3.2 * size * 1e9) + (1 << 28))
        say(f"a pair of {size:g} GB each")
        judged = size == min(sizes, key=lambda other: abs(other - 1))  # targets use this size; the others give slopes
        repeats, slow = args.repeats or (5 if judged else 3), args.repeats or (2 if judged else 1)
        try:
            pair = script.RandomPair(folder, size)
            for where in dict.fromkeys(("cpu", device)):
                for area, ways, more in script.comparison(pair, repeats, slow, where):
                    store.put(area, size, where, ways, **more)
                    say(f"{area} on {where}")
                for area, ways, more in script.spectra(pair, args.repeats or 2, args.repeats or 1, where):
                    store.put(area, size, where, ways, **more)
                    say(f"{area} on {where}")
            for area, ways, more in script.surgeries(pair, repeats, slow):
                store.put(area, size, "cpu", ways, **more)
                say(area)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def forward(store, args, sizes: tuple[float, ...], device: str) -> None:
    """Forward passes: on a CPU, models of `sizes` in float32; on a GPU, those of SHAPES that fit, in bfloat16."""
    script, trial = cli.sibling("benchmarks/forward.py"), max(sizes) < JUDGED
    dtype, amount = "float32", (8, 2, 32) if trial else (64, 2, 512)
    shapes = [(size, measure.shape_of(size)) for size in sizes]
    if device != "cpu":
        dtype, amount = "bfloat16", amount if trial else (1024, 16, 2048)
        on_gpu = [shape for _, shape in shapes] if trial else [measure.Shape(*dims) for dims in SHAPES.values()]
        shapes = [(round(2e-9 * shape.parameters, 2), shape) for shape in on_gpu]
        shapes = [(size, shape) for size, shape in shapes if size * 1e9 * 1.5 < torch.cuda.mem_get_info()[0]]
    for size, shape in shapes:
        if args.go_on and all(store.has(area, size, device) for area in AREAS):
            continue
        say(f"forward passes on {device}, {shape.parameters / 1e9:.2f} B parameters in {dtype}")
        bench = script.Bench(shape, dtype, device, *amount)
        script.check(bench, 1e-3 if dtype == "float32" else 5e-2)
        repeats, slow = args.repeats or (5 if size == shapes[0][0] else 3), args.repeats or 2
        for area, ways, more in script.measured(bench, repeats, slow):
            store.put(area, size, device, ways, dtype=dtype, **more)
            say(f"{area} on {device}")


STARTED = time.monotonic()


def say(text: str) -> None:
    cli.say(f"[{time.monotonic() - STARTED:5.0f} s] {text}")


def build_parser():
    p = cli.parser(__doc__, study=False)
    p.add_argument("--full", action="store_true", help="pairs of 0.1, 0.5, 1 and 2 GB each; default: 1 GB")
    p.add_argument("--sizes", metavar="G,G,..", type=_sizes, help="other sizes, in GB")
    p.add_argument("--forward", metavar="G,G,..", type=_sizes, help="sizes of the models for forward passes on a CPU")
    p.add_argument("--only", choices=("weights", "forward", "table"), help="measure only these, or only write tables")
    p.add_argument("--device", default="auto", help="auto (CUDA if available, else CPU), cpu, cuda; default auto")
    p.add_argument("--repeats", type=cli.positive, metavar="N", help="rounds; default 5, fewer for slow or large cases")
    p.add_argument("--go-on", action="store_true", help="keep rows that this machine measured with the same code")
    p.add_argument("--folder", default="build/benchmarks", metavar="DIR", help="scratch; default %(default)s")
    p.add_argument("-o", "--output", default=OUTPUT, metavar="FILE", help="default %(default)s")
    p.add_argument("--readme", default=README, metavar="FILE", help="where the table goes; default %(default)s")
    return p


def _sizes(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    readme = Path(args.readme)
    if not readme.is_file():
        if args.readme == README:
            raise InputError(f"{README} does not exist; run this from the root of the repository")
        readme.parent.mkdir(parents=True, exist_ok=True)
        readme.write_text(f"<!-- {TABLE} -->\n<!-- /{TABLE} -->\n", encoding="utf-8")
    store = measure.Store(Path(args.output))
    sizes, passes = (FULL, FORWARD_FULL) if args.full else (QUICK, FORWARD)
    device = str(cli.device(args.device))
    if args.only in (None, "weights"):
        weights(store, args, args.sizes or sizes, device)
    if args.only in (None, "forward"):
        forward(store, args, args.forward or passes, device)
    text = table(store)
    measure.between_markers(readme, TABLE, text)
    cli.say(text)
    say(f"the rows are in {args.output}, the table is in {args.readme}")


if __name__ == "__main__":
    cli.run(main)
