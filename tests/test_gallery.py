"""docs/figures.md: every caption has a picture there, small enough; what each is drawn by is told."""

import re

import helpers
import pytest
from PIL import Image

from cpt_utils.base import experiments
from cpt_utils.base.errors import InputError

GALLERY = helpers.load_script("docs/figures.py")


def test_every_caption_has_its_figure():
    """Those of the paper that a script draws, too, stand with that script's."""
    texts = {name: caption.partition("\n")[2].strip() for name, (caption, _) in experiments.said("CAPTIONS").items()}
    shown = {texts[name] if texts[name] in GALLERY.DRAWN else name for name in texts} - {"fig3_layer_swap"}  # controls
    assert shown | set(GALLERY.BESIDE) == set(GALLERY.DRAWN) == set(GALLERY.captions())


def test_the_page_shows_all_of_them_and_pictures_are_small():
    page = GALLERY.PAGE.read_text()
    shown = re.findall(r"^!\[[^\]\n]{20,}\]\(figures/(\w+)\.png\)$", page, re.M)
    assert shown == list(GALLERY.captions())
    folder = GALLERY.PAGE.with_suffix("")
    assert {file.name for file in folder.iterdir()} == {f"{name}.png" for name in shown}
    assert all(file.stat().st_size <= GALLERY.LARGEST for file in folder.iterdir())
    for name, (_, _, text, script) in GALLERY.captions().items():
        assert text.strip() in page and f"drawn by [{script}](../{script})" in page, name


def test_a_study_without_results_leaves_a_sentence():
    said = dict.fromkeys(GALLERY.DRAWN, ("", "layers.json is not there"))
    page = GALLERY.page(said, "python docs/figures.py mine.yaml")
    assert "![" not in page and page.count("*claims is not drawn: layers.json is not there.*") == 1


def test_a_picture_becomes_small_enough(tmp_path):
    noise = Image.effect_noise((1200, 900), 80).convert("RGB")
    noise.save(tmp_path / "noise.png")
    with pytest.raises(InputError, match="more than 90,000"):
        GALLERY.small((tmp_path / "noise.png").read_bytes())
    plain = Image.linear_gradient("L").resize((1350, 900)).convert("RGB")
    plain.save(tmp_path / "plain.png")
    assert len(GALLERY.small((tmp_path / "plain.png").read_bytes())) <= GALLERY.LARGEST
