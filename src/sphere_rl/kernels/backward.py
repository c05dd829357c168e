"""Adam's step on MLPs whose weight gradients exist only while they are used.

The gradient of a linear layer's weights is G = DᵀH, with H [n, in] the inputs of its n rows and D [n, out] the
gradients of its outputs, here called signals. So the inner product of two such gradients is ⟨G, G'⟩ = Σ (DD'ᵀ) ∘ (HHᵀ),
from n × n matrices, and a sum of two with the same inputs is one product, aG + bG' = (aD + bD')ᵀH.

A minibatch gives an expert few rows, hence two sweeps. `backpropagate` finds the signals and the inner products, which
decide how long each gradient may be. `update_weights` makes each expert's gradient once, already scaled, and hands it
to Adam while it is in the cache. Where an expert has many rows, gradients are made in the first sweep and kept.

There are k gradients: one, or two where the loss's and a penalty's must be told apart because their norms decide how
they are added up. All of it is TorchScript (see `sphere_rl.kernels.script`) and differentiates nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sphere_rl.kernels.adam import AdamStep, adam_step
from sphere_rl.kernels.mixture import Layers
from sphere_rl.kernels.script import scripted

Block = tuple[int, int, int, int]
"""(MLP, expert, first row, end row): the rows of one expert of one MLP, n = end − first of them."""


class MlpState(NamedTuple):
    """An MLP of E experts and L layers with Adam's moments; per-expert tensors are views of the whole ones."""

    layers: Layers
    """Weights [E, out, in] and biases [E, out] of each layer."""
    weights: list[list[Tensor]]
    """Of each expert, each layer's weights [out, in]."""
    first: list[list[Tensor]]
    """Their first moments."""
    second: list[list[Tensor]]
    """Their second moments."""
    steps: list[Tensor]
    """Adam's step count of each layer's weights."""
    grad_biases: list[Tensor]
    """Of each layer [E, out]; filled by `update_weights`."""
    grad_weights: list[Tensor]
    """Of each layer [E, out, in], filled too; no tensors where nobody asks for them."""


class BackwardInputs(NamedTuple):
    """What a backward pass through an MLP reads; its M rows are sorted by expert."""

    inputs: list[Tensor]
    """Of each layer, its inputs [M, in]."""
    loss: Tensor
    """∂loss/∂(output of the last layer) [M, out]; its memory is used up: with k = 1 its rows are the first signals."""
    penalty: list[Tensor]
    """Of each layer, ∂penalty/∂(what it puts out, hidden ones after their ReLU) [M, out]; empty where zero."""
    strength: Tensor
    """What the penalty is multiplied by before it joins the loss's signals; 1 where the two stay apart."""


class BlockGradients(NamedTuple):
    """What `backpropagate` finds of each block and each of its layers."""

    inputs: list[list[Tensor]]
    """[n, in]."""
    signals: list[list[Tensor]]
    """[k, n, out]."""
    gradients: list[list[Tensor]]
    """[k, out, in]; empty where they are made later."""
    inner: list[list[Tensor]]
    """Inner products of the k gradients of weights and bias [k, k]."""


@scripted
def is_cheaper_later(n: int, k: int, out: int, width: int) -> bool:
    """Whether gradients [out, width] of n rows are best made when Adam uses them, from signals already summed.

    To write one to memory and read it again takes about as long as the arithmetic of 20 rows.
    """
    return n * n * (width + k * out) < ((k - 1) * n + 20 * k) * out * width


@scripted
def no_gradients(blocks: list[Block], mlps: list[MlpState]) -> BlockGradients:
    """What `backpropagate` fills."""
    none = mlps[0].steps[0].new_empty(0)
    depths = [len(mlps[index].steps) for index, _, _, _ in blocks]
    inputs, signals, gradients, inner = [[[none] * depth for depth in depths] for _ in range(4)]
    return BlockGradients(inputs, signals, gradients, inner)


@scripted
def _inner_of_signals(signals: Tensor, inputs: Tensor) -> Tensor:
    """Inner products [k, k] of the gradients of a layer's weights and bias: Σ (DD'ᵀ) ∘ (HHᵀ + 1)."""
    samples = torch.mm(inputs, inputs.t()).add_(1.0)  # the bias is the weight of an input that is 1
    k = signals.size(0)
    return torch.mm(signals.view(k, -1), torch.matmul(samples, signals).view(k, -1).t())


