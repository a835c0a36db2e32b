"""The world in which commands are made to fail: a tiny study, every command on it, and what counts as unharmed.

A `Bench` runs the whole chain once, unbroken, and keeps for every command what was there before it and what was there
after. A test puts the state before a command into the bench's one working folder (always the same path, since results
may name it), makes the command fail, and asks `harm` and `differences`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import helpers
import launch
from folders import disk, header, temporary, tree

LONG = os.environ.get("CPT_FAULTS") == "full"
SEED = 20
TIMEOUT = 120  # seconds after which a command counts as hanging; each takes a second or two


@dataclasses.dataclass(frozen=True)
class Command:
    """One command line, run in the study's folder."""

    name: str
    script: str
    argv: tuple[str, ...] = ()


def _command(name: str, script: str, line: str = "") -> Command:
    return Command(name, script, tuple(line.split()))


# In an order in which each finds its inputs.
COMMANDS = (
    _command("train", "cpt/train.py", "--stage cpt"),
    _command("retrieval", "sentence-retrieval/sr_experiment.py"),
    _command("layers", "layer-specialize/layer_specialize.py", "--draws 20"),
    _command("int_and_sem", "weight-diff/int_and_sem.py"),
    _command("tasks", "lm_eval_sib200/generate.py", "--tsv-dir task --out tasks"),
    _command("lm_eval", "lm_eval_sib200/evaluate.py"),
    _command("downstream", "downstream-correlation/downstream_correlation.py"),
    _command("layer_swap", "layer-swap/layer-swap.py"),
    _command("layer_swap_controls", "layer-swap/layer-swap.py", "--controls 4 --measures retrieval nll"),
    _command("language_loss", "language-loss/language_loss.py"),
    _command("samples", "cpt/generate.py", "--tokens 4 --number 1 --samples 1"),
    _command("layer_ablation", "layer-ablation/ablation_sweep.py",
             "--stride 2 --sentences 4 --shots 1 --measures translation"),
    _command("train_arm", "cpt/train.py", "--stage cpt --arm hub_frozen"),
    _command("arms", "cpt/compare_arms.py", "--measures retrieval nll"),
    _command("attn_vs_ffn", "weight-diff/attn_vs_ffn.py"),
    _command("cogsym", "layer-ablation/cogsym.py"),
    _command("compare_runs", "layer-ablation/compare_runs.py", "full=models/run hub=models/arms/hub_frozen/run "
             "--measures nll -o results/layer-ablation/runs.json"),
    _command("token_ids", "lsn/load_oscar.py", "--max-concurrent 1"),
    _command("counts", "lsn/activation.py", "--save-every 0"),
    _command("identify", "lsn/identify.py"),
    _command("text_scores", "lsn/text_scores.py", "--texts 8 --text-tokens 16"),
    _command("identify_ap", "lsn/identify.py", "--method ap"),
    _command("deactivate", "lsn/deactivate.py", "--random 5"),
    _command("lsn_activation", "lsn/lsn_activation_cpt.py"),
    _command("gate_lsn", "weight-diff/gate_lsn.py"),
    _command("correlation", "activation-correlation/activation-correlation.py"),
    _command("attn_int_swap", "component-swap/attn_int_swap.py"),
    _command("ffn_lsn_swap", "component-swap/ffn_lsn_swap.py"),
    _command("attn_controls", "component-swap/attn_int_swap.py", "--controls 2 --measures retrieval"),
    _command("ffn_controls", "component-swap/ffn_lsn_swap.py", "--controls 2 --measures retrieval"),
    _command("retrieval_swapped", "sentence-retrieval/sr_experiment.py", "--no-untrained --model_path "
             "models/run/checkpoint-4 results/component-swap/attn_int_swap results/component-swap/ffn_lsn_swap"),
    _command("spectrum", "spectral/spectrum.py", "--draws 1"),
    _command("gradients", "alignment/gradients.py", "--pairs 3"),
    _command("bigram", "alignment/bigram.py"),
    _command("routing", "moe-routing/routing.py", "--base models/moe/base --run models/moe/run "
             "--output moe/routing.json"),
    _command("router_steering", "moe-routing/steering.py", "--base models/moe/base --run models/moe/run --random 1 "
             "--routing moe/routing.json --output moe/steering.json"),
    _command("steering", "steering/steer.py",
             "--no-generate --layers 2 --alphas 1 --draws 1 --sentences 6 --shots 1"),
    _command("claims", "report/claims.py"),
    _command("figures", "report/figures.py"),
    _command("export", "report/export.py"),
    _command("page", "report/page.py"),
)  # fmt: skip
NAMES = [command.name for command in COMMANDS]
BY_NAME = {command.name: command for command in COMMANDS}

