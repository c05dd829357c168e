"""Actors and critics: a router that weighs E experts for each sample, and the experts.

Every architecture is the same two parts. ``dense`` and ``wide`` have one expert and no gate; the others differ only in
how the gate's logits become routing weights. So every actor has features of the same kind, and the penalty, the
diagnostics and the mitigation methods need no cases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from numbers import Integral
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from sphere_rl import plugins
from sphere_rl.errors import ConfigError
from sphere_rl.experts.gates import Gate, Kind, TopK, is_top_k
from sphere_rl.experts.heads import CategoricalHead, GaussianHead, MultiCategoricalHead
from sphere_rl.experts.layers import ExpertMLP, RoutedFeatures, is_hooked
from sphere_rl.experts.options import NetworkOptions
from sphere_rl.experts.routing import single_routing
from sphere_rl.experts.tracing import is_being_exported, unsorted_weights
from sphere_rl.kernels.mixture import mixture_output
from sphere_rl.kernels.mlp import is_unrecorded
from sphere_rl.kernels.routing import Gating, selected


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

    ``kind`` is one of `kinds`. Gate and experts are MLPs of the same width and depth with ReLU; weights are
    LeCun-normal, biases zero, drawn from ``generator``. Where the kind has an encoder, x is what that
    makes of the states.
    """

    def __init__(
        self, kind: str, observation_dim: int, output_dim: int, options: NetworkOptions, generator: torch.Generator
    ) -> None:
        super().__init__()
        if kind not in kinds():
            raise ConfigError("actor", kind, f"one of {', '.join(kinds())}")
        kinds()[kind].check(options)
        for name, size in (("observation_dim", observation_dim), ("action_dim", output_dim)):
            if not isinstance(size, Integral) or size < 1:
                raise ConfigError(name, size, "a whole number above 0")
        self.kind, self.options = kind, options
        width = wide_width(observation_dim, output_dim, options) if kind == "wide" else options.width
        gated = kinds()[kind].gate is not None
        num_experts = options.num_experts if gated else 1
        build: dict[str, Any] = {
            "generator": generator,
            "layer_norm": options.layer_norm,
            "crelu": options.crelu,
            "spectral_norm": options.spectral_norm,
        }
        hidden = [width] * options.depth
        routed = num_experts - self.routes.shared
        self.observation_dim = observation_dim
        self.encoder, inputs = encoder_of(kind, observation_dim, options, generator)
        self.gate = ExpertMLP(inputs, hidden, routed, 1, **build) if gated else None
        self.experts = ExpertMLP(inputs, hidden, output_dim, num_experts, **build)

    def trace(self, observation: Float[Tensor, "N D"]) -> Trace:
        """One forward pass with everything it computed.

        Raises:
            ValueError: the states have another dtype or another number of coordinates than the network.
        """
        self._check(observation)
        whole = single_routing(len(observation), device=observation.device, dtype=observation.dtype)
        seen = self.encoded(observation)
        if self.gate is None:
            routing, logits, gate_features = whole, None, ()
        else:
            gate = self.gate(seen, whole)
            routing, logits, gate_features = self.routes(gate.out), gate.out, gate.features
        experts = self.experts(seen, routing)
        return Trace(experts.out, routing.weights, logits, experts.rows, experts.features, gate_features)

    def encoded(self, observation: Float[Tensor, "N D"]) -> Float[Tensor, "N F"]:
        """What gate and experts see: the states, or the encoder's features of them."""
        return observation if self.encoder is None else self.encoder(observation)

    def forward(self, observation: Float[Tensor, "N D"]) -> Float[Tensor, "N A"]:
        """The output alone."""
        if is_being_exported():
            return self._unrouted(observation)
        if not (self.has_kernel_forward and is_unrecorded()):
            return self.trace(observation).output
        self._check(observation)
        return mixture_output([mlp.effective() for mlp in self.parts], self.gating, observation, 1)

    def _check(self, observation: Tensor) -> None:
        dtype, wanted = next(self.experts.parameters()).dtype, (len(observation), self.observation_dim)
        alike = isinstance(observation, Tensor) and (
            observation.dtype == dtype or torch.is_autocast_enabled(observation.device.type)
        )
        if observation.shape != wanted or not alike:
            found = f"{observation.dtype} {list(observation.shape)}"
            raise ValueError(f"observation: got {found}, allowed: {dtype} [N, {self.observation_dim}]")

    def _unrouted(self, observation: Tensor) -> Tensor:
        """The output from all experts, those that are not selected with weight 0: a graph that no sample changes."""
        seen = self.encoded(observation)
        outputs = self.experts.every(seen)
        if self.gate is None:
            return outputs[0]
        logits, routes = self.gate.every(seen)[0], self.routes
        weights = unsorted_weights(logits, routes.gating) if is_top_k(routes) else routes(logits).weights
        return torch.einsum("ne,ena->na", weights, outputs)

    def __prepare_scriptable__(self) -> NoReturn:
        """Tell `torch.jit.script`, which looks for this name, that it cannot read the network."""
        raise TypeError("torch.jit.script: cannot read a network of experts; expected torch.export.export or jit.trace")

    @torch.inference_mode()
    def selection(self, observation: Float[Tensor, "N D"]) -> Int[Tensor, "N k"] | None:
        """Experts that the gate selects for each sample, in ascending order; ``None`` where it does not select."""
        if self.gate is None or not is_top_k(routes := self.routes):
            return None
        parts = []
        for rows in observation.split(4096):  # all at once would hold every hidden layer of a whole rollout
            whole = single_routing(len(rows), device=rows.device, dtype=rows.dtype)
            logits = self.gate(self.encoded(rows), whole).out
            if routes.k >= logits.shape[1]:
                return None
            parts.append(selected(logits, routes.k))
        return torch.cat(parts).sort(1).values

    @property
    def parts(self) -> list[ExpertMLP]:
        """The experts and, if there is one, the gate."""
        return [mlp for mlp in (self.experts, self.gate) if mlp is not None]

    @property
    def has_kernel_forward(self) -> bool:
        """Whether kernels can compute the output: chains of linear layers and ReLU without hooks, with a gate that they
        know and nothing in front.
        """
        return (
            self.encoder is None
            and is_top_k(self.routes)
            and all(
                mlp is None or (type(mlp) is ExpertMLP and mlp.is_chain and not is_hooked(mlp))
                for mlp in (self.experts, self.gate)
            )
        )

    @property
    def has_kernel_gradient(self) -> bool:
        """Whether kernels can take a gradient step as well: the layers multiply by their parameters as they are."""
        return self.has_kernel_forward and all(layer.uses_its_parameters for mlp in self.parts for layer in mlp.layers)

    @property
    def may_draw(self) -> bool:
        """Whether a forward pass may draw from the global random stream: a gate of one's own, or dropout in front."""
        layers = [] if self.encoder is None else [*self.encoder.modules()]
        dropout = any(isinstance(layer, _DropoutNd) or getattr(layer, "dropout", 0) for layer in layers)
        return not is_top_k(self.routes) or dropout

    @property
    def routes(self) -> Gate:
        """What makes a routing of the gate's logits; it may depend on the module's mode. One MLP sees every sample."""
        make_gate = kinds()[self.kind].gate
        return TopK(1) if make_gate is None else make_gate(self.options, self.training)

    @property
    def gating(self) -> Gating:
        """How kernels read the gate's logits.

        Raises:
            AttributeError: the gate is none that they know; `hasattr`, which PyTorch's tracer asks, is then false.
        """
        if not is_top_k(routes := self.routes):
            raise AttributeError(f"gate: kernels cannot read a {type(routes).__name__}; expected TopK")
        return routes.gating


