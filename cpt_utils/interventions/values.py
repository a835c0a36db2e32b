"""The values of an edited tensor, in blocks of rows, as both engines (`on_disk`, `in_memory`) write them."""

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
    """The edited tensor in consecutive blocks of rows, in the dtype that C has on disk.

    Raises:
        InputError: NaN or infinity in the values taken from B, or a value beyond the range of C's dtype.
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
    """Rows `start` to `stop` of a tensor that one edit replaces entirely."""
    base = pair.base.get(edit.base_tensor).reshape(target.shape)[start:stop]
    return _converted(pair, edit, base, target[start:stop], target.dtype)


def _fill(pair: Pair, edit: Edit, target: torch.Tensor, block: torch.Tensor, start: int, stop: int) -> None:
    """Write the edit's values into `block`, which holds rows `start` to `stop`."""
    base = pair.base.get(edit.base_tensor)
    if edit.expert is not None:
        if start <= edit.expert < stop:
            matrices = (archs.take(matrix, edit.dim, edit.index) for matrix in (base[edit.expert], target[edit.expert]))
            region = archs.take(block[edit.expert - start], edit.dim, edit.index)
            region.copy_(_converted(pair, edit, *matrices, block.dtype))
        return
    positions = slice(0, target.shape[edit.dim]) if edit.index is None else edit.index
    if edit.dim > 0:
        base, target = base[start:stop], target[start:stop]
        local = absolute = positions
    elif isinstance(positions, slice):
        first, last = max(positions.start, start), min(positions.stop, stop)
        if first >= last:
            return
        local, absolute = slice(first - start, last - start), slice(first, last)
    else:
        absolute = positions[(positions >= start) & (positions < stop)]
        if not len(absolute):
            return
        local = absolute - start
    regions = (archs.take(tensor, edit.dim, absolute) for tensor in (base, target))
    values = _converted(pair, edit, *regions, block.dtype)
    if isinstance(local, slice):
        block.narrow(edit.dim, local.start, local.stop - local.start).copy_(values)
    else:
        block.index_copy_(edit.dim, local.to(torch.long), values)


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
    """The dtype conversions that the recipe needs: "float16 -> bfloat16" -> number of tensors."""
    counts: dict[str, int] = {}
    for name, edits in recipe.by_tensor().items():
        target_dtype = pair.target.dtype(name)
        for base_dtype in {pair.base.dtype(edit.base_tensor) for edit in edits} - {target_dtype}:
            key = f"{name_of(base_dtype)} -> {name_of(target_dtype)}"
            counts[key] = counts.get(key, 0) + 1
    return counts


def say_conversions(pair: Pair, recipe: Recipe) -> dict[str, int]:
    """Print the dtype conversions in one line; returns them."""
    counts = conversions(pair, recipe)
    if counts:
        changes = ", ".join(f"{change} ({count} tensors)" for change, count in counts.items())
        cli.say(f"the base's tensors are converted to the dtype of the target: {changes}")
    return counts


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with at least one dimension, for indexing by row."""
    return tensor.view(1) if tensor.dim() == 0 else tensor


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
