"""Masks of language-specific neurons: `{language: {layer: [neurons]}}` in a JSON file, and random controls for them.

`lsn/identify.py` writes them; every language and every layer is present, even without neurons. A neuron is an index
into the FFN width: a row of gate and up, a column of down. In memory, layers are integers: `{lang: {0: [4, 17]}}`.
If layers differ in width (experts beside dense layers), functions take all widths, and files state the largest.
"""

from __future__ import annotations

import bisect
import os
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from cpt_utils.base import languages, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np
from cpt_utils.checkpoints import relatives

SCHEMA = "lsn-mask"
LAPE = "lape"  # the default method of identifying neurons
CLOSE = 5  # number of neurons nearest in rate to draw from: more differ in activity, fewer make draws too similar

Layers = dict[int, list[int]]


def languages_in(path: str | os.PathLike) -> list[str]:
    """The languages of a mask file, in its spelling and order."""
    return list(_load(path)[0])


def read(
    path: str | os.PathLike,
    lang: str,
    n_layers: int,
    ffn_width: int | Sequence[int],
    models: list[dict] | None = None,
    control: bool | None = None,
    instead: str = "give its mask",
) -> Layers:
    """The neurons of one language: every layer from 0 to n_layers - 1, in order, with its sorted neurons (or none).

    Args:
        lang: a language of the file, in any spelling.
        ffn_width: neurons per layer, one number for all or one for each.
        models: `ModelRef.describe()` of the models the mask is used on; it must be about one of them or their run.
        control: True for a random control mask, False for a mask of language-specific neurons, None for either. A file
            without a header (from the published scripts) is taken on trust, with one warning.
        instead: an alternative to a mask of another model, for the message.

    Raises:
        InputError: no mask file, one of another model, layer count or width, a mask where a control is needed or vice
            versa, a missing language (the message names the others), or a neuron that the model does not have.
    """
    payload, header = _load(path)
    widths = by_layer(ffn_width, n_layers)
    for fact, expected in (("n_layers", n_layers), ("ffn_width", max(widths))):
        if header.get(fact, expected) != expected:
            raise InputError(
                f"{path} was made for {fact} {header[fact]}, but {expected} is needed; give the mask of this model"
            )
    made_for = (header.get("models") or {}).get("model")
    if made_for and models is not None and not relatives.belongs(made_for, models):
        raise InputError(
            f"{path} was made for {made_for.get('spec')}, which is none of the models asked for ("
            f"{', '.join(model['spec'] for model in models[:3])}{', ..' if len(models) > 3 else ''}), or was trained "
            f"again since; run lsn/activation.py and lsn/identify.py on this model, or {instead}"
        )
    if header and control is not None and bool(header.get("control")) != control:
        kinds = {True: "a random control mask", False: "a mask of language-specific neurons"}
        raise InputError(f"{path} is {kinds[not control]}, but {kinds[control]} is needed; lsn/identify.py writes both")
    return _checked(path, lang, payload[languages.find(payload, lang, what=str(path))], widths)


def by_layer(ffn_width: int | Sequence[int], n_layers: int) -> list[int]:
    """The number of neurons of each layer, from one number for all or one for each."""
    return [ffn_width] * n_layers if isinstance(ffn_width, int) else list(ffn_width)


def read_both(
    path: Path | None,
    control: Path | None,
    lang: str,
    n_layers: int,
    ffn_width: int | Sequence[int],
    models: list[dict] | None = None,
    instead: str = "give its mask",
) -> tuple[Layers | None, Layers | None]:
    """The language's neurons and those of the random control, None without a file; see `read`.

    Raises:
        InputError: the language has no neuron, or the control belongs to another mask.
    """
    specific, controls = (
        read(file, lang, n_layers, ffn_width, models, control=is_control, instead=instead) if file else None
        for file, is_control in ((path, False), (control, True))
    )
    if not any((specific or controls).values()):
        raise InputError(
            f"{path or control} has no neuron of {lang}, so there is nothing to follow; identify more neurons "
            "(lsn/identify.py --rate, in a study the key lsn.rate), or choose another --lang"
        )
    for layer, neurons in specific.items() if specific and controls else ():
        drawn = controls[layer]
        if len(drawn) != len(neurons) or set(drawn) & set(neurons):
            what = f"{len(drawn)} neurons" if len(drawn) != len(neurons) else "neurons of the mask"
            raise InputError(
                f"{control} has {what} in layer {layer}, where {path} has {len(neurons)}: it is the control of another "
                "mask; run lsn/identify.py again for both"
            )
    return specific, controls


def is_control(path: str | os.PathLike) -> bool | None:
    """Whether a mask file is a random control; None if its header does not say so, or it has none."""
    return _load(path)[1].get("control")


def counted(path: str | os.PathLike) -> dict[str, dict]:
    """The facts in the header of a mask on the counts it was made from, by language; {} if there are none."""
    return _load(path)[1].get("tokens") or {}


def of_method(place: Path | None, method: str) -> Path | None:
    """The path of a result for the neurons of `method`, given that for LAPE's, `place`: `<place>.<method>.json`."""
    return place if place is None or method == LAPE else place.with_suffix(f".{method}.json")


def how(method: str) -> str:
    """The flag of lsn/identify.py and lsn/deactivate.py for a method, with a space before it."""
    return "" if method == LAPE else f" --method {method}"


def control_beside(path: Path) -> Path | None:
    """The control mask beside a mask, `<mask>.control.json`; None if it does not exist."""
    control = path.with_suffix(".control.json")
    return control if control.is_file() else None


