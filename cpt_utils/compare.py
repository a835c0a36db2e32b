"""How far checkpoints have moved from their base: sums over the weights of every projection, in one pass.

    found = changes(refs.model("build/base"), refs.run("build/run"))
    found[90][3]["gate_proj"].mean_abs        # mean |dW| of layer 3's gate projection at step 90

B is read once for all checkpoints, a few megabytes of rows at a time, so memory depends neither on the size of the
models nor on their number. Differences are taken in float32 whatever the dtypes on disk; sums are kept in float64.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpt_utils import archs, cli, refs, tensors
from cpt_utils.errors import InputError

if TYPE_CHECKING:
    import torch

CHUNK = 4 << 20  # bytes of B's rows, counted as float32, worked on at a time


@dataclass
class Change:
    """Sums over the `n` entries of one projection's weight: of |dW|, dW^2, W_B^2, and the largest |dW|.

    `rows` holds the sum of |dW| of each output feature (a gate's neuron), float64 [features], where it was asked for;
    each is over `n / features` entries.
    """

    n: int = 0
    sum_abs: float = 0.0
    sum_sq: float = 0.0
    base_sq: float = 0.0
    max_abs: float = 0.0
    rows: torch.Tensor | None = None

    @property
    def mean_abs(self) -> float:
        """Mean |dW|."""
        return self.sum_abs / self.n

    @property
    def relative(self) -> float | None:
        """||dW||_F / ||W_B||_F; None where the base is all zeros."""
        return (self.sum_sq / self.base_sq) ** 0.5 if self.base_sq else None

    @property
    def row_means(self) -> torch.Tensor:
        """Mean |dW| of each output feature: float64 [features]."""
        return self.rows / (self.n / len(self.rows))


Changes = dict[int, dict[int, dict[str, Change]]]


def changes(
    base: refs.ModelRef,
    checkpoints: list[refs.ModelRef],
    projections: Collection[str] | None = None,
    rows: Collection[str] = (),
    device: torch.device | str = "cpu",
) -> Changes:
    """`{step: {layer: {projection: Change}}}` of every checkpoint of a run against `base`. Weight matrices only.

    Args:
        projections: only these; default: all that the architecture has.
        rows: projections whose sums are also kept by output feature.
        device: where the differences are taken; tensors go there block by block.

    Raises:
        InputError: another architecture, layer count or shape of what is compared, missing or damaged weights, NaN.
    """
    with ExitStack() as stack:
        one = stack.enter_context(_Side(base))
        others = [stack.enter_context(_Side(ref)) for ref in checkpoints]
        for other in others:
            _refuse_unlike(one, other)
        names = [name for name in one.arch.projections() if projections is None or name in projections]
        plan = [
            (layer, tensor, parts)
            for layer in range(one.n_layers)
            for tensor, parts in _by_tensor(one, layer, names).items()
        ]
        for other in others:  # every shape is checked before the first byte of weights is read
            for layer, _, parts in plan:
                for projection, part in parts.items():
                    _refuse_shapes(one, part, other, other.part(layer, projection))
        found: Changes = {
            other.step: {layer: {name: Change() for name in names} for layer in range(one.n_layers)} for other in others
        }
        for other in others:
            for layer in range(one.n_layers):
                for name in set(rows) & set(names):
                    found[other.step][layer][name].rows = one.features(layer, name)
        for layer, tensor, parts in cli.progress(plan, "weights", unit="tensor"):
            for start, stop in _ranges(one, tensor, parts):
                ours = _float32(one, tensor, start, stop, device)
                blocks = {projection: _Block(part, start, stop) for projection, part in parts.items()}
                squares = {projection: block.sum_of_squares(ours) for projection, block in blocks.items()}
                for other in others:
                    name = other.part(layer, next(iter(parts))).tensor
                    difference = _float32(other, name, start, stop, device) - ours
                    here = found[other.step][layer]
                    for projection, block in blocks.items():
                        here[projection].base_sq += squares[projection]
                        block.add_to(here[projection], difference)
                    if not all(math.isfinite(here[projection].sum_abs) for projection in parts):
                        _refuse_not_finite((one, tensor), (other, name), start=start, stop=stop)
    return found


def unlike(base: refs.ModelRef, checkpoint: refs.ModelRef) -> dict[str, str]:
    """Tensors outside the layers that differ in shape, or that one side has not: they are not compared. Name -> why."""
    with _Side(base) as one, _Side(checkpoint) as other:
        ours = {one.arch.canonical(name): name for name in one.names if one.arch.layer_of(name) is None}
        theirs = {other.arch.canonical(name): name for name in other.names if other.arch.layer_of(name) is None}
        found = {ours[key]: "not in the checkpoint" for key in ours.keys() - theirs.keys()}
        found |= {theirs[key]: "not in the base" for key in theirs.keys() - ours.keys()}
        for key in ours.keys() & theirs.keys():
            shapes = one.stored.shape(ours[key]), other.stored.shape(theirs[key])
            if shapes[0] != shapes[1]:
                found[ours[key]] = f"{list(shapes[0])} in the base, {list(shapes[1])} in the checkpoint"
        return {name: why for name, why in sorted(found.items()) if not archs.is_buffer(name)}


class _Side:
    """One model: its configuration, its architecture and its open files."""

    def __init__(self, ref: refs.ModelRef):
        self.ref, self.step = ref, ref.step
        self.config = ref.config()
        self.arch = archs.for_config(self.config)
        self.n_layers = self.arch.n_layers(self.config)
        self.stored = tensors.TensorFolder(ref)
        self.names = set(self.stored.names())
        self._parts: dict[tuple[int, str], archs.Part] = {}

    def __enter__(self) -> _Side:
        return self

    def __exit__(self, *_) -> None:
        self.stored.close()

    def part(self, layer: int, projection: str) -> archs.Part:
        """Where the weight of `projection` in `layer` is on disk."""
        key = (layer, projection)
        if key not in self._parts:
            parts = self.arch.parts(self.config, layer, projection, self.names)
            self._parts[key] = next(part for part in parts if part.role == "weight")
        return self._parts[key]

    def features(self, layer: int, projection: str) -> torch.Tensor:
        """Zeros for each output feature of a projection: float64 [features]."""
        import torch

        part = self.part(layer, projection)
        if isinstance(part.index, slice):
            size = part.index.stop - part.index.start
        else:
            size = self.stored.shape(part.tensor)[part.dim] if part.index is None else len(part.index)
        return torch.zeros(size, dtype=torch.float64)


def _by_tensor(side: _Side, layer: int, names: list[str]) -> dict[str, dict[str, archs.Part]]:
    """The layer's projections by the tensor on disk that holds them: a fused tensor is read once."""
    grouped: dict[str, dict[str, archs.Part]] = {}
    for name in names:
        part = side.part(layer, name)
        grouped.setdefault(part.tensor, {})[name] = part
    return grouped


def _refuse_unlike(one: _Side, other: _Side) -> None:
    if one.arch != other.arch:
        raise InputError(
            f"{one.ref.spec} is a {one.arch.model_type} and {other.ref.spec} a {other.arch.model_type}; "
            "base and checkpoints must be one architecture"
        )
    if one.n_layers != other.n_layers:
        raise InputError(
            f"{one.ref.spec} has {one.n_layers} layers and {other.ref.spec} {other.n_layers}; "
            "base and checkpoints must have the same"
        )


def _refuse_shapes(one: _Side, ours: archs.Part, other: _Side, theirs: archs.Part) -> None:
    shapes = one.stored.shape(ours.tensor), other.stored.shape(theirs.tensor)
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{ours.tensor} has shape {list(shapes[0])} in {one.ref.spec} and {list(shapes[1])} in {other.ref.spec}; "
            "what is compared must agree in shape"
        )
    same = ours.index is theirs.index or (
        ours.index == theirs.index if isinstance(ours.index, slice) else bool((ours.index == theirs.index).all())
    )
    if not same:  # one fused tensor, cut differently
        raise InputError(f"{one.ref.spec} and {other.ref.spec} differ in attention heads; they cannot be compared")


