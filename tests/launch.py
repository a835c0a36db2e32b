"""Scripts in processes of their own, on the CPU: under `accelerate launch`, or as forks of one warm process.

launch("layer-swap/layer-swap.py", "--controls", "3")                       # in two processes; checked
run("weight-diff/attn_vs_ffn.py", "-o", "out.json", root=copy)              # the finished process, as subprocess.run's

A fork runs the script as `python <script> ...` would, less the seconds in which Python imports torch and transformers.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import filelock
from helpers import ROOT

SNAKEMAKE = str(Path(sys.executable).with_name("snakemake"))

SHIM = """#!{python} -IS
import json, os, socket, sys
words = sys.argv[1:]
while words and words[0] in ("-P", "-u"):
    del words[0]
if not words or words[0] != "-c" and not os.path.isfile(words[0]):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
job = {{"command": [words[0], words[1:]], "cwd": os.getcwd(), "env": dict(os.environ), "python": sys.argv[0]}}
with socket.socket(socket.AF_UNIX) as server:
    server.connect({place!r})
    socket.send_fds(server, [json.dumps(job).encode() + b"\\n"], [0, 1, 2])
    sys.exit(int(server.makefile().readline() or 137))
"""


def launch(
    script: str, *arguments: str, processes: int = 2, code: int = 0, forks: bool = True
) -> subprocess.CompletedProcess:
    """Run a script of the repository in several CPU processes; its exit code must be `code`.

    With `forks`, they are forks that are told what the launcher tells its processes, else the launcher's own, which is
    a fork, too, and starts others. Under --cpu it starts a single process, whatever --num_processes says. --multi_gpu
    starts them all, and the scripts' own --device keeps them on the CPU.
    """
    arguments = [*map(str, arguments), "--device", "cpu"]
    if forks:
        done = _side_by_side(script, arguments, processes)
    else:
        from accelerate.commands import launch as launcher

        command = [
            shim(), launcher.__file__, "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", str(ROOT / script),
        ]  # fmt: skip
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240)
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


@functools.cache
def shim(root: Path = ROOT) -> str:
    """A `python` whose scripts, and `-c`, are forks of the warm process; all else it leaves to this Python.

    Args:
        root: the copy of the repository of which most scripts are; it stays as it is.
    """
    file = Path(tempfile.mkdtemp(dir=os.environ["CPT_WARM"]), "python")
    file.write_text(SHIM.format(python=sys.executable, place=_server() if root == ROOT else _server_of(root)))
    file.chmod(0o755)
    return str(file)


def _server() -> str:
    """The socket of the warm process, which the first to ask in any worker starts, and which ends with all tests."""
    folder = Path(os.environ["CPT_WARM"])
    place = folder / "socket"
    with filelock.FileLock(folder / "lock"):
        if not place.exists():
            command = [sys.executable, str(Path(__file__).with_name("server.py")), str(place)]
            environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "datasets")}
            with open(folder / "alive") as alive, open(folder / "log", "w") as log:
                process = subprocess.Popen(command, stdin=alive, stdout=log, stderr=log, env=environment)
            while not place.exists():
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.05)
    return str(place)


def _server_of(root: Path) -> str:
    """The socket of a fork of the warm process with the package of a copy of the repository."""
    place = os.path.join(tempfile.mkdtemp(dir=os.environ["CPT_WARM"]), "socket")
    with connect({"root": str(root), "socket": place}) as connection:
        assert connection.makefile().readline() == "ready\n"
    return place


def connect(job: dict, *files) -> socket.socket:
    """A connection to a fork of the warm process that was told `job` and has `files` for its first descriptors."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(240)
    connection.connect(_server())
    socket.send_fds(connection, [json.dumps(job).encode() + b"\n"], [file.fileno() for file in files])
    return connection


def _start(command: list, cwd: str, environment: dict, out, err) -> socket.socket:
    with open(os.devnull) as nothing:
        return connect({"command": command, "cwd": cwd, "env": environment}, nothing, out, err)


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
