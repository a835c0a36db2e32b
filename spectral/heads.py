"""How much each attention head changed: by layer and head, how unevenly, and whether other runs changed the same heads.

The unit is a KV head with the query heads that share it. Its importance is ||dW|| / ||B|| over its rows of q, k, v and
its columns of o. Also given: the root mean square of dW, the importance over the mean of its layer's units, and, with
other runs, how much more it changed than in them.

In:   a base model B, and a run of checkpoints C or a single one; --other takes runs of the same base on other text.
Out:  OUT (default: the study's spectral/heads.json): `heads` (the last checkpoint's units and their query heads),
      `steps` (how concentrated the update is, compared with features permuted among heads), `runs` (agreement); .pt
      (sums of squares of every checkpoint) and a figure.

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
ASKED = {"heads": "Is the change in attention carried by a few heads?"}
CAPTIONS = {
    "heads": """Part IV: 2. Heads
        How much each attention head changed, by layer: units (a KV head with the query heads that share it) and, if
        several share one, the query heads alone. Right: the share of the update in the units that changed most, over
        the number of units, and what it would be if a layer's features were assigned to its heads at random (band: 95 %
        of permutations), and if all heads of a layer had changed in proportion to their size (dotted). Claim D2 is
        decided by the distance from the permutations at the top 10 % of the units, rounded up (the dot). The band is
        often narrower than the line.""",
}
KINDS, OF_QUERIES = ("relative", "rms", "per_layer"), ("q_proj", "o_proj")
TOP, DRAWS = 0.1, 1000


# ---------------------------------------------------------------- the sums


@dataclass(frozen=True)
class Squares:
    """Sums of squares in one projection by head and feature: a row of q, k or v, a column of o.

    Attributes:
        update, base: of dW and of B, float64 [heads, features of a head]; the heads of k and v are units.
        entries: number of weights of one head.
    """

    update: np.ndarray
    base: np.ndarray
    entries: int

    @property
    def sums(self) -> np.ndarray:
        """`update, base, entries` of each head: [3, heads]."""
        return np.stack([self.update.sum(1), self.base.sum(1), np.full(len(self.update), float(self.entries))])


@dataclass(frozen=True)
class Layer:
    """The numbers of heads and units (`Arch.head_counts`) of a layer, and the squares `of` each of its projections."""

    heads: int
    units: int
    of: dict[str, Squares]

    @property
    def by_unit(self) -> np.ndarray:
        """`update, base, entries` of whole units: [3, units]."""
        return sum(squares.sums.reshape(3, self.units, -1).sum(2) for squares in self.of.values())

    @property
    def by_query(self) -> np.ndarray:
        """The same of single query heads, their rows of q and columns of o: [3, heads]."""
        return sum(self.of[name].sums for name in OF_QUERIES if name in self.of)


Heads = dict[int, Layer]  # layers without attention are left out


def measured(
    base: refs.ModelRef, checkpoints: list[refs.ModelRef], device: torch.device | str = "cpu"
) -> tuple[dict[int, Heads], dict[int, list[float]]]:
    """The heads of each checkpoint and the cosines of B and C by projection, by step; holds one matrix of each model in
    memory. Differences are taken in float32 (see `updates.read`) and summed in float64.

    Raises:
        InputError: another architecture or shape, missing or damaged weights, or a model without attention.
    """
    by_step: dict[int, Heads] = {ref.step: {} for ref in checkpoints}
    cosines: dict[int, list[float]] = {ref.step: [] for ref in checkpoints}
    with matrices.opened(base, checkpoints) as sides:
        plan, first = matrices.plan(sides, archs.ATTENTION, (), details=True), sides[0]  # checks the shapes
        for number, side in enumerate(sides):
            side.stored.fetch({matrix.names[number] for matrix in plan})
        for layer in cli.progress(range(first.n_layers), desc="heads", unit="layer"):
            heads, units = _counts(sides, layer)
            if not units:
                continue
            for step in by_step:
                by_step[step][layer] = Layer(heads, units, {})
            for name in first.projections(layer, archs.ATTENTION):
                for step, (squares, cosine) in zip(by_step, _projection(sides, layer, name, device), strict=True):
                    by_step[step][layer].of[name] = squares
                    cosines[step] += [cosine] if math.isfinite(cosine) else []
    if not any(by_step.values()):
        raise InputError(f"{base.spec} has no attention, and no heads")
    return by_step, cosines


def _counts(sides: list[Side], layer: int) -> tuple[int, int]:
    """Query heads and units of a layer, equal in all sides: matrices of one shape may be cut into different heads."""
    (first, expected), *others = [(side, side.arch.head_counts(side.config, layer)) for side in sides]
    for other, counts in others:
        if counts != expected:
            raise InputError(
                f"layer {layer}: {expected[0]} query heads in {expected[1]} units in {first.spec}, {counts[0]} in "
                f"{counts[1]} in {other.spec}; heads can only be compared if both models have as many"
            )
    return expected


def _projection(sides: list[Side], layer: int, name: str, device) -> list[tuple[Squares, float]]:
    """The sums of one projection in every checkpoint, and the cosine of B and C in it (NaN if one is zero)."""
    heads, units = sides[0].arch.head_counts(sides[0].config, layer)
    n = heads if name in OF_QUERIES else units
    halves = 2 if sides[0].arch.differential and name != "o_proj" else 1  # if 2, a head has a stretch of each half

    def by_head(norms: torch.Tensor) -> np.ndarray:
        return (norms**2).view(halves, n, -1).transpose(0, 1).reshape(n, -1).cpu().numpy()

    def norms_of(matrix: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float64)

    all_parts = (
        side.arch.head_parts(side.config, layer, name, range(units), side.names, side.stored.shape) for side in sides
    )
    weights = zip(*([part for part in parts if part.role == "weight"] for parts in all_parts), strict=True)
    by_checkpoint: list[list[tuple]] = [[] for _ in sides[1:]]
    for first, *others in weights:
        base = updates.read(sides[0], first, device=device)  # its rows are the features of heads, for o as well
        of_base = norms_of(base)
        for rows, side, part in zip(by_checkpoint, sides[1:], others, strict=True):
            target = updates.read(side, part, device=device)
            moved = norms_of(target - base)
            size = float(norms_of(target).norm()), float(of_base.norm()), float(moved.norm())
            rows.append((by_head(moved), by_head(of_base), base.numel() // n, size))
    return [_joined(rows) for rows in by_checkpoint]


def _joined(rows: list[tuple]) -> tuple[Squares, float]:
    """The sums of a projection that consists of several matrices: their features are concatenated."""
    update, base, entries, sizes = zip(*rows, strict=True)
    target, source, moved = (math.hypot(*norms) for norms in zip(*sizes, strict=True))
    cosine = (target**2 + source**2 - moved**2) / (2 * target * source) if target * source else math.nan
    return Squares(np.concatenate(update, 1), np.concatenate(base, 1), sum(entries)), cosine


def places(found: Heads, by_query: bool = False) -> list[tuple[int, int]]:
    """(layer, unit), or (layer, query head), of all heads, in the order of `sums`."""
    return [(number, i) for number, layer in found.items() for i in range(layer.heads if by_query else layer.units)]


def sums(found: Heads, by_query: bool = False) -> np.ndarray:
    """`update, base, entries` of every unit, or of every single query head: float64 [3, heads]."""
    return np.concatenate([layer.by_query if by_query else layer.by_unit for layer in found.values()], axis=1)


# ---------------------------------------------------------------- the method


def importance(found: Heads, by_query: bool = False) -> dict[str, np.ndarray]:
    """Kind -> the importance [heads] of every unit, or of every single query head.

    `relative` is ||dW|| / ||B|| (0 if nothing changed, infinite if only B is zero), `rms` the root mean square of dW,
    `per_layer` the relative one over its mean in the layer.
    """
    update, base, entries = sums(found, by_query)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(update > 0, np.sqrt(update / base), 0.0)
        layers = np.array([layer for layer, _ in places(found, by_query)])
        means = np.array([finite_mean(relative[layers == layer]) for layer in layers])
        per_layer = np.where(relative > 0, relative / means, 0.0)
    return {"relative": relative, "rms": np.sqrt(update / entries), "per_layer": per_layer}


def finite_mean(values: np.ndarray) -> float:
    """The mean of the finite `values` [n], 0 if there are none."""
    return float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else 0.0


def contrast(target: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """How much more each head changed in the target run than in another, from importances [heads] over their means; 0
    where both are infinite."""
    means = finite_mean(target), finite_mean(reference)
    if not min(means) > 0:
        raise InputError("contrast: in one of the runs no head changed; compare checkpoints that were trained")
    with np.errstate(invalid="ignore"):
        difference = target / means[0] - reference / means[1]
    return np.where(np.isnan(difference), 0.0, difference)


def top_share(update: np.ndarray, k: int) -> np.ndarray:
    """The share of sums of squares [.., heads] that is in the `k` largest: [..]."""
    return np.sort(update, axis=-1)[..., -k:].sum(-1) / update.sum(-1)


def gini(values: np.ndarray) -> float:
    """The Gini coefficient of values [n] >= 0: 0 if all are equal, 1 - 1/n if one has all, NaN if one is infinite."""
    n, ordered = len(values), np.sort(values)
    if np.isinf(ordered[-1]):
        return math.nan
    return float(2 * (np.arange(1, n + 1) @ ordered) / (n * ordered.sum()) - (n + 1) / n)


def permuted(found: Heads, seed: int, draws: int = DRAWS) -> np.ndarray:
    """||dW||^2 of every unit if features were assigned to the heads of their layer at random: [draws, units].

    The features of a projection at the same position in their heads are permuted among the layer's heads: projections
    and layers keep their totals, and features their position (their frequency, with rotary positions).
    """
    rng, drawn = np.random.default_rng(seed), []
    for layer in found.values():
        total = np.zeros((draws, layer.units))
        for squares in layer.of.values():
            shuffled = rng.permuted(np.broadcast_to(squares.update, (draws, *squares.update.shape)), axis=1)
            total += shuffled.sum(2).reshape(draws, layer.units, -1).sum(2)
        drawn.append(total)
    return np.concatenate(drawn, axis=1)


def in_proportion(found: Heads) -> np.ndarray:
    """||dW||^2 of every unit if all units of a layer had changed in proportion to their size: [units]."""
    layers = [layer.by_unit for layer in found.values()]
    return np.concatenate([update.sum() * base / base.sum() for update, base, _ in layers])


def concentration(found: Heads, shuffled: np.ndarray) -> dict | None:
    """How concentrated the update is in few units, compared with the same totals by layer; None without an update.

    `top_share` is the share of ||dW||^2 in the `k` units that have most of it, a tenth of all; `even`, where all units
    of a layer have equal shares, is never above it, whatever the update. `shuffled`: the draws of `permuted`.
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
        "gini": gini(update), "gini_permuted": float(np.mean([gini(draw) for draw in shuffled])),
        "gini_relative": gini(importance(found)["relative"]),
    }  # fmt: skip


