"""PPO's losses (Schulman et al. 2017), each once: as functions that autograd differentiates, and beside them their
derivatives written out, for steps that go without autograd. A test holds one to the other.

Plain `Tensor` in place of shapes, because TorchScript compiles the same functions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sphere_rl.kernels.distributions import (
    categorical_entropy,
    categorical_kl,
    categorical_log_prob,
    gaussian_entropy,
    gaussian_kl,
    gaussian_log_prob,
    standardize,
)
from sphere_rl.kernels.script import scriptable, scripted


@scriptable
def normalize(advantage: Tensor) -> Tensor:
    """Zero mean, unit standard deviation."""
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)


@scriptable
def policy_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """−mean min(r Â, clip(r, 1 − ε, 1 + ε) Â) with r = exp(log π − log π_old); all of them [N]."""
    ratio = torch.exp(log_prob - old_log_prob)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


@scriptable
def policy_loss_gradient(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """∂`policy_loss`/∂log π [N]: −r Â/N where the first of the two terms is the smaller one, else 0."""
    ratio = torch.exp(log_prob - old_log_prob)
    free, bound = ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage
    return (free * (free <= bound)).div_(-len(free))


@scriptable
def clip_fraction(log_prob: Tensor, old_log_prob: Tensor, clip: float) -> Tensor:
    """Share of samples whose ratio is outside the clip."""
    return (torch.exp(log_prob - old_log_prob) - 1).abs().gt(clip).to(log_prob.dtype).mean()


@scriptable
def value_loss(value: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of values [N]; the value is not clipped."""
    return (value - target).square().mean()


@scriptable
def adapt_learning_rate(rate: float, kl: float, target: float, bounds: tuple[float, float]) -> float:
    """×1.5 where KL < target/2, ÷1.5 where KL > 2·target, within bounds."""
    if kl > 2 * target:
        return max(bounds[0], rate / 1.5)
    if kl < target / 2:
        return min(bounds[1], rate * 1.5)
    return rate


class Samples(NamedTuple):
    """A minibatch as the actor's step reads it: N rows each."""

    observation: Tensor
    action: Tensor
    policy: Tensor
    log_prob: Tensor
    advantage: Tensor


@scriptable
def samples_of(every: Samples, index: Tensor) -> Samples:
    """The samples of these rows."""
    return Samples(
        every.observation.index_select(0, index),
        every.action.index_select(0, index),
        every.policy.index_select(0, index),
        every.log_prob.index_select(0, index),
        every.advantage.index_select(0, index),
    )


@scripted
def gaussian_loss(
    mean: Tensor, log_std: Tensor, samples: Samples, clip: float, entropy_coefficient: float
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`policy_loss` less the weighted entropy, of a Gaussian policy with mean [N, A] and log σ [A].

    Returns the loss; policy loss, KL, clip fraction and entropy; and the loss's gradients for mean and log σ:
    ∂log π/∂μ = z/σ, ∂log π/∂log σ = z² − 1.
    """
    z = standardize(samples.action, mean, log_std)
    log_prob, advantage = gaussian_log_prob(z, log_std), normalize(samples.advantage)
    loss, entropy = policy_loss(log_prob, samples.log_prob, advantage, clip), gaussian_entropy(log_std)
    statistics = [loss, gaussian_kl(samples.policy, mean, log_std).mean()]
    statistics.extend([clip_fraction(log_prob, samples.log_prob, clip), entropy])
    of_log_prob = policy_loss_gradient(log_prob, samples.log_prob, advantage, clip).unsqueeze(1)
    of_log_std = (of_log_prob * (z.square() - 1)).sum(0) - entropy_coefficient
    return loss - entropy_coefficient * entropy, statistics, [of_log_prob * z * torch.exp(-log_std), of_log_std]


@scripted
def categorical_loss(
    logits: Tensor, samples: Samples, clip: float, entropy_coefficient: float
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The same of a categorical policy's logits [N, A]: ∂log π(a)/∂logits = 1_a − p, ∂H/∂logits = −p (log p + H)."""
    log_p = logits.log_softmax(1)
    p, advantage = log_p.exp(), normalize(samples.advantage)
    log_prob, entropy = categorical_log_prob(log_p, samples.action), categorical_entropy(log_p)
    loss, mean_entropy = policy_loss(log_prob, samples.log_prob, advantage, clip), entropy.mean()
    statistics = [loss, categorical_kl(samples.policy, log_p).mean()]
    statistics.extend([clip_fraction(log_prob, samples.log_prob, clip), mean_entropy])
    of_log_prob = policy_loss_gradient(log_prob, samples.log_prob, advantage, clip).unsqueeze(1)
    chosen = torch.zeros_like(log_p).scatter_(1, samples.action.to(torch.int64).unsqueeze(1), 1.0)
    of_entropy = p * (log_p + entropy.unsqueeze(1)) * (entropy_coefficient / len(p))
    return loss - entropy_coefficient * mean_entropy, statistics, [of_log_prob * (chosen - p) + of_entropy]
