"""The tensors of a base with an adapter merged into it, computed when they are read.

    with opening.open_folder("run/checkpoint-90") as stored:         # adapter_config.json, adapter_model.safetensors
        weight = stored.get("model.layers.0.mlp.up_proj.weight")     # W_B + scale * B A, in the base's dtype

The result equals bit for bit what PEFT's `merge_and_unload().save_pretrained()` writes, in the base's dtype on disk:
B A and the sum in float32, then rounded; for embeddings the product is also rounded before it is added. scale is
alpha / r, or alpha / sqrt(r) with `use_rslora`. Tensors that were trained or saved whole (`modules_to_save`, biases,
rows of embeddings) replace those of the base, perhaps with another number of rows (an extended vocabulary).

If the base ties its output matrix to its embeddings, an addition to one is in both; if one was trained whole, the
output matrix becomes a separate tensor.
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

ROWS = 256  # rows merged at a time, from row 0 on: so a row has the same bits in every request
LOW_RANK = re.compile(
    r"(.+)\.(?:lora_(?P<side>[AB])\.weight|lora_embedding_(?P<embedding>[AB])|lora_B\.(?P<bias>bias))"
)


@dataclass(frozen=True)
class LowRank:
    """scale * B A, to be added to a weight; `flipped`: (B A)^T, for weights stored [in, out] and for embeddings.

    `rounded`: rounded to the weight's dtype before it is added, as for embeddings.
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
    """Rows to be replaced by those of `tensor`."""

    tensor: str
    rows: list[int]


@dataclass
class Change:
    """How a tensor changes: it starts as `base` (a name on disk), or as `start` in the adapter's file, and then the
    steps are applied in order."""

    base: str
    start: str | None = None
    steps: list[LowRank | Bias | Tokens] = field(default_factory=list)


