"""What a study says about each claim, by the rules of report/README.md: numbers for one run, verdicts over seeds.

Each claim is a file in report/claims/; report/evidence.py and report/interventions.py read the results, report/shown.py
makes the tables and the figure.

In:   a study's results, as many as there are; report/README.md lists the files that each claim reads.
Out:  claims.json, claims.md, claims.tex (tables) and a figure (PDF, PNG): one run, no verdict. With --seeds the same as
      claims_seeds.* in the folder --output, with verdicts if there are five seeds or more.

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
        What this run says about each claim: numbers with their intervals over sentences, or their rank among matched
        controls. One run is one sample of what training does, so there is no verdict: that takes several seeds. The
        rules are in report/README.md and were written before these results were looked at.""",
}


def claims() -> dict[str, ModuleType]:
    """The modules of report/claims/ by claim name, C1 first; each defines TEXT, ON_LAYERS, PANEL and measure.

    Raises:
        InputError: a file there is not named like a claim, or lacks one of these.
    """
    modules = {}
    for file in (cli.REPOSITORY / "report/claims").glob("*.py"):
        if not re.fullmatch(r"[a-z]\d+[a-z]?", file.stem):
            raise InputError(f"report/claims/{file.name} is not named like a claim (c7.py); rename or move it")
        claim = cli.sibling(f"report/claims/{file.name}")
        lacking = [name for name in ("TEXT", "ON_LAYERS", "PANEL", "measure") if not hasattr(claim, name)]
        if lacking:
            raise InputError(f"report/claims/{file.name} lacks {', '.join(lacking)}; see docs/adding.md")
        modules[file.stem[0].upper() + file.stem[1:]] = claim
    return {name: modules[name] for name in sorted(modules, key=shown.order)}


def one_run(made: dict[str, ModuleType], found: evidence.Results) -> dict[str, Verdict]:
    """What one run says about every claim, by name; if a result is missing, which.

    Raises:
        InputError: the study has no result that a claim needs, or one that contradicts the others.
    """
    judged = {}
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
        judged[name] = verdict
    if not any(verdict.files for verdict in judged.values()):
        raise InputError(f"{found.folder} holds no result that a claim needs; run the steps of the README first")
    return judged


def over_seeds(made: dict[str, ModuleType], runs: dict[int, tuple[evidence.Results, dict]]) -> dict[str, Verdict]:
    """The verdict on every claim from what `one_run` says of each seed, after Holm's correction over the decidable
    claims of its letter; claims added under another letter change no verdict."""
    judged: dict[str, Verdict] = {}
    decidable: dict[str, dict[str, list[dict]]] = {}
    for name, claim in made.items():
        by_seed = {seed: said[name] for seed, (_, said) in runs.items()}
        files = [file for verdict in by_seed.values() for file in verdict.files]
        lacking = {seed: verdict.reason for seed, verdict in by_seed.items() if not verdict.numbers}
        why = next((f"seed {seed}: {reason}" for seed, reason in lacking.items()), "")
        why = lacking.popitem()[1] if len({*lacking.values()}) == 1 and len(lacking) == len(by_seed) else why
        voids = (seed for seed, verdict in by_seed.items() if verdict.verdict == verdicts.VOID)
        void = next((f"seed {seed}: {by_seed[seed].reason}" for seed in voids), "")
        unchecked = [seed for seed, (results_of, _) in runs.items() if not results_of.gate]
        if void or why:
            judged[name] = Verdict(verdicts.VOID if void else verdicts.OPEN, void or why, files=files)
            continue
        rows = verdicts.over_seeds({seed: verdict.numbers for seed, verdict in by_seed.items()})
        beside = verdicts.over_seeds({seed: verdict.beside for seed, verdict in by_seed.items()})
        why = next((f"{row['name']}: {row['note']}" for row in rows if row["value"] is None), "")
        if len(rows) < max(len(verdict.numbers) for verdict in by_seed.values()):
            why = "the seeds do not all have the same numbers; run their steps again with the same settings"
        if claim.ON_LAYERS and unchecked:
            why = f"seed {unchecked[0]}: the gate of step 2 was not checked (retrieval of an untrained model)"
        if len(runs) < verdicts.SEEDS:
            why = f"{len(runs)} seeds; a verdict needs {verdicts.SEEDS} or more"
        judged[name] = Verdict(verdicts.OPEN, why, rows, beside, files)
        if not why:
            decidable.setdefault(name[0], {})[name] = rows
    for family in decidable.values():
        for name, verdict in verdicts.decide(family).items():
            judged[name] = dataclasses.replace(verdict, beside=judged[name].beside, files=judged[name].files)
    return judged


