"""The demo world: same seed, same bytes; a test nobody has seen; grammar, knobs and files as demo/README.md says."""

from __future__ import annotations

import csv
import filecmp
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, load_script

from cpt_utils.base import sources
from cpt_utils.base.errors import InputError

ENGLISH, SECOND, NEW = "eng_Latn", "qab_Latn", "qaa_Latn"
LABELS = {"science/technology", "travel", "politics", "sports", "health", "entertainment", "geography"}


@pytest.fixture(scope="module")
def script():
    return load_script("demo/world.py")


def make(script, out: Path, *flags) -> Path:
    script.main(["--config", str(ROOT / "demo/world-tiny.yaml"), "--out", str(out), *map(str, flags)])
    return out


@pytest.fixture(scope="module")
def world(script, tmp_path_factory) -> Path:
    return make(script, tmp_path_factory.mktemp("demo") / "world")


def maker(script, **languages):
    config = script.read_config(None)
    config["languages"] = {
        code: {**script.grammar.DEFAULTS, **(grammar or {}), **languages.get(code, {})}
        for code, grammar in config["languages"].items()
    }
    return script.Maker(config, script.read_yaml(ROOT / "demo/vocabulary.yaml"))


def lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def rows(file: Path) -> list[dict]:
    with file.open(encoding="utf-8", newline="") as text:
        return list(csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE))


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def clause(script, **fields):
    given = {"person": "doctor", "action": "treat", "tense": "past", "thing": "fever", "negated": False}
    empty = dict.fromkeys(("person_quality", "thing_quality", "number", "place", "time"))
    return script.meanings.Clause(**{**empty, **given, **fields})


# ---- files


def test_same_seed_same_bytes(script, world, tmp_path):
    again = make(script, tmp_path / "again")
    assert files(again) == files(world)
    for name in files(world) - {"world.json"}:
        assert filecmp.cmp(world / name, again / name, shallow=False), name
    facts = [json.loads((folder / "world.json").read_text()) for folder in (world, again)]
    for found in facts:
        assert found.pop("_header")["seed"] == 42
    assert facts[0] == facts[1]


def test_another_seed_is_another_world(script, world, tmp_path):
    other = make(script, tmp_path / "other", "--seed", 7)
    assert lines(other / "test/qaa_Latn.txt") != lines(world / "test/qaa_Latn.txt")
    assert lines(other / "lexicon.tsv") != lines(world / "lexicon.tsv")


def test_the_folder_of_a_world_file_may_hold_the_seed(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "world.yaml").write_text("out: worlds/seed-{seed}\nscale: 0.02\n")
    script.main(["--config", "world.yaml", "--seed", "3"])
    assert json.loads((tmp_path / "worlds/seed-3/world.json").read_text())["config"]["seed"] == 3


def test_size_of_one_kind_disturbs_no_other(script, world, tmp_path):
    larger = make(script, tmp_path / "larger", "--scale", 0.1)
    for name in ("base/text.eng_Latn.txt", "base/mixed.qaa_Latn.txt"):
        short, long = lines(world / name), lines(larger / name)
        assert len(short) < len(long) and long[: len(short)] == short
    assert lines(larger / "test/qaa_Latn.txt") == lines(world / "test/qaa_Latn.txt")


def test_counts_are_those_of_the_files(world):
    counted = json.loads((world / "world.json").read_text())["files"]
    assert set(counted) == files(world) - {"world.json"}
    for name, facts in counted.items():
        assert facts == {"lines": len(lines(world / name)), "words": len((world / name).read_text().split())}


def test_no_test_sentence_in_any_training_text(world):
    """By the text itself, in every language: no sentence of a document is one of a test."""
    test = {line for file in (world / "test").iterdir() for line in lines(file)}
    task = {row["text"] for file in world.glob("sib200/*/test.tsv") for row in rows(file)}
    documents = [
        line for part in ("base", "cpt", "heldout") for file in (world / part).iterdir() for line in lines(file)
    ]
    assert len(test) == 3 * 80 and test.isdisjoint(task) and len(documents) > 1000
    for document in documents:
        parts = {part.strip(' "').removeprefix('The category of "') + "." for part in document.split(".")}
        assert parts.isdisjoint(test | task), document


