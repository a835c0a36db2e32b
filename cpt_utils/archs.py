"""Parameters by meaning: one table from a model type to its projections, on disk and in memory.

A *projection* is q, k, v, o, gate, up or down of one layer. On disk it is a tensor, or a slice of a fused one (Phi-3,
GPT-NeoX, GPT-2); `Arch.parts` says which. In memory it is a module; `Arch.module` returns it. Names on disk and in
memory differ (prefixes, `embed_out` against `lm_head`); `Arch.module_names` maps one to the other.

To add an architecture, add one entry to `ARCHS`: plain `Arch()` where the module names are Llama's, else what differs.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from cpt_utils.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ATTENTION + FFN

# What configs call the same number. The first key that is there and not null counts.
FIELDS = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_attention_heads", "n_head", "n_heads"),
    "head_dim": ("head_dim",),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim"),
}

# Constants that old checkpoints carry (causal masks, rotary frequencies): no parameters, never compared or swapped.
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attention|attn)\.(bias|masked_bias))$")


@dataclass(frozen=True)
class Slot:
    """A projection's module below its layer.

    `order` names the projections fused in that module, in order of their output features. They are stacked block by
    block, or, with `per_head`, head by head ([heads, len(order), head_dim], GPT-NeoX).
    """

    module: str
    order: tuple[str, ...] = ()
    per_head: bool = False


def fused(module: str, *order: str, per_head: bool = False) -> dict[str, Slot]:
    """One slot for each of `order`, all in the same module."""
    return {name: Slot(module, order, per_head) for name in order}


@dataclass(frozen=True)
class Part:
    """A projection's weight or bias on disk: entries `index` along `dim` (its output features) of `tensor`.

    `index` is None (the whole tensor), a slice, or a LongTensor of positions.
    """

    tensor: str
    role: str
    dim: int = 0
    index: slice | torch.Tensor | None = None

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of the on-disk tensor `tensor`: a view where it is a slice, a copy where it is scattered."""
        return take(tensor, self.dim, self.index)


def take(tensor: torch.Tensor, dim: int, index: slice | torch.Tensor | None) -> torch.Tensor:
    """Entries `index` along `dim` of `tensor` (all of it for None)."""
    if index is None:
        return tensor
    if isinstance(index, slice):
        return tensor.narrow(dim, index.start, index.stop - index.start)
    return tensor.index_select(dim, index.to(tensor.device))


@dataclass(frozen=True)
class Unit:
    """Where a neuron's pre-activation can be read: features `start` to `stop` of the output of a layer's `module`."""

    projection: str
    module: str
    start: int
    stop: int


LLAMA_PROJECTIONS = {name: Slot(f"self_attn.{name}") for name in ATTENTION} | {
    name: Slot(f"mlp.{name}") for name in FFN
}


