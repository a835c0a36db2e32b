"""Batches of token sequences: sorted by length, padded on either side, as large as is useful and fits into memory.

for_each(model, "states", [len(s) for s in sequences], step)      # step([2, 0, 1]) gets the indices of a batch
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch, transformers
from cpt_utils.models import encoding
from cpt_utils.models.encoding import Encoded

# Tokens per batch, padding included. On a CPU, larger batches do not help, as a layer's activations no longer fit the
# caches; a GPU starts with TOKENS and derives its own budget, up to LARGEST, beyond which no GPU gains.
TOKENS = 2048
LARGEST = 65536
SHARE = 0.6  # share of a GPU's free memory that a batch may take
ALIKE, ENOUGH = 0.8, 512  # share of the longest length, tokens: see `batches`
_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> {(kind of step, --batch-size): limit}


def encode(tokenizer: transformers.PreTrainedTokenizerBase, texts: list[str], positions: int | None = None) -> Encoded:
    """Tokenize, with the special tokens that the tokenizer adds; texts longer than `positions` are cut with a warning.

    Raises:
        InputError: a text has no tokens.
    """
    encoded = encoding.of_texts(tokenizer, texts)
    ids, special = encoded.ids, encoded.special
    for text, row in zip(texts, ids, strict=True):
        if not row:
            raise InputError(f"the tokenizer turns {text!r} into no tokens; remove the line")
    long = [i for i, row in enumerate(ids) if positions and len(row) > positions]
    if long:
        cli.warn(f"{len(long)} of {len(ids)} texts are longer than the model's {positions} positions and are cut there")
        for i in long:
            ids[i], special[i] = ids[i][:positions], special[i][:positions]
    first: dict[str, int] = {}
    return replace(encoded, first=[first.setdefault(text, i) for i, text in enumerate(texts)])


def positions(model: transformers.PreTrainedModel) -> int | None:
    """The longest input in tokens according to the configuration; None if it states none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def batches(lengths: list[int], batch_size: int | None = None, tokens: int = TOKENS) -> list[list[int]]:
    """Batches of indices, with sequences of similar length together, the longest first.

    A batch holds at most `batch_size` sequences; without it, as many as fit into `tokens`, padding included (a longer
    sequence gets its own batch). Once a batch has ENOUGH tokens, it takes none shorter than ALIKE of its longest, since
    padding costs computation. Ties keep their order, so the plan is deterministic. The longest batch comes first, so
    insufficient memory shows at once.
    """
    plan: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rows = plan[-1] if plan else []
        longest = lengths[rows[0]] if rows else 0
        if batch_size is not None:
            full = len(rows) == batch_size
        else:
            too_short = lengths[i] < ALIKE * longest and len(rows) * longest >= ENOUGH
            full = (len(rows) + 1) * longest > tokens or too_short
        if full or not rows:
            plan.append([])
        plan[-1].append(i)
    return plan


def for_each(
    model: transformers.PreTrainedModel, kind: str, lengths: list[int], step: Callable[[list[int]], None],
    batch_size: int | None = None,
) -> None:  # fmt: skip
    """Call `step` with the indices of each batch, until every sequence was in a batch that succeeded.

    Without `batch_size`, batches follow a token budget: TOKENS on a CPU; on a GPU, the memory of a first batch is
    measured, and the budget is what fits into SHARE of the free memory. If memory still runs out, batches are halved.
    Budget and halving are remembered for the model and this kind of step. Results must not depend on the batching.

    Args:
        kind: what `step` does ("states", "logits"): steps of the same kind need similar memory.

    Raises:
        InputError: memory does not suffice for a single sequence.
    """
    known = _known.setdefault(model, {})
    key, left = (kind, batch_size), list(range(len(lengths)))
    while left:
        limit, memory = known.get(key), None
        if limit is None and batch_size is None:
            memory = _Memory(model)
        size, tokens = (None, limit or TOKENS) if batch_size is None else (limit or batch_size, TOKENS)
        done: set[int] = set()
        for batch in batches([lengths[i] for i in left], size, tokens):
            rows = [left[index] for index in batch]
            took = len(rows) * max(lengths[i] for i in rows)
            if not _fits(step, rows):
                if len(rows) == 1:
                    raise InputError(
                        f"a sequence of {took} tokens does not fit into the memory of {model.device}; use a larger "
                        "GPU, a smaller --dtype, --device-map auto (several GPUs), or --device cpu"
                    )
                if batch_size is not None:
                    cli.warn(
                        f"{len(rows)} sequences do not fit into memory: continuing with {len(rows) // 2} per batch"
                    )
                known[key] = took // 2 if batch_size is None else len(rows) // 2
                break
            done.update(rows)
            if memory is not None:
                known[key] = memory.budget(took)
                break
        left = [i for i in left if i not in done]


def _fits(step: Callable, rows: list[int]) -> bool:
    """Run the step; False if it ran out of memory.

    `accelerate.utils.find_executable_batch_size` misses some of these errors ("CUDA error: out of memory", cuBLAS's),
    frees memory while the traceback still holds the step's tensors, and collects garbage before every call.
    """
    try:
        step(rows)
        return True
    except RuntimeError as error:
        signs = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in signs):
            raise
    # Not in the except clause, where the traceback still holds the tensors of the step.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return False


class _Memory:
    """The GPUs' memory around a trial step: the step's peak use and the free memory."""

    def __init__(self, model: transformers.PreTrainedModel):
        self.gpus = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
        self.before = [self.taken(gpu, start=True) for gpu in self.gpus]

    def budget(self, tokens: int) -> int:
        """Tokens that a batch may hold, judged by a step of `tokens` tokens; TOKENS if the model is on no GPU."""
        limit = LARGEST if self.gpus else TOKENS
        for gpu, before in zip(self.gpus, self.before, strict=True):
            per_token = max(1, self.taken(gpu) - before) / tokens
            limit = min(limit, int(SHARE * self.free(gpu) / per_token))
        return max(1, limit)

    @staticmethod
    def taken(gpu: torch.device, start: bool = False) -> int:
        """Bytes of tensors at the peak; with `start`, bytes now, and the peak is reset."""
        if start:
            torch.cuda.reset_peak_memory_stats(gpu)
            return torch.cuda.memory_allocated(gpu)
        return torch.cuda.max_memory_allocated(gpu)

    @staticmethod
    def free(gpu: torch.device) -> int:
        cached = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)  # held by the allocator, unused
        return torch.cuda.mem_get_info(gpu)[0] + cached


def padded(sequences: list[list[int]], pad: int, side: str = "right"):
    """Token ids and attention mask, int64 [len(sequences), longest], padded with `pad` on `side`."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        columns = slice(0, len(sequence)) if side == "right" else slice(longest - len(sequence), longest)
        ids[row, columns] = torch.tensor(sequence)
        mask[row, columns] = 1
    return ids, mask
