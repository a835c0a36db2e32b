"""Which heads can be rewound: a growing share of a checkpoint's heads is reset to the base's, in several orders.

A unit is a KV head with the query heads that share it: its rows of q, k and v with biases, its columns of o, and
whatever else belongs to it. Each order gives a curve over the share of heads: importance (least changed first), most
(the reverse), contrast (heads that changed more than in another run last), greedy (by what each head costs alone,
measured on every second item and reported on the others), random orders, and the order in a file. Importance and random
have a second curve over the share of ||dW||^2 rewound: rewinding heads that hardly changed is harmless by construction.

In:   BASE and RUN (default: the study's base and the last checkpoint of its run), and what is measured.
Out:  OUT (default: the study's spectral/rewind.json): points, largest harmless shares, the gain of the best share on
      items that did not choose it; .pt (every item), figures over both shares, and for the greedy order .singles.json
      (every head alone). With --write a model folder instead.

A killed run resumes with the next model. On several GPUs: accelerate launch spectral/rewind.py ...

Full: python spectral/rewind.py --base HuggingFaceTB/SmolLM2-135M --run runs/swh --output rewind.json
Tiny: python spectral/rewind.py --study demo/tiny.yaml --stride 50 --draws 2 --measures nll
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from cpt_utils.base import cli, figures, results, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import refs
from cpt_utils.interventions import components, in_memory, surgery
from cpt_utils.interventions.condition import Condition
from cpt_utils.measures import evaluation
from cpt_utils.measures.trial import Trial

curves, heads = cli.sibling("spectral/curves.py"), cli.sibling("spectral/heads.py")
made, updates = cli.sibling("spectral/rewind_orders.py"), cli.sibling("spectral/updates.py")

SCHEMA = "rewind"
RESULTS = {"rewind": "spectral/rewind.json"}
ASKED = {"rewind": "How much of the update of the attention heads can be rewound before anything is lost?"}
CAPTIONS = {
    "rewind": """Part IV: 3. Rewinding heads
        Scores of the checkpoint (loss in each language, retrieval, task, as the study asks) with a growing share of its
        heads reset to the base's: least changed heads first, most changed first, least specific first (those that
        another run changed as much), by what each head costs alone (cheapest first, chosen on other sentences than
        those shown), and in random orders, over all heads or within layers (mean and range of their draws). Rings: the
        largest share that is not worse than the checkpoint by more than one standard error.""",
    "rewind_energy": """Part IV: 3. Rewinding heads
        The same over the share of the update (its sum of squares over all heads) that is rewound: rewinding heads that
        hardly changed is harmless by construction, which this axis accounts for. Claim D3 is decided on it.""",
}
IMAGES = {"rewind_energy": "rewind.energy.png"}
ORDERS = ("importance", "most", "contrast", "greedy", "random", "random_layer")
BY_ENERGY = ("importance", "random")  # the orders that D3 compares
NAMES = {
    "importance": "least changed first", "most": "most changed first", "contrast": "least specific first",
    "greedy": "cheapest first", "random": "random", "random_layer": "random within layers", "file": "order in the file",
}  # fmt: skip
# The orders that the largest harmless share of an order is compared with.
NULLS = {
    "importance": ("random", "random_layer"), "importance:energy": ("random:energy",), "contrast": ("random",),
    "most": ("random",), "greedy": ("random",),
}  # fmt: skip
STRIDE, DRAWS = 5, 5
Order, Unit = made.Order, made.Unit


# ---------------------------------------------------------------- conditions


class Rewinding:
    """The recipes of one pair: sets of heads, and how much of ||dW||^2 over all heads each of them rewinds.

    Attributes:
        units: (layer, unit) of every unit, or with `by_query` (layer, query head) of every query head.
        energy: the share of each in the sum of squares of dW over all of them.
    """

    def __init__(self, pair: surgery.Pair, found: heads.Heads, by_query: bool = False):
        self.pair, self.found, self.by_query = pair, found, by_query
        self.units, self.swapper = heads.places(found, by_query), in_memory.Swapper(pair)
        self._conditions: dict[frozenset[Unit], Condition] = {}  # sets shared by several curves are made once
        update = heads.sums(found, by_query)[0]
        if not update.sum() > 0:
            raise InputError(
                f"no head of {pair.target_ref.spec} differs from {pair.base_ref.spec}: there is nothing to rewind"
            )
        self.energy = dict(zip(self.units, (update / update.sum()).tolist(), strict=True))

    def recipe(self, chosen: Iterable[Unit]) -> surgery.Recipe:
        """The chosen heads, taken from the base. If all units of a layer are chosen, so is what they share, which makes
        its attention the base's; not with `by_query`, where keys and values stay the checkpoint's."""
        layers: dict[int, list[int]] = {}
        for layer, unit in sorted(chosen):
            layers.setdefault(layer, []).append(unit)
        whole = {} if self.by_query else {
            layer: units for layer, units in layers.items() if len(units) == self.found[layer].units
        }  # fmt: skip
        part = {layer: units for layer, units in layers.items() if layer not in whole}
        parts = [surgery.heads_from_base(self.pair, part, self.by_query)] if part else []
        parts += [surgery.heads_from_base(self.pair, whole, shared=True)] if whole else []
        return components.combined(parts)

    def point(self, order: Order, k: int, at: float, curve: str) -> curves.Point:
        """The first `k` heads of an order rewound, at the position `at` on a curve."""
        chosen = order.chain[:k]
        share, energy = k / len(self.units), sum(sorted(self.energy[unit] for unit in chosen))
        facts = {"heads": k, "share": share, "energy": 1.0 if k == len(self.units) else energy}
        key = frozenset(chosen)
        if chosen and key not in self._conditions:
            self._conditions[key] = self.swapper.condition(f"{k} heads", self.recipe(chosen), **facts)
        condition = self._conditions[key] if chosen else curves.TARGET
        return curves.Point(curve, at, condition, order.draw, facts)

    def points(self, orders: Sequence[Order], shares: Sequence[float]) -> list[curves.Point]:
        """The curves over the share of heads, and for the orders in BY_ENERGY those over the share of ||dW||^2.

        The latter are at the energies nearest to `shares` that the order of importance reaches; the other orders use
        the sets of their own chains nearest to these energies.
        """
        n, points = len(self.units), []
        sums = [np.cumsum([0.0, *(self.energy[unit] for unit in order.chain)]) for order in orders]
        first = next((sum_ for order, sum_ in zip(orders, sums, strict=True) if order.name == BY_ENERGY[0]), None)
        energies = list(shares)
        if first is not None:
            energies = sorted({round(float(first[np.abs(first - share).argmin()]), 9) for share in shares})
        for order, sum_ in zip(orders, sums, strict=True):
            ks = sorted({min(round(share * n), len(order.chain)) for share in shares})  # a file's order may be short
            points += [self.point(order, k, k / n, order.name) for k in ks]
            if order.name in BY_ENERGY:
                points += [
                    self.point(order, int(np.abs(sum_ - energy).argmin()), energy, f"{order.name}:energy")
                    for energy in energies
                ]
        return points

    def singles(self) -> list[curves.Point]:
        """Every head rewound alone."""
        orders = [Order("single", (unit,), draw) for draw, unit in enumerate(self.units)]
        return [self.point(order, 1, 1 / len(self.units), "single") for order in orders]


# ---------------------------------------------------------------- the result


def halves(records: list[dict], part: int) -> list[dict]:
    """The records on every second item only, from item `part` on, with `values` as means over these."""
    halved = []
    for record in records:
        units = {name: values[part::2] for name, values in record["units"].items()}
        means = record["values"] | {name: float(np.mean(values)) for name, values in units.items()}
        halved.append(record | {"units": units, "values": means})
    return halved


def records_of(points: Sequence[curves.Point], every: Sequence[curves.Point], records: list[dict]) -> list[dict]:
    """The records of `points`, selected from those of all points `every`, in the order of `curves.numbered`."""
    index = dict(zip((point.condition.id for point in every), curves.numbered(every)[1], strict=True))
    return [*records[:2], *(records[index[condition.id]] for condition in curves.numbered(points)[0])]


def best(points: Sequence[curves.Point], records: list[dict], seed: int) -> dict[str, dict]:
    """Measure -> the best share of a curve, chosen on items 0, 2, .., and by how much it is better than the checkpoint
    on items 1, 3, ..: `at, draw, chosen_on` (the mean on the former), `value, ci_low, ci_high, n`.

    The checkpoint itself is no candidate: if rewinding heads hurts, the best share is the one that hurts least.
    """
    candidates, by_measure = [i for i, point in enumerate(points) if point.at > 0], {}
    _, sets = curves.numbered(points)
    for name, values in curves.units(records).items():
        change = values[[sets[i] for i in candidates]] - values[1]
        if change.shape[1] < 2:
            continue
        means = change[:, ::2].mean(1)
        chosen, held_out = int(means.argmax()), change[:, 1::2]
        low, high = stats.bootstrap_mean(held_out[chosen], seed)
        point, mean = points[candidates[chosen]], float(held_out[chosen].mean())
        row = {"at": point.at, "draw": point.draw, "chosen_on": float(means[chosen])}
        by_measure[name] = row | {"value": mean, "ci_low": low, "ci_high": high, "n": held_out.shape[1]}
    return by_measure


def at_equal_energy(points: Sequence[curves.Point], records: list[dict], seed: int) -> dict[str, dict]:
    """Measure -> by how much the order of importance is better than random ones with as much of ||dW||^2 rewound: the
    mean over the shares between 0 and 1, `value, ci_low, ci_high, n` in units of the measure.

    The sets have equal energy, as nearly as whole heads can (see `Rewinding.points`), without interpolation: in the
    order of importance the last few heads hold much of the update, and between sets the curve is no straight line.
    """
    names, by_measure = [f"{name}:energy" for name in BY_ENERGY], {}
    _, sets = curves.numbered(points)
    rows = [[sets[i] for i, p in enumerate(points) if p.curve == name and 0 < p.at < 1] for name in names]
    for name, values in curves.units(records).items() if all(rows) else ():
        difference = values[rows[0]].mean(0) - values[rows[1]].mean(0)
        low, high = stats.bootstrap_mean(difference, seed)
        by_measure[name] = {"value": float(difference.mean()), "ci_low": low, "ci_high": high, "n": len(difference)}
    return by_measure


def summarise(points: Sequence[curves.Point], seed: int, records: list[dict]) -> dict:
    """The result: `curves.summary`, with the greedy order, and the random ones that it is compared with, on the items
    that did not choose it; and `best` of every order."""
    groups: dict[str, list[curves.Point]] = {}
    for point in points:
        groups.setdefault(point.curve, []).append(point)
    along = ("at", "energy")

    def nulls_of(names: Sequence[str]) -> dict[str, list[str]]:
        return {name: [null for null in NULLS[name] if null in groups] for name in names if name in groups}

    result = curves.summary(points, records, seed, nulls_of([name for name in NULLS if name != "greedy"]), along)
    if "greedy" in groups:
        both = groups["greedy"] + groups.get("random", [])
        held = curves.summary(both, halves(records_of(both, points, records), 1), seed, nulls_of(["greedy"]), along)
        rows = [row for row in result["points"] if row["curve"] == "greedy"]
        for row, other in zip(rows, held["points"], strict=False):
            row |= {key: other[key] for key in ("values", "better")} | {"items": "every second"}
        for key in ("largest", "beyond"):
            result[key]["greedy"] = held[key]["greedy"]
    result["at_equal_energy"] = at_equal_energy(points, records, seed)
    result["best"] = {
        name: best(group, records_of(group, points, records), seed) for name, group in groups.items()
        if not name.endswith(":energy") and any(point.at > 0 for point in group)
    }  # fmt: skip
    return result


def effects(points: Sequence[curves.Point], units: Sequence[Unit], records: list[dict]) -> dict:
    """`single`: for every head, by how much the score is better with this head alone rewound: by measure on all items,
    and on items 0, 2, .. (`chosen_on`), which order the heads."""
    _, sets = curves.numbered(points)
    change = {name: values[sets] - values[1] for name, values in curves.units(records).items()}
    rows = []
    for i, (layer, unit) in enumerate(units):
        better = {name: {"mean": float(values[i].mean()), "chosen_on": float(values[i, ::2].mean())}
                  for name, values in change.items()}  # fmt: skip
        rows.append({"layer": layer, "unit": unit, "better": better})
    return {"single": rows}


# ---------------------------------------------------------------- figures


def draw(path: Path, payload: dict) -> None:
    """The curves over the share of heads, and in a second file those over the share of the update."""
    shades = dict(zip(NAMES, figures.colours(len(NAMES)), strict=True))
    shades |= dict.fromkeys(("random", "random_layer"), figures.colour("random"))
    lines = {"random_layer": "--", "most": "--", "contrast": "-."}
    looks = {
        name: {"label": label, "color": shades[name], "linestyle": lines.get(name, "-"), "marker": mark, "ms": 2.5}
        for (name, label), mark in zip(NAMES.items(), figures.MARKERS, strict=False)
    }
    looks["greedy"]["label"] += " (half of the items)"
    curves.draw(path, payload, looks, "share of heads that are the base's")
    drawn = {row["curve"] for row in payload["points"]}
    by_energy = {f"{name}:energy": look for name, look in looks.items() if f"{name}:energy" in drawn}
    if by_energy:
        curves.draw(path.with_name(f"{path.name}.energy"), payload, by_energy, "share of ‖ΔW‖² that is rewound")


def say(payload: dict) -> None:
    measured = {row["curve"] for row in payload["points"]}
    labels = {name: label for name, label in NAMES.items() if name in measured}
    by_energy = {f"{name}:energy": f"{labels[name]}, share of ‖ΔW‖²" for name in BY_ENERGY if name in labels}
    curves.say(payload, labels | by_energy, "p*")
    for order in [name for name in ("importance", "greedy", "random") if name in payload["best"]]:
        by_measure = payload["best"][order]
        for measure in [name for name in evaluation.DECIDING if name in by_measure]:
            row = by_measure[measure]
            cli.say(
                f"{NAMES[order]}, {measure}: best share {row['at']:.2f} on half of the items; on the others better "
                f"than the checkpoint by {stats.told(row, '+.5f')}"
            )


# ---------------------------------------------------------------- the command


def orders_asked_for(args, study: Study, rewinding: Rewinding) -> list[Order]:
    """All orders except the greedy one, which has to be measured.

    Raises:
        InputError: contrast without a run to compare with.
    """
    wanted = list(study.value(args.orders, "--orders", "spectral.rewind.orders", ORDERS))
    if args.write and args.order_from and not args.orders:
        wanted = []
    units, pair, orders = rewinding.units, rewinding.pair, []
    values = heads.importance(rewinding.found, rewinding.by_query)
    if args.order_from:
        orders.append(made.read_order(args.order_from, args.importance, units, rewinding.by_query, pair.n_layers))
    least = made.ranked(units, values[args.importance])
    simple = {"importance": least, "most": least[::-1]}
    draws = int(study.value(args.draws, "--draws", "spectral.rewind.draws", DRAWS))
    for name in wanted:
        if name in simple:
            orders.append(Order(name, simple[name]))
        elif name.startswith("random"):
            orders += made.random_orders(units, name, study.seed, draws)
        elif name == "contrast":
            reference = args.reference or next(iter((study.get("runs") or {}).values()), None)
            if reference is None and args.orders:
                raise InputError("--orders contrast needs a run to compare with; give --reference RUN")
            if reference is not None:
                other = refs.run(reference)[-1]
                other_heads = heads.measured(pair.base_ref, [other])[0][other.step]
                other_values = heads.importance(other_heads, rewinding.by_query)["relative"]
                orders.append(Order(name, made.ranked(units, heads.contrast(values["relative"], other_values))))
    return orders


def greedy(trial: Trial, rewinding: Rewinding, output: Path, by: str | None) -> Order:
    """The order by what each head costs alone on items 0, 2, ..; measured first, into a separate file."""
    known = trial.bench.measures()
    if by not in (None, *known):
        raise InputError(f"--by {by} is not measured; the measures are {', '.join(known)}")
    path, points = output.with_name(f"{output.stem}.singles.json"), rewinding.singles()
    measure(
        trial, path, points, partial(effects, points, rewinding.units), {"of": kind_of(rewinding)}, "rewind-singles"
    )
    trial.process.wait()  # the first process wrote it
    rows = results.read_json(path, "rewind-singles", allow_limited=True)[0]["single"]
    by = by or next(name for name in ("nll_per_byte", "retrieval_readout", *rows[0]["better"]) if name in known)
    return Order("greedy", made.ranked(rewinding.units, [-row["better"][by]["chosen_on"] for row in rows]))


def kind_of(rewinding: Rewinding) -> str:
    return "query heads" if rewinding.by_query else "units"


def facts_of(rewinding: Rewinding) -> dict:
    """What the result records about the heads: their kind and number, and which tensors are rewound `along`."""
    pair, edits = rewinding.pair, rewinding.recipe(rewinding.units[:1]).edits
    along = [edit.tensor for edit in edits if len(pair.target.shape(edit.tensor)) == 1]
    along = sorted({pair.arch.canonical(name).split(".", 2)[2] for name in along})
    return {"of": kind_of(rewinding), "n_heads": len(rewinding.units), "along": along}


def write(args, study: Study, rewinding: Rewinding, orders: list[Order], shares: list[float]) -> None:
    """Write one model of one order as a folder, verified."""
    if len(orders) != 1 or len(shares) != 1:
        raise InputError("--write takes one order and one share: give one --orders and one --shares")
    chosen = orders[0].chain[: round(shares[0] * len(rewinding.units))]
    if not chosen:
        raise InputError(f"--write: {shares[0]:.0%} of {len(rewinding.units)} heads is no head; give a larger share")
    curves.alone("--write", args)
    curves.write(rewinding.pair, rewinding.recipe(chosen), args.write, args, study)


def shares_asked_for(args, study: Study) -> list[float]:
    if args.shares:
        wrong = next((share for share in args.shares if not 0 <= share <= 100), None)
        if wrong is not None:
            raise InputError(f"--shares {wrong:g}: a share must be between 0 and 100 percent")
        return sorted({share / 100 for share in args.shares})
    stride = int(study.value(args.stride, "--stride", "spectral.rewind.stride", STRIDE))
    return [share / 100 for share in sorted({*range(0, 100, stride), 100})]


def build_parser():
    p = curves.parser(__doc__, "spectral/rewind.json")
    g = p.add_argument_group("which heads")
    text = f"{', '.join(ORDERS)}; default: the study's spectral.rewind.orders, else all (contrast if other runs exist)"
    g.add_argument("--orders", nargs="+", choices=ORDERS, metavar="ORDER", help=text)
    text = "also the order in a file: a result of heads.py, least important first, or a list of [layer, head]"
    g.add_argument("--order-from", metavar="FILE", help=text)
    text = f"importance that orders the heads ({', '.join(heads.KINDS)}; for a file any that it has); default relative"
    g.add_argument("--importance", default="relative", metavar="KIND", help=text)
    g.add_argument("--reference", metavar="RUN", help="run for the contrast; default: the first of the study's runs")
    text = f"for the greedy order: {', '.join(evaluation.DECIDING)}; default: the loss, else retrieval or the task"
    g.add_argument("--by", choices=evaluation.DECIDING, metavar="MEASURE", help=text)
    text = f"random orders of each kind; default: the study's spectral.rewind.draws, else {DRAWS}"
    g.add_argument("--draws", type=cli.positive, metavar="N", help=text)
    text = f"a point every N percent of the heads; default: the study's spectral.rewind.stride, else {STRIDE}"
    g.add_argument("--stride", type=cli.positive, metavar="N", help=text)
    g.add_argument("--shares", nargs="+", type=float, metavar="P", help="points at these percentages instead")
    text = "rewind single query heads (their q and o) instead of whole units"
    g.add_argument("--qo-only", action="store_true", help=text)
    text = "measure nothing: write the model of one order and one share as a folder"
    g.add_argument("--write", metavar="FOLDER", help=text)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    if args.importance not in heads.KINDS and not args.order_from:
        raise InputError(f"--importance {args.importance}: choose from {', '.join(heads.KINDS)}")
    args.output = args.output or args.write  # nothing else is written
    variant = ["qo-only" * args.qo_only, f"importance-{args.importance}" * (args.importance != "relative")]
    with curves.opened(args, "rewind", *variant) as (study, output, pair):
        shares = shares_asked_for(args, study)
        by_step, cosines = heads.measured(pair.base_ref, [pair.target_ref])
        updates.warn_if_not_one_run(pair.base_ref, pair.target_ref, cosines[pair.target_ref.step])
        rewinding = Rewinding(pair, by_step[pair.target_ref.step], args.qo_only)
        orders, facts = orders_asked_for(args, study, rewinding), facts_of(rewinding)
        if facts["along"]:
            coupled = "; a norm over all heads couples them" * any("norm" in name for name in facts["along"])
            cli.say(f"rewound along with the heads: their parts of {', '.join(facts['along'])}{coupled}")
        if args.write:
            write(args, study, rewinding, orders, shares)
            return
        trial = curves.trial_of(args, study, pair)
        if "greedy" in study.value(args.orders, "--orders", "spectral.rewind.orders", ORDERS):
            orders.append(greedy(trial, rewinding, output, args.by))
        facts["orders"] = [{"name": order.name, "draw": order.draw, "chain": order.chain} for order in orders]
        points = rewinding.points(orders, shares)
        measure(trial, output, points, partial(summarise, points, study.seed), facts, SCHEMA, draw, say)


def measure(
    trial: Trial, path: Path, points: Sequence[curves.Point], summarised: Callable[[list[dict]], dict], facts: dict,
    schema: str, show: Callable[[Path, dict], None] | None = None, told: Callable[[dict], None] | None = None,
) -> None:  # fmt: skip
    """Measure every set of heads once and write `path`."""
    cli.say(f"{len(curves.numbered(points)[0])} different sets of heads")
    curves.measure(trial, path, points, summarised, show, facts, schema, told)


if __name__ == "__main__":
    cli.run(main)
