"""The house: which room may know of which, and no two modules of each other."""

import ast
import graphlib
import re
from pathlib import Path

import sparseflax

HERE = Path(sparseflax.__file__).parent
# From the ground up: a room knows of those before it. What stands in no folder is the table of contents.
ROOMS = re.findall(r"^\| `sparseflax/(\w+)/` \|", (HERE.parent / "docs" / "design.md").read_text(), re.MULTILINE)
MODULES = {".".join(("sparseflax", *file.relative_to(HERE).with_suffix("").parts)): file for file in HERE.rglob("*.py")}


def room(module: str) -> str:
    return module.split(".")[1]


def imports(module: str) -> set[str]:
    """Modules of sparseflax that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(MODULES)


def test_every_folder_is_a_room():
    assert {folder.name for folder in HERE.iterdir() if folder.is_dir() and (folder / "__init__.py").exists()} == set(ROOMS)


def test_rooms_know_only_of_those_below():
    wrong = [(module, other) for module in MODULES if room(module) in ROOMS
             for other in imports(module) if room(other) not in ROOMS[:ROOMS.index(room(module)) + 1]]
    assert not wrong


def test_no_circle_of_imports():
    inside = {module: imports(module) - {module} for module in MODULES if not module.endswith("__init__")}
    graphlib.TopologicalSorter(inside).prepare()  # raises CycleError


def test_the_cost_of_a_layer_knows_nothing_of_flax():
    for module in MODULES:
        if room(module) in ("conv", "cost"):
            assert "flax" not in {name.split(".")[0] for name in _all_imports(module)}, module


def _all_imports(module: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(MODULES[module].read_text())))
    return ({alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)})
