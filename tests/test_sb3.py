"""Stable-Baselines3: the policy learns as this library's own learner does, and is saved, loaded and measured."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sphere_rl as sp
from sphere_rl.config import TrainConfig, override
from sphere_rl.experts.options import NetworkOptions
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.learner.minibatch import Minibatch
from sphere_rl.training.agent import Agent
from sphere_rl.training.ppo import train_epochs

pytest.importorskip("stable_baselines3", reason="Stable-Baselines3 is not installed")

from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import VecNormalize

from sphere_rl.integrations.sb3 import MoEPolicy, PlasticityCallback

LAYERS = {"pi": [16, 16], "vf": [16, 16]}
STRENGTH = 0.3


class Float64(FlattenExtractor):
    """SB3's buffers are float32; behind this all is float64."""

    def forward(self, observations: Tensor) -> Tensor:
        return super().forward(observations).double()


def ppo(env: Any = "CartPole-v1", policy: Any = MoEPolicy, **changes: Any) -> Any:
    own = {"net_arch": LAYERS} if policy is MoEPolicy else {}
    kwargs = {"policy_kwargs": own | changes.pop("policy_kwargs", {})}
    options: dict[str, Any] = (
        {"n_steps": 64, "batch_size": 64, "n_epochs": 1, "seed": 0, "device": "cpu"} | kwargs | changes
    )
    return PPO(policy, env, **options)


def float64_ppo(env: str, **policy_kwargs: Any) -> Any:
    """After a rollout, before its update; no gradient is clipped."""
    own = {"features_extractor_class": Float64, "activation_fn": nn.ReLU, "ortho_init": False} | policy_kwargs
    model = ppo(env, policy_kwargs=own, ent_coef=0.01, max_grad_norm=1e9, learning_rate=1e-3)
    model.policy.double()
    _, callback = model._setup_learn(64)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 64)
    return model


def same_parameters(agent: Agent, model: Any) -> list[tuple[Tensor, Tensor]]:
    """Each parameter here with SB3's; a dense layer here has an axis of one expert more."""
    networks = model.policy.mlp_extractor
    theirs = [*networks.policy_net.parameters(), *([model.policy.log_std] if hasattr(model.policy, "log_std") else [])]
    critic = [*networks.value_net.parameters(), *model.policy.value_net.parameters()]
    return list(zip([*agent.actor.parameters(), *agent.critic.parameters()], [*theirs, *critic], strict=True))


def own_agent(model: Any, env: str) -> tuple[Agent, TrainConfig, Minibatch]:
    """This library's agent with the same weights, and the rollout as it reads it."""
    buffer, discrete = model.rollout_buffer, isinstance(model.action_space, gymnasium.spaces.Discrete)
    spaces = Spaces(model.observation_space.shape[0], model.policy.network.latent_dim_pi, discrete)
    network = NetworkOptions(width=16, depth=2, num_experts=4, top_k=2)
    settings = {
        "suite": "gym", "tasks": (env,), "num_envs": 1, "num_steps": 64, "minibatch_size": 64, "num_epochs": 1,
        "learning_rate": 1e-3, "entropy_coefficient": 0.01, "max_grad_norm": 1e9, "method": ("sphere",),
        "learning_rate_schedule": "constant",
        "sphere.mode": "fixed", "sphere.strength": STRENGTH, "sphere.scale": "free",
    }  # fmt: skip
    config = override(TrainConfig(suite="gym", tasks=(env,), network=network), settings)
    agent = Agent(config, spaces, seed=0)
    agent.actor.double()
    agent.critic.double()
    for own, theirs in same_parameters(agent, model):
        own.data.copy_(theirs.reshape(own.shape))
    rows = {
        name: torch.as_tensor(getattr(buffer, name)).flatten(0, 1).squeeze(-1) for name in ("log_probs", "advantages")
    }
    observation = torch.as_tensor(buffer.observations).flatten(0, 1).double()
    action = torch.as_tensor(buffer.actions).flatten(0, 1)
    with torch.no_grad():
        policy = agent.actor.head.parameters_of(agent.actor(observation))
    action = action.squeeze(-1).long() if discrete else action.double()
    target = torch.as_tensor(buffer.returns).flatten().double()
    return agent, config, Minibatch(
        observation, action, policy, rows["log_probs"].flatten().double(), rows["advantages"].flatten().double(), target
    )  # fmt: skip


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_an_update_is_that_of_the_own_learner(env: str):
    """The same weights and rollout; a fixed strength, since a share is of the gradient at φ here, over all there."""
    model = float64_ppo(env, sphere_strength=STRENGTH)
    agent, config, batch = own_agent(model, env)
    before = [own.detach().clone() for own, _ in same_parameters(agent, model)]
    train_epochs(agent, batch, config)
    model.train()
    for old, (own, theirs) in zip(before, same_parameters(agent, model), strict=True):
        assert not torch.equal(own, old)
        torch.testing.assert_close(theirs.reshape(own.shape), own, rtol=0, atol=1e-7)  # of steps of 1e-3


