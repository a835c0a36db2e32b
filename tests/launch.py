"""Scripts in processes of their own, on the CPU: under `accelerate launch`, or as forks of one warm process.

launch("layer-swap/layer-swap.py", "--controls", "3")                       # in two processes; checked
run("weight-diff/attn_vs_ffn.py", "-o", "out.json", root=copy)              # the finished process, as subprocess.run's

A fork runs the script as `python <script> ...` would, less the seconds in which Python imports torch and transformers.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers import ROOT

SHIM = """#!{python} -IS
import json, os, socket, sys
if not sys.argv[1:] or not sys.argv[1].endswith(".py"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
job = {{"command": [sys.argv[1], sys.argv[2:]], "cwd": os.getcwd(), "env": dict(os.environ)}}
with socket.socket(socket.AF_UNIX) as server:
    server.connect({place!r})
    socket.send_fds(server, [json.dumps(job).encode() + b"\\n"], [0, 1, 2])
    sys.exit(int(server.makefile().readline() or 137))
"""


def launch(
    script: str, *arguments: str, processes: int = 2, code: int = 0, forks: bool = True
) -> subprocess.CompletedProcess:
    """Run a script of the repository in several CPU processes; its exit code must be `code`.

    With `forks`, they are forks that are told what the launcher tells its processes, else the launcher's own. Under
    --cpu it starts a single process, whatever --num_processes says. --multi_gpu starts them all, and the scripts' own
    --device keeps them on the CPU.
    """
    arguments = [*map(str, arguments), "--device", "cpu"]
    if forks:
        done = _side_by_side(script, arguments, processes)
    else:
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
            "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        ]  # fmt: skip
        done = subprocess.run(
            [*command, str(ROOT / script), *arguments],
            capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert done.returncode == code, done.stderr[-3000:]
    assert code or f"{processes} processes share the work" in done.stdout
    return done


def run(script: str, *arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess:
    """A script of the repository, or of a copy of it, in one fork in its folder."""
    environment = os.environ | {"PYTHONPATH": str(root)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        code = _code(_start([str(root / script), [*map(str, arguments)]], str(root), environment, out, err))
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess([script, *arguments], code, out.read(), err.read())


def shim(folder: Path) -> Path:
    """A `python` in `folder` whose scripts are forks of the warm process; all else it leaves to this Python."""
    file = folder / "python"
    file.write_text(SHIM.format(python=sys.executable, place=_server()))
    file.chmod(0o755)
    return file


@functools.cache
def _server() -> str:
    """The socket of the warm process, which ends with this one."""
    folder = tempfile.mkdtemp(prefix="cpt-warm-")
    place = os.path.join(folder, "socket")
    command = [sys.executable, str(Path(__file__).with_name("server.py")), place]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"HF_DATASETS_CACHE": os.path.join(folder, "datasets")},
    )  # fmt: skip
    atexit.register(lambda: (server.communicate(), shutil.rmtree(folder, ignore_errors=True)))
    assert server.stdout.readline() == "ready\n"
    return place


def _start(command: list, cwd: str, environment: dict, out, err) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(240)
    connection.connect(_server())
    job = json.dumps({"command": command, "cwd": cwd, "env": environment}).encode() + b"\n"
    with open(os.devnull) as nothing:
        socket.send_fds(connection, [job], [nothing.fileno(), out.fileno(), err.fileno()])
    return connection


def _code(connection: socket.socket) -> int:
    with connection, connection.makefile() as answer:
        return int(answer.readline() or 137)  # nothing: it was killed


def _side_by_side(script: str, arguments: list[str], processes: int) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    command = [str(ROOT / script), arguments]
    with tempfile.TemporaryFile("a+") as out, tempfile.TemporaryFile("a+") as err:
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        started = [_start(command, os.getcwd(), {**os.environ, **group, **rank}, out, err) for rank in ranks]
        codes = [_code(connection) for connection in started]
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess(command, max(codes), out.read(), err.read())
