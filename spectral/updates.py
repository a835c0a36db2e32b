"""What every script of this folder starts from: where the matrices of a base B and a target C are, and random updates
that an update dW = C - B is compared with.

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

# Updates that have nothing of dW but its norm, its entries, or the size of each of its entries.
NULLS = ("gaussian", "permuted", "signs")
ONE_RUN = 0.5  # a median cosine of B and C below this is no continued training of B


@dataclass(frozen=True)
class Place:
    """Where one weight matrix is in every model.

    Attributes:
        expert: its expert; None of what is no expert's.
        piece: its number where a projection is several matrices in a row (latent attention), else None.
        parts: where it is on disk in each model, in the order of the sides that it was made from.
    """

    layer: int
    projection: str
    expert: int | None
    piece: int | None
    parts: tuple[archs.WeightSlice, ...]

    @property
    def name(self) -> str:
        """`layer_3.q_proj`, `layer_3.up_proj.expert_2`, `layer_3.q_proj.piece_1`."""
        more = {"expert": self.expert, "piece": self.piece}
        return f"layer_{self.layer}.{self.projection}" + "".join(
            f".{key}_{number}" for key, number in more.items() if number is not None
        )


def places(sides: list[Side], layers: Collection[int] | None = None) -> list[Place]:
    """Every weight matrix of the layers (default: all), in order; the router of a mixture is among them.

    Raises:
        InputError: the models differ in the shape of a tensor, or in how it is cut.
    """
    plans.plan(sides, None, (), details=True)  # checks all that is to be read, before the first of it is
    found, one = [], sides[0]
    for layer in range(one.n_layers) if layers is None else sorted({*layers}):
        experts = one.arch.experts(one.config, layer) or 0
        for projection in one.projections(layer, None):
            several = list(zip(*(side.weights(layer, projection) for side in sides), strict=True))
            sparse = experts if projection in archs.FFN and len(several) >= experts else 0
            for number, parts in enumerate(several):
                expert = number if number < sparse else None
                piece = number if len(several) > 1 and not sparse else None
                found.append(Place(layer, projection, expert, piece, parts))
    return found


def read(side: Side, part: archs.WeightSlice, dtype=None, device="cpu", out_dim: int | None = None) -> torch.Tensor:
    """A part of a model's tensor as a matrix [out, in], in `dtype`; default: float32, or float64 if it is that on disk.

    Args:
        out_dim: the dimension of the tensor that is the outputs; default: the part's own, which of single heads of o is
            that of its inputs.

    Raises:
        InputError: NaN or infinity in it.
    """
    found = part.take(side.stored.get(part.tensor))
    wide = torch.float64 if found.dtype == torch.float64 else torch.float32
    found = found.to(device).to(dtype or wide)
    if not tensors.is_finite(found):
        raise InputError(f"{side.spec}: tensor {part.tensor} holds NaN or infinite values; the weights are damaged")
    return found.T if (part.dim if out_dim is None else out_dim) == 1 else found


def wide(base: torch.Tensor, target: torch.Tensor, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Both in float32, or float64 where one is, on the device."""
    dtype = torch.float64 if torch.float64 in (base.dtype, target.dtype) else torch.float32
    return base.to(device, dtype), target.to(device, dtype)


def draw_seed(seed: int, *what) -> int:
    """A seed of its own for each draw: `draw_seed(42, layer, projection, "gaussian", 0)`."""
    return int.from_bytes(hashlib.sha256(repr((seed, *what)).encode()).digest()[:7], "big")


def drawn_as(pair: Pair, tensor: str) -> str:
    """By which name random numbers for a tensor are drawn: for a head that is tied to the embeddings by theirs. Where
    both are on disk, they are one in memory, and must stay alike."""
    if archs.meaning(pair.arch, tensor) != "lm_head.weight" or not settings.tied(pair.config):
        return tensor
    return pair.arch.disk_name(f"{pair.arch.embeddings[0]}.weight", pair.target.names())


def nulls(update: torch.Tensor, kind: str, seed: int) -> torch.Tensor:
    """A random update with the shape, dtype, device and Frobenius norm of `update`.

    Args:
        kind: of NULLS: "gaussian" entries, the "permuted" entries of the update, or its entries with "signs" redrawn.
        seed: the same one draws the same numbers on the same kind of device; a GPU's are others than a CPU's.

    Raises:
        InputError: no such kind.
    """
    if kind not in NULLS:
        raise InputError(f"no null is called {kind!r}; there are {', '.join(NULLS)}")
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
    """The cosine of B and C of every projection of every layer, those of zeros left out: one pass over both models."""
    found = compare.changes(base, [target])
    each = [change.cosine for layers in found.values() for row in layers.values() for change in row.values()]
    return [cosine for cosine in each if cosine is not None]


def warn_if_not_one_run(base: refs.ModelRef, target: refs.ModelRef, known: Iterable[float] | None = None) -> float:
    """The median cosine of B and C over their matrices; below ONE_RUN it warns that C is no continued training of B.

    Args:
        known: the cosines, where they were measured along the way; default: `cosines`, which reads both models.
    """
    found = list(cosines(base, target) if known is None else known)
    median = statistics.median(found) if found else float("nan")
    if median < ONE_RUN:
        cli.warn(
            f"the median cosine of the weights of {base.spec} and {target.spec} is {median:.2f}: these are hardly one "
            "run, and nothing measured on their difference is about continued pre-training"
        )
    return median
