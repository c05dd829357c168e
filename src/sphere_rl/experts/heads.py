"""What turns a network's output into a distribution over actions."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

LOG_SQRT_2PI = 0.9189385332046727
"""log √(2π)."""


class GaussianHead(nn.Module):
    """Diagonal Gaussian with a state-independent log σ, initially 0; the network's output is its mean."""

    def __init__(self, action_dim: int) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def sample(self, mean: Float[Tensor, "N A"], generator: torch.Generator) -> Float[Tensor, "N A"]:
        """Draw actions; they are not clipped here."""
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + self.log_std.exp() * noise

    def mode(self, mean: Float[Tensor, "N A"]) -> Float[Tensor, "N A"]:
        """The deterministic action."""
        return mean

    def log_prob(self, mean: Float[Tensor, "N A"], action: Float[Tensor, "N A"]) -> Float[Tensor, "N"]:
        """log N(action; mean, σ²), summed over action dimensions."""
        z = (action - mean) * (-self.log_std).exp()
        return -0.5 * z.square().sum(-1) - (self.log_std + LOG_SQRT_2PI).sum()

    def entropy(self, mean: Float[Tensor, "N A"]) -> Float[Tensor, "N"]:
        """Differential entropy in nats, the same for every state."""
        return (self.log_std + LOG_SQRT_2PI + 0.5).sum().expand(len(mean))

    def parameters_of(self, mean: Float[Tensor, "N A"]) -> Float[Tensor, "N P"]:
        """Mean and log σ side by side: what a rollout stores to compare policies by."""
        return torch.cat((mean, self.log_std.expand_as(mean)), dim=-1)

    def kl(self, old: Float[Tensor, "N P"], mean: Float[Tensor, "N A"]) -> Float[Tensor, "N"]:
        """KL(old ‖ new) of the policies with parameters ``old`` and the present ones, in nats."""
        old_mean, old_log_std = old.chunk(2, dim=-1)
        variance = (2 * self.log_std).exp()
        squared = (2 * old_log_std).exp() + (old_mean - mean).square()
        return (self.log_std - old_log_std + 0.5 * (squared / variance - 1)).sum(-1)


class CategoricalHead(nn.Module):
    """Categorical policy over discrete actions; the network's output is its logits."""

    def sample(self, logits: Float[Tensor, "N A"], generator: torch.Generator) -> Shaped[Tensor, "N"]:
        """Draw action indices."""
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)

    def mode(self, logits: Float[Tensor, "N A"]) -> Shaped[Tensor, "N"]:
        """The most likely action."""
        return logits.argmax(-1)

    def log_prob(self, logits: Float[Tensor, "N A"], action: Shaped[Tensor, "N"]) -> Float[Tensor, "N"]:
        """log π(action)."""
        return logits.log_softmax(-1).gather(-1, action[:, None].long()).squeeze(-1)

    def entropy(self, logits: Float[Tensor, "N A"]) -> Float[Tensor, "N"]:
        """−Σ π log π in nats."""
        log_probability = logits.log_softmax(-1)
        return -(log_probability.exp() * log_probability).sum(-1)

    def parameters_of(self, logits: Float[Tensor, "N A"]) -> Float[Tensor, "N P"]:
        """Log-probabilities: what a rollout stores to compare policies by."""
        return logits.log_softmax(-1)

    def kl(self, old: Float[Tensor, "N P"], logits: Float[Tensor, "N A"]) -> Float[Tensor, "N"]:
        """KL(old ‖ new) in nats."""
        return (old.exp() * (old - logits.log_softmax(-1))).sum(-1)
