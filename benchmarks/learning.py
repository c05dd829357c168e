"""Does our PPO learn as a peer's? Dense actor on one MetaWorld task beside Stable-Baselines3's PPO.

    python benchmarks/learning.py --task window-close --steps 400000 --seeds 0 1 --jobs 2

Both step the same EnvPool environments with the CW10 preset (net 256 x 3, ReLU, no orthogonal weights). Two points of
Stable-Baselines3 cannot be set: actor and critic share one gradient clip, and weights start as PyTorch's defaults. So
there are two pairs. As they come, each learner as its own library has it. Matched, no clip in either and our initial
weights in both: then the two are one algorithm, and their curves must agree up to the seed.

Every run keeps its training episodes' success and return of each iteration; finished runs are kept, so the command can
be repeated. The table and the plot go to benchmarks/learning/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from sphere_rl.config import TrainConfig
from sphere_rl.learner.rollout import EpisodeRecorder
from sphere_rl.runs import RunFolder
from sphere_rl.suites import make_suite

RESULTS = Path(__file__).parent / "learning"
LEARNERS = {
    "sphere-rl": False,
    "stable-baselines3": False,
    "sphere-rl, matched": True,
    "stable-baselines3, matched": True,
}
"""Name, and whether without gradient clip and with our initial weights."""
STYLES = dict(zip(LEARNERS, (("#0072b2", "-"), ("#d55e00", "-"), ("#56b4e9", "--"), ("#e69f00", "--")), strict=True))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--task", default="window-close")
    options.add_argument("--steps", type=int, default=400_000)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--out", type=Path, default=Path("runs/learning"))
    options.add_argument("--peer", help=argparse.SUPPRESS)  # this process is that peer, with the seed of --seeds
    given = options.parse_args()
    if given.peer:
        log = peer_log(given.out, given.task, given.peer, given.seeds[0])
        train_peer(given.task, given.steps, given.seeds[0], log, matched=LEARNERS[given.peer])
        return
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands(given)))
    write_results(read_curves(given), given.task)


def commands(given: argparse.Namespace) -> list[list[str]]:
    """What is left to run."""
    left = []
    for seed, (learner, matched) in product(given.seeds, LEARNERS.items()):
        if learner.startswith("stable"):
            if not peer_log(given.out, given.task, learner, seed).exists():
                words = f"--task {given.task} --steps {given.steps} --seeds {seed} --out {given.out} --peer".split()
                left.append([sys.executable, __file__, *words, learner])
            continue
        folder = own_folder(given.out, given.task, learner, seed)
        if folder.status().get("state") == "finished":
            continue
        words = f"""train --suite cw10 --protocol rl --tasks {given.task} --actor dense --method none --seed {seed}
            --steps-per-task {given.steps} --spectrum-every -1 --out {folder.path}""".split()
        words += ["--max-grad-norm", "1e9"] if matched else []
        verb = ["resume", str(folder.path)] if folder.config_path.exists() else words
        left.append([sys.executable, "-m", "sphere_rl.cli", *verb, "--quiet"])
    return left


def own_folder(out: Path, task: str, learner: str, seed: int) -> RunFolder:
    return RunFolder(out / f"{learner.replace(', ', '-')}-{task}-{seed}")


def peer_log(out: Path, task: str, learner: str, seed: int) -> Path:
    return out / f"{learner.replace(', ', '-')}-{task}-{seed}.jsonl"


def train_peer(task: str, steps: int, seed: int, log: Path, matched: bool) -> None:
    """Stable-Baselines3's PPO with the CW10 preset; one line an iteration, the file appears when it is done."""
    import torch
    from peer import make_ppo  # only this process needs Stable-Baselines3

    torch.set_num_threads(1)
    config, envs = TrainConfig(), make_suite("cw10").make(task, TrainConfig().num_envs, seed, 1)
    recorder, rows, episodes, count = EpisodeRecorder(envs.num_envs), [], [], itertools.count(1)

    def watch(reward: np.ndarray, done: np.ndarray, info: dict[str, Any]) -> None:
        episodes.extend(episode for _, episode in recorder.step(reward, done, info))
        if (step := next(count)) % config.num_steps == 0:
            rows.append(row_of(step * envs.num_envs, episodes))
            episodes.clear()

    clip = {"max_grad_norm": 1e9} if matched else {}
    learner = make_ppo(config, envs, seed, watch, **clip)
    if matched:
        for layer in learner.policy.modules():
            if isinstance(layer, torch.nn.Linear):
                torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
                torch.nn.init.zeros_(layer.bias)
    iterations = steps // config.steps_per_iteration
    learner.learn(iterations * config.steps_per_iteration)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(json.dumps(row) + "\n" for row in rows[:iterations]))