@dataclass(frozen=True)
class Arch:
    """One model type. The defaults are Llama's.

    Attributes:
        projections_at: projection -> where it is below a layer.
        decoder_path: path of the module that holds the layers, from the causal LM.
        prefixes: what stands in front of the decoder's names on disk; a model saved without its head has no prefix,
            which is always tried last.
        layers, norm, embeddings: names below the decoder.
        head: module path of the output matrix; absent on disk when it is tied.
        activation: module of the nonlinearity below a layer.
        transposed: weights are stored [in, out] (Conv1D).
        renames: (start of a name on disk, start of the same name in memory) where they differ otherwise.
    """

    projections_at: dict[str, Slot] = field(default_factory=lambda: LLAMA_PROJECTIONS)
    decoder_path: str = "model"
    prefixes: tuple[str, ...] = ("model.",)
    layers_name: str = "layers"
    norm: str = "norm"
    embeddings: tuple[str, ...] = ("embed_tokens",)
    head: str = "lm_head"
    activation: str = "mlp.act_fn"
    transposed: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    model_type: str = ""

    # --- sizes ---

    def n_layers(self, config) -> int:
        """Number of decoder layers L."""
        return _number(config, "layers")

    def heads(self, config) -> tuple[int, int, int]:
        """(query heads, key/value heads, features per head)."""
        heads = _number(config, "heads")
        head_dim = _number(config, "head_dim", required=False) or _number(config, "hidden") // heads
        return heads, _number(config, "kv_heads"), head_dim

    def ffn_width(self, config) -> int:
        """FFN neurons of a layer, I (GPT-2 leaves it out where it is four times the width)."""
        return _number(config, "ffn", required=False) or 4 * _number(config, "hidden")

    def projections(self, config=None) -> tuple[str, ...]:
        """The projections this type has, in the order of PROJECTIONS; six where there is no gate."""
        return tuple(name for name in PROJECTIONS if name in self.projections_at)

    # --- on disk ---

    def parts(self, config, layer: int, projection: str, disk_names: Collection[str]) -> list[Part]:
        """The weight and, where there is one, the bias of `projection` in `layer`, among the tensors `disk_names`.

        Raises:
            InputError: the type has no such projection, or no tensor of that name is on disk (near misses are named).
        """
        slot = self.projections_at.get(projection)
        if slot is None:
            raise InputError(
                f"model type {self.model_type} has no {projection}; it has {', '.join(self.projections())}"
            )
        index = self._features(config, projection, slot)
        stem = f"{self.layers_name}.{layer}.{slot.module}"
        parts = [Part(self.disk_name(f"{stem}.weight", disk_names), "weight", 1 if self.transposed else 0, index)]
        bias = self._find(f"{stem}.bias", disk_names)
        if bias:
            parts.append(Part(bias, "bias", 0, index))
        return parts

    def layer_tensors(self, disk_names: Iterable[str], layer: int) -> list[str]:
        """Every parameter of `layer` on disk: projections, biases, norms.

        Raises:
            InputError: there is none; names the layers and the nearest names that are there.
        """
        disk_names = list(disk_names)
        found = [name for name in disk_names if self.layer_of(name) == layer and not is_buffer(name)]
        if not found:
            raise InputError(_no_match(f"{self.prefixes[0]}{self.layers_name}.{layer}.", disk_names, self.model_type))
        return found

    def layer_of(self, disk_name: str) -> int | None:
        """The layer a tensor on disk belongs to; None for embeddings, final norm and head."""
        match = self._layer_pattern.match(self.canonical(disk_name))
        return int(match[1]) if match else None

    def canonical(self, disk_name: str) -> str:
        """The name without what varies between files of one model: base and target are matched by it."""
        for start, new in self.renames:
            if disk_name.startswith(start):
                disk_name = new + disk_name.removeprefix(start)
                break
        for prefix in (f"{self.decoder_path}.", *self.prefixes):
            if disk_name.startswith(prefix):
                return disk_name.removeprefix(prefix)
        return disk_name

    def disk_name(self, canonical: str, disk_names: Collection[str]) -> str:
        """The name on disk of a canonical one.

        Raises:
            InputError: there is none; near misses are named.
        """
        name = self._find(canonical, disk_names)
        if name is None:
            raise InputError(_no_match(f"{self.prefixes[0]}{canonical}", disk_names, self.model_type))
        return name

    def embedding_tensors(self, disk_names: Collection[str]) -> list[str]:
        """Input embeddings and, where it is on disk (not tied), the output matrix."""
        found = [self.disk_name(f"{name}.weight", disk_names) for name in self.embeddings]
        head = self._find(f"{self.head}.weight", disk_names)
        return found + ([head] if head else [])

    # --- in memory ---

    def decoder(self, model: nn.Module) -> nn.Module:
        """The module that holds embeddings, layers and final norm; running it alone leaves the head out."""
        return self._submodule(model, self.decoder_path)

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return self._submodule(model, f"{self.decoder_path}.{self.layers_name}")

    def final_norm(self, model: nn.Module) -> nn.Module:
        return self._submodule(model, f"{self.decoder_path}.{self.norm}")

    def layer_path(self, layer: int) -> str:
        """Dotted name of a layer from the causal LM."""
        return f"{self.decoder_path}.{self.layers_name}.{layer}"

    def module_path(self, layer: int, projection: str) -> str:
        """Dotted name of the module that computes `projection` (perhaps with others) from the causal LM."""
        return f"{self.layer_path(layer)}.{self.projections_at[projection].module}"

    def module(self, model: nn.Module, layer: int, projection: str) -> nn.Module:
        return self._submodule(model, self.module_path(layer, projection))

    def activation_module(self, model: nn.Module, layer: int) -> nn.Module:
        """The nonlinearity of a layer's FFN: its output is act(W_gate x), or act(W_up x) where there is no gate."""
        return self._submodule(model, f"{self.layer_path(layer)}.{self.activation}")

    def unit(self, config) -> Unit:
        """Where the pre-activation of every FFN neuron is read: the gate's output, or `up`'s where there is no gate."""
        projection = "gate_proj" if "gate_proj" in self.projections_at else "up_proj"
        slot = self.projections_at[projection]
        features = self._features(config, projection, slot) or slice(0, self.ffn_width(config))
        return Unit(projection, slot.module, features.start, features.stop)

    def module_names(self, disk_names: Iterable[str], model: nn.Module) -> dict[str, str]:
        """Tensor on disk -> name in `model.state_dict()`. Buffers that only files have are left out.

        Raises:
            InputError: a tensor has no place in the model; near misses are named.
        """
        known = set(model.state_dict())
        names = {}
        for disk in disk_names:
            canonical = self.canonical(disk)
            places = (disk, f"{self.decoder_path}.{canonical}", canonical)
            found = next((name for name in places if name in known), None)
            if found is not None:
                names[disk] = found
            elif not is_buffer(disk):
                near = _near(f"{self.decoder_path}.{canonical}", known)
                raise InputError(f"tensor {disk} has no place in the loaded {type(model).__name__}; nearest: {near}")
        return names

    # --- inside ---

    @cached_property
    def _layer_pattern(self) -> re.Pattern:
        return re.compile(rf"{re.escape(self.layers_name)}\.(\d+)\.")

    def _find(self, canonical: str, disk_names: Collection[str]) -> str | None:
        candidates = [prefix + canonical for prefix in (*self.prefixes, "")]
        for start, new in self.renames:
            if canonical.startswith(new):
                candidates.append(start + canonical.removeprefix(new))
        return next((name for name in candidates if name in disk_names), None)

    def _features(self, config, projection: str, slot: Slot) -> slice | torch.Tensor | None:
        """Which output features of its module a projection has; None for all."""
        if not slot.order:
            return None
        if slot.per_head:
            import torch

            heads, _, head_dim = self.heads(config)
            rows = torch.arange(heads * len(slot.order) * head_dim).view(heads, len(slot.order), head_dim)
            return rows[:, slot.order.index(projection)].reshape(-1)
        widths = [self._width(config, name) for name in slot.order]
        start = sum(widths[: slot.order.index(projection)])
        return slice(start, start + self._width(config, projection))

    def _width(self, config, projection: str) -> int:
        if projection in FFN:
            return self.ffn_width(config)
        heads, kv_heads, head_dim = self.heads(config)
        return (heads if projection == "q_proj" else kv_heads) * head_dim

    def _submodule(self, model: nn.Module, path: str) -> nn.Module:
        try:
            return model.get_submodule(path)
        except AttributeError:
            near = _near(path, {name for name, _ in model.named_modules()})
            raise InputError(f"{type(model).__name__} has no module {path}; nearest: {near}") from None


