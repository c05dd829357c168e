"""What is released: one version, and a package whose types others can read."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import sphere_rl as sp
from sphere_rl.cli import main

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def test_the_version_is_the_projects(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sphere-rl {version('sphere-rl')}\n"
    assert sp.__version__ == version("sphere-rl")
    for page, pattern in (("CITATION.cff", r"^version: (.+)$"), ("CHANGELOG.md", r"^## ([\d.]+)")):
        found = re.search(pattern, (ROOT / page).read_text(), re.MULTILINE)
        assert found is not None
        assert found[1] == PROJECT["version"], page


def test_types_are_read_by_a_script_outside(tmp_path: Path) -> None:
    """A type checker sees what functions give, and a wrong argument."""
    script = tmp_path / "outside.py"
    script.write_text(
        "import torch\nimport sphere_rl as sp\n"
        'actor = sp.make_actor("topk_moe", 3, 1)\nreveal_type(actor)\nreveal_type(sp.effective_rank(torch.ones(3)))\n'
        "sp.make_actor(3, 3, 1)\n"
    )
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(script)]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    assert 'Type of "actor" is "Actor"' in found
    assert 'Type of "sp.effective_rank(torch.ones(3))" is "float"' in found
    assert len(re.findall(r"error: .*", found)) == 1, found
    assert 'is not assignable to "str"' in found


def test_classifiers_name_what_requires_python_allows() -> None:
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert f">={named[0]}" == PROJECT["requires-python"]


def test_the_container_has_the_projects_torch_and_what_it_copies() -> None:
    """Another PyTorch than the package takes would be replaced by the default build, with gigabytes of CUDA."""
    (torch,) = (line for line in PROJECT["dependencies"] if line.startswith("torch"))
    recipe = (ROOT / "Containerfile").read_text()
    assert f'pip install --no-cache-dir "{torch}" --index-url' in recipe
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY (.+) \S+$", recipe, re.MULTILINE) for word in line.split()}
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)


def test_the_build_can_read_the_project() -> None:
    """Hatchling 1.25 takes a table where the standard, and this project, has a list of licence files."""
    (build,) = PYPROJECT["build-system"]["requires"]
    found = re.fullmatch(r"hatchling>=(\d+)\.(\d+),<2", build)
    assert found is not None
    assert (int(found[1]), int(found[2])) >= (1, 26)
