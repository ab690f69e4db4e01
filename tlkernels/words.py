"""Figures as text, and tables."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{first:<{widths[0]}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        for first, *rest in rows
    )


def time(seconds: float) -> str:
    """Return a time with its unit."""
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def times(ratio: float | None) -> str:
    """Return a ratio; nothing for None."""
    return "" if ratio is None else f"{ratio:.2f}×"


def size(count: int | None) -> str:
    """Return a number of bytes with its unit; nothing for None."""
    if count is None:
        return ""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def count(rate: float | None) -> str:
    """Return a rate without its unit."""
    return "unknown" if rate is None else f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def percent(share: float) -> str:
    """Return a share."""
    return f"{share * 100:.2g} %" if share < 0.0995 else f"{share * 100:.0f} %"
