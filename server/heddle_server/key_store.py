"""API keys, and what their tenants may use: a small SQLite database beside the adapters.

    <store>/keys.sqlite3    readable by its owner only; a file of its own, as a running server locks the index

A key is `hdl_<id>_<secret>`. It is shown once, when it is made; what is kept of its secret is a SHA-256. The command
line changes keys while a server runs over the same store, and the server's next request sees it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, Self, get_args

from heddle_adapters.errors import StoreUnusable, quoted
from heddle_adapters.store_folder import make_private_file, make_store_folder
from heddle_adapters.transaction import transaction
from heddle_server.audit_log import AuditEntry, AuditLog

Scope = Literal["infer", "adapters:read", "adapters:write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
ADMIN: Scope = "admin"  # includes all others

KEYS_FILE = "keys.sqlite3"
MAX_LABEL_CHARS = 200
_KEY = re.compile(r"hdl_(?P<id>[0-9a-f]{12})_(?P<secret>[0-9a-f]{64})")
_ID_BYTES, _SECRET_BYTES = 6, 32
TENANT = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

# The n-th entry brings a database from version n to n + 1. Entries are never edited once released.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE keys (
            key_id TEXT NOT NULL PRIMARY KEY,
            secret_sha256 BLOB NOT NULL,
            tenant TEXT NOT NULL,
            scopes TEXT NOT NULL,
            label TEXT NOT NULL,
            created_unix_seconds INTEGER NOT NULL,
            expires_unix_seconds INTEGER,
            revoked_unix_seconds INTEGER
        )
        """,
        """
        CREATE TABLE limits (
            tenant TEXT NOT NULL PRIMARY KEY,
            adapters INTEGER,
            stored_bytes INTEGER,
            pinned_bytes INTEGER,
            requests_per_second REAL,
            queued_tokens INTEGER
        )
        """,
    ),
)


class KeyRefused(Exception):
    """The text is no key, or one that does not count any more; the message is for whoever sent it."""


