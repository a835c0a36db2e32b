"""The comparison of several runs for readers: tables in Markdown and LaTeX, and the figure."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean

from cpt_utils.base import cli, figures, languages, results
from cpt_utils.measures import verdicts

export, shown = cli.sibling("report/export.py"), cli.sibling("report/shown.py")
in_digits = cli.sibling("report/headlines.py").in_digits

SHADES = figures.PALETTE[:6]  # without yellow, and black, which is the base
LINES = ("-", "--", "-.", ":")
BY_STATE = re.compile(r"retrieval: (.+), h_(\d+)")  # numbers in the figure but not in the tables
ACCURACIES = {"layer_accuracy": "published", "unit_centred_accuracy": "unit, centred"}
SMALL = {"fontsize": 6.5}
ENDS = ("value", "ci_low", "ci_high")


# ---------------------------------------------------------------- what is drawn


def curves_of(table: list[dict]) -> dict[str, list[list[float]]]:
    """The available series of one run for the figure, as [[x, value], ..] by name."""

    def series(x: str, **columns) -> list[list[float]]:
        matches = export.chosen(table, **columns)
        return sorted([row[x], row["value"]] for row in matches if row[x] is not None)

    last = export.last_step([row for row in table if row["condition"] is None])
    curves = {}
    for measure in ACCURACIES:
        retrieval = {"result": "retrieval", "measure": measure}
        curves[measure] = series("hidden_state", **retrieval, step=last, condition=None)
        curves[f"{measure}, base"] = series("hidden_state", **retrieval, step=0)
        curves[f"{measure}, untrained"] = series("hidden_state", **retrieval, condition="untrained")
    target = next((row["language"] for row in export.chosen(table, result="retrieval")), None)
    curves["loss"] = series("step", result="language_loss", measure="nll_per_byte", language=target)
    curves["change"] = series("layer", result="int_and_sem", step=last)
    curves["neurons"] = series("layer", result="lsn_mask", measure="neurons", language=target)
    curves["activation"] = series("step", result="lsn_activation", condition="lsn", measure="activation/all_layers")
    return {name: values for name, values in curves.items() if values}


def mean_curves(seeds: list[dict]) -> dict[str, list[list[float]]]:
    """The mean over seeds of each series, and of each x, that all of them have."""
    means = {}
    for name in (name for name in seeds[0] if all(name in one for one in seeds)):
        series = [dict(map(tuple, one[name])) for one in seeds]
        means[name] = [[x, fmean(one[x] for one in series)] for x in series[0] if all(x in one for one in series)]
    return means


# ---------------------------------------------------------------- tables


def _by_name(numbers: list[dict]) -> dict[str, dict]:
    return {row["name"]: row for row in numbers if not BY_STATE.fullmatch(row["name"])}


def scope(payload: dict) -> str:
    n = len(payload["seeds"])
    over = f"over {n} seeds (t)" if n > 1 else "over the sentences, documents and rows that the runs share"
    text = f"Differences are the other run minus {payload['first']}; intervals are 95 %, {over}."
    return text + ("" if n > 1 else " There is one run of each: what another seed would give is not known.")


def _told(name: str, codes: dict[str, str]) -> str:
    """A number's name for a table, with the names of languages beside their codes."""
    return " ".join(codes.get(word, word) for word in name.replace("|", "\\|").split(" "))


def markdown(payload: dict) -> str:
    first, others = payload["first"], list(payload["differences"])
    values = {name: _by_name(numbers) for name, numbers in payload["values"].items()}
    gaps = {name: _by_name(numbers) for name, numbers in payload["differences"].items()}
    names = list(dict.fromkeys(key for own in values.values() for key in own))
    codes = {code: languages.named(code) for code in languages.known()}
    head = ["", *values, *(f"{name} minus {first}" for name in others)]
    body = [
        [
            _told(key, codes),
            *(in_digits(own[key]["value"]) if key in own else "-" for own in values.values()),
            *(in_digits(*map(own[key].get, ENDS)) if key in own else "-" for own in gaps.values()),
        ]
        for key in names
    ]
    better = "Lower losses are better. For swaps the number is their cost, so more is worse."
    parts = [f"# {payload['study']}: {verdicts.listed(list(values))}", results.markdown(head, body)]
    parts += [f"{scope(payload)} {better}"]
    agreed = [
        [name, _told(row["name"], codes), in_digits(row["value"])]
        for name, own in payload["agreement"].items()
        for row in own
    ]
    if agreed:
        parts += [f"Overlap with {first} (Jaccard):", results.markdown(["run", "", ""], agreed)]
    lacking = [f"- {name}, {s}: {why}" for name, own in payload["missing"].items() for s, why in own.items()]
    lacking += [f"- {name}: {why}" for name, why in payload["gate"].items()]
    return "\n\n".join(part.rstrip("\n") for part in [*parts, "\n".join(lacking)] if part) + "\n"


