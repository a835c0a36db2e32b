"""Orders in which heads are put back: by a value, at random, at random within layers, or as a file says."""

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
    """Heads, those that are put back first at the front; `draw`: its number among random ones."""

    name: str
    chain: tuple[Unit, ...]
    draw: int = 0


def ranked(units: Sequence[Unit], values: Iterable[float]) -> tuple[Unit, ...]:
    """The units by their values, least first; equal ones in their own order."""
    values = list(values)
    return tuple(units[i] for i in sorted(range(len(units)), key=lambda i: values[i]))


def within_layers(units: Sequence[Unit], rng: random.Random) -> tuple[Unit, ...]:
    """A random order every beginning of which has as many heads of each layer, give or take one of a round."""
    layers: dict[int, list[Unit]] = {}
    for unit in units:
        layers.setdefault(unit[0], []).append(unit)
    for own in layers.values():
        rng.shuffle(own)
    rounds, due = max(map(len, layers.values())), []
    for own in layers.values():  # a layer with fewer heads than others has a part in as many rounds, spread over all
        due += [(i * rounds // len(own), rng.random(), unit) for i, unit in enumerate(own)]
    return tuple(unit for *_, unit in sorted(due))


def random_orders(units: Sequence[Unit], name: str, seed: int, draws: int) -> list[Order]:
    found = []
    for draw in range(draws):
        rng = random.Random(f"{name} {seed} {draw}")
        chain = within_layers(units, rng) if name == "random_layer" else tuple(rng.sample(units, len(units)))
        found.append(Order(name, chain, draw))
    return found


def read_order(path: str, kind: str, units: Sequence[Unit], by_query: bool, n_layers: int) -> Order:
    """The order of a file: a result of heads.py, by a kind of importance, least first, or a list of [layer, head].

    Raises:
        InputError: no such file, a head that is not there or comes twice, or another kind or model.
    """
    try:
        plain = json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else None
    except ValueError:
        plain = None  # said by read_json
    what = "query head" if by_query else "unit"
    if isinstance(plain, list):
        chain = [tuple(one) if isinstance(one, list) else one for one in plain]
    else:
        payload, _ = results.read_json(path, heads.SCHEMA, allow_limited=True, n_layers=n_layers)
        try:
            rows = [((row["layer"], row["unit"]), row["importance"]) for row in payload["heads"]]
            if by_query:
                rows = [((row["layer"], one["head"]), one["importance"])
                        for row in payload["heads"] for one in row["query_heads"]]  # fmt: skip
            missing = next((values for _, values in rows if kind not in values), None)
        except (KeyError, TypeError):
            raise InputError(f"{path} is neither a result of heads.py nor a list of [layer, head]") from None
        if missing is not None:
            raise InputError(f"{path} has no importance {kind}; it has {', '.join(missing)}")
        lost = next((unit for unit, values in rows if not isinstance(values[kind], int | float)), None)
        if lost is not None:
            why = f"has no finite importance {kind}, its base is zeros; give --importance rms"
            raise InputError(f"{path}: {what} {list(lost)} {why}")
        chain = list(ranked([unit for unit, _ in rows], [values[kind] for _, values in rows]))
    seen, there = set(), set(units)
    for unit in chain:
        named = isinstance(unit, tuple) and all(type(one) is int for one in unit) and unit in there
        if not named or unit in seen:
            why = "comes twice" if named else f"does not exist: there are {len(units)} {what}s in {n_layers} layers"
            raise InputError(f"{path}: {what} {list(unit) if isinstance(unit, tuple) else unit} {why}")
        seen.add(unit)
    if not chain:
        raise InputError(f"{path} names no heads")
    return Order("file", tuple(chain))
