"""Token ids of plain text: the text of a special token becomes ordinary tokens, not that token.

A tokenizer reads `<s>` or `</s>` in a text, for example as HTML tags, as BOS and EOS. Ordinary text goes through the
tokenizer unchanged. Only texts whose ids contain a special token are tokenized again, by a copy of the tokenizer in
which special tokens have names that occur in no text. Added tokens that are not special are recognised by both.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cpt_utils.base.lazy import np, transformers

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """Tokenized texts: `ids[i]` is a list of token ids; `special[i]` is 1 at tokens that the tokenizer itself added;
    `n_split` texts held the text of a special token. `first[i]` (for sentences) is the index of the first identical
    text: i itself, unless texts repeat."""

    ids: list[list[int]]
    special: list[list[int]]
    n_split: int = 0
    first: list[int] = field(default_factory=list)


def of_texts(
    tokenizer: transformers.PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool = True
) -> Encoded:
    """The ids of `texts`, with the tokens that the tokenizer itself adds (BOS), unless `add_special_tokens` is off."""
    more = {"return_special_tokens_mask": add_special_tokens, "verbose": False}
    encoded = tokenizer(texts, add_special_tokens=add_special_tokens, **more)
    ids = encoded["input_ids"]
    special = encoded["special_tokens_mask"] if add_special_tokens else [[0] * len(row) for row in ids]
    splitter = splitter_of(tokenizer)
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    flat = np.fromiter(itertools.chain.from_iterable(ids), np.int64, int(lengths.sum()))
    suspects = splitter.suspects(texts, flat, lengths, splitter.added if add_special_tokens else 0)
    n = 0
    if suspects:
        again = splitter.split([texts[i] for i in suspects], add_special_tokens)
        for i, row, mask in zip(suspects, again.ids, again.special, strict=True):
            n += row != ids[i]
            ids[i], special[i] = row, mask
    return Encoded(ids, special, n)


class Splitter:
    """Finds texts that hold the text of a special token, and tokenizes them without that token.

    `special`: ids of special tokens, except the unknown token; `added`: how many the tokenizer itself adds to a text.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = frozenset(marked | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}
        self.unknown, self.unknown_text = tokenizer.unk_token_id, tokenizer.unk_token
        self.added = sum(i in self.special for i in tokenizer("")["input_ids"])
        self._copy: Tokenizer | None = None

    def suspects(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray, added: int = 0) -> list[int]:
        """Which of `texts` have more special tokens than the `added` ones; `ids` are their token ids, concatenated.

        The unknown token, which ordinary text may produce, counts only if its own text occurs in the text.
        """
        ends = np.cumsum(lengths)

        def count_per_text(wanted: np.ndarray) -> np.ndarray:
            positions = np.flatnonzero(wanted)
            return np.bincount(np.searchsorted(ends, positions, side="right"), minlength=len(lengths))

        suspect = count_per_text(np.isin(ids, list(self.special))) > added
        if self.unknown is not None:
            for i in np.flatnonzero(count_per_text(ids == self.unknown)):
                suspect[i] |= self.unknown_text in texts[i]
        return np.flatnonzero(suspect).tolist()

    def split(self, texts: list[str], add_special_tokens: bool = False) -> Encoded:
        """The ids of `texts`, with special tokens' text read as ordinary text."""
        if not self.tokenizer.is_fast:
            rows = [self._slowly(text, add_special_tokens) for text in texts]
            return Encoded([ids for ids, _ in rows], [mask for _, mask in rows])
        if self._copy is None:
            ids = self.special | {self.unknown} - {None}
            contents = {i: self.tokenizer.convert_ids_to_tokens(i) for i in ids}
            self._copy = renamed(self.tokenizer.backend_tokenizer, contents)
        encodings = self._copy.encode_batch(texts, add_special_tokens=add_special_tokens)
        return Encoded([e.ids for e in encodings], [e.special_tokens_mask for e in encodings])

    def _slowly(self, text: str, add_special_tokens: bool) -> tuple[list[int], list[int]]:
        """`split` for a slow tokenizer: ids and mask. Its own `split_special_tokens` splits every added token, so added
        tokens that are not special are cut out first."""
        tokenizer, special = self.tokenizer, self.special | {self.unknown}
        plain = [token.content for i, token in tokenizer.added_tokens_decoder.items() if i not in special]
        plain.sort(key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, plain))})", text) if plain else [text]
        ids: list[int] = []
        for part in filter(None, parts):
            if part in plain:
                ids.append(tokenizer.convert_tokens_to_ids(part))
            else:
                ids += tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if not add_special_tokens:
            return ids, [0] * len(ids)
        around = tokenizer.build_inputs_with_special_tokens([-1])
        front = around.index(-1)
        behind = len(around) - front - 1
        return tokenizer.build_inputs_with_special_tokens(ids), [1] * front + [0] * len(ids) + [1] * behind


@functools.lru_cache(maxsize=4)
def splitter_of(tokenizer: transformers.PreTrainedTokenizerBase) -> Splitter:
    return Splitter(tokenizer)


def renamed(backend: Tokenizer, special: dict[int, str]) -> Tokenizer:
    """A copy of `backend` in which the `special` tokens, {id: text}, keep their ids but have names that no text holds.

    The library's `encode_special_tokens` is not enough: unigram and word-level models, and merges that spell out a
    special token, still find it among their ordinary entries.
    """
    from tokenizers import Tokenizer

    names = {text: f"\ufdd0{i}\ufdd1" for i, text in special.items()}  # Unicode noncharacters
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): i for text, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("merges"):
        pairs = [(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint((*pair, "".join(pair)))]
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    copy = Tokenizer.from_str(json.dumps(state, ensure_ascii=False))
    copy.no_truncation()
    copy.no_padding()
    return copy
