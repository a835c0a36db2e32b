"""The report of steering/steer.py: rates and harmonic means with intervals, the best layer on other sentences, figure.

A score is the harmonic mean of two means, never the mean of harmonic means. Layer and alpha are chosen on the sentences
0, 2, .. and reported on 1, 3, .., for random directions, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cpt_utils.base import cli, figures, stats
from cpt_utils.base.lazy import np, torch

DRAWS = 2000
CONTROLS = ("random", "lape", "prompt", "none")
SHOWN = 5  # sentences whose continuations are in the result
WORDS = {"score": "score", "language": "in the new\nlanguage", "relevance": "relevance",
         "nll_reference": "NLL of the reference\n(nats per byte)"}  # fmt: skip
LINES = {"none": ("nothing done", ":", "base"), "prompt": ("prompt alone", "-.", "base"),
         "lape": ("neurons (grey: random ones)", "--", "ffn"), "lape_random": (None, "--", "random")}  # fmt: skip


def harmonic(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The harmonic mean of two arrays of shares, 0 where both are 0."""
    total = one + other
    return np.divide(2 * one * other, total, out=np.zeros_like(total), where=total > 0)


class Scores:
    """Means over the sentences `part` of `n`, and over resamples of them, the same for all records."""

    def __init__(self, n: int, seed: int, part: slice):
        self.part, count = part, len(range(n)[part])
        self.weights = np.vstack([np.ones(count), stats.resample_weights(count, seed, DRAWS)]).T / count

    def of(self, records: Sequence[dict]) -> dict[str, np.ndarray]:
        """Measure -> [1 + DRAWS], averaged over records; the sentences themselves come first. A negative mean relevance
        counts as 0; `score` is computed per record."""
        means = {
            name: np.array([record["units"][name] for record in records], dtype=np.float64)[:, self.part] @ self.weights
            for name in records[0]["units"]
        }
        if "language" in means:
            means["relevance"] = means["relevance"].clip(min=0)
            means["score"] = harmonic(means["language"], means["relevance"])
        return {name: values.mean(0) for name, values in means.items()}


def in_words(drawn: np.ndarray) -> dict:
    """A value and its interval, in the form of the results, from [1 + DRAWS]."""
    return stats.with_interval(drawn[0], drawn[1:])


def summarize(records: list[dict], translation, seed: int) -> tuple[dict, dict]:
    """The payload from the records of all conditions, and the tensors of the .pt (measure -> [conditions, sentences]).

    Args:
        translation: its `base` and `target` are the sentences.
    """
    n, units = len(translation.base), list(records[0]["units"])
    payload = {"decides": "score" if "language" in units else "nll_reference", "n": n}
    payload |= {"n_layers": len(records[0]["residual"]["norm"])}
    payload["what"] = [[record[key] for key in ("model", "name", "layer", "alpha", "draw")] for record in records]
    parts = [Scores(n, seed, slice(*part)) for part in ((None,), (0, None, 2), (1, None, 2))]
    for model in dict.fromkeys(record["model"] for record in records):
        of_this = [record for record in records if record["model"] == model]
        for key, content in of_model(of_this, translation, payload["decides"], *parts).items():
            payload.setdefault(key, {})[model] = content
    return payload, {name: torch.tensor([record["units"][name] for record in records]) for name in units}


