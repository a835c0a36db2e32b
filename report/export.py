"""Every number of a study in one table, and LaTeX tables of the main ones as wide as a column of a paper.

In:   a study, several of its seeds (--seeds), or several study files; results of a study's `arms` and other `runs`
      (made with --arm) are read, too.
Out:  OUT/numbers.csv and numbers.parquet (columns: see report/README.md), OUT/tables/*.tex. OUT is --output; default:
      report/ below the study's results.

Full: python report/export.py --study studies/demo.yaml --seeds 0,1,2,3,4 --output build/try/numbers
Tiny: python report/export.py --study demo/tiny.yaml
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from statistics import fmean, stdev

from cpt_utils.base import cli, languages, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study

rows = cli.sibling("report/rows.py")
shown = cli.sibling("report/shown.py")

RESULTS = {"numbers": "report/numbers.csv"}
STEPS = 6  # rows of a table over steps, evenly chosen if the run has more
Cells = tuple[str, ...]


# ---------------------------------------------------------------- which studies


def views(study: Study) -> list[Study]:
    """The study itself, and those of its arms and other runs that have results."""
    named = [*(study.get("arms") or {}), *(study.get("runs") or {})] if not study.arm else []
    others = [study.of_arm(name) for name in named]
    return [study, *(one for one in others if one.folder.is_dir())]


def table(studies: list[Study]) -> list[dict]:
    """The rows of all studies, with their arms and other runs.

    Raises:
        InputError: there is no result, or two studies have the same name, seed and run.
    """
    by_run: dict[tuple, tuple[Study, list[dict]]] = {}
    for study in (view for one in studies for view in views(one)):
        key = study.name, study.seed, study.arm
        if key in by_run:
            raise InputError(f"{by_run[key][0].path} and {study.path} are both called {study.name}; rename one (name)")
        by_run[key] = study, rows.rows(study)
    every = [row for _, numbers in by_run.values() for row in numbers]
    if not every:
        places = ", ".join(str(study.result("numbers").parent.parent) for study in studies)
        raise InputError(f"{places} holds no result; run the steps of the README first")
    return every


# ---------------------------------------------------------------- the table


def write_csv(path: Path, every: list[dict]) -> None:
    """Write the table as CSV; what is missing or does not apply is an empty cell."""
    with results.replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(every)


def write_parquet(path: Path, every: list[dict]) -> None:
    import pyarrow
    from pyarrow import parquet

    kinds = dict.fromkeys(rows.COLUMNS, pyarrow.string())
    kinds |= dict.fromkeys(rows.WHOLE, pyarrow.int64())
    kinds |= dict.fromkeys(("value", "ci_low", "ci_high"), pyarrow.float64())
    with results.replacing(path) as temporary:
        parquet.write_table(pyarrow.Table.from_pylist(every, schema=pyarrow.schema(kinds.items())), temporary)


# ---------------------------------------------------------------- LaTeX


def chosen(every: list[dict], **columns) -> list[dict]:
    """The rows with these columns, in the order of the table."""
    return [row for row in every if all(row[key] == value for key, value in columns.items())]


def told(every: list[dict], scale: float = 1, ends: bool = True, **columns) -> str:
    """A number times `scale` with its interval (not if `ends` is False); over seeds, their mean and standard deviation,
    with the number of seeds as superscript if some lack it; "-" if there is none."""
    matches, seeds = chosen(every, **columns), len({row.get("seed") for row in every})
    values = [scale * row["value"] for row in matches]
    if not values:
        return "-"
    text = _number(fmean(values)) + (f"$^{{{len(values)}}}$" if len(values) < seeds else "")
    if len(values) > 1 and ends:
        return rf"{text} \scriptsize$\pm$ {_number(stdev(values))}"
    interval = [matches[0][end] for end in ("ci_low", "ci_high")]
    if seeds > 1 or not ends or None in interval:
        return text
    return rf"{text} \scriptsize[{', '.join(_number(scale * end) for end in interval)}]"


def _number(value: float) -> str:
    """Three decimals without a leading 0; whole numbers as they are."""
    text = f"{value:.0f}" if value and value == int(value) else re.sub(r"^(-?)0\.", r"\1.", f"{value:.3f}")
    return text.replace("-", "$-$")


def last_step(every: list[dict]) -> int:
    return max((row["step"] for row in every if row["step"]), default=0)


def retrieval(every: list[dict]) -> tuple[Cells, list[Cells]]:
    """Accuracy at the first, best and last hidden state."""
    selected = chosen(every, result="retrieval")
    states, last = {row["hidden_state"] for row in selected}, last_step(chosen(selected, condition=None))
    body = []
    models = (("untrained", {"condition": "untrained"}), ("base", {"step": 0}), (f"step {last}", {"step": last}))
    for measure, words in (("layer_accuracy", "published"), ("unit_centred_accuracy", "unit, centred")):
        for name, model in models:
            own = chosen(selected, measure=measure, **({"condition": None} | model))
            means = {
                state: fmean(row["value"] for row in at) for state in states if (at := chosen(own, hidden_state=state))
            }
            if means:
                best, ends = max(means, key=means.__getitem__), (min(means), max(means))
                first, final = (told(own, ends=False, hidden_state=state) for state in ends)
                body.append((f"{name}, {words}", first, f"{told(own, hidden_state=best)} ($h_{{{best}}}$)", final))
    return ("accuracy", "first", "best", "last"), body


def change(every: list[dict]) -> tuple[Cells, list[Cells]]:
    """Mean |dW| of interface and hub, times 1000, and relative change of attention and the FFN, over steps."""
    mean_abs, relative = (("int_and_sem", "mean_abs"), 1000), (("attn_vs_ffn", "pooled_relative"), 1)
    columns = [(mean_abs, "interface"), (mean_abs, "semantic_hub"), (relative, "attention"), (relative, "ffn")]
    parts = {
        component: chosen(every, result=result, measure=measure, component=component)
        for ((result, measure), _), component in columns
    }
    steps = shown.evenly(sorted({row["step"] for part in parts.values() for row in part}), STEPS)
    body = [
        (str(s), *(told(parts[component], scale=scale, step=s) for (_, scale), component in columns)) for s in steps
    ]  # fmt: skip
    return ("step", "interface", "hub", "attention", "FFN"), body


def swaps(every: list[dict]) -> tuple[Cells, list[Cells]]:
    """What a swap changes in loss and retrieval, relative to the checkpoint."""
    body = []
    for result, names in {
        "layer_swap": {"base": "base", "semantic_hub": "hub"},
        "attn_int_swap": {"attention_interface": "attention, interface", "ffn_interface": "FFN, interface"},
        "ffn_lsn_swap": {"ffn_lsn_rich": "FFN, LSN-rich", "attention_lsn_rich": "attention, LSN-rich"},
    }.items():
        for condition, words in names.items():
            matches = chosen(every, result=result, condition=condition)
            cells = [told(matches, measure=f"change/{m}") for m in ("nll_per_byte", "retrieval_readout")]
            body += [(words, *cells)] if matches and cells != ["-", "-"] else []
    return ("swapped to the base", "loss", "retrieval"), body


def losses(every: list[dict]) -> tuple[Cells, list[Cells]]:
    """The loss of every language before and after CPT, nats per byte, and its change."""
    selected, body = chosen(every, result="language_loss"), []
    last = last_step(selected)
    for code in dict.fromkeys(row["language"] for row in selected):
        matches = chosen(selected, language=code)
        ends = [told(matches, ends=False, measure="nll_per_byte", step=step) for step in (0, last)]
        body.append((shown.escaped(languages.name(code)), *ends, told(matches, step=last, measure="change")))
    return ("loss", "base", f"step {last}", "change"), body


def neurons(every: list[dict]) -> tuple[Cells, list[Cells]]:
    """The neurons of every language, and what silencing them does to the loss in it."""
    body = []
    for row in chosen(every, result="deactivation", measure="n_neurons", seed=every[0]["seed"]):
        code = row["condition"]
        cells = (told(every, result="deactivation", condition=code, measure=m) for m in ("n_neurons", "diagonal/harm"))
        body.append((shown.escaped(languages.name(code)), *cells))
    return ("language", "neurons", "silenced: its loss"), body


def arms(every: list[dict]) -> tuple[Cells, list[Cells]]:
    """The share of the plain run's gain that each arm reached."""
    selected = chosen(every, result="arms")
    body = []
    for name in dict.fromkeys(row["run"] for row in selected if row["run"] != rows.PLAIN):
        cells = [told(selected, run=name, measure=f"share/{m}") for m in ("nll_per_byte", "task_accuracy")]
        body.append((shown.escaped(name), *cells))
    return ("share of the gain", "loss", "task"), body


