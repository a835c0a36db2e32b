"""Downloads the captions of the Multi30k study: the files for the folder MULTI30K_DIR.

English and German come from the hub (`bentrevett/multi30k`), French, in the same order, from the corpus's repository.

In:   an internet connection.
Out:  OUT/{train,val,test_2016_flickr}.{en,de,fr}.gz, one caption per line; existing files are kept.

Full: python studies/multi30k/download.py --out path/to/multi30k
Tiny: python studies/multi30k/download.py --out path/to/multi30k --only val
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

from cpt_utils.base import cli, results, textfiles
from cpt_utils.base.errors import InputError

HUB = "bentrevett/multi30k"
RAW = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"
# File stem -> split on the hub, captions.
PARTS = {"train": ("train", 29000), "val": ("validation", 1014), "test_2016_flickr": ("test", 1000)}


def sources(stem: str, split: str) -> dict[str, dict]:
    """The source of each language's captions, in the form of hub data for `cpt/packing.py`."""
    return {
        "en": {"hub": {"id": HUB, "split": split}, "column": "en"},
        "de": {"hub": {"id": HUB, "split": split}, "column": "de"},
        "fr": {"hub": {"id": "text", "data_files": f"{RAW}/{stem}.fr.gz"}},
    }


def fetch(stem: str, n: int, found: dict[str, dict], out: Path) -> None:
    """Write the files of one part; each language must have `n` captions, otherwise lines would not correspond."""
    packing = cli.sibling("cpt/packing.py")
    for language, spec in found.items():
        path = out / f"{stem}.{language}.gz"
        if path.is_file():
            cli.say(f"{path} exists")
            continue
        source = packing.Source.parse({"name": path.name, "weight": 1.0, **spec}, "download.py")
        lines = [" ".join(textfiles.joined(pieces).split()) for pieces in source.rows()]
        if len(lines) != n:
            raise InputError(f"{path.name}: downloaded {len(lines)} captions, expected {n}; the source has changed")
        with results.replacing(path) as temporary:
            # No time in the gzip header: the same captions give the same bytes.
            temporary.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))
        cli.say(f"{path}: {n} captions")


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    p.add_argument("--out", required=True, metavar="FOLDER", help="folder for the files; no default")
    p.add_argument("--only", choices=PARTS, help="one part; default: all")
    return p


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    for stem in [args.only] if args.only else PARTS:
        split, n = PARTS[stem]
        fetch(stem, n, sources(stem, split), Path(args.out))
    cli.say(f"export MULTI30K_DIR={args.out}")


if __name__ == "__main__":
    cli.run(main)
