"""Identity of tokenizers: determined by their output on text, not by their files.

Loading and saving a tokenizer changes its files (transformers 5 rewrites the normalizer and pre-tokenizer of
`tokenizer.json`), though every text gives the same ids. So two tokenizers are the same if they give the same ids on a
fixed probe of many scripts (`probe.json`) and have the same vocabulary. This is the only criterion used.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from importlib import resources
from pathlib import Path

from cpt_utils.checkpoints import formats, identity, refs, tokenization

KIND = "ids:"  # prefix of these hashes; older hashes without it cannot be compared with them


@lru_cache(maxsize=1)
def probe() -> list[str]:
    """Short texts in some 60 languages and 30 scripts, with digits, white space, emoji, code and combining marks."""
    return json.loads(resources.files("cpt_utils.checkpoints").joinpath("probe.json").read_text(encoding="utf-8"))


def of(folder: Path) -> str:
    """A short hash of the ids that the tokenizer in `folder` gives for the probe, with its default special tokens, and
    of its vocabulary. Padding and chat template do not count.

    Raises:
        InputError: the tokenizer cannot be loaded.
    """
    return _hashes(Path(folder), _files(Path(folder)))[0]


def of_plain_text(folder: Path) -> str:
    """Like `of`, but without special tokens, and without tokens that were added to the vocabulary.

    CPT often adds tokens, and the ids of texts without them stay valid.
    """
    return _hashes(Path(folder), _files(Path(folder)))[1]


def tokenizer_used(ref: refs.ModelRef, run: str | None = None, base: refs.ModelRef | None = None) -> str:
    """`of` the folder of `tokenization.tokenizer_folder`: the tokenizer's entry in a request."""
    return of(tokenization.folder_and_whose(ref, run, base)[0])


def diff_vocabularies(one: refs.ModelRef, other: refs.ModelRef, run: str | None = None) -> str | None:
    """How the tokens of two models' embedding rows differ, in words: "260 and 272 tokens", "other tokenizers"; None if
    they do not. If `other` has no tokenizer, that of its `run` is used, else that of `one`."""
    sizes = [identity.vocabulary_size(ref.config()) for ref in (one, other)]
    if sizes[0] != sizes[1]:
        return f"{sizes[0]:,} and {sizes[1]:,} tokens"
    alike = tokenizer_used(one, run, one) == tokenizer_used(other, run, one)
    return None if alike else "other tokenizers"


def comparable(a: str | None, b: str | None) -> bool:
    """Whether both are hashes of this module; results older than it have others."""
    return bool(a and b) and a.startswith(KIND) and b.startswith(KIND)


def _files(folder: Path) -> str:
    """A hash of the files of a tokenizer, so that equal ones are loaded only once per process."""
    digest = hashlib.sha256()
    config = (tokenization.configuration_of_tokenizer(folder) or folder) / "config.json"
    for file in (config, *(folder / name for name in formats.TOKENIZER_FILES)):
        if file.is_file():
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


_known: dict[str, tuple[str, str]] = {}


def _hashes(folder: Path, files: str) -> tuple[str, str]:
    if files not in _known:
        loaded = tokenization.open_tokenizer(folder)
        ids = [loaded(text, add_special_tokens=True)["input_ids"] for text in probe()]
        added = {token.content for token in loaded.added_tokens_decoder.values()}
        entries = sorted(loaded.get_vocab().items())
        plain = [(token, number) for token, number in entries if token not in added]
        _known[files] = _short([ids, entries]), _short([_plain_ids(loaded), plain])
    return _known[files]


def _plain_ids(loaded) -> list[list[int]]:
    """The ids of the probe without tokens that were added to the vocabulary."""
    if not loaded.is_fast:
        return [loaded(text, add_special_tokens=False)["input_ids"] for text in probe()]
    from tokenizers import Tokenizer

    saved = json.loads(loaded.backend_tokenizer.to_str())
    bare = Tokenizer.from_str(json.dumps(saved | {"added_tokens": [], "truncation": None, "padding": None}))
    return [encoding.ids for encoding in bare.encode_batch(probe(), add_special_tokens=False)]


def _short(value) -> str:
    return KIND + hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
