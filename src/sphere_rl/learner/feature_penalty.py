"""How a penalty on features joins PPO's loss: its form, its strength, and how two gradients become a step's.

The strengths are functions that autograd's step (`sphere_rl.methods.sphere`) and the one without it share.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sphere_rl.kernels.adam import clip_scale
from sphere_rl.kernels.gram import centred_gram, gram_gradients
from sphere_rl.kernels.routing import Assignments, blocks_of
from sphere_rl.kernels.script import scriptable, scripted

EPSILON = 1e-8
"""What keeps a strength finite; an argument's default below, because TorchScript reads no globals."""


class FeaturePenalty(NamedTuple):
    """How far the Grams of some hidden layers are from isotropic, summed, and how that joins the loss.

    What a method says by its hook `feature_penalty` to keep the step without autograd.
    """

    layers: list[bool]
    """Of each hidden layer of the experts, whether its Gram is penalised; empty: there is no penalty."""
    mode: str
    """What it is multiplied by. ``fixed``: share. ``loss``: share · |loss| / penalty. ``grad``: share · ‖g‖ / ‖g_p‖,
    with g and g_p the gradients of loss and penalty.
    """
    share: float
    pcgrad: bool
    """Mode grad: take from g_p first what opposes g."""
    free: bool
    """The scale-free penalty, not the literal one."""


NO_PENALTY = FeaturePenalty([], "fixed", 0.0, pcgrad=False, free=False)
"""Where no method has one."""


class Penalty(NamedTuple):
    """The penalties of all penalised layers, summed, and their derivatives."""

    value: Tensor
    of_gate: Tensor
    """For the routing weights of the experts' rows [M]."""
    of_layers: list[Tensor]
    """For what each layer puts out [M, H]; empty where zero."""


@scriptable
def share_of_loss(share: float, loss: Tensor, penalty: Tensor, epsilon: float = EPSILON) -> Tensor:
    """λ = share · |loss| / (penalty + ε)."""
    return share * loss.abs() / (penalty + epsilon)


@scriptable
def share_of_norm(share: float, norm: Tensor, of_penalty: Tensor, epsilon: float = EPSILON) -> Tensor:
    """share · ‖g‖ / (‖g_p‖ + ε), from the norms of the gradients of loss and penalty."""
    return share * norm / (of_penalty + epsilon)


@scriptable
def conflict(inner: Tensor, square: Tensor, epsilon: float = EPSILON) -> Tensor:
    """PCGrad (Yu et al. 2020): min(0, ⟨g, g_p⟩) / (‖g‖² + ε), the multiple of g that is taken from g_p."""
    return inner.clamp(max=0.0) / (square + epsilon)


@scripted
def penalty_of(features: list[Tensor], found: Assignments, spec: FeaturePenalty) -> Penalty:
    """The penalty of hidden layers with these features [M, H]."""
    total, of_gate = found.gate.new_zeros([]), torch.zeros_like(found.gate)
    of_layers = [found.gate.new_empty(0)] * (len(features) + 1)
    n, experts, blocks = found.weights.size(0), found.weights.size(1), blocks_of(found.counts)
    for layer in range(len(spec.layers)):
        if spec.layers[layer]:
            gram = centred_gram(features[layer], found.gate, found.sample, blocks, n, experts, spec.free)
            of_values, of_weights = gram_gradients(found.gate, found.sample, blocks, gram)
            total, of_layers[layer] = total + gram.penalty, of_values
            of_gate += of_weights
    return Penalty(total, of_gate, of_layers)


@scripted
def strength_of(penalty: Tensor, loss: Tensor, spec: FeaturePenalty) -> Tensor:
    """What the penalty is multiplied by before the sweeps; in mode grad that has to wait for both norms."""
    if spec.mode == "grad":
        return torch.ones_like(loss)
    if spec.mode == "loss":
        return share_of_loss(spec.share, loss, penalty)
    return torch.full_like(loss, spec.share)


@scripted
def step_factors(products: Tensor, spec: FeaturePenalty, max_norm: float) -> tuple[Tensor, list[Tensor], Tensor]:
    """How the gradients g of the loss and g_p of the penalty add up to a step's, from their inner products [k, k].

    In mode grad k is 2. With ``pcgrad``, c = min(0, ⟨g, g_p⟩) / ‖g‖² is taken from g_p first, else c = 0:

        s = share · ‖g‖ / ‖g_p − c g‖,   step = (1 − s c) g + s g_p,
        ‖step‖² = (1 − s c)² ‖g‖² + 2 s (1 − s c) ⟨g, g_p⟩ + s² ‖g_p‖².

    In the other modes k is 1, and g holds both. Gives ‖step‖; what each gradient is multiplied by so that the step is
    no longer than ``max_norm``; and s.
    """
    of_loss, cross, of_penalty = products[0, 0], products[0, -1], products[-1, -1]
    kept, strength, square = torch.ones_like(cross), torch.zeros_like(cross), of_loss
    if spec.mode == "grad":
        along = torch.zeros_like(cross)
        if spec.pcgrad:
            along = conflict(cross, of_loss)
        rest = of_penalty - along * (2 * cross - along * of_loss)
        strength = share_of_norm(spec.share, of_loss.sqrt(), rest.clamp(min=0.0).sqrt())
        kept = 1 - strength * along
        square = kept * (kept * of_loss + 2 * strength * cross) + strength.square() * of_penalty
    norm = square.clamp(min=0.0).sqrt()
    scale = clip_scale(norm, max_norm)
    return norm, [kept / scale, strength / scale][: products.size(0)], strength
