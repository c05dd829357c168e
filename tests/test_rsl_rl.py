"""rsl_rl: the model learns in its PPO, with the penalty's gradient, and can be taken away."""

# pyright: reportMissingImports=false
from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import sphere_rl as sp
from sphere_rl.integrations.mixture import plasticity

pytest.importorskip("rsl_rl", reason="rsl_rl is not installed")

from rsl_rl.env import VecEnv
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict

from sphere_rl.integrations.rsl_rl import MoEModel

ENVS = 16


class Points(VecEnv):
    """Points on a plane are pushed; the nearer to the origin, the more reward. Twenty steps an episode."""

    def __init__(self) -> None:
        self.num_envs, self.num_actions, self.max_episode_length = ENVS, 2, 20
        self.device, self.cfg = torch.device("cpu"), {}
        self.generator = torch.Generator().manual_seed(0)
        self.episode_length_buf = torch.zeros(ENVS, dtype=torch.long)
        self.place = self.fresh()

    def fresh(self) -> Tensor:
        return torch.randn(ENVS, 2, generator=self.generator)

    def get_observations(self) -> TensorDict:
        return TensorDict({"policy": torch.cat((self.place, self.place.square()), 1)}, batch_size=[ENVS])

    def step(self, actions: Tensor) -> tuple[TensorDict, Tensor, Tensor, dict[str, Any]]:
        self.place = (self.place + 0.3 * actions.clamp(-1, 1)).clamp(-3, 3)
        self.episode_length_buf += 1
        reward, done = -self.place.norm(dim=1), self.episode_length_buf >= 20
        self.place = torch.where(done[:, None], self.fresh(), self.place)
        self.episode_length_buf[done] = 0
        return self.get_observations(), reward, done, {"time_outs": done}


def runner(folder: Any = None, **actor: Any) -> OnPolicyRunner:
    torch.manual_seed(0)
    gaussian = {"class_name": "GaussianDistribution", "init_std": 0.5}
    own = {"class_name": "sphere_rl.integrations.rsl_rl:MoEModel", "hidden_dims": [16, 16], "num_experts": 4}
    config = {
        "num_steps_per_env": 20, "save_interval": 100, "multi_gpu": None, "logger": "tensorboard",
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "actor": own | {"distribution_cfg": gaussian, "obs_normalization": True} | actor,
        "critic": {"class_name": "MLPModel", "hidden_dims": [32], "activation": "relu"},
        "algorithm": {"class_name": "PPO", "num_learning_epochs": 4, "learning_rate": 3e-3, "schedule": "fixed"},
    }  # fmt: skip
    return OnPolicyRunner(Points(), config, log_dir=None if folder is None else str(folder))


def mean_reward(trained: OnPolicyRunner) -> float:
    policy, env = trained.get_inference_policy(), Points()
    with torch.inference_mode():
        return float(torch.stack([env.step(policy(env.get_observations()))[1] for _ in range(20)]).mean())


def test_it_learns_and_the_penalty_keeps_the_rank_up(capsys: Any):
    ranks, rewards = {}, {}
    for rho in (0, 1.0):
        trained = runner(sphere_rho=rho)
        before = mean_reward(trained)
        trained.learn(10)
        model: Any = trained.alg.get_policy()
        assert isinstance(model, MoEModel)
        states = model.get_latent(Points().get_observations()).detach()
        ranks[rho] = plasticity(model.network, states)["r_e_A"]
        rewards[rho] = mean_reward(trained) - before
    assert min(rewards.values()) > 0.1
    assert ranks[1.0] > 1.1 * ranks[0]


def test_the_penalty_is_that_of_a_loss_with_it():
    """A fixed strength in the backward pass, against the penalty of the trace in the loss."""
    model: Any = runner(sphere_strength=0.7, obs_normalization=False).alg.get_policy()
    observation = Points().get_observations()
    target = torch.randn(ENVS, 2)
    parameters = list(model.network.parameters())
    found = torch.autograd.grad((model(observation) * target).sum(), parameters)
    trace = model.network.trace(observation["policy"])
    loss = (trace.output * target).sum() + 0.7 * sp.sphere_penalty(trace.features[-1].weighted(), scale="free")
    for one, other in zip(found, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_states_of_any_shape():
    mlp, states = runner().alg.get_policy().mlp, torch.randn(2, 3, 4)
    expected = mlp(states.flatten(0, 1))
    torch.testing.assert_close(mlp(states), expected.view(2, 3, -1))
    torch.testing.assert_close(mlp(states[0, 1]), expected[1])


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_saved_loaded_and_exported(tmp_path: Any):
    trained = runner()
    trained.learn(2)
    observation = Points().get_observations()
    with torch.inference_mode():
        expected = trained.get_inference_policy()(observation)
    trained.save(str(tmp_path / "model.pt"))
    loaded = runner(num_experts=4)
    loaded.load(str(tmp_path / "model.pt"))
    with torch.inference_mode():
        assert torch.equal(loaded.get_inference_policy()(observation), expected)
    trained.export_policy_to_jit(str(tmp_path))
    exported = torch.jit.load(tmp_path / "policy.pt")  # type: ignore[reportPrivateImportUsage]
    torch.testing.assert_close(exported(observation["policy"]), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("actor", "message"),
    [
        ({"hidden_dims": [16, 8]}, "hidden_dims: .* hidden layers of one width"),
        ({"activation": "elu"}, "activation: 'elu' is not allowed; expected relu"),
        ({"sphere_rho": -1}, "sphere_rho: got -1, allowed: a finite number ≥ 0"),
        ({"top_k": 5}, "top_k: 5 is not allowed; expected 1 to num_experts"),
        (
            {"distribution_cfg": {"class_name": "HeteroscedasticGaussianDistribution"}},
            "distribution_cfg: .* one number",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(actor: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        runner(**actor)
    assert "\n" not in str(error.value)


def test_without_rsl_rl(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "sphere_rl.integrations.rsl_rl")
    monkeypatch.setitem(sys.modules, "rsl_rl", None)
    with pytest.raises(ImportError, match=r"^rsl-rl-lib is not installed; pip install 'sphere-rl\[rsl-rl\]'$"):
        import_module("sphere_rl.integrations.rsl_rl")
