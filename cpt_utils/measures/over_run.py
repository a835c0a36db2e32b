"""Measures the base and the checkpoints of its run, unchanged or under conditions: the frame of scripts that do so."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import cli, processes
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import beside, opening, refs, tokenization, tokenizer_id
from cpt_utils.interventions.condition import Condition
from cpt_utils.measures import conditions
from cpt_utils.models import loading

BASE = "base"


def add_flags(p, place: str, batch_size: int | None = None, part: str = "", drop: bool = True) -> None:
    """Add --base, --run, --output (default: the study's `place`), and all flags for running models (`batch_size`: see
    `cli.add_forward_flags`, `drop`: `cli.add_run_flags`). `part` says in the help which part of the run is measured."""
    p.add_argument("--base", metavar="B", help="base model; default: the study's base")
    p.add_argument("--run", nargs="+", metavar="RUN", help=f"its run of checkpoints{part}; default: the study's run")
    p.add_argument("--output", metavar="OUT", help=f"JSON to write; default: the study's {place}")
    cli.add_run_flags(p, drop)
    cli.add_forward_flags(p, batch_size, device_map=True)


@dataclass(frozen=True)
class OverRun:
    """The request behind the flags of `add_flags`: `models` are "base" and the checkpoints, named by step; the result
    goes to `output`."""

    args: argparse.Namespace
    study: Study
    models: dict[str, refs.ModelRef]
    output: Path

    @classmethod
    def of(cls, args, study: Study, step: str, last: bool = False) -> OverRun:
        """`step`: the name of the result in RESULTS; `last`: only the last checkpoint of the run."""
        base, run = study.value(args.base, "--base", "base"), study.value(args.run, "--run", "run")
        checkpoints = refs.run(run, args.steps)[-1 if last else 0 :]
        models = {BASE: refs.model(base)} | {str(ref.step): ref for ref in checkpoints}
        other = beside.name(study, args.base, args.run, args.steps, getattr(args, "limit", None), last=last)
        return cls(args, study, models, study.output(args.output, "--output", step, other))

    @property
    def last(self) -> refs.ModelRef:
        return list(self.models.values())[-1]

    @property
    def homes(self) -> tuple:
        """Where else a tokenizer may be found: in the run, and in the base."""
        return beside.run_asked_for(self.study, self.args.run), self.models[BASE]

    def tokenizer_of(self, ref: refs.ModelRef) -> str:
        """A hash that is equal for models with the same tokenizer."""
        return tokenizer_id.tokenizer_used(ref, *self.homes)

    def measure(
        self, schema: str, facts: dict, measured: Callable[..., dict], write: Callable[[dict, dict], None]
    ) -> None:
        """Measure every model, unchanged, that has not been measured yet, and write the result.

        Args:
            facts: what the numbers depend on besides models, seed, dtype and device.
            measured: (model, its reference, its tokenizer) -> the measurements to keep, as JSON values.
            write: ({model: measurements}, whole request) -> None.
        """

        def measured_one(model, condition: Condition, tokenizer) -> dict:
            ref = self.models[condition.of]
            result = measured(model, ref, tokenizer)
            if self.args.drop_revisions and condition.of != BASE:
                ref.drop()
            return {"units": result}

        def write_all(records: list[dict], request: dict) -> None:
            write({record["name"]: record["units"] for record in records}, request)

        wanted = [Condition(name, {}, facts={"step": ref.step}, of=name) for name, ref in self.models.items()]
        self.changed(schema, facts, wanted, measured_one, write_all, estimate=False)

    def changed(
        self, schema: str, facts: dict, wanted: Sequence[Condition], measured: Callable[..., dict],
        write: Callable[[list[dict], dict], None], ready: Callable | None = None, estimate: bool = True,
    ) -> None:  # fmt: skip
        """Measure the models under conditions (`conditions.measure`), and write the result.

        Args:
            facts: what the numbers depend on besides models, seed, dtype, device and conditions.
            measured: (model, condition, tokenizer) -> the measurements under the condition, which go into its record.
            write: (records, whole request) -> None.
            ready: called with (name, model, tokenizer) when a model is loaded.
        """
        opening.look_over(self.models.values())
        process, dtype = processes.from_arguments(self.args, self.study)
        request = {
            "models": {name: ref.describe() for name, ref in self.models.items()},
            "tokenizers": {name: self.tokenizer_of(ref) for name, ref in self.models.items()},
            **facts, "seed": self.study.seed, "dtype": str(dtype).removeprefix("torch."),
            "device": process.device.type,
        }  # fmt: skip
        tokenizers: dict = {}

        def load(name: str):
            model = loading.load_for(process, self.models[name], dtype)
            tokenizers[name] = tokenization.load_tokenizer(self.models[name], *self.homes)
            if ready:
                ready(name, model, tokenizers[name])
            return model

        conditions.measure(
            self.output, schema, request, wanted, load, lambda model, c: measured(model, c, tokenizers[c.of]),
            write, process, self.args.overwrite, "another --output", estimate,
        )  # fmt: skip


def header_facts(request: dict, *keys: str) -> dict:
    """The entries of a header that come from a request: its models, and these keys."""
    checkpoints = dict(request["models"])
    models = {BASE: checkpoints.pop(BASE), "checkpoints": checkpoints}
    return {"models": models} | {key: request[key] for key in (*keys, "seed", "dtype", "device")} | {"request": request}
