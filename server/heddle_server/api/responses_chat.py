"""A request for a response as the chat that it is: items become turns, and errors name the fields that were sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from heddle_server.api.errors import ApiError, InvalidRequest
from heddle_server.api.protocol import ChatCompletionRequest, GenerationRequest
from heddle_server.api.responses_protocol import (
    AnswerFormat,
    FunctionCallItem,
    FunctionCallOutputItem,
    InputItem,
    MessageItem,
    NamedFunctionTool,
    ReasoningItem,
    ResponsesRequest,
    ResponsesTool,
    SchemaFormat,
)
from heddle_server.api.tools import Function
from heddle_server.api.validation import checked

Json = dict[str, Any]

# Fields of chats that have another name here.
_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
# What both have and mean alike; what has no type of its own changes nothing.
_SHARED = {name for name, field in GenerationRequest.model_fields.items() if field.annotation is not object} - {
    *("stream", "stream_options", "max_tokens", "n", "response_format")
}
_FUNCTION_FIELDS = set(Function.model_fields)


def chat_of(body: ResponsesRequest) -> ChatCompletionRequest:
    """Raises `InvalidRequest`, by the chat's own checks."""
    instructions = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    fields = {
        **body.model_dump(mode="json", include=_SHARED, exclude_unset=True),
        "messages": [*instructions, *_messages(body.input)],
        "max_completion_tokens": body.max_output_tokens,
        "logprobs": body.wants_logprobs,
        "top_logprobs": body.top_logprobs if body.wants_logprobs else None,
        "response_format": _response_format(body.text.format if body.text else None),
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "tools": None if body.tools is None else [_tool(tool) for tool in body.tools],
        "tool_choice": _tool_choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "chat_template_kwargs": body.chat_template_kwargs,
    }
    return checked(ChatCompletionRequest, fields)


@contextmanager
def named_as_sent() -> Iterator[None]:
    """Around what is done for the chat: its errors name the fields of the response."""
    try:
        yield
    except ApiError as error:
        rename_fields(error)
        raise


def rename_fields(error: ApiError) -> None:
    """The names of the chat's fields, in what an error says, become those of the response's."""
    for name, own_name in _NAMES.items():
        if error.param is not None and error.param.split(".")[0] == name:
            error.message = error.message.replace(f"'{error.param}'", f"'{own_name}'")
            error.param = own_name
        if "_" in name:  # "messages" is a word as well
            error.message = error.message.replace(name, own_name)


def _messages(items: Sequence[InputItem]) -> list[Json]:
    messages: list[Json] = []
    call_ids = set[str]()
    for number, item in enumerate(items):
        if isinstance(item, FunctionCallOutputItem):
            if item.call_id not in call_ids:
                message = f"No function_call before it has the call_id {item.call_id[:64]!r}; send the call as well."
                raise InvalidRequest(message, param=f"input.{number}.call_id")
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
        elif isinstance(item, MessageItem) and item.role != "assistant":
            messages.append({"role": item.role, "content": item.content})
        else:
            if not messages or not _goes_on(messages[-1], item):
                messages.append({"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []})
            _add(messages[-1], item)
            if isinstance(item, FunctionCallItem):
                call_ids.add(item.call_id)
    return messages


def _goes_on(message: Json, item: InputItem) -> bool:
    """Whether an item is of the same turn of the assistant's: it thinks, says something and calls, and only after
    calls does it go on in the same turn."""
    if message["role"] != "assistant":
        return False
    return isinstance(item, FunctionCallItem) or bool(message["tool_calls"]) or not message["content"]


def _add(message: Json, item: InputItem) -> None:
    match item:
        case ReasoningItem():
            message["reasoning_content"] += item.text
        case MessageItem():
            message["content"] += item.content
        case FunctionCallItem():
            function = {"name": item.name, "arguments": item.arguments}
            message["tool_calls"].append({"id": item.call_id, "type": "function", "function": function})


def _tool(tool: ResponsesTool) -> Json:
    return {"type": "function", "function": tool.model_dump(include=_FUNCTION_FIELDS)}


def _tool_choice(choice: NamedFunctionTool | str | None) -> Json | str | None:
    if isinstance(choice, NamedFunctionTool):
        return {"type": "function", "function": {"name": choice.name}}
    return choice


def _response_format(answer_format: AnswerFormat | None) -> Json | None:
    if answer_format is None:
        return None
    fields = answer_format.model_dump(by_alias=True, exclude_unset=True)
    if isinstance(answer_format, SchemaFormat):
        return {"type": fields.pop("type"), "json_schema": fields}
    return fields
