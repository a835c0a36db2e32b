"""Model references: a local folder, `org/name`, `org/name@revision`, `org/name/folder`, or a run of checkpoints.

A run is a folder whose sub-folders are named after steps (`checkpoint-500`, `step_500`, `iter_0001000`), a hub
repository with such folders, a list of models, or a pattern of revisions or folders of one repository
(`org/name@stage1-step*`, `org/name/checkpoint-*`). A folder or revision that holds a PEFT adapter instead of a model
stands for base and adapter merged (see `adapters`).
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import adapters, formats, headers, hub, identity, tensors

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# What stands before a step in a name, the surest first: in `epoch-2-step-500` the step is 500.
_STEP_WORDS = ("step", "checkpoint|ckpt|chkpt", "iteration|iter")
_UNITS = {"": 1, "k": 1_000, "m": 1_000_000}
_PASSING = ("tmp", ".")  # starts of folders that a Trainer or a swap has not finished
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)*")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)
_SIDE_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja")


def step_of(name: str) -> int | None:
    """The training step that a checkpoint folder or a hub revision is named after, or None.

    `checkpoint-15` -> 15; `stage2-ingredient1-step1000-tokens5B` -> 1000; `iter_0001000` -> 1000; `step-50K` -> 50000;
    `run-a/step100` -> 100. Always an integer: as text, `step1000` would come before `step512`.
    """
    for word in _STEP_WORDS:
        found = re.findall(rf"(?:^|[-_/]|global)(?:{word})[-_=]?(\d+)([km]?)(?=$|[-_/])", name, re.IGNORECASE)
        if found:
            number, unit = found[-1]
            return int(number) * _UNITS[unit.lower()]
    return None


def steps_of(names: Iterable[str]) -> dict[str, int]:
    """The steps of the checkpoints of one run, by their names, in step order; names without a step are left out.

    Where the steps read from the words before them do not tell the names apart, or there are no such words, the names
    must differ in one number only: the one that grows. (`part2-500`, `part2-1000`.)
    """
    names = list(names)
    found = {name: step for name in names if (step := step_of(name)) is not None}
    if not found or len(set(found.values())) < len(found):
        names = list(found) or [name for name in names if re.search(r"\d$", name)]
        numbers = [[int(number) for number in re.findall(r"\d+", name)] for name in names]
        alike = len(names) > 1 and len({re.sub(r"\d+", "#", name) for name in names}) == 1
        growing = [column for column in zip(*numbers, strict=False) if len(set(column)) == len(names)] if alike else []
        if len(growing) == 1:
            found = dict(zip(names, growing[0], strict=True))
    return dict(sorted(found.items(), key=lambda item: item[1]))


def local_id(path: str | os.PathLike) -> str:
    """The file name that stands for the model folder at `path`: its last two parts, joined by `__`."""
    return "__".join(part for part in Path(os.path.abspath(path)).parts[-2:] if part != os.sep)


@dataclass(frozen=True)
class ModelRef:
    """One model: `spec` as the user typed it, and its training `step` where the name gives one.

    `base` is where an adapter's base is when the one that its configuration names is not here.
    """

    spec: str
    step: int | None = None
    base: ModelRef | None = field(default=None, compare=False, repr=False)

    @property
    def is_local(self) -> bool:
        return os.path.isdir(self.spec)

    @property
    def repository(self) -> str:
        """`org/name` of a hub model."""
        return "/".join(self.spec.partition("@")[0].split("/")[:2])

    @property
    def subfolder(self) -> str:
        """The folder of a hub model in its repository (`org/name/checkpoint-500`); "" where it lies at the top."""
        return "" if self.is_local else "/".join(self.spec.partition("@")[0].split("/")[2:])

    @property
    def revision(self) -> str | None:
        """The revision asked for (`org/name@revision`); None for a local folder and for the hub's default branch."""
        return None if self.is_local else (self.spec.partition("@")[2] or None)

    @property
    def model_id(self) -> str:
        """A file name for this model: `org__name@revision`, or the last two parts of a local path, joined by `__`."""
        return local_id(self.spec) if self.is_local else re.sub(r"[*?[\]]", "_", self.spec.replace("/", "__"))

    @property
    def names(self) -> frozenset[str]:
        """The files of this model; of a hub model those of its repository, fetched or not."""
        if self.is_local:
            try:
                return frozenset(os.listdir(self.spec))
            except OSError as error:
                raise InputError(f"{self.spec} cannot be read: {error.strerror or error}") from None
        self._refuse_unfit()
        there = hub.names(self.repository, self.revision)
        if not self.subfolder:
            return there
        start = f"{self.subfolder}/"
        inside = frozenset(name.removeprefix(start) for name in there if name.startswith(start))
        if not inside:
            folders = sorted({os.path.dirname(name) for name in there} - {""})
            raise InputError(
                f"{self.repository} has no folder {self.subfolder}; it has {', '.join(folders[:8]) or 'no folders'}"
            )
        return inside

    def _inside(self, pattern: str) -> str:
        """A pattern of this model's files as one of its repository's."""
        return f"{glob.escape(self.subfolder)}/{pattern}" if self.subfolder else pattern

    @property
    def is_adapter(self) -> bool:
        """Whether this is a PEFT adapter. A folder that also holds a model is that model, as for the loaders."""
        names = self.names
        return formats.ADAPTER_CONFIG in names and not any(
            fnmatch.fnmatch(n, p) for n in names for p in formats.WEIGHT_PATTERNS
        )

    def say_adapter_beside(self) -> None:
        """Say of a model whose folder also holds an adapter what is made of the two; once for a run."""
        if formats.ADAPTER_CONFIG in self.names and not self.is_adapter:
            cli.once(
                f"{formats.run_of(self.spec)}: beside the model there is an adapter ({formats.ADAPTER_CONFIG}); the "
                "model is taken as it is, and the adapter as merged into it already"
            )

    @cached_property
    def adapted(self) -> ModelRef | None:
        """The model that an adapter was trained on; None for what is a model itself."""
        if not self.is_adapter:
            return None
        return _base_of(self, adapters.read_settings(self.folder([formats.ADAPTER_CONFIG])))

    def with_base(self, base: ModelRef | None) -> ModelRef:
        """The same model, with a base for the case that it is an adapter and its own base is not here."""
        return replace(self, base=base)

    def folder(self, patterns: Iterable[str] | None = None) -> Path:
        """The local folder with this model's files; for a hub model the files matching `patterns` are fetched first.

        Of a repository with weights in several formats only those are fetched that `TensorFolder` reads.

        Raises:
            InputError: no such folder or repository, no access (gated), or the hub cannot be reached.
        """
        if self.is_local:
            return Path(self.spec)
        self._refuse_unfit()
        wanted = ["*"] if patterns is None else list(patterns)
        if set(wanted) & set(formats.WEIGHT_PATTERNS):
            wanted = [pattern for pattern in wanted if pattern not in formats.WEIGHT_PATTERNS]
            self.fetch(self._weight_files())
        return hub.fetch(self.repository, self.revision, map(self._inside, wanted)) / self.subfolder

    def fetch(self, files: Iterable[str]) -> Path:
        """The local folder, once exactly these files of a hub model are in it."""
        if self.is_local:
            return Path(self.spec)
        return hub.fetch(self.repository, self.revision, (self._inside(glob.escape(f)) for f in files)) / self.subfolder

    def first_bytes(self, file: str, stop: int) -> tuple[bytes, int]:
        """(the first `stop` bytes, the size) of a file of a hub model, which is not fetched for it."""
        return hub.first_bytes(self.repository, self.revision, os.path.join(self.subfolder, file), stop)

    def _weight_files(self) -> list[str]:
        """The weight files of a hub model: one file or an index and its shards, safetensors before pickles."""
        for single, index in ((formats.SINGLE, formats.INDEX), (formats.BIN_SINGLE, formats.BIN_INDEX)):
            if single in self.names:
                return [single]
            if index in self.names:
                return [index, *headers.read_index(self.fetch([index]) / index)[0]]
        return []

    def _refuse_unfit(self) -> None:
        if is_pattern(self.spec):
            raise InputError(
                f"{self.spec} is a pattern of revisions or folders, a run; one model is needed here, name one"
            )
        _refuse_missing_folder(self.spec)

    def drop(self) -> None:
        """Free the disk of a hub model: its weights go from the cache, where this process had fetched them."""
        if self.is_local:
            return
        freed = hub.drop(self.repository, self.revision, self.subfolder)
        done = f"dropped from the hub cache ({freed / 1e9:.2f} GB)" if freed else "stay in the hub cache, as before"
        cli.say(f"{self.spec}: weights {done}")

    @cached_property
    def _config(self) -> dict:
        if self.is_adapter:
            return adapters.merged_config(self.adapted.config(), self.folder(formats.ADAPTER_PATTERNS))
        return read_config(self.folder(["config.json"]), self.spec)

    def config(self) -> dict:
        """The model's `config.json` as a dict; an adapter's is its base's, with the vocabulary that the adapter has."""
        return dict(self._config)

    def resolved_revision(self) -> str | None:
        """The commit that the hub's revision stands for; None for a local folder."""
        if self.is_local:
            return None
        self._refuse_unfit()
        return hub.commit(self.repository, self.revision)

    def side_files(self) -> Path:
        """The folder with configuration and tokenizer files, without fetching weights."""
        return self.folder(_SIDE_PATTERNS)

    def config_folder(self) -> Path:
        """The folder with `config.json`: that of the base for an adapter, without fetching weights."""
        return (self.adapted or self).side_files()

    def describe(self) -> dict:
        """What a result's header says of this model. `weights_sample` tells two trainings at one path apart."""
        facts = {"spec": self.spec, "model_id": self.model_id, "step": self.step, "revision": self.resolved_revision()}
        if self.is_local:
            try:
                facts |= {"weights_sample": self._weights_sample, "config_sha256": self._config_hash}
                facts["untrained_sha256"] = (
                    identity.shape_hash(identity.untrained_like(self.config())) if self._config_hash else None
                )
            except OSError as error:
                raise InputError(f"{error.filename or self.spec} cannot be read: {error.strerror or error}") from None
        if self.is_adapter:
            base = self.adapted.describe()
            facts["adapter_of"] = {key: base.get(key) for key in ("spec", "model_id", "revision", "weights_sample")}
        return facts

    @property
    def contents(self) -> str | None:
        """What two models with the same weight files have in common; None where nothing is known of them."""
        if self.is_local:
            return self._weights_sample
        files = hub.contents(self.repository, self.revision)
        kinds = formats.ADAPTER_PATTERNS if self.is_adapter else formats.WEIGHT_PATTERNS
        own = sorted(name for name in self.names if any(fnmatch.fnmatch(name, kind) for kind in kinds))
        return str([(name, files[os.path.join(self.subfolder, name)]) for name in own]) if own else None

    @cached_property
    def _config_hash(self) -> str | None:
        """A short hash of what decides the arithmetic in config.json; None where there is none."""
        if "config.json" not in self.names and not self.is_adapter:
            return None
        return identity.shape_hash(identity.shape_of(self.config()))

    @cached_property
    def _weights_sample(self) -> str | None:
        if self.is_adapter:
            return adapters.sample(self.folder(formats.ADAPTER_PATTERNS), self.adapted.describe())
        return identity.weights_sample(Path(self.spec))


