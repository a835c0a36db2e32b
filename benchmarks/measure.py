"""What every benchmark shares: made-up models, time and memory of a way to do something, and the file of results.

Memory is sampled every 20 ms from /proc/<pid>/smaps_rollup, summed over a process and its children: `Anonymous` is
what it asked for and must keep (its heap), `Rss` counts the file pages in use as well, which the kernel may drop. A
peak that lasts less than 20 ms can be missed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import cli, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import folders, formats

INTERVAL = 0.02  # seconds between two readings
SCHEMA = "benchmark"
SAMPLING = True  # off in the rounds that are timed: a reading walks all pages of a process, and holds it up
# What a way does and what it took: its own seconds where it knows better (a process that times itself), else None.
Way = Callable[[], dict | None]


# ---------------------------------------------------------------- memory and time


def memory(pid: int) -> tuple[int, int]:
    """(anonymous, resident) bytes of a process and all its descendants; zeros for one that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        children = [child for task in Path(f"/proc/{pid}/task").iterdir() for child in _children(task)]
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0, 0
    own = [sum(int(line.split()[1]) << 10 for line in lines if line.startswith(key)) for key in ("Anonymous:", "Rss:")]
    for child in children:
        own = [mine + its for mine, its in zip(own, memory(child), strict=True)]
    return own[0], own[1]


def _children(task: Path) -> list[int]:
    try:
        return [int(pid) for pid in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


@contextlib.contextmanager
def sampled(pid: int) -> Iterator[dict[str, int]]:
    """Samples a process for the length of a block; the peaks stand in the dict afterwards."""
    found, ended = {"peak_anonymous_bytes": 0, "peak_rss_bytes": 0, "readings": 0}, threading.Event()

    def sample() -> None:
        while True:
            for key, value in zip(("peak_anonymous_bytes", "peak_rss_bytes"), memory(pid), strict=True):
                found[key] = max(found[key], value)
            found["readings"] += 1
            if ended.wait(INTERVAL):
                return

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def watch(command: list[str]) -> dict:
    """Run a command in the repository's root: seconds, peaks of its memory (while `SAMPLING`), its last line.

    Raises:
        InputError: the command failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cli.REPOSITORY)
    with sampled(process.pid) if SAMPLING else contextlib.nullcontext({}) as peaks:
        output, _ = process.communicate()
    lines = output.strip().splitlines()[-1:] or ["no output"]
    if process.returncode:
        raise InputError(f"{' '.join(command[1:3])} failed: {lines[0]}")
    return {"seconds": time.perf_counter() - start, **peaks, "last_line": lines[0]}


def warm(size: int) -> None:
    """Touch `size` bytes of memory and free them.

    A virtual machine gives free memory back to its host, and getting it again takes longer than copying a file: without
    this, what is timed depends on what ran before.
    """
    with mmap.mmap(-1, max(size, mmap.PAGESIZE)) as held:
        for at in range(0, len(held), mmap.PAGESIZE):
            held[at] = 1


def interleaved(ways: dict[str, Way], repeats: dict[str, int], before: Callable[[], None] = lambda: None) -> dict:
    """Every way by turns: first a round for the memory, then `repeats[name]` rounds for the seconds.

    With one repeat the round for the memory is timed, too: for a quick look. `before` runs before each way, untimed. A
    way that returns a dict has measured itself; the memory of the others includes what this process holds already.
    """
    global SAMPLING
    found: dict[str, dict] = {name: {"seconds": []} for name in ways}
    try:
        for number in range(max(repeats.values()) + 1):
            for name, run in ways.items():
                if number > repeats[name] or number == repeats[name] == 1:
                    continue
                SAMPLING = number == 0
                before()
                with sampled(os.getpid()) if SAMPLING else contextlib.nullcontext({}) as peaks:
                    start = time.perf_counter()
                    own = run()
                    seconds = time.perf_counter() - start
                own = {"seconds": seconds, **peaks} | (own or {})
                if SAMPLING:
                    found[name] |= {key: own[key] for key in ("peak_anonymous_bytes", "peak_rss_bytes")}
                if number or repeats[name] == 1:
                    found[name]["seconds"].append(own["seconds"])
    finally:
        SAMPLING = True
    return found


def median(way: dict) -> float:
    return statistics.median(way["seconds"])


def ratio(one: dict, other: dict) -> float:
    """The median over the rounds that both took part in of the quotient of their seconds."""
    return statistics.median(a / b for a, b in zip(one["seconds"], other["seconds"], strict=False))


# ---------------------------------------------------------------- made-up models


@dataclass(frozen=True)
class Shape:
    """A Llama with untied embeddings."""

    hidden: int
    ffn: int
    heads: int
    layers: int
    vocab: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor by name, in order."""
        found = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            stem = f"model.layers.{layer}"
            found |= {f"{stem}.self_attn.{name}_proj.weight": (self.hidden, self.hidden) for name in "qkvo"}
            found |= {f"{stem}.mlp.{name}_proj.weight": (self.ffn, self.hidden) for name in ("gate", "up")}
            found |= {f"{stem}.mlp.down_proj.weight": (self.hidden, self.ffn)}
            found |= {
                f"{stem}.{name}.weight": (self.hidden,) for name in ("input_layernorm", "post_attention_layernorm")
            }
        return found | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocab, self.hidden)}

    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors().values())

    def config(self, dtype: str) -> dict:
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 4096,
            "dtype": dtype,
        }


