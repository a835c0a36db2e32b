"""Swaps of one component, attention or FFN, of some layers: the base's in the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

from cpt_utils.architectures import archs
from cpt_utils.base import cli
from cpt_utils.interventions import surgery

COMPONENTS = {"attention": archs.ATTENTION, "ffn": archs.FFN}
EMBEDDINGS = "embeddings"


def layers_having(config: dict) -> dict[str, list[int]]:
    """The layers that have attention, and those that have an FFN; prints which lack either."""
    arch, layers_with = archs.for_config(config), {}
    for component, projections in COMPONENTS.items():
        lacking = arch.lacking(config, projections)
        layers_with[component] = sorted({*range(arch.n_layers(config))} - {*lacking})
        if lacking:
            instead = f" ({arch.instead(config, lacking)} in its place)" if component == "attention" else ""
            cli.say(f"layers {lacking} have no {component}{instead}: none is swapped there")
    return layers_with


class Recipes:
    """The recipes of one pair; the edits of a layer are cached, because controls ask for hundreds of sets."""

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
            InputError: those of base and target differ in shape.
        """
        return surgery.tensors_from_base(self.pair, self.pair.arch.embedding_tensors(self.pair.target.names()))

    def _layer(self, component: str, layer: int) -> tuple[surgery.Edit, ...]:
        if (component, layer) not in self._layers:
            recipe = surgery.parts_from_base(self.pair, COMPONENTS[component], [layer])
            self._layers[component, layer] = recipe.edits
        return self._layers[component, layer]


def combined(recipes: list[surgery.Recipe]) -> surgery.Recipe:
    """All edits of several recipes that touch different tensors."""
    if len(recipes) == 1:
        return recipes[0]
    edits = tuple(edit for recipe in recipes for edit in recipe.edits)
    words = "; ".join(recipe.words for recipe in recipes)
    return surgery.Recipe(words, {"parts": [recipe.facts for recipe in recipes]}, edits)
