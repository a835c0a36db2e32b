"""Where a mixture of experts sends two languages: how far apart they are routed, and which experts are specific to one.

The same parallel sentences go through the base and every checkpoint. By layer: the divergence of the languages' mean
router distributions, entropies, how often two tokens share experts, what CPT changed, and the experts to which one
language is sent more than the other. Control: the same sentences with the languages of pairs swapped at random.

In:   B and RUN (default: the study's), mixtures of experts; parallel sentences.
Out:  OUT (default: the study's moe-routing/routing.json): `checkpoints` by step; .pt and figure next to it.

A killed run resumes with the next model. On several GPUs: accelerate launch moe-routing/routing.py ...; each process
measures whole models, and the numbers are the same.

Full: python moe-routing/routing.py --base allenai/OLMoE-1B-7B-0924 --run runs/eus --base-lang eng_Latn --target-lang eus_Latn --output routing.json
Tiny: python moe-routing/routing.py --study demo/moe-tiny.yaml
"""  # noqa: E501

from __future__ import annotations

from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, figures, languages, results, sources, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np, torch
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import refs
from cpt_utils.measures import over_run
from cpt_utils.models import batching, loading, routers

SCHEMA = "moe-routing"
RESULTS = {"routing": "moe-routing/routing.json"}
ASKED = {"routing": "Which experts do the two languages share, and does continued pre-training move either?"}
CAPTIONS = {
    "routing": """Part V: 2. Mixture-of-experts routing
        Where a mixture of experts sends two languages, by layer. Left: how far apart they are routed (0: alike, 1: as
        far as their entropies allow), with 95 % intervals over sentences; dashed: the same after randomly swapping the
        languages of pairs. Middle: the share of experts that two tokens have in common, in one sentence or in a
        sentence and its translation, minus chance. Right: how much more an expert is used in the new language than in
        the base's, at the last checkpoint; dots mark experts beyond the largest value over all experts in 95 % of the
        random swaps.""",
}
BASE, SIDES = over_run.BASE, ("base", "target")
DRAWS = 1000  # of swaps, and of sentences
ALPHA = 0.05
OF_DIVERGENCE = ("ci_low", "ci_high", "null_mean", "p_value")
NOTHING = 1e-9  # nats; anything below is rounding


# ---------------------------------------------------------------- the method


def routed(model, arch, tokenizer, texts: list[str], batch_size: int | None = None) -> routers.Routed:
    """The routers' decisions on each of `texts`; tokens added by the tokenizer are read but not counted."""
    encoded = batching.encode(tokenizer, texts, batching.positions(model))
    device, by_text = loading.input_device(model), [None] * len(texts)

    def step(rows: list[int]) -> None:
        ids, mask = (t.to(device) for t in batching.padded([encoded.ids[i] for i in rows], tokenizer.pad_token_id))
        special, _ = batching.padded([encoded.special[i] for i in rows], 1)
        parts = routers.read(model, arch, ids, mask, mask * (1 - special.to(device)))
        for at, i in enumerate(rows):
            by_text[i] = [part[at] for part in parts]

    batching.for_each(model, "routers", [len(ids) for ids in encoded.ids], step, batch_size)
    whole = routers.Routed(*(torch.stack(parts).numpy() for parts in zip(*by_text, strict=True)))
    if not np.isfinite(whole.share).all():
        raise InputError("the routers' logits are not finite: NaN weights, or an overflow (try --dtype float32)")
    if not whole.tokens.all():
        raise InputError(f"{texts[int(whole.tokens.argmin())]!r} has only special tokens; remove the line")
    return whole


def entropy(shares: np.ndarray) -> np.ndarray:
    """The entropy of distributions [.., experts], in nats."""
    from scipy import special

    return special.entr(shares).sum(-1)


