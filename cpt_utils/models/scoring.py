"""Scores of text under a language model: negative log-likelihood (NLL), and log-likelihoods of answer choices."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch, transformers
from cpt_utils.models import encoding, loading
from cpt_utils.models.batching import encode, for_each, padded, positions
from cpt_utils.models.trace import trace

ROWS = 512  # rows of logits that are converted to losses at a time


@dataclass(frozen=True)
class TextScore:
    """The summed NLL of a text in nats, and its tokens and bytes, for averages; `each` is the NLL of each token, in
    order, a tensor on the CPU."""

    nll: float
    tokens: int
    bytes: int
    each: torch.Tensor | None = field(default=None, repr=False, compare=False)


def text_nlls(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    texts: list[str],
    batch_size: int | None = None,
    contexts: list[str] | None = None,
    between: str = " ",
) -> list[TextScore]:
    """The NLL of each text, with the special tokens that the tokenizer adds; the first token is not predicted.

    If `contexts` has a non-empty context for a text, the text is read after it and `between`; these tokens are not
    scored, except a space at the end, which belongs to the text's first token. An input longer than the model's
    positions is cut there, with a warning; the part cut off enters neither NLL nor counts.

    Raises:
        InputError: no texts, or one without a token to score.
    """
    if not texts:
        raise InputError("no text to score")
    whole = [f"{c}{between}{t}" if c else t for c, t in zip(contexts or [""] * len(texts), texts, strict=True)]
    sequences = encode(tokenizer, whole, positions(model)).ids
    # The first scored token of each text comes after the context's tokens, counted on the context alone, as in lm_eval.
    ends = [context and context + between.rstrip(" ") for context in contexts or [""] * len(texts)]
    starts = [max(1, scored_from(tokenizer, context)) if context else 1 for context in ends]
    for text, ids, start in zip(texts, sequences, starts, strict=True):
        if len(ids) <= start:
            raise InputError(f"no token to score in a text of fewer than two tokens, or cut off: {text[:60]!r}")
    scores: list[TextScore | None] = [None] * len(texts)
    before = _read_once(model, sequences, min(starts) - 1) if contexts else None

    def score(rows: list[int]) -> None:
        wanted = [[(p - 1, sequences[i][p]) for p in range(starts[i], len(sequences[i]))] for i in rows]
        losses = _losses(model, [sequences[i] for i in rows], tokenizer.pad_token_id, wanted, before)
        for i, text_losses in zip(rows, losses, strict=True):
            kept = texts[i]
            if len(sequences[i]) == positions(model):  # perhaps cut: count only the part that was read
                read = tokenizer.decode(sequences[i][starts[i] :], skip_special_tokens=True)
                kept = read if len(read) < len(kept) else kept
            total = float(text_losses.sum(dtype=torch.float64))
            scores[i] = TextScore(total, len(text_losses), len(kept.encode()), text_losses)

    n = before[0] if before else 0
    for_each(model, f"logits of texts after {n}", [len(s) - n for s in sequences], score, batch_size)
    return scores


def scored_from(tokenizer: transformers.PreTrainedTokenizerBase, text: str) -> int:
    """The number of tokens of `text`, with the special tokens added in front, without those added at the end."""
    (special,) = encoding.of_texts(tokenizer, [text]).special
    n_behind = next((n for n, flag in enumerate(reversed(special)) if not flag), len(special))
    return len(special) - n_behind


def beginnings(tokenizer: transformers.PreTrainedTokenizerBase, prompts: list[str]) -> list[list[int]]:
    """The token ids of prompts to be continued: without special tokens at the end, since an EOS would end the text."""
    encoded = zip(prompts, encoding.of_texts(tokenizer, prompts).ids, strict=True)
    return [ids[: scored_from(tokenizer, prompt)] for prompt, ids in encoded]


def greedily(
    model: transformers.PreTrainedModel, tokenizer, tokens: int, at_least: int | None = None
) -> transformers.GenerationConfig:
    """Make `model.generate` greedy, with at most `tokens` and at least `at_least` new tokens, and return the
    configuration. It replaces the model folder's penalties and temperatures, which `generate` would fill in."""
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, min_new_tokens=at_least,
    )  # fmt: skip
    return model.generation_config


