"""ReGraMa: units that receive no gradient begin anew.

As ReDo, with the score mean |∂L/∂W_i| over a unit's incoming weights, relative to its layer: where normalisation or
other activations keep every unit active, the gradient still tells which have stopped learning.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sphere_rl.learner.actor_critic import ActorCritic
from sphere_rl.learner.rollout import Rollout
from sphere_rl.methods import MethodConfig, check_range
from sphere_rl.methods._layers import networks, unit_layers
from sphere_rl.methods.redo import Redo


@dataclass(frozen=True)
class RegramaConfig(MethodConfig):
    """Which units count as inactive, and how often they are looked for."""

    threshold: float = 0.01
    """τ: units with a score up to this are recycled."""
    every: int = 10
    """Iterations between two looks."""

    def __post_init__(self) -> None:
        check_range("regrama", self, "threshold")
        check_range("regrama", self, "every", low=1)


class Regrama(Redo):
    """The gradients are those of the iteration's last minibatch, penalties of other methods included.

    Where ``target_kl`` has ended the update they are those of the plain losses, as the step was not taken.
    """

    summary = "re-initialise units that receive next to no gradient"
    citation = "Liu et al. 2025, Measure Gradients, Not Activations! (NeurIPS)"
    Config = RegramaConfig

    def _activity(self, agent: ActorCritic, rollout: Rollout) -> list[list[Float[Tensor, "_ _"]]]:
        return [
            [gradient_activity(layer.incoming.weight) for layer in unit_layers(network)]
            for network in networks(agent).values()
        ]


def gradient_activity(weight: Float[Tensor, "E U in"]) -> Float[Tensor, "E U"]:
    """Mean |∂L/∂W| over each unit's incoming weights."""
    assert weight.grad is not None
    return weight.grad.abs().mean(2)
