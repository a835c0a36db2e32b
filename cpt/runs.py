"""What the scripts of cpt/ share besides their method: run folders, model folders, training records.

A run folder belongs to one set of settings and to one process at a time, and never shows half a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

from cpt_utils.base import cli, locks, results, study
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import formats, step_names

SCHEMA = "cpt-training"
MODES = ("freeze", "train_only", "lora")  # the ways to keep a part of the model unchanged
OWN = (*MODES, "io", "save_steps")  # settings in which an arm differs from the plain run
BATCHES = ("from", "tokenizer", "sources", "block_size", "batch_size", "steps", "seed")  # they fix what a run saw
CONFIGS = ("config.json", formats.ADAPTER_CONFIG)  # the file that makes a folder a model, or an adapter
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", *CONFIGS, "generation_config.json")


def first_line(error: Exception) -> str:
    """The first line of an error's text; if it has none, its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def expand(values: dict, seed: int, path: Path) -> dict:
    """`values` with `{seed}` and `${VARIABLE}` replaced in every string."""
    return study.expand(values, lambda text: study.expand_environment(text.replace("{seed}", str(seed)), path))


def claim(run: Path, settings: dict, defaults: dict, overwrite: bool) -> bool:
    """Make `run` the folder of these settings; False if it already holds their finished run.

    Keys that an older record lacks are taken from `defaults`.

    Raises:
        InputError: the folder holds a run with other settings, or files that no training wrote.
    """
    state = run / ".state"
    finished = (run / "train.json").is_file()
    recorded = None
    if finished:
        payload, _ = results.read_json(run / "train.json", SCHEMA)
        recorded = payload.get("settings") or {}
    elif (state / "settings.json").is_file():
        recorded = json.loads((state / "settings.json").read_text(encoding="utf-8"))
    elif any(path != state for path in run.iterdir()) or (
        state.exists() and any(path.name != "settings.json.tmp" for path in state.iterdir())
    ):
        raise InputError(f"{run} holds files that no training wrote; give --output-dir a new or empty folder")
    if recorded is not None and overwrite:
        cli.say(f"{run}: removing the run recorded there (--overwrite)")
        remove_run(run)
    elif recorded is not None and not results.same(defaults | recorded, defaults | settings):
        if finished or not untouched(run):
            results.refuse_other(run, defaults | recorded, defaults | settings, "another --output-dir")
        remove_run(run)  # other settings, but nothing has been trained with them yet
    elif finished:
        shutil.rmtree(state, ignore_errors=True)  # left by a run killed after its last file
        return False
    state.mkdir(parents=True, exist_ok=True)
    write_text(state / "settings.json", json.dumps(settings, indent=1))
    for leftover in [*run.glob(".*.partial"), *run.glob(".*.old"), *state.glob(".*.old"), state / "partial"]:
        shutil.rmtree(leftover, ignore_errors=True)
    return True


def untouched(run: Path) -> bool:
    """Whether nothing has been trained in `run` yet: there is no state and no checkpoint."""
    trained = [path for path in run.glob("checkpoint-*") if step_names.CHECKPOINT.fullmatch(path.name)]
    return not trained and not states(run / ".state") and not any((run / name).is_file() for name in CONFIGS)


def withdraw(run: Path) -> None:
    """After an error, remove a run that has saved no training step."""
    if untouched(run) and not (run / "train.json").is_file():
        shutil.rmtree(run / ".state", ignore_errors=True)
        with contextlib.suppress(OSError):
            run.rmdir()  # removes only an empty folder


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def remove_run(run: Path) -> None:
    """Remove what a training wrote in `run`; other files stay.

    `train.json` and `.state`, by which a run is known, go last: after a kill the same command removes the rest.
    """
    for path in run.glob("checkpoint-*"):
        if step_names.CHECKPOINT.fullmatch(path.name):
            shutil.rmtree(path)
    for pattern in (*MODEL_FILES, *formats.TOKENIZER_FILES, "timing.json", "train.json"):
        for path in run.glob(pattern):
            path.unlink()
    shutil.rmtree(run / ".state", ignore_errors=True)


