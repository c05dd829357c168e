"""The eNTK of modules and observations as other libraries have them, against Jacobians in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_ntk import ACTIONS, SAMPLES, Scaled, actor, draw, jacobian_kernel, relative, sequence
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sphere_rl.integrations.hooks import track
from sphere_rl.spectrum.kernel import entk
from sphere_rl.spectrum.ranks import effective_rank

torch.set_num_threads(1)


def test_dropout_takes_nothing_from_the_random_state():
    """Neither the mask of a policy in training, nor that of the hooks' own pass."""
    policy, observations = sequence(nn.Dropout(0.5)).double(), draw(SAMPLES, 5)
    random_state = torch.get_rng_state()
    entk(policy, observations)
    with track(policy, features="1") as tracker:
        tracker.metrics(observations)
    assert torch.equal(torch.get_rng_state(), random_state)


class Attention(nn.Module):
    """What PyTorch computes by fused kernels, which have first derivatives only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), nn.Linear(4, ACTIONS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(x.view(-1, 5, 4)).mean(1))


@pytest.mark.parametrize("training", [True, False])
def test_attention(training):
    torch.manual_seed(0)
    policy, observations = Attention().double().train(training), draw(SAMPLES, 20)
    found = entk(policy, observations)
    with sdpa_kernel(SDPBackend.MATH):
        assert relative(found, jacobian_kernel(policy, observations)) < 1e-9


class Parts(nn.Module):
    """A policy of several observations."""

    def __init__(self, structured: bool) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(3, 8), nn.Linear(2, 8), nn.Linear(8, ACTIONS)
        self.scale = nn.Parameter(torch.ones(ACTIONS), requires_grad=not structured)

    def forward(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.scale * self.last((self.a(given["a"]) + self.b(given["b"])).tanh())


@pytest.mark.parametrize("structured", [True, False])
def test_observations_in_a_dict(structured):
    """Two parts of seven states each: 7 is N, and 2 is not."""
    torch.manual_seed(0)
    policy, flat = Parts(structured).double(), draw(7, 5)

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = policy

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.parts({"a": x[:, :3], "b": x[:, 3:]})

    expected = jacobian_kernel(Flat(), flat)
    given = {"a": flat[:, :3], "b": flat[:, 3:]}
    assert relative(entk(policy, given), expected) < 1e-9
    with track(policy, features="last") as tracker:
        rank = tracker.metrics(given)["r_e_K"]
    assert rank == pytest.approx(effective_rank(torch.linalg.eigvalsh(expected)))


def test_works_inside_inference_mode_and_on_what_was_made_there():
    policy = actor("dense")
    with torch.inference_mode():
        observations = draw(SAMPLES, 5) + 0
        found = [entk(policy, observations)]
    found += [entk(policy, observations), entk(Scaled().double(), observations)]
    expected = [jacobian_kernel(one, observations.clone()) for one in (policy, policy, Scaled().double())]
    for one, wanted in zip(found, expected, strict=True):
        assert relative(one, wanted) < 1e-9


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("given", "got"),
    [
        (np.zeros((3, 4)), "ndarray of ndarray"),
        ({"a": torch.zeros(3, 4), "b": torch.zeros(2, 4)}, "dict of 2, 3"),
        (torch.tensor(1.0), "Tensor of Tensor"),
        ({}, "dict of nothing"),
    ],
)
def test_observations_that_are_none_are_refused_in_one_line(given, got):
    with pytest.raises(
        ValueError, match=rf"^observations: got {got}, allowed: a tensor \[N, …\], or several in a dict"
    ):
        entk(nn.Linear(4, 2), given)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_function_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^policy: got function, allowed: a torch\.nn\.Module$"):
        entk(lambda x: x, draw(3, 4))  # type: ignore[arg-type]
