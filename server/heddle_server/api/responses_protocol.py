"""The wire types of POST /v1/responses: a conversation as items.

Sampling, adapters and what else it shares with chats are `GenerationRequest`'s. Nothing is kept from one request to
the next, so that whatever refers to an earlier one is refused.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from heddle_server.api.protocol import MAX_INTEGER, MAX_MESSAGES, GenerationRequest
from heddle_server.api.response_format import (
    FORMAT_FORMS,
    FORMAT_TYPES,
    GrammarFormat,
    JsonObjectFormat,
    NamedSchema,
    TextFormat,
    format_form,
)
from heddle_server.api.tools import MAX_TOOLS, CallId, Function, FunctionName, NamedFunction
from heddle_server.api.wire_fields import (
    Ignored,
    TemplateVariables,
    WireModel,
    invalid,
    neutral,
    text_parts,
    unsupported,
)
from heddle_server.request import MAX_LOGPROBS

MAX_ITEMS = MAX_MESSAGES - 1  # `instructions` are a message too
MAX_METADATA = 16
LOGPROBS = "message.output_text.logprobs"

_KEPT_NOWHERE = "nothing is kept from one request to the next; leave it out and send the whole conversation as input"


class MessageItem(WireModel):
    """What somebody has said."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str,
        text_parts("input_text", "output_text"),
        Field(description="A string, or a list of text parts, which are joined."),
    ]
    id: Ignored = None
    status: Ignored = None
    phase: Ignored = None


class ReasoningItem(WireModel):
    """What the assistant thought before it went on, as an earlier reply told it."""

    type: Literal["reasoning"]
    content: Annotated[str, text_parts("reasoning_text")] | None = None
    summary: Annotated[str, text_parts("summary_text"), Field(description="Where there is no content.")] | None = None
    encrypted_content: Annotated[
        object, neutral(otherwise="only the server that encrypted it can read it; send the reasoning's text as content")
    ] = None
    id: Ignored = None
    status: Ignored = None

    @property
    def text(self) -> str:
        return self.content or self.summary or ""


class FunctionCallItem(WireModel):
    """A call that the assistant has made."""

    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: Annotated[str, Field(description="JSON text, as the model wrote it.")]
    caller: Annotated[object, neutral()] = None
    namespace: Annotated[object, neutral()] = None
    id: Ignored = None
    status: Ignored = None


class FunctionCallOutputItem(WireModel):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: Annotated[str, text_parts("input_text")]
    caller: Annotated[object, neutral()] = None
    namespace: Annotated[object, neutral()] = None
    name: Ignored = None  # the call has it
    id: Ignored = None
    status: Ignored = None


_ITEM_TYPES = ("message", "reasoning", "function_call", "function_call_output")
# What pydantic puts into an error's location for the forms; nothing that a client wrote.
INPUT_FORMS = tuple(f"<{kind}>" for kind in _ITEM_TYPES)


def _item_type(item: object) -> object:
    """A message may leave its type out."""
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


def _item_form(item: object) -> str | None:
    kind = _item_type(item)
    return f"<{kind}>" if kind in _ITEM_TYPES else None


def _served_item(item: object) -> object:
    kind = _item_type(item)
    if kind == "item_reference":
        raise invalid("nothing is kept that it could refer to; send the item itself")
    if isinstance(kind, str) and kind not in _ITEM_TYPES:
        raise unsupported(f"An item of type {kind[:32]!r}")
    return item


InputItem = Annotated[
    Annotated[MessageItem, Tag(INPUT_FORMS[0])]
    | Annotated[ReasoningItem, Tag(INPUT_FORMS[1])]
    | Annotated[FunctionCallItem, Tag(INPUT_FORMS[2])]
    | Annotated[FunctionCallOutputItem, Tag(INPUT_FORMS[3])],
    Discriminator(
        _item_form,
        custom_error_type="invalid_value",
        custom_error_message=f"An item must be an object of one of the types {', '.join(_ITEM_TYPES)}",
    ),
    BeforeValidator(_served_item),
]


def _item_list(value: object) -> object:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise invalid("input must be a string or a list of items")
    return value


class ResponsesTool(Function):
    """A function that the model may call."""

    type: Literal["function"]
    defer_loading: Annotated[object, neutral(False)] = None
    allowed_callers: Annotated[object, neutral(["direct"])] = None
    output_schema: Annotated[object, neutral()] = None


def _served_tool(tool: object) -> object:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise unsupported(f"A tool of type {kind[:32]!r}")
    return tool


class NamedFunctionTool(NamedFunction):
    """The one function that has to be called."""

    type: Literal["function"]


