"""The report: one HTML page that says what a study asked, what came out, how sure that is and where the numbers are.

It is made from result files alone and needs nothing else: text and figures are inside, it has no scripts, and nothing
is fetched. A missing result leaves a sentence in its place. report/parts.py makes the part on each experiment,
report/headlines.py picks the numbers shown first, and page.html.j2 is the layout.

In:   the results of a study, as many as there are; those of several seeds (--seeds) or studies (--beside) side by side.
Out:  OUT (default: the study's report.html). For several, a folder: report.html goes there, beside the
      claims_seeds.json of report/claims.py --seeds, whose verdicts it shows.

Full: python report/page.py --study studies/multi30k.yaml --seeds 0,1,2,3,4 --output build/try/claims
Tiny: python report/page.py --study demo/tiny.yaml
"""

from __future__ import annotations

from pathlib import Path

from cpt_utils.base import cli, figures, languages, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study, refuse_shared
from cpt_utils.measures import verdicts
from cpt_utils.measures.gate import sentences_needed

headlines = cli.sibling("report/headlines.py")
parts = cli.sibling("report/parts.py")

RESULTS = {"page": "report.html"}
TEMPLATE, RULES = "page.html.j2", "report/README.md"
MARK = "report/page.py of cpt-utils"  # identifies a page made by this script
PARTS = {
    "Part I": "Which layers learn the language",
    "Part II": "Attention, FFN and language-specific neurons",
    "Part III": "Where in the stack a language is learnt",
    "Part IV": "The update itself",
    "Part V": "Neighbouring measures",
}


# ---------------------------------------------------------------- the first screen


def named(code: str | None) -> str:
    """A language's name with its code; an invented one is called so."""
    return figures.language(code).replace("invented (", "an invented language (") if code else "?"


def briefly(place: str | None) -> str:
    """A model's path, or the end of a long one."""
    text = place or "not given"
    return text if len(text) <= 40 else "…/" + "/".join(text.split("/")[-2:])


def facts(runs: list[parts.Run]) -> list[tuple[str, str]]:
    """Models, languages, data, seeds and date: what the study is about."""
    run = runs[0]
    study, heads = run.study, run.headers
    layers = next((head["n_layers"] for head in heads.values() if head.get("n_layers")), None)
    of_runs = [(head.get("models") or {}).get("checkpoints") or {} for head in heads.values()]
    steps = max(of_runs, key=len, default={})  # some results cover a part of them
    size = next((row["value"] for row in run.rows.get("cogsym", []) if row["measure"] == "parameters/model"), None)
    made_of = (f", {layers} layers" if layers else "") + (f", {size / 1e6:,.3g} M parameters" if size else "")
    spec = study.get("run")
    spec = briefly(spec) if isinstance(spec, str) else f"{len(spec or [])} revisions"
    if steps:
        spec += f", {len(steps)} checkpoint{'s' * (len(steps) > 1)} to step {max(map(int, steps)):,}"
    data = [f"{n:,} sentence pairs" for n in [(heads.get("retrieval", {}).get("data") or {}).get("n_used")] if n]
    text_heads = {key: head[key] for head in heads.values() for key in ("task", "heldout") if head.get(key)}
    text_heads |= {"heldout": heads["language_loss"]["heldout"]} if "language_loss" in heads else {}
    data += parts.texts(text_heads)
    dates = sorted(head["time"] for one in runs for head in one.headers.values() if head.get("time"))
    days = " to ".join(dict.fromkeys(parts.day(time) for time in (dates[0], dates[-1]))) if dates else "not known"
    base, target = (named(study.get(f"languages.{side}")) for side in ("base", "target"))
    of = f" (of {run.label})" if run.label else ""
    return [
        ("Base model", f"{briefly(study.get('base'))}{of}{made_of}"),
        ("CPT run", spec),
        ("Languages", f"{base}, continued on {target}"),
        ("Data", "; ".join(data) or "not known"),
        *([side_by_side(runs)] if len(runs) > 1 else []),
        ("Measured", days + (f", seed {study.seed}" if len(runs) == 1 else "")),
    ]


