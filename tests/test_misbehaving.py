"""Environments that raise, hang, end the process or give what their spaces do not promise: one line and exit code 3."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import toy_envs
from gymnasium import spaces
from toy_runs import WORDS, config, train

from sphere_rl.cli import main
from sphere_rl.errors import EnvironmentFault
from sphere_rl.learner.rollout import step_success
from sphere_rl.runs import RunFolder
from sphere_rl.suites import make_suite
from sphere_rl.suites.guard import Guarded, call_limit, make_envs

LATE = 5
"""The step at which an environment begins to misbehave."""


class Misbehaves(toy_envs.Toy):
    """Does ``change`` to what it would give, from step `LATE` of the second episode on."""

    kind = ""

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.episodes = 0

    def reset(self, **options: Any) -> Any:
        self.episodes += 1
        found = super().reset(**options)
        return RESETS[self.kind](found) if self.kind in RESETS and self.episodes > 1 else found

    def step(self, action: Any) -> Any:
        found = super().step(action)
        return STEPS[self.kind](found) if self.kind in STEPS and self.steps == LATE else found


def boom(*_: object) -> Any:
    raise ZeroDivisionError("two\nlines")


def replaced(index: int, value: Any) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    return lambda found: (*found[:index], value, *found[index + 1 :])


RESETS: dict[str, Callable[[Any], Any]] = {
    "reset raises": boom,
    "reset exits": lambda found: sys.exit(7),
    "reset shape": replaced(0, np.zeros(4, np.float32)),
}
STEPS: dict[str, Callable[[Any], Any]] = {
    "raises": boom,
    "exits": lambda found: sys.exit(7),
    "long": replaced(0, np.zeros(4, np.float32)),
    "nested": replaced(0, np.zeros((1, 3), np.float32)),
    "none": replaced(0, None),
    "ragged": replaced(0, [[1.0], [1.0, 2.0], 3.0]),
    "text": replaced(0, np.array(["a", "b", "c"])),
    "complex": replaced(0, np.array([1j, 0, 0])),
    "rewards": replaced(1, np.zeros(2)),
    "no reward": replaced(1, None),
    "ends": replaced(2, np.array([True, False])),
    "no end": replaced(3, None),
    "info": replaced(4, None),
    "success": replaced(4, {"success": float("nan")}),
    "four": lambda found: found[:4],
}
MESSAGES = {
    "reset raises": "step 0 of its episode: reset raised ZeroDivisionError: two lines",
    "reset exits": "step 0 of its episode: reset raised SystemExit: 7",
    "reset shape": "step 0 of its episode: the observation has shape (4,), not (3,)",
    "raises": "step raised ZeroDivisionError: two lines",
    "exits": "step raised SystemExit: 7",
    "long": "the observation has shape (4,), not (3,)",
    "nested": "the observation has shape (1, 3), not (3,)",
    "none": "the observation has shape (), not (3,)",
    "ragged": "the observation is no array",
    "text": "the observation is of type <U1, not a real number",
    "complex": "the observation is of type complex128, not a real number",
    "rewards": "the reward has shape (2,), not ()",
    "no reward": "the reward is of type object, not a real number",
    "ends": "terminated has shape (2,), not ()",
    "no end": "truncated is of type object, not a real number",
    "info": "info is a NoneType, not a dict",
    "success": "success is nan, not a number",
    "four": "step raised ValueError: not enough values to unpack (expected 5, got 4)",
}


@pytest.fixture
def environment() -> Iterator[Callable[[type[gymnasium.Env]], str]]:
    """Registers a class for the test's time; no checker of Gymnasium's speaks before this library does."""
    names: list[str] = []

    def register(kind: type[gymnasium.Env]) -> str:
        make: Any = kind
        names.append(f"Misbehaves{len(names)}-v0")
        gymnasium.register(names[-1], entry_point=make, disable_env_checker=True)
        return names[-1]

    yield register
    for name in names:
        del gymnasium.registry[name]


@pytest.mark.parametrize("kind", MESSAGES)
def test_what_an_environment_does_wrong_is_one_line(
    kind: str, environment: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, run = environment(type("Kind", (Misbehaves,), {"kind": kind})), tmp_path / "run"
    assert main(["train", *WORDS, "--tasks", name, "--out", str(run), "--quiet"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    where = f"task {name}, iteration 1: environment 0, "
    step = "" if kind in RESETS else f"step {LATE} of its episode: "
    assert line == f"sphere: {where}{step}{MESSAGES[kind]}"
    status = RunFolder(run).status()
    assert (status["state"], status["error"]) == ("failed", f"EnvironmentFault: {line.removeprefix('sphere: ')}")


def test_the_traceback_is_there_for_who_asks(
    environment: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = environment(type("Kind", (Misbehaves,), {"kind": "raises"}))
    monkeypatch.setenv("SPHERE_DEBUG", "1")
    assert main(["train", *WORDS, "--tasks", name, "--out", str(tmp_path / "run"), "--quiet"]) == 3
    err = capsys.readouterr().err
    assert "in boom" in err  # the line of the environment itself
    assert err.splitlines()[-1].startswith("sphere: task ")


def test_what_is_a_little_unusual_is_right(environment: Any) -> None:
    """Arrays of one number for rewards and ends, and observations of another dtype or of a list."""

    class Unusual(toy_envs.Toy):
        def step(self, action: Any) -> Any:
            _, _, ends, _, info = super().step(action)
            return [1, 2.5, True], np.array([[2.5]]), np.array([ends]), np.int64(0), {**info, "is_success": np.True_}

    envs = make_envs(make_suite("gym"), environment(Unusual), 2, 0, 1, {})
    envs.reset()
    for step in range(1, toy_envs.LENGTH + 1):
        observation, reward, terminated, truncated, info = envs.step(np.zeros((2, 2), np.float32))
        done = step == toy_envs.LENGTH
        assert reward.tolist() == [2.5, 2.5]
        assert terminated.tolist() == [done, done]
        assert not truncated.any()
        seen = info["final_obs"][0] if done else observation[0]
        assert seen.tolist() == [1, 2.5, 1]
        assert (info["final_info"] if done else info)["success"].tolist() == [1.0, 1.0]
    envs.close()


INFOS: dict[str, Any] = {
    "arrays of another length": lambda i: {"path": np.zeros(i)},
    "nothing and numbers": lambda i: {"hit": None if i % 2 else i},
    "texts and numbers": lambda i: {"hit": "wall" if i % 2 else i},
    "names of ours": lambda i: {"final_obs": 1, "final_info": {}, "_success": 3, "_final_obs": "x"},
}


@pytest.mark.parametrize("kind", INFOS)
def test_whatever_else_an_info_holds_is_no_fault(kind: str, environment: Any) -> None:
    """Gymnasium itself cannot put such infos of several environments side by side."""

    class Tells(toy_envs.Toy):
        made = 0

        def __init__(self, render_mode: str | None = None) -> None:
            super().__init__(render_mode)
            Tells.made += 1
            self.number = Tells.made

        def step(self, action: Any) -> Any:
            *found, _ = super().step(action)
            return (*found, INFOS[kind](self.number + self.steps) | {"success": self.steps > 1})

    envs = make_envs(make_suite("gym"), environment(Tells), 3, 0, 1, {})
    envs.reset()
    for step in range(1, toy_envs.LENGTH + 1):
        *_, info = envs.step(np.zeros((3, 2), np.float32))
        done = step == toy_envs.LENGTH
        told = info["final_info"] if done else info
        assert told["success"].tolist() == [float(step > 1)] * 3
        assert told["_success"].tolist() == [True] * 3
        assert ("final_obs" in info) == done
        if done:
            assert [len(last) for last in info["final_obs"]] == [3] * 3
    envs.close()


VECTORS: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    "rewards": (lambda f: [f[0], f[1][:, None], *f[2:]], "gave rewards of shape (2, 1), not (2,)"),
    "one reward": (lambda f: [f[0], 1.0, *f[2:]], "gave rewards of shape (), not (2,)"),
    "texts": (lambda f: [f[0], np.array(["a", "b"]), *f[2:]], "gave rewards of type <U1, not real numbers"),
    "ends": (lambda f: [*f[:2], f[2][:, None], *f[3:]], "gave terminated of shape (2, 1), not (2,)"),
    "info": (lambda f: [*f[:4], None], "gave info that is a NoneType, not a dict"),
    "final info": (
        lambda f: [*f[:4], f[4] | {"final_info": [{}, {}]}],
        "gave info['final_info'] that is a list, not a dict",
    ),
    "success": (lambda f: [*f[:4], {"success": np.ones((2, 1))}], "gave info['success'] of shape (2, 1), not (2,)"),
    "few": (
        lambda f: [*f[:4], {"final_obs": np.zeros((1, 3))}],
        "gave info['final_obs'] that is 1 rows, not an array of 2",
    ),
    "list": (
        lambda f: [*f[:4], {"final_obs": [None, None]}],
        "gave info['final_obs'] that is a list, not an array of 2",
    ),
    "short": (lambda f: [*f[:4], {"final_obs": np.zeros((2, 2))}], "gave info['final_obs'][0] of shape (2,), not (3,)"),
    "four": (lambda f: f[:4], "raised ValueError: not enough values to unpack (expected 5, got 4)"),
}


class Vector(gymnasium.vector.SyncVectorEnv):
    """Two environments of a suite of one's own, whose third step ends both episodes."""

    change: Callable[[list[Any]], Any] = list

    def __init__(self) -> None:
        make = [lambda: gymnasium.make("Pendulum-v1", max_episode_steps=3)] * 2
        super().__init__(make, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)

    def step(self, actions: Any) -> Any:
        found: list[Any] = list(super().step(actions))
        return type(self).change(found) if found[3].any() else found


