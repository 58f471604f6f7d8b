"""Tables in plain text: what runs on a bare machine prints with these, since rich may be missing there."""

from __future__ import annotations

from collections.abc import Sequence

BETWEEN = "  "


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """A line per row under the headings; the first `num_left` columns are aligned to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = [headings, ["-" * width for width in widths], *rows]
    return "\n".join(_line(cells, widths, num_left) for cells in lines)


def _line(cells: Sequence[str], widths: Sequence[int], num_left: int) -> str:
    aligned = [
        cell.ljust(width) if number < num_left else cell.rjust(width)
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return BETWEEN.join(aligned).rstrip()
