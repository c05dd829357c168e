"""Tiny agents and rollouts of real environments, for tests of methods."""

from __future__ import annotations

from functools import cache
from typing import Any

import gymnasium
import pytest
import torch

from sphere_rl.config import TrainConfig, override
from sphere_rl.errors import ConfigError
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.learner.minibatch import Minibatch, flatten
from sphere_rl.learner.rollout import Collector, Rollout
from sphere_rl.methods import ActorStep, Method
from sphere_rl.suites import make_suite
from sphere_rl.training.agent import Agent
from sphere_rl.training.ppo import update

SHORT = "ShortPendulum-v0"
"""Pendulum with episodes of 20 steps, so that evaluations take no time."""
if SHORT not in gymnasium.registry:  # tests in other folders import this file by another name
    gymnasium.register(SHORT, "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=20)

TINY: dict[str, Any] = {
    "suite": "gym",
    "tasks": [SHORT, SHORT],
    "num_envs": 2,
    "num_steps": 16,
    "minibatch_size": 16,
    "num_epochs": 1,
    "steps_per_task": 64,
    "checkpoint_every": 32,
    "eval_every": 10_000,
    "final_eval_episodes": 1,
    "spectrum_every": -1,
    "network": {"width": 16, "depth": 2, "num_experts": 3},
}

EAGER: dict[str, dict[str, Any]] = {
    "c_chain": {"warmup": 1},
    "cbp": {"rate": 0.05, "maturity": 2},
    "redo": {"every": 1, "threshold": 0.5},
    "regrama": {"every": 1, "threshold": 0.5},
    "sphere": {"schedule": "entropy", "entropy_share": 1.0},
}
"""Options with which a rule acts within a few minibatches."""


def make_config(*methods: str, actor: str = "topk_moe", critic: str = "dense", **changes: Any) -> TrainConfig:
    """A tiny configuration with these methods, eager where they can be."""
    own = {"method": methods or ("none",), "actor": actor, "critic": critic}
    return override(TrainConfig(), TINY | EAGER | own | changes)


def make_agent(config: TrainConfig, seed: int = 0, task: str = SHORT) -> Agent:
    """An agent for this task."""
    return Agent(config, spaces(task), seed)


def agent_or_refusal(config: TrainConfig, seed: int = 0, task: str = SHORT) -> Agent:
    """An agent; where the method says in one line that it cannot apply, that line is checked and the test is over."""
    try:
        return make_agent(config, seed, task)
    except ConfigError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert "expected" in refusal
    assert any(name in refusal for name in config.method)
    pytest.skip(refusal)


@cache
def spaces(task: str) -> Spaces:
    envs = make_suite("gym").make(task, 1, 0, 1)
    found = Spaces.of(envs)
    envs.close()
    return found


@cache
def rollout(seed: int = 0, task: str = SHORT) -> Rollout:
    """Experience of a plain agent."""
    config = make_config("none", actor="dense")
    agent = make_agent(config, seed, task)
    envs = make_suite("gym").make(task, config.num_envs, seed, 1)
    collected = Collector(envs, None, agent.device).collect(
        agent.actor, agent.critic, config.num_steps, agent.generator
    )
    envs.close()
    return collected


def train(agent: Agent, *seeds: int, task: str = SHORT) -> None:
    """One iteration on each of these rollouts."""
    for seed in seeds:
        update(agent, rollout(seed, task), agent.config)


def trained(method: str, critic: str = "topk_moe", **changes: Any) -> Agent:
    """An agent after one iteration of its first task."""
    agent = make_agent(make_config(method, critic=critic, **changes))
    agent.begin_task(0)
    train(agent, 1)
    return agent


def batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> Minibatch:
    """All samples of a rollout, with some advantage."""
    collected = rollout(seed)
    samples = flatten(collected, collected.reward - collected.reward.mean())
    return Minibatch(**{name: tensor.to(dtype) for name, tensor in vars(samples).items()})


def actor_step(agent: Agent, samples: Minibatch) -> ActorStep:
    """A forward pass with a stand-in for the PPO loss that depends on all parameters."""
    trace = agent.actor.trace(samples.observation)
    log_prob = agent.actor.head.log_prob(trace.output, samples.action)
    loss = -(log_prob * samples.advantage).mean()
    return ActorStep(agent, samples, trace, loss, agent.actor_parameters, loss.detach())


def only_method(agent: Agent) -> Any:
    """The agent's one method, untyped: tests reach its parts."""
    (method,) = agent.methods
    assert isinstance(method, Method)
    return method


def snapshot(agent: Agent) -> dict[str, torch.Tensor]:
    """Copies of all parameters and Adam moments by name."""
    copies = {}
    for name, network in (("actor", agent.actor), ("critic", agent.critic)):
        for key, parameter in network.named_parameters():
            copies[f"{name}.{key}"] = parameter.detach().clone()
            for i, moment in enumerate(agent.moments(parameter)):
                copies[f"{name}.{key}/{i}"] = moment.clone()
    return copies


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of tensors that are not bitwise what they were."""
    return {name for name in before if not torch.equal(before[name], after[name])}
