"""Training a part of the stack against training all of it: cost, scores, and how far a run falls short of the full one.

In:   a study: its arms.json (cpt/compare_arms.py) and the train.json of its run and arms; with --seeds those of each
      seed. Or runs, RUN or NAME=RUN, the full one first, which are measured like arms at their last checkpoints.
Out:  OUT (default: the study's layer-ablation/runs.json): for every run its cost and scores, how far it falls short of
      the full run in points and as a share of its score, the share of its gain, and with five seeds or more whether it
      is within 3 % and 5 % (TOST, the numbers of claim C7); tables as .md, .tex and .csv, and a figure. For named runs
      also OUT.arms.json with the measurements.

Study: python layer-ablation/compare_runs.py --study demo/demo.yaml
Seeds: python layer-ablation/compare_runs.py --study studies/demo.yaml --seeds 0,1,2,3,4 -o results/demo-seeds/runs.json
Runs:  python layer-ablation/compare_runs.py full=build/demo/cpt outer=build/try/outer --study demo/demo.yaml \
           --measures nll -o build/try/runs.json
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from statistics import fmean, stdev

from cpt_utils.base import cli, results, sources
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study, dotted
from cpt_utils.checkpoints import refs
from cpt_utils.measures import evaluation, verdicts
from cpt_utils.measures.verdicts import Verdict, within

compare_arms, trainings, freezing = (cli.sibling(f"cpt/{n}.py") for n in ("compare_arms", "runs", "freezing"))
claims, interventions, evidence = (cli.sibling(f"report/{n}.py") for n in ("claims", "interventions", "evidence"))
runs_shown, c7 = cli.sibling("layer-ablation/runs_shown.py"), cli.sibling("report/claims/c7.py")

SCHEMA = "runs"
RESULTS = {"runs": "layer-ablation/runs.json"}
ASKED = {"runs": "How far does training a part of the stack fall short of training all of it?"}
CAPTIONS = {
    "runs": """Part III: 3. Training a part
        How far runs that train a part of the stack fall short of the full run, in percent of its score (below 0 they
        are better), and the base, which is not trained at all; in brackets the share of trained parameters. The shaded
        bands are 3 and 5 %. 95 % intervals are over sentences (documents, rows) for one run, and over seeds for
        several, with a mark for each seed.""",
}
MARGINS = (c7.MARGIN, c7.WIDER)
COSTS = runs_shown.COSTS
DRAWS = 2000  # for the intervals over units of one run; several seeds have none


# ---------------------------------------------------------------- the method


def cost(run: Path | None, row: dict) -> dict:
    """COSTS of a run from its train.json and timing.json, else from `row` of arms.json; None if unknown."""
    recorded: dict = {}
    if run is not None and (run / "train.json").is_file():
        recorded |= results.read_json(run / "train.json", trainings.SCHEMA)[1].get("cost") or {}
        if (run / "timing.json").is_file():
            recorded |= results.read_json(run / "timing.json", "cpt-training-time")[0]
    costs = {key: recorded.get(key, row.get(key)) for key in COSTS}
    if recorded.get("trainable_parameters") and recorded.get("parameters"):
        costs["share_of_parameters"] = recorded["trainable_parameters"] / recorded["parameters"]
    return costs


def costs_of(arms: interventions.Arms, folders: dict[str, Path]) -> dict[str, dict]:
    """The `cost` of every model of an arms.json; `folders`: those of their trainings, if known."""
    part = next((row for row in arms.models.values() if row.get("trainable_parameters")), None)
    all_parameters = part and round(part["trainable_parameters"] / part["share_of_parameters"])
    whole = {
        "base": {"trainable_parameters": 0, "share_of_parameters": 0.0},
        "plain": {"trainable_parameters": all_parameters, "share_of_parameters": 1.0},
    }
    return {name: cost(folders.get(name), whole.get(name, row)) for name, row in arms.models.items()}


def spread(values: list[float]) -> dict:
    return {"mean": fmean(values), "sd": stdev(values) if len(values) > 1 else None, "by_seed": values}


def short_of_full(found: dict[int, interventions.Arms], name: str, measures: list[str]) -> dict[str, dict]:
    """How far a run falls short of the full one in each measure, paired over seeds: `gap` in points and `short` as a
    share of its score, numbers as in claims, and by margin `p`, the larger p value of both bounds (TOST)."""

    def numbers(value, **more) -> list[dict]:
        rows = {
            seed: [
                arms.number("short of the full run", m, {"arm": name}, value, gained=False, **more) for m in measures
            ]
            for seed, arms in found.items()
        }
        return verdicts.over_seeds(rows) if len(rows) > 1 else next(iter(rows.values()))

    gaps = numbers(lambda base, plain, arm: plain - arm)
    shorts = {f"{margin:g}": numbers(c7.short, says=within(margin)) for margin in MARGINS}
    return {
        m: {
            "gap": kept(gaps[i]), "short": kept(shorts[f"{c7.MARGIN:g}"][i]),
            "p": {margin: rows[i]["p_value"] for margin, rows in shorts.items()},
        }
        for i, m in enumerate(measures)
    }  # fmt: skip


def kept(row: dict) -> dict:
    """The part of a number that does not depend on a margin."""
    return {key: row[key] for key in ("value", "ci_low", "ci_high", "n", "n_of", "values", "note") if key in row}


def judged(runs: dict[str, dict], margin: float, seeds: int) -> dict[str, Verdict]:
    """The verdict on every run: whether it is within a margin, by those of c7.MEASURES that were measured; Holm."""
    why = "one run" if seeds == 1 else f"{seeds} seeds; a verdict needs {verdicts.SEEDS} or more"
    undecided, rows = {}, {}
    for name, run in runs.items():
        short = run["short_of_full"]
        nums = [short[m]["short"] | {"name": interventions.words(m)} for m in c7.MEASURES if m in short]
        lacking = [row["note"] for row in nums if row["value"] is None] or ([] if nums else ["neither loss nor task"])
        undecided[name] = Verdict("no verdict" if seeds < verdicts.SEEDS else verdicts.OPEN, (lacking or [why])[0])
        if not lacking and seeds >= verdicts.SEEDS:
            rows[name] = [row | {"says": within(margin)} for row in nums]
    return undecided | verdicts.decide(rows)


def payload_of(found: dict[int, interventions.Arms], chosen: list[str], costs: dict[int, dict[str, dict]]) -> dict:
    """The content of OUT; `costs`: seed -> model of arms.json -> `cost`."""
    shares = compare_arms.over_seeds({seed: arms.file.payload for seed, arms in found.items()})
    measures, runs = shares["measures"], {}
    for name in ("plain", "base", *chosen):
        rows, paid = [arms.models[name] for arms in found.values()], [by_name[name] for by_name in costs.values()]
        known = {key: [row[key] for row in paid if row[key] is not None] for key in COSTS}
        runs[name] = {
            "what": shares["arms"][name]["what"] if name in chosen else None,
            "layers": rows[0].get("layers") if all(r.get("layers") == rows[0].get("layers") for r in rows) else None,
            "cost": {key: fmean(values) if values else None for key, values in known.items()},
            "values": {m: spread([row["values"][m] for row in rows]) for m in measures},
        }
        if name != "plain":
            runs[name]["short_of_full"] = short_of_full(found, name, list(measures))
        if name in chosen:
            runs[name] |= {"share_of_gain": {m: shares["arms"][name][m] for m in measures}, "within": {}}
    for margin in MARGINS:
        for name, verdict in judged({name: runs[name] for name in chosen}, margin, len(found)).items():
            row = {"verdict": verdict.verdict, "reason": verdict.reason, "p_value": verdict.p_value}
            runs[name]["within"][f"{margin:g}"] = row
    decided_by = [m for m in c7.MEASURES if m in measures]
    return {"seeds": list(found), "margins": MARGINS, "decided_by": decided_by, "measures": measures, "runs": runs}


# ---------------------------------------------------------------- reading or measuring the runs

Found = tuple[dict, list[str], dict]  # seed -> interventions.Arms, the compared arms, seed -> `costs_of`


def of_study(args, seeds: list[int]) -> Found:
    """The runs in a study's arms.json files.

    Raises:
        InputError: a file does not exist, contradicts the study or the other seeds, or lacks an arm.
    """
    for seed in seeds:
        Study.find(args.study, seed).input(None, "two runs or more", "arms", f" --seed {seed}")
    by_seed, costs = {}, {}
    read = claims.read_seeds(args.study, seeds, {"C7": c7}, draws=DRAWS if len(seeds) == 1 else 0)
    for seed, (read_results, _) in read.items():
        study, by_seed[seed] = read_results.study, interventions.arms(read_results)
        runs = {name: study.of_arm(name).get("run") for name in study.get("arms", {})}
        runs["plain"] = study.get("run")
        costs[seed] = costs_of(by_seed[seed], {name: Path(run) for name, run in runs.items()})
    arms = by_seed[seeds[0]]
    wanted = args.arms or [name for name, row in arms.models.items() if c7.parts(row)]
    wrong = [name for name in wanted if "what" not in arms.models.get(name, {})]
    if wrong or not wanted:
        known = ", ".join(name for name, row in arms.models.items() if "what" in row)
        what = f"no arm {wrong[0]}" if wrong else "no arm that trains only a part (train_only, lora)"
        raise InputError(f"{arms.file.path} has {what}; name some with --arms: {known}")
    return by_seed, wanted, costs


def of_runs(args, seeds: list[int], output: Path) -> Found | None:
    """The same for named runs, measured here; None in a process that writes nothing."""
    runs = named(([f"full={args.full}"] if args.full else []) + [run for run in args.runs if run != args.full])
    if len(seeds) > 1 and not all("{seed}" in run for run in runs.values()):
        raise InputError(
            "--seeds: every RUN needs {seed} in its path, as does --base; without RUN the study's arms are used"
        )
    by_seed, costs, chosen = {}, {}, []
    for seed in seeds:
        file = output.with_name(f"{dotted(output.stem, f'seed-{seed}' if len(seeds) > 1 else '')}.arms.json")
        result = measured(args, Study.find(args.study, seed), runs, file)
        if result is None:
            return None
        by_seed[seed], chosen, costs[seed] = result
    return by_seed, chosen, costs


def named(given: list[str]) -> dict[str, str]:
    """Runs by name, from NAME=RUN, or RUN, which is named after its folder; the first is the full one.

    Raises:
        InputError: two runs have one name, one has none, or there is only one run.
    """
    runs: dict[str, str] = {}
    for text in given:
        name, equals, run = text.partition("=")
        if not equals or os.path.exists(text):
            name, run = Path(text).name, text
        if not name:
            raise InputError(f"{text}: give the run a name, NAME=RUN")
        if name in runs or name in ("base", "plain"):
            raise InputError(f"{text}: another model is called {name}; give the run a name, NAME={run}")
        runs[name] = run
    if len(runs) < 2:
        raise InputError(f"{given[0]} alone has nothing to be compared with; give another RUN")
    return runs


def measured(args, study: Study, given: dict[str, str], output: Path) -> tuple | None:
    """Measure runs as compare_arms measures arms, into `output`; see `of_runs`.

    Raises:
        InputError: a run saw other batches than the full one, comes from another base, or ends at another step.
    """
    base, (full, *others) = study.value(args.base, "--base", "base"), given
    specs = {"base": base, "plain": given[full]} | {name: given[name] for name in others}
    specs = {name: spec.replace("{seed}", str(study.seed)) for name, spec in specs.items()}
    models = {name: refs.model(spec) if name == "base" else refs.run(spec)[-1] for name, spec in specs.items()}
    folders = {name: record_of(ref) for name, ref in models.items() if name != "base"}
    wanted, asked, trained = trainings.settings_of_plain(folders["plain"]), {}, {}
    if "full" in others:
        raise InputError(f"{given['full']} is not the first run, which is called full in every table; give NAME=RUN")
    for name, run in folders.items():
        made, what = trainings.settings_of(run)
        if made is None:
            cli.warn(f"{run} has no train.json: it is assumed to have seen the same batches as the others")
        else:
            trainings.refuse_other_start(run, made, models["base"], "give --base the model that it was trained from")
            if other := trainings.other_training(made, wanted, trainings.BATCHES):
                raise InputError(
                    f"{run} saw other batches than {folders['plain']} ({other}); compare runs that saw the same"
                )
            if other := trainings.other_training(made, wanted):
                cli.warn(f"{name} also differs from the full run in how it was trained: {other}")
        if models[name].step != models["plain"].step:
            raise InputError(f"{run} ends at step {models[name].step}, the full run at {models['plain'].step}")
        if name != "plain":
            asked[name], trained[name] = what_of(what), what
    if not compare_arms.measure(models, asked, trained, specs["plain"], study, output, args):
        return None
    payload, head = results.read_json(output, compare_arms.SCHEMA, allow_limited=True)
    file = evidence.File(output, "layer-ablation/compare_runs.py", payload, head)
    arms = interventions.Arms(file, results.read_tensors(output.with_suffix(".pt")), study.seed, DRAWS)
    return arms, list(asked), costs_of(arms, folders)


def record_of(ref: refs.ModelRef) -> Path:
    """The folder with the training record of a model: its own, or that of the run it is a checkpoint of."""
    folder = Path(ref.spec)
    return folder if (folder / "train.json").is_file() or ref.step in (None, 0) else folder.parent


def what_of(trained: dict) -> dict:
    """The keys that an arm of a study would have for what a training record says was trained."""
    mode = freezing.mode_of(trained)
    usual = freezing.usual_io(mode)
    keys = {mode: trained["words"]} if mode else {}
    return keys | ({"io": trained["io"]} if trained.get("io", usual) != usual else {})


# ---------------------------------------------------------------- the command


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    add = p.add_argument
    text = "run to measure, or NAME=RUN, the full one first; default: the study's arms"
    add("runs", nargs="*", metavar="RUN", help=text)
    add("--full", metavar="RUN", help="the full run, if it is not the first RUN")
    add("--base", metavar="B", help="the base of the runs; default: the study's base")
    add("--arms", nargs="+", metavar="NAME", help="arms of the study; default: those with train_only or lora")
    add("--seeds", type=cli.seeds, metavar="S,S,..", help="over these seeds, five or more for verdicts; default: one")
    text = "JSON to write; default: the study's layer-ablation/runs.json; needed with RUN and --seeds"
    add("-o", "--output", metavar="OUT", help=text)
    evaluation.add_flags(p)
    sources.add_flags(p)
    cli.add_forward_flags(p, batch_size=None, device_map=True)
    return p


def checked(args) -> bool:
    """Whether runs are named; InputError if flags do not go together."""
    runs = bool(args.runs or args.full)
    if args.arm is not None:
        raise InputError("all arms of the study are compared; leave out --arm")
    if (runs or args.seeds) and args.output is None:
        raise InputError("RUN and --seeds need --output FILE.json, outside the results of a single seed")
    if runs and args.arms:
        raise InputError("--arms are those of a study's arms.json; leave out either --arms or RUN")
    measuring = ("base", "measures", "heldout", "task", "limit", "source", "data_dir")
    used = [flag for flag in measuring if getattr(args, flag) is not None]
    if used and not runs:
        raise InputError(
            f"--{used[0].replace('_', '-')} goes with RUN; the study's arms are measured by cpt/compare_arms.py"
        )
    return runs


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    runs, study = checked(args), Study.find(args.study, args.seed)
    output, seeds = study.output(args.output, "--output", "runs"), args.seeds or [study.seed]
    if output.suffix != ".json":
        raise InputError(f"--output {output}: give the name of a JSON file")
    results.refuse_stranger(output, SCHEMA, args.overwrite, "another --output")
    read = of_runs(args, seeds, output) if runs else of_study(args, seeds)
    if read is None:
        return
    payload, head = results.plain(payload_of(*read)), read[0][seeds[0]].file.header
    facts = {key: head.get(key) for key in ("base_lang", "target_lang", "n_used", "n_available", "limit", "dtype")}
    plain = {str(seed): arms.file.header["models"]["plain"] for seed, arms in read[0].items()}
    facts["models"] = head["models"] if len(seeds) == 1 else plain
    runs_shown.draw(output.with_suffix(""), payload)
    texts = {".md": runs_shown.markdown, ".tex": runs_shown.latex, ".csv": runs_shown.table}
    for suffix, text in texts.items():
        results.write_text(output.with_suffix(suffix), text(payload))
    results.write_json(output, payload, results.header(SCHEMA, **facts))
    cli.say(f"{runs_shown.markdown(payload)}wrote {output}, .md, .tex, .csv, .pdf and .png")


if __name__ == "__main__":
    cli.run(main)
