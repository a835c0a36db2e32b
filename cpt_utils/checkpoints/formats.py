"""Contents of model folders other than plain weights, each refused with its name and a remedy.

Quantised codes, Git LFS pointers, formats and shards of other programs, tensors renamed by a wrapper, files that
disagree with config.json about the layers. `opening.open_folder` checks them here, so comparing, swapping and loading
say the same. docs/checkpoints.md lists them all.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json")
WEIGHT_PATTERNS = (*SAFETENSORS, "pytorch_model*.bin", "pytorch_model.bin.index.json")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_PATTERNS = (ADAPTER_CONFIG, *ADAPTER_WEIGHTS)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)
PAGE = "docs/checkpoints.md"


class Quantised(InputError):
    """The weights are quantised codes, which cannot be compared or swapped here."""


def run_of(spec: str) -> str:
    """The name of a model in a message that is printed once: for a checkpoint, its run."""
    folder, _, name = spec.rpartition("/")
    return f"the checkpoints in {folder}" if folder and _CHECKPOINT.search(name) else spec


# ---------------------------------------------------------------- Git LFS

_POINTER = b"version https://git-lfs.github.com/spec/"


def is_pointer(path: str | os.PathLike) -> bool:
    """Whether a file is the pointer that Git LFS leaves for a large file that was not fetched."""
    try:
        if not os.path.isfile(path):  # a pipe would block
            return False
        with open(path, "rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def refuse_pointer(path: str | os.PathLike) -> None:
    """Raise InputError if `path` is a Git LFS pointer."""
    if is_pointer(path):
        raise InputError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository, or download it"
        )


def refuse_pointer_tokenizer(folder: Path, names: Iterable[str]) -> None:
    """Refuse a pointer among the tokenizer files `names` of a folder.

    If tokenizer.json is there, only that file is read, and the others may be pointers.
    """
    if (folder / "tokenizer.json").is_file() and not is_pointer(folder / "tokenizer.json"):
        return
    for name in names:
        refuse_pointer(folder / name)


# ---------------------------------------------------------------- quantised weights

# dtypes that safetensors defines and this package does not compute with -> bits per entry
ONLY_NAMED = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U16": 16, "U32": 32,
    "U64": 64, "C64": 64,
}  # fmt: skip
_CODES = re.compile(r"F[468](_\w+)?|[IU](8|16|32)|float[48]_\w+|u?int(8|16|32)")  # as safetensors or torch spell it
# Two-dimensional integers that are not codes: positions, masks, tables.
_PLAIN_INTEGERS = re.compile(r"(ids|index|indices|mask|bias|eid|table|tracked)$")
# Names of tensors that accompany codes -> the quantisation. The first match is reported.
_SIGNS = (
    (r"\.SCB$", "int8 of bitsandbytes"),
    (r"\.quant_state\.bitsandbytes__", "4-bit of bitsandbytes"),
    (r"\.(nested_)?(absmax|quant_map)$", "4-bit of bitsandbytes"),
    (r"\.g_idx$", "GPTQ"),
    (r"\.(qweight|qzeros)$", "GPTQ or AWQ"),
    (r"_proj\.scales$", "MLX"),
    (r"\.weight_packed$", "compressed-tensors"),
    (r"\.weight_scale_2$", "NVFP4 of ModelOpt"),
    (r"_proj_blocks$", "MXFP4"),
    (r"\.W_q$", "HQQ"),
    (r"_proj\.(codebooks|codes)$", "AQLM"),
    (r"\.weight\._(data|scale)$", "quanto"),
    (r"weight[:_]qdata$", "torchao"),
    (r"\.(weight_scale_inv|qscale_weight)$", "FP8 in blocks"),
    (r"\.weight_scale$", "with scales"),
)
_ANY_SIGN = re.compile("|".join(pattern for pattern, _ in _SIGNS))
# Without the last argument transformers 5.23 writes the codes again, and a config.json that does not mention them.
_SAVED = ", then save_pretrained(<new folder>, save_original_format=False)"
_LOADED = "load it with transformers, quantization_config={}(dequantize=True)" + _SAVED
_CALLED = "load it with transformers, call model.dequantize()" + _SAVED
# quant_method -> how to convert it to 16-bit weights; the others cannot be converted, or not by transformers.
_WAYS_BACK = {
    "fp8": _LOADED.format("FineGrainedFP8Config"),
    "mxfp8": _LOADED.format("FineGrainedFP8Config"),
    "mxfp4": _LOADED.format("Mxfp4Config"),
    "metal": _LOADED.format("MetalConfig"),
    "compressed-tensors": _LOADED.format("CompressedTensorsConfig"),
    "bitsandbytes": _CALLED,
    "higgs": _CALLED,
    "mlx": "mlx_lm.convert --hf-path {} --dequantize",
}
_ENDINGS = re.compile(
    r"([-_.](unsloth|bnb|fp8|dynamic|block|gptq|awq|int[48]|[48]bit|nf4|mxfp4|nvfp4|mlx|hqq|eetq|quantized|w\d+a\d+))+$",
    re.IGNORECASE,
)


def stated(config: Mapping) -> str | None:
    """The quantisation that a configuration names, in a word or two; None if it names none."""
    for values in (config, config.get("text_config")):
        if not isinstance(values, Mapping):
            continue
        if isinstance(values.get("quantization"), Mapping):
            return "mlx"
        for key in ("quantization_config", "compression_config"):
            settings = values.get(key)
            if isinstance(settings, Mapping) and settings:
                bits = next((n for n in (4, 8) if settings.get(f"load_in_{n}bit")), None)
                method = str(settings.get("quant_method") or ("bitsandbytes" if bits else key))
                width = [f"{bits or settings.get('bits')}-bit"] if bits or settings.get("bits") else []
                return " ".join([method, *width])
    return None


def for_transformers(config: Mapping) -> bool:
    """Whether transformers recognises from a configuration that the weights are quantised (not so for MLX)."""
    quantisation = config.get("quantization_config") or config.get("compression_config") or {}
    return "quant_method" in quantisation or "load_in_4bit" in quantisation or "load_in_8bit" in quantisation


def on_the_fly(config: Mapping) -> bool:
    """Whether a quantised configuration has plain weights: BitNet's are quantised at every run."""
    return (stated(config) or "").startswith("bitnet")


