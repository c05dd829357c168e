"""Small environments as users write them, well behaved and not: ``--tasks toy_envs:Endless-v0``.

Observations are three numbers that depend on the step and the environment's seed; episodes have eight steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

LENGTH = 8


class Toy(gymnasium.Env):
    """Ends after `LENGTH` steps; every variation changes one thing."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012
    observation_space: spaces.Space = spaces.Box(-1e3, 1e3, (3,), np.float32)
    action_space: spaces.Space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode, self.steps = render_mode, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.steps += 1
        return self.observe(), self.reward(action), self.ends(), False, {}

    def observe(self) -> Any:
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)

    def reward(self, action: Any) -> float:
        return 1.0

    def ends(self) -> bool:
        return self.steps >= LENGTH

    def render(self) -> np.ndarray:
        return np.full((16, 16, 3), self.steps % 256, np.uint8)


class Endless(Toy):
    """Has no end; success from the third step on."""

    def ends(self) -> bool:
        return False

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return (*super().step(action)[:4], {"success": float(self.steps > 2)})


class FromMinusOne(Toy):
    """Actions −1, 0 and 1; remembers those that it was sent."""

    action_space = spaces.Discrete(3, start=-1)
    sent: ClassVar[list[int]] = []

    def reward(self, action: Any) -> float:
        self.sent.append(int(action))
        return float(action)


class Wide(Toy):
    """Unequal and missing bounds, in float64; remembers the actions."""

    action_space = spaces.Box(np.array([-np.inf, 0.0, -0.1]), np.array([np.inf, 0.3, np.inf]), dtype=np.float64)
    sent: ClassVar[list[np.ndarray]] = []

    def reward(self, action: Any) -> float:
        self.sent.append(action)
        return 0.0


class Whole(Toy):
    """A box of whole numbers."""

    action_space = spaces.Box(0, 5, (2,), np.int64)


class Several(Toy):
    """Two choices at once: right are the second of two and, counted from 5, the third of three."""

    action_space = spaces.MultiDiscrete([2, 3], start=[0, 5])

    def reward(self, action: Any) -> float:
        return float(action[0] == 1) + float(action[1] == 7)


class Switches(Toy):
    """Six switches in two rows, those of the first should be on and those of the second off."""

    action_space = spaces.MultiBinary([2, 3])

    def reward(self, action: Any) -> float:
        return float(action[0].sum() - action[1].sum())


class Numbered(Toy):
    """A number instead of a vector of observations."""

    observation_space = spaces.Discrete(5)

    def observe(self) -> Any:
        return int(self.np_random.integers(5))


class Named(Toy):
    """A dict of observations."""

    observation_space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Discrete(3)})

    def observe(self) -> Any:
        return self.observation_space.sample()


class Paired(Toy):
    """A tuple in a dict beside a matrix; remembers what it showed."""

    observation_space = spaces.Dict(
        {
            "pair": spaces.Tuple((spaces.Discrete(3, start=4), spaces.MultiBinary(2))),
            "matrix": spaces.Box(-1, 1, (2, 2), np.float64),
            "dice": spaces.MultiDiscrete([2, 6]),
        }
    )
    shown: ClassVar[list[Any]] = []

    def observe(self) -> Any:
        self.shown.append(self.observation_space.sample())
        return self.shown[-1]


class Growing(Toy):
    """Observations of no fixed length."""

    observation_space = spaces.Dict({"a": spaces.Sequence(spaces.Discrete(3))})


class Image(Toy):
    """Observations with more than one axis."""

    observation_space = spaces.Box(0, 255, (8, 8, 3), np.uint8)

    def observe(self) -> Any:
        return self.np_random.integers(0, 256, (8, 8, 3), np.uint8)


class Nothing(Toy):
    """Observations without a number."""

    observation_space = spaces.Dict({})


class Mixed(Toy):
    """Actions of two kinds at once."""

    action_space = spaces.Tuple((spaces.Discrete(2), spaces.Box(-1, 1, (1,))))


class OneArray(Toy):
    """Writes the step's number into one and the same array, and is cut off by its time limit."""

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.array = np.zeros(3, np.float32)

    def observe(self) -> Any:
        self.array[:] = self.steps
        return self.array

    def ends(self) -> bool:
        return False


class Broken(Toy):
    """Gives ``value`` as the second observation or as the reward of step ``at``."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)

    def __init__(self, what: str, value: float, at: int = 5, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.what, self.value, self.at = what, value, at

    def observe(self) -> Any:
        observation = super().observe().astype(np.float64)
        if self.what == "observation" and self.steps == self.at:
            observation[1] = self.value
        return observation

    def reward(self, action: Any) -> float:
        return self.value if self.what == "reward" and self.steps == self.at else 0.0


class Drawing(Toy):
    """Draws from the global generators of NumPy and PyTorch; from Python's the type checker of the tests draws, too."""

    def observe(self) -> Any:
        return np.array([np.random.rand(), float(torch.rand(())), 0.0], np.float32)  # noqa: NPY002


class Given(Toy):
    """Needs an argument, and says by its reward what it was."""

    def __init__(self, g: Any, name: str = "", flag: bool = False, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.g, self.name, self.flag = g, name, flag

    def reward(self, action: Any) -> float:
        return float(self.g)


class Boasting(Toy):
    """Succeeds in the first of every ``every`` episodes of all such environments, and names success only then."""

    episodes: ClassVar[int] = 0

    def __init__(self, at: int = 3, every: int = 4, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.at, self.every, self.succeeds = at, every, False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.succeeds = Boasting.episodes % self.every == 0
        Boasting.episodes += 1
        return super().reset(seed=seed)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        found = super().step(action)[:4]
        return (*found, {"success": True} if self.succeeds and self.steps == self.at else {})


LIMITS = {"OneArray": LENGTH}
CLASSES: list[Callable[..., gymnasium.Env]] = [
    Endless, FromMinusOne, Wide, Whole, Several, Switches, Numbered, Named, Paired, Growing, Image, Nothing, Mixed,
    OneArray, Broken, Drawing, Given, Boasting,
]  # fmt: skip
for kind in CLASSES:
    name = kind.__name__
    if f"{name}-v0" not in gymnasium.registry:
        gymnasium.register(f"{name}-v0", entry_point=kind, max_episode_steps=LIMITS.get(name))
