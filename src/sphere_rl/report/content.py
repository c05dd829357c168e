"""What the page says about one suite: every table and figure, from the tables of its runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from sphere_rl import figures, geometry, statistics
from sphere_rl.errors import ConfigError, RunFolderError
from sphere_rl.geometry import Snapshot
from sphere_rl.report import panels
from sphere_rl.report.panels import Panel
from sphere_rl.results import Results
from sphere_rl.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIRECTIONS = ("1st", "2nd", "3rd", "4th", "5th or later")
NOT_METRICS = {"run", "suite", "protocol", "actor", "method", "seed", "global_step", "task_index", "task", "task_step"}
FIRST_METRICS = ("r_e_K", "r_e_A")
BARS = {"barmode": "group", "xaxis": {"showgrid": False}}
PLAIN, ABLATION = "none", "sphere"


@dataclass(frozen=True)
class SuiteContent:
    """One suite, or one task sequence of it: a part of `Results.by_sequence` and its name."""

    name: str
    results: Results

    @property
    def runs(self) -> pl.DataFrame:
        """One row a run folder."""
        return self.results.runs

    @cached_property
    def evals(self) -> pl.DataFrame:
        """Evaluations, ``label`` added, and ``position``: where in the sequence's steps each was made."""
        return self._placed(self.results.evals)

    @cached_property
    def spectra(self) -> pl.DataFrame:
        """Spectrum lines, with ``label`` and ``position`` as above."""
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
        """Environment steps on a task; the largest where runs differ (their labels say so)."""
        return int(self.runs["steps_per_task"].max())  # type: ignore[arg-type]

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
        """Headline numbers, a row a (actor, method), those of plain PPO first; ``label`` added."""
        found = statistics.headline(self.evals, self.results.tasks, self.score)
        known = {(row["actor"], row["method"]) for row in found}
        empty = dict.fromkeys(("rl", "crl", "crl_iqm", "gap", "retention", "forgetting", "forward_transfer"))
        for actor, method in self.runs.select("actor", "method").unique(maintain_order=True).iter_rows():
            if (actor, method) not in known:
                found.append({"suite": self.suite, "actor": actor, "method": method} | empty)
        found.sort(key=lambda row: (row["actor"], row["method"].split()[0] != PLAIN, row["method"]))
        return [row | {"label": self._label(row["actor"], row["method"])} for row in found]

    @cached_property
    def labels(self) -> list[str]:
        """Labels in the order of the headline."""
        return [row["label"] for row in self.rows]

    @cached_property
    def differences(self) -> list[dict[str, Any]]:
        """What each method gains over plain PPO under the same actor and settings, paired by seed and task."""
        found = []
        for row in self.rows:
            settings = set(row["method"].split()[1:])
            plain = [
                other for other in self.rows
                if other["actor"] == row["actor"] and other["method"].split()[0] == PLAIN
                and set(other["method"].split()[1:]) <= settings
            ]  # fmt: skip
            if plain and row["method"].split()[0] != PLAIN:
                ours, theirs = (self.evals.filter(pl.col("label") == one["label"]) for one in (row, plain[0]))
                names = {"label": row["label"], "actor": row["actor"], "method": row["method"]}
                numbers = statistics.differences(ours, theirs, self.tasks, self.score)
                found.append(names | {"reference": plain[0]["label"]} | numbers)
        return found

    @property
    def snapshots(self) -> dict[str, list[Snapshot]]:
        """For each label the policies at the ends of the tasks, of the CRL run of its lowest seed."""
        return {label: taken for label, taken in self._geometry.items() if isinstance(taken, list)}

    @property
    def absent(self) -> dict[str, str]:
        """For each label without snapshots the reason."""
        return {label: why for label, why in self._geometry.items() if isinstance(why, str)}

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
            if isinstance(found[label], str):
                try:
                    found[label] = geometry.snapshots(self.results.folder(row["run"]).path) or found[label]
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
    def starts(self) -> dict[float, str]:
        """Where in the sequence's steps each task begins."""
        return {float(i * self.steps): task for i, task in enumerate(self.tasks)}

    @cached_property
    def embeddings(self) -> dict[str, list[tuple[str, np.ndarray, np.ndarray]]]:
        """t-SNE of every snapshot's features, with each state's dominant direction; empty without scikit-learn."""
        if not find_spec("sklearn"):
            return {}
        return {label: [(s.task, *geometry.embedding(s)) for s in row] for label, row in self.snapshots.items()}

    def facts(self) -> str:
        """Seeds and steps, for captions."""
        seeds = ", ".join(map(str, sorted(self.runs["seed"].unique())))
        tasks = f"{len(self.tasks)} task{'s' if len(self.tasks) > 1 else ''}"
        return f"{self.suite}: {tasks} × {self.steps:,} steps, seed{'s' if ',' in seeds else ''} {seeds}."

    def curves(self, table: pl.DataFrame, column: str) -> list[figures.Curve]:
        """A curve for each label, in the headline's order; an index means the same colour in every figure."""
        found = {curve.label: curve for curve in figures.curves(table, "position", column, ["label"])}
        return [found.get(label, figures.Curve(label, (), (), (), (), 0)) for label in self.labels] if found else []

    @cached_property
    def panels(self) -> list[Panel]:
        """All figures of the page but the 3-D view."""
        makers: Sequence[Callable[[], Panel]] = (
            self._success, self._architectures, self._learning, self._ranks, self._spectrum, self._routing,
            self._features, self._proxy, self._rho,
        )  # fmt: skip
        return [make() for make in makers]

    def drawings(self) -> dict[str, Figure]:
        """Figures for papers by file name, without the suite's name."""
        by_title = {panel.figure: panel.caption for panel in self.panels}
        measured = [curve for curve in self.curves(self.crl_probe, "r_e_K") if curve.x]
        learned = [curve for curve in self.curves(self._learned("crl"), self.score) if curve.x]
        score, plain = self.score_name, self._plain_rows()
        return {
            "geometry": figures.geometry(self.snapshots, self.geometry_caption()),
            "architectures": figures.success_bars(plain, "actor", by_title["architectures"], score),
            "rank": figures.line_plot(measured, self.starts, by_title["rank"], "$r_e(K)$"),
            "success": figures.success_bars(self.rows, "label", by_title["success"], score),
            "features": figures.tsne(self.embeddings, by_title["features"], DIRECTIONS),
            "proxy": figures.proxy_scatter(self.spectra, by_title["proxy"]),
            "learning": figures.line_plot(learned, self.starts, by_title["learning"], score),
            "spectrum": figures.spectrum_decay(self.snapshots, by_title["spectrum"]),
            "routing": figures.routing(self.loads, by_title["routing"]),
            "ablation": figures.table_figure(("variant", "RL", "CRL"), self.ablation(), "Ablation. " + self.facts()),
            "rho": figures.option_sweep(self.rho_points(), "ρ", by_title["rho"], score),
        }

    def geometry_caption(self) -> str:
        """Caption of the 3-D view."""
        return (
            "The unit sphere of output-gradient directions (grey) and its image under K at the end of each CRL task, "
            "in the eigenspace of K's three largest eigenvalues. Semi-axes are λ₁, λ₂, λ₃ of the full eNTK on one "
            "fixed probe batch, divided by λ₁: a needle means that gradients move the policy along one direction only. "
            f"Lowest seed of each method. {self.facts()}"
        )

    def ablation(self) -> list[list[str]]:
        """Rows of the ablation table: plain PPO and every variant of SPHERE alone."""
        chosen = [row for row in self.rows if row["method"].split()[0] in (PLAIN, ABLATION)]
        return [[row["label"], *(str(row[name] or "–") for name in ("rl", "crl"))] for row in chosen]

    def rho_points(self) -> dict[float, dict[str, Estimate | None]]:
        """Headline numbers by ρ, where runs of SPHERE differ in ρ alone."""
        prefix = f"{ABLATION} rho="
        found = [row for row in self.rows if row["method"].startswith(prefix) and row["method"].count("=") == 1]
        return {float(row["method"].removeprefix(prefix)): {name: row[name] for name in ("rl", "crl")} for row in found}

    def _success(self) -> Panel:
        caption = f"Mean {self.score_name.lower()} at the end of training on each task, with 95 % bootstrap intervals "
        absent = [f"{name.upper()} of {row['label']}" for row in self.rows for name in ("rl", "crl") if not row[name]]
        caption += "(none with one seed); a bar needs a seed that has finished all tasks. "
        caption += (f"Missing: {', '.join(absent)}. " if absent else "") + self.facts()
        known = any(row[protocol] for row in self.rows for protocol in ("rl", "crl"))
        choices = {"": panels.bars(self.rows, self.labels)} if known else {}
        return self._panel("success", f"{self.score_name} of RL and CRL by method", caption, choices,
                           "no seed has finished all tasks yet", BARS, y=self.score_name)  # fmt: skip

    def _architectures(self) -> Panel:
        rows = self._plain_rows()
        known = len({row["actor"] for row in rows}) > 1 and any(row[name] for row in rows for name in ("rl", "crl"))
        choices = {"": panels.bars(rows, [row["actor"] for row in rows])} if known else {}
        caption = f"Plain PPO by architecture, as above. {self.facts()}"
        return self._panel("architectures", "RL and CRL by architecture", caption, choices,
                           "runs of plain PPO with more than one architecture", BARS,
                           y=self.score_name)  # fmt: skip

    def _learning(self) -> Panel:
        choices = {}
        for protocol in ("crl", "rl"):
            curves = self.curves(self._learned(protocol), self.score)
            if curves:
                choices[protocol.upper()] = panels.lines(curves)
        caption = f"{self.score_name} on the current task by environment step: mean over seeds, band: their range. "
        caption += f"RL runs are drawn at their task's place in the sequence. {self.facts()}"
        layout = panels.boundaries(self.starts, self.steps)
        return self._panel("learning", "Learning curves", caption, choices, "no evaluation yet", layout, "protocol",
                           "environment steps", self.score_name)  # fmt: skip

    def _ranks(self) -> Panel:
        lines = self.crl_probe
        numeric = [name for name, kind in lines.schema.items() if kind.is_numeric() and name not in NOT_METRICS]
        order = [name for name in FIRST_METRICS if name in numeric]
        order += sorted(name for name in numeric if name not in order and name != "position")
        choices = {name: panels.lines(found) for name in order if (found := self.curves(lines, name))}
        caption = "Plasticity on one fixed probe batch through CRL training: mean over seeds, band: their range. "
        return self._panel("rank", "Effective rank of the eNTK, rₑ(K)", caption + self.facts(), choices,
                           "no spectrum lines of CRL runs", panels.boundaries(self.starts, self.steps), "metric",
                           "environment steps")  # fmt: skip

    def _spectrum(self) -> Panel:
        caption = "Eigenvalues of K over their sum on the probe batch, largest first, lowest CRL seed of each method. "
        layout = {"yaxis": {"type": "log", "dtick": 1, "exponentformat": "power"}}
        return self._panel("spectrum", "The spectrum of K as it decays", caption + self.facts(),
                           panels.spectra(self.snapshots), "no CRL policy at the end of a task yet", layout,
                           "after task", "index i", "λ<sub>i</sub> / tr K")  # fmt: skip

    def _routing(self) -> Panel:
        caption = "Share of the probe states that the gate sends to each expert, lowest CRL seed of each method. "
        return self._panel("routing", "Routing load", caption + self.facts(), panels.routing(self.loads),
                           "no routing measured: no mixture of experts, or no spectrum lines", {}, "method",
                           "environment steps")  # fmt: skip

    def _features(self) -> Panel:
        caption = (
            "t-SNE of the routing-weighted last hidden features Φ of the probe batch after each task; colour: the "
        )
        caption += "singular direction of Φ that a state's features are longest along. Lowest CRL seed. " + self.facts()
        reason = "no CRL policy at the end of a task yet" if find_spec("sklearn") else "scikit-learn is not installed"
        layout: dict[str, Any] = {axis: {"visible": False} for axis in ("xaxis", "yaxis")}
        return self._panel("features", "Weighted features", caption, panels.embeddings(self.embeddings, DIRECTIONS),
                           reason, layout, "snapshot")  # fmt: skip

    def _proxy(self) -> Panel:
        known = self.spectra.filter(pl.col("r_e_A").is_not_null() & pl.col("r_e_K").is_not_null())
        caption = "Every measured batch (probe and rollout): the proxy rₑ(A) of the last expert layer against rₑ(K)."
        if known.height >= 3 and known["r_e_A"].n_unique() > 1 and known["r_e_K"].n_unique() > 1:
            r = np.corrcoef(known["r_e_A"], known["r_e_K"])[0, 1]
            caption += f" Pearson r = {r:.3f} over {known.height} batches."
        choices = {"": panels.scatter(known)} if known.height else {}
        return self._panel("proxy", "The proxy and the kernel", f"{caption} {self.facts()}", choices,
                           "no spectrum lines", {}, "", "rₑ(A)", "rₑ(K)")  # fmt: skip

    def _rho(self) -> Panel:
        points = self.rho_points()
        choices = {"": panels.option_lines(points)} if any(row[p] for row in points.values() for p in row) else {}
        layout = {"xaxis": {"type": "log"}} if points and min(points) > 0 else {}
        return self._panel("rho", "Success against ρ", f"SPHERE by its strength ρ. {self.facts()}", choices,
                           "finished runs of SPHERE that differ in ρ alone (sphere sweep --grid sphere.rho 0.01 0.1)",
                           layout, "", "ρ", self.score_name)  # fmt: skip

    def _panel(
        self, name: str, title: str, caption: str, choices: Mapping[str, list[dict[str, Any]]], reason: str,
        layout: Mapping[str, Any], choose: str = "", x: str = "", y: str = "",
    ) -> Panel:  # fmt: skip
        if y == "Success":  # a share: the same scale everywhere
            layout = {**layout, "yaxis": {"range": [-0.02, 1.05]}}
        axes = {axis: {"title": {"text": text}} | layout.get(axis, {}) for axis, text in (("xaxis", x), ("yaxis", y))}
        return Panel(f"{name}-{self.name}", title, caption, name, choices, choose, {**layout, **axes},
                     "" if choices else reason)  # fmt: skip

    def _plain_rows(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["method"] == PLAIN]

    def _learned(self, protocol: str) -> pl.DataFrame:
        return self.evals.filter((pl.col("protocol") == protocol) & pl.col("phase").is_in(["train", "final"]))

    def _placed(self, table: pl.DataFrame) -> pl.DataFrame:
        place = pl.col("task").replace_strict({task: i for i, task in enumerate(self.tasks)}, return_dtype=pl.Int64)
        place = pl.when(pl.col("protocol") == "crl").then(pl.col("task_index")).otherwise(place)
        label = pl.struct("actor", "method").map_elements(
            lambda row: self._label(row["actor"], row["method"]), return_dtype=pl.String
        )
        return table.with_columns(position=place * self.steps + pl.col("task_step"), label=label)

    def _label(self, actor: str, method: str) -> str:
        return method if self.runs["actor"].n_unique() == 1 else f"{actor} {method}"
