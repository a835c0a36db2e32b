"""Make training documents for one or more language pairs from parallel and monolingual lines.

Three kinds: `monolingual` (lines of one language), `pairs` (a line and its translation) and `mixed` (lines of one
language with words replaced by their translations, using a word lexicon learned from the parallel lines alone).

In:  a documents file (YAML, see cpt/README.md), or two line-aligned files and flags.
Out: OUT/<name>.txt, one document per line; OUT/lexicon.<a>-<b>.tsv; last OUT/documents.json (counts, lines used).

Full:  MULTI30K_DIR=path/to/captions python cpt/documents.py --config studies/multi30k/documents.yaml --seed 0
Tiny:  python cpt/documents.py --parallel en=a.txt ga=b.txt --parallel-lines 500 --output-dir build/documents
"""

from __future__ import annotations

import functools
import json
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

from cpt_utils.base import cli, keys, languages, results, study, textfiles
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np
from cpt_utils.measures import curves

packing = cli.sibling("cpt/packing.py")
runs = cli.sibling("cpt/runs.py")

SCHEMA = "cpt-documents"
NULL = ""  # the empty word of IBM model 1: the source of target words that translate nothing


@functools.lru_cache(maxsize=1)
def word_pattern() -> re.Pattern:
    """Words: the longest runs of letters, marks and digits of any script (`\\w` lacks the marks)."""
    ranges = curves.blocks([code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] in "LMN"])
    return re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges) + "]+")


def words(line: str) -> list[str]:
    return word_pattern().findall(line.lower())


def ibm1(source: list[list[str]], target: list[list[str]], iterations: int = 10) -> dict[str, dict[str, float]]:
    """IBM model 1 (Brown et al. 1993, section 4.1): translation probabilities t(target word | source word) by EM.

    Each target word comes from one word of the source line or from NULL, all equally likely; t starts uniform over the
    target words that co-occur with the source word.

    Args:
        source, target: aligned lines as lists of words.

    Returns:
        For each source word (NULL is the empty string), its target words and their probabilities.
    """
    source = [[NULL, *line] for line in source]
    source_names, source_ids = _number(source)
    target_names, target_ids = _number(target)
    # One entry per (source position, target position) in a line; `slot` numbers the target positions of all lines.
    left, right, slot = [], [], []
    positions = 0
    for s, t in zip(source_ids, target_ids, strict=True):
        left.append(np.tile(s, len(t)))
        right.append(np.repeat(t, len(s)))
        slot.append(np.repeat(np.arange(positions, positions + len(t)), len(s)))
        positions += len(t)
    if not positions:
        return {}
    slot = np.concatenate(slot)
    pairs, entry = np.unique(
        np.concatenate(left).astype(np.int64) * len(target_names) + np.concatenate(right), return_inverse=True
    )
    pair_source, pair_target = np.divmod(pairs, len(target_names))
    t = 1.0 / np.bincount(pair_source)[pair_source]
    for _ in range(iterations):
        likelihood = t[entry]
        share = likelihood / np.bincount(slot, weights=likelihood, minlength=positions)[slot]
        count = np.bincount(entry, weights=share, minlength=len(pairs))
        t = count / np.bincount(pair_source, weights=count)[pair_source]
    table: dict[str, dict[str, float]] = {name: {} for name in source_names}
    for s, v, p in zip(pair_source.tolist(), pair_target.tolist(), t.tolist(), strict=True):
        table[source_names[s]][target_names[v]] = p
    return table


def _number(lines: list[list[str]]) -> tuple[list[str], list[np.ndarray]]:
    ids: dict[str, int] = {}
    numbered = [np.array([ids.setdefault(word, len(ids)) for word in line], dtype=np.int64) for line in lines]
    return list(ids), numbered


def learn_lexicon(
    a: list[str], b: list[str], iterations: int = 10, min_count: int = 2, min_probability: float = 0.2
) -> dict[str, str]:
    """Word pairs (word of a -> word of b) with a clear best translation in both directions.

    A pair (v, w) is kept if v and w are each other's most probable translation, both probabilities are at least
    `min_probability`, both words occur at least `min_count` times, and they differ. So every word has at most one
    partner, and the inverse of the lexicon is the lexicon of the other direction.
    """
    lines_a, lines_b = [words(line) for line in a], [words(line) for line in b]
    forward, backward = ibm1(lines_a, lines_b, iterations), ibm1(lines_b, lines_a, iterations)
    count_a, count_b = Counter(w for line in lines_a for w in line), Counter(w for line in lines_b for w in line)
    best = {v: max(t, key=t.get) for v, t in backward.items() if t and v != NULL}
    lexicon = {}
    for v, t in forward.items():
        if v == NULL or not t or count_a[v] < min_count:
            continue
        w = max(t, key=t.get)
        if v != w and best.get(w) == v and count_b[w] >= min_count and min(t[w], backward[w][v]) >= min_probability:
            lexicon[v] = w
    return lexicon


