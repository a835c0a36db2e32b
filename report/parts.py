"""What the report shows for each experiment: its question, the answer, figures, a few numbers, and what they rest on.

Questions, captions and file names of figures come from the scripts (cpt_utils/base/experiments.py); numbers are those
of report/rows.py that report/headlines.py picks.
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

OTHERS = ("Claims", "Figures of the paper")  # sections of captions that the page shows elsewhere
CONTROLS = ("layer_swap", "attn_int_swap", "ffn_lsn_swap")  # steps whose numbers are made with --controls
WIDE, SMALL = 1350, 900  # pixels: width of a figure over both columns; of one among several runs
ARMS, NEURONS = ("arms", "train.cpt"), ("languages.lsn", "tokens")
# Study keys without which a step cannot be measured: the page names these instead of a command that would fail.
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
    """A figure: its caption, the step beside whose result it is stored, and its file name."""

    caption: str
    step: str
    file: str


@dataclass
class Step:
    """An experiment: its question and its figures."""

    name: str
    script: str
    question: str
    part: str
    section: str
    figures: list[Figure] = field(default_factory=list)


def steps() -> list[Step]:
    """The experiments in the order of the README, each with its figures.

    A figure belongs to its step or, if that step is in another section, to the last step of the figure's section.
    """
    readme = (cli.REPOSITORY / "README.md").read_text(encoding="utf-8")
    captions = {name: said for name, said in experiments.captions().items() if said[0] not in OTHERS}
    owners = {name: _steps_of(name) for name in captions}
    steps_ = []
    for name, (question, script) in experiments.said("ASKED").items():
        names = sorted((caption for caption in owners if name in owners[caption]), key=lambda caption: caption != name)
        if names:
            part, section, _ = captions[names[0]]
            steps_.append(Step(name, script, question, part, section or ""))
    steps_.sort(key=lambda step: (step.part, _first_number(step.section), _position(readme, step.script)))
    for caption, (part, section, text) in captions.items():
        in_section = [step for step in steps_ if (step.part, step.section) == (part, section)]
        for step in [step for step in in_section if step.name in owners[caption]] or in_section[-1:]:
            owner = step.name if step.name in owners[caption] else owners[caption][0]
            step.figures.append(Figure(text, owner, _file(caption, owner)))
    return steps_


def _steps_of(caption: str) -> list[str]:
    """The steps that a caption may be about: that of its name, else those of its script, else those of the folder."""
    made = {step: script for step, (_, script) in experiments.said("RESULTS").items()}
    script = experiments.said("CAPTIONS")[caption][1]
    if made.get(caption) == script:
        return [caption]
    of_script = [step for step in made if made[step] == script]
    return of_script or [step for step in made if made[step].split("/")[0] == script.split("/")[0]]


def _file(caption: str, step: str) -> str:
    """The file name of a figure beside the result of `step`."""
    result = Path(experiments.result(step))
    return experiments.said("IMAGES").get(caption, (result.with_suffix(".png").name, ""))[0]


def _first_number(section: str) -> int:
    match = re.match(r"\d+", section)
    return int(match[0]) if match else 0


def _position(text: str, word: str) -> int:
    return at if (at := text.find(word)) >= 0 else len(text)


# ---------------------------------------------------------------- what a study has


class Run:
    """The results of a study, or of one of its seeds or arms.

    Attributes:
        label: its name beside other runs on the page; empty if it is alone.
        rows: its numbers by step.
        heads: the headers of its result files.
        last: the last training step that has a number.
        claims, head: the claims and the header of claims.json; empty if there is none.
        judged: when the claims on the page were judged (ISO time): that of claims.json, unless they are over seeds.
    """

    def __init__(self, study: Study, label: str = ""):
        self.study, self.label = study, label
        self.folder = study.folder
        if not self.folder.is_dir():
            raise InputError(f"{self.folder} does not exist: run the steps of the README on {study.path} first")
        self.rows: dict[str, list[dict]] = {}
        read = list(numbers.read(study))
        self.heads = {str(path): header for _, path, _, header in read}
        table = numbers.of_the_pair(numbers.rows(study, read), study)
        steps_ = [row["step"] or 0 for row in table if row["run"] == (study.arm or numbers.PLAIN)]
        self.last = max(steps_, default=0)
        for row in table:
            if row["result"] in CONTROLS and Path(row["file"]).stem != "controls":
                continue  # says what was swapped; the costs are in controls.json
            self.rows.setdefault(row["result"], []).append(row)
        self.claims, self.head = {}, {}
        if "claims" in self.rows:
            payload, self.head = results.read_json(study.result("claims"), "claims")
            self.claims = payload.get("claims", {})
        self.judged = self.head.get("time", "")

    def answer(self, step: str, numbers: list[dict | None]) -> str:
        """The sentence that answers a step's question."""
        n, counts = self.headers.get("lsn_layers", {}).get("n_layers_listed"), self.rows.get("lsn_layers", [])
        counts = {row["layer"]: row["value"] for row in counts if row["measure"] == "neurons"}
        rich = sorted(sorted(counts, key=lambda layer: (-counts[layer], layer))[: n or 0])
        return answers.answer(step, numbers, self.rows.get(step, []), self.study, self.claims, rich)

    def files(self, step: str) -> list[str]:
        return list(dict.fromkeys(row["file"] for row in self.rows.get(step, ())))

    @functools.cached_property
    def chief(self) -> dict[str, str]:
        """step -> its result file; of several, that of the last checkpoint, else the first."""
        files = {}
        for step, rows in self.rows.items():
            plain = [row for row in rows if row["condition"] is None] or rows
            files[step] = max(plain, key=lambda row: (row["step"] or 0, -len(row["file"])))["file"]
        return files

    @functools.cached_property
    def headers(self) -> dict[str, dict]:
        """step -> the header of its result file."""
        return {step: self.heads[file] for step, file in self.chief.items()}

    def figure(self, figure: Figure) -> Path | None:
        """The file of a figure; of several language pairs, that of the study's."""
        result = self.study.result(figure.step)
        folder = result.parent if result.suffix else result
        pair = "-".join(str(self.study.get(f"languages.{side}")) for side in ("base", "target"))
        files = sorted(folder.glob(figure.file.replace("{name}", self.study.name)))
        return next((path for path in files if path.parent.name == pair), files[0] if files else None)

    def command(self, step: Step) -> str:
        """The command that made the result of a step, or would make it."""
        recorded = self.headers.get(step.name, {}).get("command")
        if recorded:
            return f"python {step.script} {recorded.partition(' ')[2]}".rstrip()
        command = f"python {step.script} {self.flags}{' --controls' if step.name in CONTROLS else ''}"
        others = self.study.get("runs", {}) if step.name == "compare" else {}
        others = [name for name in others if not self.study.of_arm(name).result("claims").is_file()]
        seed = f" SEED={self.study.seed}" if "--seed" in self.flags else ""
        before = [f"make reproduce STUDY={self.study.path}{seed} ARM={name}" for name in others]
        return "\n".join([*before, command])

    def lacking(self, step: Step) -> tuple[str, str]:
        """Why a step has no result, and the command that would make it; no command if none can."""
        why = f"Not measured in {self.label or 'this study'}"
        if self.study.arm and step.name in ("arms", "runs", "compare"):
            return f"{why}: it is measured on the study's own run, not on {self.study.arm}.", ""
        keys = [key for key in NEEDS.get(step.name, ()) if not _has(self.study.values, key)]
        if keys:
            return f"{why}, whose file lacks {verdicts.listed(keys)} (docs/study.md).", ""
        if step.name == "runs" and not any({"train_only", "lora"} & {*arm} for arm in self.study.get("arms").values()):
            return f"{why}, none of whose arms trains only a part (train_only or lora, cpt/README.md).", ""
        return f"{why}.", self.command(step)

    @functools.cached_property
    def failed(self) -> dict:
        """When and at which steps the last run of the workflow failed (status.json); empty if it did not."""
        file = self.folder / "status.json"
        status, _ = results.read_json(file, "status") if file.is_file() else ({}, {})
        if status.get("state") != "failed" or not status.get("failed"):
            return {}
        return {"steps": status["failed"], "day": day(status["updated"])}

    @functools.cached_property
    def flags(self) -> str:
        """The flags that point a script at this run."""
        default = Study.find(self.study.path)
        words = f"--study {self.study.path}" + (f" --seed {self.study.seed}" if self.study.seed != default.seed else "")
        return words + (f" --arm {self.study.arm}" if self.study.arm else "")

    def claims_on(self, step: str) -> list[str]:
        """The claims that read a file of a step, even if the results have moved since."""
        ends = tuple(f"/{Path(file).relative_to(self.folder)}" for file in self.files(step))
        return [name for name, claim in self.claims.items() if any(file.endswith(ends) for file in claim["files"])]

    @property
    def stale(self) -> bool:
        """Whether results are newer than the claims that read them."""
        times = [self.headers[step].get("time", "") for step in self.rows if self.claims_on(step)]
        return max(times, default="") > self.judged


