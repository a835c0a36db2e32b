"""One component of the base, attention or FFN, in some layers of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

from cpt_utils.architectures import archs
from cpt_utils.base import cli
from cpt_utils.interventions import surgery

COMPONENTS = {"attention": archs.ATTENTION, "ffn": archs.FFN}
EMBEDDINGS = "embeddings"


def layers_having(config: dict) -> dict[str, list[int]]:
    """The layers that have attention, and those that have an FFN; says which lack either."""
    arch, having = archs.for_config(config), {}
    for component, projections in COMPONENTS.items():
        lacking = arch.lacking(config, projections)
        having[component] = sorted({*range(arch.n_layers(config))} - {*lacking})
        if lacking:
            instead = f" ({arch.instead(config, lacking)} in its place)" if component == "attention" else ""
            cli.say(f"layers {lacking} have no {component}{instead}: nothing of it is swapped there")
    return having


class Recipes:
    """The recipes of one pair; the edits of a layer are made once, because controls ask for hundreds of sets."""

    def __init__(self, pair: surgery.Pair):
        self.pair = pair
        self._layers: dict[tuple[str, int], tuple[surgery.Edit, ...]] = {}

    def component(self, component: str, layers: Iterable[int]) -> surgery.Recipe:
        """The weights and biases of a component of the base in `layers`."""
        layers = sorted(layers)
        wanted = [name for name in self.pair.arch.projections(self.pair.config) if name in COMPONENTS[component]]
        edits = tuple(edit for layer in layers for edit in self._layer(component, layer))
        words = f"{', '.join(wanted)} of the base in layers {', '.join(map(str, layers))}"
        return surgery.Recipe(words, {"projections": wanted, "layers": layers}, edits)

    def embeddings(self) -> surgery.Recipe:
        """Embeddings and lm_head of the base.

        Raises:
            InputError: base and target have none of the same shape.
        """
        return surgery.tensors_from_base(self.pair, self.pair.arch.embedding_tensors(self.pair.target.names()))

    def _layer(self, component: str, layer: int) -> tuple[surgery.Edit, ...]:
        if (component, layer) not in self._layers:
            made = surgery.parts_from_base(self.pair, COMPONENTS[component], [layer])
            self._layers[component, layer] = made.edits
        return self._layers[component, layer]


def combined(recipes: list[surgery.Recipe]) -> surgery.Recipe:
    """All edits of several recipes that touch different tensors."""
    if len(recipes) == 1:
        return recipes[0]
    edits = tuple(edit for recipe in recipes for edit in recipe.edits)
    words = "; ".join(recipe.words for recipe in recipes)
    return surgery.Recipe(words, {"parts": [recipe.facts for recipe in recipes]}, edits)
