"""From texts to blocks of token ids: sources, a tokenizer trained on them, and a mixture by shares of tokens.

Used by cpt/train.py. Documents are tokenized once into int32 arrays, put in a seeded order in which every stretch of
the training has the requested token shares, joined with an end-of-text token after each, and cut into blocks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cpt_utils.base import cli, keys, textfiles
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np
from cpt_utils.checkpoints import refs, tokenization
from cpt_utils.models import encoding

runs = cli.sibling("cpt/runs.py")

ID = "<i4"  # token ids on disk: little-endian int32
BATCH = 1000  # documents tokenized at a time
WHOLE_FILE = 64 << 20  # files up to this many bytes are fingerprinted in full


@dataclass
class Source:
    """One kind of text in the mixture. Exactly one of `files` and `hub` is set; `weight` is a share of tokens."""

    name: str
    weight: float
    files: list[Path] = field(default_factory=list)
    hub: dict | None = None
    column: str = "text"
    limit: int | None = None

    @classmethod
    def parse(cls, values: dict, where: str) -> Source:
        """A source from its mapping in the training file; InputError on unknown, missing or contradictory keys."""
        checked = keys.check(cli.sibling("cpt/keys.py").Source, values, where)
        hub, files = values.get("hub"), values.get("files", [])
        hub = {"id": hub} if isinstance(hub, str) else hub
        paths = [Path(file) for file in ([files] if isinstance(files, str) else files)]
        return cls(checked.name, checked.weight, paths, hub, checked.column, checked.limit)

    def check(self) -> None:
        """Refuse files that do not exist or hold no text, before anything is loaded."""
        for file in self.files:
            try:
                textfiles.check(file)
            except InputError as error:
                raise InputError(f"source {self.name}: {error}") from None

    def describe(self) -> dict:
        """What identifies the texts of this source, without their location."""
        facts = {"name": self.name, "weight": self.weight, "column": self.column, "limit": self.limit}
        return facts | ({"hub": self.hub} if self.hub else {"files": [fingerprint(file) for file in self.files]})

    def documents(self, nulls: Counter | None = None) -> Iterator[str]:
        """The non-empty documents in stored order; `nulls[name]` counts texts and pieces that are null."""
        number = 0
        for pieces in self.rows():
            if nulls is not None:
                nulls[self.name] += pieces.count(None)
            if not (text := textfiles.joined(pieces).strip()):
                continue
            if number == self.limit:
                return
            number += 1
            yield text

    def rows(self) -> Iterator[list[str | None]]:
        """The text of every row as pieces (`textfiles.pieces`), in stored order; rows may be empty."""
        if self.hub:
            return self.from_hub()
        return (pieces for file in self.files for pieces in textfiles.documents(file, self.column))

    def from_hub(self) -> Iterator[list[str | None]]:
        """`rows` for hub data.

        Raises:
            InputError: no such data set or column, no access, or no connection.
        """
        from datasets import load_dataset

        hub = {"split": "train", "streaming": True} | self.hub
        name, config = hub.pop("id"), hub.pop("config", None)
        try:
            for row in load_dataset(name, config, **hub):
                yield textfiles.pieces(row, self.column, name)
        except InputError:
            raise
        except Exception as error:  # the hub client raises many types: offline, gated, no such config, ...
            raise InputError(
                f"source {self.name}: hub data {name} cannot be read ({runs.first_line(error)}); "
                "check the name, your connection and, for gated data, `hf auth login`"
            ) from None


def fingerprint(file: Path) -> dict:
    """Name, size and a short hash of a file: of all bytes up to 64 MiB, for larger files of the first and last MiB."""
    size = file.stat().st_size
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        if size <= WHOLE_FILE:
            digest.update(stream.read())
        else:
            digest.update(stream.read(1 << 20))
            stream.seek(-(1 << 20), os.SEEK_END)
            digest.update(stream.read())
    return {"name": file.name, "size": size, "sha256": digest.hexdigest()[:16]}


def train_tokenizer(texts: Iterator[str], vocab_size: int, special: dict[str, str], whole: list[str]):
    """A byte-level BPE of at most `vocab_size` tokens, as a transformers tokenizer that adds no token automatically.

    Args:
        special: roles (eos, pad, bos, unk) and their tokens; eos is required, bos is eos unless given.
        whole: strings that become one token wherever they occur, written as in the text (" travel" with its space).

    Raises:
        InputError: `vocab_size` has no room for the 256 bytes, the special and the whole tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    names = list(dict.fromkeys(special.values()))
    least = 256 + len(names) + len(whole)
    if vocab_size < least:
        raise InputError(
            f"tokenizer: vocab_size {vocab_size} is too small; 256 bytes, {len(names)} special and {len(whole)} whole "
            f"tokens need at least {least}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(whole),
        special_tokens=names,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(word, normalized=False, special=False) for word in whole])
    roles = {"bos": special["eos"]} | special
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": token for role, token in roles.items()},
    )


