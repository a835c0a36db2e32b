"""A swap as a complete model folder, written shard by shard in the layout of the target's files and read back."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from cpt_utils.base import cli, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import folders, formats, headers, tensors, tokenization, tokenizer_id
from cpt_utils.interventions import values
from cpt_utils.interventions.surgery import Edit, Pair, Recipe, identity

SCHEMA = "swap"
CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
)


def write_model(
    pair: Pair, recipe: Recipe, out: str | os.PathLike, run: str | os.PathLike | None = None, overwrite: bool = False
) -> dict:
    """Write C with the recipe's edits as a complete model folder; returns its record (the content of swap.json).

    If `out` already holds the finished swap of the same request, it is kept. An unfinished `<out>.partial` of ours is
    started again. Memory: the largest tensor plus about 100 MB, whatever the size of the models.

    Args:
        run: folder of the run, for tokenizer files that the checkpoint itself lacks.
        overwrite: redo and replace a finished swap. Folders with other content are still refused.

    Raises:
        InputError: `out` or its .partial holds something else, no space, damaged weights, a conversion that overflows.
    """
    out = Path(os.path.abspath(out))
    request = _request(pair, recipe, run)
    existing_record = _existing(out, request, overwrite)
    if existing_record is not None:
        cli.say(f"{out} exists already, from the same base, target and recipe: kept")
        return existing_record
    differing = pair.diff_tensors(recipe)
    if differing:
        named = "; ".join(f"{name} ({why})" for name, why in list(differing.items())[:4])
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        cli.once(f"base and target also differ outside the swap; the target's are kept: {named}{more}")
    side = _side_files(pair, run)
    edits = recipe.by_tensor()
    pair.base.fetch({edit.base_tensor for edit in recipe.edits})
    files, index = folders.layout_of(pair.target)
    parts = {file.name: folders.spans(file, _origins(pair, edits)) for file in files}
    size = sum(file.size for file in files)
    needed = size + sum(path.stat().st_size for path in side.values()) + (1 << 20)

    def contents(name: str) -> Iterator[memoryview]:
        return _contents(pair, name, edits)

    try:
        folders.remove_unfinished(out)
        folders.refuse_full_disk(out, needed)
        converted = values.say_conversions(pair, recipe)
        bar = cli.progress(desc=f"writing {out.name}", total=2 * size, unit="B")
        bar.unit_scale = True
        with folders.new_folder(out) as partial, bar:
            folders.write_files(_checked(pair, files, edits), parts, contents, partial, bar)
            for name, path in side.items():
                shutil.copyfile(path, partial / name)
            if pair.target_ref.is_adapter:  # its vocabulary may be larger than in the base's file, which was copied
                (partial / "config.json").write_text(json.dumps(pair.config, indent=2) + "\n", encoding="utf-8")
            if index is not None:
                (partial / formats.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            return _record(pair, recipe, request, partial, converted, differing)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"the disk is full: {out} needs {needed / 1e9:.2f} GB; nothing was left behind") from error
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error


def _request(pair: Pair, recipe: Recipe, run: str | os.PathLike | None) -> dict:
    """What two calls must have in common for the result of one to serve the other."""
    facts = {"base": identity(pair.base_ref), "target": identity(pair.target_ref)}
    facts["tokenizer"] = tokenizer_id.tokenizer_used(pair.target_ref, run, pair.base_ref)
    return json.loads(json.dumps(facts | {"recipe": recipe.facts, "edits": recipe.edits_digest}))


def _existing(out: Path, request: dict, overwrite: bool) -> dict | None:
    """The record of a finished swap that answers the request; None if `out` may be written.

    Raises:
        InputError: `out` holds anything else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / folders.RECORD).is_file():
        raise InputError(f"{out} holds something that these scripts did not write; choose another folder, or remove it")
    record, head = results.read_json(out / folders.RECORD, schema=SCHEMA)
    if not head:
        raise InputError(
            f"{out} holds a {folders.RECORD} that these scripts did not write; choose another folder, or remove it"
        )
    if overwrite:
        return None
    if record.get("request") != request:
        raise InputError(
            f"{out} holds another swap ({record.get('recipe')}, base {head['models']['base']['spec']}, target "
            f"{head['models']['target']['spec']}); choose another folder, remove it, or give --overwrite"
        )
    for name, size in record["files"].items():
        if not (out / name).is_file() or (out / name).stat().st_size != size:
            raise InputError(f"{out / name} was changed after the swap was written; remove {out}, or give --overwrite")
    return {results.HEADER: head, **record}


