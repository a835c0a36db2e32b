"""Conditions of a pair of models, measured in memory: base, target, and whatever is done to the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import processes, results
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import tokenization, tokenizer_id
from cpt_utils.interventions import surgery
from cpt_utils.interventions.condition import Condition
from cpt_utils.measures import conditions, controls, evaluation, matched
from cpt_utils.models import loading

SCHEMA = "swap-controls"


@dataclass(frozen=True)
class Trial:
    """A pair of models, what is measured on it, and with what.

    Attributes:
        run: folder of the target's run, for tokenizer files that the checkpoint lacks.
    """

    pair: surgery.Pair
    test: evaluation.Test
    process: processes.Process
    dtype: torch.dtype
    seed: int
    overwrite: bool
    run: str | None = None

    @classmethod
    def from_arguments(cls, args, study, pair: surgery.Pair, known: dict, retrieve: Callable, run=None) -> Trial:
        """The trial that flags and study ask for; see `evaluation.test_from_arguments` for `known` and `retrieve`."""
        test = evaluation.test_from_arguments(args, study, known, retrieve)
        process, dtype = processes.from_arguments(args, study)
        return cls(pair, test, process, dtype, study.seed, args.overwrite, run)

    @property
    def models(self) -> dict:
        return {"base": self.pair.base_ref, "target": self.pair.target_ref}

    def request(self, wanted: list[Condition]) -> dict:
        """What the numbers depend on; the runner adds the keys of the conditions."""
        models = self.models.values()
        return {
            **{role: surgery.identity(ref) for role, ref in self.models.items()},
            "tokenizers": [tokenizer_id.tokenizer_used(ref, self.run, self.pair.base_ref) for ref in models],
            "sets": [
                [one.name, one.facts.get("layers", []), {key: v for key, v in one.key.items() if key != "edits"}]
                for one in wanted
            ],
            "measures": self.test.measures(),
            "test": self.test.facts,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.process.device.type,
        }

    def measure(
        self, path: Path, wanted: list[Condition], treatment: str | None = None, facts: dict | None = None,
        figure: Callable[[Path, dict], None] | None = None, gate: dict | None = None,
        more: Callable[[list[dict]], dict] | None = None,
    ) -> None:  # fmt: skip
        """Measure base, target and the conditions of the target, and write `path` (see `conditions.measure`).

        The conditions' facts may hold `layers`; they are compared within one `component`, where the facts name one.

        Args:
            treatment: name of the condition to compare with those named "random"; None for no comparison. With it the
                per-unit values (`.pt`, float32 [sets, units] a measure, in the order of `sets`) are written beside
                `path`.
            facts, more: payload of the result beside comparison and sets, and what makes more of it of the records.
            figure: draws the payload: (path without suffix, payload) -> None.
            gate: that of the layers (`gate.carried`), for the header.

        Raises:
            InputError: `path` is the result of another request, or a model cannot be measured.
            ValueError: there is no condition `treatment`, or none called "random".
        """
        names = {one.name for one in wanted}
        if treatment and not {treatment, "random"} <= names:
            raise ValueError(f"no condition is called {treatment} or none random: there are {', '.join(sorted(names))}")
        ends = [Condition(role, {}, facts={"layers": []}, of=role) for role in self.models]
        tokenizers: dict = {}

        def load(role: str):
            ref = self.models[role]
            tokenizers[role] = tokenization.load_tokenizer(ref, self.run, self.pair.base_ref)
            return loading.load_for(self.process, ref, self.dtype)

        def measured(model, one: Condition) -> dict:
            name = f"{one.name} {one.facts.get('layers', '')}" if one.key else self.models[one.of].spec
            return self.test.on(model, self.pair.arch, tokenizers[one.of], name)

        def write(records: list[dict], request: dict) -> None:
            compared = controls.compare(records, treatment, self.seed) if treatment else None
            sets = [row | {"shape": matched.shape(row["layers"])} for row in controls.summary(records, self.seed)]
            found = matched.statistics(records, treatment, self.pair.n_layers, self.seed) if treatment else {}
            found |= more(records) if more else {}
            payload = {**(facts or {}), "comparison": compared, **found, "sets": sets, "request": request}
            if treatment:
                controls.intervals(sets, records, self.seed)
                controls.rank_all(sets, treatment)
                results.write_tensors(path.with_suffix(".pt"), controls.units_of(records))
            if figure is not None:
                figure(path.with_suffix(""), payload)
            head = {"models": {role: ref.describe() for role, ref in self.models.items()}, "gate": gate}
            head |= {"n_layers": self.pair.n_layers, "dtype": request["dtype"], "device": str(self.process.device)}
            results.write_json(path, payload, results.header(SCHEMA, **self.test.facts, **head))
            controls.say(sets, compared, gate)
            matched.say(found, treatment, gate)

        conditions.measure(
            path, SCHEMA, self.request(wanted), [*ends, *wanted], load, measured, write, self.process, self.overwrite,
            "another output folder",
        )  # fmt: skip
