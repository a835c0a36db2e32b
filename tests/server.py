"""Runs the project's scripts as forked children, which may fail on request; a process of its own, without threads.

Importing torch and transformers takes seconds, so they are imported once, here, and the package with them; every
command is a fork that runs the script as `python <script> ...` would. It listens on a socket in the folder that it is
given, until its stdin ends; every connection to it gets a fork (launch.py), which is told one of

    {"command": [script or "-c", [argument, ..]], "cwd": .., "env": {..}, "python": sys.executable, if not this one}
    {"root": a copy of the repository, "socket": path}    to listen there for commands of that copy
    {"env": {..}}                                         to answer requests on the connection

The first is answered with the exit status, the second with a line once it listens. Requests and answers of the third
are lines of JSON:

    {"jobs": [{"script": .., "argv": [..], "cwd": .., "log": .., "fault": {..} or null}], "timeout": seconds}
    [{"code": exit status, negative for a signal, "seconds": .., "timed_out": ..}]
    {"mount": folder, "size": bytes, "requests": fifo, "answers": fifo}
    {"pid": process id} of a second server, which sees a small file system at that folder; or {"error": why not}

CPT_FIGURES in `env` says what becomes of figures (`figure_faults.saving`).

Faults of a job:
    {"kind": "time", "delay": seconds}       SIGKILL after a delay
    {"kind": "boundary", "n": number}        SIGKILL just before the n-th change of the file system
    {"kind": "write", "limit": bytes}        killed by the kernel inside the write that makes a file longer than that
    {"kind": "errno", "n": .., "errno": ..}  the n-th change of the file system and all after it fail
    {"kind": "no_override"}                  permission bits hold, also for root
    {"kind": "watch", "report": file}        none, but what is read and how often files change is reported
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import pkgutil
import resource
import runpy
import select
import signal
import socket
import sys
import tempfile
import time
import types
from pathlib import Path

import figure_faults

ROOT = Path(__file__).resolve().parents[1]
# What the scripts import that takes long; where one is not installed, the command that needs it says so.
IMPORTED = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.tokenization_utils_tokenizers",
    "transformers.trainer",
    "safetensors.torch",
    "scipy.stats",
    "yaml",
    "pydantic",
    "lm_eval.evaluator",
    "lm_eval.models.huggingface",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_pdf",
    "snakemake.cli",
)
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
CALLS = ("fsync", "pwrite", "write", "copy_file_range", "sendfile", "ftruncate", "posix_fallocate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Counts the changes that this process makes to files below `folder`, notes what it reads there, and may strike."""

    def __init__(self, folder: str, n: int | None = None, number: int | None = None):
        self.folder, self.n, self.number = os.path.realpath(folder), n, number
        self.changes, self.read, self.inside = 0, set(), False
        sys.addaudithook(self.hook)
        for name in CALLS:
            if hasattr(os, name):
                setattr(os, name, self.counting(getattr(os, name)))

    def below(self, path) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return os.path.realpath(os.fsdecode(path)).startswith(self.folder + os.sep)

    def hook(self, event: str, args) -> None:
        if self.inside or event not in ("open", *CHANGES):
            return
        self.inside = True
        try:
            if not any(self.below(arg) for arg in (args[:1] if event == "open" else args[:2])):
                return
            if event == "open" and not args[2] & WRITING:
                self.read.add(os.path.relpath(os.path.realpath(os.fsdecode(args[0])), self.folder))
                return
            self.change()
        finally:
            self.inside = False

    def counting(self, function):
        def call(*args, **kwargs):
            self.change()
            return function(*args, **kwargs)

        return call

    def change(self) -> None:
        self.changes += 1
        if self.n is None or self.changes < self.n:
            return
        if self.number is None:
            os.killpg(0, signal.SIGKILL)
        if self.number:
            raise OSError(self.number, os.strerror(self.number))


