"""Quantities of the singular values and vectors of one matrix, or of a base and its target: those of Diffract, and the
share of an update that the singular values account for.

W is m x n, M = min(m, n), N = max(m, n), sigma its singular values. All is computed in float64, whatever the input dtype.

    B, C = Spectrum(base), Spectrum(target)     # [.., m, n]; nothing is computed yet
    described(B)                                # norms, ranks, Marchenko-Pastur edges, power law
    value_share(B, C).share                     # the part of ||C - B||^2 that the singular values account for
    overlaps(base, target)                      # of singular vectors, each with its noise floor
"""  # noqa: E501

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from cpt_utils.base.lazy import torch

# The identity of `value_share` holds to this share of ||dW||^2.
IDENTITY = 1e-6
# Singular values below this share of the largest one cannot be told from 0 with float32 entries.
ZERO = 1e-7
# Entries processed at a time in float64.
BLOCK = 1 << 22


# ---------------------------------------------------------------- singular values


class Spectrum:
    """The singular values of a matrix, or of each of a stack [.., m, n]: float64 [.., M], the largest first."""

    def __init__(self, matrix: torch.Tensor):
        self.matrix = matrix

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.matrix.shape[-2:])

    @cached_property
    def values(self) -> torch.Tensor:
        """From the eigenvalues of the Gram matrix: several times faster than an SVD, more exact than one in float32.

        The eigenvalues are off by a few eps sigma_1^2, hence a singular value by `error`, which only matters for values
        close to 0.
        """
        return torch.linalg.eigvalsh(gram(self.matrix)).flip(-1).clamp_min(0).sqrt()

    @cached_property
    def exact(self) -> torch.Tensor:
        """By SVD in float64."""
        return torch.linalg.svdvals(self.matrix.double())

    @cached_property
    def error(self) -> torch.Tensor:
        """A bound on the error of `values` [.., M], from (M / 2 + 16) eps sigma_1^2 for an eigenvalue. Measured, with M
        from 16 to 400, the error of an eigenvalue is 1 to 30 eps sigma_1^2.
        """
        relative = (self.values.shape[-1] / 2 + 16) * torch.finfo(torch.float64).eps
        eigenvalue = relative * self.values[..., :1] ** 2
        return torch.minimum(eigenvalue / self.values, eigenvalue.sqrt()).nan_to_num(0.0)


