"""How figures look: a colour a method, fill and line style for the protocol, and matplotlib's settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#666666")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "///", "...", "xx", "\\\\", "++", "oo", "--")
RL = 0.35
"""How much of a method's colour the bars of RL have; those of CRL have all of it."""
STYLE: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "legend.frameon": False,
    "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "svg.hashsalt": "sphere-rl", "pdf.fonttype": 42,
}  # fmt: skip


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw with this module's style and leave the caller's as it is."""

    @wraps(draw)
    def with_style(*args: Any, **kwargs: Any) -> Figure:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return with_style


def color(label: str, place: int, order: Sequence[str] = ()) -> str:
    """Colour of a method, by its `index`."""
    return COLORS[index(label, place, order) % len(COLORS)]


def index(label: str, place: int, order: Sequence[str] = ()) -> int:
    """A method's place in ``order``, or, where it is not named there, its place in the figure."""
    return order.index(label) if label in order else place


def shade(step: int, count: int) -> float:
    """How much of a colour the ``step``-th of ``count`` has: all of it, down to less than half."""
    return 1 - 0.55 * step / max(1, count - 1)


def lighter(own: str, share: float) -> str:
    """``share`` of a colour, the rest white."""
    from matplotlib.colors import to_hex, to_rgb

    red, green, blue = (share * part + 1 - share for part in to_rgb(own))
    return to_hex((red, green, blue))


def fill(own: str, protocol: str) -> dict[str, Any]:
    """A bar of a method's colour: RL light and hatched, CRL full."""
    if protocol == "rl":
        return {"facecolor": lighter(own, RL), "edgecolor": own, "hatch": HATCHES[1]}
    return {"facecolor": own, "edgecolor": own, "hatch": HATCHES[0]}
