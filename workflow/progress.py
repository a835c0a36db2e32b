"""Progress of the workflow: a line for each finished step, the time left for the whole run, and status.json.

A handler that the Snakefile adds to Snakemake's logger and that receives its events for jobs that begin, end and fail.
Snakemake's `--quiet` would hide all progress, failures included, and a logger plugin must be a separate package, which
is not found if it is installed in place. Snakemake's own log keeps everything.

The time left is estimated from the remaining steps. A step is expected to take as long as before, in this or an earlier
run of the study; else as long as on the demo, times the average slowdown of the steps with known times.
"""

from __future__ import annotations

import datetime
import logging
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import cli, results
from cpt_utils.base.errors import InputError

SCHEMA = "status"
LONG = 60  # a step expected to take this many seconds is announced when it begins
SHOWN = 15  # lines shown from the log of a failed step
# Seconds of each rule on the demo, with one core; SHORT for all others.
USUAL = {
    "train_base": 240, "train_cpt": 60, "train_arm": 70, "deactivate": 95, "component_swap_controls": 70,
    "layer_swap_controls": 62, "layer_ablation": 60, "rewind": 60, "truncate": 60, "connect": 30, "spectrum": 30,
    "arms": 35, "lsn_activation": 27, "gradients": 26, "bigram": 19, "activation_counts": 16, "downstream_task": 14,
    "samples": 12,
    "language_loss": 12, "token_ids": 11, "downstream_task_swapped": 8, "retrieval": 8, "retrieval_figure": 7,
    "deactivate_method": 95, "text_scores": 25, "base_counts": 16,
}  # fmt: skip
SHORT = 4


@dataclass
class Job:
    """A step of the workflow; `model`: it runs or trains a model, so it takes longer with a larger one."""

    rule: str
    name: str
    threads: int
    model: bool
    log: str = ""
    began: float = 0.0  # seconds since 1970


def job_of(snakemake_job) -> Job:
    wildcards = " ".join(map(str, snakemake_job.wildcards_dict.values()))
    rule, model = snakemake_job.rule.name, bool(snakemake_job.resources.get("gpu"))
    return Job(rule, f"{rule} {wildcards}".strip(), snakemake_job.threads, model, ", ".join(snakemake_job.log))


def seconds_left(
    left: list[Job], running: list[Job], took: dict[str, float], models: set[str], cores: int, gpus: int, now: float
) -> float | None:
    """Seconds until all jobs in `left` (which include `running`) are done; None if no rule with a model has a time yet.

    Args:
        took: known seconds per job, by rule.
        models: the rules that run a model.
        cores, gpus: the number that may be used at a time; gpus 0: no limit.
    """
    known = {True: [], False: []}
    for rule, seconds in took.items():
        known[rule in models].append((seconds, USUAL.get(rule, SHORT)))
    factor = {kind: sum(here for here, _ in pairs) / sum(usual for _, usual in pairs) if pairs else None
              for kind, pairs in known.items()}  # fmt: skip
    work = on_gpus = longest = 0.0
    for job in left:
        if job.rule not in took and job.model and factor[True] is None:
            return None
        seconds = took.get(job.rule, USUAL.get(job.rule, SHORT) * (factor[job.model] or 1))
        if job in running:
            seconds = max(0.0, seconds - (now - job.began))
        longest = max(longest, seconds)
        work += seconds * min(job.threads, cores)
        on_gpus += seconds * job.model
    return max(work / cores, on_gpus / gpus if gpus else 0.0, longest)


