"""``sphere export``: a run's policy as files that others read, each checked against the policy before it is kept."""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sphere_rl.commands.card import model_card
from sphere_rl.errors import MissingExtraError, RunFolderError, StorageError, described
from sphere_rl.experts.gates import is_top_k
from sphere_rl.experts.tracing import traced
from sphere_rl.extras import require_module
from sphere_rl.kernels.script import undeprecated
from sphere_rl.runs import RunFolder
from sphere_rl.terminal.parsers import ArgumentParser
from sphere_rl.training import exported
from sphere_rl.training.agent import Policy
from sphere_rl.training.policies import choose, read_policy
from sphere_rl.training.saved import config_of

STATES = 256
"""Random states that a file is checked on."""
TOLERANCE = 1e-4
"""Largest difference allowed, as a share of the largest output: graphs add up in another order."""

Act = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Written:
    """One file and how far its outputs were from the policy's."""

    format: str
    name: str
    difference: float


def command(words: list[str]) -> None:
    """Take a run's policy away as TorchScript, ONNX or safetensors."""
    options = ArgumentParser(prog="sphere export", description=command.__doc__)
    options.add_argument("run", type=Path, help="run folder")
    options.add_argument("--format", nargs="+", choices=[*FORMATS], required=True, help="one or several")
    options.add_argument("--out", type=Path, help="a new or empty folder (RUN/export/CHECKPOINT)")
    options.add_argument("--task", help="a task of the run's suite; by default the task of the checkpoint")
    options.add_argument(
        "--checkpoint",
        help="latest, or a file of the run's checkpoints folder; by default the latest, in rl that of --task",
    )
    given = options.parse_args(words)
    out, written = export(given.run, given.format, given.out, given.task, given.checkpoint)
    for one in written:
        print(f"{out / one.name}: {one.format}, at most {one.difference:.1e} from the run's policy on {STATES} states")
    print(f"{out / 'README.md'}: what it is and how to call it")


