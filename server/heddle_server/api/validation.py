"""From pydantic's report on a request body to one typed error that names the field and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from heddle_server.api.adapter_protocol import AdapterChanges, AliasTarget, ListQuery
from heddle_server.api.errors import ApiError, InvalidRequest, UnknownParameter, UnsupportedParameter, did_you_mean
from heddle_server.api.protocol import ChatCompletionRequest, CompletionRequest, Message, StreamOptions
from heddle_server.api.wire_fields import ADAPTER_FORMS, ScaledAdapter

# What other servers call the field that chooses an adapter.
_MEANT_ADAPTER = ("lora", "lora_path", "lora_name", "lora_request", "adapter_id", "adapter_name", "adapters")

_GENERATION = (ChatCompletionRequest, CompletionRequest, Message, StreamOptions, ScaledAdapter)
_MODELS = (*_GENERATION, AdapterChanges, AliasTarget, ListQuery)
_FIELDS = {name for model in _MODELS for name in model.model_fields}


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
    hint = " Did you mean 'adapter'?" if name in _MEANT_ADAPTER else did_you_mean(name, sorted(_FIELDS))
    return UnknownParameter(f"Unknown parameter {name[:64]!r}.{hint}", param=param)


def _param(location: Sequence[str | int]) -> str | None:
    """`messages.0.role`; what pydantic adds for the branches of a union names no field and is left out."""
    last = len(location) - 1
    parts = [
        str(part)[:64]
        for position, part in enumerate(location)
        if isinstance(part, int) or part in _FIELDS or (position == last and part not in ADAPTER_FORMS)
    ]
    return ".".join(parts) or None
