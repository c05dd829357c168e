"""This library's networks in other people's trainers: what they need of one, and what its plasticity is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sphere_rl.errors import ConfigError
from sphere_rl.experts.network import MoENetwork
from sphere_rl.experts.tracing import is_being_exported
from sphere_rl.integrations.gradient_share import Amount, amount
from sphere_rl.integrations.hooks import track
from sphere_rl.integrations.regularizer import regularize
from sphere_rl.penalty import check_scale
from sphere_rl.spectrum import SPECTRAL_METRICS, measure, weight_metrics
from sphere_rl.spectrum.kernel import untouched
from sphere_rl.spectrum.plasticity import churn


def added_by(options: Mapping[str, Any]) -> Amount:
    """What ``sphere_rho``, ``sphere_strength`` and ``sphere_scale`` say that the backward pass adds.

    Raises:
        ValueError: a number or scale that is not allowed, or both numbers.
    """
    try:
        check_scale(options["sphere_scale"])
        return amount(options["sphere_rho"], options["sphere_strength"], options["sphere_scale"])
    except ValueError as error:
        raise ValueError(f"sphere_{error}") from None


def uniform(field: str, layers: Sequence[int]) -> tuple[int, int]:
    """Width and depth of an expert's hidden layers.

    Raises:
        ConfigError: there is none, or they differ in width.
    """
    if not layers or len(set(layers)) > 1:
        raise ConfigError(field, layers, "hidden layers of one width for the experts, as in [64, 64]")
    return layers[0], len(layers)


def regularized_output(network: MoENetwork, observation: Float[Tensor, "N D"], added: Amount) -> Float[Tensor, "N A"]:
    """``network(observation)``, with `sphere_rl.regularize` of its last hidden features and routing weights.

    So whatever loss is made of the output, the backward pass adds the penalty's gradient as ``added`` says; a network
    without a gate is regularised at its features. Without gradients, or where nothing is added, it is the plain output.
    """
    if not torch.is_grad_enabled() or 0 in (added.rho, added.strength) or is_being_exported():
        return network(observation)
    trace, options = network.trace(observation), added._asdict()
    features, gates = trace.features[-1].dense(), trace.gates
    if network.gate is None:
        features = regularize(features[:, 0], **options)[:, None]
    else:
        features, gates = regularize(features, gates, **options)
    gates = gates * (trace.gates != 0)  # the biases of experts that were not selected are no part of the output
    weight, bias = network.experts.head.effective()
    return torch.einsum("neh,eah->na", features * gates[:, :, None], weight) + gates @ bias


class DensePolicy(nn.Module):
    """A network without experts in two parts: ``hidden``, whose output is Φ, and ``head``."""

    def __init__(self, hidden: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.hidden, self.head = hidden, head

    def forward(self, observation: Float[Tensor, "N D"]) -> Float[Tensor, "N A"]:
        """Apply one after the other."""
        return self.head(self.hidden(observation))


def plasticity(
    policy: MoENetwork | DensePolicy,
    observation: Float[Tensor, "N D"],
    previous: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Every metric of `sphere_rl.spectrum.SPECTRAL_METRICS` that applies, for either kind of network.

    The parameters' present gradients, if there are any, add grama_ratio and grad_norm; ``previous`` parameters, by
    name, add weight_change and churn. Nothing of the network or of a random state changes.
    """
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None} or None
    if isinstance(policy, MoENetwork):
        return measure(policy, observation, gradients=gradients, previous=previous)
    with track(policy, features="hidden") as tracker:
        found: dict[str, Any] = tracker.metrics(observation)
    found |= weight_metrics(policy, gradients, previous)
    if previous is not None:
        with untouched(policy), torch.no_grad():
            before = {name: previous[name] for name, _ in policy.named_parameters()}
            found["churn"] = churn(policy(observation), torch.func.functional_call(policy, before, (observation,)))
    return {name: found[name] for name in SPECTRAL_METRICS if name in found}
