"""The model card of an exported policy: what was trained, how well it does, and how each file is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sphere_rl.experts.gates import is_top_k
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.runs import RunFolder
from sphere_rl.training.agent import Policy
from sphere_rl.training.policies import Chosen
from sphere_rl.training.saved import config_of

CALLS = {
    "torchscript": """```python
import torch
policy = torch.jit.load("policy.pt")
output = policy(torch.zeros(1, {dim}))  # any number of rows
```""",
    "onnx": """```python
import numpy as np, onnxruntime
policy = onnxruntime.InferenceSession("policy.onnx")
(output,) = policy.run(None, {{"observation": np.zeros((1, {dim}), np.float32)}})  # any number of rows
```""",
    "safetensors": """```python
import numpy as np, sphere_rl as sp  # pip install 'sphere-rl[export]'
policy = sp.load_policy(".")  # this folder, wherever it is
output = policy(np.zeros((1, {dim})))
```""",
}


def model_card(folder: RunFolder, chosen: Chosen, policy: Policy, spaces: Spaces, files: Mapping[str, str]) -> str:
    """Markdown, with the header that model hubs read; ``files`` by format."""
    config, record, actor = config_of(folder), folder.record(), policy.actor
    task = config.task_sequence[chosen.task_index]
    done = config.task_sequence[: chosen.task_index + 1] if config.protocol == "crl" else (task,)
    dim, inside = spaces.observation_dim, "; the normaliser is inside" if policy.clip is not None else ""
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    facts = {
        "Suite": config.suite,
        "Trained on": ", ".join(done),
        "Protocol": config.protocol,
        "Environment steps of the run": f"{chosen.global_step:,}",
        "Checkpoint": chosen.path.stem,
        "Method": ", ".join(config.method),
        "Seed": str(config.seed),
        "Actor": f"{actor.kind}, {_shape(policy)}, {parameters:,} parameters",
        "Versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "Commit": record["commit"] or "unknown",
    }
    lines = [
        "---", "library_name: sphere-rl", "tags:", "- reinforcement-learning", "- mixture-of-experts", "---", "",
        f"# {config.suite}: {task}", "",
        "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), "",
        "## What goes in and comes out", "",
        f"In: {dim} numbers an observation, [N, {dim}], as the environment gives them{inside}.",
        "", f"Out: {_output(spaces)}", "",
        "## Evaluation", "", *_evaluation(folder, chosen), "",
        "## Use", "",
    ]  # fmt: skip
    for format, name in files.items():
        lines += [f"`{name}`:", "", CALLS[format].format(dim=dim), ""]
    if {"torchscript", "onnx"} & {*files} and actor.gate is not None:
        lines += ["These graphs compute all experts; those that the gate does not select have weight 0.", ""]
    return "\n".join(lines)


def _shape(policy: Policy) -> str:
    options, actor = policy.actor.options, policy.actor
    *hidden, _ = actor.experts.layers
    layers = f"{len(hidden)} hidden layers of {hidden[0].weight.shape[1]} units"
    if actor.gate is None:
        return layers
    chosen = f", top {actor.routes.k} selected" if is_top_k(actor.routes) else ""
    return f"{options.num_experts} experts with {layers}{chosen}"


def _output(spaces: Spaces) -> str:
    if spaces.branches:
        parts, number = ", ".join(map(str, spaces.branches)), len(spaces.branches)
        return f"logits of {number} discrete actions side by side ({parts} values); the largest of each is taken."
    if spaces.discrete:
        return f"logits of {spaces.action_dim} discrete actions; the largest is taken."
    return f"the mean action, {spaces.action_dim} numbers; clip it to the environment's box."


def _evaluation(folder: RunFolder, chosen: Chosen) -> list[str]:
    """The run's own evaluations at this checkpoint, or the last ones before it."""
    rows = [row for row in folder.read("eval") if row["global_step"] <= chosen.global_step]
    first = chosen.task_index if config_of(folder).protocol == "rl" else 0  # in rl each task has an agent of its own
    rows = [row for row in rows if first <= row["task_index"] <= chosen.task_index]
    if not rows:
        return ["The run has not evaluated this policy."]
    last = rows[-1]["global_step"]
    columns = ("task", "phase", "global_step", "episodes", "mean_return", "std_return", "success_final")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        if row["global_step"] == last:
            lines.append(f"| {' | '.join(_cell(row.get(name)) for name in columns)} |")
    return [*lines, "", "Deterministic episodes of the run itself."]


def _cell(value: Any) -> str:
    return "unknown" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