KINDS: dict[str, Kind] = {
    "dense": Kind("one MLP, no experts"),
    "wide": Kind("one MLP with as many parameters as the mixture of experts"),
    "topk_moe": Kind(
        "the gate selects top-k experts, softmax over the selected logits",
        lambda options, training: TopK(options.top_k, 0, options.temperature),
    ),
    "dense_moe": Kind(
        "all experts, softmax over all logits",
        lambda options, training: TopK(options.num_experts, 0, options.temperature),
    ),
    "shared_moe": Kind(
        "always-on shared experts beside top-k of the rest (DeepSeekMoE)",
        lambda options, training: TopK(options.top_k, options.num_shared, options.temperature),
    ),
    "ds_moe": Kind(
        "all experts while training, top-k in evaluation (dense training, sparse inference)",
        lambda options, training: TopK(options.num_experts if training else options.top_k, 0, options.temperature),
    ),
}
"""Every actor and critic architecture of this package."""


def kinds() -> dict[str, Kind]:
    """Every architecture by name, those of plugins included.

    Raises:
        ConfigError: a plugin's is no `Kind`, or has the name of another.
    """
    found, others = dict(KINDS), [*plugins.offered("actors")]
    for name, module in plugins.loaded().items():
        actors = getattr(module, "ACTORS", {})
        if not isinstance(actors, Mapping):
            raise ConfigError("plugin", name, f"ACTORS with kinds by name, not a {type(actors).__name__}")
        others += actors.items()
    for name, kind in others:
        if not isinstance(kind, Kind):
            raise ConfigError("actor", name, f"a sphere_rl.experts.Kind, not {type(kind).__name__}")
        if found.setdefault(name, kind) is not kind:
            raise ConfigError("actor", name, "another name: there is one of that name")
    return found


