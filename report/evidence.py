"""The evidence for the claims: a study's results, read and checked."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import cli, experiments, languages, results, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import refs, relatives
from cpt_utils.measures import gate

WEIGHTS = ("attn_vs_ffn", "int_and_sem")  # results about weights: their dtype is that of the weight differences
# Facts that all results of a study must share if their headers give them: in words -> keys in the header.
ALIKE = {
    "sentences": ("data", "pairs_sha256"),
    "held-out text": ("heldout", "sha256"),
    "rows of the task": ("task", "sha256"),
    "a number of rows of the task": ("task", "rows"),
    "a seed": ("seed",),
    "a dtype": ("dtype",),
    "a number of layers": ("n_layers",),
    "a measure of retrieval": ("measure",),
    "a margin": ("margin_variant",),
    "neighbours": ("k",),
    "special tokens": ("special_tokens",),
}
OVER_SEEDS = tuple(ALIKE)[5:]  # facts that results of several seeds must share, too


class Missing(Exception):
    """A result that a claim needs is missing; the claim stays undecided."""


@dataclass
class File:
    """A result file that was read: its path, the script that makes it, and its contents."""

    path: Path
    made_by: str
    payload: dict
    header: dict

    def refused(self, why: str) -> InputError:
        return InputError(f"{self.path} {why}; run {self.made_by} --overwrite again")

    def at(self, *keys) -> float:
        """The number at these keys of the payload.

        Raises:
            InputError: there is none, or it is not a finite number.
        """
        value = self.payload
        for key in keys:
            value = value.get(str(key), value.get(key)) if isinstance(value, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            shown = "no" if value is None else f"{value!r} as"
            raise self.refused(f"has {shown} {'.'.join(map(str, keys))}")
        return float(value)


class Results:
    """The result files of a study, read and checked: each must be about the study's base, run and languages.

    Args:
        draws: resamples for the intervals over units; 0: no intervals.
    """

    def __init__(self, study: Study, draws: int = 2000):
        self.study, self.draws = study, draws
        self.base, self.run = known_models(study)
        self.last = self.run[-1]
        self.folder = study.folder
        self.gate = gate.carried(study.result("layers"))
        self.half = study.get("sentences") == "half"  # the layers were chosen on every second sentence
        self.read: list[str] = []
        self.kept: dict[str, tuple] = {}
        self.facts: dict[str, tuple] = {}  # by name in ALIKE: the value, and the first file that gave it

    def once(self, key: str, make: Callable):
        """What `make` returns, kept for other claims; the files it read then count as read for these, too."""
        if key not in self.kept:
            before = len(self.read)
            self.kept[key] = make(), self.read[before:]
        self.read += self.kept[key][1]
        return self.kept[key][0]

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Read for a claim or figure `name`: `read` starts empty, and an error about contents names the files.

        Raises:
            InputError: a file lacks a key, or holds something other than it should.
        """
        self.read = []
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            files = ", ".join(self.read) or self.folder
            what = f"has no {error}" if isinstance(error, KeyError) else f"is not as its step writes it ({error})"
            raise InputError(f"{name}: {files} {what}; run again the step that wrote it") from error

    def file(self, step: str, schema: str, *below: str, how: str = "") -> File:
        """A result of `step`: it must say what it is about, agree with all that was read before, and be finite.

        Args:
            how: the flags with which the step's script makes it.

        Raises:
            Missing: it is not there.
            InputError: it is about something else.
        """
        return self.checked(self.path(step, *below, how=how), step, schema, how)

    def checked(self, path: Path, step: str, schema: str, how: str = "") -> File:
        """The same for a file of `step` at `path`."""
        file = File(path, experiments.made_by(step) + how, *self.json(path, schema, **self.sides()))
        self._refuse_other_facts(file, schema)
        return file

    def _refuse_other_facts(self, file: File, schema: str) -> None:
        header = file.header
        if not header.get("models"):
            raise file.refused("does not say which models it is about")
        if header.get("checkpoint_stride", 1) != 1 or header.get("n_used") != header.get("n_available"):
            raise file.refused("is about only a part of the run or of the data")
        for fact, keys in ALIKE.items():
            value = header
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if value is None or (fact == "a dtype" and schema in WEIGHTS):
                continue
            before, where = self.facts.setdefault(fact, (value, file.path))
            if value != before:
                raise file.refused(f"and {where} were made with different {fact.removeprefix('a ')}")
            if fact == "a seed" and value != self.study.seed:
                raise file.refused(f"was made with seed {value}, but the study's is {self.study.seed}")
        position = _not_finite(file.payload)
        if position is not None:
            raise file.refused(f"holds a value that is not finite, at {position}")

    def path(self, step: str, *below: str, how: str = "") -> Path:
        """The path of a result of `step`; raises Missing if it does not exist."""
        return self.there(self.study.result(step).joinpath(*below), step, how)

    def there(self, path: Path, step: str, how: str = "") -> Path:
        """`path`, a file of `step`; raises Missing if it does not exist. `how`: flags with which it is made."""
        if not path.exists():
            # Relative to the study: tables are read by people with other folders.
            shown = path.relative_to(self.folder) if path.is_relative_to(self.folder) else path
            raise Missing(f"{shown} is not there (it is made by {experiments.made_by(step)}{how})")
        return path

    def json(self, path: Path, schema: str, model: dict | None = None, **expect) -> tuple[dict, dict]:
        """Payload and header of a result.

        Args:
            model: the model it must be about; None: the last checkpoint.

        Raises:
            InputError: it is about another model in any role, or disagrees with `expect`.
        """
        payload, header = results.read_json(path, schema, **expect)
        if not isinstance(payload, dict):
            raise InputError(f"{path} holds no named values; run its step again")
        models = header.get("models") or {}
        wanted = {"base": self.base, "target": self.last, "plain": self.last, "model": model or self.last}
        pairs = [(models[role], wanted[role]) for role in wanted if models.get(role)]
        refs_by_step = {str(ref["step"]): ref for ref in self.run}
        pairs += [(ref, refs_by_step.get(step)) for step, ref in (models.get("checkpoints") or {}).items()]
        for ref, expected in pairs:
            if expected is None or not relatives.same_model(ref, expected):
                than = f"{expected['spec']} of this study, or was trained again since" if expected else "this study's"
                raise InputError(f"{path} is about {ref.get('spec')}, another model than {than}; run that step again")
        self.read.append(str(path))
        return payload, header

    def sides(self) -> dict:
        return {f"{side}_lang": self.study.get(f"languages.{side}") for side in ("base", "target")}

    def retrieval_folder(self) -> Path:
        folder, sides = self.there(self.study.result("retrieval"), "retrieval"), self.sides()
        if None in sides.values():
            raise Missing("the study does not say between which languages to retrieve")
        pairs = [path.name for path in folder.iterdir() if path.is_dir()]
        try:
            return folder / languages.find_pair(pairs, *sides.values(), what=str(folder))
        except InputError as error:
            raise Missing(str(error)) from None

    def retrieval_path(self, ref: dict) -> Path:
        return self.there(self.retrieval_folder() / f"{ref['model_id']}.json", "retrieval")

    def retrieval(self, ref: dict) -> tuple[dict, dict, Path]:
        """Payload, header and path of the retrieval of one model."""
        path = self.retrieval_path(ref)
        return *self.json(path, "sentence-retrieval", ref, **self.sides()), path

    def untrained(self) -> tuple[dict, dict, Path]:
        """The same for the untrained model."""
        folder = self.retrieval_folder()
        names = ("untrained.json", *(f"untrained.{ref['model_id']}.json" for ref in (self.last, self.base)))
        path = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
        self.there(path, "retrieval")
        return *self.json(path, "sentence-retrieval", **self.sides()), path

    def hits(self, file: File, key: str, tensor: str) -> np.ndarray:
        """The hits [L+1, sentences] of one curve beside a retrieval result, with its accuracies under `key`.

        Raises:
            InputError: they do not give the accuracies, or (with the sentences in this order) their intervals.
        """
        pt = self.there(file.path.with_suffix(".pt"), "retrieval")
        self.read.append(str(pt))
        hits = results.read_tensors(pt).get(tensor)
        if hits is None and key not in file.payload:  # older than this curve
            raise Missing(f"{file.path.name} has no {key}: run {file.made_by} --overwrite again")
        if hits is None or key not in file.payload or f"{key}_ci" not in file.payload:
            raise file.refused(f"and {pt.name} beside it lack {key}, its intervals or its hits")
        hits = hits.double().numpy()
        ends = np.stack(stats.bootstrap_means(hits, file.header.get("seed", self.study.seed)), -1)
        for name, values in ((key, hits.mean(1)), (f"{key}_ci", ends)):
            stated = np.array([value for _, value in sorted(file.payload[name])], dtype=np.float64)
            if stated.shape != values.shape or not np.allclose(stated, values, rtol=0, atol=1e-6):
                raise file.refused(f"and {pt.name} beside it do not belong together")
        return hits

    def refuse_other_twin(self, file: File) -> None:
        """Refuse if there are untrained twins beside a retrieval result, but none of its model and measured like it."""
        twins = sorted(file.path.parent.glob("untrained*.json"))
        if twins and gate.twin_beside(file.path, file.header) is None:
            raise InputError(
                f"{twins[0]} is not the untrained twin of {file.path.name} (another measure, architecture or set "
                f"of sentences); run {file.made_by} again"
            )

    def layers(self, strict: bool = False) -> dict:
        """Step 2's file, which may be about any checkpoint of the run; `strict`: checked as by `file`."""
        path = self.path("layers")
        self.study.input(None, "--study", "layers")  # refuses a split by another curve or other sentences
        payload, header = results.read_json(path, "layer-specialize", **self.sides())
        measured = (header.get("models") or {}).get("model")
        if measured and not relatives.belongs(measured, [self.base, *self.run]):
            raise InputError(f"{path} is about {measured['spec']}, not a model of this study; run that step again")
        self.read.append(str(path))
        if strict:
            self._refuse_other_facts(File(path, experiments.made_by("layers"), payload, header), "layer-specialize")
        return payload

    def refuse_part_of_run(self, file: File, steps) -> None:
        """Refuse a series that does not cover every checkpoint of the run, such as one made with --steps."""
        present, wanted = sorted(map(int, steps)), sorted(ref["step"] for ref in self.run)
        if present != wanted:
            raise file.refused(f"is about steps {present}, but the run has {wanted}")

    def refuse_other_layers(self, path: Path, layers: list[int], step: str, key: str) -> None:
        """Refuse a result about other layers than those now under `key` in the file of `step`, if that file exists."""
        file = self.study.result(step)
        content = results.read_json(file)[0] if file.is_file() else None
        now = content.get(key) if isinstance(content, dict) else content
        if now is not None and sorted(layers) != sorted(now):
            raise InputError(f"{path} is about layers {sorted(layers)}, but {file} says {sorted(now)}; run it again")


def known_models(study: Study) -> tuple[dict, list[dict]]:
    """Descriptions of the study's base and of its checkpoints in step order.

    If the models themselves are gone, the headers of the weight comparisons say what they were.
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


def _not_finite(value, at: str = "") -> str | None:
    """Where a payload holds NaN or infinity; None if nowhere."""
    if isinstance(value, float):
        return None if math.isfinite(value) else at
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next((position for key, item in below if (position := _not_finite(item, f"{at}.{key}".strip(".")))), None)
