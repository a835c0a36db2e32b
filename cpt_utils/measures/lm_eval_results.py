"""One result file of lm_eval, of any release: the model evaluated, its tasks and numbers, and the settings.

The releases differ. Up to 0.3 a row is `{"acc": x}`, and number of rows, date and prompts are not recorded. 0.4.0 to
0.4.2 write `{"acc,none": x}` and the task definitions, still without numbers of rows; 0.4.3 and later add `n-samples`,
the chat template and the system instruction. `model_args` is the text of the command line, or parsed from it.
"""

from __future__ import annotations

import json
import os
import re
from functools import cached_property
from pathlib import Path

from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import step_names

# Arguments that name an adapter on the model in `pretrained`. lm_eval names such results sometimes after the adapter,
# sometimes after the model.
ADAPTERS = ("peft", "delta", "lora_local_path", "steer_path")
QUANTISED = (
    "load_in_4bit",
    "load_in_8bit",
    "gptqmodel",
    "autogptq",
    "gguf_file",
    "quantization",
    "quantization_config",
    "torchao_config",
)
# Arguments of the model that change its prompts.
ASKED = ("add_bos_token", "prefix_token_id", "enable_thinking", "chat_template_args")
DTYPES = {"float": "float32", "half": "float16"}


class ResultFile:
    """A result file.

    Attributes:
        path: where it is.
        content: the unmodified JSON.
        model: the model in `pretrained`, in the spelling of `refs`: `folder`, `org/name[/folder][@revision]`.
        adapter: the adapter, delta or LoRA on the model; None for the model alone.
        quantised: how the model was quantised on loading, in lm_eval's words; "" if it was not.
    """

    def __init__(self, path: Path, content: dict):
        self.path, self.content = str(path), content
        self.config = content.get("config") or {}
        self.arguments = model_arguments(self.config.get("model_args"))
        self.model, self.adapter = self._models()
        arguments = {key: str(value) for key, value in self.arguments.items() if not is_off(value)}
        quantisation = sorted(key for key in arguments if key in QUANTISED)
        quantisation += sorted(key for key in arguments if quantisation and key.startswith("bnb_"))
        self.quantised = ", ".join(f"{key}={arguments[key]}" for key in quantisation)

    @classmethod
    def read(cls, path: Path) -> ResultFile | None:
        """The result file at `path`; None for any other JSON file.

        Raises:
            InputError: the file is named like a result of lm_eval, but is damaged.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            if path.name.startswith("results"):
                raise InputError(
                    f"{path} is not valid JSON (an interrupted run?); delete it or evaluate again"
                ) from None
            return None
        return cls(path, content) if is_result(content) else None

    def _models(self) -> tuple[str, str | None]:
        """(model, adapter): their names as stated, with the requested folder and revision."""
        stated = {key: str(value) for key, value in self.arguments.items() if not is_off(value)}
        model_names = [stated[key] for key in ("pretrained", "model", "path", "engine") if key in stated]
        model_names += [str(self.content.get("model_name") or Path(self.path).parent.name)]
        model = model_names[0].rstrip("/") or "/"
        if "subfolder" in stated:
            model = f"{model}/{stated['subfolder'].strip('/')}"
        revision = stated.get("revision", "main")
        adapter = next((stated[key].rstrip("/") for key in ADAPTERS if key in stated), None)
        if revision == "main":
            return model, adapter
        # lm_eval loads both at this revision. An adapter in a checkpoint folder has none, so it is the model's.
        if adapter is None or step_names.step_of(os.path.basename(adapter)) is not None:
            return f"{model}@{revision}", adapter
        return model, f"{adapter}@{revision}"

    @property
    def name(self) -> str:
        """The model that was evaluated: the adapter if there is one, because the adapter was trained."""
        return self.adapter or self.model

    @property
    def header(self) -> dict:
        """The header of these scripts; {} in a result of lm_eval's command line."""
        return self.content.get(results.HEADER) or {}

    @property
    def is_swapped(self) -> bool:
        """Whether the model had parts of the base swapped in (evaluate.py --swap), named `<model>+<kind>`."""
        return "swap" in self.header

    @property
    def date(self) -> float | None:
        """The start of the evaluation in seconds; None in releases before 0.4.2."""
        return self.content.get("date")

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks without the groups, whose rows are among those of the tasks."""
        return list(self.content.get("n-samples") or self.content.get("configs") or self.content["results"])

    @property
    def is_early(self) -> bool:
        """Whether it is of a release before 0.4, which built its prompts in code."""
        return not {"n-samples", "configs", "n-shot"} & self.content.keys()

    @property
    def release(self) -> str:
        """The release of lm_eval, recorded since 0.4.9."""
        return self.content.get("lm_eval_version") or ("0.3 or older" if self.is_early else "0.4.8 or older")

    def rows(self, task: str) -> int | None:
        """The number of rows evaluated; None if the release does not record it."""
        return self.content.get("n-samples", {}).get(task, {}).get("effective")

    def limit(self, task: str) -> str:
        """A text saying that not all rows of the task were evaluated; "" if all were."""
        if (count := self.content.get("n-samples", {}).get(task)) is not None:
            part = count["original"] != count["effective"]
            return f"made with --limit ({count['effective']} of {count['original']} rows)" if part else ""
        limit = self.config.get("limit")
        return "" if limit is None else f"made with --limit {limit}"

    def settings(self, task: str) -> dict:
        """The settings of the task; None for those that the file does not state.

        Releases before 0.4.3 had no chat template and no system instruction: absence means none.
        """
        config = self.content.get("configs", {}).get(task) or {}
        n_shots = self.content.get("n-shot", {}).get(task, config.get("num_fewshot", self.config.get("num_fewshot")))
        template = self.content.get("chat_template") or self.content.get("chat_template_sha")
        dtype = str(self.config.get("model_dtype") or self.arguments.get("dtype") or "auto").removeprefix("torch.")
        described = self.config.get("description_dict") or {}
        return {
            "release of lm_eval": "0.3 or older" if self.is_early else "0.4 or later",
            "number of few-shot examples": n_shots,
            "seed of the few-shot examples": self.config.get("fewshot_seed") if n_shots else None,
            "task version": self.content.get("versions", {}).get(task),
            "description": (config.get("description") or described.get(task) or "none"),
            "prompt template": _stable(config.get("doc_to_text")),
            "choices": _stable(config.get("doc_to_choice")),
            "target": _stable(config.get("doc_to_target")),
            "target delimiter": config.get("target_delimiter"),
            "few-shot delimiter": config.get("fewshot_delimiter") if n_shots else None,
            "prompts (hash)": self.header.get("data", {}).get("prompts", {}).get(task),
            "documents (task hash)": self.content.get("task_hashes", {}).get(task),
            "chat template": template or "none",
            "system instruction": self.content.get("system_instruction") or "none",
            # Irrelevant without a template or examples; its default differs between releases.
            "few-shot examples as turns (fewshot_as_multiturn)": (
                bool(self.content.get("fewshot_as_multiturn")) if template and n_shots != 0 else None
            ),
            **{key: str(self.arguments.get(key, "the default")) for key in ASKED},
            "dtype": None if dtype == "auto" else DTYPES.get(dtype, dtype),
            "model under the adapter": self.model if self.adapter else None,
        }


def is_result(content) -> bool:
    """Whether the content of a JSON file is a result of lm_eval, of any release."""
    if not isinstance(content, dict) or not isinstance(content.get("config", {}), dict):
        return False
    rows = content.get("results")
    known = "n-samples" in content or {"versions", "config"} <= content.keys()
    return known and isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values())


def model_arguments(given: str | dict | None) -> dict:
    """`config.model_args` as a dict: {"pretrained": .., ..}.

    Values may contain commas and equal signs (`{"a": 1, "b": 2}`, `runs/lr=1e-4`): a comma separates arguments only if
    a name and an equal sign follow.
    """
    if isinstance(given, dict):
        return given
    text = given.strip().strip(",") if isinstance(given, str) else ""
    if text.startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError:
            return {}
    parts = [part.partition("=") for part in re.split(r",(?=\s*[A-Za-z_]\w*\s*=)", text)]
    return {key.strip(): re.sub(r"""^(["'])(.*)\1$""", r"\2", value.strip()) for key, sign, value in parts if sign}


