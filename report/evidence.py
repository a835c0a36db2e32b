"""What the claims are judged on: a study's results, read and checked."""

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

WEIGHTS = ("attn_vs_ffn", "int_and_sem")  # results about weights: their dtype is that of the differences
# What all results of a study must say alike, where their headers say it: in words -> where it stands.
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
OVER_SEEDS = tuple(ALIKE)[5:]  # what results of several seeds must say alike, too


class Missing(Exception):
    """What a claim needs and is not there; the claim stays undecided."""


@dataclass
class File:
    """A result file that was read: where, by what it is made, and what it holds."""

    path: Path
    made_by: str
    payload: dict
    header: dict

    def refused(self, why: str) -> InputError:
        return InputError(f"{self.path} {why}; run {self.made_by} --overwrite again")

    def at(self, *keys) -> float:
        """The number at these keys of the payload.

        Raises:
            InputError: there is none, or it is no finite number.
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
        draws: resamples of the intervals over units; 0: no intervals.
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
        self.facts: dict[str, tuple] = {}  # of ALIKE: the value, and the file that said it first

    def once(self, key: str, make: Callable):
        """What `make` reads, kept for other claims, for which its files count as read, too."""
        if key not in self.kept:
            before = len(self.read)
            self.kept[key] = make(), self.read[before:]
        self.read += self.kept[key][1]
        return self.kept[key][0]

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """For a claim or figure `name`: `read` begins anew; a key that a file lacks is told with the files.

        Raises:
            InputError: a file lacks a key, or holds something else than it should.
        """
        self.read = []
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            files = ", ".join(self.read) or self.folder
            what = f"has no {error}" if isinstance(error, KeyError) else f"is not as its step writes it ({error})"
            raise InputError(f"{name}: {files} {what}; run again the step that wrote it") from error

    def file(self, step: str, schema: str, *below: str, how: str = "") -> File:
        """A result of `step`, which must say what it is about, alike with all that was read before, and finite.

        Args:
            how: with what the step's script makes it.

        Raises:
            Missing: it is not there.
            InputError: it is about something else.
        """
        return self.checked(self.path(step, *below, how=how), step, schema, how)

    def checked(self, path: Path, step: str, schema: str, how: str = "") -> File:
        """The same of a file of `step` at `path`."""
        found = File(path, experiments.made_by(step) + how, *self.json(path, schema, **self.sides()))
        self._refuse_other_facts(found, schema)
        return found

    def _refuse_other_facts(self, found: File, schema: str) -> None:
        header = found.header
        if not header.get("models"):
            raise found.refused("does not say which models it is about")
        if header.get("checkpoint_stride", 1) != 1 or header.get("n_used") != header.get("n_available"):
            raise found.refused("is about a part of the run or of the data")
        for what, keys in ALIKE.items():
            value = header
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if value is None or (what == "a dtype" and schema in WEIGHTS):
                continue
            before, where = self.facts.setdefault(what, (value, found.path))
            if value != before:
                raise found.refused(f"and {where} were made with different {what.removeprefix('a ')}")
            if what == "a seed" and value != self.study.seed:
                raise found.refused(f"was made with seed {value}, the study's is {self.study.seed}")
        place = _not_finite(found.payload)
        if place is not None:
            raise found.refused(f"holds a value that is not finite, at {place}")

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
        wanted = {"base": self.base, "target": self.last, "plain": self.last, "model": model or self.last}
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

    def retrieval_path(self, ref: dict) -> Path:
        return self.there(self.retrieval_folder() / f"{ref['model_id']}.json", "retrieval")

    def retrieval(self, ref: dict) -> tuple[dict, dict, Path]:
        """Payload, header and path of the retrieval of one model."""
        path = self.retrieval_path(ref)
        return *self.json(path, "sentence-retrieval", ref, **self.sides()), path

    def untrained(self) -> tuple[dict, dict, Path]:
        """The same of the untrained model."""
        folder = self.retrieval_folder()
        names = ("untrained.json", *(f"untrained.{ref['model_id']}.json" for ref in (self.last, self.base)))
        path = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
        self.there(path, "retrieval")
        return *self.json(path, "sentence-retrieval", **self.sides()), path

    def hits(self, file: File, key: str, tensor: str) -> np.ndarray:
        """The hits [L+1, sentences] of one curve beside a retrieval result, with its accuracies under `key`.

        Raises:
            InputError: they do not give the accuracies, and with the sentences in this order their intervals.
        """
        pt = self.there(file.path.with_suffix(".pt"), "retrieval")
        self.read.append(str(pt))
        hits = results.read_tensors(pt).get(tensor)
        if hits is None and key not in file.payload:  # from before there was this curve
            raise Missing(f"{file.path.name} has no {key}: run {file.made_by} --overwrite again")
        if hits is None or key not in file.payload or f"{key}_ci" not in file.payload:
            raise file.refused(f"and {pt.name} beside it lack {key}, its intervals or its hits")
        hits = hits.double().numpy()
        ends = np.stack(stats.bootstrap_means(hits, file.header.get("seed", self.study.seed)), -1)
        for name, own in ((key, hits.mean(1)), (f"{key}_ci", ends)):
            said = np.array([value for _, value in sorted(file.payload[name])], dtype=np.float64)
            if said.shape != own.shape or not np.allclose(said, own, rtol=0, atol=1e-6):
                raise file.refused(f"and {pt.name} beside it do not belong together")
        return hits

    def refuse_other_twin(self, file: File) -> None:
        """Refuse untrained twins beside a retrieval result of which none is that of its model, measured like it."""
        twins = sorted(file.path.parent.glob("untrained*.json"))
        if twins and gate.twin_beside(file.path, file.header) is None:
            raise InputError(
                f"{twins[0]} is not the untrained twin of {file.path.name} (another measure, architecture or other "
                f"sentences); run {file.made_by} again"
            )

    def layers(self, strict: bool = False) -> dict:
        """Step 2's file, which may be about any checkpoint of the run; `strict`: checked as `file` does."""
        path = self.path("layers")
        self.study.input(None, "--study", "layers")  # refuses a split by another curve, or by other sentences
        payload, header = results.read_json(path, "layer-specialize", **self.sides())
        measured = (header.get("models") or {}).get("model")
        if measured and not relatives.belongs(measured, [self.base, *self.run]):
            raise InputError(f"{path} is about {measured['spec']}, no model of this study; run that step again")
        self.read.append(str(path))
        if strict:
            self._refuse_other_facts(File(path, experiments.made_by("layers"), payload, header), "layer-specialize")
        return payload

    def refuse_part_of_run(self, file: File, steps) -> None:
        """Refuse a series that is not about every checkpoint of the run, as one made with --steps."""
        found, wanted = sorted(map(int, steps)), sorted(ref["step"] for ref in self.run)
        if found != wanted:
            raise file.refused(f"is about steps {found}, the run has {wanted}")

    def refuse_other_layers(self, path: Path, layers: list[int], step: str, key: str) -> None:
        """Refuse a result about other layers than `key` of the file of `step` now says, where that file is there."""
        chosen = self.study.result(step)
        content = results.read_json(chosen)[0] if chosen.is_file() else None
        now = content.get(key) if isinstance(content, dict) else content
        if now is not None and sorted(layers) != sorted(now):
            raise InputError(f"{path} is about layers {sorted(layers)}, but {chosen} says {sorted(now)}; run it again")


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


def _not_finite(value, place: str = "") -> str | None:
    """Where in a payload there is NaN or infinity; None: nowhere."""
    if isinstance(value, float):
        return None if math.isfinite(value) else place
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next((found for key, one in below if (found := _not_finite(one, f"{place}.{key}".strip(".")))), None)
