"""Which parts a study will have, what is left out and why, and roughly how many tokens go through a model in each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from cpt_utils.base import cli, languages
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.base.study import Study
from cpt_utils.measures import matched

SHARE = 0.4  # of a matrix product's speed that a forward pass reaches


@dataclass(frozen=True)
class Plan:
    """The parts of a study: what the workflow asks. `lsn` are the languages of Part II's neurons, [] without them."""

    task: bool
    lsn: list[str]
    deactivation: bool
    loss: bool
    losses: bool  # of every language over CPT
    ablation: bool  # of layers: where the study asks for it
    spectral: bool  # the update itself: the same
    alignment: bool  # gradients and bigrams: the same
    steering: bool  # by a direction: the same
    bigram: bool
    routing: bool  # of a mixture of experts: the same
    left_out: list[str] = field(default_factory=list)


def plan(study: Study) -> Plan:
    """Which parts the study's keys allow, and in words which they do not and why.

    Raises:
        InputError: neurons by a method that needs more languages than there are.
    """
    heldout, target = study.get("data.heldout", {}), study.get("languages.target")
    codes = [str(code) for code in study.get("languages.lsn", [])]
    lacking = [key for key, value in (("tokens", study.get("tokens")), ("languages.lsn", codes)) if not value]
    lsn = [] if lacking else codes
    silent = [code for code in lsn if languages.find(heldout, code, default=None) is None]
    methods = study.get("lsn.methods") or []
    if "ternary" in methods and 0 < len(lsn) < 3:
        raise InputError(
            f"lsn.methods has ternary, which needs three languages or more, and languages.lsn has {' and '.join(lsn)}; "
            "add one, or leave ternary out"
        )
    loss = bool(target) and languages.find(heldout, target, default=None) is not None
    left_out = []
    if not study.get("data.task"):
        left_out.append("the downstream task and what rests on it (C6, half of Figure 2): the study has no data.task")
    losses = any(heldout.values())
    left_out += ["the loss of each language over CPT: the study has no data.heldout"] * (not losses)
    left_out += [f"the loss after a swap: data.heldout has no text of {target}"] * (not loss)
    if lacking:
        left_out.append(
            f"the neurons of Part II and what rests on them (C4, C5, Figures 5 to 9): no {' and no '.join(lacking)}"
        )
    elif silent:
        also = ", the comparison of methods (lsn.methods)" if methods else ""
        left_out.append(f"deactivation (Figure 9){also}: data.heldout has no text of {', '.join(silent)}")
    if study.get("arms") and not study.get("train.cpt"):
        left_out.append("the arms: the study trains nothing (train.cpt)")
    controls = study.get("controls", "all")
    if isinstance(controls, int) and controls < matched.ENOUGH:
        left_out.append(
            f"C2b and C5b: with {controls} random sets (controls) there is no fit; it needs {matched.ENOUGH}"
        )
    if study.get("spectral") is not None and not study.get("runs"):
        left_out.append("the line between two runs (D6), and contrast of heads: the study has no other run (runs)")
    parts = {
        "ablation": "Part III, layer ablation", "spectral": "Part IV, the update itself",
        "alignment": "cosines of gradients and correlations with bigrams", "steering": "Part V, steering",
    }  # fmt: skip
    asked = {key: study.get(key) is not None for key in parts}
    left_out += [
        f"{part}: the study has no {key} (`{key}: {{}}` will do)" for key, part in parts.items() if not asked[key]
    ]
    counted = study.get("alignment.bigram.text") or study.get("data.lsn_text", {})
    bigram = asked["alignment"] and any(
        heldout[c] and counted.get(languages.find(counted, c, default=None)) for c in heldout
    )
    more = "correlations with bigrams: no language has data.heldout and other text (alignment.bigram.text)"
    left_out += [more] * (asked["alignment"] and not bigram)
    asked |= {"bigram": bigram, "routing": study.get("routing") is not None}
    return Plan(bool(study.get("data.task")), lsn, bool(lsn) and not silent, loss, losses, **asked, left_out=left_out)