def mix(line: str, lexicon: dict[str, str], probability: float, rng) -> tuple[str, int, int]:
    """`line` with each word in the lexicon replaced with `probability`, keeping capitals.

    Returns:
        The new line, its number of words, and the number replaced.
    """
    total = replaced = 0

    def change(match: re.Match) -> str:
        nonlocal total, replaced
        total += 1
        word = match[0]
        translation = lexicon.get(word.lower())
        # Draw for every word, so that a longer lexicon does not shift the draws of later words.
        if rng.random() >= probability or translation is None:
            return word
        replaced += 1
        if word.isupper() and len(word) > 1:
            return translation.upper()
        return translation[:1].upper() + translation[1:] if word[:1].isupper() else translation

    return word_pattern().sub(change, line), total, replaced


def joined(lines: list[str]) -> str:
    """Lines as one document on one line."""
    return " ".join(lines)


def monolingual_documents(lines: list[str], size: int, passes: int, rng) -> list[str]:
    """Documents of `size` lines, drawn without replacement in a new order in each pass, whose last may be shorter."""
    documents = []
    for _ in range(passes):
        order = rng.permutation(len(lines)).tolist()
        documents += [joined([lines[i] for i in order[start : start + size]]) for start in range(0, len(order), size)]
    return documents


def pair_documents(a: list[str], b: list[str], size: int, passes: int, rng) -> list[str]:
    """Documents of `size` translation pairs; which language comes first is random for each document."""
    documents = []
    for _ in range(passes):
        order = rng.permutation(len(a)).tolist()
        for start in range(0, len(order), size):
            first, second = (a, b) if rng.random() < 0.5 else (b, a)
            documents.append(joined([text for i in order[start : start + size] for text in (first[i], second[i])]))
    return documents


def mixed_documents(
    a: list[str], b: list[str], lexicon: dict[str, str], size: int, probability: float, passes: int, rng
) -> tuple[list[str], dict]:
    """Code-mixed documents of `size` lines: every line once per language and pass, with new random replacements."""
    inverse = {w: v for v, w in lexicon.items()}
    documents, total, replaced = [], 0, 0
    for _ in range(passes):
        for lines, table in ((a, lexicon), (b, inverse)):
            order = rng.permutation(len(lines)).tolist()
            for start in range(0, len(order), size):
                mixed = [mix(lines[i], table, probability, rng) for i in order[start : start + size]]
                documents.append(joined([text for text, _, _ in mixed]))
                total += sum(n for _, n, _ in mixed)
                replaced += sum(n for _, _, n in mixed)
    order = rng.permutation(len(documents)).tolist()
    return [documents[i] for i in order], {"words": total, "words_replaced": replaced}


def read_lines(spec, language: str) -> list[str]:
    """The lines of a file (see `textfiles`), several files, or hub data (the keys of `Hub` in cpt/keys.py, and column).

    White space inside a line becomes single spaces. Empty lines stay, because parallel lines are aligned by number; a
    null counts as an empty line.
    """
    values = {"name": language, "weight": 1}
    if isinstance(spec, dict):
        values |= {"column": spec.get("column", "text")}
        values["hub"] = {key: value for key, value in spec.items() if key != "column"}
    else:
        values["files"] = spec
    rows = list(packing.Source.parse(values, "documents").rows())
    textfiles.say_nulls(sum(pieces.count(None) for pieces in rows), f"text of {language}")
    return [" ".join(textfiles.joined(pieces).split()) for pieces in rows]


def read_parallel(files: dict) -> tuple[dict[str, list[str]], list[int]]:
    """Line-aligned texts by language, and the number (from 0) of each line in its file.

    Lines that are empty in any language are dropped from all.
    """
    texts = {language: read_lines(spec, language) for language, spec in files.items()}
    lengths = {language: len(lines) for language, lines in texts.items()}
    if len(set(lengths.values())) > 1:
        have = ", ".join(f"{language} {n}" for language, n in lengths.items())
        raise InputError(f"the parallel texts must be aligned line by line, but their numbers of lines differ: {have}")
    numbers = [i for i, row in enumerate(zip(*texts.values(), strict=True)) if all(row)]
    if not numbers:
        raise InputError(f"the parallel texts ({', '.join(texts)}) have no line that is present in all languages")
    return {language: [lines[i] for i in numbers] for language, lines in texts.items()}, numbers


