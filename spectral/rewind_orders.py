"""Orders in which heads are rewound: by a value, at random, at random within layers, or as read from a file."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import cli, results
from cpt_utils.base.errors import InputError

heads = cli.sibling("spectral/heads.py")

Unit = tuple[int, int]  # layer and unit, or layer and query head


@dataclass(frozen=True)
class Order:
    """Heads in the order in which they are rewound; `draw`: the number of a random order."""

    name: str
    chain: tuple[Unit, ...]
    draw: int = 0


def ranked(units: Sequence[Unit], values: Iterable[float]) -> tuple[Unit, ...]:
    """The units by their values, least first; ties keep the order of `units`."""
    values = list(values)
    return tuple(units[i] for i in sorted(range(len(units)), key=lambda i: values[i]))


def within_layers(units: Sequence[Unit], rng: random.Random) -> tuple[Unit, ...]:
    """A random order in rounds of one head per layer, so that every prefix is balanced over layers."""
    layers: dict[int, list[Unit]] = {}
    for unit in units:
        layers.setdefault(unit[0], []).append(unit)
    for in_layer in layers.values():
        rng.shuffle(in_layer)
    rounds, due = max(map(len, layers.values())), []
    for in_layer in layers.values():  # a layer with fewer heads than others takes part in fewer rounds, evenly spaced
        due += [(i * rounds // len(in_layer), rng.random(), unit) for i, unit in enumerate(in_layer)]
    return tuple(unit for *_, unit in sorted(due))


def random_orders(units: Sequence[Unit], name: str, seed: int, draws: int) -> list[Order]:
    orders = []
    for draw in range(draws):
        rng = random.Random(f"{name} {seed} {draw}")
        chain = within_layers(units, rng) if name == "random_layer" else tuple(rng.sample(units, len(units)))
        orders.append(Order(name, chain, draw))
    return orders


def read_order(path: str, kind: str, units: Sequence[Unit], by_query: bool, n_layers: int) -> Order:
    """The order in a file: a result of heads.py, least important first by `kind`, or a list of [layer, head].

    Raises:
        InputError: no such file, a head that does not exist or comes twice, an unknown kind, or another model.
    """
    try:
        plain = json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else None
    except ValueError:
        plain = None  # read_json reports it
    what = "query head" if by_query else "unit"
    if isinstance(plain, list):
        chain = [tuple(entry) if isinstance(entry, list) else entry for entry in plain]
    else:
        payload, _ = results.read_json(path, heads.SCHEMA, allow_limited=True, n_layers=n_layers)
        try:
            rows = [((row["layer"], row["unit"]), row["importance"]) for row in payload["heads"]]
            if by_query:
                rows = [((row["layer"], query["head"]), query["importance"])
                        for row in payload["heads"] for query in row["query_heads"]]  # fmt: skip
            missing = next((values for _, values in rows if kind not in values), None)
        except (KeyError, TypeError):
            raise InputError(f"{path} is neither a result of heads.py nor a list of [layer, head]") from None
        if missing is not None:
            raise InputError(f"{path} has no importance {kind}; it has {', '.join(missing)}")
        infinite = next((unit for unit, values in rows if not isinstance(values[kind], int | float)), None)
        if infinite is not None:
            why = f"has no finite importance {kind}, as its base is zero; give --importance rms"
            raise InputError(f"{path}: {what} {list(infinite)} {why}")
        chain = list(ranked([unit for unit, _ in rows], [values[kind] for _, values in rows]))
    seen, existing = set(), set(units)
    for unit in chain:
        exists = isinstance(unit, tuple) and all(type(number) is int for number in unit) and unit in existing
        if not exists or unit in seen:
            why = "comes twice" if exists else f"does not exist: there are {len(units)} {what}s in {n_layers} layers"
            raise InputError(f"{path}: {what} {list(unit) if isinstance(unit, tuple) else unit} {why}")
        seen.add(unit)
    if not chain:
        raise InputError(f"{path} names no heads")
    return Order("file", tuple(chain))
