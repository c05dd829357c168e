"""C-CHAIN: less churn, the change of the policy on states outside the minibatch that a gradient step is for.

Adds c·mean‖μ_θ(s) − μ_prev(s)‖² over a second batch s, μ_prev the policy before the last minibatch's step; for discrete
actions c·mean KL(π_prev ‖ π_θ). After a warm-up c = target·mean|L_policy|/mean(churn), so that the term keeps a
constant share of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sphere_rl.learner.actor_critic import ActorCritic
from sphere_rl.learner.rollout import Rollout
from sphere_rl.methods import ActorStep, Method, MethodConfig, check_range


@dataclass(frozen=True)
class CChainConfig(MethodConfig):
    """Strength of the term."""

    coefficient: float = 100.0
    """c, until a task's warm-up is over."""
    target: float = 0.05
    """Share of the policy loss that the term is held at after the warm-up."""
    warmup: int = 50
    """Iterations with the fixed c; also the number of latest iterations that the means are taken over."""

    def __post_init__(self) -> None:
        check_range("c_chain", self, "coefficient target")
        check_range("c_chain", self, "warmup", low=1)


class CChain(Method):
    """The policy alone, as in the source.

    The second batch is the minibatch before the last one: within an epoch it shares no sample with the last one, whose
    step is being judged. Each task has its own warm-up, and no second batch in its first two minibatches.
    """

    summary = "penalty on the policy's change outside the minibatch"
    citation = "Tang et al. 2025, Mitigating Plasticity Loss in Continual RL by Reducing Churn (ICML)"
    Config = CChainConfig

    def __init__(self, config: CChainConfig) -> None:
        super().__init__(config)
        self._begin()

    def _begin(self) -> None:
        self._coefficient = self.config.coefficient
        self._history: list[list[float]] = []
        self._iterations = 0
        self._last: Tensor | None = None
        self._reference: tuple[Tensor, Tensor] | None = None
        self._sums: list[Tensor] = []

    def start(self, agent: ActorCritic) -> None:
        """Know where tensors live."""
        self._device = agent.device

    def on_task_start(self, agent: ActorCritic, task_index: int) -> None:
        """Neither observations nor the scale of losses of the task before are a reference for this one."""
        self._begin()

    def actor_penalty(self, step: ActorStep) -> Tensor | None:
        """c · churn of the last step; and remember what this step's churn will be measured against."""
        penalty = None
        if self._reference is not None:
            observation, previous = self._reference
            churn = policy_change(step.agent, observation, previous)
            self._sums.append(torch.stack((step.policy_loss.abs(), churn.detach())))
            penalty = self._coefficient * churn
        if self._last is not None:
            with torch.no_grad():
                self._reference = self._last, policy(step.agent, self._last)
        self._last = step.batch.observation
        return penalty

    def after_iteration(self, agent: ActorCritic, rollout: Rollout) -> None:
        """Record the iteration's means; after the warm-up set c by them."""
        if self._sums:
            self._history.append(torch.stack(self._sums).mean(0).tolist())
            self._sums = []
        self._history = self._history[-self.config.warmup :]
        self._iterations += 1
        if self._iterations >= self.config.warmup and self._history:
            loss, churn = (sum(column) for column in zip(*self._history, strict=True))
            self._coefficient = self.config.target * loss / max(churn, 1e-12)

    def metrics(self) -> dict[str, float | Tensor]:
        """c, and the churn of the last iteration's steps."""
        churn = self._history[-1][1] if self._history else 0.0
        return {"c_chain_coefficient": self._coefficient, "c_chain_churn": churn}

    def state_dict(self) -> dict[str, Any]:
        """c and its history, and the batches that the next minibatch is compared on."""
        batches: dict[str, Tensor] = {} if self._last is None else {"last": self._last}
        if self._reference is not None:
            batches |= {"reference": self._reference[0], "previous": self._reference[1]}
        return {
            "coefficient": self._coefficient,
            "history": self._history,
            "iterations": self._iterations,
            "batches": batches,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._coefficient, self._history = state["coefficient"], state["history"]
        self._iterations = state["iterations"]
        batches = {key: tensor.to(self._device) for key, tensor in state["batches"].items()}
        self._last = batches.get("last")
        self._reference = (batches["reference"], batches["previous"]) if "reference" in batches else None


def policy(agent: ActorCritic, observation: Float[Tensor, "N D"]) -> Float[Tensor, "N A"]:
    """Mean actions, or the log-probabilities of discrete ones."""
    output = agent.actor(observation)
    return agent.actor.head.parameters_of(output) if agent.spaces.discrete else output


def policy_change(
    agent: ActorCritic, observation: Float[Tensor, "N D"], previous: Float[Tensor, "N A"]
) -> Float[Tensor, ""]:
    """How far the policy has moved from what `policy` gave before."""
    change = policy(agent, observation) - previous
    if agent.spaces.discrete:  # Σ p (r − 1 − log r) with r = π_θ/p is the KL divergence, without its cancellation
        return (previous.exp() * (change.expm1() - change)).sum(1).mean()
    return change.square().sum(1).mean()