def as_ranges(numbers: list[int]) -> str:
    """Sorted numbers as text: `[0, 1, 2, 5]` -> `"0-2,5"`."""
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in curves.blocks(numbers))


def read_config(path: Path | None, given: dict, seed: int | None) -> dict:
    """The documents file with flags applied, defaults filled in and every document kind checked."""
    models, where = cli.sibling("cpt/keys.py"), path or Path("flags")
    config = keys.read(path, "give --config the path of a YAML file", "see cpt/README.md") if path else {}
    config |= {key: value for key, value in given.items() if value is not None}
    if seed is None:
        seed = 42 if config.get("seed") is None else config["seed"]
    config = runs.expand(config, seed, where) | {"seed": seed}
    if not config.get("documents") and isinstance(config.get("parallel"), dict):
        languages, more = list(config["parallel"]), config.get("monolingual") or {}
        config["documents"] = default_documents(languages, sorted({*languages, *more}))
    checked = keys.check(models.Documents, config, where)
    config["lexicon"] = models.Lexicon.defaults() | (config.get("lexicon") or {})
    config["documents"] = [
        type(plan).defaults() | values | {"name": plan.called}
        for plan, values in zip(checked.documents, config["documents"], strict=True)
    ]
    return config


def default_documents(parallel: list[str], known: list[str]) -> list[dict]:
    """Every kind for every language and every pair with the first language."""
    plans: list[dict] = [{"name": language, "kind": "monolingual", "language": language} for language in known]
    for other in parallel[1:]:
        pair = [parallel[0], other]
        plans += [
            {"name": f"pairs.{pair[0]}-{other}", "kind": "pairs", "languages": pair},
            {"name": f"mixed.{pair[0]}-{other}", "kind": "mixed", "languages": pair},
        ]
    return plans


def split_lines(config: dict, available: int) -> dict[str, list[int]]:
    """Disjoint seeded sets of line numbers, `parallel` and `monolingual`, each in increasing order."""
    n_parallel = config.get("parallel_lines") or available // 2
    if n_parallel > available:
        raise InputError(f"parallel_lines is {n_parallel}, but there are {available} lines present in all languages")
    order = np.random.default_rng([config["seed"], 0]).permutation(available).tolist()
    rest = order[n_parallel:]
    wanted = config.get("monolingual_lines") or len(rest)
    all_replaced = set(config.get("monolingual") or {}) >= set(config["parallel"])
    if wanted > len(rest) and not all_replaced:
        raise InputError(
            f"monolingual_lines is {wanted}, but {n_parallel} parallel lines leave only {len(rest)} of {available}"
        )
    return {"parallel": sorted(order[:n_parallel]), "monolingual": sorted(rest[:wanted])}


def make(config: dict) -> dict:
    """Write every documents file of `config`; returns the contents of documents.json."""
    out = Path(config["output"])
    texts, numbers = read_parallel(config["parallel"])
    used = split_lines(config, len(numbers))
    parallel = {language: [lines[i] for i in used["parallel"]] for language, lines in texts.items()}
    monolingual = {language: [lines[i] for i in used["monolingual"]] for language, lines in texts.items()}
    extra = config.get("monolingual") or {}
    for language, spec in extra.items():
        monolingual[language] = [line for line in read_lines(spec, language) if line]
    lexicons: dict[tuple, dict] = {}
    facts: dict[str, dict] = {}
    for number, plan in enumerate(cli.progress(config["documents"], "documents", unit="file"), 1):
        rng = np.random.default_rng([config["seed"], number])
        counts: dict = {}
        if plan["kind"] == "monolingual":
            lines = monolingual[plan["language"]]
            if not lines:
                raise InputError(f"{plan['name']}: the parallel lines leave no other line; lower parallel_lines")
            documents = monolingual_documents(lines, plan["lines"], plan["passes"], rng)
        else:
            pair = tuple(plan["languages"])
            a, b = (parallel[language] for language in pair)
            if plan["kind"] == "pairs":
                documents = pair_documents(a, b, plan["pairs"], plan["passes"], rng)
            else:
                if pair not in lexicons:
                    lexicons[pair] = save_lexicon(a, b, pair, config["lexicon"], out)
                documents, counts = mixed_documents(
                    a, b, lexicons[pair], plan["lines"], plan["probability"], plan["passes"], rng
                )
        write_lines(out / f"{plan['name']}.txt", documents)
        facts[plan["name"]] = {**plan, "documents": len(documents), **counts}
    return {
        "documents": facts,
        "lexicon": {"-".join(pair): len(lexicon) for pair, lexicon in lexicons.items()},
        "lines_available": len(numbers),
        "lines_used": {part: as_ranges([numbers[i] for i in lines]) for part, lines in used.items()},
        "lines_of_other_texts": {language: len(monolingual[language]) for language in extra},
    }


