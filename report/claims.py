"""A verdict on each of the paper's six claims, from the results of a study, by the rules of report/README.md.

Each claim is a function c1 .. c6 of plain numbers; what is missing or too short leaves its claim undecided, with the reason.

In:   a study: the results of retrieval, layers, layer swap, attn_vs_ffn, activation correlation, both component swaps
      (their --controls) and downstream correlation, as many as there are.
Out:  claims.json, claims.md, claims.tex (tables), and a figure (PDF, PNG). With --seeds: claims_seeds.md and .tex in the
      folder --output, the verdicts of several seeds of a study side by side.

Full: python report/claims.py --study studies/multi30k.yaml --seeds 0,1,2 --output build/try/claims
Tiny: python report/claims.py --study demo/tiny.yaml
"""  # noqa: E501

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_utils import cli, components, controls, evaluation, figures, languages, refs, results, stats
from cpt_utils.errors import InputError
from cpt_utils.study import Study

if TYPE_CHECKING:
    import numpy as np

SCHEMA = "claims"
ALPHA = 0.05
WORTH = 0.3  # the least correlation worth the name
ENOUGH = 19  # random sets: with fewer no p can reach .05
TIE = 1e-9  # means of hits that differ by less are equal
YES, NO, OPEN = "supported", "not supported", "undecided"
CLAIMS = {
    "C1": "accuracy is low in outer layers and high in middle ones",
    "C2": "a hub swap costs less than random swaps of the same size",
    "C3": "attention changes more than the FFN",
    "C4": "the change of attention in interface layers tracks the change of LSN activation more closely than the "
    "change of LSN weights does",
    "C5": "swapping attention in interface layers hurts more than swapping the FFN in LSN-rich layers",
    "C6": "downstream accuracy follows the change of interface layers",
}
ACTIVATIONS = "lsn/lsn_activation_cpt.py"
MADE_BY = {
    "retrieval": "sentence-retrieval/sr_experiment.py",
    "layers": "layer-specialize/layer_specialize.py",
    "int_and_sem": "weight-diff/int_and_sem.py",
    "layer_swap": "layer-swap/layer-swap.py --controls",
    "attn_vs_ffn": "weight-diff/attn_vs_ffn.py",
    "lsn_mask": "lsn/identify.py",
    "lsn_activation": ACTIVATIONS,
    "deactivation": "lsn/deactivate.py",
    "activation_correlation": "activation-correlation/activation-correlation.py",
    "attn_int_swap": "component-swap/attn_int_swap.py --controls",
    "ffn_lsn_swap": "component-swap/ffn_lsn_swap.py --controls",
    "downstream": "downstream-correlation/downstream_correlation.py",
}


# ---------------------------------------------------------------- numbers and verdicts


@dataclass
class Verdict:
    """What is said of a claim: `numbers` decide (see `number`), those `beside` them do not; `files` were read."""

    claim: str
    verdict: str
    reason: str
    numbers: list[dict] = field(default_factory=list)
    beside: list[dict] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


class Missing(Exception):
    """What a claim needs and is not there; the claim stays undecided."""


def number(name: str, value: float | None, ci=(None, None), n: int | None = None, of: str = "", **more) -> dict:
    """A number with its 95 % interval over `n` units (`of` says what they are); `more` are p values and the place."""
    row = {"name": name, "value": value, "ci_low": ci[0], "ci_high": ci[1], "p_value": None, "n": n, "n_of": of}
    return row | {"place": None} | more


def correlated(name: str, found: dict, key: str = "correlation") -> dict:
    """A result of `stats.correlation` or `stats.correlation_difference` as a number."""
    more = {"note": found["note"]} if "note" in found else {}
    interval = found["ci_low"], found["ci_high"]
    return number(name, found[key], interval, found["n_points"], "points", p_value=found.get("p_value"), **more)


def above(row: dict, bound: float = 0.0) -> bool:
    """Whether the whole interval is above `bound`; one that touches it is not."""
    return row["ci_low"] is not None and row["ci_low"] > bound


def below(row: dict, bound: float = 0.0) -> bool:
    return row["ci_high"] is not None and row["ci_high"] < bound


def beside_zero(row: dict) -> str:
    return "above 0" if above(row) else "below 0" if below(row) else "not clear of 0"


def verdict(yes: bool, no: bool) -> str:
    """What excludes a claim goes before what speaks for it: an r within 0 and .3 is above 0, but not worth the name."""
    return NO if no else YES if yes else OPEN


def listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def whole_or_not(rows: list[dict], test, words: str) -> str:
    """ "middle minus early and middle minus late are above 0", of the rows that pass `test`."""
    names = [row["name"] for row in rows if test(row)]
    return f"{listed(names)} {'is' if len(names) == 1 else 'are'} {words}"


def too_short(rows: list[dict], n_checkpoints: int) -> str:
    """Why a correlation has no interval, where that leaves a claim undecided; "" where all have one."""
    without = [row for row in rows if row["ci_low"] is None]
    if not without:
        return ""
    if n_checkpoints < 5:
        return f"the run is too short: {n_checkpoints} checkpoints, and an interval on first differences needs 5"
    return f"{without[0]['name']} has no interval: {without[0].get('note', 'not defined')}"


# ---------------------------------------------------------------- the claims


