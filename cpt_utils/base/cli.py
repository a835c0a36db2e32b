"""Shared by the command lines of all scripts: flags, one-line errors, progress bars, and calling a sibling script.

Nothing heavy is imported here, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import errno
import gc
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch

REPOSITORY = Path(__file__).resolve().parents[2]
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def run(main) -> None:
    """Call `main()` and end the process; an input error prints one line and exits with code 2, Ctrl-C with 130."""
    try:
        code = main()
    except InputError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # `... | head` closed the output: not an error, and nothing more can be printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:  # an unreadable file, a failing disk: the machine's fault, not the code's
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{os_reason(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted: finished files are kept, and the same command continues from them", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        # Libraries leave a million objects, which Python traverses several times at exit: a fifth of a short run.
        gc.freeze()
    raise SystemExit(code or 0)


def os_reason(error: OSError) -> str:
    """The reason for a system error in words; for a full disk, also the remedy."""
    if error.errno == errno.ENOSPC:
        return "the disk is full; free some space and run the same command again"
    return error.strerror or _one_line(error) or type(error).__name__


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=110)


def parser(doc: str, study: bool = True) -> argparse.ArgumentParser:
    """A parser with the script's docstring as description and, with `study`, the flags of all scripts that read one."""
    p = argparse.ArgumentParser(description=doc, formatter_class=_Help)
    if not study:
        return p
    text = "study file (YAML) for every value not given here; default: ./study.yaml, if any"
    p.add_argument("--study", metavar="FILE", help=text)
    p.add_argument("--seed", type=int, metavar="N", help="seed of all random draws; default: the study's, else 42")
    p.add_argument("--arm", metavar="NAME", help="one of the study's `arms` or `runs`: use its run and results folder")
    p.add_argument("--overwrite", action="store_true", help="redo and replace finished results")
    return p


def add_run_flags(p: argparse.ArgumentParser, drop: bool = False) -> None:
    """Add --steps; with `drop`, for scripts that read the weights of one checkpoint at a time, --drop-revisions too."""
    p.add_argument("--steps", metavar="S,S,..", type=_steps, help="only these checkpoints of a run; default: all")
    if drop:
        text = "for a run on the hub, keep only one checkpoint's weights on disk: fetch, use, delete (docs/hub.md)"
        p.add_argument("--drop-revisions", action="store_true", help=text)


def add_named_models(p: argparse.ArgumentParser, base: str | None, run: str) -> None:
    """Add --base and --run to a script with positional models; `base` and `run` are the names of those arguments."""
    if base:
        p.add_argument("--base", dest="named_base", metavar="B", help=f"the same as {base}")
    text = f"run of checkpoints, instead of {run}"
    p.add_argument("--run", nargs="+", dest="named_run", metavar="RUN", help=text)


def named(by_place, by_name, words: str):
    """The value given by position or by name (--base, --run); None if neither was.

    Raises:
        InputError: both were given; `words` names them.
    """
    if by_place is not None and by_name is not None:
        raise InputError(f"{words} are the same argument; leave one out")
    return by_name if by_place is None else by_place


def add_forward_flags(p: argparse.ArgumentParser, batch_size: int | None = 32, device_map: bool = False) -> None:
    """Add --device, --dtype, --batch-size, --limit, and with `device_map` also --device-map. `batch_size` None: the
    script chooses it; 0: it has no batches and no --limit."""
    text = "auto (CUDA if available, else CPU), cpu, cuda, cuda:1; default auto"
    p.add_argument("--device", default="auto", help=text)
    text = "dtype of the model; default: the study's, else bfloat16 on CUDA and float32 on CPU"
    p.add_argument("--dtype", choices=DTYPES, help=text)
    if batch_size != 0:
        text = f"sequences per batch; default {batch_size or 'by their length, on a GPU also by its memory'}"
        p.add_argument("--batch-size", type=positive, default=batch_size, metavar="N", help=text)
    if device_map:
        text = "auto: spread a model that is too big for one GPU over all GPUs, then main memory, then disk"
        p.add_argument("--device-map", choices=("auto",), help=text)
    if batch_size != 0:
        text = "use only the first N items (for a trial; recorded in the result)"
        p.add_argument("--limit", type=positive, metavar="N", help=text)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def seeds(text: str) -> list[int]:
    """The seeds in a `--seeds` value, without repetitions."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of seeds like 0,1,2") from None


def _steps(text: str) -> list[int]:
    try:
        steps = [int(part) for part in text.split(",") if part.strip()]
        if not steps:
            raise ValueError
        return steps
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of step numbers like 100,500") from None


def device(text: str = "auto") -> torch.device:
    """The torch device for a `--device` value."""
    if text in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(text)
    except RuntimeError:
        raise InputError(f"--device {text}: no such device; use auto, cpu, cuda or cuda:<number>") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {text}: no CUDA GPU is visible here; use --device cpu or auto")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {text}: this machine has {torch.cuda.device_count()} CUDA GPU(s), numbered from 0")
    return chosen


def dtype(text: str | None, on: torch.device) -> torch.dtype:
    """The torch dtype for a `--dtype` value; `auto` is bfloat16 on CUDA and float32 on the CPU."""
    if text in (None, "auto"):
        return torch.bfloat16 if on.type == "cuda" else torch.float32
    if text not in DTYPES:
        raise InputError(f"dtype {text!r} is not one of {', '.join(DTYPES)}")
    return getattr(torch, text)


def _silent() -> bool:
    """Whether this process stays silent: of those of `accelerate launch` only the first reports; all report errors."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0"


def say(text: str) -> None:
    if not _silent():
        print(text, flush=True)


_said: set[str] = set()


def once(text: str, how: Callable[[str], None] | None = None) -> None:
    """Print a line that holds for many models only once; `how`: `warn` instead of `say`."""
    if text not in _said:
        _said.add(text)
        (how or say)(text)


def likewise(names: list[str]) -> str:
    """The end of a line that also holds for others: up to three names, else two and the number of the rest."""
    shown = names if len(names) <= 3 else [*names[:2], f"{len(names) - 2} more"]
    return f"; likewise {', '.join(shown)}" if shown else ""


def warn(text: str) -> None:
    if not _silent():
        print(f"warning: {_one_line(Exception(text))}", file=sys.stderr, flush=True)


def progress(iterable=None, desc: str = "", total: int | None = None, unit: str = "it"):
    """A progress bar on stderr, if the loop takes over a second; a line every 30 s if stderr is not a terminal."""
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    return tqdm(
        iterable,
        desc=desc,
        total=total,
        unit=unit,
        file=sys.stderr,
        delay=1,
        disable=_silent(),
        mininterval=30 if quiet else 0.2,
        dynamic_ncols=not quiet,
    )


def sibling(path: str):
    """Import another script of this repository by its path from the root, e.g. `sentence-retrieval/sr_experiment.py`.

    The method of a step stays in its script; a later step that repeats the measurement (layer-swap's controls measure
    retrieval) calls the same functions instead of a copy.
    """
    name = "cpt_script_" + path.replace("/", "_").replace("-", "_").removesuffix(".py")
    if name in sys.modules:
        return sys.modules[name]
    file = REPOSITORY / path
    if not file.is_file():
        raise InputError(f"{file} is missing; the scripts need the whole repository, installed with `pip install -e .`")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