def random_control(
    mask: dict[str, Layers], n_layers: int, ffn_width: int | Sequence[int], seed: int | str = 42
) -> dict[str, Layers]:
    """For each language and layer as many neurons as its mask has, drawn at random outside every language's mask.

    Each language and layer is drawn separately, whatever the order of languages. Controls of two languages may share
    neurons. The neurons of all experts of a layer are equally likely.

    Raises:
        InputError: a layer has fewer neurons outside the masks than a language has inside.
    """
    outside = _outside(mask, by_layer(ffn_width, n_layers))
    control: dict[str, Layers] = {}
    for lang, layers in mask.items():
        control[lang] = {}
        for layer in range(n_layers):
            count = len(layers.get(layer, ()))
            # Seeded with a text: Python hashes it the same way everywhere, and the draws of layers are independent.
            control[lang][layer] = sorted(random.Random(f"{seed}/{lang}/{layer}").sample(outside[layer], count))
    return control


def active_control(
    mask: dict[str, Layers], lang: str, rates: np.ndarray, ffn_width: int | Sequence[int], seed: int | str = 42
) -> Layers:
    """As many neurons in each layer as `lang` has, about as active as those, outside every language's mask.

    In random order, each neuron of a layer gets a partner, drawn from the CLOSE neurons nearest in rate that are
    outside all masks and not taken yet (ties in random order). If none is close in rate, the nearest are used all the
    same: compare the mean rates.

    Args:
        rates: the share of the language's tokens on which each neuron is active, [layers, neurons].

    Raises:
        InputError: a layer has fewer neurons outside the masks than a language has inside.
    """
    control: Layers = {}
    for layer, outside in _outside(mask, by_layer(ffn_width, len(rates))).items():
        specific, rng = sorted(mask[lang].get(layer, ())), random.Random(f"{seed}/active/{lang}/{layer}")
        ties = random.Random(f"{seed}/ties/{lang}/{layer}")
        left = sorted((float(rates[layer][neuron]), ties.random(), neuron) for neuron in outside)
        control[layer] = []
        for neuron in rng.sample(specific, len(specific)):
            rate = float(rates[layer][neuron])
            at = bisect.bisect_left(left, (rate,))
            near = sorted(left[max(0, at - CLOSE) : at + CLOSE], key=lambda other, to=rate: abs(other[0] - to))
            partner = rng.choice(near[:CLOSE])
            left.remove(partner)
            control[layer].append(partner[2])
        control[layer].sort()
    return control


def _outside(mask: dict[str, Layers], widths: Sequence[int]) -> Layers:
    """The sorted neurons of each layer in no language's mask; refused if too few for the control of any language."""
    outside = {
        layer: sorted(set(range(width)).difference(*(layers.get(layer, ()) for layers in mask.values())))
        for layer, width in enumerate(widths)
    }
    for lang, layers in mask.items():
        for layer, free in outside.items():
            n = len(layers.get(layer, ()))
            if n > len(free):
                raise InputError(
                    f"layer {layer} has {len(free)} of {widths[layer]} neurons outside the mask, but the control of "
                    f"{lang} needs {n}; identify fewer neurons with a lower --rate"
                )
    return outside


def write(path: str | os.PathLike, mask: dict[str, Layers], control: bool = False, **facts) -> None:
    """Write a mask file; `facts` go into its header: `models` ({"model": describe()}), `n_layers`, `ffn_width`, .."""
    payload = {
        lang: {str(layer): [int(neuron) for neuron in layers[layer]] for layer in sorted(layers)}
        for lang, layers in mask.items()
    }
    results.write_json(path, payload, results.header(SCHEMA, **facts, control=control))


def _load(path: str | os.PathLike) -> tuple[dict, dict]:
    """Payload and header of a mask file. An unchanged file is read only once, so a missing header is one warning."""
    try:
        state = os.stat(path)
    except OSError:
        return results.read_json(path, SCHEMA)  # raises its error
    return _load_state(Path(path), (state.st_mtime_ns, state.st_ino, state.st_size))


@lru_cache(maxsize=4)
def _load_state(path: Path, _state: tuple[int, ...]) -> tuple[dict, dict]:
    start = b""
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(2)
    if start in (b"PK", b"\x80\x02"):  # how torch.save begins
        raise InputError(
            f"{path} was saved by torch, as LAPE saves masks, and does not name its languages; name them in its order: "
            f"python lsn/lape_mask.py {path} -l en,zh,.. -o mask.json, and give mask.json"
        )
    payload, header = results.read_json(path, SCHEMA)
    if not isinstance(payload, dict) or not payload or not all(isinstance(v, dict) for v in payload.values()):
        raise InputError(f"{path} holds no masks {{language: {{layer: [neurons]}}}}; give a file of lsn/identify.py")
    return payload, header


def _checked(path: str | os.PathLike, lang: str, layers: dict, widths: list[int]) -> Layers:
    """One language's entry with integer layers; refused if it does not fit the model."""
    n_layers = len(widths)
    if set(layers) != {str(layer) for layer in range(n_layers)}:
        raise InputError(
            f"{path} has {len(layers)} layers for {lang}, but the model has {n_layers}, 0 to {n_layers - 1}; "
            "give the mask of this model (every layer is listed, an empty one too)"
        )
    checked: Layers = {}
    for layer in range(n_layers):
        neurons = layers[str(layer)]
        if not isinstance(neurons, list) or any(type(neuron) is not int for neuron in neurons):
            raise InputError(f"{path}: layer {layer} of {lang} is not a list of neuron numbers; make the mask again")
        invalid = [neuron for neuron in neurons if not 0 <= neuron < widths[layer]]
        if invalid or len(set(neurons)) != len(neurons):
            what = f"neuron {invalid[0]}, but the model has 0 to {widths[layer] - 1}" if invalid else "a neuron twice"
            raise InputError(f"{path}: layer {layer} of {lang} names {what}; give the mask of this model")
        checked[layer] = sorted(neurons)
    return checked
