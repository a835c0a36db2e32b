"""Strict loading of models for forward passes: a tensor that is missing on disk is an error."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import weakref

from cpt_utils.architectures import archs
from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch, transformers
from cpt_utils.checkpoints import formats, identity, merged, opening, refs, settings

# With PEFT installed, transformers applies an adapter that it finds beside a model, a second time if it was merged
# already. So it is told to look where there cannot be one: in a folder with the name of the adapter's config file.
NO_ADAPTER = {"subfolder": formats.ADAPTER_CONFIG}


def auto_class(config):
    """The auto class for a config: image-text-to-text if the model has an image tower, else causal LM. Only the
    language model is used here, but all tensors of the files must be read."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    whole = type(config) in AutoModelForImageTextToText._model_mapping
    alone = type(config) in AutoModelForCausalLM._model_mapping
    return (
        AutoModelForImageTextToText
        if whole and (hasattr(config, "vision_config") or not alone)
        else AutoModelForCausalLM
    )


def attention(config) -> str:
    """The attention implementation: sdpa, or eager for types without sdpa (Gemma 2). It does not depend on what happens
    to be installed, so neither do the numbers."""
    known = auto_class(config)._model_mapping
    return "sdpa" if type(config) not in known or known[type(config)]._supports_sdpa else "eager"


def experts(config, dtype: torch.dtype) -> dict[str, str]:
    """The experts' implementation, if the default of transformers cannot run them.

    Grouped products do not support float64, and need rows of a multiple of 16 bytes.
    """
    arch = archs.for_config(config)
    if arch.experts_at is None:
        return {}
    values = config.to_dict()
    sparse = [layer for layer in range(arch.n_layers(values)) if arch.has_router(values, layer)]
    widths = {arch.settled(values).hidden_size, *(arch.expert_width(values, layer) for layer in sparse)}
    odd = any(width * dtype.itemsize % 16 for width in widths)
    return {"experts_implementation": "eager"} if odd or dtype == torch.float64 else {}


def load_model(
    ref: refs.ModelRef, dtype: torch.dtype, device: torch.device, device_map: str | dict | None = None
) -> transformers.PreTrainedModel:
    """The causal LM of `ref` on `device` in `dtype`, in evaluation mode.

    transformers fills a tensor that is missing from a checkpoint with random numbers and logs a line; here that is an
    error, and so is a tensor that the model does not know or whose shape differs. No code from a model folder is run.
    A quantised model is run, with a message, if transformers can run it.

    Args:
        device_map: spreads the model over several devices, see `--device-map`; `device` is then ignored.

    Raises:
        InputError: missing folder, damaged files, unknown architecture, or tensors that do not fit the configuration.
    """
    if ref.is_adapter:
        opening.open_folder(ref).close()  # an adapter that cannot be merged is refused before its base is loaded
        model = load_model(ref.adapted, dtype, device, device_map)
        merged.apply(model, ref)
        return model
    folder = ref.folder((*formats.WEIGHT_PATTERNS, "*.json"))
    with opening.open_folder(ref, codes=True) as stored:  # errors in one line, not a traceback or random tensors
        settings.say_head(stored, ref.config())
        settings.say_custom_code(ref.spec, ref.config())
    more = {}
    if device_map is not None:
        offload = tempfile.TemporaryDirectory(prefix="offload-")  # for weights that fit on no device
        more = {"device_map": device_map, "offload_folder": offload.name}
    elif device.type != "cpu":
        more = {"device_map": {"": device}}  # tensor by tensor onto the device, without a second copy in memory
    with _in_one_line(ref, stored.quantised):  # `_check` reads the load report and raises our own messages
        config = settings.read_configuration(folder)
        if not stored.quantised and formats.stated(stored.config) and not formats.on_the_fly(stored.config):
            config = formats.without_quantisation(config)
        model, report = auto_class(config).from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation=attention(config), output_loading_info=True,
            trust_remote_code=False, ignore_mismatched_sizes=True, adapter_kwargs=NO_ADAPTER, **experts(config, dtype),
            **more,
        )  # fmt: skip
        if getattr(model, "_hf_peft_config_loaded", False):
            raise InputError(
                f"{ref.spec}: the installed transformers applied the adapter beside it; move {formats.ADAPTER_CONFIG} "
                "elsewhere"
            )
        _check(report, ref)
        model = model.eval().requires_grad_(False)
        if stored.quantised:
            _run_quantised(model, ref, stored.quantised, dtype)
    if device_map is not None:
        weakref.finalize(model, offload.cleanup)
    if any(parameter.is_cuda for parameter in model.parameters()):
        # TF32 would round the factors of float32 products to 10 bits; float32 was requested for float32 numbers.
        torch.backends.cuda.matmul.allow_tf32 = False
    return model


