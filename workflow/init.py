"""Writes a study file: finds models and texts, asks for everything that it cannot find, and checks the study.

Without a terminal nothing is asked: a value without a flag is taken from the current folder if there is exactly one
candidate; otherwise the command ends and names the flag. docs/study.md explains every key.

In:   your models and texts, below the current folder or anywhere else.
Out:  STUDY, which workflow/check.py accepts; no file is written if an input is wrong.

    python -m cpt_utils.base.study --init basque.yaml
    python -m cpt_utils.base.study --init basque.yaml --base my-models/base --run my-models/cpt --languages en,eu --pairs my-texts/pairs.tsv
"""  # noqa: E501

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cpt_utils.base import cli, languages, results, sources
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study, as_yaml
from cpt_utils.checkpoints import formats, refs, step_names
from cpt_utils.measures import evaluation

check = cli.sibling("workflow/check.py")

CONFIGS = ("config.json", formats.ADAPTER_CONFIG)
DEPTH, TABLES = 3, (".tsv", ".tsv.gz")
KINDS = "two files of text, a .tsv, a folder of SIB-200 or FLORES+, or flores or sib200 for the hub"
CONTROLS = 99  # random sets: the smallest possible p is .01
TOKENS = 10_000_000
HEAD = """\
# Written by python -m cpt_utils.base.study --init. Every key: docs/study.md. Then:
#   make check STUDY={file}
#   make reproduce STUDY={file}
"""


# ---------------------------------------------------------------- models and texts here


@dataclass
class Found:
    """Contents of a folder, as relative paths: models that are not checkpoints, runs, text files."""

    models: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def look(folder: str = ".") -> Found:
    """Models, runs and texts in `folder` and up to DEPTH levels below it; skips hidden folders, results, and folders
    with code."""
    found = Found()
    for parent, below, files in os.walk(folder):
        depth = len(Path(parent).relative_to(folder).parts)
        models = [name for name in below if any((Path(parent) / name / config).is_file() for config in CONFIGS)]
        steps = step_names.steps_of(models)
        below[:] = sorted(
            name for name in below
            if not name.startswith(".") and name not in (*steps, "results") and depth < DEPTH
            and not any((Path(parent) / name).glob("*.py"))
        )  # fmt: skip
        name = os.path.relpath(parent, folder)
        if steps:
            found.runs.append(name)
        elif {*CONFIGS} & {*files}:
            found.models.append(name)
        else:
            ends = (".txt", ".txt.gz", *TABLES)
            found.texts += [os.path.normpath(os.path.join(name, file)) for file in sorted(files) if file.endswith(ends)]
    return found


def pairs_among(texts: list[str], base: str, target: str) -> list[str]:
    """Candidates for --pairs: files whose names differ only in the language code, and tables."""

    def with_code(file: str, code: str, other: str) -> str:
        return re.sub(rf"(?<![^\W_]){re.escape(code)}(?![^\W_])", other, file)

    others = {file: with_code(file, base, target) for file in texts}
    alike = [shlex.join([file, other]) for file, other in others.items() if other != file and other in texts]
    return [*alike, *(shlex.quote(file) for file in texts if file.endswith(TABLES))]


# ---------------------------------------------------------------- questions


def answer(asks: bool, flag: str, given, what: str, guesses: list[str], use: Callable, optional: bool = False):
    """`use(text)` of the flag's value, else of the answer to a question, else of the only guess. If `use` refuses an
    answer, the question is repeated. `what` describes the value and, after a colon, its form."""
    while True:
        text = given
        if text is None and asks:
            text = _asked(flag, what, guesses, optional)
        elif text is None and not optional:
            if len(guesses) != 1:
                name, _, form = what.partition(": ")
                there = f"; here are {', '.join(guesses[:6])}" if guesses else ""
                raise InputError(f"missing {name}: give {flag}{form and f' ({form})'}{there}")
            text = guesses[0]
            cli.say(f"{flag} {text}: the only one here")
        if not text and optional:
            return {}
        try:
            return use(text)
        except InputError as error:
            if given is not None or not asks:
                raise
            cli.say(f"  {error}")


