"""A swap in a loaded model of the target, undone exactly afterwards; nothing is written."""

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
    """Applies recipes to a loaded model of C, with exactly the values that the written folder would have.

    A swap replaces tensors of the model and puts the originals back at the end, so leaving it restores every bit at no
    cost. Tensors computed for one recipe are cached for the next ones, up to `cache_bytes`.
    If several tensors on disk are one in memory (experts), the swap works on a copy of that tensor.
    """

    pair: Pair
    cache_bytes: int = 4 << 30
    _cache: OrderedDict = field(default_factory=OrderedDict, repr=False)
    _said: bool = field(default=False, repr=False)

    def condition(self, name: str, recipe: Recipe, **facts) -> Condition:
        """The recipe as a condition of the loaded target; `facts` go into its record."""
        return Condition(name, recipe.key, functools.partial(self.applied, recipe=recipe), facts)

    @contextlib.contextmanager
    def applied(self, model: torch.nn.Module, recipe: Recipe) -> Iterator[torch.nn.Module]:
        """`model` with the recipe's edits, until the block ends (also by an exception).

        Raises:
            InputError: weights of the model are offloaded, or only one of two tied tensors is edited.
        """
        if any(parameter.is_meta for parameter in model.parameters()):
            raise InputError(
                f"{self.pair.target_ref.spec} does not fit entirely on the GPUs, as swaps in memory require"
            )
        if not self._said:
            values.say_conversions(self.pair, recipe)
            self._said = True
        grouped = recipe.by_tensor()
        locations = self.pair.arch.locations(grouped, model, self.pair.target.shape)
        replaced: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # id -> (tensor, original values)
        self._refuse_untying(model, set(grouped))
        try:
            for name, edits in grouped.items():
                location = locations[name]
                tensor = _held(model, location.name)
                seen_before = id(tensor) in replaced  # a head that is tied to the embeddings
                tensor, original = replaced.setdefault(id(tensor), (tensor, tensor.data))
                if location.whole:
                    new_values = self._values(name, edits, original)
                    if seen_before and not new_values.equal(tensor.data):
                        raise InputError(_untied(self.pair.base_ref, name))
                    tensor.data = new_values
                    continue
                new_values = self._values(name, edits, location.view(original))
                if tensor.data_ptr() == original.data_ptr():
                    tensor.data = original.clone()
                location.view(tensor.data).copy_(new_values)
            yield model
        finally:
            for tensor, original in replaced.values():
                tensor.data = original

    def _refuse_untying(self, model: torch.nn.Module, edited: set[str]) -> None:
        """Refuse to edit only one of two tensors that are tied in memory: in the written folder they would differ."""
        tied_candidates = self.pair.arch.embedding_tensors(self.pair.target.names())
        if edited.isdisjoint(tied_candidates):
            return
        by_tensor: dict[int, set[str]] = {}
        for name, location in self.pair.arch.locations(tied_candidates, model, self.pair.target.shape).items():
            by_tensor.setdefault(id(_held(model, location.name)), set()).add(name)
        for group in by_tensor.values():
            if edited & group and group - edited:
                raise InputError(_untied(self.pair.target_ref, min(group - edited)))

    def _values(self, name: str, edits: list[Edit], original: torch.Tensor) -> torch.Tensor:
        key = (name, original.dtype, str(original.device), json.dumps([edit.describe() for edit in edits]))
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        edited = _in_memory(self.pair, name, edits, original)
        if all(edit.function is None for edit in edits) and edited.nbytes <= self.cache_bytes:
            self._cache[key] = edited
            while sum(cached.nbytes for cached in self._cache.values()) > self.cache_bytes:
                self._cache.popitem(last=False)
        return edited


def _untied(ref: refs.ModelRef, name: str) -> str:
    return (
        f"{name} of {ref.spec} would differ from the embeddings that it is tied to in memory; write the swap as a "
        "folder, whose tensors loaders then do not tie"
    )


def _held(model: torch.nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer with a dotted name."""
    module, _, last = name.rpartition(".")
    return getattr(model.get_submodule(module), last)


def _in_memory(pair: Pair, name: str, edits: list[Edit], original: torch.Tensor) -> torch.Tensor:
    """The edited tensor as the model, which now holds `original`, would have loaded it from the written folder."""
    shape = pair.target.shape(name)
    if tuple(original.shape) != tuple(shape):
        raise InputError(
            f"{name} is {list(shape)} in {pair.target_ref.spec} and {list(original.shape)} in the loaded model; "
            "load the target itself"
        )
    edited = torch.empty(shape, dtype=original.dtype, device=original.device)
    flat, position = values.rows_of(edited), 0
    for block in values.blocks(pair, name, edits):
        flat[position : position + block.shape[0]].copy_(block)
        position += block.shape[0]
    return edited


@contextlib.contextmanager
def apply(model: torch.nn.Module, recipe: Recipe, pair: Pair) -> Iterator[torch.nn.Module]:
    """One recipe on a loaded model of C; see `Swapper` for many."""
    with Swapper(pair, cache_bytes=0).applied(model, recipe):
        yield model