_POSITIONS = ("max_position_embeddings", "n_positions")


def _base_of(ref: ModelRef, settings: adapters.Settings) -> ModelRef:
    """The model that an adapter was trained on: the one its configuration names, else the one given with the reference.

    The one it names comes first: merged into another model, the same adapter is no checkpoint of anything. But a
    quantised one holds codes, to which nothing can be added.
    """
    named = settings.base or "a base that it does not name"
    place = f"base_model_name_or_path of its {formats.ADAPTER_CONFIG}"
    base, why = None, "which is not here" if settings.base else ""
    if settings.base:
        with contextlib.suppress(InputError):
            base = model(settings.base)
    remedy = f"write where its base is into {place}"
    if _is_quantised(base, settings.base):
        base, why, original = None, "which is quantised", formats.original_of(settings.base)
        by_name = f" (by its name {original})" if original else ""
        remedy = f"write the 16-bit model that it was made from{by_name} into {place}"
    if base is None:
        told = f"{ref.spec} is an adapter of {named}{f', {why}' if why else ''}"
        if ref.base is None:
            raise InputError(f"{told}; {remedy}")
        base = ref.base
        cli.say(f"{told}; {base.spec} is taken")
    if base.is_adapter:
        raise InputError(f"{ref.spec} is an adapter of {base.spec}, which is an adapter itself; merge that one first")
    return base