def read_seeds(
    study_file, seeds: list[int], made: dict[str, ModuleType], draws: int = 2000, arm: str | None = None
) -> dict[int, tuple]:
    """For every seed, its results and what `one_run` says of them; only their models may differ, and must.

    Raises:
        InputError: seeds that share a checkpoint or their results, or were measured in different ways.
    """
    runs: dict[int, tuple] = {}
    for seed, study in zip(seeds, Study.of_seeds(study_file, seeds, arm), strict=True):
        loaded = evidence.Results(study, draws)
        for other, (before, _) in runs.items():
            if relatives.same_model(before.last, loaded.last):
                raise InputError(f"seeds {other} and {seed} have the same weights, {loaded.last['spec']}; train again")
        runs[seed] = loaded, one_run(made, loaded)
        first = runs[seeds[0]][0]
        for fact in evidence.OVER_SEEDS:
            one, other = (each.facts.get(fact) for each in (first, loaded))
            if one and other and one[0] != other[0]:
                raise InputError(f"{one[1]} and {other[1]} were made with different {fact.removeprefix('a ')}")
    return runs


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("--output", metavar="OUT", help="JSON to write (default: the study's); with --seeds, a folder")
    text = "verdicts over these seeds, five or more; default: one run, no verdict"
    p.add_argument("--seeds", type=cli.seeds, metavar="S,S,..", help=text)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study, made = Study.find(args.study, args.seed, args.arm), claims()
    if not study:
        raise InputError("claims are judged on a study: give --study FILE, or run where study.yaml is")
    if args.seeds:
        if len(args.seeds) < 2 or args.output is None:
            raise InputError("--seeds needs two seeds or more, and --output FOLDER for the table; one run is --seed")
        output = Path(args.output) / "claims_seeds.json"
    else:
        output = study.output(args.output, "--output", "claims")
    if output.suffix != ".json":
        raise InputError(f"--output {output}: give the name of a JSON file, or add --seeds")
    results.refuse_stranger(output, SCHEMA, args.overwrite, "another --output")
    payload: dict = {"study": study.name, "alpha": verdicts.ALPHA}
    if args.seeds:
        runs = read_seeds(args.study, args.seeds, made, arm=args.arm)
        payload |= {"seeds": args.seeds, "claims": over_seeds(made, runs)}
        facts = {"models": {str(seed): loaded.last for seed, (loaded, _) in runs.items()}}
        facts |= {"gate": {str(seed): loaded.gate for seed, (loaded, _) in runs.items()}}
    else:
        loaded = evidence.Results(study)
        payload |= {"seeds": [study.seed], "claims": one_run(made, loaded)}
        models = {"base": loaded.base, "target": loaded.last}
        facts = {"models": models, "seed": study.seed, "gate": loaded.gate, **loaded.sides()}
    texts = {name: claim.TEXT for name, claim in made.items()}
    judged = {name: {"text": texts[name], **dataclasses.asdict(one)} for name, one in payload["claims"].items()}
    write(output, results.plain(payload | {"claims": judged}), facts, made)


def write(output: Path, payload: dict, facts: dict, made: dict[str, ModuleType]) -> None:
    """Write tables and figure beside `output`, then `output` itself."""
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
