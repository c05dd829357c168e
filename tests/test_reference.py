"""The reference of the documentation: every public name is in it, and what it names is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import sphere_rl
from sphere_rl import experts, methods, spectrum

DOCS = Path(__file__).parents[1] / "docs"


def documented() -> list[str]:
    """What mkdocstrings is asked for on all pages."""
    pages = "\n".join(path.read_text() for path in sorted(DOCS.glob("*.md")))
    return re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)


def find(name: str) -> Any:
    """The object of a dotted name: as much of it as is a module, then attributes."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if error.name != ".".join(parts[:count]):
                raise
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"{name}: no such module")


def test_every_public_name_is_documented() -> None:
    wanted = {f"sphere_rl.{name}" for name in sphere_rl.__all__}
    wanted |= {f"sphere_rl.methods.{name}" for name in methods.__all__ if name not in ("methods", "check_methods")}
    wanted |= {f"sphere_rl.spectrum.{name}" for name in spectrum.__all__} - {
        "sphere_rl.spectrum.effective_rank", "sphere_rl.spectrum.entk", "sphere_rl.spectrum.gram_effective_rank",
    }  # fmt: skip
    routings = {name for name in experts.__all__ if name.endswith("_routing")}
    wanted |= {f"sphere_rl.experts.{name}" for name in {"Gate", "Kind", "Routing", "TopK"} | routings}
    wanted |= {"sphere_rl.suites.Suite", "sphere_rl.integrations.hooks.Tracker"}
    wanted |= {f"sphere_rl.integrations.sb3.{name}" for name in ("MoEPolicy", "PlasticityCallback")}
    wanted |= {"sphere_rl.integrations.rsl_rl.MoEModel", "sphere_rl.integrations.mixture.plasticity"}
    assert wanted - {*documented()} == set()


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_shows_every_name(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quick = {"SPHERE_LIVE": "0", "NO_MKDOCS_2_WARNING": "1"}
    environ = os.environ | quick
    built = subprocess.run(command, cwd=DOCS.parent, env=environ, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    pages = [path.read_text() for path in tmp_path.glob("api*/index.html")]
    for name in documented():
        assert any(f'id="{name}"' in page for page in pages), name


def test_each_name_stands_once() -> None:
    names = documented()
    assert sorted(names) == sorted({*names})


@pytest.mark.parametrize("name", documented())
def test_what_the_reference_names_is_there_and_says_what_it_is(name: str) -> None:
    if ".sb3." in name:
        pytest.importorskip("stable_baselines3")
    if ".rsl_rl." in name:  # takes twenty seconds to import; tests/test_rsl_rl.py does
        module, _, last = name.rpartition(".")
        source = (DOCS.parent / "src" / f"{module.replace('.', '/')}.py").read_text()
        assert re.search(rf'^class {last}\(.*\n    """', source, re.MULTILINE)
        return
    found = find(name)
    if callable(found) or isinstance(found, type):
        assert found.__doc__ or name.startswith("sphere_rl.penalty.Scale")
