"""How much do a language's experts matter? The routers are made to prefer or to avoid them, and the loss is measured.

Steered are the experts that one language is sent to more than the other (routing.py), at most k per layer. Soft: their
logits rise by lambda standard deviations of the token's logits; hard: above all others; suppressed: below all others.
As many random experts in each layer, and the same experts in other layers, show what such a push does anywhere.

In:   B and RUN (default: the study's; the last checkpoint), routing.py's result on them, held-out text by language.
Out:  OUT (default: the study's moe-routing/steering.json): `steered`, changes of the loss; a figure next to it.

A killed run resumes with the next condition. On several GPUs: accelerate launch moe-routing/steering.py ...

Full: python moe-routing/steering.py --base allenai/OLMoE-1B-7B-0924 --run runs/eus --routing routing.json --heldout en=en.txt eu=eu.txt --output steering.json
Tiny: python moe-routing/steering.py --study demo/moe-tiny.yaml --random 2
"""  # noqa: E501

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, figures, languages, results, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np, torch
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import relatives
from cpt_utils.interventions.condition import Condition
from cpt_utils.measures import over_run
from cpt_utils.models import routers

routing = cli.sibling("moe-routing/routing.py")
language_loss = cli.sibling("language-loss/language_loss.py")

SCHEMA = "router-steering"
RESULTS = {"router_steering": "moe-routing/steering.json"}
ASKED = {"router_steering": "How much do the experts of a language matter to it, and to the other?"}
CAPTIONS = {
    "router_steering": """Part V: 2. Mixture-of-experts routing
        The change of the loss on held-out text when routers prefer the experts of a language, softly or above all
        others, or avoid them, with 95 % intervals over documents; grey dots are as many random experts, grey crosses
        the same experts in other layers. The experts are specific to a language if suppressing them raises its loss,
        and more than either control does.""",
}
STRENGTH, RANDOM = 1.0, 5
NO_EXPERT = "No expert is used more in one language than in the other: there is nothing to steer."
Experts = dict[int, list[int]]  # layer -> experts


# ---------------------------------------------------------------- the method


def edit(how: str, experts: list[int], strength: float) -> Callable:
    """The edit of a router's logits z [.., experts], with std and extremes per token:
    soft z_e + strength std(z), hard max(z) + std(z), suppressed min(z) - std(z)."""

    def edited(logits: torch.Tensor) -> torch.Tensor:
        spread = logits.std(-1, keepdim=True, correction=0)
        new = {
            "soft": lambda: logits[..., experts] + strength * spread,
            "hard": lambda: (logits.amax(-1, keepdim=True) + spread).expand(*spread.shape[:-1], len(experts)),
            "suppressed": lambda: (logits.amin(-1, keepdim=True) - spread).expand(*spread.shape[:-1], len(experts)),
        }[how]()
        logits = logits.clone()
        logits[..., experts] = new
        return logits

    return edited


def steered(name: str, of: str, arch: archs.Arch, experts: Experts, how: str, strength: float, **facts) -> Condition:
    """The model with routers that prefer `experts`, or avoid them, on every token."""

    def apply(model):
        return routers.at_logits(model, arch, {layer: edit(how, chosen, strength) for layer, chosen in experts.items()})

    facts |= {"model": of, "how": how}
    return Condition(name, facts | {"experts": experts, "strength": strength}, apply, facts, of)


def random_experts(own: Experts, n_experts: int, seed: str) -> Experts:
    """As many other experts in each layer, or all others if there are fewer."""
    draw, drawn = random.Random(seed), {}
    for layer, experts in own.items():
        others = [e for e in range(n_experts) if e not in experts]
        drawn[layer] = sorted(draw.sample(others, min(len(experts), len(others))))
    return drawn


def shifted(own: Experts, layers: list[int], by: int) -> Experts:
    """The same experts, moved cyclically `by` layers with experts."""
    return {layers[(layers.index(layer) + by) % len(layers)]: experts for layer, experts in own.items()}


