"""Steps of actor and critic without autograd, each one TorchScript call.

Two threads wait for each other at Python's lock between their operations. What runs here needs the lock only to begin
and to end: that is what a second lane (`sphere_rl.lanes`) does best, and one thread alone saves autograd's bookkeeping
and most of the memory traffic of gradients (`sphere_rl.sweeps`). Only for networks that are plain chains of layers
(`is_plain`); all others go through autograd, with the same result.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sphere_rl.chain import SCRIPTED, Forward, begin, forward_some, scripted
from sphere_rl.experts import ExpertMLP
from sphere_rl.lanes import lanes, split_blocks
from sphere_rl.networks import Actor, MoENetwork, Trace
from sphere_rl.optimizer import AdamStep, ExpertAdam, adam_step, clip_scale
from sphere_rl.routed_gram import penalty_and_gradient
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


class Improved(NamedTuple):
    """The gradient's norm before it was clipped, the penalty, and what it was multiplied by."""

    norm: Tensor
    penalty: Tensor
    strength: Tensor


NO_PENALTY = FeaturePenalty([], "fixed", 0.0, pcgrad=False)
"""Where no method has one."""

Penalised = tuple[Tensor, Tensor, list[Tensor]]
"""Penalties, summed, and their gradients for the gate's weights [M] and for each layer's rows, empty where zero."""


class _Routed(NamedTuple):
    """Features of each hidden layer, and the `Routing` of their rows."""

    features: list[Tensor]
    weights: Tensor
    gate: Tensor
    sample: Tensor
    blocks: list[tuple[int, int, int]]


class _Mixing(NamedTuple):
    """A `Routing`, its experts' outputs, and the softmax behind the last ``routed`` columns of its weights."""

    weights: Tensor
    gate: Tensor
    sample: Tensor
    expert: Tensor
    outputs: Tensor
    routed: int
    temperature: float


class _Step(NamedTuple):
    """Adam's step of the MLPs' weights, block after block on two lanes, and that of all else with its gradients."""

    mine: list[Block]
    others: list[Block]
    adam: AdamStep
    own: list[Tensor]
    max_norm: float


def is_plain(network: MoENetwork) -> bool:
    """Whether a network is linear layers and ReLU, with nothing in between."""
    return SCRIPTED and all(
        type(mlp) is ExpertMLP and mlp.is_chain and not any(layer.spectral_norm for layer in mlp.layers)
        for mlp in (network.gate, network.experts)
        if mlp is not None
    )


@torch.inference_mode()
def begin_penalty(trace: Trace, penalty: FeaturePenalty) -> Callable[[], Penalised]:
    """Begin what `improve` needs of a penalty: it depends on the forward pass alone."""
    routing, features = trace.features[0].routing, [f.values for f in trace.features]
    routed = _Routed(features, routing.weights, routing.gate, routing.sample, list(routing.blocks))
    if not any(penalty.layers):
        return partial(_penalise, routed, penalty.layers)
    return begin(_penalise, _start_penalising, routed, penalty.layers)


@torch.inference_mode()
def improve(
    actor: Actor,
    optimizer: ExpertAdam,
    observation: Float[Tensor, "N D"],
    trace: Trace,
    loss: Float[Tensor, ""],
    grad_output: Float[Tensor, "N A"],
    penalty: FeaturePenalty,
    penalised: Callable[[], Penalised],
    max_norm: float,
    keep: bool,
) -> Improved:
    """One step of a plain actor, from its forward pass, the gradient of the loss for its output and `begin_penalty`.

    The head's parameters carry their gradients already; after a step that is to ``keep`` them, so do all others.
    """
    routing = trace.features[0].routing
    rows, features = observation.index_select(0, routing.sample), [f.values for f in trace.features]
    mlps = [_mlp(actor.experts, optimizer, [rows, *features], keep)]
    blocks = [(0, *block) for block in routing.blocks]
    if actor.gate is not None:
        mlps.append(_mlp(actor.gate, optimizer, [observation, *(f.values for f in trace.gate_features)], keep))
        blocks.append((1, 0, 0, len(observation)))
    head = [p.grad for p in actor.head.parameters() if p.grad is not None]
    step = _step((actor.experts, actor.gate), optimizer, blocks, lanes(), head, max_norm)
    routed = 0 if trace.logits is None else trace.logits.shape[1]
    mixing = _Mixing(
        routing.weights, routing.gate, routing.sample, routing.expert, trace.expert_outputs,
        routed, actor.options.temperature,
    )  # fmt: skip
    return Improved(*_improve(mlps, step, mixing, loss, grad_output, penalty, penalised()))


