"""EnvPool environments that are made anew for every episode, where EnvPool's own reset leaves something behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np


def make_pool(environment_id: str, seed: int, anew: bool, **options: Any) -> Any:
    """An EnvPool of goal-observable MetaWorld environments; with ``anew`` one that is made anew for every episode."""
    import envpool  # loads a large native library: only when an environment is made

    make = partial(envpool.make_gymnasium, environment_id, partially_observable=False, **options)
    return RemadePool(make, seed) if anew else make(seed=seed)


class RemadePool:
    """An EnvPool of environments whose episodes end together; every reset but the first makes it anew.

    ``make(seed=...)`` makes one. The first has the seed given, the others are drawn from it.
    """

    def __init__(self, make: Callable[..., Any], seed: int) -> None:
        self._make, self._seeds = make, np.random.default_rng(seed)
        self._pool, self._fresh = make(seed=seed), True

    def __getattr__(self, name: str) -> Any:
        if name == "_pool":  # none was made in the place of the one that is closed
            raise AttributeError(name)
        return getattr(self._pool, name)

    def close(self) -> None:
        """Close what there is: a pool that could not be made anew leaves nothing."""
        if hasattr(self, "_pool"):
            self._pool.close()

    def reset(self, env_ids: np.ndarray | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode in all environments; it cannot be begun in some."""
        num_envs = self._pool.config["num_envs"]
        if env_ids is not None and len(env_ids) < num_envs:
            raise ValueError(f"env_ids: {env_ids.tolist()} are not all {num_envs}, which are made anew together")
        if not self._fresh:
            self._pool.close()
            del self._pool  # it keeps its simulations for as long as it lives
            self._pool = self._make(seed=int(self._seeds.integers(2**31)))
        self._fresh = False
        return self._pool.reset()
