"""The parts that a study will have, those left out and why, and the rough number of tokens read by a model in each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from cpt_utils.base import cli, languages
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.base.study import Study
from cpt_utils.measures import matched

SHARE = 0.4  # speed of a forward pass relative to a matrix product


@dataclass(frozen=True)
class Plan:
    """The parts of a study that the workflow will run. `lsn`: the languages of Part II's neurons; [] without them."""

    task: bool
    lsn: list[str]
    deactivation: bool
    loss: bool  # after swaps, in the target language
    losses: bool  # of every language over CPT
    ablation: bool  # of layers; this and the other parts below only if the study asks for them
    spectral: bool  # the update itself
    alignment: bool  # gradients and bigrams
    steering: bool  # by a direction
    bigram: bool
    routing: bool  # of a mixture of experts
    left_out: list[str] = field(default_factory=list)


def plan(study: Study) -> Plan:
    """The parts that the study's keys allow, with a sentence for each part left out and the reason.

    Raises:
        InputError: a method for neurons needs more languages than the study has.
    """
    heldout, target = study.get("data.heldout", {}), study.get("languages.target")
    codes = [str(code) for code in study.get("languages.lsn", [])]
    lacking = [key for key, value in (("tokens", study.get("tokens")), ("languages.lsn", codes)) if not value]
    lsn = [] if lacking else codes
    silent = [code for code in lsn if languages.find(heldout, code, default=None) is None]
    methods = study.get("lsn.methods") or []
    if "ternary" in methods and 0 < len(lsn) < 3:
        raise InputError(
            f"lsn.methods has ternary, which needs three languages or more, but languages.lsn has only "
            f"{' and '.join(lsn)}; add one, or leave ternary out"
        )
    loss = bool(target) and languages.find(heldout, target, default=None) is not None
    left_out = []
    if not study.get("data.task"):
        left_out.append("the downstream task and what needs it (C6, half of Figure 2): the study has no data.task")
    losses = any(heldout.values())
    left_out += ["the loss of each language over CPT: the study has no data.heldout"] * (not losses)
    left_out += [f"the loss after a swap: data.heldout has no text of {target}"] * (not loss)
    if lacking:
        left_out.append(
            f"the neurons of Part II and what needs them (C4, C5, Figures 5 to 9): no {' and no '.join(lacking)}"
        )
    elif silent:
        also = ", the comparison of methods (lsn.methods)" if methods else ""
        left_out.append(f"deactivation (Figure 9){also}: data.heldout has no text of {', '.join(silent)}")
    if study.get("arms") and not study.get("train.cpt"):
        left_out.append("the arms: the study trains nothing (train.cpt)")
    controls = study.get("controls", "all")
    if isinstance(controls, int) and controls < matched.ENOUGH:
        left_out.append(
            f"C2b and C5b: {controls} random sets (controls) are too few for a fit, which needs {matched.ENOUGH}"
        )
    if study.get("spectral") is not None and not study.get("runs"):
        left_out.append("the line between two runs (D6) and the contrast of heads: the study has no other run (runs)")
    parts = {
        "ablation": "Part III, layer ablation", "spectral": "Part IV, the update itself",
        "alignment": "cosines of gradients and correlations with bigrams", "steering": "Part V, steering",
    }  # fmt: skip
    asked = {key: study.get(key) is not None for key in parts}
    left_out += [
        f"{part}: the study has no {key} (`{key}: {{}}` is enough)" for key, part in parts.items() if not asked[key]
    ]
    counted = study.get("alignment.bigram.text") or study.get("data.lsn_text", {})
    bigram = asked["alignment"] and any(
        heldout[c] and counted.get(languages.find(counted, c, default=None)) for c in heldout
    )
    more = "correlations with bigrams: no language has both data.heldout and other text (alignment.bigram.text)"
    left_out += [more] * (asked["alignment"] and not bigram)
    asked |= {"bigram": bigram, "routing": study.get("routing") is not None}
    return Plan(bool(study.get("data.task")), lsn, bool(lsn) and not silent, loss, losses, **asked, left_out=left_out)


