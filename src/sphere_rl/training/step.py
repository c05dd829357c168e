"""A gradient step of actor and critic on a minibatch: by autograd, or as one call without it where that is enough.

Actor and critic have their own Adam and their own clip. `actor_step` and `critic_step` are the whole of PPO's step as
anybody would write it; `direct_steps` takes the same steps of plain networks in `sphere_rl.learner.policy_step`, which
is why they are fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sphere_rl.config import TrainConfig
from sphere_rl.experts.heads import CategoricalHead, GaussianHead
from sphere_rl.kernels.adam import clip_scale
from sphere_rl.kernels.gradients import scale_, total_norm
from sphere_rl.kernels.threads import beside
from sphere_rl.learner.feature_penalty import NO_PENALTY, FeaturePenalty
from sphere_rl.learner.losses import (
    Samples,
    adapt_learning_rate,
    clip_fraction,
    normalize,
    policy_loss,
    value_loss,
)
from sphere_rl.learner.minibatch import Minibatch
from sphere_rl.learner.optimizer import ExpertAdam
from sphere_rl.learner.policy_step import Rules, has_fused_step, policy_steps
from sphere_rl.learner.value_step import Regression, begin_regression, regression
from sphere_rl.methods import ActorStep, Method
from sphere_rl.training.agent import Agent

KL_MARGIN = 1.5
"""An update ends where a minibatch's KL is above this times ``target_kl``."""

ACTOR_HOOKS = ("observe", "actor_penalty", "parameter_gradients", "actor_gradients")
CRITIC_HOOKS = ("observe", "critic_penalty", "parameter_gradients")
"""What methods do with a forward pass and its graph, which a step without autograd does not have."""

STATISTICS = ("policy_loss", "kl", "clip_fraction", "entropy", "actor_grad_norm", "value_loss", "critic_grad_norm")


def minibatch_steps(
    agent: Agent, batch: Minibatch, order: Sequence[Int[Tensor, "_"]], config: TrainConfig, keep: bool = False
) -> list[Float[Tensor, "S"]]:
    """A gradient step of the actor and one of the critic on each minibatch, the samples of these rows; `STATISTICS`.

    The learning rate follows the KL from one to the next where it is told to. ``keep``: parameters must carry their
    gradients afterwards. Those after a minibatch that `went_too_far` are left out.
    """
    if keep and len(order) > 1:
        before = minibatch_steps(agent, batch, order[:-1], config)
        if went_too_far(before[-1], config):
            return before
        return before + minibatch_steps(agent, batch, order[-1:], config, keep)
    direct = description(agent, batch, order[0])
    critic = critic_regression(agent, batch, config, keep) if direct else None
    if direct is not None and critic is not None:
        return direct_steps(agent, batch, order, rules_of(config), keep, direct, [critic])
    found = []
    for index in order:
        found.append(minibatch_step(agent, batch[index], config, keep, direct))
        if went_too_far(found[-1], config):
            break
        if config.learning_rate_schedule == "kl":
            kl = float(found[-1][STATISTICS.index("kl")])
            agent.set_learning_rate(
                adapt_learning_rate(agent.learning_rate, kl, config.kl_target, config.learning_rate_bounds)
            )
    return found


def went_too_far(statistics: Float[Tensor, "S"] | Sequence[Tensor], config: TrainConfig) -> bool:
    """Whether this minibatch's KL, the second of `STATISTICS`, ends the update."""
    return config.target_kl > 0 and float(statistics[STATISTICS.index("kl")]) > KL_MARGIN * config.target_kl


class Description(NamedTuple):
    """All that methods add to an actor's steps without autograd, and whose it is."""

    penalty: FeaturePenalty
    method: Method | None


