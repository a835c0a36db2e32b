"""Batches of token sequences: by length, padded on either side, results in the order of the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpt_utils import cli
from cpt_utils.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """Tokenized texts: `ids[i]` is a list of token ids, `special[i]` marks the special tokens among them with 1."""

    ids: list[list[int]]
    special: list[list[int]]


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], positions: int | None = None) -> Encoded:
    """Tokenize with special tokens as the tokenizer adds them; texts longer than `positions` are cut, with a warning.

    Raises:
        InputError: a text without a single token.
    """
    made = tokenizer(texts, add_special_tokens=True, return_special_tokens_mask=True)
    ids, special = made["input_ids"], made["special_tokens_mask"]
    for text, row in zip(texts, ids, strict=True):
        if not row:
            raise InputError(f"the tokenizer makes no token of {text!r}; remove the line")
    long = [i for i, row in enumerate(ids) if positions and len(row) > positions]
    if long:
        cli.warn(f"{len(long)} of {len(ids)} texts are longer than the model's {positions} positions and are cut there")
        for i in long:
            ids[i], special[i] = ids[i][:positions], special[i][:positions]
    return Encoded(ids, special)


def positions(model: PreTrainedModel) -> int | None:
    """The longest input that the configuration states, in tokens; None where it states none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def batches(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of at most `batch_size`, sequences of like length together, the longest first.

    Ties keep their order, so that one input gives one plan. The longest batch comes first: where memory does not
    suffice, that shows at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def padded(sequences: list[list[int]], pad: int, side: str = "right"):
    """Token ids and attention mask, int64 [len(sequences), longest], padded with `pad` on `side`."""
    import torch

    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        place = slice(0, len(sequence)) if side == "right" else slice(longest - len(sequence), longest)
        ids[row, place] = torch.tensor(sequence)
        mask[row, place] = 1
    return ids, mask