@torch.inference_mode()
def begin_regression(
    network: MoENetwork,
    optimizer: ExpertAdam,
    observation: Float[Tensor, "N D"],
    target: Float[Tensor, "N"],
    coefficient: float,
    max_norm: float,
    keep: bool,
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Begin one step of a plain network of a single expert on coefficient · mean (output − target)².

    Call what this returns for the mean square and the gradient's norm. ``keep``: let parameters carry their gradients.
    """
    layers = network.experts.layers
    outputs = [observation, *(observation.new_empty(len(observation), layer.bias.shape[1]) for layer in layers)]
    forward = Forward(outputs, [layer.weight.detach() for layer in layers], [layer.bias.detach() for layer in layers])
    mlp = _mlp(network.experts, optimizer, outputs[:-1], keep)
    step = _step((network.experts,), optimizer, [(0, 0, 0, len(target))], 1, [], max_norm)
    return begin(_regress, _start_regression, mlp, forward, step, target, coefficient)


def _mlp(mlp: ExpertMLP, optimizer: ExpertAdam, inputs: list[Tensor], keep: bool) -> Mlp:
    weights, biases = [layer.weight for layer in mlp.layers], [layer.bias for layer in mlp.layers]
    experts = zip(*(optimizer.experts_of(weight) for weight in weights), strict=True)
    of_experts = [[list(tensors) for tensors in zip(*layers, strict=True)] for layers in experts]
    own, first, second = map(list, zip(*of_experts, strict=True))
    steps = [optimizer.state_of(weight)["step"] for weight in weights]
    of_biases, of_weights = zeroed(biases), (zeroed(weights) if keep else [])
    return Mlp(inputs, own, first, second, steps, of_biases, of_weights)


@torch.inference_mode(False)
def zeroed(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Gradients that these parameters carry from now on."""
    gradients = []
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter, requires_grad=False)
        gradients.append(parameter.grad)
    return gradients


def _step(
    mlps: Sequence[ExpertMLP | None],
    optimizer: ExpertAdam,
    blocks: list[Block],
    num_lanes: int,
    own: list[Tensor],
    max_norm: float,
) -> _Step:
    """Begin Adam's step of the experts in these blocks."""
    elsewhere: dict[Tensor, set[int]] = {}
    for index, mlp in enumerate(mlps):
        if mlp is not None:
            active = {expert for part, expert, _, _ in blocks if part == index}
            elsewhere |= {layer.weight: active for layer in mlp.layers}
    (rest,) = optimizer.due(elsewhere)
    return _Step(*split_blocks(blocks, num_lanes), rest, own, max_norm)


