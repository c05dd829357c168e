"""The registry of methods: what it refuses, and that one new file is all that a new method takes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conformance.agents import make_agent, make_config

import sphere_rl
from sphere_rl.config import override
from sphere_rl.errors import ConfigError
from sphere_rl.methods import Method, methods

EXPECTED = (
    "none sphere layernorm l2_init weight_decay parseval spectral_norm spectral_reg crelu redo regrama cbp "
    "shrink_perturb reset_head reset_all injection c_chain trac nap fire load_balance bound_loss"
).split()

TOY = '''
"""Pulls the head's bias to a target: a method for a test."""

from dataclasses import dataclass

from sphere_rl.methods import Method, MethodConfig


@dataclass(frozen=True)
class ToyConfig(MethodConfig):
    """Strength."""

    strength: float = 0.125
    """Factor of the pull."""


class Toy(Method):
    """Counts minibatches; each pulls a little harder."""

    summary = "pull the bias to a constant"
    citation = "Nobody 2026, A Toy"
    Config = ToyConfig
    count = 0

    def actor_penalty(self, step):
        return self.config.strength * self.count * (step.agent.actor.experts.head.bias - 1).square().sum()

    def after_minibatch(self, agent, batch):
        self.count += 1

    def metrics(self):
        return {"toy_count": float(self.count)}

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]
'''


def test_options_of_networks_that_there_are_not_are_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(methods()["crelu"], "network_options", lambda self: {"widht": 4})
    message = "method: 'crelu' is not allowed; expected network_options of fields of NetworkOptions, not widht (did you"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)} mean width"):
        make_agent(make_config("crelu"))


def test_every_method_is_there():
    assert set(EXPECTED) <= methods().keys()
    assert all(issubclass(method, Method) for method in methods().values())
    assert not any(name.startswith("_") for name in methods())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("sphere", "magic"), "method: 'magic' is not allowed; expected one or more of bound_loss, c_chain, cbp, "),
        (("sphere+redo",), r"'sphere\+redo' is not allowed; .* \(composed ones with a space between\)"),
        (("redo", "redo"), "each method once"),
        (("trac", "weight_decay"), "at most one that replaces Adam, not trac and weight_decay"),
    ],
)
def test_wrong_names_are_refused(names, message):
    with pytest.raises(ConfigError, match=message):
        make_config(*names)


def test_load_balance_needs_a_gate():
    with pytest.raises(ConfigError, match="an actor or critic with a gate; dense has none"):
        make_agent(make_config("load_balance", actor="dense"))
    make_agent(make_config("load_balance", actor="dense", critic="topk_moe"))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("redo", {"every": 0}, "redo.every: 0 is not allowed; expected a finite number, 1 or more"),
        ("regrama", {"threshold": -1.0}, "regrama.threshold: -1.0"),
        ("cbp", {"rate": 1.5}, "cbp.rate: 1.5 is not allowed; expected a number from 0 to 1"),
        ("parseval", {"scale": float("nan")}, "parseval.scale: nan"),
        ("trac", {"betas": [0.9, 1.1]}, "trac.betas"),
        ("trac", {"s0": 0.0}, "trac.s0: 0.0 is not allowed; expected a finite number above 0"),
        ("shrink_perturb", {"when": "always"}, "shrink_perturb.when: 'always'"),
    ],
)
def test_wrong_options_are_refused(method, options, message):
    with pytest.raises(ConfigError, match=message):
        override(make_config("none"), {method: options})


def test_crelu_needs_even_widths():
    with pytest.raises(ConfigError, match="width: 15 is not allowed; expected an even number with crelu"):
        make_agent(make_config("crelu", network={"width": 15}))


def test_a_new_file_is_a_new_method(tmp_path):
    """A copy of the package with one file more: it is listed, its conformance tests run, and runs with it resume."""
    source = Path(sphere_rl.__file__).parent
    shutil.copytree(source, tmp_path / "sphere_rl", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "sphere_rl" / "methods" / "toy.py").write_text(TOY)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "300"}

    def run(*command: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    listed = run("sphere_rl.cli", "list", "methods", "--json")
    (line,) = (line for line in listed.splitlines() if '"toy"' in line)
    for text in ("pull the bias to a constant", "strength 0.125", "Nobody 2026, A Toy"):
        assert text in line
    conformance = str(Path(__file__).parent / "conformance" / "test_methods.py")
    tests = run("pytest", "-q", "-p", "no:cacheprovider", conformance, "-k", "toy and not wide and not ds_moe")
    assert "10 passed" in tests


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "CHANGELOG.md"])
def test_pages_count_the_methods_right(page: str) -> None:
    """All but plain PPO and SPHERE."""
    words = "seventeen eighteen nineteen twenty twenty-one twenty-two twenty-three twenty-four".split()
    text = (Path(__file__).parents[1] / page).read_text()
    (said,) = re.findall(
        r"(\w+) (?:others? on equal terms|other mitigations?\b|other mitigation methods)", text.replace("**", "")
    )
    assert said == words[len(methods()) - 2 - 17]
