"""Generate the demo world: texts in English and in invented languages about the same small world of meanings.

In:  a world file (demo/world.yaml: languages, seed, sizes, probabilities), demo/vocabulary.yaml, and flags for knobs.
Out: one folder with training documents by kind (one per line), parallel test sentences whose meanings occur in no
     training text, held-out documents, a classification task in SIB-200's format, facts told in one language and asked
     in another, the lexicon, world.json (settings, counts). The same seed gives the same bytes. See demo/README.md.

Full:  python demo/world.py --study demo/demo.yaml
Tiny:  python demo/world.py --study demo/tiny.yaml
Knobs: python demo/world.py --order SOV --shared 0.2 --replay 0 --seed 7 --out build/my-world
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from cpt_utils.base import cli, keys, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study

meanings, grammar = cli.sibling("demo/meanings.py"), cli.sibling("demo/grammar.py")
runs = cli.sibling("cpt/runs.py")

SCHEMA = "demo-world"
PARTS = ("base", "cpt", "test", "heldout", "lsn", "sib200", "facts.tsv", "lexicon.tsv", "world.json")
HERE = Path(__file__).resolve().parent
# The prompt of lm_eval_sib200, so that a base model of this size knows its format.
PROMPT = 'The category of "{text}" is: {label}'
FACTS = 4  # per document of facts


# ---- documents


class Maker:
    """Makes documents. Each kind has its own random stream, so its size does not affect the others."""

    def __init__(self, config: dict, vocabulary: dict):
        self.config, self.texts, self.seed = config, config["texts"], config["seed"]
        self.world = meanings.World(vocabulary, self.texts, self.seed)
        self.languages = grammar.make_languages(config["languages"], self.world.concepts(), self.seed)
        codes = list(self.languages)
        self.base, self.new = codes[0], codes[-1]
        names = grammar.coin_names(self.languages)
        self.all_facts = meanings.make_facts(self.world, codes, config["persons"], names, self.seed)

    def documents(self, phase: str, kind: str, code: str) -> Iterator[str]:
        """An endless stream of documents; `pairs` and `mixed` combine the language `code` and the base language."""
        draw = random.Random(f"{self.seed}/{phase}/{kind}/{code}")
        while True:
            yield getattr(self, kind)(draw, code)

    def text(self, draw: random.Random, code: str) -> str:
        return self.languages[code].say_all(self.world.passage(draw, self.world.label(draw)))

    def pairs(self, draw: random.Random, code: str) -> str:
        """Two sentences on one topic, each in both languages; some are facts told in both languages."""
        label, sentences, both = self.world.label(draw), [], [self.base, code]
        known = [fact for fact in self.all_facts if set(both) <= set(fact.told_in)]
        for _ in range(2):
            draw.shuffle(both)
            if known and draw.random() < self.texts["fact_pairs"]:
                fact = draw.choice(known)
                sentences += [self.languages[c].tell(fact) for c in both]
            else:
                sentence = self.in_contact(draw, label, code)
                sentences += [self.languages[c].say(sentence) for c in both]
        return " ".join(sentences)

    def in_contact(self, draw: random.Random, label: str, code: str):
        """A sentence whose people, actions, things and places are all contact words."""
        contact = self.languages[code].contact
        while True:
            sentence = self.world.sentence(draw, label)
            words = {w for c in sentence.clauses for w in (c.action, c.thing, c.place, None if c.named else c.person)}
            if words - {None} <= contact:
                return sentence

    def mixed(self, draw: random.Random, code: str) -> str:
        """A passage in the grammar of one language, with a share of the content words from the other.

        Words that are not contact words are always English: bilingual text carries no information about them.
        """
        spoken, lent = draw.sample([self.base, code], 2)
        contact, lexicon, share = self.languages[code].contact, self.languages[lent].lexicon, self.texts["borrowed"]

        def borrow(concept: str) -> str | None:
            if concept not in contact:
                return concept if spoken == code else None
            return lexicon[concept] if draw.random() < share else None

        return self.languages[spoken].say_all(self.world.passage(draw, self.world.label(draw)), borrow)

    def prompts(self, draw: random.Random, code: str) -> str:
        label = self.world.label(draw)
        text = self.languages[code].say(self.world.sentence(draw, label))
        return PROMPT.format(text=text, label=label)

    def facts(self, draw: random.Random, code: str) -> str:
        told = [fact for fact in self.all_facts if code in fact.told_in]
        return " ".join(map(self.languages[code].tell, draw.sample(told, min(FACTS, len(told)))))

    def mixture(self, code: str, words: float, replay: float, replay_prompts: float, facts: float) -> list[str]:
        """The documents of continued pre-training on a language, `words` words including replayed base documents.

        `replay` is a share of all words, `replay_prompts` of the replay, `facts` of the language's text. Each next
        document is of the kind that is furthest behind its share.
        """
        # The streams of the base phase from their start: replayed documents have been seen, word for word.
        streams = {
            "text": (self.documents("cpt", "text", code), (1 - replay) * (1 - facts)),
            "facts": (self.documents("cpt", "facts", code), (1 - replay) * facts),
            "replay": (self.documents("base", "text", self.base), replay * (1 - replay_prompts)),
            "prompts": (self.documents("base", "prompts", self.base), replay * replay_prompts),
        }
        used, lines = dict.fromkeys(streams, 0), []
        while (total := sum(used.values())) < words:
            kind = max(streams, key=lambda k: streams[k][1] * (total + 1) - used[k])
            lines.append(next(streams[kind][0]))
            used[kind] += len(lines[-1].split())
        return lines

    def test(self, n: int) -> list:
        """`n` sentences that share no clause and differ from each other in every language.

        Raises:
            InputError: the world does not have that many.
        """
        draw = random.Random(f"{self.seed}/test")
        sentences, clauses, texts = [], set(), set()
        misses = 0  # in a row
        while len(sentences) < n and misses < 2000:
            misses += 1
            sentence = self.world.sentence(draw, self.world.label(draw))
            new = {(code, language.say(sentence)) for code, language in self.languages.items()}
            if clauses.isdisjoint(sentence.clauses) and texts.isdisjoint(new):
                sentences.append(sentence)
                clauses |= set(sentence.clauses)
                texts |= new
                misses = 0
        if misses:
            raise InputError(f"this world has only {len(sentences)} different test sentences; lower test_sentences")
        return sentences

    def heldout(self, n: int) -> list[list]:
        draw = random.Random(f"{self.seed}/heldout")
        return [self.world.passage(draw, self.world.label(draw)) for _ in range(n)]

    def task(self, sizes: dict[str, int]) -> dict[str, list[tuple]]:
        """Rows (index_id, category, sentence) of each split, for all languages; unordered ids, as in SIB-200."""
        draw = random.Random(f"{self.seed}/task")
        total = sum(sizes.values())
        ids = iter(draw.sample(range(2 * total), total))
        rows = {}
        for split, n in sizes.items():
            labels = [self.world.label(draw) for _ in range(n)]
            rows[split] = [(next(ids), label, self.world.sentence(draw, label)) for label in labels]
        return rows

    def questions(self) -> list[dict]:
        """Every fact as a question in every language: those it was told in (to test memory) and those it was not."""
        draw = random.Random(f"{self.seed}/questions")
        options: dict[str, list[str]] = {}
        for fact in self.all_facts:
            options.setdefault(fact.relation, []).append(fact.answer)
        options = {relation: sorted(set(answers)) for relation, answers in options.items()}
        rows = []
        for number, fact in enumerate(self.all_facts):
            choices = draw.sample(options[fact.relation], len(options[fact.relation]))
            for code, language in self.languages.items():
                row = {
                    "fact_id": number,
                    "relation": fact.relation,
                    "told_in": ",".join(fact.told_in),
                    "asked_in": code,
                }
                row |= {"question": language.question(fact), "answer": language.word(fact.answer)}
                rows.append(row | {"choices": "|".join(map(language.word, choices))})
        return rows


# ---- files


def write_world(config: dict, vocabulary: dict, out: Path) -> dict:
    """Write all files except world.json to the new folder `out`; return the contents of world.json."""
    maker = Maker(config, vocabulary)
    counts: dict[str, dict] = {}

    def put(name: str, lines: list[str]) -> None:
        file = out / name
        file.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(line + "\n" for line in lines)
        file.write_bytes(text.encode())
        counts[name] = {"lines": len(lines), "words": len(text.split())}

    test = maker.test(config["test_sentences"])
    maker.world.reserve(test)
    task = maker.task(config["task"])
    maker.world.reserve([sentence for _, _, sentence in task["test"]])
    heldout = maker.heldout(config["heldout_documents"])
    for code, language in maker.languages.items():
        put(f"test/{code}.txt", [language.say(sentence) for sentence in test])
        put(f"heldout/{code}.txt", [language.say_all(passage) for passage in heldout])
        order = random.Random(f"{config['seed']}/task/{code}")
        for split, rows in task.items():
            shuffled = order.sample(rows, len(rows))
            lines = [f"{number}\t{label}\t{language.say(sentence)}" for number, label, sentence in shuffled]
            put(f"sib200/{code}/{split}.tsv", ["index_id\tcategory\ttext", *lines])
    for kind, codes in config["base"].items():
        for code, n in codes.items():
            if code in maker.languages:
                count = max(1, round(n * config["scale"]))
                put(f"base/{kind}.{code}.txt", list(islice(maker.documents("base", kind, code), count)))
    for code in maker.languages:
        count = max(1, round(config["lsn_documents"] * config["scale"]))
        put(f"lsn/{code}.txt", list(islice(maker.documents("lsn", "text", code), count)))
    cpt = config["cpt"]
    for code in (maker.new, *[code for code in cpt["others"] if code in maker.languages and code != maker.new]):
        name = "cpt/mixture.txt" if code == maker.new else f"cpt/mixture.{code}.txt"
        words = cpt["words"] * config["scale"]
        put(name, maker.mixture(code, words, cpt["replay"], cpt["replay_prompts"], cpt["facts"]))
    rows = maker.questions()
    put("facts.tsv", ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)])
    words = ["\t".join(x.word(concept) for x in maker.languages.values()) for concept in maker.world.concepts()]
    put("lexicon.tsv", ["\t".join(maker.languages), *words])
    invented = {code: x for code, x in maker.languages.items() if code != maker.base}
    particles = {code: {"particles": x.particles, "endings": x.endings} for code, x in invented.items()}
    return {"config": config, "labels": maker.world.labels, "grammar": particles, "files": counts}


# ---- settings


def read_config(path: Path | None) -> dict:
    """demo/world.yaml, overridden by the file at `path`, whose `languages` and `base` replace the defaults entirely."""
    default_path = HERE / "world.yaml"
    config = read_yaml(default_path)
    overrides = read_yaml(path) if path else {}
    for key, value in overrides.items():
        default = config.get(key)
        replace = key in ("languages", "base") or not isinstance(value, dict) or not isinstance(default, dict)
        config[key] = value if replace else {**default, **value}
    return checked(config, path or default_path)


def checked(config: dict, where) -> dict:
    """`config` after checking every key; InputError names a wrong key and `where` it is."""
    keys.check(cli.sibling("demo/keys.py").World, config, where)
    return config


def read_yaml(path: Path) -> dict:
    missing = "give --config a world file such as demo/world.yaml"
    return keys.read(path, missing, "demo/world.yaml shows what a world file may hold")


def settings(config: dict, args, seed: int | None) -> dict:
    """`config` overridden by the command line, checked.

    Raises:
        InputError: a wrong word order or size, a share outside 0 to 1, a duplicate language, or fewer than two.
    """
    config = {**config, "cpt": dict(config["cpt"])}
    for key, flag in (("seed", seed), ("scale", args.scale), ("test_sentences", args.test_sentences)):
        config[key] = config[key] if flag is None else flag
    if args.replay is not None:
        config["cpt"]["replay"] = args.replay
    codes = args.languages or list(config["languages"])
    if len(codes) < 2 or len(set(codes)) < len(codes):
        raise InputError("a world needs two or more languages, each once: the base language first, the new one last")
    config["languages"] = {code: {**grammar.DEFAULTS, **(config["languages"].get(code) or {})} for code in codes}
    new = config["languages"][codes[-1]]
    for key in ("order", "shared", "contact"):
        new[key] = new[key] if getattr(args, key) is None else getattr(args, key)
    return checked(config, "the flags")


def claim(out: Path, config: dict, overwrite: bool) -> bool:
    """Whether `out` has to be written; False if it already holds exactly this world.

    Raises:
        InputError: `out` holds another world, or files that are not part of a world.
    """
    if not out.exists():
        return True
    foreign = sorted(path.name for path in out.iterdir() if path.name not in PARTS) if out.is_dir() else [out.name]
    if foreign:
        raise InputError(f"{out} holds {foreign[0]}, which is not part of a world; give --out a new folder")
    path = out / "world.json"
    return not results.finished(path, SCHEMA, config, "--out a new folder", overwrite, lambda world: world["config"])


def build_parser():
    p = cli.parser(__doc__)  # plain defaults ("default 0.6") are the values in demo/world.yaml
    p.add_argument("--config", metavar="FILE", help="world file; default: the study's train.world, or demo/world.yaml")
    p.add_argument("--out", "--output", metavar="FOLDER", help="folder to write; default: out of the world file")
    text = "language codes, the base language first, the new one last; default: those of the world file"
    p.add_argument("--languages", metavar="C,C,..", type=lambda text: text.split(","), help=text)
    p.add_argument("--order", choices=grammar.ORDERS, help="word order of the new language; default VSO")
    p.add_argument("--shared", type=float, metavar="X", help="share of its words that are English, 0 to 1; default 0")
    p.add_argument("--contact", type=float, metavar="X", help="share of its words in bilingual base texts; default 0.6")
    p.add_argument("--replay", type=float, metavar="X", help="share of English in the words of CPT; default 0.2")
    p.add_argument("--scale", type=float, metavar="X", help="factor on the amount of training text; default 1")
    p.add_argument("--test-sentences", type=cli.positive, metavar="N", help="parallel test sentences; default 600")
    return p


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    path = study.value(args.config, "--config", "train.world", None)
    config = settings(read_config(Path(path) if path else None), args, study.get("seed"))
    out = Path(args.out or config["out"].replace("{seed}", str(config["seed"])))
    del config["out"]
    if not claim(out, config, args.overwrite):
        cli.say(f"{out} already holds this world; nothing to do (--overwrite makes it again)")
        return
    partial = out.with_name(out.name + ".partial")
    try:
        with runs.only_one(partial, "written"):
            new, old = partial / "new", partial / "old"
            for leftover in (new, old):  # of a killed call
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                facts = write_world(config, read_yaml(HERE / "vocabulary.yaml"), new)
                results.write_json(new / "world.json", facts, results.header(SCHEMA, seed=config["seed"]))
                if out.exists():
                    # If this call were killed while deleting file by file, the next one would take `out` for complete.
                    out.rename(old)
                new.replace(out)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; is the disk full?") from error
    words = {
        part: sum(n["words"] for name, n in facts["files"].items() if name.startswith(part)) for part in ("base", "cpt")
    }
    cli.say(
        f"{out}: {', '.join(config['languages'])} (seed {config['seed']}); {words['base']:,} words for the base, "
        f"{words['cpt']:,} for CPT, {config['test_sentences']} test sentences, {config['task']['test']} task texts"
    )


if __name__ == "__main__":
    cli.run(main)
