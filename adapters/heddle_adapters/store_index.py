"""Which name means which versions: a small SQLite database, whose commit is what makes an upload count.

Names belong to owners: two owners' adapters of one name have nothing to do with each other, except that only one of
them can be public. A name's whole meaning is one immutable `AdapterRecord`; every change of it is `replace`, one
transaction from the record before to the record after. Rows of versions that were deleted stay, so that numbers only
grow and a digest in an old reply can be traced; their content does not.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from heddle_adapters.checkpoint import pool_bytes
from heddle_adapters.digest import digest_hex
from heddle_adapters.errors import AdapterError, StoreUnusable, quoted
from heddle_adapters.method import Combination
from heddle_adapters.names import LATEST, check_alias
from heddle_adapters.positions import Positions
from heddle_adapters.transaction import transaction

LOCAL_OWNER = "local"  # whose everything is while nobody has an API key, and what an operator registers

Visibility = Literal["private", "public"]  # to the owner alone, or usable by all and changed by the owner only
VISIBILITIES: tuple[Visibility, ...] = get_args(Visibility)

Sites = tuple[tuple[str, int], ...]  # `Checkpoint.sites_by_pattern`

MAX_TAGS = 32
MAX_TAG_CHARS = 64
MAX_DESCRIPTION_CHARS = 2000
MAX_TTL_SECONDS = 100 * 366 * 24 * 3600

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
    (
        # Until now only a name's current version kept its content, so the same column says which versions exist.
        "DROP INDEX current_versions",
        "ALTER TABLE versions RENAME COLUMN is_current TO is_stored",
        "CREATE INDEX stored_versions ON versions (owner, name, version) WHERE is_stored",
        # Nobody counted the values of the versions that are there; 0 says so until the same content is put again.
        "ALTER TABLE versions ADD COLUMN num_row_values INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE versions ADD COLUMN num_vector_values INTEGER NOT NULL DEFAULT 0",
        # What could be stored until now either had rows, which add, or had none and scaled channels.
        "ALTER TABLE versions ADD COLUMN combination TEXT NOT NULL DEFAULT 'alone'",
        "UPDATE versions SET combination = CASE max_rank WHEN 0 THEN 'product' ELSE 'sum' END",
        """
        CREATE TABLE names (
            owner TEXT NOT NULL,
            name TEXT NOT NULL,
            description TEXT NOT NULL,
            tags TEXT NOT NULL,
            is_pinned INTEGER NOT NULL,
            expires_unix_seconds INTEGER,
            PRIMARY KEY (owner, name)
        )
        """,
        "INSERT INTO names SELECT owner, name, '', '[]', 0, NULL FROM versions WHERE is_stored",
        """
        CREATE TABLE aliases (
            owner TEXT NOT NULL,
            name TEXT NOT NULL,
            alias TEXT NOT NULL,
            version INTEGER NOT NULL,
            PRIMARY KEY (owner, name, alias)
        )
        """,
        "CREATE TABLE quarantined (digest TEXT NOT NULL PRIMARY KEY, reason TEXT NOT NULL)",
    ),
    (
        "ALTER TABLE names ADD COLUMN visibility TEXT NOT NULL DEFAULT 'private'",
        "CREATE UNIQUE INDEX public_names ON names (name) WHERE visibility = 'public'",
    ),
    (
        # No method whose adapters bring tokens, or change certain tokens only, could be stored until now.
        "ALTER TABLE versions ADD COLUMN num_virtual_tokens INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE versions ADD COLUMN num_prefix_tokens INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE versions ADD COLUMN positions TEXT NOT NULL DEFAULT '{}'",
        # Nobody noted the sites of the versions that are there; none says so until the same content is put again.
        "ALTER TABLE versions ADD COLUMN sites_by_pattern TEXT NOT NULL DEFAULT '[]'",
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
    num_row_values: int  # numbers in its rows; with num_vector_values 0 if a heddle stored it that did not count
    num_vector_values: int  # numbers in its float32 vectors
    combination: Combination
    num_virtual_tokens: int = 0  # that it puts before every prompt
    num_prefix_tokens: int = 0  # of those, the ones whose keys and values it brings
    positions: Positions = field(default_factory=Positions)  # which tokens of a sequence it changes
    sites_by_pattern: Sites = ()  # none if a heddle stored it that did not note them

    @property
    def reference(self) -> str:
        """What means this version for ever: "sql@3"."""
        return f"{self.name}@{self.version}"

    @property
    def full_name(self) -> str:
        """What tells it from another owner's of the same name: "sql" where it is local, else "team:sql"."""
        return self.name if self.owner == LOCAL_OWNER else f"{self.owner}:{self.name}"

    @property
    def full_reference(self) -> str:
        """`reference` with `full_name`."""
        return f"{self.full_name}@{self.version}"

    def estimate_bytes(self, row_dtype_bytes: int) -> int:
        """Pool bytes of its rows and vectors, without alignment and tables; 0 where they were not counted."""
        return pool_bytes(self.num_row_values, self.num_vector_values, row_dtype_bytes)