def divergence(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """JSD of distributions [.., experts] over its maximum given their entropies: 0 alike, 1 as far apart as possible.

    JSD(a, b) / (ln E - (H(a) + H(b)) / 2); for two uniform distributions, where this is 0 / 0, it is 0.
    """
    halves = (entropy(one) + entropy(other)) / 2
    most = np.log(one.shape[-1]) - halves
    share = (entropy((one + other) / 2) - halves) / np.maximum(most, NOTHING)
    return np.where(most > NOTHING, share, 0).clip(0, 1)


def over_tokens(side: routers.Routed, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(mean router distribution, share of tokens for which an expert is called), [.., layers, experts] each, over all
    tokens of the sentences pooled; `weights` [draws, sentences]: for resamples of sentences."""
    n = len(side.tokens)
    weights = np.ones(n) if weights is None else weights
    tokens = np.asarray(weights @ side.tokens)[..., None, None]
    return tuple(
        (weights @ part.reshape(n, -1)).reshape(*weights.shape[:-1], *part.shape[1:]) / tokens
        for part in (side.share, side.chosen)
    )


def swapped(sides: list[routers.Routed], swaps: np.ndarray) -> tuple:
    """(router distributions, shares of tokens) of both sides; in each draw the languages are swapped in the pairs
    marked by a row of `swaps` [draws, sentences]."""
    joined = routers.Routed(*(np.concatenate(parts) for parts in zip(*sides, strict=True)))
    ways = np.concatenate([1 - swaps, swaps], 1), np.concatenate([swaps, 1 - swaps], 1)
    return tuple(zip(*(over_tokens(joined, weights.astype(np.float64)) for weights in ways), strict=True))


def in_common(one: routers.Routed, other: routers.Routed) -> tuple[np.ndarray, np.ndarray]:
    """[layers]: the share of its k experts that a token has in common with another token, and the same for tokens of
    different sentences (NaN if there is only one sentence).

    Over all pairs of tokens in one sentence or, if `other` is another language, in a sentence and its translation:
    sums of c_e (c_e - 1), or c_e c'_e, over experts and sentences, where c_e counts a sentence's tokens that called e.
    """
    same = one is other
    k = one.chosen.sum((0, 2)) / one.tokens.sum()
    pairs = (one.tokens * (other.tokens - same)).sum()
    shared = (one.chosen * (other.chosen - same)).sum((0, 2))
    apart = one.tokens.sum() * other.tokens.sum() - (one.tokens * other.tokens).sum()
    chance = (one.chosen.sum(0) * other.chosen.sum(0) - (one.chosen * other.chosen).sum(0)).sum(-1)
    return shared / max(pairs, 1) / k, chance / (apart or np.nan) / k


def experts_apart(delta: np.ndarray, null: np.ndarray) -> np.ndarray:
    """The p value of every expert [layers, experts] for equal use, corrected for all experts (Westfall and Young).

    Args:
        delta: the difference in use; `null` [draws, layers, experts]: the same with pairs swapped at random. Each is
            divided by its spread in the draws; p counts the draws whose largest value over all experts is as large.
    """
    spread = np.sqrt((null**2).mean(0))
    scale = np.where(spread > NOTHING, 1 / np.maximum(spread, NOTHING), 0)
    largest = np.sort(np.abs(null * scale).max((1, 2)))
    beyond = len(null) - np.searchsorted(largest, np.abs(delta * scale) * (1 - 1e-9))
    return (1 + beyond) / (1 + len(null))


def summarize(sides: list[routers.Routed], seed: int) -> dict:
    """The record of a model, from both languages of the same sentences."""
    n, rng = len(sides[0].tokens), np.random.default_rng(seed)
    shares, uses = zip(*map(over_tokens, sides), strict=True)
    null_shares, null_uses = swapped(sides, rng.integers(0, 2, (DRAWS, n)))
    divergences, null = divergence(*shares), divergence(*null_shares)
    weights = stats.resample_weights(n, seed, DRAWS)
    drawn = divergence(*(over_tokens(side, weights)[0] for side in sides))  # [draws, layers]
    interval, most = stats.interval(drawn, 0), max(np.log(shares[0].shape[-1]), NOTHING)  # 0 with one expert
    base, target = sides
    common = {"base": in_common(base, base), "target": in_common(target, target), "across": in_common(base, target)}
    by_layer = {
        "divergence": divergences, "ci_low": interval[0], "ci_high": interval[1], "null_mean": null.mean(0),
        "p_value": (1 + (null >= divergences).sum(0)) / (1 + DRAWS),
        "entropy": dict(zip(SIDES, (entropy(share) / most for share in shares), strict=True)),
        "token_entropy": {
            name: side.entropy.sum(0) / side.tokens.sum() / most for name, side in zip(SIDES, sides, strict=True)
        },
        "in_common": {name: share for name, (share, _) in common.items()},
        "in_common_chance": {name: chance for name, (_, chance) in common.items()},
    }  # fmt: skip
    p = experts_apart(uses[1] - uses[0], null_uses[1] - null_uses[0])
    return results.plain(by_layer | {"share": shares, "use": uses, "p": p, "drawn_mean": drawn.mean(1)})


def apart(more: np.ndarray, p: np.ndarray) -> list[int]:
    """The experts used significantly more, by the differences `more` [experts] and their p; largest first."""
    return [int(e) for e in np.argsort(-more, kind="stable") if more[e] > 0 and p[e] <= ALPHA]


def payload_of(records: list[dict], layers: list[int], codes: dict[str, str]) -> dict[str, dict]:
    """The content for each model, the base first; `codes`: the languages of "base" and "target"."""
    named, by_model = codes | {"across": "across"}, {}
    before, drawn_before = np.asarray(records[0]["share"]), np.asarray(records[0]["drawn_mean"])
    for record in records:
        share, use, p = (np.asarray(record[key]) for key in ("share", "use", "p"))
        rows: dict[str, dict] = {}
        for at, layer in enumerate(layers):
            row = {"divergence": {"value": record["divergence"][at], **{key: record[key][at] for key in OF_DIVERGENCE}}}
            for key in ("entropy", "token_entropy", "in_common", "in_common_chance"):
                row[key] = {named[side]: values[at] for side, values in record[key].items()}
            if record["name"] != BASE:
                moved = zip(codes.values(), share[:, at], before[:, at], strict=True)
                row["moved"] = {code: float(divergence(now, then)) for code, now, then in moved}
            row["use_difference"] = (use[1, at] - use[0, at]).tolist()
            row["experts"] = {
                code: apart(sign * (use[1, at] - use[0, at]), p[at])
                for code, sign in zip(codes.values(), (-1, 1), strict=True)
            }
            rows[f"layer_{layer}"] = row
        mean, drawn = np.mean(record["divergence"]), np.asarray(record["drawn_mean"])
        content = {"divergence": stats.with_interval(mean, drawn)}
        if record["name"] != BASE:
            content["change"] = stats.with_interval(mean - np.mean(records[0]["divergence"]), drawn - drawn_before)
        n_experts = {code: sum(len(row["experts"][code]) for row in rows.values()) for code in codes.values()}
        by_model[record["name"]] = content | {"n_experts": n_experts, "layers": rows}
    return by_model


# ---------------------------------------------------------------- the figure


def draw(path: Path, payload: dict) -> None:
    """Divergence by layer, experts in common by layer, and the use of each expert at the last checkpoint."""
    with figures.style() as plt:
        fig, axes = plt.subplots(1, 3, figsize=(figures.PAGE, 2.9), width_ratios=(1, 1, 1.1))
        draw_divergence(axes[0], payload["checkpoints"])
        draw_in_common(axes[1], payload["checkpoints"], *payload["languages"].values())
        image = draw_use(axes[2], list(payload["checkpoints"].values())[-1]["layers"])
        base, target = map(figures.language, payload["languages"].values())
        fig.colorbar(image, ax=axes[2], label=f"use: {target}\nminus {base}")
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2, title="languages apart at")
        title = "in common: two tokens of (dotted: base)"
        fig.legend(*axes[1].get_legend_handles_labels(), loc="outside lower right", title=title)
        figures.save(fig, path)


def over_layers(model: dict, key: str, what: str) -> np.ndarray:
    return np.array([row[key][what] for row in model["layers"].values()], dtype=np.float64)


def layer_ticks(axis, model: dict, places: bool = False) -> list[int]:
    """Ticks at the layers with experts, at most eight; `places`: at their index among those layers."""
    layers = [int(name.removeprefix("layer_")) for name in model["layers"]]
    every = slice(None, None, -(-len(layers) // 8))
    axis.set_xticks((range(len(layers)) if places else layers)[every], layers[every])
    axis.set_xlabel("layer")
    return layers


def draw_divergence(axis, models: dict) -> None:
    names = list(models)
    colours = [figures.colour("base"), *figures.colours(len(names) - 1, ordered=True)]
    shown = {BASE, names[-1]} | ({*names} if len(names) < figures.MOST else set())
    for (name, model), colour in zip(models.items(), colours, strict=True):
        layers = layer_ticks(axis, model)
        label = ("base" if name == BASE else f"step {name}") if name in shown else None
        axis.plot(layers, over_layers(model, "divergence", "value"), color=colour, marker="o", label=label)
        ends = [over_layers(model, "divergence", end) for end in ("ci_low", "ci_high")]
        axis.fill_between(layers, *ends, color=colour, alpha=0.15, linewidth=0)
    null = over_layers(models[names[-1]], "divergence", "null_mean")
    axis.plot(layers, null, "--", color=figures.colour("chance"), label="pairs swapped")
    axis.set_ylabel("divergence of\nthe languages' routing")
    axis.set_ylim(bottom=0)


def draw_in_common(axis, models: dict, base: str, target: str) -> None:
    looks = ((base, "base", "o"), (target, "target", "s"), ("across", "hub", "^"))
    for what, meaning, marker in looks:
        for name, line in ((BASE, ":"), (list(models)[-1], "-")):
            model = models[name]
            words = "a sentence and its translation" if what == "across" else figures.language(what)
            beyond = over_layers(model, "in_common", what) - over_layers(model, "in_common_chance", what)
            look = {"color": figures.colour(meaning), "label": words if line == "-" else None}
            look |= {"marker": marker} if len(beyond) <= 16 else {}
            axis.plot(layer_ticks(axis, model), beyond, line, **look)
    axis.axhline(0, color=figures.colour("chance"), linewidth=0.6)
    axis.set_ylabel("share of experts in common,\nminus chance")


def draw_use(axis, model: dict):
    more = np.array([row["use_difference"] for row in model.values()])
    bound = float(np.abs(more).max()) or 1.0
    image = axis.imshow(more.T, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto", origin="lower")
    dots = [(at, e) for at, row in enumerate(model.values()) for experts in row["experts"].values() for e in experts]
    if dots:
        axis.plot(*zip(*dots, strict=True), "o", color="black", markersize=1.5)
    layer_ticks(axis, {"layers": model}, places=True)
    axis.set_yticks(range(0, more.shape[1], -(-more.shape[1] // 8)))
    axis.set_ylabel("expert")
    return image


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("--base-lang", metavar="LANG", help="language of the base; default: the study's languages.base")
    add("--target-lang", metavar="LANG", help="language of CPT; default: the study's languages.target")
    over_run.add_flags(p, "moe-routing/routing.json")
    sources.add_flags(p)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    run = over_run.OverRun.of(args, study, "routing")
    layers = layers_of(run.models)
    codes = {side: study.value(getattr(args, f"{side}_lang"), f"--{side}-lang", f"languages.{side}") for side in SIDES}
    pairs = sources.from_arguments(args, study, *codes.values())
    cli.say(pairs.summary())
    alone = pairs.alone  # copies of a pair are routed alike, so swapping each separately would make the null too narrow
    sides = [[texts[i] for i in alone] for texts in (pairs.base, pairs.target)]
    if len(alone) < len(pairs):
        cli.say(f"{len(pairs) - len(alone)} pairs with a repeated sentence are left out")
    facts = {f"{side}_lang": languages.canonical(code, any_tag=True) for side, code in codes.items()}
    facts |= {"data": pairs.describe(), "n_used": len(alone), "n_available": pairs.n_available}
    facts |= {"limit": pairs.facts["limit"]}

    def measured(model, ref: refs.ModelRef, tokenizer) -> dict:
        arch = archs.for_config(ref.config())
        return summarize([routed(model, arch, tokenizer, texts, args.batch_size) for texts in sides], study.seed)

    def write_all(units: dict[str, dict], request: dict) -> None:
        records = [{"name": name, **record} for name, record in units.items()]
        payload = {"languages": codes, "checkpoints": payload_of(records, layers, codes)}
        write(run.output, payload, records, layers, over_run.header_facts(request, *facts))

    run.measure(SCHEMA, facts | {"batch_size": args.batch_size}, measured, write_all)


def layers_of(models: dict[str, refs.ModelRef]) -> list[int]:
    """The layers that have experts, the same in all models; checked before any model is loaded.

    Raises:
        InputError: a model without experts, or with other experts than the base.
    """
    shapes = []
    for ref in models.values():
        arch = archs.for_config(ref.config())
        layers = routers.layers_with(arch, ref.config())
        if not layers:
            raise InputError(f"{ref.spec} is a {arch.model_type} without experts: it has no routers to measure")
        shapes.append((layers, arch.experts(ref.config(), layers[0])))
        if shapes[-1] != shapes[0]:
            raise InputError(f"{ref.spec} has other experts than {models[BASE].spec}: they cannot be compared")
    return shapes[0][0]


def write(output: Path, payload: dict, records: list[dict], layers: list[int], facts: dict) -> None:
    """Write everything, the JSON last."""
    draw(output.with_suffix(""), payload)
    tensors = {f"{key}.{record['name']}": torch.tensor(record[key], dtype=torch.float64)
               for record in records for key in ("share", "use", "p")}  # fmt: skip
    results.write_tensors(output.with_suffix(".pt"), tensors)
    top_k = round(sum(records[0]["use"][0][0]))  # experts per token
    results.write_json(output, payload, results.header(SCHEMA, layers=layers, top_k=top_k, **facts))
    for name, model in payload["checkpoints"].items():
        counts = " ".join(f"{n} experts are used more in {code}," for code, n in model["n_experts"].items())
        mean = f"divergence {stats.told(model['divergence'], '.4f')}, mean over layers"
        cli.say(f"{name if name == BASE else f'step {name}'}: {counts} {mean}")
    cli.say(f"wrote {output} and the figure {output.with_suffix('.pdf')}")


if __name__ == "__main__":
    cli.run(main)
