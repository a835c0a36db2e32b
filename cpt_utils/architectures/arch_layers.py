"""What the layers of a model type have, and how large it is: the fields of a table's entry, read with a config."""

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

# What configs call the same number. The first key that is there and not null counts.
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
        projections_at: projection -> where it is below a layer (of a MoE: below one of its dense layers); several
            slots where several matrices make it.
        experts_at: the experts of a MoE type; None for a dense one.
        mixers: kind of a layer in the config -> the module that it has instead of attention.
        bare: kinds of layers that have no FFN.
        decoder_path: path of the module that holds the layers, from the causal LM.
        prefixes: what stands in front of the decoder's names on disk; a model saved without its head has no prefix,
            which is always tried last.
        layers, norm, embeddings: names below the decoder.
        head: module path of the output matrix; absent on disk when it is tied.
        activation: module of the nonlinearity below a layer; empty where no module computes it, and `function` names it
            as configs do.
        before: whether the nonlinearity's input is the gate's output (but for a positive factor).
        transposed: weights are stored [in, out] (Conv1D).
        renames: (start of a name on disk, start of the same name in memory) where they differ otherwise.
        inner: (piece of a name on disk, the same piece in memory), below the prefix.
        stacked: tensor in memory below a layer -> the tensors on disk whose rows it holds, one after the other.
        beyond: what files may hold beside the model, as a pattern of names without prefix; so are layers behind the
            last one of a type that has a pattern.
        streams: a layer hands on several streams [streams, batch, tokens, hidden]; the first is the hidden state.
        defaults: config key -> value, for keys that published config.json files of the type leave out.
        dense_width, heads_at: of a layer, where the usual keys of a config do not say.
        with_heads: projection -> the parameters below a layer that go with its heads one by one, in equal pieces; with
            {} in its name one for each head. A KV head's are with k_proj. A model may lack them.
        differential: a head is a pair, h and h + half of all, whose attentions are subtracted; so is a KV head.
        block: tokens of a block of text, where the published scripts count and average activations.
        unless: config key -> why a model that sets it is not one of the type as it is known here.
        text_type: the model type of its text model, of a type with other towers.
        norms: where a layer's norms are, from the residual stream: for docs/architectures.md, like the next two.
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
        """What the config calls a layer whose type has layers of several kinds; else empty."""
        if not (self.mixers or self.bare):
            return ""
        return self.settled(config).layer_types[layer]

    def slots(self, config, layer: int, projection: str, beside_experts: bool = False) -> tuple[Slot, ...]:
        """Where a projection of a layer is, of a MoE layer that of the FFN beside the experts; () where it has none."""
        table = self.experts_at.shared if beside_experts else self.projections_at
        kind = self.kind(config, layer)
        if projection not in table or kind in (self.mixers if projection in ATTENTION else self.bare):
            return ()
        return tuple(s for s in as_slots(table[projection]) if s.when is None or s.when(self.settled(config), layer))

    def projections(self, config=None, layer: int | None = None) -> tuple[str, ...]:
        """The projections that a layer has, in the order of PROJECTIONS; without a layer those that any may have.

        Six where there is no gate; none of attention in a layer that has another mixer in its place.
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
        """The layers that have none of these projections: a hybrid's without attention, or without an FFN."""
        layers = range(self.n_layers(config)) if self.uneven else ()
        return [layer for layer in layers if not self.has(config, layer, projections)]

    def instead(self, config, layers: Collection[int]) -> str:
        """What layers without attention have in its place: the names of modules, for messages."""
        return " or ".join(dict.fromkeys(self.mixers[self.kind(config, layer)] for layer in layers))

    def experts(self, config, layer: int) -> int:
        """Experts of a layer; 0 where its FFN is dense, or where it has none."""
        if self.experts_at is None:
            return 0
        return self._number(config, "experts") if self.experts_at.sparse(self.settled(config), layer) else 0

    def has_router(self, config, layer: int) -> bool:
        """Whether a layer sends its tokens to experts."""
        return self.experts(config, layer) > 0

    # --- sizes ---

    def heads(self, config, layer: int = 0) -> tuple[int, int, int]:
        """(query heads, key/value heads, features per head)."""
        if self.heads_at is not None:
            return self.heads_at(self.settled(config), layer)
        heads = self._number(config, "heads")
        head_dim = self._number(config, "head_dim", required=False) or self._number(config, "hidden") // heads
        # Falcon and GPT-BigCode say by flags how many KV heads there are; the number beside them may be meaningless.
        values = _decoder_values(config)
        if "multi_query" in values and not values.get("new_decoder_architecture"):
            return heads, 1 if values["multi_query"] else heads, head_dim
        return heads, self._number(config, "kv_heads"), head_dim

    def head_counts(self, config, layer: int) -> tuple[int, int]:
        """(query heads, units) of a layer; (0, 0) where it has no attention, whatever stands in its place.

        A unit is a KV head with the query heads that share it, unit u those of H heads that begin at u H / units; in a
        layer that attends to another's keys it is these query heads alone. All heads of a latent attention are units.
        """
        if not self.slots(config, layer, "o_proj"):
            return 0, 0
        heads, kv_heads, _ = self.heads(config, layer)
        return (heads // 2, kv_heads // 2) if self.differential else (heads, kv_heads)

    def ffn_width(self, config, layer: int | None = None) -> int:
        """FFN neurons of `layer`, or of the widest one; 0 in a layer without an FFN.

        Of E experts of I neurons each and S neurons beside them E I + S: expert e's are e I to e I + I - 1, and those
        beside the experts come last. Where configs leave I out (GPT-2, Bloom, MPT) it is four times the hidden size.
        """
        if layer is None:
            layers = range(self.n_layers(config)) if self.uneven else (0,)
            return max(self.ffn_width(config, each) for each in layers)
        return max((group.stop for group in self.neurons(config, layer)), default=0)

    def expert_width(self, config, layer: int) -> int:
        """I, the neurons of one expert of a MoE layer."""
        width_of = self.experts_at.width
        return width_of(self.settled(config), layer) if width_of else self._number(config, "expert_ffn")

    def neurons(self, config, layer: int) -> tuple[Neurons, ...]:
        """The layer's neurons in their order, by where they are read: () in a layer without an FFN."""
        experts, found, at = self.experts(config, layer), [], self.experts_at
        if experts:
            stop = experts * self.expert_width(config, layer)
            path = below(at.block, "experts")
            found.append(Neurons(0, stop, experts, None, f"{path}.{at.activation}" if at.activation else ""))
        slots = self.slots(config, layer, self.neuron_projection, beside_experts=experts > 0)
        width = self._dense_width(config, layer, beside_experts=experts > 0) if slots else 0
        if width:
            rows = self._features(config, layer, self.neuron_projection, slots[0], width)
            first = found[-1].stop if found else 0
            source = (slots[0].module, 0, width) if rows is None else (slots[0].module, rows.start, rows.stop)
            activation = at.shared_activation if experts else self.activation
            found.append(Neurons(first, first + width, 0, source, activation))
        return tuple(found)

    @property
    def neuron_projection(self) -> str:
        """The projection whose output features the neurons are before the activation."""
        return "gate_proj" if "gate_proj" in self.projections() else "up_proj"

    # --- inside ---

    @cached_property
    def uneven(self) -> bool:
        """Whether layers may differ in what they have and how wide it is."""
        slots = [slot for each in self.projections_at.values() for slot in as_slots(each)]
        return bool(
            self.experts_at or self.mixers or self.bare or self.dense_width or self.heads_at
            or any(slot.when for slot in slots)
        )  # fmt: skip

    def settled(self, config):
        """The decoder's configuration as transformers completes it, with every kind and size of a layer.

        Published config.json files leave keys out, or spell them as an older release did.

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
        """Neurons of a layer's dense FFN, or of the one beside its experts."""
        width_of = self.experts_at.shared_width if beside_experts else self.dense_width
        if width_of is not None:
            return width_of(self.settled(config), layer)
        return self._number(config, "ffn", required=False) or 4 * self._number(config, "hidden")

    def _features(self, config, layer: int, projection: str, slot: Slot, width: int) -> slice | torch.Tensor | None:
        """Which output features of its module a projection has; None for all. `width`: neurons, of gate and up."""
        if not slot.order:
            return None
        widths = [self._width(config, layer, name, width) for name in slot.order]
        before = slot.order.index(projection)
        if slot.by_group:
            groups, shares = self._shares(config, layer, slot, widths)
            first = sum(shares[:before])
            rows = torch.arange(groups * sum(shares)).view(groups, -1)[:, first : first + shares[before]].reshape(-1)
            # One KV head: every part is one stretch, which needs no list of positions.
            return rows if groups > 1 else slice(int(rows[0]), int(rows[-1]) + 1)
        start = sum(widths[:before])
        return slice(start, start + widths[before])

    def _shares(self, config, layer: int, slot: Slot, widths: list[int]) -> tuple[int, list[int]]:
        """(groups, features of each projection in a group) of projections that alternate in one module."""
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

    given = json.loads(values, object_hook=_number_or_dict)
    given = {key: value for key, value in given.items() if key not in ("model_type", "auto_map")}
    try:
        return CONFIG_MAPPING[model_type].from_dict(given).get_text_config(decoder=True)
    except Exception as error:  # transformers and its validation raise half a dozen types
        reason = str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__
        raise InputError(f"the installed transformers cannot read this {model_type} configuration: {reason}") from None


def _number_or_dict(found: dict) -> dict | float:
    """Infinity, as transformers spells it in a config.json, or what was found."""
    return float(found["__float__"]) if found.keys() == {"__float__"} else found


def _decoder_values(config) -> dict:
    """The config as a dict; of a model with a vision tower, the part with the decoder's sizes."""
    values = config if isinstance(config, dict) else config.to_dict()
    return values["text_config"] if isinstance(values.get("text_config"), dict) else values
