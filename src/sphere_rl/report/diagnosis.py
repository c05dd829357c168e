"""Figures of ``sphere diagnose``: the spectra of K and A by checkpoint, or their ranks by batch, each in one file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from sphere_rl.errors import RunFolderError
from sphere_rl.report import appearance, figures
from sphere_rl.spectrum import effective_rank
from sphere_rl.training.diagnosis import Diagnosis

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        appearance.make_room(axes.legend(fontsize=6, loc="lower left"), beside=False)
    return figure


def ranks(table: pl.DataFrame, caption: str) -> Figure:
    """r_e(A) against r_e(K), a point a batch, with the caption above."""
    figure = figures.proxy_scatter(table, caption, "checkpoint")
    figure.suptitle(caption, fontsize=7)
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
