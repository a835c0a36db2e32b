"""Which models and languages sr_experiment.py measures, and what their files are called."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from cpt_utils.base import languages, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import identity, refs
from cpt_utils.measures import gate


@dataclasses.dataclass(frozen=True)
class Job:
    """A model to measure, or its untrained twin, and the file of the result."""

    ref: refs.ModelRef
    path: Path
    untrained: bool = False


def targets(args, study: Study) -> list[refs.ModelRef]:
    """The models to measure: those given, else the checkpoints of the study's run; in a study also its base."""
    named = refs.models(args.model_path, args.steps) if args.model_path else None
    spec = study.get("base") if args.model_path else study.value(None, "--model_path", "base")
    if spec is None:
        return named
    # The base is step 0, whatever its name says: it may itself be a checkpoint of a longer training.
    base = dataclasses.replace(refs.model(spec), step=None)
    if named is None:
        return [base, *refs.run(study.value(None, "--model_path", "run"), args.steps)]
    same_name = [ref for ref in named if ref.model_id == base.model_id]
    if same_name and not any(is_at(ref, base) for ref in same_name):  # another model has that name and file
        return named
    others = [ref for ref in named if ref not in same_name]
    return [base, *others] if same_name or not args.no_untrained else others


def is_at(ref: refs.ModelRef, other: refs.ModelRef) -> bool:
    """Whether both are the same location, however it is spelled."""
    if ref.is_local and other.is_local:
        return os.path.samefile(ref.spec, other.spec)
    return ref.spec == other.spec


def untrained_twins(models: list[refs.ModelRef], folder: Path) -> dict[refs.ModelRef, Job]:
    """The untrained twin of every model, one per configuration.

    Its file is an existing one for this configuration; else untrained.json or, if another configuration has taken that
    name, untrained.<model id>.json.
    """
    existing = {path: shape_in(path) for path in sorted(folder.glob("untrained*.json"))}
    shapes = {ref: identity.shape_hash(identity.untrained_like(ref.config())) for ref in models}
    made: dict[str, Job] = {}
    for ref, shape in shapes.items():
        if shape not in made:
            usual = folder / "untrained.json"
            new = usual if existing.get(usual) is None else folder / f"untrained.{ref.model_id}.json"
            path = next((path for path, other in existing.items() if other == shape), new)
            existing[path], made[shape] = shape, Job(ref, path, untrained=True)
    return {ref: made[shape] for ref, shape in shapes.items()}


def shape_in(path: Path) -> str | None:
    """The hash of the configuration of the untrained model at `path`; None if the file does not say."""
    try:
        models = results.read_json(path, gate.RETRIEVAL, allow_limited=True)[1]["models"]
        return identity.shape_hash(identity.untrained_like(models["untrained_like"]))
    except (InputError, KeyError):  # reported when the file is read as a result
        return None


def is_whole(study: Study, args, models: list[refs.ModelRef]) -> bool:
    """Whether `models` make the folder's main figure: in a study the base and the whole run, not parts or swaps."""
    if len(models) < 2 or not (study and (args.model_path or args.steps)):
        return len(models) > 1
    if not study.get("run") or not study.get("base"):
        return False
    try:
        run = refs.run(study.get("run"))
    except InputError:  # it does not exist (yet)
        return False
    return {ref.model_id for ref in models} == {ref.model_id for ref in (refs.model(study.get("base")), *run)}


def figure_name(asked: list[str] | None, models: list[refs.ModelRef]) -> str:
    """The models as asked for, runs by their own name: two runs of many checkpoints must not give an endless name."""
    if not asked:
        return "+".join(ref.model_id for ref in models)[:150]
    names = [refs.local_id(text) if Path(text).is_dir() else refs.ModelRef(text).model_id for text in asked]
    return "+".join(names)[:150]


def sides(args, study: Study) -> tuple[str, str]:
    """Base and target language as given; in a study's own folder a language has the study's spelling."""
    pair = []
    for side, flag, given in (("base", "--base", args.base), ("target", "--target", args.target)):
        in_study = study.get(f"languages.{side}") if args.artifact_out is None else None
        asked = in_study if in_study and given and languages.same(in_study, given) else given
        pair.append(study.value(asked, flag, f"languages.{side}"))
    return tuple(pair)


def study_homes(study: Study) -> tuple[str | list | None, refs.ModelRef | None]:
    """Where to look for the tokenizer of a checkpoint without its files: the study's run folder, then its base."""
    base = study.get("base")
    return study.get("run"), refs.model(base) if base else None
