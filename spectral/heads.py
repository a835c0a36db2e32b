"""How much each attention head changed: by layer and head, how unevenly, and whether other runs changed the same ones.

The unit is a KV head with the query heads that share it. Its importance is ||dW|| / ||B|| over its rows of q, k, v and
its columns of o; beside it the root mean square of dW, the importance over the mean of its layer's units, and, with
other runs, what it changed more than in them.

In:   a base model B, and a run of checkpoints C or a single one; with --other runs of the same base on other text.
Out:  OUT (default: the study's spectral/heads.json): `heads` (the last checkpoint's units and their query heads),
      `steps` (how unevenly the update lies, beside updates that know no heads), `runs` (agreement); beside it .pt (sums
      of squares of every checkpoint) and a figure.

Full: python spectral/heads.py --base HuggingFaceTB/SmolLM2-135M --run runs/swh --other fra=runs/fra --output heads.json
Tiny: python spectral/heads.py --study demo/tiny.yaml
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from itertools import combinations

from cpt_utils.architectures import archs
from cpt_utils.base import cli, results, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np, torch
from cpt_utils.base.study import Study, dotted
from cpt_utils.checkpoints import beside, refs
from cpt_utils.measures import matrices
from cpt_utils.measures.matrices import Side

updates, figure = cli.sibling("spectral/updates.py"), cli.sibling("spectral/heads_figure.py")
compared = cli.sibling("weight-diff/compared.py")

SCHEMA = "heads"
RESULTS = {"heads": "spectral/heads.json"}
ASKED = {"heads": "Is the change of attention carried by a few heads?"}
CAPTIONS = {
    "heads": """Part IV: 2. Heads
        How much each attention head changed, by layer: units (a KV head with the query heads that share it) and, where
        several share one, the query heads alone. Right: the share of the update in the units that changed most, over
        the number of units, and what it would be if the features of a layer lay in its heads by chance (band: 95 % of
        permutations), and if all heads of a layer had changed in proportion to their size (dotted). Claim D2 is decided
        by the distance from the permutations at the top 10 % of the units, rounded up (the dot). The band is often
        narrower than the line.""",
}
KINDS, OF_QUERIES = ("relative", "rms", "per_layer"), ("q_proj", "o_proj")
TOP, DRAWS = 0.1, 1000


# ---------------------------------------------------------------- the sums


@dataclass(frozen=True)
class Squares:
    """Sums of squares over one projection by feature of its heads: a row of q, k or v, a column of o.

    Attributes:
        update, base: of dW and of B, float64 [heads, features of a head]; the heads of k and v are units.
        entries: weights of one head.
    """

    update: np.ndarray
    base: np.ndarray
    entries: int

    @property
    def sums(self) -> np.ndarray:
        """Of each head `update, base, entries`: [3, heads]."""
        return np.stack([self.update.sum(1), self.base.sum(1), np.full(len(self.update), float(self.entries))])


@dataclass(frozen=True)
class Layer:
    """The heads of one layer, and what they have of each projection that it has; `units` as in `Arch.head_counts`."""

    heads: int
    units: int
    of: dict[str, Squares]

    @property
    def by_unit(self) -> np.ndarray:
        """Over all that a unit has: [3, units]."""
        return sum(each.sums.reshape(3, self.units, -1).sum(2) for each in self.of.values())

    @property
    def by_query(self) -> np.ndarray:
        """Over what a query head has alone, its rows of q and columns of o: [3, heads]."""
        return sum(self.of[name].sums for name in OF_QUERIES if name in self.of)


Heads = dict[int, Layer]  # of the layers that have attention


def measured(
    base: refs.ModelRef, checkpoints: list[refs.ModelRef], device: torch.device | str = "cpu"
) -> tuple[dict[int, Heads], dict[int, list[float]]]:
    """Of each checkpoint, by step, the sums of its heads, and the cosines of B and C by projection; one matrix of each
    model in memory. Differences are taken in float32 (see `updates.read`) and summed in float64.

    Raises:
        InputError: another architecture or shape, missing or damaged weights, or a model without attention.
    """
    found: dict[int, Heads] = {ref.step: {} for ref in checkpoints}
    cosines: dict[int, list[float]] = {ref.step: [] for ref in checkpoints}
    with matrices.opened(base, checkpoints) as sides:
        plan, one = matrices.plan(sides, archs.ATTENTION, (), details=True), sides[0]  # shapes are checked there
        for number, side in enumerate(sides):
            side.stored.fetch({matrix.names[number] for matrix in plan})
        for layer in cli.progress(range(one.n_layers), desc="heads", unit="layer"):
            heads, units = _counts(sides, layer)
            if not units:
                continue
            for step in found:
                found[step][layer] = Layer(heads, units, {})
            for name in one.projections(layer, archs.ATTENTION):
                for step, (squares, cosine) in zip(found, _projection(sides, layer, name, device), strict=True):
                    found[step][layer].of[name] = squares
                    cosines[step] += [cosine] if math.isfinite(cosine) else []
    if not any(found.values()):
        raise InputError(f"{base.spec} has no attention, and no heads")
    return found, cosines


def _counts(sides: list[Side], layer: int) -> tuple[int, int]:
    """Query heads and units of a layer, of all sides alike; matrices of one shape may be cut into other heads."""
    (one, found), *others = [(side, side.arch.head_counts(side.config, layer)) for side in sides]
    for other, counts in others:
        if counts != found:
            raise InputError(
                f"layer {layer}: {found[0]} query heads in {found[1]} units in {one.spec}, {counts[0]} in {counts[1]} "
                f"in {other.spec}; heads can be compared where both have as many"
            )
    return found


def _projection(sides: list[Side], layer: int, name: str, device) -> list[tuple[Squares, float]]:
    """The sums of one projection of every checkpoint, and the cosine of B and C in it (NaN where one is zeros)."""
    heads, units = sides[0].arch.head_counts(sides[0].config, layer)
    n = heads if name in OF_QUERIES else units
    halves = 2 if sides[0].arch.differential and name != "o_proj" else 1  # then a head has a stretch of either half

    def by_head(norms: torch.Tensor) -> np.ndarray:
        return (norms**2).view(halves, n, -1).transpose(0, 1).reshape(n, -1).cpu().numpy()

    def norms_of(matrix: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float64)

    several = (
        side.arch.head_parts(side.config, layer, name, range(units), side.names, side.stored.shape) for side in sides
    )
    parts = zip(*([part for part in each if part.role == "weight"] for each in several), strict=True)
    found: list[list[tuple]] = [[] for _ in sides[1:]]
    for first, *others in parts:
        base = updates.read(sides[0], first, device=device)  # features of heads are its rows, also of o
        of_base = norms_of(base)
        for rows, side, part in zip(found, sides[1:], others, strict=True):
            target = updates.read(side, part, device=device)
            moved = norms_of(target - base)
            size = float(norms_of(target).norm()), float(of_base.norm()), float(moved.norm())
            rows.append((by_head(moved), by_head(of_base), base.numel() // n, size))
    return [_together(rows) for rows in found]


def _together(rows: list[tuple]) -> tuple[Squares, float]:
    """The pieces of a projection that is several matrices, their features side by side."""
    update, base, entries, sizes = zip(*rows, strict=True)
    target, ours, moved = (math.hypot(*each) for each in zip(*sizes, strict=True))
    cosine = (target**2 + ours**2 - moved**2) / (2 * target * ours) if target * ours else math.nan
    return Squares(np.concatenate(update, 1), np.concatenate(base, 1), sum(entries)), cosine


def places(found: Heads, by_query: bool = False) -> list[tuple[int, int]]:
    """(layer, unit), or (layer, query head), of all heads, in order: that of the entries of `sums`."""
    return [(at, one) for at, layer in found.items() for one in range(layer.heads if by_query else layer.units)]


def sums(found: Heads, by_query: bool = False) -> np.ndarray:
    """`update, base, entries` of every unit, or of every query head alone: float64 [3, heads]."""
    return np.concatenate([layer.by_query if by_query else layer.by_unit for layer in found.values()], axis=1)


# ---------------------------------------------------------------- the method


def importance(found: Heads, by_query: bool = False) -> dict[str, np.ndarray]:
    """Kind -> the importance [heads] of every unit, or query head alone.

    `relative` is ||dW|| / ||B|| (0 where nothing changed, infinite where only B is zeros), `rms` the root mean square
    of dW, `per_layer` relative over its mean in the layer.
    """
    update, base, entries = sums(found, by_query)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(update > 0, np.sqrt(update / base), 0.0)
        layers = np.array([layer for layer, _ in places(found, by_query)])
        means = np.array([finite_mean(relative[layers == layer]) for layer in layers])
        per_layer = np.where(relative > 0, relative / means, 0.0)
    return {"relative": relative, "rms": np.sqrt(update / entries), "per_layer": per_layer}


def finite_mean(values: np.ndarray) -> float:
    """The mean of those of `values` [n] that are finite, 0 of none."""
    return float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else 0.0


def contrast(target: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """How much more a head changed in the target run than in another, each importance [heads] over its mean; 0 where
    both are infinite."""
    means = finite_mean(target), finite_mean(reference)
    if not min(means) > 0:
        raise InputError("contrast: in one of the runs no head changed; compare checkpoints that were trained")
    with np.errstate(invalid="ignore"):
        found = target / means[0] - reference / means[1]
    return np.where(np.isnan(found), 0.0, found)


def top_share(update: np.ndarray, k: int) -> np.ndarray:
    """Of sums of squares [.., heads] the share in the `k` largest: [..]."""
    return np.sort(update, axis=-1)[..., -k:].sum(-1) / update.sum(-1)


def gini(values: np.ndarray) -> float:
    """The Gini coefficient of values [n] >= 0: 0 where all are alike, 1 - 1/n where one has all, NaN if infinite."""
    n, ordered = len(values), np.sort(values)
    if np.isinf(ordered[-1]):
        return math.nan
    return float(2 * (np.arange(1, n + 1) @ ordered) / (n * ordered.sum()) - (n + 1) / n)


def permuted(found: Heads, seed: int, draws: int = DRAWS) -> np.ndarray:
    """||dW||^2 of every unit where it is chance to which head of its layer a feature belongs: [draws, units].

    The features of a projection change places with those at the same place in the layer's other heads, so that
    projections and layers keep their totals, and features their place (their frequency, under rotary positions).
    """
    rng, drawn = np.random.default_rng(seed), []
    for layer in found.values():
        total = np.zeros((draws, layer.units))
        for each in layer.of.values():
            shuffled = rng.permuted(np.broadcast_to(each.update, (draws, *each.update.shape)), axis=1)
            total += shuffled.sum(2).reshape(draws, layer.units, -1).sum(2)
        drawn.append(total)
    return np.concatenate(drawn, axis=1)


def in_proportion(found: Heads) -> np.ndarray:
    """||dW||^2 of every unit if all of a layer had changed by one share of their size: [units]."""
    both = [layer.by_unit for layer in found.values()]
    return np.concatenate([update.sum() * base / base.sum() for update, base, _ in both])


def concentration(found: Heads, shuffled: np.ndarray) -> dict | None:
    """How unevenly the update lies over units, beside updates with the same totals by layer; None without an update.

    `top_share` is the share of ||dW||^2 in the `k` units that have most of it, a tenth of all; `even`, where all
    of a layer have as much, is never above it, for any update whatever. `shuffled`: of `permuted`.
    """
    update = sums(found)[0]
    if not update.sum() > 0:
        return None
    k = max(1, math.ceil(TOP * len(update) - 1e-9))
    share, drawn = float(top_share(update, k)), top_share(shuffled, k)
    even = np.concatenate([np.full(layer.units, layer.by_unit[0].mean()) for layer in found.values()])
    low, high = np.quantile(drawn, [(1 - stats.LEVEL) / 2, (1 + stats.LEVEL) / 2])
    return {
        "n_units": len(update), "k": k, "top_share": share,
        "permuted": {
            "mean": float(drawn.mean()), "low": float(low), "high": float(high), "draws": len(drawn),
            "p_value": float((1 + (drawn >= share).sum()) / (1 + len(drawn))),
        },
        "in_proportion": float(top_share(in_proportion(found), k)), "even": float(top_share(even, k)),
        "gini": gini(update), "gini_permuted": float(np.mean([gini(each) for each in shuffled])),
        "gini_relative": gini(importance(found)["relative"]),
    }  # fmt: skip


def curves(found: Heads, shuffled: np.ndarray) -> dict:
    """The share of the update in the units that have most of it, over their number: [units] each, of the permutations
    the ends of their interval at every number."""

    def curve(values: np.ndarray) -> np.ndarray:
        return np.cumsum(-np.sort(-values, axis=-1), axis=-1) / (values.sum(-1, keepdims=True) or 1.0)

    ends = np.quantile(np.stack([curve(each) for each in shuffled]), [(1 - stats.LEVEL) / 2, (1 + stats.LEVEL) / 2], 0)
    both = {"update": sums(found)[0], "in_proportion": in_proportion(found)}
    return {name: curve(values).tolist() for name, values in both.items()} | {"permuted": ends.tolist()}


def agreement(runs: dict[str, Heads], share: float) -> dict:
    """Whether several runs changed the same heads: `pairs`, and of every unit `agnostic`, the least of its ranks over
    runs, and `specificity`, its rank in a run minus the largest in the others. Ranks are over the number of units, 1
    for the most important; those that are alike share the mean of theirs.

    Of a pair, Spearman's correlation by `relative` and by `rms` (two runs of one base divide by the same ||B||, which
    alone correlates `relative`), and the overlap of the top `share` beside chance.
    """
    from scipy.stats import rankdata

    kinds = {name: importance(found) for name, found in runs.items()}
    n = len(next(iter(kinds.values()))["relative"])
    k, pairs = max(1, math.ceil(share * n - 1e-9)), []
    top = {name: np.argsort(-each["relative"], kind="stable")[:k].tolist() for name, each in kinds.items()}
    for one, other in combinations(runs, 2):
        row = {f"spearman_{kind}": stats.correlation(kinds[one][kind], kinds[other][kind], "spearman")
               for kind in ("relative", "rms")}  # fmt: skip
        overlap = {"share": k / n, "chance": (k / n) / (2 - k / n)} | stats.overlap(top[one], top[other], n)
        pairs.append({"runs": [one, other], **row, "top": overlap})
    ranked = {name: rankdata(each["relative"]) / n for name, each in kinds.items()}
    rest = {name: np.max([each for other, each in ranked.items() if other != name], axis=0) for name in ranked}
    found = {"pairs": pairs, "agnostic": np.min(list(ranked.values()), axis=0).tolist()}
    return found | {"specificity": {name: (ranked[name] - rest[name]).tolist() for name in ranked}}


# ---------------------------------------------------------------- the result


def rows_of(found: Heads, kinds: dict[str, np.ndarray]) -> list[dict]:
    """A row a unit: place, importance by kind, share of the update, its query heads alone."""
    shares = {by_query: sums(found, by_query)[0] / (sums(found)[0].sum() or 1.0) for by_query in (False, True)}
    at_query = {place: i for i, place in enumerate(places(found, by_query=True))}
    queries, rows = importance(found, by_query=True), []

    def told(by_query: bool, at: int) -> dict:
        values = {kind: float(each[at]) for kind, each in (queries if by_query else kinds).items()}
        return {"importance": values, "share": float(shares[by_query][at])}

    for i, (layer, unit) in enumerate(places(found)):
        group = found[layer].heads // found[layer].units
        own = [{"head": head} | told(True, at_query[layer, head]) for head in range(unit * group, (unit + 1) * group)]
        rows.append({"layer": layer, "unit": unit} | told(False, i) | {"query_heads": own})
    return rows


def payload_of(
    steps: dict[int, Heads], others: dict[str, Heads], seed: int, share: float, cosines: dict[int, float]
) -> dict:
    """What the result says of a run, by step, and of the last checkpoints of other runs of its base."""
    last = steps[max(steps)]
    kinds, told = importance(last), {}
    for name, found in others.items():
        key = "contrast" if len(others) == 1 else f"contrast:{name}"
        kinds[key] = contrast(kinds["relative"], importance(found)["relative"])
    for step, found in steps.items():
        alike = stats.correlation(importance(found)["relative"], kinds["relative"], "spearman")["correlation"]
        row, shuffled = {"median_cosine": cosines[step], "spearman_with_last": alike}, permuted(found, seed)
        told[str(step)] = row | {"concentration": concentration(found, shuffled)}
    made = {"heads": rows_of(last, kinds), "steps": told, "curves": curves(last, shuffled)}
    return made | ({"runs": agreement({"target": last} | others, share)} if others else {})


def tensors_of(steps: dict[int, Heads], others: dict[str, Heads]) -> dict:
    """`units` and `query_heads` [n, 2] (layer, number), and of every checkpoint, and of the others, `<step>.units` and
    `<step>.query_heads`: sums of squares of dW and of B, and the number of weights, float64 [3, n]."""
    found: dict = {}
    for name, model in {**{str(step): model for step, model in steps.items()}, **others}.items():
        for key, by_query in (("units", False), ("query_heads", True)):
            found[key] = torch.tensor(places(model, by_query))
            found[f"{name}.{key}"] = torch.from_numpy(sums(model, by_query))
    return found


def say(payload: dict) -> None:
    for step, row in payload["steps"].items():
        one = row["concentration"]
        if one is None:
            cli.say(f"step {step}: no head differs from the base")
            continue
        drawn = one["permuted"]
        cli.say(
            f"step {step}: the top {one['k']} of {one['n_units']} units hold {one['top_share']:.1%} of the update "
            f"({drawn['mean']:.1%} [{drawn['low']:.1%}, {drawn['high']:.1%}] were it chance to which head a feature "
            f"belongs, {one['in_proportion']:.1%} in proportion to their size); Gini {one['gini']:.3f}"
        )
    for pair in payload.get("runs", {}).get("pairs", []):
        top, r = pair["top"], pair["spearman_relative"]["correlation"]
        cli.say(
            f"{' and '.join(pair['runs'])}: Spearman {'not defined' if r is None else f'{r:.2f}'}, top "
            f"{top['share']:.0%} Jaccard {top['jaccard']:.2f} (by chance {top['expected']:.2f})"
        )


# ---------------------------------------------------------------- the command


def runs_asked_for(args, study: Study) -> dict[str, refs.ModelRef]:
    """The last checkpoints of the other runs, by name: --other, else the study's `runs`.

    Raises:
        InputError: two of one name, or one is called target, or like a step, as the run's own tensors are.
    """
    if args.other is None:
        named = list((study.get("runs") or {}).items())
    else:
        named = [(name, run) if there else (text, text)
                 for text in args.other for name, there, run in [text.partition("=")]]  # fmt: skip
    names = [name for name, _ in named]
    wrong = next((name for name in names if names.count(name) > 1 or name == "target" or name.isdecimal()), None)
    if wrong is not None:
        raise InputError(f"--other: {wrong} names more than one run; name each NAME=RUN, and none target or by a step")
    return {name: refs.run(run)[-1] for name, run in named}


def build_parser() -> argparse.ArgumentParser:
    p = compared.parser(__doc__, "--target-model", "the study's spectral/heads.json")
    text = "other runs of this base, their last checkpoints: NAME=RUN, or RUN; default: the study's runs"
    p.add_argument("--other", nargs="+", metavar="RUN", help=text)
    text = f"the most important heads whose overlap between runs is told; default {TOP:g}"
    p.add_argument("--top", type=float, default=TOP, metavar="SHARE", help=text)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    if not 0 < args.top < 1:
        raise InputError(f"--top {args.top:g}: a share of the heads lies between 0 and 1")
    study = Study.find(args.study, args.seed, args.arm)
    models, others = compared.Compared.from_arguments(args, study, "--run"), runs_asked_for(args, study)
    other = beside.name(study, args.base_model, args.run, args.steps, args.limit)
    given = dotted(other, "other" * (args.other is not None), f"top-{args.top:g}" * (args.top != TOP))
    output, device = study.output(args.output, "--output", "heads", given), cli.device(args.device)
    facts = models.facts() | {"seed": study.seed, "top": args.top}
    facts["models"] |= {"others": {name: ref.describe() for name, ref in others.items()}}

    def asked(head: dict) -> dict:
        return {"others": (head.get("models") or {}).get("others") or {}, "seed": head.get("seed"), "top": head["top"]}

    if compared.made_already(output, SCHEMA, facts, args.overwrite, asked):
        cli.say(f"{output} is finished (--overwrite redoes it)")
        return
    steps, cosines, of_others = {}, {}, {}
    for group in refs.one_at_a_time(models.run, args.drop_revisions, models.base):
        found, each = measured(models.base, group, device)
        steps |= found
        for ref in group:
            cosines[ref.step] = updates.warn_if_not_one_run(models.base, ref, each[ref.step])
    for name, ref in others.items():
        found, each = measured(models.base, [ref], device)
        updates.warn_if_not_one_run(models.base, ref, each[ref.step])
        of_others[name] = found[ref.step]
    payload = payload_of(steps, of_others, study.seed, args.top, cosines)
    results.write_tensors(output.with_suffix(".pt"), tensors_of(steps, of_others))
    figure.draw(output.with_suffix(""), payload, facts["n_layers"])
    results.write_json(output, payload, results.header(SCHEMA, **facts, device=device.type))
    say(payload)
    cli.say(f"wrote {output}, {output.with_suffix('.pt')} and the figure {output.with_suffix('.pdf')}")


if __name__ == "__main__":
    cli.run(main)
