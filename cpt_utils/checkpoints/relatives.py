"""Whether a result was measured on the models at hand, or on others of their run, by what its header says of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from cpt_utils.checkpoints import refs
from cpt_utils.checkpoints.refs import ModelRef


def same_model(a: dict, b: dict) -> bool:
    """Whether two descriptions mean one model: by its weights where both are local, else by name and revision.

    Of an adapter the model that it changes must be the same, too.
    """
    if a.get("weights_sample") and b.get("weights_sample"):
        return a["weights_sample"] == b["weights_sample"]
    below = a.get("adapter_of"), b.get("adapter_of")
    if any(below) and not (all(below) and same_model(*below)):
        return False
    return a.get("model_id") == b.get("model_id") and a.get("revision") == b.get("revision")


def of(found: Iterable[ModelRef], base: str | None = None, run: str | list | None = None) -> list[dict]:
    """Descriptions of the models that a result may be of to serve `found`: themselves, the other checkpoints of their
    runs, and the study's base and run.

    All checkpoints are described as they are now, so that what was made before a run was trained again does not count.
    """
    known: dict[str, ModelRef] = {}
    for ref in found:
        known[ref.spec] = ref
        parent = os.path.dirname(os.path.abspath(ref.spec))
        if ref.is_local and ref.step is not None:
            known |= {other.spec: other for other in refs.checkpoints(os.path.relpath(parent))}
    for spec in filter(None, [base]):
        if os.path.isdir(spec) or not refs.looks_local(spec):
            known.setdefault(spec, refs.model(spec))
    if run and (not isinstance(run, str) or os.path.isdir(run) or not refs.looks_local(run)):
        known |= {ref.spec: ref for ref in refs.models(run) if ref.spec not in known}
    return [ref.describe() for ref in known.values()]


def belongs(measured: dict, models: list[dict]) -> bool:
    """Whether `measured` is one of `models`, or a checkpoint of the same run that is not among them."""
    if any(same_model(measured, model) for model in models):
        return True
    if measured.get("revision"):
        return ModelRef(measured["spec"]).repository in {ModelRef(model["spec"]).repository for model in models}
    measured_at = Path(measured["spec"]).resolve()
    known = {Path(model["spec"]).resolve(): model.get("step") for model in models}
    # A path that is among the models holds other weights now: it was trained again.
    return (
        measured_at not in known
        and measured.get("step") is not None
        and measured_at.parent in {path.parent for path, step in known.items() if step is not None}
    )
