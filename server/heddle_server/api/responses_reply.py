"""The response object and the events of its stream, as OpenAI's own client validates them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

from heddle_server.api.answer_source import final_headers, source_of
from heddle_server.api.errors import ApiError, envelope, kind_of
from heddle_server.api.generation import Answer, Delta
from heddle_server.api.response_format import GrammarFormat
from heddle_server.api.responses_chat import rename_fields
from heddle_server.api.responses_output import Output
from heddle_server.api.responses_protocol import NamedFunctionTool, ResponsesRequest, ResponsesTool
from heddle_server.api.tools import Function
from heddle_server.messages import FinishReason

Json = dict[str, Any]


class ResponsesReply:
    """One answer's. Whole or streamed, the response is what its last event holds."""

    has_named_events = True

    def __init__(self, answer: Answer, body: ResponsesRequest, model: str) -> None:
        """`model`: as the client named it."""
        self._answer = answer
        self._body = body
        self._model = model
        self._output = Output(answer.tokenizer)
        self._finish_reason: FinishReason | None = None
        self._numbers = itertools.count()

    def take(self, number: int, delta: Delta) -> None:
        """One more delta of a whole reply."""
        for _ in self.chunks(number, delta):
            pass  # the output keeps what it tells

    def whole(self) -> Json:
        """The reply to a request that does not stream, when all is taken."""
        *_, last = self.closing()
        response: Json = last["response"]
        return response

    def final_headers(self) -> dict[str, str]:
        """What is known of a whole reply besides its body."""
        return final_headers(self._answer)

    def opening(self) -> Iterator[Json]:
        """Events before the first token."""
        for name in ("response.created", "response.in_progress"):
            yield self._numbered({"type": name, "response": self._response("in_progress")})

    def chunks(self, number: int, delta: Delta) -> Iterator[Json]:
        """The events of one delta; `number` is always 0, for a response is one answer."""
        self._finish_reason = delta.finish_reason
        yield from map(self._numbered, self._output.take(delta))

    def closing(self) -> Iterator[Json]:
        """Events after the last token."""
        is_complete = self._finish_reason != "length"
        yield from map(self._numbered, self._output.finish(is_complete=is_complete))
        status = "completed" if is_complete else "incomplete"
        response = {
            **self._response(status),
            "completed_at": int(time.time()) if is_complete else None,
            "incomplete_details": None if is_complete else {"reason": "max_output_tokens"},
            "usage": self._usage(),
            "heddle": source_of(self._answer),
        }
        yield self._numbered({"type": f"response.{status}", "response": response})

    def failing(self, error: Exception) -> Iterator[Json]:
        """Events of an answer that ends in an error, told twice: a response has OpenAI's few codes only."""
        if isinstance(error, ApiError):
            rename_fields(error)
        told: Any = envelope(error)["error"]
        described = {"code": told["code"], "message": told["message"], "param": told["param"]}
        yield self._numbered({"type": "error", **described})
        code = "rate_limit_exceeded" if kind_of(error).status == 429 else "server_error"
        failed = {**self._response("failed"), "error": {"code": code, "message": told["message"]}}
        yield self._numbered({"type": "response.failed", "response": failed})

    def _numbered(self, event: Json) -> Json:
        return {**event, "sequence_number": next(self._numbers)}

    def _response(self, status: str) -> Json:
        body = self._body
        return {
            "id": f"resp_{self._answer.public_id}",
            "object": "response",
            "created_at": self._answer.created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self._model,
            "output": list(self._output.items),
            "usage": None,
            # What was asked for, with the defaults that were used.
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "presence_penalty": body.presence_penalty or 0.0,
            "frequency_penalty": body.frequency_penalty or 0.0,
            "top_logprobs": body.top_logprobs or 0,
            "text": {"format": _told_format(body)},
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "tools": [_told_tool(tool) for tool in body.tools or ()],
            "tool_choice": _told_choice(body.tool_choice),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "metadata": body.metadata or {},
            # What is the same for every response.
            "store": False,
            "background": False,
            "previous_response_id": None,
            "truncation": "disabled",
            "service_tier": "default",
        }

    def _usage(self) -> Json:
        (generation,) = self._answer.generations
        prompt, generated = generation.num_prompt_tokens, generation.num_generated_tokens
        return {
            "input_tokens": prompt,
            # OpenAI's client wants both. Nobody pays here for what is written, so that it is not counted.
            "input_tokens_details": {"cached_tokens": generation.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": generated,
            "output_tokens_details": {"reasoning_tokens": generation.num_reasoning_tokens},
            "total_tokens": prompt + generated,
        }


def _told_format(body: ResponsesRequest) -> Json | None:
    """None for a grammar: OpenAI's responses know no such format, and its client would refuse it."""
    asked = body.text.format if body.text else None
    if isinstance(asked, GrammarFormat):
        return None
    return {"type": "text"} if asked is None else asked.model_dump(by_alias=True)


def _told_tool(tool: ResponsesTool) -> Json:
    return {"type": tool.type, **tool.model_dump(include=set(Function.model_fields))}


def _told_choice(choice: NamedFunctionTool | str | None) -> Json | str:
    if isinstance(choice, NamedFunctionTool):
        return {"type": "function", "name": choice.name}
    return choice or "auto"
