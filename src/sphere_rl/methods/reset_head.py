"""Reset the last layer of actor and critic at each change of task."""

from __future__ import annotations

from sphere_rl.learner.actor_critic import ActorCritic
from sphere_rl.methods import Method
from sphere_rl.methods._layers import fresh_networks, networks, renew


class ResetHead(Method):
    """Every expert's output layer, with its Adam state; the gate keeps its own."""

    summary = "re-initialise the output layer at each change of task, with its optimiser state"
    citation = "Nikishin et al. 2022, The Primacy Bias in Deep Reinforcement Learning (ICML)"

    def on_task_start(self, agent: ActorCritic, task_index: int) -> None:
        """Draw the output layers anew, at every task but the first."""
        if task_index > 0:
            for network, fresh in zip(networks(agent).values(), fresh_networks(agent), strict=True):
                renew(agent, network.experts.head, fresh.experts.head)
