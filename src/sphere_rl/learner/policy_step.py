"""Steps of actor and critic without autograd, those of many minibatches as one TorchScript call.

Two threads wait for each other at Python's lock between their operations, and after every product Python itself has to
come back into the cache. What runs here needs Python only to begin and to end: that is what a second lane
(`sphere_rl.kernels.threads`) does best, and one thread alone saves autograd's bookkeeping and most of the memory
traffic of gradients (`sphere_rl.kernels.backward`). Only for networks that are plain chains of layers
(`has_fused_step`); all others go through autograd, with the same result.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from sphere_rl.experts.network import Actor, MoENetwork
from sphere_rl.kernels.adam import REST, clip_scale, count_step, idle_experts
from sphere_rl.kernels.backward import Block, Given, inner_products
from sphere_rl.kernels.gram import centred_gram, gram_gradients
from sphere_rl.kernels.mixture import Passed, mixed, mixture_pass
from sphere_rl.kernels.routing import Assigned, Gating, blocks_of
from sphere_rl.kernels.script import SCRIPTED, scripted
from sphere_rl.kernels.threads import begin, lanes
from sphere_rl.learner.fused import Learner, at_rate, down, drift, learner_of, up
from sphere_rl.learner.losses import Samples, adapt_learning_rate, categorical_loss, gaussian_loss, samples_of
from sphere_rl.learner.optimizer import ExpertAdam
from sphere_rl.learner.value_step import Predicted, Regression, part_of, predict, regress, settle


class FeaturePenalty(NamedTuple):
    """How far the Grams of some hidden layers are from isotropic, summed, and how that joins the loss.

    mode ``fixed``: share; ``loss``: share · |loss| / penalty; ``grad``: the penalty's gradient is added to g, times
    share · ‖g‖ / ‖g_penalty‖, with ``pcgrad`` without what opposes g. ``free``: scale-free penalties.
    """

    layers: list[bool]
    mode: str
    share: float
    pcgrad: bool
    free: bool


NO_PENALTY = FeaturePenalty([], "fixed", 0.0, pcgrad=False, free=False)
"""Where no method has one."""


class Rules(NamedTuple):
    """PPO's clip, the weight of its entropy, and the longest gradient; the KL that the learning rate follows, if it is
    above 0, and the rates that it stays between; the KL above which the policy takes no more steps, if it is above 0;
    when experts rest.
    """

    clip: float
    entropy_coefficient: float
    max_norm: float
    kl_target: float = 0.0
    rate_bounds: tuple[float, float] = (0.0, 0.0)
    max_kl: float = 0.0
    rest: int = REST


class Improved(NamedTuple):
    """Of U minibatches, policy loss, KL, share of clipped ratios, entropy, and the gradient's norm before it was
    clipped; of a regression beside them, mean square and norm: [U, …]. Of the last one, the penalty and what it was
    multiplied by. The learning rate that follows.
    """

    statistics: Tensor
    penalty: Tensor
    strength: Tensor
    rate: float


class _Improvement(NamedTuple):
    """A policy's step on a minibatch, before it is taken, and at most one of a critic beside it."""

    learner: Learner
    gating: Gating
    samples: Samples
    rules: Rules
    form: FeaturePenalty
    num_lanes: int
    regressions: list[Regression]


_Penalised = tuple[Tensor, Tensor, list[Tensor]]
"""Penalties, summed, and their gradients for the gate's weights [M] and for each layer's rows, empty where zero."""


def has_fused_step(network: MoENetwork) -> bool:
    """Whether a network's gradient steps can be a TorchScript call."""
    return SCRIPTED and network.has_kernel_gradient


@torch.inference_mode()
def improve(
    actor: Actor,
    optimizer: ExpertAdam,
    samples: Samples,
    order: Sequence[Int[Tensor, "_"]],
    rules: Rules,
    penalty: FeaturePenalty,
    keep: bool,
    regressions: Sequence[Regression] = (),
) -> Improved:
    """A step on each minibatch, the samples of these rows, of a plain actor on PPO's loss and a penalty.

    Beside each, a step of at most one regression on the same rows. ``keep``: let parameters carry their gradients. The
    first minibatch whose KL is above `Rules.max_kl` is the last: the actor takes no step on it, the regression does.
    """
    learner = learner_of(actor, optimizer, keep, actor.head)
    step = _Improvement(learner, actor.gating, samples, rules, penalty, lanes(), list(regressions))
    improved, idle = begin(_improve_on, _start_improving, step, list(order))()
    for own, steps in zip(learner.idle, idle, strict=True):
        own[:] = steps
    return Improved(*improved)  # TorchScript gives a tuple of its own


