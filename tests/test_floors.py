"""The package's floors: a module imports from its own floor and those below, in no circle, and no script."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from helpers import ROOT

FLOORS = ("base", "architectures", "checkpoints", "models", "interventions", "measures")
PACKAGE = ROOT / "cpt_utils"


def imported(path: Path, annotations: bool = True) -> set[str]:
    """The package's modules that a file imports, as `floor/module`; inside functions and for annotations, too.

    A folder on a floor is its `__init__.py`: `base/sources`.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not annotations:
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(name.name.split(".")[0] == "cpt_utils" for name in node.names), path
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cpt_utils":
            parts = node.module.split(".")[1:]
            found |= {"/".join(parts)} if len(parts) > 1 else {f"{parts[0]}/{name.name}" for name in node.names}
    return found


def test_every_module_stands_on_a_floor_and_imports_downwards():
    modules = {str(path.relative_to(PACKAGE).with_suffix("")): path for path in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix("/__init__"): path for name, path in modules.items()}
    modules = {name: path for name, path in modules.items() if name not in (*FLOORS, "__init__")}
    assert {name.partition("/")[0] for name in modules} == set(FLOORS)
    for name, path in modules.items():
        height = FLOORS.index(name.partition("/")[0])
        for other in imported(path):
            assert other in modules, f"{name} imports {other}"
            assert FLOORS.index(other.partition("/")[0]) <= height, f"{name} imports {other}, which is above it"
        assert "sibling(" not in path.read_text() or name == "base/cli", f"{name} uses a script"
    graph = {name: imported(path, annotations=False) for name, path in modules.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(modules)  # CycleError names a circle