@contextlib.contextmanager
def only_one(run: Path, done: str = "trained"):
    """Lock a folder against a second process; `done`, "trained" or "written", goes into the error message."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{run} cannot be made or read: {error.strerror}") from None
    try:
        if not locks.take(descriptor):
            raise InputError(f"{run} is being {done} by another process; wait for it or stop it")
        yield
    finally:
        os.close(descriptor)


def disk_state(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A state dict with its floating tensors in `dtype`; tensors that share storage (tied heads) still share it.

    Raises:
        InputError: a value is not finite in `dtype`.
    """
    seen: dict[tuple, torch.Tensor] = {}
    out = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in seen:
            new = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
            if new.is_floating_point() and not bool(torch.isfinite(new).all()):
                raise InputError(f"{name} has non-finite values in {dtype}; lower learning_rate and start again")
            seen[key] = new
        out[name] = seen[key]
    return out


def write_model(folder: Path, model, state: dict, tokenizer_files: Path, dtype_name: str) -> None:
    """Write a complete model (weights in `dtype_name`, configurations, tokenizer) into the new folder `folder`."""
    folder.mkdir(parents=True)
    cache, model.config.use_cache = getattr(model.config, "use_cache", True), True
    try:
        model.save_pretrained(folder, state_dict=disk_state(state, getattr(torch, dtype_name)))
    finally:
        model.config.use_cache = cache
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in [config, *(value for value in config.values() if isinstance(value, dict) and "dtype" in value)]:
        part["dtype"] = dtype_name
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_tokenizer(tokenizer_files, folder)


def copy_tokenizer(tokenizer_files: Path, folder: Path) -> None:
    """Copy the tokenizer's files into a model folder."""
    for name in formats.TOKENIZER_FILES:
        if (tokenizer_files / name).is_file():
            shutil.copyfile(tokenizer_files / name, folder / name)


def put_folder(partial: Path, final: Path) -> None:
    """Rename the finished folder `partial` to `final`, replacing an earlier one if there is one."""
    if final.exists():  # left by a run that was killed before it could record the step
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
        os.replace(partial, final)
        shutil.rmtree(old)
    else:
        os.replace(partial, final)


def put_files(partial: Path, run: Path) -> None:
    """Move the files of a finished model folder into `run`, config last: without one a folder is not a model."""
    for path in sorted(partial.iterdir(), key=lambda path: (path.name in CONFIGS, path.name)):
        os.replace(path, run / path.name)
    partial.rmdir()


def states(folder: Path) -> list[Path]:
    """The complete training states in `.state`, oldest first."""
    return sorted(folder.glob("state-*"), key=lambda path: int(path.name.removeprefix("state-")))


# ---------------------------------------------------------------- training records


def settings_of(run: Path) -> tuple[dict | None, dict]:
    """The settings of a finished training and the trained part of the model; None and {} if there is no record."""
    if not (run / "train.json").is_file():
        return None, {}
    payload, head = results.read_json(run / "train.json", SCHEMA)
    return payload["settings"], head.get("trained") or {}


def settings_of_plain(run: Path) -> dict | None:
    """The settings of the run that others are compared with, in which nothing may be frozen."""
    settings, trained = settings_of(run)
    if trained or cli.sibling("cpt/freezing.py").mode_of(settings or {}):
        raise InputError(f"{run} has a frozen part itself, so it is not a plain run; train it without one")
    return settings


def other_training(made: dict, wanted: dict | None, only: tuple[str, ...] | None = None) -> str:
    """Describe how the settings of a training differ from those of the plain run, apart from what arms differ in.

    Empty: no difference, or the plain run's settings are unknown. `only`: compare these settings alone.
    """
    if wanted is None:
        return ""
    here, plain = ({k: v for k, v in settings.items() if k not in OWN and (only is None or k in only)}
                   for settings in (made, wanted))  # fmt: skip
    return "" if results.same(here, plain) else results.diff_request(here, plain)


def refuse_other_start(run: Path, made: dict, base, how: str) -> None:
    """Refuse a run whose recorded base is not `base`; `how`: what to do, for the message."""
    start = (made.get("from") or {}).get("weights_sample")
    if start not in (None, base.describe().get("weights_sample")):
        raise InputError(f"{run} was trained from another base than {base.spec} is now; {how}")