def thirds(n_layers: int) -> dict[str, slice]:
    """Hidden states h_1 .. h_L in three parts: the first and the last floor(L/3), and the middle."""
    third = n_layers // 3
    last = n_layers - third + 1
    return {"early": slice(1, third + 1), "middle": slice(third + 1, last), "late": slice(last, n_layers + 1)}


def c1(hits: np.ndarray, untrained: np.ndarray | None, seed: int = 42, why_not: str = "") -> Verdict:
    """Low in outer layers, high in middle ones.

    Args:
        hits: 0/1 [L+1, sentences] of the last checkpoint.
        untrained: the same, over the same sentences, of an untrained model; None: `why_not` says why.
    """
    import numpy as np

    hits = np.asarray(hits, dtype=np.float64)
    n_layers, n = len(hits) - 1, hits.shape[1]
    if n_layers < 3 or n < 2:
        return Verdict("C1", OPEN, f"{n_layers} layers and {n} sentences are too few: 3 layers and 2 sentences or more")
    cut = thirds(n_layers)
    part = {name: hits[where].mean(0) for name, where in cut.items()}
    rows = [_over_sentences(f"middle minus {name}", part["middle"] - part[name], seed) for name in ("early", "late")]
    beside = [number(f"accuracy, {name}", float(values.mean()), n=n, of="sentences") for name, values in part.items()]
    beside.append(number("accuracy, best hidden state", float(hits[1:].mean(1).max()), n=n, of="sentences"))
    if untrained is not None:
        chance = np.asarray(untrained, dtype=np.float64)[cut["middle"]].mean(0)
        rows.append(_over_sentences("middle minus untrained", part["middle"] - chance, seed))
        beside.append(number("accuracy, middle, untrained", float(chance.mean()), n=n, of="sentences"))
    no = any(below(row) for row in rows[:2])
    yes = all(above(row) for row in rows) and untrained is not None
    if no:
        reason = whole_or_not(rows[:2], below, "below 0")
    elif yes:
        reason = "the middle is above the outer layers on both sides, and above an untrained model"
    elif all(above(row) for row in rows):
        reason = f"the middle is above both sides, but there is no untrained model to compare it with: {why_not}"
    else:
        reason = whole_or_not(rows, lambda row: not above(row), "not above 0")
    return Verdict("C1", verdict(yes, no), reason, rows, beside)


def c2(
    own: float, others: list[float], own_units: np.ndarray, other_units: np.ndarray, base: float, target: float,
    seed: int = 42,
) -> Verdict:  # fmt: skip
    """The hub swap costs less than random swaps.

    Args:
        own, others: retrieval after the hub swap, and after each random swap.
        own_units, other_units: the same by sentence, [sentences] and [sets, sentences].
        base, target: retrieval of the models that are swapped.
    """
    import numpy as np

    reason = nothing_to_lose(base, target)
    if not others:
        return Verdict("C2", OPEN, reason or f"no random sets; {ENOUGH} or more are needed")
    # Rounded, because equal numbers of hits may differ in the last bit of their mean.
    place = controls.place(round(own, 9), [round(value, 9) for value in others], higher_is_better=True)
    units = np.asarray(own_units, dtype=np.float64) - np.mean(np.asarray(other_units, dtype=np.float64), axis=0)
    mean = math.fsum(others) / len(others)
    row = _over_sentences("hub minus random", units, seed) | {"value": own - mean}
    row |= {"p_value": place["p_value"], "p_opposite": place["p_worse"]}
    row["place"] = {"rank": place["rank"], "n_random": len(others), "draws": [value - mean for value in others]}
    yes = place["p_value"] <= ALPHA and above(row)
    no = place["p_worse"] <= ALPHA
    if not reason and len(others) < ENOUGH:
        reason = f"{len(others)} random sets are too few: {ENOUGH} or more are needed"
    found = OPEN if reason else verdict(yes, no)
    if not reason:
        what = f"rank {place['rank']} of {len(others) + 1}"
        told = f"{shown_p(place['p_value'])} for costing less, {shown_p(place['p_worse'])} for costing more"
        reason = f"the hub has {what} ({told}), and over sentences hub minus random is {beside_zero(row)}"
    return Verdict("C2", found, reason, [row])


def c3(by_max: list[tuple[float, float]], by_mean: list[tuple[float, float]], seed: int = 42) -> Verdict:
    """Attention changes more than the FFN.

    Args:
        by_max, by_mean: (attention, FFN) of each layer at the last checkpoint, mean |dW|: the largest of their
            projections, and the mean over them.
    """
    if len(by_max) < 2:
        return Verdict("C3", OPEN, f"{len(by_max)} layer is too few: an interval over layers needs 2 or more")
    rows = [
        _over_units(f"attention minus FFN, {name}", [a - f for a, f in pairs], seed, "layers")
        for name, pairs in (("largest projection", by_max), ("mean of projections", by_mean))
    ]
    yes, no = all(map(above, rows)), all(map(below, rows))
    if yes or no:
        reason = f"by the largest projection and by their mean, attention changes {'more' if yes else 'less'}"
    else:
        said = [beside_zero(row) for row in rows]
        reason = f"the largest projection is {said[0]}, the mean of projections {said[1]}"
        reason += ": it depends on the definition" if {*said} == {"above 0", "below 0"} else ""
    return Verdict("C3", verdict(yes, no), reason, rows)


