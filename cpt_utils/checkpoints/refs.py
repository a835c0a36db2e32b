"""Model references: a local folder, `org/name`, `org/name@revision`, `org/name/folder`, or a run of checkpoints.

A run is a folder whose sub-folders are named after steps (`checkpoint-500`, `step_500`, `iter_0001000`), a hub
repository with such folders, a list of models, or a pattern of revisions or folders of one repository
(`org/name@stage1-step*`, `org/name/checkpoint-*`). A folder or revision with a PEFT adapter instead of a model means
the base with the adapter merged into it (see `adapters`).
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
    """A file name for the model folder at `path`: its last two parts, joined by `__`."""
    return "__".join(part for part in Path(os.path.abspath(path)).parts[-2:] if part != os.sep)


@dataclass(frozen=True)
class ModelRef:
    """One model: `spec` as the user typed it, and its training `step` if the name contains one.

    `base` is used as an adapter's base if the one that its configuration names is not here.
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
        """The folder of a hub model in its repository (`org/name/checkpoint-500`); "" at the top."""
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
        """The files of this model; for a hub model those in its repository, fetched or not."""
        if self.is_local:
            try:
                return frozenset(os.listdir(self.spec))
            except OSError as error:
                raise InputError(f"{self.spec} cannot be read: {error.strerror or error}") from None
        self._refuse_unfit()
        all_names = hub.names(self.repository, self.revision)
        if not self.subfolder:
            return all_names
        prefix = f"{self.subfolder}/"
        inside = frozenset(name.removeprefix(prefix) for name in all_names if name.startswith(prefix))
        if not inside:
            folders = sorted({os.path.dirname(name) for name in all_names} - {""})
            raise InputError(
                f"{self.repository} has no folder {self.subfolder}; it has {', '.join(folders[:8]) or 'no folders'}"
            )
        return inside

    def _inside(self, pattern: str) -> str:
        """A pattern of this model's files as a pattern of the repository's files."""
        return f"{glob.escape(self.subfolder)}/{pattern}" if self.subfolder else pattern

    @property
    def is_adapter(self) -> bool:
        """Whether this is a PEFT adapter. A folder that also holds a model is that model, as in the loaders."""
        names = self.names
        return formats.ADAPTER_CONFIG in names and not any(
            fnmatch.fnmatch(n, p) for n in names for p in formats.WEIGHT_PATTERNS
        )

    def say_adapter_beside(self) -> None:
        """Report, once per run, how a folder with both a model and an adapter is read."""
        if formats.ADAPTER_CONFIG in self.names and not self.is_adapter:
            cli.once(
                f"{formats.run_of(self.spec)}: beside the model there is an adapter ({formats.ADAPTER_CONFIG}); the "
                "model is used as it is, and the adapter is assumed to be merged into it already"
            )

    @cached_property
    def adapted(self) -> ModelRef | None:
        """The model that an adapter was trained on; None if this is not an adapter."""
        if not self.is_adapter:
            return None
        return adapters.base_of(self, model)

    def with_base(self, base: ModelRef | None) -> ModelRef:
        """The same model, with a base to use if it is an adapter whose own base is not here."""
        return replace(self, base=base)

    def folder(self, patterns: Iterable[str] | None = None) -> Path:
        """The local folder with this model's files; for a hub model the files matching `patterns` are fetched first.

        If a repository has weights in several formats, only those that `TensorFolder` reads are fetched.

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
        """The local folder, after fetching exactly these files of a hub model."""
        if self.is_local:
            return Path(self.spec)
        return hub.fetch(self.repository, self.revision, (self._inside(glob.escape(f)) for f in files)) / self.subfolder

    def first_bytes(self, file: str, stop: int) -> tuple[bytes, int]:
        """(the first `stop` bytes, the size) of a file of a hub model, without fetching the file."""
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
        """Remove the weights of a hub model from the cache, if this process fetched them."""
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
        """The model's `config.json` as a dict; for an adapter its base's, with the adapter's vocabulary size."""
        return dict(self._config)

    def resolved_revision(self) -> str | None:
        """The commit of the hub revision; None for a local folder."""
        if self.is_local:
            return None
        self._refuse_unfit()
        return hub.commit(self.repository, self.revision)

    def side_files(self) -> Path:
        """The folder with configuration and tokenizer files; no weights are fetched."""
        return self.folder(_SIDE_PATTERNS)

    def config_folder(self) -> Path:
        """The folder with `config.json` (of the base, for an adapter); no weights are fetched."""
        return (self.adapted or self).side_files()

    def describe(self) -> dict:
        """The model's entry in a result's header. `weights_sample` distinguishes two trainings at the same path."""
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
        """An identifier of the contents of the weight files; None if they are unknown."""
        if self.is_local:
            return self._weights_sample
        files = hub.contents(self.repository, self.revision)
        kinds = formats.ADAPTER_PATTERNS if self.is_adapter else formats.WEIGHT_PATTERNS
        weights = sorted(name for name in self.names if any(fnmatch.fnmatch(name, kind) for kind in kinds))
        return str([(name, files[os.path.join(self.subfolder, name)]) for name in weights]) if weights else None

    @cached_property
    def _config_hash(self) -> str | None:
        """A short hash of the settings in config.json that affect the computation; None without a config.json."""
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
            f"{spec}: no such folder, and not a hub name like org/name, org/name@revision or org/name/folder{hint}"
        )
    existing = next((parent for parent in Path(name).parents if parent.name and parent.is_dir()), None)
    if existing:  # build/demo, and build/ exists: a mistyped path, not a repository of the user "build"
        absent = Path(name).relative_to(existing).parts[0]
        raise InputError(f"{spec}: no such folder ({existing} exists, but {absent} is not in it)")