@scripted
def _penalise(features: list[Tensor], found: Assigned, form: FeaturePenalty) -> _Penalised:
    """The penalty of hidden layers with these features."""
    penalty, of_gate = found.gate.new_zeros([]), torch.zeros_like(found.gate)
    of_rows = [found.gate.new_empty(0)] * (len(features) + 1)
    n, experts, blocks = found.weights.size(0), found.weights.size(1), blocks_of(found.counts)
    for layer in range(len(form.layers)):
        if form.layers[layer]:
            own = centred_gram(features[layer], found.gate, found.sample, blocks, n, experts, form.free)
            of_values, of_weights = gram_gradients(found.gate, found.sample, blocks, own)
            penalty, of_rows[layer] = penalty + own.penalty, of_values
            of_gate += of_weights
    return penalty, of_gate, of_rows


@scripted
def _clip(products: Tensor, form: FeaturePenalty, max_norm: float) -> tuple[Tensor, list[Tensor], Tensor]:
    """From the inner products [k, k] of the gradients, the norm of what the step would be without a clip, what each
    gradient is multiplied by in the step, and, in mode grad, the penalty's without the clip.
    """
    of_loss, cross, of_penalty = products[0, 0], products[0, -1], products[-1, -1]
    kept, strength, square = torch.ones_like(cross), torch.zeros_like(cross), of_loss
    if form.mode == "grad":
        along = torch.zeros_like(cross)
        if form.pcgrad:  # the penalty's gradient less this multiple of the loss's
            along = cross.clamp(max=0.0) / (of_loss + 1e-8)
        rest = of_penalty - along * (2 * cross - along * of_loss)
        strength = form.share * of_loss.sqrt() / (rest.clamp(min=0.0).sqrt() + 1e-8)
        kept = 1 - strength * along
        square = kept * (kept * of_loss + 2 * strength * cross) + strength.square() * of_penalty
    norm = square.clamp(min=0.0).sqrt()
    scale = clip_scale(norm, max_norm)
    return norm, [kept / scale, strength / scale][: products.size(0)], strength


@scripted
def _logits_gradient(found: Assigned, gating: Gating, grad_gate: Tensor) -> Tensor:
    """Through the softmax of the selected logits; of the others, weight and gradient are zero."""
    grad, experts = torch.zeros_like(found.weights), found.weights.size(1)
    grad.view(-1).index_copy_(0, found.sample * experts + found.expert, grad_gate)
    weights, grad = found.weights[:, gating.shared :], grad[:, gating.shared :]
    return weights * (grad - (weights * grad).sum(1, keepdim=True)) / gating.temperature


@scripted
def _loss(learner: Learner, found: Passed, samples: Samples, rules: Rules) -> tuple[Tensor, list[Tensor], Tensor]:
    """Loss, statistics, and ∂loss for the weighted sum of each row's experts; the head's gradients are filled."""
    output = mixed(found, samples.observation.size(0))
    if len(learner.head) > 0:
        loss, statistics, gradients = gaussian_loss(
            output, learner.head[0], samples, rules.clip, rules.entropy_coefficient
        )
        learner.of_head[0].copy_(gradients[1])
    else:
        loss, statistics, gradients = categorical_loss(output, samples, rules.clip, rules.entropy_coefficient)
    return loss, statistics, gradients[0].index_select(0, found.assigned.sample)


@scripted
def _weigh(penalised: _Penalised, loss: Tensor, form: FeaturePenalty) -> Tensor:
    """What the penalty is multiplied by before the sweeps; in mode grad that has to wait for both norms."""
    if form.mode == "grad":
        return torch.ones_like(loss)
    if form.mode == "loss":
        return form.share * loss.abs() / (penalised[0] + 1e-8)
    return torch.full_like(loss, form.share)


@scripted
def _prepare(
    found: Passed, gating: Gating, of_rows: Tensor, penalised: _Penalised, form: FeaturePenalty, strength: Tensor
) -> tuple[list[Given], list[Block]]:
    """What both sweeps read, and the blocks of rows of experts and gate."""
    assigned, (_, of_gate, of_penalty) = found.assigned, penalised
    given = [Given(found.experts[:-1], of_rows * assigned.gate.unsqueeze(1), of_penalty, strength)]
    blocks = [(0, expert, start, end) for expert, start, end in blocks_of(assigned.counts)]
    if len(found.gate) > 1:
        of_layers = [of_gate.new_empty(0)] * (len(found.gate) - 1)
        if any(form.layers):
            of_layers[-1] = _logits_gradient(assigned, gating, of_gate)
        of_logits = _logits_gradient(assigned, gating, (of_rows * found.experts[-1]).sum(1))
        given.append(Given(found.gate[:-1], of_logits, of_layers, strength))
        blocks.append((1, 0, 0, of_logits.size(0)))
    return given, blocks


