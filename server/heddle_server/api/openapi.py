"""`/openapi.json`: FastAPI's description of the routes, made complete and true.

FastAPI knows paths, parameters and the types of bodies. Added are replies and examples (`operations`), scopes
(`access`), errors in our envelope (`errors`), and headers. Nothing here is asked when a request is answered: a reply is
held to its description by tests.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, get_args

from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from heddle_adapters.errors import StoreUnusable
from heddle_server.api.access import RouteAccess, access_of
from heddle_server.api.errors import (
    KINDS,
    BodyTooLarge,
    ForbiddenOrigin,
    InsufficientScope,
    InvalidApiKey,
    MissingApiKey,
    RateLimitExceeded,
    UnsupportedEncoding,
)
from heddle_server.api.operations import OPERATIONS, Errors, Operation, Stream
from heddle_server.api.server_shapes import ErrorReply
from heddle_server.key_store import SCOPES
from heddle_server.version import heddle_version

Json = dict[str, Any]

SECURITY_SCHEME = "ApiKey"
STREAM_TYPE = "text/event-stream"

_REFERENCE = "#/components/schemas/{model}"
_JSON = "application/json"
_FORM = "multipart/form-data"

_DESCRIPTION = """\
One 4-bit base model, and another adapter for every request. Any OpenAI client works: name an adapter in `model` or in
the extra field `adapter`.

Every error has the same form, OpenAI's: `{"error": {"message", "type", "param", "code"}}`. A field that is not known,
or not served, is an error, never ignored. A path that does not exist is a 404 with the code `unknown_route`, another
method a 405 with `method_not_allowed`.

Where the server has API keys, each operation says which scope a key needs for it; while no key was ever made, none is
needed.
"""

_TAGS = {
    "generation": "Text from the base and its adapters.",
    "tokens": "Text to tokens and back.",
    "models": "What a request can name.",
    "adapters": "Upload, look at, change and delete adapters while the server runs.",
    "cache": "What lies in memory.",
    "health": "For those who watch the server.",
}

_HEADERS: dict[str, Json] = {
    "x-request-id": {
        "description": "The request's own `x-request-id`, where it has a plain one, or one made here.",
        "required": True,
        "schema": {"type": "string", "minLength": 1, "maxLength": 128},
    },
    "openai-processing-ms": {
        "description": "Milliseconds until the reply began.",
        "required": True,
        "schema": {"type": "integer", "minimum": 0},
    },
    "retry-after": {
        "description": "Seconds after which it makes sense to come back.",
        "required": True,
        "schema": {"type": "integer", "minimum": 0},
    },
    "www-authenticate": {
        "description": "How to send a key.",
        "required": True,
        "schema": {"type": "string", "const": "Bearer"},
    },
    "x-heddle-adapter": {
        "description": "The versions that answer, as references; not there for the base.",
        "schema": {"type": "string"},
    },
    "x-heddle-adapter-load-ms": {
        "description": "What the adapter was waited for; not in streams, nor for the base.",
        "schema": {"type": "number", "minimum": 0},
    },
    "warning": {
        "description": "What in the request should be said otherwise, though it was understood.",
        "schema": {"type": "string"},
    },
}
_ALWAYS = ("x-request-id", "openai-processing-ms")
_MEANINGS = {
    400: "The request is wrong.",
    401: "No API key, or not a good one.",
    403: "The key is good, but not for this.",
    404: "There is no such thing, or none that the asker may know of.",
    409: "It is in the way of something that is there.",
    413: "Too large.",
    415: "A body of a kind that is not taken.",
    422: "The adapter cannot be used.",
    429: "More than the tenant may ask for now.",
    500: "The engine could not finish the request.",
    503: "Not now.",
}


def openapi_document(routes: Sequence[APIRoute]) -> Json:
    """The document of these routes; raises `KeyError` for one that `OPERATIONS` does not know."""
    documented = [route for route in routes if route.include_in_schema]
    document = get_openapi(
        title="heddle",
        version=heddle_version(),
        openapi_version="3.2.0",  # the first that can say what a stream's events are
        description=_DESCRIPTION,
        routes=documented,
        servers=[{"url": ".", "description": "this server"}],  # wherever the document was found, behind a gateway too
        tags=[{"name": name, "description": text} for name, text in _TAGS.items()],
    )
    schemas = _Schemas()
    for route in documented:
        for method in route.methods or ():
            described = document["paths"][route.path_format][method.lower()]
            _complete(described, route, access_of(route.path, method), schemas)
    document["components"] = {
        "schemas": schemas.components(),
        "headers": _HEADERS,
        "securitySchemes": {
            SECURITY_SCHEME: {
                "type": "http",
                "scheme": "bearer",
                "description": f"A key that `heddle keys create` has made. Its scopes are among {', '.join(SCOPES)}.",
            }
        },
    }
    return document


class _WithoutTitles(GenerateJsonSchema):
    """A field's title would be its name once more."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


