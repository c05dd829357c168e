"""PPO's losses (Schulman et al. 2017) as pure functions."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def policy_loss(
    log_prob: Float[Tensor, "N"], old_log_prob: Float[Tensor, "N"], advantage: Float[Tensor, "N"], clip: float
) -> Float[Tensor, ""]:
    """−mean min(r Â, clip(r, 1 − ε, 1 + ε) Â) with r = exp(log π − log π_old)."""
    ratio = (log_prob - old_log_prob).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


def value_loss(value: Float[Tensor, "N"], target: Float[Tensor, "N"]) -> Float[Tensor, ""]:
    """Mean squared error; the value is not clipped."""
    return (value - target).square().mean()
