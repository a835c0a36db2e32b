"""Do two languages call for the same weight changes? The cosine of the gradients of a sentence and its translation.

Where it is high, learning one language also improves the other. For each projection of each layer, and for attention,
the FFN and all weights as one vector: the cosine between the gradient of a sentence's loss and that of its
translation, and of another sentence's translation, which shows what the languages share whatever is said.

In:   B and RUN (default: the study's), parallel sentences.
Out:  OUT (default: the study's alignment/gradients.json): {"base" or step: {layers: {layer_<l>: {q_proj, ..}},
      attention, ffn, all, attention_minus_ffn}}, each with `cosine`, `shuffled` and `beyond`, the difference; a figure.

It takes the time of about four forward passes over the pairs, and memory for the model and two gradients as large as
its layers. A killed run resumes with the next model. On several GPUs: accelerate launch alignment/gradients.py ...;
each process measures whole models, and the numbers are the same.

Full: python alignment/gradients.py --base meta-llama/Llama-2-7b-hf --run runs/eus --base-lang eng_Latn --target-lang eus_Latn --output gradients.json
Tiny: python alignment/gradients.py --study demo/tiny.yaml
"""  # noqa: E501

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, figures, languages, results, sources, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np, torch
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import refs
from cpt_utils.measures import evaluation, matrices, over_run
from cpt_utils.models import loading
from cpt_utils.models.batching import encode, positions

SCHEMA = "gradients"
RESULTS = {"gradients": "alignment/gradients.json"}
ASKED = {"gradients": "Where do a sentence and its translation call for the same change of the weights?"}
CAPTIONS = {
    "gradients": """Part II: 1. Attention against FFN
        The cosine between the loss gradients of a sentence and its translation, minus that of a sentence and another
        sentence's translation. Top: every projection and layer, in the base and the last checkpoint. Bottom: all
        weights of attention and of the FFN over training (left: both cosines, right: their difference, with 95 %
        bootstrap intervals over pairs). A comparison of attention and the FFN that does not use weight changes.""",
}
BASE, ALL, DIFFERENCE = over_run.BASE, "all", "attention_minus_ffn"
COMPONENTS = {"attention": archs.ATTENTION, "ffn": archs.FFN}
WHOLE = (*COMPONENTS, ALL)  # over all layers
PAIRS = 100


# ---------------------------------------------------------------- the method


@dataclass(frozen=True)
class Weights:
    """The weights to take gradients with respect to: those of every projection of every layer.

    Attributes:
        places: (layer, projection) -> its matrices, each as (index of the tensor in memory, location, part).
        tensors: the tensors in memory, each once.
    """

    places: dict[tuple[int, str], list[tuple[int, archs.Location, archs.WeightSlice]]]
    tensors: list[torch.Tensor]

    @classmethod
    def of(cls, model, ref: refs.ModelRef, base: refs.ModelRef) -> Weights:
        """The weights of `model`, loaded from `ref`, with gradients enabled; `base` is the base of an adapter.

        Raises:
            InputError: weights without gradients: quantised, or not in memory.
        """
        parameters, numbers = dict(model.named_parameters(remove_duplicate=False)), {}
        places: dict = {}
        with matrices.Side(ref, base) as side:
            located = side.arch.locations(side.names, model, side.stored.shape)
            for layer in range(side.n_layers):
                for projection in side.projections(layer, None):
                    for part in side.weights(layer, projection):
                        location = located[part.tensor]
                        number = numbers.setdefault(location.name, len(numbers))
                        places.setdefault((layer, projection), []).append((number, location, part))
        tensors = [parameters[name] for name in numbers]
        for tensor in tensors:
            if tensor.is_meta or not tensor.is_floating_point():
                raise InputError(f"{ref.spec} is quantised or does not fit into memory: it has no gradients")
            tensor.requires_grad_(True)
        return cls(places, tensors)

    def products(self, one: tuple, other: tuple) -> torch.Tensor:
        """The inner products of two gradients, float64 [places]; an entry of None counts as zero."""
        totals = []
        for pieces in self.places.values():
            total = 0.0
            for number, location, part in pieces:
                if one[number] is not None and other[number] is not None:
                    a, b = (part.take(location.view(gradient[number])) for gradient in (one, other))
                    wide = torch.promote_types(a.dtype, torch.float32)  # rows in float32 or better, the rest in float64
                    total += float((a.to(wide) * b.to(wide)).sum(-1).sum(dtype=torch.float64))
            totals.append(total)
        return torch.tensor(totals, dtype=torch.float64)

    def regions(self) -> dict[str, list[int]]:
        """Region treated as one vector (`layer_0.q_proj`, `layer_0.attention`, `attention`, `all`) -> its places."""
        regions: dict[str, list[int]] = {}
        for index, (layer, projection) in enumerate(self.places):
            component = next((name for name, members in COMPONENTS.items() if projection in members), None)
            names = [f"layer_{layer}.{projection}", *([f"layer_{layer}.{component}", component] if component else [])]
            for region in (*names, ALL):
                regions.setdefault(region, []).append(index)
        return regions


