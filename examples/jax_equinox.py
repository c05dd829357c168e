"""SPHERE in JAX with Equinox and Optax: one line in the module, whatever loss and optimiser train it.

    python examples/jax_equinox.py --steps 200        # needs jax, equinox and optax

The mixture and the pendulum are those of jax_flax_free.py. In Flax (`nnx.Module`) the same line stands in `__call__`.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sphere_rl as sp

GRAVITIES = (10.0, 3.0, 15.0)
EXPERTS, TOP_K, WIDTH, BATCH = 4, 2, 32, 128


class Mixture(eqx.Module):
    """Σ_e g_e(x) · expert_e(x), g the softmax over the gate's top-k logits."""

    gate: eqx.nn.Linear
    experts: eqx.nn.MLP  # its arrays have an axis of experts in front
    head: jax.Array

    def __init__(self, in_dim: int, out_dim: int, key: jax.Array) -> None:
        gate, experts, head = jax.random.split(key, 3)
        self.gate = eqx.nn.Linear(in_dim, EXPERTS, key=gate)
        make = eqx.filter_vmap(lambda key: eqx.nn.MLP(in_dim, WIDTH, WIDTH, 1, final_activation=jax.nn.relu, key=key))
        self.experts = make(jax.random.split(experts, EXPERTS))
        self.head = jax.random.normal(head, (EXPERTS, WIDTH, out_dim)) * WIDTH**-0.5

    def parts(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Last hidden features [N, E, H] and routing weights [N, E]."""
        logits = jax.vmap(self.gate)(x)
        values, indices = jax.lax.top_k(logits, TOP_K)
        gates = jnp.zeros_like(logits).at[jnp.arange(len(x))[:, None], indices].set(jax.nn.softmax(values))
        features = eqx.filter_vmap(lambda expert: jax.vmap(expert)(x), out_axes=1)(self.experts)
        return features, gates

    def __call__(self, x: jax.Array, rho: float = 0.0) -> jax.Array:
        """Output [N, A]."""
        features, gates = self.parts(x)
        if rho:
            features, gates = sp.regularize(features, gates, rho=rho)  # this line
        return jnp.einsum("ne,neh,eha->na", gates, features, self.head)


def loss(model: Mixture, x: jax.Array, y: jax.Array, rho: float) -> jax.Array:
    """Mean squared error, and nothing else."""
    return jnp.mean((model(x, rho) - y) ** 2)


def transitions(gravity: float, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random actions in Pendulum: (observation, action) [N, 4] and the change of the observation [N, 3]."""
    env = gymnasium.make("Pendulum-v1", g=gravity)
    env.action_space.seed(seed)
    inputs, targets = [], []
    observation, _ = env.reset(seed=seed)
    for _ in range(count):
        action = env.action_space.sample()
        following, _, terminated, truncated, _ = env.step(action)
        inputs.append(np.concatenate([observation, action]))
        targets.append(following - observation)
        observation = env.reset()[0] if terminated or truncated else following
    env.close()
    return np.array(inputs, np.float32), np.array(targets, np.float32)


def train(rho: float, steps: int, seed: int = 0) -> list[tuple[float, float, float]]:
    """One model through all gravities: (gravity, error, r_e(A)) at the end of each."""
    random = np.random.default_rng(seed)
    model, optimizer = Mixture(4, 3, jax.random.key(seed)), optax.adam(1e-3)
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model: Mixture, state: Any, x: jax.Array, y: jax.Array) -> tuple[Mixture, Any]:
        updates, state = optimizer.update(eqx.filter_grad(loss)(model, x, y, rho), state)
        return eqx.apply_updates(model, updates), state

    rows = []
    for task, gravity in enumerate(GRAVITIES):
        inputs, targets = transitions(gravity, 800, seed=seed + task)
        for _ in range(steps):
            batch = random.integers(len(inputs), size=BATCH)
            model, state = step(model, state, jnp.asarray(inputs[batch]), jnp.asarray(targets[batch]))
        features, gates = model.parts(jnp.asarray(inputs))
        error = jnp.mean((model(jnp.asarray(inputs)) - targets) ** 2)
        rows.append((gravity, float(error), sp.gram_effective_rank(np.asarray(sp.weighted_features(features, gates)))))
    return rows


def main(words: Sequence[str] | None = None) -> dict[float, list[tuple[float, float, float]]]:
    """Train without and with SPHERE and print both."""
    options = argparse.ArgumentParser(description=main.__doc__)
    options.add_argument("--steps", type=int, default=200, help="gradient steps on each of the three tasks")
    options.add_argument("--rho", type=float, default=0.1, help="share of the gradient at features and routing weights")
    given = options.parse_args(words)
    results = {rho: train(rho, given.steps) for rho in (0.0, given.rho)}
    for rho, rows in results.items():
        for gravity, error, rank in rows:
            print(f"rho {rho:<5g} gravity {gravity:<5g} error {error:.5f}  r_e(A) {rank:5.2f} of {EXPERTS * WIDTH}")
    return results


if __name__ == "__main__":
    main()
