"""Policies as distributions over actions: log probability, entropy and KL divergence, for autograd and TorchScript."""

import torch
from torch import Tensor

from sphere_rl.kernels.script import scriptable

LOG_SQRT_2PI = 0.9189385332046727
"""log √(2π)."""


@scriptable
def standardize(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Z = (a − μ)/σ of actions [N, A] of Gaussians with means [N, A] and log σ [A]."""
    return (action - mean) * torch.exp(-log_std)


@scriptable
def gaussian_log_prob(z: Tensor, log_std: Tensor, constant: float = LOG_SQRT_2PI) -> Tensor:
    """log N(a; μ, σ²) [N] of standardised actions [N, A], summed over action dimensions."""
    return -0.5 * z.square().sum(1) - (log_std + constant).sum()


@scriptable
def gaussian_entropy(log_std: Tensor, constant: float = LOG_SQRT_2PI + 0.5) -> Tensor:
    """Differential entropy in nats, the same for every state."""
    return (log_std + constant).sum()


@scriptable
def gaussian_kl(old: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(old ‖ new) [N] in nats; ``old`` [N, 2A] are means and log σ side by side."""
    old_mean, old_log_std = old.chunk(2, 1)
    squared = torch.exp(2 * old_log_std) + (old_mean - mean).square()
    return (log_std - old_log_std + 0.5 * (squared * torch.exp(-log_std).square() - 1)).sum(1)


@scriptable
def categorical_log_prob(log_p: Tensor, action: Tensor) -> Tensor:
    """log π(a) [N] of actions [N] under log probabilities [N, A]."""
    return log_p.gather(1, action.to(torch.int64).unsqueeze(1)).squeeze(1)


@scriptable
def categorical_entropy(log_p: Tensor) -> Tensor:
    """−Σ π log π [N] in nats."""
    return -(log_p.exp() * log_p).sum(1)


@scriptable
def categorical_kl(old: Tensor, log_p: Tensor) -> Tensor:
    """KL(old ‖ new) [N] in nats, both log probabilities [N, A]."""
    return (old.exp() * (old - log_p)).sum(1)
