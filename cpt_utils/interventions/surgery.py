"""One engine for every checkpoint made from two: base B, target C, and for each tensor, or region of one, its source.

    pair = Pair(refs.model("build/base"), refs.model("build/run/checkpoint-90"))
    recipe = layers_from_base(pair, [2, 3])
    write_model(pair, recipe, "build/swapped")                    # a complete model folder, verified
    with apply_in_memory(model_of_C, recipe, pair): ...            # the same numbers, nothing written

A `Recipe` is a list of `Edit`s on C. An edit takes B's values, or what a function makes of both (interpolation,
low-rank deltas). B's values are converted to the dtype that C has on disk. Everything not edited is C's, bit for bit.
Writing goes shard by shard along C's own files; `folders` does that part.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_utils.architectures import archs
from cpt_utils.base import cli, results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import folders, opening, refs, settings, stacking, tensors, tokenization, tokenizer_id

if TYPE_CHECKING:
    import torch
    from torch import nn

SCHEMA = "swap"
CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
)
BLOCK = 32 << 20  # bytes of a tensor worked on at a time
Function = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Edit:
    """One tensor of the result, or a region of it, that is not C's own.

    Attributes:
        tensor, base_tensor: its name on disk in C and in B.
        dim, index: the region, entries `index` along `dim`: None (everything), a slice, or a LongTensor of positions.
        expert: of a tensor that holds all experts the one whose matrix the region is in; None of all others.
        function: (B's region, C's region) -> the new values; None takes B's values.
        by_rows: the function may be applied to blocks of rows (elementwise functions), which bounds the memory.
    """

    tensor: str
    base_tensor: str
    dim: int = 0
    index: slice | torch.Tensor | None = None
    function: Function | None = None
    by_rows: bool = False
    expert: int | None = None

    @property
    def whole(self) -> bool:
        """Whether the region is the whole tensor."""
        return self.index is None and self.expert is None

    def describe(self) -> dict:
        """The edit in JSON: tensor, region as ranges of positions, and whether a function is involved."""
        facts: dict = {"tensor": self.tensor}
        if self.base_tensor != self.tensor:
            facts["base_tensor"] = self.base_tensor
        if self.expert is not None:
            facts["expert"] = self.expert
        if self.index is not None:
            facts |= {"dim": self.dim, "ranges": _ranges(self.index)}
        if self.function is not None:
            facts["function"] = getattr(self.function, "__name__", type(self.function).__name__)
        return facts


@dataclass(frozen=True)
class Recipe:
    """What is made: in words for people, in `facts` for comparing requests, in `edits` for the engine."""

    words: str
    facts: dict
    edits: tuple[Edit, ...]

    def by_tensor(self) -> dict[str, list[Edit]]:
        grouped: dict[str, list[Edit]] = {}
        for edit in self.edits:
            grouped.setdefault(edit.tensor, []).append(edit)
        return grouped


class Pair:
    """Base and target opened side by side: one architecture (one of them may have a vision tower beside it), the same
    number of layers.

    Raises:
        InputError: unknown architecture, different architectures or layer counts, missing or damaged weights.
    """

    def __init__(self, base: refs.ModelRef | str | os.PathLike, target: refs.ModelRef | str | os.PathLike):
        self.base_ref = base if isinstance(base, refs.ModelRef) else refs.model(base)
        self.target_ref = target if isinstance(target, refs.ModelRef) else refs.model(target)
        self.config = self.target_ref.config()
        base_config = self.base_ref.config()
        self.arch, self.base_arch = archs.for_config(self.config), archs.for_config(base_config)
        if archs.text_type(base_config) != archs.text_type(self.config):
            raise InputError(
                f"{self.base_ref.spec} is a {self.base_arch.model_type} and {self.target_ref.spec} a "
                f"{self.arch.model_type}; base and target must be one architecture"
            )
        self.n_layers = self.arch.n_layers(self.config)
        if self.base_arch.n_layers(base_config) != self.n_layers:
            raise InputError(
                f"{self.base_ref.spec} has {self.base_arch.n_layers(base_config)} layers and {self.target_ref.spec} "
                f"{self.n_layers}; base and target must have the same"
            )
        self.target = opening.open_folder(self.target_ref, self.base_ref)
        self.base = opening.open_folder(self.base_ref, lazy=True)  # of a hub model only the shards that are swapped
        of_target = (self.target, self.arch, self.config)
        self.base = stacking.like(self.base, self.base_arch, base_config, *of_target)
        self._layer_edits: dict[int, list[Edit]] = {}
        self._base_names = {archs.meaning(self.base_arch, name): name for name in self.base.names()}
        settings.say_head(self.target, self.config)
        settings.say_own_code(self.target_ref.spec, self.config)
        differ = settings.unlike(self.base_ref, self.target_ref)
        if differ:
            each = [f"{key} is {theirs} in the base and {mine} in the target" for key, (theirs, mine) in differ.items()]
            cli.once(f"{'; '.join(each)}; swapped weights run under the target's", cli.warn)

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.base.close()
        self.target.close()

    def base_name(self, target_name: str) -> str:
        """What the target's tensor is called in the base; the head of a base that ties it is its embeddings."""
        meaning = archs.meaning(self.arch, target_name)
        found = self._base_names.get(meaning)
        if found is None and meaning == "lm_head.weight" and settings.tied(self.base_ref.config()):
            found = self._base_names.get(f"{self.arch.embeddings[0]}.weight")
        if found is None:
            raise InputError(f"{self.base_ref.spec} has no tensor {target_name}, which {self.target_ref.spec} has")
        return found

    def edit(
        self, tensor: str, dim: int = 0, index=None, function: Function | None = None, by_rows=False, expert=None
    ) -> Edit:
        """An edit of the target's `tensor` from the base's tensor of the same meaning, shapes checked."""
        edit = Edit(tensor, self.base_name(tensor), dim, index, function, by_rows, expert)
        mine, theirs = self.target.shape(tensor), self.base.shape(edit.base_tensor)
        fits = mine == theirs
        if not fits and isinstance(index, slice) and len(mine) == len(theirs):  # e.g. the embeddings both have
            sizes = enumerate(zip(mine, theirs, strict=True))
            fits = all(a == b or (d == dim and index.stop <= min(a, b)) for d, (a, b) in sizes)
        if not fits:
            raise InputError(
                f"{tensor} has shape {list(theirs)} in {self.base_ref.spec} and {list(mine)} in "
                f"{self.target_ref.spec}; what is swapped must agree in shape"
            )
        return edit

    def layer_edits(self, layer: int) -> list[Edit]:
        """Edits that put the whole layer of the base in place; made once, because controls ask for hundreds of sets."""
        if layer not in self._layer_edits:
            mine = self.arch.layer_tensors(self.target.names(), layer)
            meanings = {archs.meaning(self.arch, name) for name in mine}
            for name in self.base_arch.layer_tensors(self.base.names(), layer):
                if archs.meaning(self.base_arch, name) not in meanings and not self.base_arch.may_lack(name):
                    raise InputError(f"{self.target_ref.spec} has no tensor {name}, which {self.base_ref.spec} has")
            held = [n for n in mine if archs.meaning(self.arch, n) in self._base_names or not self.arch.may_lack(n)]
            self._layer_edits[layer] = [self.edit(name) for name in held]
        return self._layer_edits[layer]

    def unlike(self, recipe: Recipe) -> dict[str, str]:
        """Tensors outside the recipe that differ in shape, or that only one model has: name -> why."""
        edited, found = {edit.tensor for edit in recipe.edits}, {}
        canonical = {archs.meaning(self.arch, name): name for name in self.target.names()}
        for meaning, name in canonical.items():
            theirs = self._base_names.get(meaning)
            if name in edited or archs.is_buffer(name):
                continue
            if theirs is None:
                found[name] = "not in the base"
            elif self.base.shape(theirs) != self.target.shape(name):
                found[name] = (
                    f"{list(self.base.shape(theirs))} in the base, {list(self.target.shape(name))} in the target"
                )
        for meaning, name in self._base_names.items():
            if meaning not in canonical and not archs.is_buffer(name):
                found[name] = "not in the target"
        return found

    def share(self, recipe: Recipe) -> tuple[int, int]:
        """(parameters that the recipe moves, parameters of the target on disk)."""
        total = sum(tensors.numel(self.target.shape(name)) for name in self.target.names() if not archs.is_buffer(name))
        moved = 0
        for edit in recipe.edits:
            shape = list(self.target.shape(edit.tensor))[0 if edit.expert is None else 1 :]
            if isinstance(edit.index, slice):
                shape[edit.dim] = len(range(*edit.index.indices(shape[edit.dim])))
            elif edit.index is not None:
                shape[edit.dim] = len(edit.index)
            moved += tensors.numel(shape)
        return moved, total


