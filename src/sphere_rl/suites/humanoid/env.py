"""Many H1 robots in one process: physics on a thread pool, everything else vectorised over the batch."""

# pyright: reportAttributeAccessIssue=false
# (MuJoCo's native members have no type stubs)

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import gymnasium
import mujoco
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Float, Int
from mujoco.rollout import Rollout

from sphere_rl.errors import ConfigError
from sphere_rl.suites.humanoid.foot import read_foot_mesh
from sphere_rl.suites.humanoid.model import ACTION_DIM, SUBSTEPS, TIMESTEP, compile_model
from sphere_rl.suites.humanoid.picture import Camera
from sphere_rl.suites.humanoid.tasks import EPISODE_STEPS, TASKS
from sphere_rl.suites.humanoid.terms import Readings
from sphere_rl.suites.picture import Picture

RESET_NOISE = 0.01
FPS = round(1 / (TIMESTEP * SUBSTEPS))


class HumanoidVectorEnv(VectorEnv):
    """B robots on one task, in same-step autoreset mode.

    Observations [B, 51] are qpos (26) and qvel (25), raw float64 (longer where a task has free objects or a goal).
    Actions [B, 19] in [-1, 1] map linearly onto the joints' ranges; what lies outside is clipped. A step is a pure
    function of state and action, the constraint solver starting cold: threads, neighbours in the batch and the past
    leave no trace. Env i of seed s draws from ``SeedSequence([s, i])``; its stream continues over resets.

    `controls` [B, substeps, J] is what the servos were told in the last step, in radians.
    `foot_mesh` is a mesh file whose hull the feet collide as, instead of the built-in one: see `read_foot_mesh`.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_fps": FPS}  # noqa: RUF012

    def __init__(
        self,
        task: str,
        num_envs: int,
        seed: int = 0,
        num_threads: int = 1,
        foot_mesh: str | os.PathLike[str] | None = None,
    ) -> None:
        if task not in TASKS:
            raise ConfigError("tasks", task, f"tasks of h1: {', '.join(TASKS)}")
        for field, value in (("num_envs", num_envs), ("num_threads", num_threads)):
            if value < 1:
                raise ConfigError(field, value, "1 or more")
        self.task = TASKS[task]
        self.model = compile_model(self.task.scene, None if foot_mesh is None else read_foot_mesh(foot_mesh))
        self.num_envs = num_envs
        self._generators = _generators(seed, num_envs)
        self._allocate(num_threads)
        self.single_action_space = Box(-1.0, 1.0, (ACTION_DIM,), np.float32)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._restart(np.arange(num_envs))
        self.single_observation_space = Box(-np.inf, np.inf, self._observe().shape[1:], np.float64)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._generators = _generators(seed, num_envs)

    def _allocate(self, num_threads: int) -> None:
        threads = num_threads if num_threads > 1 else 0  # with 0 the calling thread does the work
        self._rollout = Rollout(nthread=threads)
        self._data = [mujoco.MjData(self.model) for _ in range(max(threads, 1))]
        self._models = [self.model] * self.num_envs
        self._control_low, self._control_high = self.model.actuator_ctrlrange.T
        self._sensors, self._forces = _sensor_columns(self.model)
        width = mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_FULLPHYSICS.value)
        self._state = np.zeros((self.num_envs, width))  # time, qpos, qvel
        self._qpos = self._state[:, 1 : 1 + self.model.nq]
        self._qvel = self._state[:, 1 + self.model.nq :]
        self._states = np.zeros((self.num_envs, SUBSTEPS, width))
        self._measured = np.zeros((self.num_envs, SUBSTEPS, self.model.nsensordata))
        self.controls = np.zeros((self.num_envs, SUBSTEPS, ACTION_DIM))
        self._memory = np.stack([self.task.draw(g, self.task.start()) for g in self._generators])
        self._steps = np.zeros(self.num_envs, dtype=np.int64)
        self._returns = np.zeros(self.num_envs)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float[np.ndarray, "B D"], dict[str, Any]]:
        """Start an episode in every env; a seed restarts the random streams (a sequence: one seed for each env)."""
        if seed is not None:
            self._generators = _generators(seed, self.num_envs)
        self._restart(np.arange(self.num_envs))
        return self._observe(), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[Float[np.ndarray, "B D"], Float[np.ndarray, "B"], np.ndarray, np.ndarray, dict[str, Any]]:
        """Advance 0.02 s. Rewards, flags and info belong to this step; ended envs already show their next episode.

        info: the reward's terms [B], `success` [B] (1 once the return so far reaches the bar), `episode_return`,
        `episode_length`; where an episode ended, `final_obs` [B, D] with its mask `_final_obs`, and `final_info`.
        A step that both terminates and is the thousandth counts as terminated.
        """
        self.simulate(np.asarray(actions, dtype=np.float64))
        if self.task.advance is not None:
            self._memory = self.task.advance(self.readings())
        readings = self.readings()
        terms = self.task.reward(readings)
        reward = terms.pop("reward")
        terminated = self.task.terminated(readings)
        self._steps += 1
        self._returns += reward
        truncated = (self._steps >= EPISODE_STEPS) & ~terminated
        info: dict[str, Any] = {
            **terms,
            "success": (self._returns >= self.task.success_bar).astype(np.float64),
            "episode_return": self._returns.copy(),
            "episode_length": self._steps.copy(),
        }
        done = terminated | truncated
        if done.any():
            info |= {"final_obs": self._observe(), "_final_obs": done, "final_info": dict(info), "_final_info": done}
            self._restart(np.flatnonzero(done))
        return self._observe(), reward, terminated, truncated, info

    def place(self, qpos: Float[np.ndarray, "B Q"], qvel: Float[np.ndarray, "B V"]) -> Float[np.ndarray, "B D"]:
        """Put every robot into a given position and velocity, at the start of an episode; returns the observations."""
        self._qpos[:], self._qvel[:] = qpos, qvel
        self._begin(np.arange(self.num_envs))
        return self._observe()

    def get_state(self) -> dict[str, Any]:
        """Everything the future depends on, as tensors and plain numbers."""
        streams = [generator.bit_generator.state for generator in self._generators]
        return {"streams": streams} | {
            name: torch.from_numpy(array.copy()) for name, array in self._episode_arrays().items()
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from what `get_state` gave, bitwise."""
        for name, array in self._episode_arrays().items():
            array[:] = state[name].numpy()
        for generator, stream in zip(self._generators, state["streams"], strict=True):
            generator.bit_generator.state = stream

    def _episode_arrays(self) -> dict[str, np.ndarray]:
        return {"state": self._state, "memory": self._memory, "steps": self._steps, "returns": self._returns}

    def readings(self) -> Readings:
        """What the task sees now."""
        last = self._measured[:, -1]
        sensors = {name: last[:, columns] for name, columns in self._sensors.items()}
        return Readings(self._qpos, self._qvel, last[:, self._forces], sensors, self._memory)

    def close_extras(self, **kwargs: Any) -> None:
        """Stop the threads, if there are any yet."""
        if hasattr(self, "_rollout"):
            self._rollout.close()

    def simulate(self, actions: Float[np.ndarray, "B J"]) -> None:
        """The physics of a step alone: what the servos are told, in `controls`, and where the bodies are after it."""
        if actions.shape != self.action_space.shape:
            raise ValueError(f"actions: shape {actions.shape} is not {self.action_space.shape}")
        if not np.isfinite(actions).all():
            raise ValueError(f"actions: not finite in env {np.argwhere(~np.isfinite(actions))[0][0]}")
        share = (np.clip(actions, -1.0, 1.0) + 1) / 2
        self.controls[:] = (self._control_low + share * (self._control_high - self._control_low))[:, None]
        self._rollout.rollout(
            self._models,
            self._data,
            self._state,
            self.controls,
            skip_checks=True,
            nstep=SUBSTEPS,
            state=self._states,
            sensordata=self._measured,
        )
        self._state[:] = self._states[:, -1]

    def _restart(self, envs: Int[np.ndarray, "K"]) -> None:
        """A new episode with reset noise on every entry of qpos."""
        for env in envs:
            generator = self._generators[env]
            qpos = self.task.start()
            qpos += generator.uniform(-RESET_NOISE, RESET_NOISE, len(qpos))
            self._memory[env] = self.task.draw(generator, qpos)
            self._qpos[env] = qpos
        self._qvel[envs] = 0.0
        self._begin(envs)

    def _begin(self, envs: Int[np.ndarray, "K"]) -> None:
        self._state[envs, 0] = 0.0
        self._steps[envs] = 0
        self._returns[envs] = 0.0
        if self.task.observe is None:
            return
        data = self._data[0]
        for env in envs:  # such observations come from sensors, so they need a forward pass
            data.qpos[:], data.qvel[:] = self._qpos[env], self._qvel[env]
            mujoco.mj_forward(self.model, data)
            self._measured[env, -1] = data.sensordata

    def _observe(self) -> Float[np.ndarray, "B D"]:
        state = self._state[:, 1:].copy()
        if self.task.observe is None:
            return state
        return np.concatenate([state, self.task.observe(self.readings())], axis=1)


