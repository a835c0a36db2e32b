"""Benchmarks of the forward-pass scripts: retrieval, counts, activations, and the loss with silenced neurons.

A model of random weights is made from its configuration. The floor is the bare decoder on the same batches: no lm_head,
no hooks. Ours is the code that the scripts run, from token ids (texts, for the loss) to sums.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator

from cpt_utils.architectures import archs
from cpt_utils.base import cli
from cpt_utils.base.lazy import torch
from cpt_utils.interventions import activations
from cpt_utils.models import batching, ffn, scoring

measure = cli.sibling("benchmarks/measure.py")
obvious = cli.sibling("benchmarks/obvious.py")
counting = cli.sibling("lsn/activation.py")
followed = cli.sibling("lsn/lsn_activation_cpt.py")
retrieval = cli.sibling("sentence-retrieval/sr_experiment.py")

SENTENCES_A_BATCH = 32
SHARE = 0.01  # of the neurons in a mask, about as many as a language's


class Bench:
    """A random model on `device`, and the same random sentences and blocks of text for every way.

    Sentences have 8 to 64 tokens, as those of FLORES+ and SIB-200 do; blocks have `size` tokens.
    """

    def __init__(self, shape, dtype: str, device: str, n_sentences: int, n_blocks: int, size: int):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**shape.config(dtype))
        with torch.device(device):
            torch.manual_seed(0)
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
            )
        self.model = self.model.eval().requires_grad_(False)
        self.arch = archs.for_config(shape.config(dtype))
        rng = random.Random(0)
        self.texts = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(7, 63))) for _ in range(n_sentences)]
        self.tokenizer = _tokenizer()
        self.sentences = batching.encode(self.tokenizer, self.texts)
        self.blocks = torch.randint(3, shape.vocab, (n_blocks, size), generator=torch.Generator().manual_seed(0))
        self.batch = ffn.batch_size(None, size)
        self.mask = {
            i: sorted(rng.sample(range(shape.ffn), max(1, int(SHARE * shape.ffn)))) for i in range(shape.layers)
        }
        self.tokens = {"sentences": sum(map(len, self.sentences.ids)), "blocks": self.blocks.numel()}
        self.parameters = shape.parameters()

    def decoder_on_sentences(self) -> None:
        """The bare decoder on the batches that retrieval makes of the sentences."""
        lengths = [len(ids) for ids in self.sentences.ids]
        with torch.inference_mode():
            for rows in batching.batches(lengths, SENTENCES_A_BATCH):
                ids, mask = batching.padded([self.sentences.ids[i] for i in rows], self.tokenizer.pad_token_id)
                ids, mask = ids.to(self.model.device), mask.to(self.model.device)
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                self.arch.decoder(self.model)(
                    input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
                )
        self.wait()

    def decoder_on_blocks(self) -> None:
        with torch.inference_mode():
            for at in range(0, len(self.blocks), self.batch):
                ids = self.blocks[at : at + self.batch].to(self.model.device)
                self.arch.decoder(self.model)(input_ids=ids, use_cache=False)
        self.wait()

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    def vectors(self):
        return retrieval.sentence_vectors(
            self.model, self.arch, self.sentences, self.tokenizer.pad_token_id, SENTENCES_A_BATCH
        )

    def counts(self):
        counter = counting.Counter(self.model, self.arch)
        for at in range(0, len(self.blocks), self.batch):
            counter.add(self.blocks[at : at + self.batch])
        return counter.counts

    def activations(self) -> float | None:
        found = followed.Activations(self.model, self.arch, {"mask": self.mask})
        for at in range(0, len(self.blocks), self.batch):
            found.add(self.blocks[at : at + self.batch])
        return found.mean("mask")

    def losses(self) -> list[float]:
        with activations.silenced(self.model, self.arch, self.mask):
            scores = scoring.text_nlls(self.model, self.tokenizer, self.texts, SENTENCES_A_BATCH)
        return [score.nll for score in scores]

    def silenced_decoder(self) -> None:
        with activations.silenced(self.model, self.arch, self.mask):
            self.decoder_on_sentences()


def areas(bench: Bench) -> dict[str, dict[str, Callable]]:
    """area -> the ways to be timed."""
    model, ids, blocks = bench.model, bench.sentences.ids, bench.blocks
    pad = bench.tokenizer.pad_token_id
    return {
        "retrieval": {
            "floor": bench.decoder_on_sentences,
            "ours": bench.vectors,
            "obvious": lambda: obvious.states(model, ids, pad, SENTENCES_A_BATCH),
        },
        "counts": {
            "floor": bench.decoder_on_blocks,
            "ours": bench.counts,
            "obvious": lambda: obvious.counts(model, blocks, bench.batch),
        },
        "activations": {
            "floor": bench.decoder_on_blocks,
            "ours": bench.activations,
            "obvious": lambda: obvious.activations(model, blocks, bench.mask, bench.batch),
        },
        "deactivation": {
            "floor": bench.decoder_on_sentences,
            "ours": bench.losses,
            "decoder only": bench.silenced_decoder,
            "obvious": lambda: obvious.losses(model, ids, bench.mask),
        },
    }


def check(bench: Bench, tolerance: float) -> None:
    """Ours and the obvious way agree; else their times would say nothing.

    Raises:
        AssertionError: they do not.
    """
    ways = {area: (found["ours"](), found["obvious"]()) for area, found in areas(bench).items()}
    for area in ("retrieval", "activations", "deactivation"):
        one, other = (torch.as_tensor(value, dtype=torch.float64) for value in ways[area])
        scale = float(other.abs().max())
        assert float((one - other).abs().max()) <= tolerance * scale, area
    one, other = ways["counts"]
    assert float((one - other).abs().double().mean()) <= tolerance * bench.blocks.numel(), "counts"


def measured(bench: Bench, repeats: int, slow: int) -> Iterator[tuple[str, dict, dict]]:
    """The rows of one model: (area, ways, more facts)."""
    for area, ways in areas(bench).items():
        times = dict.fromkeys(ways, repeats) | {"obvious": slow}
        kind = "sentences" if area in ("retrieval", "deactivation") else "blocks"
        facts = {"tokens": bench.tokens[kind], "parameters": bench.parameters}
        yield area, measure.interleaved({name: _timed(run) for name, run in ways.items()}, times), facts


def _timed(run: Callable) -> Callable[[], None]:
    """The way without its result, which is no measurement."""

    def way() -> None:
        run()

    return way


def _tokenizer():
    """A token for each character, so that texts of random letters have as many tokens as letters, and one in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", *string.ascii_lowercase])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>")