def looks_local(spec: str) -> bool:
    """Whether a reference that is not a folder can only be a mistyped path of one."""
    name = spec.partition("@")[0]
    return not _REPOSITORY.fullmatch(name) or any(parent.name and parent.is_dir() for parent in Path(name).parents)


def model(text: str | os.PathLike) -> ModelRef:
    """The reference to one model. Its files are not read yet, but a missing local folder is refused here."""
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
    """The checkpoint folders of a hub repository, or of a folder in it; [] if the hub cannot be asked."""
    if ref.step is not None:  # a checkpoint itself
        return []
    try:
        names = ref.names
    except InputError:  # reported when the model is read
        return []
    folders = {
        os.path.dirname(name) for name in names if os.path.basename(name) in ("config.json", formats.ADAPTER_CONFIG)
    }
    return _in_repository(ref, {name for name in folders if name and "/" not in name})


def _in_repository(ref: ModelRef, folders: Iterable[str]) -> list[ModelRef]:
    steps = step_names.told(ref.spec, folders)
    revision = f"@{ref.revision}" if ref.revision else ""
    return [ModelRef(f"{ref.spec.partition('@')[0]}/{name}{revision}", step) for name, step in steps.items()]


def is_pattern(spec: str) -> bool:
    """Whether `spec` means several revisions or folders of a hub repository: `org/name@step*`, `org/name/step*`."""
    return any(sign in spec for sign in "*?[") and not os.path.isdir(spec) and bool(_REPOSITORY.match(spec))


def revisions(spec: str) -> list[ModelRef]:
    """The branches and tags, or the folders, that match a pattern and have a step in their names, in step order.

    Raises:
        InputError: there are none, or the hub cannot be asked.
    """
    name, _, pattern = spec.partition("@")
    if any(sign in name for sign in "*?["):
        parent, _, folders = name.rpartition("/")
        _refuse_missing_folder(parent)
        ref = ModelRef(f"{parent}@{pattern}" if pattern else parent)
        there = {os.path.dirname(file) for file in ref.names}
        matches = _in_repository(ref, [folder for folder in there if folder and fnmatch.fnmatchcase(folder, folders)])
        what = f"{parent} has no folder"
    else:
        _refuse_missing_folder(name)
        steps = step_names.told(spec, hub.revisions(name, pattern))
        matches = [ModelRef(f"{name}@{revision}", step) for revision, step in steps.items()]
        what = f"{name} has no branch or tag"
    if not matches:
        raise InputError(f"{spec}: {what} that matches the pattern and has a step in its name")
    return matches