class HumanoidEnv(gymnasium.Env):
    """One robot with pictures: a vector env of one, without autoreset."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012

    def __init__(
        self,
        task: str,
        seed: int = 0,
        foot_mesh: str | os.PathLike[str] | None = None,
    ) -> None:
        self._env = HumanoidVectorEnv(task, num_envs=1, seed=seed, foot_mesh=foot_mesh)
        self.observation_space = self._env.single_observation_space
        self.action_space = self._env.single_action_space
        self.render_mode = "rgb_array"
        self.spec = EnvSpec(task, max_episode_steps=EPISODE_STEPS)
        self._picture = Picture()
        self._camera: Camera | None = None
        self._qpos = self._env.task.start()
        self._running = False

    def draw_as(self, picture: Picture) -> None:
        """Choose the frames; before the first one."""
        self._picture = picture

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float[np.ndarray, "D"], dict[str, Any]]:
        """Start an episode."""
        super().reset(seed=seed)
        observation, info = self._env.reset(seed=seed)
        self._running = True
        self._qpos = observation[0, : self._env.model.nq]
        return observation[0], info

    def step(self, action: np.ndarray) -> tuple[Float[np.ndarray, "D"], float, bool, bool, dict[str, Any]]:
        """Advance 0.02 s; after an episode's end, reset first."""
        if not self._running:
            raise ValueError("step: no episode is running; call reset first")
        observation, reward, terminated, truncated, info = self._env.step(np.asarray(action)[None])
        self._running = not (terminated[0] or truncated[0])
        last = observation[0] if self._running else info["final_obs"][0]
        self._qpos = last[: self._env.model.nq]
        own = {key: value[0] for key, value in info.items() if "final" not in key}
        return last, float(reward[0]), bool(terminated[0]), bool(truncated[0]), own

    def render(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The robot seen from its side, uint8 [height, width, 3].

        Raises:
            ConfigError: no OpenGL is available.
        """
        if self._camera is None:
            self._camera = Camera(self._env.model, self._picture)
        return self._camera.picture(self._qpos)

    def close(self) -> None:
        """Free the picture's buffers and the threads."""
        if self._camera is not None:
            self._camera.close()
        self._camera = None
        self._env.close()


def _generators(seed: int | Sequence[int | None], num_envs: int) -> list[np.random.Generator]:
    if isinstance(seed, int | np.integer):
        if seed < 0:
            raise ConfigError("seed", seed, "0 or more")
        return [np.random.default_rng(np.random.SeedSequence([int(seed), env])) for env in range(num_envs)]
    if len(seed) != num_envs:
        raise ValueError(f"seed: {len(seed)} seeds for {num_envs} envs")
    return [np.random.default_rng(None if s is None else np.random.SeedSequence([s, 0])) for s in seed]


def _sensor_columns(model: mujoco.MjModel) -> tuple[dict[str, slice], slice]:
    """Columns of the sensor array by name, those of the actuator forces together."""
    columns = {}
    for index in range(model.nsensor):
        start = model.sensor_adr[index]
        columns[model.sensor(index).name] = slice(start, start + model.sensor_dim[index])
    forces = [columns.pop(name) for name in list(columns) if name.startswith("force_")]
    return columns, slice(forces[0].start, forces[-1].stop)
