"""``sphere diagnose``: how plastic the policies of a run are, from its checkpoints alone.

Every checkpoint is measured on the suite's probe batch, the states that training measures on, too. ``--proxy`` asks how
well r_e(A) of the last expert layer stands for r_e(K): both on many small batches of every checkpoint's policy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from numpy import ndarray

from sphere_rl.config import TrainConfig
from sphere_rl.errors import CommandLineError, RunFolderError
from sphere_rl.report import appearance, figures
from sphere_rl.report.geometry import MAX_ROWS
from sphere_rl.runs import RunFolder, checkpoint
from sphere_rl.runtime import threads, tune_process
from sphere_rl.seeding import derive_seed, global_streams
from sphere_rl.spectrum import block_view, effective_rank, entk, gram_effective_rank, measure
from sphere_rl.spectrum.ranks import gram_eigenvalues
from sphere_rl.suites import make_suite
from sphere_rl.suites.guard import make_envs
from sphere_rl.suites.spaces import action_sender, check_numbers
from sphere_rl.terminal.parsers import ArgumentParser, positive
from sphere_rl.terminal.tables import print_table
from sphere_rl.training.agent import Policy
from sphere_rl.training.policies import Chosen, placed, read_policies
from sphere_rl.training.probe import probe_batch, probe_observations
from sphere_rl.training.saved import config_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sphere_rl.spectrum.kernel import BlockShare

BATCH = 64
"""States of a batch of ``--proxy``: enough for r_e to move freely, few enough for hundreds of exact kernels."""
ENVS, STEPS = 2, 100
"""Environments that a policy visits states in, and the steps that it takes in each at least."""
INTERVAL = "95 % interval by Fisher's z, which takes batches as independent"


def command(words: list[str]) -> None:
    """Measure the plasticity of a run's checkpoints."""
    options = ArgumentParser(prog="sphere diagnose", description=command.__doc__)
    options.add_argument("run", type=Path, help="run folder")
    options.add_argument(
        "--checkpoint", nargs="+", metavar="NAME",
        help="latest, or files of the run's checkpoints folder; by default the ends of its tasks and the latest",
    )  # fmt: skip
    options.add_argument("--proxy", action="store_true", help="r_e(A) of the last expert layer against r_e(K)")
    options.add_argument("--batches", type=positive, help="with --proxy: batches of each kind a checkpoint (16)")
    options.add_argument("--json", action="store_true", help="one JSON object a line instead of the tables")
    options.add_argument("--device", default="cpu", help="PyTorch device, whatever the run was made on (cpu)")
    options.add_argument("--out", type=Path, help="figure: a .png, .svg or .pdf file (RUN/spectrum.png, RUN/proxy.png)")
    given = options.parse_args(words)
    if given.batches and not given.proxy:
        raise CommandLineError("--batches: only allowed with --proxy")
    out = given.out or given.run / ("proxy.png" if given.proxy else "spectrum.png")
    if out.suffix[1:] not in figures.FORMATS:
        raise CommandLineError(f"--out: '{out}' is not allowed; expected a .png, .svg or .pdf file")
    folder = RunFolder.existing(given.run)
    tune_process(threads(config_of(folder).torch_threads))
    chosen = select(folder, given.checkpoint)
    if given.proxy:
        table = proxy_table(folder, chosen, given.batches or 16, given.device)
        show_proxy(folder, table, given.json)
        caption = f"{folder.path}: batches of {BATCH} states; {INTERVAL}."
        figure = figures.proxy_scatter(table, caption, "checkpoint")
        figure.suptitle(caption, fontsize=7)
    else:
        found = [diagnose(folder, one, given.device) for one in chosen]
        show(folder, found, given.json)
        figure = spectra(found, f"{folder.path}: eigenvalues on {found[0].kernel_states} probe states.")
    write(figure, out)


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

    metrics: `sphere_rl.spectrum.measure` on all ``states``; feature_eigenvalues: of A on them, descending.
    blocks and kernel_eigenvalues: of the full K, descending, on an even spread of ``kernel_states`` of them, fewer
    where K would have more than `MAX_ROWS` rows.
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


