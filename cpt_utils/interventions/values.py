"""The values of an edited tensor, in blocks of rows, as every engine writes them."""

from __future__ import annotations

from collections.abc import Iterator

from cpt_utils.architectures import archs
from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import tensors
from cpt_utils.interventions.surgery import Edit, Pair, Recipe

BLOCK = 32 << 20  # bytes of a tensor worked on at a time


def blocks(pair: Pair, name: str, edits: list[Edit]) -> Iterator[torch.Tensor]:
    """The edited tensor in order, in blocks of rows, in the dtype that C has on disk.

    Raises:
        InputError: NaN or infinity in what is taken from B, or a value beyond the range of C's dtype.
    """
    flat = rows_of(pair.target.get(name))
    rows = flat.shape[0]
    whole = any(edit.function is not None and not edit.by_rows for edit in edits)
    for start, stop in [(0, rows)] if whole else tensors.chunks(rows, flat[:1].nbytes, BLOCK):
        if len(edits) == 1 and edits[0].whole:
            yield _values(pair, edits[0], flat, start, stop)
            continue
        block = flat[start:stop].clone()
        for edit in edits:
            _fill(pair, edit, flat, block, start, stop)
        yield block


def _values(pair: Pair, edit: Edit, target: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows `start` to `stop` of a tensor that is edited as a whole."""
    base = pair.base.get(edit.base_tensor).reshape(target.shape)[start:stop]
    return _converted(pair, edit, base, target[start:stop], target.dtype)


def _fill(pair: Pair, edit: Edit, target: torch.Tensor, block: torch.Tensor, start: int, stop: int) -> None:
    """Write the edit's values into `block`, which holds rows `start` to `stop`."""
    base = pair.base.get(edit.base_tensor)
    if edit.expert is not None:
        if start <= edit.expert < stop:
            matrices = (archs.take(held, edit.dim, edit.index) for held in (base[edit.expert], target[edit.expert]))
            region = archs.take(block[edit.expert - start], edit.dim, edit.index)
            region.copy_(_converted(pair, edit, *matrices, block.dtype))
        return
    positions = slice(0, target.shape[edit.dim]) if edit.index is None else edit.index
    if edit.dim > 0:
        base, target = base[start:stop], target[start:stop]
        here = there = positions
    elif isinstance(positions, slice):
        first, last = max(positions.start, start), min(positions.stop, stop)
        if first >= last:
            return
        here, there = slice(first - start, last - start), slice(first, last)
    else:
        there = positions[(positions >= start) & (positions < stop)]
        if not len(there):
            return
        here = there - start
    values = _converted(pair, edit, archs.take(base, edit.dim, there), archs.take(target, edit.dim, there), block.dtype)
    if isinstance(here, slice):
        block.narrow(edit.dim, here.start, here.stop - here.start).copy_(values)
    else:
        block.index_copy_(edit.dim, here.to(torch.long), values)


def _converted(pair: Pair, edit: Edit, base: torch.Tensor, target: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    refuse_not_finite(pair, edit, base)
    values = base
    if edit.function is not None:
        values = edit.function(base, target)
        if values.shape != target.shape or not tensors.is_finite(values):
            raise InputError(f"{edit.tensor}: {edit.describe()['function']} gave NaN, infinity or another shape")
    if values.dtype != dtype:
        wide, values = values, values.to(dtype)
        if not tensors.is_finite(values):
            raise InputError(
                f"{edit.tensor}: values up to {float(wide.abs().max()):.4g} do not fit into {name_of(dtype)}, the "
                f"dtype of {pair.target_ref.spec}; save the target in bfloat16 or float32 first"
            )
    return values


def refuse_not_finite(pair: Pair, edit: Edit, base: torch.Tensor) -> None:
    if not tensors.is_finite(base):
        raise InputError(
            f"{pair.base_ref.spec}: {edit.base_tensor} holds NaN or infinity; copy the model again, or train it again"
        )


def conversions(pair: Pair, recipe: Recipe) -> dict[str, int]:
    """Dtype changes that the recipe needs: "float16 -> bfloat16" and the number of tensors."""
    found: dict[str, int] = {}
    for name, edits in recipe.by_tensor().items():
        mine = pair.target.dtype(name)
        for theirs in {pair.base.dtype(edit.base_tensor) for edit in edits} - {mine}:
            key = f"{name_of(theirs)} -> {name_of(mine)}"
            found[key] = found.get(key, 0) + 1
    return found


def say_conversions(pair: Pair, recipe: Recipe) -> dict[str, int]:
    """Print dtype changes in one line; returns them."""
    found = conversions(pair, recipe)
    if found:
        changes = ", ".join(f"{change} ({count} tensors)" for change, count in found.items())
        cli.say(f"the base's tensors are converted to the dtype of the target: {changes}")
    return found


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with at least one dimension, so that it has rows."""
    return tensor.view(1) if tensor.dim() == 0 else tensor


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