@scripted
def gaussian_loss(
    mean: Tensor,
    log_std: Tensor,
    action: Tensor,
    old_policy: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    clip: float,
    entropy_coefficient: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """PPO's loss of a Gaussian policy, the numbers of `sphere_rl.ppo.actor_loss`, and ∂loss for mean and log σ."""
    deviation = torch.exp(-log_std)
    z = (action - mean) * deviation
    constant = 0.9189385332046727  # log sqrt(2 pi)
    log_prob = z.square().sum(1).mul_(-0.5).sub_((log_std + constant).sum())
    entropy = (log_std + (constant + 0.5)).sum()
    ratio = torch.exp(log_prob - old_log_prob)
    free, bound = ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage
    loss = -torch.minimum(free, bound).mean()
    of_log_prob = (free * (free <= bound)).div_(-len(free)).unsqueeze(1)
    of_mean = of_log_prob * z * deviation
    of_log_std = (of_log_prob * (z.square() - 1)).sum(0) - entropy_coefficient
    old_mean, old_log_std = old_policy.chunk(2, 1)
    squared = torch.exp(2 * old_log_std) + (old_mean - mean).square()
    kl = (log_std - old_log_std + 0.5 * (squared * deviation.square() - 1)).sum(1).mean()
    clipped = (ratio - 1).abs().gt(clip).to(ratio.dtype).mean()
    return loss - entropy_coefficient * entropy, [loss, kl, clipped, entropy], [of_mean, of_log_std]


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
def _take(mlps: list[Mlp], given: list[Given], step: _Step, form: FeaturePenalty) -> tuple[Tensor, Tensor]:
    """Both sweeps and Adam: the gradient's norm, and what the penalty's gradient was multiplied by in mode grad."""
    k = 2 if form.mode == "grad" else 1
    inner: list[Tensor] = []
    signals: list[Tensor] = []
    gradients: list[Tensor] = []
    signals_there: list[Tensor] = []
    gradients_there: list[Tensor] = []
    for mlp in mlps:
        inner.append(mlp.inputs[0].new_zeros(len(mlp.weights), k, k))
    there: list[torch.jit.Future[int]] = []
    if len(step.others) > 0:
        there.append(torch.jit.fork(descend, step.others, mlps, given, k, inner, signals_there, gradients_there))  # type: ignore[reportArgumentType]
    descend(step.mine, mlps, given, k, inner, signals, gradients)
    for other in there:
        torch.jit.wait(other)
    products = torch.cat(inner).sum(0)
    for gradient in step.own:
        products[0, 0].add_(gradient.square().sum())
    kept, strength, square = torch.ones_like(products[0, 0]), torch.zeros_like(products[0, 0]), products[0, 0]
    if form.mode == "grad":
        kept, strength, square = _strength(products, form)
    norm = square.clamp(min=0.0).sqrt()
    scale = clip_scale(norm, step.max_norm)
    factors = [kept / scale, strength / scale][:k]
    for gradient in step.own:
        gradient.mul_(factors[0])
    there.clear()
    if len(step.others) > 0:
        there.append(torch.jit.fork(ascend, step.others, mlps, signals_there, gradients_there, factors, step.adam))  # type: ignore[reportArgumentType]
    ascend(step.mine, mlps, signals, gradients, factors, step.adam)
    for other in there:
        torch.jit.wait(other)
    adam_step(step.adam, None)
    return norm, strength


@scripted
def _logits_gradient(mixing: _Mixing, grad_gate: Tensor) -> Tensor:
    """Through the softmax of the selected logits; of the others, weight and gradient are zero."""
    grad, experts = torch.zeros_like(mixing.weights), mixing.weights.size(1)
    grad.view(-1).index_copy_(0, mixing.sample * experts + mixing.expert, grad_gate)
    weights, grad = mixing.weights[:, experts - mixing.routed :], grad[:, experts - mixing.routed :]
    return weights * (grad - (weights * grad).sum(1, keepdim=True)) / mixing.temperature


@scripted
def _penalise(p: _Routed, layers: list[bool]) -> Penalised:
    penalty, of_gate = p.gate.new_zeros([]), torch.zeros_like(p.gate)
    of_rows = [p.gate.new_empty(0)] * (len(p.features) + 1)
    n, experts = p.weights.size(0), p.weights.size(1)
    for layer in range(len(layers)):
        if layers[layer]:
            own, grad = penalty_and_gradient(p.features[layer], p.gate, p.sample, p.blocks, n, experts)
            penalty = penalty + own
            of_gate += (grad * p.features[layer]).sum(1)
            of_rows[layer] = grad.mul_(p.gate.unsqueeze(1))
    return penalty, of_gate, of_rows


@scripted
def _start_penalising(p: _Routed, layers: list[bool]) -> torch.jit.Future[Penalised]:
    return torch.jit.fork(_penalise, p, layers)  # type: ignore[reportReturnType]


@scripted
def _improve(
    mlps: list[Mlp],
    step: _Step,
    mixing: _Mixing,
    loss: Tensor,
    grad_output: Tensor,
    form: FeaturePenalty,
    penalised: Penalised,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = grad_output.index_select(0, mixing.sample)
    of_loss, of_gate = rows * mixing.gate.unsqueeze(1), (rows * mixing.outputs).sum(1)
    penalty, of_gate_too, of_penalty = penalised
    strength = torch.full_like(loss, form.share)
    if form.mode == "loss":
        strength = form.share * loss.abs() / (penalty + 1e-8)
    if form.mode != "grad":
        for grad in of_penalty:
            grad.mul_(strength)
        of_gate_too.mul_(strength)
    given = [Given(of_loss, of_penalty)]
    if len(mlps) > 1:
        of_gate_layers = [loss.new_empty(0)] * len(mlps[1].inputs)
        if any(form.layers):
            of_gate_layers[-1] = _logits_gradient(mixing, of_gate_too)
        given.append(Given(_logits_gradient(mixing, of_gate), of_gate_layers))
    norm, relative = _take(mlps, given, step, form)
    return norm, penalty, relative if form.mode == "grad" else strength


@scripted
def _regress(mlp: Mlp, p: Forward, step: _Step, target: Tensor, coefficient: float) -> tuple[Tensor, Tensor]:
    forward_some([(0, 0, target.size(0))], p)
    error = p.outputs[-1].squeeze(1) - target
    given = Given((error * (2 * coefficient / len(error))).unsqueeze(1), [target.new_empty(0)] * len(p.weights))
    norm, _ = _take([mlp], [given], step, FeaturePenalty([], "fixed", 0.0, False))
    return error.square().mean(), norm


@scripted
def _start_regression(
    mlp: Mlp, p: Forward, step: _Step, target: Tensor, coefficient: float
) -> torch.jit.Future[tuple[Tensor, Tensor]]:
    return torch.jit.fork(_regress, mlp, p, step, target, coefficient)  # type: ignore[reportReturnType]