def c4(attention: list[float], gate: list[float], activation: list[float]) -> Verdict:
    """Attention tracks the change of activation more closely than the neurons' weights do.

    Args:
        attention, gate: change of interface attention and of the neurons' gates at each checkpoint, in step order.
        activation: the change of the neurons' activation above their control.
    """
    steps = [stats.first_differences(series) for series in (attention, gate, activation)]
    both, alone = stats.correlation_difference(*steps), stats.correlation(steps[0], steps[2])
    rows = [correlated("r(attention) minus r(LSN weights)", both, "difference"), correlated("r(attention)", alone)]
    beside = [correlated("r(LSN weights)", stats.correlation(steps[1], steps[2]))]
    raw = stats.correlation_difference(attention, gate, activation)
    beside.append(correlated("r(attention) minus r(LSN weights), raw curves", raw, "difference"))
    for name, series in (("attention", attention), ("LSN weights", gate)):
        beside.append(correlated(f"r({name}), raw curves", stats.correlation(series, activation)))
    yes = above(rows[0]) and above(rows[1])
    no = below(rows[0]) or below(rows[1], WORTH)
    if yes and not no:
        reason = "attention goes with the activation, and more closely than the neurons' weights"
    elif no:
        said = ["the difference is below 0"] * below(rows[0])
        said += [f"r(attention) is below {WORTH}"] * below(rows[1], WORTH)
        reason = listed(said)
    else:
        reason = too_short(rows, len(attention)) or whole_or_not(rows, lambda row: not above(row), "not above 0")
    return Verdict("C4", verdict(yes, no), reason, rows, beside)


@dataclass(frozen=True)
class Swapped:
    """Retrieval after one component swap, and after swaps of the same component in random layers."""

    own: float
    others: list[float]  # [sets]
    units: np.ndarray  # of the own set, [sentences]
    n_layers: int


def c5(attention: Swapped, ffn: Swapped, base: float, target: float, seed: int = 42) -> Verdict:
    """The attention swap in interface layers hurts more than the FFN swap in LSN-rich layers."""
    import numpy as np

    units = np.asarray(ffn.units, dtype=np.float64) - np.asarray(attention.units, dtype=np.float64)
    difference = ffn.own - attention.own
    row = _over_sentences("FFN swap minus attention swap", units, seed) | {"value": difference}
    counts = {"FFN": len(ffn.others), "attention": len(attention.others)}
    reason = nothing_to_lose(base, target)
    if not reason and attention.n_layers != ffn.n_layers:
        reason = f"the sizes differ: attention is swapped in {attention.n_layers} layers, the FFN in {ffn.n_layers}"
    if not reason and min(counts.values()) < ENOUGH:
        reason = f"{counts['FFN']} random FFN sets and {counts['attention']} of attention are too few: {ENOUGH} of each"
    if min(counts.values()):
        pairs = np.subtract.outer(np.asarray(ffn.others), np.asarray(attention.others))
        n = pairs.size
        row["p_value"] = (1 + int((pairs >= difference - TIE).sum())) / (1 + n)
        row["p_opposite"] = (1 + int((pairs <= difference + TIE).sum())) / (1 + n)
        rank = 1 + int((pairs > difference + TIE).sum())
        draws = {"ffn": list(ffn.others), "attention": list(attention.others)}
        row["place"] = {"rank": rank, "n_random": n, "n_ffn_sets": counts["FFN"], "draws": draws}
        row["place"]["n_attention_sets"] = counts["attention"]
    if reason:
        return Verdict("C5", OPEN, reason, [row])
    yes = above(row) and row["p_value"] <= ALPHA
    no = below(row) or row["p_opposite"] <= ALPHA
    over = beside_zero(row)
    told = f"{shown_p(row['p_value'])}, {shown_p(row['p_opposite'])} for the other direction"
    reason = (
        f"over sentences the difference is {over}; it has rank {rank} of {n + 1} among pairs of random sets ({told}; "
        f"the pairs are not independent: they come from {counts['FFN']} FFN and {counts['attention']} attention sets)"
    )
    return Verdict("C5", verdict(yes, no), reason, [row])


def c6(accuracy: list[float], change: list[float]) -> Verdict:
    """Downstream accuracy follows the change of interface layers: one value each a checkpoint, in step order."""
    steps = stats.first_differences(change), stats.first_differences(accuracy)
    row = correlated("r(accuracy, interface change)", stats.correlation(*steps))
    beside = [
        correlated("r, raw curves", stats.correlation(change, accuracy)),
        correlated("Spearman's r, first differences", stats.correlation(*steps, method="spearman")),
    ]
    yes, no = above(row), below(row, WORTH)
    if no:
        reason = f"r on first differences is below {WORTH}"
    elif yes:
        reason = "r on first differences is above 0"
    else:
        reason = too_short([row], len(change)) or f"r on first differences is neither above 0 nor below {WORTH}"
    return Verdict("C6", verdict(yes, no), reason, [row], beside)


def nothing_to_lose(base: float, target: float) -> str:
    if target > base:
        return ""
    return f"nothing to lose: the checkpoint's retrieval ({target:.4f}) is not better than the base's ({base:.4f})"


def _over_sentences(name: str, values: np.ndarray, seed: int) -> dict:
    """A mean over sentences; values are rounded, or an average of equal hits could be above 0 by its last bit."""
    return _over_units(name, values.round(9), seed, "sentences")