def curves(found: Heads, shuffled: np.ndarray) -> dict:
    """The share of the update in the units that have most of it, over their number: [units] each; for the permutations
    both ends of the interval at every number."""

    def curve(values: np.ndarray) -> np.ndarray:
        return np.cumsum(-np.sort(-values, axis=-1), axis=-1) / (values.sum(-1, keepdims=True) or 1.0)

    ends = np.quantile(np.stack([curve(draw) for draw in shuffled]), [(1 - stats.LEVEL) / 2, (1 + stats.LEVEL) / 2], 0)
    both = {"update": sums(found)[0], "in_proportion": in_proportion(found)}
    return {name: curve(values).tolist() for name, values in both.items()} | {"permuted": ends.tolist()}


def agreement(runs: dict[str, Heads], share: float) -> dict:
    """Whether several runs changed the same heads: `pairs`, and for every unit `agnostic`, its lowest rank over runs,
    and `specificity`, its rank in a run minus its highest rank in the others. Ranks are divided by the number of units,
    1 for the most important; equal units share their mean rank.

    A pair has Spearman's correlation by `relative` and by `rms` (two runs of one base divide by the same ||B||, which
    alone correlates `relative`), and the overlap of the top `share` compared with chance.
    """
    from scipy.stats import rankdata

    kinds = {name: importance(heads) for name, heads in runs.items()}
    n = len(next(iter(kinds.values()))["relative"])
    k, pairs = max(1, math.ceil(share * n - 1e-9)), []
    top = {name: np.argsort(-values["relative"], kind="stable")[:k].tolist() for name, values in kinds.items()}
    for first, second in combinations(runs, 2):
        row = {f"spearman_{kind}": stats.correlation(kinds[first][kind], kinds[second][kind], "spearman")
               for kind in ("relative", "rms")}  # fmt: skip
        overlap = {"share": k / n, "chance": (k / n) / (2 - k / n)} | stats.overlap(top[first], top[second], n)
        pairs.append({"runs": [first, second], **row, "top": overlap})
    ranks = {name: rankdata(values["relative"]) / n for name, values in kinds.items()}
    highest = {name: np.max([ranks[other] for other in ranks if other != name], axis=0) for name in ranks}
    result = {"pairs": pairs, "agnostic": np.min(list(ranks.values()), axis=0).tolist()}
    return result | {"specificity": {name: (ranks[name] - highest[name]).tolist() for name in ranks}}


