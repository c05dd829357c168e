"""A network and its optimiser as TorchScript takes them, tensors in lists that are made once for many steps, and both
sweeps of a step (`sphere_rl.kernels.backward`) through them, on one or two lanes.
"""

from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sphere_rl.experts.network import MoENetwork
from sphere_rl.kernels.adam import AdamStep, adam_step
from sphere_rl.kernels.backward import (
    BackwardInputs,
    Block,
    BlockGradients,
    MlpState,
    backpropagate,
    no_gradients,
    update_expert,
    update_weights,
)
from sphere_rl.kernels.mixture import Layers
from sphere_rl.kernels.script import scripted
from sphere_rl.kernels.threads import split_rows
from sphere_rl.learner.optimizer import ExpertAdam


class FusedNetwork(NamedTuple):
    """A plain network whose layers use their parameters as they are, with its `ExpertAdam`."""

    mlps: list[MlpState]
    """The experts and, if there is one, the gate."""
    idle: list[list[int]]
    """Of each layer of the experts, each expert's steps without rows (`ExpertAdam.idle_steps`); none of one expert."""
    zeros: list[Tensor]
    """Of each layer, the gradient [out, in] of an expert without rows."""
    head: list[Tensor]
    """Parameters that the policy has beside its MLPs: log σ [A] of a Gaussian."""
    of_head: list[Tensor]
    """Their gradients."""
    adam: AdamStep
    """The step of all parameters but the MLPs' weights: biases and head."""
    counters: list[Tensor]
    """Adam's step counts of all parameters."""


@scripted
def with_rate(network: FusedNetwork, rate: float) -> FusedNetwork:
    """With another learning rate."""
    adam = network.adam
    return FusedNetwork(
        network.mlps, network.idle, network.zeros, network.head, network.of_head,
        AdamStep(
            adam.parameters, adam.gradients, adam.first, adam.second, adam.steps, rate, adam.beta1, adam.beta2, adam.eps
        ),
        network.counters,
    )  # fmt: skip


class _Prepared(NamedTuple):
    """A fused network, and the parameters that may have to carry its gradients: each MLP's weights, and all else."""

    network: FusedNetwork
    weights: list[list[Parameter]]
    rest: list[Parameter]


def fused_network(
    network: MoENetwork, optimizer: ExpertAdam, keep: bool, head: nn.Module | None = None
) -> FusedNetwork:
    """A plain network for its next step; ``keep``: let parameters carry their gradients.

    ``head`` has what the optimiser moves beside the network. `FusedNetwork.idle` are the optimiser's own lists.
    """
    of_head = [] if head is None else list(head.parameters())
    return _for_next_step(optimizer.kept(partial(_prepared, network, of_head, optimizer)), optimizer, keep)


@torch.inference_mode(False)
@torch.no_grad()
def _prepared(network: MoENetwork, head: list[Parameter], optimizer: ExpertAdam) -> _Prepared:
    weights = [[layer.weight for layer in mlp.layers] for mlp in network.parts]
    biases = [[layer.bias for layer in mlp.layers] for mlp in network.parts]
    rest = [*chain.from_iterable(biases), *head]
    gradients = {parameter: torch.zeros_like(parameter) for parameter in rest}
    states = [optimizer.state_of(parameter) for parameter in rest]
    first, second, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
    own = [parameter.detach() for parameter in rest]
    mlps = [
        _mlp(optimizer, of_weights, of_biases, [gradients[bias] for bias in of_biases])
        for of_weights, of_biases in zip(weights, biases, strict=True)
    ]
    adam = AdamStep(own, list(gradients.values()), first, second, steps, 0.0, 0.0, 0.0, 0.0)
    fused = FusedNetwork(
        mlps=mlps,
        idle=[optimizer.idle_steps(weight) for weight in weights[0] if len(weight) > 1],
        zeros=[torch.zeros_like(weight[0], requires_grad=False) for weight in weights[0]],
        head=own[len(own) - len(head) :],
        of_head=[gradients[parameter] for parameter in head],
        adam=adam,
        counters=[*adam.steps, *chain.from_iterable(mlp.steps for mlp in mlps)],
    )
    return _Prepared(fused, weights, rest)


