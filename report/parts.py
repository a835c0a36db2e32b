"""What the report shows of each experiment: its question, the answer, figures, a few numbers, and what they rest on.

Questions, captions and places of figures are those that the scripts say of themselves (cpt_utils/base/experiments.py),
numbers those of report/rows.py that report/headlines.py picks.
"""

from __future__ import annotations

import base64
import datetime
import functools
import io
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from cpt_utils.base import cli, experiments, results, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import relatives
from cpt_utils.measures import verdicts

answers = cli.sibling("report/answers.py")
headlines = cli.sibling("report/headlines.py")
numbers = cli.sibling("report/rows.py")

OTHERS = ("Claims", "Figures of the paper")  # sections of captions that the page shows otherwise
CONTROLS = ("layer_swap", "attn_int_swap", "ffn_lsn_swap")  # steps whose numbers are made with --controls
WIDE, SMALL = 1350, 900  # pixels: of a figure over both columns; of one among many
ARMS, NEURONS = ("arms", "train.cpt"), ("languages.lsn", "tokens")
# Keys of a study without which nobody can measure a step: then the page names these, and no command that would fail.
NEEDS = {
    "arms": ARMS, "runs": ARMS, "compare": ("runs",), "connect": ("runs",), "routing": ("routing",),
    "router_steering": ("routing",), "downstream": ("data.task",), "language_loss": ("data.heldout",),
    "bigram": ("data.heldout",), "lsn_mask": NEURONS, "lsn_activation": NEURONS, "gate_lsn": NEURONS,
    "activation_correlation": NEURONS, "ffn_lsn_swap": NEURONS, "deactivation": (*NEURONS, "data.heldout"),
    "lsn_methods": (*NEURONS, "lsn.methods"),
}  # fmt: skip


# ---------------------------------------------------------------- what the scripts say


@dataclass(frozen=True)
class Figure:
    """A figure: its caption, the step beside whose result it lies, and its file there."""

    caption: str
    step: str
    file: str


@dataclass
class Step:
    """What an experiment asks, and its figures."""

    name: str
    script: str
    question: str
    part: str
    section: str
    figures: list[Figure] = field(default_factory=list)


def steps() -> list[Step]:
    """The experiments in the order of the README, each with its figures.

    A figure belongs to the step that it is of; where that one is asked in another section, to the last step of its own.
    """
    readme = (cli.REPOSITORY / "README.md").read_text(encoding="utf-8")
    captions = {name: said for name, said in experiments.captions().items() if said[0] not in OTHERS}
    owners = {name: _steps_of(name) for name in captions}
    found = []
    for name, (question, script) in experiments.said("ASKED").items():
        own = sorted((caption for caption in owners if name in owners[caption]), key=lambda caption: caption != name)
        if own:
            part, section, _ = captions[own[0]]
            found.append(Step(name, script, question, part, section or ""))
    found.sort(key=lambda step: (step.part, _first_number(step.section), _place(readme, step.script)))
    for caption, (part, section, text) in captions.items():
        near = [step for step in found if (step.part, step.section) == (part, section)]
        for step in [step for step in near if step.name in owners[caption]] or near[-1:]:
            of = step.name if step.name in owners[caption] else owners[caption][0]
            step.figures.append(Figure(text, of, _file(caption, of)))
    return found


def _steps_of(caption: str) -> list[str]:
    """The steps that a caption may be about: that of its name, else those of its script, else of the folder."""
    made = {step: script for step, (_, script) in experiments.said("RESULTS").items()}
    script = experiments.said("CAPTIONS")[caption][1]
    if made.get(caption) == script:
        return [caption]
    of_script = [step for step in made if made[step] == script]
    return of_script or [step for step in made if made[step].split("/")[0] == script.split("/")[0]]


def _file(caption: str, step: str) -> str:
    """The file of a figure in the folder of the result of `step`."""
    place = Path(experiments.result(step))
    return experiments.said("IMAGES").get(caption, (place.with_suffix(".png").name, ""))[0]


