"""Adam's step on MLPs whose weight gradients exist only while they are used.

The gradient of a linear layer's weights is DᵀH, with H [n, in] the inputs of its n rows and D [n, out] the gradients of
its outputs, here called signals. So the inner product of two such gradients is Σ (DD'ᵀ) ∘ (HHᵀ), from n × n matrices,
and a sum of two is one product (aD + bD')ᵀH. A minibatch gives an expert few rows, hence two sweeps: `descend` finds
the signals and the inner products, which decide how long each gradient may be; `ascend` makes each expert's gradient
once and hands it to Adam while it is in the cache. Gradients of many rows are made in the first sweep and kept.

All of it is TorchScript (see `sphere_rl.kernels.script`) and differentiates nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sphere_rl.kernels.adam import AdamStep, adam_step
from sphere_rl.kernels.mixture import Layers
from sphere_rl.kernels.script import scripted

Block = tuple[int, int, int, int]
"""(MLP, expert, first row, end row) of rows of one expert."""


class Mlp(NamedTuple):
    """Parameters of all experts; of each expert, each layer's weights [out, in] and their moments.

    Of each layer, grad_biases [E, out] are filled; so are grad_weights [E, out, in], where there are any.
    """

    layers: Layers
    weights: list[list[Tensor]]
    first: list[list[Tensor]]
    second: list[list[Tensor]]
    steps: list[Tensor]
    grad_biases: list[Tensor]
    grad_weights: list[Tensor]


class Given(NamedTuple):
    """Inputs [M, in] of each layer, sorted by expert, and gradients of the loss for the rows of the last one [M, out].

    Those of the penalty, to be multiplied by its strength, are for the rows of each layer and empty where zero; of
    hidden ones, for what ReLU returns.
    """

    inputs: list[Tensor]
    loss: Tensor
    penalty: list[Tensor]
    strength: Tensor


class Found(NamedTuple):
    """Of each block and each of its layers: signals [k, n, out], gradients [k, out, in], which are empty where brief,
    and the inner products [k, k] of its k gradients.
    """

    signals: list[list[Tensor]]
    gradients: list[list[Tensor]]
    inner: list[list[Tensor]]


@scripted
def is_brief(n: int, k: int, out: int, width: int) -> bool:
    """Whether gradients of n rows are best made when they are used.

    To write one to memory and read it again takes about as long as the arithmetic of 20 rows.
    """
    return n * n * (width + k * out) < ((k - 1) * n + 20 * k) * out * width


@scripted
def nothing_found(blocks: list[Block], mlps: list[Mlp]) -> Found:
    """What `descend` fills."""
    none = mlps[0].steps[0].new_empty(0)
    depths = [len(mlps[index].steps) for index, _, _, _ in blocks]
    signals, gradients, inner = [[[none] * depth for depth in depths] for _ in range(3)]
    return Found(signals, gradients, inner)


@scripted
def _brief_inner(signals: Tensor, inputs: Tensor) -> Tensor:
    """Inner products of the gradients of a layer's weights and bias, which are not made."""
    samples = torch.mm(inputs, inputs.t()).add_(1.0)  # the bias is the weight of an input that is 1
    k = signals.size(0)
    return torch.mm(signals.view(k, -1), torch.matmul(samples, signals).view(k, -1).t())


@scripted
def _gradients(signals: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a layer's weights, and their inner products with those of its bias."""
    k, n = signals.size(0), signals.size(1)
    gradients = torch.bmm(signals.transpose(1, 2), inputs.expand(k, n, inputs.size(1)))
    flat, bias = gradients.view(k, -1), signals.sum(1)
    return gradients, torch.mm(flat, flat.t()).addmm_(bias, bias.t())


@scripted
def descend(
    chosen: list[int], blocks: list[Block], mlps: list[Mlp], given: list[Given], k: int, apart: bool, found: Found
) -> int:
    """From the outputs of the chosen blocks to their first layer; ``apart``: gradients on another thread, too.

    Gradient 0 is the loss's and gradient k − 1 the penalty's; with k = 1 they are one, their sum.
    """
    later: list[tuple[int, int, torch.jit.Future[tuple[Tensor, Tensor]]]] = []
    for block in chosen:
        index, expert, start, end = blocks[block]
        own, weights = given[index], mlps[index].weights[expert]
        n, depth = end - start, len(weights)
        signals = own.loss.new_zeros(k, n, own.loss.size(1))
        signals[0].copy_(own.loss[start:end])
        for back in range(depth):
            layer = depth - 1 - back
            out, width = weights[layer].size(0), weights[layer].size(1)
            if back > 0:
                signals = torch.mm(signals.view(k * n, -1), weights[layer + 1]).view(k, n, out)
            if own.penalty[layer].numel() > 0:
                signals[k - 1].addcmul_(own.penalty[layer][start:end], own.strength)
            if back > 0:
                signals = torch.ops.aten.threshold_backward(signals, own.inputs[layer + 1][start:end], 0)
            inputs = own.inputs[layer][start:end]
            found.signals[block][layer] = signals
            if is_brief(n, k, out, width):
                found.inner[block][layer] = _brief_inner(signals, inputs)
            elif apart:
                later.append((block, layer, torch.jit.fork(_gradients, signals, inputs)))  # type: ignore[reportArgumentType]
            else:
                found.gradients[block][layer], found.inner[block][layer] = _gradients(signals, inputs)
    for block, layer, other in later:
        found.gradients[block][layer], found.inner[block][layer] = torch.jit.wait(other)
    return 0


@scripted
def inner_products(found: Found) -> Tensor:
    """Those [k, k] of the whole gradients."""
    each: list[Tensor] = []
    for layers in found.inner:
        each.extend(layers)
    return torch.stack(each).sum(0)


@scripted
def _combined(tensors: Tensor, factors: list[Tensor]) -> Tensor:
    """Σ_i factors[i] · tensors[i], in the first one's place."""
    total = tensors[0].mul_(factors[0])
    for i in range(1, len(factors)):
        total.addcmul_(tensors[i], factors[i])
    return total


@scripted
def move(mlp: Mlp, expert: int, gradients: list[Tensor], adam: AdamStep) -> None:
    """Adam's step of an expert's weights."""
    # Lists that come from outside: PyTorch takes what is written to the tensors of a new list for dead code.
    weights, first, second = mlp.weights[expert], mlp.first[expert], mlp.second[expert]
    adam_step(AdamStep(weights, gradients, first, second, mlp.steps, adam.rate, adam.beta1, adam.beta2, adam.eps), None)


@scripted
def ascend(
    chosen: list[int],
    blocks: list[Block],
    mlps: list[Mlp],
    given: list[Given],
    found: Found,
    factors: list[Tensor],
    adam: AdamStep,
) -> int:
    """Adam's step of the weights of these blocks on Σ_i factors[i] · gradient i; the biases' gradients are filled."""
    for block in chosen:
        index, expert, start, end = blocks[block]
        mlp = mlps[index]
        gradients = list(found.gradients[block])  # a copy: what is made here is freed with the block
        for back in range(len(gradients)):
            layer = len(gradients) - 1 - back
            signals = _combined(found.signals[block][layer], factors)
            torch.sum(signals, [0], False, out=mlp.grad_biases[layer][expert])
            if gradients[layer].numel() > 0:
                gradients[layer] = _combined(gradients[layer], factors)
            else:
                gradients[layer] = torch.mm(signals.t(), given[index].inputs[layer][start:end])
            if len(mlp.grad_weights) > 0:
                mlp.grad_weights[layer][expert].copy_(gradients[layer])
        move(mlp, expert, gradients, adam)
    return 0
