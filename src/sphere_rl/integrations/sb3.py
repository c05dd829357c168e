"""SPHERE in Stable-Baselines3: a policy with a mixture of experts for PPO and A2C, and a callback for any agent.

    PPO(MoEPolicy, "CartPole-v1", policy_kwargs=dict(num_experts=4, top_k=2, sphere_rho=0.1))

PPO and A2C stay as they are, and so do saving and loading: the penalty is in the policy's backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sphere_rl.errors import ConfigError
from sphere_rl.experts.network import MoENetwork
from sphere_rl.experts.options import NetworkOptions
from sphere_rl.extras import require
from sphere_rl.integrations.mixture import added_by, regularized_output, uniform

require("sb3")
from gymnasium.spaces import Dict  # noqa: E402
from gymnasium.spaces.utils import flatdim  # noqa: E402
from stable_baselines3.common.policies import ActorCriticPolicy  # noqa: E402
from stable_baselines3.common.torch_layers import CombinedExtractor, MlpExtractor  # noqa: E402

from sphere_rl.integrations.sb3_callback import PlasticityCallback  # noqa: E402

__all__ = ["MoEPolicy", "PlasticityCallback"]


class MoEPolicy(ActorCriticPolicy):
    """SB3's actor-critic policy with a mixture of experts as actor and SPHERE in its backward pass.

    Args:
        num_experts: experts of the actor.
        top_k: how many of them the gate selects for a state.
        actor: one of `sphere_rl.experts.network.kinds`, those of plugins included, but not ``ds_moe``: SB3 collects
            rollouts in evaluation mode, in which it selects experts.
        sphere_rho: the penalty's gradient as a share of the loss's, at features and routing weights
            (`sphere_rl.regularize`), 0.1 by default; 0 switches it off.
        sphere_strength: a fixed factor in its place, as if ``sphere_strength · penalty`` were part of the loss.
        sphere_scale: ``free`` or ``literal``, as in `sphere_rl.sphere_penalty`.
        kwargs: SB3's own. ``net_arch`` is ``[width] * depth`` or ``dict(pi=[width] * depth, vf=[...])``: ``pi`` are the
            hidden layers of each expert and of the gate (ReLU, of one width), ``vf`` those of the dense critic, which
            ``activation_fn`` is for, too. ``ortho_init`` holds for experts, each matrix on its own.

    Raises:
        ValueError: a field that is impossible, gSDE, or an algorithm other than PPO and A2C; one line.
    """

    def __init__(
        self,
        *args: Any,
        num_experts: int = 4,
        top_k: int = 2,
        actor: str = "topk_moe",
        sphere_rho: float | int | None = None,
        sphere_strength: float | int | None = None,
        sphere_scale: str = "free",
        **kwargs: Any,
    ) -> None:
        if actor == "ds_moe":
            raise ConfigError(
                "actor", actor, "another one: SB3 collects rollouts in the mode in which it has top-k alone"
            )
        if kwargs.get("use_sde"):
            raise ConfigError("use_sde", True, "False: a mixture of experts has no one last layer for gSDE's noise")
        self.mixture = {
            "num_experts": num_experts, "top_k": top_k, "actor": actor,
            "sphere_rho": sphere_rho, "sphere_strength": sphere_strength, "sphere_scale": sphere_scale,
        }  # fmt: skip
        observation_space = args[0] if args else kwargs["observation_space"]
        if isinstance(observation_space, Dict):  # as SB3's MultiInputPolicy
            kwargs.setdefault("features_extractor_class", CombinedExtractor)
        super().__init__(*args, **kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | self.mixture

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = MixtureExtractor(self)

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_net = nn.Identity()  # the experts' last layers give what the distribution needs
        if self.ortho_init:
            self.network.apply_orthogonal()
        make: Any = self.optimizer_class
        self.optimizer = make(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    @property
    def network(self) -> MixtureExtractor:
        """Actor and critic."""
        return self.mlp_extractor  # type: ignore[return-value]

    def _refuse(self) -> NoReturn:
        raise ConfigError("policy", type(self).__name__, "a policy of this algorithm; MoEPolicy is one of PPO and A2C")

    # What SAC, TD3, DDPG and DQN look for first.
    actor = q_net = property(_refuse)


class MixtureExtractor(MlpExtractor):
    """SB3's place for hidden layers: the whole actor, and those of the critic."""

    def __init__(self, policy: MoEPolicy) -> None:
        mixture, layers = policy.mixture, layers_of(policy.net_arch)
        super().__init__(policy.features_dim, {"pi": [], "vf": layers["vf"]}, policy.activation_fn, policy.device)
        width, depth = uniform("net_arch", layers["pi"])
        options = NetworkOptions(width, depth, mixture["num_experts"], mixture["top_k"])
        self.added, self.latent_dim_pi = added_by(mixture), flatdim(policy.action_space)
        seed = int(torch.randint(2**62, ()))  # SB3's own seed has set this stream
        generator = torch.Generator().manual_seed(seed)
        actor = MoENetwork(mixture["actor"], policy.features_dim, self.latent_dim_pi, options, generator)
        self.policy_net: Any = actor.to(policy.device)

    def forward_actor(self, features: Tensor) -> Tensor:
        """Mean or logits of the action, the penalty in their backward pass."""
        return regularized_output(self.policy_net, features, self.added)

    def apply_orthogonal(self) -> None:
        """SB3's initial weights: orthogonal, times √2 in hidden layers, 0.01 in the actor's last, 1 in the gate's."""
        for mlp in self.policy_net.parts:
            last = 0.01 if mlp is self.policy_net.experts else 1.0
            for layer in mlp.layers:
                for weight in layer.weight.data:
                    nn.init.orthogonal_(weight, gain=last if layer is mlp.head else 2**0.5)


def layers_of(net_arch: Any) -> dict[str, list[int]]:
    """Hidden layers of actor (``pi``) and critic (``vf``)."""
    layers = net_arch if isinstance(net_arch, Mapping) else {"pi": net_arch, "vf": net_arch}
    return {name: list(layers.get(name, [])) for name in ("pi", "vf")}
