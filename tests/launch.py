"""Scripts under `accelerate launch`, on the CPU.

launch("layer-swap/layer-swap.py", "--controls", "3", processes=2)      # the finished process; checked
"""

from __future__ import annotations

import os
import subprocess
import sys

from helpers import ROOT


def launch(script: str, *arguments: str, processes: int = 2, code: int = 0) -> subprocess.CompletedProcess:
    """Run a script of the repository in several CPU processes; its exit code must be `code`.

    Under --cpu the launcher starts a single process, whatever --num_processes says. --multi_gpu starts them all, and
    the scripts' own --device keeps them on the CPU.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*command, str(ROOT / script), *map(str, arguments), "--device", "cpu"],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-3000:]
    assert code or f"{processes} processes share the work" in done.stdout
    return done
