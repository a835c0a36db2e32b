"""What the claims are judged on: a study's results, read and checked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cpt_utils.base import cli, experiments, languages, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import refs, relatives
from cpt_utils.measures import controls, evaluation, gate, trial

ENDS = ("base", "target")  # the models as they are, which the file of a swap lists beside its sets


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

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """For a claim or figure `name`: `read` begins anew; a key that a file lacks is told with the files.

        Raises:
            InputError: a file lacks a key.
        """
        self.read = []
        try:
            yield
        except KeyError as error:
            files = ", ".join(self.read) or self.folder
            raise InputError(f"{name}: {files} has no {error}; run again the step that wrote it") from error

    def path(self, step: str, *below: str, how: str = "") -> Path:
        """A file of `step` in the study; Missing where it is not there."""
        return self.there(self.study.result(step).joinpath(*below), step, how)

    def there(self, path: Path, step: str, how: str = "") -> Path:
        """`path`, a file of `step`; Missing where it is not there. `how`: what the step's script makes it with."""
        if not path.exists():
            # The place within the study is named: tables are for people who have other folders.
            place = path.relative_to(self.folder) if path.is_relative_to(self.folder) else path
            raise Missing(f"{place} is not there (it is made by {experiments.made_by(step)}{how})")
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
            if expected is None or not relatives.same_model(found, expected):
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
        step_2 = cli.sibling("layer-specialize/layer_specialize.py")
        file = self.there(path.with_suffix(".pt"), "retrieval")
        self.read.append(str(file))
        return step_2.read_hits(path, np.array([value for _, value in sorted(payload["layer_accuracy"])]))

    def layers(self) -> dict:
        """Step 2's file, which may be about any checkpoint of the run."""
        path = self.path("layers")
        payload, header = results.read_json(path, "layer-specialize", **self.sides())
        measured = (header.get("models") or {}).get("model")
        if measured and not relatives.belongs(measured, [self.base, *self.run]):
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
        path, made_by = self.path(step, "controls.json", how=" --controls"), f"{experiments.made_by(step)} --controls"
        payload, header = self.json(path, trial.SCHEMA, **self.sides())
        sets = payload.get("sets") or []
        at = controls.find(sets, own)
        if at is None:
            raise InputError(f"{path} has no set {own}; run {made_by} again")
        if "retrieval_mean" not in sets[at]["values"]:
            raise Missing(f"{path} has no retrieval; run {made_by} with parallel sentences")
        pt = self.there(path.with_suffix(".pt"), step, " --controls")
        units = results.read_tensors(pt).get("retrieval_mean")
        values = [row["values"]["retrieval_mean"] for row in sets]
        if units is None or len(units) != len(sets) or abs(units.double().mean(1).numpy() - values).max() > 1e-5:
            raise InputError(f"{pt} does not belong to {path.name} beside it; run {made_by} --overwrite again")
        self.read.append(str(pt))
        drawn = controls.randoms(sets, sets[at])  # there may be others, of the component that it is compared with
        random = [i for i, row in enumerate(sets) if any(row is other for other in drawn)]
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


def label(name: str) -> str:
    """What a measure is called, with its sense where less is better."""
    measure = evaluation.MEASURES[name]
    return measure.label + ("" if measure.higher_is_better else "; less is better")
