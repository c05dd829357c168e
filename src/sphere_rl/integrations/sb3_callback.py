"""The plasticity of any Stable-Baselines3 agent's policy, while it learns, to SB3's logger."""

from __future__ import annotations

import warnings
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sphere_rl.errors import ConfigError, NotFiniteError
from sphere_rl.experts.network import MoENetwork
from sphere_rl.extras import require
from sphere_rl.integrations.mixture import DensePolicy, plasticity

require("sb3")
from stable_baselines3.common.callbacks import BaseCallback  # noqa: E402
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm  # noqa: E402
from stable_baselines3.common.policies import ActorCriticPolicy  # noqa: E402


class PlasticityCallback(BaseCallback):
    """Log ``plasticity/…``, every metric of `sphere_rl.spectrum.SPECTRAL_METRICS` that applies, every n-th rollout.

    r_e_K is that of the network behind SB3's features extractor, with the action's mean, logits or Q-values as outputs;
    Φ are its last hidden features. Measured once the rollout has been learned from, on states of that rollout or of the
    replay buffer, spread evenly; weight_change and churn are those of that update. Nothing of the agent changes. Where
    its numbers are no longer finite nothing is logged, which is said once.

    Args:
        every: rollouts from one measurement to the next. Off-policy, a rollout is ``train_freq`` steps.
        states: how many states, at most; the kernel is [states · outputs]².
        verbose: SB3's.
    """

    def __init__(self, every: int = 1, states: int = 256, verbose: int = 0) -> None:
        super().__init__(verbose)
        for name, value in (("every", every), ("states", states)):
            if not isinstance(value, Integral) or value < 1:
                raise ConfigError(name, value, "a whole number, 1 or more")
        self.every, self.states, self.rollouts = every, states, 0
        self.last: dict[str, float] = {}
        self._seen: Any = None
        self._before: dict[str, Tensor] | None = None
        self._diverged = False

    def _on_training_start(self) -> None:
        actor_of(self.model.policy)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.rollouts += 1
        if self.rollouts % self.every == 0:
            self._seen = visited(self.model, self.states)
            parameters = actor_of(self.model.policy)[0].named_parameters()
            self._before = {name: parameter.detach().clone() for name, parameter in parameters}

    def _on_rollout_start(self) -> None:
        self._measure()

    def _on_training_end(self) -> None:
        self._measure()

    def _measure(self) -> None:
        if self._before is None:
            return
        policy = self.model.policy
        network, owner, extractor = actor_of(policy)
        was_training = policy.training
        policy.set_training_mode(False)
        try:
            with torch.no_grad():
                features = owner.extract_features(policy.obs_to_tensor(self._seen)[0], extractor)
            found = plasticity(network, features, self._before)
        except NotFiniteError as error:
            if not self._diverged:
                warnings.warn(f"plasticity is not logged while the policy is not finite: {error}", stacklevel=2)
            self._diverged, found = True, {}
        finally:
            policy.set_training_mode(was_training)
            self._seen = self._before = None
        self.last = {}
        for name, value in found.items():
            many = isinstance(value, list)
            self.last |= {f"{name}_{i}": one for i, one in enumerate(value)} if many else {name: value}
        for name, value in self.last.items():
            self.logger.record(f"plasticity/{name}", value)


def actor_of(policy: Any) -> tuple[MoENetwork | DensePolicy, Any, Any]:
    """What is measured of a policy; whose ``extract_features`` makes its inputs, and with which extractor.

    Raises:
        ConfigError: it is not built as SB3's own are.
    """
    known = "one of SB3's own of PPO, A2C, SAC, TD3, DDPG or DQN"
    if isinstance(policy, ActorCriticPolicy):
        network = getattr(policy.mlp_extractor, "policy_net", None)
        if network is None or hasattr(policy, "lstm_actor"):
            raise ConfigError("policy", type(policy).__name__, known)
        extractor = policy.pi_features_extractor
        owner = super(ActorCriticPolicy, policy)  # theirs gives a pair where actor and critic have one each
        if isinstance(network, MoENetwork):
            return network, owner, extractor
        return DensePolicy(network, policy.action_net), owner, extractor
    owner: Any = getattr(policy, "actor", getattr(policy, "q_net", None))
    if hasattr(owner, "latent_pi"):  # SAC
        network = DensePolicy(owner.latent_pi, owner.mu)
    elif isinstance(layers := getattr(owner, "mu", getattr(owner, "q_net", None)), nn.Sequential):  # TD3, DDPG; DQN
        last = max(i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear))
        network = DensePolicy(layers[:last], layers[last:])
    else:
        raise ConfigError("policy", type(policy).__name__, known)
    return network, owner, owner.features_extractor


def visited(model: Any, count: int) -> Any:
    """At most ``count`` observations that the policy has seen, as it saw them (by name where they are a dict)."""
    on_policy = isinstance(model, OnPolicyAlgorithm)
    buffer = model.rollout_buffer if on_policy else model.replay_buffer
    filled = slice(None if on_policy else buffer.size())  # a rollout is whole; its axes are one after the update
    space: Any = buffer.observation_space  # its shapes: buffers keep a discrete observation, (), as (1,)
    if isinstance(buffer.observations, dict):
        rows = {name: _spread(array[filled], space[name].shape, count) for name, array in buffer.observations.items()}
    else:
        rows = _spread(buffer.observations[filled], space.shape, count)
    envs = None if on_policy else model.get_vec_normalize_env()  # replay buffers hold observations as they came
    return rows if envs is None else envs.normalize_obs(rows)


def _spread(rows: np.ndarray, shape: tuple[int, ...], count: int) -> np.ndarray:
    flat = rows.reshape(-1, *shape)
    return flat[np.linspace(0, len(flat) - 1, min(count, len(flat))).astype(int)].copy()
