"""A training of five steps on a tiny model, for what is trained in part."""

from __future__ import annotations

import json
from pathlib import Path

import yaml


def run(train, base: Path, text: Path, out: Path, *flags: str, **changes) -> Path:
    """Train `base` on `text` with cpt/train.py into `out`; `changes` of the training file."""
    values = {
        "from": str(base), "sources": [{"name": "a", "weight": 1, "files": str(text)}], "block_size": 16,
        "batch_size": 2, "steps": 5, "learning_rate": 1e-2, "weight_decay": 0.5, "save_steps": [2, 5],
        "state_every": 3, "dtype_on_disk": "float32",
    }  # fmt: skip
    out.mkdir(exist_ok=True)
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(values | changes))
    train.main(["--config", str(config), "--output-dir", str(out), *flags])
    return out


def record(out: Path) -> dict:
    return json.loads((out / "train.json").read_text())
