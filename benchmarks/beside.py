"""Milliseconds of a minibatch beside another version of this package, in turns: ratios of this one to the other.

    git worktree add /tmp/other 062de1c
    python benchmarks/beside.py /tmp/other/src --rounds 17 --pairs 5

Each version has a process of its own, and the two take turns, eight minibatches each time; shapes are those of the H1.
Where a process has its memory makes it some percent faster or slower for as long as it lives, so ``--pairs`` measures
with several: one version beside itself tells what that is worth.
Names that have moved since are found where they were. Both compute the literal penalty, the only one of old versions;
``--scale free`` gives this version the scale-free one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import product
from math import log
from pathlib import Path
from statistics import median
from typing import Any

from measure import markdown

INNER = 8
MODES = ("none", "loss", "grad")
CASES = [f"{mode} {size} {threads}" for threads, size, mode in product((1, 2), (64, 256), MODES)]


def first(*names: str) -> Any:
    """The first of these that this version has."""
    for name in names:
        module, _, attribute = name.rpartition(".")
        try:
            return getattr(importlib.import_module(f"sphere_rl.{module}"), attribute)
        except (ImportError, AttributeError):
            continue
    raise SystemExit(f"none of {', '.join(names)}")


def steps(scale: str, cases: Sequence[str]) -> dict[str, Callable[[], None]]:
    """The work of each case, in whatever version is imported."""
    import torch

    from sphere_rl.config import TrainConfig, override
    from sphere_rl.errors import ConfigError
    from sphere_rl.runtime import tune_process

    tune_process(1)
    agent_of, spaces = (
        first("training.agent.Agent", "agent.Agent"),
        first("learner.actor_critic.Spaces", "agent.Spaces"),
    )
    minibatch, run = (
        first("learner.minibatch.Minibatch", "ppo.Minibatch"),
        first("training.step.minibatch_steps", "ppo.minibatch_steps"),
    )
    two_lanes = first("kernels.threads.two_lanes", "lanes.two_lanes")

    def case(mode: str, size: int, threads: int) -> Callable[[], None]:
        draw = torch.Generator().manual_seed(0)
        mixing = torch.randn(8, 51, generator=draw) / 8**0.5
        observation = torch.randn(51, generator=draw) + torch.randn(size, 8, generator=draw) @ mixing
        action, advantage, target = (torch.randn(*shape, generator=draw) for shape in ((size, 19), (size,), (size,)))
        log_prob = -0.5 * (action.square() + log(2 * torch.pi)).sum(1)
        batch = minibatch(observation, action, torch.zeros(size, 38), log_prob, advantage, target)
        config = TrainConfig()
        if mode != "none":
            config = override(config, {"method": ("sphere",), "sphere.mode": mode})
            with suppress(ConfigError):  # old versions have one scale only
                config = override(config, {"sphere.scale": scale})
        agent = agent_of(config, spaces(51, 19, False), seed=0)
        agent.set_learning_rate(0.0)  # the routing stays that of a fresh gate

        def work() -> None:
            with two_lanes(threads):
                run(agent, batch, [torch.arange(size)] * INNER, config)

        return work

    return {name: case(mode, int(size), int(threads)) for name in cases for mode, size, threads in [name.split()]}


def serve(scale: str, *cases: str) -> None:
    """Do the case of each line that comes in, and tell its seconds."""
    work = steps(scale, cases)
    for one in work.values():
        one()
        one()
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        work[line.strip()]()
        print(json.dumps(time.perf_counter() - start), flush=True)


def workers_of(sources: Sequence[Path], scale: str, cases: Sequence[str]) -> list[subprocess.Popen[str]]:
    """A new process of each version, ready for work."""
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--serve", scale, *cases], env=os.environ | {"PYTHONPATH": str(source)},
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for source in sources
    ]  # fmt: skip
    assert [ask(worker) for worker in workers] == ["ready\n"] * len(workers)
    return workers


def ask(worker: subprocess.Popen[str], name: str | None = None) -> str:
    """What a worker says, of this case if one is named."""
    assert worker.stdin
    assert worker.stdout
    if name:
        worker.stdin.write(f"{name}\n")
        worker.stdin.flush()
    return worker.stdout.readline()


def in_turns(workers: Sequence[subprocess.Popen[str]], name: str, rounds: int) -> list[tuple[float, float]]:
    """Seconds of this version and of the other in each round."""
    found = []
    for turn in range(rounds):
        order = (0, 1) if turn % 2 else (1, 0)
        told = {which: json.loads(ask(workers[which], name)) for which in order}
        found.append((told[0], told[1]))
    return found


def row(name: str, pairs: Sequence[Sequence[tuple[float, float]]]) -> tuple[str, ...]:
    """A case in the table: medians of all rounds, and the ratio of each pair of processes from lowest to highest."""
    mode, size, threads = name.split()
    rounds = [both for pair in pairs for both in pair]
    own, other = (f"{1e3 * median(both[i] for both in rounds) / INNER:.2f}" for i in (0, 1))
    ratio = f"{median(mine / its for mine, its in rounds):.3f}"
    each = sorted(median(mine / its for mine, its in pair) for pair in pairs)
    return mode, size, threads, other, own, ratio, f"{each[0]:.3f} to {each[-1]:.3f}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("other", type=Path, help="src folder of the other version")
    options.add_argument("--rounds", type=int, default=25, help="of each pair of processes (25)")
    options.add_argument("--pairs", type=int, default=1, help="pairs of processes, one after the other (1)")
    options.add_argument("--scale", default="literal", choices=("literal", "free"), help="of the penalty (literal)")
    options.add_argument("--cases", nargs="+", default=CASES, metavar="CASE", help="as 'loss 256 1' (all)")
    given = options.parse_args()
    sources = (Path(__file__).parents[1] / "src", given.other.resolve())
    found: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in given.cases}
    for _ in range(given.pairs):
        workers = workers_of(sources, given.scale, given.cases)
        for name, pairs in found.items():
            pairs.append(in_turns(workers, name, given.rounds))
        for worker in workers:
            worker.terminate()
    heads = ("mode", "minibatch", "threads", "other ms", "this ms", "this / other", "of each pair")
    print(markdown(heads, [row(*case) for case in found.items()]))


if __name__ == "__main__":
    serve(*sys.argv[2:]) if sys.argv[1:2] == ["--serve"] else main()
