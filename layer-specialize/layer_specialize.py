"""Which layers are interface layers and which are the semantic hub, from retrieval accuracy by layer (step 2).

The accuracies of the L layers are split in two groups with the smallest sum of squares within them (two-means, solved
exactly). The group with the lower mean is the interface, the higher one the semantic hub.

In:   one retrieval result, sentence-retrieval's <model id>.json, and next to it <model id>.pt with the hits of every
      sentence (without it there is no label stability) and untrained.json, .pt of the twin, which the model must beat
      at retrieval (without them this is not checked). Inside a study: the result of the run's last checkpoint.
Out:  OUT with `interface_layers`, `semantic_layers`, centres, threshold, silhouette, blocks of the hub and label
      stability; next to it a figure (PDF, PNG). Outside a study and without -o the layers are printed as JSON instead.

Full: python layer-specialize/layer_specialize.py artifacts/eng_Latn-eus_Latn/cpt__checkpoint-5000.json -o layers.json
Tiny: python layer-specialize/layer_specialize.py --study demo/tiny.yaml
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import textwrap
from pathlib import Path

from cpt_utils.base import cli, figures, languages, results, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np
from cpt_utils.base.study import Study, dotted
from cpt_utils.checkpoints import beside, refs
from cpt_utils.measures import curves, gate

SCHEMA = "layer-specialize"
RESULTS = {"layers": "layer-specialize/layers.json"}
ASKED = {"layers": "Which layers find translations (the semantic hub), and which hardly do (the interface)?"}
CAPTIONS = {
    "layers": """Part I: 2. Layer specialization
        The layers of the last checkpoint split by two-means on their retrieval accuracy: the cluster with the lower
        centre is the interface, the other the semantic hub. The line is the threshold between them. A layer's stability
        is how often it keeps its label when sentences are resampled; a split with unstable layers says little about
        those layers. The strips at the bottom are the same split by each measure of retrieval: where they differ, so
        does the hub, which need not be contiguous.""",
}
# Accuracies are counts of sentences over n; differences below a millionth of a sentence share are float rounding.
EQUAL = 1e-6
# Splits whose sums of squares agree within this share of the total are tied; their underlying counts tie exactly.
TIED = 1e-12


# ---------------------------------------------------------------- the method


def two_means(profiles: np.ndarray) -> np.ndarray:
    """The best split of each profile [.., L] into two groups: True [.., L] where an entry is in the higher group.

    In one dimension the optimum is a cut of the sorted values, so all L-1 cuts are tried. The smallest sum of squares
    within groups has the largest one between them, n_low n_high / L (mean_high - mean_low)^2. Equal values stay
    together, and of tied cuts the one with the fewest entries in the lower group is taken, so the order of entries
    does not matter.

    A profile that does not vary has no split: all its entries are False.
    """
    profiles = np.asarray(profiles, dtype=np.float64)
    size = profiles.shape[-1]
    ordered = np.sort(profiles, axis=-1)
    centred = ordered - ordered.mean(-1, keepdims=True)
    n_low = np.arange(1, size)
    low = np.cumsum(centred, axis=-1)[..., :-1]
    high = centred.sum(-1, keepdims=True) - low
    between = n_low * (size - n_low) / size * (high / (size - n_low) - low / n_low) ** 2
    between[np.diff(ordered, axis=-1) <= EQUAL / size] = -1
    total = (centred**2).sum(-1, keepdims=True)
    cut = (between >= between.max(-1, keepdims=True) - TIED * total).argmax(-1)[..., None]
    lowest = np.take_along_axis(ordered, cut + 1, axis=-1)
    return (profiles >= lowest) & (ordered[..., -1:] - ordered[..., :1] > EQUAL)


def silhouette(values: np.ndarray, high: np.ndarray) -> float:
    """The mean silhouette of two groups of values [L] (Rousseeuw 1987); an entry alone in its group counts 0."""
    distance = np.abs(values[:, None] - values[None, :])
    same = high[:, None] == high[None, :]
    within = (distance * same).sum(1) / np.maximum(same.sum(1) - 1, 1)
    between = (distance * ~same).sum(1) / (~same).sum(1)
    widths = np.where(same.sum(1) > 1, (between - within) / np.maximum(np.maximum(within, between), 1e-300), 0.0)
    return float(widths.mean())


def label_stability(hits: np.ndarray, high: np.ndarray, seed: int, draws: int) -> tuple[list[float], int]:
    """How often each layer keeps its label when sentences are resampled with replacement.

    Args:
        hits: 0/1 [L, n], whether each sentence was retrieved at each layer.
        high: the labels [L] on all sentences, True for the hub.

    Returns:
        the share [L] of resamples that keep the label, and the number of resamples counted: one in which all layers
        are equally good has no split and does not count.
    """
    n = hits.shape[1]
    columns = hits.T.astype(np.float64)
    kept, counted = np.zeros(len(high)), 0
    block = max(1, min(draws, (1 << 22) // n))  # 32 MB of weights at a time
    for start in range(0, draws, block):
        weights = stats.resample_weights(n, seed + start, min(block, draws - start))
        labels = two_means(weights @ columns / n)
        labels = labels[labels.any(1)]
        kept += (labels == high).sum(0)
        counted += len(labels)
    if counted == 0:
        raise InputError("in no resample of the sentences do the layers differ; there are too few sentences")
    return (kept / counted).tolist(), counted


def specialize(accuracy: np.ndarray) -> dict:
    """Interface and hub from the accuracies [L] of the layers' outputs h_1 .. h_L, with statistics of the split.

    Raises:
        InputError: fewer than two layers, an accuracy that is not a number, or accuracies that are all equal.
    """
    accuracy = np.asarray(accuracy, dtype=np.float64)
    if len(accuracy) < 2:
        raise InputError(f"{len(accuracy)} layer cannot be split in two; at least two layers are needed")
    if not np.isfinite(accuracy).all():
        layer = int(np.argmin(np.isfinite(accuracy)))
        raise InputError(f"the accuracy of layer {layer} is not a number; run retrieval again")
    if np.ptp(accuracy) <= EQUAL:
        raise InputError(
            f"all {len(accuracy)} layers have the accuracy {accuracy[0]:.6g}: there is nothing to split; "
            "look at the retrieval figure (too easy a set, or a model that knows neither language)"
        )
    high = two_means(accuracy)
    hub = np.flatnonzero(high).tolist()
    centres = accuracy[~high].mean(), accuracy[high].mean()
    return {
        "interface_layers": np.flatnonzero(~high).tolist(),
        "semantic_layers": hub,
        "centres": {"interface": float(centres[0]), "semantic": float(centres[1])},
        "threshold": float(sum(centres) / 2),
        "silhouette": silhouette(accuracy, high),
        "hub_contiguous": len(curves.blocks(hub)) == 1,
        "hub_blocks": curves.blocks(hub),
    }


def splits(profiles: dict[str, np.ndarray], measure: str) -> dict[str, dict]:
    """The split by each measure, from its accuracies [L] by layer; `differs`: the layers that it labels differently
    from the split by `measure`. If a profile has no split, everything is None except `why`."""
    by_measure, keys = {}, ("interface_layers", "semantic_layers", "silhouette")
    hub = set(specialize(profiles[measure])["semantic_layers"])
    for name, accuracy in profiles.items():
        try:
            split = specialize(accuracy)
        except InputError as error:
            by_measure[name] = dict.fromkeys((*keys, "differs")) | {"why": str(error).split(";")[0]}
            continue
        by_measure[name] = {key: split[key] for key in keys} | {"differs": sorted(hub ^ set(split["semantic_layers"]))}
    return by_measure


# ---------------------------------------------------------------- files


def read_curve(path: Path, payload: dict, header: dict, measure: str = "published") -> np.ndarray:
    """The accuracies [L+1] of a retrieval result by one measure, in order of hidden state.

    Raises:
        InputError: not a retrieval result, one older than that curve, or hidden states missing or duplicated.
    """
    key = curves.MEASURES[measure].key
    if measure != "published" and key not in payload:
        raise InputError(
            f"{path} has no {key}, it is older than the curve {measure}; run sentence-retrieval/sr_experiment.py "
            "again with --overwrite"
        )
    try:
        pairs = {int(state): math.nan if value is None else float(value) for state, value in payload[key]}
        twice = len(pairs) != len(payload[key])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path} has no {key} [[state, accuracy], ..]; give a retrieval result") from None
    if twice or sorted(pairs) != list(range(len(pairs))):
        raise InputError(f"{path}: {key} must hold each hidden state from 0 to L once; it has {sorted(pairs)}")
    if header.get("n_layers", len(pairs) - 1) != len(pairs) - 1:
        raise InputError(f"{path}: {len(pairs)} hidden states do not fit a model of {header['n_layers']} layers")
    return np.array([pairs[state] for state in sorted(pairs)])


def read_profile(
    path: Path, payload: dict, header: dict, measure: str, sentences: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """The accuracies [L+1] to split, over all sentences or every second one, and the hits [L+1, n] behind them.

    Raises:
        InputError: see `read_curve` and `read_hits`; half of the sentences without hits.
    """
    accuracy = read_curve(path, payload, header, measure)
    hits = read_hits(path, accuracy, measure)
    if sentences == "half":
        if hits is None:
            raise InputError(f"{path.with_suffix('.pt')} does not exist; --sentences half needs its hits")
        hits = hits[:, ::2]
        accuracy = hits.mean(1)
    return accuracy, hits


def read_hits(path: Path, accuracy: np.ndarray, measure: str = "published") -> np.ndarray | None:
    """The hits [L+1, n] next to the retrieval result `path`; None if that file does not exist.

    Raises:
        InputError: the file belongs to another result.
    """
    file = path.with_suffix(".pt")
    if not file.is_file():
        return None
    hits = results.read_tensors(file).get(curves.MEASURES[measure].hits)
    if hits is None or hits.ndim != 2 or len(hits) != len(accuracy) or not hits.shape[1]:
        raise InputError(f"{file} does not hold the hits [{len(accuracy)}, n] of {path.name}; run retrieval again")
    hits = hits.numpy().astype(np.uint8)
    if not np.allclose(hits.mean(1), accuracy, atol=EQUAL):
        raise InputError(f"the hits in {file} do not match the accuracies in {path.name}; run retrieval again")
    return hits


def draw(path: Path, split: dict, facts: dict, title: str) -> None:
    """A payload and its header: accuracy by layer, coloured by label, the threshold, the untrained twin and chance;
    below, how often each label is kept, and the split by every measure."""
    accuracy, stability = [value for _, value in split["layer_accuracy"]], split["label_stability"]
    measure, n = facts.get("measure", "published"), split["n_sentences"] or facts.get("n_used")
    twin = Path((facts.get("gate") or {}).get("untrained") or "")
    heights = [3, *([1] if stability else []), *([0.25 * len(split["splits"])] if len(split["splits"]) > 1 else [])]
    with figures.style() as plt:
        size = (figures.COLUMN, 2.0 + 0.45 * sum(heights))
        figure, axes = plt.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights, figsize=size)
        axis = axes[0, 0]
        axis.plot(range(len(accuracy)), accuracy, color="0.7", linewidth=0.8, zorder=1)
        groups = (("interface_layers", "interface", "s"), ("semantic_layers", "hub", "o"))
        for key, meaning, marker in groups:
            look = {"color": figures.colour(meaning), "label": figures.group(meaning, len(split[key])), "zorder": 2}
            axis.plot(split[key], [accuracy[layer] for layer in split[key]], marker, **look)
        axis.axhline(split["threshold"], color="0.4", linewidth=0.8, linestyle="--", label="threshold")
        if twin.is_file():
            untrained = read_curve(twin, *results.read_json(twin, gate.RETRIEVAL), measure)[1:]
            look = {"color": figures.colour("random"), "linestyle": "--", "marker": "x", "linewidth": 0.8}
            axis.plot(range(len(untrained)), untrained, label="untrained", **look)
        if facts.get("n_used") and not measure.startswith("mexa"):
            figures.chance_line(axis, facts["n_used"])
        axis.set_ylabel("retrieval accuracy" + f"\n({curves.MEASURES[measure].label})" * (measure != "published"))
        axis.set_ylim(bottom=0)
        figure.suptitle(textwrap.fill(title + (f", n = {n} sentences" if n else ""), 50), fontsize=8)
        figure.legend(loc="outside lower center", ncols=2)
        if stability:
            for key, meaning, _ in groups:
                shares = [stability[layer] for layer in split[key]]
                axes[1, 0].bar(split[key], shares, color=figures.colour(meaning), width=0.6)
                figures.zeros(axes[1, 0], split[key], shares)
            axes[1, 0].set_ylim(0, 1)
            axes[1, 0].set_ylabel("label kept\n(share)")
        if len(split["splits"]) > 1:
            draw_splits(plt, axes[-1, 0], split["splits"], len(accuracy))
        figures.layer_axis(axis, len(accuracy), both=True)
        axis.label_outer()
        figures.layer_axis(axes[-1, 0], len(accuracy))
        figures.save(figure, path)


def draw_splits(plt, axis, splits_by_measure: dict[str, dict], n_layers: int) -> None:
    """A row for the split by each measure, in the colours of interface and hub; grey if it has none."""
    rows = np.full((len(splits_by_measure), n_layers), np.nan)
    for row, split in zip(rows, splits_by_measure.values(), strict=True):
        row[split["interface_layers"] or []], row[split["semantic_layers"] or []] = 0, 1
    shades = plt.matplotlib.colors.ListedColormap([figures.colour("interface"), figures.colour("hub")])
    axis.set_facecolor("0.85")
    axis.imshow(rows, cmap=shades, vmin=0, vmax=1, aspect="auto", alpha=0.8)
    axis.hlines(np.arange(1, len(rows)) - 0.5, -0.5, n_layers - 0.5, color="white", linewidth=1.5)
    axis.set_yticks(range(len(rows)), [curves.MEASURES[name].label for name in splits_by_measure], fontsize=6)
    axis.tick_params(axis="y", length=0)


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("retrieval", nargs="?", metavar="SR.json", help="retrieval result; default: the study's last step")
    text = "JSON to write; default: the study's layer-specialize/layers.json; outside a study stdout"
    p.add_argument("-o", "--output", metavar="OUT", help=text)
    text = "curve to split by; default: the study's measure, else published"
    p.add_argument("--measure", choices=list(curves.MEASURES), help=text)
    text = "split by all or by every second one, leaving the others to test the split; default: the study's, else all"
    p.add_argument("--sentences", choices=("all", "half"), help=text)
    text = "resamples for label stability; default 1000"
    p.add_argument("--draws", type=cli.positive, default=1000, metavar="N", help=text)
    cli.add_run_flags(p)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    usual = study.value(None, "--measure", "measure", "published"), study.value(None, "--sentences", "sentences", "all")
    measure, sentences = args.measure or usual[0], args.sentences or usual[1]
    output = Path(args.output) if args.output else None
    if study and not output:
        kinds = [kind for kind, default in zip((measure, sentences), usual, strict=True) if kind != default]
        other = dotted(other_than(study, args.retrieval, args.steps), *kinds)
        output = study.output(None, "-o", "layers", other)
    # A result in the study's folder must be about the study's languages.
    sides = {f"{side}_lang": study.get(f"languages.{side}") for side in ("base", "target") if args.output is None}
    path = Path(args.retrieval) if args.retrieval else last_result(study, args.steps)
    if output is None:
        with contextlib.redirect_stdout(sys.stderr):  # so `> layers.json` gets only the layers
            split = splitting(path, measure, sentences, sides, study, args.draws)[0]
        print(json.dumps({key: split[key] for key in ("interface_layers", "semantic_layers")}, indent=4))
        return
    results.refuse_stranger(output, SCHEMA, args.overwrite, "another -o")  # our own results are redone in a second
    split, facts = splitting(path, measure, sentences, sides, study, args.draws)
    title = path.stem.replace("__", "/")
    draw(output.with_suffix(""), split, facts, title)
    results.write_json(output, split, results.header(SCHEMA, **facts))
    cli.say(f"wrote {output} and the figure {output.with_suffix('.pdf')}")


def splitting(path: Path, measure: str, sentences: str, sides: dict, study: Study, draws: int) -> tuple[dict, dict]:
    """The payload for the retrieval result `path` and the facts of its header; reports the split and the gate.

    Args:
        sides: the languages that the result must be about.
    """
    payload, header = results.read_json(path, gate.RETRIEVAL, **sides)
    accuracy, hits = read_profile(path, payload, header, measure, sentences)
    split = specialize(accuracy[1:])
    split |= {"label_stability": None, "stability_draws": 0, "n_sentences": None if hits is None else hits.shape[1]}
    if hits is None:
        cli.say(f"no {path.with_suffix('.pt').name} next to {path}: label stability is left out")
    else:
        high = np.isin(np.arange(len(accuracy) - 1), split["semantic_layers"])
        split["label_stability"], split["stability_draws"] = label_stability(hits[1:], high, study.seed, draws)
    say_split(path, split, measure)
    available = [name for name, curve in curves.MEASURES.items() if name == measure or curve.key in payload]
    half, known = sentences == "half", (path, payload, header)
    profiles = {name: read_profile(*known, name, "half")[0] if half else read_curve(*known, name) for name in available}
    split["splits"] = splits({name: profile[1:] for name, profile in profiles.items()}, measure)
    say_others(split["splits"], measure)
    if measure == "published":
        curves.tell((path.stem, payload))
    passed = checked(path, header, hits, measure, study.seed)
    base = base_split(study, path, measure, sentences) if study else None
    if base:
        changed = sorted(set(base["semantic_layers"]) ^ set(split["semantic_layers"]))
        split["base_split"] = base
        cli.say(
            f"the base's own split {'is the same' if not changed else f'differs in layers {changed}'}: "
            f"interface {base['interface_layers']}, hub {base['semantic_layers']}"
        )
    split["layer_accuracy"] = [[layer, value] for layer, value in enumerate(accuracy[1:].tolist())]

    copied = ("models", "base_lang", "target_lang", "data", "n_used", "n_available", "margin_variant", "k", "dtype")
    facts = {key: header[key] for key in copied if key in header}
    facts |= {"n_layers": len(accuracy) - 1, "retrieval": path, "measure": measure, "seed": study.seed, "draws": draws}
    facts |= {"sentences": "half"} if half else {}
    return split, facts | {"gate": passed}


def checked(path: Path, header: dict, hits: np.ndarray | None, measure: str, seed: int) -> dict | None:
    """Report and return the gate: whether the model retrieves better than its untrained twin; None if unknown."""
    twin = gate.twin_beside(path, header) if hits is not None else None
    if twin is None or curves.MEASURES[measure].hits not in results.read_tensors(twin.with_suffix(".pt")):
        missing = "its hits" if hits is None else "its untrained twin"
        cli.say(
            f"whether {path.stem} retrieves better than an untrained model is not checked: {missing} must be next to "
            "it (sentence-retrieval/sr_experiment.py without --no-untrained writes both)"
        )
        return None
    outcome = gate.of_results(path, twin, header["models"]["model"]["spec"], seed, measure)
    gate.tell(outcome)
    return outcome


def other_than(study: Study, given: str | None, steps: list[int] | None) -> str:
    """The file name part that sets another model's split apart from the study's own (its last checkpoint); or ""."""
    if given is None:
        return beside.name(study, steps=steps, last=True)
    with contextlib.suppress(InputError, OSError):  # the study's own result may not exist yet
        if last_result(study, None).samefile(given):
            return ""
    return Path(given).stem


def last_result(study: Study, steps: list[int] | None) -> Path:
    """The retrieval result of the study's last checkpoint (the last of `steps` if given)."""
    if not study:
        raise InputError("no retrieval result: name SR.json, or run inside a study (--study FILE, or ./study.yaml)")
    last = refs.run(study.value(None, "SR.json", "run"), steps)[-1]
    folder = study.input(None, "SR.json", "retrieval")
    pair = study.value(None, "SR.json", "languages.base"), study.value(None, "SR.json", "languages.target")
    pair_dir = folder / languages.find_pair([p.name for p in folder.iterdir() if p.is_dir()], *pair, what=str(folder))
    path = pair_dir / f"{last.model_id}.json"
    if not path.is_file():
        raise InputError(f"{path} does not exist; run sentence-retrieval/sr_experiment.py on {last.spec} first")
    return path