def test_no_test_clause_is_drawn_for_training(script):
    made = maker(script)
    test = made.test(300)
    made.world.reserve(test)
    reserved = made.world.reserved
    draw = random.Random(0)
    drawn = [clause for _ in range(4000) for s in made.world.passage(draw, "travel") for clause in s.clauses]
    assert len(reserved) > 300 and reserved.isdisjoint(drawn)


def test_test_sentences_are_parallel_and_distinct(world):
    text = sources.parallel(
        "text", ENGLISH, NEW, base_file=world / "test/eng_Latn.txt", target_file=world / "test/qaa_Latn.txt"
    )
    assert len(text.base) == len(set(text.base)) == len(set(text.target)) == 80


def test_task_has_the_form_of_sib200(world):
    by_language = {}
    for code in (ENGLISH, SECOND, NEW):
        splits = {split: rows(world / f"sib200/{code}/{split}.tsv") for split in ("train", "dev", "test")}
        for split, found in splits.items():
            assert list(found[0]) == ["index_id", "category", "text"]
            assert {row["category"] for row in found} <= LABELS
            assert all(row["text"] and "\t" not in row["text"] and '"' not in row["text"] for row in found), split
        ids = [int(row["index_id"]) for found in splits.values() for row in found]
        assert len(ids) == len(set(ids))
        by_language[code] = splits
    for split in ("train", "dev", "test"):
        labels = [{r["index_id"]: r["category"] for r in by_language[code][split]} for code in by_language]
        assert labels[0] == labels[1] == labels[2]
        orders = [tuple(row["index_id"] for row in by_language[code][split]) for code in by_language]
        assert len(set(orders)) == 3


def test_facts_are_told_where_they_say_and_asked_everywhere(world):
    found = rows(world / "facts.tsv")
    told = {
        ENGLISH: " ".join(lines(world / "base/facts.eng_Latn.txt")),
        SECOND: " ".join(lines(world / "base/facts.qab_Latn.txt")),
        NEW: (world / "cpt/mixture.txt").read_text(),
    }
    pairs = " ".join(line for code in (SECOND, NEW) for line in lines(world / f"base/pairs.{code}.txt"))
    for row in found:
        assert row["answer"] in row["choices"].split("|")
        said = f"{row['question']} {row['answer']}."
        if row["asked_in"] not in row["told_in"]:
            assert not any(said in text for text in (*told.values(), pairs)), row
    counts = Counter((row["told_in"], row["asked_in"]) for row in found)
    assert len(counts) == 4 * 3 and len(set(counts.values())) == 1
    assert any(f"{row['question']} {row['answer']}." in told[NEW] for row in found if row["told_in"] == NEW)


def test_prompts_are_those_of_the_task(script, world):
    template = yaml.safe_load((ROOT / "lm_eval_sib200/_default_yaml").read_text())["doc_to_text"]
    assert script.PROMPT.removesuffix(" {label}").replace("{text}", "{{text}}") == template
    for line in lines(world / "base/prompts.eng_Latn.txt"):
        assert line.startswith('The category of "') and line.rsplit('" is: ', 1)[1] in LABELS


# ---- languages


def test_english(script):
    english = script.grammar.English([])
    say = lambda **fields: " ".join(english.clause(clause(script, **fields)))  # noqa: E731
    assert say() == "the doctor treated the fever"
    assert say(action="cure", negated=True, number="two", thing="battery") == "the doctor did not cure two batteries"
    assert say(tense="present", action="cross", person="Gaia", thing_quality="old") == "Gaia crosses the old fever"
    assert say(tense="future", place="clinic", time="today") == "the doctor will treat the fever in the clinic today"


@pytest.mark.parametrize("order", ["SVO", "SOV", "VSO", "VOS", "OVS", "OSV"])
def test_word_order(script, order):
    made = maker(script, qaa_Latn={"order": order, "mutation": False})
    language = made.languages[NEW]
    words = language.clause(clause(script))
    place = {
        "S": words.index(language.lexicon["doctor"]),
        "V": words.index(language.lexicon["treat"] + language.endings["past"]),
        "O": words.index(language.lexicon["fever"]),
    }
    assert "".join(sorted(place, key=place.get)) == order