def wanted_of(
    of: str, arch: archs.Arch, experts: dict[str, Experts], layers: list[int], n_experts: int, strengths: list[float],
    n_random: int, seed: int,
) -> list[Condition]:  # fmt: skip
    """All conditions of a model: nothing done, and for each language and way to steer its experts and controls."""
    conditions = [Condition("none", {"model": of}, facts={"model": of}, of=of)]
    ways = [("soft", strength) for strength in strengths] + [("hard", 0.0), ("suppressed", 0.0)]
    shifts = sorted({round(len(layers) * (i + 1) / (n_random + 1)) for i in range(n_random)} - {0, len(layers)})
    for (how, strength), (lang, treated) in itertools.product(ways, experts.items()):
        if not treated:
            continue
        sets = [("own", treated)]
        sets += [("random", random_experts(treated, n_experts, f"{seed}/{lang}/{i}")) for i in range(n_random)]
        sets += [("shifted", shifted(treated, layers, by)) for by in shifts]
        for number, (kind, chosen) in enumerate(sets):
            way = f"{how} {strength:g}" if how == "soft" else how
            more = {"lang": lang, "kind": kind, "way": way, "number": number}
            conditions.append(steered(f"{way} {lang} {kind}", of, arch, chosen, how, strength, **more))
    return conditions


def summarize(records: list[dict], seed: int) -> dict:
    """Model -> way -> language of the experts -> language of the text -> change of the loss, interval, controls."""
    plain = {record["model"]: record["units"] for record in records if record["name"] == "none"}
    by_model: dict[str, dict] = {name: {} for name in plain}
    for record in (record for record in records if record["name"] != "none"):
        row = by_model[record["model"]].setdefault(record["way"], {}).setdefault(record["lang"], {})
        for lang, values in record["units"].items():
            change = np.asarray(values) - np.asarray(plain[record["model"]][lang])
            cell = row.setdefault(lang, {"random": [], "shifted": []})
            if record["kind"] == "own":
                low, high = stats.bootstrap_mean(change, seed)
                cell |= {"mean": math.fsum(change) / len(change), "ci_low": low, "ci_high": high}
            else:
                cell[record["kind"]].append(math.fsum(change) / len(change))
            row[lang] = cell
    for cell in (row[lang] for rows in by_model.values() for _, row in by_way(rows) for lang in row):
        for kind in ("random", "shifted"):
            changes = cell[kind]
            cell |= {f"{kind}_mean": math.fsum(changes) / len(changes) if changes else None, f"n_{kind}": len(changes)}
    return by_model


def by_way(rows: dict) -> list[tuple[str, dict]]:
    """("way language-of-the-experts", changes by language of the text) of a model."""
    return [(f"{way} {lang}", row) for way, of_way in rows.items() for lang, row in of_way.items()]


# ---------------------------------------------------------------- the figure


def draw(path: Path, payload: dict) -> None:
    """A column for each model, a row for each language of the text; a point for each way and expert language."""
    models = payload["steered"]
    if not any(models.values()):
        with figures.style() as plt:
            fig = plt.figure(figsize=(figures.PAGE, 0.8))
            fig.text(0.5, 0.5, NO_EXPERT, ha="center", va="center")
            figures.save(fig, path)
        return
    texts = list(next(iter(payload["unsteered"].values())))
    with figures.style() as plt:
        fig, axes = plt.subplots(
            len(texts), len(models), figsize=(figures.PAGE, 1.1 + 1.5 * len(texts)), sharex="col", sharey="row",
            squeeze=False,
        )  # fmt: skip
        for (i, text), (j, (name, rows)) in itertools.product(enumerate(texts), enumerate(models.items())):
            axis = axes[i, j]
            bars(axis, {way: row[text] for way, row in by_way(rows)})
            if i == 0:
                axis.set_title("base" if name == routing.BASE else f"step {name}")
            if j == 0:
                axis.set_ylabel(f"change of the loss on\n{figures.language(text)}\n(nats per byte)")
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figures.save(fig, path)


