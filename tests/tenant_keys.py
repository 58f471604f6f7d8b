"""Keys of a test's server, and clients that send them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from heddle_server.audit_log import AuditLog
from heddle_server.config import ServerConfig
from heddle_server.key_store import SCOPES, KeyStore, Scope, TenantLimits
from live_server import live_server

EVERYTHING_BUT_ADMIN: tuple[Scope, ...] = ("infer", "adapters:read", "adapters:write")


@contextmanager
def keys_of(store_path: Path) -> Iterator[KeyStore]:
    """As another process would open them."""
    with KeyStore(store_path, AuditLog(store_path)) as keys:
        yield keys


def make_key(store_path: Path, tenant: str, *scopes: Scope) -> str:
    """All scopes but admin's where none is named."""
    with keys_of(store_path) as keys:
        return keys.create(tenant, scopes or EVERYTHING_BUT_ADMIN)[1]


def set_limits(store_path: Path, tenant: str, limits: TenantLimits) -> None:
    with keys_of(store_path) as keys:
        keys.change_limits(tenant, asdict(limits))


@dataclass(frozen=True)
class Tenants:
    """Clients of one server: without a key, of an admin, of two teams, and of the operator's own tenant."""

    store_path: Path
    nobody: httpx.Client
    admin: httpx.Client
    blue: httpx.Client
    green: httpx.Client
    local: httpx.Client


@contextmanager
def tenants(config: ServerConfig) -> Iterator[Tenants]:
    """A server with keys."""
    path = config.store_path
    keys = [make_key(path, "ops", *SCOPES), *(make_key(path, name) for name in ("blue", "green", "local"))]
    with live_server(config) as nobody:
        clients = [client_of(nobody, key) for key in keys]
        try:
            yield Tenants(path, nobody, *clients)
        finally:
            for client in clients:
                client.close()


def client_of(client: httpx.Client, key: str) -> httpx.Client:
    """Another client of the same server, with a key."""
    return httpx.Client(base_url=client.base_url, headers={"authorization": f"Bearer {key}"}, timeout=20)
