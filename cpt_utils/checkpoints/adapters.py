"""LoRA adapters (PEFT) as checkpoints: what they say of themselves, their base, and a loaded base with one merged in.

An adapter stands for the model that PEFT's `merge_and_unload` leaves; `merged.AdapterFolder` computes its tensors.
What is not merged here (DoRA, other PEFT types, changed bases as of PiSSA, quantised bases) is refused by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_utils.architectures import archs
from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import formats, identity, tensors

if TYPE_CHECKING:
    from cpt_utils.checkpoints.refs import ModelRef


# Keys of adapter_config.json that do not change what the merged model computes, or that are read below. Any other key
# with a value is refused.
KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "trainable_token_indices", "use_rslora", "velora_config",
}  # fmt: skip
# Initialisations that leave the base as it is. The others (PiSSA, OLoRA, LoftQ, ..) train on a changed base.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
PREFIX = "base_model.model."
# What PEFT puts into the name of a tensor that it saves whole: of a module trained whole (`modules_to_save`), of one
# that also has a product or trained rows. What it also saves of the first kind as it was before does not count.
WRAPPERS = (".modules_to_save.", ".token_adapter.base_layer.", ".base_layer.")
BEFORE = ".original_module."
TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class Settings:
    """What an adapter_config.json says of the arithmetic.

    Attributes:
        whole: modules trained whole (`modules_to_save`), by the ends of their names.
        tying: tied embeddings that are trained whole stay tied (`ensure_weight_tying`).
        tokens: rows of embeddings that were trained alone, by the end of the module's name; "" for any module.
    """

    base: str
    rank: int
    alpha: float
    rslora: bool
    ranks: dict[str, int]
    alphas: dict[str, float]
    targets: tuple[str, ...]
    whole: tuple[str, ...]
    tying: bool
    tokens: dict[str, list[int]]

    def scale(self, module: str, rank: int) -> float:
        """The factor of B A in `module` (dotted name in memory), whose tensors have `rank`."""
        stated = _by_pattern(self.ranks, module, self.rank)
        if stated != rank:
            raise InputError(f"the adapter's {module} has rank {rank}, and its configuration says {stated}")
        return _by_pattern(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    def rows(self, module: str) -> list[int]:
        """The rows that were trained of the embeddings `module`, or of an output matrix that is tied to them."""
        found = [rows for end, rows in self.tokens.items() if module.endswith(end)]
        return (found or list(self.tokens.values()) or [[]])[0]

    def unties(self, kin: tuple[archs.Arch, ...]) -> bool:
        """Whether embeddings and output matrix, tied or not, are two after merging: one of them was trained whole."""
        names = [f"{arch.decoder_path}.{arch.embeddings[0]}" for arch in kin] + [arch.head for arch in kin]
        return not self.tying and any(name.endswith(end) for name in names for end in self.whole)


def _by_pattern(patterns: dict, module: str, default):
    """PEFT's rule: the first pattern that matches the module's name, or the end of it behind a dot."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_settings(folder: Path) -> Settings:
    """The settings of the adapter in `folder`.

    Raises:
        InputError: no LoRA, or one with settings that are not supported here; damaged or incomplete JSON.
    """
    file = folder / formats.ADAPTER_CONFIG
    values = formats.read_json(file)
    kind = values.get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"{folder} holds a PEFT adapter of type {kind}; only LORA is merged here; merge this one with PEFT"
        )
    other = sorted(key for key, value in values.items() if key not in KNOWN and value)
    if values.get("init_lora_weights") not in PLAIN_STARTS:
        other.append(f"init_lora_weights {values['init_lora_weights']!r}")
    if other:
        raise InputError(f"{file} sets {other[0]}, which is not merged here; merge the adapter with PEFT")
    ranks, alphas = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
    numbers = [values.get("r"), values.get("lora_alpha"), *_values(ranks), *_values(alphas)]
    if not all(type(n) in (int, float) and 0 < n < 1e6 for n in numbers):
        raise InputError(f"{file}: r and lora_alpha must be positive numbers, in their patterns, too")
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not all(isinstance(text, str | None) for text in (base, revision)):
        raise InputError(f"{file}: base_model_name_or_path is not the name of a model")
    if base and revision and not os.path.isdir(base) and "@" not in base:
        base = f"{base}@{revision}"
    try:
        for pattern in (*ranks, *alphas):
            re.compile(pattern)
    except re.error:
        raise InputError(f"{file}: the module pattern {pattern!r} is not a regular expression") from None
    targets, whole = values.get("target_modules"), values.get("modules_to_save")
    return Settings(
        base or "", values["r"], values["lora_alpha"], bool(values.get("use_rslora")), ranks, alphas,
        tuple(targets) if isinstance(targets, list) and not values.get("exclude_modules") else (),
        tuple(whole) if isinstance(whole, list) else (),
        bool(values.get("ensure_weight_tying")),
        _tokens(values.get("trainable_token_indices"), file),
    )  # fmt: skip


def _values(patterns) -> list:
    return list(patterns.values()) if isinstance(patterns, dict) else [None]


def _tokens(given, file: Path) -> dict[str, list[int]]:
    """`trainable_token_indices`: rows by the end of the module's name; a bare list is of the embeddings."""
    found = given if isinstance(given, dict) else {"": given} if given else {}
    for rows in found.values():
        if not (
            isinstance(rows, list) and all(type(n) is int and n >= 0 for n in rows) and len(set(rows)) == len(rows)
        ):
            raise InputError(f"{file}: trainable_token_indices must be lists of distinct row numbers, 0 or more")
    return found