def _over_units(name: str, values, seed: int, of: str) -> dict:
    import numpy as np

    values = np.asarray(values, dtype=np.float64)
    return number(name, float(values.mean()), stats.bootstrap_mean(values, seed), len(values), of)


# ---------------------------------------------------------------- the study's results


class Results:
    """The result files of a study, read and checked: each must be about the study's base, run and languages."""

    def __init__(self, study: Study):
        self.study = study
        self.base, self.run = known_models(study)
        self.last = self.run[-1]
        self.folder = study.result("claims").parent.parent
        self.read: list[str] = []

    def path(self, step: str, *below: str) -> Path:
        """A file of `step` in the study; Missing where it is not there."""
        return self.there(self.study.result(step).joinpath(*below), step)

    def there(self, path: Path, step: str) -> Path:
        """`path`, a file of `step`; Missing where it is not there."""
        if not path.exists():
            # The place within the study is named: tables are for people who have other folders.
            place = path.relative_to(self.folder) if path.is_relative_to(self.folder) else path
            raise Missing(f"{place} is not there (it is made by {MADE_BY[step]})")
        return path

    def json(self, path: Path, schema: str, model: dict | None = None, **expect) -> tuple[dict, dict]:
        """Payload and header of a result.

        Args:
            model: which model it must be about; None: the last checkpoint.

        Raises:
            InputError: it is about another model of any role, or disagrees with `expect`.
        """
        payload, header = results.read_json(path, schema, **expect)
        if not isinstance(payload, dict):
            raise InputError(f"{path} holds no named values; write it again")
        models = header.get("models") or {}
        wanted = {"base": self.base, "target": self.last, "model": model or self.last}
        pairs = [(models[role], wanted[role]) for role in wanted if models.get(role)]
        mine = {str(ref["step"]): ref for ref in self.run}
        pairs += [(ref, mine.get(step)) for step, ref in (models.get("checkpoints") or {}).items()]
        for found, expected in pairs:
            if expected is None or not refs.same_model(found, expected):
                than = f"{expected['spec']} of this study, or was trained again since" if expected else "this study's"
                raise InputError(f"{path} is about {found.get('spec')}, another model than {than}; run that step again")
        self.read.append(str(path))
        return payload, header

    def sides(self) -> dict:
        return {f"{side}_lang": self.study.get(f"languages.{side}") for side in ("base", "target")}

    def retrieval_folder(self) -> Path:
        folder, sides = self.there(self.study.result("retrieval"), "retrieval"), self.sides()
        if None in sides.values():
            raise Missing("the study does not say which languages retrieval is between")
        there = [path.name for path in folder.iterdir() if path.is_dir()]
        try:
            return folder / languages.find_pair(there, *sides.values(), what=str(folder))
        except InputError as error:
            raise Missing(str(error)) from None

    def retrieval(self, ref: dict) -> tuple[dict, dict, Path]:
        """Payload, header and path of the retrieval of one model."""
        path = self.there(self.retrieval_folder() / f"{ref['model_id']}.json", "retrieval")
        return *self.json(path, "sentence-retrieval", ref, **self.sides()), path

    def untrained(self) -> tuple[dict, dict, Path]:
        """The same of the untrained model."""
        folder = self.retrieval_folder()
        names = ("untrained.json", *(f"untrained.{ref['model_id']}.json" for ref in (self.last, self.base)))
        path = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
        self.there(path, "retrieval")
        return *self.json(path, "sentence-retrieval", **self.sides()), path

    def hits(self, path: Path, payload: dict) -> np.ndarray:
        """The hits [L+1, sentences] beside the retrieval result `path`."""
        import numpy as np

        step_2 = cli.sibling("layer-specialize/layer_specialize.py")
        file = self.there(path.with_suffix(".pt"), "retrieval")
        self.read.append(str(file))
        return step_2.read_hits(path, np.array([value for _, value in sorted(payload["layer_accuracy"])]))

    def layers(self) -> dict:
        """Step 2's file, which may be about any checkpoint of the run."""
        path = self.path("layers")
        payload, header = results.read_json(path, "layer-specialize", **self.sides())
        measured = (header.get("models") or {}).get("model")
        if measured and not refs.belongs(measured, [self.base, *self.run]):
            raise InputError(f"{path} is about {measured['spec']}, no model of this study; run that step again")
        self.read.append(str(path))
        return payload

    def refuse_other_layers(self, path: Path, layers: list[int], step: str, key: str) -> None:
        """Refuse a result about other layers than `key` of the file of `step` now says, where that file is there."""
        chosen = self.study.result(step)
        now = results.read_json(chosen)[0].get(key) if chosen.is_file() else None
        if now is not None and sorted(layers) != sorted(now):
            raise InputError(f"{path} is about layers {sorted(layers)}, but {chosen} says {sorted(now)}; run it again")

    def swap(self, step: str, own: str) -> tuple[dict, dict]:
        """A controls.json with what it says of retrieval, and its header.

        Returns:
            `sets, payload, path` of the file; `values` [sets] and `units` [sets, sentences]; `own` and `random`, which
            of the sets these are; `base` and `target`, their values.
        """
        path = self.path(step, "controls.json")
        payload, header = self.json(path, controls.SCHEMA, **self.sides())
        sets = payload.get("sets") or []
        at = components.find(sets, own)
        if at is None:
            raise InputError(f"{path} has no set {own}; run {MADE_BY[step]} again")
        if "retrieval_mean" not in sets[at]["values"]:
            raise Missing(f"{path} has no retrieval; run {MADE_BY[step]} with parallel sentences")
        pt = self.there(path.with_suffix(".pt"), step)
        units = results.read_tensors(pt).get("retrieval_mean")
        values = [row["values"]["retrieval_mean"] for row in sets]
        if units is None or len(units) != len(sets) or abs(units.double().mean(1) - _tensor(values)).max() > 1e-5:
            raise InputError(f"{pt} does not belong to {path.name} beside it; run {MADE_BY[step]} --overwrite again")
        self.read.append(str(pt))
        random = [i for i, row in enumerate(sets) if row["name"] == "random"]
        found = {"sets": sets, "values": values, "units": units.double().numpy(), "own": at, "random": random}
        ends = {name: values[next(i for i, row in enumerate(sets) if row["name"] == name)] for name in ENDS}
        return found | ends | {"payload": payload, "path": path}, header