MAIN = (
    "retrieval: published, mean over h_1 .. h_L", "retrieval: unit, centred, last hidden state", "change: relative",
    "swaps: hub, ", "losses: ", "task: ",
)  # fmt: skip


def _short(name: str) -> str:
    """A number's name, short enough for a column."""
    section, words = name.split(": ", 1)
    words = words.replace("mean over h_1 .. h_L", "mean").replace("last hidden state", "last")
    if section == "losses":
        return f"loss, {languages.name(words)}"
    what, _, measure = words.partition(", ")
    return {"swaps": f"{what} swap, {measure}", "change": f"change of {measure}", "task": "task"}.get(section, words)


def latex(payload: dict) -> str:
    """The main numbers in a table of column width: each other run's value and its difference from the first."""
    tables = []
    for other, numbers in payload["differences"].items():
        gaps, values = _by_name(numbers), _by_name(payload["values"][other])
        body = []
        for key in (key for key in gaps if key.startswith(MAIN)):
            number = {"value": None, "ci_low": None, "ci_high": None} | gaps[key]
            gap = "-" if number["value"] is None else export.told([number])
            body.append((shown.escaped(_short(key)), export.told([values[key]], ends=False), gap))
        head = ("", shown.escaped(other), shown.escaped(f"minus {payload['first']}"))
        tables.append(shown.tabular([head, *body], "lrr"))
    return f"% {payload['study']}: {scope(payload)}\n" + "\n".join(tables)


# ---------------------------------------------------------------- the figure


