"""lsn/lape_mask.py: masks as the original LAPE code saves them, which name no language and leave out empty ones."""

from __future__ import annotations

import pytest
import torch
from helpers import load_script

from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.measures import masks

script = load_script("lsn/lape_mask.py")
# As LAPE's identify.py builds it, List[List[LongTensor]]: languages, layers, neurons.
NEURONS = {"en": [[3, 1], [], [7]], "vi": [[], [2], []], "id": [[11], [5, 0], []]}


def save(path, lists):
    torch.save([[torch.tensor(layer).long() for layer in language] for language in lists], path)
    return str(path)


def test_languages_and_layers_keep_their_places(tmp_path, capsys):
    source, out = save(tmp_path / "tiny.neuron.pth", NEURONS.values()), tmp_path / "tiny.json"
    script.main([source, "-l", "en,vi,id", "-o", str(out), "--ffn-width", "12"])
    assert "3 layers, neurons of en 3, vi 1, id 3" in capsys.readouterr().out
    for lang, layers in NEURONS.items():
        own = masks.read(out, lang, 3, 12, control=False)
        assert own == {i: sorted(layer) for i, layer in enumerate(layers)}
        masks.read_both(out, tmp_path / "tiny.control.json", lang, 3, 12)  # as many, and none of the mask's
    assert results.read_json(out)[1]["languages"] == {"en": "eng_Latn", "vi": "vie_Latn", "id": "ind_Latn"}
    script.main([source, "-l", "en,vi,id", "-o", str(out), "--ffn-width", "12"])
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"is of another request \(languages"):
        script.main([source, "-l", "vi,en,id", "-o", str(out), "--ffn-width", "12"])


def test_a_language_that_was_left_out_is_not_guessed(tmp_path):
    source = save(tmp_path / "tiny.neuron.pth", [NEURONS["en"], NEURONS["id"]])  # vi had no neuron
    with pytest.raises(
        InputError, match="holds 2 languages, but -l names 3; LAPE leaves out languages without neurons"
    ):
        script.main([source, "-l", "en,vi,id", "-o", str(tmp_path / "out.json")])
    script.main([source, "-l", "en,id", "-o", str(tmp_path / "out.json")])
    assert masks.languages_in(tmp_path / "out.json") == ["en", "id"]
    assert not (tmp_path / "out.control.json").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_every_reader_says_what_to_do(tmp_path, legacy):
    """Whatever it is called: LAPE's identify.py writes activation_mask/llama-70b."""
    path = tmp_path / "llama-70b"
    torch.save([[torch.tensor([1])]], path, _use_new_zipfile_serialization=not legacy)
    for read in (
        lambda: masks.read(path, "en", 1, 4),
        lambda: masks.languages_in(path),
        lambda: masks.is_control(path),
    ):
        with pytest.raises(InputError, match=r"does not name its languages.*python lsn/lape_mask.py .*llama-70b -l en"):
            read()


@pytest.mark.parametrize("content", [[], {"a": torch.ones(1)}, [[torch.tensor([1])], []], [1, 2], torch.ones(2), "no"])
def test_what_is_no_mask(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"x.pth is not a LAPE mask"):
        script.main([str(tmp_path / "x.pth"), "-l", "en,vi", "-o", str(tmp_path / "out.json")])
