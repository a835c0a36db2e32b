"""The table of architectures: one entry per supported model type.

To add one, state what differs from Llama (`Layers` lists what can differ): plain `Arch()` if the module names are
Llama's. The tests of every type and docs/architectures.md (`python docs/architectures.py`) are derived from the entry.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cpt_utils.architectures.arch import Arch
from cpt_utils.architectures.arch_layers import LLAMA_ATTENTION
from cpt_utils.architectures.arch_parts import ATTENTION, FFN, Experts, Slot, fused, named

# Slots that several types share.
QKV = ATTENTION[:3]
GATE_UP = {**fused("mlp.gate_up_proj", "gate_proj", "up_proj"), "down_proj": Slot("mlp.down_proj")}
UP_DOWN = named("mlp", "up_proj", "down_proj")
FAIRSEQ = named("self_attn", "q_proj", "k_proj", "v_proj", "out_proj") | named("", "fc1", "fc2")
GPT2 = {**fused("attn.c_attn", *QKV), "o_proj": Slot("attn.c_proj"), **named("mlp", "c_fc", "c_proj")}
GPT = {"decoder_path": "transformer", "prefixes": ("transformer.",), "layers_name": "h", "norm": "ln_f"}
# A latent attention: queries, and keys and values together, go through a narrow layer first. The layer that keys and
# values share counts as part of the keys, so every entry of a matrix belongs to one projection.
LATENT = {
    "q_proj": (
        Slot("self_attn.q_proj", when=lambda c, _: not narrow_queries(c)),
        Slot("self_attn.q_a_proj", when=lambda c, _: narrow_queries(c), shared=True),
        Slot("self_attn.q_b_proj", when=lambda c, _: narrow_queries(c)),
    ),
    "k_proj": (
        Slot("self_attn.kv_a_proj_with_mqa", shared=True),
        Slot("self_attn.kv_b_proj", ("k_proj", "v_proj"), by_group=True),
    ),
    "v_proj": Slot("self_attn.kv_b_proj", ("k_proj", "v_proj"), by_group=True),
    "o_proj": Slot("self_attn.o_proj"),
}
LATENT_FFN = LATENT | named("mlp", *FFN)
LATENT_NOTE = "Latent attention."
# Parameters that belong to single heads beside the projections: segments of a norm over all heads, sinks, output gates.
NORMS_OVER_HEADS = {"with_heads": {"q_proj": ("self_attn.q_norm.weight",), "k_proj": ("self_attn.k_norm.weight",)}}
SINKS = {"with_heads": {"q_proj": ("self_attn.sinks",)}}
NARROW_GATE = {"with_heads": {"o_proj": ("self_attn.g_proj.weight",)}}
# Linear attention in most layers of a hybrid.
LINEAR = {"mixers": {"linear_attention": "linear_attn"}}
GATED = "`q_proj` also holds each head's output gate."
# Layers after the last one, or a separate module, predict further tokens.
AHEAD = r"mtp\."
# Layers that attend to another layer's keys and values do not use their own, but some files hold them.
SHARED_KV = LLAMA_ATTENTION | {
    "k_proj": Slot("self_attn.k_proj", when=lambda c, layer: has_keys(c, layer)),
    "v_proj": Slot("self_attn.v_proj", when=lambda c, layer: has_keys(c, layer) and not keys_are_values(c, layer)),
}
UNUSED_KV = r"layers\.\d+\.self_attn\.[kv]_(proj|norm)\."


def neox(attention: str) -> dict[str, Slot]:
    """The projections of GPT-NeoX and similar types, which differ in the name of the attention module."""
    return {
        **fused(f"{attention}.query_key_value", *QKV, by_group=True),
        "o_proj": Slot(f"{attention}.dense"),
        **named("mlp", "dense_h_to_4h", "dense_4h_to_h"),
    }


def narrow_queries(config) -> bool:
    """Whether the queries of a latent attention also come from a narrow layer."""
    return getattr(config, "q_lora_rank", None) is not None


def has_keys(config, layer: int) -> bool:
    """Whether a layer of a Gemma has its own keys."""
    return config.kv_sharing_modes[layer] != "reuse"


def keys_are_values(config, layer: int) -> bool:
    """Whether a global layer of a Gemma 4 uses its keys as values."""
    return getattr(config, "attention_k_eq_v", False) and config.layer_types[layer] == "full_attention"


def gemma4_width(config, layer: int) -> int:
    """The FFN width of a Gemma 4; with `use_double_wide_mlp`, doubled in layers without their own keys."""
    return config.intermediate_size * (1 + (config.use_double_wide_mlp and not has_keys(config, layer)))


def gemma4_heads(config, layer: int) -> tuple[int, int, int]:
    """The heads of a layer; in layers with global attention they are larger and may share keys more."""
    layer_config = config.per_layer_config[layer]
    return config.num_attention_heads, layer_config.num_key_value_heads, layer_config.head_dim


def by_kind(config, layer: int) -> bool:
    """True if the config gives the layer's FFN any type but dense."""
    return config.mlp_layer_types[layer] != "dense"


def after_dense(config, layer: int) -> bool:
    """True for layers after the first, dense ones."""
    return layer >= config.first_k_dense_replace


def beside(stem: str, width, activation: str = "act_fn") -> dict:
    """The arguments of `Experts` for a shared FFN beside the experts."""
    return {"shared": named(stem, *FFN), "shared_width": width, "shared_activation": f"{stem}.{activation}"}


def as_experts(config, _layer: int) -> int:
    """The width of a shared FFN that is as wide as the config's number of shared experts."""
    of = "n_shared_experts" if hasattr(config, "n_shared_experts") else "num_shared_experts"
    return config.moe_intermediate_size * getattr(config, of)


