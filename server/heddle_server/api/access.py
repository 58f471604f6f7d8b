"""Which key may do what: every route, with the scope that it needs.

A route that is not in this table is closed, so that a forgotten one is not open. `Authentication` reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from fastapi.routing import RouteContext, iter_route_contexts
from starlette.routing import BaseRoute, Match
from starlette.types import Scope as AsgiScope

from heddle_server.key_store import Scope

Access = Scope | Literal["public", "probe", "closed"]
"""`public`: without a key. `probe`: for machines that watch this one, under whatever host name."""

ACCESS: Mapping[str, Mapping[str, Access]] = {
    "/": {"GET": "public"},
    "/page/{name}": {"GET": "public"},
    "/favicon.ico": {"GET": "public"},
    "/docs": {"GET": "public"},
    "/docs/{name}": {"GET": "public"},
    "/openapi.json": {"GET": "public"},
    "/version": {"GET": "public"},
    "/livez": {"GET": "probe"},
    "/readyz": {"GET": "probe"},
    "/health": {"GET": "probe"},
    "/metrics": {"GET": "admin"},
    "/v1/chat/completions": {"POST": "infer"},
    "/v1/completions": {"POST": "infer"},
    "/v1/responses": {"POST": "infer"},
    "/v1/embeddings": {"POST": "infer"},
    "/tokenize": {"POST": "infer"},
    "/detokenize": {"POST": "infer"},
    "/v1/models": {"GET": "infer"},
    "/v1/models/{name:path}": {"GET": "infer", "DELETE": "adapters:write"},
    "/v1/cache": {"GET": "adapters:read"},
    "/v1/adapters": {"GET": "adapters:read", "POST": "adapters:write"},
    "/v1/adapters/validate": {"POST": "adapters:write"},
    "/v1/adapters/{name:path}/versions": {"GET": "adapters:read"},
    "/v1/adapters/{name:path}/aliases/{alias:path}": {"PUT": "adapters:write", "DELETE": "adapters:write"},
    "/v1/adapters/{name:reference}": {
        "GET": "adapters:read",
        "PATCH": "adapters:write",
        "DELETE": "adapters:write",
    },
}


@dataclass(frozen=True)
class RouteAccess:
    """What a request's route asks for."""

    needs: Access
    meter: Literal["answers", "changes"] | None  # against which of its tenant's rates it counts
    takes_owner: bool  # may name the tenant to act for, `?owner=`


class AccessTable:
    """`ACCESS`, looked up by the routes of one app: the one that answers a request is the one that is asked about."""

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        self._routes: list[RouteContext] = list(iter_route_contexts(list(routes)))

    def of(self, scope: AsgiScope) -> RouteAccess | None:
        """What a request needs; None where no route answers it, which the app then says."""
        for route in self._routes:
            match, _ = route.matches(scope)
            if match == Match.FULL:
                return access_of(route.path or "", scope["method"])
        return None


def access_of(path: str, method: str) -> RouteAccess:
    """What a route, by the path that it was declared with, needs."""
    needs = ACCESS.get(path, {}).get("GET" if method == "HEAD" else method, "closed")
    asks = needs == "infer" and method == "POST"
    meter: Literal["answers", "changes"] | None = "changes" if needs == "adapters:write" else None
    return RouteAccess(needs, "answers" if asks else meter, takes_owner=path.startswith("/v1/adapters"))
