"""The words for a part of a model: some of its layers, one component of them, or single neurons.

    layer_sets.read("hub/attention", place)      # what training files (freeze, train_only), arms and flags hold

| words | layers, of N |
|---|---|
| `outer:p` | the first and the last k, k = max(1, floor(p N / 2 + 1/2)): a share p of the layers, half on each side |
| `inner:p` | all others than `outer:p` |
| `first:k`, `last:k`, `middle:k` | k neighbours: at the input, at the output, in the middle (the lower one of two) |
| `spaced:k` | k at equal distances, the first and the last among them; of one the middle |
| `random:k:seed` | k drawn at random |
| `change:k[:FILE]` | the k that changed most, at the last step of a file of weight-diff/attn_vs_ffn.py |
| `hub[:FILE]`, `interface[:FILE]` | those of a file of layer-specialize/layer_specialize.py |
| `matched:SET:seed` | another set, of the size of SET (`hub`, ..) and nearest to its shape |
| `all`, `0,2,5-7`, `[0, 2, 5]` | every layer; a list |
| `FILE.json` | the list `layers` of a file, as layer-ablation/cogsym.py writes one |
| `lsn`, `FILE.json[:LANG]` | neurons: of the study's mask, of a file of lsn/identify.py |

Behind layers `/attention` or `/ffn` means this component of theirs alone. Files that are not named are the study's.
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
    "a list like 0,2,5-7, or a file .json of layers or of a mask; behind layers /attention or /ffn"
)


@dataclass(frozen=True)
class Part:
    """A part of a model: `layers`, of these one `component` (None: everything), or `neurons` of some of them.

    Attributes:
        words: as it was asked for.
    """

    words: str
    layers: tuple[int, ...]
    component: str | None = None
    neurons: masks.Layers | None = None

    def facts(self) -> dict:
        """What tells it from other parts, whatever words it was asked for in, as JSON can hold it."""
        neurons = {str(layer): own for layer, own in (self.neurons or {}).items() if own}
        more = {"component": self.component} if self.component else {}
        if self.neurons is not None:
            more = {"neurons": sum(map(len, neurons.values())), "neurons_sha256": digest(neurons)}
        return {"layers": list(self.layers)} | more


@dataclass(frozen=True)
class Place:
    """The model whose part is meant, and where the files are that say what hub, interface, change and lsn are.

    Attributes:
        config: its config.json.
        study: gives files that are not named; of an arm that of the plain run.
        models: `ModelRef.describe()` of the base and the run that files of the study must be about.
    """

    config: dict
    study: Study = field(default_factory=Study)
    models: list[dict] | None = None

    @property
    def n_layers(self) -> int:
        return archs.for_config(self.config).n_layers(self.config)

    def file(self, given: str, step: str, what: str) -> tuple[Path, list[dict] | None]:
        """The file that says `what`: the given one, which is trusted, or the study's, and whom it must be about."""
        if not given and not self.study:
            raise InputError(f"nothing says where the {what} are: write {what}:FILE, or run inside a study (--study)")
        return self.study.input(given or None, f"{what}:FILE", step), None if given else self.models


def read(given: str | int | list[int], place: Place) -> Part:
    """The part of the model that `given` means, see the table above.

    Raises:
        InputError: words that mean nothing, a part that the model does not have, no layer or neuron at all, or a file
            that is not there or about another model.
    """
    words = words_of(given)
    text, slash, last = words.rpartition("/")
    stem, component = (text, last) if slash and last in COMPONENTS else (words, None)
    try:
        name, *more = stem.split(":")
        if name == "lsn" or (".json" in name and not layer_lists.is_list(Path(name))):
            if component:
                raise InputError("neurons are of the FFN; leave out what is behind the slash")
            return _neurons(words, "" if name == "lsn" else stem, place)
        layers = _layers(name, more, component, place)
        if not layers:
            raise InputError("that is no layer of this model")
    except InputError as error:
        raise InputError(f"{words!r}: {error}") from None
    return Part(words, tuple(sorted(set(layers))), component)


