"""Write the SIB-200 tasks for lm_eval: one YAML per language, their group `sib200`, and the template that all include.

In:   the 205 codes in languages.txt (data from the hub, Davlan/sib200), or with --tsv-dir a folder of local files
      <language>/{train,dev,test}.tsv with the columns index_id, category, text (dev is optional)
Out:  _default_yaml, sib200_<language>.yaml, _sib200.yaml in --out, for `lm_eval --include_path`
      Prompt, choices and metrics come from a single template, so hub and local runs score the same requests.

    python lm_eval_sib200/generate.py
    python lm_eval_sib200/generate.py --tsv-dir build/demo/world/sib200 --out build/demo/tasks
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from pathlib import Path

from cpt_utils.base import cli, locks
from cpt_utils.base.errors import InputError
from cpt_utils.measures.sib200 import CHOICES, PROMPT, read_tsv

HERE = Path(__file__).resolve().parent
# Increase it whenever the prompt, the choices or the data change: lm_eval stores it with every number. Since 2.0, CSV
# quotes in local files are parsed, which gives the hub's texts; before, they stayed in texts that contain a quote.
VERSION = 2.0
GROUP = "sib200"
TEMPLATE = "_default_yaml"  # without a suffix, so that lm_eval does not take it for a task
GROUP_FILE = "_sib200.yaml"
MARK = "# Written by lm_eval_sib200/generate.py; change it there and run it again."

# Quotes as pandas writes them (the reader's default). No missing values: a sentence may be "None" or "NA".
TSV_OPTIONS = {"delimiter": "\t", "keep_default_na": False, "na_filter": False}
SPLITS = {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}


def task_name(language: str) -> str:
    return f"{GROUP}_{language}"


def template(dataset: str) -> str:
    """The template that every task includes; `dataset` is the first argument of `datasets.load_dataset`."""
    lines = [
        MARK,
        f"dataset_path: {_quoted(dataset)}",
        'output_type: "multiple_choice"',
        'fewshot_split: "train"',
        'test_split: "test"',
        f"doc_to_text: {_quoted(PROMPT)}",
        'doc_to_target: "category"',
        "doc_to_choice:",
        *(f"  - {_quoted(choice)}" for choice in CHOICES),
        'fewshot_delimiter: "\\n"',
        "metric_list:",
    ]
    for metric in ("acc", "acc_norm"):
        lines += [f"  - metric: {_quoted(metric)}", '    aggregation: "mean"', "    higher_is_better: true"]
    return "\n".join([*lines, "metadata:", f"  version: {VERSION}", ""])


def group(languages: list[str]) -> str:
    """The group over `languages`: the macro mean, in which all languages have equal weight, whatever their rows."""
    lines = [MARK, f"group: {_quoted(GROUP)}", "task:", *(f"  - {_quoted(task_name(code))}" for code in languages)]
    lines.append("aggregate_metric_list:")
    for metric in ("acc", "acc_norm"):
        lines += [f"  - metric: {_quoted(metric)}", '    aggregation: "mean"', "    weight_by_size: false"]
    return "\n".join([*lines, "metadata:", f"  version: {VERSION}", ""])


def hub_files(languages: list[str]) -> dict[str, str]:
    """File name -> text for the committed folder: data from the hub, one configuration of the data set per language."""
    files = {TEMPLATE: template("Davlan/sib200"), GROUP_FILE: group(languages)}
    for code in languages:
        lines = [f"include: {_quoted(TEMPLATE)}", f"task: {_quoted(task_name(code))}", f"dataset_name: {_quoted(code)}"]
        files[f"{task_name(code)}.yaml"] = "\n".join([MARK, *lines, ""])
    return files


def tsv_files(folder: str | os.PathLike) -> dict[str, str]:
    """File name -> text for a folder of tasks on the local TSV files in `folder`, which are checked first.

    Raises:
        InputError: no language folder, a missing file, or a malformed TSV (file, line and reason).
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist; --tsv-dir needs a folder of <language>/train.tsv and test.tsv")
    if glob.has_magic(str(folder)):
        raise InputError(f"{folder}: the reader treats * ? [ ] in a path as a pattern; rename the folder")
    languages = sorted(path.name for path in folder.iterdir() if any((path / tsv).is_file() for tsv in SPLITS.values()))
    if not languages:
        raise InputError(f"{folder} holds no <language>/test.tsv; --tsv-dir needs the folder of language folders")
    files = {TEMPLATE: template("csv"), GROUP_FILE: group(languages)}
    for code in languages:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", code):
            raise InputError(f"{folder / code}: the folder name is not a language code and cannot be a task name")
        paths = {split: folder / code / tsv for split, tsv in SPLITS.items() if (folder / code / tsv).is_file()}
        if missing := sorted(SPLITS[split] for split in ("train", "test") if split not in paths):
            raise InputError(f"{folder / code} lacks {' and '.join(missing)}; a task needs train.tsv and test.tsv")
        for path in paths.values():
            read_tsv(path)
        # A key here replaces the included one without merging, so dataset_kwargs must be complete.
        lines = [
            f"include: {_quoted(TEMPLATE)}",
            f"task: {_quoted(task_name(code))}",
            "dataset_kwargs:",
            *(f"  {option}: {json.dumps(value)}" for option, value in TSV_OPTIONS.items()),
            "  data_files:",
            *(f"    {split}: {_quoted(str(path))}" for split, path in paths.items()),
        ]
        files[f"{task_name(code)}.yaml"] = "\n".join([MARK, *lines, ""])
    return files