# ---------------------------------------------------------------- the result


def rows_of(found: Heads, kinds: dict[str, np.ndarray]) -> list[dict]:
    """One row per unit: layer and number, importance by kind, share of the update, and its single query heads."""
    shares = {by_query: sums(found, by_query)[0] / (sums(found)[0].sum() or 1.0) for by_query in (False, True)}
    query_index = {head: i for i, head in enumerate(places(found, by_query=True))}
    queries, rows = importance(found, by_query=True), []

    def numbers(by_query: bool, i: int) -> dict:
        values = {kind: float(column[i]) for kind, column in (queries if by_query else kinds).items()}
        return {"importance": values, "share": float(shares[by_query][i])}

    for i, (layer, unit) in enumerate(places(found)):
        group = found[layer].heads // found[layer].units
        own = [{"head": h} | numbers(True, query_index[layer, h]) for h in range(unit * group, (unit + 1) * group)]
        rows.append({"layer": layer, "unit": unit} | numbers(False, i) | {"query_heads": own})
    return rows


def payload_of(
    steps: dict[int, Heads], others: dict[str, Heads], seed: int, share: float, cosines: dict[int, float]
) -> dict:
    """The result for a run, by step, and the last checkpoints of other runs of its base."""
    last = steps[max(steps)]
    kinds, by_step = importance(last), {}
    for name, heads in others.items():
        key = "contrast" if len(others) == 1 else f"contrast:{name}"
        kinds[key] = contrast(kinds["relative"], importance(heads)["relative"])
    for step, heads in steps.items():
        spearman = stats.correlation(importance(heads)["relative"], kinds["relative"], "spearman")["correlation"]
        row, shuffled = {"median_cosine": cosines[step], "spearman_with_last": spearman}, permuted(heads, seed)
        by_step[str(step)] = row | {"concentration": concentration(heads, shuffled)}
    payload = {"heads": rows_of(last, kinds), "steps": by_step, "curves": curves(last, shuffled)}
    return payload | ({"runs": agreement({"target": last} | others, share)} if others else {})