def without_override() -> None:
    """Take this process the privilege to pass over permission bits, where it has it."""
    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    if libc.capget(head, data):
        raise OSError(ctypes.get_errno(), "capget")
    for place in (0, 1):  # effective, permitted; CAP_DAC_OVERRIDE is bit 1, CAP_DAC_READ_SEARCH bit 2
        data[place] &= ~0b110
    if libc.capset(head, data):
        raise OSError(ctypes.get_errno(), "capset")


def child(job: dict) -> None:
    """Become the script of a job; never returns."""
    os.setsid()
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(job["cwd"])
    fault = job["fault"] or {}
    kind = fault.get("kind")
    if kind == "no_override":
        without_override()
    if kind == "write":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["limit"], fault["limit"]))
    watch = Watch(job["cwd"], fault.get("n"), fault.get("errno")) if kind in ("boundary", "errno", "watch") else None
    code = run_script(str(ROOT / job["script"]), job["argv"])
    if kind == "watch":
        Path(fault["report"]).write_text(json.dumps({"changes": watch.changes, "read": sorted(watch.read)}))
    os._exit(code)


def run_script(script: str, argv: list[str]) -> int:
    """The exit status of `python <script> ...`, after all that an interpreter does at its end."""
    sys.argv = [script, *argv]
    code = 1
    try:
        if script == "-c":
            sys.argv = [script, *argv[1:]]
            del sys.path[0]
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(argv[0], vars(sys.modules["__main__"]))
        else:
            sys.path[0] = str(Path(script).parent)
            runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        import threading

        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        with contextlib.suppress(Exception):
            import atexit

            atexit._run_exitfuncs()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
    return code


def mount(request: dict) -> dict | None:
    """Fork a server that has a small tmpfs of its own; None in that server."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid:
        os.close(tell)
        with os.fdopen(ready) as told:
            error = told.read()
        return {"error": error} if error else {"pid": pid}
    os.close(ready)
    try:
        _own_file_systems(request["mount"], f"size={request['size']},mode=755")
    except OSError as error:
        os.write(tell, str(error).encode())
        os._exit(1)
    os.close(tell)
    return None


def _own_file_systems(folder: str, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def call(function, *args) -> None:
        if function(*args):
            raise OSError(ctypes.get_errno(), f"{function.__name__}: {os.strerror(ctypes.get_errno())}")

    new_mounts, new_user, recursive_private = 0x20000, 0x10000000, 0x44000
    user, group = os.geteuid(), os.getegid()
    try:
        call(libc.unshare, new_mounts)
    except OSError:  # as an ordinary user in a user namespace of its own, where the system allows them
        call(libc.unshare, new_user | new_mounts)
        for file, text in (("uid_map", f"0 {user} 1"), ("setgroups", "deny"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", file).write_text(text)
    call(libc.mount, b"none", b"/", None, recursive_private, None)
    call(libc.mount, b"tmpfs", folder.encode(), b"tmpfs", 0, options.encode())


def answer(request: dict) -> list[dict]:
    jobs = request["jobs"]
    start = time.monotonic()
    running, found = {}, [None] * len(jobs)
    for number, job in enumerate(jobs):
        pid = os.fork()
        if not pid:
            child(job)
        running[pid] = number
    due = {
        pid: start + jobs[number]["fault"]["delay"]
        for pid, number in running.items()
        if (jobs[number]["fault"] or {}).get("kind") == "time"
    }
    timed_out = False
    while running:
        now = time.monotonic()
        for pid in [pid for pid, moment in due.items() if now >= moment]:
            strike(pid)
            del due[pid]
        if not timed_out and now - start > request["timeout"]:
            timed_out = True
            for pid in running:
                strike(pid)
        ended = next((seen for pid in running if (seen := os.waitpid(pid, os.WNOHANG))[0]), None)
        if ended is None:
            time.sleep(0.003)
            continue
        pid, status = ended
        number = running.pop(pid)
        due.pop(pid, None)
        code = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(ProcessLookupError):  # what it started, if anything
            os.killpg(pid, signal.SIGKILL)
        found[number] = {"code": code, "seconds": time.monotonic() - start, "timed_out": timed_out}
    return found


def strike(pid: int) -> None:
    """SIGKILL to a job and whatever it started; to the job alone while it has not yet made its own group."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def listen(place: str) -> socket.socket:
    """A socket that is there once it answers; forks will not be waited for."""

    def reap(*_):
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    signal.signal(signal.SIGCHLD, reap)
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{place}.new")
    server.listen(64)
    os.rename(f"{place}.new", place)
    return server