def write_folder(files: dict[str, str], out: str | os.PathLike) -> None:
    """Write `files` as the complete contents of `out`, replacing a folder that this script wrote before.

    Raises:
        InputError: `out` is a file, or holds a file that this script did not write.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; --out needs a folder")
    foreign = [path.name for path in sorted(out.iterdir()) if not is_ours(path)] if out.is_dir() else []
    if foreign:
        raise InputError(f"{out} holds {foreign[0]}, which this script did not write; give --out a new folder")
    partial = out.with_name(f"{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    parent = os.open(out.parent, os.O_RDONLY)
    try:
        locks.take(parent, wait=True)  # of two simultaneous calls, one waits
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            for name, text in files.items():
                (partial / name).write_text(text, encoding="utf-8")
            if out.is_dir():
                shutil.rmtree(out)
            os.replace(partial, out)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(parent)


def write_beside(files: dict[str, str], folder: Path) -> None:
    """Write `files` into `folder`, which also holds other files; remove tasks that are no longer among `files`."""
    for path in folder.glob("*.yaml"):
        if path.name not in files and is_ours(path):
            path.unlink()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def is_ours(path: Path) -> bool:
    """Whether this script wrote `path`, judging by its first line."""
    if not path.is_file() or not (path.suffix == ".yaml" or path.name == TEMPLATE):
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().rstrip("\n") == MARK


def committed_languages() -> list[str]:
    return sorted((HERE / "languages.txt").read_text(encoding="utf-8").split())


def _quoted(text: str) -> str:
    """A double-quoted YAML scalar, written as JSON, whose escapes are valid in YAML."""
    return json.dumps(text, ensure_ascii=False)


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("--tsv-dir", metavar="DIR", help="local data, <language>/{train,dev,test}.tsv; default: the hub")
    text = "folder to write; required with --tsv-dir, default: this script's folder"
    p.add_argument("--out", "--output", metavar="FOLDER", help=text)
    return p


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.tsv_dir is None:
        files = hub_files(committed_languages())
        write_beside(files, HERE) if args.out is None else write_folder(files, args.out)
    elif args.out is None:
        raise InputError("--tsv-dir needs --out: tasks on local files belong in a separate folder")
    else:
        files = tsv_files(args.tsv_dir)
        write_folder(files, args.out)
    cli.say(f"{args.out or HERE}: {len(files) - 2} tasks and the group {GROUP}")


if __name__ == "__main__":
    cli.run(main)
