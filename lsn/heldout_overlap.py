"""Text to find neurons on and text to test them on are disjoint: which held-out documents stand among token ids."""

from __future__ import annotations

from pathlib import Path

from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np, torch
from cpt_utils.measures.tokenids import RUN, run_hashes
from cpt_utils.models import encoding

SHORTEST = 8  # tokens: a shorter document may be anywhere by chance
MOST_SEEN = 0.1  # of the held-out documents


def seen(documents: list[list[int]], ids: np.ndarray, chunk: int = 1 << 20) -> list[bool]:
    """Which documents (lists of token ids) are in `ids` [n]: half or more of their runs of tokens are.

    Runs are of tokenids.RUN tokens, in a shorter document of all it has. The first token is left out: the same words
    inside a text begin with a space, and with another token. What is then shorter than SHORTEST says nothing.
    """
    by_length: dict[int, list[int]] = {}
    for number, document in enumerate(documents):
        by_length.setdefault(min(RUN, len(document) - 1), []).append(number)
    found = [False] * len(documents)
    for length, numbers in by_length.items():
        if length < SHORTEST:
            continue
        runs = [run_hashes(np.asarray(documents[number][1:]), length) for number in numbers]
        wanted = np.unique(np.concatenate(runs))
        there = np.zeros(len(wanted), dtype=bool)
        for start in range(0, len(ids), chunk):
            there |= np.isin(wanted, run_hashes(np.asarray(ids[start : start + chunk + length - 1]), length))
        present = wanted[there]
        for number, own in zip(numbers, runs, strict=True):
            found[number] = bool(np.isin(own, present).mean() >= 0.5)
    return found


def disjoint(
    texts: dict[str, list[tuple[str, str]]], ids: list[tuple[Path, torch.Tensor]], tokenizer
) -> tuple[dict[str, list[tuple[str, str]]], dict[str, int]]:
    """The held-out documents, (context, text) by language, that no id file holds, and how many were left out.

    Raises:
        InputError: more than a tenth of a language's documents are in the text of the neurons.
    """
    kept, left_out = {}, {}
    for lang, documents in texts.items():
        encoded = encoding.of_texts(tokenizer, [text for _, text in documents], add_special_tokens=False).ids
        known = [False] * len(documents)
        for _, tokens in ids:
            known = [a or b for a, b in zip(known, seen(encoded, tokens.numpy()), strict=True)]
        left_out[lang] = sum(known)
        if left_out[lang] > MOST_SEEN * len(documents):
            raise InputError(
                f"{left_out[lang]} of {len(documents)} held-out documents of {lang} are in the text the neurons were "
                f"found on ({', '.join(str(path) for path, _ in ids)}); give other held-out text"
            )
        kept[lang] = [document for document, is_known in zip(documents, known, strict=True) if not is_known]
    return kept, left_out
