"""Tables for a terminal and for Markdown, from the same columns."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

GREEN, RED, BOLD, DIM = "32", "31", "1", "2"


def colours() -> bool:
    """Whether stdout is a terminal that wants colours (https://no-color.org)."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def paint(text: str, colour: str) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if colours() else text


def rule() -> str:
    encoding = (sys.stdout.encoding or "").lower()
    return "─" if encoding.startswith("utf") else "-"


def terminal(
    headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, indent: str = "  "
) -> str:
    """Aligned columns; the first ``left`` columns to the left, the others to the right. A cell may
    begin with "+" or "!" to be shown in green or red (the mark itself is not shown)."""
    widths = [max(len(_plain(row[i])) for row in (headers, *rows)) for i in range(len(headers))]
    lines = [indent + paint(_line(headers, widths, left), BOLD)]
    lines.append(indent + paint(rule() * (sum(widths) + 2 * (len(widths) - 1)), DIM))
    lines += [indent + _line(row, widths, left) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """
    >>> print(markdown(["case", "ratio"], [["dense", "+1.20"]]))
    | case | ratio |
    |---|--:|
    | dense | 1.20 |
    """
    lines = ["| " + " | ".join(headers) + " |"]
    lines.append("|" + "|".join("---" if i < left else "--:" for i in range(len(headers))) + "|")
    lines += ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _plain(cell: str) -> str:
    return cell[1:] if cell[:1] in "+!" and cell else cell


def _line(cells: Sequence[str], widths: Sequence[int], left: int) -> str:
    parts = []
    for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        text = _plain(cell)
        padded = text.ljust(width) if i < left else text.rjust(width)
        colour = {"+": GREEN, "!": RED}.get(cell[:1])
        parts.append(paint(padded, colour) if colour else padded)
    return "  ".join(parts)


def seconds(value: float) -> str:
    """
    >>> seconds(0.0123), seconds(4.5e-6), seconds(2.5)
    ('12.30 ms', '4.50 us', '2.50 s')
    """
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value / 1e-6:.2f} us"


def size(value: float) -> str:
    """
    >>> size(3 * 2**20)
    '3.0 MiB'
    """
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value / 2**10:.0f} KiB"
