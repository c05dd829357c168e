"""Steps of actor and critic without autograd, each one TorchScript call.

Two threads wait for each other at Python's lock between their operations, and after every product Python itself has to
come back into the cache. What runs here needs Python only to begin and to end: that is what a second lane
(`sphere_rl.lanes`) does best, and one thread alone saves autograd's bookkeeping and most of the memory traffic of
gradients (`sphere_rl.sweeps`). Only for networks that are plain chains of layers (`is_plain`); all others go through
autograd, with the same result.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from sphere_rl.chain import Forward, begin, forward_blocks, split_blocks
from sphere_rl.experts import ExpertMLP
from sphere_rl.lanes import lanes, split_rows
from sphere_rl.networks import Actor, MoENetwork
from sphere_rl.optimizer import REST, AdamStep, ExpertAdam, adam_step, clip_scale, count_step, idle_experts
from sphere_rl.routed_gram import penalty_and_gradient
from sphere_rl.routing import Assigned, Gating, blocks_of, route
from sphere_rl.scripting import SCRIPTED, scripted
from sphere_rl.surrogate import Samples, categorical_loss, gaussian_loss
from sphere_rl.sweeps import Block, Given, Mlp, ascend, descend


class FeaturePenalty(NamedTuple):
    """SPHERE's joint penalties of some hidden layers, summed, and what they are multiplied by.

    mode ``fixed``: share; ``loss``: share · |loss| / penalty; ``grad``: the penalty's gradient is added to g, times
    share · ‖g‖ / ‖g_penalty‖, with ``pcgrad`` without what opposes g.
    """

    layers: list[bool]
    mode: str
    share: float
    pcgrad: bool


NO_PENALTY = FeaturePenalty([], "fixed", 0.0, pcgrad=False)
"""Where no method has one."""


class Rules(NamedTuple):
    """PPO's clip, the weight of its entropy, and the longest gradient; when experts rest."""

    clip: float
    entropy_coefficient: float
    max_norm: float
    rest: int = REST


class Improved(NamedTuple):
    """Policy loss, KL, share of clipped ratios and entropy; the gradient's norm before it was clipped; the penalty, and
    what it was multiplied by; of a regression beside it, mean square and norm.
    """

    statistics: list[Tensor]
    norm: Tensor
    penalty: Tensor
    strength: Tensor
    regression: list[Tensor]


class _Learner(NamedTuple):
    """A network's MLPs, experts before the gate, and Adam's step of all that is not their weights, with its gradients.

    idle: of each layer of the experts, each expert's steps without rows; empty where there is only one. head: what the
    policy has beside its networks, with its gradients.
    """

    mlps: list[Mlp]
    idle: list[list[int]]
    head: list[Tensor]
    of_head: list[Tensor]
    adam: AdamStep
    counters: list[Tensor]


class Regression(NamedTuple):
    """A network's step on coefficient · mean (output − target)², before it is taken."""

    learner: _Learner
    observation: Tensor
    target: Tensor
    coefficient: float
    max_norm: float


class _Plan(NamedTuple):
    """A learner and the parameters behind it: each MLP's weights, and all else."""

    learner: _Learner
    weights: list[list[Parameter]]
    rest: list[Parameter]


_Penalised = tuple[Tensor, Tensor, list[Tensor]]
"""Penalties, summed, and their gradients for the gate's weights [M] and for each layer's rows, empty where zero."""


def is_plain(network: MoENetwork) -> bool:
    """Whether a network is linear layers and ReLU, with nothing in between."""
    return SCRIPTED and all(
        type(mlp) is ExpertMLP
        and mlp.is_chain
        and not mlp._forward_hooks
        and not any(layer.spectral_norm for layer in mlp.layers)
        for mlp in (network.gate, network.experts)
        if mlp is not None
    )


@torch.inference_mode()
def improve(
    actor: Actor,
    optimizer: ExpertAdam,
    samples: Samples,
    rules: Rules,
    penalty: FeaturePenalty,
    keep: bool,
    regressions: Sequence[Regression] = (),
) -> Improved:
    """One step of a plain actor on PPO's loss and a penalty, and beside it at most one of a critic.

    ``keep``: let parameters carry their gradients.
    """
    plan = optimizer.kept(partial(_plan, actor, list(actor.head.parameters()), optimizer))
    learner = _learner(plan, optimizer, keep)
    steps = learner, actor.gating, samples, rules, penalty, lanes(), list(regressions)
    improved, idle = begin(_improve, _start_improving, *steps)()
    for own, steps in zip(plan.learner.idle, idle, strict=True):
        own[:] = steps
    return Improved(*improved)  # TorchScript gives a tuple of its own


