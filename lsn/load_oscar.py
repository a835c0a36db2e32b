"""Tokenizes each language's text, on which the activations of neurons are counted (step 6).

Each piece of a document is tokenized by itself, without special tokens. Ids keep the order of documents and pieces and
are cut at the target. mOSCAR is streamed from the hub, or text is read from local files.

In:   mOSCAR (a document's `text` is a list of pieces), parquet files of that schema, or text files with one document
      per line (of one piece).
Out:  <output-dir>/oscar.<language>.train.<model id>: a 1-D int32 tensor; and <the same name>.json with its text and
      tokenizer, the number of tokens, and the share of text in another script or language.

Full: python lsn/load_oscar.py --languages en,zh,ga --model-id llama2 --tokenizer meta-llama/Llama-2-7b-hf --output-dir oscar_ids/
Tiny: python lsn/load_oscar.py --study demo/tiny.yaml --tokens 2000
"""  # noqa: E501

from __future__ import annotations

import itertools
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cpt_utils.base import cli, languages, results, textfiles
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np, torch
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import refs, tokenization, tokenizer_id
from cpt_utils.measures import tokenids
from cpt_utils.models import encoding

foreign = cli.sibling("lsn/foreign_text.py")
corpus = cli.sibling("lsn/oscar_text.py")
processes = cli.sibling("lsn/oscar_processes.py")

TOKENS = 100_000_000
BATCH_DOCUMENTS = 1000
COUNTS = (
    "tokens", "documents", "pieces", "seen_tokens", "other_pieces", "other_tokens", "special_pieces", "null_pieces",
)  # fmt: skip


# ---------------------------------------------------------------- tokens


def encoder(folder: Path) -> tuple[Callable[[list[str]], list], encoding.Splitter]:
    """The tokenizer in `folder` as a function from pieces to encodings (lists of ids, or objects with `ids`), and the
    splitter that tokenizes again the pieces in which it finds special tokens."""

    tokenizer = tokenization.load_tokenizer(refs.model(folder))
    splitter = encoding.splitter_of(tokenizer)
    if not tokenizer.is_fast:
        return lambda pieces: tokenizer(pieces, add_special_tokens=False)["input_ids"], splitter
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    # Without offsets, and without the lists that transformers makes from every encoding.
    return lambda pieces: backend.encode_batch_fast(pieces, add_special_tokens=False), splitter


def ahead(function: Callable, items: Iterable[tuple]) -> Iterator[tuple]:
    """`(*item, function(item[0]))`, computed one item ahead in a thread, so the backend encodes while Python writes."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            following = (*item, pool.submit(function, item[0]))
            if waiting:
                yield (*waiting[:-1], waiting[-1].result())
            waiting = following
        if waiting:
            yield (*waiting[:-1], waiting[-1].result())


def flat(encodings: list, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all encodings one after the other, and the number in each [pieces].

    Raises:
        InputError: `dtype` cannot hold an id.
    """
    rows = [getattr(encoding, "ids", encoding) for encoding in encodings]
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    try:
        return np.fromiter(itertools.chain.from_iterable(rows), dtype, int(lengths.sum())), lengths
    except OverflowError:
        raise InputError("the tokenizer has ids beyond int32; give --int64") from None


def as_text(pieces: list[str], encodings: list, dtype: str, splitter: encoding.Splitter | None) -> tuple:
    """`flat` of the encodings, and which pieces were tokenized again because they held the text of a special token."""
    ids, lengths = flat(encodings, dtype)
    again = np.zeros(len(pieces), bool)
    if splitter and (suspects := splitter.suspects(pieces, ids, lengths)):
        rows = [getattr(one, "ids", one) for one in encodings]
        for i, row in zip(suspects, splitter.split([pieces[i] for i in suspects]).ids, strict=True):
            again[i] = row != rows[i]
            rows[i] = row
        ids, lengths = flat(rows, dtype)
    return ids, lengths, again