def passes(
    study: Study, chosen: Plan, n_checkpoints: int, sizes: dict[str, float], n_layers: int, n_heads: int
) -> Iterator[tuple[str, float]]:
    """(part, rough number of tokens read by a model in it); `n_heads`: heads that can be rewound one by one."""
    controls = study.get("controls", "all")
    sets = 300 if controls == "all" else controls
    pairs, heldout = sizes["pairs"], sizes["target"]
    # SIB-200: 204 prompts, whose seven choices are read together; continuations: about 1000 inputs, read separately.
    inputs = 204 if chosen.task and str(study.get("data.task.name")).startswith("sib200_") else 1000 * chosen.task
    tested, rows = inputs * 80, min(inputs, study.get("data.task.rows") or inputs) * 80
    yield "retrieval", (n_checkpoints + 4) * pairs
    yield "the task", (n_checkpoints + 3) * 2 * tested  # lm_eval reads choices of several tokens separately
    yield "the loss of each language", (n_checkpoints + 1) * sizes["heldout"]
    if study.get("arms"):
        yield "arms", (len(study.get("arms")) + 2) * (pairs + sizes["heldout"] + rows)
    yield f"layer swaps, up to {sets} sets", (sets + 3) * (pairs + heldout + rows)
    if chosen.ablation:
        models, shots = 4 * n_layers / (study.get("ablation.stride") or 1), study.get("ablation.shots") or 4
        scored = min(study.get("ablation.sentences") or sizes["n_pairs"], sizes["n_pairs"])
        translated = 4 * (1 + shots) * pairs * scored / max(1, sizes["n_pairs"])  # both directions, with their floors
        yield f"layer ablation, {models:.0f} models", models * (translated + pairs + sizes["heldout"] + rows)
    if chosen.spectral:
        models = changed_models(study, n_heads)
        kinds = study.get("spectral.measures") or ["retrieval", "nll", "task"]
        tokens = {"retrieval": pairs, "nll": sizes["heldout"], "task": rows}
        yield f"heads, truncation, connection, {models:.0f} models", models * sum(tokens.get(k, 0) for k in kinds)
    if chosen.alignment:  # forward and backward pass, and products: four times a forward pass
        share = min(1, (study.get("alignment.gradients.pairs") or 100) / max(1, sizes["n_pairs"]))
        yield "gradients, bigrams", (n_checkpoints + 1) * (4 * share * pairs + chosen.bigram * sizes["heldout"])
    if chosen.routing:
        yield "routing of tokens to experts", (n_checkpoints + 1) * pairs
        ways, experts = len(study.get("routing.strengths") or "1") + 2, 1 + 2 * (study.get("routing.random") or 5)
        yield "steering of routers", 2 * (1 + 2 * ways * experts) * sizes["heldout"]
    if chosen.steering:
        asked = study.get("steering", {})
        points = len(asked.get("layers") or range(n_layers)) * len(asked.get("alphas") or range(4))
        models = 2 * (2 + points * (1 + (asked.get("draws") or 3)))
        scored = min(asked.get("sentences") or 100, sizes["n_pairs"] / 2) / max(1, sizes["n_pairs"])
        # The written text is as long as a pair, and its reference is scored after two sources.
        yield f"steering, {models} conditions", models * 3.5 * scored * pairs
    if chosen.lsn:
        per_language = sizes["neurons"] / len(chosen.lsn)
        yield f"neuron counts, {per_language:,.0f} tokens per language", sizes["neurons"]
        yield "activation over CPT", (n_checkpoints + 1) * min(per_language, 98_304)
        yield f"component swaps, up to {sets} sets each", 2 * (sets + 11) * (pairs + heldout)
    if chosen.deactivation:
        methods, texts = study.get("lsn.methods") or [], 32 * len(chosen.lsn) * (study.get("lsn.texts") or 500)
        texts *= ("ap" in methods) + 3 * ("gradient" in methods)  # with the backward pass
        yield "neurons by other methods", texts + ("ternary" in methods) * sizes["neurons"]  # of the base
        yield (
            "deactivation",
            (1 + len(methods)) * (1 + len(chosen.lsn) * (1 + 2 * min(12, max(5, sets)))) * sizes["heldout"],
        )


def changed_models(study: Study, n_heads: int) -> float:
    """The rough number of models that Part IV measures: rewound heads, truncated updates, the line between two runs."""
    rewind, truncate, connect = (cli.sibling(f"spectral/{name}.py") for name in ("rewind", "truncate", "connect"))
    others = bool(study.get("runs"))

    def orders_of(order: str) -> int:
        drawn = (study.get("spectral.rewind.draws") or rewind.DRAWS) if order.startswith("random") else 1
        return drawn * (2 if order in rewind.BY_ENERGY else 1) * (others or order != "contrast")

    orders = study.get("spectral.rewind.orders") or rewind.ORDERS
    points = sum(map(orders_of, orders)) * 100 / (study.get("spectral.rewind.stride") or rewind.STRIDE)
    alone = n_heads * ("greedy" in orders)  # every head alone
    draws = study.get("spectral.truncate.draws") or truncate.DRAWS
    ways = study.get("spectral.truncate.curves") or truncate.LOOKS
    shares = study.get("spectral.truncate.shares") or truncate.SHARES
    cut = sum(draws if way in truncate.DRAWN else 1 for way in ways) * len(shares)
    between = sum(0 < at < 1 for at in study.get("spectral.connect.at") or connect.AT)
    return points + alone + cut + others * 3 * (between + 1)  # the line, two random ones, and the ends


def machine() -> tuple[float, str]:
    """(floating-point operations per second of a forward pass here, device), from a short test with matrix products."""
    device = cli.device("auto")
    dtype = cli.dtype(None, device)
    a = torch.randn(1024, 1024, device=device, dtype=dtype)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for a GPU, too
        times.append(time.perf_counter() - start)
    threads = torch.get_num_threads()
    name = f"the CPU ({threads} thread{'s' * (threads > 1)})" if device.type == "cpu" else torch.cuda.get_device_name()
    return SHARE * 2 * 1024**3 / min(times), name
