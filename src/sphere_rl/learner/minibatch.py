"""Samples as an update reads them."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sphere_rl.learner.rollout import Rollout


@dataclass(frozen=True)
class Minibatch:
    """Samples of a rollout, flat: what the losses read."""

    observation: Float[Tensor, "N D"]
    action: Shaped[Tensor, "N *A"]
    policy: Float[Tensor, "N P"]
    log_prob: Float[Tensor, "N"]
    advantage: Float[Tensor, "N"]
    value_target: Float[Tensor, "N"]

    def __getitem__(self, index: Int[Tensor, "M"]) -> Minibatch:
        """The samples of these rows."""
        return Minibatch(**{name: tensor[index] for name, tensor in vars(self).items()})

    def __len__(self) -> int:
        """N."""
        return len(self.log_prob)


def flatten(rollout: Rollout, advantage: Float[Tensor, "T B"]) -> Minibatch:
    """All T·B samples of a rollout; the value target is Â + V."""
    return Minibatch(
        observation=rollout.observation.flatten(0, 1),
        action=rollout.action.flatten(0, 1),
        policy=rollout.policy.flatten(0, 1),
        log_prob=rollout.log_prob.flatten(),
        advantage=advantage.flatten(),
        value_target=(advantage + rollout.value).flatten(),
    )
