"""Peak anonymous memory of the commands that read and write whole checkpoints, on a made-up pair of models.

Anonymous memory is what a process has asked for and must keep (its heap), not the file pages that the kernel may drop
at any time. It is read from `Anonymous` in /proc/<pid>/smaps_rollup, summed over the process and its children, every
20 milliseconds, so a peak that lasts less than that can be missed.

In:   nothing; a Llama-shaped pair of random models is written to --folder, tensor by tensor, and removed again.
Out:  a table on stdout, and with -o a JSON.

Full: python benchmarks/anonymous_memory.py
Tiny: python benchmarks/anonymous_memory.py --gigabytes 0.1
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from cpt_utils import cli, folders, results, tensors
from cpt_utils.errors import InputError

HIDDEN, FFN, HEADS, VOCAB = 2048, 5632, 16, 32000
INTERVAL = 0.02  # seconds between two readings
SCHEMA = "anonymous-memory"


# ---------------------------------------------------------------- a pair of models


def shapes(n_layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama with untied embeddings."""
    found = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(n_layers):
        stem = f"model.layers.{layer}"
        found |= {f"{stem}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        found |= {f"{stem}.mlp.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")}
        found |= {f"{stem}.mlp.down_proj.weight": (HIDDEN, FFN)}
        found |= {f"{stem}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def write_model(folder: Path, n_layers: int, seed: int, shards: int, dtype: str) -> int:
    """A random model in `shards` files, two bytes a parameter; returns the bytes of its weights."""
    import torch

    folder.mkdir(parents=True)
    every = shapes(n_layers)
    names, weight_map, total = list(every), {}, 0
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(getattr(torch, dtype))
    for number in range(shards):
        held = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = tensors.SINGLE if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        head, entries = folders.new_layout({name: (block.dtype, every[name]) for name in held})
        weight_map |= dict.fromkeys(held, file)
        with open(folder / file, "wb") as sink:
            sink.write(head)
            for entry in entries.values():
                left = (entry.stop - entry.start) // 2
                while left:
                    part = block[: min(left, len(block))]
                    sink.write(memoryview(part.view(torch.uint8).numpy()))
                    left -= len(part)
            total += sink.tell()
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / tensors.INDEX).write_text(json.dumps(index))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": n_layers,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "vocab_size": VOCAB,
        "dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return total


def make_pair(folder: Path, gigabytes: float, base_dtype: str) -> tuple[list[int], int]:
    """base/ in one file, run/checkpoint-1/ in several, and layers.json; returns the layers and the bytes of a model."""
    one = shapes(1)
    rest = 2 * sum(tensors.numel(shape) for name, shape in one.items() if ".layers." not in name)
    layer = 2 * sum(tensors.numel(shape) for name, shape in one.items() if ".layers." in name)
    n_layers = max(2, round((gigabytes * 1e9 - rest) / layer))
    size = write_model(folder / "base", n_layers, 0, 1, base_dtype)
    write_model(folder / "run" / "checkpoint-1", n_layers, 1, max(2, round(size / 1e9)), "bfloat16")
    interface = [layer for layer in range(n_layers) if layer % 2 == 0]
    hub = [layer for layer in range(n_layers) if layer % 2]
    (folder / "layers.json").write_text(json.dumps({"interface_layers": interface, "semantic_layers": hub}))
    return interface, size


# ---------------------------------------------------------------- measuring


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process and all its descendants, in bytes; 0 for one that has just ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        own = sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Anonymous:"))
        children = [child for task in Path(f"/proc/{pid}/task").iterdir() for child in _children(task)]
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return own + sum(anonymous_bytes(child) for child in children)


def _children(task: Path) -> list[int]:
    try:
        return [int(pid) for pid in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def watch(command: list[str]) -> dict:
    """Run a command to its end: peak anonymous bytes, seconds, number of readings.

    Raises:
        InputError: the command failed.
    """
    start, readings = time.perf_counter(), [0]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def sample():
        while process.poll() is None:
            readings.append(anonymous_bytes(process.pid))
            time.sleep(INTERVAL)

    thread = threading.Thread(target=sample)
    thread.start()
    output, _ = process.communicate()
    thread.join()
    if process.returncode:
        last = output.strip().splitlines()[-1:] or ["no output"]
        raise InputError(f"{' '.join(command[1:3])} failed: {last[0]}")
    seconds = time.perf_counter() - start
    return {"peak_anonymous_bytes": max(readings), "seconds": seconds, "readings": len(readings) - 1}


def commands(folder: Path) -> dict[str, list[str]]:
    """What is measured, as the README has it."""
    base, run, layers = (str(folder / name) for name in ("base", "run", "layers.json"))
    script = [sys.executable, "layer-swap/layer-swap.py", base, f"{run}/checkpoint-1", layers]
    change = ["--base-model", base, "--target-dir", run, "--interface-json", layers, "--hub-json", layers]
    return {
        "python, importing torch": [sys.executable, "-c", "import torch"],
        "layer-swap.py": [*script, "-o", str(folder / "swapped"), "--methods", "semantic_hub"],
        "int_and_sem.py": [
            sys.executable,
            "weight-diff/int_and_sem.py",
            *change,
            "--output",
            str(folder / "change.json"),
        ],
    }


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("--gigabytes", type=float, default=2.0, metavar="G", help="size of each model; default 2.0")
    p.add_argument(
        "--base-dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of the base; default %(default)s"
    )
    p.add_argument("--folder", default="build/anonymous-memory", metavar="DIR", help="scratch; default %(default)s")
    p.add_argument("-o", "--output", metavar="FILE", help="JSON to write; default: none")
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    folder = Path(args.folder)
    if folder.exists():
        raise InputError(f"{folder} exists already; remove it, or give another --folder")
    folders.refuse_full_disk(folder.absolute(), round(3 * args.gigabytes * 1e9) + (1 << 28))
    rows = {}
    try:
        _, size = make_pair(folder, args.gigabytes, args.base_dtype)
        cli.say(f"{size / 1e9:.2f} GB each: base in {args.base_dtype}, checkpoint in bfloat16; {os.cpu_count()} CPUs")
        cli.say(f"{'command':28} {'peak anonymous':>15} {'time':>8}")
        for name, command in commands(folder).items():
            rows[name] = watch(command)
            cli.say(f"{name:28} {rows[name]['peak_anonymous_bytes'] / 1e6:12.0f} MB {rows[name]['seconds']:6.1f} s")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.output:
        facts = {"model_bytes": size, "base_dtype": args.base_dtype, "interval_s": INTERVAL, "cpus": os.cpu_count()}
        results.write_json(args.output, {"commands": rows}, results.header(SCHEMA, **facts))


if __name__ == "__main__":
    cli.run(main)
