"""Tiny configurations of every model type, made from the type's own keys.

tiny_config("qwen2", layers=4)
"""

from __future__ import annotations

from cpt_utils.architectures import archs

# 256 bytes and three special tokens; a model may have more rows than its tokenizer has tokens.
TOKENS = 259
VOCAB = 272
ROPE = {"rope_type": "default", "rope_theta": 10000.0}  # types whose default rescales positions beyond 512
MINISTRAL = ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 512}
MROPE = ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
# What a type that has the key gets: a mixture, a latent attention and other mixers as small as the rest.
SMALL = {
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 20, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 10,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
HYBRID = {"layer_types": ["full_attention", "linear_attention", "full_attention"]}
GEMMA_SHARING = {
    "layer_types": ["sliding_attention", "full_attention", "full_attention"], "num_kv_shared_layers": 1,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2,
    "mamba_d_ssm": 64, "mamba_chunk_size": 8,
}  # fmt: skip
INDEXER = {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 2}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
# An image tower, of which nothing is measured.
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "depth": 1, "embed_dim": 16, "num_heads": 2, "out_hidden_size": 32, "head_dim": 8,
    "num_key_value_heads": 2, "deepstack_visual_indexes": [0], "projection_dim": 32, "vision_output_dim": 32,
}  # fmt: skip
OTHER_TOWER = {
    "qwen2_vl": {"hidden_size": 32},
    "gemma4": VISION | {"position_embedding_size": 16},
    "gemma4_unified": {"mm_embed_dim": 16, "mm_posemb_size": 16, "output_proj_dims": 16, "patch_size": 14},
    "llama4": {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    "kimi_k25": {"pos_emb_height": 4, "pos_emb_width": 4},
}
# What a tiny config of a type needs beyond the sizes that `tiny_config` gives to all.
TINY = {
    "gemma2": {"query_pre_attn_scalar": 8},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "gptj": {"rotary_dim": 4},
    "opt": {"word_embed_proj_dim": 32},
    "ministral3": {"rope_parameters": MINISTRAL},
    "qwen2_vl": {"rope_parameters": MROPE},
    "qwen2_5_vl": {"rope_parameters": MROPE},
    "glm46v": {"rope_parameters": MROPE},
    "glmga": {"rope_parameters": MROPE},
    "bailing_hybrid": DENSE_FIRST
    | {
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "num_expert_group": 1,
    },
    "glm4v": {"rope_parameters": MROPE},
    "glm4v_moe": {"rope_parameters": MROPE},
    "mistral4": {"rope_parameters": MINISTRAL | {"partial_rotary_factor": 1.0}},
    "apertus": {"rope_parameters": ROPE},
    "qwen3_moe": {"mlp_only_layers": [1]},
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3_next": HYBRID | {"mlp_only_layers": [0]},
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe_text": HYBRID,
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4},
    "youtu": {"pad_token_id": None},
    "codegen": {"rotary_dim": 4},
    "ctrl": {"dff": 48},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention", "full_attention"]},
    "gemma3n_text": GEMMA_SHARING
    | {
        "intermediate_size": [48, 40, 48],
        "activation_sparsity_pattern": [0.5, 0.0, 0.0],
        "vocab_size_per_layer_input": 272,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
    },
    "gemma4_text": GEMMA_SHARING
    | {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": 272,
        "hidden_size_per_layer_input": 8,
    },
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention", "mamba"]},
    "minimax": {"layer_types": ["full_attention", "linear_attention", "full_attention"], "block_size": 8},
    "mellum": DENSE_FIRST,
    "cohere2_moe": DENSE_FIRST | {"num_shared_experts": 1, "prefix_dense_intermediate_size": 40},
    "exaone_moe": DENSE_FIRST,
    "hy_v3": DENSE_FIRST,
    "aria_text": {"moe_num_experts": 4},
    "laguna": DENSE_FIRST | {"num_attention_heads_per_layer": [4, 4, 2]},
    "flint": {"mlp_only_layers": [0]},
    "mimo_v2_flash": DENSE_FIRST
    | {
        "head_dim": 8,
        "v_head_dim": 6,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 8,
        "swa_v_head_dim": 6,
    },
    "beam": DENSE_FIRST,
    "glm4_moe_lite": DENSE_FIRST,
    "glm_moe_dsa": DENSE_FIRST | INDEXER,
    "deepseek_v32": DENSE_FIRST | INDEXER,
    "axk1": DENSE_FIRST,
    "axk2": DENSE_FIRST | INDEXER,
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "falcon_h1": MAMBA,
    "lfm2": {"layer_types": ["conv", "full_attention", "full_attention"], "block_multiple_of": 8},
    "lfm2_moe": {"layer_types": ["full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "nemotron_h": {"chunk_size": 8, "layers_block_type": ["mamba", "moe", "attention", "mlp"]},
    "kimi_linear": DENSE_FIRST
    | {
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "gemma4_unified_text": GEMMA_SHARING | {"global_head_dim": 16},
    "llama4_text": {"moe_layers": [0, 2], "intermediate_size_mlp": 40},
}


def tiny_config(model_type: str, *, vocab_size: int = VOCAB, layers: int = 3, **overrides):
    """A config of `model_type`: width 32, 4 heads of 8 features (2 KV heads where the type has them), FFN width 48
    (where the type lets one choose), 4 experts of which a token takes 2, 512 positions.

    Each size goes to the key that the type's own config has for it, so that a type of the table needs no code here;
    what it demands beyond that stands in `TINY`.
    """
    from transformers import AutoConfig

    wanted = {
        "layers": layers, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 48, "experts": 4,
        "positions": 512,
    }  # fmt: skip
    keys = archs.FIELDS | {
        "kv_heads": ("num_key_value_heads", "num_kv_heads"),
        "positions": ("max_position_embeddings", "n_positions", "max_seq_len"),
    }
    whole = AutoConfig.for_model(model_type).to_dict()
    known = whole.get("text_config") or whole
    text = known.get("model_type", model_type)
    fields = {"vocab_size": vocab_size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    fields |= {key: value for name, value in wanted.items() for key in keys[name] if key in known}
    fields |= {key: value for key, value in SMALL.items() if key in known}
    if "kv_lora_rank" in known:  # all heads have keys and values of their own, and turn only a part of their features
        fields |= {"num_key_value_heads": 4} | ({"head_dim": SMALL["qk_rope_head_dim"]} if "head_dim" in known else {})
    fields |= TINY.get(text, {}) | TINY.get(model_type, {}) | overrides
    if "text_config" in whole:
        vision = {key: value for key, value in VISION.items() if key in (whole.get("vision_config") or {})}
        fields = {
            "text_config": fields | {"model_type": text},
            "vision_config": vision | OTHER_TOWER.get(model_type, {}),
        }
        fields |= {"mm_tokens_per_image": 4} if "mm_tokens_per_image" in whole else {}
        fields |= {"audio_config": None} if "audio_config" in whole else {}
    return AutoConfig.for_model(model_type, **fields)
