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
def surrogates(ratio: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """R Â and clip(r, 1 − ε, 1 + ε) Â [N] of ratios r and advantages Â."""
    return ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage


@scriptable
def pessimistic_loss(free: Tensor, bound: Tensor) -> Tensor:
    """−mean min of both surrogates."""
    return -torch.minimum(free, bound).mean()


@scriptable
def pessimistic_gradient(free: Tensor, bound: Tensor) -> Tensor:
    """∂`pessimistic_loss`/∂log π [N], r being exp(log π − log π_old): −r Â/N where that is the smaller one, else 0."""
    return (free * (free <= bound)).div_(-len(free))


@scriptable
def clip_fraction(ratio: Tensor, clip: float) -> Tensor:
    """Share of samples whose ratio is outside the clip."""
    return (ratio - 1).abs().gt(clip).to(ratio.dtype).mean()


def policy_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """−mean min(r Â, clip(r, 1 − ε, 1 + ε) Â) with r = exp(log π − log π_old); all of them [N]."""
    free, bound = surrogates((log_prob - old_log_prob).exp(), advantage, clip)
    return pessimistic_loss(free, bound)


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


@scriptable
def mean_kl(statistics: list[Tensor]) -> Tensor:
    """Of what `gaussian_loss` and `categorical_loss` give beside the loss."""
    return statistics[1]


@scripted
def gaussian_loss(
    mean: Tensor, log_std: Tensor, samples: Samples, clip: float, entropy_coefficient: float
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`pessimistic_loss` less the weighted entropy, of a Gaussian policy with mean [N, A] and log σ [A].

    Returns the loss; policy loss, KL, clip fraction and entropy; and the loss's gradients for mean and log σ:
    ∂log π/∂μ = z/σ, ∂log π/∂log σ = z² − 1.
    """
    z = standardize(samples.action, mean, log_std)
    ratio = torch.exp(gaussian_log_prob(z, log_std) - samples.log_prob)
    free, bound = surrogates(ratio, normalize(samples.advantage), clip)
    loss, kl, entropy = (
        pessimistic_loss(free, bound),
        gaussian_kl(samples.policy, mean, log_std),
        gaussian_entropy(log_std),
    )
    of_log_prob = pessimistic_gradient(free, bound).unsqueeze(1)
    of_log_std = (of_log_prob * (z.square() - 1)).sum(0) - entropy_coefficient
    gradients = [of_log_prob * z * torch.exp(-log_std), of_log_std]
    return loss - entropy_coefficient * entropy, [loss, kl.mean(), clip_fraction(ratio, clip), entropy], gradients


@scripted
def categorical_loss(
    logits: Tensor, samples: Samples, clip: float, entropy_coefficient: float
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The same of a categorical policy's logits [N, A]: ∂log π(a)/∂logits = 1_a − p, ∂H/∂logits = −p (log p + H)."""
    log_p = logits.log_softmax(1)
    p, entropy, kl = log_p.exp(), categorical_entropy(log_p), categorical_kl(samples.policy, log_p).mean()
    ratio = torch.exp(categorical_log_prob(log_p, samples.action) - samples.log_prob)
    free, bound = surrogates(ratio, normalize(samples.advantage), clip)
    loss, mean = pessimistic_loss(free, bound), entropy.mean()
    chosen = torch.zeros_like(log_p).scatter_(1, samples.action.to(torch.int64).unsqueeze(1), 1.0)
    of_entropy = p * (log_p + entropy.unsqueeze(1)) * (entropy_coefficient / len(p))
    gradients = [pessimistic_gradient(free, bound).unsqueeze(1) * (chosen - p) + of_entropy]
    return loss - entropy_coefficient * mean, [loss, kl, clip_fraction(ratio, clip), mean], gradients