def description(agent: Agent, batch: Minibatch, first: Int[Tensor, "_"]) -> Description | None:
    """How the actor's steps go without autograd; ``None`` where they cannot. ``first``: rows of the first of them.

    The network must be plain and its optimiser Adam, and no more than one method may have a hand in the step: one that
    looks at no forward pass and says by its `feature_penalty` what it does.
    """
    if not has_fused_step(agent.actor) or type(agent.actor_optimizer) is not ExpertAdam:
        return None
    found = [method for method in agent.methods if method.overrides(*ACTOR_HOOKS)]
    if not found:
        return Description(NO_PENALTY, None)
    if len(found) > 1 or found[0].overrides("observe", "parameter_gradients") or not found[0].describes_its_step:
        return None
    penalty = found[0].feature_penalty(agent.actor, batch.observation[first])
    return None if penalty is None else Description(penalty, found[0])


def minibatch_step(
    agent: Agent, batch: Minibatch, config: TrainConfig, keep: bool, direct: Description | None
) -> Float[Tensor, "S"]:
    """A step of each where one needs autograd; ``direct``: how the actor's goes without.

    The critic's goes on, with two lanes, beside what the actor cannot share between them: its gate and its loss.
    """
    of_critic = begin_critic_step(agent, batch, config, keep)
    of_actor = direct_actor_step(agent, batch, config, keep, direct) if direct else actor_step(agent, batch, config)
    return torch.stack([*of_actor, *of_critic()])


def actor_step(agent: Agent, batch: Minibatch, config: TrainConfig) -> list[Tensor]:
    """One gradient step of the actor by autograd; every penalty and diagnostic shares this one forward pass."""
    trace = agent.actor.trace(batch.observation)
    for method in agent.methods:
        method.observe("actor", trace)
    loss, statistics = actor_loss(agent.actor.head, trace.output, batch, config)
    step = ActorStep(agent, batch, trace, loss, agent.actor_parameters, statistics[0])
    penalties = [method.actor_penalty(step) for method in agent.methods]
    total = sum((p for p in penalties if p is not None), start=loss)
    rules = [method for method in agent.methods if method.overrides("actor_gradients")]
    gradients = agent.actor_gradients.differentiate(total, agent.actor_parameters, retain_graph=bool(rules))
    add_parameter_gradients(agent, "actor", agent.actor_parameters, gradients)
    for method in rules:
        gradients = method.actor_gradients(step, gradients)
    if went_too_far(statistics, config):
        return [*statistics, total_norm(gradients)]
    norm = apply_gradients(agent.actor_optimizer, agent.actor_parameters, gradients, config.max_grad_norm)
    return [*statistics, norm]


def actor_loss(
    head: GaussianHead | CategoricalHead, output: Float[Tensor, "N A"], batch: Minibatch, config: TrainConfig
) -> tuple[Tensor, list[Tensor]]:
    """The policy's loss less its weighted entropy; policy loss, KL, share of clipped ratios and entropy as numbers."""
    log_prob, entropy = head.log_prob(output, batch.action), head.entropy(output).mean()
    loss = policy_loss(log_prob, batch.log_prob, normalize(batch.advantage), config.clip)
    with torch.no_grad():
        kl = head.kl(batch.policy, output).mean()
        clipped = clip_fraction((log_prob - batch.log_prob).exp(), config.clip)
    return loss - config.entropy_coefficient * entropy, [loss.detach(), kl, clipped, entropy.detach()]


def critic_step(agent: Agent, batch: Minibatch, config: TrainConfig) -> list[Tensor]:
    """One gradient step of the critic."""
    trace = agent.critic.trace(batch.observation)
    for method in agent.methods:
        method.observe("critic", trace)
    loss = value_loss(trace.output.squeeze(-1), batch.value_target)
    penalties = [method.critic_penalty(agent, batch, trace) for method in agent.methods]
    total = sum((p for p in penalties if p is not None), start=config.value_coefficient * loss)
    gradients = agent.critic_gradients.differentiate(total, agent.critic_parameters)
    add_parameter_gradients(agent, "critic", agent.critic_parameters, gradients)
    norm = apply_gradients(agent.critic_optimizer, agent.critic_parameters, gradients, config.max_grad_norm)
    return [loss.detach(), norm]