def bars(axis, cells: dict[str, dict]) -> None:
    """The change for each way with its interval, next to those of the controls."""
    axis.axhline(0, color="0.6", linewidth=0.6)
    if not cells:
        axis.text(0.5, 0.6, "no expert", ha="center", transform=axis.transAxes)
    positions, rows = range(len(cells)), list(cells.values())
    means = np.array([row["mean"] for row in rows])
    ends = [means - [row["ci_low"] for row in rows], [row["ci_high"] for row in rows] - means]
    look = {"color": figures.colour("target"), "fmt": "s", "markersize": 4, "label": "the language's experts"}
    axis.errorbar(positions, means, np.maximum(ends, 0), **look)
    for kind, marker, label, by in (("random", "o", "random experts", -0.2), ("shifted", "x", "other layers", 0.2)):
        dots = [(at + by, value) for at, row in enumerate(rows) for value in row[kind]]
        look = {"color": figures.colour("random"), "markersize": 3, "label": label}
        axis.plot(*(zip(*dots, strict=True) if dots else ([], [])), marker, **look)
    axis.set_xticks(positions, list(cells), rotation=35, ha="right")


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("--routing", metavar="F", help="result of moe-routing/routing.py; default: the study's")
    add("--heldout", nargs="+", metavar="LANG=FILE", help="held-out text, a document per line; default: the study's")
    text = f"standard deviations to raise logits by (soft); default: the study's routing.strengths, else {STRENGTH}"
    add("--strengths", nargs="+", type=float, metavar="X", help=text)
    text = f"random sets of experts, and at most as many shifts; default: the study's routing.random, else {RANDOM}"
    add("--random", type=cli.positive, metavar="N", help=text)
    over_run.add_flags(p, RESULTS["router_steering"], part=" (only the last is measured)", drop=False)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    run = over_run.OverRun.of(args, study, "router_steering", last=True)
    layers, config = routing.layers_of(run.models), run.models[routing.BASE].config()
    arch = archs.for_config(config)
    file = study.input(args.routing, "--routing", "routing")
    experts = experts_of(file, run.models, layers)
    texts, facts = language_loss.heldout(args, study)
    strengths = [*dict.fromkeys(study.value(args.strengths, "--strengths", "routing.strengths", [STRENGTH]))]
    if not all(map(math.isfinite, strengths)):
        raise InputError("--strengths: give finite numbers")
    n_random = int(study.value(args.random, "--random", "routing.random", RANDOM))

    def measured(model, condition: Condition, tokenizer) -> dict:
        losses = language_loss.losses(model, run.models[condition.of], tokenizer, texts, args.batch_size)
        return {"units": losses}

    n_experts = arch.experts(config, layers[0])
    wanted = [
        condition for name in run.models
        for condition in wanted_of(name, arch, experts[name], layers, n_experts, strengths, n_random, study.seed)
    ]  # fmt: skip
    facts |= {"experts": experts, "batch_size": args.batch_size}
    run.changed(SCHEMA, facts, wanted, measured, functools.partial(write, run.output, texts, file))


def experts_of(file: Path, models: dict, layers: list[int]) -> dict[str, dict[str, Experts]]:
    """For each model and language the experts that it uses more by routing.py's result, at most k per layer.

    Raises:
        InputError: the result is of other models.
    """
    payload, header = results.read_json(file, routing.SCHEMA, allow_limited=True)
    measured = header.get("models", {})  # none in a file without a header
    known = {routing.BASE: measured.get(routing.BASE), **measured.get("checkpoints", {})}
    by_model: dict[str, dict[str, Experts]] = {}
    for name, ref in models.items():
        if not known.get(name) or not relatives.same_model(known[name], ref.describe()):
            raise InputError(f"{file} is not of {ref.spec} as it is now; run moe-routing/routing.py again")
        rows = payload["checkpoints"][name]["layers"]
        k = round(header["top_k"])
        by_model[name] = {
            code: {layer: used[:k] for layer in layers if (used := rows[f"layer_{layer}"]["experts"][code])}
            for code in payload["languages"].values()
        }
        for code, experts in by_model[name].items():
            if not experts:
                cli.warn(f"{ref.spec} has no experts that it uses more in {code}: nothing to steer there")
    return by_model


def write(output: Path, texts: dict, file: Path, records: list[dict], request: dict) -> None:
    """Write everything, the JSON last."""
    unsteered = {
        record["model"]: {lang: math.fsum(losses) / len(losses) for lang, losses in record["units"].items()}
        for record in records if record["name"] == "none"
    }  # fmt: skip
    payload = {"unsteered": unsteered, "steered": summarize(records, request["seed"])}
    if not any(payload["steered"].values()):
        payload["finding"] = "no expert"
        cli.say(NO_EXPERT)
    draw(output.with_suffix(""), payload)
    names = {lang: languages.canonical(lang, any_tag=True) for lang in texts}
    facts = over_run.header_facts(request, "heldout", "lines", "limit")
    results.write_json(output, payload, results.header(SCHEMA, languages=names, routing=file, **facts))
    for name, rows in payload["steered"].items():
        for way, row in by_way(rows):
            changes = (f"{lang} {cell['mean']:+.4f} (random {cell['random_mean']:+.4f})" for lang, cell in row.items())
            cli.say(f"{name if name == routing.BASE else f'step {name}'}, {way}: {'; '.join(changes)}")
    cli.say(f"wrote {output} and the figure {output.with_suffix('.pdf')}")


if __name__ == "__main__":
    cli.run(main)
