"""Does a run change the singular values of its base's weight matrices, or rotate their singular vectors?

For each weight matrix of every layer, whole and by head: singular values, norms, ranks, Marchenko-Pastur edges and the
power law of B, C and dW = C - B; and the share of ||dW||^2 that the singular values account for (`value_share`, exact).
For any small update that is unrelated to B this share is about 1 / max(out, in), so it is compared with that of random
updates of equal norm: Gaussian, with the update's entries permuted, or with their signs redrawn.

In:   B and RUN (default: the study's). Reads weights only; needs no text and no GPU.
Out:  OUT (default: the study's spectral/spectrum.json): `matrices`, a row for each with `steps`, and `pooled` over all of
      them, by step; .pt with the singular values; a figure.

A killed run resumes with the next matrix. On several GPUs: accelerate launch spectral/spectrum.py ...

Full: python spectral/spectrum.py --base meta-llama/Llama-2-7b-hf --run runs/eus --output spectrum.json
Tiny: python spectral/spectrum.py --study demo/tiny.yaml
"""  # noqa: E501

from __future__ import annotations

import base64
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, journal, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np, torch
from cpt_utils.base.processes import Process
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import beside, refs
from cpt_utils.measures import matrices as plans
from cpt_utils.measures.matrices import Side

compared = cli.sibling("weight-diff/compared.py")
updates, spectra = cli.sibling("spectral/updates.py"), cli.sibling("spectral/spectra.py")
figure = cli.sibling("spectral/spectrum_figure.py")

SCHEMA = "spectrum"
RESULTS = {"spectrum": "spectral/spectrum.json"}
ASKED = {"spectrum": "Does training change the singular values of the weights, or rotate their singular vectors?"}
CAPTIONS = {
    "spectrum": """Part IV: 1. Values or vectors
        Eigenvalues of the base, the last checkpoint and their difference in three projections of the middle layer, with
        the upper Marchenko-Pastur edge of each: a matrix of independent entries of that size has none beyond it. In the
        middle: the share of the change that lies in the singular values, for every projection and layer, and its range
        for random changes of the same norm, which is itself far below 1: claim D1 asks on which side of this range the
        change lies. At the bottom, if there are several checkpoints: that share and the effective rank of the change
        over training.""",
}
SIDES = {**dict.fromkeys(archs.ATTENTION, "head"), **dict.fromkeys(archs.FFN, "neuron"), archs.ROUTER: "expert"}
INPUTS = ("o_proj", "down_proj")  # whose inputs are the heads or neurons
TOLD = 0.1  # a rescaling of the base above this share of the change in the singular values is reported


# ---------------------------------------------------------------- the method