def choice_logliks(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompts: list[str],
    choices: Sequence[Sequence[str]],
    batch_size: int | None = None,
) -> list[list[float]]:
    """Log-likelihood of each choice after its prompt, [prompts][choices], joined by a space as in lm_eval.

    Prompt and choice are tokenized together and split after the number of tokens of the prompt alone, as in lm_eval; an
    input that is too long loses its beginning. An input that is the beginning of another one is read with it: since the
    last token is only predicted, all one-token choices of a prompt, and prefixes of longer ones, share an input.

    Raises:
        InputError: no token is read before a choice: the prompt is empty, or the choice exceeds the model's positions.
    """
    limit = positions(model)
    contexts = encoding.of_texts(tokenizer, prompts).ids
    requests = [(i, choice) for i, of_prompt in enumerate(choices) for choice in of_prompt]
    wholes = encoding.of_texts(tokenizer, [f"{prompts[i]} {choice}" for i, choice in requests]).ids
    reads = [tuple(whole[:-1][-limit:] if limit else whole[:-1]) for whole in wholes]
    inputs: list[tuple[int, ...]] = []
    number: dict[tuple[int, ...], int] = {}
    for read in sorted({*reads}, reverse=True):  # inputs that begin with `read` come just before it
        if not inputs or inputs[-1][: len(read)] != read:
            inputs.append(read)
        number[read] = len(inputs) - 1
    asked: list[list[int]] = [[] for _ in inputs]
    for request, read in enumerate(reads):
        asked[number[read]].append(request)
    targets = [whole[len(contexts[i]) :] for (i, _), whole in zip(requests, wholes, strict=True)]
    for (_, choice), read, ids in zip(requests, reads, targets, strict=True):
        if len(read) < len(ids):
            raise InputError(f"no token is read before the choice {choice!r}, or it is too long")
    result = [0.0] * len(reads)

    def score(rows: list[int]) -> None:
        pairs: list[list[tuple[int, int]]] = []  # for each input, the targets of all its requests
        for i in rows:
            spans = [(len(reads[request]) - len(targets[request]), targets[request]) for request in asked[i]]
            pairs.append([(start + offset, id) for start, ids in spans for offset, id in enumerate(ids)])
        by_input = _losses(model, [list(inputs[i]) for i in rows], tokenizer.pad_token_id, pairs)
        for i, losses in zip(rows, by_input, strict=True):
            parts = losses.split([len(targets[request]) for request in asked[i]])
            for request, part in zip(asked[i], parts, strict=True):
                result[request] = -float(part.sum(dtype=torch.float64))

    for_each(model, "logits of choices", [len(s) for s in inputs], score, batch_size)
    remaining = iter(result)
    return [list(itertools.islice(remaining, len(of_prompt))) for of_prompt in choices]


def _read_once(model: transformers.PreTrainedModel, sequences: list[list[int]], most: int):
    """(n, the model's keys and values for n tokens): the first n <= `most` tokens, which all sequences share, such as
    the shots of a prompt; None if these are less than half of all tokens, or the cache holds more than keys and values.

    The states of hybrids cannot be repeated for several sequences, and sparse attention (`DynamicIndexedLayer`) selects
    other keys when it reads in two parts. If rotary frequencies depend on the length of the input (longrope, dynamic),
    the shared tokens have other keys when read alone.
    """
    rope = str(getattr(model.config.get_text_config(), "rope_parameters", None))
    if "longrope" in rope or "dynamic" in rope:
        return None
    first, last = min(sequences), max(sequences)  # the prefix that these two share is shared by all
    alike = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    n, device = min(alike, most), loading.input_device(model)
    if len(sequences) < 2 or 2 * n * len(sequences) < sum(map(len, sequences)):
        return None
    with torch.inference_mode(), trace((model.get_output_embeddings(), "input", lambda hidden: hidden[:, -1:])):
        output = model(input_ids=torch.tensor([first[:n]], device=device), use_cache=True)
    cache = getattr(output, "past_key_values", None)
    plain = transformers.cache_utils.DynamicLayer, transformers.cache_utils.DynamicSlidingWindowLayer
    fits = type(cache) is transformers.DynamicCache and cache.layers and all(type(x) in plain for x in cache.layers)
    return (n, cache) if fits and all(layer.is_initialized for layer in cache.layers) else None


def _losses(
    model: transformers.PreTrainedModel, sequences: list[list[int]], pad: int, wanted: list[list[tuple[int, int]]],
    before: tuple | None = None,
):  # fmt: skip
    """NLL in nats of the requested tokens, a tensor on the CPU for each sequence, computed in float32 or better.

    The lm_head runs at the requested positions only, not at padding or in a prompt.

    Args:
        wanted: for each sequence, (position, token that should follow it).
        before: the shared beginning of all sequences and its cache, see `_read_once`.
    """
    n, cache = before or (0, None)
    flat = [(row, position - n, token) for row, pairs in enumerate(wanted) for position, token in pairs]
    rows, columns, targets = torch.tensor(flat, dtype=torch.long).view(-1, 3).T.to(loading.input_device(model))
    ids, mask = (t.to(rows.device) for t in padded([sequence[n:] for sequence in sequences], pad))
    more: dict = {"use_cache": False}
    if cache is not None:
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(sequences))
        more = {"past_key_values": cache, "use_cache": True}
        mask = torch.cat([mask.new_ones(len(sequences), n), mask], 1)

    def asked_for(hidden: torch.Tensor) -> torch.Tensor:
        # The model's own code continues from here, so its scale or soft cap of logits still applies.
        return hidden[rows.to(hidden.device), columns.to(hidden.device)][None]

    with torch.inference_mode(), trace((model.get_output_embeddings(), "input", asked_for)):
        logits = model(input_ids=ids, attention_mask=mask, **more).logits[0]
        targets = targets.to(logits.device)
        losses = [
            # In parts: for a large vocabulary, a float32 copy of all logits of a batch takes gigabytes.
            torch.nn.functional.cross_entropy(
                part if part.dtype == torch.float64 else part.float(), target, reduction="none"
            )
            for part, target in zip(logits.split(ROWS), targets.split(ROWS), strict=True)
        ]
    return torch.cat(losses).cpu().split([len(pairs) for pairs in wanted])
