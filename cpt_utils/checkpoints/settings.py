"""The contents of config.json: its sizes, checked, and settings under which the same weights compute something else.

transformers 4 and 5 spell some settings differently (`rope_theta`, `rope_parameters`), and a missing setting means the
model type's default: 10,000 for the RoPE base of a Llama 2. So two models are compared as transformers reads their
files, and only in settings that its own classes know: a file may hold others, which nothing reads.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_utils.architectures import archs
from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import transformers
from cpt_utils.checkpoints import formats, step_names

if TYPE_CHECKING:
    from cpt_utils.checkpoints import refs

# Settings that do not change what a forward pass computes from a layer's weights.
PASSING = re.compile(
    r"_.*|.*token_ids?|vocab_size|.*(dropout|pdrop)(_prob|_p)?|initializer_.*|use_cache|(torch_)?dtype|architectures|"
    r"transformers_version|auto_map|model_type|quantization_config|tie_word_embeddings|output_.*|return_dict|"
    r"is_encoder_decoder|chunk_size_feed_forward|(id2label|label2id|problem_type)|pretraining_tp|router_aux_loss_coef|"
    r"router_z_loss_coef|router_jitter_noise|.*_implementation|gradient_checkpointing|summary_.*|"
    r"num_nextn_predict_layers|mtp_.*"
)
# Settings that transformers converts: to `layer_types`, and to a window of None.
DERIVED = ("use_sliding_window", "max_window_layers", "sliding_window_pattern")
LENGTH = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")  # matter only for some RoPE scalings


def read_config(folder: Path, name: str) -> dict:
    """The `config.json` of a model folder.

    Raises:
        InputError: there is none, it is damaged, or it holds an impossible size.
    """
    file = folder / "config.json"
    if not file.exists():
        is_run = bool(step_names.in_folder(folder))
        hint = "it is a run of checkpoints; name one of them" if is_run else "it is not a model folder"
        hint += formats.cut_off(folder)
        named = sorted(path.parent.name for path in folder.glob(f"*/{formats.ADAPTER_CONFIG}"))
        if named and not is_run:  # as PEFT saves named adapters
            hint = (
                f"adapters are in its sub-folders {', '.join(named)}; give {name}/{named[0]}, or, for a run, move the "
                "files of one adapter up into each checkpoint"
            )
        raise InputError(f"{name} has no config.json: {hint}")
    config = formats.read_json(file)
    text = config.get("text_config")
    for key, value, kind in (("model_type", config.get("model_type"), str), ("text_config", text, dict)):
        if not isinstance(value, kind | None):
            raise InputError(f"{file}: {key} is {str(value)[:40]}, which no model has; copy it again")
    for values in (config, text or {}):
        for key in sorted({key for keys in archs.FIELDS.values() for key in keys} | {"vocab_size", *LENGTH[:2]}):
            value = values.get(key)
            number = isinstance(value, int | float) and 0 <= value < 1 << 31 and value == int(value)
            if isinstance(value, str | bool) or (isinstance(value, int | float) and not number):
                raise InputError(
                    f"{file}: {key} is {str(value)[:40]}, which cannot be a size of a model; copy it again"
                )
    return config


def diff_settings(base: refs.ModelRef, target: refs.ModelRef) -> dict[str, tuple]:
    """Settings in which two models of one type differ: name -> (base's value, target's value), "unset" if missing."""
    raw = [_decoder(ref.config()) for ref in (base, target)]
    if _stated(raw[0]) == _stated(raw[1]):  # avoids importing transformers
        return {}
    arch = archs.for_config(target.config())
    try:
        values = [_read(ref, arch) for ref in (base, target)]
    except Exception as error:  # a configuration that transformers does not accept raises half a dozen types
        cli.warn(f"{target.spec}: its settings are not compared with the base's ({' '.join(str(error).split())[:120]})")
        return {}
    scaled = {each.get(name) for each in values for name in each if name.endswith("rope_type")} - {"default"}
    names = sorted((values[0].keys() | values[1].keys()) - set(() if scaled else LENGTH))
    pairs = {name: tuple(each.get(name, "unset") for each in values) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _decoder(config: Mapping) -> Mapping:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def _stated(config: Mapping) -> dict:
    return {key: value for key, value in config.items() if not PASSING.fullmatch(key)}


def _read(ref: refs.ModelRef, arch: archs.Arch) -> dict:
    """The settings to compare, flat (`rope_theta`, `full_attention.rope_theta`), and the heads as `arch` reads them."""
    full = read_configuration(Path(ref.config_folder()))
    config = full.get_text_config(decoder=True)
    known = type(config)().to_dict()
    left_out = {key for name in ("heads", "kv_heads", "head_dim") for key in archs.FIELDS[name]} | {*DERIVED}
    values = {key: value for key, value in _stated(config.to_dict()).items() if key in known and key not in left_out}
    values |= dict(zip(("attention heads", "KV heads", "head size"), arch.heads(full), strict=True))
    rope = values.pop("rope_parameters", None)
    flat = _flat(rope) if isinstance(rope, Mapping) else {}
    return {key: value for key, value in (values | flat).items() if value is not None}


def _flat(values: Mapping, start: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        name = f"{start}{key}"
        if key != "type" or "rope_type" not in values:  # an old name of rope_type
            flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def say_head(stored, config: Mapping) -> None:
    """Report a head on disk that differs from the embeddings to which config.json ties it.

    Args:
        stored: the open folder, see `opening.open_folder`.

    Raises:
        InputError: there is no head, and config.json does not tie it.
    """
    names, arch = stored.names(), archs.ARCHS.get(config.get("model_type"))
    if arch is None:  # reported where the architecture is needed
        return
    embeddings, *others = arch.embedding_tensors(names)
    wanted = f"{arch.head}.weight"
    head = next((name for name in others if arch.canonical(name) == wanted), None)
    if head is None and not tied(config):
        raise InputError(
            f"{stored.spec}: config.json does not tie the head to the embeddings, and the files hold none ({wanted}); "
            "set tie_word_embeddings to true if the model ties it, else save it again with its head"
        )
    if head and tied(config) and not stored.quantised and not _equal(stored, head, embeddings):
        cli.once(
            f"{formats.run_of(stored.spec)}: config.json ties the head to the embeddings, but {head} on disk differs; "
            "it is used, as by transformers, which then ties nothing"
        )


def tied(config: Mapping) -> bool:
    """Whether a configuration ties the head to the embeddings; default: that of the model type."""
    for values in (config, config.get("text_config") or {}):
        if isinstance(values.get("tie_word_embeddings"), bool):
            return values["tie_word_embeddings"]
    from transformers import AutoConfig

    return bool(getattr(AutoConfig.for_model(config["model_type"]), "tie_word_embeddings", True))


def _equal(stored, one: str, other: str) -> bool:
    if stored.shape(one) != stored.shape(other) or stored.dtype(one) != stored.dtype(other):
        return False
    rows = stored.shape(one)[0]
    parts = [(start, min(rows, start + 4096)) for start in range(0, rows, 4096)]
    return all(stored.rows(one, *part).equal(stored.rows(other, *part)) for part in parts)


def say_custom_code(spec: str, config: Mapping) -> None:
    """Report once that code in a model folder is not run."""
    named = config.get("auto_map")
    named = named if isinstance(named, Mapping) else {}
    code = next((named[key] for key in ("AutoModelForCausalLM", "AutoModel", "AutoConfig") if named.get(key)), None)
    if code:
        cli.once(
            f"{formats.run_of(spec)}: config.json names code of its own ({code}), which is not run; all numbers are "
            f"those of transformers' own {config.get('model_type')}"
        )


def unknown_rope(config: Mapping) -> str | None:
    """The message for a configuration with rotary embeddings of a type that transformers does not know; else None."""
    from transformers import __version__
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = ["default", *ROPE_INIT_FUNCTIONS]
    for values in (config, config.get("text_config") or {}):
        for key in ("rope_parameters", "rope_scaling"):
            rope = values.get(key)
            kinds = [rope, *rope.values()] if isinstance(rope, Mapping) else []
            for each in kinds:
                kind = each.get("rope_type", each.get("type")) if isinstance(each, Mapping) else None
                if kind is not None and kind not in known:
                    by_code = "; the model's own code computes it, which is not run" if config.get("auto_map") else ""
                    return (
                        f"{key} in config.json is of type {kind!r}, which transformers {__version__} does not know (it "
                        f"knows {', '.join(known)}){by_code}"
                    )
    return None


def read_configuration(folder: Path) -> transformers.PretrainedConfig:
    """The configuration in `folder` as transformers reads it: with the type's defaults, in the current spelling."""
    from transformers import AutoConfig

    with quiet_loader():
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


@contextlib.contextmanager
def quiet_loader():
    """Silence the loader's log lines and its progress bar (one per model) within a block."""
    from transformers.utils import logging

    offload = getLogger("accelerate.big_modeling")  # reports offloaded layers, as `announce` does
    offload_level, level, bar = offload.level, logging.get_verbosity(), logging.is_progress_bar_enabled()
    offload.setLevel("ERROR")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        offload.setLevel(offload_level)
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
