"""Tiny models of every architecture, made from configs, and the scripts as modules. Nothing here needs a network.

from helpers import load_script, save_tiny
folder = save_tiny("qwen2", tmp_path / "base", seed=0, dtype="bfloat16", shards=3)
load_script("layer-swap/layer-swap.py").main([str(folder), ...])
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

from tiny import VOCAB, tiny_config

from cpt_utils.architectures import archs

ROOT = Path(__file__).resolve().parents[1]

# Every type of the table; tests/test_architectures.py runs over all of them.
EVERY_ARCHITECTURE = tuple(archs.ARCHS)
# A few that stand for the rest in tests of other things: Llama's names with their variants in norms and biases, and
# each way of fusing projections.
ARCHITECTURES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "phi3",
    "gpt_neox",
    "gpt2",
)


def shared_dir() -> str | None:
    """The folder with real data (`sib200/`): SHARED_DIR, else `shared` beside the repository; None where neither is.

    The data are not ours to ship, so tests on them skip where they are absent.
    """
    beside = ROOT.parent / "shared"
    return os.environ.get("SHARED_DIR") or (str(beside) if beside.is_dir() else None)


def clone(folder: Path) -> Path:
    """A copy of the tracked files in `folder`, as a clone has them, in which nothing was run yet."""
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def skip_without(package: str) -> None:
    """Skip the tests of a module where a package is missing, which not every worker need import."""
    import pytest

    if not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed", allow_module_level=True)


def load_script(path: str) -> ModuleType:
    """The script at `path` (relative to the repository) as a fresh module; its `main([...])` runs it."""
    file = ROOT / path
    name = "script_" + file.stem.replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is being executed
    spec.loader.exec_module(module)
    return module


def killed(run: Callable[[], object], place, name: str, after: int) -> None:
    """`run` in a fork that is killed when the function `name` of a module or class is called once more than that."""
    child = os.fork()
    if child == 0:
        own, calls = getattr(place, name), itertools.count()

        def deadly(*args, **kwargs):
            if next(calls) == after:
                os.kill(os.getpid(), signal.SIGKILL)
            return own(*args, **kwargs)

        setattr(place, name, deadly)
        run()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def same_results(*paths: Path) -> dict:
    """What results say that are the same but for when, how and by which code they were made."""
    first, *others = (json.loads(path.read_text()) for path in paths)
    for result in (first, *others):
        del result["_header"]["time"], result["_header"]["command"], result["_header"]["code"]
    assert all(other == first for other in others)
    return first


def nonlinearity(arch, model, layer: int):
    """The module whose output is act(W_gate x) of a layer's FFN, or act(W_up x) where there is no gate."""
    return arch.in_layer(model, layer, arch.neurons(model.config, layer)[0].activation)


