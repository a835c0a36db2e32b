"""What a long measurement has found so far: a line of JSON for each finished part, so that a killed run goes on."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from cpt_utils.base import cli, code, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.processes import Process


class Journal:
    """Records by key in a file of JSON lines. The first line is the request and the code that answers it; a file of
    another one is started over, so that what two versions of a method found is never mixed; it is kept as `.before`.

    The file is locked as long as the process lives, so that a measurement that is started twice runs once.

    Attributes:
        done: key -> record, of this and of earlier, interrupted runs.
    """

    def __init__(self, path: Path, request: dict):
        self.path, self.done = Path(path), {}
        first = {"request": results.plain(request)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self._locked()
            whole = 0  # bytes up to the end of the last good line
            content = self.file.read()
            for text in content.splitlines(keepends=True):
                if not text.endswith(b"\n"):  # the line that was being written at the kill
                    break
                try:
                    line = json.loads(text)
                    if whole:
                        self.done[line["key"]] = line["record"]
                    elif not results.same(line["request"], first["request"]) or code.is_other(line.get("code")):
                        self._keep(content)
                        break
                except (ValueError, LookupError, TypeError):
                    break
                whole += len(text)
            self.file.truncate(whole)
            self.file.seek(whole)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from error
        if not whole:
            made_of = code.running()
            self._write(first | ({"code": made_of} if made_of else {}))

    def _keep(self, content: bytes) -> None:
        """Set aside what was measured for another request, or by other code: it may have taken a day."""
        kept, n = before(self.path), content.count(b"\n") - 1
        if n:
            kept.write_bytes(content)
        many = f"its {n} records are" if n > 1 else "its record is"
        said = f"; {many} kept in {kept.name}: move it back to go on with that code" if n else ""
        cli.say(f"{self.path} is of another request, or of other code: starting over{said}")

    def _locked(self):
        """The file, open and locked; of two processes the second is refused."""
        while True:
            # Without a buffer: nothing may be written later, when a full disk has been reported.
            file = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)  # noqa: SIM115
            try:
                # Of the process, not of the descriptor as in `locks`: one process may open its own journal again.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise InputError(f"{self.path}: another process is measuring this; wait for it to end") from None
            except OSError:  # file systems without locks: go on, two at once would only measure twice
                return file
            if self.path.is_file() and os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                return file
            file.close()  # finished and removed by another process, between opening and locking

    def add(self, key: str, record) -> None:
        """Keep a record; on the disk when this returns.

        Raises:
            InputError: it cannot be written.
        """
        self.done[key] = record
        self._write({"key": key, "record": record})

    def _write(self, line: dict) -> None:
        rest = json.dumps(line).encode() + b"\n"
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
            os.fsync(self.file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}; free some space and go on") from error


def before(path: Path) -> Path:
    """Where a journal keeps what it could not go on with."""
    return path.with_name(f"{path.name}.before")


def remove(path: Path) -> None:
    """Remove a journal whose result is written."""
    for file in (path, before(path)):
        file.unlink(missing_ok=True)


def complete(
    notes: Journal | None, process: Process, keys: Iterable[str], measured: Callable[[str], dict], desc: str
) -> None:
    """Add the record of every key that the journal lacks, `measured(key)`, one per process in each round.

    Only the first process has `notes`; what is in them is known to all, so a run that was killed goes on with any
    number of processes.
    """
    keys = list(keys)
    known = set(process.gather(list(notes.done) if notes else []))
    if known:
        cli.say(f"{len(known)} of {len(keys)} sets were measured before; continuing with the rest")
    with cli.progress(desc=desc, total=len(keys), unit="set") as bar:
        bar.update(len(known))
        for found in process.rounds([key for key in keys if key not in known], measured):
            for key, record in found if notes else []:
                notes.add(key, record)
            bar.update(len(found))