def export(
    run: Path | str,
    formats: Sequence[str],
    out: Path | str | None = None,
    task: str | None = None,
    name: str | None = None,
) -> tuple[Path, list[Written]]:
    """Write a policy in these ``formats`` with a model card; return the folder and its files.

    Raises:
        MissingExtraError: a library that a format needs is not installed.
        RunFolderError: no run or checkpoint, ``out`` holds something, or a file acts differently; nothing is written.
        ConfigError: the suite has no such task.
    """
    folder = RunFolder.existing(run)
    _, chosen = choose(folder, task, name)
    policy, spaces = read_policy(folder, chosen.path)
    target = Path(out) if out is not None else folder.path / "export" / chosen.path.stem
    with _beside(target) as work:
        description = exported.describe(config_of(folder), spaces)
        (work / exported.DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        written = [_write(policy, format, work) for format in dict.fromkeys(formats)]
        card = model_card(folder, chosen, policy, spaces, {one.format: one.name for one in written})
        (work / "README.md").write_text(card, encoding="utf-8")
    return target, written


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A folder that becomes ``target`` if all goes well, and is gone otherwise.

    Raises:
        RunFolderError: ``target`` holds something, or cannot be made.
        StorageError: it cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunFolderError(f"{target}: not empty; expected a new or empty folder (--out), or all formats at once")
    new = [parent for parent in target.parents if not parent.exists()]  # the innermost first
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise RunFolderError(f"{target}: cannot be written ({error.strerror})") from None
    try:
        yield work
        work.chmod(0o755)  # mkdtemp's are for their owner alone
        work.replace(target)
    except BaseException as error:
        shutil.rmtree(work)
        with suppress(OSError):  # another export has come into one of them
            for parent in new:
                parent.rmdir()
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            raise StorageError.of(target, error) from error
        raise


def _write(policy: Policy, format: str, work: Path) -> Written:
    name, write = FORMATS[format]
    try:
        return Written(format, name, check(policy, write(policy, work / name), format))
    except (MissingExtraError, RunFolderError):
        raise
    except Exception as error:  # whatever the exporters, or what they have written, make of somebody's gate
        if isinstance(error, OSError) and error.errno:  # of the disk; inspect raises one without a number
            raise
        reason = described(error.__cause__ or error, longest=200)  # PyTorch's own words are of its steps
        raise RunFolderError(f"format: {format} cannot hold this policy ({reason})") from error


def check(policy: Policy, act: Act, format: str) -> float:
    """The largest difference between what a file computes and the policy, over random states.

    States whose experts are a matter of rounding, since gate logits are equal but for it, are left out.

    Raises:
        RunFolderError: it is more than rounding.
    """
    states = random_states(policy)
    with torch.no_grad():
        expected, clear = policy(states).numpy(), margins(policy, states) > TOLERANCE
    found = act(states.numpy())
    one = act(states[:1].numpy())
    if found.shape != expected.shape or one.shape != expected[:1].shape or not clear.any():
        raise RunFolderError(f"format: {format} cannot hold this policy: outputs {found.shape}, not {expected.shape}")
    scale = max(float(np.abs(expected).max()), 1e-6)
    kept = clear.numpy()
    difference = max(np.abs(found - expected)[kept].max(), np.abs(one - expected[:1]).max() if kept[0] else 0.0)
    if not difference <= TOLERANCE * scale:
        raise RunFolderError(f"format: {format} acts differently from the run's policy, by up to {difference:.2g}")
    return float(difference)


def random_states(policy: Policy) -> Float[Tensor, "N D"]:
    """Raw observations around those that the normaliser has seen, beyond its clip, too."""
    noise = torch.randn(STATES, policy.actor.observation_dim, generator=torch.Generator().manual_seed(0))
    spread = torch.logspace(-1, 1, STATES)[:, None]
    if policy.clip is None:
        return noise * spread
    mean, deviation = policy.get_buffer("mean"), policy.get_buffer("var").sqrt()
    return (mean + noise * spread * deviation).float()


def margins(policy: Policy, states: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
    """How far the last selected expert's gate logit is above the first other one's, as a share of the largest."""
    actor = policy.actor
    trace, gate = actor.trace(policy.normalize(states)), actor.routes
    if trace.logits is None or not is_top_k(gate) or gate.k >= trace.logits.shape[1]:
        return torch.full((len(states),), inf)
    logits, k = trace.logits.sort(dim=1, descending=True).values, gate.k
    return (logits[:, k - 1] - logits[:, k]) / logits.abs().amax(1).clamp(min=1e-12)


def _torchscript(policy: Policy, path: Path) -> Act:
    module: Any = traced(policy, torch.zeros(2, policy.actor.observation_dim))
    with undeprecated():
        path.write_bytes(module.save_to_buffer())  # whose errors are of the disk
        module = torch.jit.load(path)  # type: ignore[reportPrivateImportUsage]

    def act(states: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(states)).numpy()

    return act


def _onnx(policy: Policy, path: Path) -> Act:
    for library in ("onnx", "onnxscript"):
        require_module(library, "format onnx")
    from onnx.reference import ReferenceEvaluator

    rows, example = torch.export.Dim("N"), torch.zeros(2, policy.actor.observation_dim)
    with _quiet():
        torch.onnx.export(
            policy, (example,), path, dynamo=True, dynamic_shapes=({0: rows},), external_data=False,
            input_names=["observation"], output_names=["action"], verbose=False,
        )  # fmt: skip
    evaluator: Any = ReferenceEvaluator(str(path))
    return lambda states: np.asarray(evaluator.run(None, {"observation": states})[0])


def _safetensors(policy: Policy, path: Path) -> Act:
    exported.save(policy, path)
    read = exported.load(path.parent)
    return read


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' own warnings, which are of other models, and what they print before they fail."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


FORMATS: dict[str, tuple[str, Callable[[Policy, Path], Act]]] = {
    "torchscript": ("policy.pt", _torchscript),
    "onnx": ("policy.onnx", _onnx),
    "safetensors": (exported.WEIGHTS, _safetensors),
}
