"""LoRA adapters (PEFT) as checkpoints: the base's tensors with the low-rank change added, computed tensor by tensor.

    with tensors.open_folder("run/checkpoint-90") as stored:         # adapter_config.json, adapter_model.safetensors
        weight = stored.get("model.layers.0.mlp.up_proj.weight")     # W_B + scale * B A, in the base's dtype

The merged weight is what PEFT's `merge_and_unload` leaves: B A and the sum in float32, then the dtype that the base has
on disk. scale is alpha / r, or alpha / sqrt(r) with `use_rslora`. Modules trained whole (`modules_to_save`, biases)
replace the base's, and may have more rows (an extended vocabulary). Anything else that changes what a model computes
(DoRA, other PEFT types, changed bases as of PiSSA) is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_utils import archs, cli, formats, refs, tensors
from cpt_utils.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

ROWS = 256  # rows merged at a time, from row 0 on: a row has the same bits however it is asked for
# Keys of adapter_config.json that do not change what the merged model computes, or that are read below. Any other key
# with a value is refused.
KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora", "velora_config",
}  # fmt: skip
# Initialisations that leave the base as it is. The others (PiSSA, OLoRA, LoftQ, ..) train on a changed base.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
PREFIX = "base_model.model."
LOW_RANK = re.compile(
    r"(.+)\.(?:lora_(?P<side>[AB])\.weight|lora_embedding_(?P<embedding>[AB])|lora_B\.(?P<bias>bias))"
)


@dataclass(frozen=True)
class Settings:
    """What an adapter_config.json says of the arithmetic."""

    base: str
    rank: int
    alpha: float
    rslora: bool
    ranks: dict[str, int]
    alphas: dict[str, float]
    targets: tuple[str, ...]

    def scale(self, module: str, rank: int) -> float:
        """The factor of B A in `module` (dotted name in memory), whose tensors have `rank`."""
        stated = _by_pattern(self.ranks, module, self.rank)
        if stated != rank:
            raise InputError(f"the adapter's {module} has rank {rank}, and its configuration says {stated}")
        return _by_pattern(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def _by_pattern(patterns: dict, module: str, default):
    """PEFT's rule: the first pattern that matches the module's name, or the end of it behind a dot."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_settings(folder: Path) -> Settings:
    """The settings of the adapter in `folder`.

    Raises:
        InputError: no LoRA, or one with settings that are not supported here; damaged or incomplete JSON.
    """
    file = folder / refs.ADAPTER_CONFIG
    values = refs.read_json(file)
    kind = values.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{folder} holds a PEFT adapter of type {kind}; only LORA is merged here, merge it with PEFT")
    other = sorted(key for key, value in values.items() if key not in KNOWN and value)
    if values.get("init_lora_weights") not in PLAIN_STARTS:
        other.append(f"init_lora_weights {values['init_lora_weights']!r}")
    if other:
        raise InputError(f"{file} sets {other[0]}, which is not merged here; merge the adapter with PEFT")
    targets = values.get("target_modules")
    ranks, alphas = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
    numbers = [values.get("r"), values.get("lora_alpha"), *_values(ranks), *_values(alphas)]
    if not all(type(n) in (int, float) and 0 < n < 1e6 for n in numbers):
        raise InputError(f"{file}: r and lora_alpha must be positive numbers, also in their patterns")
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not all(isinstance(text, str | None) for text in (base, revision)):
        raise InputError(f"{file}: base_model_name_or_path is no name of a model")
    if base and revision and not os.path.isdir(base) and "@" not in base:
        base = f"{base}@{revision}"
    try:
        for pattern in (*ranks, *alphas):
            re.compile(pattern)
    except re.error:
        raise InputError(f"{file}: {pattern!r} in a pattern of modules is no regular expression") from None
    named = tuple(targets) if isinstance(targets, list) and not values.get("exclude_modules") else ()
    return Settings(base or "", values["r"], values["lora_alpha"], bool(values.get("use_rslora")), ranks, alphas, named)


def _values(patterns) -> list:
    return list(patterns.values()) if isinstance(patterns, dict) else [None]