def prepare_tokenizer(wanted: dict, start: str | None, sources: list[Source], state: Path, where: Path):
    """The tokenizer of a run and the folder with its files.

    Args:
        wanted: the key tokenizer of the training file: `from`, or `vocab_size`, `special`, `whole`.
        start: the model that is trained further, if any; its tokenizer is the default.
        state: a newly trained tokenizer is kept here, so a resumed run does not train it again.
    """
    source = wanted.get("from") or start
    if source:
        folder = tokenization.tokenizer_folder(refs.model(source))
    else:
        folder = state / "tokenizer"
        if not folder.is_dir():
            special = {"eos": "<|endoftext|>", "pad": "<|pad|>"} | (wanted.get("special") or {})
            cli.say(f"training a byte-level BPE of {wanted['vocab_size']} tokens on {len(sources)} sources")
            texts = (text for source in sources for text in source.documents())
            tokenizer = train_tokenizer(texts, wanted["vocab_size"], special, wanted.get("whole") or [])
            if len(tokenizer) < wanted["vocab_size"]:
                cli.warn(f"tokenizer: the texts yield {len(tokenizer)} of the {wanted['vocab_size']} tokens asked for")
            shutil.rmtree(state / "tokenizer.tmp", ignore_errors=True)
            tokenizer.save_pretrained(state / "tokenizer.tmp")
            os.replace(state / "tokenizer.tmp", folder)
    tokenizer = tokenization.open_tokenizer(folder)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{where}: the tokenizer in {folder} has no eos token; documents could not be told apart")
    return tokenizer, folder


def tokenize(source: Source, tokenizer, wanted: int, path: Path) -> tuple[np.ndarray, np.ndarray, dict]:
    """Token ids of a source's documents, each followed by eos, written to `path` and memory-mapped.

    Files are read to the end, so shuffling draws from all documents; hub data only until there are `wanted` tokens.

    Returns:
        ids [tokens] int32; bounds [documents + 1] int64: document d is `ids[bounds[d]:bounds[d + 1]]`; and counts:
        null_texts left out, and special_documents, which contain the text of a special token.

    Raises:
        InputError: the source holds no text.
    """
    eos = tokenizer.eos_token_id
    lengths: list[int] = []
    total = 0
    nulls: Counter = Counter()
    special = 0
    with open(path, "wb") as out:
        documents = source.documents(nulls)
        while batch := list(itertools.islice(documents, BATCH)):
            encoded = encoding.of_texts(tokenizer, batch, add_special_tokens=False)
            special += encoded.n_split
            pieces = [[*ids, eos] for ids in encoded.ids]
            np.concatenate([np.asarray(ids, dtype=ID) for ids in pieces]).tofile(out)
            lengths += map(len, pieces)
            total += sum(map(len, pieces))
            if source.hub and total >= wanted:
                break
    if not total:
        raise InputError(f"source {source.name} holds no text; give it documents or leave it out of the training file")
    bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    counts = {"null_texts": nulls[source.name], "special_documents": special}
    return np.memmap(path, dtype=ID, mode="r"), bounds, counts