def regression(
    network: MoENetwork,
    optimizer: ExpertAdam,
    observation: Float[Tensor, "N D"],
    target: Float[Tensor, "N"],
    coefficient: float,
    max_norm: float,
    keep: bool,
) -> Regression:
    """A step of a plain network of a single expert; ``keep``: let parameters carry their gradients."""
    learner = _learner(optimizer.kept(partial(_plan, network, [], optimizer)), optimizer, keep)
    return Regression(learner, observation, target, coefficient, max_norm)


@torch.inference_mode()
def begin_regression(step: Regression) -> Callable[[], list[Tensor]]:
    """Begin a step; call what this returns for the mean square and the gradient's norm."""
    return begin(_regress, _start_regression, step)


@torch.inference_mode(False)
@torch.no_grad()
def _plan(network: MoENetwork, head: list[Parameter], optimizer: ExpertAdam) -> _Plan:
    parts = [mlp for mlp in (network.experts, network.gate) if mlp is not None]
    weights = [[layer.weight for layer in mlp.layers] for mlp in parts]
    biases = [[layer.bias for layer in mlp.layers] for mlp in parts]
    rest = [*chain.from_iterable(biases), *head]
    gradients = {parameter: torch.zeros_like(parameter) for parameter in rest}
    states = [optimizer.state_of(parameter) for parameter in rest]
    first, second, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
    own = [parameter.detach() for parameter in rest]
    adam = AdamStep(own, list(gradients.values()), first, second, steps, 0.0, 0.0, 0.0, 0.0)
    mlps = [
        _mlp(optimizer, of_weights, of_biases, [gradients[bias] for bias in of_biases])
        for of_weights, of_biases in zip(weights, biases, strict=True)
    ]
    idle = [optimizer.idle_steps(weight) for weight in weights[0] if len(weight) > 1]
    counters = [*adam.steps, *chain.from_iterable(mlp.steps for mlp in mlps)]
    of_head = [gradients[parameter] for parameter in head]
    return _Plan(_Learner(mlps, idle, own[len(own) - len(head) :], of_head, adam, counters), weights, rest)


def _mlp(optimizer: ExpertAdam, weights: list[Parameter], biases: list[Parameter], grad_biases: list[Tensor]) -> Mlp:
    experts = zip(*(optimizer.experts_of(weight) for weight in weights), strict=True)
    of_experts = [[list(tensors) for tensors in zip(*layers, strict=True)] for layers in experts]
    own, first, second = map(list, zip(*of_experts, strict=True))
    whole, steps = [weight.detach() for weight in weights], [optimizer.state_of(weight)["step"] for weight in weights]
    return Mlp(whole, [bias.detach() for bias in biases], own, first, second, steps, grad_biases, [])


def _learner(plan: _Plan, optimizer: ExpertAdam, keep: bool) -> _Learner:
    """Adam's present numbers, and with ``keep`` memory for gradients that the parameters carry from now on."""
    (group,) = optimizer.param_groups
    learner, numbers = plan.learner, optimizer.numbers(group)
    learner = learner._replace(adam=AdamStep(*learner.adam[:5], *numbers))
    if not keep:
        return learner
    for parameter, gradient in zip(plan.rest, learner.adam.gradients, strict=True):
        parameter.grad = gradient
    of_weights = [[_zeroed(weight) for weight in weights] for weights in plan.weights]
    kept = [mlp._replace(grad_weights=own) for mlp, own in zip(learner.mlps, of_weights, strict=True)]
    return learner._replace(mlps=kept)


@torch.inference_mode(False)
def _zeroed(parameter: Parameter) -> Tensor:
    parameter.grad = torch.zeros_like(parameter, requires_grad=False)
    return parameter.grad


@scripted
def _forward(mlp: Mlp, rows: Tensor, blocks: list[tuple[int, int, int]], num_lanes: int) -> list[Tensor]:
    """Rows and the output of each layer."""
    outputs = [rows]
    for bias in mlp.biases:
        outputs.append(rows.new_empty(rows.size(0), bias.size(1)))
    mine, others = split_blocks(blocks, num_lanes)
    forward_blocks(mine, others, Forward(outputs, mlp.whole, mlp.biases))
    return outputs