class _Schemas:
    """The types that the document speaks of, collected and then described together."""

    def __init__(self) -> None:
        self._types: dict[tuple[str, Literal["validation", "serialization"]], TypeAdapter[Any]] = {}

    def accepted(self, kind: Any) -> Json:
        """A reference to the type of what a request holds."""
        return self._reference(kind, "validation")

    def told(self, kind: Any) -> Json:
        """A reference to the type of what a reply holds."""
        return self._reference(kind, "serialization")

    def components(self) -> Json:
        """Every schema by its name."""
        inputs = [(name, mode, adapter) for (name, mode), adapter in self._types.items()]
        _, described = TypeAdapter.json_schemas(inputs, ref_template=_REFERENCE, schema_generator=_WithoutTitles)
        components: Json = described["$defs"]
        for schema in components.values():
            if "properties" in schema:
                schema.setdefault("additionalProperties", False)  # of replies, too: a test finds what is not described
        return dict(sorted(components.items()))

    def _reference(self, kind: Any, mode: Literal["validation", "serialization"]) -> Json:
        members = get_args(kind)
        if members:  # a union of types with names
            return {"anyOf": [self._reference(member, mode) for member in members]}
        self._types.setdefault((kind.__name__, mode), TypeAdapter(kind))
        return {"$ref": _REFERENCE.format(model=kind.__name__)}


def _complete(described: Json, route: APIRoute, access: RouteAccess, schemas: _Schemas) -> None:
    """Makes FastAPI's description of one operation ours."""
    operation = OPERATIONS[route.name]
    described["operationId"] = route.name
    described["summary"] = route.name.replace("_", " ").capitalize()
    errors = [*operation.errors, *_common_errors(access)]
    if access.needs in SCOPES:
        described["security"] = [{SECURITY_SCHEME: [access.needs]}]
    example = dict(operation.example or {})
    for parameter in described.get("parameters", ()):
        _complete_parameter(parameter, example)
    if operation.form is not None:
        described["requestBody"] = {"required": True, "content": {_FORM: {"schema": operation.form}}}
    elif route.body_field is not None:
        schema = schemas.accepted(route.body_field.field_info.annotation)
        described["requestBody"] = {"required": True, "content": {_JSON: {"schema": schema, "example": example}}}
    described["responses"] = {**_replies(operation, schemas), **_refusals(errors, schemas, has_name="{" in route.path)}


def _complete_parameter(parameter: Json, example: Json) -> None:
    """What it is like; what is left of `example` then is of the body."""
    schema = parameter["schema"]
    if "anyOf" in schema:  # with null, which nobody can send in a URL
        (value,) = (each for each in schema.pop("anyOf") if each != {"type": "null"})
        schema.update(value)
    for said_elsewhere in ("title", "description"):
        schema.pop(said_elsewhere, None)
    if parameter["name"] in example:
        parameter["example"] = example.pop(parameter["name"])


def _common_errors(access: RouteAccess) -> Errors:
    """What goes wrong before a route is asked, or while it reads."""
    found: list[type[Exception]] = [BodyTooLarge, UnsupportedEncoding]
    if access.needs != "probe":
        found += [ForbiddenOrigin, StoreUnusable]
    if access.needs in SCOPES:
        found += [MissingApiKey, InvalidApiKey, InsufficientScope]
    if access.meter is not None or access.takes_owner:
        found.append(RateLimitExceeded)
    return tuple(found)


def _replies(operation: Operation, schemas: _Schemas) -> Json:
    whole: Json = {"schema": {"type": "string"} if operation.reply is str else schemas.told(operation.reply)}
    if operation.reply_example is not None:
        whole["example"] = operation.reply_example
    content = {operation.media_type: whole}
    if operation.stream is not None:
        content[STREAM_TYPE] = _stream(operation.stream, schemas)
    statuses = operation.statuses or {200: "Text." if operation.reply is str else inspect.getdoc(operation.reply) or ""}
    return {
        str(status): {
            "description": meaning,
            "headers": _headers(*_ALWAYS, *operation.headers),
            "content": content,
        }
        for status, meaning in statuses.items()
    }


def _stream(stream: Stream, schemas: _Schemas) -> Json:
    """Server-sent events, each of which holds JSON in its `data`."""
    data: Json = {"contentMediaType": _JSON, "contentSchema": schemas.told(stream.event)}
    if stream.ends_in_done:
        failed = {"contentMediaType": _JSON, "contentSchema": schemas.told(ErrorReply)}
        data = {"anyOf": [data, failed, {"const": "[DONE]"}]}
    event = {"type": "object", "properties": {"data": {"type": "string", **data}}, "required": ["data"]}
    return {"itemSchema": event, "example": stream.example}


def _refusals(errors: Sequence[type[Exception]], schemas: _Schemas, *, has_name: bool) -> Json:
    """By status; `has_name`: a path that ends in a name is another path with a line break in it."""
    by_status: dict[int, dict[str, str]] = {}
    for error in dict.fromkeys(errors):
        kind = KINDS[error]
        by_status.setdefault(kind.status, {})[kind.code] = inspect.getdoc(error) or ""
    if has_name:
        by_status[404]["unknown_route"] = "The path is none that this server knows."
    return {str(status): _refusal(status, by_status[status], schemas) for status in sorted(by_status)}


def _refusal(status: int, codes: dict[str, str], schemas: _Schemas) -> Json:
    meanings = [f"- `{code}`: {meaning}" for code, meaning in codes.items()]
    headers = {401: ("www-authenticate",), 429: ("retry-after",), 503: ("retry-after",)}.get(status, ())
    details = {"properties": {"code": {"enum": list(codes)}}}
    schema = {"allOf": [schemas.told(ErrorReply), {"properties": {"error": details}}]}
    return {
        "description": "\n".join([_MEANINGS[status], "", *meanings]),
        "headers": _headers(*_ALWAYS, *headers),
        "content": {_JSON: {"schema": schema}},
    }


def _headers(*names: str) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}
