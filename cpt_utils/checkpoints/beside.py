"""How what a command measures differs from the study: such a result stands beside the study's, not in its place."""

from __future__ import annotations

import os

from cpt_utils.base import cli, languages
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study, dotted
from cpt_utils.checkpoints import refs


def name(study: Study, base=None, run=None, steps=None, limit=None, lang=None, last: bool = False) -> str:
    """The difference as part of a file's name; empty where there is none, and outside a study.

    Every argument is what the command line says, None where it says nothing: then it is the study's.

    Args:
        base, run: model references, `run` also a list.
        steps, limit: of --steps and --limit, parts of a run or of the data.
        lang: a language instead of the study's target.
        last: the result is of one model, in the study that of the run's last checkpoint.
    """
    if not study:
        return ""
    words = []
    if base is not None and _real_path(base) != _real_path(study.get("base", "")):
        words.append(f"base-{refs.model(base).model_id}")
    if run is not None or steps is not None:
        part = slice(-1 if last else 0, None)
        chosen = refs.run(run or study.value(None, "--study", "run"), steps)[part]
        if [_real_path(ref.spec) for ref in chosen] != _run_of(study)[part]:
            ids = [ref.model_id for ref in chosen]
            words.append(ids[0] if len(ids) == 1 else f"{ids[0]}-to-{ids[-1]}.{len(ids)}")
    if lang is not None and not languages.same(lang, study.get("languages.target", lang)):
        words.append(lang)
    if limit is not None:
        words.append(f"limit-{limit}")
    return dotted(*words)


def model_or_last(study: Study, model: str | None, run: list[str] | None, flag: str, steps) -> refs.ModelRef:
    """`model`; where none is given the last checkpoint, or that of `steps`, of `run`, or else of the study's run."""
    return refs.model(model) if model else refs.run(study.value(run, flag, "run"), steps)[-1]


def pair_asked_for(study: Study, args) -> tuple[str | None, list[str] | None, refs.ModelRef, refs.ModelRef]:
    """Of BASE, TARGET, --base, --run and --steps: base and run as they were named, for `name`; the models meant."""
    base = cli.named(args.base, args.named_base, "BASE and --base")
    run = cli.named(args.target, args.named_run, "TARGET and --run")
    base_ref = refs.model(study.value(base, "BASE", "base"))
    return base, run, base_ref, model_or_last(study, args.target, args.named_run, "TARGET", args.steps)


def run_asked_for(study: Study, named_run: list[str] | None):
    """The run of --run, else the study's; a list of one is that one."""
    run = named_run or study.get("run")
    return run[0] if isinstance(run, list) and len(run) == 1 else run


def _run_of(study: Study) -> list[str]:
    """Where the checkpoints of the study's run are; nowhere while it is yet to be made."""
    try:
        return [_real_path(ref.spec) for ref in refs.run(study.get("run") or [])]
    except InputError:
        return []


def _real_path(spec: str | os.PathLike) -> str:
    """What a reference to a model points at, however it is spelled; a hub name stays as it is."""
    return os.path.realpath(spec) if os.path.isdir(spec) else os.fspath(spec)
