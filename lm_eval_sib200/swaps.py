"""Which of the base's layers or components evaluate.py puts into a model in memory, for its --swap.

The kinds are those of the steps that write such models: `semantic_hub` and `random` of layer-swap/layer-swap.py,
`attention` and `ffn` of component-swap/; `layers` takes whole layers by their numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import refs
from cpt_utils.interventions import components, surgery
from cpt_utils.measures import gate, layer_lists

KINDS = ("semantic_hub", "random", "layers", "attention", "ffn")


@dataclass(frozen=True)
class Swap:
    """A swap asked for: its kind, the base's reference, where its layers are listed, the seed of `random`, and the gate
    that goes with the layers (`gate.carried`)."""

    kind: str
    base: refs.ModelRef
    layers: str
    seed: int
    gate: dict | None = None

    @classmethod
    def from_arguments(cls, args, study: Study) -> Swap | None:
        """None without --swap.

        Raises:
            InputError: no base, no layers, or no folder for the results of models that are changed.
        """
        if args.swap is None:
            if args.base or args.layers:
                raise InputError("--base and --layers say what is swapped; give --swap as well")
            return None
        if args.output is None:
            raise InputError("--swap needs -o: the study's lm_eval folder holds the results of its models as they are")
        base = refs.model(study.value(args.base, "--base", "base"))
        layers = args.layers
        if layers is None:
            if args.swap == "layers":
                raise InputError("--swap layers needs --layers with their numbers, like 3,4,5")
            file = layer_lists.FILES["lsn_rich" if args.swap == "ffn" else "interface"]
            layers = str(study.input(None, "--layers", file.step))
        return cls(args.swap, base, layers, study.seed, gate.carried(layers))

    def recipe(self, pair: surgery.Pair) -> surgery.Recipe:
        """The edits for one target.

        Raises:
            InputError: layers that the model does not have, or a file made from a model of another run.
        """
        listed = self._listed(pair)
        script = cli.sibling("layer-swap/layer-swap.py")
        if self.kind in components.COMPONENTS:
            return components.Recipes(pair).component(self.kind, listed)
        if self.kind != "layers":
            hub = script.semantic_hub(listed, pair.n_layers)
            if not hub:
                raise InputError(f"{self.layers}: every layer is an interface layer, so no layer is left to swap")
            listed = hub if self.kind == "semantic_hub" else script.random_layers(len(hub), pair.n_layers, self.seed)
        return surgery.layers_from_base(pair, listed)

    def _listed(self, pair: surgery.Pair) -> list[int]:
        if re.fullmatch(r"\d+(,\d+)*", self.layers):
            found = sorted({int(layer) for layer in self.layers.split(",")})
            if found[-1] >= pair.n_layers:
                raise InputError(f"--layers names layer {found[-1]}; the model has layers 0 to {pair.n_layers - 1}")
            return found
        layer_set = "lsn_rich" if self.kind == "ffn" else "interface"
        models = [pair.base_ref.describe(), pair.target_ref.describe()]
        return layer_lists.read_layers(Path(self.layers), layer_set, pair.n_layers, models)[0]

    def facts(self, pair: surgery.Pair, recipe: surgery.Recipe) -> dict:
        """What the result's header says of the swap; the target is the header's model."""
        facts = {"kind": self.kind, "base": pair.base_ref.describe(), "recipe": recipe.words, **recipe.facts}
        if self.kind == "random":
            facts["seed"] = self.seed
        moved, total = pair.share(recipe)
        return facts | {"parameters_from_base": moved, "parameters": total}


def add_flags(p) -> None:
    text = f"evaluate each model with parts of the base in it, swapped in memory: {', '.join(KINDS)}"
    p.add_argument("--swap", choices=KINDS, metavar="KIND", help=text)
    p.add_argument("--base", metavar="BASE", help="where the parts of --swap come from; default: the study's base")
    text = "for --swap: numbers like 3,4,5, or the file of step 2 (ffn: of step 8) with interface layers for "
    text += "semantic_hub and random, layers to swap for the others; default: the study's file"
    p.add_argument("--layers", metavar="L", help=text)
