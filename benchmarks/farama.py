"""CW10's environments beside those of Farama's metaworld package, the reference: equal starts, equal actions.

    python benchmarks/farama.py record OUT.npz    # where sphere-rl is
    python benchmarks/farama.py compare OUT.npz   # where metaworld 3.1.1 is, which wants MuJoCo 3.3.0

Three episodes of two environments a task, that of the reference begun with the object and the goal found here. Where
things touch, two builds of MuJoCo go apart, and rewards with thresholds jump: so rewards are added up over the steps at
which the states are still within a millimetre.
"""

from __future__ import annotations

import sys

import numpy as np

STEPS, EPISODES, ALIKE = 499, 3, 1e-3  # the reference ends its episode a step earlier
STATE = slice(0, 18)


def action(observation: np.ndarray, step: int, rng: np.random.Generator) -> np.ndarray:
    """Go to the object and close the gripper, then anything."""
    near = step < 120
    move = 10 * (observation[:, 4:7] - observation[:, :3]) if near else 0.3
    noise = rng.normal(0, 0.5 if near else 1, (len(observation), 3))
    grip = rng.uniform(-1, 1, (len(observation), 1)) if step < 60 or not near else np.ones((len(observation), 1))
    return np.clip(np.concatenate([move + noise, grip], axis=1), -1, 1).astype(np.float32)


def record(path: str) -> None:
    """Episodes of this library's environments."""
    from sphere_rl.suites import make_suite

    suite, found = make_suite("cw10"), {}
    for task in suite.tasks:
        envs, rng = suite.make(task, 2, 7, 1), np.random.default_rng(1)
        observation, _ = envs.reset()
        for episode in range(EPISODES):
            states, actions, rewards = [observation], [], []
            for step in range(500):
                actions.append(action(observation, step, rng))
                observation, reward, _, _, info = envs.step(actions[-1])
                states.append(info.get("final_obs", observation))
                rewards.append(reward)
            for name, rows in (("states", states), ("actions", actions), ("rewards", rewards)):
                found[f"{task}.{episode}.{name}"] = np.array(rows)
        envs.close()
    np.savez_compressed(path, **found)


def drawn(task: str, start: np.ndarray, env: object) -> np.ndarray:
    """What the reference draws for a start like this one."""
    thing, goal = start[4:7], start[36:39]
    if task == "hammer":
        return thing
    if task == "faucet-close":
        return goal - [-0.175, 0, 0.125]
    if task == "peg-unplug-side":
        return goal - [0.194, 0, 0.131]
    if task == "window-close":
        return goal
    if task == "handle-press-side":  # the goal is a marker in the box, which is what is drawn
        place = np.array([-0.3, 0.7, 0.0])
        return goal - begin(env, place)[36:39] + place
    return np.concatenate([thing, goal])


def begin(env: object, place: np.ndarray, resets: int = 1) -> np.ndarray:
    """Reset the reference to this draw."""
    env._last_rand_vec = np.array(place, float)  # type: ignore[reportAttributeAccessIssue]
    return [env.reset()[0] for _ in range(resets)][-1]  # type: ignore[reportAttributeAccessIssue]


def compare(path: str) -> None:
    """A row a task."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS  # type: ignore[reportMissingImports]

    data = np.load(path)
    head = ("task", "start differs by", "steps alike", "their rewards", "the reference's")
    print(f"| {' | '.join(head)} |", "|---" * len(head) + "|", sep="\n")
    for task in dict.fromkeys(name.split(".")[0] for name in data.files):
        starts, alike, sums = [], [], np.zeros(2)
        for episode in range(EPISODES):
            states, actions, rewards = (data[f"{task}.{episode}.{name}"] for name in ("states", "actions", "rewards"))
            for i in range(states.shape[1]):
                env = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
                env._partially_observable, env._freeze_rand_vec, env._set_task_called = False, True, True
                theirs = begin(env, drawn(task, states[0, i], env), 1 + episode)
                starts.append(np.abs(theirs - states[0, i]).max())
                for step in range(STEPS):
                    theirs, reward, *_ = env.step(actions[step, i])
                    alike.append(np.abs(theirs - states[step + 1, i])[STATE].max() < ALIKE)
                    sums += alike[-1] * np.array([rewards[step, i], reward])
        print(f"| {task} | {max(starts):.0e} | {np.mean(alike):.0%} | {sums[0]:.1f} | {sums[1]:.1f} |", flush=True)


if __name__ == "__main__":
    {"record": record, "compare": compare}[sys.argv[1]](sys.argv[2])
