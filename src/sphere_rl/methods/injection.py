"""Plasticity injection on the output layer: f = h_θ(frozen) + h_a − h_b(frozen), h_a = h_b fresh at the task's start.

The output is unchanged at the moment of injection and only h_a is trained from then on. Output layers are linear, so
the frozen h_θ and h_b of all injections so far add up to one frozen layer: the cost does not grow with the tasks.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sphere_rl.errors import ConfigError
from sphere_rl.experts.layers import GroupedLinear
from sphere_rl.learner.actor_critic import ActorCritic, Settings
from sphere_rl.methods import Method
from sphere_rl.methods._layers import fresh_networks, networks


class InjectedHead(GroupedLinear):
    """A trained layer h_a plus the frozen sum of h_θ − h_b, which is part of the checkpoint."""

    frozen_weight: Tensor
    frozen_bias: Tensor

    def __init__(self, head: GroupedLinear) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.spectral_norm = head.weight, head.bias, False
        self.register_buffer("frozen_weight", torch.zeros_like(head.weight))
        self.register_buffer("frozen_bias", torch.zeros_like(head.bias))

    def effective(self) -> tuple[Float[Tensor, "E out in"], Float[Tensor, "E out"]]:
        """Of (h_θ − h_b) + h_a."""
        return self.frozen_weight + self.weight, self.frozen_bias + self.bias

    @torch.no_grad()
    def inject(self, fresh: GroupedLinear) -> None:
        """Freeze what there is, and begin a new h_a = h_b."""
        for frozen, trained, new in (
            (self.frozen_weight, self.weight, fresh.weight),
            (self.frozen_bias, self.bias, fresh.bias),
        ):
            frozen.add_(trained - new)
            trained.copy_(new)


class Injection(Method):
    """The output layers of actor and critic, with fresh Adam state; hidden layers and the gate go on as they are."""

    summary = "at each change of task freeze the output layer and train a fresh one on top, output unchanged"
    citation = "Nikishin et al. 2023, Deep Reinforcement Learning with Plasticity Injection (NeurIPS)"

    def check(self, config: Settings, discrete: bool) -> None:
        """What was injected is to stay."""
        if resets := {"reset_head", "reset_all"} & set(config.method):
            raise ConfigError("method", " ".join(config.method), f"injection without {' and '.join(resets)}")

    def start(self, agent: ActorCritic) -> None:
        """Give both networks an output layer that can be injected into."""
        for network in networks(agent).values():
            network.experts.head = InjectedHead(network.experts.head)

    def on_task_start(self, agent: ActorCritic, task_index: int) -> None:
        """Inject, at every task but the first."""
        if task_index == 0:
            return
        for network, fresh in zip(networks(agent).values(), fresh_networks(agent), strict=True):
            head = network.experts.head
            assert isinstance(head, InjectedHead)
            head.inject(fresh.experts.head)
            agent.forget(head.weight)
            agent.forget(head.bias)
