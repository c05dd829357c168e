"""What several methods share: the linear layers of agents, new weights, and the recycling of hidden units."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sphere_rl.experts.layers import GroupedLinear, RoutedFeatures
from sphere_rl.experts.network import Actor, MoENetwork, Trace
from sphere_rl.learner.actor_critic import ActorCritic


def networks(agent: ActorCritic) -> dict[str, MoENetwork]:
    """Actor and critic by name."""
    return {"actor": agent.actor, "critic": agent.critic}


def hidden_layers(network: MoENetwork) -> list[GroupedLinear]:
    """Every linear layer that a nonlinearity follows, the gate's included."""
    return [layer for mlp in network.parts for layer in mlp.hidden if isinstance(layer, GroupedLinear)]


def linear_layers(network: MoENetwork) -> list[GroupedLinear]:
    """Hidden and output layers, the gate's included."""
    return hidden_layers(network) + [mlp.head for mlp in network.parts]


def fresh_networks(agent: ActorCritic) -> tuple[Actor, MoENetwork]:
    """An actor and a critic as at the start of training, with new weights from the agent's random stream."""
    seed = torch.randint(2**31, (), generator=agent.generator, device=agent.device)
    return agent.fresh_networks(torch.Generator().manual_seed(int(seed)))


@torch.no_grad()
def renew(agent: ActorCritic, module: nn.Module, fresh: nn.Module, shrink: float = 0.0, perturb: float = 1.0) -> None:
    """θ ← shrink·θ + perturb·θ_fresh for all parameters of a part of an agent, with fresh Adam state."""
    mix(module, fresh, shrink, perturb)
    for parameter in module.parameters():
        agent.forget(parameter)
    for layer in module.modules():
        if isinstance(layer, GroupedLinear):
            layer.settle_norm()


@torch.no_grad()
def mix(module: nn.Module, fresh: nn.Module, shrink: float, perturb: float) -> None:
    """θ ← shrink·θ + perturb·θ_fresh for all parameters."""
    for old, new in zip(module.parameters(), fresh.parameters(), strict=True):
        old.mul_(shrink).add_(new, alpha=perturb)


@dataclass(frozen=True)
class UnitLayer:
    """U hidden units in each of E experts: rows of one layer's weights, columns of the next one's.

    A unit has one feature, or two with CReLU (units i and U + i of the next layer's inputs).
    """

    incoming: GroupedLinear
    outgoing: GroupedLinear

    @property
    def num_units(self) -> int:
        """U."""
        return self.incoming.weight.shape[1]

    @property
    def num_features(self) -> int:
        """U, or 2U with CReLU."""
        return self.outgoing.weight.shape[2]

    def per_unit(self, values: Float[Tensor, "*b F"]) -> Float[Tensor, "*b U"]:
        """Sum a quantity of features over each unit's."""
        return values.unflatten(-1, (-1, self.num_units)).sum(-2)

    def features_of(self, units: Bool[Tensor, "E U"]) -> Bool[Tensor, "E F"]:
        """The features that these units feed."""
        return units.repeat(1, self.num_features // self.num_units)

    def outgoing_weights(self) -> list[Float[Tensor, "E out F"]]:
        """The trained outgoing weights and, after plasticity injection, the frozen ones."""
        frozen = dict(self.outgoing.named_buffers()).get("frozen_weight")
        return [self.outgoing.weight] if frozen is None else [self.outgoing.weight, frozen]


def unit_layers(network: MoENetwork) -> list[UnitLayer]:
    """All hidden units of a network, layer by layer: the experts', then the gate's, as in `unit_features`."""
    layers = []
    for mlp in network.parts:
        chain = [layer for layer in mlp.layers if isinstance(layer, GroupedLinear)]
        layers += [UnitLayer(a, b) for a, b in pairwise(chain)]
    return layers


def unit_features(trace: Trace) -> tuple[RoutedFeatures, ...]:
    """The features of each of `unit_layers`."""
    return trace.features + trace.gate_features


def mean_by_expert(features: RoutedFeatures, values: Float[Tensor, "M F"]) -> Float[Tensor, "E F"]:
    """Mean over the samples routed to each expert; zero for experts that saw none."""
    routing = features.routing
    total = values.new_zeros(routing.num_experts, values.shape[1]).index_add_(0, routing.expert, values)
    return total / seen_by_expert(features).to(values)[:, None].clamp(min=1)


def seen_by_expert(features: RoutedFeatures) -> Tensor:
    """Samples that were routed to each expert [E]."""
    return torch.tensor(features.routing.counts, device=features.values.device)


@torch.no_grad()
def recycle(agent: ActorCritic, layers: list[UnitLayer], units: list[Bool[Tensor, "_ _"]]) -> None:
    """Begin chosen units anew: incoming weights redrawn (LeCun normal), bias and outgoing weights zero.

    Adam's moments of these entries are zeroed too. Outgoing weights come last, so that a recycled unit has no effect
    on the output even where the unit that it feeds is recycled with it.
    """
    for layer, mask in zip(layers, units, strict=True):
        weight, bias = layer.incoming.weight, layer.incoming.bias
        shape = (int(mask.sum()), weight.shape[2])
        new = torch.randn(shape, generator=agent.generator, device=weight.device, dtype=weight.dtype)
        weight[mask] = new * weight.shape[2] ** -0.5
        bias[mask] = 0.0
        for moment in (*agent.moments(weight), *agent.moments(bias)):
            moment[mask] = 0.0
    for layer, mask in zip(layers, units, strict=True):
        columns = layer.features_of(mask)
        for tensor in (*layer.outgoing_weights(), *agent.moments(layer.outgoing.weight)):
            tensor.mT[columns] = 0.0
