"""The split of the Swahili study: what is trained on, what neurons are found on, what losses are of, and none in two.

LAFAND-MT English-Swahili (dev and test are held out, train gives Swahili documents of eight lines) and MasakhaNEWS
articles in three languages: of twelve in a row one is held out for losses (its opening, of --articles of them), two for
neurons, and nine are trained on (of French none). A text that is trained on must not share thirteen words in a row with
one that is not (Brown et al. 2020, appendix C, in the languages' own words), nor be one that is shorter; what did is
left out and counted.

In:  --news: lafand.{train,dev,test}.{swh,eng}.gz and masakhanews.{swh,eng,fra}.txt.gz; --sib200: its local copy.
Out: OUT/cpt.{swh,eng}.txt, lsn.{swh,eng,fra}.txt, heldout.{swh,eng,fra}.txt, a document a line; texts.json, last.

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
RUN = 13  # words in a row that two texts must not share
LINES = 8  # of LAFAND-MT, whose neighbours are mostly of one article, in a document
LENGTH = 600  # characters of an article for losses, whose sentences are within them


def role(article: int) -> str:
    """What the article in this line (from 0) of a MasakhaNEWS file is for."""
    return {2: "heldout", 5: "lsn", 11: "lsn"}.get(article % 12, "cpt")


def opening(article: str) -> str:
    """The first sentences of an article that are within LENGTH characters; at least one."""
    end = article.rfind(". ", 0, LENGTH)
    return article[: end + 1] if end > 0 else article[: article.find(". ") + 1] or article


def runs(text: str) -> set[tuple[str, ...]]:
    """All runs of RUN words in a text; of a shorter one, all of its words."""
    words = documents.words(text)
    return {tuple(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))} - {()}


def without(texts: Iterable[str], taken: set[tuple[str, ...]]) -> tuple[list[str], dict[str, int]]:
    """The texts that share no run with `taken`, each once; and how many were `shared`, `repeated` or `empty`."""
    kept, gone = {}, dict.fromkeys(("shared", "repeated", "empty"), 0)
    for text in texts:
        here = runs(text)
        why = "empty" if not here else "shared" if here & taken else "repeated" if text in kept else None
        if why:
            gone[why] += 1
        else:
            kept[text] = None
    return list(kept), gone


def split(news: Path, sib: Path, articles_held_out: int) -> tuple[dict[str, list[str]], dict]:
    """Documents by the name of their file, and what was left out of each."""
    articles = {lang: list(textfiles.texts(news / f"masakhanews.{lang}.txt.gz")) for lang in LANGUAGES}
    parts = {
        (part, lang): [text for i, text in enumerate(articles[lang]) if role(i) == part]
        for lang in LANGUAGES
        for part in ("heldout", "lsn", "cpt")
    }
    found, left_out = {}, {}
    for lang, code in LANGUAGES.items():
        taken: set[tuple[str, ...]] = set()
        if lang != "fra":
            for part in ("dev", "test"):
                taken.update(*map(runs, textfiles.texts(news / f"lafand.{part}.{lang}.gz")))
            taken.update(*(runs(row["text"]) for row in sib200.rows(sib200.language_folder(sib, code), "all")))
        for part in ("heldout", "lsn"):
            name = f"{part}.{lang}"
            found[name], left_out[name] = without(parts[part, lang], taken)
            taken.update(*map(runs, found[name]))
        found[f"heldout.{lang}"] = [opening(article) for article in found[f"heldout.{lang}"][:articles_held_out]]
        if lang == "fra":
            continue
        name = f"cpt.{lang}"
        found[name], left_out[name] = without(parts["cpt", lang], taken)
        if lang == "swh":
            lines, gone = without(textfiles.texts(news / "lafand.train.swh.gz"), taken)
            left_out["lafand.train.swh"] = gone
            found[name] += [" ".join(lines[i : i + LINES]) for i in range(0, len(lines), LINES)]
    return found, left_out


def build_parser():
    p = cli.parser(__doc__, study=False)
    p.add_argument("--news", required=True, metavar="DIR", help="folder of LAFAND-MT and MasakhaNEWS")
    p.add_argument("--sib200", required=True, metavar="DIR", help="folder of SIB-200, <code>/{train,dev,test}.tsv")
    text = "articles of a language whose openings are for losses, at most; default 60"
    p.add_argument("--articles", type=cli.positive, default=60, metavar="N", help=text)
    p.add_argument("--output-dir", required=True, metavar="OUT", help="folder of the documents")
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    news, out = Path(args.news), Path(args.output_dir)
    if not news.is_dir():
        raise InputError(f"--news {news} is not a folder; it holds lafand.train.swh.gz and the others")
    found, left_out = split(news, Path(args.sib200), args.articles)
    for name, texts in found.items():
        results.write_text(out / f"{name}.txt", "".join(f"{text}\n" for text in texts))
    sizes = {
        name: {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)}
        for name, texts in found.items()
    }
    files = {file.name: results.file_sha256(file) for file in sorted(news.glob("*.gz"))}
    payload = {"texts": sizes, "left_out": left_out, "words_in_a_row": RUN, "lines_of_a_document": LINES}
    results.write_json(out / "texts.json", payload, results.header(SCHEMA, files=files))
    for name, size in sizes.items():
        cli.say(f"{out / name}.txt: {size['documents']:,} documents, {size['bytes']:,} bytes")
    for name, gone in left_out.items():
        if any(gone.values()):
            cli.say(f"left out of {name}: {', '.join(f'{n:,} {why}' for why, n in gone.items() if n)}")


if __name__ == "__main__":
    cli.run(main)
