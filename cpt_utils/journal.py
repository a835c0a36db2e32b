"""What a long measurement has found so far: a line of JSON for each finished part, so that a killed run goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cpt_utils import results
from cpt_utils.errors import InputError


class Journal:
    """Records by key in a file of JSON lines; the first line is the request, and a file of another one is begun anew.

    Attributes:
        done: key -> record, of this and of earlier, interrupted runs.
    """

    def __init__(self, path: Path, request: dict):
        self.path = path
        request = results.plain(request)
        lines: list[dict] = []
        if path.is_file():
            for text in path.read_text(encoding="utf-8").splitlines():
                try:
                    lines.append(json.loads(text))
                except json.JSONDecodeError:  # the line that was being written at the kill
                    break
        if not lines or lines[0] != {"request": request}:
            lines = [{"request": request}]
        with results.replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        self.done = {line["key"]: line["record"] for line in lines[1:]}

    def add(self, key: str, record) -> None:
        """Keep a record; on the disk when this returns.

        Raises:
            InputError: it cannot be written.
        """
        self.done[key] = record
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "record": record}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}; free some space and go on") from error
