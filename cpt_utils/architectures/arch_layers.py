"""The layers of a model type and their sizes: the fields of an entry in the table, evaluated with a config."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from cpt_utils.architectures.arch_parts import (
    ATTENTION,
    FFN,
    PROJECTIONS,
    Experts,
    Neurons,
    OfLayer,
    Slot,
    Slots,
    as_slots,
    below,
    named,
)
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch

# The keys under which configs state each number. The first key that is present and not null counts.
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
FIELDS = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "n_embed", "d_model"),
    "heads": HEADS,
    "kv_heads": ("num_key_value_heads", "num_kv_heads", *HEADS),
    "head_dim": ("head_dim",),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "expert_ffn": ("moe_intermediate_size", "intermediate_size"),
}

LLAMA_ATTENTION = named("self_attn", *ATTENTION)
LLAMA_PROJECTIONS = LLAMA_ATTENTION | named("mlp", *FFN)


@dataclass(frozen=True)
class Layers:
    """One model type. The defaults are Llama's.

    Attributes:
        projections_at: projection -> its slot below a layer (for a MoE type: below one of its dense layers); several
            slots if the projection is made of several matrices.
        experts_at: the experts of a MoE type; None for a dense one.
        mixers: kind of layer in the config -> the module that such a layer has instead of attention.
        bare: kinds of layers that have no FFN.
        decoder_path: path from the causal LM to the module that holds the layers.
        prefixes: prefixes of the decoder's names on disk; a model saved without its head has none, which is always
            tried last.
        layers_name, norm, embeddings: names below the decoder.
        head: module path of the output matrix; absent on disk if it is tied.
        activation: module of the nonlinearity below a layer; empty if no module computes it, and `function` is its name
            as in configs.
        before: whether the nonlinearity's input is the gate's output (up to a positive factor).
        transposed: weights are stored [in, out] (Conv1D).
        renames: (start of a name on disk, start of the same name in memory), for other differences between the two.
        inner: (piece of a name on disk, the same piece in memory), below the prefix.
        stacked: tensor in memory below a layer -> the tensors on disk whose rows it holds, in order.
        beyond: pattern of names (without prefix) that files may hold and the model does not use; if a type has such a
            pattern, layers after the last one are unused, too.
        streams: a layer returns several streams [streams, batch, tokens, hidden]; the first is the hidden state.
        defaults: config key -> value, for keys that published config.json files of the type leave out.
        dense_width, heads_at: FFN width and heads of a layer, if the usual config keys do not state them.
        with_heads: projection -> the parameters below a layer that belong to its heads, in equal pieces; a name with {}
            is one parameter per head. Those of KV heads are listed under k_proj. A model may lack them.
        differential: a head is a pair (h, h + half of all) whose attentions are subtracted; likewise a KV head.
        block: tokens per block of text in which the published scripts count and average activations.
        unless: config key -> why a model that sets it is not covered by this entry.
        text_type: the model type of the text model, for a type with other towers.
        norms: position of a layer's norms relative to the residual stream. This and the next two: for the docs only.
        examples: model names on the hub.
        notes: what a user should know.
    """

    projections_at: dict[str, Slots] = field(default_factory=lambda: LLAMA_PROJECTIONS)
    experts_at: Experts | None = None
    mixers: dict[str, str] = field(default_factory=dict)
    bare: tuple[str, ...] = ()
    decoder_path: str = "model"
    prefixes: tuple[str, ...] = ("model.",)
    layers_name: str = "layers"
    norm: str = "norm"
    embeddings: tuple[str, ...] = ("embed_tokens",)
    head: str = "lm_head"
    activation: str = "mlp.act_fn"
    function: str = ""
    before: bool = True
    transposed: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    inner: tuple[tuple[str, str], ...] = ()
    stacked: dict[str, tuple[str, ...]] = field(default_factory=dict)
    beyond: str = ""
    streams: bool = False
    defaults: dict[str, int] = field(default_factory=dict)
    dense_width: OfLayer | None = None
    heads_at: OfLayer | None = None
    with_heads: dict[str, tuple[str, ...]] = field(default_factory=dict)
    differential: bool = False
    block: int = 4096
    unless: dict[str, str] = field(default_factory=dict)
    text_type: str = ""
    norms: str = "before"
    examples: tuple[str, ...] = ()
    notes: str = ""
    model_type: str = ""

    # --- what a layer has ---

    def n_layers(self, config) -> int:
        """Number of decoder layers L."""
        return self._number(config, "layers")

    def kind(self, config, layer: int) -> str:
        """The config's name for this kind of layer, if the type has several kinds; else empty."""
        if not (self.mixers or self.bare):
            return ""
        return self.settled(config).layer_types[layer]

    def slots(self, config, layer: int, projection: str, beside_experts: bool = False) -> tuple[Slot, ...]:
        """The slots of a layer's projection, () if it has none; with `beside_experts`, those of its shared FFN."""
        table = self.experts_at.shared if beside_experts else self.projections_at
        kind = self.kind(config, layer)
        if projection not in table or kind in (self.mixers if projection in ATTENTION else self.bare):
            return ()
        return tuple(s for s in as_slots(table[projection]) if s.when is None or s.when(self.settled(config), layer))

    def projections(self, config=None, layer: int | None = None) -> tuple[str, ...]:
        """The projections of a layer, in the order of PROJECTIONS; without `layer`, those that any layer may have.

        Six if there is no gate; none of attention in a layer with another mixer in its place.
        """
        if layer is None:
            known = {*self.projections_at, *(self.experts_at.names if self.experts_at else ())}
        else:
            known = {name for name in PROJECTIONS if self.slots(config, layer, name)}
            if self.experts(config, layer):
                known = known - set(FFN) | set(self.experts_at.names)
        return tuple(name for name in PROJECTIONS if name in known)

    def has(self, config, layer: int, projections: Collection[str]) -> bool:
        """Whether a layer has any of these projections."""
        return bool({*self.projections(config, layer)} & {*projections})

    def lacking(self, config, projections: Collection[str]) -> list[int]:
        """The layers that have none of these projections: in hybrids, those without attention or without an FFN."""
        layers = range(self.n_layers(config)) if self.uneven else ()
        return [layer for layer in layers if not self.has(config, layer, projections)]

    def instead(self, config, layers: Collection[int]) -> str:
        """The modules that layers without attention have in its place, for messages."""
        return " or ".join(dict.fromkeys(self.mixers[self.kind(config, layer)] for layer in layers))

    def experts(self, config, layer: int) -> int:
        """The number of experts of a layer; 0 if its FFN is dense or missing."""
        if self.experts_at is None:
            return 0
        return self._number(config, "experts") if self.experts_at.sparse(self.settled(config), layer) else 0

    def has_router(self, config, layer: int) -> bool:
        """Whether a layer routes its tokens to experts."""
        return self.experts(config, layer) > 0

    # --- sizes ---

    def heads(self, config, layer: int = 0) -> tuple[int, int, int]:
        """(query heads, key/value heads, features per head)."""
        if self.heads_at is not None:
            return self.heads_at(self.settled(config), layer)
        heads = self._number(config, "heads")
        head_dim = self._number(config, "head_dim", required=False) or self._number(config, "hidden") // heads
        # Falcon and GPT-BigCode set the number of KV heads by flags; their KV head count may be meaningless.
        values = _decoder_values(config)
        if "multi_query" in values and not values.get("new_decoder_architecture"):
            return heads, 1 if values["multi_query"] else heads, head_dim
        return heads, self._number(config, "kv_heads"), head_dim

    def head_counts(self, config, layer: int) -> tuple[int, int]:
        """(query heads, units) of a layer; (0, 0) if it has no attention.

        A unit is a KV head with the query heads that share it; unit u's query heads, of H in all, begin at u H / units.
        In a layer that attends to another layer's keys, a unit is these query heads alone. In a latent attention, every
        head is a unit.
        """
        if not self.slots(config, layer, "o_proj"):
            return 0, 0
        heads, kv_heads, _ = self.heads(config, layer)
        return (heads // 2, kv_heads // 2) if self.differential else (heads, kv_heads)

    def ffn_width(self, config, layer: int | None = None) -> int:
        """FFN neurons of `layer`, or of the widest layer; 0 for a layer without an FFN.

        With E experts of I neurons each and S neurons of a shared FFN, it is E I + S: expert e has the neurons e I to
        e I + I - 1, the shared FFN the last S. If a config leaves I out (GPT-2, Bloom, MPT), I is 4 * hidden size.
        """
        if layer is None:
            layers = range(self.n_layers(config)) if self.uneven else (0,)
            return max(self.ffn_width(config, each) for each in layers)
        return max((group.stop for group in self.neurons(config, layer)), default=0)

    def expert_width(self, config, layer: int) -> int:
        """I, the number of neurons of one expert of a MoE layer."""
        width_of = self.experts_at.width
        return width_of(self.settled(config), layer) if width_of else self._number(config, "expert_ffn")

    def neurons(self, config, layer: int) -> tuple[Neurons, ...]:
        """The layer's neurons in order, grouped by the module where they are read; () in a layer without an FFN."""
        experts, groups, spec = self.experts(config, layer), [], self.experts_at
        if experts:
            stop = experts * self.expert_width(config, layer)
            path = below(spec.block, "experts")
            groups.append(Neurons(0, stop, experts, None, f"{path}.{spec.activation}" if spec.activation else ""))
        slots = self.slots(config, layer, self.neuron_projection, beside_experts=experts > 0)
        width = self._dense_width(config, layer, beside_experts=experts > 0) if slots else 0
        if width:
            rows = self._features(config, layer, self.neuron_projection, slots[0], width)
            first = groups[-1].stop if groups else 0
            source = (slots[0].module, 0, width) if rows is None else (slots[0].module, rows.start, rows.stop)
            activation = spec.shared_activation if experts else self.activation
            groups.append(Neurons(first, first + width, 0, source, activation))
        return tuple(groups)

    @property
    def neuron_projection(self) -> str:
        """The projection whose output features are the neurons' pre-activations."""
        return "gate_proj" if "gate_proj" in self.projections() else "up_proj"

    # --- inside ---

    @cached_property
    def uneven(self) -> bool:
        """Whether layers may differ in their components or sizes."""
        slots = [slot for each in self.projections_at.values() for slot in as_slots(each)]
        return bool(
            self.experts_at or self.mixers or self.bare or self.dense_width or self.heads_at
            or any(slot.when for slot in slots)
        )  # fmt: skip

    def settled(self, config):
        """The decoder's configuration as completed by transformers, with the kinds and sizes of all layers.

        Published config.json files leave keys out, or use the names of an older release.

        Raises:
            InputError: transformers cannot read it.
        """
        values = config if isinstance(config, dict) else config.to_dict()
        return _settled(values.get("model_type") or self.model_type, json.dumps(values, sort_keys=True, default=str))

    def _number(self, config, name: str, required: bool = True) -> int | None:
        if self.uneven:
            settled = self.settled(config)
            values = {key: getattr(settled, key, None) for key in FIELDS[name]}
        else:
            values = self.defaults | {k: value for k, value in _decoder_values(config).items() if value is not None}
        for key in FIELDS[name]:
            if isinstance(values.get(key), int | float):
                return int(values[key])
            if values.get(key) is not None:
                raise InputError(f"config.json: {key} is {str(values[key])[:40]}, where one number is needed")
        if required:
            raise InputError(f"config.json has none of the keys {', '.join(FIELDS[name])}; add the one the model has")
        return None

    def _dense_width(self, config, layer: int, beside_experts: bool = False) -> int:
        """Neurons of a layer's dense FFN, or of its shared FFN (`beside_experts`)."""
        width_of = self.experts_at.shared_width if beside_experts else self.dense_width
        if width_of is not None:
            return width_of(self.settled(config), layer)
        return self._number(config, "ffn", required=False) or 4 * self._number(config, "hidden")

    def _features(self, config, layer: int, projection: str, slot: Slot, width: int) -> slice | torch.Tensor | None:
        """The output features of its module that a projection has; None for all. `width`: neurons, for gate and up."""
        if not slot.order:
            return None
        widths = [self._width(config, layer, name, width) for name in slot.order]
        before = slot.order.index(projection)
        if slot.by_group:
            groups, shares = self._shares(config, layer, slot, widths)
            first = sum(shares[:before])
            rows = torch.arange(groups * sum(shares)).view(groups, -1)[:, first : first + shares[before]].reshape(-1)
            # One KV head: every part is contiguous and needs no list of positions.
            return rows if groups > 1 else slice(int(rows[0]), int(rows[-1]) + 1)
        start = sum(widths[:before])
        return slice(start, start + widths[before])

    def _shares(self, config, layer: int, slot: Slot, widths: list[int]) -> tuple[int, list[int]]:
        """(groups, features per group of each projection) for projections that alternate in one module."""
        if slot.groups:
            return slot.groups, [width // slot.groups for width in widths]
        heads, kv_heads, head_dim = self.heads(config, layer)
        if slot.order == ("k_proj", "v_proj"):
            values = self.settled(config)
            return heads, [values.qk_nope_head_dim, values.v_head_dim]
        return kv_heads, [heads // kv_heads * head_dim if name == "q_proj" else head_dim for name in slot.order]

    def _width(self, config, layer: int, projection: str, width: int) -> int:
        if projection in FFN:
            return width
        heads, kv_heads, head_dim = self.heads(config, layer)
        return (heads if projection == "q_proj" else kv_heads) * head_dim


@lru_cache(maxsize=64)
def _settled(model_type: str, values: str):
    """`Arch.settled`, from the JSON of a config."""
    from transformers import CONFIG_MAPPING

    stated = json.loads(values, object_hook=_number_or_dict)
    stated = {key: value for key, value in stated.items() if key not in ("model_type", "auto_map")}
    try:
        return CONFIG_MAPPING[model_type].from_dict(stated).get_text_config(decoder=True)
    except Exception as error:  # transformers and its validation raise half a dozen types
        reason = str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__
        raise InputError(f"the installed transformers cannot read this {model_type} configuration: {reason}") from None


def _number_or_dict(values: dict) -> dict | float:
    """The float of {"__float__": ..}, as transformers writes infinity in a config.json; any other dict unchanged."""
    return float(values["__float__"]) if values.keys() == {"__float__"} else values


def _decoder_values(config) -> dict:
    """The config as a dict; for a model with a vision tower, the part with the decoder's sizes."""
    values = config if isinstance(config, dict) else config.to_dict()
    return values["text_config"] if isinstance(values.get("text_config"), dict) else values
