"""The core alone does what it says, and whatever an extra brings is named in one line where it is not installed."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sphere_rl import cli, extras

ROOT = Path(__file__).parents[1]
HIDDEN = sorted({module for modules in extras.MODULES.values() for module in modules} - {"jax"})
"""What the core must do without; array-api-compat asks whether JAX has been imported, and takes a hidden one for it."""
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def without(code: str, modules: list[str]) -> subprocess.CompletedProcess[str]:
    """Run code in a process that cannot import these modules."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({modules!r}))\n"
    return subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True, check=False)


def test_the_core_needs_no_extra() -> None:
    code = """
import torch, sphere_rl as sp
actor = sp.make_actor("topk_moe", 3, 1, width=4, num_experts=3)
states = torch.randn(5, 3)
with sp.track(actor, "experts") as tracked:
    pass
kernel = sp.entk(actor, states)
features, gates = sp.regularize(torch.ones(5, 2, 3, requires_grad=True), torch.ones(5, 2, requires_grad=True))
penalty = sp.sphere_penalty(sp.weighted_features(features, gates))
print(tuple(kernel.shape), sp.effective_rank(torch.ones(4)), float(penalty.detach()) > 0)
"""
    result = without(code, HIDDEN)
    assert (result.stdout, result.stderr) == ("(5, 5) 4.0 True\n", "")


def test_the_table_of_extras_is_that_of_the_package() -> None:
    names = {name: {re.split(r"[>=<\[]", one)[0] for one in ones} for name, ones in
             DECLARED["optional-dependencies"].items()}  # fmt: skip
    for extra, modules in extras.MODULES.items():
        brought = {extras.DISTRIBUTIONS.get(module, module) for module in modules}
        assert brought == names[extra] - {"sphere-rl"}, extra
        included = [re.findall(r"sphere-rl\[(.*)\]", one) for one in DECLARED["optional-dependencies"][extra]]
        assert [name for found in included for name in found] == list(extras.INCLUDED.get(extra, ()))
    assert len(DECLARED["dependencies"]) == 4


@pytest.mark.parametrize(
    ("words", "hidden", "line"),
    [
        (["report", "runs"], "plotly", "sphere report: plotly is not installed; pip install 'sphere-rl[report]'"),
        (["diagnose", "runs"], "polars", "sphere diagnose: polars is not installed; pip install 'sphere-rl[report]'"),
        (["train", "--help"], "filelock", "sphere train: filelock is not installed; pip install 'sphere-rl[train]'"),
        (["list"], "gymnasium", "sphere list: gymnasium is not installed; pip install 'sphere-rl[train]'"),
        (["play", "runs"], "PIL", "sphere play: pillow is not installed; pip install 'sphere-rl[play]'"),
        (["train", "--out", "x"], "envpool", "sphere train: envpool is not installed; pip install 'sphere-rl[suites]'"),
        (["sweep", "--engine", "ray"], "ray", "engine: ray is not installed; pip install 'sphere-rl[ray]'"),
        (["train", "--log", "wandb"], "wandb", "log: wandb is not installed; pip install 'sphere-rl[wandb]'"),
    ],
)
def test_what_is_missing_is_named_in_one_line(
    words: list[str],
    hidden: str,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, hidden, None)
    assert cli.main(words) == 2
    assert capsys.readouterr().err == f"sphere: {line}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "extra", "module"),
    [("load_results", "report", "polars"), ("make_suite", "suites", "gymnasium"), ("load_policy", "train", "filelock")],
)
def test_a_name_says_which_extra_it_needs(name: str, extra: str, module: str) -> None:
    result = without(f"import sphere_rl\ntry:\n    sphere_rl.{name}\nexcept ImportError as e:\n    print(e)", [module])
    assert result.stdout == f"sphere_rl.{name}: {module} is not installed; pip install 'sphere-rl[{extra}]'\n"


def test_another_import_that_fails_is_not_explained() -> None:
    assert extras.explained(ModuleNotFoundError(name="maze"), "sphere train") is None