def plan(lengths: list[np.ndarray], weights: list[float], total: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The order in which documents are used: `source` [n] and `document` [n], enough for `total` tokens.

    Each source passes over its documents, in a new random order each time, as often as its share of `total` requires.
    A document is placed at the point of the training where its source has used the corresponding part of its share,
    shifted at random within the document's length. So every stretch of the training has the requested token shares.

    Args:
        lengths: for each source, the tokens of each document [documents].
        weights: for each source, its share of tokens (any positive scale).
    """
    sources, documents, positions = [], [], []
    for number, (length, weight) in enumerate(zip(lengths, weights, strict=True)):
        share = math.ceil(total * weight / sum(weights))
        orders: list[np.ndarray] = []
        have = 0
        while have < share:
            rng = np.random.default_rng([seed, number, len(orders)])
            orders.append(rng.permutation(len(length)))
            have += int(length.sum())
        order = np.concatenate(orders)
        ends = np.cumsum(length[order])
        order = order[: int(np.searchsorted(ends, share)) + 1]
        size = length[order]
        start = ends[: len(order)] - size
        jitter = np.random.default_rng([seed, number]).random(len(order))
        sources.append(np.full(len(order), number))
        documents.append(order)
        positions.append((start + jitter * size) / share)
    by_position = np.argsort(np.concatenate(positions), kind="stable")
    return np.concatenate(sources)[by_position], np.concatenate(documents)[by_position]


def pack(
    sources: list[Source], tokenizer, block_size: int, n_blocks: int, seed: int, folder: Path
) -> tuple[np.ndarray, dict]:
    """Blocks [n_blocks, block_size] int32 of the whole training, stored in `folder` and memory-mapped.

    A second call finds the finished file and reads nothing else.

    Returns:
        The blocks, and for each source: share, documents, passes over them, tokens available and used (with eos), and
        the counts of `tokenize`.
    """
    data, facts_file = folder / "blocks.i32", folder / "blocks.json"
    if not facts_file.is_file():
        total = block_size * n_blocks
        weight = sum(source.weight for source in sources)
        ids, bounds, counts = [], [], []
        for number, source in enumerate(cli.progress(sources, "tokenizing", unit="source")):
            wanted = math.ceil(total * source.weight / weight)
            tokenized = tokenize(source, tokenizer, wanted, folder / f"tokens-{number}.i32")
            for parts, part in zip((ids, bounds, counts), tokenized, strict=True):
                parts.append(part)
        lengths = [np.diff(b) for b in bounds]
        which, document = plan(lengths, [source.weight for source in sources], total, seed)
        used = np.zeros(len(sources), dtype=np.int64)
        left = total
        with open(data, "wb") as out:
            for s, d in zip(which.tolist(), document.tolist(), strict=True):
                piece = ids[s][bounds[s][d] : bounds[s][d + 1]][:left]
                piece.tofile(out)
                used[s] += len(piece)
                left -= len(piece)
                if not left:
                    break
        facts = {
            source.name: {
                "share": source.weight / weight,
                "documents": len(lengths[s]),
                "tokens_available": int(bounds[s][-1]),
                "tokens_used": int(used[s]),
                "passes": round(int(used[s]) / int(bounds[s][-1]), 3),
                **counts[s],
            }
            for s, source in enumerate(sources)
        }
        del ids
        for number in range(len(sources)):
            (folder / f"tokens-{number}.i32").unlink()
        partial = facts_file.with_suffix(".tmp")
        partial.write_text(json.dumps(facts))
        os.replace(partial, facts_file)
    blocks = np.memmap(data, dtype=ID, mode="r", shape=(n_blocks, block_size))
    return blocks, json.loads(facts_file.read_text())