def convolutions(stem: str) -> dict[str, tuple[str, ...]]:
    """Three convolutions on disk that are stacked into one in memory."""
    return {f"{stem}.conv1d.weight": tuple(f"{stem}.{name}_conv1d.weight" for name in "qkv")}


SHARED_EXPERTS = beside("mlp.shared_experts", as_experts)
ONE_SHARED = beside("mlp.shared_expert", lambda c, _: c.shared_expert_intermediate_size)
# The matrices of an expert on disk, in the Mixtral family.
W123 = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
SPARSE_BLOCK = ((".block_sparse_moe.", ".mlp."),)
PARALLEL = "before, one for attention and FFN side by side"
SANDWICH = "before and after"
# Granite's experts: one tensor for all, on disk as in memory.
GRANITE = Experts(block="block_sparse_moe", router="router")
GRANITE_NAMES = (
    (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.experts.gate_up_proj"),
    (".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts.down_proj"),
    (".block_sparse_moe.router.layer.weight", ".block_sparse_moe.router.weight"),
)
GRANITE_NOTE = "All experts are in one tensor on disk (`input_linear`, `output_linear`)."
GRANITE_FFN = {
    **fused("shared_mlp.input_linear", "gate_proj", "up_proj"),
    "down_proj": Slot("shared_mlp.output_linear"),
}
GRANITE_SHARED = replace(
    GRANITE,
    shared=GRANITE_FFN,
    shared_width=lambda c, _: c.shared_intermediate_size,
    shared_activation="shared_mlp.activation",
)
INDEXER = "The indexer of its sparse attention moves with whole layers."
FEED_FORWARD = named("feed_forward", *FFN)
LFM2 = named("self_attn", "q_proj", "k_proj", "v_proj", "out_proj") | named("feed_forward", "w1", "w3", "w2")
FORGET_GATE = tuple(
    (f".self_attn.{name}", f".self_attn.forget_gate.{name}") for name in ("f_a_proj.", "f_b_proj.", "dt_bias", "A_log")
)


def lfm2_width(config, _layer: int) -> int:
    """The FFN width of an LFM2, which may be two thirds of the one in its config, rounded up to a multiple."""
    width = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        width = int(2 * width / 3)
        if config.block_ffn_dim_multiplier is not None:
            width, of = int(config.block_ffn_dim_multiplier * width), config.block_multiple_of
            width = of * ((width + of - 1) // of)
    return width


def mimo_heads(config, layer: int) -> tuple[int, int, int]:
    """The heads of a layer, which differ in layers with local attention."""
    local = "swa_" if config.layer_types[layer] == "sliding_attention" else ""
    return tuple(
        getattr(config, f"{local}{key}", None) or getattr(config, key)
        for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )


def silu(_experts, gate):
    """SiLU, for types in which it is not a module."""
    return gate * gate.sigmoid()


def swiglu_of_gpt_oss(experts, gate):
    """The gate's activation in gpt-oss: clamped above, then multiplied by a sigmoid steeper than SiLU's."""
    gate = gate.clamp(max=experts.limit)
    return gate * (gate * experts.alpha).sigmoid()


LLAMA4 = Arch(
    projections_at=LLAMA_ATTENTION | named("feed_forward", *FFN),
    experts_at=Experts(
        block="feed_forward",
        router="router",
        transposed=True,
        sparse=lambda c, layer: layer in c.moe_layers,
        width=lambda c, _: c.intermediate_size,
        routed_by="score",
        **beside("feed_forward.shared_expert", lambda c, _: c.intermediate_size, "activation_fn"),
    ),
    activation="feed_forward.activation_fn",
    dense_width=lambda c, _: c.intermediate_size_mlp,
    notes="A token is multiplied by its score before it enters its experts.",
)

# Model type (config.json) -> architecture.
ARCHS: dict[str, Arch] = {
    "llama": Arch(examples=("meta-llama/Llama-3.1-8B", "TinyLlama/TinyLlama_v1.1", "utter-project/EuroLLM-1.7B")),
    "mistral": Arch(examples=("mistralai/Mistral-7B-v0.3",)),
    "ministral": Arch(examples=("mistralai/Ministral-8B-Instruct-2410",)),
    "ministral3": Arch(notes="The language model alone; with its vision tower it has the type mistral3."),
    "qwen2": Arch(examples=("Qwen/Qwen2.5-7B", "Qwen/Qwen2-1.5B"), notes="Biases on q, k, v."),
    "qwen3": Arch(examples=("Qwen/Qwen3-8B-Base",), notes="Norms on q and k."),
    "gemma": Arch(examples=("google/gemma-2b",)),
    "gemma2": Arch(norms=SANDWICH, examples=("google/gemma-2-9b",)),
    "gemma3_text": Arch(norms=SANDWICH, examples=("google/gemma-3-1b-pt",), notes="Norms on q and k."),
    "olmo": Arch(examples=("allenai/OLMo-7B-hf",), notes="Norms without parameters."),
    "olmo2": Arch(**NORMS_OVER_HEADS, norms="after", examples=("allenai/OLMo-2-1124-7B",), notes="Norms on q and k."),
    "olmo3": Arch(**NORMS_OVER_HEADS, norms="after", examples=("allenai/Olmo-3-1025-7B",), notes="Norms on q and k."),
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
        projections_at=neox("attention"),
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
        projections_at=GPT2,
        **GPT,
        embeddings=("wte", "wpe"),
        activation="mlp.act",
        transposed=True,
        examples=("openai-community/gpt2", "AI-Sweden-Models/gpt-sw3-1.3b"),
        notes="Weights are stored [in, out].",
    ),
    "gpt_bigcode": Arch(
        projections_at=GPT2 | fused("attn.c_attn", *QKV, by_group=True),
        **GPT,
        embeddings=("wte", "wpe"),
        activation="mlp.act",
        examples=("bigcode/starcoder",),
        notes="With one KV head (`multi_query`) or as many as query heads.",
    ),
    "bloom": Arch(
        projections_at=neox("self_attention"),
        **GPT,
        embeddings=("word_embeddings", "word_embeddings_layernorm"),
        activation="mlp.gelu_impl",
        examples=("bigscience/bloom-7b1",),
        notes="Layers return tuples; the embeddings are followed by a norm.",
    ),
    "falcon": Arch(
        projections_at=neox("self_attention"),
        **GPT,
        embeddings=("word_embeddings",),
        activation="mlp.act",
        norms="before, attention and FFN side by side",
        examples=("tiiuae/falcon-7b", "tiiuae/falcon-40b", "tiiuae/falcon-rw-1b"),
        notes="All three layouts of q, k, v: one KV head, groups, as many as query heads. Falcon 3 has the type llama.",
    ),
    "opt": Arch(
        projections_at=FAIRSEQ,
        decoder_path="model.decoder",
        prefixes=("model.decoder.", "decoder."),
        norm="final_layer_norm",
        embeddings=("embed_tokens", "embed_positions"),
        activation="activation_fn",
        examples=("facebook/opt-1.3b",),
        notes="facebook/opt-350m has no final norm: its weights can be compared and swapped, its hidden states cannot "
        "be read.",
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
    "stablelm": Arch(
        with_heads={f"{name}_proj": (f"self_attn.{name}_layernorm.norms.{{}}.weight",) for name in "qk"},
        examples=("stabilityai/stablelm-2-1_6b",),
    ),
    "starcoder2": Arch(
        projections_at=LLAMA_ATTENTION | named("mlp", "c_fc", "c_proj"),
        activation="mlp.act",
        examples=("bigcode/starcoder2-7b",),
    ),
    "cohere": Arch(
        **NORMS_OVER_HEADS, norms=PARALLEL, examples=("CohereLabs/aya-23-8B", "CohereLabs/c4ai-command-r-v01")
    ),
    "cohere2": Arch(norms=PARALLEL, examples=("CohereLabs/c4ai-command-r7b-12-2024",)),
    "nemotron": Arch(projections_at=LLAMA_ATTENTION | UP_DOWN, examples=("nvidia/Minitron-4B-Base",)),
    "arcee": Arch(projections_at=LLAMA_ATTENTION | UP_DOWN, examples=("arcee-ai/AFM-4.5B-Base",)),
    "jais2": Arch(projections_at=LLAMA_ATTENTION | UP_DOWN, examples=("inceptionai/Jais-2-8B-Chat",)),
    "apertus": Arch(
        projections_at=LLAMA_ATTENTION | UP_DOWN,
        examples=("swiss-ai/Apertus-8B-2509",),
        notes="Norms on q and k; the activation has its own parameters, which move with whole layers.",
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
        experts_at=Experts(names=W123),
        inner=SPARSE_BLOCK,
        examples=("mistralai/Mixtral-8x7B-v0.1",),
    ),
    "qwen3_moe": Arch(
        experts_at=Experts(),
        examples=("Qwen/Qwen3-30B-A3B-Base",),
        notes="Layers may be dense (`mlp_only_layers`, `decoder_sparse_step`). Norms on q and k.",
    ),
    "olmoe": Arch(
        experts_at=Experts(), **NORMS_OVER_HEADS, examples=("allenai/OLMoE-1B-7B-0924",), notes="Norms on q and k."
    ),
    "qwen2_moe": Arch(
        experts_at=Experts(**ONE_SHARED),
        examples=("Qwen/Qwen1.5-MoE-A2.7B", "Qwen/Qwen2-57B-A14B"),
        notes="Biases on q, k, v. The gate of the shared expert moves with whole layers.",
    ),
    "qwen3_next": Arch(
        experts_at=Experts(**ONE_SHARED),
        **LINEAR,
        beyond=AHEAD,
        examples=("Qwen/Qwen3-Next-80B-A3B-Instruct",),
        notes=f"Norms on q and k. {GATED}",
    ),
    "qwen3_5_text": Arch(**LINEAR, beyond=AHEAD, notes=f"Norms on q and k. {GATED}"),
    "qwen3_5_moe_text": Arch(
        experts_at=Experts(**ONE_SHARED), **LINEAR, beyond=AHEAD, notes=f"Norms on q and k. {GATED}"
    ),
    "deepseek_v2": Arch(
        projections_at=LATENT_FFN,
        experts_at=Experts(sparse=after_dense, **SHARED_EXPERTS),
        examples=("deepseek-ai/DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-V2"),
        notes=LATENT_NOTE,
    ),
    "deepseek_v3": Arch(
        projections_at=LATENT_FFN,
        experts_at=Experts(sparse=after_dense, **SHARED_EXPERTS),
        beyond=AHEAD,
        examples=("deepseek-ai/DeepSeek-V3-Base",),
        notes=LATENT_NOTE,
    ),
    "glm4_moe": Arch(
        experts_at=Experts(sparse=after_dense, **SHARED_EXPERTS),
        beyond=AHEAD,
        examples=("zai-org/GLM-4.5-Air-Base",),
        notes="Norms on q and k in the larger models.",
    ),
    "dots1": Arch(
        experts_at=Experts(sparse=after_dense, **SHARED_EXPERTS),
        examples=("rednote-hilab/dots.llm1.base",),
        notes="Norms on q and k.",
    ),
    "gpt_oss": Arch(
        experts_at=Experts(
            router="router", transposed=True, interleaved=True, activation="", function=swiglu_of_gpt_oss
        ),
        **SINKS,
        examples=("openai/gpt-oss-20b",),
        notes="Biases everywhere, also on experts and router; attention sinks move with whole layers. The published "
        "4-bit weights (MXFP4) are refused; weights converted to 16 bits are read.",
    ),
    "llama4_text": LLAMA4,
    "bitnet": Arch(
        with_heads={"o_proj": ("self_attn.attn_sub_norm.weight",)},
        examples=("microsoft/bitnet-b1.58-2B-4T-bf16",),
        notes="A norm before the output and down projections; silenced neurons are set to zero after it.",
    ),
    "cwm": Arch(examples=("facebook/cwm",)),
    "internlm3": Arch(examples=("internlm/internlm3-8b-instruct",)),
    "iquestcoder": Arch(examples=("IQuestLab/IQuest-Coder-V1-40B-Instruct",)),
    "vaultgemma": Arch(examples=("google/vaultgemma-1b",)),
    "granite_swa": Arch(**SINKS, notes="Attention sinks move with whole layers."),
    "diffllama": Arch(
        differential=True,
        examples=("kajuma/DiffLlama-0.3B-handcut",),
        notes="The lambdas of the attention move with whole layers.",
    ),
    "cohere_compass_text": Arch(norms=PARALLEL),
    "nanochat": Arch(
        projections_at=LLAMA_ATTENTION | named("mlp", "fc1", "fc2"),
        activation="mlp.activation_fn",
        examples=("karpathy/nanochat-d32",),
        notes="Norms without parameters.",
    ),
    "doge": Arch(
        with_heads={"k_proj": ("self_attn.A", "self_attn.dt_proj.weight", "self_attn.dt_proj.bias")},
        examples=("SmallDoge/Doge-320M",),
        unless={"is_moe": "its experts are then looked up in embeddings"},
        notes="The mask's `dt_proj` and the scales of the residual stream move with whole layers.",
    ),
    "minicpm3": Arch(projections_at=LATENT_FFN, examples=("openbmb/MiniCPM3-4B",), notes=LATENT_NOTE),
    "youtu": Arch(projections_at=LATENT_FFN, examples=("tencent/Youtu-LLM-2B",), notes=LATENT_NOTE),
    "persimmon": Arch(
        projections_at=neox("self_attn"),
        norm="final_layernorm",
        activation="mlp.act",
        examples=("adept/persimmon-8b-base",),
        notes="Norms on q and k.",
    ),
    "codegen": Arch(
        projections_at={
            **fused("attn.qkv_proj", "q_proj", "v_proj", "k_proj", groups=4),
            "o_proj": Slot("attn.out_proj"),
            **named("mlp", "fc_in", "fc_out"),
        },
        **GPT,
        embeddings=("wte",),
        activation="mlp.act",
        norms=PARALLEL,
        examples=("Salesforce/codegen-350M-multi",),
        notes="q, v, k alternate in four groups; the output matrix has a bias.",
    ),
    "gpt_neox_japanese": Arch(
        projections_at=neox("attention"),
        decoder_path="gpt_neox_japanese",
        prefixes=("gpt_neox_japanese.",),
        norm="final_layer_norm",
        embeddings=("embed_in",),
        head="embed_out",
        activation="mlp.act",
        dense_width=lambda c, _: c.intermediate_multiple_size * c.hidden_size,
        examples=("abeja/gpt-neox-japanese-2.7b",),
        notes="The single bias of the last layer's attention moves with the whole layer.",
    ),
    "biogpt": Arch(
        projections_at=FAIRSEQ,
        decoder_path="biogpt",
        prefixes=("biogpt.",),
        norm="layer_norm",
        embeddings=("embed_tokens", "embed_positions"),
        head="output_projection",
        activation="activation_fn",
        examples=("microsoft/biogpt",),
    ),
    "ctrl": Arch(
        projections_at=named("multi_head_attention", "Wq", "Wk", "Wv", "dense") | named("ffn", "0", "2"),
        **GPT | {"norm": "layernorm"},
        embeddings=("w",),
        activation="ffn.1",
        dense_width=lambda c, _: c.dff,
        examples=("Salesforce/ctrl",),
        notes="The output matrix has a bias.",
    ),
    "openai-gpt": Arch(
        projections_at=GPT2,
        **GPT | {"norm": ""},
        embeddings=("tokens_embed", "positions_embed"),
        activation="",  # all layers have the same module
        function="gelu_new",
        transposed=True,
        norms="after",
        dense_width=lambda c, _: 4 * c.n_embd,
        examples=("openai-community/openai-gpt",),
        notes="Weights are stored [in, out]; no norm after the last layer.",
    ),
    "modernbert-decoder": Arch(
        projections_at={
            **named("attn", "q_proj", "k_proj", "v_proj", "Wo"),
            **fused("mlp.Wi", "gate_proj", "up_proj"),
            "down_proj": Slot("mlp.Wo"),
        },
        norm="final_norm",
        embeddings=("embeddings.tok_embeddings", "embeddings.norm"),
        head="decoder",
        activation="mlp.act",
        examples=("jhu-clsp/ettin-decoder-150m",),
        notes="A layer and a norm precede the output matrix, which has a bias; they stay the target's.",
    ),
    "olmo_hybrid": Arch(
        mixers={"linear_attention": "linear_attn"},
        inner=(
            (".attention_layer_norm.", ".input_layernorm."),
            (".feedforward_layer_norm.", ".post_attention_layernorm."),
        ),
        stacked=convolutions("linear_attn"),
        **NORMS_OVER_HEADS,
        norms="after attention and FFN; before both in a layer with linear attention",
        examples=("allenai/Olmo-Hybrid-7B",),
        notes="Norms on q and k.",
    ),
    "gemma3n_text": Arch(
        projections_at=SHARED_KV | named("mlp", *FFN),
        before=False,
        streams=True,
        dense_width=lambda c, layer: c.intermediate_size[layer],
        beyond=UNUSED_KV,
        norms=SANDWICH,
        notes="Norms on q and k. A layer returns four streams; the first is the hidden state. With "
        "`num_kv_shared_layers`, the last layers have no k and v of their own. With a sparse gate, only activations "
        "that pass it count. LAuReL, AltUp and the per-layer inputs move with whole layers; their embeddings stay the "
        "target's.",
    ),
    "gemma4_text": Arch(
        projections_at=SHARED_KV | named("mlp", *FFN),
        experts_at=Experts(
            block="",
            router="router.proj",
            sparse=lambda c, _: c.enable_moe_block,
            **beside("mlp", gemma4_width),
        ),
        dense_width=gemma4_width,
        heads_at=gemma4_heads,
        beyond=UNUSED_KV,
        norms=SANDWICH,
        notes="Norms on q and k. k and v are the same matrix in global layers with `attention_k_eq_v`, and missing in "
        "layers that use another layer's (`num_kv_shared_layers`). With `enable_moe_block` there are experts beside "
        "the dense FFN. The per-layer inputs move with whole layers; their embeddings stay the target's.",
    ),
    "granitemoe": Arch(
        experts_at=GRANITE,
        inner=GRANITE_NAMES,
        examples=("ibm-granite/granite-3.1-3b-a800m-base",),
        notes=GRANITE_NOTE,
    ),
    "granitemoe_swa": Arch(
        projections_at=LLAMA_ATTENTION | GRANITE_FFN,
        experts_at=GRANITE_SHARED,
        inner=GRANITE_NAMES,
        **SINKS,
        notes=f"{GRANITE_NOTE} Attention sinks move with whole layers.",
    ),
    "granitemoeshared": Arch(
        projections_at=LLAMA_ATTENTION | GRANITE_FFN,
        experts_at=GRANITE_SHARED,
        inner=GRANITE_NAMES,
        examples=("ibm-research/moe-7b-1b-active-shared-experts",),
        notes=GRANITE_NOTE,
    ),
    "granitemoehybrid": Arch(
        projections_at=LLAMA_ATTENTION | GRANITE_FFN,
        experts_at=GRANITE_SHARED,
        mixers={"linear_attention": "mamba"},
        inner=GRANITE_NAMES,
        activation="shared_mlp.activation",
        dense_width=lambda c, _: c.shared_intermediate_size,
        examples=("ibm-granite/granite-4.0-h-tiny",),
        notes=f"{GRANITE_NOTE} Without experts (`num_local_experts` 0), the shared FFN is the only one.",
    ),
    "minimax": Arch(
        experts_at=Experts(names=W123),
        mixers={"linear_attention": "self_attn"},
        inner=SPARSE_BLOCK,
        examples=("MiniMaxAI/MiniMax-Text-01-hf",),
    ),
    "minimax_m2": Arch(
        experts_at=Experts(names=W123),
        inner=SPARSE_BLOCK,
        **NORMS_OVER_HEADS,
        examples=("MiniMaxAI/MiniMax-M2",),
        notes="Norms on q and k.",
    ),
    "phimoe": Arch(
        experts_at=Experts(names=W123, router="router"),
        inner=(*SPARSE_BLOCK, (".mlp.gate.weight", ".mlp.router.weight")),
        examples=("microsoft/Phi-3.5-MoE-instruct",),
        notes="Biases on q, k, v, o, norms and the output matrix.",
    ),
    "mellum": Arch(experts_at=Experts(sparse=by_kind), beyond=AHEAD, notes="Norms on q and k."),
    "cohere2_moe": Arch(
        experts_at=Experts(
            sparse=by_kind,
            width=lambda c, _: c.intermediate_size,
            **beside("mlp.shared_experts", lambda c, _: c.intermediate_size * c.num_shared_experts),
        ),
        dense_width=lambda c, _: c.prefix_dense_intermediate_size or c.intermediate_size,
        norms=PARALLEL,
    ),
    "hunyuan_v1_moe": Arch(
        experts_at=Experts(router="gate.wg", **beside("mlp.shared_mlp", lambda c, _: c.intermediate_size)),
        examples=("tencent/Hunyuan-A13B-Instruct",),
        notes="Norms on q and k.",
    ),
    "ernie4_5_moe": Arch(
        experts_at=Experts(
            sparse=lambda c, layer: (
                (layer + 1) % c.moe_layer_interval == 0 and c.moe_layer_start_index <= layer <= c.moe_layer_end_index
            ),
            **beside("mlp.shared_experts", lambda c, _: c.moe_intermediate_size * c.moe_num_shared_experts),
        ),
        inner=((".mlp.moe_statics.", ".mlp.gate.moe_statics."),),
        beyond=AHEAD,
        examples=("baidu/ERNIE-4.5-21B-A3B-PT",),
    ),
    "exaone_moe": Arch(
        experts_at=Experts(sparse=by_kind, **SHARED_EXPERTS),
        inner=((".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),),
        beyond=AHEAD,
        notes="Norms on q and k.",
    ),
    "afmoe": Arch(
        experts_at=Experts(
            router="router.gate",
            sparse=lambda c, layer: layer >= c.num_dense_layers,
            **SHARED_EXPERTS,
        ),
        with_heads={"o_proj": ("self_attn.gate_proj.weight",)},
        norms=SANDWICH,
        examples=("arcee-ai/Trinity-Mini",),
        notes="Norms on q and k. The output gate `self_attn.gate_proj` moves with whole layers.",
    ),
    "aria_text": Arch(
        experts_at=Experts(
            router="router",
            transposed=True,
            width=lambda c, _: c.intermediate_size,
            **beside("mlp.shared_experts", lambda c, _: c.intermediate_size * c.moe_num_shared_experts),
        ),
        inner=(
            (".mlp.experts.fc1.weight", ".mlp.experts.gate_up_proj"),
            (".mlp.experts.fc2.weight", ".mlp.experts.down_proj"),
        ),
    ),
    "solar_open": Arch(experts_at=Experts(**SHARED_EXPERTS), examples=("upstage/Solar-Open-100B",)),
    "hy_v3": Arch(
        experts_at=Experts(sparse=by_kind, **SHARED_EXPERTS),
        inner=(
            (".mlp.router.gate.", ".mlp.gate."),
            (".mlp.expert_bias", ".mlp.e_score_correction_bias"),
            (".mlp.shared_mlp.", ".mlp.shared_experts."),
        ),
        beyond=AHEAD,
        notes="Norms on q and k.",
    ),
    "kolibri1": Arch(
        experts_at=Experts(**beside("mlp.shared_experts", lambda c, _: c.shared_expert_intermediate_size)),
        inner=(
            (".moe.router.expert_bias", ".mlp.gate.e_score_correction_bias"),
            (".post_attn_norm.", ".post_self_attn_layernorm."),
            (".post_ffn_norm.", ".post_mlp_layernorm."),
        ),
        norms=SANDWICH,
        notes="Norms on q and k.",
    ),
    "laguna": Arch(
        experts_at=Experts(
            sparse=by_kind, **beside("mlp.shared_experts", lambda c, _: c.shared_expert_intermediate_size)
        ),
        inner=(
            (".mlp.experts.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),
            (".mlp.shared_expert.", ".mlp.shared_experts."),
        ),
        heads_at=lambda c, layer: (c.num_attention_heads_per_layer[layer], c.num_key_value_heads, c.head_dim),
        **NARROW_GATE,
        notes="Norms on q and k. The output gate `self_attn.g_proj` moves with whole layers.",
    ),
    "flint": Arch(
        experts_at=Experts(**ONE_SHARED),
        inner=((".softmax_offset", ".sinks"),),
        **SINKS,
        notes="Norms on q and k; attention sinks move with whole layers.",
    ),
    "mimo_v2_flash": Arch(
        experts_at=Experts(sparse=by_kind),
        inner=((".attention_sink_bias", ".sinks"),),
        **SINKS,
        beyond=AHEAD,
        heads_at=mimo_heads,
        examples=("XiaomiMiMo/MiMo-V2-Flash",),
        notes="Values are narrower than keys; attention sinks move with whole layers.",
    ),
    "beam": Arch(
        experts_at=Experts(sparse=by_kind),
        with_heads={"o_proj": ("self_attn.gate_proj.weight", "self_attn.gate_bias")},
        norms=SANDWICH,
        notes="Norms on q and k. The output gate `self_attn.gate_proj` moves with whole layers.",
    ),
    "glm4_moe_lite": Arch(
        projections_at=LATENT_FFN,
        experts_at=Experts(sparse=by_kind, **SHARED_EXPERTS),
        beyond=AHEAD,
        examples=("zai-org/GLM-4.7-Flash",),
        notes=LATENT_NOTE,
    ),
    "glm_moe_dsa": Arch(
        projections_at=LATENT_FFN,
        experts_at=Experts(sparse=by_kind, **SHARED_EXPERTS),
        beyond=AHEAD,
        examples=("zai-org/GLM-5",),
        notes=f"{LATENT_NOTE} {INDEXER}",
    ),
    "deepseek_v32": Arch(
        projections_at=LATENT_FFN,
        experts_at=Experts(sparse=by_kind, **SHARED_EXPERTS),
        beyond=AHEAD,
        examples=("deepseek-ai/DeepSeek-V3.2-Exp-Base",),
        notes=f"{LATENT_NOTE} {INDEXER}",
    ),
    "mistral4": Arch(
        projections_at=LATENT_FFN,
        experts_at=Experts(sparse=after_dense, **SHARED_EXPERTS),
        notes=f"{LATENT_NOTE} All experts are in one tensor on disk.",
    ),
    "axk1": Arch(
        projections_at=LATENT_FFN,
        experts_at=Experts(sparse=by_kind, **SHARED_EXPERTS),
        inner=((".post_mlp_layernorm.", ".mlp.post_mlp_layernorm."),),
        examples=("skt/A.X-K1",),
        notes=LATENT_NOTE,
    ),
    "axk2": Arch(
        projections_at=LATENT_FFN
        | {"q_proj": (Slot("self_attn.q_a_proj", shared=True), Slot("self_attn.q_gate_proj"))},
        experts_at=Experts(sparse=by_kind, **SHARED_EXPERTS),
        inner=((".self_attn.q_b_proj.", ".self_attn.q_gate_proj."), (".W_down.", ".mlp.fc1."), (".W_up.", ".mlp.fc2.")),
        notes=f"{LATENT_NOTE} `q_gate_proj` also holds an output gate. {INDEXER}",
    ),
    "bamba": Arch(
        projections_at=LLAMA_ATTENTION | FEED_FORWARD,
        mixers={"linear_attention": "mamba"},
        norm="final_layernorm",
        activation="feed_forward.act_fn",
        examples=("ibm-ai-platform/Bamba-9B-v2",),
    ),
    "jamba": Arch(
        projections_at=LLAMA_ATTENTION | FEED_FORWARD,
        experts_at=Experts(
            block="feed_forward",
            router="router",
            sparse=lambda c, layer: c.layers_num_experts[layer] > 1,
            width=lambda c, _: c.intermediate_size,
        ),
        mixers={"linear_attention": "mamba"},
        norm="final_layernorm",
        activation="feed_forward.act_fn",
        examples=("ai21labs/Jamba-v0.1", "ai21labs/AI21-Jamba-Mini-1.5"),
    ),
    "falcon_h1": Arch(
        projections_at=LLAMA_ATTENTION | FEED_FORWARD,
        norm="final_layernorm",
        activation="feed_forward.act_fn",
        examples=("tiiuae/Falcon-H1-1.5B-Base",),
        notes="Beside its attention, every layer has a Mamba block, which moves with whole layers.",
    ),
    "lfm2": Arch(
        projections_at=LFM2,
        mixers={"conv": "conv"},
        norm="embedding_norm",
        activation="",
        function="silu",
        dense_width=lfm2_width,
        examples=("LiquidAI/LFM2-1.2B",),
        notes="Norms on q and k.",
    ),
    "lfm2_moe": Arch(
        projections_at=LFM2,
        experts_at=Experts(
            block="feed_forward",
            names=W123,
            sparse=lambda c, layer: layer >= c.num_dense_layers,
            activation="",
            function=silu,
        ),
        mixers={"conv": "conv"},
        norm="embedding_norm",
        activation="",
        function="silu",
        examples=("LiquidAI/LFM2-8B-A1B",),
        notes="Norms on q and k.",
    ),
    "lfm3": Arch(
        projections_at=LFM2 | {"o_proj": Slot("self_attn.o_proj")},
        mixers={"conv": "conv"},
        inner=((".self_attn.gate_proj.", ".self_attn.g_proj."),),
        **NARROW_GATE,
        norm="embedding_norm",
        activation="",
        function="silu",
        norms=SANDWICH,
        notes="Norms on q and k. The output gate `self_attn.g_proj` moves with whole layers.",
    ),
    "nemotron_h": Arch(
        projections_at=named("mixer", *ATTENTION) | named("mixer", "up_proj", "down_proj"),
        experts_at=Experts(
            block="mixer",
            names={"up_proj": "up_proj", "down_proj": "down_proj"},
            sparse=lambda c, layer: c.layer_types[layer] == "moe",
            shared=named("mixer.shared_experts", "up_proj", "down_proj"),
            shared_width=lambda c, _: c.moe_shared_expert_intermediate_size,
            shared_activation="mixer.shared_experts.act_fn",
        ),
        mixers={"linear_attention": "mixer", "moe": "mixer", "mlp": "mixer"},
        bare=("linear_attention", "full_attention"),
        prefixes=("backbone.", "model."),
        norm="norm_f",
        embeddings=("embeddings",),
        activation="mixer.act_fn",
        beyond=AHEAD,
        examples=("nvidia/Nemotron-H-8B-Base-8K", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"),
        notes="Each layer is one of: Mamba, attention, an FFN, a mixture of experts.",
    ),
    "kimi_linear": Arch(
        projections_at=LATENT_FFN,
        experts_at=Experts(names=W123, sparse=by_kind, **SHARED_EXPERTS),
        mixers={"linear_attention": "self_attn"},
        inner=(*SPARSE_BLOCK, *FORGET_GATE),
        stacked=convolutions("self_attn"),
        examples=("moonshotai/Kimi-Linear-48B-A3B-Base",),
        notes=LATENT_NOTE,
    ),
    "bailing_hybrid": Arch(
        projections_at=LATENT_FFN,
        experts_at=Experts(sparse=by_kind, **SHARED_EXPERTS),
        mixers={"linear_attention": "self_attn"},
        inner=(
            (".attention.", ".self_attn."),
            (".self_attn.f_proj.", ".self_attn.forget_gate.f_proj."),
            (".self_attn.dt_bias", ".self_attn.forget_gate.dt_bias"),
            (".self_attn.A_log", ".self_attn.forget_gate.A_log"),
            (".self_attn.dense.", ".self_attn.o_proj."),
            (".mlp.gate.expert_bias", ".mlp.gate.e_score_correction_bias"),
            ("word_embeddings.", "embed_tokens."),
        ),
        stacked=convolutions("self_attn"),
        beyond=AHEAD,
        **NARROW_GATE,
        notes=f"{LATENT_NOTE} The output gate `self_attn.g_proj` moves with whole layers.",
    ),
    "gemma4_unified_text": Arch(
        projections_at=SHARED_KV | named("mlp", *FFN),
        dense_width=gemma4_width,
        heads_at=gemma4_heads,
        beyond=UNUSED_KV,
        norms=SANDWICH,
        notes="Norms on q and k. As gemma4_text.",
    ),
    "flex_olmo": Arch(
        experts_at=Experts(),
        **NORMS_OVER_HEADS,
        norms="after",
        examples=("allenai/FlexOlmo-7x7B-1T",),
        notes="Norms on q and k.",
    ),
}
# --- language models with other towers beside them ---

HEAD = ("language_model.lm_head.", "lm_head.")
LLAVA = (
    HEAD,
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)


@dataclass(frozen=True)
class Tower:
    """A type with other towers, for images, beside its language model: in a swap these stay the target's, and they are
    not measured.

    Attributes:
        text: the table's entry for its language model, unless the config names another type of the table.
        config_type: the name of the language model in configs, if that is not a model type of its own.
        decoder_path, prefixes, renames: as in `Arch`.
        more: other fields in which it differs from `text`.
    """

    text: str
    config_type: str = ""
    decoder_path: str = "model.language_model"
    prefixes: tuple[str, ...] = ("language_model.model.", "model.language_model.")
    renames: tuple[tuple[str, str], ...] = LLAVA
    more: dict = field(default_factory=dict)
    examples: tuple[str, ...] = ()

    def around(self, text: Arch, name: str) -> Arch:
        """The entry for this type with the language model `text`."""
        kind = self.config_type if text.model_type == self.text and self.config_type else text.model_type
        return replace(
            text, text_type=kind, decoder_path=self.decoder_path, prefixes=self.prefixes, renames=self.renames,
            examples=self.examples, model_type=name, **self.more,
        )  # fmt: skip


# Names on disk in the first Qwen VLs; later ones are named as in memory.
QWEN_VL = {"prefixes": ("model.language_model.", "model."), "renames": (("visual.", "model.visual."),)}
AS_IN_MEMORY = {"prefixes": ("model.language_model.",), "renames": ()}
TEXT_MODEL = {"decoder_path": "model.text_model", "prefixes": ("model.text_model.",), "renames": ()}

TOWERS: dict[str, Tower] = {
    "gemma3": Tower(
        "gemma3_text",
        more={"defaults": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}},
        examples=("google/gemma-3-4b-pt",),
    ),
    "gemma4": Tower("gemma4_text", **AS_IN_MEMORY, examples=("google/gemma-4-E2B",)),
    "gemma4_unified": Tower("gemma4_unified_text", **AS_IN_MEMORY),
    "qwen2_vl": Tower("qwen2", "qwen2_vl_text", **QWEN_VL, examples=("Qwen/Qwen2-VL-7B-Instruct",)),
    "qwen2_5_vl": Tower("qwen2", "qwen2_5_vl_text", **QWEN_VL, examples=("Qwen/Qwen2.5-VL-7B-Instruct",)),
    "qwen3_vl": Tower("qwen3", "qwen3_vl_text", **AS_IN_MEMORY, examples=("Qwen/Qwen3-VL-4B-Instruct",)),
    "qwen3_vl_moe": Tower(
        "qwen3_moe",
        "qwen3_vl_moe_text",
        **AS_IN_MEMORY,
        more={"experts_at": Experts(flipped=True)},
        examples=("Qwen/Qwen3-VL-30B-A3B-Instruct",),
    ),
    "qwen3_5": Tower("qwen3_5_text", **AS_IN_MEMORY, examples=("Qwen/Qwen3.5-27B",)),
    "qwen3_5_moe": Tower("qwen3_5_moe_text", **AS_IN_MEMORY, examples=("Qwen/Qwen3.5-35B-A3B",)),
    "llama4": Tower(
        "llama4_text",
        decoder_path="language_model.model",
        prefixes=("language_model.model.",),
        renames=(),
        more={"head": "language_model.lm_head"},
        examples=("meta-llama/Llama-4-Scout-17B-16E",),
    ),
    "mistral3": Tower("mistral", examples=("mistralai/Mistral-Small-3.1-24B-Instruct-2503",)),
    "llava": Tower("llama", examples=("llava-hf/llava-1.5-7b-hf",)),
    "llava_next": Tower("llama", examples=("llava-hf/llava-v1.6-mistral-7b-hf",)),
    "llava_onevision": Tower("qwen2", examples=("llava-hf/llava-onevision-qwen2-7b-ov-hf",)),
    "internvl": Tower("qwen2", examples=("OpenGVLab/InternVL3-1B-hf",)),
    "aya_vision": Tower("cohere2", examples=("CohereLabs/aya-vision-8b",)),
    "cohere2_vision": Tower("cohere2", **AS_IN_MEMORY, examples=("CohereLabs/command-a-vision-07-2025",)),
    "idefics3": Tower("llama", **TEXT_MODEL, examples=("HuggingFaceM4/Idefics3-8B-Llama3",)),
    "smolvlm": Tower("llama", **TEXT_MODEL, examples=("HuggingFaceTB/SmolVLM2-2.2B-Instruct",)),
    "aria": Tower("aria_text", examples=("rhymes-ai/Aria",)),
    "exaone4_5": Tower("exaone4", **AS_IN_MEMORY),
    "lfm2_vl": Tower("lfm2", **AS_IN_MEMORY, examples=("LiquidAI/LFM2-VL-1.6B",)),
    "glm4v": Tower("glm4", "glm4v_text", **AS_IN_MEMORY, examples=("zai-org/GLM-4.1V-9B-Base",)),
    "glm4v_moe": Tower("glm4_moe", "glm4v_moe_text", **AS_IN_MEMORY, examples=("zai-org/GLM-4.5V",)),
    # transformers saves its layers as `blocks`, its name for those of the image tower.
    "kimi_k25": Tower("deepseek_v3", more={"inner": (("blocks.", "layers."),)}, examples=("moonshotai/Kimi-K2.5",)),
    "fuyu": Tower(
        "persimmon", renames=(HEAD, ("vision_embed_tokens.", "model.vision_embed_tokens.")), examples=("adept/fuyu-8b",)
    ),
    "llava_next_video": Tower("llama"),
    "vipllava": Tower("llama"),
    "video_llava": Tower("llama"),
    "video_llama_3": Tower("qwen2", **QWEN_VL),
    "deepseek_vl": Tower("llama", **AS_IN_MEMORY),
    "idefics2": Tower("mistral", **TEXT_MODEL),
    "lighton_ocr": Tower("qwen3", **AS_IN_MEMORY),
    "glm46v": Tower("glm4", "glm4v_text", **AS_IN_MEMORY),
    "glmga": Tower("glm4", "glm4v_text", **AS_IN_MEMORY),
    "lfm3_vl": Tower("lfm3", **AS_IN_MEMORY),
    "cohere_compass": Tower("cohere_compass_text", **AS_IN_MEMORY),
    "hyperclovax_vision_v2": Tower("hyperclovax", **AS_IN_MEMORY),
    "minicpmv4_6": Tower("qwen3_5_text", **AS_IN_MEMORY),
    "minicpmv4_7": Tower("qwen3_5_text", **AS_IN_MEMORY),
}
# The published scripts cut text for their type qwen into shorter blocks.
ARCHS = {
    name: replace(arch, model_type=name, block=2048 if name.startswith("qwen") else 4096)
    for name, arch in ARCHS.items()
}
ARCHS |= {name: tower.around(ARCHS[tower.text], name) for name, tower in TOWERS.items()}