def base_of(ref: refs.ModelRef, settings: Settings) -> refs.ModelRef:
    """The model that an adapter was trained on: the one its configuration names, else the one given with the reference.

    The one it names comes first: merged into another model, the same adapter is no checkpoint of anything.
    """
    named = settings.base
    try:
        if not named:
            raise InputError(f"{ref.spec} is an adapter that does not name its base")
        base = refs.model(named)
    except InputError as error:
        if ref.base is None:
            raise InputError(
                f"{ref.spec} is an adapter of {named or 'a base it does not name'}, which is not here; write where its "
                f"base is into base_model_name_or_path of its {refs.ADAPTER_CONFIG}"
            ) from error
        base = ref.base
        cli.say(f"{ref.spec} is an adapter of {named or 'an unnamed base'}, which is not here; {base.spec} is taken")
    if base.is_adapter:
        raise InputError(f"{ref.spec} is an adapter of {base.spec}, which is an adapter itself; merge that one first")
    return base


def config(ref: refs.ModelRef) -> dict:
    """The configuration of the merged model: the base's, with the vocabulary that the adapter brings."""
    values = ref.adapted.config()
    with _Own(ref.folder(refs.ADAPTER_PATTERNS)) as own:
        rows = _vocabulary(own, archs.for_config(values))
    if rows is None or rows == refs.vocabulary_size(values):
        return values
    if isinstance(values.get("text_config"), dict) and "vocab_size" not in values:
        return values | {"text_config": values["text_config"] | {"vocab_size": rows}}
    return values | {"vocab_size": rows}