@torch.no_grad()
def add_parameter_gradients(
    agent: Agent, network: str, parameters: Sequence[Tensor], gradients: Sequence[Tensor]
) -> None:
    """Add, in place, what methods' penalties on parameters give to the gradients of a loss."""
    by_parameter = dict(zip(parameters, gradients, strict=True))
    for method in agent.methods:
        method.parameter_gradients(agent, network, by_parameter)


def apply_gradients(
    optimizer: torch.optim.Optimizer, parameters: list[Tensor], gradients: list[Tensor], max_norm: float
) -> Tensor:
    """Clip by global norm, step, and return the norm before clipping."""
    gradients = [g.contiguous() for g in gradients]  # fused Adam reads memory in the parameter's order
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    norm = total_norm(gradients)
    if type(optimizer) is ExpertAdam and norm.dtype == torch.float32:  # it divides as it goes, in float32 only
        optimizer.step(grad_scale=clip_scale(norm, max_norm))
    else:
        scale_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        optimizer.step()
    return norm


def begin_critic_step(
    agent: Agent, batch: Minibatch, config: TrainConfig, keep: bool = False
) -> Callable[[], Sequence[Tensor]]:
    """Begin one gradient step of the critic, without autograd where that is enough.

    It waits for the actor's where both may draw at random: of one stream, in an order that is always the same.
    """
    step = critic_regression(agent, batch, config, keep)
    if step is not None:
        return begin_regression(step)
    by_autograd = partial(critic_step, agent, batch, config)
    return by_autograd if agent.actor.may_draw and agent.critic.may_draw else beside(by_autograd)


def critic_regression(agent: Agent, batch: Minibatch, config: TrainConfig, keep: bool) -> Regression | None:
    """The critic's step where nothing but the value loss of plain layers is differentiated."""
    critic, optimizer = agent.critic, agent.critic_optimizer
    needed = any(method.overrides(*CRITIC_HOOKS) for method in agent.methods)
    if needed or critic.gate is not None or not has_fused_step(critic) or type(optimizer) is not ExpertAdam:
        return None
    return regression(
        critic, optimizer, batch.observation, batch.value_target, config.value_coefficient, config.max_grad_norm, keep
    )


def direct_actor_step(
    agent: Agent, batch: Minibatch, config: TrainConfig, keep: bool, direct: Description
) -> list[Tensor]:
    """The same step without a graph."""
    order = [torch.arange(len(batch), device=agent.device)]
    (statistics,) = direct_steps(agent, batch, order, rules_of(config)._replace(kl_target=0.0), keep, direct)
    return list(statistics.unbind())


def rules_of(config: TrainConfig) -> Rules:
    """What a run's configuration says of a step without a graph."""
    return Rules(
        clip=config.clip,
        entropy_coefficient=config.entropy_coefficient,
        max_norm=config.max_grad_norm,
        kl_target=config.kl_target if config.learning_rate_schedule == "kl" else 0.0,
        rate_bounds=config.learning_rate_bounds,
        max_kl=KL_MARGIN * config.target_kl,
    )


def direct_steps(
    agent: Agent,
    batch: Minibatch,
    order: Sequence[Int[Tensor, "_"]],
    rules: Rules,
    keep: bool,
    direct: Description,
    regressions: Sequence[Regression] = (),
) -> list[Float[Tensor, "S"]]:
    """Steps of the actor on minibatches without a graph. A critic's may be taken beside each; its statistics follow."""
    assert isinstance(agent.actor_optimizer, ExpertAdam)
    results = policy_steps(
        agent.actor,
        agent.actor_optimizer,
        Samples(batch.observation, batch.action, batch.policy, batch.log_prob, batch.advantage),
        order,
        rules,
        direct.penalty,
        keep,
        regressions,
    )
    if direct.method is not None:
        direct.method.penalised(results)
    if rules.kl_target > 0:
        agent.set_learning_rate(results.rate)
    return list(results.statistics.unbind())