def outcome(run: parts.Run) -> str:
    """Losses and task accuracy at the base and at the last checkpoint; without these, retrieval or nothing."""

    def both(step: str, measure: str) -> list[tuple[str | None, str]]:
        rows = [row for row in run.rows.get(step, []) if row["measure"] == measure and row["component"] is None]
        ends: dict[str | None, dict[int, float]] = {}
        for row in rows:
            ends.setdefault(row["language"], {})[row["step"] or 0] = row["value"]
        return [
            (lang, "\u00a0\u2192\u00a0".join(headlines.signed(values[step], 3) for step in (0, run.last)))
            for lang, values in ends.items() if {0, run.last} <= {*values}
        ]  # fmt: skip

    losses, target = both("language_loss", headlines.LOSS), run.study.get("languages.target")
    new = {lang for lang, _ in losses if lang and target and languages.same(lang, target)}
    losses.sort(key=lambda pair: pair[0] not in new)
    losses = [
        f"{text} in {'the new language, ' * (lang in new)}{figures.language(lang)}" for lang, text in losses if lang
    ]
    phrases = [f"loss (nats per byte) {', '.join(losses)}"] * bool(losses)
    phrases += [f"accuracy on the task {text}" for _, text in both("downstream", "acc")[:1]]
    if not phrases:
        last, base, _ = (row for _, row in headlines.three("retrieval", run.rows.get("retrieval", []), run.study))
        if last and base and last["step"] == run.last:
            ends = "\u00a0\u2192\u00a0".join(headlines.signed(row["value"], 3) for row in (base, last))
            phrases = [f"share of translations found, each at its best hidden state, {ends}"]
    of = f" of {run.label}" if run.label else ""
    return f"Base \u2192 last checkpoint{of}: {'; '.join(phrases)}." if phrases and run.last else ""


def side_by_side(runs: list[parts.Run]) -> tuple[str, str]:
    names = [run.label for run in runs]
    if all(name.startswith("seed ") for name in names):
        return "Seeds", ", ".join(name.removeprefix("seed ") for name in names)
    return "Side by side", ", ".join(names)


def gate_words(runs: list[parts.Run]) -> str:
    """Whether the model retrieves better than an untrained one, and what follows from that."""
    gates = [run.head.get("gate") or run.headers.get("layers", {}).get("gate") for run in runs]
    passed = [gate for gate in gates if gate and gate["passed"]]
    hub = [row["layer"] for row in runs[0].rows.get("layers", []) if row["measure"] == "in_hub" and row["value"]]
    which = f"layers {verdicts.listed([*map(str, hub)])}, which find" if hub and len(runs) == 1 else "layers that find"
    layers = f"the hub ({which} translations) and the interface (the others)"
    if not any(gates):
        needs = "it takes an untrained model's retrieval and layer-specialize/layer_specialize.py"
        return f"Not checked ({needs}): it is not known whether {layers} mean anything."
    follows = f"So {layers} are meaningful." if len(passed) == len(runs) else f"Otherwise, {layers} mean nothing."
    if len(runs) > 1:
        return f"Passed in {len(passed)} of {len(runs)} runs. {follows}"
    (gate,) = gates
    passed, finds = ("Passed", "finds more") if gate["passed"] else ("Not passed", "does not find clearly more")
    needed = None if gate["passed"] else sentences_needed(gate)
    follows += f" A difference of this size would be clear with about {needed:,} sentences." if needed else ""
    # The model that the layers come from.
    model = "/".join(gate["model"].split("/")[-2:]) if gate.get("model") else "the last checkpoint"
    apart = headlines.in_digits(gate["difference"], gate["ci_low"], gate["ci_high"])
    return (
        f"{passed}: at its best layer {model} {finds} translations than an untrained model, "
        f"by {apart} ({100 * gate['level']:.0f}\u00a0% interval). {follows}"
    )


