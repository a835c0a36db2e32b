"""Speed and memory of lsn/load_oscar.py against the bare tokenizer on the same text.

The text is a file's lines, eight to a document, repeated up to a size, read in turn by

- `bare`: the tokenizer called on batches of texts that are in memory already, its ids thrown away;
- `backend`: the same with the tokenizers library itself, without offsets, its encodings not even looked at;
- `ours`: the loop of load_oscar.py from the file on disk to the ids on disk, the share of other scripts included;
- `filter`: the same with --filter script; with --language-filter also `langid`, with --filter language.

Then the command itself runs on the whole file, and its peak anonymous memory is watched (see measure.py).

In:   a text file and a tokenizer.
Out:  a table on stdout, and with -o a JSON.

Full: python benchmarks/token_ids.py --text path/to/captions.txt --tokenizer build/multi30k/seed-0/base
Tiny: python benchmarks/token_ids.py --text build/tiny/world/lsn/eng_Latn.txt --tokenizer build/tiny/base --megabytes 1 --repeats 1
"""  # noqa: E501

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cpt_utils.base import cli, results, textfiles
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs, tokenization
from cpt_utils.measures import tokenids

measure = cli.sibling("benchmarks/measure.py")
load_oscar = cli.sibling("lsn/load_oscar.py")

SCHEMA = "token-ids-benchmark"
LINES = 8  # to a document


def write_text(source: Path, path: Path, size: int) -> None:
    """Repeat the documents of `source` until the file holds about `size` bytes."""
    lines = [line for line in textfiles.lines(source) if line]
    documents = [" ".join(lines[i : i + LINES]) + "\n" for i in range(0, len(lines), LINES)]
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            for document in documents:
                file.write(document)
                written += len(document.encode())


def ways(path: Path, tokenizer: Path, language: str, judges: dict, batch: int) -> dict[str, Callable[[], int]]:
    """What is timed; each returns the number of tokens that it took from the file, or of documents where it looks at
    no token."""

    whole = tokenization.load_tokenizer(refs.model(tokenizer))
    texts = list(textfiles.lines(path))
    parts = [texts[i : i + batch] for i in range(0, len(texts), batch)]
    encode, splitter = load_oscar.encoder(tokenizer)

    def ours(kind: str, drop: bool) -> Callable[[], int]:
        def run() -> int:
            documents = load_oscar.corpus.file_documents([str(path)])
            with tempfile.TemporaryFile(dir=path.parent) as sink:
                read = load_oscar.corpus.batches(documents, batch)
                found = load_oscar.tokenize(read, encode, judges[kind], drop, 1 << 62, sink, splitter=splitter)
                return found["tokens"]

        return run

    found = {
        "bare": lambda: sum(len(row) for part in parts for row in whole(part, add_special_tokens=False)["input_ids"]),
        "backend": lambda: sum(len(encode(part)) for part in parts),
        "ours": ours("script", False),
        "filter": ours("script", True),
    }
    return found | ({"langid": ours("language", True)} if "language" in judges else {})


def timed(found: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every way, interleaved, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for number in cli.progress(range(repeats + 1), "rounds"):
        for name, run in found.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("--text", required=True, metavar="FILE", help="lines to build the text from (.gz allowed)")
    p.add_argument("--tokenizer", required=True, metavar="T", help="folder of a model with its tokenizer")
    p.add_argument("--language", default="eng_Latn", metavar="L", help="of the text; default %(default)s")
    p.add_argument("--megabytes", type=float, default=20, metavar="M", help="size of the text; default %(default)s")
    p.add_argument(
        "--memory-megabytes", type=float, metavar="M", help="size of the text for the memory; default: --megabytes"
    )
    p.add_argument("--repeats", type=cli.positive, default=5, metavar="N", help="rounds; default %(default)s")
    p.add_argument("--language-filter", action="store_true", help="also time --filter language (py3langid)")
    p.add_argument("--folder", default="build/token-ids", metavar="DIR", help="scratch; default %(default)s")
    p.add_argument("-o", "--output", metavar="FILE", help="JSON to write; default: none")
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    folder, source, tokenizer = Path(args.folder), Path(args.text), refs.model(args.tokenizer).side_files()
    if folder.exists():
        raise InputError(f"{folder} exists already; remove it, or give another --folder")
    if not source.is_file():
        raise InputError(f"{source} does not exist; give --text a file with a sentence a line")
    kinds = ["script", *(["language"] if args.language_filter else [])]
    judges = {kind: load_oscar.foreign.judge_of(args.language, kind)[1] for kind in kinds}
    folder.mkdir(parents=True)
    path = folder / "text"
    try:
        write_text(source, path, round(args.megabytes * 1e6))
        found = ways(path, tokenizer, args.language, judges, load_oscar.BATCH_DOCUMENTS)
        tokens = found["ours"]()
        seconds = timed(found, args.repeats)
        if args.memory_megabytes:
            write_text(source, path, round(args.memory_megabytes * 1e6))
        watched = measure.watch(command(path, tokenizer, args.language, folder))
        watched["n_tokens"] = tokenids.describe(folder / tokenids.file_name(args.language, "benchmark"))["n_tokens"]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    say(seconds, tokens, watched)
    if args.output:
        facts = {"text": str(source), "megabytes": args.megabytes, "tokenizer": args.tokenizer, "cpus": os.cpu_count()}
        payload = {"seconds": seconds, "n_tokens": tokens, "command": watched}
        results.write_json(args.output, payload, results.header(SCHEMA, **facts))


def command(path: Path, tokenizer: Path, language: str, folder: Path) -> list[str]:
    flags = {"--languages": language, "--model-id": "benchmark", "--tokenizer": tokenizer, "--output-dir": folder}
    words = [str(word) for flag in flags.items() for word in flag]
    return [sys.executable, "lsn/load_oscar.py", *words, "--text", f"{language}={path}"]


def say(seconds: dict[str, list[float]], tokens: int, watched: dict) -> None:
    cli.say(f"{tokens:,} tokens a round, {len(seconds['ours'])} rounds, {os.cpu_count()} CPUs")
    cli.say(f"{'':8} {'tokens/s, median (slowest to fastest)':40} speed of bare (by round)")
    for name, values in seconds.items():
        speeds = sorted(tokens / value for value in values)
        shares = sorted(bare / value for bare, value in zip(seconds["bare"], values, strict=True))
        spread = f"{statistics.median(speeds):,.0f} ({speeds[0]:,.0f} to {speeds[-1]:,.0f})"
        cli.say(f"{name:8} {spread:40} {statistics.median(shares):.0%} ({shares[0]:.0%} to {shares[-1]:.0%})")
    cli.say(
        f"the command: {watched['n_tokens']:,} tokens in {watched['seconds']:.0f} s, "
        f"peak anonymous memory {watched['peak_anonymous_bytes'] / 1e6:,.0f} MB"
    )


if __name__ == "__main__":
    cli.run(main)
