"""Numbers as people write them."""

from __future__ import annotations

MINUS, SPACE = "−", "\N{NO-BREAK SPACE}"


def number(value: float | int) -> str:
    """Three figures, or all those before the point, in groups: −1 250, 12.3, 0.0331, 2e−5."""
    if isinstance(value, int) or abs(value) >= 999.5:
        text = f"{round(value):,}".replace(",", SPACE)
    else:
        digits, e, exponent = f"{value:z.3g}".partition("e")
        text = f"{digits}e{int(exponent)}" if e else digits
    return text.replace("-", MINUS)


def with_interval(value: float | None, low: float | None, high: float | None, missing: str = "–") -> str:
    """Two places, and the interval's ends if there are any: 0.31 [−0.21, 0.39]; ``missing`` for no value."""
    if value is None:
        return missing
    text = f"{value:z.2f}" + ("" if low is None else f" [{low:z.2f}, {high:z.2f}]")
    return text.replace("-", MINUS)
