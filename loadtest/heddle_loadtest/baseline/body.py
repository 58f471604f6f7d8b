"""What a client asks, out of the JSON body of an OpenAI request: what is greedy and plain, and nothing else.

A field that would change the answer and is not served is refused, never ignored. Knows no HTTP and no model.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from heddle_loadtest.workload.names import BASE

DEFAULT_MAX_TOKENS = 128
REFUSED_FIELDS = (
    "stop",
    "logprobs",
    "top_logprobs",
    "tools",
    "functions",
    "response_format",
    "logit_bias",
    "echo",
    "suffix",
    "adapters",
    "stop_token_ids",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
)
ONES_ONLY_FIELDS = ("n", "best_of", "repetition_penalty")


class ApiError(Exception):
    """An answer with an error envelope."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        self.status, self.code, self.message, self.param = status, code, message, param
        super().__init__(message)

    def envelope(self) -> dict[str, Any]:
        """OpenAI's form of it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(Struct):
    include_usage: bool = False


class Message(Struct):
    role: str
    content: str


class Body(Struct, kw_only=True):
    """What both interfaces share."""

    model: str | None = None
    adapter: str | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: float | None = None  # greedy without it
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def num_new_tokens(self) -> int:
        return self.max_tokens or self.max_completion_tokens or DEFAULT_MAX_TOKENS

    @property
    def wants_usage(self) -> bool:
        """In its stream; a whole answer has it always."""
        return self.stream_options is not None and self.stream_options.include_usage


AnyBody = TypeVar("AnyBody", bound=Body)


class ChatBody(Body, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]


class CompletionBody(Body, kw_only=True):
    prompt: Annotated[str, Meta(min_length=1)] | Annotated[list[int], Meta(min_length=1)]


def read_body(raw: bytes, form: type[AnyBody]) -> AnyBody:
    """Raises ApiError naming the field that is wrong or not served."""
    try:
        fields = msgspec.json.decode(raw, type=dict[str, Any])
        body = msgspec.convert(fields, form)
    except msgspec.MsgspecError as error:
        raise ApiError(400, "invalid_request", f"the request is malformed: {error}") from error
    for name in (*REFUSED_FIELDS, *ONES_ONLY_FIELDS):
        value = fields.get(name)
        if value and not (name in ONES_ONLY_FIELDS and value == 1):
            raise ApiError(400, "not_served", f"this baseline serves no `{name}`: leave it out", name)
    if body.temperature:
        message = f"temperature is {body.temperature}, and this baseline answers greedily only: send 0"
        raise ApiError(400, "not_served", message, "temperature")
    return body


def choose_adapter(body: Body, model_name: str, adapters: Container[str]) -> str | None:
    """The adapter asked for by `adapter`, else by `model`; None: the base. Raises ApiError if there is no such."""
    if body.adapter is not None and body.adapter not in (BASE, model_name):
        if body.adapter not in adapters:
            message = f"no adapter is called {body.adapter!r}: GET /v1/models lists them"
            raise ApiError(404, "adapter_not_found", message, "adapter")
        return body.adapter
    if body.model in (None, model_name):
        return None
    if body.model not in adapters:
        message = f"neither the base nor an adapter is called {body.model!r}: GET /v1/models lists them"
        raise ApiError(404, "model_not_found", message, "model")
    return body.model
