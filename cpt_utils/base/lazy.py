"""Libraries that take a second or more to import, imported at the first use of an attribute.

So `--help` and a wrong flag are answered at once, and modules still import everything at the top.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import types
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Disable garbage collection, for code that makes a million small objects which stay, or form no cycles."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class Later(types.ModuleType):
    """A placeholder for a module, which is imported at the first attribute access."""

    def __getattr__(self, name: str):
        return getattr(importlib.import_module(self.__name__), name)


np = Later("numpy")
pydantic = Later("pydantic")
torch = Later("torch")
transformers = Later("transformers")
