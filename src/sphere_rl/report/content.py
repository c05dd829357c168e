"""What the page says about one suite: its figures with their captions, from the tables of its runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import polars as pl

from sphere_rl.correlations import correlation
from sphere_rl.extras import missing
from sphere_rl.report import panels
from sphere_rl.report.panels import Panel
from sphere_rl.report.suite import SuiteRuns
from sphere_rl.spectrum import SPECTRAL_METRICS

DIRECTIONS = ("1st", "2nd", "3rd", "4th", "5th or later")
BARS = {"barmode": "group", "scattermode": "group", "xaxis": {"showgrid": False, "type": "category"}}
INSTALL = str(missing("sklearn", "sklearn", "t-SNE")) + ", then make the report again"


@dataclass(frozen=True)
class SuiteContent(SuiteRuns):
    """One suite's runs, and the figures of them."""

    def facts(self) -> str:
        """Seeds and steps, for captions."""
        seeds = ", ".join(map(str, sorted(self.runs["seed"].unique())))
        tasks = f"{len(self.tasks)} task{'s' if len(self.tasks) != 1 else ''}"
        steps = " to ".join(f"{steps:,}" for steps in dict.fromkeys((self.lengths[0], self.steps)))
        return f"{self.suite}: {tasks} × {steps} steps, seed{'s' if ',' in seeds else ''} {seeds}."

    @cached_property
    def panels(self) -> list[Panel]:
        """All figures of the page but the 3-D view."""
        makers: Sequence[Callable[[], Panel]] = (
            self._success, self._architectures, self._learning, self._ranks, self._spectrum, self._routing,
            self._features, self._proxy, self._profile, self._foresight, self._rho,
        )  # fmt: skip
        return [make() for make in makers]

    def geometry_caption(self) -> str:
        """Caption of the 3-D view."""
        return (
            "The unit sphere of output-gradient directions (grey) and its image under K at the end of each CRL task, "
            "in the eigenspace of K's three largest eigenvalues. Semi-axes are λ₁, λ₂, λ₃ of the full eNTK on one "
            "fixed probe batch, scaled to the sum 3 that the sphere's have; all views have one scale. A needle means "
            "that gradients move the policy along one direction only. The shape is of these three alone (rₑ 1 to 3); "
            f"rₑ(K), of all of them, can be higher where it is flatter. "
            f"The lowest seed of each method that has policies. {self.facts()}"
        )

    def _success(self) -> Panel:
        caption = f"Mean {self.score_name.lower()} at the end of training on each task, with 95 % bootstrap intervals "
        absent = [text for name in ("rl", "crl") if (text := self._without(name))]
        caption += "(none with one seed); a bar needs a seed that has finished all tasks. "
        caption += (f"Missing: {', '.join(absent)}. " if absent else "") + self.facts()
        if any(row["paper"] for row in self.rows):
            caption += " Diamonds: what the paper prints for the method (five seeds, no intervals)."
        known = any(row[protocol] for row in self.rows for protocol in ("rl", "crl"))
        choices = {"": panels.bars(self.rows, self.labels, self.order)} if known else {}
        return self._panel("success", f"{self.score_name} of RL and CRL by method", caption, choices,
                           "no seed has finished all tasks yet", BARS, y=self.score_name)  # fmt: skip

    def _without(self, protocol: str) -> str:
        """Which methods have no bar of a protocol; empty where all have."""
        names = [row["label"] for row in self.rows if not row[protocol]]
        who = "every method" if len(names) == len(self.rows) else ", ".join(names)
        return f"{protocol.upper()} of {who}" if names else ""

    def _architectures(self) -> Panel:
        rows = self.architectures
        known = any(row[name] for row in rows for name in ("rl", "crl"))
        choices = {"": panels.bars(rows, [row["actor"] for row in rows], self.order)} if known else {}
        caption = f"Plain PPO by architecture, as above. {self.facts()}"
        reason = "no seed has finished all tasks yet" if rows else "runs of plain PPO with more than one architecture"
        return self._panel("architectures", "RL and CRL by architecture", caption, choices, reason, BARS,
                           y=self.score_name)  # fmt: skip

    def _learning(self) -> Panel:
        choices = {}
        for protocol in ("crl", "rl"):
            curves = self.curves(self.learned(protocol), self.score)
            if curves:
                choices[protocol.upper()] = panels.lines(curves, self.order)
        caption = f"{self.score_name} on the current task by environment step: mean over seeds, band: their range. "
        caption += f"RL runs are drawn at their task's place in the sequence. {self.facts()}"
        layout = panels.boundaries(self.starts, self.steps)
        return self._panel("learning", "Learning curves", caption, choices, "no evaluation yet", layout, "protocol",
                           "environment steps", self.score_name)  # fmt: skip

    def _ranks(self) -> Panel:
        lines = self.crl_probe
        choices = {
            name: panels.lines(found, self.order) for name in self.metrics if (found := self.curves(lines, name))
        }
        caption = "Plasticity on one fixed probe batch through CRL training: mean over seeds, band: their range. "
        panel = self._panel("rank", panels.TITLES["r_e_K"], caption + self.facts(), choices,
                            "no spectrum lines of CRL runs", panels.boundaries(self.starts, self.steps), "metric",
                            "environment steps")  # fmt: skip
        notes = {name: text for name, text in SPECTRAL_METRICS.items() if name in choices}
        titles = {name: panels.TITLES.get(name, name) for name in choices}
        return replace(panel, titles=titles, notes=notes, chosen_axis="yaxis", names=panels.AXES)

    def _spectrum(self) -> Panel:
        caption = "Eigenvalues of K over their sum on the probe batch, largest first, lowest CRL seed of each method. "
        layout = {"yaxis": {"type": "log", "dtick": 1, "exponentformat": "power"}}
        return self._panel("spectrum", "The spectrum of K as it decays", caption + self.facts(),
                           panels.spectra(self.snapshots, self.order), self.without_policies, layout,
                           "after task", "index i", "λ<sub>i</sub> / tr K")  # fmt: skip

    def _routing(self) -> Panel:
        caption = (
            "Share of the probe states that the gate sends to each expert, lowest CRL seed of each method; a column "
        )
        caption += "reaches from the measurement before to its own. "
        layout = panels.boundaries(self.starts, self.steps) | {"hovermode": "closest"}
        return self._panel("routing", "Routing load", caption + self.facts(), panels.routing(self.loads),
                           "no routing measured: no mixture of experts, or no spectrum lines", layout, "method",
                           "environment steps")  # fmt: skip

    def _features(self) -> Panel:
        caption = (
            "t-SNE of the routing-weighted last hidden features Φ of the probe batch after each task; symbol and "
            "lightness: the singular direction of Φ that a state's features are longest along. Lowest CRL seed. "
        )
        caption += self.facts()
        reason = self.without_policies if find_spec("sklearn") else INSTALL
        layout: dict[str, Any] = {axis: {"visible": False} for axis in ("xaxis", "yaxis")}
        choices = panels.embeddings(self.embeddings, DIRECTIONS, self.order)
        return self._panel("features", "Weighted features", caption, choices, reason, layout, "snapshot")

    def _proxy(self) -> Panel:
        known = self.measured
        caption = "Every measured batch (probe and rollout): the proxy rₑ(A) of the last expert layer against rₑ(K)."
        found = correlation(known)
        if (r := found["pearson_r"]) is not None:
            bounds = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
            one = " (one run: no interval)" if known["run"].n_unique() == 1 else ""
            drawn = " (95 % interval: runs drawn anew)" if bounds else one
            caption += f" Pearson r = {r:.3f}{bounds} over {known.height} batches of all runs together{drawn}."
            caption += f" {self._within_runs(known)}"
        choices = {"": panels.scatter(known, self.order)} if known.height else {}
        return self._panel("proxy", "The proxy and the kernel", f"{caption} {self.facts()}", choices,
                           "no spectrum lines", {}, "", "rₑ(A)", "rₑ(K)")  # fmt: skip

    def _within_runs(self, known: pl.DataFrame) -> str:
        """What is left of the correlation of r_e(A) and r_e(K) where neither runs nor kinds of batches are mixed."""
        each = known.group_by("run", "batch").agg(r=pl.corr("r_e_A", "r_e_K"), lines=pl.len())
        r = each.filter((pl.col("lines") > 3) & pl.col("r").is_finite())["r"]
        if r.is_empty():
            return ""
        middle, low, high = (f"{value:z.2f}".replace("-", "−") for value in (r.median(), r.min(), r.max()))
        return f"Within one run and one kind of batch: median r = {middle}, from {low} to {high} ({len(r)} of them)."

    def _profile(self) -> Panel:
        found = self.profiles.items()
        choices = {protocol.upper(): panels.lines(curves, self.order) for protocol, curves in found if curves}
        caption = f"Share of (seed, task) whose {self.score_name.lower()} at the end of training on the task is above "
        caption += "the threshold, over seeds that have finished all tasks; band: 95 % bootstrap interval (none with "
        caption += f"one seed). A curve above another is better at every threshold. {self.facts()}"
        return self._panel("profile", "Performance profiles", caption, choices, "no seed has finished all tasks yet",
                           {"yaxis": {"range": [-0.02, 1.05]}}, "protocol", f"{self.score_name} above",
                           "share of (seed, task)")  # fmt: skip

    def _foresight(self) -> Panel:
        table = self.entries
        names = [name for name in self.metrics if table.height and table[name].n_unique() > 1]
        caption = "Each point an agent on a task of its sequence, the first excepted: the metric on the probe batch as "
        caption += f"last measured on the task before, and the {self.score_name.lower()} at the end of training on the "
        caption += "new one. Within tasks: with the mean of each task taken out of both, so that a hard task says "
        caption += (
            "nothing. Intervals: 95 %, runs drawn anew (none with one); of as many metrics as there are here some "
        )
        caption += f"leave 0 out by chance. {self.facts()}"
        panel = self._panel("foresight", "What an agent is as it enters a task, and what it reaches there", caption,
                            {name: panels.entries(table, name, self.order) for name in names},
                            "no agent has finished a second task yet", {}, "metric", "", self.score_name)  # fmt: skip
        notes = {name: f"{SPECTRAL_METRICS.get(name, name)}. {self.foretold[name]}." for name in names}
        return replace(panel, notes=notes, chosen_axis="xaxis", names=panels.AXES)

    def _rho(self) -> Panel:
        points = self.rho_points()
        choices = (
            {"": panels.option_lines(points, self.order)}
            if any(row[p] for row in points.values() for p in ("rl", "crl"))
            else {}
        )
        ticks = {"tickvals": sorted(points), "ticktext": [f"{rho:g}" for rho in sorted(points)]}
        layout = {"xaxis": ticks | ({"type": "log"} if points and min(points) > 0 else {})}
        names = ", ".join(points[rho]["label"] for rho in sorted(points))
        caption = f"SPHERE by its strength ρ: {names}, which are alike in all else; 95 % bootstrap intervals "
        caption += f"(none with one seed). {self.facts()}"
        return self._panel("rho", f"{self.score_name} against ρ", caption, choices,
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