def tokenize(
    read: Iterable[tuple[list[str], list[int], list[int]]], encode: Callable[[list[str]], list],
    judge: Callable[[list[str]], list[str]] | None, drop: bool, target: int, sink, dtype: str = "<i4",
    report: Callable[[int], None] = lambda tokens: None, splitter: encoding.Splitter | None = None,
) -> dict:  # fmt: skip
    """Write ids to the binary file `sink` until there are `target`; the result does not depend on the batches.

    Returns:
        tokens (written), documents and pieces (read up to the cut), seen_tokens (with those of dropped pieces),
        other_pieces, other_tokens, special_pieces (with the text of a special token), null_pieces (left out), and
        labels: the number of pieces by label of `judge`.
    """
    done = Counter(dict.fromkeys(COUNTS, 0))
    labels: Counter = Counter()
    for pieces, numbers, nulls, encodings in ahead(encode, read):
        ids, lengths, again = as_text(pieces, encodings, dtype, splitter)
        named = judge(pieces) if judge else [""] * len(pieces)
        other = np.array([bool(label) for label in named])
        kept = ~other if drop else np.ones(len(pieces), bool)
        ends = np.cumsum(lengths * kept)
        room = target - done["tokens"]
        last = int(np.searchsorted(ends, room))  # the piece that reaches the target
        if last < len(pieces):
            lengths[last] -= ends[last] - room
            pieces, lengths, other, kept = pieces[: last + 1], lengths[: last + 1], other[: last + 1], kept[: last + 1]
            again, nulls = again[: last + 1], nulls[: last + 1]
            ids = ids[: lengths.sum()]
        chosen = ids if kept.all() else ids[np.repeat(kept, lengths)]
        chosen.tofile(sink)
        labels.update(label for label in named[: len(pieces)] if label)
        done["documents"], done["null_pieces"] = numbers[len(pieces) - 1], nulls[-1]
        done.update(tokens=len(chosen), pieces=len(pieces), seen_tokens=len(ids), special_pieces=int(again.sum()))
        done.update(other_pieces=int(other.sum()), other_tokens=int(lengths[other].sum()))
        report(done["tokens"])
        if done["tokens"] == target:
            break
    return {**done, "labels": labels}


def contamination(found: dict, by: str | None, dropped: bool) -> dict | None:
    """The share of pieces and of tokens in another script or language, and the most frequent of these."""
    if by is None:
        return None
    frequent = sorted(found["labels"].items(), key=lambda entry: (-entry[1], entry[0]))[:5]
    return {
        "by": by,
        "dropped": dropped,
        "share_pieces": found["other_pieces"] / found["pieces"],
        "share_tokens": found["other_tokens"] / found["seen_tokens"],
        "other_pieces": found["other_pieces"],
        "pieces": found["pieces"],
        "other_tokens": found["other_tokens"],
        "tokens": found["seen_tokens"],
        "most_frequent": dict(frequent) if by == "language" else {},
    }


