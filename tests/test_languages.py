"""Language codes: the table, other spellings, and look-ups."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import shared_dir

from cpt_utils.base import languages
from cpt_utils.base.errors import InputError

OLDER = {
    "zho_Hans": "cmn_Hans",
    "zho_Hant": "cmn_Hant",
    "tgl_Latn": "fil_Latn",
    "est_Latn": "ekk_Latn",
    "grn_Latn": "gug_Latn",
    "kon_Latn": "ktu_Latn",
    "tzm_Tfng": "zgh_Tfng",
    "ajp_Arab": "apc_Arab_sout3123",
    "apc_Arab": "apc_Arab_nort3139",
    "aka_Latn": "twi_Latn_asan1239",
    "twi_Latn": "twi_Latn_akua1239",
}


def test_table_is_well_formed():
    table = languages.table()
    assert len(table) == 230
    assert list(table) == sorted(table)
    for code, language in table.items():
        parts = code.split("_")
        assert len(parts) in (2, 3) and len(parts[0]) == 3 and len(parts[1]) == 4, code
        assert language.name and language.name.strip() == language.name
        short = set(language.short) - {"zho_simpl", "zho_trad"}
        assert all(len(entry) in (2, 3) and entry.islower() for entry in short), code
    older = [language.sib200 for language in table.values() if language.sib200]
    assert len(older) == len(set(older)) == 205
    assert not set(older) & (set(table) - {language.code for language in table.values() if language.sib200})
    assert not any(languages._PRIVATE.fullmatch(code) for code in table)


@pytest.mark.parametrize(("older", "code"), OLDER.items())
def test_codes_that_flores_plus_renamed(older, code):
    assert languages.canonical(older) == code
    assert languages.canonical(code) == code
    for source in ("sib200", "flores200", "belebele", "moscar"):
        assert languages.spelling(code, source) == languages.spelling(older, source) == older
    assert languages.spelling(older) == code
    assert languages.same(older, code)


def test_all_sib200_languages_map_to_flores_plus():
    folder = shared_dir()
    if not folder:
        pytest.skip("no SIB-200 files: SHARED_DIR is not set, and there is no folder shared beside the repository")
    codes = (Path(folder) / "sib200" / "LANGUAGES.txt").read_text().split()
    assert len(codes) == 205
    assert [languages.spelling(languages.canonical(code), "sib200") for code in codes] == codes
    assert len({languages.canonical(code) for code in codes}) == 205


@pytest.mark.parametrize(
    ("short", "code"),
    [
        ("en", "eng_Latn"),
        ("ga", "gle_Latn"),
        ("eu", "eus_Latn"),
        ("zh", "cmn_Hans"),
        ("eng", "eng_Latn"),
        ("gle", "gle_Latn"),
        ("zho", "cmn_Hans"),
        ("tl", "fil_Latn"),
        ("sw", "swh_Latn"),
        ("ajp", "apc_Arab_sout3123"),
    ],
)
def test_short_codes(short, code):
    assert languages.canonical(short) == code
    assert languages.same(short, code)


def test_ambiguous_short_code_names_the_candidates():
    with pytest.raises(InputError, match=r"'no' is ambiguous.*nno_Latn.*nob_Latn"):
        languages.canonical("no")
    assert languages.canonical("no", any_tag=True) == "no"
    assert not languages.same("no", "nob_Latn")


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("gle_latn", "gle_Latn"),
        ("gle-Latn", "gle_Latn"),
        ("EN", "eng_Latn"),
        ("gel_Latn", "gle_Latn"),
        ("eng_Latin", "eng_Latn"),
        ("irish", "gle_Latn"),
        ("zho_Latn", "cmn_Hans|zho_Hans"),
    ],
)
def test_unknown_code_names_the_nearest(wrong, near):
    with pytest.raises(InputError, match=near) as error:
        languages.canonical(wrong)
    assert "\n" not in str(error.value)
    assert languages.canonical(wrong, any_tag=True) == wrong


def test_private_use_codes_are_valid_and_others_are_not():
    for code in ("qaa_Latn", "qtz_Latn", "qbc_Cyrl"):
        assert languages.canonical(code) == code
        assert languages.spelling(code, "sib200") == code
    for code in ("qua_Latn", "qaa_latn", "qaa", "paa_Latn"):
        with pytest.raises(InputError):
            languages.canonical(code)


def test_language_that_sib200_lacks():
    with pytest.raises(InputError, match="SIB-200 has no chv_Cyrl"):
        languages.spelling("chv_Cyrl", "sib200")
    assert languages.spelling("chv_Cyrl", "moscar") == "chv_Cyrl"


def test_find_takes_the_given_spelling_first_then_equivalents():
    assert languages.find(["ga", "gle_Latn"], "ga") == "ga"
    assert languages.find(["ga", "gle_Latn"], "gle_Latn") == "gle_Latn"
    assert languages.find({"zho_Hans": 1, "eng_Latn": 2}, "cmn_Hans") == "zho_Hans"
    assert languages.find({"zho_Hans": 1, "eng_Latn": 2}, "zh") == "zho_Hans"
    assert languages.find(["de", "klingon"], "klingon") == "klingon"
    with pytest.raises(InputError, match="ga and gle_Latn both mean gle"):
        languages.find(["ga", "gle_Latn"], "gle")
    with pytest.raises(InputError, match=r"masks: nothing for ga \(gle_Latn\); there is de, en"):
        languages.find(["en", "de"], "ga", what="masks")
    assert languages.find(["en"], "ga", default=None) is None


def test_name():
    assert languages.name("ga") == "Irish"
    assert languages.name("qaa_Latn") == "qaa_Latn"


def test_find_pair():
    folders = ["eng_Latn-gle_Latn", "en-zho_Hans", "eng_Latn-my-dialect"]
    assert languages.find_pair(folders, "eng_Latn", "gle_Latn") == "eng_Latn-gle_Latn"
    assert languages.find_pair(folders, "en", "ga") == "eng_Latn-gle_Latn"
    assert languages.find_pair(folders, "eng_Latn", "cmn_Hans") == "en-zho_Hans"
    assert languages.find_pair(folders, "eng_Latn", "my-dialect") == "eng_Latn-my-dialect"
    with pytest.raises(InputError, match="retrieval: nothing for ga-en; there is en-zho_Hans, eng_Latn-gle_Latn"):
        languages.find_pair(folders, "ga", "en", what="retrieval")
    with pytest.raises(InputError, match="both mean eng-gle"):
        languages.find_pair(["en-ga", "eng_Latn-gle_Latn"], "eng", "gle")