STUDY = """
name: tiny
seed: 7
base: models/base
run: models/run
languages: {base: eng_Latn, target: qaa_Latn, lsn: [eng_Latn, qab_Latn, qaa_Latn]}
data:
  source: text
  base_file: text/eng.txt
  target_file: text/qaa.txt
  heldout: {eng_Latn: text/eng.held.txt, qab_Latn: text/qab.held.txt, qaa_Latn: text/qaa.held.txt}
  task: {name: sib200_qaa_Latn, dir: task}
  lsn_text: {eng_Latn: text/eng.txt, qab_Latn: text/qab.txt, qaa_Latn: text/qaa.txt}
tokens: tokens
controls: 5
arms: {hub_frozen: {freeze: hub}}
lsn: {rate: 0.1, tokens: 1024, block_size: 128, layers: 2}
results: results
train: {cpt: cpt.yaml}
"""
TRAINING = """
output: models/run
from: models/base
sources:
  - {name: new, weight: 1.0, files: text/qaa.txt}
block_size: 64
batch_size: 2
steps: 4
save_steps: [2, 3, 4]
learning_rate: 1.0e-2
schedule: cosine
warmup_steps: 1
"""
WORDS = {"eng": "the a cat dog sees runs old red house tree", "qab": "sa mi kato hundo vidas kuras maljuna domo arbo",
         "qaa": "ba do ki lu me no pa ri su ta"}  # fmt: skip


