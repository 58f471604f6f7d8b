"""Who asks: the tenant behind a request's API key, and what the key is good for."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from heddle_server.api.errors import InsufficientScope
from heddle_server.key_store import ADMIN, SCOPES, Scope
from heddle_server.request import LOCAL_TENANT


@dataclass(frozen=True)
class Principal:
    """One key's tenant and scopes."""

    tenant: str
    scopes: frozenset[Scope]
    key_id: str | None  # None where nobody needs a key

    @property
    def is_admin(self) -> bool:
        return ADMIN in self.scopes

    def require(self, scope: Scope) -> None:
        """Raises `InsufficientScope`."""
        if scope not in self.scopes and not self.is_admin:
            raise InsufficientScope(
                f"This needs a key with the scope {scope!r}; yours has {', '.join(sorted(self.scopes))}."
            )

    def require_owner(self, owner: str | None) -> None:
        """Raises `InsufficientScope` unless it may act for this tenant; None is its own."""
        if owner not in (None, self.tenant):
            self.require(ADMIN)


LOCAL_PRINCIPAL = Principal(LOCAL_TENANT, frozenset(SCOPES), None)  # everybody, while there are no keys


def principal_of(request: Request) -> Principal:
    """Who sent a request that `Authentication` has let in."""
    principal = request.state.principal
    assert isinstance(principal, Principal)
    return principal