@dataclass
class Measured:
    """How one base and its run are measured.

    Attributes:
        draws: random updates of each kind for the run's last checkpoint; the others get one Gaussian draw.
        overlaps: layers whose singular vectors are compared as well, at the last checkpoint.
        values: the base's singular values by the name of the matrix, computed once for all checkpoints.
    """

    last: int
    draws: int
    overlaps: list[int]
    seed: int
    device: torch.device
    values: dict[str, torch.Tensor] = field(default_factory=dict)

    def place(self, sides: list[Side], place: updates.Place) -> dict:
        """All numbers of one matrix, in the base and in some checkpoints of its run."""
        stored = zip(sides, place.parts, strict=True)
        wide = any(side.stored.dtype(part.tensor) == torch.float64 for side, part in stored)
        read = partial(updates.read, dtype=torch.float64 if wide else torch.float32, device=self.device)
        base = spectra.Spectrum(read(sides[0], place.parts[0]))
        if place.name in self.values:
            base.values = self.values[place.name]
        self.values[place.name] = base.values
        row = {"name": place.name, "layer": place.layer, "projection": place.projection, "expert": place.expert}
        row |= {"shape": list(base.shape), "base": spectra.described(base), "steps": {}}
        packed = {"base": _packed(base.values)}
        for number, side in enumerate(sides[1:], 1):
            step = str(side.ref.step)
            target = spectra.Spectrum(read(side, place.parts[number]))
            update = spectra.Spectrum(target.matrix - base.matrix)
            row["steps"][step] = self.pair(place, base, target, update, side.ref.step)
            heads = [_heads(model, place.parts[i], place, read) for model, i in ((sides[0], 0), (side, number))]
            if None not in heads:
                if heads[0].shape != heads[1].shape:
                    raise InputError(
                        f"layer {place.layer}: {len(heads[0])} heads in {place.projection} of {sides[0].spec}, "
                        f"{len(heads[1])} in {side.spec}; heads can only be compared if both models have as many"
                    )
                row["steps"][step]["heads"] = self.heads(place, *heads, side.ref.step)
            packed |= {f"{step}.target": _packed(target.values), f"{step}.update": _packed(update.values)}
        return {"row": row, "values": packed}

    def pair(self, place: updates.Place, base, target, update, step: int) -> dict:
        """The numbers of one matrix at one checkpoint, from the spectra of B, C and dW."""
        share = spectra.value_share(base, target)
        sums = {"base_sq": updates.norm(base.matrix) ** 2, "target_sq": updates.norm(target.matrix) ** 2}
        sums = {key: float(value) for key, value in sums.items()}
        total, value = float(share.total), float(share.value)
        size = (sums["base_sq"] * sums["target_sq"]) ** 0.5
        # Scaling B moves all singular values and rotates no vector. Weight decay does so, whatever is learnt.
        inner = (sums["target_sq"] - sums["base_sq"] - total) / 2  # <dW, B>
        scale = inner / sums["base_sq"] if sums["base_sq"] else 0.0
        unscaled = target.values.double() - abs(1 + scale) * base.values.double()
        row = {
            "target": spectra.described(target), "update": spectra.described(update), "update_sq": total, **sums,
            "cosine": (sums["base_sq"] + sums["target_sq"] - total) / 2 / size if size else None,
            "relative": (total / sums["base_sq"]) ** 0.5 if sums["base_sq"] else None,
            "shift": (value / sums["base_sq"]) ** 0.5 if sums["base_sq"] else None,
            "value_sq": value, "turned_sq": float(share.turned), "value_share": value / total if total else None,
            "identity_gap": float(share.gap) if total else None, "by_svd": share.by_svd,
            "scale": scale, "scale_sq": scale * inner, "unscaled_value_sq": float(unscaled.square().sum()),
        }  # fmt: skip
        if total:
            row["nulls"] = self.nulls(place, base, update, row["value_share"], step)
        if step == self.last and place.layer in self.overlaps:
            names, by_side = sides_of(place), spectra.overlaps(base.matrix, target.matrix)
            row["overlaps"] = {names.get(key, key): value for key, value in by_side.items()}
        return row

    def kinds(self, step: int) -> dict[str, int]:
        """How many random updates of each kind a checkpoint is compared with."""
        return dict.fromkeys(updates.NULLS, self.draws) if step == self.last else {updates.NULLS[0]: 1}

    def drawn(self, place: updates.Place, update: torch.Tensor, kind: str, step: int, draw: int, *what) -> torch.Tensor:
        seed = updates.draw_seed(self.seed, place.name, step, kind, draw, *what)
        return updates.nulls(update, kind, seed)

    def nulls(self, place: updates.Place, base, update, own: float, step: int) -> dict:
        """Value shares of random updates, compared with the update's `own`; effective rank of the first draw."""
        by_kind = {}
        for kind, draws in self.kinds(step).items():
            shares, rank = [], None
            for draw in range(draws):
                drawn = self.drawn(place, update.matrix, kind, step, draw)
                if rank is None:
                    rank = float(spectra.effective_rank(spectra.Spectrum(drawn).values))
                shares.append(float(spectra.value_share(base, spectra.Spectrum(base.matrix + drawn)).share))
            by_kind[kind] = {"value_share": shares, "effective_rank": rank} | ratio(own, shares)
        return by_kind

    def heads(self, place: updates.Place, ours: torch.Tensor, theirs: torch.Tensor, step: int) -> dict:
        """The same for every head, from stacks of slices [heads, out, in]: lists with an entry per head."""
        update, base = theirs - ours, spectra.Spectrum(ours)
        share = spectra.value_share(base, spectra.Spectrum(theirs))
        nulls = {}
        for kind, draws in self.kinds(step).items():
            means = torch.zeros_like(share.total)
            for draw in range(draws):
                drawn = [self.drawn(place, matrix, kind, step, draw, head) for head, matrix in enumerate(update)]
                means += spectra.value_share(base, spectra.Spectrum(ours + torch.stack(drawn))).share / draws
            nulls[kind] = means.tolist()
        sizes = torch.linalg.vector_norm(ours, dim=(-2, -1), dtype=torch.float64)
        return {
            "value_share": share.share.tolist(),
            "nulls": nulls,
            "share_of_update": (share.total / share.total.sum()).tolist(),
            "relative": (share.total.sqrt() / sizes).tolist(),
            "effective_rank": spectra.effective_rank(spectra.Spectrum(update).values).tolist(),
        }


