"""Steps of actor and critic without autograd, those of many minibatches as one TorchScript call.

Two threads wait for each other at Python's lock between their operations, and after every product Python itself has to
come back into the cache. What runs here needs Python only to begin and to end: that is what a second lane
(`sphere_rl.kernels.threads`) does best, and one thread alone saves autograd's bookkeeping and most of the memory
traffic of gradients (`sphere_rl.kernels.backward`). Only for networks that are plain chains of layers
(`has_fused_step`); all others go through autograd, with the same result.

A step, in `_take_step`: forward pass, loss and its derivative for the output, the penalty and its derivatives for the
features, a backward sweep, lengths of the gradients, and an update sweep with Adam. With two lanes the critic's forward
pass goes beside the actor's, its sweeps and the penalty beside the actor's loss, and idle experts beside the updates.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from sphere_rl.experts.network import Actor, MoENetwork
from sphere_rl.kernels.adam import count_step, idle_experts
from sphere_rl.kernels.backward import BackwardInputs, Block, inner_products
from sphere_rl.kernels.mixture import MixturePass, mixed_output, mixture_pass
from sphere_rl.kernels.routing import Assignments, Gating, blocks_of
from sphere_rl.kernels.script import SCRIPTED, scripted
from sphere_rl.kernels.threads import begin, lanes
from sphere_rl.learner.feature_penalty import FeaturePenalty, Penalty, penalty_of, step_factors, strength_of
from sphere_rl.learner.fused import (
    FusedNetwork,
    backward_sweep,
    fused_network,
    update_idle_experts,
    update_sweep,
    with_rate,
)
from sphere_rl.learner.losses import (
    Samples,
    adapt_learning_rate,
    categorical_loss,
    gaussian_loss,
    mean_kl,
    samples_of,
)
from sphere_rl.learner.optimizer import ExpertAdam
from sphere_rl.learner.value_step import (
    Predicted,
    Regression,
    finish_regression,
    of_minibatch,
    predict,
    regression_step,
)


class Rules(NamedTuple):
    """What a run's configuration says of a step."""

    clip: float
    """PPO's clip range of the probability ratio."""
    entropy_coefficient: float
    max_norm: float
    """The longest gradient."""
    kl_target: float = 0.0
    """After every minibatch the learning rate follows its KL to this [nats]; 0: it stays."""
    rate_bounds: tuple[float, float] = (0.0, 0.0)
    """Rates that it stays between."""
    max_kl: float = 0.0
    """A minibatch whose mean KL [nats] is above this is the last, and the actor takes no step on it; 0: none is."""


class StepResults(NamedTuple):
    """What came of U steps."""

    statistics: Tensor
    """[U, …]: policy loss, KL, share of clipped ratios, entropy, the gradient's norm before it was clipped; with a
    regression beside it also its mean square and norm.
    """
    penalty: Tensor
    """Of the last step, before it is multiplied."""
    strength: Tensor
    """What it was multiplied by."""
    rate: float
    """The learning rate that follows."""


class _Step(NamedTuple):
    """A policy's step on a minibatch, before it is taken, and at most one of a critic beside it."""

    network: FusedNetwork
    gating: Gating
    samples: Samples
    rules: Rules
    spec: FeaturePenalty
    num_lanes: int
    regressions: list[Regression]


def has_fused_step(network: MoENetwork) -> bool:
    """Whether a network's gradient steps can be a TorchScript call."""
    return SCRIPTED and network.has_kernel_gradient


@torch.inference_mode()
def policy_steps(
    actor: Actor,
    optimizer: ExpertAdam,
    samples: Samples,
    order: Sequence[Int[Tensor, "_"]],
    rules: Rules,
    penalty: FeaturePenalty,
    keep: bool,
    regressions: Sequence[Regression] = (),
) -> StepResults:
    """A step on each minibatch, the samples of these rows, of a plain actor on PPO's loss and a penalty.

    Beside each, a step of at most one regression on the same rows. ``keep``: let parameters carry their gradients. The
    first minibatch whose KL is above `Rules.max_kl` is the last: the actor takes no step on it, the regression does.
    """
    network = fused_network(actor, optimizer, keep, actor.head)
    step = _Step(network, actor.gating, samples, rules, penalty, lanes(), list(regressions))
    results, idle = begin(_take_steps, _start_steps, step, list(order))()
    for own, steps in zip(network.idle, idle, strict=True):
        own[:] = steps
    return StepResults(*results)  # TorchScript gives a tuple of its own


@scripted
def _logits_gradient(found: Assignments, gating: Gating, grad_gate: Tensor) -> Tensor:
    """From ∂/∂(routing weight of each row) [M] to ∂/∂logits [N, R], through the softmax of the selected ones."""
    grad, experts = torch.zeros_like(found.weights), found.weights.size(1)
    grad.view(-1).index_copy_(0, found.sample * experts + found.expert, grad_gate)
    weights, grad = found.weights[:, gating.shared :], grad[:, gating.shared :]
    return weights * (grad - (weights * grad).sum(1, keepdim=True)) / gating.temperature


