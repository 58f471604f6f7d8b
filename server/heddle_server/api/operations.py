"""What `/openapi.json` says of each operation beside what its route declares: replies, errors, an example.

A table by the name of the route's function, and not at the routes, which say what is done. `openapi` reads it; errors
that every operation of its kind can end in (keys, bodies that are too large) are added there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST

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
from heddle_server.api import adapter_shapes, generation_shapes, responses_shapes, server_shapes
from heddle_server.api.errors import (
    AdapterCapacity,
    AdapterConflict,
    AdaptersNotAdditive,
    ContextLengthExceeded,
    EngineUnavailable,
    GenerationFailed,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PinCapacity,
    QuotaExceeded,
    TenantOverloaded,
    UnknownParameter,
    UnsupportedParameter,
)
from heddle_server.api.upload_form import TRIAL_FORM, UPLOAD_FORM

Errors = tuple[type[Exception], ...]
Json = dict[str, Any]


@dataclass(frozen=True)
class Stream:
    """Server-sent events, where the request asks for them."""

    event: Any  # the type of each event's JSON
    ends_in_done: bool  # whether `[DONE]` comes last
    example: str


@dataclass(frozen=True)
class Operation:
    """What one route answers."""

    reply: Any  # the type of its JSON; `str` is plain text
    errors: Errors = ()
    example: Json | None = None  # of the request's body, or of its parameters where it has none
    reply_example: Any = None  # where there is nothing to ask for
    statuses: Mapping[int, str] | None = None  # other than one 200, with what they mean
    stream: Stream | None = None
    headers: tuple[str, ...] = ()  # beside those of every reply
    form: Json | None = None  # the JSON schema of a body that is multipart/form-data
    media_type: str = "application/json"


_BODY: Errors = (InvalidRequest, UnknownParameter)
_GENERATION: Errors = (
    *_BODY,
    UnsupportedParameter,
    AdapterConflict,
    AdaptersNotAdditive,
    ContextLengthExceeded,
    AdapterNotFound,
    ModelNotFound,
    AdapterExceedsPool,
    AdapterDamaged,
    AdapterIncompatible,
    TenantOverloaded,
    GenerationFailed,
    EngineUnavailable,
    Overloaded,
    AdapterCapacity,
    StoreUnusable,
)
_CHANGE: Errors = (InvalidRequest, InvalidAdapterName, AdapterNotFound, NotTheOwner, StoreUnusable)
_DELETION: Errors = (
    InvalidRequest,
    AdapterError,
    NotTheOwner,
    PinCapacity,
    QuotaExceeded,
    EngineUnavailable,
    StoreUnusable,
)
_UPLOAD: Errors = (
    *_BODY,
    AdapterError,
    InvalidAdapterName,
    InvalidAdapter,
    AdapterIncompatible,
    AdapterExceedsPool,
    NameTaken,
    PinCapacity,
    QuotaExceeded,
    EngineUnavailable,
    StoreUnusable,
)

_HELLO = [{"role": "user", "content": "Hello"}]
_CHAT_STREAM = """\
data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1767225600,"model":"sql","system_fingerprint":\
"fp_1","choices":[{"index":0,"logprobs":null,"delta":{"role":"assistant","content":""},"finish_reason":null}]}

data: [DONE]

"""
_TEXT_STREAM = """\
data: {"id":"cmpl-1","object":"text_completion","created":1767225600,"model":"sql","system_fingerprint":"fp_1",\
"choices":[{"index":0,"logprobs":null,"text":"Hello","finish_reason":null}]}

data: [DONE]

"""
_RESPONSE_STREAM = """\
event: response.output_text.delta
data: {"type":"response.output_text.delta","item_id":"msg_1","output_index":0,"content_index":0,"delta":"Hello",\
"logprobs":[],"sequence_number":4}

