"""The curves of a retrieval result over hidden states: their names, and where its JSON and its `.pt` hold each."""

from __future__ import annotations

from typing import NamedTuple

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError

LENGTH = 0.5  # threshold of `length_spearman`, see `measuring_length`


class Curve(NamedTuple):
    """A measure of retrieval: its key in the JSON, its tensor [L+1, sentences] in the .pt, its name in figures."""

    key: str
    hits: str
    label: str


MEASURES = {
    "published": Curve("layer_accuracy", "hits", "published"),
    "unit": Curve("unit_accuracy", "hits_unit", "unit"),
    "centred": Curve("centred_accuracy", "hits_centred", "centred"),
    "unit_centred": Curve("unit_centred_accuracy", "hits_unit_centred", "unit, centred"),
    "mexa_weighted": Curve("mexa_weighted", "hits_mexa_weighted", "MEXA, weighted mean"),
    "mexa_last": Curve("mexa_last", "hits_mexa_last", "MEXA, last token"),
}
# Further measures of each hidden state: not accuracies, but properties that the published accuracy may rest on.
DIAGNOSTICS = {"largest_norm_share": "norm in largest token", "length_spearman": "Spearman with length"}


def measuring_length(result: dict) -> list[int]:
    """The hidden states at which the published curve measures the length of sentences; none for old results.

    There the cosines depend strongly on sentence length (the interval of Spearman's correlation is above .5), and the
    translation is found clearly more often if tokens have equal weight and languages are centred (the intervals of both
    accuracies do not overlap): length alone kept the plain mean from finding it.

    Raises:
        InputError: the result has intervals, but not for every hidden state.
    """
    keys = ("length_spearman_ci", "layer_accuracy_ci", "unit_centred_accuracy_ci")
    if any(key not in result for key in keys):
        return []
    try:
        length, published, centred = (dict(result[key]) for key in keys)
        better_centred = [state for state in length if published[state][1] < centred[state][0]]
        return sorted(state for state in better_centred if length[state][0] is not None and length[state][0] > LENGTH)
    except (LookupError, TypeError, ValueError):
        raise InputError(
            f"a retrieval result ({result.get('model_path')}) lacks intervals [[state, [low, high]], ..] of hidden "
            f"states in {', '.join(keys)}; run sentence-retrieval/sr_experiment.py again with --overwrite"
        ) from None


def tell(*results: tuple[str, dict]) -> None:
    """Warn in one sentence if the published curve of any (model, result) measures length.

    The numbers are those of the last such model.
    """
    measuring = [(model, result, states) for model, result in results if (states := measuring_length(result))]
    if not measuring:
        return
    model, result, states = measuring[-1]
    published, centred, length, share = (
        max(value for state, value in result[key] if state in states)
        for key in ("layer_accuracy", "unit_centred_accuracy", "length_spearman", "largest_norm_share")
    )
    cli.warn(
        f"{model}: at hidden states {ranges(states)} the published curve measures the length of sentences: cosines "
        f"follow it (Spearman up to {length:.2f}), one token holds up to {share:.2f} of the norm, and at most "
        f"{published:.2f} are found; with every token of length 1 and languages centred (unit_centred) up to "
        f"{centred:.2f} are" + cli.likewise([other for other, *_ in measuring[:-1]])
    )


def blocks(layers: list[int]) -> list[list[int]]:
    """The contiguous blocks of sorted `layers` as [first, last]: [3, 4, 5, 8] -> [[3, 5], [8, 8]]."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return runs


def ranges(layers: list[int]) -> str:
    """Sorted layers, or hidden states, in words: [3, 4, 5, 8] -> 3 to 5, 8."""
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in blocks(layers))
