"""Running scales of observations and rewards, frozen while a rollout is collected."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray

EPSILON = 1e-8
"""Added to a variance before its root is taken."""


class RunningMoments:
    """Mean and variance of all rows seen, float64, merged batch by batch with Chan's parallel rule."""

    def __init__(self, *shape: int) -> None:
        self.mean, self.var, self.count = np.zeros(shape), np.ones(shape), 0.0

    def update(self, rows: ndarray) -> None:
        """Merge a batch [N, …] into the statistics."""
        count, mean, var = len(rows), rows.mean(0), rows.var(0)
        total, delta = self.count + count, mean - self.mean
        second_moment = self.var * self.count + var * count + delta**2 * self.count * count / total
        self.mean, self.var, self.count = self.mean + delta * count / total, second_moment / total, total

    def state_dict(self) -> dict[str, Any]:
        """Statistics as tensors, on the CPU."""
        mean, var = (torch.from_numpy(np.array(moment)) for moment in (self.mean, self.var))
        return {"mean": mean, "var": var, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.mean, self.var, self.count = state["mean"].numpy(), state["var"].numpy(), state["count"]


class ObservationNormalizer(RunningMoments):
    """normalise(o) = clip((o − mean) / √(var + 1e-8), ±clip), with the moments of all observations seen."""

    def __init__(self, dim: int, clip: float) -> None:
        super().__init__(dim)
        self.clip = clip

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        """Normalise [..., D]."""
        return np.clip((observation - self.mean) / np.sqrt(self.var + EPSILON), -self.clip, self.clip)


class RewardNormalizer(RunningMoments):
    """normalise(r) = clip(r / √(var + 1e-8), ±clip), var that of the discounted return R ← γ R + r, R = 0 at a reset.

    The variance of all returns seen is about the mean of all of them, and rewards are not shifted: their sign stays.
    One scale holds for a whole rollout, that of all rewards up to its end, so the first rollout has one too. Sources:
    Stable-Baselines3 (``VecNormalize``) and Gymnasium (``NormalizeReward``), which move the scale at each step.
    """

    def __init__(self, gamma: float, clip: float = 10.0) -> None:
        super().__init__()
        self.gamma, self.clip = gamma, clip

    def __call__(
        self, reward: Float[ndarray, "T B"], done: Bool[ndarray, "T B"], discounted: Float[ndarray, "B"]
    ) -> Float[ndarray, "T B"]:
        """Normalise a rollout's rewards, and learn from them.

        ``discounted`` are the B running returns before its first step; they are brought to its end in place.
        """
        returns = np.empty(reward.shape)
        for t in range(len(reward)):
            discounted[:] = self.gamma * discounted + reward[t]
            returns[t] = discounted
            discounted[done[t]] = 0.0
        self.update(returns.reshape(-1))
        return np.clip(reward / np.sqrt(self.var + EPSILON), -self.clip, self.clip)
