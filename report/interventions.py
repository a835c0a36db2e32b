"""The cost of swaps by set of layers and of arms by frozen part, read from their files with values by unit."""

from __future__ import annotations

import os
from collections.abc import Callable

from cpt_utils.base import cli, results, stats
from cpt_utils.base.lazy import np
from cpt_utils.checkpoints import refs, relatives
from cpt_utils.measures import controls, matched, trial
from cpt_utils.measures.matched import ENOUGH, depth_and_seams
from cpt_utils.measures.verdicts import number, over_units

evidence, freezing = cli.sibling("report/evidence.py"), cli.sibling("cpt/freezing.py")

WORDS = {
    "retrieval_readout": "retrieval at the last hidden state", "retrieval_mean": "retrieval over layers",
    "nll_per_byte": "loss", "task_accuracy": "task", "lsn_activation": "LSN activation",
}  # fmt: skip
LESS_IS_BETTER = "nll_per_byte"
CONTROLS = ("random", "matched")  # names of control sets
STEP_2 = {"hub": "semantic_layers", "interface": "interface_layers"}  # part named by an arm -> key of its file


class Swaps:
    """A controls.json: what each set of swapped layers costs relative to the checkpoint (more is worse).

    Attributes:
        sets: the rows of the file; by_layers: (component, layers) -> index of the row, of treatments and controls.
    """

    def __init__(self, found: evidence.Results, step: str, own: str):
        self.found = found
        self.file = found.file(step, trial.SCHEMA, "controls.json", how=" --controls")
        self.sets = self.file.payload.get("sets") or []
        self.n_layers, self.own = self.file.header.get("n_layers"), self.sets and self.at(own)
        if not self.sets or not self.n_layers:
            raise self.file.refused("has no sets of layers")
        self.base, self.target = self.at("base"), self.at("target")
        self.pt = found.there(self.file.path.with_suffix(".pt"), step, " --controls")
        self.tensors = results.read_tensors(self.pt)
        found.read.append(str(self.pt))
        self.kept: dict[str, tuple] = {}
        self.by_layers: dict[tuple, int] = {}
        sizes = {len(row["layers"]) for row in self.sets if row["layers"] and row["name"] not in CONTROLS}
        for i, row in enumerate(self.sets):
            key = row.get("component"), tuple(sorted(row["layers"]))
            before = self.sets[self.by_layers.get(key, self.target)]  # a control may be the set of another treatment
            again = before["name"] in CONTROLS or len({*key[1]}) != len(key[1])
            if row["name"] in CONTROLS and (again or len(key[1]) not in sizes):
                raise self.file.refused(f"has a control of layers {row['layers']} twice, or of a size of no other swap")
            if any(type(layer) is not int or not 0 <= layer < self.n_layers for layer in key[1]):
                raise self.file.refused(f"names layers {row['layers']}, which the model does not have")
            if key[1]:
                self.by_layers.setdefault(key, i)

    def at(self, name: str) -> int:
        """The index of a set's row."""
        row = controls.find(self.sets, name)
        if row is None:
            raise self.file.refused(f"has no set {name}")
        return row

    def lacks(self, measure: str) -> str | None:
        """Why a measure is not available; None if it is."""
        if measure in self.sets[self.own]["values"]:
            return None
        file = f"{self.file.path.parent.name}/{self.file.path.name}"
        hint = "; swaps measure only SIB-200 and continuations" if measure == "task_accuracy" else ""
        return f"{file} has no {measure}: run {self.file.made_by} --overwrite again{hint}"

    def measured(self, measure: str) -> tuple[np.ndarray, np.ndarray]:
        """A measure of every set [sets] and by unit [sets, units], signed so that more is better."""
        if measure not in self.kept:
            sign, units = -1 if measure == LESS_IS_BETTER else 1, self.tensors.get(measure)
            rows = [evidence.File(self.file.path, self.file.made_by, row, {}) for row in self.sets]
            values = np.array([row.at("values", measure) for row in rows])
            units = None if units is None else units.double().numpy()
            if units is None or units.ndim != 2 or len(units) != len(values) or not _same(units.mean(1), values):
                raise self.file.refused(f"and {self.pt.name} beside it do not belong together ({measure})")
            if measure == "retrieval_readout" and self.found.half:  # the layers were chosen on the other sentences
                units = units[:, 1::2]
                values = units.mean(1)
            self.kept[measure] = sign * values, sign * units
        return self.kept[measure]

    def cost(self, name: str, measure: str, weights: dict[int, float] | str, **more) -> dict:
        """The sum of the costs of sets by `weights` {row: weight}; no value if `weights` is a reason."""
        name, lacking = f"{name}, {WORDS[measure]}", weights if isinstance(weights, str) else self.lacks(measure)
        if lacking:
            return number(name, None, note=lacking, **more)
        coefficients = np.zeros(len(self.sets))
        for row, weight in weights.items():
            coefficients[row] -= weight
        coefficients[self.target] -= coefficients.sum()
        values, units = self.measured(measure)
        result = over_units(name, coefficients @ units, self.found.study.seed, "units", self.found.draws, **more)
        return result | {"value": float(coefficients @ values)}

    def gain_lost(self, name: str, at: int, measure: str, **more) -> dict:
        """The share of CPT's gain that a set loses; no value if that gain is not clear."""
        lacking = self.lacks(measure)
        if not lacking:
            values, units = self.measured(measure)
            gain = stats.bootstrap_mean(units[self.target] - units[self.base], self.found.study.seed)
            lacking = None if gain[0] > 0 else f"CPT's gain in {WORDS[measure]} is not clear"
        if lacking:
            return number(f"{name}, {WORDS[measure]}", None, note=lacking, **more)

        def share(base, target, own):
            return (target - own) / (target - base)

        rows = [self.base, self.target, at]
        value = share(*values[rows])
        interval = _interval(share, units[rows], self.found.study.seed, self.found.draws)
        return number(f"{name}, {WORDS[measure]}", value, interval, units.shape[1], "units", **more)

    def beside_shape(self, component: str | None, treatment: list[int]) -> dict[int, float] | str:
        """The weights {row: weight} of `matched.beside_shape` over all sets of the component, or why there are none."""
        rows = {
            layers: at for (kind, layers), at in self.by_layers.items()
            if kind == component and len(layers) == len(treatment)
        }  # fmt: skip
        weights = matched.beside_shape(list(rows), treatment, self.n_layers)
        return weights if isinstance(weights, str) else dict(zip(rows.values(), weights, strict=True))

    def between_places(self, here: tuple[int, int], there: tuple[int, int]) -> dict[int, float] | str:
        """Weights of the interaction of component and place: the extra cost of attention over the FFN, here minus
        there, adjusted for what depth and seams do to it in those control sets in which both components were swapped.

        Args:
            here, there: rows of attention and of the FFN in the same layers.
        """
        places = [self.sets[at]["layers"] for at, _ in (here, there)]
        if sorted(places[0]) == sorted(places[1]):
            return "both places are the same layers"
        pairs = [
            (layers, at, self.by_layers["ffn", layers]) for (kind, layers), at in self.by_layers.items()
            if kind == "attention" and ("ffn", layers) in self.by_layers and self.sets[at]["name"] in CONTROLS
            and len(layers) == len(places[0])
        ]  # fmt: skip
        if len(pairs) < ENOUGH:
            return f"{len(pairs)} control sets with attention and FFN of the same layers are too few: {ENOUGH}"
        design = np.array([depth_and_seams(layers, self.n_layers) for layers, *_ in pairs], dtype=np.float64)
        shapes = (np.array(depth_and_seams(layers, self.n_layers), dtype=np.float64) for layers in places)
        expected = np.subtract(*shapes) @ np.linalg.pinv(design)
        weights = {here[0]: 1.0, here[1]: -1.0, there[0]: -1.0, there[1]: 1.0}
        for (_, attention, ffn), weight in zip(pairs, expected, strict=True):
            weights[attention] = weights.get(attention, 0.0) - weight
            weights[ffn] = weights.get(ffn, 0.0) + weight
        return weights