def _is_quantised(base: ModelRef | None, name: str) -> bool:
    """Whether a base holds codes: where its configuration speaks of some, its files decide; where it cannot be had, its
    name."""
    if base is not None:
        try:
            if not base.is_adapter and formats.stated(base.config()) is not None:
                tensors.TensorFolder(base, lazy=True).refuse_unfit().close()
            return False
        except formats.Quantised:
            return True
        except InputError:
            pass
    return formats.original_of(name) is not None


def read_config(folder: Path, name: str) -> dict:
    """The `config.json` of a model folder.

    Raises:
        InputError: there is none, it is damaged, or a size in it is no size.
    """
    file = folder / "config.json"
    if not file.exists():
        hint = "it is a run of checkpoints; name one of them" if checkpoints(folder) else "it is no model folder"
        hint += formats.cut_off(folder)
        named = sorted(path.parent.name for path in folder.glob(f"*/{formats.ADAPTER_CONFIG}"))
        if named and not checkpoints(folder):  # as PEFT saves adapters that were given names
            hint = (
                f"adapters are in its sub-folders {', '.join(named)}; give {name}/{named[0]}, or, for a run, move the "
                "files of one adapter up into each checkpoint"
            )
        raise InputError(f"{name} has no config.json: {hint}")
    config = formats.read_json(file)
    text = config.get("text_config")
    for key, value, kind in (("model_type", config.get("model_type"), str), ("text_config", text, dict)):
        if not isinstance(value, kind | None):
            raise InputError(f"{file}: {key} is {str(value)[:40]}, which no model has; copy it again")
    for values in (config, text or {}):
        for key in sorted({key for keys in archs.FIELDS.values() for key in keys} | {"vocab_size", *_POSITIONS}):
            value = values.get(key)
            number = isinstance(value, int | float) and 0 <= value < 1 << 31 and value == int(value)
            if isinstance(value, str | bool) or (isinstance(value, int | float) and not number):
                raise InputError(f"{file}: {key} is {str(value)[:40]}, which is no size of a model; copy it again")
    return config


