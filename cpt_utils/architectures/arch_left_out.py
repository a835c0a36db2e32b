"""Model types of transformers that are not in the table of architectures, and why: for messages and the docs' page.

These are all types in `AutoModelForCausalLM`, `AutoModelForImageTextToText` and `AutoModelForMultimodalLM` of
transformers TRIED that are not in `arch_table.ARCHS`.
"""

from __future__ import annotations

TRIED = "5.23"  # the release of transformers whose types were tried

# Why -> the types.
REASONS: dict[str, tuple[str, ...]] = {
    "an encoder-decoder, or the decoder of one: its layers also attend to an encoder": (
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "florence2", "marian", "mbart", "mvp", "pegasus",
        "pix2struct", "plbart", "pp_formulanet", "prophetnet", "t5gemma2", "trocr", "udop", "vision-encoder-decoder",
        "whisper",
    ),
    "an encoder, which predicts the next token only if configured as a decoder": (
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
        "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
    ),
    "its layers have neither attention nor an FFN, or are recurrent in both": (
        "falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm",
    ),
    "its layers share the weights of one attention and one FFN, so none can be swapped alone": ("zamba", "zamba2"),
    "its recurrent layers read the padding, which changes its hidden states": ("recurrent_gemma",),
    "it keeps several residual streams, mixed again in each layer (hyper-connections), so a layer returns no single "
    "hidden state": ("deepseek_v4", "glm5_next", "hy_v4", "qwen4_exp", "qwen4_exp_text"),
    "the input to each layer is a mixture of all previous layers": ("inkling2", "inkling2_text"),
    "convolutions over keys, values and outputs, and shared experts in three-dimensional tensors, which no entry "
    "supports": ("inkling_mm_model", "inkling_text"),
    "a layer has two attentions and two FFNs beside its experts": ("longcat_flash",),
    "its attention is also a mixture of experts": ("jetmoe",),
    "its experts are one matrix, in which the down projection is transposed": ("dbrx",),
    "its queries and keys pass convolutions in a common narrow space": ("zaya",),
    "no module computes its FFN's activation, which is clipped on both sides": ("minimax_m3_vl", "minimax_m3_vl_text"),
    "each kind of its layers has its own configuration": ("dots3_note", "dots3_note_text"),
    "it alternates between two stacks of layers, several times per token": ("hrm_text",),
    "it reads bytes, in three kinds of stacks": ("blt",),
    "attention and FFN of a layer are in separate lists, and it reads language ids": ("xlm",),
    "it predicts tokens in any order (two-stream attention)": ("xlnet",),
    "attention by hashing in reversible layers": ("reformer",),
    "it cannot be run on text alone: it needs its own prompt tokens in front": ("cpmant",),
    "some of its layers attend to images instead of text": ("idefics", "mllama"),
    "it attends in both directions to everything before its answer": ("paligemma",),
    "it generates blocks of tokens from noise": ("diffusion_gemma",),
    "it drafts for another model, to whose keys and values it attends": (
        "gemma4_assistant", "gemma4_unified_assistant",
    ),
    "its layers contain adapters for images and speech": ("phi4_multimodal",),
    "text and images have separate experts": ("ernie4_5_vl_moe",),
    "it also generates images": ("chameleon", "emu3", "janus"),
    "it describes images, reads documents or acts, and is not a language model with an image tower": (
        "blip", "blip-2", "deepseek_ocr2", "evolla", "git", "glm_ocr", "got_ocr2", "granite_docling", "instructblip",
        "instructblipvideo", "kosmos-2", "kosmos-2.5", "minicpm_ocr", "paddleocr_vl", "pi0", "pp_chart2table",
        "qianfan_ocr", "shieldgemma2", "unlimited_ocr",
    ),
    "speech or sound": (
        "fun_asr_nano", "glmasr", "granite_speech", "granite_speech_plus", "kyutai_speech_to_text", "moshi",
        "moss_transcribe_diarize", "musicgen", "musicgen_melody", "nemo_speechlm", "qwen2_5_omni",
        "qwen2_5_omni_thinker", "qwen2_audio", "qwen3_asr", "qwen3_omni_moe", "qwen3_omni_moe_thinker",
        "vibevoice_asr", "voxtral", "voxtral_realtime",
    ),
    "its image tower needs the package timm, without which it could not be tried (gemma3n_text is in the table)": (
        "gemma3n",
    ),
    "its image tower needs the package timm, without which it could not be tried": ("fast_vlm", "perception_lm"),
    "its models have the type gpt2, which is in the table": ("gpt-sw3",),
    "it has towers beside its language model, and has not been tried yet": (
        "cosmos3_edge", "cosmos3_omni", "deepseek_vl_hybrid", "granite4_vision", "hunyuan_vl", "mistral_large4",
        "molmo2", "muse_glimmer", "muse_spark", "nemotron_h_omni", "ovis2", "step3p7",
    ),
}  # fmt: skip
LEFT_OUT = {model_type: why for why, types in REASONS.items() for model_type in types}