@dataclass(frozen=True)
class AdapterDetails:
    """What may be said about a name beside the files; None leaves it as it is."""

    alias: str | None = None  # moved to the new version together with the upload
    tags: tuple[str, ...] | None = None
    description: str | None = None
    is_pinned: bool | None = None
    ttl_seconds: int | None = None  # from now; 0 = for ever
    visibility: Visibility | None = None

    def __post_init__(self) -> None:
        """Raises `InvalidAdapterName` for the alias and `AdapterError` for what else is out of bounds."""
        if self.alias is not None:
            check_alias(self.alias)
        if self.tags is not None:
            _check_tags(self.tags)
        if self.description is not None and not _is_text(self.description, MAX_DESCRIPTION_CHARS):
            message = f"The description must be Unicode text of at most {MAX_DESCRIPTION_CHARS} characters."
            raise AdapterError(message, param="description")
        if self.ttl_seconds is not None and not 0 <= self.ttl_seconds <= MAX_TTL_SECONDS:
            message = f"The time to live is {self.ttl_seconds} seconds; 0 (for ever) to {MAX_TTL_SECONDS} are allowed."
            raise AdapterError(message, param="ttl_seconds")
        if self.visibility is not None and self.visibility not in VISIBILITIES:
            message = f"The visibility is {quoted(self.visibility)}; it must be private or public."
            raise AdapterError(message, param="visibility")


@dataclass(frozen=True)
class AdapterRecord:
    """What a name means now."""

    versions: tuple[AdapterVersion, ...]  # those that exist, oldest first; at least one
    description: str = ""
    tags: tuple[str, ...] = ()
    is_pinned: bool = False
    expires_unix_seconds: int | None = None  # None = never
    aliases: Mapping[str, int] = field(default_factory=dict)  # to the number of an existing version
    visibility: Visibility = "private"

    @property
    def latest(self) -> AdapterVersion:
        return self.versions[-1]

    @property
    def name(self) -> str:
        return self.latest.name

    @property
    def owner(self) -> str:
        return self.latest.owner

    @property
    def is_public(self) -> bool:
        return self.visibility == "public"

    @property
    def num_versions(self) -> int:
        return len(self.versions)

    @property
    def size_bytes(self) -> int:
        """Of the weights files of all versions."""
        return sum(version.size_bytes for version in self.versions)

    @property
    def created_unix_seconds(self) -> int:
        """When the first version that still exists was uploaded."""
        return self.versions[0].created_unix_seconds

    @cached_property
    def meanings(self) -> Mapping[str | None, AdapterVersion]:
        """The version that each selector means; a digest means the newest version that has it."""
        numbers = {version.version: version for version in self.versions}
        return {
            None: self.latest,
            LATEST: self.latest,
            **{str(number): version for number, version in numbers.items()},
            **{version.digest: version for version in self.versions},
            **{alias: numbers[number] for alias, number in self.aliases.items()},
        }

    def aliases_of(self, version: AdapterVersion) -> tuple[str, ...]:
        return tuple(alias for alias, number in self.aliases.items() if number == version.version)

    def is_expired(self, now_unix_seconds: int) -> bool:
        return self.expires_unix_seconds is not None and self.expires_unix_seconds <= now_unix_seconds

    def with_version(self, version: AdapterVersion) -> AdapterRecord:
        """With a newer version."""
        return replace(self, versions=(*self.versions, version))

    def without_version(self, version: AdapterVersion) -> AdapterRecord | None:
        """Without a version that has no alias; None if it was the only one."""
        versions = tuple(kept for kept in self.versions if kept != version)
        return replace(self, versions=versions) if versions else None

    def with_newest(self, num_versions: int | None) -> AdapterRecord:
        """With that many newest versions and the aliased ones only; None keeps all."""
        if num_versions is None:
            return self
        kept = {*self.versions[-num_versions:], *(self.meanings[alias] for alias in self.aliases)}
        return replace(self, versions=tuple(version for version in self.versions if version in kept))

    def with_alias(self, alias: str, version: AdapterVersion) -> AdapterRecord:
        return replace(self, aliases={**self.aliases, alias: version.version})

    def without_alias(self, alias: str) -> AdapterRecord:
        return replace(self, aliases={key: number for key, number in self.aliases.items() if key != alias})

    def with_details(self, details: AdapterDetails, now_unix_seconds: int) -> AdapterRecord:
        """With everything that `details` says; its alias means the latest version."""
        record = self
        if details.alias is not None:
            record = record.with_alias(details.alias, record.latest)
        if details.tags is not None:
            record = replace(record, tags=tuple(dict.fromkeys(details.tags)))
        if details.description is not None:
            record = replace(record, description=details.description)
        if details.is_pinned is not None:
            record = replace(record, is_pinned=details.is_pinned)
        if details.ttl_seconds is not None:
            expires = now_unix_seconds + details.ttl_seconds if details.ttl_seconds else None
            record = replace(record, expires_unix_seconds=expires)
        if details.visibility is not None:
            record = replace(record, visibility=details.visibility)
        return record