# --- recipes ---


def layers_from_base(pair: Pair, layers: Iterable[int]) -> Recipe:
    """Whole layers of B: projections, biases and norms.

    Raises:
        InputError: a layer the models do not have, shapes that differ, or a tensor that only one of them has.
    """
    layers = _checked_layers(layers, pair.n_layers)
    edits = [edit for layer in layers for edit in pair.layer_edits(layer)]
    return Recipe(f"layers {_listed(layers)} of the base", {"layers": layers}, tuple(edits))


def parts_from_base(pair: Pair, projections: Iterable[str], layers: Iterable[int]) -> Recipe:
    """The given projections of B, weights and biases, in `layers`; of a fused tensor only their slice.

    The router of a mixture of experts may be among them (archs.ROUTER). A layer that has none of a projection (no
    router, no attention, no FFN) has nothing of it to swap.
    """
    layers = _checked_layers(layers, pair.n_layers)
    wanted = [name for name in (*pair.arch.projections(pair.config), archs.ROUTER) if name in set(projections)]
    names = set(pair.target.names())
    edits = [
        pair.edit(part.tensor, part.dim, part.index, expert=part.expert)
        for layer in layers
        for projection in _those_of(pair, layer, wanted)
        for part in pair.arch.parts(pair.config, layer, projection, names, pair.target.shape)
    ]
    words = f"{', '.join(wanted)} of the base in layers {_listed(layers)}"
    return Recipe(words, {"projections": wanted, "layers": layers}, tuple(edits))


