"""A swap in a loaded model of the target, undone bit by bit; nothing is written."""

from __future__ import annotations

import contextlib
import functools
import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import refs
from cpt_utils.interventions import values
from cpt_utils.interventions.condition import Condition
from cpt_utils.interventions.surgery import Edit, Pair, Recipe


@dataclass
class Swapper:
    """Applies recipes to a loaded model of C, with exactly the numbers that the written folder would have.

    A swap exchanges the model's tensors for others and puts the model's own back at the end, so leaving it restores
    every bit and costs nothing. What was computed for one recipe is kept for the next ones up to `cache_bytes`.
    Where several tensors on disk are one in memory (experts), the swap works on a copy of that one.
    """

    pair: Pair
    cache_bytes: int = 4 << 30
    _cache: OrderedDict = field(default_factory=OrderedDict, repr=False)
    _said: bool = field(default=False, repr=False)

    def condition(self, name: str, recipe: Recipe, **facts) -> Condition:
        """The recipe as a condition of the loaded target; `facts` stand in its record."""
        return Condition(name, recipe.key, functools.partial(self.applied, recipe=recipe), facts)

    @contextlib.contextmanager
    def applied(self, model: torch.nn.Module, recipe: Recipe) -> Iterator[torch.nn.Module]:
        """`model` with the recipe's edits, until the block ends (also by an exception).

        Raises:
            InputError: weights of the model are offloaded, or one of two tied tensors alone is edited.
        """
        if any(parameter.is_meta for parameter in model.parameters()):
            raise InputError(
                f"{self.pair.target_ref.spec} does not fit on the GPUs as a whole, which swaps in memory need"
            )
        if not self._said:
            values.say_conversions(self.pair, recipe)
            self._said = True
        grouped = recipe.by_tensor()
        locations = self.pair.arch.locations(grouped, model, self.pair.target.shape)
        replaced: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # id -> (tensor, its own values)
        self._refuse_untying(model, set(grouped))
        try:
            for name, edits in grouped.items():
                location = locations[name]
                held = _held(model, location.name)
                again = id(held) in replaced  # a head that is tied to the embeddings
                held, original = replaced.setdefault(id(held), (held, held.data))
                if location.whole:
                    found = self._values(name, edits, original)
                    if again and not found.equal(held.data):
                        raise InputError(_untied(self.pair.base_ref, name))
                    held.data = found
                    continue
                found = self._values(name, edits, location.view(original))
                if held.data_ptr() == original.data_ptr():
                    held.data = original.clone()
                location.view(held.data).copy_(found)
            yield model
        finally:
            for held, original in replaced.values():
                held.data = original

    def _refuse_untying(self, model: torch.nn.Module, edited: set[str]) -> None:
        """Refuse an edit of one of two tensors on disk that are one in memory: the written folder would have two."""
        names = self.pair.arch.embedding_tensors(self.pair.target.names())
        if edited.isdisjoint(names):
            return
        together: dict[int, set[str]] = {}
        for name, location in self.pair.arch.locations(names, model, self.pair.target.shape).items():
            together.setdefault(id(_held(model, location.name)), set()).add(name)
        for group in together.values():
            if edited & group and group - edited:
                raise InputError(_untied(self.pair.target_ref, min(group - edited)))

    def _values(self, name: str, edits: list[Edit], original: torch.Tensor) -> torch.Tensor:
        key = (name, original.dtype, str(original.device), json.dumps([edit.describe() for edit in edits]))
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        found = _in_memory(self.pair, name, edits, original)
        if all(edit.function is None for edit in edits) and found.nbytes <= self.cache_bytes:
            self._cache[key] = found
            while sum(held.nbytes for held in self._cache.values()) > self.cache_bytes:
                self._cache.popitem(last=False)
        return found


def _untied(ref: refs.ModelRef, name: str) -> str:
    return (
        f"{name} of {ref.spec} would differ from the embeddings that it is tied to in memory; write the swap as a "
        "folder, which loaders then do not tie"
    )


def _held(model: torch.nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer of a dotted name."""
    module, _, last = name.rpartition(".")
    return getattr(model.get_submodule(module), last)


def _in_memory(pair: Pair, name: str, edits: list[Edit], original: torch.Tensor) -> torch.Tensor:
    """The edited tensor as the model, which holds `original` there, would have loaded it from the written folder."""
    shape = pair.target.shape(name)
    if tuple(original.shape) != tuple(shape):
        raise InputError(
            f"{name} is {list(shape)} in {pair.target_ref.spec} and {list(original.shape)} in the loaded model; "
            "load the target itself"
        )
    found = torch.empty(shape, dtype=original.dtype, device=original.device)
    flat, position = values.rows_of(found), 0
    for block in values.blocks(pair, name, edits):
        flat[position : position + block.shape[0]].copy_(block)
        position += block.shape[0]
    return found


@contextlib.contextmanager
def apply(model: torch.nn.Module, recipe: Recipe, pair: Pair) -> Iterator[torch.nn.Module]:
    """One recipe on a loaded model of C; see `Swapper` for many."""
    with Swapper(pair, cache_bytes=0).applied(model, recipe):
        yield model
