"""Proximal Policy Optimization (Schulman et al. 2017): an update is some epochs of minibatches of a rollout."""

from __future__ import annotations

from math import inf, isfinite

import torch
from jaxtyping import Float
from torch import Tensor

from sphere_rl.config import TrainConfig
from sphere_rl.errors import TrainingError
from sphere_rl.experts.heads import GaussianHead
from sphere_rl.kernels.distributions import LOG_SQRT_2PI
from sphere_rl.learner.losses import adapt_learning_rate, value_loss
from sphere_rl.learner.minibatch import Minibatch, flatten
from sphere_rl.learner.rollout import LARGEST_LOG_STD, Rollout, gae
from sphere_rl.training.agent import Agent
from sphere_rl.training.step import STATISTICS, actor_loss, minibatch_steps, went_too_far


def update(agent: Agent, rollout: Rollout, config: TrainConfig) -> dict[str, float]:
    """Train on one rollout for all epochs; return the means of each minibatch's statistics.

    With ``target_kl`` the first minibatch whose KL is above 1.5 times it ends the update, as in Stable-Baselines3: the
    actor takes no step on it. ``stopped_epochs`` are those that were not finished, ``routing_flips`` the share of
    samples for which the gate selects other experts after the update than before.

    Raises:
        TrainingError: a loss or gradient norm was not finite.
    """
    advantage = gae(
        rollout.reward, rollout.value, rollout.next_value, rollout.terminated, rollout.done,
        config.gamma, config.gae_lambda,
    )  # fmt: skip
    batch, spread = flatten(rollout, advantage), log_spread(agent)
    before = agent.actor.selection(batch.observation)
    statistics, stopped_epochs = train_epochs(agent, batch, config)
    for method in agent.methods:
        method.after_iteration(agent, rollout)
    try:
        means = summarize(torch.stack(statistics))
    except TrainingError as error:
        cause = spread_cause(spread, torch.stack(statistics))
        raise TrainingError(f"{error}{cause}") from None
    found = {**means, "stopped_epochs": float(stopped_epochs)}
    after = agent.actor.selection(batch.observation)
    if before is not None and after is not None:
        found["routing_flips"] = float((before != after).any(1).double().mean())
    return found


def train_epochs(agent: Agent, batch: Minibatch, config: TrainConfig) -> tuple[list[Float[Tensor, "S"]], int]:
    """All minibatches of all epochs: `STATISTICS` of each, and how many epochs ``target_kl`` left unfinished."""
    rate = agent.learning_rate
    apart, statistics = any(method.overrides("after_minibatch") for method in agent.methods), []
    for epoch in range(config.num_epochs):
        order = torch.randperm(len(batch), generator=agent.generator, device=agent.device).split(config.minibatch_size)
        last = epoch == config.num_epochs - 1
        # What acts between minibatches gets them one by one.
        parts = [[index] for index in order] if apart else [order]
        for position, part in enumerate(parts, start=1):
            statistics += minibatch_steps(agent, batch, part, config, keep=last and position == len(parts))
            if apart:  # where the actor has gone too far the critic has taken its step
                for method in agent.methods:
                    method.after_minibatch(agent, batch[part[0]])
            if went_too_far(statistics[-1], config):
                carry_gradients(agent, batch[order[(len(statistics) - 1) % len(order)]], config)
                lower_rate(agent, rate, config)
                return statistics, config.num_epochs - epoch
    return statistics, 0


def lower_rate(agent: Agent, before: float, config: TrainConfig) -> None:
    """After an update that ``target_kl`` has ended: the rate that follows the KL is one division below what it was.

    The minibatches before had little KL, the first one none, and have raised it; no minibatch after would lower it.
    """
    if config.learning_rate_schedule == "kl":
        low = min(before, agent.learning_rate)
        agent.set_learning_rate(adapt_learning_rate(low, inf, config.kl_target, config.learning_rate_bounds))


def carry_gradients(agent: Agent, batch: Minibatch, config: TrainConfig) -> None:
    """Let parameters carry the gradients of the plain losses on a minibatch, for whoever measures them."""
    policy = actor_loss(agent.actor.head, agent.actor(batch.observation), batch, config)[0]
    value = value_loss(agent.critic(batch.observation).squeeze(-1), batch.value_target)
    for loss, parameters in ((policy, agent.actor_parameters), (value, agent.critic_parameters)):
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient


def summarize(statistics: Float[Tensor, "U S"]) -> dict[str, float]:
    """Means over an iteration's minibatches; the only place where the losses are read back.

    Raises:
        TrainingError: one of them is NaN or infinite; the message names the first such minibatch.
    """
    broken = ~torch.isfinite(statistics).all(1)
    if broken.any():
        first = int(broken.nonzero()[0])
        values = dict(zip(STATISTICS, statistics[first].tolist(), strict=True))
        names = ", ".join(f"{k} = {v}" for k, v in values.items() if not isfinite(v))
        raise TrainingError(f"minibatch {first + 1} of {len(statistics)}: {names}")
    return dict(zip(STATISTICS, statistics.mean(0).tolist(), strict=True))


def log_spread(agent: Agent) -> Float[Tensor, "A"] | None:
    """log σ of each action as it is now; ``None`` for discrete ones."""
    head = agent.actor.head
    return head.log_std.detach().clone() if isinstance(head, GaussianHead) else None


def spread_cause(before: Float[Tensor, "A"] | None, statistics: Float[Tensor, "U S"]) -> str:
    """Words to add where it was σ that left the range of float32 in the first minibatch that is not finite.

    A Gaussian's entropy is Σ (log σ + log √2π + ½), so it tells log σ then from that before the update.
    """
    if before is None:
        return ""
    first = int((~torch.isfinite(statistics).all(1)).nonzero()[0])
    entropy = statistics[first, STATISTICS.index("entropy")].double()
    after = entropy - len(before) * (LOG_SQRT_2PI + 0.5)
    moved = float((after - before.double().sum()).abs())
    mean = float(after) / len(before)
    if max(abs(mean), moved, float(before.abs().max())) < LARGEST_LOG_STD / 2:
        return ""
    verb = "exploded" if mean > 0 else "vanished"
    return f": the policy's standard deviation has {verb} (log σ = {mean:.4g}, the mean over {len(before)} actions)"
