"""What the claims are judged on: a study's results, read and checked, and from them the numbers of each rule."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_utils.base import cli, languages, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import refs
from cpt_utils.measures import controls, evaluation, gate

if TYPE_CHECKING:
    import numpy as np

rules = cli.sibling("report/rules.py")
Verdict, number = rules.Verdict, rules.number

ENDS = ("base", "target")  # the models as they are, which the file of a swap lists beside its sets
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


class Missing(Exception):
    """What a claim needs and is not there; the claim stays undecided."""


class Results:
    """The result files of a study, read and checked: each must be about the study's base, run and languages."""

    def __init__(self, study: Study):
        self.study = study
        self.base, self.run = known_models(study)
        self.last = self.run[-1]
        self.folder = study.result("claims").parent.parent
        self.gate = gate.carried(study.result("layers"))
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

    def refuse_part_of_run(self, path: Path, steps: list[int]) -> None:
        """Refuse a series that ends before the run does, as one made with --steps."""
        if max(steps) != self.last["step"]:
            raise InputError(f"{path} ends at step {max(steps)}, the run at {self.last['step']}; run that step again")

    def refuse_other_layers(self, path: Path, layers: list[int], step: str, key: str) -> None:
        """Refuse a result about other layers than `key` of the file of `step` now says, where that file is there."""
        chosen = self.study.result(step)
        content = results.read_json(chosen)[0] if chosen.is_file() else None
        now = content.get(key) if isinstance(content, dict) else content
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
        at = controls.find(sets, own)
        if at is None:
            raise InputError(f"{path} has no set {own}; run {MADE_BY[step]} again")
        if "retrieval_mean" not in sets[at]["values"]:
            raise Missing(f"{path} has no retrieval; run {MADE_BY[step]} with parallel sentences")
        pt = self.there(path.with_suffix(".pt"), step)
        units = results.read_tensors(pt).get("retrieval_mean")
        values = [row["values"]["retrieval_mean"] for row in sets]
        if units is None or len(units) != len(sets) or abs(units.double().mean(1).numpy() - values).max() > 1e-5:
            raise InputError(f"{pt} does not belong to {path.name} beside it; run {MADE_BY[step]} --overwrite again")
        self.read.append(str(pt))
        random = [i for i, row in enumerate(sets) if row["name"] == "random"]
        found = {"sets": sets, "values": values, "units": units.double().numpy(), "own": at, "random": random}
        found |= {end: next(v for row, v in zip(sets, values, strict=True) if row["name"] == end) for end in ENDS}
        return found | {"payload": payload, "path": path}, header


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


# ---------------------------------------------------------------- the numbers of each claim


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
    return rules.c1(hits, untrained, found.study.seed, why_not)


def judge_c2(found: Results) -> Verdict:
    swap, _ = found.swap("layer_swap", "semantic_hub")
    hub = swap["sets"][swap["own"]]["layers"]
    found.refuse_other_layers(swap["path"], hub, "layers", "semantic_layers")
    others = [swap["values"][i] for i in swap["random"]]
    made = rules.c2(
        swap["values"][swap["own"]], others, swap["units"][swap["own"]], swap["units"][swap["random"]],
        swap["base"], swap["target"], found.study.seed,
    )  # fmt: skip
    compared = swap["payload"].get("comparison") or {}
    made.beside = [_place_beside(name, row) for name, row in compared.items() if name != "retrieval_mean"]
    return made


def _place_beside(name: str, row: dict) -> dict:
    interval = row.get("ci_low"), row.get("ci_high")
    label = f"hub minus random, {_label(name)}"
    place = {"rank": row["rank"], "n_random": row["n_random"]}
    return number(label, row["own_minus_random"], interval, p_value=row["p_value"], place=place)


def _label(name: str) -> str:
    """What a measure is called, with its sense where less is better."""
    measure = evaluation.MEASURES[name]
    return measure.label + ("" if measure.higher_is_better else "; less is better")


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
    made = rules.c3(by_max, by_mean, found.study.seed)
    for summary, words in (
        ("summary_relative", "relative change, largest projection"),
        ("summary_relative_mean", "relative change, mean of projections"),
    ):
        both = row.get(summary) or {}
        if None not in (both.get("attn"), both.get("ffn")):
            made.beside.append(number(f"attention minus FFN, {words}", both["attn"] - both["ffn"], n=len(by_max)))
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
    found.refuse_part_of_run(path, series["steps"])
    return rules.c4(series["attention"], series["gate"], series["abs_d"])


def judge_c5(found: Results) -> Verdict:
    attention, attention_header = found.swap("attn_int_swap", "attention_interface")
    ffn, ffn_header = found.swap("ffn_lsn_swap", "ffn_lsn_rich")
    refuse_other_sentences([(attention["path"], attention_header), (ffn["path"], ffn_header)])
    if attention["units"].shape[1] != ffn["units"].shape[1]:
        raise InputError(f"{attention['path']} and {ffn['path']} have different numbers of sentences; run one again")
    own, rich = (swap["sets"][swap["own"]] for swap in (attention, ffn))
    # Of layers that were asked for, those are swapped that have the component.
    for swap, row, key, name in (
        (attention, own, "layers", "interface_layers"),
        (ffn, rich, "lsn_layers", "layers"),
    ):
        found.refuse_other_layers(swap["path"], row.get("asked", row["layers"]), key, name)
    sides = [
        rules.Swapped(
            own=swap["values"][swap["own"]],
            others=[swap["values"][i] for i in swap["random"]],
            units=swap["units"][swap["own"]],
            n_layers=len(swap["sets"][swap["own"]]["layers"]),
        )
        for swap in (attention, ffn)
    ]
    made = rules.c5(*sides, attention["base"], attention["target"], found.study.seed)
    for name in own["values"]:
        if name != "retrieval_mean" and name in rich["values"]:
            difference = rich["values"][name] - own["values"][name]
            made.beside.append(number(f"FFN swap minus attention swap, {_label(name)}", difference))
    for words, name in (
        ("attention in interface layers", "attention_interface"),
        ("attention in LSN-rich layers", "attention_lsn_rich"),
        ("the FFN in interface layers", "ffn_interface"),
        ("the FFN in LSN-rich layers", "ffn_lsn_rich"),
    ):
        at = controls.find(attention["sets"], name)
        if at is not None:
            made.beside.append(number(f"retrieval after swapping {words}", attention["values"][at]))
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
    found.refuse_part_of_run(path, [int(step) for step in values])
    made = rules.c6([row[metric] for row in rows], [row["interface_avg"] for row in rows])
    hub = payload.get("semantic_hub") or {}
    if hub.get("first_differences"):
        made.beside.append(rules.correlated("r(accuracy, hub change), first differences", hub["first_differences"]))
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
            made = Verdict(name, rules.OPEN, str(reason))
        if name in rules.ON_LAYERS and found.gate and not found.gate["passed"]:
            made.verdict, made.reason = rules.VOID, gate.words(found.gate)
        made.files = list(dict.fromkeys(found.read))
        verdicts[name] = {"text": rules.CLAIMS[name], **dataclasses.asdict(made)}
        del verdicts[name]["claim"]  # it is the key
    if not any(row["files"] for row in verdicts.values()):
        raise InputError(f"{found.folder} holds no result that a claim needs; run the steps of the README first")
    return verdicts
