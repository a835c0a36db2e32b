"""Finds held-out documents among token ids, so that neurons are found and tested on disjoint text."""

from __future__ import annotations

from pathlib import Path

from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np, torch
from cpt_utils.measures.tokenids import RUN, run_hashes
from cpt_utils.models import encoding

SHORTEST = 8  # tokens; a shorter document may occur anywhere by chance
MOST_SEEN = 0.1  # share of the held-out documents


def seen(documents: list[list[int]], ids: np.ndarray, chunk: int = 1 << 20) -> list[bool]:
    """Which documents (lists of token ids) are in `ids` [n]: those with half or more of their runs of tokens in it.

    A run has tokenids.RUN tokens, or all of a shorter document. A document's first token is left out, because within
    a text the same words begin with a space, and so with another token. If fewer than SHORTEST are left, it is unseen.
    """
    by_length: dict[int, list[int]] = {}
    for number, document in enumerate(documents):
        by_length.setdefault(min(RUN, len(document) - 1), []).append(number)
    is_seen = [False] * len(documents)
    for length, numbers in by_length.items():
        if length < SHORTEST:
            continue
        runs = [run_hashes(np.asarray(documents[number][1:]), length) for number in numbers]
        wanted = np.unique(np.concatenate(runs))
        in_ids = np.zeros(len(wanted), dtype=bool)
        for start in range(0, len(ids), chunk):
            in_ids |= np.isin(wanted, run_hashes(np.asarray(ids[start : start + chunk + length - 1]), length))
        present = wanted[in_ids]
        for number, hashes in zip(numbers, runs, strict=True):
            is_seen[number] = bool(np.isin(hashes, present).mean() >= 0.5)
    return is_seen


def disjoint(
    texts: dict[str, list[tuple[str, str]]], ids: list[tuple[Path, torch.Tensor]], tokenizer
) -> tuple[dict[str, list[tuple[str, str]]], dict[str, int]]:
    """The held-out documents, (context, text) by language, that no id file holds, and how many were left out.

    Raises:
        InputError: more than a tenth of a language's documents are in the text that the neurons were found on.
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