# ---------------------------------------------------------------- one step on the page


def shown_step(step: Step, runs: list[Run], where: Path) -> dict:
    """What the page shows for a step: question, answers and numbers; for each run, figures and what they rest on."""
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
    """Whether a study has a value at a dotted key, even if a variable in it is not set here."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values is not None


def undrawn(figure: Figure) -> dict:
    what = first_sentence(figure.caption).rstrip(".:")
    return {"what": what, "step": figure.step, "by": experiments.made_by(figure.step)}


def answered(step: Step, runs: list[Run], columns: list[list[tuple]]) -> list[tuple[str, str]]:
    """(which runs, sentence) for the answers to a step's question; runs with the same answer share it."""
    labels_by_sentence: dict[str, list[str]] = {}
    for run, column in zip(runs, columns, strict=True):
        with numbers.reading(run.chief.get(step.name, run.folder)):
            sentence = run.answer(step.name, [row for _, row in column])
        if sentence:
            labels_by_sentence.setdefault(sentence, []).append(run.label)
    if len(runs) == 1:
        return [("In this run", sentence) for sentence in labels_by_sentence]

    def within(labels: list[str]) -> str:
        if len(labels) == len(runs):
            return "In all"
        seeds = len(labels) > 1 and all(label.startswith("seed ") for label in labels)
        names = [label.removeprefix("seed ") if seeds else label for label in labels]
        return f"In {'seeds ' * seeds}{verdicts.listed(names)}"

    return [(within(labels), sentence) for sentence, labels in labels_by_sentence.items()]


