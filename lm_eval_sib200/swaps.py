"""The layers or components of the base that evaluate.py --swap puts into a model in memory.

The kinds are those of the steps that write such models: `semantic_hub` and `random` of layer-swap/layer-swap.py,
`attention` and `ffn` of component-swap/; `layers` selects whole layers by number.
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
    """A requested swap: its kind, the base, a layer list or its file, the seed of `random`, and the gate that belongs
    to the layers (`gate.carried`)."""

    kind: str
    base: refs.ModelRef
    layers: str
    seed: int
    gate: dict | None = None

    @classmethod
    def from_arguments(cls, args, study: Study) -> Swap | None:
        """None without --swap.

        Raises:
            InputError: no base, no layers, or no folder for the results of changed models.
        """
        if args.swap is None:
            if args.base or args.layers:
                raise InputError("--base and --layers only specify a swap; give --swap as well")
            return None
        if args.output is None:
            raise InputError("--swap needs -o: the study's lm_eval folder holds the results of its unchanged models")
        base = refs.model(study.value(args.base, "--base", "base"))
        layers = args.layers
        if layers is None:
            if args.swap == "layers":
                raise InputError("--swap layers needs --layers with layer numbers, like 3,4,5")
            file = layer_lists.FILES["lsn_rich" if args.swap == "ffn" else "interface"]
            layers = str(study.input(None, "--layers", file.step))
        return cls(args.swap, base, layers, study.seed, gate.carried(layers))

    def recipe(self, pair: surgery.Pair) -> surgery.Recipe:
        """The edits for one target.

        Raises:
            InputError: layers that the model does not have, or a file made from another run's model.
        """
        listed = self._listed(pair)
        script = cli.sibling("layer-swap/layer-swap.py")
        if self.kind in components.COMPONENTS:
            return components.Recipes(pair).component(self.kind, listed)
        if self.kind != "layers":
            hub = script.semantic_hub(listed, pair.n_layers)
            if not hub:
                raise InputError(f"{self.layers}: all layers are interface layers, so no layer is left to swap")
            listed = hub if self.kind == "semantic_hub" else script.random_layers(len(hub), pair.n_layers, self.seed)
        return surgery.layers_from_base(pair, listed)

    def _listed(self, pair: surgery.Pair) -> list[int]:
        if re.fullmatch(r"\d+(,\d+)*", self.layers):
            layers = sorted({int(layer) for layer in self.layers.split(",")})
            if layers[-1] >= pair.n_layers:
                raise InputError(f"--layers names layer {layers[-1]}; the model has layers 0 to {pair.n_layers - 1}")
            return layers
        layer_set = "lsn_rich" if self.kind == "ffn" else "interface"
        models = [pair.base_ref.describe(), pair.target_ref.describe()]
        return layer_lists.read_layers(Path(self.layers), layer_set, pair.n_layers, models)[0]

    def facts(self, pair: surgery.Pair, recipe: surgery.Recipe) -> dict:
        """The facts about the swap for the result's header, whose model is the target."""
        facts = {"kind": self.kind, "base": pair.base_ref.describe(), "recipe": recipe.words, **recipe.facts}
        if self.kind == "random":
            facts["seed"] = self.seed
        moved, total = pair.share(recipe)
        return facts | {"parameters_from_base": moved, "parameters": total}


def add_flags(p) -> None:
    text = f"evaluate each model with parts of the base swapped in, in memory: {', '.join(KINDS)}"
    p.add_argument("--swap", choices=KINDS, metavar="KIND", help=text)
    p.add_argument("--base", metavar="BASE", help="source of the parts for --swap; default: the study's base")
    text = "for --swap: numbers like 3,4,5, or the file of step 2 (ffn: of step 8): interface layers for "
    text += "semantic_hub and random, layers to swap for the other kinds; default: the study's file"
    p.add_argument("--layers", metavar="L", help=text)
