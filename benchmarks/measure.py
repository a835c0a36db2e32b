"""Shared by all benchmarks: random models, time and memory of a way to do something, and the results file.

A way is a function, or the words of a command, whose memory includes that of its children. If a command's last output
line is a number, the command has timed itself: the seconds after its imports.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
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
from cpt_utils.base.lazy import torch, transformers

INTERVAL = 0.02  # seconds between two readings of memory; shorter peaks can be missed
SCHEMA = "benchmark"
PEAKS = ("peak_anonymous_bytes", "peak_rss_bytes")  # what must be kept; also file pages, which the kernel may drop
Way = Callable[[], object] | list[str]


# ---------------------------------------------------------------- memory and time


def memory(pid: int) -> tuple[int, int]:
    """(anonymous, resident) bytes of a process and all its descendants."""
    import psutil

    infos = []
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        for process in (first, *first.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it has just ended
                infos.append(process.memory_info())
    return sum(info.rss - info.shared for info in infos), sum(info.rss for info in infos)


@contextlib.contextmanager
def sampled(pid: int, wanted: bool = True) -> Iterator[dict[str, int]]:
    """Sample a process's memory during a block, if `wanted`; the dict holds the peaks afterwards."""
    peaks, ended = {}, threading.Event()

    def sample() -> None:
        while True:
            for key, value in zip(PEAKS, memory(pid), strict=True):
                peaks[key] = max(peaks.get(key, 0), value)
            if ended.wait(INTERVAL):
                return

    thread = threading.Thread(target=sample)
    if wanted:
        thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        if wanted:
            thread.join()


def watch(command: list[str], sample: bool = True) -> dict:
    """Run a command in the repository's root: seconds, memory peaks, last line of output.

    Raises:
        InputError: the command failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cli.REPOSITORY)
    with sampled(process.pid, sample) as peaks:
        output, _ = process.communicate()
    last = (output.strip().splitlines() or ["no output"])[-1]
    if process.returncode:
        raise InputError(f"{' '.join(command[1:3])} failed: {last}")
    return {"seconds": time.perf_counter() - start, **peaks, "last_line": last}


def once(way: Way, sample: bool) -> dict:
    """Seconds of a way (for a function, also this process's user CPU time) and, with `sample`, memory peaks, which for
    a function include what this process already holds."""
    if isinstance(way, list):
        record = watch(way, sample)
        with contextlib.suppress(ValueError):
            record["seconds"] = float(record["last_line"])
        return record
    with sampled(os.getpid(), sample) as peaks:
        start, user = time.perf_counter(), os.times().user
        way()
        seconds, user = time.perf_counter() - start, os.times().user - user
    return {"seconds": seconds, "user_seconds": user, **peaks}


def interleaved(ways: dict[str, Way], repeats: dict[str, int], before: Callable[[], object] = lambda: None) -> dict:
    """Run the ways in turn: first a round to measure memory, then `repeats[name]` rounds to measure time.

    With a single repeat, for a quick look, the memory round is also timed. `before` runs before each way, untimed.
    """
    records: dict[str, dict] = {name: {"seconds": []} for name in ways}
    for number in range(max(repeats.values()) + 1):
        for name, way in ways.items():
            if number > repeats[name] or number == repeats[name] == 1:
                continue
            before()
            taken = once(way, sample=number == 0)
            records[name] |= {key: taken[key] for key in PEAKS if key in taken}
            if number or repeats[name] == 1:
                for key in taken.keys() & {"seconds", "user_seconds"}:
                    records[name].setdefault(key, []).append(taken[key])
    return records


def warm(size: int) -> None:
    """Touch `size` bytes of memory and free them.

    A virtual machine returns free memory to its host, and getting it back takes longer than copying a file. Without
    this, timings depend on what ran before.
    """
    with mmap.mmap(-1, max(size, mmap.PAGESIZE)) as held:
        for offset in range(0, len(held), mmap.PAGESIZE):
            held[offset] = 1


def median(way: dict) -> float:
    return statistics.median(way["seconds"])


def ratio(one: dict, other: dict, key: str = "seconds") -> float:
    """The median, over the rounds of both, of the ratio of their seconds; the denominator is at least a millisecond."""
    return statistics.median(a / max(b, 1e-3) for a, b in zip(one[key], other[key], strict=False))


# ---------------------------------------------------------------- random models


@dataclass(frozen=True)
class Shape:
    """A Llama with untied embeddings."""

    hidden: int
    ffn: int
    heads: int
    layers: int
    vocab: int

    @property
    def parameters(self) -> int:
        layer = self.hidden * (4 * self.hidden + 3 * self.ffn + 2)
        return self.layers * layer + self.hidden * (2 * self.vocab + 1)

    def model(self, dtype: str, seed: int = 0, device: str = "cpu"):
        """A model of this shape with random weights."""
        config = transformers.AutoConfig.for_model(
            "llama",
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            vocab_size=self.vocab,
            max_position_embeddings=4096,
        )
        torch.manual_seed(seed)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
            )
        return model.eval().requires_grad_(False)


def shape_of(gigabytes: float) -> Shape:
    """A model of about this size at two bytes per parameter."""
    sizes = {0.75: (2048, 5632, 16), 0.25: (1024, 2816, 16), 0.05: (512, 1408, 8), 0.0: (128, 352, 4)}
    hidden, ffn, heads = next(dims for least, dims in sizes.items() if gigabytes >= least)
    vocab = 32000 if hidden > 512 else 16000 if hidden == 512 else 1024
    none, one = (Shape(hidden, ffn, heads, layers, vocab).parameters for layers in (0, 1))
    return Shape(hidden, ffn, heads, max(2, round((gigabytes * 1e9 / 2 - none) / (one - none))), vocab)


def write_model(folder: Path, shape: Shape, seed: int, shard: str) -> int:
    """Write a random model in bfloat16, in files of at most `shard` ("1GB"); returns its size in bytes."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    shape.model("bfloat16", seed).save_pretrained(folder, max_shard_size=shard)
    Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# ---------------------------------------------------------------- machine and results


def machine() -> dict:
    """Anonymous facts about the machine: processor, cores, memory, GPU, software versions."""
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
    return facts | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


class Store:
    """The results file: a row is written as soon as it is measured, and replaces the machine's earlier one.

    Attributes:
        rows: key -> row; a row has `area`, `gigabytes`, `device`, `ways`, `machine` (key of `machines`), `commit`,
            `date` and further measurements.
    """

    def __init__(self, path: Path):
        self.path, facts = path, machine()
        earlier = results.read_json(path, SCHEMA)[0] if path.is_file() else {}
        self.rows, self.machines = earlier.get("rows", {}), earlier.get("machines", {})
        self.here = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
        self.machines[self.here] = facts

    def key(self, area: str, gigabytes: float, device: str) -> str:
        return f"{area} {gigabytes:g} GB {device} {self.here}"

    def has(self, area: str, gigabytes: float, device: str) -> bool:
        """Whether this row was measured on this machine with the current code."""
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
    """Replace the text between `<!-- name -->` and `<!-- /name -->` in a document."""
    whole = path.read_text(encoding="utf-8")
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if whole.count(first) != 1 or whole.count(last) != 1:
        raise InputError(f"{path} lacks the markers {first.strip()} and {last} around the table")
    head, rest = whole.split(first)
    results.write_text(path, head + first + text + last + rest.split(last)[1])