def of_model(records: list[dict], translation, decides: str, every: Scores, chosen: Scores, held: Scores) -> dict:
    """The results of one model: on `every` sentence, and on those `held` out from the choice made on `chosen`."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault((record["name"], record["layer"], record["alpha"]), []).append(record)
    content: dict = {"sweep": {}, "whole": {}}
    for (name, layer, alpha), group in groups.items():
        values = {measure: in_words(drawn) for measure, drawn in every.of(group).items()}
        if layer is None:
            content["whole"][name] = values
        else:
            content["sweep"].setdefault(f"layer_{layer}", {}).setdefault(name, {})[f"{alpha:g}"] = values
    sign, first = 1 if decides == "score" else -1, {name: group[0] for (name, *_), group in groups.items()}
    for name in ("diffmean", "random"):
        rows = [record for record in records if record["name"] == name]
        first[name] = max(rows, key=lambda record: sign * chosen.of([record])[decides][0])
    values = {name: held.of([record]) for name, record in first.items()}
    content["best"] = {
        name: {key: first[name][key] for key in ("layer", "alpha")} | {m: in_words(d) for m, d in values[name].items()}
        for name in ("diffmean", "random")
    }  # fmt: skip
    content["beyond"] = {
        name: in_words(sign * (values["diffmean"][decides] - values[name][decides]))
        for name in CONTROLS if name in values
    }  # fmt: skip
    of_layers = first["none"]["residual"].items()
    content["residual"] = {key: {f"layer_{i}": value for i, value in enumerate(row)} for key, row in of_layers}
    pairs = enumerate(zip(translation.base[:SHOWN], translation.target[:SHOWN], strict=True))
    content["samples"] = [
        {"source": source, "reference": reference}
        | {name: first[name]["texts"][i] for name in ("none", "prompt", "diffmean")}
        for i, (source, reference) in (pairs if first["none"]["texts"] else ())
    ]  # fmt: skip
    return content


# ---------------------------------------------------------------- figure and messages


def draw(path: Path, payload: dict) -> None:
    """Score, language and relevance over layers, a column each for the base and the last two checkpoints."""
    models = [*payload["sweep"]]
    models = models[:1] + models[1:][-2:]
    rows = [name for name in WORDS if name in payload["whole"][models[0]]["none"]]
    rows = rows[:-1] if len(rows) > 1 else rows  # only losses if nothing was generated
    with figures.style() as plt:
        size = figures.PAGE, 0.9 + 1.3 * len(rows)
        fig, axes = plt.subplots(len(rows), len(models), figsize=size, sharex=True, sharey="row", squeeze=False)
        for column, model in enumerate(models):
            axes[0][column].set_title("base" if model == "base" else f"step {model}")
            for axis, measure in zip(axes[:, column], rows, strict=True):
                _panel(axis, payload["sweep"][model], payload["whole"][model], measure)
            figures.layer_axis(axes[-1][column], payload["n_layers"])
        for axis, measure in zip(axes[:, 0], rows, strict=True):
            axis.set_ylabel(WORDS[measure])
            if measure != "nll_reference":
                axis.set_ylim(bottom=-0.03)
        fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figures.save(fig, path)


def _panel(axis, sweep: dict, whole: dict, measure: str) -> None:
    layers = [int(layer.removeprefix("layer_")) for layer in sweep]
    by = {name: {alpha: [row[name][alpha][measure]["value"] for row in sweep.values()] for alpha in alphas}
          for name, alphas in (next(iter(sweep.values())) if sweep else {}).items()}  # fmt: skip
    if "random" in by:
        random = np.array(list(by["random"].values()))
        look = {"color": figures.colour("random"), "linewidth": 0}
        axis.fill_between(layers, random.min(0), random.max(0), alpha=0.3, **look)
        axis.plot(layers, random.mean(0), color=figures.colour("random"), label="random directions")
    along = by.get("diffmean", {})
    named = {*along} if len(along) <= 4 else {[*along][i] for i in (0, len(along) // 2, -1)}
    for (alpha, values), shade, mark in zip(
        along.items(), figures.colours(len(along), ordered=True), figures.MARKERS * len(along), strict=False
    ):
        axis.plot(layers, values, marker=mark, color=shade, label=f"DiffMean × {alpha}" if alpha in named else None)
    for name, (label, line, colour) in LINES.items():
        if name in whole:
            axis.axhline(whole[name][measure]["value"], linestyle=line, linewidth=1, color=figures.colour(colour),
                         label=label)  # fmt: skip


def say(payload: dict) -> None:
    """Report for every model: unsteered, with the prompt, and with the best direction on sentences not used to choose
    it."""
    decides = payload["decides"]
    for model, whole in payload["whole"].items():
        values = {name: row[decides]["value"] for name, row in whole.items()}
        parts = [f"{name} {values[name]:.3f}" for name in LINES if name in values]
        for name, row in payload["best"][model].items():
            parts.append(f"{name} {row[decides]['value']:.3f} (layer {row['layer']}, × {row['alpha']:g})")
        beyond = payload["beyond"][model].get("random")
        if beyond:
            parts.append(f"beyond random {stats.told(beyond, '+.3f')}")
        cli.say(f"{'base' if model == 'base' else f'step {model}'}, {decides}: {', '.join(parts)}")
