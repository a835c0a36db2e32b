"""Speed and memory of lsn/load_oscar.py against the bare tokenizer on the same text.

The text is a file's lines, eight to a document, repeated up to a size, read in turn by

- `bare`: the tokenizer called on batches of texts that are in memory already, its ids thrown away;
- `ours`: the loop of load_oscar.py from the file on disk to the ids on disk, the share of other scripts included;
- `filter`: the same with --filter script;
- `command`: the command itself, whose peak anonymous memory is watched.

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

LINES = 8  # to a document


def write_text(source: Path, path: Path, size: int) -> None:
    """Repeat the documents of `source` until the file holds about `size` bytes."""
    lines = [line for line in textfiles.lines(source) if line]
    whole = "".join(" ".join(lines[i : i + LINES]) + "\n" for i in range(0, len(lines), LINES))
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(-(-size // len(whole.encode()))):
            file.write(whole)


def ours(path: Path, tokenizer: Path, judge, drop: bool = False) -> int:
    """The tokens of the file, once they are in another one."""
    encode, splitter = load_oscar.encoder(tokenizer)
    documents = load_oscar.corpus.file_documents([str(path)])
    with tempfile.TemporaryFile(dir=path.parent) as sink:
        read = load_oscar.corpus.batches(documents, load_oscar.BATCH_DOCUMENTS)
        return load_oscar.tokenize(read, encode, judge, drop, 1 << 62, sink, splitter=splitter)["tokens"]


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("--text", required=True, metavar="FILE", help="lines to build the text from (.gz allowed)")
    p.add_argument("--tokenizer", required=True, metavar="T", help="folder of a model with its tokenizer")
    p.add_argument("--language", default="eng_Latn", metavar="L", help="of the text; default %(default)s")
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
        whole, texts = tokenization.load_tokenizer(refs.model(tokenizer)), list(textfiles.lines(path))
        parts = [texts[i : i + load_oscar.BATCH_DOCUMENTS] for i in range(0, len(texts), load_oscar.BATCH_DOCUMENTS)]
        judge = load_oscar.foreign.judge_of(args.language, "script")[1]
        command = [sys.executable, "lsn/load_oscar.py", "--languages", args.language, "--model-id", "benchmark"]
        command += ["--tokenizer", str(tokenizer), "--output-dir", folder, "--text", f"{args.language}={path}"]
        ways: dict = {
            "bare": lambda: [whole(part, add_special_tokens=False)["input_ids"] for part in parts],
            "ours": lambda: ours(path, tokenizer, judge),
            "filter": lambda: ours(path, tokenizer, judge, drop=True),
            "command": [*command, "--overwrite"],
        }
        tokens = ways["ours"]()
        found = measure.interleaved(ways, dict.fromkeys(ways, args.repeats) | {"command": 1})
    cli.say(f"{tokens:,} tokens a round, {args.repeats} rounds")
    cli.say(f"{'':8} {'tokens/s, median (slowest to fastest)':40} speed of bare, median of rounds")
    for name, way in found.items():
        speeds = [tokens / seconds for seconds in (measure.median(way), max(way["seconds"]), min(way["seconds"]))]
        spread = "{:,.0f} ({:,.0f} to {:,.0f})".format(*speeds)
        cli.say(f"{name:8} {spread:40} {measure.ratio(found['bare'], way):.0%}")
    cli.say(f"the command: peak anonymous memory {found['command']['peak_anonymous_bytes'] / 1e6:,.0f} MB")


if __name__ == "__main__":
    cli.run(main)