def table(runs: list[Run], columns: list[list[tuple]]) -> list[dict]:
    """A row for each headline number: every run's and, of several seeds, the mean with the interval of Student's t."""
    if not any(row for column in columns for _, row in column):
        return []
    table_ = []
    for number in zip(*columns, strict=True):
        rows, words = [row for _, row in number], number[0][0]
        known = [row["value"] for row in rows if row and "text" not in row]
        seeds = of_seeds(runs) and len(known) == len(runs) > 2
        mean = headlines.in_digits(*stats.t_mean(known)[:3]) if seeds else ""
        cells = [cell(row, run.last, brief=len(runs) > 1) for row, run in zip(rows, runs, strict=True)]
        table_.append({"words": words, "mean": mean, "cells": cells})
    return table_


def of_seeds(runs: list[Run]) -> bool:
    """Whether the runs are several seeds of one study."""
    return len({run.study.path for run in runs}) == 1 < len({run.study.seed for run in runs}) == len(runs)


def cell(row: dict | None, last: int, brief: bool) -> dict:
    """A number with its interval (`brief`: without), and a note on what it is of, with any step but the `last`."""
    if row is None:
        return {"text": "none", "note": ""}
    ends = (None, None) if brief else (row["ci_low"], row["ci_high"])
    early = f"step {row['step']}, but the run has {last}" if row["step"] and row["step"] != last else ""
    note = [row.get("where") or "", early, f"n = {row['n']:,}" if row["n"] and not brief else ""]
    if row["controls"] and not brief:
        note.append(f"{row['controls']} controls")
    return {"text": row.get("text") or headlines.in_digits(row["value"], *ends), "note": ", ".join(filter(None, note))}