@contextlib.contextmanager
def _in_one_line(ref: refs.ModelRef, quantised: str | None = None):
    """Silence the loader, and turn what it raises (half a dozen exception types) into a one-line InputError."""
    try:
        with settings.quiet_loader():
            yield
    except Exception as error:
        if isinstance(error, InputError) and not quantised:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].removeprefix(f"{ref.spec}: ")
        reason = settings.unknown_rope(ref.config()) or reason.rstrip(".")
        if not quantised:
            raise InputError(f"{ref.spec} cannot be loaded: {reason}") from error
        remedy = formats.way_back(ref.spec, ref.config())
        raise InputError(f"{ref.spec} is quantised ({quantised}) and does not run here: {reason}; {remedy}") from error


def _run_quantised(model: transformers.PreTrainedModel, ref: refs.ModelRef, how: str, dtype: torch.dtype) -> None:
    """Report how a model with quantised weights runs; a trial token shows whether transformers can run it here."""
    if not formats.for_transformers(ref.config()):
        raise InputError("config.json does not declare this to transformers, which would take the codes for weights")
    runs = "which transformers runs as they are"
    if not getattr(model, "is_quantized", False):  # FP8 without a GPU: dequantised into several dtypes
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        runs = "which transformers dequantised while loading"
    with torch.inference_mode():
        model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=input_device(model)))
    cli.once(f"{formats.run_of(ref.spec)}: quantised weights ({how}), {runs}")


def input_device(model: transformers.PreTrainedModel) -> torch.device:
    """The device for token ids: that of the embeddings, or the one to which they are moved from memory or disk."""
    embeddings = model.get_input_embeddings()
    if embeddings.weight.device.type != "meta":
        return embeddings.weight.device
    return torch.device(embeddings._hf_hook.execution_device)


# --- the next one ---


def prefetch(ref: refs.ModelRef) -> threading.Thread:
    """Fetch the files of a hub model while another model computes. Errors are ignored: loading will report them."""

    def fetch() -> None:
        with contextlib.suppress(Exception):
            (ref.adapted or ref).folder((*formats.WEIGHT_PATTERNS, "*.json"))

    thread = threading.Thread(target=fetch, name=f"prefetch {ref.spec}", daemon=True)
    thread.start()
    return thread


def _check(report: dict, ref: refs.ModelRef) -> None:
    for kind, what in (
        ("missing_keys", "the checkpoint lacks"),
        ("unexpected_keys", "the checkpoint holds tensors the model does not know:"),
        ("mismatched_keys", "the shapes of these tensors do not match the configuration:"),
        ("error_msgs", "the loader reports"),
    ):
        names = [k if isinstance(k, str) else str(k[0]) for k in report.get(kind) or ()]
        names = sorted(k for k in names if not archs.is_buffer(k))
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(f"{ref.spec}: {what} {', '.join(names[:3])}{more}; is config.json from another model?")


def load_untrained(
    ref: refs.ModelRef, dtype: torch.dtype, device: torch.device, seed: int, device_map: str | None = None
) -> transformers.PreTrainedModel:
    """A model of `ref`'s configuration with seeded random weights, for measurements of an untrained model.

    Initialised on `device` in `dtype`, so a large model needs no second copy; the random numbers depend on the device.
    With a `device_map` ("auto"), it is initialised on the CPU, then spread.
    """
    config = settings.read_configuration(ref.config_folder())
    if ref.is_adapter:
        config.get_text_config().vocab_size = identity.vocabulary_size(ref.config())
        for values in (config, config.get_text_config()):
            values.tie_word_embeddings = ref.config().get("tie_word_embeddings", values.tie_word_embeddings)
    device = torch.device("cpu") if device_map else device
    gpus = [device] if device.type == "cuda" else []
    with _in_one_line(ref), torch.random.fork_rng(devices=gpus), torch.device(device):
        torch.manual_seed(seed)
        model = auto_class(config).from_config(
            config,
            dtype=dtype,
            attn_implementation=attention(config),
            trust_remote_code=False,
            **experts(config, dtype),
        )
    model = model.to(device).eval().requires_grad_(False)
    if device_map:
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import get_balanced_memory

        whole = model._no_split_modules
        room = get_balanced_memory(model, dtype=dtype, no_split_module_classes=whole)
        model = dispatch_model(model, infer_auto_device_map(model, room, whole, dtype))
    return model


def load_for(process, ref: refs.ModelRef, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """`load_model` on the device of `process` (a `processes.Process`), with an announcement."""
    model = load_model(ref, dtype, process.device, process.device_map)
    announce(model, ref)
    return model


def announce(model: transformers.PreTrainedModel, ref: refs.ModelRef) -> None:
    """Print model, size, dtype and device."""
    size = sum(p.numel() for p in model.parameters())
    text = f"{size / 1e9:.2f} B" if size >= 1e8 else f"{size / 1e6:.2f} M"
    devices = {str(device): None for device in getattr(model, "hf_device_map", {"": model.device}).values()}
    cli.say(f"{ref.spec}: {text} parameters, {str(model.dtype).removeprefix('torch.')} on {', '.join(devices)}")
    if "disk" in devices:
        cli.warn(f"{ref.spec} does not fit into memory: layers are read from disk in every batch, which is slow")