def _those_of(pair: Pair, layer: int, wanted: Iterable[str]) -> list[str]:
    """The wanted projections that a layer has."""
    there = {*pair.arch.projections(pair.config, layer), *[archs.ROUTER] * pair.arch.has_router(pair.config, layer)}
    return [name for name in wanted if name in there]


def tensors_from_base(pair: Pair, names: Iterable[str]) -> Recipe:
    """Whole tensors of B by the target's names on disk."""
    names = list(names)
    return Recipe(f"{', '.join(names)} of the base", {"tensors": names}, tuple(pair.edit(name) for name in names))


def _checked_layers(layers: Iterable[int], n_layers: int) -> list[int]:
    found = sorted(set(layers))
    wrong = [layer for layer in found if not 0 <= layer < n_layers]
    if wrong:
        raise InputError(f"layer {wrong[0]} does not exist: the model has layers 0 to {n_layers - 1}")
    return found


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


# --- values ---


def _blocks(pair: Pair, name: str, edits: list[Edit]) -> Iterator[torch.Tensor]:
    """The edited tensor in order, in blocks of rows, in the dtype that C has on disk.

    Raises:
        InputError: NaN or infinity in what is taken from B, or a value beyond the range of C's dtype.
    """
    flat = _rows(pair.target.get(name))
    rows = flat.shape[0]
    whole = any(edit.function is not None and not edit.by_rows for edit in edits)
    for start, stop in [(0, rows)] if whole else tensors.chunks(rows, flat[:1].nbytes, BLOCK):
        if len(edits) == 1 and edits[0].whole:
            yield _values(pair, edits[0], flat, start, stop)
            continue
        block = flat[start:stop].clone()
        for edit in edits:
            _fill(pair, edit, flat, block, start, stop)
        yield block


