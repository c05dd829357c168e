"""Imports point one way, every module stands alone, and importing the package costs nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest
from scripts import architecture
from scripts.architecture import LAYERS, MODULES, SOURCE, of_parts, part

import sphere_rl

IMPORTS = architecture.imports()


def test_every_part_has_its_layer() -> None:
    assert {part(module) for module in IMPORTS} == {name for layer in LAYERS for name in layer}


@pytest.mark.parametrize("module", IMPORTS)
def test_imports_point_down(module: str) -> None:
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    above = {name for name in IMPORTS[module] if level[part(name)] > level[part(module)]}
    assert not above


def test_neither_modules_nor_parts_import_in_a_circle() -> None:
    for graph in (IMPORTS, of_parts(IMPORTS)):
        TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_penalty_imports_nothing_of_the_package() -> None:
    assert not IMPORTS["penalty"]


OPTIONAL = {
    "integrations/rsl_rl": "rsl_rl",
    "integrations/sb3": "stable_baselines3",
    "integrations/sb3_callback": "stable_baselines3",
}
"""Modules for a library that need not be installed."""


@pytest.mark.slow
def test_every_module_imports_alone() -> None:
    there = [m for m in MODULES if m != "__init__" and (m not in OPTIONAL or find_spec(OPTIONAL[m]))]
    names = [f"sphere_rl.{m.removesuffix('/__init__').replace('/', '.')}" for m in there]
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


LONG_FILES = {"tests/test_report.py", "tests/test_sweep.py"}
"""Each has fixtures of whole folders of runs that take seconds to train, which two files would both have to make."""


def code() -> Iterator[Path]:
    """All Python files of the project."""
    for folder in ("src", "tests", "benchmarks", "scripts", "examples"):
        yield from (architecture.ROOT / folder).rglob("*.py")


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring: what a formula and its errors take is no code to be carved."""
    assert node.end_lineno is not None
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is None:
        return lines
    text = node.body[0]
    assert text.end_lineno is not None
    return lines - (text.end_lineno - text.lineno + 1)


def test_files_and_functions_are_short() -> None:
    texts = {path.relative_to(architecture.ROOT).as_posix(): path.read_text() for path in code()}
    assert {name for name, text in texts.items() if text.count("\n") > 400} <= LONG_FILES
    functions = [
        (name, node.name, length(node))
        for name, text in texts.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [one for one in functions if one[2] > 40] == []


def private_names(tree: ast.AST) -> set[str]:
    """What a file makes and calls its own, by a leading underscore: functions, classes, variables and attributes."""
    nodes = list(ast.walk(tree))
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    return {name for name in names if re.match("_[a-z]", name)} - {"_replace"}  # which all named tuples have


def test_private_names_stay_in_their_files() -> None:
    trees = {path.relative_to(architecture.ROOT).as_posix(): ast.parse(path.read_text()) for path in code()}
    ours = {name for path, tree in trees.items() if path.startswith("src/") for name in private_names(tree)}
    reached = [
        (path, node.lineno, node.attr)
        for path, tree in trees.items()
        for foreign in [ours - private_names(tree)]
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in foreign and ast.unparse(node.value) != "self"
    ]
    imported = [
        (path, node.lineno, name.name)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sphere_rl")
        for name in node.names
        if name.name in ours
    ]
    assert reached + imported == []


def test_the_map_is_drawn_from_these_imports() -> None:
    assert architecture.PAGE.read_text() == architecture.page(architecture.PAGE.read_text()), (
        "python scripts/architecture.py draws it anew"
    )


def test_sphere_is_in_its_own_files_alone() -> None:
    """Steps and kernels know penalties on features; whose they are is in ``methods/sphere.py`` and ``penalty.py``."""
    named = [
        path.relative_to(SOURCE).as_posix()
        for part in ("kernels", "learner")
        for path in (SOURCE / part).rglob("*.py")
        if "sphere" in re.sub(r"sphere_rl[\w.]*", "", path.read_text().lower())
    ]
    assert named == []