def words_of(given: str | int | list[int] | dict) -> str:
    """What a file or a flag holds, as one text; of the key `lora` "layers=outer:0.25,r=8"."""
    if isinstance(given, dict):
        return ",".join(f"{key}={words_of(value)}" for key, value in sorted(given.items()))
    return ",".join(map(str, given)) if isinstance(given, list) else str(given).strip()


def per_side(share: float, n_layers: int) -> int:
    """Layers on each side that make `share` of all: max(1, floor(p N / 2 + 1/2)); of 30 and .25 four."""
    return max(1, int(round(share * n_layers / 2 + 0.5, 9)))  # floats make .58 of 50 a little less than 29


def _layers(name: str, more: list[str], component: str | None, place: Place) -> list[int]:
    """The layers of one form."""
    n, every = place.n_layers, list(range(place.n_layers))
    if name in ("outer", "inner"):
        k = per_side(_number(more, float, "a share above 0 and at most 1", lambda p: 0 < p <= 1), n)
        return [layer for layer in every if (layer < k or layer >= n - k) == (name == "outer")]
    if name in ("first", "last", "middle", "spaced", "random", "change"):
        k = _number(more[:1], int, f"a number of layers from 1 to {n}", lambda k: 1 <= k <= n)
        rest, known = more[1:], {"random": 1, "change": max(1, len(more) - 1)}
        if len(rest) > known.get(name, 0):
            raise InputError(f"{':'.join(rest)} is too much; write {name}:{k}")
        if name == "random":
            seed = _number(rest, int, "a seed, as in random:4:0", lambda _: True)
            return random.Random(f"{seed}/{n}").sample(every, k)
        if name == "change":
            return _changed(":".join(rest), k, component, place)
        if name == "spaced":
            return [(n - 1) // 2] if k == 1 else [int(i * (n - 1) / (k - 1) + 0.5) for i in range(k)]
        start = {"first": 0, "last": n - k, "middle": (n - k) // 2}[name]
        return every[start : start + k]
    if name in ("hub", "interface"):
        path, models = place.file(":".join(more), "layers", name)
        return layer_lists.read_layers(path, "semantic_hub" if name == "hub" else name, n, models)[0]
    if name == "matched" and len(more) > 1:
        seed = _number(more[-1:], int, "a seed, as in matched:hub:0", lambda _: True)
        wanted = _layers(more[0], more[1:-1], component, place)
        return matched.nearest(every, wanted, seed)
    if name == "all" and not more:
        return every
    if ".json" in name and not more:
        return layer_lists.read_layers(Path(name), "listed", n, None)[0]
    if not more and re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", name.replace(" ", "")):
        ranges = [[int(end) for end in one.split("-")] for one in name.replace(" ", "").split(",")]
        for start, *_, end in ([*ends, ends[-1]] for ends in ranges):
            if end >= n:
                raise InputError(f"layer {end} does not exist: the model has layers 0 to {n - 1}")
            if end < start:
                raise InputError(f"{start}-{end} runs backwards; write {end}-{start}")
        return [layer for ends in ranges for layer in range(ends[0], ends[-1] + 1)]
    raise InputError(f"these words mean no layers; there is {FORMS}")


def _number(more: list[str], kind, what: str, fits):
    try:
        (text,) = more
        value = kind(text)
        if not fits(value):
            raise ValueError
    except ValueError:
        raise InputError(f"it needs {what}") from None
    return value


def _changed(file: str, k: int, component: str | None, place: Place) -> list[int]:
    """The k layers with the largest change of a component, or of both together, at the file's last step."""
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
    """The neurons of a language in a mask: the study's, or FILE.json[:LANG]."""
    path, _, lang = file.partition(".json:")
    file, lang = (f"{path}.json", lang) if lang else (file, place.study.get("languages.target"))
    path, models = place.file(file, "lsn_mask", "lsn")
    there = masks.languages_in(path)
    if lang is None:
        if len(there) > 1:
            raise InputError(f"{path} has {', '.join(there)}; say whose neurons: {path}:{there[0]}")
        lang = there[0]
    widths = ffn.widths(archs.for_config(place.config), place.config)
    found = masks.read(path, str(lang), place.n_layers, widths, models)
    layers = tuple(layer for layer, own in found.items() if own)
    if not layers:
        raise InputError(f"{path} has no neuron of {lang}")
    return Part(words, layers, None, found)