def sides_of(place: updates.Place) -> dict[str, str]:
    """What the outputs ("out") and inputs ("in") of a matrix stand for."""
    inner = SIDES[place.projection]
    if place.piece is not None:  # latent attention: into the latent features, then from there to the heads
        return {"out": inner, "in": "latent"} if place.piece else {"out": "latent", "in": "residual"}
    return {"in": inner, "out": "residual"} if place.projection in INPUTS else {"out": inner, "in": "residual"}


def ratio(own: float, drawn: list[float]) -> dict:
    """`own` over the mean of `drawn`, and over both ends of the 95 % prediction interval of one more draw (t)."""
    from scipy import special

    mean, k = float(np.mean(drawn)), len(drawn)
    row = {"ratio": own / mean if mean else None, "ci_low": None, "ci_high": None}
    if k > 1 and mean:
        half = float(special.stdtrit(k - 1, 0.975) * np.std(drawn, ddof=1) * (1 + 1 / k) ** 0.5)
        row |= {"ci_low": own / (mean + half), "ci_high": own / (mean - half) if mean > half else None}
    return row


def _heads(side: Side, part: archs.WeightSlice, place: updates.Place, read) -> torch.Tensor | None:
    """The slices of a matrix by head [heads, out, in] (query heads of q and o, KV heads of k and v); else None."""
    by_query, slices = place.projection in ("q_proj", "o_proj"), []
    counts = side.arch.head_counts(side.config, place.layer)  # with differential attention fewer than in config.json
    n = counts[not by_query] if place.projection in archs.ATTENTION else 0
    for head in range(n):
        parts = side.arch.head_parts(
            side.config, place.layer, place.projection, [head], side.names, side.stored.shape, by_query
        )
        slices += [each for each in parts if each.role == "weight" and each.tensor == part.tensor]
    return torch.stack([read(side, each, out_dim=part.dim) for each in slices]) if n and len(slices) == n else None


def _packed(values: torch.Tensor) -> str:
    """Singular values as text for the journal: float32, base64."""
    return base64.b64encode(values.float().cpu().numpy().tobytes()).decode()


def _unpacked(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)


# ---------------------------------------------------------------- over all matrices


