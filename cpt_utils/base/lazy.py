"""Libraries that take a second or more to import, imported when something of them is first used.

So `--help` and a wrong flag are answered at once, and everything else imports what it needs at its top.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import types
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection, where a million small objects are made that stay, or that are no cycles."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class Later(types.ModuleType):
    """Stands for a module that is imported at the first attribute asked of it."""

    def __getattr__(self, name: str):
        return getattr(importlib.import_module(self.__name__), name)


np = Later("numpy")
pydantic = Later("pydantic")
torch = Later("torch")
transformers = Later("transformers")
