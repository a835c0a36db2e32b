"""Token ids of text that is text: the text of a special token in it is ordinary tokens, not that token.

A tokenizer takes `<s>` or `</s>` in a text, such as the tags of HTML, for BOS and EOS. Ordinary text goes through the
tokenizer as always. Only texts in whose ids a special token turned up are tokenized again, by a copy that knows special
tokens under names that no text holds. Tokens that were added and are not special are found in either.
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
    """Tokenized texts: `ids[i]` is a list of token ids, `special[i]` marks what the tokenizer itself added with 1;
    `n_split` texts held the text of a special token. `first[i]`, of sentences, is where the same text stands first: i
    itself, unless texts repeat."""

    ids: list[list[int]]
    special: list[list[int]]
    n_split: int = 0
    first: list[int] = field(default_factory=list)


def of_texts(
    tokenizer: transformers.PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool = True
) -> Encoded:
    """The ids of `texts`, with what the tokenizer itself adds around one (BOS), unless `add_special_tokens` is off."""
    more = {"return_special_tokens_mask": add_special_tokens, "verbose": False}
    made = tokenizer(texts, add_special_tokens=add_special_tokens, **more)
    ids = made["input_ids"]
    special = made["special_tokens_mask"] if add_special_tokens else [[0] * len(row) for row in ids]
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
    """Which ids are special tokens', and how texts that hold such a token's text are tokenized without it.

    `special`: their ids, but for the unknown token's; `added`: how many of them the tokenizer itself puts around one.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = frozenset(marked | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}
        self.unknown, self.unknown_text = tokenizer.unk_token_id, tokenizer.unk_token
        self.added = sum(i in self.special for i in tokenizer("")["input_ids"])
        self._copy: Tokenizer | None = None

    def suspects(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray, added: int = 0) -> list[int]:
        """Which of `texts`, whose token ids stand in a row in `ids`, have more special tokens than the `added` ones.

        The unknown token counts where its own text stands there: ordinary text may have it.
        """
        ends = np.cumsum(lengths)

        def number(wanted: np.ndarray) -> np.ndarray:
            positions = np.flatnonzero(wanted)
            return np.bincount(np.searchsorted(ends, positions, side="right"), minlength=len(lengths))

        found = number(np.isin(ids, list(self.special))) > added
        if self.unknown is not None:
            for i in np.flatnonzero(number(ids == self.unknown)):
                found[i] |= self.unknown_text in texts[i]
        return np.flatnonzero(found).tolist()

    def split(self, texts: list[str], add_special_tokens: bool = False) -> Encoded:
        """The ids of `texts` in which no special token is looked for."""
        if not self.tokenizer.is_fast:
            rows = [self._slowly(text, add_special_tokens) for text in texts]
            return Encoded([ids for ids, _ in rows], [mask for _, mask in rows])
        if self._copy is None:
            ids = self.special | {self.unknown} - {None}
            contents = {i: self.tokenizer.convert_ids_to_tokens(i) for i in ids}
            self._copy = renamed(self.tokenizer.backend_tokenizer, contents)
        made = self._copy.encode_batch(texts, add_special_tokens=add_special_tokens)
        return Encoded([one.ids for one in made], [one.special_tokens_mask for one in made])

    def _slowly(self, text: str, add_special_tokens: bool) -> tuple[list[int], list[int]]:
        """Ids and mask of `split` for a tokenizer in Python, whose own `split_special_tokens` splits every added token:
        those that are not special are cut out first."""
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
    """A copy of `backend` in which the `special` tokens, {id: text}, have names that no text holds, and their old ids.

    `encode_special_tokens` of the library would not do: a unigram or word-level model, and merges that spell a special
    token out, still find it among their ordinary entries.
    """
    from tokenizers import Tokenizer

    names = {text: f"\ufdd0{i}\ufdd1" for i, text in special.items()}  # code points that are no characters
    whole = json.loads(backend.to_str())
    for token in whole["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = whole["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): i for text, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("merges"):
        pairs = [(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint((*pair, "".join(pair)))]
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    copy = Tokenizer.from_str(json.dumps(whole, ensure_ascii=False))
    copy.no_truncation()
    copy.no_padding()
    return copy