def sample(ref: refs.ModelRef) -> str:
    """What tells two adapters apart, as `refs.weights_sample` does with models: weights, settings and base."""
    folder, base = ref.folder(refs.ADAPTER_PATTERNS), ref.adapted.describe()
    settings = read_settings(folder)
    facts = [
        refs.weights_sample(folder, refs.ADAPTER_PATTERNS),
        [settings.rank, settings.alpha, settings.rslora, settings.ranks, settings.alphas],
        base.get("weights_sample") or [base["model_id"], base["revision"]],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


class _Own(tensors.TensorFolder):
    """The adapter's own file of tensors."""

    def _look(self):
        for kind, name in zip(("safetensors", "bin"), refs.ADAPTER_WEIGHTS, strict=True):
            if (self.path / name).is_file():
                return kind, [name], None
        raise InputError(f"{self.path} holds {refs.ADAPTER_CONFIG} but no {refs.ADAPTER_WEIGHTS[0]}; copy it again")


def _in_memory(name: str) -> str:
    """What a tensor of the adapter that replaces one of the base is called in the base's state dict."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def _vocabulary(own: _Own, arch: archs.Arch) -> int | None:
    """Rows of the embeddings where the adapter brings its own; None where it does not."""
    wanted = f"{arch.embeddings[0]}.weight"
    return next((own.shape(name)[0] for name in own.names() if arch.canonical(_in_memory(name)) == wanted), None)


@dataclass(frozen=True)
class LowRank:
    """scale * B A, to be added to a weight; `flipped`: (B A)^T, for weights stored [in, out] and for embeddings."""

    a: str
    b: str
    scale: float
    flipped: bool


@dataclass(frozen=True)
class Whole:
    """A tensor trained whole, that replaces the base's; or, with `scale`, one that is added to it."""

    tensor: str
    scale: float | None = None


class AdapterFolder:
    """The tensors of base and adapter merged, by the base's names on disk: what `TensorFolder` is for a model folder.

    A tensor that the adapter leaves alone is the base's own, with its `entry` in the base's file (`folder_of`); one
    that it changes is computed, `ROWS` rows at a time, and has none.
    """

    kind = "adapter"
    quantised = None  # a base that is, is refused

    def __init__(self, ref: refs.ModelRef, base: refs.ModelRef | None = None, lazy: bool = False):
        self.ref, self.spec = ref, ref.spec
        self.path = Path(ref.folder(refs.ADAPTER_PATTERNS))
        self.settings = read_settings(self.path)
        self.base_ref = ref.adapted if ref.base or base is None else ref.with_base(base).adapted
        self.arch = archs.for_config(self.base_ref.config())
        self.own = _Own(self.path)
        try:
            self.base = tensors.open_folder(self.base_ref, lazy=lazy)
        except formats.Quantised as error:
            raise formats.Quantised(
                f"{self.spec} is an adapter of a quantised base. {error}; write where that is into "
                f"base_model_name_or_path of its {refs.ADAPTER_CONFIG}"
            ) from None
        self.files = self.base.files
        self.changes: dict[str, LowRank | Whole] = self._plan()

    def __enter__(self) -> AdapterFolder:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.own.close()
        self.base.close()

    def __contains__(self, name: str) -> bool:
        return name in self.base

    def names(self) -> list[str]:
        return self.base.names()

    def shard_of(self, name: str) -> str:
        return self.base.shard_of(name)

    def header(self, file: str) -> tensors.Header:
        return self.base.header(file)

    def folder_of(self, name: str) -> tensors.TensorFolder | None:
        """The folder with a tensor's bytes, the base's; None for one that is computed."""
        return None if name in self.changes else self.base

    def entry(self, name: str) -> tensors.Entry:
        """Where the bytes of a tensor are in the base's file.

        Raises:
            InputError: the adapter changes it, so that it is in no file.
        """
        if name in self.changes:
            raise InputError(f"{name} of {self.spec} is computed from an adapter and is in no file")
        return self.base.entry(name)

    def fetch(self, names=None) -> None:
        self.base.fetch(names)

    def shape(self, name: str) -> tuple[int, ...]:
        change = self.changes.get(name)
        if isinstance(change, Whole) and change.scale is None:
            return self.own.shape(change.tensor)
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    def get(self, name: str) -> torch.Tensor:
        """The merged tensor. The base's own where the adapter leaves it alone: do not write into it."""
        shape = self.shape(name)
        return self.rows(name, 0, shape[0]) if name in self.changes and shape else self.base.get(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (first dimension) of the merged tensor, in the base's dtype."""
        import torch

        change = self.changes.get(name)
        if change is None:
            return self.base.rows(name, start, stop)
        if isinstance(change, Whole) and change.scale is None:
            return self.own.rows(change.tensor, start, stop).to(self.dtype(name))
        stop = min(stop, self.shape(name)[0])
        wide = torch.promote_types(self.dtype(name), torch.float32)
        merged = torch.empty((max(0, stop - start), *self.shape(name)[1:]), dtype=self.dtype(name))
        for first in range(start - start % ROWS, stop, ROWS):
            last = min(first + ROWS, self.shape(name)[0])
            block = self.base.rows(name, first, last).to(wide) + self._added(change, first, last)
            a, b = max(first, start), min(last, stop)
            merged[a - start : b - start] = block[a - first : b - first]
        return merged

    def _added(self, change: LowRank | Whole, first: int, last: int) -> torch.Tensor:
        """What is added to rows `first` to `last`, in float32."""
        if isinstance(change, Whole):
            return self.own.rows(change.tensor, first, last).float() * change.scale
        a, b = self.own.get(change.a).float(), self.own.get(change.b).float()
        product = a[:, first:last].T @ b.T if change.flipped else b[first:last] @ a
        return product * change.scale

    def _plan(self) -> dict[str, LowRank | Whole]:
        """What the adapter does to each tensor of the base."""
        pairs: dict[str, dict[str, str]] = {}
        found: dict[str, LowRank | Whole] = {}
        for name in self.own.names():
            module = name.removeprefix(PREFIX)
            match = LOW_RANK.fullmatch(module)
            if match is None:
                if "lora_" in module or not module.endswith((".weight", ".bias")):
                    raise InputError(f"{self.spec}: the adapter's tensor {name} is of a kind that is not merged here")
                self._add(found, name, _in_memory(name), Whole(name))
            elif match["bias"]:
                pairs.setdefault(match[1], {})["bias"] = name
            else:
                pairs.setdefault(match[1], {})[match["side"] or match["embedding"]] = name
        for module, own in pairs.items():
            if "A" not in own or "B" not in own:
                raise InputError(f"{self.spec}: the adapter holds only one of A and B of {module}; copy it again")
            scale = self._scale(module, own)
            embedding = "lora_embedding" in own["A"]
            layer = self.arch.layer_of(f"{module}.weight")
            flipped = embedding or (self.arch.transposed and layer is not None)
            self._add(found, own["A"], f"{module}.weight", LowRank(own["A"], own["B"], scale, flipped))
            if "bias" in own:
                self._add(found, own["bias"], f"{module}.bias", Whole(own["bias"], scale))
        self._refuse_gaps(pairs)
        self._refuse_half(found)
        self._warn_tied(found)
        return found

    def _refuse_half(self, found: dict[str, LowRank | Whole]) -> None:
        """Refuse embeddings and an output matrix of different sizes: what is missing would be made up at random."""
        names = [f"{self.arch.embeddings[0]}.weight", f"{self.arch.head}.weight"]
        rows = {}
        for name in names:
            disk = self._places.get(name)
            if disk:  # a tied head is not there
                change = found.get(disk)
                whole = isinstance(change, Whole) and change.scale is None
                rows[name] = (self.own.shape(change.tensor) if whole else self.base.shape(disk))[0]
        if len(set(rows.values())) > 1 and any(self._places.get(name) in found for name in names):
            sizes = " and ".join(f"{name} of {n} rows" for name, n in rows.items())
            raise InputError(f"{self.spec}: with the adapter there is {sizes}; save both with it (modules_to_save)")

    def _scale(self, module: str, own: dict[str, str]) -> float:
        a, b = self.own.shape(own["A"]), self.own.shape(own["B"])
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            raise InputError(f"{self.spec}: A {list(a)} and B {list(b)} of {module} make no product; copy it again")
        return self.settings.scale(module, a[0])

    def _add(self, found: dict, own: str, name: str, change: LowRank | Whole) -> None:
        """Put `change` at the base's tensor that is called `name` in memory; shapes checked."""
        disk = self._places.get(self.arch.canonical(name))
        if disk is None:
            tied = " (the base ties it to its embeddings)" if name == f"{self.arch.head}.weight" else ""
            raise InputError(f"{self.spec}: the adapter changes {name}, which {self.base_ref.spec} does not have{tied}")
        mine, theirs = self.own.shape(own), self.base.shape(disk)
        if isinstance(change, LowRank):
            a, b = self.own.shape(change.a), self.own.shape(change.b)
            mine = (a[1], b[0]) if change.flipped else (b[0], a[1])
        rows = isinstance(change, Whole) and change.scale is None and disk in self.arch.embedding_tensors(self._disk)
        if mine[int(rows) :] != theirs[int(rows) :] or len(mine) != len(theirs):
            raise InputError(
                f"{self.spec}: the adapter's change of {name} has shape {list(mine)}, and {self.base_ref.spec} has "
                f"{list(theirs)}; is it an adapter of another base?"
            )
        if disk in found:
            raise InputError(f"{self.spec}: the adapter changes {name} twice, by a product and as a whole")
        found[disk] = change

    @cached_property
    def _disk(self) -> frozenset[str]:
        return frozenset(self.base.names())

    @cached_property
    def _places(self) -> dict[str, str]:
        return {self.arch.canonical(name): name for name in self._disk}

    def _refuse_gaps(self, pairs: dict) -> None:
        """What the configuration targets by name, and the base has, must be in the file at least once."""
        for target in self.settings.targets:
            there = any(f".{name}".endswith(f".{target}.weight") for name in self._disk)
            if there and not any(f".{module}".endswith(f".{target}") for module in pairs):
                raise InputError(f"{self.spec}: the adapter targets {target}, but its file holds nothing of it")

    def _warn_tied(self, found: dict) -> None:
        names = self.arch.embedding_tensors(self._disk)
        if names[0] in found and f"{self.arch.head}.weight" not in self._places:
            cli.warn(f"{self.spec}: the base ties its head to the embeddings, so the merged embeddings change both")


def apply(model: nn.Module, ref: refs.ModelRef) -> None:
    """Give a loaded base the weights of the merged model, as if it had been saved and loaded in the model's dtype."""
    import torch

    with AdapterFolder(ref) as stored, torch.no_grad():
        rows = _vocabulary(stored.own, stored.arch)
        if rows and model.get_input_embeddings().weight.shape[0] != rows:
            model.resize_token_embeddings(rows, mean_resizing=False)
        for disk, place in stored.arch.module_places(stored.changes, model).items():
            parameter = model.get_parameter(place.name)
            if parameter.is_meta:
                raise InputError(f"{ref.spec}: an adapter cannot be merged into layers that are kept on the disk")
            (parameter if place.index is None else parameter[place.index]).copy_(stored.get(disk))
    model.requires_grad_(False)