def tiny_model(model_type: str, seed: int = 0, dtype="float32", **config):
    """A random model in eval mode. Norms and biases are random too, so that a swap that forgets one shows."""
    import torch

    from cpt_utils.models import loading

    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = tiny_config(model_type, **config)
        model = loading.auto_class(made).from_config(made, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


def tiny_tokenizer():
    """A byte-level tokenizer: any text in any script, one token per byte, `<s>` in front; 259 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


# What was asked for -> a copy of what was written: None after the first time, for most are asked for once.
_kept: dict[str, Path | None] = {}
_keep = functools.cache(lambda: tempfile.TemporaryDirectory(prefix="cpt-tiny-"))


def save_tiny(model_type: str, folder: str | Path, seed: int = 0, dtype="float32", *, model=None, **more) -> Path:
    """Write a tiny model (or `model`) as a complete folder; what was written twice is copied, in a tenth of the time.

    Args:
        tokenizer: (true) with one.
        shards: above 1, exactly so many files and an index, with the tensors of a layer spread over them.
        format: "bin" writes `pytorch_model*.bin` instead of safetensors.
        others: of the configuration.
    """
    folder, asked = Path(folder), repr((model_type, seed, str(dtype), sorted(more.items())))
    new = model is None and not (folder.is_dir() and any(folder.iterdir()))
    if new and _kept.get(asked):
        return shutil.copytree(_kept[asked], folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
    _write_tiny(model_type, folder, seed, dtype, model=model, **more)
    if new and asked in _kept:
        _kept[asked] = shutil.copytree(folder, Path(tempfile.mkdtemp(dir=_keep().name)) / "model")
    elif new:
        _kept[asked] = None
    return folder


def save_run(model_type: str, folder: str | Path, steps: Iterable[int], **more) -> list[Path]:
    """Checkpoints of a run, the weights of each by its step."""
    return [save_tiny(model_type, Path(folder) / f"checkpoint-{step}", seed=step, **more) for step in steps]


def save_study(root: Path) -> Callable[[int], str]:
    """A base and a run of 4 layers, 12 sentence pairs, 6 documents; returns what draws a line of so many words."""
    save_tiny("llama", root / "base", seed=0, layers=4)
    for step, seed in ((5, 1), (20, 2)):
        save_tiny("llama", root / "run" / f"checkpoint-{step}", seed=seed, layers=4, shards=2)
    draw = random.Random(0)
    words = ["ba", "do", "ki", "lu", "me", "no", "pa", "ri"]

    def line(n: int) -> str:
        return " ".join(draw.choice(words) for _ in range(n))

    for name, n, length in (("eng", 12, 4), ("qaa", 12, 4), ("heldout", 6, 9)):
        (root / f"{name}.txt").write_text("".join(line(length) + "\n" for _ in range(n)))
    return line


def assert_drawn_again(stem: Path, draw: Callable[[], object]) -> None:
    """`draw` writes the same figure as the one that is there, byte by byte."""
    drawn = [stem.with_suffix(suffix) for suffix in (".pdf", ".png")]
    before = [figure.read_bytes() for figure in drawn]
    assert all(len(figure) > 1000 for figure in before)
    draw()
    assert [figure.read_bytes() for figure in drawn] == before


def put_tensors(folder: Path, **tensors) -> Path:
    """Add tensors to the file of a folder; a text copies the tensor of that name."""
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "model.safetensors")
    added = {name: held[value].clone() if isinstance(value, str) else value for name, value in tensors.items()}
    save_file(held | added, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _write_tiny(
    model_type: str,
    folder: Path,
    seed: int,
    dtype,
    tokenizer: bool = True,
    vocab_size: int = VOCAB,
    shards: int = 1,
    format: str = "safetensors",
    model=None,
    **config,
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    if model is None:
        model = tiny_model(model_type, seed, dtype, vocab_size=vocab_size, **config)
    model.save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    if shards == 1 and format == "safetensors":
        return
    whole = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(whole).items()}
    whole.unlink()
    stem, end = ("model", "safetensors") if format == "safetensors" else ("pytorch_model", "bin")
    weight_map: dict[str, str] = {}
    for number in range(shards):
        name = f"{stem}.{end}" if shards == 1 else f"{stem}-{number + 1:05d}-of-{shards:05d}.{end}"
        part = {key: tensors[key] for key in sorted(tensors)[number::shards]}
        weight_map |= dict.fromkeys(part, name)
        if format == "safetensors":
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name)
    if shards > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index, indent=2))


def failed_gate(model: str = "run/checkpoint-20") -> dict:
    """What the header of step 2's file says of a model that retrieves nothing, as its untrained twin."""
    import numpy as np

    from cpt_utils.base import results
    from cpt_utils.measures import gate

    never = np.zeros((4, 20), dtype=np.uint8)
    return results.plain({"model": model, **gate.compare(never, never), "untrained": "untrained.json"})


def read_tensors(folder: str | Path) -> dict:
    """Every tensor of a safetensors folder by its name on disk."""
    from safetensors.torch import load_file

    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def bits(tensor):
    """The bytes of a tensor, for comparisons that tell -0.0 from 0.0 and hold for NaN."""
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8)
