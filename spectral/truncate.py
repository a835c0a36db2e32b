"""How much of the update of continued pre-training can be cut off: truncation by SVD, DARE, pruning by magnitude.

The update dW = C - B of every projection is cut to the largest ceil((1 - q) M) of its M singular values; q* is the
largest q whose score is not worse than the checkpoint's by more than one standard error. Any matrix can be truncated to
some degree, so the curve is compared with one of the same update without its spectrum [ours]: at each q it keeps, in
random directions, as much energy as a random update of equal norm keeps at q (README).

In:   B and RUN (default: the study's).
Out:  OUT (default: the study's spectral/truncate.json): curves, energy kept, ranks, q*; .pt (every sentence) and a
      figure. During the run OUT.bases holds the singular directions, M x M float32 per matrix.

A killed run resumes with the next model. On several GPUs: accelerate launch spectral/truncate.py ...

Full: python spectral/truncate.py --base B --run RUN --base-lang eng_Latn --target-lang swh_Latn --source flores --output truncate.json
Tiny: python spectral/truncate.py --study demo/tiny.yaml --shares 0.5 --draws 1 --measures nll
"""  # noqa: E501

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass, replace
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, figures, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.base.processes import Process
from cpt_utils.checkpoints import folders, tensors
from cpt_utils.interventions import in_memory, surgery
from cpt_utils.interventions.condition import digest

curves, updates, spectra = (cli.sibling(f"spectral/{name}.py") for name in ("curves", "updates", "spectra"))

SCHEMA = "truncate"
RESULTS = {"truncate": "spectral/truncate.json"}
ASKED = {"truncate": "How much of the update can be cut off before anything is lost: is it of low rank?"}
CAPTIONS = {
    "truncate": """Part IV: 4. Truncation
        Scores of the checkpoint when a share q of its update is cut off: the smallest singular values of every matrix
        (SVD); the same update cut in random directions to the energy that a random update of equal norm would keep (as
        if random, the control of claim D5); entries dropped at random and the others scaled up (DARE); the smallest
        entries dropped (magnitude). Last panel: the share of the update's energy (squared norm) that is kept. Shaded:
        the range of the draws, often narrower than the line; arrows at the edge: points beyond it. Rings: q*, the
        largest q not worse than the checkpoint by more than one standard error of the paired difference. This error is
        small: q* can be 0 even if most of the gain survives large cuts. Embeddings and head stay the checkpoint's, so
        q = 1 is not the base. Low rank here refers to what a cut costs compared with a random update; the effective
        rank, which counts every direction by its energy, may still be high.""",
}
DRAWS = 2  # per random curve
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
# Curve -> how it is drawn; those in DRAWN are random and have several draws.
LOOKS = {
    "svd": {"label": "SVD", "color": figures.PALETTE[0], "marker": "o"},
    "as_random": {"label": "as if random", "color": figures.colour("random"), "marker": "x", "linestyle": "--"},
    "dare": {"label": "DARE", "color": figures.PALETTE[1], "marker": "s", "linestyle": ":"},
    "magnitude": {"label": "magnitude", "color": figures.PALETTE[2], "marker": "^", "linestyle": "-."},
}
DRAWN = ("as_random", "dare")


# ---------------------------------------------------------------- the method


def kept(q: float, n: int) -> int:
    """ceil((1 - q) n), rounded first so that (1 - .7) x 10 gives 3."""
    return math.ceil(round((1 - q) * n, 9))


def projected(base: torch.Tensor, target: torch.Tensor, chosen: torch.Tensor, keep: bool, device="cpu") -> torch.Tensor:
    """B + P (C - B) with `keep`, else C - P (C - B): P projects the smaller side of the matrix onto the orthonormal
    columns `chosen` [M, k]. Without columns the result is B, or C, bit for bit, unlike B + (C - B)."""
    if not chosen.shape[1]:
        return base.to(target.dtype) if keep else target
    b, c = updates.wide(base, target, device)
    across = b.shape[0] > b.shape[1]
    update, chosen = (c - b).T if across else c - b, chosen.to(b)
    part = chosen @ (chosen.T @ update)
    part = part.T if across else part
    return (b + part if keep else c - part).to(base.device, target.dtype)


