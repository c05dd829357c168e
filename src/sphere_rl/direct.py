"""Backward passes without autograd, each one TorchScript call.

Two threads wait for each other at Python's lock between their operations. What runs here needs the lock only to begin
and to end: that is what a second lane (`sphere_rl.lanes`) does best, and one thread alone saves autograd's bookkeeping.
Only for networks that are plain chains of layers (`is_plain`); all others go through autograd, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sphere_rl.chain import SCRIPTED, Backward, Forward, backward_some, begin, forward_some, scripted
from sphere_rl.experts import ExpertMLP, Routing
from sphere_rl.gradients import GradientStore, expert_gradient, pieces, written
from sphere_rl.networks import MoENetwork, Trace
from sphere_rl.optimizer import AdamStep, ExpertAdam, adam_step, clip_scale
from sphere_rl.routed_gram import penalty_and_gradient


def is_plain(network: MoENetwork) -> bool:
    """Whether a network is linear layers and ReLU, with nothing in between."""
    return SCRIPTED and all(
        type(mlp) is ExpertMLP and mlp.is_chain and not any(layer.spectral_norm for layer in mlp.layers)
        for mlp in (network.gate, network.experts)
        if mlp is not None
    )


class _Mlp(NamedTuple):
    """Layers and their gradients, hidden features of a forward pass, and the blocks (expert, first row, end row)."""

    hidden: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor]
    grad_weights: list[Tensor]
    grad_biases: list[Tensor]
    blocks: list[tuple[int, int, int]]


class _Mixing(NamedTuple):
    """A `Routing` and the softmax behind the last ``routed`` columns of its weights."""

    weights: Tensor
    gate: Tensor
    sample: Tensor
    expert: Tensor
    routed: int
    temperature: float


def _mlp(
    mlp: ExpertMLP, hidden: Sequence[Tensor], gradients: dict[Tensor, Tensor], blocks: Sequence[tuple[int, int, int]]
) -> _Mlp:
    weights, biases = [layer.weight for layer in mlp.layers], [layer.bias for layer in mlp.layers]
    of_weights, of_biases = ([gradients[p] for p in ps if p in gradients] for ps in (weights, biases))
    return _Mlp([h.detach() for h in hidden], [*weights], [*biases], of_weights, of_biases, [*blocks])


def regression_step(
    network: MoENetwork,
    optimizer: ExpertAdam,
    observation: Float[Tensor, "N D"],
    target: Float[Tensor, "N"],
    coefficient: float,
    max_norm: float,
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Begin one step of ``network``, plain, float32 and a single expert, on coefficient · mean (output − target)².

    The gradient is clipped to ``max_norm``. Call what this returns for the mean square and the gradient's norm.
    """
    gradients: dict[Tensor, Tensor] = {}
    for parameter in network.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients[parameter] = parameter.grad
    with torch.no_grad():
        mlp = _mlp(network.experts, (), gradients, [(0, 0, len(target))])
        (adam,) = optimizer.due()
        return begin(_regress, _start_regression, observation, target, mlp, coefficient, max_norm, adam)


class PenaltyPass:
    """Gradients of SPHERE's penalty for the parameters of an actor; the next pass overwrites what this one returned."""

    def __init__(self) -> None:
        self._store, self._zeros = GradientStore(), dict[Tensor, Tensor]()

    def begin(
        self, actor: MoENetwork, observation: Float[Tensor, "N D"], trace: Trace, layers: Collection[int]
    ) -> Callable[[], tuple[Tensor, list[Tensor], Tensor]]:
        """Begin the pass for the summed joint penalties of these hidden layers of a plain actor.

        Call what this returns for penalty, gradients and their norm.
        """
        routing = trace.features[0].routing
        with torch.no_grad(), self._store.filling():
            gradients = self._gradients(actor.experts, max(layers) + 1, routing.counts)
            if actor.gate is not None:
                gradients |= self._gradients(actor.gate, len(actor.gate.layers), (len(observation),))
            penalised = [layer in layers for layer in range(max(layers) + 1)]
            experts = _mlp(actor.experts, [f.values for f in trace.features], gradients, routing.blocks)
            gate = self._gate(actor.gate, trace, gradients) if actor.gate else _Mlp([], [], [], [], [], [])
            parts = pieces(list(gradients.values()))
            finish = begin(
                _penalise, _start_penalty, observation, _mixing(actor, trace, routing), penalised, experts, gate, parts
            )

        def result() -> tuple[Tensor, list[Tensor], Tensor]:
            penalty, norm = finish()
            for gradient in gradients.values():
                written(gradient)
            return penalty, [gradients[p] if p in gradients else self._zero(p) for p in actor.parameters()], norm

        return result

    @staticmethod
    def _gate(gate: ExpertMLP, trace: Trace, gradients: dict[Tensor, Tensor]) -> _Mlp:
        return _mlp(gate, [f.values for f in trace.gate_features], gradients, [(0, 0, len(trace.output))])

    @staticmethod
    def _gradients(mlp: ExpertMLP, depth: int, counts: Sequence[int]) -> dict[Tensor, Tensor]:
        """Memory for the gradients of the first layers."""
        gradients = {}
        for layer in mlp.layers[:depth]:
            gradients[layer.weight] = expert_gradient(layer.weight, counts)
            gradients[layer.bias] = torch.zeros_like(layer.bias)
            written(gradients[layer.weight])
        return gradients

    def _zero(self, parameter: Tensor) -> Tensor:
        if parameter not in self._zeros:
            self._zeros[parameter] = torch.zeros_like(parameter, requires_grad=False)
        return self._zeros[parameter]


