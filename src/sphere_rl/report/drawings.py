"""A suite's figures for papers, in files beside the page."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphere_rl.report import figures
from sphere_rl.report.content import DIRECTIONS, SuiteContent
from sphere_rl.runs import file_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def drawings(suite: SuiteContent) -> dict[str, Figure]:
    """Figures by file name, without the suite's name; without data a figure has the group id `figures.MISSING`."""
    captions = {panel.figure: panel.caption for panel in suite.panels}
    measured = suite.curves(suite.crl_probe, "r_e_K")
    learned = suite.curves(suite.learned("crl"), suite.score)
    score, order = suite.score_name, suite.order
    bars: dict[str, Any] = {"ylabel": score, "order": order}
    ablation = "Ablation. " + suite.facts()
    return {
        "geometry": figures.geometry(suite.snapshots, suite.geometry_caption(), order),
        "architectures": figures.success_bars(suite.architectures, "actor", captions["architectures"], **bars),
        "rank": figures.line_plot(measured, suite.starts, captions["rank"], "$r_e(K)$", order=order),
        "success": figures.success_bars(suite.rows, "label", captions["success"], **bars),
        "features": figures.tsne(suite.embeddings, captions["features"], DIRECTIONS, order),
        "proxy": figures.proxy_scatter(suite.measured, captions["proxy"], "label", order),
        "learning": figures.line_plot(learned, suite.starts, captions["learning"], score, order=order),
        "spectrum": figures.spectrum_decay(suite.snapshots, captions["spectrum"], order=order),
        "routing": figures.routing(suite.loads, captions["routing"], suite.starts),
        "profile": figures.line_plot(suite.profiles["crl"], {}, captions["profile"], "share of (seed, task)",
                                     order=order, xlabel=f"{score} above"),
        "foresight": figures.entry_scatter(suite.entries, captions["foresight"], score, order),
        "ablation": figures.table_figure(("variant", "RL", "CRL"), suite.ablation(), ablation),
        "rho": figures.option_sweep(suite.rho_points(), "ρ", captions["rho"], **bars),
    }  # fmt: skip


def write(suites: Sequence[SuiteContent], out: Path) -> None:
    """Write the figures that have data, and take away files of an earlier page for which there are none now."""
    for suite in suites:
        for name, figure in drawings(suite).items():
            stem = out / f"{file_name(suite.name)}-{name}"
            if figure.get_gid() == figures.MISSING:
                for path in written(stem):
                    path.unlink()
            else:
                figures.save(figure, stem)


def take_away_others(page: Path, suites: Sequence[SuiteContent], names: Collection[str], out: Path) -> None:
    """Take away the figures of parts that an earlier ``page`` had and this one has not.

    Only files that the earlier page itself links to, by these ``names`` of figures: whatever else lies in the folder
    is not the report's.
    """
    earlier = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
    if not PAGE.search(earlier):
        return
    present = {file_name(suite.name) for suite in suites}
    for stem in dict.fromkeys(LINK.findall(earlier)):
        part, _, name = stem.rpartition("-")
        if name in names and part not in present:
            for path in written(out / stem):
                path.unlink()


PAGE = re.compile("<title>SPHERE · .* report</title>")
LINK = re.compile(r'<a href="figures/([\w.,=+-]+)\.(?:png|svg|pdf)" download>')
"""What the page has in its head, and how it links to a figure."""


def written(stem: Path) -> list[Path]:
    """The files of a figure that are there."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in figures.FORMATS]
    return [path for path in paths if path.is_file()]