"""
_ADAPTER_HEADERS = ("x-heddle-adapter", "x-heddle-adapter-load-ms", "warning")
_MODEL = {
    "id": "sql",
    "object": "model",
    "created": 1767225600,
    "owned_by": "heddle",
    "root": "sha256:" + "0" * 64,
    "parent": "Qwen/Qwen2.5-0.5B-Instruct",
    "max_model_len": 8192,
    "quantization": "nf4",
}

OPERATIONS: Mapping[str, Operation] = {
    "create_chat_completion": Operation(
        generation_shapes.ChatCompletion,
        _GENERATION,
        example={"model": "base", "adapter": "sql", "messages": _HELLO, "temperature": 0, "max_tokens": 16},
        stream=Stream(generation_shapes.ChatCompletionChunk, ends_in_done=True, example=_CHAT_STREAM),
        headers=_ADAPTER_HEADERS,
    ),
    "create_completion": Operation(
        generation_shapes.TextCompletion,
        _GENERATION,
        example={"model": "sql", "prompt": "Hello", "max_tokens": 16},
        stream=Stream(generation_shapes.TextCompletionChunk, ends_in_done=True, example=_TEXT_STREAM),
        headers=_ADAPTER_HEADERS,
    ),
    "create_response": Operation(
        responses_shapes.ResponseObject,
        _GENERATION,
        example={"model": "sql", "input": "Hello", "max_output_tokens": 16},
        stream=Stream(responses_shapes.ResponseStreamEvent, ends_in_done=False, example=_RESPONSE_STREAM),
        headers=_ADAPTER_HEADERS,
    ),
    "tokenize": Operation(
        generation_shapes.Tokenized,
        (*_BODY, UnsupportedParameter, EngineUnavailable),
        example={"prompt": "Hello", "return_token_strs": True},
    ),
    "detokenize": Operation(
        generation_shapes.Detokenized, (*_BODY, EngineUnavailable), example={"tokens": [72, 101, 108, 108, 111]}
    ),
    "list_models": Operation(
        adapter_shapes.ModelList, (StoreUnusable,), reply_example={"object": "list", "data": [_MODEL]}
    ),
    "retrieve_model": Operation(adapter_shapes.Model, (ModelNotFound, StoreUnusable), example={"name": "sql"}),
    "delete_model": Operation(
        adapter_shapes.ModelDeleted,
        (*_DELETION, ModelNotFound),
        example={"name": "sql@1"},
    ),
    "upload_adapter": Operation(
        adapter_shapes.UploadedAdapter,
        _UPLOAD,
        statuses={201: "A new version.", 200: "The name's newest version has this very content already."},
        form=UPLOAD_FORM,
    ),
    "validate_adapter": Operation(adapter_shapes.AdapterValidation, _UPLOAD, form=TRIAL_FORM),
    "list_adapters": Operation(
        adapter_shapes.AdapterPage, (*_BODY, StoreUnusable), example={"limit": 20, "q": "sql", "tier": "device"}
    ),
    "list_versions": Operation(
        adapter_shapes.VersionList, (InvalidRequest, AdapterNotFound, StoreUnusable), example={"name": "sql"}
    ),
    "set_alias": Operation(
        adapter_shapes.AliasSet, (UnknownParameter, *_CHANGE), example={"name": "sql", "alias": "prod", "version": 1}
    ),
    "remove_alias": Operation(adapter_shapes.AliasRemoved, _CHANGE, example={"name": "sql", "alias": "prod"}),
    "retrieve_adapter": Operation(
        adapter_shapes.AdapterCard, (InvalidRequest, AdapterNotFound, StoreUnusable), example={"name": "sql@prod"}
    ),
    "change_adapter": Operation(
        adapter_shapes.AdapterCard,
        (UnknownParameter, AdapterError, *_CHANGE, NameTaken, PinCapacity, QuotaExceeded, EngineUnavailable),
        example={"name": "sql", "description": "Writes SQL.", "tags": ["demo"]},
    ),
    "delete_adapter": Operation(
        adapter_shapes.AdapterDeleted, (*_DELETION, InvalidAdapterName, AdapterNotFound), example={"name": "sql@2"}
    ),
    "describe_cache": Operation(
        server_shapes.CacheContents, (InvalidRequest, EngineUnavailable, StoreUnusable), example={"limit": 20}
    ),
    "live": Operation(server_shapes.Alive, reply_example={"status": "ok"}),
    "ready": Operation(server_shapes.IsReady, (EngineUnavailable,), reply_example={"status": "ready"}),
    "health": Operation(server_shapes.IsReady, (EngineUnavailable,), reply_example={"status": "ready"}),
    "version": Operation(server_shapes.Version, reply_example={"version": "0.1.0"}),
    "metrics": Operation(
        str,
        (),
        reply_example="# TYPE heddle_requests_running gauge\nheddle_requests_running 3.0\n",
        media_type=CONTENT_TYPE_LATEST.partition(";")[0],
    ),
}
