"""Splits the texts of the Swahili study into disjoint parts: for training, for finding neurons, and for losses.

The texts are LAFAND-MT English-Swahili (dev and test are held out; train gives Swahili documents of eight lines) and
MasakhaNEWS articles in three languages: of every twelve articles, one is held out for losses (the openings of up to
--articles of them), two are for neurons, and nine for training (none in French). A training text must not share
thirteen consecutive words with a text of another part (Brown et al. 2020, appendix C, with words as each language
writes them) nor, if it has fewer words, equal one; texts that do are left out and counted.

In:  --news: lafand.{train,dev,test}.{swh,eng}.gz and masakhanews.{swh,eng,fra}.txt.gz; --sib200: its local copy.
Out: OUT/cpt.{swh,eng}.txt, lsn.{swh,eng,fra}.txt, heldout.{swh,eng,fra}.txt, one document per line; texts.json, last.

Full: python studies/swahili/texts.py --news path/to/swahili --sib200 path/to/sib200 --output-dir build/swahili/texts
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cpt_utils.base import cli, results, textfiles
from cpt_utils.base.errors import InputError
from cpt_utils.base.sources import sib200

documents = cli.sibling("cpt/documents.py")

SCHEMA = "swahili-texts"
LANGUAGES = {"swh": "swh_Latn", "eng": "eng_Latn", "fra": "fra_Latn"}
RUN = 13  # consecutive words that two texts must not share
LINES = 8  # lines of LAFAND-MT per document; neighbouring lines are mostly from the same article
LENGTH = 600  # characters of an article for losses; it is cut after its last sentence within them


def role(article: int) -> str:
    """The part to which the article in this line (from 0) of a MasakhaNEWS file belongs."""
    return {2: "heldout", 5: "lsn", 11: "lsn"}.get(article % 12, "cpt")


def opening(article: str) -> str:
    """The first sentences of an article, up to LENGTH characters; at least one sentence."""
    end = article.rfind(". ", 0, LENGTH)
    return article[: end + 1] if end > 0 else article[: article.find(". ") + 1] or article


def runs(text: str) -> set[tuple[str, ...]]:
    """All runs of RUN words in a text; for a shorter text, the run of all its words."""
    words = documents.words(text)
    return {tuple(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))} - {()}


def without(texts: Iterable[str], taken: set[tuple[str, ...]]) -> tuple[list[str], dict[str, int]]:
    """The texts that share no run with `taken`, each once; and the number of `shared`, `repeated` and `empty` ones."""
    kept, removed = {}, dict.fromkeys(("shared", "repeated", "empty"), 0)
    for text in texts:
        of_text = runs(text)
        reason = "empty" if not of_text else "shared" if of_text & taken else "repeated" if text in kept else None
        if reason:
            removed[reason] += 1
        else:
            kept[text] = None
    return list(kept), removed


def split(news: Path, sib: Path, articles_held_out: int) -> tuple[dict[str, list[str]], dict]:
    """Documents by file name, and the number of texts left out of each file, by reason."""
    articles = {lang: list(textfiles.texts(news / f"masakhanews.{lang}.txt.gz")) for lang in LANGUAGES}
    parts = {
        (part, lang): [text for i, text in enumerate(articles[lang]) if role(i) == part]
        for lang in LANGUAGES
        for part in ("heldout", "lsn", "cpt")
    }
    by_file, left_out = {}, {}
    for lang, code in LANGUAGES.items():
        taken: set[tuple[str, ...]] = set()
        if lang != "fra":
            for part in ("dev", "test"):
                taken.update(*map(runs, textfiles.texts(news / f"lafand.{part}.{lang}.gz")))
            taken.update(*(runs(row["text"]) for row in sib200.rows(sib200.language_folder(sib, code), "all")))
        for part in ("heldout", "lsn"):
            name = f"{part}.{lang}"
            by_file[name], left_out[name] = without(parts[part, lang], taken)
            taken.update(*map(runs, by_file[name]))
        by_file[f"heldout.{lang}"] = [opening(article) for article in by_file[f"heldout.{lang}"][:articles_held_out]]
        if lang == "fra":
            continue
        name = f"cpt.{lang}"
        by_file[name], left_out[name] = without(parts["cpt", lang], taken)
        if lang == "swh":
            lines, removed = without(textfiles.texts(news / "lafand.train.swh.gz"), taken)
            left_out["lafand.train.swh"] = removed
            by_file[name] += [" ".join(lines[i : i + LINES]) for i in range(0, len(lines), LINES)]
    return by_file, left_out


def build_parser():
    p = cli.parser(__doc__, study=False)
    p.add_argument("--news", required=True, metavar="DIR", help="folder of LAFAND-MT and MasakhaNEWS")
    p.add_argument("--sib200", required=True, metavar="DIR", help="folder of SIB-200, <code>/{train,dev,test}.tsv")
    text = "maximum number of articles per language whose openings are for losses; default 60"
    p.add_argument("--articles", type=cli.positive, default=60, metavar="N", help=text)
    p.add_argument("--output-dir", required=True, metavar="OUT", help="folder for the documents")
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    news, out = Path(args.news), Path(args.output_dir)
    if not news.is_dir():
        raise InputError(f"--news {news} is not a folder; give the one with lafand.train.swh.gz and the other files")
    by_file, left_out = split(news, Path(args.sib200), args.articles)
    for name, texts in by_file.items():
        results.write_text(out / f"{name}.txt", "".join(f"{text}\n" for text in texts))
    sizes = {
        name: {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)}
        for name, texts in by_file.items()
    }
    files = {file.name: results.file_sha256(file) for file in sorted(news.glob("*.gz"))}
    payload = {"texts": sizes, "left_out": left_out, "words_in_a_row": RUN, "lines_of_a_document": LINES}
    results.write_json(out / "texts.json", payload, results.header(SCHEMA, files=files))
    for name, size in sizes.items():
        cli.say(f"{out / name}.txt: {size['documents']:,} documents, {size['bytes']:,} bytes")
    for name, removed in left_out.items():
        if any(removed.values()):
            cli.say(f"left out of {name}: {', '.join(f'{n:,} {reason}' for reason, n in removed.items() if n)}")


if __name__ == "__main__":
    cli.run(main)