def row_of(step: int, episodes: list[Any]) -> dict[str, float]:
    return {
        "global_step": step,
        "success_once": float(np.mean([e.success_once for e in episodes])),
        "success_final": float(np.mean([e.success_final for e in episodes])),
        "mean_return": float(np.mean([e.total_reward for e in episodes])),
    }


def read_curves(given: argparse.Namespace) -> dict[str, dict[int, list[dict[str, float]]]]:
    """Rows by learner and seed."""
    curves: dict[str, dict[int, list[dict[str, float]]]] = {learner: {} for learner in LEARNERS}
    for learner, by_seed in curves.items():
        for seed in given.seeds:
            if learner.startswith("stable"):
                lines = peer_log(given.out, given.task, learner, seed).read_text().splitlines()
                by_seed[seed] = [json.loads(line) for line in lines]
            else:
                by_seed[seed] = own_folder(given.out, given.task, learner, seed).read("train")
    return curves


def write_results(curves: dict[str, dict[int, list[dict[str, float]]]], task: str) -> None:
    """Curves as CSV, a table of means over parts of training, and the plot."""
    RESULTS.mkdir(exist_ok=True)
    columns = ("success_final", "success_once", "mean_return")
    lines = ["learner,seed,global_step," + ",".join(columns)]
    table = [f"| {task} | seed | " + " | ".join(f"success / return, {part}" for part in PARTS) + " |"]
    table.append("|---|---|" + "---|" * len(PARTS))
    for learner, by_seed in curves.items():
        for seed, rows in by_seed.items():
            lines += [
                f'"{learner}",{seed},{r["global_step"]},' + ",".join(f"{r[c]:.6g}" for c in columns) for r in rows
            ]
            cells = []
            for low, high in PARTS.values():
                part = rows[int(low * len(rows)) : max(1, int(high * len(rows)))]
                success, total = (np.mean([r[c] for r in part]) for c in ("success_final", "mean_return"))
                cells.append(f"{success:.2f} / {total:.0f}")
            table.append(f"| {learner} | {seed} | " + " | ".join(cells) + " |")
    (RESULTS / f"{task}.csv").write_text("\n".join(lines) + "\n")
    (RESULTS / f"{task}.md").write_text("\n".join(table) + "\n")
    draw(curves, task)
    print("\n".join(table))


def draw(curves: dict[str, dict[int, list[dict[str, float]]]], task: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for axis, column in zip(axes, ("success_final", "mean_return"), strict=True):
        for learner, by_seed in curves.items():
            color, style = STYLES[learner]
            for i, rows in enumerate(by_seed.values()):
                steps, values = ([row[key] for row in rows] for key in ("global_step", column))
                axis.plot(np.array(steps) / 1e3, values, style, color=color, label=learner if i == 0 else None)
    for axis, label in zip(axes, ("success at the end", "return"), strict=True):
        axis.set(xlabel="thousand environment steps", ylabel=f"{label} of training episodes", title=task)
    axes[0].legend(fontsize=8)
    figure.savefig(RESULTS / f"{task}.png", dpi=120)


PARTS = {"first third": (0, 1 / 3), "second third": (1 / 3, 2 / 3), "last third": (2 / 3, 1)}

if __name__ == "__main__":
    main()
