"""Experts of a mixture in the layout of another folder: each in its own tensors, or all in one.

    base = stacking.like(base, base_arch, base_config, target, target_arch, target_config)

transformers computes with all experts in one tensor, [E, 2 I, hidden] and [E, hidden, I], and saves them as the model
was published: mostly one tensor per expert; trainers that write the model's state directly save them stacked.
Values are only moved, never computed: every bit is the original's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_utils.architectures import archs
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import headers, tensors

if TYPE_CHECKING:
    from cpt_utils.checkpoints.merged import AdapterFolder

    Folder = tensors.TensorFolder | AdapterFolder


@dataclass(frozen=True)
class _Bytes:
    """The location of one tensor's bytes: returned by `folder_of` for a part of a larger tensor."""

    path: Path
    file: str
    found: headers.Entry

    def shard_of(self, name: str) -> str:
        return self.file

    def entry(self, name: str) -> headers.Entry:
        return self.found


def like(
    folder: Folder, arch: archs.Arch, config: dict, other: Folder, other_arch: archs.Arch, other_config: dict
) -> Folder | Restacked:
    """`folder` with its experts in the layout of `other`; `folder` itself if the layouts agree, or it has no experts.

    Tensors that move get the other's names, with the prefix of `arch`. Layers with a different number of experts are
    left as they are: the comparison of shapes refuses them.
    """
    held, wanted = set(folder.names()), set(other.names())
    pairs: dict[str, list[tuple[archs.WeightSlice, archs.WeightSlice]]] = {}
    for layer in range(arch.n_layers(config)):
        if not arch.experts(config, layer) or arch.experts(config, layer) != other_arch.experts(other_config, layer):
            continue
        for projection in (name for name in archs.FFN if name in arch.experts_at.names):
            sources = arch.parts(config, layer, projection, held, folder.shape)
            aims = other_arch.parts(other_config, layer, projection, wanted, other.shape)
            for source, aim in zip(
                *([part for part in each if part.role == "weight"] for each in (sources, aims)), strict=True
            ):
                if (source.expert is None) != (aim.expert is None):
                    name = arch.prefixes[0] + other_arch.canonical(aim.tensor)
                    pairs.setdefault(name, []).append((source, aim))
    return Restacked(folder, pairs) if pairs else folder


class Restacked:
    """A folder with some tensors composed of matrices from others, with the interface of `TensorFolder`.

    Args:
        pairs: name -> [(a matrix of the folder, its position in the tensor of that name)], for all matrices in it.
    """

    def __init__(self, folder: Folder, pairs: dict[str, list[tuple[archs.WeightSlice, archs.WeightSlice]]]):
        self.folder, self.pairs = folder, pairs
        self.spec, self.path, self.kind = folder.spec, folder.path, folder.kind
        self._moved = {source.tensor for held in pairs.values() for source, _ in held}
        self._last: tuple[str, torch.Tensor] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.pairs or (name in self.folder and name not in self._moved)

    def close(self) -> None:
        self._last = None
        self.folder.close()

    def names(self) -> list[str]:
        return [*(name for name in self.folder.names() if name not in self._moved), *self.pairs]

    def fetch(self, names=None) -> None:
        held = None if names is None else {t for name in names for t in self._sources(name)}
        self.folder.fetch(held)

    def _sources(self, name: str) -> set[str]:
        return {source.tensor for source, _ in self.pairs[name]} if name in self.pairs else {name}

    def dtype(self, name: str) -> torch.dtype:
        return self.folder.dtype(next(iter(self._sources(name))))

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.pairs:
            return self.folder.shape(name)
        source, aim = self.pairs[name][0]
        if aim.expert is None:
            return self._size(source, aim)
        experts, matrix = max(aim.expert for _, aim in self.pairs[name]) + 1, list(self._size(source, aim))
        if aim.index is not None:
            matrix[aim.dim] = max(aim.index.stop for _, aim in self.pairs[name])
        return (experts, *matrix)

    def _size(self, source: archs.WeightSlice, aim: archs.WeightSlice) -> tuple[int, int]:
        """(rows, columns) of a matrix of the folder, oriented as in the other tensor."""
        size = list(self.folder.shape(source.tensor)[-2:])
        if source.index is not None:
            size[source.dim] = len(range(*source.index.indices(size[source.dim])))
        return tuple(size if source.dim == aim.dim else reversed(size))

    def _matrix(self, source: archs.WeightSlice, aim: archs.WeightSlice) -> torch.Tensor:
        matrix = source.take(self.folder.get(source.tensor))
        return matrix if source.dim == aim.dim else matrix.T

    def get(self, name: str) -> torch.Tensor:
        """The tensor; the last composed one is kept in memory."""
        if name not in self.pairs:
            return self.folder.get(name)
        source, aim = self.pairs[name][0]
        if aim.expert is None:
            return self._matrix(source, aim)
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self.rows(name, 0, self.shape(name)[0])
        return self._last[1]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of the first dimension, which are experts if all experts are in one tensor."""
        if name not in self.pairs:
            return self.folder.rows(name, start, stop)
        if self.pairs[name][0][1].expert is None:
            return self.get(name)[start:stop]
        experts, *matrix = self.shape(name)
        stop = min(stop, experts)
        stacked = torch.empty((max(0, stop - start), *matrix), dtype=self.dtype(name))
        for source, aim in self.pairs[name]:
            if start <= aim.expert < stop:
                archs.take(stacked[aim.expert - start], aim.dim, aim.index).copy_(self._matrix(source, aim))
        return stacked

    def folder_of(self, name: str) -> tensors.TensorFolder | _Bytes | None:
        """The location of a tensor's bytes; None if they are in no plain file, or not contiguous."""
        if name not in self.pairs:
            return self.folder.folder_of(name)
        source, aim = self.pairs[name][0]
        plain = self.folder.folder_of(source.tensor)
        rows = source.index is None or (source.dim == 0 and source.index.step in (None, 1))
        if plain is None or aim.expert is not None or source.dim != aim.dim or not rows:
            return None
        whole, size = plain.entry(source.tensor), self._size(source, aim)
        row = math.prod(whole.shape[2:]) * (whole.stop - whole.start) // max(1, math.prod(whole.shape))
        start = whole.start + (source.expert * whole.shape[1] + (source.index.start if source.index else 0)) * row
        entry = headers.Entry(whole.dtype, size, start, start + size[0] * row)
        return _Bytes(Path(plain.path), plain.shard_of(source.tensor), entry)
