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
from sphere_rl.kernels.adam import REST, clip_scale, count_step, idle_experts
from sphere_rl.kernels.backward import BackwardInputs, Block, inner_products
from sphere_rl.kernels.gram import centred_gram, gram_gradients
from sphere_rl.kernels.mixture import MixturePass, mixed_output, mixture_pass
from sphere_rl.kernels.routing import Assignments, Gating, blocks_of
from sphere_rl.kernels.script import SCRIPTED, scripted
from sphere_rl.kernels.threads import begin, lanes
from sphere_rl.learner.fused import (
    FusedNetwork,
    backward_sweep,
    fused_network,
    update_idle_experts,
    update_sweep,
    with_rate,
)
from sphere_rl.learner.losses import Samples, adapt_learning_rate, categorical_loss, gaussian_loss, samples_of
from sphere_rl.learner.optimizer import ExpertAdam
from sphere_rl.learner.value_step import (
    Predicted,
    Regression,
    finish_regression,
    of_minibatch,
    predict,
    regression_step,
)


class FeaturePenalty(NamedTuple):
    """How far the Grams of some hidden layers are from isotropic, summed, and how that joins the loss."""

    layers: list[bool]
    """Of each hidden layer of the experts, whether its Gram is penalised; empty: there is no penalty."""
    mode: str
    """What it is multiplied by. ``fixed``: share. ``loss``: share · |loss| / penalty. ``grad``: share · ‖g‖ / ‖g_p‖,
    with g and g_p the gradients of loss and penalty.
    """
    share: float
    pcgrad: bool
    """Mode grad: take from g_p first what opposes g."""
    free: bool
    """The scale-free penalty, not the literal one."""


NO_PENALTY = FeaturePenalty([], "fixed", 0.0, pcgrad=False, free=False)
"""Where no method has one."""


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
    rest: int = REST
    """Steps without rows after which Adam leaves an expert alone."""


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


class _Penalty(NamedTuple):
    """The penalties of all penalised layers, summed, and their derivatives."""

    value: Tensor
    of_gate: Tensor
    """For the routing weights of the experts' rows [M]."""
    of_layers: list[Tensor]
    """For what each layer puts out [M, H]; empty where zero."""


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
def _penalty(features: list[Tensor], found: Assignments, spec: FeaturePenalty) -> _Penalty:
    """The penalty of hidden layers with these features [M, H]."""
    total, of_gate = found.gate.new_zeros([]), torch.zeros_like(found.gate)
    of_layers = [found.gate.new_empty(0)] * (len(features) + 1)
    n, experts, blocks = found.weights.size(0), found.weights.size(1), blocks_of(found.counts)
    for layer in range(len(spec.layers)):
        if spec.layers[layer]:
            gram = centred_gram(features[layer], found.gate, found.sample, blocks, n, experts, spec.free)
            of_values, of_weights = gram_gradients(found.gate, found.sample, blocks, gram)
            total, of_layers[layer] = total + gram.penalty, of_values
            of_gate += of_weights
    return _Penalty(total, of_gate, of_layers)