TABLES = {"retrieval": retrieval, "change": change, "swaps": swaps, "losses": losses, "neurons": neurons, "arms": arms}


def latex(name: str, every: list[dict]) -> str | None:
    """One of TABLES for a study's own run; None if its results are missing."""
    head, body = TABLES[name](every)
    if not body:
        return None
    seeds = {row["seed"] for row in every}
    over = f"{len(seeds)} seeds, mean and standard deviation" if len(seeds) > 1 else "one run, 95 % intervals"
    over += " (superscript: number of seeds, if fewer)" if len(seeds) > 1 else ""
    text = f"% {every[0]['study']}: {TABLES[name].__doc__.splitlines()[0]}\n% {over}; for \\footnotesize in a column.\n"
    return text + shown.tabular([head, *body], "l" + "r" * (len(head) - 1))


# ---------------------------------------------------------------- command line


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("studies", nargs="*", metavar="FILE", help="study files, instead of --study")
    text = "seeds of the study that have results; default: the study's own"
    p.add_argument("--seeds", type=cli.seeds, metavar="S,S,..", help=text)
    text = "folder to write to; default, for one study and seed: the study's"
    p.add_argument("-o", "--output", metavar="OUT", help=text)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    if args.studies and args.study:
        raise InputError("give study files or --study, not both")
    files = args.studies or [args.study]
    seeds = args.seeds or [args.seed]
    studies = [study for file in files for study in Study.of_seeds(file, seeds, args.arm)]
    if not all(studies):
        raise InputError("numbers are exported from a study: give --study FILE, or run where study.yaml is")
    if len(studies) > 1 and args.output is None:
        raise InputError("several seeds or studies need --output FOLDER")
    folder = Path(args.output) if args.output else studies[0].result("numbers").parent
    every = table(studies)
    write_csv(folder / "numbers.csv", every)
    write_parquet(folder / "numbers.parquet", every)
    cli.say(f"wrote {folder}/numbers.csv and .parquet: {len(every)} numbers of {len({r['file'] for r in every})} files")
    name, arm = studies[0].name, studies[0].arm or rows.PLAIN
    selected = [row for row in every if row["study"] == name and (row["run"] == arm or row["result"] == "arms")]
    selected = rows.of_the_pair(selected, studies[0])
    for which in TABLES:
        if (text := latex(which, selected)) is None:
            cli.say(f"tables/{which}.tex is left out: its results are missing")
        else:
            results.write_text(folder / "tables" / f"{which}.tex", text)


if __name__ == "__main__":
    cli.run(main)
