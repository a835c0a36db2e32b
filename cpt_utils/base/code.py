"""What a script is made of, and a hash of it: the same as long as only comments, docstrings or formatting change.

A script is made of itself, the scripts that it names in calls of `cli.sibling` (in an f-string, all that may be meant),
the modules of the package that it imports anywhere, and so on through these; and of tables beside them whose names
they mention.
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
# What carries a method but is none: an edit there makes no number another. Scripts have the defaults of a study's keys.
PLUMBING = {
    f"{PACKAGE}/base/{name}.py"
    for name in ("cli", "code", "errors", "experiments", "journal", "lazy", "locks", "results", "study_keys")
}
SAID = {"ASKED", "CAPTIONS", "IMAGES"}  # names whose values are words about a script: they decide nothing


def files(script: str) -> list[Path]:
    """The files that `script` (a path in the repository) is made of, itself first."""
    found: dict[Path, None] = {}
    waiting = [cli.REPOSITORY / script]
    while waiting:
        path = waiting.pop(0)
        if path not in found and path.is_file():
            found[path] = None
            waiting += _uses(path) if path.suffix == ".py" else ()
    return list(found)


def digest(script: str) -> str:
    """The hash of all that `script` is made of, but for PLUMBING."""
    whole = hashlib.sha256()
    with lazy.uncollected():  # of the million objects of syntax trees: beside torch's a collection takes .1 s
        for path in sorted(files(script)):
            name = path.relative_to(cli.REPOSITORY).as_posix()
            if name not in PLUMBING:
                whole.update(f"{name} {_digest(path)}\n".encode())
        _tree.cache_clear()  # or the process has them to take apart at its end
    return whole.hexdigest()[:16]


def running() -> str | None:
    """`digest` of the script that this process runs; None where it is none of the repository's."""
    path = Path(getattr(sys.modules["__main__"], "__file__", None) or "-").resolve()
    if path.parent.parent != cli.REPOSITORY:  # not one of an environment below it either, such as pytest
        return None
    return digest(path.relative_to(cli.REPOSITORY).as_posix())


def is_other(before: str | None) -> bool:
    """Whether this process is known to run other code than `before`, the `running` of an earlier one."""
    now = running() if before else None
    return now is not None and now != before


def stamp(script: str, folder: Path) -> Path:
    """A file in `folder` that is as old as what `script` is made of, for programs that compare times.

    It gets a new time where the hash has become another, and `<stamp>.before` holds the one that it had. At first it
    has the time of the newest file, which may be that of a download: what was there is then of unknown code.
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
    """The files of the repository that a module names."""
    found, beside = [], {file.name for file in path.parent.iterdir() if file.suffix != ".py"}
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            module = cli.REPOSITORY / node.module.replace(".", "/")
            for module_path in (module, *(module / name.name for name in node.names)):
                # In a folder below a floor modules may be found by their names: it counts whole.
                whole = len(module_path.relative_to(cli.REPOSITORY).parts) > 2 and module_path.is_dir()
                found += sorted(module_path.glob("*.py")) if whole else [module_path.with_suffix(".py")]
        elif isinstance(node, ast.Call) and node.args and _name(node.func) == "sibling":
            found += _named(node.args[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in beside:
            found.append(path.with_name(node.value))
    return found


def _name(function: ast.expr) -> str:
    """What is called, without what it is called on."""
    return getattr(function, "attr", getattr(function, "id", ""))


def _named(argument: ast.expr) -> list[Path]:
    """The scripts that may be meant by the argument of `cli.sibling`."""
    parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
    text = "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in parts)
    return sorted(cli.REPOSITORY.glob(text))


@functools.cache
def _digest(path: Path) -> str:
    """The hash of a file: of what a module does, of every byte of any other."""
    if path.suffix != ".py":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    told: list[str] = []  # one list for all: a generator at each level takes three times as long
    _tell(_tree(path), told)
    return hashlib.sha256("".join(told).encode()).hexdigest()


def _tell(node, told: list[str]) -> None:
    """A syntax tree in words, without line numbers and docstrings. (`ast.dump` differs between versions of Python.)"""
    if isinstance(node, ast.AST):
        told.append(f"({type(node).__name__}")
        for name in node._fields:
            value = getattr(node, name, None)
            if name == "body" and isinstance(value, list):
                value = [part for part in value if not _is_said(part)]
            if value not in (None, []):
                told.append(f" {name}=")
                _tell(value, told)
        told.append(")")
    elif isinstance(node, list):
        for part in node:
            _tell(part, told)
    else:
        told.append(repr(node))


def _is_said(node: ast.stmt) -> bool:
    """Whether a statement only says something: a docstring, or the captions of a script."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(isinstance(target, ast.Name) and target.id in SAID for target in targets)
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
