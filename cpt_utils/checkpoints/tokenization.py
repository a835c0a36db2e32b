"""The tokenizer of a model: finding its folder, and opening it as transformers does."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from logging import getLogger
from pathlib import Path

from cpt_utils.base import cli, lazy
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import transformers
from cpt_utils.checkpoints import formats, identity, refs, settings, step_names

# Files of SentencePiece, and the packages (with their modules) that transformers needs to read them.
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
READERS = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
# A folder with any of these is a tokenizer folder.
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _VOCABULARIES)


def configuration_of_tokenizer(folder: Path) -> Path | None:
    """The folder with the config.json of the model whose tokenizer is in `folder`; None if there is none here.

    It also affects the tokenizer's class: for Qwen 2 transformers chooses Qwen2Tokenizer, which splits text in its own
    way, whatever tokenizer_config.json says. An adapter uses its base's configuration, and a run that of its
    checkpoints, so that the same files are the same tokenizer in any folder.
    """
    steps = sorted(path for path in folder.iterdir() if path.is_dir() and step_names.step_of(path.name) is not None)
    for ref in (refs.ModelRef(os.fspath(path)) for path in (folder, *steps)):
        with contextlib.suppress(InputError):  # the base is not here
            if {"config.json", formats.ADAPTER_CONFIG} & ref.names:
                return ref.config_folder()
    return None


def tokenizer_folder(ref: refs.ModelRef, run: str | None = None, base: refs.ModelRef | None = None) -> Path:
    """The folder of the tokenizer for `ref`: its own, else (with a notice) the run folder's, else the base's.

    The base's is used only if both configurations state the same vocabulary size.

    Raises:
        InputError: none of them has tokenizer files, or the base's does not fit.
    """
    folder, why = folder_and_whose(ref, run, base)
    if why:
        whose = ref.spec if ref.step is None else f"the checkpoints in {os.path.dirname(ref.spec) or ref.repository}"
        cli.once(f"no tokenizer files in {whose}; using those of {why}")
    return folder


def folder_and_whose(
    ref: refs.ModelRef, run: str | os.PathLike | list | None, base: refs.ModelRef | None
) -> tuple[Path, str]:
    """The folder, and its owner in words if it is not the model's own. A `run` may be a list, which is not a folder."""
    side_files = ref.side_files()
    if has_tokenizer(side_files):
        return side_files, ""
    # The model's own run comes first: the study's run may be another one, with other tokens.
    if ref.is_local:
        parent = Path(ref.spec).resolve().parent
    elif ref.subfolder:
        parent = refs.ModelRef(f"{ref.repository}@{ref.revision}" if ref.revision else ref.repository).side_files()
    else:
        parent = Path(run) if isinstance(run, str | os.PathLike) and os.path.isdir(run) else None
    base = ref.adapted or base
    if parent is not None and has_tokenizer(parent):
        return parent, f"{parent.name}/" if ref.is_local else ref.repository
    if base is not None and has_tokenizer(base.side_files()):
        have, want = identity.vocabulary_size(base.config()), identity.vocabulary_size(ref.config())
        if have == want:
            return base.side_files(), f"the base {base.spec} (both have {want} tokens)"
        raise InputError(
            f"{ref.spec} has no tokenizer files, and the base's do not fit ({have} tokens, {want} needed); add its own"
        )
    raise InputError(
        f"{ref.spec} has no tokenizer files (tokenizer.json or tokenizer.model); copy them into the folder"
    )


def load_tokenizer(
    ref: refs.ModelRef, run: str | None = None, base: refs.ModelRef | None = None
) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of `ref` (see `tokenizer_folder`), padding on the right with its pad token (else eos, else unk).

    Raises:
        InputError: no tokenizer files, or no token to pad with.
    """
    folder = tokenizer_folder(ref, run, base)
    tokenizer = open_tokenizer(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise InputError(f"the tokenizer in {folder} has no pad, eos or unk token to pad with")
    tokenizer.padding_side = "right"
    return tokenizer


def open_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer in `folder`, as it is saved there.

    Raises:
        InputError: damaged files, a kind that transformers does not know, or only a SentencePiece model without the
            packages to read it.
    """
    getLogger("transformers.modeling_rope_utils").setLevel("ERROR")  # `load_model` reports it
    formats.refuse_pointer_tokenizer(folder, formats.TOKENIZER_FILES)
    piece = next((folder / name for name in SENTENCEPIECE if (folder / name).is_file()), None)
    if piece and not (folder / "tokenizer.json").is_file() and b"\0" in piece.read_bytes():  # tiktoken's is text
        missing = [package for package, module in READERS.items() if not _installed(module)]
        if missing:  # transformers would ask for tiktoken, which cannot read it
            raise InputError(
                f"{piece} is a SentencePiece model without tokenizer.json, which needs sentencepiece and protobuf "
                f"({' and '.join(missing)} not installed); pip install {' '.join(READERS)}, or put the tokenizer.json "
                "of the same model into the folder"
            )
    config_folder = configuration_of_tokenizer(folder)
    try:
        config = settings.read_configuration(config_folder) if config_folder not in (None, folder) else None
        with lazy.uncollected():  # saves half a second during imports
            return transformers.AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        wrong = _wrong_configuration(folder)  # it selects the tokenizer's class
        reason = " ".join(str(wrong or error).split())[:200] or type(error).__name__
        what = folder / "config.json" if wrong else f"the tokenizer in {folder}"
        raise InputError(f"{what} cannot be loaded: {reason}") from error


def _wrong_configuration(folder: Path) -> Exception | None:
    """The exception of transformers for the config.json in a folder; None if it is accepted or missing."""
    try:
        if (folder / "config.json").is_file():
            settings.read_configuration(folder)
    except Exception as error:  # half a dozen types
        return error
    return None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False
