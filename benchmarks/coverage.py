"""How often a 95 % interval of the report leaves out the truth, by the number of seeds.

python benchmarks/coverage.py

Scores are drawn from a normal distribution, in ``crl`` one agent's tasks together, in ``rl`` each task alone; the
interval is that of `sphere_rl.statistics.estimate` for their mean, 500 times each.
"""

from __future__ import annotations

import numpy as np
from measure import markdown

from sphere_rl.statistics import estimate

SEEDS = (2, 3, 5, 10, 20)
TIMES = 500


def missed(protocol: str, seeds: int, tasks: int) -> float:
    """Share of intervals without the truth, 0; half of an agent's variance is common to its tasks in ``crl``."""
    generator = np.random.default_rng([seeds, tasks, protocol == "crl"])
    out = 0
    for seed in range(TIMES):
        scores = generator.normal(size=(seeds, tasks))
        if protocol == "crl":
            scores = (scores + generator.normal(size=(seeds, 1))) / 2**0.5
        found = estimate(scores, protocol, seed=seed)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        out += not found.low <= 0 <= found.high
    return out / TIMES


def main() -> None:
    """Print the table."""
    rows = [
        (
            f"`{protocol}`, {tasks} task{'s' * (tasks > 1)}",
            *(f"{missed(protocol, seeds, tasks):.0%}" for seeds in SEEDS),
        )
        for protocol, tasks in (("crl", 10), ("rl", 10), ("rl", 1))
    ]
    print(markdown(("seeds", *map(str, SEEDS)), rows))


if __name__ == "__main__":
    main()
