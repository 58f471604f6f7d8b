"""What can go wrong in a request, and how it is told in OpenAI's error envelope.

    ApiError
    ├── InvalidRequest            the request itself is wrong
    │   ├── UnknownParameter          a field nobody knows
    │   ├── UnsupportedParameter      a field of OpenAI's that is not served yet
    │   ├── AdapterConflict           `model` and `adapter` name different adapters
    │   ├── AdaptersNotAdditive       these adapters cannot be mixed, or not be scaled
    │   ├── ContextLengthExceeded     prompt, or prompt and answer, over the context
    │   ├── UnsupportedEncoding       a compressed body
    │   └── BodyTooLarge
    ├── MissingApiKey             the server has keys, and the request has none
    ├── InvalidApiKey             the request's key is unknown, revoked or expired
    ├── Forbidden                 the key is good, but not for this
    │   ├── InsufficientScope         it lacks the scope that the route needs
    │   ├── RouteClosed               the route is in no line of the access table
    │   ├── ForbiddenOrigin           another site's page, or another host name, where nobody needs a key
    │   └── QuotaExceeded             more than the tenant may store
    ├── RateLimitExceeded         more than the tenant may send at once
    ├── ModelNotFound             no base and no adapter of that name
    ├── NotServed                 a route of OpenAI's for what this server does not do
    ├── EngineUnavailable         not loaded yet, restarting, or lost while it answered
    ├── Overloaded                more work than the server can do in time
    ├── TenantOverloaded          more than one tenant's share of it
    ├── AdapterCapacity           the page pool has no room for the adapter now
    ├── PinCapacity               pinning it too would leave the page pool no room for anything else
    └── GenerationFailed          the engine could not finish this one request

Errors about adapters come from `heddle_adapters.errors`. `KINDS` is the one place that knows HTTP status codes.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from starlette.responses import Response

from heddle_adapters.errors import (
    AdapterDamaged,
    AdapterError,
    AdapterExceedsPool,
    AdapterIncompatible,
    AdapterNotFound,
    InvalidAdapter,
    InvalidAdapterName,
    NameTaken,
    NotTheOwner,
    StoreUnusable,
)

RETRY_AFTER_SECONDS = 2  # where nothing better is known


class ApiError(Exception):
    """Base of the API's own errors; `param` names the offending request field.

    `retry_after_seconds` says when to come back, where the status (429, 503) says that coming back makes sense.
    """

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_seconds: int = RETRY_AFTER_SECONDS
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_seconds = retry_after_seconds


class InvalidRequest(ApiError):
    """The request is malformed or out of range."""


class UnknownParameter(InvalidRequest):
    """A field that neither OpenAI nor heddle defines."""


class UnsupportedParameter(InvalidRequest):
    """A known field at a value that is not served yet; never ignored in silence."""


class AdapterConflict(InvalidRequest):
    """`model` and `adapter` name different adapters."""


class AdaptersNotAdditive(InvalidRequest):
    """What these adapters do cannot be added up, multiplied or scaled."""


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer do not fit the model's context."""


class UnsupportedEncoding(InvalidRequest):
    """The body is compressed: its size could not be bounded."""


class BodyTooLarge(InvalidRequest):
    """The body is over its limit."""


class MissingApiKey(ApiError):
    """The server has keys, and the request has none."""


class InvalidApiKey(ApiError):
    """The request's key is none that counts."""


class Forbidden(ApiError):
    """It is known who asks, and they may not."""


class InsufficientScope(Forbidden):
    """The key's scopes do not cover the route."""


class RouteClosed(Forbidden):
    """Nobody has said who may use the route."""


class ForbiddenOrigin(Forbidden):
    """A page of another site may have sent it, and nobody needs a key here."""


class QuotaExceeded(Forbidden):
    """The tenant may not store or pin that much."""


class RateLimitExceeded(ApiError):
    """The tenant has sent more than it may."""


class ModelNotFound(ApiError):
    """Neither the base nor an adapter answers to this name."""


class NotServed(ApiError):
    """What OpenAI has a route for, and this server is not made for."""


class EngineUnavailable(ApiError):
    """The engine is loading, restarting or gone."""


class Overloaded(ApiError):
    """The server could not answer in time."""


class TenantOverloaded(ApiError):
    """The tenant has its fair share in flight, and others want theirs."""


class AdapterCapacity(ApiError):
    """The page pool has no room for the adapter while others hold it."""


class PinCapacity(ApiError):
    """With this adapter pinned too, the page pool would have too little room for the rest."""


class GenerationFailed(ApiError):
    """The engine could not finish the request."""


class ErrorKind(NamedTuple):
    """How one class of error is told over HTTP."""

    status: int
    type: str
    code: str


_INVALID = "invalid_request_error"
_SERVER = "server_error"
_LIMIT = "rate_limit_error"

