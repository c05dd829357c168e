"""The exact kernel of the network that each mitigation method makes of an actor, after it has acted."""

import copy

import pytest
import torch
from agents import batch, make_agent, make_config, train

from sphere_rl.methods import methods
from sphere_rl.spectrum import measure
from sphere_rl.spectrum.jacobian import factorise
from sphere_rl.spectrum.kernel import entk


@pytest.mark.parametrize("name", sorted(methods()))
def test_structure_holds_in_every_methods_network(name):
    agent = make_agent(make_config(name))
    for task_index in range(2):
        agent.begin_task(task_index)
        train(agent, task_index)
    observations = batch().observation[:6].double()
    policy = copy.deepcopy(agent.actor).double().eval()
    assert factorise(policy, observations) is not None, "the structure was not found"
    params = {key: p.detach() for key, p in policy.named_parameters() if p.requires_grad}
    parts = torch.func.jacrev(lambda p: torch.func.functional_call(policy, p, (observations,)))(params)
    jacobian = torch.cat([part.detach().flatten(2).flatten(0, 1) for part in parts.values()], dim=1)
    expected = jacobian @ jacobian.T
    assert (entk(policy, observations) - expected).norm() < 1e-9 * expected.norm()


@pytest.mark.parametrize("name", sorted(methods()))
def test_training_is_bitwise_the_same_with_measurements(name):
    agents = [make_agent(make_config(name)) for _ in range(2)]
    for measured, agent in enumerate(agents):
        agent.begin_task(0)
        for seed in range(2):
            if measured:
                measure(agent.actor, batch().observation[:6].float())
            train(agent, seed)
    plain, measured = (agent.actor.state_dict() for agent in agents)
    assert all(torch.equal(plain[key], measured[key]) for key in plain)
