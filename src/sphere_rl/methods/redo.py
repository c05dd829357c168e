"""ReDo: dormant units begin anew.

A unit's score is its mean |h_i| over the mean of its layer, however small that is. Every few iterations units with
score ≤ τ get new incoming weights, bias 0 and outgoing weights 0, and their Adam moments are zeroed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sphere_rl.experts.network import MoENetwork, Trace
from sphere_rl.learner.actor_critic import ActorCritic
from sphere_rl.learner.rollout import Rollout
from sphere_rl.methods import Method, MethodConfig, check_range
from sphere_rl.methods._layers import mean_by_expert, networks, recycle, unit_features, unit_layers


@dataclass(frozen=True)
class RedoConfig(MethodConfig):
    """Which units are dormant, and how often they are looked for."""

    threshold: float = 0.025
    """τ: units with a score up to this are recycled."""
    every: int = 10
    """Iterations between two looks."""
    samples: int = 2048
    """Observations of the rollout that activity is measured on, drawn at random."""

    def __post_init__(self) -> None:
        check_range("redo", self, "threshold")
        check_range("redo", self, "every samples", low=1)


class Redo(Method):
    """Hidden units of actor and critic; an expert's units are its own layer, the gate's too.

    A layer that is silent altogether, such as that of an expert that no sample was routed to, is left alone: there is
    no activity to compare with.
    """

    summary = "re-initialise dormant units"
    citation = "Sokar et al. 2023, The Dormant Neuron Phenomenon in Deep Reinforcement Learning (ICML)"
    Config = RedoConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._iterations = 0
        self._recycled: Tensor | float = 0.0

    @torch.no_grad()
    def after_iteration(self, agent: ActorCritic, rollout: Rollout) -> None:
        """Look for dormant units, when it is time to."""
        self._iterations += 1
        if self._iterations % self.config.every:
            return
        recycled, units = [], 0
        for network, activity in zip(networks(agent).values(), self._activity(agent, rollout), strict=True):
            dormant = [dormant_units(layer, self.config.threshold) for layer in activity]
            recycle(agent, unit_layers(network), dormant)
            recycled += [mask.sum() for mask in dormant]
            units += sum(mask.numel() for mask in dormant)
        self._recycled = torch.stack(recycled).sum() / units

    def _activity(self, agent: ActorCritic, rollout: Rollout) -> list[list[Float[Tensor, "_ _"]]]:
        """Mean |h| [E, U] of each of a network's `unit_layers`, for actor and critic."""
        observation = rollout.observation.flatten(0, 1)
        order = torch.randperm(len(observation), generator=agent.generator, device=agent.device)
        observation = observation[order[: self.config.samples]]
        return [unit_activity(network, network.trace(observation)) for network in networks(agent).values()]

    def metrics(self) -> dict[str, float | Tensor]:
        """Share of all units that the last look recycled."""
        return {f"{self.name}_recycled": self._recycled}

    def state_dict(self) -> dict[str, Any]:
        """Iterations so far, and the last look's metric."""
        return {"iterations": self._iterations, "recycled": float(self._recycled)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._iterations, self._recycled = state["iterations"], state["recycled"]


def dormant_units(activity: Float[Tensor, "E U"], threshold: float) -> Bool[Tensor, "E U"]:
    """Units whose share of their expert's mean is at most the threshold, in experts that are active at all."""
    mean = activity.mean(1, keepdim=True)
    return (activity <= threshold * mean) & (mean > 0)


def unit_activity(network: MoENetwork, trace: Trace) -> list[Float[Tensor, "_ _"]]:
    """Mean |h| [E, U] of each of `unit_layers`; both features of a CReLU unit count."""
    return [
        layer.per_unit(mean_by_expert(features, features.values.abs()))
        for layer, features in zip(unit_layers(network), unit_features(trace), strict=True)
    ]
