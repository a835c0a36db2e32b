"""Parameters by meaning: one table from a model type to its projections, on disk and in memory.

A *projection* is q, k, v, o, gate, up or down of one layer. On disk it is a tensor, or a slice of a fused one (Phi-3,
GPT-NeoX, GPT-2), or one tensor for each expert of a mixture of experts (MoE); `Arch.parts` says which. In memory it is
a module; `Arch.module` returns it. Names on disk and in memory differ (prefixes, `embed_out` against `lm_head`, experts
that are one parameter in memory); `Arch.module_places` maps one to the other.

To add an architecture, add one entry to `ARCHS`: plain `Arch()` where the module names are Llama's, else what differs.
The tests of every type and docs/architectures.md (`python docs/architectures.py`) follow from the entry.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
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
ROUTER = "router"  # of a mixture of experts: a component of its own, neither attention nor FFN

# What configs call the same number. The first key that is there and not null counts.
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
FIELDS = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "n_embed", "d_model"),
    "heads": HEADS,
    "kv_heads": ("num_key_value_heads", "num_kv_heads", *HEADS),
    "head_dim": ("head_dim",),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "experts": ("num_local_experts", "num_experts"),
    "expert_ffn": ("moe_intermediate_size", "intermediate_size"),
}

# Constants that old checkpoints carry (causal masks, rotary frequencies, sinusoidal positions): no parameters, never
# compared or swapped.
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attention|attn)\.(bias|masked_bias)|embed_positions\.weights)$")


@dataclass(frozen=True)
class Slot:
    """A projection's module below its layer.

    `order` names the projections fused in that module, in order of their output features. They are stacked block by
    block, or, with `by_group` (q, k, v), for one KV head after the other: its query heads, its key head, its value
    head, that is [KV heads, query heads of each + 2, head_dim].
    """

    module: str
    order: tuple[str, ...] = ()
    by_group: bool = False


def fused(module: str, *order: str, by_group: bool = False) -> dict[str, Slot]:
    """One slot for each of `order`, all in the same module."""
    return {name: Slot(module, order, by_group) for name in order}


def named(stem: str, *modules: str) -> dict[str, Slot]:
    """Slots for the last projections of PROJECTIONS' halves: q, k, v, o below an attention, or [gate,] up, down."""
    names = ATTENTION if len(modules) == 4 else FFN[-len(modules) :]
    return {name: Slot(f"{stem}.{module}" if stem else module) for name, module in zip(names, modules, strict=True)}


@dataclass(frozen=True)
class Experts:
    """The FFN of a MoE layer: a router and E experts, each with its own gate, up and down projection.

    On disk the experts are tensors `<block>.experts.<number>.<name>.weight` and the router `<block>.gate.weight`; in
    memory all gates and ups are one parameter `mlp.experts.gate_up_proj` [E, 2 I, hidden] (gate first), all downs
    `mlp.experts.down_proj` [E, hidden, I], and the router is `mlp.gate`. How many there are, and which layers are
    dense after all, says the config.
    """

    block: str = "mlp"
    names: dict[str, str] = field(default_factory=lambda: dict(zip(FFN, FFN, strict=True)))


@dataclass(frozen=True)
class Place:
    """Where a tensor on disk is in memory: `index` (None: all) of the tensor `name` of the state dict.

    `state[name][index]` has the shape of the tensor on disk.
    """

    name: str
    index: tuple[int | slice, ...] | None = None


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


LLAMA_ATTENTION = named("self_attn", *ATTENTION)
LLAMA_PROJECTIONS = LLAMA_ATTENTION | named("mlp", *FFN)


