"""Tools on the wire: what a model may call, which of it, and the calls of a chat's earlier turns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from heddle_server.api.wire_fields import Ignored, JsonSchema, WireModel, invalid

MAX_TOOLS = 128
MAX_DESCRIPTION_CHARS = 16 * 1024

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
CallId = Annotated[str, Field(min_length=1, max_length=128)]


class Function(WireModel):
    """A function that a model may call."""

    name: FunctionName
    description: Annotated[str | None, Field(max_length=MAX_DESCRIPTION_CHARS)] = None
    parameters: Annotated[JsonSchema | None, Field(description="JSON schema of its arguments.")] = None
    strict: Annotated[
        bool | None, Field(description="Forced calls follow the schema either way; chosen ones are not held to it.")
    ] = None


class FunctionTool(WireModel):
    """A tool, of the one type there is."""

    type: Literal["function"]
    function: Function


class NamedFunction(WireModel):
    """The name of one of a request's functions."""

    name: FunctionName


class NamedTool(WireModel):
    """The one tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


def _known_choice(choice: object) -> object:
    if choice is None or choice in ("none", "auto", "required") or isinstance(choice, dict | NamedTool):
        return choice
    raise invalid("tool_choice must be 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': '...'}}")


ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedTool, BeforeValidator(_known_choice)]


class CalledFunction(WireModel):
    """What a model has called."""

    name: FunctionName
    arguments: Annotated[str, Field(description="JSON text, as the model wrote it.")]
    parsed_arguments: Ignored = None  # what OpenAI's own clients made of them


class ToolCall(WireModel):
    """A call of an earlier turn."""

    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction
