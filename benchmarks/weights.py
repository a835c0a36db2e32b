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
from functools import partial
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli
from cpt_utils.checkpoints import refs
from cpt_utils.interventions import on_disk, surgery
from cpt_utils.measures import compare

measure = cli.sibling("benchmarks/measure.py")
PYTHON = sys.executable
OBVIOUS = [PYTHON, "benchmarks/obvious.py"]


class RandomPair:
    """A base in one file and a checkpoint in shards of a gigabyte (`run/checkpoint-1`), random, in bfloat16."""

    def __init__(self, folder: Path, gigabytes: float):
        shape = measure.shape_of(gigabytes)
        self.folder, self.base, self.target = folder, str(folder / "base"), str(folder / "run" / "checkpoint-1")
        self.bytes = measure.write_model(Path(self.base), shape, 0, "100GB")
        measure.write_model(Path(self.target), shape, 1, "1GB")
        self.hub = list(range(1, shape.layers, 2))
        interface = [layer for layer in range(shape.layers) if layer not in self.hub]
        self.layers = folder / "layers.json"
        self.layers.write_text(json.dumps({"interface_layers": interface, "layers": self.hub}))
        os.sync()

    def read(self) -> None:
        """Read both once, as `cat` does: into the page cache, or from it."""
        files = [str(file) for side in (self.base, self.target) for file in sorted(Path(side).glob("*.safetensors"))]
        subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)


def comparison(pair: RandomPair, repeats: int, slow: int, device: str = "cpu") -> Iterator[tuple[str, dict, dict]]:
    """The whole process against the obvious way, and the comparison itself against reading both files once."""
    script = [PYTHON, "weight-diff/attn_vs_ffn.py", "--base-model", pair.base, "--ckpt-model", pair.target]
    changes = partial(compare.changes, refs.model(pair.base), refs.run(pair.target), device=device)
    whole = {
        "floor": pair.read,
        "ours": [*script, "--device", device, "--output", str(pair.folder / "change.json"), "--overwrite"],
        "obvious": [*OBVIOUS, "compare", pair.base, pair.target],
        "imports": [PYTHON, "-c", "import torch"],
    }
    itself = {"floor": pair.read, "ours": changes, "everything": partial(changes, archs.PROJECTIONS, details=True)}
    pair.read()
    changes()  # imports, and what a GPU sets up once
    times = dict.fromkeys(whole, repeats) | {"obvious": slow, "imports": slow}
    yield "comparison itself", measure.interleaved(itself, dict.fromkeys(itself, repeats)), {"bytes": 2 * pair.bytes}
    yield "comparison, whole process", measure.interleaved(whole, times), {"bytes": 2 * pair.bytes}


def surgeries(pair: RandomPair, repeats: int, slow: int) -> Iterator[tuple[str, dict, dict]]:
    """Layer swap and component swap of half of the layers against `cp -r` of the target."""
    out, models = pair.folder / "out", [pair.base, pair.target]
    flags = ["--base-model", pair.base, "--checkpoint-dir", pair.target, "--layer-list", str(pair.layers)]
    lists = str(pair.layers), "--methods", "semantic_hub"
    commands = {
        "layer swap": [PYTHON, "layer-swap/layer-swap.py", *models, *lists, "-o", str(out)],
        "component swap": [PYTHON, "component-swap/ffn_lsn_swap.py", *flags, "--output-dir", str(out)],
    }
    recipes = {
        "layer swap": lambda both: surgery.layers_from_base(both, pair.hub),
        "component swap": lambda both: surgery.parts_from_base(both, archs.FFN, pair.hub),
    }

    def swap(area: str) -> None:
        with surgery.Pair(*map(refs.model, models)) as both:
            on_disk.write_model(both, recipes[area](both), out)

    def clean() -> None:
        shutil.rmtree(out, ignore_errors=True)
        pair.read()
        os.sync()
        measure.warm(pair.bytes)

    for area, command in commands.items():
        kind = "layers" if area == "layer swap" else "ffn"
        ways = {
            "floor": lambda: subprocess.run(["cp", "-r", pair.target, str(out)], check=True),
            "ours": partial(swap, area),
            "whole process": command,
            "obvious": [*OBVIOUS, "swap", *models, str(out), kind, ",".join(map(str, pair.hub))],
        }
        times = dict.fromkeys(ways, repeats) | {"obvious": slow, "whole process": slow}
        with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
            found = measure.interleaved(ways, times, clean)
        shutil.rmtree(out, ignore_errors=True)
        yield area, found, {"bytes": pair.bytes}