def shape_of(gigabytes: float) -> Shape:
    """A model of about so many bytes at two bytes a parameter."""
    hidden, ffn, heads, vocab = next(
        dims
        for least, dims in (
            (0.75, (2048, 5632, 16, 32000)),
            (0.25, (1024, 2816, 16, 32000)),
            (0.05, (512, 1408, 8, 16000)),
            (0.0, (128, 352, 4, 1024)),
        )
        if gigabytes >= least
    )
    one = Shape(hidden, ffn, heads, 1, vocab).parameters()
    layer = Shape(hidden, ffn, heads, 2, vocab).parameters() - one
    layers = 1 + round((gigabytes * 1e9 / 2 - one) / layer)
    return Shape(hidden, ffn, heads, max(2, layers), vocab)


def write_model(folder: Path, shape: Shape, seed: int, shards: int, dtype: str) -> int:
    """A random model in `shards` files, two bytes a parameter, written block by block; returns its bytes."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder.mkdir(parents=True)
    every = shape.tensors()
    names, weight_map, total = list(every), {}, 0
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(getattr(torch, dtype))
    for number in range(shards):
        held = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = formats.SINGLE if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
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
        (folder / formats.INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config(dtype)))
    Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    return total


# ---------------------------------------------------------------- machine and results


def machine() -> dict:
    """The machine in facts that name no one's: processor, cores, memory, GPU, releases."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    facts = {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


class Store:
    """The file of results: a row is written as soon as it is measured, and replaces the earlier one of its machine.

    Attributes:
        rows: key -> row; a row has `area`, `gigabytes`, `device`, `ways`, `machine` (key of `machines`), `commit`,
            `date` and what else was measured.
    """

    def __init__(self, path: Path):
        self.path, facts = path, machine()
        found = results.read_json(path, SCHEMA)[0] if path.is_file() else {}
        self.rows, self.machines = found.get("rows", {}), found.get("machines", {})
        self.here = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
        self.machines[self.here] = facts

    def key(self, area: str, gigabytes: float, device: str) -> str:
        return f"{area} {gigabytes:g} GB {device} {self.here}"

    def has(self, area: str, gigabytes: float, device: str) -> bool:
        """Whether this row was measured on this machine with the code as it is."""
        row = self.rows.get(self.key(area, gigabytes, device))
        return row is not None and row["commit"] == results.git_commit()

    def put(self, area: str, gigabytes: float, device: str, ways: dict, **more) -> None:
        row = {"area": area, "gigabytes": gigabytes, "device": device, "ways": ways, **more}
        row |= {"machine": self.here, "commit": results.git_commit(), "date": results.now()[:10]}
        self.rows[self.key(area, gigabytes, device)] = row
        used = {row["machine"] for row in self.rows.values()}
        payload = {"machines": {key: self.machines[key] for key in self.machines if key in used}, "rows": self.rows}
        results.write_json(self.path, payload, results.header(SCHEMA))


def between_markers(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in a document."""
    whole = path.read_text(encoding="utf-8")
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if whole.count(first) != 1 or whole.count(last) != 1:
        raise InputError(f"{path} lacks the markers {first.strip()} and {last}, between which the table belongs")
    head, rest = whole.split(first)
    with results.replacing(path) as temporary:
        temporary.write_text(head + first + text + last + rest.split(last)[1], encoding="utf-8")
