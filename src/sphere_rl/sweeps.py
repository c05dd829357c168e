"""Adam's step on MLPs whose weight gradients exist only while they are used.

The gradient of a linear layer's weights is DᵀH, with H [n, in] the inputs of its n rows and D [n, out] the gradients of
its outputs, here called signals. So the inner product of two such gradients is Σ (DD'ᵀ) ∘ (HHᵀ), from n × n matrices,
and a sum of two is one product (aD + bD')ᵀH. A minibatch gives an expert few rows, hence two sweeps: `descend` finds
the signals and the inner products, which decide how long each gradient may be; `ascend` makes each expert's gradient
once and hands it to Adam while it is in the cache. Gradients of many rows are made in the first sweep and kept.

All of it is TorchScript (see `sphere_rl.scripting`) and differentiates nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sphere_rl.mixture import Layers
from sphere_rl.optimizer import AdamStep, adam_step
from sphere_rl.scripting import scripted

Block = tuple[int, int, int, int]
"""(MLP, expert, first row, end row)."""


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

    Those of the penalty are for the rows of each layer and empty where zero; of hidden ones, for what ReLU returns.
    """

    inputs: list[Tensor]
    loss: Tensor
    penalty: list[Tensor]


@scripted
def _is_brief(n: int, k: int, out: int, width: int) -> bool:
    """Whether gradients of n rows are best made when they are used.

    To write one to memory and read it again takes about as long as the arithmetic of 20 rows.
    """
    return n * n * (width + k * out) < ((k - 1) * n + 20 * k) * out * width


@scripted
def _inner(signals: Tensor, gradients: Tensor, inputs: Tensor) -> Tensor:
    """Inner products [k, k] of the k gradients of a layer's weights and bias."""
    k = signals.size(0)
    if gradients.numel() > 0:
        flat, bias = gradients.view(k, -1), signals.sum(1)
        return torch.mm(flat, flat.t()).addmm_(bias, bias.t())
    samples = torch.mm(inputs, inputs.t()).add_(1.0)  # the bias is the weight of an input that is 1
    return torch.mm(signals.view(k, -1), torch.matmul(samples, signals).view(k, -1).t())


@scripted
def descend(
    blocks: list[Block],
    mlps: list[Mlp],
    given: list[Given],
    k: int,
    inner: list[Tensor],
    signals_found: list[Tensor],
    gradients_found: list[Tensor],
) -> int:
    """From the outputs to the first layer; ``inner[mlp]`` [E, k, k] gets each expert's inner products.

    Gradient 0 is the loss's and gradient k − 1 the penalty's; with k = 1 they are one, their sum. Block after block and
    layer after layer from the last, signals [k, n, out] are appended and gradients [k, out, in], empty where brief.
    A block without rows has gradients of zero.
    """
    for index, expert, start, end in blocks:
        own, weights = given[index], mlps[index].weights[expert]
        n, depth, none = end - start, len(weights), inner[index].new_empty(0)
        if n == 0:
            signals_found.extend([none] * depth)
            gradients_found.extend([none] * depth)
            continue
        signals = own.loss.new_zeros(k, n, own.loss.size(1))
        signals[0].copy_(own.loss[start:end])
        products: list[Tensor] = []
        for back in range(depth):
            layer = depth - 1 - back
            out, width = weights[layer].size(0), weights[layer].size(1)
            if back > 0:
                signals = torch.mm(signals.view(k * n, -1), weights[layer + 1]).view(k, n, out)
            if own.penalty[layer].numel() > 0:
                signals[k - 1].add_(own.penalty[layer][start:end])
            if back > 0:
                signals = torch.ops.aten.threshold_backward(signals, own.inputs[layer + 1][start:end], 0)
            inputs, gradients = own.inputs[layer][start:end], none
            if not _is_brief(n, k, out, width):
                gradients = torch.bmm(signals.transpose(1, 2), inputs.expand(k, n, width))
            products.append(_inner(signals, gradients, inputs))
            signals_found.append(signals)
            gradients_found.append(gradients)
        torch.sum(torch.stack(products), [0], False, out=inner[index][expert])
    return 0


@scripted
def _combined(tensors: Tensor, factors: list[Tensor]) -> Tensor:
    """Σ_i factors[i] · tensors[i], in the first one's place."""
    total = tensors[0].mul_(factors[0])
    for i in range(1, len(factors)):
        total.addcmul_(tensors[i], factors[i])
    return total


@scripted
def ascend(
    blocks: list[Block],
    mlps: list[Mlp],
    given: list[Given],
    signals_found: list[Tensor],
    gradients_found: list[Tensor],
    factors: list[Tensor],
    adam: AdamStep,
) -> int:
    """Adam's step of the weights of these blocks on Σ_i factors[i] · gradient i; the biases' gradients are filled."""
    position = 0
    for index, expert, start, end in blocks:
        mlp, none = mlps[index], factors[0].new_empty(0)
        depth = len(mlp.steps)
        gradients = [none] * depth
        for back in range(depth):
            layer = depth - 1 - back
            if start == end:
                gradients[layer] = torch.zeros_like(mlp.weights[expert][layer])
            else:
                signals = _combined(signals_found[position], factors)
                torch.sum(signals, [0], False, out=mlp.grad_biases[layer][expert])
                if gradients_found[position].numel() > 0:
                    gradients[layer] = _combined(gradients_found[position], factors)
                else:
                    gradients[layer] = torch.mm(signals.t(), given[index].inputs[layer][start:end])
                if len(mlp.grad_weights) > 0:
                    mlp.grad_weights[layer][expert].copy_(gradients[layer])
            position += 1
        # Lists that come from outside: PyTorch takes what is written to the tensors of a new list for dead code.
        weights, first, second = mlp.weights[expert], mlp.first[expert], mlp.second[expert]
        adam_step(
            AdamStep(weights, gradients, first, second, mlp.steps, adam.rate, adam.beta1, adam.beta2, adam.eps), None
        )
    return 0
