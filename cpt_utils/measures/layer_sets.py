"""How a part of a model is named: some of its layers, one component of them, or single neurons.

    layer_sets.read("hub/attention", place)      # as in training files (freeze, train_only), arms and flags

| words | layers, of N |
|---|---|
| `outer:p` | the first and the last k, k = max(1, floor(p N / 2 + 1/2)): a share p of the layers, half on each side |
| `inner:p` | all except `outer:p` |
| `first:k`, `last:k`, `middle:k` | k consecutive ones: at the input, at the output, in the middle (the lower of two) |
| `spaced:k` | k at equal distances, including the first and the last; the middle one if k is 1 |
| `random:k:seed` | k drawn at random |
| `change:k[:FILE]` | the k that changed most, at the last step in a file of weight-diff/attn_vs_ffn.py |
| `hub[:FILE]`, `interface[:FILE]` | those in a file of layer-specialize/layer_specialize.py |
| `matched:SET:seed` | another set with the size of SET (`hub`, ..) and the most similar shape |
| `all`, `0,2,5-7`, `[0, 2, 5]` | every layer; a list |
| `FILE.json` | the list `layers` in a file, as written by layer-ablation/cogsym.py |
| `lsn`, `FILE.json[:LANG]` | neurons: of the study's mask, of a file of lsn/identify.py |

After layers, `/attention` or `/ffn` selects only this component of them. Without FILE, the study's file is used.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import relatives
from cpt_utils.interventions.components import COMPONENTS
from cpt_utils.interventions.condition import digest
from cpt_utils.measures import layer_lists, masks, matched
from cpt_utils.models import ffn

FORMS = (
    "outer:p inner:p first:k last:k middle:k spaced:k random:k:seed change:k hub interface matched:SET:seed all lsn, "
    "a list like 0,2,5-7, or a .json file of layers or a mask; after layers /attention or /ffn"
)


@dataclass(frozen=True)
class Part:
    """A part of a model: `layers`, of these one `component` (None: everything), or `neurons` of some of them.

    Attributes:
        words: as it was requested.
    """

    words: str
    layers: tuple[int, ...]
    component: str | None = None
    neurons: masks.Layers | None = None

    def facts(self) -> dict:
        """The facts that identify the part, in whatever words it was requested, as JSON values."""
        neurons = {str(layer): in_layer for layer, in_layer in (self.neurons or {}).items() if in_layer}
        more = {"component": self.component} if self.component else {}
        if self.neurons is not None:
            more = {"neurons": sum(map(len, neurons.values())), "neurons_sha256": digest(neurons)}
        return {"layers": list(self.layers)} | more


@dataclass(frozen=True)
class Place:
    """The model whose part is meant, and the source of the files that define hub, interface, change and lsn.

    Attributes:
        config: the model's config.json.
        study: provides files that are not named; for an arm, the study of the plain run.
        models: `ModelRef.describe()` of the base and the run that files of the study must be about.
    """

    config: dict
    study: Study = field(default_factory=Study)
    models: list[dict] | None = None

    @property
    def n_layers(self) -> int:
        return archs.for_config(self.config).n_layers(self.config)

    def file(self, given: str, step: str, what: str) -> tuple[Path, list[dict] | None]:
        """The file that defines `what`, and the models it must be about (None: a file given by name is trusted)."""
        if not given and not self.study:
            raise InputError(f"nothing says where the {what} are: write {what}:FILE, or run inside a study (--study)")
        return self.study.input(given or None, f"{what}:FILE", step), None if given else self.models


def read(given: str | int | list[int], place: Place) -> Part:
    """The part of the model that `given` means, see the table above.

    Raises:
        InputError: words without a meaning, a part that the model does not have, no layer or neuron at all, or a file
            that is missing or about another model.
    """
    words = words_of(given)
    text, slash, last = words.rpartition("/")
    stem, component = (text, last) if slash and last in COMPONENTS else (words, None)
    try:
        name, *arguments = stem.split(":")
        if name == "lsn" or (".json" in name and not layer_lists.is_list(Path(name))):
            if component:
                raise InputError("neurons belong to the FFN; leave out the slash and the word after it")
            return _neurons(words, "" if name == "lsn" else stem, place)
        layers = _layers(name, arguments, component, place)
        if not layers:
            raise InputError("that names no layer of this model")
    except InputError as error:
        raise InputError(f"{words!r}: {error}") from None
    return Part(words, tuple(sorted(set(layers))), component)


def words_of(given: str | int | list[int] | dict) -> str:
    """The content of a file or a flag as one text; for the key `lora`, "layers=outer:0.25,r=8"."""
    if isinstance(given, dict):
        return ",".join(f"{key}={words_of(value)}" for key, value in sorted(given.items()))
    return ",".join(map(str, given)) if isinstance(given, list) else str(given).strip()


def per_side(share: float, n_layers: int) -> int:
    """Number of layers on each side that make up `share`: max(1, floor(p N / 2 + 1/2)), e.g. 4 for .25 of 30."""
    return max(1, int(round(share * n_layers / 2 + 0.5, 9)))  # rounded, as .58 * 50 is slightly below 29 in floats


def _layers(name: str, arguments: list[str], component: str | None, place: Place) -> list[int]:
    """The layers that one form of the table means; `more` are its arguments."""
    n, every = place.n_layers, list(range(place.n_layers))
    if name in ("outer", "inner"):
        k = per_side(_number(arguments, float, "a share above 0 and at most 1", lambda p: 0 < p <= 1), n)
        return [layer for layer in every if (layer < k or layer >= n - k) == (name == "outer")]
    if name in ("first", "last", "middle", "spaced", "random", "change"):
        k = _number(arguments[:1], int, f"a number of layers from 1 to {n}", lambda k: 1 <= k <= n)
        extra, allowed = arguments[1:], {"random": 1, "change": max(1, len(arguments) - 1)}
        if len(extra) > allowed.get(name, 0):
            raise InputError(f"{':'.join(extra)} is superfluous; write {name}:{k}")
        if name == "random":
            seed = _number(extra, int, "a seed, as in random:4:0", lambda _: True)
            return random.Random(f"{seed}/{n}").sample(every, k)
        if name == "change":
            return _changed(":".join(extra), k, component, place)
        if name == "spaced":
            return [(n - 1) // 2] if k == 1 else [int(i * (n - 1) / (k - 1) + 0.5) for i in range(k)]
        start = {"first": 0, "last": n - k, "middle": (n - k) // 2}[name]
        return every[start : start + k]
    if name in ("hub", "interface"):
        path, models = place.file(":".join(arguments), "layers", name)
        return layer_lists.read_layers(path, "semantic_hub" if name == "hub" else name, n, models)[0]
    if name == "matched" and len(arguments) > 1:
        seed = _number(arguments[-1:], int, "a seed, as in matched:hub:0", lambda _: True)
        wanted = _layers(arguments[0], arguments[1:-1], component, place)
        return matched.nearest(every, wanted, seed)
    if name == "all" and not arguments:
        return every
    if ".json" in name and not arguments:
        return layer_lists.read_layers(Path(name), "listed", n, None)[0]
    if not arguments and re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", name.replace(" ", "")):
        ranges = [[int(end) for end in item.split("-")] for item in name.replace(" ", "").split(",")]
        for start, *_, end in ([*ends, ends[-1]] for ends in ranges):
            if end >= n:
                raise InputError(f"layer {end} does not exist: the model has layers 0 to {n - 1}")
            if end < start:
                raise InputError(f"{start}-{end} runs backwards; write {end}-{start}")
        return [layer for ends in ranges for layer in range(ends[0], ends[-1] + 1)]
    raise InputError(f"these words mean no layers; valid are {FORMS}")


def _number(texts: list[str], kind, what: str, fits):
    try:
        (text,) = texts
        value = kind(text)
        if not fits(value):
            raise ValueError
    except ValueError:
        raise InputError(f"it needs {what}") from None
    return value


def _changed(file: str, k: int, component: str | None, place: Place) -> list[int]:
    """The k layers with the largest change of a component, or of both together, at the last step of the file."""
    path, models = place.file(file, "attn_vs_ffn", "change")
    payload, header = results.read_json(path, "attn_vs_ffn", n_layers=place.n_layers)
    base = (header.get("models") or {}).get("base")
    if models is not None and base and not any(relatives.same_model(base, model) for model in models):
        raise InputError(f"{path} is about another base, {base.get('spec')}; run weight-diff/attn_vs_ffn.py again")
    try:
        rows = payload["checkpoints"][max(payload["checkpoints"], key=int)]["layers"]
        keys = [f"{component}_mean"] if component else ["attention_mean", "ffn_mean"]
        change = [sum(rows[f"layer_{layer}"].get(key) or 0 for key in keys) for layer in range(place.n_layers)]
    except (KeyError, ValueError, TypeError, AttributeError):
        raise InputError(f"{path} lacks a change for every layer; run weight-diff/attn_vs_ffn.py again") from None
    return sorted(range(place.n_layers), key=lambda layer: (-change[layer], layer))[:k]


def _neurons(words: str, file: str, place: Place) -> Part:
    """The neurons of a language in a mask: that of the study, or FILE.json[:LANG]."""
    path, _, lang = file.partition(".json:")
    file, lang = (f"{path}.json", lang) if lang else (file, place.study.get("languages.target"))
    path, models = place.file(file, "lsn_mask", "lsn")
    languages = masks.languages_in(path)
    if lang is None:
        if len(languages) > 1:
            raise InputError(f"{path} has {', '.join(languages)}; say whose neurons: {path}:{languages[0]}")
        lang = languages[0]
    widths = ffn.widths(archs.for_config(place.config), place.config)
    neurons = masks.read(path, str(lang), place.n_layers, widths, models)
    layers = tuple(layer for layer, in_layer in neurons.items() if in_layer)
    if not layers:
        raise InputError(f"{path} has no neuron of {lang}")
    return Part(words, layers, None, neurons)
