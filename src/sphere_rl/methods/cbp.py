"""Continual backpropagation: after every minibatch a few of the least useful units begin anew.

Utility u ← 0.99 u + 0.01 mean|w_out|·mean|h|, corrected for its start at zero. In each minibatch a layer earns
ρ · (number of its mature units) replacements and spends whole ones on the mature units of least utility: incoming
weights redrawn, bias and outgoing weights zero, and what the unit gave on average goes into the next layer's bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sphere_rl.experts.layers import RoutedFeatures
from sphere_rl.experts.network import Trace
from sphere_rl.learner.actor_critic import ActorCritic
from sphere_rl.learner.minibatch import Minibatch
from sphere_rl.methods import Method, MethodConfig, check_range
from sphere_rl.methods._layers import (
    UnitLayer,
    mean_by_expert,
    networks,
    recycle,
    seen_by_expert,
    unit_features,
    unit_layers,
)


@dataclass(frozen=True)
class CbpConfig(MethodConfig):
    """How many units are replaced, and which."""

    rate: float = 1e-4
    """ρ: share of the mature units that is replaced in each minibatch."""
    maturity: int = 10_000
    """Minibatches for which a new unit is safe."""
    decay: float = 0.99
    """Decay of the running means of utility and activation."""

    def __post_init__(self) -> None:
        check_range("cbp", self, "rate", high=1)
        check_range("cbp", self, "decay", high=1 - 1e-9)
        check_range("cbp", self, "maturity", low=0)


@dataclass
class UnitStatistics:
    """Running statistics of one layer of units; an expert's stand still while no sample reaches it.

    utility: u before correction. activation: running mean of each feature, signed. age: minibatches since the unit
    began. credit: replacements earned and not yet spent.
    """

    utility: Float[Tensor, "E U"]
    activation: Float[Tensor, "E F"]
    age: Int[Tensor, "E U"]
    credit: Float[Tensor, "E"]

    @classmethod
    def of(cls, layer: UnitLayer) -> UnitStatistics:
        """Zeros for this layer."""
        weight = layer.outgoing.weight
        experts, units = len(weight), layer.num_units
        activation = weight.new_zeros(experts, layer.num_features)
        age = torch.zeros(experts, units, dtype=torch.int64, device=weight.device)
        # float64: ρ is added up over tens of thousands of minibatches.
        return cls(weight.new_zeros(experts, units), activation, age, activation.new_zeros(experts).double())

    def begin_anew(self) -> None:
        """As of units that nothing is known of; what was earned is kept."""
        for statistic in (self.utility, self.activation, self.age):
            statistic.zero_()


class Cbp(Method):
    """Hidden units of actor and critic; an expert's units are its own layer, the gate's too.

    statistics: what `start` begins, of every layer by the network's name.
    """

    summary = "continual backpropagation: replace the least useful mature units, a few at a time"
    citation = "Dohare et al. 2024, Loss of Plasticity in Deep Continual Learning (Nature)"
    Config = CbpConfig

    def __init__(self, config: CbpConfig) -> None:
        super().__init__(config)
        self.statistics: dict[str, list[UnitStatistics]] = {}
        self._features: dict[str, tuple[RoutedFeatures, ...]] = {}
        self._replaced = 0

    def start(self, agent: ActorCritic) -> None:
        """Statistics at zero."""
        self.statistics = {
            name: [UnitStatistics.of(layer) for layer in unit_layers(network)]
            for name, network in networks(agent).items()
        }

    def after_task_start(self, agent: ActorCritic, task_index: int) -> None:
        """Units whose incoming weights were replaced, Adam's moments too, are new."""
        for name, network in networks(agent).items():
            for layer, statistics in zip(unit_layers(network), self.statistics[name], strict=True):
                if agent.is_new(layer.incoming.weight):
                    statistics.begin_anew()

    def observe(self, network: str, trace: Trace) -> None:
        """Keep the features of the forward pass."""
        self._features[network] = unit_features(trace)

    @torch.no_grad()
    def after_minibatch(self, agent: ActorCritic, batch: Minibatch) -> None:
        """Update the statistics with these features and the new weights; replace what is due."""
        for name, network in networks(agent).items():
            layers, chosen = unit_layers(network), []
            for layer, features, statistics in zip(layers, self._features[name], self.statistics[name], strict=True):
                accumulate(statistics, layer, features, self.config)
                chosen.append(choose(statistics, self.config))
            if number := int(torch.stack([mask.sum() for mask in chosen]).sum()):
                for layer, mask, statistics in zip(layers, chosen, self.statistics[name], strict=True):
                    fold(statistics, layer, mask, self.config.decay)
                recycle(agent, layers, chosen)
                self._replaced += number
        self._features = {}

    def metrics(self) -> dict[str, float | Tensor]:
        """Units replaced since the start of training."""
        return {"cbp_replaced": float(self._replaced)}

    def state_dict(self) -> dict[str, Any]:
        """All statistics."""
        layers = {name: [vars(s) for s in layers] for name, layers in self.statistics.items()}
        return {"layers": layers, "replaced": self._replaced}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._replaced = state["replaced"]
        for name, layers in self.statistics.items():
            for mine, theirs in zip(layers, state["layers"][name], strict=True):
                for key, tensor in vars(mine).items():
                    tensor.copy_(theirs[key])


@torch.no_grad()
def accumulate(statistics: UnitStatistics, layer: UnitLayer, features: RoutedFeatures, config: CbpConfig) -> None:
    """Move the running means of experts that saw samples, age their units and earn replacements."""
    seen = seen_by_expert(features) > 0
    share = (1 - config.decay) * seen.to(features.values)[:, None]
    size, mean = mean_by_expert(features, features.values.abs()), mean_by_expert(features, features.values)
    utility = layer.per_unit(layer.outgoing.effective()[0].abs().mean(1) * size)
    statistics.utility.lerp_(utility, share)
    statistics.activation.lerp_(mean, share)
    statistics.age.add_(seen[:, None])
    statistics.credit.add_((statistics.age > config.maturity).sum(1) * seen * config.rate)


def choose(statistics: UnitStatistics, config: CbpConfig) -> Bool[Tensor, "E U"]:
    """As many mature units of least corrected utility as there are whole replacements to spend, which are spent."""
    mature = statistics.age > config.maturity
    number = torch.minimum(statistics.credit.floor().long(), mature.sum(1))
    statistics.credit.sub_(number)
    corrected = statistics.utility / correction(statistics.age, config.decay)
    rank = corrected.masked_fill(~mature, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    return rank < number[:, None]


@torch.no_grad()
def fold(statistics: UnitStatistics, layer: UnitLayer, units: Bool[Tensor, "E U"], decay: float) -> None:
    """Put the mean contribution of these units into the next layer's bias, and their statistics back to zero."""
    columns = layer.features_of(units)
    ages = statistics.age.repeat(1, columns.shape[1] // units.shape[1])
    mean = statistics.activation / correction(ages, decay) * columns
    layer.outgoing.bias.add_(torch.einsum("eof,ef->eo", layer.outgoing.effective()[0], mean))
    statistics.utility[units], statistics.age[units], statistics.activation[columns] = 0.0, 0, 0.0


def correction(age: Int[Tensor, "E U"], decay: float) -> Float[Tensor, "E U"]:
    """1 − decay^age, what a running mean that began at zero has to be divided by; 1 at age 0."""
    return torch.where(age > 0, 1 - decay ** age.double(), 1.0).float()