def refuse_foreign(out: Path, ours: re.Pattern, what: str, flag: str) -> None:
    """Refuse an `out` with files or folders whose names do not match `ours`, the names of `what`: a mistyped model
    folder, somebody's results. `flag` is the flag that chooses another folder."""
    foreign = [name for name in sorted(os.listdir(out)) if not ours.fullmatch(name)] if out.is_dir() else []
    if foreign or (out.exists() and not out.is_dir()):
        holds = f"holds {foreign[0]}, which does not belong to {what}" if foreign else "is a file"
        raise InputError(f"{out} {holds}; give another {flag}")


def _side_files(pair: Pair, run: str | os.PathLike | None) -> dict[str, Path]:
    """Configuration and tokenizer files to copy: name -> path."""
    config_folder = Path(pair.target_ref.config_folder())
    side_files = {name: config_folder / name for name in CONFIG_FILES if (config_folder / name).is_file()}
    if pair.config.get("auto_map"):  # copied for users of the model; nothing here runs it
        code = Path((pair.target_ref.adapted or pair.target_ref).folder(["*.py"]))
        side_files |= {path.name: path for path in sorted(code.glob("*.py"))}
    folder = Path(tokenization.tokenizer_folder(pair.target_ref, run, pair.base_ref))
    side_files |= {name: folder / name for name in formats.TOKENIZER_FILES if (folder / name).is_file()}
    return side_files


def _origins(pair: Pair, edits: dict[str, list[Edit]]) -> Callable:
    """For each tensor where its bytes are: in the target's file, in another file, or in none (to be computed)."""

    def origin(name: str, entry: headers.Entry) -> tuple[Path, int] | bool | None:
        if name not in edits and pair.target.kind == "safetensors":
            return True
        if name in edits and not _copies_bytes(pair, edits[name], entry):
            return None
        source, stored = (pair.base, edits[name][0].base_tensor) if name in edits else (pair.target, name)
        folder = source.folder_of(stored)  # for an adapter: the base's folder, for tensors that it does not change
        return (folder.path / folder.shard_of(stored), folder.entry(stored).start) if folder else None

    return origin


def _copies_bytes(pair: Pair, edits: list[Edit], entry: headers.Entry) -> bool:
    """Whether the tensor is B's, whole and unconverted: then its bytes are copied from file to file."""
    only = edits[0]
    whole = len(edits) == 1 and only.whole and only.function is None
    folder = pair.base.folder_of(only.base_tensor) if whole else None
    return folder is not None and folder.entry(only.base_tensor).dtype == entry.dtype


def _checked(pair: Pair, files: list[folders.WeightFile], edits: dict[str, list[Edit]]) -> Iterator[folders.WeightFile]:
    """Yields the files; before each, refuses NaN and infinity in the tensors that the kernel will copy from B."""
    for file in files:
        for name, entry in file.entries.items():
            if name in edits and _copies_bytes(pair, edits[name], entry):
                values.refuse_not_finite(pair, edits[name][0], pair.base.get(edits[name][0].base_tensor))
        yield file


def _contents(pair: Pair, name: str, edits: dict[str, list[Edit]]) -> Iterator[memoryview]:
    """The bytes of a tensor, block by block."""
    if name in edits:
        blocks = values.blocks(pair, name, edits[name])
    else:
        blocks = _target_blocks(pair.target, name)
    for block in blocks:
        yield memoryview(block.contiguous().view(-1).view(torch.uint8).numpy())


def _target_blocks(target: tensors.TensorFolder, name: str) -> Iterator[torch.Tensor]:
    shape = target.shape(name)
    if not shape:
        yield target.get(name).view(1)
        return
    row = math.prod(shape[1:]) * target.dtype(name).itemsize
    for start, stop in tensors.chunks(shape[0], row, values.BLOCK):
        yield target.rows(name, start, stop)


def _record(pair: Pair, recipe: Recipe, request: dict, partial: Path, changed: dict, differing: dict) -> dict:
    moved, total = pair.share(recipe)
    edited, written = len(recipe.by_tensor()), len(pair.target.names())
    names = sorted(name for name in os.listdir(partial) if name != folders.MARKER)
    payload = {
        "recipe": recipe.words,
        "request": request,
        "parameters_from_base": moved,
        "parameters": total,
        "from_base": [edit.describe() for edit in recipe.edits],
        "conversions": changed,
        "kept_though_unlike": differing,
        "verification": {"tensors_read_back_and_equal": written, "edited": edited, "as_target": written - edited},
        "files": {name: (partial / name).stat().st_size for name in names},
    }
    models = {"base": pair.base_ref.describe(), "target": pair.target_ref.describe()}
    head = results.header(SCHEMA, models=models, n_layers=pair.n_layers)
    results.write_json(partial / folders.RECORD, payload, head)
    return {results.HEADER: head, **payload}