@pytest.mark.parametrize("kind", VECTORS)
def test_what_a_vector_environment_does_wrong_is_one_line(kind: str) -> None:
    change, message = VECTORS[kind]
    envs = Guarded(type("Wrong", (Vector,), {"change": staticmethod(change)})())
    envs.reset()
    for _ in range(2):
        envs.step(np.zeros((2, 1), np.float32))
    with pytest.raises(EnvironmentFault) as caught:
        envs.step(np.zeros((2, 1), np.float32))
    assert str(caught.value).removeprefix("the environments: ").startswith(f"step {message}")
    envs.close()


def test_what_is_a_little_unusual_of_a_vector_environment_is_right() -> None:
    """Lists and whole numbers for rewards and ends; truth values of NumPy that only some environments tell."""

    def unusual(found: list[Any]) -> list[Any]:
        observation, reward, ends, cut, info = found
        told = {"success": np.array([np.True_, None], dtype=object), "_success": np.array([True, False])}
        return [observation, reward.tolist(), ends.astype(float), cut.astype(int), info | {"final_info": told}]

    envs = Guarded(type("Unusual", (Vector,), {"change": staticmethod(unusual)})())
    envs.reset()
    *_, last = (envs.step(np.zeros((2, 1), np.float32)) for _ in range(3))
    _, reward, terminated, truncated, info = last
    assert reward.shape == (2,)
    assert (terminated.dtype, truncated.tolist()) == (bool, [True, True])
    success, told = step_success(terminated | truncated, info)
    assert (success.tolist(), told.tolist()) == ([True, False], [True, False])
    envs.close()


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint8, np.int8])
def test_observations_of_every_kind_of_number_train(dtype: Any, environment: Any, tmp_path: Path) -> None:
    class Typed(toy_envs.Toy):
        observation_space = spaces.Box(0, 100, (3,), dtype)

        def observe(self) -> Any:
            return self.np_random.integers(0, 100, 3).astype(dtype)

    folder = train(config("x", tasks=[environment(Typed)], normalize_observations=True), tmp_path / "run")
    assert folder.status()["state"] == "finished"


