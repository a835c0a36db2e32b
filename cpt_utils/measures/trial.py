"""Models measured in memory under conditions: a base, its target and changes to the target, or several runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt_utils.architectures import archs
from cpt_utils.base import processes, results
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import refs, tokenization, tokenizer_id
from cpt_utils.interventions import surgery
from cpt_utils.interventions.condition import Condition
from cpt_utils.measures import conditions, controls, matched
from cpt_utils.models import loading

SCHEMA = "swap-controls"


@dataclass(frozen=True)
class Trial:
    """Models, what is measured on them, and the settings of the measurement.

    Attributes:
        models: by role, as named by `Condition.of`; models without a tokenizer use that of "base".
        bench: an `evaluation.Test`, or any object with `on` (model, arch, tokenizer, name), which returns a record's
            `values` and `units`, and with `facts`, which go into the header and identify the request.
        run: folder of the target's run, for tokenizer files that the checkpoint lacks.
    """

    models: dict[str, refs.ModelRef]
    bench: Any
    process: processes.Process
    dtype: torch.dtype
    seed: int
    overwrite: bool
    run: str | None = None

    @classmethod
    def from_arguments(cls, args, study, models: dict[str, refs.ModelRef], bench, run: str | None = None) -> Trial:
        process, dtype = processes.from_arguments(args, study)
        return cls(models, bench, process, dtype, study.seed, args.overwrite, run)

    @property
    def n_layers(self) -> int:
        config = self.models["target"].config()
        return archs.for_config(config).n_layers(config)

    def request(self, asked: dict) -> dict:
        """What the numbers depend on: models, bench and `asked`. The runner adds the keys of the conditions."""
        identities = {role: surgery.identity(ref) for role, ref in self.models.items()}
        return {
            **(identities if identities.keys() == {"base", "target"} else {"models": identities}),
            "tokenizers": [
                tokenizer_id.tokenizer_used(ref, self.run, self.models["base"]) for ref in self.models.values()
            ],
            **asked,
            "test": self.bench.facts,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.process.device.type,
        }

    def measure(
        self, path: Path, wanted: Sequence[Condition], schema: str, asked: dict,
        payload: Callable[[list[dict]], tuple[dict, dict | None]], head: dict | None = None,
        show: Callable[[Path, dict], None] | None = None, say: Callable[[dict], None] | None = None,
        loaded: Callable[[Any, Any], None] | None = None, estimate: bool = False, instead: str = "another -o",
    ) -> None:  # fmt: skip
        """Measure every condition, including the unchanged models, and write `path` (`conditions.measure`).

        Args:
            asked: entries of the request besides models, tokenizers and the facts of the bench.
            payload: records -> the content of the result, and the tensors of the `.pt` beside it (None: no `.pt`).
            head: entries of the header besides models and the facts of the bench.
            show: writes figures and tables of the payload: (path without suffix, payload) -> None.
            say: prints a summary of the payload.
            loaded: called with (model, tokenizer) when a model is loaded, to refuse models that do not fit.

        Raises:
            InputError: `path` is the result of another request, or a model cannot be measured.
        """
        tokenizers: dict = {}

        def load(role: str):
            ref = self.models[role]
            tokenizers[role] = tokenization.load_tokenizer(ref, self.run, self.models["base"])
            model = loading.load_for(self.process, ref, self.dtype)
            if loaded:
                loaded(model, tokenizers[role])
            return model

        def measured(model, condition: Condition) -> dict:
            ref = self.models[condition.of]
            name = f"{condition.name} {condition.facts.get('layers', '')}".rstrip() if condition.key else ref.spec
            return self.bench.on(model, archs.for_config(ref.config()), tokenizers[condition.of], name)

        def write(records: list[dict], request: dict) -> None:
            content, tensors = payload(records)
            if tensors is not None:
                results.write_tensors(path.with_suffix(".pt"), tensors)
            if show:
                show(path.with_suffix(""), content)
            facts = self.bench.facts | {"models": {role: ref.describe() for role, ref in self.models.items()}}
            facts |= {**(head or {}), "dtype": request["dtype"], "device": str(self.process.device)}
            results.write_json(path, content | {"request": request}, results.header(schema, **facts))
            if say:
                say(content)

        conditions.measure(
            path, schema, self.request(asked), wanted, load, measured, write, self.process, self.overwrite, instead,
            estimate,
        )  # fmt: skip

    def compare(
        self, path: Path, wanted: list[Condition], treatment: str | None = None, facts: dict | None = None,
        show: Callable[[Path, dict], None] | None = None, gate: dict | None = None,
        more: Callable[[list[dict]], dict] | None = None,
    ) -> None:  # fmt: skip
        """Measure base, target and the conditions of the target with an `evaluation.Test`, and compare them.

        The conditions' facts may hold `layers`; if they name a `component`, only sets of the same one are compared.

        Args:
            treatment: name of the condition to compare with those named "random"; None for no comparison. If given,
                the per-unit values (`.pt`, float32 [sets, units] per measure, in the order of `sets`) are written
                beside `path`.
            facts, more: further entries of the result; `more` computes them from the records.
            show: see `measure`.
            gate: the gate of the layers (`gate.carried`), for the header.

        Raises:
            InputError: `path` is the result of another request, or a model cannot be measured.
            ValueError: there is no condition `treatment`, or none called "random".
        """
        names = {one.name for one in wanted}
        if treatment and not {treatment, "random"} <= names:
            raise ValueError(f"no condition is called {treatment}, or none random: they are {', '.join(sorted(names))}")
        ends = [Condition(role, {}, facts={"layers": []}, of=role) for role in self.models]
        sets = [
            [one.name, one.facts.get("layers", []), {key: value for key, value in one.key.items() if key != "edits"}]
            for one in wanted
        ]

        def payload(records: list[dict]) -> tuple[dict, dict | None]:
            sets = [row | {"shape": matched.shape(row["layers"])} for row in controls.summary(records, self.seed)]
            content = {**(facts or {}), "comparison": None}
            if treatment:
                content["comparison"] = controls.compare(records, treatment, self.seed)
                content |= matched.statistics(records, treatment, self.n_layers, self.seed)
                controls.intervals(sets, records, self.seed)
                controls.rank_all(sets, treatment)
            content |= (more(records) if more else {}) | {"sets": sets}
            return content, controls.units_of(records) if treatment else None

        def say(content: dict) -> None:
            controls.say(content["sets"], content["comparison"], gate)
            matched.say(content, treatment, gate)

        self.measure(
            path, [*ends, *wanted], SCHEMA, {"sets": sets, "measures": self.bench.measures()}, payload,
            {"gate": gate, "n_layers": self.n_layers}, show, say, instead="another output folder",
        )  # fmt: skip
