"""Token-id files: the text of one language as a 1-D integer tensor, with a JSON beside it that describes the ids.

`oscar.<language>.train.<model id>` is a bare tensor (int32, or int64 for other readers) as `torch.save` writes it, and
`<the same name>.json` its description: payload `n_tokens`, `n_documents`, `complete`, ..; header `language`
(canonical), `tokenizer`, `vocabulary_sha256` (`tokenizer_id.of_plain_text`), `text` (what was read), `limit`. A tensor
without the JSON, as written by the published scripts, is read with one warning.
"""

from __future__ import annotations

import os
from pathlib import Path

from cpt_utils.base import cli, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np, torch
from cpt_utils.checkpoints import tokenizer_id

SCHEMA = "token-ids"
RUN = 16  # tokens: texts that share half of their runs of this length are the same text
SHORT_RUN = 10  # tokens: short enough to find a repeated sentence of a dozen words in a different context
_CHUNK = 1 << 22  # ids checked at a time
_SAMPLE = 1 << 21  # number of runs examined, however long the text


def file_name(lang: str, model_id: str) -> str:
    """The name of the file of language `lang`; a `/` in the model's name becomes `_`."""
    return f"oscar.{lang}.train.{model_id.replace('/', '_')}"


def sidecar(path: str | os.PathLike) -> Path:
    """The JSON that describes the id file at `path`."""
    path = Path(path)
    return path.with_name(path.name + ".json")


def write(path: str | os.PathLike, ids: torch.Tensor, payload: dict, header: dict) -> None:
    """Write a 1-D tensor of ids and its description; `ids` may be a memory-mapped file and is not copied.

    Whenever the process dies, an existing id file has the right description beside it: the old ids are removed before
    the new description is written, and the new ids are written last.

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    with results.replacing(path) as temporary:
        # A file object: given a path, torch.save would name the archive inside after it, and this one is temporary.
        with open(temporary, "wb") as file:
            torch.save(ids, file)
        path.unlink(missing_ok=True)
        results.write_json(sidecar(path), {"n_tokens": len(ids), **payload}, header)


def describe(path: str | os.PathLike, allow_limited: bool = False) -> dict:
    """The facts beside the id file, payload and header in one dict; `{}` if there is no JSON.

    Raises:
        InputError: no token-id description, or one made with --limit.
    """
    if not sidecar(path).is_file():
        return {}
    payload, header = results.read_json(sidecar(path), SCHEMA, allow_limited)
    return {**payload, **header}


def read(
    path: str | os.PathLike,
    vocab_size: int | None = None,
    vocabulary_sha256: str | None = None,
    allow_limited: bool = False,
) -> tuple[torch.Tensor, dict]:
    """The ids of a file as a memory-mapped 1-D tensor in the file's dtype, and the facts of `describe`.

    Args:
        vocab_size: of the model; every id must be below it.
        vocabulary_sha256: `tokenizer_id.of_plain_text` of the model's tokenizer, which must be the file's.
        allow_limited: accept a file made with --limit.

    Raises:
        InputError: no such file, not a 1-D integer tensor, no ids, an id outside the vocabulary, another tokenizer, or
            a description that belongs to another file.
    """
    path = Path(path)
    ids = _load(path)
    if ids.ndim != 1 or ids.dtype.is_floating_point or ids.dtype.is_complex or str(ids.dtype) == "torch.bool":
        raise InputError(
            f"{path} holds a {str(ids.dtype).removeprefix('torch.')} tensor of shape {list(ids.shape)}, "
            "but a 1-D tensor of token ids is needed; make it with lsn/load_oscar.py"
        )
    if not len(ids):
        raise InputError(f"{path} holds no token ids; make it again with lsn/load_oscar.py --overwrite")
    facts = describe(path, allow_limited)
    if not facts:
        cli.warn(f"{path} has no {sidecar(path).name} beside it: its language and tokenizer are taken on trust")
    if facts.get("n_tokens", len(ids)) != len(ids):
        raise InputError(
            f"{path} holds {len(ids):,} ids, but {sidecar(path).name} states {facts['n_tokens']:,}; "
            "they are not from one run: make both again with lsn/load_oscar.py --overwrite"
        )
    _check_tokenizer(path, facts, vocabulary_sha256)
    _check_range(path, ids, vocab_size)
    return ids, facts


def run_hashes(ids: np.ndarray, length: int = RUN) -> np.ndarray:
    """A 64-bit hash of every run of `length` tokens in `ids` [n]: uint64 [n - length + 1]."""
    hashes = np.zeros(max(0, len(ids) - length + 1), dtype=np.uint64)
    factor = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        for offset in range(length):
            hashes *= factor
            hashes += ids[offset : offset + len(hashes)].astype(np.uint64) + np.uint64(1)
    return hashes


def repeated(ids: torch.Tensor) -> float:
    """The share of runs of SHORT_RUN tokens in `ids` [n] that occurred before: 0 for text without repetition.

    For a long text, a sample is examined: the runs whose hash is in one of several classes, so all copies of a run are
    in the sample, or none.
    """
    classes = np.uint64(max(1, len(ids) // _SAMPLE))
    kept = []
    for start in range(0, len(ids), _CHUNK):
        hashes = run_hashes(ids[start : start + _CHUNK + SHORT_RUN - 1].numpy(), SHORT_RUN)
        # The upper bits: the lower bits of such a hash are hardly mixed.
        kept.append(hashes[(hashes >> np.uint64(32)) % classes == 0])
    sampled = np.concatenate(kept) if kept else np.zeros(0)
    return 1 - len(np.unique(sampled)) / len(sampled) if len(sampled) else 0.0


def _check_tokenizer(path: Path, facts: dict, expected: str | None) -> None:
    made_with = facts.get("vocabulary_sha256")
    if not expected or not made_with or made_with == expected:
        return
    if not tokenizer_id.comparable(made_with, expected):
        cli.warn(f"{path} does not say what its tokenizer does to text: taken on trust to be the model's own")
        return
    raise InputError(
        f"{path} was made with a tokenizer that is not the model's ({facts.get('tokenizer')}: {made_with}, the "
        f"model's: {expected}); run lsn/load_oscar.py with --tokenizer of this model"
    )


def _load(path: Path) -> torch.Tensor:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {what}; a file of token ids is needed (lsn/load_oscar.py makes it)")
    try:
        try:
            ids = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # torch's format from before 1.6 cannot be mapped
            ids = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a damaged file
        raise InputError(
            f"{path} cannot be read as a tensor ({type(error).__name__}); make it again with lsn/load_oscar.py"
        ) from None
    if not isinstance(ids, torch.Tensor):
        raise InputError(f"{path} holds a {type(ids).__name__}, but one bare tensor of token ids is needed")
    return ids


def _check_range(path: Path, ids: torch.Tensor, vocab_size: int | None) -> None:
    for start in range(0, len(ids), _CHUNK):
        low, high = (int(value) for value in torch.aminmax(ids[start : start + _CHUNK].to(torch.int64)))
        if low < 0:
            raise InputError(f"{path} holds the negative id {low}; it is not a file of token ids")
        if vocab_size is not None and high >= vocab_size:
            raise InputError(
                f"{path} holds the id {high}, but the model's vocabulary has {vocab_size:,} tokens; "
                "run lsn/load_oscar.py with --tokenizer of this model"
            )
