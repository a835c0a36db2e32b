"""The Slurm profile, on commands that only look like Slurm: which jobs ask for a GPU, and that the whole plan is sent.

The `sbatch` here writes down what it is asked and makes empty files in the place of the job's outputs; nothing is
computed. What a real cluster does with the requests is not tried.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import clone, skip_without
from launch import shim

skip_without("snakemake_executor_plugin_slurm")

# Jobs that run a model, or take singular values of its weights; all others work on files.
FORWARD = {
    "train_base", "train_cpt", "train_arm", "arms", "retrieval", "retrieval_figure", "downstream_task",
    "downstream_task_swapped", "retrieval_swapped_figure", "layer_swap_controls", "language_loss", "activation_counts",
    "layer_ablation", "deactivate", "lsn_activation", "component_swap_controls", "retrieval_components_figure",
    "train_run_second", "samples", "spectrum", "rewind", "truncate", "connect", "gradients",
    "bigram", "steering", "text_scores", "base_counts", "deactivate_method",
}  # fmt: skip

# Snakemake waits a second at least between its looks at the jobs; these are finished when they are sent.
SNAKEMAKE = """
import asyncio
own = asyncio.sleep
asyncio.sleep = lambda seconds, *more: own(seconds / 20, *more)
from snakemake.cli import main
main()
"""

SBATCH = """#!{python}
import json, pathlib, re, sys
place = pathlib.Path({place!r})
with open(place / "asked.jsonl", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + chr(10))
job = re.search(r"--target-jobs '?([^' ]+)", " ".join(sys.argv) + sys.stdin.read())[1]
rule, _, wildcards = job.partition(":")
outputs = json.loads((place / "outputs.json").read_text())
for name in outputs[rule + ":" + ",".join(sorted(filter(None, wildcards.split(","))))]:
    made = pathlib.Path(name)
    made.parent.mkdir(parents=True, exist_ok=True)
    made.touch() if made.suffix else made.mkdir()
print(len((place / "asked.jsonl").read_text().splitlines()))
"""

SACCT = """#!{python}
import pathlib
asked = pathlib.Path({place!r}) / "asked.jsonl"
for number in range(1, 1 + len(asked.read_text().splitlines() if asked.is_file() else [])):
    print(f"{{number}}|COMPLETED")
"""


def snakemake(place: Path, *flags: str, python: str = sys.executable) -> str:
    """The workflow on the tiny demo with the Slurm profile; what it says."""
    binaries = Path(sys.executable).parent
    path = os.pathsep.join([str(place / "bin"), str(binaries), os.environ["PATH"]])
    done = subprocess.run(
        [python, "-c", SNAKEMAKE, "--snakefile", "workflow/Snakefile", "--profile", "workflow/profiles/slurm",
         "--config", "study=demo/tiny.yaml", *flags],
        cwd=place / "project", env={**os.environ, "PATH": path, "HOME": str(place)}, timeout=200,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A clone's workflow, demo and scripts; and fake Slurm commands."""
    place = tmp_path_factory.mktemp("slurm")
    clone(place / "project")
    (place / "bin").mkdir()
    for name, text in (("sbatch", SBATCH), ("sacct", SACCT), ("sinfo", "#!/bin/sh\necho 'PARTITION'\necho 'any*'\n")):
        file = place / "bin" / name
        file.write_text(text.format(python=sys.executable, place=str(place)))
        file.chmod(0o755)
    return place


def planned(said: str) -> list[tuple[str, dict, str]]:
    """The jobs of a dry run: (rule, what it says of it by key, wildcards as `a=b,..`)."""
    jobs = []
    for block in re.split(r"\n(?=(?:local)?rule \w+:\n)", said)[1:]:
        rule = re.match(r"(?:local)?rule (\w+):", block)[1]
        facts = dict(re.findall(r"^    (\w+): (.*)$", block, re.M))
        jobs.append((rule, facts, ",".join(sorted(facts.get("wildcards", "").split(", ")))))
    return jobs


@pytest.mark.slow
def test_jobs_that_run_a_model_ask_for_one_gpu_and_no_others(place):
    jobs = [job for job in planned(snakemake(place, "--dry-run", python=shim())) if job[0] != "all"]
    assert {rule for rule, facts, _ in jobs if "gpu=1" in facts.get("resources", "")} == FORWARD
    outputs = {
        f"{rule}:{wildcards}": facts["output"].replace(" (update)", "").split(", ") for rule, facts, wildcards in jobs
    }
    assert len(outputs) == len(jobs) > 30
    (place / "outputs.json").write_text(json.dumps(outputs))
    snakemake(  # not as a fork: the plugin looks for Slurm's commands when it is imported
        place, "--slurm-init-seconds-before-status-checks", "1", "--seconds-between-status-checks", "1",
        "--latency-wait", "5", "--slurm-no-account",
    )  # fmt: skip
    asked = [json.loads(line) for line in (place / "asked.jsonl").read_text().splitlines()]
    assert len(asked) == len(jobs)  # each once
    for arguments in asked:
        command = shlex.join(arguments)
        rule = re.search(r"rule_([a-z_]+?)(?:_wildcards|['\s]|$)", command)[1]
        gpus = re.findall(r"--(?:gpus|gres|gpus-per-\w+)[= ](\S+)", command)
        assert gpus == (["1"] if rule in FORWARD else []), command
        assert "--mem 32000" in command and re.search(r" -t (120|720|2880) ", command)