def without_quantisation(config):
    """A transformers configuration, changed so that weights are loaded as they are stored."""
    for values in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            if hasattr(values, key):
                delattr(values, key)
    return config


def codes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[str, str] | None:
    """(name, description) of a tensor that holds or accompanies codes, among `tensors`: name -> (dtype, shape).

    Norms, biases and constants are not codes, whatever their dtype.
    """
    for name, (dtype, shape) in tensors.items():
        known = archs.is_buffer(name) or _PLAIN_INTEGERS.search(name) or len(shape) < 2
        if not known and _CODES.fullmatch(dtype):
            return name, f"is stored as {dtype}"
    name = next(filter(_ANY_SIGN.search, tensors), None)
    return (name, "belongs to codes") if name else None


def kind(config: Mapping, names: Iterable[str]) -> str:
    """The kind of quantisation of a model, from its configuration, else from the names of its tensors."""
    signs = "\n".join(filter(_ANY_SIGN.search, names))
    named = next((words for pattern, words in _SIGNS if re.search(pattern, signs, re.MULTILINE)), None)
    return stated(config) or named or "its config.json does not say how"


def quantised(spec: str, config: Mapping, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """The message that refuses a quantised model, with a remedy. `tensors`: see `codes`."""
    name, what = codes(tensors) or ("its file", "holds codes")
    how, remedy = kind(config, tensors), way_back(spec, config)
    return f"{spec} is quantised ({how}): {name} {what}, and codes are not compared or swapped; {remedy}"


def way_back(spec: str, config: Mapping) -> str:
    """The remedy for a quantised model: its original, and if possible, how to dequantise it."""
    original = original_of(spec)
    way = _WAYS_BACK.get((stated(config) or "").partition(" ")[0], "").format(spec)
    remedy = "give the 16-bit model that it was made from" + (f" (by its name {original})" if original else "")
    return remedy + (f", or dequantise it: {way}" if way else "")


def original_of(name: str) -> str | None:
    """The original according to the name of a quantised model: `org/x-bnb-4bit` -> `org/x`; else None."""
    plain = _ENDINGS.sub("", name.partition("@")[0])
    return plain if plain != name.partition("@")[0] else None


# ---------------------------------------------------------------- folders without weights

_CHECKPOINT = re.compile(r"(checkpoint|ckpt|step|iter)[-_]?\d+")


def cut_off(folder: Path) -> str:
    """The end of a message about an incomplete checkpoint: a trainer may have been stopped while saving it."""
    if not _CHECKPOINT.search(folder.name):
        return ""
    return "; if saving was interrupted, remove the folder, or name the other steps with --steps"


def listing(folder: Path) -> set[str]:
    """The names in a folder and in its sub-folders: `config.json`, `hf/config.json`, `hf/`."""
    names = set()
    for path in folder.iterdir():
        if path.is_dir():
            names |= {f"{path.name}/"} | {f"{path.name}/{below}" for below in os.listdir(path)}
        elif path.is_file():
            names.add(path.name)
    return names


def no_weights(where: str | os.PathLike, names: Collection[str]) -> str:
    """The message that the folder at `where`, with the files `names`, holds no readable weights, with a remedy.

    `names` has folders with a slash at the end, and the contents of the sub-folders.
    """
    here = sorted(name.rstrip("/") for name in names if "/" not in name.rstrip("/"))
    return next(
        (message for describe in (_shards, _foreign, _unindexed, _below) if (message := describe(where, here, names))),
        f"{where} holds no weights ({SINGLE}, {INDEX}, {BIN_SINGLE} or {BIN_INDEX}); is it a model folder?"
        f"{cut_off(Path(where))}",
    )


def _shards(where: str, here: list[str], names: Collection[str]) -> str | None:
    """The message about shards of trainers that split a model over processes."""
    if any(re.match(r"global_step\d+$|zero_to_fp32.py$|.*_model_states.pt$", name) for name in here):
        return (
            f"{where} holds only DeepSpeed shards; convert them: "
            f"python {where}/zero_to_fp32.py {where} {where} --safe_serialization"
        )
    if "pytorch_model_fsdp.bin" in here:
        return (
            f"{where} holds pytorch_model_fsdp.bin, which is the whole model as FSDP saves it; rename it: "
            f"mv {where}/pytorch_model_fsdp.bin {where}/{BIN_SINGLE}"
        )
    fsdp = next((name for name in here if name.startswith("pytorch_model_fsdp") and f"{name}/" in names), None)
    if fsdp or any(name.endswith(".distcp") for name in here):
        return f"{where} holds only FSDP shards; convert them: accelerate merge-weights {where}/{fsdp or ''} {where}"
    if any(re.match(r"(mp_rank|tp_rank)_\d+", name) or name == "model_optim_rng.pt" for name in here):
        return f"{where} holds only Megatron shards; convert them with the trainer's own tool (Megatron Bridge, NeMo)"
    return None


def _foreign(where: str, here: list[str], names: Collection[str]) -> str | None:
    """The message about formats of other programs."""
    consolidated = next((name for name in here if re.match(r"consolidated\S*\.(safetensors|pth?)$", name)), None)
    if consolidated:
        return (
            f"{where} holds {consolidated}, the format of Mistral and Meta, whose tensors have other names; take "
            f"{SINGLE} from the same repository, or convert it with transformers' convert_mistral_weights_to_hf or "
            "convert_llama_weights_to_hf"
        )
    gguf = next((name for name in here if name.endswith(".gguf")), None)
    if gguf:
        return (
            f"{where} holds {gguf}, the format of llama.cpp; give the model that it was made from, or convert it: "
            f'AutoModelForCausalLM.from_pretrained("{where}", gguf_file="{gguf}").save_pretrained("<new folder>")'
        )
    other = next((name for name in here if re.search(r"\.(h5|msgpack|ckpt|nemo|onnx|ot|npz)$", name)), None)
    if other:
        return f"{where} holds {other}, which is not read here; save the model with transformers' save_pretrained"
    return None


def _unindexed(where: str, here: list[str], names: Collection[str]) -> str | None:
    """The message about weight files with names that loaders do not look for."""
    shards = {
        match[0]: match for name in here if (match := re.match(r"(\S+)-(\d+)-of-(\d+)\.(safetensors|bin)$", name))
    }
    if shards:
        first = next(iter(shards.values()))
        missing = sorted(set(range(1, int(first[3]) + 1)) - {int(match[2]) for match in shards.values()})
        single, index = (SINGLE, INDEX) if first[4] == "safetensors" else (BIN_SINGLE, BIN_INDEX)
        if missing:
            return f"{where} holds no {index}, and of {first[3]} shards number {missing[0]} is missing; copy it again"
        if len(shards) == 1:
            return f"{where} holds {first[0]} but no {index}; it is the only shard, rename it: {single}"
        return f"{where} holds {len(shards)} shards but no {index}; copy that file, too, or write it ({PAGE} says how)"
    weights = [name for name in here if re.search(r"\.(safetensors|bin|pth?)$", name) and not _KNOWN.match(name)]
    if weights and "adapter_config.json" not in here:
        kind = f"; if it is the model, rename it: {SINGLE}" if weights[0].endswith(".safetensors") else ""
        return f"{where} holds {weights[0]}, a name under which no loader looks for weights{kind}"
    return None


_KNOWN = re.compile(r"(optimizer|scheduler|scaler|sampler|training_args|rng_state|random_states|adapter_model)\S*$")


def _below(where: str, here: list[str], names: Collection[str]) -> str | None:
    """The message about a model in a sub-folder, a run, or an adapter."""
    if any(name.startswith("checkpoint-") for name in here):
        return f"{where} holds no weights itself, only checkpoints; name one of them"
    nested = sorted(
        {n.rpartition("/")[0] for n in names if n.rpartition("/")[2] in (SINGLE, INDEX, BIN_SINGLE, BIN_INDEX)}
    )
    if nested:
        more = f" (also {', '.join(nested[1:4])})" if len(nested) > 1 else ""
        folder, at, revision = str(where).partition("@") if not os.path.isdir(where) else (where, "", "")
        inside = f"{folder}/{nested[0]}{at}{revision}"
        return f"{where} holds no weights itself; they are in its folder {nested[0]}{more}: give {inside}"
    if "adapter_config.json" in here or "adapter_model.safetensors" in here:
        return f"{where} holds only a PEFT adapter; merge it into its base first (merge_and_unload, save_pretrained)"
    return None


# ---------------------------------------------------------------- files against config.json

_WRAPPERS = {
    "_orig_mod": "torch.compile; save the model inside: model._orig_mod.save_pretrained",
    "_fsdp_wrapped_module": "FSDP; gather the whole state first: FULL_STATE_DICT, or accelerator.get_state_dict",
    "_checkpoint_wrapped_module": "activation checkpointing; save the model inside it",
    "_forward_module": "Lightning; save the model inside it",
    "base_layer": "PEFT; merge first: model.merge_and_unload().save_pretrained",
    "base_model": "PEFT; merge first: model.merge_and_unload().save_pretrained",
    "module": "DataParallel or DeepSpeed; save the model inside: model.module.save_pretrained",
}


def refuse_names(spec: str, config: Mapping, names: Collection[str]) -> None:
    """Refuse files whose tensor `names` do not match the configuration.

    Raises:
        InputError: a wrapper's prefix, or another number of layers.
    """
    _refuse_wrapped(spec, config, names)
    _refuse_other_layers(spec, config, names)


def refuse_empty(spec: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse empty tensors (placeholders)."""
    name = next((name for name, shape in shapes.items() if 0 in shape and not archs.is_buffer(name)), None)
    if name:
        raise InputError(
            f"{spec}: {name} is empty (shape {list(shapes[name])}), as ZeRO-3 leaves it where the shards are not "
            "gathered; save with stage3_gather_16bit_weights_on_model_save, or convert the shards with zero_to_fp32.py"
        )


def _refuse_wrapped(spec: str, config: Mapping, names: Collection[str]) -> None:
    for name in names:
        parts = name.split(".")
        wrapper = next((part for part in parts if part in _WRAPPERS and part not in ("module", "base_model")), None)
        wrapper = wrapper or (parts[0] if parts[0] in _WRAPPERS else None)
        if wrapper:
            raise InputError(
                f"{spec}: its tensors have a wrapper's names ({name}); {wrapper} is from {_WRAPPERS[wrapper]}, or "
                f"remove it from the names in the file ({PAGE} says how)"
            )
    arch = archs.ARCHS.get(config.get("model_type"))
    if arch is None:
        return
    wanted = [f"{prefix}{arch.embeddings[0]}.weight" for prefix in (*arch.prefixes, "")]
    for name in names if not any(each in names for each in wanted) else ():
        end = next((each for each in wanted if name.endswith(f".{each}")), None)
        if end:
            raise InputError(
                f"{spec}: its tensors are called {name} instead of {end}; remove {name.removesuffix(end)!r} "
                f"from the names in the file ({PAGE} says how)"
            )


def _refuse_other_layers(spec: str, config: Mapping, names: Iterable[str]) -> None:
    arch = archs.ARCHS.get(config.get("model_type"))
    layers = {arch.layer_of(name) for name in names} - {None} if arch else set()
    if not layers:
        return
    n_layers = arch.n_layers(config)
    values = config.get("text_config") or config
    beyond = int(values.get("num_nextn_predict_layers") or 0)  # layers for further tokens, not in the LM
    missing = sorted(set(range(n_layers)) - layers)
    if max(layers) >= n_layers + beyond or missing:
        hold = f"hold {max(layers) + 1}" if layers == set(range(max(layers) + 1)) else f"lack layer {missing[0]}"
        raise InputError(
            f"{spec}: config.json says {n_layers} layers, and its weight files {hold}; one of the two is another "
            "model's: put the right number into config.json, or copy the model again"
        )


def read_json(file: Path) -> dict:
    """A configuration file.

    Raises:
        InputError: it is not a file, not JSON, or holds no object.
    """
    refuse_pointer(file)
    try:
        if not file.is_file():
            raise InputError(f"{file} does not exist, or is not a file")
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON ({error}); copy the model again") from None
    if not isinstance(config, dict):
        raise InputError(f"{file} does not hold a configuration; copy the model again")
    return config