@scripted
def _gradients_and_inner(signals: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients DᵀH [k, out, in] of a layer's weights, and the inner products [k, k] with those of its bias."""
    k, n = signals.size(0), signals.size(1)
    gradients = torch.bmm(signals.transpose(1, 2), inputs.expand(k, n, inputs.size(1)))
    flat, bias = gradients.view(k, -1), signals.sum(1)
    return gradients, torch.mm(flat, flat.t()).addmm_(bias, bias.t())


@scripted
def backpropagate(
    chosen: list[int],
    blocks: list[Block],
    mlps: list[MlpState],
    given: list[BackwardInputs],
    k: int,
    apart: bool,
    found: BlockGradients,
) -> int:
    """Fill ``found`` for the chosen blocks, from their outputs to their first layer; ``given`` is of each MLP.

    Gradient 0 is the loss's and gradient k − 1 the penalty's; with k = 1 they are one, their sum. ``apart``: make
    gradients on another thread.
    """
    later: list[tuple[int, int, torch.jit.Future[tuple[Tensor, Tensor]]]] = []
    for block in chosen:
        index, expert, start, end = blocks[block]
        own, weights = given[index], mlps[index].weights[expert]
        n, depth = end - start, len(weights)
        signals = own.loss[start:end].unsqueeze(0)
        if k > 1:  # the penalty's begin at zero
            signals = torch.cat([signals, torch.zeros_like(signals)])
        for back in range(depth):
            layer = depth - 1 - back
            out, width = weights[layer].size(0), weights[layer].size(1)
            if back > 0:
                signals = torch.mm(signals.view(k * n, -1), weights[layer + 1]).view(k, n, out)
            if own.penalty[layer].numel() > 0:
                signals[k - 1].addcmul_(own.penalty[layer][start:end], own.strength)
            if back > 0:
                signals = torch.ops.aten.threshold_backward(signals, found.inputs[block][layer + 1], 0)
            inputs = own.inputs[layer][start:end]
            found.inputs[block][layer], found.signals[block][layer] = inputs, signals
            if is_cheaper_later(n, k, out, width):
                found.inner[block][layer] = _inner_of_signals(signals, inputs)
            elif apart:
                later.append((block, layer, torch.jit.fork(_gradients_and_inner, signals, inputs)))  # type: ignore[reportArgumentType]
            else:
                found.gradients[block][layer], found.inner[block][layer] = _gradients_and_inner(signals, inputs)
    for block, layer, other in later:
        found.gradients[block][layer], found.inner[block][layer] = torch.jit.wait(other)
    return 0


@scripted
def inner_products(found: BlockGradients) -> Tensor:
    """Those [k, k] of the whole gradients, of all blocks and layers."""
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
def update_expert(mlp: MlpState, expert: int, gradients: list[Tensor], adam: AdamStep) -> None:
    """Adam's step of an expert's weights on these gradients [out, in] of its layers."""
    # Lists that come from outside: PyTorch takes what is written to the tensors of a new list for dead code.
    weights, first, second = mlp.weights[expert], mlp.first[expert], mlp.second[expert]
    adam_step(AdamStep(weights, gradients, first, second, mlp.steps, adam.rate, adam.beta1, adam.beta2, adam.eps), None)


@scripted
def update_weights(
    chosen: list[int],
    blocks: list[Block],
    mlps: list[MlpState],
    found: BlockGradients,
    factors: list[Tensor],
    adam: AdamStep,
) -> int:
    """Adam's step of the weights of these blocks on Σ_i factors[i] · gradient i; the biases' gradients are filled."""
    for block in chosen:
        index, expert, _, _ = blocks[block]
        mlp = mlps[index]
        gradients = list(found.gradients[block])  # a copy: what is made here is freed with the block
        for back in range(len(gradients)):
            layer = len(gradients) - 1 - back
            signals = _combined(found.signals[block][layer], factors)
            torch.sum(signals, [0], False, out=mlp.grad_biases[layer][expert])
            if gradients[layer].numel() > 0:
                gradients[layer] = _combined(gradients[layer], factors)
            else:
                gradients[layer] = torch.mm(signals.t(), found.inputs[block][layer])
            if len(mlp.grad_weights) > 0:
                mlp.grad_weights[layer][expert].copy_(gradients[layer])
        update_expert(mlp, expert, gradients, adam)
    return 0
