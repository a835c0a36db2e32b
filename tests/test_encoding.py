"""Special tokens in a text are text, for every kind of tokenizer; and ordinary text has the ids that it always had."""

from __future__ import annotations

import random

import pytest
from helpers import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cpt_utils.models import encoding

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
ADDED = "<ga>"  # added by somebody who goes on training, and not special
LINES = ["the <b>cat</b> sat", "it was 5 euro now", "a < b > c / d", "s > </ s", "unk"]


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """With a BOS in front, as models have it, and one added token that is not special."""
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    tokenizer.add_tokens([AddedToken(ADDED, special=False, normalized=False)])
    return tokenizer


def bytes_of_bpe() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(SPECIAL.values()), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(LINES * 3, trainer)
    return wrapped(backend)


def merges_that_spell_a_special_token() -> PreTrainedTokenizerFast:
    """A vocabulary taken over from another library: `</s>` is an entry that the merges arrive at."""
    letters = sorted(set("".join(LINES)) | set("▁<>/sunk"))
    merges = [("<", "/"), ("</", "s"), ("</s", ">"), ("s", ">"), ("<", "s>"), ("t", "h"), ("th", "e"), ("</s>", "▁")]
    entries = [*SPECIAL.values(), *letters, *("".join(pair) for pair in merges)]
    vocab = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    return wrapped(backend)


def unigram() -> PreTrainedTokenizerFast:
    """As XGLM and mT5: the special tokens are pieces like others, with the best of all scores."""
    letters = sorted(set("".join(LINES)) | set("▁<>/sunk"))
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -4.0) for letter in letters), ("the", -2.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return wrapped(backend)


def words() -> PreTrainedTokenizerFast:
    """One token a word, in which `</s>` cannot be split; it is an unknown word then, not the end of the text."""
    entries = [*SPECIAL.values(), *sorted({word for line in LINES for word in line.split()})]
    backend = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(backend)


KINDS = [bytes_of_bpe, merges_that_spell_a_special_token, unigram, words]


@pytest.fixture(scope="module", params=KINDS, ids=lambda make: make.__name__)
def tokenizer(request):
    return request.param()


def as_before(tokenizer, text: str, special: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=special)["input_ids"]


@pytest.mark.parametrize("special", [True, False])
def test_ordinary_text_keeps_every_id(tokenizer, special):
    rng = random.Random(0)
    texts = [*LINES, "日本語 unknown", ADDED, f"a {ADDED} b", *(" ".join(rng.choices(LINES, k=4)) for _ in range(50))]
    found = encoding.of_texts(tokenizer, texts, special)
    assert found.ids == [as_before(tokenizer, text, special) for text in texts]
    assert found.special == [[int(special), *[0] * (len(row) - 1)] for row in found.ids] and found.n_split == 0


@pytest.mark.parametrize("special", [True, False])
def test_special_tokens_in_a_text_are_text(tokenizer, special):
    texts = ["<s>was 5 euro</s> now", "<s>", "a </s> b", f"the {ADDED} cat </s>", "the <unk> cat", "the cat sat"]
    found = encoding.of_texts(tokenizer, texts, special)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*SPECIAL.values(), ADDED)}
    own = [ids["<s>"]] if special else []
    for text, row, mask in zip(texts, found.ids, found.special, strict=True):
        assert row[: len(own)] == own and mask == [*[1] * len(own), *[0] * (len(row) - len(own))]
        assert not {ids["<s>"], ids["</s>"]} & set(row[len(own) :]), text
        assert (ids[ADDED] in row) == (ADDED in text)
    assert found.n_split >= 4 and found.ids[-1] == as_before(tokenizer, texts[-1], special)


def test_the_tokens_are_those_of_a_tokenizer_that_knows_no_special_ones():
    """Byte-level: the ids of `<s>` in a text are those of its three bytes."""
    tokenizer = tiny_tokenizer()
    alphabet = {token: i for token, i in tokenizer.get_vocab().items() if len(token) == 1}
    for text in ("<s>a</s>", "x<pad>y", "<s><s>"):
        (row,) = encoding.of_texts(tokenizer, [text]).ids
        assert row == [tokenizer.bos_token_id, *(alphabet[letter] for letter in text)]
        assert tokenizer.decode(row[1:]) == text


def test_the_pieces_around_are_tokenized_as_in_other_text():
    tokenizer = merges_that_spell_a_special_token()
    tokens = tokenizer.convert_ids_to_tokens(encoding.of_texts(tokenizer, ["the </s> the"], False).ids[0])
    assert tokens == ["the", "▁", "</s", ">", "▁", "the"]
    tokens = unigram().convert_ids_to_tokens(encoding.of_texts(unigram(), ["the </s>"], False).ids[0])
    assert tokens == ["▁", "the", "▁", "<", "/", "s", ">"]


def test_a_special_token_that_an_instruction_tuned_model_has():
    """Special though no role is: reserved and chat tokens stand among the added tokens only."""
    tokenizer = bytes_of_bpe()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("<|reserved|>", special=True)])
    special = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|reserved|>"])
    found = encoding.of_texts(tokenizer, ["<|im_start|>user <think> <|reserved|> <ga>"], False)
    assert not set(special) & set(found.ids[0]) and found.n_split == 1
    assert set(tokenizer.convert_tokens_to_ids(["<think>", "<ga>"])) <= set(found.ids[0])
    assert tokenizer.decode(found.ids[0]) == "<|im_start|>user <think> <|reserved|> <ga>"


def test_unknown_and_eos_in_one_token():
    """GPT-2 has one token for all roles, and text of any script without it."""
    backend = Tokenizer.from_str(bytes_of_bpe().backend_tokenizer.to_str())
    one = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="</s>", bos_token="</s>", eos_token="</s>")
    eos = one.eos_token_id
    found = encoding.of_texts(one, ["a </s> b", "日本"], False)
    assert eos not in found.ids[0] and found.n_split == 1 and one.decode(found.ids[0]) == "a </s> b"


def test_a_tokenizer_in_python():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.add_tokens([AddedToken(ADDED, special=False), AddedToken(f"{ADDED}{ADDED}", special=False)])
    assert not tokenizer.is_fast
    texts = ["the cat", "<pad>a</s>", f"a {ADDED} </s> b {ADDED}{ADDED}", "a<unk>"]
    for special in (True, False):
        found = encoding.of_texts(tokenizer, texts, special)
        own = [tokenizer.eos_token_id] if special else []
        for text, row, mask in zip(texts, found.ids, found.special, strict=True):
            slow, at = [], 0
            while at < len(text):
                token = next((t for t in (f"{ADDED}{ADDED}", ADDED) if text.startswith(t, at)), None)
                slow.append(tokenizer.convert_tokens_to_ids(token) if token else ord(text[at]) + 3)
                at += len(token or "x")
            assert row == [*slow, *own], text
            assert mask == [*[0] * len(slow), *[1] * len(own)]
        assert found.n_split == 3