def _first_number(section: str) -> int:
    found = re.match(r"\d+", section)
    return int(found[0]) if found else 0


def _place(text: str, word: str) -> int:
    return found if (found := text.find(word)) >= 0 else len(text)


# ---------------------------------------------------------------- what a study has


class Run:
    """The results of a study, of one of its seeds or of one of its arms.

    Attributes:
        label: what tells it from the others on the page; empty where it is alone.
        rows: the numbers of its results by step.
        heads: the headers of its result files.
        last: the last step of the run that there is a number of.
        claims, head: what claims.json says, and its header; empty where it is not there.
        judged: when what the page says of claims was made (an ISO time): claims.json, unless verdicts are over seeds.
    """

    def __init__(self, study: Study, label: str = ""):
        self.study, self.label = study, label
        self.folder = study.folder
        if not self.folder.is_dir():
            raise InputError(f"{self.folder} does not exist: run the steps of the README on {study.path} first")
        self.rows: dict[str, list[dict]] = {}
        found = list(numbers.read(study))
        self.heads = {str(path): header for _, path, _, header in found}
        table = numbers.of_the_pair(numbers.rows(study, found), study)
        own = [row["step"] or 0 for row in table if row["run"] == (study.arm or numbers.PLAIN)]
        self.last = max(own, default=0)
        for row in table:
            if row["result"] in CONTROLS and Path(row["file"]).stem != "controls":
                continue  # what was swapped; what it cost is in controls.json
            self.rows.setdefault(row["result"], []).append(row)
        self.claims, self.head = {}, {}
        if "claims" in self.rows:
            payload, self.head = results.read_json(study.result("claims"), "claims")
            self.claims = payload.get("claims", {})
        self.judged = self.head.get("time", "")

    def answer(self, step: str, numbers: list[dict | None]) -> str:
        """What came out of a step in a sentence."""
        n, counts = self.headers.get("lsn_layers", {}).get("n_layers_listed"), self.rows.get("lsn_layers", [])
        counts = {row["layer"]: row["value"] for row in counts if row["measure"] == "neurons"}
        rich = sorted(sorted(counts, key=lambda layer: (-counts[layer], layer))[: n or 0])
        return answers.answer(step, numbers, self.rows.get(step, []), self.study, self.claims, rich)

    def files(self, step: str) -> list[str]:
        return list(dict.fromkeys(row["file"] for row in self.rows.get(step, ())))

    @functools.cached_property
    def chief(self) -> dict[str, str]:
        """step -> the file of its result; of several that of the last checkpoint, or the first."""
        found = {}
        for step, rows in self.rows.items():
            plain = [row for row in rows if row["condition"] is None] or rows
            found[step] = max(plain, key=lambda row: (row["step"] or 0, -len(row["file"])))["file"]
        return found

    @functools.cached_property
    def headers(self) -> dict[str, dict]:
        """step -> the header of the file of its result."""
        return {step: self.heads[file] for step, file in self.chief.items()}

    def figure(self, figure: Figure) -> Path | None:
        """The file of a figure; of several language pairs that of the study."""
        place = self.study.result(figure.step)
        folder = place.parent if place.suffix else place
        pair = "-".join(str(self.study.get(f"languages.{side}")) for side in ("base", "target"))
        there = sorted(folder.glob(figure.file.replace("{name}", self.study.name)))
        return next((path for path in there if path.parent.name == pair), there[0] if there else None)

    def command(self, step: Step) -> str:
        """What made the result of a step, or would make it."""
        said = self.headers.get(step.name, {}).get("command")
        if said:
            return f"python {step.script} {said.partition(' ')[2]}".rstrip()
        command = f"python {step.script} {self.flags}{' --controls' if step.name in CONTROLS else ''}"
        others = self.study.get("runs", {}) if step.name == "compare" else {}
        others = [name for name in others if not self.study.of_arm(name).result("claims").is_file()]
        seed = f" SEED={self.study.seed}" if "--seed" in self.flags else ""
        first = [f"make reproduce STUDY={self.study.path}{seed} ARM={name}" for name in others]
        return "\n".join([*first, command])

    def lacking(self, step: Step) -> tuple[str, str]:
        """Why there is no result of a step, and the command that makes it; no command where none can."""
        why = f"Not measured in {self.label or 'this study'}"
        if self.study.arm and step.name in ("arms", "runs", "compare"):
            return f"{why}: it is asked of the study's own run, not of {self.study.arm}.", ""
        keys = [key for key in NEEDS.get(step.name, ()) if not _has(self.study.values, key)]
        if keys:
            return f"{why}, whose file lacks {verdicts.listed(keys)} (docs/study.md).", ""
        if step.name == "runs" and not any({"train_only", "lora"} & {*arm} for arm in self.study.get("arms").values()):
            return f"{why}, none of whose arms trains a part alone (train_only or lora, cpt/README.md).", ""
        return f"{why}.", self.command(step)

    @functools.cached_property
    def failed(self) -> dict:
        """What the workflow's status.json says where its last run failed: when, and at which steps; else empty."""
        file = self.folder / "status.json"
        said, _ = results.read_json(file, "status") if file.is_file() else ({}, {})
        if said.get("state") != "failed" or not said.get("failed"):
            return {}
        return {"steps": said["failed"], "day": day(said["updated"])}

    @functools.cached_property
    def flags(self) -> str:
        """The flags by which a script is about this run."""
        own = Study.find(self.study.path)
        words = f"--study {self.study.path}" + (f" --seed {self.study.seed}" if self.study.seed != own.seed else "")
        return words + (f" --arm {self.study.arm}" if self.study.arm else "")

    def claims_on(self, step: str) -> list[str]:
        """The claims that read a file of a step, wherever the results were when they did."""
        own = tuple(f"/{Path(file).relative_to(self.folder)}" for file in self.files(step))
        return [name for name, claim in self.claims.items() if any(file.endswith(own) for file in claim["files"])]

    @property
    def stale(self) -> bool:
        """Whether results are newer than the claims that read them."""
        times = [self.headers[step].get("time", "") for step in self.rows if self.claims_on(step)]
        return max(times, default="") > self.judged


