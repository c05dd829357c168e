"""Imports point one way, every module stands alone, and importing the package costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sphere_rl

SOURCE = Path(sphere_rl.__file__).parent
MODULES = sorted(p.relative_to(SOURCE).with_suffix("").as_posix() for p in SOURCE.rglob("*.py"))

LAYERS = [
    set("errors gradients lanes normalizer parsers penalty picture records routing runtime".split())
    | {"scripting", "seeding", "tables"},
    set("chain env_args experts mixture optimizer routed_gram runs ranks spaces statistics vanishing".split())
    | {"captured", "jax_regularizer", "joint_regularizer", "regularizer", "torch_regularizer"},
    {"learner", "networks", "regression", "surrogate", "sweeps"},
    {"direct", "factors", "metrics", "ntk", "rollout", "spectrum", "suites"},
    {"hooks", "methods", "probe"},
    {"config"},
    {"agent"},
    {"checkpoint", "evaluation", "ppo", "saved", "tracking"},
    {"policies", "protocol"},
    {"appearance", "arguments", "catalogue", "geometry", "monitors", "play", "results"},
    {"diagnose", "figures", "sweep"},
    {"report"},
    {"demo"},
    {"cli"},
]
"""From the ground up; a module may import modules of its own layer and of those below."""


def part(module: str) -> str:
    return module.split("/")[0]


def imports_of(module: str) -> set[str]:
    """Parts of the package that a module imports, anywhere but under ``if TYPE_CHECKING``."""
    tree = ast.parse((SOURCE / f"{module}.py").read_text())
    guarded = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sphere_rl":
            names = node.module.split(".")[1:] or [alias.name for alias in node.names]
            found |= set(names[:1] if node.module != "sphere_rl" else names)
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("sphere_rl.")}
    return found & set().union(*LAYERS)


def test_every_module_has_its_layer() -> None:
    assert {part(module) for module in MODULES} - {"__init__"} <= set().union(*LAYERS)


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__"])
def test_imports_point_down(module: str) -> None:
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    above = {name for name in imports_of(module) if level[name] > level[part(module)]}
    assert not above


def test_penalty_imports_nothing_of_the_package() -> None:
    assert not imports_of("penalty")


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