def _asked(flag: str, what: str, guesses: list[str], optional: bool) -> str:
    """The user's input; a number selects a guess, and Enter the only guess."""
    cli.say(f"\n{what[0].upper()}{what[1:]}{' (Enter: none)' if optional else ''}")
    for number, guess in enumerate(guesses[:9], 1):
        cli.say(f"  {number}  {guess}")
    while True:
        try:
            text = input(f"{flag} {f'[{guesses[0]}] ' if len(guesses) == 1 else ''}").strip()
        except EOFError:
            raise InputError(f"no answer: give {flag}") from None
        if text.isdecimal() and 1 <= int(text) <= min(9, len(guesses)):
            return guesses[int(text) - 1]
        text = re.sub(r"(?<![^ =])~(?=/)", os.path.expanduser("~"), text)
        if text or optional or len(guesses) == 1:
            return text or ("" if optional else guesses[0])
        cli.say("  an answer is needed here (Ctrl-C ends without a file)")


# ---------------------------------------------------------------- answers


def base_model(text: str) -> check.Model:
    model = check.look_at(refs.model(text))
    cli.say(f"  {check.described(model)}")
    return model


def run_of(text: str, base: check.Model) -> str | list[str]:
    """The run as written in the study, after checking every checkpoint against the base."""
    words = _words(text)
    run = refs.run(words)
    if os.path.realpath(run[-1].spec) == os.path.realpath(base.ref.spec):
        raise InputError(f"{text} is the base itself; give the folder of its checkpoints")
    for ref in run:
        check.check_pair(base, check.look_at(ref, base.ref))
    cli.say(f"  {len(run)} checkpoint{'s' * (len(run) > 1)}, of step {', '.join(str(ref.step) for ref in run)}")
    return words if len(words) > 1 else words[0]


def two_languages(text: str) -> tuple[str, str]:
    codes = languages.several(text, "--languages")
    if len(codes) != 2:
        raise InputError(f"--languages {text}: two are needed, base and target, like eng_Latn,eus_Latn")
    for code in codes:
        try:
            languages.canonical(code)
        except InputError as error:
            cli.warn(f"{error}; it is used as your own tag")
    return codes[0], codes[1]


def parallel(text: str, base: str, target: str) -> dict:
    """The keys of `data` for parallel sentences, given as a source's name, a folder, a table, or two files."""
    words = _words(text)
    first = words[0]
    tables = [word for word in words if word.rpartition(":")[0].endswith(TABLES) or word.endswith(TABLES)]
    if text in ("flores", "sib200"):
        data = {"source": text}
    elif len(words) == 1 and Path(first).is_dir():
        data = {"source": "sib200" if any(Path(first).glob("*/test.tsv")) else "flores", "dir": first}
    elif len(words) == 2 and not tables:
        data = {"source": "text", "base_file": first, "target_file": words[1]}
    elif len(words) < 3 and len(tables) == len(words):
        data = {"source": "tsv", **dict(zip(("base_file", "target_file"), words, strict=False))}
    else:
        raise InputError(f"--pairs {text}: give {KINDS}")
    options = {key: value for key, value in data.items() if key != "source"}
    try:
        pairs = sources.parallel(data["source"], base, target, **options)
    except InputError as error:
        is_folder = data["source"] == "flores" and "dir" in data
        hint = "; for a folder of your own texts, name the two files" if is_folder else ""
        raise InputError(f"{error}{hint}") from None
    cli.say(f"  {pairs.summary()}")
    if data["source"] == "sib200" and "dir" in data:
        data["task"] = {"name": f"sib200_{pairs.facts['target']['spelling']}", "dir": first}
    return data


def texts_by_language(text: str, flag: str, hub: bool = False) -> dict[str, str | None]:
    """LANG=FILE .. as a mapping to checked text files; with `hub`, a language alone means mOSCAR."""
    words = _words(text)
    alone = [word for word in words if "=" not in word] if hub else []
    files = cli.sibling("cpt/documents.py").language_files([word for word in words if word not in alone], flag) or {}
    for file in files.values():
        evaluation.documents(Path(file), 1)
    languages.refuse_twice([*files, *alone])
    return {**files, **dict.fromkeys(alone)}


