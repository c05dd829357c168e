"""A trained policy called with what users have, and taken away as a graph."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sphere_rl.experts.network import make_actor
from sphere_rl.kernels.script import undeprecated
from sphere_rl.learner.normalizer import ObservationNormalizer
from sphere_rl.training.agent import Policy

D, A = 5, 3


def make_policy(kind: str, normalized: bool = True, **options: Any) -> Policy:
    """Biases are random, too: zero ones would hide a form that forgets them."""
    shape: dict[str, Any] = {"width": 16, "depth": 2, "num_experts": 4} | options
    actor = make_actor(kind, D, A, **shape)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in actor.named_parameters():
        if name.endswith("bias"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    normalizer = ObservationNormalizer(D, 1.5) if normalized else None
    if normalizer is not None:
        normalizer.update(np.random.default_rng(0).normal(2.0, 3.0, (50, D)))
    return Policy(actor, normalizer).eval()


def states(n: int) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(n)) * 3


SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("dense", {}),
    ("dense", {"normalized": False, "spectral_norm": True, "discrete": True}),
    ("topk_moe", {}),
    ("topk_moe", {"top_k": 1, "crelu": True, "normalized": False}),
    ("shared_moe", {"layer_norm": True}),
    ("shared_moe", {"num_shared": 2, "discrete": True}),
    ("ds_moe", {"layer_norm": True, "crelu": True, "normalized": False}),
    ("dense_moe", {"temperature": 0.5, "spectral_norm": True}),
]


@pytest.mark.parametrize(("kind", "options"), SHAPES)
def test_the_exported_and_the_traced_policy_act_as_the_policy(kind: str, options: dict[str, Any]) -> None:
    """On batches of sizes that they were not made with; the policy itself computes only selected experts."""
    policy = make_policy(kind, **options)
    exported = torch.export.export(policy, (states(4),), dynamic_shapes=({0: torch.export.Dim("N")},)).module()
    with undeprecated():
        # What the annotations' checks compare, which are on in tests only.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[reportPrivateImportUsage]
        traced: Any = torch.jit.trace(policy, states(4))
    for n in (1, 7, 300):
        with torch.no_grad():
            expected = policy(states(n))
            for found in (exported(states(n)), traced(states(n))):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert n == 1 or expected.std(0).min() > 0.01  # outputs depend on the state


def test_an_exported_policy_is_saved_and_read(tmp_path: Path) -> None:
    policy = make_policy("topk_moe")
    program = torch.export.export(policy, (states(4),), dynamic_shapes=({0: torch.export.Dim("N")},))
    torch.export.save(program, tmp_path / "policy.pt2")
    read = torch.export.load(tmp_path / "policy.pt2").module()
    torch.testing.assert_close(read(states(9)), policy(states(9)), rtol=1e-5, atol=1e-5)


def test_script_says_what_works_instead() -> None:
    policy = make_policy("topk_moe")
    with undeprecated(), pytest.raises(TypeError, match=r"^torch.jit.script: .* expected torch.export"):
        torch.jit.script(policy)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("kind", ["dense", "topk_moe"])
def test_what_goes_in_comes_out(kind: str, normalized: bool) -> None:
    policy = make_policy(kind, normalized)
    batch = states(6)
    expected = policy(batch).detach()
    torch.testing.assert_close(policy(batch[2]).detach(), expected[2])
    for array in (batch.numpy(), batch.double().numpy(), np.asfortranarray(batch.numpy()), batch.numpy()[::-1]):
        array.flags.writeable = False
        found = policy(array)
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.float32
        wanted = expected.flip(0) if array.strides[0] < 0 else expected
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-6)
    assert policy(batch[2].numpy()).shape == (A,)
    torch.testing.assert_close(policy(batch.double()), expected)
    whole = batch.round().to(torch.int64)
    assert (policy(whole).detach() == policy(whole.float()).detach()).all()
    np.testing.assert_allclose(policy(whole.numpy()), policy(whole.float()).detach().numpy(), rtol=1e-5, atol=1e-6)
    assert policy(np.zeros((0, D))).shape == (0, A)


@pytest.mark.parametrize("shape", [(), (4,), (2, 4), (2, 3, D), (D, 1)])
def test_another_shape_is_refused_in_one_line(shape: tuple[int, ...]) -> None:
    message = f"observation: shape {list(shape)} is not allowed; expected [5] or [N, 5]"
    for observation in (torch.zeros(shape), np.zeros(shape)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            make_policy("dense")(observation)


def test_the_documented_export_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "own-code.md").read_text()
    (block,) = re.findall(r"```python\n((?:(?!```).)*?torch\.export.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    policy = make_policy("topk_moe")
    names: dict[str, Any] = {"torch": torch, "np": np, "policy": policy, "D": D}
    exec(block, names)
    torch.testing.assert_close(names["program"].module()(states(8)), policy(states(8)), rtol=1e-5, atol=1e-5)
