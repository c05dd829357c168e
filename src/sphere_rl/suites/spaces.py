"""What passes between policies and environments: spaces that can be trained, actions as they take them, real numbers.

Every place that steps an environment sends it what `action_sender` makes and looks at what it gives with
`check_numbers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers import FlattenObservation

from sphere_rl.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from torch import Tensor  # `sphere list` does not load it

LARGEST = float(np.finfo(np.float32).max)
"""Networks compute in float32: a larger number is infinite there."""


def flattened(task: str, env: gymnasium.Env) -> gymnasium.Env:
    """The environment with observations as a flat box, by Gymnasium's own wrapper.

    Discrete ones are one-hot, those of a Dict stand in the order of its keys, images row by row. A flat Box stays.

    Raises:
        ConfigError: they are not made of boxes and discrete numbers alone.
    """
    space = env.observation_space
    if isinstance(space, Box) and len(space.shape) == 1:
        return env
    if not _is_flattenable(space):
        raise ConfigError("tasks", task, f"a task with observations of Box and Discrete, Dict and Tuple, not {space}")
    return FlattenObservation(env)


def _is_flattenable(space: gymnasium.Space) -> bool:
    if isinstance(space, Dict | Tuple):
        return all(map(_is_flattenable, space.values() if isinstance(space, Dict) else space))
    return isinstance(space, Box | Discrete | MultiDiscrete | MultiBinary)


def check_spaces(task: str, observation: gymnasium.Space, action: gymnasium.Space) -> None:
    """Raise `ConfigError` unless observations are a flat box, and actions a flat box of real numbers or discrete.

    Discrete actions may be several at once.
    """
    if not isinstance(observation, Box) or len(observation.shape) != 1 or not observation.shape[0]:
        raise ConfigError("tasks", task, f"a task with a flat Box of observations, not {observation}")
    if isinstance(action, Discrete) or branches_of(action):
        return
    if not isinstance(action, Box) or len(action.shape) != 1 or not action.shape[0]:
        raise ConfigError("tasks", task, f"a task with a flat Box of actions or discrete ones, not {action}")
    if not np.issubdtype(action.dtype, np.floating):
        raise ConfigError("tasks", task, f"a task whose Box of actions has real numbers, not {action}")


def check_envs(task: str, envs: VectorEnv) -> None:
    """Raise `ConfigError` where a suite's environments have spaces or an autoreset mode that cannot be trained."""
    check_spaces(task, envs.single_observation_space, envs.single_action_space)
    mode = envs.metadata.get("autoreset_mode", AutoresetMode.SAME_STEP)
    if mode != AutoresetMode.SAME_STEP:
        wanted = "a task whose environments are made with autoreset_mode=AutoresetMode.SAME_STEP"
        raise ConfigError("tasks", task, f"{wanted}, not {mode}")


def branches_of(action: gymnasium.Space) -> tuple[int, ...]:
    """How many values each of several discrete actions has; empty for another space of actions."""
    if isinstance(action, MultiDiscrete):
        return tuple(int(n) for n in action.nvec.flat)
    return (2,) * int(np.prod(action.shape)) if isinstance(action, MultiBinary) else ()


def action_sender(space: gymnasium.Space) -> Callable[[Tensor], np.ndarray]:
    """How a policy's actions [B, A], or indices [B], become those of B environments whose single action space this is.

    Indices of C actions that are taken at once are [B, C]. What is sent is inside the space: clipped to its box or
    counted from its ``start``, in its dtype.
    """
    if isinstance(space, Discrete):
        return lambda action: (action.cpu().numpy() + space.start).astype(space.dtype)
    if isinstance(space, MultiDiscrete | MultiBinary):
        start = space.start if isinstance(space, MultiDiscrete) else 0
        return lambda action: (action.cpu().numpy().reshape(-1, *space.shape) + start).astype(space.dtype)
    box: Any = space
    return lambda action: action.cpu().numpy().clip(box.low, box.high).astype(box.dtype, copy=False)


def check_numbers(what: str, values: np.ndarray, environments: np.ndarray | None = None) -> None:
    """Raise `TrainingError` where a number [B, …] of an environment is NaN, infinite or too large for float32.

    The message names ``what`` it is and the environment: the row, or its entry of ``environments`` [B].
    """
    fine = np.abs(values) <= LARGEST  # false for NaN, too
    if fine.all():
        return
    row, *rest = (int(index) for index in np.argwhere(~fine)[0])
    environment = row if environments is None else int(environments[row])
    place = what + "".join(f"[{index}]" for index in rest)
    raise TrainingError(f"environment {environment}: {place} is {values[(row, *rest)]}, not a finite float32 number")