def is_off(value) -> bool:
    """Whether an argument of the model is absent or switched off."""
    return not value or str(value).strip().lower() in ("", "none", "false", "0")


def metric_of(row: dict, metric: str) -> tuple[object, object]:
    """(value, standard error) of a metric in the row of a task, each None if there is none.

    The keys are "acc", or "acc,<filter>"; of several filters "none" is used.
    """

    def one(key_name: str):
        keys = [key for key in row if key.partition(",")[0] == key_name]
        key = next((key for key in (f"{key_name},none", key_name) if key in keys), keys[0] if len(keys) == 1 else None)
        return row.get(key)

    return one(metric), one(f"{metric}_stderr")


def metrics_in(row: dict) -> list[str]:
    """The names of the metrics in the row of a task, with the filter if `metric_of` cannot choose among several."""
    names = set()
    for key in (key for key, value in row.items() if is_number(value)):
        name = key.partition(",")[0]
        if not name.endswith("_stderr") and name not in ("n", "sample_len"):
            names.add(key if metric_of(row, name)[0] is None else name)
    return sorted(names)


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def rows_behind(value: float, stderr) -> int | None:
    """The number of rows n behind an accuracy p, from its standard error sqrt(p (1 - p) / (n - 1)).

    None if that gives no whole numbers of rows and hits: the error is rounded, 0, or of another kind of metric.
    """
    if not is_number(stderr) or not stderr > 0 or not 0 < value < 1:
        return None
    n = value * (1 - value) / stderr**2 + 1
    return round(n) if all(abs(count - round(count)) < 1e-6 * n for count in (n, value * n)) else None


def _stable(value):
    """A part of a task's definition; None for a function, which early releases recorded with its memory address."""
    return None if " at 0x" in str(value) else value