def accept(server: socket.socket) -> None:
    """A fork for every connection, until stdin ends."""
    while sys.stdin not in (readable := select.select([server, sys.stdin], [], [])[0]):
        connection, _ = readable[0].accept()
        if not os.fork():
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            answer_one(connection)
        connection.close()


def answer_one(connection: socket.socket) -> None:
    """Become what the connection asks for; never returns."""
    sent, files, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    while not sent.endswith(b"\n"):
        sent += connection.recv(1 << 16)
    job = json.loads(sent)
    if "root" in job:
        prepare(Path(job["root"]))
        server = listen(job["socket"])
        connection.sendall(b"ready\n")
        connection.close()
        accept(server)
        os._exit(0)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(job["env"])
    tempfile.tempdir = None
    if "command" not in job:
        figures_are(job["env"])
        serve(connection.makefile("r"), connection.makefile("w"))
        os._exit(0)
    os.chdir(job["cwd"])
    sys.path[1:1] = filter(None, job["env"].get("PYTHONPATH", "").split(os.pathsep))
    sys.executable = job.get("python") or sys.executable
    script, argv = job["command"]
    # The file that says which repository this is; of another than ours, the package is another.
    place = argv[argv.index("--snakefile") + 1] if "--snakefile" in argv else script
    if place != "-c" and Path(place).resolve().parents[1] != ROOT:
        forget()
    figures_are(job["env"])
    code = run_script(script, argv)
    connection.sendall(f"{code}\n".encode())
    os._exit(code)


def figures_are(env: dict[str, str]) -> None:
    """As CPT_FIGURES says; a package that is not imported yet draws them."""
    if figures := sys.modules.get("cpt_utils.base.figures"):
        figures.save = figure_faults.saving(env.get("CPT_FIGURES", ""), figures.save)


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "cpt_utils"]:
        del sys.modules[name]


def prepare(root: Path) -> None:
    """Import the package of the repository at `root`, and have it know what each script is made of."""
    global ROOT
    ROOT = root
    forget()
    sys.path.insert(1, str(root))
    for module in pkgutil.walk_packages([str(root / "cpt_utils")], "cpt_utils."):
        importlib.import_module(module.name)
    from cpt_utils.base import code

    for script in root.glob("*/*.py"):
        if script.parent.name not in ("cpt_utils", "tests"):
            with contextlib.suppress(Exception):  # none of ours
                code.digest(script.relative_to(root).as_posix())
    sys.path.remove(str(root))
    gc.collect()
    gc.freeze()  # a fork that collects garbage would copy all of these pages


def main() -> None:
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import matplotlib.pyplot
    from torch.utils import collect_env
    from transformers import conversion_mapping

    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # makes those of all types
    # The first figure of a process loads fonts and parses formulas for half a second.
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure = matplotlib.pyplot.figure(layout="constrained")
        figure.add_subplot(title="$10^{-3}$").plot([0.0, 1e-6])
        for suffix in ("pdf", "png"):
            figure.savefig(io.BytesIO(), format=suffix)
    matplotlib.pyplot.close("all")
    # lm_eval asks for it with every model; pip, lscpu and others are started for it.
    said = collect_env.get_pretty_env_info()
    collect_env.get_pretty_env_info = lambda: said
    prepare(ROOT)
    accept(listen(sys.argv[1]))


def serve(requests, answers) -> None:
    for line in requests:
        request = json.loads(line)
        found = mount(request) if "mount" in request else answer(request)
        if found is None:
            with open(request["requests"]) as requests, open(request["answers"], "w") as answers:
                serve(requests, answers)
            os._exit(0)
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
