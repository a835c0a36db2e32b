"""Two tokenizers are one when they do the same to text, whatever their files look like."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path

import pytest
from helpers import save_tiny, tiny_tokenizer

from cpt_utils.checkpoints import tokenization, tokenizer_id


def hub_form(kind: str, folder: Path, texts: list[str], **settings) -> Path:
    """A tokenizer as Qwen 2 and Llama 2 lie on the hub, trained on `texts`: pipelines that transformers 5 rewrites."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if kind == "qwen2":
        made = Tokenizer(models.BPE())
        made.normalizer = normalizers.NFC()
        words = (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), bytes_])
        made.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
        made.train_from_iterator(texts, trainer)
        made.add_special_tokens(["<|endoftext|>"])
        facts = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    else:
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=1600, special_tokens=special, show_progress=False)
        made.train_from_iterator(texts, trainer)
        saved = json.loads(made.to_str())
        made = Tokenizer.from_str(json.dumps(saved | {"added_tokens": saved["added_tokens"][:3]}))
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        facts = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        facts |= {"add_bos_token": True, "add_eos_token": False}
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    (folder / "tokenizer_config.json").write_text(json.dumps(facts | settings))
    return folder


def saved_again(folder: Path, out: Path) -> Path:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    shutil.copy(folder / "config.json", out)
    return out


def test_the_probe_has_many_scripts_and_much_else():
    texts = tokenizer_id.probe()
    letters = {char for text in texts for char in text if char.isalpha()}
    assert len({unicodedata.name(char, "").split()[0] for char in letters}) > 30
    signs = "".join(texts)
    assert all(sign in signs for sign in ("\n\n", "\t", "  ", "\u0301", "\u200d", "😀", "१", "１", "</s>"))
    assert "" in texts and " " in texts
    assert sum(len(text.encode()) for text in texts) < 10_000


@pytest.mark.parametrize(
    ("kind", "settings"), [("qwen2", {}), ("llama", {"legacy": False}), ("llama", {"legacy": True}), ("llama", {})]
)
def test_saving_again_makes_no_other_tokenizer(tmp_path, kind, settings):
    hub = hub_form(kind, tmp_path / "hub", tokenizer_id.probe(), **settings)
    once = saved_again(hub, tmp_path / "once")
    twice = saved_again(once, tmp_path / "twice")
    assert (hub / "tokenizer.json").read_text() != (once / "tokenizer.json").read_text()
    assert tokenizer_id.of(hub) == tokenizer_id.of(once) == tokenizer_id.of(twice)
    assert tokenizer_id.of_plain_text(hub) == tokenizer_id.of_plain_text(once)


def test_what_does_not_touch_ids_does_not_count(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "a")
    again = tiny_tokenizer()
    again.padding_side, again.model_max_length, again.chat_template = "left", 99, "{{ messages }}"
    again.save_pretrained(tmp_path / "b")
    assert tokenizer_id.of(tmp_path / "a") == tokenizer_id.of(tmp_path / "b")


def test_what_changes_ids_or_vocabulary_counts(tmp_path):
    probe = tokenizer_id.probe()
    hub = hub_form("llama", tmp_path / "hub", probe)
    ids = {tokenizer_id.of(hub)}
    plain = tokenizer_id.of_plain_text(hub)
    saved = json.loads((hub / "tokenizer.json").read_text())

    def changed(name: str, **facts) -> Path:
        folder = shutil.copytree(hub, tmp_path / name)
        (folder / "tokenizer.json").write_text(json.dumps(saved | facts))
        return folder

    # The last merge gone; two tokens that no probe has swapped (same ids of the probe, another vocabulary); other text.
    fewer = changed("merges", model=saved["model"] | {"merges": saved["model"]["merges"][:-1]})
    names = dict(saved["model"]["vocab"])
    names["<0xFE>"], names["<0xFF>"] = names["<0xFF>"], names["<0xFE>"]
    swapped = changed("vocabulary", model=saved["model"] | {"vocab": names})
    other = hub_form("llama", tmp_path / "other", probe[:40])
    for folder in (fewer, swapped, other):
        ids.add(tokenizer_id.of(folder))
        assert tokenizer_id.of_plain_text(folder) != plain
    assert len(ids) == 4


def test_added_tokens_leave_the_ids_of_plain_text(tmp_path):
    from transformers import AutoTokenizer

    hub = hub_form("qwen2", tmp_path / "hub", tokenizer_id.probe())
    longer = AutoTokenizer.from_pretrained(hub)
    assert longer.add_tokens(["Donau", " maji", "<new>"]) == 3
    longer.save_pretrained(tmp_path / "longer")
    shutil.copy(hub / "config.json", tmp_path / "longer")
    assert tokenizer_id.of(hub) != tokenizer_id.of(tmp_path / "longer")
    assert tokenizer_id.of_plain_text(hub) == tokenizer_id.of_plain_text(tmp_path / "longer")


def test_hashes_of_before_are_not_compared():
    assert tokenizer_id.comparable("ids:a", "ids:b")
    assert not tokenizer_id.comparable("json:a", "ids:b") and not tokenizer_id.comparable(None, "ids:b")


def test_the_same_files_are_the_same_tokenizer_wherever_they_lie(tmp_path):
    """Beside a config.json of Qwen 2, in the folder of a run without one, and in an adapter's."""
    base = save_tiny("qwen2", tmp_path / "base")  # its tokenizer is of no class of its own, as one trained from scratch
    save_tiny("qwen2", tmp_path / "run/checkpoint-5", seed=5, tokenizer=False)
    tiny_tokenizer().save_pretrained(tmp_path / "run")
    adapter = tmp_path / "lora/checkpoint-5"
    tiny_tokenizer().save_pretrained(adapter)
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert "tokenizer_class" in (base / "tokenizer_config.json").read_text()
    for folder in (tmp_path / "run", adapter):
        assert not (folder / "config.json").exists()
        assert tokenizer_id.of(folder) == tokenizer_id.of(base)
        assert tokenizer_id.of_plain_text(folder) == tokenizer_id.of_plain_text(base)
        assert type(tokenization.open_tokenizer(folder)) is type(tokenization.open_tokenizer(base))
    tiny_tokenizer().save_pretrained(tmp_path / "alone")
    assert tokenization.configuration_of_tokenizer(tmp_path / "alone") is None
