"""The one type for everything that is done to a model while it is measured.

A swap, silenced neurons, a random control of either: each has a name, a key that identifies it, and a function that
applies it. `measures/conditions.py` measures any list of them.
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
    """A change to a model that lasts while it is measured.

    Attributes:
        name: for people and figures ("semantic_hub"); every random control is called "random".
        key: everything that distinguishes it from other conditions (layers, component, heads, rank, share, neurons,
            alpha, seed), as JSON values. Measurements are stored under name and key.
        apply: model -> context manager in which the model is changed; on exit every bit is restored.
        facts: further entries of its record; they do not identify the condition.
        of: the model that is changed; the caller of the runner knows how to load it.
    """

    name: str
    key: dict
    apply: Callable[[Any], contextlib.AbstractContextManager] = contextlib.nullcontext
    facts: dict = field(default_factory=dict)
    of: str = "target"

    @functools.cached_property
    def id(self) -> str:
        """Name and digest of the key, short enough for a line of a journal."""
        return f"{self.name} {digest(self.key)}"


def digest(value) -> str:
    """16 hexadecimal digits that are equal for equal JSON.

    Raises:
        TypeError: a value that JSON cannot hold; its text would differ from run to run.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def function_facts(function: Callable) -> dict:
    """The name of a function and the values it was made with; it may be a partial, a closure or a bound method.

    Raises:
        ValueError: a lambda, or a value that JSON cannot hold: two of them could not be distinguished.
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
        # Includes the name of the enclosing function: two of those may give their inner functions the same name.
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
        raise ValueError("two lambdas cannot be distinguished: give a function with a name")
    try:
        json.dumps(values)
    except TypeError as error:
        raise ValueError(f"the parameters of {name} identify it, but JSON cannot hold them: {error}") from None
    return {"function": name} | ({"parameters": values} if values else {})