ENDS = ("base", "target")


def _tensor(values: list[float]):
    import torch

    return torch.tensor(values, dtype=torch.float64)


def known_models(study: Study) -> tuple[dict, list[dict]]:
    """Descriptions of the study's base and of its checkpoints in step order.

    Where the models themselves are gone, the weight comparisons' headers say what they were.
    """
    base, run = (study.value(None, "--study", key) for key in ("base", "run"))
    try:
        return refs.model(base).describe(), [ref.describe() for ref in refs.run(run)]
    except InputError as error:
        for path in (study.result("int_and_sem"), study.result("attn_vs_ffn")):
            models = results.read_json(path)[1].get("models", {}) if path.is_file() else {}
            checkpoints = models.get("checkpoints") or {}
            if models.get("base") and checkpoints:
                cli.say(f"{error}; the results are checked against the models of {path}")
                return models["base"], [checkpoints[step] for step in sorted(checkpoints, key=int)]
        raise


def refuse_other_sentences(headers: list[tuple[Path, dict]]) -> None:
    """Refuse results over different sentences, where their headers say which."""
    said = [(path, (header.get("data") or {}).get("pairs_sha256")) for path, header in headers]
    said = [(path, value) for path, value in said if value]
    for path, value in said[1:]:
        if value != said[0][1]:
            raise InputError(f"{path} and {said[0][0]} were measured on different sentences; run one of them again")


def judge_c1(found: Results) -> Verdict:
    payload, header, path = found.retrieval(found.last)
    hits = found.hits(path, payload)
    untrained, why_not = None, ""
    try:
        twin, twin_header, twin_path = found.untrained()
        refuse_other_sentences([(path, header), (twin_path, twin_header)])
        untrained = found.hits(twin_path, twin)
    except Missing as reason:
        why_not = str(reason)
    if untrained is not None and untrained.shape != hits.shape:
        raise InputError(f"{twin_path} is about another number of layers or sentences than {path}; run it again")
    return c1(hits, untrained, found.study.seed, why_not)


def judge_c2(found: Results) -> Verdict:
    swap, _ = found.swap("layer_swap", "semantic_hub")
    hub = swap["sets"][swap["own"]]["layers"]
    found.refuse_other_layers(swap["path"], hub, "layers", "semantic_layers")
    others = [swap["values"][i] for i in swap["random"]]
    made = c2(
        swap["values"][swap["own"]], others, swap["units"][swap["own"]], swap["units"][swap["random"]],
        swap["base"], swap["target"], found.study.seed,
    )  # fmt: skip
    compared = swap["payload"].get("comparison") or {}
    made.beside = [_place_beside(name, row) for name, row in compared.items() if name != "retrieval_mean"]
    return made


def _place_beside(name: str, row: dict) -> dict:
    interval = row.get("ci_low"), row.get("ci_high")
    label = f"hub minus random, {evaluation.MEASURES[name].label}"
    place = {"rank": row["rank"], "n_random": row["n_random"]}
    return number(label, row["own_minus_random"], interval, p_value=row["p_value"], place=place)


def judge_c3(found: Results) -> Verdict:
    path = found.path("attn_vs_ffn")
    payload, _ = found.json(path, "attn_vs_ffn")
    step = str(found.last["step"])
    if step not in payload.get("checkpoints", {}):
        raise Missing(f"{path} has no step {step}, the last of the run")
    row, script = payload["checkpoints"][step], cli.sibling("weight-diff/attn_vs_ffn.py")
    layers = list(row["layers"].values())
    try:
        by_max, by_mean = (script.pairs(layers, summary) for summary in ("summary", "summary_mean"))
    except KeyError as error:
        raise InputError(f"{path} has no {error.args[0]}; run {MADE_BY['attn_vs_ffn']} again") from None
    made = c3(by_max, by_mean, found.study.seed)
    for summary, words in (
        ("summary_relative", "relative change, largest projection"),
        ("summary_relative_mean", "relative change, mean of projections"),
    ):
        both = row.get(summary) or {}
        if None not in (both.get("attn"), both.get("ffn")):
            made.beside.append(number(f"attention minus FFN, {words}", both["attn"] - both["ffn"], n=len(layers)))
    return made