# ---------------------------------------------------------------- one step on the page


def shown_step(step: Step, runs: list[Run], where: Path) -> dict:
    """What the page says of a step: question and answer, of each run figures and what they rest on, the numbers."""
    of_runs = []
    for run in runs:
        with numbers.reading(run.chief.get(step.name, run.folder)):
            of_runs.append(shown_run(step, run, where, small=len(runs) > 1))
    columns = [headlines.three(step.name, run.rows.get(step.name, []), run.study) for run in runs]
    rows = table(runs, columns)
    captions = list(dict.fromkeys(figure.caption for figure in step.figures))
    return {
        "id": step.name, "part": step.part, "section": step.section, "question": step.question, "script": step.script,
        "label": f"{step.part.removeprefix('Part ')}.{_first_number(step.section)}",
        "captions": captions, "runs": of_runs, "table": rows, "means": any(row["mean"] for row in rows),
        "answers": answered(step, runs, columns),
        "claims": runs[0].claims_on(step.name), "measured": any(one["file"] for one in of_runs),
        "undefined": bool(headlines.HEADLINES.get(step.name)) and not rows,
    }  # fmt: skip


def shown_run(step: Step, run: Run, where: Path, small: bool) -> dict:
    files, head, chief = run.files(step.name), run.headers.get(step.name, {}), run.chief.get(step.name)
    name = chief and Path(chief).relative_to(run.folder)
    file = chief and {"name": name, "address": link(chief, where), "more": len(files) - 1}
    figures = [(figure, run.figure(figure)) for figure in step.figures]
    lacking, command = ("", run.command(step)) if files else run.lacking(step)
    return {
        "label": run.label, "lacking": lacking, "command": command, "rests": rests(head),
        "doubts": doubts(head, run.head, run.study), "file": file,
        "figures": [image(path, figure.caption, small) for figure, path in figures if path and files],
        "undrawn": [undrawn(figure) for figure, path in figures if not path and files],
    }  # fmt: skip


