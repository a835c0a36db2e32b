"""A hash of the code of a script, which does not change with comments, docstrings or formatting.

It covers the script, the scripts that it names in calls of `cli.sibling` (for an f-string, all that match), the modules
of the package that it imports anywhere, the same for each of these; and tables beside them that they name.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import sys
from pathlib import Path

from cpt_utils.base import cli, lazy
from cpt_utils.base.errors import InputError

PACKAGE = "cpt_utils"
# Modules without a method: an edit there changes no number. (The defaults of a study's keys are in the scripts.)
PLUMBING = {
    f"{PACKAGE}/base/{name}.py"
    for name in ("cli", "code", "errors", "experiments", "journal", "lazy", "locks", "results", "study_keys")
}
SAID = {"ASKED", "CAPTIONS", "IMAGES"}  # constants that only describe a script, and change no number


def files(script: str) -> list[Path]:
    """The files of the code of `script` (a path in the repository), itself first."""
    seen: dict[Path, None] = {}
    waiting = [cli.REPOSITORY / script]
    while waiting:
        path = waiting.pop(0)
        if path not in seen and path.is_file():
            seen[path] = None
            waiting += _uses(path) if path.suffix == ".py" else ()
    return list(seen)


def digest(script: str) -> str:
    """The hash of all `files` of `script` except PLUMBING."""
    sha = hashlib.sha256()
    with lazy.uncollected():  # syntax trees are a million objects: with those of torch, a collection takes .1 s
        for path in sorted(files(script)):
            name = path.relative_to(cli.REPOSITORY).as_posix()
            if name not in PLUMBING:
                sha.update(f"{name} {_digest(path)}\n".encode())
        _tree.cache_clear()  # else they are freed one by one at exit
    return sha.hexdigest()[:16]


def running() -> str | None:
    """`digest` of the script that this process runs; None if it is not a script of this repository."""
    path = Path(getattr(sys.modules["__main__"], "__file__", None) or "-").resolve()
    if path.parent.parent != cli.REPOSITORY:  # nor a script of an environment inside the repository, such as pytest
        return None
    return digest(path.relative_to(cli.REPOSITORY).as_posix())


def is_other(before: str | None) -> bool:
    """Whether this process is known to run different code from `before`, the `running` of an earlier process."""
    now = running() if before else None
    return now is not None and now != before


def stamp(script: str, folder: Path) -> Path:
    """A file in `folder` that is as old as the code of `script`, for programs that compare times.

    If the hash changes, the file gets the current time, and `<stamp>.before` holds the previous hash. A new stamp has
    the time of the newest code file, which may be that of a download: older results are then of unknown code.
    """
    path, now = folder / script.replace("/", "__"), digest(script)
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    if before != now:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(now, encoding="utf-8")
        if before is None:
            newest = max((file.stat().st_mtime_ns for file in files(script)), default=0)
            os.utime(temporary, ns=(newest, newest))
        else:
            path.with_name(f"{path.name}.before").write_text(before, encoding="utf-8")
        os.replace(temporary, path)
    return path


@functools.cache
def _tree(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except SyntaxError as error:
        raise InputError(f"{path}, line {error.lineno}: {error.msg}") from None


@functools.cache
def _uses(path: Path) -> list[Path]:
    """The files of the repository that a module imports or names."""
    used, beside = [], {file.name for file in path.parent.iterdir() if file.suffix != ".py"}
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            module = cli.REPOSITORY / node.module.replace(".", "/")
            for module_path in (module, *(module / name.name for name in node.names)):
                # Modules in a folder below a floor may be found by name, so all of them count.
                whole = len(module_path.relative_to(cli.REPOSITORY).parts) > 2 and module_path.is_dir()
                used += sorted(module_path.glob("*.py")) if whole else [module_path.with_suffix(".py")]
        elif isinstance(node, ast.Call) and node.args and _name(node.func) == "sibling":
            used += _named(node.args[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in beside:
            used.append(path.with_name(node.value))
    return used


def _name(function: ast.expr) -> str:
    """The name of a called function or method."""
    return getattr(function, "attr", getattr(function, "id", ""))


def _named(argument: ast.expr) -> list[Path]:
    """The scripts that the argument of `cli.sibling` may name."""
    parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
    text = "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in parts)
    return sorted(cli.REPOSITORY.glob(text))


@functools.cache
def _digest(path: Path) -> str:
    """The hash of a file: of a module's syntax tree, of the bytes of any other."""
    if path.suffix != ".py":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    words: list[str] = []  # one list: nested generators would take three times as long
    _tell(_tree(path), words)
    return hashlib.sha256("".join(words).encode()).hexdigest()


def _tell(node, words: list[str]) -> None:
    """A syntax tree as text, without line numbers and docstrings. (`ast.dump` differs between versions of Python.)"""
    if isinstance(node, ast.AST):
        words.append(f"({type(node).__name__}")
        for name in node._fields:
            value = getattr(node, name, None)
            if name == "body" and isinstance(value, list):
                value = [part for part in value if not _is_said(part)]
            if value not in (None, []):
                words.append(f" {name}=")
                _tell(value, words)
        words.append(")")
    elif isinstance(node, list):
        for part in node:
            _tell(part, words)
    else:
        words.append(repr(node))


def _is_said(node: ast.stmt) -> bool:
    """Whether a statement is only text about the code: a docstring, or one of SAID."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(isinstance(target, ast.Name) and target.id in SAID for target in targets)
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
