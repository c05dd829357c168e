"""Load balance of sparse mixtures: the losses that language models train their routers with.

Adds α·R·Σ_e f_e P_e + β·mean(logsumexp(z)²) to the loss. R experts are routed; z are the gate's logits, P_e their mean
softmax, f_e the share of top-k places that expert e gets (a count, without gradient). The first term is α when the load
is even and its gradient moves probability away from experts that get more; the second keeps logits small.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sphere_rl.errors import ConfigError
from sphere_rl.experts.network import MoENetwork, Trace, kinds
from sphere_rl.learner.actor_critic import ActorCritic, Settings
from sphere_rl.learner.minibatch import Minibatch
from sphere_rl.methods import ActorStep, Method, MethodConfig, check_range


@dataclass(frozen=True)
class LoadBalanceConfig(MethodConfig):
    """Weights of the two losses."""

    balance: float = 1e-2
    """α, the weight of the load-balancing loss."""
    z: float = 1e-3
    """β, the weight of the z-loss."""

    def __post_init__(self) -> None:
        check_range("load_balance", self, "balance z")


class LoadBalance(Method):
    """Both losses, for the actor and for a critic that has a gate; composes with every other method.

    Where all experts are computed (dense_moe, ds_moe in training) f_e counts the top-k that the gate would choose.
    """

    summary = "auxiliary load-balancing loss and z-loss on the gate"
    citation = "Fedus et al. 2022, Switch Transformers (JMLR); Zoph et al. 2022, ST-MoE"
    Config = LoadBalanceConfig

    def __init__(self, config: LoadBalanceConfig) -> None:
        super().__init__(config)
        self._metrics: dict[str, float | Tensor] = {}

    def check(self, config: Settings, discrete: bool) -> None:
        """There must be a gate."""
        if all(kinds()[name].gate is None for name in (config.actor, config.critic)):
            raise ConfigError("method", "load_balance", f"an actor or critic with a gate; {config.actor} has none")

    def actor_penalty(self, step: ActorStep) -> Tensor | None:
        """The losses of the actor's gate."""
        return self._penalty(step.agent.actor, step.trace, "actor")

    def critic_penalty(self, agent: ActorCritic, batch: Minibatch, trace: Trace) -> Tensor | None:
        """The losses of the critic's gate."""
        return self._penalty(agent.critic, trace, "critic")

    def _penalty(self, network: MoENetwork, trace: Trace, name: str) -> Tensor | None:
        if trace.logits is None:
            return None
        options = network.options
        k = min(options.top_k, trace.logits.shape[1])
        balance, z = balance_loss(trace.logits / options.temperature, k), z_loss(trace.logits)
        self._metrics |= {f"load_balance_{name}": balance.detach(), f"load_balance_{name}_z": z.detach()}
        return self.config.balance * balance + self.config.z * z

    def metrics(self) -> dict[str, float | Tensor]:
        """Both losses of the last minibatch, without their weights."""
        return dict(sorted(self._metrics.items()))


def balance_loss(logits: Float[Tensor, "N R"], k: int) -> Float[Tensor, ""]:
    """R·Σ_e f_e P_e: 1 for an even load, R/k when k experts take everything."""
    chosen = torch.zeros_like(logits).scatter_(1, logits.detach().topk(k, dim=1).indices, 1.0)
    return logits.shape[1] * (chosen.mean(0) / k * logits.softmax(1).mean(0)).sum()


def z_loss(logits: Float[Tensor, "N R"]) -> Float[Tensor, ""]:
    """Mean over samples of (log Σ_e exp z_e)²."""
    return logits.logsumexp(1).square().mean()
