"""A critic's step without autograd: a network that is a plain chain of layers learns to predict its targets."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sphere_rl.experts.network import MoENetwork
from sphere_rl.kernels.adam import clip_scale, count_step
from sphere_rl.kernels.backward import BackwardInputs, inner_products
from sphere_rl.kernels.mlp import chain_outputs
from sphere_rl.kernels.script import scriptable, scripted
from sphere_rl.kernels.threads import begin
from sphere_rl.learner.fused import FusedNetwork, backward_sweep, fused_network, update_sweep, with_rate
from sphere_rl.learner.losses import value_loss
from sphere_rl.learner.optimizer import ExpertAdam


class Regression(NamedTuple):
    """A network's step on coefficient · mean (output − target)², before it is taken."""

    network: FusedNetwork
    observation: Tensor
    """[N, D]."""
    target: Tensor
    """[N]."""
    coefficient: float
    max_norm: float
    """The longest gradient."""


class Predicted(NamedTuple):
    """A regression after its forward pass."""

    mean_square: Tensor
    """Of its errors, without the coefficient."""
    given: list[BackwardInputs]
    """What both sweeps read."""


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
    return Regression(fused_network(network, optimizer, keep), observation, target, coefficient, max_norm)


@scriptable
def of_minibatch(every: Regression, observation: Tensor, index: Tensor, rate: float) -> Regression:
    """The step on these rows, of which these are the observations, at another learning rate."""
    network, target = with_rate(every.network, rate), every.target.index_select(0, index)
    return Regression(network, observation, target, every.coefficient, every.max_norm)


@torch.inference_mode()
def begin_regression(step: Regression) -> Callable[[], list[Tensor]]:
    """Begin a step; call what this returns for the mean square and the gradient's norm."""
    return begin(regression_step, _start_regression, step)


@scripted
def predict(step: Regression) -> Predicted:
    """The first half of a step, its forward pass."""
    target, layers, n = step.target, step.network.mlps[0].layers, step.target.size(0)
    outputs = chain_outputs(step.observation, layers.weights, layers.biases, [(0, 0, n)], 1)
    value = outputs[-1].squeeze(1)
    of_value = ((value - target) * (2 * step.coefficient / n)).unsqueeze(1)
    none = [target.new_empty(0)] * (len(outputs) - 1)
    return Predicted(value_loss(value, target), [BackwardInputs(outputs[:-1], of_value, none, target.new_empty(0))])


@scripted
def _finish(step: Regression, before: Predicted, num_lanes: int) -> list[Tensor]:
    """The second half: mean square of the errors and norm of the gradient before it was clipped."""
    network, blocks = step.network, [(0, 0, 0, step.target.size(0))]
    count_step(network.counters)
    found = backward_sweep(network, before.given, blocks, 1, num_lanes)
    norm = inner_products(found)[0, 0].clamp(min=0.0).sqrt()
    update_sweep(network, blocks, found, [1 / clip_scale(norm, step.max_norm)], num_lanes)
    return [before.mean_square, norm]


@scripted
def regression_step(step: Regression) -> list[Tensor]:
    """Both halves on one lane: mean square and norm."""
    return _finish(step, predict(step), 1)


@scripted
def finish_regression(step: Regression, before: torch.jit.Future[Predicted]) -> list[Tensor]:
    """The second half of a step whose first was begun on another thread: mean square and norm."""
    return _finish(step, torch.jit.wait(before), 2)


@scripted
def _start_regression(step: Regression) -> torch.jit.Future[list[Tensor]]:
    return torch.jit.fork(regression_step, step)  # type: ignore[reportReturnType]
