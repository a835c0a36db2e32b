"""What the scripts of cpt/ share beside their method: run folders, model folders, records of trainings.

A run folder belongs to one set of settings, to one process at a time, and never shows half a checkpoint.
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
MODES = ("freeze", "train_only", "lora")  # how a run leaves a part of the model as it is
OWN = (*MODES, "io", "save_steps")  # of a run's settings, those in which an arm differs
BATCHES = ("from", "tokenizer", "sources", "block_size", "batch_size", "steps", "seed")  # those that say what it saw
CONFIGS = ("config.json", formats.ADAPTER_CONFIG)  # what makes a folder a model's, or an adapter's
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", *CONFIGS, "generation_config.json")


def first_line(error: Exception) -> str:
    """The first line of an error's text, else its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def expand(values: dict, seed: int, path: Path) -> dict:
    """`values` with `{seed}` and `${VARIABLE}` replaced in every string in it."""
    return study.expand(values, lambda text: study.expand_environment(text.replace("{seed}", str(seed)), path))


def claim(run: Path, settings: dict, defaults: dict, overwrite: bool) -> bool:
    """Make `run` the folder of these settings; False when it holds their finished run already.

    A key that an older record lacks is taken at its value in `defaults`.

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
        remove_run(run)  # other settings, but nothing was trained with them yet
    elif finished:
        shutil.rmtree(state, ignore_errors=True)  # killed between the last file and its removal
        return False
    state.mkdir(parents=True, exist_ok=True)
    write_text(state / "settings.json", json.dumps(settings, indent=1))
    for leftover in [*run.glob(".*.partial"), *run.glob(".*.old"), *state.glob(".*.old"), state / "partial"]:
        shutil.rmtree(leftover, ignore_errors=True)
    return True


def untouched(run: Path) -> bool:
    """Whether nothing was trained in `run` yet: no state and no checkpoint of any step."""
    trained = [path for path in run.glob("checkpoint-*") if step_names.CHECKPOINT.fullmatch(path.name)]
    return not trained and not states(run / ".state") and not any((run / name).is_file() for name in CONFIGS)


def withdraw(run: Path) -> None:
    """After an error: leave no trace of a run that has not trained a step to be kept."""
    if untouched(run) and not (run / "train.json").is_file():
        shutil.rmtree(run / ".state", ignore_errors=True)
        with contextlib.suppress(OSError):
            run.rmdir()  # only an empty folder goes


def write_text(path: Path, text: str) -> None:
    """Write a small file at once."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def remove_run(run: Path) -> None:
    """Remove what a training wrote in `run`, the record of it last; other files stay."""
    for path in run.glob("checkpoint-*"):
        if step_names.CHECKPOINT.fullmatch(path.name):
            shutil.rmtree(path)
    for pattern in (*MODEL_FILES, *formats.TOKENIZER_FILES, "train.json", "timing.json"):
        for path in run.glob(pattern):
            path.unlink()
    shutil.rmtree(run / ".state", ignore_errors=True)


@contextlib.contextmanager
def only_one(run: Path, done: str = "trained"):
    """Hold a folder: a second process that trains (or writes: `done`) it at the same time is refused."""
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
    """A state dict with its floating tensors in `dtype`; tensors that share storage (tied heads) share it afterwards.

    Raises:
        InputError: a value that is not finite in `dtype`.
    """
    seen: dict[tuple, torch.Tensor] = {}
    out = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in seen:
            new = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
            if new.is_floating_point() and not bool(torch.isfinite(new).all()):
                raise InputError(
                    f"{name} holds values that are not finite in {dtype}; lower learning_rate and start again"
                )
            seen[key] = new
        out[name] = seen[key]
    return out


def write_model(folder: Path, model, state: dict, tokenizer_files: Path, dtype_name: str) -> None:
    """Write a whole model folder (weights in `dtype_name`, configurations, tokenizer) into a new folder `folder`."""
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
    """Put the tokenizer's files into the folder of a model."""
    for name in formats.TOKENIZER_FILES:
        if (tokenizer_files / name).is_file():
            shutil.copyfile(tokenizer_files / name, folder / name)


def put_folder(partial: Path, final: Path) -> None:
    """Make the finished folder `partial` appear as `final` at once, in the place of an earlier one if need be."""
    if final.exists():  # left by a run that was killed before it could record the step
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
        os.replace(partial, final)
        shutil.rmtree(old)
    else:
        os.replace(partial, final)


def put_files(partial: Path, run: Path) -> None:
    """Move a finished model folder's files into `run`, its configuration last: without it a folder is no model."""
    for path in sorted(partial.iterdir(), key=lambda path: (path.name in CONFIGS, path.name)):
        os.replace(path, run / path.name)
    partial.rmdir()


def states(folder: Path) -> list[Path]:
    """The whole training states below `.state`, oldest first."""
    return sorted(folder.glob("state-*"), key=lambda path: int(path.name.removeprefix("state-")))


# ---------------------------------------------------------------- records of trainings


def settings_of(run: Path) -> tuple[dict | None, dict]:
    """The settings of a finished training and what of the model was trained; None and {} where nothing says it."""
    if not (run / "train.json").is_file():
        return None, {}
    payload, head = results.read_json(run / "train.json", SCHEMA)
    return payload["settings"], head.get("trained") or {}


def settings_of_plain(run: Path) -> dict | None:
    """The same of the run that others are compared with, of which nothing may be frozen."""
    wanted, trained = settings_of(run)
    if trained or cli.sibling("cpt/freezing.py").mode_of(wanted or {}):
        raise InputError(f"{run} has a frozen part itself, so that it is no plain run; train it without one")
    return wanted


def other_training(made: dict, wanted: dict | None, only: tuple[str, ...] | None = None) -> str:
    """In words where the settings of a training differ from those of the plain run, what arms differ in aside.

    Empty: nowhere, or those of the plain run are not known. `only`: of these settings.
    """
    if wanted is None:
        return ""
    mine, theirs = ({k: v for k, v in each.items() if k not in OWN and (only is None or k in only)}
                    for each in (made, wanted))  # fmt: skip
    return "" if results.same(mine, theirs) else results.diff_request(mine, theirs)


def refuse_other_start(run: Path, made: dict, base, how: str) -> None:
    start = (made.get("from") or {}).get("weights_sample")
    if start not in (None, base.describe().get("weights_sample")):
        raise InputError(f"{run} was trained from another base than {base.spec} is now; {how}")