def _has(values, key: str) -> bool:
    """Whether a study says anything at a dotted key, though a variable in it may not be set here."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values is not None


def undrawn(figure: Figure) -> dict:
    what = first_sentence(figure.caption).rstrip(".:")
    return {"what": what, "step": figure.step, "by": experiments.made_by(figure.step)}


def answered(step: Step, runs: list[Run], columns: list[list[tuple]]) -> list[tuple[str, str]]:
    """(which runs, what came out of a step in a sentence); runs of which it is the same share it."""
    said: dict[str, list[str]] = {}
    for run, column in zip(runs, columns, strict=True):
        with numbers.reading(run.chief.get(step.name, run.folder)):
            sentence = run.answer(step.name, [row for _, row in column])
        if sentence:
            said.setdefault(sentence, []).append(run.label)
    if len(runs) == 1:
        return [("In this run", sentence) for sentence in said]

    def within(labels: list[str]) -> str:
        if len(labels) == len(runs):
            return "In all"
        seeds = len(labels) > 1 and all(label.startswith("seed ") for label in labels)
        names = [label.removeprefix("seed ") if seeds else label for label in labels]
        return f"In {'seeds ' * seeds}{verdicts.listed(names)}"

    return [(within(labels), sentence) for sentence, labels in said.items()]


def table(runs: list[Run], columns: list[list[tuple]]) -> list[dict]:
    """The numbers that matter, a row each: of every run, and of several seeds their mean with the interval of t."""
    if not any(row for column in columns for _, row in column):
        return []
    found = []
    for number in zip(*columns, strict=True):
        rows, words = [row for _, row in number], number[0][0]
        known = [row["value"] for row in rows if row and "text" not in row]
        seeds = of_seeds(runs) and len(known) == len(runs) > 2
        mean = headlines.in_digits(*stats.t_mean(known)[:3]) if seeds else ""
        cells = [cell(row, run.last, brief=len(runs) > 1) for row, run in zip(rows, runs, strict=True)]
        found.append({"words": words, "mean": mean, "cells": cells})
    return found


def of_seeds(runs: list[Run]) -> bool:
    """Whether runs are those of several seeds of one study."""
    return len({run.study.path for run in runs}) == 1 < len({run.study.seed for run in runs}) == len(runs)


def cell(row: dict | None, last: int, brief: bool) -> dict:
    """A number with its interval, beside others without, and what it is of: also the step, if it is not the `last`."""
    if row is None:
        return {"text": "none", "note": ""}
    ends = (None, None) if brief else (row["ci_low"], row["ci_high"])
    early = f"step {row['step']}, the run has {last}" if row["step"] and row["step"] != last else ""
    note = [row.get("where") or "", early, f"n = {row['n']:,}" if row["n"] and not brief else ""]
    if row["controls"] and not brief:
        note.append(f"{row['controls']} controls")
    return {"text": row.get("text") or headlines.in_digits(row["value"], *ends), "note": ", ".join(filter(None, note))}


def rests(head: dict) -> str:
    """What a result rests on, by its header: models, data, settings, and when it was made with which code."""
    models, data = head.get("models") or {}, head.get("data") or {}
    steps, step = models.get("checkpoints"), next((ref.get("step") for ref in models.values() if ref.get("step")), None)
    step = next(iter(steps)) if steps and len(steps) == 1 else step
    said = [f"the checkpoint of step {step}" if step is not None else ""]
    said = [f"{len(steps)} checkpoints"] if steps and len(steps) > 1 else said
    said += [f"{data['n_used']:,} sentence pairs" if data.get("n_used") else "", *texts(head)]
    scored = (head.get("in_context") or {}).get("scored")
    said.append(f"{scored:,} sentences translated in context" if scored else "")
    other = (models.get("other") or {}).get("spec")
    said.append(f"the other run is {other}" if other else "")
    said += [f"{key} {head[key]}" for key in ("seed", "dtype") if head.get(key) is not None]
    said = "; ".join(filter(None, said))
    return headlines.capital("; ".join(filter(None, [said and f"rests on {said}", made(head)])))


def texts(head: dict) -> list[str]:
    """Held-out text and task of a header, in words."""
    heldout, task = head.get("heldout") or {}, head.get("task") or {}
    said = [f"{heldout['documents']:,} held-out documents"] if heldout.get("documents") else []
    by_language = [one["documents"] for one in heldout.values() if isinstance(one, dict) and one.get("documents")]
    if by_language:
        counts = f"{min(by_language):,}" + (f" to {max(by_language):,}" if len({*by_language}) > 1 else "")
        said = [f"{counts} held-out documents in each of {len(by_language)} languages"]
    return said + ([f"{task['rows']:,} rows of the task"] if task.get("rows") else [])


def made(head: dict) -> str:
    commit, time = head.get("git_commit"), head.get("time")
    said = [f"made {day(time)}" if time else "", f"code {commit[:7]}{'+changes' * ('+' in commit)}" if commit else ""]
    return ", ".join(filter(None, said))


def day(time: str) -> str:
    """ "30 November 2026"."""
    date = datetime.date.fromisoformat(time[:10])
    return f"{date.day} {date:%B %Y}"


def doubts(head: dict, of_claims: dict, study: Study) -> list[str]:
    """What a reader must know before believing a result."""
    found, gate = [], head.get("gate") or {}
    if gate.get("passed") is False:
        found.append("The gate was not passed: the layers that this is about mean nothing.")
    for role in ("base", "target"):
        own, other = ((one.get("models") or {}).get(role) for one in (head, of_claims))
        if own and other and not relatives.same_model(own, other):
            found.append(f"Of another model than the claims: {own.get('spec')}, not {other.get('spec')}.")
    ref = (head.get("models") or {}).get("base") or {}
    spec, base = (str(one).rstrip("/") for one in (ref.get("spec"), study.get("base")))
    if "None" not in (spec, base) and Path(spec).resolve() != Path(base).resolve():
        found.append(f"Its base was {spec}, the study's is {base}.")
    if isinstance(head.get("seed"), int) and head["seed"] != study.seed:
        found.append(f"It was made with seed {head['seed']}, the study's is {study.seed}.")
    return found


def link(path: str | Path, where: Path) -> str:
    """The address of a file from the folder of the page."""
    return quote(Path(os.path.relpath(path, where)).as_posix())


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.:])\s", " ".join(text.split()), maxsplit=1)[0]


def image(path: Path, caption: str, small: bool) -> dict:
    """A figure as it stands in the page: the PNG itself, or of many side by side a smaller one of fewer colours."""
    from PIL import Image

    content = path.read_bytes()
    try:
        Image.open(io.BytesIO(content)).verify()
        picture = Image.open(io.BytesIO(content))
        width, height = picture.size
        if small:
            size = (min(width, SMALL), round(height * min(width, SMALL) / width))
            drawn = io.BytesIO()
            picture.convert("RGB").resize(size).quantize(64).save(drawn, "PNG", optimize=True)
            content = drawn.getvalue()
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for a damaged file
        raise InputError(f"{path} is no whole PNG image ({error}); run the step that draws it again") from None
    return {
        "source": f"data:image/png;base64,{base64.b64encode(content).decode()}", "width": width, "height": height,
        "alt": first_sentence(caption), "caption": caption, "share": width / WIDE,
    }  # fmt: skip