@scripted
def _loss(
    network: FusedNetwork, found: MixturePass, samples: Samples, rules: Rules
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Loss, statistics, and ∂loss/∂(output of the sample of each row) [M, A]; the head's gradients are filled."""
    output = mixed_output(found, samples.observation.size(0))
    if len(network.head) > 0:
        loss, statistics, gradients = gaussian_loss(
            output, network.head[0], samples, rules.clip, rules.entropy_coefficient
        )
        network.of_head[0].copy_(gradients[1])
    else:
        loss, statistics, gradients = categorical_loss(output, samples, rules.clip, rules.entropy_coefficient)
    return loss, statistics, gradients[0].index_select(0, found.assigned.sample)


@scripted
def _backward_inputs(
    found: MixturePass, gating: Gating, of_rows: Tensor, penalty: Penalty, spec: FeaturePenalty, strength: Tensor
) -> tuple[list[BackwardInputs], list[Block]]:
    """What both sweeps read of the experts and the gate, and the blocks of their rows; ``of_rows`` as of `_loss`."""
    assigned = found.assigned
    of_experts = of_rows * assigned.gate.unsqueeze(1)
    given = [BackwardInputs(found.experts[:-1], of_experts, penalty.of_layers, strength)]
    blocks = [(0, expert, start, end) for expert, start, end in blocks_of(assigned.counts)]
    if len(found.gate) > 1:
        of_layers = [of_rows.new_empty(0)] * (len(found.gate) - 1)
        if any(spec.layers):
            of_layers[-1] = _logits_gradient(assigned, gating, penalty.of_gate)
        of_logits = _logits_gradient(assigned, gating, (of_rows * found.experts[-1]).sum(1))
        given.append(BackwardInputs(found.gate[:-1], of_logits, of_layers, strength))
        blocks.append((1, 0, 0, of_logits.size(0)))
    return given, blocks


@scripted
def _stops(kl: Tensor, rules: Rules) -> bool:
    """Whether the policy has gone too far from the one that collected the samples."""
    return rules.max_kl > 0 and float(kl) > rules.max_kl


@scripted
def _count_step(network: FusedNetwork, counts: list[int]) -> list[int]:
    """Count a step of all parameters; the experts without rows that Adam still moves."""
    count_step(network.counters)
    mlp = network.mlps[0]
    return idle_experts(network.idle, counts, mlp.first, mlp.second, network.adam.beta2)


@scripted
def _take_step(step: _Step) -> tuple[list[Tensor], Tensor, Tensor]:
    """Statistics, the penalty, and what it was multiplied by."""
    network, gating, samples, rules, spec, num_lanes, regressions = step
    predicted: list[torch.jit.Future[Predicted]] = []
    begun: list[torch.jit.Future[Penalty]] = []
    elsewhere: list[torch.jit.Future[list[Tensor]]] = []
    if num_lanes > 1:  # beside the gate
        for regression in regressions:
            predicted.append(torch.jit.fork(predict, regression))  # type: ignore[reportArgumentType]
    found = mixture_pass([mlp.layers for mlp in network.mlps], gating, samples.observation, num_lanes)
    assigned = found.assigned
    if num_lanes > 1:  # beside the loss
        if any(spec.layers):
            begun.append(torch.jit.fork(penalty_of, found.experts[1:-1], assigned, spec))  # type: ignore[reportArgumentType]
        for regression, before in zip(regressions, predicted):  # noqa: B905
            elsewhere.append(torch.jit.fork(finish_regression, regression, before))  # type: ignore[reportArgumentType]
    loss, statistics, of_rows = _loss(network, found, samples, rules)
    penalty = torch.jit.wait(begun[0]) if len(begun) > 0 else penalty_of(found.experts[1:-1], assigned, spec)
    strength = strength_of(penalty.value, loss, spec)
    given, blocks = _backward_inputs(found, gating, of_rows, penalty, spec, strength)
    swept = backward_sweep(network, given, blocks, 2 if spec.mode == "grad" else 1, num_lanes)
    products = inner_products(swept)
    for gradient in network.of_head:
        products[0, 0].add_(gradient.square().sum())
    norm, factors, relative = step_factors(products, spec, rules.max_norm)
    if not _stops(mean_kl(statistics), rules):
        idle = _count_step(network, assigned.counts)
        if num_lanes > 1:
            elsewhere.append(torch.jit.fork(update_idle_experts, network, idle))  # type: ignore[reportArgumentType]
        update_sweep(network, blocks, swept, factors, num_lanes)
        if num_lanes == 1:
            update_idle_experts(network, idle)
    statistics.append(norm)
    for other in elsewhere:
        statistics.extend(torch.jit.wait(other))
    if num_lanes == 1:
        for regression in regressions:
            statistics.extend(regression_step(regression))
    return statistics, penalty.value, relative if spec.mode == "grad" else strength


@scripted
def _take_steps(step: _Step, order: list[Tensor]) -> tuple[StepResults, list[list[int]]]:
    """Minibatch after minibatch, each the samples of these rows; and each expert's idle steps after them."""
    every, rules, rate = step.samples, step.rules, step.network.adam.rate
    each: list[Tensor] = []
    penalty = strength = torch.zeros_like(every.log_prob[0])
    for index in order:
        samples, network = samples_of(every, index), with_rate(step.network, rate)
        regressions = [of_minibatch(other, samples.observation, index, rate) for other in step.regressions]
        part = _Step(network, step.gating, samples, rules, step.spec, step.num_lanes, regressions)
        statistics, penalty, strength = _take_step(part)
        each.append(torch.stack(statistics))
        if _stops(mean_kl(statistics), rules):
            break
        if rules.kl_target > 0:
            rate = adapt_learning_rate(rate, float(mean_kl(statistics)), rules.kl_target, rules.rate_bounds)
    return StepResults(torch.stack(each), penalty, strength, rate), step.network.idle


@scripted
def _start_steps(step: _Step, order: list[Tensor]) -> torch.jit.Future[tuple[StepResults, list[list[int]]]]:
    return torch.jit.fork(_take_steps, step, order)  # type: ignore[reportReturnType]
