"""Model references: a local folder, `org/name`, `org/name@revision`, or a run of `checkpoint-<step>` folders.

A run may also be a list of revisions of one hub repository, or a pattern of them (`org/name@stage1-step*`). A folder or
revision that holds a PEFT adapter instead of a model stands for base and adapter merged (see `adapters`).
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from cpt_utils import archs, cli, hub, tensors
from cpt_utils.errors import InputError

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STEP = re.compile(r"(?:^|[-_])step-?(\d+)(?=$|[-_])")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
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
# Any one of these makes a folder a tokenizer folder.
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json")
WEIGHT_PATTERNS = (*SAFETENSORS, "pytorch_model*.bin", "pytorch_model.bin.index.json")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_PATTERNS = (ADAPTER_CONFIG, *ADAPTER_WEIGHTS)
_SIDE_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja")


def step_of(name: str) -> int | None:
    """The training step that a checkpoint folder or a hub revision is named after, or None.

    `checkpoint-15` -> 15; `stage2-ingredient1-step1000-tokens5B` -> 1000; `step1000` -> 1000. Always an integer: as
    text, `step1000` would come before `step512`.
    """
    match = CHECKPOINT.fullmatch(name) or _STEP.search(name)
    return int(match[1]) if match else None


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
        return self.spec.partition("@")[0]

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
        return hub.names(self.repository, self.revision)

    @property
    def is_adapter(self) -> bool:
        """Whether this is a PEFT adapter. A folder that also holds a model is that model, as for the loaders."""
        names = self.names
        return ADAPTER_CONFIG in names and not any(fnmatch.fnmatch(n, p) for n in names for p in WEIGHT_PATTERNS)

    @cached_property
    def adapted(self) -> ModelRef | None:
        """The model that an adapter was trained on; None for what is a model itself."""
        if not self.is_adapter:
            return None
        from cpt_utils import adapters

        return adapters.base_of(self, adapters.read_settings(self.folder([ADAPTER_CONFIG])))

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
        if set(wanted) & set(WEIGHT_PATTERNS):
            wanted = [pattern for pattern in wanted if pattern not in WEIGHT_PATTERNS]
            hub.fetch_files(self.repository, self.revision, self._weight_files())
        return hub.fetch(self.repository, self.revision, wanted)

    def fetch(self, files: Iterable[str]) -> Path:
        """The local folder, once exactly these files of a hub model are in it."""
        return Path(self.spec) if self.is_local else hub.fetch_files(self.repository, self.revision, files)

    def first_bytes(self, file: str, stop: int) -> tuple[bytes, int]:
        """(the first `stop` bytes, the size) of a file of a hub model, which is not fetched for it."""
        return hub.first_bytes(self.repository, self.revision, file, stop)

    def _weight_files(self) -> list[str]:
        """The weight files of a hub model: one file or an index and its shards, safetensors before pickles."""
        for single, index in ((tensors.SINGLE, tensors.INDEX), (tensors.BIN_SINGLE, tensors.BIN_INDEX)):
            if single in self.names:
                return [single]
            if index in self.names:
                return [index, *tensors.read_index(self.fetch([index]) / index)[0]]
        return []

    def _refuse_unfit(self) -> None:
        if is_pattern(self.spec):
            raise InputError(f"{self.spec} is a pattern of revisions, a run; one model is needed here, name one")
        _refuse_missing_folder(self.spec)

    def drop(self) -> None:
        """Free the disk of a hub model: its weights go from the cache, where this process had fetched them."""
        if self.is_local:
            return
        freed = hub.drop(self.repository, self.revision)
        done = f"dropped from the hub cache ({freed / 1e9:.2f} GB)" if freed else "stay in the hub cache, as before"
        cli.say(f"{self.spec}: weights {done}")

    @cached_property
    def _config(self) -> dict:
        if self.is_adapter:
            from cpt_utils import adapters

            return adapters.config(self)
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
                facts["tokenizer_sha256"] = tokenizer_hash(Path(self.spec))
            except OSError as error:
                raise InputError(f"{error.filename or self.spec} cannot be read: {error.strerror or error}") from None
        if self.is_adapter:
            base = self.adapted.describe()
            facts["adapter_of"] = {key: base.get(key) for key in ("spec", "model_id", "revision", "weights_sample")}
        return facts

    @cached_property
    def _config_hash(self) -> str | None:
        """A short hash of what decides the arithmetic in config.json; None where there is none."""
        if "config.json" not in self.names and not self.is_adapter:
            return None
        text = json.dumps(shape_of(self.config()), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def _weights_sample(self) -> str | None:
        if self.is_adapter:
            from cpt_utils import adapters

            return adapters.sample(self)
        return weights_sample(Path(self.spec))


def shape_of(config: dict) -> dict:
    """A configuration without what saving adds to it: a model saved by another release stays the same model."""
    passing = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures")
    return {key: value for key, value in config.items() if key not in passing}


def weights_sample(
    folder: Path, patterns: Iterable[str] = WEIGHT_PATTERNS, blocks: int = 64, block: int = 1 << 14
) -> str | None:
    """A short hash of a model folder's weights: of every safetensors tensor its first, middle and last bytes, of every
    file its size and `blocks` evenly spaced blocks.

    Reads a megabyte or two a file, so it costs nothing beside loading. Two trainings differ in every block, and a
    change of a whole tensor shows in that tensor; that of a few rows inside a large one may not. None where the folder
    holds no weights.
    """
    names = sorted(name for name in os.listdir(folder) if any(fnmatch.fnmatch(name, p) for p in patterns))
    names = [name for name in names if (folder / name).is_file()]
    if not names:
        return None
    digest = hashlib.sha256()
    for name in names:
        path = folder / name
        size = path.stat().st_size
        digest.update(f"{name}:{size}".encode())
        with open(path, "rb") as file:
            for position in sorted({size * i // blocks for i in range(blocks)} | {max(0, size - block)}):
                file.seek(position)
                digest.update(file.read(block))
            for position in _tensor_places(file, size) if name.endswith(".safetensors") else ():
                file.seek(position)
                digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]


_PIECE = 1 << 12  # bytes read at each place of a tensor


def _tensor_places(file, size: int) -> list[int]:
    """Where the first, middle and last bytes of the tensors of a safetensors file are; [] for a damaged header."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        return []
    try:
        header = json.loads(file.read(length))
        spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        places = {8 + length + p for a, b in spans for p in (a, (a + b) // 2, max(a, b - _PIECE))}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return sorted(place for place in places if 0 <= place < size)


def read_config(folder: Path, name: str) -> dict:
    """The `config.json` of a model folder.

    Raises:
        InputError: there is none, it is damaged, or a size in it is no size.
    """
    file = folder / "config.json"
    if not file.exists():
        run = [p for p in folder.iterdir() if CHECKPOINT.fullmatch(p.name)]
        hint = "it is a run of checkpoints; name one of them" if run else "it is no model folder"
        raise InputError(f"{name} has no config.json: {hint}")
    config = read_json(file)
    text = config.get("text_config")
    for values in (config, text if isinstance(text, dict) else {}):
        for key in sorted({key for keys in archs.FIELDS.values() for key in keys} | {"vocab_size"}):
            value = values.get(key)
            number = isinstance(value, int | float) and 0 <= value < 1 << 31 and value == int(value)
            if isinstance(value, str | bool) or (isinstance(value, int | float) and not number):
                raise InputError(f"{file}: {key} is {str(value)[:40]}, which is no size of a model; copy it again")
    return config


def read_json(file: Path) -> dict:
    """A configuration file.

    Raises:
        InputError: it is no file, no JSON, or holds no object.
    """
    try:
        if not file.is_file():
            raise InputError(f"{file} is not there, or no file")
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON ({error}); copy the model again") from None
    if not isinstance(config, dict):
        raise InputError(f"{file} holds no configuration; copy the model again")
    return config


def _refuse_missing_folder(spec: str) -> None:
    if not _REPOSITORY.fullmatch(spec.partition("@")[0]) or spec.startswith((".", "~", "/")):
        raise InputError(f"{spec}: no such folder, and it is not a hub name like org/name or org/name@revision")
    parent = Path(spec.partition("@")[0]).parent
    if parent.is_dir():  # build/demo where build/ is there: a mistyped path, not a repository of the user "build"
        raise InputError(f"{spec}: no such folder (the folder {parent} is there, {Path(spec).name} is not in it)")


def model(text: str | os.PathLike) -> ModelRef:
    """The reference to one model. Its files are not touched yet, but a missing local folder is refused here."""
    spec = os.fspath(text).rstrip("/") or "/"
    if not os.path.isdir(spec):
        _refuse_missing_folder(spec)
        return ModelRef(spec, step_of(spec.partition("@")[2]))
    return ModelRef(spec, step_of(os.path.basename(os.path.abspath(spec))))


def is_run(text: str | os.PathLike) -> bool:
    """Whether `text` is a local folder that holds `checkpoint-<step>` folders."""
    return os.path.isdir(text) and any(CHECKPOINT.fullmatch(name) for name in os.listdir(text))


def checkpoints(folder: str | os.PathLike) -> list[ModelRef]:
    """The `checkpoint-<step>` folders below `folder`, ordered by step."""
    names = [name for name in os.listdir(folder) if CHECKPOINT.fullmatch(name)]
    found = [ModelRef(os.path.join(os.fspath(folder), name), step_of(name)) for name in names]
    return sorted((ref for ref in found if os.path.isdir(ref.spec)), key=lambda ref: ref.step)


def is_pattern(spec: str) -> bool:
    """Whether `spec` means several revisions of a hub repository: `org/name@step*`. No revision has such a name."""
    return any(sign in spec.partition("@")[2] for sign in "*?[") and not os.path.isdir(spec)


def revisions(spec: str) -> list[ModelRef]:
    """The branches and tags that a pattern means and that have a step in their names, ordered by step.

    Raises:
        InputError: there are none, or the hub cannot be asked.
    """
    repository, _, pattern = spec.partition("@")
    _refuse_missing_folder(repository)
    found = [ModelRef(f"{repository}@{name}", step_of(name)) for name in hub.revisions(repository, pattern)]
    found = [ref for ref in found if ref.step is not None]
    if not found:
        raise InputError(f"{spec}: {repository} has no branch or tag of that pattern with a step in its name")
    return sorted(found, key=lambda ref: ref.step)


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

    A folder with a model or an adapter of its own is that one, even where a trainer left checkpoints below it.

    Args:
        texts: one reference or several; a folder that holds `checkpoint-<step>` folders stands for all of them, and
            `org/name@pattern` for all revisions of that pattern that are named after a step.
        steps: keep only these steps of runs; a step that no run has is refused. Models without a step stay.

    Raises:
        InputError: a missing folder, or an unknown step.
    """
    if isinstance(texts, str | os.PathLike):
        texts = [texts]
    found: list[ModelRef] = []
    for text in texts:
        text = os.fspath(text).rstrip("/") or "/"
        own = next((name for name in ("config.json", ADAPTER_CONFIG) if os.path.isfile(os.path.join(text, name))), None)
        if is_pattern(text):
            found += revisions(text)
        elif is_run(text) and not own:
            found += checkpoints(text)
        else:
            if is_run(text):
                cli.say(f"{text} is taken as one model: it has a file {own}; for its checkpoints name them one by one")
            found.append(model(text))
    return _only_steps(found, steps)


def run(texts: str | os.PathLike | Iterable[str], steps: Iterable[int] | None = None) -> list[ModelRef]:
    """The checkpoints of one run in step order: every model has a step, and no step comes twice.

    `texts` is a folder that holds `checkpoint-<step>` folders, a pattern of revisions (`org/name@step*`), or a list of
    models named after their steps (checkpoint folders, `org/name@revision`). A single model without a step in its name
    is a run of one, of step 0.
    """
    if isinstance(texts, str | os.PathLike):
        texts = [texts]
    found: list[ModelRef] = []
    for text in texts:
        spec = os.fspath(text)
        found += checkpoints(text) if is_run(text) else revisions(spec) if is_pattern(spec) else [model(text)]
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
            raise InputError(f"step {n} comes twice in the run: {', '.join(r.spec for r in found if r.step == n)}")
    return sorted(_only_steps(found, steps), key=lambda ref: ref.step)


def _only_steps(found: list[ModelRef], steps: Iterable[int] | None) -> list[ModelRef]:
    if steps is None:
        return found
    missing = sorted(set(steps) - {ref.step for ref in found})
    if missing:
        have = ", ".join(str(ref.step) for ref in found if ref.step is not None) or "none"
        raise InputError(f"no checkpoint of step {', '.join(map(str, missing))}; the run has {have}")
    return [ref for ref in found if ref.step is None or ref.step in set(steps)]


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _VOCABULARIES)


def tokenizer_hash(folder: Path) -> str | None:
    """A short hash of a folder's tokenizer files; None where it has none."""
    digest, found = hashlib.sha256(), False
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            found = True
            digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()[:16] if found else None


def vocabulary_hash(folder: Path) -> str | None:
    """A short hash of what turns plain text into ids; None where the folder has no tokenizer.

    Saving a tokenizer again with another release changes its files, padding and chat template, but not this: of
    `tokenizer.json` only vocabulary, merges, normalizer and pre-tokenizer count. Added tokens do not: CPT often adds
    some, and ids of the base stay valid. It starts with `json:` there and with `files:` where only other vocabulary
    files are; the two kinds cannot be compared.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        present = [name for name in _VOCABULARIES if (folder / name).is_file()]
        digest = hashlib.sha256(b"".join(name.encode() + (folder / name).read_bytes() for name in present))
        return f"files:{digest.hexdigest()[:16]}" if present else None
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        model = saved["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ()]
        vocabulary = sorted(model["vocab"].items()) if isinstance(model["vocab"], dict) else model["vocab"]
        added = {token["content"] for token in saved.get("added_tokens") or ()}
        vocabulary = [entry for entry in vocabulary if entry[0] not in added]
        facts = [vocabulary, merges, saved.get("normalizer"), saved.get("pre_tokenizer")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is no tokenizer file ({type(error).__name__}); copy it again") from None
    return f"json:{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]}"


def tokenizer_folder(ref: ModelRef, run: str | None = None, base: ModelRef | None = None) -> Path:
    """The folder whose tokenizer belongs to `ref`: its own, else the run folder's, else the base's, and says so.

    The base's is taken only when both configurations state the same vocabulary size.

    Raises:
        InputError: none of them has tokenizer files, or the base's does not fit.
    """
    folder, why = _tokenizer_of(ref, run, base)
    if why:
        cli.say(f"{ref.spec} has no tokenizer files; using those of {why}")
    return folder


def tokenizer_used(ref: ModelRef, run: str | None = None, base: ModelRef | None = None) -> str | None:
    """`tokenizer_hash` of the folder that `tokenizer_folder` gives: what a request says of the tokenizer."""
    return tokenizer_hash(_tokenizer_of(ref, run, base)[0])


def _tokenizer_of(ref: ModelRef, run: str | None, base: ModelRef | None) -> tuple[Path, str]:
    """The folder, and in words whose it is where it is not the model's own."""
    own = ref.side_files()
    if has_tokenizer(own):
        return own, ""
    # Its own run comes first: the study's run may be another one, with other tokens.
    parent = Path(ref.spec).resolve().parent if ref.is_local else (Path(run) if run and os.path.isdir(run) else None)
    base = ref.adapted or base
    if parent is not None and has_tokenizer(parent):
        return parent, f"{parent.name}/"
    if base is not None and has_tokenizer(base.side_files()):
        have, want = vocabulary_size(base.config()), vocabulary_size(ref.config())
        if have == want:
            return base.side_files(), f"the base {base.spec} (both have {want} tokens)"
        raise InputError(
            f"{ref.spec} has no tokenizer files, and the base's do not fit ({have} tokens, {want} needed); add them"
        )
    raise InputError(
        f"{ref.spec} has no tokenizer files (tokenizer.json or tokenizer.model); copy them into the folder"
    )


def vocabulary_size(config: dict) -> int | None:
    """The vocabulary size that a `config.json` states, also below `text_config`."""
    return config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))


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
        if ref.is_local and ref.step is not None and is_run(parent):
            known |= {other.spec: other for other in checkpoints(os.path.relpath(parent))}
    for spec in filter(None, [base]):
        if os.path.isdir(spec) or not _looks_local(spec):
            known.setdefault(spec, model(spec))
    if run and (not isinstance(run, str) or os.path.isdir(run) or not _looks_local(run)):
        known |= {ref.spec: ref for ref in models(run) if ref.spec not in known}
    return [ref.describe() for ref in known.values()]


def _looks_local(spec: str) -> bool:
    """Whether a reference that is no folder can only have been meant as one."""
    return not _REPOSITORY.fullmatch(spec.partition("@")[0]) or os.path.isdir(os.path.dirname(spec) or ".")


def belongs(measured: dict, models: list[dict]) -> bool:
    """Whether `measured` is one of `models`, or a checkpoint of the same run that is not among them."""
    if any(same_model(measured, model) for model in models):
        return True
    if measured.get("revision"):
        return measured["spec"].partition("@")[0] in {model["spec"].partition("@")[0] for model in models}
    place = Path(measured["spec"]).resolve()
    known = {Path(model["spec"]).resolve(): model.get("step") for model in models}
    # A path that is among the models holds other weights now: it was trained again.
    return (
        place not in known
        and measured.get("step") is not None
        and place.parent in {path.parent for path, step in known.items() if step is not None}
    )