def test_grammar_of_the_new_language(script):
    language = maker(script).languages[NEW]
    lexicon, the, not_ = language.lexicon, language.particles["the"], language.particles["not"]
    said = language.clause(clause(script, negated=True, person_quality="young", thing_quality="old", tense="future"))
    assert said == [
        not_,
        lexicon["treat"] + language.endings["future"],
        the,
        lexicon["doctor"],
        lexicon["young"],
        the,
        script.grammar.mutate(lexicon["fever"]),
        lexicon["old"],
    ]
    many = language.clause(clause(script, number="two", place="clinic", time="today"))
    assert many[3] == lexicon["two"] and many[4].endswith(language.endings["plural"])
    assert many[-3:] == [language.particles["in"], lexicon["clinic"], lexicon["today"]]


def test_mutation_is_of_objects_only(script):
    grammar = script.grammar
    assert [grammar.mutate(word) for word in ("bal", "cor", "fin", "gam", "lis")] == [
        "mbal",
        "gcor",
        "bhfin",
        "ngam",
        "lis",
    ]
    made = maker(script)
    language = made.languages[NEW]
    mutable = [w for w in made.world.topics["health"]["things"] if language.lexicon[w][0] in grammar.MUTATION]
    assert mutable
    for word in mutable:
        assert grammar.mutate(language.lexicon[word]) in language.clause(clause(script, thing=word))
        assert language.lexicon[word] in language.clause(clause(script, person=word))
        borrowed = language.clause(clause(script, thing=word), lambda concept: concept)
        assert word in borrowed  # foreign words resist mutation


def test_second_language_is_verb_final(script):
    language = maker(script).languages[SECOND]
    said = language.clause(clause(script, place="clinic", time="today"))
    assert said[0] == language.lexicon["today"]
    assert said[-3:] == [
        language.lexicon["clinic"],
        language.particles["in"],
        language.lexicon["treat"] + language.endings["past"],
    ]


def test_words_mean_one_thing(script):
    made = maker(script)
    words = [word for x in made.languages.values() for word in x.lexicon.values()]
    words += [word for code in (SECOND, NEW) for word in made.languages[code].particles.values()]
    assert len(words) == len(set(words))


# ---- knobs


def test_shared_vocabulary_grows_by_adding(script):
    made = [maker(script, qaa_Latn={"shared": share}).languages[NEW] for share in (0.0, 0.2, 0.5)]
    loans = [{c for c, word in language.lexicon.items() if c == word} for language in made]
    n = len(made[0].lexicon)
    assert [len(found) for found in loans] == [0, round(0.2 * n), round(0.5 * n)]
    assert loans[1] < loans[2]
    assert all(made[0].lexicon[c] == made[2].lexicon[c] for c in made[0].lexicon if c not in loans[2])


def test_contact_keeps_the_other_words_out_of_bilingual_text(script):
    made = maker(script, qaa_Latn={"contact": 0.5})
    language = made.languages[NEW]
    unknown = {language.lexicon[c] for c in language.lexicon if c not in language.contact}
    people = {language.lexicon[p] for topic in made.world.topics.values() for p in topic["people"]} & unknown
    assert people
    for kind in ("mixed", "pairs"):
        stream = made.documents("base", kind, NEW)
        text = " ".join(next(stream) for _ in range(200)).replace(".", " ").split()
        assert people.isdisjoint(text), kind
    text = " ".join(next(made.documents("cpt", "text", NEW)) for _ in range(200)).split()
    assert not people.isdisjoint(text)


def test_another_language_gets_a_mixture_of_its_own(script):
    made = maker(script)
    sizes = {"words": 5_000, "replay": 0.2, "replay_prompts": 0.25, "facts": 0.06}
    second, new = made.mixture(SECOND, **sizes), made.mixture(NEW, **sizes)
    english = {line for line in second if line in new}
    assert 0 < len(english) < len(second) / 2  # what is replayed is the same
    own = [line for line in second if line not in english]
    words = {code: set(made.languages[code].lexicon.values()) for code in (SECOND, NEW)}
    spoken = {code: sum(not words[code].isdisjoint(line.lower().split()) for line in own) for code in words}
    assert spoken[SECOND] > 0.9 * len(own) and spoken[NEW] < 0.1 * len(own), spoken


