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

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import adapters, formats, headers, hub, identity, settings, step_names

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)*")
_SIDE_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja")


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
                "model is used as it is, and the adapter taken to be merged into it already"
            )

    @cached_property
    def adapted(self) -> ModelRef | None:
        """The model that an adapter was trained on; None for what is a model itself."""
        if not self.is_adapter:
            return None
        return adapters.base_of(self, model)

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
            raise InputError(f"{self.spec} is a pattern of revisions or folders, that is, a run; name one model here")
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
        return settings.read_config(self.folder(["config.json"]), self.spec)

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
        weights = sorted(name for name in self.names if any(fnmatch.fnmatch(name, kind) for kind in kinds))
        return str([(name, files[os.path.join(self.subfolder, name)]) for name in weights]) if weights else None

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


def looks_local(spec: str) -> bool:
    """Whether a reference that is not a folder can only have been meant as one."""
    name = spec.partition("@")[0]
    return not _REPOSITORY.fullmatch(name) or any(parent.name and parent.is_dir() for parent in Path(name).parents)


def model(text: str | os.PathLike) -> ModelRef:
    """The reference to one model. Its files are not touched yet, but a missing local folder is refused here."""
    spec = os.fspath(text).rstrip("/") or "/"
    if os.path.isdir(spec):
        return ModelRef(spec, step_names.step_of(os.path.basename(os.path.abspath(spec))))
    _refuse_missing_folder(spec)
    ref = ModelRef(spec)
    step = step_names.step_of(os.path.basename(ref.subfolder))
    return replace(ref, step=step_names.step_of(ref.revision or "") if step is None else step)


# --- runs ---


def is_run(text: str | os.PathLike) -> bool:
    """Whether `text` names a run: a folder or hub repository that holds checkpoints, or a pattern of them."""
    spec = os.fspath(text)
    return is_pattern(spec) or bool(checkpoints(spec) if os.path.isdir(spec) else _folders(model(spec)))


def checkpoints(folder: str | os.PathLike) -> list[ModelRef]:
    """The checkpoints in a local folder, ordered by step, see `step_names.in_folder`."""
    return [ModelRef(os.path.join(folder, name), step) for name, step in step_names.in_folder(folder).items()]


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
    steps = step_names.told(ref.spec, folders)
    revision = f"@{ref.revision}" if ref.revision else ""
    return [ModelRef(f"{ref.spec.partition('@')[0]}/{name}{revision}", step) for name, step in steps.items()]


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
        parent, _, folders = name.rpartition("/")
        _refuse_missing_folder(parent)
        ref = ModelRef(f"{parent}@{pattern}" if pattern else parent)
        there = {os.path.dirname(file) for file in ref.names}
        found = _in_repository(ref, [folder for folder in there if folder and fnmatch.fnmatchcase(folder, folders)])
        what = f"{parent} has no folder"
    else:
        _refuse_missing_folder(name)
        steps = step_names.told(spec, hub.revisions(name, pattern))
        found = [ModelRef(f"{name}@{revision}", step) for revision, step in steps.items()]
        what = f"{name} has no branch or tag"
    if not found:
        raise InputError(f"{spec}: {what} that matches the pattern and has a step in its name")
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
    final = ModelRef(folder)
    if not {"config.json", formats.ADAPTER_CONFIG} & final.names:
        return
    with contextlib.suppress(InputError, OSError):  # damaged checkpoints are said where they are read
        sample = final._weights_sample
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
    """The checkpoints of one run in step order: every model has a step, and no step appears twice.

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
            raise InputError(f"step {n} appears twice in the run: {twice}; name the checkpoints of one run")
    return sorted(_only_steps(found, steps), key=lambda ref: ref.step)


def _only_steps(found: list[ModelRef], steps: Iterable[int] | None) -> list[ModelRef]:
    if steps is None:
        return found
    missing = sorted(set(steps) - {ref.step for ref in found})
    if missing:
        have = ", ".join(str(ref.step) for ref in found if ref.step is not None) or "none"
        raise InputError(f"no checkpoint of step {', '.join(map(str, missing))}; the run has {have}")
    return [ref for ref in found if ref.step is None or ref.step in set(steps)]