def tensors_of(steps: dict[int, Heads], others: dict[str, Heads]) -> dict:
    """`units` and `query_heads` [n, 2] (layer, number), and for every checkpoint `<step>.units`, `<step>.query_heads`,
    for other runs `<name>...`: sums of squares of dW and of B, and the number of weights, float64 [3, n]."""
    tensors: dict = {}
    for name, model in {**{str(step): model for step, model in steps.items()}, **others}.items():
        for key, by_query in (("units", False), ("query_heads", True)):
            tensors[key] = torch.tensor(places(model, by_query))
            tensors[f"{name}.{key}"] = torch.from_numpy(sums(model, by_query))
    return tensors


def say(payload: dict) -> None:
    for step, row in payload["steps"].items():
        uneven = row["concentration"]
        if uneven is None:
            cli.say(f"step {step}: no head differs from the base")
            continue
        drawn = uneven["permuted"]
        cli.say(
            f"step {step}: the top {uneven['k']} of {uneven['n_units']} units hold {uneven['top_share']:.1%} of the "
            f"update (features permuted among heads: {drawn['mean']:.1%} [{drawn['low']:.1%}, {drawn['high']:.1%}]; "
            f"in proportion to size: {uneven['in_proportion']:.1%}); Gini {uneven['gini']:.3f}"
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
        InputError: two have the same name, or one is called target or by a step, like the run's own tensors.
    """
    if args.other is None:
        named = list((study.get("runs") or {}).items())
    else:
        named = [(name, run) if equals else (text, text)
                 for text in args.other for name, equals, run in [text.partition("=")]]  # fmt: skip
    names = [name for name, _ in named]
    wrong = next((name for name in names if names.count(name) > 1 or name == "target" or name.isdecimal()), None)
    if wrong is not None:
        raise InputError(f"--other: {wrong} names more than one run; give each NAME=RUN, not target, not a number")
    return {name: refs.run(run)[-1] for name, run in named}


def build_parser() -> argparse.ArgumentParser:
    p = compared.parser(__doc__, "--target-model", "the study's spectral/heads.json")
    text = "other runs of this base (their last checkpoints): NAME=RUN, or RUN; default: the study's runs"
    p.add_argument("--other", nargs="+", metavar="RUN", help=text)
    text = f"share of most important heads whose overlap between runs is reported; default {TOP:g}"
    p.add_argument("--top", type=float, default=TOP, metavar="SHARE", help=text)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    if not 0 < args.top < 1:
        raise InputError(f"--top {args.top:g}: a share of the heads must be between 0 and 1")
    study = Study.find(args.study, args.seed, args.arm)
    models, others = compared.Compared.from_arguments(args, study, "--run"), runs_asked_for(args, study)
    variant = beside.name(study, args.base_model, args.run, args.steps, args.limit)
    variant = dotted(variant, "other" * (args.other is not None), f"top-{args.top:g}" * (args.top != TOP))
    output, device = study.output(args.output, "--output", "heads", variant), cli.device(args.device)
    facts = models.facts() | {"seed": study.seed, "top": args.top}
    facts["models"] |= {"others": {name: ref.describe() for name, ref in others.items()}}

    def asked(head: dict) -> dict:
        return {"others": (head.get("models") or {}).get("others") or {}, "seed": head.get("seed"), "top": head["top"]}

    if compared.made_already(output, SCHEMA, facts, args.overwrite, asked):
        cli.say(f"{output} is finished (--overwrite redoes it)")
        return
    steps, median_cosines, of_others = {}, {}, {}
    for group in refs.one_at_a_time(models.run, args.drop_revisions, models.base):
        by_step, cosines = measured(models.base, group, device)
        steps |= by_step
        for ref in group:
            median_cosines[ref.step] = updates.warn_if_not_one_run(models.base, ref, cosines[ref.step])
    for name, ref in others.items():
        by_step, cosines = measured(models.base, [ref], device)
        updates.warn_if_not_one_run(models.base, ref, cosines[ref.step])
        of_others[name] = by_step[ref.step]
    payload = payload_of(steps, of_others, study.seed, args.top, median_cosines)
    results.write_tensors(output.with_suffix(".pt"), tensors_of(steps, of_others))
    figure.draw(output.with_suffix(""), payload, facts["n_layers"])
    results.write_json(output, payload, results.header(SCHEMA, **facts, device=device.type))
    say(payload)
    cli.say(f"wrote {output}, {output.with_suffix('.pt')} and the figure {output.with_suffix('.pdf')}")


if __name__ == "__main__":
    cli.run(main)