@scripted
def _penalise(features: list[Tensor], found: Assigned, layers: list[bool]) -> _Penalised:
    """The penalty of these hidden layers."""
    penalty, of_gate = found.gate.new_zeros([]), torch.zeros_like(found.gate)
    of_rows = [found.gate.new_empty(0)] * (len(features) + 1)
    n, experts, blocks = found.weights.size(0), found.weights.size(1), blocks_of(found.counts)
    for layer in range(len(layers)):
        if layers[layer]:
            own, grad = penalty_and_gradient(features[layer], found.gate, found.sample, blocks, n, experts)
            penalty = penalty + own
            of_gate += (grad * features[layer]).sum(1)
            of_rows[layer] = grad.mul_(found.gate.unsqueeze(1))
    return penalty, of_gate, of_rows


@scripted
def _strength(products: Tensor, form: FeaturePenalty) -> tuple[Tensor, Tensor, Tensor]:
    """Mode grad, from the inner products [2, 2] of loss's and penalty's gradients: what each is multiplied by in the
    step, and the square of the sum's norm.
    """
    of_loss, cross, of_penalty = products[0, 0], products[0, 1], products[1, 1]
    along = torch.zeros_like(cross)
    if form.pcgrad:  # the penalty's gradient less this multiple of the loss's
        along = cross.clamp(max=0.0) / (of_loss + 1e-8)
    rest = of_penalty - along * (2 * cross - along * of_loss)
    strength = form.share * of_loss.sqrt() / (rest.clamp(min=0.0).sqrt() + 1e-8)
    kept = 1 - strength * along
    return kept, strength, kept * (kept * of_loss + 2 * strength * cross) + strength.square() * of_penalty


@scripted
def _take(
    learner: _Learner, given: list[Given], blocks: list[Block], form: FeaturePenalty, max_norm: float, num_lanes: int
) -> tuple[Tensor, Tensor]:
    """Both sweeps and Adam: the gradient's norm, and what the penalty's gradient was multiplied by in mode grad."""
    k, mlps = 2 if form.mode == "grad" else 1, learner.mlps
    inner: list[Tensor] = []
    signals: list[Tensor] = []
    gradients: list[Tensor] = []
    signals_there: list[Tensor] = []
    gradients_there: list[Tensor] = []
    for mlp in mlps:
        inner.append(mlp.whole[0].new_zeros(len(mlp.weights), k, k))
        for grad in mlp.grad_biases:
            grad.zero_()
    positions, positions_there = split_rows([end - start for _, _, start, end in blocks], num_lanes)
    mine, others = [blocks[position] for position in positions], [blocks[position] for position in positions_there]
    there: list[torch.jit.Future[int]] = []
    if len(others) > 0:
        there.append(torch.jit.fork(descend, others, mlps, given, k, inner, signals_there, gradients_there))  # type: ignore[reportArgumentType]
    descend(mine, mlps, given, k, inner, signals, gradients)
    for other in there:
        torch.jit.wait(other)
    products = torch.cat(inner).sum(0)
    for gradient in learner.of_head:
        products[0, 0].add_(gradient.square().sum())
    kept, strength, square = torch.ones_like(products[0, 0]), torch.zeros_like(products[0, 0]), products[0, 0]
    if form.mode == "grad":
        kept, strength, square = _strength(products, form)
    norm = square.clamp(min=0.0).sqrt()
    scale = clip_scale(norm, max_norm)
    factors = [kept / scale, strength / scale][:k]
    for gradient in learner.of_head:
        gradient.mul_(factors[0])
    count_step(learner.counters)
    there.clear()
    if len(others) > 0:
        there.append(torch.jit.fork(ascend, others, mlps, given, signals_there, gradients_there, factors, learner.adam))  # type: ignore[reportArgumentType]
    ascend(mine, mlps, given, signals, gradients, factors, learner.adam)
    for other in there:
        torch.jit.wait(other)
    adam_step(learner.adam, None)
    return norm, strength


@scripted
def _logits_gradient(found: Assigned, gating: Gating, grad_gate: Tensor) -> Tensor:
    """Through the softmax of the selected logits; of the others, weight and gradient are zero."""
    grad, experts = torch.zeros_like(found.weights), found.weights.size(1)
    grad.view(-1).index_copy_(0, found.sample * experts + found.expert, grad_gate)
    weights, grad = found.weights[:, gating.shared :], grad[:, gating.shared :]
    return weights * (grad - (weights * grad).sum(1, keepdim=True)) / gating.temperature


@scripted
def _regress(step: Regression) -> list[Tensor]:
    n, target = step.target.size(0), step.target
    outputs = _forward(step.learner.mlps[0], step.observation, [(0, 0, n)], 1)
    error = outputs[-1].squeeze(1) - target
    of_error = (error * (2 * step.coefficient / n)).unsqueeze(1)
    given = Given(outputs[:-1], of_error, [target.new_empty(0)] * (len(outputs) - 1))
    form = FeaturePenalty([], "fixed", 0.0, False)
    norm, _ = _take(step.learner, [given], [(0, 0, 0, n)], form, step.max_norm, 1)
    return [error.square().mean(), norm]