# Model type (config.json) -> architecture.
ARCHS: dict[str, Arch] = {
    "llama": Arch(),
    "mistral": Arch(),
    "qwen2": Arch(),
    "qwen3": Arch(),
    "gemma2": Arch(),
    "gemma3_text": Arch(),
    # Gemma 3 from 4B on has a vision tower; the language model stands one level deeper.
    "gemma3": Arch(
        decoder_path="model.language_model",
        prefixes=("language_model.model.", "model.language_model."),
        renames=(
            ("language_model.lm_head.", "lm_head."),
            ("vision_tower.vision_model.", "model.vision_tower."),
            ("vision_tower.", "model.vision_tower."),
            ("multi_modal_projector.", "model.multi_modal_projector."),
        ),
    ),
    "olmo2": Arch(),
    "phi3": Arch(
        projections_at={
            **fused("self_attn.qkv_proj", "q_proj", "k_proj", "v_proj"),
            "o_proj": Slot("self_attn.o_proj"),
            **fused("mlp.gate_up_proj", "gate_proj", "up_proj"),
            "down_proj": Slot("mlp.down_proj"),
        },
        activation="mlp.activation_fn",
    ),
    "gpt_neox": Arch(
        projections_at={
            **fused("attention.query_key_value", "q_proj", "k_proj", "v_proj", per_head=True),
            "o_proj": Slot("attention.dense"),
            "up_proj": Slot("mlp.dense_h_to_4h"),
            "down_proj": Slot("mlp.dense_4h_to_h"),
        },
        decoder_path="gpt_neox",
        prefixes=("gpt_neox.",),
        norm="final_layer_norm",
        embeddings=("embed_in",),
        activation="mlp.act",
        renames=(("embed_out.", "lm_head."),),
    ),
    "gpt2": Arch(
        projections_at={
            **fused("attn.c_attn", "q_proj", "k_proj", "v_proj"),
            "o_proj": Slot("attn.c_proj"),
            "up_proj": Slot("mlp.c_fc"),
            "down_proj": Slot("mlp.c_proj"),
        },
        decoder_path="transformer",
        prefixes=("transformer.",),
        layers_name="h",
        norm="ln_f",
        embeddings=("wte", "wpe"),
        activation="mlp.act",
        transposed=True,
    ),
}
ARCHS = {name: replace(arch, model_type=name) for name, arch in ARCHS.items()}


