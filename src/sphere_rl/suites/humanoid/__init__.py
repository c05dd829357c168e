"""HumanoidBench's H1 locomotion tasks, native and batched: stand, walk, pole, slide, run, and nine more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sphere_rl.suites import check_task
from sphere_rl.suites.humanoid.tasks import SEQUENCE, TASKS

if TYPE_CHECKING:
    from sphere_rl.suites.humanoid.env import HumanoidEnv, HumanoidVectorEnv


class Humanoid:
    """The Unitree H1 with position control: 19 actions, 0.02 s a step, 1000-step episodes."""

    name = "h1"
    summary = "HumanoidBench's H1 tasks stand, walk, pole, slide, run, 10M steps each"
    tasks: tuple[str, ...] = SEQUENCE
    all_tasks: tuple[str, ...] = tuple(TASKS)
    same_spaces = False
    preset: Mapping[str, Any] = {
        "steps_per_task": 10_000_000,
        "num_envs": 128,
        "num_steps": 16,
        "minibatch_size": 64,
        "learning_rate_schedule": "kl",
        "normalize_observations": True,
        "sphere": {"mode": "grad", "rho": 0.001},
    }

    def make(
        self, task: str, num_envs: int, seed: int, num_threads: int, *, foot_mesh: str | None = None
    ) -> HumanoidVectorEnv:
        """Make ``num_envs`` robots; `info["success"]` says whether the return so far has reached the task's bar.

        Args:
            task: one of `all_tasks`.
            num_envs: how many.
            seed: of all their random streams.
            num_threads: for the physics.
            foot_mesh: a file (binary STL or OBJ, metres, ankle's frame) whose convex hull the feet collide as.

        Raises:
            ConfigError: no such task; `foot_mesh` cannot be read or is no mesh of a foot.
        """
        check_task(self, task)
        from sphere_rl.suites.humanoid.env import HumanoidVectorEnv  # loads MuJoCo: only when an environment is made

        return HumanoidVectorEnv(task, num_envs, seed, num_threads, foot_mesh)

    def render_env(self, task: str, seed: int, *, foot_mesh: str | None = None) -> HumanoidEnv:
        """Make one robot that draws its frames; `foot_mesh` as in `make`."""
        check_task(self, task)
        from sphere_rl.suites.humanoid.env import HumanoidEnv

        return HumanoidEnv(task, seed, foot_mesh=foot_mesh)


SUITES = (Humanoid(),)