def judge_c4(found: Results) -> Verdict:
    path = found.path("activation_correlation", f"{found.study.name}_correlation_strength.json")
    payload, header = found.json(path, "activation_correlation")
    target = found.study.get("languages.target")
    if target and header.get("language") and not languages.same(header["language"], target):
        raise InputError(f"{path} is about {header['language']}, not {target}; run that step again")
    if header.get("interface_layers"):
        found.refuse_other_layers(path, header["interface_layers"], "layers", "interface_layers")
    series = payload.get("series")
    if not series:
        raise InputError(f"{path} has no series; run {MADE_BY['activation_correlation']} again")
    return c4(series["attention"], series["gate"], series["abs_d"])


def judge_c5(found: Results) -> Verdict:
    attention, attention_header = found.swap("attn_int_swap", "attention_interface")
    ffn, ffn_header = found.swap("ffn_lsn_swap", "ffn_lsn_rich")
    refuse_other_sentences([(attention["path"], attention_header), (ffn["path"], ffn_header)])
    if attention["units"].shape[1] != ffn["units"].shape[1]:
        raise InputError(f"{attention['path']} and {ffn['path']} have different numbers of sentences; run one again")
    own, rich = (swap["sets"][swap["own"]] for swap in (attention, ffn))
    found.refuse_other_layers(attention["path"], own["layers"], "layers", "interface_layers")
    found.refuse_other_layers(ffn["path"], rich["layers"], "lsn_layers", "layers")
    sides = [
        Swapped(
            swap["values"][swap["own"]],
            [swap["values"][i] for i in swap["random"]],
            swap["units"][swap["own"]],
            len(swap["sets"][swap["own"]]["layers"]),
        )
        for swap in (attention, ffn)
    ]
    made = c5(*sides, attention["base"], attention["target"], found.study.seed)
    for name in own["values"]:
        if name != "retrieval_mean" and name in rich["values"]:
            difference = rich["values"][name] - own["values"][name]
            made.beside.append(number(f"FFN swap minus attention swap, {evaluation.MEASURES[name].label}", difference))
    for words, name in (("the FFN of the same layers", "ffn_interface"), ("attention, LSN-rich", "attention_lsn_rich")):
        at = components.find(attention["sets"], name)
        if at is not None:
            made.beside.append(number(f"retrieval, {words}", attention["values"][at]))
    return made


def judge_c6(found: Results) -> Verdict:
    path = found.path("downstream")
    payload, _ = found.json(path, "downstream_correlation")
    values, metric = payload.get("values") or {}, payload.get("metric")
    rows = [values[step] for step in sorted(values, key=int) if int(step)]
    if not rows or any(not isinstance(row.get(key), float | int) for row in rows for key in (metric, "interface_avg")):
        raise InputError(
            f"{path} lacks accuracy or interface change of a checkpoint; run {MADE_BY['downstream']} again"
        )
    made = c6([row[metric] for row in rows], [row["interface_avg"] for row in rows])
    hub = payload.get("semantic_hub") or {}
    if hub.get("first_differences"):
        made.beside.append(correlated("r(accuracy, hub change), first differences", hub["first_differences"]))
    return made


JUDGES = {"C1": judge_c1, "C2": judge_c2, "C3": judge_c3, "C4": judge_c4, "C5": judge_c5, "C6": judge_c6}


def judge(found: Results) -> dict[str, dict]:
    """Every claim's verdict as it goes into the result, by its name.

    Raises:
        InputError: the study has no result that a claim needs.
    """
    verdicts = {}
    for name, function in JUDGES.items():
        found.read = []
        try:
            made = function(found)
        except Missing as reason:
            made = Verdict(name, OPEN, str(reason))
        made.files = list(dict.fromkeys(found.read))
        verdicts[name] = {"text": CLAIMS[name], **{k: v for k, v in dataclasses.asdict(made).items() if k != "claim"}}
    if not any(row["files"] for row in verdicts.values()):
        raise InputError(f"{found.folder} holds no result that a claim needs; run the steps of the README first")
    return verdicts


# ---------------------------------------------------------------- tables


def shown(value: float | None) -> str:
    """A number for people: three decimals, or two after the point with an exponent where it is small."""
    if value is None:
        return "none"
    return f"{value:.2e}" if 0 < abs(value) < 0.01 else f"{value:.3f}"


def shown_p(p: float) -> str:
    return f"p = {p:.3f}" if p >= 0.0005 else "p < 0.001"


def told(row: dict, name: bool = True) -> str:
    """ "middle minus early 0.120 [0.101, 0.139], n = 1000 sentences, p = 0.036 (rank 1 of 28)"."""
    text = f"{row['name']} " * name + shown(row["value"])
    if row["ci_low"] is not None:
        text += f" [{shown(row['ci_low'])}, {shown(row['ci_high'])}]"
    if row["n"] is not None:
        text += f", n = {row['n']} {row['n_of']}".rstrip()
    if row["p_value"] is not None:
        text += f", {shown_p(row['p_value'])}"
    place = row["place"]
    if place:
        text += f" (rank {place['rank']} of {place['n_random'] + 1})"
    return text


