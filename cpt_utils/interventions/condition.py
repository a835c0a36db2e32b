"""The one type for whatever is done to a model while it is measured.

A swap, silenced neurons, a random control of either: each is a name, a key that tells it from every other, and a way to
do it. `measures/conditions.py` measures a list of them, whatever they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Condition:
    """Something done to a model for as long as it is measured.

    Attributes:
        name: for people and figures ("semantic_hub"); every random control is called "random".
        key: everything that tells it from other conditions (layers, component, heads, rank, share, neurons, alpha,
            seed), as JSON can hold it. What was measured is kept under name and key.
        apply: model -> context manager in which the model is changed; afterwards every bit is as before.
        facts: what stands in its record beside what is measured; tells nothing apart.
        of: which model it is done to; the runner's caller knows how to load it.
    """

    name: str
    key: dict
    apply: Callable[[Any], contextlib.AbstractContextManager] = contextlib.nullcontext
    facts: dict = field(default_factory=dict)
    of: str = "target"

    @functools.cached_property
    def id(self) -> str:
        """Name and key, short enough for a line of a journal."""
        return f"{self.name} {digest(self.key)}"


def digest(value) -> str:
    """16 hexadecimal digits that are the same for the same JSON.

    Raises:
        TypeError: something JSON cannot hold, whose text would differ from run to run.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def function_facts(function: Callable) -> dict:
    """What a function is called, and the values it was made with: of a partial, a closure, an object with a method.

    Raises:
        ValueError: a lambda, or a value that JSON cannot hold: two of them could not be told apart.
    """
    values: dict = {}
    if isinstance(function, functools.partial):
        inner = function_facts(function.func)
        signature = inspect.signature(function.func)
        named = signature.bind_partial(*function.args, **function.keywords).arguments
        values = inner.get("parameters", {}) | dict(named)
        name = inner["function"]
    elif inspect.ismethod(function) and not isinstance(function.__self__, type):
        inner = function_facts(function.__self__)
        name, values = f"{inner['function']}.{function.__name__}", inner.get("parameters", {})
    elif dataclasses.is_dataclass(function) and not isinstance(function, type):
        name, values = type(function).__name__, dataclasses.asdict(function)
    elif inspect.isfunction(function):
        # With the function that made it: two of these may call what they make by one name.
        name, values = function.__qualname__.replace("<locals>.", ""), dict(inspect.getclosurevars(function).nonlocals)
        values |= {
            key: parameter.default
            for key, parameter in inspect.signature(function).parameters.items()
            if parameter.default is not parameter.empty
        }
    else:
        name = getattr(function, "__name__", type(function).__name__)
        if not inspect.isbuiltin(function) and vars(function):
            values = dict(vars(function))
    if name.endswith("<lambda>"):
        raise ValueError("a lambda cannot be told from another one: give a function with a name")
    try:
        json.dumps(values)
    except TypeError as error:
        raise ValueError(f"the parameters of {name} tell it apart, and JSON cannot hold them: {error}") from None
    return {"function": name} | ({"parameters": values} if values else {})