def for_config(config) -> Arch:
    """The table's entry for a config (a `PretrainedConfig`, or the dict of a config.json).

    Raises:
        InputError: no `model_type`, or one that the table does not have; names the nearest ones and the entry to add.
    """
    model_type = _as_dict(config).get("model_type")
    if not model_type:
        raise InputError("config.json has no model_type; is this the folder of a Hugging Face causal language model?")
    if model_type not in ARCHS:
        near = difflib.get_close_matches(model_type, ARCHS, n=3, cutoff=0.4) or sorted(ARCHS)
        raise InputError(
            f"model type {model_type!r} is not in the table of architectures (nearest: {', '.join(near)}); add an "
            f'entry "{model_type}": Arch(...) to ARCHS in cpt_utils/archs.py, plain Arch() where names are Llama\'s'
        )
    return ARCHS[model_type]


def is_buffer(disk_name: str) -> bool:
    """Whether a tensor on disk is a constant of an old checkpoint and not a parameter."""
    return BUFFERS.search(disk_name) is not None


def _as_dict(config) -> dict:
    return config if isinstance(config, dict) else config.to_dict()


def _number(config, name: str, required: bool = True) -> int | None:
    values = _as_dict(config)
    if isinstance(values.get("text_config"), dict):  # models with a vision tower keep the decoder's sizes below
        values = values["text_config"]
    for key in FIELDS[name]:
        if values.get(key) is not None:
            return int(values[key])
    if required:
        raise InputError(f"config.json has none of the keys {', '.join(FIELDS[name])}; add the one the model has")
    return None


def _near(wanted: str, names: Iterable[str]) -> str:
    return ", ".join(difflib.get_close_matches(wanted, list(names), n=3, cutoff=0.3)) or "none"


def _no_match(wanted: str, disk_names: Iterable[str], model_type: str) -> str:
    return (
        f"no tensor {wanted} on disk, where a model of type {model_type} has one (nearest: "
        f"{_near(wanted, disk_names)}); check the folder, or the entry {model_type!r} of ARCHS in cpt_utils/archs.py"
    )
