"""Benchmarks of what reads and writes whole checkpoints: the weight comparison and the surgery.

Both functions measure one size and yield its rows (area, ways, more facts) for benchmarks/bench.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli
from cpt_utils.checkpoints import folders, refs
from cpt_utils.interventions import on_disk, surgery
from cpt_utils.measures import compare

measure = cli.sibling("benchmarks/measure.py")
PYTHON = sys.executable
# What the obvious way does and no more: the script also draws and writes a header.
ALONE = """
import sys
from cpt_utils.checkpoints import refs
from cpt_utils.measures import compare
compare.changes(refs.model(sys.argv[1]), refs.run(sys.argv[2]))
"""


class Pair:
    """A base in one file and a checkpoint in shards of a gigabyte (`run/checkpoint-1`), random, in bfloat16."""

    def __init__(self, folder: Path, gigabytes: float):
        shape = measure.shape_of(gigabytes)
        self.folder, self.base, self.target = folder, folder / "base", folder / "run" / "checkpoint-1"
        self.bytes = measure.write_model(self.base, shape, 0, 1, "bfloat16")
        measure.write_model(self.target, shape, 1, max(1, round(self.bytes / 1e9)), "bfloat16")
        self.hub = list(range(1, shape.layers, 2))
        interface = [layer for layer in range(shape.layers) if layer not in self.hub]
        self.layers = folder / "layers.json"
        self.layers.write_text(json.dumps({"interface_layers": interface, "layers": self.hub}))
        os.sync()

    def files(self) -> list[str]:
        return [str(file) for side in (self.base, self.target) for file in sorted(side.glob("*.safetensors"))]

    def read(self) -> None:
        """Read both once, as `cat` does: into the page cache, or from it."""
        with open(os.devnull, "wb") as sink:
            subprocess.run(["cat", *self.files()], stdout=sink, check=True)


def _obvious(*words: object) -> dict:
    return measure.watch([PYTHON, "benchmarks/obvious.py", *map(str, words)])


def comparison(pair: Pair, repeats: int, slow: int, device: str = "cpu") -> Iterator[tuple[str, dict, dict]]:
    """The whole process against the obvious way, and the comparison itself against reading both files once."""
    script = [PYTHON, "weight-diff/attn_vs_ffn.py", "--base-model", str(pair.base), "--ckpt-model", str(pair.target)]
    output, base, run = pair.folder / "change.json", refs.model(pair.base), refs.run(str(pair.target))
    whole = {
        "floor": pair.read,
        "ours": lambda: measure.watch([*script, "--device", device, "--output", str(output), "--overwrite"]),
        "ours, no figure": lambda: measure.watch([PYTHON, "-c", ALONE, str(base.spec), str(pair.target)]),
        "obvious": lambda: _obvious("compare", pair.base, pair.target),
        "obvious, in float32": lambda: _obvious("compare", pair.base, pair.target, "float32"),
        "imports": lambda: measure.watch([PYTHON, "-c", "import torch"]),
    }
    itself = {
        "floor": pair.read,
        "ours": lambda: compare.changes(base, run, device=device) and None,
        "everything": lambda: compare.changes(base, run, archs.PROJECTIONS, device=device, details=True) and None,
    }
    pair.read()
    compare.changes(base, run, device=device)  # imports, and what a GPU sets up once
    times = dict.fromkeys(whole, repeats) | {"obvious": slow, "obvious, in float32": slow, "imports": slow}
    yield "comparison itself", measure.interleaved(itself, dict.fromkeys(itself, repeats)), {"bytes": 2 * pair.bytes}
    yield "comparison, whole process", measure.interleaved(whole, times), {"bytes": 2 * pair.bytes}


def surgeries(pair: Pair, repeats: int, slow: int) -> Iterator[tuple[str, dict, dict]]:
    """Layer swap and component swap of half of the layers against `cp -r` of the target."""
    lists = ",".join(map(str, pair.hub))
    models = str(pair.base), str(pair.target)
    component = ("--base-model", models[0], "--checkpoint-dir", models[1], "--layer-list", str(pair.layers))
    commands = {
        "layer swap": [PYTHON, "layer-swap/layer-swap.py", *models, str(pair.layers), "--methods", "semantic_hub"],
        "component swap": [PYTHON, "component-swap/ffn_lsn_swap.py", *component],
    }
    for area, command in commands.items():
        out = pair.folder / "out"
        kind = "layers" if area == "layer swap" else "ffn"

        def swap(without: str | None = None, kind: str = kind, out: Path = out) -> None:
            with _without(without), surgery.Pair(refs.model(pair.base), refs.model(pair.target)) as both:
                whole = kind == "layers"
                recipe = (
                    surgery.layers_from_base(both, pair.hub)
                    if whole
                    else surgery.parts_from_base(both, archs.FFN, pair.hub)
                )
                on_disk.write_model(both, recipe, out)

        def copy(*, flush: bool = False, out: Path = out) -> None:
            subprocess.run(["cp", "-r", str(pair.target), str(out)], check=True)
            if flush:
                subprocess.run(["sync", *map(str, out.iterdir())], check=True)

        def obvious(kind: str = kind, out: Path = out) -> dict:
            row = _obvious("swap", pair.base, pair.target, out, kind, lists)
            return row | {"seconds": float(row["last_line"])}  # after its imports, as ours

        def process(command: list[str] = command, area: str = area, out: Path = out) -> dict:
            return measure.watch([*command, "-o" if area == "layer swap" else "--output-dir", str(out)])

        ways = {
            "floor": copy,
            "ours": swap,
            "floor, flushed": lambda copy=copy: copy(flush=True),
            "ours, not flushed": lambda swap=swap: swap("_sync"),
            "ours, not read back": lambda swap=swap: swap("verify_file"),
            "ours, neither": lambda swap=swap: swap("both"),
            "whole process": process,
            "obvious": obvious,
        }

        def clean(out: Path = out) -> None:
            shutil.rmtree(out, ignore_errors=True)
            pair.read()
            os.sync()
            measure.warm(pair.bytes)

        with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
            times = dict.fromkeys(ways, repeats) | {"obvious": slow, "whole process": slow}
            found = measure.interleaved(ways, times, clean)
        shutil.rmtree(out, ignore_errors=True)
        yield area, found, {"bytes": pair.bytes}


@contextlib.contextmanager
def _without(what: str | None):
    """Leave out a part of what writing a folder costs, to see what it costs: flushing, reading back, or both."""
    names = {"both": ("_sync", "verify_file")}.get(what, (what,) if what else ())
    kept = {name: getattr(folders, name) for name in names}
    try:
        for name in names:
            setattr(folders, name, lambda *_: None)
        yield
    finally:
        for name, function in kept.items():
            setattr(folders, name, function)