@scripted
def _stops(kl: Tensor, rules: Rules) -> bool:
    """Whether the policy has gone too far from the one that collected the samples."""
    return rules.max_kl > 0 and float(kl) > rules.max_kl


@scripted
def _count(learner: Learner, counts: list[int], rules: Rules) -> list[int]:
    """Count a step of all parameters; the experts without rows that Adam still moves."""
    count_step(learner.counters)
    mlp = learner.mlps[0]
    return idle_experts(learner.idle, counts, mlp.first, mlp.second, learner.adam.beta2, rules.rest)


@scripted
def _improve(step: _Improvement) -> tuple[list[Tensor], Tensor, Tensor]:
    """Statistics, the penalty, and what it was multiplied by."""
    learner, gating, samples, rules, form, num_lanes, regressions = step
    predicted: list[torch.jit.Future[Predicted]] = []
    begun: list[torch.jit.Future[_Penalised]] = []
    elsewhere: list[torch.jit.Future[list[Tensor]]] = []
    if num_lanes > 1:  # beside the gate
        for regression in regressions:
            predicted.append(torch.jit.fork(predict, regression))  # type: ignore[reportArgumentType]
    found = mixture_pass([mlp.layers for mlp in learner.mlps], gating, samples.observation, num_lanes)
    assigned = found.assigned
    if num_lanes > 1:  # beside the loss
        if any(form.layers):
            begun.append(torch.jit.fork(_penalise, found.experts[1:-1], assigned, form))  # type: ignore[reportArgumentType]
        for regression, before in zip(regressions, predicted):  # noqa: B905
            elsewhere.append(torch.jit.fork(settle, regression, before))  # type: ignore[reportArgumentType]
    loss, statistics, of_rows = _loss(learner, found, samples, rules)
    penalised = torch.jit.wait(begun[0]) if len(begun) > 0 else _penalise(found.experts[1:-1], assigned, form)
    strength = _weigh(penalised, loss, form)
    given, blocks = _prepare(found, gating, of_rows, penalised, form, strength)
    swept = down(learner, given, blocks, 2 if form.mode == "grad" else 1, num_lanes)
    products = inner_products(swept)
    for gradient in learner.of_head:
        products[0, 0].add_(gradient.square().sum())
    norm, factors, relative = _clip(products, form, rules.max_norm)
    if not _stops(statistics[1], rules):
        idle = _count(learner, assigned.counts, rules)
        if num_lanes > 1:
            elsewhere.append(torch.jit.fork(drift, learner, idle))  # type: ignore[reportArgumentType]
        up(learner, given, blocks, swept, factors, num_lanes)
        if num_lanes == 1:
            drift(learner, idle)
    statistics.append(norm)
    for other in elsewhere:
        statistics.extend(torch.jit.wait(other))
    if num_lanes == 1:
        for regression in regressions:
            statistics.extend(regress(regression))
    return statistics, penalised[0], relative if form.mode == "grad" else strength


@scripted
def _improve_on(step: _Improvement, order: list[Tensor]) -> tuple[Improved, list[list[int]]]:
    """Minibatch after minibatch."""
    every, rules, rate = step.samples, step.rules, step.learner.adam.rate
    each: list[Tensor] = []
    penalty = strength = torch.zeros_like(every.log_prob[0])
    for index in order:
        samples, learner = samples_of(every, index), at_rate(step.learner, rate)
        regressions = [part_of(other, samples.observation, index, rate) for other in step.regressions]
        part = _Improvement(learner, step.gating, samples, rules, step.form, step.num_lanes, regressions)
        statistics, penalty, strength = _improve(part)
        each.append(torch.stack(statistics))
        if _stops(statistics[1], rules):
            break
        if rules.kl_target > 0:
            rate = adapt_learning_rate(rate, float(statistics[1]), rules.kl_target, rules.rate_bounds)
    return Improved(torch.stack(each), penalty, strength, rate), step.learner.idle


@scripted
def _start_improving(step: _Improvement, order: list[Tensor]) -> torch.jit.Future[tuple[Improved, list[list[int]]]]:
    return torch.jit.fork(_improve_on, step, order)  # type: ignore[reportReturnType]