def pooled(rows: list[dict], step: str) -> dict:
    """All matrices together at one step: shares of the summed ||dW||^2, and medians of ranks and cosines."""
    steps = [row["steps"][step] for row in rows]
    moved = [row for row in steps if row["update_sq"]]
    total, base = (math.fsum(row[key] for row in steps) for key in ("update_sq", "base_sq"))
    value, scaled, unscaled = (
        math.fsum(row[key] for row in moved) for key in ("value_sq", "scale_sq", "unscaled_value_sq")
    )
    rest = total - scaled  # rounding only, if the run does nothing but rescale the base
    result = {
        "matrices": len(steps), "unchanged": len(steps) - len(moved),
        "median_cosine": _median([row["cosine"] for row in steps]),
        "relative": (total / base) ** 0.5 if base else None, "shift": (value / base) ** 0.5 if base else None,
        "value_share": value / total if total else None, "scale_share": scaled / total if total else None,
        "unscaled_value_share": unscaled / rest if rest > 1e-9 * total else None, "nulls": {},
        "identity_gap": max((row["identity_gap"] for row in moved), default=None),
        "effective_rank": _median([row["update"]["effective_rank"] / min(matrix["shape"])
                                   for matrix, row in zip(rows, steps, strict=True) if row["update_sq"]]),
        "stable_rank": _median([row["update"]["stable_rank"] for row in moved]),
    }  # fmt: skip
    for kind in moved[0]["nulls"] if moved else ():
        pairs = [(row, row["nulls"][kind]) for row in moved]
        weights = [row["update_sq"] / total for row in moved]
        draws = [math.fsum(w * s for w, s in zip(weights, draw, strict=True))
                 for draw in zip(*(null["value_share"] for _, null in pairs), strict=True)]  # fmt: skip
        below = sum(row["value_share"] < min(null["value_share"]) for row, null in pairs)
        ranks = [row["update"]["effective_rank"] / null["effective_rank"] for row, null in pairs]
        result["nulls"][kind] = {"value_share": draws, **ratio(result["value_share"], draws), "matrices_below": below}
        result["nulls"][kind]["effective_rank_ratio"] = _median(ranks)
    return result


def _median(values: list) -> float | None:
    values = [value for value in values if value is not None and math.isfinite(value)]
    return float(np.median(values)) if values else None


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("--base", "--base-model", metavar="B", help="base model; default: the study's base")
    add("--run", nargs="+", metavar="RUN", help="a run, one checkpoint, or a list; default: the study's run")
    add("--output", metavar="OUT", help="JSON to write; default: the study's spectral/spectrum.json")
    add("--device", default="auto", help="auto (CUDA if available, else CPU), cpu, cuda, cuda:1; default auto")
    text = "random updates of each kind for the last checkpoint; default 3"
    add("--draws", type=cli.positive, default=3, metavar="N", help=text)
    text = "layers whose singular vectors are compared: numbers, all or none; default: first, middle and last"
    add("--overlaps", nargs="+", metavar="L", help=text)
    add("--limit", type=cli.positive, metavar="N", help="only the first N layers (for a trial; the result is marked)")
    cli.add_run_flags(p, drop=True)
    return p


def chosen(words: list[str] | None, layers: list[int]) -> list[int]:
    """The measured layers that --overlaps asks for.

    Raises:
        InputError: an unknown word, or a layer that is not measured.
    """
    if words is None:
        return sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    if words in (["all"], ["none"]):
        return layers if words == ["all"] else []
    wrong = next((word for word in words if not word.isdecimal() or int(word) not in layers), None)
    if wrong is not None:
        raise InputError(f"--overlaps {wrong}: give layers from {layers[0]} to {layers[-1]}, or all, or none")
    return sorted({int(word) for word in words})


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    base, run = study.value(args.base, "--base", "base"), study.value(args.run, "--run", "run")
    variant = beside.name(study, args.base, args.run, args.steps, args.limit)
    output = study.output(args.output, "--output", "spectrum", variant)
    models = compared.Compared(refs.model(base), run, refs.run(run), refs.run(run, args.steps), args.limit)
    facts, process = models.facts(), Process(args.device)
    layers = list(range(facts["n_layers"]))[: args.limit]
    overlaps = chosen(args.overlaps, layers)
    request = {"models": facts["models"], "layers": len(layers), "draws": args.draws, "overlaps": overlaps}
    request |= {"seed": study.seed, "device": process.device.type}
    partial_file = output.with_name(output.stem + ".partial.jsonl")
    kept = results.finished(output, SCHEMA, request, "another --output", args.overwrite)
    process.wait()  # all must have looked before one of them writes the result
    if kept:
        cli.say(f"{output} is finished, from the same request: kept (--overwrite redoes it)")
        return
    notes = journal.Journal(partial_file, request) if process.is_main else None
    measured = Measured(models.run[-1].step, args.draws, overlaps, study.seed, process.device)
    keys = measure(models, layers, measured, notes, process, args.drop_revisions)
    if notes:
        records = [[notes.done[key] for key in group] for group in zip(*keys, strict=True)]
        write(output, records, models, facts | {"seed": study.seed, "device": process.device.type, "request": request})
        partial_file.unlink(missing_ok=True)


