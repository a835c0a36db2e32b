"""Shared by the scripts of this folder: where the matrices of a base B and a target C are stored, and random updates to
compare the update dW = C - B with.

    for place in places(sides): B, C = (read(side, part) for side, part in zip(sides, place.parts))  # [out, in] each
    nulls(C - B, "gaussian", draw_seed(42, place.name, 0))                                           # of equal norm
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from cpt_utils.architectures import archs
from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import refs, settings, tensors
from cpt_utils.interventions.surgery import Pair
from cpt_utils.measures import compare
from cpt_utils.measures import matrices as plans
from cpt_utils.measures.matrices import Side

# Random updates: they share with dW only its norm, its entries, or the size of each entry.
NULLS = ("gaussian", "permuted", "signs")
ONE_RUN = 0.5  # if the median cosine of B and C is below this, C was hardly trained from B


@dataclass(frozen=True)
class Place:
    """Where one weight matrix is stored in every model.

    Attributes:
        expert: the expert that it belongs to, else None.
        piece: its number if the projection is a sequence of several matrices (latent attention), else None.
        parts: where it is on disk in each model, in the order of the sides passed to `places`.
    """

    layer: int
    projection: str
    expert: int | None
    piece: int | None
    parts: tuple[archs.WeightSlice, ...]

    @property
    def name(self) -> str:
        """`layer_3.q_proj`, `layer_3.up_proj.expert_2`, `layer_3.q_proj.piece_1`."""
        suffixes = {"expert": self.expert, "piece": self.piece}
        return f"layer_{self.layer}.{self.projection}" + "".join(
            f".{key}_{number}" for key, number in suffixes.items() if number is not None
        )


def places(sides: list[Side], layers: Collection[int] | None = None) -> list[Place]:
    """Every weight matrix of the layers (default: all), in order, including the router of a mixture.

    Raises:
        InputError: the models differ in the shape of a tensor, or in how it is cut.
    """
    plans.plan(sides, None, (), details=True)  # checks everything before anything is read
    listed, first = [], sides[0]
    for layer in range(first.n_layers) if layers is None else sorted({*layers}):
        experts = first.arch.experts(first.config, layer) or 0
        for projection in first.projections(layer, None):
            matrices = list(zip(*(side.weights(layer, projection) for side in sides), strict=True))
            sparse = experts if projection in archs.FFN and len(matrices) >= experts else 0
            for number, parts in enumerate(matrices):
                expert = number if number < sparse else None
                piece = number if len(matrices) > 1 and not sparse else None
                listed.append(Place(layer, projection, expert, piece, parts))
    return listed


def read(side: Side, part: archs.WeightSlice, dtype=None, device="cpu", out_dim: int | None = None) -> torch.Tensor:
    """A part of a model's tensor as a matrix [out, in], in `dtype`; default: float32, or float64 if it is that on disk.

    Args:
        out_dim: the tensor's output dimension; default: the part's own `dim`, which for single heads of o is the input
            dimension.

    Raises:
        InputError: the part holds NaN or infinity.
    """
    matrix = part.take(side.stored.get(part.tensor))
    wide = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    matrix = matrix.to(device).to(dtype or wide)
    if not tensors.is_finite(matrix):
        raise InputError(f"{side.spec}: tensor {part.tensor} holds NaN or infinite values; the weights are damaged")
    return matrix.T if (part.dim if out_dim is None else out_dim) == 1 else matrix


def wide(base: torch.Tensor, target: torch.Tensor, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Both on the device, in float64 if one of them is, else in float32."""
    dtype = torch.float64 if torch.float64 in (base.dtype, target.dtype) else torch.float32
    return base.to(device, dtype), target.to(device, dtype)


def draw_seed(seed: int, *what) -> int:
    """A separate seed for each draw: `draw_seed(42, layer, projection, "gaussian", 0)`."""
    return int.from_bytes(hashlib.sha256(repr((seed, *what)).encode()).digest()[:7], "big")


def drawn_as(pair: Pair, tensor: str) -> str:
    """The name under which random numbers for a tensor are drawn: a head that is tied to the embeddings uses theirs.
    Even if both are on disk, they are one tensor in memory and must stay equal."""
    if archs.meaning(pair.arch, tensor) != "lm_head.weight" or not settings.tied(pair.config):
        return tensor
    return pair.arch.disk_name(f"{pair.arch.embeddings[0]}.weight", pair.target.names())


def nulls(update: torch.Tensor, kind: str, seed: int) -> torch.Tensor:
    """A random update with the shape, dtype, device and Frobenius norm of `update`.

    Args:
        kind: one of NULLS: "gaussian" entries, the update's entries "permuted", or its entries with "signs" redrawn.
        seed: gives the same numbers on the same kind of device; a GPU draws other numbers than a CPU.

    Raises:
        InputError: no such kind.
    """
    if kind not in NULLS:
        raise InputError(f"no null is called {kind!r}; the nulls are {', '.join(NULLS)}")
    generator = torch.Generator(update.device).manual_seed(seed)
    if kind == "permuted":
        order = torch.randperm(update.numel(), generator=generator, device=update.device)
        return update.flatten()[order].view(update.shape)
    if kind == "signs":
        drawn = torch.randint(0, 2, update.shape, generator=generator, device=update.device, dtype=torch.int8)
        return update * (2 * drawn - 1)
    drawn = torch.randn(update.shape, generator=generator, device=update.device, dtype=update.dtype)
    return drawn * (norm(update) / norm(drawn)).to(update.dtype)


def norm(matrix: torch.Tensor) -> torch.Tensor:
    """The Frobenius norm, summed in float64: a scalar tensor."""
    return torch.linalg.vector_norm(matrix, dtype=torch.float64)


def cosines(base: refs.ModelRef, target: refs.ModelRef) -> list[float]:
    """The cosine of B and C for every projection of every layer, without zero matrices: one pass over both models."""
    changes = compare.changes(base, [target])
    values = [change.cosine for layers in changes.values() for row in layers.values() for change in row.values()]
    return [cosine for cosine in values if cosine is not None]


def warn_if_not_one_run(base: refs.ModelRef, target: refs.ModelRef, known: Iterable[float] | None = None) -> float:
    """The median cosine of B and C over their matrices, with a warning below ONE_RUN: C was hardly trained from B.

    Args:
        known: the cosines, if they were measured already; default: `cosines`, which reads both models.
    """
    values = list(cosines(base, target) if known is None else known)
    median = statistics.median(values) if values else float("nan")
    if median < ONE_RUN:
        cli.warn(
            f"the median cosine of the weights of {base.spec} and {target.spec} is {median:.2f}: the second "
            "was hardly trained from the first, so their difference says nothing about continued pre-training"
        )
    return median
