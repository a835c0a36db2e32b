"""Shared by the scripts of this folder: a base, the run compared with it, and the messages about both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, results
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import opening, refs
from cpt_utils.measures import compare
from cpt_utils.measures.compare import Changes


def parser(doc: str, run: str, output: str):
    """A parser with the flags of every comparison; `run`: the published flag for the run, `output`: OUT's default."""
    p = cli.parser(doc)
    p.add_argument("--base-model", "--base", metavar="B", help="base model; default: the study's base")
    text = "run of checkpoints, a single checkpoint, or a list; default: the study's run"
    p.add_argument(run, "--run", dest="run", nargs="+", metavar="RUN", help=text)
    p.add_argument("--output", metavar="OUT", help=f"JSON to write; default: {output}")
    p.add_argument("--device", default="cpu", help="where differences are taken: cpu, auto, cuda, cuda:1; default cpu")
    p.add_argument("--limit", type=cli.positive, metavar="N", help="only the first N checkpoints (for a try; marked)")
    cli.add_run_flags(p, drop=True)
    return p


@dataclass(frozen=True)
class Compared:
    """A base and the checkpoints `run` compared with it, out of `everything` that the run `target` contains."""

    base: refs.ModelRef
    target: str | list[str]
    everything: list[refs.ModelRef]
    run: list[refs.ModelRef]
    limit: int | None

    @classmethod
    def from_arguments(cls, args, study: Study, flag: str) -> Compared:
        base = refs.model(study.value(args.base_model, "--base-model", "base"))
        target = study.value(args.run, flag, "run")
        target = target[0] if isinstance(target, list) and len(target) == 1 else target
        return cls(base, target, refs.run(target), refs.run(target, args.steps)[: args.limit], args.limit)

    def facts(self) -> dict:
        """Check the models and return their facts for the header."""
        base = self.base
        if base.is_local and base.step is not None and all(ref.step == 0 for ref in self.run):
            cli.warn(f"{base.spec} is given as the base, but is named like a checkpoint: were the two mixed up?")
        opening.look_over(self.run)
        return {
            "models": {"base": base.describe(), "checkpoints": {str(ref.step): ref.describe() for ref in self.run}},
            "n_layers": archs.for_config(base.config()).n_layers(base.config()),
            "n_used": len(self.run),
            "n_available": len(self.everything),
            "limit": self.limit,
        }

    def known(self) -> list[dict]:
        """Descriptions of the models that a file of an earlier step may belong to."""
        return [self.base.describe(), *(ref.describe() for ref in self.everything)]

    def changes(self, drop: bool, **how) -> Changes:
        """`compare.changes` of every checkpoint, with arguments `how`; a pass over everything reports what it omits."""
        changes: Changes = {}
        whole = "projections" not in how
        if whole:
            say_lacking(self.base)
        for group in refs.one_at_a_time(self.run, drop, self.base):
            if whole:
                say_left_out(self.base, group)
            changes |= compare.changes(self.base, group, **how)
        return changes


def made_already(
    output: Path, schema: str, facts: dict, overwrite: bool, more: Callable[[dict], dict] = lambda head: {}
) -> bool:
    """Whether `output` is a finished result of the same models and steps.

    Args:
        more: further facts that must be the same, read from a header (or `facts`).

    Raises:
        InputError: it is a result for something else, or not a result of this script.
    """
    now = _request(facts) | more(facts)

    def asked(head: dict) -> dict:
        before = _request(head) | more(head)
        if before["steps"] != now["steps"]:  # already reported as a difference in steps
            before["checkpoints"] = now["checkpoints"]
        if None not in (before["limit"], now["limit"]):  # a limit only selects steps
            before["limit"] = now["limit"]
        return before

    return results.finished(output, schema, now, "another --output", overwrite, asked)


def _request(head: dict) -> dict:
    """The request (steps, models, limit) that a header, or `Compared.facts`, records."""
    models = head.get("models") or {}
    checkpoints = models.get("checkpoints") or {}
    request = {"steps": sorted(map(int, checkpoints)), "base": models.get("base"), "checkpoints": checkpoints}
    return request | {"limit": head.get("limit")}


def say_lacking(base: refs.ModelRef) -> None:
    """Name the layers without attention, or without an FFN, which are left out of the means of what they lack."""
    config = base.config()
    arch = archs.for_config(config)
    for what, projections in (("attention", archs.ATTENTION), ("FFN", archs.FFN)):
        layers = arch.lacking(config, projections)
        if layers:
            instead = f" ({arch.instead(config, layers)} in its place)" if what == "attention" else ""
            cli.say(f"layers {layers} have no {what}{instead}; they are left out of its means")


def say_left_out(base: refs.ModelRef, run: list[refs.ModelRef]) -> None:
    """Name the tensors outside the layers that cannot be compared, such as an extended vocabulary's embeddings."""
    steps_by_reason: dict[str, list[str]] = {}
    for ref in run:
        for name, why in compare.diff_tensors(base, ref).items():
            steps_by_reason.setdefault(f"{name} ({why})", []).append(str(ref.step))
    for reason, steps in steps_by_reason.items():
        at = "" if len(steps) == len(run) else f" at step {', '.join(steps)}"
        cli.say(f"outside the layers, and not compared: {reason}{at}")