def neurons(text: str, target: str) -> dict[str, str | None]:
    texts = texts_by_language(text, "--neurons", hub=True)
    if texts and (len(texts) < 2 or languages.find(texts, target, default=None) is None):
        raise InputError(f"--neurons {text}: name {target} and at least one other language")
    return texts


# ---------------------------------------------------------------- the command


def study_of(args, asks: bool) -> dict:
    """The values of the study, each of them checked."""
    found = look()
    base = answer(asks, "--base", args.base, "the model before CPT", found.models, base_model)
    run = answer(asks, "--run", _joined(args.run), "its checkpoints", found.runs, lambda text: run_of(text, base))
    codes = "the languages of base and CPT: codes of FLORES+ or ISO, like eng_Latn,eus_Latn or en,eu"
    pair = answer(asks, "--languages", args.languages, codes, [], two_languages)
    kinds = f"the parallel sentences: {KINDS}"
    guesses = pairs_among(found.texts, *pair)
    data = answer(asks, "--pairs", _joined(args.pairs), kinds, guesses, lambda text: parallel(text, *pair))
    what = "held-out text, not used for training, for losses and samples: LANG=FILE .., one document per line"
    heldout = answer(
        asks, "--heldout", _joined(args.heldout), what, [], lambda text: texts_by_language(text, "--heldout"), True
    )
    what = "text for neurons: LANG=FILE .. in two languages or more; LANG alone takes mOSCAR from the hub"
    counted = answer(asks, "--neurons", _joined(args.neurons), what, [], lambda text: neurons(text, pair[1]), True)
    name = args.name or Path(args.init).stem
    values = {"name": name, "base": base.ref.spec, "run": run,
              "languages": {"base": pair[0], "target": pair[1]}, "data": data}  # fmt: skip
    if heldout:
        data["heldout"] = heldout
    if counted:
        values["languages"]["lsn"] = list(counted)
        data["lsn_text"] = counted
        values |= {"tokens": f"results/{name}/tokens", "lsn": {"tokens": TOKENS}}
    return values | {"controls": CONTROLS, "results": f"results/{name}", "seed": 42}


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"{text}: {error}") from None


def _joined(words: list[str] | None) -> str | None:
    return None if words is None else shlex.join(words)


def build_parser():
    p = cli.parser(__doc__, study=False)
    p.prog = "python -m cpt_utils.base.study"
    add = p.add_argument
    text = "study file to write; default study.yaml"
    add("--init", nargs="?", const="study.yaml", metavar="STUDY", required=True, help=text)
    add("--name", metavar="NAME", help="name of the study in files and figures; default: the file's name")
    add("--base", metavar="B", help="the model before CPT: a folder, org/name or org/name@revision")
    add("--run", nargs="+", metavar="RUN", help="its checkpoints: a folder, a pattern on the hub, or one by one")
    add("--languages", metavar="BASE,TARGET", help="the language that the model knew, and the language of CPT")
    add("--pairs", nargs="+", metavar="PLACE", help=f"parallel sentences: {KINDS}")
    add("--heldout", nargs="+", metavar="LANG=FILE", help="held-out text, one document per line")
    add("--neurons", nargs="+", metavar="LANG=FILE", help="text on which neurons are counted; LANG alone: mOSCAR")
    return p


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    file = Path(args.init)
    if file.exists():
        raise InputError(f"{file} exists already; give another name, or edit the file (docs/study.md)")
    values = study_of(args, sys.stdin.isatty())
    code = check.examine(Study(values, file))
    results.write_text(file, HEAD.format(file=file) + as_yaml(values))
    cli.say(f"\nwrote {file}; next: make reproduce STUDY={file}, or one step: "
            f"python sentence-retrieval/sr_experiment.py --study {file}")  # fmt: skip
    return code


if __name__ == "__main__":
    cli.run(main)
