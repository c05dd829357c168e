"""A network and its optimiser as TorchScript takes them: tensors in lists, made once for many steps; and both sweeps of
a step (`sphere_rl.kernels.backward`) on one or two lanes.
"""

from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sphere_rl.experts.network import MoENetwork
from sphere_rl.kernels.adam import AdamStep, adam_step
from sphere_rl.kernels.backward import Block, Found, Given, Mlp, ascend, descend, move, nothing_found
from sphere_rl.kernels.mixture import Layers
from sphere_rl.kernels.script import scripted
from sphere_rl.kernels.threads import split_rows
from sphere_rl.learner.optimizer import ExpertAdam


class Learner(NamedTuple):
    """A network's MLPs, experts before the gate, and Adam's step of all that is not their weights, with its gradients.

    idle: of each layer of the experts, each expert's steps without rows; empty where there is only one. zeros: of each
    layer, the gradient of an expert without rows. head: what the policy has beside its networks, with its gradients.
    """

    mlps: list[Mlp]
    idle: list[list[int]]
    zeros: list[Tensor]
    head: list[Tensor]
    of_head: list[Tensor]
    adam: AdamStep
    counters: list[Tensor]


@scripted
def at_rate(learner: Learner, rate: float) -> Learner:
    """With another learning rate."""
    adam = learner.adam
    return Learner(
        learner.mlps, learner.idle, learner.zeros, learner.head, learner.of_head,
        AdamStep(
            adam.parameters, adam.gradients, adam.first, adam.second, adam.steps, rate, adam.beta1, adam.beta2, adam.eps
        ),
        learner.counters,
    )  # fmt: skip


class _Plan(NamedTuple):
    """A learner and the parameters behind it: each MLP's weights, and all else."""

    learner: Learner
    weights: list[list[Parameter]]
    rest: list[Parameter]


def learner_of(network: MoENetwork, optimizer: ExpertAdam, keep: bool, head: nn.Module | None = None) -> Learner:
    """A plain network's learner for its next step; ``keep``: let parameters carry their gradients.

    ``head`` has what the optimiser moves beside the network. `Learner.idle` are the optimiser's own lists.
    """
    of_head = [] if head is None else list(head.parameters())
    return _present(optimizer.kept(partial(_plan, network, of_head, optimizer)), optimizer, keep)


@torch.inference_mode(False)
@torch.no_grad()
def _plan(network: MoENetwork, head: list[Parameter], optimizer: ExpertAdam) -> _Plan:
    weights = [[layer.weight for layer in mlp.layers] for mlp in network.parts]
    biases = [[layer.bias for layer in mlp.layers] for mlp in network.parts]
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
    zeros = [torch.zeros_like(weight[0], requires_grad=False) for weight in weights[0]]
    return _Plan(Learner(mlps, idle, zeros, own[len(own) - len(head) :], of_head, adam, counters), weights, rest)


def _mlp(optimizer: ExpertAdam, weights: list[Parameter], biases: list[Parameter], grad_biases: list[Tensor]) -> Mlp:
    experts = zip(*(optimizer.experts_of(weight) for weight in weights), strict=True)
    of_experts = [[list(tensors) for tensors in zip(*layers, strict=True)] for layers in experts]
    own, first, second = map(list, zip(*of_experts, strict=True))
    layers = Layers([weight.detach() for weight in weights], [bias.detach() for bias in biases])
    steps = [optimizer.state_of(weight)["step"] for weight in weights]
    return Mlp(layers, own, first, second, steps, grad_biases, [])


def _present(plan: _Plan, optimizer: ExpertAdam, keep: bool) -> Learner:
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
def down(learner: Learner, given: list[Given], blocks: list[Block], k: int, num_lanes: int) -> Found:
    """The first sweep, through all blocks."""
    mine, others = split_rows([end - start for _, _, start, end in blocks], num_lanes)
    found = nothing_found(blocks, learner.mlps)
    there: list[torch.jit.Future[int]] = []
    if len(others) > 0:
        there.append(torch.jit.fork(descend, others, blocks, learner.mlps, given, k, True, found))  # type: ignore[reportArgumentType]
    descend(mine, blocks, learner.mlps, given, k, num_lanes > 1, found)
    for other in there:
        torch.jit.wait(other)
    return found


@scripted
def up(
    learner: Learner, given: list[Given], blocks: list[Block], found: Found, factors: list[Tensor], num_lanes: int
) -> None:
    """The second one: Adam's step on Σ_i factors[i] · gradient i of all parameters but the resting experts' weights.

    What the policy has beside its networks is in the first gradient alone.
    """
    for mlp in learner.mlps:
        for grad in mlp.grad_biases:
            grad.zero_()
    mine, others = split_rows([end - start for _, _, start, end in blocks], num_lanes)
    there: list[torch.jit.Future[int]] = []
    if len(others) > 0:
        there.append(torch.jit.fork(ascend, others, blocks, learner.mlps, given, found, factors, learner.adam))  # type: ignore[reportArgumentType]
    ascend(mine, blocks, learner.mlps, given, found, factors, learner.adam)
    for other in there:
        torch.jit.wait(other)
    for gradient in learner.of_head:
        gradient.mul_(factors[0])
    adam_step(learner.adam, None)


@scripted
def drift(learner: Learner, idle: list[int]) -> list[Tensor]:
    """Adam's step of the weights of experts without rows."""
    for expert in idle:
        move(learner.mlps[0], expert, learner.zeros, learner.adam)
    return []