def sure(runs: list[parts.Run], over: dict | None) -> tuple[str, str]:
    """How sure the claims are, in a few words, and why."""
    if over and len(over["seeds"]) >= verdicts.SEEDS:
        how = "Each seed draws the training anew. Student's t over seeds, Holm's correction over claims of one letter."
        return f"Verdicts over {len(over['seeds'])} seeds.", how
    if over:
        return f"{len(over['seeds'])} seeds: no verdict on any claim.", f"A verdict takes {verdicts.SEEDS} or more."
    why = (
        f"A run is one sample of what training does; a verdict takes {verdicts.SEEDS} seeds or more. Intervals "
        "describe this run alone."
    )
    if parts.of_seeds(runs):
        why += " report/claims.py --seeds, with the same --output, judges them over seeds."
    return "One run: no verdict on any claim." if len(runs) == 1 else "No verdict on any claim.", why


def counted(rows: list[dict]) -> str:
    """ "4 not supported, 6 undecided, 2 of them for want of numbers", of one run "3 contrary, 2 not clear"."""
    entries = [one for row in rows for one in row["entries"][:1]]
    words = [one["word"] for one in entries]
    counts = ", ".join(
        f"{words.count(word)} {word.replace('no interval', 'without an interval')}"
        for word in sorted({*words}, key=headlines.RANK.index)
    )
    bare = sum(one["word"] == verdicts.OPEN and not one["number"] for one in entries)
    return counts + (f", {bare} of them for want of numbers" if bare else "")


def claims(runs: list[parts.Run], over: dict | None) -> list[dict]:
    """The claims with what decides each, over seeds or in every run."""
    sources = [("", over["claims"])] if over else [(run.label, run.claims) for run in runs if run.claims]
    names = list(dict.fromkeys(name for _, one in sources for name in one))
    shown = []
    for name in names:
        entries = [entry(label, one[name], bool(over)) for label, one in sources if name in one]
        if len(runs) == 1 and entries[0]["verdict"] == verdicts.VOID:
            entries[0]["why"] = "The gate, at the top of the page, was not passed."
        text = next(one[name]["text"] for _, one in sources if name in one)
        shown.append({"name": name, "text": headlines.capital(text), "entries": entries})
    return shown


def entry(label: str, claim: dict, seeds: bool) -> dict:
    """One line on a claim: the number that speaks most against it, the verdict or what this run says, and why."""
    row = headlines.deciding(claim["numbers"])
    word = claim["verdict"] if seeds or claim["verdict"] == verdicts.VOID else headlines.outcome(claim)
    shown = {"label": label, "word": word, "verdict": claim["verdict"], "why": headlines.why(claim), "number": ""}
    if row:
        shown |= {"about": row["name"], "says": f"claimed {claimed(row)}", "number": in_digits(row)}
    beside = [row | {"says": None} for row in claim["beside"]]  # decides nothing, so it is not held against the claim
    return shown | {"numbers": list(map(a_number, claim["numbers"])), "beside": list(map(a_number, beside))}


def a_number(row: dict) -> dict:
    """A number of a claim, for the table of all numbers."""
    says, note = row["says"], row.get("note") or ""
    return {
        "name": row["name"], "number": in_digits(row), "n": f"{row['n']:,} {row['n_of']}" if row["n"] else "",
        "says": claimed(row) if says else "", "note": note or (headlines.standing(row) if says else ""),
        "values": [headlines.in_digits(value) for value in (row.get("values") or {}).values()],
    }  # fmt: skip


def claimed(row: dict) -> str:
    return verdicts.in_words(row["says"]).replace("-", "\u2212")


def in_digits(row: dict) -> str:
    return headlines.in_digits(row["value"], row["ci_low"], row["ci_high"], (row["says"] or {}).get("bound"))


# ---------------------------------------------------------------- the page