def _mixing(network: MoENetwork, trace: Trace, routing: Routing) -> _Mixing:
    routed = 0 if trace.logits is None else trace.logits.shape[1]
    weights, gate = routing.weights.detach(), routing.gate.detach()
    return _Mixing(weights, gate, routing.sample, routing.expert, routed, network.options.temperature)


@scripted
def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).norm()  # type: ignore[reportPrivateImportUsage]


@scripted
def _backward(mlp: _Mlp, rows: Tensor, hidden: list[Tensor], given: list[Tensor]) -> None:
    """Fill the gradients of an MLP from those of its layers' outputs, as `Backward` has them; none for its rows."""
    outputs, none = [rows], rows.new_empty(0)
    outputs.extend(hidden)
    backward_some(mlp.blocks, Backward(given, outputs, mlp.weights, mlp.grad_weights, mlp.grad_biases, none))


@scripted
def _from_the_end(mlp: _Mlp, rows: Tensor, hidden: list[Tensor], grad: Tensor) -> None:
    """The same where only the last layer's output has a gradient."""
    _backward(mlp, rows, hidden, [grad.new_empty(0)] * (len(mlp.weights) - 1) + [grad])


@scripted
def _regress(
    observation: Tensor, target: Tensor, mlp: _Mlp, coefficient: float, max_norm: float, adam: AdamStep
) -> tuple[Tensor, Tensor]:
    outputs = [observation]
    for bias in mlp.biases:
        outputs.append(observation.new_empty(target.size(0), bias.size(1)))
    forward_some(mlp.blocks, Forward(outputs, mlp.weights, mlp.biases))
    error = outputs[-1].squeeze(1) - target
    _from_the_end(mlp, observation, outputs[1:], (error * (2 * coefficient / target.size(0))).unsqueeze(1))
    norm = _norm(mlp.grad_weights + mlp.grad_biases)
    adam_step(adam, clip_scale(norm, max_norm))
    return error.square().mean(), norm


@scripted
def _logits_gradient(mixing: _Mixing, grad_gate: Tensor) -> Tensor:
    """Through the softmax of the selected logits; of the others, weight and gradient are zero."""
    grad, experts = torch.zeros_like(mixing.weights), mixing.weights.size(1)
    grad.view(-1).index_copy_(0, mixing.sample * experts + mixing.expert, grad_gate)
    weights, grad = mixing.weights[:, experts - mixing.routed :], grad[:, experts - mixing.routed :]
    return weights * (grad - (weights * grad).sum(1, keepdim=True)) / mixing.temperature


@scripted
def _penalise(
    observation: Tensor, mixing: _Mixing, penalised: list[bool], experts: _Mlp, gate: _Mlp, parts: list[Tensor]
) -> tuple[Tensor, Tensor]:
    n, e = mixing.weights.size(0), mixing.weights.size(1)
    penalty, grad_gate = mixing.gate.new_zeros(()), torch.zeros_like(mixing.gate)
    given: list[Tensor] = []
    for layer in range(len(penalised)):
        if penalised[layer]:
            h = experts.hidden[layer]
            own, grad = penalty_and_gradient(h, mixing.gate, mixing.sample, experts.blocks, n, e)
            penalty = penalty + own
            grad_gate += (grad * h).sum(1)
            given.append(grad.mul_(mixing.gate.unsqueeze(1)))
        else:
            given.append(observation.new_empty(0))
    _backward(experts, observation.index_select(0, mixing.sample), experts.hidden, given)
    if len(gate.weights) > 0:
        _from_the_end(gate, observation, gate.hidden, _logits_gradient(mixing, grad_gate))
    return penalty, _norm(parts)


@scripted
def _start_regression(
    observation: Tensor, target: Tensor, mlp: _Mlp, coefficient: float, max_norm: float, adam: AdamStep
) -> torch.jit.Future[tuple[Tensor, Tensor]]:
    return torch.jit.fork(_regress, observation, target, mlp, coefficient, max_norm, adam)  # type: ignore[reportReturnType]


@scripted
def _start_penalty(
    observation: Tensor, mixing: _Mixing, penalised: list[bool], experts: _Mlp, gate: _Mlp, parts: list[Tensor]
) -> torch.jit.Future[tuple[Tensor, Tensor]]:
    return torch.jit.fork(_penalise, observation, mixing, penalised, experts, gate, parts)  # type: ignore[reportReturnType]
