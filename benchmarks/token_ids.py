"""Speed and memory of lsn/load_oscar.py against the bare tokenizer on the same text.

The text consists of a file's lines, eight per document, repeated up to a given size. In turn it is read by

- `bare`: the tokenizer on batches of texts already in memory, discarding the ids;
- `ours`: the loop of load_oscar.py from the file on disk to the ids on disk, with the share of other scripts;
- `filter`: the same with --filter script;
- `command`: the command itself, for its peak anonymous memory.

Out:  a table on stdout.

Full: python benchmarks/token_ids.py --text path/to/captions.txt --tokenizer build/multi30k/seed-0/base
Tiny: python benchmarks/token_ids.py --text build/tiny/world/lsn/eng_Latn.txt --tokenizer build/tiny/base --megabytes 1 --repeats 1
"""  # noqa: E501

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from cpt_utils.base import cli, textfiles
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs, tokenization

measure = cli.sibling("benchmarks/measure.py")
load_oscar = cli.sibling("lsn/load_oscar.py")

LINES = 8  # per document


def write_text(source: Path, path: Path, size: int) -> None:
    """Repeat the documents of `source` until the file holds about `size` bytes."""
    lines = [line for line in textfiles.lines(source) if line]
    documents = "".join(" ".join(lines[i : i + LINES]) + "\n" for i in range(0, len(lines), LINES))
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(-(-size // len(documents.encode()))):
            file.write(documents)


def ours(path: Path, tokenizer: Path, judge, drop: bool = False) -> int:
    """The number of tokens of the file, after writing their ids to another file."""
    encode, splitter = load_oscar.encoder(tokenizer)
    documents = load_oscar.corpus.file_documents([str(path)])
    with tempfile.TemporaryFile(dir=path.parent) as sink:
        read = load_oscar.corpus.batches(documents, load_oscar.BATCH_DOCUMENTS)
        return load_oscar.tokenize(read, encode, judge, drop, 1 << 62, sink, splitter=splitter)["tokens"]


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("--text", required=True, metavar="FILE", help="lines to build the text from (.gz allowed)")
    p.add_argument("--tokenizer", required=True, metavar="T", help="model folder with a tokenizer")
    p.add_argument("--language", default="eng_Latn", metavar="L", help="language of the text; default %(default)s")
    p.add_argument("--megabytes", type=float, default=20, metavar="M", help="size of the text; default %(default)s")
    p.add_argument("--repeats", type=cli.positive, default=5, metavar="N", help="rounds; default %(default)s")
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    source, tokenizer = Path(args.text), refs.model(args.tokenizer).side_files()
    if not source.is_file():
        raise InputError(f"{source} does not exist; give --text a file with a sentence per line")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text"
        write_text(source, path, round(args.megabytes * 1e6))
        bare, texts = tokenization.load_tokenizer(refs.model(tokenizer)), list(textfiles.lines(path))
        parts = [texts[i : i + load_oscar.BATCH_DOCUMENTS] for i in range(0, len(texts), load_oscar.BATCH_DOCUMENTS)]
        judge = load_oscar.foreign.judge_of(args.language, "script")[1]
        command = [sys.executable, "lsn/load_oscar.py", "--languages", args.language, "--model-id", "benchmark"]
        command += ["--tokenizer", str(tokenizer), "--output-dir", folder, "--text", f"{args.language}={path}"]
        ways: dict = {
            "bare": lambda: [bare(part, add_special_tokens=False)["input_ids"] for part in parts],
            "ours": lambda: ours(path, tokenizer, judge),
            "filter": lambda: ours(path, tokenizer, judge, drop=True),
            "command": [*command, "--overwrite"],
        }
        tokens = ways["ours"]()
        timings = measure.interleaved(ways, dict.fromkeys(ways, args.repeats) | {"command": 1})
    cli.say(f"{tokens:,} tokens per round, {args.repeats} rounds")
    cli.say(f"{'':8} {'tokens/s, median (slowest to fastest)':40} speed relative to bare, median of rounds")
    for name, way in timings.items():
        speeds = [tokens / seconds for seconds in (measure.median(way), max(way["seconds"]), min(way["seconds"]))]
        spread = "{:,.0f} ({:,.0f} to {:,.0f})".format(*speeds)
        cli.say(f"{name:8} {spread:40} {measure.ratio(timings['bare'], way):.0%}")
    cli.say(f"the command: peak anonymous memory {timings['command']['peak_anonymous_bytes'] / 1e6:,.0f} MB")


if __name__ == "__main__":
    cli.run(main)
