"""Identity of models: hashes of the relevant part of a configuration, and of samples of the weights."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from cpt_utils.checkpoints.formats import WEIGHT_PATTERNS


def shape_of(config: dict) -> dict:
    """A configuration without keys that saving changes, so a model saved by another release stays the same model."""
    passing = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures")
    return {key: value for key, value in config.items() if key not in passing}


def untrained_like(config: dict) -> dict:
    """The part of a configuration that determines an untrained model: `shape_of` without the ids of special tokens.

    A Trainer takes these ids from its tokenizer, so they may differ between a base and its checkpoints.
    """
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    kept = {key: value for key, value in shape_of(config).items() if key not in ids}
    return {key: untrained_like(value) if key == "text_config" and value else value for key, value in kept.items()}


def shape_hash(shape: dict) -> str:
    """A short hash of the result of `shape_of` or `untrained_like`."""
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]


BLOCKS, BLOCK = 64, 1 << 14  # blocks per file, and bytes per block


def weights_sample(folder: Path, patterns: Iterable[str] = WEIGHT_PATTERNS) -> str | None:
    """A short hash of a model folder's weights: of the first, middle and last bytes of every safetensors tensor, and of
    the size and BLOCKS evenly spaced blocks of every file.

    Reads a megabyte or two per file, which is negligible compared with loading. Two trainings differ in every block,
    and a change of a whole tensor is detected; a change of a few rows in a large tensor may not be. None if the folder
    holds no weights.
    """
    names = sorted(name for name in os.listdir(folder) if any(fnmatch.fnmatch(name, p) for p in patterns))
    names = [name for name in names if (folder / name).is_file()]
    if not names:
        return None
    digest = hashlib.sha256()
    for name in names:
        path = folder / name
        size = path.stat().st_size
        digest.update(f"{name}:{size}".encode())
        with open(path, "rb") as file:
            for position in sorted({size * i // BLOCKS for i in range(BLOCKS)} | {max(0, size - BLOCK)}):
                file.seek(position)
                digest.update(file.read(BLOCK))
            for position in _sampled_positions(file, size) if name.endswith(".safetensors") else ():
                file.seek(position)
                digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]


def _sampled_positions(file, size: int) -> list[int]:
    """Positions of the first, middle and last bytes of tensors in a safetensors file; [] if its header is damaged."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        return []
    try:
        header = json.loads(file.read(length))
        spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        positions = {8 + length + p for a, b in spans for p in (a, (a + b) // 2, max(a, b - _PIECE))}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return sorted(position for position in positions if 0 <= position < size)


_PIECE = 1 << 12  # bytes read at each position in a tensor


def vocabulary_size(config: dict) -> int | None:
    """The vocabulary size in a `config.json`, at the top or below `text_config`."""
    return config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