def markdown(payload: dict) -> str:
    """The table of verdicts, and below it what was measured beside and decides nothing."""
    lines = [
        f"# Claims on {payload['study']}",
        "",
        "| | claim | verdict | what decides | why |",
        "|---|---|---|---|---|",
    ]
    for name, row in payload["claims"].items():
        numbers = "<br>".join(map(told, row["numbers"])) or "-"
        cells = (name, row["text"], f"**{row['verdict']}**", numbers, row["reason"])
        lines.append(_markdown_row(cells))
    lines += ["", "Intervals are 95 %, alpha is .05. The rules stand in report/README.md.", ""]
    lines += ["## Beside it, deciding nothing", "", "| | number |", "|---|---|"]
    lines += [_markdown_row((name, told(row))) for name, one in payload["claims"].items() for row in one["beside"]]
    return "\n".join(lines) + "\n"


def _markdown_row(cells) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def latex(payload: dict) -> str:
    """The table of verdicts as a plain tabular of the width of the text."""
    rows = [("", "claim", "verdict", "what decides", "why")]
    for name, row in payload["claims"].items():
        numbers = [escaped(told(number_row)) for number_row in row["numbers"]] or ["-"]
        rows.append((name, escaped(row["text"]), escaped(row["verdict"]), lines_of(numbers), escaped(row["reason"])))
    return tabular(rows, (0.04, 0.19, 0.12, 0.29, 0.24))


def lines_of(parts: list[str]) -> str:
    return r" \newline ".join(parts)


def tabular(rows: list[tuple[str, ...]], shares: tuple[float, ...]) -> str:
    """Rows of escaped cells, the first of them the head; `shares` are the columns' parts of the line width."""
    columns = "".join(rf"p{{{share}\linewidth}}" for share in shares)
    lines = [r"\begin{tabular}{" + columns + "}", r"\hline"]
    for i, row in enumerate(rows):
        lines.append(" & ".join(row) + r" \\")
        if i in (0, len(rows) - 1):
            lines.append(r"\hline")
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}",
}  # fmt: skip
NUMBER = re.compile(r"(?<![\w.-])(-\d+(?:\.\d+)?|\d+\.\d+(?=e))(?:e([+-])0*(\d+))?")


def escaped(text: str) -> str:
    """Plain text for LaTeX; negative numbers and powers of ten go into math."""
    text = "".join(SPECIAL.get(letter, letter) for letter in text)
    return NUMBER.sub(_in_math, text)


def _in_math(found: re.Match) -> str:
    power = rf"\cdot 10^{{{found[2].replace('+', '')}{found[3]}}}" if found[3] else ""
    return f"${found[1]}{power}$"


def seeds_tables(seeds: dict[int, dict]) -> tuple[str, str]:
    """The verdicts of several seeds side by side, in Markdown and LaTeX; `seeds` holds each one's claims.json."""
    first = next(iter(seeds.values()))
    lines = [f"# Claims on {first['study']}, {len(seeds)} seeds", ""]
    lines.append(_markdown_row(("", "claim", *(f"seed {seed}" for seed in seeds))))
    lines.append("|---" * (2 + len(seeds)) + "|")
    rows = [("", "claim", *(f"seed {seed}" for seed in seeds))]
    for name, claim in first["claims"].items():
        found = [payload["claims"][name] for payload in seeds.values()]
        cells = [[one["verdict"], *(map(told, one["numbers"]) if one["numbers"] else [one["reason"]])] for one in found]
        parts = ["<br>".join([f"**{cell[0]}**", *cell[1:]]) for cell in cells]
        lines.append(_markdown_row((name, claim["text"], *parts)))
        rows.append((name, escaped(claim["text"]), *(lines_of([escaped(part) for part in cell]) for cell in cells)))
    lines += ["", "Intervals are 95 %, alpha is .05. The rules stand in report/README.md."]
    shares = (0.04, 0.16, *[round(0.7 / len(seeds), 3)] * len(seeds))
    return "\n".join(lines) + "\n", tabular(rows, shares)


# ---------------------------------------------------------------- the figure

LOOKS = {YES: ("✔", "#009E73"), NO: ("✘", "#D55E00"), OPEN: ("?", "#555555")}
PANELS = {  # short words of the claim, and what the axis shows
    "C1": ("outer layers low, middle high", "difference in retrieval accuracy"),
    "C2": ("hub swap costs less than random", "retrieval, minus mean of random sets"),
    "C3": ("attention changes more than FFN", "difference in mean |ΔW|"),
    "C4": ("attention tracks LSN activation", "r of first differences (dotted: .3)"),
    "C5": ("attention swap hurts more than FFN's", "difference in retrieval accuracy"),
    "C6": ("accuracy follows interface change", "r of first differences (dotted: .3)"),
}


def draw(path: Path, payload: dict) -> None:
    """A panel for each claim: the deciding numbers with their intervals, and the random draws behind them."""
    with figures.style() as plt:
        fig, axes = plt.subplots(2, 3, figsize=(figures.PAGE, 3.9))
        fig.get_layout_engine().set(h_pad=0.08, hspace=0.06, wspace=0.04)
        for axis, (name, row) in zip(axes.flat, payload["claims"].items(), strict=True):
            _panel(axis, name, row)
        figures.save(fig, path)