def measure(models, layers: list[int], measured: Measured, notes, process: Process, drop: bool) -> list[list[str]]:
    """Measure what the journal lacks; return the keys of its records by group of checkpoints, in matrix order."""
    by_group = []
    for group in refs.one_at_a_time(models.run, drop, models.base):
        with plans.opened(models.base, group) as sides:
            places = {place.name: place for place in updates.places(sides, layers)}
            steps = ",".join(str(ref.step) for ref in group)
            keys = {f"{name}@{steps}": place for name, place in places.items()}
            journal.complete(
                notes, process, keys, lambda key, sides=sides, keys=keys: measured.place(sides, keys[key]), "matrices"
            )
        by_group.append(list(keys))
    return by_group


def write(output: Path, records: list[list[dict]], models, facts: dict) -> None:
    """Write all outputs, the JSON last; `records`: one for each group of checkpoints, of every matrix."""
    rows, values = [], {}
    for group in records:
        row = group[0]["row"]
        for record in group:
            row["steps"] |= record["row"]["steps"]
            values |= {f"{row['name']}.{key}": _unpacked(text) for key, text in record["values"].items()}
        rows.append(row)
    steps = [str(ref.step) for ref in models.run]
    payload = {"matrices": rows, "pooled": {step: pooled(rows, step) for step in steps}}
    for ref in models.run:
        cosines = [row["steps"][str(ref.step)]["cosine"] for row in rows]
        updates.warn_if_not_one_run(models.base, ref, [cosine for cosine in cosines if cosine is not None])
    payload = results.plain(payload)
    figure.draw(output.with_suffix(""), payload, values)
    results.write_tensors(output.with_suffix(".pt"), values)
    results.write_json(output, payload, results.header(SCHEMA, **facts))
    for step, row in payload["pooled"].items():
        cli.say(f"step {step}: {described(row)}")
    cli.say(f"wrote {output}, {output.with_suffix('.pt')} and the figure {output.with_suffix('.pdf')}")


def described(row: dict) -> str:
    """The result of a checkpoint in one line."""
    if row["value_share"] is None:
        return "nothing changed"
    nulls = []
    for kind, null in row["nulls"].items():
        ends = [null["ci_low"], null["ci_high"]]
        ends = "" if None in ends else " [{:.2f}, {:.2f}]".format(*ends)
        nulls.append(f"{null['ratio']:.2f}{ends} times that of {kind} updates")
    text = (
        f"||dW|| / ||B|| = {row['relative']:.2e}; {row['value_share']:.2e} of the change lies in the singular values, "
    )
    text += ", ".join(nulls)
    rest = row["unscaled_value_share"]
    if row["scale_share"] > TOLD * row["value_share"] and rest is not None:
        text += f"; {row['scale_share']:.2e} of it only scales the base, as weight decay does, and of the rest "
        text += f"{rest:.2e} lies in the singular values"
    return text


if __name__ == "__main__":
    cli.run(main)
