"""What methods and suites of plugins do wrong while they train: one line and an exit code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import WORDS, config

from sphere_rl import plugins
from sphere_rl.cli import main
from sphere_rl.learner.actor_critic import ActorCritic, Spaces
from sphere_rl.runs import RunFolder, checkpoint

METHOD = """
import numpy as np
from sphere_rl.methods import Method

class Faulty(Method):
    summary, citation = "does what it must not", "Nobody 2026"

"""
SUITE = """
import gymnasium
import numpy as np
import toy_envs
from gymnasium.vector import AutoresetMode, SyncVectorEnv

class Faulty:
    name, summary, tasks, all_tasks, same_spaces, preset = "faulty", "goes wrong", ("one",), ("one",), True, {}

    def make(self, task, num_envs, seed, num_threads):
        made = SyncVectorEnv([lambda: gymnasium.make("toy_envs:Drawing-v0")] * num_envs, autoreset_mode=MODE)
        AFTER(made)
        return made

    def render_env(self, task, seed): ...

SUITES = (Faulty(),)
"""
SILENT = """
def AFTER(made):
    made.metadata = {}
"""
NESTED = """
def AFTER(made):
    space = gymnasium.spaces.Dict(hand=gymnasium.spaces.Discrete(2))
    made.single_action_space = space
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes the plugin ``faulty``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_modules", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield lambda text: (tmp_path / "faulty.py").write_text(text)
    sys.modules.pop("faulty", None)


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (
            'def metrics(self): return {"faulty_size": 1, "kl": 0.0}',
            "task toy_envs:Drawing-v0, iteration 1: metrics of method faulty: 'kl' is not allowed; expected names that "
            "no other column of train.jsonl has, such as faulty_kl",
        ),
        (
            'def metrics(self): return {"steps_per_second": 1}',
            "task toy_envs:Drawing-v0, iteration 1: metrics of method faulty: 'steps_per_second' is not allowed; "
            "expected names that no other column of train.jsonl has, such as faulty_steps_per_second",
        ),
        (
            'def state_dict(self): return {"v": np.float64(1)}',
            "agent.methods.faulty.v is a numpy.float64; allowed in a checkpoint: tensors, numbers, strings, None, and "
            "dicts, lists, tuples and sets of them",
        ),
    ],
)
def test_what_a_method_must_not_give_is_one_line(
    hook: str, message: str, plugin, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin(METHOD + "    " + hook)
    words = ["--plugin", "faulty", "--method", "faulty", "--on-nan", "rollback", "--tasks", "toy_envs:Drawing-v0"]
    assert main(["train", *WORDS, *words, "--out", "run", "--quiet"]) == 3
    assert capsys.readouterr().err == f"sphere: {message}\n"
    folder = RunFolder("run")
    assert folder.status()["error"] == f"OutsideError: {message}"
    assert checkpoint.run_checkpoints(folder) == []


@pytest.mark.parametrize(
    ("mode", "after", "code", "message"),
    [
        ("NEXT_STEP", "AFTER = id", 2, "tasks: 'one' is not allowed; expected a task whose environments are made with"),
        ("DISABLED", "AFTER = id", 2, "autoreset_mode=AutoresetMode.SAME_STEP, not AutoresetMode.DISABLED"),
        ("SAME_STEP", NESTED, 2, "expected a task with a flat Box of actions or discrete ones, not Dict('hand': Discr"),
        (
            "NEXT_STEP",
            SILENT,
            3,
            "rollout step 8 of 16: an episode ended without info['final_obs']: same-step auto",
        ),
    ],
)
def test_what_environments_of_a_suite_lack_is_one_line(
    mode: str, after: str, code: int, message: str, plugin, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin(f"{SUITE}\nMODE = AutoresetMode.{mode}\n{after}")
    words = ["--plugin", "faulty", *WORDS, "--suite", "faulty"]
    assert main(["train", *words, "--out", "run", "--quiet"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    if code == 3:
        assert RunFolder("run").status()["error"].startswith("EnvironmentFault: task one, iteration 1: rollout step 8")


class Sgd(ActorCritic):
    """With an optimiser whose state has other names than Adam's, and a whole number."""

    def make_optimizer(self, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def test_whatever_an_optimiser_keeps_of_a_parameter_is_forgotten() -> None:
    agent = Sgd(config("Drawing"), Spaces(3, 2, discrete=False), seed=0)
    parameters: list[Any] = agent.actor_parameters
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    agent.actor_optimizer.step()
    first, second, *_ = parameters
    state: dict[str, Any] = agent.actor_optimizer.state[first]
    state |= {"step": 5, "scale": 0.5, "on": True, "name": "a", "nothing": None}
    agent.forget(first)
    assert state.pop("momentum_buffer").abs().sum() == 0
    assert state == {"step": 0, "scale": 0.0, "on": True, "name": "a", "nothing": None}
    assert type(state["scale"]) is float
    assert agent.actor_optimizer.state[second]["momentum_buffer"].abs().sum() > 0
