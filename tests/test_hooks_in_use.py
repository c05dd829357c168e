"""Watched modules in use: saved, measured, in half precision, beside other people's hooks, after an error."""

from __future__ import annotations

import io

import pytest
import torch
from test_hooks import made, mlp
from torch import Tensor, nn

import sphere_rl as sp

torch.set_num_threads(1)


def test_a_watched_module_can_be_saved():
    model, x = made()
    with sp.track(model, features="experts.*.act", gates="router"):
        saved = io.BytesIO()
        torch.save(model, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    assert torch.equal(loaded(x), model(x))


def test_of_modules_inside_one_another_the_outermost_count():
    """`experts.*` is how one names all of them, and passes dots."""
    model, x = made(lambda: nn.Sequential(nn.Linear(5, 3), nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)))))
    with sp.track(model, features="1*") as t:
        model(x)
        assert t.phi().shape == (7, 3)
    with sp.track(model, features="1.*") as t:
        model(x)
        assert t.phi().shape == (7, 36)


def test_a_pass_that_raised_an_error_is_over():
    model, x = made(mlp)
    with sp.track(model, features="3") as t:
        for call in (model, t.metrics):
            with pytest.raises(RuntimeError):
                call(x[:, :2])
        for _ in range(2):  # parts that are called from elsewhere
            model[3](model[2](model[1](model[0](x))))
        assert t.phi().shape == (7, 6)


def test_the_kernel_is_that_of_the_function_with_a_regulariser_in_it():
    """It is the identity in what the network computes."""

    class Regularised(nn.Module):
        def __init__(self, on: bool) -> None:
            super().__init__()
            self.net, self.on = mlp(), on

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.net[:4](x)
            return self.net[4](sp.regularize(hidden, rho=0.5) if self.on else hidden)

    (plain, x), (line, _) = made(lambda: Regularised(False)), made(lambda: Regularised(True))
    expected = sp.entk(plain, x)
    assert torch.equal(sp.entk(line, x), expected)
    with sp.track(plain, features="net.3") as t:
        t.regularize(rho=0.5)
        loss = plain(x).square().sum()
        phi = t.phi()
        assert torch.equal(sp.entk(plain, x), expected)
        assert torch.equal(t.phi(), phi)
        assert t.metrics(x)["r_e_K"] == pytest.approx(sp.effective_rank(torch.linalg.eigvalsh(expected)), rel=1e-9)
        loss.backward()
    line(x).square().sum().backward()
    for a, b in zip(plain.parameters(), line.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_half_precision_adds_what_float32_adds():
    """One large feature in many rows: the unit of the others' gradients is below float16's smallest number."""
    found = {}
    for dtype in (torch.float32, torch.float16):
        phi = torch.randn(8192, 16, generator=torch.Generator().manual_seed(0))
        phi[0, 0] = 60
        model = nn.Sequential(nn.Identity(), nn.Flatten())
        given = phi.to(dtype).requires_grad_()
        with sp.track(model, features="0") as t:
            t.regularize(rho=1.0, scale="literal")
            given.grad = None
            model(given * 1).backward(torch.full_like(given, 2**-10))
        assert given.grad is not None
        found[dtype] = (given.grad.double() - 2**-10).flatten()
    cosine = torch.nn.functional.cosine_similarity(*found.values(), dim=0)
    assert cosine > 0.99
    assert found[torch.float16].norm() == pytest.approx(float(found[torch.float32].norm()), rel=0.01)


def test_a_fixed_strength_touches_nobody_elses_hooks():
    """A share needs a backward pass of its own down to the features, a strength does not."""
    model, x = made(mlp)
    seen: list[Tensor] = []
    model[3].register_full_backward_hook(lambda *given: seen.append(given[0]))
    with sp.track(model, features="3") as t:
        t.regularize(strength=0.5)
        model(x).square().sum().backward()
    assert len(seen) == 1