def encoder_of(
    kind: str, observation_dim: int, options: NetworkOptions, generator: torch.Generator
) -> tuple[nn.Module | None, int]:
    """A new encoder of this kind, whose weights depend on ``generator`` alone, and F, the number of its features.

    Raises:
        ConfigError: it makes no features [N, F] of states [N, D].
    """
    make = kinds()[kind].encoder
    if make is None:
        return None, observation_dim
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # modules of PyTorch draw from the global stream
        torch.default_generator.manual_seed(seed)
        encoder = make(observation_dim, options)
        with torch.no_grad():
            features = encoder.eval()(torch.zeros(2, observation_dim))
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2:
        found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ConfigError("actor", kind, f"a kind whose encoder makes [2, F] of two states, not {found}")
    return encoder.train().to(torch.get_default_device()), features.shape[1]


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
        branches: Sequence[int] = (),
    ) -> None:
        super().__init__(kind, observation_dim, action_dim, options, generator)
        choices = MultiCategoricalHead(branches) if branches else CategoricalHead()
        self.head = choices if discrete else GaussianHead(action_dim)

    @property
    def has_kernel_gradient(self) -> bool:
        """As of every network, and with a policy whose loss is written out: a Gaussian or one discrete action."""
        return super().has_kernel_gradient and type(self.head) in (GaussianHead, CategoricalHead)


def make_actor(
    kind: str,
    observation_dim: int,
    action_dim: int,
    *,
    seed: int = 0,
    discrete: bool = False,
    branches: Sequence[int] = (),
    **options: Any,
) -> Actor:
    """Make an actor: a torch module, observations [N, D] → mean [N, A].

    Args:
        kind: one of `kinds`.
        observation_dim: D.
        action_dim: A, the number of action dimensions or of discrete actions, with ``branches`` their sum.
        seed: of the initial weights; the global random state is not used.
        discrete: a categorical policy in place of the Gaussian.
        branches: with ``discrete``, the numbers of values of several actions that are taken at once.
        options: fields of `NetworkOptions`.

    Raises:
        ConfigError: an unknown kind or an impossible size; branches that do not fit.
    """
    if branches and not (discrete and sum(branches) == action_dim):
        raise ConfigError(
            "branches", branches, f"for discrete policies, numbers with the sum action_dim ({action_dim})"
        )
    generator = torch.Generator().manual_seed(seed)
    return Actor(kind, observation_dim, action_dim, NetworkOptions(**options), generator, discrete, branches)