def draw(path: Path, payload: dict) -> None:
    """Retrieval, loss, change, swaps and neurons of all runs, a colour each."""
    runs = list(payload["values"])
    looks = {
        name: {"color": SHADES[i % len(SHADES)], "linestyle": LINES[i // len(SHADES) % len(LINES)], "label": name}
        | {"marker": figures.MARKERS[i % len(figures.MARKERS)]}
        for i, name in enumerate(runs)
    }
    with figures.style() as plt:
        fig, axes = plt.subplots(3, 3, figsize=(figures.PAGE, 6.0))
        for axis, measure in zip(axes[0], ACCURACIES, strict=False):
            _retrieval(axis, payload, looks, measure)
        _gaps_by_state(axes[0, 2], payload, looks)
        target = figures.language(payload["target_lang"] or "the new language")
        _lines(axes[1, 0], payload, looks, "loss", "step (0 = base)", "nats per byte", f"loss in {target}")
        _gaps_by_language(axes[1, 1], payload, looks)
        _lines(axes[1, 2], payload, looks, "change", "layer", "mean |ΔW|", "change of the weights")
        _swaps(axes[2, 0], payload, looks)
        _lines(axes[2, 1], payload, looks, "neurons", "layer", "number", f"neurons of {target}")
        _lines(axes[2, 2], payload, looks, "activation", "step (0 = base)", "mean", "activation of these neurons")
        handles = [plt.Line2D([], [], **look) for look in looks.values()]
        handles += [plt.Line2D([], [], color=figures.colour("base"), linestyle="--", label="base")]
        handles += [plt.Line2D([], [], color=figures.colour("random"), linestyle=":", label="untrained")]
        title = f"{figures.HIDDEN_STATE}; bars and bands: 95 % intervals"
        fig.legend(handles=handles, loc="outside lower center", ncols=5, title=title)
        figures.save(fig, path)


def _titled(axis, title: str, there: bool) -> bool:
    """Set the panel's title, and say so if there is nothing to show."""
    axis.set_title(title, fontsize=8)
    if not there:
        axis.text(0.5, 0.5, "no results", transform=axis.transAxes, ha="center", va="center", color="0.4")
        axis.set_xticks([])
        axis.set_yticks([])
    return there


def _lines(axis, payload: dict, looks: dict, name: str, x: str, y: str, title: str) -> None:
    by_run = {run: curves[name] for run, curves in payload["curves"].items() if name in curves}
    if not _titled(axis, title, bool(by_run)):
        return
    most = max(map(len, by_run.values()))
    for run, values in by_run.items():
        axis.plot(*zip(*values, strict=True), **looks[run], markevery=max(1, most // 8))
    if x == "layer":
        figures.layer_axis(axis, most, most=8)
    axis.set(xlabel=x, ylabel=y)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)


def _retrieval(axis, payload: dict, looks: dict, measure: str) -> None:
    curves = payload["curves"]
    if not _titled(axis, f"retrieval, {ACCURACIES[measure]}", any(measure in own for own in curves.values())):
        return
    twins = {"base": ("base", "--"), "untrained": ("random", ":")}
    for end, (meaning, line) in twins.items():
        values = next((own[f"{measure}, {end}"] for own in curves.values() if f"{measure}, {end}" in own), None)
        if values:
            axis.plot(*zip(*values, strict=True), line, color=figures.colour(meaning))
    states = 0
    for run, own in curves.items():
        if measure in own:
            states = len(own[measure])
            axis.plot(*zip(*own[measure], strict=True), **looks[run], markevery=max(1, states // 8))
    figures.layer_axis(axis, states - 1, hidden_states=True, most=8)
    axis.set_xlabel("hidden state")
    axis.set_ylabel("accuracy")
    axis.set_ylim(bottom=0)


def _gaps_by_state(axis, payload: dict, looks: dict) -> None:
    by_run = {}
    for run, numbers in payload["differences"].items():
        matched = ((BY_STATE.fullmatch(row["name"]), row) for row in numbers if row["value"] is not None)
        by_run[run] = [(int(match[2]), row) for match, row in matched if match and match[1] == "published"]
    if not _titled(axis, f"retrieval, minus {payload['first']}", any(by_run.values())):
        return
    axis.axhline(0, color="black", linewidth=0.6)
    for run, points in by_run.items():
        x = [state for state, _ in points]
        axis.plot(x, [row["value"] for _, row in points], **looks[run], markevery=max(1, len(x) // 8))
        if points and all(row["ci_low"] is not None for _, row in points):
            ends = ([row[end] for _, row in points] for end in ("ci_low", "ci_high"))
            axis.fill_between(x, *ends, color=looks[run]["color"], alpha=0.2 / len(by_run), linewidth=0)
    figures.layer_axis(axis, max(len(points) for points in by_run.values()) - 1, hidden_states=True, most=8)
    axis.set_xlabel("hidden state")
    axis.set_ylabel("published accuracy")


def _gaps_by_language(axis, payload: dict, looks: dict) -> None:
    by_run = {
        run: {row["name"].partition(": ")[2]: row for row in numbers if row["name"].startswith("losses: ")}
        for run, numbers in payload["differences"].items()
    }
    names = {code: figures.language(code, "\n") for own in by_run.values() for code in own}
    if _titled(axis, f"loss, minus {payload['first']}", bool(names)):
        _points(axis, by_run, names, looks)
        axis.set_ylabel("nats per byte")


def _swaps(axis, payload: dict, looks: dict) -> None:
    names = {
        "swaps: hub, loss": "hub", "swaps: attention of the interface, loss": "attention,\ninterface",
        "swaps: FFN of LSN-rich layers, loss": "FFN,\nLSN-rich",
    }  # fmt: skip
    by_run = {run: {r["name"]: r for r in own if r["name"] in names} for run, own in payload["values"].items()}
    present = {key: words for key, words in names.items() if any(key in own for own in by_run.values())}
    if _titled(axis, "what swaps cost in loss", bool(present)):
        _points(axis, by_run, present, looks)
        axis.set_ylabel("nats per byte")


def _points(axis, of: dict[str, dict[str, dict]], names: dict[str, str], looks: dict) -> None:
    """A point with its interval for each run and name, those of one name side by side."""
    axis.axhline(0, color="black", linewidth=0.6)
    for i, (run, own) in enumerate(of.items()):
        shift = 0.5 * ((i + 0.5) / len(of) - 0.5)
        for x, key in enumerate(names):
            row = own.get(key)
            if row is None or row["value"] is None:
                continue
            look = {key: looks[run][key] for key in ("color", "marker")}
            if row["ci_low"] is not None:
                axis.vlines(x + shift, row["ci_low"], row["ci_high"], color=look["color"], linewidth=1)
            axis.plot(x + shift, row["value"], **look, linestyle="none")
    axis.set_xticks(range(len(names)), list(names.values()), **SMALL)
    axis.set_xlim(-0.6, len(names) - 0.4)
