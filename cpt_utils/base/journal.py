"""The finished parts of a long measurement, one JSON line each, so that a killed run can continue."""

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
    """Records by key in a file of JSON lines. The first line is the request and the hash of the code. If either
    differs, the journal starts over, so that results of two versions are never mixed, and the old one is kept as
    `.before`.

    The file is locked while the process lives, so that a measurement that is started twice runs once.

    Attributes:
        done: key -> record, from this run and earlier, interrupted ones.
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
                if not text.endswith(b"\n"):  # the process was killed while writing this line
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
        """Set aside records of another request, or of other code: they may have taken a day."""
        kept, n = before(self.path), content.count(b"\n") - 1
        if n:
            kept.write_bytes(content)
        many = f"its {n} records are" if n > 1 else "its record is"
        hint = f"; {many} kept in {kept.name}: move it back to continue with that code" if n else ""
        cli.say(f"{self.path} is of another request, or of other code: starting over{hint}")

    def _locked(self):
        """The file, open and locked; a second process is refused."""
        while True:
            # Unbuffered: after a full disk has been reported, nothing may be written later.
            file = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)  # noqa: SIM115
            try:
                # The process holds this lock, not the descriptor as in `locks`: a process may reopen its journal.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise InputError(f"{self.path}: another process is measuring this; wait for it to end") from None
            except OSError:  # no locks on this file system: go on; two processes would only measure twice
                return file
            if self.path.is_file() and os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                return file
            file.close()  # another process finished and removed it before it was locked

    def add(self, key: str, record) -> None:
        """Keep a record; it is on disk when this returns.

        Raises:
            InputError: it cannot be written.
        """
        self.done[key] = record
        self._write({"key": key, "record": record})

    def _write(self, line: dict) -> None:
        unwritten = json.dumps(line).encode() + b"\n"
        try:
            while unwritten:
                unwritten = unwritten[self.file.write(unwritten) :]
            os.fsync(self.file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}; free some space and continue") from error


def before(path: Path) -> Path:
    """Where a journal keeps the records that it could not continue from."""
    return path.with_name(f"{path.name}.before")


def remove(path: Path) -> None:
    """Remove a journal whose result is written."""
    for file in (path, before(path)):
        file.unlink(missing_ok=True)


def complete(
    notes: Journal | None, process: Process, keys: Iterable[str], measured: Callable[[str], dict], desc: str
) -> None:
    """Add `measured(key)` for every key that the journal lacks, one key per process in each round.

    Only the first process has `notes`; it shares their keys, so a killed run can continue with any number of processes.
    """
    keys = list(keys)
    known = set(process.gather(list(notes.done) if notes else []))
    if known:
        cli.say(f"{len(known)} of {len(keys)} sets were measured before; continuing with the rest")
    with cli.progress(desc=desc, total=len(keys), unit="set") as bar:
        bar.update(len(known))
        for pairs in process.rounds([key for key in keys if key not in known], measured):
            for key, record in pairs if notes else []:
                notes.add(key, record)
            bar.update(len(pairs))
