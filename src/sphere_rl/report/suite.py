"""What the runs of one suite say: every number and table of the page, and what its figures draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
import polars as pl

from sphere_rl import statistics
from sphere_rl.errors import ConfigError, RunFolderError
from sphere_rl.report import foresight, geometry, tables
from sphere_rl.report.curves import Curve, curves
from sphere_rl.report.foresight import Foresight
from sphere_rl.report.geometry import Snapshot
from sphere_rl.report.paper import published
from sphere_rl.results import Results

PLAIN, SPHERE = ("none",), ("sphere",)
"""Recorded methods of plain PPO, and of SPHERE without others."""
FIRST_METRICS = ("r_e_K", "r_e_A")
NOT_METRICS = {"seed", "global_step", "task_index", "task_step", "place", "position"}
NUMBERS = ("rl", "crl", "crl_iqm", "gap", "retention", "forgetting", "forward_transfer")


def arms(results: Results) -> tuple[tuple[str, str], ...]:
    """(actor, method) of every run, by actor, plain PPO first: the order of tables, and of colours."""
    found = {
        (row["actor"], row["method"]): (
            tuple(row["methods"]) != PLAIN,
            row["method"] not in PLAIN,
            results.labels[row["suite"], row["actor"], row["method"]],
        )
        for row in results.runs.iter_rows(named=True)
    }
    return tuple(sorted(found, key=lambda arm: (arm[0], *found[arm])))


@dataclass(frozen=True)
class SuiteRuns:
    """One suite, or one task sequence of it: a part of `Results.by_sequence` and its name."""

    name: str
    results: Results
    known: tuple[tuple[str, str], ...] = ()
    """(actor, method) of the whole page, in the order of their colours; by default this part's own."""

    @property
    def runs(self) -> pl.DataFrame:
        """One row a run folder."""
        return self.results.runs

    @cached_property
    def evals(self) -> pl.DataFrame:
        """Evaluations with their ``label``, ``place`` in the sequence, and ``position`` in its steps."""
        again = (pl.col("phase") == "retention") & (len(self.tasks) < 2)  # of one task: its final episodes once more
        return self._placed(self.results.evals.filter(~again))

    def learned(self, protocol: str) -> pl.DataFrame:
        """Evaluations during training and at its end, on the task at hand; those of RL at every place of their task."""
        lines = self.evals.filter((pl.col("protocol") == protocol) & pl.col("phase").is_in(["train", "final"]))
        return statistics.everywhere(lines, self.tasks).with_columns(self._position)

    @cached_property
    def spectra(self) -> pl.DataFrame:
        """Spectrum lines, with ``label``, ``place`` and ``position`` as above."""
        return self._placed(self.results.spectra)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks in training order."""
        (tasks,) = self.results.tasks.values()
        return tasks

    @property
    def suite(self) -> str:
        """The suite's name."""
        return self.runs["suite"][0]

    @property
    def steps(self) -> int:
        """Environment steps on a task; the largest where runs differ."""
        return max(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Every number of environment steps that runs make on a task."""
        return sorted(self.runs["steps_per_task"].unique())

    @cached_property
    def score(self) -> str:
        """Column that is scored: success at the last step, or the return where the tasks know no success."""
        return "success_final" if self.evals["success_final"].is_not_null().any() else "mean_return"

    @property
    def score_name(self) -> str:
        """The score in words."""
        return "Success" if self.score == "success_final" else "Return"

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Headline numbers, a row a (actor, method), those of plain PPO first.

        Added: ``label``; ``methods``, the names that the runs recorded; ``settings`` that tell it from its peers;
        ``trained``, all that say what was trained;
        ``r_e_K``, the mean over tasks as last measured on each in CRL; ``paper``, success in RL and CRL that the paper
        prints, where it has such runs.
        """
        scored = statistics.headline(self.evals, self.results.tasks, self.score)
        found = {(row["actor"], row["method"]): row for row in scored}
        complete = []
        for actor, method in arms(self.results):
            label = self._label(actor, method)
            one = self.runs.filter((pl.col("actor") == actor) & (pl.col("method") == method)).row(0, named=True)
            trained = self.results.trained(one["run"])
            made = {
                "label": label,
                "methods": tuple(one["methods"]),
                "settings": tuple(one["settings"]),
                "trained": trained,
                "r_e_K": tables.final_rank(*self._of(label), self.tasks),
                "paper": published(self.suite, self.tasks, actor, one["methods"], trained),
            }
            empty = {"suite": self.suite, "actor": actor, "method": method} | dict.fromkeys(NUMBERS)
            complete.append(empty | found.get((actor, method), {}) | made)
        return complete

    def _of(self, label: str) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Evaluations and spectrum lines of one label."""
        chosen = pl.col("label") == label
        return self.evals.filter(chosen), self.spectra.filter(chosen)

    @cached_property
    def labels(self) -> list[str]:
        """Labels in the order of the headline."""
        return [row["label"] for row in self.rows]

    @property
    def shortened(self) -> bool:
        """Whether a label leaves settings out that are the suite's own."""
        return any(not row["label"].endswith(row["method"]) for row in self.rows)

    @cached_property
    def order(self) -> list[str]:
        """Labels by colour: the page's methods, those that this part does not have as empty places."""
        own = {(row["actor"], row["method"]): row["label"] for row in self.rows}
        return [own.get(arm, "") for arm in (self.known or own)]

    @cached_property
    def plain(self) -> list[dict[str, Any]]:
        """Rows of plain PPO."""
        return [row for row in self.rows if row["methods"] == PLAIN]

    @cached_property
    def variants(self) -> list[dict[str, Any]]:
        """Rows of SPHERE alone, whatever they are called."""
        return [row for row in self.rows if row["methods"] == SPHERE]

    @property
    def architectures(self) -> list[dict[str, Any]]:
        """Rows of plain PPO without settings of their own, one an actor; none where there is but one actor."""
        found: dict[str, dict[str, Any]] = {}
        for row in self.plain:
            if not row["settings"]:
                found.setdefault(row["actor"], row)
        return list(found.values()) if len(found) > 1 else []

    @cached_property
    def pair(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Plain PPO and SPHERE, as far as they are there: under the same actor and settings if they can be."""
        ours = self.variants or [row for row in self.rows if set(SPHERE) <= {*row["methods"]}]
        alike = ((self.reference(row), row) for row in ours)
        return next((both for both in alike if both[0]), (next(iter(self.plain), None), next(iter(ours), None)))

    def reference(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Plain PPO under the same actor and settings, but for those of the row's own methods."""
        own = tuple(f"{name}." for name in row["methods"])
        known = {name: value for name, value in row["trained"].items() if not name.startswith(own)}
        alike = (one for one in self.plain if one["actor"] == row["actor"] and one["trained"] == known)
        return next(alike, None)

    @cached_property
    def differences(self) -> list[dict[str, Any]]:
        """What each method gains over plain PPO under the same actor and settings, paired by seed and task."""
        found = []
        for row in self.rows:
            if row["methods"] != PLAIN and (plain := self.reference(row)):
                ours, theirs = self._of(row["label"]), self._of(plain["label"])
                names = {"label": row["label"], "actor": row["actor"], "method": row["method"]}
                numbers = statistics.differences(ours[0], theirs[0], self.tasks, self.score)
                numbers["r_e_K"] = tables.rank_gain(ours, theirs, self.tasks)
                found.append(names | {"reference": plain["label"]} | numbers)
        return found

    @cached_property
    def by_task(self) -> list[dict[str, Any]]:
        """Every task by method and protocol."""
        return tables.by_task(self.rows, self.evals, self.spectra, self.tasks)

    @property
    def snapshots(self) -> dict[str, list[Snapshot]]:
        """For each label the policies at the ends of the tasks, of the CRL run of its lowest seed."""
        return {label: taken for label, taken in self._geometry.items() if isinstance(taken, list)}

    @property
    def absent(self) -> dict[str, str]:
        """For each label without snapshots the reason."""
        return {label: why for label, why in self._geometry.items() if isinstance(why, str)}

    @property
    def absences(self) -> dict[str, list[str]]:
        """For each reason the labels without snapshots."""
        found: dict[str, list[str]] = {}
        for label, why in self.absent.items():
            found.setdefault(why, []).append(label)
        return found

    @property
    def without_policies(self) -> str:
        """Why there is no snapshot of any method."""
        return "; ".join(self.absences)

    @property
    def unfinished(self) -> list[str]:
        """Runs that have not come to their end, as far as they are."""
        rows = self.runs.filter(pl.col("state") != "finished").iter_rows(named=True)
        return [
            f"{row['run']} ({row['state']}, {row['tasks_done']} of {row['num_tasks']} tasks, {row['global_step']:,} of "
            f"{row['steps_per_task'] * row['num_tasks']:,} steps)"
            for row in rows
        ]

    @cached_property
    def unreadable(self) -> dict[str, str]:
        """Runs whose policies could not be read for the snapshots, and the reason."""
        return {}

    @cached_property
    def _geometry(self) -> dict[str, list[Snapshot] | str]:
        found: dict[str, list[Snapshot] | str] = dict.fromkeys(self.labels, "no CRL policy at the end of a task yet")
        crl = self.runs.filter(pl.col("protocol") == "crl").sort("seed", maintain_order=True)
        for row in crl.iter_rows(named=True):
            label = self._label(row["actor"], row["method"])
            folder = self.results.folder(row["run"])
            if isinstance(found[label], str) and not folder.checkpoints.is_dir():
                found[label] = "its policies are not published"
            elif isinstance(found[label], str):
                try:
                    found[label] = geometry.snapshots(folder.path) or found[label]
                except ConfigError as error:  # a task that is not known here
                    found[label] = str(error)
                except RunFolderError as error:  # a broken checkpoint
                    found[label] = self.unreadable[row["run"]] = str(error)
        return found

    @cached_property
    def loads(self) -> dict[str, tuple[list[int], np.ndarray]]:
        """For each label with a gate: steps, and the share of probe states of each expert, of its lowest CRL seed."""
        lines = self.crl_probe.filter(pl.col("expert_load").list.len() > 1)
        found = {}
        for label in self.labels:
            part = lines.filter(pl.col("label") == label).sort("seed", "position")
            part = part.filter(pl.col("run") == part["run"].first()) if part.height else part
            if part.height:
                found[label] = (part["position"].to_list(), np.array(part["expert_load"].to_list()))
        return found

    @cached_property
    def crl_probe(self) -> pl.DataFrame:
        """Spectrum lines of the probe batch in CRL runs."""
        return self.spectra.filter((pl.col("protocol") == "crl") & (pl.col("batch") == "probe"))

    @cached_property
    def measured(self) -> pl.DataFrame:
        """Spectrum lines with r_e(K) and r_e(A); one of those that an RL run of a sweep has from its CRL run."""
        known = self.spectra.filter(pl.col("r_e_A").is_not_null() & pl.col("r_e_K").is_not_null())
        line = ["label", "seed", "task", "task_step", "batch", "r_e_K", "r_e_A"]
        return known.sort("protocol", maintain_order=True).unique(line, keep="first", maintain_order=True)

    @cached_property
    def starts(self) -> dict[float, str]:
        """Where in the sequence's steps each task begins."""
        return {float(i * self.steps): task for i, task in enumerate(self.tasks)}

    @cached_property
    def embeddings(self) -> dict[str, list[tuple[str, np.ndarray, np.ndarray]]]:
        """t-SNE of every snapshot's features, with each state's dominant direction; empty without scikit-learn."""
        if not find_spec("sklearn"):
            return {}
        return {
            label: [(f"{s.task_index + 1}. {s.task}", *geometry.embedding(s)) for s in row]
            for label, row in self.snapshots.items()
        }

    def curves(self, table: pl.DataFrame, column: str) -> list[Curve]:
        """A curve for each label that has one, in the headline's order; it breaks where a task ends."""
        found = curves(table, "position", column, ["label"], part="place")
        return sorted(found, key=lambda curve: self.labels.index(curve.label))

    @cached_property
    def profiles(self) -> dict[str, list[Curve]]:
        """Performance profiles by protocol, in the headline's order: share of (seed, task) above each score."""
        return {protocol: self._profiles(protocol) for protocol in ("crl", "rl")}

    def _profiles(self, protocol: str) -> list[Curve]:
        if self.score == "success_final":
            thresholds = np.arange(50) / 50
        else:
            scores = self.evals.filter(pl.col("phase") == "final")[self.score].drop_nulls()
            thresholds = np.linspace(scores.min() or 0.0, scores.max() or 0.0, 51)  # type: ignore[type-var]
        found = []
        for label in self.labels:
            own = self._of(label)[0].filter(pl.col("protocol") == protocol)
            matrix = statistics.matrix(statistics.final_scores(own, self.tasks, self.score), range(len(self.tasks)))
            if (shares := statistics.profile(matrix, thresholds, protocol, self.tasks)) is not None:
                columns = (column.tolist() for column in (thresholds, *shares))
                found.append(Curve(label, *columns, seeds=len(statistics.complete(matrix))))
        return found

    @cached_property
    def entries(self) -> pl.DataFrame:
        """What agents are as they enter tasks, and what they reach there: see `foresight`."""
        return foresight.entries(self.evals, self.spectra, self.score)

    @cached_property
    def foretold(self) -> dict[str, Foresight]:
        """What each metric at entry foretells."""
        return {name: foresight.foresight(self.entries, name) for name in self.metrics}

    @property
    def metrics(self) -> list[str]:
        """Metrics that are single numbers, those of the effective ranks first."""
        schema = self.spectra.schema
        numeric = sorted(name for name, kind in schema.items() if kind.is_numeric() and name not in NOT_METRICS)
        return [*(name for name in FIRST_METRICS if name in numeric), *(n for n in numeric if n not in FIRST_METRICS)]

    def ablation(self) -> list[list[str]]:
        """Rows of the ablation table: plain PPO and every variant of SPHERE alone; none where there are not two."""
        chosen = [*self.plain, *self.variants] if len(self.variants) > 1 else []
        return [[row["label"], *(str(row[name] or "–") for name in ("rl", "crl"))] for row in chosen]

    def rho_points(self) -> dict[float, dict[str, Any]]:
        """Headline numbers and label by ρ: the most runs of SPHERE whose recorded settings differ in ρ alone."""
        alike: dict[str, dict[float, dict[str, Any]]] = {}
        for row in self.variants:
            settings = dict(row["trained"])
            rho = settings.pop("sphere.rho")
            alike.setdefault(repr((row["actor"], settings)), {})[rho] = {k: row[k] for k in ("rl", "crl", "label")}
        found = max(alike.values(), key=len, default={})
        return found if len(found) > 1 else {}

    def _placed(self, table: pl.DataFrame) -> pl.DataFrame:
        label = pl.struct("actor", "method").map_elements(
            lambda row: self._label(row["actor"], row["method"]), return_dtype=pl.String
        )
        return statistics.placed(table, self.tasks).with_columns(self._position, label=label)

    @property
    def _position(self) -> pl.Expr:
        return (pl.col("place") * self.steps + pl.col("task_step")).alias("position")

    def _label(self, actor: str, method: str) -> str:
        label = self.results.labels[self.suite, actor, method]
        return label if self.runs["actor"].n_unique() == 1 else f"{actor} {label}"
