"""Tables, times and counts as commands print them. rich is imported when something is printed: --help is quick."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPED_COLUMNS = 200  # of a table that no terminal limits


def simple_table(*columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(*columns, box=SIMPLE_HEAD)


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    terminal = Console(stderr=stderr, markup=False, highlight=False)
    if not terminal.is_terminal:
        terminal.width = PIPED_COLUMNS
    return terminal


def plain(text: object) -> str:
    """What a server says, so that it cannot steer the terminal."""
    from heddle_server.server_address import printable

    return printable(text)


def time_text(unix_seconds: int | None) -> str:
    """Local time, to the minute; nothing for never."""
    if unix_seconds is None:
        return ""
    return datetime.fromtimestamp(unix_seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def counted(number: int, what: str) -> str:
    """1 page, 2,000 pages."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