KINDS: Mapping[type[Exception], ErrorKind] = {
    InvalidRequest: ErrorKind(400, _INVALID, "invalid_request"),
    UnknownParameter: ErrorKind(400, _INVALID, "unknown_parameter"),
    UnsupportedParameter: ErrorKind(400, _INVALID, "unsupported_parameter"),
    AdapterConflict: ErrorKind(400, _INVALID, "adapter_conflict"),
    AdaptersNotAdditive: ErrorKind(400, _INVALID, "adapters_not_additive"),
    ContextLengthExceeded: ErrorKind(400, _INVALID, "context_length_exceeded"),
    UnsupportedEncoding: ErrorKind(415, _INVALID, "unsupported_encoding"),
    BodyTooLarge: ErrorKind(413, _INVALID, "body_too_large"),
    MissingApiKey: ErrorKind(401, _INVALID, "missing_api_key"),
    InvalidApiKey: ErrorKind(401, _INVALID, "invalid_api_key"),
    Forbidden: ErrorKind(403, _INVALID, "forbidden"),
    InsufficientScope: ErrorKind(403, _INVALID, "insufficient_scope"),
    RouteClosed: ErrorKind(403, _INVALID, "route_closed"),
    ForbiddenOrigin: ErrorKind(403, _INVALID, "forbidden_origin"),
    QuotaExceeded: ErrorKind(403, _INVALID, "quota_exceeded"),
    RateLimitExceeded: ErrorKind(429, _LIMIT, "rate_limit_exceeded"),
    ModelNotFound: ErrorKind(404, _INVALID, "model_not_found"),
    NotServed: ErrorKind(404, _INVALID, "not_served"),
    EngineUnavailable: ErrorKind(503, _SERVER, "engine_unavailable"),
    Overloaded: ErrorKind(503, _SERVER, "overloaded"),
    TenantOverloaded: ErrorKind(429, _LIMIT, "tenant_overloaded"),
    AdapterCapacity: ErrorKind(503, _SERVER, "adapter_capacity"),
    PinCapacity: ErrorKind(409, _INVALID, "pin_capacity"),
    GenerationFailed: ErrorKind(500, _SERVER, "internal_error"),
    AdapterError: ErrorKind(400, _INVALID, "invalid_adapter_request"),
    AdapterNotFound: ErrorKind(404, _INVALID, "adapter_not_found"),
    NotTheOwner: ErrorKind(403, _INVALID, "not_the_owner"),
    NameTaken: ErrorKind(409, _INVALID, "name_taken"),
    InvalidAdapterName: ErrorKind(400, _INVALID, "invalid_adapter_name"),
    InvalidAdapter: ErrorKind(422, _INVALID, "invalid_adapter"),
    AdapterIncompatible: ErrorKind(422, _INVALID, "adapter_incompatible"),
    AdapterDamaged: ErrorKind(422, _INVALID, "adapter_damaged"),
    AdapterExceedsPool: ErrorKind(413, _INVALID, "adapter_too_large"),
    StoreUnusable: ErrorKind(503, _SERVER, "store_unusable"),
    Exception: ErrorKind(500, _SERVER, "internal_error"),
}

_HTTP_CODES = {404: "unknown_route", 405: "method_not_allowed"}


def kind_of(error: Exception) -> ErrorKind:
    """The row of the table for the nearest class of `error`."""
    return next(KINDS[cls] for cls in type(error).__mro__ if cls in KINDS)


def envelope(error: Exception) -> dict[str, object]:
    """OpenAI's error object; an error nobody foresaw tells nothing of its insides."""
    kind = kind_of(error)
    if isinstance(error, ApiError | AdapterError):
        return _envelope(error.message, kind, error.param)
    return _envelope("The server failed to answer this request; its log has the details.", kind, None)


def error_response(error: Exception) -> Response:
    """The HTTP reply for any error, table row and envelope."""
    kind = kind_of(error)
    seconds = error.retry_after_seconds if isinstance(error, ApiError) else RETRY_AFTER_SECONDS
    headers = {"retry-after": str(seconds)} if kind.status in (429, 503) else None
    if kind.status == 401:
        headers = {"www-authenticate": "Bearer"}
    return _json_response(envelope(error), kind.status, headers)


def http_error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """The reply for what the web framework refuses by itself: unknown routes and methods."""
    kind = ErrorKind(status, _SERVER if status >= 500 else _INVALID, _HTTP_CODES.get(status, "invalid_request"))
    return _json_response(_envelope(message, kind, None), status, headers)


def engine_error(code: str | None, message: str | None) -> Exception:
    """The typed error for a request that the engine ended with finish_reason "error"."""
    text = message or "The engine could not finish this request."
    match code:
        case "engine_died":
            return EngineUnavailable(text)
        case "adapter_damaged":
            return AdapterDamaged(text, param="adapter")
        case "adapter_load_failed":
            return AdapterIncompatible(text, param="adapter")
        case "adapter_too_large":
            return AdapterExceedsPool(text, param="adapter")
        case "adapter_capacity":
            return AdapterCapacity(text, param="adapter")
        case "store_unusable":
            return StoreUnusable(text, param="adapter")
        case "grammar_failed":
            return InvalidRequest(text)
        case _:
            return GenerationFailed(text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' with the nearest of `known`, or nothing."""
    nearest = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(each) for each in nearest)}?" if nearest else ""


def _envelope(message: str, kind: ErrorKind, param: str | None) -> dict[str, object]:
    return {"error": {"message": message, "type": kind.type, "param": param, "code": kind.code}}


def _json_response(content: object, status: int, headers: Mapping[str, str] | None) -> Response:
    # json.dumps escapes to ASCII, so a message that quotes a lone surrogate still encodes.
    return Response(json.dumps(content), status, headers, media_type="application/json")
