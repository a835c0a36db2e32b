"""Runs the languages of lsn/load_oscar.py in separate processes, each with its share of the cores."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError


def outcome(task: dict, report: Callable[[int], None], make: Callable) -> dict:
    """The result of `make`, or its error as a value, so that a language that fails does not stop the others."""
    try:
        return {"payload": make(task, report)}
    except InputError as error:
        return {"error": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}


def child() -> None:
    """Run one language in this process: the task on stdin, progress and the outcome as JSON lines on stdout."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not get into the channel
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the parent ends this one
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # temporary files are removed on the way out
    task = json.load(sys.stdin)
    sys.argv = task["argv"]

    def send(message: dict) -> None:
        try:
            print(json.dumps(message), file=channel, flush=True)
        except BrokenPipeError:  # the script that started this process is gone
            os._exit(1)

    make = cli.sibling("lsn/load_oscar.py").make
    send(outcome(task, lambda tokens: send({"tokens": tokens}), make))
    os._exit(0)  # the threads of a stopped stream may abort an ordinary exit


def in_process(task: dict, report: Callable[[int], None], threads: int, running: list) -> dict:
    """`outcome` in a new process with `threads` threads; the process is added to `running`."""
    code = "from cpt_utils.base import cli; cli.sibling('lsn/oscar_processes.py').child()"
    defaults = {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false"}
    # -P: do not look up modules in the current folder, which may hold one called `datasets`.
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env=defaults | os.environ,
    )
    running.append(process)
    with contextlib.suppress(BrokenPipeError), process.stdin:
        json.dump(task, process.stdin)
    result = {}
    with process.stdout:
        for line in process.stdout:
            message = json.loads(line)
            if "tokens" in message:
                report(message["tokens"])
            else:
                result = message
    code = process.wait()
    return result or {"error": f"its process ended with {f'signal {-code} (out of memory?)' if code < 0 else code}"}


def run_all(tasks: list[dict], max_concurrent: int, make: Callable) -> Iterator[tuple[dict, dict]]:
    """Every task with its outcome, `{"payload": the value of make}` or `{"error": reason}`, as they finish; in this
    process if only one would run at a time."""
    jobs = min(max_concurrent, len(tasks))
    total = sum(task["request"]["tokens"] for task in tasks)
    lock, done = threading.Lock(), Counter()
    with cli.progress(total=total, desc="tokens", unit="token") as bar:

        def reporter(task: dict) -> Callable[[int], None]:
            def report(tokens: int) -> None:
                with lock:
                    bar.update(tokens - done[task["path"]])
                    done[task["path"]] = tokens

            return report

        if jobs == 1:
            for task in tasks:
                yield task, outcome(task, reporter(task), make)
            return
        threads = max(1, (os.cpu_count() or 1) // jobs)
        running: list[subprocess.Popen] = []
        pool = ThreadPoolExecutor(jobs)
        try:
            futures = {pool.submit(in_process, task, reporter(task), threads, running): task for task in tasks}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:  # also after Ctrl-C
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                if process.poll() is None:
                    process.terminate()
