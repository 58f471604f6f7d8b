"""The shapes of POST /v1/responses' answers, whole and as the events of a stream, for the description of the API."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from heddle_server.api.generation_shapes import Source, TokenLogprob

ItemStatus = Literal["in_progress", "completed", "incomplete"]
Place = Annotated[int, Field(ge=0)]


class OutputText(TypedDict):
    """Text of an answer."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)]
    logprobs: list[TokenLogprob]


class ReasoningText(TypedDict):
    """Text of what was thought before."""

    type: Literal["reasoning_text"]
    text: str


class OutputMessage(TypedDict):
    """What the assistant says."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputReasoning(TypedDict):
    """What it thought before it went on."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: Annotated[list[Any], Field(max_length=0)]
    content: list[ReasoningText]


class OutputFunctionCall(TypedDict):
    """A function that it calls."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: Annotated[str, Field(description="JSON text.")]


OutputItem = OutputMessage | OutputReasoning | OutputFunctionCall


class IncompleteDetails(TypedDict):
    """Why a response ends early."""

    reason: Literal["max_output_tokens"]


class ResponseError(TypedDict):
    """Why a response failed, in OpenAI's few codes."""

    code: Literal["server_error", "rate_limit_exceeded"]
    message: str


class InputTokensDetails(TypedDict):
    """Where the prompt's tokens came from."""

    cached_tokens: Annotated[int, Field(ge=0, description="Found in the prefix cache.")]
    cache_write_tokens: Literal[0]


class OutputTokensDetails(TypedDict):
    """What the answer's tokens were for."""

    reasoning_tokens: Annotated[int, Field(ge=0)]


class ResponseUsage(TypedDict):
    """Tokens of prompt and answer."""

    input_tokens: Annotated[int, Field(ge=0)]
    input_tokens_details: InputTokensDetails
    output_tokens: Annotated[int, Field(ge=0)]
    output_tokens_details: OutputTokensDetails
    total_tokens: Annotated[int, Field(ge=0)]


class ResponseText(TypedDict):
    """What the text had to be."""

    format: Annotated[dict[str, Any] | None, Field(description="As the request had it; null for a grammar.")]


class ResponseReasoning(TypedDict):
    """How long it was to think."""

    effort: str | None
    summary: None


class ResponseTool(TypedDict):
    """A function that could be called."""

    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class ChosenFunction(TypedDict):
    """The one function that had to be called."""

    type: Literal["function"]
    name: str


class ResponseObject(TypedDict):
    """A response: its output, and what was asked for with the defaults that were used."""

    id: str
    object: Literal["response"]
    created_at: Annotated[int, Field(description="Unix time in seconds.")]
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: Annotated[str, Field(description="As the request named it.")]
    output: list[OutputItem]
    usage: ResponseUsage | None
    instructions: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    top_logprobs: int
    text: ResponseText
    reasoning: ResponseReasoning
    tools: list[ResponseTool]
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction
    parallel_tool_calls: bool
    metadata: dict[str, str]
    store: Literal[False]
    background: Literal[False]
    previous_response_id: None
    truncation: Literal["disabled"]
    service_tier: Literal["default"]
    heddle: NotRequired[Annotated[Source, Field(description="When it is over.")]]


class StreamEvent(TypedDict):
    """What every event has."""

    sequence_number: Place


class ResponseEvent(StreamEvent):
    """The response as it is now."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponseObject


class ItemEvent(StreamEvent):
    """An item begins, or is done."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: Place
    item: OutputItem


class ItemPlace(StreamEvent):
    """Which item it is about."""

    item_id: str
    output_index: Place


class PartEvent(ItemPlace):
    """A part begins, or is done."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: Place
    part: OutputText | ReasoningText


class TextDeltaEvent(ItemPlace):
    """More of the answer's text."""

    type: Literal["response.output_text.delta"]
    content_index: Place
    delta: str
    logprobs: list[TokenLogprob]


class TextDoneEvent(ItemPlace):
    """All of the answer's text."""

    type: Literal["response.output_text.done"]
    content_index: Place
    text: str
    logprobs: list[TokenLogprob]


class ReasoningDeltaEvent(ItemPlace):
    """More of the reasoning."""

    type: Literal["response.reasoning_text.delta"]
    content_index: Place
    delta: str


class ReasoningDoneEvent(ItemPlace):
    """All of the reasoning."""

    type: Literal["response.reasoning_text.done"]
    content_index: Place
    text: str


class ArgumentsDeltaEvent(ItemPlace):
    """More of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDoneEvent(ItemPlace):
    """All of a call's arguments."""

    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


class ErrorEvent(StreamEvent):
    """What went wrong; response.failed follows."""

    type: Literal["error"]
    code: str
    message: str
    param: str | None


ResponseStreamEvent = (
    ResponseEvent
    | ItemEvent
    | PartEvent
    | TextDeltaEvent
    | TextDoneEvent
    | ReasoningDeltaEvent
    | ReasoningDoneEvent
    | ArgumentsDeltaEvent
    | ArgumentsDoneEvent
    | ErrorEvent
)
