"""What a study says of each of the paper's claims, by the rules of report/README.md: the numbers of one run, and over
seeds a verdict.

Each claim is a file in report/claims/; report/evidence.py and report/interventions.py read the results, report/shown.py
has tables and figure.

In:   a study: the results of retrieval, layers, layer swap, attn_vs_ffn, int_and_sem, both component swaps (their
      --controls) and of its arms (arms.json), as many as there are.
Out:  claims.json, claims.md, claims.tex (tables), and a figure (PDF, PNG): one run, no verdict. With --seeds, of which
      five or more are needed, the same as claims_seeds.* in the folder --output, with verdicts.

Full: python report/claims.py --study studies/multi30k.yaml --seeds 0,1,2,3,4 --output build/try/claims
Tiny: python report/claims.py --study demo/tiny.yaml
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path
from types import ModuleType

from cpt_utils.base import cli, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import relatives
from cpt_utils.measures import gate, verdicts
from cpt_utils.measures.verdicts import Verdict

evidence = cli.sibling("report/evidence.py")
shown = cli.sibling("report/shown.py")

SCHEMA = "claims"
RESULTS = {"claims": "report/claims.json"}
CAPTIONS = {
    "claims": """Claims
        What this run says of each claim: numbers with their intervals over sentences, or their place among matched
        controls. One run is one sample of what training does, so there is no verdict; that takes seeds. The rules stand
        in report/README.md and were written before these results were looked at.""",
}


def claims() -> dict[str, ModuleType]:
    """The files of report/claims/ by their claims' names, C1 first: each holds TEXT, ON_LAYERS, PANEL and measure.

    Raises:
        InputError: a file there is named otherwise, or lacks one of these.
    """
    found = {}
    for file in (cli.REPOSITORY / "report/claims").glob("*.py"):
        if not re.fullmatch(r"[a-z]\d+[a-z]?", file.stem):
            raise InputError(f"report/claims/{file.name} is not named like a claim (c7.py); rename it, or move it away")
        claim = cli.sibling(f"report/claims/{file.name}")
        lacking = [name for name in ("TEXT", "ON_LAYERS", "PANEL", "measure") if not hasattr(claim, name)]
        if lacking:
            raise InputError(f"report/claims/{file.name} lacks {', '.join(lacking)}; see docs/adding.md")
        found[file.stem[0].upper() + file.stem[1:]] = claim
    return {name: found[name] for name in sorted(found, key=shown.order)}


def one_run(made: dict[str, ModuleType], found: evidence.Results) -> dict[str, Verdict]:
    """What one run says of every claim, by its name; where something is missing, what.

    Raises:
        InputError: the study has no result that a claim needs, or one that contradicts the others.
    """
    said = {}
    with found.reading("layers"), contextlib.suppress(evidence.Missing):
        found.layers(strict=True)
    for name, claim in made.items():
        with found.reading(name):
            try:
                verdict = verdicts.in_this_run(*claim.measure(found))
            except evidence.Missing as reason:
                verdict = Verdict(verdicts.ONE, str(reason))
        if claim.ON_LAYERS and found.gate and not found.gate["passed"]:
            verdict.verdict, verdict.reason = verdicts.VOID, gate.words(found.gate)
        verdict.files = list(dict.fromkeys(found.read))
        said[name] = verdict
    if not any(verdict.files for verdict in said.values()):
        raise InputError(f"{found.folder} holds no result that a claim needs; run the steps of the README first")
    return said


def over_seeds(made: dict[str, ModuleType], runs: dict[int, tuple[evidence.Results, dict]]) -> dict[str, Verdict]:
    """The verdict on every claim from what `one_run` says of each seed; Holm over the claims of one letter that can be
    decided, so that claims of another question, added later, change no verdict."""
    found: dict[str, Verdict] = {}
    decidable: dict[str, dict[str, list[dict]]] = {}
    for name, claim in made.items():
        each = {seed: said[name] for seed, (_, said) in runs.items()}
        files = [file for verdict in each.values() for file in verdict.files]
        lacking = {seed: one.reason for seed, one in each.items() if not one.numbers}
        why = next((f"seed {seed}: {reason}" for seed, reason in lacking.items()), "")
        why = lacking.popitem()[1] if len({*lacking.values()}) == 1 and len(lacking) == len(each) else why
        void = next((f"seed {seed}: {one.reason}" for seed, one in each.items() if one.verdict == verdicts.VOID), "")
        unchecked = [seed for seed, (results_of, _) in runs.items() if not results_of.gate]
        if void or why:
            found[name] = Verdict(verdicts.VOID if void else verdicts.OPEN, void or why, files=files)
            continue
        rows = verdicts.over_seeds({seed: one.numbers for seed, one in each.items()})
        beside = verdicts.over_seeds({seed: one.beside for seed, one in each.items()})
        why = next((f"{row['name']}: {row['note']}" for row in rows if row["value"] is None), "")
        if len(rows) < max(len(one.numbers) for one in each.values()):
            why = "not all seeds have the same numbers; run their steps again alike"
        if claim.ON_LAYERS and unchecked:
            why = f"seed {unchecked[0]}: the gate of step 2 was not checked (retrieval of an untrained model)"
        if len(runs) < verdicts.SEEDS:
            why = f"{len(runs)} seeds; a verdict needs {verdicts.SEEDS} or more"
        found[name] = Verdict(verdicts.OPEN, why, rows, beside, files)
        if not why:
            decidable.setdefault(name[0], {})[name] = rows
    for family in decidable.values():
        for name, verdict in verdicts.decide(family).items():
            found[name] = dataclasses.replace(verdict, beside=found[name].beside, files=found[name].files)
    return found


def read_seeds(
    study_file, seeds: list[int], made: dict[str, ModuleType], draws: int = 2000, arm: str | None = None
) -> dict[int, tuple]:
    """Of every seed its results and what `one_run` says of them; they must be of other models, and alike in all else.

    Raises:
        InputError: seeds that share a checkpoint or their results, or were measured in different ways.
    """
    runs: dict[int, tuple] = {}
    for seed, study in zip(seeds, Study.of_seeds(study_file, seeds, arm), strict=True):
        found = evidence.Results(study, draws)
        for other, (before, _) in runs.items():
            if relatives.same_model(before.last, found.last):
                raise InputError(f"seeds {other} and {seed} have the same weights, {found.last['spec']}; train again")
        runs[seed] = found, one_run(made, found)
        first = runs[seeds[0]][0]
        for what in evidence.OVER_SEEDS:
            one, other = (each.facts.get(what) for each in (first, found))
            if one and other and one[0] != other[0]:
                raise InputError(f"{one[1]} and {other[1]} were made with different {what.removeprefix('a ')}")
    return runs


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("--output", metavar="OUT", help="JSON to write; default: the study's; with --seeds a folder")
    text = "verdicts over these seeds, five or more; default: one run, no verdict"
    p.add_argument("--seeds", type=cli.seeds, metavar="S,S,..", help=text)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study, made = Study.find(args.study, args.seed, args.arm), claims()
    if not study:
        raise InputError("the claims are those of a study: give --study FILE, or run where study.yaml is")
    if args.seeds:
        if len(args.seeds) < 2 or args.output is None:
            raise InputError("--seeds needs two seeds or more, and --output FOLDER for the table; one run is --seed")
        output = Path(args.output) / "claims_seeds.json"
    else:
        output = study.output(args.output, "--output", "claims")
    if output.suffix != ".json":
        raise InputError(f"--output {output}: give the name of a JSON file, or --seeds with it")
    results.refuse_stranger(output, SCHEMA, args.overwrite, "another --output")
    payload: dict = {"study": study.name, "alpha": verdicts.ALPHA}
    if args.seeds:
        runs = read_seeds(args.study, args.seeds, made, arm=args.arm)
        payload |= {"seeds": args.seeds, "claims": over_seeds(made, runs)}
        facts = {"models": {str(seed): found.last for seed, (found, _) in runs.items()}}
        facts |= {"gate": {str(seed): found.gate for seed, (found, _) in runs.items()}}
    else:
        found = evidence.Results(study)
        payload |= {"seeds": [study.seed], "claims": one_run(made, found)}
        facts = {"models": {"base": found.base, "target": found.last}, "seed": study.seed, "gate": found.gate}
        facts |= found.sides()
    texts = {name: claim.TEXT for name, claim in made.items()}
    judged = {name: {"text": texts[name], **dataclasses.asdict(one)} for name, one in payload["claims"].items()}
    write(output, results.plain(payload | {"claims": judged}), facts, made)


def write(output: Path, payload: dict, facts: dict, made: dict[str, ModuleType]) -> None:
    """Tables and figure beside `output`, then that."""
    panels = {name: claim.PANEL for name, claim in made.items()}
    shown.draw(output.with_suffix(""), payload["claims"], panels)
    results.write_text(output.with_suffix(".md"), shown.markdown(payload))
    results.write_text(output.with_suffix(".tex"), shown.latex(payload))
    results.write_json(output, payload, results.header(SCHEMA, **facts))
    for name, row in payload["claims"].items():
        cli.say(f"{name} {row['verdict']}: {row['reason']}")
    cli.say(f"wrote {output}, .md, .tex, .pdf and .png")


if __name__ == "__main__":
    cli.run(main)
