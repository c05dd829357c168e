"""What every mitigation method must do, whatever its rule: a new file in the package is tested with no edit here."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import sys
from dataclasses import fields, is_dataclass

import pytest
import torch
from agents import EAGER, SHORT, agent_or_refusal, make_agent, make_config, train
from comparing import difference, run_difference

from sphere_rl import protocol
from sphere_rl.experts.network import KINDS
from sphere_rl.learner.minibatch import flatten
from sphere_rl.learner.rollout import Collector
from sphere_rl.methods import methods
from sphere_rl.runs import RunFolder, checkpoint
from sphere_rl.suites import make_suite
from sphere_rl.training.step import STATISTICS, minibatch_steps

METHODS = sorted(methods())


@pytest.mark.parametrize("name", METHODS)
def test_is_described(name):
    method = methods()[name]
    assert method.name == name
    assert method.summary == method.summary.strip(" .\n")
    assert "\n" not in method.summary
    assert re.search(r"\b(19|20)\d\d\b", method.citation), "no year"
    assert is_dataclass(method.Config)
    hash(method.Config())  # frozen, and its defaults are allowed
    source = ast.parse(inspect.getsource(sys.modules[method.Config.__module__]))
    (config,) = (n for n in source.body if isinstance(n, ast.ClassDef) and n.name == method.Config.__name__)
    documented = [
        a.target.id
        for a, b in zip(config.body, config.body[1:], strict=False)
        if isinstance(a, ast.AnnAssign) and isinstance(a.target, ast.Name) and isinstance(b, ast.Expr)
    ]
    assert documented == [f.name for f in fields(method.Config)], "every option has a sentence under it"


@pytest.mark.parametrize("kind", ["dense", "topk_moe"])
@pytest.mark.parametrize("name", METHODS)
def test_the_first_step_of_a_later_task_starts_from_the_policy_that_collected(name: str, kind: str) -> None:
    """Whatever a method has changed by then: KL and clipped share are zero, the value loss is that of the critic."""
    config = make_config(name, actor=kind, num_epochs=1)
    agent = agent_or_refusal(config)
    agent.begin_task(0)
    train(agent, 0, 1)
    agent.begin_task(1)
    envs = make_suite("gym").make(SHORT, config.num_envs, 2, 1)
    collected = Collector(envs, agent.normalizer, agent.device).collect(
        agent.actor, agent.critic, config.num_steps, agent.generator
    )
    envs.close()
    samples = flatten(collected, collected.reward - collected.reward.mean())
    with torch.no_grad():
        expected = (agent.critic(samples.observation).squeeze(-1) - samples.value_target).square().mean()
    (found,) = minibatch_steps(agent, samples, [torch.arange(len(samples))], config)
    statistics = dict(zip(STATISTICS, found.tolist(), strict=True))
    assert statistics["kl"] == pytest.approx(0, abs=1e-6)
    assert statistics["clip_fraction"] == 0
    assert statistics["value_loss"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_trains_and_resumes_bitwise(name, kind, tmp_path):
    """Two tasks straight through are the same as a checkpoint after the first, loaded into another seed's agent."""
    config = make_config(name, actor=kind, critic=kind)
    agent = agent_or_refusal(config)
    parameters = [*agent.actor.named_parameters(), *agent.critic.named_parameters()]
    initial, globally = [p.detach().clone() for _, p in parameters], torch.get_rng_state()
    agent.begin_task(0)
    train(agent, 1)
    checkpoint.save(tmp_path / "state.pt", agent.state_dict())
    resumed = make_agent(config, seed=1)
    resumed.load_state_dict(checkpoint.load(tmp_path / "state.pt"))
    for each in (agent, resumed):
        each.begin_task(1)
        train(each, 2, 3)
    assert difference(agent.state_dict(), resumed.state_dict()) is None
    assert [m.metrics() for m in agent.methods] == [m.metrics() for m in resumed.methods]
    after = [*agent.actor.named_parameters(), *agent.critic.named_parameters()]
    assert [(key, id(p)) for key, p in parameters] == [(key, id(p)) for key, p in after], "changed in place only"
    assert all(p.isfinite().all() for _, p in parameters)
    assert sum(not torch.equal(p, old) for (_, p), old in zip(parameters, initial, strict=True)) > 3
    assert torch.equal(globally, torch.get_rng_state()), "randomness comes from agent.generator"
    for key, value in agent.methods[0].metrics().items():
        assert key.startswith(name)
        assert torch.isfinite(torch.as_tensor(value))


@pytest.mark.parametrize("name", METHODS)
def test_trains_discrete_policies_beside_sphere_and_is_seeded(name):
    config = make_config(name, *({"sphere"} - {name}))
    states = []
    for seed in (0, 0, 1):
        agent = agent_or_refusal(config, seed=seed, task="CartPole-v1")
        agent.begin_task(0)
        train(agent, 1, task="CartPole-v1")
        agent.begin_task(1)
        train(agent, 2, task="CartPole-v1")
        assert all(p.isfinite().all() for p in (*agent.actor_parameters, *agent.critic_parameters))
        states.append(agent.state_dict())
    assert difference(states[0], states[1]) is None
    assert difference(states[0]["actor"], states[2]["actor"])


@pytest.mark.parametrize("normalized", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("name", METHODS)
def test_run_resumes_bitwise(name, normalized, tmp_path):
    """A whole run's last segment, trained again from the checkpoint before it, gives the same files."""
    config = make_config(name, normalize_observations=normalized)
    whole, again = tmp_path / "whole", tmp_path / "again"
    with RunFolder(whole) as folder:
        protocol.start(config, folder, lambda step: [])
    shutil.copytree(whole, again)
    (again / "checkpoints" / "step-000000000128.pt").unlink()
    with RunFolder(again) as folder:
        protocol.resume(folder, lambda step: [])
    assert run_difference(RunFolder(whole), RunFolder(again)) is None
    found = checkpoint.newest(RunFolder(again))
    assert found is not None
    assert name in found[1]["agent"]["methods"]
    assert len(RunFolder(again).read("train")) == 4


def test_eager_options_are_of_methods():
    assert EAGER.keys() <= set(METHODS)