def gradient(model, ids: list[int], tensors: list[torch.Tensor]) -> tuple:
    """The gradient of a sentence's mean NLL over its tokens except the first, with respect to each of `tensors`."""
    inputs = torch.tensor([ids], device=loading.input_device(model))
    with torch.enable_grad():
        logits = model(input_ids=inputs, use_cache=False).logits[0, :-1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = torch.nn.functional.cross_entropy(logits, inputs[0, 1:].to(logits.device))
        return torch.autograd.grad(loss, tensors, allow_unused=True)


def cosines(model, weights: Weights, pairs: list[tuple[list[int], list[int]]]) -> dict[str, dict[str, list[float]]]:
    """The cosines of every region, [pairs] each: "cosine" within pair i, "shuffled" between i's sentence and the
    translation of i - 1 (of the last pair for the first). A zero gradient has cosine 0 with all others.

    No more than two gradients are held at a time: each is as large as the model.
    """
    last = gradient(model, pairs[-1][1], weights.tensors)
    last_size, rows = weights.products(last, last), []
    for source, translation in cli.progress(pairs, "gradients", unit="pair"):
        current = gradient(model, source, weights.tensors)
        size = weights.products(current, current)
        shuffled = [weights.products(current, last), size, last_size]
        del last  # before the next one is made
        last = gradient(model, translation, weights.tensors)
        last_size = weights.products(last, last)
        rows.append(torch.stack([weights.products(current, last), size, last_size, *shuffled]))
        del current
    sums = torch.stack(rows)  # [pairs, 6, places]
    by_kind: dict[str, dict[str, list[float]]] = {"cosine": {}, "shuffled": {}}
    for region, places in weights.regions().items():
        of_region = sums[:, :, places].sum(-1)
        for kind, (product, a, b) in zip(by_kind, (of_region[:, :3].T, of_region[:, 3:].T), strict=True):
            size = (a * b).sqrt()
            by_kind[kind][region] = torch.where(size == 0, 0.0, product / size).tolist()  # NaN stays, and is refused
    return by_kind


def draw_pairs(pairs: sources.ParallelText, n: int, seed: int) -> list[int]:
    """`n` of the pairs (or all, if fewer) in random order, no sentence twice, so neighbouring pairs always differ.

    Raises:
        InputError: fewer than two pairs.
    """
    alone = pairs.alone
    if min(n, len(alone)) < 2:
        raise InputError(f"gradients need at least two pairs of different sentences, not {min(n, len(alone))}")
    return random.Random(f"{seed}/gradients").sample(alone, min(n, len(alone)))


def summarize(units: dict[str, dict[str, dict[str, list[float]]]], seed: int) -> dict[str, dict]:
    """The payload, from `units`: model -> "cosine" or "shuffled" -> region -> [pairs].

    Intervals: bootstrap over pairs, with the same draws for all regions and models, so differences are paired.
    """
    by_model: dict[str, dict] = {}
    for name, kinds in units.items():
        content: dict = {"layers": {}}
        beyond = {region: np.subtract(kinds["cosine"][region], kinds["shuffled"][region]) for region in kinds["cosine"]}
        for region, values in zip(beyond, _means(list(beyond.values()), seed), strict=True):
            row = {kind: float(np.mean(kinds[kind][region])) for kind in kinds} | {"beyond": values}
            layer, _, projection = region.rpartition(".")
            (content["layers"].setdefault(layer, {}) if layer else content)[projection] = row
        both = [beyond[component] for component in COMPONENTS if component in beyond]
        if len(both) == 2:
            content[DIFFERENCE] = {"beyond": _means([both[0] - both[1]], seed)[0]}
        if name == BASE:
            at_base = beyond
        else:
            whole = [region for region in WHOLE if region in beyond]
            for region, change in zip(whole, _means([beyond[r] - at_base[r] for r in whole], seed), strict=True):
                content[region]["change"] = change
        by_model[name] = content
    return by_model


def _means(series: list, seed: int) -> list[dict]:
    low, high = stats.bootstrap_means(np.stack(series), seed)
    ends = zip(series, low, high, strict=True)
    return [{"mean": float(np.mean(values)), "ci_low": float(a), "ci_high": float(b)} for values, a, b in ends]


# ---------------------------------------------------------------- the figure


def draw(path: Path, found: dict[str, dict]) -> None:
    """The excess over shuffled pairs by projection and layer, in base and last checkpoint; both cosines over steps."""
    layers = found[BASE]["layers"]
    n = 1 + max(int(layer.removeprefix("layer_")) for layer in layers)  # some layers may have no projections
    rows = [name for name in (*archs.PROJECTIONS, archs.ROUTER) if any(name in layer for layer in layers.values())]
    names = list(dict.fromkeys((BASE, list(found)[-1])))

    def values(name: str):
        cells = [found[name]["layers"].get(f"layer_{layer}", {}) for layer in range(n)]
        return np.array([[cell[row]["beyond"]["mean"] if row in cell else np.nan for cell in cells] for row in rows])

    maps = {name: values(name) for name in names}
    bound = max(float(np.nanmax(np.abs(cells))) for cells in maps.values()) or 1.0
    with figures.style() as plt:
        fig = plt.figure(figsize=(figures.PAGE, 2.2 + (0.6 + 0.16 * len(rows)) * len(names)))
        grid = fig.add_gridspec(len(names) + 1, 2, height_ratios=[*[0.6 + 0.16 * len(rows)] * len(names), 2.2])
        axes = [fig.add_subplot(grid[i, :]) for i in range(len(names))]
        for axis, (name, cells) in zip(axes, maps.items(), strict=True):
            image = figures.heat_map(axis, cells, rows, [str(i) for i in range(n)], bound)
            figures.layer_axis(axis, n)
            axis.set_title("base" if name == BASE else f"step {name}")
        fig.colorbar(image, ax=axes, label="cosine beyond\nshuffled pairs", aspect=30, pad=0.01)
        _over_steps(fig.add_subplot(grid[-1, 0]), fig.add_subplot(grid[-1, 1]), found)
        figures.save(fig, path)


def _over_steps(left, right, by_model: dict[str, dict]) -> None:
    steps = [0 if name == BASE else int(name) for name in by_model]
    for component, marker in zip(COMPONENTS, "so", strict=True):
        if component not in by_model[BASE]:
            continue
        rows, label = [row[component] for row in by_model.values()], {"attention": "attention", "ffn": "FFN"}[component]
        look = {"color": figures.colour(component), "marker": marker}
        left.plot(steps, [row["cosine"] for row in rows], label=label, **look)
        left.plot(steps, [row["shuffled"] for row in rows], "--", label=f"{label}, shuffled pairs", **look)
        right.plot(steps, [row["beyond"]["mean"] for row in rows], **look)
        ends = [[row["beyond"][end] for row in rows] for end in ("ci_low", "ci_high")]
        right.fill_between(steps, *ends, color=look["color"], alpha=0.2, linewidth=0)
    right.axhline(0, color=figures.colour("chance"), linewidth=0.6)
    for axis, axis_label in ((left, "cosine of gradients"), (right, "beyond shuffled pairs")):
        axis.set_xlabel("training step (0 = base)")
        axis.set_ylabel(axis_label)
        axis.locator_params(axis="x", nbins=6)
    left.legend(loc="best")


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("--base-lang", metavar="LANG", help="default: the study's languages.base")
    add("--target-lang", metavar="LANG", help="default: the study's languages.target")
    text = f"pairs of sentences, drawn at random; default: the study's alignment.gradients.pairs, else {PAIRS}"
    add("--pairs", type=cli.positive, metavar="N", help=text)
    over_run.add_flags(p, RESULTS["gradients"], batch_size=0)
    sources.add_flags(p)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    run = over_run.OverRun.of(args, study, "gradients")
    pairs, facts = pairs_from_arguments(args, study)

    def measured(model, ref: refs.ModelRef, tokenizer) -> dict:
        weights = Weights.of(model, ref, run.models[BASE])
        by_kind = cosines(model, weights, tokens(model, tokenizer, pairs))
        for kind, regions in by_kind.items():  # refuses values that are not finite
            evaluation.record(regions, f"{ref.spec}, {kind}")
        return by_kind

    run.measure(SCHEMA, facts, measured, lambda units, request: write(run.output, units, request))


def pairs_from_arguments(args, study: Study) -> tuple[list[tuple[str, str]], dict]:
    """The sentence pairs, and the facts about them for a request."""
    codes = evaluation.languages_from_arguments(args, study, {})
    if not all(codes.values()):
        raise InputError("the languages are not given: give --base-lang and --target-lang, or a study file")
    text = sources.from_arguments(argparse.Namespace(**vars(args), limit=None), study, *codes.values())
    cli.say(text.summary())
    drawn = draw_pairs(text, int(study.value(args.pairs, "--pairs", "alignment.gradients.pairs", PAIRS)), study.seed)
    facts = {f"{side}_lang": languages.canonical(code, any_tag=True) for side, code in codes.items()}
    facts |= {"data": text.describe(), "pairs": [text.ids[i] for i in drawn]}
    return [(text.base[i], text.target[i]) for i in drawn], facts


def tokens(model, tokenizer, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Token ids of both sides of every pair.

    Raises:
        InputError: a sentence without a token to predict.
    """
    sides = [encode(tokenizer, list(texts), positions(model)).ids for texts in zip(*pairs, strict=True)]
    for texts, both in zip(pairs, zip(*sides, strict=True), strict=True):
        for text, ids in zip(texts, both, strict=True):
            if len(ids) < 2:
                raise InputError(f"a sentence of fewer than two tokens has no gradient: {text[:60]!r}")
    return list(zip(*sides, strict=True))


def write(output: Path, units: dict[str, dict[str, dict[str, list[float]]]], request: dict) -> None:
    payload = summarize(units, request["seed"])
    draw(output.with_suffix(""), payload)
    facts = over_run.header_facts(request, "base_lang", "target_lang", "data", "pairs")
    results.write_json(output, payload, results.header(SCHEMA, **facts))
    for name, row in payload.items():
        shown = ", ".join(
            f"{region} {row[region]['cosine']:.3f} ({row[region]['beyond']['mean']:+.3f} beyond shuffled pairs)"
            for region in WHOLE
            if region in row
        )
        cli.say(f"{'base' if name == BASE else f'step {name}'}: {shown}")
    cli.say(f"wrote {output} and the figure {output.with_suffix('.pdf')}")


if __name__ == "__main__":
    cli.run(main)
