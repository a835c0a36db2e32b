"""Renders runs.json: tables in Markdown and LaTeX, every number as CSV, and the figure."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from cpt_utils.base import cli, results
from cpt_utils.measures import verdicts

compare_arms = cli.sibling("cpt/compare_arms.py")
interventions, shown = cli.sibling("report/interventions.py"), cli.sibling("report/shown.py")

OUTSIDE = ("retrieval_mean", "lsn_activation")  # not in the figure
COSTS = ("trainable_parameters", "share_of_parameters", "optimizer_bytes", "seconds_per_step")

# ---------------------------------------------------------------- cells


def called(name: str) -> str:
    return "full" if name == "plain" else name


def percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f}"


def score(own: dict) -> str:
    """ "0.3652" for one run, "0.3652 ± 0.0120" over seeds."""
    return f"{own['mean']:.4f}" + (f" ± {own['sd']:.4f}" if own["sd"] is not None else "")


def costs(run: dict) -> list[str]:
    cost = run["cost"]
    memory, seconds = cost["optimizer_bytes"], cost["seconds_per_step"]
    return [
        "-" if cost["trainable_parameters"] is None else f"{cost['trainable_parameters']:,.0f}",
        percent(cost["share_of_parameters"]),
        "-" if memory is None else f"{memory / 2**20:.1f}",
        "-" if seconds is None else f"{seconds:.3f}",
    ]


def short(one: dict) -> str:
    """ "+0.0095; 2.6 % [2.1, 3.1]": short of the full run in points and as a share of its score; or why it has none."""
    gap, share = one["gap"], one["short"]
    if gap["value"] is None:
        return gap["note"]
    text = f"{gap['value']:+.4f}"
    if share["value"] is None:
        return f"{text}; {share['note']}"
    ends = "" if share["ci_low"] is None else f" [{percent(share['ci_low'])}, {percent(share['ci_high'])}]"
    return f"{text}; {percent(share['value'])} %{ends}"


def verdict(run: dict, margin: float, with_p: bool = True) -> str:
    """ "yes (p = 0.012)", "no (..)", "undecided (..)", "no verdict"; "" for full run and base."""
    row = run.get("within", {}).get(f"{margin:g}")
    if row is None:
        return ""
    text = {verdicts.YES: "yes", verdicts.NO: "no"}.get(row["verdict"], row["verdict"])
    return f"{text} ({verdicts.shown_p(row['p_value'])})" if with_p and row["p_value"] is not None else text


def scope(payload: dict) -> str:
    """What the intervals are over, and what the verdicts mean."""
    seeds, decided = len(payload["seeds"]), [interventions.words(measure) for measure in payload["decided_by"]]
    text = "One run: no verdict. Intervals are over sentences (documents, rows)" if seeds == 1 else (
        f"{seeds} seeds" + (f": no verdict, which needs {verdicts.SEEDS}" if seeds < verdicts.SEEDS else "")
        + ". Intervals are over seeds"
    )  # fmt: skip
    text += ", 95 %; below 0 is better than the full run."
    if seeds >= verdicts.SEEDS and decided:
        text += f" Within a margin: {verdicts.listed(decided)} on both sides (TOST), p after Holm over the runs."
    return text


# ---------------------------------------------------------------- tables


def markdown(payload: dict) -> str:
    runs, measures, margins = payload["runs"], payload["measures"], payload["margins"]
    labels = [what["label"] for what in measures.values()]
    head = ["run", "trains", "parameters", "% of all", "optimizer (MiB)", "s / step", *labels]
    rows = [
        [called(name), compare_arms.told(run["what"] or {}), *costs(run), *(score(run["values"][m]) for m in measures)]
        for name, run in runs.items()
    ]
    parts = ["## Costs and scores", results.markdown(head, rows)]
    rows = [
        [name, *(short(run["short_of_full"][m]) for m in measures), *(verdict(run, margin) for margin in margins)]
        for name, run in runs.items() if "short_of_full" in run
    ]  # fmt: skip
    head = ["run", *labels, *(f"within {100 * margin:g} %" for margin in margins)]
    parts += ["## Short of the full run: points; % of its score", results.markdown(head, rows)]
    rows = [
        [name, *(compare_arms.gain_told(run["share_of_gain"][m]) for m in measures)]
        for name, run in runs.items() if "share_of_gain" in run
    ]  # fmt: skip
    parts += ["## Share of the full run's gain", results.markdown(["run", *labels], rows), scope(payload)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def latex(payload: dict) -> str:
    """A table one column wide: % trained, the deciding measures with % short of the full run, the verdicts."""
    margins, deciding = payload["margins"], payload["decided_by"]
    head = [interventions.words(m) for m in deciding] + [rf"{100 * margin:g}\,\%" for margin in margins]
    rows = [("run", r"\%", *head)]
    for name, run in payload["runs"].items():
        cells = [shown.escaped(called(name)), percent(run["cost"]["share_of_parameters"], 0)]
        for m in deciding:
            share = run["short_of_full"][m]["short"]["value"] if "short_of_full" in run else None
            mean = f"{run['values'][m]['mean']:.3f}"
            cells.append(mean if share is None else shown.escaped(f"{mean} ({percent(share)})"))
        rows.append((*cells, *(shown.escaped(verdict(run, margin, with_p=False)) for margin in margins)))
    return f"% {scope(payload)}\n" + shown.tabular(rows, "l" + "r" * (1 + len(deciding)) + "l" * len(margins))


def table(payload: dict) -> str:
    """Every number except those of single seeds as CSV, one line per run; shares are not in percent."""
    margins = [f"{margin:g}" for margin in payload["margins"]]
    keys = ["mean", "sd", *(f"{one}{end}" for one in ("gap", "short") for end in ("", "_low", "_high"))]
    keys += [*(f"p_{margin}" for margin in margins), "gain", "gain_sd", "gain_n"]
    head = ["run", "trains", "layers", *COSTS, *(f"{m}.{key}" for m in payload["measures"] for key in keys)]
    lines = [head + [f"within_{margin}{end}" for margin in margins for end in ("", "_p")]]
    for name, run in payload["runs"].items():
        layers = " ".join(map(str, run["layers"] or []))
        line = [called(name), compare_arms.told(run["what"] or {}), layers, *(run["cost"][key] for key in COSTS)]
        for m in payload["measures"]:
            short_of = run.get("short_of_full", {}).get(m, {"gap": {}, "short": {}, "p": {}})
            gain = run.get("share_of_gain", {}).get(m, {})
            line += [run["values"][m]["mean"], run["values"][m]["sd"]]
            line += [short_of[row].get(key) for row in ("gap", "short") for key in ("value", "ci_low", "ci_high")]
            line += [*map(short_of["p"].get, margins), *map(gain.get, ("mean", "sd", "n"))]
        within = [run.get("within", {}).get(margin, {}) for margin in margins]
        lines.append(line + [row.get(key) for row in within for key in ("verdict", "p_value")])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


# ---------------------------------------------------------------- the figure


def draw(path: Path, payload: dict) -> None:
    """One panel per measure, one row per run: how far it falls short of the full run in percent of its score."""
    labels = {}
    for name, run in payload["runs"].items():
        share = run["cost"]["share_of_parameters"]
        if "short_of_full" in run:
            labels[f"{name} ({percent(share, 0)} %)" if share else name] = run["short_of_full"]

    def points(measure: str, label: str):
        row = labels[label][measure]["short"]
        if row["value"] is None:
            return [], None, None
        ends = None if row["ci_low"] is None else (100 * row["ci_low"], 100 * row["ci_high"])
        return [100 * value for value in (row.get("values") or {}).values()], 100 * row["value"], ends

    measures = {m: what for m, what in payload["measures"].items() if m not in OUTSIDE}
    look = {"axis_label": "% short of full", "lines": (("-", 0, "full run"),)}
    look["bands"] = tuple(100 * margin for margin in payload["margins"])
    compare_arms.panels(path, measures, list(labels), points, **look)