@scripted
def _start_regression(step: Regression) -> torch.jit.Future[list[Tensor]]:
    return torch.jit.fork(_regress, step)  # type: ignore[reportReturnType]


@scripted
def _improve(
    learner: _Learner,
    gating: Gating,
    samples: Samples,
    rules: Rules,
    form: FeaturePenalty,
    num_lanes: int,
    regressions: list[Regression],
) -> tuple[Improved, list[list[int]]]:
    elsewhere: list[torch.jit.Future[list[Tensor]]] = []
    if num_lanes > 1:
        for regression in regressions:
            elsewhere.append(torch.jit.fork(_regress, regression))  # type: ignore[reportArgumentType]
    mlps, rows = learner.mlps, samples.observation
    n, gated = rows.size(0), len(mlps) > 1
    gate_outputs = [rows]
    if gated:
        gate_outputs = _forward(mlps[1], rows, [(0, 0, n)], 1)
        found = route(gate_outputs[-1], gating)
        rows = rows.index_select(0, found.sample)
    else:
        ones, sample = rows.new_ones(n, 1), torch.arange(n, device=rows.device)
        found = Assigned(ones, torch.zeros_like(sample), sample, ones[:, 0], [n])
    blocks = blocks_of(found.counts)
    outputs = _forward(mlps[0], rows, blocks, num_lanes)
    features, layers = outputs[1:-1], form.layers
    begun: list[torch.jit.Future[_Penalised]] = []
    if num_lanes > 1 and any(layers):
        begun.append(torch.jit.fork(_penalise, features, found, layers))  # type: ignore[reportArgumentType]
    gate = found.gate.unsqueeze(1)
    output = rows.new_zeros(n, outputs[-1].size(1)).index_add_(0, found.sample, outputs[-1] * gate)
    if len(learner.head) > 0:
        loss, statistics, of_output = gaussian_loss(
            output, learner.head[0], samples, rules.clip, rules.entropy_coefficient
        )
        learner.of_head[0].copy_(of_output[1])
    else:
        loss, statistics, of_output = categorical_loss(output, samples, rules.clip, rules.entropy_coefficient)
    of_rows = of_output[0].index_select(0, found.sample)
    penalty, of_gate_too, of_penalty = (
        torch.jit.wait(begun[0]) if len(begun) > 0 else _penalise(features, found, layers)
    )
    strength = torch.full_like(loss, form.share)
    if form.mode == "loss":
        strength = form.share * loss.abs() / (penalty + 1e-8)
    if form.mode != "grad":
        for grad in of_penalty:
            grad.mul_(strength)
        of_gate_too.mul_(strength)
    given = [Given(outputs[:-1], of_rows * gate, of_penalty)]
    due = [(0, expert, start, end) for expert, start, end in blocks]
    if gated:
        of_gate_layers = [loss.new_empty(0)] * (len(gate_outputs) - 1)
        if any(layers):
            of_gate_layers[-1] = _logits_gradient(found, gating, of_gate_too)
        of_logits = _logits_gradient(found, gating, (of_rows * outputs[-1]).sum(1))
        given.append(Given(gate_outputs[:-1], of_logits, of_gate_layers))
        due.append((1, 0, 0, n))
    idle, experts = learner.idle, mlps[0]
    for expert in idle_experts(idle, found.counts, experts.first, experts.second, learner.adam.beta2, rules.rest):
        due.append((0, expert, 0, 0))
    norm, relative = _take(learner, given, due, form, rules.max_norm, num_lanes)
    of_regression: list[Tensor] = []
    if num_lanes > 1:
        for other in elsewhere:
            of_regression.extend(torch.jit.wait(other))
    else:
        for regression in regressions:
            of_regression.extend(_regress(regression))
    return Improved(statistics, norm, penalty, relative if form.mode == "grad" else strength, of_regression), idle


@scripted
def _start_improving(
    learner: _Learner,
    gating: Gating,
    samples: Samples,
    rules: Rules,
    form: FeaturePenalty,
    num_lanes: int,
    regressions: list[Regression],
) -> torch.jit.Future[tuple[Improved, list[list[int]]]]:
    return torch.jit.fork(_improve, learner, gating, samples, rules, form, num_lanes, regressions)  # type: ignore[reportReturnType]