@dataclass(frozen=True)
class Svd:
    """The update of the matrix `name`, cut to its largest singular values."""

    q: float
    name: str
    bases: InitVar[Bases]

    def __post_init__(self, bases: Bases) -> None:
        object.__setattr__(self, "found", bases)  # no field, so it does not enter the request

    def __call__(self, base: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        basis = self.found.of(self.name)["basis"]
        m, k = len(basis), kept(self.q, len(basis))
        keep = 2 * k <= m  # compute the smaller part: what remains of C as it is has no rounding error
        return projected(base, target, basis[:, :k] if keep else basis[:, k:], keep, self.found.device)


@dataclass(frozen=True)
class AsRandom(Svd):
    """The same update in a random subspace, large enough to hold the share of the energy that a random update of equal
    norm has in as many of its largest singular values as `Svd` keeps."""

    seed: int = 42
    draw: int = 0

    def __call__(self, base: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        stored = self.found.of(self.name)
        m = len(stored["energy"])
        k = as_random_rank(stored, kept(self.q, m))
        keep = 2 * k <= m  # the dropped subspace is as random as the kept one
        generator = torch.Generator().manual_seed(updates.draw_seed(self.seed, self.name, "subspace", self.draw))
        drawn = torch.randn(k if keep else m - k, m, generator=generator).T  # larger subspaces contain smaller ones
        return projected(base, target, torch.linalg.qr(drawn.to(self.found.device))[0], keep, self.found.device)


@dataclass(frozen=True)
class Dare:
    """The update with each entry dropped with probability q, the others scaled by 1 / (1 - q) (Yu et al. 2024)."""

    q: float
    name: str
    seed: int
    draw: int

    def __call__(self, base: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(updates.draw_seed(self.seed, self.name, "dare", self.draw))
        b, c = updates.wide(base, target)
        stays = torch.rand(b.shape, generator=generator) >= self.q
        return torch.where(stays, b + (c - b) / (1 - self.q), b).to(target.dtype)


def magnitude(base: torch.Tensor, target: torch.Tensor, q: float) -> torch.Tensor:
    """C in the ceil((1 - q) n) of the n entries that the update changes most, B in the others."""
    b, c = updates.wide(base, target)
    stays = torch.zeros(b.numel(), dtype=torch.bool)
    stays[(c - b).abs().flatten().topk(kept(q, b.numel()), sorted=False).indices] = True
    return torch.where(stays.view(b.shape), target, base.to(target.dtype))


def as_random_rank(found: dict, k: int) -> int:
    """How many of M random directions hold the share of an update's energy that a random update of equal norm has in
    its k largest singular values (the strictest of `updates.NULLS`, the one with the largest share)."""
    m = len(found["energy"])
    shares = [float(null[:k].sum() / null.sum()) for null in found["nulls"] if null.sum() > 0]
    return round(max(shares) * m) if shares and 0 < k < m else k


# ---------------------------------------------------------------- the matrices


@dataclass(frozen=True)
class Piece:
    """A matrix that is cut on its own: a projection of a layer or an expert, or one head's part of it."""

    name: str
    projection: str
    edit: surgery.Edit

    def read(self, pair: surgery.Pair) -> tuple[torch.Tensor, torch.Tensor]:
        """B's and C's matrix, as stored on disk."""
        held = pair.base.get(self.edit.base_tensor), pair.target.get(self.edit.tensor)
        held = [tensor if self.edit.expert is None else tensor[self.edit.expert] for tensor in held]
        return tuple(archs.take(tensor, self.edit.dim, self.edit.index) for tensor in held)


def pieces_of(pair: surgery.Pair, by_head: bool = False, embeddings: bool = False) -> list[Piece]:
    """Every matrix of every layer; with `by_head` attention is split by head, and with `embeddings` these and the head
    are included. Routers, norms and biases are not.

    Raises:
        InputError: the models differ in the shape of a tensor.
    """
    arch, config, names, pieces = pair.arch, pair.config, set(pair.target.names()), []

    def add(name: str, projection: str, parts: Iterable[archs.WeightSlice]) -> None:
        parts = list(parts)
        for number, part in enumerate(parts):
            edit = replace(pair.edit(part.tensor), dim=part.dim, index=part.index, expert=part.expert)
            pieces.append(Piece(name + f".{number}" * (len(parts) > 1), projection, edit))

    for layer in range(pair.n_layers):
        counts = arch.head_counts(config, layer)
        for projection in arch.projections(config, layer):
            name, by_query = f"layer_{layer}.{projection}", projection in ("q_proj", "o_proj")
            parts = [p for p in arch.parts(config, layer, projection, names, pair.target.shape) if p.role == "weight"]
            heads = range(counts[not by_query]) if by_head and projection in archs.ATTENTION else ()
            cut = set()
            for head in heads:
                of_head = arch.head_parts(config, layer, projection, [head], names, pair.target.shape, by_query)
                of_head = [part for part in of_head if part.role == "weight"]
                cut |= {part.tensor for part in of_head}
                add(f"{name}.head_{head}", projection, of_head)
            add(name, projection, (part for part in parts if part.tensor not in cut))
    outer = arch.embedding_tensors(names) if embeddings else ()
    outer = [name for name in outer if len(pair.target.shape(name)) == 2]
    return pieces + [Piece(updates.drawn_as(pair, name), "embeddings", pair.edit(name)) for name in outer]


class Bases:
    """The singular directions of the updates of all pieces, computed once for all q and kept on disk until all is
    measured: [M, M] on the smaller side of each, with the energies (squared singular values) of the update and of the
    random ones of equal norm.

    They are the eigenvectors of the update times its transpose in float64, which costs a third of a full SVD and
    resolves singular values down to 1e-8 of the largest. Several processes start at different pieces, and skip those
    that exist already.
    """

    def __init__(self, pair: surgery.Pair, pieces: Sequence[Piece], folder: Path, seed: int, process: Process):
        self.pair, self.pieces, self.folder, self.process, self.seed = pair, pieces, folder, process, seed
        self.device, self.ready = process.device, False
        models = [surgery.identity(ref) for ref in (pair.base_ref, pair.target_ref)]
        self.of_what = digest([*models, seed, updates.NULLS])

    def of(self, name: str) -> dict:
        """`basis` [M, M] float32, largest first; `energy` [M] and `nulls` [null, M] float64; `rounding`: the energy of
        the error from rounding to C's dtype half-way between B and C."""
        if not self.ready:
            self.prepare()
        return results.read_tensors(self.folder / f"{name}.pt")

    def prepare(self) -> None:
        """Compute the missing ones."""
        if not self.folder.is_dir():
            needed = sum(4 * min(piece.read(self.pair)[1].shape) ** 2 for piece in self.pieces)
            folders.refuse_full_disk(self.folder, needed)
        first = self.process.rank * len(self.pieces) // self.process.world
        updates.warn_if_not_one_run(self.pair.base_ref, self.pair.target_ref)
        for piece in cli.progress([*self.pieces[first:], *self.pieces[:first]], desc="singular directions"):
            path = self.folder / f"{piece.name}.pt"
            if not path.is_file() or results.read_tensors(path).get("of") != self.of_what:
                results.write_tensors(path, self.computed(piece) | {"of": self.of_what})
        self.ready = True

    def computed(self, piece: Piece) -> dict:
        stored = piece.read(self.pair)
        base, target = updates.wide(*stored, self.device)
        update = target - base
        if not tensors.is_finite(update):
            raise InputError(f"{piece.edit.tensor}: NaN or infinity in base or target; copy the models again")
        energy, basis = torch.linalg.eigh(spectra.gram(update))
        nulls = []
        for kind in updates.NULLS:
            null = updates.nulls(update, kind, updates.draw_seed(self.seed, piece.name, kind))
            nulls.append(torch.linalg.eigvalsh(spectra.gram(null)).flip(0).clamp(min=0).cpu())
        half = base + update / 2
        rounding = float((half.to(stored[1].dtype).to(half.dtype) - half).double().square().sum())
        energy, basis = energy.flip(0).clamp(min=0).cpu(), basis.flip(1).float().cpu().contiguous()
        return {"basis": basis, "energy": energy, "nulls": torch.stack(nulls), "rounding": rounding}

    def remove(self) -> None:
        if self.process.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)


# ---------------------------------------------------------------- what is measured


def recipe(
    pair: surgery.Pair, pieces: Sequence[Piece], curve: str, q: float, bases: Bases, seed: int, draw: int = 0
) -> surgery.Recipe:
    """The checkpoint with the update of every piece cut; at q = 1 every piece is B's."""

    def function(name: str):
        if curve == "magnitude":
            return functools.partial(magnitude, q=q)
        if curve == "dare":
            return Dare(q, name, seed, draw)
        return Svd(q, name, bases) if curve == "svd" else AsRandom(q, name, bases, seed, draw)

    edits = [replace(piece.edit, function=None if q == 1 else function(piece.name)) for piece in pieces if q]
    facts = {"curve": curve, "q": q} | ({"draw": draw, "seed": seed} if curve in DRAWN else {})
    title = f"{len(pieces)} matrices with {q:.0%} of the update cut ({LOOKS[curve]['label']})"
    return surgery.Recipe(title, facts if 0 < q < 1 else {"q": q}, tuple(edits))


def points_of(pair, pieces: Sequence[Piece], chosen: Sequence[str], shares, bases: Bases, seed: int, draws: int):
    """Every curve from the checkpoint itself to B in all pieces."""
    swapper, points = in_memory.Swapper(pair, cache_bytes=0), []
    everything = swapper.condition("cut 1", recipe(pair, pieces, "svd", 1, bases, seed))
    for curve in chosen:
        for draw in range(draws if curve in DRAWN else 1):
            points.append(curves.Point(curve, 0.0, curves.TARGET, draw))
            for q in shares:
                name = f"{curve} {q:g}" + f" ({draw})" * (curve in DRAWN)
                made = recipe(pair, pieces, curve, q, bases, seed, draw)
                points.append(curves.Point(curve, q, swapper.condition(name, made), draw))
            points.append(curves.Point(curve, 1.0, everything, draw))
    return points


def energies(bases: Bases, shares: Sequence[float]) -> dict:
    """For all pieces together: the share of the energy kept at each of `shares` by the update, by each random update of
    equal norm and by the strictest of them; by projection the share of the singular values that holds 90 %; and the
    error from rounding to the checkpoint's dtype, as a share of the energy."""
    names, total, rounding, ranks = ("update", *updates.NULLS, "strictest"), 0.0, 0.0, {}
    sums = {name: [0.0] * len(shares) for name in names}
    for piece in {piece.name: piece for piece in bases.pieces}.values():  # a tied head counts once
        stored = bases.of(piece.name)
        rows = dict(zip(("update", *updates.NULLS), [stored["energy"], *stored["nulls"]], strict=True))
        m, whole = len(stored["energy"]), float(stored["energy"].sum())
        total, rounding = total + whole, rounding + stored["rounding"]
        if not whole:
            continue
        held = {name: (row.cumsum(0) / row.sum()).tolist() for name, row in rows.items()}
        for name, shares_held in held.items():
            needed = next(i for i, share in enumerate(shares_held, 1) if share >= 0.9 - 1e-12)
            ranks.setdefault(piece.projection, {}).setdefault(name, []).append(needed / m)
        for i, q in enumerate(shares):
            k = kept(q, m)
            at_q = {name: row[k - 1] if k else 0.0 for name, row in held.items()}
            at_q["strictest"] = max(at_q[name] for name in updates.NULLS)
            for name, share in at_q.items():
                sums[name][i] += share * whole
    means = {kind: {name: sum(values) / len(values) for name, values in row.items()} for kind, row in ranks.items()}
    kept_shares = {name: [energy / total if total else None for energy in row] for name, row in sums.items()}
    return {"shares": list(shares), **kept_shares, "rank_90": means, "rounding": rounding / total if total else None}


def at_equal_energy(energy: dict, q: float, places: Iterable[float]) -> float:
    """The largest of the shares `places` at which the strictest random update keeps at least the energy that the update
    keeps at q."""
    update, null = (dict(zip(energy["shares"], energy[name], strict=True)) for name in ("update", "strictest"))
    return max(x for x in places if x == 0 or null[x] >= update[q] - 1e-12)


def summarise(records: list[dict], points: list, bases: Bases, seed: int) -> dict:
    """The result: curves, energy and ranks, q* at equal energy, sizes."""
    both = {"svd", "as_random"} <= {point.curve for point in points}
    result = curves.summary(points, records, seed, {"svd": ["as_random"]} if both else {})
    shares = sorted({point.at for point in points})
    energy = energies(bases, sorted({*shares, *(i / 100 for i in range(101))}))
    if energy["rounding"] is None:
        base, target = bases.pair.base_ref.spec, bases.pair.target_ref.spec
        raise InputError(f"{base} and {target} are equal in all matrices to be cut: there is no update")
    curves.warn_if_coarse(bases.pair, energy["rounding"], "the update, at every q below 1")
    largest = result["largest"].get("svd", {})
    result["at_equal_energy"] = {
        name: at_equal_energy(energy, row["at"]["value"], shares) for name, row in largest.items()
    }
    moved, total = bases.pair.share(surgery.Recipe("", {}, tuple(piece.edit for piece in bases.pieces)))
    return result | {"energy": energy, "matrices": len(bases.pieces), "parameters": moved, "of": total}


def say(payload: dict) -> None:
    curves.say(payload, {name: look["label"] for name, look in LOOKS.items()}, "q*")


def draw(path: Path, payload: dict) -> None:
    """The curves of every measure, and the energy kept."""

    def energy(axis) -> None:
        rows = payload["energy"]
        for name, look in (("update", LOOKS["svd"]), ("strictest", LOOKS["as_random"])):
            axis.plot(rows["shares"], rows[name], color=look["color"], linestyle=look.get("linestyle", "-"))
        axis.set_ylabel("share of the update's\nenergy kept")

    curves.draw(path, payload, LOOKS, "share q of the update cut off", more=[energy])


# ---------------------------------------------------------------- the command


def share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise ValueError
    return value


share.__name__ = "a share between 0 and 1"  # its name in argparse errors


def build_parser():
    p = curves.parser(__doc__, "spectral/truncate.json")
    g = p.add_argument_group("what is cut")
    text = "shares q to cut; default: the study's spectral.truncate.shares, else .1 to .9 and .95"
    g.add_argument("--shares", nargs="+", type=share, metavar="Q", help=text)
    text = "default: the study's spectral.truncate.curves, else all"
    g.add_argument("--curves", nargs="+", choices=tuple(LOOKS), help=text)
    text = f"draws of each random curve; default: the study's spectral.truncate.draws, else {DRAWS}"
    g.add_argument("--draws", type=cli.positive, metavar="N", help=text)
    g.add_argument("--by-head", action="store_true", help="cut every head's part of attention separately")
    g.add_argument("--embeddings", action="store_true", help="cut embeddings and head as well")
    text = "measure nothing: write the model of one point as a folder (svd 0.5 cut/)"
    g.add_argument("--write", nargs=3, metavar=("CURVE", "Q", "FOLDER"), help=text)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    how = ["by-head"] * args.by_head + ["embeddings"] * args.embeddings
    with curves.opened(args, "truncate", *how) as (study, output, pair):
        pieces = pieces_of(pair, args.by_head, args.embeddings)
        # --write uses a folder of its own, to leave that of a measurement under way alone.
        folder = (Path(args.write[2]) if args.write else output).with_suffix(".bases")
        if args.write:
            curve, q, out = args.write
            if curve not in LOOKS:
                raise InputError(f"--write {curve}: no such curve; the curves are {', '.join(LOOKS)}")
            bases = Bases(pair, pieces, folder, study.seed, curves.alone("writing a model folder", args))
            made = recipe(pair, pieces, curve, curves.number("--write", q, 0, 1), bases, study.seed)
            curves.write(pair, made, out, args, study)
            bases.remove()
            return
        trial = curves.trial_of(args, study, pair)
        bases = Bases(pair, pieces, folder, study.seed, trial.process)
        shares = sorted({*study.value(args.shares, "--shares", "spectral.truncate.shares", SHARES)})
        names = study.value(args.curves, "--curves", "spectral.truncate.curves", tuple(LOOKS))
        draws = int(study.value(args.draws, "--draws", "spectral.truncate.draws", DRAWS))
        points = points_of(pair, pieces, names, shares, bases, study.seed, draws)
        by = {"by": "head" if args.by_head else "matrix", "embeddings": args.embeddings, "draws": draws}
        summarised = functools.partial(summarise, points=points, bases=bases, seed=study.seed)
        curves.measure(trial, output, points, summarised, draw, by, SCHEMA, say)
        bases.remove()


if __name__ == "__main__":
    cli.run(main)