def base_split(study: Study, beside: Path, measure: str, sentences: str) -> dict | None:
    """The split of the study's base, if its retrieval result is next to the checkpoint's; else None."""
    base = study.get("base")
    path = beside.with_name(f"{refs.model(base).model_id}.json") if base else None
    if path is None or path == beside or not path.is_file():
        return None
    payload, header = results.read_json(path, gate.RETRIEVAL)  # an existing file must be readable
    accuracy = read_profile(path, payload, header, measure, sentences)[0]
    try:
        split = specialize(accuracy[1:])
    except InputError as error:
        cli.say(f"the base has no split of its own: {error}")
        return None
    return {key: split[key] for key in ("interface_layers", "semantic_layers", "silhouette")}


def say_split(path: Path, split: dict, measure: str) -> None:
    by = "" if measure == "published" else f" by {measure}"
    cli.say(f"{path.stem}{by}: interface {split['interface_layers']}, semantic hub {split['semantic_layers']}")
    centres = split["centres"]
    shape = "one block" if split["hub_contiguous"] else f"{len(split['hub_blocks'])} blocks {split['hub_blocks']}"
    cli.say(
        f"centres {centres['interface']:.3f} and {centres['semantic']:.3f}, threshold {split['threshold']:.3f}, "
        f"silhouette {split['silhouette']:.2f}; the hub is {shape}"
    )
    if split["label_stability"]:
        shaky = [layer for layer, share in enumerate(split["label_stability"]) if share < 0.95]
        which = f"layers {shaky} keep their label in fewer than" if shaky else "every layer keeps its label in at least"
        cli.say(f"{which} 95 % of {split['stability_draws']} resamples of the {split['n_sentences']} sentences")


def say_others(by_measure: dict[str, dict], measure: str) -> None:
    """Where the splits by the other measures differ from that by `measure`."""
    parts = []
    for name, split in by_measure.items():
        if name != measure:
            layers = split["differs"]
            difference = "no split" if layers is None else f"{len(layers)} differ" if layers else "the same"
            parts.append(f"{name}: {difference}" + (f" ({curves.ranges(layers)})" if layers else ""))
    if parts:
        cli.say(f"layers that the splits by other curves label differently from that by {measure}: {'; '.join(parts)}")


if __name__ == "__main__":
    cli.run(main)