def _expand(text: str | os.PathLike) -> list[ModelRef]:
    """The checkpoints of a run in step order, or the one model that `text` names.

    A folder with checkpoints is a run, even if a Trainer has left its final model beside them.
    """
    spec = os.fspath(text).rstrip("/") or "/"
    if is_pattern(spec):
        return revisions(spec)
    if os.path.isdir(spec):
        in_folder = checkpoints(spec)
        if in_folder:
            _say_final_model(spec, in_folder)
        return in_folder or [model(spec)]
    ref = model(spec)
    return _folders(ref) or [ref]


def _say_final_model(folder: str, run_checkpoints: list[ModelRef]) -> None:
    """Report which checkpoint of a run equals the final model beside them, which a Trainer leaves there."""
    final = ModelRef(folder)
    if not {"config.json", formats.ADAPTER_CONFIG} & final.names:
        return
    with contextlib.suppress(InputError, OSError):  # damaged checkpoints are reported when they are read
        sample = final._weights_sample
        if sample is None:
            return
        twin = next((ref for ref in reversed(run_checkpoints) if ref._weights_sample == sample), None)
        if twin is not None:
            cli.once(f"{folder}: its final model is the same as {Path(twin.spec).name}; the run is its checkpoints")
        else:
            cli.once(
                f"{folder}: its final model is none of its checkpoints (was training continued after the last one?) "
                "and is left out; to include it, put its files into a folder checkpoint-<step> beside the others"
            )


def one_at_a_time(run: list[ModelRef], drop: bool, base: ModelRef | None = None) -> Iterator[list[ModelRef]]:
    """The run in groups whose weights are on disk together: the whole run, or with `drop` one checkpoint at a time.

    With `drop`, a checkpoint's weights are removed from the hub cache when the next one is requested (see `hub.drop`);
    those of `base` stay.
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
        steps: keep only these steps of runs; a step that no run has is refused. Models without a step are kept.

    Raises:
        InputError: a missing folder, or an unknown step.
    """
    if isinstance(texts, str | os.PathLike):
        texts = [texts]
    return _only_steps([ref for text in texts for ref in _expand(text)], steps)


def run(texts: str | os.PathLike | Iterable[str], steps: Iterable[int] | None = None) -> list[ModelRef]:
    """The checkpoints of one run in step order: every model has a step, and no step appears twice.

    `texts` is a run, or a list of models named after their steps. A single model without a step in its name is a run of
    one checkpoint, at step 0.
    """
    refs = models(texts)
    if len(refs) == 1 and refs[0].step is None:
        return [replace(refs[0], step=0)]
    for ref in refs:
        if ref.step is None:
            hint = (
                "a run is a folder of checkpoint-<step> folders, or a list of models named checkpoint-<step> or step<N>"
            )
            raise InputError(f"{ref.spec}: no step in its name; {hint}")
    numbers = [ref.step for ref in refs]
    for n in numbers:
        if numbers.count(n) > 1:
            twice = ", ".join(ref.spec for ref in refs if ref.step == n)
            raise InputError(f"step {n} appears twice in the run: {twice}; name the checkpoints of one run")
    return sorted(_only_steps(refs, steps), key=lambda ref: ref.step)


def _only_steps(refs: list[ModelRef], steps: Iterable[int] | None) -> list[ModelRef]:
    if steps is None:
        return refs
    missing = sorted(set(steps) - {ref.step for ref in refs})
    if missing:
        have = ", ".join(str(ref.step) for ref in refs if ref.step is not None) or "none"
        raise InputError(f"no checkpoint of step {', '.join(map(str, missing))}; the run has {have}")
    return [ref for ref in refs if ref.step is None or ref.step in set(steps)]
