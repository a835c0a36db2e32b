"""A verdict on each of the paper's claims, from the results of a study, by the rules of report/README.md.

Each claim is a file in report/claims/; report/evidence.py reads the results, report/shown.py has tables and figure.

In:   a study: the results of retrieval, layers, layer swap, attn_vs_ffn, activation correlation, both component swaps
      (their --controls) and downstream correlation, as many as there are.
Out:  claims.json, claims.md, claims.tex (tables), and a figure (PDF, PNG). With --seeds: claims_seeds.md and .tex in the
      folder --output, the verdicts of several seeds of a study side by side.

Full: python report/claims.py --study studies/multi30k.yaml --seeds 0,1,2 --output build/try/claims
Tiny: python report/claims.py --study demo/tiny.yaml
"""  # noqa: E501

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from types import ModuleType

from cpt_utils.base import cli, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.measures import gate, verdicts

evidence = cli.sibling("report/evidence.py")
shown = cli.sibling("report/shown.py")

SCHEMA = "claims"
RESULTS = {"claims": "report/claims.json"}
CAPTIONS = {
    "claims": """Claims
        The number that decides each claim, with its interval or its place among random draws, and the verdict. The
        rules stand in report/README.md and were written before these results were looked at.""",
}


def seed_list(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of seeds like 0,1,2") from None


def claims() -> dict[str, ModuleType]:
    """The files of report/claims/ by their claims' names, C1 first: each holds TEXT, ON_LAYERS, PANEL, rule and judge.

    Raises:
        InputError: a file there is named otherwise, or lacks one of these.
    """
    found = {}
    for file in (cli.REPOSITORY / "report/claims").glob("*.py"):
        if not re.fullmatch(r"[a-z]\d+", file.stem):
            raise InputError(f"report/claims/{file.name} is not named like a claim (c7.py); rename it, or move it away")
        claim = cli.sibling(f"report/claims/{file.name}")
        lacking = [name for name in ("TEXT", "ON_LAYERS", "PANEL", "rule", "judge") if not hasattr(claim, name)]
        if lacking:
            raise InputError(f"report/claims/{file.name} lacks {', '.join(lacking)}; see docs/adding.md")
        found[file.stem.upper()] = claim
    return {name: found[name] for name in sorted(found, key=shown.order)}


def judge(made: dict[str, ModuleType], found: evidence.Results) -> dict[str, dict]:
    """Every claim's verdict as it goes into the result, by its name.

    Raises:
        InputError: the study has no result that a claim needs.
    """
    judged = {}
    for name, claim in made.items():
        try:
            with found.reading(name):
                verdict = claim.judge(found)
        except evidence.Missing as reason:
            verdict = verdicts.Verdict(verdicts.OPEN, str(reason))
        if claim.ON_LAYERS and found.gate and not found.gate["passed"]:
            verdict.verdict, verdict.reason = verdicts.VOID, gate.words(found.gate)
        verdict.files = list(dict.fromkeys(found.read))
        judged[name] = {"text": claim.TEXT, **dataclasses.asdict(verdict)}
    if not any(row["files"] for row in judged.values()):
        raise InputError(f"{found.folder} holds no result that a claim needs; run the steps of the README first")
    return judged


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("--output", metavar="OUT", help="JSON to write; default: the study's; with --seeds a folder")
    p.add_argument(
        "--seeds", type=seed_list, metavar="S,S,..", help="set claims.json of these seeds side by side; default: none"
    )
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    if args.seeds:
        side_by_side(args)
        return
    study = Study.find(args.study, args.seed, args.arm)
    if not study:
        raise InputError("the claims are those of a study: give --study FILE, or run where study.yaml is")
    output = study.output(args.output, "--output", "claims")
    if output.suffix != ".json":
        raise InputError(f"--output {output}: give the name of a JSON file, or --seeds with it")
    if output.exists() and not args.overwrite and not results.read_json(output, SCHEMA)[1]:
        raise InputError(f"{output} was not made by this script; give --overwrite to replace it, or another --output")
    found = evidence.Results(study)
    made = claims()
    payload = results.plain({"study": study.name, "alpha": verdicts.ALPHA, "claims": judge(made, found)})
    panels = {name: claim.PANEL for name, claim in made.items()}
    shown.draw(output.with_suffix(""), payload["claims"], panels)
    results.write_text(output.with_suffix(".md"), shown.markdown(payload))
    results.write_text(output.with_suffix(".tex"), shown.latex(payload))
    models = {"base": found.base, "target": found.last}
    facts = {"seed": study.seed, "gate": found.gate, **found.sides()}
    results.write_json(output, payload, results.header(SCHEMA, models=models, **facts))
    for name, row in payload["claims"].items():
        cli.say(f"{name} {row['verdict']}: {row['reason']}")
    cli.say(f"wrote {output}, .md, .tex, .pdf and .png")


def side_by_side(args) -> None:
    """OUT/claims_seeds.md and .tex from the claims.json of every seed."""
    if args.output is None:
        raise InputError("--seeds: nothing says where the table goes; give --output FOLDER")
    places = {}
    for seed in args.seeds:
        study = Study.find(args.study, seed)
        places[seed] = study.input(None, "--study", "claims", f" --seed {seed}")
    if len(set(places.values())) < len(places):
        raise InputError(f"the seeds share {places[args.seeds[0]]}: the study's results must hold {{seed}}")
    seeds = {seed: results.read_json(path, SCHEMA)[0] for seed, path in places.items()}
    for suffix, text in zip((".md", ".tex"), shown.seeds_tables(seeds), strict=True):
        results.write_text(Path(args.output) / f"claims_seeds{suffix}", text)
    cli.say(f"wrote {Path(args.output) / 'claims_seeds'}.md and .tex")


if __name__ == "__main__":
    cli.run(main)
