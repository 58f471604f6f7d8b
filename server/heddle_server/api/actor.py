"""Who does something to adapters, and as whose owner: a key's own tenant, or any where the key is an admin's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Query, Request

from heddle_adapters.errors import quoted
from heddle_adapters.store_index import LOCAL_OWNER
from heddle_server.api.adapter_protocol import Owner
from heddle_server.api.errors import InvalidRequest
from heddle_server.api.principal import LOCAL_PRINCIPAL, Principal, principal_of
from heddle_server.key_store import is_tenant


@dataclass(frozen=True)
class Actor:
    """Sees what its `owner` sees, and changes what its `owner` owns."""

    principal: Principal | None  # None = the server itself
    owner: str
    request_id: str | None = None

    @property
    def is_operator(self) -> bool:
        """The server itself, or somebody who may do everything."""
        return self.principal is None or self.principal.is_admin


SERVER = Actor(None, LOCAL_OWNER)  # what it does by itself: import a folder, delete what has expired
LOCAL_ACTOR = Actor(LOCAL_PRINCIPAL, LOCAL_OWNER)  # whoever asks while there are no keys


def actor_of(
    request: Request,
    owner: Annotated[Owner, Query()] = None,
) -> Actor:
    """Who sent a request; raises `InsufficientScope` and `InvalidRequest` for the owner that it names."""
    principal = principal_of(request)
    principal.require_owner(owner)
    if owner is not None and not is_tenant(owner):
        raise InvalidRequest(f"{quoted(owner)} can be no tenant's name.", param="owner")
    return Actor(principal, owner or principal.tenant, getattr(request.state, "request_id", None))


Acting = Annotated[Actor, Depends(actor_of)]