@scripted
def _factors(products: Tensor, spec: FeaturePenalty, max_norm: float) -> tuple[Tensor, list[Tensor], Tensor]:
    """How the gradients g of the loss and g_p of the penalty add up to a step's, from their inner products [k, k].

    In mode grad k is 2. With ``pcgrad``, c = min(0, ⟨g, g_p⟩) / ‖g‖² is taken from g_p first, else c = 0:

        s = share · ‖g‖ / ‖g_p − c g‖,   step = (1 − s c) g + s g_p,
        ‖step‖² = (1 − s c)² ‖g‖² + 2 s (1 − s c) ⟨g, g_p⟩ + s² ‖g_p‖²,

    In the other modes k is 1, and g holds both. Gives ‖step‖; what each gradient is multiplied by so that the step is
    no longer than ``max_norm``; and s.
    """
    of_loss, cross, of_penalty = products[0, 0], products[0, -1], products[-1, -1]
    kept, strength, square = torch.ones_like(cross), torch.zeros_like(cross), of_loss
    if spec.mode == "grad":
        along = torch.zeros_like(cross)
        if spec.pcgrad:
            along = cross.clamp(max=0.0) / (of_loss + 1e-8)
        rest = of_penalty - along * (2 * cross - along * of_loss)
        strength = spec.share * of_loss.sqrt() / (rest.clamp(min=0.0).sqrt() + 1e-8)
        kept = 1 - strength * along
        square = kept * (kept * of_loss + 2 * strength * cross) + strength.square() * of_penalty
    norm = square.clamp(min=0.0).sqrt()
    scale = clip_scale(norm, max_norm)
    return norm, [kept / scale, strength / scale][: products.size(0)], strength


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
def _strength(penalty: Tensor, loss: Tensor, spec: FeaturePenalty) -> Tensor:
    """What the penalty is multiplied by before the sweeps; in mode grad that has to wait for both norms."""
    if spec.mode == "grad":
        return torch.ones_like(loss)
    if spec.mode == "loss":
        return spec.share * loss.abs() / (penalty + 1e-8)
    return torch.full_like(loss, spec.share)


@scripted
def _backward_inputs(
    found: MixturePass, gating: Gating, of_rows: Tensor, penalty: _Penalty, spec: FeaturePenalty, strength: Tensor
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
def _count_step(network: FusedNetwork, counts: list[int], rules: Rules) -> list[int]:
    """Count a step of all parameters; the experts without rows that Adam still moves."""
    count_step(network.counters)
    mlp = network.mlps[0]
    return idle_experts(network.idle, counts, mlp.first, mlp.second, network.adam.beta2, rules.rest)


@scripted
def _take_step(step: _Step) -> tuple[list[Tensor], Tensor, Tensor]:
    """Statistics, the penalty, and what it was multiplied by."""
    network, gating, samples, rules, spec, num_lanes, regressions = step
    predicted: list[torch.jit.Future[Predicted]] = []
    begun: list[torch.jit.Future[_Penalty]] = []
    elsewhere: list[torch.jit.Future[list[Tensor]]] = []
    if num_lanes > 1:  # beside the gate
        for regression in regressions:
            predicted.append(torch.jit.fork(predict, regression))  # type: ignore[reportArgumentType]
    found = mixture_pass([mlp.layers for mlp in network.mlps], gating, samples.observation, num_lanes)
    assigned = found.assigned
    if num_lanes > 1:  # beside the loss
        if any(spec.layers):
            begun.append(torch.jit.fork(_penalty, found.experts[1:-1], assigned, spec))  # type: ignore[reportArgumentType]
        for regression, before in zip(regressions, predicted):  # noqa: B905
            elsewhere.append(torch.jit.fork(finish_regression, regression, before))  # type: ignore[reportArgumentType]
    loss, statistics, of_rows = _loss(network, found, samples, rules)
    penalty = torch.jit.wait(begun[0]) if len(begun) > 0 else _penalty(found.experts[1:-1], assigned, spec)
    strength = _strength(penalty.value, loss, spec)
    given, blocks = _backward_inputs(found, gating, of_rows, penalty, spec, strength)
    swept = backward_sweep(network, given, blocks, 2 if spec.mode == "grad" else 1, num_lanes)
    products = inner_products(swept)
    for gradient in network.of_head:
        products[0, 0].add_(gradient.square().sum())
    norm, factors, relative = _factors(products, spec, rules.max_norm)
    if not _stops(statistics[1], rules):
        idle = _count_step(network, assigned.counts, rules)
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
        if _stops(statistics[1], rules):
            break
        if rules.kl_target > 0:
            rate = adapt_learning_rate(rate, float(statistics[1]), rules.kl_target, rules.rate_bounds)
    return StepResults(torch.stack(each), penalty, strength, rate), step.network.idle


@scripted
def _start_steps(step: _Step, order: list[Tensor]) -> torch.jit.Future[tuple[StepResults, list[list[int]]]]:
    return torch.jit.fork(_take_steps, step, order)  # type: ignore[reportReturnType]
