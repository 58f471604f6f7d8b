"""Who may ask for what, decided before a byte of the body is read: keys, scopes, rates, and browsers kept out.

Everything is refused that `access` does not open. While no key was ever made, whoever can reach the server may do
everything, under the tenant `local`; only what a page of another site could have sent is refused then, unless the
operator allows it with --allow-anonymous.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers, QueryParams
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from heddle_adapters.errors import StoreUnusable
from heddle_server.api.access import AccessTable, RouteAccess
from heddle_server.api.errors import (
    ApiError,
    InsufficientScope,
    InvalidApiKey,
    MissingApiKey,
    RouteClosed,
    error_response,
    kind_of,
)
from heddle_server.api.loopback import check_local
from heddle_server.api.principal import LOCAL_PRINCIPAL, Principal
from heddle_server.api.registry import disk_errors
from heddle_server.api.request_rate import CHANGES_AT_ONCE, CHANGES_PER_SECOND
from heddle_server.api.service import Service
from heddle_server.audit_log import AuditEntry
from heddle_server.key_store import KeyRefused

MAX_LOGGED_CHARS = 256  # of what a refused request says


class Authentication:
    """ASGI middleware of one app; leaves the `Principal` in the request's state."""

    def __init__(self, app: ASGIApp, *, service: Service) -> None:
        self.app = app
        self._service = service
        self._access: AccessTable | None = None  # when the app is complete

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # nothing else is served, so nobody is asked for a key
            return await WebSocketClose()(scope, receive, send)
        try:
            await self._admit(scope)
        except (ApiError, StoreUnusable) as error:
            self._service.metrics.count_error(kind_of(error).code)
            return await error_response(error)(scope, _nothing, send)
        return await self.app(scope, receive, send)

    async def _admit(self, scope: Scope) -> None:
        if self._access is None:
            self._access = AccessTable(scope["app"].routes)
        access = self._access.of(scope)
        if access is not None and access.needs == "probe":
            return
        headers = Headers(scope=scope)
        if self._service.keys.has_keys:
            if access is not None and access.needs == "public":
                return
            principal = self._principal(headers)
        else:
            if not self._service.config.allow_anonymous:
                check_local(headers)
            principal = LOCAL_PRINCIPAL
        if access is not None:
            await self._check_access(access, principal, scope)
        scope.setdefault("state", {})["principal"] = principal

    def _principal(self, headers: Headers) -> Principal:
        scheme, _, text = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not text.strip():
            raise MissingApiKey("This server needs an API key. Send it as 'Authorization: Bearer KEY'.")
        try:
            key = self._service.keys.check(text.strip())
        except KeyRefused as error:
            raise InvalidApiKey(str(error)) from None
        return Principal(key.tenant, key.scopes, key.key_id)

    async def _check_access(self, access: RouteAccess, principal: Principal, scope: Scope) -> None:
        if access.needs == "public" or access.needs == "probe":
            return
        if access.needs == "closed":
            raise RouteClosed("Nobody may use this route: the server's access table does not know it.")
        owner = QueryParams(scope["query_string"]).get("owner") if access.takes_owner else None
        is_logged = access.meter == "changes" or owner is not None  # where it is refused
        if is_logged and not principal.is_admin:
            self._service.change_rates.take(principal.tenant, CHANGES_PER_SECOND, CHANGES_AT_ONCE)
        try:
            principal.require(access.needs)
            principal.require_owner(owner)
        except InsufficientScope as error:
            if is_logged:
                await self._log_refusal(error, owner, principal, scope)
            raise
        if access.meter == "answers":
            limit = self._service.keys.limits_of(principal.tenant).requests_per_second
            self._service.request_rates.take(principal.tenant, limit)

    async def _log_refusal(self, error: ApiError, owner: str | None, principal: Principal, scope: Scope) -> None:
        entry = AuditEntry(
            "access",
            tenant=principal.tenant,
            key_id=principal.key_id,
            request_id=scope.get("state", {}).get("request_id"),
            owner=owner and owner[:MAX_LOGGED_CHARS],
            detail=f"{scope['method']} {scope['path']}"[:MAX_LOGGED_CHARS],
            outcome=kind_of(error).code,
        )
        with disk_errors():
            await asyncio.to_thread(self._service.audit.append, [entry])


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
