"""MetaWorld v3 through EnvPool's C++ environments: CW10 and every other task by name.

Observations are the 39 goal-observable coordinates, actions 4 numbers in [-1, 1], episodes 500 steps, positions
randomised at each reset. Sources: Yu et al. 2020 (MetaWorld), Wołczyk et al. 2021 (Continual World), EnvPool 1.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from sphere_rl.errors import MissingExtraError
from sphere_rl.suites import check_task
from sphere_rl.suites.remade import make_pool

CW10 = (
    "hammer",
    "push-wall",
    "faucet-close",
    "push-back",
    "stick-pull",
    "handle-press-side",
    "push",
    "shelf-place",
    "window-close",
    "peg-unplug-side",
)  # fmt: skip

ALL_TASKS: tuple[str, ...] = tuple(
    """assembly basketball bin-picking box-close button-press button-press-topdown button-press-topdown-wall
    button-press-wall coffee-button coffee-pull coffee-push dial-turn disassemble door-close door-lock door-open
    door-unlock drawer-close drawer-open faucet-close faucet-open hammer hand-insert handle-press handle-press-side
    handle-pull handle-pull-side lever-pull peg-insert-side peg-unplug-side pick-out-of-hole pick-place
    pick-place-wall plate-slide plate-slide-back plate-slide-back-side plate-slide-side push push-back push-wall
    reach reach-wall shelf-place soccer stick-pull stick-push sweep sweep-into window-close window-open""".split()
)

GOALS_WANDER = ("hammer", "shelf-place")
"""Tasks whose goal EnvPool (1.2.5) moves by 0.85 m at each reset: it takes the goal's place from a marker in the box or
on the shelf, and then puts the marker there in coordinates of the world, which the next reset takes for the box's."""


def environment_id(task: str) -> str:
    """EnvPool's name of a task: ``push-wall`` becomes ``MetaWorld/PushWall-v3``."""
    return f"MetaWorld/{''.join(word.capitalize() for word in task.split('-'))}-v3"


class SameStepEnvPool(VectorEnv):
    """An EnvPool environment in same-step autoreset mode.

    EnvPool itself spends the step after an episode's end on the reset: it ignores that step's action and its reward
    belongs to nothing. Here the ended environments are reset at once, in the same call: no such transition exists.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.num_envs = pool.config["num_envs"]
        self.single_observation_space = pool.observation_space
        self.single_action_space = pool.action_space
        self.observation_space = gymnasium.vector.utils.batch_space(pool.observation_space, self.num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(pool.action_space, self.num_envs)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset every environment. The seed is the constructor's: EnvPool cannot be reseeded."""
        if seed is not None:
            raise ValueError(f"seed: {seed!r} cannot be set at reset; EnvPool takes it when it is made")
        observation, info = self._pool.reset()
        return observation, _columns(info)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step every environment; reset those whose episode ended."""
        observation, reward, terminated, truncated, raw = self._pool.step(actions)
        info = _columns(raw)
        done = terminated | truncated
        if done.any():
            final, ended = observation, np.flatnonzero(done).astype(np.int32)
            observation = observation.copy()
            observation[ended] = self._pool.reset(ended)[0]
            info |= {"final_obs": final, "_final_obs": done, "final_info": dict(info), "_final_info": done}
        return observation, reward, terminated, truncated, info

    def close_extras(self, **kwargs: Any) -> None:
        """Stop EnvPool's threads, and free its simulations, which stay as long as its object does."""
        self._pool.close()
        del self._pool


def _columns(info: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in info.items() if key not in ("players", "env_id", "task_id")}


class MetaWorld:
    """A sequence of MetaWorld v3 tasks."""

    all_tasks: tuple[str, ...] = ALL_TASKS
    same_spaces = True

    def __init__(self, name: str, summary: str, tasks: tuple[str, ...]) -> None:
        self.name, self.summary, self.tasks = name, summary, tasks
        self.preset: Mapping[str, Any] = {}  # the defaults of TrainConfig are CW10's

    def make(self, task: str, num_envs: int, seed: int, num_threads: int) -> VectorEnv:
        """Make goal-observable environments; ``info["success"]`` is MetaWorld's flag of the step.

        EnvPool gives environment i the seed + i, so seeds that differ by less than ``num_envs`` share environments.
        """
        return SameStepEnvPool(self._pool(task, seed, num_envs=num_envs, num_threads=num_threads))

    def render_env(self, task: str, seed: int) -> gymnasium.Env:
        """Make one environment that draws its frames."""
        check_task(self, task)
        from sphere_rl.suites.metaworld_view import MetaWorldView

        return MetaWorldView(environment_id(task), seed, task in GOALS_WANDER)

    def _pool(self, task: str, seed: int, **options: Any) -> Any:
        check_task(self, task)
        from sphere_rl.suites.metaworld_view import load_egl

        # EnvPool's MuJoCo looks for OpenGL when it is loaded, and may be asked to draw later in the process.
        with suppress(MissingExtraError):
            load_egl()
        return make_pool(environment_id(task), seed, task in GOALS_WANDER, **options)


SUITES = (
    MetaWorld("cw10", "Continual World's ten MetaWorld v3 tasks, 1M steps each", CW10),
    MetaWorld("metaworld", "all fifty MetaWorld v3 tasks, in alphabetical order", ALL_TASKS),
)
