"""An accelerator beside the same machine's processor: one minibatch, a rollout's step, and the exact eNTK.

    python benchmarks/accelerator.py --widths 256 1024   # PyTorch's accelerator
    PYTORCH_JIT=0 python benchmarks/accelerator.py     # the step by autograd, without TorchScript

Milliseconds, medians of alternating rounds; H1's shapes. ``threads`` of the processor are one run's share of it; the
eNTK has all of them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from itertools import product

import torch
from learner import ACTION_DIM, OBSERVATION_DIM, sample_batch
from measure import interleaved, markdown

import sphere_rl as sp
from sphere_rl.config import TrainConfig, override
from sphere_rl.kernels.threads import two_lanes
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.learner.minibatch import Minibatch
from sphere_rl.runtime import check_device, devices, tune_process
from sphere_rl.training.agent import Agent
from sphere_rl.training.step import minibatch_steps

INNER = 4
MODES = ("none", "loss", "grad")


def agent_on(device: str, width: int, mode: str) -> tuple[Agent, TrainConfig]:
    """An agent of H1's shapes with this width and mode of the penalty."""
    own = {} if mode == "none" else {"method": ("sphere",), "sphere.mode": mode}
    config = override(TrainConfig(), {"device": device, "network": {"width": width}} | own)
    return Agent(config, Spaces(OBSERVATION_DIM, ACTION_DIM, discrete=False), seed=0), config


def finish(device: str) -> None:
    """Wait for what the device has been told to do."""
    if device != "cpu":
        torch.accelerator.synchronize()


def minibatches(width: int, size: int, mode: str, threads: int, device: str) -> Callable[[], None]:
    agent, config = agent_on(device, width, mode)
    batch = sample_batch(size)
    batch = Minibatch(**{f.name: getattr(batch, f.name).to(device) for f in fields(batch)})
    order = [torch.arange(size, device=device)] * INNER

    def step() -> None:
        with two_lanes(threads if device == "cpu" else 1):
            minibatch_steps(agent, batch, order, config)
        finish(device)

    return step


def acting(num_envs: int, device: str) -> Callable[[], None]:
    """What a step of so many environments asks of the policy: states there, actions back."""
    agent, _ = agent_on(device, 256, "none")
    states = sample_batch(num_envs).observation.numpy()

    @torch.inference_mode()
    def step() -> None:
        output = agent.actor(torch.as_tensor(states, device=device))
        agent.actor.head.sample(output, agent.generator).cpu()

    return step


def kernel(states: int, device: str) -> Callable[[], None]:
    agent, _ = agent_on(device, 256, "none")
    observation = sample_batch(states).observation.to(device)

    def step() -> None:
        sp.effective_rank(torch.linalg.eigvalsh(sp.entk(agent.actor, observation)))
        finish(device)

    return step


Maker = Callable[[str], Callable[[], None]]
"""Of a device, the work to be timed there."""


def table(title: str, makers: Mapping[str, Maker], device: str, rounds: int, inner: int = 1) -> str:
    """Each work on both devices."""
    steps = {f"{name} {where}": make(where) for name, make in makers.items() for where in ("cpu", device)}
    found = {name: took / inner for name, took in interleaved(steps, rounds, inner=1).items()}
    rows = [
        (name, f"{found[f'{name} cpu']:.2f}", f"{found[f'{name} {device}']:.2f}",
         f"{found[f'{name} cpu'] / found[f'{name} {device}']:.2f}")
        for name in makers
    ]  # fmt: skip
    return f"{title}\n\n" + markdown(("", "cpu, ms", f"{device}, ms", "cpu / accelerator"), rows) + "\n"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default=devices()[-1], help="(PyTorch's accelerator)")
    options.add_argument("--threads", type=int, default=1, choices=(1, 2), help="of the processor (1)")
    options.add_argument("--rounds", type=int, default=15, help="(15)")
    options.add_argument("--widths", type=int, nargs="+", default=[256, 1024])
    options.add_argument("--sizes", type=int, nargs="+", default=[256, 4096])
    given = options.parse_args()
    check_device(given.device, "--device")
    tune_process(given.threads)
    name = torch.cuda.get_device_name() if given.device.startswith("cuda") else given.device
    print(f"{name}; torch {torch.__version__}; {os.cpu_count()} cores, {given.threads} threads a run\n", flush=True)
    for width in given.widths:
        makers = {
            f"{mode}, minibatch {size}": partial(minibatches, width, size, mode, given.threads)
            for size, mode in product(given.sizes, MODES)
        }
        print(table(f"A minibatch, networks of width {width}:", makers, given.device, given.rounds, INNER), flush=True)
    makers = {f"{n} environments": partial(acting, n) for n in (16, 128, 1024)}
    print(table("The policy's part of a step of the environments:", makers, given.device, given.rounds), flush=True)
    torch.set_num_threads(os.cpu_count() or 1)
    makers = {f"{n} states": partial(kernel, n) for n in (64, 256)}
    print(table("r_e(K), exact:", makers, given.device, given.rounds), flush=True)


if __name__ == "__main__":
    main()
