"""Actors and critics: a router that weighs E experts for each sample, and the experts.

Every architecture is the same two parts. ``dense`` and ``wide`` have one expert and no gate; the others differ only in
how the gate's logits become routing weights. So every actor has features of the same kind, and the penalty, the
diagnostics and the mitigation methods need no cases.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sphere_rl.errors import ConfigError
from sphere_rl.experts.heads import CategoricalHead, GaussianHead
from sphere_rl.experts.layers import ExpertMLP, RoutedFeatures
from sphere_rl.experts.routing import gated_routing, single_routing
from sphere_rl.kernels.mixture import mixture_output
from sphere_rl.kernels.mlp import is_unrecorded
from sphere_rl.kernels.routing import Gating, gate_weights, selected

DEEPEST = 1000


@dataclass(frozen=True)
class NetworkOptions:
    """Shape of an actor or critic; the layers of the gate are those of an expert."""

    width: int = 256
    """Units of a hidden layer."""
    depth: int = 3
    """Hidden layers."""
    num_experts: int = 10
    """Experts of a mixture, shared ones included."""
    top_k: int = 2
    """Experts that the gate selects for a sample."""
    num_shared: int = 1
    """Always-on experts of shared_moe."""
    temperature: float = 1.0
    """Divides the gate's logits before the softmax."""
    layer_norm: bool = False
    """Linear, LayerNorm without affine, activation in every hidden layer."""
    crelu: bool = False
    """Activation [relu(z), relu(-z)] on half as many linear units in every hidden layer."""
    spectral_norm: bool = False
    """Every hidden weight divided by its largest singular value."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "num_experts", "top_k", "num_shared"):
            if getattr(self, name) >= 2**63:
                raise ConfigError(name, getattr(self, name), "a whole number below 2**63")
        for name in ("width", "depth", "num_experts"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "at least 1")
        if self.depth > DEEPEST:
            raise ConfigError("depth", self.depth, f"1 to {DEEPEST}")
        if self.crelu and self.width % 2:
            raise ConfigError("width", self.width, "an even number with crelu")
        if self.top_k < 1:
            raise ConfigError("top_k", self.top_k, f"1 to num_experts ({self.num_experts})")
        if self.num_shared < 0:
            raise ConfigError("num_shared", self.num_shared, "0 or more")
        if not 0 < self.temperature < inf:
            raise ConfigError("temperature", self.temperature, "a number above 0")

    def check_kind(self, kind: str) -> None:
        """Raise `ConfigError` where an architecture cannot select as many experts; those that do not select take any.

        ``kind`` is one of `KINDS`.
        """
        if kind in ("topk_moe", "shared_moe", "ds_moe") and self.top_k > self.num_experts:
            raise ConfigError("top_k", self.top_k, f"1 to num_experts ({self.num_experts})")
        if kind == "shared_moe" and self.num_shared > self.num_experts - self.top_k:
            most = self.num_experts - self.top_k
            raise ConfigError("num_shared", self.num_shared, f"0 to {most}, num_experts - top_k")


@dataclass(frozen=True)
class Trace:
    """What one forward pass computed: the output and all that the penalty and the diagnostics read.

    Attributes:
        output: mean of the Gaussian or logits of the categorical policy; values for a critic.
        gates: routing weights after top-k (zero for unselected experts); ones [N, 1] without a gate.
        logits: the gate's logits, ``None`` without a gate.
        expert_outputs: what the experts make of their rows, before they are weighted.
        features: hidden features of each expert layer, first to last.
        gate_features: hidden features of each layer of the gate, empty without one.
    """

    output: Float[Tensor, "N A"]
    gates: Float[Tensor, "N E"]
    logits: Float[Tensor, "N R"] | None
    expert_outputs: Float[Tensor, "M A"]
    features: tuple[RoutedFeatures, ...]
    gate_features: tuple[RoutedFeatures, ...]


class MoENetwork(nn.Module):
    """output(x) = Σ_e g_e(x) · expert_e(x), with g from a gate MLP, or g = 1 for a single expert.

    ``kind`` is one of `KINDS`. Gate and experts are MLPs of the same width and depth with ReLU; weights are
    LeCun-normal, biases zero, drawn from ``generator``.
    """

    def __init__(
        self, kind: str, observation_dim: int, output_dim: int, options: NetworkOptions, generator: torch.Generator
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ConfigError("actor", kind, f"one of {', '.join(KINDS)}")
        options.check_kind(kind)
        self.kind, self.options = kind, options
        width = wide_width(observation_dim, output_dim, options) if kind == "wide" else options.width
        gated = kind not in ("dense", "wide")
        num_experts = options.num_experts if gated else 1
        num_routed = num_experts - (options.num_shared if kind == "shared_moe" else 0)
        build: dict[str, Any] = {
            "generator": generator,
            "layer_norm": options.layer_norm,
            "crelu": options.crelu,
            "spectral_norm": options.spectral_norm,
        }
        hidden = [width] * options.depth
        self.gate = ExpertMLP(observation_dim, hidden, num_routed, 1, **build) if gated else None
        self.experts = ExpertMLP(observation_dim, hidden, output_dim, num_experts, **build)

    def trace(self, observation: Float[Tensor, "N D"]) -> Trace:
        """One forward pass with everything it computed."""
        whole = single_routing(len(observation), device=observation.device, dtype=observation.dtype)
        if self.gate is None:
            routing, logits, gate_features = whole, None, ()
        else:
            gate = self.gate(observation, whole)
            routing, logits, gate_features = gated_routing(gate.out, self.gating), gate.out, gate.features
        experts = self.experts(observation, routing)
        return Trace(experts.out, routing.weights, logits, experts.rows, experts.features, gate_features)

    def forward(self, observation: Float[Tensor, "N D"]) -> Float[Tensor, "N A"]:
        """The output alone."""
        if is_being_exported():
            return self._unrouted(observation)
        if not (self.is_plain and is_unrecorded()):
            return self.trace(observation).output
        return mixture_output([mlp.effective() for mlp in self.parts], self.gating, observation, 1)

    def _unrouted(self, observation: Tensor) -> Tensor:
        """The output from all experts, those that are not selected with weight 0: a graph that no sample changes."""
        outputs = self.experts.every(observation)
        if self.gate is None:
            return outputs[0]
        weights, _ = gate_weights(self.gate.every(observation)[0], self.gating)
        return torch.einsum("ne,ena->na", weights, outputs)

    def __prepare_scriptable__(self) -> NoReturn:
        """Tell `torch.jit.script`, which looks for this name, that it cannot read the network."""
        raise TypeError("torch.jit.script: cannot read a network of experts; expected torch.export.export or jit.trace")

    @property
    def observation_dim(self) -> int:
        """D."""
        return self.experts.layers[0].weight.shape[2]

    @torch.inference_mode()
    def selection(self, observation: Float[Tensor, "N D"]) -> Int[Tensor, "N k"] | None:
        """Experts that the gate selects for each sample, in ascending order; ``None`` where it does not select."""
        if self.gate is None:
            return None
        parts = []
        for rows in observation.split(4096):  # all at once would hold every hidden layer of a whole rollout
            logits = self.gate(rows, single_routing(len(rows), device=rows.device, dtype=rows.dtype)).out
            if self.gating.k >= logits.shape[1]:
                return None
            parts.append(selected(logits, self.gating.k))
        return torch.cat(parts).sort(1).values

    @property
    def parts(self) -> list[ExpertMLP]:
        """The experts and, if there is one, the gate."""
        return [mlp for mlp in (self.experts, self.gate) if mlp is not None]

    @property
    def is_plain(self) -> bool:
        """Whether both are chains of linear layers and ReLU, unseen by forward hooks."""
        return all(
            mlp is None or (type(mlp) is ExpertMLP and mlp.is_chain and not mlp._forward_hooks)
            for mlp in (self.experts, self.gate)
        )

    @property
    def gating(self) -> Gating:
        """How the gate's logits are read; a mixture that selects in evaluation only depends on the module's mode."""
        options, shared = self.options, self.options.num_shared if self.kind == "shared_moe" else 0
        every = self.kind == "dense_moe" or (self.kind == "ds_moe" and self.training)
        return Gating(options.num_experts if every else options.top_k, shared, options.temperature)


def is_being_exported() -> bool:
    """Whether this forward pass is recorded as a graph, which no sample may change."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[reportPrivateImportUsage]


