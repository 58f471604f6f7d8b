"""From pydantic's report on a request body to one typed error that names the field and the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from heddle_server.api.adapter_protocol import AdapterChanges, AliasTarget, ListQuery
from heddle_server.api.errors import ApiError, InvalidRequest, UnknownParameter, UnsupportedParameter, did_you_mean
from heddle_server.api.protocol import ChatCompletionRequest, CompletionRequest, Message, StreamOptions
from heddle_server.api.response_format import FORMAT_FORMS, GrammarFormat, JsonSchemaFormat, NamedSchema
from heddle_server.api.responses_protocol import (
    INPUT_FORMS,
    FunctionCallItem,
    FunctionCallOutputItem,
    MessageItem,
    NamedFunctionTool,
    ReasoningItem,
    ReasoningOptions,
    ResponsesRequest,
    ResponsesTool,
    SchemaFormat,
    TextOptions,
)
from heddle_server.api.token_protocol import DetokenizeRequest, TokenizeRequest
from heddle_server.api.tools import CalledFunction, Function, FunctionTool, NamedTool, ToolCall
from heddle_server.api.wire_fields import ADAPTER_FORMS, ScaledAdapter

# What other servers call the field that chooses an adapter.
_MEANT_ADAPTER = ("lora", "lora_path", "lora_name", "lora_request", "adapter_name", "adapters")

# Fields of other servers that constrain answers, and the one that does so here.
_MEANT_FORMAT = (
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "structured_outputs",
    "json_schema",
    "regex",
    "ebnf",
    "grammar",
)

_GENERATION = (
    ChatCompletionRequest,
    CompletionRequest,
    Message,
    StreamOptions,
    ScaledAdapter,
    JsonSchemaFormat,
    NamedSchema,
    GrammarFormat,
    FunctionTool,
    Function,
    NamedTool,
    ToolCall,
    CalledFunction,
)
_RESPONSES = (
    ResponsesRequest,
    MessageItem,
    ReasoningItem,
    FunctionCallItem,
    FunctionCallOutputItem,
    ResponsesTool,
    NamedFunctionTool,
    TextOptions,
    SchemaFormat,
    ReasoningOptions,
)
_MODELS = (*_GENERATION, *_RESPONSES, TokenizeRequest, DetokenizeRequest, AdapterChanges, AliasTarget, ListQuery)
_FIELDS = {field.alias or name for model in _MODELS for name, field in model.model_fields.items()}
# What pydantic puts between the fields for the forms that one may have.
_BRANCHES = (*ADAPTER_FORMS, *FORMAT_FORMS, *INPUT_FORMS)

Body = TypeVar("Body", bound=BaseModel)


def checked(model: type[Body], fields: Mapping[str, Any]) -> Body:
    """A body that was made of another one; raises what a client who sent it would be told."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise invalid_body([{**report, "loc": ("body", *report["loc"])} for report in error.errors()]) from None


def invalid_body(reports: Sequence[Any]) -> ApiError:
    """The error to answer with: an unknown or unserved field says more than a failed bound."""
    report = min(reports, key=lambda each: _URGENCY.index(each["type"]) if each["type"] in _URGENCY else len(_URGENCY))
    location = report["loc"][1:]  # without "body"
    param = _param(location)
    match report["type"]:
        case "json_invalid":
            reason = report.get("ctx", {}).get("error", "cannot be parsed")
            return InvalidRequest(f"The body is not valid JSON: {reason} at character {report['loc'][-1]}.")
        case "extra_forbidden":
            return _unknown(str(location[-1]), param)
        case "unsupported_parameter":
            what = report["ctx"]["what"]
            return UnsupportedParameter(f"{what} of '{param}' is not served yet. Leave it out.", param=param)
        case "invalid_value":
            param = _param((*location, *filter(None, [report.get("ctx", {}).get("param")])))
            return InvalidRequest(f"{report['msg']}.", param=param)
        case "missing" if param is not None:
            return InvalidRequest(f"'{param}' is required.", param=param)
        case _ if param is None:
            return InvalidRequest("The body must be a JSON object, sent with Content-Type: application/json.")
        case "too_short" | "too_long":  # of a list, which pydantic calls by what it is
            said = report["msg"].removeprefix(report["ctx"]["field_type"]).replace(" after validation", "")
            return InvalidRequest(f"'{param}'{said}.", param=param)
        case _:
            return InvalidRequest(report["msg"].replace("Input", f"'{param}'", 1) + ".", param=param)


_URGENCY = ("json_invalid", "extra_forbidden", "unsupported_parameter")


def _unknown(name: str, param: str | None) -> UnknownParameter:
    if name in _FIELDS:
        return UnknownParameter(f"'{param}' is no parameter of this request.", param=param)
    if name in _MEANT_ADAPTER:
        hint = " Did you mean 'adapter'?"
    elif name in _MEANT_FORMAT:
        hint = (
            " Here 'response_format' says what an answer has to be, in responses 'text.format': types json_object, "
            "json_schema and grammar."
        )
    else:
        hint = did_you_mean(name, sorted(_FIELDS))
    return UnknownParameter(f"Unknown parameter {name[:64]!r}.{hint}", param=param)


def _param(location: Sequence[str | int]) -> str | None:
    """`messages.0.role`; what pydantic adds for the branches of a union names no field and is left out."""
    last = len(location) - 1
    parts = [
        str(part)[:64]
        for position, part in enumerate(location)
        if isinstance(part, int) or part in _FIELDS or (position == last and part not in _BRANCHES)
    ]
    return ".".join(parts) or None
