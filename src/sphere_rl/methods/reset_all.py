"""Reset actor and critic at each change of task: no plasticity is lost, and nothing is kept."""

from __future__ import annotations

from sphere_rl.learner.actor_critic import ActorCritic
from sphere_rl.methods import Method
from sphere_rl.methods._layers import fresh_networks, networks, renew


class ResetAll(Method):
    """Every parameter (log σ too) with its Adam state; the observation normaliser stays."""

    summary = "re-initialise all parameters at each change of task, with their optimiser state"
    citation = "Nikishin et al. 2022, The Primacy Bias in Deep Reinforcement Learning (ICML)"

    def on_task_start(self, agent: ActorCritic, task_index: int) -> None:
        """Draw both networks anew, at every task but the first."""
        if task_index > 0:
            for network, fresh in zip(networks(agent).values(), fresh_networks(agent), strict=True):
                renew(agent, network, fresh)