def _mlp(
    optimizer: ExpertAdam, weights: list[Parameter], biases: list[Parameter], grad_biases: list[Tensor]
) -> MlpState:
    experts = zip(*(optimizer.experts_of(weight) for weight in weights), strict=True)
    of_experts = [[list(tensors) for tensors in zip(*layers, strict=True)] for layers in experts]
    own, first, second = map(list, zip(*of_experts, strict=True))
    layers = Layers([weight.detach() for weight in weights], [bias.detach() for bias in biases])
    steps = [optimizer.state_of(weight)["step"] for weight in weights]
    return MlpState(layers, own, first, second, steps, grad_biases, [])


def _for_next_step(prepared: _Prepared, optimizer: ExpertAdam, keep: bool) -> FusedNetwork:
    """With Adam's present numbers, and with ``keep`` memory for gradients that the parameters carry from now on."""
    (group,) = optimizer.param_groups
    network, numbers = prepared.network, optimizer.numbers(group)
    network = network._replace(adam=AdamStep(*network.adam[:5], *numbers))
    if not keep:
        return network
    for parameter, gradient in zip(prepared.rest, network.adam.gradients, strict=True):
        parameter.grad = gradient
    of_weights = [[_zero_gradient(weight) for weight in weights] for weights in prepared.weights]
    kept = [mlp._replace(grad_weights=own) for mlp, own in zip(network.mlps, of_weights, strict=True)]
    return network._replace(mlps=kept)


@torch.inference_mode(False)
def _zero_gradient(parameter: Parameter) -> Tensor:
    parameter.grad = torch.zeros_like(parameter, requires_grad=False)
    return parameter.grad


@scripted
def backward_sweep(
    network: FusedNetwork, given: list[BackwardInputs], blocks: list[Block], k: int, num_lanes: int
) -> BlockGradients:
    """`backpropagate` through all blocks."""
    mine, others = split_rows([end - start for _, _, start, end in blocks], num_lanes)
    found = no_gradients(blocks, network.mlps)
    there: list[torch.jit.Future[int]] = []
    if len(others) > 0:
        there.append(torch.jit.fork(backpropagate, others, blocks, network.mlps, given, k, True, found))  # type: ignore[reportArgumentType]
    backpropagate(mine, blocks, network.mlps, given, k, num_lanes > 1, found)
    for other in there:
        torch.jit.wait(other)
    return found


@scripted
def update_sweep(
    network: FusedNetwork,
    blocks: list[Block],
    found: BlockGradients,
    factors: list[Tensor],
    num_lanes: int,
) -> None:
    """Adam's step on Σ_i factors[i] · gradient i of all parameters but the weights of experts without rows.

    What the policy has beside its networks is in the first gradient alone.
    """
    for mlp in network.mlps:
        for grad in mlp.grad_biases:
            grad.zero_()
    mine, others = split_rows([end - start for _, _, start, end in blocks], num_lanes)
    there: list[torch.jit.Future[int]] = []
    if len(others) > 0:
        there.append(torch.jit.fork(update_weights, others, blocks, network.mlps, found, factors, network.adam))  # type: ignore[reportArgumentType]
    update_weights(mine, blocks, network.mlps, found, factors, network.adam)
    for other in there:
        torch.jit.wait(other)
    for gradient in network.of_head:
        gradient.mul_(factors[0])
    adam_step(network.adam, None)


@scripted
def update_idle_experts(network: FusedNetwork, idle: list[int]) -> list[Tensor]:
    """Adam's step of the weights of these experts without rows: their moments still move them."""
    for expert in idle:
        update_expert(network.mlps[0], expert, network.zeros, network.adam)
    return []
