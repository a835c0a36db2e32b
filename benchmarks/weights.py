"""Benchmarks of scripts that read and write whole checkpoints: weight comparison, spectra and swaps.

Each function measures one size and yields its rows (area, ways, further facts) for benchmarks/bench.py.
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
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import refs
from cpt_utils.interventions import on_disk, surgery
from cpt_utils.measures import compare, matrices

measure, obvious = cli.sibling("benchmarks/measure.py"), cli.sibling("benchmarks/obvious.py")
PYTHON = sys.executable
OBVIOUS = [PYTHON, "benchmarks/obvious.py"]


class RandomPair:
    """Random bfloat16 models: a base in one file and a checkpoint in shards of a gigabyte (`run/checkpoint-1`)."""

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
        """Read both once with `cat`, into the page cache or from it."""
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
    changes()  # imports, and one-time GPU setup
    times = dict.fromkeys(whole, repeats) | {"obvious": slow, "imports": slow}
    yield "comparison itself", measure.interleaved(itself, dict.fromkeys(itself, repeats)), {"bytes": 2 * pair.bytes}
    yield "comparison, whole process", measure.interleaved(whole, times), {"bytes": 2 * pair.bytes}


def spectra(pair: RandomPair, repeats: int, slow: int, device: str = "cpu") -> Iterator[tuple[str, dict, dict]]:
    """Singular values of B, C and dW of the first layer with their value share; `everything`: as in
    spectral/spectrum.py, with nulls and heads. The floor is matrix products with the flops of an SVD without vectors.
    """
    script, layer = cli.sibling("spectral/spectrum.py"), [0]
    spectrum, updates, share = script.spectra.Spectrum, script.updates, script.spectra.value_share

    with matrices.opened(refs.model(pair.base), refs.run(pair.target)) as sides:
        places = updates.places(sides, layer)
        shapes = [sides[0].stored.shape(place.parts[0].tensor) for place in places]

        def ours() -> dict:
            values = {}
            for place in places:
                stored = zip(sides, place.parts, strict=True)
                base, target = (updates.read(side, part, device=device) for side, part in stored)
                three = spectrum(base), spectrum(target), spectrum(target - base)
                share(*three[:2])
                values[place.parts[0].tensor] = [matrix.values.cpu() for matrix in three]
            return values

        def everything() -> None:
            measured = script.Measured(sides[1].ref.step, 3, [], 0, torch.device(device))
            for place in places:
                measured.place(sides, place)

        def floor() -> None:
            for shape in shapes:
                m, n = min(shape), max(shape)
                flops, ones = 3 * (4 * m * m * n - 4 * m**3 / 3), torch.ones(m, m, dtype=torch.float64, device=device)
                for _ in range(max(1, round(flops / (2 * m**3)))):
                    product = ones @ ones
                product[0, 0].item()  # waits for a GPU to finish

        slow_way = partial(obvious.spectra, pair.base, pair.target, layer, device)
        _refuse_difference(ours(), slow_way())
        ways = {"floor": floor, "ours": ours, "everything": everything, "obvious": slow_way}
        times = dict.fromkeys(ways, repeats) | {"everything": slow, "obvious": slow}
        yield "spectra", measure.interleaved(ways, times), {"bytes": 2 * pair.bytes, "layers": len(layer)}


def _refuse_difference(ours: dict, slow: dict) -> None:
    """Both ways must give the same singular values, within the precision of an SVD in float32."""
    for name, three in slow.items():
        for fast_values, slow_values in zip(ours[name], three, strict=True):
            if (fast_values - slow_values.cpu()).abs().max() > 1e-4 * fast_values[0]:
                raise InputError(f"{name}: our singular values differ from those of the obvious way")


def surgeries(pair: RandomPair, repeats: int, slow: int) -> Iterator[tuple[str, dict, dict]]:
    """Layer swap and component swap of half of the layers, against `cp -r` of the target."""
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
            timings = measure.interleaved(ways, times, clean)
        shutil.rmtree(out, ignore_errors=True)
        yield area, timings, {"bytes": pair.bytes}
