"""What each mitigation method costs: one minibatch, actor and critic step together, relative to plain PPO.

    python benchmarks/methods.py --clock cpu

The preset's networks and minibatch on CW10's shapes; the methods take turns, and each time is a median. What happens
once a task or every few iterations is not in it. Methods that are found in the package are measured, with no list here;
variants of one method are named below.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from learner import sample_batch
from measure import CLOCKS, interleaved, machine, markdown

from sphere_rl.config import TrainConfig, override
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.methods import methods
from sphere_rl.runtime import tune_process
from sphere_rl.training.agent import Agent
from sphere_rl.training.step import minibatch_steps

OBSERVATION_DIM, ACTION_DIM = 39, 4
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "sphere, mode fixed": ("sphere", {"sphere.mode": "fixed"}),
    "sphere, mode loss": ("sphere", {"sphere.mode": "loss"}),
    "sphere, scale literal": ("sphere", {"sphere.scale": "literal"}),
    "sphere, pcgrad": ("sphere", {"sphere.pcgrad": True}),
    "sphere, layers all": ("sphere", {"sphere.layers": "all"}),
    "sphere, grouping per_expert": ("sphere", {"sphere.grouping": "per_expert"}),
    "sphere, factor gradient": ("sphere", {"sphere.factor": "gradient"}),
    "shrink_perturb, when minibatch": ("shrink_perturb", {"shrink_perturb.when": "minibatch"}),
}


def minibatch_step(actor: str, size: int, method: str, changes: dict[str, object]) -> Callable[[], None]:
    """One minibatch of an agent with this method, always of the same samples."""
    config = override(TrainConfig(), {"actor": actor, "method": (method,), **changes})
    agent = Agent(config, Spaces(OBSERVATION_DIM, ACTION_DIM, discrete=False), seed=0)
    batch = sample_batch(size, OBSERVATION_DIM, ACTION_DIM)
    order = [torch.arange(len(batch))]
    agent.set_learning_rate(0.0)  # the routing stays that of a fresh gate
    for each in agent.methods:
        each.on_task_start(agent, 0)

    def step() -> None:
        minibatch_steps(agent, batch, order, config)
        for each in agent.methods:
            each.after_minibatch(agent, batch)

    return step


def measure(actor: str, size: int, repeats: int, inner: int, clock: str) -> str:
    """The table, cheapest first."""
    cases = {name: (name, {}) for name in methods()} | VARIANTS
    if actor in ("dense", "wide"):
        del cases["load_balance"]
    steps = {name: minibatch_step(actor, size, method, changes) for name, (method, changes) in cases.items()}
    times = interleaved(steps, repeats, inner, clock)
    rows = [
        (f"`{name}`", f"{ms:.2f}", f"{ms / times['none']:.2f}")
        for name, ms in sorted(times.items(), key=lambda item: item[1])
    ]
    return markdown(("method", "ms", "relative to none"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actor", default="topk_moe")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--inner", type=int, default=6, help="minibatches of a turn")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    given = parser.parse_args()
    tune_process(given.threads)
    print(f"{machine()}\n{given.actor}, minibatch {given.batch}, {given.clock} time\n")
    print(measure(given.actor, given.batch, given.repeats, given.inner, given.clock))


if __name__ == "__main__":
    main()