def _ranges(side: _Side, tensor: str, parts: dict[str, archs.Part]) -> Iterator[tuple[int, int]]:
    """Blocks of the tensor's rows that hold the parts."""
    rows, *rest = side.stored.shape(tensor)
    wanted = [part.index for part in parts.values()]
    first, last = 0, rows
    if all(part.dim == 0 and isinstance(part.index, slice) for part in parts.values()):
        first, last = min(index.start for index in wanted), max(index.stop for index in wanted)
    for start, stop in tensors.chunks(last - first, 4 * tensors.numel(rest), CHUNK):
        yield first + start, first + stop


def _float32(side: _Side, tensor: str, start: int, stop: int, device) -> torch.Tensor:
    import torch

    return side.stored.rows(tensor, start, stop).to(device, torch.float32)


class _Block:
    """What rows `start` to `stop` of a tensor hold of one part: where in the block, and which of its features."""

    def __init__(self, part: archs.Part, start: int, stop: int):
        self.dim = part.dim
        self.index: slice | torch.Tensor | None = part.index
        self.features: int | torch.Tensor = 0  # the first one, or each one's number
        if part.dim != 0:
            return  # rows are input features: every block has a share of all output features
        if part.index is None:
            self.features = start
        elif isinstance(part.index, slice):
            first, last = max(part.index.start, start), min(part.index.stop, stop)
            self.index = slice(first - start, last - start) if first < last else slice(0, 0)
            self.features = max(0, first - part.index.start)
        else:
            self.features = ((part.index >= start) & (part.index < stop)).nonzero().flatten()
            self.index = part.index[self.features] - start

    def sum_of_squares(self, rows: torch.Tensor) -> float:
        import torch

        own = archs.take(rows, self.dim, self.index).to(torch.float64).flatten()
        return float(own @ own)

    def add_to(self, change: Change, difference: torch.Tensor) -> None:
        """Add the part's share of a block of differences (float32) to the sums."""
        import torch

        moved = archs.take(difference, self.dim, self.index).to(torch.float64).abs_()
        if not moved.numel():
            return
        by_feature = moved.sum(1 - self.dim).cpu()
        flat = moved.flatten()
        change.n += len(flat)
        change.sum_abs += float(by_feature.sum())
        change.sum_sq += float(flat @ flat)
        change.max_abs = max(change.max_abs, float(flat.max()))
        if change.rows is None:
            return
        if isinstance(self.features, int):
            change.rows[self.features : self.features + len(by_feature)] += by_feature
        else:
            change.rows[self.features] += by_feature


def _refuse_not_finite(*sides: tuple[_Side, str], start: int, stop: int) -> None:
    for side, name in sides:
        if not tensors.is_finite(side.stored.rows(name, start, stop)):
            raise InputError(f"{side.ref.spec}: tensor {name} holds NaN or infinite values; the weights are damaged")
    raise InputError(f"{side.ref.spec}: tensor {name} differs from the base beyond the range of float32")
