"""Model types of transformers that are not in the table of architectures, and why: for messages and the docs' page.

All that `AutoModelForCausalLM`, `AutoModelForImageTextToText` and `AutoModelForMultimodalLM` of transformers TRIED know
and that are not in `arch_table.ARCHS`.
"""

from __future__ import annotations

TRIED = "5.23"  # the release of transformers whose types were tried

# Why -> the types.
REASONS: dict[str, tuple[str, ...]] = {
    "an encoder-decoder, or the decoder of one: its layers attend to an encoder, too": (
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "florence2", "marian", "mbart", "mvp", "pegasus",
        "pix2struct", "plbart", "pp_formulanet", "prophetnet", "t5gemma2", "trocr", "udop", "vision-encoder-decoder",
        "whisper",
    ),
    "an encoder, which predicts the next token only when it is made to": (
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
        "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
    ),
    "its layers have neither attention nor an FFN, or are recurrent in both": (
        "falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm",
    ),
    "layers share the weights of one attention and one FFN, so that none can be swapped alone": ("zamba", "zamba2"),
    "its hidden states change with the padding, which its recurrent layers read": ("recurrent_gemma",),
    "it keeps several residual streams, mixed again in each layer (hyper-connections), so that a layer hands on no "
    "single hidden state": ("deepseek_v4", "glm5_next", "hy_v4", "qwen4_exp", "qwen4_exp_text"),
    "its input to a layer is a mixture of all layers before it": ("inkling2", "inkling2_text"),
    "convolutions over keys, values and outputs, and shared experts in tensors of three dimensions, of which no entry "
    "knows": ("inkling_mm_model", "inkling_text"),
    "a layer has two attentions and two FFNs beside its experts": ("longcat_flash",),
    "its attention is a mixture of experts, too": ("jetmoe",),
    "its experts are one matrix, of which the down projection is stored the other way round": ("dbrx",),
    "its queries and keys pass convolutions in a common narrow space": ("zaya",),
    "no module computes its FFN's activation, which is cut off on both sides": ("minimax_m3_vl", "minimax_m3_vl_text"),
    "each kind of its layers has a configuration of its own": ("dots3_note", "dots3_note_text"),
    "it runs two stacks of layers in turns, several times a token": ("hrm_text",),
    "it reads bytes, in stacks of three kinds": ("blt",),
    "attention and FFN of a layer are in separate lists, and it reads ids of languages": ("xlm",),
    "its tokens are predicted in any order (two-stream attention)": ("xlnet",),
    "attention by hashing in reversible layers": ("reformer",),
    "it cannot be run on text alone: it wants prompt tokens of its own in front": ("cpmant",),
    "some of its layers attend to images, instead of to text": ("idefics", "mllama"),
    "it attends to what is in front of its answer in both directions": ("paligemma",),
    "it makes blocks of tokens out of noise": ("diffusion_gemma",),
    "it drafts for another model, whose keys and values it attends to": (
        "gemma4_assistant", "gemma4_unified_assistant",
    ),
    "adapters for images and speech stand within its layers": ("phi4_multimodal",),
    "text and images have experts of their own": ("ernie4_5_vl_moe",),
    "it makes images, too": ("chameleon", "emu3", "janus"),
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
    "its models call themselves gpt2, which is in the table": ("gpt-sw3",),
    "towers beside its language model, not tried yet": (
        "cosmos3_edge", "cosmos3_omni", "deepseek_vl_hybrid", "granite4_vision", "hunyuan_vl", "mistral_large4",
        "molmo2", "muse_glimmer", "muse_spark", "nemotron_h_omni", "ovis2", "step3p7",
    ),
}  # fmt: skip
LEFT_OUT = {model_type: why for why, types in REASONS.items() for model_type in types}