KINDS: dict[str, str] = {
    "dense": "one MLP, no experts",
    "wide": "one MLP with as many parameters as the mixture of experts",
    "topk_moe": "the gate selects top-k experts, softmax over the selected logits",
    "dense_moe": "all experts, softmax over all logits",
    "shared_moe": "always-on shared experts beside top-k of the rest (DeepSeekMoE)",
    "ds_moe": "all experts while training, top-k in evaluation (dense training, sparse inference)",
}
"""Every actor and critic architecture with its one-line description."""


def wide_width(observation_dim: int, output_dim: int, options: NetworkOptions) -> int:
    """Width at which one MLP has about the parameters of the mixture: width·√(their ratio), rounded to even."""
    one = mlp_parameters(observation_dim, output_dim, options)
    gate = mlp_parameters(observation_dim, options.num_experts, options)
    return 2 * round(options.width * sqrt((gate + options.num_experts * one) / one) / 2)


def mlp_parameters(observation_dim: int, output_dim: int, options: NetworkOptions) -> int:
    """Weights and biases of one MLP observation → depth × width → output."""
    width = options.width
    return (observation_dim + 1) * width + (options.depth - 1) * (width + 1) * width + (width + 1) * output_dim


class Actor(MoENetwork):
    """A policy network: observations [N, D] → mean (or logits) [N, A], with the head that makes it a distribution."""

    def __init__(
        self,
        kind: str,
        observation_dim: int,
        action_dim: int,
        options: NetworkOptions,
        generator: torch.Generator,
        discrete: bool = False,
    ) -> None:
        super().__init__(kind, observation_dim, action_dim, options, generator)
        self.head = CategoricalHead() if discrete else GaussianHead(action_dim)


def make_actor(
    kind: str,
    observation_dim: int,
    action_dim: int,
    *,
    seed: int = 0,
    discrete: bool = False,
    **options: Any,
) -> Actor:
    """Make an actor: a torch module, observations [N, D] → mean [N, A].

    Args:
        kind: one of `KINDS`.
        observation_dim: D.
        action_dim: A, the number of action dimensions or of discrete actions.
        seed: of the initial weights; the global random state is not used.
        discrete: a categorical policy in place of the Gaussian.
        options: fields of `NetworkOptions`.

    Raises:
        ConfigError: an unknown kind or an impossible size.
    """
    generator = torch.Generator().manual_seed(seed)
    return Actor(kind, observation_dim, action_dim, NetworkOptions(**options), generator, discrete)