def make(task: dict, report: Callable[[int], None] = lambda tokens: None) -> dict:
    """Write one language's file from its task (see `tasks`); returns the payload of its .json.

    Raises:
        InputError: the text cannot be read or gives no tokens, or the folder cannot be written.
    """
    request, path = task["request"], Path(task["path"])
    by, judge = foreign.judge_of(request["language"], request["filter"])
    drop = request["filter"] != "none" and not request["report_only"]
    encode, splitter = encoder(Path(task["tokenizer_folder"]))
    read = corpus.batches(corpus.documents_of(task["text"]), task["batch"], request["limit"])
    dtype = "<i8" if request["dtype"] == "int64" else "<i4"
    target = request["tokens"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # An unnamed file, so a killed process leaves nothing; on disk, as 100 million ids are 400 MB.
        with tempfile.TemporaryFile(dir=path.parent) as buffer:
            result = tokenize(read, encode, judge, drop, target, buffer, dtype, report, splitter)
            refuse_nothing(task["language"], result)
            buffer.flush()
            payload = {
                "n_documents": result["documents"],
                "n_pieces": result["pieces"],
                "n_special_pieces": result["special_pieces"],
                "n_null_pieces": result["null_pieces"],
                "target": target,
                "complete": result["tokens"] == target,
                "contamination": contamination(result, by, drop),
            }
            ids = torch.from_numpy(np.memmap(buffer, dtype, "r+", shape=(result["tokens"],)))
            tokenids.write(path, ids, payload, results.header(tokenids.SCHEMA, **task["facts"]))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    return {"n_tokens": result["tokens"], **payload}


def refuse_nothing(lang: str, found: dict) -> None:
    if found["tokens"]:
        return
    if not found["pieces"]:
        raise InputError(f"the text of {lang} is empty")
    if found["seen_tokens"]:
        raise InputError(f"the filter drops every piece of {lang} ({found['pieces']:,} read); is it another language?")
    raise InputError(f"the tokenizer yields no tokens for the {found['pieces']:,} pieces of {lang}; is it complete?")


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("--languages", metavar="L,L,..", help="language codes; default: the study's languages.lsn")
    add("--model-id", metavar="NAME", help="last part of the files' names; default: the study's name")
    add("--tokenizer", "--base", metavar="T", help="model whose tokenizer is used; default: the study's base")
    add("--output-dir", "--output", metavar="DIR", help="folder of the files; default: the study's tokens")
    text = "text file (or .gz), one document per line; repeatable; default: the study's data.lsn_text, else mOSCAR"
    add("--text", action="extend", nargs="+", metavar="LANG=FILE", help=text)
    text = "parquet in mOSCAR's schema: a file, a folder or a quoted pattern; repeatable"
    add("--parquet", action="extend", nargs="+", metavar="LANG=FILES", help=text)
    add("--revision", metavar="R", help="revision of mOSCAR on the hub; default: its newest")
    text = f"tokens per language; default: the study's lsn.tokens, else {TOKENS:,}"
    add("--tokens", type=cli.positive, metavar="N", help=text)
    text = "languages at a time; default %(default)s"
    add("--max-concurrent", type=cli.positive, default=6, metavar="N", help=text)
    text = "documents tokenized at a time, which does not change results; default %(default)s"
    add("--batch-documents", type=cli.positive, default=BATCH_DOCUMENTS, metavar="N", help=text)
    text = "drop pieces in another script, or identified as another language (py3langid); default %(default)s"
    add("--filter", choices=("none", "script", "language"), default="none", help=text)
    add("--filter-report", action="store_true", help="only report what --filter would drop, and keep it")
    add("--int64", action="store_true", help="64-bit ids, for readers that need them; default: 32 bits")
    add("--limit", type=cli.positive, metavar="N", help="use only the first N documents (for a trial; recorded)")
    return p


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    todo = [task for task in tasks(args, study) if not finished(task, args.overwrite)]
    failed = {}
    for task, outcome in processes.run_all(todo, args.max_concurrent, make) if todo else ():
        lang = task["language"]
        if "error" in outcome:
            failed[lang] = outcome["error"]
            cli.warn(f"{lang} failed: {outcome['error']}")
        else:
            describe(lang, task["path"], outcome["payload"])
    if failed:
        reasons = "; ".join(f"{lang} ({' '.join(reason.split())})" for lang, reason in failed.items())
        print(f"error: failed: {reasons}", file=sys.stderr)
    return 1 if failed else 0


def describe(lang: str, path: str, payload: dict) -> None:
    """Print what a file holds, and warn if it has fewer tokens than asked for."""
    pieces, documents = payload["n_pieces"], payload["n_documents"]
    cli.say(f"{lang}: {path}: {payload['n_tokens']:,} tokens of {documents:,} documents ({pieces:,} pieces)")
    if payload["n_special_pieces"]:
        cli.say(
            f"{lang}: {payload['n_special_pieces']:,} pieces hold the text of a special token (such as <s>), "
            "tokenized as the text that it is"
        )
    textfiles.say_nulls(payload["n_null_pieces"], lang)
    other = payload["contamination"]
    if other:
        frequent = ", ".join(f"{label} {number:,}" for label, number in other["most_frequent"].items())
        cli.say(
            f"{lang}: {other['share_pieces']:.2%} of the pieces and {other['share_tokens']:.2%} of the tokens are in "
            f"another {other['by']} ({'dropped' if other['dropped'] else 'kept'}){f': {frequent}' if frequent else ''}"
        )
    else:
        cli.say(f"{lang}: no share of other scripts, since its code names no script")
    if not payload["complete"]:
        share = payload["n_tokens"] / payload["target"]
        cli.warn(
            f"{lang}: the text ends at {payload['n_tokens']:,} of {payload['target']:,} tokens ({share:.1%}); "
            "they are saved and marked as incomplete"
        )


def tasks(args, study: Study) -> list[dict]:
    """What to make, a task for each language; all input is checked as far as that is quick."""
    chosen = languages.several(study.value(args.languages, "--languages", "languages.lsn"), "--languages")
    for code in chosen:
        if not re.fullmatch(r"[\w-]+", code):
            raise InputError(f"language {code!r} cannot be part of a file name; letters, digits, _ and - can")
    name = study.name if study and args.model_id is None else study.value(args.model_id, "--model-id", "name")
    ref = refs.model(study.value(args.tokenizer, "--tokenizer", "base"))
    folder = Path(study.value(args.output_dir, "--output-dir", "tokens"))
    target = study.value(args.tokens, "--tokens", "lsn.tokens", TOKENS)
    if type(target) is not int or target < 1:
        raise InputError(f"lsn.tokens is {target!r}; it must be a number of tokens above 0")
    if args.filter_report and args.filter == "none":
        raise InputError("--filter-report says what a filter would drop; give --filter script or --filter language")
    texts = sources(args, study, chosen)
    for code in chosen if args.filter != "none" else ():
        foreign.judge_of(languages.canonical(code, any_tag=True), args.filter)
    tokenizer_folder = tokenization.tokenizer_folder(ref)
    tokenizer = {
        "tokenizer": ref.spec,
        "tokenizer_revision": ref.resolved_revision(),
        "vocabulary_sha256": tokenizer_id.of_plain_text(tokenizer_folder),
    }
    made = []
    for code in chosen:
        text, identity = texts[code]
        request = {
            "language": languages.canonical(code, any_tag=True),
            "vocabulary_sha256": tokenizer["vocabulary_sha256"],
            "text": identity,
            "tokens": target,
            "dtype": "int64" if args.int64 else "int32",
            "filter": args.filter,
            "report_only": args.filter_report,
            "limit": args.limit,
        }
        facts = {"language": request["language"], **tokenizer, "text": text, "limit": args.limit, "request": request}
        made.append(
            {
                "language": code,
                "path": str(folder / tokenids.file_name(code, str(name))),
                "request": request,
                "text": text,
                "facts": facts,
                "tokenizer_folder": str(tokenizer_folder),
                "batch": args.batch_documents,
                "argv": sys.argv,
            }
        )
    return made


def sources(args, study: Study, chosen: list[str]) -> dict[str, tuple[dict, dict]]:
    """For each language the source of its text, and what identifies the text independently of its path.

    Raises:
        InputError: an unknown language, a file of a language that is not asked for, a missing file, or gated data.
    """
    language_files = cli.sibling("cpt/documents.py").language_files
    local: dict[str, tuple[str, str, str]] = {}
    for flag, kind, items in (("--text", "text", args.text), ("--parquet", "parquet", args.parquet)):
        for item in items or []:
            ((lang, pattern),) = language_files([item], flag).items()
            code = languages.find(chosen, lang, f"{flag} {item}: languages asked for")
            if code in local:
                raise InputError(f"{flag} {item}: the text of {code} is given twice; give one source for a language")
            local[code] = (kind, pattern, f"{flag} {item}")
    in_study = study.get("data.lsn_text", {})
    by_language = {}
    for code in chosen:
        if code not in local:
            lang = languages.find(in_study, code, "data.lsn_text", default=None)
            if lang is not None:
                local[code] = ("text", str(in_study[lang]), f"data.lsn_text {lang}: {in_study[lang]}")
        if code in local:
            by_language[code] = corpus.local_source(*local[code])
    hub = [code for code in chosen if code not in by_language]
    if args.revision and not hub:
        raise InputError("--revision applies to mOSCAR, but the text of every language comes from local files")
    return by_language | corpus.hub_sources(hub, args.revision)


def finished(task: dict, overwrite: bool) -> bool:
    """Whether the file of `task` exists and is of the same request.

    Raises:
        InputError: it is of another request, or of unknown origin.
    """
    path = Path(task["path"])
    if overwrite or not path.exists():
        return False
    facts = tokenids.describe(path, allow_limited=True)
    results.refuse_other(path, facts.get("request"), task["request"], "another --model-id or --output-dir")
    if "n_special_pieces" not in facts:
        cli.warn(
            f"{path} was made by an earlier version, in which a special token's text (such as <s>) became that token; "
            "if the text may hold any, give --overwrite to make it again"
        )
    short = "" if facts["complete"] else f", of {facts['target']:,} asked for"
    cli.say(f"{task['language']}: {path} is finished: {facts['n_tokens']:,} tokens{short} (--overwrite redoes it)")
    return True


if __name__ == "__main__":
    cli.run(main)