def page(runs: list[parts.Run], where: Path, over: dict | None) -> str:
    """The page, to be written to the folder `where`."""
    steps, study = [parts.shown_step(step, runs, where) for step in parts.steps()], runs[0].study
    names, seen = dict.fromkeys(step["part"] for step in steps), set()
    for step in steps:  # a caption that already stands under another figure is shortened
        step["told"] = {
            caption: f"{parts.first_sentence(caption).rstrip('.:')}, as above." if caption in seen else caption
            for caption in step["captions"]
        }
        seen |= {figure["caption"] for run in step["runs"] for figure in run["figures"]}
    claims_at = where / "claims_seeds.json" if over else study.result("claims")
    with parts.numbers.reading(claims_at):
        rows = claims(runs, over)
        for row in rows:  # the sections whose results each claim rests on
            read = {(step["label"], step["id"]): None for step in steps if row["name"] in step["claims"]}
            row["evidence"] = list({label: (label, at) for label, at in reversed(read)}.values())[::-1]
    with parts.numbers.reading(study.result("layers")):
        gate = gate_words(runs)
    with parts.numbers.reading(study.result("language_loss")):
        shown_outcome = outcome(runs[0])

    def address(step: str) -> str:
        """The link to a file that is read as it is; empty if it was not made, or if there are several runs."""
        file = study.result(step)
        file = file.with_suffix(".html") if step == "samples" else file
        return parts.link(file, where) if len(runs) == 1 and file.is_file() else ""

    return template().render(
        title=study.name + (f", arm {study.arm}" if study.arm else ""), target=named(study.get("languages.target")),
        facts=facts(runs), gate=gate, outcome=shown_outcome, sure_words=sure(runs, over), counts=counted(rows),
        parts=[(name, PARTS.get(name, ""), [step for step in steps if step["part"] == name]) for name in names],
        folders=[(run.label, run.folder, parts.link(run.folder, where)) for run in runs], runs=runs, over=over,
        claims=rows, claims_file=parts.link(claims_at, where), study_file=study.path, mark=MARK, n_steps=len(steps),
        n_measured=sum(step["measured"] for step in steps), rules=parts.link(cli.REPOSITORY / RULES, where),
        samples=address("samples"), table=address("numbers"),
        outcomes={row["name"]: row["entries"][0]["word"] for row in rows if len(row["entries"]) == 1},
    )  # fmt: skip


def template():
    import jinja2

    loader = jinja2.FileSystemLoader(cli.REPOSITORY / "report")
    return jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    ).get_template(TEMPLATE)


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("--output", metavar="OUT", help="HTML file; for several, a folder; default: the study's report.html")
    p.add_argument("--seeds", type=cli.seeds, metavar="S,S,..", help="these seeds of the study, side by side")
    text = "other study files, whose results are shown beside"
    p.add_argument("--beside", nargs="+", default=[], metavar="FILE", help=text)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    if not study:
        raise InputError("the report is about a study: give --study FILE, or run where study.yaml is")
    studies = [Study.find(args.study, seed, args.arm) for seed in args.seeds or [study.seed]]
    studies += [Study.find(file, None) for file in args.beside]
    if len(studies) == 1:
        output = study.output(args.output, "--output", "page")
    elif args.output is None:
        raise InputError("for several seeds or studies, give --output FOLDER")
    else:
        output = Path(args.output) / "report.html"
    if output.suffix != ".html":
        raise InputError(f"--output {output}: give the name of an HTML file, or --seeds or --beside with a folder")
    if (
        output.is_file()
        and not args.overwrite
        and MARK not in output.read_text(encoding="utf-8", errors="replace")[:2000]
    ):
        raise InputError(f"{output} was not made by this script; give --overwrite to replace it, or another --output")
    refuse_shared(studies, "several")
    runs = [parts.Run(one, label) for one, label in zip(studies, labels(studies, args.seeds), strict=True)]
    if not any(run.rows for run in runs):
        raise InputError(f"{runs[0].folder} holds no result; run the steps of the README first")
    over = output.parent / "claims_seeds.json"
    over, head = results.read_json(over, "claims") if args.seeds and over.is_file() else (None, {})
    for run in runs if over else ():
        run.judged = head.get("time", "")
    if over and over["seeds"] != args.seeds:
        raise InputError(
            f"{output.parent}/claims_seeds.json is over seeds {over['seeds']}; run report/claims.py --seeds again"
        )
    results.write_text(output, page(runs, output.parent, over))
    cli.say(f"wrote {output}")


def labels(studies: list[Study], seeds: list[int] | None) -> list[str]:
    """Names that tell the runs apart; empty if there is only one."""
    if len(studies) == 1:
        return [""]
    names = [f"seed {study.seed}" if i < len(seeds or [0]) and seeds else study.name for i, study in enumerate(studies)]
    return [
        name if names.count(name) == 1 else f"{name} ({study.path})" for name, study in zip(names, studies, strict=True)
    ]


if __name__ == "__main__":
    cli.run(main)