def test_a_share_is_added_at_features_and_routing_weights():
    """Of the actor's loss by hand: ∂loss/∂x + ρ ‖∂loss/∂x‖ ∇L/‖∇L‖, pulled back by autograd."""
    model = float64_ppo("Pendulum-v1", sphere_rho=0.5, sphere_scale="literal")
    network = model.policy.mlp_extractor.policy_net
    observation = torch.as_tensor(model.rollout_buffer.observations).flatten(0, 1).double()
    target = torch.randn(64, 1, dtype=torch.float64)
    parameters = list(network.parameters())
    found = torch.autograd.grad(
        (model.policy.get_distribution(observation).distribution.mean * target).sum(), parameters
    )  # fmt: skip
    trace = network.trace(observation)
    x = trace.features[-1].dense(), trace.gates
    leaves = [part.detach().requires_grad_() for part in x]
    weight, bias = network.experts.head.weight, network.experts.head.bias
    output = torch.einsum("neh,ne,eah->na", leaves[0], leaves[1], weight) + (leaves[1] * (x[1] != 0)) @ bias
    torch.testing.assert_close(output, trace.output)
    loss = torch.autograd.grad((output * target).sum(), [*leaves, weight, bias])
    penalty = torch.autograd.grad(sp.sphere_penalty(sp.weighted_features(*leaves)), leaves)
    norms = [torch.cat([part.flatten() for part in parts]).norm() for parts in (loss[:2], penalty)]
    joined = [g + 0.5 * norms[0] / norms[1] * p for g, p in zip(loss[:2], penalty, strict=True)]
    expected = torch.autograd.grad(x, parameters, joined, allow_unused=True)
    heads = {id(weight): loss[2], id(bias): loss[3]}
    for parameter, one, other in zip(parameters, found, expected, strict=True):
        torch.testing.assert_close(one, heads[id(parameter)] if other is None else other)


def test_the_seed_gives_the_weights_and_zero_is_off():
    one, same, other = ppo(), ppo(), ppo(seed=1)
    names = [name for name, _ in one.policy.named_parameters() if "policy_net" in name and "weight" in name]
    weights = [model.policy.state_dict() for model in (one, same, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in names)
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in names)
    (first,) = one.policy.mlp_extractor.policy_net.experts.hidden[0].weight[:1]
    torch.testing.assert_close(first.T @ first, 2 * torch.eye(4))  # orthogonal, times √2
    trained = [ppo(policy_kwargs=kwargs).learn(64) for kwargs in ({"sphere_rho": 0}, {"sphere_strength": 0}, {})]
    off, too, on = (model.policy.state_dict() for model in trained)
    assert all(torch.equal(off[name], too[name]) for name in names)
    assert not all(torch.equal(off[name], on[name]) for name in names)


def test_the_penalty_keeps_the_rank_up():
    ranks = {}
    for rho in (0, 1.0):
        model = ppo("Pendulum-v1", policy_kwargs={"sphere_rho": rho}, n_steps=256, n_epochs=8, learning_rate=3e-3)
        callback = PlasticityCallback(states=128)
        model.learn(512, callback=callback)
        ranks[rho] = callback.last["r_e_A"]
    assert ranks[1.0] > 1.2 * ranks[0]


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_saved_and_loaded(algorithm: Any, tmp_path: Any):
    options: dict[str, Any] = {"n_steps": 64, "seed": 0, "device": "cpu"}
    policy_kwargs = {"net_arch": LAYERS, "num_experts": 3, "top_k": 1, "sphere_rho": 0.2, "sphere_scale": "literal"}
    model = algorithm(MoEPolicy, "Acrobot-v1", policy_kwargs=policy_kwargs, **options)
    model.learn(128)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=model.get_env(), device="cpu")
    observation = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    assert (
        loaded.predict(observation, deterministic=True)[0] == model.predict(observation, deterministic=True)[0]
    ).all()
    assert loaded.policy.network.added == model.policy.network.added
    loaded.learn(64, reset_num_timesteps=False)
    model.policy.save(tmp_path / "policy")
    alone = MoEPolicy.load(tmp_path / "policy", device="cpu")
    assert alone.mixture == model.policy.mixture
    assert (
        alone.predict(observation, deterministic=True)[0] == model.predict(observation, deterministic=True)[0]
    ).all()