class Arms:
    """arms.json: the same training with a part frozen, beside base and plain run.

    Args:
        tensors: those of the .pt beside it. seed, draws: for the intervals over units, see `evidence.Results`.
        refuse: (path, layers, step, key) -> None; raises if these layers are not those of the study's file.
    """

    def __init__(self, file: evidence.File, tensors: dict, seed: int, draws: int, refuse: Callable | None = None):
        self.file, self.tensors, self.seed, self.draws, self.refuse = file, tensors, seed, draws, refuse
        self.models = file.payload["models"]

    @classmethod
    def of_study(cls, found: evidence.Results) -> Arms:
        trains = found.study.get("arms") and found.study.get("train.cpt")
        if not trains and not found.study.result("arms").is_file():
            raise evidence.Missing("the study trains no arms (keys arms and train.cpt; cpt/train.py trains them)")
        file = found.file("arms", "arms")
        for name in found.study.get("arms", {}):
            run, measured = found.study.of_arm(name).get("run"), file.header["models"].get(name)
            checkpoints = refs.checkpoints(run) if measured and os.path.isdir(run) else []
            if checkpoints and not relatives.same_model(measured, checkpoints[-1].describe()):
                raise file.refused(f"is about another {name} than {checkpoints[-1].spec}, trained again since")
        pt = found.there(file.path.with_suffix(".pt"), "arms")
        found.read.append(str(pt))
        return cls(file, results.read_tensors(pt), found.study.seed, found.draws, found.refuse_other_layers)

    def named(self, what: str) -> str:
        """The name of the arm that does `what`: "freeze hub" or, by its beginning, "freeze matched:hub:".

        Its `io` must be the usual one for the mode, and its hub or interface layers those of step 2's file.
        """
        mode, _, part = what.partition(" ")
        key = STEP_2.get(part.partition("/")[0])
        for name, row in self.models.items():
            spec = row.get("what") or {}
            done, usual = str(spec.get(mode)), freezing.usual_io(mode)
            if (done == part or (part.endswith(":") and done.startswith(part))) and spec.get("io") in (None, usual):
                if key and "layers" in row and self.refuse:
                    self.refuse(self.file.path, row["layers"], "layers", key)
                return name
        done = {"freeze": "freezes", "train_only": "trains only"}.get(mode, mode)
        raise evidence.Missing(f"no arm of the study {done} {part.strip(':')} (key arms; cpt/train.py trains it)")

    def number(
        self, name: str, measure: str, arms: dict[str, str], value: Callable, gained: bool = True, **more
    ) -> dict:  # fmt: skip
        """A number computed from a measure's values in base, plain run and `arms`, or why there is none.

        Args:
            arms: argument of `value` -> arm; in all values more is better. gained: whether the number is a share of the
                plain run's gain, which must then be clear.
        """
        name = f"{name}, {words(measure)}"
        names = {"base": "base", "plain": "plain"} | arms
        lacking = [arm for arm in names.values() if measure not in self.models[arm]["values"]]
        lacking = (
            f"{measure} of {lacking[0]} is not in {self.file.path.name} (made by {self.file.made_by})"
            if lacking
            else None
        )
        shares = [(self.models[arm].get("share") or {}).get(measure) for arm in arms.values()]
        if gained and not lacking and not all(shares):
            lacking = f"the plain run's change in {words(measure)} is not clear"
        if lacking:
            return number(name, None, note=lacking, **more)
        sign = -1 if measure.startswith(LESS_IS_BETTER) else 1
        values = {role: sign * self.file.at("models", arm, "values", measure) for role, arm in names.items()}
        try:
            result = float(value(**values))
        except ZeroDivisionError:
            return number(name, None, note=f"the plain run's {words(measure)} is 0", **more)
        units, interval, n = self.tensors.get(measure), (None, None), None
        if units is not None:
            order, units = list(self.models), sign * units.double().numpy()
            means = [sign * self.file.at("models", arm, "values", measure) for arm in order]
            about = 0.05 if measure == "lsn_activation" else 0.0  # of experts' neurons the blocks' mean is approximate
            if len(units) != len(order) or not _same(units.mean(1), means, about):
                raise self.file.refused(f"and the .pt beside it do not belong together ({measure})")
            rows, n = units[[order.index(arm) for arm in names.values()]], units.shape[1]

            def of_means(*means):
                return value(**dict(zip(names, means, strict=True)))

            interval = _interval(of_means, rows, self.seed, self.draws)
        return number(name, result, interval, n, "units", **more)


def swaps(found: evidence.Results, step: str, own: str) -> Swaps:
    """The swaps of a step, read once for all claims; `own` is the name of the treatment."""
    return found.once(step, lambda: Swaps(found, step, own))


def arms(found: evidence.Results) -> Arms:
    return found.once("arms", lambda: Arms.of_study(found))


def words(measure: str) -> str:
    """What a measure is called in the names of numbers: "loss", "loss eng_Latn"."""
    name, _, lang = measure.partition(":")
    return f"{WORDS.get(name, name)} {lang}".strip()


def _same(means, values, about: float = 0.0) -> bool:
    return np.allclose(means, values, rtol=about, atol=1e-5)


def _interval(value: Callable, units: np.ndarray, seed: int, draws: int) -> tuple[float | None, float | None]:
    """The bootstrap interval of a function of means over `units` [means, units], which share their resamples.

    Resamples without a gain (NaN) are left out. None if an end is not finite, as for a share of a gain that may be 0.
    """
    if not draws:
        return None, None
    weights = stats.resample_weights(units.shape[1], seed, draws)
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = stats.interval(value(*(units @ weights.T / units.shape[1]))).tolist()
    return tuple(ends) if np.isfinite(ends).all() else (None, None)
