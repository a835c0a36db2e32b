"""Names for results that deviate from the study: they are written beside the study's results, not over them."""

from __future__ import annotations

import os

from cpt_utils.base import cli, languages
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study, dotted
from cpt_utils.checkpoints import refs


def name(study: Study, base=None, run=None, steps=None, limit=None, lang=None, last: bool = False) -> str:
    """The deviation as part of a file name; empty if there is none, or outside a study.

    Arguments are values from the command line; None means the study's value.

    Args:
        base, run: model references; `run` may be a list.
        steps, limit: values of --steps and --limit, which select a part of the run or of the data.
        lang: a language instead of the study's target.
        last: the result is of one model, in the study the run's last checkpoint.
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
    """`model`, else the last checkpoint of `run` (else of the study's run), with `steps` the last of these steps."""
    return refs.model(model) if model else refs.run(study.value(run, flag, "run"), steps)[-1]


def pair_asked_for(study: Study, args) -> tuple[str | None, list[str] | None, refs.ModelRef, refs.ModelRef]:
    """From BASE, TARGET, --base, --run and --steps: base and run as given, for `name`, and the two models."""
    base = cli.named(args.base, args.named_base, "BASE and --base")
    run = cli.named(args.target, args.named_run, "TARGET and --run")
    base_ref = refs.model(study.value(base, "BASE", "base"))
    return base, run, base_ref, model_or_last(study, args.target, args.named_run, "TARGET", args.steps)


def run_asked_for(study: Study, named_run: list[str] | None):
    """The run of --run, else the study's; a list of one is returned as its element."""
    run = named_run or study.get("run")
    return run[0] if isinstance(run, list) and len(run) == 1 else run


def _run_of(study: Study) -> list[str]:
    """The paths of the study's checkpoints; empty if the run does not exist yet."""
    try:
        return [_real_path(ref.spec) for ref in refs.run(study.get("run") or [])]
    except InputError:
        return []


def _real_path(spec: str | os.PathLike) -> str:
    """The real path of a local model reference, however it is spelled; a hub name is unchanged."""
    return os.path.realpath(spec) if os.path.isdir(spec) else os.fspath(spec)