def base_of(ref: ModelRef, model: Callable[[str], ModelRef]) -> ModelRef:
    """The model that an adapter was trained on: the one its configuration names, else the one given with the reference.

    The one it names comes first: merged into another model, the same adapter is not a checkpoint of anything. But a
    quantised one holds codes, to which nothing can be added. `model` makes a reference of its name.
    """
    settings = read_settings(ref.folder([formats.ADAPTER_CONFIG]))
    named = settings.base or "a base that it does not name"
    key = f"base_model_name_or_path of its {formats.ADAPTER_CONFIG}"
    base, why = None, "which is not here" if settings.base else ""
    if settings.base:
        with contextlib.suppress(InputError):
            base = model(_seen_from(ref, settings.base))
    remedy = f"write where its base is into {key}"
    if _is_quantised(base, settings.base):
        base, why, original = None, "which is quantised", formats.original_of(settings.base)
        by_name = f" (by its name {original})" if original else ""
        remedy = f"write the 16-bit model that it was made from{by_name} into {key}"
    if base is None:
        told = f"{ref.spec} is an adapter of {named}{f', {why}' if why else ''}"
        if ref.base is None:
            raise InputError(f"{told}; {remedy}")
        base = ref.base
        cli.say(f"{told}; {base.spec} is taken")
    if base.is_adapter:
        raise InputError(f"{ref.spec} is an adapter of {base.spec}, which is an adapter itself; merge that one first")
    return base


def _seen_from(ref: ModelRef, name: str) -> str:
    """Where the base is that an adapter names: a relative path that is not here was one from where the adapter was
    trained, most often a folder that holds it."""
    if ref.is_local and not os.path.isdir(name):
        for up in range(1, 5):
            path = os.path.normpath(os.path.join(ref.spec, *[".."] * up, name))
            if os.path.isfile(os.path.join(path, "config.json")):
                return path
    return name


def _is_quantised(base: ModelRef | None, name: str) -> bool:
    """Whether a base holds codes: where its configuration speaks of some, its files decide; where it cannot be had, its
    name."""
    if base is not None:
        try:
            if not base.is_adapter and formats.stated(base.config()) is not None:
                tensors.TensorFolder(base, lazy=True).refuse_unfit().close()
            return False
        except formats.Quantised:
            return True
        except InputError:
            pass
    return formats.original_of(name) is not None


def merged_config(values: dict, folder: Path) -> dict:
    """The configuration of the merged model: the base's, with the vocabulary that the adapter brings; untied where one
    of two tied matrices was trained whole.

    Args:
        values: the configuration of the base; folder: the adapter's.
    """
    values, kin = dict(values), archs.kin(values)
    with AdapterFile(folder) as stored:
        rows = stored.vocabulary(kin)
    if read_settings(folder).unties(kin) and values.get("tie_word_embeddings") is not False:
        values |= {"tie_word_embeddings": False}
    if rows is None or rows == identity.vocabulary_size(values):
        return values
    if isinstance(values.get("text_config"), dict) and "vocab_size" not in values:
        return values | {"text_config": values["text_config"] | {"vocab_size": rows}}
    return values | {"vocab_size": rows}


def sample(folder: Path, base: dict) -> str:
    """What tells two adapters apart, as `identity.weights_sample` does with models: weights, settings and base.

    Args:
        folder: the adapter's; base: what `ModelRef.describe` says of its base.
    """
    settings = read_settings(folder)
    facts = [
        identity.weights_sample(folder, formats.ADAPTER_PATTERNS),
        [settings.rank, settings.alpha, settings.rslora, settings.ranks, settings.alphas],
        base.get("weights_sample") or [base["model_id"], base["revision"]],
        *([settings.tokens] if settings.tokens else []),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


class AdapterFile(tensors.TensorFolder):
    """The tensors in the adapter's file, by PEFT's names."""

    def _look(self):
        for kind, name in zip(("safetensors", "bin"), formats.ADAPTER_WEIGHTS, strict=True):
            if (self.path / name).is_file():
                return kind, [name], None
        raise InputError(
            f"{self.path} holds {formats.ADAPTER_CONFIG} but no {formats.ADAPTER_WEIGHTS[0]}; copy it again"
        )

    def replaced(self) -> dict[str, str]:
        """Tensors saved whole: name in the base's state dict -> name here.

        PEFT 0.21 writes a module trained whole under its own name, and where the vocabulary was resized the whole
        wrapper beside it: once more the same, and the module as it was before.
        """
        found = {}
        for name in sorted(self.names(), key=len, reverse=True):  # the shortest stays
            module = name.removeprefix(PREFIX)
            if ".lora_" in module or TOKENS in module or BEFORE in module:
                continue
            for wrapper in WRAPPERS:
                module = module.replace(wrapper, ".")
            found[module] = name
        return found

    def vocabulary(self, kin: tuple[archs.Arch, ...]) -> int | None:
        """Rows of embeddings or output matrix where the adapter brings its own; None where it does not."""
        whole, arch = self.replaced(), kin[0]
        rows = {each.canonical(name): self.shape(saved)[0] for each in kin for name, saved in whole.items()}
        return rows.get(f"{arch.embeddings[0]}.weight", rows.get(f"{arch.head}.weight"))