def words(seconds: float) -> str:
    """A readable duration: `45 s`, `12 min`, `3.4 h`, `2.1 days`."""
    for unit, size in (("days", 86_400), ("h", 3600)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _moment(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


class Progress(logging.Handler):
    """Follows a run of Snakemake: prints a line for each step, and writes `status.json` into the study's results."""

    def __init__(self, workflow, study: str, folder: Path):
        super().__init__(logging.INFO)
        self.workflow, self.study, self.file = workflow, study, Path(folder) / "status.json"
        self.started, self.running, self.jobs, self.failures = time.time(), {}, None, []
        self.finished: list[dict] = []
        self.seconds = self._from_earlier_run()  # of each job, by rule
        self.header: dict = {}
        self.writes, self.interrupted = True, False

    def _from_earlier_run(self) -> dict[str, list[float]]:
        """Mean seconds per job in an earlier run, by rule."""
        try:
            payload, _ = results.read_json(self.file, SCHEMA)
            return {rule: [float(mean)] for rule, mean in payload["seconds_by_rule"].items()}
        except (InputError, KeyError, TypeError, ValueError, AttributeError):
            return {}

    def emit(self, record: logging.LogRecord) -> None:
        if "on user request" in str(record.msg):  # Ctrl-C: Snakemake logs this before the jobs that it ends
            self.interrupted = True
        methods = {"job_info": self.begun, "job_finished": self.ended, "job_error": self.failed}
        try:
            if method := methods.get(str(getattr(record, "event", ""))):
                method(record)
        except Exception:  # as in logging's own handlers: reporting must not end the run
            self.handleError(record)

    # ------------------------------------------------------------ events

    def begun(self, record) -> None:
        if self.jobs is None:
            jobs = self.workflow.dag.needrun_jobs(exclude_finished=False)
            self.jobs = {job.jobid: job_of(job) for job in jobs if job.rule.name != "all"}
            self._say(f"{len(self.jobs)} steps")
        job = self.jobs.get(record.jobid)
        if job is None:  # the target, which computes nothing
            return
        job.began = time.time()
        self.running[record.jobid] = job
        expected = self._took().get(job.rule, USUAL.get(job.rule, SHORT))
        if expected >= LONG:
            self._say(f"{self._position(len(self.finished) + 1)} {job.name} has begun; to follow it: tail -f {job.log}")
        self.write("running")

    def ended(self, record) -> None:
        job = self.running.pop(record.job_id, None)
        if job is None:
            return
        seconds = time.time() - job.began
        self.seconds.setdefault(job.rule, []).append(seconds)
        self.finished.append({"step": job.name, "seconds": round(seconds, 1)})
        left = self.left()
        rest = "" if left == 0 else f"; about {words(left)} left" if left is not None else "; time left not known yet"
        self._say(f"{self._position(len(self.finished))} {job.name}: {words(seconds)}{rest}")
        self.write("running")

    def failed(self, record) -> None:
        job = self.running.pop(record.jobid, None)
        if job is None or self.interrupted:
            return
        self.failures.append({"step": job.name, "log": job.log})
        path = Path(job.log)
        lines = path.read_text(errors="replace").splitlines()[-SHOWN:] if path.is_file() else []
        self._say("\n".join([f"FAILED: {job.name}; its log, {job.log}, ends with", *(f"  {line}" for line in lines)]))
        self.write("running")

    def end(self, state: str) -> None:
        """Report and record the final state: done, failed, or (failed after Ctrl-C) interrupted."""
        if self.jobs:
            state = "interrupted" if self.interrupted and state == "failed" else state
            stopped = "stopped" if state == "failed" else state
            after, left = words(time.time() - self.started), len(self.jobs) - len(self.finished)
            rest = f"{stopped} after {after} with {left} of {len(self.jobs)} steps left; the same command continues"
            self._say(f"done after {after}" if state == "done" else rest)
            self.running.clear()
            self.write(state)

    def page(self, flags: str, page: Path) -> None:
        """After a failure (not after Ctrl-C), make claims, table and page from the existing results.

        Their output goes to logs/after-failure.log. The page gets the run's start time, so the next run makes it again.
        """
        if not self.failures or self.interrupted:
            return
        log = self.file.parent / "logs/after-failure.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as output:
            for script in ("claims", "export", "page"):  # the page is made even if one of the others fails
                command = f'"$PYTHON" "$REPOSITORY"/report/{script}.py {flags}'
                done = subprocess.run(command, shell=True, stdout=output, stderr=subprocess.STDOUT)
        if not done.returncode:
            os.utime(page, (self.started, self.started))
        self._say(f"no report could be made, see {log}" if done.returncode else f"report of the results so far: {page}")

    # ------------------------------------------------------------ times and status

    def _took(self) -> dict[str, float]:
        return {rule: sum(all_of) / len(all_of) for rule, all_of in self.seconds.items()}

    def left(self) -> float | None:
        """Seconds until everything is done."""
        done = {step["step"] for step in self.finished}
        left = [job for job in self.jobs.values() if job.name not in done]
        models = {job.rule for job in self.jobs.values() if job.model}
        # Without a number of cores, jobs run elsewhere (on a cluster), as many at a time as are running now.
        cores = self.workflow.cores or max(1, len(self.running))
        gpus = getattr(self.workflow.global_resources.get("gpu"), "value", 0) or 0
        return seconds_left(left, list(self.running.values()), self._took(), models, cores, gpus, time.time())

    def write(self, state: str) -> None:
        """Write status.json: the steps that run, are done and are left."""
        left = self.left() if state == "running" else 0.0 if state == "done" else None
        running = [{"step": job.name, "since": _moment(job.began), "log": job.log} for job in self.running.values()]
        payload = {
            "study": self.study, "state": state, "updated": results.now(), "process": os.getpid(),
            "host": platform.node(), "steps": len(self.jobs), "steps_done": len(self.finished),
            "seconds": round(time.time() - self.started, 1), "seconds_left": left and round(left, 1),
            "running": running, "failed": self.failures, "finished": self.finished,
            "seconds_by_rule": {rule: round(mean, 2) for rule, mean in self._took().items()},
        }  # fmt: skip
        self.header = self.header or results.header(SCHEMA)
        try:
            if self.writes:
                results.write_json(self.file, payload, self.header)
        except InputError as error:
            self.writes = False
            cli.warn(str(error))

    def _position(self, number: int) -> str:
        total = len(self.jobs)
        return f"[{number:{len(str(total))}d}/{total}]"

    @staticmethod
    def _say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def attach(workflow, study: str, folder: Path, verbose: bool) -> Progress:
    """Add a Progress to Snakemake's logger; unless `verbose`, Snakemake's messages on jobs go to its own log only."""
    from snakemake.logging import logger

    progress = Progress(workflow, study, folder)
    for handler in logger.handlers:
        if handler.name == "DefaultStreamHandler" and not verbose:
            handler.addFilter(lambda record: worth_saying(record) and not progress.interrupted)
    logger.addHandler(progress)
    return progress


def worth_saying(record: logging.LogRecord) -> bool:
    """Whether a message of Snakemake matters to a user who only wants the results: warnings and errors, except those on
    failed jobs, which are reported here; and that there is nothing to do."""
    of_job = str(getattr(record, "event", "")) == "job_error" or getattr(record, "exception", "") == "RuleException"
    return (record.levelno >= logging.WARNING and not of_job) or "Nothing to be done" in str(record.msg)
