"""Which name means which version: a small SQLite database, whose commit is what makes an upload count."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from heddle_adapters.errors import StoreUnusable

LOCAL_OWNER = "local"  # the only owner until there are tenants

# The n-th entry brings a database from version n to n + 1. Entries are never edited once released.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE versions (
            owner TEXT NOT NULL,
            name TEXT NOT NULL,
            version INTEGER NOT NULL,
            digest TEXT NOT NULL,
            method TEXT NOT NULL,
            max_rank INTEGER NOT NULL,
            num_rows INTEGER NOT NULL,
            size_bytes INTEGER NOT NULL,
            created_unix_seconds INTEGER NOT NULL,
            is_current INTEGER NOT NULL,
            PRIMARY KEY (owner, name, version)
        )
        """,
        "CREATE UNIQUE INDEX current_versions ON versions (owner, name) WHERE is_current",
    ),
)


@dataclass(frozen=True)
class AdapterVersion:
    """One upload under a name. Numbers of a name only grow, through replacement and deletion alike."""

    owner: str
    name: str
    version: int  # from 1
    digest: str
    method: str
    max_rank: int
    num_rows: int
    size_bytes: int  # of the weights file
    created_unix_seconds: int


COLUMNS = ", ".join(AdapterVersion.__dataclass_fields__)
PLACES = ", ".join("?" for _ in AdapterVersion.__dataclass_fields__)


class StoreIndex:
    """The table of versions. Not thread-safe: the caller lets in one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the database; raises `StoreUnusable` for one that a newer heddle wrote."""
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            self._connection.close()
            raise StoreUnusable(f"The store's index has version {version}, and this heddle knows {len(MIGRATIONS)}.")
        for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
            with self._transaction():
                for statement in statements:
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version = {number}")

    def close(self) -> None:
        self._connection.close()

    def current(self) -> tuple[AdapterVersion, ...]:
        """The versions that names mean now, by name."""
        return self._select("is_current ORDER BY name")

    def versions(self, name: str) -> tuple[AdapterVersion, ...]:
        """Every version that a name ever had, oldest first."""
        return self._select("owner = ? AND name = ? ORDER BY version", LOCAL_OWNER, name)

    def next_version(self, name: str) -> int:
        query = "SELECT coalesce(max(version), 0) + 1 FROM versions WHERE owner = ? AND name = ?"
        (number,) = self._connection.execute(query, (LOCAL_OWNER, name)).fetchone()
        return int(number)

    def set_current(self, version: AdapterVersion) -> None:
        """Makes a new version the one that its name means; durable on return."""
        with self._transaction():
            self._retire(version.name)
            row = tuple(getattr(version, column) for column in AdapterVersion.__dataclass_fields__)
            self._connection.execute(f"INSERT INTO versions ({COLUMNS}, is_current) VALUES ({PLACES}, 1)", row)

    def remove_current(self, name: str) -> None:
        """Makes a name mean nothing; durable on return."""
        with self._transaction():
            self._retire(name)

    def _retire(self, name: str) -> None:
        update = "UPDATE versions SET is_current = 0 WHERE owner = ? AND name = ? AND is_current"
        self._connection.execute(update, (LOCAL_OWNER, name))

    def _select(self, condition: str, *values: str) -> tuple[AdapterVersion, ...]:
        rows = self._connection.execute(f"SELECT {COLUMNS} FROM versions WHERE {condition}", values)
        return tuple(AdapterVersion(*row) for row in rows)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # SQLite has already rolled back some failures itself
                self._connection.execute("ROLLBACK")
            raise
