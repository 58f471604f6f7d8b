"""One transaction of SQLite: all of it or nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[Callable[..., sqlite3.Cursor]]:
    """Gives the connection's `execute`; what it did is durable at the end, or undone where that raises.

    The connection must not begin transactions by itself (`isolation_level=None`).
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection.execute
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite has already rolled back some failures itself
            connection.execute("ROLLBACK")
        raise
