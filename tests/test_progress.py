"""workflow/progress.py: what is said of a run of Snakemake, how much time is left, and status.json."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import ROOT, load_script
from launch import SNAKEMAKE, shim

from cpt_utils.base import results

progress = load_script("workflow/progress.py")

SNAKEFILE = """
import os, sys
from pathlib import Path
sys.path.insert(0, "REPOSITORY")
from cpt_utils.base import cli
progress = cli.sibling("workflow/progress.py")
if workflow.is_main_process and not workflow.output_settings.dryrun:
    PROGRESS = progress.attach(workflow, "s", Path("results/s"), bool(os.environ.get("VERBOSE")))

onsuccess: PROGRESS.end("done")
onerror: PROGRESS.end("failed")

rule all:
    input: "last"

rule first:
    output: "{n}.first"
    log: "logs/{n}.log"
    resources: gpu=1
    shell: "echo here > {log}; sleep 0.1; touch {output}"

rule last:
    input: "1.first", "2.first"
    output: "last"
    log: "logs/last.log"
    shell: "echo a line; for n in 1 2 3; do echo said $n; done > {log}; [ -e ready ] && touch {output}"
"""


def snakemake(place: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [shim(), SNAKEMAKE, "--cores", "1", *flags], cwd=place, env=os.environ | environment, capture_output=True,
        text=True, timeout=200,
    )  # fmt: skip


def test_a_line_for_each_step_and_what_failed_and_going_on(tmp_path):
    (tmp_path / "Snakefile").write_text(SNAKEFILE.replace("REPOSITORY", str(ROOT)))
    done = snakemake(tmp_path)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert "3 steps" in lines
    first, second = (line for line in lines if " first " in line)
    assert first.startswith("[1/3] first ") and first.endswith(" left") and second.startswith("[2/3] first ")
    at = lines.index("FAILED: last; its log, logs/last.log, ends with")
    assert lines[at + 1 : at + 4] == ["  said 1", "  said 2", "  said 3"]
    assert "with 1 of 3 steps left; the same command continues" in done.stderr
    for dump in ("rule first:", "jobid", "Job stats", "Finished", "set -euo"):
        assert dump not in done.stderr
    assert any("rule first:" in log.read_text() for log in tmp_path.glob(".snakemake/log/*.log"))
    status, _ = results.read_json(tmp_path / "results/s/status.json", "status")
    assert status["state"] == "failed" and status["steps"] == 3 and status["steps_done"] == 2
    assert status["failed"] == [{"step": "last", "log": "logs/last.log"}] and status["running"] == []
    assert [one["step"] for one in status["finished"]].count("first 1") == 1 and status["seconds_by_rule"][
        "first"
    ] > 0.1

    (tmp_path / "ready").touch()
    done = snakemake(tmp_path, VERBOSE="1")
    assert done.returncode == 0 and "[1/1] last:" in done.stderr and "rule last:" in done.stderr
    status = json.loads((tmp_path / "results/s/status.json").read_text())
    assert status["state"] == "done" and status["seconds_left"] == 0 and "first" in status["seconds_by_rule"]
    before = (tmp_path / "results/s/status.json").read_bytes()
    assert "Nothing to be done" in snakemake(tmp_path).stderr
    assert "rule all" in (said := snakemake(tmp_path, "--dry-run", "--forceall")).stdout + said.stderr
    assert (tmp_path / "results/s/status.json").read_bytes() == before


def test_an_interrupted_run_has_not_failed(tmp_path):
    (tmp_path / "Snakefile").write_text(SNAKEFILE.replace("REPOSITORY", str(ROOT)).replace("sleep 0.1", "sleep 100"))
    run = subprocess.Popen(
        [SNAKEMAKE, "--cores", "1"], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in the background of a shell
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 100
        while not list(tmp_path.glob("logs/*.log")) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)  # Snakemake waits for the job
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does on Ctrl-C
        _, said = run.communicate(timeout=100)
    finally:
        run.kill()
    assert run.returncode != 0
    assert "interrupted after" in said and "with 3 of 3 steps left; the same command continues" in said
    assert "FAILED" not in said and "Error" not in said
    status, _ = results.read_json(tmp_path / "results/s/status.json", "status")
    assert (status["state"], status["failed"], status["seconds_left"]) == ("interrupted", [], None)


def job(rule, threads=1, model=False, began=0.0):
    return progress.Job(rule, rule, threads, model, began=began)


MODELS = {"retrieval", "train_cpt"}


def left(jobs, took=None, running=(), cores=1, gpus=0, now=0.0):
    return progress.seconds_left(jobs, list(running), took or {}, MODELS, cores, gpus, now)


def test_what_is_not_known_is_not_said():
    assert left([job("retrieval", model=True)]) is None
    assert left([job("claims")]) == progress.SHORT
    assert left([]) == 0


def test_the_same_step_took_so_long_before_and_others_as_much_longer_than_on_the_demo():
    usual = progress.USUAL
    assert left([job("retrieval", model=True)] * 2, {"retrieval": 80.0}) == 160
    ratio = 80 / usual["retrieval"]
    assert left([job("train_cpt", model=True)], {"retrieval": 80.0}) == pytest.approx(usual["train_cpt"] * ratio)
    assert left([job("claims")], {"retrieval": 80.0}) == progress.SHORT  # a larger model does not make it longer


def test_jobs_run_side_by_side_on_cores_and_gpus():
    took = {"retrieval": 10.0, "train_cpt": 30.0}
    four = [job("retrieval", model=True) for _ in range(4)]
    assert left(four, took, cores=4) == 10 and left(four, took, cores=2) == 20
    assert left(four, took, cores=4, gpus=1) == 40
    assert left([job("train_cpt", threads=8, model=True)], took, cores=4) == 30
    assert left([*four, job("train_cpt", model=True)], took, cores=64) == 30  # not before its longest step


def test_what_runs_has_less_left():
    one = job("retrieval", model=True, began=100.0)
    assert left([one], {"retrieval": 10.0}, running=[one], now=104.0) == 6
    assert left([one], {"retrieval": 10.0}, running=[one], now=190.0) == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.2, "4 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h"), (2e5, "2.3 days")]
)
def test_times(seconds, text):
    assert progress.words(seconds) == text
