"""Imports point one way, every module stands alone, and importing the package costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sphere_rl

SOURCE = Path(sphere_rl.__file__).parent
MODULES = sorted(p.relative_to(SOURCE).with_suffix("").as_posix() for p in SOURCE.rglob("*.py"))

LAYERS = [
    ["errors", "kernels", "penalty", "seeding", "statistics"],
    ["experts", "runs", "runtime", "suites"],
    ["learner", "spectrum"],
    ["integrations", "methods"],
    ["config"],
    ["training"],
    ["protocol", "results"],
    ["terminal"],
    ["report", "sweep"],
    ["commands"],
    ["cli"],
]
"""From the ground up; a part of the package imports those below and those beside it, never in a circle."""


def module_of(name: str) -> str:
    """The module that a dotted name lies in."""
    while name and name not in MODULES:
        name = name.rpartition("/")[0] if not name.endswith("/__init__") else ""
        name = f"{name}/__init__" if f"{name}/__init__" in MODULES else name
    return name


def imports_of(module: str) -> set[str]:
    """Modules of the package that a module imports, anywhere, those for type checkers included."""
    found = set()
    for node in ast.walk(ast.parse((SOURCE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sphere_rl":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("sphere_rl.")}
    return {module_of("/".join(name.split(".")[1:])) for name in found} - {"", module}


IMPORTS = {module: imports_of(module) for module in MODULES if module != "__init__"}


def part(module: str) -> str:
    return module.split("/")[0]


def test_every_part_has_its_layer() -> None:
    assert {part(module) for module in IMPORTS} == {name for layer in LAYERS for name in layer}


@pytest.mark.parametrize("module", IMPORTS)
def test_imports_point_down(module: str) -> None:
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    above = {name for name in IMPORTS[module] if level[part(name)] > level[part(module)]}
    assert not above


def test_neither_modules_nor_parts_import_in_a_circle() -> None:
    parts: dict[str, set[str]] = {}
    for module, found in IMPORTS.items():
        parts.setdefault(part(module), set()).update({part(name) for name in found} - {part(module)})
    for graph in (IMPORTS, parts):
        TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_penalty_imports_nothing_of_the_package() -> None:
    assert not IMPORTS["penalty"]


def test_every_module_imports_alone() -> None:
    names = [f"sphere_rl.{m.removesuffix('/__init__').replace('/', '.')}" for m in MODULES if m != "__init__"]
    code = "import importlib, os, sys\nfor name in sys.argv[1:]:\n"
    code += "    pid = os.fork()\n    if not pid:\n        importlib.import_module(name)\n        os._exit(0)\n"
    code += "    assert os.waitpid(pid, 0)[1] == 0, name\n"
    preload = "import torch, gymnasium, mujoco\n"  # loaded once; only the package's own order of imports is in question
    subprocess.run([sys.executable, "-W", "error", "-c", preload + code, *names], check=True)


def test_importing_the_package_loads_no_library() -> None:
    code = "import sys, sphere_rl; assert not {'torch', 'numpy', 'gymnasium'} & set(sys.modules); "
    code += "assert all(callable(getattr(sphere_rl, name)) for name in sphere_rl.__all__)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert len(sphere_rl.__all__) <= 20