def gram(matrix: torch.Tensor) -> torch.Tensor:
    """W W' or W' W, whichever is smaller, in float64 [.., M, M]; products of float32 entries are exact."""
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    small = wide.shape[-2]
    total = torch.zeros(*wide.shape[:-1], small, dtype=torch.float64, device=wide.device)
    step = max(1, BLOCK // max(1, wide[..., :1].numel()))
    for start in range(0, wide.shape[-1], step):
        block = wide[..., start : start + step].double()
        total += block @ block.mT
    return total


# ---------------------------------------------------------------- one matrix


def described(spectrum: Spectrum) -> dict:
    """Norms, ranks, Marchenko-Pastur edges and power law of one matrix, ready for JSON."""
    values, (m, n) = spectrum.values, spectrum.shape
    squares = values.square().sum()
    row = {"frobenius": squares.sqrt(), "nuclear": values.sum(), "spectral": values[0]}
    row |= {"stable_rank": squares / values[0] ** 2, "effective_rank": effective_rank(values)}
    row = {key: float(value) for key, value in row.items()}
    eigenvalues = values.square() / max(m, n)
    return row | {
        "marchenko_pastur": marchenko_pastur(eigenvalues, deviation(spectrum.matrix), (m, n)),
        "power_law": power_law(eigenvalues),
    }


def effective_rank(values: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of sigma / sum(sigma): values [.., M] -> [..]; NaN for a zero matrix (Roy, Vetterli 2007).

    Values that cannot be told from 0 with float32 entries count as 0: a low-rank matrix has thousands of them.
    """
    values = torch.where(values > ZERO * values[..., :1], values, 0.0)
    shares = values / values.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


def deviation(matrix: torch.Tensor) -> float:
    """The standard deviation of the entries."""
    mean = matrix.sum(dtype=torch.float64) / matrix.numel()
    square = torch.linalg.vector_norm(matrix, dtype=torch.float64) ** 2 / matrix.numel()
    return float((square - mean**2).clamp_min(0).sqrt())


def marchenko_pastur(eigenvalues: torch.Tensor, s: float, shape: tuple[int, int]) -> dict:
    """The edges `lower`, `upper` = s^2 (1 -+ sqrt(M / N))^2 between which the eigenvalues sigma^2 / N of a matrix of
    independent entries of standard deviation `s` lie, and how many of `eigenvalues` [M] are `above` the upper one."""
    ratio = (min(shape) / max(shape)) ** 0.5
    lower, upper = (s**2 * (1 + sign * ratio) ** 2 for sign in (-1, 1))
    return {"lower": lower, "upper": upper, "above": int((eigenvalues > upper).sum())}


def power_law(eigenvalues: torch.Tensor) -> dict | None:
    """Power-law fit to the tail of eigenvalues [M], p(x) ~ x^-alpha for x >= xmin: continuous maximum likelihood.

    xmin is the unique eigenvalue with the smallest Kolmogorov-Smirnov distance, the lowest of equals, among those that
    leave a tail of max(10, M / 10) or more (Clauset, Shalizi, Newman 2009).

    Returns:
        `alpha`, `xmin`, `n_tail`, `ks`, and `alpha_weighted` = alpha log10(largest eigenvalue); None if no tail is
        that long and varies.
    """
    least = max(10, len(eigenvalues) / 10)
    x = eigenvalues[eigenvalues > ZERO**2 * eigenvalues.max()].sort().values
    logs, n = x.log(), len(x)
    first = torch.ones(n, dtype=torch.bool, device=x.device)
    first[1:] = x[1:] > x[:-1]
    starts = torch.arange(n, device=x.device)
    starts = starts[first & (n - starts >= least)]
    tails = (n - starts).double()
    sums = logs.flip(0).cumsum(0).flip(0)[starts] - tails * logs[starts]
    starts, tails, sums = starts[sums > 0], tails[sums > 0], sums[sums > 0]
    if not len(starts):
        return None
    alphas = 1 + tails / sums
    blocks = zip(*(column.split(max(1, BLOCK // n)) for column in (starts, tails, alphas)), strict=True)
    distances = torch.cat([_distances(logs, *block) for block in blocks])
    best = int(distances.argmin())
    fit = {"alpha": alphas[best], "xmin": x[starts[best]], "ks": distances[best]}
    fit |= {"alpha_weighted": alphas[best] * x[-1].log10()}
    return {key: float(value) for key, value in fit.items()} | {"n_tail": int(tails[best])}


def _distances(logs: torch.Tensor, starts: torch.Tensor, tails: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """Kolmogorov-Smirnov distances of the tails that begin at `starts` in sorted logs [n]: the largest distance between
    the fitted distribution function and the empirical one, on either side of its steps."""
    first, logs = int(starts.min()), logs[int(starts.min()) :]
    position = torch.arange(len(logs), device=logs.device) + first - starts[:, None]
    fitted = 1 - torch.exp((1 - alphas[:, None]) * (logs - logs[starts - first, None]))
    steps = position / tails[:, None]
    distance = torch.maximum(fitted - steps, steps + 1 / tails[:, None] - fitted)
    return distance.masked_fill(position < 0, 0).amax(1)


# ---------------------------------------------------------------- base and target: values


@dataclass
class Share:
    """The two terms of ||C - B||^2 for a stack of pairs [..]; each tensor is float64 of that shape.

    Attributes:
        total: ||C - B||_F^2.
        value: sum of (sigma_C - sigma_B)^2, which the singular values account for.
        turned: the rest, 2 (sum of sigma_C sigma_B - <C, B>), which the singular vectors account for.
        gap: how far both terms, computed independently, miss `total`, as a share of it: rounding alone.
        by_svd: whether the singular values had to be taken from an SVD.
    """

    total: torch.Tensor
    value: torch.Tensor
    turned: torch.Tensor
    gap: torch.Tensor
    by_svd: bool

    @property
    def share(self) -> torch.Tensor:
        """value / total; NaN if nothing changed."""
        return self.value / self.total


def value_share(base: Spectrum, target: Spectrum) -> Share:
    """||C - B||^2 = sum (sigma_C - sigma_B)^2 + 2 (sum sigma_C sigma_B - <C, B>), exactly; neither term is below 0.

    The first term sums squared differences that are a thousandth or less of the singular values themselves, so these
    are needed to float64 precision: the error of an SVD in float32 is about as large as the differences. Values from
    Gram matrices are exact enough unless the update is tiny; if their error could move a term by more than IDENTITY of
    the total, an SVD replaces them. `turned` is the total minus the first term, because the direct sum loses
    eps ||B||^2 to cancellation, more than IDENTITY for an update of 1e-5 ||B||; `gap` compares the two.
    """
    total, inner = _sums(base.matrix, target.matrix)
    ours, theirs = base.values, target.values
    error = base.error + target.error
    off = (2 * (theirs - ours).abs() * error + error**2).sum(-1)
    by_svd = bool(((off > IDENTITY * total) & (total > 0)).any())  # unchanged matrices have no share
    if by_svd:
        ours, theirs = base.exact, target.exact
    value = (theirs - ours).square().sum(-1).minimum(total)
    direct = 2 * ((theirs * ours).sum(-1) - inner)
    gap = ((theirs - ours).square().sum(-1) + direct - total).abs() / total
    return Share(total, value, total - value, gap, by_svd)


def _sums(base: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """||C - B||_F^2 and <C, B> of pairs [.., m, n], in float64."""
    total = torch.zeros(base.shape[:-2], dtype=torch.float64, device=base.device)
    inner, step = total.clone(), max(1, BLOCK // max(1, base[..., :1, :].numel()))
    for start in range(0, base.shape[-2], step):
        ours, theirs = (matrix[..., start : start + step, :].double() for matrix in (base, target))
        total += (theirs - ours).square().sum((-2, -1))
        inner += (theirs * ours).sum((-2, -1))
    return total, inner


# ---------------------------------------------------------------- base and target: vectors


def overlaps(base: torch.Tensor, target: torch.Tensor) -> dict:
    """How similar the singular vectors of B and C are, on the output side ("out", U) and on the input side ("in", V).

    O = |U_B' U_C| [M, M]. For each side `diagonal` (its mean), `row_max` (the mean of the row maxima) and `subspace`
    {k: ||U_B,k' U_C,k||_F^2 / k} of the first k = 1, 4, 16, .. vectors, each {"value", "floor"}: `floor` is the value
    for random subspaces of that space. There is no signed diagonal, as signs are arbitrary. Vectors of neighbouring
    singular values mix at the slightest change, so only subspaces are informative about these. Vectors of singular
    values that are 0 (dead rows) are arbitrary and left out; `vectors` is the number of the others.
    """
    pair = [torch.linalg.svd(matrix.float(), full_matrices=False) for matrix in (base, target)]
    n = max(1, min(int((s > 10 * ZERO * s[0]).sum()) for _, s, _ in pair))
    sides = {"out": _overlap(*(u[:, :n] for u, _, _ in pair)), "in": _overlap(*(vh[:n].mT for _, _, vh in pair))}
    return {"vectors": n} | sides


def _overlap(ours: torch.Tensor, theirs: torch.Tensor) -> dict:
    """The numbers of `overlaps` for one side, from the vectors [d, M] of both."""
    overlap, (d, n) = (ours.mT @ theirs).abs().double(), ours.shape
    row = {"diagonal": {"value": float(overlap.diagonal().mean()), "floor": (2 / (math.pi * d)) ** 0.5}}
    row["row_max"] = {"value": float(overlap.amax(1).mean()), "floor": largest_coordinate(n, d)}
    sizes = [4**i for i in range(n.bit_length()) if 4**i <= max(1, n // 4)]
    row["subspace"] = {
        str(k): {"value": float(overlap[:k, :k].square().sum() / k), "floor": k / d} for k in sizes
    }  # fmt: skip
    return row


def largest_coordinate(n: int, d: int) -> float:
    """The expected maximum of `n` absolute coordinates, each of another random unit vector in `d` dimensions."""
    from scipy import special

    if d == 1:
        return 1.0
    x = torch.linspace(0, 1, 20001, dtype=torch.float64)
    below = torch.from_numpy(special.betainc(0.5, (d - 1) / 2, x.square().numpy()))
    return float(torch.trapezoid(1 - below**n, x))