@dataclass(frozen=True)
class Arch:
    """One model type. The defaults are Llama's.

    Attributes:
        projections_at: projection -> where it is below a layer (of a MoE: below one of its dense layers).
        experts_at: the experts of a MoE type; None for a dense one.
        decoder_path: path of the module that holds the layers, from the causal LM.
        prefixes: what stands in front of the decoder's names on disk; a model saved without its head has no prefix,
            which is always tried last.
        layers, norm, embeddings: names below the decoder.
        head: module path of the output matrix; absent on disk when it is tied.
        activation: module of the nonlinearity below a layer.
        transposed: weights are stored [in, out] (Conv1D).
        renames: (start of a name on disk, start of the same name in memory) where they differ otherwise.
        defaults: config key -> value, for keys that published config.json files of the type leave out.
        norms: where a layer's norms are, from the residual stream: for docs/architectures.md, like the next two.
        examples: model names on the hub.
        notes: what a user should know.
    """

    projections_at: dict[str, Slot] = field(default_factory=lambda: LLAMA_PROJECTIONS)
    experts_at: Experts | None = None
    decoder_path: str = "model"
    prefixes: tuple[str, ...] = ("model.",)
    layers_name: str = "layers"
    norm: str = "norm"
    embeddings: tuple[str, ...] = ("embed_tokens",)
    head: str = "lm_head"
    activation: str = "mlp.act_fn"
    transposed: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    defaults: dict[str, int] = field(default_factory=dict)
    norms: str = "before"
    examples: tuple[str, ...] = ()
    notes: str = ""
    model_type: str = ""

    # --- sizes ---

    def n_layers(self, config) -> int:
        """Number of decoder layers L."""
        return self._number(config, "layers")

    def heads(self, config) -> tuple[int, int, int]:
        """(query heads, key/value heads, features per head)."""
        heads = self._number(config, "heads")
        head_dim = self._number(config, "head_dim", required=False) or self._number(config, "hidden") // heads
        # Falcon and GPT-BigCode say by flags how many KV heads there are; the number beside them may be meaningless.
        values = _decoder_values(config)
        if "multi_query" in values and not values.get("new_decoder_architecture"):
            return heads, 1 if values["multi_query"] else heads, head_dim
        return heads, self._number(config, "kv_heads"), head_dim

    def experts(self, config, layer: int) -> int:
        """Experts of a layer; 0 where its FFN is dense."""
        if self.experts_at is None:
            return 0
        values = _decoder_values(config)
        dense = layer in (values.get("mlp_only_layers") or ()) or (layer + 1) % (values.get("decoder_sparse_step") or 1)
        return 0 if dense else self._number(config, "experts")

    def has_router(self, config, layer: int) -> bool:
        """Whether a layer sends its tokens to experts."""
        return self.experts(config, layer) > 0

    def ffn_width(self, config, layer: int | None = None) -> int:
        """FFN neurons of `layer`, or of the widest one: I, or E x I of a MoE layer (expert e's are e I to e I + I - 1).

        Where configs leave I out (GPT-2, Bloom, MPT) it is four times the hidden size.
        """
        if self.experts_at is None:
            return self._dense_width(config)
        if layer is None:
            return max(self.ffn_width(config, each) for each in range(self.n_layers(config)))
        experts = self.experts(config, layer)
        return experts * self._number(config, "expert_ffn") if experts else self._dense_width(config)

    def projections(self, config=None) -> tuple[str, ...]:
        """The projections this type has, in the order of PROJECTIONS; six where there is no gate."""
        return tuple(name for name in PROJECTIONS if name in self.projections_at)

    # --- on disk ---

    def parts(self, config, layer: int, projection: str, disk_names: Collection[str]) -> list[Part]:
        """The weight and, where there is one, the bias of `projection` in `layer`, among the tensors `disk_names`.

        Of a MoE layer's gate, up or down one weight for each expert, in order; where a file holds all experts in one
        tensor, as memory does, a single one [E, out, in] along dim 1. `projection` may be ROUTER, too.

        Raises:
            InputError: the type or the layer has no such projection, or no tensor of that name is on disk (near misses
                are named).
        """
        if projection in (*FFN, ROUTER) and self.has_router(config, layer):
            return self._expert_parts(config, layer, projection, disk_names)
        slot = self.projections_at.get(projection)
        if slot is None:
            raise InputError(
                f"model type {self.model_type} has no {projection} in layer {layer}; it has "
                f"{', '.join(self.projections())}"
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
        """Input embeddings with what belongs to them (learned positions, their norm) and, where it is on disk (not
        tied), the output matrix; biases too."""
        found = [self.disk_name(f"{name}.weight", disk_names) for name in self.embeddings]
        others = [f"{name}.bias" for name in self.embeddings] + [f"{self.head}.weight", f"{self.head}.bias"]
        return found + [name for name in (self._find(other, disk_names) for other in others) if name]

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

    def experts_module(self, model: nn.Module, layer: int) -> nn.Module:
        """The module of a MoE layer's experts; called with (tokens [n, hidden], experts [n, top k], weights)."""
        return self._submodule(model, f"{self.layer_path(layer)}.mlp.experts")

    def activation_module(self, model: nn.Module, layer: int) -> nn.Module:
        """The nonlinearity of a layer's FFN: its output is act(W_gate x), or act(W_up x) where there is no gate.

        That of a MoE layer sees only the tokens that are routed, expert by expert.
        """
        if self.experts(model.config, layer):
            return self._submodule(model, f"{self.layer_path(layer)}.mlp.experts.act_fn")
        return self._submodule(model, f"{self.layer_path(layer)}.{self.activation}")

    def unit(self, config) -> Unit:
        """Where a dense layer's neurons are read before the activation: the gate's output, or `up`'s without a gate."""
        projection = "gate_proj" if "gate_proj" in self.projections_at else "up_proj"
        slot = self.projections_at[projection]
        features = self._features(config, projection, slot) or slice(0, self._dense_width(config))
        return Unit(projection, slot.module, features.start, features.stop)

    def module_places(self, disk_names: Iterable[str], model: nn.Module) -> dict[str, Place]:
        """Tensor on disk -> its place in `model.state_dict()`. Buffers that only files have are left out.

        Raises:
            InputError: a tensor has no place in the model; near misses are named.
        """
        known = model.state_dict()
        found = {}
        for disk in disk_names:
            canonical = self.canonical(disk)
            names = (disk, f"{self.decoder_path}.{canonical}", canonical)
            name = next((name for name in names if name in known), None)
            place = Place(name) if name else self._expert_place(canonical, known)
            if place is not None:
                found[disk] = place
            elif not is_buffer(disk):
                near = _near(f"{self.decoder_path}.{canonical}", known)
                raise InputError(f"tensor {disk} has no place in the loaded {type(model).__name__}; nearest: {near}")
        return found

    def module_names(self, disk_names: Iterable[str], model: nn.Module) -> dict[str, str]:
        """`module_places` by name alone, for tensors on disk that are whole ones in memory.

        Raises:
            InputError: as `module_places`, and for an expert's tensor.
        """
        places = self.module_places(disk_names, model)
        for disk, place in places.items():
            if place.index is not None:
                raise InputError(
                    f"{disk} is a part of {place.name} in the loaded model and has no name of its own there"
                )
        return {disk: place.name for disk, place in places.items()}

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

    def _number(self, config, name: str, required: bool = True) -> int | None:
        values = self.defaults | {key: value for key, value in _decoder_values(config).items() if value is not None}
        for key in FIELDS[name]:
            if key in values:
                return int(values[key])
        if required:
            raise InputError(f"config.json has none of the keys {', '.join(FIELDS[name])}; add the one the model has")
        return None

    def _dense_width(self, config) -> int:
        return self._number(config, "ffn", required=False) or 4 * self._number(config, "hidden")

    def _expert_parts(self, config, layer: int, projection: str, disk_names: Collection[str]) -> list[Part]:
        stem, memory = (f"{self.layers_name}.{layer}.{block}" for block in (self.experts_at.block, "mlp"))
        if projection == ROUTER:
            name = self._find(f"{memory}.gate.weight", disk_names)
            return [Part(name or self.disk_name(f"{stem}.gate.weight", disk_names), "weight")]
        width = self._number(config, "expert_ffn")
        halves = {"gate_proj": slice(0, width), "up_proj": slice(width, 2 * width)}
        together = "gate_up_proj" if projection in halves else projection
        name = self._find(f"{memory}.experts.{together}", disk_names)
        if name:
            return [Part(name, "weight", 1, halves.get(projection))]
        name = stem + ".experts.{}." + self.experts_at.names[projection] + ".weight"
        experts = range(self.experts(config, layer))
        return [Part(self.disk_name(name.format(number), disk_names), "weight") for number in experts]

    def _expert_place(self, canonical: str, known: Mapping[str, torch.Tensor]) -> Place | None:
        """The place of an expert's or a router's tensor where memory names and holds them in another way than disk."""
        if self.experts_at is None:
            return None
        pattern = rf"({re.escape(self.layers_name)}\.\d+)\.{re.escape(self.experts_at.block)}\.(.*)"
        match = re.fullmatch(pattern, canonical)
        if match is None:
            return None
        stem = f"{self.decoder_path}.{match[1]}.mlp"
        expert = re.fullmatch(r"experts\.(\d+)\.(\w+)\.weight", match[2])
        if expert is None:
            return Place(f"{stem}.{match[2]}") if f"{stem}.{match[2]}" in known else None
        projection = {name: meaning for meaning, name in self.experts_at.names.items()}.get(expert[2])
        name = f"{stem}.experts.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"
        if projection is None or name not in known or int(expert[1]) >= len(known[name]):
            return None
        if projection == "down_proj":
            return Place(name, (int(expert[1]),))
        width = known[name].shape[1] // 2
        return Place(name, (int(expert[1]), slice(0, width) if projection == "gate_proj" else slice(width, 2 * width)))

    def _features(self, config, projection: str, slot: Slot) -> slice | torch.Tensor | None:
        """Which output features of its module a projection has; None for all."""
        if not slot.order:
            return None
        if slot.by_group:
            import torch

            heads, kv_heads, head_dim = self.heads(config)
            shares = {"q_proj": heads // kv_heads, "k_proj": 1, "v_proj": 1}
            first = sum(shares[name] for name in slot.order[: slot.order.index(projection)])
            rows = torch.arange((heads + 2 * kv_heads) * head_dim).view(kv_heads, -1, head_dim)
            rows = rows[:, first : first + shares[projection]].reshape(-1)
            # One KV head: every part is one stretch, which needs no list of positions.
            return rows if kv_heads > 1 else slice(int(rows[0]), int(rows[-1]) + 1)
        widths = [self._width(config, name) for name in slot.order]
        start = sum(widths[: slot.order.index(projection)])
        return slice(start, start + self._width(config, projection))

    def _width(self, config, projection: str) -> int:
        if projection in FFN:
            return self._dense_width(config)
        heads, kv_heads, head_dim = self.heads(config)
        return (heads if projection == "q_proj" else kv_heads) * head_dim

    def _submodule(self, model: nn.Module, path: str) -> nn.Module:
        try:
            return model.get_submodule(path)
        except AttributeError:
            near = _near(path, {name for name, _ in model.named_modules()})
            raise InputError(f"{type(model).__name__} has no module {path}; nearest: {near}") from None


# Slots that several types share.
QKV = ATTENTION[:3]
GATE_UP = {**fused("mlp.gate_up_proj", "gate_proj", "up_proj"), "down_proj": Slot("mlp.down_proj")}
UP_DOWN = named("mlp", "up_proj", "down_proj")
FAIRSEQ = named("self_attn", "q_proj", "k_proj", "v_proj", "out_proj") | named("", "fc1", "fc2")
BLOOM = {
    **fused("self_attention.query_key_value", *QKV, by_group=True),
    "o_proj": Slot("self_attention.dense"),
    **named("mlp", "dense_h_to_4h", "dense_4h_to_h"),
}
GPT = {"decoder_path": "transformer", "prefixes": ("transformer.",), "layers_name": "h", "norm": "ln_f"}
PARALLEL = "before, one for attention and FFN side by side"
SANDWICH = "before and after"

# Model type (config.json) -> architecture.
ARCHS: dict[str, Arch] = {
    "llama": Arch(examples=("meta-llama/Llama-3.1-8B", "TinyLlama/TinyLlama_v1.1", "utter-project/EuroLLM-1.7B")),
    "mistral": Arch(examples=("mistralai/Mistral-7B-v0.3",)),
    "ministral": Arch(examples=("mistralai/Ministral-8B-Instruct-2410",)),
    "ministral3": Arch(notes="The language model alone; with its vision tower it is a mistral3, which is not here."),
    "qwen2": Arch(examples=("Qwen/Qwen2.5-7B", "Qwen/Qwen2-1.5B"), notes="Biases on q, k, v."),
    "qwen3": Arch(examples=("Qwen/Qwen3-8B-Base",), notes="Norms on q and k."),
    "gemma": Arch(examples=("google/gemma-2b",)),
    "gemma2": Arch(norms=SANDWICH, examples=("google/gemma-2-9b",)),
    "gemma3_text": Arch(norms=SANDWICH, examples=("google/gemma-3-1b-pt",), notes="Norms on q and k."),
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
        defaults={"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
        norms=SANDWICH,
        examples=("google/gemma-3-4b-pt",),
        notes="With vision tower, which stays the target's in a swap and is not compared. Norms on q and k.",
    ),
    "olmo": Arch(examples=("allenai/OLMo-7B-hf",), notes="Norms without parameters."),
    "olmo2": Arch(norms="after", examples=("allenai/OLMo-2-1124-7B",), notes="Norms on q and k."),
    "olmo3": Arch(norms="after", examples=("allenai/Olmo-3-1025-7B",), notes="Norms on q and k."),
    "phi": Arch(
        projections_at=named("self_attn", "q_proj", "k_proj", "v_proj", "dense") | named("mlp", "fc1", "fc2"),
        norm="final_layernorm",
        activation="mlp.activation_fn",
        norms=PARALLEL,
        examples=("microsoft/phi-2", "microsoft/phi-1_5"),
        notes="The output matrix has a bias.",
    ),
    "phi3": Arch(
        projections_at={**fused("self_attn.qkv_proj", *QKV), "o_proj": Slot("self_attn.o_proj"), **GATE_UP},
        activation="mlp.activation_fn",
        examples=("microsoft/Phi-3-mini-4k-instruct", "microsoft/phi-4"),
    ),
    "gpt_neox": Arch(
        projections_at={
            **fused("attention.query_key_value", *QKV, by_group=True),
            "o_proj": Slot("attention.dense"),
            **named("mlp", "dense_h_to_4h", "dense_4h_to_h"),
        },
        decoder_path="gpt_neox",
        prefixes=("gpt_neox.",),
        norm="final_layer_norm",
        embeddings=("embed_in",),
        activation="mlp.act",
        renames=(("embed_out.", "lm_head."),),
        norms="before, attention and FFN side by side",
        examples=("EleutherAI/pythia-1.4b",),
    ),
    "gpt_neo": Arch(
        projections_at=named("attn.attention", "q_proj", "k_proj", "v_proj", "out_proj")
        | named("mlp", "c_fc", "c_proj"),
        **GPT,
        embeddings=("wte", "wpe"),
        activation="mlp.act",
        examples=("EleutherAI/gpt-neo-1.3B",),
    ),
    "gptj": Arch(
        projections_at=named("attn", "q_proj", "k_proj", "v_proj", "out_proj") | named("mlp", "fc_in", "fc_out"),
        **GPT,
        embeddings=("wte",),
        activation="mlp.act",
        norms=PARALLEL,
        examples=("EleutherAI/gpt-j-6b",),
        notes="The output matrix has a bias.",
    ),
    "gpt2": Arch(
        projections_at={
            **fused("attn.c_attn", *QKV),
            "o_proj": Slot("attn.c_proj"),
            **named("mlp", "c_fc", "c_proj"),
        },
        **GPT,
        embeddings=("wte", "wpe"),
        activation="mlp.act",
        transposed=True,
        examples=("openai-community/gpt2", "AI-Sweden-Models/gpt-sw3-1.3b"),
        notes="Weights are stored [in, out].",
    ),
    "gpt_bigcode": Arch(
        projections_at={
            **fused("attn.c_attn", *QKV, by_group=True),
            "o_proj": Slot("attn.c_proj"),
            **named("mlp", "c_fc", "c_proj"),
        },
        **GPT,
        embeddings=("wte", "wpe"),
        activation="mlp.act",
        examples=("bigcode/starcoder",),
        notes="With one KV head (`multi_query`) or as many as query heads.",
    ),
    "bloom": Arch(
        projections_at=BLOOM,
        **GPT,
        embeddings=("word_embeddings", "word_embeddings_layernorm"),
        activation="mlp.gelu_impl",
        examples=("bigscience/bloom-7b1",),
        notes="Layers return tuples; a norm follows the embeddings.",
    ),
    "falcon": Arch(
        projections_at=BLOOM,
        **GPT,
        embeddings=("word_embeddings",),
        activation="mlp.act",
        norms="before, attention and FFN side by side",
        examples=("tiiuae/falcon-7b", "tiiuae/falcon-40b", "tiiuae/falcon-rw-1b"),
        notes="All three layouts of q, k, v: one KV head, groups, as many as query heads. Falcon 3 is a llama.",
    ),
    "opt": Arch(
        projections_at=FAIRSEQ,
        decoder_path="model.decoder",
        prefixes=("model.decoder.", "decoder."),
        norm="final_layer_norm",
        embeddings=("embed_tokens", "embed_positions"),
        activation="activation_fn",
        examples=("facebook/opt-1.3b",),
        notes="facebook/opt-350m has no final norm: weights are compared and swapped, hidden states refused.",
    ),
    "xglm": Arch(
        projections_at=FAIRSEQ,
        norm="layer_norm",
        activation="activation_fn",
        examples=("facebook/xglm-1.7B",),
    ),
    "mpt": Arch(
        projections_at={
            **fused("attn.Wqkv", *QKV),
            "o_proj": Slot("attn.out_proj"),
            **named("ffn", "up_proj", "down_proj"),
        },
        decoder_path="transformer",
        prefixes=("transformer.",),
        layers_name="blocks",
        norm="norm_f",
        embeddings=("wte",),
        activation="ffn.act",
        examples=("mosaicml/mpt-7b",),
    ),
    "granite": Arch(examples=("ibm-granite/granite-3.1-8b-base",)),
    "smollm3": Arch(examples=("HuggingFaceTB/SmolLM3-3B-Base",)),
    "stablelm": Arch(examples=("stabilityai/stablelm-2-1_6b",)),
    "starcoder2": Arch(
        projections_at=LLAMA_ATTENTION | named("mlp", "c_fc", "c_proj"),
        activation="mlp.act",
        examples=("bigcode/starcoder2-7b",),
    ),
    "cohere": Arch(norms=PARALLEL, examples=("CohereLabs/aya-23-8B", "CohereLabs/c4ai-command-r-v01")),
    "cohere2": Arch(norms=PARALLEL, examples=("CohereLabs/c4ai-command-r7b-12-2024",)),
    "nemotron": Arch(projections_at=LLAMA_ATTENTION | UP_DOWN, examples=("nvidia/Minitron-4B-Base",)),
    "arcee": Arch(projections_at=LLAMA_ATTENTION | UP_DOWN, examples=("arcee-ai/AFM-4.5B-Base",)),
    "jais2": Arch(projections_at=LLAMA_ATTENTION | UP_DOWN, examples=("inceptionai/Jais-2-8B-Chat",)),
    "apertus": Arch(
        projections_at=LLAMA_ATTENTION | UP_DOWN,
        examples=("swiss-ai/Apertus-8B-2509",),
        notes="Norms on q and k; the activation has parameters of its own, which a swap of whole layers takes along.",
    ),
    "glm": Arch(
        projections_at=LLAMA_ATTENTION | GATE_UP, activation="mlp.activation_fn", examples=("zai-org/glm-4-9b-hf",)
    ),
    "glm4": Arch(
        projections_at=LLAMA_ATTENTION | GATE_UP,
        activation="mlp.activation_fn",
        norms=SANDWICH,
        examples=("zai-org/GLM-4-9B-0414",),
    ),
    "exaone4": Arch(norms="after", examples=("LGAI-EXAONE/EXAONE-4.0-1.2B",), notes="Norms on q and k."),
    "hyperclovax": Arch(examples=("naver-hyperclovax/HyperCLOVAX-SEED-Think-14B",)),
    "hunyuan_v1_dense": Arch(examples=("tencent/Hunyuan-7B-Pretrain",), notes="Norms on q and k."),
    "ernie4_5": Arch(examples=("baidu/ERNIE-4.5-0.3B-Base-PT",)),
    "seed_oss": Arch(examples=("ByteDance-Seed/Seed-OSS-36B-Base",), notes="Biases on q, k, v."),
    "helium": Arch(examples=("kyutai/helium-1-2b",)),
    "mixtral": Arch(
        experts_at=Experts("block_sparse_moe", {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}),
        examples=("mistralai/Mixtral-8x7B-v0.1",),
    ),
    "qwen3_moe": Arch(
        experts_at=Experts(),
        examples=("Qwen/Qwen3-30B-A3B-Base",),
        notes="Layers may be dense (`mlp_only_layers`, `decoder_sparse_step`). Norms on q and k.",
    ),
    "olmoe": Arch(experts_at=Experts(), examples=("allenai/OLMoE-1B-7B-0924",), notes="Norms on q and k."),
    "flex_olmo": Arch(
        experts_at=Experts(), norms="after", examples=("allenai/FlexOlmo-7x7B-1T",), notes="Norms on q and k."
    ),
}
ARCHS = {name: replace(arch, model_type=name) for name, arch in ARCHS.items()}


def for_config(config) -> Arch:
    """The table's entry for a config (a `PretrainedConfig`, or the dict of a config.json).

    Raises:
        InputError: no `model_type`, or one that the table does not have; names the nearest ones and the entry to add.
    """
    values = _as_dict(config)
    model_type = values.get("model_type")
    if not model_type:
        raise InputError("config.json has no model_type; is this the folder of a Hugging Face causal language model?")
    if model_type not in ARCHS:
        near = difflib.get_close_matches(model_type, ARCHS, n=3, cutoff=0.4) or sorted(ARCHS)
        raise InputError(
            f"model type {model_type!r} is not in the table of architectures (nearest: {', '.join(near)}); "
            + _entry_to_add(values)
        )
    return ARCHS[model_type]


def _entry_to_add(config: dict) -> str:
    """What the table's entry for an unknown type must say, from the modules that transformers makes for it.

    They are made on the meta device, which costs neither memory nor time worth mentioning.
    """
    model_type, where = config["model_type"], "ARCHS in cpt_utils/archs.py"
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        given = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **given))
        modules = {name for name, module in model.named_modules() if not list(module.children())}
    except Exception:  # whatever transformers says of a type or a config that it cannot build
        return f"add an entry {model_type!r}: Arch(...) to {where}, plain Arch() where the module names are Llama's"
    llama = ARCHS["llama"]
    wanted = [f"{llama.layer_path(0)}.{slot.module}" for slot in llama.projections_at.values()]
    wanted += ["model.embed_tokens", "model.norm", f"{llama.layer_path(0)}.{llama.activation}"]
    if modules.issuperset(wanted):
        return f"its modules are named as Llama's: add {model_type!r}: Arch() to {where}, then run its tests"
    inside = sorted(name for name in modules if re.search(r"\.0\.", name))
    return (
        f"add an entry {model_type!r}: Arch(...) to {where} that says what differs from Llama: a layer has "
        f"{', '.join(inside[:16])}"
    )


def is_buffer(disk_name: str) -> bool:
    """Whether a tensor on disk is a constant of an old checkpoint and not a parameter."""
    return BUFFERS.search(disk_name) is not None


def _as_dict(config) -> dict:
    return config if isinstance(config, dict) else config.to_dict()


def _decoder_values(config) -> dict:
    """The config as a dict; of a model with a vision tower, the part with the decoder's sizes."""
    values = _as_dict(config)
    return values["text_config"] if isinstance(values.get("text_config"), dict) else values


def _near(wanted: str, names: Iterable[str]) -> str:
    return ", ".join(difflib.get_close_matches(wanted, list(names), n=3, cutoff=0.3)) or "none"


def _no_match(wanted: str, disk_names: Iterable[str], model_type: str) -> str:
    return (
        f"no tensor {wanted} on disk, where a model of type {model_type} has one (nearest: "
        f"{_near(wanted, disk_names)}); check the folder, or the entry {model_type!r} of ARCHS in cpt_utils/archs.py"
    )
