"""Loading models and tokenizers for forward passes, strictly: a tensor that is missing on disk stops the load."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from cpt_utils import archs, cli, refs, tensors
from cpt_utils.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def attention(config) -> str:
    """The attention implementation: sdpa, or eager for the types that have no other (Gemma 2). Never what happens to be
    installed, so that numbers do not depend on it."""
    from transformers import AutoModelForCausalLM

    known = AutoModelForCausalLM._model_mapping
    return "sdpa" if type(config) not in known or known[type(config)]._supports_sdpa else "eager"


def load_model(ref: refs.ModelRef, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The causal LM of `ref` on `device` in `dtype`, in evaluation mode.

    transformers fills a tensor that is missing from a checkpoint with random numbers and logs a line; here that is an
    error, and so is a tensor that the model does not know or whose shape differs.

    Raises:
        InputError: missing folder, damaged files, unknown architecture, or tensors that do not fit the configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = ref.folder((*refs.WEIGHT_PATTERNS, "*.json"))
    with tensors.TensorFolder(folder) as stored:  # damaged or missing shards: one line instead of a loader's traceback
        stored.names()
    try:
        config = AutoConfig.from_pretrained(folder)
        with _quiet_loader():  # the load report is read below, and said in our own words
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=dtype, attn_implementation=attention(config), output_loading_info=True
            )
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{ref.spec} cannot be loaded: {reason}") from error
    _check(report, ref)
    model = model.to(device).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if device.type == "cuda":
        # TF32 would round float32 products to 10 bits; a float32 run is asked for to have float32 numbers.
        torch.backends.cuda.matmul.allow_tf32 = False
    return model


@contextlib.contextmanager
def _quiet_loader():
    """Silence the loader's log lines and its progress bar, one per model, for the length of a block."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _check(report: dict, ref: refs.ModelRef) -> None:
    for kind, what in (
        ("missing_keys", "the checkpoint lacks"),
        ("unexpected_keys", "the checkpoint holds tensors the model does not know:"),
        ("mismatched_keys", "these tensors have another shape than the configuration says:"),
        ("error_msgs", "the loader reports"),
    ):
        found = [k if isinstance(k, str) else str(k[0]) for k in report.get(kind) or ()]
        found = sorted(k for k in found if not archs.is_buffer(k))
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise InputError(f"{ref.spec}: {what} {', '.join(found[:3])}{more}; is config.json of another model?")


def load_untrained(ref: refs.ModelRef, dtype: torch.dtype, device: torch.device, seed: int) -> PreTrainedModel:
    """A model of `ref`'s configuration with seeded random weights: what a measurement gives before any training.

    Initialised on `device` in `dtype`, so that a large model needs no second copy; another device draws other numbers.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(ref.side_files())
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention(config))
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(
    ref: refs.ModelRef, run: str | None = None, base: refs.ModelRef | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of `ref` (see `refs.tokenizer_folder`), padding on the right, with pad token (else eos, else unk).

    Raises:
        InputError: no tokenizer files, or a tokenizer without any token to pad with.
    """
    from transformers import AutoTokenizer

    folder = refs.tokenizer_folder(ref, run, base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"the tokenizer in {folder} cannot be loaded: {reason}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise InputError(f"the tokenizer in {folder} has no pad, eos or unk token to pad with")
    tokenizer.padding_side = "right"
    return tokenizer


def announce(model: PreTrainedModel, ref: refs.ModelRef) -> None:
    """Print what is about to run: model, size, dtype, device."""
    size = sum(p.numel() for p in model.parameters())
    text = f"{size / 1e9:.2f} B" if size >= 1e8 else f"{size / 1e6:.2f} M"
    cli.say(f"{ref.spec}: {text} parameters, {str(model.dtype).removeprefix('torch.')} on {model.device}")