def rests(head: dict) -> str:
    """What a result rests on, by its header: models, data and settings; when and with which code it was made."""
    models, data = head.get("models") or {}, head.get("data") or {}
    steps, step = models.get("checkpoints"), next((ref.get("step") for ref in models.values() if ref.get("step")), None)
    step = next(iter(steps)) if steps and len(steps) == 1 else step
    parts = [f"the checkpoint of step {step}" if step is not None else ""]
    parts = [f"{len(steps)} checkpoints"] if steps and len(steps) > 1 else parts
    parts += [f"{data['n_used']:,} sentence pairs" if data.get("n_used") else "", *texts(head)]
    scored = (head.get("in_context") or {}).get("scored")
    parts.append(f"{scored:,} sentences translated in context" if scored else "")
    other = (models.get("other") or {}).get("spec")
    parts.append(f"the other run is {other}" if other else "")
    parts += [f"{key} {head[key]}" for key in ("seed", "dtype") if head.get(key) is not None]
    parts = "; ".join(filter(None, parts))
    return headlines.capital("; ".join(filter(None, [parts and f"rests on {parts}", made(head)])))


def texts(head: dict) -> list[str]:
    """Held-out text and task of a header, in words."""
    heldout, task = head.get("heldout") or {}, head.get("task") or {}
    parts = [f"{heldout['documents']:,} held-out documents"] if heldout.get("documents") else []
    by_language = [one["documents"] for one in heldout.values() if isinstance(one, dict) and one.get("documents")]
    if by_language:
        counts = f"{min(by_language):,}" + (f" to {max(by_language):,}" if len({*by_language}) > 1 else "")
        parts = [f"{counts} held-out documents in each of {len(by_language)} languages"]
    return parts + ([f"{task['rows']:,} rows of the task"] if task.get("rows") else [])


def made(head: dict) -> str:
    commit, time = head.get("git_commit"), head.get("time")
    parts = [f"made {day(time)}" if time else "", f"code {commit[:7]}{'+changes' * ('+' in commit)}" if commit else ""]
    return ", ".join(filter(None, parts))


def day(time: str) -> str:
    """ "30 November 2026"."""
    date = datetime.date.fromisoformat(time[:10])
    return f"{date.day} {date:%B %Y}"


def doubts(head: dict, of_claims: dict, study: Study) -> list[str]:
    """What a reader must know before believing a result."""
    sentences, gate = [], head.get("gate") or {}
    if gate.get("passed") is False:
        sentences.append("The gate was not passed: the layers that this is about are meaningless.")
    for role in ("base", "target"):
        own, other = ((one.get("models") or {}).get(role) for one in (head, of_claims))
        if own and other and not relatives.same_model(own, other):
            sentences.append(f"About another model than the claims: {own.get('spec')}, not {other.get('spec')}.")
    ref = (head.get("models") or {}).get("base") or {}
    spec, base = (str(one).rstrip("/") for one in (ref.get("spec"), study.get("base")))
    if "None" not in (spec, base) and Path(spec).resolve() != Path(base).resolve():
        sentences.append(f"Its base was {spec}, but the study's is {base}.")
    if isinstance(head.get("seed"), int) and head["seed"] != study.seed:
        sentences.append(f"It was made with seed {head['seed']}, but the study's is {study.seed}.")
    return sentences


def link(path: str | Path, where: Path) -> str:
    """The address of a file from the folder of the page."""
    return quote(Path(os.path.relpath(path, where)).as_posix())


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.:])\s", " ".join(text.split()), maxsplit=1)[0]


def image(path: Path, caption: str, small: bool) -> dict:
    """A figure for the page: the PNG itself or, side by side with others, a smaller one with fewer colours."""
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
        raise InputError(f"{path} is not a complete PNG image ({error}); run the step that draws it again") from None
    return {
        "source": f"data:image/png;base64,{base64.b64encode(content).decode()}", "width": width, "height": height,
        "alt": first_sentence(caption), "caption": caption, "share": width / WIDE,
    }  # fmt: skip
