"""What every benchmark shares: made-up models, time and memory of a way to do something, and the file of results.

A way is a function, or the words of a command, whose memory is that of it and its children. A command that ends in a
number has timed itself: the seconds after its imports.
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

INTERVAL = 0.02  # seconds between two readings of memory; a shorter peak can be missed
SCHEMA = "benchmark"
PEAKS = ("peak_anonymous_bytes", "peak_rss_bytes")  # what must be kept; with the file pages that the kernel may drop
Way = Callable[[], object] | list[str]


# ---------------------------------------------------------------- memory and time


def memory(pid: int) -> tuple[int, int]:
    """(anonymous, resident) bytes of a process and all its descendants."""
    import psutil

    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        for process in (first, *first.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it has just ended
                found.append(process.memory_info())
    return sum(each.rss - each.shared for each in found), sum(each.rss for each in found)


@contextlib.contextmanager
def sampled(pid: int, wanted: bool = True) -> Iterator[dict[str, int]]:
    """Samples a process for the length of a block, where that is `wanted`; the peaks stand in the dict afterwards."""
    found, ended = {}, threading.Event()

    def sample() -> None:
        while True:
            for key, value in zip(PEAKS, memory(pid), strict=True):
                found[key] = max(found.get(key, 0), value)
            if ended.wait(INTERVAL):
                return

    thread = threading.Thread(target=sample)
    if wanted:
        thread.start()
    try:
        yield found
    finally:
        ended.set()
        if wanted:
            thread.join()


def watch(command: list[str], sample: bool = True) -> dict:
    """Run a command in the repository's root: seconds, peaks of its memory, its last line.

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
    """Seconds of a way (of a function also this process's user CPU) and, with `sample`, peaks of memory; a function's
    include what this process holds already."""
    if isinstance(way, list):
        found = watch(way, sample)
        with contextlib.suppress(ValueError):
            found["seconds"] = float(found["last_line"])
        return found
    with sampled(os.getpid(), sample) as peaks:
        start, user = time.perf_counter(), os.times().user
        way()
        seconds, user = time.perf_counter() - start, os.times().user - user
    return {"seconds": seconds, "user_seconds": user, **peaks}


def interleaved(ways: dict[str, Way], repeats: dict[str, int], before: Callable[[], object] = lambda: None) -> dict:
    """Every way by turns: first a round for the memory, then `repeats[name]` rounds for the seconds.

    With one repeat the round for the memory is timed, too: for a quick look. `before` runs before each way, untimed.
    """
    found: dict[str, dict] = {name: {"seconds": []} for name in ways}
    for number in range(max(repeats.values()) + 1):
        for name, way in ways.items():
            if number > repeats[name] or number == repeats[name] == 1:
                continue
            before()
            taken = once(way, sample=number == 0)
            found[name] |= {key: taken[key] for key in PEAKS if key in taken}
            if number or repeats[name] == 1:
                for key in taken.keys() & {"seconds", "user_seconds"}:
                    found[name].setdefault(key, []).append(taken[key])
    return found


def warm(size: int) -> None:
    """Touch `size` bytes of memory and free them.

    A virtual machine gives free memory back to its host, and getting it again takes longer than copying a file: without
    this, what is timed depends on what ran before.
    """
    with mmap.mmap(-1, max(size, mmap.PAGESIZE)) as held:
        for at in range(0, len(held), mmap.PAGESIZE):
            held[at] = 1


def median(way: dict) -> float:
    return statistics.median(way["seconds"])


def ratio(one: dict, other: dict, key: str = "seconds") -> float:
    """The median over the rounds that both took part in of the quotient of their seconds, a millisecond at least."""
    return statistics.median(a / max(b, 1e-3) for a, b in zip(one[key], other[key], strict=False))


# ---------------------------------------------------------------- made-up models


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
            made = transformers.AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
            )
        return made.eval().requires_grad_(False)


def shape_of(gigabytes: float) -> Shape:
    """A model of about so many bytes at two bytes a parameter."""
    sizes = {0.75: (2048, 5632, 16), 0.25: (1024, 2816, 16), 0.05: (512, 1408, 8), 0.0: (128, 352, 4)}
    hidden, ffn, heads = next(dims for least, dims in sizes.items() if gigabytes >= least)
    vocab = 32000 if hidden > 512 else 16000 if hidden == 512 else 1024
    none, one = (Shape(hidden, ffn, heads, layers, vocab).parameters for layers in (0, 1))
    return Shape(hidden, ffn, heads, max(2, round((gigabytes * 1e9 / 2 - none) / (one - none))), vocab)


def write_model(folder: Path, shape: Shape, seed: int, shard: str) -> int:
    """A random model in bfloat16, in files of at most `shard` ("1GB"); returns its bytes."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    shape.model("bfloat16", seed).save_pretrained(folder, max_shard_size=shard)
    Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


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
    return facts | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


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
    results.write_text(path, head + first + text + last + rest.split(last)[1])
