"""The tensors of an adapter and its base merged, computed when they are read.

    with opening.open_folder("run/checkpoint-90") as stored:         # adapter_config.json, adapter_model.safetensors
        weight = stored.get("model.layers.0.mlp.up_proj.weight")     # W_B + scale * B A, in the base's dtype

Bit for bit what PEFT's `merge_and_unload().save_pretrained()` leaves, in the dtype that the base has on disk: B A and
the sum in float32, then rounded; of embeddings the product is rounded before it is added, too. scale is alpha / r, or
alpha / sqrt(r) with `use_rslora`. What was trained whole (`modules_to_save`, biases, rows of embeddings), or was saved
whole, replaces what the base has, perhaps with another number of rows (an extended vocabulary).

Of a base that ties its output matrix to its embeddings, what is added to one is in both; where one was trained whole,
the output matrix is a tensor of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import adapters, formats, headers, refs, tensors, tokenization

ROWS = 256  # rows merged at a time, from row 0 on: a row has the same bits however it is asked for
LOW_RANK = re.compile(
    r"(.+)\.(?:lora_(?P<side>[AB])\.weight|lora_embedding_(?P<embedding>[AB])|lora_B\.(?P<bias>bias))"
)


@dataclass(frozen=True)
class LowRank:
    """scale * B A, to be added to a weight; `flipped`: (B A)^T, for weights stored [in, out] and for embeddings.

    `rounded`: to the weight's dtype before it is added, as of embeddings.
    """

    a: str
    b: str
    scale: float
    flipped: bool
    rounded: bool


@dataclass(frozen=True)
class Bias:
    """A tensor to be added, times `scale`."""

    tensor: str
    scale: float


@dataclass(frozen=True)
class Tokens:
    """Rows that are those of `tensor`."""

    tensor: str
    rows: list[int]


@dataclass
class Change:
    """What becomes of a tensor of the base: it starts as itself (`base`, on disk), or as `start` of the adapter's file,
    and then takes the steps in order."""

    base: str
    start: str | None = None
    steps: list[LowRank | Bias | Tokens] = field(default_factory=list)


class AdapterFolder(tensors.Closing):
    """The tensors of base and adapter merged, by the base's names on disk: what `TensorFolder` is for a model folder.

    A tensor that the adapter leaves alone is the base's own, with its `entry` in the base's file (`folder_of`); one
    that it changes is computed, `ROWS` rows at a time, and has none.

    Attributes:
        changes: by name on disk, what the adapter does to the tensors that it does not leave alone.
        new_head: name of the output matrix where the base ties it and the merged model does not; else empty.
    """

    kind = "adapter"
    quantised = None  # a base that is, is refused

    def __init__(self, ref: refs.ModelRef, base: refs.ModelRef | None = None, lazy: bool = False):
        self.ref, self.spec = ref, ref.spec
        self.path = Path(ref.folder(formats.ADAPTER_PATTERNS))
        self.settings = adapters.read_settings(self.path)
        self.base_ref = ref.adapted if ref.base or base is None else ref.with_base(base).adapted
        self.kin = archs.kin(self.base_ref.config())
        self.arch = self.kin[0]
        self.adapter = adapters.AdapterFile(self.path)
        try:
            self.base_ref.say_adapter_beside()
            self.base = tensors.TensorFolder(self.base_ref, lazy).refuse_unfit()
        except formats.Quantised as error:
            raise formats.Quantised(
                f"{self.spec} is an adapter of a quantised base. {error}; write where that is into "
                f"base_model_name_or_path of its {formats.ADAPTER_CONFIG}"
            ) from None
        self.files = self.base.files
        self.new_head = ""
        self.changes: dict[str, Change] = self._plan()

    def close(self) -> None:
        self.adapter.close()
        self.base.close()

    def __contains__(self, name: str) -> bool:
        return name in self.base or (name == self.new_head and bool(name))

    def names(self) -> list[str]:
        return [*self.base.names(), *([self.new_head] if self.new_head else [])]

    def shard_of(self, name: str) -> str:
        return self.base.shard_of(self.changes[name].base if name == self.new_head else name)

    def header(self, file: str) -> headers.Header:
        return self.base.header(file)

    def folder_of(self, name: str) -> tensors.TensorFolder | None:
        """The folder with a tensor's bytes, the base's; None for one that is computed."""
        return None if name in self.changes else self.base

    def entry(self, name: str) -> headers.Entry:
        """Where the bytes of a tensor are in the base's file.

        Raises:
            InputError: the adapter changes it, so that it is in no file.
        """
        if name in self.changes:
            raise InputError(f"{name} of {self.spec} is computed from an adapter and is in no file")
        return self.base.entry(name)

    def fetch(self, names=None) -> None:
        wanted = None if names is None else {self.changes[n].base if n in self.changes else n for n in names}
        self.base.fetch(wanted)

    def shape(self, name: str) -> tuple[int, ...]:
        change = self.changes.get(name)
        return self._shape_of(change) if change else self.base.shape(name)

    def _shape_of(self, change: Change) -> tuple[int, ...]:
        return self.adapter.shape(change.start) if change.start else self.base.shape(change.base)

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(self.changes[name].base if name in self.changes else name)

    def get(self, name: str) -> torch.Tensor:
        """The merged tensor. The base's own where the adapter leaves it alone: do not write into it."""
        change, shape = self.changes.get(name), self.shape(name)
        if change is None:
            return self.base.get(name)
        return self.rows(name, 0, shape[0]) if shape else self.adapter.get(change.start).to(self.dtype(name))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (first dimension) of the merged tensor, in the base's dtype."""
        change = self.changes.get(name)
        if change is None:
            return self.base.rows(name, start, stop)
        dtype, shape = self.dtype(name), self.shape(name)
        stop = min(stop, shape[0])
        merged = torch.empty((max(0, stop - start), *shape[1:]), dtype=dtype)
        for first in range(start - start % ROWS, stop, ROWS):
            last = min(first + ROWS, shape[0])
            found = self.adapter.rows(change.start, first, last) if change.start else None
            block = self.base.rows(change.base, first, last) if found is None else found.to(dtype)
            for step in change.steps:
                block = self._after(step, block, first, last)
            a, b = max(first, start), min(last, stop)
            merged[a - start : b - start] = block[a - first : b - first]
        return merged

    def _after(self, step: LowRank | Bias | Tokens, block: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` after a step, in their dtype."""
        if isinstance(step, Tokens):
            block = block.clone()
            for i, row in enumerate(step.rows):
                if first <= row < last:
                    block[row - first] = self.adapter.rows(step.tensor, i, i + 1)[0].to(block.dtype)
            return block
        if isinstance(step, Bias):
            added = self.adapter.rows(step.tensor, first, last).float() * step.scale
        else:
            a, b = self.adapter.get(step.a).float(), self.adapter.get(step.b).float()
            added = (a[:, first:last].T @ b.T if step.flipped else b[first:last] @ a) * step.scale
            added = added.to(block.dtype) if step.rounded else added
        wide = torch.promote_types(block.dtype, torch.float32)
        return (block.to(wide) + added).to(block.dtype)

    # --- what the adapter changes ---

    def _plan(self) -> dict[str, Change]:
        """What the adapter does to each tensor of the base."""
        found: dict[str, Change] = {}
        if self._is_tied and self.settings.unties(self.kin):
            self.new_head = self._head
            found[self.new_head] = Change(self._disk_names[self._embedding])
        whole = self.adapter.replaced()
        # Of two tied matrices that were both saved, and are one, that of the embeddings comes last and counts.
        for name in sorted(whole, key=lambda name: self._canonical(name) == self._embedding):
            if not name.endswith((".weight", ".bias")):
                raise InputError(
                    f"{self.spec}: the adapter's tensor {whole[name]} is of a kind that is not merged here"
                )
            disk = self._disk_name(name)
            change = found.setdefault(disk, Change(disk))
            mine, theirs = self.adapter.shape(whole[name]), self.base.shape(change.base)
            self._refuse_shape(name, mine, theirs, mine[:1] == theirs[:1] or disk in self._of_vocabulary)
            change.start = whole[name]
        steps = self._steps()
        # PEFT merges module by module, and the output matrix comes last: of a tied one, after the embeddings.
        for name in sorted(steps, key=lambda name: self._canonical(name) == self._head):
            disk, step = self._disk_name(name), steps[name]
            change = found.setdefault(disk, Change(disk))
            if change.start and ".base_layer." not in change.start:
                raise InputError(f"{self.spec}: the adapter changes {name} twice, by a product and as a whole")
            mine, theirs = self._step_shape(step), self._shape_of(change)
            fits = mine[0] <= theirs[0] if isinstance(step, Tokens) else mine[:1] == theirs[:1]
            self._refuse_shape(name, mine, theirs, fits)
            change.steps.append(step)
        self._refuse_gaps(whole, steps)
        self._refuse_half(found)
        self._warn_tied(found)
        return found

    def _steps(self) -> dict[str, LowRank | Bias | Tokens]:
        """What is added to which tensor, by names in memory."""
        products: dict[str, dict[str, str]] = {}
        found: dict[str, LowRank | Bias | Tokens] = {}
        for name in self.adapter.names():
            module = name.removeprefix(adapters.PREFIX)
            match = LOW_RANK.fullmatch(module)
            if match:
                products.setdefault(match[1], {})[match["side"] or match["embedding"] or "bias"] = name
            elif module.endswith(adapters.TOKENS):
                module = module.removesuffix(adapters.TOKENS)
                found[f"{module}.weight"] = Tokens(name, self.settings.rows(module))
            elif ".lora_" in module:
                raise InputError(f"{self.spec}: the adapter's tensor {name} is of a kind that is not merged here")
        for module, names in products.items():
            if "A" not in names or "B" not in names:
                raise InputError(f"{self.spec}: the adapter holds only one of A and B of {module}; copy it again")
            if f"{module}.weight" in found:
                raise InputError(f"{self.spec}: the adapter changes {module} twice, by a product and by rows")
            scale = self._scale(module, names)
            embedding = "lora_embedding" in names["A"]
            canonical = self._canonical(f"{module}.weight")
            flipped = embedding or (self.arch.transposed and self.arch.layer_of(canonical) is not None)
            found[f"{module}.weight"] = LowRank(names["A"], names["B"], scale, flipped, rounded=embedding)
            if "bias" in names:
                found[f"{module}.bias"] = Bias(names["bias"], scale)
        return found

    def _scale(self, module: str, names: dict[str, str]) -> float:
        a, b = self.adapter.shape(names["A"]), self.adapter.shape(names["B"])
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            raise InputError(
                f"{self.spec}: A {list(a)} and B {list(b)} of {module} cannot be multiplied; copy it again"
            )
        return self.settings.scale(module, a[0])

    def _step_shape(self, step: LowRank | Bias | Tokens) -> tuple[int, ...]:
        """The shape of a tensor that the step fits; of trained rows the smallest."""
        if isinstance(step, Bias):
            return self.adapter.shape(step.tensor)
        if isinstance(step, Tokens):
            n, *width = self.adapter.shape(step.tensor)
            if n != len(step.rows):
                raise InputError(
                    f"{self.spec}: {step.tensor} has {n} rows, and its configuration names {len(step.rows)}"
                )
            return (max(step.rows, default=0) + 1, *width)
        a, b = self.adapter.shape(step.a), self.adapter.shape(step.b)
        return (a[1], b[0]) if step.flipped else (b[0], a[1])

    def _refuse_shape(self, name: str, mine: tuple[int, ...], theirs: tuple[int, ...], fits: bool) -> None:
        """Refuse a change of another shape than the tensor's. `fits`: whether the numbers of rows do."""
        alike = len(mine) == len(theirs) and mine[1:] == theirs[1:]
        if alike and fits:
            return
        hint = "is it an adapter of another base?"
        if alike and self._canonical(name) in (self._embedding, self._head):
            hint = "it does not hold the new rows: save it again with save_embedding_layers=True"
        raise InputError(
            f"{self.spec}: the adapter's change of {name} has shape {list(mine)}, and {self.base_ref.spec} has "
            f"{list(theirs)}; {hint}"
        )

    # --- names ---

    @cached_property
    def _disk_names(self) -> dict[str, str]:
        return {self.arch.canonical(name): name for name in self.base.names()}

    @cached_property
    def _embedding(self) -> str:
        return f"{self.arch.embeddings[0]}.weight"

    @cached_property
    def _head(self) -> str:
        return f"{self.arch.head}.weight"

    @cached_property
    def _is_tied(self) -> bool:
        return self._head not in self._disk_names and self._embedding in self._disk_names

    @cached_property
    def _of_vocabulary(self) -> frozenset[str]:
        """Tensors with a row for each token, by their names on disk."""
        names = {self._embedding, self._head, f"{self.arch.head}.bias"}
        return frozenset({self._head, *(self._disk_names[name] for name in names if name in self._disk_names)})

    def _canonical(self, name: str) -> str:
        """The canonical name of what is called `name` in memory, perhaps in the memory of its language model alone."""
        found = [arch.canonical(name) for arch in self.kin]
        return next((each for each in found if each in self._disk_names or each == self._head), found[0])

    def _disk_name(self, name: str) -> str:
        """The name on disk of what is called `name` in memory; of a tied output matrix that of the embeddings."""
        canonical = self._canonical(name)
        if canonical == self._head and self._is_tied:
            return self.new_head or self._disk_names[self._embedding]
        if canonical not in self._disk_names:
            raise InputError(f"{self.spec}: the adapter changes {name}, which {self.base_ref.spec} does not have")
        return self._disk_names[canonical]

    # --- what is missing ---

    def _refuse_half(self, found: dict[str, Change]) -> None:
        """Refuse embeddings and an output matrix of different sizes: what is missing would be made up at random."""
        disk = {self._embedding: self._disk_names.get(self._embedding), self._head: self._disk_names.get(self._head)}
        disk[self._head] = disk[self._head] or self.new_head
        rows = {name: self._shape_of(found.get(at, Change(at)))[0] for name, at in disk.items() if at}
        if len(set(rows.values())) > 1 and any(at in found for at in disk.values()):
            sizes = " and ".join(f"{name} of {n} rows" for name, n in rows.items())
            raise InputError(
                f"{self.spec}: with the adapter the model has {sizes}; save both with it (modules_to_save)"
            )

    def _refuse_gaps(self, whole: dict, steps: dict) -> None:
        """What the configuration names, and the base has, must be in the file at least once."""
        names = {*self.base.names(), self._head}
        for target in self.settings.targets:
            there = any(f".{name}".endswith(f".{target}.weight") for name in self.base.names())
            if there and not any(f".{name}".endswith(f".{target}.weight") for name in steps):
                raise InputError(f"{self.spec}: the adapter targets {target}, but its file holds nothing of it")
        for end in self.settings.whole:
            there = any(f".{end}." in f".{name}" for name in names)
            if there and not any(f".{end}." in f".{name}" for name in whole):
                raise InputError(f"{self.spec}: the adapter trained {end} whole, but its file holds nothing of it")

    def _warn_tied(self, found: dict[str, Change]) -> None:
        both = found.get(self._disk_names.get(self._embedding)) if self._is_tied and not self.new_head else None
        if both and any(isinstance(step, LowRank) for step in both.steps):
            cli.once(
                f"{formats.run_of(self.spec)}: the base ties its output matrix to its embeddings; what the adapter "
                "adds to one is in both once merged, as after merge_and_unload: not quite the model that was trained",
                cli.warn,
            )


def apply(model: torch.nn.Module, ref: refs.ModelRef) -> None:
    """Give a loaded base the weights of the merged model, as if it had been saved and loaded in the model's dtype."""
    with AdapterFolder(ref) as stored, torch.no_grad():
        rows = stored.adapter.vocabulary(stored.kin)
        if rows and model.get_input_embeddings().weight.shape[0] != rows:
            model.resize_token_embeddings(rows, mean_resizing=False)
        _refuse_lost_rows(ref, stored.path, model.get_input_embeddings().weight.shape[0])
        if stored.new_head:
            _untie(model)
        for disk, location in stored.arch.locations(stored.changes, model).items():
            parameter = model.get_parameter(location.name)
            if parameter.is_meta:
                raise InputError(f"{ref.spec}: an adapter cannot be merged into layers that are kept on the disk")
            (parameter if location.index is None else parameter[location.index]).copy_(stored.get(disk))
    model.requires_grad_(False)


def _refuse_lost_rows(ref: refs.ModelRef, folder: Path, rows: int) -> None:
    """Refuse an adapter whose own tokenizer has more tokens than the merged embeddings have rows.

    PEFT leaves the embeddings of a resized vocabulary out where it is told to, or does not notice (of models with a
    vision tower).
    """
    tokens = len(tokenization.open_tokenizer(folder)) if tokenization.has_tokenizer(folder) else 0
    if tokens > rows:
        raise InputError(
            f"{ref.spec}: its tokenizer has {tokens} tokens and the embeddings have {rows} rows; those of the new "
            "tokens are not in the adapter, save it again with save_embedding_layers=True"
        )


def _untie(model: torch.nn.Module) -> None:
    """Give the output matrix, which was that of the embeddings, memory of its own."""
    head = model.get_output_embeddings()
    device = getattr(getattr(head, "_hf_hook", None), "execution_device", None) or head.weight.device
    head.weight = torch.nn.Parameter(head.weight.to(device, copy=True))
    for values in (model.config, model.config.get_text_config()):
        values.tie_word_embeddings = False