class NoSuchKey(Exception):
    """The operator named a key that does not exist."""


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key; never its secret."""

    key_id: str
    tenant: str
    scopes: frozenset[Scope]
    label: str
    created_unix_seconds: int
    expires_unix_seconds: int | None = None  # None = never
    revoked_unix_seconds: int | None = None

    def status(self, now_unix_seconds: float) -> Literal["active", "revoked", "expired"]:
        if self.revoked_unix_seconds is not None:
            return "revoked"
        is_expired = self.expires_unix_seconds is not None and self.expires_unix_seconds <= now_unix_seconds
        return "expired" if is_expired else "active"


@dataclass(frozen=True)
class TenantLimits:
    """What one tenant may use at most; None = what there is."""

    adapters: int | None = None  # names
    stored_bytes: int | None = None  # of all versions' weights files
    pinned_bytes: int | None = None  # of the page pool, by adapters that stay on the device
    requests_per_second: float | None = None  # for answers, over any second or so
    queued_tokens: int | None = None  # of prompts that wait for their first token


NO_LIMITS = TenantLimits()


class KeyStore:
    """The database, for the command line and for a running server. Any thread may use it.

    Every method raises `StoreUnusable` where the database cannot be read or written.
    """

    def __init__(
        self, store_path: Path, audit: AuditLog, clock: Callable[[], float] = time.time, *, must_exist: bool = False
    ) -> None:
        """Opens or makes the database, and unless it `must_exist` the store's folder.

        `audit` hears of every change before it counts.
        """
        self._audit = audit
        self._clock = clock
        self._lock = threading.Lock()  # guards the connection; what was read with it is only ever replaced as a whole
        self._data_version: int | None = None  # of what was read; None = read again
        self._keys: dict[str, tuple[ApiKey, bytes]] = {}  # with the SHA-256 of each secret
        self._limits: dict[str, TenantLimits] = {}
        self._no_hash = secrets.token_bytes(hashlib.sha256().digest_size)  # what no secret has
        if must_exist and not store_path.is_dir():
            raise StoreUnusable(f"There is no store at {store_path}: name the server's with --store.")
        make_store_folder(store_path)
        with _usable(), ExitStack() as opened:
            path = store_path / KEYS_FILE
            with suppress(FileExistsError):  # never opened twice: closing it would drop SQLite's locks on it
                os.close(make_private_file(path, os.O_RDWR))  # SQLite's own files beside it follow it
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            opened.callback(self._connection.close)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._migrate()
            opened.pop_all()

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What a server asks for every request

    @property
    def has_keys(self) -> bool:
        """Whether a key was ever made: from then on nobody is let in without one, even when all are revoked."""
        self._refresh()
        return bool(self._keys)

    def check(self, text: str) -> ApiKey:
        """The key that `text` is; raises `KeyRefused`."""
        match = _KEY.fullmatch(text)
        key_id, secret = (match["id"], match["secret"]) if match else ("", "")
        self._refresh()
        key, expected = self._keys.get(key_id, (None, self._no_hash))
        # A password needs a slow hash because it can be guessed. 256 random bits cannot, however fast the hash is.
        is_right = hmac.compare_digest(_hash(secret), expected)  # the same work for an id that nobody has
        if key is None or not is_right:
            raise KeyRefused("The API key is not known here.")
        if (status := key.status(self._clock())) != "active":
            raise KeyRefused(f"The API key {key.key_id} is {status}. Ask the server's operator for another one.")
        return key

    def limits_of(self, tenant: str) -> TenantLimits:
        """What a tenant may use."""
        self._refresh()
        return self._limits.get(tenant, NO_LIMITS)

    # What an operator does

    def all(self) -> tuple[ApiKey, ...]:
        """Every key that was ever made, oldest first."""
        self._refresh()
        return tuple(key for key, _ in self._keys.values())

    def create(
        self, tenant: str, scopes: Collection[Scope], label: str = "", expires_unix_seconds: int | None = None
    ) -> tuple[ApiKey, str]:
        """A new key, and the text that it is, which nobody can ask for again."""
        secret = secrets.token_hex(_SECRET_BYTES)
        key = ApiKey(
            key_id=secrets.token_hex(_ID_BYTES),
            tenant=tenant,
            scopes=frozenset(scopes),
            label=label,
            created_unix_seconds=int(self._clock()),
            expires_unix_seconds=expires_unix_seconds,
        )
        detail = f"scopes {', '.join(sorted(key.scopes))}"
        with self._changing(_key_entry("key.create", key, detail)) as execute:
            execute(
                "INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, NULL)",
                (
                    key.key_id,
                    _hash(secret),
                    tenant,
                    json.dumps(sorted(key.scopes)),
                    label,
                    key.created_unix_seconds,
                    expires_unix_seconds,
                ),
            )
        return key, f"hdl_{key.key_id}_{secret}"

    def revoke(self, key_id: str) -> ApiKey:
        """Makes a key worthless, for ever; what it was. Raises `NoSuchKey`."""
        key = next((key for key in self.all() if key.key_id == key_id), None)
        if key is None:
            raise NoSuchKey(f"There is no key {quoted(key_id)}; `heddle keys ls` shows those that there are.")
        with self._changing(_key_entry("key.revoke", key)) as execute:
            execute(
                "UPDATE keys SET revoked_unix_seconds = coalesce(revoked_unix_seconds, ?) WHERE key_id = ?",
                (int(self._clock()), key_id),
            )
        return key

    def change_limits(self, tenant: str, changes: Mapping[str, int | float | None]) -> TenantLimits:
        """Sets these limits, by their names in `TenantLimits`, and leaves the others; all of them from now on."""
        with self._lock, _usable(), transaction(self._connection) as execute:
            row = execute("SELECT * FROM limits WHERE tenant = ?", (tenant,)).fetchone()
            limits = replace(TenantLimits(*row[1:]) if row else NO_LIMITS, **changes)  # type: ignore[arg-type]
            values = asdict(limits)
            execute("INSERT OR REPLACE INTO limits VALUES (?, ?, ?, ?, ?, ?)", (tenant, *values.values()))
            said = ", ".join(f"{name}={value}" for name, value in values.items())
            self._audit.append([AuditEntry("limits.change", owner=tenant, detail=said)])
            self._data_version = None
        return limits

    def _refresh(self) -> None:
        """What was read is what the database says now, whoever has changed it."""
        with self._lock:
            try:
                # Microseconds: SQLite looks at shared memory. It does not count this connection's own changes.
                (data_version,) = self._connection.execute("PRAGMA data_version").fetchone()
                if data_version != self._data_version:
                    self._read()
                    self._data_version = data_version
            except (sqlite3.Error, ValueError, TypeError) as error:
                raise _unusable(error) from error

    @contextmanager
    def _changing(self, entry: AuditEntry) -> Iterator[Callable[..., sqlite3.Cursor]]:
        with self._lock, _usable(), transaction(self._connection) as execute:
            yield execute
            self._audit.append([entry])
            self._data_version = None

    def _read(self) -> None:
        columns = ", ".join(field.name for field in fields(ApiKey))
        rows = self._connection.execute(f"SELECT secret_sha256, {columns} FROM keys ORDER BY rowid").fetchall()
        limits = self._connection.execute("SELECT * FROM limits").fetchall()
        keys = {}
        for secret_hash, key_id, tenant, scopes, *rest in rows:
            keys[key_id] = (ApiKey(key_id, tenant, frozenset(json.loads(scopes)), *rest), secret_hash)
        self._keys = keys
        self._limits = {tenant: TenantLimits(*values) for tenant, *values in limits}

    def _migrate(self) -> None:
        with transaction(self._connection) as execute:  # another process may be about to do the same
            (version,) = execute("PRAGMA user_version").fetchone()
            if version > len(MIGRATIONS):
                raise StoreUnusable(
                    f"The store's {KEYS_FILE} has version {version}, and this heddle knows {len(MIGRATIONS)}."
                )
            for statement in (statement for statements in MIGRATIONS[version:] for statement in statements):
                execute(statement)
            execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def is_tenant(text: str) -> bool:
    """Whether a tenant may be called so: 1 to 64 small letters, digits, '.', '_' and '-', first a letter or digit."""
    return TENANT.fullmatch(text) is not None


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _key_entry(action: str, key: ApiKey, detail: str | None = None) -> AuditEntry:
    return AuditEntry(action, owner=key.tenant, name=key.key_id, detail=detail)


@contextmanager
def _usable() -> Iterator[None]:
    """Tells what the disk and SQLite refuse as `StoreUnusable`."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise _unusable(error) from error


def _unusable(error: Exception) -> StoreUnusable:
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    return StoreUnusable(f"The store's {KEYS_FILE} cannot be used: {reason}.")
