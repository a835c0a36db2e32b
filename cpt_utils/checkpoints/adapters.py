"""LoRA adapters (PEFT) as checkpoints: their settings, base, merged configuration and file.

An adapter means the model that PEFT's `merge_and_unload` returns; `merged.AdapterFolder` computes its tensors.
Unsupported adapters (DoRA, other PEFT types, changed bases as with PiSSA, quantised bases) are refused by name.
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


# Keys of adapter_config.json that do not change the merged model, or that are read below. Any other key with a value is
# refused.
KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "trainable_token_indices", "use_rslora", "velora_config",
}  # fmt: skip
# Initialisations that do not change the base. The others (PiSSA, OLoRA, LoftQ, ..) train on a changed base.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
PREFIX = "base_model.model."
# Parts of the names of tensors that PEFT saves whole: of modules trained whole (`modules_to_save`), and of modules that
# also have trained rows or a product. Of the former it also saves the state before training, which is ignored.
WRAPPERS = (".modules_to_save.", ".token_adapter.base_layer.", ".base_layer.")
BEFORE = ".original_module."
TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class Settings:
    """The settings in an adapter_config.json that affect the merged weights.

    Attributes:
        whole: ends of the names of modules trained whole (`modules_to_save`).
        tying: whether tied embeddings that are trained whole stay tied (`ensure_weight_tying`).
        tokens: individually trained rows of embeddings, by the end of the module's name; "" for any module.
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
        """The individually trained rows of the embeddings `module`, or of an output matrix tied to them."""
        matches = [rows for end, rows in self.tokens.items() if module.endswith(end)]
        return (matches or list(self.tokens.values()) or [[]])[0]

    def unties(self, kin: tuple[archs.Arch, ...]) -> bool:
        """Whether embeddings and output matrix are separate after merging because one of them was trained whole."""
        names = [f"{arch.decoder_path}.{arch.embeddings[0]}" for arch in kin] + [arch.head for arch in kin]
        return not self.tying and any(name.endswith(end) for name in names for end in self.whole)


def _by_pattern(patterns: dict, module: str, default):
    """PEFT's rule: the value of the first pattern that matches the module's name, or its end after a dot."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_settings(folder: Path) -> Settings:
    """The settings of the adapter in `folder`.

    Raises:
        InputError: not LoRA, or LoRA with unsupported settings; damaged or incomplete JSON.
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
    """`trainable_token_indices`: rows by the end of the module's name; a bare list is for the embeddings."""
    by_module = given if isinstance(given, dict) else {"": given} if given else {}
    for rows in by_module.values():
        if not (
            isinstance(rows, list) and all(type(n) is int and n >= 0 for n in rows) and len(set(rows)) == len(rows)
        ):
            raise InputError(f"{file}: trainable_token_indices must be lists of distinct row numbers, 0 or more")
    return by_module


def base_of(ref: ModelRef, model: Callable[[str], ModelRef]) -> ModelRef:
    """The model that an adapter was trained on: the one its configuration names, else the one given with the reference.

    The named base takes precedence: merged into another model, the adapter is not a checkpoint of any run. But a
    quantised base holds codes, to which nothing can be added. `model` makes a reference from its name.
    """
    settings = read_settings(ref.folder([formats.ADAPTER_CONFIG]))
    named = settings.base or "a base that it does not name"
    key = f"base_model_name_or_path of its {formats.ADAPTER_CONFIG}"
    base, why = None, "which is not here" if settings.base else ""
    if settings.base:
        with contextlib.suppress(InputError):
            base = model(_seen_from(ref, settings.base))
    remedy = f"write the path of its base into {key}"
    if _is_quantised(base, settings.base):
        base, why, original = None, "which is quantised", formats.original_of(settings.base)
        by_name = f" (by its name {original})" if original else ""
        remedy = f"write the 16-bit model that it was made from{by_name} into {key}"
    if base is None:
        message = f"{ref.spec} is an adapter of {named}{f', {why}' if why else ''}"
        if ref.base is None:
            raise InputError(f"{message}; {remedy}")
        base = ref.base
        cli.say(f"{message}; {base.spec} is used instead")
    if base.is_adapter:
        raise InputError(f"{ref.spec} is an adapter of {base.spec}, which is an adapter itself; merge that one first")
    return base


def _seen_from(ref: ModelRef, name: str) -> str:
    """The path of the base that an adapter names: a relative path that does not exist here was relative to where the
    adapter was trained, most often a folder above the adapter."""
    if ref.is_local and not os.path.isdir(name):
        for up in range(1, 5):
            path = os.path.normpath(os.path.join(ref.spec, *[".."] * up, name))
            if os.path.isfile(os.path.join(path, "config.json")):
                return path
    return name


def _is_quantised(base: ModelRef | None, name: str) -> bool:
    """Whether a base holds codes: if its configuration mentions them, its files decide; if they cannot be read, its
    name decides."""
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
    """The configuration of the merged model: the base's, with the adapter's vocabulary size; untied if one of two tied
    matrices was trained whole.

    Args:
        values, folder: the configuration of the base, and the folder of the adapter.
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
    """A short hash of an adapter's weights, settings and base, like `identity.weights_sample` of a model.

    Args:
        folder, base: the folder of the adapter, and `ModelRef.describe` of its base.
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

        PEFT 0.21 writes a module trained whole under its own name, and if the vocabulary was resized, also its whole
        wrapper: a second copy, and the module before training.
        """
        saved = {}
        for name in sorted(self.names(), key=len, reverse=True):  # the shortest name wins
            module = name.removeprefix(PREFIX)
            if ".lora_" in module or TOKENS in module or BEFORE in module:
                continue
            for wrapper in WRAPPERS:
                module = module.replace(wrapper, ".")
            saved[module] = name
        return saved

    def vocabulary(self, kin: tuple[archs.Arch, ...]) -> int | None:
        """Number of rows of the embeddings or output matrix in the adapter; None if it has neither."""
        whole, arch = self.replaced(), kin[0]
        rows = {each.canonical(name): self.shape(saved)[0] for each in kin for name, saved in whole.items()}
        return rows.get(f"{arch.embeddings[0]}.weight", rows.get(f"{arch.head}.weight"))
