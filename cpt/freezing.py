"""Keep a part of a model exactly unchanged in training: whole tensors, and entries of partly trained tensors.

A frozen tensor requires no gradient: it gets no optimizer state and no weight decay, and adds nothing to the gradient
norm. In a partly frozen tensor (a neuron's rows of gate and up, its columns of down; one half of a fused projection),
the gradients of frozen entries are set to zero before they are accumulated, clipped or reduced, so their AdamW moments
stay zero, and their values are restored after every step, which undoes decay whatever the optimizer does.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpt_utils.architectures import archs
from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import opening, refs
from cpt_utils.measures import layer_sets

runs = cli.sibling("cpt/runs.py")

MODES = runs.MODES


def mode_of(values: dict) -> str | None:
    """The mode among MODES that a training file, an arm or the settings of a run use, or None."""
    return next((mode for mode in MODES if values.get(mode) is not None), None)


def usual_io(mode: str | None) -> str:
    """The default of `io` (embeddings, final norm and head)."""
    return "trained" if mode == "freeze" else "frozen"


def read(values: dict, place: layer_sets.Place):
    """The trained part that the keys of a training file or an arm ask for: `Choice`, `lora.Choice`, or None.

    Raises:
        InputError: a part that the model does not have.
    """
    mode = mode_of(values)
    if mode is None:
        return None
    if mode == "lora":
        return cli.sibling("cpt/lora.py").read(values[mode], place)
    io = values.get("io") or usual_io(mode)
    return Choice(mode, layer_sets.read(values[mode], place), io == "trained")


@dataclass(frozen=True)
class Choice:
    """The request: `part` of the layers is frozen (mode "freeze") or is the only part trained ("train_only").

    `io`: whether everything outside the layers is trained (embeddings, final norm, output matrix).
    """

    mode: str
    part: layer_sets.Part
    io: bool

    def facts(self) -> dict:
        """What determines the run, for its settings."""
        return {self.mode: self.part.facts(), "io": "trained" if self.io else "frozen"}

    def on(self, model: torch.nn.Module, base: refs.ModelRef) -> Frozen:
        return Frozen(model, self, base)


class Frozen:
    """Freezes the part of a loaded model that `choice` asks for; `restore`, called after each step, resets its entries.

    Args:
        base: the model on disk that was loaded; its tensors show where components and neurons are.

    Attributes:
        parts: partly frozen parameter -> bool mask of its frozen entries.
        unsharded: what cannot be done under FSDP and DeepSpeed, which split tensors; empty: nothing.
        n_written, n_state: parameters in a checkpoint, and in a state to resume from.

    Raises:
        InputError: nothing is left to train, or nothing is frozen; shared weights would be both.
    """

    def __init__(self, model: torch.nn.Module, choice: Choice, base: refs.ModelRef):
        self.choice, self.arch, self.config = choice, archs.for_config(base.config()), base.config()
        self.parts: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._held: dict[torch.nn.Parameter, tuple[torch.Tensor, torch.Tensor]] = {}
        chosen = self._chosen(model, base)
        self.n_parameters = self.n_trained = 0
        trained: set[int] = set()
        for name, parameter in model.named_parameters():
            layer, inside = self.arch.layer_of(name), chosen.get(parameter, False)
            frozen = (not choice.io) if layer is None else inside if choice.mode == "freeze" else _not(inside)
            left = parameter.numel() - _count(frozen, parameter)
            self.n_parameters, self.n_trained = self.n_parameters + parameter.numel(), self.n_trained + left
            if left:
                trained |= {layer} - {None}
            if not left:
                parameter.requires_grad_(False)
            elif left < parameter.numel():
                self._freeze_entries(parameter, frozen)
        if self.n_trained in (0, self.n_parameters):
            what = "nothing is left to train" if not self.n_trained else "nothing is frozen"
            raise InputError(f"{choice.mode}: {choice.part.words!r} with io {choice.facts()['io']}: {what}")
        self.layers = sorted(trained)
        self.n_state = self.n_written = self.n_parameters
        self.unsharded = "neurons and parts of fused tensors cannot be frozen" if self.parts else ""

    def facts(self) -> dict:
        """What was trained, for the run's record."""
        n = self.arch.n_layers(self.config)
        facts = self.choice.facts() | {"words": self.choice.part.words, "layers_trained": self.layers}
        facts |= {"share_of_layers": len(self.layers) / n, "trainable_parameters": self.n_trained}
        return facts | {"share_of_parameters": self.n_trained / self.n_parameters}

    def summary(self) -> str:
        facts, n = self.facts(), self.arch.n_layers(self.config)
        return (
            f"{self.choice.mode} {self.choice.part.words}, embeddings, final norm and head {facts['io']}: "
            f"{len(self.layers)} of {n} layers ({facts['share_of_layers']:.0%}) and {self.n_trained:,} of "
            f"{self.n_parameters:,} parameters ({facts['share_of_parameters']:.1%}) are trained"
        )

    def of_state(self, state: dict) -> dict:
        """The entries of a state dict that belong in the states to resume from."""
        return state

    write = staticmethod(runs.write_model)

    def restore(self) -> None:
        """Reset the frozen entries of partly trained tensors to their original values."""
        with torch.no_grad():
            for parameter, (index, values) in self._held.items():
                if index.device != parameter.device:
                    index, values = index.to(parameter.device), values.to(parameter.device)
                    self._held[parameter] = index, values
                parameter.put_(index, values)

    def _freeze_entries(self, parameter: torch.nn.Parameter, frozen: torch.Tensor) -> None:
        self.parts[parameter] = frozen
        index = frozen.reshape(-1).nonzero().squeeze(1)
        self._held[parameter] = index, parameter.detach().reshape(-1)[index].clone()
        parameter.register_hook(lambda gradient: gradient.masked_fill(self._on(parameter, gradient.device), 0))

    def _on(self, parameter: torch.nn.Parameter, device: torch.device) -> torch.Tensor:
        if self.parts[parameter].device != device:
            self.parts[parameter] = self.parts[parameter].to(device)
        return self.parts[parameter]

    def _chosen(self, model: torch.nn.Module, base: refs.ModelRef) -> dict:
        """Parameters with entries in the chosen part -> True (all entries), or a bool mask of these entries."""
        part, chosen = self.choice.part, {}
        self._refuse_shared(model)
        if part.component is None and part.neurons is None:
            named = model.named_parameters()
            return {p: True for name, p in named if self.arch.layer_of(name) in part.layers}
        with opening.open_folder(base, lazy=True) as stored:
            names, parameters = set(stored.names()), dict(model.named_parameters(remove_duplicate=False))
            regions = [region for layer in part.layers for region in self._regions(layer, names, stored.shape)]
            locations = self.arch.locations({tensor for tensor, *_ in regions}, model, stored.shape)
            for tensor, expert, dim, positions in regions:
                parameter = parameters.get(locations[tensor].name)
                if parameter is None:  # a buffer, which training does not change
                    continue
                mask = chosen.setdefault(parameter, torch.zeros(parameter.shape, dtype=torch.bool))
                view = locations[tensor].view(mask)
                view = view if expert is None else view[expert]
                if positions is None:
                    view.fill_(True)
                else:
                    view.index_fill_(dim, positions, True)
        return chosen

    def _refuse_shared(self, model: torch.nn.Module) -> None:
        """Refuse weights shared by several layers, or a layer and the embeddings, that are not all in the same part."""
        names_of: dict[torch.nn.Parameter, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names_of.setdefault(parameter, []).append(name)
        for names in names_of.values():
            layers = {self.arch.layer_of(name) for name in names}
            if len({"io" if layer is None else layer in self.choice.part.layers for layer in layers}) > 1:
                raise InputError(
                    f"{self.choice.mode}: {self.choice.part.words!r} splits the weights that "
                    f"{' and '.join(names[:3])} have in common; take all of these layers, or none"
                )

    def _regions(self, layer: int, names: set[str], shape) -> list[tuple]:
        """The entries of the part in a layer: (tensor on disk, expert, dimension, positions or None for all)."""
        part, at = self.choice.part, (self.config, layer)
        if part.neurons is not None:
            return self._neuron_regions(layer, part.neurons[layer], names, shape)
        if part.component == "attention":
            units = range(self.arch.head_counts(*at)[1])
            parts = [p for name in archs.ATTENTION for p in self.arch.head_parts(*at, name, units, names, shape)]
            parts += self.arch.shared_parts(*at, names, shape)
        else:
            ffn = [name for name in self.arch.projections(*at) if name in archs.FFN]
            parts = [p for name in ffn for p in self.arch.parts(*at, name, names, shape)]
        return [(p.tensor, p.expert, p.dim, _positions(p, shape)) for p in parts]

    def _neuron_regions(self, layer: int, neurons: list[int], names: set[str], shape) -> list[tuple]:
        """Rows of gate and up with their biases, and columns of down; each expert's for its own neurons."""
        at, regions = (self.config, layer), []
        groups = self.arch.neurons(*at)
        firsts = [group.first + e * group.width for group in groups for e in range(max(1, group.experts))]
        widths = [group.width for group in groups for _ in range(max(1, group.experts))]
        for name in (name for name in self.arch.projections(*at) if name in archs.FFN):
            parts = self.arch.parts(*at, name, names, shape)
            weights = [p for p in parts if p.role == "weight"]
            biases = [p for p in parts if p.role == "bias"]
            of_bias = [p.expert if p.expert is not None else len(firsts) - 1 for p in biases]
            for group, p in [*enumerate(weights), *zip(of_bias, biases, strict=True)]:
                first, width = firsts[group], widths[group]
                inside = torch.tensor([n - first for n in neurons if first <= n < first + width], dtype=torch.long)
                if name == "down_proj" and p.role == "bias":
                    continue  # belongs to no single neuron
                if name == "down_proj":
                    regions.append((p.tensor, p.expert, 1 - p.dim, inside))
                else:
                    every = _positions(p, shape)
                    regions.append((p.tensor, p.expert, p.dim, inside if every is None else every[inside]))
        return regions


def _positions(part: archs.WeightSlice, shape) -> torch.Tensor | None:
    """The positions of a part along its dimension; None: all."""
    if part.index is None or isinstance(part.index, torch.Tensor):
        return part.index
    size = shape(part.tensor)[part.dim + (0 if part.expert is None else 1)]
    return torch.arange(size)[part.index]


def _not(frozen: bool | torch.Tensor) -> bool | torch.Tensor:
    return ~frozen if isinstance(frozen, torch.Tensor) else not frozen


def _count(frozen: bool | torch.Tensor, parameter: torch.nn.Parameter) -> int:
    return int(frozen.sum()) if isinstance(frozen, torch.Tensor) else frozen * parameter.numel()
