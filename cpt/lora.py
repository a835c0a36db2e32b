"""LoRA (Hu et al. 2021) through PEFT: only low-rank products next to the weights of some layers are trained.

A module computes W x + alpha / r * B A x: A [r, in] starts at random, B [out, r] at zero, and W stays unchanged, bit
for bit. Each rank of a module has in + out parameters.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, training_keys
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.checkpoints import adapters, formats, refs
from cpt_utils.interventions.components import COMPONENTS
from cpt_utils.measures import layer_sets

runs = cli.sibling("cpt/runs.py")

# Modules that compute W x + b. Others, such as BitNet's, round their weights in the forward pass: with a product next
# to them, they do not equal the merged model.
PLAIN = ("Linear", "Conv1D", "FalconLinear")
WITHIN = ".base_layer."  # what PEFT inserts into the names of weights that have a product


@dataclass(frozen=True)
class Choice:
    """A request for LoRA.

    Attributes:
        words: the request in command-line form.
        targets: projections; layers: those that get products.
        like: layers; use as many parameters as rank `asked.r` has in these. Empty: every rank is `asked.r`.
    """

    words: str
    asked: training_keys.Lora
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    like: tuple[int, ...] = ()

    @property
    def alpha(self) -> float:
        return 2 * self.asked.r if self.asked.alpha is None else self.asked.alpha

    def facts(self) -> dict:
        """What determines the run, for its settings."""
        facts = {"r": self.asked.r, "alpha": self.alpha, "dropout": self.asked.dropout}
        facts |= {"targets": list(self.targets), "layers": list(self.layers)}
        facts |= {"parameters_of": list(self.like)} if self.like else {}
        return {"lora": facts | ({"merge": True} if self.asked.merge else {})}

    def on(self, model: torch.nn.Module, base: refs.ModelRef) -> Lora:
        return Lora(model, self, base)


def read(given: dict, place: layer_sets.Place) -> Choice:
    """The choice that the key `lora` of a training file or an arm asks for.

    Raises:
        InputError: layers or targets that the model does not have.
    """
    asked, layers = training_keys.Lora.model_validate(given), {}
    for key, words in (("layers", asked.layers), ("parameters_of", asked.parameters_of)):
        try:
            part = layer_sets.read("all" if words is None else words, place)
        except InputError as error:
            raise InputError(f"{key} {error}") from None
        if part.component or part.neurons is not None:
            raise InputError(f"{key} {part.words!r} is less than whole layers; select projections by targets instead")
        layers[key] = part.layers
    like = () if asked.parameters_of is None else layers["parameters_of"]
    targets = projections(asked.targets, archs.for_config(place.config))
    return Choice(layer_sets.words_of(given), asked, targets, layers["layers"], like)


def projections(given: str | list[str], arch: archs.Arch) -> tuple[str, ...]:
    """The projections that `targets` asks for, among those that layers of the model type have."""
    known, chosen = arch.projections(), set()
    for word in (word.strip() for word in (given.split(",") if isinstance(given, str) else given)):
        meant = {"all": archs.PROJECTIONS, **COMPONENTS}.get(word, (word,))
        if not {*meant} & {*known}:
            words = ", ".join(("all", *COMPONENTS, *known))
            raise InputError(f"targets: model type {arch.model_type} has no {word!r}; choose from {words}")
        chosen |= {*meant} & {*known}
    return tuple(name for name in known if name in chosen)


def modules_of(model: torch.nn.Module, arch: archs.Arch, config: dict, layer: int, targets) -> dict[str, int]:
    """Dotted name of each module that computes a target in `layer` -> its parameters per rank.

    Raises:
        InputError: a target has no module of its own, or one without LoRA in PEFT.
    """
    costs = {}
    for name in (name for name in arch.projections(config, layer) if name in targets):
        if name in archs.FFN and arch.has_router(config, layer):
            raise InputError(
                f"targets: the experts of layer {layer} are one tensor [experts, .., ..] in memory, for which LoRA is "
                "not supported; write targets: attention"
            )
        for slot in arch.slots(config, layer, name):
            if lacking := [other for other in slot.order if other not in targets]:
                raise InputError(
                    f"targets: {name} is computed together with {' and '.join(lacking)}, in {slot.module}; "
                    "take all of them, or none"
                )
            path, module = f"{arch.layer_path(layer)}.{slot.module}", arch.in_layer(model, layer, slot.module)
            if type(module).__name__ not in PLAIN:
                raise InputError(f"targets: {path} is a {type(module).__name__}, for which LoRA is not supported")
            costs[path] = sum(module.weight.shape)
    return costs


def ranks_of(costs: dict[int, dict[str, int]], wanted: int) -> dict[str, int]:
    """Ranks that differ by at most one and together have `wanted` parameters, or as close to that as possible.

    If all layers are alike, all modules in a layer get the same rank, and the higher ranks are evenly spaced.

    Args:
        costs: layer -> its modules, with the parameters per rank of each.

    Raises:
        InputError: `wanted` is too small for rank 1 everywhere.
    """
    sizes = [sum(layer.values()) for layer in costs.values()]
    modules = {name: cost for layer in costs.values() for name, cost in layer.items()}
    rank, rest = divmod(wanted, sum(sizes))
    if not rank:
        raise InputError(
            f"parameters_of: rank 1 has {sum(sizes):,} parameters in these layers, more than the {wanted:,} asked for; "
            "raise r"
        )
    if len({*sizes}) == 1 and rest % sizes[0] == 0:
        n, k = rest // sizes[0], len(sizes)
        more = {name for i, layer in enumerate(costs.values()) if (i + 1) * n // k > i * n // k for name in layer}
    else:
        more = nearest_sum(modules, rest)
    return {name: rank + (name in more) for name in modules}


def nearest_sum(costs: dict[str, int], wanted: int) -> set[str]:
    """The names whose costs add up to `wanted`, or to the sum nearest to it."""
    unit = math.gcd(*costs.values())
    sums = [1]  # bit s is set if some subset of the names so far costs s units
    for cost in costs.values():
        sums.append(sums[-1] | sums[-1] << cost // unit)
    reached = (s for s, bit in enumerate(reversed(f"{sums[-1]:b}")) if bit == "1")
    left, names = min(reached, key=lambda s: abs(s * unit - wanted)), set()
    for (name, cost), before in zip(reversed(costs.items()), reversed(sums[:-1]), strict=True):
        if not before >> left & 1:
            names.add(name)
            left -= cost // unit
    return names


class Lora:
    """Puts the products of `choice` into a loaded model, whose own weights require no gradient from then on.

    Args:
        base: the model on disk that was loaded; adapters name it as their base.

    Attributes:
        ranks: dotted name of each module that has a product -> its rank.
        n_parameters: of the model without products; n_trained: of the products.
        n_written, n_state: parameters in a checkpoint, and in a state to resume from.

    Raises:
        InputError: no PEFT; no layer has a target; a target does not support LoRA; the base is an adapter, no `merge`.
    """

    unsharded = "LoRA is not trained"

    def __init__(self, model: torch.nn.Module, choice: Choice, base: refs.ModelRef):
        try:
            import peft
        except ImportError:
            raise InputError("lora needs peft: pip install peft, or install this package with [lora]") from None
        if base.is_adapter and not choice.asked.merge:
            raise InputError(f"lora: {base.spec} is an adapter, and adapters cannot be stacked; set merge: true")
        self.choice, self.arch = choice, archs.for_config(base.config())
        self.n_layers = self.arch.n_layers(base.config())
        try:
            self.ranks = self._ranks(model, base.config())
        except InputError as error:
            raise InputError(f"lora: {error}") from None
        self.n_parameters = sum(parameter.numel() for parameter in model.parameters())
        usual = Counter(self.ranks.values()).most_common(1)[0][0]
        alpha = choice.alpha
        config = peft.LoraConfig(
            r=usual,
            rank_pattern={name: rank for name, rank in self.ranks.items() if rank != usual},
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
            lora_dropout=choice.asked.dropout,
            target_modules=list(self.ranks),
            fan_in_fan_out=self.arch.transposed,
            task_type="CAUSAL_LM",
        )
        self._values = config.to_dict()  # PEFT shortens long lists of module names in its copy and adds to it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT uses a name that transformers has since changed
            self._peft = peft.get_peft_model(model, config)  # changes `model` itself
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        self._products, self.n_trained = {*trained}, sum(trained.values())
        self.n_state, self.n_written = self.n_trained, self.n_parameters if choice.asked.merge else self.n_trained
        self._values |= {"target_modules": sorted(self.ranks), "revision": base.resolved_revision()}
        self._values["base_model_name_or_path"] = base.spec if base.is_local else base.spec.partition("@")[0]
        self._values["inference_mode"] = True

    def _ranks(self, model: torch.nn.Module, config: dict) -> dict[str, int]:
        choice = self.choice

        def costs(layers) -> dict[int, dict[str, int]]:
            by_layer = {layer: modules_of(model, self.arch, config, layer, choice.targets) for layer in layers}
            return {layer: modules for layer, modules in by_layer.items() if modules}

        chosen = costs(choice.layers)
        self.layers = sorted(chosen)
        if not chosen:
            raise InputError(f"layers: none of {list(choice.layers)} has {' or '.join(choice.targets)}")
        like = costs(choice.like or choice.layers)
        self.wanted = choice.asked.r * sum(sum(modules.values()) for modules in like.values())
        if not choice.like:
            return {name: choice.asked.r for modules in chosen.values() for name in modules}
        return ranks_of(chosen, self.wanted)

    def facts(self) -> dict:
        """What was trained, for the run's record."""
        facts = self.choice.facts() | {"words": self.choice.words, "layers_trained": self.layers}
        facts |= {"ranks": sorted({*self.ranks.values()}), "trainable_parameters": self.n_trained}
        facts |= {"parameters_wanted": self.wanted} if self.choice.like else {}
        facts |= {"share_of_layers": len(self.layers) / self.n_layers}
        return facts | {"share_of_parameters": self.n_trained / self.n_parameters}

    def summary(self) -> str:
        facts, off = self.facts(), self.n_trained - self.wanted
        wanted = f" ({abs(off):,} {'more' if off > 0 else 'fewer'} than asked for)" if off else ""
        return (
            f"lora {self.choice.words}: rank {' and '.join(map(str, facts['ranks']))} in {len(self.ranks)} modules "
            f"of {len(self.layers)} of {self.n_layers} layers ({facts['share_of_layers']:.0%}); {self.n_trained:,} "
            f"parameters{wanted}, {facts['share_of_parameters']:.1%} of the model's {self.n_parameters:,}, are trained"
        )

    def restore(self) -> None:
        """Nothing to restore: the optimizer does not have the frozen weights."""

    def of_state(self, state: dict) -> dict:
        """The entries of a state dict that belong in the states to resume from: those that change."""
        return {name: value for name, value in state.items() if name in self._products}

    def write(self, folder: Path, model: torch.nn.Module, state: dict, tokenizer_files: Path, dtype_name: str) -> None:
        """Write an adapter as PEFT does, or with `merge` the whole merged model, into a new folder.

        Args:
            state: of `model`, the one that this object was made from.
        """
        if self.choice.asked.merge:
            runs.write_model(folder, model, self._merged(model, state), tokenizer_files, dtype_name)
            return
        import peft
        from safetensors.torch import save_file

        products = {f"{adapters.PREFIX}{name}": tensor for name, tensor in self.of_state(state).items()}
        tensors = peft.get_peft_model_state_dict(self._peft, products, save_embedding_layers=False)
        folder.mkdir(parents=True)
        disk = runs.disk_state(tensors, getattr(torch, dtype_name))
        save_file(disk, folder / formats.ADAPTER_WEIGHTS[0], metadata={"format": "pt"})
        values = json.dumps(self._values, indent=2, sort_keys=True) + "\n"
        (folder / formats.ADAPTER_CONFIG).write_text(values, encoding="utf-8")
        runs.copy_tokenizer(tokenizer_files, folder)

    def _merged(self, model: torch.nn.Module, state: dict) -> dict:
        """The state dict of the model that PEFT's `merge_and_unload` returns, under its names without LoRA."""
        merged = {name.replace(WITHIN, "."): value for name, value in state.items() if name not in self._products}
        with torch.no_grad():
            for name in self.ranks:
                weight = f"{name}.weight"
                merged[weight] = merged[weight] + model.get_submodule(name).get_delta_weight("default")
        return merged
