"""PPO's loss and its gradient for a policy's output, written out: what autograd finds of `ppo.actor_loss`."""

from typing import NamedTuple

import torch
from torch import Tensor

from sphere_rl.kernels.script import scriptable, scripted


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
def normalize(advantage: Tensor) -> Tensor:
    """Zero mean, unit standard deviation."""
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)


@scriptable
def adapt_learning_rate(rate: float, kl: float, target: float, bounds: tuple[float, float]) -> float:
    """×1.5 where KL < target/2, ÷1.5 where KL > 2·target, within bounds."""
    if kl > 2 * target:
        return max(bounds[0], rate / 1.5)
    if kl < target / 2:
        return min(bounds[1], rate * 1.5)
    return rate


@scripted
def _clipped(log_prob: Tensor, samples: Samples, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped loss, the share of ratios outside the clip, and ∂loss/∂log π [N, 1]."""
    advantage, ratio = normalize(samples.advantage), torch.exp(log_prob - samples.log_prob)
    free, bound = ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage
    outside = (ratio - 1).abs().gt(clip).to(ratio.dtype).mean()
    return -torch.minimum(free, bound).mean(), outside, (free * (free <= bound)).div_(-len(free)).unsqueeze(1)


@scripted
def gaussian_loss(
    mean: Tensor, log_std: Tensor, samples: Samples, clip: float, entropy_coefficient: float
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Loss, `actor_loss`'s statistics, and ∂loss for mean [N, A] and log σ [A] of a Gaussian policy."""
    deviation = torch.exp(-log_std)
    z = (samples.action - mean) * deviation
    constant = 0.9189385332046727  # log sqrt(2 pi)
    log_prob = z.square().sum(1).mul_(-0.5).sub_((log_std + constant).sum())
    entropy = (log_std + (constant + 0.5)).sum()
    loss, outside, of_log_prob = _clipped(log_prob, samples, clip)
    of_mean = of_log_prob * z * deviation
    of_log_std = (of_log_prob * (z.square() - 1)).sum(0) - entropy_coefficient
    old_mean, old_log_std = samples.policy.chunk(2, 1)
    squared = torch.exp(2 * old_log_std) + (old_mean - mean).square()
    kl = (log_std - old_log_std + 0.5 * (squared * deviation.square() - 1)).sum(1).mean()
    return loss - entropy_coefficient * entropy, [loss, kl, outside, entropy], [of_mean, of_log_std]


@scripted
def categorical_loss(
    logits: Tensor, samples: Samples, clip: float, entropy_coefficient: float
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The same of a categorical policy's logits [N, A]: ∂H/∂logits = −p (log p + H)."""
    log_p = logits.log_softmax(1)
    p, chosen = log_p.exp(), torch.zeros_like(log_p)
    index = samples.action.to(torch.int64).unsqueeze(1)
    chosen.scatter_(1, index, 1.0)
    entropy = -(p * log_p).sum(1)
    loss, outside, of_log_prob = _clipped(log_p.gather(1, index).squeeze(1), samples, clip)
    of_entropy = p * (log_p + entropy.unsqueeze(1)) * (entropy_coefficient / len(p))
    kl = (samples.policy.exp() * (samples.policy - log_p)).sum(1).mean()
    mean = entropy.mean()
    return loss - entropy_coefficient * mean, [loss, kl, outside, mean], [of_log_prob * (chosen - p) + of_entropy]