@pytest.mark.parametrize("replay", [0.0, 0.3, 1.0])
def test_replay_is_a_share_of_words_seen_before(script, replay):
    made = maker(script)
    mixture = made.mixture(NEW, words=20_000, replay=replay, replay_prompts=0.25, facts=0.1)
    seen = {
        next(stream)
        for kind in ("text", "prompts")
        for stream in [made.documents("base", kind, ENGLISH)]
        for _ in range(900)
    }
    english = [line for line in mixture if line in seen]
    count = lambda texts: sum(len(text.split()) for text in texts)  # noqa: E731
    assert count(english) / count(mixture) == pytest.approx(replay, abs=0.01)
    new = set(made.languages[NEW].particles.values())
    assert all(new & set(line.split()) for line in mixture if line not in seen)


def test_flags_reach_the_world(script, tmp_path):
    out = make(script, tmp_path / "w", "--order", "OSV", "--shared", 0.3, "--replay", 0.5, "--test-sentences", 30)
    config = json.loads((out / "world.json").read_text())["config"]
    assert config["languages"][NEW]["order"] == "OSV" and config["languages"][NEW]["shared"] == 0.3
    assert config["cpt"]["replay"] == 0.5
    assert len(lines(out / "test/qaa_Latn.txt")) == 30


def test_languages_can_be_added_and_left_out(script, tmp_path):
    two = make(script, tmp_path / "two", "--languages", "eng_Latn,qaa_Latn")
    assert {p.name for p in (two / "sib200").iterdir()} == {ENGLISH, NEW}
    assert not list((two / "base").glob("*qab*"))
    four = make(script, tmp_path / "four", "--languages", "eng_Latn,qab_Latn,qac_Latn,qaa_Latn")
    assert len(lines(four / "test/qac_Latn.txt")) == 80
    assert lines(two / "test/eng_Latn.txt") == lines(four / "test/eng_Latn.txt")


# ---- errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shared", "1.5"], "between 0 and 1"),
        (["--replay", "-0.1"], "between 0 and 1"),
        (["--languages", "eng_Latn"], "two or more languages"),
        (["--config", "nowhere.yaml"], "does not exist"),
    ],
)
def test_bad_input_writes_nothing(script, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        script.main(["--out", str(tmp_path / "w"), *flags])
    assert not list(tmp_path.iterdir())


def test_more_test_sentences_than_there_are(script, tmp_path):
    config = script.read_config(None)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"texts": dict.fromkeys(config["texts"], 0)}))
    with pytest.raises(InputError, match="different test sentences"):
        script.main(["--config", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "w"), "--test-sentences", "900"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_unknown_key(script, tmp_path):
    (tmp_path / "mine.yaml").write_text("texts: {generall: 0.5}\n")
    with pytest.raises(InputError, match=r"mine.yaml: unknown key texts.generall; did you mean texts.general\?"):
        script.main(["--config", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "w")])


def test_finished_world_is_kept_and_strangers_are_refused(script, world, tmp_path, capsys):
    out = make(script, tmp_path / "w")
    before = (out / "world.json").stat().st_mtime_ns
    make(script, out)
    assert "nothing to do" in capsys.readouterr().out and (out / "world.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"another request \(seed: 3 asked for, .* or --out a new folder"):
        make(script, out, "--seed", 3)
    (out / "world.json").unlink()  # unfinished: made again
    make(script, out)
    assert (out / "world.json").is_file()
    held, refused = load_script("cpt/runs.py").only_one(tmp_path / "w.partial", "written"), "written by another process"
    with held, pytest.raises(InputError, match=rf"w\.partial is being {refused}"):
        make(script, out, "--overwrite")
    assert script.claim(out, json.loads((out / "world.json").read_text())["config"], False) is False
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        make(script, out, "--overwrite")
    assert (out / "notes.txt").read_text() == "mine"


def test_killed_while_the_old_world_is_removed(script, tmp_path, monkeypatch):
    """What is left is no world, or a whole one: a folder without some of its files must not look finished."""
    out = make(script, tmp_path / "w")
    before = {path.relative_to(out) for path in out.rglob("*.txt")}
    removes = shutil.rmtree

    def killed(path, **how):
        if Path(path).exists():
            for victim in [*Path(path).rglob("*.txt")][:1]:
                victim.unlink()
            raise KeyboardInterrupt
        removes(path, **how)

    monkeypatch.setattr(script.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        make(script, out, "--overwrite")
    monkeypatch.undo()
    for flags in ((), ("--overwrite",)):
        make(script, out, *flags)
        assert {path.relative_to(out) for path in out.rglob("*.txt")} == before
    assert not out.with_name("w.partial").exists()