class Many(gymnasium.Env):
    """Dict observations and MultiDiscrete actions."""

    observation_space = gymnasium.spaces.Dict(
        a=gymnasium.spaces.Box(-1, 1, (3,)), b=gymnasium.spaces.Discrete(4), c=gymnasium.spaces.MultiBinary(2)
    )
    action_space = gymnasium.spaces.MultiDiscrete([2, 3])

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), float(action.sum()), False, bool(self.np_random.random() < 0.1), {}


def test_spaces_that_sb3_takes():
    callback = PlasticityCallback(states=16)
    model = PPO(
        MoEPolicy, Many(), n_steps=32, batch_size=32, n_epochs=1, policy_kwargs={"net_arch": LAYERS}, device="cpu"
    )
    model.learn(32, callback=callback)
    assert model.policy.mlp_extractor.latent_dim_pi == 5
    assert callback.last["churn"] > 0


class Where(gymnasium.Env):
    """A discrete observation, alone or first in a Dict."""

    def __init__(self, observation_space: Any) -> None:
        self.observation_space, self.action_space = observation_space, gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 0.0, False, False, {}


@pytest.mark.parametrize("algorithm", [PPO, DQN])
@pytest.mark.parametrize(
    "space",
    [
        gymnasium.spaces.Discrete(3),
        gymnasium.spaces.Dict(a=gymnasium.spaces.Discrete(3), b=gymnasium.spaces.MultiDiscrete([2, 2])),
    ],
    ids=["one", "dict"],
)
def test_discrete_observations(algorithm: Any, space: Any):
    """Three of them, twelve in the Dict: so many rows of features differ at most."""
    size: dict[str, Any] = {"n_steps": 32, "batch_size": 32} if algorithm is PPO else {"learning_starts": 16}
    policy = "MultiInputPolicy" if isinstance(space, gymnasium.spaces.Dict) else "MlpPolicy"
    callback = PlasticityCallback(states=16)
    algorithm(policy, Where(space), device="cpu", policy_kwargs={"net_arch": [32]}, **size).learn(32, callback=callback)
    assert 1 <= callback.last["r_e_A"] <= (12 if isinstance(space, gymnasium.spaces.Dict) else 3)


PARTS: dict[Any, Any] = {  # hidden layers, and the last one with what follows it
    PPO: lambda policy: (policy.mlp_extractor.policy_net, policy.action_net),
    SAC: lambda policy: (policy.actor.latent_pi, policy.actor.mu),
    TD3: lambda policy: (policy.actor.mu[:4], policy.actor.mu[4:]),
    DQN: lambda policy: (policy.q_net.q_net[:4], policy.q_net.q_net[4:]),
}


@pytest.mark.parametrize(
    ("algorithm", "env"), [(PPO, "CartPole-v1"), (SAC, "Pendulum-v1"), (TD3, "Pendulum-v1"), (DQN, "CartPole-v1")]
)
def test_the_callback_measures_dense_policies_of_any_agent(algorithm: Any, env: str):
    """r_e(K) against Jacobians by autograd; an agent that is measured learns the same."""
    size: dict[str, Any] = {"n_steps": 32, "batch_size": 32} if algorithm is PPO else {"learning_starts": 32}
    models = []
    for callback in (None, PlasticityCallback(every=1 if algorithm is PPO else 30, states=12)):
        model = algorithm("MlpPolicy", env, seed=0, device="cpu", policy_kwargs={"net_arch": [16, 16]}, **size)
        models.append(model.learn(64, callback=callback))
    for one, two in zip(*(model.policy.parameters() for model in models), strict=True):
        assert torch.equal(one, two)
    model, callback = models[0], PlasticityCallback(states=12)
    callback.init_callback(model)
    callback.on_rollout_end()
    callback.on_training_end()
    buffer = model.rollout_buffer if algorithm is PPO else model.replay_buffer
    seen = buffer.observations[: buffer.size()].reshape(buffer.size(), -1)
    states = torch.as_tensor(seen[np.linspace(0, len(seen) - 1, 12).astype(int)])
    hidden, last = PARTS[algorithm](model.policy)
    weights = [*hidden.parameters(), *last.parameters()]
    rows = [torch.autograd.grad(f, weights, retain_graph=True) for f in last(hidden(states)).flatten()]
    jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).double()
    expected = sp.effective_rank(torch.linalg.eigvalsh(jacobian @ jacobian.T))
    assert callback.last["r_e_K"] == pytest.approx(expected, rel=1e-3)
    assert callback.last["r_e_A"] == pytest.approx(sp.gram_effective_rank(hidden(states)), rel=1e-4)
    assert callback.last["stable_rank_W"] >= 1
    assert 0 <= callback.last["grama_ratio"] <= 1
    assert callback.last["churn"] == 0