def passes(
    study: Study, chosen: Plan, n_checkpoints: int, sizes: dict[str, float], n_layers: int, n_heads: int
) -> Iterator[tuple[str, float]]:
    """(part, tokens that go through a model in it), roughly; `n_heads` are those that can be put back alone."""
    controls = study.get("controls", "all")
    sets = 300 if controls == "all" else controls
    pairs, heldout = sizes["pairs"], sizes["target"]
    # Of SIB-200 204 prompts, whose seven choices are read together; of continuations about as much, each for itself.
    known = 204 if chosen.task and str(study.get("data.task.name")).startswith("sib200_") else 1000 * chosen.task
    tested, rows = known * 80, min(known, study.get("data.task.rows") or known) * 80
    yield "retrieval", (n_checkpoints + 4) * pairs
    yield "the task", (n_checkpoints + 3) * 2 * tested  # lm_eval reads choices of several tokens apart
    yield "the loss of each language", (n_checkpoints + 1) * sizes["heldout"]
    if study.get("arms"):
        yield "arms", (len(study.get("arms")) + 2) * (pairs + sizes["heldout"] + rows)
    yield f"layer swaps, up to {sets} sets", (sets + 3) * (pairs + heldout + rows)
    if chosen.ablation:
        models, shots = 4 * n_layers / (study.get("ablation.stride") or 1), study.get("ablation.shots") or 4
        scored = min(study.get("ablation.sentences") or sizes["n_pairs"], sizes["n_pairs"])
        translated = 4 * (1 + shots) * pairs * scored / max(1, sizes["n_pairs"])  # both ways, and their floors
        yield f"layer ablation, {models:.0f} models", models * (translated + pairs + sizes["heldout"] + rows)
    if chosen.spectral:
        models = changed_models(study, n_heads)
        kinds = study.get("spectral.measures") or ["retrieval", "nll", "task"]
        tokens = {"retrieval": pairs, "nll": sizes["heldout"], "task": rows}
        yield f"heads, truncation, connection, {models:.0f} models", models * sum(tokens.get(k, 0) for k in kinds)
    if chosen.alignment:  # there and back, and products: four times as far
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
        # What is written is as long as a pair, and its reference is scored behind two sources.
        yield f"steering, {models} conditions", models * 3.5 * scored * pairs
    if chosen.lsn:
        each = sizes["neurons"] / len(chosen.lsn)
        yield f"neuron counts, {each:,.0f} tokens a language", sizes["neurons"]
        yield "activation over CPT", (n_checkpoints + 1) * min(each, 98_304)
        yield f"component swaps, up to {sets} sets each", 2 * (sets + 11) * (pairs + heldout)
    if chosen.deactivation:
        methods, texts = study.get("lsn.methods") or [], 32 * len(chosen.lsn) * (study.get("lsn.texts") or 500)
        texts *= ("ap" in methods) + 3 * ("gradient" in methods)  # with the way back
        yield "neurons by other methods", texts + ("ternary" in methods) * sizes["neurons"]  # of the base
        yield (
            "deactivation",
            (1 + len(methods)) * (1 + len(chosen.lsn) * (1 + 2 * min(12, max(5, sets)))) * sizes["heldout"],
        )


def changed_models(study: Study, n_heads: int) -> float:
    """How many models Part IV measures, roughly: heads put back, the update cut, the line between two runs."""
    rewind, truncate, connect = (cli.sibling(f"spectral/{name}.py") for name in ("rewind", "truncate", "connect"))
    others = bool(study.get("runs"))

    def orders_of(order: str) -> int:
        drawn = (study.get("spectral.rewind.draws") or rewind.DRAWS) if order.startswith("random") else 1
        return drawn * (2 if order in rewind.BY_ENERGY else 1) * (others or order != "contrast")

    orders = study.get("spectral.rewind.orders") or rewind.ORDERS
    points = sum(map(orders_of, orders)) * 100 / (study.get("spectral.rewind.stride") or rewind.STRIDE)
    alone = n_heads * ("greedy" in orders)  # every head by itself
    draws = study.get("spectral.truncate.draws") or truncate.DRAWS
    ways = study.get("spectral.truncate.curves") or truncate.LOOKS
    shares = study.get("spectral.truncate.shares") or truncate.SHARES
    cut = sum(draws if way in truncate.DRAWN else 1 for way in ways) * len(shares)
    between = sum(0 < at < 1 for at in study.get("spectral.connect.at") or connect.AT)
    return points + alone + cut + others * 3 * (between + 1)  # the line, two random ones, and the ends


def machine() -> tuple[float, str]:
    """Floating-point operations per second of a forward pass here, and on what, from a moment of matrix products."""
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
