"""Does PPO learn on the native H1? A dense actor with the h1 preset on one task, beside two policies that do not learn.

    python benchmarks/h1_learning.py --task stand --steps 1500000 --out runs/h1-stand

A run that was stopped goes on where it was. The training episodes' mean return goes to benchmarks/learning/ as a table
and a plot, an episode of the trained policy to docs/media/ as a gif.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from sphere_rl.commands.play import play
from sphere_rl.learner.rollout import EpisodeRecorder
from sphere_rl.runs import RunFolder
from sphere_rl.suites import make_suite

RESULTS = Path(__file__).parent / "learning"
MEDIA = Path(__file__).parent.parent / "docs" / "media"
IDLE = {
    "uniform random actions": lambda generator, shape: generator.uniform(-1, 1, shape),
    "all actions zero": lambda generator, shape: np.zeros(shape),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--task", default="stand")
    options.add_argument("--steps", type=int, default=1_500_000)
    options.add_argument("--out", type=Path, default=Path("runs/h1-stand"))
    given = options.parse_args()
    folder = RunFolder(given.out)
    if folder.status().get("state") != "finished":
        subprocess.run([sys.executable, "-m", "sphere_rl.cli", *command(given, folder), "--quiet"], check=True)
    write_results(folder, given.task)
    MEDIA.mkdir(parents=True, exist_ok=True)
    print(play(folder.path, MEDIA / f"h1-{given.task}.gif", steps=500, fps=10))


def command(given: argparse.Namespace, folder: RunFolder) -> list[str]:
    """Start the run, or go on with it."""
    if folder.config_path.exists():
        return ["resume", str(given.out)]
    return f"""train --suite h1 --protocol rl --tasks {given.task} --actor dense --method none --spectrum-every -1
        --steps-per-task {given.steps} --out {given.out}""".split()


def idle_returns(task: str, episodes: int = 256) -> dict[str, float]:
    """Mean return of the policies that do not learn: every environment's first episodes, an equal share of each."""
    means = {}
    for name, act in IDLE.items():
        envs, generator = make_suite("h1").make(task, 64, seed=1, num_threads=1), np.random.default_rng(0)
        recorder, returns = EpisodeRecorder(64), [[] for _ in range(64)]
        envs.reset()
        while min(map(len, returns)) < episodes // 64:
            _, reward, terminated, truncated, info = envs.step(act(generator, (64, 19)))
            for env, episode in recorder.step(reward, terminated | truncated, info):
                returns[env].append(episode.total_reward)
        envs.close()
        means[name] = float(np.mean([r[: episodes // 64] for r in returns]))
    return means


def write_results(folder: RunFolder, task: str) -> None:
    """The curve as CSV, and its plot over the idle policies' levels."""
    import matplotlib.pyplot as plt

    RESULTS.mkdir(exist_ok=True)
    rows = [row for row in folder.read("train") if "mean_return" in row]
    lines = [f"{row['global_step']},{row['mean_return']:.6g},{row['mean_length']:.6g}" for row in rows]
    (RESULTS / f"h1-{task}.csv").write_text("global_step,mean_return,mean_length\n" + "\n".join(lines) + "\n")
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    steps, returns = (np.array([row[key] for row in rows]) for key in ("global_step", "mean_return"))
    axes.plot(steps / 1e6, returns, color="#9ecae1", linewidth=0.8)
    window = min(20, len(returns))
    smooth = np.convolve(returns, np.ones(window) / window, mode="valid")
    axes.plot(steps[window - 1 :] / 1e6, smooth, color="#0072b2", label=f"training episodes, mean of {window} rollouts")
    checks = folder.read("eval")
    axes.plot(
        [row["global_step"] / 1e6 for row in checks],
        [row["mean_return"] for row in checks],
        "o",
        color="#009e73",
        markersize=4,
        label="mean action",
    )
    for (name, level), style in zip(idle_returns(task).items(), ("--", ":"), strict=True):
        axes.axhline(level, color="#d55e00", linestyle=style, linewidth=1, label=f"{name}: {level:.1f}")
        print(f"{name}: {level:.1f}")
    axes.set(xlabel="environment steps [millions]", ylabel="episode return", title=f"H1 {task}: PPO, dense actor")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(RESULTS / f"h1-{task}.png", dpi=130)
    tenth = max(1, len(returns) // 10)
    print(f"first tenth {returns[:tenth].mean():.1f}, last tenth {returns[-tenth:].mean():.1f}")


if __name__ == "__main__":
    main()
