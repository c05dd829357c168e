# pyright: reportAttributeAccessIssue=false
"""Speed of the batched H1 environments, as a share of what `mj_step` alone reaches on the same cores.

For every task, 128 robots take the same random actions twice, in turns of a few steps: through the vector environment
(physics, observations, rewards, terminations, resets, infos) and through a bare loop of ``mj_step(nstep=10)`` over the
same 128 states in as many threads, which computes nothing else and restarts its robots where the environment restarts
its own. Printed: environment steps/s of both, their ratio (above 1: the environment is faster than the loop), the share
of a step that is not physics, and the memory that 128 robots take.

    python benchmarks/h1.py [--threads 2] [--rounds 30] [--tasks stand walk] [--clock cpu]

The clock `cpu` counts the processor time of all threads: on a busy machine the steadier of the two.
"""

import argparse
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import mujoco
import numpy as np
from measure import CLOCKS

from sphere_rl.suites.humanoid.env import HumanoidVectorEnv
from sphere_rl.suites.humanoid.model import SUBSTEPS
from sphere_rl.suites.humanoid.tasks import TASKS

NUM_ENVS, TURN = 128, 4


class BareLoop:
    """One MjData a robot, divided among threads."""

    def __init__(self, model: mujoco.MjModel, threads: int) -> None:
        self.model = model
        self.robots = [mujoco.MjData(model) for _ in range(NUM_ENVS)]
        self.shares = np.array_split(np.arange(NUM_ENVS), threads)
        self.pool = ThreadPoolExecutor(threads)

    def place(self, envs: np.ndarray, observations: np.ndarray) -> None:
        for env in envs:
            qpos, qvel, _ = np.split(observations[env], [self.model.nq, self.model.nq + self.model.nv])
            self.robots[env].qpos[:], self.robots[env].qvel[:] = qpos, qvel

    def step(self, controls: np.ndarray) -> None:
        for done in [self.pool.submit(self._step_share, share, controls) for share in self.shares]:
            done.result()

    def _step_share(self, share: np.ndarray, controls: np.ndarray) -> None:
        for env in share:
            self.robots[env].ctrl[:] = controls[env]
            mujoco.mj_step(self.model, self.robots[env], nstep=SUBSTEPS)


def compare(task: str, threads: int, rounds: int, clock: str) -> tuple[float, float, float, float]:
    """Medians over rounds: steps/s of the environment, of the loop, their ratio; share of time beyond physics."""
    now = CLOCKS[clock]
    env = HumanoidVectorEnv(task, NUM_ENVS, seed=0, num_threads=threads)
    loop = BareLoop(env.model, threads)
    generator = np.random.default_rng(0)
    low, high = env.model.actuator_ctrlrange.T
    loop.place(np.arange(NUM_ENVS), env.reset()[0])
    spent: list[tuple[float, float, float]] = []
    for _ in range(rounds):
        actions = generator.uniform(-1, 1, (TURN, NUM_ENVS, env.model.nu))
        steps = []
        began = now()
        for action in actions:
            steps.append(env.step(action))
        mine, physics = now() - began, 0.0
        controls = low + (actions + 1) / 2 * (high - low)
        bare = 0.0
        for control, (observation, _, terminated, truncated, _) in zip(controls, steps, strict=True):
            began = now()
            loop.step(control)
            bare += now() - began
            loop.place(np.flatnonzero(terminated | truncated), observation)
        for action in actions[:1]:  # physics alone, through the environment's own pool
            state = env.get_state()
            began = now()
            env.simulate(action)
            physics += (now() - began) * TURN
            env.set_state(state)
        spent.append((mine, bare, physics))
    env.close()
    loop.pool.shutdown()
    total = NUM_ENVS * TURN
    ratio = median(bare / mine for mine, bare, _ in spent)
    overhead = median(1 - physics / mine for mine, _, physics in spent)
    return total / median(m for m, _, _ in spent), total / median(b for _, b, _ in spent), ratio, overhead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    arguments = parser.parse_args()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    environments = [HumanoidVectorEnv(task, NUM_ENVS, num_threads=arguments.threads) for task in arguments.tasks[:1]]
    for env in environments:
        env.reset()
        for _ in range(50):
            env.step(np.zeros((NUM_ENVS, 19)))
        env.close()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"memory of {NUM_ENVS} robots: {(after - before) / 1024:.0f} MB, process {after / 1024:.0f} MB")
    print(f"{'task':<16}{'env steps/s':>14}{'mj_step alone':>16}{'ratio':>8}{'not physics':>14}")
    for task in arguments.tasks:
        mine, bare, ratio, overhead = compare(task, arguments.threads, arguments.rounds, arguments.clock)
        print(f"{task:<16}{mine:>14.0f}{bare:>16.0f}{ratio:>8.2f}{overhead:>14.1%}")


if __name__ == "__main__":
    main()
