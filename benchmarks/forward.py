"""Benchmarks of the forward-pass scripts: retrieval, counts, activations, and the loss with silenced neurons.

The floor is the bare decoder on the same batches, without lm_head and hooks. Ours is the code that the scripts run,
from token ids (for the loss: texts) to sums.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator

from cpt_utils.architectures import archs
from cpt_utils.base import cli
from cpt_utils.base.lazy import torch, transformers
from cpt_utils.interventions import activations
from cpt_utils.models import batching, ffn, scoring

measure = cli.sibling("benchmarks/measure.py")
obvious = cli.sibling("benchmarks/obvious.py")
counting = cli.sibling("lsn/activation.py")
followed = cli.sibling("lsn/lsn_activation_cpt.py")
retrieval = cli.sibling("sentence-retrieval/sr_experiment.py")

AT_ONCE = 32  # sentences per batch
SHARE = 0.01  # of the neurons are in the mask, about as many as a language has


class Bench:
    """A random model on `device`, with the same random sentences and blocks of text for every way.

    Sentences have 8 to 64 tokens, like those of FLORES+ and SIB-200; blocks have `size` tokens.
    """

    def __init__(self, shape, dtype: str, device: str, n_sentences: int, n_blocks: int, size: int):
        self.model = shape.model(dtype, device=device)
        self.arch = archs.for_config(self.model.config.to_dict())
        rng = random.Random(0)
        self.texts = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(7, 63))) for _ in range(n_sentences)]
        self.tokenizer = _tokenizer()
        self.sentences = batching.encode(self.tokenizer, self.texts)
        blocks = torch.randint(3, shape.vocab, (n_blocks, size), generator=torch.Generator().manual_seed(0))
        self.blocks = blocks.split(ffn.batch_size(None, size))
        count = max(1, int(SHARE * shape.ffn))
        self.mask = {layer: sorted(rng.sample(range(shape.ffn), count)) for layer in range(shape.layers)}
        self.tokens = {"sentences": sum(map(len, self.sentences.ids)), "blocks": blocks.numel()}
        self.parameters = shape.parameters

    def decode(self, on: str) -> None:
        """The bare decoder on retrieval's batches of the sentences, or on the blocks."""
        ids, pad = self.sentences.ids, self.tokenizer.pad_token_id
        if on == "blocks":
            batches = ((block, None) for block in self.blocks)
        else:
            rows = batching.batches([len(sentence) for sentence in ids], AT_ONCE)
            batches = (batching.padded([ids[i] for i in row], pad) for row in rows)
        with torch.inference_mode():
            for tokens, mask in batches:
                more = {}
                if mask is not None:
                    mask = mask.to(self.model.device)
                    more = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
                self.arch.decoder(self.model)(input_ids=tokens.to(self.model.device), use_cache=False, **more)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    def curves(self) -> dict:
        """All curves, alignment and their intervals, with the sentences themselves as the other language."""
        how = {"batch_size": AT_ONCE}
        measured = retrieval.measure(self.model, self.arch, self.tokenizer, self.sentences, self.sentences, **how)
        return retrieval.payload(measured, "", "", "", 42) | retrieval.alignment.measure(measured, 42)[0]

    def counts(self):
        counter = counting.Counter(self.model, self.arch)
        for block in self.blocks:
            counter.add(block)
        return counter.counts

    def activations(self) -> float | None:
        sums = followed.Activations(self.model, self.arch, {"mask": self.mask})
        for block in self.blocks:
            sums.add(block)
        return sums.mean("mask")

    def silenced(self, run: Callable):
        with activations.silenced(self.model, self.arch, self.mask):
            return run()

    def losses(self) -> list[float]:
        return [score.nll for score in scoring.text_nlls(self.model, self.tokenizer, self.texts, AT_ONCE)]

    def ways(self) -> dict[str, dict[str, Callable]]:
        """Area -> the ways to be timed."""
        model, arch, ids, pad = self.model, self.arch, self.sentences.ids, self.tokenizer.pad_token_id
        sentences, blocks = (lambda: self.decode("sentences")), (lambda: self.decode("blocks"))
        return {
            "retrieval": {
                "floor": sentences,
                "ours": lambda: retrieval.sentence_vectors(model, arch, self.sentences, pad, AT_ONCE).mean,
                "obvious": lambda: obvious.states(model, ids, pad, AT_ONCE),
            },
            "all curves": {"floor": lambda: (sentences(), sentences()), "ours": self.curves},
            "counts": {
                "floor": blocks,
                "ours": self.counts,
                "obvious": lambda: obvious.counts(model, self.blocks),
            },
            "activations": {
                "floor": blocks,
                "ours": self.activations,
                "obvious": lambda: obvious.activations(model, self.blocks, self.mask),
            },
            "deactivation": {
                "floor": sentences,
                "ours": lambda: self.silenced(self.losses),
                "decoder only": lambda: self.silenced(sentences),
                "obvious": lambda: obvious.losses(model, ids, self.mask),
            },
        }


def check(bench: Bench, tolerance: float) -> None:
    """Check that ours and the obvious way agree; otherwise their times mean nothing.

    Raises:
        AssertionError: they disagree.
    """
    for area, ways in bench.ways().items():
        if "obvious" not in ways:
            continue
        ours, slow = (torch.as_tensor(ways[name](), dtype=torch.float64) for name in ("ours", "obvious"))
        difference = (ours - slow).abs()
        if area == "counts":  # of tokens; a few activations are near the threshold
            assert float(difference.mean()) <= tolerance * bench.tokens["blocks"], area
        else:
            assert float(difference.max()) <= tolerance * float(slow.abs().max()), area


def measured(bench: Bench, repeats: int, slow: int) -> Iterator[tuple[str, dict, dict]]:
    """The rows of one model: (area, ways, further facts)."""
    for area, ways in bench.ways().items():
        kind = "blocks" if area in ("counts", "activations") else "sentences"
        times = dict.fromkeys(ways, repeats) | {"obvious": slow}
        yield area, measure.interleaved(ways, times), {"tokens": bench.tokens[kind], "parameters": bench.parameters}


def _tokenizer():
    """A tokenizer with one token per character, so that random letters give as many tokens plus <s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", *string.ascii_lowercase])}
    fast = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", bos_token="<s>")