def _served_choice(choice: object) -> object:
    kind = choice.get("type") if isinstance(choice, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise unsupported(f"A choice of type {kind[:32]!r}")
    if choice is None or choice in ("none", "auto", "required") or isinstance(choice, dict):
        return choice
    raise invalid("tool_choice must be 'none', 'auto', 'required' or {'type': 'function', 'name': '...'}")


class SchemaFormat(NamedSchema):
    """JSON that a schema describes."""

    type: Literal["json_schema"]


AnswerFormat = Annotated[
    Annotated[TextFormat, Tag(FORMAT_FORMS[0])]
    | Annotated[JsonObjectFormat, Tag(FORMAT_FORMS[1])]
    | Annotated[SchemaFormat, Tag(FORMAT_FORMS[2])]
    | Annotated[GrammarFormat, Tag(FORMAT_FORMS[3])],
    Discriminator(
        format_form,
        custom_error_type="invalid_value",
        custom_error_message=f"text.format needs a 'type', one of {', '.join(FORMAT_TYPES)}",
    ),
]


class TextOptions(WireModel):
    """What the answer's text has to be."""

    format: AnswerFormat | None = None
    verbosity: Ignored = None


class ReasoningOptions(WireModel):
    """How long to think."""

    effort: Annotated[str | None, Field(max_length=32, description="Given to the chat template.")] = None
    summary: Annotated[
        object, neutral("auto", otherwise="reasoning comes whole, without a summary; say 'auto' or leave it out")
    ] = None
    generate_summary: Annotated[object, neutral("auto")] = None
    context: Annotated[object, neutral("auto")] = None
    mode: Annotated[object, neutral("standard")] = None


MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]
# Reasoning comes as text that can be sent back as it is, which is what its encrypted form is asked for.
Include = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]


class ResponsesRequest(GenerationRequest):
    """POST /v1/responses"""

    input: Annotated[
        list[InputItem],
        BeforeValidator(_item_list, json_schema_input_type=str | list[InputItem]),
        Field(min_length=1, max_length=MAX_ITEMS, description="The conversation, or what the user says."),
    ]
    instructions: Annotated[str | None, Field(description="A system message before the input.")] = None
    max_output_tokens: Annotated[int | None, Field(ge=1, le=MAX_INTEGER)] = None
    include: Annotated[list[Include] | None, Field(max_length=16)] = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: Annotated[
        list[Annotated[ResponsesTool, BeforeValidator(_served_tool)]] | None, Field(max_length=MAX_TOOLS)
    ] = None
    tool_choice: Annotated[
        NamedFunctionTool | Literal["none", "auto", "required"] | None, BeforeValidator(_served_choice)
    ] = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    metadata: Annotated[
        dict[MetadataKey, MetadataValue] | None, Field(max_length=MAX_METADATA, description="Comes back in the reply.")
    ] = None

    # What would be kept, or done while nobody waits.
    store: Annotated[object, neutral(False, otherwise="nothing is kept here; say false or leave it out")] = None
    previous_response_id: Annotated[object, neutral(otherwise=_KEPT_NOWHERE)] = None
    conversation: Annotated[object, neutral(otherwise=_KEPT_NOWHERE)] = None
    prompt: Annotated[object, neutral(otherwise="no prompts are stored here; send its text as instructions")] = None
    background: Annotated[
        object, neutral(False, otherwise="answers are given while the client waits; say false or leave it out")
    ] = None
    truncation: Annotated[
        object, neutral("disabled", otherwise="an input that is too long is refused and never cut; say 'disabled'")
    ] = None
    context_management: Annotated[object, neutral([])] = None
    access_programs: Annotated[object, neutral()] = None
    image: Annotated[object, neutral()] = None

    # What chats call otherwise, or only they have.
    max_tokens: Annotated[None, neutral(otherwise="it is called max_output_tokens here")] = None
    response_format: Annotated[None, neutral(otherwise="it is called text.format here")] = None
    n: Annotated[Literal[1] | None, neutral(1, otherwise="a response is one answer; send more requests")] = None

    max_tool_calls: Ignored = None  # of tools that a server runs itself

    @property
    def token_limit(self) -> int | None:
        return self.max_output_tokens

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @model_validator(mode="after")
    def _fields_agree(self) -> ResponsesRequest:
        if self.top_logprobs and not self.wants_logprobs:
            raise invalid(f"top_logprobs needs 'include': ['{LOGPROBS}']", "top_logprobs")
        if self.stream_options is not None and self.stream_options.continuous_usage_stats:
            raise invalid("the usage comes with the last event; leave it out", "stream_options.continuous_usage_stats")
        return self
