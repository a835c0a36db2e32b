"""Opening the tensors of any model: a folder, a hub repository, or an adapter merged into its base as it is read."""

from __future__ import annotations

import os
from collections.abc import Iterable

from cpt_utils.base import cli
from cpt_utils.checkpoints.merged import AdapterFolder
from cpt_utils.checkpoints.refs import ModelRef
from cpt_utils.checkpoints.tensors import TensorFolder


def open_folder(
    where: ModelRef | str | os.PathLike, base: ModelRef | None = None, lazy: bool = False, codes: bool = False
) -> TensorFolder | AdapterFolder:
    """The tensors of a model, or of an adapter merged into its base: plain weights that fit its config.json.

    Args:
        base: what an adapter is merged into if the base that it names is not here.
        lazy: for a hub model, fetch only configuration and index now, and shards when they are read (or `fetch` is
            called). Code that reads the files directly (`path`, `entry`) must call `fetch` first.
        codes: also open a quantised model, for code that leaves its weights to transformers.

    Raises:
        InputError: see `formats`; formats.Quantised for codes, which in a lazy model may be when a shard is read.
    """
    if not isinstance(where, ModelRef) and os.path.isdir(where):
        where = ModelRef(os.fspath(where))
    if isinstance(where, ModelRef) and where.is_adapter:
        return AdapterFolder(where, base, lazy)
    if isinstance(where, ModelRef):
        where.say_adapter_beside()
    return TensorFolder(where, lazy).refuse_unfit(codes)


def look_over(found: Iterable[ModelRef]) -> None:
    """Check before measuring that all local checkpoints of a run can be read, and report those with the same weights.

    Branches created in advance and folders copied by mistake repeat a model, and each copy counts as a checkpoint.

    Raises:
        InputError: a local checkpoint is incomplete, or cannot be read as a model.
    """
    alike: dict[str, list[ModelRef]] = {}
    for ref in found:
        if ref.is_local and not ref.is_adapter:  # the caller may have to give an adapter's base
            ref.config()
            open_folder(ref, codes=True).close()
        sample = ref.contents
        if ref.step is not None and sample:
            alike.setdefault(sample, []).append(ref)
    for same in alike.values():
        if len(same) > 1:
            steps = ", ".join(str(ref.step) for ref in same)
            cli.once(
                f"the checkpoints of steps {steps} hold the same weights; each counts as a separate checkpoint unless "
                "--steps leaves it out"
            )
