"""SPHERE in plain JAX, under jit and grad: the same mixture and the same pendulum as plain_pytorch.py, no framework.

    python examples/jax_flax_free.py --steps 200        # needs jax: pip install 'sphere-rl[jax]'

`sphere_rl` dispatches on the array it is given: JAX in, JAX out, traced like any other JAX function.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

import sphere_rl as sp

GRAVITIES = (10.0, 3.0, 15.0)
EXPERTS, TOP_K, WIDTH, BATCH = 4, 2, 32, 128
Params = dict[str, jax.Array]


def init(key: jax.Array, in_dim: int, out_dim: int) -> Params:
    """LeCun-normal weights; each expert's are one slice of the leading axis."""
    shapes = {
        "gate": (in_dim, EXPERTS),
        "first": (EXPERTS, in_dim, WIDTH),
        "second": (EXPERTS, WIDTH, WIDTH),
        "head": (EXPERTS, WIDTH, out_dim),
    }
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    return {name: jax.random.normal(keys[name], shape) * shape[-2] ** -0.5 for name, shape in shapes.items()}


def apply(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output [N, A], last hidden features [N, E, H] and routing weights [N, E]."""
    logits = x @ params["gate"]
    values, indices = jax.lax.top_k(logits, TOP_K)
    rows = jnp.arange(len(x))[:, None]
    gates = jnp.zeros_like(logits).at[rows, indices].set(jax.nn.softmax(values))
    hidden = jax.nn.relu(jnp.einsum("ni,eih->neh", x, params["first"]))
    features = jax.nn.relu(jnp.einsum("neh,ehk->nek", hidden, params["second"]))
    outputs = jnp.einsum("neh,eha->nea", features, params["head"])
    return jnp.einsum("ne,nea->na", gates, outputs), features, gates


def loss(params: Params, x: jax.Array, y: jax.Array, rho: jax.Array) -> jax.Array:
    """Mean squared error plus SPHERE with a share ρ of it."""
    output, features, gates = apply(params, x)
    error = jnp.mean((output - y) ** 2)
    penalty = sp.sphere_penalty(sp.weighted_features(features, gates))  # 1
    strength = jax.lax.stop_gradient(rho * error / (penalty + 1e-8))  # 2
    return error + strength * penalty  # 3


@jax.jit
def step(params: Params, moments: Any, count: jax.Array, x: jax.Array, y: jax.Array, rho: jax.Array) -> Any:
    """One step of Adam, written out; count starts at 1."""
    gradients = jax.grad(loss)(params, x, y, rho)
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], gradients)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, moments[1], gradients)

    def moved(p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        return p - 1e-3 * (m / (1 - 0.9**count)) / (jnp.sqrt(v / (1 - 0.999**count)) + 1e-8)

    return jax.tree.map(moved, params, first, second), (first, second)


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
    params = init(jax.random.key(seed), 4, 3)
    moments = (jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))
    rows, count = [], 0
    for task, gravity in enumerate(GRAVITIES):
        inputs, targets = transitions(gravity, 800, seed=seed + task)
        for _ in range(steps):
            count += 1
            batch = random.integers(len(inputs), size=BATCH)
            x, y = jnp.asarray(inputs[batch]), jnp.asarray(targets[batch])
            params, moments = step(params, moments, jnp.float32(count), x, y, jnp.float32(rho))
        output, features, gates = apply(params, jnp.asarray(inputs))
        phi = np.asarray(sp.weighted_features(features, gates))
        rows.append((gravity, float(jnp.mean((output - targets) ** 2)), sp.gram_effective_rank(phi)))
    return rows


def main(words: Sequence[str] | None = None) -> dict[float, list[tuple[float, float, float]]]:
    """Train without and with SPHERE and print both."""
    options = argparse.ArgumentParser(description=main.__doc__)
    options.add_argument("--steps", type=int, default=200, help="gradient steps on each of the three tasks")
    options.add_argument("--rho", type=float, default=0.1, help="share of the loss that the penalty gets")
    given = options.parse_args(words)
    results = {rho: train(rho, given.steps) for rho in (0.0, given.rho)}
    for rho, rows in results.items():
        for gravity, error, rank in rows:
            print(f"rho {rho:<5g} gravity {gravity:<5g} error {error:.5f}  r_e(A) {rank:5.2f} of {EXPERTS * WIDTH}")
    return results


if __name__ == "__main__":
    main()