def _values(pair: Pair, edit: Edit, target: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows `start` to `stop` of a tensor that is edited as a whole."""
    base = pair.base.get(edit.base_tensor).reshape(target.shape)[start:stop]
    return _converted(pair, edit, base, target[start:stop], target.dtype)


def _fill(pair: Pair, edit: Edit, target: torch.Tensor, block: torch.Tensor, start: int, stop: int) -> None:
    """Write the edit's values into `block`, which holds rows `start` to `stop`."""
    import torch

    base = pair.base.get(edit.base_tensor)
    if edit.expert is not None:
        if start <= edit.expert < stop:
            matrices = (archs.take(held, edit.dim, edit.index) for held in (base[edit.expert], target[edit.expert]))
            own = archs.take(block[edit.expert - start], edit.dim, edit.index)
            own.copy_(_converted(pair, edit, *matrices, block.dtype))
        return
    positions = slice(0, target.shape[edit.dim]) if edit.index is None else edit.index
    if edit.dim > 0:
        base, target = base[start:stop], target[start:stop]
        here = there = positions
    elif isinstance(positions, slice):
        first, last = max(positions.start, start), min(positions.stop, stop)
        if first >= last:
            return
        here, there = slice(first - start, last - start), slice(first, last)
    else:
        there = positions[(positions >= start) & (positions < stop)]
        if not len(there):
            return
        here = there - start
    values = _converted(pair, edit, archs.take(base, edit.dim, there), archs.take(target, edit.dim, there), block.dtype)
    if isinstance(here, slice):
        block.narrow(edit.dim, here.start, here.stop - here.start).copy_(values)
    else:
        block.index_copy_(edit.dim, here.to(torch.long), values)


def _converted(pair: Pair, edit: Edit, base: torch.Tensor, target: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    _refuse_not_finite(pair, edit, base)
    values = base
    if edit.function is not None:
        values = edit.function(base, target)
        if values.shape != target.shape or not tensors.is_finite(values):
            raise InputError(f"{edit.tensor}: {edit.describe()['function']} gave NaN, infinity or another shape")
    if values.dtype != dtype:
        wide, values = values, values.to(dtype)
        if not tensors.is_finite(values):
            raise InputError(
                f"{edit.tensor}: values up to {float(wide.abs().max()):.4g} do not fit into {_name(dtype)}, the dtype "
                f"of {pair.target_ref.spec}; save the target in bfloat16 or float32 first"
            )
    return values


def _refuse_not_finite(pair: Pair, edit: Edit, base: torch.Tensor) -> None:
    if not tensors.is_finite(base):
        raise InputError(
            f"{pair.base_ref.spec}: {edit.base_tensor} holds NaN or infinity; copy the model again, or train it anew"
        )


def conversions(pair: Pair, recipe: Recipe) -> dict[str, int]:
    """Dtype changes that the recipe needs: "float16 -> bfloat16" and the number of tensors."""
    found: dict[str, int] = {}
    for name, edits in recipe.by_tensor().items():
        mine = pair.target.dtype(name)
        for theirs in {pair.base.dtype(edit.base_tensor) for edit in edits} - {mine}:
            key = f"{_name(theirs)} -> {_name(mine)}"
            found[key] = found.get(key, 0) + 1
    return found


def say_conversions(pair: Pair, recipe: Recipe) -> dict[str, int]:
    """Print dtype changes in one line; returns them."""
    found = conversions(pair, recipe)
    if found:
        changes = ", ".join(f"{change} ({count} tensors)" for change, count in found.items())
        cli.say(f"the base's tensors are converted to the dtype of the target: {changes}")
    return found


# --- on disk ---


def write_model(
    pair: Pair, recipe: Recipe, out: str | os.PathLike, run: str | os.PathLike | None = None, overwrite: bool = False
) -> dict:
    """Write C with the recipe's edits as a complete model folder; returns its record (the content of swap.json).

    An `out` that holds the same request, finished, is kept. An unfinished `<out>.partial` of ours is started again.
    Memory: about 100 MB beside the largest tensor, whatever the size of the models.

    Args:
        run: folder of the run, for tokenizer files that the checkpoint itself lacks.
        overwrite: redo and replace a finished swap. Folders with other content are refused all the same.

    Raises:
        InputError: `out` or its .partial holds something else, no space, damaged weights, a conversion that overflows.
    """
    out = Path(os.path.abspath(out))
    request = _request(pair, recipe, run)
    found = _existing(out, request, overwrite)
    if found is not None:
        cli.say(f"{out} is there already, from the same base, target and recipe: kept")
        return found
    unlike = pair.unlike(recipe)
    if unlike:
        named = "; ".join(f"{name} ({why})" for name, why in list(unlike.items())[:4])
        more = f" and {len(unlike) - 4} more" if len(unlike) > 4 else ""
        cli.once(f"outside the swap base and target differ; the target's are kept: {named}{more}")
    side = _side_files(pair, run)
    edits = recipe.by_tensor()
    pair.base.fetch({edit.base_tensor for edit in recipe.edits})
    files, index = folders.layout_of(pair.target)
    parts = {file.name: folders.spans(file, _places(pair, edits)) for file in files}
    size = sum(file.size for file in files)
    needed = size + sum(path.stat().st_size for path in side.values()) + (1 << 20)

    def contents(name: str) -> Iterator[memoryview]:
        return _contents(pair, name, edits)

    try:
        folders.remove_unfinished(out)
        folders.refuse_full_disk(out, needed)
        changed = say_conversions(pair, recipe)
        bar = cli.progress(desc=f"writing {out.name}", total=2 * size, unit="B")
        bar.unit_scale = True
        with folders.new_folder(out) as partial, bar:
            folders.write_files(_checked(pair, files, edits), parts, contents, partial, bar)
            for name, path in side.items():
                shutil.copyfile(path, partial / name)
            if pair.target_ref.is_adapter:  # its vocabulary may be larger than that of the base whose file was copied
                (partial / "config.json").write_text(json.dumps(pair.config, indent=2) + "\n", encoding="utf-8")
            if index is not None:
                (partial / tensors.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            return _record(pair, recipe, request, partial, changed, unlike)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"the disk is full: {out} needs {needed / 1e9:.2f} GB; nothing was left behind") from error
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error


def _request(pair: Pair, recipe: Recipe, run: str | os.PathLike | None) -> dict:
    """What two calls must share for one's result to serve the other."""
    home = os.fspath(run) if run else None
    described = [edit.describe() for edit in recipe.edits]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    facts = {"base": identity(pair.base_ref), "target": identity(pair.target_ref)}
    facts["tokenizer"] = tokenizer_id.tokenizer_used(pair.target_ref, home, pair.base_ref)
    return json.loads(json.dumps(facts | {"recipe": recipe.facts, "edits": digest}))


def identity(ref: refs.ModelRef) -> str:
    """The model, not its path, which may be spelled in several ways: weights, configuration, own tokenizer."""
    facts = ref.describe()
    if facts.get("weights_sample"):
        folder = Path(ref.spec)
        tokenizer = tokenizer_id.of(folder) if tokenization.has_tokenizer(folder) else None
        return "-".join(str(fact) for fact in (facts["weights_sample"], facts.get("config_sha256"), tokenizer))
    own = f"{ref.repository}@{facts.get('revision') or ref.revision or 'main'}/{ref.subfolder}".rstrip("/")
    return f"{own}+{identity(ref.adapted)}" if ref.is_adapter else own


def _existing(out: Path, request: dict, overwrite: bool) -> dict | None:
    """The record of a finished swap that serves the request; None when `out` is free to be written.

    Raises:
        InputError: `out` holds anything else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / folders.RECORD).is_file():
        raise InputError(f"{out} holds something that this collection did not write; choose another place or remove it")
    record, head = results.read_json(out / folders.RECORD, schema=SCHEMA)
    if not head:
        raise InputError(f"{out} holds a {folders.RECORD} that is not ours; choose another place or remove it")
    if overwrite:
        return None
    if record.get("request") != request:
        raise InputError(
            f"{out} holds another swap ({record.get('recipe')}, base {head['models']['base']['spec']}, target "
            f"{head['models']['target']['spec']}); choose another place, remove it, or give --overwrite"
        )
    for name, size in record["files"].items():
        if not (out / name).is_file() or (out / name).stat().st_size != size:
            raise InputError(f"{out / name} was changed after the swap was written; remove {out}, or give --overwrite")
    return {results.HEADER: head, **record}


def _side_files(pair: Pair, run: str | os.PathLike | None) -> dict[str, Path]:
    """Configuration and tokenizer files to copy: name -> path."""
    own = Path(pair.target_ref.config_folder())
    found = {name: own / name for name in CONFIG_FILES if (own / name).is_file()}
    if pair.config.get("auto_map"):  # for those who run it; nothing here does
        code = Path((pair.target_ref.adapted or pair.target_ref).folder(["*.py"]))
        found |= {path.name: path for path in sorted(code.glob("*.py"))}
    folder = Path(tokenization.tokenizer_folder(pair.target_ref, os.fspath(run) if run else None, pair.base_ref))
    found |= {name: folder / name for name in refs.TOKENIZER_FILES if (folder / name).is_file()}
    return found


def _places(pair: Pair, edits: dict[str, list[Edit]]) -> Callable:
    """Where each tensor's bytes are: in the target's file, in another one, or nowhere as such."""

    def place(name: str, entry: tensors.Entry) -> tuple[Path, int] | bool | None:
        if name not in edits and pair.target.kind == "safetensors":
            return True
        if name in edits and not _copies_bytes(pair, edits[name], entry):
            return None
        source, stored = (pair.base, edits[name][0].base_tensor) if name in edits else (pair.target, name)
        folder = source.folder_of(stored)  # of an adapter's own tensors the base's, if it leaves them alone
        return (folder.path / folder.shard_of(stored), folder.entry(stored).start) if folder else None

    return place


def _copies_bytes(pair: Pair, edits: list[Edit], entry: tensors.Entry) -> bool:
    """Whether the tensor is B's, whole and unconverted: then its bytes go from file to file."""
    only = edits[0]
    whole = len(edits) == 1 and only.whole and only.function is None
    folder = pair.base.folder_of(only.base_tensor) if whole else None
    return folder is not None and folder.entry(only.base_tensor).dtype == entry.dtype


def _checked(pair: Pair, files: list[folders.WeightFile], edits: dict[str, list[Edit]]) -> Iterator[folders.WeightFile]:
    """The files; before each one, NaN and infinity are refused in the tensors that the kernel will copy from B."""
    for file in files:
        for name, entry in file.entries.items():
            if name in edits and _copies_bytes(pair, edits[name], entry):
                _refuse_not_finite(pair, edits[name][0], pair.base.get(edits[name][0].base_tensor))
        yield file


def _contents(pair: Pair, name: str, edits: dict[str, list[Edit]]) -> Iterator[memoryview]:
    """The bytes of a tensor, block by block."""
    import torch

    if name in edits:
        blocks = _blocks(pair, name, edits[name])
    else:
        blocks = _own_blocks(pair.target, name)
    for block in blocks:
        yield memoryview(block.contiguous().view(-1).view(torch.uint8).numpy())


def _own_blocks(target: tensors.TensorFolder, name: str) -> Iterator[torch.Tensor]:
    shape = target.shape(name)
    if not shape:
        yield target.get(name).view(1)
        return
    row = tensors.numel(shape[1:]) * target.dtype(name).itemsize
    for start, stop in tensors.chunks(shape[0], row, BLOCK):
        yield target.rows(name, start, stop)


def _record(pair: Pair, recipe: Recipe, request: dict, partial: Path, changed: dict, unlike: dict) -> dict:
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
        "kept_though_unlike": unlike,
        "verification": {"tensors_read_back_and_equal": written, "edited": edited, "as_target": written - edited},
        "files": {name: (partial / name).stat().st_size for name in names},
    }
    models = {"base": pair.base_ref.describe(), "target": pair.target_ref.describe()}
    head = results.header(SCHEMA, models=models, n_layers=pair.n_layers)
    results.write_json(partial / folders.RECORD, payload, head)
    return {results.HEADER: head, **payload}


# --- in memory ---


@dataclass
class Swapper:
    """Applies recipes to a loaded model of C, with exactly the numbers that the written folder would have.

    A swap puts other tensors in the place of the model's and the model's own back at the end, so leaving it restores
    every bit and costs nothing. What was computed for one recipe is kept for the next ones up to `cache_bytes`.
    Where several tensors on disk are one in memory (experts), the swap works on a copy of that one.
    """

    model: nn.Module
    pair: Pair
    cache_bytes: int = 4 << 30
    _cache: OrderedDict = field(default_factory=OrderedDict, repr=False)

    @contextlib.contextmanager
    def applied(self, recipe: Recipe) -> Iterator[nn.Module]:
        """The model with the recipe's edits, until the block ends (also by an exception)."""
        grouped = recipe.by_tensor()
        places = self.pair.arch.module_places(grouped, self.model, self.pair.target.shape)
        replaced: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # id -> (tensor, its own values)
        self._refuse_untying(set(grouped))
        try:
            for name, edits in grouped.items():
                place = places[name]
                held = _held(self.model, place.name)
                again = id(held) in replaced  # a head that is tied to the embeddings
                held, own = replaced.setdefault(id(held), (held, held.data))
                if place.whole:
                    values = self._values(name, edits, own)
                    if again and not values.equal(held.data):
                        raise InputError(_untied(self.pair.base_ref, name))
                    held.data = values
                    continue
                values = self._values(name, edits, place.view(own))
                if held.data_ptr() == own.data_ptr():
                    held.data = own.clone()
                place.view(held.data).copy_(values)
            yield self.model
        finally:
            for held, own in replaced.values():
                held.data = own

    def _refuse_untying(self, edited: set[str]) -> None:
        """Refuse an edit of one of two tensors on disk that are one in memory: the written folder would have two."""
        names = self.pair.arch.embedding_tensors(self.pair.target.names())
        if edited.isdisjoint(names):
            return
        together: dict[int, set[str]] = {}
        for name, place in self.pair.arch.module_places(names, self.model, self.pair.target.shape).items():
            together.setdefault(id(_held(self.model, place.name)), set()).add(name)
        for group in together.values():
            if edited & group and group - edited:
                raise InputError(_untied(self.pair.target_ref, min(group - edited)))

    def _values(self, name: str, edits: list[Edit], own: torch.Tensor) -> torch.Tensor:
        key = (name, own.dtype, str(own.device), json.dumps([edit.describe() for edit in edits]))
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        values = _in_memory(self.pair, name, edits, own)
        if all(edit.function is None for edit in edits) and values.nbytes <= self.cache_bytes:
            self._cache[key] = values
            while sum(held.nbytes for held in self._cache.values()) > self.cache_bytes:
                self._cache.popitem(last=False)
        return values


def _untied(ref: refs.ModelRef, name: str) -> str:
    return (
        f"{name} of {ref.spec} would differ from the embeddings that it is tied to in memory; write the swap as a "
        "folder, which loaders then do not tie"
    )


def _held(model: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer of a dotted name."""
    module, _, last = name.rpartition(".")
    return getattr(model.get_submodule(module), last)


def _in_memory(pair: Pair, name: str, edits: list[Edit], own: torch.Tensor) -> torch.Tensor:
    """The edited tensor as the model, which holds `own` in its place, would have loaded it from the written folder."""
    import torch

    shape = pair.target.shape(name)
    if tuple(own.shape) != tuple(shape):
        raise InputError(
            f"{name} is {list(shape)} in {pair.target_ref.spec} and {list(own.shape)} in the loaded model; "
            "load the target itself"
        )
    values = torch.empty(shape, dtype=own.dtype, device=own.device)
    flat, position = _rows(values), 0
    for block in _blocks(pair, name, edits):
        flat[position : position + block.shape[0]].copy_(block)
        position += block.shape[0]
    return values


@contextlib.contextmanager
def apply_in_memory(model: nn.Module, recipe: Recipe, pair: Pair) -> Iterator[nn.Module]:
    """One recipe on a loaded model of C; see `Swapper` for many."""
    with Swapper(model, pair, cache_bytes=0).applied(recipe):
        yield model


# --- small things ---


def _ranges(index: slice | torch.Tensor) -> list[list[int]]:
    """Positions as [start, stop] ranges in order, or one [start, stop, step]."""
    if isinstance(index, slice):
        return [[index.start, index.stop]] if index.step in (None, 1) else [[index.start, index.stop, index.step]]
    found: list[list[int]] = []
    for position in index.tolist():
        if found and found[-1][1] == position:
            found[-1][1] += 1
        else:
            found.append([position, position + 1])
    return found


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with at least one dimension, so that it has rows."""
    return tensor.view(1) if tensor.dim() == 0 else tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