COLUMNS = ", ".join(AdapterVersion.__dataclass_fields__)
PLACES = ", ".join("?" for _ in AdapterVersion.__dataclass_fields__)


class StoreIndex:
    """The tables above. Not thread-safe: the caller lets in one thread at a time."""

    def __init__(self, path: Path, *, must_exist: bool) -> None:
        """Opens the database, or creates it unless `must_exist`; raises `StoreUnusable`."""
        with _reading(), ExitStack() as opened:
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            opened.callback(self._connection.close)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._migrate(must_exist)
            opened.pop_all()

    def close(self) -> None:
        self._connection.close()

    def records(self) -> tuple[AdapterRecord, ...]:
        """What each name of each owner means; raises `StoreUnusable` where the database is damaged."""
        with _reading():
            return _read_records(self._connection)

    def quarantined(self) -> dict[str, str]:
        """Digests of content that was found damaged, with the reason; raises `StoreUnusable` as `records` does."""
        with _reading():
            return dict(self._connection.execute("SELECT digest, reason FROM quarantined"))

    def next_version(self, owner: str, name: str) -> int:
        """The number after all that the owner's name ever had."""
        query = "SELECT coalesce(max(version), 0) + 1 FROM versions WHERE owner = ? AND name = ?"
        (number,) = self._connection.execute(query, (owner, name)).fetchone()
        return int(number)

    def replace(
        self,
        before: AdapterRecord | None,
        after: AdapterRecord | None,
        sound: str | None = None,
        *,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """Makes one name mean `after` in place of `before`; all of it is durable on return, or nothing changed.

        Lifts the quarantine of the digest `sound`, and of digests that no version has any more. Nothing is changed
        either where `before_commit`, called when all is written, raises.
        """
        old, new = (set(record.versions if record else ()) for record in (before, after))
        with transaction(self._connection) as execute:
            for version in old - new:
                execute(
                    "UPDATE versions SET is_stored = 0 WHERE owner = ? AND name = ? AND version = ?",
                    (version.owner, version.name, version.version),
                )
            for version in new - old:
                execute(f"INSERT OR REPLACE INTO versions ({COLUMNS}, is_stored) VALUES ({PLACES}, 1)", _row(version))
            if before is not None:
                execute("DELETE FROM aliases WHERE owner = ? AND name = ?", (before.owner, before.name))
                execute("DELETE FROM names WHERE owner = ? AND name = ?", (before.owner, before.name))
            if after is not None:
                key = (after.owner, after.name)
                tags = json.dumps(after.tags)
                details = (after.description, tags, after.is_pinned, after.expires_unix_seconds, after.visibility)
                execute("INSERT INTO names VALUES (?, ?, ?, ?, ?, ?, ?)", (*key, *details))
                for alias, number in after.aliases.items():
                    execute("INSERT INTO aliases VALUES (?, ?, ?, ?)", (*key, alias, number))
            execute(
                "DELETE FROM quarantined WHERE digest = ? OR NOT EXISTS "
                "(SELECT 1 FROM versions WHERE versions.digest = quarantined.digest AND is_stored)",
                (sound,),
            )
            before_commit()

    def quarantine(self, digest: str, reason: str) -> None:
        """Remembers that content is damaged; durable on return."""
        with transaction(self._connection) as execute:
            execute("INSERT OR REPLACE INTO quarantined VALUES (?, ?)", (digest, reason))

    def _migrate(self, must_exist: bool) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise StoreUnusable(f"The store's index has version {version}, and this heddle knows {len(MIGRATIONS)}.")
        if version == 0 and must_exist:
            raise StoreUnusable(
                "The store holds adapters, but its index.sqlite3 is missing or empty, so their names are unknown. "
                "Bring the index back from a copy, or move the store's folder away and upload again."
            )
        (verdict,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
            with transaction(self._connection) as execute:
                for statement in statements:
                    execute(statement)
                execute(f"PRAGMA user_version = {number}")


def read_records(path: Path) -> tuple[AdapterRecord, ...]:
    """What each name means in an index that another process may have open: it is neither changed nor locked.

    Raises `StoreUnusable`.
    """
    with _reading(), closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        connection.execute("BEGIN")  # all of one moment
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version != len(MIGRATIONS):
            raise StoreUnusable(
                f"The store's index has version {version}, and this heddle reads {len(MIGRATIONS)}; "
                "start its server over the store once, which brings an older one up to date."
            )
        return _read_records(connection)


def _read_records(connection: sqlite3.Connection) -> tuple[AdapterRecord, ...]:
    versions: dict[tuple[str, str], list[AdapterVersion]] = {}  # by owner and name, as all of these
    for row in connection.execute(f"SELECT {COLUMNS} FROM versions WHERE is_stored ORDER BY name, version"):
        version = _version(row)
        digest_hex(version.digest)  # it becomes a path
        versions.setdefault((version.owner, version.name), []).append(version)
    aliases: dict[tuple[str, str], dict[str, int]] = {key: {} for key in versions}
    for owner, name, alias, number in connection.execute("SELECT owner, name, alias, version FROM aliases"):
        aliases[owner, name][alias] = number
    records: dict[tuple[str, str], AdapterRecord] = {}
    for owner, name, description, tags, is_pinned, expires, visibility in connection.execute(
        "SELECT owner, name, description, tags, is_pinned, expires_unix_seconds, visibility FROM names"
    ):
        key = (owner, name)
        if not {version.version for version in versions[key]}.issuperset(aliases[key].values()):
            raise LookupError(f"an alias of {quoted(name)} means no version")
        if visibility not in VISIBILITIES:
            raise LookupError(f"{quoted(name)} has the visibility {quoted(visibility)}")
        records[key] = AdapterRecord(
            tuple(versions[key]),
            description,
            tuple(json.loads(tags)),
            bool(is_pinned),
            expires,
            aliases[key],
            visibility,
        )
    if records.keys() != versions.keys():
        raise LookupError("a version has no name")
    return tuple(records.values())


def _row(version: AdapterVersion) -> tuple[Any, ...]:
    """Its columns in the order of `COLUMNS`."""
    *plain, positions, sites = (getattr(version, column) for column in AdapterVersion.__dataclass_fields__)
    return (*plain, _json(positions), _json(sites))


def _version(row: tuple[Any, ...]) -> AdapterVersion:
    columns = dict(zip(AdapterVersion.__dataclass_fields__, row, strict=True))
    columns["positions"] = _parsed(columns["positions"], Positions)
    columns["sites_by_pattern"] = _parsed(columns["sites_by_pattern"], Sites)
    return AdapterVersion(**columns)


def _json(content: object) -> str:
    return msgspec.json.encode(content).decode()


@lru_cache(maxsize=1024)  # thousands of adapters share a few, in memory too
def _parsed(text: str, kind: Any) -> Any:
    return msgspec.json.decode(text, type=kind)


@contextmanager
def _reading() -> Iterator[None]:
    """Tells what SQLite says about a damaged file, and what makes no sense once read, in the operator's terms."""
    try:
        yield
    except (sqlite3.Error, ValueError, TypeError, LookupError) as error:
        raise StoreUnusable(
            f"The store's index.sqlite3 cannot be read ({error!r}). Bring it back from a copy, or move the store's "
            "folder away and upload again."
        ) from error


def _check_tags(tags: tuple[str, ...]) -> None:
    if len(tags) > MAX_TAGS:
        raise AdapterError(f"There are {len(tags)} tags; at most {MAX_TAGS} are allowed.", param="tags")
    for tag in tags:
        if not 0 < len(tag) <= MAX_TAG_CHARS or not tag.isprintable() or "," in tag:
            message = f"The tag {quoted(tag)} must have 1 to {MAX_TAG_CHARS} printable characters and no comma."
            raise AdapterError(message, param="tags")


def _is_text(text: str, max_chars: int) -> bool:
    """Whether the text is short enough, and such that UTF-8 and SQLite can hold it."""
    return len(text) <= max_chars and not re.search("[\0\ud800-\udfff]", text)
