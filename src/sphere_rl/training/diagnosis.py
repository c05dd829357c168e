"""What a run's policies are like, from its checkpoints alone, on the states that training measures on, too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from sphere_rl.runs import RunFolder, checkpoint
from sphere_rl.seeding import global_streams
from sphere_rl.spectrum import block_view, entk, measure
from sphere_rl.spectrum.kernel import KERNEL_ROWS, kernel_states, untouched
from sphere_rl.spectrum.ranks import gram_eigenvalues, kernel_eigenvalues
from sphere_rl.suites import make_suite
from sphere_rl.training.agent import Policy
from sphere_rl.training.policies import Chosen, placed, read_policies, spaces_of
from sphere_rl.training.probe import probe_batch
from sphere_rl.training.saved import config_of

if TYPE_CHECKING:
    from sphere_rl.spectrum.kernel import BlockShare

MAX_ROWS = 1024
"""Rows of K at most where its blocks and all its eigenvalues are wanted, of one policy after the other."""


def select(folder: RunFolder, names: Sequence[str] | None) -> list[Chosen]:
    """The named checkpoints, or the ends of the tasks, and the latest where training has gone on since.

    Raises:
        RunFolderError: one of them is missing or broken, or there is none yet.
    """
    if names:
        return list(dict.fromkeys(placed(folder, checkpoint.find(folder, name)) for name in names))
    latest = placed(folder, checkpoint.find(folder, "latest"))
    finished = [placed(folder, path) for path in checkpoint.task_checkpoints(folder)]
    gone_on = latest.global_step > max((one.global_step for one in finished), default=-1)
    return [*finished, latest] if gone_on else finished


@dataclass(frozen=True)
class Diagnosis:
    """What one checkpoint's policy is like on the probe batch.

    metrics: `sphere_rl.spectrum.measure` on all ``states``, r_e_K as in training on fewer where K would have more than
    `KERNEL_ROWS` rows; feature_eigenvalues: of A on them, descending.
    blocks and kernel_eigenvalues: of the full K, descending, on an even spread of ``kernel_states`` of them, fewer
    where K would have more than `MAX_ROWS` rows. No blocks where an encoder, whose part is none of them, is in front.
    """

    checkpoint: str
    global_step: int
    task_index: int
    task: str
    states: int
    kernel_states: int
    metrics: dict[str, float | list[float]]
    blocks: tuple[BlockShare, ...]
    kernel_eigenvalues: Float[ndarray, "n"]
    feature_eigenvalues: Float[ndarray, "k"]

    def row(self) -> dict[str, Any]:
        """As plain data, the metrics by their names."""
        row = {name: value.tolist() if isinstance(value, ndarray) else value for name, value in vars(self).items()}
        return row | row.pop("metrics") | {"blocks": [asdict(block) for block in self.blocks]}


@dataclass(frozen=True, eq=False)
class Spectra:
    """What K and A of a policy are like on a batch of states.

    kernel_observations: the `kernel_states` of the batch that K, of at most `MAX_ROWS` rows, is of.
    kernel_eigenvalues: of the full K, descending. feature_eigenvalues: of A = ΦᵀΦ/N, descending.
    features: Φ, the routing-weighted last hidden features.
    """

    kernel_observations: Float[Tensor, "n D"]
    kernel_eigenvalues: Float[ndarray, "k"]
    feature_eigenvalues: Float[ndarray, "f"]
    features: Float[ndarray, "N m"]


@contextmanager
def collecting(policy: Policy) -> Iterator[None]:
    """In here a policy is in the mode in which it collects experience, in which training measures it, too.

    In evaluation some are others (`ds_moe` selects experts then). What the mode draws (dropout) is the same each time,
    and what it records (running statistics) is put back.
    """
    mode = policy.training
    policy.train()
    try:
        with untouched(policy), global_streams(0):
            yield
    finally:
        policy.train(mode)


def on_probe(folder: RunFolder, chosen: Chosen, device: str = "cpu") -> tuple[str, Policy, Float[Tensor, "N D"]]:
    """The task of a checkpoint, its policy, and the probe batch as that policy sees it."""
    config = config_of(folder)
    task = config.task_sequence[chosen.task_index]
    policy = read_policies(folder, make_suite(config.suite), [(task, chosen)], device)[chosen.path]
    return task, policy, policy.normalize(torch.as_tensor(probe_batch(config, task), device=device))


def spectra(policy: Policy, observations: Float[Tensor, "N D"]) -> Spectra:
    """The spectra of a policy, as it collects experience, on states as it sees them."""
    with collecting(policy):
        with torch.no_grad():
            trace = policy.actor.trace(observations)
        features = trace.features[-1].weighted()
        part = observations[kernel_states(len(observations), trace.output.shape[1], MAX_ROWS)]
        kernel = kernel_eigenvalues(entk(policy.actor, part))
    return Spectra(
        kernel_observations=part,
        kernel_eigenvalues=kernel.flip(0).clamp(min=0).cpu().numpy(),
        feature_eigenvalues=gram_eigenvalues(features).flip(0).cpu().numpy(),
        features=features.cpu().numpy(),
    )


def diagnose(folder: RunFolder, chosen: Chosen, device: str = "cpu") -> Diagnosis:
    """Measure one checkpoint. Metrics of an update (churn, gradients) are in ``spectrum.jsonl`` alone."""
    task, policy, observations = on_probe(folder, chosen, device)
    found = spectra(policy, observations)
    part = found.kernel_observations
    config = config_of(folder)
    box = spaces_of(make_suite(config.suite), task, config.environment).box
    with collecting(policy):
        metrics = measure(policy.actor, observations, kernel_rows=KERNEL_ROWS, box=box)
        blocks = block_view(policy.actor, part) if policy.actor.encoder is None else ()
    return Diagnosis(
        checkpoint=chosen.path.stem,
        global_step=chosen.global_step,
        task_index=chosen.task_index,
        task=task,
        states=len(observations),
        kernel_states=len(part),
        metrics=metrics,
        blocks=blocks,
        kernel_eigenvalues=found.kernel_eigenvalues,
        feature_eigenvalues=found.feature_eigenvalues,
    )