def make_world(folder: Path) -> None:
    """A study of a tiny llama with a base, text in three languages and a task; nothing is measured yet."""
    draw = random.Random(SEED)
    (folder / "text").mkdir(parents=True)
    for name, words in WORDS.items():
        for file, documents in ((f"{name}.txt", 30), (f"{name}.held.txt", 10)):
            lines = (" ".join(draw.choice(words.split()) for _ in range(12)) for _ in range(documents))
            (folder / "text" / file).write_text("".join(line + "\n" for line in lines))
    for code, words in (("eng_Latn", WORDS["eng"]), ("qaa_Latn", WORDS["qaa"])):
        place = folder / "task" / code
        place.mkdir(parents=True)
        for split, n in (("train", 4), ("dev", 2), ("test", 8)):
            rows = ["index_id\tcategory\ttext"]
            for number in range(n):
                text = " ".join(draw.choice(words.split()) for _ in range(6))
                rows.append(f"{number}\t{draw.choice(['travel', 'sports', 'health'])}\t{text} {number}")
            (place / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    helpers.save_tiny("llama", folder / "models" / "base", seed=1, layers=4, shards=2)
    for seed, name in enumerate(("base", "run/checkpoint-4")):
        helpers.save_tiny("olmoe", folder / "models" / "moe" / name, seed=seed, layers=2, tokenizer=True)
    (folder / "study.yaml").write_text(STUDY)
    (folder / "cpt.yaml").write_text(TRAINING)


# ---------------------------------------------------------------- commands that fail


@dataclasses.dataclass(frozen=True)
class Outcome:
    code: int  # exit status; negative: ended by that signal
    seconds: float
    timed_out: bool
    output: str

    @property
    def killed(self) -> bool:
        return self.code < 0 and not self.timed_out

    def refused(self) -> list[str]:
        """What is wrong with this as a refusal in one line with exit code 2; empty where nothing is."""
        errors = [line for line in self.output.splitlines() if line.startswith("error: ") or ": error: " in line]
        wrong = ["took too long"] if self.timed_out else []
        # Some of several languages failed: code 1, and one line of error for all of them.
        some = self.code == 1 and errors and errors[0].startswith("error: failed: ")
        wrong += [] if self.code == 2 or some else [f"exit code {self.code}"]
        wrong += ["a traceback"] if "Traceback" in self.output else []
        wrong += [] if len(errors) == 1 else [f"{len(errors)} lines of error"]
        return wrong


class Forks:
    """A fork of the warm process that answers requests (server.py)."""

    root = Path("/")  # where this process sees the server's files

    def __init__(self, logs: Path):
        self.logs = logs
        environment = {**os.environ, "CPT_FIGURES": "" if LONG else "pass over", "TMPDIR": str(logs)}
        with open(os.devnull) as nothing, (logs / "server.log").open("ab") as log:
            self.connection = launch.connect({"env": environment}, nothing, log, log)
        self.connection.settimeout(None)
        self.requests, self.answers = self.connection.makefile("w"), self.connection.makefile("r")

    def ask(self, request: dict):
        self.requests.write(json.dumps(request) + "\n")
        self.requests.flush()
        line = self.answers.readline()
        if not line:
            raise RuntimeError("the server of the forks has ended:\n" + (self.logs / "server.log").read_text()[-2000:])
        return json.loads(line)

    def run(self, jobs: list[tuple[Command, dict | None]], folder: Path, timeout: float = TIMEOUT) -> list[Outcome]:
        """Run commands in `folder` at once, each with its fault."""
        logs = [self.logs / f"{number}.log" for number in range(len(jobs))]
        asked = [
            {"script": command.script, "argv": list(command.argv), "cwd": str(folder), "log": str(log), "fault": fault}
            for (command, fault), log in zip(jobs, logs, strict=True)
        ]
        answers = self.ask({"jobs": asked, "timeout": timeout})
        return [
            Outcome(**answer, output=log.read_text(errors="replace")) for answer, log in zip(answers, logs, strict=True)
        ]

    def close(self) -> None:
        self.requests.close()
        self.answers.close()
        self.connection.close()


class SmallDisk(Forks):
    """A second server for which a small file system lies at `folder`.

    Raises:
        OSError: this system lets nobody mount one.
    """

    def __init__(self, forks: Forks, folder: Path, size: int):
        self.logs, self.folder, self.size = forks.logs, folder, size
        fifos = {name: forks.logs / f"{name}.fifo" for name in ("requests", "answers")}
        for fifo in fifos.values():
            os.mkfifo(fifo)
        told = forks.ask({"mount": str(folder), "size": size, **{name: str(fifo) for name, fifo in fifos.items()}})
        if "error" in told:
            raise OSError(told["error"])
        self.requests, self.answers = fifos["requests"].open("w"), fifos["answers"].open()
        self.root = Path(f"/proc/{told['pid']}/root")

    @property
    def _filler(self) -> Path:
        return self.root / self.folder.relative_to("/") / "filler"

    def leave(self, free: int) -> None:
        """Fill the file system up, but for `free` bytes in whole pages."""
        self._filler.unlink(missing_ok=True)
        with self._filler.open("wb") as file:
            room = shutil.disk_usage(self._filler.parent).free - free // 4096 * 4096
            os.posix_fallocate(file.fileno(), 0, max(room, 1))

    def empty(self) -> None:
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        self.requests.close()
        self.answers.close()


@dataclasses.dataclass
class Known:
    """What an unbroken run of a command showed."""

    before: Path  # copy of the study's folder
    after: dict[str, str]
    inputs: dict[str, str]
    read: list[str]  # files below the folder that Python opened for reading, and were there before
    changes: int  # of the file system
    written: int  # bytes that it added
    largest: int  # bytes of the largest file that it wrote
    seconds: float
    headers: dict[str, dict]  # of the results that it wrote


class Bench:
    """The working folder, the states before every command, and the fork server."""

    def __init__(self, folder: Path):
        self.folder, self.case = folder, folder / "slot" / "study"
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True)
        self.forks = Forks(self.logs)
        self.known: dict[str, Known] = {}
        self.problems: dict[str, str] = {}
        self._chain()

    def _chain(self) -> None:
        make_world(self.case)
        after = tree(self.case)
        for command in COMMANDS:
            before = self.folder / "before" / command.name
            shutil.copytree(self.case, before, symlinks=True)
            inputs, size = after, disk(self.case)
            report = self.logs / "watch.json"
            (done,) = self.forks.run([(command, {"kind": "watch", "report": str(report)})], self.case)
            if done.code:
                raise RuntimeError(f"{command.name} failed unbroken ({done.code}):\n{done.output[-3000:]}")
            seen, after = json.loads(report.read_text()), tree(self.case)
            new = [path for path in self.case.rglob("*") if path.is_file() and _is_new(path, self.case, before)]
            self.known[command.name] = Known(
                before, after, inputs, _read(seen["read"], before), seen["changes"],
                disk(self.case) - size, max((path.stat().st_size for path in new), default=0), done.seconds,
                {path.relative_to(self.case).as_posix(): found for path in new if (found := header(path))},
            )  # fmt: skip

    def put(self, name: str, forks: Forks | None = None) -> None:
        """The state before command `name` in the working folder."""
        there = (forks or self.forks).root / self.case.relative_to("/")
        shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(self.known[name].before, there, symlinks=True)

    def run(self, name: str, fault: dict | None = None, forks: Forks | None = None) -> Outcome:
        (outcome,) = (forks or self.forks).run([(BY_NAME[name], fault)], self.case)
        return outcome

    def tree(self, forks: Forks | None = None) -> dict[str, str]:
        return tree((forks or self.forks).root / self.case.relative_to("/"))

    def harm(self, name: str, now: dict[str, str]) -> list[str]:
        """What a failed command must not have done: changed an input, or left what looks finished and is not."""
        known = self.known[name]
        kept = {file: value for file, value in known.inputs.items() if known.after.get(file) == value}
        lines = [f"input changed: {file}" for file, value in kept.items() if now.get(file) != value]
        for file, value in now.items():
            if file in known.inputs or temporary(file) or file.endswith("/"):
                continue
            if file not in known.after:
                lines.append(f"looks finished, but no whole run writes it: {file}")
            elif known.after[file] != value:
                lines.append(f"looks finished, but is not: {file}")
        # A model folder is finished as a whole.
        for folder in {
            file.rpartition("/")[0] for file in now if file.endswith("/config.json") and not temporary(file)
        }:
            lines += [
                f"incomplete folder: {file} is missing"
                for file in known.after
                if file.startswith(folder + "/") and file.count("/") == folder.count("/") + 1 and file not in now
            ]
        return lines

    def close(self) -> None:
        self.forks.close()


def _is_new(path: Path, now: Path, before: Path) -> bool:
    old = before / path.relative_to(now)
    return not old.is_file() or old.stat().st_mtime_ns != path.stat().st_mtime_ns


def _read(read: list[str], before: Path) -> list[str]:
    """The inputs among the files read; of a model folder all files, since libraries read some past Python."""
    found = {name for name in read if (before / name).is_file()}
    for folder in {Path(name).parent for name in found if Path(name).name == "config.json"}:
        found |= {path.relative_to(before).as_posix() for path in (before / folder).iterdir() if path.is_file()}
    return sorted(found)


def new_folder() -> Path:
    """A folder of our own that other users may pass through; in memory where there is room, since it changes a lot."""
    memory = Path("/dev/shm")
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**31
    folder = Path(tempfile.mkdtemp(prefix="cpt-faults-", dir=memory if roomy else None))
    folder.chmod(0o755)
    return folder