def _panel(axis, name: str, row: dict) -> None:
    mark, shade = LOOKS[row["verdict"]]
    words, label = PANELS[name]
    axis.set_title(f"{mark} {name} {row['verdict']}\n", loc="left", color=shade, fontweight="bold")
    axis.text(0, 1.03, words, transform=axis.transAxes, fontsize=7, va="bottom")
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    rows = [one for one in row["numbers"] if one["value"] is not None]
    if not rows:
        axis.set_xticks([])
        axis.spines["bottom"].set_visible(False)
        # Of files the names alone; the table has their places.
        text = textwrap.fill(re.sub(r"[\w.-]+/", "", row["reason"]), 40, break_on_hyphens=False)
        axis.text(0, 0.9, text, transform=axis.transAxes, fontsize=6.5, va="top")
        return
    for at, one in enumerate(rows):
        draws = _draws(one["place"])
        if draws:
            low, high = -0.3, 0.1
            heights = [-at + low + (high - low) * (i * 0.618034 % 1) for i in range(len(draws))]
            axis.scatter(draws, heights, s=5, color=figures.colour("random"), linewidths=0, zorder=1)
        if one["ci_low"] is not None:
            error = [[one["value"] - one["ci_low"]], [one["ci_high"] - one["value"]]]
            axis.errorbar(one["value"], -at, xerr=_sized(error), fmt="none", ecolor="black", capsize=2, zorder=2)
        axis.plot(one["value"], -at, "D", color=shade, markeredgecolor="black", markeredgewidth=0.5, zorder=3)
        text = one["name"] + (f" ({shown_p(one['p_value'])})" if draws else "")
        clear = {"facecolor": "white", "linewidth": 0, "pad": 0.5}  # of the zero line behind it
        place = {"xycoords": ("axes fraction", "data"), "va": "bottom", "fontsize": 6.5}
        axis.annotate(text, (0, -at + 0.27), bbox=clear, **place)
    axis.axvline(0, color="black", linewidth=0.6, zorder=0)
    if name in ("C4", "C6"):
        axis.axvline(WORTH, color="black", linewidth=0.6, linestyle=":", zorder=0)
    axis.set_ylim(-len(rows) + 0.45, 0.75)
    axis.locator_params(axis="x", nbins=5)
    if name == "C3":
        axis.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3), useMathText=True)
    axis.set_xlabel(label, fontsize=7)
    axis.margins(x=0.08)


def _sized(error: list[list[float]]) -> list[list[float]]:
    """The bars' lengths; the mean of few units may lie a rounding error outside its own interval."""
    return [[max(0.0, part[0])] for part in error]


def _draws(place: dict | None, most: int = 200) -> list[float]:
    """The random draws of a number, in its units; of thousands of pairs an even choice by rank, ends included."""
    if not place or not place.get("draws"):
        return []
    draws = place["draws"]
    if isinstance(draws, dict):
        draws = sorted(f - a for f in draws["ffn"] for a in draws["attention"])
        if len(draws) > most:
            draws = [draws[round(i * (len(draws) - 1) / (most - 1))] for i in range(most)]
    return draws


# ---------------------------------------------------------------- the command


def seed_list(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of seeds like 0,1,2") from None


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("--output", metavar="OUT", help="JSON to write; default: the study's; with --seeds a folder")
    p.add_argument(
        "--seeds", type=seed_list, metavar="S,S,..", help="set claims.json of these seeds side by side; default: none"
    )
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    if args.seeds:
        side_by_side(args)
        return
    study = Study.find(args.study, args.seed)
    if not study:
        raise InputError("the claims are those of a study: give --study FILE, or run where study.yaml is")
    output = study.output(args.output, "--output", "claims")
    if output.suffix != ".json":
        raise InputError(f"--output {output}: give the name of a JSON file, or --seeds with it")
    if output.exists() and not args.overwrite and not results.read_json(output, SCHEMA)[1]:
        raise InputError(f"{output} was not made by this script; give --overwrite to replace it, or another --output")
    found = Results(study)
    payload = results.plain({"study": study.name, "alpha": ALPHA, "claims": judge(found)})
    draw(output.with_suffix(""), payload)
    write_text(output.with_suffix(".md"), markdown(payload))
    write_text(output.with_suffix(".tex"), latex(payload))
    models = {"base": found.base, "target": found.last}
    results.write_json(output, payload, results.header(SCHEMA, models=models, seed=study.seed, **found.sides()))
    for name, row in payload["claims"].items():
        cli.say(f"{name} {row['verdict']}: {row['reason']}")
    cli.say(f"wrote {output}, .md, .tex, .pdf and .png")


def side_by_side(args) -> None:
    """OUT/claims_seeds.md and .tex from the claims.json of every seed."""
    if args.output is None:
        raise InputError("--seeds: nothing says where the table goes; give --output FOLDER")
    places = {}
    for seed in args.seeds:
        study = Study.find(args.study, seed)
        places[seed] = study.input(None, "--study", "claims", f"report/claims.py --seed {seed}")
    if len(set(places.values())) < len(places):
        raise InputError(f"the seeds share {places[args.seeds[0]]}: the study's results must hold {{seed}}")
    seeds = {seed: results.read_json(path, SCHEMA)[0] for seed, path in places.items()}
    for suffix, text in zip((".md", ".tex"), seeds_tables(seeds), strict=True):
        write_text(Path(args.output) / f"claims_seeds{suffix}", text)
    cli.say(f"wrote {Path(args.output) / 'claims_seeds'}.md and .tex")


def write_text(path: Path, text: str) -> None:
    with results.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