def save_lexicon(a: list[str], b: list[str], pair: tuple, settings: dict, out: Path) -> dict[str, str]:
    """Learn the lexicon of a language pair and write it in two tab-separated columns."""
    lexicon = learn_lexicon(a, b, **settings)
    name = "-".join(pair)
    if not lexicon:
        raise InputError(
            f"no word pair of {name} is clear enough in {len(a)} parallel lines; give more lines, or lower "
            "lexicon.min_count or lexicon.min_probability (words are runs of letters: segment scripts without spaces)"
        )
    write_lines(out / f"lexicon.{name}.tsv", (f"{v}\t{w}" for v, w in sorted(lexicon.items())))
    return lexicon


def settings_of(config: dict) -> dict:
    """Everything that determines the documents, without the location of the texts."""

    def identity(spec):
        if isinstance(spec, dict):
            return spec
        files = [Path(file) for file in ([spec] if isinstance(spec, str) else spec)]
        for file in files:
            textfiles.check(file)
        return [packing.fingerprint(file) for file in files]

    settings = {key: value for key, value in config.items() if key != "output"}
    for key in ("parallel", "monolingual"):
        settings[key] = {language: identity(spec) for language, spec in (config.get(key) or {}).items()}
    return json.loads(json.dumps(settings))


def write_lines(path: Path, lines) -> None:
    with results.replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)


def language_files(items: list[str] | None, flag: str) -> dict[str, str] | None:
    """`["en=a.txt", ...]` as a mapping."""
    if not items:
        return None
    if bad := [item for item in items if not re.fullmatch(r"[^=]+=.+", item)]:
        raise InputError(f"{flag} {bad[0]}: write LANGUAGE=FILE, e.g. en=train.en.gz")
    pairs = [item.split("=", 1) for item in items]
    languages.refuse_twice([lang for lang, _ in pairs], f"give {flag} each once")
    return dict(pairs)


def build_parser():
    p = cli.parser(__doc__)
    text = "documents file (YAML); default: the study's train.documents, if any"
    p.add_argument("--config", metavar="FILE", help=text)
    p.add_argument("--parallel", nargs="+", metavar="LANG=FILE", help="line-aligned files, two languages or more")
    text = "monolingual text of each language; default: the lines not used as parallel"
    p.add_argument("--monolingual", nargs="+", metavar="LANG=FILE", help=text)
    text = "lines used as parallel text; default: half of them"
    p.add_argument("--parallel-lines", type=cli.positive, metavar="N", help=text)
    text = "number of the other lines to use; default: all"
    p.add_argument("--monolingual-lines", type=cli.positive, metavar="N", help=text)
    text = "folder of the documents; default: output of the documents file"
    p.add_argument("--output-dir", "--output", metavar="OUT", help=text)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    path = args.config
    if path is None and args.parallel is None:
        the_study = study.Study.find(args.study, args.seed, args.arm)
        path = the_study.value(None, "--config or --parallel", "train.documents")
        args.seed = args.seed if args.seed is not None else the_study.get("seed")
    given = {key: language_files(getattr(args, key), f"--{key}") for key in ("parallel", "monolingual")}
    given |= {key: getattr(args, key) for key in ("parallel_lines", "monolingual_lines")} | {"output": args.output_dir}
    config = read_config(Path(path) if path else None, given, args.seed)
    record = Path(config["output"]) / "documents.json"
    settings = settings_of(config)
    hint = "another --output-dir"
    if results.finished(record, SCHEMA, settings, hint, args.overwrite, lambda old: old.get("settings")):
        cli.say(f"{record} exists; nothing to do (--overwrite makes the documents again)")
        return
    facts = make(config)
    results.write_json(record, {**facts, "settings": settings}, results.header(SCHEMA, seed=config["seed"]))
    for name, values in facts["documents"].items():
        cli.say(f"  {name}: {values['documents']:,} documents")
    for pair, size in facts["lexicon"].items():
        cli.say(f"  lexicon {pair}: {size:,} word pairs")


if __name__ == "__main__":
    cli.run(main)