def _refuse_missing_folder(spec: str) -> None:
    name = spec.partition("@")[0]
    if not _REPOSITORY.fullmatch(name) or spec.startswith((".", "~", "/")):
        hint = f"; is {name.replace(':', '/')} meant?" if name.count(":") == 1 and "/" in name else ""
        raise InputError(
            f"{spec}: no such folder, and no hub name like org/name, org/name@revision or org/name/folder{hint}"
        )
    there = next((parent for parent in Path(name).parents if parent.name and parent.is_dir()), None)
    if there:  # build/demo where build/ is there: a mistyped path, not a repository of the user "build"
        absent = Path(name).relative_to(there).parts[0]
        raise InputError(f"{spec}: no such folder (the folder {there} is there, {absent} is not in it)")


def model(text: str | os.PathLike) -> ModelRef:
    """The reference to one model. Its files are not touched yet, but a missing local folder is refused here."""
    spec = os.fspath(text).rstrip("/") or "/"
    if os.path.isdir(spec):
        return ModelRef(spec, step_of(os.path.basename(os.path.abspath(spec))))
    _refuse_missing_folder(spec)
    ref = ModelRef(spec)
    step = step_of(os.path.basename(ref.subfolder))
    return replace(ref, step=step_of(ref.revision or "") if step is None else step)


# --- runs ---


def is_run(text: str | os.PathLike) -> bool:
    """Whether `text` names a run: a folder or hub repository that holds checkpoints, or a pattern of them."""
    spec = os.fspath(text)
    return is_pattern(spec) or bool(checkpoints(spec) if os.path.isdir(spec) else _folders(model(spec)))


def checkpoints(folder: str | os.PathLike) -> list[ModelRef]:
    """The checkpoints in a local folder, ordered by step: its sub-folders `checkpoint-<step>`, and others that are
    named after a step and hold a model or an adapter. What a Trainer or a swap has not finished is none.
    """
    folder = os.fspath(folder)
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror or error}") from None
    names = [name for name in names if not name.startswith(_PASSING)]
    plain = {name: step_of(name) for name in names if CHECKPOINT.fullmatch(name)}
    own = ("config.json", formats.ADAPTER_CONFIG)
    others = [n for n in names if n not in plain and any(os.path.isfile(os.path.join(folder, n, f)) for f in own)]
    steps = steps_of([*plain, *others])
    _say_steps(folder, steps)
    return [ModelRef(os.path.join(folder, name), step) for name, step in steps.items()]


