"""How figures look: a colour a method, fill and line style for the protocol, and matplotlib's settings."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#666666")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "///", "...", "xx", "\\\\", "++", "oo", "--")
RL = 0.35
"""How much of a method's colour the bars of RL have; those of CRL have all of it."""
NAME = 48
"""Characters in a line of a legend."""
STYLE: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "legend.frameon": False,
    "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "svg.hashsalt": "sphere-rl", "pdf.fonttype": 42,
}  # fmt: skip


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw with this module's style and leave the caller's as it is."""

    @wraps(draw)
    def with_style(*args: Any, **kwargs: Any) -> Figure:
        with drawing():
            return draw(*args, **kwargs)

    return with_style


@contextmanager
def drawing() -> Iterator[None]:
    """This module's style in here; characters that the font lacks, in names of the user's, are boxes and no warning."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def color(label: str, place: int, order: Sequence[str] = ()) -> str:
    """Colour of a method, by its `index`."""
    return COLORS[index(label, place, order) % len(COLORS)]


def index(label: str, place: int, order: Sequence[str] = ()) -> int:
    """A method's place in ``order``, or, where it is not named there, its place in the figure."""
    return order.index(label) if label in order else place


def symbol(place: int, symbols: Sequence[str]) -> str:
    """The symbol of the method at this place: another one where colours come again, so that no two look alike."""
    return symbols[(place + place // len(COLORS)) % len(symbols)]


def veil(count: int) -> float:
    """How much colour the bands of ``count`` curves have: less where many lie over each other."""
    return min(0.15, 0.6 / max(1, count))


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


def make_room(legend: Legend, beside: bool = True) -> None:
    """Let the figure grow until its layout can hold this legend: in its height, and ``beside`` axes in half its width.

    A figure that holds it keeps its size. In any other the layout would leave less than nothing to the axes, and fail.
    Long names go over several lines.
    """
    for text in legend.get_texts():
        text.set_text("\n".join(textwrap.wrap(text.get_text(), NAME, break_long_words=False)))
    figure: Any = legend.get_figure(root=True)
    box, (width, height) = legend.get_window_extent(), figure.get_size_inches()
    if beside:
        width += max(0.0, box.width / figure.dpi - width / 2)
    figure.set_size_inches(width, max(height, box.height / figure.dpi + 0.8))  # 0.8: what is above and below axes


def plain_names(figure: Figure) -> None:
    """Write text literally that is no formula though it has dollars: names of tasks and labels are the user's."""
    from matplotlib.mathtext import MathTextParser
    from matplotlib.text import Text

    parser: Any = MathTextParser("path")
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if text.get_text().count("$") > 1:
            try:
                for line in text.get_text().splitlines():  # as it is drawn: a line end has no glyph
                    parser.parse(line)
            except ValueError:
                text.set_parse_math(False)
