"""Whether a result was measured on given models, or on others of their run, according to its header."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from cpt_utils.checkpoints import refs
from cpt_utils.checkpoints.refs import ModelRef


def same_model(a: dict, b: dict) -> bool:
    """Whether two descriptions mean the same model: by weights if both are local, else by name and revision.

    For adapters compared by name, the bases must be the same, too.
    """
    if a.get("weights_sample") and b.get("weights_sample"):
        return a["weights_sample"] == b["weights_sample"]
    below = a.get("adapter_of"), b.get("adapter_of")
    if any(below) and not (all(below) and same_model(*below)):
        return False
    return a.get("model_id") == b.get("model_id") and a.get("revision") == b.get("revision")


def of(found: Iterable[ModelRef], base: str | None = None, run: str | list | None = None) -> list[dict]:
    """Descriptions of the models whose results may be used for `found`: these models, the other checkpoints of their
    runs, and the study's base and run.

    Checkpoints are described as they are now, so results from before a run was trained again do not count.
    """
    by_spec: dict[str, ModelRef] = {}
    for ref in found:
        by_spec[ref.spec] = ref
        parent = os.path.dirname(os.path.abspath(ref.spec))
        if ref.is_local and ref.step is not None:
            by_spec |= {other.spec: other for other in refs.checkpoints(os.path.relpath(parent))}
    for spec in filter(None, [base]):
        if os.path.isdir(spec) or not refs.looks_local(spec):
            by_spec.setdefault(spec, refs.model(spec))
    if run and (not isinstance(run, str) or os.path.isdir(run) or not refs.looks_local(run)):
        by_spec |= {ref.spec: ref for ref in refs.models(run) if ref.spec not in by_spec}
    return [ref.describe() for ref in by_spec.values()]


def belongs(measured: dict, models: list[dict]) -> bool:
    """Whether `measured` is one of `models`, or a checkpoint of the same run that is not among them."""
    if any(same_model(measured, model) for model in models):
        return True
    if measured.get("revision"):
        return ModelRef(measured["spec"]).repository in {ModelRef(model["spec"]).repository for model in models}
    measured_at = Path(measured["spec"]).resolve()
    steps = {Path(model["spec"]).resolve(): model.get("step") for model in models}
    # A known path with other weights was trained again since.
    return (
        measured_at not in steps
        and measured.get("step") is not None
        and measured_at.parent in {path.parent for path, step in steps.items() if step is not None}
    )