def _folders(ref: ModelRef) -> list[ModelRef]:
    """The checkpoints that a hub repository, or a folder in it, holds as folders; [] where the hub does not say."""
    if ref.step is not None:  # a checkpoint itself
        return []
    try:
        names = ref.names
    except InputError:  # whoever reads the model says it
        return []
    there = {
        os.path.dirname(name) for name in names if os.path.basename(name) in ("config.json", formats.ADAPTER_CONFIG)
    }
    return _in_repository(ref, {name for name in there if name and "/" not in name})


def _in_repository(ref: ModelRef, folders: Iterable[str]) -> list[ModelRef]:
    steps = steps_of(folders)
    _say_steps(ref.spec, steps)
    revision = f"@{ref.revision}" if ref.revision else ""
    return [ModelRef(f"{ref.spec.partition('@')[0]}/{name}{revision}", step) for name, step in steps.items()]


def _say_steps(where: str, steps: dict[str, int]) -> None:
    """Say once what was taken as the step, where it is not plain."""
    shown = next((name for name, step in steps.items() if name not in (f"checkpoint-{step}", f"step{step}")), None)
    if shown is not None:
        cli.once(f"{where}: steps are read from the names ({shown} is step {steps[shown]})")


def is_pattern(spec: str) -> bool:
    """Whether `spec` means several revisions or folders of a hub repository: `org/name@step*`, `org/name/step*`."""
    return any(sign in spec for sign in "*?[") and not os.path.isdir(spec) and bool(_REPOSITORY.match(spec))


def revisions(spec: str) -> list[ModelRef]:
    """The branches and tags, or the folders, that a pattern means and that have a step in their names, by step.

    Raises:
        InputError: there are none, or the hub cannot be asked.
    """
    name, _, pattern = spec.partition("@")
    if any(sign in name for sign in "*?["):
        place, _, folders = name.rpartition("/")
        _refuse_missing_folder(place)
        ref = ModelRef(f"{place}@{pattern}" if pattern else place)
        there = {os.path.dirname(file) for file in ref.names}
        found = _in_repository(ref, [folder for folder in there if folder and fnmatch.fnmatchcase(folder, folders)])
        what = f"{place} has no folder"
    else:
        _refuse_missing_folder(name)
        steps = steps_of(hub.revisions(name, pattern))
        _say_steps(spec, steps)
        found, what = [ModelRef(f"{name}@{own}", step) for own, step in steps.items()], f"{name} has no branch or tag"
    if not found:
        raise InputError(f"{spec}: {what} of that pattern with a step in its name")
    return found


def _expand(text: str | os.PathLike) -> list[ModelRef]:
    """The checkpoints of a run in step order, or the one model that `text` names.

    A folder with checkpoints is a run, even where a Trainer has left its final model beside them.
    """
    spec = os.fspath(text).rstrip("/") or "/"
    if is_pattern(spec):
        return revisions(spec)
    if os.path.isdir(spec):
        found = checkpoints(spec)
        if found:
            _say_final_model(spec, found)
        return found or [model(spec)]
    ref = model(spec)
    return _folders(ref) or [ref]


def _say_final_model(folder: str, found: list[ModelRef]) -> None:
    """Say whose twin the model is that lies beside the checkpoints of a run, as a Trainer leaves it."""
    own = ModelRef(folder)
    if not {"config.json", formats.ADAPTER_CONFIG} & own.names:
        return
    with contextlib.suppress(InputError, OSError):  # damaged checkpoints are said where they are read
        sample = own._weights_sample
        if sample is None:
            return
        twin = next((ref for ref in reversed(found) if ref._weights_sample == sample), None)
        if twin is not None:
            cli.once(f"{folder}: its own model is that of {Path(twin.spec).name}; the run is its checkpoints")
        else:
            cli.once(
                f"{folder}: its own model is none of its checkpoints (trained on after the last one was saved?) and is "
                "left out; to have it in the run, put its files into a folder checkpoint-<step> beside the others"
            )


def one_at_a_time(run: list[ModelRef], drop: bool, base: ModelRef | None = None) -> Iterator[list[ModelRef]]:
    """The run in groups whose weights are on disk together: all of it, or, with `drop`, one checkpoint after another.

    With `drop`, a checkpoint's weights go from the hub cache as soon as the next one is asked for (see `hub.drop`);
    never those of `base`.
    """
    if not drop:
        yield run
        return
    for ref in run:
        yield [ref]
        if base is None or ref.spec != base.spec:
            ref.drop()