def test_a_fault_in_an_evaluation_names_it(environment: Any, tmp_path: Path, capsys: Any) -> None:
    class Later(Misbehaves):
        kind = "raises"
        made = 0

        def __init__(self, render_mode: str | None = None) -> None:
            super().__init__(render_mode)
            type(self).made += 1
            self.kind = "raises" if self.made > 8 else ""  # checks and training need eight

    name = environment(Later)
    assert main(["train", *WORDS, "--tasks", name, "--out", str(tmp_path / "run"), "--quiet"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sphere: task {name}, final evaluation, environment ")
    assert line.endswith("step 5 of its episode: step raised ZeroDivisionError: two lines")


def test_an_environment_that_cannot_be_closed_spoils_no_run(environment: Any, tmp_path: Path, capsys: Any) -> None:
    class Stuck(toy_envs.Toy):
        def close(self) -> None:
            raise OSError("in use")

    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gymnasium.vector.SyncVectorEnv.close_extras", lambda *_, **__: Stuck().close())
        assert main(["train", *WORDS, "--tasks", environment(toy_envs.Drawing), "--out", str(run), "--quiet"]) == 0
    assert "sphere: the environments: close raised OSError: in use\n" in capsys.readouterr().err
    assert RunFolder(run).status()["state"] == "finished"


# Hanging


@pytest.mark.parametrize("what", ["step", "reset", "__init__"])
def test_an_environment_that_hangs_is_ended(what: str, environment: Any, tmp_path: Path, capsys: Any) -> None:
    class Hangs(toy_envs.Toy):
        def step(self, action: Any) -> Any:
            if what == "step":
                time.sleep(60)
            return super().step(action)

        def reset(self, **options: Any) -> Any:
            if what == "reset":
                while True:
                    pass
            return super().reset(**options)

        def __init__(self, render_mode: str | None = None) -> None:
            super().__init__(render_mode)
            if what == "__init__":
                time.sleep(60)

    words = ["--tasks", environment(Hangs), "--out", str(tmp_path / "run"), "--quiet", "--env-timeout", "0.5"]
    began = time.monotonic()
    assert main(["train", *WORDS, *words]) == 3
    assert time.monotonic() - began < 30
    (line,) = capsys.readouterr().err.splitlines()
    doing = "making them" if what == "__init__" else what
    assert line.endswith(f"the environments: {doing} took longer than 0.5 s (env_timeout)")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    if what != "__init__":
        assert RunFolder(tmp_path / "run").status()["state"] == "failed"


def test_an_environment_that_takes_its_time_is_left_alone(environment: Any) -> None:
    class Slow(toy_envs.Toy):
        def step(self, action: Any) -> Any:
            time.sleep(0.1)
            return super().step(action)

    with call_limit(0.5):
        envs = make_envs(make_suite("gym"), environment(Slow), 1, 0, 1, {})
    envs.reset()
    for _ in range(7):
        envs.step(np.zeros((1, 2), np.float32))
    with call_limit(0.2):
        three = make_envs(make_suite("gym"), environment(Slow), 3, 0, 1, {})
    three.reset()
    with pytest.raises(EnvironmentFault, match=r"step took longer than 0\.2 s"):
        three.step(np.zeros((3, 2), np.float32))


COMPILED = """
import hashlib
import gymnasium, toy_envs
class Hangs(toy_envs.Toy):
    def step(self, action):
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # compiled code that is at it for minutes
gymnasium.register("Hangs-v0", entry_point=Hangs)
from sphere_rl.suites import guard, make_suite
import numpy as np
with guard.call_limit(0.5):
    envs = guard.make_envs(make_suite("gym"), "Hangs-v0", 1, 0, 1, {})
envs.reset()
envs.step(np.zeros((1, 2), np.float32))
"""


def test_a_hang_that_hears_no_signal_ends_the_process() -> None:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command, own = [sys.executable, "-c", COMPILED], os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=own, check=False)
    assert (done.returncode, done.stderr) == (
        3,
        "sphere: the environments: step took longer than 0.5 s (env_timeout)\n",
    )
