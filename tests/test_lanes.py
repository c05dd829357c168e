"""Two lanes compute what one computes, bit by bit."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from conformance.agents import make_agent, make_config, rollout
from torch import nn

from sphere_rl.kernels.script import SCRIPTED, scripted
from sphere_rl.kernels.threads import beside, lanes, two_lanes
from sphere_rl.training.ppo import update


def trained(threads: int, method: str, **options: Any) -> tuple[torch.Tensor, dict[str, float]]:
    config = make_config(method, **options)
    agent = make_agent(config)
    with two_lanes(threads):
        statistics = update(agent, rollout(3), config)
    return nn.utils.parameters_to_vector([*agent.actor_parameters, *agent.critic_parameters]).detach(), statistics


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("none", {}),
        ("sphere", {"sphere.mode": "grad"}),
        ("sphere", {"sphere.mode": "loss", "sphere.layers": "all"}),
        ("sphere", {"sphere.mode": "grad", "sphere.factor": "gradient"}),
        ("none", {"critic": "topk_moe", "learning_rate_schedule": "kl"}),
        ("load_balance", {"critic": "topk_moe"}),
        ("cbp", {}),
        ("l2_init", {}),
    ],
)
def test_training_is_bitwise_that_of_one_lane(method: str, options: dict[str, Any]) -> None:
    (one, first), (two, second) = (trained(threads, method, **options) for threads in (1, 2))
    assert torch.equal(one, two)
    assert first == second


@scripted
def start_tenth(numbers: torch.Tensor) -> torch.jit.Future[torch.Tensor]:
    return torch.jit.fork(torch.mul, numbers, torch.tensor(0.1))  # type: ignore[reportReturnType]


@pytest.mark.skipif(not SCRIPTED, reason="PyTorch's inter-op threads carry out TorchScript")
@pytest.mark.parametrize("flush", [True, False])  # one of them is not what PyTorch's threads were made with
def test_both_lanes_treat_denormal_numbers_alike(flush: bool) -> None:
    """Adam's moments of an expert without rows decay into them: lanes that differ end in other bits."""
    tiny = torch.full((64,), 1e-38)
    torch.set_flush_denormal(flush)
    with two_lanes(2):
        on_first = tiny.mul(0.1)
        on_second = beside(lambda: tiny.mul(0.1))()
        for result in (on_second, *(start_tenth(tiny).wait() for _ in range(8))):
            assert torch.equal(result, on_first)
        assert bool(on_first.any()) is not flush


def test_a_task_runs_on_the_second_lane_which_has_no_lanes_of_its_own() -> None:
    assert lanes() == 1
    held = threading.Event()
    with two_lanes(2):
        assert lanes() == 2
        result = beside(lambda: (held.wait(10), threading.current_thread() is threading.main_thread(), lanes()))
        assert lanes() == 2, "the second lane is busy, and still this thread's"
        held.set()
        assert result() == (True, False, 1)
    assert lanes() == 1


def test_one_thread_means_one_lane_and_order() -> None:
    order: list[str] = []
    with two_lanes(1):
        result = beside(lambda: order.append("task"))
        order.append("main")
        result()
    assert order == ["main", "task"]


def test_what_fails_on_the_second_lane_fails_where_its_result_is_asked_for() -> None:
    def fail() -> None:
        raise ValueError("broken")

    with two_lanes(2):
        result = beside(fail)
        with pytest.raises(ValueError, match="broken"):
            result()


def test_leaving_waits_for_the_second_lane_and_restores_the_threads() -> None:
    before = torch.get_num_threads()
    done = []

    def slow() -> None:
        threading.Event().wait(0.2)
        done.append(1)

    with two_lanes(4):
        assert torch.get_num_threads() == 2
        assert beside(torch.get_num_threads)() == 2
        beside(slow)
    assert done == [1]
    assert torch.get_num_threads() == before