def models(texts: str | os.PathLike | Iterable[str], steps: Iterable[int] | None = None) -> list[ModelRef]:
    """References to all models that `texts` names, in the order given, runs expanded in step order.

    Args:
        texts: one reference or several; each a model or a run.
        steps: keep only these steps of runs; a step that no run has is refused. Models without a step stay.

    Raises:
        InputError: a missing folder, or an unknown step.
    """
    if isinstance(texts, str | os.PathLike):
        texts = [texts]
    return _only_steps([ref for text in texts for ref in _expand(text)], steps)


def run(texts: str | os.PathLike | Iterable[str], steps: Iterable[int] | None = None) -> list[ModelRef]:
    """The checkpoints of one run in step order: every model has a step, and no step comes twice.

    `texts` is a run, or a list of models named after their steps. A single model without a step in its name is a run of
    one, of step 0.
    """
    found = models(texts)
    if len(found) == 1 and found[0].step is None:
        return [replace(found[0], step=0)]
    for ref in found:
        if ref.step is None:
            hint = (
                "a run is a folder of checkpoint-<step> folders, or a list of models named checkpoint-<step> or step<N>"
            )
            raise InputError(f"{ref.spec}: no step in its name; {hint}")
    numbers = [ref.step for ref in found]
    for n in numbers:
        if numbers.count(n) > 1:
            twice = ", ".join(ref.spec for ref in found if ref.step == n)
            raise InputError(f"step {n} comes twice in the run: {twice}; name the checkpoints of one run")
    return sorted(_only_steps(found, steps), key=lambda ref: ref.step)


def _only_steps(found: list[ModelRef], steps: Iterable[int] | None) -> list[ModelRef]:
    if steps is None:
        return found
    missing = sorted(set(steps) - {ref.step for ref in found})
    if missing:
        have = ", ".join(str(ref.step) for ref in found if ref.step is not None) or "none"
        raise InputError(f"no checkpoint of step {', '.join(map(str, missing))}; the run has {have}")
    return [ref for ref in found if ref.step is None or ref.step in set(steps)]


def same_model(a: dict, b: dict) -> bool:
    """Whether two descriptions mean one model: by its weights where both are local, else by name and revision.

    Of an adapter the model that it changes must be the same, too.
    """
    if a.get("weights_sample") and b.get("weights_sample"):
        return a["weights_sample"] == b["weights_sample"]
    below = a.get("adapter_of"), b.get("adapter_of")
    if any(below) and not (all(below) and same_model(*below)):
        return False
    return a.get("model_id") == b.get("model_id") and a.get("revision") == b.get("revision")


def relatives(found: Iterable[ModelRef], base: str | None = None, run: str | list | None = None) -> list[dict]:
    """Descriptions of the models that a result may be of to serve `found`: themselves, the other checkpoints of their
    runs, and the study's base and run.

    All checkpoints are described as they are now, so that what was made before a run was trained again is no relative.
    """
    known: dict[str, ModelRef] = {}
    for ref in found:
        known[ref.spec] = ref
        parent = os.path.dirname(os.path.abspath(ref.spec))
        if ref.is_local and ref.step is not None:
            known |= {other.spec: other for other in checkpoints(os.path.relpath(parent))}
    for spec in filter(None, [base]):
        if os.path.isdir(spec) or not _looks_local(spec):
            known.setdefault(spec, model(spec))
    if run and (not isinstance(run, str) or os.path.isdir(run) or not _looks_local(run)):
        known |= {ref.spec: ref for ref in models(run) if ref.spec not in known}
    return [ref.describe() for ref in known.values()]


def _looks_local(spec: str) -> bool:
    """Whether a reference that is no folder can only have been meant as one."""
    name = spec.partition("@")[0]
    return not _REPOSITORY.fullmatch(name) or any(parent.name and parent.is_dir() for parent in Path(name).parents)


def belongs(measured: dict, models: list[dict]) -> bool:
    """Whether `measured` is one of `models`, or a checkpoint of the same run that is not among them."""
    if any(same_model(measured, model) for model in models):
        return True
    if measured.get("revision"):
        return ModelRef(measured["spec"]).repository in {ModelRef(model["spec"]).repository for model in models}
    place = Path(measured["spec"]).resolve()
    known = {Path(model["spec"]).resolve(): model.get("step") for model in models}
    # A path that is among the models holds other weights now: it was trained again.
    return (
        place not in known
        and measured.get("step") is not None
        and place.parent in {path.parent for path, step in known.items() if step is not None}
    )