def test_a_policy_that_diverges_is_not_stopped_by_the_callback():
    """It learns on alone, so it learns on while it is watched; said once."""
    callback = PlasticityCallback(every=8, states=16)
    model = DQN("MlpPolicy", "CartPole-v1", learning_starts=20, batch_size=8, learning_rate=1e20, max_grad_norm=1e30,
                seed=0, device="cpu")  # fmt: skip
    with pytest.warns(UserWarning, match="plasticity is not logged while the policy is not finite: ") as said:
        model.learn(96, callback=callback)
    assert model.num_timesteps == 96
    assert len(said) == 1
    assert not callback.last


def test_every_n_rollouts_through_the_logger(tmp_path: Any):
    from stable_baselines3.common.logger import configure

    env = VecNormalize(ppo().get_env())
    model = ppo(env)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(64 * 5, callback=PlasticityCallback(every=2, states=16))
    model.logger.close()
    table = (tmp_path / "progress.csv").read_text().splitlines()
    column = [line.split(",")[table[0].split(",").index("plasticity/r_e_K")] for line in table[1:]]
    assert [bool(value) for value in column] == [False, False, True, False, True]  # learned from 2 and 4 rollouts


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sphere_rho": -1.0}, "sphere_rho: got -1.0, allowed: a finite number ≥ 0"),
        ({"sphere_scale": "big"}, "sphere_scale: got 'big', allowed: literal, free"),
        ({"top_k": 9}, r"top_k: 9 is not allowed; expected 1 to num_experts \(4\)"),
        ({"net_arch": {"pi": [8, 4]}}, "net_arch: .* hidden layers of one width"),
        ({"net_arch": []}, "net_arch: .* hidden layers of one width"),
        ({"actor": "ds_moe"}, "actor: 'ds_moe' is not allowed"),
        ({"actor": "many"}, "actor: 'many' is not allowed; expected one of dense"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(kwargs: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        ppo(policy_kwargs=kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("unchecked_shapes")
def test_other_algorithms_are_refused():
    others: list[tuple[Any, str]] = [(SAC, "Pendulum-v1"), (DQN, "CartPole-v1")]
    for algorithm, env in others:
        with pytest.raises(ValueError, match=r"policy: 'MoEPolicy' is not allowed; .* of PPO and A2C"):
            algorithm(MoEPolicy, env)
    with pytest.raises(ValueError, match="use_sde: True is not allowed"):
        ppo("Pendulum-v1", use_sde=True)
    with pytest.raises(ValueError, match="every: 0 is not allowed"):
        PlasticityCallback(every=0)
    with pytest.raises(ValueError, match=r"states: 1\.5 is not allowed; expected a whole number, 1 or more"):
        PlasticityCallback(states=1.5)  # type: ignore[arg-type]
    model = ppo(policy="MlpPolicy")
    del model.policy.mlp_extractor.policy_net  # as an extractor of somebody's own
    with pytest.raises(ValueError, match="policy: 'ActorCriticPolicy' is not allowed; expected one of SB3's own"):
        model.learn(1, callback=PlasticityCallback())


def test_without_stable_baselines3(monkeypatch: pytest.MonkeyPatch):
    for name in ("sphere_rl.integrations.sb3", "sphere_rl.integrations.sb3_callback"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(ImportError, match=r"^stable-baselines3 is not installed; pip install 'sphere-rl\[sb3\]'$"):
        import_module("sphere_rl.integrations.sb3")
