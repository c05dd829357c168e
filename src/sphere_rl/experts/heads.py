"""What turns a network's output into a distribution over actions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from sphere_rl.kernels.distributions import (
    categorical_entropy,
    categorical_kl,
    categorical_log_prob,
    gaussian_entropy,
    gaussian_kl,
    gaussian_log_prob,
    standardize,
)


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
        return gaussian_log_prob(standardize(action, mean, self.log_std), self.log_std)

    def entropy(self, mean: Float[Tensor, "N A"]) -> Float[Tensor, "N"]:
        """Differential entropy in nats, the same for every state."""
        return gaussian_entropy(self.log_std).expand(len(mean))

    def parameters_of(self, mean: Float[Tensor, "N A"]) -> Float[Tensor, "N P"]:
        """Mean and log σ side by side: what a rollout stores to compare policies by."""
        return torch.cat((mean, self.log_std.expand_as(mean)), dim=-1)

    def kl(self, old: Float[Tensor, "N P"], mean: Float[Tensor, "N A"]) -> Float[Tensor, "N"]:
        """KL(old ‖ new) of the policies with parameters ``old`` and the present ones, in nats."""
        return gaussian_kl(old, mean, self.log_std)


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
        return categorical_log_prob(logits.log_softmax(-1), action)

    def entropy(self, logits: Float[Tensor, "N A"]) -> Float[Tensor, "N"]:
        """−Σ π log π in nats."""
        return categorical_entropy(self.parameters_of(logits))

    def parameters_of(self, logits: Float[Tensor, "N A"]) -> Float[Tensor, "N P"]:
        """Log-probabilities: what a rollout stores to compare policies by."""
        return logits.log_softmax(-1)

    def kl(self, old: Float[Tensor, "N P"], logits: Float[Tensor, "N A"]) -> Float[Tensor, "N"]:
        """KL(old ‖ new) in nats."""
        return categorical_kl(old, self.parameters_of(logits))


class MultiCategoricalHead(CategoricalHead):
    """Several discrete actions at once, independent given the state; logits side by side, A = Σ ``branches``.

    Log-probability, entropy and KL are the sums of the branches' own.
    """

    def __init__(self, branches: Sequence[int]) -> None:
        super().__init__()
        self.branches = tuple(branches)
        first = torch.tensor((0, *self.branches[:-1])).cumsum(0)
        self.register_buffer("first", first, persistent=False)  # where each branch begins

    def sample(self, logits: Float[Tensor, "N A"], generator: torch.Generator) -> Shaped[Tensor, "N C"]:
        """Draw an index of each branch."""
        parts = logits.split(self.branches, -1)
        return torch.cat([torch.multinomial(part.softmax(-1), 1, generator=generator) for part in parts], -1)

    def mode(self, logits: Float[Tensor, "N A"]) -> Shaped[Tensor, "N C"]:
        """The most likely index of each branch."""
        return torch.stack([part.argmax(-1) for part in logits.split(self.branches, -1)], -1)

    def log_prob(self, logits: Float[Tensor, "N A"], action: Shaped[Tensor, "N C"]) -> Float[Tensor, "N"]:
        """log π(action), summed over branches."""
        return self.parameters_of(logits).gather(-1, action.long() + self.get_buffer("first")).sum(-1)

    def parameters_of(self, logits: Float[Tensor, "N A"]) -> Float[Tensor, "N P"]:
        """Log-probabilities of each branch, side by side."""
        return torch.cat([part.log_softmax(-1) for part in logits.split(self.branches, -1)], -1)