def diagnose(folder: RunFolder, chosen: Chosen, device: str = "cpu") -> Diagnosis:
    """Measure one checkpoint. Metrics of an update (churn, gradients) are in ``spectrum.jsonl`` alone."""
    config = config_of(folder)
    task = config.task_sequence[chosen.task_index]
    policy = read_policies(folder, make_suite(config.suite), [(task, chosen)], device)[chosen.path]
    raw = probe_batch(config, task)
    observations = policy.normalize(torch.as_tensor(raw, device=device))
    with torch.no_grad():
        trace = policy.actor.trace(observations)
    count = min(len(raw), MAX_ROWS // trace.output.shape[1])
    part = observations[torch.linspace(0, len(raw) - 1, count).round().long()]
    return Diagnosis(
        checkpoint=chosen.path.stem,
        global_step=chosen.global_step,
        task_index=chosen.task_index,
        task=task,
        states=len(raw),
        kernel_states=count,
        metrics=measure(policy.actor, observations),
        blocks=block_view(policy.actor, part),
        kernel_eigenvalues=torch.linalg.eigvalsh(entk(policy.actor, part).double()).flip(0).clamp(min=0).cpu().numpy(),
        feature_eigenvalues=gram_eigenvalues(trace.features[-1].weighted()).flip(0).cpu().numpy(),
    )


def show(folder: RunFolder, found: Sequence[Diagnosis], as_json: bool) -> None:
    """Print every metric and the blocks of K, a column a checkpoint; or one JSON object a checkpoint."""
    if as_json:
        print("\n".join(json.dumps(one.row()) for one in found))
        return
    metrics = {one.checkpoint: _metric_cells(one) for one in found}
    print_columns(f"{folder.path}, on {found[0].states} probe states", "metric", metrics)
    title = f"Blocks of K on {found[0].kernel_states} probe states: share of tr K, r_e, and load of experts"
    print_columns(title, "block", {one.checkpoint: _block_cells(one) for one in found})


def _metric_cells(one: Diagnosis) -> dict[str, Any]:
    scalars = {name: value for name, value in one.metrics.items() if not isinstance(value, list)}
    return {"global_step": one.global_step, "task": one.task} | scalars


def _block_cells(one: Diagnosis) -> dict[str, Any]:
    """Gate and layers, then every expert with its load; one that no state was routed to has nothing else."""
    load = one.metrics["expert_load"]
    assert isinstance(load, list)
    parts = {(b.kind, b.name): f"{b.share:.1%}, {b.effective_rank:.3g}" for b in one.blocks}
    cells = {name: text for (kind, name), text in parts.items() if kind != "expert"}
    for expert, share in enumerate(load):
        cells[f"expert {expert}"] = f"{parts.get(('expert', str(expert)), '–')}, {share:.2f}"
    return cells


def print_columns(title: str, head: str, columns: Mapping[str, Mapping[str, Any]]) -> None:
    """A table with one column for each key, as many at a time as the terminal is wide."""
    from rich.console import Console

    console, names = Console(), list(columns)
    rows = list(dict.fromkeys(name for cells in columns.values() for name in cells))
    space = (console.width if console.is_terminal else 400) - max(map(len, (head, *rows))) - 5  # 5: borders
    fit = max(1, space // (3 + max(len(str(text)) for name in names for text in (name, *columns[name].values()))))
    for start in range(0, len(names), fit):
        shown = names[start : start + fit]
        print_table(title, [{head: row} | {name: columns[name].get(row) for name in shown} for row in rows])


@appearance.styled
def spectra(found: Sequence[Diagnosis], caption: str) -> Figure:
    """Eigenvalues of K and of A over their sums, largest first, a line a checkpoint."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    figure.suptitle(caption, fontsize=8)
    for place, (name, ranks) in enumerate({"K": "kernel_eigenvalues", "A": "feature_eigenvalues"}.items()):
        axes = figure.add_subplot(1, 2, place + 1)
        for i, one in enumerate(found):
            values = getattr(one, ranks)
            shares = values / max(values.sum(), np.finfo(float).tiny)
            axes.loglog(
                np.arange(1, len(shares) + 1), shares, color=appearance.COLORS[i % len(appearance.COLORS)],
                linestyle=appearance.LINES[i // len(appearance.COLORS) % len(appearance.LINES)], linewidth=1.2,
                label=f"{one.checkpoint}, $r_e$ = {effective_rank(values):.1f}",
            )  # fmt: skip
        axes.set(
            xlabel="Index $i$", ylabel=rf"$\lambda_i / \mathrm{{tr}}\,{name}$", title=f"${name}$", ylim=(1e-9, 1.5)
        )
        axes.legend(fontsize=6, loc="lower left")
    return figure


def write(figure: Figure, path: Path) -> None:
    """Save the figure and say where.

    Raises:
        RunFolderError: it cannot be written there.
    """
    import matplotlib

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(appearance.STYLE):
            figure.savefig(path, dpi=200, bbox_inches="tight")
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written ({error.strerror})") from None
    print(f"figure: {path}", file=sys.stderr)


def proxy_table(folder: RunFolder, chosen: Sequence[Chosen], batches: int, device: str = "cpu") -> pl.DataFrame:
    """r_e(A) of the last expert layer and r_e(K) of disjoint batches of `BATCH` states, a row a batch.

    For each checkpoint ``batches`` of random actions ("probe") and as many of its own, sampled, actions ("visited"),
    each of one task; the tasks are those of the run, or the checkpoint's own where the suite has no sequence.
    """
    config, rows = config_of(folder), []
    suite = make_suite(config.suite)
    for one in chosen:
        task = config.task_sequence[one.task_index]
        tasks = tuple(dict.fromkeys(config.task_sequence)) if suite.tasks else (task,)
        policy = read_policies(folder, suite, [(task, one) for task in tasks], device)[one.path]
        for source, task, states in _batches(policy, config, tasks, batches):
            ranks = _ranks(policy, states)
            rows.append({"checkpoint": one.path.stem, "source": source, "task": task} | ranks)
    return pl.DataFrame(rows)


def _ranks(policy: Policy, states: Float[ndarray, "N D"]) -> dict[str, float]:
    observation = policy.normalize(torch.as_tensor(states, device=next(policy.parameters()).device))
    with torch.no_grad():
        features = policy.actor.trace(observation).features[-1].weighted()
    kernel = entk(policy.actor, observation).double()
    return {"r_e_A": gram_effective_rank(features), "r_e_K": effective_rank(torch.linalg.eigvalsh(kernel))}


def _batches(
    policy: Policy, config: TrainConfig, tasks: Sequence[str], batches: int
) -> Iterator[tuple[str, str, Float[ndarray, "N D"]]]:
    """(source, task, states) of every batch."""
    for i, task in enumerate(tasks):
        mine = len(range(i, batches, len(tasks)))  # of batch 0, 1, … each task in turn gets one
        if mine:
            probe = _probe_states(config, task, mine * BATCH)
            visited = visited_states(policy, config.suite, task, mine * BATCH, config.environment)
            for source, states in (("probe", probe), ("visited", visited)):
                yield from ((source, task, batch) for batch in np.split(states, mine))


@cache
def _probe_states(config: TrainConfig, task: str, count: int) -> Float[ndarray, "N D"]:
    """States of random actions in random order: batches of them are alike."""
    states = probe_observations(make_suite(config.suite), (task,), count, arguments=config.environment)
    return np.random.default_rng(0).permutation(states)


@torch.no_grad()
def visited_states(
    policy: Policy, suite: str, task: str, count: int, arguments: Mapping[str, Any] = MappingProxyType({})
) -> Float[ndarray, "N D"]:
    """Return ``count`` raw observations of a policy that samples its actions, in random order; the same each time."""
    seed = derive_seed(0, "visited", task)
    device = next(policy.parameters()).device
    with global_streams(seed):
        envs = make_envs(make_suite(suite), task, ENVS, seed, 1, arguments)
        send, generator = action_sender(envs.single_action_space), torch.Generator(device).manual_seed(seed)
        seen = [np.array(envs.reset()[0])]
        for _ in range(max(STEPS, count)):
            output = policy(torch.as_tensor(seen[-1], dtype=torch.float32, device=device))
            seen.append(np.array(envs.step(send(policy.actor.head.sample(output, generator)))[0]))
            check_numbers(f"task {task}: the observation", seen[-1])
        envs.close()
    states = np.concatenate(seen).astype(np.float32)
    return states[np.random.default_rng(seed).choice(len(states), count, replace=False)]


def correlation(table: pl.DataFrame) -> dict[str, Any]:
    """Batches, mean ranks and Pearson's r of r_e(A) and r_e(K) with its 95 % interval by Fisher's z.

    r is None where one of them is constant or there are fewer than three batches, the interval where fewer than four.
    """
    from scipy.stats import pearsonr

    a, k = table["r_e_A"], table["r_e_K"]
    row = {"batches": table.height, "r_e_A": a.mean(), "r_e_K": k.mean(), "pearson_r": None, "low": None, "high": None}
    if table.height > 2 and a.n_unique() > 1 and k.n_unique() > 1:
        found: Any = pearsonr(a, k)
        row["pearson_r"] = float(found.statistic)
        if table.height > 3:
            row["low"], row["high"] = map(float, found.confidence_interval())
    return row


def show_proxy(folder: RunFolder, table: pl.DataFrame, as_json: bool) -> None:
    """Print the correlation over all batches, and within one policy on one kind of states."""
    groups = {("all", "all"): table} | dict(table.group_by("checkpoint", "source", maintain_order=True))
    rows = [{"checkpoint": of, "states": source} | correlation(part) for (of, source), part in groups.items()]
    if as_json:
        print("\n".join(map(json.dumps, rows)))
        return
    print_table(f"{folder.path}: r_e(A) of the last expert layer against r_e(K), batches of {BATCH} states", rows)
    print(INTERVAL)