class AdapterFolder(tensors.Closing):
    """The tensors of base and adapter merged, by the base's names on disk, with the interface of `TensorFolder`.

    A tensor that the adapter does not change is the base's, with its `entry` in the base's file (`folder_of`); one that
    it changes is computed, `ROWS` rows at a time, and has no entry.

    Attributes:
        changes: the changes to tensors, by name on disk; unchanged tensors are left out.
        new_head: name of the output matrix if the base ties it and the merged model does not; else empty.
    """

    kind = "adapter"
    quantised = None  # a quantised base is refused

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
                f"{self.spec} is an adapter of a quantised base. {error}; write its path into "
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
        """The base's folder if it holds a tensor's bytes; None for a tensor that is computed."""
        return None if name in self.changes else self.base

    def entry(self, name: str) -> headers.Entry:
        """The position of a tensor's bytes in the base's file.

        Raises:
            InputError: the adapter changes the tensor, so it is in no file.
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
        """The merged tensor. If the adapter does not change it, this is the base's: do not write into it."""
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
            stored = self.adapter.rows(change.start, first, last) if change.start else None
            block = self.base.rows(change.base, first, last) if stored is None else stored.to(dtype)
            for step in change.steps:
                block = self._after(step, block, first, last)
            low, high = max(first, start), min(last, stop)
            merged[low - start : high - start] = block[low - first : high - first]
        return merged

    def _after(self, step: LowRank | Bias | Tokens, block: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """`block` (rows `first` to `last`) after a step, in the same dtype."""
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

    # --- changes by the adapter ---

    def _plan(self) -> dict[str, Change]:
        """The changes by the adapter, by name on disk."""
        changes: dict[str, Change] = {}
        if self._is_tied and self.settings.unties(self.kin):
            self.new_head = self._head
            changes[self.new_head] = Change(self._disk_names[self._embedding])
        replaced = self.adapter.replaced()
        # If both of two tied matrices were saved and stay one, the embeddings come last and count.
        for name in sorted(replaced, key=lambda name: self._canonical(name) == self._embedding):
            if not name.endswith((".weight", ".bias")):
                raise InputError(
                    f"{self.spec}: the adapter's tensor {replaced[name]} is of a kind that is not merged here"
                )
            disk_name = self._disk_name(name)
            change = changes.setdefault(disk_name, Change(disk_name))
            new_shape, base_shape = self.adapter.shape(replaced[name]), self.base.shape(change.base)
            fits = new_shape[:1] == base_shape[:1] or disk_name in self._of_vocabulary
            self._refuse_shape(name, new_shape, base_shape, fits)
            change.start = replaced[name]
        steps = self._steps()
        # PEFT merges module by module, the output matrix last: if it is tied, after the embeddings.
        for name in sorted(steps, key=lambda name: self._canonical(name) == self._head):
            disk_name, step = self._disk_name(name), steps[name]
            change = changes.setdefault(disk_name, Change(disk_name))
            if change.start and ".base_layer." not in change.start:
                raise InputError(f"{self.spec}: the adapter changes {name} twice, by a product and as a whole")
            new_shape, base_shape = self._step_shape(step), self._shape_of(change)
            fits = new_shape[0] <= base_shape[0] if isinstance(step, Tokens) else new_shape[:1] == base_shape[:1]
            self._refuse_shape(name, new_shape, base_shape, fits)
            change.steps.append(step)
        self._refuse_gaps(replaced, steps)
        self._refuse_half(changes)
        self._warn_tied(changes)
        return changes

    def _steps(self) -> dict[str, LowRank | Bias | Tokens]:
        """The step for each tensor with a product, a bias or trained rows, by name in memory."""
        products: dict[str, dict[str, str]] = {}
        steps: dict[str, LowRank | Bias | Tokens] = {}
        for name in self.adapter.names():
            module = name.removeprefix(adapters.PREFIX)
            match = LOW_RANK.fullmatch(module)
            if match:
                products.setdefault(match[1], {})[match["side"] or match["embedding"] or "bias"] = name
            elif module.endswith(adapters.TOKENS):
                module = module.removesuffix(adapters.TOKENS)
                steps[f"{module}.weight"] = Tokens(name, self.settings.rows(module))
            elif ".lora_" in module:
                raise InputError(f"{self.spec}: the adapter's tensor {name} is of a kind that is not merged here")
        for module, names in products.items():
            if "A" not in names or "B" not in names:
                raise InputError(f"{self.spec}: the adapter holds only one of A and B of {module}; copy it again")
            if f"{module}.weight" in steps:
                raise InputError(f"{self.spec}: the adapter changes {module} twice, by a product and by rows")
            scale = self._scale(module, names)
            embedding = "lora_embedding" in names["A"]
            canonical = self._canonical(f"{module}.weight")
            flipped = embedding or (self.arch.transposed and self.arch.layer_of(canonical) is not None)
            steps[f"{module}.weight"] = LowRank(names["A"], names["B"], scale, flipped, rounded=embedding)
            if "bias" in names:
                steps[f"{module}.bias"] = Bias(names["bias"], scale)
        return steps

    def _scale(self, module: str, names: dict[str, str]) -> float:
        a, b = self.adapter.shape(names["A"]), self.adapter.shape(names["B"])
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            raise InputError(
                f"{self.spec}: A {list(a)} and B {list(b)} of {module} cannot be multiplied; copy it again"
            )
        return self.settings.scale(module, a[0])

    def _step_shape(self, step: LowRank | Bias | Tokens) -> tuple[int, ...]:
        """The shape of a tensor that the step fits; for trained rows, the smallest one."""
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

    def _refuse_shape(self, name: str, shape: tuple[int, ...], base_shape: tuple[int, ...], fits: bool) -> None:
        """Refuse a change whose shape differs from the tensor's. `fits`: whether the numbers of rows match."""
        alike = len(shape) == len(base_shape) and shape[1:] == base_shape[1:]
        if alike and fits:
            return
        hint = "is it an adapter of another base?"
        if alike and self._canonical(name) in (self._embedding, self._head):
            hint = "it does not hold the new rows: save it again with save_embedding_layers=True"
        raise InputError(
            f"{self.spec}: the adapter's change of {name} has shape {list(shape)}, and {self.base_ref.spec} has "
            f"{list(base_shape)}; {hint}"
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
        """The canonical name of `name` in memory, where it may be a name in the language model alone."""
        candidates = [arch.canonical(name) for arch in self.kin]
        return next((each for each in candidates if each in self._disk_names or each == self._head), candidates[0])

    def _disk_name(self, name: str) -> str:
        """The name on disk of `name` in memory; for a tied output matrix that of the embeddings."""
        canonical = self._canonical(name)
        if canonical == self._head and self._is_tied:
            return self.new_head or self._disk_names[self._embedding]
        if canonical not in self._disk_names:
            raise InputError(f"{self.spec}: the adapter changes {name}, which {self.base_ref.spec} does not have")
        return self._disk_names[canonical]

    # --- missing tensors ---

    def _refuse_half(self, changes: dict[str, Change]) -> None:
        """Refuse embeddings and an output matrix of different sizes: missing rows would be filled at random."""
        disk = {self._embedding: self._disk_names.get(self._embedding), self._head: self._disk_names.get(self._head)}
        disk[self._head] = disk[self._head] or self.new_head
        rows = {name: self._shape_of(changes.get(at, Change(at)))[0] for name, at in disk.items() if at}
        if len(set(rows.values())) > 1 and any(at in changes for at in disk.values()):
            sizes = " and ".join(f"{name} of {n} rows" for name, n in rows.items())
            raise InputError(
                f"{self.spec}: with the adapter the model has {sizes}; save both with it (modules_to_save)"
            )

    def _refuse_gaps(self, replaced: dict, steps: dict) -> None:
        """Refuse a file without any tensor for a module that the configuration names and the base has."""
        names = {*self.base.names(), self._head}
        for target in self.settings.targets:
            in_base = any(f".{name}".endswith(f".{target}.weight") for name in self.base.names())
            if in_base and not any(f".{name}".endswith(f".{target}.weight") for name in steps):
                raise InputError(f"{self.spec}: the adapter targets {target}, but its file holds no tensor of it")
        for end in self.settings.whole:
            in_base = any(f".{end}." in f".{name}" for name in names)
            if in_base and not any(f".{end}." in f".{name}" for name in replaced):
                raise InputError(f"{self.spec}: the adapter trained {end} whole, but its file holds no tensor of it")

    def _warn_tied(self, changes: dict[str, Change]) -> None:
        change = changes.get(self._disk_names.get(self._embedding)) if self._is_tied and not self.new_head else None
        if change and any(isinstance(step, LowRank) for step in change.steps):
            cli.once(
                f"{formats.run_of(self.spec)}: the base ties its output matrix to its embeddings; what the adapter "
                "adds to one is in both after merging, as after merge_and_unload: not exactly the trained model",
                cli.warn,
            )


def apply(model: torch.nn.Module, ref: refs.ModelRef) -> None:
    """Give a loaded base the weights of the merged model, as if that had been saved and loaded in the model's dtype."""
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
                raise InputError(f"{ref.spec}: an adapter cannot be merged into layers that are offloaded to disk")
            (parameter if location.index is None else parameter[location.index]).copy_(stored.get(disk))
    model.requires_grad_(False)


def _refuse_lost_rows(ref: refs.ModelRef, folder: Path, rows: int) -> None:
    """Refuse an adapter whose own tokenizer has more tokens than the merged embeddings have rows.

    PEFT leaves out the embeddings of a resized vocabulary if it is told to, or does not notice the resizing (models
    with a vision tower).
    """
    tokens = len(tokenization.open_tokenizer(folder)) if tokenization.has_tokenizer(folder) else 0
    if tokens > rows:
        raise InputError(
            f"{ref.spec}: its tokenizer has {tokens} tokens and the embeddings have {rows} rows; the rows of the new "
            "tokens are not in the adapter, save it again with save_embedding_layers=True"
        )


def _untie(model: torch.nn.Module) -> None:
    """Give an output matrix that is tied to the embeddings its own memory."""
    head = model.get_output_embeddings()
    device = getattr(getattr(head, "_hf_hook", None), "execution_device", None) or head.weight.device
    head.weight = torch.nn.Parameter(head.weight.to(device, copy=True))
    for values in (model.config, model.config.get_text_config()):
        values.tie_word_embeddings = False
